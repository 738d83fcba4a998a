"""Schedules for learning rates, betas and other numbers of optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check, check_choice, check_number, check_share, is_number
from lightning_gan_stability.callback import GANCallback, as_gan, callbacks_of
from lightning_gan_stability.outputs import PLAYERS, Player
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class OptimizerSchedule(GANCallback):
    """Sets numbers of the optimizers' parameter groups before every batch.

    ``OptimizerSchedule({"lr": Schedule(2e-4, 5e-5, 78125), "betas.1": Schedule(0.9, 0.99, 78125)})`` is R3GAN's
    schedule for FFHQ: 20 million images in batches of 256. "The GAN is dead; long live the GAN!",
    https://arxiv.org/abs/2501.05441.

    Args:
        values: numbers or schedules by the keys of parameter groups, such as ``"lr"``, ``"weight_decay"``,
            ``"momentum"``, or ``"betas.0"`` and ``"betas.1"``.
        player: which optimizer: ``"d"`` or ``"g"``; None: both.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if an optimizer has no such number, or if a learning rate scheduler or another
            OptimizerSchedule sets the same number.

    Example:
        >>> from lightning_gan_stability import Schedule
        >>> OptimizerSchedule({"lr": Schedule(1e-3, 0.0, 100)}, player="d").players
        ('d',)
    """

    def __init__(self, values: dict[str, Scheduled], player: Player | None = None) -> None:
        super().__init__()
        known = isinstance(values, Mapping) and bool(values) and all(isinstance(key, str) for key in values)
        check(known, "values", "a dict of numbers or schedules by the keys of parameter groups", values)
        self.values = {key: _check_value(key, value) for key, value in values.items()}
        player = check_choice("player", player, (*PLAYERS, None))
        self.players: tuple[Player, ...] = PLAYERS if player is None else (player,)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse numbers that an optimizer does not have, or that are set elsewhere too."""
        super().on_train_start(trainer, pl_module)
        module = as_gan(pl_module)
        for other in callbacks_of(trainer, OptimizerSchedule):
            both = [key for key in self.values if key in other.values]
            if other is not self and both and {*self.players} & {*other.players}:
                raise MisconfigurationException(
                    f"Two OptimizerSchedules set {both[0]!r} of one optimizer: remove it from one of them."
                )
        for player in self.players:
            optimizer = module.optimizer(player).optimizer
            for key in self.values:
                for group in optimizer.param_groups:
                    self._check_key(key, group, type(optimizer).__name__)
            scheduled = any(config.scheduler.optimizer is optimizer for config in trainer.lr_scheduler_configs)
            if scheduled and "lr" in self.values:
                raise MisconfigurationException(
                    f"OptimizerSchedule sets `lr` of the optimizer {player!r}, which also has a scheduler: "
                    f"remove `{player}_scheduler`, or `lr` from OptimizerSchedule."
                )

    def _check_key(self, key: str, group: dict[str, Any], optimizer: str) -> None:
        known = [k for k, v in group.items() if _is_number(v)]
        known += [f"{k}.{i}" for k, v in group.items() if isinstance(v, tuple) for i in range(len(v))]
        if key not in known:
            raise MisconfigurationException(
                f"OptimizerSchedule sets {key!r}, which {optimizer} does not have: it has {', '.join(known)}."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the numbers."""
        module = as_gan(pl_module)
        for key, value in self.values.items():
            number = value_at(value, module.iteration)
            for group in (g for player in self.players for g in module.optimizer(player).param_groups):
                set_number(group, key, number)


def set_number(group: dict[str, Any], key: str, number: float) -> None:
    """Set a number of a parameter group.

    Args:
        group: parameter group of an optimizer.
        key: such as ``"lr"``, or ``"betas.0"`` of a tuple.
        number: its new value.

    Example:
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999)}
        >>> set_number(group, "betas.0", 0.5)
        >>> group["betas"]
        (0.5, 0.999)
    """
    name, _, index = key.partition(".")
    if index:
        numbers = list(group[name])
        numbers[int(index)] = number
        group[name] = tuple(numbers)
    elif isinstance(group[name], Tensor):  # of a capturable optimizer
        group[name].fill_(number)
    else:
        group[name] = number


def _check_value(key: str, value: Any) -> Scheduled:
    """Check a number or schedule against the range that torch's optimizers accept."""
    name, first = f"values[{key!r}]", key.partition(".")[0]
    if first == "betas":
        return check_scheduled(name, value, check_share, open_end=True)  # type: ignore[no-any-return]
    if first in ("lr", "weight_decay", "eps", "lr_decay"):
        return check_scheduled(name, value, check_number)  # type: ignore[no-any-return]
    return check_scheduled(name, value, _check_finite)  # type: ignore[no-any-return]


def _check_finite(name: str, value: Any) -> float:
    found: float = check(is_number(value), name, "a finite number", value)
    return found


def _is_number(value: Any) -> bool:
    tensor = isinstance(value, Tensor) and value.numel() == 1
    return tensor or (isinstance(value, int | float) and not isinstance(value, bool))
