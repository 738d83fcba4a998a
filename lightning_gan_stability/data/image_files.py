"""Image files of a folder or a zip archive, checked before they are needed, and images as tensors in [-1, 1]."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, TypeAlias
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from lightning_gan_stability._checks import check_bool, check_choice, check_integer
from lightning_gan_stability.noise import generator

Crop: TypeAlias = Literal["center", "random"]
OnError: TypeAlias = Literal["raise", "skip"]
ImageBatch: TypeAlias = Tensor | tuple[Tensor, ...]

# Modes whose pixels can be read whatever their values are. The others are read before training starts.
_ANY_VALUE = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N")
_PNG_END, _JPEG_END = b"IEND\xaeB`\x82", b"\xff\xd9"


# What Pillow raises about an image, or zipfile about a member of an archive (RuntimeError: it is encrypted).
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error, zlib.error, BadZipFile),
    Image.DecompressionBombError,
)


@contextmanager
def naming(image: str) -> Iterator[None]:
    """Name the image in whatever is raised about it.

    Raises:
        ValueError: If anything is.
    """
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"This image cannot be read: {image} ({error})") from error


class ImageFiles:
    """The image files below a folder or in a zip archive, as `image` or `(image, label)`.

    Names that begin with a dot are passed over, those of folders too: they are made by programs, such as `._1.png` by
    macOS. The folder that all files of an archive share is the archive's root.

    Args:
        folder: Path of the folder or of the archive.
        labels: Whether first-level sub-folders are classes.

    Attributes:
        paths: Of the files, relative to the root, in order.
        classes: Names of the classes, in order; None if there are none.
        labels: Number of the class of each file; None if there are no classes.

    Raises:
        ValueError: If there is no image, or one lies beside class folders.
    """

    def __init__(self, folder: str, labels: bool = True) -> None:
        self.folder = Path(folder)
        self.is_archive = not self.folder.is_dir()
        self._archive: tuple[int, ZipFile] | None = None  # the process that opened it, and the open archive
        self._members: dict[str, str] = self._in_archive() if self.is_archive else {}  # of an archive, by their paths
        found = (
            PurePosixPath(path).parts for path in (self._members if self.is_archive else self._in_folder(self.folder))
        )
        files = sorted(
            parts
            for parts in found
            if PurePosixPath(parts[-1]).suffix.lower() in IMG_EXTENSIONS and not any(p.startswith(".") for p in parts)
        )
        if not files:
            raise ValueError(f"`folder` has no images ({', '.join(IMG_EXTENSIONS)}): {folder}")
        self.paths = ["/".join(parts) for parts in files]
        root = 0
        if self.is_archive:
            shared = [len(set(names)) == 1 for names in zip(*(parts[:-1] for parts in files), strict=False)]
            root = [*shared, False].index(False)
        self.classes: list[str] | None = None
        self.labels: list[int] | None = None
        below = [parts[root:] for parts in files]
        if labels and any(len(parts) > 1 for parts in below):
            if alone := [path for path, parts in zip(self.paths, below, strict=True) if len(parts) == 1]:
                raise ValueError(
                    f"{len(alone)} of {len(files)} images lie beside class folders, in none of them; the first is "
                    f"{self.name(alone[0])}. Move these into a class folder, or set `labels=False` to read all images "
                    "without labels."
                )
            self.classes = sorted({first for first, *_ in below})
            number = {name: label for label, name in enumerate(self.classes)}
            self.labels = [number[first] for first, *_ in below]

    def _in_folder(self, folder: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
        """The files below a folder; a link to a folder in which it lies is passed over."""
        place = folder.resolve()
        if place in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._in_folder(Path(entry), (*above, place))
                else:
                    yield Path(entry).relative_to(self.folder).as_posix()

    def _in_archive(self) -> dict[str, str]:
        """The names of members by their paths; some programs write `./a.png`, `/a.png`, or backslashes."""
        try:
            names = [member.filename for member in self._opened().infolist() if not member.is_dir()]
            return {"/".join(_path(name)): name for name in names if not name.endswith("\\")}
        except (BadZipFile, OSError) as error:
            raise ValueError(f"`folder` is neither a folder nor a zip archive: {self.folder} ({error})") from error

    def _opened(self) -> ZipFile:
        # A process of its own for each: those that fork share the place in the file.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), ZipFile(self.folder)
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with naming(self.name(self.paths[index])), self._open(index) as file, Image.open(file) as opened:
            image = opened.copy()  # reads all of it, so that a file that breaks off is noticed here
        return image if self.labels is None else (image, self.labels[index])

    def header(self, index: int) -> tuple[tuple[int, int], str]:
        """Return the width and height of an image and its mode, without reading its pixels.

        Raises:
            ValueError: If its header cannot be read.
        """
        with naming(self.name(self.paths[index])), self._open(index) as file, Image.open(file) as opened:
            return opened.size, opened.mode

    def name(self, path: str) -> str:
        """Return what an error calls a file."""
        return str(self.folder / path)

    def _open(self, index: int) -> IO[bytes]:
        path = self.paths[index]
        return self._opened().open(self._members[path]) if self.is_archive else (self.folder / path).open("rb")

    def drop_unreadable(self, on_error: OnError) -> None:
        """Look at all files, and leave out those that cannot be read, or refuse them.

        Only the header is read, and the end of formats that mark it; the whole file if these leave a doubt.

        Args:
            on_error: "raise" refuses, "skip" leaves out and warns.

        Raises:
            ValueError: If a file cannot be read and `on_error` is "raise", or none can.
        """
        errors: dict[int, ValueError] = {}
        for index in range(len(self)):
            try:
                self._probe(index)
            except ValueError as error:
                errors[index] = error
        if not errors:
            return
        first = next(iter(errors.values()))
        count = f"{len(errors)} of {len(self)} images in `folder` cannot be read"
        if on_error == "raise" or len(errors) == len(self):
            raise ValueError(
                f"{count}. {first}. Repair or remove them, or set `on_error='skip'` to leave such files out."
            ) from first
        rank_zero_warn(f"{count}, and are left out. {first}.")
        kept = [index for index in range(len(self)) if index not in errors]
        self.paths = [self.paths[index] for index in kept]
        if self.labels is not None:
            self.labels = [self.labels[index] for index in kept]

    def _probe(self, index: int) -> None:
        with naming(self.name(self.paths[index])), self._open(index) as file, Image.open(file) as opened:
            if opened.mode in _ANY_VALUE and _has_its_end(opened.format, file):
                return
        item = self[index]
        with naming(self.name(self.paths[index])):
            opaque(item[0] if isinstance(item, tuple) else item)


def _path(member: str) -> tuple[str, ...]:
    """The parts of a member's path, from the root of its archive on."""
    posix = PurePosixPath(member if "/" in member else member.replace("\\", "/"))
    return posix.relative_to(posix.anchor).parts


def _has_its_end(kind: str | None, file: IO[bytes]) -> bool:
    """Return False if a file may have been cut off; formats that do not mark their end pass."""
    if kind == "WEBP":
        file.seek(4)
        size = int.from_bytes(file.read(4), "little") + 8
        return file.seek(0, os.SEEK_END) >= size
    if kind in ("PNG", "JPEG"):
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
        return file.read().rstrip(b"\0\r\n").endswith(_PNG_END if kind == "PNG" else _JPEG_END)
    return True


def opaque(image: Image.Image) -> Image.Image:
    """Return an image without transparency, as its EXIF orientation says: of mode RGB, L or (16 bits, floats) F.

    All values are in 0 ... 255. What is transparent lies on white. Integers of 16 bits are divided by 257; floats in
    [0, 1] are multiplied by 255.

    Raises:
        ValueError: If floats are not in [0, 1], or integers not in 0 ... 65535.
    """
    image = ImageOps.exif_transpose(image)
    mode, hidden = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)
        top = 1 if mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):  # so written, it also catches NaN
            kind, limits = ("floats", "[0, 1]") if mode == "F" else ("integers", "0 ... 65535")
            raise ValueError(f"its {kind} are not in {limits}; scale them, or convert the image to 8 or 16 bits")
        if isinstance(hidden, int):
            values[values == hidden] = top
        return Image.fromarray(values * np.float32(255 / top))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if mode in ("LA", "La", "L", "1") else "RGB")
    return image.convert("L" if mode in ("L", "1") else "RGB")


@dataclass(frozen=True)
class Framing:
    """Makes tensors of one shape from images.

    Args:
        size: Height and width.
        channels: 3 for RGB, 1 for greyscale.
        crop: None squeezes the image into the square.
        resize: Length of the shorter side before the crop; None: `size`.
        flip: Whether training images are mirrored with probability ½.

    Raises:
        ValueError: If an argument is out of its range, or `resize` is given without a crop.
    """

    size: int
    channels: int
    crop: Crop | None
    resize: int | None
    flip: bool

    def __post_init__(self) -> None:
        check_integer("size", self.size)
        check_choice("channels", self.channels, (1, 3))
        check_choice("crop", self.crop, ("center", "random", None))
        check_bool("flip", self.flip)
        if self.resize is not None:
            check_integer("resize", self.resize, least=self.size)
            if self.crop is None:
                raise ValueError("`resize` is the shorter side before a crop: set `crop`, or remove `resize`.")

    def __call__(self, image: Image.Image, place: Sequence[float] | None = None) -> Tensor:
        """Return an image as float32 of shape (channels, size, size) in [-1, 1].

        Args:
            image: Of any mode.
            place: Top and left of the crop, in [0, 1) of the room that there is; None: the centre.
        """
        image = opaque(image)
        if image.mode != "F":
            image = image.convert("RGB" if self.channels == 3 else "L")
        square = [self.size, self.size]
        if self.crop is None:
            image = transforms.resize(image, square, antialias=True)
        else:
            image = transforms.resize(image, [self.resize or self.size], antialias=True)
            if place is None:
                image = transforms.center_crop(image, square)
            else:
                room = image.height - self.size + 1, image.width - self.size + 1
                top, left = (int(share * most) for share, most in zip(place, room, strict=True))
                image = transforms.crop(image, top, left, *square)
        pixels: Tensor = transforms.pil_to_tensor(image) / 127.5 - 1
        return pixels.clamp(-1, 1).expand(self.channels, *square)


@dataclass(frozen=True)
class Draws:
    """Random crops and flips of a training batch of all processes together, as functions of a key."""

    places: list[list[float]] | list[None]
    flips: Tensor

    @classmethod
    def of(cls, framing: Framing, n: int, seed: int, *key: int) -> "Draws":
        """Return the draws for `n` images; `key` is the position, and what else tells batches apart."""
        places: Any = [None] * n
        if framing.crop == "random":
            places = torch.rand(n, 2, generator=generator(seed, "crop", *key), dtype=torch.float64).tolist()
        flips = torch.zeros(n, dtype=torch.bool)
        if framing.flip:
            flips = torch.rand(n, generator=generator(seed, "flip", *key)) < 0.5
        return cls(places, flips)

    def __getitem__(self, part: slice) -> "Draws":
        return Draws(self.places[part], self.flips[part])


def read_batch(
    reads: Sequence[Callable[[Sequence[float] | None], Any]], draws: Draws | None, on_error: OnError
) -> ImageBatch:
    """Return the images, or images and labels, of one batch.

    Args:
        reads: Each returns an image, or a tuple that starts with one, that is cut out at a given place.
        draws: Places and flips; None: no random ones.
        on_error: What is done if an image cannot be read: "skip" puts another one of the batch in its place, so that
            no other batch changes.

    Raises:
        ValueError: If an image cannot be read and `on_error` is "raise", or none can.
    """
    items, errors = {}, []
    for index, read in enumerate(reads):
        try:
            items[index] = read(None if draws is None else draws.places[index])
        except ValueError as error:
            if on_error == "raise":
                raise
            errors.append(error)
    if errors:
        if not items:
            raise errors[0]
        rank_zero_warn(f"{errors[0]}. Another image of the batch takes its place.")
    good = list(items.values())
    batch = default_collate([items.get(index, good[index % len(good)]) for index in range(len(reads))])
    image, *labels = batch if isinstance(batch, (tuple, list)) else [batch]
    if draws is not None and draws.flips.any():
        image = torch.where(draws.flips[:, None, None, None], image.flip(-1), image)
    return (image, *labels) if labels else image


def check_archive_or_folder(folder: str) -> str:
    """Return the path of a folder or of a zip archive.

    Raises:
        ValueError: If it is neither.
    """
    if not Path(folder).exists():
        raise ValueError(f"`folder` does not exist: {folder}")
    if not Path(folder).is_dir() and not is_zipfile(folder):
        raise ValueError(f"`folder` must be a folder or a zip archive: {folder}")
    return folder
