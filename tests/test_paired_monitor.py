"""Monitors of validation: the values are those by hand, training is as it was, and what they refuse."""

import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio
from toys import points, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    GANModule,
    GeneratorEMA,
    Packed,
    PairedMonitor,
    Table,
    TableMonitor,
    TableSynthesis,
    Tokenizer,
)
from lightning_gan_stability.metrics import (
    CodebookPerplexity,
    CodebookUsage,
    correlation_difference,
    efficacy,
    marginal_distances,
)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def images(n, seed=0, batch_size=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch_size, 1, 8, 8, generator=generator) for _ in range(n)]


TRAIN, VAL = images(4), [*images(2, 1), *images(1, 2, batch_size=3)]


class Coder(nn.Module):
    """An autoencoder with four codes, statistics, and randomness of its own in every mode."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise = noise
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.1))
        self.out = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        hidden = self.layers(x)
        codes = (hidden > 0).long()
        made = self.out(hidden) + self.noise * torch.randn_like(x)
        return made, {"codebook": hidden.square().mean(), "codes": codes[:, 0] + 2 * codes[:, 1]}


def tokenizer(noise=0.0, **kwargs):
    torch.manual_seed(0)
    return Tokenizer(Coder(noise), nn.Conv2d(1, 1, 4, 4), **kwargs)


def psnr():
    return PeakSignalNoiseRatio(data_range=(0.0, 1.0))


def fit(module, *callbacks, train=TRAIN, val=VAL, ckpt_path=None, **kwargs):
    run = trainer(**{"callbacks": list(callbacks), "num_sanity_val_steps": 0} | kwargs)
    run.fit(module, loader(train), None if val is None else loader(val), ckpt_path=ckpt_path)
    return run


def by_hand(module, metric, network=None):
    """The metric of what a network in eval mode makes of the validation data."""
    network = (network or module.generator).eval()
    with torch.no_grad():
        for batch in VAL:
            metric.update(network(batch)[0], batch)
    return metric.compute()


# ---------- paired samples


def test_values_are_those_of_samples_by_hand():
    module = tokenizer()
    run = fit(module, PairedMonitor({"psnr": psnr(), "mae": MeanAbsoluteError()}, name="quality"))
    metric = psnr()
    with torch.no_grad():
        for batch in VAL:
            metric.update(module.eval().sample(condition=batch), batch)
    assert run.callback_metrics["quality/psnr"] == metric.compute()
    assert run.callback_metrics["quality/mae"] == by_hand(module, MeanAbsoluteError())
    assert run.callback_metrics["quality/psnr"] != by_hand(tokenizer(), psnr())


def test_each_validation_begins_anew():
    module = tokenizer()
    run = fit(module, PairedMonitor({"mae": MeanAbsoluteError()}), max_epochs=3)
    assert run.callback_metrics["quality/mae"] == by_hand(module, MeanAbsoluteError())


def test_the_average_is_measured_when_there_is_one():
    module = tokenizer()
    run = fit(module, GeneratorEMA(decay=0.9), PairedMonitor({"mae": MeanAbsoluteError()}))
    assert run.callback_metrics["quality/mae"] == by_hand(module, MeanAbsoluteError(), module.generator_ema)
    assert run.callback_metrics["quality/mae"] != by_hand(module, MeanAbsoluteError())


def test_inputs_are_paths():
    module = tokenizer()
    metrics = {
        "usage": CodebookUsage(4),
        "perplexity": CodebookPerplexity(4),
        "zero": MeanSquaredError(),
        "mae": MeanAbsoluteError(),
    }
    inputs = {"usage": ["extras.codes"], "perplexity": ("extras.codes",), "zero": ["condition", "real"]}
    run = fit(module, PairedMonitor(metrics, inputs, name="val"))
    assert run.callback_metrics["val/zero"] == 0
    assert run.callback_metrics["val/mae"] == by_hand(module, MeanAbsoluteError())
    with torch.no_grad():
        codes = torch.cat([module.generator.eval()(batch)[1]["codes"].flatten() for batch in VAL])
    shares = codes.bincount(minlength=4) / len(codes)
    assert run.callback_metrics["val/usage"] == (shares > 0).float().mean()
    expected = torch.special.entr(shares).sum().exp()
    assert run.callback_metrics["val/perplexity"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert 1.1 < expected < 3.9


def test_metrics_get_a_full_type():
    seen = []

    class Look(MeanAbsoluteError):
        def update(self, sample, target):
            seen.append((sample.dtype, target.dtype))
            super().update(sample, target)

    fit(tokenizer(), PairedMonitor({"mae": Look()}), precision="bf16-true")
    assert seen == [(torch.float32, torch.float32)] * 3


class Watched(Tokenizer):
    """Keeps the global random state at the start of each step."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), torch.get_rng_state(), batch.clone()]
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("average", [False, True])
def test_training_is_the_same_with_and_without(average):
    runs = []
    for callbacks in [], [PairedMonitor({"psnr": psnr()})]:
        torch.manual_seed(0)
        module = Watched(Coder(noise=0.1), nn.Conv2d(1, 1, 4, 4))
        torch.manual_seed(1)
        shuffled = DataLoader(torch.cat(TRAIN), batch_size=4, shuffle=True)
        run = trainer(callbacks=[*[GeneratorEMA()] * average, *callbacks], max_epochs=2, val_check_interval=2)
        run.fit(module, shuffled, loader(VAL))
        assert module.training
        runs.append((module, torch.get_rng_state()))
    (one, state), (other, after) = runs
    assert len(one.seen) == 16
    assert all(torch.equal(a, b) for a, b in zip(one.seen, other.seen, strict=True))
    assert torch.equal(state, after)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
               if isinstance(a, torch.Tensor))  # fmt: skip
    assert one.noise.draw == other.noise.draw
    assert not torch.equal(weights(one), weights(tokenizer(noise=0.1)))


def test_noise_is_the_same_each_time():
    """A generator that draws from torch's default generator makes the same samples in two validations."""
    module = tokenizer(noise=0.5)
    monitor = PairedMonitor({"mae": MeanAbsoluteError()})
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        values += trainer(callbacks=[monitor]).validate(module, loader(VAL), verbose=False)
    assert values[0]["quality/mae"] == values[1]["quality/mae"]
    with module.noise.of("paired", 0, 0):
        assert torch.rand(3).tolist() != torch.rand(3).tolist()


def test_latents_are_drawn_beside_those_of_the_module():
    gan = small()
    before = gan.noise.draw
    run = trainer(callbacks=[PairedMonitor({"mae": MeanAbsoluteError()})])
    first, again = (run.validate(gan, loader(points(3)), verbose=False)[0]["quality/mae"] for _ in range(2))
    assert first == again
    assert gan.noise.draw == before
    metric = MeanAbsoluteError()
    for i, batch in enumerate(points(3)):
        with torch.no_grad(), gan.noise.of("paired", 0, i):
            metric.update(gan.eval().sample(len(batch)), batch)
    assert first == metric.compute().item()


def test_a_sanity_check_logs_nothing():
    logged = []

    class Logs(Tokenizer):
        def log(self, name, *args, **kwargs):
            logged.append((self.trainer.sanity_checking, name))
            super().log(name, *args, **kwargs)

    torch.manual_seed(0)
    module = Logs(Coder(), nn.Conv2d(1, 1, 4, 4))
    run = fit(module, PairedMonitor({"mae": MeanAbsoluteError()}), num_sanity_val_steps=2)
    assert [checking for checking, name in logged if name == "quality/mae"] == [False]
    assert run.callback_metrics["quality/mae"] == by_hand(module, MeanAbsoluteError())


def test_checkpoints_are_chosen_by_it(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="quality/psnr", mode="max", save_top_k=-1, filename="{epoch}")
    module = tokenizer(g_optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    fit(module, PairedMonitor({"psnr": psnr()}), best, enable_checkpointing=True, max_epochs=3)
    scores = {path: score.item() for path, score in best.best_k_models.items()}
    assert len({*scores.values()}) == 3
    assert best.best_model_score == max(scores.values())
    for path, score in scores.items():
        again = Tokenizer.load_from_checkpoint(path, generator=Coder(), discriminator=nn.Conv2d(1, 1, 4, 4))
        assert by_hand(again, psnr()).item() == pytest.approx(score, rel=1e-6)


def test_a_resumed_run_logs_what_the_whole_one_does(tmp_path):
    monitor = lambda: PairedMonitor({"psnr": psnr()})  # noqa: E731
    whole = fit(tokenizer(noise=0.1), monitor(), max_epochs=2)
    half = fit(tokenizer(noise=0.1), monitor(), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    module = tokenizer(noise=0.1)
    resumed = fit(module, monitor(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.callback_metrics["quality/psnr"] == whole.callback_metrics["quality/psnr"]
    assert resumed.callback_metrics["quality/psnr"] != half.callback_metrics["quality/psnr"]
    # and it can leave a run, of which Lightning warns, or join one
    with pytest.warns(UserWarning, match="PairedMonitor"):
        left = fit(tokenizer(noise=0.1), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    left.save_checkpoint(tmp_path / "left.ckpt")
    joined = monitor()
    fit(tokenizer(noise=0.1), joined, max_epochs=3, ckpt_path=tmp_path / "left.ckpt")
    assert [row["step"] for row in joined.history] == [12]


def test_validation_alone():
    module = tokenizer()
    [values] = trainer(callbacks=[PairedMonitor({"psnr": psnr()})]).validate(module, loader(VAL), verbose=False)
    assert values["quality/psnr"] == by_hand(module, psnr()).item()


def test_a_run_without_validation_is_told():
    monitor = PairedMonitor({"psnr": psnr()})
    with pytest.warns(UserWarning, match="PairedMonitor measures in validation, and this run has none"):
        fit(tokenizer(), monitor, val=None)
    with pytest.warns(UserWarning, match="PairedMonitor measures in validation, and this run has none"):
        fit(tokenizer(), monitor, limit_val_batches=0)


# ---------- what is refused


@pytest.mark.parametrize(
    ("metrics", "inputs", "sentence"),
    [
        ({}, None, "`metrics` must be a dict of names and metrics of torchmetrics, got {}"),
        ([psnr()], None, "`metrics` must be a dict"),
        (None, None, "`metrics` must be a dict"),
        ({"psnr": psnr}, None, "`metrics` must be a dict"),
        ({"psnr": psnr()}, {"ssim": ["fake"]}, "`inputs` must be paths by the names of metrics, which are psnr, got"),
        ({"psnr": psnr()}, {"psnr": "fake"}, "`inputs` must be lists of paths"),
        ({"psnr": psnr()}, {"psnr": [1]}, "`inputs` must be lists of paths"),
        ({"psnr": psnr()}, {"psnr": []}, "`inputs` must be lists of paths"),
        ({"psnr": psnr()}, ["fake"], "`inputs` must be"),
    ],
)
def test_bad_arguments(metrics, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        PairedMonitor(metrics, inputs)


def test_a_name_is_a_string():
    with pytest.raises(ValueError, match="`name` must be of type str, got 3"):
        PairedMonitor({"psnr": psnr()}, name=3)


@pytest.mark.parametrize(
    ("metric", "paths", "sentence"),
    [
        (psnr(), ["fake", "extras.cycle"], "PairedMonitor's 'it' compares `extras.cycle`, but there is no 'cycle'"),
        (psnr(), ["made", "real"], "PairedMonitor's 'it' compares `made`, but there is no 'made'"),
        (
            MeanAbsoluteError(),
            ["fake", "extras.codes"],
            r"MeanAbsoluteError under the name 'it' does not take `fake` a torch.float32 tensor of shape "
            r"\(4, 1, 8, 8\), `extras.codes` a torch.int64 tensor of shape \(4, 8, 8\)",
        ),
        (CodebookUsage(4), ["extras.codes", "real"], "CodebookUsage under the name 'it' does not take"),
        (CodebookUsage(3), ["extras.codes"], r"CodebookUsage under the name 'it' .*Codes must lie in 0 ... 2"),
        (CodebookUsage(4), ["fake"], "CodebookUsage under the name 'it' .*Codes must be integers"),
    ],
)
def test_what_a_metric_does_not_take(metric, paths, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(tokenizer(), PairedMonitor({"it": metric}, {"it": paths}))


def test_other_modules_are_refused():
    class Other(LightningModule):
        def validation_step(self, batch, batch_idx):
            pass

    for monitor in (PairedMonitor({"psnr": psnr()}), TableMonitor()):
        with pytest.raises(MisconfigurationException, match=type(monitor).__name__):
            trainer(callbacks=[monitor]).validate(Other(), loader(VAL), verbose=False)


# ---------- tables


def rows(n=90):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator)
    kind = (x + 0.3 * torch.randn(n, generator=generator) > 0).numpy()
    return {"x": x.double().numpy(), "y": (2 * x).double().numpy() ** 2, "kind": [["no", "yes"][int(k)] for k in kind]}


class Mixer(nn.Linear):
    """A generator with dropout, which has to rest while it is measured."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.2, self.training)


def table_run(*callbacks, data=None, module=None, **kwargs):
    torch.manual_seed(0)
    data = data or Table(rows(), components=2, batch_size=12)
    module = module or TableSynthesis(Mixer, nn.Linear, data.columns, latent_dim=4, pac=2)
    run = trainer(**{"callbacks": list(callbacks), "num_sanity_val_steps": 0} | kwargs)
    run.fit(module, data)
    return run, module, data


def test_tables_are_measured_by_the_functions():
    run, module, data = table_run(TableMonitor("kind"))
    train, test = data.train_table, data.test_table
    with module.noise.of("table"):
        fake = module.synthesize(len(train["x"]))
    marginals = marginal_distances(train, fake, ["kind"])
    expected = {
        "quality/marginals": sum(marginals.values()) / 3,
        "quality/correlations": correlation_difference(train, fake, ["kind"]),
        "quality/efficacy": efficacy(train, test, fake, "kind", ["kind"]).ratio,
    }
    found = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("quality/")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(0 < value < 2 for value in found.values())


def test_tables_of_ones_own():
    data = Table(rows(), components=2, batch_size=12)
    train, test = ({name: column[:n] for name, column in rows().items()} for n in (40, 20))
    run, module, _ = table_run(TableMonitor("y", train, test, name="table"), data=data)
    with module.noise.of("table"):
        fake = module.synthesize(40)
    expected = efficacy(train, test, fake, "y").ratio
    assert run.callback_metrics["table/efficacy"].item() == pytest.approx(expected, rel=1e-6)
    assert run.callback_metrics["table/correlations"].item() == pytest.approx(
        correlation_difference(train, fake), rel=1e-6
    )


def test_without_a_target_there_is_no_efficacy_and_of_one_column_no_correlation():
    run, *_ = table_run(TableMonitor(train=rows()))
    assert {name for name in run.callback_metrics if "quality" in name} == {"quality/marginals", "quality/correlations"}
    data = Table({"kind": ["a", "b", "b"] * 20}, batch_size=12)
    run, *_ = table_run(TableMonitor(), data=data)
    assert {name for name in run.callback_metrics if "quality" in name} == {"quality/marginals"}


def test_numbers_that_are_categories_are_discrete():
    table = rows() | {"code": [1, 2, 4] * 30}
    data = Table(table, ["kind", "code"], components=2, batch_size=12)
    run, module, _ = table_run(TableMonitor(), data=data)
    with module.noise.of("table"):
        fake = module.synthesize(len(data.train_table["x"]))
    marginals = marginal_distances(data.train_table, fake, ["kind", "code"])
    assert marginals != marginal_distances(data.train_table, fake)
    assert run.callback_metrics["quality/marginals"].item() == pytest.approx(sum(marginals.values()) / 4, rel=1e-6)


def test_a_run_is_the_same_with_and_without_tables_being_measured():
    ends = []
    for callbacks in [], [TableMonitor("kind")]:
        _, module, _ = table_run(GeneratorEMA(), *callbacks, max_epochs=2)
        ends.append((weights(module), torch.get_rng_state(), module.noise.draw, module.iteration))
        assert module.training
    (one, state, *rest), (other, after, *last) = ends
    assert torch.equal(one, other)
    assert torch.equal(state, after)
    assert rest == last
    assert rest[1] == 12


def test_a_sanity_check_measures_no_table(monkeypatch):
    calls = []
    monkeypatch.setattr(
        TableSynthesis, "synthesize", lambda self, n: calls.append(self.trainer.sanity_checking) or rows(n)
    )
    run, *_ = table_run(TableMonitor(), num_sanity_val_steps=1)
    assert calls == [False]
    assert math.isfinite(run.callback_metrics["quality/marginals"])


def test_tables_are_measured_in_validation_alone():
    data = Table(rows(), components=2, batch_size=12)
    module = TableSynthesis(Mixer, nn.Linear, data.columns, latent_dim=4, pac=2)
    [values] = trainer(callbacks=[TableMonitor("kind")]).validate(module, datamodule=data, verbose=False)
    assert {"quality/marginals", "quality/correlations", "quality/efficacy"} <= {*values}


def test_runs_without_tables_are_refused():
    with pytest.raises(MisconfigurationException, match="but the run trains GANModule: remove TableMonitor"):
        trainer(callbacks=[TableMonitor()]).fit(small(), loader(points(2)))
    data = Table(rows(), components=2, batch_size=12)
    module = TableSynthesis(Mixer, nn.Linear, data.columns, latent_dim=4, pac=2)
    loaders = [DataLoader(data.train_dataloader(), batch_size=None) for _ in range(2)]
    for monitor in (TableMonitor(), TableMonitor("kind", train=rows())):
        with pytest.raises(MisconfigurationException, match="TableMonitor compares with real rows: give it"):
            trainer(callbacks=[monitor], num_sanity_val_steps=0).fit(module, *loaders)
    with pytest.raises(MisconfigurationException, match="there is no column 'price'; the table has x, y, kind"):
        table_run(TableMonitor("price"))
    with pytest.raises(ValueError, match="`target` must be of type str, got 3"):
        TableMonitor(3)
    with pytest.raises(ValueError, match="`name` must be of type str, got None"):
        TableMonitor(name=None)


class WithoutRows(LightningDataModule):
    """A data module whose validation is empty."""

    def train_dataloader(self):
        return loader(TRAIN)

    def val_dataloader(self):
        return []


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("sanity", [0, 2])
def test_an_empty_validation_is_told(sanity):
    sentence = "PairedMonitor measures in validation, and this run has none: give it a validation loader"
    run = trainer(callbacks=[PairedMonitor({"psnr": psnr()})], num_sanity_val_steps=sanity)
    with pytest.warns(UserWarning, match=sentence):
        run.fit(tokenizer(), WithoutRows())
    data = Table(rows(), components=2, batch_size=12, holdout=0)
    with pytest.warns(UserWarning, match="TableMonitor measures in validation, and this run has none"):
        table_run(TableMonitor(), data=data, num_sanity_val_steps=sanity)
    with pytest.warns(UserWarning, match="TableMonitor measures in validation, and this run has none"):
        table_run(TableMonitor(), limit_val_batches=0, num_sanity_val_steps=sanity)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*measures in validation")
        table_run(TableMonitor(), num_sanity_val_steps=sanity)


def test_a_target_without_held_out_rows_is_refused():
    data = Table(rows(), components=2, batch_size=12, holdout=0)
    with pytest.raises(MisconfigurationException, match="of held-out rows, and there are none: set `holdout` of the"):
        table_run(TableMonitor("kind"), data=data)


def test_rows_that_fill_no_pack_are_measured():
    class Pairs(GANModule):
        def unpack(self, batch):
            return batch + 1, batch

    x = torch.randn(97, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = Pairs(nn.Linear(2, 2), Packed(MLP([4, 8, 1]), 2))
    found = trainer(callbacks=[PairedMonitor({"mse": MeanSquaredError()})]).validate(
        module, [DataLoader(x, 33), DataLoader(x + 5, 32)], verbose=False
    )
    expected = (module.generator(x) - (x + 1)).square().mean().item()
    assert found[0]["quality/mse"] == pytest.approx(expected, rel=1e-5)
