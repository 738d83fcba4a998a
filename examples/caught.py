"""Detect a collapse and recover from it: draws docs/caught.png. Takes two to three CPU minutes.

    python examples/caught.py --out caught.png

The GAN of configs/ring_collapse.yaml, whose generator learns ten times faster than its discriminator, runs twice from
the same start: with the rollback of CollapseDetector, and with its warnings only. Prints events, and modes at the end.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

import lightning_gan_stability as gans

REDS, BLUES = ("#f5b5a8", "#e8705f", "#b3121d"), ("#a9c8ea", "#5b93d0", "#1f5fa8")  # light to dark


class Look(Callback):
    """Keeps some samples of the generator's average at each measurement, before the detector acts."""

    def __init__(self, every):
        self.every, self.samples = every, {}

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % self.every == 0:
            latents = torch.randn(1000, module.latent_dim, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                self.samples[trainer.global_step] = module.generator_ema(latents)


def train(steps, detector):
    """One run: its measurements, events and samples."""
    every = min(250, max(1, steps // 4))
    seed_everything(0, verbose=False)
    g_adam, d_adam = (lambda parameters, lr=lr: torch.optim.Adam(parameters, lr, (0.5, 0.999)) for lr in (1e-3, 1e-4))
    networks = gans.MLP([64, 128, 128, 2]), gans.MLP([2, 128, 128, 1])
    gan = gans.GANModule(*networks, 64, gans.Relativistic(), g_adam, d_adam)
    monitor = gans.QualityMonitor(metrics=["fid", "recall", "coverage", "diversity", "modes"], every=every)
    look, penalties = Look(every), [gans.R1Penalty(0.001), gans.R2Penalty(0.001)]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[*penalties, gans.GeneratorEMA(decay=0.99), look, monitor, detector],
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(gan, gans.Ring(batch_size=256))
    return {"history": monitor.history, "events": detector.events, "samples": look.samples}


def draw(rescued, left, out):
    """Samples of three measurements in a row, light to dark; below, modes over time."""
    every, end = rescued["history"][1]["step"], rescued["history"][-1]["step"]
    at = rescued["events"][0]["step"] if rescued["events"] else end
    panels = {
        "young": (rescued, 3 * every), "caught": (rescued, at), "rolled back": (rescued, end), "left alone": (left, end)
    }  # fmt: skip
    figure, axes = plt.subplot_mosaic([[*panels], ["modes"] * 4], figsize=(9, 4.3), height_ratios=[1.5, 1])
    figure.set_layout_engine("constrained")
    for title, (run, last) in panels.items():
        axis, steps = axes[title], [step for step in run["samples"] if last - 3 * every < step <= last]
        axis.scatter(*gans.Ring().centers.T, s=110, facecolors="none", edgecolors="black", linewidths=0.7)
        for step, colour in zip(steps, BLUES if title == "rolled back" else REDS, strict=False):
            axis.plot(*run["samples"][step].T, ".", color=colour, markersize=2)
        axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"{title}: steps {steps[0]:,} to {steps[-1]:,}", fontsize=8.5)
    for run, colour, name in ((left, REDS[-1], "left alone"), (rescued, BLUES[-1], "with rollback and remedy")):
        axes["modes"].plot(*zip(*((row["step"], row["modes"]) for row in run["history"]), strict=True),
                           "o-", color=colour, markersize=3, label=name)  # fmt: skip
    axes["modes"].axvline(at, color="black", linestyle=":", label=f"step {at:,}: caught, and put back")
    axes["modes"].set(xlim=(0, end), ylim=(-0.5, 8.5), yticks=range(0, 9, 2), xlabel="step", ylabel="modes held, of 8")
    axes["modes"].legend(loc="center right", fontsize=8)
    figure.savefig(out, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", default="caught.png", help="the picture")
    options = parser.parse_args()
    remedies = [gans.ScaleLearningRate(10.0, player="d"), gans.ScalePenalty(1000.0)]
    rescued = train(options.steps, gans.CollapseDetector("rollback", remedy=remedies))
    left = train(options.steps, gans.CollapseDetector("warn"))
    draw(rescued, left, options.out)
    for name, run in {"with rollback": rescued, "without": left}.items():
        events = "; ".join(f"step {e['step']}: {e['verdict']}, {e['action']}" for e in run["events"])
        print(f"{name}: {run['history'][-1]['modes']:.0f} of 8 modes at the end; {events or 'no event'}")


if __name__ == "__main__":
    main()
