"""Differentiable augmentations of the discriminator's inputs in training.

Pass one to a module, ``GANModule(augment=DiffAugment())``. Each sample gets its own random draws, from the module's
noise, so that a resumed run, micro-batches, and several processes instead of one get the same draws. Gradients of any
order flow through them, as penalties need. All parts of a sample, such as an image and its mask, get the same draws.
If the discriminator gets images as condition, these are flipped, moved and cut with their samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_gan_stability._checks import check, check_number, check_share, describe
from lightning_gan_stability._compat import grid_sample_transposed
from lightning_gan_stability.noise import batch_rand, batch_randn
from lightning_gan_stability.outputs import Condition, Sample, tree_leaves, tree_map

__all__ = ["AugmentPipe", "Augmentation", "DiffAugment"]

Draws = dict[str, Tensor]


class Augmentation(nn.Module):
    """Base class of augmentations: one draw for each sample, computed in at least float32, outside of autocast.

    Subclasses implement :meth:`draw` and :meth:`apply_to`. They list in ``moves`` the draws that change positions:
    these are also applied to the images of a condition.

    Example:
        >>> class Mirror(Augmentation):
        ...     moves = frozenset({"mirrored"})
        ...
        ...     def draw(self, x):
        ...         return {"mirrored": batch_rand(len(x), device=x.device) < 0.5}
        ...
        ...     def apply_to(self, x, draws):
        ...         return torch.where(draws["mirrored"][:, None, None, None], x.flip(3), x)
        ...
        >>> Mirror()(torch.ones(5, 3, 16, 16)).shape
        torch.Size([5, 3, 16, 16])
    """

    moves: frozenset[str] = frozenset()

    def forward(self, sample: Sample) -> Sample:
        """Augment samples (n, ...) with new random draws."""
        return self.augment_pairs(sample, None)[0]

    def augment_pairs(self, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Augment samples, and apply the same movements to images (n, channels, height, width) in their condition.

        Raises:
            ValueError: if samples cannot be augmented; if the condition has maps of the samples' height and width that
                are not floating-point images, and so would not be moved.
        """
        leaves = tree_leaves(sample)
        for leaf in leaves:
            self.check_samples(leaf)
        draws = self.draw(leaves[0])
        augmented = tree_map(
            lambda x: self._precisely(x, draws if x is leaves[0] else self.for_another_part(x, draws)), sample
        )
        moved = {name: value for name, value in draws.items() if name in self.moves}
        if not moved or condition is None:
            return augmented, condition
        return augmented, tree_map(lambda x: self._precisely(x, moved) if _is_image(x, leaves[0]) else x, condition)

    def _precisely(self, x: Tensor, draws: Draws) -> Tensor:
        precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        with torch.autocast(x.device.type, enabled=False):
            return self.apply_to(precise, draws).to(x.dtype)

    def check_samples(self, x: Tensor) -> None:
        """Refuse samples that cannot be augmented."""
        if not x.is_floating_point() or x.dim() == 0 or len(x) == 0:
            raise ValueError(
                f"{type(self).__name__} takes floating point samples (n, ...), and at least one, got {describe(x)}."
            )

    def draw(self, x: Tensor) -> Draws:
        """Draw random values for samples, each (n, ...)."""
        raise NotImplementedError

    def for_another_part(self, x: Tensor, draws: Draws) -> Draws:
        """The draws for a further part of samples, given those for the first part."""
        return draws

    def apply_to(self, x: Tensor, draws: Draws) -> Tensor:
        """Augment samples by given draws; draws that are missing change nothing."""
        raise NotImplementedError


def augment_pairs(augment: nn.Module, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
    """Apply an augmentation, or several in a ``Sequential``, to samples and the images of their condition.

    Other modules get only the samples.

    Example:
        >>> augment_pairs(nn.Identity(), torch.zeros(2, 1), None)
        (tensor([[0.],
                [0.]]), None)
    """
    if isinstance(augment, nn.Sequential):
        for part in augment:
            sample, condition = augment_pairs(part, sample, condition)
        return sample, condition
    if isinstance(augment, Augmentation) and condition is not None:
        return augment.augment_pairs(sample, condition)
    return augment(sample), condition


def _is_image(x: Any, sample: Tensor) -> bool:
    """Whether a part of a condition is an image."""
    if not isinstance(x, Tensor) or x.dim() < 3:
        return False
    if x.dim() == 4 and x.is_floating_point():
        return True
    if x.shape[-2:] == sample.shape[-2:]:
        raise ValueError(
            f"An augmentation that moves images cannot move a condition {describe(x)} with them: give the "
            "discriminator a floating point image (n, channels, height, width), such as one channel for each class."
        )
    return False


def _check_images(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"{name} takes images (n, channels, height, width), got {describe(x)}: of other samples only AugmentPipe's "
            "'noise' makes sense."
        )


def _as_rows(values: Tensor, x: Tensor) -> Tensor:
    """Values (n,) in the dtype of samples, shaped to broadcast over all dimensions but the first."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


# ---------- DiffAugment


class DiffAugment(Augmentation):
    r"""Differentiable augmentation of real and generated images; each image is augmented every time.

    * ``"color"``: brightness x + U(−½, ½); then saturation, m + U(0, 2) · (x − m) with the mean m over the channels of
      a pixel; then contrast, m + U(½, 1½) · (x − m) with the mean m of the image.
    * ``"translation"``: by whole pixels, uniform in −s … s with s = ⌊size / 8 + ½⌋ in each direction; filled with
      zeros.
    * ``"cutout"``: a box of zeros of ⌊size / 2 + ½⌋ pixels, whose centre is anywhere in the image, so that it may
      extend beyond it.

    "Differentiable Augmentation for Data-Efficient GAN Training", https://arxiv.org/abs/2006.10738. The authors use all
    three for 100 images, and translation and cutout for CIFAR-10.

    Args:
        policy: comma-separated names from the list, in the order in which they are applied.

    Raises:
        ValueError: if the policy has other names or none; if samples are not images (n, c, h, w) of at least 2 × 2.

    Example:
        >>> DiffAugment("translation,cutout")(torch.ones(5, 3, 16, 16)).shape
        torch.Size([5, 3, 16, 16])
    """

    moves = frozenset({"translation", "cutout"})

    def __init__(self, policy: str = "color,translation,cutout") -> None:
        super().__init__()
        names = [name.strip() for name in policy.split(",")] if isinstance(policy, str) else []
        known = bool(names) and {*names} <= {"color", "translation", "cutout"} and len({*names}) == len(names)
        check(known, "policy", "names out of 'color', 'translation', 'cutout', with commas between them", policy)
        self.policy = policy
        self.names = names

    def extra_repr(self) -> str:
        """The policy."""
        return repr(self.policy)

    def check_samples(self, x: Tensor) -> None:
        """Refuse samples that are not images."""
        super().check_samples(x)
        _check_images("DiffAugment", x)
        if "cutout" in self.names and min(x.shape[2:]) < 2:
            raise ValueError(f"DiffAugment's cutout needs images of 2 by 2 pixels or more, got {describe(x)}.")

    def draw(self, x: Tensor) -> Draws:
        """Uniform values in [0, 1) for each image: three for colours, two for the translation, two for the cutout."""
        shapes = {"color": 3, "translation": 2, "cutout": 2}
        return {name: batch_rand(len(x), shapes[name], device=x.device) for name in self.names}

    def apply_to(self, x: Tensor, draws: Draws) -> Tensor:
        """Augment images by given uniform values."""
        steps: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "color": _jitter,
            "translation": _translate,
            "cutout": _cut_box,
        }
        for name in self.names:
            if name in draws:
                x = steps[name](x, draws[name])
        return x


def _jitter(x: Tensor, u: Tensor) -> Tensor:
    brightness, saturation, contrast = (_as_rows(values, x) for values in u.unbind(1))
    x = x + (brightness - 0.5)
    mean = x.mean(1, keepdim=True)
    x = mean + 2 * saturation * (x - mean)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def _translate(x: Tensor, u: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    down, right = ((size / 8 + 0.5) // 1 for size in (height, width))
    reach_y, reach_x = int(down), int(right)
    padded = functional.pad(x, (reach_x, reach_x, reach_y, reach_y))
    first_y, first_x = ((u[:, i] * (2 * reach + 1)).long()[:, None] for i, reach in enumerate((reach_y, reach_x)))
    rows = first_y + torch.arange(height, device=x.device)
    columns = first_x + torch.arange(width, device=x.device)
    padded = padded.gather(2, rows[:, None, :, None].expand(n, channels, height, padded.shape[3]))
    return padded.gather(3, columns[:, None, None, :].expand(n, channels, height, width))


def _cut_box(x: Tensor, u: Tensor) -> Tensor:
    inside = []
    for i, size in enumerate(x.shape[2:]):
        box = int(size / 2 + 0.5)
        places = size + 1 - box % 2
        first = (u[:, i] * places).long()[:, None] - box // 2
        position = torch.arange(size, device=x.device)
        inside.append((position >= first) & (position < first + box))
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


# ---------- ADA's pipe

# in the order in which they are applied
TRANSFORMS = {
    "blit": ("xflip", "rotate90", "xint"),
    "geom": ("scale", "rotate", "aniso", "xfrac"),
    "color": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "filter": ("imgfilter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
}
SETS = {
    "bg": ("blit", "geom"),
    "bgc": ("blit", "geom", "color"),
    "bgcf": ("blit", "geom", "color", "filter"),
    "bgcfn": ("blit", "geom", "color", "filter", "noise"),
    "bgcfnc": ("blit", "geom", "color", "filter", "noise", "cutout"),
}
STRENGTHS = {
    "xint": 0.125, "scale": 0.2, "rotate": 1.0, "aniso": 0.2, "xfrac": 0.125, "brightness": 0.2, "contrast": 0.5,
    "hue": 1.0, "saturation": 1.0, "imgfilter": 1.0, "noise": 0.1, "cutout": 0.5,
}  # fmt: skip
GROUPS = 2  # parts of a batch that are resampled with margins of their own
GEOMETRY = (*TRANSFORMS["blit"], *TRANSFORMS["geom"])

# the low-pass filter of the wavelet sym6, whose shifts by two are orthonormal
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
# that of sym2
SYM2 = tuple(x / (4 * math.sqrt(2)) for x in (1 - 3**0.5, 3 - 3**0.5, 3 + 3**0.5, 1 + 3**0.5))


class AugmentPipe(Augmentation):
    r"""The augmentations of ADA, each with a probability: rare enough for the generator not to learn them.

    "Training Generative Adversarial Networks with Limited Data", https://arxiv.org/abs/2006.06676. Each transform is
    applied to an image with probability p times its multiplier, in this order, with σ and maxima from ``strengths``:

    * ``"blit"``: ``xflip`` (flips one time in two if chosen), ``rotate90`` (by 0 to 3 quarter turns), ``xint`` (by
      whole pixels, U(−⅛, ⅛) of the size).
    * ``"geom"``: ``scale`` 2^N(0, 0.2²), ``rotate`` U(−π, π), ``aniso`` (s, 1/s) with s as scale, ``rotate`` again
      (either one with probability p), ``xfrac`` N(0, ⅛²) of the size. Then the image is resampled once: padded by
      reflection, at twice the size, bilinearly, with the wavelet sym6 for up- and downsampling.
    * ``"color"``: ``brightness`` + N(0, 0.2²), ``contrast`` · 2^N(0, 0.5²), ``lumaflip`` (negates the grey part one
      time in two), ``hue`` U(−π, π) about the grey axis, ``saturation`` · 2^N(0, 1); the last two for three channels.
    * ``"filter"``: ``imgfilter``, four bands amplified by 2^N(0, 1), normalized to the power of natural images.
    * ``"noise"``: N(0, σ²) on each value with σ = |N(0, 0.1²)|. The only one for samples of any shape, such as sounds
      and points.
    * ``"cutout"``: a box of zeros of half the width and height, centred anywhere.

    ADA uses ``"bgc"`` and lets :class:`~lightning_gan_stability.AdaptiveAugmentation` find p. R3GAN uses
    ``{"bg": 1, "color": 0.5, "cutout": 1}`` and a p that increases to 0.3 (FFHQ) or 0.55 (CIFAR-10).

    Args:
        transforms: a set of transforms (``"blit"``, ``"geom"``, ``"color"``, ``"filter"``, ``"noise"``, ``"cutout"``,
            ``"bg"``, ``"bgc"``, ``"bgcf"``, ``"bgcfn"``, ``"bgcfnc"``), or multipliers of p by names of sets and
            transforms.
        p: probability of each transform, in [0, 1].
        strengths: other values of σ or maxima, by names of transforms. Those of ``xint``, ``rotate`` (1: a full
            circle), ``hue`` and ``cutout`` are maxima, the others standard deviations.

    Raises:
        ValueError: if an argument has a bad value; if a transform needs images (n, c, h, w) and samples are not images;
            or if there is ``"color"`` and images do not have one or three channels.

    Example:
        >>> AugmentPipe("bg", p=0.5)(torch.ones(5, 1, 16, 16)).shape
        torch.Size([5, 1, 16, 16])
    """

    moves = frozenset({*GEOMETRY, "rotate0", "rotate1", "cutout"})

    def __init__(
        self,
        transforms: str | Mapping[str, float] = "bgc",
        p: float = 0.3,
        strengths: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.p = check_share("p", p)
        self.multipliers = _multipliers(transforms)
        strengths = {} if strengths is None else strengths
        known = isinstance(strengths, Mapping) and {*strengths} <= {*STRENGTHS}
        check(known, "strengths", f"values by names out of {', '.join(STRENGTHS)}", strengths)
        self.strengths = STRENGTHS | {k: check_number(f"strengths[{k!r}]", v) for k, v in strengths.items()}
        self._filters: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def extra_repr(self) -> str:
        """Probability and multipliers."""
        return f"p={self.p:g}, {self.multipliers}"

    def _names(self) -> list[str]:
        return [name for name in self.multipliers if self.multipliers[name]]

    def check_samples(self, x: Tensor) -> None:
        """Refuse samples that a transform does not support."""
        super().check_samples(x)
        names = self._names()
        if names in ([], ["noise"]):
            return
        _check_images("AugmentPipe", x)
        colors = [name for name in names if name in TRANSFORMS["color"]]
        if colors and x.shape[1] not in (1, 3):
            raise ValueError(
                f"AugmentPipe's {colors[0]!r} is a colour transform, for images with one or three channels, got "
                f"{describe(x)}: leave out 'color'."
            )

    # ---------- what is drawn

    def draw(self, x: Tensor) -> Draws:
        """The amount of each transform for each sample; one that is not chosen has an amount that changes nothing."""
        n, names = len(x), self._names()
        amounts = {name: 2 if name == "rotate" else 1 for name in names}
        u = _Columns(batch_rand(n, 3 * len(names) + 16, device=x.device))
        z = _Columns(batch_randn(n, 2 * len(names) + 16, device=x.device))
        draws: Draws = {}
        for name in names:
            for i in range(amounts[name]):
                key = f"rotate{i}" if name == "rotate" else name
                draws[key] = self._draw_one(name, u, z)
        if "noise" in draws:
            draws["values"] = batch_randn(*x.shape, device=x.device)
        return draws

    def for_another_part(self, x: Tensor, draws: Draws) -> Draws:
        """The same draws, but new noise."""
        return draws | {"values": batch_randn(*x.shape, device=x.device)} if "noise" in draws else draws

    def _draw_one(self, name: str, u: _Columns, z: _Columns) -> Tensor:
        """An amount (n, ...) of one transform."""
        p, strength = self.p * self.multipliers[name], self.strengths.get(name, 1.0)
        if name == "imgfilter":
            return (2 ** (strength * z.take(4))).where(u.take(4) < p, 1.0)
        chosen = u.take() < (1 - math.sqrt(max(1 - p, 0.0)) if name == "rotate" else p)
        if name in ("xflip", "lumaflip"):
            return (u.take() * 2).floor().where(chosen, 0.0)
        if name == "rotate90":
            return (u.take() * 4).floor().where(chosen, 0.0)
        if name in ("rotate", "hue"):
            return ((2 * u.take() - 1) * math.pi * strength).where(chosen, 0.0)
        if name == "xint":
            return ((2 * u.take(2) - 1) * strength).where(chosen[:, None], 0.0)
        if name == "xfrac":
            return (z.take(2) * strength).where(chosen[:, None], 0.0)
        if name == "brightness":
            return (z.take() * strength).where(chosen, 0.0)
        if name == "noise":
            return (z.take().abs() * strength).where(chosen, 0.0)
        if name == "cutout":
            size = torch.full_like(u.values[:, :1], strength).where(chosen[:, None], 0.0)
            return torch.cat([size, u.take(2)], 1)
        return (2 ** (z.take() * strength)).where(chosen, 1.0)  # scale, aniso, contrast, saturation

    # ---------- what is done

    def apply_to(self, x: Tensor, draws: Draws) -> Tensor:
        """Augment samples by given amounts."""
        given = {name: value.to(x.dtype) for name, value in draws.items()}
        if any(name in given for name in (*GEOMETRY, "rotate0")):
            x = self._resample(x, _inverse_geometry(given, x))
        if any(name in given for name in TRANSFORMS["color"]):
            x = _recolor(x, _color_matrix(given, x))
        if "imgfilter" in given:
            x = self._filter(x, given["imgfilter"])
        if "noise" in given:
            x = x + _as_rows(given["noise"], x) * given["values"]
        if "cutout" in given:
            x = x * ~_box(given["cutout"], x)
        return x

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The wavelet and the filter bank, on the device and in the dtype of samples."""
        key = (x.device, x.dtype)
        if key not in self._filters:
            wavelet = torch.tensor(SYM6, dtype=torch.float64)
            self._filters[key] = (wavelet / wavelet.sum()).to(x), _filter_bank().to(x)
        return self._filters[key]

    def _resample(self, x: Tensor, inverse: Tensor) -> Tensor:
        """The image whose pixel at q is that of ``x`` at ``inverse`` q, both from the centre in pixels."""
        low, _ = self._constants(x)
        margins = _margins(inverse, x.shape[2], x.shape[3], len(low) // 4)
        # images that are moved far need much around them: those that are not are not made to pay for it
        order = margins.amax(1).argsort()
        parts = order.chunk(GROUPS)
        most = torch.stack([margins[part].amax(0) for part in parts]).tolist()
        found = [_resampled(x[part], inverse[part], low, sides) for part, sides in zip(parts, most, strict=True)]
        return torch.cat(found)[order.argsort()]

    def _filter(self, x: Tensor, gains: Tensor) -> Tensor:
        """Amplify bands of frequencies."""
        n, channels, height, width = x.shape
        _, bank = self._constants(x)
        power = x.new_tensor([10, 1, 1, 1]) / 13
        total = torch.ones_like(gains)
        for i in range(len(bank)):
            gain = torch.ones_like(gains)
            gain[:, i] = gains[:, i]
            total = total * gain / (power * gain.square()).sum(1, keepdim=True).sqrt()
        taps = (total @ bank).repeat_interleave(channels, 0)[:, None]
        reach = bank.shape[1] // 2
        if reach >= min(height, width):
            raise ValueError(
                f"AugmentPipe's 'imgfilter' needs images of {reach + 1} pixels or more, got {describe(x)}."
            )
        x = functional.pad(x, [reach] * 4, mode="reflect").reshape(
            1, n * channels, height + 2 * reach, width + 2 * reach
        )
        x = functional.conv2d(x, taps[:, :, None, :], groups=n * channels)
        return functional.conv2d(x, taps[:, :, :, None], groups=n * channels).reshape(n, channels, height, width)


class _Columns:
    """Random values (n, k), taken column by column."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.taken = values, 0

    def take(self, count: int | None = None) -> Tensor:
        """The next column (n,), or the next few (n, count)."""
        start = self.taken
        self.taken += count or 1
        return self.values[:, start] if count is None else self.values[:, start : self.taken]


def _multipliers(transforms: Any) -> dict[str, float]:
    """The multiplier of each transform, in the order in which they are applied."""
    given = {transforms: 1.0} if isinstance(transforms, str) else transforms
    every = [name for names in TRANSFORMS.values() for name in names]
    parts = {name: (name,) for name in every} | TRANSFORMS
    parts |= {name: tuple(t for group in groups for t in TRANSFORMS[group]) for name, groups in SETS.items()}
    known = isinstance(given, Mapping) and bool(given) and {*given} <= {*parts}
    check(known, "transforms", f"a set, or multipliers by names out of {', '.join(parts)}", transforms)
    found: dict[str, float] = {}
    for name, multiplier in given.items():
        value = check_number(f"transforms[{name!r}]", multiplier)
        found |= dict.fromkeys(parts[name], value)
    return {name: found[name] for name in every if name in found}


# ---------- matrices (n, 3, 3) and (n, 4, 4)


def _matrix(*rows: tuple[Tensor | float, ...], like: Tensor) -> Tensor:
    entries = [x if isinstance(x, Tensor) else like.new_tensor(float(x)).expand_as(like) for row in rows for x in row]
    return torch.stack(entries, -1).reshape(*like.shape, len(rows), len(rows[0]))


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix((1, 0, x), (0, 1, y), (0, 0, 1), like=x)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix((x, 0, 0), (0, y, 0), (0, 0, 1), like=x)


def _rotation(angle: Tensor) -> Tensor:
    return _matrix((angle.cos(), -angle.sin(), 0), (angle.sin(), angle.cos(), 0), (0, 0, 1), like=angle)


def _inverse_geometry(draws: Draws, x: Tensor) -> Tensor:
    """Where in the image each pixel of the augmented one comes from, from the centre in pixels, (n, 3, 3)."""
    height, width = x.shape[2:]
    inverse = torch.eye(3, dtype=x.dtype, device=x.device).expand(len(x), 3, 3)
    one = x.new_ones(len(x))
    if "xflip" in draws:
        inverse = inverse @ _scaling(1 - 2 * draws["xflip"], one)
    if "rotate90" in draws:
        inverse = inverse @ _quarter_turns(draws["rotate90"])
    if "xint" in draws:
        pixels = (draws["xint"] * draws["xint"].new_tensor([width, height])).round()
        inverse = inverse @ _translation(*(-pixels).unbind(1))
    if "scale" in draws:
        inverse = inverse @ _scaling(1 / draws["scale"], 1 / draws["scale"])
    if "rotate0" in draws:
        inverse = inverse @ _rotation(draws["rotate0"])
    if "aniso" in draws:
        inverse = inverse @ _scaling(1 / draws["aniso"], draws["aniso"])
    if "rotate1" in draws:
        inverse = inverse @ _rotation(draws["rotate1"])
    if "xfrac" in draws:
        pixels = draws["xfrac"] * draws["xfrac"].new_tensor([width, height])
        inverse = inverse @ _translation(*(-pixels).unbind(1))
    return inverse


def _quarter_turns(quarters: Tensor) -> Tensor:
    """Turns by 90 degrees, without the rounding of sine and cosine."""
    cosine = quarters.new_tensor([1.0, 0.0, -1.0, 0.0])[quarters.long()]
    sine = quarters.new_tensor([0.0, 1.0, 0.0, -1.0])[quarters.long()]
    return _matrix((cosine, -sine, 0), (sine, cosine, 0), (0, 0, 1), like=cosine)


def _margins(inverse: Tensor, height: int, width: int, reach: int) -> Tensor:
    """How many pixels must be there left, above, right and below for what is looked at, as far as there can be, (n, 4).

    The result is resampled with ``reach`` pixels around it, and made from as many around what is looked at, and half a
    one. With fewer, which the authors' code has, a sample would depend on the others of its batch in small digits.
    """
    x, y = width / 2 + reach, height / 2 + reach
    corners = inverse.new_tensor([[-x, x, x, -x], [-y, -y, y, y], [1, 1, 1, 1]])
    seen = (inverse @ corners)[:, :2]
    most = torch.cat([-seen.amin(2), seen.amax(2)], 1) + reach + 0.5
    inside = inverse.new_tensor([(width - 1) / 2, (height - 1) / 2] * 2)
    return (most - inside).clamp(min=0).minimum(2 * inside).ceil().long()


def _color_matrix(draws: Draws, x: Tensor) -> Tensor:
    """What a colour (r, g, b, 1) becomes, (n, 4, 4)."""
    eye = torch.eye(4, dtype=x.dtype, device=x.device)
    grey = x.new_tensor([1, 1, 1, 0]) / math.sqrt(3)
    axis = grey[:, None] * grey
    matrix = eye.expand(len(x), 4, 4)
    if "brightness" in draws:
        b = draws["brightness"]
        matrix = _matrix((1, 0, 0, b), (0, 1, 0, b), (0, 0, 1, b), (0, 0, 0, 1), like=b) @ matrix
    if "contrast" in draws:
        c = draws["contrast"]
        matrix = _matrix((c, 0, 0, 0), (0, c, 0, 0), (0, 0, c, 0), (0, 0, 0, 1), like=c) @ matrix
    if "lumaflip" in draws:
        matrix = (eye - 2 * axis * draws["lumaflip"][:, None, None]) @ matrix
    if x.shape[1] == 3 and "hue" in draws:
        matrix = _turn_about_grey(draws["hue"]) @ matrix
    if x.shape[1] == 3 and "saturation" in draws:
        matrix = (axis + (eye - axis) * draws["saturation"][:, None, None]) @ matrix
    return matrix


def _turn_about_grey(angle: Tensor) -> Tensor:
    """Rodrigues' rotation of colours about (1, 1, 1) / √3."""
    same = (1 + 2 * angle.cos()) / 3
    following = (1 - angle.cos()) / 3 + angle.sin() / math.sqrt(3)
    preceding = (1 - angle.cos()) / 3 - angle.sin() / math.sqrt(3)
    rows = (
        (same, preceding, following, 0),
        (following, same, preceding, 0),
        (preceding, following, same, 0),
        (0, 0, 0, 1),
    )
    return _matrix(*rows, like=angle)


def _recolor(x: Tensor, matrix: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    flat = x.reshape(n, channels, height * width)
    if channels == 3:
        flat = matrix[:, :3, :3] @ flat + matrix[:, :3, 3:]
    else:
        mean = matrix[:, :3].mean(1, keepdim=True)
        flat = flat * mean[:, :, :3].sum(2, keepdim=True) + mean[:, :, 3:]
    return flat.reshape(x.shape)


def _box(cutout: Tensor, x: Tensor) -> Tensor:
    """Where the box of (size, centre x, centre y) lies, (n, 1, h, w)."""
    inside = []
    for i, size in ((2, x.shape[2]), (1, x.shape[3])):
        place = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size
        inside.append((place - cutout[:, i : i + 1]).abs() < cutout[:, :1] / 2)
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]


# ---------- resampling and filters


class _GridSample(torch.autograd.Function):
    """``grid_sample``, bilinear with zeros outside, differentiable to any order by the input, in which it is linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return functional.grid_sample(x, grid, align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _GridSampleTransposed.apply(gradient, grid, ctx.shape), None


class _GridSampleTransposed(torch.autograd.Function):
    """The transposed map of ``grid_sample``."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        return grid_sample_transposed(gradient, grid, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _GridSample.apply(gradient, grid), None, None


def _resampled(x: Tensor, inverse: Tensor, low: Tensor, margins: list[int]) -> Tensor:
    """Images at twice the size, looked at where ``inverse`` says, and back at their size."""
    n, channels, height, width = x.shape
    left, top, right, bottom = margins
    reach = len(low) // 4
    x = _upsampling(height, top, bottom, low) @ x @ _upsampling(width, left, right, low).T
    # in pixels of twice the size, of which (v + ½) / 2 is the place of v in those of the image
    move = _translation(x.new_tensor([(left - right) / 2]), x.new_tensor([(top - bottom) / 2]))
    half = x.new_tensor([0.5])
    there = _scaling(half, half) @ _translation(half, half)
    back = _translation(-half, -half) @ _scaling(1 / half, 1 / half)
    shape = (height + 2 * reach) * 2, (width + 2 * reach) * 2
    sizes = x.new_tensor([x.shape[3], x.shape[2], shape[1], shape[0]])
    inverse = back @ move @ inverse @ there
    units = _scaling(2 / sizes[:1], 2 / sizes[1:2]) @ inverse @ _scaling(sizes[2:3] / 2, sizes[3:] / 2)
    grid = functional.affine_grid(units[:, :2], [n, channels, *shape], align_corners=False)
    x = _GridSample.apply(x, grid)
    return _downsampling(height, reach, low) @ x @ _downsampling(width, reach, low).T


def _upsampling(size: int, before: int, after: int, low: Tensor) -> Tensor:
    """The matrix that pads by reflection and filters with zeros between pixels, (2 · (size + before + after), size)."""
    padded = functional.pad(torch.eye(size, dtype=low.dtype, device=low.device)[None], (before, after), mode="reflect")
    return functional.conv_transpose1d(padded[0][:, None], 2 * low[None, None], stride=2, padding=len(low) // 2 - 1)[
        :, 0
    ].T


def _downsampling(size: int, margin: int, low: Tensor) -> Tensor:
    """The matrix of the transposed filter, without a margin on both sides, (size, 2 · (size + 2 · margin))."""
    identity = torch.eye(2 * (size + 2 * margin), dtype=low.dtype, device=low.device)
    start = 2 * margin - len(low) // 2 + 1
    return functional.conv1d(identity[:, None, start : len(identity) - start], low[None, None], stride=2)[:, 0].T


def _filter_bank() -> Tensor:
    """Four filters (4, 43 taps) that halve the band from one to the next and add up to the identity."""
    low = torch.tensor(SYM2, dtype=torch.float64)
    high = low * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    low_pass, high_pass = (_convolved(h, h.flip(0)) / 2 for h in (low, high))
    bank = [torch.ones(1, dtype=torch.float64)]
    for _ in range(3):
        spread = []
        for taps in bank:
            zeros = torch.zeros(2 * len(taps) - 1, dtype=torch.float64)
            zeros[::2] = taps
            spread.append(_convolved(zeros, low_pass))
        start = (len(spread[0]) - len(high_pass)) // 2
        bank = [*spread, functional.pad(high_pass, (start, start))]
    return torch.stack(bank)


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    return functional.conv1d(a[None, None], b.flip(0)[None, None], padding=len(b) - 1)[0, 0]
