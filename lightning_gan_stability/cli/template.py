"""Writes a config for a new GAN, chosen by the contents of its folder of images."""

from __future__ import annotations

import shlex
import statistics
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
import yaml

from lightning_gan_stability._checks import check_choice
from lightning_gan_stability.data.image_files import ImageFiles, check_archive_or_folder

SIZES = (16, 32, 64, 128, 256)  # powers of two that the networks take
LEAST = 50  # images: a tenth of them is held out, and quality compares halves of the others
LEAST_OF_A_CLASS = 10
HEADERS = 1000  # images whose size and mode are looked at
GREY = ("1", "L", "LA", "La", "I", "F")  # modes of Pillow, besides those of 16 bits
STEPS = {16: 2000, 32: 2000, 64: 10_000, 128: 20_000, 256: 40_000}


@dataclass(frozen=True)
class Look:
    """The contents of a folder of images.

    Attributes:
        count: number of images that can be read.
        sides: smallest, median and largest of their shorter sides, in pixels.
        modes: number of checked images in each of Pillow's modes.
        classes: names of the sub-folders, if these can be conditions; else None.
        notes: sentences on what is left out.
    """

    count: int
    sides: tuple[int, int, int]
    modes: Counter[str]
    classes: list[str] | None
    notes: list[str]

    @property
    def channels(self) -> int:
        """1 if all images are grey, else 3."""
        return 1 if all(mode in GREY or mode.startswith("I;16") for mode in self.modes) else 3


@dataclass(frozen=True)
class Choice:
    """The numbers of a config that depend on the data and on the machine."""

    size: int
    channels: int
    width: int
    batch_size: int
    holdout: int
    steps: int
    every: int
    log_every: int
    num_classes: int | None


def start(folder: str, images: str | None = None, size: int | None = None, overwrite: bool = False) -> list[str]:
    """Write a config that is ready to run into a folder, and describe it.

    Args:
        folder: folder of the config, and of the runs.
        images: a folder or a zip archive of images; None: scikit-learn's handwritten digits.
        size: height and width in pixels; None: chosen by the images.
        overwrite: replace an existing config.

    Returns:
        Lines that describe what was found, what was chosen, and how to continue.

    Raises:
        ValueError: if the folder is not empty, if there is nothing to learn from, or if no network supports the size.
    """
    home = Path(folder)
    if home.exists() and not home.is_dir():
        raise ValueError(f"`{folder}` must be a folder, and is a file.")
    if home.is_dir() and any(home.iterdir()) and not overwrite:
        raise ValueError(
            f"`{folder}` is not empty: name another folder, or add --overwrite, which replaces its config.yaml and "
            "leaves everything else in it as it is."
        )
    gpu = torch.cuda.is_available()
    if images is None:
        if size is not None:
            raise ValueError("`size` belongs to images of your own: add --images FOLDER, or remove --size.")
        choice, data, found = DIGITS, DIGITS_DATA, ["1,797 handwritten digits of scikit-learn, 8x8 pixels, grey."]
    else:
        refuse_inside(images, home)
        look = look_at(images)
        choice, data, found = choose(look, size, gpu), IMAGES_DATA, found_in(images, look)
    home.mkdir(parents=True, exist_ok=True)
    file = home / "config.yaml"
    file.write_text(config(data, choice, home, images), encoding="utf-8")
    name, place = file.as_posix(), home.as_posix()
    return [
        *found,
        f"Chosen: {choice.size}x{choice.size} pixels, {choice.batch_size} images a step, {choice.steps:,} steps, "
        f"{choice.holdout} images held out{'' if gpu else '; no GPU here'}.",
        f"{name} is written. Train, and draw samples:",
        f"  gan-stability fit --config {shlex.quote(name)}",
        f"  gan-stability sample {shlex.quote(place)} --n 64 --out {shlex.quote(f'{place}/samples')}",
    ]


def refuse_inside(images: str, home: Path) -> None:
    """Refuse a folder of runs in that of the images, where pictures of a run would be learned from.

    Raises:
        ValueError: if it lies there.
    """
    if Path(images).resolve() in (home.resolve(), *home.resolve().parents):
        raise ValueError(
            f"`{home}` lies in the folder of the images, where pictures of a run would be taken for images to learn "
            "from: name a folder beside it."
        )


def look_at(folder: str) -> Look:
    """Inspect the images of a folder or of a zip archive.

    Raises:
        ValueError: if there is no such folder, no image in it that can be read, or too few of them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            files = ImageFiles(check_archive_or_folder(folder), labels=False)
            files.drop_unreadable("skip")
        except ValueError as error:  # which speaks of an argument of `Images`
            raise ValueError(str(error).replace("`folder`", "--images")) from error
    notes = [str(warning.message).replace("`folder`", folder) for warning in caught]
    if len(files) < LEAST:
        raise ValueError(
            f"--images needs at least {LEAST} images that can be read, and {folder} has {len(files)}: a GAN learns "
            "fewer by heart."
        )
    headers = [files.header(index) for index in range(0, len(files), -(-len(files) // HEADERS))]
    sides = sorted(min(shape) for shape, _ in headers)
    classes, reason = _classes(folder, files)
    return Look(
        count=len(files),
        sides=(sides[0], int(statistics.median(sides)), sides[-1]),
        modes=Counter(mode for _, mode in headers),
        classes=classes,
        notes=[*notes, *reason],
    )


def _classes(folder: str, readable: ImageFiles) -> tuple[list[str] | None, list[str]]:
    """The sub-folders that can be conditions; or None, and the reason where one may wonder."""
    try:
        files = ImageFiles(folder)
    except ValueError:  # there are others beside
        return None, ["Sub-folders are no classes here, since some images lie beside them."]
    if files.classes is None or files.labels is None or len(files.classes) == 1:
        return None, []
    kept = set(readable.paths)
    counts = Counter(label for path, label in zip(files.paths, files.labels, strict=True) if path in kept)
    number, least = min((counts[label], name) for label, name in enumerate(files.classes))
    if number < LEAST_OF_A_CLASS:
        return None, [
            f"Sub-folders are no classes here, since {least} has {number} images, and a class needs {LEAST_OF_A_CLASS}."
        ]
    return files.classes, []


def choose(look: Look, size: int | None, gpu: bool) -> Choice:
    """Choose settings that suit the images.

    Args:
        look: the contents of the folder.
        size: height and width in pixels; None: the largest that enlarges less than half of the images, up to 64, or to
            128 with a GPU.
        gpu: whether there is a GPU.

    Raises:
        ValueError: if no network supports the size.

    Example:
        >>> look = Look(300, (200, 300, 400), Counter(RGB=300), None, [])
        >>> choose(look, None, gpu=False).size, choose(look, 256, gpu=False).size
        (64, 256)
    """
    if size is None:
        size = max((s for s in SIZES if s <= min(look.sides[1], 128 if gpu else 64)), default=SIZES[0])
    check_choice("size", size, SIZES)
    holdout = min(look.count // 10, 1000)
    batch_size = min(64 if gpu else 32, look.count - holdout)
    return Choice(
        size=size,
        channels=look.channels,
        width=64 if gpu else 32,
        batch_size=batch_size,
        holdout=holdout,
        steps=STEPS[size],
        every=500 if STEPS[size] > 5000 else 200,
        log_every=min(20, (look.count - holdout) // batch_size),
        num_classes=None if look.classes is None else len(look.classes),
    )


def found_in(images: str, look: Look) -> list[str]:
    """Lines that say what a folder holds."""
    small, median, large = look.sides
    sides = f"{small}" if small == large else f"{small} to {large} (median {median})"
    kinds = ", ".join(f"{mode} {number}" for mode, number in look.modes.most_common())
    classes = "no classes"
    if look.classes is not None:
        shown = ", ".join(look.classes[:5]) + (", ..." if len(look.classes) > 5 else "")
        classes = f"{len(look.classes)} sub-folders as classes ({shown})"
    colour = "grey" if look.channels == 1 else "colour"
    return [
        f"{look.count:,} images in {images}: shorter side {sides} pixels, {colour} ({kinds}), {classes}.",
        *look.notes,
    ]


def config(data: Template, choice: Choice, home: Path, images: str | None = None) -> str:
    """The text of a config.

    Args:
        data: its part that says what is learned from.
        choice: the numbers in it.
        home: folder of the config, and of the runs.
        images: folder of the images, if `data` names one.

    Example:
        >>> print(config(DIGITS_DATA, DIGITS, Path("my_gan")).splitlines()[1])
        #   gan-stability fit --config my_gan/config.yaml
    """
    values = dict(vars(choice)) | {
        "num_classes": "null" if choice.num_classes is None else choice.num_classes,
        "labels": "false" if choice.num_classes is None else "true",
        "images": scalar(images or ""),
        "home": scalar(home.as_posix()),
        "file": shlex.quote((home / "config.yaml").as_posix()),
    }
    own = data is IMAGES_DATA  # then the data say size and channels, and the networks have them from there
    values["net_size"] = "*size" if own else f"&size {choice.size}"
    values["net_channels"] = "*channels" if own else f"&channels {choice.channels}"
    values["extractor"] = (THUMBNAILS if own else DIGIT_FEATURES).rstrip()
    return CONFIG.substitute(values, data=data.substitute(values).rstrip())


def scalar(text: str) -> str:
    """A string as YAML has it, on one line.

    Example:
        >>> print(scalar("photos"), scalar("12"), scalar("a: b"))
        photos '12' 'a: b'
    """
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]


DIGITS = Choice(
    size=8, channels=1, width=32, batch_size=64, holdout=300, steps=2000, every=200, log_every=20, num_classes=10
)

CONFIG = Template("""\
# Written by `gan-stability new`. What has a name behind & is used wherever * has this name: change it in one place.
#   gan-stability fit --config $file
# Any setting can be given behind this, too: --trainer.max_steps=200
seed_everything: 0  # first weights of the networks; another number, another run

$data

model:
  generator:
    class_path: DCGANGenerator
    init_args:
      latent_dim: &latent_dim 64  # length of the noise vector that an image is made from
      channels: $net_channels
      size: $net_size
      width: &width $width  # channels of the layer at the full size; more is slower and sharper
      batch_norm: false
      num_classes: &num_classes $num_classes  # that the networks are told; null: none
  discriminator:
    class_path: DCGANDiscriminator
    init_args:
      channels: *channels
      size: *size
      width: *width
      num_classes: *num_classes
  latent_dim: *latent_dim
  loss: Relativistic  # with R1Penalty and R2Penalty below: it settles where others circle
  augment:
    class_path: DiffAugment  # the discriminator sees images moved and cut, so that it does not learn a few by heart
    init_args:
      policy: translation,cutout  # some ten thousand images need none: remove these four lines
  g_optimizer:
    class_path: Adam
    init_args:
      lr: &lr 1.0e-3  # learning rate; lower it first if a run oscillates
      betas: &betas [0.0, 0.99]  # momentum and memory of squared gradients; momentum makes GANs oscillate
  d_optimizer:
    class_path: Adam
    init_args:
      lr: *lr
      betas: *betas

trainer:
  accelerator: auto  # a GPU if there is one
  devices: 1  # on several GPUs: devices: 4, strategy: ddp
  max_steps: $steps  # one step: one batch, one update of each network
  log_every_n_steps: $log_every  # steps between rows in the log
  val_check_interval: &every $every  # steps between looks at held-out images, and all that *every has below
  check_val_every_n_epoch: null  # so that the line above counts steps from the beginning
  logger:
    class_path: CSVLogger  # writes metrics.csv, pictures and checkpoints into version_0, version_1, ...
    init_args:
      save_dir: $home
      name: runs
  callbacks:
  - class_path: R1Penalty  # keeps the discriminator flat around real images
    init_args:
      gamma: &gamma 0.2  # raise it if losses swing or modes are lost; lower it if images stay blurred
      every: 2  # due on every second step, twice as strong
  - class_path: R2Penalty  # the same around generated images
    init_args:
      gamma: *gamma
      every: 2
  - class_path: GeneratorEMA  # an average of the generator, which is measured and drawn from
    init_args:
      half_life: 100  # steps
      ramp_up: 0.05  # at first it is shorter: this part of the steps so far
  - class_path: QualityMonitor  # quality/fid, quality/recall, ... in the log
    init_args:
$extractor
      n_samples: 1000
      every: *every
  - class_path: CollapseDetector  # says that the generator has collapsed; action: warn, alert, stop or rollback
  - class_path: HealthMonitor  # says what is wrong, and what to add
  - class_path: SampleLogger  # pictures, in the folder samples of the run
    init_args:
      every: *every
      n: 64
  - class_path: ModelCheckpoint  # keeps the best and the last
    init_args:
      monitor: quality/fid
      every_n_train_steps: *every
      save_last: true
""")

IMAGES_DATA = Template("""\
data:
  class_path: Images
  init_args:
    folder: $images  # or a zip archive; searched with all its sub-folders
    size: &size $size  # pixels: 16, 32, 64, 128 or 256; changed here, it changes in the networks, unlike by --data.size
    channels: &channels $channels  # 3 for colour, 1 for grey
    batch_size: $batch_size  # images per step; halve it if memory runs out
    holdout: $holdout  # images kept for validation, which show whether the others are learned by heart
    labels: $labels  # whether sub-folders are classes; their number is num_classes below
    on_error: skip  # files that cannot be read are left out, and counted
    flip: false  # true: learn from mirror images too, as suits most photographs and no letters
    num_workers: 0  # processes that read images ahead; raise it if a GPU waits
""")

DIGITS_DATA = Template("""\
data:
  class_path: Digits  # 1,797 handwritten digits, without a download
  init_args:
    batch_size: $batch_size  # images per step
    holdout: $holdout  # images kept for validation, which show whether the others are learned by heart
""")

THUMBNAILS = """\
      # Distances are those of 8x8 thumbnails: coarse, and without a download. Without these four lines it is Inception,
      # whose distances compare with published ones: 91 MB, which are loaded at the first use.
      extractor:
        class_path: torch.nn.AdaptiveAvgPool2d
        init_args: {output_size: 8}
"""

DIGIT_FEATURES = """\
      extractor: DigitClassifier
"""
