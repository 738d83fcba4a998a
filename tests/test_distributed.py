"""Two or four processes on the parts of a batch equal one process on all of it.

By design ranks draw different noise, so here every sample brings its own latents: they are columns of the data.
One pair of processes trains all cases, four train some; the parent trains them on the whole batches and compares.
"""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio
from toys import Copier, Shift, fit, free_port, points, small, tensors, trainer, weights

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
    DiffAugment,
    DRAGANPenalty,
    Extragradient,
    FakePool,
    FeatureMatching,
    GANModule,
    GANOutputs,
    GeneratorEMA,
    GradientPenalty,
    HealthMonitor,
    Hinge,
    InstanceNoise,
    LeCam,
    LogitDrift,
    Lookahead,
    LossBalancer,
    MemorizationMonitor,
    Minimax,
    ModeSeeking,
    OptimisticAdam,
    OptimizerSchedule,
    OrthogonalPenalty,
    Packed,
    PairedMonitor,
    PathLengthPenalty,
    QualityMonitor,
    R1Penalty,
    R2Penalty,
    Reconstruction,
    Regularizer,
    Relativistic,
    RelativisticAverage,
    Ring,
    SampleLogger,
    Schedule,
    Simultaneous,
    SpectralNorm,
    StyleGenerator,
    Tokenizer,
    Unrolling,
    UpdateRatio,
    Wasserstein,
    WeightClipping,
)
from lightning_gan_stability.distributed import own_gradients
from lightning_gan_stability.monitors.giveaway import strongest_giveaway
from lightning_gan_stability.noise import Noise
from lightning_gan_stability.outputs import NETWORKS
from lightning_gan_stability.sharding import check_strategy

pytestmark = pytest.mark.timeout(150)

BATCHES, BATCH_SIZE = 5, 20  # 20 in all, 10 for each rank, which 3 micro-batches do not divide


# ---------- cases


class GivenNoise(Noise):
    """Noise that comes with the data: one α for each sample, and other latents than those of the step."""

    def randn(self, n, *shape, dtype=None):
        module = self.clock
        return module.latents.roll(1, dims=1) if shape == (4,) else module.given["noise"]

    def rand(self, n, *shape, dtype=None):
        return self.clock.given["uniform" if shape else "alpha"]


class Given(GANModule):
    """A GAN whose noise comes with the data, as a condition that no network looks at: latents for each player."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.noise = GivenNoise(0, self)

    def unpack(self, batch):
        return batch["image"], {name: value for name, value in batch.items() if name != "image"}

    def compute_samples(self, player, batch, regularizers=None):
        if isinstance(batch, GANOutputs):  # both players share them
            return super().compute_samples(player, batch, regularizers)
        batch = self.unpacked(batch)
        self.given, self.latents = batch.condition, batch.condition[f"{player}_latents"]
        return super().compute_samples(player, batch, regularizers)

    def draw_latents(self, n):
        return self.latents


def data(rank=None, dtype=torch.float32, shape=(2,), ranks=2):
    """Batches with their noise: all of it, or a rank's part."""
    generator = torch.Generator().manual_seed(0)
    mine = slice(None) if rank is None else slice(rank * BATCH_SIZE // ranks, (rank + 1) * BATCH_SIZE // ranks)
    shapes = {"image": shape, "d_latents": (4,), "g_latents": (4,), "noise": (2,)}
    batches = []
    for _ in range(BATCHES):
        batch = {k: torch.randn(BATCH_SIZE, *s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        batch["image"] += torch.linspace(-1, 1, BATCH_SIZE).reshape(-1, *[1] * len(shape))  # the parts differ
        batch["alpha"] = torch.rand(BATCH_SIZE, generator=generator, dtype=torch.float64)
        batch["uniform"] = torch.rand(BATCH_SIZE, 2, generator=generator, dtype=torch.float64)
        batches.append({k: v[mine].to(dtype) for k, v in batch.items()})
    return batches


def adam(parameters):
    return torch.optim.Adam(parameters, lr=2e-3, betas=(0.5, 0.99))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def gan(loss=None, patches=1, optimizer=adam, **kwargs):
    return Given(
        MLP([4, 16, 2]), MLP([2, 16, patches]), 4, loss, g_optimizer=optimizer, d_optimizer=optimizer, **kwargs
    )


def began(**kwargs):
    generator = MLP([4, 16, 64], output_shape=[1, 8, 8])
    discriminator = AutoEncoder(1, 8, width=4, code_dim=4)
    loss = BoundaryEquilibrium(gamma=0.9, lambda_k=0.1)
    return Given(generator, discriminator, 4, loss, g_optimizer=sgd, d_optimizer=sgd, **kwargs)


def images(**kwargs):
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 1))
    generator = MLP([4, 16, 64], output_shape=[1, 8, 8])
    return Given(generator, discriminator, 4, g_optimizer=adam, d_optimizer=adam, **kwargs).double()


def critic(**kwargs):
    return gan(Wasserstein(), **kwargs)


def double(loss=None, optimizer=adam, **kwargs):
    return gan(loss, optimizer=optimizer, **kwargs).double()


def packs():
    networks = MLP([4, 16, 2]), Packed(MLP([4, 16, 1]), 2)
    return Given(*networks, 4, g_optimizer=adam, d_optimizer=adam)


class Layers(Given):
    """Shards layers of its own too, each with a mesh."""

    def configure_model(self):
        if self.device_mesh is not None:
            for network in (self.generator, self.discriminator):
                fully_shard(network.layers[2], mesh=self.device_mesh["data_parallel"])
        super().configure_model()


def layers():
    return Layers(MLP([4, 16, 16, 2]), MLP([2, 16, 16, 1]), 4, g_optimizer=sgd, d_optimizer=sgd)


class Styles(Given):
    """Moves an average of w, which its loss has in it."""

    def generate(self, network, n, condition, latents):
        return network(latents, update_average=self.turn == "d")

    def auxiliary_losses(self, player, outputs):
        return {"average": (outputs.extras["w"] @ self.generator.w_average).mean()} if player == "g" else {}


def styles():
    synthesis = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6, 2))
    generator = StyleGenerator(MLP([4, 8, 6], nn.Tanh), synthesis, w_dim=6, num_layers=2, decay=0.5)
    return Styles(generator, MLP([2, 16, 1]), 4, g_optimizer=adam, d_optimizer=adam).double()


class Trees(Given):
    """Makes trees of their sources, which two discriminators judge."""

    def unpack(self, batch):
        image, condition = super().unpack(batch)
        return {"one": image, "two": image.roll(1, dims=1)}, condition | {"source": image}

    def generate(self, network, n, condition, latents):
        made = network(condition["source"] + condition["d_latents"][:, :2])
        return {"one": made[:, :2], "two": made[:, 2:]}, {}

    def discriminate(self, network, sample, condition):
        return {name: part(sample[name]) for name, part in network.items()}


def trees(plan=("d", "g"), optimizer=adam):
    generator = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 4))
    parts = {name: nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)) for name in ("one", "two")}
    module = Trees(generator, nn.ModuleDict(parts), None, g_optimizer=optimizer, d_optimizer=optimizer)
    module.plan = plan
    return module


def reconstructions():
    return [Reconstruction(sample=f"fake.{name}", target=f"real.{name}", name=name) for name in ("one", "two")]


def ddg():
    module = gan()
    module.plan = ("d", "d", "g")
    return module


def adaptive():
    return gan(optimizer=lambda p: torch.optim.Adam(p, lr=2e-2, betas=(0.5, 0.99)))


# so narrow that the ranks, which see different halves of the data, would decide differently by themselves
BANDS = {
    "accuracy": {"low": 0.6, "high": 0.6},
    "loss_change": {},
    "logit_gap": {},
    "gradient_norm": {"low": 0.0, "high": 0.0, "hysteresis": 0.0},
}
CASES = {
    "plain": (gan, []),
    "R1": (gan, [R1Penalty(0.5)]),
    "R1, SGD": (lambda: gan(optimizer=sgd), [R1Penalty(0.5)]),
    "lazy R1": (gan, [R1Penalty(0.5, every=2)]),
    "R1 and R2, Relativistic": (lambda: gan(Relativistic()), [R1Penalty(0.5), R2Penalty(0.5)]),
    "WGAN-GP": (critic, [GradientPenalty(0.5)]),
    "WGAN-GP, float64": (lambda: critic().double(), [GradientPenalty(0.5)]),
    "GradientPenalty, zero-centred": (gan, [GradientPenalty(0.5, target=0.0)]),
    "DRAGANPenalty, float64": (lambda: double(), [DRAGANPenalty(0.5)]),
    "accumulate": (lambda: gan(accumulate=2), []),
    "accumulate=3, R1": (lambda: gan(accumulate=3), [R1Penalty(0.5)]),
    "accumulate, lazy R1, WGAN-GP": (lambda: critic(accumulate=2), [R1Penalty(0.1, every=2), GradientPenalty(0.5)]),
    "Autopilot, float64": (double, [Autopilot(n_samples=50)]),
    "clip_norm": (lambda: gan(clip_norm=0.05, optimizer=sgd), []),
    "clip_norm, accumulate": (lambda: gan(clip_norm=0.05, optimizer=sgd, accumulate=3), [R1Penalty(0.5)]),
    "Simultaneous": (gan, [Simultaneous(), R1Penalty(0.5)]),
    # SGD: the loss does not see the last bias, and Adam would blow the rounding of its gradient up to whole steps
    "RelativisticAverage": (lambda: gan(RelativisticAverage(), optimizer=sgd), []),
    "RelativisticAverage, float64": (lambda: gan(RelativisticAverage(), optimizer=sgd).double(), [R1Penalty(0.5)]),
    "BEGAN": (began, []),
    "BEGAN, accumulate": (lambda: began(accumulate=3), []),
    "Hinge, patches": (lambda: gan(Hinge(), patches=9), [R1Penalty(0.1)]),
    "plan": (ddg, [R1Penalty(0.5, every=2)]),
    "bf16-mixed": (gan, [R1Penalty(0.5)]),
    "Unrolling": (gan, [Unrolling(3)]),
    "Unrolling, R1, R2, float64": (double, [Unrolling(3), R1Penalty(0.5), R2Penalty(0.3)]),
    "Unrolling, saddle, float64": (double, [Unrolling(3, objective="saddle")]),
    "Unrolling, checkpoint, float64": (double, [Unrolling(3, checkpoint=True), R1Penalty(0.5)]),
    "Unrolling, first order, float64": (double, [Unrolling(3, second_order=False)]),
    "Unrolling, clip_norm, simultaneous, float64": (
        lambda: double(optimizer=sgd, clip_norm=0.2),
        [Unrolling(3, simultaneous=True)],
    ),
    "Unrolling, RelativisticAverage, float64": (lambda: double(RelativisticAverage(), sgd), [Unrolling(2)]),
    "Extragradient": (gan, [Extragradient(), R1Penalty(0.5)]),
    "ConsensusOptimization, float64": (lambda: double(optimizer=sgd), [ConsensusOptimization(2.0), R2Penalty(0.5)]),
    "CompetitiveGradientDescent, float64": (
        lambda: double(Minimax(), sgd),
        [CompetitiveGradientDescent(tolerance=1e-14), R1Penalty(0.5)],
    ),
    "ACGD, float64": (lambda: double(Minimax(), sgd), [CompetitiveGradientDescent(adaptive=True, tolerance=1e-14)]),
    "OptimisticAdam, Lookahead": (lambda: gan(optimizer=lambda p: OptimisticAdam(p, lr=1e-3)), [Lookahead(k=2)]),
    "SpectralNorm, GeneratorEMA": (gan, [SpectralNorm(factor=2.0), GeneratorEMA(half_life=2)]),
    "WeightClipping, UpdateRatio": (critic, [WeightClipping(0.1), UpdateRatio(2)]),
    **{f"AdaptiveUpdateRatio, {rule}": (adaptive, [AdaptiveUpdateRatio(rule, **band)]) for rule, band in BANDS.items()},
    "layers": (layers, [R1Penalty(0.5), Unrolling(2), GeneratorEMA(half_life=2)]),
    "Packed": (packs, [R1Penalty(0.5), GradientPenalty(0.5)]),
    "finite differences": (gan, [ApproximateR1Penalty(10.0, 0.1), ApproximateR2Penalty(10.0, 0.1)]),
    "LeCam, LogitDrift": (gan, [LeCam(start=1, decay=0.7), LogitDrift(0.1)]),
    "ConsistencyPenalty": (
        gan,
        [ConsistencyPenalty("latent"), ConsistencyPenalty("latent", player="g"), OrthogonalPenalty()],
    ),
    "ConsistencyPenalty, real and balanced": (
        gan,
        [ConsistencyPenalty("real", transform=Shift()), ConsistencyPenalty("balanced", transform=Shift())],
    ),
    "PathLengthPenalty": (gan, [PathLengthPenalty(every=1, decay=0.5)]),
    "StyleGenerator, PathLengthPenalty with the batch, float64": (
        styles,
        [PathLengthPenalty(every=2, latents="w", include_batch=True)],
    ),
    "ModeSeeking, float64": (lambda: double(optimizer=sgd), [ModeSeeking()]),
    "shared samples, R1": (gan, [Alternating(share_fake=True), R1Penalty(0.5)]),
    "shared samples, PathLengthPenalty": (gan, [Alternating(share_fake=True), PathLengthPenalty(every=1)]),
    "separate steps": (
        gan,
        [R1Penalty(0.5, every=2, separate=True), PathLengthPenalty(every=2, separate=True), R2Penalty(0.1)],
    ),
    "trees": (trees, [R1Penalty(0.1), GradientPenalty(0.1), *reconstructions()]),
    "trees, FeatureMatching, AdversarialStart, float64": (
        lambda: trees(optimizer=sgd).double(),
        [
            FeatureMatching(layers=["*.0"]),
            AdversarialStart(1, ramp=2),
            Alternating(share_fake=True),
            *reconstructions(),
        ],
    ),
    "trees, AdaptiveAdversarialWeight, float64": (
        lambda: trees().double(),
        [AdaptiveAdversarialWeight("1"), *reconstructions()],
    ),
    "trees, LossBalancer, plateau, float64": (
        lambda: trees().double(),
        [
            LossBalancer({"adversarial": 1.0, "one": 2.0}, decay=0.7),
            AdversarialStart(when="plateau", monitor="g/one", window=1, patience=1, threshold=0.9),
            *reconstructions(),
        ],
    ),
    "trees, everything, float64": (
        lambda: trees(optimizer=sgd).double(),
        [
            Alternating(share_fake=True),
            AdversarialStart(1, ramp=2, discriminator_first=1),
            AdaptiveAdversarialWeight("1", terms=["one", "two"]),
            FeatureMatching(layers=["*.0"]),
            FakePool(30, 0.9),
            R1Penalty(0.1, every=2, separate=True),
            *reconstructions(),
        ],
    ),
    "trees, FakePool, float64": (lambda: trees().double(), [FakePool(30, 0.9), *reconstructions()]),
    "trees, FakePool of each leaf, float64": (
        lambda: trees(("g", "d")).double(),
        [FakePool(30, 0.9, independent=True), Alternating(share_fake=True)],
    ),
    "images, DiffAugment, float64": (lambda: images(augment=DiffAugment()), [R1Penalty(0.1), R2Penalty(0.1)]),
    "images, AugmentPipe, accumulate, float64": (
        lambda: images(augment=AugmentPipe({"bgc": 1, "noise": 1, "cutout": 1}, 0.6), accumulate=3),
        [R1Penalty(0.1, augmented=True), FeatureMatching(layers=["1"])],
    ),
    "AugmentationSchedule, float64": (
        double,
        [AugmentationSchedule(Schedule(0.2, 0.9, 4), AugmentPipe("noise"))],
    ),
    "AdaptiveAugmentation, InstanceNoise, float64": (
        double,
        [
            AdaptiveAugmentation(target=0.1, interval=1, speed=200.0, p=0.5, augment=AugmentPipe("noise")),
            InstanceNoise(Schedule(0.3, 0.0, 4)),
            OptimizerSchedule({"lr": Schedule(2e-3, 0.0, 5)}),
        ],
    ),
}

UNSHARDED = ("Autopilot", "Consensus", "Competitive", "ACGD", "bf16", "AdaptiveAdversarial", "everything")
SHARDED = [case for case in CASES if not any(name in case for name in UNSHARDED)]
# cases with penalties of gradients, whose second derivatives meet FSDP's hooks in another order on GPUs
THREADED = [
    "R1",
    "R1 and R2, Relativistic",
    "WGAN-GP",
    "accumulate=3, R1",
    "Simultaneous",
    "plan",
    "Unrolling, R1, R2, float64",
    "Extragradient",
    "Packed",
    "PathLengthPenalty",
    "shared samples, PathLengthPenalty",
    "separate steps",
    "trees",
    "layers",
]
FOUR = [
    "plain",
    "R1 and R2, Relativistic",
    "WGAN-GP, float64",
    "accumulate, lazy R1, WGAN-GP",
    "clip_norm",
    "RelativisticAverage, float64",
    "BEGAN",
    "Unrolling, R1, R2, float64",
    "Extragradient",
    "ConsensusOptimization, float64",
    "SpectralNorm, GeneratorEMA",
    "trees, FakePool, float64",
    "trees, LossBalancer, plateau, float64",
    "images, AugmentPipe, accumulate, float64",
    "AugmentationSchedule, float64",
    "AdaptiveAugmentation, InstanceNoise, float64",
    *[case for case in CASES if case.startswith("AdaptiveUpdateRatio")],
]


def train(case, rank=None, **kwargs):
    torch.manual_seed(0)
    make, callbacks = CASES[case]
    module = make()
    dtype = next(module.parameters()).dtype
    batches = data(rank, dtype, (1, 8, 8) if case.startswith(("BEGAN", "images")) else (2,), kwargs.get("devices", 1))
    before = weights(module.discriminator)
    precision = {"precision": "bf16-mixed"} if case.startswith("bf16") else {}
    run = fit(module, batches, callbacks=callbacks, **precision, **kwargs)
    return {
        "moved": difference(before, weights(module.discriminator)),
        "weights": weights(module),
        "k": getattr(module.loss, "k", None),
        "global_step": run.global_step,
        "iteration": module.iteration,
        "logged": {k: v.item() for k, v in run.callback_metrics.items()},
    }


# ---------- the two processes


class Watch(Callback):
    """Keeps the module's noise inside and outside of steps."""

    def __init__(self):
        self.between = []

    def on_train_batch_end(self, trainer, module, *_):
        self.between.append(module.noise.randn(3, 4))


class Latents(Regularizer):
    """Keeps what a player's samples were made from, and the points of WGAN-GP; adds nothing."""

    differentiates = ()

    def __init__(self, player):
        super().__init__(weight=0.0)
        self.player = player
        self.seen = []

    @property
    def state_key(self):
        return f"Latents{self.player}"

    def penalty(self, module, outputs):
        self.seen += [outputs.latents.detach().clone(), module.noise.rand(3)]
        return outputs.fake_logits.sum() * 0


def noise(rank, **kwargs):
    """The module's own noise: the ranks' batches are the same, the ranks are not."""
    watch, d, g = Watch(), Latents("d"), Latents("g")
    module = small()
    torch.manual_seed(1234)  # as seed_everything does: the same on every rank
    run = fit(module, points(BATCHES), callbacks=[watch, d, g], **kwargs)
    return {
        "noise": [*watch.between, *d.seen, *g.seen],
        "weights": weights(module),
        "global": torch.randn(3),
        "ddp": getattr(run.strategy, "_ddp_kwargs", None),
    }


class First(Callback):
    """Keeps the measurement of the untrained generator."""

    def on_train_start(self, trainer, module):
        monitor = next(c for c in trainer.callbacks if isinstance(c, QualityMonitor))
        self.seen = {"values": dict(monitor.values), "null": dict(monitor.null), "shares": list(monitor.shares)}


def quality(rank=None, **kwargs):
    """Measurements of the same data set, of which each process sees a share; 101 samples, which 2 does not divide."""
    first, detector = First(), CollapseDetector("rollback", patience=1, max_rollbacks=1)
    real = torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    module = small()
    options = {"max_steps": 6, "max_epochs": -1} | kwargs
    health = HealthMonitor(every=2)
    run = trainer(callbacks=[QualityMonitor(n_samples=101, every=1), detector, health, first], **options)
    run.fit(module, DataLoader(TensorDataset(real), batch_size=10))
    seen = {"events": detector.events, "windows": health.windows, "verdicts": health.verdicts}
    return seen | {"weights": weights(module), "first": first.seen, "iteration": module.iteration}


def steered(rank=None, **kwargs):
    """Races of a run whose data are shared out, of a wild generator first."""
    seen = {}
    for when, lr in (("always", 1e-3), ("trouble", 1e18)):
        module = small(g_optimizer=partial(torch.optim.Adam, lr=lr))
        real = torch.randn(160, 2, generator=torch.Generator().manual_seed(0))
        autopilot = Autopilot(when, n_samples=51, every=4, search=0.2)
        run = trainer(callbacks=[autopilot], max_steps=100, max_epochs=-1, limit_val_batches=0, **kwargs)
        run.fit(module, DataLoader(TensorDataset(real), batch_size=10))
        seen[when] = {
            "actions": autopilot.actions,
            "history": autopilot.history,
            "iteration": module.iteration,
            "weights": weights(module),
        }
    return seen


class Wire(Callback):
    """Keeps how many numbers each all-reduce of a run has sent."""

    def on_train_start(self, *_):
        self.profiler = torch.profiler.profile(record_shapes=True)
        self.profiler.start()

    def on_train_end(self, *_):
        self.profiler.stop()
        events = [event for event in self.profiler.events() if event.name == "gloo:all_reduce"]
        self.sent = [torch.Size(event.input_shapes[0]).numel() for event in events]


def traffic(rank, **kwargs):
    """A run's all-reduces; and DDP by itself, whose one bucket has a resting network in its middle."""
    results = {}
    for name, callbacks in {"plain": [], "R1": [R1Penalty(1.0)], "Unrolling": [Unrolling(2)]}.items():
        torch.manual_seed(0)
        module = GANModule(MLP([4, 64, 64, 2]), MLP([2, 64, 64, 1]), 4)
        wire = Wire()
        fit(module, [torch.randn(10, 2) for _ in range(3)], callbacks=[*callbacks, wire], **kwargs)
        results[name] = {
            "sent": wire.sent,
            "sizes": {n: weights(getattr(module, n)).numel() for n in NETWORKS.values()},
        }
    counted = []

    def hook(state, bucket):
        counted.append(len(bucket.parameters()))
        return allreduce_hook(None, bucket)

    for name, user in {"one bucket": None, "hook": hook}.items():
        sums = Sums()
        ddp = nn.parallel.DistributedDataParallel(sums, find_unused_parameters=True)
        ddp.register_comm_hook(None, own_gradients(user))
        results[name] = []
        for resting in ([1], [0, 2], [0, 1, 2], []):
            for i, p in enumerate(sums.parameters()):
                p.requires_grad, p.grad = i not in resting, None
            if len(resting) < 3:
                ddp(rank + 1.0).backward()
            results[name].append([None if p.grad is None else p.grad.unique().tolist() for p in sums.parameters()])
    return results | {"counted": counted}


class Sums(nn.Module):
    """Its parameters' gradients are what it is given."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(size) for size in ((3,), (2, 2), (5,)))

    def forward(self, x):
        return sum(x * p.sum() for p in self.parts if p.requires_grad)


class Labelled(nn.Module):
    """Knows where a label's samples are, by half."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, latents, labels):
        return 2.0 * labels[:, None] + latents + self.weight


class Unlabelled(nn.Linear):
    def forward(self, samples, labels=None):
        return super().forward(samples)


def told(rank=None, **kwargs):
    """Measurements of samples with labels, for which EarlyStopping waits in vain."""
    labels = torch.arange(120) % 3
    real = 4.0 * labels[:, None] + torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
    module = GANModule(Labelled(), Unlabelled(2, 1), 2, g_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    stop = EarlyStopping("quality/recall", patience=2, mode="max")
    options = {"max_steps": 9, "max_epochs": -1} | kwargs
    run = trainer(callbacks=[QualityMonitor(n_samples=101, every=2), stop], **options)
    run.fit(module, DataLoader(TensorDataset(real, labels), batch_size=10))
    values = {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("quality/")}
    return {"values": values, "stopped": stop.stopped_epoch, "steps": run.global_step, "waits": stop.wait_count}


def paired(rank=None, **kwargs):
    """A reconstruction, measured on validation data of which each process sees its half."""
    torch.manual_seed(0)
    module = Tokenizer(MLP([2, 8, 2]), MLP([2, 8, 1]), losses={}, g_optimizer=adam, d_optimizer=adam)
    real = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    mine = real if rank is None else real[rank::2]
    psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))  # not a mean of what processes or batches have
    run = trainer(callbacks=[PairedMonitor({"psnr": psnr, "mse": MeanSquaredError()})], **kwargs)
    run.fit(module, DataLoader(data(rank), batch_size=None), DataLoader(mine, batch_size=6))
    return {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("quality/")}


def memorized(rank=None, **kwargs):
    """A generator that copies half of its training data, of which each process sees a share."""
    real = torch.randn(250, 2, generator=torch.Generator().manual_seed(0))
    module = GANModule(Copier(real[:150]), MLP([2, 8, 1]), latent_dim=4)
    monitor = MemorizationMonitor(every=2, n_samples=101, pairs=5)
    run = trainer(callbacks=[monitor], max_steps=3, max_epochs=-1, limit_val_batches=0, **kwargs)
    parts = [DataLoader(TensorDataset(part), batch_size=10) for part in (real[:150], real[150:])]
    run.fit(module, *parts)
    names = [str(file) for file in Path("memorization").glob("*.png")]
    return {"events": monitor.events, "values": monitor.values, "drawn": monitor.drawn, "files": sorted(names)}


class Coded(nn.Module):
    """A reconstruction with codes that are the same for the same sample."""

    def __init__(self):
        super().__init__()
        self.layers = MLP([2, 8, 2])

    def forward(self, x):
        return self.layers(x), {"codebook": x.square().mean() * 0, "codes": (4 * x[:, 0].sigmoid()).long()}


def healthy(rank=None, shards=False, **kwargs):
    """Shares of the gradient and perplexities, of two processes with halves of each batch, or of one with the whole."""
    torch.manual_seed(0)
    module = Tokenizer(Coded(), MLP([2, 8, 1]), g_optimizer=adam, d_optimizer=adam)
    monitor = HealthMonitor(every=2)
    strategy = lambda: {"strategy": sharding()} if shards else {}  # noqa: E731
    fit(module, data(rank), callbacks=[Reconstruction(3.0), monitor], **kwargs | strategy())
    seen = {"windows": monitor.windows, "weights": weights(module)}
    return seen | {"giveaway": giveaway(**kwargs | strategy())}


class Look(Callback):
    """Looks for what gives samples away, as a HealthMonitor does whose discriminator is always right."""

    def on_train_end(self, trainer, module):
        self.found = strongest_giveaway(trainer, module)


def giveaway(**kwargs):
    """What is found in data of which each process reads its share, and in which a column is constant."""
    look, real = Look(), torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    real[:, 1] = 0.5
    run = trainer(callbacks=[look], max_steps=2, max_epochs=-1, **kwargs)
    run.fit(small(), DataLoader(TensorDataset(real), batch_size=10))
    return look.found


def pictures(rank, shards=False, **kwargs):
    """Weights with pictures and without, and what was drawn."""
    folder = Path("shards" if shards else "ddp", str(rank))
    options = {"default_root_dir": folder, "max_steps": BATCHES, "max_epochs": -1} | kwargs
    logger, modules = SampleLogger(every=2, n=5, draw=plain_picture), []
    for callbacks in [logger], []:
        modules.append(small())
        strategy = {"strategy": sharding()} if shards else {}
        fit(modules[-1], data(rank), callbacks=callbacks, **options | strategy)
    files = sorted(folder.rglob("samples/*.png"))
    return {
        "weights": [weights(module) for module in modules],
        "rows": logger.real_rows[0],
        "files": [(file.name, file.read_bytes()) for file in files],
    }


def plain_picture(fake, real, condition):
    """All digits of the real samples."""
    return Image.fromarray(real.contiguous().view(torch.uint8).numpy())


def sharding(full=True):
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=not full, process_group_backend="gloo")


def sharded(case):
    """A case on shards of both networks."""
    return lambda rank, **kwargs: train(case, rank, **kwargs | {"strategy": sharding()})


def threaded(case):
    """A case on shards, with derivatives made as on GPUs: by another thread, whose nodes count as older than any."""

    differentiate = torch.autograd.grad

    def grad(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(differentiate, *args, **kwargs).result()

    def run(rank, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "grad", grad)
            return sharded(case)(rank, **kwargs)

    return run


def resumed(rank, **kwargs):
    """Weights after six steps on shards: at one go, and interrupted after three, with either kind of checkpoint."""
    seen = {}
    for name, first, full in (("whole", None, True), ("full", 3, True), ("distributed", 3, False)):
        for steps, path in [(6, None)] if first is None else [(3, None), (6, f"{name}.ckpt")]:
            module, source = small(), Ring(batch_size=16, epoch_length=4)
            callbacks = [R1Penalty(0.5, every=2), Unrolling(2), GeneratorEMA(half_life=2)]
            options = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "callbacks": callbacks}
            run = trainer(**kwargs | options | {"strategy": sharding(full)})
            run.fit(module, source, ckpt_path=path)
            if steps == 3:
                run.save_checkpoint(f"{name}.ckpt")
            seen[name] = {"weights": weights(module), "iteration": module.iteration}
    return seen


def refused(rank, **kwargs):
    """What a rule that cannot work on shards says, and one that shards another way."""
    said, tensors = [], ModelParallelStrategy(1, 2, process_group_backend="gloo")
    weight = AdaptiveAdversarialWeight("layers.2")
    for rule, strategy in ((ConsensusOptimization(1.0), sharding()), (weight, sharding()), (Unrolling(), tensors)):
        try:
            fit(small(), points(2), callbacks=[rule], **kwargs | {"strategy": strategy})
        except MisconfigurationException as error:
            said.append(str(error))
    return {"said": said}


class Asks(nn.Module):
    """Passes on what it gets, after the processes have spoken to each other."""

    def forward(self, x):
        torch.distributed.all_reduce(x.detach().sum())
        return x


def broken(rank, **kwargs):
    """What is said of values that are not finite on one of two processes."""
    said, log = {}, ActivationLayer(torch.log)
    cases = {
        "layer": ([nn.Linear(2, 1)], 0, -1.0, {}),
        "samples": ([nn.Linear(2, 1), Asks()], 1, float("nan"), {}),
        "shards": ([nn.Linear(2, 1)], 0, -1.0, {"strategy": sharding()}),
        "samples of shards": ([nn.Linear(2, 1)], 1, float("nan"), {"strategy": sharding()}),
    }
    for name, (layers, where, value, options) in cases.items():
        batch = torch.ones(4, 2)
        if rank == where:
            batch[3] = value
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(4, 2), ActivationLayer(torch.exp))
        try:
            fit(GANModule(generator, nn.Sequential(log, *layers), 4), [batch], **kwargs | options)
        except FloatingPointError as error:
            said[name] = str(error)
    return {"said": said}


class ActivationLayer(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Signal(Callback):
    """Sends SIGUSR1 to one process in the middle of a step; its handler saves, as Lightning's does under SLURM."""

    def __init__(self, rank, at, validation=False):
        self.rank, self.at, self.validation, self.saved = rank, at, validation, []

    def on_fit_start(self, trainer, module):
        def save(*_):
            self.saved.append(module.iteration)
            trainer.save_checkpoint(f"signal_{self.at}.ckpt")

        self.before = signal.signal(signal.SIGUSR1, save)

    def send(self, trainer):
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.iteration == self.at and not self.validation:
            self.send(trainer)

    def on_validation_batch_start(self, trainer, module, *_):
        if self.validation and not self.saved:
            self.send(trainer)

    def on_fit_end(self, *_):
        signal.signal(signal.SIGUSR1, self.before)


def stopped(rank, **kwargs):
    """One of two processes gets a signal, in a step or in validation: both save, and a run goes on from there."""
    seen = {"saved": []}
    options = {"max_steps": 8, "max_epochs": -1, "num_sanity_val_steps": 0, "limit_val_batches": 2} | kwargs
    source = lambda: Ring(batch_size=16, epoch_length=4, val_samples=64)  # noqa: E731
    for who, at, validation in ((0, 2, False), (1, 5, False), (1, 4, True)):
        module, watch = small(), Signal(who, at, validation)
        trainer(callbacks=[R1Penalty(0.5), watch], **options).fit(module, source())
        again = small(seed=1)
        trainer(callbacks=[R1Penalty(0.5)], **options).fit(again, source(), ckpt_path=f"signal_{at}.ckpt")
        seen["saved"].append(watch.saved)
        seen[f"weights {at}"] = weights(module), weights(again)
    return seen


def unequal(rank, **kwargs):
    """What is said of processes with three and four batches."""
    try:
        fit(small(), points(3 + rank), **kwargs)
    except MisconfigurationException as error:
        return {"said": str(error)}
    return {"said": ""}


class Unregistered(GANModule):
    """Its encoder, which the generator's optimizer trains, stands in a list, where no module looks for it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hidden = [nn.Linear(2, 2)]

    def generate(self, network, n, condition, latents):
        return self.hidden[0](network(latents))

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        optimizers[1].add_param_group({"params": list(self.hidden[0].parameters())})
        return optimizers, schedulers


class Unfreeze(Callback):
    """Unfreezes the generator before the third batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            module.generator.requires_grad_(True)


def unexchanged(rank, **kwargs):
    """What is said of parameters whose gradients DDP does not exchange, and the iteration at that time."""
    said = {}
    for name in ("unregistered", "unfrozen", "ignored"):
        kind = Unregistered if name == "unregistered" else GANModule
        module = kind(MLP([4, 8, 2]), MLP([2, 8, 1]), 4)
        if name == "unfrozen":
            module.generator.layers[0].requires_grad_(False)
        if name == "ignored":
            module._ddp_params_and_buffers_to_ignore = ["generator.layers.0.weight"]
        try:
            fit(module, points(4), callbacks=[Unfreeze()] if name == "unfrozen" else [], **kwargs)
        except MisconfigurationException as error:
            said[name] = (str(error), module.iteration)
    return {"said": said}


def lone(path=None, steps=4, **kwargs):
    """Some steps, from a checkpoint or to one."""
    module, source = small(), Ring(batch_size=16, epoch_length=6)
    callbacks = [R1Penalty(0.5, every=2), GeneratorEMA(half_life=2), HealthMonitor(every=3)]
    options = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "callbacks": callbacks} | kwargs
    run = trainer(**options)
    run.fit(module, source, ckpt_path=path)
    return run, module


def more(rank, **kwargs):
    """Two processes go on from a checkpoint of one."""
    before = torch.load("one.ckpt", weights_only=True)["state_dict"]
    run, module = lone("one.ckpt", steps=9, **kwargs)
    moved = difference(before["generator.layers.0.weight"], module.generator.layers[0].weight)
    run.save_checkpoint("two.ckpt")
    return {"weights": weights(module), "iteration": module.iteration, "step": run.global_step, "moved": moved}


def worker(rank, port, folder, names):
    """Train every case as one of two or four ranks, as torchrun would start it, and leave the results in files."""
    torch.set_num_threads(1)
    size = 2 if names is None else 4
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}
    os.chdir(folder)
    options = {"strategy": "ddp", "devices": size, "use_distributed_sampler": False}
    results = {}
    others = {"noise": noise, "quality": quality, "paired": paired, "memorized": memorized}
    others |= {"resumed": resumed, "refused": refused, "told": told, "broken": broken, "traffic": traffic}
    others["unexchanged"] = unexchanged
    others |= {"unequal": unequal, "steered": steered, "more": more, "stopped": stopped, "pictures": pictures}
    others |= {f"sharded {case}": sharded(case) for case in SHARDED}
    others |= {f"threaded {case}": threaded(case) for case in THREADED}
    others["sharded paired"] = lambda rank, **kwargs: paired(rank, **kwargs | {"strategy": sharding()})
    others["sharded memorized"] = lambda rank, **kwargs: memorized(rank, **kwargs | {"strategy": sharding()})
    others |= {"healthy": healthy, "sharded healthy": lambda rank, **kwargs: healthy(rank, shards=True, **kwargs)}
    others["sharded pictures"] = lambda rank, **kwargs: pictures(rank, shards=True, **kwargs)
    others["sharded quality"] = lambda rank, **kwargs: quality(rank, **kwargs | {"strategy": sharding()})
    for name in [*CASES, *others] if names is None else names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                results[name] = others[name](rank, **options) if name in others else train(name, rank, **options)
            except Exception:
                results[name] = {"error": traceback.format_exc()}
            results[name]["warnings"] = [str(w.message) for w in caught]
        with open(f"{rank}.tmp", "wb") as file:
            pickle.dump(results, file)
        os.replace(f"{rank}.tmp", f"{rank}.pickle")
    torch.distributed.destroy_process_group()


def run_processes(folder, size, names=None, limit=60, total=600):
    """One spawn for many cases; ``limit``: seconds for one case, ``total``: for all, however loaded the machine is."""
    port = free_port()
    # as with "spawn" nothing of this process is inherited, but the imports are made once for both
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch"])
    processes = [context.Process(target=worker, args=(rank, port, folder, names), daemon=True) for rank in range(size)]
    files = [Path(folder, f"{rank}.pickle") for rank in range(size)]  # written anew after each case
    start = moved = time.monotonic()
    seen = []
    try:
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes):
            now, written = time.monotonic(), [file.stat().st_mtime_ns for file in files if file.exists()]
            if written != seen:
                moved, seen = now, written
            if now > min(moved + limit, start + total) or any(p.exitcode for p in processes):
                break  # if one dies, the other would wait for it for ever
            time.sleep(0.05)
    finally:
        ends = [process.exitcode for process in processes]
        Path(folder, "ends").write_text(f"exit codes {ends} after {time.monotonic() - start:.0f} s")
        for process in processes:
            process.kill()
            process.join()


def folder_of(factory, size):
    """Where a group of processes leaves its files, for all test workers."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{size}_processes"


def shared(factory, size, names=None):
    """The results of all ranks by case; test workers share one group of processes."""
    folder = folder_of(factory, size)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            lone()[0].save_checkpoint(folder / "one.ckpt")
            run_processes(folder, size, names)
    files = [folder / f"{rank}.pickle" for rank in range(size)]
    ended = {"ended": (folder / "ends").read_text()}
    return [ended | (pickle.loads(file.read_bytes()) if file.exists() else {}) for file in files]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return shared(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return shared(tmp_path_factory, 4, FOUR)


def results(ranks, case):
    for rank, cases in enumerate(ranks):
        assert case in cases, f"rank {rank} did not get to this case: {cases['ended']}; None is of one that still ran"
        assert "error" not in cases[case], cases[case]["error"]
    return [cases[case] for cases in ranks]


# ---------- tests


def difference(a, b):
    return (a - b).abs().max().item()


def check(case, results):
    first, *others = results
    one = train(case)
    limit = 1e-12 if "float64" in case else 1e-3 if "bf16" in case else 1e-6
    assert difference(first["weights"], one["weights"]) <= limit
    assert one["moved"] > 1e-3
    assert first["global_step"] == first["iteration"] == one["global_step"] == one["iteration"] == BATCHES
    for other in others:
        assert torch.equal(first["weights"], other["weights"])
        assert (first["global_step"], first["iteration"]) == (other["global_step"], other["iteration"])
    if one["k"] is not None:
        assert all(torch.equal(first["k"], other["k"]) for other in others)
        assert 0 < one["k"] < 1
        assert difference(first["k"], one["k"]) <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_whole_batch(ranks, case):
    check(case, results(ranks, case))


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_networks_equal_whole_ones(ranks, case):
    first, *others = results(ranks, f"sharded {case}")
    check(case, [first, *others])


@pytest.mark.parametrize("case", THREADED)
def test_sharded_networks_get_gradients_that_come_late(ranks, case):
    first, *others = results(ranks, f"threaded {case}")
    check(case, [first, *others])


def test_sharded_runs_resume_bit_for_bit(ranks):
    for rank in results(ranks, "resumed"):
        assert rank["whole"]["iteration"] == 6
        for name in ("full", "distributed"):
            assert torch.equal(rank[name]["weights"], rank["whole"]["weights"])
            assert rank[name]["iteration"] == 6


def test_what_cannot_be_sharded_is_refused(ranks):
    rule, weight, mesh = results(ranks, "refused")[0]["said"]
    assert "AdaptiveAdversarialWeight needs gradients of a layer's unsharded parameters, but ModelParallel" in weight
    assert "ConsensusOptimization differentiates by both players' whole parameters, which ModelParallel" in rule
    assert "ModelParallelStrategy has tensor_parallel_size=2: set tensor_parallel_size=1" in mesh


def test_parameters_that_ddp_does_not_exchange_are_refused_on_all_ranks(ranks):
    for rank in results(ranks, "unexchanged"):
        said = rank["said"]
        assert "parameter of shape (2, 2) that the module does not list" in said["unregistered"][0]
        assert said["unregistered"][1] == 0
        for name, iteration in (("unfrozen", 2), ("ignored", 0)):
            assert "An optimizer steps `generator.layers.0.weight`, and DDP exchanges no" in said[name][0]
            assert said[name][1] == iteration


def test_different_numbers_of_batches_are_refused_on_all_ranks(ranks):
    for rank, seen in enumerate(results(ranks, "unequal")):
        assert f"have between 3 and 4 batches in an epoch, this one {3 + rank}: give all the same" in seen["said"]


def test_values_that_are_not_finite_on_one_process_are_named_there_and_stop_both(ranks):
    one, other = (seen["said"] for seen in results(ranks, "broken"))
    start = "Not finite in the discriminator's update at step 0: "
    assert all(said.startswith(start) for said in (*one.values(), *other.values()))
    assert "of `discriminator.0` (ActivationLayer), whose inputs are finite, in real sample 3 of 4." in one["layer"]
    assert "On this process's part of the batch all is finite: see the error of another process." in other["layer"]
    others = "The data and the weights are finite on this process: see the error of another one, too. Lower the"
    for kind in ("samples", "samples of shards"):
        assert "`real`, in sample 3 of 4." in other[kind]
        # the network waits for the other process, which does not take its turn again
        assert one[kind].startswith(f"{start}`d/grad_norm`. {others}")
    assert one["shards"].startswith(f"{start}`d/adversarial`, `d/grad_norm`. {others}")


def test_a_signal_that_one_process_gets_stops_both_at_the_same_batch(ranks):
    first, second = results(ranks, "stopped")
    assert first["saved"] == second["saved"] == [[3], [6], [4]]
    for at in (2, 5, 4):
        for whole, again in (first[f"weights {at}"], second[f"weights {at}"]):
            assert torch.equal(whole, again)


def test_a_run_goes_on_with_more_processes_or_with_fewer(ranks, tmp_path_factory):
    first, second = results(ranks, "more")
    assert torch.equal(first["weights"], second["weights"])
    assert (first["iteration"], first["step"]) == (second["iteration"], second["step"]) == (9, 9)
    assert first["moved"] > 1e-4
    (path,) = folder_of(tmp_path_factory, 2).rglob("two.ckpt")
    kept = torch.load(path, weights_only=True)["state_dict"]
    run, module = lone(path, steps=9)  # which is done already
    assert all(torch.equal(value, kept[name]) for name, value in tensors(module.state_dict()).items())
    run, module = lone(path, steps=11)
    assert (module.iteration, run.global_step) == (11, 11)


@pytest.mark.parametrize("case", FOUR)
def test_four_processes_equal_one_on_the_whole_batch(four, case):
    check(case, results(four, case))


@pytest.mark.parametrize("case", ["plain", "R1", "accumulate=3, R1", "RelativisticAverage", "BEGAN", "Hinge, patches"])
def test_logged_values_are_means_over_ranks(ranks, case):
    first, second = results(ranks, case)
    one = train(case)["logged"]
    assert first["logged"] == second["logged"]
    assert {"d/adversarial", "g/adversarial", "d/accuracy", "d/real_logit", "d/grad_norm"} <= one.keys()
    assert first["logged"] == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", ["pictures", "sharded pictures"])
def test_the_first_process_draws_and_training_does_not_notice(ranks, case):
    first, second = results(ranks, case)
    assert torch.equal(*first["weights"])
    assert torch.equal(*second["weights"])
    assert [name for name, _ in first["files"]] == ["000002.png", "000004.png"]
    assert len({content for _, content in first["files"]}) == 1
    assert second["files"] == []
    assert torch.equal(first["rows"], data(0)[0]["image"][:5])


@pytest.mark.parametrize("case", ["quality", "sharded quality"])
def test_two_processes_measure_what_one_measures(ranks, case):
    first, second = results(ranks, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = quality()
    assert (
        first["first"]["values"]
        == second["first"]["values"]
        == pytest.approx(one["first"]["values"], rel=1e-6, abs=1e-9)
    )
    assert first["first"]["null"] == pytest.approx(one["first"]["null"], rel=1e-6)
    assert first["first"]["shares"] == one["first"]["shares"]


@pytest.mark.parametrize("case", ["memorized", "sharded memorized"])
def test_two_processes_find_the_pairs_that_one_finds(ranks, case):
    first, second = results(ranks, case)
    with pytest.warns(UserWarning, match="memorization at step 2"):
        one = memorized()
    for found in (first, second):
        assert [event["step"] for event in found["events"]] == [2]
        assert found["values"] == one["values"]
        for pair, expected in zip(found["drawn"], one["drawn"], strict=True):
            assert all(torch.allclose(*both, rtol=1e-6, atol=1e-6) for both in zip(pair, expected, strict=True))
    assert sorted(one["files"]) == ["memorization/000002.png", "memorization/000003.png"]


@pytest.mark.parametrize("case", ["paired", "sharded paired"])
def test_two_processes_measure_pairs_as_one_does(ranks, case):
    first, second = results(ranks, case)
    assert not [text for text in first.pop("warnings") if "sync_dist" in text]
    one = paired()
    assert one.keys() == {"quality/psnr", "quality/mse"}
    assert {k: first[k] for k in one} == {k: second[k] for k in one} == pytest.approx(one, rel=1e-6)


def test_two_processes_measure_conditions_and_stop_as_one_does(ranks):
    first, second = results(ranks, "told")
    one = told()
    assert {"quality/dependence", "quality/class_consistency", "quality/fluctuation"} < one["values"].keys()
    assert first["values"] == second["values"] == pytest.approx(one["values"], rel=1e-5, abs=1e-7)
    assert one["steps"] == 6  # the first measurement in training, and two that are no better
    assert [first[name] for name in ("steps", "waits")] == [second[name] for name in ("steps", "waits")] == [6, 2]


@pytest.mark.parametrize("case", ["healthy", "sharded healthy"])
def test_two_processes_have_the_shares_and_codes_of_one(ranks, case):
    first, second = results(ranks, case)
    one = healthy()
    assert difference(first["weights"], one["weights"]) <= 1e-6
    for window, same, other in zip(first["windows"], second["windows"], one["windows"], strict=True):
        keys = {key for key in window if "/" in key}
        assert keys == {
            "share/adversarial", "share/codebook", "share/reconstruction", "perplexity/codes", "codes/codes"
        }  # fmt: skip
        assert [window[key] for key in keys] == [same[key] for key in keys]
        assert {key: window[key] for key in keys} == {key: pytest.approx(other[key], rel=1e-5) for key in keys}
    assert first["giveaway"] == second["giveaway"]
    assert first["giveaway"].kind == "constant"


@pytest.mark.parametrize("case", ["quality", "sharded quality"])
def test_two_processes_decide_and_go_back_together(ranks, case):
    """Their batches and their noise differ, what they decide does not."""
    first, second = results(ranks, case)
    assert first["events"] == second["events"]
    assert [event["action"] for event in first["events"]][:1] == ["rollback"]
    assert first["iteration"] == second["iteration"] < 6
    assert torch.equal(first["weights"], second["weights"])
    assert len(first["windows"]) > 1
    assert str(first["windows"]) == str(second["windows"])  # as text, for NaN
    assert str(first["verdicts"]) == str(second["verdicts"])


def test_two_processes_race_together(ranks):
    first, second = results(ranks, "steered")
    for when in ("always", "trouble"):
        one, other = first[when], second[when]
        assert one["actions"][0]["what"] == "a race of 6 settings"
        assert one["actions"] == other["actions"]
        assert one["history"] == other["history"]
        assert one["iteration"] == other["iteration"] < 100
        assert torch.equal(one["weights"], other["weights"])


def test_ranks_draw_different_noise(ranks):
    first, second = results(ranks, "noise")
    torch.manual_seed(1234)
    assert torch.equal(first["global"], second["global"])  # so it is not the global state that differs
    drawn = [x.flatten()[:3] for x in first["noise"] + second["noise"]]
    assert len(drawn) == 2 * (BATCHES + 2 * 2 * BATCHES)
    for i, x in enumerate(drawn):
        assert not any(torch.equal(x, y) for y in drawn[:i])
    assert torch.equal(first["weights"], second["weights"])


def test_one_process_has_the_noise_of_rank_0(ranks):
    first = results(ranks, "noise")[0]["noise"]
    assert all(torch.equal(x, y) for x, y in zip(first, noise(0)["noise"], strict=True))


def test_plain_ddp_needs_no_flag(ranks):
    assert results(ranks, "noise")[0]["ddp"]["find_unused_parameters"] is True


def test_training_on_two_processes_warns_of_nothing(ranks):
    known = ("isinstance(treespec", "does not have many workers", "validation_step", "logging interval")
    for case in [*CASES, "noise"]:
        seen = [w for w in results(ranks, case)[0]["warnings"] if not any(words in w for words in known)]
        assert seen == [], case


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", True),
        ("ddp_find_unused_parameters_true", True),
        ("ddp_find_unused_parameters_false", False),
        (lambda: DDPStrategy(find_unused_parameters=False), False),
        (lambda: DDPStrategy(static_graph=False), True),
    ],
    ids=lambda x: None if isinstance(x, bool) else x if isinstance(x, str) else "DDPStrategy",
)
def test_what_the_user_says_about_unused_parameters_stands(strategy, expected):
    run = trainer(strategy=strategy if isinstance(strategy, str) else strategy(), devices=2)
    check_strategy(run)
    assert run.strategy._ddp_kwargs["find_unused_parameters"] is expected


def test_ddp_spawn():
    """The module, with its penalties and losses, can be pickled; the parent gets the weights of the ranks."""
    loader = torch.utils.data.DataLoader(torch.cat(points(6)), batch_size=8)
    for attempt in range(2):
        module = small(loss=Hinge(), accumulate=2)
        before = weights(module).clone()
        run = trainer(strategy="ddp_spawn", devices=2, callbacks=[R1Penalty(0.1), Simultaneous()], max_epochs=2)
        try:
            run.fit(module, loader)
            break
        except torch.multiprocessing.ProcessExitedException as error:
            # a thread of gloo aborts its process now and then as it ends, after the fit: "terminate called without an
            # active exception", of which two in a row would be another matter
            if error.signal_name != "SIGABRT" or attempt:
                raise
        finally:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
    assert run.callback_metrics["d/r1"] > 0
    assert not torch.equal(weights(module), before)
    assert weights(module).isfinite().all()


def test_ddp_notebook():
    """It forks, which a process with threads of its own must not: so from a fresh one."""
    code = (
        "from toys import *; from lightning_gan_stability import *; "
        "module = small(); before = weights(module).clone(); "
        "run = trainer(strategy='ddp_notebook', devices=2, callbacks=[R1Penalty(0.1)], max_epochs=2); "
        "run.fit(module, DataLoader(torch.cat(points(6)), batch_size=8)); "
        "assert run.callback_metrics['d/r1'] > 0; assert not torch.equal(weights(module), before)"
    )
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ["plain", "R1", "Unrolling"])
def test_each_player_sends_its_own_gradients_alone(ranks, case):
    """DDP would send zeros for the other's; the rest is who had a gradient at all, a number for each tensor."""
    for found in results(ranks, "traffic"):
        sent, sizes = found[case]["sent"], found[case]["sizes"]
        turns = {"discriminator": 15 if case == "Unrolling" else 3, "generator": 3}  # 2 inner steps, there and back
        assert {name: sent.count(size) for name, size in sizes.items()} == turns
        assert sum(sent) <= 1.01 * sum(turns[name] * size for name, size in sizes.items())


@pytest.mark.parametrize("case", ["one bucket", "hook"])
def test_part_of_a_bucket_is_averaged(ranks, case):
    mean, none = [1.5], None
    for found in results(ranks, "traffic"):
        assert found[case] == [[mean, none, mean], [none, mean, none], [none] * 3, [mean] * 3]


def test_a_hook_of_the_users_sees_buckets_of_which_something_is_sent(ranks):
    for found in results(ranks, "traffic"):
        assert found["counted"] == [3, 3, 3]
