"""Stable GAN training as PyTorch Lightning callbacks."""

from lightning_gan_stability.callback import Alternating, GANCallback, Regularizer, UpdateRule
from lightning_gan_stability.callbacks.adversarial_start import AdversarialStart
from lightning_gan_stability.callbacks.adversarial_weight import AdaptiveAdversarialWeight, LossBalancer
from lightning_gan_stability.callbacks.averaging import GeneratorEMA, Lookahead
from lightning_gan_stability.callbacks.fake_pool import FakePool
from lightning_gan_stability.callbacks.spectral_norm import SpectralNorm
from lightning_gan_stability.callbacks.update_ratio import AdaptiveUpdateRatio, UpdateRatio
from lightning_gan_stability.callbacks.weight_clipping import WeightClipping
from lightning_gan_stability.data.modules import Digits, Grid, Images, Ring
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
from lightning_gan_stability.metrics.extractors import DigitClassifier, Inception
from lightning_gan_stability.metrics.statistics import DensityCoverage, FrechetDistance, KernelDistance, PrecisionRecall
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.collapse import CollapseDetector
from lightning_gan_stability.monitors.health import HealthMonitor
from lightning_gan_stability.monitors.quality import QualityMonitor
from lightning_gan_stability.monitors.rollback import Remedy, ScaleLearningRate, ScalePenalty
from lightning_gan_stability.monitors.samples import SampleLogger
from lightning_gan_stability.nets import (
    MLP,
    AutoEncoder,
    DCGANDiscriminator,
    DCGANGenerator,
    Packed,
    ResNetDiscriminator,
    ResNetGenerator,
)
from lightning_gan_stability.optim import NegativeMomentum, OptimisticAdam, OptimisticSGD
from lightning_gan_stability.outputs import GANOutputs, StepRecord
from lightning_gan_stability.regularizers.consistency import ConsistencyPenalty
from lightning_gan_stability.regularizers.feature_matching import FeatureMatching
from lightning_gan_stability.regularizers.finite_difference import ApproximateR1Penalty, ApproximateR2Penalty
from lightning_gan_stability.regularizers.generator import ModeSeeking, PathLengthPenalty
from lightning_gan_stability.regularizers.gradient import DRAGANPenalty, GradientPenalty, R1Penalty, R2Penalty
from lightning_gan_stability.regularizers.logits import LeCam, LogitDrift
from lightning_gan_stability.regularizers.reconstruction import Reconstruction
from lightning_gan_stability.regularizers.weights import OrthogonalPenalty
from lightning_gan_stability.update_rules.competitive import CompetitiveGradientDescent
from lightning_gan_stability.update_rules.consensus import ConsensusOptimization
from lightning_gan_stability.update_rules.extragradient import Extragradient
from lightning_gan_stability.update_rules.simultaneous import Simultaneous
from lightning_gan_stability.update_rules.unrolling import Unrolling

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AdaptiveAdversarialWeight",
    "AdaptiveUpdateRatio",
    "AdversarialLoss",
    "AdversarialStart",
    "Alternating",
    "ApproximateR1Penalty",
    "ApproximateR2Penalty",
    "AutoEncoder",
    "BoundaryEquilibrium",
    "CollapseDetector",
    "CompetitiveGradientDescent",
    "ConsensusOptimization",
    "ConsistencyPenalty",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DRAGANPenalty",
    "DensityCoverage",
    "DigitClassifier",
    "Digits",
    "Extragradient",
    "FDivergence",
    "FakePool",
    "FeatureMatching",
    "FrechetDistance",
    "GANCallback",
    "GANModule",
    "GANOutputs",
    "GeneratorEMA",
    "GradientPenalty",
    "Grid",
    "HealthMonitor",
    "Hinge",
    "Images",
    "Inception",
    "KernelDistance",
    "LeCam",
    "LeastSquares",
    "LogitDrift",
    "Lookahead",
    "LossBalancer",
    "Minimax",
    "ModeSeeking",
    "NegativeMomentum",
    "NonSaturating",
    "OptimisticAdam",
    "OptimisticSGD",
    "OrthogonalPenalty",
    "Packed",
    "PathLengthPenalty",
    "PrecisionRecall",
    "QualityMonitor",
    "R1Penalty",
    "R2Penalty",
    "Reconstruction",
    "Regularizer",
    "Relativistic",
    "RelativisticAverage",
    "Remedy",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "Ring",
    "SampleLogger",
    "ScaleLearningRate",
    "ScalePenalty",
    "Simultaneous",
    "SpectralNorm",
    "StepRecord",
    "Unrolling",
    "UpdateRatio",
    "UpdateRule",
    "Wasserstein",
    "WeightClipping",
]
