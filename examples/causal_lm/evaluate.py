"""Measure students and their teacher on held-out rows, with and without sampling.

Features: for every model the cross-entropy of the answers, KL both ways and agreement of the most
probable token between teacher and student, and Rouge-L (`rouge-score`, as in the papers) of answers
sampled at temperature 1, as mean and standard deviation of five `--seeds`. A table, and JSON.

Limits: of several answers to a prompt, Rouge-L takes the best, and the other measures the first.
Rows whose prompt is too long are refused, or left out with `--skip-long-prompts`; MiniLLM cuts
prompts after 256 tokens instead. An interrupted evaluation starts again.

    python examples/causal_lm/evaluate.py --students results/kd/student results/sft/student \
        --data data.jsonl

One of the five test sets of MiniLLM (self-inst, Vicuna, sinst and uinst likewise):

    python examples/causal_lm/evaluate.py --students results/kd/student \
        --teacher MiniLLM/teacher-gpt2-1.5B --data data/dolly/valid.jsonl --skip-long-prompts \
        --output results/dolly.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import recipe
import torch
from recipe import DATA, messages, option, parse
from rich.table import Table

import otkd
from otkd.cli.console import StepBar, notice, out
from otkd.files import write_json
from otkd.study.messages import StudyError
from otkd.study.models import load
from otkd.study.provenance import versions
from otkd.study.training import device
from otkd.tasks import causal_lm
from otkd.tasks.causal_lm.answers import generated_rouge_l

COLUMNS = {"cross_entropy": "cross-entropy", "kl": "KL(p‖q)", "reverse_kl": "KL(q‖p)"}


@dataclass
class Options:
    students: list[str] = field(metadata={"help": "Hub names or folders."})
    teacher: str | None = option(None, "Hub name or folder; by default SmolLM2-135M-Instruct.")
    data: str = option(DATA, "JSONL file or hub data set.")
    max_length: int = option(512, "Most tokens of prompt and answer.")
    max_new_tokens: int = option(256, "Most tokens of a sampled answer.")
    skip_long_prompts: bool = option(False, "Leave such rows out.")
    seeds: list[int] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    batch_size: int = option(8, "Rows of a forward pass.")
    output: str = option("results/evaluation.json", "The JSON file.")


@torch.no_grad()
def agreement_with(
    teacher: Any, student: Any, batches: Sequence[Any], advance: Callable[[int], None]
) -> dict[str, float]:
    """Means over all tokens of the answers."""
    kl, reverse = otkd.KLLoss(reduction="none"), otkd.ReverseKLLoss(reduction="none")
    sums, count = dict.fromkeys([*COLUMNS, "agreement"], 0.0), 0
    tokens = min(student.config.vocab_size, teacher.config.vocab_size)
    for batch in batches:
        labels = batch["labels"][:, 1:].to(student.device)
        counted = labels != -100
        inputs = {name: batch[name].to(student.device) for name in ("input_ids", "attention_mask")}
        ours, theirs = (
            model(**inputs).logits[:, :-1][counted][:, :tokens] for model in (student, teacher)
        )
        values = causal_lm.next_token_metrics(ours, theirs, labels[counted])
        values |= {"kl": kl(ours, theirs), "reverse_kl": reverse(ours, theirs)}
        sums = {name: total + values[name].double().sum().item() for name, total in sums.items()}
        count += int(counted.sum())
        advance(1)
    return {name: total / count for name, total in sums.items()}


def measure(options: Options, bar: StepBar) -> dict[str, Any]:
    """The number of rows, and the measurements of the teacher and every student by their names."""
    teacher, tokenizer = recipe.load_teacher(options.teacher)
    prompts = causal_lm.fitting_prompts(
        causal_lm.read_instructions(options.data),
        tokenizer,
        options.max_length - options.max_new_tokens,
        skip_long=options.skip_long_prompts,
    )
    rows = [row for row, _ in prompts]
    encoded = [*causal_lm.encode_instructions(rows, tokenizer, options.max_length)]
    collate, size = causal_lm.padding_collator(tokenizer), options.batch_size
    batches = [collate(encoded[start : start + size]) for start in range(0, len(rows), size)]
    for name in options.students:
        recipe.check_same_tokens(load("AutoTokenizer", name), tokenizer)  # before any long work
    teacher, found = teacher.to(device()), {}
    bar.plan(len(batches) * (1 + len(options.seeds)) * (1 + len(options.students)))
    for name in ["teacher", *options.students]:
        model = teacher if name == "teacher" else recipe.load_model(name).to(device())
        recipe.refuse_sizes(f"model {name}", model, tokenizer, options.max_length)
        advance = bar.start(name)
        found[name] = agreement_with(teacher, model.eval(), batches, advance)
        found[name]["rouge_l"] = [
            generated_rouge_l(
                model,
                tokenizer,
                prompts,
                max_new_tokens=options.max_new_tokens,
                seed=seed * len(batches),  # each batch of each seed has a random state of its own
                batch_size=size,
                on_batches=advance,
            )
            for seed in options.seeds
        ]
    return {"rows": len(rows), "models": found}


def table(found: dict[str, Any]) -> Table:
    shown = Table(title=f"{found['rows']} held-out rows")
    shown.add_column("", overflow="fold")
    for title in (*COLUMNS.values(), "agreement", "Rouge-L"):
        shown.add_column(title, justify="right", no_wrap=True)
    for name, values in found["models"].items():
        scores = values["rouge_l"]
        mean = f"{statistics.mean(scores):.2f}" if scores else "–"
        mean += f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        numbers = [f"{values[column]:.3f}" for column in COLUMNS]
        shown.add_row(name, *numbers, f"{values['agreement']:.1%}", mean)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse("evaluate", argv, Options)
    file = Path(options.output)
    with messages(str(file.parent), resumes=False):
        if options.max_new_tokens >= options.max_length:
            raise StudyError("--max-new-tokens must be less than --max-length, to leave a prompt.")
        with StepBar() as bar:
            found = measure(options, bar)
        out.print(table(found))
        write_json(file, {**found, "options": asdict(options), "versions": versions()})
        notice(f"The numbers are in {file}.")


if __name__ == "__main__":
    main()
