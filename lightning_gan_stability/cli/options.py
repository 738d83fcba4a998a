"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gan_stability.module import GANModule


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that determine how to load the module of a checkpoint, and on which device."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="for runs from Python: the dotted path of the module's class, if it makes its networks itself, or of a "
        "function without arguments that makes the module",
    )
    parser.add_argument(
        "--trust",
        metavar="NAME",
        action="append",
        default=[],
        help="a package, module or class that the checkpoint may have imported, besides this package's and torch's; "
        "can be given several times",
    )
    parser.add_argument("--device", default=None, help="where it runs, such as cuda:1; by default a GPU if any")


def load_module(path: str, arguments: argparse.Namespace) -> GANModule:
    """The module of a checkpoint in eval mode, on its device.

    Raises:
        ValueError: if the checkpoint cannot be read or trusted, or if the device is unknown.
    """
    import torch

    from lightning_gan_stability.checkpoints import load_gan, resolve

    sys.path.insert(0, os.getcwd())  # so that `--model my_project.MyGAN` works, as with `python -m`
    model = None if arguments.model is None else resolve(arguments.model)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    module = load_gan(path, model, arguments.trust)
    try:
        if torch.device(device).type == "meta":
            raise NotImplementedError("it holds no data")
        return module.to(device)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"`device` must be one of this machine, got {device!r}: {error}") from error
