"""Runs the trials of a sweep with Ray Tune, on a cluster or on one machine."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from lightning_gan_stability._checks import require
from lightning_gan_stability.cli.sweep_plan import Plan, recipe
from lightning_gan_stability.cli.sweep_trial import Record, prepare, result, run_here
from lightning_gan_stability.cli.training import read_config

EXTRA = "ray"
SIDE, NUMBER, SECONDS, ENDED = "side", "number", "seconds", "ended"


def run_on_ray(plan: Plan, only_read: bool = False) -> list[Record]:
    """Run a sweep on the cluster that this machine belongs to, or on this machine.

    The folder of the study must be visible to all nodes. An interrupted study is resumed.

    Args:
        plan: plan of the sweep.
        only_read: run nothing.

    Returns:
        All trials.

    Raises:
        ModuleNotFoundError: without Ray.
    """
    made = tuner(plan)
    if not only_read:
        return records_of(plan, made.fit())
    begun = (plan.home / "ray").is_dir()
    return records_of(plan, made.get_results()) if begun else []


def tuner(plan: Plan) -> Any:
    """The ``ray.tune.Tuner`` of a sweep: a new one, or one that resumes an interrupted sweep."""
    ray, tune = require("ray", EXTRA), require("ray.tune", EXTRA)
    if not ray.is_initialized():
        paths = [str(Path.cwd()), *sys.path]
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}})
    home = plan.home.resolve()
    trainable = tune.with_resources(tune.with_parameters(_run, plan=plan, cwd=str(Path.cwd())), _resources(plan))
    if tune.Tuner.can_restore(str(home / "ray")):
        return tune.Tuner.restore(str(home / "ray"), trainable, resume_errored=False, restart_errored=False)
    side = {SIDE: tune.grid_search([f"{i}" for i in range(len(plan.sides))])}
    return tune.Tuner(
        trainable,
        param_space={parameter.key: parameter.for_ray() for parameter in plan.space} | side,
        tune_config=tune.TuneConfig(
            num_samples=plan.trials,
            scheduler=_scheduler(plan),
            search_alg=tune.search.BasicVariantGenerator(
                random_state=plan.seed,
                constant_grid_search=True,  # the same draws for each side
                max_concurrent=plan.jobs if plan.jobs > 1 else 0,
            ),
        ),
        run_config=tune.RunConfig(name="ray", storage_path=str(home), verbose=0),
    )


def _run(drawn: dict[str, Any], plan: Plan, cwd: str) -> None:
    """A trial, in a process of Ray."""
    tune = require("ray.tune", EXTRA)
    os.chdir(cwd)
    name = tune.get_context().get_trial_id()
    side = plan.sides[int(drawn[SIDE])]
    folder = plan.place(side, 0).with_name(f"trial_{name}")
    started = time.monotonic()
    content = recipe(plan.arguments(drawn, side), folder)
    prepare(folder, content, f"trial {name} in the study {plan.study}: as its run goes into this folder")
    values: list[float] = []

    def report(step: int, value: float) -> None:
        values.append(value)
        tune.report({plan.metric: value, "step": step, SECONDS: time.monotonic() - started, ENDED: False})

    error = run_here(folder, plan.metric, report)
    if error:
        raise RuntimeError(error)
    last = result(values, plan.value, plan.mode)
    tune.report({plan.metric: last, "step": sys.maxsize, SECONDS: time.monotonic() - started, ENDED: True})


def _resources(plan: Plan) -> dict[str, float]:
    """A trial's share of a node: the GPUs that its config has, and the cores that there are for each of its jobs."""
    import torch

    trainer = read_config(plan.unsearched.arguments({}))["trainer"]
    devices = trainer["devices"]
    if trainer["accelerator"] == "cpu" or not torch.cuda.is_available():
        return {"cpu": 1}
    return {"cpu": 1, "gpu": devices if isinstance(devices, int) and devices > 0 else 1}


def _scheduler(plan: Plan) -> Any:
    schedulers = require("ray.tune.schedulers", EXTRA)
    if plan.pruner == "none":
        return schedulers.FIFOScheduler()
    options = {"time_attr": "step", "metric": plan.metric, "mode": plan.mode, "grace_period": plan.prune_after or 1}
    if plan.pruner == "halving":
        return schedulers.AsyncHyperBandScheduler(reduction_factor=3, max_t=10**12, **options)
    return schedulers.MedianStoppingRule(min_samples_required=5, **options)


def records_of(plan: Plan, grid: Any) -> list[Record]:
    """The trials of Ray's results."""
    records, numbers = [], dict.fromkeys(plan.sides, 0)
    for found in grid:
        drawn, metrics = dict(found.config or {}), found.metrics or {}
        side = plan.sides[int(drawn.pop(SIDE))]
        number = numbers[side]
        numbers[side] += 1
        value, error = metrics.get(plan.metric), found.error
        ended = bool(metrics.get(ENDED))
        folder = plan.place(side, 0).with_name(f"trial_{_trial_of(found.path)}")
        said = "" if error is None else " ".join(str(error).strip().splitlines()[-1].split())
        state: Any = "failed" if error is not None else "complete" if ended else "pruned"
        value = None if value is None else float(value)
        records.append(Record(side, number, state, value, drawn, folder, float(metrics.get(SECONDS, 0.0)), said))
    return records


def _trial_of(path: str) -> str:
    """Ray's name of a trial, from the folder that Ray keeps of it."""
    found = re.search(r"[0-9a-f]+_\d{5}", Path(path).name)
    return found[0] if found else Path(path).name
