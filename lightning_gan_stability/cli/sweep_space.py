"""The search space of a sweep, described once for Optuna, Ray Tune and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_gan_stability._checks import is_integer, is_number, require
from lightning_gan_stability.cli.diagnosis import meant

Kind = Literal["uniform", "log_uniform", "integer", "choice"]


@dataclass(frozen=True)
class Parameter:
    """A setting to search.

    Attributes:
        key: as on the command line of ``gan-stability fit``.
        kind: kind of the distribution.
        low: smallest value; None for a choice.
        high: largest value, which is included.
        log: whether orders of magnitude are equally likely.
        choices: the values of a choice.
    """

    key: str
    kind: Kind
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def labels(self) -> list[Any]:
        """The choices as numbers and text, which any database can hold."""
        return [label(value) for value in self.choices]

    def value(self, drawn: Any) -> Any:
        """The setting that a drawn number or label means."""
        return self.choices[self.labels.index(drawn)] if self.kind == "choice" else drawn

    def examples(self) -> list[Any]:
        """Values that tell whether the setting takes all of them."""
        return [*self.choices] if self.kind == "choice" else [self.low, self.high]

    def suggest(self, trial: Any) -> Any:
        """Draw from a trial of Optuna."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.labels)
        draw = trial.suggest_int if self.kind == "integer" else trial.suggest_float
        return draw(self.key, self.low, self.high, log=self.log)

    def for_optuna(self) -> Any:
        """The distribution of Optuna."""
        found = require("optuna.distributions", "sweep")
        if self.kind == "choice":
            return found.CategoricalDistribution(self.labels)
        kind = found.IntDistribution if self.kind == "integer" else found.FloatDistribution
        return kind(self.low, self.high, log=self.log)

    def for_ray(self) -> Any:
        """The distribution of Ray Tune, whose ranges of integers end before their last."""
        tune = require("ray.tune", "ray")
        if self.kind == "choice":
            return tune.choice(self.labels)
        if self.kind == "integer":
            return (tune.lograndint if self.log else tune.randint)(self.low, int(self.high or 0) + 1)
        return (tune.loguniform if self.log else tune.uniform)(self.low, self.high)

    def for_wandb(self) -> dict[str, Any]:
        """The entry of ``parameters`` in Weights & Biases, which puts values as they are behind ``--key=``."""
        if self.kind == "choice":
            return {"values": [on_line(value) for value in self.choices]}
        kinds = {
            ("uniform", False): "uniform",
            ("log_uniform", True): "log_uniform_values",
            ("integer", False): "int_uniform",
            ("integer", True): "q_log_uniform_values",
        }
        more = {"q": 1} if self.kind == "integer" and self.log else {}
        return {"distribution": kinds[self.kind, self.log], "min": self.low, "max": self.high} | more


def label(value: Any) -> Any:
    """A value as a number or text: a class by its name, and its arguments if it has any.

    Example:
        >>> label({"class_path": "FDivergence", "init_args": {"divergence": "kl"}}), label([0.5, 0.9]), label(2)
        ('FDivergence(divergence=kl)', '[0.5, 0.9]', 2)
    """
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{key}={label(part)}" for key, part in (value.get("init_args") or {}).items())
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name}({arguments})" if arguments else name
    return json.dumps(value) if isinstance(value, dict | list) else value


def on_line(value: Any) -> Any:
    """A value as it stands behind ``--key=``.

    Example:
        >>> on_line("Hinge"), on_line(None), on_line([0.5, 0.9]), on_line(0.1)
        ('Hinge', 'null', '[0.5, 0.9]', 0.1)
    """
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def rounded(value: Any) -> str:
    """A drawn value as tables have it.

    Example:
        >>> rounded(0.00123456), rounded("Hinge"), rounded(7)
        ('0.001235', 'Hinge', '7')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> list[str]:
    """Keys by as many of their last parts as tell them apart.

    Example:
        >>> short_names(["model.g_optimizer.lr", "model.d_optimizer.init_args.lr", "data.seed"])
        ['g_optimizer.lr', 'd_optimizer.lr', 'seed']
    """
    found = []
    for key in keys:
        parts = [part for part in key.split(".") if part != "init_args"]
        others = [[part for part in other.split(".") if part != "init_args"] for other in keys if other != key]
        n = next((n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others)), len(parts))
        found.append(".".join(parts[-n:]))
    return found


def read_space(given: Any) -> list[Parameter]:
    """Read the parameters of a section ``search_space``.

    Args:
        given: a distribution for each key: ``{log_uniform: [1e-5, 1e-2]}``, ``{uniform: [0, 1]}``,
            ``{integer: [1, 5]}``, optionally with ``log: true``, or ``{choice: [...]}``.

    Raises:
        ValueError: with the key, if a distribution is invalid.

    Example:
        >>> read_space({"trainer.max_steps": {"integer": [10, 20]}})[0].high
        20
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"`search_space` must have keys of settings and their distributions, got {given!r}.")
    return [_read(str(key), entry) for key, entry in given.items()]


def _read(key: str, entry: Any) -> Parameter:
    example = "such as {log_uniform: [1e-5, 1e-2]} or {choice: [Hinge, Wasserstein]}"
    if isinstance(entry, list):
        entry = {"choice": entry}
    if not isinstance(entry, Mapping) or not entry:
        raise ValueError(f"`search_space`: `{key}` must have a distribution {example}, got {entry!r}.")
    for name in entry:
        if name not in (*get_args(Kind), "log"):
            raise ValueError(f"`search_space`: `{key}` has no distribution `{name}`{meant(str(name), get_args(Kind))}")
    kinds: list[Kind] = [kind for kind in get_args(Kind) if kind in entry]
    if len(kinds) != 1:
        raise ValueError(f"`search_space`: `{key}` must have one distribution {example}, got {dict(entry)!r}.")
    (kind,), log = kinds, entry.get("log", kinds[0] == "log_uniform")
    if not isinstance(log, bool) or (log is not (kind == "log_uniform") and kind != "integer"):
        raise ValueError(f"`search_space`: `log` of `{key}` belongs beside `integer` and is true or false.")
    if kind == "choice":
        return Parameter(key, kind, choices=_choices(key, entry[kind]))
    low, high = _ends(key, kind, entry[kind])
    if log and low <= 0:
        raise ValueError(f"`search_space`: `{key}` has a logarithmic range, which begins above 0, got {low}.")
    return Parameter(key, kind, low, high, log)


def _choices(key: str, given: Any) -> tuple[Any, ...]:
    values = given if isinstance(given, list) else []
    labels = [(type(label(value)), label(value)) for value in values]
    if not values or len({*labels}) < len(labels):
        raise ValueError(f"`search_space`: `{key}` must have a list of different values to choose from, got {given!r}.")
    return tuple(values)


def _ends(key: str, kind: Kind, given: Any) -> Sequence[Any]:
    fits = is_integer if kind == "integer" else is_number
    if not (isinstance(given, list) and len(given) == 2 and all(map(fits, given)) and given[0] < given[1]):
        what = "two integers" if kind == "integer" else "two numbers"
        raise ValueError(f"`search_space`: `{key}` must go from the lower to the higher of {what}, got {given!r}.")
    return given if kind == "integer" else [float(given[0]), float(given[1])]
