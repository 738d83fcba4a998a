"""QualityMonitor: measures the quality of samples during training without changing the run."""

from __future__ import annotations

import hashlib
import math
import pickle
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_choice, check_integer, check_type, is_number
from lightning_gan_stability.callback import Cadence, GANCallback
from lightning_gan_stability.files import save_atomically
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.metrics.conditions import ClassReport
from lightning_gan_stability.metrics.decisions import (
    blur_of,
    covered_by,
    lost_modes,
    too_little_coverage,
    too_little_variation,
)
from lightning_gan_stability.metrics.fluctuation import checkpoint_fluctuation
from lightning_gan_stability.metrics.statistics import Cells, Seen, distance
from lightning_gan_stability.metrics.values import (
    bin_difference,
    density_coverage,
    frechet_distance,
    kernel_distance,
    pairwise_diversity,
    precision_recall,
)
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.conditions import as_labels, described
from lightning_gan_stability.monitors.reading import (
    Reading,
    extractor_for,
    features_of,
    generated,
    home,
    interleaved,
    is_conditional,
    samples_at_once,
)
from lightning_gan_stability.monitors.real_data import RealData, Split, loader_of_stage
from lightning_gan_stability.outcome import Outcome, courses_of
from lightning_gan_stability.outputs import Unpacked, take_rows

Name = Literal[
    "fid",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "diversity",
    "modes",
    "dependence",
    "class_consistency",
    "class_diversity",
    "fluctuation",
    "ndb",
]
OF_CONDITIONS = ("dependence", "class_consistency", "class_diversity")
TRACKED, LOOKS, WIDTH = 32, 5, 2048  # samples that are followed, over so many measurements, and their features at most
Values = dict[str, float]
CONFIRMED = 2500  # samples, real and generated, from which a suspicion is confirmed
SHOWN = ("fid", "precision", "recall")  # in the progress bar
LOWER_IS_BETTER: dict[str, bool | None] = {
    "fid": True,
    "kid": True,
    "precision": False,
    "recall": False,
    "density": False,
    "coverage": False,
    "modes": False,
    "high_quality": False,
    "reverse_kl": True,
    "missing": True,
    "diversity": None,
    "dependence": False,
    "class_consistency": False,
    "class_diversity": None,
    "fluctuation": True,
    "ndb": True,
}
LIMITS = {"missing": 0.1, "dependence": 0.25, "class_consistency": 0.25}  # beyond which nobody says that it worked
MAY_MISS = 0.03  # share of the real data that a healthy generator may miss
LEAST = 20  # real samples: halves of them are compared, and 5 neighbours in a half

# what each function of (real, fake) features gives
_VALUES: tuple[tuple[tuple[Name, ...], Callable[[Tensor, Tensor], Sequence[float]]], ...] = (
    (("fid",), lambda real, fake: [frechet_distance(real, fake)]),
    (("kid",), lambda real, fake: [kernel_distance(real, fake)]),
    (("precision", "recall"), precision_recall),
    (("density", "coverage"), density_coverage),
    (("diversity",), lambda real, fake: [pairwise_diversity(fake) / max(pairwise_diversity(real), 1e-12)]),
    (("ndb",), lambda real, fake: bin_difference(real, fake, bins=min(100, len(real) // 10))[:1]),
)


def values_of(real: Tensor, fake: Tensor, wanted: Collection[str]) -> Values:
    """The metrics in ``wanted`` that need only the two sets of features.

    Example:
        >>> values_of(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]), {"fid", "modes"})
        {'fid': 9.0}
    """
    values: Values = {}
    for names, function in _VALUES:
        if not {*wanted}.isdisjoint(names):
            values |= dict(zip(names, map(float, function(real, fake)), strict=True))
    return {name: value for name, value in values.items() if name in wanted}


class Measurement(NamedTuple):
    """A measurement of a generator, and the features that it was computed from.

    Attributes:
        values: values by the names of metrics.
        null: the metrics of one half of the real data against the other.
        protocol: everything besides the generator that a value depends on.
        real: features (n, d) of the real samples.
        fake: features (m, d) of the generated ones.
    """

    values: Values
    null: Values
    protocol: dict[str, Any]
    real: Tensor
    fake: Tensor


class QualityMonitor(GANCallback):
    """Measures sample quality at regular intervals: FID, KID, precision, recall, density, coverage, modes.

    The losses of a GAN do not tell how good its samples are; these metrics do ("Are GANs Created Equal?",
    https://arxiv.org/abs/1711.10337). Values go to the loggers and to ``trainer.callback_metrics`` as
    ``quality/<name>``. The patience of ``EarlyStopping("quality/recall", mode="max")`` counts measurements.
    ``ModelCheckpoint(monitor="quality/fid", every_n_train_steps=...)`` saves at multiples of ``every``, so that each
    file name has the value of its own weights; other intervals are refused. The first measurement is that of the
    untrained generator. For generators with conditions that real samples depend on, the default also includes:

    * ``quality/dependence``: how much samples depend on their conditions, relative to real samples: the ratio of the
      squared distance correlations (:func:`~lightning_gan_stability.metrics.condition_dependence`). It is near 0 if
      conditions are ignored or belong to other rows. For a condition of several tensors it is the smallest of theirs.
    * ``quality/class_consistency``, ``quality/class_diversity``, with integer labels: the share of samples that look
      like their class, and the mean distance of two samples of a class, each relative to real samples and for the class
      in which it is smallest (:func:`~lightning_gan_stability.metrics.class_report`).

    In addition to ``metrics``:

    * ``quality/missing``: the share of the real data in modes that get less than a fifth of that share of the generated
      samples. Without known modes, K-means cells of the features are used. Each sample counts for the nearest centre or
      likeliest class.
    * ``quality/imbalance``: total variation ½ Σ |q − p| between generated and real shares of the modes or cells.
    * ``quality/moved``: total variation between the generated shares of this measurement and of the previous one; near
      1 if a collapsed generator hops from mode to mode.
    * ``quality/fluctuation``, from the third measurement on: how much samples of the same latents fluctuate from one
      measurement to the next, over the last five, relative to their variance
      (:func:`~lightning_gan_stability.metrics.checkpoint_fluctuation`). 0: all change is steady.
    * ``quality/time_share``, for loggers only: the share of the run's time spent on measuring.

    Real features are extracted once. Fake samples have the same latents each time, networks are in eval mode, and the
    generator's average is used if there is one. A run is bitwise the same with and without the monitor. All ranks share
    the work and get the same values. The protocol (extractor, number of samples, split, and ``null``: the metrics of
    one half of the real data against the other) is added to the loggers' hyperparameters, because values of different
    protocols are not comparable. Modes are known if the data module has ``centers`` and ``std``
    (:class:`~lightning_gan_stability.data.Ring`), or if the extractor has a method ``classify(samples)`` that returns
    probabilities (:class:`~lightning_gan_stability.metrics.extractors.DigitClassifier`).

    Args:
        extractor: maps samples to features (n, ...), which are flattened. None: vectors are their own features, images
            (n, c, h, w) go through :class:`~lightning_gan_stability.metrics.extractors.Inception`.
        metrics: which of ``fid``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage``, ``diversity`` (mean
            pairwise distance, relative to real), ``modes`` (with ``high_quality`` and ``reverse_kl``), ``dependence``,
            ``class_consistency``, ``class_diversity``, ``fluctuation`` and ``ndb``. None: all but ``ndb``, with
            ``modes`` if they are known, and those of conditions if there are any.
        n_samples: number of generated samples; with conditions at most as many as there are real samples. Published
            FIDs use 50,000.
        n_real: maximum number of real samples, or ``"all"``, as for published FIDs. None: ``n_samples``.
        every: steps between measurements.
        split: compare with real samples of the ``"train"`` or the (first) ``"val"`` loader. FID is mostly computed
            against training data. They are read as in the run: its sampler determines which samples there are and how
            often, and with ``overfit_batches`` only the first batches are read. A data set whose samples depend on how
            often it was read is affected by that. ``trainer.validate`` measures against the same split, or against
            validation data if it has no training data; ``trainer.test`` against test data.
        truncation: ψ of the generated samples; see :meth:`GANModule.sample`.
        name: prefix of the log's keys. Several monitors in a run, for several extractors, splits or truncations, need
            different names.
        cache: folder for real features, keyed by a hash of data and extractor. None: extract them in each fit.

    Attributes:
        values: the last measurement, without ``quality/``.
        history: all measurements, with their ``step``; at the end of a fit also a table in Weights & Biases.
        null: the metrics of real data.
        classes: the last measurement of each class, for integer labels.

    Raises:
        ValueError: if an argument, the features or the data have a bad value.
        MisconfigurationException: with less than 20 samples in the split, with ``modes`` that are not known, or with
            metrics of conditions that real samples do not depend on.
        RuntimeError: if Inception's weights cannot be downloaded.

    Example:
        >>> QualityMonitor(every=500, metrics=["fid", "recall"]).n_samples
        2500
    """

    rolled_back = False

    values: Values
    history: list[Values]
    shares: list[float]
    measured_at: int
    tracked: list[Tensor]

    def __init__(
        self,
        extractor: nn.Module | None = None,
        metrics: Sequence[Name] | None = None,
        n_samples: int = 2500,
        every: int = 1000,
        split: Split = "train",
        cache: str | Path | None = None,
        n_real: int | Literal["all"] | None = None,
        truncation: float = 1.0,
        name: str = "quality",
    ) -> None:
        super().__init__()
        self.extractor = extractor if extractor is None else check_type("extractor", extractor, nn.Module)
        unknown = [] if metrics is None else [name for name in metrics if name not in get_args(Name)]
        check(not unknown and metrics != [], "metrics", f"some of {', '.join(get_args(Name))}", metrics)
        self.metrics = metrics
        self.n_samples = check_integer("n_samples", n_samples, least=50)
        self.every = check_integer("every", every)
        self.split: Split = check_choice("split", split, get_args(Split))
        self.cache = cache
        n_real = n_samples if n_real is None else n_real
        self.n_real = None if n_real == "all" else check_integer("n_real", n_real, least=LEAST)
        check(is_number(truncation), "truncation", "a finite number", truncation)
        self.truncation = truncation
        self.name = check_type("name", name, str)
        self.null: Values = {}
        self.add_state("values", {})
        self.add_state("history", [])
        self.add_state("shares", [])  # of generated samples in each cell
        self.add_state("measured_at", -1)  # global step of the last measurement
        self.add_state("tracked", [], on_device=False)  # features of the same latents, of the last measurements
        self._spent = 0.0
        self._wanted: frozenset[str] = frozenset()  # of this run, as soon as its data are known

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset what depends on the data of another run."""
        super().setup(trainer, pl_module, stage)
        self._wanted = frozenset()

    # ---------- what the Trainer calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the real data, and measure the untrained generator."""
        super().on_train_start(trainer, pl_module)
        module: GANModule = pl_module  # type: ignore[assignment]
        self._started, self._spent = time.monotonic(), 0.0
        self._prepare(trainer, module)
        if self.measured_at < 0:
            self._measure(trainer, module)
        self._show(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if this step is due."""
        self.observe(trainer, pl_module)  # type: ignore[arg-type]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure in ``trainer.validate`` and ``trainer.test``, independently of a fit's history."""
        if trainer.state.fn == "fit":
            return  # which measures every so many steps
        self.measure(trainer, pl_module)  # type: ignore[arg-type]
        pl_module.log_dict(self._named(), sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the table of all measurements to Weights & Biases."""
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        rows = [[row.get(name) for name in columns] for row in self.history]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(f"{self.name}/table", columns, rows, step=trainer.global_step)

    def observe(self, trainer: Trainer, module: GANModule) -> bool:
        """Measure if this step is due and not measured yet; return whether there is a measurement of this step."""
        if trainer.global_step % self.every:  # the clock of checkpoints, which a rollback does not put back
            return False
        if self.measured_at != trainer.global_step:
            self._measure(trainer, module)
        return True

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """A key for each value, updated every ``every`` steps."""
        wanted: Iterable[str] | None = self._wanted or self.metrics
        if wanted is None:
            known = hasattr(self.extractor, "classify") or _modes_of(trainer) is not None
            wanted = [name for name in get_args(Name) if name != "ndb" and (known or name != "modes")]  # if there are
        more = ["high_quality", "reverse_kl"] if "modes" in wanted else []
        return {f"{self.name}/{name}": self.every for name in (*wanted, *more, "missing", "imbalance", "moved")}

    def measure(self, trainer: Trainer, module: GANModule) -> Measurement:
        """Measure the current generator, independently of a fit's history.

        Args:
            trainer: a Trainer in ``validate`` or ``test``, or after them; its data are compared with.
            module: the GAN.
        """
        self._prepare(trainer, module)
        fake, _ = self._look(trainer, module)
        return Measurement(self.values, self.null, self.protocol, self._real.seen.features, fake.features)

    def outcome(self, trainer: Trainer) -> Outcome:
        """The history of each metric, and of the share of the data that is missed."""
        real = self.null | dict.fromkeys(OF_CONDITIONS, 1.0)
        return Outcome(courses_of(self.name, self.history, LOWER_IS_BETTER, real, LIMITS))

    # ---------- measuring

    def _measure(self, trainer: Trainer, module: GANModule) -> None:
        fake, shares = self._look(trainer, module)
        self._track(fake)
        self.values["moved"] = distance(shares, self.shares) if self.shares else 0.0
        self.shares, self.measured_at = shares, trainer.global_step
        self.history.append({"step": trainer.global_step} | self.values)
        self._show(trainer)
        time_share = self._spent / max(time.monotonic() - self._started, 1e-9)
        for logger in trainer.loggers:
            values = self.values | {"time_share": time_share}
            logger.log_metrics({f"{self.name}/{name}": x for name, x in values.items()}, step=trainer.global_step)

    def _look(self, trainer: Trainer, module: GANModule) -> tuple[Seen, list[float]]:
        """Take the values of the generator as it is; what was seen, and its shares of the modes or cells."""
        with self._isolated(), module.noise.of("quality"):
            # the same on all ranks, whose sums may differ by a rounding
            fake = self._generate(module, self._real, self.n_samples, "quality")
            self.values, shares = trainer.strategy.broadcast(self._evaluate(fake))
        return fake, shares

    def _track(self, fake: Seen) -> None:
        """Add fluctuations over the last measurements."""
        if "fluctuation" not in self._wanted:
            return
        features = fake.features[:TRACKED, :: math.ceil(fake.features.shape[1] / WIDTH)].float().cpu()
        if self.tracked and self.tracked[-1].shape != features.shape:
            self.tracked = []
        self.tracked = [*self.tracked, features][-LOOKS:]
        if len(self.tracked) >= 3 and bool(features.isfinite().all()):
            self.values["fluctuation"] = checkpoint_fluctuation(torch.stack(self.tracked)).fluctuation

    def _evaluate(self, fake: Seen) -> tuple[Values, list[float]]:
        if not bool(fake.features.isfinite().all() and fake.modes.isfinite().all()):
            gone = dict.fromkeys(self._wanted, math.nan) | {"missing": 1.0, "imbalance": 1.0}
            return gone, [0.0] * len(self._cells.shares)
        values = values_of(self._real.seen.features, fake.features, self._wanted)
        told = {} if self._real.told is None else self._real.told.measure(fake.features)
        values |= {name: value for name, value in told.items() if name in self._wanted}
        if "modes" in self._wanted:
            found = self._cells.cover(fake.modes)
            values |= {"modes": float(found.modes), "high_quality": found.high_quality, "reverse_kl": found.reverse_kl}
        cells, shares = self._cells.compare(fake)
        return values | cells, shares

    def _generate(self, module: GANModule, real: Reading, n: int, *key: object) -> Seen:
        asked = {} if self.truncation == 1 else {"truncation": self.truncation}  # a `sample` of yours may have none
        seen = _joined(map(self._see, generated(module, real, n, self._at_once, *key, **asked)))
        return Seen(*map(interleaved, seen))

    def _see(self, samples: Tensor) -> Seen:
        assert self.extractor is not None
        features = features_of(self.extractor, samples)
        if not self._known:
            return Seen(features, features.new_empty(len(features), 0))  # samples are large
        modes = samples.detach().float()
        if self._classified:
            with evaluation(self.extractor), torch.autocast(samples.device.type, enabled=False):
                modes = self.extractor.classify(modes)  # type: ignore[operator]
        return Seen(features, modes.flatten(1).to(features.device))

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Preserve random states, and measure the time spent."""
        start = time.monotonic()
        with isolate_rng():
            yield
        self._spent += time.monotonic() - start

    # ---------- the real data

    def _prepare(self, trainer: Trainer, module: GANModule) -> None:
        with self._isolated():
            self._read(trainer, module)

    def _read(self, trainer: Trainer, module: GANModule) -> None:
        modes = _modes_of(trainer)
        loader, self._seen_split = loader_of_stage(trainer, self.split)
        data = RealData(trainer, loader, self.n_real)
        first = next(iter(data), None)
        if first is None:
            raise MisconfigurationException(
                f"QualityMonitor(split='{self.split}') found no batch in the {self._seen_split} loader: give one, or "
                "another `split`."
            )
        if self.extractor is None:
            self.extractor = extractor_for(first.real, "QualityMonitor")
        self._classified = hasattr(self.extractor, "classify")
        known = self._classified or modes is not None
        if self.metrics is not None and "modes" in self.metrics and not known:
            raise MisconfigurationException(
                "QualityMonitor(metrics=['modes', ...]) must know the modes: use a data module with `centers` and "
                "`std`, or an extractor with `classify(samples)`, or remove 'modes'."
            )
        self._known = known
        self._at_once = samples_at_once(first.real)
        self._conditional = is_conditional(module)
        self._real = self._features(data, first, self.cache)
        self._confirming: Reading | None = None
        if (n := len(self._real.seen.features)) < LEAST:
            limited = self._seen_split == "train" and trainer.limit_train_batches != 1.0
            within = " within the limits of the Trainer" if limited else ""
            raise MisconfigurationException(
                f"QualityMonitor(split='{self.split}') compares with real samples, and the loader has {n}{within}: "
                f"give at least {LEAST}, better thousands, or remove QualityMonitor."
            )
        if not bool(self._real.seen.features.isfinite().all()):
            raise ValueError("QualityMonitor: the real samples have features that are not finite.")
        centers, std = modes or (None, None)
        self._cells = Cells(self._real.seen, centers, std, self._classified)
        self._wanted = self._chosen()
        halves = self._real.seen.features[::2], self._real.seen.features[1::2]
        self.null = trainer.strategy.broadcast(values_of(*halves, self._wanted))
        for logger in trainer.loggers:
            logger.log_hyperparams({self.name: self.protocol})

    def _chosen(self) -> frozenset[str]:
        """The metrics that are measured.

        Raises:
            MisconfigurationException: if one of them cannot be measured.
        """
        there = self.of_conditions
        if self.metrics is not None:
            lacking = [name for name in self.metrics if name in OF_CONDITIONS and name not in there]
            if lacking:
                raise MisconfigurationException(
                    f"QualityMonitor(metrics=[{lacking[0]!r}, ...]) must have conditions that real samples depend on"
                    f"{'' if lacking[0] == 'dependence' else ', which are integer labels'}, and these samples have "
                    f"none: remove {lacking[0]!r}, or look at what `unpack` returns."
                )
            return frozenset(self.metrics)
        left_out = {"ndb", *({"modes"} if not self._known else ()), *{*OF_CONDITIONS} - {*there}}
        return frozenset(get_args(Name)) - left_out

    @property
    def state_key(self) -> str:
        """Its key in checkpoints."""
        return type(self).__qualname__ if self.name == "quality" else f"{type(self).__qualname__}({self.name})"

    @property
    def classes(self) -> dict[int, ClassReport]:
        """The last measurement of each class, for samples with integer labels."""
        return {} if self._real.told is None else self._real.told.classes

    @property
    def of_conditions(self) -> tuple[str, ...]:
        """The metrics of conditions that apply to this run's data."""
        return () if self._real.told is None else self._real.told.names

    @property
    def n_seen(self) -> int:
        """The number of real samples that were read, at most ``n_real``."""
        return len(self._real.seen.features)

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything besides the generator that a value of this monitor depends on."""
        return {
            "extractor": type(self.extractor).__name__,
            "n_real": len(self._real.seen.features),
            "n_fake": self._real.conditions_of(self.n_samples),
            "split": self._seen_split,
            "every": self.every,
            "truncation": self.truncation,
            "null": self.null,
        }

    def _features(self, data: RealData, first: Unpacked, cache: str | Path | None) -> Reading:
        """Real features of all ranks, from the cache or seen now, and the conditions of this rank."""
        reading = Reading(data, first.condition, describe=self._describe if self._conditional else None)
        if cache:
            self._see(take_rows(first.real, 0, 1))  # lets a lazy extractor read its weights
            mine = self._cached(Path(cache), reading)
        else:
            mine = _joined(map(self._see, reading.read()))
        reading.see(Seen(*map(interleaved, mine)))
        return reading

    def _describe(self, part: Unpacked) -> Tensor:
        """Conditions as labels or as rows of numbers; they have the samples' type, like their features."""
        labels = as_labels(part.condition)
        if labels is not None:
            return labels
        condition = part.condition
        alike = isinstance(part.real, Tensor) and isinstance(condition, Tensor) and condition.shape == part.real.shape
        return self._see(condition).features if alike else described(condition)

    def _cached(self, folder: Path, reading: Reading) -> Seen:
        file = folder / f"{_digest(self.extractor, self._known, reading.read())}.pt"
        try:
            mine = Seen(*torch.load(file, weights_only=True))
        except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError):  # none, or one that was torn
            mine = _joined(map(self._see, reading.read()))
            save_atomically(tuple(column.cpu() for column in mine), file)
        return Seen(*(column.to(home(reading.data.trainer.strategy.root_device)) for column in mine))

    # ---------- looking again

    def confirm(self, trainer: Trainer, module: GANModule, least_coverage: float) -> Values:
        """Measure again with new samples, as many as needed, and return p-values under a healthy generator.

        Args:
            trainer: the run's Trainer.
            module: the GAN.
            least_coverage: smallest coverage of a healthy generator.

        Returns:
            p-values for ``"missing"``, ``"diversity"`` and ``"coverage"``; see
            :mod:`lightning_gan_stability.metrics.decisions`. Also ``"mass"``, the share of the data that is certainly
            missed. For conditions that real samples depend on also ``"dependence"``, and for labels
            ``"class_consistency"`` and ``"class_diversity"``.
        """
        with self._isolated():
            if self._confirming is None:
                enough = self.n_real is None or len(self._real.seen.features) >= CONFIRMED
                data = RealData(trainer, self._real.data.loader, CONFIRMED)
                self._confirming = self._real if enough else self._features(data, next(iter(data)), None).finite()
                self._finer = self._cells if enough or self._known else Cells(self._confirming.seen, None, None, False)
            real = self._confirming
        with self._isolated(), module.noise.of("confirmation"):
            fake = self._generate(module, real, max(self.n_samples, CONFIRMED), "confirmation", trainer.global_step)
            return trainer.strategy.broadcast(self._p_values(real, fake, least_coverage))

    def _p_values(self, reading: Reading, fake: Seen, least_coverage: float) -> Values:
        if not bool(fake.features.isfinite().all()):
            return {"mass": 1.0, "missing": 0.0, "diversity": 0.0, "coverage": 0.0}
        real, told = reading.seen, reading.told
        near = max(5, math.ceil(MAY_MISS * len(real.features)))  # no region is lost that has less than it may miss
        covered = covered_by(fake.features, real.features, near, blur_of(fake.features, real.features))
        (cells, k), (theirs, _) = self._finer.assign(real), self._finer.assign(fake)
        lost = lost_modes(cells, theirs, covered, k)
        as_many = covered_by(fake.features[: len(real.features)], real.features)
        return {
            "mass": lost.mass,
            "missing": lost.p,
            "diversity": too_little_variation(fake.features, pairwise_diversity(real.features)),
            "coverage": too_little_coverage(as_many, least_coverage),
        } | ({} if told is None else told.p_values(fake.features))

    def _show(self, trainer: Trainer) -> None:
        """Give the last measurement to callbacks, and its most important values to the progress bar."""
        trainer.callback_metrics.update(self._named())
        shown = [name for name in SHOWN if name in self.values] or [*self.values][:1]
        trainer.progress_bar_metrics.update({f"{self.name}/{name}": self.values[name] for name in shown})

    def _named(self) -> dict[str, Tensor]:
        return {f"{self.name}/{name}": torch.tensor(value) for name, value in self.values.items()}


def _modes_of(trainer: Trainer) -> tuple[Tensor, Any] | None:
    """The centres of the modes and their standard deviation, of a data module that knows them."""
    data = getattr(trainer, "datamodule", None)
    centers, std = getattr(data, "centers", None), getattr(data, "std", None)
    return (centers, std) if isinstance(centers, Tensor) and std is not None else None


def _joined(parts: Iterable[Seen]) -> Seen:
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


def _digest(extractor: nn.Module | None, known: bool, samples: Iterable[Tensor]) -> str:
    """A hash of an extractor and of data; any other data, weights or layers give another one."""
    digest = hashlib.sha256(repr((extractor, known)).encode())
    for tensor in (*(extractor.state_dict().values() if extractor else ()), *samples):
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
