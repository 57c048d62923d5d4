"""Adaptive KL: forward and reverse KL, weighted by the gaps in the head and tail of the teacher.

Paper: Wu et al. 2025, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
Language Models" (arXiv 2404.02657). The loss is `otkd.AdaptiveKLLoss`: at each position the head
are the teacher's most probable tokens up to a mass of `--head-mass`.

Features: those of `kd.py --loss akl`, with the teacher online; LoRA, resuming, and every option of
`transformers.TrainingArguments`.

Limits: trained on the answers of the data alone. The last weights are kept. The optimiser of the
command is that of MiniLLM's KD, whose setting the paper follows; its own values were not checked.

    python examples/causal_lm/akl.py --train-file data.jsonl --output-dir results/akl

With GPT-2 on Dolly:

    python examples/causal_lm/akl.py --teacher MiniLLM/teacher-gpt2-1.5B --student gpt2 \
        --train-file data/dolly/raw.jsonl --eval-rows 1000 --skip-long-prompts \
        --num-train-epochs 20 --learning-rate 5e-4 --per-device-train-batch-size 8 \
        --gradient-accumulation-steps 4 --output-dir results/akl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipe import Setup, messages, option, parse, prepare, refused_settings
from recipe_run import off_policy_trainer, settle, train
from transformers import TrainingArguments

import otkd


@dataclass
class Options:
    head_mass: float = option(0.5, "Mass of the head, in (0, 1).")


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("akl", argv, Setup, Options, TrainingArguments)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("akl", args, materials, setup, options)
        with refused_settings():
            loss = otkd.AdaptiveKLLoss(options.head_mass, vocab_size=materials.vocab_size)
        trainer = off_policy_trainer(materials, setup, args, loss, materials.teacher)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
