"""What EarlyStopping and ModelCheckpoint read: each value when it is new, and none that nobody logs."""

from __future__ import annotations

import difflib
import math
import re
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_gan_stability._compat import check_on_train_epoch_end, save_triggers
from lightning_gan_stability.callback import GANCallback, callbacks_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gan_stability.callback import Cadence

#: Keys that begin like this are those of this package's callbacks.
PREFIXES = ("quality/", "health/", "balance/", "collapse/", "memorization/")


class Monitored:
    """The keys that a run's EarlyStopping and ModelCheckpoint read, of those that its callbacks log.

    Lightning reads the last value under a key whenever an epoch or a validation ends, whether it was measured since or
    not. Here, an EarlyStopping checks when a value is measured, and then alone; a ModelCheckpoint that saves at other
    steps is refused; and what cannot be foreseen (a last epoch that is cut short, an exception, a rollback) is
    saved with NaN for what was not measured of these weights, which is ranked last. While a callback tries something
    out (a race of Autopilot), no EarlyStopping checks, whatever it reads: what it would count may be put back.
    """

    def __init__(self) -> None:
        self._logged: dict[str, tuple[GANCallback, Cadence]] = {}
        self._stopping: dict[EarlyStopping, bool] = {}  # and the hook that each had checked in
        self._others: dict[EarlyStopping, bool] = {}  # which check by themselves
        self._tried = False  # this batch was somebody's try
        self._hidden: dict[str, Tensor] = {}
        self._validated = -1  # global step of the last validation

    # ---------- before a run

    def check(self, trainer: Trainer, lengths: bool = False) -> None:
        """Refuse keys that nobody logs, and files that would bear the values of other steps.

        Args:
            trainer: of the run.
            lengths: Lightning has counted the batches of an epoch.
        """
        callbacks = callbacks_of(trainer, GANCallback)
        self._logged = {key: (c, cadence) for c in callbacks for key, cadence in c.logged(trainer).items()}
        for callback in callbacks_of(trainer, Callback):
            for key in _keys(callback):
                if key in self._logged:
                    if isinstance(callback, ModelCheckpoint) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                        self._check_files(trainer, callback, key, lengths)
                elif key.startswith(PREFIXES):
                    self._refuse_unknown(callback, key)

    def _refuse_unknown(self, callback: Callback, key: str) -> None:
        prefix = f"{key.partition('/')[0]}/"
        known = sorted(name for name in self._logged if name.startswith(prefix))
        close = difflib.get_close_matches(key, known, 1)
        hint = f"there are {', '.join(known)}" if known else "add the callback that measures it"
        raise MisconfigurationException(
            f"{type(callback).__name__} reads `{key}`, which no callback of this run puts into "
            f"`trainer.callback_metrics`: {f'did you mean `{close[0]}`?' if close else f'{hint}.'} Keys of your own "
            f"must not begin with `{prefix}`."
        )

    def _check_files(self, trainer: Trainer, saves: ModelCheckpoint, key: str, lengths: bool) -> None:
        owner, cadence = self._logged[key]
        name, measures = type(saves).__name__, type(owner).__name__
        steps, _ = save_triggers(saves, trainer)
        if cadence == "validation":
            if steps:
                raise MisconfigurationException(
                    f"{name}(every_n_train_steps={steps}) reads `{key}`, which {measures} measures in validation, so "
                    "that files would bear the value of another step: remove every_n_train_steps, and it saves after "
                    "each validation."
                )
            return
        if cadence == "step" or (not steps and not lengths):
            return
        stride = steps or _epoch_stride(trainer, saves)
        if stride is None or stride % cadence:
            when = f"every {stride} steps" if stride else "at steps that are not known before"
            other = f", or {measures}(every={stride})" if stride else ""
            raise MisconfigurationException(
                f"{name} saves {when}{'' if steps else ', as epochs or validations end'}, and reads `{key}`, which "
                f"{measures} measures every {cadence} steps, so that files would bear the value of another step: set "
                f"every_n_train_steps={cadence} or a multiple of it{other}."
            )

    # ---------- during a run

    def start(self, trainer: Trainer) -> None:
        """Check once more with what is known by now; let each EarlyStopping check when its value is new."""
        self.check(trainer, lengths=True)
        self._validated = -1
        measured = {key for key, (_, cadence) in self._logged.items() if cadence != "step"}
        stopping = {stop: check_on_train_epoch_end(stop, False) for stop in callbacks_of(trainer, EarlyStopping)}
        self._stopping = {stop: hook for stop, hook in stopping.items() if stop.monitor in measured}
        self._others = {stop: hook for stop, hook in stopping.items() if stop not in self._stopping}
        self._let_none_check(trainer, False)

    def before_batch(self, trainer: Trainer) -> None:
        """Note whether somebody tries something out; put back what was hidden."""
        self._tried = _is_tried(trainer)
        self.show(trainer)

    def after_batch(self, trainer: Trainer, module: LightningModule, rolled_back: bool) -> None:
        """Let each EarlyStopping check if its value is of this step; hide those of weights that are there no more."""
        self._check_stopping(trainer, module, in_validation=False)
        if rolled_back:
            self._hide(trainer, callbacks_of(trainer, ModelCheckpoint), rolled_back=True)

    def before_validation(self, trainer: Trainer) -> None:
        """Let no EarlyStopping check by itself when validation ends."""
        self._let_none_check(trainer, True)

    def _let_none_check(self, trainer: Trainer, on_train_epoch_end: bool) -> None:
        """Send each EarlyStopping to the hook that does not come next; others only while somebody tries something."""
        for stop in self._stopping:
            check_on_train_epoch_end(stop, on_train_epoch_end)
        tried = self._tried or _is_tried(trainer)
        for stop, hook in self._others.items():
            check_on_train_epoch_end(stop, on_train_epoch_end if tried else hook)

    def after_validation(self, trainer: Trainer, module: LightningModule) -> None:
        """Let each EarlyStopping check if its value is of this validation; hide what files must not bear."""
        self._validated = trainer.global_step
        self._check_stopping(trainer, module, in_validation=True)
        self.before_validation(trainer)  # its own turn may come after this
        self._hide(trainer, callbacks_of(trainer, ModelCheckpoint))

    def after_epoch(self, trainer: Trainer) -> None:
        """Let no EarlyStopping check by itself; hide what files must not bear."""
        self._let_none_check(trainer, False)
        self._hide(trainer, callbacks_of(trainer, ModelCheckpoint))

    def show(self, trainer: Trainer) -> None:
        """Put back what was hidden."""
        trainer.callback_metrics.update(self._hidden)
        self._hidden = {}

    def stop(self, trainer: Trainer, failed: bool = False) -> None:
        """Leave each EarlyStopping as it was; hide what files that are saved on an exception must not bear."""
        self.show(trainer)
        if failed:
            self._hide(trainer, [c for c in callbacks_of(trainer, ModelCheckpoint) if c.save_on_exception])
            self._hidden = {}
        for stop, setting in (self._stopping | self._others).items():
            check_on_train_epoch_end(stop, setting)
        self._stopping, self._others = {}, {}

    def _check_stopping(self, trainer: Trainer, module: LightningModule, in_validation: bool) -> None:
        if self._tried or _is_tried(trainer):  # a race may begin or end with this batch
            return
        for stop in self._stopping:
            assert stop.monitor is not None
            _, cadence = self._logged[stop.monitor]
            there = stop.monitor in trainer.callback_metrics  # some take several measurements to come up
            if there and in_validation == (cadence == "validation") and self._is_new(trainer, stop.monitor):
                check_on_train_epoch_end(stop, False)
                stop.on_validation_end(trainer, module)

    def _is_new(self, trainer: Trainer, key: str) -> bool:
        _, cadence = self._logged[key]
        if cadence == "validation":
            return trainer.global_step == self._validated
        return cadence == "step" or trainer.global_step % cadence == 0

    def _hide(self, trainer: Trainer, saves: list[ModelCheckpoint], rolled_back: bool = False) -> None:
        metrics = trainer.callback_metrics
        read = {key for callback in saves for key in _keys(callback)}
        for key in read & {*self._logged} & {*metrics}:
            if not self._is_new(trainer, key) or (rolled_back and self._logged[key][1] != "step"):
                self._hidden.setdefault(key, metrics[key])
                metrics[key] = torch.full_like(metrics[key], math.nan)


def _is_tried(trainer: Trainer) -> bool:
    """Whether the weights at hand may be put back."""
    return any(callback.tries for callback in callbacks_of(trainer, GANCallback))


def _keys(callback: Callback) -> set[str]:
    """The keys that a callback of Lightning reads: what it monitors, and what the names of its files bear."""
    if not isinstance(callback, EarlyStopping | ModelCheckpoint):
        return set()
    names = re.findall(r"\{([^}:]+)", getattr(callback, "filename", None) or "")
    return {*names, *([callback.monitor] if callback.monitor is not None else [])}


def _epoch_stride(trainer: Trainer, saves: ModelCheckpoint) -> int | None:
    """The largest number of steps that every save at the end of an epoch or a validation is a multiple of."""
    epochs, batches = saves.every_n_epochs or 1, trainer.num_training_batches
    _, with_training_epochs = save_triggers(saves, trainer)
    between = batches if with_training_epochs else trainer.val_check_batch
    if not isinstance(batches, int) or not isinstance(between, int):
        return None
    if with_training_epochs:
        return batches * epochs
    if trainer.check_val_every_n_epoch is None:
        return between
    return (
        math.gcd(batches, between)
        if between != batches
        else batches * math.lcm(epochs, trainer.check_val_every_n_epoch)
    )
