"""DistiLLM-2: skew KL on answers of the teacher, skew reverse KL on answers of the student.

Paper: Ko et al. 2025, "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs" (arXiv
2503.07067).

Features: the teacher answers every prompt once, into a file as in `seqkd.py`. Half of the steps
minimise skew KL on these answers, the others skew reverse KL on new answers of the student, with
α = 0.1 and equal weights. LoRA, resuming, and every option of `trl.DistillationConfig`.

Limits: α and the weights are constant; the paper adapts α to each example and moves weight to the
student's answers as the training goes on. Here the student answers with its current weights; the
paper generates once per epoch. The two answers to a prompt are not in the same step. Needs Python
3.11 and TRL 1.16. The last weights are kept.

    python examples/causal_lm/distillm2.py --train-file data.jsonl --output-dir results/distillm2

With the GPT-2 experiment of DistiLLM, which the paper's first figure follows:

    python examples/causal_lm/distillm2.py --teacher MiniLLM/teacher-gpt2-1.5B \
        --student MiniLLM/init-gpt2-120M --train-file data/dolly/raw.jsonl --eval-rows 1000 \
        --skip-long-prompts --num-train-epochs 20 --learning-rate 5e-4 \
        --per-device-train-batch-size 8 --gradient-accumulation-steps 4 \
        --output-dir results/distillm2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from on_policy import DEFAULTS, mixture_trainer
from recipe import Setup, messages, option, parse, prepare, refused_settings
from recipe_run import settle, train
from teacher_answers import answered_by_teacher
from trl import DistillationConfig

import otkd


@dataclass
class Options:
    alpha: float = option(0.1, "Skew of both losses, in (0, 1).")
    student_share: float = option(0.5, "Share of steps on answers of the student.")
    answers_file: str | None = option(None, "Of the teacher; by default in the output folder.")


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("distillm2", argv, Setup, Options, DistillationConfig, **DEFAULTS)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("distillm2", args, materials, setup, options)
        with refused_settings():
            losses = {
                "loss": otkd.SkewKLLoss(options.alpha, vocab_size=materials.vocab_size),
                "sample_loss": otkd.SkewReverseKLLoss(
                    options.alpha, vocab_size=materials.vocab_size
                ),
            }
        file = Path(options.answers_file or Path(args.output_dir) / "teacher-answers.jsonl")
        materials.train = answered_by_teacher(
            materials, settings, args, file, args.max_completion_length
        )
        trainer = mixture_trainer(materials, setup, args, share=options.student_share, **losses)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
