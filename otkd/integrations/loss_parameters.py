"""The parameters of a loss, such as a projection of features, that are trained with the student."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

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


class TrainsLoss(Trainer):
    """A Trainer whose optimiser and checkpoints include the parameters of a loss."""

    def _train_loss(self, loss: nn.Module) -> None:
        """Include the parameters of this loss."""
        self._loss_parameters = LossParameters(loss)
        if self._loss_parameters.learnable:
            self.add_callback(self._loss_parameters)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimiser, with the trainable parameters of the loss as an additional group.

        Raises:
            ValueError: if an optimiser was passed to Trainer that does not contain them.
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        self._loss_parameters.add_to(optimizer, given=given)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._loss_parameters.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._loss_parameters.load(checkpoint, self.args.device)
