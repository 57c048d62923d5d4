"""Whole training steps, each loss as a ratio to KL."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial

import measure
import torch
from compare import Settings, peak_here, peak_of_job, target
from peers import installed
from steps import CLASS_LOSSES, LANGUAGE_LOSSES, TINY, Step, StepSpec
from trainers import STEPS, TRAINERS

# What the losses that are not ours need; by their names in the tables.
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
    peers = {name: {"seconds": measure.spread(times)} for name, times in seconds.items()}
    reports = {name: call.report for name, call in calls.items() if call.report is not None}
    calls.clear()  # of each an optimiser's state
    if not spec.classes:  # of classifiers the loss is no part of the memory worth a name
        for name in here:
            if settings.quick and name not in ("kl", "sinkhorn"):
                continue
            peers[name] |= _peak(spec, name)
    return {
        "name": f"BERT, {spec.classes} classes" if spec.classes else "GPT-2",
        "problem": spec.as_dict(),
        "iterations": {name: report.iterations for name, report in reports.items()},
        "peers": peers,
        "times": {name: measure.ratio(seconds[name], seconds["kl"]) for name in here[1:]},
        "times_against": "kl",
        "not_installed": sorted(set(losses) - set(here)),
    }


def _peak(spec: StepSpec, loss: str) -> dict:
    """Peak memory of a first step beyond models and tokens."""
    if spec.device == "cpu":
        job = {"runner": "steps", "arguments": {"spec": spec.as_dict(), "loss": loss}}
        return peak_of_job(job, spec.logits_bytes)
    # In this process: what its allocator holds, freed or not, another could not have.
    gc.collect()
    torch.cuda.empty_cache()
    return peak_here(Step(spec, loss), spec)


def language_model(settings: Settings) -> dict:
    """A step of a 6-layer GPT-2 of width 384, 16 sequences of 128 tokens of 30,522."""
    spec = settings.pick(StepSpec(seed=settings.seed), TINY)
    case = compare_steps(spec, LANGUAGE_LOSSES, settings)
    sinkhorn = case["times"]["sinkhorn"]["median"]
    targets = [target("time of a step, SinkhornLoss / KLLoss", sinkhorn, "≤", 1.2)]
    peaks = [case["peers"][name].get("peak_bytes") for name in ("sinkhorn", "kl")]
    memory = peaks[0] / peaks[1] if all(peaks) else None
    targets.append(target("peak memory of a step, SinkhornLoss / KLLoss", memory, "≤", 1.0))
    ours = case["times"]["jsd"]["median"]
    for name in ("TRL generalized JSD", "TRL chunked JSD"):
        if (times := case["times"].get(name)) is not None:
            label = f"time of a step, {name} / JSDLoss"
            targets.append(target(label, times["median"] / ours, "≥", 1.0))
    return {"cases": [case], "targets": targets}


def large_vocabulary(settings: Settings) -> dict:
    """The same step at 8×128 positions of 131,072 tokens: four tiles of TRL's chunked JSD."""
    spec = settings.pick(StepSpec(131_072, sequences=8, seed=settings.seed), TINY)
    names = ("kl", "jsd", "TRL generalized JSD", "TRL chunked JSD")
    case = compare_steps(spec, {name: LANGUAGE_LOSSES[name] for name in names}, settings)
    targets = []
    if (times := case["times"].get("TRL chunked JSD")) is not None:
        slower = times["median"] / case["times"]["jsd"]["median"]
        targets.append(target("time of a step, TRL chunked JSD / JSDLoss", slower, "≥", 1.0))
        peaks = [case["peers"][name].get("peak_bytes") for name in ("jsd", "TRL chunked JSD")]
        memory = peaks[0] / peaks[1] if all(peaks) else None
        label = "peak memory of a step, JSDLoss / TRL chunked JSD"
        targets.append(target(label, memory, "≤", 1.0))
    return {"cases": [case], "targets": targets}


def classification(settings: Settings) -> dict:
    """A step of BERT, 6 layers of width 384 to 3, 32 sequences of 64 tokens, 2 classes."""
    full = StepSpec(sequences=32, length=64, classes=2, seed=settings.seed)
    quick = StepSpec(vocab=100, layers=2, width=16, heads=2, sequences=8, length=8, classes=2)
    case = compare_steps(settings.pick(full, quick), CLASS_LOSSES, settings)
    return {"cases": [case], "targets": []}


def trainers(settings: Settings) -> dict:
    """Steps of whole trainers with JSD, same models, data and arguments: otkd's beside TRL's."""
    spec = settings.pick(StepSpec(seed=settings.seed), TINY)
    here = [name for name in TRAINERS if installed(_NEEDS.get(name))]
    made = {name: TRAINERS[name](spec) for name in here}
    losses = {}

    def call(name: str) -> None:
        losses[name] = made[name].train().training_loss

    calls = {name: partial(call, name) for name in here}
    runs = measure.alternate(calls, dict.fromkeys(calls, settings.repeats))
    seconds = {name: [time / STEPS for time in times] for name, times in runs.items()}
    ours, *others = here
    times = {name: measure.ratio(seconds[name], seconds[ours]) for name in others}
    case = {
        "name": "GPT-2",
        "problem": spec.as_dict(),
        "peers": {
            name: {"seconds": measure.spread(found), "loss": losses[name]}
            for name, found in seconds.items()
        },
        "times": times,
        "not_installed": sorted(set(TRAINERS) - set(here)),
    }
    targets = [
        target(f"time of a step, {name} / {ours}", found["median"], "≥", 1.0)
        for name, found in times.items()
    ]
    return {"cases": [case], "targets": targets}


ROWS: dict[str, Callable[[Settings], dict]] = {
    "language_model": language_model,
    "large_vocabulary": large_vocabulary,
    "classification": classification,
    "trainers": trainers,
}
