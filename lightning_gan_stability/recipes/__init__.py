"""Modules for adversarial training as it is used today: a discriminator beside a reconstruction, or a table."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
