"""Which tokens of the student a token of the teacher stands for, as a sparse matrix."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from otkd.tensor_files import load_tensors, save_tensors

NOTHING, LONGER, FIRST, EXACT, ROLE = range(5)
KINDS = ("nothing", "longer", "first", "exact", "role")
_TENSORS = ("teacher", "student", "weight", "target", "kinds")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A sparse matrix M with P(student's token | teacher's token), from :func:`token_map`.

    Its entries are sorted by the teacher's token, and add up to 1 for each of them, or are missing
    if no token of the student corresponds to it.

    Attributes:
        teacher: teacher's token of each entry, ascending.
        student: student's token of each entry.
        weight: P(student's token | teacher's token), float32.
        target: ``(teacher_tokens,)``: the token of the student by rule, whose weight may be shared
            with longer ones; −1 if there is none.
        kinds: ``(teacher_tokens,)``, uint8: by which rule, an index into :attr:`KINDS`.
        vocab_size: number of tokens of student and teacher. Pass it to a loss if its logits are
            padded.

    Example:
        >>> found = otkd.alignment.TokenMap.of_pairs([0, 2], [1, 0], vocab_size=(3, 2))
        >>> found.push(torch.tensor([0.25, 0.75]))
        tensor([0.7500, 0.0000, 0.2500])
    """

    KINDS = KINDS

    teacher: Int[Tensor, " entries"]
    student: Int[Tensor, " entries"]
    weight: Float[Tensor, " entries"]
    target: Int[Tensor, " teacher_tokens"]
    kinds: Shaped[Tensor, " teacher_tokens"]
    vocab_size: tuple[int, int]

    def __post_init__(self) -> None:
        students, teachers = self.vocab_size
        for side, ids, size in (
            ("student", self.student, students),
            ("teacher", self.teacher, teachers),
        ):
            if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < size):
                raise ValueError(
                    f"the map has tokens of the {side} from {int(ids.min())} to {int(ids.max())}, "
                    f"but the {side}'s vocabulary has {size} tokens"
                )
        if (self.teacher.diff() < 0).any():
            raise ValueError("the entries of a map must be sorted by the teacher's token")
        if not ((self.weight >= 0) & self.weight.isfinite()).all():
            raise ValueError("the weights of a map must be finite and at least 0")
        sums = self.row_sums()
        if ((sums - 1).abs() > 1e-4).logical_and(sums != 0).any():
            raise ValueError("the weights of each token of the teacher must add up to 1")

    @classmethod
    def of_pairs(
        cls, student: Tensor | list[int], teacher: Tensor | list[int], vocab_size: tuple[int, int]
    ) -> TokenMap:
        """A map between the same tokens of two vocabularies, which leaves out all others.

        Raises:
            ValueError: if there are different numbers of tokens, or ids out of range.
        """
        student, teacher = (torch.as_tensor(ids, dtype=torch.long) for ids in (student, teacher))
        if len(student) != len(teacher):
            raise ValueError(f"got {len(student)} tokens of the student and {len(teacher)} others")
        target = torch.full((vocab_size[1],), -1)
        target[teacher] = student
        kinds = torch.where(target < 0, NOTHING, EXACT).to(torch.uint8)
        return cls.of_weights(student, teacher, torch.ones(len(student)), target, kinds, vocab_size)

    @classmethod
    def of_weights(
        cls,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor,
        target: Tensor,
        kinds: Tensor,
        vocab_size: tuple[int, int],
    ) -> TokenMap:
        """A map from entries in any order, with any sum for each token of the teacher.

        Entries of the same pair are added up.
        """
        students, teachers = vocab_size
        key, place = (teacher * students + student).unique(return_inverse=True)
        summed = torch.zeros(len(key), dtype=torch.float64).index_add_(0, place, weight.double())
        key, summed = key[summed > 0], summed[summed > 0]
        teacher, student = key // students, key % students
        total = torch.zeros(teachers, dtype=torch.float64).index_add_(0, teacher, summed)
        weight = (summed / total[teacher]).float()
        return cls(teacher, student, weight, target, kinds, vocab_size)

    @property
    def exact(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Ids of the same tokens in both vocabularies, ``(student, teacher)``."""
        teacher = (self.kinds >= EXACT).nonzero().squeeze(-1)
        order = self.target[teacher].argsort()
        return self.target[teacher][order], teacher[order]

    def row_sums(self) -> Tensor:
        """Sum of the weights of each token of the teacher: 1, or 0 if it is not mapped."""
        return self.weight.new_zeros(self.vocab_size[1]).index_add_(0, self.teacher, self.weight)

    def push(self, masses: Float[Tensor, "*batch teacher"]) -> Float[Tensor, "*batch student"]:
        """The masses of the student's tokens, Mᵀp; those of tokens that are not mapped are lost.

        Args:
            masses: ``(*batch, teacher_tokens)``.
        """
        if masses.shape[-1] != self.vocab_size[1]:
            raise ValueError(
                f"the map is for {self.vocab_size[1]} tokens of the teacher, got "
                f"{masses.shape[-1]}: if logits are padded, pass vocab_size={self.vocab_size}"
            )
        rows = masses.reshape(-1, masses.shape[-1])
        moved = rows[:, self.teacher.to(rows.device)] * self.weight.to(rows)
        found = rows.new_zeros(len(rows), self.vocab_size[0])
        found.index_add_(1, self.student.to(rows.device), moved)
        return found.reshape(*masses.shape[:-1], self.vocab_size[0])

    def to(self, device: torch.device | str) -> TokenMap:
        """The same map on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return TokenMap(**moved, vocab_size=self.vocab_size)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum, atomically.

        Raises:
            ImportError: if safetensors is not installed.
        """
        sizes = {"student_tokens": self.vocab_size[0], "teacher_tokens": self.vocab_size[1]}
        save_tensors(
            path,
            {name: getattr(self, name) for name in _TENSORS},
            {name: str(size) for name, size in sizes.items()},
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> TokenMap:
        """Read a file that :meth:`save` wrote.

        Raises:
            ImportError: if safetensors is not installed.
            ValueError: if it is another file, or was changed after it was written.
        """
        tensors, metadata = load_tensors(path, *_TENSORS)
        try:
            sizes = int(metadata["student_tokens"]), int(metadata["teacher_tokens"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no map of tokens: {error!r}") from error
        return cls(**{name: tensors[name] for name in _TENSORS}, vocab_size=sizes)

    @classmethod
    def from_projection(
        cls, projection: Mapping[str, Tensor] | str | os.PathLike, teacher_tokens: int
    ) -> TokenMap:
        """Read a projection of X-Token, which maps each token of the student to several.

        It holds ``indices`` ``(student_tokens, k)``, the teacher's tokens, −1 where there are fewer
        than k, and ``likelihoods`` of the same shape. The weight of student's token s for the
        teacher's token t is the likelihood of t for s over the sum of these for t: Bayes' rule with
        the same prior for all tokens of the student.

        Args:
            projection: the two tensors, or a file of them, of ``torch.save`` or safetensors.
            teacher_tokens: number of tokens of the teacher.

        Raises:
            ValueError: if tensors are missing, differ in shape, or hold other tokens or negative
                likelihoods.
        """
        tensors = projection if isinstance(projection, Mapping) else _tensors_of(Path(projection))
        indices, likelihoods = (_projected(tensors, name) for name in ("indices", "likelihoods"))
        if indices.ndim != 2 or indices.shape != likelihoods.shape:
            raise ValueError(
                "indices and likelihoods must both be (student_tokens, k), got "
                f"{tuple(indices.shape)} and {tuple(likelihoods.shape)}"
            )
        used = (indices >= 0) & (likelihoods != 0)
        teacher, weight = indices[used].long(), likelihoods[used].double()
        if len(teacher) and int(teacher.max()) >= teacher_tokens:
            raise ValueError(
                f"the projection has token {int(teacher.max())} of the teacher, but "
                f"teacher_tokens={teacher_tokens}"
            )
        if not ((weight >= 0) & weight.isfinite()).all():
            raise ValueError("likelihoods must be finite and at least 0")
        student = used.nonzero()[:, 0]
        target = torch.full((teacher_tokens,), -1)
        order = weight.argsort(stable=True)  # so that the most likely one is written last
        for s, t in zip(student[order].tolist(), teacher[order].tolist(), strict=True):
            target[t] = s
        kinds = torch.where(target < 0, NOTHING, FIRST).to(torch.uint8)
        sizes = len(indices), teacher_tokens
        return cls.of_weights(student, teacher, weight, target, kinds, sizes)


def _tensors_of(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    return torch.load(path, map_location="cpu", weights_only=True)


def _projected(projection: Mapping[str, Tensor], name: str) -> Tensor:
    if not isinstance(projection.get(name), Tensor):
        raise ValueError(f"a projection holds 'indices' and 'likelihoods', got {list(projection)}")
    return projection[name].cpu()
