"""Publishes a generator in one folder or on the Hub: weights, config, program, samples and a model card."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.cli import instantiate_module
from torch import Tensor, nn

from lightning_gan_stability._checks import check_integer, check_type, require
from lightning_gan_stability.callbacks.spectral_norm import SpectralNorm
from lightning_gan_stability.checkpoints import (
    check_parameters,
    class_of,
    find_checkpoint,
    find_config,
    read_checkpoint,
)
from lightning_gan_stability.layers import condition_parameter, number_of_classes
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.pictures import kind_of, picture
from lightning_gan_stability.outputs import Condition, Sample, batch_size, take_rows, tree_leaves, tree_map

WEIGHTS, CONFIG, CARD = "generator.safetensors", "config.yaml", "README.md"
SAMPLES, PROGRAM = "samples.png", "sampler.pt2"
FILES = (WEIGHTS, CONFIG, CARD, SAMPLES, PROGRAM)
TOLERANCE = 1e-5  # between samples and those of the program, relative to the greatest value
LOWER, HIGHER = ("fid", "kid", "missing"), ("precision", "recall", "density", "coverage", "modes")
SHOWN = (*LOWER, *HIGHER, "dependence", "class_consistency", "class_diversity")  # of the values of a monitor


def publish(
    module: GANModule,
    folder: str | PathLike[str],
    checkpoint: str | PathLike[str],
    condition: Condition = None,
    n_samples: int = 16,
    program: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write everything that others need to draw samples into a folder; on failure nothing is written.

    * ``generator.safetensors``: the weights of the average if there is one, otherwise those of the generator.
    * ``config.yaml``: how to make the module, for :func:`load_published`.
    * ``sampler.pt2``: the generator as a program of ``torch.export``, which maps latents (n, latent_dim), and a
      condition if the generator takes one, to samples, for any n. It runs without this package.
    * ``samples.png``, if samples can be drawn.
    * ``README.md``: a model card for the Hugging Face Hub, with the values logged by the checkpoint's run.

    Spectral norm is folded into the weights, also in the given module, which is left in eval mode on the CPU.

    Args:
        module: the checkpoint's module, from :func:`~lightning_gan_stability.checkpoints.load_gan`.
        folder: the folder to write to.
        checkpoint: the file, or the folder of its run.
        condition: at least two rows of a condition, for a generator that takes one. Not needed for class labels.
        n_samples: number of samples in the picture.
        program: write ``sampler.pt2``.
        overwrite: replace files of these names in a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder is not empty, if the generator's condition is unknown, if the network cannot be
            exported, or if the program and the module return different samples.
        ModuleNotFoundError: without safetensors or huggingface_hub, which the extra ``hub`` installs.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gan_stability import MLP, GANModule, Ring
        >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(max_steps=2, default_root_dir=folder, logger=False, enable_progress_bar=False)
        ...     trainer.fit(gan, Ring())
        ...     found = publish(gan.eval(), f"{folder}/mine", folder, program=False)
        ...     sorted(file.name for file in found.iterdir())
        ['README.md', 'config.yaml', 'generator.safetensors', 'samples.png']
    """
    check_type("module", module, GANModule)
    check_integer("n_samples", n_samples)
    safetensors = require("safetensors.torch", "hub")
    require("huggingface_hub", "hub")
    target, file = Path(folder), find_checkpoint(checkpoint)
    if target.exists() and not target.is_dir():
        raise ValueError(f"`folder` must be a folder, and {str(target)!r} is a file.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{str(target)!r} is not empty: name another folder, or replace the files by --overwrite.")
    state = read_checkpoint(file)
    module = module.cpu().eval()
    SpectralNorm.remove(module)
    rows = _conditions(module, condition, n_samples)
    with _written(target) as place:
        safetensors.save_model(module.current_generator, str(place / WEIGHTS))
        (place / CONFIG).write_text(_yaml(state.get("hyper_parameters") or {}), encoding="utf-8")
        if program:
            torch.export.save(export_sampler(module, rows), place / PROGRAM)
        with torch.no_grad(), module.noise.of("published"):
            samples = module.sample(n_samples if rows is None else batch_size(rows), rows)
        if isinstance(samples, Tensor) and kind_of(samples) is not None:
            picture(samples).save(place / SAMPLES)
        written = {path.name for path in place.iterdir()}
        (place / CARD).write_text(_card(target.resolve().name, module, samples, rows, file, state, written), "utf-8")
    return target


def load_published(
    folder: str | PathLike[str],
    model: type[GANModule] | Callable[[], GANModule] | None = None,
    trust: Sequence[str] = (),
) -> GANModule:
    """Load the module of a published generator, in eval mode and on the CPU, ready for ``sample``.

    Its discriminator is untrained. Class names are imported as by
    :func:`~lightning_gan_stability.checkpoints.load_gan`.

    Args:
        folder: a folder written by :func:`publish`.
        model: for runs from Python: the class, if it makes its networks itself, or a function without arguments that
            makes the module. None: use the config.
        trust: packages, modules or classes that the config may import, such as ``["my_project"]``.

    Raises:
        FileNotFoundError: if the folder lacks these files.
        ValueError: if the config names classes that are not trusted, if it does not say how to make the networks, or if
            the weights do not fit.
        ModuleNotFoundError: without safetensors, which the extra ``hub`` installs.
    """
    safetensors = require("safetensors.torch", "hub")
    place = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{str(place)!r} is no published generator: it has no {name}.")
    try:
        parameters = yaml.safe_load((place / CONFIG).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(place / CONFIG)!r} is no plain YAML: {' '.join(str(error).split())}") from error
    module = _made(parameters, model, trust, str(place / CONFIG))
    SpectralNorm.remove(module)  # it is in the weights
    try:
        safetensors.load_model(module.generator, str(place / WEIGHTS))
    except (RuntimeError, require("safetensors", "hub").SafetensorError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"The weights of {str(place)!r} do not fit the generator: {reason}") from error
    return module.eval()


def push(folder: str | PathLike[str], repository: str, private: bool = False) -> str:
    """Upload the files of a published generator, and no others of the folder, to the Hugging Face Hub.

    The token is that of ``huggingface_hub``: ``HF_TOKEN`` in the environment, or the one stored by ``hf auth login``.

    Args:
        folder: a folder written by :func:`publish`.
        repository: ``"user/name"``; it is created if it does not exist.
        private: make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: if there are no such files.
        ValueError: if the name is invalid, or if the Hub refuses or cannot be reached.
        ModuleNotFoundError: without huggingface_hub, which the extra ``hub`` installs.
    """
    hub = require("huggingface_hub", "hub")
    check_repository(repository)
    api = hub.HfApi(library_name="lightning-gan-stability")
    files = [hub.CommitOperationAdd(name, Path(folder, name)) for name in FILES if Path(folder, name).is_file()]
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has nothing that `publish` writes.")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, files, commit_message="Publish a generator")
    except Exception as error:  # of the Hub, or of whichever library it is spoken to by
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"The Hub has not taken {repository} ({reason}); the files are in {str(folder)!r}.") from error
    return str(address)


def check_repository(repository: str) -> str:
    """Check and return the name of a repository on the Hub.

    Raises:
        ValueError: if it is invalid.
    """
    hub = require("huggingface_hub", "hub")
    if repository.count("/") != 1:
        raise ValueError(f"`repository` must be of the form user/name, got {repository!r}.")
    hub.utils.validate_repo_id(repository)  # a ValueError that says what is wrong
    return repository


# ---------- the program


class Sampler(nn.Module):
    """The module that is exported: it maps latents (n, latent_dim), and a condition if there is one, to samples.

    Args:
        module: the GAN, whose ``generate`` is called with its current generator.
    """

    def __init__(self, module: GANModule) -> None:
        super().__init__()
        self.network = module.current_generator
        self.generate = module.generate  # a method and no submodule: the discriminator stays out
        self.takes_latents = module.latent_dim is not None

    def forward(self, *inputs: Any) -> Sample:
        """Samples, without the generator's extras."""
        latents, condition = (*inputs, None)[:2] if self.takes_latents else (None, inputs[0])
        n = tree_leaves(inputs[0])[0].shape[0]  # len would be a constant on export
        made = self.generate(self.network, n, condition, latents)
        return made[0] if type(made) is tuple else made


def export_sampler(module: GANModule, condition: Condition = None) -> torch.export.ExportedProgram:
    """Export the generator as a program of ``torch.export`` for any number of samples, equal to ``module.sample``.

    Args:
        module: the GAN, in eval mode.
        condition: at least two rows of a condition; None: the generator takes none.

    Raises:
        ValueError: if it cannot be exported, or if the program and ``module.sample`` return different samples.

    Example:
        >>> from lightning_gan_stability import MLP
        >>> program = export_sampler(GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).eval())
        >>> program.module()(torch.zeros(5, 16)).shape
        torch.Size([5, 2])
    """
    with module.noise.of("exported"):
        latents = None if module.latent_dim is None else module.draw_latents(3)
    rows = None if condition is None else tree_map(lambda leaf: leaf[torch.arange(3) % len(leaf)], condition)
    inputs = tuple(tree for tree in (latents, rows) if tree is not None)
    batch = torch.export.Dim("n", min=1)
    shapes = (tuple(tree_map(lambda leaf: {0: batch}, tree) for tree in inputs),)  # of *inputs
    try:
        with torch.no_grad():
            program = torch.export.export(Sampler(module), inputs, dynamic_shapes=shapes)
    except Exception as error:  # whatever code of a network raises about tensors without values
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The generator cannot be exported by torch.export ({reason}): publish it without the program, by "
            "--no-program (in Python: `program=False`)."
        ) from error
    for n in (1, 3):
        _check_equal(module, program, [take_rows(tree, 0, n) for tree in inputs])
    return program


@torch.no_grad()
def _check_equal(module: GANModule, program: torch.export.ExportedProgram, inputs: list[Any]) -> None:
    latents, condition = (*inputs, None)[:2] if module.latent_dim is not None else (None, inputs[0])
    expected = tree_leaves(module.sample(condition=condition, latents=latents))
    for made, sample in zip(tree_leaves(program.module()(*inputs)), expected, strict=True):
        if (made - sample).abs().max() > TOLERANCE * sample.abs().max().clamp(min=1):
            raise ValueError(
                "The exported program makes other samples than the module, which draws noise in its network or has a "
                "`sample` of its own: publish it without the program, by --no-program (in Python: `program=False`)."
            )


# ---------- the folder


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A folder beside the target, whose files are moved there if nothing fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield place
        allowed = ~_umask()
        place.chmod(0o777 & allowed)  # temporary folders and weights are their owner's alone
        for file in place.iterdir():
            file.chmod(0o666 & allowed)
        if target.is_dir():
            for name in FILES:  # those of an earlier time, too
                if (place / name).exists():
                    os.replace(place / name, target / name)
                else:
                    (target / name).unlink(missing_ok=True)
        else:
            place.rename(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _conditions(module: GANModule, condition: Condition, n: int) -> Condition:
    """The condition of n samples: rows that were given, or the classes in turn; None if the generator takes none.

    Raises:
        ValueError: if nothing says what the condition is.
    """
    if condition is not None:
        size = batch_size(condition)
        if size < 2:
            raise ValueError("`condition` must have two rows at least, so that a program may have any number of them.")
        return tree_map(lambda leaf: leaf[torch.arange(n) % size], condition)
    classes = number_of_classes(module.current_generator)
    if classes is not None:
        return torch.arange(n) * classes // n if n >= classes else torch.arange(n)
    _, needs = condition_parameter(module.current_generator)
    if needs or module.latent_dim is None:
        raise ValueError(
            "The generator takes a condition, and nothing says which: publish it in Python, by "
            "`publish(load_gan(path), folder, path, condition=rows)` with some rows of it."
        )
    return None


def _made(parameters: dict[str, Any], model: Any, trust: Sequence[str], origin: str) -> GANModule:
    """The module that a config describes, with first weights."""
    if model is not None and not isinstance(model, type):
        made = model()
    else:
        kind = class_of(parameters, trust, repr(origin)) if model is None else check_type("model", model, type)
        check_parameters(parameters, [*trust, f"{kind.__module__}.{kind.__qualname__}"], repr(origin))
        given = {name: value for name, value in parameters.items() if name != "_instantiator"}
        made = instantiate_module(kind, given) if "_instantiator" in parameters else kind(**given)
    module: GANModule = check_type("model", made, GANModule)
    return module


# ---------- the model card


class Measured(NamedTuple):
    """The measurement of a monitor closest to a checkpoint.

    Attributes:
        name: name of the monitor.
        step: step of the measurement.
        values: values by metric.
        protocol: what the values depend on, if it was logged.
    """

    name: str
    step: int
    values: dict[str, float]
    protocol: dict[str, Any]


def _plain_yaml(file: Path) -> dict[str, Any]:
    """The content of a file; nothing, if it is none, broken, or names objects of Python."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def measurements(checkpoint: Path, step: int) -> list[Measured]:
    """The last measurements of a run's monitors up to a step, from the files of its CSVLogger; empty without these."""
    run = next((place for place in checkpoint.resolve().parents[:2] if (place / "metrics.csv").is_file()), None)
    if run is None:
        return []
    protocols = _plain_yaml(run / "hparams.yaml")
    found: dict[str, Measured] = {}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if not row["step"] or int(row["step"]) > step:
                continue
            for monitor in {key.partition("/")[0] for key, value in row.items() if value and key.endswith("/fid")}:
                values = {name: float(row[key]) for name in SHOWN if row.get(key := f"{monitor}/{name}")}
                protocol = protocols.get(monitor)
                found[monitor] = Measured(
                    monitor, int(row["step"]), values, protocol if isinstance(protocol, dict) else {}
                )
    return [found[name] for name in sorted(found)]


def _card(
    name: str,
    module: GANModule,
    samples: Sample,
    condition: Condition,
    checkpoint: Path,
    state: Mapping[str, Any],
    written: set[str],
) -> str:
    """The model card, with a header for the Hub."""
    hub = require("huggingface_hub", "hub")
    measured = measurements(checkpoint, state["global_step"])
    source = find_config(checkpoint)
    config = {} if source is None else _plain_yaml(source)
    data = _class_name(config.get("data")) or "unknown"
    images = is_image(samples)
    task = "unconditional-image-generation" if images else "other"
    results = [
        hub.EvalResult(
            task_type=task,
            dataset_type=data.lower(),
            dataset_name=data,
            metric_type=metric,
            metric_name=f"{m.name}/{metric} ({m.protocol.get('extractor', 'features unknown')})",
            metric_value=round(value, 6),
        )
        for m in measured
        for metric, value in m.values.items()
    ]
    header = hub.ModelCardData(
        library_name="lightning-gan-stability",
        tags=["gan", "generative-adversarial-network", "pytorch", "lightning"],
        pipeline_tag=task if images and condition is None else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [
        f"---\n{header.to_yaml()}\n---\n\n# {name}\n",
        f"![Samples]({SAMPLES})\n" if SAMPLES in written else "",
        _description(module, samples, condition),
        _usage(module, condition, state, written),
        _training(module, config, data, state),
        _quality(measured, state["global_step"]),
        LIMITS,
    ]
    return "\n".join(part for part in parts if part)


LIMITS = """\
## Limits

It makes what its training data hold, in the shares in which they hold it, and may repeat some of them. What it was
trained on, under which licence, and what it must not be used for, is not in a checkpoint: write it here.
"""


COMPARE = "Values under another protocol do not compare; those of real data are of one half of these against the other."


def _description(module: GANModule, samples: Sample, condition: Condition) -> str:
    network = module.current_generator
    count = sum(p.numel() for p in network.parameters())
    shapes = ", ".join(str(tuple(leaf.shape[1:])) for leaf in tree_leaves(samples))
    inputs = [] if module.latent_dim is None else [f"a latent vector of {module.latent_dim} standard normal numbers"]
    classes = number_of_classes(network)
    if condition is not None:
        inputs.append("a condition" if classes is None else f"the number of one of {classes} classes")
    average = "" if module.generator_ema is None else ", the average of training"
    return (
        f"The generator of a GAN: a `{type(network).__name__}` with {count:,} weights{average}. From "
        f"{' and '.join(inputs)} it makes a sample of shape {shapes}"
        f"{' with values in -1 ... 1' if is_image(samples) else ''}.\n"
    )


def is_image(samples: Sample) -> bool:
    """Whether samples are images.

    Example:
        >>> is_image(torch.zeros(4, 3, 8, 8)), is_image(torch.zeros(4, 2))
        (True, False)
    """
    return isinstance(samples, Tensor) and kind_of(samples) == "image"


def _usage(module: GANModule, condition: Condition, state: Mapping[str, Any], written: set[str]) -> str:
    classes = number_of_classes(module.current_generator)
    rows = "" if condition is None else f"torch.arange(16) % {classes}" if classes else "condition"
    from_yaml = "_class_path" in (state.get("hyper_parameters") or {})
    lines = [
        "## Use\n",
        "```python",
        "import torch",
        "from lightning_gan_stability.publishing import load_published  # pip install 'lightning-gan-stability[hub]'\n",
        'gan = load_published(".")' if from_yaml else 'gan = load_published(".", make_gan)  # which makes the module',
        f"samples = gan.sample(condition={rows})" if rows else "samples = gan.sample(16)",
        "```\n",
    ]
    if PROGRAM in written:
        inputs = [] if module.latent_dim is None else [f"torch.randn(16, {module.latent_dim})"]
        lines += [
            "With torch alone:\n",
            "```python",
            "import torch\n",
            f'sampler = torch.export.load("{PROGRAM}").module()',
            f"samples = sampler({', '.join([*inputs, *filter(None, [rows])])})",
            "```\n",
        ]
    return "\n".join(lines)


def _training(module: GANModule, config: Mapping[str, Any], data: str, state: Mapping[str, Any]) -> str:
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    named = [_called(entry) for entry in ([callbacks] if isinstance(callbacks, dict) else callbacks)]
    rows = [
        ("steps", f"{state['global_step']:,}"),
        ("data", f"`{data}`" if data != "unknown" else ""),
        ("loss", f"`{type(module.loss).__name__}`"),
        ("augmentation", "" if isinstance(module.augment, nn.Identity) else f"`{type(module.augment).__name__}`"),
        ("callbacks", ", ".join(f"`{name}`" for name in named)),
    ]
    return "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows if text)


def _quality(measured: list[Measured], step: int) -> str:
    if not measured:
        return ""
    parts = ["## Quality\n"]
    for m in measured:
        null = m.protocol.get("null") or {}
        parts.append("| metric | samples | real data |\n|---|---|---|")
        for metric, value in m.values.items():
            arrow = " ↓" if metric in LOWER else " ↑" if metric in HIGHER else ""
            parts.append(f"| {metric}{arrow} | {value:.4g} | {_number(null.get(metric))} |")
        protocol = ", ".join(f"{key} {value}" for key, value in m.protocol.items() if key != "null")
        when = "" if m.step == step else f" at step {m.step:,}"
        parts.append(f"\n`{m.name}`{when}: {protocol or 'its protocol was not logged'}. {COMPARE}\n")
    return "\n".join(parts)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _class_name(entry: Any) -> str:
    """The short name of a class in a config."""
    path = entry.get("class_path", "") if isinstance(entry, dict) else entry
    return str(path or "").rpartition(".")[2]


def _called(entry: Any) -> str:
    """A callback with its numbers; no strings, which may be paths of somebody's disk."""
    arguments = (entry.get("init_args") or {}) if isinstance(entry, dict) else {}
    shown = [f"{k}={v}" for k, v in arguments.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return _class_name(entry) + (f"({', '.join(shown)})" if shown else "")
