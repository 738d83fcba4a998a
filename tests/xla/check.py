"""Training through XLA's CPU client equals training on the CPU; not in the suite: it needs its own environment.

    python -m venv /tmp/xla && /tmp/xla/bin/pip install -r tests/xla/requirements.txt
    PJRT_DEVICE=CPU PYTHONPATH=.:tests /tmp/xla/bin/python -m pytest -o addopts= tests/xla/check.py

Lightning counts TPUs alone, and asks a cloud for them, so its two questions are answered here: there is one device.
"""

import pytest
import torch
import torch_xla
from lightning.fabric.accelerators.xla import XLAAccelerator as FabricXLA
from lightning.pytorch.accelerators.xla import XLAAccelerator
from lightning.pytorch.strategies import SingleDeviceXLAStrategy
from torch.utils.data import DataLoader
from toys import points, small, trainer, weights

from lightning_gan_stability import (
    ApproximateR1Penalty,
    Extragradient,
    GeneratorEMA,
    GradientPenalty,
    HealthMonitor,
    Hinge,
    LeCam,
    Lookahead,
    R1Penalty,
    SpectralNorm,
    Unrolling,
    UpdateRatio,
    WeightClipping,
)

CASES = {
    "plain": ({}, list),
    "R1, lazy": ({}, lambda: [R1Penalty(0.5, every=2)]),
    "WGAN-GP": ({"loss": Hinge()}, lambda: [GradientPenalty(0.5)]),
    "finite differences": ({}, lambda: [ApproximateR1Penalty(10.0, 0.1)]),
    "Unrolling": ({}, lambda: [Unrolling(3)]),
    "Unrolling, R1": ({}, lambda: [Unrolling(2), R1Penalty(0.5)]),
    "Extragradient": ({}, lambda: [Extragradient()]),
    "clip_norm, accumulate": ({"clip_norm": 0.1, "accumulate": 2}, list),
    "SpectralNorm": ({}, lambda: [SpectralNorm()]),
    "GeneratorEMA": ({}, lambda: [GeneratorEMA(half_life=2)]),
    "Lookahead, WeightClipping": ({}, lambda: [Lookahead(k=2), WeightClipping(0.3)]),
    "LeCam, UpdateRatio": ({}, lambda: [LeCam(start=1), UpdateRatio(2)]),
    "HealthMonitor": ({}, lambda: [HealthMonitor(every=2)]),
}


@pytest.fixture
def one_device(monkeypatch):
    for kind in (FabricXLA, XLAAccelerator):
        monkeypatch.setattr(kind, "auto_device_count", staticmethod(lambda: 1))
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: True))


def train(case, **kwargs):
    options, callbacks = CASES[case]
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.05)  # noqa: E731
    module = small(g_optimizer=sgd, d_optimizer=sgd, **options)
    run = trainer(max_steps=5, max_epochs=-1, callbacks=callbacks(), **kwargs)
    run.fit(module, DataLoader(points(5), batch_size=None))
    assert module.iteration == run.global_step == 5
    return weights(module).cpu()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_one_device_equals_the_cpu(case, one_device):
    device = torch_xla.device()
    there = train(case, accelerator="tpu", devices=1, strategy=SingleDeviceXLAStrategy(device=device))
    here = train(case)
    before = weights(small())
    assert (here[: len(before)] - before).abs().max() > 1e-3
    assert (there - here).abs().max() <= 1e-6
