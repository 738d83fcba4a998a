"""Samples and their conditions: against definitions, all permutations and closed forms, under the null, and faults."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact, kstest, permutation_test
from sklearn.neighbors import KNeighborsClassifier
from torch import distributed as dist
from torch import multiprocessing as mp

from lightning_gan_stability.distributed import gather_rows
from lightning_gan_stability.metrics import class_report, condition_dependence
from lightning_gan_stability.metrics.statistics import Seen
from lightning_gan_stability.monitors.reading import Reading
from lightning_gan_stability.outputs import Unpacked


def samples(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(x):
    x = x.numpy().astype(float)
    return np.linalg.norm(x[:, None] - x, axis=2)


def centred(d):
    """U-centring by its definition, entry by entry."""
    n = len(d)
    out = np.zeros_like(d)
    for i, j in product(range(n), repeat=2):
        if i != j:
            out[i, j] = d[i, j] - d[i].sum() / (n - 2) - d[:, j].sum() / (n - 2) + d.sum() / ((n - 1) * (n - 2))
    return out


def correlation(a, b):
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


# ---------- dependence


def test_the_correlation_is_that_of_its_definition():
    condition, fake = samples(40, 3), samples(40, 4, seed=1)
    fake[:, 0] += condition[:, 0]
    expected = correlation(centred(distances(condition)), centred(distances(fake)))
    assert condition_dependence(condition, fake).dependence == pytest.approx(expected, rel=1e-11)
    labels = torch.arange(40) % 4
    same = (labels[:, None] != labels).double().numpy()
    expected = correlation(centred(same), centred(distances(fake)))
    assert condition_dependence(labels, fake).dependence == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_correlation_of_gaussians(rho):
    """The closed form of Székely, Rizzo and Bakirov (2007), theorem 7, for the squared distance correlation."""
    x, e = samples(2000, 1), samples(2000, 1, seed=1)
    found = condition_dependence(x, rho * x + math.sqrt(1 - rho**2) * e, permutations=1)

    def covariance(r):
        return r * math.asin(r) + math.sqrt(1 - r**2) - r * math.asin(r / 2) - math.sqrt(4 - r**2) + 1

    assert found.dependence == pytest.approx(covariance(rho) / (1 + math.pi / 3 - math.sqrt(3)), abs=0.03)


def test_the_p_value_is_that_of_all_permutations():
    condition, fake = samples(6, 2), samples(6, 2, seed=1)
    fake += condition
    a, b = centred(distances(condition)), centred(distances(fake))
    null = np.array([(a * b[np.ix_(p, p)]).sum() for p in permutations(range(6))])
    expected = (null >= (a * b).sum() - 1e-12).mean()
    assert 0.01 < expected < 0.3
    found = condition_dependence(condition, fake, permutations=20000).p_value
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / 20000))


def test_the_p_value_of_less_dependence_is_that_of_all_exchanges():
    condition, real, fake = samples(8, 2), samples(8, 2, seed=1), samples(8, 2, seed=2)
    real += 0.7 * condition
    a = centred(distances(condition))

    def difference(chosen):
        first, second = real.clone(), fake.clone()
        first[chosen], second[chosen] = fake[chosen], real[chosen]
        return (a * (centred(distances(first)) - centred(distances(second)))).sum()

    null = np.array([difference(torch.tensor(chosen)) for chosen in product([False, True], repeat=8)])
    expected = (null >= null[0] - 1e-9).mean()
    assert 0.01 < expected < 0.5
    found = condition_dependence(condition, fake, real, permutations=20000).p_weaker
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / 20000))


def test_p_values_are_uniform_under_their_hypotheses():
    independent, alike = [], []
    for seed in range(300):
        condition, one, two = samples(3, 40, 5, seed=seed).unbind()
        independent.append(condition_dependence(condition, one, permutations=199, seed=seed).p_value)
        found = condition_dependence(condition, condition + one, condition + two, permutations=199, seed=seed)
        alike.append(found.p_weaker)
    assert kstest(independent, "uniform").pvalue > 0.01
    assert kstest(alike, "uniform").pvalue > 0.01


def translated(n=500, seed=0):
    """Sources, their translations, and those of a generator that is as good as the data."""
    source, one, two = samples(3, n, 64, seed=seed).unbind()
    turn = torch.linalg.qr(samples(64, 64, seed=99)).Q
    return source, source @ turn + 0.3 * one, source @ turn + 0.3 * two


def test_a_translation_of_the_source():
    source, real, fake = translated()
    found = condition_dependence(source, fake, real)
    assert found.p_value == 0.001
    assert found.p_weaker > 0.05
    assert found.ratio == pytest.approx(1, abs=0.02)
    assert found.ratio == found.dependence / found.real


@pytest.mark.parametrize("fault", ["another row", "ignored", "constant"])
def test_a_translation_of_nothing_or_of_another_source(fault):
    """The marginal distribution may be exact."""
    p_values = []
    for seed in range(20):
        source, real, fake = translated(200, seed)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        wrong = {
            "another row": fake[order],
            "ignored": samples(200, 64, seed=seed + 50) * fake.std(),
            "constant": torch.full_like(fake, 0.3),
        }
        found = condition_dependence(source, wrong[fault], real, permutations=499)
        assert abs(found.ratio) < 0.05
        assert found.p_weaker == 1 / 500
        p_values.append(found.p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.2  # 20 uniform values: five below is improbable
    assert fault != "constant" or p_values == [1.0] * 20


def test_labels_are_conditions():
    labels = torch.arange(300) % 3
    real, fake = (samples(300, 2, seed=seed) + 3 * torch.eye(3, 2, dtype=torch.float64)[labels] for seed in (0, 1))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    good, bad = (condition_dependence(labels, x, real) for x in (fake, fake[order]))
    assert (good.p_value, bad.p_weaker) == (0.001, 0.001)
    assert good.p_weaker > 0.05
    bools = condition_dependence(labels > 0, fake)
    assert bools.dependence == condition_dependence((labels > 0).long(), fake).dependence


def test_nothing_to_depend_on():
    """One class, or as many as samples, is no information; rounding is not taken for some."""
    for labels in (torch.zeros(50, dtype=torch.long), torch.arange(50)):
        found = condition_dependence(labels, samples(50, 3), samples(50, 3, seed=1))
        assert found[:3] == (0, 1, 0)
        assert math.isnan(found.ratio)
        assert found.p_weaker == 1


def test_values_do_not_depend_on_scale_or_seed_of_others():
    source, real, fake = translated(60)
    expected = condition_dependence(source, fake, real)
    state = torch.get_rng_state()
    assert condition_dependence(1e3 * source, 1e3 * fake, 1e3 * real) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(state, torch.get_rng_state())


# ---------- classes


def classes(n, m, c=3, d=4, seed=0, apart=2.0):
    labels, asked = torch.arange(n) % c, torch.arange(m) % c
    centres = apart * torch.eye(c, d, dtype=torch.float64)
    return samples(n, d, seed=seed) + centres[labels], labels, samples(m, d, seed=seed + 1) + centres[asked], asked


def test_shares_are_those_of_scikit_learn():
    real, labels, fake, asked = classes(120, 90)
    report = class_report(real, labels, fake, asked, k=1)
    predicted = KNeighborsClassifier(1).fit(real, labels).predict(fake)
    for c, row in report.items():
        others = [
            KNeighborsClassifier(1)
            .fit(np.delete(real.numpy(), i, 0), np.delete(labels.numpy(), i))
            .predict(real[i : i + 1])[0]
            for i in (labels == c).nonzero().flatten().tolist()
        ]
        assert (row.n_real, row.n_fake) == (40, 30)
        assert row.consistency == pytest.approx((predicted[asked == c] == c).mean())
        assert row.real_consistency == pytest.approx(np.mean(np.array(others) == c))


def test_majorities_are_those_of_scikit_learn():
    real, labels, fake, asked = classes(120, 90, c=2)
    predicted = KNeighborsClassifier(5).fit(real, labels).predict(fake)  # odd and two classes: no ties
    for c, row in class_report(real, labels, fake, asked, k=5).items():
        assert row.consistency == pytest.approx((predicted[asked == c] == c).mean())


def test_the_nearest_decides_a_tie():
    real, labels = torch.tensor([[0.0], [1.0], [3.0], [4.0], [90.0]]), torch.tensor([7, 3, 3, 7, 5])
    fake, asked = torch.tensor([[-1.0], [1.9], [3.0]]), torch.tensor([7, 3, 3])
    report = class_report(real, labels, fake, asked, k=4)
    assert (report[7].consistency, report[3].consistency) == (1, 1)
    assert [*report] == [3, 5, 7]


def test_p_values_of_shares_are_those_of_fisher():
    real, labels, fake, asked = classes(150, 90, apart=1.5)
    for row in class_report(real, labels, fake.roll(1, 0), asked).values():
        hits, fake_hits = round(row.real_consistency * 50), round(row.consistency * 30)
        table = [[fake_hits, 30 - fake_hits], [hits, 50 - hits]]
        assert row.p_consistency == pytest.approx(fisher_exact(table, alternative="less").pvalue)


def test_diversity_and_its_p_value():
    real, fake = samples(5, 3), 0.8 * samples(5, 3, seed=1)
    labels = torch.zeros(5, dtype=torch.long)
    (row,) = class_report(real, labels, fake, labels, k=1, permutations=20000).values()
    ours, theirs = distances(real), distances(fake)
    assert row.diversity == pytest.approx(theirs.sum() / ours.sum())
    pooled = distances(torch.cat([fake, real]))

    def difference(first, second, axis=-1):
        first, second = np.atleast_2d(first).astype(int), np.atleast_2d(second).astype(int)
        inside = [[pooled[np.ix_(rows, rows)].sum() for rows in side] for side in (first, second)]
        return np.subtract(*inside)

    test = permutation_test(
        (np.arange(5), np.arange(5, 10)), lambda x, y: difference(x, y)[0], alternative="less", n_resamples=np.inf
    )
    assert 0.02 < test.pvalue < 0.98
    assert row.p_diversity == pytest.approx(test.pvalue, abs=0.015)


def test_p_values_of_classes_hold_their_level():
    found = []
    for seed in range(100):
        report = class_report(*classes(120, 90, seed=2 * seed), permutations=199, seed=seed)
        found += [(row.p_consistency, row.p_diversity) for row in report.values()]
    shares, diversity = np.array(found).T
    assert kstest(diversity, "uniform").pvalue > 0.01
    for level in (0.01, 0.05, 0.2):
        assert (shares <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / len(shares))


def test_a_class_without_diversity_and_one_of_another_class():
    real, labels, fake, asked = classes(300, 150, apart=6.0)
    fake[asked == 1] = fake[1] + 0.1 * samples(50, 4, seed=9)
    fake[asked == 2] = fake[asked == 0] + 0.01
    report = class_report(real, labels, fake, asked)
    assert report[0].p_consistency > 0.05
    assert report[0].p_diversity > 0.05
    assert report[1].p_diversity == 0.001
    assert report[1].diversity == pytest.approx(0.1, abs=0.02)
    assert report[1].consistency == 1
    assert report[2].consistency == 0
    assert report[2].p_consistency < 1e-12


def test_classes_with_too_few_samples():
    real, labels, fake, asked = classes(60, 31, c=2)
    labels[0], real[0] = 9, 50
    report = class_report(real, labels, fake[asked == 1], asked[asked == 1])
    assert (report[0].n_fake, report[9].n_real) == (0, 1)
    assert math.isnan(report[0].consistency)
    assert math.isnan(report[9].diversity)
    assert (report[0].p_consistency, report[0].p_diversity, report[9].p_diversity) == (1, 1, 1)


# ---------- bad input


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fake": samples(9, 2)}, "`fake` must have one row for each condition, got 9 for 10"),
        ({"real": samples(11, 2)}, "`real` must have one row for each condition, got 11 for 10"),
        ({"condition": samples(10)}, r"`condition` must be floating-point features of shape \(n, d\)"),
        (
            {"condition": torch.zeros(10, 2, dtype=torch.long)},
            r"features \(n, d\) or integer labels \(n,\), got torch.int64",
        ),
        ({"fake": samples(3, 2)}, "`fake` must have more than k = 3 samples, got 3"),
        ({"permutations": 0}, "`permutations` must be a positive integer, got 0"),
    ],
)
def test_bad_pairs(change, text):
    with pytest.raises(ValueError, match=text):
        condition_dependence(**{"condition": samples(10, 2), "fake": samples(10, 2)} | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"real_labels": torch.zeros(10)}, r"`real_labels` must be integer labels \(n,\), got torch.float32"),
        ({"fake_labels": torch.zeros(9).long()}, "`fake_labels` must have one label for each sample, got 9 for 10"),
        (
            {"fake_labels": torch.arange(10)},
            "must be classes of real samples; without any are 1, 2, 3, 4, 5, 6, 7, 8, 9",
        ),
        ({"k": 10}, "`real` must have more than k = 10 samples, got 10"),
        ({"k": 0}, "`k` must be a positive integer, got 0"),
    ],
)
def test_bad_classes(change, text):
    labels = torch.zeros(10).long()
    given = {"real": samples(10, 2), "real_labels": labels, "fake": samples(10, 2), "fake_labels": labels}
    with pytest.raises(ValueError, match=text):
        class_report(**given | change)


# ---------- several processes


def _different_widths(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="one process has rows of 3 values, and another of 2"):
        gather_rows(torch.zeros(4, 2 + rank))
    reading = Reading([Unpacked(torch.zeros(4, 2), torch.zeros(4, 2 + rank))], torch.zeros(4, 2), describe=described_of)
    assert len([*reading.read()]) == 1
    reading.see(Seen(torch.zeros(8, 2), torch.zeros(8, 0)))
    assert reading.told is None
    dist.destroy_process_group()


def described_of(part):
    return part.condition


@pytest.mark.timeout(150)
def test_processes_whose_conditions_have_other_widths_do_not_compare_them(tmp_path):
    """As conditions of several sizes in one process do not; what must be gathered is refused in a sentence."""
    mp.spawn(_different_widths, args=(str(tmp_path),), nprocs=2)
