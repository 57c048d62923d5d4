"""What is measured of a student on held-out reviews, for every sequence."""

from __future__ import annotations

import torch
from pilot_data import Material, Sequences
from torch import Tensor, nn

import otkd
from otkd.tasks.causal_lm import next_token_metrics

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

    Besides ``measures`` these are the metrics of :func:`otkd.tasks.causal_lm.next_token_metrics`.
    """
    found: dict[str, list[Tensor]] = {}
    was_training = student.training
    student.eval()
    with torch.no_grad():
        for rows in torch.arange(len(sequences.inputs)).split(_BLOCK):
            ours = student(sequences.inputs[rows]).logits
            theirs = material.teacher_logits(sequences.states[rows])
            values = {
                **next_token_metrics(ours, theirs, sequences.labels[rows]),
                **{name: measure(ours, theirs) for name, measure in measures.items()},
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value.double().mean(-1))
    student.train(was_training)
    return {name: torch.cat(values).tolist() for name, values in found.items()}
