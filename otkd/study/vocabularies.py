"""The losses of a study between two vocabularies, by the names of those of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

import otkd
from otkd.alignment import TokenMap, prefix_cost
from otkd.costs import Cost, EmbeddingCost, SumCost
from otkd.losses.protocol import as_loss
from otkd.study.objectives import (
    HYBRID,
    NEED_EMBEDDING,
    WASD,
    common_options,
    own_options,
    permuted,
)
from otkd.tasks.causal_lm import rows_of_student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from otkd.losses.base import DistillationLoss

_OF_ONE_VOCABULARY = (WASD, "sinkd", "batch_sinkhorn", "wasserstein")
_COSTS = ("embedding", "permuted", "prefix", "embedding+prefix")


@dataclass(frozen=True)
class Vocabularies:
    """The tokens of a student and of its teacher.

    Attributes:
        student: the student's tokenizer.
        teacher: the teacher's.
        token_map: between them.
        embedding: of the teacher's tokens, ``(teacher_tokens, width)``.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    token_map: TokenMap
    embedding: Tensor

    def loss(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """The loss called ``name``; a loss of one vocabulary reads the teacher's mapped masses.

        Raises:
            ValueError: for a loss or a cost that is not possible between two vocabularies.
        """
        if name in _OF_ONE_VOCABULARY:
            raise ValueError(f"{name} is not possible between two vocabularies: use sinkhorn")
        common, sizes = common_options(options), self.token_map.vocab_size  # logits may be padded
        if name == HYBRID:
            return otkd.HybridLogitLoss(self.token_map, vocab_size=sizes, **common)
        own = own_options(name, options)
        if name in NEED_EMBEDDING:
            if name == "sinkhorn" and "prefix" in options.get("token_cost", ""):
                # Its kernel within a vocabulary may not be positive definite, so that the debiased
                # value may be negative.
                own["debias"] = None
            own["cost"] = self._cost(options)
            return otkd.get_loss(name, vocab_size=sizes, **common, **own)
        loss = otkd.get_loss(name, **common, **own)
        if as_loss(loss).bridges_vocabularies:
            return otkd.get_loss(name, vocab_size=sizes, **common, **own)
        return otkd.PushforwardLoss(
            self.token_map, cast("DistillationLoss", loss), vocab_size=sizes
        )

    def _cost(self, options: Mapping[str, Any]) -> Cost:
        kind = options.get("token_cost", "embedding")
        if kind not in _COSTS:
            raise ValueError(
                f"--token-cost {kind} is not possible between two vocabularies: use one of "
                f"{', '.join(_COSTS)}"
            )
        costs: list[Cost] = []
        if kind != "prefix":
            # The student's rows are made from the teacher's, so both are in one space.
            theirs = self.embedding[: self.token_map.vocab_size[1]]  # it may be padded, too
            ours = rows_of_student(theirs, self.token_map)
            costs.append(EmbeddingCost(permuted(ours) if kind == "permuted" else ours, theirs))
        if "prefix" in kind:
            costs.append(prefix_cost(self.student, self.teacher))
        return costs[0] if len(costs) == 1 else SumCost(costs)
