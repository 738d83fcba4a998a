"""Reads pictures, sounds and arrays that samples are generated from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gan_stability.module import GANModule

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SOUNDS = {".wav", ".flac", ".ogg", ".mp3"}


def read_sources(module: GANModule, place: str) -> list[tuple[str, Callable[[], Tensor]]]:
    """The names of sources, and a function for each that reads it as a batch: one picture or sound, or an array's rows.

    Args:
        module: the GAN, whose first convolution determines whether pictures are read with 1 or 3 channels.
        place: a file, or a folder with its subfolders.

    Raises:
        ValueError: if there are no sources.
    """
    path = Path(place)
    if not path.exists():
        raise ValueError(f"`condition` must be label=NUMBER, or a file or folder that exists, got {place!r}.")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found: list[tuple[str, Callable[[], Tensor]]] = []
    for file in files:
        ending = file.suffix.lower()
        name = str(file.relative_to(path).with_suffix("")) if path.is_dir() else file.stem
        if file.name.startswith("."):
            continue
        if ending in PICTURES:
            found.append((name, partial(_picture, file, _channels(module))))
        elif ending in SOUNDS:
            found.append((name, partial(_sound, file)))
        elif ending == ".npy":
            found.append((name, partial(_array, file)))
    if not found:
        raise ValueError(f"There are no pictures, sounds or arrays (npy) in {place!r}.")
    return found


def _channels(module: GANModule) -> int:
    """Those of images that the generator reads: of its first convolution."""
    from torch import nn

    first = next((part for part in module.generator.modules() if isinstance(part, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3


def _picture(file: Path, channels: int) -> Tensor:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from lightning_gan_stability.data.image_files import opaque

    with Image.open(file) as image:
        plain = opaque(image).convert("L" if channels == 1 else "RGB")
    pixels: Tensor = pil_to_tensor(plain) / 127.5 - 1
    return pixels[None]


def _sound(file: Path) -> Tensor:
    from torch import from_numpy

    from lightning_gan_stability._checks import require

    samples, _ = require("soundfile", "audio").read(str(file), dtype="float32", always_2d=True)
    return from_numpy(samples).mean(1)[None, None]


def _array(file: Path) -> Tensor:
    import numpy as np
    from torch import from_numpy

    return from_numpy(np.load(file, allow_pickle=False))
