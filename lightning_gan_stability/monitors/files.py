"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def save_atomically(state: object, file: Path) -> None:
    """Write tensors and plain data, all of it or nothing: a reader never sees half a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_atomically({"a": torch.ones(1)}, Path(folder, "new", "state.pt"))
        ...     torch.load(Path(folder, "new", "state.pt"), weights_only=True)
        {'a': tensor([1.])}
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, temporary := file.with_suffix(f".{os.getpid()}"))
    os.replace(temporary, file)
