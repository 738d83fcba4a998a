"""Games whose moves are known in closed form, and a Trainer without noise around it."""

import os
import socket
import warnings
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_gan_stability
from lightning_gan_stability import MLP, GANModule


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


class Point(nn.Module):
    """The Dirac-GAN's generator: every sample is θ."""

    def __init__(self, theta=1.0, dtype=torch.float64):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=dtype))

    def forward(self, latents):
        return self.theta.expand(len(latents), 1)


class Line(nn.Module):
    """The Dirac-GAN's discriminator: l(x) = ψ·x."""

    def __init__(self, psi=1.0, dtype=torch.float64):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor([psi], dtype=dtype))

    def forward(self, samples):
        return samples @ self.psi


class Shift(nn.Module):
    """A transform for any samples."""

    def forward(self, x):
        return x + 0.1


class Copier(nn.Module):
    """Draws from a standard normal distribution, but for a share of its samples, which are copies of given rows."""

    def __init__(self, rows, share=0.5, noise=0.0):
        super().__init__()
        self.register_buffer("rows", rows)
        self.share, self.noise = share, noise
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        uniform = torch.special.ndtr(z[:, :2])
        row = (uniform[:, 1] * len(self.rows)).long().clamp(max=len(self.rows) - 1)
        copies = self.rows[row] + self.noise * z[:, 2:]
        return torch.where(uniform[:, :1] < self.share, copies, z[:, 2:]) + 0 * self.weight


def dirac(lr=0.2, psi=1.0, **kwargs):
    return GANModule(Point(), Line(psi), latent_dim=1, g_optimizer=sgd(lr), d_optimizer=sgd(lr), **kwargs)


def zeros(n, batch_size=1):
    """The Dirac-GAN's data: n batches of the point 0."""
    return [torch.zeros(batch_size, 1, dtype=torch.float64)] * n


def small(seed=0, **kwargs):
    """A GAN of two small MLPs on two-dimensional data."""
    torch.manual_seed(seed)
    return GANModule(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4, **kwargs)


def points(n, batch_size=8, seed=0, dtype=torch.float32):
    """n batches of two-dimensional data."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 2, generator=generator, dtype=dtype) for _ in range(n)]


def trainer(**kwargs):
    quiet = {
        "accelerator": os.environ.get("TEST_ACCELERATOR", "cpu"),
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 50,
        "max_epochs": 1,
    }
    return Trainer(**quiet | kwargs)


def fit(module, batches, ckpt_path=None, **kwargs):
    """Train on a list of batches, one epoch unless told otherwise."""
    run = trainer(**kwargs)
    run.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return run


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def weights(module):
    """All parameters as one vector, whole if they are sharded."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def spy_on_samples(module, look):
    """Let ``look(player, outputs)`` see what each player's turn begins with."""
    compute_samples = module.compute_samples

    def spy(player, batch, regularizers=None):
        outputs = compute_samples(player, batch, regularizers)
        look(player, outputs)
        return outputs

    module.compute_samples = spy


def public_callbacks():
    """The names of everything that the package has for ``trainer.callbacks`` of a fit."""
    found = {name: getattr(lightning_gan_stability, name) for name in lightning_gan_stability.__all__}
    kinds = {name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Callback)}
    return kinds - {"GANCallback", "Regularizer", "UpdateRule", "SampleWriter"}


def tensors(state_dict):
    """The tensors of a state dict, without what else a module keeps in it."""
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def gone_on(make, train):
    """A module that stopped after one of two epochs and went on with other weights, as one that never stopped.

    ``train`` takes a module, and in the place of two epochs ``max_epochs``, or a ``ckpt_path``.
    """
    whole, first, again = make(), make(), make()
    train(whole)
    train(first, max_epochs=1).save_checkpoint("first.ckpt")
    for parameter in again.parameters():
        parameter.data.normal_()
    train(again, ckpt_path="first.ckpt")
    found = tensors(again.state_dict())
    for key, expected in tensors(whole.state_dict()).items():
        assert torch.equal(found[key], expected), key
    return again


@contextmanager
def ignoring():
    """Without a word of the monitors, whose warnings would be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
