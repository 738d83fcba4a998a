"""Imbalance: how often each player steps, from 1 : 10 to 10 : 1, and rules that adapt it; quality, not loss, is judged.

    python examples/why_gans_are_hard/balance.py --out balance.png

Every run sees the same number of batches of the ring. FID is that of the points themselves; 2,500 real points against
2,500 others have about 0.001.
"""

import matplotlib.pyplot as plt
from shared import arguments, points, train

from lightning_gan_stability import AdaptiveUpdateRatio, QualityMonitor, R1Penalty, Ring, UpdateRatio

RATIOS = [(1, 10), (1, 3), (1, 1), (3, 1), (10, 1)]  # discriminator : generator
RULES = ["accuracy", "loss_change", "logit_gap", "gradient_norm"]


def main():
    options = arguments(__doc__, steps=850)
    runs = {f"{d}:{g}": lambda d=d, g=g: UpdateRatio(d, g) for d, g in RATIOS}
    runs |= {rule: lambda rule=rule: AdaptiveUpdateRatio(rule) for rule in RULES}
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    print("discriminator : generator      FID   modes   high quality")
    for name, make in runs.items():
        monitor = QualityMonitor(metrics=["fid", "modes"], every=options.steps)
        train(points(options.seed), Ring(seed=options.seed), options.steps, make(), R1Penalty(0.1), monitor)
        values = monitor.values
        print(f"{name:<25} {values['fid']:9.4f}   {values['modes']:5.0f}   {values['high_quality']:12.2f}")
        axis.bar(name, values["fid"], color="tab:blue" if ":" in name else "tab:orange")
        axis.text(name, values["fid"], f"{values['modes']:.0f}", ha="center", va="bottom")
    axis.set(yscale="log", ylabel="FID; numbers are modes of 8", xlabel="steps of discriminator : generator")
    axis.tick_params(axis="x", rotation=30)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
