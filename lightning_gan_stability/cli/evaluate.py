"""Measures checkpoints by the protocol of their run: FID, KID, precision, recall, density, coverage and others.

  gan-stability evaluate runs/ring/version_0
  gan-stability evaluate a/last.ckpt b/last.ckpt --data my_project.MyData --model my_project.make_gan --out table.md

A run from a config needs nothing else, because config.yaml has its data and its protocol; options override them. For
several checkpoints, a table shows which differences are larger than noise. All are compared by the first one's
protocol.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gan-stability evaluate``."""
    from lightning_gan_stability.cli.options import add_model_options

    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    protocol = parser.add_argument_group("protocol, where it is not that of the run")
    protocol.add_argument("--config", metavar="FILE", help="has data, and callbacks that measure")
    protocol.add_argument(
        "--data", metavar="NAME", help="a data module, such as Ring or my_project.MyData, or a folder of images"
    )
    protocol.add_argument("--monitor", metavar="NAME", help="which QualityMonitor of the config, by its `name`")
    protocol.add_argument("--n", type=int, help="generated samples")
    protocol.add_argument("--n-real", metavar="N", help="real samples, or all")
    protocol.add_argument("--split", choices=("train", "val", "test"), help="real samples to compare with")
    protocol.add_argument(
        "--extractor", metavar="NAME", help="Inception, DigitClassifier, Identity or a dotted path of your own"
    )
    protocol.add_argument("--metrics", metavar="NAMES", help="such as fid,recall")
    protocol.add_argument("--truncation", type=float, metavar="PSI", help="of the generated samples")
    protocol.add_argument(
        "--paired",
        metavar="NAME",
        action="append",
        default=[],
        help="psnr, ssim or the dotted path of a metric of torchmetrics, beside targets; can be given several times",
    )
    protocol.add_argument("--no-average", action="store_true", help="measure the last weights, not their average")
    intervals = parser.add_argument_group("intervals")
    intervals.add_argument(
        "--bootstrap", type=int, default=200, metavar="N", help="how often samples are halved; 0: no intervals"
    )
    intervals.add_argument("--level", type=float, default=0.95, help="of confidence")
    intervals.add_argument("--seed", type=int, default=0, help="of the halves")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", action="append", default=[], metavar="FILE", help="FILE.json, .csv or .md; can be given several times"
    )
    files.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table and write the files."""
    from lightning_gan_stability.cli.evaluating import measure
    from lightning_gan_stability.cli.results import as_text, check_files, write

    files = [Path(file) for file in arguments.out]
    check_files(files, arguments.overwrite)
    results = measure(arguments)
    print(as_text(results))
    write(results, files)
