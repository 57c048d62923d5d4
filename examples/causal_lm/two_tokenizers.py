"""Distillation from a teacher with another tokenizer, at the positions that both have in common.

Papers: for the losses, X-Token's projections (`pushforward`), GOLD (Patiño et al. 2025, `hybrid`)
and ULD (Boizard et al. 2024, arXiv 2402.12030, `uld`); `transport_kl` compares the tokens of both
vocabularies by their embeddings.

Features: both read the same rows, each with its own chat template, and are compared where both have
read the same bytes of the answer. `--ce-weight` adds the cross-entropy of the student. Without
`--student` the student has layers of the teacher, and the tokenizer `--student-tokenizer` or one
that is trained on the rows. All rows are aligned before the training. With held-out rows, bits per
byte and the divergence of the next byte are written to `bytes.json`. LoRA, resuming, and every
option of `transformers.TrainingArguments`.

Limits: the teacher runs online. A tokenizer that changes answers is refused. A SentencePiece
tokenizer that is trained on the rows knows only their characters.

    python examples/causal_lm/two_tokenizers.py --eval-rows 4

GPT-2 from SmolLM2, on Dolly:

    python examples/causal_lm/two_tokenizers.py --student gpt2 --ce-weight 0.5 \
        --train-file data/dolly/raw.jsonl --eval-rows 1000 --skip-long-prompts \
        --num-train-epochs 3 --learning-rate 1e-4 --per-device-train-batch-size 8 \
        --gradient-accumulation-steps 4 --output-dir results/two_tokenizers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import recipe
from recipe import Materials, Setup, messages, option, parse, refused_settings
from recipe_run import off_policy_trainer, settle, train
from torch import nn
from transformers import TrainingArguments

import otkd
from otkd.alignment import aligned_cost, token_map
from otkd.alignment.examples import align_example
from otkd.cli.console import notice
from otkd.files import write_json
from otkd.study.messages import StudyError
from otkd.study.models import load
from otkd.tasks.causal_lm import byte_metrics, encode_instructions, fitting_prompts, with_vocabulary

LOSSES = ("pushforward", "hybrid", "uld", "transport_kl")


@dataclass
class Options:
    student_tokenizer: str | None = option(None, "Of a student made from layers of the teacher.")
    vocab_size: int = option(4096, "Tokens of a tokenizer that is trained on the rows.")
    loss: str = option("pushforward", f"One of {', '.join(LOSSES)}.")
    loss_args: str = option("{}", 'Options of the loss, as JSON, such as {"loss": "rkl"}.')
    ce_weight: float = option(0.0, "Weight of cross-entropy; the loss has the rest of 1.")


def prepare(setup: Setup, options: Options, args: TrainingArguments) -> tuple[Materials, Any]:
    """Models and rows, and the tokenizer of the teacher."""
    held_out, rows = recipe.split_rows(setup)
    teacher, theirs = recipe.load_teacher(setup.teacher)
    if setup.student is not None:
        if options.student_tokenizer is not None:
            raise StudyError("--student has its own tokenizer: leave --student-tokenizer out.")
        ours, student = load("AutoTokenizer", setup.student), recipe.load_model(setup.student)
    else:
        if options.student_tokenizer is not None:
            ours = load("AutoTokenizer", options.student_tokenizer)
        else:
            texts = [text for row in rows for text in (row.text or "", *row.answers)]
            ours = theirs.train_new_from_iterator(texts, options.vocab_size, show_progress=False)
            ours.chat_template = theirs.chat_template
        with refused_settings():
            student = with_vocabulary(recipe.layers_of(teacher, setup), token_map(ours, theirs))
    ours = recipe.with_padding(ours)
    recipe.refuse_sizes("student", student, ours, setup.max_length)
    recipe.refuse_sizes("teacher", teacher, theirs, setup.max_length)
    student = recipe.with_adapters(student.train(), setup.lora_r, args.seed)
    return Materials(teacher.to(args.device), student, ours, rows, held_out), theirs


def encoded(rows: Sequence[Any], tokenizers: Sequence[Any], setup: Setup) -> Any:
    """The rows in the tokens of both; a row that cannot be aligned is refused."""
    if not rows:
        return None
    longest, skip = setup.max_length - 1, setup.skip_long_prompts
    for tokenizer in tokenizers:
        rows = [row for row, _ in fitting_prompts(rows, tokenizer, longest, skip_long=skip)]
    ours, theirs = (encode_instructions(rows, each, setup.max_length) for each in tokenizers)
    for name in ("input_ids", "labels"):
        ours = ours.add_column(f"teacher_{name}", theirs[name][:])
    for row, example in zip(rows, ours, strict=True):
        try:
            align_example(dict(example), *tokenizers)
        except ValueError as error:
            raise StudyError(f"{row.where}: {error}") from error
    return ours


def build_loss(options: Options, materials: Materials, teacher_tokenizer: Any) -> nn.Module:
    """The loss between both vocabularies, with cross-entropy if it has a weight."""
    given = recipe.json_options(options.loss_args)
    with refused_settings():
        pair = materials.tokenizer, teacher_tokenizer
        found = token_map(*pair)
        given.setdefault("vocab_size", found.vocab_size)  # logits may be padded
        if options.loss == "pushforward":
            loss = otkd.PushforwardLoss(found, **given)
        elif options.loss == "hybrid":
            loss = otkd.HybridLogitLoss(found, **given)
        elif options.loss == "uld":
            loss = otkd.UniversalLogitLoss(**given)
        elif options.loss == "transport_kl":
            models = materials.student, materials.teacher
            tables = [model.get_input_embeddings().weight.detach() for model in models]
            tables = [rows[:size] for rows, size in zip(tables, found.vocab_size, strict=True)]
            loss = otkd.TransportKLLoss(aligned_cost(*tables, *pair), **given)
        else:
            raise StudyError(f"--loss {options.loss}: choose one of {', '.join(LOSSES)}.")
        terms = {options.loss: (1 - options.ce_weight, loss), "ce": (options.ce_weight, "ce")}
        return otkd.WeightedLoss(terms) if options.ce_weight else loss


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("two_tokenizers", argv, Setup, Options, TrainingArguments)
    with messages(args.output_dir):
        materials, theirs = prepare(setup, options, args)
        ours = materials.tokenizer
        settings = settle("two_tokenizers", args, materials, setup, options)
        loss = build_loss(options, materials, theirs)
        rows = [
            encoded(part, (ours, theirs), setup) for part in (materials.train, materials.held_out)
        ]
        tokenizers = {"processing_class": ours, "teacher_tokenizer": theirs}
        trainer = off_policy_trainer(
            materials, setup, args, loss, materials.teacher, rows=(rows[0], rows[1]), **tokenizers
        )
        train(trainer, materials, settings)
        if rows[1] is not None and trainer.is_world_process_zero():
            folder = Path(args.output_dir)
            student = recipe.load_model(str(folder / "student")).to(args.device)
            found = byte_metrics(student, materials.teacher, ours, theirs, [*rows[1]])
            write_json(folder / "bytes.json", asdict(found))
            notice(f"The metrics of the held-out rows are in {folder / 'bytes.json'}.")


if __name__ == "__main__":
    main()
