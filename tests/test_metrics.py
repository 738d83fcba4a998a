"""Metrics against independent implementations, closed forms and their nulls."""

import math
import os
from datetime import timedelta

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd
from toys import free_port

from lightning_gan_stability.metrics import (
    DensityCoverage,
    DigitClassifier,
    FrechetDistance,
    Inception,
    KernelDistance,
    PrecisionRecall,
    bin_difference,
    birthday_support,
    density_coverage,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    latent_sensitivity,
    mode_coverage,
    pairwise_diversity,
    precision_recall,
)
from lightning_gan_stability.metrics import features as parts
from lightning_gan_stability.metrics.features import Pairs

# (n, m, d): unequal sizes, fewer samples than features, one feature, narrow and wide
SIZES = [(60, 40, 1), (200, 150, 5), (300, 400, 40), (50, 70, 100), (30, 200, 64), (120, 100, 33)]


def pair(n, m, d, seed=0, shift=0.3, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=source, dtype=torch.float64) / math.sqrt(d)
    real = torch.randn(n, d, generator=source, dtype=torch.float64) @ mix + 5
    fake = 0.8 * torch.randn(m, d, generator=source, dtype=torch.float64) @ mix + 5 + shift
    return real.to(dtype), fake.to(dtype)


# ---------- Fréchet distance


def by_scipy(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    one, two = np.atleast_2d(np.cov(real, rowvar=False)), np.atleast_2d(np.cov(fake, rowvar=False))
    first, second = (scipy.linalg.eigh(c) for c in (one, two))
    root_one, _ = ((v * np.sqrt(np.clip(w, 0, None))) @ v.T for w, v in (first, second))
    trace = np.sqrt(np.clip(scipy.linalg.eigvalsh(root_one @ two @ root_one), 0, None)).sum()
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * trace


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frechet_distance_is_that_of_scipy(size, dtype):
    real, fake = pair(*size, dtype=dtype)
    assert frechet_distance(real, fake) == pytest.approx(by_scipy(real, fake), rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics():
    class Same(nn.Module):
        num_features = 20

        def forward(self, x):
            return x

    real, fake = pair(300, 200, 20)
    other = FrechetInceptionDistance(feature=Same(), normalize=True).set_dtype(torch.float64)
    other.update(real, real=True)
    other.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(other.compute().item(), rel=1e-6)


def test_frechet_distance_of_gaussians():
    d, one, two = 7, 4.0, 9.0
    shift = torch.arange(d, dtype=torch.float64)
    value = frechet_from_moments(torch.zeros(d), one * torch.eye(d), shift, two * torch.eye(d))
    assert value == pytest.approx(shift.square().sum().item() + d * (2 - 3) ** 2, rel=1e-12)
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    assert frechet_from_moments(torch.zeros(2), singular, torch.zeros(2), torch.eye(2)) == pytest.approx(1)


@pytest.mark.parametrize("size", SIZES)
def test_frechet_distance_of_equal_samples_is_0(size):
    real, _ = pair(*size)
    assert 0 <= frechet_distance(real, real.flip(0)) < 1e-9 * real.var(0).sum().item()
    assert frechet_distance(real, real + 1) == pytest.approx(size[2], rel=1e-9)


def test_frechet_distance_of_nearly_equal_and_ill_conditioned_features():
    real, _ = pair(500, 500, 30)
    real = real * 10.0 ** -torch.arange(30, dtype=torch.float64)[None].div(4)
    fake = real * 1.001
    exact = ((real.mean(0) * 0.001) ** 2).sum() + (0.001**2) * real.var(0).sum()
    assert frechet_distance(real, fake) == pytest.approx(exact.item(), rel=1e-6)


def test_bias_of_the_frechet_distance():
    """Two samples of the same N(0, I): 2d/n + d(d+1)/2n."""
    d, n = 16, 1000
    values = [frechet_distance(*torch.randn(2, n, d, generator=torch.Generator().manual_seed(s))) for s in range(20)]
    expected = 2 * d / n + d * (d + 1) / (2 * n)
    error = np.std(values) / math.sqrt(20)
    assert np.mean(values) == pytest.approx(expected, abs=4 * error)
    assert error < 0.03 * expected


# ---------- kernel distance


@pytest.mark.parametrize("size", SIZES)
def test_kernel_distance_is_the_unbiased_mmd(size):
    real, fake = (x.numpy() for x in pair(*size))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(real), len(fake)
    off = [k.sum() - np.trace(k) for k in (kernel(real, real), kernel(fake, fake))]
    expected = off[0] / (n * (n - 1)) + off[1] / (m * (m - 1)) - 2 * kernel(real, fake).mean()
    assert kernel_distance(*pair(*size)) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_that_of_torchmetrics_and_torch_fidelity():
    from torch_fidelity.metric_kid import kernel_mmd

    real, fake = pair(100, 100, 12, shift=1.0)
    ours = kernel_distance(real, fake)
    assert ours == pytest.approx(poly_mmd(real, fake).item(), rel=1e-6)
    assert ours == pytest.approx(float(kernel_mmd(real.numpy(), fake.numpy())), rel=1e-6)


def test_kernel_distance_of_subsets():
    real, fake = pair(400, 300, 6, shift=1.0)
    state = torch.get_rng_state()
    value = kernel_distance(real, fake, subsets=200, subset_size=100)
    assert torch.equal(state, torch.get_rng_state())
    assert value == kernel_distance(real, fake, subsets=200, subset_size=100)
    assert value == pytest.approx(kernel_distance(real, fake), rel=0.05)
    assert kernel_distance(real, real[:300].flip(0), subsets=1, subset_size=300) < 0  # unbiased, so it can be


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(*torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(s))) for s in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10


# ---------- neighbours


def distances(a, b):
    """In float64, by differences."""
    return np.sqrt(((a.double().numpy()[:, None] - b.double().numpy()[None]) ** 2).sum(-1))


def radius_of(samples, k):
    """The distance of each sample to the k-th of the distinct points that are nearest to it and are not itself."""
    points = np.unique(samples.double().numpy(), axis=0)
    if len(points) <= k:
        return np.zeros(len(samples))
    return np.sort(distances(samples, torch.from_numpy(points)), 1)[:, k]


def by_numpy(real, fake, k_pr=3, k_dc=5):
    cross = distances(fake, real)
    usual = np.sort(distances(fake, fake), 1)[:, k_pr]
    radius = [radius_of(real, k_pr), usual, radius_of(real, k_dc)]
    precision = (cross <= radius[0]).any(1).mean()
    recall = (cross <= radius[1][:, None]).any(0).mean()
    _, once = np.unique(real.double().numpy(), axis=0, return_index=True)  # equal samples have one ball
    density = (cross < radius[2])[:, once].sum() / (k_dc * len(fake))
    coverage = (cross.min(0) < radius[2]).mean()
    return precision, recall, density, coverage


def ours(real, fake):
    return (*precision_recall(real, fake), *density_coverage(real, fake))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [2**22, 500])
def test_neighbours_are_those_of_numpy(size, dtype, chunk, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK", chunk)
    real, fake = pair(*size, dtype=dtype)
    assert ours(real, fake) == pytest.approx(by_numpy(real, fake), rel=1e-12)


def test_neighbours_are_those_of_prdc():
    prdc = pytest.importorskip("prdc", reason="compares with prdc where it is installed")
    real, fake = pair(200, 150, 40)
    other = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    value = (*precision_recall(real, fake, k=5), *density_coverage(real, fake, k=5))
    assert value == pytest.approx([other[name] for name in ("precision", "recall", "density", "coverage")], rel=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = pair(200, 150, 40, dtype=torch.float32)
    # its first input is the generated one
    other = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=64, verbose=False)
    assert tuple(precision_recall(real, fake)) == pytest.approx((other["precision"], other["recall"]), rel=1e-6)


@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("points", [2, 6, 60, 150])
@pytest.mark.parametrize("chunk", [2**22, 500])
def test_neighbours_of_repeated_samples_are_those_of_numpy(d, dtype, points, chunk, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK", chunk)
    source = torch.Generator().manual_seed(points)
    real, fake = pair(180, 160, d, dtype=dtype)
    real, fake = (x[torch.randint(points, (len(x),), generator=source)] for x in (real, fake))
    fake[::3] = real[: len(fake[::3])]
    assert ours(real, fake) == pytest.approx(by_numpy(real, fake), rel=1e-12)


@pytest.mark.parametrize("d", [2, 100])
def test_a_perfect_generator_of_few_pairs_is_perfect(d):
    """400 sources, of which 2,500 samples repeat each about six times."""
    source = torch.Generator().manual_seed(0)
    targets = torch.randn(400, d, generator=source)
    drawn = targets[torch.randint(400, (2500,), generator=source)]
    assert precision_recall(targets, drawn) == (1, pytest.approx(1, abs=0.01))  # which leave one out
    assert precision_recall(drawn, drawn.flip(0)) == (1, 1)
    density, coverage = density_coverage(drawn, drawn.flip(0))
    assert density == pytest.approx(1, abs=0.05)  # k balls in the mean, those of k - 1 neighbours and its own
    assert coverage == 1


def test_a_generator_of_a_few_points_recalls_little():
    """Of eight points, each one a mode's centre, and as if each of them was moved by a hair."""
    torch.manual_seed(0)
    centers = 10 * torch.randn(8, 2)
    real = centers[torch.arange(800) % 8] + torch.randn(800, 2)
    fake = centers[torch.arange(800) % 8]
    nearly = fake + 1e-9 * torch.randn(800, 2)
    assert precision_recall(real, fake).recall == precision_recall(real, nearly).recall == 0


def test_zeros_of_either_sign_are_one_point():
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [5.0, 0.0], [5.0, -0.0], [9.0, 9.0]])
    assert parts.distinct(zeros)[1].tolist() == [2, 2, 1]


@pytest.mark.parametrize("d", [2, 64])
def test_ties_and_near_duplicates(d):
    """A lattice, where many pairs are exactly at the radius, far from 0, with points a rounding apart."""
    points = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    real = torch.zeros(64, d, dtype=torch.float64)
    real[:, :2] = points
    real += 1000.0
    fake = real[::2] + 1e-9
    for dtype in (torch.float32, torch.float64):
        a, b = real.to(dtype), torch.cat([fake, real[1:3]]).to(dtype)
        assert ours(a, b) == pytest.approx(by_numpy(a, b), rel=1e-12)
        assert tuple(precision_recall(a, a)) == (1, 1)


def test_one_sample_far_away_decides_nothing_for_others():
    """The rounding of its products is larger than all other distances."""
    real, fake = pair(150, 120, 64, dtype=torch.float32)
    real[7] *= 1e5
    fake[3] *= -1e5
    assert ours(real, fake) == pytest.approx(by_numpy(real, fake), rel=1e-12)


@pytest.mark.parametrize("way", ["autocast", "medium"])
def test_rounded_products_decide_nothing(way):
    real, fake = pair(200, 150, 256, dtype=torch.float32)
    expected = by_numpy(real, fake)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            value = ours(real, fake)
    else:
        kept = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            value = ours(real, fake)
        finally:
            torch.set_float32_matmul_precision(kept)
    assert value == pytest.approx(expected, rel=1e-12)


def test_many_duplicates_have_radius_0():
    same = torch.ones(50, 64)
    assert Pairs(same, same).radii(3).tolist() == [0.0] * 50
    assert tuple(precision_recall(same, same)) == (1, 1)
    assert density_coverage(same, same).coverage == 0  # strict


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_many_duplicates_of_few_samples_have_exact_radii(noise, monkeypatch):
    """What a collapsed generator makes; few rows need all their differences."""
    source = torch.Generator().manual_seed(0)
    samples = 3 * torch.randn(2, 64, generator=source).repeat(60, 1)
    samples += noise * torch.randn(samples.shape, generator=source)
    expected = torch.cdist(samples.double(), samples.double(), compute_mode="donot_use_mm_for_euclid_dist")
    taken = []
    at_once = parts.rows_at_once
    monkeypatch.setattr(parts, "rows_at_once", lambda width: taken.append(width) or at_once(width))
    radii = Pairs(samples, samples).radii(3)
    torch.testing.assert_close(radii, expected.kthvalue(4, dim=1).values, rtol=1e-12, atol=0)
    assert samples.numel() not in taken  # the width of all differences of a row


@pytest.mark.parametrize("n", [3, 256, 300, 520])
def test_products_by_blocks_are_the_whole_ones(n):
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2 * n, n, generator=source, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(parts.gram(x), x.T @ x)
    lower = torch.linalg.cholesky(x.T @ x)
    whole = lower.T @ (y.T @ y) @ lower
    torch.testing.assert_close(parts.sandwich(lower, y.T @ y).tril(), whole.tril())


def test_nulls():
    """Coverage 1 − Π (N−i)/(N+M−i), density 1, precision and recall about .79 for N = M = 1000, d = 16."""
    n, k = 1000, 5
    runs = [torch.randn(2, n, 16, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    values = [(*precision_recall(a, b), *density_coverage(a, b, k)) for a, b in runs]
    precision, recall, density, coverage = np.mean(values, 0)
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert coverage == pytest.approx(expected, abs=0.005)
    assert density == pytest.approx(1, abs=0.05)
    assert (precision, recall) == pytest.approx((0.79, 0.79), abs=0.02)


@pytest.mark.parametrize("move", ["translated", "permuted", "rotated"])
def test_invariance(move):
    real, fake = pair(120, 100, 40)
    if move == "translated":
        other = real + 100, fake + 100
    elif move == "permuted":
        other = real.flip(0), fake.flip(0)
    else:
        turn = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
        other = real @ turn, fake @ turn
    assert ours(*other) == pytest.approx(ours(real, fake), rel=1e-9)
    assert frechet_distance(*other) == pytest.approx(frechet_distance(real, fake), rel=1e-8)


def test_memory_does_not_grow_with_the_square(monkeypatch):
    seen, cdist = [], torch.cdist
    monkeypatch.setattr(parts, "CHUNK", 2**14)
    monkeypatch.setattr(torch, "cdist", lambda *a, **k: seen.append(cdist(*a, **k)) or seen[-1])
    density_coverage(*torch.randn(2, 2000, 2))
    assert max(x.numel() for x in seen) <= 2**14


# ---------- modes


def test_modes_by_centres():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    samples = torch.cat([centers[0] + 0.1 * torch.ones(30, 2), centers[1].expand(10, 2), torch.full((10, 2), 5.0)])
    found = mode_coverage(samples, centers, 0.1, least=10)
    assert found.counts.tolist() == [30, 10, 0, 0]
    assert (found.modes, found.high_quality) == (2, 0.8)
    assert found.reverse_kl == pytest.approx(0.75 * math.log(4 * 0.75) + 0.25 * math.log(4 * 0.25))
    assert mode_coverage(samples, centers, 0.1, least=11).modes == 1
    assert mode_coverage(samples + 3, centers, 0.1).reverse_kl == math.inf


def test_modes_by_classes():
    assert mode_coverage(torch.tensor([0, 1, 1, 3]), classes=4, least=1).counts.tolist() == [1, 2, 0, 1]
    sure = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3]])
    assert mode_coverage(sure, classes=3).high_quality == 0.5


def test_a_mode_needs_20_of_2500_on_the_ring():
    centers = torch.stack([torch.arange(8.0), torch.zeros(8)], 1) * 10
    for count, modes in ((20, 8), (19, 7)):
        rows = torch.cat([torch.zeros(count, dtype=torch.long), 1 + torch.arange(2500 - count) % 7])
        assert mode_coverage(centers[rows], centers, 0.01).modes == modes


def test_a_perfect_generator():
    """98.9 % lie within three standard deviations in two dimensions; reverse KL has the floor (K − 1)/2n."""
    source, k, n = torch.Generator().manual_seed(0), 8, 2500
    centers = 100.0 * torch.stack([torch.arange(k).float(), torch.zeros(k)], 1)
    runs = []
    for _ in range(40):
        rows = torch.randint(k, (n,), generator=source)
        runs.append(mode_coverage(centers[rows] + torch.randn(n, 2, generator=source), centers, 1.0))
    assert np.mean([r.high_quality for r in runs]) == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert np.mean([r.reverse_kl for r in runs]) == pytest.approx((k - 1) / (2 * n), rel=0.3)


# ---------- bins, birthdays, diversity, sensitivity


def test_bins_of_equal_distributions_differ_by_chance():
    shares = [
        bin_difference(*torch.randn(2, 2000, 4, generator=torch.Generator().manual_seed(s)), bins=40).share
        for s in range(6)
    ]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.04)


def test_bins_of_a_lost_mode_differ():
    real, _ = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    real[:250] += 20
    found = bin_difference(real, real[250:], bins=10)
    assert found.share >= 0.8  # most others have a third more, which some have too few samples to show
    p, q = np.array([0.25, 0.75]), np.array([0.0, 1.0])
    middle = (p + q) / 2
    js = (p * np.log(p / middle)).sum() / 2 + (q[1] * np.log(q[1] / middle[1])) / 2
    assert found.js == pytest.approx(js, rel=0.05)


@pytest.mark.parametrize(("support", "days"), [(100, 12), (1000, 38)])
def test_birthdays(support, days):
    source = torch.Generator().manual_seed(0)
    samples = torch.randint(support, (8 * support if support < 500 else 3000, 1), generator=source).float()
    estimate = birthday_support(samples, 0.0)
    assert math.sqrt(estimate * 2 * math.log(2)) == pytest.approx(days, abs=2)


def test_birthdays_at_the_ends():
    assert birthday_support(torch.arange(10.0)[:, None], 0.5) == math.inf
    assert birthday_support(torch.zeros(3000, 2), 0.0) == pytest.approx(4 / (2 * math.log(2)))


def test_diversity():
    assert pairwise_diversity(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)
    a = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    expected = distances(a, a).sum() / (50 * 49)
    assert pairwise_diversity(a) == pytest.approx(expected, rel=1e-9)


def test_sensitivity_of_a_linear_generator():
    layer = nn.Linear(6, 20).double()
    latents = torch.randn(10, 6, dtype=torch.float64)
    assert latent_sensitivity(layer, latents) == pytest.approx(layer.weight.norm().item(), rel=1e-9)
    some = latent_sensitivity(layer, latents, directions=3)
    assert 0.3 < some / layer.weight.norm().item() < 3
    assert latent_sensitivity(lambda z: z * 0, latents) == 0


def test_sensitivity_against_differences():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    z = torch.randn(4, 3, dtype=torch.float64)
    columns = [(net(z + 1e-6 * u) - net(z - 1e-6 * u)) / 2e-6 for u in torch.eye(3, dtype=torch.float64)]
    expected = torch.stack(columns).square().sum((0, 2)).sqrt().mean().item()
    assert latent_sensitivity(net, z) == pytest.approx(expected, rel=1e-7)


# ---------- statistics


@pytest.mark.parametrize(
    ("statistic", "function"),
    [
        (lambda: FrechetDistance(5), frechet_distance),
        (KernelDistance, kernel_distance),
        (PrecisionRecall, precision_recall),
        (DensityCoverage, density_coverage),
    ],
)
def test_statistics_of_batches_are_the_functions_of_all(statistic, function):
    real, fake = pair(90, 70, 5)
    real, fake = real + 1e6, fake + 1e6  # large means
    whole = statistic()
    for side, name in ((real, True), (fake, False)):
        for part in side.split([1, 30, len(side) - 31]):
            whole.update(part, real=name)
    value = whole.compute()
    expected = function(real, fake)
    got = list(value.values()) if isinstance(value, dict) else [value]
    want = list(expected) if isinstance(expected, tuple) else [expected]
    assert [x.item() for x in got] == pytest.approx(want, rel=1e-5)
    whole.reset()
    whole.update(real, real=True)
    with pytest.raises(ValueError, match="`fake` must have at least two samples, got 0"):
        whole.compute()


def test_states_of_ranks_are_merged():
    real, fake = pair(90, 70, 5)
    ranks = [FrechetDistance(5), FrechetDistance(5)]
    for rank, statistic in enumerate(ranks):
        statistic.update(real[rank::2], real=True)
        statistic.update(fake[rank::2], real=False)
    whole = FrechetDistance(5)
    for side in ("real", "fake"):
        reduce = whole._reductions[side]
        setattr(whole, side, reduce(torch.stack([getattr(statistic, side) for statistic in ranks])))
    whole._update_count = 1
    assert whole.compute().item() == pytest.approx(frechet_distance(real, fake), rel=1e-9)


def cases():
    made = {
        "Frechet": lambda: FrechetDistance(5),
        "Kernel": KernelDistance,
        "PrecisionRecall": PrecisionRecall,
        "DensityCoverage": DensityCoverage,
    }
    return pytest.mark.parametrize("statistic", made.values(), ids=made.keys())


def numbers(value):
    return [x.item() for x in (value.values() if isinstance(value, dict) else [value])]


@cases()
@pytest.mark.parametrize(
    ("features", "text"),
    [
        (torch.full((1, 5), math.nan), "`features` has features that are not finite"),
        (torch.tensor([[0.0, 0, 0, math.inf, 0]] * 4), "`features` has features that are not finite"),
        (torch.full((2, 5), 1e200, dtype=torch.float64), r"`features` has features above 1e\+150, whose squares"),
        (torch.randn(4, 7), "`features` must have .*5 columns.*, got 7"),
        (torch.randn(1, 7), "`features` must have .*5 columns.*, got 7"),
        (torch.randn(0, 7), "`features` must have .*5 columns.*, got 7"),
        (torch.randn(5), r"`features` must be floating-point features of shape \(n, d\), .* of shape \(5,\)"),
        (torch.randn(4, 5, 1), r"`features` must be floating-point features of shape \(n, d\)"),
        (torch.randn(4, 0), r"`features` must be floating-point features of shape \(n, d\)"),
        (torch.ones(4, 5, dtype=torch.int64), "`features` must be floating-point features .*got torch.int64"),
        (torch.ones(4, 5, dtype=torch.bool), "`features` must be floating-point features .*got torch.bool"),
        ([[0.0] * 5], "`features` must be floating-point features .*got a list"),
    ],
)
@pytest.mark.parametrize("side", [True, False])
def test_a_batch_that_is_refused_leaves_those_before_as_they_were(statistic, features, text, side):
    real, fake = pair(30, 20, 5)
    good, bad = statistic(), statistic()
    for metric in (good, bad):
        metric.update(real, real=True)
        metric.update(fake[:10], real=False)
        if metric is bad:
            with pytest.raises(ValueError, match=text):
                metric.update(features, real=side)
        metric.update(fake[10:], real=False)
    assert numbers(bad.compute()) == numbers(good.compute())


@cases()
def test_the_number_of_samples_counts_in_the_end_alone(statistic):
    real, fake = pair(30, 20, 5)
    whole, parted = statistic(), statistic()
    whole.update(real, real=True)
    whole.update(fake, real=False)
    for row in real.split(1):
        parted.update(row, real=True)
        parted.update(row[:0], real=True)
    parted.update(fake[:0], real=False)
    with pytest.raises(ValueError, match="`fake` must have at least two samples, got 0"):
        parted.compute()
    parted.update(fake[:1], real=False)
    with pytest.raises(ValueError, match="`fake` must have at least two samples, got 1"):
        parted.compute()
    parted.update(fake[1:], real=False)
    assert numbers(parted.compute()) == pytest.approx(numbers(whole.compute()), rel=1e-9)


def synced(rank, port, folder):
    """What each of two processes computes, whose second has no real features; and of different widths, no features."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = []
    for dtype in (torch.float32, torch.float16):
        real, fake = pair(30, 20, 5, dtype=dtype)
        for make in (lambda: FrechetDistance(5), KernelDistance, PrecisionRecall, DensityCoverage):
            metric = make()
            if rank == 0:
                metric.update(real, real=True)
            metric.update(fake[rank::2], real=False)
            found.append(numbers(metric.compute()))
    empty, widths = KernelDistance(), KernelDistance()
    widths.update(torch.randn(4, 2 + rank), real=True)
    widths.update(torch.randn(4, 2 + rank), real=False)
    for metric in (empty, widths):
        try:
            metric.compute()
        except ValueError as error:
            found.append(str(error))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_of_which_one_has_nothing(tmp_path):
    torch.multiprocessing.spawn(synced, (free_port(), str(tmp_path)), nprocs=2)
    expected = []
    for dtype in (torch.float32, torch.float16):
        real, fake = pair(30, 20, 5, dtype=dtype)
        together = torch.cat([fake[::2], fake[1::2]])
        for function in (frechet_distance, kernel_distance, precision_recall, density_coverage):
            value = function(real, together)
            expected += value if isinstance(value, tuple) else [value]
    for rank in range(2):
        *values, empty, widths = torch.load(tmp_path / f"{rank}.pt")
        assert [x for value in values for x in value] == pytest.approx(expected, rel=1e-6)
        assert empty == "`real` must have at least two samples, got 0."
        assert widths == "Features must have the same width, but processes have between 2 and 3."


# ---------- images


class Fake(nn.Module):
    """Stands in for the network of Inception: the means of 8-bit images."""

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return (pixels.float().mean((2, 3)),)


def inception():
    extractor = Inception()
    extractor.network = Fake()
    return extractor


def photographs(n=64):
    """Real images in [-1, 1], of all brightnesses."""
    generator = torch.Generator().manual_seed(0)
    brightness = torch.rand(n, 1, 1, 1, generator=generator)
    return (brightness + 0.5 * torch.rand(n, 3, 8, 8, generator=generator)).clamp(0, 1) * 2 - 1


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            lambda x: ((x + 1) * 127.5).byte(),
            r"floating-point images in \[-1, 1\], got torch.uint8: scale them by x / 127",
        ),
        (lambda x: ((x + 1) * 127.5).long(), "got torch.int64"),
        (
            lambda x: (x + 1) * 127.5,
            r"got values in [\d.]+ \.\.\. 255: scale them, those in 0 \.\.\. 255 by x / 127.5 - 1",
        ),
        (lambda x: ((x + 1) * 127.5).half(), r"got values in .* \.\.\. 255"),
        (
            lambda x: (x + 1) / 2,
            r"none of 64 has a value below 0, as images in \[0, 1\] have none: scale them by 2 x - 1",
        ),
    ],
)
def test_images_in_other_ranges_are_refused(images, text):
    with pytest.raises(ValueError, match=text):
        inception()(images(photographs()))
    digits = photographs()[:, :1]
    with pytest.raises(ValueError, match=text):
        DigitClassifier()(images(digits))


def test_images_in_0_1_are_refused_in_small_batches_too():
    extractor = inception()
    batches = ((photographs() + 1) / 2).split(4)
    for batch in batches[:12]:
        extractor(batch)
    with pytest.raises(ValueError, match="none of 52 has a value below 0"):
        extractor(batches[12])


def test_what_a_generator_makes_is_not_refused():
    """It may leave [-1, 1], and be bright: after real images whatever it is, and before them what no range excludes."""
    extractor = inception()
    extractor(photographs())
    bright = torch.full((64, 3, 8, 8), 0.9)
    for samples in (bright, bright - 0.9, 1.05 * photographs(), (photographs() + 1) / 2):
        extractor(samples)
    with pytest.warns(UserWarning, match=r"takes images in \[-1, 1\], and 100% of these values lie outside"):
        assert extractor(200 * bright).unique().tolist() == [255]  # a generator that diverges
    extractor(200 * bright)  # said once
    first = inception()
    for samples in (bright, bright + 0.15, 1.05 * photographs(), photographs()):
        first(samples)


def test_clamped_and_rounded_as_files_are():
    extractor = inception()
    images = torch.tensor([-1.0, 1.0, -1.4, 0.0])[:, None, None, None].expand(4, 1, 8, 8)
    assert extractor(images)[:, 0].tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_has_no_features(bad):
    images = photographs(8)
    expected = inception()(images)
    images[3, 1, 2, 2] = bad
    features = inception()(images)
    assert features[3].isnan().all()
    assert torch.equal(features[torch.arange(8) != 3], expected[torch.arange(8) != 3])
    assert inception()(torch.full((2, 3, 8, 8), bad)).isnan().all()


# ---------- bad input

GOOD = torch.randn(10, 3)


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall, density_coverage])
@pytest.mark.parametrize(
    ("fake", "text"),
    [
        (torch.zeros(1, 3), "`fake` must have at least two samples, got 1"),
        (torch.zeros(0, 3), "`fake` must have at least two samples, got 0"),
        (torch.zeros(10, 4), "Features must have the same width, but `real` has 3 and `fake` has 4"),
        (torch.full((10, 3), math.nan), r"`fake` has features that are not finite"),
        (torch.full((10, 3), math.inf), r"`fake` has features that are not finite"),
        (
            torch.zeros(10),
            r"`fake` must be floating-point features of shape \(n, d\), got torch.float32 of shape \(10,\)",
        ),
        (torch.zeros(10, 3, dtype=torch.uint8), r"`fake` must be floating-point features .* got torch.uint8"),
    ],
)
def test_bad_features(function, fake, text):
    with pytest.raises(ValueError, match=text):
        function(GOOD, fake)


@pytest.mark.parametrize("function", [precision_recall, density_coverage])
def test_bad_neighbours(function):
    with pytest.raises(ValueError, match="`k` must be a positive integer, got 0"):
        function(GOOD, GOOD, k=0)
    with pytest.raises(ValueError, match="`real` must have more than k = 10 samples, got 10"):
        function(GOOD, GOOD, k=10)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"Exactly one of `centers` \(with `std`\) and `classes`"):
        mode_coverage(GOOD)
    with pytest.raises(ValueError, match=r"must be at least two class numbers in 0 \.\.\. 3"):
        mode_coverage(torch.tensor([0, 4]), classes=4)
    with pytest.raises(ValueError, match=r"probabilities \(n, 3\) whose rows sum to 1"):
        mode_coverage(GOOD, classes=3)
    with pytest.raises(ValueError, match="`bins` must be at most half the number of real samples, got 100 for 10"):
        bin_difference(GOOD, GOOD)
    with pytest.raises(ValueError, match="`subset_size` must be at least 2"):
        kernel_distance(GOOD, GOOD, subsets=1, subset_size=1)
    with pytest.raises(ValueError, match="`subsets` must be a positive integer"):
        kernel_distance(GOOD, GOOD, subsets=0)
    with pytest.raises(ValueError, match="`directions`"):
        latent_sensitivity(nn.Identity(), GOOD, directions=0)
    with pytest.raises(ValueError, match="`trials` must be a positive integer"):
        birthday_support(GOOD, 0.0, trials=0)


@pytest.mark.parametrize(
    ("place", "moment", "text"),
    [
        (0, torch.zeros(3), r"`cov1` must be finite and of shape \(d, d\), with d = 3 features, got .* \(2, 2\)"),
        (1, torch.eye(3), "`cov1` must be finite and of shape"),
        (2, torch.zeros(3), r"`mean2` must be finite and of shape \(d\), with d = 2"),
        (3, torch.full((2, 2), math.nan), "`cov2` must be finite"),
        (0, torch.zeros(()), "`mean1` must be"),
    ],
)
def test_bad_moments(place, moment, text):
    moments = [torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)]
    moments[place] = moment
    with pytest.raises(ValueError, match=text):
        frechet_from_moments(*moments)


def test_one_centre_is_enough():
    samples = torch.tensor([[0.0, 0.0]] * 30 + [[9.0, 9.0]] * 10)
    found = mode_coverage(samples, torch.zeros(1, 2), 1.0)
    assert (found.modes, found.high_quality) == (1, 0.75)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e18, 1e30])
def test_the_scale_of_features_changes_nothing(scale):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 40, generator=generator) for n in (80, 90))
    for function in (precision_recall, density_coverage):
        assert function(x * scale, y * scale) == pytest.approx(function(x, y), abs=0.02)  # values are rounded anew
