"""Searches hyperparameters of a config by the quality of samples, and reports the results.

A sweep is a YAML file beside the config that it searches:

  config: configs/ring.yaml
  settings:                                    # for all trials
    trainer.callbacks+: [{class_path: QualityMonitor, init_args: {every: 500}}]
  search_space:                                # keys as for `gan-stability fit`
    model.loss: [Hinge, NonSaturating, Wasserstein]
    model.g_optimizer.lr: {log_uniform: [1e-5, 1e-2]}
    trainer.callbacks.R1Penalty.gamma: {uniform: [0, 10]}
  side_by_side: model.loss                     # each of its values gets as many trials
  metric: quality/fid
  trials: 40

Each trial is a run in its own folder, runs/STUDY/trial_0, ... Repeat the same command to resume a sweep. Several
processes, also on several machines with one database, share the trials.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gan_stability.cli.sweep_plan import Plan
    from lightning_gan_stability.cli.sweep_trial import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gan-stability sweep``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the file of the sweep")
    parser.add_argument("--trials", type=int, help="of each value that is compared, in place of those in the file")
    parser.add_argument("--jobs", type=int, help="trials at a time; 0: one after another in this process")
    parser.add_argument("--study", help="its name, and the folder's; by default the name of the file")
    parser.add_argument("--storage", metavar="URL", help="a database that several machines share; by default SQLite")
    parser.add_argument("--backend", choices=("optuna", "ray", "wandb"), help="who runs the trials")
    parser.add_argument("--show", action="store_true", help="run nothing: show what was found so far")


def run(arguments: argparse.Namespace) -> None:
    """Run the remaining trials of a sweep, and report the results."""
    from lightning_gan_stability.cli.sweep_plan import read_plan

    names = ("trials", "jobs", "study", "storage", "backend")
    plan = read_plan(arguments.config, **{name: getattr(arguments, name) for name in names})
    if plan.backend == "wandb":
        from lightning_gan_stability.cli.sweep_wandb import write_sweep

        for line in write_sweep(plan):
            print(line)
        return
    show(plan, sweep(plan, arguments.show))


def sweep(plan: Plan, only_read: bool = False) -> list[Record]:
    """Run the remaining trials of a sweep.

    Args:
        plan: plan of the sweep, from ``sweep_plan.read_plan`` or ``make_plan``.
        only_read: run nothing.

    Returns:
        All trials.

    Raises:
        SystemExit: if it is interrupted; the same call resumes it.
    """
    from lightning_gan_stability._checks import require
    from lightning_gan_stability.cli.sweep_optuna import Studies, run_trials

    for module in ("optuna", "bokeh"):  # not found missing after a night
        require(module, "sweep")
    if plan.backend == "ray":
        from lightning_gan_stability.cli.sweep_ray import run_on_ray

        return run_on_ray(plan, only_read)
    if only_read:
        return Studies(plan).records()
    try:
        return run_trials(plan, lambda line: print(line, flush=True))
    except KeyboardInterrupt as interrupt:
        ended = sum(record.state != "running" for record in Studies(plan).records())
        print(f"Broken off with {ended} of {plan.trials * len(plan.sides)} trials: the same command goes on.")
        raise SystemExit(130) from interrupt


def show(plan: Plan, records: list[Record]) -> None:
    """Print the results, and write them to files.

    Raises:
        SystemExit: with status 1, if no trial was completed.
    """
    from lightning_gan_stability.cli.sweep_results import as_text, evaluate, write_results

    if not records:
        print("No trial has begun yet.")
        return
    results = evaluate(plan, records)
    files = write_results(results)
    print(f"\n{as_text(results)}\n")
    for file in files:
        print(file)
    if results.best is None and all(record.state == "failed" for record in records):
        raise SystemExit(1)
