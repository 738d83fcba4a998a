"""Stable GAN training as PyTorch Lightning callbacks."""

from lightning_gan_stability.audio import LogMelSpectrogram, MelDistance, STFTDistance
from lightning_gan_stability.augment import Augmentation, AugmentPipe, DiffAugment
from lightning_gan_stability.callback import Alternating, GANCallback, Regularizer, UpdateRule
from lightning_gan_stability.callbacks.adversarial_start import AdversarialStart
from lightning_gan_stability.callbacks.adversarial_weight import AdaptiveAdversarialWeight, LossBalancer
from lightning_gan_stability.callbacks.augmentation import AdaptiveAugmentation, AugmentationSchedule, InstanceNoise
from lightning_gan_stability.callbacks.averaging import GeneratorEMA, Lookahead
from lightning_gan_stability.callbacks.fake_pool import FakePool
from lightning_gan_stability.callbacks.optimizer_schedule import OptimizerSchedule
from lightning_gan_stability.callbacks.spectral_norm import SpectralNorm
from lightning_gan_stability.callbacks.update_ratio import AdaptiveUpdateRatio, UpdateRatio
from lightning_gan_stability.callbacks.weight_clipping import WeightClipping
from lightning_gan_stability.data.audio import Audio, Speech
from lightning_gan_stability.data.digit_domains import DigitDomains, SmallMNIST
from lightning_gan_stability.data.images import Images
from lightning_gan_stability.data.modules import Digits, Grid, Ring
from lightning_gan_stability.data.photographs import Photographs
from lightning_gan_stability.data.shards import ImageShards
from lightning_gan_stability.data.table import Table
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
from lightning_gan_stability.metrics.paired import CodebookPerplexity, CodebookUsage, LogMelDistance
from lightning_gan_stability.metrics.statistics import DensityCoverage, FrechetDistance, KernelDistance, PrecisionRecall
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.collapse import CollapseDetector
from lightning_gan_stability.monitors.health import HealthMonitor
from lightning_gan_stability.monitors.memorization import MemorizationMonitor
from lightning_gan_stability.monitors.paired import PairedMonitor
from lightning_gan_stability.monitors.quality import QualityMonitor
from lightning_gan_stability.monitors.rollback import Remedy, ScaleLearningRate, ScalePenalty
from lightning_gan_stability.monitors.samples import SampleLogger
from lightning_gan_stability.monitors.table import TableMonitor
from lightning_gan_stability.nets import (
    MLP,
    AutoEncoder,
    DCGANDiscriminator,
    DCGANGenerator,
    MinibatchStdDev,
    Packed,
    R3GANDiscriminator,
    R3GANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    StyleGenerator,
)
from lightning_gan_stability.optim import NegativeMomentum, OptimisticAdam, OptimisticSGD
from lightning_gan_stability.outputs import GANOutputs, StepRecord
from lightning_gan_stability.recipes.base import Recipe
from lightning_gan_stability.recipes.codec import Codec
from lightning_gan_stability.recipes.super_resolution import SuperResolution
from lightning_gan_stability.recipes.table import TableSynthesis
from lightning_gan_stability.recipes.tokenizer import Tokenizer
from lightning_gan_stability.recipes.translation import PairedTranslation, UnpairedTranslation
from lightning_gan_stability.recipes.vocoder import Vocoder
from lightning_gan_stability.regularizers.consistency import ConsistencyPenalty
from lightning_gan_stability.regularizers.feature_matching import FeatureMatching
from lightning_gan_stability.regularizers.finite_difference import ApproximateR1Penalty, ApproximateR2Penalty
from lightning_gan_stability.regularizers.generator import ModeSeeking, PathLengthPenalty
from lightning_gan_stability.regularizers.gradient import DRAGANPenalty, GradientPenalty, R1Penalty, R2Penalty
from lightning_gan_stability.regularizers.logits import LeCam, LogitDrift
from lightning_gan_stability.regularizers.reconstruction import Reconstruction
from lightning_gan_stability.regularizers.weights import OrthogonalPenalty
from lightning_gan_stability.schedules import Schedule
from lightning_gan_stability.update_rules.competitive import CompetitiveGradientDescent
from lightning_gan_stability.update_rules.consensus import ConsensusOptimization
from lightning_gan_stability.update_rules.extragradient import Extragradient
from lightning_gan_stability.update_rules.simultaneous import Simultaneous
from lightning_gan_stability.update_rules.unrolling import Unrolling

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AdaptiveAdversarialWeight",
    "AdaptiveAugmentation",
    "AdaptiveUpdateRatio",
    "AdversarialLoss",
    "AdversarialStart",
    "Alternating",
    "ApproximateR1Penalty",
    "ApproximateR2Penalty",
    "Audio",
    "AugmentPipe",
    "Augmentation",
    "AugmentationSchedule",
    "AutoEncoder",
    "BoundaryEquilibrium",
    "CodebookPerplexity",
    "CodebookUsage",
    "Codec",
    "CollapseDetector",
    "CompetitiveGradientDescent",
    "ConsensusOptimization",
    "ConsistencyPenalty",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DRAGANPenalty",
    "DensityCoverage",
    "DiffAugment",
    "DigitClassifier",
    "DigitDomains",
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
    "ImageShards",
    "Images",
    "Inception",
    "InstanceNoise",
    "KernelDistance",
    "LeCam",
    "LeastSquares",
    "LogMelDistance",
    "LogMelSpectrogram",
    "LogitDrift",
    "Lookahead",
    "LossBalancer",
    "MelDistance",
    "MemorizationMonitor",
    "MinibatchStdDev",
    "Minimax",
    "ModeSeeking",
    "NegativeMomentum",
    "NonSaturating",
    "OptimisticAdam",
    "OptimisticSGD",
    "OptimizerSchedule",
    "OrthogonalPenalty",
    "Packed",
    "PairedMonitor",
    "PairedTranslation",
    "PathLengthPenalty",
    "Photographs",
    "PrecisionRecall",
    "QualityMonitor",
    "R1Penalty",
    "R2Penalty",
    "R3GANDiscriminator",
    "R3GANGenerator",
    "Recipe",
    "Reconstruction",
    "Regularizer",
    "Relativistic",
    "RelativisticAverage",
    "Remedy",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "Ring",
    "STFTDistance",
    "SampleLogger",
    "ScaleLearningRate",
    "ScalePenalty",
    "Schedule",
    "Simultaneous",
    "SmallMNIST",
    "SpectralNorm",
    "Speech",
    "StepRecord",
    "StyleGenerator",
    "SuperResolution",
    "Table",
    "TableMonitor",
    "TableSynthesis",
    "Tokenizer",
    "UnpairedTranslation",
    "Unrolling",
    "UpdateRatio",
    "UpdateRule",
    "Vocoder",
    "Wasserstein",
    "WeightClipping",
]
