"""What a GPU does differently: its arithmetic, its gradient scaler, its compiler, and a host that need not wait for it.

`TEST_ACCELERATOR=gpu pytest` runs the whole suite's fits on one; these tests are those that need one.
"""

import warnings
from collections import Counter

import pytest
import tables
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from test_strategies import ERROR, METHODS, step
from toys import fit, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    Alternating,
    CollapseDetector,
    FakePool,
    GeneratorEMA,
    HealthMonitor,
    LeCam,
    Lookahead,
    PathLengthPenalty,
    QualityMonitor,
    R1Penalty,
    Ring,
    SampleLogger,
    SpectralNorm,
    Unrolling,
)
from lightning_gan_stability.monitors.rollback import put_back, take
from lightning_gan_stability.noise import Noise

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    pytest.mark.filterwarnings("ignore:.*(collapse|divergence|hopping) at step"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # by torch's compiler
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    # Lightning makes DDP on a stream of its own
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
]


@pytest.fixture
def noise_of_the_cpu(monkeypatch):
    """A GPU's generator draws other numbers."""

    class Here:
        """The clock of a module on the CPU."""

        device = torch.device("cpu")

        def __init__(self, clock):
            self.clock = clock

        def __getattr__(self, name):
            return getattr(self.clock, name)

    def on_cpu(draw):
        def drawn(self, *shape, dtype=None):
            there = self.clock
            self.clock = Here(there)
            try:
                return draw(self, *shape, dtype=dtype).to(there.device)
            finally:
                self.clock = there

        return drawn

    for name in ("randn", "rand"):
        monkeypatch.setattr(Noise, name, on_cpu(getattr(Noise, name)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_steps_of_the_cpu(name, noise_of_the_cpu):
    here = step(name, precision="64-true", accelerator="cpu")
    there = step(name, precision="64-true", accelerator="gpu")
    assert here.norm() > 1e-3
    assert (here - there.cpu()).norm() <= 1e-9 * here.norm()


@pytest.mark.parametrize("way", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_precision(name, way):
    if tables.works(name, way) == "refused":
        pytest.skip("refused, which tests/test_strategies.py checks")
    # of the scale that a scaler starts with, the first steps of some methods overflow, and are skipped
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10) if way == "16-mixed" else None
    exact = step(name, accelerator="gpu")
    moved = step(name, accelerator="gpu", plugins=[MixedPrecision(way, "cuda", scaler)])
    assert (moved - exact).norm() <= ERROR[way] * exact.norm()


@pytest.mark.parametrize(
    "name", ["Alternating", "Extragradient", "Unrolling", "R1Penalty", "SpectralNorm", "GeneratorEMA"]
)
def test_compiled_steps_are_those_of_eager(name):
    torch._dynamo.reset()
    exact, moved = (step(name, accelerator="gpu", compile=compiled) for compiled in (False, True))
    assert (moved - exact).norm() <= ERROR["compiled"] * exact.norm()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [R1Penalty(0.5, every=2), GeneratorEMA()],
        lambda: [Alternating(share_fake=True), HealthMonitor(every=2)],
        lambda: [FakePool(20), SampleLogger(every=2)],
        lambda: [Unrolling(2)],
    ],
    ids=["R1Penalty", "share_fake", "FakePool", "Unrolling"],
)
def test_replayed_cuda_graphs_take_the_steps_of_eager(make, accumulate):
    """With an incomplete last batch, monitors between steps, and samples afterwards."""
    if accumulate > 1 and any(isinstance(callback, Alternating | Unrolling) for callback in make()):
        pytest.skip("refused")
    batches, found = [batch[: 5 if i % 4 == 3 else 8] for i, batch in enumerate(points(12))], []
    for options in (False, {"mode": "reduce-overhead"}):
        torch._dynamo.reset()
        module = small(compile=options, accumulate=accumulate, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
        fit(module, batches, callbacks=make(), accelerator="gpu")
        module.cuda()
        samples = [module.sample(latents=torch.full((4, 4), float(i))) for i in range(2)]
        found.append(torch.cat([weights(module).cpu(), *(x.detach().flatten().cpu() for x in samples)]))
    assert (found[1] - found[0]).norm() <= ERROR["compiled"] * found[0].norm()


@pytest.mark.parametrize("strategy", ["ddp", ModelParallelStrategy(1, 1)], ids=["ddp", "shards"])
def test_one_process_of_nccl_takes_the_steps_of_none(strategy):
    moved, one = [], {"accelerator": "gpu", "use_distributed_sampler": False}
    for chosen in ("auto", strategy):
        module = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
        fit(module, points(5), callbacks=[R1Penalty(0.5), GeneratorEMA()], **one, strategy=chosen)
        moved.append(weights(module).cpu())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert (moved[0] - moved[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("callbacks", [list, lambda: [R1Penalty(0.5), SpectralNorm(), GeneratorEMA()]])
def test_the_host_waits_only_when_somebody_looks(callbacks):
    """Steps between two loggings cost no synchronization."""

    def waits(n):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            fit(small(), points(n), callbacks=callbacks(), accelerator="gpu", log_every_n_steps=1000)
            torch.cuda.set_sync_debug_mode("default")
        seen = Counter((w.filename, w.lineno) for w in caught if "called a synchronizing" in str(w.message))
        return Counter({place: n for place, n in seen.items() if "/lightning/" not in place[0]})  # which moves batches

    short, long = waits(20), waits(40)
    assert not long - short


def test_training_goes_on_after_a_rollback():
    """What was kept lies in the CPU's memory."""

    class Back(Callback):
        def on_train_batch_end(self, trainer, module, batch, outputs, batch_idx):
            if batch_idx == 3:
                self.kept = take(trainer, module)
            if batch_idx == 5:
                put_back(trainer, module, self.kept)

    others = [Lookahead(k=2), LeCam(start=1), PathLengthPenalty(every=2), GeneratorEMA(), SpectralNorm()]
    module = small()
    run = fit(module, points(10), callbacks=[*others, Back()], accelerator="gpu")
    assert (run.global_step, module.iteration) == (10, 8)
    assert weights(module).isfinite().all()


@pytest.mark.filterwarnings("ignore:.* at step")
def test_a_run_that_is_rolled_back_until_its_end():
    detector = CollapseDetector("rollback", max_rollbacks=100)
    module = small(g_optimizer=sgd(10.0), d_optimizer=sgd(10.0), clip_norm=1.0)
    callbacks = [Lookahead(k=2), LeCam(start=1), QualityMonitor(n_samples=200, every=5), detector]
    run = trainer(callbacks=callbacks, accelerator="gpu", max_steps=60, max_epochs=-1, limit_val_batches=0)
    run.fit(module, Ring(batch_size=32, val_samples=100))
    assert run.global_step == 60
    assert module.iteration < 60


def test_quality_of_the_same_samples_is_that_of_the_cpu(noise_of_the_cpu):
    values = []
    for accelerator in ("cpu", "gpu"):
        monitor = QualityMonitor(n_samples=200, every=5)
        data = points(20, 32, dtype=torch.float64)
        fit(small(), data, callbacks=[monitor], accelerator=accelerator, precision="64-true")
        values.append(monitor.history[-1])
    for name, value in values[0].items():
        assert values[1][name] == pytest.approx(value, rel=1e-6, abs=1e-7), name  # shares are float32
