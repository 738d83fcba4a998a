"""Base of the data modules: a training stream that can resume, and a fixed held-out stream."""

from typing import Any, Protocol

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.data.streams import Batch, Rows, Stream


class Source(Protocol):
    """Batches by position, with the number of batches in an epoch."""

    def __len__(self) -> int: ...

    def __call__(self, position: int) -> Batch: ...


class StreamedDataModule(LightningDataModule):
    """Base of the data modules: a training stream that can resume, and a fixed held-out stream.

    A subclass implements :meth:`sources`.

    Args:
        batch_size: Samples per batch and process.
        holdout: Number of held-out samples; 0: no validation.
        seed: Seed of all random choices.
        num_workers: Number of processes that load batches.
    """

    def __init__(self, batch_size: int, holdout: int, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size)
        self.holdout = holdout
        self.seed = check_integer("seed", seed, least=0)
        self.num_workers = check_integer("num_workers", num_workers, least=0)
        self._streams: tuple[Stream, Stream] | None = None
        self._built_for = 0  # batch size of these

    def __str__(self) -> str:  # Lightning's own wants DataLoaders, and would read the data
        return f"{type(self).__name__}(batch_size={self.batch_size}, holdout={self.holdout}, seed={self.seed})"

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        """Return the training batches and the held-out batches of one rank.

        Args:
            rank: Rank of this process.
            world: Number of processes.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the data; a new run starts at its first batch, and another `fit` of the same trainer continues."""
        trainer = self.trainer
        if getattr(trainer, "overfit_batches", 0):
            raise MisconfigurationException(
                f"{type(self).__name__} yields other samples in every epoch, so overfit_batches has no effect: "
                "pass a DataLoader over the samples to overfit."
            )
        train, held_out = self.sources(*((trainer.global_rank, trainer.world_size) if trainer else (0, 1)))
        stream = Stream(train, len(train), self.num_workers)
        if self._streams and trainer and trainer.global_step:
            stream.load_state_dict(self._streams[0].state_dict())
        self._streams = stream, Stream(held_out, len(held_out), self.num_workers, repeat=True)
        self._built_for = self.batch_size

    def train_dataloader(self) -> Stream:
        """Return the training stream, the same object each time, so that a reload does not rewind it."""
        return self._prepared()[0]

    def val_dataloader(self) -> Stream | list[Stream]:
        """Return the held-out batches, the same ones on every pass; nothing if no data are held out."""
        return self._prepared()[1] if self.holdout else []

    def test_dataloader(self) -> Stream | list[Stream]:
        """Return the held-out batches too."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Stream:
        """Return the held-out batches, or the training data in order if none are held out."""
        return self._prepared()[1]

    def split(
        self,
        samples: Any,
        order: Tensor,
        rank: int,
        world: int,
        unit: str = "images",
        seed: int | None = None,
        drop_last: bool = False,
    ) -> tuple[Rows, Rows]:
        """Return training batches of the last samples of an order, and batches of the held-out ones before them.

        Args:
            samples: By index: an image, or a tuple that starts with one.
            order: Random order of the samples.
            rank: Rank of this process.
            world: Number of processes.
            unit: What the samples are, for messages.
            seed: Seed of the order of training; None: that of the data.
            drop_last: Leave out the last held-out batch if it is incomplete.

        Raises:
            ValueError: If all samples are held out, if one batch of all processes exceeds the training set, or with
                `drop_last` the held-out set.
        """
        held_out, train = order[: self.holdout].sort()[0], order[self.holdout :].sort()[0]
        if not len(train):
            raise ValueError(
                f"`holdout` must be less than the number of {unit}, so that some are left to train on, got "
                f"{self.holdout} for {len(order)}."
            )
        if (total := self.batch_size * world) > len(train):
            sizes = f"{self.batch_size} * {world} = {total} for {len(train)} {unit}"
            raise ValueError(f"`batch_size` times processes must not exceed the training set, got {sizes}.")
        drop_last = drop_last and self.holdout > 0
        if drop_last and total > self.holdout:
            sizes = f"{self.batch_size} * {world} = {total} for {self.holdout} {unit}"
            raise ValueError(f"With `drop_last`, `batch_size` times processes must not exceed `holdout`, got {sizes}.")
        place = self.batch_size, rank, world, self.seed if seed is None else seed
        shown = Rows(samples, held_out if self.holdout else train, *place, drop_last=drop_last)
        return Rows(samples, train, *place, shuffle=True, drop_last=True), shown

    def _prepared(self) -> tuple[Stream, Stream]:
        if self._streams is None or self._built_for != self.batch_size:  # which BatchSizeFinder sets
            self.setup()
        assert self._streams is not None
        return self._streams

    # Lightning gives a loader its saved position back only inside an epoch; saved here, it survives the end of one too.
    def state_dict(self) -> dict[str, int]:
        """Return the position in the training stream."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the position in `state_dict`."""
        self.train_dataloader().load_state_dict(state_dict)
