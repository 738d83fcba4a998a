"""The command line: both forms of `model:`, overrides, checkpoints, and what it says to mistakes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from toys import public_callbacks, tensors

from lightning_gan_stability import GANModule, Hinge, TableSynthesis, __version__
from lightning_gan_stability.cli import build, main
from lightning_gan_stability.cli.main import COMMANDS, describe_commands

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),  # sys.argv is pytest's
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),  # of the ModelCheckpoint in another run
]

MODEL = {
    "generator": {"class_path": "MLP", "init_args": {"sizes": [4, 8, 2]}},
    "discriminator": {"class_path": "MLP", "init_args": {"sizes": [2, 8, 1]}},
    "latent_dim": 4,
    "loss": "Hinge",
    "g_optimizer": {"class_path": "Adam", "init_args": {"lr": 0.01}},
}
TRAINER = {
    "max_steps": 3,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "run"}},
    "callbacks": [{"class_path": "R1Penalty", "init_args": {"gamma": 0.1}}],
}
CHECKPOINT = "run/version_0/checkpoints/epoch=0-step=3.ckpt"


class Clamped(GANModule):
    """A user's subclass with an argument of its own."""

    def __init__(self, *args, limit: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit = limit

    def sample(self, *args, **kwargs):
        return super().sample(*args, **kwargs).clamp(-self.limit, self.limit)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # LightningCLI of Lightning 2.6 calls what jsonargparse 4.53 deprecates
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def write():
    def write(model=MODEL, data="Ring", name="config.yaml", **trainer):
        Path(name).write_text(yaml.safe_dump({"model": model, "data": data, "trainer": TRAINER | trainer}))
        return name

    return write


@pytest.fixture
def printed(capsys):
    """The configuration that a command line amounts to."""

    def printed(*args):
        with pytest.raises(SystemExit) as stopped:
            main([*args, "--print_config"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def complaint(capsys):
    """What a command line that is refused writes to the terminal."""

    def complaint(*args):
        with pytest.raises(SystemExit) as stopped:
            main([*args])
        assert stopped.value.code == 2
        return capsys.readouterr().err.partition("error:")[2]

    return complaint


def weights(path):
    return tensors(torch.load(path, weights_only=True)["state_dict"])


def assert_equal(states, others):
    assert states.keys() == others.keys()
    for key in states:
        torch.testing.assert_close(states[key], others[key], rtol=0, atol=0)


# ---------- both forms of `model:`


@pytest.mark.parametrize("class_path", ["GANModule", "lightning_gan_stability.GANModule"])
def test_flat_model_and_class_path_are_the_same(write, printed, class_path):
    explicit = {"class_path": class_path, "init_args": MODEL}
    flat = yaml.safe_load(printed("fit", "--config", write()))
    assert yaml.safe_load(printed("fit", "--config", write(explicit))) == flat
    assert flat["model"]["class_path"] == "lightning_gan_stability.GANModule"
    assert flat["model"]["init_args"]["loss"]["class_path"] == "lightning_gan_stability.Hinge"


def test_model_may_be_a_users_subclass(write):
    model = {"class_path": f"{__name__}.Clamped", "init_args": MODEL | {"limit": 0.01}}
    main(["fit", "--config", write(model)])
    loaded = Clamped.load_from_checkpoint(CHECKPOINT)
    assert loaded.limit == 0.01
    assert loaded.sample(100).abs().max() <= 0.01


def test_modules_in_the_working_folder_are_found(write, printed, monkeypatch):
    Path("my_losses.py").write_text("from lightning_gan_stability import Hinge\nTwin = type('Twin', (Hinge,), {})\n")
    Path("my_gans.py").write_text(
        "from lightning_gan_stability import GANModule\nclass MyGAN(GANModule):\n    '''Mine.'''\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    model = {"class_path": "my_gans.MyGAN", "init_args": MODEL}
    assert "my_gans.MyGAN" in printed("fit", "--config", write(model))


def test_own_names_win_over_those_of_other_libraries(write, printed):
    import torchvision.ops

    assert torchvision.ops.MLP.__name__ == "MLP"
    config = yaml.safe_load(printed("fit", "--config", write()))
    assert config["model"]["init_args"]["generator"]["class_path"] == "lightning_gan_stability.MLP"


# ---------- the command line


def test_printed_configuration_gives_the_same_run(write, printed):
    text = printed("fit", "--config", write(), "--seed_everything=3")
    Path("printed.yaml").write_text(text)
    assert printed("fit", "--config", "printed.yaml") == text
    main(["fit", "--config", "config.yaml", "--seed_everything=3"])
    main(["fit", "--config", "printed.yaml"])
    assert_equal(weights(CHECKPOINT), weights(CHECKPOINT.replace("version_0", "version_1")))


def test_saved_configuration_gives_the_same_run(write):
    main(["fit", "--config", write(), "--seed_everything=3"])
    main(["fit", "--config", "run/version_0/config.yaml"])
    assert_equal(weights(CHECKPOINT), weights(CHECKPOINT.replace("version_0", "version_1")))


def test_command_line_overrides_the_file(write):
    main([
        "fit", "--config", write(), "--model.g_optimizer.init_args.lr=1e-3", "--trainer.max_steps=2",
        "--model.loss=Wasserstein", "--model.generator.init_args.sizes=[4,6,2]", "--data.init_args.batch_size=7",
        "--trainer.callbacks+=R2Penalty", "--trainer.callbacks.gamma=0.3",
    ])  # fmt: skip
    checkpoint = torch.load(CHECKPOINT.replace("step=3", "step=2"), weights_only=True)
    assert checkpoint["optimizer_states"][1]["param_groups"][0]["lr"] == 1e-3
    assert checkpoint["state_dict"]["_extra_state"]["loss"] == {
        "name": "Wasserstein",
        "arguments": {"reduction": "sum"},
    }
    assert checkpoint["state_dict"]["generator.layers.0.weight"].shape == (6, 4)
    saved = yaml.safe_load(Path("run/version_0/config.yaml").read_text())
    assert saved["data"]["init_args"]["batch_size"] == 7
    assert [callback["init_args"]["gamma"] for callback in saved["trainer"]["callbacks"]] == [0.1, 0.3]


# ---------- checkpoints


def test_checkpoint_loads_without_arguments(write):
    main(["fit", "--config", write()])
    gan = GANModule.load_from_checkpoint(CHECKPOINT, weights_only=True)
    assert type(gan) is GANModule
    assert isinstance(gan.loss, Hinge)
    assert gan.iteration == 3
    assert gan.sample(5).shape == (5, 2)
    assert_equal(tensors(gan.state_dict()), weights(CHECKPOINT))


def test_checkpoint_keeps_a_loss_with_arguments(write):
    loss = {"class_path": "NonSaturating", "init_args": {"real_label": 0.9}}
    main(["fit", "--config", write(MODEL | {"loss": loss})])
    assert GANModule.load_from_checkpoint(CHECKPOINT).loss.real_label == 0.9


def test_validate_and_predict_with_a_checkpoint(write, capsys):
    main(["fit", "--config", write()])
    common = ["--config", "config.yaml", f"--ckpt_path={CHECKPOINT}", "--data.val_samples=600"]
    main(["validate", *common])
    assert "val/d/accuracy" in capsys.readouterr().out
    main(["predict", *common])
    points = np.load("run/version_0/predictions/samples.npy")
    assert points.shape == (600, 2)
    assert "600 samples are in run/version_0/predictions" in capsys.readouterr().out
    gan = GANModule.load_from_checkpoint(CHECKPOINT).eval()
    with torch.no_grad():
        expected = gan.predict_step(torch.zeros(256, 2), 0)
    np.testing.assert_allclose(points[:256], expected.numpy(), rtol=1e-6)
    with pytest.raises(FileExistsError, match="is there already: give SampleWriter another `folder`"):
        main(["predict", *common])
    writer = {"class_path": "SampleWriter", "init_args": {"folder": "mine"}}
    main(["predict", "--config", write(callbacks=[writer]), f"--ckpt_path={CHECKPOINT}"])
    assert Path("mine/samples.npy").exists()


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_only_a_fit_makes_a_folder_for_a_run(subcommand, write):
    data = {"class_path": "Ring", "init_args": {"val_samples": 64}}
    for name, logger in ("run", TRAINER["logger"]), ("lightning_logs", True):
        main(["fit", "--config", write(data=data, logger=logger)])
        [path] = Path(name).rglob("*.ckpt")
        main([subcommand, "--config", write(data=data, logger=logger), f"--ckpt_path={path}"])
        assert [folder.name for folder in Path(name).iterdir()] == ["version_0"]


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluation_needs_weights(subcommand, write):
    with pytest.raises(MisconfigurationException, match=f"`{subcommand}` needs weights: add --ckpt_path"):
        main([subcommand, "--config", write()])


def test_fit_goes_on_from_a_checkpoint(write):
    main(["fit", "--config", write()])
    main(["fit", "--config", "config.yaml", f"--ckpt_path={CHECKPOINT}", "--trainer.max_steps=6"])
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=6"])
    whole, resumed = (f"run/version_{i}/checkpoints/epoch=0-step=6.ckpt" for i in (2, 1))
    assert torch.load(resumed, weights_only=True)["global_step"] == 6
    assert weights(whole).keys() == weights(resumed).keys()


def test_last_is_the_newest_checkpoint_of_the_runs_before(write, caplog):
    saves = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}}
    main(["fit", "--config", write(callbacks=[saves])])
    main(["fit", "--config", write(callbacks=[saves]), "--trainer.max_steps=5", "--ckpt_path=last"])
    main(["fit", "--config", write(callbacks=[saves]), "--trainer.max_steps=8", "--ckpt_path", "last"])
    steps = [torch.load(f"run/version_{i}/checkpoints/last.ckpt", weights_only=True)["global_step"] for i in range(3)]
    assert steps == [3, 5, 8]
    second = yaml.safe_load(Path("run/version_1/config.yaml").read_text())
    assert second["ckpt_path"] == "run/version_0/checkpoints/last.ckpt"


def test_last_is_in_a_folder_of_ones_own_too(write):
    saves = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "own", "every_n_train_steps": 1}}
    main(["fit", "--config", write(callbacks=[saves], logger=False)])
    main(["fit", "--config", write(callbacks=[saves], logger=False), "--trainer.max_steps=5", "--ckpt_path=last"])
    assert {torch.load(path, weights_only=True)["global_step"] for path in Path("own").glob("*.ckpt")} == {3, 5}
    assert GANModule.load_from_checkpoint(next(Path("own").glob("*step=5.ckpt"))).iteration == 5


def test_last_without_a_run_before_begins_and_says_so(write):
    with pytest.warns(UserWarning, match="no checkpoint in run yet, so the run begins at step 0"):
        main(["fit", "--config", write(), "--ckpt_path=last"])
    assert GANModule.load_from_checkpoint(CHECKPOINT).iteration == 3


def test_what_is_given_at_a_resume_is_taken(write):
    """The rate, as the saved config says, and not the checkpoint's; a loss too."""
    main(["fit", "--config", write()])
    more = ["--trainer.max_steps=5", "--model.g_optimizer.init_args.lr=5e-5", "--model.loss=Wasserstein"]
    main(["fit", "--config", write(), f"--ckpt_path={CHECKPOINT}", *more])
    state = torch.load("run/version_1/checkpoints/epoch=0-step=5.ckpt", weights_only=True)
    assert [o["param_groups"][0]["lr"] for o in state["optimizer_states"]] == [2e-4, 5e-5]
    assert state["hyper_parameters"]["loss"]["class_path"] == "lightning_gan_stability.Wasserstein"
    assert state["state_dict"]["_extra_state"]["loss"]["name"] == "Wasserstein"
    config = yaml.safe_load(Path("run/version_1/config.yaml").read_text())["model"]["init_args"]
    assert (config["g_optimizer"]["init_args"]["lr"], config["loss"]["class_path"][-11:]) == (5e-5, "Wasserstein")
    with pytest.raises(RuntimeError, match="size mismatch for generator"):
        main(["fit", "--config", write(), f"--ckpt_path={CHECKPOINT}", "--model.generator.init_args.sizes=[4,9,2]"])


def test_a_second_config_adds_callbacks_or_replaces_them(write, printed):
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": ["HealthMonitor"]}}))
    text = printed("fit", "--config", write(), "--config", "more.yaml")
    assert "R1Penalty" in text
    assert "HealthMonitor" in text
    Path("other.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": ["HealthMonitor"]}}))
    with pytest.warns(UserWarning, match=r"other.yaml replaces the callbacks of config.yaml .*`callbacks\+:`"):
        text = printed("fit", "--config", write(), "--config=other.yaml")
    assert "R1Penalty" not in text
    text = printed("fit", "--config", write(), "--trainer.callbacks+=HealthMonitor", "--trainer.callbacks.every=7")
    assert yaml.safe_load(text)["trainer"]["callbacks"][1]["init_args"]["every"] == 7
    assert "R1Penalty" in text


class Bars(Callback):
    """Notes what the progress bar shows."""

    seen: ClassVar[list] = []

    def on_train_batch_end(self, trainer, *args):
        bar = trainer.progress_bar_callback.train_progress_bar
        self.seen.append((trainer.global_step, bar.total))


@pytest.mark.parametrize("epochs", [-1, None, 1000])
def test_the_progress_bar_of_an_endless_epoch_counts_to_the_last_step(epochs, write):
    Bars.seen.clear()
    options = {"enable_progress_bar": True, "callbacks": [f"{__name__}.Bars"], "max_epochs": epochs}
    main(["fit", "--config", write(**options)])
    assert Bars.seen == [(step, 3) for step in (1, 2, 3)]
    Bars.seen.clear()
    main(["fit", "--config", write(**options), "--trainer.max_steps=5", f"--ckpt_path={CHECKPOINT}"])
    assert Bars.seen == [(step, 5) for step in (4, 5)]


def test_the_progress_bar_of_a_finite_epoch_counts_its_batches(write):
    Bars.seen.clear()
    data = {"class_path": "Digits", "init_args": {"batch_size": 800, "holdout": 100}}
    model = MODEL | {
        "generator": {"class_path": "MLP", "init_args": {"sizes": [4, 64], "output_shape": [1, 8, 8]}},
        "discriminator": {"class_path": "MLP", "init_args": {"sizes": [64, 1]}},
    }
    main(["fit", "--config", write(model, data, callbacks=[f"{__name__}.Bars"], enable_progress_bar=True)])
    assert [total for _, total in Bars.seen] == [2, 2, 1]


def test_spawned_processes_know_the_parser(write):
    """In a process of its own, since it begins others."""
    spawned = ["--trainer.devices=2", "--trainer.strategy=ddp_spawn"]
    command = [sys.executable, "-m", "lightning_gan_stability", "fit", "--config", write(), *spawned]
    done = run(*command)
    if "terminate called without an active exception" in done.stderr:  # of a thread of gloo, as a process ends
        done = run(*command)
    assert done.returncode == 0, done.stderr
    assert Path(CHECKPOINT).exists()


def test_help_and_version_answer_at_once():
    """Without an import of torch; on one screen."""
    code = (
        "import sys; from lightning_gan_stability.cli.main import main\n"
        "main(sys.argv[1:]); assert not {'torch', 'lightning', 'jsonargparse'} & {*sys.modules}"
    )
    for argument in "--help", "-h", "--version":
        start = time.monotonic()
        done = run(sys.executable, "-c", code, argument)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - start < 2
        assert len(done.stdout.splitlines()) <= 40
        assert max(map(len, done.stdout.splitlines())) <= 120
    assert done.stdout.strip() == f"gan-stability {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    usage = capsys.readouterr().out.partition("\n")[0]
    assert usage.startswith("usage: gan-stability ")
    assert f" {name} " in usage
    assert f"  {name} " in describe_commands()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gan-stability fi", {"fit"}),
        ("gan-stability sample --trunc", {"--truncation"}),
        ("gan-stability fit --trainer.max_s", {"--trainer.max_steps"}),
        ("gan-stability fit --data Ri", {"Ring"}),
    ],
)
def test_tab_completion(line, expected):
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    shell |= {"_ARGCOMPLETE_STDOUT_FILENAME": "found.txt", "_ARGCOMPLETE_IFS": "\n"}
    run(sys.executable, "-m", "lightning_gan_stability", env=os.environ | shell)
    assert expected <= {word.strip() for word in Path("found.txt").read_text().split("\n")}


# ---------- mistakes


def test_misspelt_names(write, complaint):
    """Each kind of mistake: tests/test_mistakes.py."""
    assert "`Hing` to be a loss: did you mean Hinge?" in complaint("fit", "--config", write(MODEL | {"loss": "Hing"}))
    assert "did you mean Wasserstein?" in complaint("fit", "--config", write(), "--model.loss=Wasserstien")
    assert "did you mean R1Penalty?" in complaint("fit", "--config", write(callbacks=[{"class_path": "R1Penality"}]))
    assert "did you mean Ring?" in complaint("fit", "--config", write(data="Rign"))
    assert "`latent_dims`: did you mean latent_dim?" in complaint("fit", "--config", write(), "--model.latent_dims=4")


def test_broken_yaml(complaint):
    Path("config.yaml").write_text("model: {generator: [")
    assert "this is not YAML (while parsing a flow node" in complaint("fit", "--config", "config.yaml")


def test_argument_of_a_wrong_type(write, complaint):
    said = complaint("fit", "--config", write(MODEL | {"latent_dim": "many"}))
    assert "latent_dim" in said
    assert "many" in said


def test_argument_of_a_wrong_value(write):
    with pytest.raises(ValueError, match="`gamma` must be a finite number that is not negative, got -1"):
        main(["fit", "--config", write(callbacks=[{"class_path": "R1Penalty", "init_args": {"gamma": -1}}])])
    with pytest.raises(ValueError, match="`latent_dim` must be a positive integer, got 0"):
        main(["fit", "--config", write(MODEL | {"latent_dim": 0})])


def test_networks_that_do_not_fit(write):
    with pytest.raises(ValueError, match="The generator failed on an input of shape"):
        main(["fit", "--config", write(), "--model.latent_dim=5"])


def test_two_update_rules(write):
    with pytest.raises(MisconfigurationException, match="Simultaneous and Alternating are update rules"):
        main(["fit", "--config", write(callbacks=[{"class_path": "Simultaneous"}, {"class_path": "Alternating"}])])


# ---------- in their own processes


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def test_console_script_names_a_misspelt_loss(write):
    script = Path(sys.executable).with_name("gan-stability")
    if not script.exists():
        pytest.skip("the package is not installed: pip install -e .")
    done = run(script, "fit", "--config", write(), "--model.loss=Hing")
    assert done.returncode == 2
    assert "Hing" in done.stderr.partition("error:")[2]
    assert "Traceback" not in done.stderr


def test_module_runs_and_a_newcomer_sees_no_warning(write):
    main_part = [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}]
    done = run(sys.executable, "-m", "lightning_gan_stability", "fit", "--config", write(callbacks=main_part))
    assert done.returncode == 0, done.stderr
    assert Path(CHECKPOINT).exists()
    assert "Warning" not in done.stderr
    assert "deprecated" not in done.stderr
    assert "manual optimization" not in done.stderr


# every callback of the package by its short name, with arguments as a user would write them
CALLBACKS = """
AdaptiveAdversarialWeight: {layer: layers.2, weight: 0.8, max: 100}
AdaptiveUpdateRatio: {rule: loss_change, max_rest: 3}
AdaptiveAugmentation: {target: 0.5, interval: 1, augment: {class_path: AugmentPipe, init_args: {transforms: noise}}}
AdversarialStart: {step: 1, ramp: 2, discriminator_first: true}
Alternating: {share_fake: true}
ApproximateR1Penalty: {weight: 100, sigma: 0.01, every: 2}
ApproximateR2Penalty: {}
Reconstruction: {weight: 2, distance: l2, name: mse}
Autopilot: {when: always, limits: {g_lr: [1.0e-5, 1.0e-2], gamma: null}, fall: 0.3, explain: true}
AugmentationSchedule:
  p: {start: 0, end: 0.3, steps: 10}
  augment: {class_path: AugmentPipe, init_args: {transforms: noise}}
CollapseDetector: {action: rollback, patience: 9, remedy: [{class_path: ScalePenalty, init_args: {factor: 2}}]}
CompetitiveGradientDescent: {adaptive: true}
ConsensusOptimization: {gamma: 0.1}
ConsistencyPenalty: {kind: real, transform: {class_path: torch.nn.Identity}}
DRAGANPenalty: {}
Extragradient: {}
FakePool: {size: 10}
FeatureMatching: {weight: 2, layers: [layers.*], layer_weights: {layers.0: 0.5}}
GeneratorEMA: {half_life: 100, ramp_up: 0.05}
GradientPenalty: {target: 0, weight: 1}
HealthMonitor: {every: 2, patience: 2, held_out: true}
InstanceNoise: {std: 0.2, steps: 10}
LeCam: {start: 1}
LogitDrift: {weight: 0.001}
Lookahead: {k: 2, alpha: 0.5}
LossBalancer: {weights: {adversarial: 1, mse: 2}}
MemorizationMonitor: {every: 2, n_samples: 50, n_train: 100, pairs: 2, false_alarms: 0.001, name: copies}
ModeSeeking: {}
OptimizerSchedule: {values: {lr: {start: 1.0e-3, end: 1.0e-4, steps: 10, shape: linear}, betas.1: 0.9}, player: d}
OrthogonalPenalty: {player: d}
PairedMonitor: {metrics: {error: {class_path: torchmetrics.MeanSquaredError}}, inputs: {error: [fake, real]}}
PathLengthPenalty: {every: 1}
QualityMonitor: {every: 1, n_samples: 50, metrics: [fid, recall]}
R1Penalty: {gamma: {start: 1, end: 0.1, steps: 100}}
R2Penalty: {}
Reconstruction: {weight: 2, distance: l2, name: mse}
SampleLogger: {every: 2, n: 10}
Simultaneous: {}
SpectralNorm: {networks: [generator, discriminator], factor: 2}
Unrolling: {steps: 2, second_order: true, objective: saddle}
UpdateRatio: {d_steps: 2, g_steps: 1, warm_up: false}
WeightClipping: {limit: 0.1}
"""


ARGUMENTS = yaml.safe_load(CALLBACKS)
RULES = ["Alternating", "CompetitiveGradientDescent", "ConsensusOptimization", "Extragradient", "Simultaneous"]
# what can run together; a run has one update rule, one callback that says who moves, and one that goes back; Unrolling
# needs both players
ALONE = ["AdaptiveUpdateRatio", "AdversarialStart", "AugmentationSchedule", "Autopilot", "FakePool"]
TOGETHER = [[name for name in ARGUMENTS if name not in (*RULES, *ALONE)], [*ALONE, "Reconstruction"]]


@pytest.mark.parametrize("names", [*TOGETHER, *([rule] for rule in RULES)], ids=lambda names: names[0])
def test_every_callback_by_its_short_name(names, write, printed, capsys):
    model = MODEL
    if names == ["CompetitiveGradientDescent"]:
        sgd = {"class_path": "SGD", "init_args": {"lr": 0.1}}
        model = MODEL | {"loss": "Minimax", "g_optimizer": sgd, "d_optimizer": sgd}
    entries = [{"class_path": name, "init_args": ARGUMENTS[name]} for name in names]
    config = write(model, callbacks=entries)
    main(["fit", "--config", config])
    assert Path(CHECKPOINT).exists()
    capsys.readouterr()  # HealthMonitor's table
    text = printed("fit", "--config", config)
    assert all(f"lightning_gan_stability.{name}" in text for name in names)
    Path("printed.yaml").write_text(text)
    assert printed("fit", "--config", "printed.yaml") == text


def test_no_callback_is_left_out():
    assert ARGUMENTS.keys() == public_callbacks() - {"TableMonitor"}  # of tables alone; configs/table.yaml has it


@pytest.mark.parametrize("name", ["OptimisticAdam", "OptimisticSGD", "NegativeMomentum"])
def test_own_optimizers_by_their_short_name(name, write):
    optimizer = {"class_path": name, "init_args": {"lr": 0.01}}
    main(["fit", "--config", write(MODEL | {"g_optimizer": optimizer, "d_optimizer": optimizer})])
    assert GANModule.load_from_checkpoint(CHECKPOINT).iteration == 3


@pytest.mark.parametrize(
    "augment",
    [
        {"class_path": "AugmentPipe", "init_args": {"transforms": {"noise": 0.5}, "p": 0.2}},
        {"class_path": "torch.nn.Dropout", "init_args": {"p": 0.1}},
    ],
)
def test_an_augmentation_as_an_argument(augment, write, printed):
    config = write(MODEL | {"augment": augment})
    main(["fit", "--config", config])
    assert augment["class_path"] in printed("fit", "--config", config)
    assert GANModule.load_from_checkpoint(CHECKPOINT).iteration == 3


def test_the_order_of_the_players(write):
    main(["fit", "--config", write(MODEL | {"plan": ["g", "d", "d"]})])
    assert GANModule.load_from_checkpoint(CHECKPOINT).plan == ("g", "d", "d")
    steps = [o["state"][0]["step"] for o in torch.load(CHECKPOINT, weights_only=True)["optimizer_states"]]
    assert steps == [6, 3]


def test_packed_discriminator(write):
    inner = {"class_path": "MLP", "init_args": {"sizes": [6, 8, 1]}}
    model = MODEL | {"discriminator": {"class_path": "Packed", "init_args": {"discriminator": inner, "m": 3}}}
    main(["fit", "--config", write(model)])
    assert GANModule.load_from_checkpoint(CHECKPOINT).discriminator.packing == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class_path": "Unrolling", "init_args": {"steps": 0}}, "`steps` must be a positive integer, got 0"),
        ({"class_path": "SpectralNorm", "init_args": {"factor": 0}}, "`factor` must be a positive finite number"),
        ({"class_path": "GeneratorEMA", "init_args": {"decay": 0.9, "half_life": 3}}, "or `decay`, not both"),
    ],
)
def test_bad_arguments_of_a_callback(entry, message, write):
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", write(callbacks=[entry])])


def test_an_unknown_rule(write, complaint):
    entry = {"class_path": "AdaptiveUpdateRatio", "init_args": {"rule": "loss"}}
    assert "loss_change" in complaint("fit", "--config", write(callbacks=[entry]))


# ---------- tables


class Columned(GANModule):
    """A user's subclass whose `columns` are none of a table."""

    def __init__(self, generator: torch.nn.Module, discriminator: torch.nn.Module, columns: int = 3, **kwargs):
        super().__init__(generator, discriminator, **kwargs)
        self.columns = columns


class Rows(LightningDataModule):
    """A user's data without `columns`."""

    def train_dataloader(self):
        rows, condition = torch.tensor([[0.5, 1.0, 0.0, 1.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
        return torch.utils.data.DataLoader([(rows, condition)] * 2, batch_size=None)


SECRET = "Mallory"
DESCRIPTION = [
    {"name": "age", "means": [40.125], "stds": [9.0]},
    {"name": "who", "categories": [SECRET, "Trent"]},
]


@pytest.fixture
def table():
    ages = [float(age) for age in range(20, 60)]
    Path("table.csv").write_text("age,who\n" + "".join(f"{age},{[SECRET, 'Trent'][int(age) % 2]}\n" for age in ages))
    return {"class_path": "Table", "init_args": {"data": "table.csv", "batch_size": 8, "components": 1}}


def synthesis(**options):
    networks = {"generator": "torch.nn.Linear", "discriminator": "torch.nn.Linear"}
    return {"class_path": "TableSynthesis", "init_args": networks | {"latent_dim": 4, "pac": 2} | options}


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_columns_of_the_data_reach_checkpoints_and_no_logger(write, table, logger):
    logger = {"class_path": logger, "init_args": {"save_dir": ".", "name": "run"}}
    main(["fit", "--config", write(synthesis(), table, callbacks=[], logger=logger)])
    checkpoint = next(Path().glob("run/version_0/checkpoints/*.ckpt"))
    loaded = TableSynthesis.load_from_checkpoint(checkpoint, weights_only=True)
    assert sorted(loaded.encoder.columns[1]["categories"]) == [SECRET, "Trent"]
    [mean] = loaded.encoder.columns[0]["means"]
    assert 30 < mean < 50
    logged = [path for path in Path("run").rglob("*") if path.is_file() and path != checkpoint]
    assert {"hparams.yaml", "config.yaml"} <= {path.name for path in logged}
    for path in logged:
        assert SECRET.encode() not in path.read_bytes(), path
        assert f"{mean:.6f}".encode() not in path.read_bytes(), path


def test_a_module_that_cannot_be_made_shows_no_values(write, table):
    with pytest.raises(ValueError, match="`pac` must be a positive integer, got 0") as caught:
        main(["fit", "--config", write(synthesis(pac=0), table, callbacks=[])])
    assert "Column(name='who', 2 categories)" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_columns_that_are_given_are_kept(write, table):
    arguments = {name: MODEL[name] for name in ("generator", "discriminator", "latent_dim")}
    own = {"class_path": f"{__name__}.Columned", "init_args": arguments}
    trainer = {"callbacks": [], "logger": False, "enable_checkpointing": False}
    for given, kept in ({}, 3), ({"columns": 5}, 5):
        model = own | {"init_args": arguments | given}
        assert build(["--config", write(model, **trainer)]).model.columns == kept
        assert build(["--config", write(model, table, **trainer)]).model.columns == kept
    for data in f"{__name__}.Rows", table:
        file = write(synthesis(columns=DESCRIPTION), data, **trainer)
        cli = build(["--config", file])
        assert [column["name"] for column in cli.model.encoder.columns] == ["age", "who"]
        assert cli.model.encoder.columns[0]["means"] == [40.125]
        if data is not table:
            cli.trainer.fit(cli.model, cli.datamodule)
            assert cli.model.iteration == 3
    with pytest.raises(MisconfigurationException, match="TableSynthesis and the data module have different `columns`"):
        main(["fit", "--config", file])
    with pytest.raises(ValueError, match=r"`columns` must describe the table: `Table\(...\).columns`"):
        build(["--config", write(synthesis(), f"{__name__}.Rows", **trainer)])


def test_columns_that_are_given_twice_may_be_equal(write, table):
    trainer = {"callbacks": [], "logger": False, "enable_checkpointing": False}
    columns = build(["--config", write(synthesis(), table, **trainer)]).model.encoder.columns
    cli = build(["--config", write(synthesis(columns=columns), table, **trainer)])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.model.iteration == 3
