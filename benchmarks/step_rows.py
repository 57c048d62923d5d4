"""Whole training steps with each loss, divided by the step with otkd's KL."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import measure
import memory
import torch
from compare import Row, Settings, memory_ratio, target
from peers import installed
from steps import CLASS_LOSSES, LANGUAGE_LOSSES, TINY, Step, StepSpec
from trainers import STEPS, TRAINERS
from two_tokenizers_steps import TWO_TOKENIZERS

# The package that a loss or a trainer of others needs, by its name in the tables.
_NEEDS = {
    "torchdistill KDLoss": "torchdistill",
    "TRL generalized JSD": "trl_jsd",
    "TRL chunked JSD": "trl_chunked",
    "TRL GKDTrainer": "trl_jsd",
    "TRL DistillationTrainer, completions given": "trl_chunked",
}


def compare_steps(spec: StepSpec, losses: Mapping[str, Callable], settings: Settings) -> dict:
    """Time and memory of a step with every loss; KL comes first."""
    here = [name for name in losses if installed(_NEEDS.get(name))]
    calls = {name: Step(spec, name) for name in here}
    seconds = measure.alternate(calls, dict.fromkeys(calls, settings.repeats))
    case = measure.against(seconds, "kl")
    reports = {name: call.report for name, call in calls.items() if call.report is not None}
    calls.clear()  # which hold the state of an optimiser each
    if not spec.classes:  # in a classifier's step the memory of the loss is negligible
        for name in here:
            if not settings.quick or name in ("kl", "sinkhorn"):
                case["peers"][name] |= _peak(spec, name)
    return {
        "name": f"BERT, {spec.classes} classes" if spec.classes else "GPT-2",
        "problem": asdict(spec),
        "iterations": {name: report.iterations for name, report in reports.items()},
        **case,
        "times_against": "kl",
        "not_installed": sorted(set(losses) - set(here)),
    }


def _peak(spec: StepSpec, loss: str) -> dict:
    """Peak memory of a first step beyond models and tokens."""
    if spec.device == "cpu":
        return memory.peak("steps", {"spec": asdict(spec), "loss": loss}, spec.logits_bytes)
    gc.collect()
    torch.cuda.empty_cache()
    return memory.peak_on_gpu(Step(spec, loss), spec.logits_bytes)


def language_model(settings: Settings) -> dict:
    """A step of a 6-layer GPT-2 of width 384: 16 sequences of 128 tokens, vocabulary of 30,522."""
    spec = settings.pick(StepSpec(seed=settings.seed), TINY)
    cases = [compare_steps(spec, LANGUAGE_LOSSES, settings)]
    return {"cases": cases, "targets": language_model_targets(cases)}


def language_model_targets(cases: list[dict]) -> list[dict]:
    """Transport costs a step little beside KL, and TRL's JSD is not faster than otkd's."""
    (case,) = cases
    peers, times = case["peers"], case["times"]
    peak = memory_ratio(peers["kl"], peers["sinkhorn"])
    return [
        target(
            "time of a step, KLLoss ÷ SinkhornLoss", 1 / times["sinkhorn"]["median"], "≥", 1 / 1.2
        ),
        target("peak memory of a step, KLLoss ÷ SinkhornLoss", peak, "≥", 1.0),
        *_jsd_targets(times, ("TRL generalized JSD", "TRL chunked JSD")),
    ]


def _jsd_targets(times: dict, names: tuple[str, ...]) -> list[dict]:
    ours = times["jsd"]["median"]
    return [
        target(f"time of a step, {name} ÷ JSDLoss", times[name]["median"] / ours, "≥", 1.0)
        for name in names
        if name in times
    ]


def large_vocabulary(settings: Settings) -> dict:
    """The same step with 131,072 tokens and 8×128 positions: four tiles of TRL's chunked JSD."""
    spec = settings.pick(StepSpec(131_072, sequences=8, seed=settings.seed), TINY)
    names = ("kl", "jsd", "TRL generalized JSD", "TRL chunked JSD")
    losses = {name: LANGUAGE_LOSSES[name] for name in names}
    cases = [compare_steps(spec, losses, settings)]
    return {"cases": cases, "targets": large_vocabulary_targets(cases)}


def large_vocabulary_targets(cases: list[dict]) -> list[dict]:
    """TRL's chunked JSD should neither be faster than otkd's nor need less memory."""
    (case,) = cases
    name = "TRL chunked JSD"
    targets = _jsd_targets(case["times"], (name,))
    if name in case["peers"]:
        peak = memory_ratio(case["peers"][name], case["peers"]["jsd"])
        targets.append(target(f"peak memory of a step, {name} ÷ JSDLoss", peak, "≥", 1.0))
    return targets


def classification(settings: Settings) -> dict:
    """A step of BERT, 6 layers of width 384 to 3: 32 sequences of 64 tokens, 2 classes."""
    full = StepSpec(sequences=32, length=64, classes=2, seed=settings.seed)
    quick = StepSpec(vocab=100, layers=2, width=16, heads=2, sequences=8, length=8, classes=2)
    return {"cases": [compare_steps(settings.pick(full, quick), CLASS_LOSSES, settings)]}


def trainers(settings: Settings) -> dict:
    """Steps of otkd's and TRL's trainers with JSD, with the same models, data and arguments."""
    case = _trainings(TRAINERS, settings.pick(StepSpec(seed=settings.seed), TINY), settings)
    return {"cases": [case], "targets": trainers_targets([case])}


def two_tokenizers(settings: Settings) -> dict:
    """Steps of a trainer whose teacher has its own tokenizer, and of one with one tokenizer."""
    spec = settings.pick(StepSpec(seed=settings.seed), TINY)
    return {"cases": [_trainings(TWO_TOKENIZERS, spec, settings)], "targets": []}


def _trainings(
    trainers: Mapping[str, Callable[[StepSpec], Any]], spec: StepSpec, settings: Settings
) -> dict:
    """Time of a step and loss of every trainer; times are divided by that of the first."""
    here = [name for name in trainers if installed(_NEEDS.get(name))]
    made = {name: trainers[name](spec) for name in here}
    losses = {}

    def call(name: str) -> None:
        losses[name] = made[name].train().training_loss

    calls = {name: partial(call, name) for name in here}
    runs = measure.alternate(calls, dict.fromkeys(calls, settings.repeats))
    seconds = {name: [time / STEPS for time in times] for name, times in runs.items()}
    case = measure.against(seconds, here[0])
    for name, loss in losses.items():
        case["peers"][name]["loss"] = loss
    missing = sorted(set(trainers) - set(here))
    return {"name": "GPT-2", "problem": asdict(spec), **case, "not_installed": missing}


def trainers_targets(cases: list[dict]) -> list[dict]:
    """No trainer of TRL should be faster."""
    (case,) = cases
    ours = next(iter(case["peers"]))
    return [
        target(f"time of a step, {name} ÷ {ours}", found["median"], "≥", 1.0)
        for name, found in case["times"].items()
    ]


ROWS: dict[str, Row] = {
    "language_model": language_model,
    "large_vocabulary": large_vocabulary,
    "classification": classification,
    "trainers": trainers,
    "two_tokenizers": two_tokenizers,
}
