"""Confidence intervals of metrics, from random halves of the samples, drawn without replacement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gan_stability._checks import check_integer, check_share

DISTANCES = ("fid", "kid")  # squares of a difference: where there is none, they vary like one over the samples
SHARES = ("precision", "recall", "coverage")  # in [0, 1]
RATIOS = ("density", "diversity")
WITH_INTERVALS = (*DISTANCES, *SHARES, *RATIOS)
FEWEST = 12  # samples of a side: 5 neighbours in each half

Values = Mapping[str, float]


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


def halved(
    measure: Callable[[Tensor, Tensor], Values],
    real: Tensor,
    fake: Tensor,
    splits: int = 200,
    seed: int = 0,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Tensor]:
    """The metrics of both halves of the samples, for many random splits.

    A bootstrap draws samples with replacement. Repeated samples are each other's nearest neighbours, unlike samples of
    a distribution, and increase distances of distributions. Halves are therefore drawn without replacement.

    Args:
        measure: maps features of real and of generated samples to metrics.
        real: (n, d).
        fake: (m, d).
        splits: number of splits; both sides are split separately.
        seed: seed of the splits. With equal seeds, metrics of several generators can be compared pair by pair.
        watch: wraps the loop over splits, for instance in a progress bar.

    Returns:
        A tensor (splits, 2) for each metric.

    Raises:
        ValueError: if a side has fewer than 12 samples.

    Example:
        >>> from lightning_gan_stability.metrics import frechet_distance
        >>> real, fake = torch.randn(40, 2), torch.randn(40, 2)
        >>> halved(lambda x, y: {"fid": frechet_distance(x, y)}, real, fake, splits=3)["fid"].shape
        torch.Size([3, 2])
    """
    check_integer("splits", splits, least=2)
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < FEWEST:
            raise ValueError(f"`{name}` must have at least {FEWEST} samples to be halved, got {len(features)}.")
    random, found = torch.Generator().manual_seed(seed), []
    for _ in watch(range(splits)):
        halves = [_halves(len(features), random, features.device) for features in (real, fake)]
        found.append([measure(real[i], fake[j]) for i, j in zip(*halves, strict=True)])
    names = found[0][0]
    return {
        name: torch.tensor([[half[name] for half in pair] for pair in found], dtype=torch.float64) for name in names
    }


def _halves(n: int, random: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=random).to(device)
    return order[: n // 2], order[n // 2 : n // 2 * 2]


def variance(halves: Tensor) -> float:
    """The variance of a metric of all samples, from the differences of its values for halves (splits, 2).

    The two halves are independent sets of half as many samples. If the standard deviation of a metric is proportional
    to one over the root of the number of samples, its variance is ¼ E (a − b)².

    Example:
        >>> variance(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        0.5
    """
    return (halves[:, 0] - halves[:, 1]).square().mean().item() / 4


def interval(
    name: str, value: float, halves: Tensor, n: int, level: float = 0.95, bias: float | None = None
) -> Interval:
    """A confidence interval for the mean of a metric over other sets of as many samples.

    It is an interval for the average result of the same protocol, including its bias for this number of samples, and
    not for the value with infinitely many samples.

    * Density and diversity: value ± t s, s² by :func:`variance`, with t of as many degrees of freedom as splits.
    * Precision, recall and coverage are shares: Wilson's interval of a share of as many samples as have this variance.
    * FID and KID are squares of a difference Δ of distributions, with noise: where Δ = 0 the mean is T₀ (for KID 0, for
      FID its bias) and the variance V₀ = var ½ (a + b) over the splits; otherwise it grows with Δ², V(T) = V₀ +
      s² (T − T₀) / |observed Δ|². The interval has all T with (value − T)² ≤ t² V(T).

    Args:
        name: name of the metric, one of those in ``WITH_INTERVALS``.
        value: the metric of all samples.
        halves: (splits, 2), the metrics of their halves.
        n: number of samples of the smaller side.
        level: confidence level.
        bias: bias of the square whose unbiased estimate a KID is,
            :func:`~lightning_gan_stability.metrics.features.mmd_bias`. None: that of FID, the mean of the halves minus
            the value.

    Raises:
        ValueError: if ``level`` is not in (0, 1).

    Example:
        >>> low, high = interval("density", 1.0, torch.tensor([[0.9, 1.1], [1.2, 0.8]] * 100), 100)
        >>> round(low, 2), round(high, 2)
        (0.69, 1.31)
    """
    t = quantile(level, len(halves))
    s2 = variance(halves)
    if name in SHARES or (value == 0 and s2 == 0):
        return _of_share(value, s2, n, t)
    if name == "kid" and bias is not None:
        return _of_square(value, value + bias, 0.0, halves, t)
    if name in DISTANCES:
        low, high = _of_square(value, value, max(halves.mean().item() - value, 0.0), halves, t)
        return Interval(max(low, 0.0), high)
    return Interval(value - t * math.sqrt(s2), value + t * math.sqrt(s2))


def interval_of_difference(name: str, value: float, halves: Tensor, level: float = 0.95) -> Interval:
    """A confidence interval for the mean difference of a metric of two generators.

    For FID and KID, the part that is quadratic in the noise is in :func:`variance` twice. It is var ½ (a + b) over the
    splits, which is subtracted once, and is a lower bound of the variance.

    Args:
        name: name of the metric.
        value: the difference for all samples.
        halves: (splits, 2), the differences for the halves of the same splits.
        level: confidence level.

    Example:
        >>> low, high = interval_of_difference("density", 0.5, torch.tensor([[0.4, 0.6], [0.6, 0.4]] * 100))
        >>> low > 0
        True
    """
    s2 = variance(halves)
    if name in DISTANCES:
        quadratic = halves.mean(1).var().item()
        s2 = max(s2 - quadratic, quadratic)
    reach = quantile(level, len(halves)) * math.sqrt(s2)
    return Interval(value - reach, value + reach)


def quantile(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t.

    Example:
        >>> round(quantile(0.95, 1000), 2)
        1.96
    """
    from scipy.stats import t  # slow to import

    check_share("level", level, open_start=True, open_end=True)
    return float(t.ppf((1 + level) / 2, freedom))


def _of_share(value: float, s2: float, n: int, t: float) -> Interval:
    inside = 0 < value < 1 and s2 > 0
    n_effective = value * (1 - value) / s2 if inside else float(n)
    scale = 1 + t * t / n_effective
    middle = (value + t * t / (2 * n_effective)) / scale
    reach = t / scale * math.sqrt(value * (1 - value) / n_effective + (t / (2 * n_effective)) ** 2)
    # at the ends the formula is exact, but for rounding
    return Interval(max(0.0, middle - reach) if value > 0 else 0.0, min(1.0, middle + reach) if value < 1 else 1.0)


def _of_square(value: float, square: float, null: float, halves: Tensor, t: float) -> Interval:
    """All means T with (value − T)² ≤ t² V(T).

    Args:
        value: whose mean is asked for.
        square: of the observed difference of the samples.
        null: the mean of values where there is no difference.
        halves: (splits, 2).
        t: quantile.
    """
    least = t * math.sqrt(halves.mean(1).var().item())  # half the width where there is no difference
    slope = t * t * variance(halves) / square if square > 0 else 0.0
    # of T² − (2 value + slope) T + value² − least² + slope null, for T of at least null
    middle = value + slope / 2
    root = math.sqrt(max(middle**2 - value**2 + least**2 - slope * null, 0.0))
    low = middle - root if value - null > least else value - least
    return Interval(low, max(middle + root, value + least))
