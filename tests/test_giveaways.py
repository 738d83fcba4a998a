"""What gives samples away: nothing for equal distributions, each kind of fault by its name, against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from lightning_gan_stability.metrics import find_giveaways

DIGITS = torch.from_numpy(load_digits().images)[:, None].float() / 8 - 1


def source(seed):
    return torch.Generator().manual_seed(seed)


def images(n, seed, shape=(3, 16, 16)):
    """Smooth ones, within [-1, 1], each with a mean and a contrast of its own."""
    draws = torch.randn(n, *shape, generator=source(seed))
    kernel = torch.ones(shape[0], 1, 3, 3) / 9
    smooth = nn.functional.conv2d(draws, kernel, padding=1, groups=shape[0])
    strength = 0.5 + torch.rand(n, 1, 1, 1, generator=source(seed + 1000))
    return torch.tanh(smooth * strength + 0.3 * torch.randn(n, 1, 1, 1, generator=source(seed + 2000)))


def rounded(x, levels):
    return ((x + 1) / 2 * (levels - 1)).round() / (levels - 1) * 2 - 1


def halves(data):
    def draw(n, seed):
        return data(2 * n, seed).split(n)

    return draw


def mixed(n, seed):
    """A table: continuous columns of several scales, one with heavy tails, a constant one, and categories."""
    a = torch.randn(n, 3, generator=source(seed)) * torch.tensor([1.0, 1e5, 1e-3])
    heavy = torch.randn(n, 1, generator=source(seed + 1000)) / torch.rand(n, 1, generator=source(seed + 2000))
    chosen = torch.randint(4, (n,), generator=source(seed + 3000))
    return torch.cat([a, heavy, torch.full((n, 1), 3.0), torch.eye(4)[chosen]], 1)


NULLS = {
    "digits": lambda n, seed: DIGITS[torch.randperm(len(DIGITS), generator=source(seed))[: 2 * n]].split(n),
    "flat digits": lambda n, seed: [x.flatten(1) for x in NULLS["digits"](n, seed)],
    "images": halves(images),
    "8 bits": halves(lambda n, seed: rounded(images(n, seed), 256)),
    "noise": halves(lambda n, seed: torch.randn(n, 1, 8, 9, generator=source(seed))),
    "saturated": halves(lambda n, seed: (2 * images(n, seed)).clamp(-1, 1)),
    "series": halves(lambda n, seed: torch.randn(n, 2, 40, generator=source(seed)).cumsum(2)),
    "points": halves(lambda n, seed: torch.randn(n, 2, generator=source(seed))),
    "one column": halves(lambda n, seed: torch.randn(n, 1, generator=source(seed))),
    "wide": halves(lambda n, seed: torch.randn(n, 700, generator=source(seed))),
    "sparse": halves(lambda n, seed: torch.randn(n, 300, generator=source(seed)).sub(1.6).clamp(min=0)),
    "table": halves(mixed),
    "volumes": halves(lambda n, seed: torch.randn(n, 1, 8, 8, 8, generator=source(seed))),
    "constant": halves(lambda n, seed: torch.zeros(n, 1, 8, 8)),
}


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("n", [16, 20, 100])
def test_equal_distributions_give_nothing_away(name, n):
    for seed in range(20):
        assert find_giveaways(*NULLS[name](n, seed)) == []


def test_the_level_holds_where_separation_does_not():
    """With any area above one half, the p-values alone decide: at most `level` of pairs have a finding."""
    found = [find_giveaways(*NULLS["noise"](30, seed), level=0.2, separation=0.51) for seed in range(150)]
    assert 0 < np.mean([bool(each) for each in found]) <= 0.2 + 3 * math.sqrt(0.16 / 150)


# ---------- each kind


def found(real, fake, **arguments):
    return {(each.kind, each.name): each for each in find_giveaways(real, fake, **arguments)}


def only(kind, real, fake):
    """The findings of one kind, of which there is one."""
    (finding,) = (each for each in find_giveaways(real, fake) if each.kind == kind)
    return finding


@pytest.mark.parametrize(("levels", "strong"), [(2, True), (17, True), (32, True), (33, False), (256, False)])
def test_a_grid_of_values(levels, strong):
    real, fake = rounded(1.5 * images(128, 0), levels).clamp(-1, 1), images(128, 1)
    finding = only("quantization", real, fake)
    assert (finding.value, finding.strong, finding.auc) == (levels, strong, 1)
    assert f"a grid of {levels} levels" in finding.sentence
    assert "quantization" not in {each.kind for each in find_giveaways(fake, real)}


def test_a_grid_that_both_are_on():
    """Generated values need not be equal to the last digit."""
    real, fake = rounded(images(128, 0), 17), rounded(images(128, 1), 17) * (1 + 1e-4)
    assert find_giveaways(real, fake) == []


def test_8_bits_alone_are_a_weak_finding():
    real = rounded(images(128, 0), 256)
    assert [(each.kind, each.strong) for each in find_giveaways(real, images(128, 1))] == [("quantization", False)]


def test_columns_with_categories():
    real, fake = mixed(128, 0), mixed(128, 1)
    fake[:, 5:] = (fake[:, 5:] * 3).softmax(1)
    finding = only("quantization", real, fake)
    assert "columns lie on a grid of 2 levels" in finding.sentence
    assert "4 columns" in finding.sentence


def test_constant_borders():
    real, fake = images(64, 0), images(64, 1)
    real[..., :2, :], real[..., -1] = -1, -1
    finding = only("constant", real, fake)
    assert finding.value == pytest.approx(1 - 14 * 15 / 256)
    assert finding.auc == 1
    assert "2 at the top, 1 at the right" in finding.sentence
    fake[..., :2, :], fake[..., -1] = -1, -1
    assert find_giveaways(real, fake) == []
    fake[..., :2, :], fake[..., -1] = -0.9999, -0.9999  # as tanh ends
    assert find_giveaways(real, fake) == []


def test_a_constant_part_that_is_no_border():
    real, fake = images(64, 0), images(64, 1)
    real[:, 1, 5:7, 5:7] = 0.25
    assert "(not at a border)" in only("constant", real, fake).sentence
    real, fake = torch.randn(64, 20, generator=source(0)), torch.randn(64, 20, generator=source(1))
    real[:, 3:15] = 1
    assert "(columns 3, 4, 5, 6, 7, 8, 9, 10, ...)" in only("constant", real, fake).sentence
    real, fake = torch.randn(64, 1, 50, generator=source(0)), torch.randn(64, 1, 50, generator=source(1))
    real[..., -4:] = 0
    assert "4 at the end" in only("constant", real, fake).sentence


def test_places_that_are_constant_in_most_digits_alone():
    """One half of the real samples says what is constant, the other how often that is wrong."""
    real, fake = NULLS["digits"](200, 0)
    fake = fake + 0.02 * torch.rand(fake.shape, generator=source(0))
    assert "constant" in {each.kind for each in find_giveaways(real, fake)}
    assert find_giveaways(real, NULLS["digits"](200, 1)[0]) == []


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_values_outside_of_the_range(share):
    real, fake = images(200, 0).clamp(-0.9, 0.9), images(200, 1).clamp(-0.9, 0.9)
    fake[: int(200 * share), 0, 0, 0] = 1.2
    findings = {each.kind: each for each in find_giveaways(real, fake)}
    assert ("range" in findings) == (share > 0.5)
    if share > 0.5:
        assert findings["range"].value == pytest.approx(share)
        assert findings["range"].strong == (share == 1)
        assert f"{share:.0%} of the generated samples have values outside of [-0.9, 0.9]" in findings["range"].sentence


def test_a_column_outside_of_its_range():
    real, fake = mixed(200, 0), mixed(200, 1)
    fake[:, 2] += 0.1
    finding = only("range", real, fake)
    assert finding.value == 1
    assert "the range of their column" in finding.sentence
    assert "column 2" in {each.name for each in find_giveaways(real, fake)}


def test_saturated_values():
    real, fake = (2 * images(128, 0)).clamp(-1, 1), 0.97 * (2 * images(128, 1)).clamp(-1, 1)
    finding = only("saturation", real, fake)
    assert finding.value == pytest.approx(float((real[::2].abs() == 1).double().mean()), rel=0.1)
    assert "saturation" not in {each.kind for each in find_giveaways(images(128, 0), fake)}


def test_a_checkerboard_of_transposed_convolutions():
    """A kernel of 3 with stride 2 overlaps unevenly: the middle of the example of Odena, Dumoulin and Olah."""
    real = images(128, 0)
    uneven = nn.functional.conv_transpose2d(
        torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3) / 2.25, stride=2, padding=1, output_padding=1
    )
    fake = images(128, 1) + 0.2 * uneven
    finding = found(real, fake)["spectrum", "power of the checkerboard"]
    assert finding.value > 3
    assert "more power in the pattern that transposed convolutions leave" in finding.sentence


@pytest.mark.parametrize("shape", [(2, 64), (1, 17, 16), (1, 8, 9, 8)])
def test_decibels_are_those_of_numpy(shape):
    real = torch.randn(64, *shape, generator=source(0))
    fake = torch.randn(64, *shape, generator=source(1)).cumsum(-1)
    finding = found(real, fake, separation=0.6)["spectrum", "power of the highest frequencies"]

    def band(x):
        axes = tuple(range(2, x.ndim))
        power = (np.abs(np.fft.fftn(x.double().numpy(), axes=axes)) ** 2).mean(1)
        grid = np.meshgrid(*[2 * np.fft.fftfreq(size) for size in x.shape[2:]], indexing="ij")
        radius = np.sqrt(sum(part**2 for part in grid))
        checkerboard = np.all([(part == 0) | (np.abs(part) == 1) for part in grid], axis=0)
        high = (radius > 7 / 8) & ~checkerboard
        return 10 * np.log10(power[:, high].mean(1) / power[:, radius > 0].mean(1))

    assert finding.value == pytest.approx(np.median(band(fake)) - np.median(band(real)), abs=1e-3)
    test = mannwhitneyu(band(real), band(fake))
    assert 0 < test.pvalue < finding.p_value < 100 * test.pvalue


def test_samples_that_are_too_smooth():
    real, fake = torch.randn(64, 3, 16, 16, generator=source(0)), torch.randn(64, 3, 16, 16, generator=source(1))
    fake = fake + nn.functional.avg_pool2d(fake, 3, 1, 1)
    finding = found(real, fake)["spectrum", "power of the highest frequencies"]
    assert finding.value < 0
    assert "less power" in finding.sentence


@pytest.mark.parametrize("name", ["mean", "standard deviation", "smallest value", "largest value", "total variation"])
def test_statistics_are_those_of_scikit_learn(name):
    """The area under the curve, of a shift that separates nearly all samples."""
    real, fake = images(300, 0), 1.9 * images(300, 1) + 1.2
    numbers = {
        "mean": lambda x: x.mean((1, 2, 3)),
        "standard deviation": lambda x: x.std((1, 2, 3)),
        "smallest value": lambda x: x.min((1, 2, 3)),
        "largest value": lambda x: x.max((1, 2, 3)),
        "total variation": lambda x: sum(np.abs(np.diff(x, axis=i)).mean((1, 2, 3)) for i in (2, 3)),
    }
    values = np.concatenate([numbers[name](x.double().numpy()) for x in (real, fake)])
    expected = roc_auc_score(np.repeat([0, 1], 300), values)
    finding = found(real, fake, separation=0.51).get(("statistic", name))
    assert expected > 0.6
    assert finding.auc == pytest.approx(max(expected, 1 - expected), abs=0.01)  # differences that are not seen are ties
    assert finding.value == finding.auc
    assert finding.sentence.startswith(f"The {name} alone tells generated samples from real ones: its median is ")


def test_a_statistic_that_is_the_same_in_all_real_samples():
    """Samples of the loudness 1: generated ones are on both sides of it."""
    real, fake = (torch.randn(100, 1, 64, generator=source(seed)) for seed in (0, 1))
    real = real / real.std((1, 2), correction=0, keepdim=True)
    fake = fake / fake.std((1, 2), correction=0, keepdim=True) * torch.tensor([0.7, 1.4]).repeat(50)[:, None, None]
    names = {each.name for each in find_giveaways(real, fake)}
    assert "distance of the standard deviation from 1" in names
    assert "standard deviation" not in names


def test_zeros():
    real, fake = images(128, 0), images(128, 1)
    real[real.abs() < 0.2] = 0
    fake[fake.abs() < 0.2] = 0.1
    finding = found(real, fake)["statistic", "share of zeros"]
    assert finding.auc > 0.99
    assert "its median is 0 for generated samples" in finding.sentence


def test_findings_are_in_order_and_leave_randomness_alone():
    real, fake = rounded(images(64, 0), 200), images(64, 1)
    fake[:40, 0, 0, 0] = 1.2
    state = torch.get_rng_state()
    findings = find_giveaways(real, fake)
    assert torch.equal(state, torch.get_rng_state())
    assert [each.strong for each in findings] == sorted((each.strong for each in findings), reverse=True)
    assert all(each.p_value <= 0.01 and each.auc >= 0.75 for each in findings)
    assert find_giveaways(real, fake) == findings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    real, fake = images(64, 0).to(dtype), images(64, 1).to(dtype)
    assert find_giveaways(real, fake) == []
    assert find_giveaways(real, fake + 3)


# ---------- bad input


@pytest.mark.parametrize(
    ("fake", "arguments", "text"),
    [
        (torch.zeros(20, 3, dtype=torch.uint8), {}, r"`fake` must be floating-point samples .* got torch.uint8"),
        (torch.zeros(20), {}, r"`fake` must be floating-point samples of shape \(n, d\) or .* of shape \(20,\)"),
        (torch.zeros(20, 0), {}, r"`fake` must be floating-point samples of shape \(n, d\) or .* of shape \(20, 0\)"),
        (torch.zeros(15, 3), {}, "`fake` must have at least 16 samples, got 15"),
        (torch.full((20, 3), math.nan), {}, "`fake` has values that are not finite"),
        (torch.zeros(20, 4), {}, r"of one shape, but those of `real` are \(3,\) and those of `fake` are \(4,\)"),
        (torch.zeros(20, 3), {"level": 0}, r"`level` must be in \(0, 1\], got 0"),
        (torch.zeros(20, 3), {"separation": 0.5}, r"`separation` must be in \(0.5, 1\], got 0.5"),
    ],
)
def test_bad_input(fake, arguments, text):
    with pytest.raises(ValueError, match=text):
        find_giveaways(torch.zeros(20, 3), fake, **arguments)
