"""The run of a recipe: its settings, a trainer, a training that resumes, and the saved student."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from recipe import Materials, Setup, refused_settings
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from otkd.cli.console import notice
from otkd.files import errors_about, folder_written_whole, write_json
from otkd.integrations.transformers import DistillationTrainer
from otkd.study.messages import StudyError
from otkd.study.reuse import differing_settings
from otkd.study.work import last_whole_checkpoint, seal
from otkd.tasks.causal_lm import encode_instructions, padding_collator
from otkd.tasks.causal_lm.instructions import digest_of

# Options that do not change the trained weights. Models and rows are compared by their content.
_NO_SETTINGS = re.compile(
    r"output_dir|log|report_to|run_name|hub_|push_|save_|disable_tqdm|dataloader_|resume_|do_|debug"
    r"|project|trackio|local_rank|eval_on_start|train_file|teacher$|student$|teacher_folder"
    r"|answers_file"
)
_SETTINGS = "settings.json"  # whose hash is in every checkpoint
_ELSEWHERE = "Choose another --output-dir, or remove this folder."


def digest_of_model(model: nn.Module) -> str:
    """A hash of a model's weights, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def settle(
    name: str, args: TrainingArguments, materials: Materials, *options: Any
) -> dict[str, Any]:
    """Everything that the trained weights depend on; :func:`train` writes it to the folder.

    Raises:
        StudyError: if the folder holds a run with other settings.
    """
    every = json.loads(args.to_json_string())
    for option in options:
        every |= asdict(option)
    settings = {
        "recipe": name,
        "processes": args.world_size,
        "rows": digest_of([*materials.held_out, *materials.train]),
        "teacher_weights": materials.teacher and digest_of_model(materials.teacher),
        "student_weights": digest_of_model(materials.student),
        **{key: value for key, value in every.items() if not _NO_SETTINGS.match(key)},
    }
    folder = Path(args.output_dir)
    path = folder / _SETTINGS
    if path.exists():
        differing = differing_settings(json.loads(path.read_text(encoding="utf-8")), settings)
        if differing:
            lines = f"{folder} holds a run with other settings:", *differing.values(), _ELSEWHERE
            raise StudyError("\n".join(lines))
    elif any(folder.glob("checkpoint-*")) or (folder / "student").exists():
        raise StudyError(f"{folder} holds models that no recipe wrote. {_ELSEWHERE}")
    return settings


class _Sealed(TrainerCallback):
    """Writes the hashes of a checkpoint's files into it; without them it is not resumed from."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def off_policy_trainer(
    materials: Materials,
    setup: Setup,
    args: TrainingArguments,
    loss: nn.Module,
    teacher: Any,
    eval_teacher: Any = None,
    *,
    rows: tuple[Any, Any] | None = None,
    **options: Any,
) -> DistillationTrainer:
    """A trainer on the answers of the data; ``teacher`` is a model, stored, or None.

    ``rows`` replace those of :func:`encoded`; all other options are those of the trainer.
    """
    train, held_out = rows or encoded(materials, setup)
    with refused_settings():
        return DistillationTrainer(
            model=materials.student,
            loss=loss,
            teacher=teacher,
            eval_teacher=eval_teacher,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=padding_collator(materials.tokenizer),
            **options,
        )


def encoded(materials: Materials, setup: Setup) -> tuple[Any, Any]:
    """Training and held-out rows as tokens; None instead of no held-out rows."""
    options = {"max_length": setup.max_length, "skip_long": setup.skip_long_prompts}
    train = encode_instructions(materials.train, materials.tokenizer, **options)
    if not materials.held_out:
        return train, None
    return train, encode_instructions(materials.held_out, materials.tokenizer, **options)


def last_checkpoint(args: TrainingArguments) -> Path | None:
    """The last checkpoint of an interrupted run whose files are all unchanged, or None."""
    with args.main_process_first(local=False):  # damaged ones are removed
        return last_whole_checkpoint(Path(args.output_dir))


def train(trainer: Any, materials: Materials, settings: dict[str, Any]) -> None:
    """Train, from the last checkpoint if there is one, and save the student in ``student``."""
    folder = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(trainer.args)
    if (folder / "student").is_dir():
        notice(f"The student in {folder / 'student'} is finished; there is nothing to do.")
        return
    if trainer.is_world_process_zero():
        write_json(folder / _SETTINGS, settings)
    if checkpoint is not None:
        notice(f"The training is resumed from {checkpoint}.")
    trainer.add_callback(_Sealed())
    with warnings.catch_warnings(), errors_about(folder):
        # Trainer restores the scheduler before the first step of a resumed run.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not trainer.is_world_process_zero():
        return
    student = trainer.accelerator.unwrap_model(trainer.model)
    student = student.merge_and_unload() if hasattr(student, "merge_and_unload") else student
    with folder_written_whole(folder / "student") as partial:
        student.save_pretrained(partial)
        materials.tokenizer.save_pretrained(partial)
    notice(f"The student is in {folder / 'student'}.")
