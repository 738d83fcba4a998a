"""A run that is told to stop, at any moment, saves the state between two batches."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment as Slurm
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from test_resume import LENGTH, STEPS, check_equal, resumed, state, stream, train, uninterrupted
from toys import small

from lightning_gan_stability import GeneratorEMA, Lookahead, R1Penalty, UpdateRatio
from lightning_gan_stability.data import Stream

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]


def callbacks():
    return [R1Penalty(0.1, every=2), GeneratorEMA(decay=0.9), Lookahead(k=3), UpdateRatio(2)]


class Data(LightningDataModule):
    """Batches, and two held-out ones, that can tell that they are read."""

    def __init__(self):
        super().__init__()
        self.stream, self.seen = stream(), lambda split: None

    def train_dataloader(self):
        batch = self.stream.batch
        self.stream.batch = lambda position: (self.seen("train"), batch(position))[1]
        return self.stream

    def val_dataloader(self):
        batch = stream().batch
        return Stream(lambda position: (self.seen("val"), batch(position))[1], 2, repeat=True)

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state_dict):
        self.stream.load_state_dict(state_dict)


class Send(Callback):
    """Sends a signal to its own process the n-th time that something happens."""

    def __init__(self, module, data, number, moment, n):
        self.number, self.moment, self.left, self.sent = number, moment, n, False
        module.discriminator.register_forward_hook(lambda *_: self.happens("forward pass"))
        next(module.discriminator.parameters()).register_hook(lambda _: self.happens("backward pass"))
        data.seen = lambda split: self.happens(f"batch of {split}")

    def happens(self, moment):
        self.left -= moment == self.moment
        if self.left == 0 and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer, module):
        for player, optimizer in zip("dg", trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(lambda *_, p=player: self.happens(f"before {p}'s step"))
            optimizer.register_step_post_hook(lambda *_, p=player: self.happens(f"after {p}'s step"))

    def on_train_batch_start(self, *_):
        self.happens("start of a batch")

    def on_train_batch_end(self, *_):
        self.happens("end of a batch")

    def on_train_epoch_end(self, *_):
        self.happens("end of an epoch")

    def on_train_epoch_start(self, *_):
        self.happens("start of an epoch")

    def on_validation_start(self, *_):
        self.happens("start of validation")

    def on_validation_end(self, *_):
        self.happens("end of validation")


MOMENTS = [
    *(("forward pass", n) for n in (1, 2, 3, 11, 22)),
    *(("backward pass", n) for n in (1, 2, 7, 10)),
    *((f"{when} {player}'s step", n) for when in ("before", "after") for player in "dg" for n in (1, 3)),
    *((f"{edge} of a batch", n) for edge in ("start", "end") for n in (1, 3, LENGTH, LENGTH + 1)),
    *(("batch of train", n) for n in (2, 4, LENGTH, LENGTH + 1, LENGTH + 2)),
    *(("batch of val", n) for n in (1, 2, 3)),
    ("start of validation", 1),
    ("end of validation", 1),
    ("end of an epoch", 1),
    ("start of an epoch", 2),
]
OPTIONS = {"limit_val_batches": 2, "val_check_interval": 3, "num_sanity_val_steps": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """How the run ends that nobody stops."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("whole"))
    yield uninterrupted(small, Data, callbacks, **OPTIONS)
    os.chdir(before)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job of SLURM, whose `scontrol` notes what it is asked."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    variables = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "JOB_ID": 7, "JOB_NAME": "gan", "PROCID": 0, "LOCALID": 0}
    for name, value in {**variables, "NNODES": 1, "NODEID": 0, "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert Slurm.detect()
    return tmp_path / "requeued"


@pytest.mark.parametrize(("moment", "n"), MOMENTS)
def test_sigusr1_under_slurm_saves_what_an_uninterrupted_run_goes_through(moment, n, slurm, whole):
    """SLURM kills the job somewhat later; here it goes on to its end, and the checkpoint starts a new one."""
    module, data = small(seed=0), Data()
    send = Send(module, data, signal.SIGUSR1, moment, n)
    plugin = SLURMEnvironment(requeue_signal=signal.SIGUSR1)
    before = signal.getsignal(signal.SIGUSR1)
    run = train(module, data, [*callbacks(), send, ModelCheckpoint("never")], plugins=[plugin], **OPTIONS)
    assert send.sent
    assert slurm.read_text() == "requeue 7\n"
    assert signal.getsignal(signal.SIGUSR1) == before
    check_equal(state(*whole)["weights and buffers"], state(module, run)["weights and buffers"])
    path = "hpc_ckpt_1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert 0 < checkpoint["global_step"] == checkpoint["state_dict"]["_extra_state"]["iteration"] < STEPS
    again = resumed(small, Data, callbacks, ModelCheckpoint("never"), path, **OPTIONS)
    check_equal(state(*whole), state(*again))


@pytest.mark.parametrize(("moment", "n"), MOMENTS)
def test_ctrl_c_saves_what_an_uninterrupted_run_goes_through(moment, n, whole):
    module, data = small(seed=0), Data()
    send = Send(module, data, signal.SIGINT, moment, n)
    save = ModelCheckpoint("saved", save_on_exception=True, every_n_train_steps=10**6, filename="stopped")
    with pytest.raises(SystemExit):
        train(module, data, [*callbacks(), send, save], **OPTIONS)
    assert send.sent
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = resumed(small, Data, callbacks, save, "saved/stopped.ckpt", **OPTIONS)
    check_equal(state(*whole), state(*again))


def test_a_second_ctrl_c_stops_at_once_and_says_what_it_saved():
    module, data = small(seed=0), Data()
    first, second = (Send(module, data, signal.SIGINT, "forward pass", n) for n in (4, 5))
    save = ModelCheckpoint("saved", save_on_exception=True, every_n_train_steps=10**6, filename="stopped")
    with pytest.warns(UserWarning, match="A checkpoint is saved inside of a step"), pytest.raises(SystemExit):
        train(module, data, [first, second, save], **OPTIONS)
    assert first.sent
    assert second.sent
    assert module.iteration == 1
