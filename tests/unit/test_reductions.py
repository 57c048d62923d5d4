import math

import pytest
import torch

from otkd.reductions import (
    IGNORE_INDEX,
    REDUCTIONS,
    ItemCounts,
    count_items,
    counted_positions,
    reduce_positions,
)
from tests.problems import logits

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close


def naive(values, counted, reduction, items):
    """Plain loops over sequences and positions."""
    rows = values.reshape(-1, values.shape[-1]).tolist()
    kept = counted.reshape(-1, values.shape[-1]).tolist()
    used = [
        [v for v, c in zip(row, keep, strict=True) if c]
        for row, keep in zip(rows, kept, strict=True)
    ]
    total, count = sum(map(sum, used)), sum(map(len, used))
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / (items or max(count, 1))
    means = [sum(row) / len(row) for row in used if row]
    return sum(means) / max(len(means), 1)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("reduction", ["sum", "mean", "sequence_mean"])
@pytest.mark.parametrize("items", [None, 6, 2.5, torch.tensor(6), torch.tensor(2.5)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_reductions_are_the_loops(shape, reduction, items, share):
    counted = torch.rand(shape) < share
    values = (logits(1, *shape) * counted).requires_grad_()
    result = reduce_positions(values, counted, reduction=reduction, num_items_in_batch=items)
    assert result.shape == ()
    expected = naive(values, counted, reduction, None if items is None else float(items))
    assert result.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(result, values)
    assert gradient.isfinite().all()
    if share == 1.0:
        everything = reduce_positions(values, reduction=reduction, num_items_in_batch=items)
        close(everything, result)
    none = reduce_positions(values, counted, reduction="none", num_items_in_batch=items)
    assert none is values


def test_sequences_without_a_counted_position_are_left_out_of_the_mean():
    values = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    counted = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    close(reduce_positions(values, counted, reduction="sequence_mean"), torch.tensor(4.0))
    close(reduce_positions(values, counted), torch.tensor(10 / 3))
    ignored = reduce_positions(values, counted, reduction="sequence_mean", num_items_in_batch=99)
    close(ignored, torch.tensor(4.0))


@pytest.mark.parametrize("shape", [(7,), (6, 5), (4, 3, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
def test_microbatches_that_share_their_counts_add_up(shape, reduction):
    counted = torch.rand(shape) < 0.5
    counted[1:3] = False  # a microbatch that counts nothing
    values = logits(1, *shape) * counted
    items = ItemCounts(*count_items(counted))
    starts = [slice(0, 1), slice(1, 3), slice(3, None)]
    parts = [
        reduce_positions(values[i], counted[i], reduction=reduction, num_items_in_batch=items)
        for i in starts
    ]
    close(sum(parts), reduce_positions(values, counted, reduction=reduction))


def test_one_position_without_batch_dimensions():
    for reduction in REDUCTIONS:
        for counted in (None, torch.tensor(True)):
            close(
                reduce_positions(torch.tensor(2.0), counted, reduction=reduction),
                torch.tensor(2.0),
            )
        nothing = reduce_positions(torch.tensor(0.0), torch.tensor(False), reduction=reduction)
        assert nothing == 0


def test_an_empty_batch_is_zero():
    for reduction in ("mean", "sum", "sequence_mean"):
        assert reduce_positions(torch.zeros(0, 3), reduction=reduction) == 0


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_number_of_items_changes_neither_shape_nor_precision(kind, shape):
    items = torch.full(shape, 8, dtype=kind)
    result = reduce_positions(torch.ones(2, 3), num_items_in_batch=items)
    assert result.shape == ()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(6 / 8)


def test_counted_positions():
    labels = torch.tensor([[1, IGNORE_INDEX, 0], [IGNORE_INDEX, 2, 5]])
    labelled = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    mask = torch.tensor([[0, 1, 2], [1, 0.5, 0]])
    assert IGNORE_INDEX == -100
    assert counted_positions((2, 3)) is None
    assert torch.equal(counted_positions((2, 3), labels=labels), labelled)
    for kind in (torch.float16, torch.float64):
        assert torch.equal(counted_positions((2, 3), mask.to(kind)), mask != 0)
        both = counted_positions((2, 3), mask.to(kind), labels)
        assert torch.equal(both, (mask != 0) & labelled)
    for name, options in (("mask", {"mask": mask[0]}), ("labels", {"labels": labels.T})):
        with pytest.raises(ValueError, match=f"{name} must have one entry per position"):
            counted_positions((2, 3), **options)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        counted_positions((2,), [True, False])
    added = torch.tensor([0.0, torch.finfo(torch.float32).min])  # to attention scores
    for wrong in (added, torch.tensor([1, torch.nan])):
        with pytest.raises(ValueError, match="pass mask == 0"):
            counted_positions((2,), wrong)


def test_a_negative_number_of_items_is_refused():
    with pytest.raises(ValueError, match="num_items_in_batch must be a finite number of at least"):
        reduce_positions(torch.ones(3), num_items_in_batch=-1)


def test_refused_reduction():
    with pytest.raises(ValueError, match="reduction must be one of"):
        reduce_positions(torch.ones(2), reduction="batchmean")
    assert math.isnan(reduce_positions(torch.tensor([math.nan])))
