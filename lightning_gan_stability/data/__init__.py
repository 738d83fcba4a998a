"""Data for GAN training: toy mixtures, real images, sounds and tables without a download, and your own."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
