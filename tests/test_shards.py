"""Images in tar shards: which ones each process and worker reads, in which order, and after a resume."""

import io
import pickle
import random
import sys
import tarfile
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import equal, fit, ready

from lightning_gan_stability import ImageShards
from lightning_gan_stability.monitors.real_data import from_start

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

EACH = 6  # images in a shard


def png(value, shape=(8, 8)):
    file = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(shard, n=EACH):
    """Image k of a shard has the value EACH · shard + k, which is its class too."""
    for k in range(n):
        value = EACH * shard + k
        yield f"{value:06}.png", png(value)
        yield f"{value:06}.cls", str(value).encode()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(8):
        write(folder / f"{shard:02}.tar", samples(shard))
    for shard in range(20, 23):
        write(folder / f"val{shard}.tar", samples(shard))
    return folder


def shards(folder, **options):
    given = {"epoch_length": 12, "size": 8, "channels": 1, "batch_size": 4, "shuffle": 5}
    return ImageShards(f"{folder}/{{00..07}}.tar", **(given | options))


def values(batches):
    images = torch.cat([batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches])
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# ---------- shares


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_every_image_once_in_an_epoch(folder, world, num_workers):
    orders = []
    for _ in range(2):
        seen = []
        for rank in range(world):
            module = ready(shards(folder, epoch_length=12 // world, num_workers=num_workers), rank, world)
            stream = module.train_dataloader()
            for _ in orders:
                list(stream)
            seen.append(values(stream))
        every = [value for part in seen for value in part]
        assert Counter(every) == Counter(range(48))
        orders.append(every)
    assert orders[0] != orders[1]


def test_workers_and_processes_share_the_shards(folder):
    read = {}
    for rank in range(2):
        stream = ready(shards(folder, epoch_length=6, num_workers=2), rank, 2).train_dataloader()
        for position, batch in enumerate(stream):
            read.setdefault((rank, position % 2), set()).update(value // EACH for value in values([batch]))
    assert [len(found) for found in read.values()] == [2] * 4  # of the eight shards
    assert set().union(*read.values()) == set(range(8))


def test_images_come_in_another_order_than_they_are_in(folder):
    seen = values(shards(folder).train_dataloader())
    shards_in_order = [value // EACH for value in seen]
    assert len(set(shards_in_order[:10])) > 2  # mixed across shards
    stream = shards(folder, shuffle=1).train_dataloader()
    in_order, next_epoch = values(stream), values(stream)
    assert next_epoch != in_order  # of the shards
    assert all(b - a == 1 for a, b in pairwise(in_order) if a // EACH == b // EACH)
    assert [value // EACH for value in in_order[::EACH]] != sorted(value // EACH for value in in_order[::EACH])
    assert values(shards(folder, seed=1).train_dataloader()) != seen


def test_shards_of_several_lengths_are_read_again(tmp_path):
    for shard, n in enumerate([2, 6, 6, 6]):
        write(tmp_path / f"{shard}.tar", samples(shard, n))
    module = ImageShards(f"{tmp_path}/{{0..3}}.tar", 10, 8, 1, 4, num_workers=2)
    seen = Counter(values(module.train_dataloader()))
    assert sum(seen.values()) == 40
    assert len(seen) == 20


def test_labels_belong_to_their_images(folder):
    for images, labels in shards(folder, labels=True).train_dataloader():
        assert labels.dtype == torch.int64
        assert values([images]) == labels.tolist()


# ---------- where they are


@pytest.mark.parametrize("form", ["list", "file:", "pipe:"])
def test_addresses(folder, form):
    paths = [f"{folder}/{k:02}.tar" for k in range(8)]
    address = {"list": paths, "file:": f"file:{folder}/{{00..07}}.tar", "pipe:": f"pipe:cat {folder}/{{00..07}}.tar"}
    options = {"epoch_length": 12, "size": 8, "channels": 1, "batch_size": 4, "shuffle": 5}
    found = list(ImageShards(address[form], **options).train_dataloader())
    assert equal(found, list(shards(folder).train_dataloader()))


def test_without_webdataset(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for name in [name for name in sys.modules if name.startswith("webdataset.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"This needs webdataset: pip install 'lightning-gan-stability\[shar"):
        ready(shards(folder))


# ---------- resume


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}], ids=str)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, folder, num_workers, options):
    def data():
        return shards(folder, epoch_length=4, crop="random", resize=12, flip=True, num_workers=num_workers)

    whole = fit(tmp_path, data(), **options)[0].seen
    per_epoch = options.get("limit_train_batches", 4)
    assert [key[:2] for key in whole] == [divmod(step, per_epoch) for step in range(3 * per_epoch)]
    for name in (f"step-{per_epoch + 2}", f"step-{2 * per_epoch}", f"epoch-{2 * per_epoch}"):
        resumed = fit(tmp_path, data(), tmp_path / f"{name}.ckpt", **options)[0].seen
        assert equal(resumed, whole[int(name.split("-")[1]) :]), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_position_gives_its_batch_from_wherever_it_is_asked(folder, num_workers):
    stream = ready(shards(folder, num_workers=num_workers), 1, 2).train_dataloader()
    first = [stream[position] for position in range(30)]
    for position in (29, 3, 3, 4, 17, 0, 28):
        assert torch.equal(ready(shards(folder, num_workers=num_workers), 1, 2).train_dataloader()[position],
                           first[position])  # fmt: skip
        assert torch.equal(stream[position], first[position])
    assert torch.equal(pickle.loads(pickle.dumps(stream))[4], first[4])


def test_another_number_of_workers_after_a_resume_is_warned_of(tmp_path, folder):
    fit(tmp_path, shards(folder, epoch_length=4), max_epochs=1)
    saved = torch.load(tmp_path / "step-2.ckpt", weights_only=True)
    assert saved["ImageShards"] == {"position": 2, "num_workers": 0}
    with pytest.warns(UserWarning, match=r"`num_workers=0`, and now it is 1"):
        fit(tmp_path, shards(folder, epoch_length=4, num_workers=1), tmp_path / "step-2.ckpt", max_epochs=1)


def test_global_random_state_is_neither_read_nor_changed(folder):
    def everything(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        module = shards(folder, flip=True, val_shards=f"{folder}/val20.tar", holdout=4, num_workers=1)
        seen = [list(module.train_dataloader()), list(module.val_dataloader())]
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        return seen

    assert equal(everything(1), everything(2))


def test_a_monitor_reads_from_the_start_and_moves_nothing(folder):
    stream = shards(folder).train_dataloader()
    iterator = iter(stream)
    seen = [next(iterator)]
    looked = list(from_start(stream, 20, 0, 1))
    seen += iterator
    assert equal(seen, looked)
    assert equal(seen, list(shards(folder).train_dataloader()))


# ---------- held-out images


def held_out(folder, rank=0, world=1, **options):
    given = {"val_shards": f"{folder}/val{{20..22}}.tar", "holdout": 18}
    return ready(shards(folder, **(given | options)), rank, world)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_held_out_images_come_once_each_and_in_order(folder, world, num_workers):
    parts = [held_out(folder, rank, world, num_workers=num_workers, batch_size=3).val_dataloader()
             for rank in range(world)]  # fmt: skip
    found = [values(part) for part in parts]
    assert [value for step in zip(*found, strict=True) for value in step] == list(range(120, 138))
    assert [values(part) for part in parts] == found


def test_held_out_images_are_rounded_to_whole_batches(folder):
    batches = list(held_out(folder).val_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 4, 4]  # of 18
    assert equal(batches, list(held_out(folder).predict_dataloader()))


def test_without_held_out_shards_training_images_are_predicted_in_order(folder):
    module = ready(shards(folder))
    assert module.val_dataloader() == []
    assert values(module.predict_dataloader()) == list(range(48))


def test_fewer_held_out_images_than_asked_for(folder):
    with pytest.raises(ValueError, match=r"`val_shards` must have at least `holdout` = 19 images, got 18\."):
        held_out(folder, holdout=19)


# ---------- what cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch_length": 0}, r"`epoch_length` must be a positive integer, got 0\."),
        ({"shuffle": 0}, r"`shuffle` must be a positive integer, got 0\."),
        ({"holdout": 4}, r"`val_shards` and `holdout` go together, got None and 4\."),
        ({"val_shards": "a.tar"}, r"`val_shards` and `holdout` go together, got 'a\.tar' and 0\."),
        ({"shards": []}, r"`shards` must be an address of tar files, or a list of them, got \[\]\."),
        ({"shards": [3]}, r"`shards` must be an address of tar files, or a list of them, got \[3\]\."),
        ({"labels": "yes"}, r"`labels` must be True or False, got 'yes'\."),
        ({"on_error": "warn"}, r"`on_error` must be one of 'raise', 'skip', got 'warn'\."),
        ({"crop": "left"}, r"`crop` must be one of 'center', 'random', None, got 'left'\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ImageShards(**({"shards": "a.tar"} | options))


def test_what_is_refused_before_the_first_batch(folder):
    with pytest.raises(ValueError, match=r"`shards`: there is no such file: .*08\.tar"):
        ready(ImageShards(f"{folder}/{{06..08}}.tar"))
    with pytest.raises(ValueError, match=r"as many as processes times workers, got 8 for 3 \* 3"):
        ready(shards(folder, num_workers=3), 0, 3)
    with pytest.raises(ValueError, match=r"must not exceed `holdout`, got 4 \* 5 for 18\."):
        held_out(folder, 0, 5)


def test_a_shard_that_is_cut_off_is_named(folder):
    path = folder / "00.tar"
    path.write_bytes(path.read_bytes()[:560])
    with pytest.raises(ValueError, match=r"This shard cannot be read: .*00\.tar"):
        list(shards(folder, on_error="skip").train_dataloader())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"no image")], r"Shards have no images \(\.jpg.*a\.tar"),
        ([("a.png", b"no image")], r"This image cannot be read: .*a\.tar: a\.png"),
        ([("a.png", png(0)), ("a.jpg", png(0))], r"a\.tar: a\.png \(its sample has several images: png, jpg\)"),
        ([("a.png", png(0))], r"a\.tar: a\.png \(its sample has no `\.cls` file with the number of a class"),
        ([("a.png", png(0)), ("a.cls", b"cat")], r"a\.tar: a\.png \(its sample has no `\.cls` file with the number"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said(tmp_path, members, message):
    write(tmp_path / "a.tar", members)
    module = ImageShards(f"{tmp_path}/a.tar", 1, 8, batch_size=1, labels=True)
    with pytest.raises(ValueError, match=message):
        next(iter(module.train_dataloader()))


def test_broken_images_are_replaced_and_change_no_other_batch(folder):
    whole = shards(folder).train_dataloader()
    expected = [values([whole[position]]) for position in range(12)]
    content = dict(samples(3))
    content["000020.png"] = content["000020.png"][:40]
    write(folder / "03.tar", content.items())
    stream = shards(folder, on_error="skip").train_dataloader()
    with pytest.warns(UserWarning, match=r"03\.tar: 000020\.png .*Another image of the batch takes its place"):
        found = [values([stream[position]]) for position in range(12)]
    for one, other in zip(found, expected, strict=True):
        others = [value for value in other if value != 20]
        assert all(a in others if b == 20 else a == b for a, b in zip(one, other, strict=True))
    resumed = shards(folder, on_error="skip").train_dataloader()
    with pytest.warns(UserWarning, match="03"):
        assert [values([resumed[position]]) for position in range(5, 12)] == found[5:]


def test_a_trainer_fits_validates_and_predicts(tmp_path, folder):
    model, run = fit(tmp_path, held_out(folder, epoch_length=3, num_workers=1), max_epochs=2)
    assert [values(batches) for batches in model.validated.values()][-1] == list(range(120, 136))
    assert values(run.predict(model, datamodule=run.datamodule)) == list(range(120, 136))
