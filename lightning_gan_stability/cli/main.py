"""The command ``gan-stability``: selects a subcommand, and prints the help page."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn, Protocol

import lightning_gan_stability as package

# nothing here may import torch: help and version answer at once


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        usage: its arguments, as text.
        summary: one line.
        module: its module in :mod:`lightning_gan_stability.cli`; None: it is a method of Lightning's Trainer.
    """

    usage: str
    summary: str
    module: str | None = None


COMMANDS = {
    "new": Command("DIR --images FOLDER", "a config for your own images, chosen by what they are", "new"),
    "fit": Command("--config FILE", "train what a config describes"),
    "validate": Command("--config FILE --ckpt_path CKPT", "losses and quality on validation data"),
    "test": Command("--config FILE --ckpt_path CKPT", "the same on test data"),
    "predict": Command("--config FILE --ckpt_path CKPT", "a sample for each item of the data, into files"),
    "sample": Command("CKPT --n 1000 --out DIR", "samples into files", "sample"),
    "evaluate": Command("CKPT... --out table.md", "what they are worth, and which differences are noise", "evaluate"),
    "report": Command("RUN_DIR... --out FILE", "one page on a run, or on several side by side", "report"),
    "sweep": Command("--config FILE", "search hyperparameters by quality, and compare losses", "sweep"),
    "export": Command("CKPT --out DIR", "weights, program and model card, for others and for the Hub", "export"),
}

HELP = f"""\
gan-stability {package.__version__}: trains GANs stably, with PyTorch Lightning.

It runs configs: YAML files that say model, data and trainer, with callbacks that penalize, balance, average, measure,
detect collapse and roll back. Names of this package are short, and classes of your own have their dotted path.

Begin:
  gan-stability new my_gan --images FOLDER            a config for pictures of yours; then as it says
  gan-stability fit --config configs/ring.yaml        a minute on a CPU; files lie in runs/ring/version_0

Commands:
{{commands}}

  gan-stability COMMAND --help                        the arguments of a command
  gan-stability fit --config FILE --print_config      all settings of a config, with defaults
  gan-stability --version

Any setting of a config can be given behind it:
  --model.loss=Hinge --trainer.max_steps=1000 --trainer.callbacks+=HealthMonitor

A checkpoint's weights are read without running code from it, and its classes are imported only if they belong to this
package or you name them.
"""


class Subcommand(Protocol):
    """The interface of a subcommand's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add arguments to the subcommand's parser."""

    def run(self, arguments: argparse.Namespace) -> None:
        """Run with parsed arguments."""


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand: ``fit``, ``validate``, ``test``, ``predict``, ``sample``, ...

    On the command line, that is if ``args`` is None, a configuration error is reported in one sentence without a
    traceback, with exit status 2.

    Args:
        args: the command line; None: ``sys.argv``.

    Example:
        ``gan-stability fit --config configs/ring.yaml --trainer.max_steps=1000``
    """
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could follow, through argcomplete
        from lightning_gan_stability.cli.completion import complete

        complete()
    given = sys.argv[1:] if args is None else list(args)
    name, rest = (given[0], given[1:]) if given else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(describe_commands())
        return
    if name in ("--version", "version"):
        print(f"gan-stability {package.__version__}")
        return
    if name not in COMMANDS:
        refuse_command(name)
    if COMMANDS[name].module is None:
        from lightning_gan_stability.cli.training import train

        train(None if args is None else given, interactive=args is None)
    else:
        run_subcommand(name, rest, interactive=args is None)


def run_subcommand(name: str, args: Sequence[str], interactive: bool) -> None:
    """Parse the arguments of a subcommand of this package's own, and run it."""
    command = COMMANDS[name]
    module: Subcommand = import_module(f"lightning_gan_stability.cli.{command.module}")
    parser = argparse.ArgumentParser(
        f"gan-stability {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    arguments = parser.parse_args(args)
    from lightning_gan_stability.cli.mistakes import explained

    with explained(interactive):
        module.run(arguments)


def describe_commands() -> str:
    """The help page.

    Example:
        >>> "gan-stability fit" in describe_commands()
        True
    """
    rows = [(f"{name} {command.usage}".rstrip(), command.summary) for name, command in COMMANDS.items()]
    width = max(len(left) for left, _ in rows)
    return HELP.format(commands="\n".join(f"  {left.ljust(width)}  {right}" for left, right in rows))


def refuse_command(name: str) -> NoReturn:
    """List the commands, and exit with status 2."""
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
    print(f"gan-stability: error: there is no command {name!r}: {hint}", file=sys.stderr)
    raise SystemExit(2)
