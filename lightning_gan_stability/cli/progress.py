"""The progress bar of a run from the command line."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar


class StepsProgressBar(TQDMProgressBar):
    """Lightning's bar, which counts to the run's last step if the epoch ends no sooner, also after a resume."""

    def __init__(self) -> None:
        super().__init__()
        self._done = 0  # batches of the epoch that a run goes on in

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the epoch, at most those until ``max_steps``."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        return min(trainer.num_training_batches, trainer.max_steps - trainer.global_step + self._done)

    def on_train_start(self, *args: Any) -> None:
        """Know the end of an epoch that a run goes on in, which begins with no hook of its own."""
        super().on_train_start(*args)
        self._done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        total = self.total_train_batches
        self.train_progress_bar.total = None if math.isinf(total) else total
        self.train_progress_bar.set_description(f"Epoch {self.trainer.current_epoch}")

    def on_train_epoch_start(self, *args: Any) -> None:
        """Count from the start."""
        self._done = 0
        super().on_train_epoch_start(*args)
