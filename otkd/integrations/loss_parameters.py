"""The parameters of a loss, such as a projection of features, that are trained with the student."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

LOSS_STATE_NAME = "loss.pt"


class LossParameters(TrainerCallback):
    """Optimises the parameters of a loss, clears their gradients, and saves and loads them.

    Trainer itself does so only for its model.
    """

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss
        self.learnable = [p for p in loss.parameters() if p.requires_grad]

    def add_to(self, optimizer: torch.optim.Optimizer, *, given: bool) -> None:
        """Add the parameters to the optimiser as a group of their own, without weight decay.

        Raises:
            ValueError: if the optimiser was ``given`` to Trainer and does not contain them.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.learnable if id(p) not in held]
        if missing and given:
            raise ValueError(
                "the optimizer that was passed does not contain the trainable parameters of loss"
            )
        if missing:
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})

    def save(self, folder: str) -> None:
        """Write the state of the loss to a checkpoint."""
        if self.learnable:
            torch.save(self.loss.state_dict(), os.path.join(folder, LOSS_STATE_NAME))

    def load(self, checkpoint: str | None, device: torch.device) -> None:
        """Read the state of the loss from a checkpoint, if training is resumed from one."""
        if self.learnable and checkpoint is not None:
            path = os.path.join(checkpoint, LOSS_STATE_NAME)
            self.loss.load_state_dict(torch.load(path, map_location=device, weights_only=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear the gradients of the last step."""
        self.loss.zero_grad()
