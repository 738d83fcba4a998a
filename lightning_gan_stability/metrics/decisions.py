"""Exact tests for a generator that looks bad, each against the hypothesis that it is healthy.

A healthy generator need not equal the data: it holds every mode with at least a fifth of its share, its samples are
at least a fifth as far from each other as real ones, and it covers a part of the data. The p-value of each test is
that of the worst of these generators. Better ones are therefore called bad even less often than the level says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gan_stability.metrics.conditions import class_report, condition_dependence
from lightning_gan_stability.metrics.features import Pairs
from lightning_gan_stability.metrics.values import pairwise_diversity

BLOCK = 25  # rows, of which the dependence on conditions is measured
HELD = 0.2  # a mode or cell is missed if it has less than this part of what the real data have there


class LostModes(NamedTuple):
    """The share of the real data in modes that are certainly lost, and its p-value."""

    mass: float
    p: float


def lost_modes(real: Tensor, fake: Tensor, covered: Tensor, modes: int, held: float = HELD) -> LostModes:
    r"""Test whether modes are lost: whether they have less than ``held`` times their share of the generated samples.

    If a set of modes has at least ``held`` times its share, each of its r real and k generated samples is a generated
    one with probability of at least π = held m / (held m + n). Then P(k or fewer) is the binomial distribution's
    function at k of r + k. The sets are the mode with the smallest share, the two with the smallest, and so on; p is K
    times the smallest of their probabilities, with the number K of modes. A mode is not lost if a fifth of its real
    samples have a generated one in their neighbourhood, because samples of a young generator are spread everywhere and
    pass between narrow modes. The neighbourhood is at least as large as the distance of generated samples to the data
    (:func:`blur_of`).

    Args:
        real: the mode (n,) of each real sample, 0 ... K − 1.
        fake: the mode (m,) of each generated sample; do not reuse samples that raised the suspicion.
        covered: whether a generated sample is near (n,) each real one; see :func:`covered_by`.
        modes: K.
        held: share of a mode that a healthy generator has, relative to the data.

    Example:
        >>> real, fake = torch.arange(800) % 8, torch.arange(700) % 7
        >>> found = lost_modes(real, fake, real < 7, modes=8)
        >>> found.mass, found.p < 1e-6
        (0.125, True)
    """
    from scipy.stats import binom  # slow to import

    counts = torch.stack([torch.bincount(x.cpu(), minlength=modes).double() for x in (real, fake)])
    near = torch.bincount(real[covered].cpu(), minlength=modes) / counts[0].clamp(min=1)
    ratio = counts[1] / len(fake) / (counts[0] / len(real)).clamp(min=1e-12)
    order = [mode for mode in ratio.argsort(stable=True).tolist() if counts[0, mode] and near[mode] < HELD]
    best = LostModes(0.0, 1.0)
    chance = held * len(fake) / (held * len(fake) + len(real))
    r = k = 0
    for mode in order:
        r, k = r + int(counts[0, mode]), k + int(counts[1, mode])
        p = min(1.0, modes * float(binom.cdf(k, r + k, chance)))
        if p <= best.p:
            best = LostModes(r / len(real), p)
    return best


def covered_by(fake: Tensor, real: Tensor, k: int = 5, blur: float = 0.0) -> Tensor:
    """Whether a generated sample (m, d) is closer to each real one (n, d) than its k-th real neighbour, (n,).

    The mean is the coverage of "Reliable Fidelity and Diversity Metrics for Generative Models",
    https://arxiv.org/abs/2002.09797.

    Args:
        fake: features (m, d).
        real: features (n, d).
        k: number of the neighbour.
        blur: a distance that always counts as near; see :func:`blur_of`.

    Example:
        >>> covered_by(torch.tensor([[0.5], [9.0]]), torch.tensor([[0.0], [1.0], [3.0]]), k=1)
        tensor([ True,  True, False])
    """
    radii, pairs = Pairs(real, real).radii(k).clamp(min=blur), Pairs(fake, real)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start, low in pairs.chunks():
        covered |= pairs.within(start, low, radii, strict=True).any(0)
    return covered


def blur_of(fake: Tensor, real: Tensor) -> float:
    """The distance of generated samples (m, d) to the data (n, d): the median distance to the nearest real one.

    If a generator has learned the data, it is no larger than distances within them. For a young one it is large: few of
    its samples are in the middle of a mode that it holds, and cells there would count as lost.

    Example:
        >>> blur_of(torch.tensor([[0.5], [3.0], [9.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
        0.5
    """
    return float(Pairs(fake, real).nearest()[0].median())


def too_little_coverage(covered: Tensor, least: float) -> float:
    """The p-value of the hypothesis that the coverage is at least ``least``, from the binomial distribution.

    Example:
        >>> round(too_little_coverage(torch.zeros(10, dtype=torch.bool), least=0.5), 6)
        0.000977
    """
    from scipy.stats import binom

    return float(binom.cdf(int(covered.sum()), len(covered), min(max(least, 0.0), 1.0)))


def too_little_variation(fake: Tensor, diversity: float, least: float = HELD, blocks: int = 10) -> float:
    """The p-value of the hypothesis that the mean distance of two generated samples is at least ``least · diversity``.

    It uses Student's t of the mean distances in independent blocks of samples.

    Args:
        fake: features (m, d).
        diversity: the mean distance of two real samples.
        least: the part of it that a healthy generator has.
        blocks: number of blocks, or somewhat more; at least four samples are needed.

    Example:
        >>> too_little_variation(torch.zeros(100, 2), diversity=1.0)
        0.0
    """
    from scipy.stats import t

    size = max(2, len(fake) // blocks)  # equal blocks, of pairs at least; what is left over is left out
    parts = torch.split(fake[: len(fake) // size * size], size)
    if len(parts) < 2:
        return 1.0
    found = torch.tensor([pairwise_diversity(part) for part in parts], dtype=torch.float64)
    excess, spread = found.mean().item() - least * diversity, found.std().item() / math.sqrt(len(found))
    if spread == 0:
        return float(excess >= 0)
    return float(t.cdf(excess / spread, len(found) - 1))


def level(false_alarms: float, look: int) -> float:
    r"""The level of the i-th test, such that all tests together have a false alarm rate of at most ``false_alarms``.

    α_i = α · 6 / (π i)², whose sum over all i is α.

    Example:
        >>> round(sum(level(0.01, look) for look in range(1, 100_000)), 5)
        0.01
    """
    return false_alarms * 6 / (math.pi * look) ** 2


def samples_to_decide(least_coverage: float, level: float, tests: int = 3) -> int:
    """The number of real samples needed to tell a coverage of 0 from ``least_coverage`` with certainty.

    The least n with ``tests`` (1 − least_coverage)ⁿ ≤ level.

    Example:
        >>> samples_to_decide(0.5, level=0.3, tests=3)
        4
    """
    return math.ceil(math.log(level / tests) / math.log1p(-least_coverage))


def samples_to_decide_on_conditions(level: float, tests: int) -> int:
    """The number of samples needed to tell that conditions are ignored: blocks of 25, all of them below.

    Example:
        >>> samples_to_decide_on_conditions(0.01, tests=2)
        200
    """
    return BLOCK * math.ceil(math.log2(tests / level))


def too_little_dependence(condition: Tensor, fake: Tensor, real: Tensor, least: float = 0.5) -> float:
    """The p-value of the hypothesis that samples depend on conditions at least ``least`` times as much as real ones.

    The rows are divided into at most 50 independent blocks of at least 25 rows. For a healthy
    generator, the squared distance correlation of conditions and samples is at least ``least`` times that of real
    samples in at least half of the blocks. The p-value is that of the exact sign test, by the binomial distribution.

    Args:
        condition: (n, d) features, or (n,) labels.
        fake: (n, d) features of the samples generated for these conditions.
        real: (n, d) features of the real samples of these conditions.
        least: share of the real samples' dependence.

    Example:
        >>> source = torch.randn(500, 2)
        >>> too_little_dependence(source, source.roll(1, 0), source) < 1e-3
        True
        >>> too_little_dependence(source, source, source)
        1.0
    """
    from scipy.stats import binom

    size = max(BLOCK, len(fake) // 50)
    blocks = len(fake) // size
    low = 0
    for start in range(0, blocks * size, size):
        rows = slice(start, start + size)
        found = condition_dependence(condition[rows], fake[rows], real[rows], permutations=1)
        low += found.dependence < least * found.real
    return float(binom.sf(low - 1, blocks, 0.5)) if blocks else 1.0


def too_little_consistency(
    real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor, least: float = 0.5
) -> float:
    """The p-value of the hypothesis that each class is at least ``least`` times as consistent as in real samples.

    Consistency is measured by the nearest real samples, as in
    :func:`~lightning_gan_stability.metrics.conditions.class_report`. The p-value is the number of classes times the
    smallest binomial probability.

    Example:
        >>> real, labels = torch.randn(200, 2), torch.arange(200) % 2
        >>> real[:, 0] += 20 * labels
        >>> too_little_consistency(real, labels, real, 1 - labels) < 1e-6
        True
    """
    from scipy.stats import binom

    report = class_report(real, real_labels, fake, fake_labels, permutations=1)
    known = [part for part in report.values() if part.n_fake]
    found = [
        float(binom.cdf(round(part.consistency * part.n_fake), part.n_fake, least * part.real_consistency))
        for part in known
    ]
    return min(1.0, len(found) * min(found)) if found else 1.0


def too_little_class_variation(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> float:
    """The p-value of the hypothesis that each class varies at least a fifth as much as its real samples.

    It is the smallest p-value of :func:`too_little_variation`, times the number of classes with at least 50 generated
    samples.

    Example:
        >>> real, labels = torch.randn(200, 2), torch.arange(200) % 2
        >>> too_little_class_variation(real, labels, real * labels[:, None], labels)
        0.0
    """
    found = []
    for label in torch.unique(real_labels).tolist():
        theirs, ours = fake[fake_labels == label], real[real_labels == label]
        if len(theirs) >= 50 and len(ours) >= 2:
            found.append(too_little_variation(theirs, pairwise_diversity(ours)))
    return min(1.0, len(found) * min(found)) if found else 1.0
