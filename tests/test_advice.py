"""Advice says what was measured: no method stands before one that did better against the same trouble."""

import re
from itertools import combinations, takewhile
from pathlib import Path

import pytest
import tables
import yaml

import lightning_gan_stability
from lightning_gan_stability import R1Penalty
from lightning_gan_stability.advice import ADVICE, COLLAPSE, HEALTH

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
GUIDES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "guides").glob("*.md"))}


def rows_below(text, heading, number=0):
    """The rows of a table below a heading, the first of its tables or a later one; each a list of cells."""
    below = text.split(f"\n{heading}\n")[1]
    blocks = re.findall(r"^\|.*(?:\n\|.*)*", re.split(r"^## ", below, flags=re.MULTILINE)[0], flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in blocks[number].splitlines()[2:]]


def number(cell):
    """The first number of a cell."""
    return float(re.search(r"\d[\d,]*(?:\.\d+)?", cell)[0].replace(",", ""))


def best(rows, column, methods, sign=1):
    """The best value of each method in a column of a table, larger for the better; methods by what their rows say."""
    rows_of = {name: [row for row in rows if re.search(called, row[0])] for name, called in methods.items()}
    return {name: max(sign * number(row[column]) for row in found) for name, found in rows_of.items() if found}


MODES = {"Packed": "Packed", "R1Penalty": r"\bR1\b", "Unrolling": "Unrolling", "nothing": "plain"}
LITTLE = ("DiffAugment", "ConsistencyPenalty", "AdaptiveAugmentation", "LeCam", "nothing")
PATCHES = {"R1Penalty": "configs/tokenizer.yaml", "LeCam": "LeCam", "nothing": "without `R1Penalty`"}
# modes held at the end, under two protocols; seeds of ten that hold all; distances, with 500 and with 100 digits; of
# held-out patches
IMAGES = [best(rows_below(MEASURED, "## A thousand modes", i), -1, MODES) for i in range(2)]
POINTS = [best(rows_below(MEASURED, "## Which method keeps the modes"), 1, MODES)]
FEW = [best(rows_below(MEASURED, "## Little data", i), 1, dict(zip(LITTLE, LITTLE, strict=True)), -1) for i in range(2)]
TOKENIZER = [best(rows_below(MEASURED, "## Beside a reconstruction, and tables"), 1, PATCHES, -1)]


def better(a, b, results):
    """Whether a did at least as well as b wherever both were measured, and better somewhere."""
    both = [(values[a], values[b]) for values in results if a in values and b in values]
    return all(x >= y for x, y in both) and any(x > y for x, y in both)


def named(text, results):
    """The measured methods that a text names, in its order."""
    found = {name: re.search(rf"\b{name}\b", text) for name in {name for values in results for name in values}}
    return sorted((name for name, match in found.items() if match), key=lambda name: found[name].start())


def to_add(text, heading, *symptoms):
    """What the rows of a table of symptoms say to add, as one text."""
    rows = rows_below(text, heading)
    starts = [i for i, row in enumerate(rows) if row[0].startswith(symptoms)]
    assert starts
    rest = takewhile(lambda row: row[0].startswith("the same"), rows[starts[0] + 1 :])
    return "\n".join(row[1] for row in [rows[starts[0]], *rest])


def guide(page, symptom):
    (row,) = [line for line in GUIDES[page].splitlines() if line.startswith(f"| {symptom}")]
    return row


def recipes(symptom):
    return "\n".join(r.text.format(r.name) for r in tables.RECIPES if r.symptom.startswith(symptom))


TEXTS = {
    "collapse": (COLLAPSE["collapse"], IMAGES),
    "partial collapse": (COLLAPSE["partial collapse"], IMAGES),
    "mode hopping": (COLLAPSE["mode hopping"], IMAGES),
    "no variation": (COLLAPSE["no variation"], IMAGES),
    "README, modes": (to_add(README, "## What to add", "Modes are lost"), IMAGES),
    "symptoms, modes": (to_add(GUIDES["symptoms"], "## Training goes wrong", "Modes are lost"), IMAGES),
    "recipes, modes": (recipes("Modes are lost"), IMAGES),
    "overfitting": (HEALTH["overfitting_discriminator"], FEW),
    "README, little data": (to_add(README, "## What to add", "Little data"), FEW),
    "symptoms, little data": (to_add(GUIDES["symptoms"], "## Training goes wrong", "Little data"), FEW),
    "recipes, little data": (recipes("There is little data"), FEW),
    "codec": (guide("codec", "Unstable on a small set"), TOKENIZER),
    "tokenizer": (guide("tokenizer", "With few images"), TOKENIZER),
}


@pytest.mark.parametrize(("text", "results"), TEXTS.values(), ids=TEXTS)
def test_no_method_stands_before_a_better_one(text, results):
    names = named(text, results)
    assert len(names) >= 2
    assert [(a, b) for a, b in combinations(names, 2) if better(b, a, results)] == []
    assert better(names[0], "nothing", results)


@pytest.mark.parametrize("results", [IMAGES, POINTS, FEW, TOKENIZER], ids=["images", "points", "few", "tokenizer"])
def test_all_methods_are_found_in_their_tables(results):
    assert {name for values in results for name in values} in ({*MODES}, {*LITTLE}, {*PATCHES})


def test_unrolling_is_advised_for_points_alone():
    """On the ring it holds as many seeds as any method, of a thousand modes of images hardly more than nothing."""
    assert POINTS[0]["Unrolling"] == max(POINTS[0].values()) == 10
    assert all(better(other, "Unrolling", IMAGES) for other in ("Packed", "R1Penalty"))
    pages = [*README.splitlines(), *GUIDES["symptoms"].splitlines()]
    for text in [*ADVICE.values(), *(recipe.symptom + recipe.name for recipe in tables.RECIPES), *pages]:
        if "Unrolling" in text and re.search("[Mm]odes are lost|the same, of|helps", text):
            assert "points in a few dimensions" in text


def test_a_worse_method_in_front_is_found():
    wrong = named("Add Unrolling, Packed or R1Penalty.", IMAGES)
    assert wrong == ["Unrolling", "Packed", "R1Penalty"]
    assert better("Packed", wrong[0], IMAGES)
    assert not better("Unrolling", "Packed", [*IMAGES, *POINTS])


def test_the_advice_of_monitors_names_what_there_is():
    """A word with a capital within a sentence is a name, but for D, the discriminator."""
    from lightning.pytorch import callbacks

    for text in ADVICE.values():
        words = re.findall(r"(?<![.:'] )(?<!^)\b[A-Z]\w*", text)
        for word in set(words) - {"D"}:
            assert hasattr(lightning_gan_stability, word) or hasattr(callbacks, word), word


def test_verdicts_in_the_answers_are_those_of_monitors():
    """What a page says that HealthMonitor or CollapseDetector say, they say."""
    root = ROOT / "docs"
    for page in ("questions.md", "tutorials/collapse.md", "guides/recipes.md"):
        text = (root / page).read_text(encoding="utf-8")
        said = re.findall(r"says? `([a-z_ ]+)`", text)
        assert {*said} <= {*ADVICE}, page
    assert len(re.findall(r"says? `([a-z_ ]+)`", (root / "questions.md").read_text(encoding="utf-8"))) >= 6


# ---------- what is said is what the scripts printed


def test_a_thousand_modes_as_printed():
    printed = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = rows_below(printed, "## `examples/benchmarks/stacked_digits.py`")
    assert [(number(row[3]), row[4:7]) for row in rows] == [
        (number(row[1]), [cell.replace("1,000", "1000") for cell in row[2:]])
        for row in rows_below(MEASURED, "## A thousand modes")
    ]


def test_the_readme_sums_up_what_was_measured():
    said = {row[0][:13]: row[1] for row in rows_below(README, "## What it measured")}
    held = [f"{number(row[-1]):,.0f}" for row in rows_below(MEASURED, "## A thousand modes")]
    plain, r1, both, packed, unrolled = held
    assert r1 == both == packed
    text = f"plain {plain}, `Unrolling(5)` {unrolled}; `R1Penalty`, R1 + R2 and `Packed` {r1} each"
    assert said["A thousand mo"] == text
    ring = {row[0]: number(row[1]) for row in rows_below(MEASURED, "## Which method keeps the modes")}
    five, ten = (ring[f'`Unrolling({k}, objective="saddle")`'] for k in (5, 10))
    assert ten == ring["`Packed(discriminator, 2)`"]
    assert (
        said["Ring of eight"]
        == f"plain 0 of 10 seeds, `Unrolling(5)` {five:.0f}, `Unrolling(10)` and `Packed` {ten:.0f}"
    )


def row_of(text, heading, start, table=0):
    """The cells of the row of a table that starts so."""
    (row,) = [row for row in rows_below(text, heading, table) if row[0].startswith(start)]
    return row


def test_the_readme_says_of_each_symptom_what_was_measured():
    """The numbers in its last column are those of the tables and sentences that it sums up."""
    said = {row[0]: row[2] for row in rows_below(README, "## What to add") if row[0] != "the same, by penalties"}
    penalties = row_of(README, "## What to add", "the same, by penalties")[2]
    thousand = [[f"{number(row[-1]):,.0f}" for row in rows_below(MEASURED, "## A thousand modes", i)] for i in (0, 1)]
    (plain, r1, both, packed, _), (plain_a, r1_a, both_a, packed_a) = thousand
    assert (
        f"{packed} and {packed_a} are held; with nothing {plain} and {plain_a}"
        in said["Modes are lost: samples lack variety"]
    )
    assert penalties == f"{both} and {both_a} modes; R1 alone {r1} and {r1_a}"
    assert POINTS[0]["Unrolling"] == POINTS[0]["Packed"] == 10
    assert said["the same, of points in a few dimensions"].startswith("8 of 8 modes with 10 of 10 seeds each")
    text = " ".join(MEASURED.split())
    rescued = "all eight modes in 10 of 10 (goal 9; 72 to 87 % of high quality, KL at most 0.005; one event each, "
    assert rescued in text
    assert "without it in 1 of 10" in text
    assert said["The run collapsed overnight"] == "all modes at the end with 10 of 10 seeds, left alone 1 of 10"
    few = [[float(row[2].split()[0]) for row in rows_below(MEASURED, "## Little data", i)[1:]] for i in (0, 1)]
    diff, _, adaptive, _, consistency = few[0]
    assert said["Little data, D memorizes it"].startswith(f"{diff}, {consistency} and {adaptive} of the")
    assert [round(few[1][i], 1) for i in (0, 2, 4)] == [0.1, 0.1, 0.1]
    assert "Stabilized 29 of 30 are well, alone 7 of 30" in text
    joined = said["Reconstruction gets worse when D joins"]
    assert ("29 of 30 end well" in joined, "fixed weight 7 of 30" in joined) == (True, True)
    adaptive = row_of(MEASURED, "## Beside a reconstruction, and tables", "plateau, adaptive weight")
    average, last = (f"{number(adaptive[i]):.2f}" for i in (2, 3))
    assert f"{average} with the average, {last} with the last weights" in said["Samples flicker from step to step"]
    random = {row[0]: number(row[1]) for row in rows_below(MEASURED, "## Random recipes")}
    autopilot, plain = random['`Autopilot(when="always")`'], random["plain"]
    assert f"{autopilot:.0f} of 60" in said["Nobody knows the learning rates"]
    assert f"without it {plain:.0f}" in said["Nobody knows the learning rates"]
    costs = rows_below(MEASURED, "## What they cost", 1)
    each, lazy = (f"{number(costs[i][1])}" for i in (0, 1))
    assert f"{each} times as long with R1, {lazy} times with `every=16`" in said["Penalties cost too much"]


def test_false_alarms_are_those_of_the_table():
    """From 256 samples on, over all rows; and collapses that were caught."""
    rows = [row for row in rows_below(MEASURED, "## Collapses caught") if number(row[0]) >= 256]
    healthy = sum(int(re.match(r"0 of (\d+)", row[1])[1]) for row in rows)
    caught, bad = (sum(int(re.match(r"(\d+) of (\d+)", row[3])[i]) for row in rows) for i in (1, 2))
    what = row_of(README, "## What it measured", "Collapses caught")[1]
    assert what == f"{caught} of {bad} bad runs, none in {healthy}"
    first = row_of(README, "## What to add", "You do not know")[2]
    assert f"{caught} of {bad} collapses caught, with no false alarm in {healthy} runs" in first


def test_the_guide_sums_up_what_was_measured():
    """The numbers of its two items, in their order."""
    images, points = GUIDES["recipes"].split("Where several help")[1].split("## Which")[0].split("\n* ")[1:]
    found = [*map(number, re.findall(r"(?<!R)(?<!\()\b\d[\d,]*\d\b", images))]
    first, second = IMAGES
    expected = [first["Packed"], second["Packed"], first["R1Penalty"], second["R1Penalty"], first["Unrolling"]]
    assert found == expected
    for name in ("Packed", "Unrolling"):
        assert POINTS[0][name] == 10
    assert "with 10 of 10 seeds, relativistic R1 + R2 with 4." in " ".join(points.split())
    assert POINTS[0]["R1Penalty"] == 4


# ---------- gamma


def test_gammas_are_those_of_the_configs():
    found = {
        path.name
        for path in (ROOT / "configs").glob("*.yaml")
        if re.search("class_path: R[12]Penalty", path.read_text(encoding="utf-8"))
    }
    rows = {row[0].strip("`").removeprefix("configs/"): row for row in tables.gamma_rows()}
    assert rows.keys() == found
    assert rows["tokenizer.yaml"][1:] == ["`Hinge`", "`R1Penalty`", "10", '`every=8`, `patches="mean"`']
    assert rows["r3gan_ffhq256.yaml"][3] == "150 to 15"


def test_the_guide_on_gamma_calculates_right():
    """StyleGAN2's formula for configs/dcgan.yaml, and what the guide says that stands there."""
    config = yaml.safe_load((ROOT / "configs" / "dcgan.yaml").read_text(encoding="utf-8"))
    data = config["data"]["init_args"]
    heuristic = 0.0002 * data["size"] ** 2 / data["batch_size"]
    (gamma,) = [float(row[3]) for row in tables.gamma_rows() if "dcgan" in row[0]]
    text = GUIDES["recipes"].split("## Which gamma")[1].split("\n## ")[0]
    assert f"it would be {heuristic:.3f}" in " ".join(text.split())
    assert "an eightieth" in text
    assert round(gamma / heuristic, -1) == 80
    assert R1Penalty().weight == gamma / 2  # "begin with 1, which is the default"


def test_gammas_in_the_guide_are_those_of_the_configs_it_names():
    """Each item of the list that begins with values names configs that have them."""
    text = GUIDES["recipes"].split("## Which gamma")[1].split("\n## ")[0]
    gammas = {row[0].strip("`").removeprefix("configs/"): row[3] for row in tables.gamma_rows()}
    items = [item for item in text.split("\n* ")[1:] if re.match(r"[\d.]+ ", item)]
    assert len(items) >= 4
    for item in items:
        for name in re.findall(r"`(\w+\.yaml)`", item):
            assert gammas[name] in re.findall(r"\d+(?:\.\d+)?", item.replace("×", " ")), name
