"""Saves and restores the state of a run for rollbacks, and the remedies that a rollback applies."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import Any, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_gan_stability._checks import check_choice, check_number
from lightning_gan_stability._compat import averaged_model, scheduler_parts
from lightning_gan_stability.callback import GANCallback, Regularizer, callbacks_of
from lightning_gan_stability.callbacks.optimizer_schedule import OptimizerSchedule
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.outputs import PLAYERS, Player
from lightning_gan_stability.schedules import Schedule

State: TypeAlias = dict[str, Any]
Weights: TypeAlias = Sequence[tuple[str, float | dict[str, Any]]]


def take(trainer: Trainer, module: GANModule) -> State:
    """A copy in CPU memory of everything that training changes, except the data's position and ``global_step``."""
    state = {
        "module": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": [callback.state_dict() for callback in _rolled_back(trainer)],
        "averages": [(averaging.state_dict(), dict(average.state_dict())) for averaging, average in _averages(trainer)],
        "weights": weights_of(trainer),
    }
    return deepcopy(apply_to_collection(state, Tensor, lambda tensor: tensor.detach().cpu()))


def put_back(trainer: Trainer, module: GANModule, state: State) -> None:
    """Restore a state, so that training continues from it."""
    state = deepcopy(state)
    module.load_state_dict(state["module"])
    for optimizer, kept in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
        optimizer.zero_grad()  # a gradient of other weights
    for config, kept in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(kept)
    for callback, kept in zip(_rolled_back(trainer), state["callbacks"], strict=True):
        callback.load_state_dict(kept)
        callback.go_on(module)
    for (averaging, average), (kept, weights) in zip(_averages(trainer), state["averages"], strict=True):
        averaging.load_state_dict(kept)
        average.load_state_dict(weights)
    give_weights(trainer, state["weights"])


def weights_of(trainer: Trainer) -> Weights:
    """The name of each regularizer and its weight, or the arguments of its schedule."""
    weights = [(type(penalty).__name__, penalty.weight) for penalty in _penalties(trainer)]
    return [(name, asdict(weight) if isinstance(weight, Schedule) else weight) for name, weight in weights]


def give_weights(trainer: Trainer, weights: Weights) -> None:
    """Set the weights that :func:`weights_of` returned, for regularizers of the same names in their order."""
    left = list(weights)
    for penalty in _penalties(trainer):
        mine = next((entry for entry in left if entry[0] == type(penalty).__name__), None)
        if mine is not None:
            left.remove(mine)
            weight = mine[1]
            penalty.weight = Schedule(**weight) if isinstance(weight, Mapping) else weight


def _rolled_back(trainer: Trainer) -> list[GANCallback]:
    """The callbacks whose state belongs to the training; monitors keep their record."""
    return [callback for callback in callbacks_of(trainer, GANCallback) if callback.rolled_back]


def _averages(trainer: Trainer) -> list[tuple[WeightAveraging, AveragedModel]]:
    """Lightning's averages of the whole module, which belong to its weights."""
    found = ((averaging, averaged_model(averaging)) for averaging in callbacks_of(trainer, WeightAveraging))
    return [(averaging, average) for averaging, average in found if average is not None]


class Remedy(abc.ABC):
    """Base class of remedies: changes that a rollback makes so that a failure does not recur; YAML files can name them.

    Example:
        >>> class Clip(Remedy):
        ...     def __call__(self, trainer, module):
        ...         module.clip_norm = 1.0
        >>> isinstance(ScalePenalty(), Remedy)
        True
    """

    @abc.abstractmethod
    def __call__(self, trainer: Trainer, module: GANModule) -> None:
        """Change the run."""


class ScaleLearningRate(Remedy):
    """A remedy that multiplies learning rates, including the base rates of schedulers.

    Args:
        factor: a number above 0.
        player: ``"d"`` or ``"g"``; None: both.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> ScaleLearningRate(0.5, player="d").factor
        0.5
    """

    def __init__(self, factor: float = 0.5, player: Player | None = None) -> None:
        self.factor = check_number("factor", factor, positive=True)
        self.player = check_choice("player", player, (*PLAYERS, None))

    def __call__(self, trainer: Trainer, module: GANModule) -> None:
        """Multiply the rates."""
        if any("lr" in c.values for c in callbacks_of(trainer, OptimizerSchedule) if self.player in (*c.players, None)):
            raise MisconfigurationException(
                "OptimizerSchedule sets the learning rate on every batch, which ScaleLearningRate would change: remove "
                "`lr` from the one, or the other."
            )
        chosen = [module.optimizer(player).optimizer for player in PLAYERS if self.player in (player, None)]
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] *= self.factor
                for name in ("initial_lr", "max_lr", "min_lr"):  # of OneCycleLR
                    if name in group:
                        group[name] *= self.factor
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer in chosen:
                self._scale(config.scheduler)

    def _scale(self, scheduler: Any) -> None:
        for part in scheduler_parts(scheduler):
            self._scale(part)
        for name in ("base_lrs", "max_lrs"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * self.factor for rate in getattr(scheduler, name)])
        if hasattr(scheduler, "eta_min"):  # of cosine annealing, where rates end
            scheduler.eta_min *= self.factor


class ScalePenalty(Remedy):
    """A remedy that multiplies the weight of every regularizer in the run.

    Args:
        factor: a number above 0.

    Raises:
        ValueError: if ``factor`` has a bad value.

    Example:
        >>> ScalePenalty(10.0).factor
        10.0
    """

    def __init__(self, factor: float = 10.0) -> None:
        self.factor = check_number("factor", factor, positive=True)

    def __call__(self, trainer: Trainer, module: GANModule) -> None:
        """Multiply the weights."""
        penalties = _penalties(trainer)
        if not penalties:
            raise MisconfigurationException("ScalePenalty makes penalties stronger, but there is none: add R1Penalty.")
        for penalty in penalties:
            penalty.weight = self.factor * penalty.weight


def _penalties(trainer: Trainer) -> list[Regularizer]:
    return callbacks_of(trainer, Regularizer)  # type: ignore[type-abstract]
