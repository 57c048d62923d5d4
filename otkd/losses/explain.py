"""The transport plan of one position, as a table of moves between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otkd.costs import CostMatrices
from otkd.functional.transport import TokenTransport
from otkd.ot.divergence import solve_divergence
from otkd.ot.kernels.lazy import LazyCost
from otkd.ot.options import Objective, SolverSettings
from otkd.supports import LARGEST_DENSE
from otkd.supports.base import Block

OTHER_TOKENS = "(other tokens)"


class Move(NamedTuple):
    """Mass that moves from a token of the student to a token of the teacher.

    Attributes:
        source: the student's token, or its id if there is no tokenizer.
        target: the teacher's token, likewise.
        mass: P_ij.
        cost: C_ij, per unit of mass.
    """

    source: str | int
    target: str | int
    mass: float
    cost: float


@dataclass(frozen=True)
class Explanation:
    """The plan of one position; prints as a table.

    The entropic regularisation spreads the plan, so even at q = p some mass moves between near
    tokens.

    Attributes:
        moves: the largest first.
        value: the loss at the position, over the atoms shown, before T² and reduction.
        transport_cost: ⟨P, C⟩ of the whole plan.
        moved_mass: mass that moves to another token; between two vocabularies, all mass.
        marginal_error: L1 distance between q and the row sums of the plan.
    """

    moves: tuple[Move, ...]
    value: float
    transport_cost: float
    moved_mass: float
    marginal_error: float

    def to_dicts(self) -> list[dict[str, Any]]:
        """The moves as dictionaries, for a table of another library."""
        return [move._asdict() for move in self.moves]

    def __str__(self) -> str:
        head = (
            f"value {self.value:.4g}, transport cost {self.transport_cost:.4g}, "
            f"moved mass {self.moved_mass:.4g}, marginal error {self.marginal_error:.1e}"
        )
        names = [("from", "to"), *((_shown(m.source), _shown(m.target)) for m in self.moves)]
        numbers = [("mass", "cost"), *((f"{m.mass:.4f}", f"{m.cost:.4f}") for m in self.moves)]
        columns = [
            *(_aligned(column, left=True) for column in zip(*names, strict=True)),
            *(_aligned(column, left=False) for column in zip(*numbers, strict=True)),
        ]
        return "\n".join([head, *map("  ".join, zip(*columns, strict=True))])


def explain_position(
    transport: TokenTransport,
    student_logits: Tensor,
    teacher_logits: Tensor,
    position: int | Sequence[int],
    *,
    objective: Objective,
    tokenizer: Any,
    top: int | None,
) -> Explanation:
    """See :meth:`otkd.SinkhornLoss.explain`."""
    shape = tuple(student_logits.shape[:-1])
    if top is not None and top < 0:
        raise ValueError(f"top must be a number of moves or None for all, got {top!r}")
    two = not transport.cost.one_vocabulary
    source_names, target_names = _tokenizers(tokenizer, two=two)
    mask = _mask_of(position, shape).to(student_logits.device)
    transport = replace(transport, mask=mask, backend="auto")  # others may not store the costs
    with torch.no_grad():
        positions, support = transport.positions(student_logits, teacher_logits, objective)
        (block,) = support.select(positions, transport.cost, objective, "auto").blocks
        if isinstance(block.costs.cross, LazyCost):
            raise ValueError(
                f"{support!r} does not store the whole plan of a position: use otkd.supports.TopK "
                f"or, for up to {LARGEST_DENSE} tokens, Dense"
            )
        value, _ = block.solve(objective, transport.solver)
        plan, costs, error = _plan(block, objective, transport.solver)
    source_tokens, target_tokens = _tokens(block)
    stays = source_tokens.unsqueeze(-1) == target_tokens
    moved = plan.sum() if two else plan.masked_fill(stays, 0).sum()
    masses, places = plan.flatten().topk(plan.numel() if top is None else min(top, plan.numel()))
    rows, columns = places // plan.shape[-1], places % plan.shape[-1]
    several = bool((source_tokens < -1).any())
    moves = zip(
        _names(source_tokens[rows], source_names, several=several),
        _names(target_tokens[columns], target_names, several=several),
        masses.tolist(),
        costs.flatten()[places].tolist(),
        strict=True,
    )
    return Explanation(
        moves=tuple(Move(*move) for move in moves),
        value=value.item(),
        transport_cost=(plan * costs).sum().item(),
        moved_mass=moved.item(),
        marginal_error=error.item(),
    )


def _plan(
    block: Block, objective: Objective, solver: SolverSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The plan of OT_ε(q, p) and its costs, ``(n, m)``, and the marginal error."""
    objective = replace(objective, debias=None, value="dual")
    costs = CostMatrices(block.costs.cross)
    logs = block.log_source, block.log_target
    q, p = (log.exp() for log in logs)
    (transport,) = solve_divergence(q, p, costs, objective, solver, logs=logs).parts
    plan = transport.plan()[0]
    return plan, costs.cross.expand(1, *plan.shape)[0], transport.potentials.marginal_error[0]


def _tokens(block: Block) -> tuple[Tensor, ...]:
    """The tokens of the atoms of both sides; −1, −2, … for atoms that stand for several tokens."""
    sides = []
    for place, masses in enumerate((block.log_source, block.log_target)):
        tokens = torch.arange(masses.shape[-1], device=masses.device)
        if block.tokens is not None:
            known = block.tokens[place][0]
            others = -1 - torch.arange(len(tokens) - len(known), device=masses.device)
            tokens = torch.cat([known, others])
        sides.append(tokens)
    return tuple(sides)


def _mask_of(position: int | Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """True at one position, given by its index in each dimension or in the flattened batch."""
    mask = torch.zeros(shape, dtype=torch.bool)
    several = isinstance(position, Sequence)
    places = tuple(map(int, position)) if several else (int(position),)
    chosen = mask if several else mask.view(-1)
    if len(places) != chosen.ndim:
        raise IndexError(
            f"position {position} does not have the {chosen.ndim} dimensions of {shape}"
        )
    try:
        chosen[places] = True
    except IndexError as error:
        raise IndexError(f"there is no position {position} in a batch of shape {shape}") from error
    return mask


def _tokenizers(tokenizer: Any, *, two: bool) -> tuple[Any, Any]:
    pair = tokenizer if isinstance(tokenizer, tuple) else (tokenizer, tokenizer)
    if two and tokenizer is not None and not isinstance(tokenizer, tuple):
        raise TypeError(
            "the cost is between two vocabularies: tokenizer= must be a pair (student's, teacher's)"
        )
    if len(pair) != 2:
        raise TypeError(f"tokenizer= must be a tokenizer or a pair of tokenizers, got {len(pair)}")
    for one in pair:
        if one is not None and not hasattr(one, "convert_ids_to_tokens"):
            raise TypeError(
                f"a tokenizer needs the method convert_ids_to_tokens, which {type(one).__name__} "
                "does not have"
            )
    return pair[0], pair[1]


def _names(tokens: Tensor, tokenizer: Any, *, several: bool) -> list[str | int]:
    """Names of tokens, and of the atoms that stand for several tokens."""
    ids = tokens.tolist()
    distinct = sorted({index for index in ids if index >= 0})
    names: dict[int, str | int] = {index: index for index in distinct}
    if tokenizer is not None:
        # The padding tokens of a vocabulary have no name.
        named = zip(distinct, tokenizer.convert_ids_to_tokens(distinct), strict=True)
        names |= {index: name for index, name in named if name is not None}
    return [names[index] if index >= 0 else _name_of_others(index, several) for index in ids]


def _name_of_others(index: int, several: bool) -> str:
    return f"{OTHER_TOKENS[:-1]} {-index})" if several else OTHER_TOKENS


def _shown(token: str | int) -> str:
    text = str(token)
    return text if text.isprintable() else repr(text)[1:-1]


def _aligned(column: Sequence[str], *, left: bool) -> list[str]:
    from rich.cells import cell_len

    width = max(map(cell_len, column))
    pads = [" " * (width - cell_len(text)) for text in column]
    return [text + pad if left else pad + text for text, pad in zip(column, pads, strict=True)]
