"""Shorter causal language models from some layers of a longer one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Where the base model of each kind has its layers. Kinds whose layers use one another's states, as
# those of Gemma 3n do, are not among them.
_LAYERS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "layers"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "layers"),
    "gpt2": "h",
}


def evenly_spaced(total: int, kept: int) -> list[int]:
    """Indices of ``kept`` of ``total`` layers, evenly spaced, with the first and the last.

    A single layer is the first.

    Example:
        >>> from otkd.tasks.causal_lm import evenly_spaced
        >>> evenly_spaced(30, 6)
        [0, 6, 12, 17, 23, 29]
    """
    return [round(index * (total - 1) / max(kept - 1, 1)) for index in range(kept)]


def student_of(teacher: PreTrainedModel, layers: int | Sequence[int] = 6) -> PreTrainedModel:
    """A new model with some layers of a causal language model.

    Embeddings, final norm and head are copied too, and stay tied if they are. The teacher is not
    changed and shares no memory with the student.

    Args:
        teacher: a Llama, Mistral, Qwen 2 or 3, Gemma (1, 2, or the text model of 3) or GPT-2 model
            with a language model's head.
        layers: the number of layers, which are then those of :func:`evenly_spaced`; or the indices
            of the layers, counted from 0, in the order in which the student has them.

    Returns:
        A model of the same class, on the same device and with the same dtype, in training mode.

    Raises:
        ValueError: if the teacher is of another kind, or does not have these layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        >>> teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
        >>> student = student_of(teacher, layers=2)
        >>> student.config.num_hidden_layers
        2
        >>> torch.equal(student.model.layers[1].mlp.up_proj.weight,
        ...             teacher.model.layers[3].mlp.up_proj.weight)
        True
    """
    prefix = _layer_prefix(teacher)
    kept = _indices(layers, teacher.config.num_hidden_layers)
    student: Any = type(teacher)(_shortened(teacher.config, kept))
    student.to(device=teacher.device, dtype=teacher.dtype)
    student.load_state_dict(_kept_weights(teacher.state_dict(), prefix, kept))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train()


def _layer_prefix(teacher: PreTrainedModel) -> str:
    """The start of the names of the layers' weights, as in ``model.layers.``."""
    config = teacher.config
    if config.model_type not in _LAYERS or teacher.get_output_embeddings() is None:
        raise ValueError(
            f"a student cannot be made from layers of a {type(teacher).__name__}: it must be a "
            f"causal language model of the kind {', '.join(sorted(_LAYERS))}"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "a student cannot be made from layers of a model with "
            "scale_attn_by_inverse_layer_idx=True: its layers work at one place only"
        )
    return f"{teacher.base_model_prefix}.{_LAYERS[config.model_type]}."


def _indices(layers: int | Sequence[int], total: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(
                f"layers={layers}: the teacher has {total} layers, so pass 1 … {total}"
            )
        return evenly_spaced(total, layers)
    kept = list(layers)
    if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(total)):
        raise ValueError(
            f"layers={kept}: the teacher has {total} layers, so pass different indices from "
            f"0 … {total - 1}"
        )
    return kept


def _shortened(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    total = config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    types = getattr(config, "layer_types", None)
    if types is not None and len(types) == total:
        changes["layer_types"] = [types[index] for index in kept]
    shorter = copy.deepcopy(config)
    shorter.update(changes)
    return shorter


def _kept_weights(
    weights: dict[str, torch.Tensor], prefix: str, kept: list[int]
) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in weights.items():
        if not name.startswith(prefix):
            found[name] = weight
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if int(index) in kept:
            found[f"{prefix}{kept.index(int(index))}.{rest}"] = weight
    return found
