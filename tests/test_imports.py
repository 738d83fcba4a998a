"""Imports go one way, the package is quick to import, and the names of the design are there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gan_stability

PACKAGE = Path(lightning_gan_stability.__file__).parent
PURE = (
    "losses",
    "penalties",
    "nets",
    "layers",
    "optim",
    "doors",
    "batches",
    "metrics.extractors",
    "metrics.features",
    "metrics.statistics",
    "metrics.values",
)
LAYERS = [set(PURE), {"callbacks.base"}, {"processes"}, {"clock"}, {"gradients"}, {"module"}]


def layer(name):
    for i, names in enumerate(LAYERS):
        if name in names:
            return i
    return len(LAYERS) + (name in ("cli", "__main__"))


def imports(path):
    """Names of this package that a file imports when it runs, without those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) for n in ast.walk(i)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in checked and node.module:
            if node.module == PACKAGE.name:
                yield from (alias.name for alias in node.names)
            elif node.module.startswith(PACKAGE.name + "."):
                yield node.module.removeprefix(PACKAGE.name + ".")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if name.endswith("__init__") or name in ("cli", "__main__"):
        return
    for other in imports(path):
        if (PACKAGE / (other.replace(".", "/") + ".py")).exists():
            assert layer(other) <= layer(name), f"{name} imports {other}"
    if name in PURE:
        assert "lightning." not in path.read_text(encoding="utf-8").replace("lightning.pytorch.cli", "")


def test_only_lightning_pytorch_is_imported():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("pytorch_lightning"), path


def test_no_backward_but_manual_backward():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "backward", f"{path}:{node.lineno}"


def test_import_is_quick():
    """At most 0.3 s more than Lightning itself, as the smallest of three measurements in fresh processes."""
    code = (
        "import time; import lightning.pytorch; t = time.process_time(); import lightning_gan_stability; "
        "print(time.process_time() - t); import sys; print([m for m in ('wandb', 'sklearn', 'matplotlib.pyplot', "
        "'torch_fidelity', 'jsonargparse', 'tensorboard') if m in sys.modules and m not in before])"
    ).replace("t = time", "import sys; before = set(sys.modules); t = time", 1)
    env_path = str(PACKAGE.parent)
    seconds = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=env_path, timeout=120
        ).stdout.splitlines()
        seconds.append(float(out[0]))
        assert out[1] == "[]"
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3


def test_every_public_name_has_a_docstring_with_an_example():
    for name in lightning_gan_stability.__all__:
        doc = getattr(lightning_gan_stability, name).__doc__
        assert doc, name
        assert ">>>" in doc or name == "Play", name
