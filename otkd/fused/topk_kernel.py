"""Debiased transport between the heads of N positions, in one Triton kernel.

One program solves one position. It gathers the embeddings of the K tokens, computes their costs as
a tile in registers, iterates on the potentials of OT(a, b), OT(a, a) and OT(b, b), and writes value
and gradient, so that no cost is written to memory. The tail is stored separately from the tile, as
a vector of costs and one number, so that K may fill the tile. The tile is symmetric, because both
sides have the same tokens.

The problem and the stopping criterion are those of :mod:`otkd.ot.solver`. The acceleration is that
of :mod:`otkd.ot.acceleration` with depth 1, a secant along the last step, with its safeguard.
Potentials and costs are in units of ε, and soft minima are log-sum-exps.
"""

# Triton's language only looks like Python's.
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairwise_cost(
    embedding, stride, centre, tokens, valid, width, unit,
    METRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The costs among the tokens over ``unit``, ``(BLOCK, BLOCK)``; 0 where one is not valid."""
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    rows = embedding + tokens[:, None] * stride
    for start in range(0, width, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        inside = columns < width
        x = tl.load(rows + columns[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        x = x.to(tl.float32)
        if centre is not None:  # distances do not see it, but their rounding does
            x -= tl.load(centre + columns, mask=inside, other=0.0)[None, :]
        gram = tl.dot(x, tl.trans(x), gram, input_precision="ieee")
    # The norms are taken from the diagonal: rows that are equal are then at distance 0 exactly.
    places = tl.arange(0, BLOCK)
    squares = tl.sum(tl.where(places[:, None] == places[None, :], gram, 0.0), 1)
    if METRIC == "cosine":
        inverse = 1 / tl.sqrt(tl.maximum(squares, 1e-24))
        cost = 1 - gram * inverse[:, None] * inverse[None, :]
    else:
        cost = squares[:, None] + squares[None, :] - 2 * gram
    cost = tl.maximum(cost, 0.0)
    if METRIC == "euclidean":
        cost = tl.sqrt(cost)
    counts = valid[:, None] & valid[None, :] & (tokens[:, None] != tokens[None, :])
    return tl.where(counts, cost / unit, 0.0)


@triton.jit
def _log(masses):
    return tl.where(masses > 0, tl.log(tl.where(masses > 0, masses, 1.0)), float("-inf"))


@triton.jit
def _mean(a, a_tail, x, x_tail):
    return tl.sum(a * x, 0) + a_tail * x_tail


@triton.jit
def _softmin(weight, weight_tail, cost, cost_tail, corner):
    """−log Σ_j exp(weight_j − cost_ij), with weight_j = log b_j + g_j, at tokens and tail."""
    exponent = weight[None, :] - cost
    to_tail = weight_tail - cost_tail
    top = tl.maximum(tl.max(exponent, 1), to_tail)
    total = tl.sum(tl.exp(exponent - top[:, None]), 1) + tl.exp(to_tail - top)
    from_tail = weight - cost_tail
    within_tail = weight_tail - corner
    top_tail = tl.maximum(tl.max(from_tail, 0), within_tail)
    total_tail = tl.sum(tl.exp(from_tail - top_tail), 0) + tl.exp(within_tail - top_tail)
    return -top - tl.log(total), -top_tail - tl.log(total_tail)


@triton.jit
def _row_excess(f, softmin):
    return tl.exp(tl.minimum(f - softmin, 80.0)) - 1  # without mass it is unbounded


@triton.jit
def _solve(
    a, a_tail, b, b_tail, cost, cost_tail, corner, start, start_tail, tolerance, max_iterations,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """From g = ``start``: f at tokens and tail, with ⟨a, f⟩ = ⟨b, g⟩; value, error, iterations."""
    log_a, log_a_tail = _log(a), _log(a_tail)
    log_b, log_b_tail = _log(b), _log(b_tail)
    f, f_tail = _softmin(log_b + start, log_b_tail + start_tail, cost, cost_tail, corner)
    if SYMMETRIC:
        f, f_tail = f / 2, f_tail / 2
    g, g_tail, s, s_tail = f, f_tail, f, f_tail
    next_f, next_tail = f, f_tail
    best, best_tail, last, last_tail = f, f_tail, f, f_tail
    last_residual, last_residual_tail = f, f_tail
    error = tl.sum(a, 0) * 0 + float("inf")
    best_error = error
    iterations = 0
    wait, pause = 3, 2  # a secant needs the two steps before it
    while (error > tolerance) & (iterations < max_iterations):
        iterations += 1
        is_last = (iterations == max_iterations) & (iterations > 1)
        f = tl.where(is_last, best, next_f)
        f_tail = tl.where(is_last, best_tail, next_tail)
        if SYMMETRIC:
            g, g_tail = f, f_tail
        else:
            g, g_tail = _softmin(log_a + f, log_a_tail + f_tail, cost, cost_tail, corner)
        s, s_tail = _softmin(log_b + g, log_b_tail + g_tail, cost, cost_tail, corner)
        if SYMMETRIC:
            image, image_tail = (f + s) / 2, (f_tail + s_tail) / 2
        else:  # f + constant is as good; extrapolated it might run away
            level = _mean(a, a_tail, s, s_tail)
            image, image_tail = s - level, s_tail - level
        # The columns are exact, or (symmetric problems) off by the same as the rows.
        excess, excess_tail = _row_excess(f, s), _row_excess(f_tail, s_tail)
        error = _mean(a, a_tail, tl.abs(excess), tl.abs(excess_tail))

        # The plain iteration never makes the error larger: if it grew, the secant led astray.
        failed = error > 2 * best_error
        better = error <= 1.001 * best_error
        best = tl.where(better, image, best)
        best_tail = tl.where(better, image_tail, best_tail)
        best_error = tl.minimum(best_error, error)
        wait = tl.where(failed, pause, tl.maximum(wait - 1, 0))
        pause = tl.where(failed, tl.minimum(2 * pause, 32), pause)
        residual, residual_tail = image - f, image_tail - f_tail
        change, change_tail = residual - last_residual, residual_tail - last_residual_tail
        along = _mean(a, a_tail, residual * change, residual_tail * change_tail)
        length = _mean(a, a_tail, change * change, change_tail * change_tail)
        step = tl.where(wait > 0, 0.0, along / (length + 1e-30))
        next_f = tl.where(failed, best, image - step * (image - last))
        next_tail = tl.where(failed, best_tail, image_tail - step * (image_tail - last_tail))
        last, last_tail = image, image_tail
        last_residual, last_residual_tail = residual, residual_tail

    value = _mean(a, a_tail, f, f_tail) + _mean(b, b_tail, g, g_tail)
    if SYMMETRIC:
        value -= _mean(a, a_tail, _row_excess(f, s), _row_excess(f_tail, s_tail))
    # The next point is closer still; where there is no mass, f is the soft minimum by definition.
    if SYMMETRIC:
        f = tl.where(a > 0, (f + s) / 2, s)
        f_tail = tl.where(a_tail > 0, (f_tail + s_tail) / 2, s_tail)
    else:
        shift = (_mean(b, b_tail, g, g_tail) - _mean(a, a_tail, s, s_tail)) / 2
        f, f_tail = s + shift, s_tail + shift
    return f, f_tail, value, error, iterations


@triton.jit
def topk_sinkhorn_kernel(
    a_masses, b_masses, head, embedding, stride, centre, tail_cost, corner_cost,
    values, grad, errors, iterations,
    size, width, scale, epsilon, tolerance, max_iterations,
    METRIC: tl.constexpr, DEBIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """S_ε of one position; see :func:`otkd.fused.topk_sinkhorn.topk_sinkhorn`."""
    position = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    valid = places < size
    tokens = tl.load(head + position * size + places, mask=valid, other=0)
    a = tl.load(a_masses + position * (size + 1) + places, mask=valid, other=0.0)
    b = tl.load(b_masses + position * (size + 1) + places, mask=valid, other=0.0)
    a_tail = tl.load(a_masses + position * (size + 1) + size)
    b_tail = tl.load(b_masses + position * (size + 1) + size)
    cost = _pairwise_cost(
        embedding, stride, centre, tokens, valid, width, scale * epsilon,
        METRIC, BLOCK, BLOCK_WIDTH,
    )  # fmt: skip
    to_tail = tl.load(tail_cost + tokens, mask=valid, other=0.0) / epsilon
    corner = tl.load(corner_cost) / epsilon

    start = tl.zeros((BLOCK,), tl.float32)
    start_tail = tl.sum(start, 0)
    if DEBIAS:
        a_f, a_f_tail, a_value, a_error, a_count = _solve(
            a, a_tail, a, a_tail, cost, to_tail, corner, start, start_tail,
            tolerance, max_iterations, True,
        )  # fmt: skip
        # From the potential of (b, b) the way to (a, b) is no longer, and there is none if a = b:
        # from 0 the iteration may crawl there, and its tolerance leaves a gradient that is not 0.
        start, start_tail, b_value, b_error, b_count = _solve(
            b, b_tail, b, b_tail, cost, to_tail, corner, start, start_tail,
            tolerance, max_iterations, True,
        )  # fmt: skip
    f, f_tail, value, error, count = _solve(
        a, a_tail, b, b_tail, cost, to_tail, corner, start, start_tail,
        tolerance, max_iterations, False,
    )  # fmt: skip
    if DEBIAS:
        f, f_tail = f - a_f, f_tail - a_f_tail
        value -= (a_value + b_value) / 2
        error = tl.maximum(error, tl.maximum(a_error, b_error))
        count = tl.maximum(count, tl.maximum(a_count, b_count))
    tl.store(values + position, value * epsilon)
    tl.store(grad + position * (size + 1) + places, f * epsilon, mask=valid)
    tl.store(grad + position * (size + 1) + size, f_tail * epsilon)
    tl.store(errors + position, error)
    tl.store(iterations + position, count)
