"""From a folder of pictures to a trained, watched GAN: the commands of docs/newcomers.md, and what `new` chooses."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from browsers import CHROMIUM, DRAWN, DRIVER, chromium, complaints
from PIL import Image

from lightning_gan_stability.checkpoints import load_gan
from lightning_gan_stability.cli import main
from lightning_gan_stability.cli.template import LEAST, SIZES, choose, look_at, start

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/newcomers.md").read_text(encoding="utf-8")
DRAWING = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1]

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")  # sys.argv is pytest's


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # LightningCLI of Lightning 2.6 calls what jsonargparse 4.53 deprecates
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def draw(folder, number=LEAST, size=(40, 50), mode="RGB", kind="png"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(number):
        shade = 5 * i % 256
        Image.new(mode, size, shade if mode in ("L", "1", "P") else (shade, 90, 200)).save(f"{folder}/{i:03}.{kind}")


def command(*arguments):
    """Run a command in a process of its own, on one core."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gan_stability", *arguments],
        capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def config(folder="my_gan"):
    return yaml.safe_load(Path(folder, "config.yaml").read_text(encoding="utf-8"))


def fit(*more, steps=1):
    main(["fit", "--config", "my_gan/config.yaml", f"--trainer.max_steps={steps}", "--trainer.accelerator=cpu",
          "--trainer.enable_progress_bar=false", *more])  # fmt: skip


# ---------- the tutorial, each command in a process of its own


def test_the_commands_of_the_tutorial():
    exec(compile(DRAWING, "newcomers.md", "exec"), {})
    assert len([*Path("shapes").rglob("*.png")]) == 300
    said = command("new", "my_gan", "--images", "shapes", "--size", "16").splitlines()
    assert said[0].startswith(
        "300 images in shapes: shorter side 32 pixels, colour (RGB 300), 3 sub-folders as classes"
    )
    assert 3 <= len(said) <= 6
    assert said[-2].strip() == "gan-stability fit --config my_gan/config.yaml"
    file = Path("my_gan/config.yaml")
    file.write_text(file.read_text().replace("&every 200", "&every 100"))  # two pictures
    narrow = ["--model.generator.width=8", "--model.discriminator.width=8"]  # quicker
    told = command(
        "fit", "--config", "my_gan/config.yaml", "--trainer.max_steps=200", "--trainer.accelerator=cpu", *narrow
    )
    assert "200 steps" in told  # the table at the end
    run = Path("my_gan/runs/version_0")
    for name in ("metrics.csv", "hparams.yaml", "config.yaml", "checkpoints/last.ckpt", "samples/000200.png"):
        assert (run / name).is_file(), name
    gan = load_gan("my_gan")
    assert gan.iteration == 200
    assert gan.sample(condition=torch.arange(3)).shape == (3, 3, 16, 16)
    command("sample", "my_gan", "--n", "20", "--out", "my_gan/samples", "--grid")
    made = Path("my_gan/samples")
    assert [f"{i:06d}.png" for i in range(20)] == sorted(file.name for file in made.glob("0*.png"))
    with Image.open(made / "grid.png") as grid:
        assert grid.size == (8 * 18 + 2, 3 * 18 + 2)  # a row for each class
    table = command("evaluate", str(run), "--bootstrap", "8", "--out", "table.json")
    [found] = json.loads(Path("table.json").read_text())["checkpoints"]
    with open(run / "metrics.csv", newline="") as lines:
        last = [float(row["quality/fid"]) for row in csv.DictReader(lines) if row.get("quality/fid")][-1]
    assert "fid" in table
    assert found["metrics"]["fid"]["value"] == pytest.approx(last, rel=1e-6)
    command("report", str(run), "--out", "report.html")
    assert 10**5 < Path("report.html").stat().st_size < 5 * 10**6
    command("export", str(run), "--out", "my_gan/published")
    assert {"generator.safetensors", "README.md", "sampler.pt2"} <= {x.name for x in Path("my_gan/published").iterdir()}
    if CHROMIUM and DRIVER:
        look_at_the_report()


def look_at_the_report():
    """Charts are drawn, the slider moves the pictures, and nobody complains."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with chromium() as browser:
        browser.get(Path("report.html").absolute().as_uri())
        WebDriverWait(browser, 60).until(lambda page: all(page.execute_script(DRAWN)))
        image = browser.find_element(By.CSS_SELECTOR, "figure img")
        before = image.get_attribute("src")
        browser.find_element(By.CSS_SELECTOR, "input[type=range]").send_keys(Keys.ARROW_LEFT)
        assert image.get_attribute("src") != before
        assert complaints(browser) == []


# ---------- one place for the size of images


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("size", [16, 32])
def test_the_size_stands_in_one_place(size):
    draw("photos")
    start("my_gan", "photos", size=64)
    file = Path("my_gan/config.yaml")
    text = file.read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if re.search(r"\bsize: .*64", line)]) == 1
    file.write_text(text.replace("size: &size 64", f"size: &size {size}"), encoding="utf-8")
    fit()
    assert load_gan("my_gan").sample(2).shape == (2, 3, size, size)


def test_the_config_is_printed_with_all_settings(capsys):
    draw("photos")
    start("my_gan", "photos", size=16)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "my_gan/config.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    model = printed["model"]["init_args"]
    parts = [printed["data"], model["generator"], model["discriminator"]]
    assert [part["init_args"]["size"] for part in parts] == [16, 16, 16]


def test_settings_can_be_given_behind_the_config():
    draw("photos")
    start("my_gan", "photos", size=32)
    fit("--data.size=16", "--model.generator.size=16", "--model.discriminator.size=16", "--data.batch_size=8")
    assert load_gan("my_gan").sample(2).shape == (2, 3, 16, 16)


# ---------- what it chooses


def test_the_size_fits_the_images():
    for side, size in [(10, 16), (31, 16), (32, 32), (100, 64), (600, 64)]:
        draw(f"of_{side}", size=(side, side + 9))
        assert choose(look_at(f"of_{side}"), None, gpu=False).size == size
    assert choose(look_at("of_600"), None, gpu=True).size == 128


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_one_that_the_networks_take(size):
    draw("photos")
    start("my_gan", "photos", size=size)
    model = config()["model"]
    from lightning_gan_stability import DCGANDiscriminator, DCGANGenerator

    narrow = {"width": 2}
    images = DCGANGenerator(**model["generator"]["init_args"] | narrow)(torch.randn(2, model["latent_dim"]))
    assert images.shape == (2, 3, size, size)
    assert DCGANDiscriminator(**model["discriminator"]["init_args"] | narrow)(images).shape == (2,)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3)])
def test_grey_images_have_one_channel(mode, channels):
    draw("photos", mode=mode)
    start("my_gan", "photos", size=16)
    assert config()["data"]["init_args"]["channels"] == channels
    assert config()["model"]["generator"]["init_args"]["channels"] == channels


def test_numbers_fit_the_number_of_images():
    draw("photos", LEAST)
    look = look_at("photos")
    choice = choose(look, 16, gpu=False)
    assert (choice.holdout, choice.batch_size, choice.log_every) == (5, 32, 1)
    many = choose(look.__class__(50_000, look.sides, look.modes, None, []), 16, gpu=True)
    assert (many.holdout, many.batch_size, many.log_every) == (1000, 64, 20)


def test_sub_folders_are_classes():
    for name in ("b", "a"):
        draw(f"photos/{name}", 30)
    assert look_at("photos").classes == ["a", "b"]
    start("my_gan", "photos", size=16)
    found = config()
    assert found["data"]["init_args"]["labels"] is True
    assert [found["model"][n]["init_args"]["num_classes"] for n in ("generator", "discriminator")] == [2, 2]


@pytest.mark.filterwarnings("default")
def test_sub_folders_that_are_no_classes(capsys):
    draw("photos/a", 50)
    draw("photos/b", 9)
    main(["new", "my_gan", "--images", "photos", "--size", "16"])
    said = capsys.readouterr().out
    assert "59 images in photos" in said
    assert "no classes." in said
    assert "Sub-folders are no classes here, since b has 9 images, and a class needs 10." in said
    assert config()["data"]["init_args"]["labels"] is False
    assert config()["model"]["generator"]["init_args"]["num_classes"] is None
    fit()
    draw("photos", 1)
    assert look_at("photos").notes == ["Sub-folders are no classes here, since some images lie beside them."]


@pytest.mark.filterwarnings("default")
def test_images_that_cannot_be_read_are_left_out_and_named():
    draw("photos")
    Path("photos/broken.png").write_bytes(b"no image")
    said = start("my_gan", "photos", size=16)
    assert said[0].startswith(f"{LEAST} images in photos")
    assert re.match(f"1 of {LEAST + 1} images in photos cannot be read, and are left out.*broken.png", said[1])
    fit()


@pytest.mark.filterwarnings("default")
def test_an_archive_of_images():
    draw("photos")
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for file in Path("photos").iterdir():
            archive.write(file)
    assert start("my_gan", "photos.zip", size=16)[0].startswith(f"{LEAST} images in photos.zip")
    fit()


@pytest.mark.filterwarnings("default")
def test_without_images_there_are_digits():
    said = start("my_gan")
    assert said[0] == "1,797 handwritten digits of scikit-learn, 8x8 pixels, grey."
    fit()
    assert load_gan("my_gan").sample(condition=torch.arange(10)).shape == (10, 1, 8, 8)


def test_a_folder_with_any_name_is_found_again():
    draw("a: b #1", 60)
    start("my gan", "a: b #1", size=16)
    found = config("my gan")
    assert found["data"]["init_args"]["folder"] == "a: b #1"
    assert found["trainer"]["logger"]["init_args"]["save_dir"] == "my gan"


# ---------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "nothing"}, "--images does not exist: nothing"),
        ({"images": "empty"}, r"--images has no images \(.*\): empty"),
        ({"images": "broken"}, "60 of 60 images in --images cannot be read.*broken/000.png"),
        ({"images": "few"}, f"--images needs at least {LEAST} images that can be read, and few has 49"),
        ({"images": "photos", "size": 48}, r"`size` must be .*16.*256.*, got 48"),
        ({"images": "photos", "size": 8}, r"`size` must be .*16.*256.*, got 8"),
        ({"size": 32}, "`size` belongs to images of your own: add --images FOLDER, or remove --size"),
    ],
)
def test_refusals_leave_nothing(arguments, message):
    for name, number in [("empty", 0), ("few", LEAST - 1), ("photos", LEAST), ("broken", 60)]:
        draw(name, number)
    for file in Path("broken").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=message):
        start("my_gan", **arguments)
    assert not Path("my_gan").exists()


def test_a_folder_that_is_not_empty():
    draw("photos")
    Path("my_gan").mkdir()
    Path("my_gan/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="`my_gan` is not empty: name another folder, or add --overwrite"):
        start("my_gan", "photos")
    main(["new", "my_gan", "--images", "photos", "--overwrite"])
    assert {path.name for path in Path("my_gan").iterdir()} == {"notes.txt", "config.yaml"}
    assert Path("my_gan/notes.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="must be a folder, and is a file"):
        start("my_gan/notes.txt", "photos")


@pytest.mark.parametrize("folder", ["photos/my_gan", "photos"])
def test_a_folder_among_the_images(folder):
    draw("photos")
    with pytest.raises(ValueError, match="lies in the folder of the images"):
        start(folder, "photos", overwrite=True)
