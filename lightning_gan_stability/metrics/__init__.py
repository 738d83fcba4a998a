"""What samples are worth, in three layers.

* Extractors, from samples to features: :class:`Inception`, :class:`DigitClassifier`, or any ``nn.Module``
  (``nn.Identity`` for vectors).
* Values, plain functions of real and fake features (n, d): :func:`frechet_distance`, :func:`precision_recall`, ...
* Statistics, the same for features that arrive in batches and on several ranks, as torchmetrics:
  :class:`FrechetDistance`, :class:`PrecisionRecall`, ...
"""

from lightning_gan_stability.metrics.extractors import DigitClassifier, Inception
from lightning_gan_stability.metrics.statistics import DensityCoverage, FrechetDistance, KernelDistance, PrecisionRecall
from lightning_gan_stability.metrics.values import (
    bin_difference,
    birthday_support,
    density_coverage,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    latent_sensitivity,
    mode_coverage,
    pairwise_diversity,
    precision_recall,
)

__all__ = [
    "DensityCoverage",
    "DigitClassifier",
    "FrechetDistance",
    "Inception",
    "KernelDistance",
    "PrecisionRecall",
    "bin_difference",
    "birthday_support",
    "density_coverage",
    "frechet_distance",
    "frechet_from_moments",
    "kernel_distance",
    "latent_sensitivity",
    "mode_coverage",
    "pairwise_diversity",
    "precision_recall",
]
