"""Feature extractors, whose features have meaningful distances; plain torch."""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.datasets import digits, stratified
from lightning_gan_stability.noise import generator

ENOUGH = 50  # images of which none has a value below 0 although they come down to it


class _Range:
    """Tells images in [-1, 1] from those in 0 ... 255 and in [0, 1], by all images so far.

    A generator without tanh may leave [-1, 1], and all images of a batch may be bright. So images are refused only for
    what no data set in [-1, 1] has, and no longer after a value below 0, which the other ranges do not have.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.least, self.images, self.warned = math.inf, 0, False

    def check(self, images: Tensor) -> None:
        """Refuse other images.

        Raises:
            ValueError: if they are not floating-point images, or are in another range.
        """
        if not images.is_floating_point():
            raise ValueError(
                f"{self.name} takes floating-point images in [-1, 1], got {images.dtype}: scale them by x / 127.5 - 1."
            )
        finite = images[images.isfinite()]
        if not len(finite):
            return
        if self.least >= 0:
            self._check_signs(len(images), finite)
        if not self.warned and (outside := (finite.abs() > 1.1).float().mean().item()) > 0.25:
            self.warned = True
            warnings.warn(
                f"{self.name} takes images in [-1, 1], and {outside:.0%} of these values lie outside: scale them, if "
                "they are those of real images.",
                stacklevel=3,
            )

    def _check_signs(self, n: int, values: Tensor) -> None:
        least, largest = (x.item() for x in values.aminmax())
        self.least, self.images = min(self.least, least), self.images + n
        if self.least < 0:
            return
        if largest > 2:
            raise ValueError(
                f"{self.name} takes images in [-1, 1], got values in {least:g} ... {largest:g}: scale them, those in "
                "0 ... 255 by x / 127.5 - 1."
            )
        if self.images >= ENOUGH and self.least < 0.05:
            raise ValueError(
                f"{self.name} takes images in [-1, 1], and none of {self.images} has a value below 0, as images in "
                "[0, 1] have none: scale them by 2 x - 1."
            )


class Inception(nn.Module):
    """The Inception network of published FIDs: torch-fidelity's copy of the original weights and resizing.

    Features of images (n, 1 or 3, h, w) in [-1, 1], which are rounded to 8 bits as in files; grey images are repeated
    for red, green and blue. "GANs Trained by a Two Time-Scale Update Rule", https://arxiv.org/abs/1706.08500. The
    weights (91 MB) are loaded at the first use, from a local file or by a download into torch's cache. Values outside
    of [-1, 1] are clamped; an image that is not finite has features that are not finite.

    Args:
        weights: file of the weights, `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release page.
            None: download it.
        width: number of features: 2048 (FID's), or 64, 192 or 768 of an earlier layer.

    Raises:
        ValueError: if ``weights`` is no file or does not hold the weights, if ``width`` is not one of those, or if
            images have another form or type, or are in 0 ... 255 or (50 of them, none with a value below 0) in [0, 1].
        RuntimeError: if the download fails.

    Example:
        >>> Inception().width
        2048
    """

    def __init__(self, weights: str | Path | None = None, width: Literal[64, 192, 768, 2048] = 2048) -> None:
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"`weights` must be a file, got {str(weights)!r}.")
        if width not in (64, 192, 768, 2048):
            raise ValueError(f"`width` must be 64, 192, 768 or 2048, got {width!r}.")
        self.weights = weights
        self.width = width
        self._range = _Range("Inception")
        self.network: nn.Module | None = None

    def load(self) -> nn.Module:
        """Load the weights, once."""
        if self.network is None:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            try:
                path = None if self.weights is None else str(self.weights)
                self.network = FeatureExtractorInceptionV3("inception", [str(self.width)], path)
            except OSError as error:
                raise RuntimeError(
                    f"Inception's weights could not be downloaded ({error}). Without internet, fetch them "
                    "elsewhere and set Inception(weights='weights-inception-2015-12-05-6726825d.pth'), or use "
                    "another extractor: any nn.Module from samples to features."
                ) from error
            except Exception as error:
                raise ValueError(f"`weights` does not hold Inception's weights: {self.weights} ({error})") from error
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, width)."""
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Inception takes images (n, 1 or 3, h, w), got shape {tuple(images.shape)}.")
        self._range.check(images)
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).nan_to_num().byte()
        (features,) = self.load().to(images.device)(pixels.expand(-1, 3, -1, -1))
        broken = images.isfinite().flatten(1).all(1).logical_not()
        return features.masked_fill(broken[:, None], math.nan)  # type: ignore[no-any-return]


class DigitClassifier(nn.Module):
    """A small classifier of scikit-learn's 8×8 digits, to measure the quality and the variety of generated digits.

    It is trained at the first use on the 1,497 training images of ``Digits(seed=0)``, in seconds and always to the same
    weights. It is right on more than 97 % of the 300 other images. Its features are the last hidden layer.

    Raises:
        ValueError: if images have another form or type, or are in 0 ... 255, 0 ... 16 or (50 of them) in [0, 1].

    Example:
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> DigitClassifier()(images).shape, DigitClassifier().classify(images).shape
        (torch.Size([2, 64]), torch.Size([2, 10]))
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
            )  # fmt: skip
            self.logits = nn.Linear(64, 10)
        self._range = _Range("DigitClassifier")
        self.trained = False

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 64) of images (n, 1, 8, 8) in [-1, 1]."""
        if images.dim() != 4 or images.shape[1:] != (1, 8, 8):
            raise ValueError(f"DigitClassifier takes images (n, 1, 8, 8), got shape {tuple(images.shape)}.")
        self._range.check(images)
        if not self.trained:
            self._train()
        features: Tensor = self.features(images.to(self.logits.weight.dtype))
        return features

    def classify(self, images: Tensor) -> Tensor:
        """Probability (n, 10) of each digit."""
        return self.logits(self(images)).softmax(1)  # type: ignore[no-any-return]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _train(self, steps: int = 300) -> None:
        self.trained = True
        device = self.logits.weight.device
        images, labels = (column.to(device) for column in digits())
        train = stratified(labels.cpu(), generator(0, "holdout"))[300:]
        source = generator(0, "classifier")
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = train[torch.randint(len(train), (128,), generator=source)].to(device)
            loss = nn.functional.cross_entropy(self.logits(self.features(images[rows])), labels[rows])
            # not `backward`, which in this package belongs to the module alone
            for p, gradient in zip(self.parameters(), torch.autograd.grad(loss, [*self.parameters()]), strict=True):
                p.grad = gradient
            optimizer.step()
        self.requires_grad_(False)


class RandomConvolutions(nn.Module):
    """Features of images, series or volumes from convolutions with random weights, so that nothing is downloaded.

    Three layers of convolutions of width 3 with fixed random weights (N(0, 2 / fan-in) by ``seed``), LeakyReLU(0.2) and
    halving are each averaged over a grid of at most 4 cells along each axis. The samples themselves, averaged over at
    most 8 cells, are added. The features distinguish layout, contrast and texture, but not objects: use them to compare
    settings within a run, not for published numbers. "On Random Weights and Unsupervised Feature Learning",
    https://icml.cc/2011/papers/551_icmlpaper.pdf.

    Args:
        width: number of channels of each layer.
        seed: seed of the weights.

    Raises:
        ValueError: if an argument has a bad value; in ``forward``, if samples are not (n, channels, length),
            (n, channels, height, width) or (n, channels, depth, height, width).

    Example:
        >>> RandomConvolutions(width=16)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 960])
    """

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.width = check_integer("width", width)
        self.seed = check_integer("seed", seed, least=0)

    def forward(self, samples: Tensor) -> Tensor:
        """Features (n, d) of samples (n, channels, ...)."""
        axes = samples.dim() - 2
        if axes not in _CONVOLUTIONS:
            raise ValueError(
                "RandomConvolutions takes samples (n, channels, length), (n, channels, height, width) or "
                f"(n, channels, depth, height, width), got shape {tuple(samples.shape)}."
            )
        convolve, pool = _CONVOLUTIONS[axes]
        random = torch.Generator().manual_seed(self.seed)
        x, found = samples, [pool(samples, [min(8, size) for size in samples.shape[2:]]).flatten(1)]
        for _ in range(3):
            shape = self.width, x.shape[1], *[3] * axes
            weight = torch.randn(shape, generator=random) * math.sqrt(2 / math.prod(shape[1:]))
            stride = [2 if size > 4 else 1 for size in x.shape[2:]]
            x = nn.functional.leaky_relu(convolve(x, weight.to(x), stride=stride, padding=1), 0.2)
            found.append(pool(x, [min(4, size) for size in x.shape[2:]]).flatten(1))
        return torch.cat(found, dim=1)


_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    1: (nn.functional.conv1d, nn.functional.adaptive_avg_pool1d),
    2: (nn.functional.conv2d, nn.functional.adaptive_avg_pool2d),
    3: (nn.functional.conv3d, nn.functional.adaptive_avg_pool3d),
}
