"""Distances of generated to real samples as plain functions of features; torchmetrics exist under the same names.

The functions take (n, d) features in any floating dtype, of an Inception network or of a small one, and do not change
the global random state. Neighbours are determined exactly, ties included: matrix products decide the clear pairs,
differences in float64 the close ones. Memory beyond the features is bounded.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gan_stability._checks import check_integer, describe
from lightning_gan_stability.metrics.features import (
    Pairs,
    centred,
    checked,
    distinct,
    duplicates_of,
    factor,
    first_duplicate,
    frechet,
    gram,
    mmd,
    radii,
    root,
    rows_at_once,
)


class PrecisionAndRecall(NamedTuple):
    """Shares of fake samples among the real ones, and of real samples among the fake ones."""

    precision: float
    recall: float


class DensityAndCoverage(NamedTuple):
    """Mean number of real balls around a fake sample, divided by k; share of real balls with a fake sample inside."""

    density: float
    coverage: float


class ModeCoverage(NamedTuple):
    """Modes held, share of high-quality samples, KL(modes ‖ uniform) in nats, high-quality samples of each mode."""

    modes: int
    high_quality: float
    reverse_kl: float
    counts: Tensor


class BinDifference(NamedTuple):
    """Share of bins that differ (NDB/K), and Jensen–Shannon divergence of the two histograms in nats."""

    share: float
    js: float


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½) of two Gaussians with the samples' moments (FID).

    "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    https://arxiv.org/abs/1706.08500, with unbiased covariances. For equal distributions N(0, I) about
    2d/n + d(d + 1)/(2n), not 0: compare at equal n only. There may be fewer samples than features.

    Args:
        real: (n, d).
        fake: (m, d).

    Returns:
        At least 0.

    Raises:
        ValueError: if features are not floating-point (n, d) of one width, with at least two rows and finite values.

    Example:
        >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        9.0
    """
    x, y = checked(real=real, fake=fake)
    gap = (x.mean(0, dtype=torch.float64) - y.mean(0, dtype=torch.float64)).square().sum()
    x, y = (centred(features) for features in (x, y))
    covariances = (gram(x), gram(y)) if min(len(x), len(y)) > x.shape[1] else None
    return frechet(gap + x.square().sum() + y.square().sum(), covariances, lambda: (factor(x), factor(y)))


def frechet_from_moments(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """:func:`frechet_distance` of two Gaussians from their moments.

    Args:
        mean1: (d,).
        cov1: (d, d), symmetric, may be singular.
        mean2: (d,).
        cov2: (d, d).

    Returns:
        At least 0.

    Raises:
        ValueError: if moments are not finite, or have wrong shapes.

    Example:
        >>> frechet_from_moments(torch.zeros(2), torch.eye(2), torch.ones(2), 9 * torch.eye(2))
        10.0
    """
    d = len(mean1) if mean1.dim() else 0
    shapes = {"mean1": (d,), "cov1": (d, d), "mean2": (d,), "cov2": (d, d)}
    for (name, shape), moment in zip(shapes.items(), (mean1, cov1, mean2, cov2), strict=True):
        if moment.shape != shape or not d or not bool(moment.isfinite().all()):
            wanted = f"finite and of shape ({', '.join(['d'] * len(shape))}), with d = {d} features"
            raise ValueError(f"`{name}` must be {wanted}, got {describe(moment)}.")
    mean1, cov1, mean2, cov2 = (moment.double() for moment in (mean1, cov1, mean2, cov2))
    total = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
    return frechet(total, (cov1, cov2), lambda: (root(cov1), root(cov2)))


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int | None = None, subset_size: int = 1000, seed: int = 0
) -> float:
    """Unbiased squared MMD with the kernel (a·b/d + 1)³ (KID), 0 on average for equal distributions.

    "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401.

    Args:
        real: (n, d).
        fake: (m, d).
        subsets: average over this number of random subsets, as in the paper; None: one estimate from all samples.
        subset_size: number of samples of each side in a subset, at most min(n, m).
        seed: seed of the subsets.

    Returns:
        The distance, which may be negative.

    Example:
        >>> kernel_distance(torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]]))
        7.0
    """
    x, y = (features.double() for features in checked(real=real, fake=fake))
    if subsets is None:
        return mmd(x, y)
    size = min(check_integer("subset_size", subset_size), len(x), len(y))
    if size < 2:
        raise ValueError(f"`subset_size` must be at least 2, got {subset_size}.")
    random = torch.Generator().manual_seed(seed)
    drawn = ([torch.randperm(len(z), generator=random)[:size] for z in (x, y)] for _ in range(subsets))
    return sum(mmd(x[i.to(x.device)], y[j.to(y.device)]) for i, j in drawn) / check_integer("subsets", subsets)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionAndRecall:
    """Share of fake samples within the k-th neighbour's distance of any real one (precision), and vice versa (recall).

    "Improved Precision and Recall Metric for Assessing Generative Models", https://arxiv.org/abs/1904.06991. A sample
    is not its own neighbour, and a point at exactly this distance is within it. Equal distributions have .79 (k = 3,
    n = 1000, d = 16). Repeated real rows count as one neighbour: the radius is the distance to the k-th nearest
    distinct point, or 0 if there are fewer; each of the rows counts in the shares. Repeated generated rows are
    neighbours at distance 0, so that a generator of a few points has the recall of points.

    Args:
        real: (n, d).
        fake: (m, d).
        k: number of the neighbour.

    Returns:
        Both in [0, 1].

    Raises:
        ValueError: also if k is not below n and m.

    Example:
        >>> precision_recall(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.5], [3.5], [9.0]]), k=1)
        PrecisionAndRecall(precision=0.3333333333333333, recall=1.0)
    """
    x, y = checked(check_integer("k", k), real=real, fake=fake)
    x, x_counts = distinct(x)
    x_radii, y_radii = radii(x, k), Pairs(y, y).radii(k)
    pairs = Pairs(y, x)
    precise, recalled = (torch.zeros(len(z), dtype=torch.bool, device=z.device) for z in (y, x))
    for start, low in pairs.chunks():
        rows = slice(start, start + len(low))
        precise[rows] = pairs.within(start, low, x_radii).any(1)
        recalled |= pairs.within(start, low, y_radii[rows, None]).any(0)
    return PrecisionAndRecall(precise.double().mean().item(), _share(recalled, x_counts))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityAndCoverage:
    """Mean number of real balls around a fake sample, divided by k (density), and share of balls with one (coverage).

    "Reliable Fidelity and Diversity Metrics for Generative Models", https://arxiv.org/abs/2002.09797. A ball reaches to
    the k-th neighbour, which is outside. Equal distributions have density 1 and coverage 1 − ∏ᵢ₌₁..ₖ (n − i)/(n + m −
    i), about 1 − 2⁻ᵏ. Repeated rows count as one neighbour and have one ball, which reaches to the k-th nearest
    distinct point; each of the rows counts in the share.

    Args:
        real: (n, d).
        fake: (m, d).
        k: number of the neighbour.

    Returns:
        Density at least 0, coverage in [0, 1].

    Example:
        >>> density_coverage(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0]]), k=1)
        DensityAndCoverage(density=1.0, coverage=0.6666666666666666)
    """
    (x, x_counts), (y, y_counts) = map(distinct, checked(check_integer("k", k), real=real, fake=fake))
    x_radii, pairs = radii(x, k), Pairs(y, x)
    covered, hits = torch.zeros(len(x), dtype=torch.bool, device=x.device), 0.0
    for start, low in pairs.chunks():
        inside = pairs.within(start, low, x_radii, strict=True)
        covered, hits = (
            covered | inside.any(0),
            hits + float((inside.sum(1) * y_counts[start : start + len(low)]).sum()),
        )
    return DensityAndCoverage(hits / (k * len(fake)), _share(covered, x_counts))


def mode_coverage(
    samples: Tensor,
    centers: Tensor | None = None,
    std: float | None = None,
    *,
    classes: int | None = None,
    radius: float = 3.0,
    confidence: float = 0.5,
    least: int | None = None,
) -> ModeCoverage:
    """Number of modes that samples reach, and the reverse KL Σ p log(K p) of the shares p of K modes to equal shares.

    The protocol of "Unrolled Generative Adversarial Networks", https://arxiv.org/abs/1611.02163. n perfect samples
    still have a KL of (K − 1)/(2n) on average; without a high-quality sample it is infinite.

    Args:
        samples: (n, d) points; or with ``classes`` (n,) predicted classes or (n, K) probabilities.
        centers: (K, d); a point belongs to the nearest one.
        std: standard deviation of a mode.
        classes: K, instead of ``centers``.
        radius: a point within this number of ``std`` of its center is of high quality.
        confidence: a prediction whose largest probability is at least this is of high quality.
        least: number of high-quality samples for a mode to count; None: ⌈0.064 n/K⌉, which is 20 of 2,500 for 8 modes.

    Raises:
        ValueError: also if not exactly one of ``centers`` (with ``std``) and ``classes`` is given.

    Example:
        >>> mode_coverage(torch.tensor([0, 0, 1, 1]), classes=4)
        ModeCoverage(modes=2, high_quality=1.0, reverse_kl=0.6931471805599453, counts=tensor([2, 2, 0, 0]))
    """
    if (centers is None) == (classes is None) or (centers is None) != (std is None):
        raise ValueError("Exactly one of `centers` (with `std`) and `classes` must be given.")
    if centers is not None and std is not None:
        nearest, good = _nearest(samples, centers, radius * std)
    else:
        nearest, good = _predicted(samples, check_integer("classes", classes or 0), confidence)
    k = len(centers) if centers is not None else classes or 0
    counts = torch.bincount(nearest[good], minlength=k)
    held = -(-8 * len(samples) // (125 * k)) if least is None else check_integer("least", least)
    shares = counts.double() / counts.sum()
    kl = torch.special.xlogy(shares, k * shares).sum().item() if good.any() else math.inf
    return ModeCoverage(int((counts >= held).sum()), good.double().mean().item(), kl, counts)


def bin_difference(real: Tensor, fake: Tensor, bins: int = 100, alpha: float = 0.05, seed: int = 0) -> BinDifference:
    """Share of K-means bins of the real samples that hold another proportion of the fake ones (NDB/K).

    "On GANs and GMMs", https://arxiv.org/abs/1805.12462: a two-proportion z-test at level α for each bin, so that equal
    distributions have about α.

    Args:
        real: (n, d).
        fake: (m, d).
        bins: K, at most n/2.
        alpha: level of the test.
        seed: seed of K-means.

    Returns:
        Share in [0, 1], Jensen–Shannon divergence in [0, log 2].

    Example:
        >>> bin_difference(torch.tensor([[0.0], [9.0]] * 50), torch.tensor([[0.0]] * 100), bins=2).share
        1.0
    """
    from sklearn.cluster import KMeans  # slow to import

    x, y = checked(real=real, fake=fake)
    if check_integer("bins", bins) > len(x) / 2:
        raise ValueError(f"`bins` must be at most half the number of real samples, got {bins} for {len(x)}.")
    fit = KMeans(bins, random_state=seed).fit(x.cpu().double().numpy())
    labels = torch.from_numpy(fit.labels_), torch.from_numpy(fit.predict(y.cpu().double().numpy()))
    p, q = (torch.bincount(z, minlength=bins).double() / len(z) for z in labels)
    pooled, middle = (len(x) * p + len(y) * q) / (len(x) + len(y)), (p + q) / 2
    z = (p - q).abs() / (pooled * (1 - pooled) * (1 / len(x) + 1 / len(y))).sqrt()
    js = sum((torch.special.xlogy(s, s) - torch.special.xlogy(s, middle)).sum() for s in (p, q)) / 2
    critical = torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64))
    return BinDifference((z > critical).double().mean().item(), float(js))


def birthday_support(samples: Tensor, threshold: float, trials: int = 1000, seed: int = 0) -> float:
    """Estimated number s²/(2 log 2) of distinct samples, where s is the number of draws until two are duplicates.

    "Do GANs actually learn the distribution? An empirical study", https://arxiv.org/abs/1706.08224; s is the median
    over random orders.

    Args:
        samples: (n, d).
        threshold: two samples at most this far apart are duplicates.
        trials: number of orders.
        seed: seed of the orders.

    Returns:
        A positive number; infinite without duplicates, which means that it is likely above n²/(2 log 2).

    Example:
        >>> round(birthday_support(torch.zeros(5, 2), 0.0), 2)
        2.89
    """
    (x,) = checked(samples=samples)
    random = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(x), generator=random) for _ in range(check_integer("trials", trials)))
    duplicates = duplicates_of(x, threshold)
    if duplicates is None:
        firsts = [first_duplicate(x, order.to(x.device), threshold) for order in orders]
    elif duplicates.numel() == 0:
        return math.inf
    else:  # an order is random both as one of samples and as the place of each sample
        firsts = [int(order[duplicates].amax(0).min()) + 1 for order in orders]
    return torch.tensor(firsts, dtype=torch.float64).quantile(0.5).item() ** 2 / (2 * math.log(2))


def pairwise_diversity(samples: Tensor) -> float:
    """Mean Euclidean distance of two distinct samples.

    Args:
        samples: (n, d).

    Returns:
        At least 0; √(2d) at most and nearly so for N(0, I).

    Example:
        >>> pairwise_diversity(torch.tensor([[0.0], [1.0], [3.0]]))
        2.0
    """
    (x,) = checked(samples=samples)
    x = x.double() - x.mean(0, dtype=torch.float64)
    total, rows = 0.0, rows_at_once(len(x))
    for start in range(0, len(x), rows):
        distances = torch.cdist(x[start : start + rows], x)
        total += (distances.sum() - distances.diagonal(start).sum()).item()
    return total / (len(x) * (len(x) - 1))


def latent_sensitivity(
    generator: Callable[[Tensor], Tensor], latents: Tensor, directions: int | None = None, seed: int = 0
) -> float:
    """Mean over samples of ‖∂G/∂z‖_F, the root of Σ ‖J u‖² over orthonormal directions u.

    Args:
        generator: maps (n, latent_dim) to (n, ...), differentiable in forward mode, each sample separately.
        latents: (n, latent_dim).
        directions: number of random directions, one forward pass each, scaled by latent_dim / directions; None: all.
        seed: seed of the directions.

    Returns:
        At least 0; ‖A‖_F for G(z) = A z.

    Example:
        >>> round(latent_sensitivity(lambda z: z @ torch.tensor([[3.0], [4.0]]), torch.zeros(2, 2)), 4)
        5.0
    """
    (latents,) = checked(latents=latents)
    dim = latents.shape[1]
    if directions is not None and check_integer("directions", directions) > dim:
        raise ValueError(f"`directions` must be at most the number of latents, got {directions} for {dim}.")
    random = torch.Generator().manual_seed(seed)
    basis = torch.eye(dim)
    if directions is not None:
        basis = torch.linalg.qr(torch.randn(dim, directions, generator=random)).Q.T
    total = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    for direction in basis.to(latents):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself, at the first use
            change = torch.func.jvp(generator, (latents,), (direction.expand_as(latents),))[1]
        total += change.double().flatten(1).square().sum(1)
    return (total * dim / len(basis)).sqrt().mean().item()


# ---------- what they are made of


def _share(found: Tensor, counts: Tensor) -> float:
    """The share of samples that are found, of distinct points of which there are so many."""
    return (counts[found].sum() / counts.sum()).item()


def _nearest(samples: Tensor, centers: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    # twice, because a single centre is not too few
    samples, twice = (x.double() for x in checked(samples=samples, centers=torch.cat([centers, centers])))
    centers = twice[: len(centers)]
    parts = [torch.cdist(part, centers).min(1) for part in samples.split(rows_at_once(len(centers)))]  # type: ignore[no-untyped-call]
    distance, mode = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return mode, distance <= radius


def _predicted(samples: Tensor, classes: int, confidence: float) -> tuple[Tensor, Tensor]:
    if samples.dim() == 1 and not samples.is_floating_point():
        if len(samples) < 2 or int(samples.min()) < 0 or int(samples.max()) >= classes:
            raise ValueError(f"`samples` must be at least two class numbers in 0 ... {classes - 1}.")
        return samples.long(), torch.ones_like(samples, dtype=torch.bool)
    (samples,) = checked(samples=samples)
    if samples.shape[1] != classes or not torch.allclose(
        samples.sum(1).double(), samples.new_ones(()).double(), atol=1e-2
    ):
        raise ValueError(
            f"`samples` must be probabilities (n, {classes}) whose rows sum to 1, got {tuple(samples.shape)}."
        )
    share, mode = samples.max(1)
    return mode, share >= confidence
