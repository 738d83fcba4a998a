"""Latents that are the same in each measurement."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gan_stability.layers import parameter_dtype
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.noise import generator


def fixed_latents(module: GANModule, n: int, *key: object) -> Tensor | None:
    """The same n latents each time, on the module's device, in the dtype that its generator computes in.

    Args:
        module: the GAN; None is returned if its generator takes no latents.
        n: number of latents.
        key: tells the latents of different callbacks apart.
    """
    if module.latent_dim is None:
        return None
    latents = torch.randn(n, module.latent_dim, generator=generator(*key))
    return latents.to(module.device, parameter_dtype(module.generator, latents.dtype))
