"""Distillation on the answers of the data, with any loss of otkd.

Papers: Hinton et al. 2015 (arXiv 1503.02531); as a baseline for language models, MiniLLM (Gu et al.
2024, arXiv 2306.08543) and DistiLLM (Ko et al. 2024, arXiv 2402.03898).

Features: `--loss` is a name of `otkd losses` and `--loss-args` its options as JSON; transport
losses get the input embeddings of the teacher. `--ce-weight` adds the cross-entropy of the answers.
With `--stored-tokens K` the teacher runs once: its K most probable tokens at every position are
kept in a folder, which is refused if it was made from other rows, another teacher or other
settings. LoRA, resuming, and every option of `transformers.TrainingArguments`.

Limits: the stored teacher is held in memory, about 8·K bytes for each position of rows padded to
the longest. The last weights are kept, and not those with the best Rouge-L.

    python examples/causal_lm/kd.py --loss transport_kl --loss-args '{"price": 30}'

KD of MiniLLM with GPT-2 (its weight of cross-entropy is 0.5; DistiLLM's baseline has 0):

    python examples/causal_lm/kd.py --teacher MiniLLM/teacher-gpt2-1.5B --student gpt2 \
        --train-file data/dolly/raw.jsonl --eval-rows 1000 --skip-long-prompts \
        --loss kl --ce-weight 0.5 --num-train-epochs 20 --learning-rate 5e-4 \
        --per-device-train-batch-size 8 --gradient-accumulation-steps 4 --output-dir results/kd
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recipe import (
    Materials,
    Setup,
    json_options,
    messages,
    option,
    parse,
    prepare,
    refused_settings,
)
from recipe_run import encoded, off_policy_trainer, settle, train
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

import otkd
from otkd.files import folder_written_whole, write_json
from otkd.losses.registry import loss_class
from otkd.study.messages import StudyError
from otkd.tasks.causal_lm import padding_collator

_BATCH = 8


@dataclass
class Options:
    loss: str = option("kl", "A name of `otkd losses`.")
    loss_args: str = option("{}", "Options of the loss, as JSON.")
    ce_weight: float = option(0.0, "Weight of cross-entropy; the loss has the rest of 1.")
    stored_tokens: int = option(0, "Store this many tokens of the teacher; 0 runs it online.")
    teacher_folder: str | None = option(
        None, "Of the stored teacher; by default in the output folder."
    )


def build_loss(options: Options, materials: Materials) -> nn.Module:
    """The loss by its name, without the cross-entropy."""
    given = json_options(options.loss_args)
    with refused_settings():
        parameters = inspect.signature(loss_class(options.loss)).parameters
        if "embedding" in parameters and not {"embedding", "cost"} & given.keys():
            embedding = materials.teacher.get_input_embeddings().weight.detach()
            given["embedding"] = embedding[: materials.vocab_size]
        if materials.vocab_size is not None and "vocab_size" in parameters:
            given.setdefault("vocab_size", materials.vocab_size)
        return otkd.get_loss(options.loss, **given)


def stored_teachers(
    materials: Materials, setup: Setup, settings: dict[str, Any], temperature: float, folder: Path
) -> list[otkd.TopKTeacher]:
    """The teacher's most probable tokens for training rows and held-out rows, if there are any."""
    names = ("rows", "teacher_weights", "stored_tokens", "max_length", "eval_rows")
    made_of = {name: settings[name] for name in (*names, "skip_long_prompts")}
    made_of["temperature"] = temperature
    if not folder.exists():
        with folder_written_whole(folder) as partial:
            for part, rows in enumerate(encoded(materials, setup)):
                if rows is not None:
                    _store(materials, rows, made_of).save(partial / f"{part}.safetensors")
            write_json(partial / "made-of.json", made_of)
    record = folder / "made-of.json"
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    differing = ", ".join(name for name, value in made_of.items() if found.get(name) != value)
    if differing:
        raise StudyError(
            f"The stored teacher in {folder} was made with other settings ({differing}): choose "
            "another --teacher-folder, or remove this one."
        )
    with refused_settings():
        return [otkd.TopKTeacher.load(path) for path in sorted(folder.glob("*.safetensors"))]


@torch.no_grad()
def _store(materials: Materials, rows: Any, made_of: dict[str, Any]) -> otkd.TopKTeacher:
    teacher, collate, parts = materials.teacher, padding_collator(materials.tokenizer), []
    for start in tqdm(range(0, len(rows), _BATCH), "The teacher reads"):
        batch = collate([rows[i] for i in range(start, min(start + _BATCH, len(rows)))])
        inputs = {name: batch[name].to(teacher.device) for name in ("input_ids", "attention_mask")}
        logits = teacher(**inputs).logits[..., : materials.vocab_size]
        part = otkd.TopKTeacher.from_logits(
            logits, made_of["stored_tokens"], made_of["temperature"]
        )
        parts.append(part.to("cpu"))
    longest = max(part.tokens.shape[1] for part in parts)
    return otkd.TopKTeacher.cat([part.with_length(longest) for part in parts])


def main(argv: Sequence[str] | None = None) -> None:
    setup, options, args = parse("kd", argv, Setup, Options, TrainingArguments)
    with messages(args.output_dir):
        materials = prepare(setup, args)
        settings = settle("kd", args, materials, setup, options)
        loss, teachers = build_loss(options, materials), [materials.teacher]
        if options.stored_tokens:
            folder = Path(options.teacher_folder or Path(args.output_dir) / "stored-teacher")
            temperature = getattr(loss, "teacher_temperature", None) or loss.temperature
            teachers = stored_teachers(materials, setup, settings, temperature, folder)
            materials.teacher = None  # frees its memory
        if options.ce_weight:
            terms = {options.loss: (1 - options.ce_weight, loss), "ce": (options.ce_weight, "ce")}
            with refused_settings():
                loss = otkd.WeightedLoss(terms)
        trainer = off_policy_trainer(materials, setup, args, loss, *teachers)
        train(trainer, materials, settings)


if __name__ == "__main__":
    main()
