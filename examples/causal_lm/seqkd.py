"""Sequence-level distillation: cross-entropy of answers that the teacher samples.

Paper: Kim and Rush 2016, "Sequence-Level Knowledge Distillation" (arXiv 1606.07947), with sampled
answers instead of beam search, as in MiniLLM.

Features: the teacher answers every prompt once, at temperature 1, into a file, which later runs
reuse if it was made with the same teacher, rows and settings. An interrupted generation continues.
The file has the format of `--train-file`. LoRA, resuming, and every option of
`transformers.TrainingArguments`.

Limits: one answer for each prompt; empty ones are left out, and those that reach
`--max-new-tokens` are trained on as if they ended there. The scripts of MiniLLM and DistiLLM also
distil the distributions on these answers; for this, give the file to `kd.py` as `--train-file`. The
last weights are kept.

    python examples/causal_lm/seqkd.py --train-file data.jsonl --output-dir results/seqkd

With GPT-2 on Dolly, with the optimiser of MiniLLM:

    python examples/causal_lm/seqkd.py --teacher MiniLLM/teacher-gpt2-1.5B --student gpt2 \
        --train-file data/dolly/raw.jsonl --eval-rows 1000 --skip-long-prompts \
        --num-train-epochs 20 --learning-rate 5e-4 --per-device-train-batch-size 8 \
        --gradient-accumulation-steps 4 --output-dir results/seqkd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipe import Setup, messages, option, parse, prepare
from recipe_run import off_policy_trainer, settle, train
from teacher_answers import answered_by_teacher
from transformers import TrainingArguments

import otkd


@dataclass
class Options:
    answers_file: str | None = option(None, "Of the teacher; by default in the output folder.")
    max_new_tokens: int = option(256, "Most tokens of an answer.")


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("seqkd", argv, Setup, Options, TrainingArguments)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("seqkd", args, materials, setup, options)
        file = Path(options.answers_file or Path(args.output_dir) / "teacher-answers.jsonl")
        materials.train = answered_by_teacher(
            materials, settings, args, file, options.max_new_tokens
        )
        materials.teacher = None  # frees its memory
        trainer = off_policy_trainer(materials, setup, args, otkd.CrossEntropyLoss(), teacher=None)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
