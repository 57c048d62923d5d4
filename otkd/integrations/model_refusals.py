"""Models that a loss over logits cannot train, and batches that do not fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor, nn

from otkd.checks import check_class_labels
from otkd.integrations.models import ModelDescription
from otkd.integrations.outputs import other_heads
from otkd.losses.base import DistillationLoss


def refuse_model(model: ModelDescription, role: str) -> None:
    """Raise ``ValueError`` for a model whose class, outputs or configuration do not fit a loss.

    What the class does not show is checked with the first batch.
    """
    who = f"the {role} {model.name}"
    if model.task is not None and model.task.refusal is not None:
        raise ValueError(f"{who} is a model for {model.task.title}: {model.task.refusal}")
    if model.task is None and model.fields is not None:
        if "logits" not in model.fields:
            raise ValueError(
                f"{who} has no head that returns logits, only {', '.join(sorted(model.fields))}: "
                "use the class with the head of your task, such as AutoModelForCausalLM or "
                "AutoModelForSequenceClassification"
            )
        heads = other_heads(model.fields)
        if heads and role == "student":
            raise ValueError(
                f"{who} has several heads, {', '.join(heads)} besides logits, which a loss over "
                "the logits would not train: use a class with one head"
            )
    if model.problem_type in ("regression", "multi_label_classification"):
        raise ValueError(
            f'{who} has problem_type="{model.problem_type}", but a loss compares distributions '
            "over classes, one of which is right. Distil it in a training loop of your own, with "
            "the squared error (regression) or with two logits per class (several labels)"
        )
    if model.num_labels == 1:
        raise ValueError(
            f"{who} has one class (num_labels=1), whose probability is always 1, so every loss is "
            "0. For regression use the squared error in a training loop of your own; for yes or "
            "no use two classes"
        )
    if model.virtual_tokens and (model.shifts or model.decodes):
        raise ValueError(
            f"{who} uses prompt tuning with {model.virtual_tokens} virtual tokens, whose logits "
            "have no labels: use another adapter, such as LoRA or prefix tuning"
        )


def refuse_pair(
    student: ModelDescription,
    teacher: ModelDescription,
    loss: nn.Module,
    *,
    shift: bool | None = None,
    own_tokens: bool = False,
) -> None:
    """Raise ``ValueError`` if the teacher reads or predicts something else than the student.

    Both read the same ``input_ids``, and in their decoders the same labels, so their tokens must be
    the same, unless the teacher has ``own_tokens``. A loss with ``vocab_size=`` states that they
    are, and that the rest is padding. Whether two vocabularies of the same size are the same cannot
    be known from the models, nor what the positions mean if ``shift`` is given.
    """
    if shift is None:
        _refuse_other_positions(student, teacher)
    _refuse_order_of_classes(student, teacher)
    differing = vocabularies(student, teacher)
    if differing and not own_tokens and not _judges_vocabularies(student, teacher, loss):
        _refuse_vocabularies(student, teacher, *differing.popitem())


def _refuse_other_positions(student: ModelDescription, teacher: ModelDescription) -> None:
    ours, theirs = (_predicted_at_a_position(model) for model in (student, teacher))
    if ours != theirs and student.task is not None and teacher.task is not None:
        raise ValueError(
            f"at each position the student {student.name} predicts {ours}, and the teacher "
            f"{teacher.name} predicts {theirs}: their logits at a position cannot be compared. Use "
            "a teacher of the student's kind, or store its logits at the positions where the "
            "student predicts the same token. If both do predict the same token, pass shift="
        )


def _predicted_at_a_position(model: ModelDescription) -> str:
    if model.shifts:
        return "the next token of its input"
    if model.decodes:
        return "the next token of its decoder's input"
    return "a label of that position, or of the whole example"


def vocabularies(
    student: ModelDescription, teacher: ModelDescription
) -> dict[str, tuple[int, int]]:
    """The sizes of the two vocabularies for each entry that both models read, where they differ.

    The entries are ``input_ids``, and ``labels`` if both derive the input of a decoder from them.
    """
    found = {}
    if student.decodes and teacher.decodes:
        found["labels"] = (student.targets, teacher.targets)
    if "input_ids" in student.arguments and "input_ids" in teacher.arguments:
        found["input_ids"] = (student.tokens, teacher.tokens)
    return {name: sizes for name, sizes in found.items() if None not in sizes and len({*sizes}) > 1}


def check_tokens(
    student: ModelDescription,
    teacher: ModelDescription,
    input_ids: Tensor | None,
    labels: Tensor | None,
) -> None:
    """Raise ``ValueError`` for a token that only the larger of the two vocabularies has."""
    read = {"input_ids": input_ids, "labels": labels}
    for name, sizes in vocabularies(student, teacher).items():
        tokens = read[name]
        if tokens is not None and tokens.numel() and int(tokens.max()) >= min(sizes):
            _refuse_vocabularies(student, teacher, name, sizes)


def _refuse_vocabularies(
    student: ModelDescription, teacher: ModelDescription, name: str, sizes: tuple[int, int]
) -> NoReturn:
    raise ValueError(
        f"the student {student.name} has {sizes[0]} tokens and the teacher {teacher.name} "
        f"{sizes[1]}, but both read the same {name}, so the teacher would read different text. "
        "If they are causal language models with different tokenizers, pass teacher_tokenizer= "
        "and the student's as processing_class=. Otherwise store the teacher's logits at the "
        "student's positions and pass them as teacher=, or as teacher_logits in the examples. If "
        "the tokenizer is the same and one vocabulary is only "
        "padded, pass vocab_size= to the loss of a language model, or give both the same size "
        "with resize_token_embeddings"
    )


def _judges_vocabularies(
    student: ModelDescription, teacher: ModelDescription, loss: nn.Module
) -> bool:
    """Whether the loss is given the size of the vocabulary, or both predict the same number."""
    if student.task is not None and not (
        student.task.generates or student.task.title.startswith("masked")
    ):
        return False
    modules = [m for m in loss.modules() if isinstance(m, DistillationLoss) and m.needs_teacher]
    return bool(modules) and all(
        m.vocab_size is not None
        or (not m.bridges_vocabularies and student.targets == teacher.targets)
        for m in modules
    )


def _refuse_order_of_classes(student: ModelDescription, teacher: ModelDescription) -> None:
    ours, theirs = (_distinct(model.label_names) for model in (student, teacher))
    moved = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if moved:
        listed = "; ".join(
            f"{name!r} is class {ours[name]} of the student and {theirs[name]} of the teacher"
            for name in moved
        )
        raise ValueError(
            f"student and teacher name the same classes in a different order (id2label): {listed}. "
            "Reorder the rows of the teacher's classifier or, if the order is in fact the same, "
            "give both configurations the same id2label"
        )


def _distinct(names: tuple[str, ...]) -> dict[str, int]:
    """The index of each name, without case and punctuation unless names differ in these only."""
    plain = (name.casefold().strip().replace("-", "_").replace(" ", "_") for name in names)
    found = {name: index for index, name in enumerate(plain)}
    return found if len(found) == len(names) else {name: i for i, name in enumerate(names)}


def check_positions_of(
    model: ModelDescription, logits: Tensor, labels: Tensor | None, mask: Tensor | None
) -> None:
    """Raise ``ValueError`` unless labels (or without them the mask) have one entry per position.

    Args:
        model: of the logits.
        logits: as the loss gets them, without the last position if they were shifted.
        labels: aligned with them.
        mask: aligned with them, if there are no labels.
    """
    expected, name = tuple(logits.shape[:-1]), model.name
    if labels is None:
        if logits.ndim > 3:
            raise ValueError(
                f"the logits of {name} have {logits.ndim} dimensions, {tuple(logits.shape)}, and "
                "without labels the dimension of the classes is unknown: it must be the last"
            )
        if mask is not None and logits.ndim > 2 and tuple(mask.shape) != expected:
            raise ValueError(
                f"{name} returns logits for positions {expected}, but the mask of its input has "
                f"shape {tuple(mask.shape)}: give labels, one per position of the logits, with "
                "-100 where a position does not count"
            )
        return
    shape = tuple(labels.shape)
    if shape == expected:
        return
    if shape == tuple(logits.shape):
        hint = (
            "labels must be class indices; soft labels and several labels per position are not "
            "supported"
        )
    elif logits.ndim > 3 or (labels.ndim > 1 and shape == (logits.shape[0], *logits.shape[2:])):
        hint = "the classes must be in the last dimension: logits.movedim(1, -1)"
    elif labels.ndim == len(expected) > 1:
        hint = (
            "positions without labels, such as those of an image or of virtual tokens, must have "
            "label -100 or be missing from the logits"
        )
    else:
        hint = "a sequence classifier needs one label per example, a token classifier one per token"
    raise ValueError(
        f"{name} returns logits for positions {expected}, but the labels have shape {shape}: {hint}"
    )


def check_labels_of(model: ModelDescription, labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` for a label that is neither −100 nor one of the ``classes``.

    Only labels on the CPU are read, because reading them from a device would synchronise.
    """
    check_class_labels(labels, classes, of=f" of the student {model.name}")


def check_has_positions(model: ModelDescription, logits: Tensor) -> None:
    """Raise ``ValueError`` if logits to be paired with the next label have no positions."""
    if logits.ndim < 3:
        raise ValueError(
            f"shift=True pairs each position with the next label, but the logits of {model.name}, "
            f"{tuple(logits.shape)}, have no positions: leave shift out"
        )


def check_stored_rows(stored: Sequence[int], logits: Sequence[int]) -> None:
    """Raise ``ValueError`` unless a stored teacher has a row for each row of the student."""
    if stored[0] != logits[0]:
        raise ValueError(
            f"the stored teacher has {stored[0]} rows for this batch and the student {logits[0]}: "
            "the collator packs the examples, and not into one row of all their tokens in order, "
            "as DataCollatorWithFlattening does. Use that collator, pack the examples before "
            "storing the teacher, or pass the teacher as a model"
        )
