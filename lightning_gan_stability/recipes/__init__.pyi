from .base import Recipe as Recipe
from .codec import Codec as Codec
from .super_resolution import SuperResolution as SuperResolution
from .table import TableSynthesis as TableSynthesis
from .tokenizer import Tokenizer as Tokenizer
from .translation import PairedTranslation as PairedTranslation
from .translation import UnpairedTranslation as UnpairedTranslation
from .vocoder import Vocoder as Vocoder
