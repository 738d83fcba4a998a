"""The command ``gan-stability``."""

from lightning_gan_stability.cli.main import build as build
from lightning_gan_stability.cli.main import main as main
