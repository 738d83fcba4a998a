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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = {  # heads of tables that hold no measured number
    "| Symptom | Add | What it does |",
    "| Method | DDP | shards | 16-mixed | bf16-mixed | bf16-true | 64-true | compiled |",
    "| | Assumed | Exchange per step: bytes + latency | Efficiency t(1)/t(N) |",
}


def tables(text):
    """Head of every table, with what its section says before it: from the last heading or paragraph in bold on."""
    lines = text.splitlines()
    for i, line in enumerate(lines[:-1]):
        if line.startswith("|") and re.fullmatch(r"\|[-| :]+\|", lines[i + 1]):
            starts = [j for j in range(i) if lines[j].startswith(("#", "**"))]
            yield line, "\n".join(lines[starts[-1] : i] if starts else lines[:i])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_measured_table_names_its_script(page):
    for head, section in tables(page.read_text(encoding="utf-8")):
        if head not in REFERENCE:
            scripts = re.findall(r"examples/[\w/]+\.py", section)
            assert scripts, f"{page.name}: no script is named for {head}"
            assert all((ROOT / script).exists() for script in scripts), head


def test_a_table_without_a_script_is_found():
    text = "# A\n`examples/benchmarks/cost.py`\n\n| a |\n|---|\n| 1 |\n\n**B.** Text.\n\n| b | c |\n|---|---|\n"
    assert [(head, "cost.py" in section) for head, section in tables(text)] == [("| a |", True), ("| b | c |", False)]
