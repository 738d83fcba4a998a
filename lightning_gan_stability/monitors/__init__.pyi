from .collapse import CollapseDetector as CollapseDetector
from .health import HealthMonitor as HealthMonitor
from .quality import QualityMonitor as QualityMonitor
from .rollback import Remedy as Remedy
from .rollback import ScaleLearningRate as ScaleLearningRate
from .rollback import ScalePenalty as ScalePenalty
from .samples import SampleLogger as SampleLogger
