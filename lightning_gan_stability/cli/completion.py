"""Tab completion of commands, settings and names of classes."""

from __future__ import annotations

import argparse
from importlib import import_module

from lightning_gan_stability._checks import require
from lightning_gan_stability.cli.diagnosis import CLASSES, names_for, settings
from lightning_gan_stability.cli.main import COMMANDS, Subcommand


def complete() -> None:
    """Tell a shell that asks through argcomplete the possible continuations, and exit.

    In bash and zsh, ``eval "$(register-python-argcomplete gan-stability)"`` enables this.

    Raises:
        ModuleNotFoundError: if argcomplete is not installed.
    """
    require("argcomplete", "completion").autocomplete(completed_parser())


def completed_parser() -> argparse.ArgumentParser:
    """A parser that knows the names of all commands and settings, and parses nothing else.

    Example:
        >>> vars(completed_parser().parse_args(["fit", "--trainer.max_steps", "5"]))["trainer.max_steps"]
        '5'
    """
    parser = argparse.ArgumentParser("gan-stability")
    parser.add_argument("--version", action="store_true")
    parsers = parser.add_subparsers()
    for name, command in COMMANDS.items():
        subparser = parsers.add_parser(name)
        if command.module is not None:
            module: Subcommand = import_module(f"lightning_gan_stability.cli.{command.module}")
            module.add_arguments(subparser)
            continue
        for option in ("--config", "--ckpt_path", "--seed_everything", "--print_config"):
            subparser.add_argument(option)
        keys = [f"{section}.{setting}" for section, names in settings().items() for setting in names]
        for key in ("data", "model", *keys, "trainer.callbacks+"):
            known = key.removesuffix("+")
            subparser.add_argument(f"--{key}", choices=names_for(known) if known in CLASSES else None)
    return parser
