"""Print pyproject.toml's lower bounds as exact versions, for `pip install -c`."""

import re
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
requirements = project["dependencies"] + [r for group in project["optional-dependencies"].values() for r in group]
for requirement in requirements:
    if match := re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement):
        print("==".join(match.groups()))
