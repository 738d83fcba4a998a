"""Whether a generator repeats its training data, by distances to the nearest training samples; plain torch."""

from typing import NamedTuple

from torch import Tensor

from lightning_gan_stability._checks import check_integer, check_share
from lightning_gan_stability.metrics.features import Pairs, checked


class Memorization(NamedTuple):
    """Two tests that generated samples are nearer to training data than held-out samples are, and the nearest pairs.

    Attributes:
        p_value: of the rank test that generated samples are nearer as a whole.
        nearer: share of pairs of a generated and a held-out sample in which the generated one is nearer, ties by half;
            about ½ without memorization.
        p_copied: of the test that a part of the generated samples is nearer than almost all held-out ones.
        copied: estimated share of generated samples that are copies, in [0, 1].
        samples: (p,), rows of the generated samples nearest to training data, the nearest first.
        neighbours: (p,), the row of the nearest training sample of each.
        distances: (p,), how far they are apart.
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
    """Whether generated samples are nearer to training data than held-out data are: d(x) = min over i of ‖x − tᵢ‖.

    The first test is the global one of "A Non-Parametric Test to Detect Data-Copying in Generative Models",
    https://arxiv.org/abs/2004.05675: the Mann–Whitney statistic of d of the generated samples against d of the held-out
    ones, one-sided, with exact p-values for small samples without ties. It averages over samples, so that copies of a
    few are lost among the many. The second test looks at the few: a of the m generated samples have a d below the r-th
    smallest of the n held-out ones, r = ⌈quantile n⌉. If both are of one distribution, a is negative hypergeometric,
    whatever that distribution is, and its mean is q m with q = r/(n + 1). The estimate of the share of copies is
    (a/m − q)/(1 − q), if positive.

    Both tests are right for samples drawn like the held-out ones, and independently of each other. A generator that is
    nearer because it draws typical samples alone is found by the first test too: look at the pairs.

    Args:
        train: (N, d) features of all training samples.
        held_out: (n, d) features of samples that the generator was not trained on, without copies of training samples.
        fake: (m, d) features of generated samples.
        quantile: share of the held-out samples that are nearest, in (0, 1).
        pairs: number of the nearest pairs to return, at most m.

    Returns:
        Tests, shares and pairs.

    Raises:
        ValueError: also unless ``quantile`` is in (0, 1).

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
