"""A stored teacher that keeps the heaviest tokens of each position and their masses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.checks import check_one_logits, check_positive
from otkd.precision import compute_dtype
from otkd.signals.atoms import atom_masses, log_atom_masses
from otkd.signals.beside import evenly_spread_logits, logits_shaped_by
from otkd.signals.checks import check_distributions, check_self_term, check_shapes
from otkd.signals.files import load_tensors, save_tensors
from otkd.signals.logprobs import tensors_of_logprobs
from otkd.signals.self_term import SelfTermSettings
from otkd.signals.shapes import sliced_signal, widened_signal
from otkd.signals.slots import Slots, empty_slots

_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, repr=False)
class TopKSignal:
    """The k heaviest tokens of a teacher at each position, and their masses.

    What is not stored is known as one mass, that of all other tokens (the tail), and every loss
    takes it so. Divergences compare k + 1 atoms: the stored tokens and the tail, which has the mass
    of the same other tokens on the student's side. ``SinkhornLoss`` with a
    :class:`~otkd.supports.TopK` support adds atoms for tokens that are certain to be heavier in the
    student. Losses that compare all tokens see :meth:`logits_beside` the student's. So a loss that
    is 0 and flat at student = teacher stays so.

    A position may have fewer than k tokens, but at least one: a token of −1 or a log-mass of −inf
    marks an empty slot. See :meth:`from_logprobs` for what inference servers return.

    Attributes:
        tokens: ``(examples, *positions, k)``, int32 or int64; distinct at each position.
        log_masses: log-probabilities of these tokens at ``temperature``, of the same shape; in half
            precision the mass of all others, which is what is left of 1, has an error of about 1e-3
            (float16) or 1e-2 (bfloat16). NaN where there is no teacher.
        vocab_size: number of tokens of the teacher.
        temperature: divided the teacher's logits.
        self_potential: ``(examples, *positions, k + 1)`` or None: the potential f of the teacher's
            self-term on its tokens and the tail, with OT_ε(p, p) = 2·⟨p, f⟩; see
            :meth:`with_self_term`.
        self_settings: what it was made for.

    Raises:
        ValueError: for shapes or dtypes other than these, or settings out of range.
    """

    tokens: Tensor
    log_masses: Tensor
    vocab_size: int
    temperature: float = 1.0
    self_potential: Tensor | None = None
    self_settings: SelfTermSettings | None = None

    def __post_init__(self):
        check_shapes(self)

    @classmethod
    def of(
        cls,
        teacher_logits: Float[Tensor, "*batch vocab"],
        k: int,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> TopKSignal:
        """The signal of dense logits, heaviest token first; all tokens where there are only k.

        Args:
            teacher_logits: ``(*batch, vocab)``.
            k: tokens kept of each position, at least 1.
            temperature: divides the logits; a loss that reads the signal must have it, too.
            dtype: of ``log_masses``; by default float32, or float64 for float64 logits.

        Raises:
            TypeError, ValueError: for logits that are none, or settings out of range.
        """
        check_one_logits("teacher_logits", teacher_logits)
        check_positive(temperature=temperature)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k!r}")
        vocab = teacher_logits.shape[-1]
        precision = compute_dtype(teacher_logits)
        rows = teacher_logits.detach().reshape(-1, vocab)
        tokens = rows.new_empty(len(rows), min(k, vocab), dtype=torch.int32)
        log_masses = torch.empty_like(tokens, dtype=dtype or precision)
        for block in torch.arange(len(rows), device=rows.device).split(_block_rows(vocab)):
            logits = rows[block].to(precision) / temperature
            heaviest, chosen = logits.topk(tokens.shape[-1])
            tokens[block] = chosen.to(tokens.dtype)
            normaliser = logits.logsumexp(-1, keepdim=True)
            log_masses[block] = (heaviest - normaliser).to(log_masses.dtype)
        shape = (*teacher_logits.shape[:-1], tokens.shape[-1])
        return cls(tokens.reshape(shape), log_masses.reshape(shape), vocab, temperature)

    @classmethod
    def from_logprobs(
        cls,
        entries: Sequence[Any],
        vocab_size: int,
        *,
        k: int | None = None,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> TopKSignal:
        """The signal of log-probabilities as inference servers return them.

        Args:
            entries: one for each position, or for each example a list of those of its positions,
                which may differ in length. An entry is ``{token: logprob}`` or a list of pairs
                ``(token, logprob)``, with as many tokens as there are; all others belong to the
                tail. An object with an attribute ``logprob`` will do as a logprob (vLLM's
                ``prompt_logprobs``). None is a position without a teacher, which must not count.
            vocab_size: number of tokens of the teacher.
            k: how many tokens are kept of each position, the heaviest; all by default.
            temperature: that divided the server's logits, which is 1 unless it was told otherwise.
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
    def cat(cls, signals: Sequence[TopKSignal]) -> TopKSignal:
        """The examples of several signals, such as those of one batch each, in this order.

        Where some store fewer tokens of each position than others, the rest of their slots is
        empty.

        Raises:
            ValueError: if there is none, or they differ in more than their number of examples and
                of tokens.
        """
        kinds = {(s.shape[1:], s.temperature, s.self_settings) for s in signals}
        if len(kinds) != 1:
            raise ValueError(
                "signals that become one must differ in their number of examples alone, and in k, "
                f"got {', '.join(map(repr, signals)) or 'none'}; with_length() makes lengths equal"
            )
        k = max(s.k for s in signals)
        signals = [widened_signal(s, k) for s in signals]
        first = signals[0]
        potentials = [s.self_potential for s in signals if s.self_potential is not None]
        return replace(
            first,
            tokens=torch.cat([s.tokens for s in signals]),
            log_masses=torch.cat([s.log_masses for s in signals]),
            self_potential=torch.cat(potentials) if potentials else None,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits it stands for, ``(*batch, vocab)``."""
        return (*self.tokens.shape[:-1], self.vocab_size)

    @property
    def k(self) -> int:
        """Number of tokens stored of each position."""
        return self.tokens.shape[-1]

    @property
    def tail_mass(self) -> Tensor:
        """What the tokens that are not stored have together, ``(*batch,)``."""
        return self.masses()[..., -1]

    def __repr__(self) -> str:
        known = "" if self.self_settings is None else ", with self-term"
        return f"TopKSignal({self.shape}, k={self.k}, temperature={self.temperature}{known})"

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index) -> TopKSignal:
        part = self._map(lambda tensor: tensor[index])
        if part.k != self.k:
            raise IndexError(
                f"{index!r} takes tokens away: only the batch {self.shape[:-1]} can be"
            )
        return part

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKSignal:
        """The same signal on ``device``."""
        if self.tokens.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_length(self, length: int) -> TopKSignal:
        """The first ``length`` positions of each example, ``(examples, length, …)``.

        Where fewer are stored the others have NaN masses, which a loss refuses where they count.
        """
        missing = length - self.tokens.shape[1]
        if missing <= 0:
            return self[:, :length]
        return self._map(lambda tensor: _lengthened(tensor, missing))

    def flatten(self) -> TopKSignal:
        """The same positions with one batch dimension."""
        return self._map(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))

    @property
    def slots(self) -> Slots:
        """The stored tokens, and which slots are empty."""
        empty = empty_slots(self.tokens, self.log_masses, self.vocab_size)
        # Positions that do not count may hold anything.
        return Slots.of(self.tokens.clamp(max=self.vocab_size - 1), empty)

    def masses(self, dtype: torch.dtype | None = None) -> Shaped[Tensor, "*batch atoms"]:
        """Masses of the stored tokens and, last, of all others: ``(*batch, k + 1)``; they sum to 1.

        In float32 at least. Empty slots have none. Where rounding lifts the stored masses above 1
        they are divided by their sum, and so they are where all tokens are stored.
        """
        return atom_masses(self, dtype)

    def log_atoms(self) -> Shaped[Tensor, "*batch atoms"]:
        """Logarithms of :meth:`masses`, whose tail is at least the rounding error of 1.

        So no token is without mass that may have had some. The tail is −inf where all tokens are
        stored.
        """
        return log_atom_masses(self)

    def logits(self, counted: Tensor | None = None) -> Float[Tensor, "*batch vocab"]:
        """Dense logits of a teacher whose other tokens share the mass left to them evenly.

        ``(*batch, vocab)``, with ``softmax(logits / temperature)`` of the stored masses at the
        stored tokens. The teacher did not spread that mass evenly: values and gradients are those
        of this stand-in, and not 0 at student = teacher. Losses take it only where the student's
        logits cannot say more (:meth:`logits_beside`): where its vocabulary is another one.

        Args:
            counted: boolean ``(*batch,)``: the positions that are checked; all by default.

        Raises:
            ValueError: see :meth:`validate`.
        """
        self.validate(counted)
        return evenly_spread_logits(self)

    def logits_beside(
        self,
        student_logits: Float[Tensor, "*batch vocab"],
        temperature: float | None = None,
        counted: Tensor | None = None,
    ) -> Float[Tensor, "*batch vocab"]:
        """Dense logits of a teacher whose other tokens share the mass left to them as q does.

        With p_i = p_tail·q_i/q_tail for tokens that are not stored: the teacher nearest to the
        student, in every f-divergence, of all that have the stored masses. Where the student has
        the stored masses, too, it is the student. A constant: no gradient flows through it.

        Args:
            student_logits: ``(*batch, vocab)``, of the same vocabulary.
            temperature: of the student; by default that of the signal.
            counted: boolean ``(*batch,)``: the positions that are checked; all by default.

        Raises:
            ValueError: see :meth:`validate`.
        """
        self.validate(counted)
        return logits_shaped_by(self, student_logits, temperature or self.temperature)

    def without_logits(self) -> Tensor:
        """NaN in the shape of :meth:`logits` and without its memory: what stands for them."""
        return self.log_masses.new_full((), torch.nan).expand(self.shape)

    def validate(self, counted: Tensor | None = None) -> TopKSignal:
        """Itself, if every position is a distribution over distinct tokens of the vocabulary.

        Positions without a teacher may hold NaN masses, and empty slots any token.

        Args:
            counted: boolean ``(*batch,)``: the positions that are checked; all by default.

        Raises:
            ValueError: for a token that is repeated or not in the vocabulary, or masses of a
                position that add up to more than 1.
        """
        check_distributions(self if counted is None else self[counted])
        return self

    def check_temperature(self, temperature: float) -> None:
        """Raise ``ValueError`` unless a loss has the temperature for which the masses are."""
        if not math.isclose(self.temperature, temperature, rel_tol=1e-6):
            raise ValueError(
                f"the stored teacher's masses are at temperature {self.temperature} but the loss "
                f"takes the teacher's at {temperature}: set teacher_temperature="
                f"{self.temperature}, or store the signal at the temperature of the loss"
            )

    def sliced(self, vocab_size: int, counted: Tensor | None = None) -> TopKSignal:
        """The same signal of the first ``vocab_size`` tokens, where the others are padding.

        Exact if the padding has no mass, and where all tokens are stored: the slots of its tokens
        become empty.

        Args:
            vocab_size: number of real tokens.
            counted: boolean ``(*batch,)``: the positions that are checked; all by default.

        Raises:
            ValueError: if tokens of the padding have mass: what the others have of it is not known,
                so that the masses cannot be renormalised.
        """
        return sliced_signal(self, vocab_size, counted)

    def with_self_term(self, loss: Any) -> TopKSignal:
        """The same signal with the potential of OT_ε(p, p), solved once for all steps to come.

        That term has no gradient in the student, and does not depend on the student's tokens, on
        which p has no mass.

        Args:
            loss: the loss that is to read the signal; its cost, ε and solver settings are taken.

        Raises:
            ValueError: if the loss has no such term that could be kept: it needs a ``TopK`` support
                with a tail, ``debias``, the dual value, held marginals and a constant cost.
        """
        from otkd.supports.stored import solve_self_term

        self.check_temperature(loss.teacher_temperature or loss.temperature)
        potential, settings = solve_self_term(self, loss.cost, loss.support, loss.solver_options)
        return replace(self, self_potential=potential, self_settings=settings)

    def save(self, path: str | os.PathLike) -> None:
        """Write the signal and its checksum to a safetensors file, whole or not at all.

        Raises:
            ImportError: without the package safetensors.
        """
        tensors = {"tokens": self.tokens, "log_masses": self.log_masses}
        metadata = {"vocab_size": str(self.vocab_size), "temperature": repr(self.temperature)}
        if self.self_potential is not None and self.self_settings is not None:
            tensors["self_potential"] = self.self_potential
            metadata["self_settings"] = json.dumps(self.self_settings)
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TopKSignal:
        """Read a signal written by :meth:`save`.

        Raises:
            ImportError: without the package safetensors.
            ValueError: if it is no safetensors file, was changed after it was saved, or what it
                holds is no such signal.
        """
        tensors, metadata = load_tensors(path, "tokens", "log_masses")
        try:
            settings = None
            if "self_settings" in metadata:
                epsilon, costs = json.loads(metadata["self_settings"])
                settings = SelfTermSettings(float(epsilon), tuple(map(float, costs)))
            vocab_size = int(metadata["vocab_size"])
            temperature = float(metadata["temperature"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the settings in {path} are missing or damaged: {error!r}") from error
        try:
            signal = cls(
                tensors["tokens"],
                tensors["log_masses"],
                vocab_size,
                temperature,
                tensors.get("self_potential"),
                settings,
            ).validate()
            check_self_term(signal)
        except ValueError as error:
            raise ValueError(f"{path} holds no sound signal: {error}") from error
        return signal

    def _map(self, change) -> TopKSignal:
        potential = self.self_potential
        return replace(
            self,
            tokens=change(self.tokens),
            log_masses=change(self.log_masses),
            self_potential=None if potential is None else change(potential),
        )


def _lengthened(tensor: Tensor, missing: int) -> Tensor:
    filling = tensor.new_empty(len(tensor), missing, *tensor.shape[2:])
    filling.fill_(torch.nan if filling.is_floating_point() else -1)
    return torch.cat([tensor, filling], 1)


def _block_rows(vocab: int) -> int:
    return max(1, _BLOCK_ELEMENTS // vocab)
