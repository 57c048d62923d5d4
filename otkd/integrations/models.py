"""Questions to a model of transformers, or one that looks like it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def base_model(model: Any) -> Any:
    """The model inside an adapter model of PEFT, whose class and signature say what it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def argument_names(model: Any) -> set[str]:
    """The arguments that the forward pass of ``model`` names."""
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def is_encoder_decoder(model: Any) -> bool:
    """Whether the configuration of ``model`` says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal_lm(model: Any) -> bool:
    """Whether the loss of ``model`` itself shifts: by its loss type, or by its class."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = base_model(model)
    by_type = LOSS_MAPPING.get(getattr(base, "loss_type", None) or "") is ForCausalLMLoss
    by_name = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return (by_type or by_name) and not is_encoder_decoder(base)


def without_labels(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with which a model computes no loss of its own."""
    rest = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
    labels = inputs.get("labels")
    if labels is not None and is_encoder_decoder(model) and "decoder_input_ids" not in rest:
        # Such a model derives its decoder's input from the labels.
        rest["decoder_input_ids"] = base_model(model).prepare_decoder_input_ids_from_labels(labels)
    return rest


def read_outputs(outputs: Any, *, features: bool) -> dict[str, Tensor]:
    """``logits``, and with ``features`` the last hidden states too, of a model's outputs.

    Features are ``(batch, positions, width)`` where the logits have positions, else the first
    token's ``(batch, width)``.

    Raises:
        ValueError: if there are no hidden states to be features.
    """
    logits = _field(outputs, "logits")
    if logits is None:
        logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    if not features:
        return {"logits": logits}
    states = _field(outputs, "decoder_hidden_states") or _field(outputs, "hidden_states")
    if not states:
        raise ValueError("the loss compares features, but the model gives no hidden_states")
    return {"logits": logits, "features": states[-1] if logits.ndim > 2 else states[-1][:, 0]}


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
