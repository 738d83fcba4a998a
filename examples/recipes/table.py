"""Synthetic rows of scikit-learn's tables: CTGAN's step.

    python -m examples.recipes.table

Draws ``table.png``: marginals and correlations of real and of synthetic rows; and prints how well a classifier does
that learned from synthetic rows, beside one that learned from real ones.
"""

import torch
from torch import Tensor, nn

from examples.recipes.shared import draw_tables, fit, options
from lightning_gan_stability.metrics import correlation_difference, efficacy, marginal_distances


class Residual(nn.Module):
    """A layer with BatchNorm whose input goes on beside its output."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers(x), x], 1)


class TableGenerator(nn.Sequential):
    """CTGAN's generator; the sizes come from the table."""

    def __init__(self, inputs: int, outputs: int, width: int = 128) -> None:
        super().__init__(
            Residual(inputs, width), Residual(inputs + width, width), nn.Linear(inputs + 2 * width, outputs)
        )


class TableDiscriminator(nn.Sequential):
    """CTGAN's critic; the sizes come from the table."""

    def __init__(self, inputs: int, outputs: int = 1, width: int = 128) -> None:
        super().__init__(
            nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Dropout(0.5),
            nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(width, outputs),
        )  # fmt: skip


def main() -> None:
    chosen = options(__doc__, 2000)
    tables = {}
    for name, without in {"CTGAN": [], "without the penalty": ["GradientPenalty"]}.items():
        cli = fit("table", without, steps=chosen.steps, seed=chosen.seed)
        train, test = cli.datamodule.train_table, cli.datamodule.test_table
        fake = cli.model.synthesize(len(train["target"]))
        tables |= {"real": train, name: fake}
        distance = sum(marginal_distances(train, fake).values()) / len(train)
        scores = efficacy(train, test, fake, "target")
        print(
            f"{name}: classifiers score {scores.synthetic:.3f} after synthetic and {scores.real:.3f} after real rows; "
            f"marginals {distance:.3f}, correlations {correlation_difference(train, fake):.3f}"
        )
    draw_tables(tables, "table.png")


if __name__ == "__main__":
    main()
