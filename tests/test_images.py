"""Image files of every kind: what their pixels become, what is refused by name, and what is drawn at random."""

import gc
import math
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from test_data import Pictures, equal, read_all, ready
from toys import trainer

from lightning_gan_stability import GANModule, Images

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


@pytest.fixture
def collected():
    """Free the loader that an exception keeps alive; torch can wait 5 s for it when it goes in a later test."""
    yield
    gc.collect()


def only(folder, **options):
    """The one image of a folder, framed as its own shape is."""
    return read_all(Images(str(folder), batch_size=1, **options))[0]


# ---------- more than eight bits


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def save_pgm(path, values):
    path.write_bytes(b"P5 256 256 65535\n" + values.astype(">u2").tobytes())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tif", "big-endian.tif", "pgm"])
def test_sixteen_bits_keep_their_values(tmp_path, kind, channels):
    path = tmp_path / f"ramp.{kind}"
    if kind == "pgm":
        save_pgm(path, RAMP)
    else:
        Image.fromarray(RAMP.astype(">u2") if "big" in kind else RAMP).save(path)
    pixels = only(tmp_path, size=256, channels=channels)
    expected = torch.from_numpy(RAMP / 65535 * 2 - 1).float().expand(channels, 256, 256)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert pixels.mean().abs() < 1e-6
    assert (pixels.abs() == 1).float().mean() < 1e-4  # once 99.6 % of them


def test_sixteen_bits_are_resized_with_all_their_digits(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "ramp.png")
    pixels = only(tmp_path, size=64, channels=1)[0, 4:-4, 4:-4]
    # The value is 256 · row + column, which a linear filter keeps.
    y, x = torch.meshgrid(torch.arange(4, 60) * 4 + 1.5, torch.arange(4, 60) * 4 + 1.5, indexing="ij")
    torch.testing.assert_close(pixels, (256 * y + x) / 65535 * 2 - 1, atol=1e-5, rtol=0)


def test_the_transparent_value_of_sixteen_bits_is_white(tmp_path):
    Image.fromarray(np.array([[0, 300], [300, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    chunk = b"tRNS" + struct.pack(">H", 300)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    assert only(tmp_path, size=2, channels=1)[0].tolist() == [[-1, 1], [1, 1]]


def png_of_sixteen_bits(values):
    """A PNG of colours (height, width, 3) with 16 bits each, which Pillow cannot write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_sixteen_bits_are_read_to_eight(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    (tmp_path / "a.png").write_bytes(png_of_sixteen_bits(values))
    expected = torch.from_numpy(values / 65535 * 2 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(only(tmp_path, size=8), expected, atol=2 / 255, rtol=0)


def test_floats_from_zero_to_one_are_read_as_they_are(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = torch.from_numpy(values * 2 - 1).expand(3, 8, 8)
    torch.testing.assert_close(only(tmp_path, size=8), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 255, np.float32), r"its floats are not in \[0, 1\]; scale them, or convert the image"),
        (np.full((4, 4), -0.1, np.float32), r"its floats are not in \[0, 1\]"),
        (np.full((4, 4), math.nan, np.float32), r"its floats are not in \[0, 1\]"),
        (np.full((4, 4), 65536, np.int32), r"its integers are not in 0 \.\.\. 65535"),
        (np.full((4, 4), -1, np.int32), r"its integers are not in 0 \.\.\. 65535"),
    ],
)
def test_other_floats_and_integers_are_refused_before_the_first_batch(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match=rf"This image cannot be read: .*depth\.tif \({message}"):
        ready(Images(str(tmp_path), batch_size=1))


def test_a_picture_of_a_dataset_that_cannot_be_read_is_named():
    images = ready(Images(dataset=[Image.fromarray(np.full((4, 4), 9, np.float32))], size=4, batch_size=1))
    with pytest.raises(ValueError, match=r"This image cannot be read: item 0 of `dataset` \(its floats are not"):
        next(iter(images.train_dataloader()))


# ---------- orientation, transparency, colours

TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
def test_images_are_turned_as_exif_says(tmp_path, kind, orientation):
    blocks = np.kron(np.array([[0, 80], [160, 250]], dtype=np.uint8), np.ones((8, 8), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(blocks).save(tmp_path / f"a.{kind}", exif=exif, **({"quality": 100} if kind == "jpg" else {}))
    expected = torch.from_numpy(TURNS[orientation](blocks).copy()) / 127.5 - 1
    torch.testing.assert_close(only(tmp_path, size=16, channels=1)[0], expected, atol=3 / 127.5, rtol=0)
    picture = Image.open(tmp_path / f"a.{kind}")
    torch.testing.assert_close(read_all(Images(dataset=[picture], size=16, channels=1, batch_size=1))[0, 0],
                               expected, atol=3 / 127.5, rtol=0)  # fmt: skip


COLOURS = np.array([[10, 200, 30], [250, 0, 90], [0, 0, 0], [77, 155, 255]], dtype=np.uint8)
ALPHA = np.array([0, 100, 255, 180], dtype=np.uint8)


def on_white(colours, alpha):
    share = alpha[..., None] / 255
    return torch.from_numpy((colours * share + 255 * (1 - share)) / 127.5 - 1).float()


def transparent(kind):
    """A picture of two by two pixels, and what it is on white (2, 2, 3)."""
    colours, alpha = COLOURS.reshape(2, 2, 3), ALPHA.reshape(2, 2)
    grey = colours[..., 0]
    greys = np.repeat(grey[..., None], 3, axis=2)
    if kind == "RGBA":
        return Image.fromarray(np.dstack([colours, alpha])), {}, on_white(colours, alpha)
    if kind == "LA":
        return Image.fromarray(np.dstack([grey, alpha])), {}, on_white(greys, alpha)
    if kind == "P":
        picture = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "L")
        picture.putpalette(COLOURS.flatten().tolist())
        return picture, {"transparency": ALPHA.tobytes()}, on_white(colours, alpha)
    if kind == "L with a transparent value":
        alpha = np.where(grey == 250, 0, 255)
        return Image.fromarray(grey), {"transparency": 250}, on_white(greys, alpha)
    alpha = np.where((colours == COLOURS[1]).all(2), 0, 255)
    return Image.fromarray(colours), {"transparency": tuple(COLOURS[1].tolist())}, on_white(colours, alpha)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L with a transparent value", "RGB with a transparent colour"])
def test_what_is_transparent_lies_on_white(tmp_path, kind):
    picture, options, expected = transparent(kind)
    picture.save(tmp_path / "a.png", **options)
    pixels = only(tmp_path, size=2).permute(1, 2, 0)
    torch.testing.assert_close(pixels, expected, atol=1.1 / 127.5, rtol=0)
    luma = (expected * torch.tensor([0.299, 0.587, 0.114])).sum(2)
    torch.testing.assert_close(only(tmp_path, size=2, channels=1)[0], luma, atol=2.1 / 127.5, rtol=0)


def test_cmyk_is_converted(tmp_path):
    inks = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    colours = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    expected = torch.from_numpy(colours / 127.5 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(only(tmp_path, size=4), expected, atol=1.1 / 127.5, rtol=0)


# ---------- files that cannot be read


def paint(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def noise(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


BROKEN = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_bytes(b"nothing that Pillow knows"),
    "cut.png": lambda path: path.write_bytes(noise(path)[:5000]),
    "cut.jpg": lambda path: path.write_bytes(noise(path)[:2000]),
    "cut.webp": lambda path: path.write_bytes(noise(path)[:2000]),
    "link.png": lambda path: path.symlink_to(path.parent / "nowhere.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name_before_the_first_batch(tmp_path, name):
    for k in range(3):
        paint(tmp_path / f"{k}.png")
    BROKEN[name](tmp_path / name)
    message = rf"1 of 4 images in `folder` cannot be read\. This image cannot be read: .*{name} .*`on_error='skip'`"
    with pytest.raises(ValueError, match=message):
        ready(Images(str(tmp_path), size=8, batch_size=1))


def test_broken_files_are_left_out_with_one_warning_of_their_number(tmp_path):
    for k in range(6):
        paint(tmp_path / "ab"[k % 2] / f"{k}.png", 10 * k)
    for name, make in BROKEN.items():
        make(tmp_path / "a" / name)
    with pytest.warns(UserWarning, match=r"6 of 12 images in `folder` cannot be read, and are left out\.") as caught:
        images, labels = read_all(Images(str(tmp_path), size=8, channels=1, batch_size=6, on_error="skip"))
    assert len(caught) == 1
    values = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert dict(zip(values, labels.tolist(), strict=True)) == {0: 0, 20: 0, 40: 0, 10: 1, 30: 1, 50: 1}


def test_nothing_but_broken_files_is_refused(tmp_path):
    BROKEN["empty.png"](tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 of 1 images in `folder` cannot be read\. .*a\.png"):
        ready(Images(str(tmp_path), batch_size=1, on_error="skip"))


def break_after_setup(folder, on_error, num_workers):
    """Images with one that is cut off after they were looked at."""
    for k in range(4):
        paint(folder / f"{k}.png", 60 * k)
    images = ready(Images(str(folder), size=8, channels=1, batch_size=4, on_error=on_error, num_workers=num_workers))
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-30])
    return images.train_dataloader()


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_breaks_later_ends_the_run(tmp_path, num_workers):
    with pytest.raises(ValueError, match=r"This image cannot be read: .*2\.png"):
        next(iter(break_after_setup(tmp_path, "raise", num_workers)))


def test_a_file_that_breaks_later_is_replaced_by_another_of_its_batch(tmp_path):
    stream = break_after_setup(tmp_path, "skip", 0)
    with pytest.warns(UserWarning, match=r"2\.png .*Another image of the batch takes its place"):
        batches = [stream[k] for k in range(3)]
    for batch in batches:
        values = ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert len(values) == 4
        assert set(values) == {0, 60, 180}
    with pytest.warns(UserWarning, match=r"2\.png"):
        assert equal(batches, [stream[k] for k in range(3)])


def test_names_that_begin_with_a_dot_are_passed_over(tmp_path):
    root = tmp_path / ".cache" / "pictures"  # the path of the folder itself does not matter
    paint(root / "cat" / "1.png", 10)
    paint(root / "dog" / "2.png", 20)
    for name in ("._1.png", "cat/._1.png", ".thumbnails/1.png", "cat/.ipynb_checkpoints/1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    module = Images(str(root), size=8, batch_size=2)
    _, labels = read_all(module)
    assert sorted(labels.tolist()) == [0, 1]
    assert module.classes == ["cat", "dog"]


# ---------- classes


def classes(folder, sizes):
    for name, size in sizes.items():
        for k in range(size):
            paint(folder / name / f"{k}.png")
    return str(folder)


def test_an_image_beside_class_folders_is_refused(tmp_path):
    folder = classes(tmp_path, {"cat": 2, "dog": 2})
    paint(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"1 of 5 images lie beside class folders.*stray\.png.*`labels=False`"):
        ready(Images(folder, batch_size=2))
    assert read_all(Images(folder, size=8, batch_size=5, labels=False)).shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    ("sizes", "holdout", "expected"),
    [((40, 40, 40), 12, [4, 4, 4]), ((60, 30, 10), 10, [6, 3, 1]), ((9, 6, 3), 6, [3, 2, 1])],
)
def test_each_class_is_held_out_in_proportion(tmp_path, sizes, holdout, expected):
    folder = classes(tmp_path, dict(zip(("a", "b", "c"), sizes, strict=True)))

    def held_out(rank=0, world=1, seed=0):
        module = ready(Images(folder, size=2, batch_size=1, holdout=holdout, seed=seed), rank, world)
        return module, torch.cat([labels for _, labels in module.val_dataloader()])

    assert held_out()[1].bincount().tolist() == expected
    assert held_out(seed=1)[1].bincount().tolist() == expected
    parts = torch.cat([held_out(rank, 2)[1] for rank in range(2)])
    assert parts.bincount().tolist() == expected
    train = torch.cat([labels for _, labels in held_out()[0].train_dataloader()])
    assert train.bincount().tolist() == [n - k for n, k in zip(sizes, expected, strict=True)]


class Targets(Pictures):
    """As torchvision's data sets: the label of each item is in `targets`."""

    classes = ("odd", "even")

    def __init__(self, targets):
        super().__init__(len(targets))
        self.targets = targets

    def __getitem__(self, index):
        return super().__getitem__(index)[0], int(self.targets[index])


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_a_dataset_with_targets_is_held_out_in_proportion(form):
    module = ready(Images(dataset=Targets(form([0, 0, 1] * 20)), size=8, batch_size=1, holdout=9))
    assert torch.cat([labels for _, labels in module.val_dataloader()]).bincount().tolist() == [6, 3]
    assert (module.classes, module.num_classes) == (["odd", "even"], 2)


def test_classes_are_known_before_training(tmp_path):
    module = Images(classes(tmp_path, {"b": 1, "a": 2, "c": 1}))
    assert (module.classes, module.num_classes) == (["a", "b", "c"], 3)
    without = Images(str(tmp_path), labels=False)
    assert (without.classes, without.num_classes) == (None, None)
    assert Images(str(tmp_path / "a")).classes is None
    assert Images(dataset=Pictures()).num_classes is None


def test_labels_of_a_dataset_are_left_out_on_wish():
    assert read_all(Images(dataset=Pictures(), size=8, batch_size=8, labels=False)).shape == (8, 3, 8, 8)


# ---------- archives


def zipped(folder, path, below=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, below + file.relative_to(folder).as_posix())
    return str(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    for k in range(12):
        paint(root / ("cat", "dog")[k % 3 == 0] / f"{k}.png", 20 * k)
    return root


@pytest.mark.parametrize("below", ["", "data/", "data/train/"])
def test_an_archive_is_read_as_its_folder(tmp_path, folder, below):
    path = zipped(folder, tmp_path / "x.zip", below)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._1.png", b"\0\5\x16\7")
    options = {"size": 8, "batch_size": 3, "holdout": 3, "flip": True}
    inside, outside = Images(path, **options), Images(str(folder), **options)
    assert inside.classes == outside.classes == ["cat", "dog"]
    assert equal(list(ready(inside).train_dataloader()), list(ready(outside).train_dataloader()))
    assert equal(list(inside.val_dataloader()), list(outside.val_dataloader()))


@pytest.mark.parametrize("below", ["./", "/", "data\\", "./data/train/"])
def test_names_of_members_as_other_programs_write_them(tmp_path, folder, below):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = below + file.relative_to(folder).as_posix()
            entry = zipfile.ZipInfo()
            entry.filename = name.replace("/", "\\") if "\\" in below else name
            archive.writestr(entry, file.read_bytes())
    found = Images(str(path), size=8, batch_size=3)
    assert found.classes == ["cat", "dog"]
    assert equal(read_all(found), read_all(Images(str(folder), size=8, batch_size=3)))


def test_links_to_folders(tmp_path, folder):
    """Those to a folder in which they lie would go on forever; others are as if the folder was there."""
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "cat" / "here").symlink_to(folder / "cat")
    assert read_all(Images(str(folder), labels=False, size=8, batch_size=12)).shape[0] == 12
    (folder / "again").symlink_to(folder / "dog")
    assert ready(Images(str(folder), size=8, batch_size=3)).classes == ["again", "cat", "dog"]


def test_several_processes_read_one_archive(tmp_path, folder):
    path = zipped(folder, tmp_path / "x.zip")
    options = {"size": 8, "batch_size": 1, "seed": 3}
    alone = ready(Images(path, **options))
    expected = [batch for _ in range(2) for batch in alone.train_dataloader()]
    several = ready(Images(path, num_workers=2, **options))
    list(several.predict_dataloader())
    several.train_dataloader()[0]  # opens it in the process that the others are forks of
    assert equal([batch for _ in range(2) for batch in several.train_dataloader()], expected)
    again = pickle.loads(pickle.dumps(several))
    assert equal([again.train_dataloader()[k] for k in range(24)], expected)


def test_an_archive_without_class_folders_has_no_labels(tmp_path, folder):
    assert read_all(Images(zipped(folder / "cat", tmp_path / "x.zip"), size=8, batch_size=8)).shape == (8, 3, 8, 8)


def test_what_is_broken_in_an_archive_is_refused_by_name(tmp_path, folder):
    BROKEN["cut.png"](folder / "cat" / "cut.png")
    with pytest.raises(ValueError, match=r"1 of 13 images in `folder` cannot be read.*x\.zip.cat.cut\.png"):
        ready(Images(zipped(folder, tmp_path / "x.zip"), batch_size=2))


def test_a_broken_archive_is_refused(tmp_path, folder):
    path = tmp_path / "x.zip"
    zipped(folder, path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"`folder` must be a folder or a zip archive: .*x\.zip"):
        Images(str(path))


def test_a_member_that_does_not_match_its_checksum_is_refused(tmp_path):
    noise(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[3000] ^= 255
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.zip.a\.png"):
        ready(Images(str(tmp_path / "x.zip"), batch_size=1))


# ---------- crops


class Strips:
    """Strips 16 high and 48 wide, one an image, whose value is 5 · column."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (16, 1)))


def lefts(images):
    """The first column of each crop, after a look at all columns."""
    columns = ((images[:, 0] + 1) * 127.5 / 5).round().long()
    first = columns[:, 0, 0]
    assert torch.equal(columns, (first[:, None, None] + torch.arange(images.shape[-1])).expand_as(columns))
    return first.tolist()


def test_random_crops_are_anywhere_in_training_and_in_the_middle_else():
    module = ready(Images(dataset=Strips(), size=16, channels=1, batch_size=2, holdout=4, crop="random"))
    places = [left for k in range(500) for left in lefts(module.train_dataloader()[k])]
    counts = np.bincount(places, minlength=33)
    assert len(counts) == 33  # 48 - 16 + 1 of them
    assert ((counts - 1000 / 33) ** 2 / (1000 / 33)).sum() < 32 + 5 * math.sqrt(64)  # chi-squared, 5 deviations
    assert lefts(next(iter(module.val_dataloader()))) == [16, 16]


def test_random_crops_move_both_ways_with_a_larger_shorter_side():
    board = np.add.outer(np.arange(24) * 8, np.arange(24)).astype(np.uint8)
    module = ready(Images(dataset=[Image.fromarray(board)] * 4, size=16, resize=24, channels=1, batch_size=4,
                          crop="random"))  # fmt: skip
    corners = torch.cat([module.train_dataloader()[k] for k in range(200)])[:, 0, 0, 0]
    corners = ((corners + 1) * 127.5).round().long()
    assert set(zip((corners // 8).tolist(), (corners % 8).tolist(), strict=True)) >= {(a, b) for a in range(8)
                                                                                      for b in range(8)}  # fmt: skip
    centre = read_all(Images(dataset=[Image.fromarray(board)], size=16, resize=24, channels=1, batch_size=1))[0, 0]
    torch.testing.assert_close(centre, torch.from_numpy(board[4:20, 4:20]) / 127.5 - 1)


def test_random_crops_do_not_depend_on_the_number_of_processes():
    options = {"dataset": Strips(), "size": 16, "channels": 1, "crop": "random", "flip": True}
    alone = ready(Images(batch_size=8, **options)).train_dataloader()[5]
    assert len({image.sum().item() for image in alone}) > 4
    assert not torch.equal(alone, ready(Images(batch_size=8, seed=1, **options)).train_dataloader()[5])
    for rank in range(2):
        assert torch.equal(ready(Images(batch_size=4, **options), rank, 2).train_dataloader()[5], alone[rank::2])


def test_without_a_crop_the_image_is_squeezed():
    pixels = read_all(Images(dataset=Strips(), size=16, channels=1, batch_size=8, crop=None))
    expected = np.asarray(Strips()[0].resize((16, 16), Image.Resampling.BILINEAR))
    assert torch.equal(pixels[0, 0], torch.from_numpy(expected.copy()) / 127.5 - 1)


# ---------- the last batch of validation


class MinibatchStd(torch.nn.Module):
    """A discriminator with the deviation in groups of four, as in StyleGAN2."""

    def __init__(self):
        super().__init__()
        self.score = torch.nn.Linear(65, 1)

    def forward(self, x):
        groups = x.flatten(1).reshape(4, -1, 64)
        deviation = (groups.var(0) + 1e-8).sqrt().mean(1).repeat(4)[:, None]
        return self.score(torch.cat([x.flatten(1), deviation], 1))


def run(data):
    generator = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    module = GANModule(generator, MinibatchStd(), latent_dim=4)
    run = trainer(max_steps=2, limit_val_batches=1.0)
    run.fit(module, data)
    return run.validate(module, data, verbose=False)


def data(**options):
    return Images(dataset=Pictures(26), size=8, channels=1, batch_size=8, labels=False, holdout=10, **options)


def test_groups_in_an_incomplete_last_validation_batch():
    with pytest.raises(MisconfigurationException, match=r"batch, of 2 samples instead of 8.*`drop_last=True`"):
        run(data())
    [values] = run(data(drop_last=True))
    assert math.isfinite(values["val/d/adversarial"])


def test_an_incomplete_held_out_batch_is_left_out_on_wish():
    for world in (1, 2):
        parts = [ready(Images(dataset=Pictures(50), size=8, batch_size=4, holdout=18, drop_last=True), rank, world)
                 for rank in range(world)]  # fmt: skip
        sizes = [[len(labels) for _, labels in part.val_dataloader()] for part in parts]
        assert sizes == [[4] * (18 // (4 * world))] * world
    with pytest.raises(ValueError, match=r"With `drop_last`.* must not exceed `holdout`, got 12 \* 1 = 12 for 10 im"):
        ready(Images(dataset=Pictures(50), batch_size=12, holdout=10, drop_last=True))


def test_other_errors_of_the_networks_in_validation_are_their_own():
    module = GANModule(torch.nn.Linear(4, 63), MinibatchStd(), latent_dim=4)
    batches = torch.utils.data.DataLoader(torch.randn(16, 63), 8)
    with pytest.raises(ValueError, match="The discriminator failed on an input of shape"):
        trainer(limit_val_batches=1.0).validate(module, batches)


def test_archives_are_not_opened_by_those_who_fork(tmp_path, folder):
    """A process has its own place in the file."""
    for k in range(8):  # large enough for two that read at the same time to get in each other's way
        values = np.random.default_rng(k).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / "cat" / f"large{k}.png", compress_level=1)
    module = ready(Images(zipped(folder, tmp_path / "x.zip"), size=8, batch_size=20))
    module.train_dataloader()[0]
    [batch] = list(module.predict_dataloader())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            same = all(equal(list(module.predict_dataloader()), [batch]) for _ in range(20))
            os.write(writer, b"1" if same else b"0")
        finally:
            os._exit(0)
    assert all(equal(list(module.predict_dataloader()), [batch]) for _ in range(20))
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    os.close(writer)
