"""What each process of test_distributed.py does: `distributed_worker.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import otkd
from otkd.losses.sinkd import UnrolledBatchSinkhornLoss

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
ROWS, CLASSES, WIDTH = 12, 4, 6
EXACT = {"tolerance": 1e-10, "max_iterations": 5000}
LOSSES = {
    "l1": lambda **options: otkd.BatchSinkhornLoss(**EXACT, **options),
    "debiased": lambda **options: otkd.BatchSinkhornLoss(
        "sqeuclidean", debias=True, **EXACT, **options
    ),
    "sharp": lambda **options: otkd.BatchSinkhornLoss(value="sharp", **EXACT, **options),
    "hidden": lambda **options: otkd.BatchSinkhornLoss("hidden", debias=True, **EXACT, **options),
    "public code": UnrolledBatchSinkhornLoss,
}
# Rows of the first of two processes, the second has the others; and which of all rows count.
CASES = {
    "even": (6, None),
    "uneven": (5, None),
    "masked": (6, torch.arange(ROWS) % 5 != 0),
    "one process without rows": (12, None),
    "one process without counted rows": (6, torch.arange(ROWS) < 6),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)

    def forward(self, x):
        features = self.body(x).tanh()
        return self.head(features), features


def batch():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(ROWS, size, dtype=torch.float64, generator=generator)
        for size in (WIDTH, CLASSES, WIDTH)
    ]


def one(loss, first, counted, *, items=None):
    """The value of a loss, and the gradient averaged over the processes."""
    rows = slice(None)
    if WORLD > 1:
        rows = slice(0, first) if RANK == 0 else slice(first, ROWS)
    model = Model()
    wrapped = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    x, teacher, states = (values[rows] for values in batch())
    logits, features = wrapped(x)
    options = {"student_features": features, "teacher_features": states}
    mask = torch.ones(len(x)) if counted is None else counted[rows]
    if counted is not None:
        options["mask"] = mask
    scale = 1
    if items is not None:  # as Trainer does it: counted everywhere, and the loss multiplied
        options["num_items_in_batch"], scale = items, WORLD
    value = scale * loss(logits, teacher, **options)
    if loss.reduction == "none":
        value = value.sum() / mask.sum()
    # DistributedDataParallel waits for every weight, also for the head that states do not need.
    (value + 0 * logits.sum()).backward()
    value = value.detach()
    if items is not None and WORLD > 1:  # their mean is the value: each has its share
        dist.all_reduce(value)
        value /= WORLD
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"value": value, "gradient": gradient}


def losses():
    found = {}
    for name, make in LOSSES.items():
        for case, (first, counted) in CASES.items():
            items = ROWS if counted is None else int(counted.sum())
            found[f"{name}, {case}"] = one(make(), first, counted)
            found[f"{name}, {case}, items"] = one(make(), first, counted, items=items)
            if not case.startswith("one process"):  # whose shares have no mean
                found[f"{name}, {case}, none"] = one(make(reduction="none"), first, counted)
    # A mean over one sequence of samples is the mean.
    found["sequence_mean"] = one(
        LOSSES["l1"](reduction="sequence_mean"), *CASES["one process without counted rows"]
    )
    if WORLD > 1:
        found["own"] = one(otkd.BatchSinkhornLoss(gather=False), *CASES["even"])
        with torch.no_grad():
            if RANK == 0:
                found["alone"] = otkd.BatchSinkhornLoss()(*torch.randn(2, 5, CLASSES))
        samples = torch.randn(5, CLASSES + RANK)
        try:
            otkd.BatchSinkhornLoss()(samples, -samples)
        except ValueError as error:
            found["refusal"] = str(error)
    return found


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if WORLD > 1:
        dist.init_process_group("gloo")
    torch.save(losses(), folder / f"{WORLD}-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
