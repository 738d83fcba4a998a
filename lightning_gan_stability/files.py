"""Atomic writes of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yield a path to write to, and move the file to its place when it is complete; until then an old file stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a.txt")) as place:
        ...         size = place.write_text("a")
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(state: object, file: Path) -> None:
    """Write tensors and plain data atomically: a reader never sees half a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_atomically({"a": torch.ones(1)}, Path(folder, "new", "state.pt"))
        ...     torch.load(Path(folder, "new", "state.pt"), weights_only=True)
        {'a': tensor([1.])}
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as place:
        torch.save(state, place)
