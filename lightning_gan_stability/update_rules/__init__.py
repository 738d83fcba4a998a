"""Update rules: callbacks that define how both players step on a batch. A run has at most one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
