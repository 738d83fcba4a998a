"""The page on a run: what it says, that it is small, whole and alone, and that a browser shows it."""

import base64
import csv
import gzip
import html
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from browsers import DRAWN, chromium, complaints, needs_chromium
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from toys import small, trainer

from lightning_gan_stability import HealthMonitor, QualityMonitor, Ring, SampleLogger
from lightning_gan_stability.callback import GANCallback
from lightning_gan_stability.cli import main
from lightning_gan_stability.events import EVENTS, EventLog, read_events
from lightning_gan_stability.outcome import Course, Outcome, Trouble
from lightning_gan_stability.report import write_report
from lightning_gan_stability.run_folder import read_run

NULL = {"fid": 1.5, "recall": 0.9}
CONFIG = "model: {latent_dim: 4}\ntrainer:\n  callbacks:\n  - {class_path: R1Penalty, init_args: {gamma: 1.0}}\n"


class Tags(HTMLParser):
    """The attributes of all tags of a page, and its text without scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def embedded(page):
    """The curves that charts draw, by name, and what annotations they have."""
    (document,) = re.findall(r'<script type="application/json" id="(?!pictures)[^"]*">(.*?)</script>', page, re.DOTALL)
    curves, bands, marks = {}, set(), set()

    def walk(value):
        if isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            given = value.get("attributes", {})
            if value.get("name") == "ColumnDataSource" and "name" in given:
                entries = dict(given["data"]["entries"])
                curves[given["name"]] = {key: array(entries[key]) for key in ("step", "value")}
            if value.get("name") == "BoxAnnotation" and given.get("name") == "real data":
                bands.add(tuple((side, given[side]) for side in ("top", "bottom") if is_number(given.get(side))))
            if value.get("name") == "Span":
                marks.add(given["location"])
            for item in value.values():
                walk(item)

    walk(json.loads(html.unescape(document)))
    return curves, bands, marks


def is_number(value):
    return isinstance(value, int | float)


def array(entry):
    return np.frombuffer(gzip.decompress(base64.b64decode(entry["array"]["data"])), dtype=entry["dtype"])


def pictures(page):
    return json.loads(re.search(r'id="pictures">(.*?)</script>', page, re.DOTALL)[1])


def write_log(folder, rows):
    keys = sorted({key for row in rows for key in row})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, keys)
        writer.writeheader()
        writer.writerows(rows)


def draw(folder, step, size=(16, 16), name="samples", shade=None):
    (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("L", size, step % 256 if shade is None else shade).save(folder / name / f"{step:06d}.png")


def make_run(folder, steps=400, fid=20.0, config=CONFIG):
    """A folder as a run from a config leaves it."""
    rows = [{"step": i, "d/adversarial": 0.5, "g/adversarial": 1 + i / 100} for i in range(0, steps, 20)]
    for i, row in enumerate(rows):
        row |= {
            "d/real_logit": 1.0,
            "d/fake_logit": -1.0,
            "d/grad_norm": 0.1 * (i + 1),
            "g/grad_norm": 10.0 ** -(i % 5),
        }
    values = {0: (fid * 3, 0.1), steps // 2: (fid, 0.5), steps: (fid / 2, 0.8)}
    rows += [{"step": step, "quality/fid": x, "quality/recall": y} for step, (x, y) in values.items()]
    write_log(folder, rows)
    (folder / "hparams.yaml").write_text(yaml.safe_dump({"latent_dim": 4, "quality": {"null": NULL}}))
    (folder / "config.yaml").write_text(config)
    for step in range(100, steps + 1, 100):
        draw(folder, step)
    courses = [
        Course("quality/fid", [], [], NULL["fid"], True),
        Course("quality/recall", [], [], NULL["recall"], False),
    ]
    log = EventLog([folder])
    log.start(0, steps, {"Python": "3.99", "Device": "cpu"})
    log.observe(100, Outcome(courses))
    return log, courses


@pytest.fixture
def run(tmp_path):
    log, courses = make_run(tmp_path / "ring" / "version_0")
    log.end(400, Outcome(courses, watched=400))
    return tmp_path / "ring" / "version_0"


def page_of(*folders, out="report.html"):
    return write_report(folders, out).read_text(encoding="utf-8")


# ---------- a run that has taken place


class Says(GANCallback):
    """Says something from a step on, and no longer from another one on."""

    rolled_back = False

    def __init__(self, since, until=None):
        super().__init__()
        self.since, self.until = since, until

    def outcome(self, trainer):
        step = trainer.global_step
        lasts = self.until is None or step < self.until
        said = [Trouble(self.since, "collapse", "fid 9", "Add <Unrolling>.", "rollback", lasts)]
        return Outcome(troubles=said if step >= self.since else [])


class Breaks(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 50:
            raise RuntimeError("no more power")


def fit(folder, *callbacks, steps=60, **settings):
    quality = QualityMonitor(every=20, n_samples=100, metrics=["fid", "recall", "coverage"])
    run = trainer(
        max_steps=steps,
        logger=CSVLogger(folder, name="", flush_logs_every_n_steps=5),
        log_every_n_steps=5,
        callbacks=[quality, HealthMonitor(every=10, patience=9), SampleLogger(every=20, n=9), *callbacks],
        limit_val_batches=0,
        **settings,
    )
    run.fit(small(), Ring(batch_size=16, val_samples=100, epoch_length=100))
    return run


def printed(capsys):
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_the_page_says_what_the_run_said_at_its_end(tmp_path, capsys):
    fit(tmp_path)
    said = printed(capsys)
    page = page_of(tmp_path / "version_0")
    assert said.startswith(("It ", "quality/"))
    assert "No monitor found a cause in 60 steps." in said
    assert said in Tags(page).text
    curves, bands, _ = embedded(page)
    with (tmp_path / "version_0/metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    for key in ("d/adversarial", "g/adversarial", "d/real_logit", "d/fake_logit", "g/grad_norm", "quality/fid"):
        own = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        drawn = curves[f"{tmp_path.name}/version_0: {key}"]
        assert drawn["step"].tolist() == [step for step, _ in own]
        np.testing.assert_allclose(drawn["value"], [value for _, value in own], rtol=1e-6)
    hparams = (tmp_path / "version_0/hparams.yaml").read_text().replace("!!python/tuple", "")
    null = yaml.safe_load(hparams)["quality"]["null"]
    assert bands == {(("top", null["fid"]),), (("bottom", null["recall"]),), (("bottom", null["coverage"]),)}
    assert pictures(page)[0]["slider"] == [20, 40, 60]
    assert f"torch {torch.__version__.partition('+')[0]}" in Tags(page).text


def test_a_run_that_broke_off_says_why(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="no more power"):
        fit(tmp_path, Breaks(), Says(30))
    found = read_run(tmp_path / "version_0")
    assert found.verdict == printed(capsys)
    assert found.verdict.startswith(
        "It stopped: RuntimeError: no more power. Trouble at the end: collapse (since step 30)"
    )


def test_what_is_said_is_written_when_it_begins_and_when_it_ceases(tmp_path):
    fit(tmp_path, Says(32, until=51))
    lines = [json.loads(line) for line in (tmp_path / "version_0" / EVENTS).read_text().splitlines()]
    said = [(line["at"], line["lasts"]) for line in lines if line["event"] == "trouble"]
    assert said == [(35, True), (55, False)]  # at the next step that is logged
    assert [line["event"] for line in lines][0 :: len(lines) - 1] == ["start", "end"]
    events = read_events(tmp_path / "version_0")
    assert events.troubles == [Trouble(32, "collapse", "fid 9", "Add <Unrolling>.", "rollback", False)]
    assert events.spans == [[(32, 55)]]
    page = page_of(tmp_path / "version_0")
    assert embedded(page)[2] == {32}
    assert "collapse at step 32 (over by step 55) Done: rollback. Add <Unrolling>. fid 9" in Tags(page).text


def test_a_run_is_the_same_with_the_files(tmp_path):
    def weights(logger):
        callbacks = [HealthMonitor(every=10, held_out=False)]
        run = trainer(max_steps=20, logger=logger, log_every_n_steps=5, callbacks=callbacks, limit_val_batches=0)
        run.fit(module := small(), Ring(batch_size=16, val_samples=100, epoch_length=100))
        return [*module.state_dict().values()][:-1], torch.get_rng_state()

    (with_files, state), (without, other) = weights(CSVLogger(tmp_path, name="")), weights(False)
    assert (tmp_path / "version_0" / EVENTS).is_file()
    assert all(torch.equal(a, b) for a, b in zip(with_files, without, strict=True) if isinstance(a, torch.Tensor))
    assert torch.equal(state, other)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_run_goes_on_where_the_disk_is_full(tmp_path):
    class Full(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                (tmp_path / "version_0" / EVENTS).unlink()
                (tmp_path / "version_0" / EVENTS).symlink_to("/dev/full")

    with pytest.warns(UserWarning, match="written down no longer: .*No space left.* The run goes on"):
        assert fit(tmp_path, Full(), Says(7), steps=20).global_step == 20


def test_a_fit_that_goes_on_keeps_what_was_said_and_one_from_the_start_does_not(tmp_path):
    trouble = Outcome(troubles=[Trouble(10, "collapse")])
    first = EventLog([tmp_path])
    first.start(0, 100, {})
    first.observe(20, trouble)
    with (tmp_path / EVENTS).open("a") as out:
        out.write('{"event": "end", "st')  # killed
    assert read_events(tmp_path).last_step is None
    again = EventLog([tmp_path])
    again.start(50, 200, {})
    again.observe(80, Outcome(troubles=[Trouble(10, "collapse", lasts=False)]))
    again.observe(90, trouble)
    again.end(200, trouble, "KeyboardInterrupt")
    events = read_events(tmp_path)
    assert (events.max_steps, events.last_step, events.stopped, events.first_step) == (200, 200, "KeyboardInterrupt", 0)
    assert events.spans == [[(10, 80), (90, None)]]
    EventLog([tmp_path]).start(0, 100, {})
    assert read_events(tmp_path).troubles == []


# ---------- folders of every kind


def test_events_are_marked_and_listed(tmp_path):
    log, courses = make_run(tmp_path / "a")
    log.observe(200, Outcome(courses, [Trouble(200, "mode hopping", "imbalance 0.9", "Add it.", lasts=True)]))
    log.end(400, Outcome(courses, [Trouble(200, "mode hopping", "imbalance 0.9", "Add it.", lasts=True)]))
    page = page_of(tmp_path / "a")
    assert embedded(page)[2] == {200}
    text = Tags(page).text
    assert "It did not work: mode hopping (since step 200). quality/fid fell from 60 to 10" in text
    assert "mode hopping at step 200 (so at the end) Add it. imbalance 0.9" in text


def test_a_run_that_goes_on_or_was_killed(tmp_path):
    folder = tmp_path / "a"
    log, courses = make_run(folder)
    log.observe(300, Outcome(courses, [Trouble(300, "collapse")]))
    whole = (folder / "metrics.csv").read_text()
    with (folder / "metrics.csv").open("a", newline="") as out:
        out.write(whole.splitlines()[-1][:-1])  # a step of 40 in place of 400
    (folder / "samples/000500.png").write_bytes((folder / "samples/000400.png").read_bytes()[:40])
    found = read_run(folder)
    assert not found.ended
    assert found.verdict == (
        "At step 400 of 400, still going, or ended without a word. Trouble: collapse (since step 300). "
        "quality/fid fell from 60 to 10 (best 10 at step 400, real data 1.5)."
    )
    assert [*found.curves["quality/fid"].values] == [60, 20, 10]
    page = page_of(folder)
    assert found.verdict in Tags(page).text
    assert pictures(page)[0]["runs"][0]["steps"] == [100, 200, 300, 400]


def test_a_run_without_events_tells_what_its_log_does(run, tmp_path):
    (run / EVENTS).unlink()
    (run / "environment.json").unlink()
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    write_log(run, [*rows, *({"step": s, "health/weak_discriminator": float(s > 200)} for s in (100, 300, 400))])
    found = read_run(run)
    assert [(c.name, c.real, c.lower_is_better) for c in found.outcome.courses] == [
        ("quality/fid", 1.5, True),
        ("quality/recall", 0.9, False),
    ]
    assert [(t.step, t.verdict, t.lasts) for t in found.outcome.troubles] == [(300, "weak_discriminator", True)]
    page = page_of(run)
    assert "Add UpdateRatio(d_steps=2)" in Tags(page).text
    assert embedded(page)[1] == {(("top", 1.5),), (("bottom", 0.9),)}


def test_a_run_of_losses_alone(tmp_path):
    write_log(tmp_path / "a", [{"step": 1, "d/adversarial": float("nan")}, {"step": 2, "d/adversarial": float("inf")}])
    text = Tags(page_of(tmp_path / "a")).text
    assert "Nobody measured how good the samples are" in text
    assert "has left no config" in text


def test_two_runs_stand_side_by_side(run, tmp_path):
    other = run.with_name("version_1")
    log, courses = make_run(other, steps=300, fid=9.0, config=CONFIG.replace("1.0", "5.0"))
    log.end(300, Outcome(courses))
    draw(other, 150)
    page = page_of(run, other)
    tags = Tags(page)
    for folder in (run, other):
        assert read_run(folder).verdict in tags.text
    assert "trainer.callbacks.R1Penalty.gamma 1.0 5.0" in tags.text
    assert "model.latent_dim 4" not in tags.text.partition("trainer.callbacks.R1Penalty.gamma")[0]
    curves, bands, _ = embedded(page)
    assert curves["version_1: quality/fid"]["value"].tolist() == [27.0, 9.0, 4.5]
    assert curves["version_0: quality/fid"]["value"].tolist() == [60.0, 20.0, 10.0]
    assert len(bands) == 2
    (samples,) = pictures(page)
    assert samples["slider"] == [100, 150, 200, 300, 400]
    assert [part["steps"] for part in samples["runs"]] == [[100, 200, 300, 400], [100, 150, 200, 300]]


def test_a_long_run_stays_small(tmp_path):
    folder, steps = tmp_path / "a", 100_000
    noise = np.random.default_rng(0).normal(size=(steps, 6))
    noise[54_321] = 99.0
    keys = ["d/adversarial", "g/adversarial", "d/real_logit", "d/fake_logit", "d/grad_norm", "g/grad_norm"]
    folder.mkdir()
    np.savetxt(
        folder / "metrics.csv",
        np.c_[np.arange(steps), noise],
        "%.6g",
        ",",
        header=",".join(["step", *keys]),
        comments="",
    )
    (folder / "samples").mkdir()
    shades = np.random.default_rng(1).integers(0, 256, (4, 96, 96, 3), np.uint8)
    for i, pixels in enumerate(shades):
        Image.fromarray(pixels).save(folder / f"samples/{i:06d}.png")
    for i in range(4, 2000):
        shutil.copy(folder / f"samples/{i % 4:06d}.png", folder / f"samples/{i:06d}.png")
    page = page_of(folder)
    assert len(page.encode()) < 5_000_000
    drawn = embedded(page)[0][f"{tmp_path.name}/a: g/grad_norm"]
    assert len(drawn["step"]) <= 2000
    assert drawn["value"].max() == 99.0
    assert drawn["step"][drawn["value"].argmax()] == 54_321
    shown = pictures(page)[0]["runs"][0]["steps"]
    assert (shown[0], shown[-1]) == (0, 1999)
    assert f"{len(shown)} of 2,000 pictures are in this page" in Tags(page).text
    assert "least and the greatest value of each of 1,000 stretches" in Tags(page).text


def test_large_pictures_and_many_values_stay_small(tmp_path):
    rows = [{"step": i, **{f"balance/v{k}": float(i * k) for k in range(150)}} for i in range(50)]
    write_log(tmp_path / "a", rows)
    (tmp_path / "a/samples").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (1200, 1200, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a/samples/000000.png", compress_level=1)
    for step in range(1, 60):
        (tmp_path / f"a/samples/{step:06d}.png").hardlink_to(tmp_path / "a/samples/000000.png")
    page = page_of(tmp_path / "a")
    assert len(page.encode()) < 5_000_000
    assert "Without a chart for want of room: balance/v" in Tags(page).text
    assert pictures(page)[0]["runs"][0]["steps"]


def test_nothing_is_loaded_from_anywhere(run):
    tags = Tags(page_of(run)).tags
    addresses = [value for _, given in tags for key, value in given.items() if key in ("src", "href", "data", "action")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    policy = next(given["content"] for tag, given in tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_text_of_a_run_is_no_html(run):
    attack = "</script><script>alert(1)</script>"
    (run / "config.yaml").write_text(f'name: "{attack}<!-- samples -->"\n')
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    write_log(run, [*rows, {"step": 400, f"x{attack}": 1.0}])
    page = page_of(run)
    assert attack not in page
    assert page.count('id="samples"') == 1
    assert attack in Tags(page).text


# ---------- refusals


def test_refusals(run, tmp_path):
    (tmp_path / "empty").mkdir()
    write_log(tmp_path / "new", [{"step": 0}])
    write_log(tmp_path / "mine/runs/version_0", [{"step": 0}])
    (tmp_path / "there.html").write_text("mine")
    cases = [
        ([tmp_path / "none"], {}, FileNotFoundError, "There is no folder '.*none'"),
        ([tmp_path / "empty"], {}, FileNotFoundError, "has no metrics.csv: a run with the logger CSVLogger leaves one"),
        ([run.parent], {}, FileNotFoundError, "has no metrics.csv: did you mean '.*version_0'"),
        ([tmp_path / "mine"], {}, FileNotFoundError, "has no metrics.csv: did you mean '.*mine.runs.version_0'"),
        ([tmp_path / "new"], {}, ValueError, "has no values yet"),
        ([run, run.parent / "." / run.name], {}, ValueError, "is given twice"),
        ([], {}, ValueError, "`folders` must be at least one folder of a run"),
        ([run], {"out": "there.html"}, FileExistsError, "exists: give another `--out`, or `--overwrite`"),
        ([run], {"out": "empty", "overwrite": True}, FileExistsError, "is no file that can be replaced"),
        ([run], {"out": "far/report.html"}, FileNotFoundError, "There is no folder 'far'"),
    ]
    for folders, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            write_report(folders, **settings)
    assert (tmp_path / "there.html").read_text() == "mine"


def test_bokeh_is_asked_for(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-gan-stability\[report\]'"):
        write_report([run])


def test_the_command(run, tmp_path, capsys):
    Path("there.html").write_text("mine")
    main(["report", str(run), "--out", "there.html", "--overwrite"])
    assert capsys.readouterr().out == "there.html\n"
    assert Path("there.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(file.name for file in Path().iterdir()) == ["ring", "there.html"]


def test_a_full_disk_takes_nothing_away(run, tmp_path):
    """For want of a full disk the system refuses files of more than 100 kB."""
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    (tmp_path / "there.html").write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"The report could not be written to 'there.html': File too large\."):
            write_report([run], "there.html", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "there.html").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ring", "there.html"]


# ---------- in a browser


@needs_chromium
@pytest.mark.parametrize("runs", [1, 2])
def test_in_chromium(run, runs):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    folders = [run]
    if runs == 2:
        log, courses = make_run(run.with_name("version_1"), fid=9.0)
        log.end(400, Outcome(courses))
        folders.append(run.with_name("version_1"))
    with chromium() as browser:
        browser.get(write_report(folders).absolute().as_uri())
        WebDriverWait(browser, 60).until(lambda page: all(page.execute_script(DRAWN)))
        assert len(browser.execute_script(DRAWN)) == 5
        assert len(browser.find_elements(By.CSS_SELECTOR, ".run .verdict")) == runs
        images = browser.find_elements(By.CSS_SELECTOR, "figure img")
        assert len(images) == runs
        before = [image.get_attribute("src") for image in images]
        slider = browser.find_element(By.CSS_SELECTOR, "input[type=range]")
        slider.send_keys(Keys.ARROW_LEFT)
        after = [image.get_attribute("src") for image in images]
        shown = pictures(Path("report.html").read_text(encoding="utf-8"))[0]["runs"]
        assert before == [part["images"][3] for part in shown]
        assert after == [part["images"][2] for part in shown]
        assert len({*before, *after}) == 2
        assert browser.find_element(By.CSS_SELECTOR, "output").text == "300"
        assert [step.text for step in browser.find_elements(By.CSS_SELECTOR, "figure .step")] == ["300"] * runs
        assert browser.execute_script("return arguments[0].naturalWidth", images[0]) == 16
        for button in browser.find_elements(By.CSS_SELECTOR, "button[data-log]"):
            browser.execute_script("arguments[0].click()", button)
        WebDriverWait(browser, 60).until(lambda page: all(page.execute_script(DRAWN)))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 1300
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [address for address in loaded if not address.startswith("data:")] == []
        assert complaints(browser) == []
