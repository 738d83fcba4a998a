"""Everything that is added to a run by an entry under ``trainer.callbacks``."""

from lightning_gan_stability.callbacks.averaging import GeneratorEMA, Lookahead
from lightning_gan_stability.callbacks.balance import AdaptiveUpdateRatio, UpdateRatio
from lightning_gan_stability.callbacks.base import Alternating, Regularizer, UpdateRule
from lightning_gan_stability.callbacks.collapse import CollapseDetector
from lightning_gan_stability.callbacks.gradient_penalties import (
    ApproximateR1Penalty,
    ApproximateR2Penalty,
    DRAGANPenalty,
    GradientPenalty,
    R1Penalty,
    R2Penalty,
)
from lightning_gan_stability.callbacks.health import HealthMonitor
from lightning_gan_stability.callbacks.monitor import SampleGrid
from lightning_gan_stability.callbacks.normalize import SpectralNorm, WeightClipping
from lightning_gan_stability.callbacks.quality import QualityMonitor
from lightning_gan_stability.callbacks.regularizers import (
    ConsistencyPenalty,
    LeCam,
    LogitDrift,
    ModeSeeking,
    OrthogonalPenalty,
    PathLengthPenalty,
)
from lightning_gan_stability.callbacks.unrolling import Unrolling
from lightning_gan_stability.callbacks.updates import (
    CompetitiveGradientDescent,
    ConsensusOptimization,
    Extragradient,
    Simultaneous,
)

__all__ = [
    "AdaptiveUpdateRatio",
    "Alternating",
    "ApproximateR1Penalty",
    "ApproximateR2Penalty",
    "CollapseDetector",
    "CompetitiveGradientDescent",
    "ConsensusOptimization",
    "ConsistencyPenalty",
    "DRAGANPenalty",
    "Extragradient",
    "GeneratorEMA",
    "GradientPenalty",
    "HealthMonitor",
    "LeCam",
    "LogitDrift",
    "Lookahead",
    "ModeSeeking",
    "OrthogonalPenalty",
    "PathLengthPenalty",
    "QualityMonitor",
    "R1Penalty",
    "R2Penalty",
    "Regularizer",
    "SampleGrid",
    "Simultaneous",
    "SpectralNorm",
    "Unrolling",
    "UpdateRatio",
    "UpdateRule",
    "WeightClipping",
]
