"""A run that dies and is resumed by a fresh module and Trainer equals one that was never interrupted, bit for bit.

So do networks and augmentations that draw from torch's global generator, which is seeded for each step.
"""

import random
from copy import deepcopy

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchmetrics import MeanSquaredError
from toys import fit, points, public_callbacks, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    AdaptiveAugmentation,
    AdaptiveUpdateRatio,
    AdversarialStart,
    Alternating,
    ApproximateR1Penalty,
    ApproximateR2Penalty,
    AugmentationSchedule,
    AugmentPipe,
    AutoEncoder,
    Autopilot,
    BoundaryEquilibrium,
    CollapseDetector,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    ConsistencyPenalty,
    DRAGANPenalty,
    Extragradient,
    FakePool,
    FDivergence,
    FeatureMatching,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    HealthMonitor,
    Hinge,
    InstanceNoise,
    LeastSquares,
    LeCam,
    LogitDrift,
    Lookahead,
    LossBalancer,
    MemorizationMonitor,
    Minimax,
    ModeSeeking,
    NegativeMomentum,
    NonSaturating,
    OptimisticAdam,
    OptimisticSGD,
    OptimizerSchedule,
    OrthogonalPenalty,
    Packed,
    PairedMonitor,
    PathLengthPenalty,
    QualityMonitor,
    R1Penalty,
    R2Penalty,
    Reconstruction,
    Relativistic,
    RelativisticAverage,
    Ring,
    SampleLogger,
    ScalePenalty,
    Schedule,
    Simultaneous,
    SpectralNorm,
    Unrolling,
    UpdateRatio,
    Wasserstein,
    WeightClipping,
)
from lightning_gan_stability.data import Stream

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:.* at step .*Action: ")]

# from the first batch of an epoch to the last: the middle, one before the end, the end, and in the second epoch
LENGTH, STEPS = 6, 11


# ---------- runs that are compared


class Crashed(Exception):
    pass


class Crash(Callback):
    """Dies in the batch after the next, so that what the checkpoint holds is not what is there at the end."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step > self.after:
            raise Crashed


def stream(batch_size=8, shape=(2,), dtype=torch.float32, scale=1.0):
    """Batches of 8, 7, 6, 8, ... samples: no number of micro-batches divides all of them."""

    def batch(position):
        generator = torch.Generator().manual_seed(position)
        return scale * torch.randn(batch_size - position % 3, *shape, generator=generator).to(dtype)

    return Stream(batch, LENGTH)


def wide():
    """Real samples far from each other, so that an untrained generator has truly collapsed."""
    return stream(scale=50.0)


def train(module, data, callbacks=(), ckpt_path=None, **kwargs):
    options = {"max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 0} | kwargs
    run = trainer(callbacks=list(callbacks), enable_checkpointing=True, **options)
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def uninterrupted(make, data, callbacks, **kwargs):
    # Lightning adds a ModelCheckpoint of its own if there is none; this one never saves
    module = make(seed=0)
    return module, train(module, data(), [*callbacks(), ModelCheckpoint("never", every_n_train_steps=10**6)], **kwargs)


def saving(at):
    return ModelCheckpoint("saved", filename="{step}", every_n_train_steps=at, save_top_k=-1)


def crashed(make, data, callbacks, save, after, **kwargs):
    """Train until it dies."""
    with pytest.raises(Crashed):
        train(make(seed=0), data(), [*callbacks(), save, Crash(after)], **kwargs | {"max_steps": STEPS + 5})


def resumed(make, data, callbacks, save, path, **kwargs):
    # as in a new process: other initial weights, other global random states
    module = make(seed=1)
    torch.manual_seed(11)
    random.seed(11)
    return module, train(module, data(), [*callbacks(), save], ckpt_path=path, **kwargs)


def state(module, run):
    return {
        "weights and buffers": dict(module.state_dict()),
        "iteration": module.iteration,
        "global_step": run.global_step,
        "epoch": run.current_epoch,
        "optimizers": [o.state_dict() for o in run.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in run.lr_scheduler_configs],
        "scaler": run.precision_plugin.state_dict(),
        "callbacks": {c.state_key: c.state_dict() for c in run.callbacks if not isinstance(c, ModelCheckpoint)},
        "training": {name: m.training for name, m in module.named_modules() if not name.startswith("loss")},
    }


def check_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            check_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            check_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        same = a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN: see below
        assert same, where
    else:
        assert a == b or (a != a and b != b), where  # NaN is what a signal is that there was not


def check_resume(make, data=stream, callbacks=list, at=4, rolls_back=False, **kwargs):
    module, run = uninterrupted(make, data, callbacks, **kwargs)
    crashed(make, data, callbacks, saving(at), at, **kwargs)
    path = f"saved/step={at}.ckpt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == at
    assert (checkpoint["state_dict"]["_extra_state"]["iteration"] == at) is not rolls_back
    tensors = {k: v for k, v in checkpoint["state_dict"].items() if isinstance(v, torch.Tensor)}
    assert any(not torch.equal(v, module.state_dict()[k]) for k, v in tensors.items())
    other, rerun = resumed(make, data, callbacks, saving(at), path, **kwargs)
    check_equal(state(module, run), state(other, rerun))
    assert run.global_step == STEPS
    assert (module.iteration == STEPS) is not rolls_back
    return module, run


# ---------- cases


def began(seed, **kwargs):
    torch.manual_seed(seed)
    generator = MLP([4, 8, 64], output_shape=[1, 8, 8])
    # the k of BEGAN moves by λ: a large one is far from both its bounds
    loss = BoundaryEquilibrium(gamma=0.7, lambda_k=0.05)
    return GANModule(generator, AutoEncoder(1, 8, width=4, code_dim=4), 4, loss, **kwargs)


def images():
    return stream(shape=(1, 8, 8))


def batch_norm(seed, **kwargs):
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return GANModule(generator, discriminator, latent_dim=4, **kwargs)


def players(optimizer, scheduler=None):
    """Both players' optimizer and scheduler as arguments of a GANModule, with different numbers for each."""
    arguments = {"d_optimizer": lambda p: optimizer(p, lr=3e-3), "g_optimizer": lambda p: optimizer(p, lr=1e-3)}
    if scheduler:
        arguments |= {"d_scheduler": lambda o: scheduler(o, 2), "g_scheduler": lambda o: scheduler(o, 3)}
    return arguments


def step_lr(optimizer, n):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=n, gamma=0.7)


def linear_lr(optimizer, n):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=3 * n)


def cosine(optimizer, n):
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=n)
    cold = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cold], [n])


def ddg(seed, **kwargs):
    module = small(seed, **kwargs)
    module.plan = ("d", "d", "g")
    return module


class Noisy(nn.Module):
    """Draws from torch's global generator."""

    def __init__(self, network=None):
        super().__init__()
        self.network = network or nn.Identity()

    def forward(self, x):
        return self.network(x + 0.1 * torch.randn_like(x))


def drawing(seed, **kwargs):
    """Networks with noise of their own, dropout and random augmentation."""
    torch.manual_seed(seed)
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.3), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return GANModule(Noisy(MLP([4, 16, 2])), discriminator, 4, augment=Noisy(), **kwargs)


class Average(Callback):
    """A moving average of the generator in 6 lines."""

    def setup(self, trainer, module, stage):
        if module.generator_ema is None:
            module.generator_ema = deepcopy(module.generator).requires_grad_(False)

    def on_train_batch_end(self, trainer, module, *_):
        for mean, p in zip(module.generator_ema.parameters(), module.generator.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.1)


class Spectral(Callback):
    """Spectral norm on every linear layer of the discriminator."""

    def setup(self, trainer, module, stage):
        for layer in module.discriminator.modules():
            if type(layer) is nn.Linear:
                spectral_norm(layer)


class Scale(nn.Module):
    """An augmentation with a state."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Buffer(torch.tensor(1.5))

    def forward(self, samples):
        return samples * self.factor


class Augmented(Callback):
    def setup(self, trainer, module, stage):
        module.augment = Scale()

    def on_train_batch_end(self, trainer, module, *_):
        module.augment.factor.mul_(0.97)


LAZY = lambda: [R1Penalty(0.5, every=4), R2Penalty(0.3, every=3)]  # noqa: E731
RANDOM = lambda: [GradientPenalty(0.3), DRAGANPenalty(0.2, every=2)]  # noqa: E731
STRUCTURE = lambda: [Average(), Spectral(), Augmented()]  # noqa: E731
ADAM, RMSPROP = torch.optim.Adam, torch.optim.RMSprop
AMSGRAD = lambda p, lr: ADAM(p, lr, amsgrad=True)  # noqa: E731
MOMENTUM = lambda p, lr: torch.optim.SGD(p, lr, 0.9)  # noqa: E731
NORMS = lambda: [SpectralNorm(["generator", "discriminator"], factor=1.5)]  # noqa: E731


def zero_sum(seed):
    return small(seed, loss=Minimax(), **players(torch.optim.SGD))


def packs(seed, **kwargs):
    torch.manual_seed(seed)
    return GANModule(MLP([4, 16, 2]), Packed(MLP([4, 16, 1]), 2), 4, **kwargs)


def band_of(rule):
    """So narrow that players rest often."""
    return {"accuracy": {"low": 0.5, "high": 0.5}, "gradient_norm": {"low": 0, "high": 0, "hysteresis": 0}}.get(
        rule, {}
    )


CASES = {
    "plain": {"make": small},
    "accumulate": {"make": lambda seed: small(seed, accumulate=3)},
    "accumulate more than there are samples": {"make": lambda seed: small(seed, accumulate=9)},
    "StepLR": {"make": lambda seed: small(seed, **players(ADAM, step_lr))},
    "LinearLR, RMSprop": {"make": lambda seed: small(seed, **players(RMSPROP, linear_lr))},
    "SequentialLR, AMSGrad": {"make": lambda seed: small(seed, **players(AMSGRAD, cosine))},
    "SGD with momentum": {"make": lambda seed: small(seed, **players(MOMENTUM))},
    "lazy penalties": {"make": small, "callbacks": LAZY},
    "penalties at random points": {"make": lambda seed: small(seed, loss=Wasserstein()), "callbacks": RANDOM},
    "Simultaneous": {"make": small, "callbacks": lambda: [Simultaneous()]},
    "clip_norm": {"make": lambda seed: small(seed, clip_norm=0.05)},
    "BEGAN": {"make": began, "data": images},
    "BEGAN, accumulate": {"make": lambda seed: began(seed, accumulate=3), "data": images},
    "BatchNorm": {"make": batch_norm},
    "BatchNorm, accumulate": {"make": lambda seed: batch_norm(seed, accumulate=2)},
    "RelativisticAverage": {"make": lambda seed: small(seed, loss=RelativisticAverage()), "callbacks": LAZY},
    "plan": {"make": lambda seed: ddg(seed, accumulate=3, **players(ADAM, step_lr)), "callbacks": LAZY},
    "SampleLogger": {"make": batch_norm, "callbacks": lambda: [SampleLogger(every=3)]},
    "HealthMonitor": {"make": batch_norm, "callbacks": lambda: [HealthMonitor(every=3)]},
    "HealthMonitor, shares": {
        "make": lambda seed: batch_norm(seed, accumulate=2),
        "callbacks": lambda: [Reconstruction(), FakePool(20, 0.7), AdversarialStart(3), HealthMonitor(every=3)],
    },
    "HealthMonitor, adaptive weight": {
        "make": drawing,
        "callbacks": lambda: [Reconstruction(), AdaptiveAdversarialWeight("network.layers.2"), HealthMonitor(every=3)],
    },
    "QualityMonitor": {"make": batch_norm, "callbacks": lambda: [QualityMonitor(n_samples=50, every=3)]},
    "MemorizationMonitor": {
        "make": batch_norm,
        "callbacks": lambda: [MemorizationMonitor(every=3, n_samples=50, held_out=points(8, seed=1))],
    },
    "CollapseDetector": {
        "make": small,
        "callbacks": lambda: [QualityMonitor(n_samples=50, every=2), CollapseDetector(patience=2)],
    },
    "CollapseDetector, rollback": {
        "make": small,
        "data": wide,
        "rolls_back": True,
        "callbacks": lambda: [
            R1Penalty(0.1),
            GeneratorEMA(decay=0.9),
            QualityMonitor(n_samples=50, every=1),
            CollapseDetector("rollback", patience=1, remedy=ScalePenalty()),
        ],
    },
    "Autopilot": {"make": small, "callbacks": lambda: [Autopilot(every=2, n_samples=50)]},
    "Autopilot, always": {
        "make": small,
        "rolls_back": True,
        "callbacks": lambda: [Autopilot("always", every=2, n_samples=50)],
    },
    "bf16-mixed": {"make": small, "callbacks": LAZY, "precision": "bf16-mixed"},
    "networks that draw": {"make": drawing},
    "networks that draw, accumulate": {"make": lambda seed: drawing(seed, accumulate=3), "callbacks": LAZY},
    "networks that draw, Unrolling": {"make": drawing, "callbacks": lambda: [Unrolling(2), *RANDOM()]},
    "networks that draw, Extragradient": {"make": drawing, "callbacks": lambda: [Extragradient()]},
    "networks that draw, rollback": {
        "make": drawing,
        "data": wide,
        "rolls_back": True,
        "callbacks": lambda: [
            R1Penalty(0.1),
            QualityMonitor(n_samples=50, every=1),
            CollapseDetector("rollback", patience=1, remedy=ScalePenalty()),
        ],
    },
    "networks that draw, monitors": {
        "make": drawing,
        "callbacks": lambda: [
            SampleLogger(every=2),
            QualityMonitor(n_samples=50, every=3),
            HealthMonitor(every=2),
            PairedMonitor({"error": MeanSquaredError()}),
        ],
    },
    "structure": {"make": small, "callbacks": STRUCTURE},
    "Unrolling": {"make": small, "callbacks": lambda: [Unrolling(3), *LAZY()]},
    "Unrolling, checkpoint, simultaneous": {
        "make": lambda seed: small(seed, **players(RMSPROP, step_lr)),
        "callbacks": lambda: [Unrolling(3, checkpoint=True, simultaneous=True), *RANDOM()],
    },
    "Extragradient": {
        "make": lambda seed: small(seed, accumulate=2, **players(ADAM, step_lr)),
        "callbacks": lambda: [Extragradient(), *RANDOM()],
    },
    "ConsensusOptimization": {"make": small, "callbacks": lambda: [ConsensusOptimization(0.5), *LAZY()]},
    "CompetitiveGradientDescent": {"make": zero_sum, "callbacks": lambda: [CompetitiveGradientDescent(), *LAZY()]},
    "ACGD": {"make": zero_sum, "callbacks": lambda: [CompetitiveGradientDescent(adaptive=True)]},
    "OptimisticAdam": {"make": lambda seed: small(seed, **players(OptimisticAdam, cosine))},
    "OptimisticSGD": {"make": lambda seed: small(seed, **players(OptimisticSGD))},
    "NegativeMomentum": {"make": lambda seed: small(seed, **players(NegativeMomentum, step_lr))},
    "Lookahead": {"make": small, "callbacks": lambda: [Lookahead(k=3), Lookahead(k=5, alpha=0.8)]},
    "GeneratorEMA": {"make": batch_norm, "callbacks": lambda: [GeneratorEMA(half_life=3, ramp_up=0.4)]},
    "GeneratorEMA, bf16-true": {
        "make": lambda seed: small(seed, g_optimizer=sgd(0.5), d_optimizer=sgd(0.5)),
        "callbacks": lambda: [GeneratorEMA(decay=0.9)],
        "data": lambda: stream(dtype=torch.bfloat16),
        "precision": "bf16-true",
    },
    "SpectralNorm": {"make": small, "callbacks": lambda: [*NORMS(), GeneratorEMA(), WeightClipping(0.5)]},
    "UpdateRatio": {"make": small, "callbacks": lambda: [UpdateRatio(3, 2), GeneratorEMA(0), Lookahead(k=2)]},
    "UpdateRatio, warm-up": {"make": small, "callbacks": lambda: [UpdateRatio(3, warm_up=True)]},
    **{
        f"AdaptiveUpdateRatio, {rule}": {
            "make": lambda seed: small(seed, **players(ADAM)),
            "callbacks": lambda rule=rule: [AdaptiveUpdateRatio(rule, max_rest=3, **band_of(rule)), *LAZY()],
        }
        for rule in ("accuracy", "loss_change", "logit_gap", "gradient_norm")
    },
    "finite differences": {
        "make": lambda seed: small(seed, accumulate=2),
        "callbacks": lambda: [ApproximateR1Penalty(every=2), ApproximateR2Penalty()],
    },
    "running means": {
        "make": lambda seed: small(seed, accumulate=2),
        "callbacks": lambda: [LeCam(start=2, decay=0.8), PathLengthPenalty(every=2)],
    },
    "other penalties": {
        "make": small,
        "callbacks": lambda: [
            ConsistencyPenalty("latent"),
            ConsistencyPenalty("latent", player="g"),
            OrthogonalPenalty(),
            LogitDrift(),
            ModeSeeking(),
            R1Penalty(Schedule(1.0, 0.1, 8)),
        ],
    },
    "augmentations": {
        "make": lambda seed: small(seed, accumulate=2, **players(ADAM)),
        "callbacks": lambda: [
            AdaptiveAugmentation(0.1, interval=3, speed=500.0, p=0.4, augment=AugmentPipe("noise")),
            InstanceNoise(0.3, steps=9),
            OptimizerSchedule({"lr": Schedule(1e-2, 0.0, 9), "betas.1": Schedule(0.9, 0.99, 9)}),
            R1Penalty(0.1, augmented=True),
        ],
    },
    "a schedule of augmentations": {
        "make": lambda seed: small(seed, augment=AugmentPipe("noise", 0.1)),
        "callbacks": lambda: [AugmentationSchedule(Schedule(0.1, 0.9, 9))],
    },
    "shared samples, a start, a pool": {
        "make": small,
        "callbacks": lambda: [
            Alternating(share_fake=True),
            AdversarialStart(3, ramp=6),
            Reconstruction(),
            FeatureMatching(layers=["layers.0"]),
            AdaptiveAdversarialWeight("layers.2"),
            FakePool(20, 0.7),
        ],
    },
    "a plateau and a balancer": {
        "make": lambda seed: small(seed, **players(ADAM, step_lr)),
        "callbacks": lambda: [
            AdversarialStart(when="plateau", monitor="g/reconstruction", window=2, patience=1, threshold=0.5, ramp=3),
            Reconstruction(),
            LossBalancer({"adversarial": 1.0, "reconstruction": 1.0}, decay=0.8),
        ],
    },
    "halves and separate steps": {
        "make": lambda seed: small(seed, accumulate=2),
        "callbacks": lambda: [
            Alternating(real_batches="split"),
            R1Penalty(0.5, every=4, separate=True),
            PathLengthPenalty(every=3, separate=True, shrink=2),
        ],
    },
    "Packed": {"make": lambda seed: packs(seed, accumulate=2), "callbacks": lambda: [*LAZY(), *RANDOM()]},
    "every stabilizer": {
        "make": lambda seed: packs(seed, clip_norm=0.5, **players(ADAM, cosine)),
        "callbacks": lambda: [
            Unrolling(2),
            AdaptiveUpdateRatio(max_rest=2),
            *NORMS(),
            GeneratorEMA(half_life=2, ramp_up=0.3),
            Lookahead(k=3),
            WeightClipping(1.0),
            LeCam(start=2),
            PathLengthPenalty(every=2),
            ConsistencyPenalty("latent"),
            *LAZY(),
            *RANDOM(),
        ],
    },
    "everything": {
        "make": lambda seed: small(seed, loss=Hinge(), accumulate=3, clip_norm=0.5, **players(ADAM, step_lr)),
        "callbacks": lambda: [*LAZY(), *RANDOM(), SampleLogger(every=2), Simultaneous(), *STRUCTURE()],
    },
}


@pytest.mark.filterwarnings("ignore:CollapseDetector cannot decide")  # of so few samples
@pytest.mark.parametrize("case", CASES)
def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(case):
    module, _ = check_resume(**CASES[case])
    if case.startswith("BEGAN"):
        assert 0 < module.loss.k < 1


@pytest.mark.parametrize("at", range(1, STEPS))
@pytest.mark.parametrize("case", ["UpdateRatio", "AdaptiveUpdateRatio, accuracy", "AdaptiveUpdateRatio, loss_change"])
def test_update_ratio_is_resumed_at_any_batch(case, at):
    """Who rests, and for how long already, is another thing after every batch."""
    check_resume(**CASES[case], at=at)


@pytest.mark.parametrize("at", [1, LENGTH - 1, LENGTH + 1, STEPS - 1])
def test_resumed_at_any_batch(at):
    make = lambda seed: small(seed, accumulate=3, **players(ADAM, step_lr))  # noqa: E731
    check_resume(make, callbacks=LAZY, at=at)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_at_the_end_of_an_epoch_with_a_plain_loader(accumulate):
    make = lambda seed: small(seed, accumulate=accumulate, **players(ADAM, step_lr))  # noqa: E731
    data = lambda: torch.utils.data.DataLoader(points(LENGTH, 7), batch_size=None)  # noqa: E731
    check_resume(make, data, LAZY, at=LENGTH)


@pytest.mark.parametrize("at", [4, LENGTH])
@pytest.mark.parametrize("validate", [0, 2])
def test_resumed_with_the_package_s_own_data(at, validate):
    data = lambda: Ring(batch_size=7, epoch_length=LENGTH, val_samples=20)  # noqa: E731
    options = {"limit_val_batches": validate, "val_check_interval": 3}
    check_resume(lambda seed: small(seed, accumulate=3), data, LAZY, at, **options)


@pytest.mark.parametrize("at_the_end", [True, False], ids=["on_train_epoch_end", "after validation"])
def test_resumed_from_a_checkpoint_of_an_epoch(at_the_end):
    data = lambda: Ring(batch_size=7, epoch_length=LENGTH, val_samples=20)  # noqa: E731
    save = lambda: ModelCheckpoint("saved", save_on_train_epoch_end=at_the_end)  # noqa: E731
    first = save()
    whole = uninterrupted(small, data, LAZY, limit_val_batches=2)
    crashed(small, data, LAZY, first, LENGTH + 2, limit_val_batches=2)
    again = resumed(small, data, LAZY, save(), first.best_model_path, limit_val_batches=2)
    check_equal(state(*whole), state(*again))


def test_resumed_twice():
    make = lambda seed: small(seed, **players(ADAM, step_lr))  # noqa: E731
    whole = uninterrupted(make, stream, LAZY)
    crashed(make, stream, LAZY, saving(3), 3)
    crashed(make, stream, LAZY, saving(3), 8, ckpt_path="saved/step=3.ckpt")
    check_equal(state(*whole), state(*resumed(make, stream, LAZY, saving(3), "saved/step=6.ckpt")))


def test_the_checkpoint_that_training_ends_with_continues():
    """Not a crash: ``max_steps`` is reached, and a new Trainer with a higher one goes on."""
    whole = uninterrupted(small, stream, LAZY)
    train(small(seed=0), stream(), [*LAZY(), saving(4)], max_steps=4)
    check_equal(state(*whole), state(*resumed(small, stream, LAZY, saving(4), "saved/step=4.ckpt")))


class Draws(Callback):
    """Draws from the module's noise in between the steps."""

    def __init__(self):
        self.drawn = {}

    def on_train_batch_start(self, trainer, module, *_):
        self.drawn[module.iteration, "start"] = module.noise.randn(2, 3)

    def on_train_batch_end(self, trainer, module, *_):
        self.drawn[module.iteration, "end"] = module.noise.randn(2, 3)


def test_callbacks_that_draw_noise_draw_the_same():
    whole, again = Draws(), Draws()
    uninterrupted(small, stream, lambda: [whole])
    crashed(small, stream, lambda: [Draws()], saving(4), 4)
    resumed(small, stream, lambda: [again], saving(4), "saved/step=4.ckpt")
    assert (4, "start") in again.drawn
    check_equal({key: whole.drawn[key] for key in again.drawn}, again.drawn)


@pytest.mark.parametrize("make", [small, batch_norm, drawing])
def test_sample_logger_changes_nothing(make, tmp_path):
    with_grid = uninterrupted(make, stream, lambda: [SampleLogger(every=2)])
    assert len(list(tmp_path.glob("samples/*.png"))) == STEPS // 2
    check_equal(*({**state(*run), "callbacks": None} for run in (with_grid, uninterrupted(make, stream, list))))


def test_other_seeds_are_other_runs():
    """The noise of networks depends on the seed and on the step, and on nothing else."""
    runs = [uninterrupted(lambda seed, s=s: drawing(seed, noise_seed=s), stream, list)[0] for s in (0, 0, 1)]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert (weights(runs[0]) - weights(runs[2])).abs().max() > 1e-4


def test_every_step_has_noise_of_its_own():
    drawn = []

    class Draws(nn.Module):
        def forward(self, x):
            drawn.append(torch.rand(3))
            return x

    module = small(augment=Draws())
    fit(module, points(4))
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn) == 4 * 3


def test_global_random_state_is_neither_read_nor_changed_by_training():
    module = small(seed=0)
    before = torch.get_rng_state()
    train(module, stream(), [*LAZY(), *RANDOM(), SampleLogger(every=2), ModelCheckpoint("never")])
    assert torch.equal(before, torch.get_rng_state())


# ---------- load_from_checkpoint


LOSSES = [
    Minimax(),
    NonSaturating(real_label=0.9),
    LeastSquares(a=-1.0, b=1.0, c=0.0),
    Wasserstein(),
    Hinge(),
    BoundaryEquilibrium(gamma=0.7, lambda_k=0.05),
    Relativistic(),
    RelativisticAverage(),
    FDivergence("pearson", saturating=False),
]


def networks(seed=1, critic=1):
    torch.manual_seed(seed)
    return {"generator": MLP([4, 16, 2]), "discriminator": MLP([2, 16, critic])}


def saved(module, callbacks=()):
    """Train for three batches and return the path of a checkpoint."""
    run = train(module, stream(), [*callbacks, ModelCheckpoint("never", every_n_train_steps=10**6)], max_steps=3)
    run.save_checkpoint("model.ckpt")
    return "model.ckpt"


def load(path, **kwargs):
    return GANModule.load_from_checkpoint(path, map_location="cpu", weights_only=True, **kwargs)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_loss_restores_itself(loss):
    critic = 2 if loss.judges_reconstructions else 1
    module = GANModule(**networks(0, critic), latent_dim=4, loss=deepcopy(loss), clip_norm=1.0, noise_seed=5)
    loaded = load(saved(module), **networks(critic=critic))
    assert type(loaded.loss) is type(loss)
    arguments = [{k: v for k, v in vars(x).items() if not k.startswith("_")} for x in (loss, loaded.loss)]
    assert arguments[0] == arguments[1]
    check_equal(dict(module.state_dict()), dict(loaded.state_dict()))
    if loss.judges_reconstructions:
        assert 0 < loaded.loss.k < 1
    logits = torch.linspace(0.1, 2, 5), torch.linspace(1, -1, 5)
    module.loss.eval(), loaded.loss.eval()
    assert torch.equal(module.loss.discriminator(*logits), loaded.loss.discriminator(*logits))
    assert torch.equal(module.loss.generator(*logits), loaded.loss.generator(*logits))
    latents = torch.ones(3, 4)
    assert torch.equal(module.sample(3, latents=latents), loaded.sample(3, latents=latents))


def test_plain_arguments_and_iteration_come_back():
    module = GANModule(**networks(0), latent_dim=4, clip_norm=0.7, accumulate=2, noise_seed=5)
    loaded = load(saved(module), **networks())
    restored = loaded.latent_dim, loaded.clip_norm, loaded.accumulate, loaded.noise_seed, loaded.iteration
    assert restored == (4, 0.7, 2, 5, 3)


@pytest.mark.parametrize(
    ("trained", "given"),
    [
        (Hinge(), LeastSquares(c=0.5)),
        (BoundaryEquilibrium(), BoundaryEquilibrium(gamma=0.3)),
        (BoundaryEquilibrium(), Hinge()),
        (Hinge(), BoundaryEquilibrium()),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_that_is_passed_wins(trained, given):
    critic = 2 if trained.judges_reconstructions else 1
    path = saved(GANModule(**networks(0, critic), latent_dim=4, loss=deepcopy(trained)))
    loaded = load(path, **networks(critic=critic), loss=given)
    assert loaded.loss is given
    assert getattr(loaded.loss, "gamma", None) == getattr(given, "gamma", None)


def test_structure_that_callbacks_added_is_restored_without_them():
    module = small()
    path = saved(module, STRUCTURE())
    loaded = load(path, **networks())
    check_equal(
        {k: v for k, v in module.state_dict().items() if not k.startswith("augment")}, dict(loaded.state_dict())
    )
    latents = points(1)[0].repeat(1, 2)
    module.eval(), loaded.eval()
    average, now = module.generator_ema(latents), module.generator(latents)
    assert not torch.equal(average, now)
    assert torch.equal(loaded.sample(8, latents=latents), average)
    assert torch.equal(loaded.train().sample(8, latents=latents), now)
    assert torch.equal(loaded.discriminator.eval()(now), module.discriminator(now))
    # the average does not train, the spectral norm is there: the largest singular value is near 1
    assert not any(p.requires_grad for p in loaded.generator_ema.parameters())
    assert "parametrizations" in "".join(loaded.state_dict())
    assert weights(loaded).isfinite().all()


def test_structure_can_be_trained_on_without_the_callbacks():
    loaded = load(saved(small(), STRUCTURE()), **networks(), d_optimizer=sgd(0.1))
    before = weights(loaded)
    with pytest.warns(UserWarning, match="has an average of its generator from an earlier run, which `sample` draws f"):
        train(loaded, stream(), [ModelCheckpoint("never")], max_steps=2)
    assert not torch.equal(before, weights(loaded))


def test_every_callback_is_resumed():
    """Whatever the package adds later has to be added here too."""
    used = {type(c).__name__ for case in CASES.values() for c in case.get("callbacks", list)()}
    assert public_callbacks() - {"Alternating", "TableMonitor"} <= used  # TableMonitor keeps nothing


# ---------- files


@pytest.fixture
def checkpoint(tmp_path):
    run = fit(small(), points(2))
    run.save_checkpoint(tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


@pytest.mark.parametrize(
    "content", [lambda good: good[:-200], lambda good: good[:100], lambda _: b"", lambda _: b"text"]
)
def test_a_torn_or_foreign_checkpoint_is_an_error_and_changes_nothing(checkpoint, content):
    torn = checkpoint.with_name("torn.ckpt")
    torn.write_bytes(content(checkpoint.read_bytes()))
    module = small()
    before = weights(module)
    with pytest.raises(
        RuntimeError, match=r"The checkpoint .*torn.ckpt cannot be read \(\w+.*: if it is torn, resume fr"
    ):
        fit(module, points(4), ckpt_path=torn)
    assert torch.equal(weights(module), before)
    with pytest.raises(FileNotFoundError):
        fit(module, points(4), ckpt_path=checkpoint.with_name("missing.ckpt"))


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(checkpoint, monkeypatch):
    good = checkpoint.read_bytes()
    run = fit(small(), points(3))
    write = LocalFileOpener.write

    def half(file, data):
        write(file, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(LocalFileOpener, "write", half)
    with pytest.raises(OSError, match="no space left"):
        run.save_checkpoint(checkpoint)
    assert checkpoint.read_bytes() == good
    monkeypatch.undo()
    run.save_checkpoint(checkpoint)
    assert checkpoint.read_bytes() != good
