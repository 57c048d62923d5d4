"""Temperatures that change while a model is trained."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from otkd.checks import check_positive

_ROUNDING = 1e-6


class TemperatureAnnealing(TrainerCallback):
    """Lowers the temperature of a loss linearly from epoch to epoch, down to ``end``.

    In epoch e of E: τ = T + (end − T)·e/(E − 1), where T is the temperature of the loss when the
    callback is created; τ = T if E = 1. The teacher's temperature is the same unless it is set
    separately. A resumed training continues with the temperature of its epoch.

    Args:
        loss: an otkd loss with a temperature. For a weighted loss pass the term:
            ``TemperatureAnnealing(loss.terms["kl"])``.
        end: the temperature in the last epoch.

    Raises:
        TypeError: if the loss has no temperature.
        ValueError: if ``end`` is not above 0.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation",
    with ``end`` = 1.
    """

    def __init__(self, loss: nn.Module, end: float = 1.0) -> None:
        if not isinstance(getattr(loss, "temperature", None), (int, float)):
            raise TypeError(
                f"{type(loss).__name__} has no temperature. For a weighted loss, pass the term to "
                "be annealed, loss.terms[name]"
            )
        if getattr(loss, "cost", None) == "hidden":
            raise ValueError(
                f'{type(loss).__name__}(cost="hidden") compares hidden states, so a temperature '
                "has no effect"
            )
        check_positive(end=end)
        self.loss: Any = loss
        self.start: float = self.loss.temperature
        self.end = end

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Set the temperature of the epoch that begins or is resumed.

        Raises:
            ValueError: if the number of epochs is unknown.
        """
        epochs = state.num_train_epochs
        if epochs == sys.maxsize:  # set by Trainer for a data set without a length
            raise ValueError(
                "TemperatureAnnealing needs the number of epochs, which is not known for a data "
                "set without a length: set loss.temperature in a callback of your own"
            )
        # A training resumed within an epoch has a fractional epoch. The margin is for the rounding
        # of a sum of steps.
        epoch = math.floor((state.epoch or 0) + _ROUNDING)
        share = epoch / (epochs - 1) if epochs > 1 else 0.0
        self.loss.temperature = self.start + (self.end - self.start) * share
