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
        self.sum.append(module._now.logs["g/adversarial"].item())
        if module.iteration % self.monitor.every == 0:
            self.losses.append(sum(self.sum) / len(self.sum))
            self.sum = []


def main():
    options = arguments(__doc__, steps=3000)
    monitor = QualityMonitor(DigitClassifier(), ["fid", "recall"], n_samples=1000, every=max(1, options.steps // 40))
    look = Losses(monitor)
    train(
        digits(options.seed, NonSaturating()), Digits(seed=options.seed), options.steps, R1Penalty(1.0), monitor, look
    )
    rows = [row for row in monitor.history if row["step"] > 0]
    fids, losses = [row["fid"] for row in rows], look.losses
    rho = spearmanr(losses, fids).statistic
    late = spearmanr(losses[len(rows) // 4 :], fids[len(rows) // 4 :]).statistic
    by_loss, by_fid = losses.index(min(losses)), fids.index(min(fids))
    print(f"rank correlation of loss and FID: {rho:.2f}; without the first quarter of the run {late:.2f}")
    print("(1 would be a loss that shows quality, −1 one that shows the opposite)")
    for name, best in (("loss", by_loss), ("FID", by_fid), ("last", len(rows) - 1)):
        print(f"best by {name:<5} step {rows[best]['step']:5.0f}: loss {losses[best]:.3f}, FID {fids[best]:.2f}")
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    steps = [row["step"] for row in rows]
    axis.semilogy(steps, fids, "tab:red", label="FID")
    axis.set(xlabel="step", ylabel="FID")
    other = axis.twinx()
    other.plot(steps, losses, "tab:blue", label="generator loss")
    other.set(ylabel="generator loss")
    for best, colour in ((by_loss, "tab:blue"), (by_fid, "tab:red")):
        axis.axvline(steps[best], color=colour, linestyle=":")
    figure.legend(loc="upper right")
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
