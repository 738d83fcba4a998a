"""Resolves changed optimizers and schedulers when a run is resumed: uses new values, or refuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_gan_stability._checks import is_plain
from lightning_gan_stability.outputs import NETWORKS

KEY = "gan_optimizers"  # in a checkpoint
# options with a state of their own from the first step on, by optimizer
_REMEMBERED = {"RMSprop": ("centered", "momentum")}
Settings = dict[str, Any]


class Resuming:
    """Compares a run's optimizers and schedulers with those of its checkpoint's run.

    The optimizer state of a checkpoint contains the learning rate of that run, which Lightning restores regardless of
    how the optimizer was made. Checkpoints therefore also store the options of optimizers and schedulers. Differences
    on resume are changes by the user: new options of an optimizer are applied; other optimizers and schedulers are
    refused.
    """

    def __init__(self) -> None:
        self._given: list[Settings] = []
        self._before: list[Settings] | None = None

    def note(self, trainer: Trainer) -> None:
        """Store the options of this run, before a checkpoint's state is loaded.

        Raises:
            MisconfigurationException: if the checkpoint's run had other optimizers or schedulers.
        """
        schedulers = _by_optimizer(trainer)
        self._given = [_settings(optimizer, schedulers.get(id(optimizer))) for optimizer in trainer.optimizers]
        if self._before is not None:
            for name, given, before in zip(_names(len(self._given)), self._given, self._before, strict=False):
                _check(name, given, before)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the options of the run to a checkpoint."""
        checkpoint[KEY] = self._given

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the options of a checkpoint's run."""
        self._before = checkpoint.get(KEY)

    def take(self, trainer: Trainer) -> None:
        """Apply the options that the user has changed, after a checkpoint's state was loaded."""
        if self._before is None:
            return
        schedulers = _by_optimizer(trainer)
        rows = zip(_names(len(self._given)), trainer.optimizers, self._given, self._before, strict=False)
        for name, optimizer, given, before in rows:
            for i, (group, options, old) in enumerate(
                zip(optimizer.param_groups, given["groups"], before["groups"], strict=True)
            ):
                for key, value in options.items():
                    if value != old.get(key, value):
                        rank_zero_info(
                            f"{name}: goes on with `{key}` {value} instead of {old[key]}, which the run of the "
                            "checkpoint had."
                        )
                        _set(group, i, key, value, old[key], schedulers.get(id(optimizer)))
        self._before = None


def _by_optimizer(trainer: Trainer) -> dict[int, Any]:
    """The scheduler of each optimizer that has one, by the optimizer's identity."""
    return {id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs}


def _names(n: int) -> list[str]:
    return [f"The {network}'s optimizer" for network in NETWORKS.values()] + ["A further optimizer"] * (n - 2)


def _settings(optimizer: Optimizer, scheduler: Any) -> Settings:
    """What an optimizer and its scheduler were made with, as plain data."""
    return {
        "name": type(optimizer).__name__,
        "groups": [_options(group) for group in optimizer.param_groups],
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "scheduler_state": {} if scheduler is None else _arguments(scheduler.state_dict()),
    }


def _options(group: Mapping[str, Any]) -> Settings:
    options = {key: _number(value) for key, value in group.items() if key != "params"}
    if "initial_lr" in options:  # a scheduler may have moved the rate already
        options["lr"] = options.pop("initial_lr")
    return {key: value for key, value in options.items() if is_plain(value)}


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return [*value] if isinstance(value, tuple) else value


def _arguments(state: Mapping[str, Any]) -> Settings:
    """What a scheduler that has not stepped yet was made with, but for the rates, which are the optimizer's."""
    plain = {str(key): [*value] if isinstance(value, tuple) else value for key, value in state.items()}
    plain |= {key: {str(k): v for k, v in value.items()} for key, value in plain.items() if isinstance(value, Mapping)}
    kept = {k: v for k, v in plain.items() if is_plain(v) and k != "base_lrs" and not k.startswith("_")}
    return kept | {"_schedulers": [_arguments(part) for part in state.get("_schedulers", ())]}


def _check(name: str, given: Settings, before: Settings) -> None:
    for part, what in (("name", name), ("scheduler", f"{name.removesuffix('optimizer')}scheduler")):
        if given[part] != before[part]:
            raise MisconfigurationException(
                f"{what} is {given[part] or 'not there'}, and in the run of the checkpoint it was "
                f"{before[part] or 'not there'}: a run goes on with the one that it has. Give it that one, or begin a "
                "new run from the checkpoint's weights, by `load_from_checkpoint`."
            )
    if len(given["groups"]) != len(before["groups"]):
        raise MisconfigurationException(
            f"{name} has {len(given['groups'])} groups of parameters, and in the run of the checkpoint it had "
            f"{len(before['groups'])}: give it as many."
        )
    for new, old in zip(given["groups"], before["groups"], strict=True):
        for key in _REMEMBERED.get(given["name"], ("amsgrad",)):
            if new.get(key) and not old.get(key, True):
                raise MisconfigurationException(
                    f"{name} has `{key}`, and in the run of the checkpoint it had not: what it would go on from is not "
                    "in the checkpoint. Leave it out, or begin a new run from the checkpoint's weights, by "
                    "`load_from_checkpoint`."
                )
    changed = _changes(given["scheduler_state"], before["scheduler_state"])
    if changed:
        new, old = (", ".join(f"{key}={values[i]}" for key, values in changed.items()) for i in (0, 1))
        raise MisconfigurationException(
            f"{name.removesuffix('optimizer')}scheduler has {new}, and in the run of the checkpoint it had {old}: a "
            "run goes on with its schedule. Leave it as it was, or begin a new run from the checkpoint's weights, by "
            "`load_from_checkpoint`."
        )


def _changes(given: Settings, before: Settings) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in given.keys() & before.keys():
        if key == "_schedulers":
            for new, old in zip(given[key], before[key], strict=False):
                found |= _changes(new, old)
        elif given[key] != before[key]:
            found[key] = given[key], before[key]
    return found


def _set(group: dict[str, Any], index: int, key: str, value: Any, old: Any, scheduler: Any) -> None:
    """Change an option; a rate that a scheduler moves keeps its place in the schedule."""
    if key == "lr" and scheduler is not None:
        base = float(group.get("initial_lr", old))  # not `old` where the run itself has changed it
        now = float(group["lr"]) * (value / base) if base else value
        group["initial_lr"] = value
        for part in _with_parts(scheduler):
            if hasattr(part, "base_lrs"):
                part.base_lrs[index] = value
        value = now
    current = group.get(key)
    if isinstance(current, Tensor):
        current.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(current, tuple) else value


def _with_parts(scheduler: Any) -> Sequence[Any]:
    """A scheduler, and those that it holds."""
    held = [part for value in vars(scheduler).values() if isinstance(value, list | tuple) for part in value]
    parts = [part for part in held if hasattr(part, "optimizer") and hasattr(part, "step")]
    return [scheduler, *(inner for part in parts for inner in _with_parts(part))]
