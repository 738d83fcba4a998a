"""What the pages under docs/ say of the package: names, defaults, papers, tests, and what the site is built from."""

import ast
import inspect
import re
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from toys import fit, points, small

import lightning_gan_stability
from lightning_gan_stability import metrics, nets
from lightning_gan_stability.callbacks import health

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# what is no method: bases, the module, data and networks
OTHERS = {"AdversarialLoss", "GANModule", "Play", "Regularizer", "Remedy", "UpdateRule"} | {
    name
    for name in lightning_gan_stability.__all__
    for kind in [getattr(lightning_gan_stability, name)]
    if issubclass(kind, LightningDataModule) or (kind.__module__ == nets.__name__ and name != "Packed")
}


def methods():
    """The rows of docs/methods.md: names, and the cells for papers, formula, defaults and tests."""
    lines = (DOCS / "methods.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", row[0]), *(cell.strip() for cell in row[1:])) for row in rows]


def found(name):
    return getattr(lightning_gan_stability, name, None) or getattr(metrics, name)


def test_every_method_has_one_row():
    public = {*lightning_gan_stability.__all__, *metrics.__all__} - OTHERS
    assert Counter(name for names, *_ in methods() for name in names) == Counter(public)


@pytest.mark.parametrize("row", methods(), ids=lambda row: row[0][0])
def test_defaults_and_papers_are_those_of_the_code(row):
    names, papers, _, defaults, _ = row
    said = {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=([^`]+)`", defaults)}
    kinds = [found(name) for name in names]
    for kind in kinds:
        signature = inspect.signature(kind).parameters
        real = {key: p.default for key, p in signature.items() if p.default not in (p.empty, None)}
        assert real.items() <= said.items()
        unsaid = said.keys() - real.keys() if kind is kinds[0] else set()  # statistics have fewer arguments
        assert {key: getattr(kind(), key) for key in unsaid} == {key: said[key] for key in unsaid}
    links = re.findall(r"\[([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", papers)
    assert papers.count("](") == len(links)
    for text, link in links:
        assert text == link
        assert any(link in (inspect.getdoc(kind) or "") for kind in kinds)


@pytest.mark.parametrize("row", methods(), ids=lambda row: row[0][0])
def test_the_tests_that_the_table_names_exist(row):
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
    assert len(tests) == row[-1].count("`") / 2 > 0
    for file, name in tests:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_every_public_name_is_on_one_page_of_the_api():
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")]
    named = Counter(re.findall(r"^::: lightning_gan_stability\.(\S+)$", "\n".join(pages), flags=re.MULTILINE))
    functions = [f"metrics.{x}" for x in metrics.__all__ if isinstance(getattr(metrics, x), types.FunctionType)]
    assert named == Counter([*lightning_gan_stability.__all__, *functions, "cli.main"])


def nav(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav(part)]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!relative ", "")
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert Counter(nav(yaml.safe_load(text)["nav"])) == Counter(pages)


def test_the_advice_is_that_of_the_health_monitor():
    page = (DOCS / "guides" / "recipes.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, flags=re.MULTILINE)) == health.ADVICE


def test_configs_have_the_entries_that_the_recipes_say():
    rows = (DOCS / "guides" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [row.split("|")[1:-1] for row in rows if "configs/" in row and row.startswith("|")]
    assert len(rows) > 10
    for _, entry, configs in rows:
        name = re.search(r"class_path: (\w+)|`([A-Z]\w+)`", entry)
        for config in re.findall(r"`(configs/\S+)`", configs):
            assert f"class_path: {name[1] or name[2]}" in (ROOT / config).read_text(encoding="utf-8")


def test_what_is_in_a_checkpoint(tmp_path):
    page = (DOCS / "guides" / "resume.md").read_text(encoding="utf-8").split("## ")[1]
    run = fit(small(), points(2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} <= checkpoint.keys()
    assert checkpoint["gan"].keys() == {"iteration", "steps", "draw", "loss"}


def test_nothing_is_fetched_while_the_site_is_built():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "  font: false" in text
    assert not re.search(r"https?://", text)
