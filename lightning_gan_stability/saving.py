"""Checkpoints that are there as a whole or not at all, wherever the system keeps its temporary files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lightning_gan_stability.files import written_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and then renames it.

    Lightning writes into the system's folder of temporary files and moves the file. Between two file systems, such as a
    node's own and one that all nodes see, a move is a copy: a process that is killed meanwhile leaves half of it, with
    the newest date.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     WholeCheckpointIO().save_checkpoint({"step": 1}, f"{folder}/last.ckpt")
        ...     [path.name for path in Path(folder).iterdir()]
        ['last.ckpt']
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint; the one that lies there stays until the new one is written."""
        if "://" in str(path):  # of other storage than a file system
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_whole(Path(path)) as beside:
            super().save_checkpoint(checkpoint, beside, storage_options)


def save_whole(trainer: Trainer) -> None:
    """Let a Trainer write whole checkpoints, unless the user has chosen another way to write them."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()
