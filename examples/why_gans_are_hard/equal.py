"""Are GANs created equal? Every loss, with a random search of hyperparameters of the same budget, on digits, by FID.

    python examples/why_gans_are_hard/equal.py --out equal.png                        # 3 draws each, a minute or two
    python examples/why_gans_are_hard/equal.py --draws 50 --steps 6000 --out equal.png  # the real thing, a night

Every loss gets the same draws of learning rates, momentum, discriminator steps, R1's weight and first weights; what is
compared is the expected best FID of k draws ("Are GANs Created Equal?", https://arxiv.org/abs/1711.10337: what differs
most is the budget). It is `gan-stability sweep` on the config below; broken off, the same command goes on.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from shared import arguments

from lightning_gan_stability.cli.sweep import sweep
from lightning_gan_stability.cli.sweep_plan import make_plan
from lightning_gan_stability.cli.sweep_results import evaluate, write_results

LOSSES = ["Minimax", "NonSaturating", "LeastSquares", "Wasserstein", "Hinge", "Relativistic", "RelativisticAverage"]
CONFIG = """
model:
  generator:
    class_path: MLP
    init_args: {sizes: [32, 128, 128, 64], output_activation: torch.nn.Tanh, output_shape: [1, 8, 8]}
  discriminator: {class_path: MLP, init_args: {sizes: [64, 128, 128, 1], activation: torch.nn.LeakyReLU}}
  latent_dim: 32
  loss: NonSaturating
  g_optimizer: {class_path: Adam, init_args: {lr: 5.0e-4, betas: [0.0, 0.999], fused: true}}
  d_optimizer: {class_path: Adam, init_args: {lr: 5.0e-4, betas: [0.0, 0.999], fused: true}}
data: Digits
trainer:
  accelerator: cpu
  enable_progress_bar: false
  enable_checkpointing: false
  limit_val_batches: 0
  logger: {class_path: CSVLogger, init_args: {save_dir: runs}}
  callbacks:
  - class_path: UpdateRatio
  - class_path: R1Penalty
  - {class_path: QualityMonitor, init_args: {extractor: DigitClassifier, metrics: [fid], n_samples: 1000}}
"""
SPACE = {
    "model.loss": LOSSES,
    "model.g_optimizer.lr": {"log_uniform": [1e-4, 10**-2.5]},
    "model.d_optimizer.lr": {"log_uniform": [1e-4, 10**-2.5]},
    "model.g_optimizer.betas": [[beta, 0.999] for beta in (0.0, 0.5, 0.9)],
    "trainer.callbacks.UpdateRatio.d_steps": [1, 2],
    "trainer.callbacks.R1Penalty.gamma": {"log_uniform": [0.01, 10]},
    "seed_everything": {"integer": [0, 10**6]},
}


def main():
    options = arguments(__doc__, steps=200, draws=3)
    study = f"equal_{options.steps}_steps_seed_{options.seed}"
    config = Path("runs", study, "base.yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG)
    settings = {"trainer.max_steps": options.steps, "trainer.callbacks.QualityMonitor.every": options.steps}
    search = {"search_space": SPACE, "side_by_side": "model.loss", "metric": "quality/fid", "sampler": "random"}
    run = {"study": study, "trials": options.draws, "seed": options.seed, "pruner": "none", "jobs": 0}
    plan = make_plan({"config": str(config), "settings": settings} | search | run)
    results = evaluate(plan, sweep(plan))
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    print(f"{'loss':<20}  expected best FID of 1 draw   of {options.draws} draws, of {options.steps} steps")
    for loss, curve in results.curves.items():
        print(f"{loss:<20}  {curve.mean[0]:26.2f}  {curve.mean[-1]:11.2f}")
        budgets = range(1, len(curve.mean) + 1)
        axis.plot(budgets, curve.mean, marker="o", label=loss)
        axis.fill_between(budgets, curve.low, curve.high, alpha=0.08)
    axis.set(yscale="log", xlabel="draws of hyperparameters", ylabel="FID on digits: expected best, and 90%")
    axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=80)
    write_results(results)


if __name__ == "__main__":
    main()
