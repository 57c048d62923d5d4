"""Studies of language models whose students have a tokenizer of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otkd.alignment import token_map
from otkd.alignment.examples import AlignedExample, align_example
from otkd.alignment.pieces import vocabulary_of
from otkd.study import models
from otkd.study.generation import check_generation
from otkd.study.interface import Rows
from otkd.study.language import LanguageExperiment
from otkd.study.messages import StudyError
from otkd.study.objectives import check_objectives, composed
from otkd.study.prediction import autocast
from otkd.study.vocabularies import Vocabularies
from otkd.tasks.causal_lm import with_vocabulary
from otkd.tasks.causal_lm.byte_metrics import ByteComparison, next_log_probs
from otkd.tasks.causal_lm.loading import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.alignment import TokenMap
    from otkd.teachers import StoredTeacher

_BATCH = 8


class TwoTokenizerExperiment(LanguageExperiment):
    """An experiment with students that have a byte-level tokenizer made for the texts.

    The teacher reads what the student reads, which is cut after the largest number of the student's
    tokens. Both are compared at the positions that they share, and measured in bytes.
    """

    def _check_objectives(self) -> None:
        if self.task.instructions:
            raise StudyError(
                "--student-vocabulary is for texts: in a chat, each model would need its own "
                "template. Use the task text or reviews."
            )
        if self.settings.student is not None:
            raise StudyError(
                "--student-vocabulary makes the student from the teacher: leave --student out."
            )
        self.task = replace(self.task, headline="bits_per_byte")

    def _student_tokenizer(self) -> PreTrainedTokenizerBase:
        theirs: Any = self.teacher_tokenizer
        if vocabulary_of(theirs).family != "byte-level":
            raise StudyError(
                "--student-vocabulary needs a teacher with byte-level BPE, such as GPT-2, Llama 3 "
                f"or SmolLM: a new tokenizer of the kind of {self.teacher_source} would not know "
                "all characters."
            )
        texts = (row.text for row in self.data.train if isinstance(row, Text))
        wanted = self.settings.student_vocabulary
        made = theirs.train_new_from_iterator(texts, wanted, show_progress=False)
        if len(made) != wanted:
            raise StudyError(
                f"--student-vocabulary {wanted}: the training texts give a tokenizer of "
                f"{len(made)} tokens: choose this number, or more texts."
            )
        return made

    def _check_teacher(self) -> None:
        check_generation(self)
        (dev,), longest = self.student_rows.dev.values(), self.settings.max_length
        lengths = [*self.teacher_rows.train["length"], *(len(each.teacher_ids) for each in dev)]
        config = models.load("AutoConfig", self.teacher_source)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and max(lengths) > context:
            raise StudyError(
                f"--max-length {longest}: what the student reads of a text has up to "
                f"{max(lengths)} tokens of the teacher, which reads at most {context}: lower it."
            )
        if not min(lengths) or all(len(each.positions) < 2 for each in dev):
            raise StudyError(
                f"--max-length {longest} leaves too little of the texts: student and teacher must "
                "have two positions in common. Raise it."
            )
        # Any embedding that is not constant stands for the teacher's.
        stand_in = torch.arange(self._token_map.vocab_size[1]).remainder(2).float().unsqueeze(-1)
        check_objectives(self.objectives, partial(self.build_loss, embedding=stand_in))

    @cached_property
    def _token_map(self) -> TokenMap:
        return token_map(self.student_tokenizer, self.teacher_tokenizer)

    def build_loss(
        self,
        name: str,
        options: Mapping[str, Any],
        embedding: Tensor,
        widths: tuple[int, int] | None = None,
    ) -> nn.Module:
        """A loss between the two vocabularies."""
        tokenizers = self.student_tokenizer, self.teacher_tokenizer
        vocabularies = Vocabularies(*tokenizers, self._token_map, embedding)
        return composed(name, options, lambda part: vocabularies.loss(part, options))

    def build_student(self, seed: int) -> PreTrainedModel:
        """Layers of the teacher, with the tokens of the student."""
        return with_vocabulary(super().build_student(seed), self._token_map)

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Both tokenizers."""
        return {
            "processing_class": self.student_tokenizer,
            "teacher_tokenizer": self.teacher_tokenizer,
        }

    @cached_property
    def teacher_rows(self) -> Rows:
        """What the student reads, in the teacher's tokens."""
        dev = {}
        for split, examples in self.student_rows.dev.items():
            dev[split] = self.prepared(_read_by_teacher(examples), self.teacher_tokenizer)
        return Rows(_read_by_teacher(self._aligned(self.student_rows.train)), dev)

    def prepared(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Rows of the teacher in batches, or those of a student in the tokens of both models."""
        own = tokenizer is self.student_tokenizer
        return self._aligned(rows) if own else super().prepared(rows, tokenizer)

    def _aligned(self, rows: Dataset) -> list[AlignedExample]:
        return [self._align(ids) for ids in rows["input_ids"][:]]

    def _align(self, ids: list[int]) -> AlignedExample:
        tokenizers = self.student_tokenizer, self.teacher_tokenizer
        try:
            return align_example({"input_ids": ids}, *tokenizers)
        except ValueError as error:
            begins = tokenizers[0].decode(ids[:16])
            raise StudyError(
                f"The text that begins with {begins!r} cannot be read by both tokenizers: {error}."
            ) from error

    def _measured(
        self, model: PreTrainedModel | None, rows: Rows, teacher: StoredTeacher, embedding: Tensor
    ) -> dict[str, float]:
        if model is None:
            return self._measured_teacher(teacher)
        (examples,) = rows.dev.values()
        comparison = ByteComparison(self.student_tokenizer, self.teacher_tokenizer)
        for part, theirs in _batches(examples, teacher):
            with autocast(model.device, self.precision.bf16):
                ours = next_log_probs(model, [example.ids for example in part])
            for example, *pair in zip(part, ours, theirs, strict=True):
                if not pair[0].isfinite().any(-1).all():
                    raise FloatingPointError("the logits on the development rows are not finite")
                comparison.add(example, *pair)
        found = comparison.metrics()
        return {
            "bits_per_byte": found.student_bits_per_byte,
            "next_byte_kl": found.first_byte_kl,
            "agreement": found.same_first_byte,
        }

    def _measured_teacher(self, teacher: StoredTeacher) -> dict[str, float]:
        """The teacher's metrics, at the positions where students are compared with it."""
        (examples,) = self.student_rows.dev.values()
        comparison = ByteComparison(self.teacher_tokenizer, self.teacher_tokenizer)
        for part, theirs in _batches(examples, teacher):
            for example, log_probs in zip(part, theirs, strict=True):
                found = replace(example.positions, student=example.positions.teacher)
                own = replace(example, ids=example.teacher_ids, positions=found)
                comparison.add(own, log_probs, log_probs)
        found = comparison.metrics()
        return {
            "bits_per_byte": found.teacher_bits_per_byte,
            "next_byte_kl": 0.0,
            "agreement": 1.0,
        }


def _batches(
    examples: Sequence[AlignedExample], teacher: StoredTeacher
) -> Iterator[tuple[Sequence[AlignedExample], list[Tensor]]]:
    """Examples, and the teacher's log-probabilities after each of its tokens."""
    for start in range(0, len(examples), _BATCH):
        part = examples[start : start + _BATCH]
        logits = teacher[torch.arange(start, start + len(part))].logits()
        pairs = zip(part, logits, strict=True)
        yield part, [found[: len(each.teacher_ids)].log_softmax(-1) for each, found in pairs]


def _read_by_teacher(examples: Sequence[AlignedExample]) -> Dataset:
    """The texts of the examples, encoded as :func:`encode_rows` does."""
    from datasets import Dataset

    ids = [list(example.teacher_ids) for example in examples]
    masks, lengths = [[1] * len(each) for each in ids], [len(each) for each in ids]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": masks, "labels": ids, "length": lengths}
    )
