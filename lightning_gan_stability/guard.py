"""Guard, the callback that checks a run and its gradients, and saves the state in which a run is stopped."""

from __future__ import annotations

import inspect
import logging
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gan_stability._compat import is_wrapped_by_compile, saves_by_time
from lightning_gan_stability.callback import GANCallback, callbacks_of, find_rule
from lightning_gan_stability.distributed import any_rank, is_distributed
from lightning_gan_stability.environment import describe_environment
from lightning_gan_stability.events import EventLog
from lightning_gan_stability.layers import parameter_dtype
from lightning_gan_stability.monitored import Monitored
from lightning_gan_stability.outcome import Outcome, describe_outcome, joined
from lightning_gan_stability.outputs import NETWORKS, StepRecord
from lightning_gan_stability.resuming import Resuming
from lightning_gan_stability.saving import save_whole
from lightning_gan_stability.sharding import check_equal_batches, check_strategy, exchange_own_gradients
from lightning_gan_stability.signals import SignalHold

if TYPE_CHECKING:
    from lightning_gan_stability.module import GANModule


class Guard(Callback):
    """Accompanies one GANModule in a run, so that the module's hooks remain free for subclasses.

    :meth:`GANModule.configure_callbacks` attaches it, after the user's callbacks and before checkpoints. It does
    nothing for other modules that the same Trainer fits.

    Args:
        module: the GAN.
    """

    def __init__(self, module: GANModule) -> None:
        self.module = module
        self.attached = False  # Lightning has called it; while it tries batch sizes out, it calls no callback
        self._monitored = False
        self._first_step = 0
        self._seen: StepRecord | None = None
        self._reached = False  # a training step of this fit has come to the package's
        self._running = False
        self._signals = SignalHold(rank_zero_info)
        self._read = Monitored()
        self._resuming = Resuming()
        self._events: EventLog | None = None

    def is_visible(self, trainer: Trainer) -> bool:
        """Whether this step's values are logged or used: logging costs as much as the step of a small network."""
        step = trainer.global_step
        return not trainer.barebones and (
            (trainer.log_every_n_steps and (step + 1) % trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]
            or step in (self._first_step, trainer.max_steps - 1)
            or trainer.is_last_batch
            or trainer.should_stop
            or self._monitored
        )

    # ---------- before a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse configurations that cannot work, before a checkpoint is read."""
        if pl_module is not self.module:
            return
        module, self.attached = self.module, True
        if isinstance(trainer.precision_plugin, DoublePrecision):
            module.double()  # Lightning does so after it has read the checkpoint, which would be rounded
        if module.loss.judges_reconstructions and module.packing > 1:
            raise MisconfigurationException(
                f"{type(module.loss).__name__} judges each sample by its reconstruction, and Packed judges "
                f"{module.packing} together: use another loss, or the discriminator without Packed."
            )
        for evaluation, limit in (("validate", "limit_val_batches"), ("test", "limit_test_batches")):
            if stage == evaluation and getattr(trainer, limit) == 0:
                raise MisconfigurationException(f"{limit}=0 leaves nothing to {evaluation}: leave it out.")
        if stage == "fit":
            self._check_settings(trainer)
            self._read.check(trainer)
            save_whole(trainer)
            # Lightning asks for the state before the step; resuming exactly needs the one after it, which it saves
            warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
            find_rule(trainer)

    def _check_settings(self, trainer: Trainer) -> None:
        module = self.module
        if any(saves_by_time(callback) for callback in callbacks_of(trainer, Callback)):
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) saves nothing under manual optimization, which GANModule "
                "uses: set every_n_train_steps instead."
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "`training_step(dataloader_iter)` takes batches by itself, and GANModule takes one batch a step: use "
                "`training_step(batch, batch_idx)`."
            )
        if is_wrapped_by_compile(module):
            raise MisconfigurationException(
                "torch.compile(gan) compiles both players' steps as one graph, which cannot hold penalties or update "
                "rules: use GANModule(compile=True), which compiles the networks."
            )
        for callback in module.engine.callbacks():
            if callback.keeps_graphs and module.accumulate > 1:
                name = type(callback).__name__
                raise MisconfigurationException(
                    f"{name} weighs terms by the gradients of a whole batch, which accumulate={module.accumulate} "
                    f"would take apart: use accumulate=1, or remove {name}."
                )
        if module.loss.couples_batch and module.accumulate > 1:
            raise MisconfigurationException(
                f"{type(module.loss).__name__} compares each sample with the mean of its batch, which accumulate="
                f"{module.accumulate} would take over micro-batches: use accumulate=1, or the pairwise Relativistic "
                "loss."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse networks in eval mode and wrong optimizers; compile the networks."""
        if pl_module is not self.module:
            return
        module = self.module
        if not module.training:
            raise MisconfigurationException(
                "The module is in eval mode, in which BatchNorm, dropout and spectral norm do not train: call "
                "`module.train()` before `fit`."
            )
        module.sharding.prepare()
        for network in (module.generator, module.discriminator, module):
            # known from here on, although parameters are frozen later for a turn
            parameter_dtype(network, torch.float32)
        self._check_optimizers(trainer)
        self._resuming.note(trainer)
        for player in module.plan:
            if not module.trainable_parameters(player):
                raise MisconfigurationException(
                    f"All parameters of the {NETWORKS[player]} are frozen, but it stands in `module.plan`: "
                    f"{module.plan}. Unfreeze it, or set `module.plan` to the other player."
                )
        if module.average_rests and module.generator_ema is not None:
            rank_zero_warn(
                "The module has an average of its generator from an earlier run, which `sample` draws from in eval "
                "mode, but no GeneratorEMA moves it: add one, or set `module.generator_ema = None`."
            )
        if isinstance([*module.discriminator.modules()][-1], nn.Sigmoid) and not module.loss.judges_reconstructions:
            rank_zero_warn("The discriminator ends in a Sigmoid, but losses take logits: remove it.")
        module.compile_networks()

    def _check_optimizers(self, trainer: Trainer) -> None:
        """Refuse wrong results of an overridden `configure_optimizers`, and optimizers that recompute the loss."""
        optimizers = trainer.optimizers
        if len(optimizers) < len(NETWORKS):
            raise MisconfigurationException(
                f"`configure_optimizers` must return two optimizers, the discriminator's first, got {len(optimizers)}."
            )
        parts = [{id(p) for p in self.module.get_submodule(network).parameters()} for network in NETWORKS.values()]
        for optimizer, player, own, other in zip(optimizers, NETWORKS, parts, reversed(parts), strict=False):
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if stepped & other and not stepped & own:
                raise MisconfigurationException(
                    f"The {NETWORKS[player]}'s optimizer has the other network's parameters: `configure_optimizers` "
                    "must return the discriminator's optimizer first."
                )
            if isinstance(optimizer, torch.optim.LBFGS):
                raise MisconfigurationException(
                    f"The {NETWORKS[player]}'s optimizer is LBFGS, which takes the loss anew within a step, as no "
                    "update rule here does: use another optimizer."
                )
            for config in trainer.lr_scheduler_configs:
                waits = isinstance(config.scheduler, ReduceLROnPlateau) or config.monitor is not None
                if config.scheduler.optimizer is optimizer and (
                    waits or config.frequency != 1 or config.interval not in ("step", "epoch")
                ):
                    raise MisconfigurationException(
                        f"`{player}_scheduler` is {type(config.scheduler).__name__} with "
                        f"interval={config.interval!r}, monitor={config.monitor!r} and frequency={config.frequency}, "
                        "but schedulers step after every optimizer step (interval='step') or epoch "
                        "(interval='epoch') here, and wait for no metric: use a scheduler that counts."
                    )
                if config.scheduler.optimizer is optimizer and not self._can_step(config.scheduler):
                    raise MisconfigurationException(
                        f"`step` of {type(config.scheduler).__name__} takes arguments, which only you know: override "
                        "`lr_scheduler_step(scheduler, metric)`, where `self.steps` (without the batch at hand) and "
                        "`self.current_epoch` count."
                    )

    def _can_step(self, scheduler: Any) -> bool:
        """Whether Lightning's `lr_scheduler_step`, possibly overridden, can step a scheduler."""
        if is_overridden("lr_scheduler_step", self.module):
            return True
        try:
            inspect.signature(scheduler.step).bind()
        except TypeError:
            return False
        return True

    # ---------- during a run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out which steps are logged or used."""
        if pl_module is not self.module:
            return
        module = self.module
        self._resuming.take(trainer)
        module.last_step = StepRecord()
        module.engine.start()
        module.sharding.note_shards()
        exchange_own_gradients(trainer)
        module.sharding.note_exchanged()
        self._first_step, self._reached = trainer.global_step, False
        callbacks = callbacks_of(trainer, Callback)
        shown = [f"{{{getattr(c, 'monitor', '')}}}{getattr(c, 'filename', '')}" for c in callbacks]
        self._monitored = any(key in text for key in ("{d/", "{g/", "{balance/") for text in shown)
        self._read.start(trainer)
        self._running = True
        self._signals.start()
        self._note_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse processes with different numbers of batches."""
        if pl_module is self.module:
            check_equal_batches(trainer, pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Store the record of the previous step; refuse a module that was put into eval mode."""
        if pl_module is self.module and not pl_module.training:
            raise MisconfigurationException(
                "The module is in eval mode in the middle of training, in which BatchNorm, dropout and the average are "
                "those of evaluation: call `module.train()` after `module.eval()`."
            )
        self._seen = self.module.last_step
        if self._running:
            self._read.before_batch(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check and clip the gradient; at this point a gradient scaler has unscaled it."""
        if pl_module is self.module:
            self.module.engine.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a training step that skips the package's; handle signals that have arrived."""
        if pl_module is not self.module:
            return
        callbacks = self.module.engine.callbacks()
        if not self._reached:
            self._reached = self.module.last_step is not self._seen
            if not self._reached:
                self._refuse_other_steps(callbacks)
        for callback in callbacks:
            callback.iteration, callback.global_step = self.module.iteration, trainer.global_step
        step = self.module.last_step
        self._read.after_batch(trainer, pl_module, bool(step.moved) and self.module.iteration != step.iteration + 1)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._note(lambda events: events.observe(trainer.global_step, self._outcome(trainer)))
        self._release_signals()

    def _refuse_other_steps(self, callbacks: list[GANCallback]) -> None:
        """Refuse a training step that does not call the package's on its first batch, if something would be lost."""
        module = self.module
        lost = [type(callback).__name__ for callback in callbacks]
        lost += ["accumulate"] if module.accumulate > 1 else []
        lost += [f"{player}_scheduler" for player, make in module.make_scheduler.items() if make is not None]
        if lost:
            names = ", ".join(dict.fromkeys(lost))
            raise MisconfigurationException(
                f"`training_step` of {type(module).__name__} never calls `super().training_step(batch, batch_idx)`, "
                f"so that {names} would do nothing: call it, write an UpdateRule for other steps, or remove {names}."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals at once, if a single process trains: no batch is interrupted."""
        if self._running:
            self._read.before_validation(trainer)
            if not is_distributed():
                self._signals.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold signals back again; with several processes, first handle those that have arrived."""
        if self._running:
            self._read.after_validation(trainer, pl_module)
            self._release_signals()
            self._signals.start()

    def _release_signals(self) -> None:
        """Handle signals, on all processes if one has received any: their handlers save a checkpoint together."""
        self._signals.release(lambda come: any_rank(come, self.module.device))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there was nothing to train on; hide values that were not measured at this step."""
        if pl_module is not self.module:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            raise MisconfigurationException(_NO_BATCHES)
        self._read.after_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handling of signals and each EarlyStopping."""
        if self._running:
            self._release_signals()
            self._read.stop(trainer)
        self._running = False
        self._signals.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore signals and EarlyStopping; name the file if a checkpoint could not be read."""
        if self._running:
            self._read.stop(trainer, failed=True)
        self._running = False
        self._signals.stop(run_handlers=False)
        if pl_module is self.module:
            stopped = f"{type(exception).__name__}: {exception}".rstrip(": ").partition("\n")[0]
            self._note_end(trainer, stopped)
            self._say_outcome(trainer, stopped)
        path = trainer.ckpt_path
        if path is not None and Path(path).is_file() and not zipfile.is_zipfile(path):
            # torch's own errors are as bare as "Invalid argument"
            cause = f"{type(exception).__name__}: {exception}".rstrip(": ")
            raise RuntimeError(
                f"The checkpoint {path} cannot be read ({cause}): if it is torn, resume from the one before."
            ) from exception

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there was nothing to train on and Lightning knew so beforehand."""
        if pl_module is self.module and trainer.num_training_batches == 0:
            raise MisconfigurationException(_NO_BATCHES)
        if pl_module is self.module:
            self._note_end(trainer)
            self._say_outcome(trainer)

    # ---------- what is said of the run

    def _outcome(self, trainer: Trainer) -> Outcome:
        """The outcomes of all callbacks."""
        return joined(callback.outcome(trainer) for callback in self.module.engine.callbacks())

    @rank_zero_only
    def _note_start(self, trainer: Trainer) -> None:
        """Start the file of events beside the log of values."""
        logs = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        folders = [folder for folder in logs if folder.is_dir()]  # on this machine
        if not folders:
            return
        self._events = EventLog(folders)
        environment = describe_environment(self.module.device, trainer.world_size, str(trainer.precision))
        max_steps = trainer.max_steps
        self._note(lambda events: events.start(trainer.global_step, max_steps, environment))

    def _note_end(self, trainer: Trainer, stopped: str = "") -> None:
        self._note(lambda events: events.end(trainer.global_step, self._outcome(trainer), stopped))
        self._events = None

    def _note(self, write: Callable[[EventLog], None]) -> None:
        """Write to the file of events if there is one; a full disk does not stop the run."""
        if self._events is None:
            return
        try:
            write(self._events)
        except OSError as error:
            self._events = None
            rank_zero_warn(f"What happens in this run is written down no longer: {error}. The run goes on.")

    @rank_zero_only
    def _say_outcome(self, trainer: Trainer, stopped: str = "") -> None:
        """Print the outcomes of the callbacks, if there are any."""
        if not logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO):
            return  # a script of many runs silences Lightning, and has words of its own
        known = self._outcome(trainer)
        if known.troubles or (any(known) and self.module.iteration):  # a refusal needs no table
            saved = Outcome(files=[("checkpoint", place) for place in _checkpoints(trainer)])
            print(describe_outcome(joined([saved, known]), trainer.global_step, stopped))

    # ---------- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save a state that may not be finite; add the options of the optimizers."""
        if pl_module is self.module:
            self.module.engine.check_finite()
            self._resuming.save(checkpoint)
            if not self.module.last_step.finished:
                rank_zero_warn(
                    "A checkpoint is saved inside of a step, on which one player may have moved and the other has not: "
                    "a run that goes on from it differs from an uninterrupted one. Go on from the one before."
                )
            if self.module.device_mesh is not None:  # strategies load shards one by one, and no extra state
                checkpoint["gan"] = self.module.get_extra_state()
            elif "_extra_state" in checkpoint.get("state_dict", {}):
                # Lightning's averages save a copy of the module, whose clock stands still
                checkpoint["state_dict"]["_extra_state"] = self.module.get_extra_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the extra state that is stored beside shards, and the options of the optimizers."""
        if pl_module is self.module:
            self._resuming.load(checkpoint)
            if self.module.device_mesh is not None:
                self.module.set_extra_state(checkpoint["gan"])


def _checkpoints(trainer: Trainer) -> list[str]:
    """Paths of the best and the last weights."""
    found = []
    for saves in callbacks_of(trainer, ModelCheckpoint):
        best, score = saves.best_model_path, saves.best_model_score
        if best:
            found.append(best if score is None else f"{best} (best {saves.monitor}: {float(score):.4g})")
        if saves.last_model_path and saves.last_model_path != best:
            found.append(f"{saves.last_model_path} (last)")
    return found


_NO_BATCHES = "The training loader has no batches: is its data set smaller than a batch?"


def check_run(trainer: Trainer, module: GANModule) -> None:
    """Refuse what would break the `setup` of other callbacks."""
    if trainer.state.fn != "fit":
        return
    check_strategy(trainer)
    if module.replays_graphs and isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "ModelParallelStrategy puts shards and full weights in turn into other places of the memory, and CUDA "
            "graphs read the same one each time: leave the mode that has them out of `compile`, or use strategy='ddp'."
        )


def find_guard(module: GANModule) -> Guard:
    """The guard of a module's run.

    Raises:
        MisconfigurationException: if there is none.
    """
    guard = module.guard
    if guard is None or not guard.attached:
        raise MisconfigurationException(
            f"`configure_callbacks` of {type(module).__name__} leaves out what GANModule returns there: return "
            "`[*super().configure_callbacks(), ...]`. It is the one hook that needs `super()`."
        )
    return guard
