"""The command ``gan-stability``: LightningCLI over :class:`GANModule`, with every name of the package short."""

import os
import sys
import warnings
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

import lightning_gan_stability as package
from lightning_gan_stability import GANModule
from lightning_gan_stability.tables import Column, is_description


def main(args: ArgsType = None) -> None:
    """Run a subcommand: ``fit``, ``validate`` or ``predict``.

    Args:
        args: the command line; None: ``sys.argv``.

    Example:
        ``gan-stability fit --config configs/ring.yaml --trainer.max_steps=1000``
    """
    _cli(args, run=True)


def build(args: ArgsType) -> LightningCLI:
    """Make what a config describes and run nothing, for a script that goes on with it.

    Args:
        args: the command line without a subcommand, such as ``["--config", "configs/ring.yaml"]``.

    Returns:
        An object with ``model``, ``datamodule`` and ``trainer``.

    Example:
        ``cli = build(["--config", "configs/ring.yaml"]); cli.trainer.fit(cli.model, cli.datamodule)``
    """
    return _cli(args, run=False)


def _cli(args: ArgsType, run: bool) -> LightningCLI:
    sys.path.insert(0, os.getcwd())  # so that `class_path: my_project.MyGAN` works, as with `python -m`
    # of no use to a reader: both are about Lightning's inside, and checkpoints are meant to come after the step here
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    set_loader("gan", lambda text: _lengthen(get_loader("yaml")(text)), (yaml.YAMLError,))
    return _CLI(
        GANModule,
        LightningDataModule,
        subclass_mode_model=True,  # `model: {generator: ...}`, or `model: {class_path: my.GAN, init_args: ...}`
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=_SaveConfig if run else None,  # a script's folder is its own
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "gan"},
        args=args,
        run=run,
    )


class _CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keep the parsers, of which each subcommand has one."""
        self.parsers = [*getattr(self, "parsers", []), parser]

    def before_instantiate_classes(self) -> None:
        """Give a module that describes a table the columns of the data, which only these know, if it was given none."""
        model = (self.config[self.subcommand] if self.subcommand else self.config).get("model")
        arguments = (model and model.get("init_args")) or {}
        if "columns" in arguments and arguments["columns"] is None:
            for parser in self.parsers:
                parser.link_arguments("data", "model.init_args.columns", _columns_of, apply_on="instantiate")


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


def _lengthen(value: Any) -> Any:
    """Give the package's own classes their full path, because other libraries have some of the names (`MLP`) too."""
    if isinstance(value, list):
        return [_lengthen(item) for item in value]
    if isinstance(value, dict):
        value = {key: _lengthen(item) for key, item in value.items()}
        name = value.get("class_path")
        return value | {"class_path": f"{package.__name__}.{name}"} if name in package.__all__ else value
    return value
