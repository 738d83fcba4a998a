import math
import random
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from toys import small
from toys import trainer as quiet

from lightning_gan_stability.data import Digits, Grid, Images, Ring, Stream

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch about code of Lightning
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),  # a resumed run writes where the first one did
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # no validation, as intended
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # about LightningCLI
]


def ready(module, rank=0, world=1):
    """Set `module` up as Lightning does for one of `world` processes."""
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, global_step=0)
    module.setup("fit")
    return module


def points(module, n=1, **place):
    stream = ready(module, **place).train_dataloader()
    return torch.cat([stream[position] for position in range(n)])


def common(left, right):
    return set(map(tuple, left.tolist())) & set(map(tuple, right.tolist()))


def equal(left, right):
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(equal, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


# ---------- Stream


def numbers(length=3, **options):
    return Stream(lambda position: torch.tensor(position), length, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_goes_on_where_it_was(num_workers):
    stream = numbers(num_workers=num_workers)
    assert len(stream) == 3
    assert [int(batch) for _ in range(2) for batch in stream] == [0, 1, 2, 3, 4, 5]
    other = numbers(num_workers=num_workers)
    other.load_state_dict(stream.state_dict())
    assert [int(batch) for batch in other] == [6, 7, 8]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_counts_what_was_yielded_and_not_what_workers_prepared(num_workers):
    stream = numbers(10, num_workers=num_workers)
    iterator = iter(stream)
    assert stream.state_dict() == {"position": 0}
    assert int(next(iterator)) == 0
    assert stream.state_dict() == {"position": 1}


def test_stream_takes_the_position_that_is_loaded_after_iter():
    stream = numbers()
    iterator = iter(stream)  # Lightning makes the iterator of the first epoch early
    stream.load_state_dict({"position": 5})
    assert int(next(iterator)) == 5


def test_stream_repeats_on_demand():
    stream = numbers(repeat=True)
    next(iter(stream))  # a pass that is broken off, like Lightning's sanity check
    assert [int(batch) for _ in range(2) for batch in stream] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("length", [0, True, 1.5])
def test_stream_refuses_bad_length(length):
    with pytest.raises(ValueError, match=rf"`length` must be a positive integer, got {length}\."):
        numbers(length)


# ---------- Ring and Grid


def test_ring_has_eight_distinct_modes_at_the_right_places():
    half = math.sqrt(2)
    expected = [(2, 0), (half, half), (0, 2), (-half, half), (-2, 0), (-half, -half), (0, -2), (half, -half)]
    torch.testing.assert_close(Ring().centers, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    assert torch.pdist(Ring().centers).min() > 1.5  # neighbours are 2 r sin(pi / 8) = 1.53 apart; a trap of one source


# METHODS.md, section 10.1
RINGS = {"unrolled": (2, 0.02), "wgan_gp": (2 / 1.414, 0.02 / 1.414), "pacgan": (1, 0.01), "conopt": (1, 0.01)}
GRIDS = {"wgan_gp": (2 / 2.828, 0.05 / 2.828), "pacgan": (2, 0.05)}


@pytest.mark.parametrize("protocol", RINGS)
def test_ring_protocol(protocol):
    ring = Ring(protocol, batch_size=4000)
    radius, std = RINGS[protocol]
    assert ring.std == pytest.approx(std)
    assert ring.centers.norm(dim=1).tolist() == pytest.approx([radius] * 8)
    check_mixture(points(ring, 10), ring.centers, std, balanced=protocol == "conopt")


@pytest.mark.parametrize("protocol", GRIDS)
def test_grid_protocol(protocol):
    grid = Grid(protocol, batch_size=4000)
    spacing, std = GRIDS[protocol]
    places = sorted((spacing * i, spacing * j) for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2))
    assert grid.std == pytest.approx(std)
    torch.testing.assert_close(grid.centers, torch.tensor(places, dtype=torch.float32))
    check_mixture(points(grid, 10), grid.centers, std)


def check_mixture(x, centers, std, balanced=False):
    """Compare counts, means and deviations of every mode with what they must be, within 5 standard errors."""
    assert x.dtype == torch.float32
    mode = torch.cdist(x, centers).argmin(1)
    counts = mode.bincount(minlength=len(centers)).double()
    share = len(x) / len(centers)
    assert (counts - share).abs().max() <= (0 if balanced else 5 * math.sqrt(share * (1 - 1 / len(centers))))
    for k, center in enumerate(centers):
        rest = (x[mode == k] - center).double()
        assert rest.mean(0).abs().max() < 5 * std / math.sqrt(len(rest))
        assert abs(rest.square().mean().sqrt() - std) < 5 * std / math.sqrt(2 * rest.numel())
        assert abs((rest[:, 0] * rest[:, 1]).mean()) < 5 * std**2 / math.sqrt(len(rest))


def test_balanced_batch_takes_the_modes_in_turn():
    ring = Ring("conopt", modes=3, batch_size=8)
    x = points(ring)
    assert torch.cdist(x, ring.centers).argmin(1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_own_numbers_override_the_protocol():
    ring = Ring("wgan_gp", modes=3, radius=5, std=0.5)
    assert (ring.std, ring.centers.shape, ring.centers[0].tolist()) == (0.5, (3, 2), [5, 0])
    grid = Grid("wgan_gp", side=2, spacing=3, std=0.5)
    assert (grid.std, grid.centers.tolist()) == (0.5, [[-1.5, -1.5], [-1.5, 1.5], [1.5, -1.5], [1.5, 1.5]])
    assert Grid(side=1).centers.tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", [Ring, Grid])
def test_points_depend_on_seed_rank_position_and_nothing_else(kind):
    def batch(seed=0, rank=0, world=4, position=3):
        return ready(kind(batch_size=8, seed=seed), rank, world).train_dataloader()[position]

    assert torch.equal(batch(), batch())
    assert torch.equal(batch(), batch(world=2))
    for other in (batch(seed=1), batch(rank=1), batch(position=4)):
        assert not common(batch(), other)


def test_held_out_points_are_fixed_and_not_the_training_points():
    ring = ready(Ring(batch_size=1000))
    first, second = (list(ring.val_dataloader()) for _ in range(2))
    assert [len(batch) for batch in first] == [1000, 1000, 500]
    assert equal(first, second)
    assert equal(first, list(ring.predict_dataloader()))
    assert not common(first[0], ring.train_dataloader()[0])
    check_mixture(torch.cat(first), ring.centers, ring.std)


def test_processes_share_the_held_out_points():
    parts = [list(ready(Ring(batch_size=500), rank, 3).val_dataloader()) for rank in range(3)]
    assert [[len(batch) for batch in part] for part in parts] == [[500, 334]] * 3  # ceil(2500 / 3) = 834
    assert not common(parts[0][0], parts[1][0])


def test_epoch_length():
    stream = Ring(batch_size=2, epoch_length=5).train_dataloader()
    batches = [batch for _ in range(2) for batch in stream]
    assert [batch.shape for batch in batches] == [(2, 2)] * 10
    assert len(torch.cat(batches).unique(dim=0)) == 20  # never the same point again


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Ring, {"modes": 0}, r"`modes` must be a positive integer, got 0\."),
        (Ring, {"modes": True}, r"`modes` must be a positive integer, got True\."),
        (Ring, {"radius": 0}, r"`radius` must be a positive finite number, got 0\."),
        (Ring, {"radius": math.inf}, r"`radius` must be a positive finite number, got inf\."),
        (Ring, {"std": -1.0}, r"`std` must be a positive finite number, got -1.0\."),
        (Ring, {"std": math.nan}, r"`std` must be a positive finite number, got nan\."),
        (Ring, {"std": True}, r"`std` must be a positive finite number, got True\."),
        (Ring, {"protocol": "veegan"}, r"`protocol` must be one of 'unrolled', 'wgan_gp', 'pacgan', 'conopt', got 've"),
        (Ring, {"batch_size": 1.0}, r"`batch_size` must be a positive integer, got 1.0\."),
        (Ring, {"epoch_length": 0}, r"`epoch_length` must be a positive integer, got 0\."),
        (Ring, {"val_samples": 0}, r"`val_samples` must be a positive integer, got 0\."),
        (Ring, {"seed": -1}, r"`seed` must be an integer that is not negative, got -1\."),
        (Grid, {"side": 0}, r"`side` must be a positive integer, got 0\."),
        (Grid, {"spacing": -2}, r"`spacing` must be a positive finite number, got -2\."),
        (Grid, {"protocol": "conopt"}, r"`protocol` must be one of 'wgan_gp', 'pacgan', got 'conopt'\."),
        (Digits, {"holdout": -1}, r"`holdout` must be an integer that is not negative, got -1\."),
        (Digits, {"batch_size": 0}, r"`batch_size` must be a positive integer, got 0\."),
        (Images, {}, r"Exactly one of `folder` and `dataset` must be given, got None and None\."),
        (Images, {"folder": ".", "dataset": TensorDataset()}, r"Exactly one of `folder` and `dataset` must be given"),
        (Images, {"folder": "no/such"}, r"`folder` does not exist: no/such"),
        (Images, {"dataset": Endless()}, r"`dataset` must have a length and give items by index, got Endless\."),
        (Images, {"folder": ".", "size": 0}, r"`size` must be a positive integer, got 0\."),
        (Images, {"folder": ".", "channels": 2}, r"`channels` must be one of 1, 3, got 2\."),
        (Images, {"folder": ".", "channels": True}, r"`channels` must be one of 1, 3, got True\."),
        (
            Images,
            {"folder": ".", "num_workers": -1},
            r"`num_workers` must be an integer that is not negative, got -1\.",
        ),
        (Images, {"folder": ".", "crop": "left"}, r"`crop` must be one of 'center', 'random', None, got 'left'\."),
        (Images, {"folder": ".", "resize": 63}, r"`resize` must be an integer of at least 64, got 63\."),
        (Images, {"folder": ".", "resize": 64, "crop": None}, r"set `crop`, or remove `resize`\."),
        (Images, {"folder": ".", "flip": "no"}, r"`flip` must be True or False, got 'no'\."),
        (Images, {"folder": ".", "labels": 1}, r"`labels` must be True or False, got 1\."),
        (Images, {"folder": ".", "drop_last": 1, "holdout": 64}, r"`drop_last` must be True or False, got 1\."),
        (Images, {"folder": ".", "drop_last": True}, r"set `holdout`, or remove `drop_last`\."),
        (Images, {"folder": ".", "on_error": "ignore"}, r"`on_error` must be one of 'raise', 'skip', got 'ignore'\."),
        (Images, {"dataset": TensorDataset(), "on_error": "skip"}, r"`on_error='skip'` is for the files of `folder`"),
        (Images, {"folder": __file__}, r"`folder` must be a folder or a zip archive: .*test_data\.py"),
        (Images, {"folder": ".", "holdout": 0.1}, r"`holdout` must be an integer that is not negative, got 0.1\."),
    ],
)
def test_bad_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


# ---------- Digits


def as_tuples(images):
    return [tuple(image.flatten().tolist()) for image in images]


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    expected = Counter(zip(as_tuples(data.images / 8 - 1), data.target.tolist(), strict=True))
    digits = Digits(batch_size=1, holdout=300)
    found = Counter()
    for images, labels in [*digits.train_dataloader(), *digits.val_dataloader()]:
        assert (images.shape, images.dtype, labels.dtype) == ((1, 1, 8, 8), torch.float32, torch.int64)
        found.update(zip(as_tuples(images), labels.tolist(), strict=True))
    assert found == expected  # every image once, with its label, in one of the two parts
    assert len(digits.train_dataloader()) == 1497
    assert min(min(pixels) for pixels, _ in found) == -1
    assert max(max(pixels) for pixels, _ in found) == 1


@pytest.mark.parametrize("holdout", [300, 10, 7])
def test_digits_held_out_are_stratified_and_fixed(holdout):
    from sklearn.datasets import load_digits

    digits = Digits(holdout=holdout)
    first, second = (list(digits.val_dataloader()) for _ in range(2))
    assert equal(first, second)
    assert equal(first, list(digits.predict_dataloader()))
    labels = torch.cat([labels for _, labels in first])
    assert len(labels) == holdout
    share = torch.as_tensor(load_digits().target).bincount() * holdout / 1797
    assert (labels.bincount(minlength=10) - share).abs().max() <= 1
    assert not equal(first, list(Digits(holdout=holdout, seed=1).val_dataloader()))


def test_digits_every_image_once_per_epoch_over_two_processes():
    ranks = [ready(Digits(batch_size=64), rank, 2).train_dataloader() for rank in range(2)]
    assert [len(stream) for stream in ranks] == [1497 // 128] * 2
    alone = Digits(batch_size=1, holdout=300)
    expected = Counter(key for images, _ in alone.train_dataloader() for key in as_tuples(images))
    orders = []
    for _ in range(2):
        parts = [[key for images, _ in stream for key in as_tuples(images)] for stream in ranks]
        seen = Counter(parts[0] + parts[1])
        assert seen <= expected  # nothing twice, nothing held out
        assert seen.total() == 1497 // 128 * 128  # up to the incomplete batch
        orders.append(parts)
    assert orders[0] != orders[1]


def test_two_processes_see_the_batch_of_one():
    alone = Digits(batch_size=8).train_dataloader()
    ranks = [ready(Digits(batch_size=4), rank, 2).train_dataloader() for rank in range(2)]
    for position in (0, 1, 200):
        parts = [stream[position] for stream in ranks]
        whole = alone[position]
        assert all(torch.equal(whole[0][rank::2], parts[rank][0]) for rank in range(2))
        assert all(torch.equal(whole[1][rank::2], parts[rank][1]) for rank in range(2))


def test_processes_share_the_held_out_digits_in_equally_many_batches():
    parts = [list(ready(Digits(batch_size=10, holdout=61), rank, 3).val_dataloader()) for rank in range(3)]
    # 61 = 2 * 30 + 1: the one image left goes to every process, so that none waits for ever
    assert [[len(labels) for _, labels in part] for part in parts] == [[10, 10, 1]] * 3


def test_digits_without_holdout_predict_the_training_images_in_order():
    from sklearn.datasets import load_digits

    digits = Digits(holdout=0)
    assert digits.val_dataloader() == []
    images = torch.cat([images for images, _ in digits.predict_dataloader()])
    torch.testing.assert_close(images[:, 0], torch.as_tensor(load_digits().images / 8 - 1, dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        (
            {"batch_size": 1000},
            2,
            r"`batch_size` times processes must not exceed .*, got 1000 \* 2 = 2000 for 1497 images",
        ),
        ({"holdout": 1797}, 1, r"`holdout` must be less than the number of images, .*, got 1797 for 1797"),
    ],
)
def test_digits_refuse_a_batch_larger_than_the_training_set(options, world, message):
    with pytest.raises(ValueError, match=rf"{message}\."):
        ready(Digits(**options), 0, world)


# ---------- Images


def paint(path, color, size=(20, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def read_all(module):
    """Return all held-out or else all training images, in order."""
    return next(iter(ready(module).predict_dataloader()))


def test_images_of_all_modes_and_sizes(tmp_path):
    paint(tmp_path / "a.png", (255, 0, 51), size=(31, 17))
    paint(tmp_path / "b.jpg", (255, 255, 255), size=(9, 40))
    paint(tmp_path / "c.PNG", 204, mode="L", size=(8, 8))
    paint(tmp_path / "d.png", (0, 51, 255, 128), mode="RGBA", size=(3, 5))
    palette = Image.new("P", (12, 12), 1)
    palette.putpalette([0, 0, 0, 51, 102, 153])
    palette.save(tmp_path / "e.png", transparency=b"\xff\x80")  # the direct way from it to RGB makes Pillow warn
    (tmp_path / "notes.txt").write_text("no image")
    images = read_all(Images(str(tmp_path), size=8, batch_size=5))
    assert (images.shape, images.dtype) == ((5, 3, 8, 8), torch.float32)
    on_white = [[127 + c * 128 / 255 for c in color] for color in [(0, 51, 255), (51, 102, 153)]]  # alpha 128 of 255
    colors = [(255, 0, 51), (255, 255, 255), (204, 204, 204), *on_white]
    for image, color in zip(images, colors, strict=True):
        expected = (torch.tensor(color) / 127.5 - 1)[:, None, None].expand(3, 8, 8)
        torch.testing.assert_close(image, expected, atol=0.6 / 127.5, rtol=0)  # eight bits
    assert (images.min(), images.max()) == (-1, 1)
    grey = read_all(Images(str(tmp_path), size=8, batch_size=5, channels=1))
    assert grey.shape == (5, 1, 8, 8)
    red = 0.299 * 255 + 0.114 * 51  # ITU-R 601 luma, which Pillow documents
    assert grey[0].mean().item() == pytest.approx(red / 127.5 - 1, abs=1 / 127.5)


def test_images_are_cut_from_the_centre(tmp_path):
    picture = Image.new("RGB", (30, 10), (0, 0, 0))
    picture.paste((255, 255, 255), (10, 0, 20, 10))  # a white square in the middle of a black strip
    picture.save(tmp_path / "strip.png")
    picture.rotate(90, expand=True).save(tmp_path / "upright.png")
    assert torch.equal(read_all(Images(str(tmp_path), size=10, batch_size=2)), torch.ones(2, 3, 10, 10))


def test_images_are_antialiased(tmp_path):
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    board.save(tmp_path / "board.png")
    image = read_all(Images(str(tmp_path), size=8, batch_size=1, channels=1))
    assert image[:, :, 1:-1, 1:-1].abs().max() < 0.02  # the mean of black and white; a picked pixel would be at ±1


def test_sub_folders_give_labels(tmp_path):
    for name, red in [("dog/1.png", 10), ("cat/2.png", 20), ("dog/deep/3.png", 30), ("emu/4.png", 40)]:
        paint(tmp_path / name, (red, 0, 0))
    images, labels = read_all(Images(str(tmp_path), size=4, batch_size=4))
    reds = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert dict(zip(reds, labels.tolist(), strict=True)) == {20: 0, 10: 1, 30: 1, 40: 2}
    assert labels.dtype == torch.int64


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"`folder` has no images \(.jpg, .jpeg, .png.*\): {tmp_path}"):
        ready(Images(str(tmp_path)))


def test_fewer_images_than_a_batch(tmp_path):
    paint(tmp_path / "a.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"must not exceed the training set, got 2 \* 1 = 2 for 1 images\."):
        ready(Images(str(tmp_path), batch_size=2))


class Pictures(Dataset):
    """Eight grey pictures; number k has the value 10 k, black in its left half."""

    def __init__(self, n=8, labelled=True):
        self.n, self.labelled = n, labelled

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        picture = Image.new("L", (16, 8), 10 * index + 10)
        picture.paste(0, (0, 0, 8, 8))
        return (picture, index) if self.labelled else picture


def test_dataset_of_pictures_with_and_without_labels():
    images, labels = read_all(Images(dataset=Pictures(), size=8, channels=1, batch_size=8))
    assert labels.tolist() == list(range(8))
    right = (images[:, 0, :, 7] + 1) * 127.5
    torch.testing.assert_close(right, (10.0 * labels + 10)[:, None].expand(8, 8), atol=1e-4, rtol=0)
    plain = read_all(Images(dataset=Pictures(labelled=False), size=8, channels=1, batch_size=8))
    assert torch.equal(plain, images)


def test_dataset_of_tensors_is_taken_as_it_is():
    tensors = torch.rand(4, 3, 5, 5) * 2 - 1
    images = read_all(Images(dataset=TensorDataset(tensors), size=5, batch_size=4))
    assert torch.equal(images, tensors)
    labels = torch.arange(4) + 7
    batch = read_all(Images(dataset=TensorDataset(tensors, labels), size=5, batch_size=4))
    assert equal(batch, (tensors, labels))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.zeros(3, 4, 5)], r"`dataset` must give tensors of shape \(3, 4, 4\), got \(3, 4, 5\)\."),
        ([torch.full((3, 4, 4), 255)], r"must give tensors with values in \[-1, 1\], got \[255, 255\]\."),
        ([torch.full((3, 4, 4), -1.5)], r"must give tensors with values in \[-1, 1\], got \[-1.5, -1.5\]\."),
        ([torch.full((3, 4, 4), math.nan)], r"must give tensors with values in \[-1, 1\], got \[nan, nan\]\."),
        (["words"], r"`dataset` must give Pillow images or tensors, got str\."),
    ],
)
def test_dataset_with_unfit_items(items, message):
    images = ready(Images(dataset=items, size=4, batch_size=1))
    with pytest.raises(ValueError, match=message):
        next(iter(images.train_dataloader()))


def test_images_holdout_is_fixed_and_apart_from_training():
    images = ready(Images(dataset=Pictures(), size=8, channels=1, batch_size=5, holdout=3))
    held_out = next(iter(images.val_dataloader()))[1].tolist()
    for _ in range(3):
        assert sorted(next(iter(images.train_dataloader()))[1].tolist() + held_out) == list(range(8))
        assert next(iter(images.val_dataloader()))[1].tolist() == held_out
    others = [next(iter(Images(dataset=Pictures(), channels=1, holdout=3, batch_size=5, seed=s).val_dataloader()))[1]
              for s in range(8)]  # fmt: skip
    assert len({tuple(labels.tolist()) for labels in others}) > 3


def test_images_are_flipped_half_of_the_time_and_only_in_training():
    module = ready(Images(dataset=Pictures(), size=8, channels=1, batch_size=8, flip=True))
    plain = {int(label): image for image, label in zip(*read_all(Images(dataset=Pictures(), size=8, channels=1,
             batch_size=8)), strict=True)}  # fmt: skip
    flips = []
    for _ in range(100):
        for image, label in zip(*next(iter(module.train_dataloader())), strict=True):
            flips.append(not torch.equal(image, plain[int(label)]))
            assert torch.equal(image.flip(-1) if flips[-1] else image, plain[int(label)])
    assert abs(sum(flips) - 400) < 5 * math.sqrt(800 / 4)  # 5 standard errors
    shown, labels = next(iter(module.predict_dataloader()))
    assert all(torch.equal(image, plain[int(label)]) for image, label in zip(shown, labels, strict=True))


def test_flips_do_not_depend_on_the_number_of_processes():
    options = {"dataset": Pictures(), "size": 8, "channels": 1, "flip": True}
    whole = ready(Images(batch_size=8, **options)).train_dataloader()[5][0]
    for rank in range(2):
        assert torch.equal(ready(Images(batch_size=4, **options), rank, 2).train_dataloader()[5][0], whole[rank::2])


# ---------- all of them together

SOURCES = {
    "ring": lambda: Ring(batch_size=4, epoch_length=4, val_samples=6),
    "grid": lambda: Grid(batch_size=4, epoch_length=4, val_samples=6),
    "digits": lambda: Digits(batch_size=360, holdout=300),
    "images": lambda: Images(dataset=Pictures(14), size=8, channels=1, batch_size=3, holdout=2, flip=True),
    "crops": lambda: Images(dataset=Pictures(14), size=8, channels=1, batch_size=3, crop="random", flip=True),
    "workers": lambda: Images(dataset=Pictures(14), size=8, channels=1, batch_size=3, flip=True, num_workers=1),
}


@pytest.mark.parametrize("source", SOURCES)
def test_global_random_state_is_neither_read_nor_changed(source):
    def everything(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        module = SOURCES[source]()
        seen = [list(module.train_dataloader()), *map(list, filter(None, [module.val_dataloader()]))]
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        return seen

    assert equal(everything(1), everything(2))


class Recorder(LightningModule):
    """Notes what it is given, and when."""

    def __init__(self, width: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.seen, self.validated = [], {}

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.setdefault(self.current_epoch, []).append(batch)

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder, module, ckpt_path=None, **options):
    """Train, write a checkpoint within and after every epoch, and return what the model saw."""
    saves = [
        ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "epoch-{step}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False,
                        save_on_train_epoch_end=True),
    ]  # fmt: skip
    model = Recorder()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=saves,
                      enable_model_summary=False, **{"max_epochs": 3, **options})  # fmt: skip
    trainer.fit(model, datamodule=module, ckpt_path=ckpt_path)
    return model, trainer


@pytest.mark.parametrize("options", [{}, {"max_steps": 10, "max_epochs": -1}, {"limit_train_batches": 3}], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, source, options):
    whole = fit(tmp_path, SOURCES[source](), **options)[0].seen
    per_epoch = options.get("limit_train_batches", 4)
    n = options.get("max_steps", 3 * per_epoch)
    assert [key[:2] for key in whole] == [divmod(step, per_epoch) for step in range(n)]
    for name in (f"step-{per_epoch + 2}", f"step-{2 * per_epoch}", f"epoch-{2 * per_epoch}"):
        resumed = fit(tmp_path, SOURCES[source](), tmp_path / f"{name}.ckpt", **options)[0].seen
        assert equal(resumed, whole[int(name.split("-")[1]) :]), name


def test_every_epoch_is_validated_on_the_same_batches(tmp_path):
    model, trainer = fit(tmp_path, Digits(batch_size=360, holdout=300))
    assert list(model.validated) == [0, 1, 2]
    # the sanity check before the first epoch saw the one batch too
    assert [len(batches) for batches in model.validated.values()] == [2, 1, 1]
    assert equal(model.validated[1], model.validated[2])
    assert equal(trainer.predict(model, datamodule=trainer.datamodule), model.validated[1])


def test_no_validation_without_held_out_images(tmp_path):
    model, _ = fit(tmp_path, SOURCES["workers"]())
    assert model.validated == {}


def test_further_fit_goes_on_and_a_new_trainer_starts_over(tmp_path):
    module = SOURCES["ring"]()
    model, trainer = fit(tmp_path, module, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=module)
    positions = [module.train_dataloader()[position] for position in range(8)]
    assert equal([batch for *_, batch in model.seen], positions)
    again, _ = fit(tmp_path / "new", module, max_epochs=1)
    assert equal([batch for *_, batch in again.seen], positions[:4])


def test_reloaded_loaders_do_not_rewind(tmp_path):
    plain, _ = fit(tmp_path, SOURCES["ring"]())
    reloaded, _ = fit(tmp_path / "new", SOURCES["ring"](), reload_dataloaders_every_n_epochs=1)
    assert equal(plain.seen, reloaded.seen)


def test_checkpoint_holds_the_position_and_plain_data(tmp_path):
    fit(tmp_path, SOURCES["workers"](), max_epochs=1)
    saved = torch.load(tmp_path / "step-3.ckpt", weights_only=True)
    assert saved["Images"] == {"position": 3}
    assert saved["hyper_parameters"] == {"width": 1}


def from_command_line(*arguments):
    with mock.patch("sys.argv", ["fit", *arguments]):
        cli = LightningCLI(Recorder, LightningDataModule, subclass_mode_data=True, run=False,
                           seed_everything_default=False, save_config_callback=None)  # fmt: skip
    return cli.datamodule


def test_command_line_takes_short_names():
    ring = from_command_line("--data=Ring", "--data.protocol=conopt", "--data.modes=4")
    assert (type(ring), ring.balanced, ring.centers.shape) == (Ring, True, (4, 2))
    assert from_command_line("--data=Grid", "--data.side=3").centers.shape == (9, 2)
    assert from_command_line("--data=Digits", "--data.holdout=10").holdout == 10


def test_command_line_builds_a_dataset_from_its_class_path(tmp_path):
    (tmp_path / "config.yaml").write_text(
        """
        data:
          class_path: Images
          init_args:
            dataset: {class_path: torchvision.datasets.FakeData, init_args: {size: 4, image_size: [3, 9, 9]}}
            size: 8
            batch_size: 4
        """
    )
    images, labels = next(iter(from_command_line(f"--config={tmp_path / 'config.yaml'}").train_dataloader()))
    assert (images.shape, labels.shape) == ((4, 3, 8, 8), (4,))


def test_command_line_refuses_an_unknown_protocol(capsys):
    with pytest.raises(SystemExit):
        from_command_line("--data=Ring", "--data.protocol=veegan")
    assert "'unrolled','wgan_gp','pacgan','conopt'" in capsys.readouterr().err.replace(" ", "")


def test_overfitting_to_batches_is_refused():
    """It would be to other batches in every epoch."""
    run = quiet(overfit_batches=2)
    with pytest.raises(MisconfigurationException, match="Ring yields other samples in every epoch, so overfit_batches"):
        run.fit(small(), Ring())
