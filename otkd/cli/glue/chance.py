"""How many intervals above 0 chance gives, where losses share seeds and a baseline.

Comparisons of one task are not independent: they have one baseline and the same seeds. If no loss
differs from the baseline, a seed's differences may all change their sign together as well as not;
over all such changes the count of intervals above 0 has the distribution that chance gives it
(Good, 2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses", chapter 3). Tasks are
independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SEEDS = 12  # up to which all changes of sign are tried; above, as many drawn at random
_LEVEL = 0.95


def chance_of_counts(tasks: Sequence[Sequence[Sequence[float]]], above: int) -> tuple[float, float]:
    """The mean count of intervals above 0 by chance, and the probability of ``above`` or more.

    Args:
        tasks: a task's losses, each its differences to the baseline by seed; NaN where it has none.
        above: the count that was found.
    """
    counts = np.ones(1)
    for losses in tasks:
        counts = np.convolve(counts, _counts_of_task(np.array(losses, dtype=float)))
    mean = float(counts @ np.arange(len(counts)))
    return mean, float(counts[above:].sum())


def _counts_of_task(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often each count of intervals above 0 occurs."""
    from scipy.special import stdtrit

    losses, seeds = differences.shape
    if seeds <= _SEEDS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=seeds)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(2**_SEEDS, seeds))
        signs[0] = 1  # what was found is one of them
    number = np.isfinite(differences).sum(1)
    changed = signs[:, None, :] * differences
    error = np.nanstd(changed, axis=-1, ddof=1) / np.sqrt(number)
    quantile = stdtrit(number - 1, 0.5 + _LEVEL / 2)
    found = (np.nanmean(changed, axis=-1) > quantile * error).sum(1)
    return np.bincount(found, minlength=losses + 1) / len(signs)
