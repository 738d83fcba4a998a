"""What the scripts here share: a quiet Trainer, small pairs of networks, and the Dirac-GAN."""

import argparse
import logging
import warnings

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_gan_stability import MLP, GANModule

warnings.simplefilter("ignore")
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "limit_val_batches": 0, "max_epochs": -1,
}  # fmt: skip


def arguments(doc, steps, **more):
    """The command line that all scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="batches of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=doc.split("--out ")[1].split()[0], help="the picture")
    for name, value in more.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # each script has many runs
    return parser.parse_args()


def adam(lr, beta=0.5):
    return lambda parameters: torch.optim.Adam(parameters, lr, (beta, 0.999), fused=True)


def points(seed, loss=None, g_lr=1e-3, d_lr=1e-3, latents=32, beta=0.5):
    """A pair of small networks for points in the plane."""
    seed_everything(seed, verbose=False)
    networks = MLP([latents, 128, 128, 2]), MLP([2, 128, 128, 1])
    return GANModule(*networks, latents, loss, adam(g_lr, beta), adam(d_lr, beta), noise_seed=seed)


def digits(seed, loss=None, g_lr=5e-4, d_lr=5e-4, beta=0.0):
    """A pair of small networks for 8×8 images."""
    seed_everything(seed, verbose=False)
    generator = MLP([32, 128, 128, 64], output_activation=nn.Tanh, output_shape=[1, 8, 8])
    discriminator = MLP([64, 128, 128, 1], activation=nn.LeakyReLU)
    return GANModule(generator, discriminator, 32, loss, adam(g_lr, beta), adam(d_lr, beta), noise_seed=seed)


def train(module, data, steps, *callbacks):
    """Train, and give the Trainer back."""
    trainer = Trainer(max_steps=steps, callbacks=list(callbacks), **QUIET)
    trainer.fit(module, data)
    return trainer


class Point(nn.Module):
    """The Dirac-GAN's generator: every sample is θ."""

    def __init__(self, theta=1.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, latents):
        return self.theta.expand(len(latents), 1)


class Look(Callback):
    """(θ, ψ) at the start and after each step."""

    def __init__(self):
        self.points = []

    def on_train_start(self, trainer, module):
        self.points.append([p.item() for p in (module.generator.theta, module.discriminator.weight)])

    def on_train_batch_end(self, trainer, module, *_):
        self.on_train_start(trainer, module)


def play(callbacks, optimizer, steps, loss):
    """The trajectory (steps + 1, 2) from (1, 1)."""
    line = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(line.weight)
    gan, look = GANModule(Point(), line, 1, loss, optimizer, optimizer), Look()
    data = DataLoader([torch.zeros(1, 1, dtype=torch.float64)] * steps, batch_size=None)
    train(gan, data, steps, *callbacks, look)
    return torch.tensor(look.points)
