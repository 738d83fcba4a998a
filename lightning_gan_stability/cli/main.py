"""The command ``gan-stability``: LightningCLI over :class:`GANModule`, with every name of the package short."""

import os
import sys
import warnings
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

import lightning_gan_stability as package
from lightning_gan_stability import GANModule


def main(args: ArgsType = None) -> None:
    """Run a subcommand: ``fit``, ``validate`` or ``predict``.

    Args:
        args: the command line; None: ``sys.argv``.

    Example:
        ``gan-stability fit --config configs/ring.yaml --trainer.max_steps=1000``
    """
    sys.path.insert(0, os.getcwd())  # so that `class_path: my_project.MyGAN` works, as with `python -m`
    # of no use to a reader: both are about Lightning's inside, and checkpoints are meant to come after the step here
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    set_loader("gan", lambda text: _lengthen(get_loader("yaml")(text)), (yaml.YAMLError,))
    LightningCLI(
        GANModule,
        LightningDataModule,
        subclass_mode_model=True,  # `model: {generator: ...}`, or `model: {class_path: my.GAN, init_args: ...}`
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "gan"},
        args=args,
    )


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
