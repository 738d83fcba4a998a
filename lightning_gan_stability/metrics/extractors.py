"""Feature extractors, in whose features distances between samples mean something; plain torch."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gan_stability.datasets import digits, stratified
from lightning_gan_stability.noise import generator


class Inception(nn.Module):
    """The Inception network of published FIDs: torch-fidelity's copy of the original weights and resizing.

    Features of images (n, 1 or 3, h, w) in [-1, 1], which are rounded to 8 bits as files would be; grey is repeated for
    red, green and blue. "GANs Trained by a Two Time-Scale Update Rule", https://arxiv.org/abs/1706.08500. The weights
    (91 MB) are read at the first use, from a local file or by a download into torch's cache.

    Args:
        weights: file of the weights, `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release page.
            None: it is downloaded.
        width: how many features: 2048 (FID's), or of an earlier layer 64, 192 or 768.

    Raises:
        ValueError: if ``weights`` is no file or does not hold the weights, if ``width`` is none of those, or if images
            have another form.
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
        self.network: nn.Module | None = None

    def load(self) -> nn.Module:
        """Read the weights, once."""
        if self.network is None:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            try:
                path = None if self.weights is None else str(self.weights)
                self.network = FeatureExtractorInceptionV3("inception", [str(self.width)], path)
            except OSError as error:
                raise RuntimeError(
                    f"Inception's weights cannot be had ({error}). Without internet, fetch them elsewhere and set "
                    "Inception(weights='weights-inception-2015-12-05-6726825d.pth'), or use another extractor: any "
                    "nn.Module from samples to features."
                ) from error
            except Exception as error:
                raise ValueError(f"`weights` does not hold Inception's weights: {self.weights} ({error})") from error
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, width)."""
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Inception takes images (n, 1 or 3, h, w), got shape {tuple(images.shape)}.")
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
        (features,) = self.load().to(images.device)(pixels.expand(-1, 3, -1, -1))
        return features  # type: ignore[no-any-return]


class DigitClassifier(nn.Module):
    """A small network that tells scikit-learn's 8×8 digits apart, for their quality and the number of digits made.

    Trained at the first use on the 1,497 training images of ``Digits(seed=0)``, in seconds and always to the same
    weights; right on more than 97 % of the 300 others. The last hidden layer is the features.

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
        self.trained = False

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 64) of images (n, 1, 8, 8) in [-1, 1]."""
        if images.dim() != 4 or images.shape[1:] != (1, 8, 8):
            raise ValueError(f"DigitClassifier takes images (n, 1, 8, 8), got shape {tuple(images.shape)}.")
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
