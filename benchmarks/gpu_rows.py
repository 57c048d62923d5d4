"""Everything that needs a GPU: first whether the losses are correct there, then how fast."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from batch_peers import BatchCall, BatchPeer, BatchSpec
from batch_peers import build as build_batch
from batch_rows import PEERS, compare_batch
from compare import Row, Settings, compare
from divergence_rows import peers_of
from files import said, unmeasured
from measure import relative_error
from memory import peak_on_gpu
from peers import Peer, prepare
from problems import Spec, build
from step_rows import compare_steps
from steps import LANGUAGE_LOSSES, TINY, StepSpec, models

import otkd

DEVICE = "cuda"  # the tests replace it by a CPU
_ERROR = 1e-4


def on_gpu(row: Row) -> Row:
    """A row that is not measured without a GPU, and that starts with the GPU's memory free."""

    @wraps(row)
    def measured(settings: Settings) -> dict:
        if not torch.cuda.is_available():
            return unmeasured("no GPU")
        for cached in (build, build_batch, models):
            cached.cache_clear()
        gc.collect()
        torch.cuda.empty_cache()
        return row(settings)

    return measured


def those_that_run(make: Callable, peers: Sequence, spec) -> tuple[list, dict[str, str]]:
    """The peers that run here, and by name the reason why the others do not.

    Ours, the first, is not tried: if it fails, the row fails. ``make`` is ``prepare`` for a
    ``Spec``, ``BatchCall`` for a ``BatchSpec``.
    """
    ours, *others = peers
    obstacles = {peer.name: _obstacle(make, peer, spec) for peer in others if peer.available}
    refused = {name: why for name, why in obstacles.items() if why is not None}
    return [ours, *(peer for peer in others if peer.name not in refused)], refused


def _obstacle(make: Callable, peer, spec) -> str | None:
    """Why a peer cannot run the whole problem: what compiles, or fits, depends on the size."""
    try:
        call = make(peer, spec)
        call()
    except Exception as error:  # of any class: Triton, for one, raises its own
        return said(error)
    wanted = peer.settings.get("backend")
    if wanted and call.report.backend != wanted:
        return f"{call.report.backend} was used instead"
    return None


@on_gpu
def correctness(settings: Settings) -> dict:
    """Value and gradient of every loss in float32 on the GPU, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(settings.seed)
    student = 2 * torch.randn(64, 1000, generator=generator, dtype=torch.float64)
    teacher = student + torch.randn(student.shape, generator=generator, dtype=torch.float64)
    embedding = torch.randn(1000, 32, generator=generator)
    labels = torch.arange(64)
    options = {
        "sinkhorn": {"embedding": embedding},
        "transport_kl": {"embedding": embedding},
        "wasserstein": {"cost": "ordinal"},
    }
    found = {}
    for name in otkd.losses.list_losses():
        chosen = {**options.get(name, {}), "reduction": "mean"}
        results = []
        for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
            loss = otkd.losses.get_loss(name, **chosen).to(device)
            # Without the copy, the student itself would require a gradient.
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
    return {"cases": [{"name": "float32", "peers": found, "times": {}}]}


@on_gpu
def transport(settings: Settings) -> dict:
    """Top 64 of 152,000 tokens and all of 16,000 tokens, by precision and backend.

    KeOps computes the 16,000² distances again for every position and iteration, so it gets few
    positions and one round, and its memory is not reported.
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
    return {"cases": cases}


@on_gpu
def divergences(settings: Settings) -> dict:
    """8,192 positions of 32,000 tokens, also against Liger's kernels."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        sizes = settings.pick((32_000, 8192, 1), (300, 8, 1))
        spec = Spec(*sizes, "zipf", "iid", settings.seed, dtype, DEVICE)
        for loss in ("KLLoss", "JSDLoss", "TVDLoss"):
            peers = [*peers_of(loss), Peer("Liger", "liger", {"divergence": loss})]
            peers, refused = those_that_run(prepare, peers, spec)
            case = compare(spec, peers, None, settings)
            cases.append({**case, "name": f"{loss}, {dtype}", "refused": refused})
    return {"cases": cases}


@on_gpu
def batch(settings: Settings) -> dict:
    """Batches of up to 4,096 samples of 2 classes, and up to 2,048 samples of 1,000 classes.

    With 4,096 samples of 1,000 classes the backward pass of ``torch.cdist`` would hold b·b·d
    numbers, 67 GB; with 2,048 samples it holds 17 GB.
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
                    call = BatchCall(peer, spec)
                    peak = peak_on_gpu(call, spec.matrix_bytes, "peak_matrices")
                    case["peers"][peer.name] |= peak
            cases.append({**case, "refused": refused})
    return {"cases": cases}


@on_gpu
def language_model(settings: Settings) -> dict:
    """A step of a 12-layer GPT-2 of width 768: 16 sequences of 512 tokens, vocabulary of 50,257.

    The largest peer, TRL's generalized JSD, holds 17 copies of the logits of 1.6 GB each, besides
    about 10 GB of activations. With both models and an AdamW state for every loss that is 55 GB.
    """
    settings = dataclasses.replace(settings, repeats=min(3, settings.repeats))
    large = StepSpec(50_257, layers=12, width=768, heads=12, sequences=16, length=512)
    spec = dataclasses.replace(settings.pick(large, TINY), seed=settings.seed, device=DEVICE)
    return {"cases": [compare_steps(spec, LANGUAGE_LOSSES, settings)]}


ROWS: dict[str, Row] = {
    "correctness": correctness,
    "transport": transport,
    "batch": batch,
    "divergences": divergences,
    "language_model": language_model,
}
# The most seconds that a row should take on one large card, including compilation. These are
# estimates from the number of operations, with a margin; they were not measured.
LONGEST = {
    "correctness": 60,
    "transport": 210,
    "batch": 90,
    "divergences": 90,
    "language_model": 120,
}
