"""Every file under configs/ runs as it is, for a few steps, and survives being printed and read back."""

import dataclasses
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import lightning_gan_stability
from lightning_gan_stability import GANModule
from lightning_gan_stability.cli import main
from lightning_gan_stability.cli.sweep import sweep
from lightning_gan_stability.cli.sweep_plan import read_plan

CONFIGS = Path(__file__).parents[1] / "configs"
SAMPLES = {
    "began": (1, 8, 8),
    "best_grid": (2,),
    "best_ring": (2,),
    "consensus": (2,),
    "dcgan": (3, 64, 64),
    "digits": (1, 8, 8),
    "digits_monitored": (1, 8, 8),
    "digits_wandb": (1, 8, 8),
    "extragradient": (2,),
    "grid": (2,),
    "lookahead": (1, 8, 8),
    "r3gan": (1, 8, 8),
    "ring": (2,),
    "ring_collapse": (2,),
    "ring_pacgan": (2,),
    "ring_unrolled": (2,),
    "sngan": (1, 8, 8),
    "ttur": (1, 8, 8),
    "wgan": (1, 8, 8),
    "wgan_gp": (2,),
}
# beside a reconstruction, or of tables: what a config makes of a condition of two samples
APPLIED = {
    "codec": ((2, 1, 4096), (1, 4096)),
    "paired_translation": ((2, 1, 32, 32), (3, 32, 32)),
    "super_resolution": ((2, 3, 8, 8), (3, 32, 32)),
    "table": (None, None),
    "tokenizer": ((2, 3, 32, 32), (3, 32, 32)),
    "unpaired_translation": ((2, 1, 16, 16), (1, 16, 16)),
    "vocoder": ((2, 40, 32), (1, 4096)),
}
# R3GAN's, by the authors' train.py: classes, widths, groups, size, and numbers of images and values by schedule
PRESETS = {
    "r3gan_cifar10": (10, [768] * 4, [96] * 4, 32, 512, 2e7, 5e6, 0.55, 0.05),
    "r3gan_ffhq64": (None, [768] * 4 + [384], [96] * 4 + [48], 64, 256, 2e7, 5e5, 0.3, 2),
    "r3gan_ffhq256": (None, [768] * 4 + [384, 192, 96], [96] * 4 + [48, 24, 12], 256, 256, 2e7, 5e5, 0.3, 150),
    "r3gan_imagenet32": (1000, [1536] * 4, [96] * 4, 32, 4096, 2e8, 5e7, 0.5, 0.5),
    "r3gan_imagenet64": (1000, [1536] * 5, [96] * 5, 64, 4096, 2e8, 5e7, 0.4, 1),
}
SWEEPS = {"sweep_ring": "ring"}  # for another command, on a config
SHORT = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
SMALL = {"dcgan": ["--data.batch_size=4", "--data.num_workers=0", "--model.generator.width=8"]}

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")  # sys.argv is pytest's


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # LightningCLI of Lightning 2.6 calls what jsonargparse 4.53 deprecates
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(autouse=True)
def _images(tmp_path):
    """The folder of images that dcgan.yaml asks for."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (70, 80), (30 * i, 100, 200)).save(tmp_path / "images" / f"{i}.png")


def command(name, *more):
    return ["fit", "--config", str(CONFIGS / f"{name}.yaml"), *SHORT, *SMALL.get(name, []), *more]


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    """The networks of recipes lie in `examples`, beside `configs`, where a user starts the command."""
    monkeypatch.syspath_prepend(CONFIGS.parent)


def printed(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def locate(name):
    return getattr(lightning_gan_stability, name)


def load(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_every_config_is_tested():
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(
        f"{name}.yaml" for name in SAMPLES | APPLIED | PRESETS | SWEEPS
    )


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - {"digits_wandb"}))
def test_config_runs_and_its_checkpoint_loads(name):
    main(command(name))
    (checkpoint,) = Path("runs", name, "version_0").rglob("last.ckpt")
    gan = GANModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert gan.iteration == 3
    assert gan.sample(2).shape == (2, *SAMPLES[name])


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:AdversarialStart.* comes after the end of this run")
@pytest.mark.parametrize("name", APPLIED)
def test_config_of_a_recipe_runs_and_its_checkpoint_loads(name):
    """With its metrics, which a checkpoint may be chosen by."""
    limits = ["--trainer.limit_val_batches=2"]
    main(command(name, *limits, "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3"))
    (checkpoint,) = Path("runs", name, "version_0").rglob("last.ckpt")
    recipe = locate(load(name)["model"]["class_path"])
    gan = recipe.load_from_checkpoint(checkpoint, weights_only=True).eval()
    assert gan.iteration == 3
    shape, made = APPLIED[name]
    if name == "table":
        assert {"mean radius", "target"} < gan.synthesize(2).keys()
    elif name == "unpaired_translation":
        assert gan.translate(torch.zeros(shape), "b").shape == (2, *made)
    else:
        assert gan(torch.zeros(shape)).shape == (2, *made)
    values = Path("runs", name, "version_0", "metrics.csv").read_text().splitlines()[0]
    assert "quality/" in values


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_runs_with_few_trials(name, monkeypatch):
    here = Path.cwd()
    monkeypatch.chdir(CONFIGS.parent)
    plan = read_plan(CONFIGS / f"{name}.yaml")
    assert plan.config == (f"configs/{SWEEPS[name]}.yaml",)
    assert len(plan.sides) > 3
    few = dataclasses.replace(plan.side_by_side, choices=plan.side_by_side.choices[:2])
    short = plan.settings | {"trainer.max_steps": 4, "trainer.callbacks.QualityMonitor.every": 2}
    monkeypatch.chdir(here)
    config = str(CONFIGS / f"{SWEEPS[name]}.yaml")
    plan = dataclasses.replace(plan, config=(config,), settings=short, jobs=0, trials=1, side_by_side=few)
    records = sweep(plan)
    assert [record.state for record in records] == ["complete"] * 2
    assert f"gan-stability sweep --config configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", APPLIED)
def test_config_of_a_recipe_has_the_values_of_its_paper(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert f"gan-stability fit --config configs/{name}.yaml" in text
    assert "https://arxiv.org/abs/" in text
    assert text.count("paper") >= 5
    names = [callback["class_path"] for callback in load(name)["trainer"]["callbacks"]]
    assert {"ModelCheckpoint", "Alternating"} <= set(names)
    assert {"PairedMonitor", "TableMonitor"} & set(names)


def values_of(config, name):
    return next(c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"] == name)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_r3gan_have_the_authors_values(name):
    classes, widths, groups, size, batch, images, half_life, p, gamma = PRESETS[name]
    config = load(name)
    model, trainer, data = config["model"], config["trainer"], config["data"]["init_args"]
    for network in (model["generator"]["init_args"], model["discriminator"]["init_args"]):
        assert (network["widths"], network["groups"], network.get("num_classes")) == (widths, groups, classes)
        assert 4 * 2 ** (len(widths) - 1) == size == data["size"]
    assert data.get("labels", True) == (classes is not None)
    assert data["batch_size"] * trainer["devices"] * trainer.get("num_nodes", 1) == 2 * batch
    steps = images / batch
    assert trainer["max_steps"] == math.ceil(steps)

    def schedule(start, end):
        return pytest.approx({"start": start, "end": end, "steps": steps}, rel=1e-12)

    assert values_of(config, "Alternating") == {"real_batches": "split"}
    for penalty in ("R1Penalty", "R2Penalty"):
        assert values_of(config, penalty)["gamma"] == schedule(gamma, gamma / 10)
    numbers = values_of(config, "OptimizerSchedule")["values"]
    assert numbers == {"lr": schedule(2e-4, 5e-5), "betas.1": schedule(0.9, 0.99)}
    assert values_of(config, "AugmentationSchedule")["p"] == schedule(0, p)
    assert values_of(config, "GeneratorEMA")["half_life"] == schedule(0, half_life / batch)
    assert model["augment"]["init_args"]["transforms"] == {"bg": 1, "color": 0.5, "cutout": 1}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_r3gan_run_with_narrow_networks(name, tmp_path):
    """On images in folders of classes; the data that they name are not here."""
    for label in "ab":
        (tmp_path / "classes" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 40), (30 * i, 100, 200)).save(tmp_path / "classes" / label / f"{i}.png")
    narrow = [f"--model.{player}.{what}={[4] * len(PRESETS[name][1])}" for player in ("generator", "discriminator")
              for what in ("widths", "groups")]  # fmt: skip
    data = ["--data.batch_size=4", "--data.num_workers=0", f"--data.folder={tmp_path / 'classes'}"]
    data += ["--data.dataset=null"] if "dataset" in load(name)["data"]["init_args"] else []
    one = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.precision=32"]
    main(command(name, *narrow, *data, *one))
    (checkpoint,) = Path("runs", name, "version_0").rglob("last.ckpt")
    gan = GANModule.load_from_checkpoint(checkpoint, weights_only=True)
    condition = None if PRESETS[name][0] is None else torch.tensor([0, 1])
    assert gan.sample(2, condition=condition).shape == (2, 3, PRESETS[name][3], PRESETS[name][3])


@pytest.mark.parametrize("name", SAMPLES | APPLIED)
def test_config_survives_print_config(name, capsys):
    text = printed(capsys, *command(name))
    Path("printed.yaml").write_text(text)
    assert printed(capsys, "fit", "--config", "printed.yaml") == text


@pytest.mark.parametrize("name", SAMPLES)
def test_config_has_what_a_newcomer_looks_for(name):
    config = load(name)
    names = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert {"SampleLogger", "ModelCheckpoint"} <= set(names)
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    assert f"gan-stability fit --config configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", SAMPLES)
def test_numbers_that_belong_together_agree(name):
    config = load(name)
    model, data, trainer = config["model"], config["data"], config["trainer"]
    for scheduler in (model[key] for key in ("g_scheduler", "d_scheduler") if key in model):
        length = "T_max" if scheduler["class_path"] == "CosineAnnealingLR" else "total_iters"
        assert scheduler["init_args"][length] == trainer["max_steps"]
    generator = model["generator"]["init_args"]
    assert model["latent_dim"] == generator.get("latent_dim", generator.get("sizes", [None])[0])
    if data["class_path"] == "Images":
        assert {generator["size"], model["discriminator"]["init_args"]["size"], data["init_args"]["size"]} == {64}


def test_other_digits_are_digits_with_more_callbacks():
    plain, wandb, monitored = load("digits"), load("digits_wandb"), load("digits_monitored")
    watching = {"QualityMonitor", "CollapseDetector", "GeneratorEMA", "HealthMonitor"}
    for config in (wandb, monitored):
        callbacks = config["trainer"]["callbacks"]
        config["trainer"]["callbacks"] = [c for c in callbacks if c["class_path"] not in watching]
        assert len(config["trainer"]["callbacks"]) < len(callbacks)
    monitored["trainer"]["callbacks"][-1] = plain["trainer"]["callbacks"][-1]
    monitored["trainer"]["logger"] = plain["trainer"]["logger"]
    assert monitored == plain
    assert wandb["trainer"].pop("logger")["init_args"]["offline"] is True
    assert plain["trainer"].pop("logger")["class_path"] == "CSVLogger"
    assert wandb == plain


def test_check_digits_reads_a_checkpoint(monkeypatch, capsys):
    main(command("digits"))
    script = runpy.run_path(str(CONFIGS.parent / "examples" / "check_digits.py"))
    monkeypatch.setattr(sys, "argv", ["check_digits.py", "runs/digits/version_0/checkpoints/last.ckpt", "-n", "500"])
    assert script["main"]() == 1  # three steps are too few to learn all digits
    lines = capsys.readouterr().out.splitlines()
    accuracy = float(lines[-12].split()[3].rstrip("%"))
    assert 97 < accuracy <= 100
    assert sum(int(line.split()[1]) for line in lines[-11:-1]) == 500


@pytest.mark.timeout(250)
def test_wandb_config_runs_without_network_or_login(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "https_proxy": "http://localhost:9", "WANDB_SILENT": "false"}
    arguments = command("digits_wandb", "--trainer.log_every_n_steps=1")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gan_stability", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "login" not in done.stdout + done.stderr
    (run,) = Path("runs", "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["_extra_state"]["iteration"] == 3


@pytest.mark.parametrize(
    ("name", "callback"),
    [
        ("ring_unrolled", "Unrolling"),
        ("wgan", "WeightClipping"),
        ("wgan", "UpdateRatio"),
        ("sngan", "SpectralNorm"),
        ("extragradient", "Extragradient"),
        ("consensus", "ConsensusOptimization"),
        ("lookahead", "Lookahead"),
        ("lookahead", "GeneratorEMA"),
    ],
)
def test_config_shows_what_it_is_named_after(name, callback):
    assert callback in [entry["class_path"] for entry in load(name)["trainer"]["callbacks"]]


def test_two_time_scales_are_two_optimizers():
    rates = [load("ttur")["model"][f"{player}_optimizer"]["init_args"]["lr"] for player in "dg"]
    assert rates[0] == 4 * rates[1]


def test_packed_networks_fit_their_packs():
    packed = load("ring_pacgan")["model"]["discriminator"]
    assert packed["class_path"] == "Packed"
    assert packed["init_args"]["discriminator"]["init_args"]["sizes"][0] == 2 * packed["init_args"]["m"]
