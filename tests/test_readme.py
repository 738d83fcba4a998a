"""Every code block of the README and of docs/ runs, and what they name is there."""

import re
import subprocess
from itertools import takewhile
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import tables

import lightning_gan_stability
from lightning_gan_stability.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
SNIPPET = re.compile(r"^--8<--\n(.+)\n--8<--$", flags=re.MULTILINE)
SHORT = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]


def blocks_of(page):
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


BLOCKS = {page: blocks_of(page) for page in PAGES}


def own(language):
    """The blocks of a language that are written on the page itself."""
    return [
        pytest.param(page, text, id=f"{page}-{i}")
        for page, blocks in BLOCKS.items()
        for i, (kind, text) in enumerate(blocks)
        if kind == language and not SNIPPET.search(text)
    ]


def base():
    """The README's YAML file, which the shorter ones are laid over."""
    return next(text for kind, text in BLOCKS["README.md"] if kind == "yaml")


def base_of(page):
    """What a page's YAML is laid over: the config of the recipe that a guide is about, or the README's file."""
    config = ROOT / "configs" / Path(page).name.replace(".md", ".yaml")
    return config.read_text(encoding="utf-8") if page.startswith("docs/guides/") and config.exists() else base()


def fit_file(*texts, options):
    files = []
    for i, text in enumerate(texts):
        Path(f"{i}.yaml").write_text(text, encoding="utf-8")
        files += ["--config", f"{i}.yaml"]
    if not any("logger:" in text for text in texts):
        options = [*options, "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]
    main(["fit", *files, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *options])


def finish(text):
    if "Wandb" in text:
        import wandb

        wandb.finish()


def test_there_is_nothing_but_known_blocks():
    known = {"bash", "python", "yaml"}
    for page, blocks in BLOCKS.items():  # what a benchmark prints is text
        assert {kind for kind, _ in blocks} <= (known | {"text"} if page == "docs/benchmarks.md" else known), page


def test_the_readmes_blocks_are_short():
    assert all(len([line for line in text.splitlines() if line]) <= 17 for kind, text in BLOCKS["README.md"])


def test_the_readme_is_read_once():
    """It is short, its pictures are small, and its two set-up commands stand first, word for word."""
    assert len(README.splitlines()) <= 200
    pictures = re.findall(r"!\[[^]]*\]\((.+?)\)", README)
    assert len(pictures) == 2
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 300_000
    first, second, *_ = (text for kind, text in BLOCKS["README.md"] if kind == "bash")
    assert first == "pip install -e . && gan-stability fit --config configs/ring.yaml\n"
    assert second == "pip install -e '.[test]' && pytest\n"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("text", [pytest.param(p.values[1], id=p.id) for p in own("python") if "README" in p.id])
def test_python(text, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    finish(text)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", sorted({p.values[0] for p in own("python")} - {"README.md"}))
def test_python_of_a_page(page, monkeypatch):
    """The blocks of a page run one after the other, each with what those before have made."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = {"__name__": "__main__"}
    for text in [p.values[1] for p in own("python") if p.values[0] == page]:
        exec(compile(text, page, "exec"), names)
        finish(text)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("page", "text"), own("yaml"))
def test_yaml(page, text, tmp_path, monkeypatch):
    """A file with a model runs as it is, another one laid over the README's, or over the config of its recipe."""
    monkeypatch.syspath_prepend(ROOT)  # the networks of examples/recipes
    if page == "README.md":
        fit_file(text, options=[])
        assert list(tmp_path.rglob("samples/000100.png"))
    elif "strategy:" in text:  # several processes: read, not run
        with pytest.raises(SystemExit, match="0"):
            fit_file(base(), text, options=["--print_config"])
    else:
        fit_file(*([] if "model:" in text else [base_of(page)]), text, options=SHORT)
        finish(text)


ENTRIES = [recipe for recipe in tables.RECIPES if recipe.arguments is not None]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recipe", ENTRIES, ids=lambda recipe: recipe.name)
def test_an_entry_that_a_recipe_names(recipe):
    fit_file(base(), f"trainer:\n  callbacks:\n  - {recipe.entry}\n", options=SHORT)


@pytest.mark.parametrize(("page", "text"), own("bash"))
def test_shell_commands_name_what_is_there(page, text):
    """The commands themselves run in .ci/run and in test_configs.py, in a fresh environment and in this one."""
    subprocess.run(["bash", "-n", "-c", text], check=True, timeout=20)
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / path).exists()


def test_files_that_are_shown_run_elsewhere():
    """In test_examples.py, test_configs.py and test_multinode.py."""
    shown = [path for blocks in BLOCKS.values() for _, text in blocks for path in SNIPPET.findall(text)]
    assert len(shown) >= 8
    for path in shown:
        assert (ROOT / path).exists()
        assert path.startswith(("examples/own_", "examples/image_to_image", "examples/multinode/", "configs/"))


def test_names_and_paths_in_the_text_exist():
    for page in PAGES.values():
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:configs|examples|docs|tests)/[\w./]*)`|\]\(((?:docs|examples)/[^)]+)\)", text):
            assert (ROOT / (path[0] or path[1].partition("#")[0])).exists(), path
    tables_of_symptoms = README.split("## What to add")[1].split("## What it holds")[0]
    told = [
        tables_of_symptoms,
        *(PAGES[f"docs/{page}.md"].read_text("utf-8") for page in ("guides/symptoms", "questions")),
    ]
    for name in re.findall(r"`([A-Z]\w+)\(", "\n".join(told)):
        if name == "Trainer":
            continue
        assert hasattr(lightning_gan_stability, name) or hasattr(lightning.pytorch.callbacks, name), name


def measured(text):
    """Head of every table with a cell that is a number; its rows, and what its section says before it.

    A section begins with a heading or a paragraph in bold.
    """
    lines = text.splitlines()
    for i, line in enumerate(lines[:-1]):
        if line.startswith("|") and re.fullmatch(r"\|[-| :]+\|", lines[i + 1]):
            rows = list(takewhile(lambda row: row.startswith("|"), lines[i + 2 :]))
            if any(re.match(r"[\d−-]*\d", cell.strip()) for row in rows for cell in row.split("|")):
                starts = [j for j in range(i) if lines[j].startswith(("#", "**"))]
                yield line, "\n".join([*lines[starts[-1] if starts else 0 : i], *rows])


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_measured_table_names_its_script(page):
    for head, section in measured(page.read_text(encoding="utf-8")):
        scripts = re.findall(r"examples/[\w/]+\.py", section)
        assert scripts, f"{page.name}: no script is named for {head}"
        assert all((ROOT / script).exists() for script in scripts), head


def test_a_measured_table_without_a_script_is_found():
    text = "# A\n`examples/benchmarks/cost.py`\n\n| a |\n|---|\n| 1 |\n\n**B.** Text.\n\n| b | c |\n|---|---|\n"
    text += "| x | 2 ms |\n\n| d |\n|---|\n| no number |\n"
    found = [(head, "cost.py" in section) for head, section in measured(text)]
    assert found == [("| a |", True), ("| b | c |", False)]
