"""Random recipes: how many end well plainly, with a fixed set of callbacks, with `Autopilot`, and at best.

    python examples/benchmarks/random_recipes.py --columns plain fixed autopilot --jobs 2    # two hours on two cores
    python examples/benchmarks/random_recipes.py --family digits --jobs 2
    python examples/benchmarks/random_recipes.py --columns oracle --seeds 0 1 2              # hours for all sixty
    python examples/benchmarks/random_recipes.py --smoke           # seconds; only shows that it runs

A recipe is drawn by its seed, each number for itself: both learning rates log-uniform in 1e-5 … 1e-2; β₁ of both Adams
from 0, 0.5, 0.9; the loss from `NonSaturating`, `Hinge`, `Wasserstein`, `LeastSquares`; widths of both networks from
32, 64, 128, 256, their hidden layers from 1, 2, 3, their activation from ReLU, LeakyReLU, Tanh; batches of 64, 256,
512; 2, 16 or 64 latents; ring or grid. Digits: small convolutional networks (DCGAN without normalization) whose widths
are an eighth of these, and batches of 64, 128, 256. Every column has 5,000 steps; what `Autopilot` tries and throws
away counts.

A recipe ends well if, of 2,500 samples, each mode has a tenth of its share at least, within ten standard deviations of
its centre, and more than half of the samples lie there. Digits: the rarest of the ten has over 3 % of the samples, and
a classifier is sure (over 0.9) of half of them.

Columns: plain: the recipe as it is drawn. fixed: the one set of callbacks that was best on other seeds, for all
recipes. oracle: the best of thirteen remedies, made by hand, for each recipe; they are tried in order until one ends
well. The first is the fixed set, so that they are not tried where that one has been run and ends well. Rows that are
finished are kept in `--results` and not computed again. `--plot FILE` draws which recipe ends well in which column.
"""

import argparse
import logging
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from jobs import finish
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import lightning_gan_stability as package
from lightning_gan_stability import (
    MLP,
    Autopilot,
    DCGANDiscriminator,
    DCGANGenerator,
    DigitClassifier,
    Digits,
    GANModule,
    GeneratorEMA,
    Grid,
    OptimisticAdam,
    OptimizerSchedule,
    Packed,
    R1Penalty,
    R2Penalty,
    Ring,
    Schedule,
)

STEPS = 5000
SAMPLES = 2500
LOSSES = ["NonSaturating", "Hinge", "Wasserstein", "LeastSquares"]


class Recipe(NamedTuple):
    """What is drawn."""

    lr_g: float
    lr_d: float
    beta1: float
    loss: str
    g_width: int
    d_width: int
    g_depth: int
    d_depth: int
    activation: str
    batch: int
    latents: int
    data: str


def draw(seed: int, family: str) -> Recipe:
    """The recipe of a seed."""
    source = random.Random(seed)

    def log_uniform(low: float, high: float) -> float:
        return 10 ** source.uniform(math.log10(low), math.log10(high))

    recipe = Recipe(
        log_uniform(1e-5, 1e-2),
        log_uniform(1e-5, 1e-2),
        source.choice([0.0, 0.5, 0.9]),
        source.choice(LOSSES),
        *(source.choice([32, 64, 128, 256]) for _ in range(2)),
        *(source.choice([1, 2, 3]) for _ in range(2)),
        source.choice(["ReLU", "LeakyReLU", "Tanh"]),
        source.choice([64, 256, 512]),
        source.choice([2, 16, 64]),
        source.choice(["ring", "grid"]),
    )
    if family == "digits":
        small = {64: 64, 256: 128, 512: 256}
        recipe = recipe._replace(data="digits", batch=small[recipe.batch])
    return recipe


class Remedy(NamedTuple):
    """What somebody may try: rates fall to zero in the second half, and samples come from an average."""

    lr_g: float
    lr_d: float
    betas: tuple[float, float] = (0.0, 0.99)
    gamma: float = 0.1  # of R1 and R2
    r2: bool = True
    packing: int = 1
    optimizer: type[Optimizer] = torch.optim.Adam


REMEDIES = [
    Remedy(3e-3, 1e-2, (0.0, 0.9), gamma=1.0),
    Remedy(3e-3, 1e-2),
    Remedy(1e-3, 4e-3),
    Remedy(3e-3, 1e-2, gamma=1.0),
    Remedy(3e-3, 3e-3, (0.5, 0.9)),
    Remedy(1e-3, 1e-2, gamma=0.3),
    Remedy(1e-3, 1e-3, (0.5, 0.999)),
    Remedy(3e-4, 1e-3, (0.5, 0.99), gamma=0.03),
    Remedy(6e-3, 2e-2, gamma=0.3),
    Remedy(3e-3, 1e-2, packing=2),
    Remedy(3e-3, 3e-3, (0.0, 0.9), gamma=0.3, r2=False),
    Remedy(1e-3, 1e-3, (0.5, 0.999), gamma=0.0),
    Remedy(1e-3, 2e-3, (0.5, 0.9), optimizer=OptimisticAdam),
]
FIXED = REMEDIES[0]


def networks(recipe: Recipe, packing: int) -> tuple[nn.Module, nn.Module]:
    if recipe.data == "digits":
        discriminator = DCGANDiscriminator(packing, 8, recipe.d_width // 8)
        return DCGANGenerator(recipe.latents, 1, 8, recipe.g_width // 8, batch_norm=False), discriminator
    activation = getattr(nn, recipe.activation)
    generator = MLP([recipe.latents, *[recipe.g_width] * recipe.g_depth, 2], activation=activation)
    return generator, MLP([2 * packing, *[recipe.d_width] * recipe.d_depth, 1], activation=activation)


def make_adam(lr: float, betas: tuple[float, float], kind: type[Optimizer] = torch.optim.Adam) -> Any:
    fused = {"fused": True} if kind is torch.optim.Adam else {}
    return lambda parameters: kind(parameters, lr=lr, betas=betas, **fused)  # type: ignore[call-arg]


def module_of(recipe: Recipe, seed: int, steps: int, remedy: Remedy | None) -> GANModule:
    seed_everything(seed, verbose=False)
    packing = 1 if remedy is None else remedy.packing
    generator, discriminator = networks(recipe, packing)
    if packing > 1:
        discriminator = Packed(discriminator, packing)
    options: dict[str, Any] = {}
    if remedy is None:
        rates, betas, kind = (recipe.lr_g, recipe.lr_d), (recipe.beta1, 0.999), torch.optim.Adam
    else:
        rates, betas, kind = (remedy.lr_g, remedy.lr_d), remedy.betas, remedy.optimizer
        fall = _falling(steps)
        options = {"g_scheduler": fall, "d_scheduler": fall}
    makers = {"g_optimizer": make_adam(rates[0], betas, kind), "d_optimizer": make_adam(rates[1], betas, kind)}
    loss = getattr(package, recipe.loss)()
    return GANModule(generator, discriminator, recipe.latents, loss, **makers, **options, noise_seed=seed)


def _falling(steps: int) -> Callable[[Optimizer], LambdaLR]:
    return lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))


def data_of(recipe: Recipe, seed: int) -> Any:
    if recipe.data == "digits":
        return Digits(recipe.batch, seed=0)
    kind: Any = Ring if recipe.data == "ring" else Grid
    return kind("pacgan", batch_size=recipe.batch, seed=seed)


def penalties(gamma: float, r2: bool = True) -> list[Callback]:
    return [R1Penalty(gamma), *([R2Penalty(gamma)] if r2 else [])] if gamma else []


def fixed(steps: int) -> list[Callback]:
    """The best fixed set of callbacks, which sets rates and betas too."""
    half = steps / 2
    rates = {"g": FIXED.lr_g, "d": FIXED.lr_d}
    return [
        *(
            OptimizerSchedule(
                {
                    "lr": Schedule(rate, 0.0, steps, shape="linear", hold=half),
                    "betas.0": FIXED.betas[0],
                    "betas.1": FIXED.betas[1],
                },
                player=player,  # type: ignore[arg-type]
            )
            for player, rate in rates.items()
        ),
        *penalties(FIXED.gamma),
        GeneratorEMA(decay=0.98),
    ]


def judge(recipe: Recipe, data: Any, samples: Tensor) -> dict[str, Any]:
    """Whether it ended well, modes that are held, and the share of good samples."""
    if not bool(samples.isfinite().all()):
        return {"good": False, "modes": 0, "share": 0.0}
    if recipe.data == "digits":
        classifier = DigitClassifier()
        with torch.no_grad():
            probabilities = classifier.classify(samples)
        shares = torch.bincount(probabilities.argmax(1), minlength=10) / len(samples)
        sure = (probabilities.amax(1) > 0.9).float().mean().item()
        held = int((shares > 0.03).sum())
        return {"good": held == 10 and sure >= 0.5, "modes": held, "share": sure}
    distance, mode = torch.cdist(samples, data.centers).min(1)
    near, modes = distance < 10 * data.std, len(data.centers)
    held = int((torch.bincount(mode[near], minlength=modes) >= len(samples) / modes / 10).sum())
    share = near.float().mean().item()
    return {"good": held == modes and share > 0.5, "modes": held, "share": share}


def fit(recipe: Recipe, seed: int, steps: int, remedy: Remedy | None, callbacks: Iterable[Callback]) -> dict[str, Any]:
    """One run."""
    gan, data = module_of(recipe, seed, steps, remedy), data_of(recipe, seed)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        enable_progress_bar=False,
        callbacks=[*callbacks],
        **options,
    )
    start = process_time()
    try:
        trainer.fit(gan, data)
    except FloatingPointError:  # a loss that is not finite ends the run
        return {"good": False, "modes": 0, "share": 0.0, "seconds": process_time() - start}
    seconds = process_time() - start
    latents = torch.randn(SAMPLES, recipe.latents, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        samples = gan.eval().sample(SAMPLES, latents=latents)
    return judge(recipe, data, samples) | {"seconds": seconds}


def run(family: str, seed: int, column: str, steps: int) -> dict[str, Any]:
    """One recipe in one column."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    recipe = draw(seed, family)
    if column == "plain":
        return fit(recipe, seed, steps, None, [])
    if column == "fixed":
        return fit(recipe, seed, steps, None, fixed(steps))
    if column == "autopilot":
        return fit(recipe, seed, steps, None, [Autopilot(when="always")])
    found: list[dict[str, Any]] = []
    for remedy in REMEDIES:
        stack: list[Callback] = [*penalties(remedy.gamma, remedy.r2), GeneratorEMA(decay=0.98)]
        found.append(fit(recipe, seed, steps, remedy, stack))
        if found[-1]["good"]:
            break
    best = max(found, key=lambda row: (row["good"], row["modes"], row["share"]))
    return best | {"seconds": sum(row["seconds"] for row in found), "tried": len(found)}


COLUMNS = ["plain", "fixed", "autopilot", "oracle"]


Rows = dict[tuple[str, int], dict[str, Any]]  # by column and seed


def by_column(rows: list[dict[str, Any]]) -> Rows:
    """The row of each column and seed; where the fixed set ends well, the oracle does."""
    solved = {("oracle", row["seed"]): row for row in rows if row["column"] == "fixed" and row["good"]}
    return {(row["column"], row["seed"]): row for row in rows} | solved


def ends_well(by: Rows, column: str) -> list[int]:
    """The seeds whose recipes end well in a column."""
    return sorted(seed for (name, seed), row in by.items() if name == column and row["good"])


def table(by: Rows, columns: list[str]) -> str:
    """Share that ends well, and CPU time over plain."""
    seeds = sorted({seed for _, seed in by})
    lines = ["| column | ends well | of those that plain solves | CPU time over plain, median |", "|---|---|---|---|"]
    solved = ends_well(by, "plain")
    for column in columns:
        mine = [by[column, seed] for seed in seeds if (column, seed) in by]
        kept = sum(by[column, seed]["good"] for seed in solved if (column, seed) in by)
        times = [
            by[column, seed]["seconds"] / by["plain", seed]["seconds"]
            for seed in seeds
            if (column, seed) in by and ("plain", seed) in by
        ]
        time = f"{statistics.median(times):.2f}" if times and column != "oracle" else ""
        lines.append(f"| {column} | {len(ends_well(by, column))} of {len(mine)} | {kept} of {len(solved)} | {time} |")
    return "\n".join(lines)


def plot(by: Rows, columns: list[str], path: Path) -> None:
    """A mark for each recipe and column that ends well; recipes of which more columns end well come first."""
    from matplotlib import pyplot as plt

    well = {column: set(ends_well(by, column)) for column in columns}
    seeds = sorted({seed for _, seed in by}, key=lambda s: (-sum(s in well[c] for c in columns), s))
    figure, axis = plt.subplots(figsize=(9, 0.5 + 0.32 * len(columns)))
    for line, column in enumerate(columns):
        for place, seed in enumerate(seeds):
            measured = (column, seed) in by
            colour = "tab:blue" if seed in well[column] else "0.88" if measured else "none"
            axis.barh(line, 0.85, left=place, height=0.7, color=colour)
    names = [f"{c}: {len(well[c])} of {sum((c, s) in by for s in seeds)}" for c in columns]
    axis.set(yticks=range(len(columns)), yticklabels=names, xticks=[], xlim=(-0.2, len(seeds)))
    axis.set_xlabel("recipes (blue: ends well)", fontsize=9)
    axis.invert_yaxis()
    axis.tick_params(length=0, labelsize=9)
    axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["mixtures", "digits"], default="mixtures")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(60)))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--results", type=Path, default=Path("runs/random_recipes.jsonl"))
    parser.add_argument("--plot", type=Path, help="where to draw which recipe ends well in which column")
    parser.add_argument("--smoke", action="store_true", help="two seeds, a few steps")
    arguments = parser.parse_args()
    steps = 30 if arguments.smoke else STEPS
    seeds = arguments.seeds[:2] if arguments.smoke else arguments.seeds
    results = None if arguments.smoke else arguments.results

    def finished(pairs: Iterable[tuple[int, str]]) -> list[dict[str, Any]]:
        jobs = [{"family": arguments.family, "seed": s, "column": column, "steps": steps} for s, column in pairs]
        return finish(run, jobs, arguments.jobs, results)

    rows = finished((seed, column) for seed in seeds for column in arguments.columns if column != "oracle")
    if "oracle" in arguments.columns:  # which the fixed set has solved where it ends well
        solved = ends_well(by_column(rows), "fixed")
        rows += finished((seed, "oracle") for seed in seeds if seed not in solved)
    print(f"torch {torch.__version__}; {arguments.family}, {len(seeds)} recipes, {steps} steps each\n")
    by = by_column(rows)
    for column in arguments.columns:
        print(f"{column}: {ends_well(by, column)}")
    print(f"\n{table(by, arguments.columns)}")
    if arguments.plot:
        plot(by, arguments.columns, arguments.plot)


if __name__ == "__main__":
    main()
