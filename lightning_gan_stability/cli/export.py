"""Writes what others need to draw samples: weights, config, program, picture and model card; can upload them."""

from __future__ import annotations

import argparse

from lightning_gan_stability.cli.options import add_model_options, load_module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gan-stability export``."""
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder for the files")
    parser.add_argument("--n-samples", type=int, default=16, metavar="N", help="samples in the picture (16)")
    parser.add_argument("--no-program", action="store_true", help="leave out sampler.pt2, the program of torch.export")
    parser.add_argument("--overwrite", action="store_true", help="replace files in a folder that is not empty")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the files to the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="so that only you see the new repository on the Hub")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the files, and upload them if requested.

    Raises:
        ValueError: if ``--private`` is given without ``--push-to-hub``, or if nothing can be written.
    """
    from lightning_gan_stability.publishing import check_repository, publish, push

    if arguments.private and arguments.push_to_hub is None:
        raise ValueError("`--private` belongs to --push-to-hub: add that, or remove --private.")
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)  # before the work
    module = load_module(arguments.checkpoint, arguments)
    folder = publish(
        module,
        arguments.out,
        arguments.checkpoint,
        n_samples=arguments.n_samples,
        program=not arguments.no_program,
        overwrite=arguments.overwrite,
    )
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if arguments.push_to_hub is not None:
        print(push(folder, arguments.push_to_hub, arguments.private))
