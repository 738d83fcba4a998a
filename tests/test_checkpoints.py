"""Modules from checkpoints: which classes are imported, and what is said of files that are none."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import fit, points, small, tensors

from lightning_gan_stability import MLP, GANModule, GeneratorEMA, load_gan
from lightning_gan_stability.checkpoints import check_trust, find_checkpoint, find_config, read_checkpoint
from lightning_gan_stability.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # LightningCLI of Lightning 2.6 calls what jsonargparse 4.53 deprecates
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


CONFIG = """
model:
  generator: {class_path: GENERATOR, init_args: {sizes: [4, 8, 2]}}
  discriminator: {class_path: MLP, init_args: {sizes: [2, 8, 1], activation: torch.nn.LeakyReLU}}
  latent_dim: 4
  loss: Hinge
data: {class_path: Ring, init_args: {batch_size: 8}}
trainer:
  max_steps: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: runs, name: toy}}
  callbacks: [{class_path: GeneratorEMA, init_args: {decay: 0.5}}]
"""


class Own(GANModule):
    """Makes its networks itself."""

    def __init__(self, width=16):
        super().__init__(MLP([4, width, 2]), MLP([2, width, 1]), latent_dim=4)


def make():
    return small()


def saved(module, path="saved.ckpt", **options):
    fit(module, points(2), **options).save_checkpoint(path)
    return path


def run(generator="MLP"):
    """A run from YAML; its checkpoint."""
    Path("config.yaml").write_text(CONFIG.replace("GENERATOR", generator))
    main(["fit", "--config", "config.yaml"])
    return find_checkpoint("runs")


def test_a_run_from_yaml_needs_no_arguments():
    path = run()
    gan = load_gan(path)
    assert not gan.training
    state = torch.load(path, weights_only=True)["state_dict"]
    for key, value in tensors(gan.state_dict()).items():
        assert torch.equal(value, state[key]), key
    torch.manual_seed(0)
    latents = torch.randn(5, 4)
    average = MLP([4, 8, 2])
    average.load_state_dict({k.removeprefix("generator_ema."): v for k, v in state.items() if "generator_ema" in k})
    assert torch.equal(gan.sample(latents=latents), average(latents))


def test_the_folder_of_a_run_means_its_newest_checkpoint():
    path = run()
    for name, age in ("older.ckpt", 100), ("newer.ckpt", -100):
        copy = path.with_name(name)
        copy.write_bytes(path.read_bytes())
        os.utime(copy, (copy.stat().st_mtime - age,) * 2)
    assert find_checkpoint("runs").name == "newer.ckpt"
    assert find_checkpoint("runs/toy/version_0").name == "newer.ckpt"
    assert find_config(path) == Path("runs/toy/version_0/config.yaml").resolve()
    assert load_gan("runs").iteration == 2
    Path("empty").mkdir()
    for place in "empty", "nowhere":
        with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
            load_gan(place)
    assert find_config(Path("empty", "a.ckpt")) is None


def test_a_run_from_python_needs_the_class_or_a_function():
    path = saved(small())
    with pytest.raises(ValueError, match=r"run from Python.*--model my_project.make_gan"):
        load_gan(path)
    latents = torch.zeros(2, 4)
    gan = load_gan(path, make)
    assert gan.iteration == 2
    assert not torch.equal(gan.sample(latents=latents), make().eval().sample(latents=latents))
    with pytest.raises(ValueError, match="GANModule does not make its networks itself"):
        load_gan(path, GANModule)
    with pytest.raises(ValueError, match="`model` must make a GANModule, and made a Linear"):
        load_gan(path, lambda: nn.Linear(1, 1))
    with pytest.raises(ValueError, match="do not fit the module: size mismatch"):
        load_gan(path, lambda: Own(width=3))
    with pytest.raises(ValueError, match="`model` must be a GANModule"):
        load_gan(path, nn.Linear)


def test_a_class_that_makes_its_networks():
    path = saved(Own(width=5))
    assert load_gan(path, Own).generator.layers[0].out_features == 5


def test_the_average_comes_back():
    gan = small()
    path = saved(gan, callbacks=[GeneratorEMA(decay=0.5)])
    assert torch.equal(
        load_gan(path, make).sample(latents=torch.ones(1, 4)), gan.eval().sample(latents=torch.ones(1, 4))
    )


def test_classes_of_others_are_not_imported():
    Path("spiteful.py").write_text(
        "from pathlib import Path\n"
        "from lightning_gan_stability import MLP\n"
        "Path('imported').touch()\n"
        "class Mine(MLP):\n    pass\n"
    )
    path = run("spiteful.Mine")
    Path("imported").unlink()
    del sys.modules["spiteful"]
    with pytest.raises(ValueError, match=r"names `spiteful.Mine`, which would be imported: add `--trust spiteful`"):
        load_gan(path)
    assert not Path("imported").exists()
    for trust in ["spiteful"], ["spiteful.Mine"]:
        assert type(load_gan(path, trust=trust).generator).__name__ == "Mine"
    assert Path("imported").exists()


def test_a_class_that_is_given_is_trusted_and_nothing_else():
    path = run()
    assert load_gan(path, GANModule).iteration == 2
    state = torch.load(path, weights_only=True)
    state["hyper_parameters"]["generator"]["class_path"] = "this.Nothing"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"names `this.Nothing`"):
        load_gan(path, GANModule)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.hub.load",
        "torch.load",
        "lightning_gan_stability.guard.zipfile.main",
        "lightning_gan_stability.cli.main.main",
        "torch.nn.functional.warnings.warn",
        "torch.nn.init.ones_",
        "torch.optim_evil.Adam",
    ],
)
def test_trust_is_for_classes_of_networks_losses_and_optimizers(name):
    with pytest.raises(ValueError, match="would be imported"):
        check_trust([{"class_path": "torch.nn.Linear", "init_args": {"f": name}}], (), "It")
    check_trust([name], [name.partition(".")[0]], "It")


def changed(path, **entries):
    """A checkpoint with other entries."""
    state = torch.load(path, weights_only=True)
    torch.save(state | entries, "changed.ckpt")
    return "changed.ckpt"


@pytest.mark.parametrize(
    "text",
    [
        "{class_path: %s}",
        "class_path: %s\ninit_args:\n  sizes: [4, 2]",
        '{"class_path":\t"%s"}',
        '{class_path: "\\x73%s"}',
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_text_that_the_parser_would_read_as_a_class_is_not_imported(text, nested):
    Path("spiteful.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    path = run()
    parameters = torch.load(path, weights_only=True)["hyper_parameters"]
    name = "spiteful.Mine"
    text = text % name[1:] if "x73" in text else text % name
    arguments = {"class_path": "lightning_gan_stability.Packed", "init_args": {"discriminator": text, "m": 2}}
    parameters["discriminator"] = arguments if nested else text
    with pytest.raises(ValueError, match=r"names `spiteful.Mine`, which would be imported"):
        load_gan(changed(path, hyper_parameters=parameters))
    assert not Path("imported").exists()


def test_hyperparameters_under_names_of_older_checkpoints_are_not_trusted():
    Path("spiteful.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    path = run()
    parameters = torch.load(path, weights_only=True)["hyper_parameters"]
    del parameters["generator"]
    for key in "hparams", "module_arguments":
        older = {"generator": {"class_path": "spiteful.Mine"}}
        with pytest.raises(ValueError, match=r"names `spiteful.Mine`, which would be imported"):
            load_gan(changed(path, **{"hyper_parameters": parameters, key: older}))
    assert not Path("imported").exists()


@pytest.mark.parametrize("name", ["spiteful.Mine ", "spiteful.a b", "spiteful.a·b"])
def test_an_odd_name_of_a_class_is_not_imported(name):
    Path("spiteful.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    path = run()
    parameters = torch.load(path, weights_only=True)["hyper_parameters"] | {"_class_path": name}
    with pytest.raises(ValueError, match=r"names `spiteful"):
        load_gan(changed(path, hyper_parameters=parameters))
    assert not Path("imported").exists()


def test_short_names_could_be_anybodys():
    """The parser looks for them among the classes of the process; what it saves has dotted ones."""
    with pytest.raises(ValueError, match="names the class `Evil` without its module"):
        check_trust([{"generator": {"class_path": "Evil"}}], (), "It")
    check_trust({"class_path": "Evil"}, ["Evil"], "It")


def test_words_with_dots_that_nothing_is_named_after_are_words():
    check_trust(
        {"a": ["no_such_module.csv", "3.14", "a sentence. with dots", "torch.nn.ReLU", "torch.optim.Adam"]}, (), ""
    )


def test_another_instantiator_is_refused():
    path = run()
    state = torch.load(path, weights_only=True)
    state["hyper_parameters"]["_instantiator"] = "lightning_gan_stability.MLP"
    torch.save(state, path)
    with pytest.raises(ValueError, match="unknown instantiator"):
        load_gan(path)


def test_files_that_are_no_checkpoints():
    path = Path(saved(small()))
    whole = path.read_bytes()
    for name, content in ("torn", whole[:-500]), ("half", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello"):
        file = Path(f"{name}.ckpt")
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"'{name}.ckpt' is torn, or no checkpoint at all"):
            read_checkpoint(file)
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, "foreign.ckpt")
    torch.save([1], "list.ckpt")
    for name in "foreign", "list":
        with pytest.raises(ValueError, match=rf"'{name}.ckpt' is no checkpoint of a GANModule"):
            read_checkpoint(f"{name}.ckpt")
    torch.save(torch.load(path, weights_only=True) | {"more": Path("x")}, "objects.ckpt")
    with pytest.raises(ValueError, match=r"holds an object of pathlib.*could run code"):
        read_checkpoint("objects.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'nowhere.ckpt'"):
        read_checkpoint("nowhere.ckpt")
