"""Draws samples of any kind as pictures, with Pillow."""

from __future__ import annotations

import io
import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_gan_stability._checks import describe

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["image", "point", "number", "vector", "series", "audio", "map", "volume"]
Limits = tuple[float, float]

REAL, FAKE, SOURCE, FRAME = (160, 160, 160), (200, 30, 40), (60, 110, 190), (90, 90, 90)
CHANNELS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189), (140, 86, 75), (227, 119, 194))
MOST_CHANNELS = 16  # of a series; a matrix with more rows and columns is a map
LONG = 1024  # values of a waveform, from which on it is taken for sound
DECIBELS = 80.0  # from the loudest to what is black in a spectrogram
BINS = 24  # of a histogram
MOST_CATEGORIES = 12  # in a panel of bars; the others are one
LIMITS = (-1.0, 1.0)  # of images


def kind_of(samples: Tensor, sound: bool = False) -> Kind | None:
    """The kind of samples, guessed from their shape; None if they cannot be drawn.

    Args:
        samples: with the batch first.
        sound: samples with one or two channels are sound, however short.

    Example:
        >>> kind_of(torch.zeros(4, 3, 8, 8)), kind_of(torch.zeros(4, 1, 4096)), kind_of(torch.zeros(4, 1, 1, 1, 1, 1))
        ('image', 'audio', None)
    """
    shape = samples.shape[1:]
    if not all(shape) or len(shape) > 4:
        return None
    if len(shape) == 2:
        if shape[0] <= 2 and (shape[1] >= LONG or sound):
            return "audio"
        return "series" if min(shape) <= MOST_CHANNELS else "map"
    if len(shape) == 1:
        return "number" if shape[0] == 1 else "point" if shape[0] == 2 else "vector"
    kinds: dict[int, Kind] = {0: "number", 3: "image", 4: "volume"}
    return kinds[len(shape)]


def picture(
    samples: Tensor,
    real: Tensor | None = None,
    sources: Sequence[Tensor] = (),
    paired: bool = False,
    sound: bool = False,
    target: str = "target",
) -> Image:
    """Draw samples as one picture.

    Args:
        samples: images (n, c, h, w) in [-1, 1], of which the first channel or the first three are drawn, or any other
            kind that :func:`kind_of` recognizes.
        real: real samples, which determine the axes; real images are drawn only if they are targets.
        sources: inputs that the samples were generated from, one column each.
        paired: real samples are the targets of generated ones, row by row.
        sound: see :func:`kind_of`.
        target: caption of the targets.

    Raises:
        ValueError: if such samples cannot be drawn.

    Example:
        >>> picture(torch.zeros(4, 1, 8, 8)).size
        (22, 22)
    """
    from PIL import Image  # slow to import, and most runs draw no picture

    kind = kind_of(samples, sound)
    if kind is None:
        raise ValueError(f"There is no picture of samples of shape {tuple(samples.shape)}.")
    real = samples if real is None else real
    if kind == "image" and not paired and not sources:
        return Image.fromarray(_grid(samples).permute(1, 2, 0).numpy())
    if kind == "point":
        return _scatter(samples, real, sources)
    if kind == "number":
        return sheet([[_histogram("", real.flatten(), samples.flatten(), (480, 320))]], "real grey, generated red")
    limits = limits_of(real, kind)
    columns = [_panels(source, kind_of(source, sound), sound=kind == "audio") for source in sources]
    columns.append(_panels(samples, kind, limits, frame=FAKE, loudest=_loudest(real) if kind == "audio" else None))
    names = [*["source"] * len(sources), "generated"]
    if real is not samples and (paired or kind != "image"):
        columns.append(_panels(real, kind, limits))
        names.append(target if paired else "real")
    return sheet(columns, ", ".join(names))


def table_picture(fake: Mapping[str, Any], real: Mapping[str, Any], discrete: Sequence[str]) -> Image:
    """Draw the marginals of a table: a histogram of each column, or bars of its categories.

    Args:
        fake: generated columns by name.
        real: real columns by name, whose range and most frequent categories are drawn.
        discrete: the names of the columns with categories.

    Example:
        >>> table_picture({"age": [30.0, 41.0]}, {"age": [20.0, 50.0]}, []).size
        (226, 148)
    """
    panels = []
    for name, values in real.items():
        if name in discrete:
            panels.append(_categories(name, list(values), list(fake[name])))
        else:
            numbers, made = (torch.as_tensor(x, dtype=torch.float64) for x in (values, fake[name]))
            panels.append(_histogram(name, numbers, made))
    return sheet([panels], "real grey, generated red")


def as_image(made: object) -> Image:
    """Convert what a user's function has drawn to a picture.

    Raises:
        ValueError: if it is neither a Pillow image nor a matplotlib figure.

    Example:
        >>> from PIL import Image
        >>> as_image(Image.new("RGBA", (3, 2))).mode
        'RGB'
    """
    from PIL import Image

    if hasattr(made, "savefig"):
        buffer = io.BytesIO()
        made.savefig(buffer, format="png")
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(made)  # which keeps all figures that it has made
        made = Image.open(buffer)
    if not isinstance(made, Image.Image):
        raise ValueError(
            f"`draw` must return an image of Pillow, a figure of matplotlib, or a dict of these, got {describe(made)}."
        )
    return made if made.mode in ("L", "RGB") else made.convert("RGB")


def limits_of(values: Tensor, kind: Kind) -> Limits:
    """The minimum and maximum of an axis or a grey scale: [-1, 1] for images, otherwise those of real samples.

    Example:
        >>> limits_of(torch.tensor([[0.0, 3.0, 2.0]]), "vector")
        (0.0, 3.0)
    """
    if kind == "image":
        return LIMITS
    values = values.float()
    finite = values[values.isfinite()]
    low, high = finite.aminmax() if len(finite) else (torch.tensor(0.0), torch.tensor(0.0))
    if kind == "audio":
        peak = max(abs(float(low)), abs(float(high)), 1e-3)
        return -peak, peak
    margin = 0.0 if low < high else max(0.5, abs(float(low)) * 1e-3)
    return float(low) - margin, float(high) + margin


# ---------- many panels


def sheet(columns: Sequence[Sequence[Image]], caption: str = "", gap: int = 2) -> Image:
    """Arrange panels in columns that belong together row by row; rows are wrapped so that the sheet is nearly square.

    Panels are enlarged to the height of the tallest one.

    Args:
        columns: lists of panels; they may differ in length.
        caption: a line of text at the top.
        gap: pixels between panels.

    Example:
        >>> from PIL import Image
        >>> sheet([[Image.new("L", (10, 8))] * 3, [Image.new("L", (5, 4))] * 3]).size
        (26, 32)
    """
    from PIL import Image, ImageDraw

    height = max(panel.height for column in columns for panel in column)
    columns = [[_enlarged(panel, height) for panel in column] for column in columns]
    rows = [*zip_longest(*columns)]
    widths = [max(panel.width for panel in column) for column in columns]
    width, between = sum(widths) + gap * (len(widths) - 1), gap if len(columns) == 1 else 4 * gap
    across = min(len(rows), math.ceil(math.sqrt(len(rows) * (height + gap) / (width + between))))
    down, top = math.ceil(len(rows) / across), 14 if caption else 0
    total = across * (width + between) - between + 2 * gap
    whole = Image.new("RGB", (max(total, 6 * len(caption) + 4 * gap), top + down * (height + gap) + gap), "white")
    for i, row in enumerate(rows):
        x, y = gap + i % across * (width + between), top + gap + i // across * (height + gap)
        for panel, step in zip(row, widths, strict=True):
            if panel is not None:
                whole.paste(panel, (x, y))
            x += step + gap
    _write(ImageDraw.Draw(whole), (gap, 1), caption)
    return whole


def _enlarged(panel: Image, height: int) -> Image:
    if panel.height == height:
        return panel
    return panel.resize((round(panel.width * height / panel.height), height), 0)  # the nearest pixel


def _panels(
    samples: Tensor,
    kind: Kind | None,
    limits: Limits | None = None,
    frame: tuple[int, int, int] = FRAME,
    loudest: float | None = None,
    sound: bool = False,
) -> list[Image]:
    """A picture of each sample."""
    if kind is None:
        raise ValueError(f"There is no picture of samples of shape {tuple(samples.shape)}.")
    low, high = limits_of(samples, kind) if limits is None else limits
    samples = samples.float().nan_to_num(low, high, low)
    if kind == "image":
        return [_pixels(sample, low, high) for sample in samples]
    if kind == "map":  # frequencies of a spectrogram go up
        return [_pixels(sample.flip(0) if sound else sample, low, high) for sample in samples]
    if kind == "volume":
        return [_slices(sample, low, high) for sample in samples]
    if kind == "audio":
        loudest = _loudest(samples) if loudest is None else loudest
        return [_sound(sample, low, high, frame, loudest) for sample in samples]
    if kind == "series" and samples.shape[1] > samples.shape[2]:
        samples = samples.transpose(1, 2)
    return [_lines(sample.reshape(-1, sample.shape[-1]), low, high, frame) for sample in samples]


# ---------- one panel


def _pixels(values: Tensor, low: float, high: float) -> Image:
    """An image (c, h, w) or (h, w)."""
    from PIL import Image

    if values.dim() == 3:
        values = values[:3].permute(1, 2, 0) if len(values) >= 3 else values[0]
    scaled = (values.clamp(low, high) - low) / (high - low)
    return Image.fromarray((scaled * 255).round().byte().contiguous().numpy())


def _slices(volume: Tensor, low: float, high: float) -> Image:
    """The middle slices of a volume (c, d, h, w), across each of its three axes."""
    from PIL import Image

    slices = [_pixels(volume.select(axis, volume.shape[axis] // 2), low, high) for axis in (1, 2, 3)]
    whole = Image.new("RGB", (sum(x.width for x in slices) + 2, max(x.height for x in slices)), "white")
    x = 0
    for part in slices:
        whole.paste(part, (x, 0))
        x += part.width + 1
    return whole


def _lines(
    channels: Tensor, low: float, high: float, frame: tuple[int, int, int], size: tuple[int, int] = (120, 80)
) -> Image:
    """A curve for each of the channels (d, t)."""
    from PIL import Image, ImageDraw

    width, height = size
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, curve in enumerate(channels):
        curve = _envelope(curve, width)
        x = torch.linspace(1, width - 2, len(curve)) if len(curve) > 1 else torch.tensor([width / 2])
        y = 1 + (high - curve.clamp(low, high)) / (high - low) * (height - 3)
        colour = frame if len(channels) == 1 else CHANNELS[i % len(CHANNELS)]
        draw.line([*zip(x.tolist(), y.tolist(), strict=True)], fill=colour)
    draw.rectangle((0, 0, width - 1, height - 1), outline=frame)
    return image


def _envelope(curve: Tensor, width: int) -> Tensor:
    """The least and the greatest values of as many parts as there are pixels, of a curve with many more values."""
    if len(curve) <= 2 * width:
        return curve
    parts = curve.tensor_split(width)
    return torch.stack([torch.stack([part.min(), part.max()]) for part in parts]).flatten()


def _sound(wave: Tensor, low: float, high: float, frame: tuple[int, int, int], loudest: float) -> Image:
    """A waveform (channels, t) above its spectrogram in decibels, low frequencies below."""
    from PIL import Image

    shape = _lines(wave, low, high, frame, (160, 40))
    levels = (_decibels(wave.mean(0)) - loudest) / DECIBELS
    spectrogram = _pixels(levels.flip(0), -1.0, 0.0).resize((160, 64), Image.Resampling.BILINEAR)
    whole = Image.new("RGB", (160, 105), "white")
    whole.paste(shape, (0, 0))
    whole.paste(spectrogram, (0, 41))
    return whole


def _decibels(wave: Tensor) -> Tensor:
    """20 log₁₀ |STFT| (frequencies, frames), with windows of at most 512 samples."""
    n_fft = min(512, 2 ** max(2, (len(wave) // 4).bit_length() - 1))
    padded = torch.nn.functional.pad(wave, (0, max(0, n_fft - len(wave))))
    spectrum = torch.stft(padded, n_fft, n_fft // 4, window=torch.hann_window(n_fft), return_complex=True)
    return 20 * spectrum.abs().clamp_min(1e-8).log10()


def _loudest(waves: Tensor) -> float:
    return max(float(_decibels(wave.float().nan_to_num().mean(0)).max()) for wave in waves)


def _histogram(name: str, real: Tensor, fake: Tensor, size: tuple[int, int] = (222, 130)) -> Image:
    """Shares of values in bins between the least and the greatest real value; others are in the bins at the ends."""
    low, high = limits_of(real, "vector")
    shares = []
    for values in (real, fake):
        places = (values.double().nan_to_num(low).clamp(low, high) - low) / (high - low)
        counts = torch.bincount((places * BINS).long().clamp(max=BINS - 1), minlength=BINS)
        shares.append((counts / len(values)).tolist())
    return _bars(name, f"{low:.4g} .. {high:.4g}", shares, size)


def _categories(name: str, real: Sequence[Any], fake: Sequence[Any], size: tuple[int, int] = (222, 130)) -> Image:
    """Shares of the categories, the most frequent first."""
    counts, made = Counter(real), Counter(fake)
    names = [category for category, _ in counts.most_common(MOST_CATEGORIES)]
    shares = [[count[category] / n for category in names] for count, n in ((counts, len(real)), (made, len(fake)))]
    footer = ", ".join(map(str, names))
    if {*counts, *made} - {*names}:
        shares = [[*share, 1 - sum(share)] for share in shares]
        footer += ", others"
    return _bars(name, footer, shares, size)


def _bars(title: str, footer: str, shares: Sequence[Sequence[float]], size: tuple[int, int]) -> Image:
    """Real and generated shares side by side."""
    from PIL import Image, ImageDraw

    width, height = size
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    real, fake = shares
    top, base, step = 16, height - 16, (width - 4) / len(real)
    highest = max(*real, 1e-9) * 1.25  # of the real data, so that axes stay
    for i, (share, other) in enumerate(zip(real, fake, strict=True)):
        x = 2 + i * step
        for value, left, colour in ((share, x, REAL), (other, x + step / 2, FAKE)):
            if value > 0:
                y = base - min(value / highest, 1) * (base - top)
                draw.rectangle((left, y, left + max(step / 2 - 1, 1), base), fill=colour)
    draw.line((0, base, width, base), fill=FRAME)
    most = width // 6
    _write(draw, (3, 2), title[:most])
    _write(draw, (3, base + 2), footer if len(footer) <= most else footer[: most - 2] + "..")
    draw.rectangle((0, 0, width - 1, height - 1), outline=FRAME)
    return image


def _write(draw: Any, place: tuple[int, int], text: str) -> None:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    draw.text(place, plain.encode("latin-1", "replace").decode("latin-1"), fill=FRAME)  # all that each font has


# ---------- all samples in one


def _grid(images: Tensor) -> Tensor:
    from torchvision.utils import make_grid

    images = images[:, : 3 if images.shape[1] >= 3 else 1].float().nan_to_num(-1, 1, -1)
    grid: Tensor = make_grid(images, nrow=math.ceil(math.sqrt(len(images))), normalize=True, value_range=LIMITS)
    return (grid * 255).round().byte()


def _scatter(points: Tensor, real: Tensor, sources: Sequence[Tensor] = (), size: int = 480) -> Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    # half steps keep the axes the same from picture to picture; points outside lie on the frame
    limit = math.ceil(2.4 * max(float(real.float().nan_to_num(0, 0, 0).abs().max()), 1e-3)) / 2
    for data, colour in ((real, REAL), *((source, SOURCE) for source in sources), (points, FAKE)):
        for x, y in (data.float().nan_to_num() / limit).clamp(-1, 1).tolist():
            u, v = (1 + x) / 2 * (size - 1), (1 - y) / 2 * (size - 1)
            draw.ellipse((u - 1.5, v - 1.5, u + 1.5, v + 1.5), fill=colour)
    draw.rectangle((0, 0, size - 1, size - 1), outline=FRAME)
    names = f"real grey, {'source blue, ' if sources else ''}generated red"
    _write(draw, (8, 6), f"{names}, axes ±{limit:g}")
    return image
