"""Recipes: modules that combine a discriminator with a reconstruction, for translation, or for tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
