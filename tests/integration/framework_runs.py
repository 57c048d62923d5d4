"""Trainings with TRL and the stock Trainer that one process and two must agree on.

`framework_runs.py FOLDER` is what each process of test_trl.py does.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import trl
from datasets import Dataset
from torch.distributed.fsdp import fully_shard

import otkd
from otkd.integrations.transformers import compute_loss_func
from otkd.integrations.trl import DistillationTrainer
from tests.integration.test_trainer import pad, texts, weights
from tests.models import VOCAB, save_tokenizer, tiny_llama

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
STEP, MICROBATCHES = 8, 2  # rows of a step, of all processes; and microbatches of each
# The first process has the longer completions, so that means over its tokens alone would differ.
ROWS = [{"prompt": "w3 w4", "completion": " ".join(["w5 w6 w7"] * (n // 3 + 1))} for n in range(8)]
LOSSES = {
    "mean": otkd.KLLoss,
    "sum": lambda: otkd.KLLoss(reduction="sum"),
    "sequence_mean": lambda: otkd.KLLoss(reduction="sequence_mean"),
    "batch": lambda: otkd.BatchSinkhornLoss(debias=True),
}


def settings(folder, microbatches):
    return {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": STEP // WORLD // microbatches,
        "gradient_accumulation_steps": microbatches,
    }


def trl_trainer(folder, loss, microbatches=MICROBATCHES):
    save_tokenizer(folder / f"tokenizer-{WORLD}-{RANK}", VOCAB)
    return DistillationTrainer(
        tiny_llama(0),
        tiny_llama(1),
        trl.DistillationConfig(
            **settings(folder, microbatches),
            activation_checkpointing=False,
            shuffle_dataset=False,
            max_completion_length=8,
        ),
        Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            folder / f"tokenizer-{WORLD}-{RANK}", padding_side="left"
        ),
        loss=loss,
        off_policy=True,
    )


def stock_trainer(folder, loss):
    student = tiny_llama(0)
    return transformers.Trainer(
        student,
        transformers.TrainingArguments(
            **settings(folder, MICROBATCHES), train_sampling_strategy="sequential"
        ),
        train_dataset=texts(),
        data_collator=pad,
        compute_loss_func=compute_loss_func(loss, tiny_llama(1), student=student),
    )


def trained(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": weights(trainer.accelerator.unwrap_model(trainer.model)), "losses": losses}


def sharded(folder):
    """Loss and gradient of one batch, with the parameters of both models on all processes."""
    trainer = trl_trainer(folder, otkd.KLLoss())
    batch = trainer._generate_and_score_completions(ROWS)
    if WORLD > 1:
        for model in (trainer.model, trainer.teacher_model):
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model.lm_head)
            fully_shard(model)
    value = trainer.compute_loss(trainer.model, batch)
    value.backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return {"value": value.detach(), "gradient": torch.cat([g.flatten() for g in whole])}


def runs(folder):
    found = {"sharded": sharded(folder)}
    for name, loss in LOSSES.items():
        # A batch loss compares the samples of one microbatch.
        microbatches = 1 if name == "batch" else MICROBATCHES
        found[f"trl, {name}"] = trained(trl_trainer(folder, loss(), microbatches))
    for name in ("mean", "sum"):
        found[f"stock, {name}"] = trained(stock_trainer(folder, LOSSES[name]()))
    return found


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.save(runs(folder), folder / f"{WORLD}-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
