"""Data for GAN training: toy mixtures with known modes, real digits without a download, and your own images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
