"""Everything that wants a GPU: first whether it is right there, then how fast."""

from __future__ import annotations

import dataclasses
import gc
import textwrap
import traceback
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from batch_peers import BatchCall, BatchPeer, BatchSpec
from batch_peers import build as build_batch
from batch_rows import PEERS, compare_batch
from compare import Settings, compare, peak_here
from divergence_rows import peers_of
from measure import relative_error
from peers import Peer, prepare
from problems import Spec, build
from step_rows import compare_steps
from steps import LANGUAGE_LOSSES, TINY, StepSpec, models

import otkd

Row = Callable[[Settings], dict]
DEVICE = "cuda"  # of every row; the tests run them on a CPU
_ERROR = 1e-4


def on_gpu(row: Row) -> Row:
    """A row that says why it was not measured: where there is no GPU, and where it failed."""

    @wraps(row)
    def measured(settings: Settings) -> dict:
        reason = "no GPU"
        if torch.cuda.is_available():
            try:
                _free()
                return row(settings)
            except Exception as error:  # whatever it is, it is not to cost the other rows
                traceback.print_exc()
                reason = _said(error)
        return {"measured": False, "reason": reason, "cases": [], "targets": []}

    return measured


def _free() -> None:
    """Give back what the row before holds of the GPU's memory."""
    for cached in (build, build_batch, models):
        cached.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def those_that_run(make: Callable, peers: Sequence, spec) -> tuple[list, dict[str, str]]:
    """The peers that can be run here, and by name why the others cannot.

    Ours, the first, is not tried: where it fails the row does. ``make`` is ``prepare`` for a
    ``Spec``, ``BatchCall`` for a ``BatchSpec``.
    """
    ours, *others = peers
    obstacles = {peer.name: _obstacle(make, peer, spec) for peer in others if peer.available}
    refused = {name: why for name, why in obstacles.items() if why is not None}
    return [ours, *(peer for peer in others if peer.name not in refused)], refused


def _obstacle(make: Callable, peer, spec) -> str | None:
    """What keeps a peer from the whole problem: what compiles, or fits, depends on its size."""
    try:
        call = make(peer, spec)
        call()
    except Exception as error:  # those of Triton, for one, are of a class of their own
        return _said(error)
    wanted = peer.settings.get("backend")
    if wanted and call.report.backend != wanted:
        return f"{call.report.backend} computed in its place"
    return None


@on_gpu
def correctness(settings: Settings) -> dict:
    """Every loss in float32 there against float64 on the CPU: value and gradient."""
    generator = torch.Generator().manual_seed(settings.seed)
    student = 2 * torch.randn(64, 1000, generator=generator, dtype=torch.float64)
    teacher = student + torch.randn(student.shape, generator=generator, dtype=torch.float64)
    embedding = torch.randn(1000, 32, generator=generator)
    labels = torch.arange(64)
    options = {"sinkhorn": {"embedding": embedding}, "wasserstein": {"cost": "ordinal"}}
    found = {}
    for name in otkd.losses.list_losses():
        chosen = {**options.get(name, {}), "reduction": "mean"}
        results = []
        for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
            loss = otkd.losses.get_loss(name, **chosen).to(device)
            # Without the copy it is the student itself that would ask for a gradient.
            leaf = student.to(device, dtype, copy=True).requires_grad_()
            value = loss(leaf, teacher.to(device, dtype), labels=labels.to(device))
            value.backward()
            results.append((value.detach().cpu(), leaf.grad.cpu()))
        (exact, slope), (value, gradient) = results
        found[name] = {
            "value_error": relative_error(value, exact),
            "gradient_error": relative_error(gradient, slope),
            "right": relative_error(gradient, slope) < _ERROR,
        }
    return {"cases": [{"name": "float32", "peers": found, "times": {}}], "targets": []}


@on_gpu
def transport(settings: Settings) -> dict:
    """By precision and backend: 64 of 152,000 tokens, and every one of 16,000.

    KeOps computes the 16,000² distances anew for every position and iteration: it is given few
    positions, once, of which the memory is not that of all.
    """
    few = {"positions": 4, "rounds": 1}
    parts = (
        (settings.pick((152_000, 2048, 1024), (3000, 16, 16)), {"k": 64}, "triton", {}),
        (settings.pick((16_000, 512, 64), (200, 6, 8)), {}, "keops", few),
    )
    cases = []
    for dtype in ("float32", "bfloat16"):
        for sizes, options, other, part in parts:
            spec = Spec(*sizes, "zipf", "clustered", settings.seed, dtype, DEVICE)
            ours, theirs = (
                Peer(f"otkd, {name}", "otkd_sinkhorn", {**options, "backend": name}, **limits)
                for name, limits in (("torch", {}), (other, part))
            )
            peers = [ours, theirs, Peer("F.kl_div", "kl_div")]
            peers, refused = those_that_run(prepare, peers, spec)
            partial = [peer.name for peer in peers if peer.positions]
            case = compare(spec, peers, None, settings, skip_memory=partial)
            name = f"{'top 64' if options else 'dense'}, {dtype}"
            cases.append({**case, "name": name, "refused": refused})
    return {"cases": cases, "targets": []}


@on_gpu
def divergences(settings: Settings) -> dict:
    """8,192 positions of 32,000 tokens, beside Liger's kernels, too."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        sizes = settings.pick((32_000, 8192, 1), (300, 8, 1))
        spec = Spec(*sizes, "zipf", "iid", settings.seed, dtype, DEVICE)
        for loss in ("KLLoss", "JSDLoss", "TVDLoss"):
            peers = [*peers_of(loss), Peer("Liger", "liger", {"divergence": loss})]
            peers, refused = those_that_run(prepare, peers, spec)
            case = compare(spec, peers, None, settings)
            cases.append({**case, "name": f"{loss}, {dtype}", "refused": refused})
    return {"cases": cases, "targets": []}


@on_gpu
def batch(settings: Settings) -> dict:
    """Between up to 4,096 samples of 2 classes, and 2,048 of 1,000.

    For as many of 1,000 the backward of ``torch.cdist`` would hold b·b·d numbers, 67 GB, against
    17 GB of 2,048.
    """
    peers = [peer for peer in PEERS if peer.kind in ("otkd", "unrolled", "pot_batch", "kl_div")]
    peers.append(BatchPeer("geomloss .9", "geomloss", {}, 1024))
    cases = []
    for classes, largest in ((2, 4096), (1000, 2048)):
        for samples in settings.pick((64, 256, 1024, largest), (16,)):
            spec = BatchSpec(samples, classes, seed=settings.seed, device=DEVICE)
            fitting = [peer for peer in peers if samples <= peer.largest]
            able, refused = those_that_run(BatchCall, fitting, spec)
            case = compare_batch(spec, able, settings)
            for peer in able:
                if spec.device != "cpu" and peer.available:
                    case["peers"][peer.name] |= _peak(peer, spec)
            cases.append({**case, "refused": refused})
    return {"cases": cases, "targets": []}


def _peak(peer: BatchPeer, spec: BatchSpec) -> dict:
    """Peak memory beyond the inputs, in this process."""
    # In the unit of the logits of b positions over b tokens: a matrix of b × b.
    found = peak_here(BatchCall(peer, spec), Spec(spec.samples, spec.samples, 1))
    return {"peak_matrices" if key == "peak_units" else key: x for key, x in found.items()}


@on_gpu
def language_model(settings: Settings) -> dict:
    """A step of a 12-layer GPT-2 of width 768, 16 sequences of 512 tokens of 50,257.

    The largest peer, TRL's generalized JSD, holds 17 copies of the logits, of 1.6 GB each, above
    some 10 GB of activations: with both models, and of every loss the state of an AdamW, 55 GB.
    """
    settings = dataclasses.replace(settings, repeats=min(3, settings.repeats))
    large = StepSpec(50_257, layers=12, width=768, heads=12, sequences=16, length=512)
    spec = dataclasses.replace(settings.pick(large, TINY), seed=settings.seed, device=DEVICE)
    return {"cases": [compare_steps(spec, LANGUAGE_LOSSES, settings)], "targets": []}


ROWS: dict[str, Row] = {
    "correctness": correctness,
    "transport": transport,
    "batch": batch,
    "divergences": divergences,
    "language_model": language_model,
}
# Seconds that a row takes at most on one large card, with all that it compiles: estimates from its
# operations with a margin, not measurements.
LONGEST = {
    "correctness": 60,
    "transport": 210,
    "batch": 90,
    "divergences": 90,
    "language_model": 120,
}
