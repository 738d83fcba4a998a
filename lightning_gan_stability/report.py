"""Reports on one run or several side by side: an HTML file that needs no network.

Charts are Bokeh's, whose code is in the page; the page itself is ``report.html.jinja``.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import cycle, pairwise
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, Template

import lightning_gan_stability
from lightning_gan_stability._checks import check, require
from lightning_gan_stability.files import written_whole
from lightning_gan_stability.outcome import table_rows
from lightning_gan_stability.run_folder import Curve, Picture, Run, read_run, settings_of

EXTRA = "report"
PLACE = "<!-- samples -->"  # where they come into the page; text in it has no such brackets
MOST = 4_900_000  # bytes of a page, which shall stay below 5 MB
OF_CURVES = 1_200_000  # bytes of it for points of curves
POINTS = (100, 2000)  # of a curve, at least and at most
CHARTS = 80  # at most
PICTURES = 120  # of a series, at most
TEXT = 200_000  # characters of a config, at most
MARKS = 12  # events of a run up to which their numbers stand in the charts
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5c5c5c")  # Okabe and Ito's
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
#: Ways to make pictures of a series smaller, one after the other: how many, and the longest side in pixels.
SIZES = [(120, 800), (60, 800), (30, 800), (30, 480), (30, 320), (15, 320), (8, 320), (4, 320), (2, 240), (1, 160)]

#: Titles of values by the last part of their keys.
TITLES = {
    "fid": "Fréchet distance (FID)",
    "kid": "Kernel distance (KID)",
    "precision": "Precision: samples that look real",
    "recall": "Recall: data that are reached",
    "density": "Density",
    "coverage": "Coverage: data with a sample nearby",
    "modes": "Modes that are reached",
    "high_quality": "Samples of high quality",
    "reverse_kl": "Imbalance of modes (reverse KL)",
    "missing": "Share of the data that is missed",
    "diversity": "Diversity: distance between samples",
    "dependence": "Dependence on conditions",
    "class_consistency": "Consistency of the worst class",
    "class_diversity": "Diversity of the worst class",
    "fluctuation": "Samples that come and go (fluctuation)",
    "ndb": "Bins that differ (NDB)",
    "imbalance": "Imbalance of modes (total variation)",
    "moved": "Samples that moved between modes",
    "copied": "Copies of training data",
    "p": "p-value",
    "nearer": "Pairs nearer to training data",
}
#: Sections in order, with titles of charts by keys; a chart without a title has one key.
GROUPS: list[tuple[str, str, str]] = [
    ("Losses", "Adversarial losses", r"[dg]/adversarial(/.+)?"),
    ("Losses", "Adversarial losses on validation data", r"val/[dg]/adversarial(/.+)?"),
    ("Discriminator", "Discriminator's logits", r"d/(real|fake)_logit(/.+)?"),
    ("Discriminator", "Discriminator's accuracy", r"(val/)?d/accuracy(/.+)?"),
    ("Gradients", "Norms of gradients", r"[dg]/grad_norm"),
    ("Gradients", "Shares of terms in the generator's gradient", r"g/share/.+"),
    ("Gradients", "Codes in use (perplexity)", r"g/perplexity/.+"),
    ("Losses", "Discriminator's other terms", r"d/.+"),
    ("Losses", "Generator's other terms", r"g/.+"),
    ("Other values", "Learning rates", r"lr-.+"),
    ("Other values", "", r".+"),
]
SECTIONS = ("Quality", "Losses", "Discriminator", "Gradients", "Memorization", "Other values")
HIDDEN = re.compile(r"health/.+|collapse/.+|.+/time_share")  # events say these
WORDS = {"d": "discriminator", "g": "generator", "real_logit": "real", "fake_logit": "generated", "val": "validation"}


class Chart(NamedTuple):
    """What one chart shows.

    Attributes:
        section: its heading on the page.
        title: what a reader calls it.
        keys: of the log.
        lower_is_better: None if neither is.
    """

    section: str
    title: str
    keys: list[str]
    lower_is_better: bool | None = None


class Series(NamedTuple):
    """The pictures of one run under a slider."""

    steps: list[int]
    images: list[str]
    small: bool
    total: int


def write_report(
    folders: Sequence[str | PathLike[str]], out: str | PathLike[str] = "report.html", overwrite: bool = False
) -> Path:
    """Write a report on one run, or on several side by side.

    Args:
        folders: folders of runs, as made by a CSVLogger.
        out: the file to write.
        overwrite: replace an existing file.

    Returns:
        The file.

    Raises:
        FileExistsError: if the file exists.
        FileNotFoundError: if a run has no folder or no log, or if the file's folder is missing.
        ValueError: if there is nothing to report, or a run is given twice.
        OSError: if the file cannot be written; an existing file is kept.
        ModuleNotFoundError: without Bokeh.
    """
    check(bool(folders), "folders", "at least one folder of a run", folders)
    places = [Path(folder).resolve() for folder in folders]
    twice = next((str(folder) for i, folder in enumerate(folders) if places[i] in places[:i]), None)
    if twice is not None:
        raise ValueError(f"The run {twice!r} is given twice: name each once.")
    file = Path(out)
    if file.is_dir() or (file.exists() and not file.is_file()):
        raise FileExistsError(f"{str(out)!r} is no file that can be replaced: give `--out` the name of one.")
    if file.exists() and not overwrite:
        raise FileExistsError(f"The file {str(out)!r} exists: give another `--out`, or `--overwrite` to replace it.")
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(file.parent)!r} for the file: make it, or give another `--out`."
        )
    require("bokeh", EXTRA)
    page = make_page([read_run(folder) for folder in folders], names_of(places))
    _write(file, page)
    return file


def _write(file: Path, text: str) -> None:
    """Write the complete file or nothing; until then an existing file is kept."""
    try:
        with written_whole(file) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"The report could not be written to {str(file)!r}: {error.strerror or error}.") from error


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of runs: the parts of their paths that differ.

    Example:
        >>> names_of([Path("/a/runs/ring/version_0"), Path("/a/runs/ring/version_1")])
        ['version_0', 'version_1']
        >>> names_of([Path("/a/runs/ring/version_0")])
        ['ring/version_0']
    """
    if len(folders) == 1:
        return ["/".join(folders[0].parts[-2:])]
    common = Path(os.path.commonpath(folders))
    return [folder.relative_to(common).as_posix() for folder in folders]


# ---------- the page


def make_page(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The page, below 5 MB: charts and pictures that do not fit are left out."""
    charts = charts_of(runs)
    shown = min(len(charts), CHARTS)
    page = _render(runs, names, charts[:shown], charts[shown:])
    while len(page.encode()) > MOST and shown:
        shown //= 2
        page = _render(runs, names, charts[:shown], charts[shown:])
    series = series_of(runs, MOST - len(page.encode()))
    described = [{"name": name, "of_runs": of_runs, "slider": _slider(of_runs)} for name, of_runs in series]
    samples = page_template("samples.html.jinja").render(series=described, runs=_marked(names)) if series else ""
    return page.replace(PLACE, samples)


def page_template(name: str) -> Template:
    """A template of the package, in which text is escaped."""
    loader = PackageLoader("lightning_gan_stability", "")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def _marked(names: Sequence[str]) -> list[dict[str, str]]:
    """Names of runs with the colors that they have in charts."""
    return [{"name": name, "color": color} for name, color in zip(names, cycle(COLORS))]


def _render(runs: Sequence[Run], names: Sequence[str], charts: Sequence[Chart], left_out: Sequence[Chart]) -> str:
    """The page without its pictures."""
    figures, points = _figures(runs, names, charts)
    document = require("bokeh.document", EXTRA).Document(theme=page_theme())
    with document.models.freeze():  # Bokeh else looks through all of it for each figure
        for entry in figures:
            for figure in entry["figures"]:
                document.add_root(figure)
    sections = [(name, [entry for entry in figures if entry["section"] == name]) for name in SECTIONS]
    variables = {
        "names": names,
        "runs": [_describe(run) | marked for run, marked in zip(runs, _marked(names), strict=True)],
        "has_pictures": any(run.pictures for run in runs),
        "samples": PLACE,
        "sections": [section for section in sections if section[1]],
        "points": points,
        "left_out": [key for chart in left_out for key in chart.keys],
        "differences": differences([settings_of(run.config) for run in runs]),
        "environment": table_of([run.environment for run in runs]),
        "version": lightning_gan_stability.__version__,
        "made": _minutes(datetime.now(timezone.utc)),
    }
    title = f"GAN report: {names[0] if len(runs) == 1 else f'{len(runs)} runs'}"
    return render_page(document, title, page_template("report.html.jinja"), variables)


def render_page(document: Any, title: str, template: Template, variables: Mapping[str, Any]) -> str:
    """Render a page that needs no network.

    Args:
        document: Bokeh document with the charts.
        title: title of the page.
        template: template that places the charts.
        variables: variables of the template.
    """
    resources = require("bokeh.resources", EXTRA).Resources(mode="inline", log_level="warn")
    embed = require("bokeh.embed", EXTRA).file_html
    return str(embed(document, resources, title, template=template, template_variables=variables))


def _describe(run: Run) -> dict[str, Any]:
    """What the top of the page says of a run."""
    started, ended = run.events.times
    facts = [f"{run.step:,} steps"]
    if started:
        facts.append(f"started {_minutes(datetime.fromisoformat(started))}")
    if started and ended:
        facts.append(f"took {_duration(datetime.fromisoformat(ended) - datetime.fromisoformat(started))}")
    if not run.ended:
        facts.append(f"log last written {_minutes(run.written)}")
    troubles = [
        {"number": i, "trouble": trouble, "until": spans[-1][1]}
        for i, (trouble, spans) in enumerate(zip(run.outcome.troubles, run.events.spans, strict=True), start=1)
    ]
    return {
        "folder": run.folder,
        "verdict": run.verdict,
        "mood": mood_of(run.verdict),
        "facts": facts,
        "table": table_rows("", run.outcome.courses) if run.outcome.courses else [],
        "troubles": troubles,
        "actions": run.outcome.actions,
        "ended": run.ended,
        "config": run.config[:TEXT],
        "config_left_out": max(len(run.config) - TEXT, 0),
        "notes": run.notes,
    }


def mood_of(verdict: str) -> str:
    """The color class of a verdict: ``"good"``, ``"bad"``, or ``"open"``.

    Example:
        >>> mood_of("It worked: quality/fid fell."), mood_of("It stopped: KeyboardInterrupt.")
        ('good', 'bad')
    """
    if verdict.startswith("It worked"):
        return "good"
    return "bad" if verdict.startswith(("It did not work", "It stopped")) or "rouble" in verdict else "open"


def differences(configs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """The settings in which configs differ, with the value of each.

    Example:
        >>> differences([{"a": "1", "b": "2"}, {"a": "1"}])
        [('b', ['2', ''])]
    """
    rows = table_of(configs)
    return [(key, values) for key, values in rows if len({*values}) > 1]


def table_of(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """One row for each key of any of some dicts; empty where it is missing."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, "") for column in columns]) for key in keys]


def _minutes(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")


def _duration(time: Any) -> str:
    seconds = int(time.total_seconds())
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


# ---------- charts


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts of all keys of some runs, section by section."""
    courses = {course.name: course for run in runs for course in run.outcome.courses}
    keys = sorted({key for run in runs for key in run.curves if not HIDDEN.fullmatch(key)})
    monitors = {name.rpartition("/")[0] for name in courses}
    found: dict[tuple[str, str], Chart] = {}
    for key in [*courses, *(key for key in keys if key not in courses)]:
        monitor, _, value = key.rpartition("/")
        if key in courses or monitor in monitors:
            title = TITLES.get(value, _words(value)) + ("" if monitor == "quality" else f", {monitor}")
            better = courses[key].lower_is_better if key in courses else None
            found["Quality", key] = Chart("Quality", title, [key], better)
        elif monitor == "memorization":
            found["Memorization", key] = Chart("Memorization", TITLES.get(value, _words(value)), [key])
        else:
            section, title = next((s, t) for s, t, pattern in GROUPS if re.fullmatch(pattern, key))
            found.setdefault((section, title or key), Chart(section, title or _words(key), [])).keys.append(key)
    order = {title: i for i, (_, title, _) in enumerate(GROUPS)}
    return sorted(found.values(), key=lambda chart: (SECTIONS.index(chart.section), order.get(chart.title, 0)))


def _words(key: str) -> str:
    text = ", ".join(WORDS.get(part, part.replace("_", " ")) for part in key.split("/"))
    return text[:1].upper() + text[1:]


def _labels(keys: Sequence[str]) -> list[str]:
    """What the lines of a chart are called: the parts in which their keys differ."""
    held_out = [key.startswith("val/") for key in keys]
    parts = [key.removeprefix("val/").split("/") for key in keys]
    differ = [i for i in range(max(map(len, parts))) if len({part[i] if i < len(part) else "" for part in parts}) > 1]
    texts = [", ".join(WORDS.get(part[i], part[i]) for i in differ if i < len(part)) for part in parts]
    if len({*held_out}) > 1:
        data = ["validation" if held else "training" for held in held_out]
        texts = [", ".join(filter(None, pair)) for pair in zip(data, texts, strict=True)]
    return [text or part[-1] for text, part in zip(texts, parts, strict=True)]


def thinned(curve: Curve, points: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Steps and values, reduced to the smallest and the largest value of each stretch.

    Example:
        >>> from array import array
        >>> curve = Curve(array("d", range(1000)), array("d", [0.0] * 500 + [9.0] + [0.0] * 499))
        >>> steps, values = thinned(curve, 10)
        >>> len(steps) <= 10, values.max()
        (True, np.float32(9.0))
    """
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    order = np.argsort(steps, kind="stable")  # a fit that begins anew goes back
    steps, values = steps[order], values[order]
    values = np.where(np.isfinite(values), values, np.nan)
    if len(steps) > points:
        known = np.isfinite(values)
        low, high = np.where(known, values, np.inf), np.where(known, values, -np.inf)
        bounds = np.linspace(0, len(steps), points // 2 + 1).astype(int)
        chosen = {
            start + f(part[start:stop])
            for start, stop in pairwise(bounds)
            for f, part in ((np.argmin, low), (np.argmax, high))
        }
        rows = np.array(sorted(chosen))
        steps, values = steps[rows], values[rows]
    return steps.astype(np.int32), values.astype(np.float32)


def _figures(runs: Sequence[Run], names: Sequence[str], charts: Sequence[Chart]) -> tuple[list[dict[str, Any]], int]:
    """By chart its figures, with a linear and where it can be a logarithmic axis; and how many points a curve has."""
    curves = [run.curves[key] for run in runs for chart in charts for key in chart.keys if key in run.curves]
    points = int(np.clip(OF_CURVES / 11 / max(len(curves), 1), *POINTS))
    last, margin = max(run.step for run in runs), max(run.step for run in runs) / 50
    steps = require("bokeh.models", EXTRA).Range1d(
        -margin, last + margin
    )  # one range for all, so that all show the same steps
    found = []
    for i, chart in enumerate(charts):
        lines = _lines(runs, names, chart, points)
        real = _real_data(runs, chart)
        values = np.concatenate([line["values"] for line in lines] + [np.array([*real.values()])])
        values = values[np.isfinite(values)]
        positive = bool(len(values)) and float(values.min()) > 0
        wide = positive and chart.lower_is_better is not False and float(values.max() / values.min()) > 100
        scales = ["linear", "log"] if positive else ["linear"]
        figures = [
            _figure(runs, chart, lines, real, scale, steps, _bounds(values, scale), f"{i}-{scale}") for scale in scales
        ]
        for figure, scale in zip(figures, scales, strict=True):
            figure.visible = scale == ("log" if wide else "linear")
        better = {True: "lower is better", False: "higher is better", None: ""}[chart.lower_is_better]
        notes = [", ".join(chart.keys) if len(chart.keys) < 4 else f"{chart.keys[0]}, …", better]
        if real and better:
            notes.append("green: as good as real data")
        found.append(
            {
                "section": chart.section,
                "title": chart.title,
                "note": " · ".join(filter(None, notes)),
                "names": [figure.name for figure in figures],
                "figures": figures,
                "log": wide,
            }
        )
    return found, points if any(len(curve.steps) > points for curve in curves) else 0


def _lines(runs: Sequence[Run], names: Sequence[str], chart: Chart, points: int) -> list[dict[str, Any]]:
    """The lines of a chart, with their data."""
    found = []
    for run, name, own in zip(runs, names, cycle(COLORS)):
        for key, label, color, dash in zip(chart.keys, _labels(chart.keys), cycle(COLORS), cycle(DASHES)):
            if key not in run.curves:
                continue
            steps, values = thinned(run.curves[key], points)
            texts = [name] if len(runs) > 1 else []
            texts += [label] if len(chart.keys) > 1 else [] if texts else ["generated samples"]
            one = len(runs) == 1
            found.append(
                {
                    "source": require("bokeh.models", EXTRA).ColumnDataSource(
                        {"step": steps, "value": values}, name=f"{name}: {key}"
                    ),
                    "values": values,
                    "label": ", ".join(texts),
                    "color": color if one else own,
                    "dash": "solid" if one else dash,
                }
            )
    return found


def _real_data(runs: Sequence[Run], chart: Chart) -> dict[int, float]:
    """What real data have of a chart's value, by the number of the run; once if it is the same for all."""
    courses = [(i, course) for i, run in enumerate(runs) for course in run.outcome.courses if course.name in chart.keys]
    found = {i: course.real for i, course in courses if math.isfinite(course.real)}
    return found if len({*found.values()}) > 1 else dict([*found.items()][:1])


def _figure(
    runs: Sequence[Run],
    chart: Chart,
    lines: Sequence[Mapping[str, Any]],
    real: Mapping[int, float],
    scale: str,
    steps: Any,
    bounds: tuple[float, float],
    name: str,
) -> Any:
    models = require("bokeh.models", EXTRA)
    plot = require("bokeh.plotting", EXTRA).figure(
        name=name,
        height=270,
        sizing_mode="stretch_width",
        x_range=steps,
        y_range=bounds,
        y_axis_type=scale,
        x_axis_label="steps",
        tools="pan,box_zoom,xwheel_zoom,reset,save",
        active_drag="box_zoom",
    )
    plot.toolbar.autohide = True
    plot.toolbar.logo = None
    plot.xaxis.formatter = models.NumeralTickFormatter(format="0,0")
    items = []
    for i, value in real.items():
        color = COLORS[i % len(COLORS)] if len(real) > 1 else "#2a7d3f"
        if chart.lower_is_better is not None:
            side = {"top": value} if chart.lower_is_better else {"bottom": value}
            plot.add_layout(
                models.BoxAnnotation(**side, fill_color=color, fill_alpha=0.1, line_width=0, name="real data")
            )
        # a line, unlike a band, is in what the axis shows
        null = plot.line([0, max(run.step for run in runs)], [value] * 2, color=color, line_dash=[2, 3], line_width=1.5)
        items.append(("real data", [null]))
    for line in lines:
        style = {"color": line["color"], "source": line["source"]}
        drawn = [plot.line("step", "value", line_width=1.8, line_dash=line["dash"], alpha=0.9, **style)]
        if len(line["values"]) <= 30:
            drawn.append(plot.scatter("step", "value", size=5, **style))
        items.insert(len(items) - len(real), (line["label"], drawn))
        tip = [("", line["label"]), ("step", "@step{0,0}"), ("value", "@value{0.[00000]}")]
        plot.add_tools(models.HoverTool(renderers=drawn[:1], tooltips=tip, visible=False))
    for place, color, text in _marks(runs):
        plot.add_layout(
            models.Span(location=place, dimension="height", line_color=color, line_dash=[4, 3], line_width=1.2)
        )
        if text:
            plot.add_layout(_number(place, text, color))
    if len(items) > 1:
        longest = max(len(text) for text, _ in items)
        columns = max(min(len(items), 3, 72 // (longest + 6)), 1)  # what fits below a chart
        legend = models.Legend(
            items=items, location="left", orientation="horizontal", click_policy="hide", ncols=columns
        )
        plot.add_layout(legend, "below")
    return plot


def _bounds(values: np.ndarray[Any, Any], scale: str) -> tuple[float, float]:
    """Where an axis starts and ends."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if scale == "log":
        margin = max((high / low) ** 0.06, 1.1)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _marks(runs: Sequence[Run]) -> list[tuple[int, str, str]]:
    """Where events are, with their colors and numbers."""
    found: dict[tuple[int, str], list[str]] = {}
    for run, own in zip(runs, cycle(COLORS)):
        numbered = len(run.outcome.troubles) <= MARKS
        for i, trouble in enumerate(run.outcome.troubles, start=1):
            color = own if len(runs) > 1 else "#b3261e"
            found.setdefault((trouble.step, color), []).append(str(i) if numbered else "")
    return [(step, color, ", ".join(filter(None, numbers))) for (step, color), numbers in found.items()]


def _number(place: int, text: str, color: str) -> Any:
    style = {"text_color": "white", "background_fill_color": color, "text_font_size": "10px", "padding": 2}
    return require("bokeh.models", EXTRA).Label(
        x=place, y=2, y_units="screen", text=text, text_baseline="bottom", text_align="center", **style
    )


def page_theme() -> Any:
    """How charts of a page look."""
    font = {"text_font": "system-ui, sans-serif"}
    return require("bokeh.themes", EXTRA).Theme(
        json={
            "attrs": {
                "Plot": {"outline_line_color": None, "background_fill_color": "white", "border_fill_color": "white"},
                "Grid": {"grid_line_color": "#e6e8eb"},
                "Axis": {
                    "major_label_text_font": font["text_font"],
                    "major_label_text_font_size": "12px",
                    "major_label_text_color": "#444444",
                    "axis_label_text_font": font["text_font"],
                    "axis_label_text_font_size": "12px",
                    "axis_label_text_font_style": "normal",
                    "axis_label_text_color": "#666666",
                    "axis_line_color": "#9aa0a6",
                    "major_tick_line_color": "#9aa0a6",
                    "minor_tick_line_color": None,
                },
                "Legend": {
                    "label_text_font": font["text_font"],
                    "label_text_font_size": "12px",
                    "border_line_color": None,
                    "padding": 2,
                    "margin": 2,
                    "spacing": 14,
                },
            }
        }
    )


# ---------- pictures


def series_of(runs: Sequence[Run], room: int) -> list[tuple[str, list[Series | None]]]:
    """The pictures of runs by name, each with those of every run, in so many bytes."""
    names = list(dict.fromkeys(name for run in runs for name in run.pictures))
    parts = [(name, [run.pictures.get(name, []) for run in runs]) for name in names]
    number = sum(bool(pictures) for _, of_runs in parts for pictures in of_runs)
    return [
        (name, [_series(pictures, room // number) if pictures else None for pictures in of_runs])
        for name, of_runs in parts
    ]


def _series(pictures: Sequence[Picture], room: int) -> Series | None:
    """Some of the pictures, as many and as large as there is room for; None if none can be read."""
    chosen, images = list[Picture](), list[str]()
    small = False
    for count, side in SIZES:
        chosen = _spread(pictures, min(count, PICTURES))
        newest = _encoded(chosen[-1].file, side)
        if newest is not None and len(newest) * len(chosen) > 1.5 * room:
            continue  # not worth a try
        encoded = [(picture, _encoded(picture.file, side)) for picture in chosen]
        images = [image for _, image in encoded if image is not None]
        if sum(len(image) + 24 for image in [*images, *images[-1:]]) <= room:  # the last one is there twice
            chosen = [picture for picture, image in encoded if image is not None]
            break
    else:
        return None
    if not chosen:
        return None
    small = _longest_side(chosen[-1].file) < 300
    return Series([picture.step for picture in chosen], images, small, len(pictures))


def _spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """So many of them, evenly, with the first and the last; of one alone the last."""
    if count == 1:
        return [pictures[-1]]
    rows = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    return [pictures[row] for row in dict.fromkeys(rows.tolist())]


def _encoded(file: Path, side: int) -> str | None:
    """A picture in the page, in the smaller of its own and a lossy format; None if it cannot be read (yet)."""
    from PIL import Image

    try:
        own = file.read_bytes()
        with Image.open(io.BytesIO(own)) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError):  # half of it is there
        return None
    small = max(image.size) <= side
    image.thumbnail((side, side))
    image.save(lossy := io.BytesIO(), "WEBP", quality=80)
    kind, data = ("png", own) if small and len(own) <= len(lossy.getvalue()) else ("webp", lossy.getvalue())
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _longest_side(file: Path) -> int:
    from PIL import Image

    with Image.open(file) as image:
        return max(image.size)


def _slider(of_runs: Iterable[Series | None]) -> list[int]:
    """The steps of all runs."""
    return sorted({step for series in of_runs if series is not None for step in series.steps})
