"""Checks of arguments: each returns the value that it was given, or raises an error that names the argument."""

import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def check(condition: bool, name: str, requirement: str, value: T) -> T:
    """Return the value if the condition holds.

    Raises:
        ValueError: if it does not, as "`name` must be <requirement>, got <value>."

    Example:
        >>> check(False, "momentum", "in (-1, 1)", 2)
        Traceback (most recent call last):
        ValueError: `momentum` must be in (-1, 1), got 2.
    """
    if not condition:
        raise ValueError(f"`{name}` must be {requirement}, got {value!r}.")
    return value


def is_integer(value: object) -> bool:
    """Whether a value is an integer, and no bool.

    Example:
        >>> is_integer(1), is_integer(True), is_integer(1.0)
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no bool.

    Example:
        >>> is_number(1.5), is_number(math.inf), is_number(True)
        (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Return an integer that is not below ``least``.

    Example:
        >>> check_integer("every", 0)
        Traceback (most recent call last):
        ValueError: `every` must be a positive integer, got 0.
    """
    kind = {0: "an integer that is not negative", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
    check(is_integer(value) and value >= least, name, kind, value)
    return int(value)


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """Return a finite number that is not negative (or, on wish, above zero).

    Example:
        >>> check_number("weight", -1)
        Traceback (most recent call last):
        ValueError: `weight` must be a finite number that is not negative, got -1.
    """
    kind = "a positive finite number" if positive else "a finite number that is not negative"
    check(is_number(value) and value >= 0 and not (positive and value == 0), name, kind, value)
    return value  # type: ignore[no-any-return]


def check_finite(name: str, value: Any) -> float:
    """Return a finite number of either sign.

    Example:
        >>> check_finite("low", "x")
        Traceback (most recent call last):
        ValueError: `low` must be a finite number, got 'x'.
    """
    check(is_number(value), name, "a finite number", value)
    return value  # type: ignore[no-any-return]


def check_share(name: str, value: Any, *, open_start: bool = False, open_end: bool = False) -> float:
    """Return a number in [0, 1], without the ends that are open.

    Example:
        >>> check_share("decay", 1.0, open_end=True)
        Traceback (most recent call last):
        ValueError: `decay` must be in [0, 1), got 1.0.
    """
    inside = is_number(value) and 0 <= value <= 1 and not (open_start and value == 0) and not (open_end and value == 1)
    check(inside, name, f"in {'(['[not open_start]}0, 1{')]'[not open_end]}", value)
    return value  # type: ignore[no-any-return]


def check_bool(name: str, value: Any) -> bool:
    """Return True or False.

    Example:
        >>> check_bool("adaptive", "false")
        Traceback (most recent call last):
        ValueError: `adaptive` must be True or False, got 'false'.
    """
    check(isinstance(value, bool), name, "True or False", value)
    return bool(value)


def check_choice(name: str, value: T, choices: Iterable[object]) -> T:
    """Return one of several values.

    Example:
        >>> check_choice("player", "x", ("d", "g"))
        Traceback (most recent call last):
        ValueError: `player` must be one of 'd', 'g', got 'x'.
    """
    choices = tuple(choices)
    check(not isinstance(value, bool) and value in choices, name, f"one of {', '.join(map(repr, choices))}", value)
    return value


def check_type(name: str, value: T, kind: type) -> T:
    """Return a value of a type; a bool is no int.

    Example:
        >>> check_type("noise_seed", 1.5, int)
        Traceback (most recent call last):
        ValueError: `noise_seed` must be of type int, got 1.5.
    """
    return check(isinstance(value, kind) and not isinstance(value, bool), name, f"of type {kind.__name__}", value)


# what the log has of a player besides the terms of its loss
_LOGGED = ("adversarial", "grad_norm", "real_logit", "fake_logit", "accuracy")


def is_term_name(name: object) -> bool:
    """Whether a term of a loss may have a name: one that the log has not for something else.

    Example:
        >>> is_term_name("mel"), is_term_name("grad_norm"), is_term_name("adversarial/a"), is_term_name("")
        (True, False, False, False)
    """
    return isinstance(name, str) and name.partition("/")[0] not in ("", *_LOGGED)


def check_term_name(name: Any) -> str:
    """Return the name of a term of a loss.

    Example:
        >>> check_term_name("grad_norm")
        Traceback (most recent call last):
        ValueError: `name` must be a key that the log has for nothing else, got 'grad_norm'.
    """
    check_type("name", name, str)
    return check(is_term_name(name), "name", "a key that the log has for nothing else", name)  # type: ignore[no-any-return]


def is_plain(value: object) -> bool:
    """Whether a value is numbers, strings, lists and dicts all the way down, which any checkpoint can hold.

    Example:
        >>> is_plain({"betas": [0.5, 0.999]}), is_plain(print)
        (True, False)
    """
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def describe(value: object) -> str:
    """What a value is, in words for an error message.

    Example:
        >>> import torch
        >>> describe([torch.zeros(2, dtype=torch.uint8), "a"])
        'a list of a torch.uint8 tensor of shape (2,), a str'
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, list | tuple):
        items = [*map(describe, value[:3]), *["..."] * (len(value) > 3)]
        return f"a {type(value).__name__} of " + (", ".join(items) or "nothing")
    return f"a {type(value).__name__}"


def require(module: str, extra: str) -> Any:
    """Import an optional package, which comes with an extra of this one.

    Raises:
        ModuleNotFoundError: if it is not installed, with the line that installs it.

    Example:
        >>> require("no_such_package", "audio")
        Traceback (most recent call last):
        ModuleNotFoundError: This needs no_such_package: pip install 'lightning-gan-stability[audio]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if str(error.name).partition(".")[0] != missing:  # the package is there, but not what it needs itself
            raise
        line = f"This needs {missing}: pip install 'lightning-gan-stability[{extra}]'"
        raise ModuleNotFoundError(line, name=missing) from error
