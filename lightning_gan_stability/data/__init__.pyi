from .modules import Digits as Digits
from .modules import Grid as Grid
from .modules import Images as Images
from .modules import Ring as Ring
from .streams import Stream as Stream
