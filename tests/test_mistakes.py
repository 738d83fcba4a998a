"""Mistakes on the command line: few lines, of which the last says what is wrong, where, and what was meant."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lightning_gan_stability.cli import main
from lightning_gan_stability.cli.diagnosis import diagnose
from lightning_gan_stability.cli.mistakes import explained, sentence

CONFIG = """\
model:
  generator: {class_path: MLP, init_args: {sizes: [4, 8, 2]}}
  discriminator: {class_path: MLP, init_args: {sizes: [2, 8, 1]}}
  latent_dim: 4
  loss: Hinge
  g_optimizer: {class_path: Adam, init_args: {lr: 0.01}}
data: {class_path: Ring, init_args: {batch_size: 8}}
trainer:
  max_steps: 3
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  enable_checkpointing: false
  callbacks:
  - class_path: R1Penalty
    init_args:
      gamma: 0.1
"""
MLP_LINE = "  generator: {class_path: MLP, init_args: {sizes: [4, 8, 2]}}"
ENTRY = "- class_path: R1Penalty\n    init_args:\n      gamma: 0.1"
IMAGES = """\
model:
  generator: {class_path: DCGANGenerator, init_args: {latent_dim: 8, size: 16, width: 4}}
  discriminator: {class_path: DCGANDiscriminator, init_args: {size: 16, width: 4}}
  latent_dim: 8
data: {class_path: Images, init_args: {folder: photos, size: 16, batch_size: 8, holdout: 8}}
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # LightningCLI of Lightning 2.6 calls what jsonargparse 4.53 deprecates
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def complaint(capsys, monkeypatch):
    """What a command line says to a config, as a process whose arguments these are."""

    def complaint(*args, text=CONFIG):
        Path("gan.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["gan-stability", "fit", "--config", "gan.yaml", *args])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) <= 12
        assert "Traceback" not in "".join(lines)
        assert lines[-1].startswith("gan-stability: error: ")
        return lines[-1].removeprefix("gan-stability: error: ")

    return complaint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("R1Penalty", "R1Penlty", "line 16: there is no class `R1Penlty` to be a callback: did you mean R1Penalty?"),
        ("gamma: 0.1", "gama: 0.1", "line 18: R1Penalty has no argument `gama`: did you mean gamma?"),
        ("Hinge", "Hing", "line 5: there is no class `Hing` to be a loss: did you mean Hinge?"),
        ("Adam", "Adma", "line 6: there is no class `Adma` to be an optimizer: did you mean Adam?"),
        ("lr: 0.01", "learning_rate: 0.01", "line 6: Adam has no argument `learning_rate`: did you mean lr?"),
        (
            "class_path: MLP, init_args: {sizes: [4",
            "class_path: MPL, init_args: {sizes: [4",
            "line 2: there is no class",
        ),
        ("sizes: [4", "size: [4", "line 2: MLP has no argument `size`: did you mean sizes?"),
        ("latent_dim", "latentdim", "line 4: GANModule has no argument `latentdim`: did you mean latent_dim?"),
        ("max_steps", "max_step", "line 9: the Trainer has no argument `max_step`: did you mean max_steps?"),
        ("trainer:", "trianer:", "line 8: there is no section `trianer`: did you mean trainer?"),
        ("Ring", "Rign", "line 7: there is no class `Rign` to be a data module: did you mean Ring?"),
        ("batch_size", "batchsize", "line 7: Ring has no argument `batchsize`: did you mean batch_size?"),
        ("latent_dim: 4", "latent_dim: many", "line 4: `latent_dim` must be int or null, got many."),
        ("max_steps: 3", "max_steps: many", "line 9: `trainer.max_steps` must be int, got many."),
        (MLP_LINE, "", "GANModule needs `generator`, and the config has none."),
        ("    init_args:\n      gamma: 0.1", "    gamma: 0.1", "arguments stand below `init_args:`"),
        (
            "- class_path: R1Penalty\n    init_args:\n      gamma: 0.1",
            "- R1Penalty: {gamma: 0.1}",
            "`class_path: R1Penalty`",
        ),
        (
            "R1Penalty\n",
            "my_project.Penalty\n",
            "line 16: there is no module `my_project`: is my_project.py in the folder",
        ),
        ("R1Penalty\n", "torch.nn.Liner\n", "`torch.nn` has no `Liner`: did you mean Linear?"),
        ("class_path: MLP, init_args: {sizes: [4, 8, 2]}", "[", "gan.yaml, line"),
        ("latent_dim: 4", "latent_dim: 4\n  loss: Minimax", "line 6: `loss` stands in line 5 already: keep one"),
        ("gamma: 0.1", "gamma: 0.1\n      gamma: 0.2", "line 19: `gamma` stands in line 18 already: keep one"),
        (
            ENTRY,
            "- class_path: OptimizerSchedule\n    init_args:\n      values:\n"
            "        lr: {class_path: Schedule, init_args: {start: 1, ed: 0, steps: 9}}",
            "line 19: Schedule has no argument `ed`: did you mean end?",
        ),
        ("loss: Hinge", "loss: MLP", "line 5: `loss` must be a loss, got MLP."),
        (ENTRY, "- {class_path: MLP}", "line 16: `trainer.callbacks` must be a callback: import path"),
        (MLP_LINE, "  generator: {sizes: [4, 2]}", "line 2: `generator` must be a network: write `class_path:` with"),
        (MLP_LINE, "  generator: torch.nn.functional.relu", "relu does not correspond to a subclass of Module."),
        (
            MLP_LINE,
            "  generator: {class_path: torch.nn.Identity, init_args: {size: 3}}",
            "line 2: `generator` must be a network, and `torch.nn.Identity` has no argument `size` (what its **kwargs",
        ),
        (
            "[4, 8, 2]",
            "[4, 8, 2], activation: torch.nn.RelU",
            "line 2: `generator` must be a network: module 'torch.nn' has no attribute 'RelU'.",
        ),
        (
            "loss: Hinge",
            "g_scheduler: {class_path: StepLR}",
            "StepLR needs `step_size`, and the config has none.",
        ),
        ("gamma: 0.1", "gamma: -1", "`gamma` must be a finite number that is not negative, got -1"),
        ("latent_dim: 4", "latent_dim: 5", "The generator failed on an input of shape (8, 5): mat1"),
        ("sizes: [2", "sizes: [3", "The discriminator failed on an input of shape (8, 2): "),
        ("accelerator: cpu", "accelerator: gpu", "No supported gpu backend found!"),
        ("enable_checkpointing: false", "gradient_clip_val: 1.0", "Remove `Trainer(gradient_clip_val=1.0)`"),
    ],
)
def test_a_mistake_in_a_config(old, new, said, complaint):
    if torch.cuda.is_available() and "gpu" in new:
        pytest.skip("there is a GPU")
    assert old in CONFIG
    assert said in complaint(text=CONFIG.replace(old, new))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--model.loss=Hing", "--model.loss: there is no class `Hing` to be a loss: did you mean Hinge?"),
        ("--max_steps=5", "--max_steps: there is no such setting: did you mean --trainer.max_steps?"),
        (
            "--trainer.max_stpes=5",
            "--trainer.max_stpes: the Trainer has no argument `max_stpes`: did you mean max_steps?",
        ),
        ("--model.latent=5", "--model.latent: the model has no argument `latent`: did you mean latent_dim?"),
        ("--trainer.callbacks+=HealthMonito", "no class `HealthMonito` to be a callback: did you mean HealthMonitor?"),
        ("--data=Rign", "--data: there is no class `Rign` to be a data module: did you mean Ring?"),
        ("--config=gun.yaml", "there is no config 'gun.yaml': did you mean gan.yaml?"),
        (
            "--model.generator.sizez=[4, 2]",
            "must be a network, and `lightning_gan_stability.MLP` has no argument `sizez`: did you mean sizes?",
        ),
        ("--ckpt_path=nowhere.ckpt", "Checkpoint file not found: nowhere.ckpt"),
    ],
)
def test_a_mistake_on_the_line(argument, said, complaint):
    assert said in complaint(argument)


MONITOR = {"class_path": "QualityMonitor", "init_args": {"n_samples": 50, "extractor": "torch.nn.Flatten"}}


def images(*callbacks, model=None, data=None):
    Path("photos").mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (6 * i, 100, 100)).save(f"photos/{i}.png")
    config = yaml.safe_load(CONFIG) | yaml.safe_load(IMAGES)
    config["model"] |= model or {}
    config["data"]["init_args"] |= data or {}
    config["trainer"]["callbacks"] = [*callbacks]
    return yaml.safe_dump(config)


@pytest.mark.parametrize("callbacks", [[], [MONITOR]], ids=["alone", "measured"])
def test_sizes_of_data_and_networks(callbacks, complaint):
    text = images(*callbacks, data={"size": 20})
    said = complaint(text=text)
    assert said == "The generator made samples of shape (3, 16, 16), but the data have shape (3, 20, 20)."


@pytest.mark.parametrize("callbacks", [[], [MONITOR]], ids=["alone", "measured"])
def test_lengths_of_latents(callbacks, complaint):
    said = complaint(text=images(*callbacks, model={"latent_dim": 32}))
    assert said == "`latent_dim` of the module is 32, and that of the generator 8: give both the same."


def test_a_key_that_nothing_logs(complaint):
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"enable_checkpointing": True}
    config["trainer"]["callbacks"] = [
        {"class_path": "QualityMonitor", "init_args": {"n_samples": 50}},
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": "quality/fidd"}},
    ]
    assert "did you mean `quality/fid`?" in complaint(text=yaml.safe_dump(config))


def test_a_metric_that_there_is_not(complaint):
    config = yaml.safe_load(CONFIG)
    config["trainer"]["callbacks"] = [{"class_path": "QualityMonitor", "init_args": {"metrics": ["fidd"]}}]
    said = complaint(text=yaml.safe_dump(config))
    assert "`metrics` must be" in said
    assert "one of 'fid', 'kid'" in said
    assert "fidd" in said


def test_a_folder_that_is_not_there(complaint):
    assert "`folder` does not exist: nowhere" in complaint(text=images(data={"folder": "nowhere"}))


def test_a_torn_checkpoint(complaint):
    Path("torn.ckpt").write_bytes(b"abc")
    assert "The checkpoint torn.ckpt cannot be read" in complaint("--ckpt_path=torn.ckpt")


def test_a_checkpoint_of_other_networks(complaint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gan-stability"])
    Path("gan.yaml").write_text(CONFIG.replace("enable_checkpointing: false", "default_root_dir: ."))
    main(["fit", "--config", "gan.yaml"])
    [path] = Path().rglob("*.ckpt")
    said = complaint(f"--ckpt_path={path}", "--model.generator.init_args.sizes=[4,9,2]")
    assert said.startswith("The checkpoint does not fit the model: size mismatch for generator.layers.0.weight")


def test_a_command_that_there_is_not(capsys):
    for name, said in ("fitt", "did you mean fit?"), ("zzz", "there are new, fit, validate"):
        with pytest.raises(SystemExit) as stopped:
            main([name])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_a_section_without_settings(complaint):
    said = complaint(text=CONFIG.partition("trainer:")[0] + "trainer:\n")
    assert said == "`trainer:` has nothing below it: give it settings, or remove the line."


def test_no_data(complaint):
    config = yaml.safe_load(CONFIG)
    del config["data"]
    assert complaint(text=yaml.safe_dump(config)) == "a run needs `data`, and the config has none."


def test_a_checkpoint_without_its_config(capsys, monkeypatch):
    Path("run/checkpoints").mkdir(parents=True)
    for file in "run/config.yaml", "run/checkpoints/a.ckpt":
        Path(file).touch()
    monkeypatch.setattr(sys, "argv", ["gan-stability", "validate", "--ckpt_path", "run/checkpoints/a.ckpt"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("add --config run/config.yaml, which is the checkpoint's.")


def test_a_file_that_is_no_config(complaint):
    assert "a config has `model:`, `data:` and `trainer:`" in complaint(text="just words")
    assert complaint(text="a: [1\n").startswith("gan.yaml, line 2: this is not YAML")


# ---------- errors that are not the user's words


def test_a_mistake_in_the_users_code_keeps_its_place():
    """And an error in a class of theirs that cannot be made keeps its traceback."""
    Path("mine.py").write_text(
        "from lightning_gan_stability import MLP\n"
        "class Broken(MLP):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).nonsense\n"
        "class Dead(MLP):\n"
        "    def __init__(self, sizes: list[int]):\n"
        "        raise KeyError('mine')\n"
    )
    command = [sys.executable, "-m", "lightning_gan_stability", "fit", "--config", "gan.yaml"]
    Path("gan.yaml").write_text(CONFIG.replace("class_path: MLP", "class_path: mine.Broken", 1))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert "In mine.py, line 4: AttributeError." in lines[-2]
    assert "has no attribute 'nonsense'" in lines[-1]
    Path("gan.yaml").write_text(CONFIG.replace("class_path: MLP", "class_path: mine.Dead", 1))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "mine.py" in done.stderr


def test_in_python_errors_are_raised(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gan-stability"])
    Path("gan.yaml").write_text(CONFIG.replace("gamma: 0.1", "gamma: -1"))
    with pytest.raises(ValueError, match="`gamma` must be"):
        main(["fit", "--config", "gan.yaml"])
    monkeypatch.setenv("GAN_STABILITY_TRACEBACK", "1")
    with pytest.raises(ValueError, match="`gamma` must be"), explained(interactive=True):
        main(["fit", "--config", "gan.yaml"])


def test_an_unknown_message_keeps_its_last_line():
    assert diagnose(["fit"], "first\n  - the last  line\n") == "the last line"
    assert sentence(ValueError()) == "ValueError"


def test_the_config_itself_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gan-stability"])
    Path("gan.yaml").write_text(CONFIG)
    assert copy.deepcopy(yaml.safe_load(CONFIG))["trainer"]["max_steps"] == 3
    main(["fit", "--config", "gan.yaml"])
