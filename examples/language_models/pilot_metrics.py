"""What is measured of a student on held-out reviews, for every sequence."""

from __future__ import annotations

import torch
from pilot_data import Material, Sequences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import otkd

# Sequences of a block, which bounds the memory.
_BLOCK = 8
# One value per position. Those of a curve during training are few, as they take its time.
CURVE_MEASURES = {
    "kl": otkd.KLLoss(reduction="none"),
    "reverse_kl": otkd.ReverseKLLoss(reduction="none"),
}


def final_measures(embedding: Tensor) -> dict[str, nn.Module]:
    """The losses of otkd that serve as metrics of a trained student, one value per position."""
    return {
        **CURVE_MEASURES,
        "tvd": otkd.TVDLoss(reduction="none"),
        # The support is given, so that results of different versions of otkd are comparable.
        "sinkhorn": otkd.SinkhornLoss(
            embedding=embedding, support=otkd.supports.TopK(64), reduction="none"
        ),
    }


def evaluate(
    student: nn.Module,
    material: Material,
    sequences: Sequences,
    measures: dict[str, nn.Module],
) -> dict[str, list[float]]:
    """The mean over the positions of each sequence, by metric.

    Besides ``measures`` these are the cross-entropy of the reviews' tokens and the accuracy, of
    student and teacher, the teacher's entropy, and the share of positions at which both have the
    same most probable token.
    """
    found: dict[str, list[Tensor]] = {}
    was_training = student.training
    student.eval()
    with torch.no_grad():
        for rows in torch.arange(len(sequences.inputs)).split(_BLOCK):
            ours = student(sequences.inputs[rows]).logits
            theirs = material.teacher_logits(sequences.states[rows])
            labels = sequences.labels[rows]
            values = {
                "cross_entropy": _cross_entropy(ours, labels),
                "accuracy": ours.argmax(-1) == labels,
                "agreement": ours.argmax(-1) == theirs.argmax(-1),
                "teacher_cross_entropy": _cross_entropy(theirs, labels),
                "teacher_accuracy": theirs.argmax(-1) == labels,
                "teacher_entropy": torch.special.entr(theirs.softmax(-1)).sum(-1),
                **{name: measure(ours, theirs) for name, measure in measures.items()},
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value.double().mean(-1))
    student.train(was_training)
    return {name: torch.cat(values).tolist() for name, values in found.items()}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
