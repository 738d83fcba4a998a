"""Writes one page on a run, or on several side by side: a file of HTML that needs no network.

It has the verdict, what was said, samples over time, curves, the config and the environment, from what the CSVLogger
and the monitors leave in the folder of a run: also of a run that is still going, or was killed.

  gan-stability report runs/digits/version_0
  gan-stability report runs/digits/version_0 runs/digits/version_1 --out compared.html
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gan-stability report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the folder of a run, with its metrics.csv")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page; by default report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    from lightning_gan_stability.report import write_report

    print(write_report(arguments.runs, arguments.out, arguments.overwrite))
