"""Sweeps: what is refused, what is drawn, run, pruned, gone on with and found."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml
from browsers import DRAWN, chromium, complaints, needs_chromium

from lightning_gan_stability.cli import main
from lightning_gan_stability.cli.sweep import sweep
from lightning_gan_stability.cli.sweep_optuna import Studies, environment_of, importance, run_trials
from lightning_gan_stability.cli.sweep_plan import make_plan, read_plan
from lightning_gan_stability.cli.sweep_results import as_text, evaluate, write_results
from lightning_gan_stability.cli.sweep_space import read_space
from lightning_gan_stability.cli.sweep_trial import Measured, Process, Record, result
from lightning_gan_stability.cli.sweep_wandb import sweep_of
from lightning_gan_stability.cli.training import look_up, read_config
from lightning_gan_stability.metrics import expected_best

CONFIG = """
model:
  generator: {class_path: MLP, init_args: {sizes: [4, 8, 2]}}
  discriminator: {class_path: MLP, init_args: {sizes: [2, 8, 1]}}
  latent_dim: 4
  loss: NonSaturating
  g_optimizer: {class_path: Adam, init_args: {lr: 1.0e-3}}
  d_optimizer: {class_path: Adam, init_args: {lr: 1.0e-3}}
data: {class_path: Ring, init_args: {batch_size: 16, val_samples: 50}}
trainer:
  accelerator: cpu
  max_steps: 4
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger: {class_path: CSVLogger, init_args: {save_dir: runs, name: toy}}
  callbacks:
  - {class_path: R1Penalty, init_args: {gamma: 1.0}}
  - {class_path: QualityMonitor, init_args: {every: 2, n_samples: 50, metrics: [fid]}}
  - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 4, dirpath: kept, save_last: true}}
"""
SPACE = {
    "model.g_optimizer.lr": {"log_uniform": [1e-4, 1e-1]},
    "trainer.callbacks.R1Penalty.gamma": {"uniform": [0.0, 2.0]},
}
SWEEP = {
    "config": "toy.yaml",
    "search_space": SPACE,
    "metric": "quality/fid",
    "study": "found",
    "trials": 2,
    "sampler": "random",
    "jobs": 0,
}
SIDES = {"search_space": {"model.loss": ["Hinge", "Wasserstein"]} | SPACE, "side_by_side": "model.loss"}

pytestmark = pytest.mark.filterwarnings("ignore:The distribution is specified by")


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database without a study, which takes half a second to make."""
    file = tmp_path_factory.mktemp("empty") / "study.db"
    optuna.storages.RDBStorage(f"sqlite:///{file}")
    return file


@pytest.fixture(autouse=True)
def _config(tmp_path, monkeypatch, empty):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    Path("toy.yaml").write_text(CONFIG)
    Path("runs/found").mkdir(parents=True)
    shutil.copy(empty, "runs/found/study.db")


def plan(**changes):
    """As the config is checked for half a second, once for all tests."""
    key = repr(changes)
    if key not in PLANS:
        PLANS[key] = make_plan(SWEEP | changes)
    return PLANS[key]


PLANS = {}


def write(file="search.yaml", **changes):
    Path(file).write_text(yaml.safe_dump(SWEEP | changes))
    return file


# ---------- best quality against budget


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("level", [0.9, 0.5])
def test_the_best_of_k_is_that_of_all_choices(lower, level):
    source = random.Random(0)
    values = [source.gauss(0, 1) for _ in range(7)] + [0.25, 0.25]
    found = expected_best(values, lower, level)
    best = min if lower else max
    for k in range(1, 10):
        bests = sorted(best(chosen) for chosen in itertools.combinations(values, k))
        assert found.mean[k - 1] == pytest.approx(statistics.mean(bests), rel=1e-9)
        outside = (1 - level) / 2 * len(bests) + 1e-6
        for end in (found.low[k - 1], found.high[k - 1]):
            assert end in values
        assert sum(value < found.low[k - 1] for value in bests) <= outside
        assert sum(value > found.high[k - 1] for value in bests) <= outside
        # and no narrower band would do
        assert sum(value <= found.low[k - 1] for value in bests) > outside - 2e-6
        assert sum(value >= found.high[k - 1] for value in bests) > outside - 2e-6


def test_trials_that_gave_nothing_are_infinite():
    found = expected_best([1.0, math.inf, 2.0])
    assert found.mean[:2] == [math.inf, pytest.approx(4 / 3)]
    assert found.mean[2] == 1.0
    assert expected_best([1.0, -math.inf], lower_is_better=False).mean == [-math.inf, 1.0]


def test_a_long_list_has_no_overflow():
    values = [float(i) for i in range(3000)]
    # the least of k of 0 ... n - 1 is (n - k) / (k + 1) on average
    assert expected_best(values).mean[99] == pytest.approx(2900 / 101, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([],), "`values` must be at least one number"),
        (([1.0, math.nan],), "none of them NaN"),
        (([1.0], 1), "`lower_is_better` must be True or False"),
        (([1.0], True, 1.0), "`level` must be in \\[0, 1\\)"),
    ],
)
def test_bad_arguments_of_the_curve(arguments, match):
    with pytest.raises(ValueError, match=match):
        expected_best(*arguments)


def test_a_trial_is_worth_its_last_or_its_best_measurement():
    assert result([3.0, 1.0, 2.0], "last", "min") == 2.0
    assert result([3.0, 1.0, 2.0], "best", "max") == 3.0
    assert result([math.nan, 2.0], "best", "min") == 2.0


# ---------- what is refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"search_spase": {}}, "no entry `search_spase`: did you mean search_space"),
        ({"config": None}, "needs `config`, such as"),
        ({"metric": None}, "needs `metric`, such as"),
        ({"config": "toi.yaml"}, "no file 'toi.yaml': did you mean toy.yaml"),
        ({"search_space": 3}, "`search_space` must have keys"),
        ({"search_space": {"model.g_optimizer.lr": {"log_unifrm": [1, 2]}}}, "`log_unifrm`: did you mean log_uniform"),
        ({"search_space": {"model.g_optimizer.lr": 3}}, "must have a distribution such as"),
        ({"search_space": {"model.g_optimizer.lr": {"uniform": [0, 1], "choice": [1]}}}, "have one distribution"),
        (
            {"search_space": {"model.g_optimizer.lr": {"uniform": [1, 0]}}},
            "from the lower to the higher of two numbers",
        ),
        ({"search_space": {"model.g_optimizer.lr": {"log_uniform": [0, 1]}}}, "begins above 0, got 0"),
        ({"search_space": {"model.g_optimizer.lr": {"uniform": [0, 1], "log": True}}}, "`log` of .* belongs beside"),
        ({"search_space": {"data.seed": {"integer": [0, 1.5]}}}, "two integers, got"),
        ({"search_space": {"model.loss": {"choice": ["Hinge", "Hinge"]}}}, "different values to choose from"),
        ({"search_space": {"model.g_optimzer.lr": [1, 2]}}, "`model.g_optimzer.lr`: did you mean model.g_optimizer"),
        ({"search_space": {"model.g_optimizer.lrr": [1]}}, "did you mean model.g_optimizer.lr"),
        ({"search_space": {"trainer.callbacks.R2Penalty.gamma": [1]}}, "no R2Penalty: did you mean R1Penalty"),
        ({"search_space": {"trainer.callbacks.R1Penalty.gama": [1]}}, "mean trainer.callbacks.R1Penalty.gamma"),
        ({"search_space": {"model.augment.p": [1]}}, "`model.augment` is null in the config, and has no `p`"),
        ({"search_space": {"model.loss": ["Hinge", "Hing"]}}, "`model.loss` cannot be Hing: .*did you mean Hinge"),
        ({"search_space": {"model.latent_dim": [4, "many"]}}, "`model.latent_dim` cannot be many: .*must be int"),
        ({"settings": {"trainer.max_step": 3}}, "`settings`: .*did you mean trainer.max_steps"),
        ({"settings": [3]}, "`settings` must be keys and values"),
        ({"settings": {"model.g_optimizer.lr": 0.1}}, "below both `settings` and `search_space`"),
        ({"metric": "g/adversarial", "mode": "min"}, "value of quality to prune by, such as quality/fid"),
        ({"metric": "val/loss", "mode": "min"}, "Without pruning, with `pruner: none`"),
        ({"metric": "quality/fit"}, "measures 'quality/fit': did you mean quality/fid"),
        ({"metric": "quality/recall"}, "no monitor of the config measures 'quality/recall'"),
        ({"metric": "quality/fid", "mode": "max"}, "must be min, since lower is better, got max"),
        ({"metric": "own/score", "pruner": "none"}, "needs `mode`: min or max"),
        ({"metric": "own/score", "mode": "up"}, "`mode` must be one of 'min', 'max'"),
        ({"side_by_side": "model.loss"}, "must be a key of the search space with a `choice`, got 'model.loss'"),
        ({"trials": 0}, "`trials` must be a positive integer"),
        ({"jobs": -1}, "`jobs` must be an integer that is not negative"),
        ({"sampler": "grid"}, "`sampler` must be one of 'random', 'tpe'"),
        ({"study": "a/b"}, "`study` must be a name of a folder"),
    ],
)
def test_mistakes_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        plan(**changes)


def test_a_monitor_is_missed():
    Path("toy.yaml").write_text(re.sub(r".*QualityMonitor.*\n", "", CONFIG))
    with pytest.raises(ValueError, match="no callback of the config measures 'quality/fid': add one below `settings`"):
        make_plan(SWEEP)
    added = {"trainer.callbacks+": [{"class_path": "QualityMonitor", "init_args": {"every": 2}}]}
    settings = added | {"trainer.callbacks.QualityMonitor.n_samples": 60}
    assert make_plan(SWEEP | {"settings": settings}).mode == "min"


def test_one_of_two_callbacks_of_a_class_goes_by_its_number():
    more = {"trainer.callbacks+": [{"class_path": "R1Penalty", "init_args": {"gamma": 3.0}}]}
    with pytest.raises(ValueError, match=r"write `trainer.callbacks.0` or `trainer.callbacks.3`"):
        plan(settings=more)
    given = {"trainer.callbacks.3.gamma": {"uniform": [0.0, 1.0]}}
    found = read_config(plan(settings=more, search_space=given).arguments({"trainer.callbacks.3.gamma": 0.5}))
    assert [look_up(found, f"trainer.callbacks.{i}.gamma") for i in (0, 3)] == [1.0, 0.5]


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'serch.yaml': did you mean search.yaml"):
        write() and read_plan("serch.yaml")
    for text, match in {
        "config: [": "this is not YAML",
        "- 3": "a sweep has `config:`",
        "config: toy.yaml\nconfig: toy.yaml\n": "line 2: `config` stands in line 1 already",
    }.items():
        Path("bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=match):
            read_plan("bad.yaml")


def test_numbers_are_those_of_fit_and_configs_lie_beside_the_file(tmp_path):
    """1e-4 is a number there, which YAML 1.1 takes for text."""
    (tmp_path / "deep").mkdir()
    Path("toy.yaml").rename("deep/toy.yaml")
    text = "config: toy.yaml\nmetric: quality/fid\nsearch_space: {model.g_optimizer.lr: {log_uniform: [1e-4, 1e-2]}}\n"
    Path("deep/small.yaml").write_text(text)
    found = read_plan("deep/small.yaml", trials=7)
    assert (found.study, found.trials, found.prune_after) == ("small", 7, 1)
    assert (found.space[0].low, found.space[0].high) == (1e-4, 1e-2)


def test_a_mistake_is_one_line_on_the_command_line(monkeypatch, capsys):
    file = write(search_space={"model.g_optimizer.lrr": [1]})
    monkeypatch.setattr(sys, "argv", ["gan-stability", "sweep", "--config", file])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("gan-stability: error: `search_space`: There is no")


# ---------- settings by name


def test_fit_takes_callbacks_by_their_names():
    main(["fit", "--config", "toy.yaml", "--trainer.callbacks.R1Penalty.gamma=0.25", "--trainer.max_steps=1"])
    saved = yaml.safe_load(Path("runs/toy/version_0/config.yaml").read_text())
    assert look_up(saved, "trainer.callbacks.R1Penalty.gamma") == 0.25
    assert len(saved["trainer"]["callbacks"]) == 3
    with pytest.raises(ValueError, match=r"no setting .*gama`: did you mean trainer.callbacks.R1Penalty.gamma"):
        main(["fit", "--config", "toy.yaml", "--trainer.callbacks.R1Penalty.gama=0.25"])


def test_a_callback_may_be_left_out():
    found = plan(search_space={"trainer.callbacks.R1Penalty": [None, {"class_path": "R2Penalty"}]})
    drawn = [read_config(found.arguments({"trainer.callbacks.R1Penalty": label})) for label in found.space[0].labels]
    names = [[c["class_path"].rpartition(".")[2] for c in content["trainer"]["callbacks"]] for content in drawn]
    assert names == [["QualityMonitor", "ModelCheckpoint"], ["R2Penalty", "QualityMonitor", "ModelCheckpoint"]]


# ---------- from beginning to end


def test_losses_side_by_side(capsys, tmp_path):
    main(["sweep", "--config", write(**SIDES)])
    out = capsys.readouterr().out
    home = Path("runs/found")
    folders = [home / loss / f"trial_{i}" for loss in ("Hinge", "Wasserstein") for i in range(2)]
    assert sorted(home.glob("*/trial_*")) == folders
    # each the same draws, of which the whole config is there
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    for key in SPACE:
        drawn = [look_up(config, key) for config in configs]
        assert drawn[:2] == drawn[2:]
        assert len({*drawn}) == 2
    assert [look_up(config, "model.loss.class_path").rpartition(".")[2] for config in configs] == [
        "Hinge", "Hinge", "Wasserstein", "Wasserstein",
    ]  # fmt: skip
    assert not Path("kept").exists()
    assert all((folder / "checkpoints" / "last.ckpt").is_file() for folder in folders)
    # ranked by the last measurement in the logs
    rows = [line.split(",") for line in (home / "trials.csv").read_text().splitlines()]
    column = {name: i for i, name in enumerate(rows[0])}
    values = [float(row[column["quality/fid"]]) for row in rows[1:]]
    assert values == sorted(values)
    logged = [json.loads((f / "events.jsonl").read_text().splitlines()[0])["event"] for f in folders]
    assert logged == ["start"] * 4
    for row in rows[1:]:
        (folder,) = [f for f in folders if str(f) == row[column["folder"]]]
        assert float(row[column["quality/fid"]]) == pytest.approx(last_fid(folder), rel=1e-5)
    assert f"with {values[0]:.5g}." in (home / "sweep.md").read_text()
    assert "expected, and where 90% of searches end" in out
    assert "Importance: " in out
    # the best recipe runs, in the place that the config says, and gives what it gave
    main(["fit", "--config", str(home / "best.yaml")])
    assert last_fid(Path("runs/toy/version_0")) == pytest.approx(values[0], rel=1e-5)
    main(["report", *map(str, folders[:2])])
    assert Path("report.html").is_file()


def last_fid(folder):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return float([row[header.index("quality/fid")] for row in rows if row[header.index("quality/fid")]][-1])


def test_a_sweep_goes_on_with_what_is_missing():
    first = run_trials(plan(trials=1), print)
    before = Path("runs/found/trial_0/metrics.csv").stat().st_mtime_ns
    said = []
    both = run_trials(plan(trials=2), said.append)
    assert Path("runs/found/trial_0/metrics.csv").stat().st_mtime_ns == before
    assert [line.partition(":")[0] for line in said] == ["trial 1"]
    assert both[0] == first[0]
    at_once = Studies(plan(study="other"))
    assert [r.parameters for r in both] == [at_once.claim().trial.params for _ in both]


OTHERS = [
    (
        {"search_space": SPACE | {"model.g_optimizer.lr": {"log_uniform": [1e-5, 1e-1]}}},
        "model.g_optimizer.lr was log_uniform from 0.0001 to 0.1, and is log_uniform from 1e-05 to 0.1",
    ),
    ({"search_space": SPACE | {"data.seed": [0, 1]}}, "data.seed was not there, and is choice of 0, 1"),
    ({"metric": "quality/missing"}, "metric was quality/fid, and is quality/missing"),
    ({"settings": {"trainer.max_steps": 8}}, "config: trainer.max_steps was 4, and is 8"),
    ({"value": "best"}, "value was last, and is best"),
]


def test_another_sweep_under_the_same_name_is_refused():
    Studies(plan())
    Studies(plan(trials=9, jobs=3, seed=1, pruner="none", sampler="tpe"))
    for changes, match in OTHERS:
        with pytest.raises(ValueError, match=f"exists and is another one .*{match}.*Give another `study`"):
            Studies(plan(**changes))


BROKEN = """
from lightning.pytorch import Callback

class Broken(Callback):
    def __init__(self, at: int = 0):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            raise ArithmeticError("no such number")
"""


def broken(jobs, **changes):
    """Of some trials each dies or does not, by what is drawn; the only one in a process of its own dies."""
    Path("broken.py").write_text(BROKEN)
    added = {"trainer.callbacks+": [{"class_path": "broken.Broken"}]}
    space = {"trainer.callbacks.Broken.at": [3] if jobs == 1 else [3, 99]} | SPACE
    trials = {"trials": 1 if jobs == 1 else 3, "jobs": jobs}
    return plan(settings=added, search_space=space, **trials, **changes)


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_trial_that_dies_leaves_its_traceback_and_the_sweep_goes_on(jobs, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    found = broken(jobs=jobs)
    records = run_trials(found, said.append)
    died = [record for record in records if record.parameters["trainer.callbacks.Broken.at"] == 3]
    assert {record.state for record in died} == {"failed"}
    assert {record.state for record in records if record not in died} == (set() if jobs else {"complete"})
    assert len(died) == len(records) if jobs else 0 < len(died) < len(records)
    for record in died:
        assert record.error == "ArithmeticError: no such number"
        assert 'raise ArithmeticError("no such number")' in (record.folder / "traceback.txt").read_text()
        assert any(f"died (ArithmeticError: no such number; see {record.folder})" in line for line in said)
    assert run_trials(found, said.append) == records  # it is not tried again
    assert [record.state for record in evaluate(found, records).records][-len(died) :] == ["failed"] * len(died)


def test_a_sweep_without_a_trial_that_ends_well_fails(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    Path("broken.py").write_text(BROKEN)
    added = {"trainer.callbacks+": [{"class_path": "broken.Broken", "init_args": {"at": 1}}]}
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--config", write(settings=added, trials=1)])
    assert stopped.value.code == 1
    assert not Path("runs/found/best.yaml").exists()
    assert "no such number" in Path("runs/found/sweep.md").read_text()


def test_a_run_that_measures_nothing_says_so():
    records = run_trials(plan(trials=1, settings={"trainer.callbacks.QualityMonitor.every": 50}), print)
    assert "has not measured 'quality/fid' after the first step: let the monitor measure" in records[0].error


def test_a_loss_may_be_searched_by_without_pruning():
    validated = {
        "trainer.limit_val_batches": 1,
        "trainer.val_check_interval": 2,
        "trainer.check_val_every_n_epoch": None,
    }
    found = plan(metric="val/g/adversarial", mode="min", pruner="none", settings=validated, trials=1)
    (record,) = run_trials(found, print)
    assert record.state == "complete"
    assert math.isfinite(record.value)


# ---------- pruning


@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_trials_are_pruned_by_quality(pruner):
    """Made-up measurements: after five trials of 1.0, one of 2.0 ends, and not before it may."""
    found = plan(trials=9, pruner=pruner, prune_after=100, settings={"trainer.max_steps": 400})
    studies = Studies(found)
    for _ in range(5):
        claim = studies.claim()
        assert [studies.report(claim, step, 1.0) for step in (50, 100, 200)] == [False] * 3
        studies.end(claim, "complete")
    bad = studies.claim()
    asked = [studies.report(bad, step, 2.0) for step in (50, 100, 200)]
    assert asked == [False, False, False] if pruner == "none" else not asked[0] and any(asked)
    good = studies.claim()
    assert [studies.report(good, step, 0.5) for step in (50, 100, 200)] == [False] * 3
    if pruner == "median":
        assert studies.end(bad, "pruned").value == 2.0
        assert studies.records()[5].state == "pruned"


def test_tpe_learns_from_trial_to_trial():
    """Of a made-up bowl: distances from its bottom, which random draws have a mean of (400² + 600²) / 2000 of."""
    studies = Studies(plan(trials=25, sampler="tpe", pruner="none", search_space={"data.seed": {"integer": [0, 1000]}}))
    drawn = []
    while (claim := studies.claim()) is not None:
        drawn.append(abs(claim.trial.params["data.seed"] - 400))
        studies.report(claim, 2, float(drawn[-1]))
        studies.end(claim, "complete")
    assert len(drawn) == 25
    assert statistics.mean(drawn[10:]) < 0.6 * 260


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_pruned_run_ends_early(jobs, monkeypatch):
    monkeypatch.setattr(Studies, "report", lambda self, claim, step, value: claim.values.append(value) or step >= 2)
    steps = 4 if jobs == 0 else 100_000
    found = plan(trials=1, settings={"trainer.max_steps": steps})
    (record,) = run_trials(dataclasses.replace(found, jobs=jobs), print)
    assert record.state == "pruned"
    log = Path("runs/found/trial_0/events.jsonl").read_text().splitlines()
    assert "end" not in json.loads(log[-1]) or json.loads(log[-1])["step"] < steps


def test_the_untrained_generator_is_not_reported():
    seen = []
    measured = Measured("quality/fid", lambda step, value: seen.append((step, value)))
    course = SimpleNamespace(name="quality/fid", steps=[0, 2], values=[9.0, 3.0])
    measured._monitor = SimpleNamespace(outcome=lambda trainer: SimpleNamespace(courses=[course]))
    measured._look(SimpleNamespace(is_global_zero=True, callback_metrics={}))
    measured._look(SimpleNamespace(is_global_zero=True, callback_metrics={}))
    assert seen == [(2, 3.0)]


# ---------- several at once


def test_several_share_the_trials():
    """Each number once, whoever takes it."""
    found = plan(trials=4, **SIDES)
    studies = [Studies(found) for _ in range(3)]
    taken, lock = [], threading.Lock()

    def work(own):
        while (claim := own.claim()) is not None:
            with lock:
                taken.append((claim.side, claim.number, claim.trial.params))
            own.report(claim, 2, 1.0)
            own.end(claim, "complete")

    threads = [threading.Thread(target=work, args=(own,)) for own in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((side, number) for side, number, _ in taken) == [
        (side, number) for side in ("Hinge", "Wasserstein") for number in range(4)
    ]
    alone = Studies(dataclasses.replace(found, study="alone"))
    drawn = {(claim.side, claim.number): claim.trial.params for claim in iter(alone.claim, None)}
    assert {(side, number): parameters for side, number, parameters in taken} == drawn


@pytest.mark.parametrize(
    ("given", "jobs", "gpus"),
    [(None, 2, ["0,2", "1,3"]), ("4,5", 3, ["4", "5", "4"]), ("7", 2, ["7", "7"]), (None, 1, [None])],
)
def test_processes_share_cores_and_gpus(given, jobs, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    found = [environment_of(jobs, place) for place in range(jobs)]
    assert [entry.get("CUDA_VISIBLE_DEVICES") for entry in found] == gpus
    assert {entry.get("OMP_NUM_THREADS") for entry in found} == {None if jobs == 1 else str(8 // jobs)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment_of(jobs, 0)["OMP_NUM_THREADS"] == "3"


def test_several_may_make_the_database():
    made, errors = [], []

    def make():
        try:
            made.append(Studies(new))
        except Exception as error:
            errors.append(error)

    new = plan(study="new")
    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(made) == 3


def test_a_trial_whose_process_is_gone_is_run_again():
    studies = Studies(plan())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    studies.me["process"] = gone.pid
    lost = studies.claim()
    again = Studies(plan())
    kept = [again.claim(), again.claim()]
    assert [claim.number for claim in kept] == [0, 1]
    assert again.claim() is None  # these are alive
    assert kept[0].trial.params == lost.trial.params
    assert [record.number for record in again.records()] == [0, 1]


@pytest.mark.timeout(300)
def test_an_interrupt_ends_its_processes_and_the_same_command_goes_on(tmp_path):
    steps = {"trainer.max_steps": 1_000_000, "trainer.callbacks.ModelCheckpoint.every_n_train_steps": 10**6}
    file = write(jobs=1, settings=steps, trials=1, pruner="none")
    running = subprocess.Popen(
        [sys.executable, "-m", "lightning_gan_stability", "sweep", "--config", file],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    folder = Path("runs/found/trial_0")
    deadline = time.monotonic() + 150
    while not (folder / "measurements.jsonl").is_file():
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Broken off with 0 of 1 trials: the same command goes on." in out
    size = (folder / "measurements.jsonl").stat().st_size
    time.sleep(0.5)
    assert size == (folder / "measurements.jsonl").stat().st_size
    again = Studies(read_plan(file)).claim()
    assert again.number == 0
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert {key: look_up(recipe, key) for key in SPACE} == again.trial.params


INTERRUPTED = BROKEN.replace('ArithmeticError("no such number")', "KeyboardInterrupt")


def test_an_interrupt_in_this_process_frees_the_trial(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    Path("interrupted.py").write_text(INTERRUPTED)
    added = {"trainer.callbacks+": [{"class_path": "interrupted.Broken", "init_args": {"at": 2}}]}
    handler = signal.getsignal(signal.SIGINT)
    found = plan(settings=added)
    with pytest.raises(SystemExit) as stopped:
        sweep(found)
    assert stopped.value.code == 130
    assert "Broken off with 0 of 2 trials" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    assert Studies(found).claim().number == 0


def test_a_process_that_is_killed_is_a_failed_trial(tmp_path):
    (tmp_path / "recipe.yaml").write_text("nothing: here")
    process = Process(tmp_path, "quality/fid", os.environ)
    process._process.send_signal(signal.SIGKILL)
    process._process.wait()
    assert process.error == "ended by signal 9"


# ---------- what was found


def record(i, value, state="complete", side="", **parameters):
    return Record(side, i, state, value, parameters, Path("runs", "made", f"trial_{i}"), 1.0, "x" * (state == "failed"))


def test_trials_are_ranked_and_the_curve_counts_the_dead_and_the_pruned():
    found = plan()
    drawn = dict.fromkeys(SPACE, 0.5)
    values = [(3.0, "complete"), (1.0, "complete"), (7.0, "pruned"), (None, "failed"), (None, "running")]
    records = [record(i, value, state, **drawn) for i, (value, state) in enumerate(values)]
    results = evaluate(found, records)
    assert [r.number for r in results.records] == [1, 0, 2, 3, 4]
    assert results.best.number == 1
    assert results.curves[""] == expected_best([3.0, 1.0, 7.0, 7.0])
    assert "failed: x" in as_text(results)
    assert evaluate(dataclasses.replace(found, mode="max"), records).best.number == 0


def test_importance_finds_what_matters():
    found = plan(search_space=SPACE | {"model.loss": ["Hinge", "Wasserstein"]})
    source = random.Random(0)
    losses = ["Hinge", "Wasserstein"]
    drawn = [(10 ** source.uniform(-4, -1), source.uniform(0, 2), source.choice(losses)) for _ in range(60)]
    records = [
        record(i, math.log10(lr) ** 2, **dict(zip([*SPACE, "model.loss"], (lr, gamma, loss), strict=True)))
        for i, (lr, gamma, loss) in enumerate(drawn)
    ]
    parts = importance(found, records)
    assert sum(parts.values()) == pytest.approx(1)
    assert parts["model.g_optimizer.lr"] > 0.9
    assert importance(found, records[:2]) == {}


def test_importance_of_the_sides():
    found = plan(**SIDES)
    draw = random.Random(0).uniform
    records = [
        record(i, float(i % 2), side=["Hinge", "Wasserstein"][i % 2], **{key: draw(1e-3, 1e-1) for key in SPACE})
        for i in range(40)
    ]
    assert importance(found, records)["model.loss"] > 0.9


@needs_chromium
def test_a_browser_shows_the_page():
    found = plan(**SIDES)
    draw = random.Random(0).uniform
    records = [
        record(i // 2, 1 + draw(0, 9), side=["Hinge", "Wasserstein"][i % 2], **{key: draw(1e-3, 1e-1) for key in SPACE})
        for i in range(24)
    ]
    files = write_results(evaluate(found, [*records, record(12, None, "failed", "Hinge")]))
    page = next(file for file in files if file.name == "sweep.html")
    text = page.read_text()
    assert "<script src" not in text
    assert "trial_12/traceback.txt" in text
    with chromium() as browser:
        browser.get(page.resolve().as_uri())
        deadline = time.monotonic() + 20
        while not (drawn := browser.execute_script(DRAWN)) or not all(drawn):
            assert time.monotonic() < deadline, drawn
            time.sleep(0.1)
        assert len(drawn) == 2 + len(SPACE)
        assert complaints(browser) == []


def test_nothing_has_begun(capsys):
    main(["sweep", "--config", write(), "--show"])
    assert capsys.readouterr().out == "No trial has begun yet.\n"


# ---------- other backends

EVERY = {
    "model.loss": ["Hinge", {"class_path": "Relativistic", "init_args": {"reduction": "mean"}}],
    "model.g_optimizer.lr": {"log_uniform": [1e-4, 1e-1]},
    "model.g_optimizer.betas": {"choice": [[0.0, 0.9], [0.5, 0.9]]},
    "model.clip_norm": {"choice": [None, 1.0]},
    "trainer.callbacks.R1Penalty.gamma": {"uniform": [0.0, 2.0]},
    "data.batch_size": {"integer": [8, 64], "log": True},
    "data.seed": {"integer": [0, 9]},
}


def test_a_sweep_of_wandb_is_as_its_own_tools_have_it():
    """The agent's own function writes the arguments, and `fit` reads them."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    found = plan(search_space=EVERY, side_by_side="model.loss", backend="wandb", trials=5)
    assert len(found.sides) == 2
    content = yaml.safe_load(yaml.safe_dump(sweep_of(found, found.sides[1])))
    assert content["metric"] == {"name": "quality/fid", "goal": "minimize"}
    assert (content["method"], content["run_cap"]) == ("random", 5)
    kinds = {key: entry.get("distribution") for key, entry in content["parameters"].items()}
    assert kinds == {
        "model.g_optimizer.lr": "log_uniform_values",
        "model.g_optimizer.betas": None,
        "model.clip_norm": None,
        "trainer.callbacks.R1Penalty.gamma": "uniform",
        "data.batch_size": "q_log_uniform_values",
        "data.seed": "int_uniform",
    }
    ends = {key: (e["values"][0] if "values" in e else e["min"]) for key, e in content["parameters"].items()}
    line = create_sweep_command_args({"args": {key: {"value": value} for key, value in ends.items()}})["args"]
    start = content["command"].index("fit") + 1
    assert content["command"][-1] == "${args}"
    read = read_config([*content["command"][start:-1], *line])
    least = {key: look_up(read, key) for key in ends}
    assert least == {
        "model.g_optimizer.lr": 1e-4,
        "model.g_optimizer.betas": [0.0, 0.9],
        "model.clip_norm": None,
        "trainer.callbacks.R1Penalty.gamma": 0.0,
        "data.batch_size": 8,
        "data.seed": 0,
    }
    assert look_up(read, "model.loss.reduction") == "mean"
    assert look_up(read, "trainer.logger.class_path").endswith("WandbLogger")


def test_a_sweep_of_wandb_passes_its_schema():
    sweeps = pytest.importorskip("sweeps", reason="W&B's own checks need NumPy 1: pip install sweeps")
    found = plan(search_space=EVERY, side_by_side="model.loss", backend="wandb")
    for side in found.sides:
        assert sweeps.schema_violations_from_proposed_config(sweep_of(found, side)) == []


def test_the_command_writes_a_sweep_for_each_side(capsys):
    main(["sweep", "--config", write(**SIDES), "--backend", "wandb"])
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [f"wandb sweep runs/found/wandb_{loss}.yaml" for loss in ("Hinge", "Wasserstein")]
    assert yaml.safe_load(Path("runs/found/wandb_Hinge.yaml").read_text())["name"] == "found/Hinge"


@pytest.mark.filterwarnings("ignore")
def test_the_space_is_the_same_for_ray():
    pytest.importorskip("ray.tune", reason="needs the extra ray")
    for parameter in read_space(EVERY):
        domain = parameter.for_ray()
        drawn = [domain.sample() for _ in range(300)]
        if parameter.kind == "choice":
            assert {*drawn} == {*parameter.labels}
        else:
            assert all(parameter.low <= value <= parameter.high for value in drawn)
            whole = parameter.kind == "integer"
            assert all(isinstance(value, int) for value in drawn) == whole
            if parameter.key == "data.seed":
                assert {*drawn} == {*range(10)}
            if parameter.log:
                middle = math.sqrt(parameter.low * parameter.high)
                assert 0.35 < sum(value < middle for value in drawn) / 300 < 0.65


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(280)
@pytest.mark.skipif("TEST_RAY" not in os.environ, reason="starts a cluster of Ray, minutes: TEST_RAY=1")
def test_a_sweep_on_ray(monkeypatch, tmp_path):
    pytest.importorskip("ray.tune", reason="needs the extra ray")
    monkeypatch.syspath_prepend(tmp_path)
    records = sweep(broken(2, backend="ray"))
    assert len(records) == 3
    for entry in records:
        died = entry.parameters["trainer.callbacks.Broken.at"] == 3
        assert entry.state == ("failed" if died else "complete")
        assert (entry.folder / "traceback.txt").is_file() == died
        assert died or entry.value == pytest.approx(last_fid(entry.folder), rel=1e-5)


@pytest.mark.parametrize("module", ["optuna", "bokeh"])
def test_what_is_not_installed_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"This needs {module}: pip install .*\[sweep\]"):
        sweep(plan())


def test_ray_is_named_if_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"This needs ray: pip install .*\[ray\]"):
        sweep(plan(backend="ray"))
