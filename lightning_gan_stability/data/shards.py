"""Images streamed from tar shards, for data sets that are too large for a disk."""

import io
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_gan_stability._checks import check_bool, check_choice, check_integer, require
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.image_files import Crop, Draws, Framing, ImageBatch, OnError, naming, read_batch
from lightning_gan_stability.noise import generator, seed_of

Sample: TypeAlias = dict[str, Any]  # the contents of its files by extension, "__key__" and "__url__"


class ImageShards(StreamedDataModule):
    """Images of a WebDataset: tar shards, streamed from disks, web servers or buckets.

    A sample of a shard is an image, such as `0007.jpg`, and with `labels` the number of its class in `0007.cls`. Images
    are processed and batched as in :class:`Images`. See https://github.com/webdataset/webdataset for the format, and
    for the supported addresses.

    In each epoch, every worker of every process reads its own shards in a new order, and shuffles samples among the
    next `shuffle` ones. A worker that finishes its shards before the epoch ends reads them again. An epoch covers about
    every image once if `epoch_length` is the number of images // (batch_size · processes).

    A training batch is a function of (seed, rank, position) and of the numbers of processes and workers. A run that is
    resumed in the middle of an epoch reads the earlier part of the epoch again, without decoding it, to find its
    position. The same happens after every epoch that Lightning's `limit_train_batches` cuts short: set `epoch_length`
    instead.

    Args:
        shards: Addresses or paths of the shards, of which braces are expanded: "data/{000000..000127}.tar",
            "https://server/{00..99}.tar", "pipe:aws s3 cp s3://bucket/{00..99}.tar -"; or a list of them.
        epoch_length: Number of batches in an epoch.
        size: Height and width in pixels.
        channels: 3 for RGB, 1 for greyscale.
        batch_size: Images per batch and process.
        val_shards: The same for validation and prediction; None: no validation, and predict training images.
        holdout: Images that are taken from `val_shards`, by all processes together, rounded down to whole batches of
            all of them. They are counted before the first batch.
        labels: Whether batches are `(images, labels)`.
        shuffle: Size of a worker's shuffle buffer, in encoded samples; 1: the order of the shards.
        crop: As in :class:`Images`.
        resize: As in :class:`Images`.
        flip: Mirror every training image left to right with probability ½.
        on_error: What is done if an image cannot be read: "raise" ends the run and names it; "skip" warns, and puts
            another image of its batch in its place. A shard that cannot be read always ends the run.
        num_workers: Processes that read shards.
        seed: Seed of the orders, of crops and of flips.

    Raises:
        ValueError: If an argument is out of its range; if one of `val_shards` and `holdout` is given without the other.
            Before the first batch: if a file does not exist; if there are fewer shards than workers; if there are fewer
            than `holdout` images in `val_shards`. Later: if a shard or an image cannot be read, or has no label.
        ModuleNotFoundError: If webdataset is not installed.

    Example:
        >>> import io, tarfile, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(f"{folder}/0.tar", "w") as shard:
        ...         for k in range(4):
        ...             Image.new("RGB", (20, 30)).save(file := io.BytesIO(), "PNG")
        ...             member = tarfile.TarInfo(f"{k}.png")
        ...             member.size = file.tell()
        ...             shard.addfile(member, io.BytesIO(file.getvalue()))
        ...     images = next(iter(ImageShards(f"{folder}/0.tar", 1, size=16, batch_size=4).train_dataloader()))
        >>> images.shape
        torch.Size([4, 3, 16, 16])
    """

    def __init__(
        self,
        shards: str | list[str],
        epoch_length: int = 1000,
        size: int = 64,
        channels: int = 3,
        batch_size: int = 64,
        val_shards: str | list[str] | None = None,
        holdout: int = 0,
        labels: bool = False,
        shuffle: int = 1000,
        crop: Crop | None = "center",
        resize: int | None = None,
        flip: bool = False,
        on_error: OnError = "raise",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout, least=0), seed, num_workers)
        if (val_shards is None) != (holdout == 0):
            raise ValueError(f"`val_shards` and `holdout` go together, got {val_shards!r} and {holdout!r}.")
        self.shards = check_shards("shards", shards)
        self.val_shards = None if val_shards is None else check_shards("val_shards", val_shards)
        self.epoch_length = check_integer("epoch_length", epoch_length)
        self.labels = check_bool("labels", labels)
        self.shuffle = check_integer("shuffle", shuffle)
        self.framing = Framing(size, channels, crop, resize, flip)
        self.on_error = check_choice("on_error", on_error, ("raise", "skip"))
        self._counted = False

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        readers = max(1, self.num_workers)
        train = addresses("shards", self.shards)
        if len(train) < world * readers:
            raise ValueError(
                f"`shards` must be at least as many as processes times workers, got {len(train)} for {world} * "
                f"{readers}: make smaller shards, or set a smaller `num_workers`."
            )
        make = Samples(self.framing, self.labels, self.on_error)
        place = self.batch_size, rank, world
        stream = ShardBatches(train, make, self.epoch_length, *place, self.seed, readers, self.shuffle)
        if self.val_shards is None:
            return stream, ShardBatches(train, make, self.epoch_length, *place, self.seed, readers)
        if (batches := self.holdout // (self.batch_size * world)) == 0:
            sizes = f"{self.batch_size} * {world} for {self.holdout}"
            raise ValueError(f"`batch_size` times processes must not exceed `holdout`, got {sizes}.")
        held_out = addresses("val_shards", self.val_shards)
        if not self._counted:
            found = sum(1 for _ in islice(read_shards(held_out), self.holdout))
            if found < self.holdout:
                raise ValueError(f"`val_shards` must have at least `holdout` = {self.holdout} images, got {found}.")
            self._counted = True
        return stream, ShardBatches(held_out, make, batches, *place, self.seed, readers=0)

    # Lightning gives both back: what the stream saves, and what the data module does.
    def state_dict(self) -> dict[str, int]:
        """Return the position in the training stream, and the number of workers that it depends on."""
        return super().state_dict() | {"num_workers": self.num_workers}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the position in `state_dict`."""
        if (before := state_dict["num_workers"]) != self.num_workers:
            rank_zero_warn(
                f"The checkpoint was written with `num_workers={before}`, and now it is {self.num_workers}: the images "
                "of this run come in another order than those of an uninterrupted one."
            )
        super().load_state_dict({"position": state_dict["position"]})


def check_shards(name: str, shards: Any) -> list[str]:
    """Return addresses as a list, with their braces.

    Raises:
        ValueError: If there are none.
    """
    given = [shards] if isinstance(shards, str) else shards
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, str) and one for one in given):
        raise ValueError(f"`{name}` must be an address of tar files, or a list of them, got {shards!r}.")
    return list(given)


def addresses(name: str, shards: Iterable[str]) -> list[str]:
    """Return the address of each shard.

    Raises:
        ValueError: If one is that of a file that does not exist.
        ModuleNotFoundError: If webdataset is not installed.
    """
    expand = require("webdataset.shardlists", "shards").expand_urls
    found = [address for one in shards for address in expand(one)]
    for address in found:
        if not re.match(r"\w\w+:", address) and not Path(address).is_file():  # one letter: a drive of Windows
            raise ValueError(f"`{name}`: there is no such file: {address}")
    return found


def read_shards(shards: Iterable[str]) -> Iterator[Sample]:
    """Yield the samples of some shards that have an image.

    Raises:
        ValueError: If a shard cannot be read.
    """
    open_shard = require("webdataset", "shards").gopen
    read = require("webdataset.tariterators", "shards")
    for shard in shards:
        try:
            stream, ended = open_shard(shard), False
            try:
                for sample in read.group_by_keys(read.tar_file_expander([{"url": shard, "stream": stream}])):
                    if _images(sample):
                        yield sample
                ended = True
            finally:
                # Of a command, this tells whether it failed; one that was broken off here did.
                with nullcontext() if ended else suppress(OSError):
                    stream.close()
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            raise ValueError(f"This shard cannot be read: {shard} ({error})") from error


@dataclass(frozen=True)
class Samples:
    """Makes images, or images and labels, of samples."""

    framing: Framing
    labels: bool
    on_error: OnError

    def __call__(self, samples: Sequence[Sample], draws: Draws | None) -> ImageBatch:
        return read_batch([partial(self._read, sample) for sample in samples], draws, self.on_error)

    def _read(self, sample: Sample, place: Sequence[float] | None) -> Any:
        kinds = _images(sample)
        with naming(f"{sample['__url__']}: {sample['__key__']}.{kinds[0]}"):
            if len(kinds) > 1:
                raise ValueError(f"its sample has several images: {', '.join(kinds)}")
            with Image.open(io.BytesIO(sample[kinds[0]])) as opened:
                image = self.framing(opened, place)
            return (image, _label(sample)) if self.labels else image


def _images(sample: Sample) -> list[str]:
    """Return the extensions of the images of a sample."""
    return [kind for kind in sample if f".{kind.rpartition('.')[2]}" in IMG_EXTENSIONS]


def _label(sample: Sample) -> int:
    text = sample.get("cls", b"").strip()
    if not text.isdigit():
        raise ValueError("its sample has no `.cls` file with the number of a class: add them, or set `labels=False`")
    return int(text)


@dataclass
class ShardBatches:
    """Batches of shards by position, which reads on from the batch before as long as positions follow each other.

    Args:
        shards: Addresses.
        make: Makes a batch of samples.
        length: Batches in an epoch.
        batch_size: Samples per batch.
        rank: Rank of this process.
        world: Number of processes.
        seed: Seed of the orders.
        readers: Worker processes, each of which serves every `readers`-th batch and reads shards of its own. 0: every
            process reads all shards, and takes its share of the samples.
        shuffle: Samples to draw from; None: in order, and without random crops and flips.
    """

    shards: list[str]
    make: Samples
    length: int
    batch_size: int
    rank: int
    world: int
    seed: int
    readers: int
    shuffle: int | None = None
    _open: "dict[int, Reading]" = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __call__(self, position: int) -> ImageBatch:
        epoch, step = divmod(position, self.length)
        number, reader = divmod(step, max(1, self.readers))
        at = self._open.get(reader)
        # A process that forks must not read on from where its parent is in a file.
        if at is None or (at.process, at.epoch) != (os.getpid(), epoch) or at.number > number:
            at = self._open[reader] = Reading(os.getpid(), epoch, 0, self._samples(epoch, reader))
        for _ in islice(at.samples, (number - at.number) * self.batch_size):
            pass
        samples = list(islice(at.samples, self.batch_size))
        at.number = number + 1
        draws = None
        if self.shuffle is not None:
            draws = Draws.of(self.make.framing, self.batch_size, self.seed, self.rank, position)
        return self.make(samples, draws)

    def _samples(self, epoch: int, reader: int) -> Iterator[Sample]:
        """Yield the samples of an epoch of one reader, again and again."""
        if self.readers == 0:
            return islice(_again(self.shards, lambda _: read_shards(self.shards)), self.rank, None, self.world)
        order, n, place = list(range(len(self.shards))), self.shuffle, self.rank * self.readers + reader
        if n is not None:
            order = torch.randperm(len(order), generator=generator(self.seed, "shards", epoch)).tolist()
        shards = [self.shards[k] for k in order[place :: self.world * self.readers]]
        if n is None:
            return _again(shards, lambda _: read_shards(shards))
        key = self.seed, "shuffle", epoch, place
        return _again(shards, lambda number: _shuffled(read_shards(shards), n, random.Random(seed_of(*key, number))))


@dataclass
class Reading:
    """Where a reader is: the number of its next batch in an epoch, and the samples from there on."""

    process: int
    epoch: int
    number: int
    samples: Iterator[Sample]


def _again(shards: Sequence[str], read: Callable[[int], Iterable[Sample]]) -> Iterator[Sample]:
    """Yield samples of shards that are read again and again; `read` gets the number of times that they have been.

    Raises:
        ValueError: If there are none.
    """
    for number in count():
        empty = True
        for sample in read(number):
            empty = False
            yield sample
        if empty:
            raise ValueError(f"Shards have no images ({', '.join(IMG_EXTENSIONS)}): {', '.join(shards)}")


def _shuffled(samples: Iterator[Sample], n: int, source: random.Random) -> Iterator[Sample]:
    """Yield each sample once, at each time a random one of the next `n`."""
    kept = list(islice(samples, n))
    for sample in samples:
        index = source.randrange(n)
        yield kept[index]
        kept[index] = sample
    if n > 1:
        source.shuffle(kept)
    yield from kept
