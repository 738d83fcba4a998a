"""The table of strategies and precisions, cell by cell: what works does, what is refused says so."""

import re
from functools import cache
from pathlib import Path

import pytest
import tables
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_compose import ALL, EXTRAS
from test_distributed import CASES, SHARDED
from test_precision import scaled
from toys import fit, points, sgd, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    Alternating,
    Autopilot,
    CollapseDetector,
    GANModule,
    HealthMonitor,
    MemorizationMonitor,
    Minimax,
    PairedMonitor,
    QualityMonitor,
    SampleLogger,
    UpdateRule,
)

DOC = Path(__file__).parent.parent / "docs" / "strategies.md"
METHODS = {name: make for name, make in (ALL | EXTRAS).items() if name != "none"}
WAYS = {
    "16-mixed": lambda: scaled(),
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "64-true": lambda: {"precision": "64-true"},
    "compiled": lambda: {"compile": {"backend": "aot_eager"}},
}
# how far a step may be from that of float32, as a part of it; other types draw other noise, and cannot be compared
ERROR = {"16-mixed": 2e-3, "bf16-mixed": 5e-2, "compiled": 1e-5}

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    pytest.mark.filterwarnings("ignore:.*(collapse|divergence|hopping) at step"),
]


def step(name, **kwargs):
    """The change of all weights over three batches."""
    torch.manual_seed(0)
    networks = MLP([3, 8, 2], torch.nn.SiLU), MLP([2, 8, 1], torch.nn.SiLU)
    module = GANModule(*networks, 3, Minimax(), sgd(0.05), sgd(0.05), compile=kwargs.pop("compile", False))
    before = weights(module).double()
    data = [batch.double() if kwargs.get("precision") == "64-true" else batch for batch in points(3, 32)]
    fit(module, data, callbacks=METHODS[name](), **kwargs)
    after = weights(module).double()
    assert module.iteration == 3 or name == "CollapseDetector"
    return after[: len(before)] - before  # without the weights of an average


exact_step = cache(step)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_precision(name, way, tmp_path, monkeypatch):
    torch._dynamo.reset()
    cell = tables.works(name, way)
    if cell == "refused":
        with pytest.raises(MisconfigurationException, match=name.split(",")[0]):
            step(name, **WAYS[way]())
        return
    assert cell == "yes"
    moved = step(name, **WAYS[way]())
    assert moved.isfinite().all()
    assert moved.norm() > 1e-3
    if way in ERROR:
        exact = exact_step(name)
        assert (moved - exact).norm() <= ERROR[way] * exact.norm()


# the rule of all cases of test_distributed.py that name none, and the monitors, which have tests of their own there
ELSEWHERE = (
    Alternating,
    QualityMonitor,
    CollapseDetector,
    HealthMonitor,
    MemorizationMonitor,
    PairedMonitor,
    SampleLogger,
)


@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_says_of_several_processes(name):
    """Cells that say "yes" have a case in test_distributed.py, others have none."""
    callback = METHODS[name]()[0]
    kind = type(callback)
    for column, names in (("DDP", CASES), ("shards", SHARDED)):
        tried = any(isinstance(other, kind) for case in names for other in CASES[case][1])
        assert (tables.works(name, column) == "yes") == (tried or isinstance(callback, ELSEWHERE))
    # the condition under which UpdateRule refuses ModelParallelStrategy; a callback that differentiates by a layer; and
    # one that keeps copies of networks
    differentiates = isinstance(callback, UpdateRule) and callback.whole_batch and callback.joint
    differentiates = differentiates or isinstance(callback, AdaptiveAdversarialWeight | Autopilot)
    assert (tables.works(name, "shards") == "refused") == differentiates
    assert tables.works(name, "DDP") != "refused"


def test_every_method_is_in_the_table():
    assert list(tables.STRATEGIES) == list(METHODS)
    assert {*WAYS, "DDP", "shards"} == {*tables.COLUMNS}
    exceptions = [(column, cell) for row in tables.STRATEGIES.values() for column, cell in row.items()]
    assert {column for column, _ in exceptions} <= {*tables.COLUMNS}
    assert {cell for _, cell in exceptions} <= {"refused", "not tried"}


def test_the_tests_that_the_page_names_exist():
    folder = Path(__file__).parent
    files = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("test_*.py")}
    names = re.findall(r"`(?:tests/(test_\w+\.py))?::(\w+)`", DOC.read_text(encoding="utf-8"))
    assert len(names) > 5
    for file, name in names:
        assert f"def {name}(" in files[file or "test_distributed.py"]
