"""Writes a sweep as configs for Weights & Biases, whose agents run ``gan-stability fit`` with the drawn values."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import yaml

from lightning_gan_stability.cli.sweep_plan import Plan, as_argument
from lightning_gan_stability.cli.training import read_config
from lightning_gan_stability.files import written_whole

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # of a parameter, as Weights & Biases takes it


def write_sweep(plan: Plan) -> list[str]:
    """Write ``wandb.yaml`` to the study's folder; with several sides one file each.

    Returns:
        The commands to run next.

    Raises:
        ValueError: if a key cannot be a parameter of Weights & Biases.
    """
    for parameter in plan.space:
        if not _NAME.fullmatch(parameter.key):
            raise ValueError(f"`search_space`: Weights & Biases takes no parameter {parameter.key!r}: rename it.")
    plan.home.mkdir(parents=True, exist_ok=True)
    lines = ["# each prints the agent to start, on as many machines as you like"]
    for side in plan.sides:
        file = plan.home / ("wandb.yaml" if not side else f"wandb_{plan.place(side, 0).parent.name}.yaml")
        text = yaml.safe_dump(sweep_of(plan, side), sort_keys=False, width=10**6)
        with written_whole(file) as place:
            place.write_text(text, encoding="utf-8")
        lines.append(f"wandb sweep {file}")
    return lines


def sweep_of(plan: Plan, side: str = "") -> dict[str, Any]:
    """The config of a sweep.

    Weights & Biases stops runs early only by Hyperband, whatever the pruner; its brackets count measurements.
    """
    bare = replace(plan, space=())
    fixed = bare.arguments({}, side)
    content: dict[str, Any] = {
        "name": f"{plan.study}/{side}" if side else plan.study,
        "method": {"random": "random", "tpe": "bayes"}[plan.sampler],
        "metric": {"name": plan.metric, "goal": {"min": "minimize", "max": "maximize"}[plan.mode]},
        "run_cap": plan.trials,
        "parameters": {parameter.key: parameter.for_wandb() for parameter in plan.space},
        "command": ["${env}", "${interpreter}", "-m", "lightning_gan_stability", "fit", *fixed, *_logger(fixed)],
    }
    if plan.pruner != "none":
        content["early_terminate"] = {"type": "hyperband", "min_iter": 3}
    content["command"].append("${args}")
    return content


def _logger(arguments: list[str]) -> list[str]:
    """The logger that the agent reads, unless the config has it; agents in one folder would share a CSVLogger's."""
    given = read_config(arguments)["trainer"]["logger"]
    loggers = given if isinstance(given, list) else [given] if isinstance(given, dict) else []
    if any(str(entry["class_path"]).endswith("WandbLogger") for entry in loggers):
        return []
    return [as_argument("trainer.logger", {"class_path": "WandbLogger", "init_args": {"save_dir": "runs"}})]
