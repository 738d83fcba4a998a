"""Evaluations: the run's own values, intervals that hold what they say, differences beyond noise, whole files."""

import csv
import errno
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from scipy.stats import binomtest
from toys import Copier, small, trainer

from lightning_gan_stability import MLP, Digits, GANModule, MemorizationMonitor, PairedMonitor, QualityMonitor, Ring
from lightning_gan_stability.cli import main, results
from lightning_gan_stability.evaluation import Evaluation, compare, evaluate
from lightning_gan_stability.metrics import density_coverage, frechet_distance, kernel_distance
from lightning_gan_stability.metrics.features import mmd_bias
from lightning_gan_stability.metrics.uncertainty import Interval, halved, interval, variance

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),  # sys.argv is pytest's
    pytest.mark.filterwarnings("ignore:MemorizationMonitor has .* held-out samples"),
]

FEW = {"n_samples": 100, "every": 2}
CHECKPOINT = Path("run/version_0/checkpoints/last.ckpt")


def ring(**kwargs):
    return Ring(batch_size=32, epoch_length=6, val_samples=120, **kwargs)


def config(**trainer_arguments):
    measure = {"class_path": "QualityMonitor", "init_args": FEW}
    save = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_last": True}}
    return {
        "model": {
            "generator": {"class_path": "MLP", "init_args": {"sizes": [4, 8, 2]}},
            "discriminator": {"class_path": "MLP", "init_args": {"sizes": [2, 8, 1]}},
            "latent_dim": 4,
        },
        "data": {"class_path": "Ring", "init_args": {"batch_size": 32, "epoch_length": 6, "val_samples": 120}},
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "run"}},
            "callbacks": [measure, save],
        }
        | trainer_arguments,
    }


@pytest.fixture
def fitted(monkeypatch):
    """The folder of a run from a config, without what it has printed."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    def fitted(**trainer_arguments):
        Path("config.yaml").write_text(yaml.safe_dump(config(**trainer_arguments)))
        main(["fit", "--config", "config.yaml"])
        Path("config.yaml").unlink()
        return "run/version_0"

    return fitted


def out(file="out.json"):
    return json.loads(Path(file).read_text())


def shifted(by=3.0, name=None):
    module = small()
    torch.nn.init.constant_([*module.generator.parameters()][-1], by)
    return module


# ---------- the values are the run's


def test_a_run_has_all_that_it_takes_and_values_are_those_that_it_measured(fitted, capsys):
    folder = fitted()
    main(["evaluate", folder, "--out", "out.json", "--bootstrap", "5"])
    lines = Path(folder, "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["quality/fid"]]
    logged = {key.removeprefix("quality/"): float(x) for key, x in rows[-1].items() if x and "quality/" in key}
    assert rows[-1]["step"] == "4"
    (found,) = out()["checkpoints"]
    values = {name: metric["value"] for name, metric in found["metrics"].items() if metric["value"] is not None}
    own = {name: x for name, x in values.items() if not name.startswith("memorization/")}
    assert {"fid", "kid", "precision", "recall", "density", "coverage", "modes", "missing"} <= {*own} | {"reverse_kl"}
    assert own == {name: logged[name] for name in own}
    protocol = out()["protocol"]
    assert (protocol["n_real"], protocol["n_fake"], protocol["split"]) == (100, 100, "train")
    assert found["step"] == 4
    assert "fid" in capsys.readouterr().out


def test_what_the_command_line_says_comes_before_the_config(fitted):
    asked = ["--n", "60", "--n-real", "80", "--metrics", "fid,recall", "--split", "val"]
    main(["evaluate", fitted(), *asked, "--out", "out.json", "--bootstrap", "5"])
    assert [name for name in out()["checkpoints"][0]["metrics"] if "memorization" not in name] == [
        "fid",
        "recall",
        "missing",
        "imbalance",
    ]
    protocol = out()["protocol"]
    assert [protocol[x] for x in ("n_fake", "n_real", "split", "resamples")] == [60, 80, "val", 5]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_agree(stage):
    monitor, module = QualityMonitor(**FEW), small()
    getattr(trainer(callbacks=[monitor]), stage)(module, ring(), verbose=False)
    found = evaluate(module, ring(), QualityMonitor(**FEW), stage=stage, resamples=0)
    assert {name: found.values[name] for name in monitor.values} == monitor.values
    assert found.null == monitor.null
    assert found.intervals == {}


def test_no_validation_data_are_needed():
    module = GANModule(MLP([4, 64], output_shape=[1, 8, 8]), MLP([64, 1]), latent_dim=4)
    monitor = QualityMonitor(torch.nn.Flatten(), ["fid"], **FEW)
    found = evaluate(module, Digits(holdout=0), monitor, resamples=0)
    assert found.values["fid"] > 0
    assert found.notes == ["memorization: not tested, since the data module holds out no samples"]


def test_it_leaves_no_trace():
    module, before = small().train(), torch.get_rng_state()
    weights = {name: x.clone() for name, x in module.named_parameters()}
    evaluate(module, ring(), QualityMonitor(**FEW), resamples=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, weights[name]) for name, x in module.named_parameters())


def test_the_last_weights_on_wish(fitted):
    average = {"class_path": "GeneratorEMA", "init_args": {"decay": 0.9}}
    folder = fitted(callbacks=[*config()["trainer"]["callbacks"], average])
    for name, more in {"average.json": [], "last.json": ["--no-average"]}.items():
        main(["evaluate", folder, "--metrics", "fid", "--bootstrap", "0", "--out", name, *more])
    (average,), (last,) = (out(name)["checkpoints"] for name in ("average.json", "last.json"))
    assert (average["weights"], last["weights"]) == ("average", "last")
    assert average["metrics"]["fid"]["value"] != last["metrics"]["fid"]["value"]


class Noisy(torch.nn.Module):
    """A generator that returns its condition, a little off."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x):
        return x + self.shift


class Same(GANModule):
    def unpack(self, batch):
        return batch, batch


def test_paired_metrics_are_those_of_validation():
    from torchmetrics import MeanSquaredError

    torch.manual_seed(0)
    module = Same(Noisy(), MLP([2, 8, 1]))
    found = evaluate(
        module, ring(), QualityMonitor(metrics=["fid"], **FEW), [PairedMonitor({"mse": MeanSquaredError()})]
    )
    assert found.values["mse"] == pytest.approx(0.25**2)
    assert found.lower_is_better["mse"]


def test_copies_are_found_where_there_are_samples_to_compare_with():
    rows = torch.cat([ring().train_dataloader().batch(i) for i in range(6)])
    module = GANModule(Copier(rows, share=1.0), MLP([2, 8, 1]), latent_dim=4)
    found = evaluate(module, ring(), QualityMonitor(metrics=["fid"], **FEW), resamples=0)
    assert found.values["memorization/p"] < 0.01
    assert found.values["memorization/copied"] > 0.5
    asked = MemorizationMonitor(n_train=100, n_samples=200, name="copies", pairs=0)
    found = evaluate(module, ring(), QualityMonitor(metrics=["fid"], **FEW), (), asked, resamples=0)
    assert "copies/p" in found.values


# ---------- intervals


def fid(real, fake):
    return {"fid": frechet_distance(real, fake)}


def test_halves_are_disjoint_and_of_each_side():
    seen = []
    x, y = torch.arange(20.0)[:, None], 100 + torch.arange(15.0)[:, None]

    def look(real, fake):
        seen.append((real, fake))
        return {"n": float(len(fake))}

    assert halved(look, x, y, splits=3)["n"].tolist() == [[7.0, 7.0]] * 3
    for a, b in zip(seen[::2], seen[1::2], strict=True):
        assert sorted(torch.cat([a[0], b[0]]).flatten().tolist()) == x.flatten().tolist()
        assert len(torch.cat([a[1], b[1]]).unique()) == 14
    again = halved(lambda a, b: {"s": float(a.sum())}, x, y, splits=2, seed=1)["s"]
    assert torch.equal(again, halved(lambda a, b: {"s": float(a.sum())}, x, y, splits=2, seed=1)["s"])


def test_the_variance_of_a_mean_is_that_of_the_textbook():
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double()
    found = halved(lambda a, b: {"mean": float(a.mean())}, x, x, splits=4000)["mean"]
    assert variance(found) == pytest.approx(x.var().item() / 200, rel=0.08)


CASES = {"equal": (1.0, 0.0), "other": (1.3, 0.5)}


def simulated(measure, case, dim=3, n=80, splits=12, runs=60):
    """The share of intervals that hold the mean over runs, per metric."""
    random, found = torch.Generator().manual_seed(0), []
    scale, shift = CASES[case]
    for _ in range(runs):
        real, fake = torch.randn(n, dim, generator=random), torch.randn(n, dim, generator=random) * scale + shift
        halves = halved(measure, real, fake, splits)
        bias = mmd_bias(real.double(), fake.double())
        values = measure(real, fake)
        found.append((values, {name: interval(name, x, halves[name], n, bias=bias) for name, x in values.items()}))
    means = {name: sum(values[name] for values, _ in found) / runs for name in found[0][0]}
    return {name: sum(ends[name].low <= x <= ends[name].high for _, ends in found) for name, x in means.items()}


@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_the_mean_of_other_samples(case):
    """As many as they say, as far as 60 runs can tell; examples/benchmarks/evaluation.py has 200 of more samples."""

    def measure(real, fake):
        density, coverage = density_coverage(real, fake)
        return {"kid": kernel_distance(real, fake), "density": density, "coverage": coverage} | fid(real, fake)

    for name, held in simulated(measure, case).items():
        assert binomtest(held, 60, 0.95).pvalue > 0.005, (name, held)


def test_a_plain_bootstrap_would_not():
    """Repeated samples make the distance of equal distributions larger, by as much as it is."""
    random, held = torch.Generator().manual_seed(0), 0
    samples = [[torch.randn(80, 8, generator=random) for _ in range(2)] for _ in range(40)]
    mean = sum(frechet_distance(*pair) for pair in samples) / 40
    for pair in samples:
        drawn = [[x[torch.randint(80, (80,), generator=random)] for x in pair] for _ in range(50)]
        low, high = torch.tensor([frechet_distance(*x) for x in drawn]).quantile(torch.tensor([0.025, 0.975])).tolist()
        held += low <= mean <= high
    assert held < 10


def test_a_share_of_nothing_has_an_interval():
    low, high = interval("recall", 0.0, torch.zeros(20, 2), 100)
    assert (low, high) == (0.0, pytest.approx(0.0417, abs=1e-3))  # Wilson's, by t of 20 degrees of freedom
    assert interval("precision", 1.0, torch.ones(20, 2), 100).high == pytest.approx(1.0)


# ---------- differences


def test_a_worse_generator_is_worse_beyond_noise():
    found = [
        evaluate(module, ring(), QualityMonitor(**FEW), name=name, resamples=20)
        for name, module in {"A": shifted(9.0), "B": small()}.items()
    ]
    (difference,) = (x for x in compare(found) if x.metric == "fid")
    assert difference.better == "B"
    assert 0 < difference.low < difference.value < difference.high
    assert str(difference).startswith("fid: B is better than A by ")


def test_a_generator_is_no_better_than_itself():
    found = [evaluate(small(), ring(), QualityMonitor(**FEW), name=name, resamples=5) for name in "AB"]
    assert {(x.value, x.better) for x in compare(found)} == {(0.0, None)}
    assert "no difference" in str(compare(found)[0])


def scored(name, halves, **kwargs):
    value = halves.mean().item()
    return Evaluation(name, {"fid": value}, {}, {}, kwargs, halves={"fid": halves})


def test_what_generators_share_cancels():
    """The same samples lie in the same halves."""
    shared = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0, -1.0]])
    (difference,) = compare([scored("A", shared), scored("B", shared + 0.1)])
    assert difference.better == "A"
    (alone,) = compare([scored("A", shared), scored("B", shared.flip(0) + 0.1)])
    assert alone.better is None


def test_more_comparisons_ask_for_more():
    """With three generators each of three differences has a third of the error."""
    halves = torch.randn(3, 400, 2, generator=torch.Generator().manual_seed(0))
    two = compare([scored("A", halves[0]), scored("B", halves[1])])
    three = compare([scored(name, x) for name, x in zip("ABC", halves, strict=True)])
    from scipy.stats import t

    wider = t.ppf(1 - 0.05 / 6, 400) / t.ppf(1 - 0.05 / 2, 400)
    assert three[0].high - three[0].low == pytest.approx(wider * (two[0].high - two[0].low))
    assert len(three) == 3


def test_other_protocols_do_not_compare():
    halves = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="Values of different protocols do not compare: these differ in n_real"):
        compare([scored("A", halves, n_real=5), scored("B", halves, n_real=6)])
    with pytest.raises(ValueError, match="`evaluations` must be of different names"):
        compare([scored("A", halves), scored("A", halves)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "fit"}, "`stage` must be one of"),
        ({"resamples": 1}, "`resamples` must be 0, or at least 2"),
        ({"level": 1.0}, r"`level` must be in \(0, 1\)"),
        ({"seed": -1}, "`seed` must be an integer"),
        ({"monitor": "fid"}, "`monitor` must be of type QualityMonitor"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(small(), ring(), **arguments)


def test_too_few_samples_to_be_halved():
    with pytest.raises(ValueError, match="`fake` must have at least 12 samples to be halved, got 11"):
        halved(fid, torch.zeros(12, 1), torch.zeros(11, 1))


# ---------- files and tables


def three():
    names, values = "ABC", {"fid": 1.23456789, "reverse_kl": math.inf, "recall": 0.5}
    ends = {"fid": Interval(-123456.789, 123456.789)}
    protocol = {"extractor": "Identity", "resamples": 200, "level": 0.95, "seed": 0, "n_real": 50000, "n_fake": 50000}
    found = [
        Evaluation(name, values, ends, {"fid": 0.1}, protocol, halves={"fid": torch.randn(9, 2)}) for name in names
    ]
    checkpoints = {name: results.Checkpoint(Path(f"{name}.ckpt"), 7, "last") for name in names}
    return results.Results(found, compare(found), checkpoints)


def test_a_terminal_of_120_columns_is_wide_enough():
    lines = results.as_text(three()).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("metric ") for line in lines) == 2  # the third beside its own real data


def test_a_table_in_markdown_has_the_protocol():
    lines = results.as_markdown(three()).splitlines()
    assert lines[0] == "| metric | A | B | C | real halves |"
    assert {line.count("|") for line in lines[:5]} == {6}
    assert any(line.startswith("Protocol: extractor Identity") for line in lines)


def test_csv_and_json_have_everything(tmp_path):
    results.write(three(), [tmp_path / "new" / "a.csv", tmp_path / "a.json"])
    rows = [*csv.DictReader((tmp_path / "new" / "a.csv").read_text().splitlines())]
    assert len(rows) == 9
    assert rows[0] == {
        "checkpoint": "A.ckpt",
        "step": "7",
        "metric": "fid",
        "value": "1.23456789",
        "low": "-123456.789",
        "high": "123456.789",
        "null": "0.1",
    }
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found["checkpoints"][1]["metrics"]["reverse_kl"]["value"] is None
    assert [x["first"] + x["second"] for x in found["differences"]] == ["AB", "AC", "BC"]


def test_nothing_is_lost_on_a_full_disk(tmp_path, monkeypatch):
    first, second = tmp_path / "a.csv", tmp_path / "a.json"
    first.write_text("of yesterday")
    write_text = Path.write_text

    def full(file, text, **kwargs):
        if "json" in file.name:
            write_text(file, text[:10], **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write_text(file, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"could not be written to .*No space left on device"):
        results.write(three(), [first, second])
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
    assert first.read_text() == "of yesterday"


# ---------- what is refused


@pytest.fixture
def complaint(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gan-stability"])

    def complaint(*args):
        with pytest.raises((ValueError, OSError, MisconfigurationException)) as found:
            main(["evaluate", *args])
        return str(found.value)

    return complaint


def test_files_that_exist_are_kept(complaint):
    Path("a.json").write_text("{}")
    assert complaint("none.ckpt", "--out", "a.json") == "'a.json' exists: add --overwrite, or name another file."
    assert "There is no checkpoint" in complaint("none.ckpt", "--out", "a.json", "--overwrite")
    assert "`--out` must end in .json, .csv, .md" in complaint("none.ckpt", "--out", "a.txt")
    Path("b.md").mkdir()
    assert "is a folder" in complaint("none.ckpt", "--out", "b.md")
    assert Path("a.json").read_text() == "{}"


def test_torn_and_foreign_checkpoints(complaint):
    module = small()
    run = trainer(max_steps=0)
    run.fit(module, ring())
    run.save_checkpoint("good.ckpt")
    Path("torn.ckpt").write_bytes(Path("good.ckpt").read_bytes()[:1000])
    torch.save({"state_dict": {}}, "foreign.ckpt")
    for file, message in {"torn.ckpt": "is torn", "foreign.ckpt": "is no checkpoint of a GANModule"}.items():
        assert message in complaint("good.ckpt", file, "--model", f"{__name__}.small", "--data", "Ring")
    assert "Nothing says which data" in complaint("good.ckpt", "--model", f"{__name__}.small")


BAD_OPTIONS = [
    (["--n-real", "many"], "`--n-real` must be an integer or all"),
    (["--metrics", "fit"], "`metrics` must be some of"),
    (["--data", "NoData"], "`--data` must be a name of the package, a dotted path"),
    (["--data", "MLP"], "cannot be made without arguments"),
    (["--data", "torch.nn.Identity"], "`--data` must be a data module or a folder, got a Identity"),
    (["--extractor", "Ring"], "`--extractor` must be a torch.nn.Module, got a Ring"),
    (["--monitor", "other"], "must be the name of a QualityMonitor of the config: there is quality"),
    (["--config", "none.yaml"], "cannot be read as a config"),
    (["--config", "list.yaml"], "is no config of a run"),
    (["--config", "empty.yaml"], "it has no `model`"),
    (["--data", "."], "the generator makes samples of shape"),
]


def test_bad_options(fitted, complaint):
    Path("list.yaml").write_text("[1]")
    Path("empty.yaml").write_text("{data: Ring}")
    folder = fitted()
    for options, message in BAD_OPTIONS:
        assert message in complaint(folder, *options)


def test_a_config_that_lies_beside_a_checkpoint_is_not_trusted(fitted, complaint):
    folder = fitted()
    file = Path(folder, "config.yaml")
    content = yaml.safe_load(file.read_text())
    content["data"] = {"class_path": "antigravity.Fly"}
    file.write_text(yaml.safe_dump(content))
    assert "names `antigravity.Fly`, which would be imported: add `--trust antigravity`" in complaint(folder)
    main(["evaluate", folder, "--data", "Ring", "--bootstrap", "0", "--metrics", "fid"])  # which needs it no more


# ---------- more on the command line


def test_several_checkpoints_make_a_table(fitted, capsys):
    folder = fitted()
    checkpoints = [str(file) for file in sorted(Path(folder, "checkpoints").glob("epoch*.ckpt"))]
    checkpoints.append(folder)
    capsys.readouterr()
    main(["evaluate", *checkpoints, "--metrics", "fid,recall", "--out", "a.md", "--bootstrap", "10"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert "A and B: no difference larger than noise in fid, recall" in text  # the same weights, twice
    assert Path("a.md").read_text().startswith("| metric | A | B | real halves |")


def test_metrics_beside_targets_are_those_of_the_config(fitted):
    """Without a word on trust: they are of torchmetrics."""
    paired = {
        "class_path": "PairedMonitor",
        "init_args": {"metrics": {"mse": {"class_path": "torchmetrics.regression.MeanSquaredError"}}},
    }
    folder = fitted(callbacks=[*config()["trainer"]["callbacks"], paired])
    main(["evaluate", folder, "--metrics", "fid", "--out", "out.json", "--bootstrap", "0"])
    assert out()["checkpoints"][0]["metrics"]["mse"]["value"] > 0


def image_gan():
    torch.manual_seed(0)
    return GANModule(MLP([4, 64], output_shape=[1, 8, 8]), MLP([64, 1]), latent_dim=4)


def test_images_of_a_folder(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gan-stability"])
    Path("images").mkdir()
    random = torch.Generator().manual_seed(0)
    for i in range(64):
        pixels = torch.randint(256, (9, 12), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"images/{i}.png")
    run = trainer(max_steps=0)
    run.fit(image_gan(), Digits())
    run.save_checkpoint("a.ckpt")
    more = ["--model", f"{__name__}.image_gan", "--extractor", "torch.nn.Flatten", "--n", "50", "--metrics", "fid,kid"]
    main(["evaluate", "a.ckpt", "--data", "images", *more, "--out", "out.json", "--bootstrap", "3"])
    assert out()["protocol"]["n_real"] == 50
    assert out()["checkpoints"][0]["metrics"]["kid"]["low"] is not None
