"""The ring run that collapses, configs/ring_collapse.yaml, with and without its rollback: modes at the end.

    python examples/benchmarks/rollback.py         # 10 seeds of both: about half an hour on one core
    python examples/benchmarks/rollback.py --smoke # seconds; only shows that it runs

Modes of 2,500 samples of the generator's average; a mode counts with 20 of them within three standard deviations.
Finished runs are kept in `--results` and not computed again.
"""

import argparse
import statistics
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from jobs import finish
from recipes import CONFIGS, train
from ring import Coverage, coverage

from lightning_gan_stability import Ring


def run(action: str, seed: int, more: list[str]) -> dict[str, Any]:
    """The config with another seed, and with another action of its detector if that is asked for."""
    config = yaml.safe_load((CONFIGS / "ring_collapse.yaml").read_text())
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "CollapseDetector" and action != "rollback":
            callback["init_args"] = {"action": action}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config))
        gan, seconds = train(str(file.with_suffix("")), seed, folder, more)
        (checkpoint,) = Path(folder).rglob("last.ckpt")
        states = torch.load(checkpoint, weights_only=True)["callbacks"]
    data = Ring()
    with torch.no_grad():
        found = coverage(gan.eval().sample(2500), data.centers, data.std)
    events = [f"{e['verdict']} {e['step']}" for key in states if "Collapse" in key for e in states[key]["events"]]
    return {"found": found, "events": events, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each action."""
    heads = "action | all 8 | modes, seed by seed | high quality | reverse KL | events, seed by seed | CPU seconds"
    lines = [f"| {heads} |", "|---" * 7 + "|"]
    for action in ("rollback", "warn"):
        mine = [row for row in rows if row["action"] == action]
        seen = [Coverage(*row["found"]) for row in mine]
        shares, kls = [c.share for c in seen], [c.kl for c in seen]
        cells = [
            action,
            f"{sum(c.modes == 8 for c in seen)} of {len(seen)}",
            " ".join(str(c.modes) for c in seen),
            f"{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})",
            f"{statistics.mean(kls):.3f} (at most {max(kls):.3f})",
            "; ".join(", ".join(row["events"]) or "none" for row in mine),
            f"{statistics.mean(row['seconds'] for row in mine):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--results", type=Path, default=Path("runs/rollback.jsonl"), help="finished runs, one a line")
    parser.add_argument("--smoke", action="store_true", help="one seed, three steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    more = ["--trainer.enable_progress_bar=false"] + ["--trainer.max_steps=3"] * arguments.smoke
    seeds = [0] if arguments.smoke else arguments.seeds
    jobs = [{"action": action, "seed": seed} for seed, action in product(seeds, ("rollback", "warn"))]
    rows = finish(partial(run, more=more), jobs, results=None if arguments.smoke else arguments.results)
    print(f"torch {torch.__version__}; CPU seconds of one thread\n\n{table(rows)}")


if __name__ == "__main__":
    main()
