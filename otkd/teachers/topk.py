"""A stored teacher that keeps the k most probable tokens of each position."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.checks import check_positive
from otkd.teachers.checks import check_self_term, check_shapes
from otkd.teachers.heaviest import heaviest_of_logits
from otkd.teachers.logprobs import tensors_of_logprobs
from otkd.teachers.masses import StoredMasses
from otkd.teachers.self_term import SelfTermSettings
from otkd.teachers.shapes import concatenated_teachers, lengthened_teacher, sliced_teacher
from otkd.teachers.topk_files import load_topk, save_topk
from otkd.warn import warn_deprecated


@dataclass(frozen=True, repr=False)
class TopKTeacher(StoredMasses):
    """The k most probable tokens of a teacher at each position, with their log-probabilities.

    The tokens that are not stored are known only as one total mass, the tail. Divergences compare
    k + 1 atoms, the stored tokens and the tail, on both sides. ``SinkhornLoss`` and
    ``TransportKLLoss`` with a :class:`~otkd.supports.TopK` support add atoms for tokens that are
    certainly more probable in the student than in the teacher. Losses that compare all tokens use
    :meth:`logits_beside`. With each of these, a loss that is 0 with zero gradient at student =
    teacher keeps this property.

    A position may have fewer than k tokens, but at least one: a token of −1 or a log-mass of −inf
    marks an empty slot. Use :meth:`from_logprobs` for log-probabilities from an inference server.

    Attributes:
        tokens: ``(examples, *positions, k)``, int32 or int64; distinct at each position.
        log_masses: log-probabilities of these tokens at ``temperature``, of the same shape. NaN
            marks a position without a teacher. In half precision the mass of the tail, computed as
            a difference from 1, has an error of about 1e-3 (float16) or 1e-2 (bfloat16).
        vocab_size: number of tokens of the teacher.
        temperature: by which the teacher's logits were divided.
        self_potential: ``(examples, *positions, k + 1)`` or None: the target potentials of the
            self-term U(p, p), the transport of p to itself, on the stored tokens and the tail. See
            :meth:`otkd.SinkhornLoss.with_self_term`.
        self_settings: the settings for which ``self_potential`` was computed.

    Raises:
        ValueError: for wrong shapes or dtypes, or settings out of range.

    Example:
        >>> teacher = otkd.TopKTeacher.from_logits(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), k=2)
        >>> otkd.KLLoss()(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), teacher)
        tensor(0.3858)
    """

    self_potential: Tensor | None = None
    self_settings: SelfTermSettings | None = None

    def __post_init__(self):
        check_shapes(self)

    @classmethod
    def from_logits(
        cls,
        teacher_logits: Float[Tensor, "*batch vocab"],
        k: int,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> TopKTeacher:
        """Keep the ``k`` most probable tokens of dense logits, in decreasing order.

        Args:
            teacher_logits: ``(*batch, vocab)``.
            k: number of tokens to keep at each position, at least 1.
            temperature: divides the logits; a loss that reads this teacher must use the same.
            dtype: of ``log_masses``; by default float32, or float64 for float64 logits.

        Raises:
            TypeError: if ``teacher_logits`` is not a floating-point tensor.
            ValueError: for settings out of range.

        Example:
            >>> teacher = otkd.TopKTeacher.from_logits(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), k=2)
            >>> teacher.masses()
            tensor([[0.6103, 0.2245, 0.1652]])
        """
        tokens, log_masses = heaviest_of_logits(teacher_logits, k, temperature, dtype)
        return cls(tokens, log_masses, teacher_logits.shape[-1], temperature)

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> TopKTeacher:
        """Deprecated name of :meth:`from_logits`."""
        warn_deprecated("TopKTeacher.of", "TopKTeacher.from_logits")
        return cls.from_logits(*args, **kwargs)

    @classmethod
    def from_logprobs(
        cls,
        entries: Sequence[Any],
        vocab_size: int,
        *,
        k: int | None = None,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> TopKTeacher:
        """A teacher from log-probabilities as inference servers return them.

        Args:
            entries: one entry per position, or one list of entries per example; lengths may differ.
                An entry is ``{token: logprob}`` or a list of pairs ``(token, logprob)``, with any
                number of tokens; all other tokens belong to the tail. A logprob may be an object
                with an attribute ``logprob`` (vLLM's ``prompt_logprobs``). None marks a position
                without a teacher, which a mask or label must exclude.
            vocab_size: number of tokens of the teacher.
            k: how many of the most probable tokens to keep; all by default.
            temperature: at which the server computed the log-probabilities, usually 1.
            dtype: of ``log_masses``.

        Raises:
            TypeError: for entries of another kind.
            ValueError: for a token that is repeated or not in the vocabulary, a positive logprob,
                or probabilities of a position that add up to more than 1.
        """
        check_positive(temperature=temperature)
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k!r}")
        tokens, log_masses = tensors_of_logprobs(entries, vocab_size, k, dtype)
        return cls(tokens, log_masses, vocab_size, temperature)

    @classmethod
    def cat(cls, teachers: Sequence[TopKTeacher]) -> TopKTeacher:
        """Concatenate the examples of several teachers, for example one per batch.

        Teachers that store fewer tokens per position get empty slots.

        Raises:
            ValueError: if the list is empty, or the teachers differ in more than their number of
                examples and tokens.
        """
        return concatenated_teachers(teachers)

    def __repr__(self) -> str:
        known = "" if self.self_settings is None else ", with self-term"
        return f"TopKTeacher({self.shape}, k={self.k}, temperature={self.temperature}{known})"

    def __getitem__(self, index) -> TopKTeacher:
        part = self._map(lambda tensor: tensor[index])
        if part.k != self.k:
            raise IndexError(
                f"{index!r} would remove tokens: only the batch dimensions {self.shape[:-1]} can "
                "be indexed"
            )
        return part

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKTeacher:
        """The same teacher on ``device``."""
        if self.tokens.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_length(self, length: int) -> TopKTeacher:
        """The first ``length`` positions of each example, ``(examples, length, …)``.

        Missing positions are filled with NaN masses, which a loss refuses unless they are masked
        out.
        """
        return lengthened_teacher(self, length)

    def flatten(self) -> TopKTeacher:
        """The same positions with one batch dimension."""
        return self._map(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))

    def sliced(self, vocab_size: int, counted: Tensor | None = None) -> TopKTeacher:
        """The same teacher for the first ``vocab_size`` tokens; the other tokens are padding.

        The slots of padding tokens become empty. This is exact if the padding has no mass, or if
        all tokens are stored.

        Args:
            vocab_size: number of real tokens.
            counted: boolean ``(*batch,)``: the positions to check; all by default.

        Raises:
            ValueError: if padding tokens have mass: the share of each remaining token in the tail
                is unknown, so that the masses cannot be renormalised.
        """
        return sliced_teacher(self, vocab_size, counted)

    def with_self_term(self, loss: Any) -> TopKTeacher:
        """Deprecated form of :meth:`otkd.SinkhornLoss.with_self_term`."""
        warn_deprecated("teacher.with_self_term(loss)", "loss.with_self_term(teacher)")
        return loss.with_self_term(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the teacher and a checksum to a safetensors file, atomically.

        Raises:
            ImportError: if safetensors is not installed.
        """
        save_topk(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TopKTeacher:
        """Read a file written by :meth:`save`.

        Raises:
            ImportError: if safetensors is not installed.
            ValueError: if the file is not a safetensors file, was changed after it was saved, or
                does not hold a valid teacher.
        """
        fields = load_topk(path)
        try:
            teacher = cls(**fields).validate()
            check_self_term(teacher)
        except ValueError as error:
            raise ValueError(f"{path} does not hold a valid stored teacher: {error}") from error
        return teacher

    def _map(self, change) -> TopKTeacher:
        potential = self.self_potential
        return replace(
            self,
            tokens=change(self.tokens),
            log_masses=change(self.log_masses),
            self_potential=None if potential is None else change(potential),
        )
