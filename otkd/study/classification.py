"""Studies of classification tasks: the teacher is stored as its logits of every row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from otkd.study import models
from otkd.study.experiment import Experiment
from otkd.study.interface import Outputs, Rows
from otkd.study.messages import StudyError
from otkd.study.objectives import SEQKD, WASD, build_objective, check_objectives
from otkd.study.prediction import Predictor
from otkd.study.training import device
from otkd.tasks import Task, agreement, encode, load_task, majority_score, score
from otkd.teachers import DenseTeacher
from otkd.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.study.teachers import Teacher
    from otkd.tasks import TaskData

_TRAIN, _DEV, _CLASSES = "train-logits", "dev-logits", "class-rows"


class ClassificationExperiment(Experiment):
    """An experiment with classifiers of one or two sentences."""

    default_teacher = models.DEFAULT_ENCODER
    outputs = tuple(f"{name}.safetensors" for name in (_TRAIN, _DEV, _CLASSES))
    task: Task

    def _check_objectives(self) -> None:
        losses = {part for each in self.objectives for part in each.loss.split("+")}
        if for_texts := losses.intersection((SEQKD, WASD)):
            raise StudyError(f"{min(for_texts)} is for language models: leave it out.")
        if self.settings.rouge_rows is not None:
            raise StudyError("--rouge-rows is for the task instructions: leave it out.")
        stand_in = torch.eye(self.task.num_labels)
        check_objectives(self.objectives, partial(build_objective, embedding=stand_in))
        if not self.settings.finetune_teacher and self.settings.teacher is None:
            raise StudyError(
                "--no-finetune-teacher needs --teacher, a classifier trained for the task: the "
                "default teacher has no classification head."
            )

    def _load_data(self) -> TaskData:
        chosen = self.settings
        sizes = {"max_train_rows": chosen.max_train_rows, "max_dev_rows": chosen.max_dev_rows}
        return load_task(self.task, chosen.data_dir, **sizes)

    def _teacher_source(self) -> str:
        return models.model_source(self.settings.teacher)

    def _student_tokenizer(self) -> PreTrainedTokenizerBase:
        student = self.settings.student
        return self._tokenizer(student) if student else self.teacher_tokenizer

    def _check_teacher(self) -> None:
        if not self.settings.finetune_teacher:
            config = models.load("AutoConfig", self.teacher_source)
            models.check_is_classifier(self.teacher_source, config, self.task)

    def _least_length(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
        sentences = len(self.task.sentences)
        special = tokenizer.num_special_tokens_to_add(pair=sentences > 1)
        return special + sentences, f", of which {special} are special tokens"

    def load_teacher(self, source: str) -> PreTrainedModel:
        """The teacher; a head that is missing is made with its seed."""
        return models.load_classifier(source, self.task, self.settings.teacher_seed)

    def build_student(self, seed: int) -> PreTrainedModel:
        """A student with a new head, which depends on the seed only."""
        chosen = self.settings
        model = models.build_student(
            self.teacher_source, chosen.student, chosen.student_layers, self.task, seed
        )
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        return model

    def encoded(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows as tokens."""
        return encode(rows, tokenizer, self.settings.max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads a batch."""
        return DataCollatorWithPadding(tokenizer)

    def prepared(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Predictor:
        """Rows for predictions, with their labels."""
        return Predictor(rows, tokenizer, bf16=self.precision.bf16)

    def predict(self, model: PreTrainedModel, rows: Rows) -> dict[str, Tensor]:
        """Logits of ``model`` on each development split."""
        return {name: split.logits(model) for name, split in rows.dev.items()}

    def score(self, model: PreTrainedModel, rows: Rows, teacher: Teacher) -> dict[str, float]:
        """The metrics of the task, and the share of rows for which both predict the same class."""
        ours, theirs = self.predict(model, rows), teacher.on_dev(rows).logits()
        if rows.held_out is not None:  # they are used for each split
            theirs = theirs.repeat(len(rows.dev), 1)
        found = score(self.task, ours, _labels(rows))
        return found | {"agreement": agreement(torch.cat([*ours.values()]), theirs)}

    def store_outputs(
        self, model: PreTrainedModel, folder: Path, work: Path, on_steps: Callable[[int], None]
    ) -> dict[str, Any]:
        """Write logits and the rows of the head; returns the metrics."""
        rows = self.teacher_rows
        train, dev = self._on_training_rows().logits(model), self.predict(model, rows)
        class_rows = models.class_head(model).weight.detach().clone()
        for name, logits in ((_TRAIN, train), (_DEV, torch.cat([*dev.values()]))):
            DenseTeacher(logits).save(folder / f"{name}.safetensors")
        save_tensors(folder / f"{_CLASSES}.safetensors", {"class_rows": class_rows})
        labels = torch.tensor(rows.train["labels"][:])
        return {
            "metrics": score(self.task, dev, _labels(rows)),
            "majority_metrics": majority_score(self.task, labels, _labels(rows)),
        }

    def load_outputs(self, folder: Path) -> Outputs:
        """The stored logits and the rows of the head."""
        data, classes = self.data, self.task.num_labels
        train_path, dev_path, rows_path = (folder / name for name in self.outputs)
        train, dev = DenseTeacher.load(train_path), DenseTeacher.load(dev_path)
        rows = load_tensors(rows_path, "class_rows")[0]["class_rows"]
        check_stored(train_path, train.values, (len(data.train), classes))
        check_stored(dev_path, dev.values, (data.dev_rows, classes))
        check_stored(rows_path, rows, (classes, *rows.shape[-1:]))
        return Outputs(train, dev, rows)

    def states(self, model: PreTrainedModel) -> Tensor:
        """The states of the teacher on the training rows, for losses that compare them."""
        model.to(device())  # pyright: ignore[reportArgumentType]
        return self._on_training_rows().features(model)

    def _on_training_rows(self) -> Predictor:
        return self.prepared(self.teacher_rows.train, self.teacher_tokenizer)


def _labels(rows: Rows) -> dict[str, Tensor]:
    return {name: split.labels for name, split in rows.dev.items()}


def check_stored(path: Path, values: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless a file holds finite numbers of this shape."""
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise ValueError(
            f"{path} holds {values.dtype} of shape {tuple(values.shape)}, not floating-point "
            f"numbers of shape {shape}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{path} holds numbers that are not finite")
