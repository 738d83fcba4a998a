import importlib.util
import os

import pytest
import torch

# two test workers share two cores
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# needs the environment of its own requirements.txt
collect_ignore = [] if importlib.util.find_spec("torch_xla") else ["xla"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    """Whatever a run writes lands in the test's own folder."""
    monkeypatch.chdir(tmp_path)
