"""Draws samples from a checkpoint into files: images as PNG, sound as wav, tables as CSV, anything else as npy.

  gan-stability sample runs/digits/version_0 --n 1000 --out digits
  gan-stability sample last.ckpt --n 100 --condition label=3 --truncation 0.7 --out threes
  gan-stability sample last.ckpt --condition photos --out larger       (a folder of sources: pictures, sounds, npy)

Samples depend only on the seed, not on the batch size. They come from the generator's average, if there is one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_gan_stability.cli.options import add_model_options, load_module
from lightning_gan_stability.cli.sources import read_sources

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gan_stability.module import GANModule
    from lightning_gan_stability.monitors.writing import SampleFiles
    from lightning_gan_stability.rejection import Rejection

BLOCK = 256  # latents that are drawn at once, whatever the size of batches
COLUMNS = 8  # of a grid
CALIBRATED = 1000  # held-out samples that --reject is calibrated with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gan-stability sample``."""
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run, whose newest checkpoint is taken")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder that samples are written into")
    parser.add_argument("--n", type=int, help="how many; by default 64, or as many as there are sources")
    parser.add_argument("--seed", type=int, default=0, help="of latents and whatever else is drawn; by default 0")
    parser.add_argument("--batch-size", type=int, default=64, help="samples that are made at once; by default 64")
    parser.add_argument(
        "--condition",
        metavar="WHAT",
        help="label=3, label=0,1,2 (in turn), column=category of a table, or a file or folder of sources, of the first "
        "domain as a=DIR for unpaired translation; by default labels are drawn, each as often as another",
    )
    parser.add_argument("--truncation", type=float, default=1.0, help="ψ of StyleGAN; by default 1, which is none")
    parser.add_argument("--no-average", action="store_true", help="the generator itself, and not its average")
    parser.add_argument("--grid", action="store_true", help="draw grid.png too, with a row for each class")
    parser.add_argument(
        "--interpolate",
        type=int,
        metavar="STEPS",
        help="go from one latent to the next in so many steps, which --n counts, and draw interpolation.png too",
    )
    parser.add_argument(
        "--reject",
        metavar="NAME",
        help="let the discriminator choose: drs (DiscriminatorRejection), mh (MetropolisHastings), or the dotted path "
        "of a Rejection of your own; it is calibrated with held-out samples where the data are known",
    )
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="with held-out samples for --reject: a data module, or a folder of images; by default that of the run",
    )
    parser.add_argument("--sample-rate", type=int, help="of sounds, in Hz; by default that of the module")
    parser.add_argument(
        "--overwrite", action="store_true", help="the folder may hold earlier samples, which are removed"
    )
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draw the samples."""
    import torch

    from lightning_gan_stability._checks import check, check_integer
    from lightning_gan_stability.monitors.writing import SampleFiles
    from lightning_gan_stability.recipes.table import TableSynthesis

    check_integer("batch-size", arguments.batch_size)
    check(0 <= arguments.seed < 2**63, "seed", "from 0 to 2**63 - 1", arguments.seed)
    if arguments.n is not None:
        check_integer("n", arguments.n)
    if arguments.interpolate is not None:
        check_integer("interpolate", arguments.interpolate, least=2)
    if arguments.data is not None and arguments.reject is None:
        raise ValueError("--data has held-out samples for --reject: add it, or leave --data out.")
    module = load_module(arguments.checkpoint, arguments)
    if arguments.no_average:
        if module.generator_ema is None:
            raise ValueError("The checkpoint has no average of the generator: leave --no-average out.")
        module.generator_ema = None
    module.noise_seed = arguments.seed
    rate = arguments.sample_rate or getattr(module, "sample_rate", None)
    key, _, value = (arguments.condition or "").rpartition("=")
    with torch.no_grad():
        if isinstance(module, TableSynthesis):
            _refuse(arguments, "a table", "truncation", "grid", "interpolate", "reject")
            files = SampleFiles(arguments.out, arguments.overwrite)
            _write_rows(module, arguments, {key: _category(module, key, value)} if value else None, files)
        elif value and (Path(value).exists() or not key):
            _refuse(arguments, "sources", "grid", "interpolate", "truncation", "reject")
            sources = read_sources(module, value)
            files = SampleFiles(arguments.out, arguments.overwrite, rate)
            _write_translated(module, arguments, key, sources, files)
        else:
            labels = labels_of(module, key, value)
            if arguments.reject is None:
                files = SampleFiles(arguments.out, arguments.overwrite, rate)
                _write_drawn(module, arguments, labels, files)
            else:
                _refuse(arguments, "--reject, which draws latents by itself", "grid", "interpolate", "truncation")
                reject = rejection_of(module, arguments)
                files = SampleFiles(arguments.out, arguments.overwrite, rate)
                _write_chosen(module, arguments, labels, reject, files)
    print(f"{files.written} samples are in {files.folder}.")


def _refuse(arguments: argparse.Namespace, what: str, *names: str) -> None:
    """Refuse arguments that would do nothing."""
    unset = {"truncation": 1.0, "grid": False, "interpolate": None, "reject": None}
    for name in names:
        if getattr(arguments, name) != unset[name]:
            raise ValueError(f"--{name} has no meaning for samples of {what}: leave it out.")


# ---------- from latents


def latents_of(module: GANModule, n: int, seed: int) -> Tensor:
    """Latents (n, latent_dim) that depend only on their number and the seed.

    Example:
        >>> import torch
        >>> from lightning_gan_stability import MLP, GANModule
        >>> gan = GANModule(MLP([4, 2]), MLP([2, 1]), latent_dim=4)
        >>> torch.equal(latents_of(gan, 3, seed=0), latents_of(gan, 1000, seed=0)[:3])
        True
    """
    import torch

    from lightning_gan_stability.layers import parameter_dtype

    assert module.latent_dim is not None
    generator = torch.Generator().manual_seed(seed)
    dtype = parameter_dtype(module.generator, torch.get_default_dtype())
    blocks = [torch.randn(BLOCK, module.latent_dim, generator=generator) for _ in range(-(-n // BLOCK))]
    return torch.cat(blocks)[:n].to(dtype)


def between(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation of latents (n, d); their lengths are interpolated as well.

    slerp(a, b, t) = sin((1 − t) θ) / sin θ · a + sin(t θ) / sin θ · b, with the angle θ of a and b.

    "Sampling Generative Networks", https://arxiv.org/abs/1609.04468

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> between(a, b, torch.tensor([[0.5]]))
        tensor([[0.7071, 0.7071]])
    """
    import torch

    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1)[:, None].clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    straight = (1 - share) * start + share * end
    round_ = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / sine.clamp(min=1e-6)
    return torch.where(sine < 1e-4, straight, round_)


class Labels(NamedTuple):
    """Classes to request for samples.

    Attributes:
        values: classes, used in turn.
        drawn: draw classes at random instead, with equal probability.
        classes: number of classes; None: unknown.
    """

    values: list[int]
    drawn: bool
    classes: int | None

    def of(self, n: int, seed: int) -> Tensor:
        """The labels (n,) of the first n samples."""
        import torch

        if not self.drawn:
            return torch.tensor(self.values).repeat(-(-n // len(self.values)))[:n]
        generator = torch.Generator().manual_seed(seed + 1)
        blocks = [torch.randint(len(self.values), (BLOCK,), generator=generator) for _ in range(-(-n // BLOCK))]
        return torch.cat(blocks)[:n]


def labels_of(module: GANModule, key: str, value: str) -> Labels | None:
    """The labels that ``--condition`` requests from a generator with latents; None: it takes no labels.

    Raises:
        ValueError: if it needs another condition, or has no such class.
    """
    from lightning_gan_stability._compat import original_module
    from lightning_gan_stability.layers import condition_parameter, number_of_classes
    from lightning_gan_stability.monitors.reading import is_conditional

    generator = original_module(module.generator)
    _, needs = condition_parameter(generator)
    classes = number_of_classes(generator)
    if module.latent_dim is None:
        raise ValueError("The generator takes no latents: name a file or folder of sources, --condition DIR.")
    if not value:
        if not needs and classes is None:
            return None
        if classes is None:
            raise ValueError("The generator needs a condition: add --condition label=0, or a folder of sources.")
        return Labels([*range(classes)], drawn=True, classes=classes)
    if key != "label":
        given = f"{key}={value}" if key else value
        raise ValueError(f"`condition` must be label=NUMBER, or a file or folder that exists, got {given!r}.")
    if classes is None and not is_conditional(module):
        raise ValueError("The generator takes no condition: leave --condition out.")
    try:
        values = [int(part) for part in value.split(",")]
    except ValueError as error:
        raise ValueError(f"`condition` must be label=NUMBER or label=NUMBER,NUMBER,..., got label={value}.") from error
    wrong = [label for label in values if label < 0 or (classes is not None and label >= classes)]
    if wrong:
        known = "not below 0" if classes is None else f"from 0 to {classes - 1}"
        raise ValueError(f"Labels must be {known}, got {wrong[0]}.")
    return Labels(values, drawn=False, classes=classes)


def _write_drawn(module: GANModule, arguments: argparse.Namespace, labels: Labels | None, files: SampleFiles) -> None:
    import torch

    n = arguments.n or 64
    steps = arguments.interpolate
    if steps:
        rows = -(-n // steps)
        ends = latents_of(module, rows + 1, arguments.seed)
        share = torch.linspace(0, 1, steps, dtype=ends.dtype)[None, :, None].expand(rows, -1, 1).reshape(-1, 1)
        start, end = (part.repeat_interleave(steps, 0) for part in (ends[:-1], ends[1:]))
        n, latents = rows * steps, between(start, end, share)
        chosen = None if labels is None else labels.of(rows, arguments.seed).repeat_interleave(steps)
    else:
        latents = latents_of(module, n, arguments.seed)
        chosen = None if labels is None else labels.of(n, arguments.seed)
    kept = []
    for i, first in enumerate(_progress(range(0, n, arguments.batch_size))):
        part = slice(first, first + arguments.batch_size)
        condition = None if chosen is None else chosen[part]
        samples = _draw(module, latents[part], condition, arguments.truncation, "samples", i)
        if steps or arguments.grid:
            _check_images(samples)
        files.write(samples, condition)
        if steps:
            kept.append(samples)
    if steps:
        _draw_rows(kept, steps, files.folder / "interpolation.png")
    if arguments.grid:
        values = [None] if labels is None else sorted({*labels.values})
        rows = COLUMNS if labels is None else 1
        base = latents_of(module, COLUMNS * rows, arguments.seed)
        grid = []
        for value in values:
            condition = None if value is None else torch.full((len(base),), value)
            grid.append(_draw(module, base, condition, arguments.truncation, "grid", 0))
        _draw_rows(grid, COLUMNS, files.folder / "grid.png")


def rejection_of(module: GANModule, arguments: argparse.Namespace) -> Rejection:
    """The rejection that ``--reject`` names, calibrated with held-out samples of ``--data`` or of the run, if any.

    Raises:
        ValueError: if it is not the name of a Rejection.
    """
    import torch

    from lightning_gan_stability.checkpoints import find_checkpoint, resolve
    from lightning_gan_stability.cli.evaluating import data_of, plan_of
    from lightning_gan_stability.outputs import batch_size, tree_map
    from lightning_gan_stability.rejection import DiscriminatorRejection, MetropolisHastings, Rejection

    known = {"drs": DiscriminatorRejection, "mh": MetropolisHastings}
    if arguments.reject not in known and "." not in arguments.reject:
        raise ValueError(f"`reject` must be drs, mh or a dotted path, got {arguments.reject!r}.")
    made = known.get(arguments.reject) or resolve(arguments.reject)
    reject = made() if callable(made) else made
    if not isinstance(reject, Rejection):
        raise ValueError(f"`reject` must name a Rejection, got {arguments.reject!r}.")
    asked = argparse.Namespace(config=None, data=None, trust=arguments.trust)
    of_run = arguments.data is None
    data = plan_of(asked, find_checkpoint(arguments.checkpoint)).data if of_run else data_of(arguments.data, module)
    if data is None:
        return reject
    data.prepare_data()
    data.setup("validate")
    parts, n = [], 0
    for batch in data.val_dataloader() or ():
        parts.append(module.unpack(batch))
        n += batch_size(parts[-1][0])
        if n >= CALIBRATED:
            break
    if not parts:
        return reject
    real, condition = (tree_map(lambda *leaves: torch.cat(leaves), *trees) for trees in zip(*parts, strict=True))
    with module.noise.of("calibration"):
        return reject.calibrate(module, real, condition)


def _write_chosen(
    module: GANModule, arguments: argparse.Namespace, labels: Labels | None, reject: Rejection, files: SampleFiles
) -> None:
    n = arguments.n or 64
    condition = None if labels is None else labels.of(n, arguments.seed).to(module.device)
    with module.noise.of("samples"):
        samples = module.sample(n, condition, reject=reject)
    files.write(samples, condition)
    print(f"{reject.acceptance:.0%} of the samples that the generator made were accepted.")


def _draw(module: GANModule, latents: Tensor, condition: Any, truncation: float, purpose: str, i: int) -> Any:
    with module.noise.of(purpose, i):
        return module.sample(len(latents), condition, latents, truncation)


def _check_images(samples: Any) -> None:
    from torch import Tensor

    if not isinstance(samples, Tensor) or samples.dim() != 4:
        raise ValueError("--grid and --interpolate draw pictures of images, and these samples are something else.")


def _draw_rows(parts: list[Any], columns: int, file: Path) -> None:
    """Draw images in rows."""
    import torch
    from torchvision.utils import save_image

    images = torch.cat([part.float().cpu() for part in parts])
    images = images[:, : 3 if images.shape[1] >= 3 else 1]
    save_image(images, file, nrow=columns, normalize=True, value_range=(-1, 1))


def _progress(batches: Any) -> Any:
    from tqdm import tqdm

    return tqdm(batches, unit="batch", disable=not sys.stderr.isatty())


# ---------- from sources


def _write_translated(
    module: GANModule, arguments: argparse.Namespace, key: str, sources: list[tuple[str, Any]], files: SampleFiles
) -> None:
    from lightning_gan_stability.recipes.base import Recipe
    from lightning_gan_stability.recipes.translation import UnpairedTranslation

    if isinstance(module, UnpairedTranslation) and key not in ("a", "b"):
        raise ValueError("UnpairedTranslation has two directions: say whose images the sources are, a=DIR or b=DIR.")
    batches = 0
    for i, (name, read) in enumerate(_progress(sources[: arguments.n])):
        if files.written == arguments.n:
            break
        source = read()  # of a picture or sound one row, of an array any number
        source = source if arguments.n is None else source[: arguments.n - files.written]
        latents = None if module.latent_dim is None else latents_of(module, len(source), arguments.seed + i)
        is_picture = source.dim() == 4
        for first in range(0, len(source), arguments.batch_size):
            part = slice(first, first + arguments.batch_size)
            rows = source[part].to(module.device)
            with module.noise.of("samples", batches):
                if isinstance(module, UnpairedTranslation):
                    samples = module.translate(rows, to="b" if key == "a" else "a")
                elif latents is not None:
                    samples = module.sample(len(rows), rows, latents[part])
                else:
                    batch = {"source": rows} if isinstance(module, Recipe) and is_picture else rows
                    samples = module.predict_step(batch, batches)
            files.write(samples, names=[name] if len(source) == 1 else None)
            batches += 1
    if files.written < (arguments.n or 0):
        print(f"There are no more sources for the {arguments.n} samples that --n asks for.", file=sys.stderr)


def _category(module: Any, column: str, value: str) -> Any:
    """A category as the table has it: some are numbers."""
    found: Any = next((known for known in module.encoder.columns if known["name"] == column), {})
    return next((category for category in found.get("categories", ()) if str(category) == value), value)


def _write_rows(module: Any, arguments: argparse.Namespace, condition: Any, files: SampleFiles) -> None:
    n = arguments.n or 64
    for i, first in enumerate(_progress(range(0, n, 1024))):
        with module.noise.of("samples", i):
            files.write_table(module.synthesize(min(1024, n - first), condition))
