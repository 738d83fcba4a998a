"""Crops of two real photographs, for image-to-image translation and superresolution without a download."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gan_stability._checks import check, check_choice, check_integer
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.streams import Rows
from lightning_gan_stability.datasets import photographs
from lightning_gan_stability.noise import generator

ImageSource: TypeAlias = Literal["gray", "edges", "low"]
HEIGHT, WIDTH = 427, 640  # of both photographs
TRAINING_WIDTH = WIDTH * 3 // 4  # columns to the right of these are held out


class Photographs(StreamedDataModule):
    """Square crops of the two photographs that come with scikit-learn, alone or with a source to translate.

    * `gray`: luminance 0.299 R + 0.587 G + 0.114 B.
    * `edges`: 2 min(1, ‖∇Y‖) − 1, ∇Y the Sobel filters of the luminance Y in [0, 1].
    * `low`: the image at 1/`factor` of its size by antialiased bicubic interpolation, clamped to [-1, 1].

    Training crops come from the left three quarters of the photographs, at random positions, mirrored with probability
    ½; they never repeat in order. Held-out crops have fixed, distinct positions in the right quarter, which training
    never sees. A batch is the image, float32 of shape `(batch_size, 3, size, size)` in [-1, 1], or the tuple
    `(source, image)`, the source in [-1, 1] of shape `(batch_size, 1, size, size)` or `(batch_size, 3, size / factor,
    size / factor)`.

    Args:
        size: Height and width in pixels, at most 160.
        source: Source to translate into the image: "gray", "edges" or "low"; None: images without a source.
        factor: Ratio of the sizes of the image and a "low" source; must divide `size`.
        batch_size: Images per batch and process.
        epoch_length: Number of batches in an epoch.
        holdout: Number of held-out images of all processes together.
        seed: Seed of the crops.

    Raises:
        ValueError: If an argument is out of its range, or `factor` does not divide `size`.

    Example:
        >>> low, high = next(iter(Photographs(size=32, source="low", batch_size=8).train_dataloader()))
        >>> low.shape, high.shape
        (torch.Size([8, 3, 8, 8]), torch.Size([8, 3, 32, 32]))
    """

    def __init__(
        self,
        size: int = 32,
        source: ImageSource | None = None,
        factor: int = 4,
        batch_size: int = 64,
        epoch_length: int = 100,
        holdout: int = 120,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout), seed)
        limit = WIDTH - TRAINING_WIDTH
        self.size = check(check_integer("size", size) <= limit, "size", f"at most {limit}", size)
        self.source = source if source is None else check_choice("source", source, get_args(ImageSource))
        self.factor = check_integer("factor", factor)
        if source == "low" and size % factor:
            raise ValueError(f"`factor` must divide `size`, got {factor} for {size}.")
        positions = 2 * (HEIGHT - size + 1) * (limit - size + 1)
        check(holdout <= positions, "holdout", f"at most {positions}, the number of positions", holdout)
        self.epoch_length = check_integer("epoch_length", epoch_length)

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        pictures = torch.stack(photographs())
        left, right = pictures[..., :TRAINING_WIDTH], pictures[..., TRAINING_WIDTH:]
        task = Task(self.source, self.factor)
        train = RandomCrops(left, self.size, task, self.batch_size, self.epoch_length, (self.seed, "train", rank))
        held_out = Crops(right, self.size, task)
        places = torch.randperm(len(held_out), generator=generator(self.seed, "holdout"))[: self.holdout]
        return train, Rows(held_out, places, self.batch_size, rank, world, self.seed)


@dataclass(frozen=True)
class Task:
    """Makes the source of images, if there is one."""

    source: ImageSource | None
    factor: int

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the images (n, 3, size, size), or the source and the images."""
        if self.source is None:
            return images
        return {"gray": luminance, "edges": edges, "low": self._low}[self.source](images), images

    def _low(self, images: Tensor) -> Tensor:
        size = images.shape[-1] // self.factor
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


@dataclass(frozen=True)
class RandomCrops:
    """Batches of random crops, mirrored or not, of pictures (k, 3, height, width); `key` tells random streams apart."""

    pictures: Tensor
    size: int
    task: Task
    batch_size: int
    length: int
    key: tuple[int, str, int]

    def __len__(self) -> int:
        return self.length

    def __call__(self, position: int) -> Tensor | tuple[Tensor, Tensor]:
        source = generator(*self.key, position)
        k, _, height, width = self.pictures.shape
        ranges = k, height - self.size + 1, width - self.size + 1
        places = zip(*(torch.randint(n, (self.batch_size,), generator=source).tolist() for n in ranges), strict=True)
        images = torch.stack([crop(self.pictures, place, self.size) for place in places])
        coins = torch.rand(self.batch_size, 1, 1, 1, generator=source) < 0.5
        return self.task(torch.where(coins, images.flip(-1), images))


@dataclass(frozen=True)
class Crops:
    """All crops of pictures (k, 3, height, width) by index."""

    pictures: Tensor
    size: int
    task: Task

    def __len__(self) -> int:
        return math.prod(self._ranges())

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, ...]:
        _, rows, columns = self._ranges()
        place = index // (rows * columns), index // columns % rows, index % columns
        made = self.task(crop(self.pictures, place, self.size)[None])
        return made[0] if isinstance(made, Tensor) else tuple(part[0] for part in made)

    def _ranges(self) -> tuple[int, int, int]:
        k, _, height, width = self.pictures.shape
        return k, height - self.size + 1, width - self.size + 1


def crop(pictures: Tensor, place: tuple[int, int, int], size: int) -> Tensor:
    """Return the crop (3, size, size) of one of several pictures, by number, top and left."""
    number, top, left = place
    return pictures[number, :, top : top + size, left : left + size]


def luminance(images: Tensor) -> Tensor:
    """Return the luminance (n, 1, height, width) of images (n, 3, height, width) by ITU-R BT.601, on the same scale."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return (images * weights[:, None, None]).sum(1, keepdim=True).clamp(-1, 1)


def edges(images: Tensor) -> Tensor:
    """Return how steep the luminance is: (n, 1, height, width) in [-1, 1]."""
    horizontal = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    filters = torch.stack([horizontal, horizontal.T])[:, None]
    padded = F.pad((luminance(images) + 1) / 2, (1, 1, 1, 1), mode="replicate")
    steepness = F.conv2d(padded, filters).norm(dim=1, keepdim=True)
    scaled: Tensor = 2 * steepness.clamp(max=1) - 1
    return scaled
