"""Losses do not show quality: the generator's loss against FID over a run on digits, and which checkpoint each picks.

python examples/why_gans_are_hard/loss_vs_quality.py --out loss_vs_quality.png
"""

import matplotlib.pyplot as plt
from lightning.pytorch import Callback
from scipy.stats import spearmanr
from shared import arguments, digits, train

from lightning_gan_stability import DigitClassifier, Digits, NonSaturating, QualityMonitor, R1Penalty


class Losses(Callback):
    """The generator's mean loss between two measurements."""

    def __init__(self, monitor):
        self.monitor, self.sum, self.losses = monitor, [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.sum.append(module.last_step.values["g/adversarial"].item())
        if module.iteration % self.monitor.every == 0:
            self.losses.append(sum(self.sum) / len(self.sum))
            self.sum = []


def watch(options, penalties):
    """Steps, mean generator losses and FIDs of a run."""
    monitor = QualityMonitor(DigitClassifier(), ["fid"], n_samples=1000, every=max(1, options.steps // 40))
    look, gan = Losses(monitor), digits(options.seed, NonSaturating())
    train(gan, Digits(seed=options.seed), options.steps, *penalties, monitor, look)
    rows = [row for row in monitor.history if row["step"] > 0]
    return [row["step"] for row in rows], look.losses, [row["fid"] for row in rows]


def main():
    options = arguments(__doc__, steps=2000)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, (name, penalties) in zip(axes, {"plain": [], "R1Penalty": [R1Penalty(1.0)]}.items(), strict=True):
        steps, losses, fids = watch(options, penalties)
        print(
            f"{name}: rank correlation of loss and FID {spearmanr(losses, fids).statistic:.2f} (1: loss shows quality)"
        )
        for what, values, colour in (("loss", losses, "tab:blue"), ("FID", fids, "tab:red")):
            best = values.index(min(values))
            print(f"  best by {what:<4}: step {steps[best]:5.0f}, loss {losses[best]:.3f}, FID {fids[best]:6.2f}")
            axis.axvline(steps[best], color=colour, linestyle=":")
        axis.semilogy(steps, fids, "tab:red")
        axis.set(xlabel="step", title=name)
        axis.set_ylabel("FID", color="tab:red")
        other = axis.twinx()
        other.plot(steps, losses, "tab:blue")
        other.set_ylabel("generator loss", color="tab:blue")
    figure.savefig(options.out, dpi=60)


if __name__ == "__main__":
    main()
