"""WASD: the Sinkhorn divergence over a sparse kernel of token embeddings, in its own arithmetic.

Paper: Na et al. 2026, "Wasserstein-based Knowledge Distillation for Large Language Models" (NeurIPS
2026, arXiv 2610.07706), with the assistant distribution of AMiD.

Features: the loss is `otkd.study.wasd.Wasd`, with the mask, the reductions and the trainers of all
others. The kernel has the 8 nearest neighbours of every token by cosine of the teacher's input
embeddings, made symmetric, and nothing elsewhere; ε = 0.001, 10 iterations, weight 100, student
temperature 2. `--assistant 0.5` replaces the student by AMiD's mixture with α = −5. LoRA, resuming,
and every option of `transformers.TrainingArguments`.

Limits: trained on the answers of the data alone, as in the paper's comparison of divergences. Its
main experiment also trains on OpenWebText and on samples of the student. `otkd.SinkhornLoss` cannot
express this arithmetic: it solves until the marginals hold, while 10 iterations at this ε do not
converge, and where the kernel is the identity the loss is close to reverse KL. Its value is not a
divergence: only its gradient has a meaning. The last weights are kept. Not run on the paper's data.

    python examples/causal_lm/wasd.py --train-file data.jsonl --output-dir results/wasd

The paper's comparison of divergences with GPT-2 (32 rows on each of 4 GPUs; `--assistant 0.5` and
the student MiniLLM/init-gpt2-120M are those of its main experiment):

    torchrun --nproc-per-node 4 examples/causal_lm/wasd.py --student gpt2 \
        --teacher MiniLLM/teacher-gpt2-1.5B --train-file data/dolly/raw.jsonl --eval-rows 1000 \
        --skip-long-prompts --num-train-epochs 20 --learning-rate 1e-4 \
        --per-device-train-batch-size 32 --bf16 --output-dir results/wasd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipe import Setup, messages, option, parse, prepare, refused_settings
from recipe_run import off_policy_trainer, settle, train
from transformers import TrainingArguments

from otkd.study.wasd import Wasd


@dataclass
class Options:
    assistant: float = option(0.0, "λ of AMiD; 0 is the student itself.")
    assistant_alpha: float = option(-5.0, "α of AMiD.")
    student_temperature: float = option(2.0, "The teacher's is 1.")


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("wasd", argv, Setup, Options, TrainingArguments)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("wasd", args, materials, setup, options)
        embedding = materials.teacher.get_input_embeddings().weight.detach()
        with refused_settings():
            loss = Wasd(
                embedding[: materials.vocab_size],
                assistant=options.assistant,
                alpha=options.assistant_alpha,
                temperature=options.student_temperature,
                teacher_temperature=1.0,
                vocab_size=materials.vocab_size,
            )
        trainer = off_policy_trainer(materials, setup, args, loss, materials.teacher)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
