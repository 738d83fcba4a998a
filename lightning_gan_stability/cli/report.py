"""Writes a report on a run, or on several side by side: an HTML page that needs no network.

It shows the verdict, messages, samples over time, curves, the config and the environment, from the files that the
CSVLogger and the monitors write to the folder of a run. The run may still be going, or may have been killed.

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
    """Write the report, and print its path."""
    from lightning_gan_stability.report import write_report

    print(write_report(arguments.runs, arguments.out, arguments.overwrite))
