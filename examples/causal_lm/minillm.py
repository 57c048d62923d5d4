"""MiniLLM's objective without its policy gradient: reverse KL on answers that the student samples.

Paper: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv
2306.08543).

Features: every step samples new answers at temperature 1 and minimises the reverse KL between the
two distributions at each of their tokens, over the whole vocabulary. LoRA, resuming, and every
option of `trl.DistillationConfig`.

Limits: this is the single-step part of the paper's gradient. Not included are the policy gradient
of the later rewards with its clipping and length normalisation, sampling from a mixture with the
teacher (0.2 in the paper), and the language-modelling loss on OpenWebText. Needs Python 3.11 and
TRL 1.16. The last weights are kept.

    python examples/causal_lm/minillm.py --train-file data.jsonl --output-dir results/minillm

The schedule of the paper with GPT-2 on Dolly (4 rows on each of 16 GPUs):

    python examples/causal_lm/minillm.py --teacher MiniLLM/teacher-gpt2-1.5B \
        --student MiniLLM/init-gpt2-120M --train-file data/dolly/raw.jsonl --eval-rows 1000 \
        --skip-long-prompts --max-steps 5000 --learning-rate 5e-6 --warmup-steps 100 \
        --lr-scheduler-type constant_with_warmup --per-device-train-batch-size 8 \
        --gradient-accumulation-steps 8 --save-strategy steps --save-steps 500 \
        --output-dir results/minillm
"""

from __future__ import annotations

from collections.abc import Sequence

from on_policy import DEFAULTS, mixture_trainer
from recipe import Setup, messages, parse, prepare
from recipe_run import settle, train
from trl import DistillationConfig

import otkd


def main(argv: Sequence[str] | None = None) -> None:
    setup, args = parse(
        "minillm", argv, Setup, DistillationConfig, **{**DEFAULTS, "learning_rate": 5e-6}
    )
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("minillm", args, materials, setup)
        loss = otkd.ReverseKLLoss(vocab_size=materials.vocab_size)
        trainer = mixture_trainer(materials, setup, args, loss=loss, share=1.0)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
