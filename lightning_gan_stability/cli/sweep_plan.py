"""Reads the file of ``gan-stability sweep``, and checks it against the config that it searches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jsonargparse import get_loader

from lightning_gan_stability._checks import check, check_choice, check_integer, check_type
from lightning_gan_stability.checkpoints import resolve
from lightning_gan_stability.cli.diagnosis import meant, repeated
from lightning_gan_stability.cli.sweep_space import Parameter, label, on_line, read_space
from lightning_gan_stability.cli.training import check_config, look_up, read_config
from lightning_gan_stability.monitors import quality
from lightning_gan_stability.monitors.paired import PairedMonitor
from lightning_gan_stability.monitors.quality import QualityMonitor
from lightning_gan_stability.monitors.table import TableMonitor

Backend = Literal["optuna", "ray", "wandb"]
Mode = Literal["min", "max"]
Pruner = Literal["median", "halving", "none"]
Sampler = Literal["random", "tpe"]
Value = Literal["last", "best"]

_LOSS = re.compile(r"(val/|test/|train/)?[dg]/.+|.*loss.*", re.IGNORECASE)
_OF_TABLES: dict[str, bool | None] = {"marginals": True, "correlations": True, "efficacy": False}
_LOCAL = ("CSVLogger", "TensorBoardLogger")  # which write into the folder of a run


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        config: files for ``gan-stability fit --config``.
        space: the search space, without the setting of ``side_by_side``.
        metric: key of the log that measures how good a trial is.
        mode: whether lower or higher values are better.
        study: name of the study, and of its folder in ``folder``.
        settings: values of other settings for all trials, by key.
        value: value of a trial: the last measurement or the best.
        trials: number of trials, for each value of ``side_by_side``.
        folder: folder of the studies.
        storage: URL of the database; empty: SQLite in the study's folder.
        sampler: how values are drawn.
        pruner: how trials are stopped early.
        prune_after: number of steps before that.
        seed: seed of the draws.
        backend: how trials are run.
        jobs: number of trials at a time, each a process; 0: one after another in this process.
        side_by_side: the setting whose values are compared at the same budget.
    """

    config: tuple[str, ...]
    space: tuple[Parameter, ...]
    metric: str
    mode: Mode
    study: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    value: Value = "last"
    trials: int = 20
    folder: str = "runs"
    storage: str = ""
    sampler: Sampler = "tpe"
    pruner: Pruner = "median"
    prune_after: int | None = None
    seed: int = 0
    backend: Backend = "optuna"
    jobs: int = 1
    side_by_side: Parameter | None = None

    @property
    def home(self) -> Path:
        """The folder of the study."""
        return Path(self.folder, self.study)

    @property
    def sides(self) -> list[str]:
        """The names of the values that are compared; one without a name if none are."""
        return [""] if self.side_by_side is None else [str(value) for value in self.side_by_side.labels]

    @property
    def unsearched(self) -> Plan:
        """The same with nothing to search or to compare: what all trials share."""
        return replace(self, space=(), side_by_side=None)

    def place(self, side: str, number: int) -> Path:
        """The folder of a trial."""
        return self.home / re.sub(r"[^\w.+=-]+", "_", side).strip("_") / f"trial_{number}"

    def arguments(self, drawn: Mapping[str, Any], side: str = "") -> list[str]:
        """The command line of a trial, behind ``gan-stability fit``."""
        given = [*self.settings.items()]
        if self.side_by_side is not None:
            given.append((self.side_by_side.key, self.side_by_side.choices[self.sides.index(side)]))
        given += [(parameter.key, parameter.value(drawn[parameter.key])) for parameter in self.space]
        return [part for file in self.config for part in ("--config", file)] + [as_argument(*entry) for entry in given]

    @property
    def identity(self) -> dict[str, str]:
        """What must not change while a study goes on, as text by name."""
        space = {f"search_space: {parameter.key}": _words(parameter) for parameter in self.space}
        side = {} if self.side_by_side is None else {"side_by_side": self.side_by_side.key}
        return {"metric": self.metric, "mode": self.mode, "value": self.value} | side | space


def as_argument(key: str, value: Any) -> str:
    """A setting as an argument of ``gan-stability fit``.

    Example:
        >>> as_argument("model.loss", "Hinge"), as_argument("trainer.max_steps", 100)
        ('--model.loss=Hinge', '--trainer.max_steps=100')
    """
    return f"--{key}={on_line(value)}"


def _words(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return f"choice of {', '.join(map(str, parameter.labels))}"
    log = ", log" if parameter.kind == "integer" and parameter.log else ""
    return f"{parameter.kind} from {parameter.low} to {parameter.high}{log}"


# ---------- reading


def read_plan(file: str | Path, **changes: Any) -> Plan:
    """Read the file of a sweep, and check each key and each end of a range as ``gan-stability fit`` does.

    Args:
        file: of YAML.
        changes: entries that take the place of those in the file; None changes nothing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in a sentence, if something in it is wrong.
    """
    path = Path(file)
    if not path.is_file():
        near = sorted(map(str, path.parent.glob("*.y*ml"))) if path.parent.is_dir() else []
        raise FileNotFoundError(f"There is no file {str(file)!r}{meant(str(file), near)}")
    try:
        text = path.read_text(encoding="utf-8")
        for key, before in repeated(yaml.compose(text)):
            lines = f"line {key.start_mark.line + 1}: `{key.value}` stands in line {before.start_mark.line + 1}"
            raise ValueError(f"{file}, {lines} already: keep one of the two.")
        content = get_loader("gan")(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: this is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a sweep has `config:`, `search_space:` and `metric:`, and this file has none.")
    given = {"study": path.stem} | content | {key: value for key, value in changes.items() if value is not None}
    return make_plan(given, path.parent)


def make_plan(given: Mapping[str, Any], beside: str | Path = ".") -> Plan:
    """The plan of a sweep from the entries of its file.

    Args:
        given: by name.
        beside: a folder in which configs are looked for, after the current one.

    Raises:
        ValueError: in a sentence, if something is wrong.
    """
    known = [*(entry.name for entry in fields(Plan) if entry.name != "space"), "search_space"]
    for name in given:
        if name not in known:
            raise ValueError(f"A sweep has no entry `{name}`{meant(str(name), known)}")
    for name, example in {"config": "configs/ring.yaml", "metric": "quality/fid"}.items():
        if not given.get(name):
            raise ValueError(f"A sweep needs `{name}`, such as {example}.")
    space = read_space(given.get("search_space") or {})
    side = _side(given.get("side_by_side"), space)
    settings = given.get("settings") or {}
    check(isinstance(settings, Mapping), "settings", "keys and values, such as {trainer.max_steps: 1000}", settings)
    files = given["config"] if isinstance(given["config"], list) else [given["config"]]
    choices = {"value": Value, "sampler": Sampler, "pruner": Pruner, "backend": Backend}
    simple = {name: given[name] for name in known if name in given and name in (*choices, "folder", "storage", "study")}
    if simple.get("pruner", "") is None:  # as YAML reads `pruner: null`
        simple["pruner"] = "none"
    for name, kinds in choices.items():
        if name in simple:
            check_choice(name, simple[name], get_args(kinds))
    for name in ("folder", "storage", "study"):
        if name in simple:
            simple[name] = str(check_type(name, simple[name], str))
    for name, least in {"trials": 1, "jobs": 0, "seed": 0, "prune_after": 1}.items():
        if given.get(name) is not None:
            simple[name] = check_integer(name, given[name], least)
    if "study" in simple:
        check(re.fullmatch(r"[\w.+=-]+", simple["study"]) is not None, "study", "a name of a folder", simple["study"])
    metric = str(check_type("metric", given["metric"], str))
    plan = Plan(
        config=tuple(_find(str(file), Path(beside)) for file in files),
        space=tuple(parameter for parameter in space if parameter is not side),
        metric=metric,
        mode="min",
        settings=dict(settings),
        side_by_side=side,
        **{"study": "sweep"} | simple,
    )
    if plan.pruner != "none" and _LOSS.fullmatch(metric):
        raise ValueError(
            f"`metric` must be a value of quality to prune by, such as quality/fid, got the loss {metric!r}: losses of "
            "a GAN do not say how good its samples are. Without pruning, with `pruner: none`, it may be searched by."
        )
    return _checked(plan, given.get("mode"))


def _side(key: Any, space: Sequence[Parameter]) -> Parameter | None:
    if key is None:
        return None
    found = next((parameter for parameter in space if parameter.key == key and parameter.kind == "choice"), None)
    if found is None:
        raise ValueError(
            f"`side_by_side` must be a key of the search space with a `choice`, got {key!r}"
            f"{meant(str(key), [parameter.key for parameter in space if parameter.kind == 'choice'])}"
        )
    return found


def _find(file: str, beside: Path) -> str:
    for place in (Path(file), beside / file):
        if place.is_file():
            return str(place)
    near = [str(path) for path in sorted([*Path(file).parent.glob("*.y*ml"), *beside.glob("*.y*ml")])]
    raise ValueError(f"`config`: there is no file {file!r}{meant(file, near)}")


# ---------- checks against the config


def _checked(plan: Plan, mode: Any) -> Plan:
    """A plan whose keys and values the config takes, with what the config says of the metric and of the steps."""
    line = plan.unsearched.arguments({})
    files = [part for file in plan.config for part in ("--config", file)]
    bare = read_config(files)
    for key in plan.settings:
        if not key.endswith("+"):
            _known(bare, key, "settings", plan)
    config = read_config(line) if plan.settings else bare
    natural = _direction(plan.metric, mode, config)
    searched = [*plan.space, *([] if plan.side_by_side is None else [plan.side_by_side])]
    for parameter in searched:
        if parameter.key in plan.settings:
            raise ValueError(f"`{parameter.key}` stands below both `settings` and `search_space`: keep one of the two.")
        _known(config, parameter.key, "search_space", plan)
    _try(line, searched)
    after = plan.prune_after
    if after is None:
        steps = config["trainer"]["max_steps"]
        after = max(1, steps // 4) if steps and steps > 0 else 1
    return replace(plan, mode=natural, prune_after=after)


def _try(line: Sequence[str], searched: Sequence[Parameter]) -> None:
    """Read examples of all parameters, several at once; where that goes wrong, each by itself.

    Raises:
        ValueError: with the parameter that cannot have a value.
    """
    examples = [(parameter.key, parameter.examples()) for parameter in searched]
    try:
        for i in range(max((len(values) for _, values in examples), default=0)):
            check_config([*line, *(as_argument(key, values[i % len(values)]) for key, values in examples)])
    except ValueError:
        for key, values in examples:
            for value in values:
                try:
                    check_config([*line, as_argument(key, value)])
                except ValueError as error:
                    raise ValueError(f"`search_space`: `{key}` cannot be {label(value)}: {error}") from error


def _known(config: dict[str, Any], key: str, section: str, plan: Plan) -> None:
    added = str(plan.settings.get("trainer.callbacks+", ""))
    parts = key.split(".")
    if section == "settings" and key.startswith("trainer.callbacks.") and parts[2] in added:
        return  # of a callback that the settings add
    try:
        look_up(config, key)
    except ValueError as error:
        raise ValueError(f"`{section}`: {error}") from error


def _direction(metric: str, given: Any, config: dict[str, Any]) -> Mode:
    """The direction of a metric, which monitors of the config know of their own."""
    if given is not None:
        check_choice("mode", given, get_args(Mode))
    known = _measured(config)
    close = metric.partition("/")[0] in {key.partition("/")[0] for key in known}
    if metric not in known and (close or metric.startswith("quality/")):
        if known:
            raise ValueError(f"`metric`: no monitor of the config measures {metric!r}{meant(metric, [*known])}")
        raise ValueError(
            f"`metric`: no callback of the config measures {metric!r}: add one below `settings`, such as "
            "`trainer.callbacks+: [{class_path: QualityMonitor, init_args: {every: 500}}]`."
        )
    lower = known.get(metric)
    if lower is not None:
        natural: Mode = "min" if lower else "max"
        if given not in (None, natural):
            better = "lower" if lower else "higher"
            raise ValueError(f"`mode` of {metric!r} must be {natural}, since {better} is better, got {given}.")
        return natural
    if given is None:
        raise ValueError(f"A sweep by {metric!r} needs `mode`: min or max.")
    return given  # type: ignore[no-any-return]


def _measured(config: dict[str, Any]) -> dict[str, bool | None]:
    """The values that monitors of a config measure, with whether lower is better."""
    callbacks = config["trainer"]["callbacks"] or []
    found: dict[str, bool | None] = {}
    for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
        kind, arguments = resolve(entry["class_path"]), entry.get("init_args") or {}
        if not isinstance(kind, type) or "name" not in arguments:
            continue
        values: Mapping[str, bool | None] = {}
        if issubclass(kind, QualityMonitor):
            values = quality.LOWER_IS_BETTER | {"imbalance": True, "moved": True}
            asked = arguments.get("metrics")
            if asked is not None:
                more = ["high_quality", "reverse_kl"] if "modes" in asked else []
                kept = {*asked, *more, "missing", "imbalance", "moved"}
                values = {name: lower for name, lower in values.items() if name in kept}
        elif issubclass(kind, TableMonitor):
            values = _OF_TABLES
        elif issubclass(kind, PairedMonitor):
            values = dict.fromkeys(arguments.get("metrics") or {})
        found |= {f"{arguments['name']}/{name}": lower for name, lower in values.items()}
    return found


# ---------- recipes


def recipe(arguments: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """The config of a trial, without what has its default.

    Args:
        arguments: of the trial.
        folder: where its run goes; None: where the config says.
    """
    content = read_config(arguments, brief=True)
    if folder is None:
        return content
    trainer = content.setdefault("trainer", {})
    given = trainer.get("logger")
    given = given if isinstance(given, list) else [given] if isinstance(given, dict) else []
    place = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    loggers, remote = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}], []
    for entry in given:
        kind, values = str(entry["class_path"]), entry.get("init_args") or {}
        if kind.endswith("CSVLogger"):
            loggers[0]["init_args"] = values | place
        elif kind.endswith(_LOCAL):
            loggers.append(entry | {"init_args": values | place})
        else:
            remote.append(entry)
    trainer["logger"] = [*loggers, *remote]
    callbacks = trainer.get("callbacks") or []
    for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
        values = entry.get("init_args") or {}
        if str(entry["class_path"]).endswith("ModelCheckpoint") and values.get("dirpath"):
            values["dirpath"] = str(folder / "checkpoints")
    return content
