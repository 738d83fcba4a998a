"""Reports configuration errors on the command line in one sentence, at the end."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException

#: Environment variable that, if set, keeps tracebacks.
TRACEBACK = "GAN_STABILITY_TRACEBACK"

_ERRORS = (
    MisconfigurationException,
    ValueError,
    TypeError,
    ModuleNotFoundError,
    OSError,
    RuntimeError,
    ArithmeticError,
)
_OURS = ("lightning_gan_stability", "lightning", "jsonargparse")
# of torch, where a checkpoint does not fit the networks
_UNFIT = "Error(s) in loading state_dict for "
_UNION = "Does not validate against any of the Union subtypes"


@contextmanager
def explained(interactive: bool) -> Iterator[None]:
    """On a command line, exit with one sentence instead of a traceback if a configuration has caused an error.

    Args:
        interactive: whether this is a command line; otherwise errors are raised.
    """
    try:
        yield
    except _ERRORS as error:
        if not interactive or os.environ.get(TRACEBACK) or not is_ours(error):
            raise
        complain(sentence(error), *places(error))


def complain(sentence: str, *details: str) -> NoReturn:
    """Print the error in the last line, and exit with status 2."""
    for detail in details:
        print(detail, file=sys.stderr)
    print(f"gan-stability: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def sentence(error: BaseException) -> str:
    """The message of an error, on one line.

    Example:
        >>> sentence(ValueError("one\\n  two"))
        'one two'
    """
    message = str(error)
    if message.startswith(_UNION):  # the parser lists what each of several types says of it
        parts = re.findall(r"^ *- ((?!Expected an? |Not a valid |Problem with ).+)$", message, re.MULTILINE)
        message = parts[0] if parts else message
    if message.startswith(_UNFIT):
        message = (
            f"The checkpoint does not fit the model: {message.partition(chr(10))[2].strip().partition(chr(10))[0]}"
        )
    return " ".join(message.split()) or type(error).__name__


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this package, Lightning or the parser, rather than by the user's code."""
    if str(error).startswith(_UNFIT):
        return True
    if (
        str(error).startswith(_UNION)
        and error.__cause__ is not None
        and _last_frame(error.__cause__.__traceback__, True)
    ):
        return False  # in a class of the user
    last = _last_frame(error.__traceback__)
    return last is None or any(f"{os.sep}{name}{os.sep}" in last.tb_frame.f_code.co_filename for name in _OURS)


def places(error: BaseException) -> list[str]:
    """Where in code of the user an error began, if it did, and how to see more."""
    more = f"({TRACEBACK}=1 before the command shows where in the code.)"
    cause = error.__cause__
    last = None if cause is None else _last_frame(cause.__traceback__, users=True)
    if last is None:
        return [more]
    file = Path(last.tb_frame.f_code.co_filename)
    return [f"In {file.name}, line {last.tb_lineno}: {type(cause).__name__}. {more}"]


def _last_frame(traceback: TracebackType | None, users: bool = False) -> TracebackType | None:
    """The innermost frame; or the innermost of a user's own code."""
    found = None
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        library = f"{os.sep}site-packages{os.sep}" in name or f"{os.sep}lightning_gan_stability{os.sep}" in name
        if not users or not library:
            found = traceback
        traceback = traceback.tb_next
    return found
