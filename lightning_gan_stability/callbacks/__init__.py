"""Everything that is added to a run by an entry under ``trainer.callbacks``."""

from lightning_gan_stability.callbacks.base import Alternating, Regularizer, UpdateRule
from lightning_gan_stability.callbacks.monitor import SampleGrid
from lightning_gan_stability.callbacks.regularizers import DRAGANPenalty, GradientPenalty, R1Penalty, R2Penalty
from lightning_gan_stability.callbacks.updates import Simultaneous

__all__ = [
    "Alternating",
    "DRAGANPenalty",
    "GradientPenalty",
    "R1Penalty",
    "R2Penalty",
    "Regularizer",
    "SampleGrid",
    "Simultaneous",
    "UpdateRule",
]
