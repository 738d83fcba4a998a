"""Clips of equal length from the sound files of a folder, or from synthesized speech."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gan_stability._checks import check_integer, require
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.streams import Rows
from lightning_gan_stability.datasets import speech
from lightning_gan_stability.noise import generator

_LOUDEST = 10.0  # a float file may exceed 1 a little, but not by the factor of integers
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


class Recordings(Protocol):
    """Sounds of one sample rate that can be read in part."""

    @property
    def lengths(self) -> Sequence[int]:
        """Samples of each."""
        ...

    def read(self, index: int, start: int, length: int) -> Tensor:
        """Return samples (1, length) in [-1, 1] of one recording."""
        ...


class ClipsDataModule(StreamedDataModule):
    """Base of :class:`Audio` and :class:`Speech`: a clip of each recording, at a random position in training.

    A subclass implements :meth:`recordings`, which is called once.
    """

    unit = "recordings"

    def __init__(
        self, length: int, batch_size: int, holdout: int, seed: int, epoch_length: int | None = None, workers: int = 0
    ) -> None:
        super().__init__(batch_size, check_integer("holdout", holdout, least=0), seed, workers)
        self.length = check_integer("length", length)
        self.epoch_length = epoch_length if epoch_length is None else check_integer("epoch_length", epoch_length)
        self._recordings: Recordings | None = None

    def recordings(self) -> Recordings:
        """Return the recordings, each of at least `length` samples."""
        raise NotImplementedError

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        if self._recordings is None:
            self._recordings = self.recordings()
        recordings = self._recordings
        order = torch.randperm(len(recordings.lengths), generator=generator(self.seed, "holdout"))
        if self.epoch_length is not None and self.holdout < len(order):
            # An epoch of own length may take a file several times, so that few long files fill a batch.
            held_out, rest = order[: self.holdout], order[self.holdout :]
            order = torch.cat([held_out, rest.repeat(math.ceil(self.batch_size * world / len(rest)))])
        train, shown = self.split(recordings, order, rank, world, self.unit)
        length = len(train) if self.epoch_length is None else self.epoch_length
        return Clips(recordings, train, self.length, length), Clips(recordings, shown, self.length, len(shown))


class Audio(ClipsDataModule):
    """Clips of your own sound files: at a random position of each file in training, and the middle of held-out files.

    A batch is float32 of shape `(batch_size, 1, length)` in [-1, 1]; the channels of a file are averaged. Only the
    samples of a clip are read. Each pass over the files has a new random order, which is divided among processes;
    training drops the last incomplete batch.

    Args:
        folder: Path of a folder with .wav, .flac, .ogg and .mp3 files, searched recursively.
        sample_rate: Sample rate of all files in Hz.
        length: Number of samples in a clip.
        batch_size: Clips per batch and process.
        holdout: Files for validation and prediction; 0: no validation (Lightning warns that it is empty, unless
            `limit_val_batches` is 0), and predict the middle of the training files.
        epoch_length: Number of batches in an epoch; None: one pass over the training files. If given, a batch may be
            larger than the number of files.
        num_workers: Number of processes that load files.
        seed: Seed of the split, of the order and of the positions of clips.

    Raises:
        ValueError: If an argument is out of its range. Before the first batch, from the headers of all files: if there
            is no file; if a file cannot be read, has another sample rate, or has fewer samples than `length`; or if
            there are fewer files than a batch needs.
        ModuleNotFoundError: If soundfile is not installed.

    Example:
        >>> import tempfile, numpy, soundfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     soundfile.write(f"{folder}/tone.wav", numpy.sin(0.06 * numpy.arange(9000)), 22050)
        ...     clips = next(iter(Audio(folder, batch_size=1).train_dataloader()))
        >>> clips.shape
        torch.Size([1, 1, 8192])
    """

    unit = "files"

    def __init__(
        self,
        folder: str,
        sample_rate: int = 22050,
        length: int = 8192,
        batch_size: int = 16,
        holdout: int = 0,
        epoch_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(length, batch_size, holdout, seed, epoch_length, num_workers)
        if not isinstance(folder, str | Path):
            raise ValueError(f"`folder` must be the path of a folder, got {folder!r}.")
        if Path(folder).is_file():
            raise ValueError(f"`folder` must be a folder, got a file: {folder}")
        if not Path(folder).is_dir():
            raise ValueError(f"`folder` does not exist: {folder}")
        self.folder = folder
        self.sample_rate = check_integer("sample_rate", sample_rate)

    def recordings(self) -> Recordings:
        files = SoundFiles(Path(self.folder))
        other = [k for k, rate in enumerate(files.rates) if rate != self.sample_rate]
        if other:
            raise ValueError(
                f"{len(other)} of {len(files.rates)} files have another sample rate than `sample_rate` = "
                f"{self.sample_rate} Hz; the first is {files.files[other[0]]} with {files.rates[other[0]]} Hz. "
                "Resample the files to one rate (sox, ffmpeg, torchaudio), or set `sample_rate` to the one they share."
            )
        short = [k for k, n in enumerate(files.lengths) if n < self.length]
        if short:
            raise ValueError(
                f"{len(short)} of {len(files.lengths)} files are shorter than `length` = {self.length} samples; the "
                f"first is {files.files[short[0]]} with {files.lengths[short[0]]}. Set a smaller `length`, pad these "
                "files with silence, or remove them from the folder."
            )
        return files


class Speech(ClipsDataModule):
    """Clips of synthesized English sentences, without a download.

    A batch is float32 of shape `(batch_size, 1, length)` in [-1, 1]: a random clip of each sentence in training, and
    the middle of other sentences as held-out data. See :func:`lightning_gan_stability.datasets.speech` for the
    sentences.

    Args:
        sentences: Number of sentences, of about 2 s each.
        sample_rate: Sample rate in Hz.
        length: Number of samples in a clip.
        batch_size: Clips per batch and process.
        holdout: Sentences for validation and prediction; 0: predict the middle of the training sentences.
        seed: Seed of the sentences, of the split, of the order and of the positions of clips.

    Raises:
        ValueError: If an argument is out of its range. Before the first batch: if a sentence is shorter than `length`;
            if there are fewer sentences than one batch.
        ModuleNotFoundError: If neither espeakng-loader nor the program `espeak-ng` is installed.

    Example:
        >>> next(iter(Speech(sentences=8, batch_size=4, holdout=2).train_dataloader())).shape
        torch.Size([4, 1, 8192])
    """

    unit = "sentences"

    def __init__(
        self,
        sentences: int = 200,
        sample_rate: int = 16000,
        length: int = 8192,
        batch_size: int = 16,
        holdout: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(length, batch_size, holdout, seed)
        self.sentences = check_integer("sentences", sentences)
        self.sample_rate = check_integer("sample_rate", sample_rate)

    def recordings(self) -> Recordings:
        spoken = InMemory(speech(self.sentences, self.sample_rate, self.seed))
        if (shortest := min(spoken.lengths)) < self.length:
            raise ValueError(
                f"`length` must be at most {shortest}, the samples of the shortest sentence, got {self.length}."
            )
        return spoken


@dataclass(frozen=True)
class Clips:
    """Batches of clips: at random places if the rows are shuffled, else from the middle."""

    recordings: Recordings
    rows: Rows
    length: int
    epoch: int  # batches

    def __len__(self) -> int:
        return self.epoch

    def __call__(self, position: int) -> Tensor:
        share = self.rows.share(position).tolist()
        room = torch.tensor([self.recordings.lengths[row] - self.length + 1 for row in share], dtype=torch.float64)
        place = torch.full_like(room, 0.5)
        if self.rows.shuffle:
            n = self.rows.batch_size * self.rows.world
            drawn = torch.rand(n, generator=generator(self.rows.seed, "clip", position), dtype=torch.float64)
            place = drawn[self.rows.rank :: self.rows.world]
        starts = torch.minimum((place * room).floor(), room - 1).long().tolist()
        clips = [self.recordings.read(row, start, self.length) for row, start in zip(share, starts, strict=True)]
        return torch.stack(clips)


class SoundFiles:
    """The sound files below a folder.

    Attributes:
        files: Their paths, in order.
        rates: Their sample rates in Hz.
        lengths: Their samples per channel.
    """

    def __init__(self, folder: Path) -> None:
        found = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
        self.files = sorted(file for file in found if file.suffix.lower() in SOUNDS and not file.name.startswith("._"))
        if not self.files:
            raise ValueError(f"`folder` has no sounds ({', '.join(SOUNDS)}): {folder}")
        headers = [self._ask("info", file) for file in self.files]
        self.rates = [int(header.samplerate) for header in headers]
        self.lengths = [int(header.frames) for header in headers]

    def read(self, index: int, start: int, length: int) -> Tensor:
        """Return samples (1, length) in [-1, 1] of one file, the mean of its channels."""
        file = self.files[index]
        samples, _ = self._ask("read", file, start=start, frames=length, dtype="float32", always_2d=True)
        if len(samples) < length:
            end = f"it ends at sample {start + len(samples)}, but its header says {self.lengths[index]}"
            raise ValueError(f"soundfile cannot read all of this file: {file} ({end})")
        peak = float(abs(samples).max())  # NaN if one is
        if not peak <= _LOUDEST:
            raise ValueError(
                f"Samples must be in [-1, 1], but this file has {peak:.4g}: {file}. Divide the samples by the largest "
                "magnitude, or take the file out of the folder."
            )
        return torch.from_numpy(samples).mean(1)[None].clamp(-1, 1)

    def _ask(self, function: str, file: Path, **options: Any) -> Any:
        soundfile = require("soundfile", "audio")
        try:
            return getattr(soundfile, function)(str(file), **options)
        except (soundfile.SoundFileError, OSError) as error:
            raise ValueError(f"soundfile cannot read this file: {file} ({error})") from error


class InMemory:
    """Recordings that are tensors (T,) already."""

    def __init__(self, recordings: Sequence[Tensor]) -> None:
        self.samples = recordings
        self.lengths = [len(samples) for samples in recordings]

    def read(self, index: int, start: int, length: int) -> Tensor:
        """Return samples (1, length) of one recording."""
        return self.samples[index][None, start : start + length]
