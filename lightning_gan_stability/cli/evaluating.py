"""Implements ``gan-stability evaluate``: data and protocol of a run, and the measurements."""

from __future__ import annotations

import argparse
import logging
import string
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm

import lightning_gan_stability as package
from lightning_gan_stability._checks import describe
from lightning_gan_stability.callback import callbacks_of
from lightning_gan_stability.checkpoints import check_trust, find_checkpoint, find_config, read_checkpoint, resolve
from lightning_gan_stability.cli.options import load_module
from lightning_gan_stability.cli.results import Checkpoint, Results
from lightning_gan_stability.cli.training import build
from lightning_gan_stability.data.images import Images
from lightning_gan_stability.evaluation import compare, evaluate
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.memorization import MemorizationMonitor
from lightning_gan_stability.monitors.paired import PairedMonitor
from lightning_gan_stability.monitors.quality import QualityMonitor
from lightning_gan_stability.monitors.table import TableMonitor

MEASURING = (QualityMonitor, MemorizationMonitor, PairedMonitor, TableMonitor)
PAIRED = {"psnr": "PeakSignalNoiseRatio", "ssim": "StructuralSimilarityIndexMeasure"}


class Plan(NamedTuple):
    """What to measure, and with which data.

    Attributes:
        data: the run's data; None if unknown.
        callbacks: the run's callbacks that measure.
        precision: precision of its Trainer.
        config: the config file; None if there is none.
    """

    data: LightningDataModule | None = None
    callbacks: Sequence[Callback] = ()
    precision: Any = "32-true"
    config: Path | None = None


def measure(arguments: argparse.Namespace) -> Results:
    """Evaluate the checkpoints that are given as arguments, by the protocol of their runs and of the arguments.

    Raises:
        ValueError: if a checkpoint cannot be read or trusted, or an argument has a bad value.
        MisconfigurationException: if the data to compare with are unknown.
    """
    files = [find_checkpoint(path) for path in arguments.checkpoints]
    steps = [read_checkpoint(file).get("global_step") for file in files]  # refuses what is torn before anything runs
    letters = string.ascii_uppercase
    names = [letters[i] if len(files) <= len(letters) else f"{i + 1}" for i in range(len(files))]
    found, checkpoints = [], {}
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        plan = plan_of(arguments, files[0])
        monitor = monitor_of(arguments, plan, Path(folder) if len(files) > 1 else None)
        memorization = next((c for c in plan.callbacks if isinstance(c, MemorizationMonitor)), None)
        others = [*(c for c in plan.callbacks if isinstance(c, PairedMonitor | TableMonitor)), *paired_of(arguments)]
        for name, file, step in zip(names, files, steps, strict=True):
            module = load_module(str(file), arguments)
            if arguments.no_average:
                module.generator_ema = None
            data = plan.data if arguments.data is None else data_of(arguments.data, module)
            if data is None:
                raise MisconfigurationException(
                    f"Nothing says which data {str(file)!r} is to be compared with: there is no config.yaml of its "
                    "run. Add `--data my_project.MyData`, `--data FOLDER` of images, or `--config FILE`."
                )
            evaluation = evaluate(
                module,
                data,
                monitor,
                others,
                memorization,
                "test" if arguments.split == "test" else "validate",
                arguments.bootstrap,
                arguments.level,
                arguments.seed,
                plan.precision,
                name,
                partial(tqdm, desc=f"{name}: halves", leave=False, disable=None),
            )
            evaluation.notes.extend(_notes(arguments, plan, file, monitor))
            found.append(evaluation)
            weights = "last" if module.generator_ema is None else "average"
            checkpoints[name] = Checkpoint(file, step, weights)
    return Results(found, compare(found, arguments.level), checkpoints)


# ---------- what the run says


def plan_of(arguments: argparse.Namespace, checkpoint: Path) -> Plan:
    """The data and the measuring callbacks of a checkpoint's run.

    Raises:
        ValueError: if its config cannot be read, or names classes that are not trusted.
    """
    named = arguments.config is not None
    file = Path(arguments.config) if named else find_config(checkpoint)
    if file is None:
        return Plan()
    config = read_config(file)
    trust = [*arguments.trust]
    part = measuring_part(config, trust, named)
    if arguments.data is not None:
        part["data"] = "Ring"  # the parser wants one, and nothing is made of this
    if not named:
        check_trust(part, [*trust, *_metrics_in(part)], repr(str(file)))
    if "model" not in part:
        raise ValueError(f"{str(file)!r} is no config of a run: it has no `model`.")
    with tempfile.TemporaryDirectory() as folder:
        reduced = Path(folder, "config.yaml")
        reduced.write_text(yaml.safe_dump(part), encoding="utf-8")
        made = build(["--config", str(reduced)])
    callbacks = [callback for kind in MEASURING for callback in callbacks_of(made.trainer, kind)]
    return Plan(made.datamodule, callbacks, part["trainer"].get("precision") or "32-true", file)


def read_config(file: Path) -> dict[str, Any]:
    """The content of a YAML file.

    Raises:
        ValueError: if it cannot be read, or is not a config.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as a config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} is no config of a run.")
    return config


def measuring_part(config: dict[str, Any], trust: Sequence[str], trusted: bool) -> dict[str, Any]:
    """Create the parts of a config that an evaluation needs; nothing else is created or imported.

    Args:
        config: config of a run.
        trust: names that may be imported.
        trusted: everything may be imported.
    """
    trainer = config.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    kept = [callback for callback in callbacks if _measures(callback, trust, trusted)]
    part = {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    precision = {"precision": trainer["precision"]} if trainer.get("precision") else {}
    return part | {"trainer": quiet | precision | {"callbacks": kept}}


def _measures(callback: Any, trust: Sequence[str], trusted: bool) -> bool:
    name = callback.get("class_path") if isinstance(callback, dict) else callback
    if not isinstance(name, str):
        return False
    short = name.rpartition(".")[2]
    if name in package.__all__ or (name.startswith(f"{package.__name__}.") and short in package.__all__):
        kind = getattr(package, short)
    elif trusted or any(name == root or name.startswith(f"{root}.") for root in trust):
        kind = resolve(name)
    else:
        return False
    return isinstance(kind, type) and issubclass(kind, MEASURING)


def _metrics_in(value: Any) -> Iterator[str]:
    """Names of torchmetrics' own metrics, which PairedMonitor is for."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _metrics_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _metrics_in(item)
    elif isinstance(value, str) and value.startswith("torchmetrics."):
        kind = resolve(value)
        if isinstance(kind, type) and issubclass(kind, Metric) and kind.__module__.startswith("torchmetrics."):
            yield value


# ---------- what the arguments say


def monitor_of(arguments: argparse.Namespace, plan: Plan, cache: Path | None) -> QualityMonitor:
    """The QualityMonitor with the protocol: that of the run, with overrides by arguments.

    Raises:
        ValueError: if an argument has a bad value.
    """
    there = [callback for callback in plan.callbacks if isinstance(callback, QualityMonitor)]
    if arguments.monitor is not None:
        named = [monitor for monitor in there if monitor.name == arguments.monitor]
        if not named:
            names = ", ".join(monitor.name for monitor in there) or "none"
            raise ValueError(f"`--monitor` must be the name of a QualityMonitor of the config: there is {names}.")
        there = named
    run = there[0] if there else QualityMonitor()
    n_real: Any = "all" if run.n_real is None else run.n_real
    if arguments.n is not None and run.n_real == run.n_samples:
        n_real = None
    if arguments.n_real is not None:
        n_real = "all" if arguments.n_real == "all" else _integer("n-real", arguments.n_real)
    return QualityMonitor(
        extractor=run.extractor if arguments.extractor is None else extractor_of(arguments.extractor),
        metrics=run.metrics if arguments.metrics is None else arguments.metrics.split(","),
        n_samples=run.n_samples if arguments.n is None else arguments.n,
        n_real=n_real,
        split=run.split if arguments.split in (None, "test") else arguments.split,
        truncation=run.truncation if arguments.truncation is None else arguments.truncation,
        cache=run.cache or cache,
        name=run.name,
    )


def data_of(name: str, module: GANModule) -> LightningDataModule:
    """The data module of a name, or images of a folder in the size of the generator's images.

    Raises:
        ValueError: if the name is neither.
    """
    if Path(name).exists():
        shape = _shape_of(module)
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"`--data {name}` has images, and the generator makes samples of shape {tuple(shape)}.")
        return Images(name, size=shape[1], channels=shape[0])
    made = _made("data", name)
    if not isinstance(made, LightningDataModule):
        raise ValueError(f"`--data` must be a data module or a folder, got {describe(made)}.")
    return made


def extractor_of(name: str) -> nn.Module:
    """The extractor of a name.

    Raises:
        ValueError: if there is none.
    """
    made = nn.Identity() if name == "Identity" else _made("extractor", name)
    if not isinstance(made, nn.Module):
        raise ValueError(f"`--extractor` must be a torch.nn.Module, got {describe(made)}.")
    return made


def paired_of(arguments: argparse.Namespace) -> list[PairedMonitor]:
    """A monitor of the metrics beside targets, if there are any."""
    metrics = {}
    for name in arguments.paired:
        if name in PAIRED:
            metrics[name] = resolve(f"torchmetrics.image.{PAIRED[name]}")(data_range=(-1.0, 1.0))
        else:
            metrics[name.rpartition(".")[2]] = _made("paired", name)
    return [PairedMonitor(metrics)] if metrics else []


def _made(option: str, name: str) -> Any:
    """The object of a name; a class or a function is called without arguments."""
    if name in package.__all__:
        found = getattr(package, name)
    elif "." in name:
        found = resolve(name)
    else:
        raise ValueError(
            f"`--{option}` must be a name of the package, a dotted path such as my_project.Mine, or what exists, got "
            f"{name!r}."
        )
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except TypeError as error:
        raise ValueError(
            f"`--{option} {name}` cannot be made without arguments ({error}): name a function that makes it."
        ) from error


def _shape_of(module: GANModule) -> Sequence[int]:
    try:
        sample = module.sample(1)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException):  # it wants a condition: a label, mostly
        sample = module.sample(1, torch.zeros(1, dtype=torch.long, device=module.device))
    return sample.shape[1:] if isinstance(sample, Tensor) else ()


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"`--{option}` must be an integer or all, got {text!r}.") from None


def _notes(arguments: argparse.Namespace, plan: Plan, file: Path, monitor: QualityMonitor) -> list[str]:
    """What a reader of the table may not expect."""
    notes = []
    names = [callback.name for callback in plan.callbacks if isinstance(callback, QualityMonitor)]
    if len(names) > 1:
        left = ", ".join(name for name in names if name != monitor.name)
        notes.append(f"measured by QualityMonitor {monitor.name!r}; with --monitor also: {left}")
    own = find_config(file)
    other = arguments.config is None and arguments.data is None and own is not None and plan.config not in (None, own)
    if other and read_config(own).get("data") != read_config(plan.config).get("data"):  # type: ignore[arg-type]
        notes.append(f"trained on other data than it is compared with here: see {own}")
    return notes


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what Lightning says about a Trainer, of which there is one for each checkpoint."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
