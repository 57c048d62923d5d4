"""Prediction over encoded rows, made ready once and done often."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkd.integrations.models import describe
from otkd.integrations.outputs import read_outputs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 64


class Predictor:
    """Rows in padded batches of similar length, for many models or many evaluations of one.

    Args:
        rows: encoded rows (see :func:`otkd.tasks.encode`).
        tokenizer: pads the batches.
        bf16: predict under bfloat16 autocast.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, bf16: bool):
        self.bf16 = bf16
        order = torch.argsort(torch.tensor(rows["length"][:]), descending=True, stable=True)
        self._back = torch.argsort(order)
        inputs = [name for name in rows.column_names if name not in ("length", "labels")]
        rows = rows.select_columns(inputs)
        self._batches = [
            dict(tokenizer.pad(rows[part.tolist()], return_tensors="pt"))
            for part in order.split(_ROWS)
        ]

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Float32 logits ``(rows, num_labels)``, in the order of the rows.

        Raises:
            FloatingPointError: if one is not finite.
        """
        return _finite("logits", self._outputs(model, features=False)["logits"])

    def features(self, model: PreTrainedModel) -> Tensor:
        """Float32 states ``(rows, width)``, as losses over representations compare them.

        Raises:
            FloatingPointError: if one is not finite.
        """
        return _finite("states", self._outputs(model, features=True)["features"])

    @torch.no_grad()
    def _outputs(self, model: PreTrainedModel, *, features: bool) -> dict[str, Tensor]:
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        description = describe(model)
        options = {"output_hidden_states": True} if features else {}
        parts: dict[str, list[Tensor]] = {}
        with torch.autocast(device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            for batch in self._batches:
                inputs = {
                    name: x.to(device) for name, x in batch.items() if name in description.arguments
                }
                outputs = read_outputs(
                    model(**inputs, **options), description, "student", features=features
                )
                for name, values in outputs.items():
                    parts.setdefault(name, []).append(values.float())
        model.train(was_training)
        return {name: torch.cat(values).cpu()[self._back] for name, values in parts.items()}


def _finite(what: str, values: Tensor) -> Tensor:
    # The largest of numbers with a NaN among them is NaN: no score would tell.
    bad = int((~values.isfinite()).any(-1).sum())
    if bad:
        raise FloatingPointError(
            f"the model's {what} on {bad} of {len(values)} rows are not finite"
        )
    return values
