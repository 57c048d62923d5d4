"""Independent references in float64: written from the formulas, plain loops, plain autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_distribution(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(logits.double() / temperature, -1)


def kl(log_q, log_p):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_q, log_p):
    return kl(log_p, log_q)


def jsd(log_q, log_p, beta=0.5):
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)


def tvd(log_q, log_p):
    return (log_q.exp() - log_p.exp()).abs().sum(-1) / 2


def hellinger(log_q, log_p):
    return 2 - 2 * ((log_q + log_p) / 2).exp().sum(-1)


def skew_kl(log_q, log_p, alpha=0.1):
    return kl((alpha * log_p.exp() + (1 - alpha) * log_q.exp()).log(), log_p)


def skew_reverse_kl(log_q, log_p, alpha=0.1):
    return kl((alpha * log_q.exp() + (1 - alpha) * log_p.exp()).log(), log_q)


def adaptive_kl(log_q, log_p, head_mass=0.5):
    flat_q, flat_p = log_q.reshape(-1, log_q.shape[-1]), log_p.reshape(-1, log_p.shape[-1])
    values = []
    for one_q, one_p in zip(flat_q, flat_p, strict=True):
        p, gap = one_p.exp().tolist(), (one_q.exp() - one_p.exp()).abs().tolist()
        head, mass = [], 0.0
        for token in sorted(range(len(p)), key=lambda i: -p[i]):
            if head and mass > head_mass:
                break
            head.append(token)
            mass += p[token]
        head_gap, total = sum(gap[i] for i in head), sum(gap)
        weight = head_gap / total if total > 0 else 0.5
        values.append(weight * kl(one_q, one_p) + (1 - weight) * kl(one_p, one_q))
    return torch.stack(values).reshape(log_q.shape[:-1])


def alpha_beta(log_q, log_p, alpha=0.5, beta=0.5):
    p, q = log_p.exp(), log_q.exp()
    if alpha == beta == 0:
        return ((log_p - log_q) ** 2).sum(-1) / 2
    if beta == 0:
        terms = p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha
        return terms.sum(-1) / alpha**2
    if alpha == 0:
        terms = q**beta * (q**beta / p**beta).log() - q**beta + p**beta
        return terms.sum(-1) / beta**2
    if alpha + beta == 0:
        terms = (q**alpha / p**alpha).log() + p**alpha / q**alpha - 1
        return terms.sum(-1) / alpha**2
    total = alpha + beta
    terms = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -terms.sum(-1) / (alpha * beta)


def uld(log_q, log_p):
    size = max(log_q.shape[-1], log_p.shape[-1])
    p, q = log_p.exp().sort(-1).values, log_q.exp().sort(-1).values
    p = torch.cat([p.new_zeros(*p.shape[:-1], size - p.shape[-1]), p], -1)
    q = torch.cat([q.new_zeros(*q.shape[:-1], size - q.shape[-1]), q], -1)
    return (p - q).abs().sum(-1)


def soft_minimum(potential: Tensor, mass: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """−ε·log Σ_j mass_j·exp((potential_j − C_ij)/ε) over the last dimension of the cost."""
    exponent = mass.log().unsqueeze(-2) + (potential.unsqueeze(-2) - cost) / epsilon
    return -epsilon * torch.logsumexp(exponent, -1)


def plan(f, g, a, b, cost, epsilon):
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon
    log_plan = exponent + a.log().unsqueeze(-1) + b.log().unsqueeze(-2)
    return log_plan.exp()


def objective(coupling: Tensor, a: Tensor, b: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """⟨P, C⟩ + ε·KL(P‖a⊗b) of any coupling."""
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    ratio = torch.where(coupling > 0, coupling / product, 1.0)
    return (coupling * cost).sum((-2, -1)) + epsilon * (coupling * ratio.log()).sum((-2, -1))


def alternate(step, g, iterations):
    """Both potentials after at most so many of the updates ``step(g) -> (f, g)``.

    The derivatives of the iterations converge as the iterations do, some steps later: after the
    potentials have stopped to change, as many updates again are made.
    """
    done, last = 0, iterations
    while done < last:
        before = g
        f, g = step(g)
        done += 1
        change = (g - before).detach().nan_to_num(posinf=0, neginf=0).abs().max()
        if last == iterations and change <= 1e-16:
            last = min(iterations, 2 * done + 20)
    return f, g


def sinkhorn(a, b, cost, epsilon, iterations=300):
    """Unrolled: value of the dual and the plan, with the autograd graph of every iteration."""

    def step(g):
        f = soft_minimum(g, b, cost, epsilon)
        return f, soft_minimum(f, a, cost.mT, epsilon)

    f, g = alternate(step, torch.zeros_like(b), iterations)
    coupling = plan(f, g, a, b, cost, epsilon)
    value = (a * f).sum(-1) + (b * g).sum(-1) - epsilon * (coupling.sum((-2, -1)) - 1)
    return value, coupling


def divergence(a, b, costs, epsilon, *, sharp=False, debias=True, iterations=300):
    """Unrolled OT(a, b) − ½OT(a, a) − ½OT(b, b) with costs (C_ab, C_aa, C_bb)."""
    total = 0.0
    pairs = ((a, b, 1.0), (a, a, -0.5), (b, b, -0.5))
    for (left, right, weight), cost in zip(pairs[: 3 if debias else 1], costs, strict=False):
        value, coupling = sinkhorn(left, right, cost, epsilon, iterations)
        total = total + weight * ((coupling * cost).sum((-2, -1)) if sharp else value)
    return total


def monotone_transport(a: list[float], b: list[float], p: float) -> float:
    """Northwest-corner rule between masses on 0 … n−1: optimal for |i − j|^p, p ≥ 1."""
    a, b, i, j, total = list(a), list(b), 0, 0, 0.0
    while i < len(a) and j < len(b):
        moved = min(a[i], b[j])
        total += moved * abs(i - j) ** p
        a[i] -= moved
        b[j] -= moved
        if a[i] <= b[j]:
            i += 1
        else:
            j += 1
    return total


def embedding_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    rows = []
    for u in x.double():
        for v in y.double():
            if metric == "cosine":
                rows.append(1 - (u * v).sum() / math.sqrt((u * u).sum() * (v * v).sum()))
            else:
                square = ((u - v) ** 2).sum()
                rows.append(square if metric == "sqeuclidean" else square.sqrt())
    return torch.stack(rows).reshape(len(x), len(y))


def pair(rho):
    return rho if isinstance(rho, tuple) else (rho, rho)


def unbalanced_sinkhorn(a, b, cost, epsilon, rho, iterations=300):
    """Unrolled: the dual value with marginals penalised by ρ·KL (one for each side), and the plan.

    A ρ of infinity holds a side.
    """
    damping = [1 / (1 + epsilon / penalty) for penalty in pair(rho)]

    def step(g):
        f = damping[0] * soft_minimum(g, b, cost, epsilon)
        return f, damping[1] * soft_minimum(f, a, cost.mT, epsilon)

    f, g = alternate(step, torch.zeros_like(b), iterations)
    coupling = plan(f, g, a, b, cost, epsilon)
    value = -epsilon * (coupling.sum((-2, -1)) - a.sum(-1) * b.sum(-1))
    for masses, potential, penalty in ((a, f, pair(rho)[0]), (b, g, pair(rho)[1])):
        held = math.isinf(penalty)
        worth = potential if held else penalty * (1 - (-potential / penalty).exp())
        value = value + (masses * worth).sum(-1)
    return value, coupling


def unbalanced_objective(coupling, a, b, cost, epsilon, rho):
    """⟨P, C⟩ + ε·KL(P‖a⊗b) + ρ·KL(P1‖a) + ρ·KL(Pᵀ1‖b), each KL(x‖y) = Σ x·log(x/y) − x + y."""

    def generalised_kl(x, y, dims):
        logs = torch.where(x > 0, (x / y).log(), 0.0)
        return (x * logs - x + y).sum(dims)

    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    value = (coupling * cost).sum((-2, -1))
    value = value + epsilon * generalised_kl(coupling, product, (-2, -1))
    sides = ((coupling.sum(-1), a), (coupling.sum(-2), b))
    for (sums, masses), penalty in zip(sides, pair(rho), strict=True):
        if not math.isinf(penalty):
            value = value + penalty * generalised_kl(sums, masses, -1)
    return value


def unbalanced_divergence(a, b, costs, epsilon, rho, *, debias=True, iterations=300):
    total = unbalanced_sinkhorn(a, b, costs[0], epsilon, rho, iterations)[0]
    if not debias:
        return total
    for masses, cost in ((a, costs[1]), (b, costs[2])):
        total = total - unbalanced_sinkhorn(masses, masses, cost, epsilon, rho, iterations)[0] / 2
    return total + epsilon / 2 * (a.sum(-1) - b.sum(-1)) ** 2


def heaviest(masses: Tensor, k: int) -> list[int]:
    values = masses.tolist()
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def atoms(masses: Tensor, head: list[int], tail: bool) -> Tensor:
    """The masses of the tokens of the head, and last the sum of all others if there are any."""
    parts = [masses[i] for i in head]
    others = [masses[i] for i in range(len(masses)) if i not in head]
    if tail and others:
        parts.append(torch.stack(others).sum())
    return torch.stack(parts)


def atom_cost(cost, rows: list[int], columns: list[int], epsilon, tail: bool) -> Tensor:
    """C of the heads; means to the tail, E_w[C]; between tails −ε·log E_ww[exp(−C/ε)]."""
    n, m = cost.shape
    row_tail, column_tail = tail and len(rows) < n, tail and len(columns) < m
    soft = -epsilon * (cost / -epsilon).exp().mean().log()
    matrix = []
    for i in rows:
        line = [cost[i, j] for j in columns]
        matrix.append(line + [sum(cost[i, j] for j in range(m)) / m] * column_tail)
    if row_tail:
        line = [sum(cost[i, j] for i in range(n)) / n for j in columns]
        matrix.append(line + [soft] * column_tail)
    return torch.stack([torch.stack(line) for line in matrix])


def topk_divergence(
    q, p, costs, k, epsilon, *, shared=True, tail=True, rho=None, sharp=False, debias=True,
    iterations=200,
):  # fmt: skip
    """Transport between the atoms of every position, ``(N, n)`` and ``(N, m)`` to ``(N,)``."""
    values = []
    for one_q, one_p in zip(q, p, strict=True):
        head_q, head_p = heaviest(one_q, k), heaviest(one_p, k)
        if shared:
            head_q = head_p = sorted({*head_q, *head_p})
        else:  # the student's token that is nearest to each of the teacher's
            head_q = sorted({*head_q, *(int(costs[0][:, j].argmin()) for j in head_p)})
        a, b = atoms(one_q, head_q, tail), atoms(one_p, head_p, tail)
        sides = ((head_q, head_p), (head_q, head_q), (head_p, head_p))
        reduced = [
            atom_cost(cost, *heads, epsilon, tail)
            for cost, heads in zip(costs, sides, strict=False)
        ]
        if rho is not None:
            value = unbalanced_divergence(
                a, b, reduced, epsilon, rho, debias=debias, iterations=iterations
            )
        else:
            if not tail:
                a, b = a / a.sum(), b / b.sum()
            value = divergence(
                a, b, reduced, epsilon, sharp=sharp, debias=debias, iterations=iterations
            )
        values.append(value)
    return torch.stack(values)
