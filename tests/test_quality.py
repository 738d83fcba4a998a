"""QualityMonitor: the same numbers as the functions on the same samples, no trace in training, and what it refuses."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import small, trainer, weights

from lightning_gan_stability import (
    MLP,
    DigitClassifier,
    Digits,
    GANModule,
    GeneratorEMA,
    Images,
    Inception,
    QualityMonitor,
    Ring,
)
from lightning_gan_stability.datasets import digits
from lightning_gan_stability.metrics import density_coverage, frechet_distance, mode_coverage, precision_recall
from lightning_gan_stability.metrics.statistics import Cells, Seen, distance
from lightning_gan_stability.monitors import reading
from lightning_gan_stability.monitors.real_data import from_start

FEW = {"n_samples": 100, "every": 2}


def ring(**kwargs):
    return Ring(batch_size=32, epoch_length=6, val_samples=120, **kwargs)


def fit(module, data, *callbacks, **kwargs):
    run = trainer(callbacks=list(callbacks), **{"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0} | kwargs)
    run.fit(module, data)
    return run


def digit_gan():
    torch.manual_seed(0)
    generator = MLP([4, 16, 64], output_activation=nn.Tanh, output_shape=[1, 8, 8])
    return GANModule(generator, MLP([64, 16, 1]), latent_dim=4)


# ---------- the values


def test_values_are_those_of_the_functions_on_the_same_samples():
    """Real samples are the first of the stream; fakes come from the monitor's latents, which the test draws itself."""
    from lightning_gan_stability.noise import generator

    module, data, monitor = small(), ring(), QualityMonitor(**FEW)
    fit(module, data, monitor)
    stream = ring().train_dataloader()
    real = torch.cat([stream.batch(i) for i in range(4)])[:100]
    with torch.no_grad():
        fake = module.generator(torch.randn(100, 4, generator=generator("quality")))
    assert monitor.values["fid"] == pytest.approx(frechet_distance(real, fake), rel=1e-9)
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    expected = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    assert {name: monitor.values[name] for name in expected} == expected
    found = mode_coverage(fake, data.centers, data.std)
    assert (monitor.values["modes"], monitor.values["high_quality"]) == (found.modes, found.high_quality)
    nearest = torch.cdist(fake, data.centers).argmin(1).bincount(minlength=8) / 100
    truth = torch.cdist(real, data.centers).argmin(1).bincount(minlength=8) / 100
    assert monitor.values["imbalance"] == pytest.approx(((nearest - truth).abs().sum() / 2).item(), abs=1e-6)
    assert monitor.values["missing"] == pytest.approx(truth[nearest < 0.2 * truth].sum().item(), abs=1e-6)


def test_the_null_is_that_of_real_halves():
    monitor = QualityMonitor(n_samples=192, every=2)
    fit(small(), ring(), monitor)
    stream = ring().train_dataloader()
    real = torch.cat([stream.batch(i) for i in range(6)])
    assert monitor.null["coverage"] == density_coverage(real[::2], real[1::2]).coverage
    assert monitor.null["coverage"] > 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_weights_and_biases_get_a_table_of_all_measurements(tmp_path):
    import wandb

    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    monitor = QualityMonitor(metrics=["fid"], **FEW)
    fit(small(), ring(), monitor, logger=logger)
    wandb.finish()
    (file,) = tmp_path.rglob("media/table/quality/table*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["step", "fid", "missing", "imbalance", "moved"]
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == monitor.history
    assert [row["step"] for row in monitor.history] == [0, 2, 4]


def test_the_average_is_measured_when_there_is_one():
    module, monitor = small(), QualityMonitor(metrics=["fid"], **FEW)
    fit(module, ring(), GeneratorEMA(decay=0.9), monitor)
    average = monitor.values["fid"]
    module.generator_ema = None
    again = QualityMonitor(metrics=["fid"], **FEW)
    frozen = small()
    frozen.load_state_dict({k: v for k, v in module.state_dict().items() if "ema" not in k})
    fit(frozen, ring(), again, max_steps=0)
    assert average != again.values.get("fid")


def test_cells_of_unknown_modes_see_a_missing_one():
    torch.manual_seed(0)
    centers = 10 * torch.eye(4)
    real = centers.repeat(100, 1) + torch.randn(400, 4)
    fake = real[real.argmax(1) != 2]
    cells = Cells(Seen(real, real), None, None, False)
    values, shares = cells.compare(Seen(fake, fake))
    assert values["missing"] == pytest.approx(0.25, abs=0.03)
    assert sum(shares) == pytest.approx(1)
    assert cells.compare(Seen(real, real))[0] == {"missing": 0, "imbalance": 0.0}


def test_moved_is_the_distance_to_the_last_shares():
    assert distance([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]) == 1.0
    monitor, seen = QualityMonitor(**FEW), []

    class Watch(Callback):
        def on_train_batch_end(self, _, module, *__):
            if module.iteration % 2 == 0:
                seen.append((list(monitor.shares), monitor.values["moved"]))

    fit(small(), ring(), monitor, Watch())
    assert seen[1][1] == pytest.approx(distance(seen[0][0], seen[1][0]))


def test_samples_that_are_not_finite_are_nan_and_miss_everything():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, latents):
            samples = self.layer(latents)
            return samples if self.training else samples / 0

    monitor = QualityMonitor(**FEW)
    fit(GANModule(Broken(), MLP([2, 8, 1]), latent_dim=4), ring(), monitor)
    assert math.isnan(monitor.values["fid"])
    assert monitor.values["missing"] == 1


# ---------- digits and images


def test_the_classifier_is_right_on_digits_that_it_has_not_seen():
    data = Digits()
    data.setup()
    images, labels = (torch.cat(column) for column in zip(*data.val_dataloader(), strict=True))
    before = torch.get_rng_state()
    classifier = DigitClassifier().eval()
    with torch.inference_mode():
        right = (classifier.classify(images).argmax(1) == labels).float().mean()
    assert right > 0.97
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(DigitClassifier()(images[:3]), classifier(images[:3]))


def test_digits_are_measured_by_their_classes():
    monitor = QualityMonitor(DigitClassifier(), **FEW)
    fit(digit_gan(), Digits(), monitor, max_steps=2)
    assert {"modes", "high_quality", "reverse_kl", "fid", "recall", "missing"} <= set(monitor.values)
    images, labels = digits()
    assert sorted(set(labels.tolist())) == list(range(10))
    seen = monitor._see(images)
    assert mode_coverage(seen.modes, classes=10).modes == 10


def test_images_are_seen_by_inception_and_its_absence_is_explained(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(
        RuntimeError, match=r"Inception's weights could not be downloaded \(no route to host\).*weights="
    ):
        fit(digit_gan(), Digits(), QualityMonitor(**FEW))


def test_inception_of_a_local_file(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as original

    with monkeypatch.context() as patch:  # random weights, in the form of the real ones
        patch.setattr(original.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(original, "load_state_dict_from_url", lambda *_, **__: {})
        network = original.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    features = Inception(tmp_path / "weights.pth")(images)
    pixels = ((images + 1) * 127.5).round().byte().repeat(1, 3, 1, 1)
    assert torch.equal(features, network(pixels)[0])
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="`weights` does not hold Inception's weights"):
        Inception(tmp_path / "other.pth").load()
    with pytest.raises(ValueError, match=r"`weights` must be a file, got '.*none.pth'"):
        Inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="`width` must be 64, 192, 768 or 2048, got 100"):
        Inception(width=100)
    with pytest.raises(ValueError, match="Inception takes images"):
        Inception()(torch.zeros(2, 5))


def test_values_are_computed_where_there_is_float64():
    assert reading.home(torch.device("mps")) == torch.device("cpu")
    assert reading.home(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_labels_of_fakes_follow_the_data():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 64)

        def forward(self, latents, labels):
            seen.append(labels)
            return self.layer(latents).tanh().reshape(-1, 1, 8, 8)

    seen = []
    fit(GANModule(Labelled(), MLP([64, 8, 1]), latent_dim=4), Digits(), QualityMonitor(DigitClassifier(), **FEW))
    whole = max(seen, key=len)
    data = Digits()
    expected = torch.cat([data.train_dataloader().batch(i)[1] for i in range(2)])[:100]
    assert torch.equal(whole.cpu(), expected)


# ---------- what it leaves alone


class Noisy(nn.Module):
    """Draws from the global random state in every mode, and has statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 2))

    def forward(self, latents):
        return self.layers(latents) + 0.1 * torch.randn(len(latents), 2, device=latents.device)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["stream", "loader"])
def test_training_is_the_same_with_and_without(split, kind):
    runs = []
    for callbacks in [], [QualityMonitor(split=split, **FEW)]:
        torch.manual_seed(0)
        module = GANModule(Noisy(), MLP([2, 16, 1]), latent_dim=4)
        torch.manual_seed(1)
        points = TensorDataset(torch.randn(100, 2))
        data = ring() if kind == "stream" else DataLoader(points, batch_size=16, shuffle=True)
        run = trainer(callbacks=callbacks, max_steps=9, max_epochs=-1, limit_val_batches=2, num_sanity_val_steps=0)
        run.fit(module, data, None if kind == "stream" else DataLoader(points, batch_size=20))
        runs.append((weights(module), torch.rand(3)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_persistent_workers_go_on():
    points = TensorDataset(torch.randn(64, 2))
    loader = DataLoader(points, batch_size=16, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    module = small()
    fit(module, loader, QualityMonitor(n_samples=60, every=1), max_steps=6)
    assert module.iteration == 6


def test_a_loader_with_a_position_is_put_back():
    stream = ring().train_dataloader()
    stream.load_state_dict({"position": 3})
    first = next(from_start(stream, 10, 0, 1))
    assert torch.equal(first, stream.batch(0))
    assert stream.state_dict() == {"position": 3}

    class Counted(list):
        position = 2

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

        def __iter__(self):
            for item in list.__iter__(self):
                self.position += 1
                yield item

    counted = Counted([torch.zeros(1, 2)] * 5)
    next(from_start(counted, 10, 0, 1))
    assert counted.position == 2


def test_ranks_share_a_data_set():
    loader = DataLoader(TensorDataset(torch.arange(50.0)[:, None]), batch_size=4)
    whole = torch.cat([batch[0] for batch in from_start(loader, 20, 0, 1)])
    parts = [torch.cat([batch[0] for batch in from_start(loader, 20, rank, 2)]) for rank in (0, 1)]
    assert len(whole) == 20 == len(set(whole.flatten().tolist()))
    assert torch.equal(torch.stack(parts, 1).reshape(-1, 1), whole)


# ---------- where values go


def test_values_are_logged_with_their_protocol(tmp_path):
    logger = CSVLogger(tmp_path)
    run = fit(small(), ring(), QualityMonitor(**FEW), logger=logger)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row.get("quality/fid")]
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert 0 < float(rows[-1]["quality/time_share"]) < 1
    assert float(run.callback_metrics["quality/fid"]) == pytest.approx(float(rows[-1]["quality/fid"]), rel=1e-5)
    text = (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()
    for line in ("extractor: Identity", "n_real: 100", "n_fake: 100", "split: train"):
        assert line in text


def test_checkpoints_and_early_stopping_by_quality(tmp_path):
    best = ModelCheckpoint(tmp_path, "{step}", monitor="quality/fid", every_n_train_steps=2, save_top_k=1)
    run = fit(small(), ring(), QualityMonitor(**FEW), best, enable_checkpointing=True, max_steps=12)
    assert best.best_model_score is not None
    assert run.global_step == 12
    stop = EarlyStopping("quality/recall", mode="max", patience=1, min_delta=2.0)
    run = fit(small(), ring(), QualityMonitor(**FEW), stop, max_steps=100, limit_val_batches=1)
    assert run.global_step < 100


def test_the_cache_is_used_and_a_torn_one_is_not(tmp_path, caplog):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(2, 3), 0

        def forward(self, samples):
            self.seen += len(samples)
            return self.layer(samples)

    torch.manual_seed(0)
    extractor = Counting()

    def measured():
        extractor.seen = 0
        monitor = QualityMonitor(extractor, cache=tmp_path, **FEW)
        fit(small(), ring(), monitor)
        return extractor.seen, monitor.values

    first, values = measured()
    second, again = measured()
    assert second == first - 100  # one real sample is seen, to let a lazy extractor load
    assert again == values
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(file.read_bytes()[:200])
    third, again = measured()
    assert (third, again) == (first, values)
    with torch.no_grad():
        extractor.layer.weight.add_(1)
    assert measured()[0] == first  # other weights, another key


# ---------- bad input


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"n_samples": 10}, "`n_samples` must be an integer of at least 50, got 10"),
        ({"n_samples": 1.5}, "`n_samples` must be an integer of at least 50, got 1.5"),
        ({"metrics": ["fids"]}, r"`metrics` must be some of fid, kid, .* got \['fids'\]"),
        ({"metrics": []}, "`metrics` must be some of"),
        ({"split": "test"}, "`split` must be one of 'train', 'val', got 'test'"),
        ({"extractor": "inception"}, "`extractor` must be of type Module, got 'inception'"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        QualityMonitor(**arguments)


def test_modes_that_are_not_known_are_refused():
    with pytest.raises(MisconfigurationException, match="must know the modes"):
        fit(small(), DataLoader(TensorDataset(torch.randn(64, 2)), 16), QualityMonitor(metrics=["modes"], **FEW))


def test_a_split_without_data_is_refused():
    loader = DataLoader(TensorDataset(torch.randn(64, 2)), 16)
    with pytest.raises(MisconfigurationException, match=r"\(split='val'\) found no batch in the val loader"):
        fit(small(), loader, QualityMonitor(split="val", **FEW))


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_a_loader_without_batches_is_refused():
    loader = DataLoader(TensorDataset(torch.randn(64, 2)), 16)
    monitor = QualityMonitor(split="val", **FEW)
    run = trainer(callbacks=[monitor], max_steps=2, num_sanity_val_steps=0)
    empty = DataLoader([], batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"found no batch in the val loader"):
        run.fit(small(), loader, empty)


def test_too_few_real_samples_are_refused():
    def few(n):
        return DataLoader(TensorDataset(torch.randn(n, 2)), 1)

    everything = ["fid", "kid", "precision", "recall", "density", "coverage", "diversity", "ndb"]
    with pytest.raises(MisconfigurationException, match="compares with real samples, and the loader has 19: give at"):
        fit(small(), few(19), QualityMonitor(metrics=everything, **FEW))
    monitor = QualityMonitor(metrics=everything, **FEW)
    fit(small(), few(20), monitor)
    assert set(everything) <= set(monitor.values)


class Gives(nn.Module):
    """An extractor that gives what a function makes of samples."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    "function", [torch.flatten, torch.mean, lambda x: x[1:], lambda x: x[0], lambda x: {"x": x}, lambda x: 0.0]
)
def test_an_extractor_of_another_form_is_refused(function):
    sentence = (
        r"`extractor` must give one row of features per sample, a tensor of shape \(\d+, \.\.\.\) for \d+ samples"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(small(), ring(), QualityMonitor(Gives(function), **FEW))


def test_an_extractor_may_give_one_number_per_sample():
    found = [QualityMonitor(Gives(function), ["fid"], **FEW) for function in (lambda x: x[:, 0], lambda x: x[:, :1])]
    for monitor in found:
        fit(small(), ring(), monitor)
    assert found[0].values == found[1].values


def test_real_samples_that_are_not_finite_are_refused():
    points = torch.randn(64, 2)
    points[3] = math.nan
    with pytest.raises(ValueError, match="the real samples have features that are not finite"):
        fit(small(), DataLoader(TensorDataset(points), 16), QualityMonitor(**FEW))


def test_images_need_no_more_than_a_folder_of_the_same_protocol(tmp_path):
    from torchvision.datasets import FakeData

    data = Images(dataset=FakeData(80, (3, 8, 8)), size=8, batch_size=16)
    generator = MLP([4, 192], output_shape=[3, 8, 8])
    monitor = QualityMonitor(nn.Flatten(), **FEW)
    fit(GANModule(generator, MLP([192, 1]), latent_dim=4), data, monitor, max_steps=2)
    assert monitor.protocol["n_real"] == 80


def test_combined_loaders_are_read_by_the_module_s_own_unpack():
    class Two(GANModule):
        def unpack(self, batch):
            return super().unpack(batch["a"][0])

    def loader():
        return DataLoader(TensorDataset(torch.randn(100, 2)), batch_size=20)

    module, monitor = Two(MLP([4, 8, 2]), MLP([2, 8, 1]), 4), QualityMonitor(n_samples=60, every=2)
    data = CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle")
    trainer(callbacks=[monitor], max_steps=4, max_epochs=-1).fit(module, data)
    assert monitor.values["fid"] > 0
    assert monitor.protocol["n_real"] == 60
