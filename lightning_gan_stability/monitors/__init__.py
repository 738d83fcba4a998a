"""Callbacks that observe a run without changing it, to be listed under ``trainer.callbacks``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
