"""What each process of test_distributed.py does: `distributed_worker.py MODE FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import otkd
from otkd.losses.batch import UnrolledBatchSinkhornLoss

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
ROWS, CLASSES, WIDTH = 12, 4, 6
LOSSES = {
    "l1": lambda: otkd.BatchSinkhornLoss(tolerance=1e-10, max_iterations=5000),
    "debiased": lambda: otkd.BatchSinkhornLoss(
        cost="sqeuclidean", debias=True, tolerance=1e-10, max_iterations=5000
    ),
    "sharp": lambda: otkd.BatchSinkhornLoss(value="sharp", tolerance=1e-10, max_iterations=5000),
    "hidden": lambda: otkd.BatchSinkhornLoss(
        cost="hidden", debias=True, tolerance=1e-10, max_iterations=5000
    ),
    "public code": UnrolledBatchSinkhornLoss,
    "sinkd": lambda: otkd.BatchSinkhornLoss(reduction="none", tolerance=1e-10, max_iterations=5000),
}
# Rows of the first of two processes; the second has the others.
SPLITS = {"even": 6, "uneven": 5, "alone": 12}


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
    x, teacher, states = (
        torch.randn(ROWS, size, dtype=torch.float64, generator=generator)
        for size in (WIDTH, CLASSES, WIDTH)
    )
    return x, teacher, states, torch.arange(ROWS) % 5 != 0


def one(loss, split, masked, *, counted=None):
    """The value of a loss and the gradient that averaging over processes gives."""
    rows = slice(None)
    if WORLD > 1:
        rows = slice(0, SPLITS[split]) if RANK == 0 else slice(SPLITS[split], ROWS)
    model = Model()
    wrapped = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    x, teacher, states, mask = (values[rows] for values in batch())
    logits, features = wrapped(x)
    options = {"student_features": features, "teacher_features": states}
    options |= {"mask": mask} if masked else {}
    scale = 1
    if counted is not None:  # as Trainer does it: counted everywhere, and its loss multiplied
        options["num_items_in_batch"], scale = counted, WORLD
    value = loss(logits, teacher, **options)
    if loss.reduction == "none":
        value = value.sum() / max(1, int(mask.sum()) if masked else len(x))
        if len(x) == 0:
            value = value * 0
    # DistributedDataParallel waits for every weight, also for the head that states do not need.
    (value * scale + 0 * logits.sum()).backward()
    value = value.detach() * scale
    if counted is not None and WORLD > 1:
        # Only together are they the value: each has its share.
        dist.all_reduce(value)
        value /= WORLD
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"value": value, "gradient": gradient}


def losses():
    found = {}
    for name, make in LOSSES.items():
        for split in SPLITS:
            if name == "sinkd" and split == "alone":
                continue  # the mean of no shares
            for masked in (False, True):
                counted = int(batch()[3].sum()) if masked else ROWS
                loss = make()
                key = f"{name} {split}{' masked' if masked else ''}"
                if split != "alone":
                    # A mean of its own is not for a process without samples.
                    found[key] = one(loss, split, masked)
                if loss.reduction == "mean":
                    found[key + " items"] = one(loss, split, masked, counted=counted)
    if WORLD > 1:
        own = otkd.BatchSinkhornLoss(gather=False)
        found["own"] = one(own, "even", False)
    return found


def trainer(folder):
    from transformers import TrainingArguments

    from otkd.integrations.transformers import DistillationTrainer
    from tests.models import tiny_bert
    from tests.test_trainer import pad, sentences, weights

    args = TrainingArguments(
        output_dir=str(folder / f"run-{WORLD}"), use_cpu=True, report_to="none", disable_tqdm=True,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        per_device_train_batch_size=4 // WORLD, train_sampling_strategy="sequential",
        num_train_epochs=1, save_strategy="no", logging_steps=1, dataloader_pin_memory=False,
        ddp_backend="gloo" if WORLD > 1 else None,
    )  # fmt: skip
    student = tiny_bert(0)
    start = weights(student)
    loss = otkd.SinKDLoss(sinkhorn_weight=2.0, transport=otkd.BatchSinkhornLoss(debias=True))
    run = DistillationTrainer(
        student, args, train_dataset=sentences(lengths=(9, 3, 7, 2, 8, 4, 6, 5, 3, 7, 4, 6)),
        data_collator=pad, teacher=tiny_bert(1), loss=loss,
    )  # fmt: skip
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return {
        "weights": weights(student),
        "start": start,
        "steps": run.state.global_step,
        "losses": torch.tensor(logged),
    }


def main():
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "trainer":
        found = trainer(folder)
    else:
        if WORLD > 1:
            dist.init_process_group("gloo")
        found = losses()
    torch.save(found, folder / f"{mode}-{WORLD}-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
