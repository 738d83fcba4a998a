"""Adversarial training beside a reconstruction, and of tables: what the discriminator brings, and what keeps it right.

    python examples/benchmarks/applied.py --processes 2          # everything, three seeds: hours on two cores
    python examples/benchmarks/applied.py --only tokenizer table
    python examples/benchmarks/applied.py --smoke                # a minute; only shows that it runs

Each run is a file of configs/ with callbacks left out, or put in. Finished runs are kept in `--results` and not run
again. Numbers are means over seeds, and the smallest and the largest.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from classifiers import train_classifier
from jobs import finish, spread
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from overhead import Steps, compare, lightning
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `examples.recipes`

from examples.recipes.shared import fit, held_out, quiet, without_discriminator
from examples.recipes.vocoder import Discriminators, Generator
from lightning_gan_stability import (
    Alternating,
    FeatureMatching,
    LogMelSpectrogram,
    MelDistance,
    Photographs,
    Reconstruction,
    SmallMNIST,
    Vocoder,
)
from lightning_gan_stability.metrics import CodebookPerplexity, efficacy, frechet_distance, marginal_distances

QUICK = 0  # steps of the networks that are measured with, for --smoke

# callbacks of the tokenizer's config that say when and how much
START, WEIGHT, FLAT = "AdversarialStart", "AdaptiveAdversarialWeight", "R1Penalty"


# ---------- what is measured with


@cache
def patch_features() -> nn.Module:
    """Features of patches: a network that learned by which quarter turn patches of the photographs were turned."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    network = nn.Sequential(features, nn.Linear(64, 4))
    stream = Photographs(size=32, batch_size=64, seed=99).train_dataloader()
    turns = torch.arange(64) % 4

    def turned(step: int) -> tuple[Tensor, Tensor]:
        images = zip(stream[step], turns, strict=True)
        return torch.stack([image.rot90(int(k), (1, 2)) for image, k in images]), turns

    train_classifier(network, turned, QUICK or 800)
    return features.eval().requires_grad_(False)


@cache
def digit_reader() -> nn.Module:
    """A classifier of MNIST's digits at 16 by 16 pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 10),
    )  # fmt: skip
    stream = SmallMNIST(batch_size=128, size=16, seed=99).train_dataloader()
    train_classifier(network, stream.batch, QUICK or 600)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def of_patches(cli: LightningCLI) -> dict[str, float]:
    """L1 and the distance of features on held-out patches, by the average of the generator and by itself."""
    real, condition = held_out(cli, 1000)
    found = {}
    for name, network in (("", cli.model.current_generator), ("raw_", cli.model.generator)):
        fake = torch.cat([network(part)[0] for part in condition.split(100)])
        found[f"{name}l1"] = (fake - real).abs().mean().item()
        finite = bool(fake.isfinite().all())
        features = patch_features()
        found[f"{name}distance"] = frechet_distance(features(real), features(fake)) if finite else float("inf")
    return found


# ---------- the studies: (variant, seed, steps) to numbers

TOKENIZER: dict[str, dict[str, Any]] = {
    "reconstruction alone": {"without": [START, WEIGHT, FLAT]},
    "at once, fixed weight": {"without": [START, WEIGHT], "settings": {"model.init_args.g_weight": 0.1}},
    "at once, adaptive weight": {"without": [START]},
    "plateau, fixed weight": {"without": [WEIGHT], "settings": {"model.init_args.g_weight": 0.1}},
    "plateau, adaptive weight": {},
    "the same without R1": {"without": [FLAT]},
    "the same with LeCam for R1": {
        "without": [FLAT],
        "add": [{"class_path": "LeCam", "init_args": {"start": 100}}],
    },
}


def tokenizer(variant: str, seed: int, steps: int | None) -> dict[str, float]:
    """Held-out patches."""
    before = without_discriminator if variant == "reconstruction alone" else None
    settings = {"data.init_args.holdout": 1000} | TOKENIZER[variant].get("settings", {})
    cli = fit("tokenizer", seed=seed, steps=steps, before=before, **TOKENIZER[variant] | {"settings": settings})
    return of_patches(cli)


def balancer(**weights: float) -> dict[str, Any]:
    """An entry of a config."""
    return {"class_path": "LossBalancer", "init_args": {"weights": weights}}


SOUND = {
    "mel distance alone": {"without": ["FeatureMatching", "LossBalancer"]},
    "with discriminators": {},
    "balancer, shares of EnCodec": {"add": [balancer(mel=2.0, adversarial=4.0, feature_matching=4.0)]},
    "balancer, mel first": {"add": [balancer(mel=8.0, adversarial=1.0, feature_matching=1.0)]},
}


@torch.no_grad()
def sound(recipe: str, variant: str, seed: int, steps: int | None) -> dict[str, float]:
    """Held-out speech: the mel distance over seven windows, which no run trains on."""
    before = without_discriminator if variant == "mel distance alone" else None
    with torch.enable_grad():
        cli = fit(recipe, seed=seed, steps=steps, before=before, **SOUND[variant])
    real, condition = held_out(cli, 20)
    found = cli.model.current_generator(condition)
    fake, extras = found if isinstance(found, tuple) else (found, {})
    numbers = {"mel": MelDistance(16000)(fake, real).item()}
    if "codes" in extras:
        perplexity = CodebookPerplexity(codes=128, books=4)
        perplexity.update(extras["codes"])
        numbers["perplexity"] = perplexity.compute().item()
    return numbers


TABLE = {
    "CTGAN": {},
    "without the penalty": {"without": ["GradientPenalty"]},
    "without packing": {"settings": {"model.init_args.pac": 1}},
}


def table(data: str, variant: str, seed: int, steps: int | None) -> dict[str, float]:
    """Held-out rows: scores of classifiers that learned from synthetic rows over those that learned from real ones."""
    settings = {"data.init_args.data": data} | TABLE[variant].get("settings", {})
    cli = fit("table", seed=seed, steps=steps, **TABLE[variant] | {"settings": settings})
    train, test = cli.datamodule.train_table, cli.datamodule.test_table
    discrete = [column["name"] for column in cli.model.encoder.columns if "categories" in column]
    fake = cli.model.synthesize(len(train["target"]))
    scores = efficacy(train, test, fake, "target", discrete)
    marginals = marginal_distances(train, fake, discrete)
    return {"ratio": scores.ratio, "real": scores.real, "marginals": statistics.mean(marginals.values())}


UNPAIRED = {
    "CycleGAN": {},
    "without the pool": {"without": ["FakePool"]},
    "without cycle and identity": {"without": ["Reconstruction"]},
}


@torch.no_grad()
def unpaired(variant: str, seed: int, steps: int | None) -> dict[str, float]:
    """What a classifier of MNIST reads in its digits, in translated ones, and in those that went there and back."""
    with torch.enable_grad():
        cli = fit("unpaired_translation", seed=seed, steps=steps, **UNPAIRED[variant])
        reader = digit_reader()
    found: dict[str, list[Tensor]] = {"real": [], "translated": [], "there_and_back": []}
    for batch in cli.datamodule.val_dataloader():
        (a, a_labels), (b, b_labels) = batch["a"], batch["b"]
        for name, images, labels in (
            ("real", b, b_labels),
            ("translated", cli.model.translate(a, "b"), a_labels),
            ("there_and_back", cli.model.translate(cli.model.translate(b, "a"), "b"), b_labels),
        ):
            found[name].append(reader(images).argmax(1) == labels)
    return {name: torch.cat(parts).float().mean().item() for name, parts in found.items()}


# Built to fail as threads describe it. Alone: from the first step on, at a fixed weight, without penalty and average.
# Stabilized: the callbacks of the tokenizer's config, whose adversarial terms start after a sixth of these short runs
# and at an adaptive weight, with R1 and the generator's average. What is sabotaged stays so.
G_RATE, D_RATE = (f"model.init_args.{player}_optimizer.init_args.lr" for player in "gd")
G_WEIGHT = "model.init_args.g_weight"
SMALLER = {"data.init_args.holdout": 1000, "model.init_args.generator.init_args.width": 8}
SABOTAGE: dict[str, dict[str, Any]] = {
    "discriminator far too strong": {D_RATE: 1e-2, "model.init_args.discriminator.init_args.width": 64, G_WEIGHT: 0.8},
    "both rates ten times too high": {G_RATE: 1e-2, D_RATE: 1e-2, G_WEIGHT: 0.1},
    "adversarial weight ten times too high": {G_WEIGHT: 1.0},
}
STARTS = {START: {"when": "step", "step": 200, "monitor": None, "discriminator_first": 50, "ramp": 100}}


def failures(sabotage: str, variant: str, seed: int, steps: int | None) -> dict[str, float]:
    """A smaller tokenizer, sabotaged: without a discriminator, and with one, with and without stabilizers."""
    settings = SMALLER | SABOTAGE[sabotage]
    if variant == "stabilized":
        # the adaptive weight is in the place of the one that somebody chose, unless that is what is wrong
        settings[G_WEIGHT] = max(settings[G_WEIGHT], 1.0)
        return of_patches(fit("tokenizer", replace=STARTS, seed=seed, steps=steps, settings=settings))
    before = without_discriminator if variant == "reconstruction alone" else None
    alone = [START, WEIGHT, FLAT, "GeneratorEMA"]
    return of_patches(fit("tokenizer", alone, before=before, seed=seed, steps=steps, settings=settings))


# ---------- what a step costs


class HandWritten(LightningModule):
    """HiFi-GAN's step in plain Lightning: one pass of the generator, and two toggled optimizers."""

    def __init__(self, generator: nn.Module, discriminators: nn.ModuleDict, spectrogram: nn.Module, mel: nn.Module):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminators = generator, discriminators
        self.spectrogram, self.mel = spectrogram, mel

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        d_optimizer, g_optimizer = self.optimizers()
        with torch.no_grad():
            condition = self.spectrogram(real)
        fake = self.generator(condition)
        self.toggle_optimizer(d_optimizer)
        d_optimizer.zero_grad()
        loss = torch.zeros(())
        for judge in self.discriminators.values():
            loss = loss + (1 - judge(real)[0]).square().mean() + judge(fake.detach())[0].square().mean()
        self.log("d/adversarial", loss, prog_bar=True)
        self.manual_backward(loss)
        d_optimizer.step()
        self.untoggle_optimizer(d_optimizer)
        self.toggle_optimizer(g_optimizer)
        g_optimizer.zero_grad()
        adversarial, features = torch.zeros(()), torch.zeros(())
        for judge in self.discriminators.values():
            with torch.no_grad():
                _, of_real = judge(real)
            logits, of_fake = judge(fake)
            adversarial = adversarial + (1 - logits).square().mean()
            for x, y in zip(of_real, of_fake, strict=True):
                features = features + (x - y).abs().mean()
        mel = self.mel(fake, real)
        for name, value in (("adversarial", adversarial), ("feature_matching", 2 * features), ("mel", 45 * mel)):
            self.log(f"g/{name}", value, prog_bar=name == "adversarial")
        self.manual_backward(adversarial + 2 * features + 45 * mel)
        g_optimizer.step()
        self.untoggle_optimizer(g_optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(net.parameters(), 1e-3, (0.8, 0.99)) for net in (self.discriminators, self.generator)]


def time_of_a_step(rounds: int, batches: int, batch_size: int) -> None:
    """The vocoder's step against the same one by hand, in turn."""
    real = torch.randn(batch_size, 1, 4096).tanh()

    def seconds(ours: bool) -> float:
        torch.manual_seed(0)
        networks = Generator(), Discriminators()
        spectrogram = LogMelSpectrogram(16000, 512, 128, 40)
        mel = MelDistance(16000, [512], 40, base="e", center=False)
        steps = Steps(real, batches)
        if not ours:
            return lightning(HandWritten(*networks, spectrogram, mel), steps)
        make = partial(torch.optim.AdamW, lr=1e-3, betas=(0.8, 0.99))
        module = Vocoder(*networks, spectrogram, g_optimizer=make, d_optimizer=make)
        more = Alternating(share_fake=True), FeatureMatching(2.0), Reconstruction(45.0, mel, name="mel")
        return lightning(module, steps, *more)

    print("\ntime of a step, one thread: this package / by hand in Lightning; median (smallest to largest of rounds)")
    compare(f"vocoder, batch {batch_size}", rounds, 1.0, partial(seconds, True), partial(seconds, False))


# ---------- the jobs and their tables

STUDIES: dict[str, Callable[..., dict[str, float]]] = {
    "tokenizer": tokenizer,
    "vocoder": partial(sound, "vocoder"),
    "codec": partial(sound, "codec"),
    "table": table,
    "unpaired": unpaired,
    "failures": failures,
}
SHORTER = {"failures": 1200}  # batches, where they are not those of the config


def jobs_of(study: str, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """The arguments of each run of a study."""
    variants: dict[str, list[str]] = {
        "tokenizer": [*TOKENIZER],
        "vocoder": [*SOUND][:2],
        "codec": [*SOUND],
        "table": [*TABLE],
        "unpaired": [*UNPAIRED],
    }
    if study == "failures":
        kinds = ("reconstruction alone", "alone", "stabilized")
        for seed, sabotage, variant in product(range(10) if len(seeds) > 1 else seeds, SABOTAGE, kinds):
            if variant != kinds[0] or sabotage != "adversarial weight ten times too high":  # the first one's is its
                yield {"study": study, "sabotage": sabotage, "variant": variant, "seed": seed}
        return
    for seed, variant in product(seeds, variants[study]):
        if study == "table":
            for data in ("breast_cancer", "wine") if variant == "CTGAN" else ("breast_cancer",):
                yield {"study": study, "data": data, "variant": variant, "seed": seed}
        else:
            yield {"study": study, "variant": variant, "seed": seed}


def run(study: str, steps: int | None, **job: Any) -> dict[str, float]:
    torch.set_num_threads(1)
    start = time.process_time()
    found = STUDIES[study](steps=steps or SHORTER.get(study), **job)
    return found | {"seconds": time.process_time() - start}


def show(study: str, rows: list[dict[str, Any]]) -> None:
    """A line for each variant: its numbers, and those over the first variant's of the same seed."""
    keys = [key for key in rows[0] if key not in ("study", "variant", "seed", "data", "sabotage")]
    print(f"\n{study}\n| variant | {' | '.join(keys)} |\n{'|---' * (len(keys) + 1)}|")
    for data, variant in dict.fromkeys((row.get("data", ""), row["variant"]) for row in rows):
        mine = [row for row in rows if (row.get("data", ""), row["variant"]) == (data, variant)]
        cells = [spread([row[key] for row in mine]) for key in keys]
        print(f"| {data} {variant} | {' | '.join(cells)} |")
    if study in ("tokenizer", "vocoder", "codec"):
        first = {row["seed"]: row for row in rows if row["variant"] == rows[0]["variant"]}
        print("ratios to the first line, seed by seed:")
        for variant in dict.fromkeys(row["variant"] for row in rows):
            mine = [row for row in rows if row["variant"] == variant]
            ratios = {key: [row[key] / first[row["seed"]][key] for row in mine] for key in keys if key != "seconds"}
            print(f"  {variant}: " + ", ".join(f"{key} {spread(values)}" for key, values in ratios.items()))


def show_failures(rows: list[dict[str, Any]]) -> None:
    """How many runs end well: with features nearer than without a discriminator, and an L1 of at most 1.15 of its."""
    first = next(iter(SABOTAGE))
    base = {(r["sabotage"], r["seed"]): r for r in rows if r["variant"] == "reconstruction alone"}
    print("\nfailures: runs that end well, median ratios of L1 and of the distance of features")
    for sabotage, variant in product(SABOTAGE, ("alone", "stabilized")):
        mine = [row for row in rows if (row["sabotage"], row["variant"]) == (sabotage, variant)]
        if not mine:
            continue
        bases = [base.get((sabotage, row["seed"]), base[first, row["seed"]]) for row in mine]
        l1 = [row["l1"] / b["l1"] for row, b in zip(mine, bases, strict=True)]
        distance = [row["distance"] / b["distance"] for row, b in zip(mine, bases, strict=True)]
        well = sum(x <= 1.15 and y < 1 for x, y in zip(l1, distance, strict=True))
        cells = f"{well} of {len(mine)} | {statistics.median(l1):.2f} | {statistics.median(distance):.2f}"
        print(f"| {sabotage} | {variant} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*STUDIES, "time"], default=[*STUDIES, "time"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("runs/applied.jsonl"), help="finished runs, one a line")
    parser.add_argument("--smoke", action="store_true", help="one seed, three steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, results = ([0], None) if arguments.smoke else (arguments.seeds, arguments.results)
    global QUICK
    QUICK = 3 if arguments.smoke else 0
    print(f"torch {torch.__version__}; seconds are CPU seconds of one thread")
    most = 3 if arguments.smoke else None
    jobs = [job for study in STUDIES if study in arguments.only for job in [*jobs_of(study, seeds)][:most]]
    rows = finish(partial(run, steps=3 if arguments.smoke else None), jobs, arguments.processes, results)
    for study in STUDIES:
        if mine := [row for row in rows if row["study"] == study]:
            (show_failures if study == "failures" else partial(show, study))(mine)
    if "time" in arguments.only:
        quiet()
        time_of_a_step(*(1, 2, 1) if arguments.smoke else (5, 30, 8))


if __name__ == "__main__":
    main()
