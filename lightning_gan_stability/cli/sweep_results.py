"""Results of a sweep: tables, a page with charts, and the best recipe as a config that runs."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lightning_gan_stability as package
from lightning_gan_stability._checks import require
from lightning_gan_stability.cli.sweep_optuna import importance
from lightning_gan_stability.cli.sweep_plan import Plan, recipe
from lightning_gan_stability.cli.sweep_space import rounded, short_names
from lightning_gan_stability.cli.sweep_trial import OUTPUT, TRACEBACK, Record
from lightning_gan_stability.files import written_whole
from lightning_gan_stability.metrics.budget import BestOfBudget, expected_best
from lightning_gan_stability.report import COLORS, TITLES, page_template, page_theme, render_page

SHOWN = 10  # trials in the table of the terminal
BUDGETS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # that tables have, besides the last
EXTRA = "report"


class Results(NamedTuple):
    """The results of a sweep so far.

    Attributes:
        plan: plan of the sweep.
        records: its trials, the best first, then those that were pruned, failed or are still running.
        curves: best quality by budget, for each side with a completed trial.
        importance: importance of parameters, the largest first.
    """

    plan: Plan
    records: list[Record]
    curves: dict[str, BestOfBudget]
    importance: dict[str, float]

    @property
    def best(self) -> Record | None:
        """The best completed trial."""
        first = self.records[0] if self.records else None
        return first if first is not None and first.state == "complete" else None


def evaluate(plan: Plan, records: Sequence[Record]) -> Results:
    """Rank trials, and compute the best quality by budget.

    A pruned trial counts with its last value, and a failed one with the worst of all.
    """
    order = ["complete", "pruned", "failed", "running"]
    sign = 1 if plan.mode == "min" else -1
    ranked = sorted(
        records, key=lambda record: (order.index(record.state), sign * _or_worst(record.value, sign), record.number)
    )
    values = [record.value for record in records if _is_finite(record.value)]
    worst = max(values, key=lambda value: sign * (value or 0.0)) if values else None
    curves = {}
    for side in plan.sides:
        own = [record for record in records if record.side == side and record.state != "running"]
        found = [record.value if _is_finite(record.value) else worst for record in own]
        if found and worst is not None:
            curves[side] = expected_best([value or 0.0 for value in found], plan.mode == "min")
    return Results(plan, ranked, curves, importance(plan, records))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _or_worst(value: float | None, sign: int) -> float:
    return sign * math.inf if value is None or not math.isfinite(value) else value


# ---------- text


def as_text(results: Results) -> str:
    """Tables for a terminal."""
    lines = [_line(row) for row in _aligned(_trial_rows(results, SHOWN))]
    hidden = len(results.records) - SHOWN
    if hidden > 0:
        lines.append(f"... and {hidden} more in {results.plan.home / 'trials.csv'}")
    if rows := _budget_rows(results):
        lines += ["", f"Best {results.plan.metric} by budget: expected, and where 90% of searches end", ""]
        lines += [_line(row) for row in _aligned(rows)]
    if results.importance:
        lines += ["", "Importance: " + ", ".join(f"{key} {part:.0%}" for key, part in results.importance.items())]
    return "\n".join(lines)


def as_markdown(results: Results) -> str:
    """The same as a page of Markdown."""
    plan = results.plan
    lines = [f"# {plan.study}", "", _summary(results), "", "## Trials", "", *_table(_trial_rows(results, None))]
    if rows := _budget_rows(results):
        lines += ["", "## Best quality against budget", "", *_table(rows), "", _NOTE]
    if results.importance:
        rows = [["setting", "importance"], *([f"`{key}`", f"{part:.3f}"] for key, part in results.importance.items())]
        lines += ["", "## Importance of hyperparameters", "", *_table(rows)]
    return "\n".join([*lines, ""])


def as_csv(results: Results) -> str:
    """One row for each trial."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = [parameter.key for parameter in results.plan.space]
    side = results.plan.side_by_side
    compared = [] if side is None else [side.key]
    writer.writerow(["rank", *compared, "trial", "state", results.plan.metric, *keys, "seconds", "folder", "error"])
    for i, record in enumerate(results.records, start=1):
        drawn = [record.parameters.get(key, "") for key in keys]
        head = [i, *([record.side] if compared else []), record.number, record.state, record.value]
        writer.writerow([*head, *drawn, round(record.seconds, 1), record.folder, record.error])
    return file.getvalue()


_NOTE = (
    "The expected best of so many random trials, and the band in which 90% of such searches end, by order statistics "
    "of the trials that are here. Near their number all searches are nearly the same one, and the band closes."
)


def _summary(results: Results) -> str:
    plan, states = results.plan, [record.state for record in results.records]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    text = f"{len(states)} trials ({', '.join(counts)}) by `{plan.metric}`, {plan.sampler} search, seed {plan.seed}."
    if results.best is not None:
        text += f" The best is trial {results.best.number}{_of(results.best)} with {results.best.value:.5g}."
    return text


def _of(record: Record) -> str:
    return f" of {record.side}" if record.side else ""


def _trial_rows(results: Results, most: int | None) -> list[list[str]]:
    plan = results.plan
    keys = [parameter.key for parameter in plan.space]
    side = [] if plan.side_by_side is None else [plan.side_by_side.key.rpartition(".")[2]]
    rows = [["", *side, "trial", plan.metric, *short_names(keys), ""]]
    for i, record in enumerate(results.records[:most], start=1):
        drawn = [rounded(record.parameters.get(key, "")) for key in keys]
        value = "" if record.value is None else f"{record.value:.5g}"
        state = {"complete": "", "running": "still running"}.get(record.state, record.state)
        error = f"{state}: {record.error}" if record.error else state
        rows.append([str(i), *([record.side] if side else []), str(record.number), value, *drawn, error[:60]])
    return rows


def _budget_rows(results: Results) -> list[list[str]]:
    """Of some budgets, one column for each side."""
    last = max((len(curve.mean) for curve in results.curves.values()), default=0)
    if last < 2:
        return []
    budgets = [*(k for k in BUDGETS if k < last), last]
    rows = [["trials", *(side or results.plan.metric for side in results.curves)]]
    for k in budgets:
        cells = []
        for curve in results.curves.values():
            there = k <= len(curve.mean)
            ends = f"{curve.mean[k - 1]:.4g} ({curve.low[k - 1]:.4g} to {curve.high[k - 1]:.4g})" if there else ""
            cells.append(ends)
        rows.append([str(k), *cells])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _line(row: Sequence[str]) -> str:
    return "  ".join(row).rstrip()


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rest]]


# ---------- files


def write_results(results: Results) -> list[Path]:
    """Write ``best.yaml``, ``sweep.html``, ``sweep.md`` and ``trials.csv`` to the folder of the study.

    Returns:
        The files, ``best.yaml`` first, which exists only if a trial was completed.
    """
    home = results.plan.home
    home.mkdir(parents=True, exist_ok=True)
    texts = {"sweep.html": as_page(results), "sweep.md": as_markdown(results), "trials.csv": as_csv(results)}
    if results.best is not None:
        texts = {"best.yaml": _best(results, results.best)} | texts
    for name, text in texts.items():
        with written_whole(home / name) as place:
            place.write_text(text, encoding="utf-8")
    return [home / name for name in texts]


def _best(results: Results, best: Record) -> str:
    """The config of the best trial, whose run goes where those of its first config go."""
    plan = results.plan
    content = recipe(plan.arguments(best.parameters, best.side))
    head = [
        f"# The best of {len(results.records)} trials of the sweep {plan.study}: trial {best.number}{_of(best)}, "
        f"{plan.metric} {best.value:.5g}.",
        f"#   gan-stability fit --config {plan.home / 'best.yaml'}",
        "# It is the luckiest too: other seeds say how much of that lasts.",
    ]
    return "\n".join([*head, yaml.safe_dump(content, sort_keys=False)])


# ---------- the page


def as_page(results: Results) -> str:
    """A page that needs no network."""
    plan = results.plan
    charts = []
    if results.curves:
        charts.append(("Best quality against budget", _NOTE, _budget_chart(results)))
    if results.importance:
        note = "Share of the variation between trials that a setting explains (functional ANOVA)."
        charts.append(("Importance of hyperparameters", note, _importance_chart(results.importance)))
    charts += [(title, "", chart) for title, chart in _parameter_charts(results)]
    document = require("bokeh.document", EXTRA).Document(theme=page_theme())
    for i, (_, _, chart) in enumerate(charts):
        chart.name = f"chart {i}"
        document.add_root(chart)
    rows = _trial_rows(results, None)
    for row, record in zip(rows[1:], results.records, strict=True):
        row[-1] += "".join(f" ({record.folder / name})" for name in (TRACEBACK,) if record.state == "failed")
    variables = {
        "summary": _summary(results),
        "charts": [{"title": title, "note": note, "name": chart.name} for title, note, chart in charts],
        "trials": rows,
        "budgets": _budget_rows(results),
        "best": "" if results.best is None else _best(results, results.best),
        "folder": os.path.relpath(plan.home),
        "output": OUTPUT,
        "version": package.__version__,
    }
    template, title = page_template("sweep.html.jinja"), f"Sweep: {plan.study}"
    if not charts:
        return template.render(variables, title=title, roots=[])
    return render_page(document, title, template, variables)


def _title(metric: str) -> str:
    return TITLES.get(metric.rpartition("/")[2], metric)


def _figure(**options: Any) -> Any:
    plot = require("bokeh.plotting", EXTRA).figure(
        height=340, sizing_mode="stretch_width", tools="pan,box_zoom,wheel_zoom,reset,save", **options
    )
    plot.toolbar.autohide = True
    plot.toolbar.logo = None
    return plot


def _scale(values: Sequence[float]) -> str:
    return "log" if values and min(values) > 0 and max(values) / min(values) > 20 else "linear"


def _budget_chart(results: Results) -> Any:
    models = require("bokeh.models", EXTRA)
    ends = [value for curve in results.curves.values() for value in (*curve.low, *curve.high)]
    plot = _figure(x_axis_label="trials", y_axis_label=_title(results.plan.metric), y_axis_type=_scale(ends))
    plot.xaxis.ticker = models.BasicTicker(min_interval=1)
    items = []
    for (side, curve), color in zip(results.curves.items(), cycle(COLORS)):
        name = side or "all trials"
        columns = {"trials": [*range(1, len(curve.mean) + 1)], "mean": curve.mean, "low": curve.low, "high": curve.high}
        source = models.ColumnDataSource(columns, name=f"budget: {name}")
        band = plot.varea("trials", "low", "high", source=source, color=color, alpha=0.12)
        line = plot.line("trials", "mean", source=source, color=color, line_width=2.2)
        plot.scatter("trials", "mean", source=source, color=color, size=4)
        tips = [("", name), ("trials", "@trials"), ("expected best", "@mean"), ("90%", "@low to @high")]
        plot.add_tools(models.HoverTool(renderers=[line], tooltips=tips, visible=False))
        items.append((name, [line, band]))
    if len(items) > 1:
        legend = models.Legend(items=items, orientation="horizontal", click_policy="hide", ncols=3)
        plot.add_layout(legend, "below")
    return plot


def _importance_chart(parts: Mapping[str, float]) -> Any:
    keys, shares = [*parts][::-1], [*parts.values()][::-1]
    plot = _figure(y_range=keys, x_axis_label="share", x_range=(0, max(shares) * 1.05 or 1.0))
    plot.hbar(y=keys, right=shares, height=0.6, color=COLORS[0], alpha=0.85)
    return plot


def _parameter_charts(results: Results) -> list[tuple[str, Any]]:
    """The metric against each parameter."""
    models = require("bokeh.models", EXTRA)
    done = [record for record in results.records if record.state == "complete"]
    values = [record.value or 0.0 for record in done]
    charts = []
    for parameter, name in zip(results.plan.space, short_names([p.key for p in results.plan.space]), strict=True):
        if not done:
            break
        axis: dict[str, Any] = {"x_range": [parameter.low, parameter.high]}
        if parameter.log:
            axis["x_axis_type"] = "log"
        if parameter.kind == "choice":
            axis = {"x_range": [*map(str, parameter.labels)]}
        plot = _figure(x_axis_label=parameter.key, y_axis_label=results.plan.metric, y_axis_type=_scale(values), **axis)
        if parameter.log:
            plot.xaxis.ticker = models.LogTicker(desired_num_ticks=4, mantissas=[1])
        for side, color in zip(results.plan.sides, cycle(COLORS)):
            own = [record for record in done if record.side == side]
            drawn = [record.parameters[parameter.key] for record in own]
            place = [str(value) for value in drawn] if parameter.kind == "choice" else drawn
            columns = {"x": place, "y": [record.value for record in own], "trial": [record.number for record in own]}
            source = models.ColumnDataSource(columns, name=f"{parameter.key}: {side}")
            points = plot.scatter("x", "y", source=source, color=color, size=7, alpha=0.75)
            tips = [("", side), ("trial", "@trial"), (name, "@x"), (results.plan.metric, "@y")]
            plot.add_tools(models.HoverTool(renderers=[points], tooltips=tips, visible=False))
        charts.append((name, plot))
    return charts
