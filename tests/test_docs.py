"""What the documentation says of the package: names, defaults, papers, tests, and what the site is built from."""

import inspect
import re
import types
from collections import Counter
from pathlib import Path

import pytest
import tables
import torch
import yaml
from lightning.pytorch import LightningDataModule
from toys import small, trainer

import lightning_gan_stability
from lightning_gan_stability import Ring, metrics, nets
from lightning_gan_stability.advice import HEALTH
from lightning_gan_stability.monitors import health

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
METHODS = [pytest.param(method, id=method.names[0]) for rows in tables.METHODS.values() for method in rows]
BASES = {
    "Augmentation",
    "AdversarialLoss",
    "GANCallback",
    "GANModule",
    "GANOutputs",
    "Recipe",
    "Regularizer",
    "Remedy",
    "StepRecord",
    "UpdateRule",
}
# what is no method: bases, data, networks, and what is done with a checkpoint
OTHERS = (
    BASES
    | {"load_gan", "SampleWriter"}
    | {
        name
        for name in lightning_gan_stability.__all__
        for kind in [getattr(lightning_gan_stability, name)]
        if (isinstance(kind, type) and issubclass(kind, LightningDataModule)) or kind.__module__ == nets.__name__
    }
)


def test_every_method_has_one_row():
    public = {*lightning_gan_stability.__all__, *metrics.__all__} - OTHERS
    rows = [method.values[0] for method in METHODS]
    assert Counter(name for method in rows for name in method.names) == Counter(public)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_each_name(method):
    """Names that share a row share their defaults, and None is replaced only where it is the default."""
    for kind in method.objects:
        given = {name: value for name, value in tables.defaults_of(kind).items() if value is not None}
        assert given.items() <= method.defaults.items()
    signature = tables.defaults_of(method.objects[0])
    assert {name: signature[name] for name in method.instead_of_none} == dict.fromkeys(method.instead_of_none)
    assert None not in method.defaults.values()


@pytest.mark.parametrize("method", METHODS)
def test_papers_are_those_of_the_docstrings(method):
    said = "\n".join(inspect.getdoc(kind) or "" for kind in method.objects)
    for paper in method.papers:
        assert re.search(rf"https://arxiv\.org/abs/{re.escape(paper.number)}(?!\d)", said)


@pytest.mark.parametrize("method", METHODS)
def test_the_tests_of_a_method_exist(method):
    assert method.tests
    for test in method.tests:
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_every_table_is_on_one_page():
    """And rendered in its place, whatever builds the site."""
    named = [name for page in PAGES.values() for name in tables.PLACEHOLDER.findall(page)]
    assert Counter(named) == Counter([*tables.TABLES])
    for page in PAGES.values():
        filled = tables.fill(page)
        assert "{{" not in filled
        assert all(tables.TABLES[name]() in filled for name in tables.PLACEHOLDER.findall(page))


def test_methods_are_under_the_heading_of_their_section():
    named = re.findall(r"^## (.+?)$|^\{\{ methods: (.+) \}\}$", PAGES["methods.md"], flags=re.MULTILINE)
    headings, sections = [heading for heading, _ in named if heading], [section for _, section in named if section]
    assert headings == sections == list(tables.METHODS)


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="There is no table 'methods: Loses', but there are methods: Losses, "):
        tables.fill("## Losses\n\n{{ methods: Loses }}\n")


def test_a_cell_that_would_be_taken_apart_is_an_error():
    with pytest.raises(ValueError, match=r"must not have a \| or a line break, got 'E\|l\|'"):
        tables.table(["Formula"], [["E|l|"]])


def test_a_table_in_markdown():
    found = tables.table(["Default", "Test"], [["`eps=1e-8`", ""]])
    assert found == "| Default | Test |\n| --- | --- |\n| `eps=1e-8` |  |"


def test_defaults_are_written_as_in_python():
    values = {'"d"': "d", "1e-8": 1e-8, "1e-10": 1e-10, "(0.9, 0.999)": (0.9, 0.999), "True": True}
    assert {tables.literal(value): value for value in values.values()} == values


def test_every_public_name_is_on_one_page_of_the_api():
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("api/"))
    named = Counter(re.findall(r"^::: lightning_gan_stability\.(\S+)$", pages, flags=re.MULTILINE))
    functions = [f"metrics.{x}" for x in metrics.__all__ if isinstance(getattr(metrics, x), types.FunctionType)]
    others = ["cli.main", "cli.build", "monitors.writing.SampleFiles", "tables.TableEncoder"]
    others += [f"evaluation.{name}" for name in ("evaluate", "compare", "Evaluation", "Difference")]
    sweeps = ["sweep.sweep", *(f"sweep_plan.{name}" for name in ("read_plan", "make_plan", "Plan"))]
    sweeps += ["sweep_trial.Record", *(f"sweep_results.{name}" for name in ("evaluate", "Results", "write_results"))]
    others += [f"cli.{name}" for name in sweeps]
    others += [f"publishing.{name}" for name in ("publish", "load_published", "export_sampler", "push")]
    assert named == Counter([*lightning_gan_stability.__all__, *functions, *others])


def nav(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav(part)]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!relative ", "")
    assert Counter(nav(yaml.safe_load(text)["nav"])) == Counter([*PAGES])


def test_the_health_monitor_has_advice_for_each_verdict():
    others = {"oscillation", "giveaway", "loss_tells_nothing"}  # which it decides from more than its windows
    assert HEALTH.keys() == health.DECISIONS.keys() | others


@pytest.mark.parametrize("recipe", tables.RECIPES, ids=lambda recipe: recipe.symptom)
def test_configs_have_the_entries_that_the_recipes_say(recipe):
    assert hasattr(lightning_gan_stability, recipe.name)
    for config in recipe.configs:
        assert re.search(rf"class_path: {recipe.name}\b", (ROOT / config).read_text(encoding="utf-8"))


def test_the_contributors_map_is_that_of_the_package():
    """Every file and folder has a place in it, and the flow of a batch names what its files define."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "lightning_gan_stability"
    the_map = text.split("## The package")[1].split("## One batch")[0]
    internal = {"__init__", "__main__", "datasets", "environment", "events", "monitored", "rejection", "schedules"}
    internal |= {"signals", "speaking"}
    files = {path.name for path in package.glob("*.py") if path.stem not in internal}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert {*re.findall(r"`(\w+\.py|\w+/)`", the_map)} == files | folders
    rows = re.findall(
        r"^\| .+ \| (.+?) \| (.+?) \|$", text.split("## One batch")[1].split("## How")[0], flags=re.MULTILINE
    )
    assert len(rows) >= 10
    for where, names in rows[1:]:
        code = "\n".join((package / file).read_text(encoding="utf-8") for file in re.findall(r"`([\w/]+\.py)`", where))
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(?:def|class) {name}\b", code, flags=re.MULTILINE), name


def test_what_is_in_a_checkpoint(tmp_path):
    run = trainer(max_steps=2, limit_val_batches=0)
    run.fit(small(), Ring(batch_size=8, epoch_length=4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for path in (path for part in tables.CHECKPOINT for path in part.paths):
        found = checkpoint
        for key in path:
            assert key in found, path
            found = found[key]
    assert checkpoint["state_dict"]["_extra_state"].keys() == {"iteration", "steps", "draw", "loss"}


def test_the_site_is_built_with_the_tables():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "hooks: [docs/hooks.py]" in text


def test_nothing_is_fetched_while_the_site_is_built():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "  font: false" in text
    assert not re.search(r"https?://", text)
    # the offline plugin leaves its own script out, which the page would fetch, if there is one with this name
    assert (DOCS / re.search(r"polyfills: \[(\S+iframe-worker\S+)\]", text)[1]).exists()
