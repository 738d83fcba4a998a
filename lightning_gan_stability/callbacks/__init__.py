"""Callbacks that change how a GAN trains: averages of weights, schedules, normalization and balance."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
