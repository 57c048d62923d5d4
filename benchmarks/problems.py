"""Random logits and embeddings with the statistics that determine the time of transport."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

EMBEDDINGS = ("iid", "clustered")
LOGITS = ("zipf", "dirichlet", "flat")

ZIPF_EXPONENT = 1.5  # the 64 most probable ranks hold 0.90 of the mass in any vocabulary
NOISE = 0.5  # standard deviation: student from the ranks' logits, teacher from the student
HEAD = 64
COVERAGE = {"dirichlet": 0.9, "flat": 0.62}
TOKENS_PER_CLUSTER = 80
SPREAD_OF_CLUSTER = 0.5
_ROWS_AT_A_TIME = 16  # so that making the inputs has a lower peak than the peer

Function = Callable[[Tensor, Tensor], Tensor]
"""A peer: logits of student and teacher, ``(N, V)``, to a differentiable value per position."""


class Problem(NamedTuple):
    """Inputs of every peer: logits ``(N, V)`` and the embedding of the tokens ``(V, width)``."""

    student: Tensor
    teacher: Tensor
    embedding: Tensor

    def sizes(self) -> dict[str, int]:
        """The numbers of tokens and positions, and the width of the embedding."""
        positions, vocab = self.student.shape
        return {"vocab": vocab, "positions": positions, "width": self.embedding.shape[-1]}


@dataclass(frozen=True)
class Spec:
    """What a problem is drawn from: the same spec gives the same tensors in every process.

    - ``zipf``: the logit of rank r is −1.5·log r, ranks permuted at each position, plus noise.
    - ``dirichlet``: independent normals, scaled so that the 64 most probable tokens hold about
      0.9 of the mass.
    - ``flat``: the same with about 0.6.

    The teacher is the student plus noise. The embedding is independent normals (``iid``) or normals
    around V/80 centres, with 0.2 of the variance within a cluster (``clustered``).
    """

    vocab: int
    positions: int
    width: int
    logits: str = "zipf"
    embedding: str = "clustered"
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What a case is called in the results."""
        return f"{self.logits}-{self.embedding}"

    @property
    def logits_bytes(self) -> int:
        """N·V·4, the unit in which memory is reported."""
        return self.positions * self.vocab * 4


@functools.lru_cache(maxsize=1)
def build(spec: Spec) -> Problem:
    """The tensors of a spec."""
    generator = torch.Generator().manual_seed(spec.seed)
    embedding = _embedding(spec, generator)
    draw = _sampler(spec, generator)
    student = torch.empty(spec.positions, spec.vocab)
    teacher = torch.empty_like(student)
    for rows in torch.arange(spec.positions).split(_ROWS_AT_A_TIME):
        block = draw(len(rows))
        student[rows] = block
        teacher[rows] = block + NOISE * torch.randn(block.shape, generator=generator)
    dtype = getattr(torch, spec.dtype)
    return Problem(*(x.to(spec.device, dtype) for x in (student, teacher, embedding)))


def coverage(logits: Tensor, k: int = HEAD) -> float:
    """Mean mass of the k most probable tokens."""
    blocks = (x.float().softmax(-1).topk(min(k, x.shape[-1])).values for x in logits.split(16))
    return torch.cat([block.sum(-1) for block in blocks]).mean().item()


def _embedding(spec: Spec, generator: torch.Generator) -> Tensor:
    points = torch.randn(spec.vocab, spec.width, generator=generator)
    if spec.embedding == "iid":
        return points
    clusters = max(2, spec.vocab // TOKENS_PER_CLUSTER)
    centres = torch.randn(clusters, spec.width, generator=generator)
    membership = torch.randint(clusters, (spec.vocab,), generator=generator)
    return points.mul_(SPREAD_OF_CLUSTER).add_(centres[membership])


def _sampler(spec: Spec, generator: torch.Generator) -> Callable[[int], Tensor]:
    """A function that draws the student's logits for a number of positions."""
    if spec.logits == "zipf":
        ranks = -ZIPF_EXPONENT * torch.arange(1, spec.vocab + 1).log()

        def draw(rows: int) -> Tensor:
            orders = [torch.randperm(spec.vocab, generator=generator) for _ in range(rows)]
            noise = torch.randn(rows, spec.vocab, generator=generator)
            return ranks[torch.stack(orders)].add_(noise, alpha=NOISE)

        return draw
    scale = _scale_for(COVERAGE[spec.logits], spec.vocab)
    return lambda rows: scale * torch.randn(rows, spec.vocab, generator=generator)


def _scale_for(mass: float, vocab: int) -> float:
    """σ for which the 64 largest of exp(σ·normal) hold this mass: Φ(σ − Φ⁻¹(1 − 64/V)) = mass."""
    normal = NormalDist()
    share = min(HEAD / vocab, 0.5)
    scale = normal.inv_cdf(1 - share) + normal.inv_cdf(mass)
    assert math.isfinite(scale)
    return scale
