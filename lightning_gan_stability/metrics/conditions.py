"""Whether generated samples match their conditions, from pairs of features, or labels, and samples; plain torch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.metrics.features import Pairs, checked, rows_at_once
from lightning_gan_stability.metrics.values import pairwise_diversity

RANK = 32  # directions of a matrix of distances that the permutation test looks at
ROUNDING = 1e-9  # two values of a statistic that are so near, relative to its scale, are equal


class ConditionDependence(NamedTuple):
    """How much generated samples depend on their conditions, compared with real samples.

    Attributes:
        dependence: bias-corrected squared distance correlation; 0 on average if independent, at most 1.
        p_value: p-value of the permutation test of independence; small: samples depend on the condition.
        real: the dependence of real samples; NaN if there are none.
        ratio: dependence / real; NaN if ``real`` is not positive.
        p_weaker: p-value of the test that real samples depend on it more; small: they do; NaN without real samples.
    """

    dependence: float
    p_value: float
    real: float
    ratio: float
    p_weaker: float


class ClassReport(NamedTuple):
    """Generated samples of one class compared with the real ones.

    Attributes:
        n_real: number of real samples.
        n_fake: number of generated ones.
        consistency: share of generated samples whose nearest real samples are of this class; NaN if there are none.
        real_consistency: the same share for the real samples, each of which is left out in turn.
        p_consistency: p-value of the test that the first share is smaller than the second.
        diversity: mean distance of two generated samples, divided by that of two real ones; NaN if there are none.
        p_diversity: p-value of the test that the generated samples are less diverse.
    """

    n_real: int
    n_fake: int
    consistency: float
    real_consistency: float
    p_consistency: float
    diversity: float
    p_diversity: float


def condition_dependence(
    condition: Tensor, fake: Tensor, real: Tensor | None = None, permutations: int = 999, seed: int = 0
) -> ConditionDependence:
    """Bias-corrected squared distance correlation ⟨A, B⟩ / √(⟨A, A⟩ ⟨B, B⟩) of conditions and samples, with two tests.

    "Partial Distance Correlation with Methods for Dissimilarities", https://arxiv.org/abs/1310.2926: A and B are the
    U-centred Euclidean distances of the conditions and of the samples. The population value is 0 for independent pairs
    only, and no bandwidth is needed. Different labels have the distance 1.

    The first test compares true pairs with shuffled ones, by the inner product of the 32 leading directions of A and of
    B, so that a permutation costs n·32² instead of n². A generator that ignores its condition, or uses that of another
    row, has a uniform p-value. The second test exchanges the real and the generated sample of random rows: if both have
    the same distribution given the condition, ⟨A, B_real⟩ − ⟨A, B_fake⟩ is as large as that of another exchange. Both
    are permutation tests with p-value (1 + number as large)/(1 + permutations), valid for any n. The second p-value is
    also small for samples of too small a spread.

    Args:
        condition: (n, d) features, or (n,) labels.
        fake: (n, d) features of the samples generated for these conditions.
        real: (n, d) features of the real samples of these conditions; None: no comparison.
        permutations: number of permutations of each test.
        seed: seed of the permutations.

    Returns:
        Correlations and p-values.

    Raises:
        ValueError: also if there is not one row for each condition, or if there are fewer than four.

    Example:
        >>> labels = torch.arange(40) % 4
        >>> real = torch.eye(4)[labels]
        >>> found = condition_dependence(labels, fake=real[torch.randperm(40)], real=real)
        >>> round(found.real, 3), found.ratio < 0.3, found.p_weaker < 0.01
        (1.0, True, True)
    """
    check_integer("permutations", permutations)
    samples = checked(3, fake=fake) if real is None else checked(3, fake=fake, real=real)
    if condition.is_floating_point():
        (condition,) = checked(3, condition=condition)
    n = len(_labels("condition", condition))
    for name, part in zip(("fake", "real"), samples, strict=False):
        if len(part) != n:
            raise ValueError(f"`{name}` must have one row for each condition, got {len(part)} for {n}.")
    a = _centred(_distances(condition))
    distances = [_distances(part) for part in samples]
    values = [_correlation(a, _centred(part)) for part in distances]
    random = torch.Generator().manual_seed(seed)
    p_value = _permutation_test(a, _centred(distances[0]), permutations, random)
    if real is None:
        return ConditionDependence(values[0], p_value, math.nan, math.nan, math.nan)
    # ⟨A, B_real⟩ − ⟨A, B_fake⟩ of any exchange is Σ eᵢ wᵢ, with eᵢ = −1 where row i is exchanged: the terms in which
    # two signs meet are the same in both
    across = _distances(samples[1], samples[0])
    weights = (a * (distances[1] - distances[0] + across - across.T)).sum(1)
    return ConditionDependence(
        dependence=values[0],
        p_value=p_value,
        real=values[1],
        ratio=values[0] / values[1] if values[1] > 0 else math.nan,
        p_weaker=_sign_test(weights, permutations, random),
    )


def class_report(
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    fake_labels: Tensor,
    k: int = 5,
    permutations: int = 999,
    seed: int = 0,
) -> dict[int, ClassReport]:
    """Compare consistency and diversity of the generated samples of each class with those of real samples.

    A sample is consistent if most of its k nearest real samples are of its class; the nearest of them decides a tie. A
    real sample is not its own neighbour. The shares are compared by Fisher's exact test. The mean distances of two
    samples of the class are compared by a permutation test with equally many real and generated samples. Both tests are
    one-sided and for one class: multiply p-values by the number of classes before you pick the smallest.

    Args:
        real: (n, d) features.
        real_labels: (n,) classes.
        fake: (m, d) features.
        fake_labels: (m,) requested classes; all of them have real samples.
        k: number of neighbours.
        permutations: number of permutations of each test of diversity.
        seed: seed of the permutations.

    Returns:
        A report for each class of the real samples. A p-value is 1 where there is nothing to compare: no generated
        sample of a class for consistency, fewer than two on either side for diversity.

    Raises:
        ValueError: also if labels are not integers (n,), or if a generated class has no real sample.

    Example:
        >>> real, labels = torch.randn(100, 2), torch.arange(100) % 2
        >>> real[:, 0] += 20 * labels
        >>> fake = torch.zeros(40, 2)  # of both classes, they look like the first, without any diversity
        >>> report = class_report(real, labels, fake, torch.arange(40) % 2)
        >>> [(part.consistency, part.real_consistency, part.diversity) for part in report.values()]
        [(1.0, 1.0, 0.0), (0.0, 1.0, 0.0)]
    """
    from scipy.stats import hypergeom  # slow to import

    check_integer("permutations", permutations)
    checked(check_integer("k", k), real=real)
    x, y = checked(real=real, fake=fake)
    labels = _labels("real_labels", real_labels, len(x)), _labels("fake_labels", fake_labels, len(y))
    if unknown := {*labels[1].tolist()} - {*labels[0].tolist()}:
        shown = ", ".join(map(str, sorted(unknown)))
        raise ValueError(f"`fake_labels` must be classes of real samples; without any are {shown}.")
    classes, (first, second) = torch.unique(labels[0]), (part.to(x.device) for part in labels)
    own = torch.arange(len(x), device=x.device)
    right_real = _predicted(Pairs(x, x).nearest(k, own)[1], first, classes) == first
    right_fake = _predicted(Pairs(y, x).nearest(k)[1], first, classes) == second
    random = torch.Generator().manual_seed(seed)
    report = {}
    for label in classes.tolist():
        ours, theirs = first == label, second == label
        n, m = int(ours.sum()), int(theirs.sum())
        hits, fake_hits = int(right_real[ours].sum()), int(right_fake[theirs].sum())
        diversity, p_diversity = _diversity(x[ours], y[theirs], permutations, random)
        report[label] = ClassReport(
            n_real=n,
            n_fake=m,
            consistency=fake_hits / m if m else math.nan,
            real_consistency=hits / n,
            p_consistency=float(hypergeom.cdf(fake_hits, n + m, hits + fake_hits, m)) if m else 1.0,
            diversity=diversity,
            p_diversity=p_diversity,
        )
    return report


# ---------- what they are made of


def _labels(name: str, labels: Tensor, n: int | None = None) -> Tensor:
    if labels.is_floating_point() and n is None:  # features, which have been checked
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        what = f"{labels.dtype} of shape {tuple(labels.shape)}"
        kind = "integer labels (n,)" if n is not None else "features (n, d) or integer labels (n,)"
        raise ValueError(f"`{name}` must be {kind}, got {what}.")
    if n is not None and len(labels) != n:
        raise ValueError(f"`{name}` must have one label for each sample, got {len(labels)} for {n}.")
    return labels.detach()


def _distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Distances of all pairs, float64."""
    if not x.is_floating_point():
        return (x[:, None] != x).double()
    both = x.double() if y is None else torch.cat([x, y]).double()
    both = both - both.mean(0)  # products of centred features lose least
    return torch.cdist(both[: len(x)], both[-len(x) :])


def _centred(distances: Tensor) -> Tensor:
    """U-centred: rows sum to 0, without the diagonal, which is 0."""
    n = len(distances)
    rows = distances.sum(1)
    centred = distances - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    centred.fill_diagonal_(0)
    # as many classes as samples: all are equally far apart, and rounding is left
    return centred if centred.norm() > ROUNDING * distances.norm() else torch.zeros_like(centred)


def _correlation(a: Tensor, b: Tensor) -> float:
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def _leading(matrix: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Q (n, r) and S (r, r) with Q S Qᵀ nearly the matrix, by two steps of a subspace iteration."""
    n = len(matrix)
    start = torch.eye(n, dtype=torch.float64)
    if n > RANK:
        start = torch.randn(n, RANK, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ (matrix @ start.to(matrix.device))).Q if n > RANK else start.to(matrix.device)
    return basis, basis.T @ matrix @ basis


def _permutation_test(a: Tensor, b: Tensor, permutations: int, random: torch.Generator) -> float:
    (first, inner_first), (second, inner_second) = _leading(a, random), _leading(b, random)

    def inner_products(orders: Tensor) -> Tensor:
        mixed = first.T @ second[orders]
        return (inner_first @ mixed @ inner_second * mixed).sum((1, 2))

    n, found = len(a), 0
    least = inner_products(torch.arange(n, device=a.device)[None])[0] - ROUNDING * a.norm() * b.norm()
    for size in _parts(permutations, n * first.shape[1]):
        orders = torch.rand(size, n, generator=random).argsort(1).to(a.device)
        found += int((inner_products(orders) >= least).sum())
    return (1 + found) / (1 + permutations)


def _sign_test(weights: Tensor, permutations: int, random: torch.Generator) -> float:
    found, least = 0, weights.sum() - ROUNDING * weights.abs().sum()
    for size in _parts(permutations, len(weights)):
        signs = 2 * torch.randint(2, (size, len(weights)), generator=random) - 1
        found += int((signs.to(weights) @ weights >= least).sum())
    return (1 + found) / (1 + permutations)


def _parts(permutations: int, width: int) -> list[int]:
    """How many permutations, of so many values each, are done at once."""
    size = rows_at_once(width)
    return [min(size, permutations - start) for start in range(0, permutations, size)]


def _predicted(neighbours: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """The class of most of the neighbours (n, k), the nearest first."""
    votes = 1 + 0.5 ** torch.arange(2, neighbours.shape[1] + 2, dtype=torch.float64, device=labels.device)
    places = torch.searchsorted(classes, labels)
    found = []
    for rows in neighbours.split(rows_at_once(len(classes))):  # type: ignore[no-untyped-call]
        counts = votes.new_zeros(len(rows), len(classes)).scatter_add_(1, places[rows], votes.expand(len(rows), -1))
        found.append(counts.argmax(1))
    return classes[torch.cat(found)]


def _diversity(real: Tensor, fake: Tensor, permutations: int, random: torch.Generator) -> tuple[float, float]:
    """The ratio of mean distances, and the p-value of the test that it is small."""
    size = min(len(real), len(fake))
    if size < 2:
        return math.nan, 1.0
    diversity = pairwise_diversity(real)
    # of equally many samples, the difference of mean distances is a sum of the samples' mean distances to all others
    chosen = [part[torch.randperm(len(part), generator=random)[:size].to(part.device)] for part in (fake, real)]
    pooled = torch.cat(chosen).double()
    pooled -= pooled.mean(0)
    parts = pooled.split(rows_at_once(len(pooled)))  # type: ignore[no-untyped-call]
    sums = torch.cat([torch.cdist(part, pooled).sum(1) for part in parts])
    found, most = 0, sums[:size].sum() + ROUNDING * sums.sum()
    for rows in _parts(permutations, len(sums)):
        orders = torch.rand(rows, len(sums), generator=random).argsort(1)[:, :size].to(sums.device)
        found += int((sums[orders].sum(1) <= most).sum())
    ratio = pairwise_diversity(fake) / diversity if diversity > 0 else math.nan
    return ratio, (1 + found) / (1 + permutations)
