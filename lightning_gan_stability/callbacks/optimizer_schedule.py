"""Learning rates, betas and other numbers of optimizers that change over a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check, check_choice
from lightning_gan_stability.callback import GANCallback, as_gan
from lightning_gan_stability.outputs import PLAYERS, Player
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class OptimizerSchedule(GANCallback):
    """Sets numbers of the optimizers' parameter groups before every batch.

    ``OptimizerSchedule({"lr": Schedule(2e-4, 5e-5, 78125), "betas.1": Schedule(0.9, 0.99, 78125)})`` is R3GAN's, with
    the lengths of FFHQ: 20 million images in batches of 256. "The GAN is dead; long live the GAN!",
    https://arxiv.org/abs/2501.05441.

    Args:
        values: numbers or schedules by the keys of parameter groups, such as ``"lr"``, ``"weight_decay"``,
            ``"momentum"``, or ``"betas.0"`` and ``"betas.1"``.
        player: whose optimizer: ``"d"`` or ``"g"``; None: both.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if an optimizer has no such number, or if it has a scheduler for its learning rate
            too.

    Example:
        >>> from lightning_gan_stability import Schedule
        >>> OptimizerSchedule({"lr": Schedule(1e-3, 0.0, 100)}, player="d").players
        ('d',)
    """

    def __init__(self, values: dict[str, Scheduled], player: Player | None = None) -> None:
        super().__init__()
        known = isinstance(values, Mapping) and bool(values) and all(isinstance(key, str) for key in values)
        check(known, "values", "a dict of numbers or schedules by the keys of parameter groups", values)
        self.values = {key: check_scheduled(f"values[{key!r}]", value) for key, value in values.items()}
        player = check_choice("player", player, (*PLAYERS, None))
        self.players: tuple[Player, ...] = PLAYERS if player is None else (player,)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what no optimizer has, or what somebody else sets."""
        super().on_train_start(trainer, pl_module)
        module = as_gan(pl_module)
        for player in self.players:
            optimizer = module.optimizer(player).optimizer
            for key in self.values:
                for group in optimizer.param_groups:
                    self._check_key(key, group, type(optimizer).__name__)
            scheduled = any(config.scheduler.optimizer is optimizer for config in trainer.lr_scheduler_configs)
            if scheduled and "lr" in self.values:
                raise MisconfigurationException(
                    f"OptimizerSchedule sets `lr` of the optimizer {player!r}, which has a scheduler for it too: "
                    f"remove `{player}_scheduler`, or `lr` from OptimizerSchedule."
                )

    def _check_key(self, key: str, group: dict[str, Any], optimizer: str) -> None:
        name, _, index = key.partition(".")
        value = group.get(name)
        numbers = value if isinstance(value, tuple) else (value,)
        fits = (index.isdigit() and int(index) < len(numbers)) if isinstance(value, tuple) else not index
        if name not in group or name == "params" or not fits or any(isinstance(x, bool) for x in numbers):
            known = [k for k, v in group.items() if isinstance(v, int | float) and not isinstance(v, bool)]
            known += [f"{k}.{i}" for k, v in group.items() if isinstance(v, tuple) for i in range(len(v))]
            raise MisconfigurationException(
                f"OptimizerSchedule sets {key!r}, which {optimizer} does not have: it has {', '.join(known)}."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the numbers."""
        module = as_gan(pl_module)
        for key, value in self.values.items():
            name, _, index = key.partition(".")
            number = value_at(value, module.iteration)
            for group in (g for player in self.players for g in module.optimizer(player).param_groups):
                if index:
                    numbers = list(group[name])
                    numbers[int(index)] = number
                    group[name] = tuple(numbers)
                elif isinstance(group[name], Tensor):  # of a capturable optimizer
                    group[name].fill_(number)
                else:
                    group[name] = number
