"""Evaluates trained generators by the protocol of their runs, with confidence intervals, and compares them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_gan_stability._checks import check, check_choice, check_integer, check_share, check_type
from lightning_gan_stability.metrics.features import mmd_bias
from lightning_gan_stability.metrics.uncertainty import (
    FEWEST,
    WITH_INTERVALS,
    Interval,
    halved,
    interval,
    interval_of_difference,
)
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.memorization import MemorizationMonitor
from lightning_gan_stability.monitors.quality import LOWER_IS_BETTER, Measurement, QualityMonitor, values_of
from lightning_gan_stability.monitors.real_data import loader_to_read

N_TRAIN = 10_000  # training samples among which copies are looked for, unless it is said
Watch = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a generator.

    Attributes:
        name: name of the generator.
        values: values by the names of metrics; ``memorization/...`` for the test for copies.
        intervals: confidence intervals of the metrics that depend on samples only: ``fid``, ``kid``, ``precision``,
            ``recall``, ``density``, ``coverage`` and ``diversity``.
        null: the metrics of one half of the real data against the other.
        protocol: what values and intervals depend on besides the generator.
        notes: what was not measured, and why.
        lower_is_better: for metrics besides those of QualityMonitor.
    """

    name: str
    values: dict[str, float]
    intervals: dict[str, Interval]
    null: dict[str, float]
    protocol: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    lower_is_better: dict[str, bool | None] = field(default_factory=dict)
    halves: dict[str, Tensor] = field(default_factory=dict, repr=False)


class Difference(NamedTuple):
    """The difference of a metric between two generators.

    Attributes:
        metric: name of the metric.
        first: name of a generator.
        second: name of another one.
        value: value of the first minus that of the second.
        low: lower end of the interval; the intervals of all pairs hold together at the level, for this metric.
        high: upper end of the interval.
        better: name of the better one, if the difference is larger than noise; an empty string if it is larger, but
            neither high nor low values are better; None if it is not larger than noise.
    """

    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    better: str | None

    def __str__(self) -> str:
        if self.better is None:
            return f"{self.metric}: no difference between {self.first} and {self.second} larger than noise"
        swapped = self.better == self.second
        low, high = sorted(map(abs, (self.low, self.high)))
        amount = f"by {abs(self.value):.4g} ({low:.4g} to {high:.4g})"
        if not self.better:
            return f"{self.metric}: {self.first} differs from {self.second} {amount}"
        names = (self.second, self.first) if swapped else (self.first, self.second)
        return f"{self.metric}: {names[0]} is better than {names[1]} {amount}"


def evaluate(
    module: GANModule,
    data: LightningDataModule,
    monitor: QualityMonitor | None = None,
    others: Sequence[Callback] = (),
    memorization: MemorizationMonitor | None = None,
    stage: Literal["validate", "test"] = "validate",
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    precision: Any = "32-true",
    name: str = "generator",
    watch: Watch = iter,
) -> Evaluation:
    """Measure a generator as the monitors of its run do, with confidence intervals.

    The values are those of :class:`~lightning_gan_stability.QualityMonitor` in a run, in ``trainer.validate`` and in
    ``trainer.test``, from the same latents: equal weights and an equal protocol give equal values. Random states are
    preserved. The intervals come from ``resamples`` random splits of real and generated samples into halves
    (:func:`~lightning_gan_stability.metrics.uncertainty.interval`). They are intervals for the mean of a metric over
    other sets of as many samples of this generator; other runs of the same training differ by more.

    Args:
        module: the GAN, on the device to use.
        data: the run's data.
        monitor: the monitor with the protocol. None: ``QualityMonitor()``.
        others: callbacks that log values in validation, such as :class:`~lightning_gan_stability.PairedMonitor`.
        memorization: the monitor that tests for copies of training samples. None: test among 10,000 training samples,
            if the data module has held-out samples.
        stage: ``"test"`` compares with test data.
        resamples: number of random splits; 0: no intervals.
        level: confidence level.
        seed: seed of the splits.
        precision: precision of the Trainer.
        name: name of the generator, in tables.
        watch: wraps the loop over splits, for instance in a progress bar.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: from the monitors, if the data are missing or too few.

    Example:
        >>> from lightning_gan_stability import MLP, GANModule, QualityMonitor, Ring
        >>> gan = GANModule(MLP([8, 16, 2]), MLP([2, 16, 1]), latent_dim=8)
        >>> monitor = QualityMonitor(metrics=["fid", "recall"], n_samples=200)
        >>> found = evaluate(gan, Ring(batch_size=100, val_samples=200), monitor, resamples=20)
        >>> low, high = found.intervals["fid"]
        >>> low < found.values["fid"] < high
        True
    """
    check_choice("stage", stage, ("validate", "test"))
    check_integer("resamples", resamples, least=0)
    check(resamples != 1, "resamples", "0, or at least 2", resamples)
    check_share("level", level, open_start=True, open_end=True)
    check_integer("seed", seed, least=0)
    monitor = QualityMonitor() if monitor is None else check_type("monitor", monitor, QualityMonitor)
    device = module.device
    with warnings.catch_warnings(), isolate_rng():
        warnings.filterwarnings("ignore", ".*(Total length of|does not have many workers|dataloader` contains)")
        trainer = _quiet_trainer(device, precision, others)
        run = trainer.validate if stage == "validate" else trainer.test
        run(module, datamodule=data, verbose=False)
        module.to(device).eval()  # which the Trainer has moved away
        measured = monitor.measure(trainer, module)
        notes: list[str] = []
        logged = {key: value.item() for key, value in trainer.callback_metrics.items()} if others else {}
        logged = _of(others, logged, monitor.name)
        copies = _memorization(trainer, module, monitor, memorization, notes)
    module.eval()
    halves = _halves(measured, resamples, seed, notes, watch)
    protocol = {key: value for key, value in measured.protocol.items() if key not in ("null", "every")}
    return Evaluation(
        name=name,
        values=measured.values | logged | copies,
        intervals=_intervals(measured, halves, level),
        null=measured.null,
        protocol=protocol | {"resamples": resamples, "level": level, "seed": seed},
        notes=notes,
        lower_is_better=_directions(others),
        halves=halves,
    )


def compare(evaluations: Sequence[Evaluation], level: float = 0.95) -> list[Difference]:
    """Find the differences between generators that are larger than noise, for each pair and metric.

    The generators were compared with the same real samples, split into the same halves, and usually have the same
    latents, so that what they share cancels in the difference. For each metric, all intervals hold together with
    probability ``level``, by Bonferroni's inequality.

    Args:
        evaluations: results of :func:`evaluate`, with the same protocol and seed.
        level: confidence level.

    Raises:
        ValueError: if names are equal, or protocols differ.

    Example:
        >>> from lightning_gan_stability import MLP, GANModule, QualityMonitor, Ring
        >>> good, bad = (GANModule(MLP([8, 16, 2]), MLP([2, 16, 1]), latent_dim=8) for _ in range(2))
        >>> _ = [*bad.generator.parameters()][-1].data.add_(9)
        >>> monitor = QualityMonitor(metrics=["fid"], n_samples=200)
        >>> data = Ring(batch_size=100, val_samples=200)
        >>> names = {"good": good, "bad": bad}
        >>> found = [evaluate(gan, data, monitor, name=name) for name, gan in names.items()]
        >>> compare(found)[0].better
        'good'
    """
    names = [evaluation.name for evaluation in evaluations]
    check(len({*names}) == len(names), "evaluations", "of different names", names)
    for other in evaluations[1:]:
        unlike = [key for key, value in evaluations[0].protocol.items() if other.protocol.get(key) != value]
        if unlike:
            raise ValueError(f"Values of different protocols do not compare: these differ in {', '.join(unlike)}.")
    pairs = [*combinations(evaluations, 2)]
    together = 1 - (1 - level) / max(len(pairs), 1)
    return [
        _difference(metric, a, b, together)
        for metric in (evaluations[0].halves if evaluations else ())
        for a, b in pairs
        if metric in a.halves and metric in b.halves
    ]


def _difference(metric: str, a: Evaluation, b: Evaluation, level: float) -> Difference:
    value = a.values[metric] - b.values[metric]
    low, high = interval_of_difference(metric, value, a.halves[metric] - b.halves[metric], level)
    if low <= 0 <= high:
        return Difference(metric, a.name, b.name, value, low, high, None)
    lower = LOWER_IS_BETTER[metric]
    better = "" if lower is None else a.name if (value < 0) == lower else b.name
    return Difference(metric, a.name, b.name, value, low, high, better)


def _quiet_trainer(device: torch.device, precision: Any, callbacks: Sequence[Callback]) -> Trainer:
    """A Trainer without a trace, whose loops run only for callbacks."""
    index = 0 if device.index is None else device.index
    return Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=1 if device.type == "cpu" else [index],
        precision=precision,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=None if callbacks else 1,
        limit_test_batches=None if callbacks else 1,
    )


def _of(others: Sequence[Callback], logged: dict[str, float], name: str) -> dict[str, float]:
    """The values that the callbacks log, under the names that the evaluation has for them."""
    prefixes = tuple({f"{getattr(callback, 'name', name)}/" for callback in others})
    found = {key: value for key, value in logged.items() if key.startswith(prefixes)} if prefixes else {}
    return {key.removeprefix(f"{name}/"): value for key, value in found.items()}


def _directions(others: Sequence[Callback]) -> dict[str, bool | None]:
    better = {
        name: metric.higher_is_better
        for callback in others
        for name, metric in getattr(callback, "metrics", {}).items()
    }
    return {name: None if higher is None else not higher for name, higher in better.items()}


def _memorization(
    trainer: Trainer,
    module: GANModule,
    monitor: QualityMonitor,
    memorization: MemorizationMonitor | None,
    notes: list[str],
) -> dict[str, float]:
    """The values of the test for copies; a note, where nobody has asked for it and the data do not serve."""
    asked = memorization is not None
    if memorization is None:
        if not _has_held_out(trainer):
            notes.append("memorization: not tested, since the data module holds out no samples")
            return {}
        memorization = MemorizationMonitor(monitor.extractor, n_train=N_TRAIN, pairs=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            values = memorization.measure(trainer, module)
        except (MisconfigurationException, ValueError) as error:
            if asked:
                raise
            notes.append(f"memorization: not tested. {error}")
            return {}
    notes += [f"memorization: {warning.message}" for warning in said]
    return {f"{memorization.name}/{key}": value for key, value in values.items()}


def _has_held_out(trainer: Trainer) -> bool:
    loader = loader_to_read(trainer, "val")
    return not isinstance(loader, list) or bool(loader)


def _intervals(measured: Measurement, halves: dict[str, Tensor], level: float) -> dict[str, Interval]:
    real, fake = measured.real, measured.fake
    bias = mmd_bias(real.double(), fake.double()) if "kid" in halves else None
    n = min(len(real), len(fake))
    return {name: interval(name, measured.values[name], pair, n, level, bias) for name, pair in halves.items()}


def _halves(measured: Measurement, resamples: int, seed: int, notes: list[str], watch: Watch) -> dict[str, Tensor]:
    wanted = {name for name in WITH_INTERVALS if math.isfinite(measured.values.get(name, math.nan))}
    if not resamples or not wanted:
        return {}
    if (n := min(len(measured.real), len(measured.fake))) < FEWEST:
        notes.append(f"intervals: none, since {n} samples are too few to be halved")
        return {}
    found = halved(
        lambda real, fake: values_of(real, fake, wanted), measured.real, measured.fake, resamples, seed, watch
    )
    return {name: found[name] for name in measured.values if name in found}
