"""Error of ``SinkhornLoss`` with the most probable tokens against transport over all tokens."""

from __future__ import annotations

import warnings
from dataclasses import asdict

import torch
from compare import Settings, errors_of, reference_of, target
from measure import relative_error
from model_logits import (
    EPSILON,
    MODEL,
    TEMPERATURES,
    at_temperatures,
    model_problem,
    sinkhorn_gradient,
    stored_sinkhorn_gradient,
)
from peers import Peer, prepare
from problems import EMBEDDINGS, LOGITS, Spec, build, coverage

import otkd
from otkd.costs import EmbeddingCost
from otkd.supports import Dense, NearestNeighbours, TopK
from otkd.supports.coverage import CoverageWarning

# The default, with more clusters, with more tokens, and a single tail atom for comparison.
_MODEL_SUPPORTS = {
    "TopK(64)": TopK(64),
    "TopK(64, clusters=32)": TopK(64, clusters=32),
    "TopK(64, clusters=128)": TopK(64, clusters=128),
    "TopK(128, clusters=32)": TopK(128, clusters=32),
    "TopK(256)": TopK(256),
    "TopK(256, clusters=32)": TopK(256, clusters=32),
    "TopK(256, clusters=256)": TopK(256, clusters=256),
    "TopK(512, clusters=32)": TopK(512, clusters=32),
    "NearestNeighbours(256)": NearestNeighbours(256),
}
_DEFAULT = "TopK(64, clusters=32)"


def accuracy(settings: Settings) -> dict:
    """Error of `TopK(k)` against transport over all tokens, for k from 16 to 512."""
    vocab, positions, width = settings.pick((4000, 64, 64), (300, 4, 8))
    sizes = settings.pick((16, 32, 64, 128, 256, 512), (16, 64))
    cases = []
    for logits in LOGITS:
        for embedding in EMBEDDINGS:
            spec = Spec(vocab, positions, width, logits, embedding, settings.seed)
            reference = reference_of(spec, Dense())
            points = []
            for k, clusters in (*((k, 1) for k in sizes), *((64, c) for c in (16, 32, 64))):
                support = {"k": k, "clusters": clusters, "tolerance": 1e-5}
                call = prepare(Peer("", "otkd_sinkhorn", support), spec)
                errors = errors_of(call, reference)
                covered = float(call.report.coverage)
                points.append({"k": k, "clusters": clusters, **errors, "coverage": covered})
            heads = coverage(build(spec).student)
            case = {"name": spec.name, "problem": asdict(spec), "coverage_of_64": heads}
            cases.append({**case, "points": points})
    return {"cases": cases, "targets": accuracy_targets(cases)}


def accuracy_targets(cases: list[dict]) -> list[dict]:
    """A gradient within 3 % where the head has most of the mass."""
    return [
        target(
            f"{case['name']}: gradient error, k = 64, clusters = {point['clusters']}",
            point["gradient_error"],
            "≤",
            0.03,
        )
        for case in cases
        if case["coverage_of_64"] >= 0.85
        for point in case["points"]
        if point["k"] == 64
    ]


def language_model(settings: Settings) -> dict:
    """Error of supports for SmolLM2-135M and a student of six of its layers, over all tokens.

    The reference was computed once, by ``model_logits.py``.
    """
    problem = model_problem(quick=settings.quick, seed=settings.seed)
    if settings.quick:
        student, teacher = (at_temperatures(x) for x in (problem.student, problem.teacher))
        gradient = sinkhorn_gradient(student, teacher, problem.embedding)
    else:
        positions, gradient = stored_sinkhorn_gradient()
        student, teacher = (
            at_temperatures(x[positions]) for x in (problem.student, problem.teacher)
        )
    supports = settings.pick(_MODEL_SUPPORTS, {_DEFAULT: TopK(16, clusters=4)})
    cost, points = EmbeddingCost(problem.embedding), []
    for name, support in supports.items():
        options = {"epsilon": EPSILON, "tolerance": 1e-5, "reduction": "sum"}
        loss = otkd.SinkhornLoss(cost, support=support, **options)
        parts = (x.chunk(len(TEMPERATURES)) for x in (student, teacher, gradient))
        for temperature, z, t, exact in zip(TEMPERATURES, *parts, strict=True):
            logits = z.float().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CoverageWarning)
                (slope,) = torch.autograd.grad(loss(logits, t.float()), logits)
            covered = loss.last_report.coverage
            points.append(
                {
                    "support": name,
                    "temperature": temperature,
                    "gradient_error": relative_error(slope, exact),
                    "coverage": None if covered is None else float(covered),
                }
            )
    case = {"name": MODEL, "problem": problem.sizes(), "points": points}
    return {"cases": [case], "targets": language_model_targets([case])}


def language_model_targets(cases: list[dict]) -> list[dict]:
    """A gradient within 3 % with the default support, at every temperature."""
    return [
        target(
            f"{case['name']}: gradient error of the default, T = {point['temperature']:g}",
            point["gradient_error"],
            "≤",
            0.03,
        )
        for case in cases
        for point in case["points"]
        if point["support"] == _DEFAULT
    ]
