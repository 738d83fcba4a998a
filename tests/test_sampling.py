"""Samples from a checkpoint into files: which files, the same ones each time, and what is refused."""

import csv
import errno
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from toys import fit, points, small

from lightning_gan_stability import (
    MLP,
    DiscriminatorRejection,
    GANModule,
    GeneratorEMA,
    MetropolisHastings,
    Photographs,
    Ring,
    SampleWriter,
    StyleGenerator,
    SuperResolution,
    TableSynthesis,
    UnpairedTranslation,
    Vocoder,
    load_gan,
)
from lightning_gan_stability.cli import main
from lightning_gan_stability.cli.sample import between, latents_of
from lightning_gan_stability.monitors.writing import SampleFiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # LightningCLI of Lightning 2.6 calls what jsonargparse 4.53 deprecates
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def rows_of(file):
    with open(file, newline="") as lines:
        return [*csv.DictReader(lines)]


def opened(file):
    """An image that keeps no file open."""
    with Image.open(file) as image:
        return image.copy()


def pixels(file):
    """As the generator made them, to half a grey level."""
    values = np.asarray(opened(file)).astype(np.float32) / 127.5 - 1
    return torch.tensor(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))


def a_run(generator, discriminator, latent_dim=4, data="Ring", callbacks=()):
    """A run from YAML; its checkpoint."""
    model = {"generator": generator, "discriminator": discriminator, "latent_dim": latent_dim}
    trainer = {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "run"}},
        "callbacks": [*callbacks],
    }
    Path("gan.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    main(["fit", "--config", "gan.yaml"])
    return "run/version_0"


def mlp(*sizes, **options):
    return {"class_path": "MLP", "init_args": {"sizes": [*sizes]} | options}


DIGITS = {"class_path": "Digits", "init_args": {"batch_size": 32}}
FACE = {"output_shape": [1, 8, 8], "output_activation": "torch.nn.Tanh"}


def digits(**options):
    return a_run(mlp(4, 8, 64, **FACE, **options), mlp(64, 8, 1, **options), data=DIGITS)


# ---------- the command


def test_images(capsys):
    run = digits()
    main(["sample", run, "--n", "70", "--out", "made", "--batch-size", "32", "--seed", "5"])
    assert names("made") == [f"{i:06d}.png" for i in range(70)]
    assert "70 samples are in made." in capsys.readouterr().out
    gan = load_gan(run)
    expected = gan.sample(latents=latents_of(gan, 70, seed=5))
    found = torch.stack([pixels(f"made/{i:06d}.png") for i in range(70)])
    assert (found - expected).abs().max() <= 1 / 255 + 1e-5


def test_samples_depend_on_the_seed_and_not_on_batches():
    run = a_run(mlp(4, 8, 2), mlp(2, 8, 1))
    made = {}
    for name, *more in ("a", "--batch-size=7"), ("b", "--batch-size=300"), ("c", "--seed=1"), ("d", "--n=20"):
        main(["sample", run, "--n=300", "--out", name, *more])
        made[name] = np.load(f"{name}/samples.npy")
    np.testing.assert_allclose(made["a"], made["b"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(made["d"], made["b"][:20], rtol=1e-6, atol=1e-7)
    assert abs(made["a"] - made["c"]).max() > 0.1
    assert made["a"].shape == (300, 2)


def test_the_discriminator_chooses(capsys):
    """Samples are those of `sample(reject=...)`, calibrated with the run's held-out data; of the seed alone."""
    run = a_run(mlp(4, 8, 2), mlp(2, 8, 1), data={"class_path": "Ring", "init_args": {"val_samples": 200}})
    for name, *more in ("drs", "--seed=3"), ("mh", "--seed=3", "--batch-size=7"):
        main(["sample", run, "--n=30", "--reject", name, "--out", name, *more])
        assert "of the samples that the generator made were accepted" in capsys.readouterr().out
        gan = load_gan(run)
        gan.noise_seed = 3
        data = Ring(val_samples=200)
        data.setup("validate")
        real = torch.cat([gan.unpack(batch)[0] for batch in data.val_dataloader()])
        reject = {"drs": DiscriminatorRejection, "mh": MetropolisHastings}[name]()
        with gan.noise.of("calibration"):
            reject.calibrate(gan, real)
        with gan.noise.of("samples"):
            expected = gan.sample(30, reject=reject)
        np.testing.assert_allclose(np.load(f"{name}/samples.npy"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--reject", "best"], "`reject` must be drs, mh or a dotted path, got 'best'"),
        (["--reject", "torch.nn.Identity"], "`reject` must name a Rejection, got 'torch.nn.Identity'"),
        (["--reject", "mh", "--truncation", "0.5"], "--truncation has no meaning for samples of --reject"),
        (["--data", "Ring"], "--data has held-out samples for --reject"),
    ],
)
def test_what_reject_cannot_do_is_refused(more, text):
    run = a_run(mlp(4, 8, 2), mlp(2, 8, 1))
    with pytest.raises(ValueError, match=text):
        main(["sample", run, "--out", "none", *more])
    assert not Path("none").exists()


def test_latents_are_normal():
    gan = small()
    values = latents_of(gan, 5000, seed=0)
    assert values.mean().abs() < 0.03
    assert abs(values.std() - 1) < 0.02
    assert len(values.unique(dim=0)) == 5000


def test_the_average_or_the_generator_itself():
    average = {"class_path": "GeneratorEMA", "init_args": {"decay": 0.999}}
    run = a_run(mlp(4, 8, 2), mlp(2, 8, 1), callbacks=[average])
    for name, *more in ("average",), ("itself", "--no-average"):
        main(["sample", run, "--out", name, *more])
    gan = load_gan(run)
    latents = latents_of(gan, 64, seed=0)
    for name, network in ("average", gan.generator_ema), ("itself", gan.generator):
        np.testing.assert_allclose(np.load(f"{name}/samples.npy"), network(latents).detach(), rtol=1e-6, atol=1e-7)
    assert gan.generator_ema is not gan.generator


def test_labels():
    run = digits(num_classes=10)
    main(["sample", run, "--n=20", "--out=threes", "--condition=label=3", "--grid"])
    assert names("threes") == [*(f"{i:06d}.png" for i in range(20)), "grid.png", "labels.csv"]
    assert [row["label"] for row in rows_of("threes/labels.csv")] == ["3"] * 20
    gan = load_gan(run)
    expected = gan.sample(condition=torch.full((20,), 3), latents=latents_of(gan, 20, seed=0))
    assert (pixels("threes/000019.png") - expected[19]).abs().max() <= 1 / 255 + 1e-5
    main(["sample", run, "--n=5", "--out=turns", "--condition", "label=7,1"])
    assert [row["label"] for row in rows_of("turns/labels.csv")] == ["7", "1", "7", "1", "7"]
    main(["sample", run, "--n=500", "--out=drawn", "--grid"])
    counts = np.bincount([int(row["label"]) for row in rows_of("drawn/labels.csv")], minlength=10)
    assert ((counts > 25) & (counts < 80)).all()
    grid = opened("drawn/grid.png")
    assert grid.size == (8 * 10 + 2, 10 * 10 + 2)  # of 8 columns and 10 classes
    for value in "10", "-1", "3,11":
        with pytest.raises(ValueError, match="Labels must be from 0 to 9"):
            main(["sample", run, "--out=bad", f"--condition=label={value}"])
    with pytest.raises(ValueError, match="label=NUMBER"):
        main(["sample", run, "--out=bad", "--condition=label=three"])
    assert not Path("bad").exists()


def test_interpolation_goes_from_one_latent_to_the_next():
    run = digits()
    main(["sample", run, "--n=12", "--out=way", "--interpolate=6"])
    gan = load_gan(run)
    ends = gan.sample(latents=latents_of(gan, 3, seed=0))
    for file, sample in (0, 0), (5, 1), (6, 1), (11, 2):
        assert (pixels(f"way/{file:06d}.png") - ends[sample]).abs().max() <= 1 / 255 + 1e-5
    assert opened("way/interpolation.png").size == (6 * 10 + 2, 2 * 10 + 2)


def test_slerp():
    """Beside its definition by angles, and where there is none."""
    a, b = torch.randn(2, 20, 5, dtype=torch.float64)
    share = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    angle = torch.acos((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1))[:, None]
    expected = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    torch.testing.assert_close(between(a, b, share), expected)
    torch.testing.assert_close(between(a, a, share), a)
    assert between(a, -a, share).isfinite().all()


def test_runs_from_python():
    Path("mine.py").write_text(
        "from toys import small\nfrom lightning_gan_stability import GANModule, MLP\n"
        "class Own(GANModule):\n"
        "    def __init__(self):\n"
        "        super().__init__(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)\n"
    )
    gan = small()
    fit(gan, points(2)).save_checkpoint("a.ckpt")
    for i, model in enumerate(("toys.small", "mine.Own")):
        main(["sample", "a.ckpt", "--model", model, "--out", f"made{i}"])
        expected = gan.eval().sample(latents=latents_of(gan, 64, seed=0)).detach()
        np.testing.assert_allclose(np.load(f"made{i}/samples.npy"), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"There is no class or function `mine.Other`"):
        main(["sample", "a.ckpt", "--model=mine.Other", "--out=made3"])
    with pytest.raises(ValueError, match="run from Python"):
        main(["sample", "a.ckpt", "--out=made3"])


class Flat(nn.Module):
    """From w to a picture."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 64)

    def forward(self, w):
        return self.linear(w.mean(1) if w.dim() == 3 else w).reshape(-1, 1, 8, 8)


def styled():
    torch.manual_seed(0)
    generator = StyleGenerator(MLP([4, 8]), Flat(), w_dim=8, num_layers=2)
    return GANModule(generator, MLP([64, 1]), latent_dim=4)


def test_truncation():
    gan = styled()
    gan.generator(torch.randn(8, 4), update_average=True)
    untrained(lambda: gan)
    for psi in "0", "1":
        main(["sample", "a.ckpt", f"--model={__name__}.styled", f"--truncation={psi}", "--n=2", f"--out={psi}"])
    assert torch.equal(pixels("0/000000.png"), pixels("0/000001.png"))
    assert not torch.equal(pixels("1/000000.png"), pixels("1/000001.png"))
    fit(small(), points(2)).save_checkpoint("plain.ckpt")
    with pytest.raises(ValueError, match="`truncation` needs a generator with"):
        main(["sample", "plain.ckpt", "--model=toys.small", "--truncation=0.5", "--out=no"])


# ---------- sources


def larger():
    torch.manual_seed(0)
    return SuperResolution(nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3), scale=2)


def sources(n=3, size=8):
    Path("small/more").mkdir(parents=True)
    for i in range(n):
        values = np.random.default_rng(i).integers(0, 256, (size, size + i, 3), dtype=np.uint8)
        Image.fromarray(values).save(f"small/{'more/' if i else ''}{i}.png")
    Path("small/._0.png").write_bytes(b"of macOS")


def untrained(make, path="a.ckpt"):
    """A checkpoint of a module as it is made."""
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(make())
    trainer.save_checkpoint(path, weights_only=True)


def test_pictures_are_sources():
    sources()
    untrained(larger)
    main(["sample", "a.ckpt", f"--model={__name__}.larger", "--condition", "small", "--out=large"])
    assert names("large") == ["0.png", "more/1.png", "more/2.png"]
    for name in names("large"):
        small_, large = (np.asarray(opened(f"{folder}/{name}")) for folder in ("small", "large"))
        np.testing.assert_array_equal(large, small_.repeat(2, 0).repeat(2, 1))
    main(["sample", "a.ckpt", f"--model={__name__}.larger", "--condition=small/0.png", "--out=one"])
    assert names("one") == ["0.png"]
    with pytest.raises(ValueError, match="takes no latents: name a file or folder of sources"):
        main(["sample", "a.ckpt", f"--model={__name__}.larger", "--out=none"])
    with pytest.raises(ValueError, match="--grid has no meaning for samples of sources"):
        main(["sample", "a.ckpt", f"--model={__name__}.larger", "--condition=small", "--grid", "--out=none"])


def unpaired():
    torch.manual_seed(0)
    to_a, to_b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        to_b.weight.zero_()
        to_b.bias.fill_(0.5)
    judges = nn.ModuleDict({domain: nn.Conv2d(3, 1, 3) for domain in "ab"})
    return UnpairedTranslation(nn.ModuleDict({"a": to_a, "b": to_b}), judges)


def test_unpaired_translation_needs_the_domain():
    sources()
    untrained(unpaired)
    line = ["sample", "a.ckpt", f"--model={__name__}.unpaired"]
    main([*line, "--condition=a=small", "--out=to_b"])
    main([*line, "--condition=b=small", "--out=to_a"])
    assert torch.unique(pixels("to_b/0.png")).tolist() == [pytest.approx(0.5, abs=1 / 255)]
    assert len(torch.unique(pixels("to_a/0.png"))) > 9
    with pytest.raises(ValueError, match="two directions"):
        main([*line, "--condition=small", "--out=none"])


def spoken():
    torch.manual_seed(0)
    return Vocoder(nn.ConvTranspose1d(4, 1, 4, 4), nn.Conv1d(1, 1, 3))


def test_arrays_are_sources_and_sounds_are_made():
    untrained(spoken)
    spectrograms = np.random.default_rng(0).normal(size=(2, 4, 100)).astype(np.float32)
    np.save("spectrograms.npy", spectrograms)
    line = ["sample", "a.ckpt", f"--model={__name__}.spoken", "--condition=spectrograms.npy"]
    main([*line, "--sample-rate=8000", "--out=sounds"])
    assert names("sounds") == ["000000.wav", "000001.wav"]
    expected = spoken().eval().sample(condition=torch.tensor(spectrograms)).detach()
    with wave.open("sounds/000001.wav") as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getnframes()) == (8000, 1, 400)
        made = np.frombuffer(sound.readframes(400), "<i2") / 32767
    np.testing.assert_allclose(made, expected[1, 0].clamp(-1, 1), atol=1e-4)
    main([*line, "--out=arrays"])
    np.testing.assert_allclose(np.load("arrays/samples.npy"), expected, rtol=1e-5, atol=1e-6)


class Beside(nn.Module):
    """Latents and conditions side by side."""

    sizes = ()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, latents, condition):
        self.sizes.append(len(condition))
        return torch.cat([latents, condition], 1) * self.weight


def beside():
    return GANModule(Beside(), MLP([6, 1]), latent_dim=4)


def test_rows_of_arrays_are_counted_and_taken_in_batches(capsys, monkeypatch):
    sizes = []
    monkeypatch.setattr(Beside, "sizes", sizes)
    untrained(beside)
    Path("rows").mkdir()
    conditions = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save("rows/a.npy", conditions[:5])
    np.save("rows/b.npy", conditions[5:])
    line = ["sample", "a.ckpt", f"--model={__name__}.beside", "--condition=rows"]
    main([*line, "--batch-size=2", "--out=all"])
    assert sizes == [2, 2, 1, 1]
    samples = np.load("all/samples.npy")
    np.testing.assert_array_equal(samples[:, 4:], conditions)
    np.testing.assert_array_equal(samples[:5, :4], latents_of(beside(), 5, seed=0))
    for n, written in (3, 3), (5, 5), (6, 6), (9, 6):
        main([*line, f"--n={n}", f"--out={n}"])
        np.testing.assert_array_equal(np.load(f"{n}/samples.npy"), samples[:written])
        assert ("no more sources for the 9 samples" in capsys.readouterr().err) == (n == 9)


# ---------- tables


def test_tables():
    ages = [float(age) for age in range(20, 60)]
    Path("table.csv").write_text("age,who\n" + "".join(f"{age},{['a', 'b'][int(age) % 2]}\n" for age in ages))
    networks = {"generator": "torch.nn.Linear", "discriminator": "torch.nn.Linear", "latent_dim": 4, "pac": 2}
    model = {"class_path": "TableSynthesis", "init_args": networks}
    data = {"class_path": "Table", "init_args": {"data": "table.csv", "batch_size": 8, "components": 1}}
    trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    Path("gan.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    main(["fit", "--config", "gan.yaml"])
    main(["sample", "lightning_logs", "--n=1500", "--out=rows"])
    rows = rows_of("rows/samples.csv")
    assert len(rows) == 1500
    assert {row["who"] for row in rows} <= {"a", "b"}
    assert all(-10 < float(row["age"]) < 90 for row in rows)
    main(["sample", "lightning_logs", "--n=10", "--out=of_a", "--condition=who=a"])
    assert len(rows_of("of_a/samples.csv")) == 10
    with pytest.raises(ValueError, match="categories of column 'who'"):
        main(["sample", "lightning_logs", "--n=10", "--out=of_c", "--condition=who=c"])
    assert isinstance(load_gan("lightning_logs"), TableSynthesis)


# ---------- files


def test_trees_have_a_folder_for_each_tensor():
    files = SampleFiles("made", sample_rate=8000)
    files.write({"image": torch.zeros(2, 3, 4, 4), "more": {"sound": torch.zeros(2, 1, 8), "x": torch.ones(2, 5)}})
    files.write({"image": torch.zeros(1, 3, 4, 4), "more": {"sound": torch.zeros(1, 1, 8), "x": torch.ones(1, 5)}})
    assert names("made") == [
        *(f"image/00000{i}.png" for i in range(3)),
        *(f"more/sound/00000{i}.wav" for i in range(3)),
        "more/x/samples.npy",
    ]
    assert np.load("made/more/x/samples.npy").shape == (3, 5)


@pytest.mark.parametrize("shape", [(5,), (2, 7), (7, 2, 3, 4), (5, 4, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_arrays_grow_by_batches(shape, dtype):
    files = SampleFiles("made")
    parts = [(100 * torch.randn(n, *shape)).to(dtype) for n in (3, 1, 100, 1000)]
    for part in parts:
        files.write(part)
        np.load("made/samples.npy")  # at any time
    found = np.load("made/samples.npy", mmap_mode="r")
    assert np.array_equal(found, torch.cat(parts).float() if dtype == torch.float16 else torch.cat(parts))


def test_grey_colour_and_transparent_images_and_what_is_none():
    for channels, mode in (1, "L"), (3, "RGB"), (4, "RGBA"):
        SampleFiles(mode).write(torch.full((1, channels, 4, 4), 0.5))
        assert opened(f"{mode}/000000.png").mode == mode
        assert np.unique(np.asarray(opened(f"{mode}/000000.png"))).tolist() == [191]
    SampleFiles("two").write(torch.zeros(1, 2, 4, 4))
    assert names("two") == ["samples.npy"]


def test_a_folder_that_is_not_empty():
    Path("made").mkdir()
    Path("made/mine.txt").touch()
    with pytest.raises(FileExistsError, match="'made' is not empty: give another one, or --overwrite"):
        SampleFiles("made")
    with pytest.raises(FileExistsError, match="is a file"):
        SampleFiles("made/mine.txt")
    SampleFiles("made", overwrite=True).write(torch.zeros(9, 1, 4, 4), labels=torch.zeros(9))
    SampleFiles("made", overwrite=True).write(torch.zeros(2, 1, 4, 4))
    assert names("made") == ["000000.png", "000001.png", "mine.txt"]
    run = a_run(mlp(4, 8, 2), mlp(2, 8, 1))
    with pytest.raises(FileExistsError, match="not empty"):
        main(["sample", run, "--out=made"])
    main(["sample", run, "--out=made", "--overwrite"])
    assert names("made") == ["mine.txt", "samples.npy"]


def test_samples_that_are_not_finite():
    with pytest.raises(ValueError, match="1 of 3 samples are not finite"):
        SampleFiles("made").write(torch.tensor([[1.0], [torch.nan], [2.0]]))
    assert names("made") == []


FULL = """
import errno, sys
from pathlib import Path
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
from lightning_gan_stability.monitors.writing import SampleFiles
files = SampleFiles("made")
files.write(torch.ones(10, 100))
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    files.write(torch.ones(10, 100))
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_written():
    """A limit on the size of files, in a process of its own, fails in the middle of a write as a full disk does."""
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=100)
    assert "Writing to 'made' failed after 10 samples, which are there" in done.stdout, done.stderr
    assert np.array_equal(np.load("made/samples.npy"), np.ones((10, 100), np.float32))


def test_a_picture_that_cannot_be_written_is_not_there(monkeypatch):
    files = SampleFiles("made")
    files.write(torch.zeros(2, 1, 4, 4))

    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"after 2 samples, which are there .*No space left"):
        files.write(torch.zeros(2, 1, 4, 4))
    assert names("made") == ["000000.png", "000001.png"]


# ---------- predict


def test_predict_writes_samples():
    torch.manual_seed(0)
    model = SuperResolution(
        nn.Conv2d(3, 12, 1).append if False else nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3), scale=2
    )
    trainer = Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[SampleWriter()],
    )
    data = Photographs(size=16, batch_size=4, holdout=6)
    trainer.predict(model, data, return_predictions=False)
    assert names("predictions") == [f"{i:06d}.png" for i in range(6)]
    with pytest.raises(FileExistsError, match=r"--trainer.callbacks\+=SampleWriter --trainer.callbacks.overwrite=true"):
        trainer.predict(model, data, return_predictions=False)


def test_bad_arguments():
    run = a_run(mlp(4, 8, 2), mlp(2, 8, 1))
    for more, said in [
        (["--n=0"], "`n` must be a positive integer"),
        (["--batch-size=0"], "`batch-size` must be a positive integer"),
        (["--seed=-1"], "`seed` must be"),
        (["--interpolate=1"], "`interpolate` must be"),
        (["--condition=label=1"], "takes no condition"),
        (["--condition=nowhere"], "a file or folder that exists"),
        (["--no-average"], "has no average"),
        (["--device=meta"], "`device` must be one of this machine"),
        (["--seed=99999999999999999999"], "`seed` must be"),
        (["--device=nonsense"], "`device` must be one of this machine"),
    ]:
        with pytest.raises(ValueError, match=said):
            main(["sample", run, "--out=made", *more])
        assert not Path("made").exists()
    with pytest.raises(ValueError, match="--grid and --interpolate draw pictures of images"):
        main(["sample", run, "--out=made", "--interpolate=4"])
    assert not Path("made").exists()


def test_samples_with_an_average_of_a_run_in_python():
    gan = small()
    fit(gan, points(2), callbacks=[GeneratorEMA(decay=0.9)]).save_checkpoint("a.ckpt")
    main(["sample", "a.ckpt", "--model=toys.small", "--out=made"])
    expected = gan.generator_ema(latents_of(gan, 64, seed=0)).detach()
    np.testing.assert_allclose(np.load("made/samples.npy"), expected, rtol=1e-6, atol=1e-7)
