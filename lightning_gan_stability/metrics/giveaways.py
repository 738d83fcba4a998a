"""Statistics of single samples that tell generated from real samples at a glance; plain torch."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gan_stability._checks import check_share

LEAST = 16  # samples of each side
LOOKED_AT = 512  # values of a sample that grids, zeros and saturation are looked for in
LEVELS = 1024  # a grid has no more levels than this: those of three channels of 8 bits, scaled apart
COARSE = 32  # a grid of so many levels is seen at once
VISIBLE = 1 / 128  # what is less than this part of the data's standard deviation is not seen
BANDS = 8  # of the spectrum, up to the Nyquist frequency


class Giveaway(NamedTuple):
    """A statistic of single samples by which real and generated samples can be told apart.

    Attributes:
        kind: ``quantization``, ``constant``, ``range``, ``saturation``, ``spectrum`` or ``statistic``.
        name: name of the statistic, such as ``total variation``.
        value: quantization: number of levels of the grid; constant: share of the positions that are constant; range:
            share of generated samples outside of the range of real ones; saturation: share of the values of real
            samples at the ends of their range; spectrum: decibels by which generated samples have more power;
            statistic: ``auc``.
        auc: probability that the statistic of a generated sample is larger, or smaller if that is more probable; ties
            count by half.
        p_value: p-value of equal distributions, times the number of tests (Bonferroni), at most 1.
        strong: a network sees it at once; False for grids of more than 32 levels and for a range that only some samples
            leave.
        sentence: a description of the finding.
    """

    kind: str
    name: str
    value: float
    auc: float
    p_value: float
    strong: bool
    sentence: str


class _Test(NamedTuple):
    """One number of a sample, and what a finding would say."""

    kind: str
    name: str
    numbers: Sequence[Tensor]  # of real samples (n,), and of generated ones (m,)
    value: float = math.nan  # NaN: the area under the curve
    sentence: str = ""
    tolerance: float = 0.0  # what differs by less counts as equal
    strong: bool = True
    needed: float = 1.0  # area under the curve that is enough, if `separation` is larger
    times: int = 1  # number of tests of which it is the best
    unless: str = ""  # the name of a number that says the same, if it is found


def find_giveaways(real: Tensor, fake: Tensor, level: float = 0.01, separation: float = 0.99) -> list[Giveaway]:
    """Find statistics of single samples by which a discriminator can win without learning what the data look like.

    Each is a simple classifier as in "Revisiting Classifier Two-Sample Tests", https://arxiv.org/abs/1610.06545: a
    threshold on a statistic s, whose area under the ROC curve is P(s(fake) > s(real)) + ½ P(s(fake) = s(real)). A
    finding has an area of at least ``separation``, and a p-value of at most ``level`` by the Mann–Whitney test after
    multiplication by the number of tests.

    * Quantization: real values lie on a grid (8-bit images, one-hot columns), generated ones do not.
    * Constant: positions, such as borders, have the same value in all real samples, but not in generated ones.
    * Range: generated values leave the range of real ones. Reported if at least half of the samples do.
    * Saturation: real values lie at the ends of their range, which generated ones do not reach.
    * Spectrum: power in the highest band of frequencies, radially averaged, and in the frequencies of a checkerboard,
      as shares of all power: "Watch your Up-Convolution", https://arxiv.org/abs/2003.01826.
    * Statistic: mean, standard deviation, smallest and largest value, total variation and share of zeros of a sample,
      each as it is and by its distance from the median of real samples; means of channels, or columns.

    Grids, positions, ranges and medians are computed from one half of the real samples; the other half is compared with
    the generated ones. Differences below 1/128 standard deviation of the data are ignored.

    Args:
        real: (n, d), (n, channels, length), (n, channels, height, width) or volumes.
        fake: (m, ...) of the same shape.
        level: probability of any finding if both are of one distribution.
        separation: smallest area under the curve, in (0.5, 1].

    Returns:
        Findings, strong ones first, then by area; none if both are of one distribution.

    Raises:
        ValueError: if the samples are not floating-point, finite, of one shape, and at least 16 each.

    Example:
        >>> real = torch.randn(64, 3, 8, 8)
        >>> real[..., 0] = 0
        >>> found = find_giveaways(real, torch.randn(64, 3, 8, 8))[0]
        >>> found.kind, found.value, found.auc, found.sentence.partition(",")[0]
        ('constant', 0.125, 1.0, '12.5% of the places (borders of 1 at the left) are the same in all real samples')
    """
    check_share("level", level, open_start=True)
    if not 0.5 < separation <= 1:
        raise ValueError(f"`separation` must be in (0.5, 1], got {separation!r}.")
    real, fake = _checked(real=real, fake=fake)
    tests = [*_tests(real, fake)]
    count, found = sum(test.times for test in tests), list[Giveaway]()
    for test in tests:
        larger = float(_area(test.numbers[0][:, None], test.numbers[1][:, None], test.tolerance))
        auc = max(larger, 1 - larger)
        if auc < min(separation, test.needed) or test.unless in {finding.name for finding in found}:
            continue
        p_value = min(1.0, count * _p_value(*test.numbers))
        if p_value <= level:
            value, strong = auc if math.isnan(test.value) else test.value, test.strong and auc >= separation
            found.append(Giveaway(test.kind, test.name, value, auc, p_value, strong, test.sentence or _compared(test)))
    return sorted(found, key=lambda finding: (not finding.strong, -finding.auc))


# ---------- what they are made of


def _checked(**samples: Tensor) -> list[Tensor]:
    for name, tensor in samples.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor[:1].numel() == 0:
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"`{name}` must be floating-point samples of shape (n, d) or (n, channels, ...), got {what}."
            )
        if len(tensor) < LEAST:
            raise ValueError(f"`{name}` must have at least {LEAST} samples, got {len(tensor)}.")
        if not all(bool(end.isfinite().all()) for end in tensor.flatten(1).aminmax(dim=1)):
            raise ValueError(f"`{name}` has values that are not finite (NaN or infinite).")
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in samples.items()}
    if len(set(shapes.values())) > 1:
        text = " and ".join(f"those of `{name}` are {shape}" for name, shape in shapes.items())
        raise ValueError(f"Samples must be of one shape, but {text}.")
    return [
        tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float() for tensor in samples.values()
    ]


def _area(real: Tensor, fake: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """P(fake > real) + ½ P(fake = real) for each column of (n, s) and (m, s)."""
    x, y = real.T.contiguous().sort(1).values, fake.T.contiguous()
    slack = torch.as_tensor(tolerance, dtype=y.dtype, device=y.device).reshape(-1, 1)
    below, not_above = torch.searchsorted(x, y - slack), torch.searchsorted(x, y + slack, right=True)
    return (below + not_above).double().mean(1) / (2 * len(real))


def _p_value(real: Tensor, fake: Tensor) -> float:
    from scipy.stats import mannwhitneyu  # slow to import

    return float(mannwhitneyu(real.double().cpu().numpy(), fake.double().cpu().numpy()).pvalue)


def _compared(test: _Test) -> str:
    real, fake = (float(part.double().quantile(0.5)) for part in test.numbers)
    return (
        f"The {test.name} alone tells generated samples from real ones: its median is {fake:.4g} for generated samples "
        f"and {real:.4g} for real ones."
    )


def _tests(real: Tensor, fake: Tensor) -> Iterator[_Test]:
    seen = _looked_at(real, fake)
    first, second = (_Samples(real[i::2], seen[0][i::2]) for i in (0, 1))
    yield from _grids(first, second, _Samples(fake, seen[1]))
    yield from _constants(real[::2], real[1::2], fake)
    yield from _ranges(first, second, _Samples(fake, seen[1]))
    yield from _spectra(real, fake)
    yield from _statistics(_Samples(real, seen[0]), _Samples(fake, seen[1]))


class _Samples(NamedTuple):
    samples: Tensor  # (n, ...)
    seen: Tensor  # (n, at most LOOKED_AT), the same places of each


def _looked_at(*parts: Tensor) -> list[Tensor]:
    width = parts[0][0].numel()
    places = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:LOOKED_AT].to(parts[0].device)
    return [part.flatten(1)[:, places] if width > LOOKED_AT else part.flatten(1) for part in parts]


def _scale(x: Tensor) -> Tensor:
    """The difference that is just seen: one for samples with places, one for each column of others."""
    if x.dim() > 2:
        return x.std() * VISIBLE
    scale = x.std(0) * VISIBLE
    some = scale > 0  # a constant column is compared on the scale of the others
    return scale.where(some, scale[some].median()) if some.any() else scale


def _grids(first: _Samples, second: _Samples, fake: _Samples) -> Iterator[_Test]:
    x, y, z = first.seen, second.seen, fake.seen
    levels = torch.unique(x)
    if 1 < len(levels) <= min(LEVELS, x.numel() // 16):
        off = [_off_grid(part, levels) for part in (y, z)]
        where, most = "Real values lie", len(levels)
    elif first.samples.dim() == 2:  # columns have grids of their own
        grids = [(j, torch.unique(column)) for j, column in enumerate(x.T)]
        grids = [(j, levels) for j, levels in grids if 1 < len(levels) <= min(LEVELS, len(x) // 16)]
        if not grids:
            return
        off = [torch.stack([_off_grid(part[:, j], levels) for j, levels in grids], 1) for part in (y, z)]
        where, most = f"Real values of {len(grids)} columns lie", max(len(levels) for _, levels in grids)
    else:
        return
    shares = [part.double().mean(1) for part in off]
    strong = most <= COARSE
    sentence = (
        f"{where} on a grid of {most} levels, but {float(shares[1].mean()):.0%} of the generated ones do not. "
        + ("Add noise of one step to real samples." if strong else "So fine a grid does no harm in most cases.")
    )
    yield _Test("quantization", "share of values off the grid", shares, most, sentence, strong=strong)


def _off_grid(x: Tensor, levels: Tensor) -> Tensor:
    """Which values are farther from the nearest level than 2 % of the smallest step."""
    nearest = levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, x.contiguous())]
    return (x - nearest).abs() > 0.02 * levels.diff().min()


def _constants(first: Tensor, second: Tensor, fake: Tensor) -> Iterator[_Test]:
    low, high = first.aminmax(dim=0)
    scale = _scale(first)
    constant = high - low <= scale
    share = float(constant.double().mean())
    if share == 0:
        return
    values = ((low + high) / 2)[constant]
    slack = scale.expand_as(constant)[constant]
    apart = [((part[:, constant] - values).abs() > slack).double().mean(1) for part in (second, fake)]
    differing = float((apart[1] > 0).double().mean())
    sentence = (
        f"{share:.1%} of the places ({_places(constant)}) are the same in all real samples, but not in "
        f"{differing:.0%} of the generated ones. Crop them, or let the generator fill in the same value."
    )
    yield _Test("constant", "share of constant places that differ", apart, share, sentence)


def _places(constant: Tensor) -> str:
    """Where places are: the numbers of columns, or how many lines at each border are constant."""
    if constant.dim() == 1:
        numbers = constant.nonzero().flatten().tolist()
        return "columns " + ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
    names = {2: [("start", "end")], 3: [("top", "bottom"), ("left", "right")]}.get(constant.dim(), [])
    found = []
    for dim, ends in enumerate(names, start=1):
        lines = constant.movedim(dim, 0).flatten(1).all(1)
        for end, line in zip(ends, (lines, lines.flip(0)), strict=True):
            if width := int(line.long().cumprod(0).sum()):
                found.append(f"{width} at the {end}")
    return "borders of " + ", ".join(found) if found else "not at a border"


def _ranges(first: _Samples, second: _Samples, fake: _Samples) -> Iterator[_Test]:
    by_column = first.samples.dim() == 2
    scale = _scale(first.samples)
    low, high = first.samples.aminmax(dim=0) if by_column else first.samples.aminmax()
    within = "the range of their column" if by_column else f"[{float(low):.4g}, {float(high):.4g}]"
    ends = [
        part.samples if by_column else torch.stack(part.samples.flatten(1).aminmax(dim=1)).T for part in (second, fake)
    ]
    beyond = [(torch.maximum(part - high, low - part) - scale).amax(1).clamp(min=0) for part in ends]
    outside = float((beyond[1] > 0).double().mean())
    sentence = (
        f"{outside:.0%} of the generated samples have values outside of {within}, in which real values lie. "
        "Let the generator end with a function of this range, such as tanh."
    )
    yield _Test("range", "excess over the range of real values", beyond, outside, sentence, needed=0.75)
    if by_column:
        low, high, scale = *first.seen.aminmax(dim=0), _scale(first.seen)
    share = float(((first.seen == low) | (first.seen == high)).double().mean())
    if not max(0.01, 4 / len(first.seen) if by_column else 0) <= share < 1:  # 2/n: the two ends of each column
        return
    near = [((part.seen <= low + scale) | (part.seen >= high - scale)).double().mean(1) for part in (second, fake)]
    real_share, fake_share = (float(part.mean()) for part in near)
    sentence = (
        f"{real_share:.1%} of the real values lie at the ends of {within}, but {fake_share:.1%} of the generated ones. "
        "Rescale real samples so that the generator reaches the ends."
    )
    yield _Test("saturation", "share of values at the ends of the range", near, share, sentence)


def _spectra(real: Tensor, fake: Tensor) -> Iterator[_Test]:
    if real.dim() < 3 or min(real.shape[2:]) < BANDS:
        return
    weights = _bins(real.shape[2:]).to(real)
    real_power, fake_power = _power(real, weights), _power(fake, weights)
    names = [
        ("power of the highest frequencies", f"above {BANDS - 1}/{BANDS} of the Nyquist frequency"),
        ("power of the checkerboard", "in the pattern that transposed convolutions leave"),
    ]
    for (name, where), x, y in zip(names, real_power.T, fake_power.T, strict=False):
        gap = float(y.double().quantile(0.5) - x.double().quantile(0.5))
        sentence = (
            f"Generated samples have {abs(gap):.1f} dB {'more' if gap > 0 else 'less'} power {where} than real ones. "
            + ("Resize with a filter before a convolution." if gap > 0 else "They are too smooth, or real ones noisy.")
        )
        yield _Test("spectrum", name, (x, y), gap, sentence)


def _bins(shape: torch.Size) -> Tensor:
    """Weights (bins, 2 or 3) of means over all frequencies but 0, the highest band, and those of a checkerboard."""
    axes = [torch.fft.fftfreq(size, 0.5) for size in shape[:-1]] + [torch.fft.rfftfreq(shape[-1], 0.5)]
    grid = torch.meshgrid(*axes, indexing="ij")
    radius = torch.stack(grid).square().sum(0).sqrt()  # 1: the Nyquist frequency
    twice = torch.full_like(radius, 2.0)  # each stands for its negative too, but the first and the last
    twice[..., 0] = 1
    if shape[-1] % 2 == 0:
        twice[..., -1] = 1
    checkerboard = (radius > 0) & torch.stack([(x == 0) | (x.abs() == 1) for x in grid]).all(0)
    parts = [radius > 0, (radius > 1 - 1 / BANDS) & ~checkerboard, checkerboard]
    weights = torch.stack([part * twice for part in parts if part.any()], -1).flatten(0, -2)
    return weights / weights.sum(0)


def _power(x: Tensor, weights: Tensor) -> Tensor:
    """Decibels (n, 1 or 2) of the highest band against all, and of the checkerboard against the highest band."""
    found = []
    for part in x.split(max(1, 2**22 // x[0].numel())):  # type: ignore[no-untyped-call]
        spectrum = torch.view_as_real(torch.fft.rfftn(part, dim=tuple(range(2, x.dim()))))
        power = spectrum.square().sum(-1).flatten(2).mean(1) @ weights
        found.append(power / power[:, :1].clamp(min=1e-30))
    shares = 10 * torch.cat(found).clamp(min=1e-12).log10()
    return shares[:, 1:] - torch.cat([torch.zeros_like(shares[:, :1]), shares[:, 1:-1]], 1)


def _statistics(real: _Samples, fake: _Samples) -> Iterator[_Test]:
    scale, places = _scale(real.samples), real.samples.dim() > 2
    channels = [part.samples.flatten(2).mean(2) if places else part.samples for part in (real, fake)]
    areas = _area(channels[0], channels[1], scale.expand(channels[0].shape[1]))
    best = int((areas - 0.5).abs().argmax())
    name = f"mean of channel {best}" if places else f"column {best}"
    tolerance = float(scale if places else scale[best])
    yield _Test("statistic", name, [part[:, best] for part in channels], tolerance=tolerance, times=len(areas))
    if real.samples[0].numel() == 1:
        return
    near = scale if places else _scale(real.seen)
    numbers = [_numbers(part, means, near) for part, means in zip((real, fake), channels, strict=True)]
    tolerance = float(scale) if places else 0.0
    for name, x in numbers[0].items():
        y = numbers[1][name]
        slack = 0.0 if name == "share of zeros" else tolerance
        yield _Test("statistic", name, (x, y), tolerance=slack)
        middle = x[::2].double().quantile(0.5)
        apart = [(part - middle).abs() for part in (x[1::2], y)]
        distance = f"distance of the {name} from {float(middle):.4g}"
        yield _Test("statistic", distance, apart, tolerance=slack, unless=name)


def _numbers(part: _Samples, channels: Tensor, near: Tensor) -> dict[str, Tensor]:
    flat = part.samples.flatten(1)
    low, high = flat.aminmax(dim=1)
    mean = channels.mean(1)
    numbers = {
        "mean": mean,
        "standard deviation": (flat.square().mean(1) - mean.square()).clamp(min=0).sqrt(),
        "smallest value": low,
        "largest value": high,
        "share of zeros": (part.seen.abs() <= near).double().mean(1),
    }
    if part.samples.dim() > 2:
        dims = [dim for dim in range(2, part.samples.dim()) if part.samples.shape[dim] > 1]
        steps = [part.samples.diff(dim=dim).abs_().flatten(1).mean(1) for dim in dims]
        numbers["total variation"] = sum(steps, torch.zeros_like(mean))
    return numbers
