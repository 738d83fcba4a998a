"""Starts a GAN: writes a config that is ready to run, chosen by the contents of a folder of images."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gan-stability new``."""
    parser.add_argument("folder", metavar="DIR", help="where the config goes, and the runs")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="a folder or a zip archive of images, of which sub-folders are classes; without it: handwritten digits",
    )
    parser.add_argument(
        "--size", type=int, help="height and width in pixels: 16, 32, 64, 128 or 256; by default what suits the images"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the config of a folder that is not empty")


def run(arguments: argparse.Namespace) -> None:
    """Write the config, and print what was found, what was chosen, and how to continue."""
    from lightning_gan_stability.cli.template import start

    print(*start(arguments.folder, arguments.images, arguments.size, arguments.overwrite), sep="\n")
