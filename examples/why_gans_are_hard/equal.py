"""Are GANs created equal? Every loss, with a random search of hyperparameters of the same budget, on digits, by FID.

    python examples/why_gans_are_hard/equal.py --out equal.png                        # 4 draws each, a minute or two
    python examples/why_gans_are_hard/equal.py --draws 50 --steps 6000 --out equal.png  # the real thing, a night

Every loss gets the same draws of learning rates, momentum, discriminator steps and R1's weight ("Are GANs Created
Equal?", https://arxiv.org/abs/1711.10337: what differs most is the budget).
"""

import random
import statistics

import matplotlib.pyplot as plt
from shared import arguments, digits, train

from lightning_gan_stability import (
    DigitClassifier,
    Digits,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    QualityMonitor,
    R1Penalty,
    Relativistic,
    RelativisticAverage,
    UpdateRatio,
    Wasserstein,
)

LOSSES = [Minimax, NonSaturating, LeastSquares, Wasserstein, Hinge, Relativistic, RelativisticAverage]


def draw(source):
    """One set of hyperparameters."""
    return {
        "g_lr": 10 ** source.uniform(-4, -2.5),
        "d_lr": 10 ** source.uniform(-4, -2.5),
        "beta": source.choice([0.0, 0.5, 0.9]),
    }, (source.choice([1, 2]), 10 ** source.uniform(-2, 1))


def main():
    options = arguments(__doc__, steps=500, draws=4)
    source, classifier, found = random.Random(options.seed), DigitClassifier(), {}
    draws = [draw(source) for _ in range(options.draws)]
    print(f"{'loss':<20}  best FID  median  worst, of {options.draws} draws of {options.steps} steps")
    for loss in LOSSES:
        fids = []
        for seed, (rates, (d_steps, gamma)) in enumerate(draws):
            monitor = QualityMonitor(classifier, ["fid"], n_samples=1000, every=options.steps)
            callbacks = [UpdateRatio(d_steps), R1Penalty(gamma), monitor]
            try:
                train(digits(seed, loss(), **rates), Digits(seed=seed), options.steps, *callbacks)
                fids.append(monitor.values["fid"])
            except FloatingPointError:  # which is an answer too
                fids.append(float("inf"))
        found[loss.__name__] = fids
        print(f"{loss.__name__:<20}  {min(fids):8.2f}  {statistics.median(fids):6.2f}  {max(fids):5.2f}", flush=True)
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    axis.boxplot(list(found.values()), tick_labels=list(found))
    axis.set(yscale="log", ylabel="FID on digits")
    axis.tick_params(axis="x", rotation=20)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
