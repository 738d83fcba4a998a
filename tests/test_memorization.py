"""Nearest training samples: against brute force, against all permutations, under the null, and for copies."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, nhypergeom

from lightning_gan_stability.metrics import copying_test, memorization_test
from lightning_gan_stability.metrics.features import Pairs
from lightning_gan_stability.metrics.memorization import least_copies


def samples(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ---------- neighbours


@pytest.mark.parametrize("d", [1, 5, 40, 300])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_are_those_of_brute_force(d, own, dtype):
    """Far from the origin, with many duplicates too, for which a matrix product is not exact."""
    b = samples(90, d, 0).to(dtype) + 100
    b[50:] = b[:1] + 1e-5 * samples(40, d, 1).to(dtype)
    b[70:] = b[0]
    a = b if own else torch.cat([samples(30, d, 2).to(dtype) + 100, b[:5]])
    distances, rows = Pairs(a, b).nearest(4, torch.arange(len(a)) if own else None)
    every = np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy(), axis=2)
    if own:
        np.fill_diagonal(every, np.inf)
    np.testing.assert_allclose(distances.numpy(), np.sort(every, 1)[:, :4], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(every, rows.numpy(), 1), distances.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [3, 40])
def test_all_others_are_neighbours(d):
    x = samples(6, d, 0)
    distances, rows = Pairs(x, x).nearest(5, torch.arange(6))
    every = np.linalg.norm(x.double().numpy()[:, None] - x.double().numpy(), axis=2)
    np.testing.assert_allclose(distances.numpy(), np.sort(every, 1)[:, 1:], rtol=1e-12)
    assert [sorted(row) for row in rows.tolist()] == [[j for j in range(6) if j != i] for i in range(6)]


def test_neighbours_do_not_depend_on_chunks(monkeypatch):
    a, b = samples(50, 64, 0), samples(200, 64, 1)
    whole = Pairs(a, b).nearest(3)
    monkeypatch.setattr("lightning_gan_stability.metrics.features.CHUNK", 1000)
    parts = Pairs(a, b).nearest(3)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


# ---------- tests


def nearest(x, train):
    return np.linalg.norm(x.double().numpy()[:, None] - train.double().numpy(), axis=2).min(1)


def test_p_values_are_those_of_all_permutations():
    train, held_out, fake = samples(20, 2, 0), samples(5, 2, 1), samples(6, 2, 2) * 0.7
    found = memorization_test(train, held_out, fake, quantile=0.4)
    pooled = np.concatenate([nearest(fake, train), nearest(held_out, train)])

    def statistics(chosen):
        rest = [i for i in range(11) if i not in chosen]
        mine, theirs = pooled[list(chosen)], np.sort(pooled[rest])
        return (mine[:, None] < theirs).mean(), (mine < theirs[1]).sum()

    observed = statistics(range(6))
    null = np.array([statistics(chosen) for chosen in combinations(range(11), 6)])
    assert found.nearer == pytest.approx(observed[0])
    assert found.p_value == pytest.approx((null[:, 0] >= observed[0] - 1e-12).mean())
    assert found.p_copied == pytest.approx((null[:, 1] >= observed[1]).mean())
    assert found.copied == pytest.approx(max(0, (observed[1] / 6 - 2 / 6) / (1 - 2 / 6)))


@pytest.mark.parametrize(("d", "scale"), [(2, 1.0), (40, 1.0), (2, 0.0)])
def test_p_values_are_uniform_without_memorization(d, scale):
    """Whatever the distribution: values that are rounded have ties, which the tests take as such."""
    found = []
    for seed in range(400):
        draws = samples(200 + 60 + 70, d, seed)
        parts = (draws if scale else draws.mul(4).round()).split([200, 60, 70])
        found.append(memorization_test(*parts, quantile=0.1))
    rank = [each.p_value for each in found]
    copied = np.array([each.p_copied for each in found])
    if scale:
        assert kstest(rank, "uniform").pvalue > 0.01
    for level in (0.01, 0.05, 0.2):  # 400 draws: at most 3 standard deviations above
        slack = 3 * (level * (1 - level) / 400) ** 0.5
        assert (np.array(rank) <= level).mean() <= level + slack
        assert (copied <= level).mean() <= level + slack
    assert np.mean([each.nearer for each in found]) == pytest.approx(0.5, abs=0.01)


def test_a_tenth_of_copies_is_found():
    p_values, shares = [], []
    for seed in range(20):
        draws = samples(2500, 16, seed)
        train, held_out, fake = draws.split([1500, 500, 500])
        fake = fake.clone()
        fake[:50] = train[200:250] + 1e-3 * samples(50, 16, seed + 100)
        found = memorization_test(train, held_out, fake, pairs=50)
        assert {*found.samples.tolist()} == {*range(50)}
        assert torch.equal(found.neighbours, found.samples + 200)
        assert torch.allclose(found.distances, (fake[found.samples] - train[found.neighbours]).double().norm(dim=1))
        assert (found.distances.diff() >= 0).all()
        assert found.p_copied < 1e-4
        p_values.append(found.p_value)
        shares.append(found.copied)
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)
    assert np.median(p_values) < 0.02  # the rank test is weaker: the other nine tenths are as far as held-out samples


def test_novel_samples_are_not_copies():
    """Samples farther from the training data than held-out ones are bad, but not memorized."""
    train, held_out, fake = samples(300, 4, 0), samples(100, 4, 1), samples(100, 4, 2) + 3
    found = memorization_test(train, held_out, fake)
    assert found.p_value > 0.99
    assert found.p_copied > 0.9
    assert (found.copied, found.nearer < 0.1) == (0.0, True)


# ---------- copies, of any generator


def order_p(labels):
    """The p-value by counting, of labels in their order: True for held-out samples."""
    held = np.flatnonzero(labels)
    n, total = len(held), len(labels)
    ranks = [r for r in (1, 2, 4, 8) if r <= n]
    # the r-th held-out sample at a place, before which all others are training samples
    tails = [nhypergeom.sf(held[r - 1] - (r - 1) - 1, total, total - n, r) for r in ranks]
    return min(1.0, len(ranks) * min(tails))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_p_values_of_copying_are_those_of_all_labels(n):
    """Each choice of the held-out samples among all has a p-value; a share of at most α of them has α or less."""
    real, fake = samples(11, 2, 0), samples(6, 2, 1)
    order = nearest(real, fake).argsort()
    p_values = []
    for chosen in combinations(range(11), n):
        rest = [i for i in range(11) if i not in chosen]
        found = copying_test(real[rest], real[list(chosen)], fake).p_value
        assert found == pytest.approx(order_p(np.isin(order, chosen)), rel=1e-9)
        p_values.append(found)
    p_values = np.array(p_values)
    for p in np.unique(p_values):
        assert (p_values <= p + 1e-12).mean() <= p + 1e-12


@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 0.0])
def test_no_generator_that_copies_nothing_is_accused(scale, d):
    """Neither one of typical samples, nor one that collapsed to a point; the other test takes these for copies."""
    found, others = [], []
    for seed in range(200):
        train, held_out, fake = samples(340, d, seed).split([200, 80, 60])
        found.append(copying_test(train, held_out, scale * fake + 0.1))
        others.append(memorization_test(train, held_out, scale * fake + 0.1).p_copied)
    p_values = np.array([each.p_value for each in found])
    for level in (0.01, 0.05, 0.2):  # 200 draws: at most 3 standard deviations above
        assert (p_values <= level).mean() <= level + 3 * (level * (1 - level) / 200) ** 0.5
    assert all(each.copied == 0 for each in found if each.p_value > 0.05)
    if d == 40 and 0 < scale < 1:
        assert (np.array(others) <= 0.01).mean() > 0.9


@pytest.mark.parametrize(("share", "d", "noise"), [(0.1, 2, 0.0), (0.1, 16, 1e-3), (0.5, 2, 1e-4), (0.5, 16, 0.1)])
def test_the_share_of_copies_is_found(share, d, noise):
    shares = []
    for seed in range(10):
        train, held_out, fake = samples(2100, d, seed).split([1200, 400, 500])
        fake = fake.clone()
        copies = int(share * 500)
        fake[:copies] = train[:copies] + noise * fake[:copies]
        found = copying_test(train, held_out, fake)
        assert found.p_value < 1e-3
        shares.append(found.copied)
    assert np.mean(shares) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("n_train", "n"), [(1000, 100), (300, 7), (50, 60), (20, 1)])
@pytest.mark.parametrize("level", [0.006, 1e-3, 1e-5])
def test_how_many_copies_it_takes(n_train, n, level):
    """One copy less has a higher p-value: of training samples at the generated ones, held-out ones behind them all."""
    needed = least_copies(n_train, n, level)
    for copies in (n_train,) if needed == np.inf else (needed - 1, needed):
        train = torch.full((n_train, 1), 3.0)
        train[:copies] = 1.0
        found = copying_test(train, torch.full((n, 1), 2.0), torch.ones(5, 1))
        assert (found.p_value <= level) == (copies == needed)


def test_bad_features_of_copies():
    with pytest.raises(ValueError, match="must have the same width"):
        copying_test(samples(9, 2, 0), samples(5, 3, 1), samples(5, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"quantile": 0}, r"`quantile` must be in \(0, 1\), got 0"),
        ({"pairs": 0}, "`pairs` must be a positive integer, got 0"),
        ({"held_out": torch.zeros(1, 2)}, "`held_out` must have at least two samples, got 1"),
        ({"fake": torch.zeros(4, 3)}, "must have the same width"),
    ],
)
def test_bad_input(arguments, text):
    with pytest.raises(ValueError, match=text):
        memorization_test(
            **{"train": samples(9, 2, 0), "held_out": samples(5, 2, 1), "fake": samples(5, 2, 2)} | arguments
        )
