"""A published generator draws the same samples: from its weights, from its program, and as the Hub would get it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from toys import trainer

from lightning_gan_stability import MLP, GANModule, Ring
from lightning_gan_stability.checkpoints import load_gan
from lightning_gan_stability.cli import main
from lightning_gan_stability.publishing import export_sampler, load_published, measurements, publish, push

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),  # sys.argv is pytest's
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]

CONFIG = """\
model:
  generator:
    class_path: DCGANGenerator
    init_args: {latent_dim: 6, channels: 1, size: 8, width: 4, num_classes: 10}
  discriminator:
    class_path: DCGANDiscriminator
    init_args: {channels: 1, size: 8, width: 4, num_classes: 10}
  latent_dim: 6
  loss: Hinge
data: {class_path: Digits, init_args: {batch_size: 32}}
trainer:
  max_steps: 4
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  logger: {class_path: CSVLogger, init_args: {save_dir: ., name: run}}
  callbacks:
  - {class_path: R1Penalty, init_args: {gamma: 0.5}}
  - {class_path: GeneratorEMA, init_args: {decay: 0.5}}
  - {class_path: SpectralNorm, init_args: {networks: [generator]}}
  - class_path: QualityMonitor
    init_args: {extractor: torch.nn.Flatten, metrics: [fid, recall], n_samples: 50, every: 2}
  - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 4}}
"""


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    # Lightning 2.6 calls what jsonargparse 4.53 deprecates
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run from YAML: with classes, an average, spectral norm and measurements."""
    place = tmp_path_factory.mktemp("trained")
    (place / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["fit", "--config", "config.yaml"])
    return place / "run/version_0"


@pytest.fixture(scope="module")
def published(run):
    return publish(load_gan(run), run.parent / "published", run, n_samples=20)


LATENTS = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(7)


def made(module_or_run, n):
    module = load_gan(module_or_run) if isinstance(module_or_run, Path) else module_or_run
    with torch.no_grad():
        return module.sample(condition=LABELS[:n], latents=LATENTS[:n])


def python_gan(callbacks=(), **arguments):
    """A run from Python, whose checkpoint does not say how networks are made."""
    gan = GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), latent_dim=4, **arguments)
    runner = trainer(max_steps=2, limit_val_batches=0, callbacks=list(callbacks))
    runner.fit(gan, Ring(batch_size=8, epoch_length=4))
    runner.save_checkpoint("gan.ckpt")
    return gan.eval()


def make():
    return GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), latent_dim=4)


# ---------- what is in the folder


def test_what_is_published(published):
    names = {"README.md", "config.yaml", "generator.safetensors", "sampler.pt2", "samples.png"}
    assert {path.name for path in published.iterdir()} == names
    assert {path.name for path in published.parent.iterdir()} == {"version_0", "published"}  # nothing half-written


def test_the_weights_are_those_of_the_average_with_spectral_norm_in_them(published, run):
    gan = load_gan(run)
    average, last = gan.generator_ema, gan.generator
    weights = load_file(published / "generator.safetensors")
    assert not [name for name in weights if "parametriz" in name]
    first = next(name for name in weights if name.endswith("layers.1.weight"))
    assert torch.equal(weights[first], average.layers[1].weight)
    assert not torch.equal(weights[first], last.layers[1].weight)


def test_a_published_generator_is_made_again(published, run):
    module = load_published(published)
    assert not module.training
    assert torch.equal(made(module, 7), made(run, 7))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_program_makes_what_the_module_samples(published, run, n):
    program = torch.export.load(published / "sampler.pt2").module()
    assert torch.allclose(program(LATENTS[:n], LABELS[:n]), made(run, n), rtol=0, atol=1e-6)


def test_the_program_needs_torch_alone(published, run):
    torch.save((LATENTS, LABELS, made(run, 7)), "pair.pt")
    code = (
        "import sys, torch; latents, labels, images = torch.load('pair.pt'); "
        f"program = torch.export.load({str(published / 'sampler.pt2')!r}).module(); "
        "assert torch.allclose(program(latents, labels), images, atol=1e-6); "
        "assert not [name for name in sys.modules if name.startswith('lightning')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_discriminator_stays_out(published):
    program = torch.export.load(published / "sampler.pt2")
    assert len(program.state_dict) == len(load_file(published / "generator.safetensors"))


def test_the_picture_shows_as_many_samples_as_asked_for(published):
    with Image.open(published / "samples.png") as image:
        assert image.size == (52, 42)  # 5 x 4 of 8x8 pixels with 2 between


def test_the_model_card(published, run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(published / "README.md")
    assert card.data.library_name == "lightning-gan-stability"
    assert "gan" in card.data.tags
    assert card.data.model_name == "published"
    logged = list(csv_rows(run / "metrics.csv"))
    fid = next(float(row["quality/fid"]) for row in reversed(logged) if row["quality/fid"])
    (found,) = [r for r in card.data.eval_results if r.metric_type == "fid"]
    assert found.metric_value == pytest.approx(fid, abs=1e-5)
    assert found.metric_name == "quality/fid (Flatten)"
    assert found.dataset_name == "Digits"
    text = card.text
    for said in ("| steps | 4 |", "`Digits`", "`Hinge`", "`R1Penalty(gamma=0.5, every=1)`", "![Samples](samples.png)",
                 f"| fid ↓ | {fid:.4g} |", "n_real 50", "10 classes", "## Limits"):  # fmt: skip
        assert said in text, said
    assert str(run) not in text


def test_the_python_of_the_model_card_runs(published, monkeypatch):
    monkeypatch.chdir(published)
    blocks = [part.split("```")[0] for part in (published / "README.md").read_text("utf-8").split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["samples"].shape == (16, 1, 8, 8)


def test_measurements_are_those_of_the_checkpoint_and_not_later_ones():
    Path("run/checkpoints").mkdir(parents=True)
    rows = [
        "step,d/r1,quality/fid,quality/kid,eyes/fid",
        "0,,9.0,0.9,",
        "200,,5.0,,",
        "250,0.1,,,",
        "300,,,,7.5",
        "400,,1.0,0.1,2",
    ]
    Path("run/metrics.csv").write_text("\n".join(rows) + "\n")
    Path("run/hparams.yaml").write_text("quality: {extractor: Flatten, n_real: 50}\n")
    found = measurements(Path("run/checkpoints/last.ckpt"), 300)
    assert found == [
        ("eyes", 300, {"fid": 7.5}, {}),
        ("quality", 200, {"fid": 5.0}, {"extractor": "Flatten", "n_real": 50}),
    ]
    assert measurements(Path("run/checkpoints/last.ckpt"), 400)[1].values == {"fid": 1.0, "kid": 0.1}
    assert measurements(Path("elsewhere/checkpoints/last.ckpt"), 400) == []


def csv_rows(path):
    import csv

    with path.open(newline="") as lines:
        yield from csv.DictReader(lines)


# ---------- runs from Python, shared weights, samples without a picture


def test_a_run_from_python_needs_what_makes_its_module():
    gan = python_gan()
    publish(gan, "mine", "gan.ckpt")
    with pytest.raises(ValueError, match="of a run from Python, and does not say how its networks are made"):
        load_published("mine")
    latents = torch.randn(3, 4)
    assert torch.equal(load_published("mine", make).sample(latents=latents), gan.sample(latents=latents))
    assert 'load_published(".", make_gan)' in Path("mine/README.md").read_text("utf-8")
    assert "## Quality" not in Path("mine/README.md").read_text("utf-8")


class Shared(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 2)

    def forward(self, latents):
        return self.out(self.second(self.first(latents)))


def shared():
    return GANModule(Shared(), MLP([2, 8, 1]), latent_dim=4)


def test_shared_weights():
    gan = shared()
    runner = trainer(max_steps=1, limit_val_batches=0)
    runner.fit(gan, Ring(batch_size=8, epoch_length=4))
    runner.save_checkpoint("gan.ckpt")
    publish(gan.eval(), "mine", "gan.ckpt")
    latents = torch.randn(3, 4)
    assert torch.equal(load_published("mine", shared).sample(latents=latents), gan.sample(latents=latents))
    assert load_published("mine", shared).generator.second.weight is not None


# ---------- trust


def test_names_that_nobody_trusts_are_refused_as_by_load_gan(published, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "generator.safetensors").write_bytes((published / "generator.safetensors").read_bytes())
    config = yaml.safe_load((published / "config.yaml").read_text("utf-8"))
    config["loss"] = {"class_path": "os.system"}
    (mine / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"names `os\.system`, which would be imported: add `--trust os`"):
        load_published(mine)
    with pytest.raises(ValueError, match=r"names `os\.system`, which would be imported"):
        load_published(mine, GANModule)


def test_no_objects_of_python_are_read_from_a_config(published, tmp_path):
    (tmp_path / "generator.safetensors").write_bytes((published / "generator.safetensors").read_bytes())
    (tmp_path / "config.yaml").write_text("loss: !!python/object/apply:os.system ['exit 1']\n")
    with pytest.raises(ValueError, match="is no plain YAML: could not determine a constructor"):
        load_published(tmp_path)


def test_weights_of_another_network_are_refused(published):
    python_gan()
    publish(python_gan(), "mine", "gan.ckpt", program=False)
    Path("mine/generator.safetensors").write_bytes((published / "generator.safetensors").read_bytes())
    with pytest.raises(ValueError, match="The weights of 'mine' do not fit the generator"):
        load_published("mine", make)


def test_what_is_no_published_generator():
    with pytest.raises(FileNotFoundError, match="'nothing' is no published generator: it has no generator"):
        load_published("nothing")


# ---------- refusals


def test_a_folder_that_is_not_empty():
    gan = python_gan()
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="'mine' is not empty: name another folder, or replace the files by --overwr"):
        publish(gan, "mine", "gan.ckpt")
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]
    publish(gan, "mine", "gan.ckpt", overwrite=True)
    publish(gan, "mine", "gan.ckpt", overwrite=True, program=False)
    names = {"notes.txt", "README.md", "config.yaml", "generator.safetensors", "samples.png"}
    assert {path.name for path in Path("mine").iterdir()} == names  # and no program of an earlier time
    assert Path("mine/notes.txt").read_text() == "keep"
    with pytest.raises(ValueError, match=r"must be a folder, and 'mine/notes\.txt' is a file"):
        publish(gan, "mine/notes.txt", "gan.ckpt")


class Counting(nn.Module):
    """Makes samples whose number of steps depends on their values, which no program has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, latents):
        return self.linear(latents) if latents.sum().item() > 0 else self.linear(-latents)


class Noisy(nn.Module):
    """Draws noise of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, latents):
        return self.linear(latents) + torch.randn(latents.shape[0], 2)


@pytest.mark.parametrize(
    ("network", "message"),
    [(Counting, "cannot be exported by torch.export (.*): publish it without"), (Noisy, "draws noise in its network")],
)
def test_a_network_without_a_program_is_refused_and_leaves_nothing(network, message):
    python_gan()
    before = {path.name for path in Path().iterdir()}
    gan = GANModule(network(), MLP([2, 8, 1]), latent_dim=4).eval()
    with pytest.raises(ValueError, match=f"{message}.*--no-program"):
        publish(gan, "mine", "gan.ckpt")
    assert {path.name for path in Path().iterdir()} == before
    publish(gan, "mine", "gan.ckpt", program=False)
    assert not Path("mine/sampler.pt2").exists()
    assert "torch.export" not in Path("mine/README.md").read_text("utf-8")


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 + 3, 2)

    def forward(self, latents, condition):
        return self.linear(torch.cat([latents, condition["place"]], dim=1))


def test_a_condition_of_which_nothing_is_known():
    python_gan()
    gan = GANModule(Conditional(), MLP([2, 8, 1]), latent_dim=4).eval()
    with pytest.raises(ValueError, match="takes a condition, and nothing says which: publish it in Python"):
        publish(gan, "mine", "gan.ckpt")
    rows = {"place": torch.randn(5, 3)}
    with pytest.raises(ValueError, match="must have two rows at least"):
        publish(gan, "mine", "gan.ckpt", condition={"place": rows["place"][:1]})
    publish(gan, "mine", "gan.ckpt", condition=rows)
    latents = torch.randn(5, 4)
    found = torch.export.load("mine/sampler.pt2").module()(latents, rows)
    assert torch.allclose(found, gan.sample(condition=rows, latents=latents), atol=1e-6)


def test_a_generator_without_latents():
    gan = GANModule(MLP([3, 8, 2]), MLP([2, 8, 1])).eval()
    rows = torch.randn(7, 3)
    program = export_sampler(gan, rows).module()
    assert torch.allclose(program(rows), gan.sample(condition=rows), atol=1e-6)
    python_gan()
    with pytest.raises(ValueError, match="takes a condition, and nothing says which"):
        publish(gan, "mine", "gan.ckpt")


def test_extras_and_a_generate_of_ones_own():
    class Scaled(GANModule):
        def generate(self, network, n, condition, latents):
            return 2 * network(latents), {"codes": latents}

    gan = Scaled(MLP([4, 8, 2]), MLP([2, 8, 1]), latent_dim=4).eval()
    latents = torch.randn(5, 4)
    assert torch.allclose(export_sampler(gan).module()(latents), 2 * gan.generator(latents), atol=1e-6)


# ---------- the Hub


@pytest.fixture
def hub(monkeypatch):
    """What the Hub would be asked to do: two methods of its client send, and all else of it is real."""
    from huggingface_hub import HfApi, RepoUrl

    asked = []

    def create_repo(self, repo_id, **options):
        asked.append(("create", repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **options):
        sent = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        asked.append(("commit", repo_id, options, sent))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return asked


def test_what_is_uploaded_is_the_five_files_and_nothing_else(published, hub):
    (published / "notes.txt").write_text("mine")
    try:
        address = push(published, "me/shapes", private=True)
    finally:
        (published / "notes.txt").unlink()
    assert address == "https://huggingface.co/me/shapes"
    create, commit = hub
    assert create == ("create", "me/shapes", {"private": True, "exist_ok": True})
    assert commit[1] == "me/shapes"
    assert commit[2]["commit_message"] == "Publish a generator"
    assert commit[3] == {path.name: path.read_bytes() for path in published.iterdir()}
    assert len(commit[3]) == 5


def test_a_name_that_is_none(published, hub):
    for name, message in [("shapes", "of the form user/name, got 'shapes'"), ("me/a b", "Repo id must use")]:
        with pytest.raises(ValueError, match=message):
            push(published, name)
    assert hub == []


def test_a_refusal_of_the_hub_says_where_the_files_are(published, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    def refuse(self, *args, **options):
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"has not taken me/shapes \(Token is required\); the files are in '.*publ"):
        push(published, "me/shapes")


@pytest.mark.parametrize("name", ["safetensors", "huggingface_hub"])
def test_a_missing_package_has_its_line(name, monkeypatch):
    gan = python_gan()
    for module in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {name}: pip install 'lightning-gan-stability\[hub\]'"):
        publish(gan, "mine", "gan.ckpt")
    assert not Path("mine").exists()


# ---------- the command


def test_the_command(run, published, hub, capsys):
    main(["export", str(run), "--out", "mine", "--n-samples", "20", "--push-to-hub", "me/mine"])
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "mine: README.md, config.yaml, generator.safetensors, sampler.pt2, samples.png",
        "https://huggingface.co/me/mine",
    ]
    assert Path("mine/generator.safetensors").read_bytes() == (published / "generator.safetensors").read_bytes()
    assert Path("mine/samples.png").read_bytes() == (published / "samples.png").read_bytes()
    assert hub[0] == ("create", "me/mine", {"private": False, "exist_ok": True})


def test_the_command_uploads_nothing_without_being_asked(run, hub):
    main(["export", str(run), "--out", "mine", "--no-program"])
    assert hub == []
    assert not Path("mine/sampler.pt2").exists()
    with pytest.raises(ValueError, match="`--private` belongs to --push-to-hub"):
        main(["export", str(run), "--out", "other", "--private"])
    with pytest.raises(ValueError, match="of the form user/name, got 'mine'"):
        main(["export", str(run), "--out", "other", "--push-to-hub", "mine"])
    assert not Path("other").exists()
