"""How often the intervals of `gan-stability evaluate` hold what they are for: simulated with known distributions.

    python examples/benchmarks/evaluation.py            # half an hour on one core
    python examples/benchmarks/evaluation.py --only "wider, 8 dimensions"
    python examples/benchmarks/evaluation.py --smoke    # seconds; only shows that it runs

In each of `--runs` runs real and generated samples are drawn anew, and an interval is made for each metric. What it is
to hold is the mean of the metric over all runs. Of 200 runs an exact 95 % has 92 % to 98 %, 19 times of 20. Differences
are those of two generators with the same latents and the same real samples.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gan_stability.metrics.features import mmd_bias
from lightning_gan_stability.metrics.uncertainty import WITH_INTERVALS, halved, interval, interval_of_difference
from lightning_gan_stability.monitors.quality import values_of

Draw = Callable[[int, torch.Generator], Tensor]


def normal(d: int, scale: float = 1.0, shift: float = 0.0) -> Draw:
    return lambda n, random: scale * torch.randn(n, d, generator=random) + shift


def ring(modes: int) -> Draw:
    def draw(n: int, random: torch.Generator) -> Tensor:
        angle = torch.randint(modes, (n,), generator=random) * math.tau / 8
        return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2, generator=random)

    return draw


# real and generated distribution, and samples of each
CASES: dict[str, tuple[Draw, Draw, int]] = {
    "equal, 2 dimensions": (normal(2), normal(2), 300),
    "equal, 8 dimensions": (normal(8), normal(8), 250),
    "shifted, 4 dimensions": (normal(4), normal(4, shift=0.5), 250),
    "wider, 8 dimensions": (normal(8), normal(8, scale=1.5), 300),
    "ring, a mode lost": (ring(8), ring(7), 300),
    "far off, 2 dimensions": (normal(2), normal(2, shift=3.0), 250),
}


def swirl(z: Tensor) -> Tensor:
    """Normal again, by turns that depend on the radius."""
    turned = torch.view_as_complex(z.unflatten(1, (-1, 2)))
    return torch.view_as_real(turned * torch.exp(1j * turned.abs())).flatten(1)


# two generators of the same latents, as maps of standard normal ones in 4 dimensions
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "difference, both perfect": (lambda z: z, swirl),
    "difference, one 10 % wider": (lambda z: z, lambda z: 1.1 * z),
}


def measure(real: Tensor, fake: Tensor) -> dict[str, float]:
    return values_of(real, fake, WITH_INTERVALS)


def intervals(case: str, runs: int, splits: int) -> dict[str, float]:
    """The share of runs in which the interval of a metric holds its mean."""
    draw_real, draw_fake, n = CASES[case]
    random, found = torch.Generator().manual_seed(0), []
    for run in range(runs):
        real, fake = draw_real(n, random), draw_fake(n, random)
        values, halves = measure(real, fake), halved(measure, real, fake, splits, seed=run)
        bias = mmd_bias(real.double(), fake.double())
        found.append((values, {name: interval(name, x, halves[name], n, bias=bias) for name, x in values.items()}))
    return shares(found)


def differences(case: str, runs: int, splits: int, n: int = 250) -> dict[str, float]:
    """The same for the difference of two generators."""
    random, found = torch.Generator().manual_seed(0), []
    for run in range(runs):
        real, latents = (torch.randn(n, 4, generator=random) for _ in range(2))
        pair = [generator(latents) for generator in PAIRS[case]]
        (a, b), (x, y) = (
            [measure(real, fake) for fake in pair],
            [halved(measure, real, fake, splits, seed=run) for fake in pair],
        )
        values = {name: a[name] - b[name] for name in a}
        found.append((values, {name: interval_of_difference(name, values[name], x[name] - y[name]) for name in a}))
    return shares(found)


def shares(found: list[tuple[dict[str, float], dict[str, tuple[float, float]]]]) -> dict[str, float]:
    means = {name: sum(values[name] for values, _ in found) / len(found) for name in found[0][0]}
    return {
        name: sum(ends[name][0] <= mean <= ends[name][1] for _, ends in found) / len(found)
        for name, mean in means.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--splits", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=[*CASES, *PAIRS])
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs, splits = (3, 2) if arguments.smoke else (arguments.runs, arguments.splits)
    print(f"Share of {runs} runs whose 95 % interval, of {splits} halvings, holds the mean\n")
    print("| distributions |", " | ".join(WITH_INTERVALS), "|")
    print("| --- |" + " --- |" * len(WITH_INTERVALS))
    for case in arguments.only or [*CASES, *PAIRS]:
        found = (intervals if case in CASES else differences)(case, runs, splits)
        print(f"| {case} |", " | ".join(f"{found[name]:.1%}" for name in WITH_INTERVALS), "|", flush=True)


if __name__ == "__main__":
    main()
