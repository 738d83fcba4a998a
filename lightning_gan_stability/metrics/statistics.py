"""Metrics of features as torchmetrics, whose states are reduced over ranks, and the modes of samples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.metrics.features import checked
from lightning_gan_stability.metrics.values import (
    DensityAndCoverage,
    ModeCoverage,
    PrecisionAndRecall,
    density_coverage,
    frechet_from_moments,
    kernel_distance,
    mode_coverage,
    precision_recall,
)

CELLS = 30  # K-means cells of the real features, where modes are not known
HELD = 0.2  # a mode or cell is missed if it has less than this part of what the real data have there


class FrechetDistance(Metric):
    """:func:`frechet_distance` of features that arrive in batches; stores only their moments, in float64.

    Args:
        num_features: d.

    Raises:
        ValueError: if features have another width, type or rank, or are not finite; the earlier ones are kept then. In
            ``compute``, if a side has fewer than two samples.

    Example:
        >>> statistic = FrechetDistance(1)
        >>> statistic.update(torch.tensor([[0.0], [2.0]]), real=True)
        >>> statistic.update(torch.tensor([[3.0], [5.0]]), real=False)
        >>> statistic.compute()
        tensor(9., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    real: Tensor
    fake: Tensor

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_features = check_integer("num_features", num_features)
        size = num_features + 1
        for side in ("real", "fake"):
            self.add_state(side, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx=_merged)

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (n, d), real or fake; n may be 0."""
        (features,) = checked(least=0, features=features)
        if features.shape[1] != self.num_features:
            raise ValueError(f"`features` must have num_features={self.num_features} columns, got {features.shape[1]}.")
        if len(features):
            side = "real" if real else "fake"
            setattr(self, side, _merged(torch.stack([getattr(self, side), _moments(features)])))

    def compute(self) -> Tensor:
        """The distance, in float64."""
        for name, side in (("real", self.real), ("fake", self.fake)):
            if side[0, 0] < 2:
                raise ValueError(f"`{name}` must have at least two samples, got {int(side[0, 0])}.")
        moments = [(side[0, 1:], side[1:, 1:] / (side[0, 0] - 1)) for side in (self.real, self.fake)]
        return self.real.new_tensor(frechet_from_moments(*moments[0], *moments[1]))


def _moments(features: Tensor) -> Tensor:
    """Number, mean and sum of squared deviations, as one (d + 1, d + 1) matrix."""
    features = features.double()
    moments = features.new_zeros(features.shape[1] + 1, features.shape[1] + 1)
    moments[0, 0], moments[0, 1:] = len(features), features.mean(0)
    deviations = features - moments[0, 1:]
    moments[1:, 1:] = deviations.T @ deviations
    return moments


def _merged(parts: Tensor) -> Tensor:
    """The moments of all samples from those of parts; deviations from means, which large means do not swamp."""
    n = parts[:, 0, 0]
    merged = parts.sum(0)
    if n.sum() == 0:
        return merged
    means = parts[:, 0, 1:]
    merged[0, 1:] = mean = (n[:, None] * means).sum(0) / n.sum()
    apart = (means - mean) * n.sqrt()[:, None]
    merged[1:, 1:] += apart.T @ apart
    return merged


class _Kept(Metric):
    """Stores all features, flattened: a process without any does not know their number of columns."""

    is_differentiable = False
    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]
    widths: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for side in ("real", "fake"):
            self.add_state(side, [], dist_reduce_fx="cat")
        # the largest number of columns, and minus the smallest; both at most 0 before there are any
        self.add_state("widths", torch.tensor([0, -(2**62)]), dist_reduce_fx="max")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (n, d), real or fake; n may be 0."""
        (features,) = checked(least=0, features=features)
        width, known = features.shape[1], int(self.widths[0])
        if known not in (0, width):
            raise ValueError(f"`features` must have {known} columns, as those before, got {width}.")
        if len(features):
            self.widths = self.widths.new_tensor([width, -width])
            # half precision is not what a process without features takes part with in a reduction
            kept = features if features.dtype == torch.float64 else features.float()
            (self.real if real else self.fake).append(kept.flatten())

    def _both(self) -> tuple[Tensor, Tensor]:
        empty = [side for side in ("real", "fake") if not len(getattr(self, side))]
        if empty:
            raise ValueError(f"`{empty[0]}` must have at least two samples, got 0.")
        most, fewest = int(self.widths[0]), -int(self.widths[1])
        if most != fewest:
            raise ValueError(f"Features must have the same width, but processes have between {fewest} and {most}.")
        return dim_zero_cat(self.real).reshape(-1, most), dim_zero_cat(self.fake).reshape(-1, most)


class KernelDistance(_Kept):
    """:func:`~lightning_gan_stability.metrics.kernel_distance` of all features so far.

    Example:
        >>> statistic = KernelDistance()
        >>> statistic.update(torch.zeros(2, 1), real=True)
        >>> statistic.update(torch.ones(2, 1), real=False)
        >>> statistic.compute()
        tensor(7., dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance, in float64."""
        return torch.tensor(kernel_distance(*self._both()), dtype=torch.float64)


class PrecisionRecall(_Kept):
    """:func:`~lightning_gan_stability.metrics.precision_recall` of all features so far.

    Args:
        k: the neighbour whose distance is the radius.

    Example:
        >>> statistic = PrecisionRecall(k=1)
        >>> statistic.update(torch.tensor([[0.0], [1.0], [2.0]]), real=True)
        >>> statistic.update(torch.tensor([[1.5], [3.5], [9.0]]), real=False)
        >>> statistic.compute()["recall"]
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    _function: Callable[..., PrecisionAndRecall | DensityAndCoverage] = staticmethod(precision_recall)
    _names: tuple[str, str] = ("precision", "recall")

    def __init__(self, k: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = check_integer("k", k)

    def compute(self) -> dict[str, Tensor]:
        """Both values by name, in float64."""
        values = self._function(*self._both(), k=self.k)
        return {name: torch.tensor(x, dtype=torch.float64) for name, x in zip(self._names, values, strict=True)}


class DensityCoverage(PrecisionRecall):
    """:func:`~lightning_gan_stability.metrics.density_coverage` of all features so far.

    Args:
        k: the neighbour whose distance is the radius.

    Example:
        >>> statistic = DensityCoverage(k=1)
        >>> statistic.update(torch.tensor([[0.0], [1.0], [3.0]]), real=True)
        >>> statistic.update(torch.tensor([[0.5], [9.0]]), real=False)
        >>> statistic.compute()["density"]
        tensor(1., dtype=torch.float64)
    """

    _function = staticmethod(density_coverage)
    _names = ("density", "coverage")

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        super().__init__(k, **kwargs)


class Seen(NamedTuple):
    """Features (n, d) of samples, and what determines their modes: the samples (n, ...) or probabilities."""

    features: Tensor
    modes: Tensor


class Cells:
    """The modes of samples: known ones, by centres or by a classifier, or K-means cells of real features.

    Args:
        real: features and modes of real samples.
        centers: (K, d), centres of known modes, with ``std``; or None.
        std: standard deviation of a mode.
        classified: whether ``Seen.modes`` are probabilities.
    """

    def __init__(self, real: Seen, centers: Tensor | None, std: float | None, classified: bool) -> None:
        self.known = classified or centers is not None
        self.centers = None if centers is None or classified else centers.to(real.modes)
        self.std = std
        if not self.known:
            self.centers = _means(real.features)
        self.shares = self.split(real)

    def cover(self, modes: Tensor) -> ModeCoverage:
        """The coverage of known modes."""
        if self.centers is None:
            return mode_coverage(modes, classes=modes.shape[1])
        return mode_coverage(modes, self.centers, self.std)

    def assign(self, seen: Seen) -> tuple[Tensor, int]:
        """The mode or cell (n,) of each sample, by the nearest centre or likeliest class, and their number."""
        if self.centers is None:
            return seen.modes.argmax(1), seen.modes.shape[1]
        samples = seen.modes if self.known else seen.features
        return torch.cdist(samples.double(), self.centers.double()).argmin(1), len(self.centers)

    def split(self, seen: Seen) -> list[float]:
        """The share of samples in each mode or cell."""
        nearest, k = self.assign(seen)
        shares: list[float] = (torch.bincount(nearest, minlength=k) / len(nearest)).tolist()
        return shares

    def compare(self, seen: Seen) -> tuple[dict[str, float], list[float]]:
        """How the shares of generated samples differ from those of real data, and the generated shares."""
        shares = self.split(seen)
        missing = sum(p for p, q in zip(self.shares, shares, strict=True) if q < HELD * p)
        return {"missing": missing, "imbalance": distance(shares, self.shares)}, shares


def _means(features: Tensor) -> Tensor:
    from sklearn.cluster import KMeans  # slow to import

    k = min(CELLS, len(features) // 10)
    means = KMeans(k, n_init=1, random_state=0).fit(features[:2500].double().cpu().numpy()).cluster_centers_
    return torch.from_numpy(means).to(features.device)


def distance(p: Sequence[float], q: Sequence[float]) -> float:
    """Total variation distance ½ Σ |p − q| of two histograms.

    Example:
        >>> distance([1.0, 0.0], [0.5, 0.5])
        0.5
    """
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
