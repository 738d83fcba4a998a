"""Every code block of the README runs, and what it names is there."""

import re
import subprocess
from pathlib import Path

import lightning.pytorch.callbacks
import pytest

import lightning_gan_stability
from lightning_gan_stability.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language):
    return [pytest.param(text, id=f"{language}{i}") for i, (kind, text) in enumerate(BLOCKS) if kind == language]


def test_there_is_nothing_but_known_blocks():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("text", blocks("python"))
def test_python(text, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert len([line for line in text.splitlines() if line]) <= 17
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    if "Wandb" in text:
        import wandb

        wandb.finish()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml(text, tmp_path):
    (tmp_path / "readme.yaml").write_text(text)
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]
    main(
        ["fit", "--config", "readme.yaml", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *logger]
    )
    assert list(tmp_path.rglob("samples/000100.png"))


@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_commands_name_what_is_there(text):
    """The commands themselves run in .ci/run and in test_configs.py, in a fresh environment and in this one."""
    subprocess.run(["bash", "-n", "-c", text], check=True, timeout=20)
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / path).exists()


def test_names_and_paths_in_the_text_exist():
    for path in re.findall(r"`((?:configs|examples|docs)/[\w./]*)`|\]\(((?:docs|examples)/[^)]+)\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
    table = README.split("## What to add")[1].split("## What it holds")[0]
    for name in re.findall(r"`([A-Z]\w+)\(", table):
        assert hasattr(lightning_gan_stability, name) or hasattr(lightning.pytorch.callbacks, name), name
