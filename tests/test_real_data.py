"""Monitors read the data that the run trains on, as its sampler says, and take nothing away from it."""

import itertools
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from toys import ignoring, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    Autopilot,
    GANModule,
    HealthMonitor,
    MemorizationMonitor,
    PairedTranslation,
    QualityMonitor,
)
from lightning_gan_stability.monitors.real_data import from_start, rebatched

N = 64


def rows(n=N, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


class Points(Dataset):
    def __init__(self, n=N):
        self.x = rows(n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class Turning:
    """Goes through the rows in another order in each epoch, and holds a lock, which has no copies."""

    def __init__(self):
        self.epoch, self.lock = 0, threading.Lock()

    def __len__(self):
        return N

    def __iter__(self):
        with self.lock:
            self.epoch += 1
        return iter(torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Batched(Points):
    """Is asked for many rows at once."""

    def __getitems__(self, indices):
        return list(self.x[indices])


class ByKey(Points):
    """A data set whose rows have names."""

    def __getitem__(self, key):
        return self.x[int(key["row"][1:])]


class Keys:
    """Names of rows, in a new order each time."""

    def __init__(self):
        self.random = random.Random(0)

    def __iter__(self):
        order = [*range(N)]
        self.random.shuffle(order)
        return iter([{"row": f"r{i}"} for i in order])

    def __len__(self):
        return N


class Endless(Keys):
    __len__ = None

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        while True:
            yield int(torch.randint(N, (), generator=self.generator))


class Noisy(Points):
    """Draws from a generator of its own when it is asked, and from NumPy's of all."""

    def __init__(self, source):
        super().__init__()
        self.source = source

    def __getitem__(self, index):
        own = {
            torch.Generator: lambda g: torch.randn(2, generator=g),
            random.Random: lambda g: torch.tensor([g.random(), g.random()]),
            np.random.Generator: lambda g: torch.from_numpy(g.normal(size=2)).float(),
            np.random.RandomState: lambda g: torch.from_numpy(g.normal(size=2)).float(),
        }[type(self.source)](self.source)
        return self.x[index] + 0.1 * own + 0.1 * torch.from_numpy(np.random.normal(size=2)).float()


class Stream(IterableDataset):
    """Rows from where it is, and on."""

    def __init__(self):
        self.x, self.position = rows(4 * N), 0

    def __iter__(self):
        while self.position < len(self.x):
            self.position += 1
            yield self.x[self.position - 1]
        self.position = 0


class Drawn(IterableDataset):
    """Draws its rows."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        for _ in range(N):
            yield torch.randn(2, generator=self.generator)


class Loader:
    """A loader of somebody's own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        for _ in range(8):
            yield torch.randn(8, 2, generator=self.generator)


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def as_object(items):
    return Batch(torch.stack(items), torch.zeros(len(items)))


def workers(**kwargs):
    return {"num_workers": 1, "multiprocessing_context": "fork"} | kwargs


def weighted(**kwargs):
    return WeightedRandomSampler([1.0] * N, N, **kwargs)


LOADERS = {
    "in order": lambda: DataLoader(Points(), 8),
    "shuffled": lambda: DataLoader(Points(), 8, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(Points(), 8, shuffle=True, generator=torch.Generator()),
    "many rows at once": lambda: DataLoader(Batched(), 8, shuffle=True),
    "a subset": lambda: DataLoader(Points(), 8, sampler=SubsetRandomSampler(range(32))),
    "weighted": lambda: DataLoader(Points(), 8, sampler=weighted()),
    "weighted by a generator": lambda: DataLoader(Points(), 8, sampler=weighted(generator=torch.Generator())),
    "with replacement": lambda: DataLoader(Points(), 8, sampler=RandomSampler(Points(), True, 80)),
    "keys": lambda: DataLoader(ByKey(), 8, sampler=Keys()),
    "an order with a count and a lock": lambda: DataLoader(Points(), 8, sampler=Turning()),
    "an endless sampler": lambda: DataLoader(Points(), 8, sampler=Endless()),
    "a list of rows": lambda: DataLoader(Points(), 8, sampler=[*range(N)]),
    "a batch sampler": lambda: DataLoader(Points(), batch_sampler=BatchSampler(RandomSampler(Points()), 8, False)),
    "batches by hand": lambda: DataLoader(Points(), batch_sampler=[[*range(i, i + 8)] for i in range(0, N, 8)]),
    "batches as rows": lambda: DataLoader(
        Points(), batch_size=None, sampler=BatchSampler(RandomSampler(Points()), 8, False)
    ),
    "ready batches": lambda: DataLoader([rows(8, seed) for seed in range(8)], batch_size=None),
    "dicts": lambda: DataLoader([{"x": row, "y": 0} for row in rows()], 8, shuffle=True),
    "objects": lambda: DataLoader(Points(), 8, collate_fn=as_object),
    "a worker": lambda: DataLoader(Points(), 8, shuffle=True, **workers()),
    "persistent workers": lambda: DataLoader(Points(), 8, shuffle=True, **workers(persistent_workers=True)),
    "a set that draws, torch": lambda: DataLoader(Noisy(torch.Generator()), 8, shuffle=True),
    "a set that draws, Python": lambda: DataLoader(Noisy(random.Random(0)), 8),
    "a set that draws, NumPy": lambda: DataLoader(Noisy(np.random.default_rng(0)), 8),
    "a set that draws, old NumPy": lambda: DataLoader(Noisy(np.random.RandomState(0)), 8),
    "a set that draws, worker": lambda: DataLoader(Noisy(torch.Generator()), 8, **workers(persistent_workers=True)),
    "a stream": lambda: DataLoader(Stream(), 8),
    "a stream of a worker": lambda: DataLoader(Stream(), 8, **workers()),
    "a stream of a persistent worker": lambda: DataLoader(Stream(), 8, **workers(persistent_workers=True)),
    "a stream that draws": lambda: DataLoader(Drawn(), 8),
    "a stream of batches": lambda: DataLoader(map_batches(), batch_size=None),
    "a dict of loaders": lambda: {"x": DataLoader(Points(), 8, shuffle=True), "y": DataLoader(Drawn(), 8)},
    "the shorter of two": lambda: CombinedLoader(LOADERS["a dict of loaders"](), "min_size"),
    "one after another": lambda: CombinedLoader([DataLoader(Points(), 8), DataLoader(Drawn(), 8)], "sequential"),
    "somebody's own": Loader,
}  # fmt: skip


def map_batches():
    class Batches(IterableDataset):
        def __iter__(self):
            yield from rows().split(8)

    return Batches()


class Any(GANModule):
    """Takes every batch, and keeps what it was trained on."""

    def unpack(self, batch):
        x = batch.x if isinstance(batch, Batch) else batch["x"] if isinstance(batch, dict) else batch
        return x, None

    def training_step(self, batch, batch_idx):
        self.trained = [*getattr(self, "trained", []), self.unpack(batch)[0].clone()]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


LIMITS = {"max_epochs": 2, "limit_train_batches": 12, "limit_val_batches": 12}


def run(loader, *callbacks, val=None, **kwargs):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    module = Any(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)
    with ignoring():
        trainer(callbacks=[*callbacks], **LIMITS | kwargs).fit(module, loader, val)
    return module


def monitors(split="train"):
    return QualityMonitor(nn.Identity(), ["fid"], n_samples=50, every=3, split=split), HealthMonitor(every=3)


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "one after another"])  # which is for validation
def test_a_run_is_the_same_with_and_without_monitors(kind):
    alone, watched = run(LOADERS[kind]()), run(LOADERS[kind](), *monitors())
    assert alone.iteration == watched.iteration > 6
    assert all(torch.equal(*pair) for pair in zip(alone.trained, watched.trained, strict=True))
    assert torch.equal(weights(alone), weights(watched))


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind not in ("the shorter of two",)])
def test_held_out_data_of_every_kind(kind):
    alone = run(DataLoader(Points(), 8), val=LOADERS[kind]())
    watched = run(DataLoader(Points(), 8), *monitors("val"), val=LOADERS[kind]())
    assert torch.equal(weights(alone), weights(watched))


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if "draws" not in kind])
def test_what_is_read_is_what_there_is(kind):
    """Rows of the data set, as many as were asked for, and all of them if there are fewer."""
    loader = LOADERS[kind]()
    found = [Any.unpack(None, batch)[0] for batch in from_start(loader, 50, 0, 1)]
    read = torch.cat(found)
    assert len(read) >= (32 if kind == "a subset" else 50)
    known = torch.cat([rows(), rows(4 * N), *(rows(8, seed) for seed in range(8))])
    if kind not in ("somebody's own", "one after another"):
        assert {tuple(row) for row in read.tolist()} <= {tuple(row) for row in known.tolist()}
    again = [Any.unpack(None, batch)[0] for batch in from_start(loader, 50, 0, 1)]
    if kind != "weighted":
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


# ---------- which rows


def read(loader, n=None, rank=0, world=1):
    return torch.cat([*from_start(loader, n, rank, world)])


def test_a_sampler_says_which_rows_there_are():
    half = DataLoader(Points(), 8, sampler=SubsetRandomSampler(range(32)))
    assert {tuple(row) for row in read(half).tolist()} == {tuple(row) for row in rows()[:32].tolist()}
    assert {tuple(row) for row in read(half, 20).tolist()} < {tuple(row) for row in rows()[:32].tolist()}


def test_a_sampler_says_how_often():
    often = WeightedRandomSampler([0.9] * 32 + [0.1] * 32, 20000)
    found = read(DataLoader(Points(), 500, sampler=often), 10000)
    first = {tuple(row) for row in rows()[:32].tolist()}
    share = sum(tuple(row) in first for row in found.tolist()) / 10000
    assert share == pytest.approx(0.9, abs=0.015)  # five standard deviations


def test_a_part_of_sorted_data_is_of_all_of_it():
    loader = DataLoader(torch.arange(1000.0)[:, None], 10)
    assert read(loader, 200).mean() == pytest.approx(500, abs=100)
    batches = DataLoader(torch.arange(1000.0)[:, None], batch_sampler=[[*range(i, i + 10)] for i in range(0, 1000, 10)])
    assert torch.cat([*itertools.islice(from_start(batches, 200, 0, 1), 20)]).mean() == pytest.approx(500, abs=250)


@pytest.mark.parametrize("sampler", [None, SubsetRandomSampler(range(40)), SequentialSampler(Points())])
def test_ranks_share_what_one_process_reads(sampler):
    loader = DataLoader(Points(), 8, sampler=sampler)
    whole, parts = read(loader, 30), [read(loader, 30, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).reshape(-1, 2), whole)


def test_a_sampler_that_is_one_ranks_share_is_read_whole():
    class Share(list):
        num_replicas, rank = 2, 0

    loader = DataLoader(Points(), 8, sampler=Share(range(0, N, 2)))
    assert {tuple(row) for row in read(loader, None, 0, 2).tolist()} == {tuple(row) for row in rows()[::2].tolist()}
    assert len(read(loader, 20, 0, 2)) == 10


def test_all_of_an_endless_sampler_is_refused():
    with pytest.raises(MisconfigurationException, match="its sampler Endless has no length"):
        run(LOADERS["an endless sampler"](), QualityMonitor(metrics=["fid"], n_samples=50, n_real="all"))


def test_held_out_rows_of_a_split_by_samplers_are_held_out():
    train = DataLoader(Points(), 8, sampler=SubsetRandomSampler(range(40)))
    val = DataLoader(Points(), 8, sampler=SubsetRandomSampler(range(40, N)))
    judged = []
    module = Any(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)
    module.discriminator.register_forward_pre_hook(lambda network, inputs: judged.append((network.training, inputs[0])))
    trainer(callbacks=[HealthMonitor(every=3)], limit_train_batches=3).fit(module, train, val)
    looked = torch.cat([x for training, x in judged if not training])
    held = {tuple(row) for row in rows()[40:].tolist()}
    assert held <= {tuple(row) for row in looked.tolist()}


def test_a_perfect_generator_of_a_half_is_perfect():
    """One of which the sampler says that it is the whole."""
    torch.manual_seed(0)
    y = torch.cat([torch.randn(500, 2) * 0.05 - 2, torch.randn(500, 2) * 0.05 + 2])

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, z):
            return z * 0.05 - 2 + 0 * self.weight

    module = GANModule(Exact(), MLP([2, 8, 1]), latent_dim=2)
    monitor = QualityMonitor(n_samples=500, every=1)
    trainer(callbacks=[monitor], max_steps=1).fit(module, DataLoader(y, 50, sampler=SubsetRandomSampler(range(500))))
    assert monitor.values["fid"] < 0.001
    assert monitor.values["missing"] < 0.02
    monitor = QualityMonitor(n_samples=500, every=1)
    sampler = WeightedRandomSampler([0.999] * 500 + [0.001] * 500, 1000)
    trainer(callbacks=[monitor], max_steps=1).fit(module, DataLoader(y, 50, sampler=sampler))
    assert monitor.values["fid"] < 0.1


# ---------- a run that sees a part of its data


class Sees(QualityMonitor):
    """Keeps the real samples that it has read, whose features they are."""

    def __init__(self):
        super().__init__(nn.Identity(), ["fid"], n_samples=50, n_real="all", every=1000)

    def on_train_end(self, trainer, pl_module):
        with ignoring():
            self.real = self.measure(trainer, pl_module).real


class InOrder(IterableDataset):
    """Gives its samples in order."""

    def __iter__(self):
        return iter(rows())


def on_two_processes(loader):
    """What Lightning makes of a loader for the first of two processes that share the data."""
    return DataLoader(loader.dataset, loader.batch_size, sampler=DistributedSampler(loader.dataset, 2, 0, False))


def as_set(samples):
    return {tuple(row) for row in samples.tolist()}


LIMITED = {
    "overfit, in order": (lambda: DataLoader(Points(), 8), {"overfit_batches": 3}),
    "overfit, shuffled": (lambda: DataLoader(Points(), 8, shuffle=True), {"overfit_batches": 3}),
    "overfit, a share": (lambda: DataLoader(Points(), 8, shuffle=True), {"overfit_batches": 0.45}),
    "overfit, a subset": (
        lambda: DataLoader(Points(), 8, sampler=SubsetRandomSampler(range(40, N))),
        {"overfit_batches": 3},
    ),
    "overfit, other batches": (
        lambda: DataLoader(Points(), batch_sampler=[[*range(i, i + 8)] for i in range(0, N, 8)]),
        {"overfit_batches": 3},
    ),
    "overfit, batches": (lambda: DataLoader([*rows().split(8)], batch_size=None, shuffle=True), {"overfit_batches": 3}),
    "overfit, an iterable": (lambda: DataLoader(InOrder(), 8), {"overfit_batches": 3}),
    "overfit, two": (
        lambda: {"x": DataLoader(Points(), 8, shuffle=True), "y": DataLoader(Points(8), 2)},
        {"overfit_batches": 3},
    ),
    "a limit, in order": (lambda: DataLoader(Points(), 8), {"limit_train_batches": 3}),
    "a limit, a share": (lambda: DataLoader(Points(), 8), {"limit_train_batches": 0.45}),
    "a limit, a list of rows": (lambda: DataLoader(Points(), 8, sampler=[*range(N)]), {"limit_train_batches": 3}),
    "a limit, a list of batches": (
        lambda: DataLoader(Points(), batch_sampler=[[*range(i, i + 8)] for i in range(0, N, 8)]),
        {"limit_train_batches": 3},
    ),
    "a limit, one process of two": (lambda: on_two_processes(DataLoader(Points(), 8)), {"limit_train_batches": 3}),
    "a limit, shuffled": (lambda: DataLoader(Points(), 8, shuffle=True), {"limit_train_batches": 3}),
    "a limit, shuffled in batches": (
        lambda: DataLoader(Points(), batch_sampler=BatchSampler(RandomSampler(Points()), 8, False)),
        {"limit_train_batches": 3},
    ),
    "one batch to try the code": (lambda: DataLoader(Points(), 8), {"fast_dev_run": 1}),
}


@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.*fast_dev_run")
@pytest.mark.parametrize("kind", LIMITED)
def test_monitors_read_what_a_run_of_few_batches_trains_on(kind):
    """That is what its training steps were given, unless other rows come in other epochs."""
    loader, limit = LIMITED[kind]
    monitor = Sees()
    options = {"max_epochs": 3, "limit_train_batches": 1.0, "limit_val_batches": 1.0} | limit
    module = run(loader(), monitor, **options)
    trained = as_set(torch.cat(module.trained))
    if "process" in kind:
        assert trained < as_set(monitor.real) == as_set(rows()[:48])
    elif kind.startswith(("a limit, shuffled", "one batch")):
        assert as_set(monitor.real) == as_set(rows())
    else:
        assert len(trained) == 24
        assert as_set(monitor.real) == trained


@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:MemorizationMonitor has")
def test_other_monitors_read_what_a_run_overfits():
    """Autopilot steers towards what is to be learned, although there are data held out."""

    class Shows(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x.clone())
            return x

    pilot, judge = Autopilot(extractor=Shows(), n_samples=50), MemorizationMonitor(Shows(), n_samples=50, pairs=0)
    x, held_out = rows(400), 5 + rows(100, seed=1)
    train = DataLoader(TensorDataset(x), 20, shuffle=True)

    class First(GANModule):
        def unpack(self, batch):
            return batch[0], None

    module = First(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)
    with ignoring():
        trainer(callbacks=[pilot, judge], overfit_batches=2, max_steps=1).fit(
            module, train, DataLoader(TensorDataset(held_out), 50)
        )
    for monitor, allowed in ((pilot, x[:40]), (judge, torch.cat([x[:40], held_out]))):
        read = as_set(torch.cat(monitor.extractor.seen)) & as_set(torch.cat([x, held_out]))
        assert read == as_set(allowed)


def test_too_few_samples_for_a_monitor_are_explained_by_the_limit():
    with pytest.raises(MisconfigurationException, match="the loader has 16 within the limits of the Trainer: give at"):
        run(DataLoader(Points(), 8), Sees(), limit_train_batches=2)


# ---------- sizes, pairs, memory


class Sizes(IterableDataset):
    """Pairs of pictures of several sizes, one by one."""

    def __iter__(self):
        for i in range(80):
            x = torch.randn(1, 1, 8 + i % 3, 8, generator=torch.Generator().manual_seed(i)).tanh()
            yield x, -x


class Mean(nn.Module):
    """Two features of pictures of any size."""

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)


class Squash(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(Mean()(x))


def test_validation_samples_of_several_sizes():
    torch.manual_seed(0)
    module = PairedTranslation(nn.Conv2d(1, 1, 3, padding=1), Squash())
    x = torch.rand(16, 1, 8, 8)
    monitors = QualityMonitor(Mean(), ["fid"], n_samples=50, every=2, split="val"), HealthMonitor(every=2)
    train = DataLoader(TensorDataset(x, -x), 4)
    trainer(callbacks=[*monitors]).fit(module, train, DataLoader(Sizes(), batch_size=None))
    assert torch.tensor([row["fid"] for row in monitors[0].history]).isfinite().all()
    assert monitors[0].protocol["n_fake"] == 50


def test_held_out_data_are_judged_in_batches_of_the_trainings():
    sizes = []
    torch.manual_seed(0)
    module = Any(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)  # which does not validate
    module.discriminator.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    trainer(callbacks=[HealthMonitor(every=2)]).fit(module, DataLoader(Points(16), 4), DataLoader(Points(50), 50))
    assert max(sizes) == 4


def test_conditional_samples_are_as_many_as_conditions():
    """A translator that is exact has a recall of 1, also when more samples are asked for than there are sources."""
    torch.manual_seed(0)
    source = torch.randn(400, 2)
    exact = nn.Linear(2, 2, bias=False)
    exact.weight.data.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))

    class Pairs(GANModule):
        def unpack(self, batch):
            return batch[1], batch[0]

        def generate(self, network, n, condition, latents):
            return network(condition)

        def discriminate(self, network, sample, condition):
            return network(sample)

    module = Pairs(exact, nn.Linear(2, 1))
    monitor = QualityMonitor(metrics=["fid", "recall", "precision"], n_samples=2500, every=1)
    data = DataLoader(TensorDataset(source, (source @ exact.weight.T).detach()), 50, shuffle=True)
    trainer(callbacks=[monitor], max_steps=0).fit(module, data)
    trainer(callbacks=[monitor], max_steps=1).fit(module, data)
    first = monitor.history[0]
    assert monitor.protocol["n_fake"] == monitor.protocol["n_real"] == 400
    assert first["recall"] == first["precision"] == 1.0
    assert first["fid"] < 1e-6


def test_large_conditions_are_read_again(monkeypatch):
    from lightning_gan_stability.monitors import reading

    values = []
    for kept in (2**27, 100):
        monkeypatch.setattr(reading, "KEPT", kept)
        torch.manual_seed(0)
        module = GANModule(LabelNet(), MLP([2, 8, 1]), latent_dim=2)
        monitor = QualityMonitor(metrics=["fid"], n_samples=60, every=2)
        labels = torch.arange(N).remainder(3)
        trainer(callbacks=[monitor]).fit(module, DataLoader(TensorDataset(rows(), labels), 8, shuffle=True))
        values.append([row["fid"] for row in monitor.history])
    assert values[0] == values[1]


class LabelNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)

    def forward(self, z, label):
        return z + self.embedding(label)


def test_all_real_samples():
    monitor = QualityMonitor(metrics=["fid"], n_samples=50, n_real="all", every=4)
    trainer(callbacks=[monitor]).fit(small(), DataLoader(Points(), 8))
    assert monitor.protocol["n_real"] == N
    assert monitor.protocol["n_fake"] == 50


def test_two_monitors_under_names(tmp_path):
    def two():
        return [
            QualityMonitor(metrics=["fid"], n_samples=50, every=4),
            QualityMonitor(nn.Linear(2, 3), ["recall"], n_samples=50, every=4, name="other"),
        ]

    watched = two()
    run_ = trainer(callbacks=watched, max_steps=4, max_epochs=-1)
    run_.fit(small(), DataLoader(Points(), 8))
    assert {"quality/fid", "other/recall"} <= run_.callback_metrics.keys()
    assert "quality/recall" not in run_.callback_metrics
    run_.save_checkpoint(tmp_path / "x.ckpt")
    again = two()
    with ignoring():  # Lightning's warning of a loader without a position
        run_ = trainer(callbacks=again, max_steps=8, max_epochs=-1)
        run_.fit(small(), DataLoader(Points(), 8), ckpt_path=tmp_path / "x.ckpt")
    assert [len(monitor.history) for monitor in again] == [3, 3]
    assert again[0].history[:2] == watched[0].history


@pytest.mark.parametrize("data", [(row for row in rows().split(8)), DataLoader(map_batches(), batch_size=None)])
def test_what_cannot_be_read_without_moving_it_is_refused(data):
    if isinstance(data, DataLoader):
        data.dataset.left = (row for row in rows())
    with pytest.raises(MisconfigurationException, match="away from training, since it cannot be copied"):
        run(data, QualityMonitor(metrics=["fid"], n_samples=50))


def test_batches_of_one_size():
    parts = [rows(5), rows(2), rows(9), rows(1)]
    found = [*rebatched(parts, 4)]
    assert [len(part) for part in found] == [4, 4, 4, 4, 1]
    assert torch.equal(torch.cat(found), torch.cat(parts))
    other = [torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(2, 5)]
    assert [tuple(part.shape) for part in rebatched(other, 4)] == [(3, 2), (4, 5), (1, 5)]
