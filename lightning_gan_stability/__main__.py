"""``python -m lightning_gan_stability``: the same as the command ``gan-stability``."""

from lightning_gan_stability.cli.main import main

if __name__ == "__main__":
    main()
