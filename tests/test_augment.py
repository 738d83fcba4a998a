"""Augmentations against independent implementations; their distributions, gradients and draws."""

import math
import re

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from scipy import ndimage, signal, stats
from torch import nn
from torch.utils.data import DataLoader
from toys import fit, points, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveAugmentation,
    AugmentationSchedule,
    AugmentPipe,
    ConsistencyPenalty,
    DCGANDiscriminator,
    DCGANGenerator,
    DiffAugment,
    Digits,
    GANModule,
    Hinge,
    InstanceNoise,
    LeastSquares,
    PairedTranslation,
    R1Penalty,
    R2Penalty,
    Relativistic,
    ResNetDiscriminator,
    ResNetGenerator,
    Schedule,
    Wasserstein,
)
from lightning_gan_stability.augment import SYM6, TRANSFORMS, augment_pairs
from lightning_gan_stability.noise import batch_rand, batch_randn

N = 4000
ROUNDING = 1e-6  # the wavelet is known to nine digits


def images(n=4, channels=3, height=16, width=16, seed=0):
    """Smooth images, which an interpolation can be compared on."""
    noise = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    blurred = ndimage.gaussian_filter(noise.numpy(), (0, 0, 6.0, 6.0), mode="mirror")
    return torch.from_numpy(blurred / blurred.std())


def noisy(n=4, channels=3, height=16, width=16, seed=0):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(n, value):
    return torch.full((n,), value, dtype=torch.float64)


def draws_of(augmentation, shape, n=N, seed=0):
    torch.manual_seed(seed)
    return augmentation.draw(torch.zeros(n, *shape))


def uniform(values, low=0.0, high=1.0):
    """The p value of a KS test against a uniform distribution."""
    return stats.kstest(values.numpy(), stats.uniform(low, high - low).cdf).pvalue


def normal(values, std=1.0):
    return stats.kstest(values.numpy(), stats.norm(0, std).cdf).pvalue


# ---------- DiffAugment


def test_colours_of_diff_augment():
    x, u = noisy(), torch.rand(4, 3, dtype=torch.float64)
    found = DiffAugment("color").apply_to(x, {"color": u}).numpy()
    for image, (b, s, c), result in zip(x.numpy(), u.numpy(), found, strict=True):
        expected = image + b - 0.5
        mean = expected.mean(0, keepdims=True)
        expected = mean + (expected - mean) * 2 * s
        expected = expected.mean() + (expected - expected.mean()) * (c + 0.5)
        assert np.allclose(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("size", "reach"), [(8, 1), (28, 4), (32, 4), (256, 32)])
def test_translations_of_diff_augment(size, reach):
    shift = DiffAugment("translation")
    for k in range(2 * reach + 1):
        x = noisy(1, 1, size, 6)
        u = torch.tensor([[(k + 0.5) / (2 * reach + 1), 0.5]])  # 6 / 8 + ½ pixels: the width has a reach of 1
        moved = np.zeros((size, 6))
        d = reach - k
        moved[max(d, 0) : size + min(d, 0)] = x[0, 0].numpy()[max(-d, 0) : size - max(d, 0)]
        assert np.array_equal(shift.apply_to(x, {"translation": u})[0, 0].numpy(), moved)


@pytest.mark.parametrize(("size", "box", "places"), [(8, 4, 9), (28, 14, 29), (32, 16, 33), (256, 128, 257), (5, 3, 5)])
def test_boxes_of_diff_augment(size, box, places):
    cut, x = DiffAugment("cutout"), torch.ones(1, 1, size, 4)
    seen = set()
    for k in range(places):
        u = torch.tensor([[(k + 0.5) / places, 0.5]])  # a width of 4: the box covers columns 1 and 2
        rows = [row for row in range(size) if k - box // 2 <= row < k - box // 2 + box]
        expected = torch.ones(size, 4)
        expected[rows, 1:3] = 0
        found = cut.apply_to(x, {"cutout": u})[0, 0]
        assert torch.equal(found, expected)
        seen.add(tuple(rows))
    assert len(seen) == places


def test_distributions_of_diff_augment():
    """Reached through images: each place and each amount as often as the authors' code has it."""
    draws = draws_of(DiffAugment(), (3, 32, 32))
    for name, columns in (("color", 3), ("translation", 2), ("cutout", 2)):
        assert draws[name].shape == (N, columns)
        assert all(uniform(column) > 1e-3 for column in draws[name].T)
    one = torch.zeros(N, 1, 32, 32)
    one[:, :, 16, 16] = 1
    torch.manual_seed(0)
    place = DiffAugment("translation")(one).flatten(1).argmax(1)
    counts = np.bincount((place // 32 - 12).numpy(), minlength=9), np.bincount((place % 32 - 12).numpy(), minlength=9)
    assert all(stats.chisquare(count).pvalue > 1e-3 for count in counts)


def test_the_policy_has_an_order():
    x = noisy()
    torch.manual_seed(3)
    draws = DiffAugment().draw(x)
    there = DiffAugment("translation,color").apply_to(x, draws)
    back = DiffAugment("color, translation").apply_to(x, draws)
    assert not torch.allclose(there, back)
    by_hand = DiffAugment("color").apply_to(DiffAugment("translation").apply_to(x, draws), draws)
    assert torch.equal(there, by_hand)


# ---------- AugmentPipe: each transform against another implementation


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
def test_whole_pixels(height, width):
    """No transform and a move by whole pixels go through the resampling and come out as they were."""
    pipe, x = AugmentPipe("bg", 1.0), noisy(height=height, width=width)
    n = len(x)
    assert torch.allclose(pipe.apply_to(x, {"xflip": full(n, 0.0)}), x, atol=ROUNDING)
    moved = pipe.apply_to(x, {"xint": torch.tensor([[2 / width, -1 / height]] * n)})
    assert torch.allclose(moved[:, :, :-1, 2:], x[:, :, 1:, :-2], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_flips_and_quarter_turns(channels):
    """Against torchvision, in the mean: the wavelet is not symmetric, which moves what is turned by part of a pixel."""
    x = images(channels=channels, height=48, width=48)
    pipe = AugmentPipe("blit", 1.0)
    flipped = pipe.apply_to(x, {"xflip": full(4, 1.0)})
    assert (flipped - tv.horizontal_flip(x)).abs().mean() < 0.02
    for quarters in range(4):
        turned = pipe.apply_to(x, {"rotate90": full(4, float(quarters))})
        assert (turned - tv.rotate(x, 90.0 * quarters)).abs().mean() < 0.02


def test_what_comes_in_is_a_reflection():
    x = noisy()
    moved = AugmentPipe("bg", 1.0).apply_to(x, {"xint": torch.tensor([[3 / 16, 0.0]] * 4)})
    assert torch.allclose(moved[:, :, :, :3], x[:, :, :, 1:4].flip(3), atol=1e-6)


@pytest.mark.parametrize("angle", [0.3, -1.0, 2.5])
def test_rotations(angle):
    """Against cubic splines of SciPy, inside, on smooth images."""
    x = images(height=48, width=48)
    found = AugmentPipe("bg", 1.0).apply_to(x, {"rotate0": full(4, angle)})
    expected = ndimage.rotate(x.numpy(), math.degrees(angle), axes=(2, 3), reshape=False, order=3, mode="mirror")
    inside = slice(14, 34)
    difference = found.numpy()[:, :, inside, inside] - expected[:, :, inside, inside]
    assert np.abs(difference).max() < 0.05
    assert np.abs(x.numpy()[:, :, inside, inside] - expected[:, :, inside, inside]).max() > 0.5


@pytest.mark.parametrize(
    ("name", "draw", "matrix"),
    [
        ("scale", (1.3,), (1 / 1.3, 1 / 1.3)),
        ("scale", (0.8,), (1 / 0.8, 1 / 0.8)),
        ("aniso", (1.2,), (1.2, 1 / 1.2)),  # SciPy's matrix is of rows and columns: y, x
    ],
)
def test_scales(name, draw, matrix):
    x = images(height=48, width=48)
    found = AugmentPipe("bg", 1.0).apply_to(x, {name: full(4, *draw)}).numpy()
    centre = 23.5
    offset = [centre - factor * centre for factor in matrix]
    expected = np.stack(
        [[ndimage.affine_transform(c, matrix, offset, order=3, mode="mirror") for c in image] for image in x.numpy()]
    )
    inside = slice(12, 36)
    assert np.abs(found - expected)[:, :, inside, inside].max() < 0.05


def test_fractions_of_pixels():
    x = images(height=48, width=48)
    found = AugmentPipe("bg", 1.0).apply_to(x, {"xfrac": torch.tensor([[2.5 / 48, -1.25 / 48]] * 4)}).numpy()
    expected = ndimage.shift(x.numpy(), (0, 0, -1.25, 2.5), order=3, mode="mirror")
    assert np.abs(found - expected)[:, :, 4:-4, 4:-4].max() < 0.05


def test_transforms_come_in_their_order():
    """A flip, then a turn, then a shift: not commutative."""
    x = images()
    draws = {"xflip": full(4, 1.0), "rotate90": full(4, 1.0), "xint": torch.tensor([[2 / 16, 0.0]] * 4)}
    found = AugmentPipe("bg", 1.0).apply_to(x, draws)
    expected = torch.rot90(x.flip(3), 1, (2, 3))
    assert torch.allclose(found[:, :, :, 2:], expected[:, :, :, :-2], atol=0.05)


def test_the_wavelet():
    """Shifts by two are orthonormal, and six moments of the high-pass filter vanish: that makes it sym6, or db6."""
    h = np.array(SYM6)
    for shift in range(6):
        assert np.dot(h[: len(h) - 2 * shift], h[2 * shift :]) == pytest.approx(float(shift == 0), abs=1e-9)
    high = h[::-1] * (-1.0) ** np.arange(12)
    for power in range(6):
        assert np.dot(high, (np.arange(12) - 5.5) ** power) == pytest.approx(0, abs=2e-4)


def hsv_like(matrix, x):
    return np.einsum("ij,njhw->nihw", matrix, x)


def test_colours():
    x = noisy()
    grey = np.ones((3, 3)) / 3
    rest = np.eye(3) - grey
    turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    pipe, data = AugmentPipe("color", 1.0), x.numpy()
    expected = {
        ("brightness", 0.3): data + 0.3,
        ("contrast", 1.7): data * 1.7,
        ("lumaflip", 1.0): hsv_like(rest - grey, data),
        ("hue", 0.7): hsv_like(grey + math.cos(0.7) * rest + math.sin(0.7) * turn, data),
        ("saturation", 2.5): hsv_like(grey + 2.5 * rest, data),
    }
    for (name, amount), result in expected.items():
        assert np.allclose(pipe.apply_to(x, {name: full(4, amount)}).numpy(), result, rtol=0, atol=1e-12), name
    every = {"brightness": full(4, 0.3), "contrast": full(4, 1.7), "saturation": full(4, 2.5)}
    by_hand = hsv_like(grey + 2.5 * rest, (data + 0.3) * 1.7)
    assert np.allclose(pipe.apply_to(x, every).numpy(), by_hand, rtol=0, atol=1e-12)
    assert np.allclose(pipe.apply_to(x, {"saturation": full(4, 0.0)}), x.mean(1, keepdim=True).expand_as(x))
    third = pipe.apply_to(x, {"hue": full(4, 2 * math.pi / 3)})
    assert torch.allclose(third, x.roll(1, 1), atol=1e-12)


def test_colours_of_one_channel():
    """As if the image had three equal channels, of which the mean is taken."""
    x = noisy(channels=1)
    draws = {"brightness": full(4, 0.3), "contrast": full(4, 1.7), "lumaflip": full(4, 1.0)}
    found = AugmentPipe("color", 1.0).apply_to(x, draws)
    assert torch.allclose(found, -1.7 * (x + 0.3), atol=1e-12)
    assert torch.allclose(AugmentPipe("color", 1.0).apply_to(x.expand(-1, 3, -1, -1), draws).mean(1, True), found)


def test_bands():
    """A gain for all bands is none, by the power's normalization; each band alone against frequencies of SciPy."""
    x = noisy(height=64, width=64)
    pipe = AugmentPipe("filter", 1.0)
    assert torch.allclose(pipe.apply_to(x, {"imgfilter": torch.ones(4, 4)}), x, atol=1e-12)
    power = np.array([10, 1, 1, 1]) / 13
    for gains in ([1.0, 1.0, 1.0, 8.0], [2.0, 1.0, 1.0, 1.0], [0.5, 3.0, 1.0, 2.0]):
        total = np.ones(4)
        for i, gain in enumerate(gains):
            one = np.ones(4)
            one[i] = gain
            total *= one / math.sqrt((power * one**2).sum())
        delta = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
        delta[0, 0, 32, 32] = 1
        kernel = pipe.apply_to(delta, {"imgfilter": torch.tensor([gains])})[0, 0].numpy()
        _, response = signal.freqz(np.roll(kernel.sum(0), -32), worN=[0.0, math.pi])
        # the lowest and the highest frequency lie in one band alone; along the other direction the lowest does
        assert abs(response[0]) == pytest.approx(total[0] ** 2, rel=1e-3)
        assert abs(response[1]) == pytest.approx(total[3] * total[0], rel=1e-3)


def test_noise_on_samples_of_any_shape():
    pipe = AugmentPipe("noise", 1.0)
    for shape in ((2,), (1, 500), (3, 8, 8)):
        torch.manual_seed(0)
        x = torch.zeros(300, *shape)
        draws = pipe.draw(x)
        assert normal(draws["values"].flatten()) > 1e-3
        signs = draws["noise"] * (2 * (torch.rand(300) < 0.5).float() - 1)
        assert normal(signs, 0.1) > 1e-3
        found = pipe.apply_to(x, draws)
        sigma = draws["noise"].reshape(-1, *[1] * len(shape))
        assert torch.equal(found, sigma * draws["values"])


def test_boxes():
    pipe, x = AugmentPipe("cutout", 1.0), torch.ones(1, 3, 16, 32)
    for cx, cy in ((0.5, 0.5), (0.0, 0.3), (0.99, 1.0)):
        expected = torch.ones(16, 32)
        for i in range(16):
            for j in range(32):
                if abs((i + 0.5) / 16 - cy) < 0.25 and abs((j + 0.5) / 32 - cx) < 0.25:
                    expected[i, j] = 0
        found = pipe.apply_to(x, {"cutout": torch.tensor([[0.5, cx, cy]])})
        assert torch.equal(found, expected.expand(1, 3, 16, 32))


# ---------- what is drawn


def test_distributions():
    draws = draws_of(AugmentPipe("bgcfnc", 1.0), (3, 4, 4))
    log2 = {name: draws[name].log2() for name in ("scale", "aniso", "contrast", "saturation")}
    assert normal(log2["scale"], 0.2) > 1e-3
    assert normal(log2["aniso"], 0.2) > 1e-3
    assert normal(log2["contrast"], 0.5) > 1e-3
    assert normal(log2["saturation"], 1.0) > 1e-3
    assert normal(draws["brightness"], 0.2) > 1e-3
    assert normal(draws["xfrac"].flatten(), 0.125) > 1e-3
    assert normal(draws["imgfilter"].log2().flatten(), 1.0) > 1e-3
    assert uniform(draws["xint"].flatten(), -0.125, 0.125) > 1e-3
    assert uniform(draws["hue"], -math.pi, math.pi) > 1e-3
    assert uniform(draws["rotate0"], -math.pi, math.pi) > 1e-3
    assert uniform(draws["cutout"][:, 1]) > 1e-3
    assert uniform(draws["cutout"][:, 2]) > 1e-3
    assert stats.chisquare(np.bincount(draws["xflip"].long())).pvalue > 1e-3
    assert stats.chisquare(np.bincount(draws["lumaflip"].long())).pvalue > 1e-3
    assert stats.chisquare(np.bincount(draws["rotate90"].long())).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_probabilities(p):
    """Each with p times its multiplier; a rotation before or after with p: 1 − √(1 − p) each."""
    draws = draws_of(AugmentPipe({"bg": 1.0, "color": 0.5, "noise": 0.0}, p), (3, 4, 4))
    assert "noise" not in draws
    expected = {"scale": p, "aniso": p, "contrast": p / 2, "saturation": p / 2, "xflip": p / 2, "rotate90": 3 * p / 4}
    for name, share in expected.items():
        rest = 1.0 if name in ("scale", "aniso", "contrast", "saturation") else 0.0
        count = int((draws[name] != rest).sum())
        assert stats.binomtest(count, N, share).pvalue > 1e-3, name
    turned = (draws["rotate0"] != 0), (draws["rotate1"] != 0)
    for one in turned:
        assert stats.binomtest(int(one.sum()), N, 1 - math.sqrt(1 - p)).pvalue > 1e-3
    assert stats.binomtest(int((turned[0] | turned[1]).sum()), N, p).pvalue > 1e-3
    assert 1 - math.sqrt(1 - 0.6) == pytest.approx(0.3675, abs=5e-5)


def test_strengths_and_multipliers():
    pipe = AugmentPipe({"scale": 1.0, "color": 0.0, "hue": 1.0}, 1.0, {"scale": 0.5, "hue": 0.25})
    draws = draws_of(pipe, (3, 4, 4))
    assert draws.keys() == {"scale", "hue"}
    assert normal(draws["scale"].log2(), 0.5) > 1e-3
    assert uniform(draws["hue"], -math.pi / 4, math.pi / 4) > 1e-3


def test_without_probability_nothing_changes():
    x = noisy(height=32, width=32)
    assert torch.allclose(AugmentPipe("bgcfnc", 0.0)(x), x, atol=ROUNDING)
    off = AugmentPipe({"bgc": 0.0}, 1.0)(x)
    assert torch.equal(off, x)


# ---------- gradients


@pytest.mark.parametrize("make", [lambda: DiffAugment(), lambda: AugmentPipe("bgcfnc", 0.8)])
def test_gradients(make):
    """By central differences, and those of gradients, which penalties need."""
    augmentation = make()
    x = noisy(2, 3, 24, 24).requires_grad_()
    torch.manual_seed(0)
    draws = augmentation.draw(x)
    weight = torch.randn(2, 3, 24, 24, dtype=torch.float64)

    def loss(x):
        return (weight * augmentation.apply_to(x, draws)).square().sum()

    torch.manual_seed(1)
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    slope = (loss(x + 1e-5 * direction) - loss(x - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)

    def norm(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0].square().sum()

    slope = (norm(x + 1e-5 * direction) - norm(x - 1e-5 * direction)) / 2e-5
    assert (second * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    x = noisy(height=32, width=32)
    pipe = AugmentPipe("bgcfnc", 0.9)
    torch.manual_seed(0)
    precise = pipe(x)
    torch.manual_seed(0)
    found = pipe(x.to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.double(), precise, atol=0.3 if dtype is torch.bfloat16 else 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        assert torch.allclose(pipe(x.float()).double(), precise, atol=1e-3)


GEOMETRIC = {
    "DiffAugment": lambda: DiffAugment("translation,cutout"),
    "AugmentPipe": lambda: AugmentPipe({"bg": 1.0, "cutout": 0.5}, 0.9),
    "both": lambda: nn.Sequential(DiffAugment("translation"), AugmentPipe("bg", 0.9)),
}


@pytest.mark.parametrize("make", GEOMETRIC.values(), ids=GEOMETRIC)
def test_all_parts_of_a_sample_have_its_draws(make):
    x = noisy(5, 3, 16, 16)
    found = make()({"image": x, "mask": x.clone(), "smaller": x[:, :1, :8, :8]})
    assert torch.equal(found["image"], found["mask"])
    assert not torch.equal(found["image"], x)
    assert found["smaller"].shape == (5, 1, 8, 8)


def test_noise_of_each_part_is_its_own():
    found = AugmentPipe("noise", 1.0)({"a": torch.zeros(2000, 4), "b": torch.zeros(2000, 4)})
    assert abs(torch.corrcoef(torch.stack([found["a"].flatten(), found["b"].flatten()]))[0, 1]) < 0.05
    widths = found["a"].std(1), found["b"].std(1)  # with one standard deviation for both
    assert torch.corrcoef(torch.stack(widths))[0, 1] > 0.5


@pytest.mark.parametrize("make", GEOMETRIC.values(), ids=GEOMETRIC)
def test_images_of_a_condition_move_with_their_samples(make):
    x = noisy(5, 3, 16, 16)
    labels = torch.arange(5)
    sample, condition = augment_pairs(make(), x, {"source": x, "mask": x[:, :1], "label": labels})
    assert torch.equal(sample, condition["source"])
    assert torch.equal(sample[:, :1], condition["mask"])
    assert condition["label"] is labels
    assert not torch.equal(sample, x)


@pytest.mark.parametrize("make", [lambda: DiffAugment("color"), lambda: AugmentPipe("color", 1.0)])
def test_images_of_a_condition_keep_their_colours(make):
    x, source = noisy(5, 3, 16, 16), noisy(5, 7, 16, 16)
    sample, condition = augment_pairs(make(), x, source)
    assert condition is source
    assert not torch.equal(sample, x)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 1, 16, 16)])
def test_maps_that_would_not_move_are_refused(shape):
    x, classes = noisy(3, 1, 16, 16), torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot move a condition"):
        augment_pairs(AugmentPipe("bg"), x, classes)
    assert augment_pairs(AugmentPipe("color"), x, classes)[1] is classes
    assert augment_pairs(AugmentPipe("bg"), x, torch.zeros(3, 5, 8))[1].shape == (3, 5, 8)  # words are no map


@pytest.mark.parametrize(
    "augment", [lambda: DiffAugment(), lambda: AugmentPipe("bgcfn", 0.0), lambda: AugmentPipe("noise")]
)
@pytest.mark.parametrize("x", [torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(0, 1, 16, 16)])
def test_samples_that_are_no_floats_or_none_are_refused(augment, x):
    with pytest.raises(ValueError, match="takes floating point samples"):
        augment()(x)


# ---------- in a module


def convolutional(**kwargs):
    torch.manual_seed(0)
    return GANModule(ResNetGenerator(4, 1, 8, 4), ResNetDiscriminator(1, 8, 4), 4, **kwargs)


def pictures(n, batch_size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 1, 8, 8, generator=generator).tanh() for _ in range(n)]


def test_draws_of_micro_batches_are_those_of_the_batch():
    noise = small().noise
    with noise.of_step(), noise.of_samples():
        draw = noise.draw
        whole = batch_rand(6, 3), batch_randn(6, 100)
        parts = []
        for start, stop in ((0, 2), (2, 4), (4, 6)):
            with noise.rows(start, stop, 6, draw):
                parts.append((batch_rand(2, 3), batch_randn(2, 100)))
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_draws_outside_of_a_module_are_torchs():
    torch.manual_seed(0)
    expected = torch.rand(3, 2)
    torch.manual_seed(0)
    assert torch.equal(batch_rand(3, 2), expected)


@pytest.mark.parametrize("augment", [lambda: DiffAugment(), lambda: AugmentPipe("bgc", 0.7)])
def test_accumulated_batches_are_whole_ones(augment):
    runs = []
    for accumulate in (1, 3):
        module = convolutional(augment=augment(), accumulate=accumulate).double()
        fit(module, [batch.double() for batch in pictures(3)])
        runs.append(weights(module))
    assert torch.allclose(*runs, rtol=0, atol=1e-9)


class Judged(Callback):
    """Keeps what the discriminator saw."""

    def __init__(self, module):
        self.seen = []
        module.discriminator.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].detach().clone()))


def test_every_sample_is_augmented_by_draws_of_its_own():
    module = convolutional(augment=DiffAugment())
    judged = Judged(module)
    same = torch.randn(1, 1, 8, 8).expand(6, 1, 8, 8)
    fit(module, [same, same])
    real = judged.seen[0]
    assert all(not torch.equal(real[0], other) for other in real[1:])
    assert not torch.equal(judged.seen[0], judged.seen[3])
    module.eval()
    assert torch.equal(module.logits(same), module.discriminator(same).flatten())


@pytest.mark.parametrize("augmented", [False, True])
def test_penalties_see_the_sample_before_or_after(augmented):
    """A linear discriminator w of samples that are doubled: ‖2 w‖², or ‖w‖² of what it saw."""

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module = GANModule(
        nn.Linear(4, 2), nn.Linear(2, 1), 4, augment=Double(), d_optimizer=lambda p: torch.optim.SGD(p, 0)
    )
    norm = module.discriminator.weight.square().sum().item()
    penalties = R1Penalty(2.0, augmented=augmented), R2Penalty(2.0, augmented=augmented)
    run = fit(module, points(1), callbacks=[*penalties])
    expected = norm if augmented else 4 * norm
    assert run.callback_metrics["d/r1"] == pytest.approx(expected, rel=1e-6)
    assert run.callback_metrics["d/r2"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("augment", [lambda: DiffAugment(), lambda: AugmentPipe("bgcfnc", 0.9)])
def test_penalties_through_augmentations(augment, augmented):
    size = 8 if isinstance(augment(), DiffAugment) else 32
    torch.manual_seed(0)
    module = GANModule(DCGANGenerator(4, 1, size, 4), DCGANDiscriminator(1, size, 4), 4, augment=augment())
    batches = [torch.randn(4, 1, size, size).tanh() for _ in range(2)]
    run = fit(module, batches, callbacks=[R1Penalty(augmented=augmented), R2Penalty(), ConsistencyPenalty("latent")])
    assert run.callback_metrics["d/r1"] > 0


class Pairs(nn.Module):
    """A discriminator that keeps how far the images that it is shown are from those that it is told."""

    def __init__(self):
        super().__init__()
        self.weight, self.apart, self.shown = nn.Parameter(torch.ones(1)), [], []

    def forward(self, x, condition):
        self.apart.append((x - condition).abs().max().item())
        self.shown.append(x.detach())
        return self.weight * (x - condition).mean((1, 2, 3)) + self.weight


class Source(nn.Module):
    """A generator that returns its condition."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, source):
        return self.weight * source


class Stacked(Pairs):
    def forward(self, x):
        return super().forward(*x.chunk(2, 1))


@pytest.mark.parametrize("place", ["module", "callback"])
@pytest.mark.parametrize("recipe", ["discriminator with a condition", "PairedTranslation"])
def test_the_discriminator_sees_pairs_that_match(recipe, place):
    """What a source is translated to is the source itself: so it must be after augmentation."""
    discriminator = Stacked() if recipe == "PairedTranslation" else Pairs()
    augment = DiffAugment("translation,cutout") if place == "module" else None
    callbacks = [] if augment else [AugmentationSchedule(0.9, AugmentPipe("bg"))]
    optimizers = {"g_optimizer": lambda p: torch.optim.SGD(p, 0.0), "d_optimizer": lambda p: torch.optim.SGD(p, 0.0)}
    kind = PairedTranslation if recipe == "PairedTranslation" else GANModule
    module = kind(Source(), discriminator, augment=augment, **optimizers)
    fit(module, [(x, x) for x in pictures(3)], callbacks=[R1Penalty(), *callbacks])
    assert max(discriminator.apart) == 0
    assert not torch.equal(discriminator.shown[0], pictures(1)[0])


def test_a_condition_that_no_discriminator_is_told_does_not_matter():
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    module = GANModule(ResNetGenerator(4, 1, 8, 4), judge, 4, augment=DiffAugment())
    condition = torch.zeros(6, 8, 8, dtype=torch.long)
    assert module.train().augment_samples(pictures(1)[0], condition)[1] is condition


# ---------- ADA's rule


class Scripted(nn.Module):
    """A discriminator whose logits of real samples a test has written."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.bias = logits, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return (x[:, 0] + 0 * self.bias).where(x[:, 1] == 1, self.bias)


def scripted(logits):
    """Batches of one-dimensional samples with their logits; the second column says that they are real."""
    return [torch.stack([row, torch.ones(len(row))], 1) for row in logits]


def ada(logits, loss=None, steps=None, **kwargs):
    module = GANModule(MLP([4, 2]), Scripted(logits), 4, loss=loss, augment=AugmentPipe("noise", 0.0))
    callback = AdaptiveAugmentation(**kwargs)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(callback.p)

    # AugmentPipe would move the logits
    module.augment.apply_to = lambda x, draws: x
    fit(module, scripted(logits), callbacks=[callback, Look()])
    return seen, module


def rule(logits, target, interval, speed, p=0.0, threshold=0.0, direction=1.0):
    """The authors' rule: r over the logits since the last change, and p by a fixed step in its direction."""
    found, kept = [], []
    for i, row in enumerate(logits, start=1):
        kept.append(torch.sign(direction * (row - threshold)))
        if i % interval == 0:
            r = torch.cat(kept).mean().item()
            p = max(p + np.sign(r - target) * len(row) * interval / speed, 0)
            kept = []
        found.append(p)
    return found


@pytest.mark.parametrize(("interval", "speed", "p"), [(4, 500.0, 0.0), (1, 80.0, 0.3), (3, 1000.0, 0.01)])
def test_p_follows_the_rule(interval, speed, p):
    generator = torch.Generator().manual_seed(0)
    shift = [0.5, 2.0, 2.0, 2.0, 0.1, -1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    logits = [torch.randn(8, generator=generator) + s for s in shift]
    found, module = ada(logits, interval=interval, speed=speed, p=p)
    assert found == pytest.approx(rule(logits, 0.6, interval, speed, p), abs=1e-12)
    assert len({*found}) >= 2
    assert module.augment.p == pytest.approx(found[-2 if interval == 1 else -interval - 1], abs=1e-12)


def test_p_stays_where_r_is_the_target():
    logits = [torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0])] * 4
    found, _ = ada(logits, interval=2, speed=10.0, p=0.5)
    assert found == [0.5] * 4


@pytest.mark.parametrize(("loss", "threshold", "direction"), [(LeastSquares(), 0.5, 1.0), (Hinge(), 0.0, 1.0)])
def test_p_counts_by_the_threshold_of_the_loss(loss, threshold, direction):
    logits = [torch.tensor([0.1, 0.2, 0.7, 0.9]) + s for s in (0.0, 1.0, 1.0, -1.0, 0.3)]
    found, _ = ada(logits, loss=loss, interval=1, speed=100.0, target=0.2, p=0.2)
    assert found == pytest.approx(rule(logits, 0.2, 1, 100.0, 0.2, threshold, direction), abs=1e-12)


def test_ada_resumes_bit_for_bit(tmp_path):
    def run(steps, path=None):
        torch.manual_seed(0)
        module = GANModule(DCGANGenerator(4, 1, 8, 4), DCGANDiscriminator(1, 8, 4), 4)
        ada = AdaptiveAugmentation(target=0.1, speed=500.0, interval=3, p=0.3)
        run = trainer(
            callbacks=[ada, InstanceNoise(0.1, steps=10)], max_steps=steps, max_epochs=-1, limit_val_batches=0
        )
        run.fit(module, Digits(batch_size=16), ckpt_path=path)
        return run, module, ada

    _, whole, ada_whole = run(10)
    half, _, _ = run(5)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, ada_resumed = run(10, tmp_path / "half.ckpt")
    assert torch.equal(weights(whole), weights(resumed))
    assert ada_whole.state_dict()["p"] == ada_resumed.state_dict()["p"] > 0
    assert torch.equal(ada_whole.counts, ada_resumed.counts)


def test_overfitting_comes_to_its_target():
    """A discriminator that could learn eight images by heart: r goes to the target, as p rises until it cannot."""
    torch.manual_seed(0)
    data = next(iter(_loader(Digits(batch_size=8))))
    images = data[0] if isinstance(data, list | tuple) else data
    module = GANModule(
        DCGANGenerator(4, 1, 8, 8),
        DCGANDiscriminator(1, 8, 16),
        4,
        d_optimizer=lambda p: torch.optim.Adam(p, 2e-3, (0.0, 0.99)),
        g_optimizer=lambda p: torch.optim.Adam(p, 1e-4, (0.0, 0.99)),
    )
    ada = AdaptiveAugmentation(target=0.6, speed=2000.0)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if "balance/overfitting" in trainer.callback_metrics:
                seen.append((ada.p, trainer.callback_metrics["balance/overfitting"].item()))

    fit(module, [images.repeat(4, 1, 1, 1)] * 600, callbacks=[ada, Look()], log_every_n_steps=1)
    p, r = torch.tensor(seen).T
    assert r[:100].mean() > 0.8 or p[100] > 0.2  # without augmentation it learns them by heart
    assert p[-1] > 0.3
    assert abs(r[-200:].mean() - 0.6) < 0.1


def _loader(data):
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def test_augmentation_schedule():
    module = convolutional(augment=AugmentPipe("bg", 0.0))
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append((module.augment.p, trainer.callback_metrics["balance/augmentation"].item()))

    fit(
        module,
        pictures(6),
        callbacks=[AugmentationSchedule(Schedule(0.0, 0.8, 4, "linear")), Look()],
        log_every_n_steps=1,
    )
    assert [p for p, _ in seen] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert [p for _, p in seen] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-6)


def test_a_pipe_of_the_callback_and_one_of_the_module_are_one():
    runs = []
    for own in (True, False):
        module = convolutional(augment=None if own else AugmentPipe("bgc", 0.5))
        fit(module, pictures(3), callbacks=[AugmentationSchedule(0.5, AugmentPipe("bgc") if own else None)])
        runs.append(weights(module))
    assert torch.equal(*runs)
    plain = convolutional()
    fit(plain, pictures(3))
    assert not torch.equal(weights(plain), runs[0])


@pytest.mark.parametrize(
    "callback", [lambda: AdaptiveAugmentation(), lambda: InstanceNoise(), lambda: AugmentationSchedule(0.3)]
)
def test_nothing_is_augmented_outside_of_training(callback):
    module = convolutional()
    judged = Judged(module)
    run = trainer(callbacks=[callback()])
    val = pictures(1, seed=9)[0]
    run.validate(module, DataLoader([val], batch_size=None), verbose=False)
    assert torch.equal(judged.seen[0], val)


# ---------- instance noise


def test_instance_noise():
    module = GANModule(MLP([4, 2]), nn.Linear(2, 1), 4)
    judged = Judged(module)
    zeros = [torch.zeros(2000, 2)] * 5
    run = fit(module, zeros, callbacks=[InstanceNoise(0.4, steps=4)], log_every_n_steps=1)
    reals = judged.seen[::3]
    for step, real in enumerate(reals):
        expected = 0.4 * max(1 - step / 4, 0)
        assert real.std().item() == pytest.approx(expected, rel=0.05)
        if expected:
            assert normal(real.flatten(), expected) > 1e-3
    assert run.callback_metrics["balance/instance_noise"] == 0
    fakes = judged.seen[1::3]
    assert (fakes[0] - fakes[-1]).std() > 0


def test_instance_noise_on_the_dirac_gan():
    """METHODS: the eigenvalues of the field with noise of σ are −σ²/4 ± √(σ⁴/16 − ¼)."""
    for sigma, expected in ((0.7, (-0.1225, 0.4848)), (1.0, (-0.25, 0.4330))):
        roots = np.roots([1, sigma**2 / 2, 0.25])
        assert roots[0].real == pytest.approx(expected[0], abs=1e-4)
        assert abs(roots[0].imag) == pytest.approx(expected[1], abs=1e-4)
        # D(x) = ψ x; L_D = E sp(−ψ(0 + σε)) + E sp(ψ(θ + σε)), L_G = E sp(−ψ(θ + σε)); the field by differences at 0
        e = np.random.default_rng(0).standard_normal(400_000)

        def field(theta, psi, sigma=sigma, e=e):
            s = lambda t: 1 / (1 + np.exp(-t))  # noqa: E731
            d = np.mean(sigma * e * s(-psi * sigma * e)) - np.mean((theta + sigma * e) * s(psi * (theta + sigma * e)))
            g = np.mean(psi * s(-psi * (theta + sigma * e)))
            return np.array([g, d])

        h = 1e-3
        jacobian = np.stack([(field(h, 0) - field(-h, 0)) / (2 * h), (field(0, h) - field(0, -h)) / (2 * h)], 1)
        found = np.linalg.eigvals(jacobian)
        assert found[0].real == pytest.approx(expected[0], abs=5e-3)
        assert abs(found[0].imag) == pytest.approx(expected[1], abs=5e-3)


# ---------- bad input


@pytest.mark.parametrize("policy", ["", "colour", "color,,cutout", "color,color", 3, None])
def test_policies_are_checked(policy):
    with pytest.raises(ValueError, match="`policy` must be names out of 'color', 'translation', 'cutout'"):
        DiffAugment(policy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bgx",), "`transforms` must be a set, or multipliers by names out of"),
        (({"bg": -1.0},), re.escape("`transforms['bg']` must be a finite number that is not negative, got -1.0")),
        (({},), "`transforms` must be a set, or multipliers"),
        (("bgc", 1.5), re.escape("`p` must be in [0, 1], got 1.5")),
        (("bgc", 0.5, {"bg": 1.0}), "`strengths` must be values by names out of"),
        (("bgc", 0.5, {"scale": -1.0}), re.escape("`strengths['scale']` must be a finite number that is not negative")),
    ],
)
def test_pipes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AugmentPipe(*arguments)


@pytest.mark.parametrize(
    ("augment", "shape", "message"),
    [
        (lambda: DiffAugment(), (5, 2), r"DiffAugment takes images \(n, channels, height, width\)"),
        (lambda: DiffAugment(), (5, 3, 1, 1), "DiffAugment's cutout needs images of 2 by 2 pixels or more"),
        (
            lambda: AugmentPipe("bgc"),
            (5, 2, 8, 8),
            "AugmentPipe's 'brightness' is a colour transform, for images with one or",
        ),
        (lambda: AugmentPipe("bg"), (5, 100), "AugmentPipe takes images"),
        (
            lambda: AugmentPipe("filter", 1.0),
            (5, 3, 16, 16),
            "AugmentPipe's 'imgfilter' needs images of 22 pixels or more",
        ),
    ],
)
def test_samples_are_checked(augment, shape, message):
    with pytest.raises(ValueError, match=message):
        augment()(torch.zeros(shape))


def test_other_numbers_of_channels():
    assert AugmentPipe("bg", 1.0)(torch.zeros(2, 5, 16, 16)).shape == (2, 5, 16, 16)
    assert DiffAugment()(torch.zeros(2, 5, 16, 16)).shape == (2, 5, 16, 16)


@pytest.mark.parametrize("loss", [Wasserstein(), Relativistic()])
def test_losses_without_a_threshold_are_refused(loss):
    with pytest.raises(MisconfigurationException, match="does not have: use another loss"):
        fit(convolutional(loss=loss), pictures(1), callbacks=[AdaptiveAugmentation()])


def test_two_pipes_in_a_module_are_refused():
    pipes = nn.Sequential(AugmentPipe("bg"), nn.Sequential(AugmentPipe("color")))
    with pytest.raises(MisconfigurationException, match="The module has 2 AugmentPipes, and AugmentationSchedule sets"):
        fit(convolutional(augment=pipes), pictures(1), callbacks=[AugmentationSchedule(0.3)])


def test_two_that_set_p_are_refused():
    with pytest.raises(MisconfigurationException, match="both set the probability of augmentations"):
        fit(convolutional(), pictures(1), callbacks=[AdaptiveAugmentation(), AugmentationSchedule(0.3)])
    with pytest.raises(
        MisconfigurationException, match=r"Both `GANModule\(augment=...\)` and AdaptiveAugmentation have an AugmentPipe"
    ):
        fit(convolutional(augment=AugmentPipe()), pictures(1), callbacks=[AdaptiveAugmentation(augment=AugmentPipe())])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveAugmentation(target=1.5), r"`target` must be in \[-1, 1\], got 1.5"),
        (lambda: AdaptiveAugmentation(interval=0), "`interval` must be a positive integer"),
        (lambda: AdaptiveAugmentation(speed=0), "`speed` must be a positive finite number"),
        (lambda: AdaptiveAugmentation(p=2), r"`p` must be in \[0, 1\]"),
        (lambda: AdaptiveAugmentation(augment=nn.Identity()), "`augment` must be"),
        (lambda: AugmentationSchedule(Schedule(0.0, 2.0, 5)), r"`p.end` must be in \[0, 1\], got 2.0"),
        (lambda: InstanceNoise(-0.1), "`std` must be a finite number that is not negative"),
        (lambda: InstanceNoise(Schedule(0.1, 0.0, 5), steps=3), "Give `std` as a number or leave out `steps`"),
        (lambda: InstanceNoise(0.1, steps=0), "`steps` must be a positive integer"),
    ],
)
def test_callbacks_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_transform_is_tried():
    """A new transform needs a test against something outside."""
    names = {name for names in TRANSFORMS.values() for name in names}
    assert names == {
        "xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac", "brightness", "contrast", "lumaflip", "hue",
        "saturation", "imgfilter", "noise", "cutout",
    }  # fmt: skip
