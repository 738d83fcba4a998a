"""Toy mixtures with known modes, and real digits without a download.

Every training batch is a pure function of (seed, rank, position). So a resumed run sees exactly the batches of an
uninterrupted one, ranks never share samples, and the global random state is neither read nor changed.
"""

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gan_stability._checks import check_choice, check_integer, check_number
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.streams import Mixture, Stream
from lightning_gan_stability.datasets import digits, stratified
from lightning_gan_stability.noise import generator

__all__ = ["Digits", "Grid", "Ring", "Stream"]

RingProtocol: TypeAlias = Literal["unrolled", "wgan_gp", "pacgan", "conopt"]
GridProtocol: TypeAlias = Literal["wgan_gp", "pacgan"]

# (radius or spacing, std). WGAN-GP's script divides the finished samples, hence both numbers.
_RINGS = {"unrolled": (2, 0.02), "wgan_gp": (2 / 1.414, 0.02 / 1.414), "pacgan": (1, 0.01), "conopt": (1, 0.01)}
_GRIDS = {"wgan_gp": (2 / 2.828, 0.05 / 2.828), "pacgan": (2, 0.05)}


class _Gaussians(StreamedDataModule):
    """Base of `Ring` and `Grid`."""

    centers: Tensor
    std: float
    balanced = False

    def __init__(self, batch_size: int, epoch_length: int, val_samples: int, seed: int) -> None:
        super().__init__(batch_size, check_integer("val_samples", val_samples), seed)
        self.epoch_length = check_integer("epoch_length", epoch_length)

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        mixture = self.centers, self.std, self.balanced, self.batch_size
        train = Mixture(*mixture, self.epoch_length * self.batch_size, (self.seed, "train", rank))
        return train, Mixture(*mixture, math.ceil(self.holdout / world), (self.seed, "val", rank))


class Ring(_Gaussians):
    """Draw points from Gaussians on a circle, the standard test for mode collapse.

    p(x) = 1/K · Σ_k N(x; r (cos 2πk/K, sin 2πk/K), σ² I), k = 0 ... K − 1.

    Batches are float32 of shape `(batch_size, 2)` in data units, not scaled to [-1, 1]. Training batches never repeat;
    validation and prediction are one fixed sample.

    * `unrolled`: r = 2, σ = 0.02; Unrolled Generative Adversarial Networks, https://arxiv.org/abs/1611.02163
    * `wgan_gp`: the same, both ÷ 1.414; Improved Training of Wasserstein GANs, https://arxiv.org/abs/1704.00028
    * `pacgan`: r = 1, σ = 0.01; PacGAN: The power of two samples in generative adversarial networks,
      https://arxiv.org/abs/1712.04086
    * `conopt`: the same, sample k of a batch from mode k mod K; The Numerics of GANs, https://arxiv.org/abs/1705.10461

    Args:
        protocol: Paper whose numbers to use.
        modes: Number of Gaussians K.
        radius: r after any division; default: the protocol's.
        std: σ after any division; default: the protocol's.
        batch_size: Points per batch and process.
        epoch_length: Number of batches in an epoch.
        val_samples: Held-out points of all processes together, rounded up to equal shares.
        seed: Seed of the points.

    Attributes:
        centers: `(modes, 2)` tensor of the means, float32.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> next(iter(Ring(batch_size=4).train_dataloader())).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        protocol: RingProtocol = "unrolled",
        modes: int = 8,
        radius: float | None = None,
        std: float | None = None,
        batch_size: int = 512,
        epoch_length: int = 1000,
        val_samples: int = 2500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, epoch_length, val_samples, seed)
        default_radius, default_std = _RINGS[check_choice("protocol", protocol, get_args(RingProtocol))]
        angles = 2 * math.pi * torch.arange(check_integer("modes", modes), dtype=torch.float64) / modes
        points = torch.stack([angles.cos(), angles.sin()], dim=1)
        self.centers = (
            check_number("radius", default_radius if radius is None else radius, positive=True) * points
        ).float()
        self.std = check_number("std", default_std if std is None else std, positive=True)
        self.balanced = protocol == "conopt"


class Grid(_Gaussians):
    """Draw points from Gaussians on a square grid, a harder test for mode collapse than the ring.

    p(x) = 1/m² · Σ_ij N(x; s (i − (m − 1)/2, j − (m − 1)/2), σ² I), i, j = 0 ... m − 1.

    Batches and held-out data are like those of :class:`Ring`.

    * `wgan_gp`: s = 2, σ = 0.05, both ÷ 2.828; Improved Training of Wasserstein GANs, https://arxiv.org/abs/1704.00028
    * `pacgan`: s = 2, σ = 0.05; PacGAN: The power of two samples in generative adversarial networks,
      https://arxiv.org/abs/1712.04086

    Args:
        protocol: Paper whose numbers to use.
        side: Gaussians along each side m, so m² modes.
        spacing: s after any division; default: the protocol's.
        std: σ after any division; default: the protocol's.
        batch_size: Points per batch and process.
        epoch_length: Number of batches in an epoch.
        val_samples: Held-out points of all processes together, rounded up to equal shares.
        seed: Seed of the points.

    Attributes:
        centers: `(side², 2)` tensor of the means, float32.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> Grid(side=2).centers.tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """

    def __init__(
        self,
        protocol: GridProtocol = "pacgan",
        side: int = 5,
        spacing: float | None = None,
        std: float | None = None,
        batch_size: int = 512,
        epoch_length: int = 1000,
        val_samples: int = 2500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, epoch_length, val_samples, seed)
        default_spacing, default_std = _GRIDS[check_choice("protocol", protocol, get_args(GridProtocol))]
        line = torch.arange(check_integer("side", side), dtype=torch.float64) - (side - 1) / 2
        points = torch.cartesian_prod(line, line).reshape(-1, 2)
        self.centers = (
            check_number("spacing", default_spacing if spacing is None else spacing, positive=True) * points
        ).float()
        self.std = check_number("std", default_std if std is None else std, positive=True)


class Digits(StreamedDataModule):
    """The 1,797 real handwritten digits that come with scikit-learn and need no download.

    x = pixel / 8 − 1, pixel = 0 ... 16.

    Optical Recognition of Handwritten Digits, test part, https://archive.ics.uci.edu/dataset/80. A batch is `(images,
    labels)`: float32 of shape `(batch_size, 1, 8, 8)` in [-1, 1], and int64 of shape `(batch_size,)` in 0 ... 9. Each
    epoch has its own order, which the processes share out; training drops the last incomplete batch.

    Args:
        batch_size: Images per batch and process.
        holdout: Images for validation and prediction, each digit in proportion; 0: predict the training images.
        seed: Seed of the split and of the order.

    Raises:
        ValueError: If an argument is out of its range, or one batch of all processes exceeds the training set.

    Example:
        >>> images, labels = next(iter(Digits(batch_size=32).train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    def __init__(self, batch_size: int = 64, holdout: int = 300, seed: int = 0) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout, least=0), seed)

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        images, labels = digits()
        order = stratified(labels, generator(self.seed, "holdout"))
        return self.split(TensorDataset(images, labels), order, rank, world)
