"""Finds the mistake in a command line or a config that the parser has refused."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import torch
import yaml
from lightning.pytorch import Trainer

import lightning_gan_stability as package
from lightning_gan_stability.checkpoints import find_config
from lightning_gan_stability.module import GANModule

#: Where short names come from, after the package itself.
_LIBRARIES = (
    lightning.pytorch.callbacks,
    lightning.pytorch.loggers,
    torch.optim,
    torch.optim.lr_scheduler,
    torch.nn,
)
_TOP = ("seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only", "verbose", "return_predictions")
#: Settings that are a class, by its name alone or with ``class_path``.
CLASSES = {
    "model": "a GANModule",
    "data": "a data module",
    "model.generator": "a network",
    "model.discriminator": "a network",
    "model.loss": "a loss",
    "model.augment": "an augmentation",
    "model.g_optimizer": "an optimizer",
    "model.d_optimizer": "an optimizer",
    "model.g_scheduler": "a scheduler",
    "model.d_scheduler": "a scheduler",
    "trainer.callbacks": "a callback",
    "trainer.logger": "a logger",
}

#: What other libraries call it.
_SYNONYMS = {
    "learning_rate": ["lr"],
    "epochs": ["max_epochs"],
    "steps": ["max_steps", "every"],
    "z_dim": ["latent_dim"],
    "gpus": ["devices"],
    "lambda": ["weight", "gamma"],
}


class Entry(NamedTuple):
    """A setting that was given.

    Attributes:
        place: where it was given, as text.
        key: its dotted name, such as ``"trainer.callbacks"``.
        node: its YAML node.
    """

    place: str
    key: str
    node: yaml.Node


def given_configs(args: Sequence[str]) -> list[str]:
    """The files that a command line gives as ``--config``.

    Example:
        >>> given_configs(["fit", "--config", "a.yaml", "--config=b.yaml", "-c", "c.yaml"])
        ['a.yaml', 'b.yaml', 'c.yaml']
    """
    found = []
    for name, value in zip_longest(args, args[1:], fillvalue=""):
        if name in ("--config", "-c"):
            found.append(value)
        elif name.startswith("--config="):
            found.append(name.removeprefix("--config="))
    return found


def diagnose(args: Sequence[str], message: str) -> str:
    """One sentence on the mistake: where it is, what it is, and what may have been meant.

    Args:
        args: the command line that was refused.
        message: the parser's message.
    """
    for file in given_configs(args):
        if said := _unreadable(file):
            return said
    for entry in [*_of_files(args), *_of_line(args)]:
        for said in _mistakes(entry):
            return said if said.startswith(entry.place) else f"{entry.place}: {said}"
    said = _condensed(message, [*_of_files(args), *_of_line(args)])
    config = None if given_configs(args) else _config_of_run(args)
    return said if config is None else f"{said.rstrip('.')}: add --config {config}, which is the checkpoint's."


# ---------- what was given


def _config_of_run(args: Sequence[str]) -> Path | None:
    """The config of the run whose checkpoint is given."""
    for argument, following in zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name == "--ckpt_path":
            found = find_config(value if equals else following)
            return found if found is None else Path(os.path.relpath(found))
    return None


def _unreadable(file: str) -> str:
    path = Path(file)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        return f"there is no config {file!r}{meant(file, near)}"
    try:
        content = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        return f"{file}{where}: this is not YAML ({', '.join(filter(None, (error.context, error.problem)))})."
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        return f"{file}: this is not YAML ({' '.join(str(error).split())})."
    for key, before in repeated(content):
        lines = f"line {key.start_mark.line + 1}: `{key.value}` stands in line {before.start_mark.line + 1}"
        return f"{file}, {lines} already: keep one of the two."
    if not isinstance(content, yaml.MappingNode):
        return f"{file}: a config has `model:`, `data:` and `trainer:`, and this file has none of them."
    return ""


def _of_files(args: Sequence[str]) -> Iterator[Entry]:
    for file in given_configs(args):
        content = yaml.compose(Path(file).read_text(encoding="utf-8"))
        assert content is not None  # `_unreadable` has looked
        yield Entry(file, "", content)


def _of_line(args: Sequence[str]) -> Iterator[Entry]:
    for argument, following in zip_longest(args, args[1:], fillvalue=""):
        if not argument.startswith("--") or argument.startswith("--config"):
            continue
        name, equals, value = argument[2:].partition("=")
        try:
            node = yaml.compose(value if equals else following) or yaml.ScalarNode("", "")
        except yaml.YAMLError:
            node = yaml.ScalarNode("", value)
        yield Entry(f"--{name}", name.removesuffix("+"), node)


# ---------- what is wrong with it


def _mistakes(entry: Entry) -> Iterator[str]:
    if not entry.key:
        yield from _in_config(entry)
        return
    first, _, rest = entry.key.partition(".")
    if first not in (*_TOP, "help", "print_config"):
        places = [f"{part}.{name}" for part, names in settings().items() for name in names]
        ends = [place for place in places if place.endswith(f".{entry.key}")]
        hint = f": did you mean --{ends[0]}?" if ends else meant(entry.key, _TOP)
        yield f"there is no such setting{hint}"
    elif first in ("trainer", "model") and rest:
        name = rest.partition(".")[0].removesuffix("+")
        if first == "trainer" and name not in settings()["trainer"]:
            yield f"the Trainer has no argument `{name}`{meant(name, settings()['trainer'])}"
        elif first == "model" and name not in (*settings()["model"], "class_path", "init_args", "dict_kwargs"):
            yield f"the model has no argument `{name}`{meant(name, settings()['model'])}"
    if entry.key in CLASSES:
        yield from _in_value(entry, entry.key, entry.node)


def settings() -> dict[str, list[str]]:
    """The arguments of the Trainer and of GANModule, by section.

    Example:
        >>> "max_steps" in settings()["trainer"], "latent_dim" in settings()["model"]
        (True, True)
    """
    return {"trainer": [*inspect.signature(Trainer).parameters], "model": _arguments(GANModule) or []}


def _in_config(entry: Entry) -> Iterator[str]:
    for key, node in _items(entry.node):
        name = key.value.removesuffix("+")
        if name not in _TOP:
            yield f"{_at(entry, key)}: there is no section `{key.value}`{meant(name, _TOP)}"
        elif name == "trainer" and isinstance(node, yaml.MappingNode):
            yield from _in_arguments(entry, "trainer", node, settings()["trainer"], "the Trainer")
        elif name in ("model", "data"):
            yield from _in_value(entry, name, node)


def _in_value(entry: Entry, key: str, node: yaml.Node) -> Iterator[str]:
    """The mistakes in what may be a class by its name, a class with arguments, or a list of these."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _in_value(entry, key, item)
    elif isinstance(node, yaml.ScalarNode):
        if key in CLASSES and node.tag.endswith(":str") and node.value:
            yield from _of_name(entry, key, node)
    elif isinstance(node, yaml.MappingNode):
        parts = {part.value.removesuffix("+"): (part, value) for part, value in _items(node)}
        if "class_path" in parts:
            name = parts["class_path"][1]
            said = [*_of_name(entry, key, name)]
            yield from said
            for other in parts.keys() - {"class_path", "init_args", "dict_kwargs"}:
                hint = "arguments stand below `init_args:`" if other in (_names(name) or [other]) else "remove it"
                yield f"{_at(entry, parts[other][0])}: `{other}` does not belong beside `class_path`: {hint}."
            arguments = parts.get("init_args", (None, None))[1]
            if isinstance(arguments, yaml.MappingNode) and not said:
                yield from _in_arguments(entry, key, arguments, _names(name), name.value.rpartition(".")[2])
        elif key == "model":
            yield from _in_arguments(entry, key, node, settings()["model"], "GANModule")
        elif len(parts) == 1 and key in CLASSES and _find(next(iter(parts))) is not None:
            name, (part, _) = next(iter(parts.items()))
            yield f"{_at(entry, part)}: write `class_path: {name}`, and its arguments below `init_args:`."
        else:  # a dict, in which there may be classes
            for part, value in _items(node):
                yield from _in_value(entry, f"{key}.{part.value}", value)


def _in_arguments(entry: Entry, key: str, node: yaml.MappingNode, known: list[str] | None, owner: str) -> Iterator[str]:
    for part, value in _items(node):
        name = part.value.removesuffix("+")
        if known is not None and name not in known:
            yield f"{_at(entry, part)}: {owner} has no argument `{name}`{meant(name, known)}"
        yield from _in_value(entry, f"{key}.{name}", value)


def _of_name(entry: Entry, key: str, node: yaml.Node) -> Iterator[str]:
    """What is wrong with the name of a class."""
    name, what = str(node.value), CLASSES.get(key, "a class")
    place = _at(entry, node)
    if "." not in name:
        if _find(name) is None:
            yield f"{place}: there is no class `{name}` to be {what}{meant(name, names_for(key))}"
        return
    module, _, attribute = name.rpartition(".")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module == missing or module.startswith(f"{missing}."):
            hint = f"is {missing.partition('.')[0]}.py in the folder that you start in, or installed?"
        else:
            hint = f"`{module}` needs `{missing}`, which is not installed."
        yield f"{place}: there is no module `{missing}`: {hint}"
    except Exception as error:  # of the user's file
        yield f"{place}: `{module}` cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})."
    else:
        if not hasattr(loaded, attribute):
            yield f"{place}: `{module}` has no `{attribute}`{meant(attribute, dir(loaded))}"
        elif key == "model" and not _fits(getattr(loaded, attribute), key):
            yield f"{place}: `{name}` is no GANModule: networks are the `generator` and `discriminator` of a model."


def _condensed(message: str, entries: Sequence[Entry]) -> str:
    """The decisive lines of a message of the parser."""
    keys = re.findall(r'Parser key "([\w.+]+)"', message)
    key = keys[-1] if keys else ""
    missing = re.search(r"the following arguments are required: (.*)", message)
    if missing:
        names = [name.strip().rpartition(".")[2] for name in missing[1].split(",")]
        behind = "callable class: the following" in message  # optimizers and schedulers, whose name follows
        owner = re.search(r"class_path='[\w.]*?(\w+)'" if behind else r"class_path '[\w.]*?(\w+)'", message)
        who = f"{owner[1]} needs" if owner else "a run needs"
        return f"{who} {' and '.join(f'`{name}`' for name in names)}, and the config has none."
    values = re.findall(r"(?:Got value|Given value): (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    wanted = re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", message, re.MULTILINE)
    plain = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null") for text in wanted]
    plain = [text for text in dict.fromkeys(plain) if not text.startswith(("path but", "dot import"))]
    plain = [re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", text) for text in plain]
    if key and plain == ["null"]:  # a class was wanted, and null is what could stand there besides
        places = [_at(entry, node) for entry in entries for node in _with_key(entry.node, key.rpartition(".")[2])]
        place = f"{places[0]}: " if places else ""
        return f"{place}`{key}` must be {_wanted_class(key, message, values)}"
    if key and values and plain:
        value = values[0]
        for entry in entries:
            for node in _with_key(entry.node, key.rpartition(".")[2]):
                if str(node.value) == value or not isinstance(node, yaml.ScalarNode):
                    return f"{_at(entry, node)}: `{key}` must be {' or '.join(plain)}, got {value}."
        return f"`{key}` must be {' or '.join(plain)}, got {value}."
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else message


def _wanted_class(key: str, message: str, values: Sequence[str]) -> str:
    """What a class was wanted for, and what the parser says of the one that it got."""
    what = CLASSES.get(key) or CLASSES.get(f"model.{key}") or "an object of a class"
    option = re.search(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message)
    if option and option[1] == "torch.nn.Module":
        return f"{what}: write `class_path:` with its name, and `{option[2]}` below `init_args:`."
    if option:
        known = _arguments(_find(option[1])) if inspect.isclass(_find(option[1])) else None
        hint = " (what its **kwargs take stands below `dict_kwargs:`)." if known is None else meant(option[2], known)
        return f"{what}, and `{option[1]}` has no argument `{option[2]}`{hint}"
    reason = re.search(r"^ *(?:- )?((?:Import path|module) .*(?:a subclass of|has no attribute) .*)$", message, re.M)
    if reason:
        return f"{what}: {reason[1][0].lower()}{reason[1][1:]}."
    return f"{what}, got {values[0]}." if values else f"{what}."


# ---------- names


def repeated(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Keys that occur twice in one mapping, of which YAML would silently use the last.

    Example:
        >>> [key.value for key, before in repeated(yaml.compose("{a: 1, b: {c: 2, c: 3}}"))]
        ['c']
    """
    seen: dict[str, yaml.Node] = {}
    for key, value in _items(node):
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":  # which merges, and may stand twice
            if key.value in seen:
                yield key, seen[key.value]
            seen[key.value] = key
        yield from repeated(value)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from repeated(item)


def _items(node: yaml.Node | None) -> list[tuple[Any, yaml.Node]]:
    return [*node.value] if isinstance(node, yaml.MappingNode) else []


def _with_key(node: yaml.Node, key: str) -> Iterator[yaml.Node]:
    for part, value in _items(node):
        if part.value == key:
            yield value
        yield from _with_key(value, key)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _with_key(item, key)


def _at(entry: Entry, node: yaml.Node) -> str:
    return entry.place if entry.key else f"{entry.place}, line {node.start_mark.line + 1}"


def _known() -> dict[str, Any]:
    """All classes that have short names."""
    found: dict[str, Any] = {}
    for library in reversed(_LIBRARIES):
        found |= {name: kind for name, kind in vars(library).items() if inspect.isclass(kind) and name[0] != "_"}
    return found | {name: kind for name in package.__all__ if inspect.isclass(kind := getattr(package, name))}


def names_for(key: str) -> list[str]:
    """The short names of classes that are allowed in a place.

    Example:
        >>> names_for("model.loss")[:2]
        ['BoundaryEquilibrium', 'FDivergence']
    """
    return sorted(name for name, kind in _known().items() if _fits(kind, key) and not inspect.isabstract(kind))


def _find(name: str) -> Any:
    if "." not in name:
        return _known().get(name)
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except Exception:  # which is said where the name stands
        return None


def _names(node: yaml.Node) -> list[str] | None:
    kind = _find(str(node.value))
    return _arguments(kind) if inspect.isclass(kind) else None


def _arguments(kind: type) -> list[str] | None:
    """The names of a class's arguments, including those of base classes behind ``**kwargs``; None if unknown."""
    found: list[str] = []
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        try:
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        except (TypeError, ValueError):
            return None
        found += [
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
        ]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None


def _fits(kind: Any, key: str) -> bool:
    """Whether a class is allowed in a place."""
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.loggers import Logger

    from lightning_gan_stability.losses import AdversarialLoss

    bases: dict[str, Any] = {
        "model": GANModule,
        "data": LightningDataModule,
        "model.loss": AdversarialLoss,
        "trainer.callbacks": Callback,
        "trainer.logger": Logger,
        "model.g_optimizer": torch.optim.Optimizer,
        "model.d_optimizer": torch.optim.Optimizer,
        "model.g_scheduler": torch.optim.lr_scheduler.LRScheduler,
        "model.d_scheduler": torch.optim.lr_scheduler.LRScheduler,
    }
    return inspect.isclass(kind) and issubclass(kind, bases.get(key, torch.nn.Module))


def meant(name: str, known: Sequence[str]) -> str:
    """``: did you mean X?``, or what there is if that is little.

    Example:
        >>> meant("gama", ["gamma", "every"])
        ': did you mean gamma?'
    """
    lower = {other.lower(): other for other in reversed([*known])}
    close = difflib.get_close_matches(name.lower(), lower, 5, cutoff=0.55)
    close.sort(key=lambda other: abs(len(other) - len(name)) / 10 - _likeness(name.lower(), other))
    close = [other for other in lower if len(name) > 3 and other.startswith(name.lower())] + close
    nearest = next((other for other in _SYNONYMS.get(name, ()) if other in known), lower[close[0]] if close else None)
    if nearest:
        return f": did you mean {nearest}?"
    return f"; there are {', '.join(known)}." if 0 < len(known) <= 24 else "."


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()
