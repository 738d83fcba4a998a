"""The ring of eight Gaussians in the protocol of Unrolled GAN: which methods keep all modes, and since when.

    python examples/benchmarks/ring.py                       # 10 seeds, eight methods: about eleven hours on one core
    python examples/benchmarks/ring.py --methods k0 k5 --seeds 0 1 2 --jobs 2
    python examples/benchmarks/ring.py --smoke               # seconds; only shows that it runs

"Unrolled Generative Adversarial Networks", https://arxiv.org/abs/1611.02163, appendix A: radius 2, standard deviation
0.02; generator 256 → 128 → 128 → 2, discriminator x/4 → 128 → 1, ReLU, orthogonal weights with gain 0.8; Adam with rate
1e-4 and β = (0.5, 0.999); batches of 512; 25,000 steps. A mode counts if 20 of 2,500 samples of the last generator lie
within three standard deviations of its centre; "touched" are those with one sample, of which even a bad GAN may have
all eight. Rows that are finished are kept in `--results` and not computed again.
"""

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from jobs import finish
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_gan_stability import (
    MLP,
    GANModule,
    Minimax,
    NonSaturating,
    Packed,
    R1Penalty,
    R2Penalty,
    Relativistic,
    Ring,
    Unrolling,
)
from lightning_gan_stability.metrics import mode_coverage
from lightning_gan_stability.outputs import Player

TENTHS = [tenth / 10 for tenth in range(1, 11)]
MARKS = (0.2, 0.4, 1.0)  # shown in the table: 5,000, 10,000 and 25,000 steps of 25,000


class Coverage(NamedTuple):
    """How many modes samples cover, how good they are, and how evenly they are spread."""

    modes: int  # with at least 20 of 2,500 samples
    touched: int  # with at least one
    share: float  # of samples within three standard deviations of a centre
    kl: float  # of these samples' modes from the uniform distribution; infinite without any


def coverage(samples: Tensor, centers: Tensor, std: float) -> Coverage:
    """Count the samples near each centre."""
    found = mode_coverage(samples, centers, std, least=math.ceil(20 * len(samples) / 2500))
    return Coverage(found.modes, int((found.counts > 0).sum()), found.high_quality, found.reverse_kl)


def draw(module: GANModule, n: int, average: bool = False) -> Tensor:
    """Samples of the generator as it is, or of its average."""
    latents = torch.randn(n, module.latent_dim, generator=torch.Generator().manual_seed(1))
    network = module.generator_ema if average else module.generator
    with torch.no_grad():
        return network(latents)


class Watch(Callback):
    """Coverage at some steps."""

    def __init__(self, steps: Iterable[int], data: Any) -> None:
        self.steps, self.data, self.seen = set(steps), data, {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.iteration in self.steps:
            self.seen[pl_module.iteration] = coverage(draw(pl_module, 2500), self.data.centers, self.data.std)


class Method(NamedTuple):
    """What is beside the protocol's networks, rates and data."""

    title: str
    loss: Callable[[], Any]
    callbacks: Callable[[], list[Callback]] = list
    packing: int = 1
    plan: tuple[Player, ...] = ("d", "g")  # who steps on each batch


METHODS = {
    "k0": Method("plain (K = 0)", Minimax),
    "k1": Method("unrolled, K = 1", Minimax, lambda: [Unrolling(1, objective="saddle")]),
    "k5": Method("unrolled, K = 5", Minimax, lambda: [Unrolling(5, objective="saddle")]),
    "k10": Method("unrolled, K = 10", Minimax, lambda: [Unrolling(10, objective="saddle")]),
    "first5": Method("first-order, K = 5", Minimax, lambda: [Unrolling(5, second_order=False, objective="saddle")]),
    "packed": Method("Packed, m = 2", NonSaturating, packing=2),
    "packed5": Method("Packed, m = 2, D five times", NonSaturating, packing=2, plan=("d",) * 5 + ("g",)),
    "r1r2": Method("relativistic, R1 + R2, γ = 10", Relativistic, lambda: [R1Penalty(10.0), R2Penalty(10.0)]),
}


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4, betas=(0.5, 0.999))


def train(method: str, seed: int, steps: int, batch_size: int = 512) -> dict[str, Any]:
    """One run; its coverage at every mark."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = METHODS[method]
    m = chosen.packing
    seed_everything(seed, verbose=False)
    discriminator = MLP([2 * m, 128, 1], input_scale=0.25, gain=0.8)
    gan = GANModule(
        MLP([256, 128, 128, 2], gain=0.8),
        Packed(discriminator, m) if m > 1 else discriminator,
        latent_dim=256,
        loss=chosen.loss(),
        g_optimizer=adam,
        d_optimizer=adam,
        noise_seed=seed,
    )
    gan.plan = chosen.plan
    data = Ring(batch_size=batch_size, epoch_length=steps, seed=seed)
    watch = Watch((round(mark * steps) for mark in TENTHS), data)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    start = process_time()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        log_every_n_steps=1000,
        enable_progress_bar=False,
        callbacks=[*chosen.callbacks(), watch],
        **options,
    )
    trainer.fit(gan, data)
    return {"seconds": process_time() - start, "seen": watch.seen}


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Per method and mark: modes of each seed, and means with standard deviations over seeds."""
    marks = [str(round(mark * steps)) for mark in MARKS]
    heads = "method | step | all 8 | modes, seed by seed | touched | high quality | reverse KL | seconds"
    lines = [f"| {heads} |", "|---" * 8 + "|"]
    for method, chosen in METHODS.items():
        mine = [row for row in rows if row["method"] == method]
        for mark in marks if mine else ():
            seen = [Coverage(*row["seen"][mark]) for row in mine]
            cells = [
                chosen.title,
                mark,
                f"{sum(c.modes == 8 for c in seen)} of {len(seen)}",
                " ".join(str(c.modes) for c in seen),
                " ".join(str(c.touched) for c in seen),
                spread([c.share for c in seen]),
                spread([c.kl for c in seen if math.isfinite(c.kl)]),
                f"{statistics.mean(row['seconds'] for row in mine):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--steps", type=int, default=25_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--results", type=Path, default=Path("runs/ring.jsonl"), help="finished runs, one a line")
    parser.add_argument("--smoke", action="store_true", help="two seeds, five steps")
    arguments = parser.parse_args()
    steps, seeds, batch = (5, [0, 1], 16) if arguments.smoke else (arguments.steps, arguments.seeds, 512)
    jobs = [{"method": m, "seed": s, "steps": steps} for s, m in product(seeds, arguments.methods)]
    rows = finish(
        partial(train, batch_size=batch), jobs, arguments.jobs, None if arguments.smoke else arguments.results
    )
    print(f"torch {torch.__version__}; CPU seconds of one thread\n\n{table(rows, steps)}")


if __name__ == "__main__":
    main()
