"""What can be said for certain of a generator that looks bad: exact tests, each against what a healthy one may be.

A healthy generator need not equal the data: it holds every mode with a fifth of its share or more, its samples are at
least a fifth as far from each other as real ones, and it covers a part of the data. Each test's p-value is that of the
worst of these generators, so that better ones are called bad even less often than the level says.
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
    """The share of the real data in modes that are surely lost, and the p-value of that."""

    mass: float
    p: float


def lost_modes(real: Tensor, fake: Tensor, covered: Tensor, modes: int, held: float = HELD) -> LostModes:
    r"""Whether modes are lost: whether they have less than ``held`` times their share of the generated samples.

    If a set of modes has ``held`` times its share or more, then of the r real and k generated samples in it each is
    generated with probability π = held m / (held m + n) or more, and P(k or fewer) is the binomial distribution's
    function at k of r + k. Sets are the one mode that has least, the two that have least, and so on; p is K times the
    smallest of their probabilities, with the number K of modes. A mode in which a fifth of the real samples have a
    generated one in their neighbourhood is not lost: a young generator is all over the place, and passes between
    narrow ones. A neighbourhood is no smaller than generated samples are far from the data (:func:`blur_of`).

    Args:
        real: the mode (n,) of each real sample, 0 ... K − 1.
        fake: the mode (m,) of each generated sample; they must not be those that the suspicion comes from.
        covered: whether a generated sample is near (n,) each real one; see :func:`covered_by`.
        modes: K.
        held: the part of a mode's share that a healthy generator has.

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
    """Whether a generated sample (m, d) is nearer to each real one (n, d) than its k-th real neighbour, (n,).

    The mean is the coverage of "Reliable Fidelity and Diversity Metrics for Generative Models",
    https://arxiv.org/abs/2002.09797.

    Args:
        fake: features (m, d).
        real: features (n, d).
        k: which neighbour.
        blur: a distance that is near, whatever the neighbours are; see :func:`blur_of`.

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
    """How far generated samples (m, d) lie from the data (n, d): the median distance to the nearest real one.

    It is no larger than distances in the data where a generator has learned them. That of a young one is wide: few of
    its samples are in the middle of a mode that it holds, and cells there would pass for lost.

    Example:
        >>> blur_of(torch.tensor([[0.5], [3.0], [9.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
        0.5
    """
    return float(Pairs(fake, real).nearest()[0].median())


def too_little_coverage(covered: Tensor, least: float) -> float:
    """The p-value of a coverage of ``least`` or more: the binomial distribution's function at the covered ones.

    Example:
        >>> round(too_little_coverage(torch.zeros(10, dtype=torch.bool), least=0.5), 6)
        0.000977
    """
    from scipy.stats import binom

    return float(binom.cdf(int(covered.sum()), len(covered), min(max(least, 0.0), 1.0)))


def too_little_variation(fake: Tensor, diversity: float, least: float = HELD, blocks: int = 10) -> float:
    """The p-value of a mean distance of two generated samples of ``least`` times ``diversity`` or more.

    Student's t of the mean distances in blocks of samples, which are independent of each other.

    Args:
        fake: features (m, d).
        diversity: the mean distance of two real samples.
        least: the part of it that a healthy generator has.
        blocks: how many, or one more; of fewer than four samples nothing can be said.

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
    r"""What a p-value must be below at the i-th look, so that all looks together err with ``false_alarms`` at most.

    α_i = α · 6 / (π i)², whose sum over all i is α.

    Example:
        >>> round(sum(level(0.01, look) for look in range(1, 100_000)), 5)
        0.01
    """
    return false_alarms * 6 / (math.pi * look) ** 2


def samples_to_decide(least_coverage: float, level: float, tests: int = 3) -> int:
    """How many real samples it takes until a coverage of 0 is surely less than ``least_coverage``.

    The least n with ``tests`` (1 − least_coverage)ⁿ ≤ level.

    Example:
        >>> samples_to_decide(0.5, level=0.3, tests=3)
        4
    """
    return math.ceil(math.log(level / tests) / math.log1p(-least_coverage))


def samples_to_decide_on_conditions(level: float, tests: int) -> int:
    """How many samples it takes until ignored conditions are surely ignored: blocks of 25, all of them below.

    Example:
        >>> samples_to_decide_on_conditions(0.01, tests=2)
        200
    """
    return BLOCK * math.ceil(math.log2(tests / level))


def too_little_dependence(condition: Tensor, fake: Tensor, real: Tensor, least: float = 0.5) -> float:
    """The p-value of samples that depend on their conditions ``least`` times as much as real ones do, or more.

    The rows are taken apart into blocks of 25 rows or more, 50 blocks at most, which are independent of each other. In
    each, the squared distance correlation of conditions and samples is less than ``least`` times that of real samples,
    or not; of a healthy generator it is not in half of the blocks or more. Exact is the sign test: the binomial
    distribution's function.

    Args:
        condition: (n, d) features, or (n,) labels.
        fake: (n, d) features of the samples generated for these conditions.
        real: (n, d) features of the real samples of these conditions.
        least: part of the real samples' dependence.

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
    """The p-value of classes whose samples look like their class ``least`` times as often as real ones do, or more.

    By the nearest real samples, as in :func:`~lightning_gan_stability.metrics.conditions.class_report`; the number of
    classes times the smallest of the binomial distribution's functions.

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
    """The p-value of classes that vary at least a fifth as much as real ones, :func:`too_little_variation` of each.

    The number of classes with 50 generated samples or more, times the smallest of their p-values.

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
