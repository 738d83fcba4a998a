"""What stabilizers cost: unrolling against hand-written code and other libraries, everything else against a plain step.

    python examples/benchmarks/cost.py            # ten minutes to half an hour, by the load; --rounds 3: half of it
    python examples/benchmarks/cost.py --smoke    # seconds; only shows that it runs

Each pair is timed in turn in one run, in CPU seconds of one thread; the ratio is the median (smallest to largest) of
the rounds. `pip install torchopt higher` adds those two libraries to the first table. Memory is the largest resident
set of a process of its own.
"""

import argparse
import importlib.util
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jobs import peak_memory
from lightning.pytorch import Callback, LightningModule
from overhead import Steps, adam, compare, lightning
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from lightning_gan_stability import (
    MLP,
    AdaptiveUpdateRatio,
    ApproximateR1Penalty,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    ConsistencyPenalty,
    DCGANDiscriminator,
    DCGANGenerator,
    DRAGANPenalty,
    Extragradient,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    LeCam,
    LogitDrift,
    Lookahead,
    Minimax,
    ModeSeeking,
    NonSaturating,
    OrthogonalPenalty,
    Packed,
    PathLengthPenalty,
    R1Penalty,
    R2Penalty,
    Simultaneous,
    SpectralNorm,
    Unrolling,
    UpdateRatio,
    WeightClipping,
)

Pair = tuple[nn.Module, nn.Module]
K, RATE, BETAS, EPS = 5, 2e-4, (0.5, 0.999), 1e-8  # of `adam`


def differentiable_adam(p: list[Tensor], g: tuple[Tensor, ...], state: tuple) -> tuple[list[Tensor], tuple]:
    """One step of Adam as a paper writes it; the root of a little more than v has a finite slope."""
    means, squares, t = state
    t, (b1, b2) = t + 1, BETAS
    means = [b1 * m + (1 - b1) * h for m, h in zip(means, g, strict=True)]
    squares = [b2 * v + (1 - b2) * h * h for v, h in zip(squares, g, strict=True)]
    moved = [
        q - RATE / (1 - b1**t) * m / ((v + 1e-16).sqrt() / (1 - b2**t) ** 0.5 + EPS)
        for q, m, v in zip(p, means, squares, strict=True)
    ]
    return moved, (means, squares, t)


def d_loss(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    return (softplus(-discriminator(real)) + softplus(discriminator(fake))).mean()


def unrolled(discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor) -> Tensor:
    """The generator's loss after K steps of the discriminator, by hand."""
    parameters = dict(discriminator.named_parameters())
    names, live = list(parameters), [optimizer.state[p] for p in parameters.values()]
    p = [q.detach().requires_grad_() for q in parameters.values()]
    state = ([s["exp_avg"] for s in live], [s["exp_avg_sq"] for s in live], float(live[0]["step"]))
    for _ in range(K):
        weights = dict(zip(names, p, strict=True))
        loss = d_loss(lambda x, weights=weights: functional_call(discriminator, weights, (x,)), real, fake)
        p, state = differentiable_adam(p, torch.autograd.grad(loss, p, create_graph=True), state)
    return softplus(-functional_call(discriminator, dict(zip(names, p, strict=True)), (fake,))).mean()


def unrolled_by_higher(
    discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor
) -> Tensor:
    import higher

    with higher.innerloop_ctx(discriminator, optimizer, copy_initial_weights=True) as (functional, steps):
        for _ in range(K):
            steps.step(d_loss(functional, real, fake))
        return softplus(-functional(fake)).mean()


def unrolled_by_torchopt(discriminator: nn.Module, meta: Any, real: Tensor, fake: Tensor) -> Tensor:
    import torchopt

    before = [torchopt.extract_state_dict(x, by="reference") for x in (discriminator, meta)]
    for _ in range(K):
        meta.step(d_loss(discriminator, real, fake))
    loss = softplus(-discriminator(fake)).mean()
    for x, state in zip((discriminator, meta), before, strict=True):
        torchopt.recover_state_dict(x, state)
    return loss


Unrolled = Callable[[nn.Module, Any, Tensor, Tensor], Tensor]


class HandWritten(LightningModule):
    """An unrolled GAN as a tutorial would write it in Lightning: toggled optimizers, two logged losses."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.latent_dim = generator, discriminator, latent_dim

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        d_optimizer, g_optimizer = self.optimizers()
        self.toggle_optimizer(d_optimizer)
        d_optimizer.zero_grad()
        fake = self.generator(torch.randn(len(real), self.latent_dim)).detach()
        loss = d_loss(self.discriminator, real, fake)
        self.log("d/adversarial", loss, prog_bar=True)
        self.manual_backward(loss)
        d_optimizer.step()
        self.untoggle_optimizer(d_optimizer)
        self.toggle_optimizer(g_optimizer)
        g_optimizer.zero_grad()
        fake = self.generator(torch.randn(len(real), self.latent_dim))
        loss = unrolled(self.discriminator, d_optimizer.optimizer, real, fake)
        self.log("g/adversarial", loss, prog_bar=True)
        self.manual_backward(loss)
        g_optimizer.step()
        self.untoggle_optimizer(g_optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [adam(self.discriminator.parameters()), adam(self.generator.parameters())]


def plain_torch(pair: Pair, latent_dim: int, steps: Steps, inner: Unrolled, meta: bool = False) -> float:
    """The same without Lightning."""
    generator, discriminator = deepcopy(pair)
    d_optimizer, g_optimizer = adam(discriminator.parameters()), adam(generator.parameters())
    if meta:
        import torchopt

        other = torchopt.MetaAdam(discriminator, lr=RATE, betas=BETAS)
    for real in steps:
        d_optimizer.zero_grad()
        with torch.no_grad():
            fake = generator(torch.randn(len(real), latent_dim))
        d_loss(discriminator, real, fake).backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        fake = generator(torch.randn(len(real), latent_dim))
        inner(discriminator, other if meta else d_optimizer, real, fake).backward()
        g_optimizer.step()
    return steps.seconds


def gan(pair: Pair, latent_dim: int, loss: nn.Module | None = None, **kwargs: object) -> GANModule:
    return GANModule(*deepcopy(pair), latent_dim=latent_dim, loss=loss, **kwargs)


def ours(pair: Pair, latent_dim: int, steps: Steps, *callbacks: Callback, **kwargs: object) -> float:
    return lightning(gan(pair, latent_dim, **kwargs), steps, *callbacks)


def compare_unrolling(title: str, pair: Pair, latent_dim: int, batch: Tensor, n: int, rounds: int) -> None:
    def unrolling() -> float:
        return ours(pair, latent_dim, Steps(batch, n), Unrolling(K))

    rivals: dict[str, tuple[float, Callable[[], float]]] = {
        "by hand in Lightning": (1.05, lambda: lightning(HandWritten(*deepcopy(pair), latent_dim), Steps(batch, n))),
        "by hand in torch": (float("inf"), lambda: plain_torch(pair, latent_dim, Steps(batch, n), unrolled)),
        "higher": (float("inf"), lambda: plain_torch(pair, latent_dim, Steps(batch, n), unrolled_by_higher)),
        "torchopt": (float("inf"), lambda: plain_torch(pair, latent_dim, Steps(batch, n), unrolled_by_torchopt, True)),
    }
    for name, (goal, rival) in rivals.items():
        if name in ("higher", "torchopt") and importlib.util.find_spec(name) is None:
            print(f"{title}: {name} is not installed")
            continue
        compare(f"{title}: Unrolling({K}) / {name}", rounds, goal, unrolling, rival)


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def compare_callbacks(pair: Pair, latent_dim: int, batch: Tensor, n: int, rounds: int) -> None:
    """Each callback against the plain step of the same GAN; per batch, so that UpdateRatio(5) is less than 1."""
    rows: list[tuple[str, list[Callback], dict[str, object]]] = [
        (type(c).__name__ + note, [c], kwargs)
        for c, note, kwargs in (
            (R1Penalty(0.1), "", {}),
            (R1Penalty(0.1, every=16), "(every=16)", {}),
            (R2Penalty(0.1), "", {}),
            (GradientPenalty(10.0), "", {}),
            (DRAGANPenalty(10.0), "", {}),
            (ApproximateR1Penalty(), "", {}),
            (LeCam(), "", {}),
            (ConsistencyPenalty("real"), "('real')", {}),
            (ConsistencyPenalty("balanced"), "('balanced')", {}),
            (ConsistencyPenalty("latent"), "('latent')", {}),
            (OrthogonalPenalty(), "", {}),
            (LogitDrift(), "", {}),
            (PathLengthPenalty(every=1), "(every=1)", {}),
            (PathLengthPenalty(), "(every=4)", {}),
            (ModeSeeking(), "", {}),
            (SpectralNorm(), "", {}),
            (WeightClipping(), "", {}),
            (GeneratorEMA(), "", {}),
            (Lookahead(), "", {}),
            (UpdateRatio(5), "(5)", {}),
            (AdaptiveUpdateRatio("loss_change"), "('loss_change')", {}),
            (Simultaneous(), "", {}),
            (Extragradient(), "", {}),
            (Unrolling(1), "(1)", {}),
            (Unrolling(5), "(5)", {}),
            (Unrolling(5, second_order=False), "(5, second_order=False)", {}),
            (Unrolling(5, checkpoint=True), "(5, checkpoint=True)", {}),
            (ConsensusOptimization(), "", {}),
            (CompetitiveGradientDescent(), "", {"loss": Minimax(), "g_optimizer": sgd, "d_optimizer": sgd}),
        )
    ]
    for title, callbacks, kwargs in rows:
        compare(
            f"with {title} / plain step",
            rounds,
            float("inf"),
            lambda callbacks=callbacks, kwargs=kwargs: ours(pair, latent_dim, Steps(batch, n), *callbacks, **kwargs),
            lambda: ours(pair, latent_dim, Steps(batch, n), loss=NonSaturating()),
        )


def memory(steps: int, checkpoint: bool, size: int, batch: int) -> float:
    """Train two steps in a process of its own; its largest resident set in MB."""
    command = [sys.executable, __file__, "--memory", str(steps), str(int(checkpoint)), str(size), str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(steps: int, checkpoint: int, size: int, batch: int) -> None:
    pair = DCGANGenerator(64, 3, size, 16), DCGANDiscriminator(3, size, 16)
    rules = [Unrolling(steps, checkpoint=bool(checkpoint))] if steps else []
    ours(pair, 64, Steps(torch.rand(batch, 3, size, size), 1), *rules)
    print(peak_memory() / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, one round: only shows that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements for each row")
    parser.add_argument("--memory", nargs=4, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.memory:
        return measure_memory(*arguments.memory)
    smoke = arguments.smoke
    rounds, n, batch, size, width = (1, 2, 8, 8, 4) if smoke else (arguments.rounds, 60, 512, 32, 32)
    print(f"torch {torch.__version__}, one thread; time per step, ratio: median (smallest to largest of {rounds})\n")

    ring = MLP([256, 128, 128, 2]), MLP([2, 128, 1], input_scale=0.25)
    compare_unrolling(f"ring, batch {batch}", ring, 256, torch.randn(batch, 2), n, rounds)
    images = DCGANGenerator(64, 3, size, width, batch_norm=False), DCGANDiscriminator(3, size, width)
    few = 4 if smoke else 32
    pixels = torch.rand(few, 3, size, size) * 2 - 1
    compare_unrolling(f"DCGAN {size}x{size}, batch {few}", images, 64, pixels, max(2, n // 15), rounds)

    print("\nDCGAN without BatchNorm")
    compare_callbacks(images, 64, pixels, max(2, n // 15), rounds)

    size, few = (8, 4) if smoke else (64, 32)
    print(f"\nLargest resident set, DCGAN {size}x{size}, batch {few}, MB")
    for steps in (0, 1) if smoke else (0, 2, 4, 8, 16):
        kept = [memory(steps, checkpoint, size, few) for checkpoint in (False, True)]
        print(f"Unrolling({steps})  {kept[0]:8.0f}  with checkpoint  {kept[1]:8.0f}")

    packed = ring[0], Packed(MLP([4, 128, 1], input_scale=0.25), 2)
    print("\nring")
    data = torch.randn(batch, 2)
    for title, pair, callbacks in (("Packed, m = 2", packed, []), (f"Unrolling({K})", ring, [Unrolling(K)])):
        compare(
            f"{title} / plain step",
            rounds,
            float("inf"),
            lambda pair=pair, callbacks=callbacks: ours(pair, 256, Steps(data, n), *callbacks),
            lambda: ours(ring, 256, Steps(data, n)),
        )
    return None


if __name__ == "__main__":
    main()
