"""Launchers as on one node and on two: a process is killed, and all go on from the last checkpoint."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from toys import free_port

ROOT = Path(__file__).parent.parent
HOSTS = ("gan-stability-0", "gan-stability-1")  # network namespaces
STEPS, EVERY, FATAL = 10, 4, 7


class Mortal(Callback):
    """Notes where each start begins; a process dies once, the second after a step or the first while it saves."""

    def __init__(self, folder: str, fatal: int, saving: bool = False):
        self.folder, self.fatal, self.saving = Path(folder), fatal, saving
        self.mark = self.folder / "died"

    def on_train_start(self, trainer, module):
        with (self.folder / f"starts-{trainer.global_rank}").open("a") as file:
            file.write(f"{module.iteration}\n")

    def on_train_batch_end(self, trainer, module, *_):
        if module.iteration == self.fatal and trainer.global_rank == 1 and not self.saving and not self.mark.exists():
            self.die()

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if module.iteration == self.fatal and trainer.global_rank == 0 and self.saving and not self.mark.exists():
            shutil.move = self.die_halfway

    def die_halfway(self, source, target):
        """As `shutil.move` from another file system, half of it."""
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        self.die()

    def die(self):
        self.mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def shell(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them; empty if the machine does not let one make them."""
    made = []
    try:
        for name in HOSTS:
            if shell("ip", "netns", "add", name).returncode:
                break
            made.append(name)
        else:
            shell("ip", "link", "add", "veth0", "netns", HOSTS[0], "type", "veth", "peer", "veth0", "netns", HOSTS[1])
            for i, name in enumerate(HOSTS):
                for words in (f"addr add 10.77.0.{i + 1}/24 dev veth0", "link set veth0 up", "link set lo up"):
                    shell("ip", "-n", name, *words.split())
        reached = len(made) == 2 and shell("ip", "netns", "exec", HOSTS[1], "true").returncode == 0
        yield HOSTS if reached else ()
    except FileNotFoundError:  # no `ip`
        yield ()
    finally:
        for name in made:
            shell("ip", "netns", "del", name)


def stop(nodes, folder):
    """End the launchers, and the processes that they have started, which have the folder in their arguments."""
    for node in nodes:
        if node.poll() is None:
            node.kill()
            node.wait()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            pass


def launch(folder, hosts, fatal, saving=False, nodes=2, limit=120):
    """One launcher per node, by the script that users start, until all end or one fails; their exit codes."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "NODES": str(nodes), "PROCESSES": str(2 // nodes), "PORT": str(free_port()),
        "HEAD": "10.77.0.1" if hosts else "127.0.0.1",
        "RUN": str(folder / "run"), "EVERY": str(EVERY), "RESTARTS": "0", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "GLOO_SOCKET_IFNAME": "veth0" if hosts else "lo", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    callback = ["--trainer.callbacks+=test_multinode.Mortal", f"--trainer.callbacks.folder={folder}"]
    command = [
        str(ROOT / "examples" / "multinode" / "torchrun.sh"), "fit", "--config", str(ROOT / "configs" / "digits.yaml"),
        f"--trainer.max_steps={STEPS}", *callback, f"--trainer.callbacks.fatal={fatal}",
        f"--trainer.callbacks.saving={saving}",
    ]  # fmt: skip
    launchers = []
    for i in range(nodes):
        inside = ["ip", "netns", "exec", hosts[i]] if hosts else []
        own = environment | ({"ADDRESS": f"10.77.0.{i + 1}"} if hosts else {})
        with (folder / f"log-{i}").open("w") as log:
            options = {"env": own, "cwd": folder, "stdout": log, "stderr": log}
            launchers.append(subprocess.Popen([*inside, "bash", *command], **options))
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end and None in (codes := [node.poll() for node in launchers]) and not any(codes):
            time.sleep(0.1)
    finally:
        stop(launchers, folder)
    return codes


def said(folder):
    return "".join(log.read_text()[-3000:] for log in sorted(folder.glob("log-*")))


def differences(a, b, path=""):
    """Where two states differ."""
    if isinstance(a, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


@pytest.mark.timeout(290)
def test_a_killed_process_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, hosts):
    folders = tmp_path / "whole", tmp_path / "killed"
    assert launch(folders[0], hosts, fatal=0) == [0, 0], said(folders[0])  # between namespaces, where there are any
    assert any(launch(folders[1], (), fatal=FATAL))
    assert launch(folders[1], (), fatal=FATAL) == [0, 0], said(folders[1])  # the same line again
    whole, killed = (torch.load(folder / "run" / "last.ckpt", weights_only=True) for folder in folders)
    for rank in range(2):
        assert (tmp_path / "whole" / f"starts-{rank}").read_text().split() == ["0"]
        assert (tmp_path / "killed" / f"starts-{rank}").read_text().split() == ["0", str(EVERY)]
    assert [run["state_dict"]["_extra_state"]["iteration"] for run in (whole, killed)] == [8, 8]
    check_same(whole, killed)


def check_same(whole, killed):
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(whole[part], killed[part]) == []


@pytest.mark.timeout(170)
def test_a_process_that_is_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path):
    """Two processes on one node; the file is on its way from one file system to another."""
    folders, one = [tmp_path / "whole", tmp_path / "killed"], {"nodes": 1, "limit": 50}
    assert launch(folders[0], (), 0, **one) == [0], said(folders[0])
    assert any(launch(folders[1], (), 2 * EVERY, saving=True, **one))
    assert (folders[1] / "died").exists()
    for path in (folders[1] / "run").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] == EVERY
    assert launch(folders[1], (), 2 * EVERY, saving=True, **one) == [0], said(folders[1])  # the same line again
    assert [(folders[1] / f"starts-{rank}").read_text().split() for rank in range(2)] == [["0", str(EVERY)]] * 2
    check_same(*(torch.load(folder / "run" / "last.ckpt", weights_only=True) for folder in folders))
