"""Stable GAN training as PyTorch Lightning callbacks."""

from lightning_gan_stability.callbacks import (
    Alternating,
    DRAGANPenalty,
    GradientPenalty,
    R1Penalty,
    R2Penalty,
    Regularizer,
    SampleGrid,
    Simultaneous,
    UpdateRule,
)
from lightning_gan_stability.data import Digits, Grid, Images, Ring
from lightning_gan_stability.doors import Play
from lightning_gan_stability.losses import (
    AdversarialLoss,
    BoundaryEquilibrium,
    FDivergence,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Relativistic,
    RelativisticAverage,
    Wasserstein,
)
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.nets import (
    MLP,
    AutoEncoder,
    DCGANDiscriminator,
    DCGANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
)

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AdversarialLoss",
    "Alternating",
    "AutoEncoder",
    "BoundaryEquilibrium",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DRAGANPenalty",
    "Digits",
    "FDivergence",
    "GANModule",
    "GradientPenalty",
    "Grid",
    "Hinge",
    "Images",
    "LeastSquares",
    "Minimax",
    "NonSaturating",
    "Play",
    "R1Penalty",
    "R2Penalty",
    "Regularizer",
    "Relativistic",
    "RelativisticAverage",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "Ring",
    "SampleGrid",
    "Simultaneous",
    "UpdateRule",
    "Wasserstein",
]
