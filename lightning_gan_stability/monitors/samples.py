"""SampleLogger: pictures and sounds of the same samples over the course of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import optree
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_gan_stability._checks import check, check_integer, describe, is_integer, require
from lightning_gan_stability.callback import GANCallback
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.drawn import Drawn, key_of, log_everywhere, named, plain
from lightning_gan_stability.monitors.latents import fixed_latents
from lightning_gan_stability.monitors.pictures import as_image, kind_of, picture, table_picture
from lightning_gan_stability.outcome import Outcome
from lightning_gan_stability.outputs import Condition, Sample, batch_size, shapes, tree_leaves, tree_map
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.recipes.table import TableSynthesis

if TYPE_CHECKING:
    from PIL.Image import Image

SOUNDS = 4  # of a picture


class SampleLogger(GANCallback):
    """Draws a picture of generated samples at regular intervals, from the same latents and conditions each time.

    The shape of a sample, with the batch first, determines how it is drawn:

    * (n, c, h, w): images in [-1, 1] in a grid; their first channel, or the first three.
    * (n, 2): points in a scatter plot, real grey, generated red, sources blue.
    * (n, 1), (n,): a histogram.
    * (n, d): a curve of each vector.
    * (n, 1, t), (n, 2, t) with t of at least 1,024, or with ``sample_rate``: sound, as waveforms and spectrograms in
      decibels; if the sample rate is known also the sounds of the first four.
    * (n, d, t), (n, t, d) whose smaller size d is at most 16: series, a curve for each of the d channels.
    * (n, h, w): grey pictures, scaled from the smallest to the largest real value.
    * (n, c, d, h, w): volumes, as their middle slices across the three axes.
    * rows of :class:`~lightning_gan_stability.TableSynthesis`: the marginals of each column, as histograms, or as bars
      of the most frequent categories.

    A dict, list or named tuple of samples gets a picture for each of its tensors, with their names in the key. For a
    generator without latents, or with conditions of the same kind as its samples, as in translation, reconstruction,
    super-resolution and vocoders, the columns are source, generated and target from left to right; for a reconstruction
    generated and target. Samples other than images and points are drawn beside real ones for comparison. Samples of a
    generator with integer labels are sorted by label.

    Conditions, and real samples if they are drawn, are rows of the first training batches: up to ``n``, or as many as
    there are at the first picture. Checkpoints keep them. Networks are in eval mode, with the average if there is one,
    and draw the same random numbers each time, so that pictures of an unchanged generator are equal. A run is bitwise
    the same with and without the callback. Samples are generated and drawn once before the first batch, to check that
    this works.

    Pictures go to Weights & Biases and TensorBoard if these are the run's loggers, under the key ``samples``, and
    otherwise to ``samples/<step>.png`` in the log folder. Sounds are logged as ``samples/sound``, or as ``.wav`` files.

    Args:
        every: steps between pictures.
        n: number of samples in a picture.
        draw: a function (generated, real, condition) that replaces the drawing described above. It returns a Pillow
            image, a matplotlib figure, or a dict of these by names. It gets tensors, or trees of them, on the CPU. In
            YAML: the class path of a function, or of a class whose instances are callable.
        sample_rate: of sounds, in Hz; None: the attribute ``sample_rate`` of the module or of the data module. Without
            one, sounds are drawn but not saved as sounds.
        name: the key in the log and the folder of files; several of these callbacks in a run need different names.

    Raises:
        ValueError: if an argument has a bad value, or ``draw`` does not return pictures.
        MisconfigurationException: before the first batch, if samples have none of these shapes.
        ModuleNotFoundError: if sounds are logged to Weights & Biases and soundfile is not installed.

    Example:
        >>> SampleLogger(every=100, n=16).every
        100
    """

    rolled_back = False

    real_rows: list[Tensor]
    condition_rows: list[Tensor]
    complete: bool

    def __init__(
        self,
        every: int = 500,
        n: int = 64,
        draw: Callable[[Sample, Sample, Condition], Any] | None = None,
        sample_rate: int | None = None,
        name: str = "samples",
    ) -> None:
        super().__init__()
        self.every = check_integer("every", every)
        self.n = check_integer("n", n)
        self.draw = check(draw is None or callable(draw), "draw", "a function of samples that makes a picture", draw)
        self.sample_rate = None if sample_rate is None else check_integer("sample_rate", sample_rate)
        self.name = check(isinstance(name, str) and bool(name), "name", "a key of the log", name)
        self._structure: tuple[Any, Any] | None = None
        self._keeps_real = False
        self._drawn_to: list[str] = []  # folders and loggers
        # leaves of trees, whose structure the first batch of each fit says
        self.add_state("real_rows", [], on_device=False)
        self.add_state("condition_rows", [], on_device=False)
        self.add_state("complete", False)

    @property
    def state_key(self) -> str:
        """A key that tells callbacks with different names apart."""
        return f"{type(self).__qualname__}({self.name})"

    # ---------- what the Trainer calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset what is chosen at the first batch."""
        super().on_train_start(trainer, pl_module)
        self._structure, self._drawn_to = None, []

    def count_anew(self, module: GANProtocol) -> None:
        """Keep the same rows; pictures are named by the module's iteration."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose rows from the first batches; before the first one, refuse samples that cannot be drawn."""
        module: GANModule = pl_module  # type: ignore[assignment]
        first = self._structure is None
        if self.complete and not first:
            return
        with isolate_rng(), torch.no_grad(), module.noise.of("rows of pictures"):
            real, condition = module.unpacked(batch)
            condition = module.draw_condition(batch_size(real), condition)
        if first:
            self._structure = optree.tree_structure(real), optree.tree_structure(condition)
            self._keeps_real = self._is_real_drawn(module, real, condition)
            self._forget_others(module, real, condition)
        if not self.complete:
            self._choose(real if self._keeps_real else None, condition)
        if first:
            fake = self._sample(module)
            if shapes(fake) == shapes(real):  # the training step refuses others
                self._draw(trainer, module, fake)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if this step is due."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if module.iteration % self.every:
            return
        self.complete = True  # later pictures show the rows of the first one
        drawn = self._draw(trainer, module, self._sample(module))
        self._drawn_to = log_everywhere(trainer, drawn, self.name)

    def outcome(self, trainer: Trainer) -> Outcome:
        """Where its pictures are."""
        return Outcome(files=[("pictures", place) for place in self._drawn_to])

    # ---------- rows

    def _choose(self, real: Sample, condition: Condition) -> None:
        """Add rows of a batch, as many as are still needed."""
        chosen = [*self.real_rows, *self.condition_rows]
        missing = self.n - (len(chosen[0]) if chosen else 0)
        leaves = [*tree_leaves(real), *tree_leaves(condition)]
        if chosen and any(x.shape[1:] != old.shape[1:] for x, old in zip(leaves, chosen, strict=True)):
            self.complete = True  # samples of another size
            return
        copies: dict[int, Tensor] = {}  # what is data and condition is kept once
        for i, leaf in enumerate(leaves):
            if id(leaf) not in copies:
                rows = leaf.detach()[:missing].cpu().clone()
                copies[id(leaf)] = torch.cat([chosen[i], rows]) if chosen else rows
        grown, n_real = [copies[id(leaf)] for leaf in leaves], len(tree_leaves(real))
        self.real_rows, self.condition_rows = grown[:n_real], grown[n_real:]
        self.complete = not grown or len(grown[0]) >= self.n

    def _forget_others(self, module: GANProtocol, real: Sample, condition: Condition) -> None:
        """Choose new rows if those of a checkpoint have another structure, or do not fit what is drawn now."""
        expected = [len(tree_leaves(real)) if self._keeps_real else 0, len(tree_leaves(condition))]
        found = [len(self.real_rows), len(self.condition_rows)]
        if (any(found) and found != expected) or (self.complete and not any(found) and any(expected)):
            self.reset(module)

    def _is_real_drawn(self, module: GANModule, real: Sample, condition: Condition) -> bool:
        """Whether pictures show real samples, and whether there can be any.

        Raises:
            MisconfigurationException: if not.
        """
        if self.draw is not None or isinstance(module, TableSynthesis):
            return True
        drawn = False
        for _, leaf in named(real):
            kind = kind_of(leaf, self.sample_rate is not None)
            if kind is None:
                raise MisconfigurationException(
                    "SampleLogger draws points and vectors (n, d), series and sound (n, channels, t), images "
                    f"(n, c, h, w) and volumes (n, c, d, h, w), got samples {describe(leaf)}: give it a function "
                    "`draw` that makes a picture of them, or remove SampleLogger."
                )
            drawn |= kind != "image" or module.latent_dim is None or bool(self._sources(leaf, condition))
        return drawn

    def _sources(self, samples: Tensor, condition: Condition) -> list[Tensor]:
        """What a generator reads, of the kind of its samples, or a picture."""
        kinds = {kind_of(samples, self.sample_rate is not None), "image", "map"} - {"number"}
        return [
            leaf
            for leaf in tree_leaves(condition)
            if leaf.is_floating_point() and kind_of(leaf, self.sample_rate is not None) in kinds
        ]

    # ---------- samples and pictures

    def _rows(self) -> tuple[Sample, Condition]:
        """The real samples, if they are drawn, and the conditions of pictures."""
        assert self._structure is not None
        rows = [[leaf[: self.n] for leaf in leaves] for leaves in (self.real_rows, self.condition_rows)]
        real = optree.tree_unflatten(self._structure[0], rows[0]) if self._keeps_real else None
        return real, optree.tree_unflatten(self._structure[1], rows[1])

    def _sample(self, module: GANModule) -> Sample:
        """Samples of the same latents, conditions and noise each time; on all ranks, which may share a generator."""
        _, condition = self._rows()
        n = batch_size(condition) if self.condition_rows else self.n
        latents = fixed_latents(module, self.n, "pictures")
        with isolate_rng(), module.noise.of("pictures", iteration=0), evaluation(module):
            given = move_data_to_device(condition, module.device)
            return module.sample(n, given, None if latents is None else latents[:n])

    def _draw(self, trainer: Trainer, module: GANModule, fake: Sample) -> Drawn:
        """Pictures and sounds, on the first rank."""
        if not trainer.is_global_zero:
            return Drawn({}, {})
        fake, real, condition = (tree_map(plain, tree) for tree in (fake, *self._rows()))
        if self.draw is not None:
            with isolate_rng():  # a function of the user's draws from where it likes
                made = self.draw(fake, real, condition)
            images = made if isinstance(made, Mapping) else {"": made}
            return Drawn({key_of(self.name, name): as_image(image) for name, image in images.items()}, {})
        if isinstance(module, TableSynthesis):
            return Drawn({self.name: _table(module, fake, real)}, {})
        return self._pictures(trainer, module, *_by_label(fake, real, condition))

    def _pictures(self, trainer: Trainer, module: GANModule, fake: Sample, real: Sample, condition: Condition) -> Drawn:
        drawn = Drawn({}, {}, self._sample_rate(trainer, module))
        targets: list[Any] = tree_leaves(real) or [None] * len(tree_leaves(fake))
        for (name, samples), target in zip(named(fake), targets, strict=True):
            key, sources = key_of(self.name, name), self._sources(samples, condition)
            paired = module.latent_dim is None or bool(sources)
            shown = [source for source in sources if target is None or not _equal(source, target)]
            sound = self.sample_rate is not None
            drawn.pictures[key] = picture(samples, target, shown, paired, sound)
            if drawn.sample_rate and kind_of(samples, sound) == "audio":
                other = "target" if paired else "real"
                drawn.sounds[key] = {
                    f"{i}_{caption}": values
                    for i, pair in enumerate(zip(samples[:SOUNDS], target, strict=False))
                    for caption, values in zip(("generated", other), pair, strict=True)
                }
        if drawn.sounds and any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            require("soundfile", "audio")  # which wandb needs for files of sound
        return drawn

    def _sample_rate(self, trainer: Trainer, module: GANModule) -> int:
        """In Hz, or 0 if it is not known."""
        for owner in (self, module, getattr(trainer, "datamodule", None)):
            rate: Any = getattr(owner, "sample_rate", None)
            if is_integer(rate) and rate > 0:
                return int(rate)
        return 0


def _equal(source: Tensor, target: Tensor) -> bool:
    return source is target or (source.shape == target.shape and torch.equal(source, target))


def _by_label(fake: Sample, real: Sample, condition: Condition) -> tuple[Sample, Sample, Condition]:
    """The rows in the order of the first integer labels in the condition, if there are any."""
    kinds = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    labels = next((x for x in tree_leaves(condition) if x.dtype in kinds and x.numel() == len(x)), None)
    if labels is None:
        return fake, real, condition
    order = labels.flatten().argsort(stable=True)
    fake, real, condition = (tree_map(lambda leaf: leaf[order], tree) for tree in (fake, real, condition))
    return fake, real, condition


def _table(module: TableSynthesis, fake: Tensor, real: Tensor) -> Image:
    """The marginals of rows, without their conditions."""
    encoder = module.encoder
    made, data = (encoder.decode(rows[:, : encoder.width].float().nan_to_num()) for rows in (fake, real))
    return table_picture(made, data, [column["name"] for column in encoder.columns if "categories" in column])
