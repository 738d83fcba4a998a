"""Your own images: the files of a folder or of a zip archive, or any map-style data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_gan_stability._checks import check_bool, check_choice, check_integer
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.image_files import (
    Crop,
    Draws,
    Framing,
    ImageBatch,
    ImageFiles,
    OnError,
    check_archive_or_folder,
    naming,
    read_batch,
)
from lightning_gan_stability.data.streams import Rows
from lightning_gan_stability.datasets import stratified
from lightning_gan_stability.noise import generator


class Images(StreamedDataModule):
    """Your own images: a folder or a zip archive of files, or any map-style data set.

    x = pixel / 127.5 − 1, pixel = 0 ... 255; x = 2 · pixel / 65535 − 1 of greyscale images with 16 bits; x = 2 · pixel
    − 1 of floats, which must be in [0, 1].

    Each image is rotated by its EXIF orientation, blended with white where it is transparent, converted to RGB or
    greyscale, and resized with antialiasing and cropped by `crop`. CMYK is converted without a colour profile. Of
    colours with 16 bits the upper eight are used, and of several frames the first. A batch is float32 of shape
    `(batch_size, channels, size, size)` in [-1, 1], or `(images, labels)` if there are labels: those of `dataset`, or
    the index of the first-level sub-folder in alphabetical order.

    Files are checked before the first batch: their headers, and whether PNG, JPEG and WebP files are complete. A file
    that fails this check is read in full, and so are floats and integers of 32 bits; an archive is read once. This
    takes about 0.1 ms per file on a local disk. Names that begin with a dot are ignored, such as `._1.png` of macOS.
    The order, its division among processes and incomplete batches are as in :class:`Digits`.

    Args:
        folder: Path of a folder with images, searched recursively, or of a zip archive of them, where a common
            top-level folder is skipped.
        dataset: Data set that returns `image` or `(image, label)` by index, the image from Pillow or a tensor of shape
            `(channels, size, size)` in [-1, 1] (`ToTensor` alone gives [0, 1], which is not detected).
        size: Height and width in pixels.
        channels: 3 for RGB, 1 for greyscale.
        batch_size: Images per batch and process.
        holdout: Images for validation and prediction, each class in proportion (of `dataset`, if it has `targets`, as
            those of torchvision do); 0: no validation (Lightning warns that it is empty, unless `limit_val_batches` is
            0), and predict the training images.
        labels: Use first-level sub-folders, or the second entries of `dataset`'s items, as labels.
        crop: "center" resizes the shorter side and crops the centre; "random" crops at a random position in training,
            and the centre of held-out images; None resizes both sides, which distorts an image that is not square.
        resize: Length of the shorter side before a crop, at least `size`; None: `size`, so that "random" varies along
            the longer side only.
        flip: Flip every training image horizontally with probability ½.
        drop_last: Leave out the last held-out batch if it is incomplete, which a discriminator with statistics over
            groups of samples may need; in training it is always left out.
        on_error: How to handle files that cannot be read: "raise" raises an error with their names; "skip" leaves them
            out and warns with their number. If a file turns out to be broken later, "raise" ends the run, and "skip"
            replaces it with another image of its batch.
        num_workers: Number of processes that load images.
        seed: Seed of the split, of the order, of crops and of flips.

    Attributes:
        classes: Names of the classes: those of the sub-folders, or `dataset.classes` if it exists; None without labels.
        num_classes: Number of classes; None without labels.

    Raises:
        ValueError: If an argument is out of its range; if not exactly one of `folder` and `dataset` is given. Before
            the first batch: if a file cannot be read; if an image lies beside class folders; if there are fewer images
            than one batch. Later: if an item of `dataset` cannot be read, or is a tensor of another shape or range.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> images = Images(dataset=FakeData(size=8, image_size=(3, 40, 50)), size=16, batch_size=4)
        >>> pixels, labels = next(iter(images.train_dataloader()))
        >>> pixels.shape, labels.shape
        (torch.Size([4, 3, 16, 16]), torch.Size([4]))
    """

    def __init__(
        self,
        folder: str | None = None,
        # bare: jsonargparse accepts no init_args for `Dataset[Any]`
        dataset: Dataset | None = None,  # type: ignore[type-arg]
        size: int = 64,
        channels: int = 3,
        batch_size: int = 64,
        holdout: int = 0,
        labels: bool = True,
        crop: Crop | None = "center",
        resize: int | None = None,
        flip: bool = False,
        drop_last: bool = False,
        on_error: OnError = "raise",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout, least=0), seed, num_workers)
        if (folder is None) == (dataset is None):
            raise ValueError(f"Exactly one of `folder` and `dataset` must be given, got {folder!r} and {dataset!r}.")
        if dataset is not None and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")):
            raise ValueError(f"`dataset` must have a length and give items by index, got {type(dataset).__name__}.")
        self.folder = folder if folder is None else check_archive_or_folder(folder)
        self.dataset = dataset
        self.framing = Framing(size, channels, crop, resize, flip)
        self.labels = check_bool("labels", labels)
        self.drop_last = check_bool("drop_last", drop_last)
        self.on_error = check_choice("on_error", on_error, ("raise", "skip"))
        if dataset is not None and on_error == "skip":
            raise ValueError("`on_error='skip'` is for the files of `folder`: remove it, or let `dataset` skip items.")
        if drop_last and not holdout:
            raise ValueError("`drop_last` is for held-out images: set `holdout`, or remove `drop_last`.")
        self._files: ImageFiles | None = None
        self._checked = False

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.framing.size

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for greyscale."""
        return self.framing.channels

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes by number; None without labels."""
        if not self.labels:
            return None
        found = getattr(self.dataset, "classes", None) if self.folder is None else self._listed().classes
        return None if found is None else [str(name) for name in found]

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        classes = self.classes
        return None if classes is None else len(classes)

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        source: Any = self.dataset
        targets = getattr(source, "targets", None)
        if self.folder is not None:
            source = self._listed()
            if not self._checked:
                source.drop_unreadable(self.on_error)
                self._checked = True
            targets = source.labels
        order = _order(targets, len(source), generator(self.seed, "holdout"))
        pixels = Pixels(source, self.framing, self.labels)
        train, shown = self.split(pixels, order, rank, world, drop_last=self.drop_last)
        return ImageRows(train, pixels, self.on_error), ImageRows(shown, pixels, self.on_error)

    def _listed(self) -> ImageFiles:
        if self._files is None:
            assert self.folder is not None
            self._files = ImageFiles(self.folder, self.labels)
        return self._files


def _order(targets: Any, n: int, source: torch.Generator) -> Tensor:
    """Return a random order of `n` images of which every beginning has the classes in proportion, if they are known."""
    try:
        known = np.asarray(targets)
    except ValueError:  # lists of several lengths
        known = np.empty(0)
    if known.shape != (n,) or known.dtype.kind not in "iuU":
        return torch.randperm(n, generator=source)
    return stratified(torch.from_numpy(np.unique(known, return_inverse=True)[1]), source)


@dataclass(frozen=True)
class Pixels:
    """Items of a data set with the image as a tensor in [-1, 1]."""

    source: Any
    framing: Framing
    labels: bool

    def read(self, index: int, place: Sequence[float] | None) -> Any:
        """Return `image` or `(image, label)`, the image cut out at a place; None: the centre."""
        item = self.source[index]
        image, *labels = item if isinstance(item, (tuple, list)) else [item]
        pixels = self._check(image) if isinstance(image, Tensor) else self._convert(image, index, place)
        return (pixels, *labels) if labels and self.labels else pixels

    def _convert(self, image: Any, index: int, place: Sequence[float] | None) -> Tensor:
        if not isinstance(image, Image.Image):
            raise ValueError(f"`dataset` must give Pillow images or tensors, got {type(image).__name__}.")
        files = self.source
        name = files.name(files.paths[index]) if isinstance(files, ImageFiles) else f"item {index} of `dataset`"
        with naming(name):
            return self.framing(image, place)

    def _check(self, image: Tensor) -> Tensor:
        size = self.framing.size
        if image.shape != (shape := (self.framing.channels, size, size)):
            raise ValueError(f"`dataset` must give tensors of shape {shape}, got {tuple(image.shape)}.")
        low, high = image.min().item(), image.max().item()
        if not (low >= -1 and high <= 1):  # so written, it also catches NaN
            raise ValueError(f"`dataset` must give tensors with values in [-1, 1], got [{low:g}, {high:g}].")
        return image.float()


@dataclass(frozen=True)
class ImageRows:
    """Batches of images by position, with random crops and flips if the rows are shuffled."""

    rows: Rows
    pixels: Pixels
    on_error: OnError

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, position: int) -> ImageBatch:
        rows, draws = self.rows, None
        if rows.shuffle:
            every = Draws.of(self.pixels.framing, rows.batch_size * rows.world, rows.seed, position)
            draws = every[rows.rank :: rows.world]
        reads = [partial(self.pixels.read, row) for row in rows.share(position).tolist()]
        return read_batch(reads, draws, self.on_error)
