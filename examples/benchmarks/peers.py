"""A step of this package, of a plain loop, and of the trainers of torch-mimicry, torchgan and vegans.

    pip install --no-deps -r examples/benchmarks/peers-requirements.txt
    python examples/benchmarks/peers.py            # a quarter of an hour on one free core; 45 minutes on a busy one
    python examples/benchmarks/peers.py --smoke    # a minute; only shows that it runs

Same networks with equal first weights, same batch, Adam and number of steps, all on the torch that is installed. Times
are CPU seconds of one thread, the tools in turn in each round; a ratio is the median of the rounds (smallest to
largest). Memory is what the resident set of a fresh process grows by, from a first run with tiny networks (so without
libraries) to its peak in the steps; the tools in turn again. Logging to files, printing and pictures are switched off
in the peers; this package logs as it does by default.

Equal work is checked on tiny networks of the same kind: fixed latents, an optimizer that only looks, and the cosine of
each player's gradient with the plain loop's, and its length over the plain loop's. For the penalty the real samples are
the generated ones, so that all interpolations are the same points and only the penalty has a gradient in the
discriminator. What differs in the peers, and is left as it is:

* All three compute the discriminator's gradients in the generator's step too, and throw them away.
* vegans moves the generator first, uses one draw of latents for both players, and halves the discriminator's loss but
  not its penalty. It keeps the generator's graph during the discriminator's step.
* torchgan's gradient penalty is a second optimizer step with generated samples of its own, one interpolation weight for
  the batch, and one norm for the whole batch. It logs the norm of every gradient in every step.
* torch-mimicry's penalty knows images of three channels only. vegans has no spectral norm, and none of them has R1.

What makes the peers run with today's libraries: iterators of loaders get back the `next` that vegans calls, empty
modules stand in for torch-mimicry's `metrics` and `datasets`, which import TensorFlow and a part of torch that is gone,
and torchgan's picture at the end, for which torchvision has changed, is left out.
"""

import argparse
import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from jobs import peak_memory
from overhead import Steps, lightning
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, IterableDataset

from lightning_gan_stability import (
    MLP,
    DCGANDiscriminator,
    DCGANGenerator,
    GANModule,
    GradientPenalty,
    NonSaturating,
    SpectralNorm,
    Wasserstein,
)

WEIGHT, RATE, BETAS = 10.0, 2e-4, (0.5, 0.999)


class Batches(Steps):
    """Steps that note the peak of memory too."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from super().__iter__()
        self.peak = peak_memory() / 2**20


class Sized(IterableDataset):
    """The same with a length, and with labels for who wants them."""

    def __init__(self, steps: Batches, labels: bool = False) -> None:
        self.steps, self.labels = steps, labels

    def __len__(self) -> int:
        return self.steps.warm_up + self.steps.n

    def __iter__(self) -> Iterator[Any]:
        for batch in self.steps:
            yield (batch, torch.zeros(len(batch))) if self.labels else batch


def loader(steps: Batches, labels: bool = False) -> DataLoader:
    return DataLoader(Sized(steps, labels), batch_size=None)


Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Kind = Literal["plain", "penalty", "spectral"]


class Task(NamedTuple):
    """What every tool gets; n: steps that are timed."""

    title: str
    kind: Kind
    generator: nn.Module
    discriminator: nn.Module
    latent_dim: int
    real: Tensor
    n: int


def make(title: str, kind: Kind, tiny: bool) -> Task:
    """Networks and data, the same in every call."""
    torch.manual_seed(0)
    if title == "ring":
        pair, latent_dim = (MLP([256, 128, 128, 2]), MLP([2, 128, 128, 1])), 256
        return Task(title, kind, *pair, latent_dim, torch.randn(16 if tiny else 512, 2), 2 if tiny else 200)
    size, width, batch = (8, 4, 4) if tiny else (64, 32, 32)
    pair = DCGANGenerator(128, 3, size, width), DCGANDiscriminator(3, size, width)
    return Task(title, kind, *pair, 128, torch.rand(batch, 3, size, size) * 2 - 1, 2 if tiny else 4)


TASKS: list[tuple[str, Kind]] = [
    ("DCGAN", "plain"),
    ("DCGAN", "penalty"),
    ("DCGAN", "spectral"),
    ("ring", "plain"),
    ("ring", "penalty"),
]
TITLES = {
    "DCGAN": "DCGAN 64×64, batch 32",
    "ring": "ring MLPs, batch 512",
    "plain": "non-saturating",
    "penalty": "WGAN-GP",
    "spectral": "non-saturating, spectral norm",
}


def replace(network: nn.Module, change: Callable[[nn.Module], nn.Module]) -> None:
    """Put something else in the place of every linear and convolutional layer."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, change(layer))


def ours(task: Task, steps: Batches, optimizer: Optimizer) -> None:
    loss = Wasserstein() if task.kind == "penalty" else NonSaturating()
    callbacks = {"plain": [], "penalty": [GradientPenalty(WEIGHT)], "spectral": [SpectralNorm()]}[task.kind]
    both = {"g_optimizer": optimizer, "d_optimizer": optimizer}
    module = GANModule(task.generator, task.discriminator, latent_dim=task.latent_dim, loss=loss, **both)
    lightning(module, steps, *callbacks)


def interpolated(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    share = torch.rand(len(real), *[1] * (real.dim() - 1))
    points = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def by_hand(task: Task, steps: Batches, optimizer: Optimizer) -> None:
    generator, discriminator, penalized = task.generator, task.discriminator, task.kind == "penalty"
    if task.kind == "spectral":
        replace(discriminator, parametrizations.spectral_norm)
    d_optimizer, g_optimizer = optimizer(discriminator.parameters()), optimizer(generator.parameters())
    for real in steps:
        d_optimizer.zero_grad()
        with torch.no_grad():
            fake = generator(torch.randn(len(real), task.latent_dim))
        on_real, on_fake = discriminator(real), discriminator(fake)
        if penalized:
            loss = (on_fake - on_real).mean() + WEIGHT * interpolated(discriminator, real, fake)
        else:
            loss = (softplus(-on_real) + softplus(on_fake)).mean()
        loss.backward()
        d_optimizer.step()
        discriminator.requires_grad_(False)
        g_optimizer.zero_grad()
        logits = discriminator(generator(torch.randn(len(real), task.latent_dim)))
        (-logits.mean() if penalized else softplus(-logits).mean()).backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)


def mimicry(task: Task, steps: Batches, optimizer: Optimizer) -> None:
    for part in ("metrics", "datasets"):
        sys.modules.setdefault(f"torch_mimicry.{part}", types.ModuleType(part))
    import torch_mimicry.modules as layers
    from torch_mimicry.nets.gan.gan import BaseDiscriminator, BaseGenerator
    from torch_mimicry.nets.wgan_gp.wgan_gp_base import WGANGPBaseDiscriminator, WGANGPBaseGenerator
    from torch_mimicry.training import Trainer

    penalized = task.kind == "penalty"
    if penalized and (task.real.dim(), task.real.shape[1]) != (4, 3):
        raise NotImplementedError("its penalty takes images of three channels")

    class Generator(WGANGPBaseGenerator if penalized else BaseGenerator):
        def forward(self, latents: Tensor) -> Tensor:
            return self.network(latents)

    class Discriminator(WGANGPBaseDiscriminator if penalized else BaseDiscriminator):
        def forward(self, samples: Tensor) -> Tensor:
            return self.network(samples).reshape(-1, 1)

    def normalized(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            new = layers.SNLinear(layer.in_features, layer.out_features)
        else:
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
            new = layers.SNConv2d(*sizes)
        new.load_state_dict(layer.state_dict(), strict=False)
        return new

    if task.kind == "spectral":
        replace(task.discriminator, normalized)
    loss = "wasserstein" if penalized else "ns"
    generator, discriminator = Generator(task.latent_dim, 0, 4, loss), Discriminator(0, loss)
    generator.network, discriminator.network = task.generator, task.discriminator
    data = loader(steps, labels=True)
    ever = len(data) + 1  # the end of the data is only noticed by asking for more
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            netD=discriminator,
            netG=generator,
            optD=optimizer(discriminator.parameters()),
            optG=optimizer(generator.parameters()),
            dataloader=data,
            num_steps=ever,
            log_dir=folder,
            device=torch.device("cpu"),
            **dict.fromkeys(("print_steps", "vis_steps", "log_steps", "save_steps"), ever + 1),
        ).train()


def torchgan(task: Task, steps: Batches, optimizer: Optimizer) -> None:
    os.environ["TENSORBOARD_LOGGING"] = "0"
    from torchgan import losses, models
    from torchgan.layers import SpectralNorm2d
    from torchgan.trainer import Trainer

    class Generator(models.Generator):
        def forward(self, latents: Tensor) -> Tensor:
            return self.network(latents)

    class Discriminator(models.Discriminator):
        def forward(self, samples: Tensor) -> Tensor:
            return self.network(samples)

    if task.kind == "spectral":
        replace(task.discriminator, SpectralNorm2d)
    generator, discriminator = Generator(task.latent_dim), Discriminator(0)
    generator.network, discriminator.network = task.generator, task.discriminator
    terms = [losses.MinimaxDiscriminatorLoss(), losses.MinimaxGeneratorLoss(nonsaturating=True)]
    if task.kind == "penalty":
        terms = [losses.WassersteinDiscriminatorLoss(), losses.WassersteinGradientPenalty(lambd=WEIGHT)]
        terms += [losses.WassersteinGeneratorLoss()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            {
                "discriminator": {"name": lambda: discriminator, "optimizer": {"name": optimizer}},
                "generator": {"name": lambda: generator, "optimizer": {"name": optimizer}},
            },
            terms,
            device=torch.device("cpu"),
            epochs=1,
            sample_size=2,
            checkpoints=f"{folder}/gan",
            recon=folder,
            log_dir=folder,
            batch_size=len(task.real),
        )
        trainer.logger.logger_end_epoch.clear()  # the picture, which torchvision of today does not make for it
        trainer.train(loader(steps))


def vegans(task: Task, steps: Batches, optimizer: Optimizer) -> None:
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    iterator.next = iterator.__next__
    from vegans.GAN import VanillaGAN, WassersteinGANGP

    class Judge(nn.Module):
        """Probabilities; for Wasserstein the negative value, because vegans' sign is the other one."""

        def __init__(self) -> None:
            super().__init__()
            self.network = task.discriminator

        def forward(self, samples: Tensor) -> Tensor:
            logits = self.network(samples)
            return -logits if task.kind == "penalty" else logits.sigmoid()

    if task.kind == "spectral":
        raise NotImplementedError("has no spectral norm")
    (WassersteinGANGP if task.kind == "penalty" else VanillaGAN)(
        generator=task.generator,
        adversary=Judge(),
        x_dim=tuple(task.real.shape[1:]),
        z_dim=task.latent_dim,
        optim=optimizer,
        device="cpu",
        ngpu=0,
        fixed_noise_size=2,
        folder=None,
        secure=False,
        **({"lmbda_grad": WEIGHT} if task.kind == "penalty" else {}),
    ).fit(loader(steps), epochs=1, batch_size=len(task.real), print_every=None, save_losses_every=None)


TOOLS: dict[str, Callable[[Task, Batches, Optimizer], None]] = {
    "this package": ours,
    "by hand": by_hand,
    "torch-mimicry": mimicry,
    "torchgan": torchgan,
    "vegans": vegans,
}


def adam_of(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=RATE, betas=BETAS)


def run(name: str, task: Task, steps: Batches | None = None, optimizer: Optimizer = adam_of) -> Batches:
    """Let a tool train in silence."""
    steps = Batches(task.real, task.n) if steps is None else steps
    with contextlib.redirect_stdout(io.StringIO()):
        TOOLS[name](task, steps, optimizer)
    return steps


class Onlooker(torch.optim.Optimizer):
    """Keeps the gradients of every step and moves nothing."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.0})
        # tools order the parameters differently; here their shapes tell them apart
        self.watched = sorted((p for p in self.param_groups[0]["params"] if p.requires_grad), key=lambda p: p.shape)
        self.seen: list[Tensor] = []

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure:
            closure()
        self.seen.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.watched])
        )


class Fixed(nn.Module):
    """A generator that is given the same latents every time."""

    def __init__(self, network: nn.Module, latents: Tensor) -> None:
        super().__init__()
        self.network, self.latents = network, latents

    def forward(self, latents: Tensor) -> Tensor:
        return self.network(self.latents[: len(latents)])


@cache
def gradients(name: str, title: str, kind: Kind) -> dict[str, Tensor]:
    """Both players' gradients in one step, after many in which nothing but power iteration moved."""
    task = make(title, kind, tiny=True)
    fixed = Fixed(task.generator, torch.randn(len(task.real), task.latent_dim))
    if kind == "penalty":
        task = task._replace(real=fixed(fixed.latents).detach())
    sizes = {sum(p.numel() for p in net.parameters()): player for player, net in zip("gd", task[2:4], strict=True)}
    made: list[Onlooker] = []

    def look(params: Iterable[Tensor]) -> Onlooker:
        made.append(Onlooker(params))
        return made[-1]

    n = 40 if kind == "spectral" else 1
    run(name, task._replace(generator=fixed), Batches(task.real, n, warm_up=0), look)
    of = {sizes[sum(p.numel() for p in optimizer.watched)]: optimizer for optimizer in made}
    per_batch = len(of["d"].seen) // len(of["g"].seen)  # torchgan moves the discriminator twice
    return {"d": sum(of["d"].seen[-per_batch:]), "g": of["g"].seen[-1]}


def agreement(name: str, title: str, kind: Kind) -> str:
    theirs, plain = gradients(name, title, kind), gradients("by hand", title, kind)
    cosines = (float(torch.cosine_similarity(theirs[p], plain[p], dim=0)) for p in "dg")
    lengths = (float(theirs[p].norm() / plain[p].norm()) for p in "dg")
    return ", ".join(f"{cosine:.4f} ({length:.3f})" for cosine, length in zip(cosines, lengths, strict=True))


def memory(name: str, index: int) -> float:
    """What a process of its own grows by, in MB."""
    command = [sys.executable, __file__, "--memory", name, str(index)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(name: str, index: int) -> None:
    run(name, make(*TASKS[index], tiny=True))
    before = resident()
    print(run(name, make(*TASKS[index], tiny=False)._replace(n=1)).peak - before)


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def spread(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def able(index: int) -> tuple[list[str], dict[str, str]]:
    """The tools that can do a task, and why others cannot."""
    can, cannot = [], {}
    for name in TOOLS:
        try:
            run(name, make(*TASKS[index], tiny=True))
            can.append(name)
        except ModuleNotFoundError as error:
            cannot[name] = f"not installed: {error.name}"
        except Exception as error:  # whatever a peer does not get on with
            if TOOLS[name] in (ours, by_hand):
                raise
            cannot[name] = f"{'' if isinstance(error, NotImplementedError) else type(error).__name__ + ': '}{error}"
    return can, cannot


def compare(index: int, rounds: int, memory_rounds: int, tiny: bool) -> None:
    title, kind = TASKS[index]
    can, cannot = able(index)
    times: dict[str, list[float]] = {name: [] for name in can}
    grown: dict[str, list[float]] = {name: [] for name in can}
    for _ in range(rounds):
        for name in can:
            times[name].append(1000 * run(name, make(title, kind, tiny)).seconds)
    for _ in range(memory_rounds if title == "DCGAN" else 0):  # on the ring it is nothing
        for name in can:
            grown[name].append(memory(name, index))
    step = f"{TITLES[title]}, {TITLES[kind]}"
    for name in can:
        ratio = spread([a / b for a, b in zip(times["this package"], times[name], strict=True)])
        cells = [f"{median(times[name]):.1f}", "1" if name == "this package" else ratio]
        cells += [spread(grown[name], 0) if grown[name] else "–", agreement(name, title, kind)]
        print("|", " | ".join([step, name, *cells]), "|", flush=True)
    for name, reason in cannot.items():
        print("|", " | ".join([step, name, reason, "–", "–", "–"]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, one round: only shows that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every tool for each row")
    parser.add_argument("--memory-rounds", type=int, default=3, help="processes of every tool for each row")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.memory:
        return measure_memory(arguments.memory[0], int(arguments.memory[1]))
    rounds = (1, 0) if arguments.smoke else (arguments.rounds, arguments.memory_rounds)
    print(f"torch {torch.__version__}, one thread; {rounds[0]} rounds of time, {rounds[1]} of memory\n")
    print("| Step | Tool | ms | This package / it | Memory grows by MB | Gradients of D, G: cosine (length) |")
    print("|---|---|---|---|---|---|")
    for index in range(len(TASKS)):
        compare(index, *rounds, arguments.smoke)
    return None


if __name__ == "__main__":
    main()
