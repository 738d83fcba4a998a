from .averaging import GeneratorEMA as GeneratorEMA
from .averaging import Lookahead as Lookahead
from .spectral_norm import SpectralNorm as SpectralNorm
from .update_ratio import AdaptiveUpdateRatio as AdaptiveUpdateRatio
from .update_ratio import UpdateRatio as UpdateRatio
from .weight_clipping import WeightClipping as WeightClipping
