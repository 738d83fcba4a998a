"""The best result of a hyperparameter search as a function of the number of trials; plain NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_gan_stability._checks import check, check_bool, check_share


class BestOfBudget(NamedTuple):
    """The expected best of k trials, for k = 1 ... n.

    Attributes:
        mean: expected best value of k of the trials.
        low: at most a share of ½ (1 − level) of all choices of k trials have a best value below it.
        high: at most the same share have a best value above it.
    """

    mean: list[float]
    low: list[float]
    high: list[float]


def expected_best(values: Sequence[float], lower_is_better: bool = True, level: float = 0.9) -> BestOfBudget:
    """Best quality against budget: the best of k of n trials, drawn without replacement, by order statistics.

    If the values are sorted, best first, the i-th (from 0) is the best of k with probability
    C(n − 1 − i, k − 1) / C(n, k), so that no resampling is needed. The mean is the unbiased estimate for k new trials
    of a random search. "Are GANs Created Equal?", https://arxiv.org/abs/1711.10337, compares losses in this way, since
    one number at one budget says little. Near k = n all choices contain nearly the same trials, and the band closes
    regardless of what another search would find.

    Args:
        values: values of n finished trials; a failed trial has an infinite one, ∞ or −∞, whichever is worse.
        lower_is_better: whether lower values are better, as for FID.
        level: level of the band between ``low`` and ``high``, in [0, 1).

    Raises:
        ValueError: if an argument has a bad value, or a value is NaN.

    Example:
        >>> found = expected_best([3.0, 1.0, 2.0])
        >>> [round(value, 4) for value in found.mean]
        [2.0, 1.3333, 1.0]
    """
    check_bool("lower_is_better", lower_is_better)
    check_share("level", level, open_end=True)
    sign = 1.0 if lower_is_better else -1.0
    ordered = np.sort(sign * np.asarray(values, dtype=np.float64))
    n = len(ordered)
    check(n > 0 and not bool(np.isnan(ordered).any()), "values", "at least one number, none of them NaN", values)
    mean, low, high = [], [], []
    none = np.ones(n + 1)  # the probability that the first i are not among the k
    left = n - np.arange(n + 1.0)
    for k in range(n):
        none = none * np.maximum(left - k, 0) / (n - k)
        chances = -np.diff(none)
        likely = chances > 0
        mean.append(sign * float((chances[likely] * ordered[likely]).sum()))
        ends = [(1 - level) / 2, (1 + level) / 2]
        # with a margin for rounding, so that a sum of equal chances ends where it should
        places = np.searchsorted(np.cumsum(chances), np.array(ends) - 1e-12).clip(max=n - 1)
        first, last = (sign * float(ordered[place]) for place in places)
        low.append(min(first, last))
        high.append(max(first, last))
    return BestOfBudget(mean, low, high)
