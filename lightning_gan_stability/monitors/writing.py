"""Writes samples to files of a suitable kind: images, sounds, arrays or tables."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_gan_stability._checks import check_bool, check_integer
from lightning_gan_stability.files import written_whole
from lightning_gan_stability.monitors.drawn import named, plain, write_wave
from lightning_gan_stability.monitors.pictures import kind_of
from lightning_gan_stability.outputs import Sample, batch_size
from lightning_gan_stability.recipes.table import TableSynthesis

#: What is written here, and what ``overwrite`` removes.
_OWN = re.compile(r"\d{6,}\.(png|wav)|samples\.(npy|csv)|labels\.csv|grid\.png|interpolation\.png")


class SampleFiles:
    """Writes samples into a folder, in files that suit their kind.

    * images (n, c, h, w) in [-1, 1] with 1, 3 or 4 channels: ``000000.png``, ...
    * sounds (n, 1, t) or (n, 2, t) in [-1, 1], if ``sample_rate`` is given: ``000000.wav``, ...
    * anything else: ``samples.npy``, one array (N, ...) of all samples.
    * tables, by :meth:`write_table`: ``samples.csv``.

    Dicts, lists and named tuples of samples get a folder for each of their tensors. Integer labels go to
    ``labels.csv``. A file is written completely or not at all, and arrays and tables have complete rows: if the disk is
    full, everything written before can be read.

    Args:
        folder: the folder; it is created if it does not exist.
        overwrite: allow a folder with files, and remove those of earlier samples.
        sample_rate: of sounds, in Hz; None: write sounds as arrays.

    Attributes:
        written: number of samples written so far.

    Raises:
        FileExistsError: if the folder is not empty, without ``overwrite``.
        ValueError: if samples are not finite.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = SampleFiles(folder)
        ...     files.write(torch.zeros(2, 3, 8, 8), labels=torch.tensor([4, 7]))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['000000.png', '000001.png', 'labels.csv']
    """

    def __init__(self, folder: str | Path, overwrite: bool = False, sample_rate: int | None = None) -> None:
        self.folder = Path(folder)
        self.sample_rate = None if sample_rate is None else check_integer("sample_rate", sample_rate)
        self.written = 0
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{str(self.folder)!r} is a file, and samples need a folder.")
        present = [*self.folder.iterdir()] if self.folder.is_dir() else []
        if present and not check_bool("overwrite", overwrite):
            raise FileExistsError(
                f"The folder {str(self.folder)!r} is not empty: give another one, or --overwrite (in Python: "
                "overwrite=True), which removes earlier samples from it."
            )
        for file in [*self.folder.rglob("*")]:
            if file.is_file() and _OWN.fullmatch(file.name):
                file.unlink()

    def write(self, samples: Sample, labels: Tensor | None = None, names: Sequence[str] | None = None) -> None:
        """Add samples (n, ...).

        Args:
            samples: a tensor or a tree of tensors.
            labels: integers (n,).
            names: names of the files, without ending; None: their numbers.
        """
        n = batch_size(samples)
        names = [f"{self.written + i:06d}" for i in range(n)] if names is None else names
        with self._counting():
            for part, leaf in named(samples):
                folder = self.folder / part.replace(".", "/") if part else self.folder
                self._write_leaf(plain(leaf), folder, names)
            if labels is not None:
                rows = zip(names, labels.flatten().tolist(), strict=True)
                _append_rows(self.folder / "labels.csv", ["sample", "label"], rows)
        self.written += n

    def write_table(self, columns: Mapping[str, Any]) -> None:
        """Add rows of a table, given by columns of equal length."""
        with self._counting():
            rows = zip(*columns.values(), strict=True)
            _append_rows(self.folder / "samples.csv", [*columns], rows)
        self.written += len(next(iter(columns.values())))

    def _write_leaf(self, samples: Tensor, folder: Path, names: Sequence[str]) -> None:
        if samples.is_floating_point() and (bad := int((~samples.isfinite()).reshape(len(samples), -1).any(1).sum())):
            raise ValueError(f"{bad} of {len(samples)} samples are not finite: did the run of the checkpoint fail?")
        write = self._writer(samples)
        folder.mkdir(parents=True, exist_ok=True)
        if write is None:
            _append_array(folder / "samples.npy", samples)
            return
        ending, save = write
        for name, sample in zip(names, samples, strict=True):
            place = folder / f"{name}.{ending}"
            place.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(place) as file:
                save(file, sample)

    def _writer(self, samples: Tensor) -> tuple[str, Callable[[Path, Tensor], None]] | None:
        """The ending and the writer of one file per sample; None: all samples go into one array."""
        kind = kind_of(samples, self.sample_rate is not None)
        if kind == "image" and samples.shape[1] in (1, 3, 4):
            return "png", _write_image
        rate = self.sample_rate
        if kind == "audio" and rate is not None:
            return "wav", lambda file, sample: write_wave(file, sample, rate)
        return None

    @contextmanager
    def _counting(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except OSError as error:
            raise OSError(
                f"Writing to {str(self.folder)!r} failed after {self.written} samples, which are there ({error})."
            ) from error


class SampleWriter(BasePredictionWriter):
    """Writes the samples of ``trainer.predict`` into files: one sample for each item of the data.

    ``gan-stability predict`` adds it. The kinds of files are those of :class:`SampleFiles`, with the attribute
    ``sample_rate`` of the module or the data module. Processes other than the first write into subfolders ``rank_1``
    and so on.

    Args:
        folder: the folder; None: ``predictions`` beside the folder of the checkpoint, or in the Trainer's
            ``default_root_dir``.
        overwrite: remove earlier predictions from the folder.

    Raises:
        FileExistsError: if the folder is not empty, without ``overwrite``.

    Example:
        >>> SampleWriter("predicted").overwrite
        False
    """

    def __init__(self, folder: str | Path | None = None, overwrite: bool = False) -> None:
        super().__init__("batch")
        self.folder = folder
        self.overwrite = check_bool("overwrite", overwrite)
        self._files: SampleFiles | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the folder, before samples are generated."""
        # files are in the order of batches, on whichever process they were made
        warnings.filterwarnings("ignore", "Couldn't infer the batch indices")
        folder = Path(self.folder or _beside(trainer))
        if trainer.global_rank:
            folder = folder / f"rank_{trainer.global_rank}"
        rates = (getattr(owner, "sample_rate", None) for owner in (pl_module, getattr(trainer, "datamodule", None)))
        rate = next((rate for rate in rates if rate), None)
        try:
            self._files = SampleFiles(folder, self.overwrite, rate)
        except FileExistsError as error:
            raise FileExistsError(
                f"{str(folder)!r} is there already: give SampleWriter another `folder`, or `overwrite`, which removes "
                "earlier samples (--trainer.callbacks+=SampleWriter --trainer.callbacks.overwrite=true)."
            ) from error

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the samples of a batch; tables are written as rows."""
        assert self._files is not None
        if isinstance(pl_module, TableSynthesis):
            encoder = pl_module.encoder
            self._files.write_table(encoder.decode(prediction[:, : encoder.width].float()))
        else:
            self._files.write(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where the files are."""
        if self._files is not None:
            trainer.print(f"{self._files.written} samples are in {self._files.folder}.")


def _beside(trainer: Trainer) -> Path:
    """The folder of predictions for the checkpoint that a trainer has read."""
    if trainer.ckpt_path is None:
        return Path(trainer.default_root_dir, "predictions")
    folder = Path(trainer.ckpt_path).parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "predictions"


# ---------- files


def _write_image(file: Path, pixels: Tensor) -> None:
    from torchvision.transforms.functional import to_pil_image

    to_pil_image(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()).save(file, format="PNG")


def _append_rows(file: Path, header: Sequence[str], rows: Any) -> None:
    """Add all given rows to a CSV file, or none."""
    with _appending(file) as (stream, new):
        text = csv.writer(stream)
        if new:
            text.writerow(header)
        text.writerows(rows)


@contextmanager
def _appending(file: Path) -> Iterator[tuple[Any, bool]]:
    """A text file that is restored if something fails."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with file.open("a", newline="", encoding="utf-8") as stream:
            yield stream, size == 0
    except OSError:
        os.truncate(file, size)
        raise


def _append_array(file: Path, rows: Tensor) -> None:
    """Add rows to an array in NumPy's format, whose header says how many there are."""
    import numpy as np

    values = np.ascontiguousarray(rows.numpy())
    start = 0
    with file.open("r+b" if file.exists() else "x+b") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(0)
            version = np.lib.format.read_magic(stream)
            assert version == (1, 0)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if shape[1:] != values.shape[1:] or dtype != values.dtype:
                raise ValueError(f"Samples of shape {values.shape[1:]} do not fit those of {shape[1:]} in {file}.")
            start = shape[0]
        else:
            _write_header(stream, values, 0)
        # NumPy leaves room in the header for a first dimension that grows, so that it can be written again
        body = stream.tell()
        end = body + start * values[:1].nbytes
        stream.truncate(end)
        stream.seek(end)
        stream.write(values.tobytes())
        stream.flush()
        stream.seek(0)
        _write_header(stream, values, start + len(values))
        assert stream.tell() == body


def _write_header(stream: Any, values: Any, n: int) -> None:
    import numpy as np

    described = np.lib.format.header_data_from_array_1_0(values) | {"shape": (n, *values.shape[1:])}
    np.lib.format.write_array_header_1_0(stream, described)
