"""An offline run of a config, read back from the file that `wandb sync` would send."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

CONFIG = Path(__file__).parent.parent / "configs" / "digits_wandb.yaml"
BLOCK = 32768


def records(file):
    """Records of a .wandb file: 7 bytes, then LevelDB's log format, each record a protocol buffer of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little for a header: the rest of a block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def items(updates):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The config, shortened, with a generator that does not learn: all of its samples are alike."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["g_optimizer"]["init_args"]["lr"] = 0.0
    config["trainer"] |= {"max_steps": 6, "log_every_n_steps": 1, "enable_progress_bar": False}
    every = {
        "QualityMonitor": {"every": 1, "n_samples": 200},
        "HealthMonitor": {"every": 3},
        "SampleLogger": {"every": 3},
    }
    for callback in config["trainer"]["callbacks"]:
        callback.setdefault("init_args", {}).update(every.get(callback["class_path"], {}))
    Path("wandb.yaml").write_text(yaml.safe_dump(config))
    # in a process of its own, and without WANDB_SERVICE: a service stays in the folder of the test that started it
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-W", "ignore", "-m", "lightning_gan_stability", "fit", "--config", "wandb.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("offline-run-*/*.wandb")
    return file.parent, list(records(file))


@pytest.mark.filterwarnings("default")
def test_losses_quality_health_pictures_alert_and_config_are_in_the_run(run):
    folder, found = run
    history = [items(record.history.item) for record in found if record.HasField("history")]
    rows = {key: [row[key] for row in history if key in row] for key in {key for row in history for key in row}}

    losses = ["adversarial", "real_logit", "fake_logit", "accuracy", "grad_norm", "r1", "r2"]
    for key in [*(f"d/{name}" for name in losses), "g/adversarial", "g/grad_norm"]:
        assert len(rows[key]) == 6, key
    assert rows["g/grad_norm"][-1] > 0

    assert len(rows["quality/fid"]) == 7  # the untrained generator is measured too
    assert {f"quality/{name}" for name in ("precision", "recall", "coverage", "modes", "table/path")} <= set(rows)
    assert rows["quality/time_share"][-1] > 0

    assert rows["health/collapse"] == [1]
    assert rows["health/vanishing_gradient"] == [0, 0]
    assert rows["collapse/missing"][0] > 0.5

    names = [name for names in rows["samples/filenames"] for name in names]
    assert len(names) == 2
    with Image.open(folder / "files" / names[0]) as image:
        assert image.size == (82, 82)  # 8 by 8 digits of 8 pixels, with lines of 2

    (alert,) = [record.alert for record in found if record.HasField("alert")]
    assert (alert.title, alert.level) == ("collapse", "WARN")
    assert alert.text.startswith("collapse at step 4: fid ")

    config = {}
    for record in found:
        config |= items(record.config.update) if record.HasField("config") else {}
    assert config["latent_dim"] == 32
    assert config["generator"]["init_args"]["sizes"] == [32, 128, 128, 64]
    assert config["loss"]["class_path"].endswith("Relativistic")
    assert config["d_optimizer"]["init_args"]["lr"] == 5e-4
    assert config["data"]["init_args"]["batch_size"] == 64
    assert config["seed_everything"] == 0
    assert config["trainer"]["max_steps"] == 6
    penalty = config["trainer"]["callbacks"][0]
    assert penalty["class_path"].endswith("R1Penalty")
    assert penalty["init_args"]["gamma"] == 1.0
    assert config["quality"]["extractor"] == "DigitClassifier"
    assert config["quality"]["n_fake"] == 200
    assert torch.tensor(list(config["quality"]["null"].values())).isfinite().all()
