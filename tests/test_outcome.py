"""The table and the sentence at the end of a run, values in the progress bar, and `validate` and `test`."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError
from toys import small, trainer

from lightning_gan_stability import (
    CollapseDetector,
    HealthMonitor,
    PairedMonitor,
    QualityMonitor,
    Ring,
    SampleLogger,
    Tokenizer,
)
from lightning_gan_stability.metrics import frechet_distance
from lightning_gan_stability.outcome import Course, Outcome, Trouble, describe_outcome, joined, judgement

FEW = {"n_samples": 100, "every": 2}


def fid(*values, real=1.0, **kwargs):
    return Course("quality/fid", [100 * i for i in range(len(values))], values, real, lower_is_better=True, **kwargs)


def recall(*values, real=0.9):
    return Course("quality/recall", [100 * i for i in range(len(values))], values, real, lower_is_better=False)


# ---------- the sentence

COLLAPSED = Trouble(200, "collapse", "missing 0.9", "Add Unrolling.")
SENTENCES = {
    "FID rose": (Outcome([fid(52.0, 55.0, 57.0)]), "", "It did not work: quality/fid rose from 52 to 57."),
    "FID fell": (
        Outcome([fid(57.0, 8.0, 8.5)]),
        "",
        "It worked: quality/fid fell from 57 to 8.5 (best 8 at step 100, real data 1).",
    ),
    "FID fell and rose again": (
        Outcome([fid(57.0, 8.0, 20.0)]),
        "",
        "It got worse after step 100: quality/fid fell from 57 to 20 (best 8 at step 100, real data 1). "
        "Take the checkpoint of that step.",
    ),
    "FID fell a little": (
        Outcome([fid(57.0, 52.0, 50.0)]),
        "",
        "It learned little: quality/fid fell from 57 to 50 (best 50 at step 200, real data 1). Train longer, or with "
        "other learning rates.",
    ),
    "FID still falls": (
        Outcome([fid(57.0, 20.0, 10.0)]),
        "",
        "It worked: quality/fid fell from 57 to 10 (best 10 at step 200, real data 1). It still got better at the end: "
        "train longer.",
    ),
    "measured seldom": (
        Outcome([fid(52.0, 57.0)], watched=9),
        "",
        "It is too early to judge: quality/fid rose from 52 to 57. There are only 2 measurements: measure more often, "
        "or train longer. There was no trouble seen in 9 steps.",
    ),
    "little, and still better": (
        Outcome([fid(57.0, 50.0, 40.0)]),
        "",
        "It is too early to judge: quality/fid fell from 57 to 40 (best 40 at step 200, real data 1). It still got "
        "better at the end: train longer.",
    ),
    "beyond a limit, and still better": (
        Outcome([fid(57.0, 20.0, 10.0), Course("quality/missing", [0, 100, 200], [1.0, 0.5, 0.3], 0.0, True, 0.1)]),
        "",
        "It is too early to judge: quality/missing is 0.3 at the end. quality/fid fell from 57 to 10 (best 10 at step "
        "200, real data 1). It still got better at the end: train longer.",
    ),
    "failed without a verdict": (
        Outcome([fid(52.0, 55.0, 57.0)], watched=900),
        "",
        "It did not work: quality/fid rose from 52 to 57. No monitor found a cause in 900 steps.",
    ),
    "measured once": (
        Outcome([fid(57.0)]),
        "",
        "quality/fid was measured once, at step 0 (57): measure more often.",
    ),
    "not finite": (Outcome([fid(57.0, math.nan)]), "", "It did not work: quality/fid is not finite at the end."),
    "recall rose": (
        Outcome([recall(0.0, 0.8, 0.8)]),
        "",
        "It worked: quality/recall rose from 0 to 0.8 (best 0.8 at step 100, real data 0.9).",
    ),
    "recall fell": (Outcome([recall(0.5, 0.4, 0.2)]), "", "It did not work: quality/recall fell from 0.5 to 0.2."),
    "stayed": (Outcome([recall(0.0, 0.0, 0.0)]), "", "It did not work: quality/recall stayed at 0."),
    "collapsed": (
        Outcome([fid(57.0, 8.0, 8.5)], [COLLAPSED]),
        "",
        "It did not work: collapse (since step 200). quality/fid fell from 57 to 8.5 (best 8 at step 100, real data "
        "1).",
    ),
    "collapsed and got well": (
        Outcome([fid(57.0, 8.0, 8.5)], [COLLAPSED._replace(lasts=False)]),
        "",
        "It worked: quality/fid fell from 57 to 8.5 (best 8 at step 100, real data 1).",
    ),
    "stopped": (
        Outcome([fid(57.0, 8.0)]),
        "FloatingPointError: not finite.",
        "It stopped: FloatingPointError: not finite. quality/fid fell from 57 to 8 (best 8 at step 100, real data 1).",
    ),
    "not measured": (
        Outcome(watched=1200),
        "",
        "Nobody measured how good the samples are: add a QualityMonitor, or a PairedMonitor if each has a target. "
        "There was no trouble seen in 1,200 steps.",
    ),
    "no direction": (
        Outcome([Course("quality/diversity", [0], [1.0]), fid(57.0, 8.0, 8.0)]),
        "",
        "It worked: quality/fid fell from 57 to 8 (best 8 at step 100, real data 1).",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_the_sentence(case):
    outcome, stopped, expected = SENTENCES[case]
    assert judgement(outcome, stopped) == expected


def test_troubles_in_their_order_and_files_once():
    first, second = (
        Outcome(troubles=[COLLAPSED], files=[("pictures", "samples")]),
        Outcome(
            [fid(3.0, 2.0)],
            [Trouble(100, "oscillation", done="rollback", lasts=False)],
            [("pictures", "samples")],
            7,
        ),
    )
    text = describe_outcome(joined([first, second]), 1200).splitlines()
    assert text[0].split("  ")[0] == "1,200 steps"
    assert text[1].split() == ["quality/fid", "3", "2", "100", "2", "1"]
    assert text[2:5] == [
        "step 100, oscillation (not at the end). Done: rollback.",
        "step 200, collapse: missing 0.9. Add Unrolling.",
        "pictures: samples",
    ]
    assert len(text) == 6


# ---------- runs


def ring():
    return Ring(batch_size=32, epoch_length=6, val_samples=120)


def fit(module, data, *callbacks, **kwargs):
    run = trainer(callbacks=list(callbacks), **{"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0} | kwargs)
    run.fit(module, data)
    return run


def test_a_run_ends_with_its_measurements(capsys, tmp_path):
    monitor = QualityMonitor(**FEW, metrics=["fid", "recall", "modes"])
    saves = ModelCheckpoint(tmp_path, "best", monitor="quality/fid", every_n_train_steps=2)
    run = fit(
        small(), ring(), monitor, SampleLogger(every=2), saves, enable_checkpointing=True, default_root_dir=tmp_path
    )
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("4 steps"))
    rows = {line.split()[0]: line.split()[1:] for line in lines[head + 1 :] if line.startswith("quality/")}
    assert [*rows] == [
        f"quality/{name}" for name in ("fid", "recall", "modes", "high_quality", "reverse_kl", "missing")
    ]
    values = [row["fid"] for row in monitor.history]
    best = min(range(3), key=values.__getitem__)
    expected = [values[0], values[best], 2 * best, values[-1], monitor.null["fid"]]
    assert [float(x) for x in rows["quality/fid"]] == pytest.approx(expected, rel=6e-3)
    assert f"pictures: {tmp_path / 'samples'}" in lines
    score = f"{float(saves.best_model_score):.4g}"
    assert f"checkpoint: {tmp_path / 'best.ckpt'} (best quality/fid: {score})" in lines
    assert lines[-1].startswith(("It ", "quality/fid "))
    assert run.progress_bar_metrics["quality/fid"] == monitor.values["fid"]
    assert run.progress_bar_metrics["quality/recall"] == monitor.values["recall"]
    assert "quality/modes" not in run.progress_bar_metrics


def test_nothing_is_printed_of_a_run_that_nobody_watched(capsys):
    fit(small(), DataLoader(torch.randn(24, 2), 8), max_steps=3)
    assert capsys.readouterr().out == ""


def test_what_is_asked_for_first_is_in_the_progress_bar():
    monitor = QualityMonitor(**FEW, metrics=["coverage", "diversity"], name="mine")
    run = fit(small(), ring(), monitor)
    assert run.progress_bar_metrics["mine/coverage"] == monitor.values["coverage"]


def test_a_run_that_is_broken_off_says_why(capsys):
    class Break(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(small(), ring(), QualityMonitor(**FEW), Break(), max_steps=9)
    assert "It stopped: RuntimeError: broken" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.filterwarnings("ignore")  # of the verdict
def test_events_and_what_was_done(capsys):
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, latents):
            return self.weight + torch.zeros(len(latents), 2)

    module = small()
    module.generator = Still()
    detector = CollapseDetector("stop", patience=2)
    fit(module, ring(), QualityMonitor(**FEW), detector, HealthMonitor(every=2), max_steps=9)
    lines = capsys.readouterr().out.splitlines()
    step, verdict = detector.events[0]["step"], detector.events[0]["verdict"]
    said = next(line for line in lines if line.startswith(f"step {step}, {verdict}: "))
    assert " Done: stop. " in said
    assert lines[-1].startswith(f"It did not work: {verdict} (since step {step}).")


def images(n):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))


def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 4, 4), losses={})


def test_a_paired_metric_has_its_course(capsys):
    monitor = PairedMonitor({"error": MeanSquaredError()})
    run = trainer(callbacks=[monitor], max_epochs=3)
    run.fit(tokenizer(), DataLoader(images(32), 8), DataLoader(images(16), 8))
    assert [row["step"] for row in monitor.history] == [4, 8, 12]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("quality/error")]
    values = [row["error"] for row in monitor.history]
    best = min(range(3), key=values.__getitem__)
    expected = [values[0], values[best], monitor.history[best]["step"], values[-1]]
    assert [float(x) for x in rows[0][1:]] == pytest.approx(expected, rel=6e-3)
    assert run.progress_bar_metrics["quality/error"] == pytest.approx(values[-1])


# ---------- validate and test


def test_validate_measures_what_the_fit_measured_last():
    module, monitor = small(), QualityMonitor(**FEW)
    fit(module, ring(), monitor)
    fresh = QualityMonitor(**FEW)
    found = trainer(callbacks=[fresh]).validate(module, ring(), verbose=False)[0]
    assert {name: found[f"quality/{name}"] for name in ("fid", "recall", "missing")} == pytest.approx(
        {name: monitor.values[name] for name in ("fid", "recall", "missing")}, rel=1e-6
    )
    assert "val/d/accuracy" in found
    assert fresh.history == []
    assert fresh.protocol["split"] == "train"


class Parts(LightningDataModule):
    """Data that are there only in the stage that they are for."""

    def setup(self, stage):
        if stage == "fit":
            self.train = DataLoader(torch.randn(128, 2), 16)
        else:
            self.held_out = torch.randn(100, 2, generator=torch.Generator().manual_seed(len(stage)))

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return DataLoader(self.held_out, 16)

    def test_dataloader(self):
        return DataLoader(self.held_out, 16)


def as_generated(module):
    from lightning_gan_stability.noise import generator

    with torch.no_grad():
        return module.generator(torch.randn(100, 4, generator=generator("quality")))


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("given", [False, True])
def test_without_training_data_it_compares_with_what_it_gets(stage, given):
    module, monitor = small(), QualityMonitor(**FEW)
    held_out = torch.randn(100, 2, generator=torch.Generator().manual_seed(len(stage)))
    data = DataLoader(held_out, 16) if given else Parts()
    found = getattr(trainer(callbacks=[monitor]), stage)(module, data, verbose=False)[0]
    assert found["quality/fid"] == pytest.approx(frechet_distance(held_out, as_generated(module)), rel=1e-5)
    assert monitor.protocol["split"] == {"validate": "val", "test": "test"}[stage]
    assert f"{stage[:3] if stage == 'validate' else 'test'}/d/accuracy" in found


def test_paired_metrics_of_a_test():
    module, data = tokenizer(), images(20)
    found = trainer(callbacks=[PairedMonitor({"error": MeanSquaredError()})]).test(
        module, DataLoader(data, 8), verbose=False
    )[0]
    expected = (module.generator(data) - data).square().mean().item()
    assert found["quality/error"] == pytest.approx(expected, rel=1e-5)


def test_validation_in_a_fit_measures_nothing():
    monitor = QualityMonitor(n_samples=50, every=100)
    run = trainer(callbacks=[monitor], max_epochs=2)
    run.fit(small(), DataLoader(torch.randn(64, 2), 16), DataLoader(torch.randn(64, 2), 16))
    assert [row["step"] for row in monitor.history] == [0]


def test_too_few_samples_are_refused():
    with pytest.raises(MisconfigurationException, match="compares with real samples, and the loader has 8"):
        trainer(callbacks=[QualityMonitor(**FEW)]).test(small(), DataLoader(torch.zeros(8, 2), 8), verbose=False)


def test_a_refused_run_prints_no_table(capsys):
    with pytest.raises(MisconfigurationException):
        fit(small(), ring(), QualityMonitor(**FEW), ModelCheckpoint(monitor="quality/fidd"), enable_checkpointing=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        (fid(0.04, 0.02, real=0.05), "It worked: quality/fid fell"),
        (fid(0.010, 0.012, real=0.05), "It worked: quality/fid rose"),
        (fid(0.5, 0.01, 0.03, real=0.05), "It worked: quality/fid fell"),
        (recall(0.97, 0.99), "It worked: quality/recall rose"),
    ],
)
def test_what_is_as_good_as_real_data_has_worked(course, expected):
    assert judgement(Outcome([course])).startswith(expected)


def test_samples_that_do_not_belong_to_their_conditions_have_not_worked():
    told = Course("quality/dependence", [0, 100, 200], [0.3, 0.2, -0.001], 1.0, lower_is_better=False, limit=0.25)
    assert judgement(Outcome([fid(57.0, 1.0), told])).startswith("It did not work: quality/dependence is -0.001 at the")
    assert judgement(Outcome([fid(57.0, 1.0), told._replace(values=[0.3, 0.5, 0.9])])).startswith("It worked")


def test_a_second_fit_is_measured_anew():
    module, monitor = small(), QualityMonitor(**FEW, metrics=["fid"])
    for i in range(3):
        run = fit(module, ring(), monitor)
        assert [row["step"] for row in monitor.history] == [0, 2, 4]
        assert module.iteration == 4 * (i + 1)
        assert run.callback_metrics["quality/fid"].item() == pytest.approx(monitor.history[-1]["fid"])
        with torch.no_grad():
            module.generator.layers[0].bias.add_(1.0)  # so that the next one begins elsewhere


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_nothing_to_evaluate_is_refused(stage):
    run = trainer(callbacks=[QualityMonitor(**FEW)], limit_val_batches=0, limit_test_batches=0)
    with pytest.raises(MisconfigurationException, match=f"leaves nothing to {stage}"):
        getattr(run, stage)(small(), ring(), verbose=False)
