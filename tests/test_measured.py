"""What Lightning's EarlyStopping and ModelCheckpoint read of values that are measured now and then."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanSquaredError
from toys import ignoring, points, small, trainer

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    AdaptiveAugmentation,
    AdaptiveUpdateRatio,
    AdversarialStart,
    AugmentationSchedule,
    AugmentPipe,
    CollapseDetector,
    Digits,
    GANCallback,
    GANModule,
    HealthMonitor,
    InstanceNoise,
    LossBalancer,
    MemorizationMonitor,
    PairedMonitor,
    QualityMonitor,
    Reconstruction,
    Ring,
    Tokenizer,
)
from lightning_gan_stability.cli import build
from lightning_gan_stability.monitored import PREFIXES

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Scripted(GANCallback):
    """Measures what a script says, every so many steps, and remembers when."""

    rolled_back = False

    def __init__(self, script, every, key="quality/fid"):
        super().__init__()
        self.script, self.every, self.key = script, every, key
        self.add_state("count", 0)

    def logged(self, trainer):
        return {self.key: self.every}

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % self.every == 0:
            trainer.callback_metrics[self.key] = torch.tensor(self.script[self.count % len(self.script)])
            self.count += 1


def stopped_at(values, patience, mode="min"):
    """How many values it takes until so many in a row have been no better than the best before."""
    best, waited = math.inf, 0
    for count, value in enumerate(values, 1):
        value = value if mode == "min" else -value
        best, waited = (value, 0) if value < best else (best, waited + 1)
        if waited == patience:
            return count
    return None


def fit(*callbacks, module=None, epoch=10, ckpt_path=None, validation=False, **kwargs):
    options = {"max_steps": 200, "max_epochs": -1, "limit_val_batches": 1 if validation else 0} | kwargs
    run = trainer(callbacks=list(callbacks), enable_checkpointing=True, **options)
    loaders = [DataLoader(points(epoch), batch_size=None) for _ in range(2)]
    with ignoring():
        run.fit(small() if module is None else module, *loaders, ckpt_path=ckpt_path)
    return run


FALLS = [9.0, 8.0, 8.5, 7.0, 7.5, 7.5, 6.0, 6.5, 6.5, 6.5, 6.5, 5.0]  # three in a row without progress: the tenth


# ---------- patience counts measurements


@pytest.mark.parametrize("every", [3, 10, 25], ids="every {}".format)  # less than an epoch, an epoch, more
@pytest.mark.parametrize("at_epoch_end", [None, True, False], ids="check_on_train_epoch_end={}".format)
@pytest.mark.parametrize(
    "options",
    [{}, {"validation": True}, {"validation": True, "val_check_interval": 0.3}, {"check_val_every_n_epoch": 2}],
    ids=["no validation", "each epoch", "thrice", "every other"],
)
def test_patience_counts_measurements(every, at_epoch_end, options):
    count = stopped_at(FALLS, 3)
    assert count == 10
    stop = EarlyStopping("quality/fid", patience=3, check_on_train_epoch_end=at_epoch_end)
    run = fit(Scripted(FALLS, every), stop, max_steps=1000, **options)
    assert run.global_step == count * every
    assert stop.best_score == 6.0


def test_wherever_it_stands():
    class Late(EarlyStopping):
        """A subclass that the module brings along, which comes after the guard."""

    class Brings(GANModule):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), Late("quality/fid", patience=3)]

    torch.manual_seed(0)
    module = Brings(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)
    assert fit(Scripted(FALLS, 7), module=module, validation=True, val_check_interval=0.3).global_step == 70
    assert fit(EarlyStopping("quality/fid"), Scripted(FALLS, 7), validation=True).global_step == 70


def test_patience_counts_what_a_quality_monitor_measures():
    monitor, stop = QualityMonitor(n_samples=64, every=4), EarlyStopping("quality/fid", patience=2)
    run = trainer(callbacks=[monitor, stop], max_steps=400, max_epochs=-1, limit_val_batches=0)
    run.fit(small(), Ring(batch_size=32, epoch_length=3, val_samples=64))
    values = [row["fid"] for row in monitor.history[1:]]  # Lightning leaves an untrained module's values out, too
    assert len(values) > 2
    assert stopped_at(values, 2) == len(values) == run.global_step / 4
    assert stop.best_score.item() == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize("at", [40, 45, 84])
def test_a_resumed_run_stops_where_the_whole_one_does(at):
    callbacks = lambda: (Scripted(FALLS, 12), EarlyStopping("quality/fid", patience=3))  # noqa: E731
    fit(*callbacks(), max_steps=at).save_checkpoint("half.ckpt")
    stop = EarlyStopping("quality/fid", patience=3)
    run = fit(Scripted(FALLS, 12), stop, max_steps=1000, ckpt_path="half.ckpt")
    assert (run.global_step, stop.wait_count) == (120, 3)


@pytest.mark.parametrize("late", [False, True], ids=["before the guard", "after it"])
@pytest.mark.parametrize("at_epoch_end", [True, False], ids="check_on_train_epoch_end={}".format)
def test_what_is_measured_in_validation_counts_once(at_epoch_end, late):
    class Falls(MeanSquaredError):
        """As the script says, whatever it is given."""

        validations = 0

        def compute(self):
            Falls.validations += 1
            return torch.tensor(FALLS[Falls.validations - 1])

    class Brings(Tokenizer):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), *([stop] if late else [])]

    torch.manual_seed(0)
    stop = EarlyStopping("quality/mse", patience=3, check_on_train_epoch_end=at_epoch_end)
    callbacks = [PairedMonitor({"mse": Falls()}), *([] if late else [stop])]
    options = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 2, "validation": True}
    module = Brings(MLP([2, 8, 2]), MLP([2, 8, 1]), losses={})
    run = fit(*callbacks, module=module, max_steps=1000, **options)
    assert run.global_step == 10 * 20


def test_others_are_left_alone():
    """What is logged on every step is read when Lightning likes; the setting of a stopping is there again after it."""
    epochs = []

    class Counts(EarlyStopping):
        def on_train_epoch_end(self, trainer, module):
            super().on_train_epoch_end(trainer, module)
            epochs.append(self.wait_count)

    ours = EarlyStopping("quality/fid", patience=3, check_on_train_epoch_end=True)
    theirs = Counts("d/adversarial", patience=4, mode="max", min_delta=100.0, check_on_train_epoch_end=True)
    run = fit(Scripted(FALLS, 1000), ours, theirs)
    assert epochs == [0, 1, 2, 3, 4]
    assert run.global_step == 50
    assert ours.wait_count == 0
    ours.on_validation_end(run, run.lightning_module)
    assert ours.wait_count == 0  # it checks with training epochs again


# ---------- files bear their own values


def fast():
    """A module whose samples another step changes by more than the digits of a name."""
    return small(g_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05))


def fid_of(path):
    """Of the weights in a file, measured in a run of its own."""
    module = small()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    monitor = QualityMonitor(n_samples=64, every=1000)
    run = trainer(callbacks=[monitor], max_steps=1, limit_val_batches=0)
    run.fit(module, Ring(batch_size=32, val_samples=64))
    return monitor.history[0]["fid"]


def named(folder):
    return {path: float(re.search(r"fid=(.*)\.ckpt", path.name)[1]) for path in Path(folder).glob("step*.ckpt")}


NAME = {"filename": "step={step}-fid={quality/fid:.4f}", "auto_insert_metric_name": False, "save_top_k": -1}


@pytest.mark.parametrize("triggers", [{"every_n_train_steps": 8}, {}, {"every_n_epochs": 2}], ids=str)
def test_files_bear_the_fid_of_their_own_weights(triggers, tmp_path):
    saves = ModelCheckpoint(tmp_path, monitor="quality/fid", **NAME, **triggers)
    callbacks = [saves, QualityMonitor(n_samples=64, every=4)]  # Lightning puts it at the end
    run = trainer(callbacks=callbacks, max_steps=16, max_epochs=-1, limit_val_batches=0, enable_checkpointing=True)
    run.fit(fast(), Ring(batch_size=32, epoch_length=4, val_samples=64))
    files = named(tmp_path)
    assert len(files) == (4 if not triggers else 2)
    assert len({*files.values()}) == len(files)
    for path, value in files.items():
        assert fid_of(path) == pytest.approx(value, abs=1e-3)
    assert named(tmp_path)[Path(saves.best_model_path)] == min(files.values())


def test_an_epoch_that_is_cut_short_has_no_value(tmp_path):
    """Steps 10 and 20 are measured; the last file, of step 25, is not ranked by the value of step 20."""
    saves = ModelCheckpoint(tmp_path, monitor="quality/fid", **NAME)
    run = fit(Scripted([3.0, 2.0], 10), saves, max_steps=25)
    assert {path.name for path in named(tmp_path)} == {
        "step=10-fid=3.0000.ckpt",
        "step=20-fid=2.0000.ckpt",
        "step=25-fid=nan.ckpt",
    }
    assert "step=20" in saves.best_model_path
    assert run.callback_metrics["quality/fid"] == 2.0  # for whom asks afterwards


def test_a_file_that_an_exception_leaves_has_no_value(tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 7:
                raise KeyError("a mistake")

    saves = ModelCheckpoint(tmp_path, monitor="quality/fid", every_n_train_steps=5, save_on_exception=True, **NAME)
    with pytest.raises(KeyError):
        fit(Scripted([3.0], 5), Fails(), saves)
    assert {path.name for path in named(tmp_path)} == {"step=5-fid=3.0000.ckpt", "step=7-fid=nan.ckpt"}


def test_weights_that_a_rollback_puts_back_do_not_bear_the_value_of_those_that_it_takes(tmp_path):
    class Breaks(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 6:
                module.generator.layers[0].weight.data.fill_(0)
                module.generator.layers[0].bias.data.fill_(0)

    detector = CollapseDetector("rollback", patience=1)
    saves = ModelCheckpoint(tmp_path, monitor="quality/fid", every_n_train_steps=4, **NAME)
    with ignoring():
        run = trainer(
            callbacks=[QualityMonitor(n_samples=64, every=4), detector, Breaks(), saves],
            max_steps=12,
            max_epochs=-1,
            limit_val_batches=0,
            enable_checkpointing=True,
        )
        run.fit(fast(), Ring(batch_size=32, val_samples=64))
    assert [event["step"] for event in detector.events][-1] == 8
    files = named(tmp_path)
    assert {path.name[:6].rstrip("-") for path in files} == {"step=4", "step=8", "step=1"}
    for path, value in files.items():
        assert math.isnan(value) == ("step=8-" in path.name)
        if not math.isnan(value):
            assert fid_of(path) == pytest.approx(value, abs=1e-3)


def test_steps_are_counted_by_one_clock_after_a_rescue(tmp_path):
    """A step that is not finite puts the module's iteration back, and not ``global_step``, by which files are saved."""

    class Breaks(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 6:
                next(module.generator.parameters()).data.fill_(math.nan)

    saves = ModelCheckpoint(tmp_path, monitor="quality/fid", every_n_train_steps=4, **NAME)
    callbacks = [QualityMonitor(n_samples=64, every=4), CollapseDetector("rollback", max_rollbacks=1), Breaks(), saves]
    with ignoring():
        run = trainer(callbacks=callbacks, max_steps=16, max_epochs=-1, limit_val_batches=0, enable_checkpointing=True)
        run.fit(fast(), Ring(batch_size=32, val_samples=64))
    assert run.lightning_module.iteration < 16 == run.global_step
    files = named(tmp_path)
    assert len(files) == 4
    for path, value in files.items():
        assert fid_of(path) == pytest.approx(value, abs=1e-3)


def unknown_length():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(points(5))

    return DataLoader(Endless(), batch_size=None)


@pytest.mark.parametrize(
    ("saves", "text"),
    [
        (
            {"every_n_train_steps": 15},
            r"ModelCheckpoint saves every 15 steps, and reads `quality/fid`, which QualityMonitor measures every 20 "
            r"steps, so that files would bear the value of another step: set every_n_train_steps=20 or a multiple of "
            r"it, or QualityMonitor\(every=15\)\.",
        ),
        ({}, r"saves every 10 steps, as epochs or validations end, .* set every_n_train_steps=20 .*every=10\)"),
        ({"every_n_epochs": 3}, r"saves every 30 steps, as epochs"),
        ({"every_n_train_steps": 15, "monitor": None, **NAME}, r"saves every 15 steps"),
        ({"monitor": "quality/recall", "mode": "max"}, r"reads `quality/recall`, which"),
    ],
)
def test_files_that_would_bear_other_values_are_refused(saves, text, tmp_path):
    saves = ModelCheckpoint(tmp_path, **{"monitor": "quality/fid"} | saves)
    with pytest.raises(MisconfigurationException, match=text):
        fit(QualityMonitor(n_samples=50, every=20), saves, max_steps=40)
    assert not any(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("saves", "options", "every"),
    [
        ({"every_n_train_steps": 40}, {}, 20),
        ({"every_n_epochs": 2}, {}, 20),
        ({}, {"validation": True}, 5),
        ({}, {"validation": True, "check_val_every_n_epoch": 2}, 20),
        ({}, {"validation": True, "val_check_interval": 4, "check_val_every_n_epoch": None}, 4),
        ({}, {"validation": True, "val_check_interval": 0.5}, 5),
        ({"every_n_train_steps": 15}, {"fast_dev_run": True}, 20),
    ],
)
def test_files_at_measurements_are_not_refused(saves, options, every, tmp_path):
    saves = ModelCheckpoint(tmp_path, monitor="quality/fid", **NAME | saves)
    run = fit(Scripted(FALLS, every), saves, max_steps=40, **options)
    steps = {int(re.search(r"step=(\d+)", path.name)[1]) for path in named(tmp_path)}
    assert run.fast_dev_run or steps
    assert all(step % every == 0 for step in steps)
    assert not any(map(math.isnan, named(tmp_path).values()))


@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": 3},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"val_check_interval": 0.5},
    ],
)
def test_validations_at_other_steps_are_refused(options, tmp_path):
    saves = ModelCheckpoint(tmp_path, monitor="quality/fid")
    with pytest.raises(MisconfigurationException, match=r"as epochs or validations end, .* measures every 20 steps"):
        fit(Scripted(FALLS, 20, "quality/fid"), saves, validation=True, max_steps=40, **options)


def test_epochs_of_unknown_length_are_refused(tmp_path):
    run = trainer(
        callbacks=[Scripted(FALLS, 5), ModelCheckpoint(tmp_path, monitor="quality/fid")],
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    with pytest.raises(
        MisconfigurationException, match=r"saves at steps that are not known before, as epochs or valid"
    ):
        run.fit(small(), unknown_length())


def test_steps_between_validations_are_refused(tmp_path):
    torch.manual_seed(0)
    module = Tokenizer(MLP([2, 8, 2]), MLP([2, 8, 1]), losses={})
    saves = ModelCheckpoint(tmp_path, monitor="quality/mse", every_n_train_steps=10)
    expected = (
        r"ModelCheckpoint\(every_n_train_steps=10\) reads `quality/mse`, which PairedMonitor measures in validation"
    )
    with pytest.raises(MisconfigurationException, match=expected):
        fit(PairedMonitor({"mse": MeanSquaredError()}), saves, module=module, validation=True)


# ---------- keys that nothing will ever log


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (
            EarlyStopping("quality/fidd"),
            r"EarlyStopping reads `quality/fidd`, .*: did you mean `quality/fid`\? Keys of",
        ),
        (
            ModelCheckpoint(monitor="quality/recal"),
            r"ModelCheckpoint reads `quality/recal`, .*did you mean `quality/recall`",
        ),
        (ModelCheckpoint(filename="{quality/pprecision:.2f}"), "did you mean `quality/precision`"),
        (EarlyStopping("health/oscilation"), "did you mean `health/oscillation`"),
        (EarlyStopping("health/collapse"), "reads `health/collapse`"),  # for loggers alone
        (EarlyStopping("quality/time_share"), "reads `quality/time_share`"),
        (EarlyStopping("quality/modes"), "reads `quality/modes`"),  # which are not known
        (EarlyStopping("quality/ndb"), "reads `quality/ndb`"),  # not by default
        (
            EarlyStopping("balance/accuracy"),
            r"add the callback that measures it\. Keys of your own must not begin with `balance/`",
        ),
        (EarlyStopping("collapse/fid"), "reads `collapse/fid`"),
    ],
)
def test_keys_that_nothing_logs_are_refused(reader, text):
    with pytest.raises(MisconfigurationException, match=text):
        fit(QualityMonitor(n_samples=50, every=10), HealthMonitor(every=10), reader)


def test_without_a_monitor_and_without_validation():
    with pytest.raises(MisconfigurationException, match="reads `quality/fid`, which no callback of this run puts"):
        fit(EarlyStopping("quality/fid"))
    torch.manual_seed(0)
    module = Tokenizer(MLP([2, 8, 2]), MLP([2, 8, 1]), losses={})
    with pytest.raises(MisconfigurationException, match="reads `quality/mse`"):
        fit(PairedMonitor({"mse": MeanSquaredError()}), EarlyStopping("quality/mse"), module=module)


@pytest.mark.parametrize("key", ["mine/fid", "fid", "qualities", "val/d/accuracy", "d/adversarial", "g/mine"])
def test_keys_of_ones_own_are_not_refused(key):
    fit(EarlyStopping(key, strict=False), max_steps=3)


class Codes(nn.Module):
    """A generator without latents whose last layer has a name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [QualityMonitor(n_samples=50, every=2, metrics=["ndb", "fid"]), HealthMonitor(every=2)],
        lambda: [QualityMonitor(n_samples=50, every=2)],
        lambda: [AdaptiveUpdateRatio(), PairedMonitor({"mse": MeanSquaredError()}, name="quality")],
        lambda: [AdaptiveUpdateRatio("logit_gap")],
        lambda: [MemorizationMonitor(nn.Flatten(), every=2, n_samples=50, held_out=points(8, seed=1))],
        lambda: [Reconstruction(), AdaptiveAdversarialWeight("layers.2"), AdversarialStart(1)],
        lambda: [Reconstruction(), LossBalancer({"adversarial": 1.0, "reconstruction": 1.0})],
        lambda: [InstanceNoise(0.1, 4)],
    ],
)
def test_what_is_declared_is_what_is_logged(callbacks):
    """And nothing else under these prefixes."""
    torch.manual_seed(0)
    module = Tokenizer(Codes(), MLP([2, 8, 1]), losses={})
    callbacks = callbacks()
    run = fit(*callbacks, module=module, validation=True, max_steps=20, log_every_n_steps=1)
    declared = {key for callback in callbacks for key in callback.logged(run)}
    assert {key for key in run.callback_metrics if key.startswith(PREFIXES)} == declared


def test_modes_are_declared_where_they_are_known():
    for known in (True, False):
        data = Ring(batch_size=32, epoch_length=6, val_samples=64)
        data.setup("fit")
        data = data if known else data.train_dataloader()
        monitor = QualityMonitor(n_samples=64, every=2)
        run = trainer(callbacks=[monitor], max_steps=4, max_epochs=-1, limit_val_batches=0)  # three measurements
        run.fit(small(), data)
        assert {key for key in run.callback_metrics if key.startswith("quality/")} == monitor.logged(run).keys()
        assert ("quality/modes" in run.callback_metrics) == known


@pytest.mark.parametrize("callback", [lambda: AdaptiveAugmentation(interval=1), lambda: AugmentationSchedule(0.1)])
def test_augmentations_declare_what_they_log(callback):
    torch.manual_seed(0)
    module = GANModule(MLP([4, 16, 64], output_shape=[1, 8, 8]), MLP([64, 16, 1]), latent_dim=4, augment=AugmentPipe())
    augmentation = callback()
    run = trainer(callbacks=[augmentation], max_steps=4, limit_val_batches=0)
    run.fit(module, Digits(batch_size=16))
    assert {key for key in run.callback_metrics if key.startswith(PREFIXES)} == augmentation.logged(run).keys()


# ---------- from YAML


@pytest.mark.filterwarnings("ignore")
def test_from_yaml(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "quality/fid", "patience": 2, "min_delta": 1e6}}
    config = {
        "model": {
            "generator": {"class_path": "MLP", "init_args": {"sizes": [4, 8, 2]}},
            "discriminator": {"class_path": "MLP", "init_args": {"sizes": [2, 8, 1]}},
            "latent_dim": 4,
        },
        "data": {"class_path": "Ring", "init_args": {"batch_size": 32, "epoch_length": 3, "val_samples": 64}},
        "trainer": {
            "max_steps": 100,
            "max_epochs": -1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": False,
            "callbacks": [{"class_path": "QualityMonitor", "init_args": {"n_samples": 64, "every": 5}}, stop],
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    cli = build(["--config", "config.yaml"])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 15  # the first measurement is the best, and two more are not
