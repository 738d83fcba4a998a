"""MemorizationMonitor: detects during training that a generator copies its training data, and draws the pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_integer, check_share, check_type, describe
from lightning_gan_stability.advice import MEMORIZATION
from lightning_gan_stability.callback import Cadence, GANCallback
from lightning_gan_stability.distributed import gather_objects
from lightning_gan_stability.metrics.decisions import level
from lightning_gan_stability.metrics.features import Pairs, checked
from lightning_gan_stability.metrics.memorization import copying_test, least_copies, memorization_test
from lightning_gan_stability.metrics.statistics import Seen
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.drawn import Drawn, key_of, log_everywhere, named, plain
from lightning_gan_stability.monitors.pictures import kind_of, picture
from lightning_gan_stability.monitors.reading import (
    Reading,
    extractor_for,
    features_of,
    generated,
    interleaved,
    samples_at_once,
)
from lightning_gan_stability.monitors.real_data import RealData, loader_to_read, repeated_share
from lightning_gan_stability.outcome import Outcome, Trouble, in_words
from lightning_gan_stability.outputs import Sample, batch_size, shapes, tree_leaves, tree_map

Values: TypeAlias = dict[str, float]
Event: TypeAlias = dict[str, Any]
Row: TypeAlias = tuple[int, int]  # a rank, and the number of a sample among those that it reads or makes

VALUES = ("nearer", "copied", "p")
KEY = "memorization"  # of latents and noise
SPACED = 1000  # training samples from which the distance between training samples is taken
SAME = 1e-3  # part of that distance below which a sample is a training sample
SHARED = 0.05  # share of held-out samples that may be training samples
HELD_OUT = 10  # times as many held-out as generated samples, at most
ENOUGH = 0.5  # share of copies that is to be found, at least


class Look(NamedTuple):
    """One measurement: its values, and the nearest pairs, the nearest first.

    Attributes:
        values: ``nearer``, ``copied`` and ``p``.
        samples: the generated samples of the pairs.
        neighbours: the training samples of the pairs, by their rows among the features of all ranks.
    """

    values: Values
    samples: list[Row]
    neighbours: list[int]


class MemorizationMonitor(GANCallback):
    """Tests whether the generator copies its training data, and draws the most similar pairs.

    A generator that repeats training samples has an excellent FID. Every ``every`` steps, and at the end of a fit, this
    monitor tests whether generated samples are closer to training samples than to held-out ones
    (:func:`~lightning_gan_stability.metrics.copying_test`). Values go to the loggers and to
    ``trainer.callback_metrics``:

    * ``memorization/copied``: the estimated share of generated samples that are copies, in [0, 1]; 0 if p is above
      5 %.
    * ``memorization/p``: the p-value: for a generator that copies nothing, training samples are draws like any other,
      and p is how often they are closer to its samples than held-out ones by as much.
    * ``memorization/nearer``: the share of pairs of a generated and a held-out sample in which the generated one is
      closer to the training data (:func:`~lightning_gan_stability.metrics.memorization_test`). It is also above ½ for a
      generator of typical samples only, so it is not used for decisions.

    The i-th measurement gives a verdict if p is at most 6 / (π i)² times ``false_alarms``. All measurements together
    therefore accuse a generator that does not copy in at most a share of ``false_alarms`` of the runs. A verdict is an
    entry in ``events`` (``step``, ``verdict``, ``evidence``), a warning with advice, and ``health/memorization`` for
    the loggers. It is not repeated until p has been above ``false_alarms`` again.

    With an event, and at the end of a fit, the ``pairs`` closest pairs are drawn as by
    :class:`~lightning_gan_stability.SampleLogger`: generated samples beside their training samples, under the key
    ``memorization``, or as ``memorization/<step>.png``. For this the training data are read again up to the rows to be
    drawn. They may have changed by then, because a data set draws from its own generator, a custom sampler has another
    order or a stream has moved on. In this case the closest samples of those read now are drawn.

    The monitor keeps the features of all training samples, but not the samples. Random augmentations in the data set
    are seen as they are when read. Conditional generators get the conditions of held-out samples, because a good
    translation is close to its training sample. Conditions are reused with other latents; without latents, there are at
    most as many generated samples as conditions. Latents are the same each time, and networks are in eval mode, with
    the average if there is one. All ranks share the work and reach the same decision. A run is bitwise the same with
    and without the monitor.

    Args:
        extractor: maps samples to features (n, ...), which are flattened. None: vectors are their own features, images
            (n, c, h, w) go through :class:`~lightning_gan_stability.metrics.extractors.Inception`.
        every: steps between measurements.
        n_samples: number of generated samples; at most ten times as many held-out samples are read. The power of the
            test depends on how many training samples have a copy among these, and on the number of held-out samples.
        n_train: number of training samples to read, or ``"all"``; copies of other samples are not found. Pass a number
            for loaders without an end.
        pairs: number of pairs in a picture; 0: no pictures.
        false_alarms: largest share of healthy runs that get a verdict, in (0, 1).
        held_out: batches of samples that the generator is not trained on, as the loaders give them. None: those of the
            (first) validation loader.
        name: prefix of the log's keys, and the folder of files. Several monitors in a run, for several extractors, need
            different names.

    Attributes:
        values: the last measurement, without ``memorization/``.
        events: list of all events.
        drawn: the pairs of the last picture, generated and training samples (1, ...), the closest first.

    Raises:
        ValueError: if an argument or the features have a bad value.
        MisconfigurationException: before the first batch, if there are no held-out samples, too few to detect a
            generator that only copies, or if they are training samples; if a sampler repeats training samples and
            ``held_out`` is not given; or if samples cannot be drawn.
        RuntimeError: if Inception's weights cannot be downloaded.

    Example:
        >>> MemorizationMonitor(every=500, n_samples=2000).events
        []
    """

    rolled_back = False

    values: Values
    events: list[Event]
    looks: int
    said: bool
    measured_at: int

    def __init__(
        self,
        extractor: nn.Module | None = None,
        every: int = 1000,
        n_samples: int = 1000,
        n_train: int | Literal["all"] = "all",
        pairs: int = 8,
        false_alarms: float = 0.01,
        held_out: Iterable[Any] | None = None,
        name: str = "memorization",
    ) -> None:
        super().__init__()
        self.extractor = extractor if extractor is None else check_type("extractor", extractor, nn.Module)
        self.every = check_integer("every", every)
        self.n_samples = check_integer("n_samples", n_samples, least=50)
        self.n_train = None if n_train == "all" else check_integer("n_train", n_train, least=2)
        self.pairs = check_integer("pairs", pairs, least=0)
        self.false_alarms = check_share("false_alarms", false_alarms, open_start=True, open_end=True)
        batches = held_out is None or isinstance(held_out, Iterable)
        self.held_out = check(batches, "held_out", "an iterable of batches, such as a loader", held_out)
        self.name = check(isinstance(name, str) and bool(name), "name", "a key of the log", name)
        self.add_state("values", {})
        self.add_state("events", [])
        self.add_state("looks", 0)  # that could have spoken
        self.add_state("said", False)  # and it is not over yet
        self.add_state("measured_at", -1)  # global step of the last measurement
        self.drawn: list[tuple[Sample, Sample]] = []
        self._look: Look | None = None  # of this fit
        self._drawn_at = -1
        self._drawn_to: list[str] = []  # folders and loggers

    @property
    def state_key(self) -> str:
        """Its key in checkpoints."""
        return type(self).__qualname__ if self.name == "memorization" else f"{type(self).__qualname__}({self.name})"

    # ---------- what the Trainer calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read training and held-out data."""
        super().on_train_start(trainer, pl_module)
        self._look, self._drawn_at, self._drawn_to = None, -1, []
        with isolate_rng():
            self._prepare(trainer, pl_module)  # type: ignore[arg-type]
        trainer.callback_metrics.update(self._named())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if this step is due."""
        step = trainer.global_step  # the clock of checkpoints, which a rollback does not put back
        if step % self.every == 0 and self.measured_at != step:
            self._measure(trainer, pl_module)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final generator, and draw the pairs."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if trainer.global_step and (self._look is None or self.measured_at != trainer.global_step):
            self._measure(trainer, module)
        if self._look is not None and self._drawn_at != trainer.global_step:
            self._draw(trainer, module, self._look)

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """A key for each value, updated every ``every`` steps."""
        return {f"{self.name}/{name}": self.every for name in VALUES}

    # ---------- real data

    def _prepare(self, trainer: Trainer, module: GANModule) -> None:
        loader = loader_to_read(trainer, "val") if self.held_out is None else self.held_out
        held = RealData(trainer, loader, HELD_OUT * self.n_samples)
        first = next(iter(held), None)
        if any(gather_objects(first is None)):
            raise MisconfigurationException(
                "MemorizationMonitor compares with held-out samples, and the run has none: give it a validation loader "
                "(data modules of the package have one with `holdout` > 0) or `held_out`, or remove "
                "MemorizationMonitor."
            )
        assert first is not None
        if self.extractor is None:
            self.extractor = extractor_for(first.real, "MemorizationMonitor")
        self._refuse_what_has_no_picture(first.real)
        self._at_once = samples_at_once(first.real)
        self._reading = Reading(held, first.condition, repeated=module.latent_dim is not None)
        self._held, _ = self._features(trainer, self._reading.read())
        self._reading.see(Seen(self._held, self._held[:, :0]))
        loader = loader_to_read(trainer, "train")
        self._refuse_other_frequencies(loader)
        self._data = RealData(trainer, loader, self.n_train)
        self._train, self._rows = self._features(trainer, (part.real for part in self._data))
        checked(train=self._train, held_out=self._held, least=1)
        self._refuse_training_samples()
        self._refuse_too_few()

    def _features(self, trainer: Trainer, samples: Iterable[Sample]) -> tuple[Tensor, Tensor]:
        """The features (n, d) of all ranks, and (n, 2) where their samples are: the rank, and the row there."""
        parts = [self._see(part) for part in samples]
        if any(gather_objects(not parts)):
            raise MisconfigurationException(
                "MemorizationMonitor compares with training samples, and the training loader has none: give it some, "
                "or remove MemorizationMonitor."
            )
        features = torch.cat(parts)
        rows = torch.arange(len(features), device=features.device)
        return interleaved(features), interleaved(torch.stack([torch.full_like(rows, trainer.global_rank), rows], 1))

    def _see(self, samples: Sample) -> Tensor:
        assert self.extractor is not None
        return features_of(self.extractor, samples)

    def _refuse_what_has_no_picture(self, samples: Sample) -> None:
        for _, leaf in named(samples) if self.pairs else ():
            if kind_of(leaf) is None:
                raise MisconfigurationException(
                    f"MemorizationMonitor has no picture of samples like {describe(leaf)}: give it pairs=0 to draw "
                    "none, or remove MemorizationMonitor."
                )

    def _refuse_other_frequencies(self, loader: Any) -> None:
        """Rows that come several times are nearest several times; and some come at other frequencies than held out."""
        if self.held_out is not None:
            return
        repeated = max(gather_objects(repeated_share(loader, self.n_train)))
        if repeated > SHARED:
            raise MisconfigurationException(
                f"MemorizationMonitor compares training samples, each of which counts once, with held-out samples as "
                f"they are, but {repeated:.0%} of the rows that the training loader's sampler gives in an epoch have "
                "come before in it, so that it would accuse generators that copy nothing: use a sampler that gives "
                "each row once, give it `held_out`, drawn in the same way, or remove MemorizationMonitor."
            )

    def _refuse_training_samples(self) -> None:
        """Held-out samples that are training samples are as near to their copies."""
        held, some = self._held, self._train[:SPACED]
        own = torch.arange(len(some), device=some.device)
        gaps = Pairs(some, self._train).nearest(1, own)[0]
        self._spacing = gaps.median().item()
        n = len(held)
        copies = int((Pairs(held, self._train).nearest()[0] <= SAME * self._spacing).sum())
        found = f"{copies} of {n} held-out samples are training samples too"
        if copies > SHARED * n:
            repeated = float((gaps <= SAME * self._spacing).double().mean())
            if repeated > SHARED:
                raise MisconfigurationException(
                    f"MemorizationMonitor: {repeated:.0%} of the training samples are there more than once, or as good "
                    "as, since these data take few values, and so a copy is not told from a sample that is equal by "
                    "chance: give it an `extractor` that tells samples apart, or remove MemorizationMonitor."
                )
            raise MisconfigurationException(
                f"MemorizationMonitor: {found}, so that copies would be of both: give a validation "
                "loader, or `held_out`, with samples that are not in the training loader (data modules of the package: "
                "`holdout` > 0), or remove MemorizationMonitor."
            )
        if copies:
            rank_zero_warn(f"MemorizationMonitor: {found}, which hides copies of these.")

    def _refuse_too_few(self) -> None:
        """Too few for the first look to find copies alone; or a half of them."""
        n = len(self._held)
        share = self._least_share(n)
        if share <= ENOUGH:
            return
        needed = next((more for more in range(n + 1, len(self._train) + n) if self._least_share(more) <= ENOUGH), None)
        give = f"give it {needed} or more, or raise `n_samples`" if needed else "raise `n_samples` or `false_alarms`"
        found = f"MemorizationMonitor has {n} held-out samples, with which"
        if share > 1:
            raise MisconfigurationException(
                f"{found} nothing can be said at false_alarms={self.false_alarms}: {give} to find a share of "
                f"{ENOUGH:.0%}, or remove MemorizationMonitor."
            )
        rank_zero_warn(
            f"{found} copies are found from a share of {share:.0%} on at false_alarms={self.false_alarms}: {give} to "
            f"find a share of {ENOUGH:.0%}."
        )

    def _least_share(self, n: int) -> float:
        """The share of copies, each of another training sample, that the first look finds with n held-out samples."""
        limited = self._reading.conditions is not None and not self._reading.repeated
        m = min(self.n_samples, n) if limited else self.n_samples
        return least_copies(len(self._train), n, level(self.false_alarms, 1)) / m if n > 1 else math.inf

    # ---------- measuring

    def measure(self, trainer: Trainer, module: GANModule) -> Values:
        """Test the current generator, independently of a fit's history; see the class for the values.

        Args:
            trainer: a Trainer after ``validate`` or ``test``, whose training and held-out data are read.
            module: the GAN.
        """
        with isolate_rng():
            self._prepare(trainer, module)
        self.values = self._take(trainer, module).values
        return self.values

    def _take(self, trainer: Trainer, module: GANModule) -> Look:
        with isolate_rng(), module.noise.of(KEY, iteration=0):
            # the same on all ranks, whose sums may differ by a rounding
            found: Look = trainer.strategy.broadcast(self._evaluate(*self._features(trainer, self._generate(module))))
        return found

    def _measure(self, trainer: Trainer, module: GANModule) -> None:
        self._look = self._take(trainer, module)
        self.values, self.measured_at = self._look.values, trainer.global_step
        trainer.callback_metrics.update(self._named())
        for logger in trainer.loggers:
            numbers = {f"{self.name}/{name}": value for name, value in self.values.items()}
            logger.log_metrics(numbers, step=trainer.global_step)
        if self.is_news(self.values["p"]):
            self._say(trainer)
            self._draw(trainer, module, self._look)

    def _generate(self, module: GANModule) -> Iterator[Sample]:
        return generated(module, self._reading, self.n_samples, self._at_once, KEY)

    def _evaluate(self, fake: Tensor, whose: Tensor) -> Look:
        if not bool(fake.isfinite().all()):
            return Look(dict.fromkeys(VALUES, math.nan), [], [])
        found = memorization_test(self._train, self._held, fake, pairs=max(self.pairs, 1))
        p, copied = copying_test(self._train, self._held, fake)
        values = {"nearer": found.nearer, "copied": copied, "p": p}
        rows = [(int(rank), int(row)) for rank, row in whose[found.samples].tolist()]
        return Look(values, rows[: self.pairs], found.neighbours.tolist()[: self.pairs])

    def _named(self) -> dict[str, Tensor]:
        return {f"{self.name}/{name}": torch.tensor(value) for name, value in self.values.items()}

    # ---------- saying so

    def is_news(self, p: float) -> bool:
        """Whether the next measurement gives a new verdict; it counts as a measurement.

        Args:
            p: the measurement's p-value.
        """
        if math.isnan(p):
            return False
        if self.said:
            self.said = p <= self.false_alarms
            return False
        self.looks += 1
        self.said = p <= level(self.false_alarms, self.looks)
        return self.said

    def _say(self, trainer: Trainer) -> None:
        step = trainer.global_step
        self.events.append({"step": step, "verdict": "memorization", "evidence": dict(self.values)})
        rank_zero_warn(f"memorization at step {step}: {in_words(self.values)}. {MEMORIZATION}")
        for logger in trainer.loggers:
            logger.log_metrics({"health/memorization": 1.0}, step=step)

    def outcome(self, trainer: Trainer) -> Outcome:
        """The events, of which the last one may be ongoing, and where pairs are drawn."""
        troubles = [
            Trouble(
                event["step"],
                event["verdict"],
                in_words(event["evidence"]),
                MEMORIZATION,
                lasts=event is self.events[-1] and self.said,
            )
            for event in self.events
        ]
        return Outcome(troubles=troubles, files=[("nearest pairs", place) for place in self._drawn_to])

    # ---------- the nearest pairs

    def _draw(self, trainer: Trainer, module: GANModule, look: Look) -> None:
        self._drawn_at = trainer.global_step
        if not look.samples:
            return
        with isolate_rng():
            fakes, reals = self._nearest_pairs(trainer, module, look)
        self.drawn = [*zip(fakes, reals, strict=True)]
        drawn = Drawn(_pictures(self.name, self.drawn) if trainer.is_global_zero else {}, {})
        self._drawn_to = log_everywhere(trainer, drawn, self.name)

    def _nearest_pairs(self, trainer: Trainer, module: GANModule, look: Look) -> tuple[list[Sample], list[Sample]]:
        """Generated samples and the training samples beside them, (1, ...) each, on the CPU; of all ranks on all."""
        with module.noise.of(KEY, iteration=0):
            # to the last one, as networks that are sharded run on all ranks or on none
            mine = _picked([*self._own(trainer, look.samples)], self._generate(module), to_the_end=True)
        fakes = _found(look.samples, mine)
        rows = [(int(rank), int(row)) for rank, row in self._rows[look.neighbours].tolist()]
        reals = _found(rows, _picked([*self._own(trainer, rows)], (part.real for part in self._data)))
        still = all(self._is_still(module, *pair) for pair in zip(look.neighbours, reals, strict=True))
        return fakes, reals if trainer.strategy.broadcast(still) else self._nearest_now(module, fakes)

    @staticmethod
    def _own(trainer: Trainer, rows: Sequence[Row]) -> Iterator[int]:
        return (row for rank, row in rows if rank == trainer.global_rank)

    def _is_still(self, module: GANModule, row: int, sample: Sample) -> bool:
        """Whether a training sample that was read again is the one that was seen in the beginning."""
        if sample is None:
            return False
        before = self._train[row]
        now = self._see(move_data_to_device(sample, module.device))[0]
        # among other samples it has other roundings; those that are not told apart by that look the same
        return float((now - before).norm()) <= 0.1 * self._spacing + 1e-6 * float(before.norm())

    def _nearest_now(self, module: GANModule, fakes: list[Sample]) -> list[Sample]:
        """The nearest training samples to some generated ones, of those that the loader gives now."""
        targets = torch.cat([self._see(move_data_to_device(fake, module.device)) for fake in fakes])
        nearest: list[tuple[float, Sample]] = [(math.inf, None)] * len(fakes)
        for part in self._data:
            distances, rows = (found.flatten().tolist() for found in Pairs(targets, self._see(part.real)).nearest())
            for i, (distance, row) in enumerate(zip(distances, rows, strict=True)):
                if distance < nearest[i][0]:
                    nearest[i] = distance, _row(part.real, row)
        return [min(each, key=lambda found: found[0])[1] for each in zip(*gather_objects(nearest), strict=True)]


def _row(samples: Sample, row: int) -> Sample:
    return tree_map(lambda leaf: plain(leaf[row : row + 1]).clone(), samples)


def _picked(rows: Sequence[int], parts: Iterable[Sample], to_the_end: bool = False) -> dict[int, Sample]:
    """Samples by their numbers, from parts of all of them; up to the last one that is wanted."""
    found: dict[int, Sample] = {}
    start, last = 0, max(rows, default=-1)
    if last < 0 and not to_the_end:
        return found
    for part in parts:
        stop = start + batch_size(part)
        found |= {row: _row(part, row - start) for row in rows if start <= row < stop}
        start = stop
        if start > last and not to_the_end:
            break
    return found


def _found(rows: Sequence[Row], mine: Mapping[int, Sample]) -> list[Sample]:
    """The samples that all ranks have picked, in order; None for one that is not there."""
    everyone = gather_objects(mine)
    return [everyone[rank].get(row) for rank, row in rows]


def _pictures(name: str, pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """Generated samples beside their training samples; of several sizes those of the nearest pair's."""
    size = shapes(pairs[0][0])
    alike = [pair for pair in pairs if all(shapes(part) == size for part in pair)]
    if not alike:
        return {}
    fake, real = (tree_map(lambda *leaves: torch.cat(leaves), *samples) for samples in zip(*alike, strict=True))
    return {
        key_of(name, part): picture(samples, target, paired=True, target="nearest training sample")
        for (part, samples), target in zip(named(fake), tree_leaves(real), strict=True)
    }
