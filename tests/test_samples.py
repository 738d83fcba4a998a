"""Pictures of samples: where they go, what is in them, and that training does not notice."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from toys import fit, points, small, tensors, weights

from lightning_gan_stability import MLP, DCGANDiscriminator, DCGANGenerator, GANModule, SampleLogger
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.monitors.samples import picture


def pictures(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))


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
    def gan():
        torch.manual_seed(0)
        return GANModule(DCGANGenerator(8, 1, 8, 4), DCGANDiscriminator(1, 8, 4), latent_dim=8)

    batches = [torch.rand(4, 1, 8, 8) * 2 - 1 for _ in range(4)]
    a, b = gan(), gan()
    fit(a, batches)
    fit(b, batches, callbacks=[SampleLogger(every=1, n=4)], default_root_dir=tmp_path)
    assert all(
        torch.equal(x, y)
        for x, y in zip(tensors(a.state_dict()).values(), tensors(b.state_dict()).values(), strict=True)
    )
    assert len(pictures(tmp_path)) == 4


def test_a_conditional_generator_gets_labels(tmp_path):
    gan = GANModule(DCGANGenerator(8, 1, 8, 4, num_classes=3), DCGANDiscriminator(1, 8, 4), latent_dim=8)
    batches = [(torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0]))]
    fit(gan, batches, callbacks=[SampleLogger(every=1, n=9)], default_root_dir=tmp_path)
    assert pictures(tmp_path) == ["samples/000001.png"]


def test_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"SampleLogger draws images .* and points .*, got .*\(4, 3\)"):
        picture(torch.zeros(4, 3), torch.zeros(4, 3))


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


def test_what_cannot_be_drawn_is_refused_at_the_first_batch():
    """Not when the first picture is due, after hours."""
    rows = {"a": torch.zeros(4, 2), "b": torch.zeros(4, 2)}

    class Two(GANModule):
        def generate(self, network, n, condition, latents):
            return {name: network(latents) for name in rows}

        def discriminate(self, network, sample, condition):
            return network(sample["a"] + sample["b"])

        def unpack(self, batch):
            return rows, None

    module = Two(MLP([4, 2]), MLP([2, 1]), latent_dim=4)
    with pytest.raises(ValueError, match=r"SampleLogger draws images .*, got samples of a dict.*: remove SampleLogger"):
        fit(module, points(3), callbacks=[SampleLogger(every=500)])
    assert module.iteration == 1
