"""The base of the losses that know which tokens of two vocabularies correspond."""

from __future__ import annotations

from typing_extensions import Unpack

from otkd.alignment import TokenMap
from otkd.losses.base import Batch, DistillationLoss
from otkd.losses.settings import CommonSettings


class MappedLoss(DistillationLoss):
    """Base of the losses between two vocabularies that are given a ``TokenMap``.

    They are not in the registry, whose losses the command line offers for one tokenizer.

    Args:
        token_map: from :func:`otkd.alignment.token_map`.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(self, token_map: TokenMap, **common: Unpack[CommonSettings]) -> None:
        super().__init__(**common)
        if not isinstance(token_map, TokenMap):
            raise TypeError(
                f"{type(self).__name__} needs a TokenMap, from otkd.alignment.token_map("
                f"student_tokenizer, teacher_tokenizer), got {type(token_map).__name__}"
            )
        self.token_map = token_map

    @property
    def bridges_vocabularies(self) -> bool:
        """True: the map is between two vocabularies."""
        return True

    def map_for(self, batch: Batch) -> TokenMap:
        """The map on the device of the batch.

        Raises:
            ValueError: if the logits do not have the sizes of the map.
        """
        sizes = batch.student_logits.shape[-1], batch.teacher_logits.shape[-1]
        if sizes != self.token_map.vocab_size:
            raise ValueError(
                f"the student has {sizes[0]} tokens and the teacher {sizes[1]}, but the map is for "
                f"{self.token_map.vocab_size[0]} and {self.token_map.vocab_size[1]}: if logits are "
                "padded, pass vocab_size=token_map.vocab_size"
            )
        device = batch.student_logits.device
        if self.token_map.student.device != device:
            self.token_map = self.token_map.to(device)
        return self.token_map
