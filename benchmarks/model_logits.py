"""Logits of a language model and its student, and Sinkhorn gradients over the whole vocabulary.

    python benchmarks/model_logits.py

computes ``data/sinkhorn.safetensors``, the reference for ``vocabulary/language_model``, by the
definition: Sinkhorn's iterations over all 49,152 tokens. This takes about 6 GiB and half an hour.
"""

from __future__ import annotations

from pathlib import Path

import torch
from problems import Problem
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from otkd.costs import EmbeddingCost
from otkd.files import written_whole

MODEL = "SmolLM2-135M"
TEMPERATURES = (1.0, 1.5, 2.0)
EPSILON = 0.1
_DATA = Path(__file__).parent / "data"
_REFERENCE = _DATA / "sinkhorn.safetensors"
_POSITIONS = 8
_ROWS_AT_A_TIME = 1024
_TOLERANCE = 1e-5  # L1 error of the marginals
_MAX_ITERATIONS = 500


def model_problem(*, quick: bool, seed: int) -> Problem:
    """16 positions of held-out reviews, in float16 in ``data/smollm2.safetensors``.

    The teacher is SmolLM2-135M-Instruct. The student has six of its layers and was trained for 100
    steps with the transport KL at a price of 10; its KL is 2.66. The embedding is the packaged
    model's. With ``quick``, there are 300 tokens at two positions, and the embedding is random.
    """
    logits = load_file(_DATA / "smollm2.safetensors")
    student, teacher = (logits[side].float() for side in ("student", "teacher"))
    if quick:
        embedding = torch.randn(300, 8, generator=torch.Generator().manual_seed(seed))
        return Problem(student[:2, :300], teacher[:2, :300], embedding)
    from otkd.tasks.causal_lm import packaged_teacher

    embedding = packaged_teacher()[0].get_input_embeddings().weight.detach()
    return Problem(student, teacher, embedding)


def at_temperatures(logits: Tensor) -> Tensor:
    """The logits divided by each temperature, as further positions, in float64."""
    return torch.cat([logits.double() / temperature for temperature in TEMPERATURES])


def stored_sinkhorn_gradient() -> tuple[Tensor, Tensor]:
    """The positions that have a reference, and their gradients of S_ε at all temperatures.

    The gradients are in the logits that :func:`at_temperatures` returns for these positions. They
    are stored in float16, with a relative error of 2e-4.
    """
    stored = load_file(_REFERENCE)
    return stored["positions"], stored["gradient"].double() * stored["scale"].double()


def sinkhorn_gradient(student: Tensor, teacher: Tensor, embedding: Tensor) -> Tensor:
    """Gradients of the debiased divergence in the logits, over all tokens, ``(N, V)``."""
    q, p = (x.double().softmax(-1).mT for x in (student, teacher))
    kernel = _Kernel(embedding)
    u, v, own = torch.ones_like(q), torch.ones_like(p), torch.ones_like(q)
    for _ in track(range(_MAX_ITERATIONS), "Iterations"):
        reached, own_reached = kernel(torch.cat([v, own], -1)).chunk(2, -1)
        error = torch.maximum((u * reached - q).abs().sum(0), (own * own_reached - q).abs().sum(0))
        if error.max() <= _TOLERANCE:
            break
        u, own = q / reached, (own * q / own_reached).sqrt()
        v = p / kernel(u)
    else:
        raise RuntimeError(f"not converged: the marginals are off by {error.max():.1e}")
    potential = EPSILON * (u.log() - own.log())
    return (q * (potential - (q * potential).sum(0))).mT


class _Kernel:
    """exp(−C/ε) over the vocabulary in float32; it is symmetric, so only one half is kept."""

    def __init__(self, embedding: Tensor) -> None:
        cost = EmbeddingCost(embedding)
        points = cost.coordinates("source", torch.float32, embedding.device)
        self._blocks = []
        for start in range(0, len(points), _ROWS_AT_A_TIME):
            costs = cost.distance(points[start : start + _ROWS_AT_A_TIME], points[start:])
            costs.diagonal().zero_()
            self._blocks.append((start, costs.div_(-EPSILON).exp_()))

    def __call__(self, x: Tensor) -> Tensor:
        scale = x.amax(0)
        product = torch.zeros_like(x)
        x = (x / scale).float()
        for start, block in self._blocks:
            end = start + len(block)
            product[start:end] += block @ x[start:]
            product[end:] += block[:, len(block) :].mT @ x[start:end]
        return product * scale


def main() -> None:
    """Computes and writes the reference."""
    student, teacher, embedding = model_problem(quick=False, seed=0)
    positions = torch.arange(0, len(student), len(student) // _POSITIONS)
    both = (at_temperatures(x[positions]) for x in (student, teacher))
    gradient = sinkhorn_gradient(*both, embedding)
    scale = gradient.abs().amax(-1, keepdim=True)
    tensors = {
        "positions": positions,
        "gradient": (gradient / scale).half(),
        "scale": scale.float(),
    }
    with written_whole(_REFERENCE) as path:
        save_file(tensors, path)


if __name__ == "__main__":
    main()
