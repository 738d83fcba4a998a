"""Loads modules from checkpoints, without running code that a file names."""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_gan_stability.module import GANModule

#: What a checkpoint may always name: classes of networks, losses and optimizers.
TRUSTED = ("lightning_gan_stability", "torch.nn", "torch.optim")

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def load_gan(
    path: str | PathLike[str],
    model: type[GANModule] | Callable[[], GANModule] | None = None,
    trust: Sequence[str] = (),
) -> GANModule:
    """Load the module of a checkpoint, in eval mode and on the CPU, ready for ``sample``.

    Files are read with ``weights_only=True``. Checkpoints of runs from YAML name the classes of their parts. Classes of
    this package, of ``torch.nn`` and of ``torch.optim`` are imported, and others only if ``trust`` names them.

    Args:
        path: a checkpoint, or the folder of a run, whose newest checkpoint is then loaded.
        model: for runs from Python: the class, if it makes its networks itself, or a function without arguments that
            makes the module. None: use the checkpoint's hyperparameters.
        trust: packages, modules or classes that a checkpoint may import, such as ``["my_project"]``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is damaged or not of a GANModule, if it names classes that are not trusted, or if it
            does not say how to make its networks.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gan_stability import MLP, GANModule, Ring
        >>> def make():
        ...     return GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(max_steps=2, default_root_dir=folder, logger=False, enable_progress_bar=False)
        ...     trainer.fit(make(), Ring())
        ...     load_gan(folder, make).sample(3).shape
        torch.Size([3, 2])
    """
    file = find_checkpoint(path)
    state = read_checkpoint(file)
    parameters = _parameters(state)
    if model is None:
        model = class_of(parameters, trust, repr(str(file)))
    elif isinstance(model, type):
        check_parameters(parameters, [*trust, f"{model.__module__}.{model.__qualname__}"], repr(str(file)))
    module = _load(model, file) if isinstance(model, type) else _fill(model, file, state)
    return module.eval()


def find_checkpoint(path: str | PathLike[str]) -> Path:
    """The checkpoint at a path: the file itself, or the newest one in the folder of a run.

    Raises:
        FileNotFoundError: if there is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    if not given.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {str(given)!r}.")
    found = [file for file in given.rglob("*.ckpt") if file.is_file()]
    if not found:
        raise FileNotFoundError(f"There is no checkpoint in the folder {str(given)!r} or below it.")
    return newest_checkpoint(found)


def newest_checkpoint(files: Sequence[Path]) -> Path:
    """The file that was written last; of files of the same time ``last.ckpt``, or the one of the latest step.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [Path(folder, f"step={step}.ckpt") for step in (9, 10)]
        ...     for file in files:
        ...         file.touch()
        ...     newest_checkpoint(files).name
        'step=10.ckpt'
    """

    def age(file: Path) -> tuple[float, bool, list[int]]:
        steps = [int(number) for number in re.findall(r"\d+", file.stem)]
        return file.stat().st_mtime, file.stem.startswith("last"), steps

    return max(files, key=age)


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the content of a checkpoint of a GANModule, with ``weights_only=True``.

    Raises:
        ValueError: if the file is damaged, if it holds more than weights and plain data, or is not of a GANModule.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{str(path)!r} is torn, or no checkpoint at all.") from error
        raise ValueError(
            f"{str(path)!r} holds an object of {found[1]}, and reading it could run code of the file. If you trust it, "
            "read it in Python, by `load_from_checkpoint(path, weights_only=False)`."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is torn, or no checkpoint at all.") from error
    weights = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or "_extra_state" not in weights:
        raise ValueError(f"{str(path)!r} is no checkpoint of a GANModule.")
    return state  # type: ignore[no-any-return]


def find_config(checkpoint: str | PathLike[str]) -> Path | None:
    """The ``config.yaml`` of a checkpoint's run; None if there is none."""
    folder = Path(checkpoint).resolve().parent
    file = (folder.parent if folder.name == "checkpoints" else folder) / "config.yaml"
    return file if file.is_file() else None


def check_trust(parameters: Any, trust: Sequence[str], origin: str) -> None:
    """Refuse names of classes and functions that are not trusted, before they are imported.

    Args:
        parameters: dicts and lists of plain values, in which strings may be dotted names.
        trust: names that may be imported besides :data:`TRUSTED`.
        origin: their source, for the message.

    Raises:
        ValueError: if there is such a name.

    Example:
        >>> check_trust({"class_path": "os.system"}, (), "This config")
        Traceback (most recent call last):
        ValueError: This config names `os.system`, which would be imported: add `--trust os` (in Python: `trust`) if ...
    """
    for name in _short_names(parameters):
        if name not in trust:
            raise ValueError(
                f"{origin} names the class `{name}` without its module, which could be anybody's: add `--trust {name}` "
                "(in Python: `trust`) if you trust it."
            )
    for name in _dotted_names(parameters):
        root = name.partition(".")[0]
        if _is_below(name, trust) or (root not in sys.modules and find_spec(root) is None):
            continue  # nothing of that name could be imported
        if not _is_below(name, TRUSTED) or not _belongs(name):
            raise ValueError(
                f"{origin} names `{name}`, which would be imported: add `--trust {root}` (in Python: `trust`) if you "
                "trust it."
            )


def check_parameters(parameters: dict[str, Any], trust: Sequence[str], origin: str) -> None:
    """Refuse hyperparameters of a run from YAML that would import names that are not trusted.

    Args:
        parameters: hyperparameters of a checkpoint.
        trust: names that may be imported besides :data:`TRUSTED`.
        origin: their source, for the message.

    Raises:
        ValueError: if there are such names.

    Example:
        >>> check_parameters({"_class_path": "lightning_gan_stability.GANModule", "latent_dim": 4}, (), "This file")
    """
    maker = parameters.get("_instantiator", _INSTANTIATOR)
    if maker != _INSTANTIATOR:
        raise ValueError(f"{origin} names an unknown instantiator, `{maker}`.")
    if "_class_path" in parameters or "_instantiator" in parameters:
        check_trust(parameters, trust, origin)


def class_of(parameters: dict[str, Any], trust: Sequence[str], origin: str) -> type[GANModule]:
    """The class that the hyperparameters of a run from YAML name.

    Args:
        parameters: hyperparameters of a checkpoint.
        trust: names that may be imported besides :data:`TRUSTED`.
        origin: their source, for the message.

    Raises:
        ValueError: if they name no class, one that is not trusted, or one that is not a GANModule.

    Example:
        >>> class_of({"_class_path": "lightning_gan_stability.SuperResolution"}, (), "This file").__name__
        'SuperResolution'
    """
    name = parameters.get("_class_path")
    if name is None:
        raise ValueError(
            f"{origin} is of a run from Python, and does not say how its networks are made: name the class of the "
            "module, if it makes them itself, or a function that makes the module: `--model my_project.make_gan` (in "
            "Python: `model`)."
        )
    check_parameters(parameters, trust, origin)
    kind = resolve(name) if _is_dotted(name) else None
    if not isinstance(kind, type) or not issubclass(kind, GANModule):
        raise ValueError(f"{origin} names `{name}`, which is no GANModule.")
    return kind


def resolve(name: str) -> Any:
    """Import the object of a dotted name, such as ``"my_project.MyGAN"``.

    Raises:
        ValueError: if there is no such object.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"There is no class or function `{name}`: {error}") from error


def _parameters(state: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters that Lightning makes a module with: those under names that they once had are among them."""
    found: dict[str, Any] = {}
    for key in ("hparams", "module_arguments", "hyper_parameters"):
        found.update(state.get(key) or {})
    return found


def _load(kind: type[GANModule], file: Path) -> GANModule:
    if not issubclass(kind, GANModule):
        raise ValueError(f"`model` must be a GANModule, or a function that makes one, got {kind.__name__}.")
    try:
        return kind.load_from_checkpoint(file, map_location="cpu", weights_only=True)
    except TypeError as error:
        if "required" not in str(error):
            raise
        raise ValueError(
            f"{kind.__name__} does not make its networks itself ({error}): name a function that makes the module, "
            "`--model my_project.make_gan` (in Python: `model`)."
        ) from error


def _fill(make: Callable[[], GANModule], file: Path, state: dict[str, Any]) -> GANModule:
    module = make()
    if not isinstance(module, GANModule):
        raise ValueError(f"`model` must make a GANModule, and made a {type(module).__name__}.")
    module.on_load_checkpoint(state)
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"The weights of {str(file)!r} do not fit the module: {reason}") from error
    return module


def _dotted_names(value: Any) -> Iterator[str]:
    from jsonargparse import get_loader  # here, so that the package imports quickly

    if isinstance(value, str):
        if _is_dotted(value.strip()) and value != _INSTANTIATOR:
            yield value.strip()
        # the parser reads strings once more, as YAML or JSON
        for load in (get_loader("yaml"), json.loads):
            with suppress(ValueError, yaml.YAMLError):
                read = load(value)
                if not isinstance(read, str):
                    yield from _dotted_names(read)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _dotted_names(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _dotted_names(item)


def _short_names(value: Any) -> Iterator[str]:
    """Names of classes without a module, which the parser looks for among those that are there."""
    if isinstance(value, dict):
        name = value.get("class_path")
        if isinstance(name, str) and "." not in name:
            yield name
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _short_names(item)


def _is_dotted(value: Any) -> bool:
    parts = value.split(".") if isinstance(value, str) else []
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _is_below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _belongs(name: str) -> bool:
    """Whether a name of a trusted package is a class of it, and nothing that one of its files imports."""
    found: Any = None
    for part, parent in zip(name.split("."), [None, *accumulate(name.split("."), "{}.{}".format)], strict=False):
        try:
            found = import_module(part if parent is None else f"{parent}.{part}")
        except ImportError:
            found = getattr(found, part, None)
    return found is None or (isinstance(found, type) and _is_below(found.__module__, TRUSTED))
