"""Every regularizer × update rule × loss, under spectral norm, average and ratio in turn, trains or is refused by name.

Three batches each: enough for moments, schedules and lazy penalties to come into play.
"""

from itertools import count, product

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torchmetrics import MeanSquaredError
from toys import Shift, fit, points, sgd, trainer, weights

import lightning_gan_stability
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
    NonSaturating,
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
    SampleLogger,
    Schedule,
    Simultaneous,
    SpectralNorm,
    Unrolling,
    UpdateRatio,
    UpdateRule,
    Wasserstein,
    WeightClipping,
)

pytestmark = pytest.mark.timeout(120)


LOSSES = {
    "Minimax": Minimax,
    "NonSaturating": NonSaturating,
    "LeastSquares": LeastSquares,
    "Wasserstein": Wasserstein,
    "Hinge": Hinge,
    "BoundaryEquilibrium": BoundaryEquilibrium,
    "Relativistic": Relativistic,
    "RelativisticAverage": RelativisticAverage,
    "FDivergence": lambda: FDivergence("squared_hellinger"),
}
RULES = {
    "none": list,
    "Alternating": lambda: [Alternating()],
    "Alternating, shared": lambda: [Alternating(share_fake=True)],
    "Simultaneous": lambda: [Simultaneous()],
    "Extragradient": lambda: [Extragradient()],
    "Unrolling": lambda: [Unrolling(2)],
    "Unrolling, first order": lambda: [Unrolling(2, second_order=False)],
    "Unrolling, saddle, checkpoint, simultaneous": lambda: [Unrolling(2, True, "saddle", True, True)],
    "ConsensusOptimization": lambda: [ConsensusOptimization(0.1)],
    "CompetitiveGradientDescent": lambda: [CompetitiveGradientDescent(max_iterations=5)],
    "CompetitiveGradientDescent, adaptive": lambda: [CompetitiveGradientDescent(True, max_iterations=5)],
}
REGULARIZERS = {
    "none": list,
    "R1Penalty": lambda: [R1Penalty(Schedule(0.1, 0.0, 3), every=2)],
    "R2Penalty": lambda: [R2Penalty(0.1)],
    "GradientPenalty": lambda: [GradientPenalty(0.1)],
    "GradientPenalty, zero-centred": lambda: [GradientPenalty(0.1, target=0.0)],
    "DRAGANPenalty": lambda: [DRAGANPenalty(0.1, every=2)],
    "ApproximateR1Penalty": lambda: [ApproximateR1Penalty()],
    "ApproximateR2Penalty": lambda: [ApproximateR2Penalty()],
    "LeCam": lambda: [LeCam(start=1)],
    "ConsistencyPenalty, real": lambda: [ConsistencyPenalty("real", transform=Shift())],
    "ConsistencyPenalty, balanced": lambda: [ConsistencyPenalty("balanced", transform=Shift())],
    "ConsistencyPenalty, latent": lambda: [ConsistencyPenalty("latent"), ConsistencyPenalty("latent", player="g")],
    "OrthogonalPenalty": lambda: [OrthogonalPenalty(player="d"), OrthogonalPenalty(player="g")],
    "LogitDrift": lambda: [LogitDrift()],
    "PathLengthPenalty": lambda: [PathLengthPenalty(every=1)],
    "ModeSeeking": lambda: [ModeSeeking()],
    "FeatureMatching": lambda: [FeatureMatching(layers=["*layers.0"])],
    "Reconstruction": lambda: [Reconstruction(0.1, "l2")],
}
EXTRAS = {
    "SpectralNorm": lambda: [SpectralNorm(["generator", "discriminator"], factor=2.0)],
    "GeneratorEMA": lambda: [GeneratorEMA(half_life=2, ramp_up=0.5)],
    "UpdateRatio": lambda: [UpdateRatio(d_steps=2)],
}
SUBSETS = [
    [name for name, used in zip(EXTRAS, bits, strict=True) if used]
    for bits in product([False, True], repeat=len(EXTRAS))
]


def gan(loss, rule, m=1):
    torch.manual_seed(0)
    # BEGAN's discriminator rebuilds what it judges
    discriminator = MLP([2 * m, 8, 2 if loss == "BoundaryEquilibrium" else 1], nn.SiLU)
    optimizer = (
        sgd(0.01) if rule.startswith("Competitive") else lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.9))
    )
    return GANModule(
        MLP([3, 8, 2], nn.SiLU),
        Packed(discriminator, m) if m > 1 else discriminator,
        latent_dim=3,
        loss=LOSSES[loss](),
        g_optimizer=optimizer,
        d_optimizer=optimizer,
        clip_norm=10.0,
    )


def refusal(loss, rule, extras):
    """The documented sentence, or None."""
    if rule.startswith("Competitive") and loss not in ("Minimax", "Wasserstein", "FDivergence"):
        return rf"solves zero-sum games, and {loss} is not one: use Minimax, Wasserstein or FDivergence"
    joint = ("Extragradient", "ConsensusOptimization", "CompetitiveGradientDescent")
    if "UpdateRatio" in extras and rule.startswith(joint):
        return r"steps both players once on every batch, which UpdateRatio would change: remove one of them\.$"
    return None


def check(module, callbacks, sentence, **kwargs):
    before = {id(p): p.detach().clone() for p in module.parameters()}
    if sentence:
        with pytest.raises(MisconfigurationException, match=sentence):
            fit(module, points(3), callbacks=callbacks, **kwargs)
        assert all(torch.equal(p, before.get(id(p), p)) for p in module.parameters())
        return
    run = fit(module, points(3), callbacks=callbacks, **kwargs)
    assert weights(module).isfinite().all()
    assert module.iteration == run.global_step == 3
    assert any(p.grad is not None and p.grad.any() for p in module.discriminator.parameters())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", RULES)
def test_every_regularizer(rule, loss):
    # each next run has the next of the eight subsets of the extras; the start differs from test to test
    number = count(3 * list(RULES).index(rule) + 5 * list(LOSSES).index(loss))
    for make in REGULARIZERS.values():
        extras = SUBSETS[next(number) % len(SUBSETS)]
        callbacks = [*make(), *RULES[rule](), *(c for name in extras for c in EXTRAS[name]())]
        check(gan(loss, rule), callbacks, refusal(loss, rule, extras))


@pytest.mark.parametrize("extras", SUBSETS, ids=" ".join)
@pytest.mark.parametrize("rule", RULES)
def test_everything_at_once(rule, extras):
    """All regularizers that there are, with clipping, Lookahead and packs."""
    loss = "Minimax"
    more = [WeightClipping(1.0), Lookahead(k=2)]
    callbacks = [c for make in REGULARIZERS.values() for c in make()]
    callbacks += [*RULES[rule](), *(c for name in extras for c in EXTRAS[name]()), *more]
    check(gan(loss, rule, m=2), callbacks, refusal(loss, rule, extras))


class Tree(GANModule):
    """Samples of two leaves, two discriminators that see one leaf or both, features, extras and a codebook loss."""

    def unpack(self, batch):
        return {"point": batch, "length": batch.norm(dim=1, keepdim=True)}, None

    def generate(self, network, n, condition, latents):
        made = network(latents)
        return {"point": made[:, :2], "length": made[:, 2:]}, {"w": latents, "loss": made.square().mean()}

    def discriminate(self, network, sample, condition):
        both = torch.cat([sample["point"], sample["length"]], 1)
        logits = {"point": network["point"](sample["point"]), "both": network["both"](both)}
        return logits, {name: [entry] for name, entry in logits.items()}

    def auxiliary_losses(self, player, outputs):
        return {"size": 0.1 * outputs.extras["loss"]} if player == "g" else {}


def tree(loss, rule):
    torch.manual_seed(0)
    parts = {"point": MLP([2, 8, 4], nn.SiLU), "both": MLP([3, 8, 1], nn.SiLU)}  # one judges patches
    optimizer = (
        sgd(0.01) if rule.startswith("Competitive") else lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.9))
    )
    networks = MLP([3, 8, 3], nn.SiLU), nn.ModuleDict(parts)
    return Tree(*networks, 3, LOSSES[loss](), optimizer, optimizer, clip_norm=10.0)


OF_TREES = {
    "FeatureMatching": lambda: [FeatureMatching()],
    "Reconstruction": lambda: [Reconstruction(0.1, sample="fake.length", target="real.length")],
    "PathLengthPenalty, shrunk": lambda: [PathLengthPenalty(every=2, latents="w", shrink=2)],
    "patches": lambda: [R1Penalty(0.1, patches="mean"), R2Penalty(0.1, patches="mean"), GradientPenalty(0.1)],
}


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "BoundaryEquilibrium"])
@pytest.mark.parametrize("rule", RULES)
def test_every_regularizer_on_trees_and_several_discriminators(rule, loss):
    """A fourth of the regularizers for each loss, and all of them for each rule."""
    number = count(3 * list(RULES).index(rule) + 5 * list(LOSSES).index(loss))
    for make in [*(REGULARIZERS | OF_TREES).values()][list(LOSSES).index(loss) % 4 :: 4]:
        extras = SUBSETS[next(number) % len(SUBSETS)]
        callbacks = [*make(), *RULES[rule](), *(c for name in extras for c in EXTRAS[name]())]
        module = tree(loss, rule)
        check(module, [_on_trees(c) for c in callbacks], refusal(loss, rule, extras))
        if not refusal(loss, rule, extras):
            assert {"d/adversarial/point", "d/adversarial/both", "g/size"} <= {*module.last_step.values}


def _on_trees(callback):
    """A transform for each leaf."""
    if isinstance(callback, ConsistencyPenalty) and callback.transform is not None:
        callback.transform = ShiftLeaves()
    return callback


class ShiftLeaves(nn.Module):
    def forward(self, x):
        return {name: leaf + 0.1 for name, leaf in x.items()}


@pytest.mark.parametrize(
    "name",
    [
        "AdaptiveUpdateRatio",
        "Lookahead",
        "WeightClipping",
        "HealthMonitor",
        "FakePool",
        "AdaptiveAugmentation",
        "InstanceNoise",
        "OptimizerSchedule",
    ],
)
def test_other_callbacks_on_trees(name):
    check(tree("NonSaturating", "none"), OTHERS[name](), None)


STARTS = {
    "AdversarialStart": lambda: [AdversarialStart(1, ramp=2)],
    "AdaptiveAdversarialWeight": lambda: [AdaptiveAdversarialWeight("layers.2")],
    "LossBalancer": lambda: [LossBalancer({"adversarial": 1.0, "feature_matching": 1.0})],
    "FakePool": lambda: [FakePool(8)],
    "AdaptiveUpdateRatio": lambda: [AdaptiveUpdateRatio(generator_rests="adversarial")],
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("names", [[name] for name in STARTS] + [[*STARTS][:4]], ids=" ".join)
def test_weights_and_starts_together(names, share):
    callbacks = [callback for name in names for callback in STARTS[name]()]
    common = [FeatureMatching(), R1Penalty(0.1), Alternating(share_fake=share), GeneratorEMA(), SpectralNorm()]
    check(tree("Hinge", "none"), [*callbacks, *common], None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("balance", ["accuracy", "loss_change", "logit_gap", "gradient_norm"])
def test_adaptive_ratio_with_every_loss(balance, loss):
    callbacks = [AdaptiveUpdateRatio(balance), Unrolling(2), SpectralNorm(), GeneratorEMA(), R1Penalty(0.1)]
    check(gan(loss, "none"), callbacks, None)


@pytest.mark.parametrize("rule", ["none", "Simultaneous", "Extragradient", "ConsensusOptimization"])
def test_optimistic_steps_under_other_rules(rule):
    module = gan("NonSaturating", rule)
    module.make_optimizer = dict.fromkeys("dg", lambda p: OptimisticAdam(p, lr=1e-3))
    check(module, [*RULES[rule](), R1Penalty(0.1), GeneratorEMA()], None)


OTHERS = {
    "Lookahead": lambda: [Lookahead()],
    "AdaptiveUpdateRatio": lambda: [AdaptiveUpdateRatio()],
    "WeightClipping": lambda: [WeightClipping()],
    "SampleLogger": lambda: [SampleLogger()],
    "HealthMonitor": lambda: [HealthMonitor()],
    "QualityMonitor": lambda: [QualityMonitor(n_samples=50, every=1)],
    "MemorizationMonitor": lambda: [MemorizationMonitor(every=2, n_samples=50, held_out=points(8, seed=1))],
    "PairedMonitor": lambda: [PairedMonitor({"error": MeanSquaredError()})],
    "CollapseDetector": lambda: [CollapseDetector("rollback"), QualityMonitor(n_samples=50, every=2)],
    "Autopilot": lambda: [Autopilot(n_samples=50)],
    "R1Penalty, separate": lambda: [R1Penalty(0.1, every=2, separate=True)],
    "AdversarialStart": lambda: [AdversarialStart(1, ramp=2), Reconstruction()],
    "AdaptiveAdversarialWeight": lambda: [AdaptiveAdversarialWeight("layers.2"), Reconstruction()],
    "LossBalancer": lambda: [LossBalancer({"adversarial": 1.0, "reconstruction": 2.0}), Reconstruction()],
    "FakePool": lambda: [FakePool(8)],
    "AdaptiveAugmentation": lambda: [AdaptiveAugmentation(p=0.5, interval=1, augment=AugmentPipe("noise"))],
    "AugmentationSchedule": lambda: [AugmentationSchedule(Schedule(0.1, 0.9, 3), AugmentPipe("noise"))],
    "InstanceNoise": lambda: [InstanceNoise(0.1, steps=3)],
    "OptimizerSchedule": lambda: [OptimizerSchedule({"lr": Schedule(0.05, 0.01, 3)})],
}
ALL = RULES | REGULARIZERS | OTHERS | {name: make for name, make in EXTRAS.items() if name != "SpectralNorm"}


@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
def test_other_modules_are_refused(name):
    """There a callback would do nothing, without a word."""
    sentence = rf"^{name.split(',')[0]} acts on a GANModule, but the module is a BoringModel: subclass GANModule, or"
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer(max_steps=1, callbacks=ALL[name]()).fit(BoringModel())


def test_spectral_norm_takes_any_module():
    module = BoringModel()
    trainer(max_steps=1, callbacks=[SpectralNorm("layer", factor=2.0, n_power_iterations=20)]).fit(module)
    module.train().layer.weight  # noqa: B018  # a look in train mode takes in what the last step changed
    assert torch.linalg.matrix_norm(module.eval().layer.weight, 2).item() == pytest.approx(2.0, abs=1e-4)


def test_nothing_is_left_out():
    """Whatever the package adds later has to be added here too."""
    names = {name.split(",")[0] for table in (LOSSES, RULES, REGULARIZERS) for name in table} - {"none"}
    kinds = (lightning_gan_stability.AdversarialLoss, Regularizer, UpdateRule)
    for name in lightning_gan_stability.__all__:
        found = getattr(lightning_gan_stability, name)
        if isinstance(found, type) and issubclass(found, kinds) and found not in kinds:
            assert name in names
