"""Run benchmarks and write what they print into docs/benchmarks.md, each into its section, with machine and versions.

    python examples/benchmarks/gather.py                         # all but gpu as they are: many hours
    python examples/benchmarks/gather.py peers cost              # these two; the other sections stay as they are
    python examples/benchmarks/gather.py cost -- --rounds 3      # what follows -- goes to the script

A benchmark is any other script of this folder that can be started. A section is what stands between `<!-- name -->` and
`<!-- /name -->`; text outside of the sections is kept.
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
HEAD = """# Benchmarks

What the scripts of `examples/benchmarks/` printed last, each run by `examples/benchmarks/gather.py` on the machine and
with the versions that its section names. Times on shared machines vary; the spread says by how much.
"""


def benchmarks() -> list[str]:
    """Names of the scripts, this one left out."""
    scripts = sorted(FOLDER.glob("*.py"))
    return [p.stem for p in scripts if p != FOLDER / "gather.py" and "__main__" in p.read_text(encoding="utf-8")]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions() -> str:
    names = {"torch": "torch", "Lightning": "lightning", "this package": "lightning-gan-stability"}
    return ", ".join([f"{name} {version(of)}" for name, of in names.items()] + [f"Python {platform.python_version()}"])


def printed(name: str, options: list[str]) -> str:
    """Run a benchmark, show what it prints, and return it."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{name} failed, and its section stays as it was.")
    return "".join(lines).strip()


def section(name: str, options: list[str]) -> str:
    """Heading, what it is, command, machine, and the output, which is shown as text if it has no table."""
    first = (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].split("\n\n")[0].replace("\n", " ")
    start = time.monotonic()
    output = printed(name, options)
    minutes = (time.monotonic() - start) / 60
    if not re.search(r"^\|", output, flags=re.MULTILINE):
        output = f"```text\n{output}\n```"
    command = shlex.join(["python", f"examples/benchmarks/{name}.py", *options])
    where = f"`{command}`, {datetime.date.today()}, {minutes:.0f} minutes. {processor()}; {versions()}."
    return f"<!-- {name} -->\n## `examples/benchmarks/{name}.py`\n\n{first}\n\n{where}\n\n{output}\n<!-- /{name} -->"


def put(page: str, name: str, text: str) -> str:
    """Replace a section of the page, or add it in the order of the alphabet."""
    there = re.search(f"<!-- {name} -->.*?<!-- /{name} -->", page, flags=re.DOTALL)
    if there:
        return page[: there.start()] + text + page[there.end() :]
    later = [m.start() for m in re.finditer(r"<!-- (\w+) -->", page) if m[1] > name]
    return page[: later[0]] + text + "\n\n" + page[later[0] :] if later else page.rstrip() + f"\n\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which benchmarks: {', '.join(benchmarks())}")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut])
    unknown = set(arguments.names) - set(benchmarks())
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}: choose from {', '.join(benchmarks())}.")
    for name in arguments.names or [name for name in benchmarks() if name != "gpu"]:
        text = section(name, given[cut + 1 :])
        page = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else HEAD
        arguments.out.write_text(put(page, name, text), encoding="utf-8")


if __name__ == "__main__":
    main()
