"""How the players move on a batch, as entries under ``trainer.callbacks``; at most one in a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
