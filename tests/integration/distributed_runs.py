"""Trainings and evaluations that one process and several must agree on.

`distributed_runs.py FOLDER` is what each process of test_distributed.py does; every process may see
other things. `distributed_runs.py FOLDER FAULT` ends with an exception in the last process.
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import DataCollatorWithFlattening, TrainerCallback, TrainingArguments

import otkd
from otkd.integrations.transformers import DistillationTrainer
from otkd.supports import TopK
from tests.integration import test_two_tokenizers as two_tokenizers
from tests.integration.test_trainer import pad, sentences, weights
from tests.models import VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_masked_lm

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
STEP, STEPS = 6, 2  # rows of a step, of all processes; and steps


def texts(lengths, *, labels=True, empty=()):
    """Sequences of unlike lengths; the labels of those that are ``empty`` do not count."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * length}
        if labels:
            row["labels"] = [-100] * length if index in empty else [-100, *ids[1:]]
        rows.append(row)
    return rows


LENGTHS = (9, 3, 7, 2, 8, 4, 6, 5, 3, 7, 4, 8)
# In the first step the last process counts nothing, be it one of two or of three; in the second the
# second of three does not.
CAUSAL = texts(LENGTHS, empty=(3, 4, 5, 8, 9))
# Ten rows in batches of two: of two or three processes some evaluate repeated rows, one nothing.
EVAL = texts(LENGTHS[:10], empty=(2, 3, 7))
UNLABELLED = [{k: v for k, v in row.items() if k != "labels"} for row in CAUSAL]
UNMASKED = [{k: v for k, v in row.items() if k != "attention_mask"} for row in CAUSAL]
# Teachers of the examples. In the first step, the last process has none of the second teacher.
NUMBERED = [
    row | {"teacher_index": [0, 1, 1, 0, 0, 0][index % STEP]} for index, row in enumerate(UNMASKED)
]
ALIGNED = [
    two_tokenizers.tokens(prompt=99 if index in (3, 4, 5, 8, 9) else 1)[index % 8]
    for index in range(12)
]
FLATTEN = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
SENTENCES = sentences(lengths=LENGTHS)
for index in (3, 4, 5, 8, 9):
    SENTENCES[index]["labels"] = -100

EMBEDDING = tiny_gpt2(1).get_input_embeddings().weight.detach()


def sinkhorn(**options):
    # Tighter than usual, so that it matters little which positions are solved together.
    return otkd.SinkhornLoss(embedding=EMBEDDING, epsilon=0.5, tolerance=1e-6, **options)


def weighted():
    """A term of every kind that is a sum over positions, some of them in a sum of their own."""
    inner = {"top": (1.0, sinkhorn(support=TopK(5))), "reverse": (0.5, otkd.ReverseKLLoss())}
    return otkd.WeightedLoss(
        {
            "kl": (0.9, otkd.KLLoss()),
            "ce": (0.1, "ce"),
            "jsd": (0.1, otkd.JSDLoss()),
            "uld": (0.1, otkd.UniversalLogitLoss()),
            "exact": (0.1, otkd.WassersteinLoss("discrete")),
            "ot": (1.0, otkd.WeightedLoss(inner)),
        }
    )


def mixed():
    return otkd.WeightedLoss({"kl": (0.5, otkd.KLLoss(temperature=2.0)), "ce": (0.5, "ce")})


def adapted(seed):
    """A student with adapters that have already moved away from the base model."""
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_llama(0), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def batch_weighted():
    return otkd.WeightedLoss(
        {
            "kl": (0.9, otkd.KLLoss()),
            "l1": (2.0, otkd.BatchSinkhornLoss(debias=True)),
            "hidden": (1.0, otkd.BatchSinkhornLoss("hidden", debias=True)),
        }
    )


class TermsOfItsOwn(nn.Module):
    """A loss whose terms are others in every process, and absent from every second call."""

    needs_teacher = False

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.last_terms = {}

    def forward(self, student_logits, teacher_logits=None, *, labels, mask, num_items_in_batch):
        counted = labels != -100
        value = (student_logits.square().mean(-1) * counted).sum() / num_items_in_batch
        self.last_terms = {f"of {RANK}": value.detach(), "all": value.detach()}
        if self.calls % 2:
            self.last_terms.popitem()
        self.calls += 1
        return value


class LogOfOne(TrainerCallback):
    """A callback that logs in the first process alone."""

    trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if RANK == 0:
            self.trainer.log({"loss": 1.0, "mine": 1.0})


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": str(folder / "run"), "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1,
            "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "per_device_train_batch_size": STEP // WORLD, "per_device_eval_batch_size": 2,
            "train_sampling_strategy": "sequential", "max_steps": STEPS, "save_strategy": "no",
            "logging_steps": 1, "dataloader_pin_memory": False,
            "ddp_backend": "gloo" if WORLD > 1 else None,
        }
        | options
    )  # fmt: skip


def run(
    folder, build, rows, loss, *, evaluate=None, evaluate_first=False, metrics=None, callbacks=(),
    **options,
):  # fmt: skip
    """Weights after training, what was logged, and what evaluation says."""
    student = build(0)
    collate = options.pop("collate", pad)
    teacher = options.pop("teacher", None) or build(1)
    shares = options.pop("teacher_weights", None)
    tokenizers = options.pop("tokenizers", {})
    trainer = DistillationTrainer(
        student, arguments(folder, **options), train_dataset=rows, data_collator=collate,
        teacher=teacher, teacher_weights=shares, loss=loss, compute_metrics=metrics,
        callbacks=list(callbacks), **tokenizers,
    )  # fmt: skip
    for callback in callbacks:
        callback.trainer = trainer
    start = weights(student)
    if evaluate_first:
        trainer.evaluate(evaluate)
    trainer.train()
    found = {
        "moved": weights(student) - start,
        "logs": [
            {k: v for k, v in log.items() if k.startswith(("loss", "solver/", "grad_norm"))}
            for log in trainer.state.log_history
            if "learning_rate" in log
        ],
        "metrics": {},
    }
    if evaluate is not None:
        names = ("loss", "cross_entropy", "accuracy")
        found["metrics"] = {
            k: v for k, v in trainer.evaluate(evaluate).items() if k.endswith(names)
        }
    return found


def refusal(folder, **options):
    """The error of a trainer with a stored teacher; None if there is none."""
    try:
        DistillationTrainer(
            tiny_bert(0),
            arguments(folder, **options),
            train_dataset=SENTENCES,
            data_collator=pad,
            teacher=torch.zeros(len(SENTENCES), 3),
            loss=otkd.KLLoss(),
        )
    except ValueError as error:
        return str(error)
    return None


def microbatches(count):
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": count // WORLD}


def accuracy(prediction):
    counted = prediction.label_ids != -100
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": right[counted].mean()}


def without_labels_but_in_the_first(rows):
    batch = pad(rows)
    if RANK > 0:
        del batch["labels"]
    return batch


class StoredInTheLast:
    """Collates with a teacher's top-k in the last process, with its logits in the others."""

    def __init__(self, teacher):
        self.teacher = teacher.eval()

    def __call__(self, rows):
        batch = pad(rows)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            logits = self.teacher(**inputs).logits
        last = RANK == WORLD - 1
        return batch | {
            "teacher_logits": otkd.TopKTeacher.from_logits(logits, k=VOCAB) if last else logits
        }


def runs(folder):
    found = {}
    causal = (folder, tiny_gpt2, CAUSAL)
    found["kl"] = run(*causal, otkd.KLLoss(), evaluate=EVAL)
    found["evaluated first"] = run(*causal, otkd.KLLoss(), evaluate=EVAL, evaluate_first=True)
    found["packed"] = run(
        folder, tiny_llama, UNMASKED, otkd.KLLoss(), evaluate=UNMASKED[:10], collate=FLATTEN
    )
    found["mixture"] = run(
        *causal, mixed(), teacher=[tiny_gpt2(1), tiny_gpt2(2)], teacher_weights=[0.3, 0.7]
    )
    found["per example, packed"] = run(
        folder, tiny_llama, NUMBERED, otkd.KLLoss(), evaluate=NUMBERED[:10], collate=FLATTEN,
        teacher=[tiny_llama(1), tiny_llama(2)],
    )  # fmt: skip
    found["base model"] = run(
        folder, adapted, CAUSAL, mixed(), evaluate=EVAL, teacher="base_model", learning_rate=1.0
    )
    found["two tokenizers"] = run(
        folder, two_tokenizers.student, ALIGNED, two_tokenizers.mixed(), evaluate=ALIGNED[:7],
        teacher=two_tokenizers.teacher(), tokenizers=two_tokenizers.TOKENIZERS,
    )  # fmt: skip
    found["sinkhorn"] = run(*causal, sinkhorn(), evaluate=EVAL)
    # One process with the whole batch at once, several with microbatches of one row.
    options = microbatches(STEP) if WORLD > 1 else {}
    for name, loss in {
        "sum": otkd.KLLoss(reduction="sum"),
        "sequence_mean": otkd.KLLoss(reduction="sequence_mean"),
        "weighted": weighted(),
    }.items():
        rate = 0.001 if name == "sum" else 0.1
        found[name] = run(*causal, loss, evaluate=EVAL, learning_rate=rate, **options)
    found["classes, sequence_mean"] = run(
        folder, tiny_bert, SENTENCES, otkd.KLLoss(reduction="sequence_mean"), **options
    )
    # Nothing to count beforehand but the mask, or the examples.
    for name, build in {
        "tokens": tiny_masked_lm,
        "examples": tiny_bert,
        "causal": tiny_gpt2,
    }.items():
        found[f"unlabelled {name}"] = run(
            folder, build, UNLABELLED, otkd.KLLoss(), evaluate=UNLABELLED[:10], **options
        )
    found["batch"] = run(
        folder, tiny_bert, SENTENCES, batch_weighted(), evaluate=SENTENCES[:10], metrics=accuracy
    )
    for reduction in ("sum", "sequence_mean"):
        loss = otkd.BatchSinkhornLoss(reduction=reduction, debias=True)
        found[f"batch, {reduction}"] = run(folder, tiny_bert, SENTENCES, loss)
    for name, options in {
        "split": {
            "accelerator_config": {"split_batches": True},
            "per_device_train_batch_size": STEP,
            "per_device_eval_batch_size": STEP,
        },
        "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    }.items():
        rows = texts((7,) * 12, empty=(3, 4, 5, 8, 9))
        found[name] = run(folder, tiny_gpt2, rows, otkd.KLLoss(), evaluate=rows[:10], **options)

    # Here processes see other things on purpose, so that no single process runs the same.
    found["other terms"] = run(*causal, TermsOfItsOwn(), callbacks=[LogOfOne()])
    discrete = otkd.SinkhornLoss("discrete", support=TopK(5))
    found["other teachers"] = run(
        *causal,
        otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss()), "ot": (1.0, discrete)}),
        collate=StoredInTheLast(tiny_gpt2(1)),
    )
    found["labels in the first alone"] = run(
        folder,
        tiny_bert,
        sentences(lengths=LENGTHS),
        otkd.KLLoss(),
        evaluate=sentences(lengths=LENGTHS),
        metrics=accuracy,
        collate=without_labels_but_in_the_first,
    )
    refused = {"even_batches": False}, {"dispatch_batches": True}
    found["refused"] = [refusal(folder, accelerator_config=config) for config in refused]
    found["means of processes"] = run(*causal, otkd.KLLoss(), average_tokens_across_devices=False)
    return found


def fail(folder, fault):
    """A training in which the last process alone meets something that it cannot train on."""

    class Broken(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if RANK == WORLD - 1 and state.global_step == 1:
                for parameter in model.parameters():
                    parameter.data.fill_(float("nan"))

    rows, build, loss = CAUSAL, tiny_gpt2, otkd.KLLoss()
    if fault == "batch":
        rows, build, loss = SENTENCES, tiny_bert, otkd.BatchSinkhornLoss()
    run(folder, build, rows, loss, callbacks=[Broken()])


def main():
    torch.set_num_threads(1)
    gc.freeze()  # each training collects garbage, which takes longer than it otherwise does
    folder = Path(sys.argv[1])
    os.environ["OTKD_CACHE"] = str(folder)
    if len(sys.argv) > 2:
        fail(folder, sys.argv[2])
    from tests.integration import sharded_runs  # which imports this module

    torch.save(runs(folder) | sharded_runs.runs(folder), folder / f"{WORLD}-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
