"""Generators that copy their training data are said to, others are not, and the pairs are the nearest."""

import csv
import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from test_real_data import LOADERS, Points, run
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler
from toys import Copier, ignoring, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    Digits,
    GANModule,
    MemorizationMonitor,
)
from lightning_gan_stability.metrics import copying_test, memorization_test
from lightning_gan_stability.metrics.decisions import level
from lightning_gan_stability.monitors.latents import fixed_latents
from lightning_gan_stability.monitors.real_data import RealData, loader_to_read

SAID = "ignore:memorization at step"


def normal(n, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def loader(x, batch_size=100, **kwargs):
    return DataLoader(x, batch_size, **kwargs)


def copier(train, share, noise=0.0):
    return GANModule(Copier(train, share, noise), MLP([train.shape[1], 8, 1]), latent_dim=train.shape[1] + 2)


def watched(module, monitor, train, held_out, *others, **kwargs):
    options = {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 0} | kwargs
    found = trainer(callbacks=[monitor, *others], **options)
    found.fit(module, loader(train), loader(held_out))
    return found


def samples_of(module, n):
    """What the monitor sees, made once more."""
    with torch.no_grad():
        return module.eval().sample(n, latents=fixed_latents(module, n, "memorization"))


# ---------- what is said


@pytest.mark.parametrize("d", [2, 8])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_copies_are_said_with_their_share(share, noise, d):
    x = normal(2000, d)
    module, monitor = copier(x[:1000], share, noise), MemorizationMonitor(every=2)
    with pytest.warns(UserWarning, match=r"memorization at step 2: nearer .*copied 0\..*p .*AdaptiveAugmentation"):
        found = watched(module, monitor, x[:1000], x[1000:])
    assert monitor.values["copied"] == pytest.approx(share, abs=0.045)  # four standard deviations
    assert [(event["step"], event["verdict"]) for event in monitor.events] == [(2, "memorization")]
    assert monitor.events[0]["evidence"] == monitor.values
    assert monitor.values["p"] < 1e-6
    assert {k: v.item() for k, v in found.callback_metrics.items() if k.startswith("mem")} == pytest.approx(
        {f"memorization/{name}": value for name, value in monitor.values.items()}
    )
    assert monitor.logged(found) == dict.fromkeys((f"memorization/{name}" for name in monitor.values), 2)


@pytest.mark.filterwarnings(SAID)
def test_values_are_those_of_the_function():
    x = normal(500)
    module, monitor = copier(x[:300], 0.2), MemorizationMonitor(n_samples=150)
    watched(module, monitor, x[:300], x[300:450])
    features = x[:300], x[300:450], samples_of(module, 150)
    p, copied = copying_test(*features)
    expected = {"nearer": memorization_test(*features).nearer, "copied": copied, "p": p}
    assert monitor.values == pytest.approx(expected, rel=1e-9)


def test_a_perfect_generator_is_never_accused():
    """In 30 runs of three looks, at a level that all of them exceed in 3 % of the cases at most."""
    p_values = []
    for seed in range(30):
        x = normal(500, seed=seed)
        monitor = MemorizationMonitor(every=1, n_samples=100, false_alarms=0.001)
        watched(copier(x[:400], 0.0), monitor, x[:400], x[400:])
        assert monitor.events == []
        assert monitor.looks == 3
        p_values.append(monitor.values["p"])
    assert min(p_values) < 0.3  # these are tests
    assert max(p_values) > 0.7


@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_a_generator_of_typical_samples_is_not_accused(scale):
    """It is nearer to the training data than held-out samples are, and as near to these."""
    x = normal(800, 16)

    class Typical(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, z):
            return scale * z + 0 * self.weight

    monitor = MemorizationMonitor(every=1, n_samples=200)
    watched(GANModule(Typical(), MLP([16, 8, 1]), latent_dim=16), monitor, x[:500], x[500:])
    assert monitor.values["nearer"] > 0.9
    assert monitor.events == []


class Script(Callback):
    """Sets the share of copies at each step."""

    def __init__(self, shares):
        self.shares = shares

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.generator.share = self.shares[module.iteration]


@pytest.mark.filterwarnings(SAID)
def test_the_same_trouble_is_said_once_until_it_is_gone():
    x = normal(800)
    monitor = MemorizationMonitor(every=1, n_samples=300)
    module = copier(x[:500], 0.0)
    watched(module, monitor, x[:500], x[500:], Script([0, 0.5, 0.5, 0, 0.5, 0.5]), max_steps=6)
    assert [event["step"] for event in monitor.events] == [2, 5]
    assert monitor.looks == 3  # those that could have said something


def test_each_look_has_a_level_of_its_own():
    monitor = MemorizationMonitor(false_alarms=0.02)
    first, second = level(0.02, 1), level(0.02, 2)
    for p, events in ((1.01 * first, False), (1.01 * second, False), (0.99 * level(0.02, 3), True)):
        monitor.values = {"nearer": 0.5, "copied": 0.0, "p": p}
        assert monitor.is_news(p) is events
    assert not monitor.is_news(0.02)  # it is not over
    assert not monitor.is_news(0.03)
    assert monitor.is_news(0.99 * level(0.02, 4))


@pytest.mark.parametrize(("every", "steps", "measured"), [(2, 5, [2, 4, 5]), (2, 4, [2, 4]), (10, 3, [3])])
def test_when_it_is_measured(every, steps, measured, tmp_path):
    x = normal(300)
    monitor = MemorizationMonitor(every=every, n_samples=50)
    logger = CSVLogger(tmp_path)
    watched(small(), monitor, x[:200], x[200:], max_steps=steps, logger=logger)
    logger.save()
    with open(logger.experiment.metrics_file_path) as file:
        steps_seen = [int(row["step"]) for row in csv.DictReader(file) if row["memorization/p"]]
    assert steps_seen == measured
    files = sorted(file.name for file in tmp_path.rglob("memorization/*.png"))
    assert files == [f"{steps:06d}.png"]


def test_samples_that_are_not_finite_are_not_accused():
    x = normal(300)
    module, monitor = small(), MemorizationMonitor(every=1, n_samples=50)

    class Breaks(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            for parameter in module.generator.parameters():
                parameter.data.fill_(math.nan)

    found = trainer(callbacks=[Breaks(), monitor], max_steps=1, limit_val_batches=0)
    found.fit(module, loader(x[:200]), loader(x[200:]))
    assert all(map(math.isnan, monitor.values.values()))
    assert (monitor.events, monitor.looks, monitor.drawn) == ([], 0, [])


# ---------- pairs


def brute(module, n, train, p):
    """The nearest pairs, of all of them."""
    fake = samples_of(module, n)
    distances, rows = torch.cdist(fake.double(), train.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    order = distances.argsort()[:p]
    return [(fake[i], train[rows[i]]) for i in order]


def check_pairs(drawn, expected):
    assert len(drawn) == len(expected) > 0
    for (fake, real), (sample, neighbour) in zip(drawn, expected, strict=True):
        assert torch.allclose(fake[0], sample, rtol=1e-5, atol=1e-6)
        assert torch.equal(real[0], neighbour)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("pairs", [1, 8])
def test_the_pairs_are_the_nearest(pairs, shuffle, tmp_path):
    x = normal(700, 5)
    torch.manual_seed(0)
    module, monitor = GANModule(MLP([4, 16, 5]), MLP([5, 8, 1]), 4), MemorizationMonitor(n_samples=120, pairs=pairs)
    run = trainer(callbacks=[monitor], max_steps=3, limit_val_batches=0)
    run.fit(module, loader(x[:500], 64, shuffle=shuffle), loader(x[500:]))
    check_pairs(monitor.drawn, brute(module, 120, x[:500], pairs))
    assert [file.name for file in tmp_path.rglob("memorization/*.png")] == ["000003.png"]


# the loaders that give all rows of Points: of those the nearest is known
WHOLE = ["in order", "shuffled", "shuffled by a generator", "many rows at once", "keys", "a list of rows"]
WHOLE += ["a batch sampler", "batches by hand", "batches as rows", "dicts", "objects", "a worker", "persistent workers"]


@pytest.mark.parametrize("kind", WHOLE)
def test_the_pairs_are_the_nearest_of_every_loader(kind):
    monitor = MemorizationMonitor(every=5, n_samples=50)
    module = run(LOADERS[kind](), monitor, val=loader(normal(60, seed=50)))
    check_pairs(monitor.drawn, brute(module, 50, Points().x, 8))


OTHERS = ["a set that draws, torch", "a set that draws, NumPy", "a stream", "a stream that draws"]


class Reads(Callback):
    """What there is to be read at the end."""

    def on_train_end(self, trainer, module):
        with isolate_rng():
            self.found = torch.cat([part.real for part in RealData(trainer, loader_to_read(trainer, "train"), None)])


@pytest.mark.parametrize("kind", OTHERS)
def test_of_data_that_are_others_now_the_nearest_are_drawn(kind):
    """A stream has moved on, a data set has drawn from its own generator."""
    monitor, reads = MemorizationMonitor(every=5, n_samples=50), Reads()
    module = run(LOADERS[kind](), monitor, reads, val=loader(normal(60, seed=50)))
    assert len(monitor.drawn) == 8
    fake, real = (torch.cat(samples) for samples in zip(*monitor.drawn, strict=True))
    assert torch.equal(real, reads.found[torch.cdist(fake, reads.found).argmin(1)])
    assert module.iteration > 6


class Augmented(Dataset):
    """Images that are turned at random when they are asked for, from torch's generator of all."""

    def __init__(self):
        self.x = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index].flip(2) if torch.rand(()) < 0.5 else self.x[index]


def test_augmented_images_are_drawn_as_they_were_seen(tmp_path):
    torch.manual_seed(0)
    module = GANModule(MLP([4, 64], output_shape=[1, 8, 8]), nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), 4)
    monitor, reads = MemorizationMonitor(nn.Flatten(), n_samples=50, pairs=3), Reads()
    held_out = torch.rand(30, 1, 8, 8) * 2 - 1
    found = trainer(callbacks=[monitor, reads], max_steps=2)
    found.fit(module, loader(Augmented(), 16, shuffle=True), loader(held_out, 10))
    for fake, real in monitor.drawn:
        assert torch.equal(real[0], reads.found[torch.cdist(fake.flatten(1), reads.found.flatten(1)).argmin()])
    assert len([*tmp_path.rglob("memorization/000002.png")]) == 1


def test_pictures_go_to_tensorboard(tmp_path):
    x = normal(300, 6)
    module = GANModule(MLP([4, 6]), MLP([6, 1]), latent_dim=4)
    logger = TensorBoardLogger(tmp_path)
    written = []
    logger.experiment.add_image = lambda key, image, step: written.append((key, tuple(image.shape), step))
    watched(module, MemorizationMonitor(n_samples=50, pairs=2, name="copies"), x[:200], x[200:], logger=logger)
    assert [(key, step) for key, _, step in written] == [("copies", 3)]
    assert not [*tmp_path.rglob("*.png")]


def test_trees_have_a_picture_for_each_tensor(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, z):
            point = self.layer(z)
            return {"point": point, "wave": point.repeat(1, 4)[:, None]}

    class Judge(nn.Linear):
        def forward(self, x):
            return super().forward(x["point"])

    class Features(nn.Module):
        def forward(self, x):
            return x["point"]

    x = normal(300)

    class Trees(GANModule):
        def unpack(self, batch):
            return batch, None

    data = [{"point": row, "wave": row.repeat(4)[None]} for row in x]
    module, monitor = Trees(Both(), Judge(2, 1), 4), MemorizationMonitor(Features(), n_samples=50, pairs=4)
    watched(module, monitor, data[:200], data[200:])
    names = sorted(file.name for file in tmp_path.rglob("memorization/*.png"))
    assert names == ["000003_point.png", "000003_wave.png"]
    for fake, real in monitor.drawn:
        assert torch.equal(real["point"][0], x[:200][torch.cdist(fake["point"], x[:200]).argmin()])


def test_no_pictures_on_wish(tmp_path):
    x = normal(300)
    monitor = MemorizationMonitor(n_samples=50, pairs=0)
    watched(small(), monitor, x[:200], x[200:])
    assert not [*tmp_path.rglob("*.png")]
    assert 0 < monitor.values["p"] <= 1


# ---------- conditions


class Sources(GANModule):
    """Makes targets from sources."""

    def unpack(self, batch):
        return batch[1], batch[0]

    def generate(self, network, n, condition, latents):
        return network(condition)


def test_a_good_translation_is_no_memorization():
    """It is near the targets of its training sources; of held-out sources it is not."""

    torch.manual_seed(0)
    exact = nn.Linear(3, 2)
    source = normal(500, 3)
    target = exact(source).detach()
    module = Sources(exact, nn.Linear(2, 1), g_optimizer=sgd(0.0))
    monitor = MemorizationMonitor(every=1, n_samples=400)
    train, val = (TensorDataset(source[rows], target[rows]) for rows in (slice(300), slice(300, 500)))
    watched(module, monitor, train, val)
    assert monitor.events == []
    assert monitor.values["nearer"] == pytest.approx(0.5, abs=0.01)
    assert monitor.values["copied"] == 0.0


class Labelled(nn.Module):
    """Copies training samples of a label, of which every third one has the same."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("rows", rows)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, z, label):
        number = (torch.special.ndtr(z[:, 0]) * (len(self.rows) // 3)).long()
        return self.rows[3 * number + label] + 0 * self.weight


@pytest.mark.filterwarnings(SAID)
def test_conditions_are_those_of_held_out_samples():
    x, labels = normal(300), torch.arange(300) % 3
    module, monitor = GANModule(Labelled(x[:200]), MLP([2, 8, 1]), 4), MemorizationMonitor(n_samples=200, pairs=150)
    held_out = TensorDataset(x[200:], torch.full((100,), 2))
    watched(module, monitor, TensorDataset(x[:200], labels[:200]), held_out)
    assert len(monitor.drawn) == 150  # of 100 conditions
    assert {tuple(real[0].tolist()) for _, real in monitor.drawn} <= {tuple(row.tolist()) for row in x[2:200:3]}
    assert len(monitor.events) == 1


# ---------- a bystander


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "one after another"])
def test_a_run_is_the_same_with_and_without_it(kind):
    many = 40 if kind == "an endless sampler" else "all"
    # samples that come more often are compared with such as come as often
    often = kind.startswith(("weighted", "with replacement", "an endless sampler"))
    held_out = loader(normal(60, seed=50), 10) if often else None
    monitor = MemorizationMonitor(every=3, n_samples=50, n_train=many, held_out=held_out)
    alone = run(LOADERS[kind](), val=loader(normal(60, seed=50), 10))
    seen = run(LOADERS[kind](), monitor, val=loader(normal(60, seed=50), 10))
    assert alone.iteration == seen.iteration > 6
    assert all(torch.equal(*pair) for pair in zip(alone.trained, seen.trained, strict=True))
    assert torch.equal(weights(alone), weights(seen))
    assert monitor.drawn


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind not in ("the shorter of two",)])
def test_held_out_data_of_every_kind(kind):
    train = lambda: loader(normal(60, seed=50), 8)  # noqa: E731
    monitor = MemorizationMonitor(every=3, n_samples=50)
    alone, seen = run(train(), val=LOADERS[kind]()), run(train(), monitor, val=LOADERS[kind]())
    assert torch.equal(weights(alone), weights(seen))
    assert monitor.measured_at > 0


def test_random_states_and_buffers_stay():
    states = []
    for callbacks in [], [MemorizationMonitor(every=1, n_samples=50)]:
        torch.manual_seed(0)
        module = GANModule(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Dropout(0.2)), MLP([2, 8, 1]), 4)
        x = normal(300)
        found = trainer(callbacks=callbacks, max_steps=3, max_epochs=-1, limit_val_batches=0)
        found.fit(module, loader(x[:200], shuffle=True), loader(x[200:]))
        buffers = torch.cat([buffer.flatten().float() for buffer in module.buffers()])
        states.append((weights(module), buffers, torch.get_rng_state(), module.noise.draw))
        assert module.training
    (*one, draw), (*other, after) = states
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert draw == after


# ---------- several, and data modules


@pytest.mark.filterwarnings(SAID)
def test_several_have_names_of_their_own():
    x = normal(300)
    monitors = MemorizationMonitor(n_samples=50), MemorizationMonitor(nn.Tanh(), n_samples=50, name="tanh")
    module = copier(x[:200], 0.5)
    found = trainer(callbacks=[*monitors], max_steps=2, limit_val_batches=0)
    found.fit(module, loader(x[:200]), loader(x[200:]))
    assert {key.partition("/")[0] for key in found.callback_metrics if key.endswith("/copied")} == {
        "memorization",
        "tanh",
    }
    found.save_checkpoint("two.ckpt")
    states = torch.load("two.ckpt", weights_only=True)["callbacks"]
    assert {"MemorizationMonitor", "MemorizationMonitor(tanh)"} <= states.keys()


def test_data_modules_of_the_package(tmp_path):
    torch.manual_seed(0)
    module = GANModule(MLP([4, 64], output_shape=[1, 8, 8]), nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), 4)
    monitor = MemorizationMonitor(nn.Flatten(), n_samples=300)
    trainer(callbacks=[monitor], max_steps=2).fit(module, Digits(batch_size=50, holdout=100))
    assert monitor.values["copied"] == 0.0
    assert monitor.values["nearer"] < 0.1  # noise
    assert len([*tmp_path.rglob("memorization/000002.png")]) == 1


# ---------- what is refused


def test_without_held_out_samples():
    sentence = r"compares with held-out samples, and the run has none: .*`holdout` > 0\) or `held_out`"
    for data in (DataLoader(points(3), batch_size=None), Digits(holdout=0)):
        module = small()
        with pytest.raises(MisconfigurationException, match=sentence), ignoring():
            trainer(callbacks=[MemorizationMonitor(nn.Flatten())], max_steps=1).fit(module, data)
        assert module.iteration == 0


def test_held_out_samples_of_ones_own():
    x = normal(300)
    found, own = MemorizationMonitor(n_samples=50), MemorizationMonitor(n_samples=50, held_out=loader(x[200:]))
    watched(small(), found, x[:200], x[200:])
    trainer(callbacks=[own], max_steps=3, max_epochs=-1).fit(small(), loader(x[:200]))
    assert found.values == own.values


@pytest.mark.parametrize("extractor", [None, MLP([2, 40])])
def test_training_samples_are_no_held_out_ones(extractor):
    """Whatever rounding there is in other batches."""
    x = normal(100)
    monitor = MemorizationMonitor(extractor)
    with pytest.raises(MisconfigurationException, match="100 of 100 held-out samples are training samples too"):
        trainer(callbacks=[monitor], max_steps=1).fit(small(), loader(x, 64, shuffle=True), loader(x, 7))


def test_a_few_training_samples_among_held_out_ones_are_told():
    x = normal(300)
    held_out = torch.cat([x[200:], x[:3]])
    with pytest.warns(UserWarning, match="3 of 103 held-out samples are training samples too, which hides copies"):
        watched(small(), MemorizationMonitor(n_samples=200), x[:200], held_out)


def test_too_few_held_out_samples_are_told_with_the_number_that_it_takes():
    x = normal(300)
    sentence = r"has 3 held-out samples, with which copies are found from a share of \d+% on at false_alarms=0\.01"
    with pytest.warns(UserWarning, match=sentence) as told:
        watched(small(), MemorizationMonitor(n_samples=200), x[:200], x[200:203])
    text = str(next(w.message for w in told if "held-out samples" in str(w.message)))
    needed = int(text.partition("give it ")[2].split()[0])
    assert needed > 3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*held-out samples")
        watched(small(), MemorizationMonitor(n_samples=200), x[:200], x[200 : 200 + needed])
    with pytest.warns(UserWarning, match=rf"has {needed - 1} held-out samples"):
        watched(small(), MemorizationMonitor(n_samples=200), x[:200], x[200 : 199 + needed])


def test_too_few_held_out_samples_for_anything():
    """Copies of all training samples come before two held-out ones too often by chance."""
    x = normal(300)
    for n in (1, 2):
        sentence = rf"has {n} held-out samples, with which nothing can be said at"
        with pytest.raises(MisconfigurationException, match=sentence):
            watched(small(), MemorizationMonitor(), x[:15], x[15 : 15 + n])


def test_of_sources_without_latents_there_are_as_many_samples():
    source = normal(400, 3)
    module = Sources(nn.Linear(3, 2), nn.Linear(2, 1))
    monitor = MemorizationMonitor(n_samples=1000, pairs=200)
    target = normal(400, seed=1)
    train, val = (TensorDataset(source[rows], target[rows]) for rows in (slice(250), slice(250, 400)))
    watched(module, monitor, train, val)
    assert len(monitor.drawn) == 150


def test_a_small_level_needs_other_numbers():
    x = normal(300)
    monitor = MemorizationMonitor(n_samples=50, false_alarms=1e-200)
    with pytest.raises(MisconfigurationException, match="raise `n_samples` or `false_alarms`"):
        watched(small(), monitor, x[:200], x[200:])


def test_samples_without_a_picture():
    x = torch.randn(100, 1, 1, 1, 1, 2)
    networks = (
        nn.Sequential(nn.Linear(4, 2), nn.Unflatten(1, (1, 1, 1, 1, 2))),
        nn.Sequential(nn.Flatten(), MLP([2, 1])),
    )
    sentence = "MemorizationMonitor has no picture of samples like .*give it pairs=0"
    with pytest.raises(MisconfigurationException, match=sentence):
        watched(GANModule(*networks, 4), MemorizationMonitor(nn.Flatten(), n_samples=50), x[:60], x[60:])
    watched(GANModule(*networks, 4), MemorizationMonitor(nn.Flatten(), n_samples=50, pairs=0), x[:60], x[60:])


def test_features_that_are_not_finite():
    x = normal(200)
    x[150] = math.nan
    with pytest.raises(ValueError, match="`held_out` "):
        watched(small(), MemorizationMonitor(n_samples=100), x[:100], x[100:])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"extractor": 3}, "`extractor` must be of type Module, got 3"),
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"n_samples": 10}, "`n_samples` must be an integer of at least 50, got 10"),
        ({"n_train": "some"}, "`n_train` must be an integer of at least 2, got 'some'"),
        ({"pairs": -1}, "`pairs` must be an integer that is not negative, got -1"),
        ({"false_alarms": 0}, r"`false_alarms` must be in \(0, 1\), got 0"),
        ({"held_out": 3}, "`held_out` must be an iterable of batches, such as a loader, got 3"),
        ({"name": ""}, "`name` must be a key of the log, got ''"),
    ],
)
def test_bad_values(arguments, text):
    with pytest.raises(ValueError, match=text):
        MemorizationMonitor(**arguments)


class Twice:
    """A sampler, or batch sampler, of somebody's own that goes through some rows twice."""

    def __init__(self, batch_size=None):
        self.batch_size = batch_size

    def __iter__(self):
        rows = [*range(60), *range(30)]
        return iter(rows if self.batch_size is None else [rows[i : i + 10] for i in range(0, 90, 10)])

    def __len__(self):
        return 90 if self.batch_size is None else 9


WEIGHTS = [1.0] * 30 + [9.0] * 30
X = normal(60)
REPEATING = {
    "weighted": lambda: DataLoader(X, 8, sampler=WeightedRandomSampler(WEIGHTS, 60)),
    "with replacement": lambda: DataLoader(X, 8, sampler=RandomSampler(X, replacement=True)),
    "more than there are": lambda: DataLoader(X, 8, sampler=RandomSampler(X, num_samples=150)),
    "batches": lambda: DataLoader(X, batch_sampler=BatchSampler(RandomSampler(X, replacement=True), 8, False)),
    "batches as rows": lambda: DataLoader(
        X, batch_size=None, sampler=BatchSampler(WeightedRandomSampler(WEIGHTS, 60), 8, False)
    ),
    "own": lambda: DataLoader(X, 8, sampler=Twice()),
    "own batches": lambda: DataLoader(X, batch_sampler=Twice(10)),
    "one of several": lambda: {"x": DataLoader(X, 8, sampler=Twice()), "y": DataLoader(X, 8)},
}


@pytest.mark.parametrize("kind", REPEATING)
def test_samplers_that_repeat_rows_are_refused_without_data_that_are_drawn_alike(kind):
    held_out = loader(normal(60, seed=50), 10)
    sentence = r"\d\d% of the rows that the training loader's sampler gives in an epoch have come before in it"
    with pytest.raises(MisconfigurationException, match=sentence):
        run(REPEATING[kind](), MemorizationMonitor(every=3, n_samples=50), val=held_out)
    monitor = MemorizationMonitor(every=3, n_samples=50, held_out=held_out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memorization at step")
        run(REPEATING[kind](), monitor, val=held_out)
    assert monitor.measured_at > 0


@pytest.mark.filterwarnings(SAID)
def test_weights_that_give_each_row_once_are_not_refused():
    sampler = WeightedRandomSampler(WEIGHTS, 60, replacement=False)
    monitor = MemorizationMonitor(every=3, n_samples=50)
    run(DataLoader(X, 8, sampler=sampler), monitor, val=loader(normal(60, seed=50), 10))
    assert monitor.measured_at > 0


def test_data_of_few_values_are_refused_with_the_reason():
    few = lambda seed: normal(300, seed=seed).mul(2).round()  # noqa: E731
    with pytest.raises(MisconfigurationException, match="take few values"):
        run(loader(few(1), 8), MemorizationMonitor(every=3, n_samples=50), val=loader(few(2), 10))
