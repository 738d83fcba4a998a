"""Metrics of generated samples, in three layers.

* Extractors, from samples to features: :class:`Inception`, :class:`DigitClassifier`, or any ``nn.Module``
  (``nn.Identity`` for vectors).
* Values, plain functions of real and fake features (n, d): :func:`frechet_distance`, :func:`precision_recall`, ...
* Statistics, the same as torchmetrics, for features that arrive in batches and on several ranks:
  :class:`FrechetDistance`, :class:`PrecisionRecall`, ...
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
