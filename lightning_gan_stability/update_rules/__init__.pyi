from .competitive import CompetitiveGradientDescent as CompetitiveGradientDescent
from .consensus import ConsensusOptimization as ConsensusOptimization
from .extragradient import Extragradient as Extragradient
from .simultaneous import Simultaneous as Simultaneous
from .unrolling import Unrolling as Unrolling
