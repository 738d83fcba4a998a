"""Every example runs as it is, in a folder of its own, and says what it is for."""

import datetime
import functools
import importlib
import math
import os
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_gan_stability import Ring

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# what an example prints last, as far as it is the same in every run
LAST = {
    "caught": "without: ",
    "image_to_image": "mean absolute error",
    "own_plan": "the generator rested on",
    "own_loss": "mean distance from the origin",
    "own_regularizer": "with matching: mean of the samples",
    "own_update_rule": "100 batches, 100 GAN steps, six optimizer steps in each",
    "subclass": "the loaded module draws the same samples: True",
}
# options with which it takes seconds
SMALL = {"caught": ["--steps", "8"], "subclass": ["--steps", "20"]}
LINES = {"caught": 100, "subclass": 80}
# the contributors' table has each way to extend the package; these are about its use
USES = {"caught", "check_digits", "conditional_digits", "export", "multi_scale", "stylegan2", "subclass"}


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("default")  # what a reader of the example sees
@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem in LAST], ids=lambda p: p.stem)
def test_example(path, run):
    assert run(path, *SMALL.get(path.stem, [])).splitlines()[-1].startswith(LAST[path.stem])
    assert len(path.read_text(encoding="utf-8").splitlines()) < LINES.get(path.stem, 60)


def test_every_example_is_in_the_contributors_table():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert path.stem in USES or f"examples/{path.name}" in table


@pytest.mark.filterwarnings("default")
def test_an_exported_generator_is_the_same(run):
    out = run(ROOT / "examples" / "export.py", "--steps", "4", "--out", "here.pt2")
    assert float(out.split("largest difference")[1]) == 0
    assert Path("here.pt2").stat().st_size > 20_000


@pytest.mark.filterwarnings("default")
def test_digits_come_by_request(run):
    """More than twice the tenth of chance, early in training."""
    out = run(ROOT / "examples" / "conditional_digits.py", "--steps", "700")
    assert len(out.splitlines()) == 11
    assert float(out.split()[-4].rstrip("%")) > 25
    assert Path("conditional_digits.png").stat().st_size > 1000


@pytest.mark.filterwarnings("default")
def test_stylegan2_runs_with_all_of_its_parts(run):
    """Truncation leaves less and less of the variance."""
    path = ROOT / "examples" / "stylegan2.py"
    out = run(path, "--steps", "20").splitlines()
    assert [line.split(":")[0] for line in out] == [f"truncation {psi}" for psi in (1.0, 0.7, 0.5)]
    shares = [float(line.split(", ")[1].split()[0]) for line in out]
    assert shares == sorted(shares, reverse=True)
    assert Path("stylegan2.png").stat().st_size > 3000
    source = path.read_text(encoding="utf-8")
    assert len(source[source.index("class Equalized") : source.index("class StyleGAN2")].splitlines()) < 120


@pytest.mark.filterwarnings("default")
def test_every_scale_is_a_discriminator(run):
    out = run(ROOT / "examples" / "multi_scale.py", "--steps", "4")
    assert (
        "logits of one batch: [(64, 4), (64,), (64,)]" in out
    )  # 2 by 2 patches, and one each of the halves and quarters


# what examples/recipes write, and how many lines they print
RECIPES = {
    "codec": (["codec.png", "codec_held_out_speech.wav", "codec_with_discriminators.wav"], 2),
    "paired_translation": (["paired_translation.png"], 2),
    "super_resolution": (["super_resolution.png"], 2),
    "table": (["table.png"], 2),
    "tokenizer": (["tokenizer.png"], 3),
    "unpaired_translation": (["unpaired_translation.png"], 2),
    "vocoder": (["vocoder.png", "vocoder_mel_distance_alone.wav"], 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--steps", "3"])
    runpy.run_module(f"examples.recipes.{name}", run_name="__main__")
    files, lines = RECIPES[name]
    assert len(capsys.readouterr().out.splitlines()) == lines
    for file in files:
        assert Path(file).stat().st_size > 3000


def test_every_recipe_has_an_example_a_config_and_a_guide():
    found = {path.stem for path in (ROOT / "examples" / "recipes").glob("*.py")} - {"shared"}
    assert found == {*RECIPES}
    for name in RECIPES:
        assert (ROOT / "configs" / f"{name}.yaml").exists()
        assert (ROOT / "docs" / "guides" / f"{name}.md").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(250)
def test_applied_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "applied")
    for study in ("tokenizer", "vocoder", "codec", "table", "unpaired"):
        assert f"\n{study}\n| variant |" in out
    assert "| discriminator far too strong | stabilized |" in out
    assert float(out.split(" ms")[2].split("(")[0]) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(250)
def test_little_data_benchmark_smoke(run, monkeypatch):
    lines = benchmark(run, monkeypatch, "little_data").splitlines()
    rows = [line.split(" | ") for line in lines if " to " in line and "(" in line and line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == [
        "nothing",
        "DiffAugment",
        "ADA",
        "ADA, target 0.3",
        "LeCam",
        "consistency",
    ]
    for row in rows:
        assert float(row[1].split()[0]) > 0


def benchmark(run, monkeypatch, name, *arguments):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    return run(ROOT / "examples" / "benchmarks" / f"{name}.py", "--smoke", *arguments)


@pytest.mark.filterwarnings("default")
def test_overhead_benchmark_smoke(run, monkeypatch):
    rows = [line for line in benchmark(run, monkeypatch, "overhead").splitlines() if " ms " in line]
    assert len(rows) == 9
    assert sum("goal" in row for row in rows) == 7
    for row in rows:
        assert float(row.split(" ms")[2].split("(")[0]) > 0


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(150)
def test_memory_benchmark_smoke(run, monkeypatch):
    lines = benchmark(run, monkeypatch, "memory").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| plain Lightning", "| `GANModule`"]
    for row in rows:
        assert float(row[1].split()[0]) > 0


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_cost_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "cost")
    rows = [line for line in out.splitlines() if " ms " in line]
    assert len(rows) >= 35
    for row in rows:
        assert float(row.split(" ms")[2].split("(")[0]) > 0
    assert out.count("with checkpoint") == 2


@pytest.mark.filterwarnings("default")
def test_ring_benchmark_smoke(run, monkeypatch):
    table = benchmark(run, monkeypatch, "ring").split("\n\n")[1].splitlines()
    assert len(table) == 2 + 8 * 3  # methods and marks
    assert all(line.count("|") == table[0].count("|") for line in table)


def test_finished_runs_are_kept_and_others_added(monkeypatch, tmp_path, capsys):
    """Rows come in the order of the jobs; those of other settings in the same file are left alone."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    finish = importlib.import_module("jobs").finish
    results, ran = tmp_path / "there" / "runs.jsonl", []

    def square(seed, steps, power=2):
        ran.append((seed, steps))
        return {"found": {steps: (seed**power, math.inf)}}

    assert finish(square, [{"seed": 3, "steps": 5}], results=results) == [
        {"seed": 3, "steps": 5, "found": {"5": [9, math.inf]}}
    ]
    assert capsys.readouterr().out == ""
    jobs = [{"seed": seed, "steps": steps} for steps in (6, 5) for seed in (4, 3)]
    rows = finish(square, jobs, results=results)
    assert [row["found"][str(row["steps"])][0] for row in rows] == [16, 9, 16, 9]
    assert ran == [(3, 5), (4, 6), (3, 6), (4, 5)]
    assert capsys.readouterr().out == f"1 of 4 runs were finished before, until {datetime.date.today()}.\n\n"
    assert len(results.read_text().splitlines()) == 4
    assert finish(functools.partial(square, power=3), jobs[:1]) == [
        {"seed": 4, "steps": 6, "found": {"6": [64, math.inf]}}
    ]
    assert finish(dict, [{"seed": 1}, {"seed": 2}], processes=2, results=results) == [{"seed": 1}, {"seed": 2}]
    assert len(results.read_text().splitlines()) == 6


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("protocol", ["A", "B-quarter", "B-half", "D"])
def test_stacked_digits_benchmark_smoke(run, monkeypatch, tmp_path, protocol):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    where = ["--results", str(tmp_path / "runs" / "stacked.jsonl")]
    out = run(ROOT / "examples" / "benchmarks" / "stacked_digits.py", "--smoke", "--protocol", protocol, *where)
    table = out.split("\n\n")[1].splitlines()
    assert [line.split(" | ")[3] for line in table[2:]] == ["3"] * 5  # steps of each method
    assert all(line.count("|") == table[0].count("|") for line in table)


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_recipes_benchmark_smoke(run, monkeypatch):
    table = benchmark(run, monkeypatch, "recipes").split("\n\n")[1].splitlines()
    assert [line.split(" | ")[1] for line in table[2:]] == ["0", "mean", "worst"] * 2
    assert all(line.count("|") == table[0].count("|") for line in table)


@pytest.mark.filterwarnings("default")
def test_evaluation_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "evaluation")
    rows = [line.split("|")[2:-1] for line in out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 8
    assert all(0 <= float(x.strip().rstrip("%")) <= 100 for row in rows for x in row)


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_metrics_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "metrics")
    assert out.count("torchmetrics") == 6
    assert "| torch-fidelity |" in out


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_detection_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "detection")
    for part in ("scripted", "trained"):
        tables = out.split(f"\n{part}\n\n")[1].split("\n\n")[:3]
        assert [len({*table.splitlines()[0].split(" | ")} & {"| n", "| kind", "| data"}) for table in tables] == [1] * 3
        for table in tables:
            lines = table.strip().splitlines()
            assert len(lines) > 2
            assert all(line.count("|") == lines[0].count("|") for line in lines)


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_rollback_benchmark_smoke(run, monkeypatch):
    table = [line for line in benchmark(run, monkeypatch, "rollback").splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| rollback", "| warn"]


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_health_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "health")
    assert "times without" in out
    assert (
        sum(line.startswith("| ") for line in out.splitlines()) == 3 + 4 + 10 + 3
    )  # heads, healthy runs, others, losses


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_gpu_benchmark_smoke(run, monkeypatch):
    rows = [line.split(" | ") for line in benchmark(run, monkeypatch, "gpu").splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 12 + 2 * torch.cuda.is_available()
    assert all(float(row[1]) > 0 for row in rows)


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_peers_benchmark_smoke(run, monkeypatch):
    """Gradients equal the plain loop's, up to the factors that the script names; peers that are not there say so."""
    table = [line.split(" | ") for line in benchmark(run, monkeypatch, "peers").splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 5 * 5  # head; five tools in five settings
    for _, tool, *cells in table[1:]:
        if "cosine" in cells[-1] or cells[-1].startswith("–"):
            assert tool not in ("this package", "by hand")
            assert cells[0].startswith(("not installed", "its penalty takes", "has no spectral norm"))
        elif tool != "torchgan":  # its penalty is another one
            assert cells[-1].count("1.0000 (1.000)") + cells[-1].count("1.0000 (0.500)") == 2


def gather(run, monkeypatch, *arguments):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return run(ROOT / "examples" / "benchmarks" / "gather.py", *arguments)


@pytest.mark.filterwarnings("default")
def test_gathered_sections_are_replaced_and_others_kept(run, monkeypatch, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Mine\n\n<!-- cost -->\nold\n<!-- /cost -->\n\n<!-- ring -->\nkept\n<!-- /ring -->\n\nEnd.\n")
    gather(run, monkeypatch, "health", "--out", str(page), "--", "--help")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<!-- /(\w+) -->", text) == ["cost", "health", "ring"]
    assert text.startswith("# Mine\n\n<!-- cost -->\nold\n")
    assert text.endswith("kept\n<!-- /ring -->\n\nEnd.\n")
    assert f"torch {version('torch')}, Lightning" in text
    assert "`python examples/benchmarks/health.py --help`, 20" in text
    gather(run, monkeypatch, "ring", "--out", str(page), "--", "--help")
    assert page.read_text(encoding="utf-8").count("\n## ") == 2
    assert "-->\nkept" not in page.read_text(encoding="utf-8")


def test_gather_refuses_and_keeps(run, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gather(run, monkeypatch, "gather", "--out", str(tmp_path / "page.md"))
    assert "no benchmark called gather: choose from applied, cost, detection" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="cost failed, and its section stays as it was"):
        gather(run, monkeypatch, "cost", "--out", str(tmp_path / "page.md"), "--", "--no-such-option")
    assert not (tmp_path / "page.md").exists()


def test_damaged_generators_show_what_is_left_of_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    detection = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "detection.py"))
    module, source, _, _ = detection["make"]("ring", "healthy")
    module.since, kinds = 100, torch.arange(8)
    for damage, at, left in [
        ("a class dropped", 100, [0, 2, 3, 4, 5, 6, 7]),
        ("classes lost slowly", 420, [3, 4, 5, 6, 7]),
        ("one class left", 600, [1]),
        ("hopping", 260, [2]),
    ]:
        module.damage, module.iteration = damage, at
        assert kinds[module.keep(kinds)].tolist() == left
    latents = torch.randn(200, 32)
    module.iteration = 99
    whole = module.eval().sample(200, latents=latents)
    module.iteration = 260
    assert torch.equal(module.train().sample(200, latents=latents), whole)  # training sees nothing of it
    assert source.centers.shape == (8, 2)


def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    return importlib.import_module("scripted")


@pytest.mark.parametrize("data", ["ring", "ring, modes unknown", "grid", "16 dimensions, modes unknown"])
def test_scripts_are_true(data, monkeypatch):
    """What is said of a script is what its samples are, counted by the nearest mode."""
    scripted = scripts(monkeypatch)
    for kind in [*scripted.HEALTHY, *scripted.FROM_HALF, *scripted.FROM_START]:
        module, *_ = scripted.make(data, kind, seed=3, steps=40, every=2)
        script, n = module.generator, 40_000
        for step in (0, 9, 10, 15, 16, 19, 20, 22, 39):
            module.iteration = step
            samples = module.sample(n, latents=torch.randn(n, 64, generator=torch.Generator().manual_seed(step)))
            shares = torch.cdist(samples, script.centers).argmin(1).bincount(minlength=len(script.centers)) / n
            near = torch.cdist(samples, script.centers).min(1).values.median() < 2 * script.centers.norm(dim=1).mean()
            assert script.is_healthy(step) is bool(near and (shares >= 0.2 / len(shares)).all()), (kind, step)
            if script.elsewhere() is None and script.width() < 0.2:
                assert (shares - script.shares()).abs().max() < 0.03
        assert script.is_healthy(19) is (kind not in scripted.FROM_START)
        assert script.is_healthy(39) is (kind in scripted.HEALTHY)
        assert script.is_healthy(12) is (kind not in [*scripted.FROM_START, "modes that come late"])


def test_seeds_of_scripts_are_independent(monkeypatch):
    """A monitor draws the same latents in each run; a script makes others of them."""
    scripted = scripts(monkeypatch)
    latents = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    modules = [scripted.make("ring", "perfect", seed, 40, 2)[0] for seed in range(3)]
    samples = [module.sample(latents=latents) for module in modules]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        together = torch.cat([samples[one], samples[other]], 1).T
        assert torch.corrcoef(together)[:2, 2:].abs().max() < 0.3
    again = scripted.make("ring", "perfect", 1, 40, 2)[0]
    assert torch.equal(again.sample(latents=latents), samples[1])


def test_alarms_are_false_only_where_a_generator_is_healthy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    detection = importlib.import_module("detection")
    run = {"part": "scripted", "data": "ring", "n": 64, "steps": 30, "every": 1}
    late = run | {"kind": "modes that come late", "events": [(5, "partial collapse", True)]}
    false = run | {"kind": "perfect", "events": [(5, "collapse", False)]}
    caught = run | {"kind": "hopping", "events": [(17, "mode hopping", True)]}
    early = run | {"kind": "hopping", "events": [(9, "collapse", False)]}
    assert [detection.is_false(row) for row in (late, false, caught, early)] == [False, True, False, True]
    assert [detection.onset(row) for row in (late, false, caught, early)] == [None, None, 2, None]
    assert detection.measurements(caught) == 3  # at steps 15, 16 and 17
    cells = detection.table([late, false, caught, early], "n").splitlines()[2].split(" | ")
    # 1 - 0.05 ** (1 / 2) is the smallest share of which no success in two tries is as likely as 5 %
    assert cells[1:6] == ["1 of 2 (≤ 97.5 %)", "1 of 2", "1 of 2 (≥ 2.5 %)", "3 (3–3)", "2 (2–2)"]


def test_width_of_the_data_is_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    width = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "recipes.py"))["width"]
    ring = Ring(batch_size=20_000)
    points = next(iter(ring.train_dataloader()))
    assert width(points, ring.centers, ring.std) == pytest.approx(1, abs=0.02)
    beside = ring.centers + torch.tensor([0.01, 0.0])  # half a standard deviation along one axis
    assert width(beside, ring.centers, 0.02) == pytest.approx(0.5**0.5 * 0.5 / 0.9744)


def test_coverage_of_known_samples(monkeypatch):
    """Counts, share and divergence against numbers that are known: 25 good samples on two of four modes, 50 off."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    coverage = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "ring.py"))["coverage"]
    centers = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    near = torch.tensor([[0.0, 0.0]] * 20 + [[1.0, 0.029]] * 5)
    found = coverage(torch.cat([near, torch.full((50, 2), 0.5)]), centers, std=0.01)
    assert (found.modes, found.touched, found.share) == (2, 2, 25 / 75)  # 20 of 2,500 are 0.6 of 75
    assert found.kl == pytest.approx(0.8 * math.log(0.8 * 4) + 0.2 * math.log(0.2 * 4))
    assert coverage(torch.full((9, 2), 0.5), centers, 0.01) == (0, 0, 0.0, math.inf)


@pytest.mark.timeout(200)
def test_scaling_benchmark_smoke(run, monkeypatch):
    rows = [line.split("|")[1:-1] for line in benchmark(run, monkeypatch, "scaling").splitlines() if "(" in line][1:]
    assert [row[1].strip() for row in rows] == ["1", "2", "2"]
    assert all(float(row[2].split("(")[0]) > 0 for row in rows)
    sent, own = (float(x) for x in rows[2][3:])
    if sent:  # where the system counts bytes: an all-reduce between two sends each gradient once
        assert sent == pytest.approx(own, rel=0.3)


WHY = sorted(path for path in (ROOT / "examples" / "why_gans_are_hard").glob("*.py") if path.stem != "shared")
# steps that are enough to run, and what the output ends with
SHORT = {
    "balance": (["--steps", "12"], 10),
    "collapse": (["--steps", "20"], 3),
    "digits": (["--steps", "20"], 2),
    "divergences": ([], 12),
    "equal": (["--steps", "10", "--draws", "1"], 15),  # a line for each trial and for each loss
    "loss_vs_quality": (["--steps", "80"], 6),
    "nash": (["--steps", "200"], 9),
    "vanishing": (["--steps", "40"], 8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", WHY, ids=lambda path: path.stem)
def test_why_gans_are_hard(path, run, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(path.parent)
    options, lines = SHORT[path.stem]
    out = run(path, *options, "--out", str(tmp_path / "picture.png")).splitlines()
    assert len([line for line in out if line.strip()]) == lines
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    if path.stem == "nash":  # measured and closed rates
        pairs = [line.split("rate ")[1].split(", closed form ") for line in out]
        assert all(float(own) == pytest.approx(float(other), abs=2e-3) for own, other in pairs)
    if path.stem == "divergences":  # JS and both gradients of shifted Gaussians
        row = next(line.split() for line in out if line.split()[0] == "5.0")
        assert [float(x) for x in row[1:]] == pytest.approx([12.5, 12.5, 0.6759, 4.738e-2, 4.953], rel=1e-3)


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_monitors_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "monitors")
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == 1 + 6
    assert "memory at 32×32, n = 100: " in out


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_dirac_benchmark_smoke(run, monkeypatch):
    out = benchmark(run, monkeypatch, "dirac")
    assert "10 games of 500 steps" in out
    assert "| all | 10 |" in out


@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(200)
def test_random_recipes_benchmark_smoke(run, monkeypatch, tmp_path):
    out = benchmark(run, monkeypatch, "random_recipes", "--plot", str(tmp_path / "recipes.png"))
    with Image.open(tmp_path / "recipes.png") as picture:
        assert picture.width > picture.height
    rows = [line.split(" | ")[:2] for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["| plain", "| fixed", "| autopilot", "| oracle"]
    assert all(row[1].endswith(" of 2") for row in rows[1:])
