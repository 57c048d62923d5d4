"""DistiLLM: skew KL on an adaptive mixture of answers of the data and of the student.

Paper: Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv
2402.03898).

Features: skew KL (`--direction forward`, KL(p‖α·p + (1 − α)·q)) or skew reverse KL, α = 0.1. The
share of steps on the student's answers starts at 0. Whenever the loss on the held-out rows exceeds
that at the last change by `--loss-epsilon`, it grows by 0.1. The held-out rows are evaluated before
the training and at every `--eval-strategy`. LoRA, resuming, and every option of
`trl.DistillationConfig`.

Limits: without the paper's replay buffer: every answer of the student is new, which takes more time
and is what the buffer approximates. The validation loss is that of the recipe; the authors' code
uses the cross-entropy of the held-out answers. Without the language-modelling loss on OpenWebText.
Needs Python 3.11 and TRL 1.16. The last weights are kept.

    python examples/causal_lm/distillm.py --train-file data.jsonl --output-dir results/distillm

The paper's experiment with GPT-2 on Dolly (8 rows on each of 16 GPUs in the authors' script):

    torchrun --nproc-per-node 4 examples/causal_lm/distillm.py \
        --teacher MiniLLM/teacher-gpt2-1.5B --student MiniLLM/init-gpt2-120M \
        --train-file data/dolly/raw.jsonl --eval-rows 1000 --skip-long-prompts \
        --num-train-epochs 20 --learning-rate 5e-4 --per-device-train-batch-size 16 \
        --gradient-accumulation-steps 2 --output-dir results/distillm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from on_policy import DEFAULTS, mixture_trainer
from recipe import Setup, messages, option, parse, prepare, refused_settings
from recipe_run import last_checkpoint, settle, train
from trl import DistillationConfig

import otkd
from otkd.checks import check_choice
from otkd.study.messages import StudyError

STEP = 0.1


@dataclass
class Options:
    direction: str = option("forward", "forward (SKL) or reverse (SRKL).")
    alpha: float = option(0.1, "Skew, in (0, 1).")
    loss_epsilon: float = option(0.1, "Rise of the validation loss that raises the share.")


def adaptive_share(losses: Sequence[float], epsilon: float) -> float:
    """The share of the student's answers after these validation losses, of which one is the start.

    It is a function of the log alone, which checkpoints contain, so that a resumed run has it.
    """
    share, reference = 0.0, losses[0] if losses else 0.0
    for loss in losses[1:]:
        if loss >= reference + epsilon:
            share, reference = min(share + STEP, 1.0), loss
    return share


def main(argv: Sequence[str] | None = None) -> None:
    defaults = {**DEFAULTS, "eval_rows": 4, "eval_strategy": "epoch"}
    setup, options, args = parse("distillm", argv, Setup, Options, DistillationConfig, **defaults)
    with messages(args.output_dir):
        if not setup.eval_rows or args.eval_strategy == "no":
            raise StudyError("DistiLLM needs validation: give --eval-rows and --eval-strategy.")
        if (args.eval_strategy, args.save_strategy) == ("epoch", "steps"):
            raise StudyError(
                "A checkpoint at the end of an epoch would lack the evaluation that follows: give "
                "--eval-strategy and --save-strategy the same value."
            )
        materials = prepare(setup, args)
        settings = settle("distillm", args, materials, setup, options)
        with refused_settings():
            check_choice("direction", options.direction, ("forward", "reverse"))
            reverse = options.direction == "reverse"
            kind = otkd.SkewReverseKLLoss if reverse else otkd.SkewKLLoss
            loss = kind(options.alpha, vocab_size=materials.vocab_size)

        def share(trainer: Any) -> float:
            history = trainer.state.log_history
            losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
            return adaptive_share(losses, options.loss_epsilon)

        # A resumed run has this evaluation in its log.
        args.eval_on_start = last_checkpoint(args) is None
        trainer = mixture_trainer(materials, setup, args, loss=loss, share=share)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
