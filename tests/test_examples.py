"""Every example runs as it is, in a folder of its own, and says what it is for."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# what an example prints last, as far as it is the same in every run
LAST = {
    "image_to_image": "mean absolute error",
    "own_knob": "the generator rested on",
    "own_loss": "mean distance from the origin",
    "own_regularizer": "with drift: real logits",
    "own_update_rule": "100 batches, 100 GAN steps, six optimizer steps in each",
}


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("default")  # what a reader of the example sees
@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != "check_digits"], ids=lambda p: p.stem)
def test_example(path, run):
    assert run(path).splitlines()[-1].startswith(LAST[path.stem])
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_every_example_is_in_the_contributors_table():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert path.stem == "check_digits" or f"examples/{path.name}" in table


@pytest.mark.filterwarnings("default")
def test_overhead_benchmark_smoke(run):
    out = run(ROOT / "examples" / "benchmarks" / "overhead.py", "--smoke")
    rows = [line for line in out.splitlines() if "goal" in line]
    assert len(rows) == 6
    for row in rows:
        assert float(row.split(" ms")[2].split("(")[0]) > 0
