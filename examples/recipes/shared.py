"""What the examples share: runs of a config with some callbacks left out or put in, and pictures side by side."""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_gan_stability.cli import build

ROOT = Path(__file__).parents[2]

# what draws, measures and saves; a comparison does all of this at its end
WATCHERS = ("PairedMonitor", "TableMonitor", "SampleLogger", "ModelCheckpoint")


def prepare(
    name: str,
    without: Sequence[str] = (),
    replace: Mapping[str, Mapping[str, Any]] | None = None,
    add: Sequence[Mapping[str, Any]] = (),
    steps: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> LightningCLI:
    """What ``configs/<name>.yaml`` describes, changed.

    Args:
        name: of the config.
        without: class names of callbacks that are left out, besides those that only watch.
        replace: new arguments of callbacks by their class names.
        add: entries of further callbacks.
        steps: length of the run; None: the config's.
        seed: of weights, noise and data.
        settings: other values by dotted paths, such as ``{"model.init_args.g_weight": 1.0}``.
    """
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    trainer, model = config["trainer"], config["model"]["init_args"]
    trainer |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer |= {"enable_model_summary": False, "limit_val_batches": 0}
    if steps is not None:
        trainer["max_steps"] = steps
    kept = [c for c in trainer["callbacks"] if c["class_path"] not in (*WATCHERS, *without)]
    for callback in kept:
        callback["init_args"] = callback.get("init_args", {}) | dict((replace or {}).get(callback["class_path"], {}))
    trainer["callbacks"] = [*kept, *add]
    config["seed_everything"] = model["noise_seed"] = seed
    config["data"].setdefault("init_args", {})["seed"] = seed
    for path, value in (settings or {}).items():
        *way, last = path.split(".")
        place = config
        for key in way:
            place = place[key]
        place[last] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return build(["--config", str(file)])


def fit(*args: Any, before: Callable[[LightningCLI], None] | None = None, **kwargs: Any) -> LightningCLI:
    """The same, trained, in eval mode; `before` changes it before it trains."""
    quiet()
    cli = prepare(*args, **kwargs)
    if before is not None:
        before(cli)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.model.eval()
    return cli


def without_discriminator(cli: LightningCLI) -> None:
    """Let the generator train alone, by its other losses."""
    cli.model.plan, cli.model.adversarial = ("g",), False


def held_out(cli: LightningCLI, samples: int) -> Any:
    """The first held-out samples, as the module unpacks them: (real, condition)."""
    found = []
    for batch in cli.datamodule.val_dataloader():
        found.append(cli.model.unpack(batch))
        if sum(len(real) for real, _ in found) >= samples:
            break
    return tuple(torch.cat(parts)[:samples] for parts in zip(*found, strict=True))


def with_detail(images: Tensor, n: int) -> Tensor:
    """The indices of the n images whose neighbouring pixels differ most; much of a photograph is sky."""
    return images.diff(dim=-1).abs().mean((1, 2, 3)).argsort(descending=True)[:n]


def quiet() -> None:
    """Leave out what Lightning says of each of many runs."""
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def options(text: str | None, steps: int) -> argparse.Namespace:
    """The command line of an example: ``--steps`` and ``--seed``."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="batches of each run")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def rows_of_images(rows: Mapping[str, Tensor], path: str, scale: int = 2) -> None:
    """Draw rows of images (n, c, h, w) in [-1, 1] under each other, each with its name."""
    from matplotlib import pyplot as plt
    from torchvision.utils import make_grid

    n = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.45 * scale * n, 0.62 * scale * len(rows)))
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        images = torch.nn.functional.interpolate(images.detach().float().cpu(), 64)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        grid = make_grid(images, nrow=n, normalize=True, value_range=(-1, 1))
        axis.imshow(grid.permute(1, 2, 0).numpy())
        axis.set_title(name, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_sounds(sounds: Mapping[str, Tensor], name: str, rate: int) -> None:
    """Write waveforms (t,) in [-1, 1] as wav files, and draw their spectrograms."""
    from matplotlib import pyplot as plt
    from scipy.io import wavfile

    figure, axes = plt.subplots(len(sounds), 1, figsize=(8, 1.8 * len(sounds)), sharex=True)
    for axis, (title, wave) in zip(axes, sounds.items(), strict=True):
        samples = wave.detach().float().cpu().clamp(-1, 1).numpy()
        wavfile.write(
            f"{name}_{title.replace(' ', '_').replace('-', '_')}.wav", rate, (32767 * samples).astype("int16")
        )
        axis.specgram(samples + 1e-6, 512, rate, noverlap=384, vmin=-140, vmax=-40, cmap="magma")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("Hz")
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(f"{name}.png", dpi=100)
    plt.close(figure)


def draw_tables(tables: Mapping[str, Mapping[str, Any]], path: str, columns: int = 6) -> None:
    """Draw the distributions of some columns, and the correlations of the numeric ones."""
    import numpy as np
    from matplotlib import pyplot as plt

    real = next(iter(tables.values()))
    names = [*[*real][: columns - 1], [*real][-1]]
    numeric = [name for name in real if np.asarray(real[name]).dtype.kind in "if"]
    figure, axes = plt.subplots(len(tables), len(names) + 1, figsize=(1.9 * (len(names) + 1), 1.9 * len(tables)))
    for row, (title, table) in zip(axes, tables.items(), strict=True):
        for axis, name in zip(row, names, strict=False):
            values = np.asarray(table[name])
            if name in numeric:
                low, high = np.min(real[name]), np.max(real[name])
                axis.hist(values, bins=np.linspace(low, high, 25), density=True)
            else:
                kinds, counts = np.unique(values, return_counts=True)
                axis.bar(kinds.astype(str), counts / len(values))
            axis.set_title(name, fontsize=7)
            axis.tick_params(labelsize=6)
        row[0].set_ylabel(title, fontsize=8)
        matrix = np.corrcoef(np.stack([np.asarray(table[name], dtype=float) for name in numeric]))
        row[-1].imshow(matrix, vmin=-1, vmax=1, cmap="RdBu")
        row[-1].set_title("correlations", fontsize=7)
        row[-1].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
