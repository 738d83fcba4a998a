"""Tests whether a generator repeats its training data, by distances to the nearest samples; plain torch."""

import math
from typing import NamedTuple

from torch import Tensor

from lightning_gan_stability._checks import check_integer, check_share
from lightning_gan_stability.metrics.features import Pairs, checked

RANKS = (1, 2, 4, 8)  # of held-out samples, the nearest first, that training samples are counted before


class Memorization(NamedTuple):
    """Two tests that generated samples are closer to training data than held-out samples are, and the closest pairs.

    Attributes:
        p_value: p-value of the rank test that generated samples are closer as a whole.
        nearer: share of pairs of a generated and a held-out sample in which the generated one is closer, ties by half;
            about ½ without memorization.
        p_copied: p-value of the test that a part of the generated samples is closer than almost all held-out ones.
        copied: estimated share of generated samples that are copies, in [0, 1].
        samples: (p,), rows of the generated samples closest to training data, the closest first.
        neighbours: (p,), the row of the nearest training sample of each.
        distances: (p,), their distances.
    """

    p_value: float
    nearer: float
    p_copied: float
    copied: float
    samples: Tensor
    neighbours: Tensor
    distances: Tensor


def memorization_test(
    train: Tensor, held_out: Tensor, fake: Tensor, quantile: float = 0.05, pairs: int = 16
) -> Memorization:
    """Test whether generated samples are closer to training data than held-out data: d(x) = min over i of ‖x − tᵢ‖.

    The first test is the global one of "A Non-Parametric Test to Detect Data-Copying in Generative Models",
    https://arxiv.org/abs/2004.05675: the Mann–Whitney statistic of d of the generated samples against d of the held-out
    ones, one-sided, with exact p-values for small samples without ties. It averages over samples, so that it misses
    copies of a few. The second test detects these: a of the m generated samples have a d below the r-th smallest of the
    n held-out ones, r = ⌈quantile n⌉. If both have the same distribution, a is negative hypergeometric, whatever that
    distribution is, and its mean is q m with q = r/(n + 1). The estimate of the share of copies is (a/m − q)/(1 − q),
    if positive.

    Both tests are valid for samples drawn like the held-out ones, and independently of each other. They also reject a
    generator that is closer only because it draws typical samples, in particular in high dimensions;
    :func:`copying_test` does not.

    Args:
        train: (N, d) features of all training samples.
        held_out: (n, d) features of samples that the generator was not trained on, without copies of training samples.
        fake: (m, d) features of generated samples.
        quantile: share of the held-out samples that count as closest, in (0, 1).
        pairs: number of the closest pairs to return, at most m.

    Returns:
        Tests, shares and pairs.

    Raises:
        ValueError: also if ``quantile`` is not in (0, 1).

    Example:
        >>> import torch
        >>> train = torch.arange(40.0)[:, None]
        >>> found = memorization_test(train, held_out=train + 0.5, fake=train[:20] + 0.1, pairs=1)
        >>> found.nearer, found.copied, found.p_copied < 1e-6
        (1.0, 1.0, True)
    """
    from scipy.stats import mannwhitneyu, nhypergeom  # slow to import

    check_share("quantile", quantile, open_start=True, open_end=True)
    x, y, z = checked(train=train, held_out=held_out, fake=fake)
    expected, (distances, neighbours) = (Pairs(part, x).nearest() for part in (y, z))
    reference, distances = expected[0].flatten().sort().values, distances.flatten()
    n, m = len(y), len(z)
    test = mannwhitneyu(distances.cpu().numpy(), reference.cpu().numpy(), alternative="less")
    r = -int(-quantile * n // 1)
    below = int((distances < reference[r - 1]).sum())
    q = r / (n + 1)
    order = distances.argsort(stable=True)[: check_integer("pairs", pairs)]
    return Memorization(
        p_value=float(test.pvalue),
        nearer=1 - float(test.statistic) / (n * m),
        p_copied=float(nhypergeom.sf(below - 1, n + m, m, r)),
        copied=max(0.0, (below / m - q) / (1 - q)),
        samples=order,
        neighbours=neighbours.flatten()[order],
        distances=distances[order],
    )


class Copying(NamedTuple):
    """A test that generated samples are closer to training samples than to held-out ones.

    Attributes:
        p_value: p-value of the test.
        copied: estimated share of generated samples that are copies, in [0, 1]; 0 if ``p_value`` is above 5 %.
    """

    p_value: float
    copied: float


def copying_test(train: Tensor, held_out: Tensor, fake: Tensor) -> Copying:
    """Test whether generated samples are closer to training than to held-out samples, whatever their distribution.

    Each real sample x has c(x) = min over j of ‖x − gⱼ‖, its distance to the nearest generated sample. For a generator
    that copies nothing, the N training and n held-out samples are draws of one distribution. Their order by c is then
    random, even if the generator knows only a part of the distribution, or has collapsed. So the number a of training
    samples before the r-th held-out one is negative hypergeometric, and P(a or more) = H(r − 1; N + n, n, a + r − 1) is
    the probability that at most r − 1 of the first a + r − 1 are held-out ones, with the hypergeometric distribution's
    function H. The p-value is four times the smallest of those for r = 1, 2, 4 and 8. If K distinct training samples
    have copies, p is about 4 (N / (N + n))ᴷ.

    Let τ be the distance c of the r-th held-out sample, r = 4. The estimated share of copies is the share of generated
    samples that are less than τ from a training sample, minus N r / (n (r − 1)) times the share of those that are this
    close to a held-out one. The question is that of "LOGAN: Membership Inference Attacks Against Generative Models",
    https://arxiv.org/abs/1705.07663. Copies of only a few training samples cannot be detected; a generator that makes
    nothing else has collapsed.

    Args:
        train: (N, d) features of training samples.
        held_out: (n, d) features of samples of the same distribution that the generator was not trained on.
        fake: (m, d) features of generated samples.

    Returns:
        The p-value and the share.

    Raises:
        ValueError: if features are not finite, or have different widths.

    Example:
        >>> import torch
        >>> x = torch.arange(80.0)[:, None]
        >>> found = copying_test(train=x[::2], held_out=x[1::2], fake=x[0:40:2])
        >>> found.p_value < 1e-4, round(found.copied, 2)
        (True, 1.0)
        >>> copying_test(train=x[::2], held_out=x[1::2], fake=x[40:41] + 0.5).copied
        0.0
    """
    x, y, z = checked(train=train, held_out=held_out, fake=fake, least=1)
    near, held = (Pairs(part, z).nearest()[0].flatten() for part in (x, y))
    held = held.sort().values
    ranks = [r for r in RANKS if r <= len(held)]
    counts = [int((near < held[r - 1]).sum()) for r in ranks]
    p = min(1.0, len(ranks) * min(_tail(a, r, len(x), len(y)) for a, r in zip(counts, ranks, strict=True)))
    if p > 0.05:
        return Copying(p, 0.0)
    r = min(4, len(held))
    closest = [Pairs(z, part).nearest()[0].flatten() for part in (x, y)]
    shares = [float((distances < held[r - 1]).double().mean()) for distances in closest]
    by_chance = shares[1] * len(x) / len(y) * r / (r - 1) if r > 1 else 0.0
    return Copying(p, max(0.0, shares[0] - by_chance))


def _tail(a: int, r: int, n_train: int, n_held_out: int) -> float:
    """The probability that a or more training samples come before the r-th held-out one."""
    from scipy.stats import hypergeom  # slow to import

    return float(hypergeom.cdf(r - 1, n_train + n_held_out, n_held_out, a + r - 1))


def least_copies(n_train: int, n_held_out: int, level: float) -> float:
    """The number of training samples that need copies for a p-value of :func:`copying_test` of at most ``level``.

    Returns:
        A number of samples; infinity if copies of all of them are not enough.

    Example:
        >>> least_copies(1000, 100, level=0.006), least_copies(100, 1, level=0.006)
        (67, inf)
    """
    ranks = [r for r in RANKS if r <= n_held_out]
    low, high = 0, n_train + 1
    while low < high:
        a = (low + high) // 2
        found = min(_tail(a, r, n_train, n_held_out) for r in ranks) * len(ranks) <= level
        low, high = (low, a) if found else (a + 1, high)
    return low if low <= n_train else math.inf
