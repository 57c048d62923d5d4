"""What the trainer needs to know of a model, from its class, signature and configuration."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from otkd.checks import as_class_labels
from otkd.integrations.batches import label_key, without_labels
from otkd.integrations.packing import PACKED_KEY
from otkd.integrations.tasks import Task, task_of

# They are in the mapping of causal language models, but see both sides of a position: no shift.
_SEE_BOTH_SIDES = {"XLNetLMHeadModel", "XLMWithLMHeadModel"}

# The only child of modules that wrap a model.
_WRAPPERS = (["module"], ["_fsdp_wrapped_module"])

# The entries of a packed batch from which a model reads where documents start.
_DOCUMENT_MARKS = ("position_ids", "cu_seq_lens_q", "seq_idx")


@dataclass(frozen=True)
class ModelDescription:
    """Properties of a model for the trainer; see :func:`describe`.

    Attributes:
        name: its class.
        task: what it is for; None for modules that transformers does not know.
        arguments: the arguments that its forward pass names.
        required: those without a default.
        caches: whether it takes ``use_cache``, by name or for the model inside it.
        fields: the names of its outputs, if its signature tells; otherwise None.
        shifts: whether its logits are for the label of the next position.
        decodes: whether it has a decoder whose input is derived from the labels.
        mask_name: the input that masks the tokens that its logits belong to.
        tokens: number of rows of its input embedding, if it has one.
        targets: number of tokens that it predicts, if it has an output embedding.
        problem_type: of its configuration, for classifiers.
        num_labels: of its configuration, for classifiers.
        label_names: the names of its classes, unless they are the defaults.
        virtual_tokens: number of positions that a prompt-learning adapter adds before the text.
        auxiliary: coefficient of each auxiliary output in its own loss, e.g. ``aux_loss``.
        logit_penalty: coefficient of the mean square of log Σ exp(logits) in its own loss.
    """

    name: str
    task: Task | None
    arguments: frozenset[str]
    required: frozenset[str]
    caches: bool
    fields: frozenset[str] | None
    shifts: bool
    decodes: bool
    mask_name: str
    tokens: int | None
    targets: int | None
    problem_type: str | None
    num_labels: int | None
    label_names: tuple[str, ...]
    virtual_tokens: int
    auxiliary: dict[str, float]
    logit_penalty: float


def describe(model: nn.Module) -> ModelDescription:
    """Describe a model, which may be wrapped."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    task = task_of(base)
    named = _parameters(base)
    arguments = frozenset(p.name for p in named)
    inner = getattr(config, "text_config", None)  # of InstructBLIP, which has it there only
    encodes = any(getattr(c, "is_encoder_decoder", False) for c in (config, inner))
    generates = task is not None and task.generates
    parents = {parent.__name__ for parent in type(base).__mro__}
    classifies = task is not None and task.classifies
    decodes = encodes and "decoder_input_ids" in arguments and (generates or task is None)
    return ModelDescription(
        name=type(base).__name__,
        task=task,
        arguments=arguments,
        required=frozenset(p.name for p in named if p.default is p.empty),
        caches="use_cache" in arguments or (generates and _takes_any(base) and inner is not None),
        fields=_output_fields(base),
        shifts=generates and not encodes and not parents & _SEE_BOTH_SIDES,
        decodes=decodes,
        mask_name="decoder_attention_mask" if decodes else "attention_mask",
        tokens=_rows(base, "get_input_embeddings"),
        targets=_rows(base, "get_output_embeddings"),
        problem_type=getattr(config, "problem_type", None) if classifies else None,
        num_labels=getattr(config, "num_labels", None) if classifies else None,
        label_names=_label_names(config) if classifies or task is None else (),
        virtual_tokens=_virtual_tokens(model),
        auxiliary=_auxiliary_coefficients(base, config),
        logit_penalty=float(getattr(base, "z_loss_coefficient", None) or 0.0),
    )


def unwrapped(model: Any) -> Any:
    """The model inside wrappers that change neither its inputs nor its outputs.

    These are ``torch.compile``, PEFT adapters, FSDP, and modules whose only child is ``module``:
    DDP, averaged and accelerated models.
    """
    while True:
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        elif isinstance(model, nn.Module) and list(model._modules) in _WRAPPERS:
            (inner,) = model.children()
        else:
            return model
        if inner is model:
            return model
        model = inner


def adapted(model: Any) -> Any:
    """The model with adapters inside ``torch.compile``, DDP and other wrappers; None without."""
    while not hasattr(model, "peft_config"):
        if not isinstance(model, nn.Module):
            return None
        model = getattr(model, "_orig_mod", None) or model._modules.get("module")
    return model


def own_inputs(
    model: nn.Module,
    description: ModelDescription,
    inputs: Mapping[str, Any],
    *,
    others: Collection[str],
    label_names: Iterable[str],
    hidden_states: bool,
) -> dict[str, Any]:
    """The part of a batch that ``model`` reads to predict the labels.

    It consists of the arguments that its signature names, and of those that no model names. The
    input of a decoder is derived from the labels by the model's own method. A model without such a
    method, or one that requires labels, gets the labels and computes a loss that is not used.

    Args:
        model: the model, which may be wrapped.
        description: of the model.
        inputs: the batch.
        others: the arguments of the other models.
        label_names: see :func:`~otkd.integrations.batches.label_key`.
        hidden_states: whether the model must return its hidden states.

    Raises:
        ValueError: if the batch is packed, and the model does not read where its documents start.
    """
    named, key = description.arguments, label_key(inputs, label_names)
    labels = None if key is None else as_class_labels(inputs[key])
    share = {
        name: value
        for name, value in without_labels(inputs, label_names).items()
        if name in named or name not in others or not named
    }
    if PACKED_KEY in inputs and not any(name in share for name in _DOCUMENT_MARKS):
        raise ValueError(
            f"the collator packs the examples into one row, but {description.name} gets none of "
            f"{', '.join(_DOCUMENT_MARKS)}, so each document would see those before it: pad the "
            "examples, or use DataCollatorWithFlattening and a model that reads position_ids"
        )
    if description.caches:
        # With a cache, models attend across packed documents. Trainer turns it off in the
        # configuration of the student, but not in those of the models inside it.
        share["use_cache"] = False
    if hidden_states:
        share["output_hidden_states"] = True
    if labels is None:
        return share
    labels = labels.clone()  # FSMT replaces -100 in the labels that it is given
    base = unwrapped(model)
    derive: Any = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if description.decodes and derive is None:
        # Also with decoder_input_ids, because NLLB-MoE balances its experts only if it has labels.
        return share | ({"labels": labels} if "labels" in description.arguments else {})
    if description.decodes and not {"decoder_input_ids", "decoder_inputs_embeds"} & share.keys():
        share["decoder_input_ids"] = derived = derive(labels)
        if description.name == "EncoderDecoderModel" and "decoder_attention_mask" not in share:
            # Unlike other models, it also masks the replacements of −100 in its decoder.
            share["decoder_attention_mask"] = (derived != base.config.pad_token_id).to(labels.dtype)
    return share | ({"labels": labels} if "labels" in description.required else {})


def _parameters(base: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(base.forward).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _takes_any(base: Any) -> bool:
    parameters = inspect.signature(base.forward).parameters.values()
    return any(p.kind == p.VAR_KEYWORD for p in parameters)


def _output_fields(base: Any) -> frozenset[str] | None:
    try:
        returned = typing.get_type_hints(type(base).forward).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    for each in typing.get_args(returned) or (returned,):
        if isinstance(each, type) and is_dataclass(each):
            return frozenset(field.name for field in fields(each))
    return None


def _rows(base: Any, getter: str) -> int | None:
    try:
        weight = getattr(base, getter)().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _label_names(config: Any) -> tuple[str, ...]:
    names = getattr(config, "id2label", None) or {}
    names = tuple(str(names[index]) for index in sorted(names))
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _virtual_tokens(model: Any) -> int:
    adapter = getattr(adapted(model), "active_peft_config", None)
    if adapter is None or not getattr(adapter, "is_prompt_learning", False):
        return 0
    if "PREFIX_TUNING" in str(getattr(adapter, "peft_type", "")):
        return 0  # the prefix is in the key-value cache, not among the positions
    return int(getattr(adapter, "num_virtual_tokens", 0) or 0)


def _auxiliary_coefficients(base: Any, config: Any) -> dict[str, float]:
    """The coefficients in the losses of mixtures of experts in transformers."""
    found = {}
    for ending, names in (
        ("aux_loss", ("router_aux_loss_coef", "aux_loss_coef")),
        ("z_loss", ("router_z_loss_coef",)),
    ):
        places = (base, config, getattr(config, "text_config", None))
        held = [getattr(place, name, None) for place in places for name in names]
        held = [value for value in held if value is not None]
        if held:
            found |= {f"{part}{ending}": float(held[0]) for part in ("", "encoder_", "decoder_")}
    return found
