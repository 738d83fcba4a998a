"""Pictures of samples: where they go, what is in them, that they stay, and that training does not notice."""

import random
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib import pyplot
from PIL import Image
from torch import nn
from toys import fit, points, sgd, small, tensors, weights

from lightning_gan_stability import (
    MLP,
    DCGANDiscriminator,
    DCGANGenerator,
    GANModule,
    PairedTranslation,
    SampleLogger,
    SuperResolution,
    TableSynthesis,
    Tokenizer,
    UnpairedTranslation,
)
from lightning_gan_stability.cli import build
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.monitors.pictures import kind_of, picture, table_picture


def pictures(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def constant(*values, shape=(1, 4, 4)):
    """One sample of each value."""
    return torch.stack([torch.full(shape, float(v)) for v in values])


class Judge(nn.Module):
    """A discriminator of samples of any shape."""

    def __init__(self, *shape):
        super().__init__()
        self.mlp = MLP([int(np.prod(shape)), 8, 1])

    def forward(self, x):
        return self.mlp(x.flatten(1))


def gan(*shape, **kwargs):
    """Of samples of any shape."""
    torch.manual_seed(0)
    return GANModule(MLP([4, 8, int(np.prod(shape))], output_shape=list(shape)), Judge(*shape), latent_dim=4, **kwargs)


def test_pictures_beside_a_csv_log(tmp_path):
    fit(small(), points(7), callbacks=[SampleLogger(every=3, n=10)], logger=CSVLogger(tmp_path, name="", version="a"))
    assert pictures(tmp_path) == ["a/samples/000003.png", "a/samples/000006.png"]


def test_pictures_without_a_logger(tmp_path):
    fit(small(), points(2), callbacks=[SampleLogger(every=2, n=10)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000002.png"]


def test_tensorboard_gets_the_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(small(), points(2), callbacks=[SampleLogger(every=2, n=10)], logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (2, 480, 480)
    assert not pictures(tmp_path)


class Run:
    """As much of a W&B run as a logger needs."""

    def __init__(self):
        self.rows, self.config = [], self

    def log(self, row):
        self.rows.append(row)

    def update(self, *args, **kwargs):
        pass

    def define_metric(self, *args, **kwargs):
        pass


def test_wandb_gets_the_picture(tmp_path):
    run = Run()
    logger = WandbLogger(experiment=run, save_dir=tmp_path)
    fit(small(), points(2), callbacks=[SampleLogger(every=2, n=10)], logger=logger)
    (row,) = [row for row in run.rows if "samples" in row]
    assert row["trainer/global_step"] == 2
    assert row["samples"][0].image.size == (480, 480)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_a_real_offline_run_writes_the_picture(tmp_path):
    import wandb

    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    fit(small(), points(2), callbacks=[SampleLogger(every=2, n=10)], logger=logger, log_every_n_steps=1)
    wandb.finish()
    (png,) = tmp_path.rglob("media/images/samples*.png")
    with Image.open(png) as image:
        assert image.size == (480, 480)
    assert list(tmp_path.rglob("run-*.wandb"))


def test_a_grid_holds_each_image_at_its_place():
    samples = torch.stack([torch.full((1, 4, 4), v) for v in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    image = np.asarray(picture(samples, samples))
    assert image.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    for i, value in enumerate((0, 64, 128, 191, 255)):
        row, column = divmod(i, 3)
        tile = image[2 + 6 * row : 6 + 6 * row, 2 + 6 * column : 6 + 6 * column]
        assert np.abs(tile.astype(int) - value).max() <= 1
    assert picture(torch.zeros(4, 3, 4, 4), samples).mode == "RGB"
    assert picture(torch.zeros(1, 4, 4, 4), samples).size == (4, 4)


def test_a_scatter_plot_has_points_where_they_are():
    real = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    fake = torch.tensor([[-1.0, 0.0], [0.0, -9.0]])
    image = np.asarray(picture(fake, real)).astype(int)
    # the axes reach to ±1.5; y goes up
    centre, one = 239.5, 239.5 / 1.5
    red = (image[..., 0] > 150) & (image[..., 1] < 90)
    grey = (image == 160).all(-1)
    rows, columns = np.nonzero(red)
    assert {(round(r / 20), round(c / 20)) for r, c in zip(rows, columns, strict=True)} <= {
        (round(centre / 20), round((centre - one) / 20)),
        (24, 12),
    }
    rows, columns = np.nonzero(grey)
    assert abs(columns.max() - (centre + one)) < 4
    assert abs(rows.min() - (centre - one)) < 4


def test_training_does_not_notice(tmp_path):
    def make():
        torch.manual_seed(0)
        return GANModule(DCGANGenerator(8, 1, 8, 4), DCGANDiscriminator(1, 8, 4), latent_dim=8)

    batches = [torch.rand(4, 1, 8, 8) * 2 - 1 for _ in range(4)]
    a, b = make(), make()
    fit(a, batches)
    fit(b, batches, callbacks=[SampleLogger(every=1, n=4)], default_root_dir=tmp_path)
    assert all(
        torch.equal(x, y)
        for x, y in zip(tensors(a.state_dict()).values(), tensors(b.state_dict()).values(), strict=True)
    )
    assert len(pictures(tmp_path)) == 4


def test_a_conditional_generator_gets_labels(tmp_path):
    module = GANModule(DCGANGenerator(8, 1, 8, 4, num_classes=3), DCGANDiscriminator(1, 8, 4), latent_dim=8)
    batches = [(torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0]))]
    fit(module, batches, callbacks=[SampleLogger(every=1, n=9)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000001.png"]


# ---------- what is in pictures of each kind


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((3, 8, 8), "image"),
        ((2,), "point"),
        ((1,), "number"),
        ((), "number"),
        ((3,), "vector"),
        ((784,), "vector"),
        ((1, 1024), "audio"),
        ((2, 1024), "audio"),
        ((1, 1023), "series"),
        ((3, 2000), "series"),
        ((50, 16), "series"),
        ((17, 17), "map"),
        ((1, 4, 4, 4), "volume"),
        ((1, 4, 4, 4, 4), None),
        ((0, 4), None),
    ],
)
def test_the_kind_is_that_of_the_shape(shape, kind):
    assert kind_of(torch.zeros(5, *shape)) == kind


def test_short_sound_is_sound_where_that_is_said():
    assert kind_of(torch.zeros(5, 1, 100), sound=True) == "audio"
    assert kind_of(torch.zeros(5, 3, 100), sound=True) == "series"


def test_sources_generated_samples_and_targets_stand_in_columns():
    source, fake, target = constant(-1, 0), constant(0.5, 1), constant(1, -0.5)
    image = np.asarray(picture(fake, target, [source], paired=True))[14:, :, 0].astype(int)  # below the caption
    # panels of 4 pixels, 2 between them; two rows of three columns
    found = [[image[2 + 6 * r : 6 + 6 * r, 2 + 6 * c : 6 + 6 * c] for c in range(3)] for r in range(2)]
    for tiles, values in zip(found, [(0, 191, 255), (128, 255, 64)], strict=True):
        for tile, value in zip(tiles, values, strict=True):
            assert tile.shape == (4, 4)
            assert np.abs(tile - value).max() <= 1


def test_small_sources_are_enlarged():
    low = torch.tensor([[[[-1.0, 1.0], [1.0, -1.0]]]])
    image = np.asarray(picture(constant(0), constant(0), [low], paired=True))[16:20, 2:6, 0]
    assert np.array_equal(image, np.kron([[0, 255], [255, 0]], np.ones((2, 2))))


def test_a_curve_goes_where_the_values_are():
    """Without words or colours: the rows of a coloured pixel in each column, against the line's equation."""
    ramp = torch.linspace(-2, 2, 50)[None, None]
    image = np.asarray(picture(ramp, torch.tensor([[[-2.0, 2.0]]]))).astype(int)[16:96, 2:122]
    red = (image[..., 0] > 150) & (image[..., 1] < 90)
    for x in range(5, 115):
        (rows,) = np.nonzero(red[1:-1, x])
        assert abs(rows.mean() + 1 - (78 - 77 * (x - 1) / 117)) <= 2


@pytest.mark.parametrize("shape", [(3, 40), (40, 3)])
def test_each_channel_of_a_series_is_a_curve(shape):
    levels = torch.tensor([0.2, 0.5, 0.8])
    series = (levels[:, None] if shape[0] == 3 else levels[None, :]).expand(shape)[None]
    image = np.asarray(picture(series, torch.tensor([0.0, 1.0]).expand(1, 1, 2)))[16:96, 62]
    coloured = [y for y in range(1, 79) if image[y].min() < 200]
    assert np.allclose(coloured, [1 + (1 - v) * 77 for v in (0.8, 0.5, 0.2)], atol=1)


@pytest.mark.parametrize("frequency", [1000, 3000])
def test_a_spectrogram_is_bright_at_the_frequency_of_a_tone(frequency):
    t = torch.arange(8192) / 16000
    tone = 0.5 * torch.sin(2 * torch.pi * frequency * t)[None, None]
    image = np.asarray(picture(tone, tone))[16 + 41 : 16 + 105, 2:162, 0].astype(int)  # 64 rows from 8 kHz to 0
    assert abs(image[:, 20:140].sum(1).argmax() - 64 * (1 - frequency / 8000)) <= 1


def test_a_waveform_has_its_envelope():
    sound = torch.cat([torch.zeros(4000), torch.sin(torch.arange(4000.0))])[None, None]
    image = np.asarray(picture(sound, sound)).astype(int)[16:56, 2:162]
    red = (image[..., 0] > 150) & (image[..., 1] < 90)
    heights = red[1:-1].sum(0)
    assert (heights[5:75] <= 2).all()
    assert (heights[85:155] >= 34).all()


def test_volumes_are_cut_in_the_middle():
    volume = torch.rand(1, 1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    low, high = volume.min(), volume.max()
    found = np.asarray(picture(volume))[16:, 2:, 0]
    x = 0
    for cut in (volume[0, 0, 1], volume[0, 0, :, 2], volume[0, 0, :, :, 3]):
        expected = ((cut - low) / (high - low) * 255).round().numpy()
        height, width = expected.shape
        assert np.abs(found[:height, x : x + width].astype(int) - expected).max() <= 1
        x += width + 1


def test_maps_are_grey_from_the_least_real_value_to_the_greatest():
    real = torch.linspace(0, 10, 20 * 18).view(1, 20, 18)
    found = np.asarray(picture(real, real))[16:36, 2:20, 0].astype(int)
    assert np.abs(found - (real[0] * 25.5).round().numpy()).max() <= 1
    beyond = np.asarray(picture(real + 100, real))[16:36, 2:20, 0]
    assert (beyond == 255).all()


def bars(image, colour, n, width, start):
    """Heights of the n bars of one colour, above the base line."""
    step = (width - 4) / n
    mask = (image == colour).all(-1)
    return [mask[:, 2 + int(2 + (i + start) * step)].sum() for i in range(n)]


def test_histograms_have_the_heights_of_numpy():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(3000, 1, generator=generator), torch.randn(2000, 1, generator=generator) * 0.5 + 2
    image = np.asarray(picture(fake, real))
    edges = np.linspace(real.min().item(), real.max().item(), 25)
    most = 1.25 * np.histogram(real.numpy(), edges)[0].max() / len(real)
    for data, colour, start in ((real, (160, 160, 160), 0.2), (fake, (200, 30, 40), 0.7)):
        shares = np.histogram(np.clip(data.numpy(), edges[0], edges[-1]), edges)[0] / len(data)
        expected = np.minimum(shares / most, 1) * 288
        assert np.allclose(bars(image, colour, 24, 480, start), expected, atol=1)


def test_categories_have_their_shares_most_frequent_first():
    real = {"kind": np.array(["a"] * 2 + ["Łódź"] * 8)}
    image = np.asarray(table_picture({"kind": np.array(["a"] * 5 + ["b"] * 5)}, real, ["kind"]))
    high = 98 / 1.25 / 0.8  # pixels of the share 1
    assert np.allclose(bars(image, (160, 160, 160), 3, 222, 0.2), [0.8 * high, 0.2 * high, 0], atol=1)
    assert np.allclose(bars(image, (200, 30, 40), 3, 222, 0.7), [0, 0.5 * high, 0.5 * high], atol=1)  # others last


def test_many_categories_are_the_most_frequent_and_the_others():
    values = np.repeat([f"c{i}" for i in range(20)], range(40, 20, -1))
    image = np.asarray(table_picture({"kind": values}, {"kind": values}, ["kind"]))
    counts = [*range(40, 28, -1), sum(range(21, 29))]
    expected = np.array(counts) / max(counts) / 1.25 * 98
    assert np.allclose(bars(image, (160, 160, 160), 13, 222, 0.2), expected, atol=1)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2,), (1,), (5,), (3, 9), (1, 2000), (20, 20), (1, 4, 4, 4)])
def test_values_that_are_not_finite_or_all_equal_are_drawn(shape):
    for value in (float("nan"), float("inf"), 0.0):
        assert picture(torch.full((3, *shape), value), torch.zeros(3, *shape)).size
        assert picture(torch.full((3, *shape), value)).size


# ---------- what pictures are of


def conditional(real_batches, tmp_path, **kwargs):
    """The samples and conditions that a run's pictures are of, by a function that keeps them."""
    seen = []

    def draw(fake, real, condition):
        seen.append((fake, real, condition))
        return Image.new("L", (2, 2))

    module = GANModule(Labelled(), MLP([2, 8, 1]), latent_dim=4)
    logger = SampleLogger(draw=draw, **kwargs)
    fit(module, real_batches, callbacks=[logger], default_root_dir=tmp_path)
    return seen, logger


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = MLP([5, 8, 2])

    def forward(self, latents, labels):
        return self.mlp(torch.cat([latents, labels[:, None].float()], 1))


def labelled(n, batch_size=4):
    return [(x, torch.arange(batch_size) + batch_size * i) for i, x in enumerate(points(n, batch_size))]


def test_rows_are_those_of_the_first_batches(tmp_path):
    batches = labelled(8)
    seen, _ = conditional(batches, tmp_path, every=4, n=10)
    assert len(seen) == 3  # tried before the first batch, then at 4 and 8
    for _, real, condition in seen[1:]:
        assert torch.equal(real, torch.cat([x for x, _ in batches])[:10])
        assert torch.equal(condition, torch.arange(10))


def test_rows_stay_those_of_the_first_picture(tmp_path):
    seen, logger = conditional(labelled(8), tmp_path, every=2, n=64)
    assert [len(condition) for *_, condition in seen] == [4, 8, 8, 8, 8]
    assert len(logger.condition_rows[0]) == 8


def test_rows_are_kept_without_the_batch_that_they_are_of(tmp_path):
    _, logger = conditional(labelled(1), tmp_path, every=1, n=3)
    assert logger.condition_rows[0].untyped_storage().nbytes() == 3 * 8


def test_conditions_are_those_that_the_module_draws(tmp_path):
    class Own(GANModule):
        def draw_condition(self, n, condition):
            return condition + 7

    def draw(fake, real, condition):
        assert condition.tolist() == [7, 8, 9, 10]
        return Image.new("L", (2, 2))

    module = Own(Labelled(), MLP([2, 8, 1]), latent_dim=4)
    fit(module, labelled(1), callbacks=[SampleLogger(every=1, draw=draw)], default_root_dir=tmp_path)
    assert len(pictures(tmp_path)) == 1


def test_rows_end_where_samples_have_another_size(tmp_path):
    shown = []

    class Lengths(GANModule):
        def unpack(self, batch):
            return batch, batch

        def discriminate(self, network, sample, condition):
            return network(sample.mean(2))

    def draw(fake, real, condition):
        shown.append(tuple(real.shape))
        return Image.new("L", (2, 2))

    module = Lengths(nn.Conv1d(3, 3, 1), MLP([3, 4, 1]))
    batches = [torch.randn(4, 3, t) for t in (9, 9, 7, 9)]
    fit(module, batches, callbacks=[SampleLogger(every=4, n=64, draw=draw)], default_root_dir=tmp_path)
    assert shown == [(4, 3, 9), (8, 3, 9)]


class Noisy(nn.Module):
    """Draws in eval mode too, and takes labels."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, latents, labels):
        x = torch.cat([latents, labels[:, None].float()], 1)
        x = nn.functional.dropout(self.mlp(x + torch.randn_like(x)), 0.3, training=True)
        return x.tanh().view(-1, 1, 4, 4)


class Drawing(GANModule):
    """A GAN with noise at each place: networks, the module's own, and what is read of a batch."""

    def unpack(self, batch):
        real, labels = batch
        return real + 0.1 * torch.rand_like(real), (labels + torch.randint(0, 3, labels.shape)) % 10

    def generate(self, network, n, condition, latents):
        return network(latents, condition) + 0.1 * self.noise.randn(n, 1, 4, 4)

    def draw_condition(self, n, condition):
        return (self.noise.rand(n) * 10).long()


def drawing(seed=0, lr=0.05):
    torch.manual_seed(seed)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 1))
    return Drawing(Noisy(), judge, latent_dim=4, g_optimizer=sgd(lr), d_optimizer=sgd(0.05))


def images(n, batch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(batch_size, 1, 4, 4, generator=generator) * 2 - 1, torch.arange(batch_size)) for _ in range(n)]


def frozen(module):
    module.generator.requires_grad_(True)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 0.0
    return module


def test_a_frozen_generator_gives_the_same_picture_each_time(tmp_path):
    fit(frozen(drawing(lr=0.0)), images(4), callbacks=[SampleLogger(every=1, n=9)], default_root_dir=tmp_path)
    first, *others = [pixels(tmp_path / name) for name in pictures(tmp_path)]
    assert len(others) == 3
    assert first.std() > 20
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_run_shows_the_same_rows(tmp_path):
    """Whatever data it goes on with; and its first pictures are those of the run that went on."""
    batches, options = images(4), {"callbacks": [SampleLogger(every=2, n=6)], "default_root_dir": tmp_path / "whole"}
    fit(frozen(drawing(lr=0.0)), batches, **options)
    options = {"default_root_dir": tmp_path / "first", "max_steps": 2, "max_epochs": -1}
    run = fit(frozen(drawing(lr=0.0)), batches, callbacks=[SampleLogger(every=2, n=6)], **options)
    run.save_checkpoint(tmp_path / "at.ckpt")
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["callbacks"]["SampleLogger(samples)"]
    assert [len(rows) for rows in state["condition_rows"]] == [6]
    assert state["real_rows"] == []  # of images without sources
    options = {"default_root_dir": tmp_path / "again", "max_steps": 4, "max_epochs": -1}
    options |= {"callbacks": [SampleLogger(every=2, n=6)]}
    fit(frozen(drawing(1, lr=0.0)), images(4, seed=1), tmp_path / "at.ckpt", **options)
    assert np.array_equal(pixels(tmp_path / "again/samples/000004.png"), pixels(tmp_path / "whole/samples/000004.png"))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_real_samples_that_a_checkpoint_lacks_are_chosen_when_it_goes_on(tmp_path):
    shown = []

    def draw(fake, real, condition):
        shown.append(real)
        return Image.new("L", (2, 2))

    def train(steps, path=None, **kwargs):
        batches = [batch for batch, _ in images(4)]
        options = {"callbacks": [SampleLogger(every=2, n=4, **kwargs)], "default_root_dir": tmp_path}
        return batches, fit(gan(1, 4, 4), batches, path, max_steps=steps, max_epochs=-1, **options)

    train(2)[1].save_checkpoint(tmp_path / "at.ckpt")
    batches, _ = train(4, tmp_path / "at.ckpt", draw=draw)
    assert len(shown) == 2
    assert torch.equal(shown[0], shown[1])
    assert any(torch.equal(shown[0], batch) for batch in batches)


class Sources(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_named_tuples_come_back_from_checkpoints(tmp_path):
    seen = []

    class Named(GANModule):
        def unpack(self, batch):
            return {"x": batch}, Sources(batch, torch.arange(len(batch)))

        def generate(self, network, n, condition, latents):
            assert isinstance(condition, Sources)
            return {"x": network(condition.image)}

        def discriminate(self, network, sample, condition):
            return network(sample["x"])

    def draw(fake, real, condition):
        seen.append((real["x"], condition))
        return Image.new("L", (2, 2))

    def train(seed, steps, path=None):
        options = {"callbacks": [SampleLogger(every=2, n=6, draw=draw)], "default_root_dir": tmp_path}
        return fit(Named(MLP([2, 2]), MLP([2, 1])), points(4, 4, seed), path, max_steps=steps, max_epochs=-1, **options)

    train(0, 2).save_checkpoint(tmp_path / "at.ckpt")
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["callbacks"]["SampleLogger(samples)"]
    x, image, _ = (*state["real_rows"], *state["condition_rows"])
    assert x.data_ptr() == image.data_ptr()  # what is both is there once
    train(1, 4, tmp_path / "at.ckpt")
    for real, condition in seen[1:]:
        assert torch.equal(real, torch.cat(points(2, 4))[:6])
        assert torch.equal(condition.image, real)
        assert condition.label.tolist() == [0, 1, 2, 3, 0, 1]


def test_another_fit_with_a_module_of_another_kind_chooses_anew(tmp_path):
    logger = SampleLogger(every=2, n=6)
    fit(drawing(), images(2), callbacks=[logger], default_root_dir=tmp_path / "a")
    fit(small(), points(2), callbacks=[logger], default_root_dir=tmp_path / "b")
    assert logger.condition_rows == []
    assert torch.equal(logger.real_rows[0], points(2)[0][:6])


def test_nothing_is_computed_on_steps_that_are_not_due(tmp_path):
    passes, unpacked = [], []

    class Counting(GANModule):
        def unpack(self, batch):
            unpacked.append(self.iteration)
            return super().unpack(batch)

        def generate(self, network, n, condition, latents):
            if not self.training:
                passes.append((self.iteration, n))
            return super().generate(network, n, condition, latents)

    def counted(callbacks):
        unpacked.clear()
        module = Counting(Labelled(), MLP([2, 8, 1]), latent_dim=4)
        fit(module, labelled(9), callbacks=callbacks, default_root_dir=tmp_path)
        return list(unpacked)

    without = counted([])
    with_pictures = counted([SampleLogger(every=4, n=8)])
    assert passes == [(0, 4), (4, 8), (8, 8)]
    assert len(with_pictures) == len(without) + 2  # the two batches that rows are from


# ---------- that training does not notice


def trained(callbacks, folder):
    random.seed(0)
    np.random.seed(0)
    module = drawing()
    torch.manual_seed(1)
    fit(module, images(5), callbacks=callbacks, default_root_dir=folder)
    return tensors(module.state_dict()), (torch.get_rng_state(), np.random.rand(3), random.random())


def scattered(fake, real, condition):
    """A user's function that draws."""
    figure, axes = pyplot.subplots()
    axes.plot(np.random.rand(3), [random.random(), torch.rand(1).item(), 0])
    return figure


@pytest.mark.parametrize("draw", [None, scattered])
def test_networks_batches_and_functions_that_draw_go_on_as_without(draw, tmp_path):
    state, randomness = trained([], tmp_path)
    other, drawn = trained([SampleLogger(every=2, n=6, draw=draw)], tmp_path)
    assert len(pictures(tmp_path)) == 2
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert torch.equal(randomness[0], drawn[0])
    assert np.array_equal(randomness[1], drawn[1])
    assert randomness[2] == drawn[2]
    assert not pyplot.get_fignums()


# ---------- kinds of GANs


def test_labels_are_in_order(tmp_path):
    class Shade(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, latents, labels):
            return (self.scale * (labels.float() / 2 - 1))[:, None, None, None].expand(-1, 1, 4, 4)

    module = GANModule(Shade(), Judge(1, 4, 4), latent_dim=2, g_optimizer=sgd(0.0))
    batches = [(torch.zeros(9, 1, 4, 4), torch.tensor([3, 0, 2, 4, 1, 0, 3, 1, 2]))]
    fit(module, batches, callbacks=[SampleLogger(every=1, n=9)], default_root_dir=tmp_path)
    image = pixels(tmp_path / "samples/000001.png")[..., 0].astype(int)
    found = [image[4 + 6 * (i // 3), 4 + 6 * (i % 3)] for i in range(9)]
    assert np.allclose(found, [0, 0, 64, 64, 128, 128, 191, 191, 255], atol=1)


class Negative(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(-torch.ones(()))

    def forward(self, x):
        return self.scale * x


def tiles(folder, columns, rows, name="000001"):
    """The value of each panel of 4 by 4 pixels in a picture with a caption."""
    image = pixels(folder / f"samples/{name}.png")[14:, :, 0].astype(int)
    return [[image[4 + 6 * r, 4 + 6 * c] for c in range(columns)] for r in range(rows)]


@pytest.mark.filterwarnings("ignore:.*FakePool.*")
def test_translations_show_source_generated_and_target(tmp_path):
    source, target = constant(-1, 0.5), constant(1, 0)
    module = PairedTranslation(Negative(), nn.Conv2d(2, 1, 4), g_optimizer=sgd(0.0))
    fit(module, [(source, target)], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    assert np.allclose(tiles(tmp_path, 3, 2), [[0, 255, 255], [191, 64, 128]], atol=1)


def test_both_directions_of_a_translation_have_a_picture(tmp_path):
    batch = {"a": constant(-1, -0.5), "b": constant(1, 0.5)}
    networks = [nn.ModuleDict({d: make() for d in "ab"}) for make in (Negative, lambda: nn.Conv2d(1, 1, 4))]
    module = UnpairedTranslation(*networks, g_optimizer=sgd(0.0))
    fit(module, [batch], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000001_a.png", "samples/000001_b.png"]
    # the source is of the other domain, the real image of this one
    assert np.allclose(tiles(tmp_path, 3, 2, "000001_a"), [[255, 0, 0], [191, 64, 64]], atol=1)
    assert np.allclose(tiles(tmp_path, 3, 2, "000001_b"), [[0, 255, 255], [64, 191, 191]], atol=1)


def test_reconstructions_show_generated_and_target(tmp_path):
    module = Tokenizer(Negative(), nn.Conv2d(1, 1, 4), losses={}, g_optimizer=sgd(0.0))
    fit(module, [constant(-1, 0.5, 0)], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    image = pixels(tmp_path / "samples/000001.png")[14:, :, 0].astype(int)
    assert np.allclose([image[4, 4], image[4, 10]], [255, 0], atol=1)


def test_super_resolution_is_drawn(tmp_path):
    module = SuperResolution(
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 1, 4), scale=2
    )
    fit(module, [torch.rand(4, 3, 8, 8)], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    assert pixels(tmp_path / "samples/000001.png").shape[2] == 3


def test_tables_show_their_marginals(tmp_path):
    columns = [{"name": "age", "means": [40.0], "stds": [9.0]}, {"name": "smokes", "categories": ["no", "yes"]}]
    module = TableSynthesis(nn.Linear, nn.Linear, columns, latent_dim=4, pac=2)
    encoder = module.encoder
    batch = (
        encoder.encode({"age": [30.0, 41.0] * 4, "smokes": ["no", "yes"] * 4}),
        encoder.condition(8, {"smokes": "no"}),
    )
    fit(module, [batch], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    assert pixels(tmp_path / "samples/000001.png").shape == (148, 450, 3)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 40), (40, 3), (1, 2000), (20, 20), (1, 6, 6, 6)])
def test_samples_of_each_kind_are_drawn(shape, tmp_path):
    fit(gan(*shape), [torch.randn(5, *shape)] * 2, callbacks=[SampleLogger(every=2, n=6)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000002.png"]


def test_trees_have_a_picture_for_each_tensor(tmp_path):
    class Two(GANModule):
        def unpack(self, batch):
            return {"image": batch, "parts": [batch[:, 0, 0, :2], batch[:, 0]]}, None

        def generate(self, network, n, condition, latents):
            x = network(latents).view(n, 1, 4, 4)
            return {"image": x, "parts": [x[:, 0, 0, :2], x[:, 0]]}

        def discriminate(self, network, sample, condition):
            return network(sample["image"])

    module = Two(MLP([4, 16]), Judge(1, 4, 4), latent_dim=4)
    fit(module, [torch.rand(4, 1, 4, 4)], callbacks=[SampleLogger(every=1, n=4)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == [f"samples/000001_{name}.png" for name in ("image", "parts.0", "parts.1")]


# ---------- sound


def sounds(batches, tmp_path, module=None, **kwargs):
    module = Tokenizer(Negative(), Judge(1, 2000), losses={}, g_optimizer=sgd(0.0)) if module is None else module
    fit(module, batches, callbacks=[SampleLogger(every=1, n=5, sample_rate=8000)], default_root_dir=tmp_path, **kwargs)


def test_sounds_are_in_files(tmp_path):
    real = torch.rand(5, 1, 2000) * 2.2 - 1.1
    sounds([real], tmp_path)
    files = {p.name: p for p in (tmp_path / "samples").glob("*.wav")}
    assert sorted(files) == sorted(f"000001_{i}_{who}.wav" for i in range(4) for who in ("generated", "target"))
    for i in range(4):
        for who, expected in (("generated", -real[i, 0]), ("target", real[i, 0])):
            found, rate = soundfile.read(files[f"000001_{i}_{who}.wav"])
            assert rate == 8000
            assert np.allclose(found, expected.clamp(-1, 1), atol=1e-4)


def test_stereo_has_both_channels(tmp_path):
    real = torch.stack([torch.linspace(-1, 1, 2000), torch.zeros(2000)])[None]
    sounds([real], tmp_path, Tokenizer(Negative(), Judge(2, 2000), losses={}, g_optimizer=sgd(0.0)))
    with wave.open(str(tmp_path / "samples/000001_0_target.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getnframes()) == (2, 2, 2000)
    found, _ = soundfile.read(tmp_path / "samples/000001_0_target.wav")
    assert np.allclose(found.T, real[0], atol=1e-4)


def test_without_a_sample_rate_there_are_pictures_alone(tmp_path):
    fit(gan(1, 2000), [torch.rand(5, 1, 2000)], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["000001.png"]


def test_the_sample_rate_may_be_that_of_the_module(tmp_path):
    module = gan(1, 2000)
    module.sample_rate = 11025
    fit(module, [torch.rand(5, 1, 2000)], callbacks=[SampleLogger(every=1)], default_root_dir=tmp_path)
    assert soundfile.info(tmp_path / "samples/000001_0_real.wav").samplerate == 11025


def test_tensorboard_gets_the_sound(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    sounds([torch.rand(5, 1, 2000)], tmp_path, logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (sound,) = events.Audio("samples/sound/0_generated")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (1, 8000, 2000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_a_real_offline_run_writes_the_sound(tmp_path):
    import wandb

    real = torch.rand(5, 1, 2000) * 2 - 1
    sounds([real], tmp_path, logger=WandbLogger(offline=True, save_dir=tmp_path, project="test"))
    wandb.finish()
    found = [soundfile.read(path)[0] for path in tmp_path.rglob("media/audio/samples/sound*.wav")]
    assert len(found) == 8
    for expected in (*-real[:4, 0], *real[:4, 0]):
        assert any(np.allclose(sound, expected, atol=1e-4) for sound in found)


def test_wandb_gets_the_sound(tmp_path):
    run = Run()
    sounds([torch.rand(5, 1, 2000)], tmp_path, logger=WandbLogger(experiment=run, save_dir=tmp_path))
    (found,) = [row["samples/sound"] for row in run.rows if "samples/sound" in row]
    assert len(found) == 8


# ---------- a function of the user's


def figure(fake, real, condition):
    """As in a user's own file."""
    made, axes = pyplot.subplots(figsize=(2, 1), dpi=100)
    axes.scatter(*fake.T)
    return {"scatter": made, "blank": Image.new("RGBA", (3, 2))}


def test_a_function_draws(tmp_path):
    fit(small(), points(2), callbacks=[SampleLogger(every=2, n=6, draw=figure)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000002_blank.png", "samples/000002_scatter.png"]
    assert pixels(tmp_path / "samples/000002_scatter.png").shape == (100, 200, 3)
    assert pixels(tmp_path / "samples/000002_blank.png").shape == (2, 3, 3)


NETWORKS = {"generator": [4, 8, 2], "discriminator": [2, 8, 1]}


class Square:
    """A function with arguments, as a class."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, fake, real, condition):
        return Image.new("L", (self.size, self.size))


@pytest.mark.parametrize("draw", [f"{__name__}.figure", {"class_path": f"{__name__}.Square", "init_args": {"size": 3}}])
def test_the_function_is_named_in_yaml(draw, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["test"])
    logger = {"class_path": "SampleLogger", "init_args": {"every": 2, "n": 6, "draw": draw}}
    networks = {name: {"class_path": "MLP", "init_args": {"sizes": sizes}} for name, sizes in NETWORKS.items()}
    config = {
        "model": {"class_path": "GANModule", "init_args": {**networks, "latent_dim": 4}},
        "data": {"class_path": "Ring", "init_args": {"batch_size": 8}},
        "trainer": {"max_steps": 2, "callbacks": [logger], "logger": False, "enable_checkpointing": False},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    cli = build(["--config", "run.yaml"])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert len(pictures(Path())) == (1 if isinstance(draw, dict) else 2)


def test_several_have_names(tmp_path):
    loggers = [SampleLogger(every=2, n=6), SampleLogger(every=2, n=6, draw=Square(3), name="squares")]
    fit(small(), points(2), callbacks=loggers, default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000002.png", "squares/000002.png"]


# ---------- what is refused


class Scene(GANModule):
    """Samples that no picture is known for."""

    def unpack(self, batch):
        return {"a": batch, "b": batch[:, :, None, None, None, None]}, None

    def generate(self, network, n, condition, latents):
        x = network(latents)
        return {"a": x, "b": x[:, :, None, None, None, None]}

    def discriminate(self, network, sample, condition):
        return network(sample["a"])


def test_what_cannot_be_drawn_is_refused_before_the_first_batch():
    """Not when the first picture is due, after hours."""
    module = Scene(MLP([4, 2]), MLP([2, 1]), latent_dim=4)
    before = weights(module).clone()
    said = r"SampleLogger draws points .*, got samples a torch.float32 tensor of shape \(8, 2, 1, 1, 1, 1\): give it a "
    with pytest.raises(MisconfigurationException, match=said + "function `draw`"):
        fit(module, points(3), callbacks=[SampleLogger(every=500)])
    assert module.iteration == 0
    assert torch.equal(before, weights(module))
    with pytest.raises(ValueError, match=r"There is no picture of samples of shape \(4, 1, 1, 1, 1, 1\)"):
        picture(torch.zeros(4, 1, 1, 1, 1, 1))


def test_a_function_draws_anything(tmp_path):
    module = Scene(MLP([4, 2]), MLP([2, 1]), latent_dim=4)
    fit(module, points(3), callbacks=[SampleLogger(every=3, draw=Square(3))], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000003.png"]


@pytest.mark.parametrize("made", [None, 3, {"a": "b"}])
def test_a_function_that_makes_no_picture_is_refused_before_the_first_batch(made):
    module = small()
    with pytest.raises(ValueError, match="`draw` must return an image of Pillow, a figure of matplotlib, or a dict"):
        fit(module, points(3), callbacks=[SampleLogger(every=500, draw=lambda *_: made)])
    assert module.iteration == 0


@pytest.mark.parametrize("shape", [(3,), (2, 1, 1, 1, 1)])
def test_samples_of_another_shape_than_the_data_are_left_to_the_module(shape):
    module = gan(*shape)
    with pytest.raises(ValueError, match="The generator made samples of shape"):
        fit(module, points(3), callbacks=[SampleLogger(every=500)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"draw": 3}, "`draw` must be a function of samples that makes a picture, got 3"),
        ({"sample_rate": 0}, "`sample_rate` must be a positive integer, got 0"),
        ({"name": ""}, "`name` must be a key of the log, got ''"),
    ],
)
def test_other_arguments_are_checked(arguments, said):
    with pytest.raises(ValueError, match=said):
        SampleLogger(**arguments)


@pytest.mark.parametrize("name", ["every", "n"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        SampleLogger(**{name: value})


def test_evaluation_restores_every_mode_also_after_an_error():
    net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval(), torch.nn.BatchNorm1d(2))

    def fails():
        with evaluation(net):
            assert not any(m.training for m in net.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert [m.training for m in net] == [True, False, True]
    assert weights(net[2]).requires_grad is False
