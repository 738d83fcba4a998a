"""Imports go one way, nobody uses what is private to others, and the package is quick to import."""

import ast
import contextlib
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch import nn

import lightning_gan_stability
from lightning_gan_stability import GANModule

PACKAGE = Path(lightning_gan_stability.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.pyi"))
#: A file imports from its own floor or from those below it.
FLOORS = [
    [
        "_checks",
        "_compat",
        "outputs",
        "distributed",
        "datasets",
        "schedules",
        "signals",
        "speaking",
        "advice",
        "outcome",
        "events",
        "environment",
        "files",
    ],
    [
        "augment",
        "losses",
        "penalties",
        "optim",
        "layers",
        "nets",
        "noise",
        "substitution",
        "tables",
        "audio",
        "metrics.*",
    ],
    [
        "callback",
        "protocols",
        "rejection",
        "finite",
        "networks",
        "engine",
        "sharding",
        "monitored",
        "resuming",
        "saving",
        "guard",
    ],
    ["module"],
    [
        "checkpoints",
        "publishing",
        "evaluation",
        "regularizers.*",
        "update_rules.*",
        "callbacks.*",
        "monitors.*",
        "data.*",
        "recipes.*",
    ],
    ["run_folder"],
    ["cli.*", "report", "__main__", "__init__"],
]
PURE = {
    "advice",
    "datasets",
    "environment",
    "events",
    "speaking",
    "distributed",
    "outcome",
    "outputs",
    "schedules",
    "signals",
    "_checks",
    *FLOORS[1],
}


def module_name(path):
    """The dotted name of a file below the package; that of a subpackage's `__init__` is the subpackage's."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def place(name):
    """What stands for a module in `FLOORS`."""
    folder = name.partition(".")[0]
    return f"{folder}.*" if (PACKAGE / folder).is_dir() else name


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if place(name) in names)


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def running(tree):
    """The nodes of a file without those that are for type checkers alone."""
    checked = {id(n) for i in ast.walk(tree) if is_type_checking(i) for part in i.body for n in ast.walk(part)}
    return [node for node in ast.walk(tree) if id(node) not in checked]


def imports(path):
    """The modules, with the names from them, that a file imports when it runs: in full, whoever they belong to."""
    here = path.relative_to(PACKAGE.parent).parent.parts
    for node in running(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            yield from ((module, alias.name) for alias in node.names)


def own_imports(path):
    """Names of this package's modules that a file imports when it runs."""
    for module, name in imports(path):
        if module == PACKAGE.name:
            inside = [p for p in (PACKAGE / f"{name}.py", PACKAGE / str(name)) if p.exists()]
            yield name if inside else "__init__"
        elif module.startswith(PACKAGE.name + "."):
            yield module.removeprefix(PACKAGE.name + ".")


def by_path(path):
    return path.relative_to(PACKAGE).as_posix()


# ---------- one way


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_imports_go_one_way(path):
    name = module_name(path)
    for other in own_imports(path):
        assert floor(other) <= floor(name), f"{name} imports {other}"


def test_every_file_is_on_one_floor():
    for path in FILES:
        assert sum(place(module_name(path)) in names for names in FLOORS) == 1, path
    every = {place(module_name(path)) for path in FILES}
    assert every == {name for names in FLOORS for name in names}


@pytest.mark.parametrize("path", [p for p in FILES if place(module_name(p)) in PURE], ids=by_path)
def test_pure_modules_know_nothing_of_lightning(path):
    assert not [module for module, _ in imports(path) if re.match(r"(pytorch_)?lightning(\.|$)", module)]


def test_only_lightning_pytorch_is_imported():
    for path in FILES:
        assert not [module for module, _ in imports(path) if module.startswith("pytorch_lightning")], path


def normalized(name):
    return name.lower().replace("_", "-")


@pytest.fixture(scope="module")
def installed(request):
    """The distributions that are installed with the package: listed in pyproject.toml, or brought by one that is."""
    project = (request.config.rootpath / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    found, left = set(), [re.match(r'\s*"([\w-]+)', line)[1] for line in listed.splitlines()]
    while left:
        name = normalized(left.pop())
        if name not in found:
            found.add(name)
            with contextlib.suppress(PackageNotFoundError):  # for another system or version of Python
                left += [re.match(r"[\w.-]+", r)[0] for r in requires(name) or [] if "extra ==" not in r]
    return found


DISTRIBUTIONS = packages_distributions()
OTHERS = {module.partition(".")[0] for path in FILES for module, _ in imports(path)}
OTHERS -= sys.stdlib_module_names | {PACKAGE.name}


@pytest.mark.parametrize("root", sorted(OTHERS))
def test_whatever_is_imported_is_a_dependency(root, installed):
    assert {normalized(name) for name in DISTRIBUTIONS.get(root, [root])} & installed


# ---------- private names


def is_private(name):
    """Neither a placeholder nor a protocol of Python, to which the fields of named tuples belong."""
    return name.startswith("_") and not re.fullmatch(r"_+|__\w+__|_fields", name)


def defined(tree):
    """Private names that a file gives to something of its own: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if is_private(name)}


def used(tree):
    """Private names that a file asks of something: attributes, also by `getattr` and the like, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value, node.lineno


def private_imports(path):
    """Private names, or names of private modules, that a file imports, also for type checkers."""
    for node in ast.walk(parsed(path)):
        modules = {ast.ImportFrom: lambda n: [n.module or ""], ast.Import: lambda n: [a.name for a in n.names]}
        for module in modules.get(type(node), lambda n: [])(node):
            parts = module.split(".")
            if isinstance(node, ast.ImportFrom):
                parts += [alias.name for alias in node.names if parts[0] != "__future__"]
            yield from ((module, part) for part in parts if is_private(part))


DEFINED = {path: defined(parsed(path)) for path in FILES}
EVERYWHERE = set().union(*DEFINED.values())
COMPAT = PACKAGE / "_compat.py"


def test_no_private_name_of_one_file_is_used_in_another():
    uses = []
    for path in FILES:
        for name, line in used(parsed(path)):
            if name not in DEFINED[path] and name in EVERYWHERE:
                uses.append(f"{by_path(path)}:{line} {name}")
        for module, name in private_imports(path):
            shared = module in (f"{PACKAGE.name}._compat", f"{PACKAGE.name}._checks")
            if module.startswith(PACKAGE.name) and not (shared and name in ("_compat", "_checks")):
                uses.append(f"{by_path(path)} imports {name}")
    assert uses == []


@pytest.mark.parametrize("path", [path for path in FILES if path != COMPAT], ids=by_path)
def test_no_private_name_of_torch_or_lightning_is_used(path):
    uses = [f"{line}: {name}" for name, line in used(parsed(path)) if name not in EVERYWHERE]
    uses += [f"imports {name}" for module, name in private_imports(path) if not module.startswith(PACKAGE.name)]
    assert uses == []


INSTANCES = (nn.Module(), pl.LightningModule(), pl.LightningDataModule(), pl.Callback())


@pytest.mark.parametrize("path", [path for path in FILES if path != COMPAT], ids=by_path)
def test_no_private_name_of_a_foreign_base_gets_another_meaning(path):
    """Neither a method that overrides one of theirs nor an attribute that hides one."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ClassDef) or place(module_name(path)) == "__main__":
            continue
        kind = getattr(importlib.import_module(f"{PACKAGE.name}.{module_name(path)}"), node.name)
        foreign = [base for base in kind.__mro__[1:-1] if not base.__module__.startswith(PACKAGE.name + ".")]
        theirs = {name for base in foreign for name in vars(base)}
        theirs |= {name for base in INSTANCES if issubclass(kind, type(base)) for name in vars(base)}
        # Python's own protocols have names of this kind
        theirs -= {"_abc_impl", "_is_protocol", "_is_runtime_protocol"}
        assert defined(node) & theirs == set(), node.name


def test_the_private_names_of_this_test_are_found():
    tree = ast.parse("import torch._dynamo\nx._a\nself._b = 1\ngetattr(x, '_c', None)\nx.__d__\nfor _ in x: pass")
    assert {name for name, _ in used(tree)} == {"_a", "_b", "_c"}
    assert defined(tree) == {"_b"}


# ---------- composition


def test_the_module_inherits_from_nothing_of_ours():
    ours = [kind for kind in GANModule.__mro__ if kind.__module__.partition(".")[0] == PACKAGE.name]
    assert ours == [GANModule]
    assert GANModule.__bases__ == (pl.LightningModule,)


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_no_metaprogramming(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.name not in ("__init_subclass__", "__prepare__", "__class_getitem__"), node.lineno
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("_getframe", "f_locals", "f_globals", "__code__", "__globals__"), node.lineno
        if isinstance(node, ast.ClassDef):
            assert not any(keyword.arg == "metaclass" for keyword in node.keywords), node.lineno
            assert not any(ast.unparse(base) == "type" for base in node.bases), node.lineno


LIGHTNINGS = re.compile(r"(\w+\.)*(trainer|strategy|pl_module|optimizer|precision_plugin|fit_loop|loop|loader)(\.\w+)*")


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_nothing_is_put_on_objects_of_lightning(path):
    """By `setattr` or by an assignment; `should_stop`, `checkpoint_io` and `plan` are there to be set."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "object.__setattr__"):
            assert not LIGHTNINGS.fullmatch(ast.unparse(node.args[0])), node.lineno
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and LIGHTNINGS.fullmatch(ast.unparse(target.value)):
                assert target.attr in ("should_stop", "checkpoint_io"), node.lineno


def test_no_backward_but_manual_backward():
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "backward", f"{path}:{node.lineno}"


# ---------- lazy subpackages

NO_COMPILED_FILES = "PYTHONDONTWRITEBYTECODE"


def fresh(code):
    """What a fresh process prints."""
    run, environment = [sys.executable, "-c", code], {k: v for k, v in os.environ.items() if k != NO_COMPILED_FILES}
    options = {"capture_output": True, "text": True, "check": True, "cwd": PACKAGE.parent, "timeout": 120}
    return subprocess.run(run, env=environment, **options).stdout


def stub(name):
    """The names that a subpackage's stub has, with the modules that they are from."""
    tree = ast.parse((PACKAGE / name / "__init__.pyi").read_text(encoding="utf-8"))
    return {alias.asname or alias.name: node.module for node in tree.body for alias in node.names}


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_a_subpackage_has_the_names_of_its_stub(name):
    subpackage = importlib.import_module(f"{PACKAGE.name}.{name}")
    names = stub(name)
    assert names
    assert sorted(subpackage.__all__) == sorted(names)
    assert set(names) <= set(dir(subpackage))
    for key, module in names.items():
        assert getattr(subpackage, key) is getattr(importlib.import_module(f"{PACKAGE.name}.{name}.{module}"), key)


@pytest.mark.parametrize("name", [name for name in SUBPACKAGES if name != "cli"])
def test_a_subpackage_has_the_public_names_of_its_files_that_the_package_has(name):
    """Whatever the package itself exports from a subpackage, the subpackage exports as well."""
    kinds = {n: getattr(lightning_gan_stability, n) for n in lightning_gan_stability.__all__}
    inside = {n for n, kind in kinds.items() if kind.__module__.startswith(f"{PACKAGE.name}.{name}.")}
    assert inside
    assert inside <= set(stub(name))


@pytest.fixture(scope="module")
def loaded():
    """The modules of this package in a bare process: after its subpackages, and after one name of each of three."""
    subpackages = "; ".join(f"import {PACKAGE.name}.{name}" for name in SUBPACKAGES)
    names = "; ".join(f"from {PACKAGE.name}.{name} import {chosen}" for name, chosen in CHOSEN.items())
    show = f"print(*sorted(name for name in sys.modules if name.startswith({PACKAGE.name + '.'!r})))"
    return [line.split() for line in fresh("\n".join(["import sys", subpackages, show, names, show])).splitlines()]


CHOSEN = {"callbacks": "UpdateRatio", "metrics": "frechet_distance", "update_rules": "Simultaneous"}


def test_a_subpackage_imports_nothing_by_itself(loaded):
    assert loaded[0] == [f"{PACKAGE.name}.{name}" for name in SUBPACKAGES]


@pytest.mark.parametrize("name", CHOSEN)
def test_one_name_does_not_import_its_siblings(name, loaded):
    prefix = f"{PACKAGE.name}.{name}."
    siblings = {module.removeprefix(prefix) for module in loaded[1] if module.startswith(prefix)}
    # its own file, and what that needs
    needed, left = set(), [stub(name)[CHOSEN[name]]]
    while left:
        needed.add(file := left.pop())
        inside = [module for module in own_imports(PACKAGE / name / f"{file}.py") if module.startswith(name + ".")]
        left += {module.partition(".")[2] for module in inside} - needed
    assert siblings == needed
    assert len(siblings) < len(list((PACKAGE / name).glob("*.py"))) - 1


def test_import_is_quick():
    """All names: at most 0.03 of the time of Lightning's own import, which is 0.1 s where that takes 4 s.

    Of compiled files, as an installed package has them, which the first of the three may write. Both in turn in one
    process, since seconds alone double on a busy machine; the smallest of three.
    """
    code = (
        "import sys, time; start = time.process_time(); import lightning.pytorch; before = set(sys.modules); "
        "t = time.process_time(); from lightning_gan_stability import *; t, s = time.process_time(), t; "
        "print((t - s) / (s - start)); "
        "print([m for m in ('wandb', 'sklearn', 'matplotlib.pyplot', 'torch_fidelity', 'jsonargparse', 'tensorboard') "
        "if m in sys.modules and m not in before])"
    )
    shares = []
    for _ in range(3):
        out = fresh(code).splitlines()
        shares.append(float(out[0]))
        assert out[1] == "[]"
        if shares[-1] < 0.03:
            break
    assert min(shares) < 0.03


def test_the_package_has_the_names_of_its_stub():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname for node in imported for alias in node.names} == {*lightning_gan_stability.__all__}
    for node in imported:
        module = importlib.import_module(f"{PACKAGE.name}.{node.module}")
        assert all(getattr(lightning_gan_stability, a.name) is getattr(module, a.name) for a in node.names)


def test_the_package_imports_nothing_by_itself():
    heavy = "{'torch', 'lightning', 'numpy'}"
    assert fresh(f"import sys, lightning_gan_stability; print({heavy} & {{*sys.modules}})") == "set()\n"


def test_every_public_name_has_a_docstring_with_an_example():
    for name in lightning_gan_stability.__all__:
        doc = getattr(lightning_gan_stability, name).__doc__
        assert doc, name
        assert ">>>" in doc, name
