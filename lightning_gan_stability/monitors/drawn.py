"""Sends pictures and sounds to loggers and files."""

from __future__ import annotations

import re
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import optree
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_gan_stability.outputs import Sample

if TYPE_CHECKING:
    from PIL.Image import Image


class Drawn(NamedTuple):
    """What to log: pictures by their keys, and sounds (channels, t) by key and caption."""

    pictures: dict[str, Image]
    sounds: dict[str, dict[str, Tensor]]
    sample_rate: int = 0


def log_everywhere(trainer: Trainer, drawn: Drawn, name: str) -> list[str]:
    """Send pictures and sounds to all loggers of a run, or to files if there is none, from the first rank.

    Args:
        trainer: the run's Trainer; call this on all ranks.
        drawn: what to log; ignored on ranks other than the first.
        name: prefix of the keys, and the folder of files.

    Returns:
        Where a reader finds them; empty on other ranks.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
    loggers: Sequence[Logger | None] = (trainer.loggers or [None]) if trainer.is_global_zero else []
    for logger in loggers:
        log_drawn(logger, drawn, name, folder, trainer.global_step)
    return [place_of(logger, name, folder) for logger in loggers]


def log_drawn(logger: Logger | None, drawn: Drawn, name: str, folder: Path, step: int) -> None:
    """Send pictures and sounds to Weights & Biases or TensorBoard, or else write them into files.

    Args:
        logger: the logger; None, or one that does not support pictures: write files.
        drawn: what to log.
        name: prefix of the keys, and the folder of files: ``<name>/<step>.png``.
        folder: parent of that folder.
        step: the Trainer's step.
    """
    if isinstance(logger, WandbLogger):
        for key, image in drawn.pictures.items():
            logger.log_image(key, [image], step=step)
        for key, sounds in drawn.sounds.items():
            waves, rates = [_clipped(x).T.numpy() for x in sounds.values()], [drawn.sample_rate] * len(sounds)
            logger.log_audio(f"{key}/sound", waves, step=step, sample_rate=rates, caption=[*sounds])
    elif isinstance(logger, TensorBoardLogger):
        from torchvision.transforms.functional import pil_to_tensor

        writer = logger.experiment
        for key, image in drawn.pictures.items():
            writer.add_image(key, pil_to_tensor(image), step)
        for key, sounds in drawn.sounds.items():
            for caption, sound in sounds.items():
                writer.add_audio(f"{key}/sound/{caption}", _clipped(sound).mean(0), step, drawn.sample_rate)
    else:
        for key, image in drawn.pictures.items():
            image.save(_file(folder, name, key, step, "png"))
        for key, sounds in drawn.sounds.items():
            for caption, sound in sounds.items():
                write_wave(_file(folder, name, f"{key}/{caption}", step, "wav"), sound, drawn.sample_rate)


def place_of(logger: Logger | None, name: str, folder: Path) -> str:
    """Where a reader finds what a logger was given; see :func:`log_drawn`.

    Example:
        >>> place_of(None, "samples", Path("logs"))
        'logs/samples'
    """
    taken = isinstance(logger, WandbLogger | TensorBoardLogger)
    return f"{type(logger).__name__}, under {name}" if taken else str(folder / name)


def key_of(name: str, part: object) -> str:
    """The key of a part of samples.

    Example:
        >>> key_of("samples", ""), key_of("samples", "a.b")
        ('samples', 'samples/a.b')
    """
    return f"{name}/{part}" if part != "" else name


def named(tree: Sample) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree with their paths, ``"a.b"``; a single tensor has the name ""."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    for accessor, leaf in zip(accessors, leaves, strict=True):
        yield ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor), leaf


def plain(leaf: Tensor) -> Tensor:
    """The tensor on the CPU, in a dtype that NumPy supports."""
    leaf = leaf.detach().cpu()
    return leaf.float() if leaf.is_floating_point() else leaf


# ---------- files


def _file(folder: Path, name: str, key: str, step: int, ending: str) -> Path:
    """``samples/<step>.png`` of the key ``samples``, ``samples/<step>_a.png`` of ``samples/a``."""
    part = re.sub(r"[^\w.-]", "_", key.removeprefix(name))
    file = folder / name / f"{step:06d}{part}.{ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _clipped(sound: Tensor) -> Tensor:
    return sound.nan_to_num().clamp(-1, 1)


def write_wave(file: Path, sound: Tensor, sample_rate: int) -> None:
    """Write a sound (channels, t) in [-1, 1] as a 16-bit file, without soundfile.

    Args:
        file: the file to write.
        sound: the waveform; values outside of [-1, 1] are clipped.
        sample_rate: in Hz.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_wave(Path(folder, "a.wav"), torch.zeros(1, 8), sample_rate=16000)
        ...     Path(folder, "a.wav").stat().st_size
        60
    """
    samples = (_clipped(sound).T * 32767).round().to(torch.int16).contiguous().numpy()
    with wave.open(str(file), "wb") as out:
        out.setnchannels(samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(samples.astype("<i2").tobytes())
