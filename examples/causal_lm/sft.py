"""Supervised fine-tuning: cross-entropy of the answers, the baseline of all distillation.

Features: hub names or folders, JSONL or chat messages, LoRA (`--lora-r`), resuming, and every
option of `transformers.TrainingArguments`. No teacher is run; without `--student` the student is
made from layers of the teacher.

Limits: the last weights are kept. The papers choose the checkpoint with the best Rouge-L on the
validation rows.

    python examples/causal_lm/sft.py --train-file data.jsonl --output-dir results/sft

The fine-tuned GPT-2 of MiniLLM (Gu et al. 2024, arXiv 2306.08543; 2 rows on each of 16 GPUs):

    python examples/causal_lm/sft.py --student gpt2 --train-file data/dolly/raw.jsonl \
        --eval-rows 1000 --skip-long-prompts --num-train-epochs 20 --learning-rate 5e-4 \
        --per-device-train-batch-size 8 --gradient-accumulation-steps 4 --output-dir results/sft
"""

from __future__ import annotations

from collections.abc import Sequence

from recipe import Setup, messages, parse, prepare
from recipe_run import off_policy_trainer, settle, train
from transformers import TrainingArguments

import otkd


def main(argv: Sequence[str] | None = None) -> None:
    setup, args = parse("sft", argv, Setup, TrainingArguments)
    with messages(args.output_dir):
        materials = prepare(setup, args, needs_teacher=False)
        settings = settle("sft", args, materials, setup)
        trainer = off_policy_trainer(materials, setup, args, otkd.CrossEntropyLoss(), teacher=None)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
