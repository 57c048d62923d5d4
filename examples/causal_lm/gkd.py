"""GKD: generalized JSD on a mixture of the student's own answers and those of the data.

Paper: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv 2306.13649).

Features: `--student-share` is the paper's λ, the share of steps on answers that the student samples
at temperature 1. The loss is β·KL(p‖m) + (1 − β)·KL(q‖m) with m = β·p + (1 − β)·q, p the teacher
and β = `--jsd-beta`; 0 and 1 are forward and reverse KL. LoRA, resuming, and every option of
`trl.DistillationConfig`.

Limits: needs Python 3.11 and TRL 1.16. A step has answers of one kind; the last rows of an epoch
that do not fill a step are left out, as in TRL. The last weights are kept.

    python examples/causal_lm/gkd.py --train-file data.jsonl --output-dir results/gkd

The GKD baseline of DistiLLM with GPT-2 on Dolly, which has m = 0.1·p + 0.9·q and samples from a
buffer of earlier answers (here every answer is new):

    python examples/causal_lm/gkd.py --teacher MiniLLM/teacher-gpt2-1.5B \
        --student MiniLLM/init-gpt2-120M --train-file data/dolly/raw.jsonl --eval-rows 1000 \
        --skip-long-prompts --student-share 0.5 --jsd-beta 0.1 --num-train-epochs 20 \
        --learning-rate 5e-4 --per-device-train-batch-size 8 --gradient-accumulation-steps 4 \
        --output-dir results/gkd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from on_policy import DEFAULTS, mixture_trainer
from recipe import Setup, messages, option, parse, prepare, refused_settings
from recipe_run import settle, train
from torch import nn
from trl import DistillationConfig

import otkd


@dataclass
class Options:
    student_share: float = option(0.5, "Share of steps on answers of the student, λ.")
    jsd_beta: float = option(0.5, "β of the divergence, in [0, 1].")


def divergence(beta: float, vocab_size: int | None) -> nn.Module:
    if beta in (0, 1):
        return (otkd.ReverseKLLoss if beta else otkd.KLLoss)(vocab_size=vocab_size)
    return otkd.JSDLoss(beta, vocab_size=vocab_size)


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("gkd", argv, Setup, Options, DistillationConfig, **DEFAULTS)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("gkd", args, materials, setup, options)
        with refused_settings():
            loss = divergence(options.jsd_beta, materials.vocab_size)
        trainer = mixture_trainer(materials, setup, args, loss=loss, share=options.student_share)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
