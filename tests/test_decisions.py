"""Exact tests: against SciPy, and how often they accuse a generator that is as bad as a healthy one may be."""

import numpy as np
import pytest
import torch
from scipy import spatial, stats

from lightning_gan_stability.metrics import density_coverage
from lightning_gan_stability.metrics.decisions import (
    blur_of,
    covered_by,
    level,
    lost_modes,
    too_little_coverage,
    too_little_variation,
)


def drawn(weights, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(weights), n, True, generator=generator)


def test_one_lost_mode_has_the_p_value_of_a_binomial_test():
    real, fake = torch.tensor([0] * 30 + [1] * 70), torch.tensor([0] * 2 + [1] * 198)
    found = lost_modes(real, fake, real == 1, modes=2)
    # of real and generated samples in mode 0, with a fifth of its share: 0.2 · 200 of 0.2 · 200 + 100 are generated
    alone = stats.binomtest(2, 32, 40 / 140, alternative="less").pvalue
    assert found.mass == 0.3
    assert found.p == pytest.approx(2 * alone, rel=1e-12)


def test_modes_are_lost_together():
    real = torch.arange(64) % 32
    fake = torch.arange(400) % 16
    found = lost_modes(real, fake, real < 16, modes=32)
    assert found.mass == 0.5
    together = stats.binomtest(0, 32, 80 / 144, alternative="less").pvalue
    assert found.p == pytest.approx(32 * together, rel=1e-9)


def test_a_mode_with_samples_near_it_is_not_lost():
    real = torch.arange(800) % 8
    fake = torch.arange(700) % 7
    near = (real < 7) | (torch.arange(800) % 3 == 0)
    assert lost_modes(real, fake, near, modes=8) == (0.0, 1.0)


@pytest.mark.parametrize("n", [64, 256, 2500])
def test_a_healthy_generator_is_seldom_accused(n):
    """One that holds two modes with a fifth of their share, which is the worst that is healthy."""
    weights = [0.2 / 8] * 2 + [(1 - 0.4 / 8) / 6] * 6
    found = [
        lost_modes(
            drawn([1.0] * 8, n, 2 * seed), drawn(weights, 2500, 2 * seed + 1), torch.zeros(n, dtype=torch.bool), 8
        ).p
        for seed in range(400)
    ]
    for alpha in (0.01, 0.05, 0.2):
        assert np.mean(np.array(found) <= alpha) <= alpha


@pytest.mark.parametrize(("n", "least"), [(64, 0.9), (256, 1.0), (2500, 1.0)])
def test_a_lost_mode_of_eight_is_found(n, least):
    found = []
    for seed in range(100):
        real = drawn([1.0] * 8, n, 2 * seed)
        fake = drawn([0.0] + [1.0] * 7, 2500, 2 * seed + 1)
        result = lost_modes(real, fake, real > 0, 8)
        found.append(result.p <= level(0.01, 1) and result.mass > 0.03)
    assert np.mean(found) >= least


def test_coverage_is_that_of_the_metric():
    torch.manual_seed(0)
    real, fake = torch.randn(300, 5), 0.5 * torch.randn(200, 5)
    covered = covered_by(fake, real)
    assert covered.double().mean().item() == density_coverage(real, fake).coverage
    count = int(covered.sum())
    expected = stats.binomtest(count, 300, 0.9, alternative="less").pvalue
    assert too_little_coverage(covered, 0.9) == pytest.approx(expected, rel=1e-9)
    assert too_little_coverage(covered, 0.0) == 1.0


def test_neighbourhoods_are_no_smaller_than_samples_are_off_the_data():
    torch.manual_seed(0)
    real, fake = torch.randn(200, 3, dtype=torch.float64), 2 * torch.randn(75, 3, dtype=torch.float64)
    apart = spatial.distance.cdist(fake, real)
    blur = np.median(apart.min(1))
    assert blur_of(fake, real) == pytest.approx(blur, rel=1e-12)
    radii = np.sort(spatial.distance.cdist(real, real), 1)[:, 5]
    assert min(radii) < blur < max(radii)
    for far in (0.0, blur, 2.0):
        expected = (apart < np.maximum(radii, far)).any(0)
        assert covered_by(fake, real, blur=far).tolist() == expected.tolist()


def test_the_middle_of_a_mode_is_lost_by_a_hole_and_not_by_width():
    """Where modes are not known, cells are parts of them: the middle one has half of the real samples."""
    torch.manual_seed(0)
    real = 0.05 * torch.randn(2500, 2)
    middle = lambda x: (x.norm(dim=1) > 0.05 * np.sqrt(2 * np.log(2))).long()  # noqa: E731
    wide = 0.5 * torch.randn(2500, 2)
    assert lost_modes(middle(real), middle(wide), covered_by(wide, real), 2).p < 1e-6
    near = covered_by(wide, real, blur=blur_of(wide, real))
    assert lost_modes(middle(real), middle(wide), near, 2) == (0.0, 1.0)
    hole = 0.05 * torch.randn(10_000, 2)
    hole = hole[middle(hole) == 1][:2500]
    found = lost_modes(middle(real), middle(hole), covered_by(hole, real, blur=blur_of(hole, real)), 2)
    assert found.mass == pytest.approx(0.5, abs=0.05)
    assert found.p < 1e-6


def test_variation_is_a_t_test_of_blocks():
    torch.manual_seed(0)
    fake = 0.1 * torch.randn(500, 3, dtype=torch.float64)
    means = [torch.pdist(part).mean().item() for part in fake.chunk(10)]
    expected = stats.ttest_1samp(means, 0.2 * 1.2, alternative="less").pvalue
    assert too_little_variation(fake, 1.2) == pytest.approx(expected, rel=1e-6)


def test_a_point_does_not_vary_and_a_generator_at_the_limit_is_seldom_accused():
    assert too_little_variation(torch.ones(100, 2), 1.0) == 0.0
    found = []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        fake = torch.randn(500, 1, generator=generator, dtype=torch.float64)
        found.append(too_little_variation(fake, 2 / np.sqrt(np.pi) / 0.2))  # E |x − y| = 2 / √π, a fifth of it
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert too_little_variation(torch.zeros(100, 2), 0.0) == 1.0


def test_levels_of_all_looks_together():
    assert sum(level(0.03, look) for look in range(1, 10**5)) == pytest.approx(0.03, rel=1e-4)
    assert level(0.01, 1) > level(0.01, 2)


@pytest.mark.parametrize("n", [4, 22, 28, 37, 64, 91, 399])
def test_variation_of_any_number_of_samples(n):
    """Blocks are of one size; a generator that varies as the data do is not accused, one that does not is."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(n))
    assert too_little_variation(x, 1.77) > 0.01
    assert too_little_variation(torch.zeros(n, 2), 1.77) == 0.0
    assert too_little_variation(x[:3], 1.77) == 1.0
