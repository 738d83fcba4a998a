"""What two optimizers under manual optimization need of Lightning: one clock, one source of noise, one record."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gan_stability import doors
from lightning_gan_stability.callbacks.base import (
    NETWORKS,
    Alternating,
    GANCallback,
    Player,
    Regularizer,
    UpdateRule,
    check_positive_int,
)
from lightning_gan_stability.processes import Processes, name_what_cannot_be_read

# as in lightning.pytorch.cli, which takes long to import
OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

PLAYERS: tuple[Player, ...] = ("d", "g")


@dataclass
class Moment:
    """What holds for the step at hand; apart from the module, because setting a module's attribute is slow.

    Attributes:
        in_step: inside ``training_step``, whose noise is its own.
        draw: draws of noise since the step began.
        rows: start, stop and size of the batch that a micro-batch is taken from.
        moved: the players whose optimizers have stepped on this batch.
        shown: somebody looks at this step's values.
        compiled: a network is compiled; None: nobody has looked yet.
        differentiate: what of a play due penalties differentiate by.
        terms: the terms of each player's loss.
        judged: the logits of real and fake samples that the discriminator's gradient was taken from.
        logs: the last value of everything that is logged.
        unchecked: step, player and values that may not be finite.
    """

    in_step: bool = False
    draw: int = 0
    rows: tuple[int, int, int] | None = None
    moved: set[Player] = field(default_factory=set)
    shown: bool = False
    compiled: bool | None = None
    differentiate: frozenset[str] = frozenset()
    terms: dict[Player, dict[str, Tensor]] = field(default_factory=lambda: {"d": {}, "g": {}})
    judged: tuple[Tensor, Tensor] | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)
    unchecked: list[tuple[int, Player, dict[str, Tensor]]] = field(default_factory=list)


class Clockwork(Processes):
    """The base of :class:`~lightning_gan_stability.module.GANModule`: everything that is not about networks and losses.

    Args:
        make_optimizer: each player's optimizer from its parameters; None: Adam(lr=2e-4, betas=(0.5, 0.999)).
        make_scheduler: each player's learning rate scheduler from its optimizer; None: a constant rate.
    """

    clip_norm: float | None
    accumulate: int
    noise_seed: int

    def __init__(
        self,
        make_optimizer: Mapping[Player, OptimizerCallable | None],
        make_scheduler: Mapping[Player, LRSchedulerCallable | None],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._missed = set()
        self._make_optimizer = make_optimizer
        self._make_scheduler = make_scheduler
        self.iteration = 0
        self._steps: dict[Player, int] = {"d": 0, "g": 0}  # batches on which a player has moved
        self._identity = object()  # tells this module from every other; a copy has its own
        self._first_step = 0
        self._monitored = False
        self._now = Moment()

    # ---------- the set-up

    def setup(self, stage: str) -> None:
        """Refuse what cannot work."""
        name_what_cannot_be_read(self.trainer.strategy.checkpoint_io)
        if stage != "fit":
            return
        self._check_strategy()
        if any(isinstance(c, ModelCheckpoint) and c._train_time_interval is not None for c in self._callbacks()):
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) saves nothing under manual optimization, which GANModule "
                "uses: set every_n_train_steps instead."
            )
        # Lightning asks for the state before the step; resuming exactly needs the one after it, which it saves
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        self._rule()

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The two optimizers, discriminator first, and the schedulers; keep the order when you override it.

        Schedulers step after each step of their optimizer, whatever ``interval`` they come with.
        A further optimizer is yours to step, in ``training_step`` after ``super()``: as
        ``self.trainer.optimizers[2].step()``, because one of ``self.optimizers()`` would count as another batch.
        """
        optimizers, schedulers = [], []
        for player, network in NETWORKS.items():
            make_optimizer = self._make_optimizer[player] or _adam
            optimizers.append(make_optimizer(self.get_submodule(network).parameters()))
            if make := self._make_scheduler[player]:
                schedulers.append(make(optimizers[-1]))
                if isinstance(schedulers[-1], dict):
                    raise MisconfigurationException(
                        f"`{player}_scheduler` must make a scheduler, got a dict: it steps after each of the player's "
                        "steps, so `interval`, `frequency` and `monitor` have no use."
                    )
        return optimizers, schedulers

    def on_train_epoch_end(self) -> None:
        """Say so if there was nothing to train on."""
        if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            raise MisconfigurationException("The training loader has no batches: is its data set smaller than a batch?")

    def on_fit_end(self) -> None:
        """Say so if there was nothing to train on, and Lightning knew without a look."""
        if self.trainer.num_training_batches == 0:
            raise MisconfigurationException("The training loader has no batches: is its data set smaller than a batch?")

    # ---------- the clock

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One GAN step on one batch by the run's update rule; ``iteration`` and ``global_step`` rise by one."""
        rule = self._rule()
        rule.check_plan(self)  # type: ignore[arg-type]
        now = self._now
        now.draw, now.rows, now.moved, now.in_step, now.shown = 0, None, set(), True, self._is_shown()
        now.compiled = None
        rescued = False
        try:
            rule(self, batch)  # type: ignore[arg-type]
        except FloatingPointError:
            rescued = any(callback.rescue(self.trainer, self) for callback in self._gan_callbacks())  # type: ignore[arg-type]
            if not rescued:
                raise
        finally:
            now.in_step, now.rows, now.differentiate = False, None, frozenset()
        if not now.moved:
            # one batch is one global_step, also when a rule leaves both players where they are
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
        if rescued:
            now.moved, now.unchecked, now.logs = set(), [], {}
            return
        self.iteration += 1
        for player in now.moved:
            self._steps[player] += 1
        if now.shown:
            self._log()

    @property
    def moved(self) -> frozenset[Player]:
        """The players that stepped on the last batch, or so far on the batch at hand."""
        return frozenset(self._now.moved)

    def _step(self, player: Player, schedule: bool = True) -> None:
        """Step a player's optimizer and scheduler; Lightning counts the first optimizer step of a batch alone."""
        optimizer = self._optimizer(player)
        if self._now.moved:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, _nothing)
        else:
            optimizer.step()
        self._now.moved.add(player)
        for config in self.trainer.lr_scheduler_configs:
            if schedule and config.scheduler.optimizer is optimizer.optimizer:
                config.scheduler.step()  # type: ignore[call-arg]

    def _moving(self, player: Player) -> list[nn.Parameter]:
        """The parameters that a player's optimizer steps."""
        groups = self._optimizer(player).param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _optimizer(self, player: Player) -> LightningOptimizer:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        return optimizers[PLAYERS.index(player)]

    def _rule(self) -> UpdateRule:
        rules = [callback for callback in self._callbacks() if isinstance(callback, UpdateRule)]
        if len(rules) > 1:
            names = " and ".join(type(rule).__name__ for rule in rules)
            raise MisconfigurationException(f"{names} are update rules, and a run has one: remove all but one.")
        return rules[0] if rules else _ALTERNATING

    def _due(self, player: Player) -> list[Regularizer]:
        regularizers = (callback for callback in self._callbacks() if isinstance(callback, Regularizer))
        return [r for r in regularizers if r.player == player and self._steps[player] % r.every == 0]

    def _may_be_rescued(self) -> bool:
        return any(callback.rescues for callback in self._gan_callbacks())

    def _gan_callbacks(self) -> list[GANCallback]:
        return [callback for callback in self._callbacks() if isinstance(callback, GANCallback)]

    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    # ---------- the noise

    def randn(self, n: int, *shape: int) -> Tensor:
        r"""Standard normal values (n, \*shape) from the module's own noise.

        Noise is a function of (``noise_seed``, rank, iteration, number of the draw): a resumed run draws what the
        uninterrupted one did, every rank draws its own, and the global random state is neither used nor changed. A
        micro-batch draws its rows of the whole batch's noise.

        Args:
            n: number of samples.
            shape: shape of one sample's noise.

        Raises:
            ValueError: if ``n`` is not a positive integer.

        Example:
            >>> from lightning_gan_stability import MLP, GANModule
            >>> GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).randn(2, 3).shape
            torch.Size([2, 3])
        """
        return self._noise(torch.randn, n, *shape)

    def rand(self, n: int, *shape: int) -> Tensor:
        r"""Values (n, \*shape), uniform in [0, 1), from the module's own noise; see :meth:`randn`.

        Example:
            >>> from lightning_gan_stability import MLP, GANModule
            >>> GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).rand(2).shape
            torch.Size([2])
        """
        return self._noise(torch.rand, n, *shape)

    def _noise(self, draw: Callable[..., Tensor], n: int, *shape: int) -> Tensor:
        check_positive_int("n", n)
        key = (self.noise_seed, self.global_rank, self.iteration, self._now.in_step, self._now.draw)
        self._now.draw += 1
        dtype = doors.dtype_of(self, torch.get_default_dtype())
        start, stop, total = (
            self._now.rows if self._now.rows and self._now.rows[1] - self._now.rows[0] == n else (0, n, n)
        )
        return doors.noise(draw, key, (total, *shape), self.device, dtype)[start:stop]

    def _micro_batches(self, batch: Any, n: int, pack: int) -> Iterator[tuple[Any, float]]:
        """The parts of a batch of n samples and their shares of it; gradients are exchanged on the last one alone.

        Samples that are judged together, in packs, stay together; an incomplete last pack is left out.
        """
        whole = n - n % pack
        if self.accumulate == 1 or whole == 0:  # which `play` refuses
            yield batch, 1
            return
        draw, size = self._now.draw, pack * math.ceil(whole / pack / self.accumulate)
        for start in range(0, whole, size):
            stop = min(start + size, whole)
            self._now.draw, self._now.rows = draw, (start, stop, whole)
            with nullcontext() if stop == whole else self._without_exchange():
                yield apply_to_collection(batch, Tensor, _take_rows, start, stop, n), (stop - start) / whole
        self._now.rows = None

    def _without_exchange(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    # ---------- the record

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check and clip the gradient; here, because here a gradient scaler has unscaled it."""
        player = next((p for p, o in zip(PLAYERS, self.trainer.optimizers, strict=False) if o is optimizer), None)
        if player is None:
            return  # a further optimizer, which is the subclass's own
        self._reshard()
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in moving if p.grad is not None])
        if isinstance(total, DTensor):  # of torch 2.9 each process's part, and clipping would add its ε to each
            total = total.redistribute(placements=[Replicate()] * total.device_mesh.ndim)
        norm = {f"{player}/grad_norm": doors.whole(total)}
        self._now.logs.update(norm)
        # a gradient scaler skips the steps whose gradient overflows, and is right to
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self._now.unchecked.append((self.iteration, player, self._now.terms[player] | ({} if scaled else norm)))
        if self._now.shown or self.device.type == "cpu" or self._may_be_rescued():
            # elsewhere a look costs a synchronization: values wait until they are logged or saved
            self._raise_unless_finite()
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(moving, self.clip_norm, total)

    def _raise_unless_finite(self) -> None:
        unchecked, self._now.unchecked = self._now.unchecked, []
        names = [(step, player, f"`{name}`") for step, player, values in unchecked for name in values]
        looks = [x for *_, values in unchecked for x in values.values()]
        if self.device.type == "cpu" or not looks:
            finite = [math.isfinite(x.item()) for x in looks]
        else:  # the device is waited for once, not once for each value
            finite = torch.stack([x.isfinite().all().to(self.device) for x in looks]).tolist()
        bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
        if self._may_be_rescued():  # all ranks go back, or none
            count = torch.tensor(float(len(bad)), device=self.device)
            if self.trainer.strategy.reduce(count, reduce_op="sum") > 0 and not bad:
                raise FloatingPointError("Not finite in another process's update.")
        if bad:
            step, player, _ = bad[0]
            terms = ", ".join(name for s, p, name in bad if (s, p) == (step, player))
            raise FloatingPointError(
                f"Not finite in the {NETWORKS[player]}'s update at step {step}: {terms}. If the data are finite, "
                f"lower the learning rate of `{player}_optimizer`, or of the other player's, set `clip_norm`, or add "
                "R1Penalty."
            )

    def on_train_start(self) -> None:
        """Find out which steps somebody will look at."""
        self._now = Moment(draw=self._now.draw)  # without a trace of the fit before
        self._name_shards()
        self._first_step = self.trainer.global_step
        shown = [f"{{{getattr(c, 'monitor', '')}}}{getattr(c, 'filename', '')}" for c in self._callbacks()]
        self._monitored = any(key in text for key in ("{d/", "{g/", "{balance/") for text in shown)

    def _is_shown(self) -> bool:
        # logging costs as much as a small network's step, so it waits for a step that somebody looks at
        trainer = self.trainer
        return (
            trainer._logger_connector.should_update_logs
            or trainer.global_step in (self._first_step, trainer.max_steps - 1)
            or trainer.is_last_batch
            or self._monitored
        )

    def _log(self) -> None:
        self._raise_unless_finite()
        for name, value in self._now.logs.items():
            self.log(name, value, prog_bar=name.endswith("/adversarial"), sync_dist=True)

    def _set_hparams(self, hp: Any) -> None:
        # plain data alone: live networks would be copied, pickled and logged
        given = self._to_hparams_dict(hp)
        plain = {name: value for name, value in given.items() if doors.is_plain(value)}
        lost = [n for n, v in given.items() if n not in plain and not (isinstance(v, nn.Module) or callable(v))]
        if lost:
            rank_zero_warn(
                "Of a module's arguments checkpoints keep numbers, strings, lists and dicts, and not "
                f"{', '.join(lost)}: give what is left out to `load_from_checkpoint` again."
            )
        super()._set_hparams(plain)


_ALTERNATING = Alternating()


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999))


def _nothing() -> None:
    """The closure of a step whose gradient is there already."""


def _take_rows(tensor: Tensor, start: int, stop: int, n: int) -> Tensor:
    return tensor[start:stop] if tensor.dim() and len(tensor) == n else tensor
