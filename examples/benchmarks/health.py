"""What HealthMonitor costs, and what it says of healthy runs and of runs that are built to fail.

    python examples/benchmarks/health.py           # about twenty minutes on one core; --rounds 0: without the cost
    python examples/benchmarks/health.py --smoke   # seconds; only shows that it runs

The cost is the ratio of CPU times of 20 steps with and without it, on a DCGAN pair of 64×64 images, in turn, with a
decision on the last of them: five times as many as by default. The healthy runs are those of detection.py, of 1,500
steps; `loss_tells_nothing`, which is for information, needs a QualityMonitor and has a table of its own: the rank
correlation of generator loss and FID in healthy runs, measured every 100 steps. Of each failure there is one run per
seed, with data, weights and noise of its own; "damped" are the games that circle, with what their advice says.
"""

import argparse
import contextlib
import io
import logging
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from detection import HEALTHY, make
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gan_stability import (
    MLP,
    DCGANDiscriminator,
    DCGANGenerator,
    Extragradient,
    GANModule,
    HealthMonitor,
    Minimax,
    QualityMonitor,
    R1Penalty,
    Simultaneous,
    Wasserstein,
)
from lightning_gan_stability.monitors.health import rank_correlation

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
}


class Clock(Callback):
    """CPU time of the steps alone, without the set-up."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = process_time() - self.start


def fit(trainer: Trainer, module: GANModule, *data: Any) -> None:
    """Train, without the table that a HealthMonitor prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, *data)


def seconds(callbacks: list[Callback], steps: int, batch: int) -> float:
    """CPU time of some steps of a DCGAN pair."""
    torch.manual_seed(0)
    module = GANModule(DCGANGenerator(64, width=32), DCGANDiscriminator(width=32), 64)
    clock, images = Clock(), [torch.rand(batch, 3, 64, 64) * 2 - 1] * 4
    trainer = Trainer(max_steps=steps, callbacks=[*callbacks, clock], max_epochs=-1, **QUIET)
    fit(trainer, module, DataLoader(images, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr)


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr, (0.5, 0.999))


class Point(nn.Module):
    """The Dirac-GAN's generator: every sample is θ."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.theta.expand(len(latents), 1)


def points(g: float, d: float, loss: Any = None, factor: float = 1.0, shift: float = 0.0) -> tuple[GANModule, Any]:
    """A pair of MLPs on points; the discriminator's learning rate grows by a factor on each step."""
    grow = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)  # noqa: E731
    networks = MLP([8, 32, 2]), MLP([2, 64, 1])
    module = GANModule(*networks, 8, loss, sgd(g), adam(d) if factor == 1 else sgd(d), d_scheduler=grow)
    return module, DataLoader(torch.randn(12800, 2) * 0.1 + shift, batch_size=64, shuffle=True)


def game(loss: Any, lr: float) -> tuple[GANModule, Any]:
    """The Dirac-GAN, which circles."""
    module = GANModule(Point(), nn.Linear(1, 1, bias=False), 1, loss, sgd(lr), sgd(lr))
    return module, DataLoader(torch.zeros(100, 1), batch_size=1)


class Exponential(nn.Module):
    """Gives samples of a log-normal distribution to a linear layer of normal latents."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def heavy_tails() -> tuple[GANModule, Any]:
    """A log-normal generator and data of that kind, one sample at a time: few samples have most of the gradient."""
    scale = nn.Linear(1, 1)
    nn.init.constant_(scale.weight, 3.0)
    module = GANModule(nn.Sequential(scale, Exponential()), MLP([1, 16, 1]), 1, Wasserstein(), sgd(1e-9), sgd(1e-9))
    return module, DataLoader((3 * torch.randn(2000, 1)).exp(), batch_size=1)


def by_heart() -> tuple[GANModule, Any]:
    """A perfect generator, and 64 samples that a large discriminator can learn by heart."""
    perfect = nn.Linear(30, 30, bias=False)
    nn.init.eye_(perfect.weight)
    module = GANModule(perfect, MLP([30, 256, 256, 1]), 30, None, sgd(1e-9), adam(2e-3))
    return module, [DataLoader(TensorDataset(torch.randn(n, 30)), batch_size=64) for n in (64, 512)]


FAILING: dict[str, tuple[str, Callable[[], tuple[GANModule, Any]], Callable[[], list[Callback]], int]] = {
    "frozen generator, minimax": (
        "vanishing_gradient", lambda: points(1e-9, 0.02, Minimax(), shift=8.0), list, 1500,
    ),
    "critic without bounds": (
        "exploding_gradient", lambda: points(1e-5, 1e-3, Wasserstein(), 1.005, shift=3.0), list, 1500,
    ),
    "heavy tails, batches of one": ("noisy_gradient", heavy_tails, list, 1000),
    "discriminator that hardly learns": ("weak_discriminator", lambda: points(1e-2, 1e-7), list, 1000),
    "Dirac-GAN, in turn": ("oscillation", lambda: game(Wasserstein(), 0.1), list, 1000),
    "Dirac-GAN, simultaneous": ("oscillation", lambda: game(Minimax(), 0.05), lambda: [Simultaneous()], 1500),
    "few data, large discriminator": ("overfitting_discriminator", by_heart, list, 1000),
    "rates far too high": (
        "not_finite", lambda: points(1e30, 1e30, factor=1.0001), list, 500,
    ),
    "Dirac-GAN, damped by R1Penalty": ("–", lambda: game(Minimax(), 0.1), lambda: [R1Penalty(1.0)], 1000),
    "Dirac-GAN, damped by Extragradient": ("–", lambda: game(Wasserstein(), 0.1), lambda: [Extragradient()], 1000),
}  # fmt: skip


def failure(name: str, seed: int, steps: int) -> list[str]:
    """What is said of a run that is built to fail."""
    _, build, callbacks, length = FAILING[name]
    seed_everything(seed, verbose=False)
    module, data = build()
    module.noise_seed, monitor = seed, HealthMonitor()
    loaders = data if isinstance(data, list) else [data]
    options = QUIET | {"limit_val_batches": 1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 10**6}
    trainer = Trainer(max_steps=min(steps, length), callbacks=[*callbacks(), monitor], max_epochs=-1, **options)
    with contextlib.suppress(FloatingPointError):  # which is a verdict too
        fit(trainer, module, *loaders)
    return [said["verdict"] for said in monitor.verdicts]


def verdicts(data: str, seed: int, steps: int) -> list[str]:
    """What is said of a healthy run."""
    seed_everything(seed, verbose=False)
    module, source, _, penalties = make(data, "")
    module.noise_seed = source.seed = seed
    monitor = HealthMonitor()
    fit(Trainer(max_steps=steps, callbacks=[*penalties, monitor], max_epochs=-1, **QUIET), module, source)
    return [said["verdict"] for said in monitor.verdicts]


def correlation(data: str, seed: int, steps: int) -> tuple[float, bool]:
    """The rank correlation of loss and FID in a healthy run, and whether that is said to tell nothing."""
    seed_everything(seed, verbose=False)
    module, source, extractor, penalties = make(data, "")
    module.noise_seed = source.seed = seed
    monitor, quality = HealthMonitor(), QualityMonitor(extractor, ["fid"], n_samples=1000, every=100)
    fit(Trainer(max_steps=steps, callbacks=[*penalties, quality, monitor], max_epochs=-1, **QUIET), module, source)
    pairs = monitor.fids
    rho = rank_correlation(*zip(*pairs, strict=True)) if len(pairs) > 2 else float("nan")
    return rho, any(said["verdict"] == "loss_tells_nothing" for said in monitor.verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds, seeds, steps, batch, length = arguments.rounds, arguments.seeds, 20, 64, 1500
    if arguments.smoke:
        rounds, seeds, steps, batch, length = 1, 1, 2, 4, 20
    limit = 20 if arguments.smoke else 10**9
    ratios = []
    for _ in range(rounds):
        plain = seconds([], steps, batch)
        ratios.append(seconds([HealthMonitor(every=steps)], steps, batch) / plain)
    if ratios:
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"torch {torch.__version__}; DCGAN 64×64, batch {batch}: {spread} times without, {rounds} rounds\n")
    print("| healthy run | seeds | with a verdict | verdicts |\n|---|---|---|---|")
    for data in [name for name in HEALTHY if name != "pixels"]:
        said = [verdicts(data, 100 + seed, length) for seed in range(seeds)]
        kinds = ", ".join(sorted({name for names in said for name in names})) or "–"
        print(f"| {data} | {seeds} | {sum(map(bool, said))} | {kinds} |", flush=True)
    print("\n| run | should be | seeds | that alone | said |\n|---|---|---|---|---|")
    for name, (expected, *_) in FAILING.items():
        runs = [failure(name, 100 + seed, limit) for seed in range(seeds)]
        counts = Counter(verdict for run in runs for verdict in run)
        alone = sum(run == ([] if expected == "–" else [expected]) for run in runs)
        words = ", ".join(f"{verdict} {n}" for verdict, n in counts.items()) or "–"
        print(f"| {name} | {expected} | {seeds} | {alone} | {words} |", flush=True)
    print("\n| loss and FID | seeds | rank correlation: median (range) | loss tells nothing |\n|---|---|---|---|")
    for data in ("ring", "grid", "digits"):
        found = [correlation(data, 100 + seed, length) for seed in range(seeds)]
        values = [rho for rho, _ in found]
        spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        print(f"| {data} | {seeds} | {spread} | {sum(said for _, said in found)} |", flush=True)


if __name__ == "__main__":
    main()
