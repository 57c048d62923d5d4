"""What a loss reads of a model's outputs, and which outputs are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from otkd.integrations.models import ModelDescription

# These fields are not separate heads: they route tokens to experts, look further ahead with the
# same head (ProphetNet), or are averaged into the logits.
_NO_HEADS = {
    "router_logits",
    "encoder_router_logits",
    "decoder_router_logits",
    "logits_ngram",
    "cls_logits",
    "distillation_logits",
}


def other_heads(names: Any) -> list[str]:
    """The output fields that are scores of other heads than ``logits``."""
    return sorted(
        name
        for name in names
        if name not in _NO_HEADS
        and name != "logits"
        and ("logits" in name.split("_") or name.startswith("pred_"))
    )


def read_outputs(
    outputs: Any, description: ModelDescription, role: str, *, features: bool = False
) -> dict[str, Tensor]:
    """``logits`` of a model's outputs, and with ``features`` also the last hidden states.

    Features are ``(batch, positions, width)`` if the logits have positions, otherwise those of the
    first token, ``(batch, width)``.

    Args:
        outputs: with a field or key ``logits``, or the logits themselves.
        description: of the model.
        role: ``"student"`` or ``"teacher"``.
        features: whether hidden states are needed.

    Raises:
        ValueError: if the outputs have no logits, or the logits are not scores of classes; if a
            student has other heads; if there are no hidden states for the features.
    """
    who = f"the {role} {description.name}"
    logits = outputs if isinstance(outputs, Tensor) else _field(outputs, "logits")
    named = _names(outputs)
    if logits is None:
        given = ", ".join(named) or f"a {type(outputs).__name__} without names"
        raise ValueError(
            f"{who} returns no logits, but {given}. A loss needs the logits of a model with one "
            "head, as an output named logits or as its only output tensor"
        )
    if not isinstance(logits, Tensor):
        raise ValueError(f"the logits of {who} must be a tensor, got {type(logits).__name__}")
    heads = other_heads(name for name in named if _field(outputs, name) is not None)
    if heads and role == "student":
        raise ValueError(
            f"{who} returns {', '.join(heads)} besides logits. A loss over the logits would not "
            "train those heads: use a model with one head"
        )
    if logits.ndim < 2:
        raise ValueError(
            f"{who} returns one number per example, logits of shape {tuple(logits.shape)}, but a "
            "loss compares scores of classes, (batch, classes) or (batch, positions, vocab)"
        )
    if logits.shape[-1] == 1:
        raise ValueError(
            f"the logits of {who} have one class, shape {tuple(logits.shape)}, whose probability "
            "is always 1, so every loss is 0. For regression use the squared error; for yes or no "
            "use two classes"
        )
    if not features:
        return {"logits": logits}
    states = _field(outputs, "decoder_hidden_states") or _field(outputs, "hidden_states")
    if not states:
        raise ValueError(f"the loss compares features, but {who} returns no hidden_states")
    return {"logits": logits, "features": states[-1] if logits.ndim > 2 else states[-1][:, 0]}


def auxiliary_loss(outputs: Any, description: ModelDescription) -> Tensor | None:
    """What the model's own loss adds to the term of its labels, with its own weights.

    These are the load balance of a mixture of experts (``aux_loss``), the size of the router logits
    (``z_loss``), and the size of the model's own logits (Bamba); None if there are none.
    """
    total = None
    if description.logit_penalty:
        sizes = _field(outputs, "logits").logsumexp(-1).float()
        total = description.logit_penalty * sizes.square().mean()
    for name, coefficient in description.auxiliary.items():
        value = _field(outputs, name)
        if isinstance(value, Tensor):  # it is a plain number if half of the model has no experts
            total = coefficient * value if total is None else total + coefficient * value
    return total


def _names(outputs: Any) -> list[str]:
    if isinstance(outputs, Mapping):
        return [str(name) for name in outputs]
    if isinstance(outputs, Tensor | list):
        return []
    names = getattr(outputs, "_fields", None) or getattr(outputs, "__dict__", ())
    return [name for name in names if not name.startswith("_")]


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
