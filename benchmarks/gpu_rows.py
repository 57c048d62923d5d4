"""Everything that wants a GPU: first whether it is right there, then how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps

import torch
from batch_peers import BatchPeer, BatchSpec
from batch_rows import PEERS, compare_batch
from compare import Settings, compare
from divergence_rows import peers_of
from measure import relative_error
from peers import Peer, prepare
from problems import Spec
from step_rows import compare_steps
from steps import LANGUAGE_LOSSES, StepSpec

import otkd

Row = Callable[[Settings], dict]
_ERROR = 1e-4


def on_gpu(row: Row) -> Row:
    """A row that says that it was not measured where there is no GPU."""

    @wraps(row)
    def measured(settings: Settings) -> dict:
        if not torch.cuda.is_available():
            return {"measured": False, "reason": "no GPU", "cases": [], "targets": []}
        return row(settings)

    return measured


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
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
            loss = otkd.losses.get_loss(name, **chosen).to(device)
            leaf = student.to(device, dtype).requires_grad_()
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
    """By precision and backend: 64 of 152,000 tokens, and every one of 16,000."""
    parts = (
        (settings.pick((152_000, 2048, 1024), (3000, 16, 16)), {"k": 64}, ("torch", "triton")),
        (settings.pick((16_000, 512, 256), (200, 6, 8)), {}, ("torch", "keops")),
    )
    cases = []
    for dtype in ("float32", "bfloat16"):
        for sizes, options, backends in parts:
            spec = Spec(*sizes, "zipf", "clustered", settings.seed, dtype, "cuda")
            peers, refused = [], {}
            for backend in backends:
                peer = Peer(f"otkd, {backend}", "otkd_sinkhorn", {**options, "backend": backend})
                try:
                    prepare(peer, dataclasses.replace(spec, vocab=100, positions=2))()
                    peers.append(peer)
                except (ImportError, ValueError, RuntimeError) as error:
                    refused[backend] = str(error)
            case = compare(spec, [*peers, Peer("F.kl_div", "kl_div")], None, settings)
            name = f"{'top 64' if options else 'dense'}, {dtype}"
            cases.append({**case, "name": name, "refused": refused})
    return {"cases": cases, "targets": []}


@on_gpu
def divergences(settings: Settings) -> dict:
    """8,192 positions of 32,000 tokens, beside Liger's kernels, too."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        sizes = settings.pick((32_000, 8192, 1), (300, 8, 1))
        spec = Spec(*sizes, "zipf", "iid", settings.seed, dtype, "cuda")
        for loss in ("KLLoss", "JSDLoss", "TVDLoss"):
            peers = [*peers_of(loss), Peer("Liger", "liger", {"divergence": loss})]
            case = compare(spec, peers, None, settings)
            cases.append({**case, "name": f"{loss}, {dtype}"})
    return {"cases": cases, "targets": []}


@on_gpu
def batch(settings: Settings) -> dict:
    """Between up to 4,096 samples of 2 and 1,000 classes."""
    peers = [peer for peer in PEERS if peer.kind in ("otkd", "unrolled", "pot_batch", "kl_div")]
    peers = [dataclasses.replace(peer, largest=4096) for peer in peers]
    peers.append(BatchPeer("geomloss .9", "geomloss", {}, 1024))
    cases = []
    for classes in (2, 1000):
        for samples in settings.pick((64, 256, 1024, 4096), (16,)):
            spec = BatchSpec(samples, classes, seed=settings.seed, device="cuda")
            cases.append(compare_batch(spec, peers, settings))
    return {"cases": cases, "targets": []}


@on_gpu
def language_model(settings: Settings) -> dict:
    """A step of a 12-layer GPT-2 of width 768, 32 sequences of 512 tokens of 50,257."""
    large = {"layers": 12, "width": 768, "heads": 12, "sequences": 32, "length": 512}
    small = {"layers": 1, "width": 16, "heads": 2, "sequences": 2, "length": 8}
    vocab = settings.pick(50_257, 2100)
    spec = StepSpec(vocab, **settings.pick(large, small), seed=settings.seed, device="cuda")
    return {"cases": [compare_steps(spec, LANGUAGE_LOSSES, settings)], "targets": []}


ROWS: dict[str, Row] = {
    "correctness": correctness,
    "transport": transport,
    "batch": batch,
    "divergences": divergences,
    "language_model": language_model,
}
