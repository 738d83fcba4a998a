"""LightningCLI for :class:`GANModule`, with short names for all classes of the package."""

import json
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import lightning_gan_stability as package
from lightning_gan_stability.checkpoints import newest_checkpoint
from lightning_gan_stability.cli.diagnosis import diagnose, given_configs, meant, repeated
from lightning_gan_stability.cli.mistakes import complain, explained
from lightning_gan_stability.cli.progress import StepsProgressBar
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.writing import SampleWriter
from lightning_gan_stability.tables import Column, is_description


def train(args: ArgsType, interactive: bool = False, callbacks: Sequence[Callback] = ()) -> None:
    """Run a subcommand of Lightning's Trainer: ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: the command line, subcommand first.
        interactive: whether a configuration error ends the process with one sentence.
        callbacks: further callbacks, besides those of configs.
    """
    with explained(interactive):
        try:
            _cli(args, run=True, added=callbacks)
        except ArgumentError as error:
            complain(diagnose(sys.argv[1:] if args is None else [*args], str(error)))


def build(args: ArgsType) -> LightningCLI:
    """Create the objects of a config without running anything, for use in a script.

    Args:
        args: the command line without a subcommand, such as ``["--config", "configs/ring.yaml"]``.

    Returns:
        An object with ``model``, ``datamodule`` and ``trainer``.

    Example:
        ``cli = build(["--config", "configs/ring.yaml"]); cli.trainer.fit(cli.model, cli.datamodule)``
    """
    return _cli(args, run=False)


def read_config(args: Sequence[str], brief: bool = False) -> dict[str, Any]:
    """All settings, as ``fit`` reads them, as plain data; nothing is made of them.

    Args:
        args: the command line without a subcommand.
        brief: without those that have their default.

    Raises:
        ValueError: in a sentence, if ``fit`` would refuse the line.
    """
    check_config(args)
    cli = _reading()
    return dict(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False, skip_default=brief)) or {})


def check_config(args: Sequence[str]) -> None:
    """Refuse what ``fit`` would refuse.

    Raises:
        ValueError: in a sentence.
    """
    try:
        _reading().read([*args])
    except ArgumentError as error:
        raise ValueError(diagnose([*args], str(error))) from error


@cache
def _reading() -> Any:
    return _cli([], run=False, kind=_Reading)


def _lengthen(value: Any) -> Any:
    """Give the package's own classes their full path, because other libraries have some of the names (`MLP`) too."""
    if isinstance(value, list):
        return [_lengthen(item) for item in value]
    if isinstance(value, dict):
        value = {key: _lengthen(item) for key, item in value.items()}
        name = value.get("class_path")
        return value | {"class_path": f"{package.__name__}.{name}"} if name in package.__all__ else value
    return value


def _load(text: str) -> Any:
    for key, _ in repeated(yaml.compose(text)):
        raise yaml.YAMLError(f"`{key.value}` stands twice in one place")
    return _lengthen(get_loader("yaml")(text))


# a process that `ddp_spawn` begins knows the parsers' mode from here
set_loader("gan", _load, (yaml.YAMLError,))


def _cli(args: ArgsType, run: bool, added: Sequence[Callback] = (), kind: "type[_CLI] | None" = None) -> LightningCLI:
    sys.path.insert(0, os.getcwd())  # so that `class_path: my_project.MyGAN` works, as with `python -m`
    # of no use to a reader: all are about Lightning's inside, and checkpoints are meant to come after the step here
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    for name in package.__all__:
        getattr(package, name)  # the parser finds short names among classes that are there
    return (kind or _CLI)(
        GANModule,
        LightningDataModule,
        subclass_mode_model=True,  # `model: {generator: ...}`, or `model: {class_path: my.GAN, init_args: ...}`
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=_SaveConfig if run else None,  # a script's folder is its own
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "gan", "prog": "gan-stability", "exit_on_error": False},
        trainer_defaults={"callbacks": [*added]},
        args=args,
        run=run,
    )


class _CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keep the parsers, of which each subcommand has one."""
        self.parsers = [*getattr(self, "parsers", []), parser]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and find the checkpoint that ``last`` means.

        Lightning would put the model's arguments in the checkpoint in the place of those that are given here; the path
        is hidden from it until it instantiates classes.
        """
        named: dict[str, Any] = {}
        if args is None or isinstance(args, list):
            given = sys.argv[1:] if args is None else args
            _warn_of_replaced(given)
            rest, named = _of_named(given)
            args = rest if named else args
        super().parse_arguments(parser, args)
        if named:  # once more, with the whole list
            assert isinstance(args, list)
            content = yaml.safe_load(parser.dump(self.config, skip_none=False))
            content = content[self.config.subcommand] if "subcommand" in self.config else content
            for key, value in named.items():
                put(content, key, value)
            super().parse_arguments(
                parser, [*args, f"--trainer.callbacks={json.dumps(content['trainer']['callbacks'])}"]
            )
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        if config.get("trainer") is None:
            raise MisconfigurationException("`trainer:` has nothing below it: give it settings, or remove the line.")
        self.ckpt_path: str | None = None
        if "subcommand" in self.config:
            self.ckpt_path = _checkpoint(config)
            config.ckpt_path = None

    def before_instantiate_classes(self) -> None:
        """Give a table's module the columns of the data; let nothing but a fit make a folder for a run."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        arguments = (config.get("model") and config.model.get("init_args")) or {}
        if "columns" in arguments and arguments["columns"] is None:  # which only the data know
            for parser in self.parsers:
                parser.link_arguments("data", "model.init_args.columns", _columns_of, apply_on="instantiate")
        if self.subcommand is None:
            return
        config.ckpt_path = self.ckpt_path
        if self.subcommand != "fit":
            if self.ckpt_path is None:
                raise MisconfigurationException(
                    f"`{self.subcommand}` needs weights: add --ckpt_path and a checkpoint, or --ckpt_path=last."
                )
            self.save_config_callback = None
            if config.get("return_predictions", True) is None:
                config.return_predictions = False  # they go into files, as many as there are
            config["trainer.logger"] = _remote(config.trainer.logger)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with a progress bar that knows a run's length, and with a writer of predictions."""
        config = (self.config_init[self.subcommand] if self.subcommand else self.config_init)["trainer"]
        callbacks = config["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        added: list[Callback] = [*self.trainer_defaults["callbacks"]]
        shown = config["enable_progress_bar"] is not False and not config["barebones"]
        if shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            added.append(StepsProgressBar())
        if self.subcommand == "predict" and not any(isinstance(c, BasePredictionWriter) for c in callbacks):
            added.append(SampleWriter())
        self.trainer_defaults["callbacks"] = added
        return super().instantiate_trainer(**kwargs)


class _Reading(_CLI):
    """Parses one line after another, in place of the one that it is made with."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse nothing, and let Lightning set no seed."""
        self.config = Namespace(seed_everything=False)  # type: ignore[no-untyped-call]

    def read(self, args: list[str]) -> None:
        """Parse a line into ``config``."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
            super().parse_arguments(self.parser, args)

    def instantiate_classes(self) -> None:
        """Make nothing."""


# ---------- settings by name


def _of_named(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The settings of callbacks by their names, which the parser does not know, apart from the rest of a line."""
    rest, named = list[str](), dict[str, Any]()
    for argument in args:
        found = re.fullmatch(r"--(trainer\.callbacks\.(?:[A-Z]\w*|\d+)(?:\.[\w.]+)?)=(.*)", argument, re.DOTALL)
        if found:
            named[found[1]] = get_loader("gan")(found[2])
        else:
            rest.append(argument)
    return rest, named


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Replace a setting that exists in a config.

    Args:
        config: plain data with all settings, from :func:`read_config`.
        key: as on the command line, such as ``trainer.callbacks.R1Penalty.gamma``: classes of a list by their names, or
            by numbers from 0; ``init_args`` may be omitted.
        value: the new value. None instead of a class of a list removes it from the list.

    Raises:
        ValueError: if there is no such setting; the message names the nearest one.

    Example:
        >>> config = {"callbacks": [{"class_path": "R1Penalty", "init_args": {"gamma": 1.0}}]}
        >>> put(config, "callbacks.R1Penalty.gamma", 2.0)
        >>> config["callbacks"][0]["init_args"]
        {'gamma': 2.0}
    """
    *parents, last = _way(config, key)
    node: Any = config
    for part in parents:
        node = node[part]
    if value is None and isinstance(node, list):
        del node[last]
    else:
        node[last] = value


def look_up(config: dict[str, Any], key: str) -> Any:
    """The value of a setting.

    Raises:
        ValueError: as :func:`put`.

    Example:
        >>> look_up({"model": {"class_path": "GAN", "init_args": {"latent_dim": 32}}}, "model.latent_dim")
        32
    """
    node: Any = config
    for part in _way(config, key):
        node = node[part]
    return node


def _way(config: dict[str, Any], key: str) -> list[Any]:
    """The keys and numbers that lead to a setting."""
    way, node, place = list[Any](), config, ""

    def step(part: Any) -> None:
        nonlocal node
        way.append(part)
        node = node[part]

    for part in key.split("."):
        if isinstance(node, dict) and "class_path" in node and part not in node:
            step("init_args")
        if isinstance(node, list):
            step(_number_of(node, part, key, place))
        elif not isinstance(node, dict):
            what = "null" if node is None else repr(node)
            raise ValueError(f"`{key}` has no place: `{place}` is {what} in the config, and has no `{part}`.")
        elif part in node:
            step(part)
        else:
            known = [f"{place}.{name}".lstrip(".") for name in node]
            raise ValueError(f"There is no setting `{key}`{meant(f'{place}.{part}'.lstrip('.'), known)}")
        place = f"{place}.{part}".lstrip(".")
    return way


def _number_of(entries: Sequence[Any], part: str, key: str, place: str) -> int:
    """The number of a class in a list."""
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    names = [str(entry.get("class_path")).rpartition(".")[2] if isinstance(entry, dict) else "" for entry in entries]
    if part not in names:
        hint = meant(part, names) if names else f": `{place}` is empty."
        raise ValueError(f"There is no setting `{key}`, since `{place}` has no {part}{hint}")
    if names.count(part) > 1:
        numbers = [f"`{place}.{i}`" for i, name in enumerate(names) if name == part]
        raise ValueError(f"`{key}` may be one of several: write {' or '.join(numbers)} for `{place}.{part}`.")
    return names.index(part)


def _warn_of_replaced(args: Sequence[str]) -> None:
    """Say so where a config takes the callbacks of the one before away."""
    before = None
    for file in given_configs(args):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue  # the parser says what is wrong
        trainer = content.get("trainer") if isinstance(content, dict) else None
        if isinstance(trainer, dict) and trainer.get("callbacks") is not None:
            if before is not None:
                rank_zero_warn(f"{file} replaces the callbacks of {before} (write `callbacks+:` to add to them).")
            before = file


def _checkpoint(config: Namespace) -> str | None:
    """The checkpoint to go on from; ``last``: the newest of the runs before this one in the same place."""
    path: str | None = config.get("ckpt_path")
    if path != "last":
        return path
    folders = _folders(config.trainer)
    found = [file for folder in folders if folder.is_dir() for file in folder.rglob("*.ckpt")]
    if found:
        newest = newest_checkpoint(found)
        rank_zero_info(f"--ckpt_path=last: goes on from {newest}.")
        return str(newest)
    places = ", ".join(map(str, folders))
    rank_zero_warn(f"--ckpt_path=last: there is no checkpoint in {places} yet, so the run begins at step 0.")
    return None


def _folders(trainer: Namespace) -> list[Path]:
    """Where the checkpoints of runs lie: in the folders that ModelCheckpoints were given, or in those of loggers."""
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    given = [(callback.get("init_args") or {}).get("dirpath") for callback in callbacks if "class_path" in callback]
    if any(given):
        return [Path(path) for path in given if path]
    root = Path(trainer.get("default_root_dir") or ".")
    loggers = trainer.get("logger")
    if loggers is None or loggers is True:
        return [root / "lightning_logs"]
    folders = []
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if logger:
            arguments = logger.get("init_args") or {}
            save = Path(arguments.get("save_dir") or arguments.get("root_dir") or root)
            folders.append(save / str(arguments.get("name") or arguments.get("project") or "lightning_logs"))
    return folders or [root / "checkpoints"]


def _remote(logger: Any) -> Any:
    """The loggers that make no folder of a run."""
    if isinstance(logger, list):
        return [one for one in logger if _remote(one)] or False
    name = str(logger.get("class_path")) if isinstance(logger, Namespace) else ""
    return logger if name and not name.endswith(("CSVLogger", "TensorBoardLogger")) else False


def _columns_of(data: Any) -> Any:
    """The columns of the data, in a form that a parser may print when it cannot make the model."""
    columns = getattr(data, "columns", None)
    return [Column(column) for column in columns] if is_description(columns) else columns


class _SaveConfig(SaveConfigCallback):
    """Gives Weights & Biases, besides the model's arguments, those of data, trainer and callbacks.

    Other loggers have ``config.yaml`` in their own folder; offline runs share one.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = yaml.safe_load(self.parser.dump(self.config))
        rest = {key: config[key] for key in ("seed_everything", "data", "trainer") if key in config}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(rest)
