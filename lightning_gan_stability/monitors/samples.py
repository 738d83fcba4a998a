"""Callbacks that look at a run and leave it as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_gan_stability._checks import check_integer, describe
from lightning_gan_stability.callback import GANCallback
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.latents import fixed_latents
from lightning_gan_stability.outputs import Condition, Sample, batch_size, tree_map

if TYPE_CHECKING:
    from PIL.Image import Image

REAL, FAKE, FRAME = (160, 160, 160), (200, 30, 40), (90, 90, 90)


class SampleLogger(GANCallback):
    """Draws a picture of the generator's samples every so many steps.

    Images become a grid, two-dimensional points a scatter plot (fake red over real grey). Pictures go to Weights &
    Biases and TensorBoard when these are the run's loggers, otherwise as ``samples/<step>.png`` into the log folder.
    The latents are the same in every picture, the networks in eval mode; a run is the same with and without it.

    Args:
        every: steps between pictures.
        n: number of samples in a picture.

    Raises:
        ValueError: if ``every`` or ``n`` is not a positive integer, or if samples are neither images nor points.

    Example:
        >>> SampleLogger(every=100, n=16).every
        100
    """

    def __init__(self, every: int = 500, n: int = 64) -> None:
        super().__init__()
        self.every = check_integer("every", every)
        self.n = check_integer("n", n)
        self._checked = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if this step is due."""
        module: GANModule = pl_module  # type: ignore[assignment]
        due = module.iteration % self.every == 0
        if not due and self._checked:
            return
        real, condition = module.unpack(batch)
        check_drawable(real)  # as samples are, and long before the first picture
        self._checked = True
        if not due:
            return
        samples = self._sample(module, condition)
        folder = trainer.log_dir  # asks all ranks
        if trainer.is_global_zero:
            image = picture(samples.cpu(), real.cpu())
            loggers: Sequence[Logger | None] = trainer.loggers or [None]
            for logger in loggers:
                _show(logger, image, Path(folder or trainer.default_root_dir), trainer.global_step)

    def _sample(self, module: GANModule, condition: Condition) -> Sample:
        latents = fixed_latents(module, self.n, "pictures")
        if condition is not None:
            rows = torch.arange(self.n, device=module.device) % batch_size(condition)
            condition = tree_map(lambda leaf: leaf[rows], condition)
        with module.noise.of("pictures"), evaluation(module):
            return module.sample(self.n, condition, latents)


def picture(samples: Tensor, real: Tensor) -> Image:
    """Draw samples as one picture.

    Args:
        samples: images (n, c, h, w) in [-1, 1], of which the first channel or the first three are drawn, or points
            (n, 2).
        real: real points for the background of a scatter plot.

    Raises:
        ValueError: if the samples are neither images nor points.

    Example:
        >>> picture(torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)).size
        (22, 22)
    """
    from PIL import Image  # slow to import, and most runs draw no picture

    check_drawable(samples)
    if samples.dim() == 4:
        return Image.fromarray(_grid(samples).permute(1, 2, 0).numpy())
    return _scatter(samples, real)


def check_drawable(samples: Sample) -> None:
    """Refuse what is no picture.

    Raises:
        ValueError: if samples are neither images (n, c, h, w) nor points (n, 2).

    Example:
        >>> check_drawable(torch.zeros(4, 2))
    """
    tensor = isinstance(samples, Tensor)
    if not tensor or not (samples.dim() == 4 or (samples.dim() == 2 and samples.shape[1] == 2)):
        got = f"shape {tuple(samples.shape)}" if tensor else f"{describe(samples)}"
        raise ValueError(
            f"SampleLogger draws images (n, c, h, w) and points (n, 2), got samples of {got}: remove SampleLogger."
        )


def _grid(images: Tensor) -> Tensor:
    from torchvision.utils import make_grid

    images = images[:, : 3 if images.shape[1] >= 3 else 1].float()
    grid: Tensor = make_grid(images, nrow=math.ceil(math.sqrt(len(images))), normalize=True, value_range=(-1, 1))
    return (grid * 255).round().byte()


def _scatter(points: Tensor, real: Tensor, size: int = 480) -> Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    # half steps keep the axes the same from picture to picture; points outside lie on the frame
    limit = math.ceil(2.4 * float(real.abs().max())) / 2
    for data, colour in ((real, REAL), (points, FAKE)):
        for x, y in (data.float().nan_to_num() / limit).clamp(-1, 1).tolist():
            u, v = (1 + x) / 2 * (size - 1), (1 - y) / 2 * (size - 1)
            draw.ellipse((u - 1.5, v - 1.5, u + 1.5, v + 1.5), fill=colour)
    draw.rectangle((0, 0, size - 1, size - 1), outline=FRAME)
    draw.text((8, 6), f"real grey, generated red, axes ±{limit:g}", fill=FRAME)
    return image


def _show(logger: Logger | None, image: Image, folder: Path, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image("samples", [image], step=step)
    elif isinstance(logger, TensorBoardLogger):
        from torchvision.transforms.functional import pil_to_tensor

        logger.experiment.add_image("samples", pil_to_tensor(image), step)
    else:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        image.save(folder / "samples" / f"{step:06d}.png")
