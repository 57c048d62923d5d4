"""Temperatures that change while a model is trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from otkd.checks import check_positive


class TemperatureAnnealing(TrainerCallback):
    """Lowers the temperature of a loss linearly from epoch to epoch, ending at ``end``.

    In epoch e of E: τ = T + (end − T)·e/(E − 1), T being the temperature that the loss has when
    this is made; τ = T where E = 1. The temperature of the teacher follows where it is not set
    apart. A training resumed at an epoch goes on as if it had not stopped.

    Args:
        loss: an otkd loss with a temperature; of a weighted sum the term that is meant:
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
                f"{type(loss).__name__} has no temperature; of a weighted loss give the term to "
                "be annealed, loss.terms[name]"
            )
        if getattr(loss, "cost", None) == "hidden":
            raise ValueError(
                f'{type(loss).__name__}(cost="hidden") compares states: a temperature changes '
                "nothing"
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
        """Set the temperature of the epoch that begins."""
        epochs = state.num_train_epochs
        share = round(state.epoch or 0) / (epochs - 1) if epochs > 1 else 0.0
        self.loss.temperature = self.start + (self.end - self.start) * share
