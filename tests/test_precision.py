"""Mixed precision, gradient scalers, other floating point types and compiled networks.

On a CPU a float16 gradient scaler stands in for the one that a GPU has: the plugin is the same.
"""

import functools
import math
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn.functional import softplus
from torch.utils.data import DataLoader
from toys import fit, points, sgd, small, spy_on_samples, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdversarialLoss,
    Alternating,
    ApproximateR1Penalty,
    ApproximateR2Penalty,
    ConsensusOptimization,
    ConsistencyPenalty,
    DRAGANPenalty,
    Extragradient,
    FakePool,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    HealthMonitor,
    LeCam,
    LogitDrift,
    NonSaturating,
    QualityMonitor,
    R1Penalty,
    R2Penalty,
    Regularizer,
    SampleLogger,
    Simultaneous,
    Unrolling,
    Wasserstein,
)

pytestmark = [
    pytest.mark.timeout(100),
    # torch's compiler itself looks at `grad` of each tensor that it is given
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
]


def scaled(init_scale=2.0**10, **kwargs):
    """float16 with a gradient scaler, as arguments of a Trainer."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **kwargs)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def run_in(precision):
    return {"float16": scaled()}.get(precision, {"precision": precision})


# ---------- fused optimizers


def clipped_run(fused, precision):
    """The weights, and what each step saw, of runs whose gradients are clipped."""
    torch.manual_seed(0)
    make = functools.partial(torch.optim.Adam, lr=1e-2, fused=fused)
    module = GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), 4, g_optimizer=make, d_optimizer=make, clip_norm=1e-3)
    gradients = Gradients()
    run = fit(module, points(5), callbacks=[gradients], **run_in(precision))
    return weights(module), gradients.seen, run.callback_metrics["d/grad_norm"]


@pytest.mark.parametrize("precision", ["float16", "bf16-mixed", "32-true"])
def test_fused_optimizers_see_the_same_gradients(precision):
    """A gradient scaler leaves theirs scaled, by 1024 here, until they step: norms would be wrong, and clipping."""
    for one, other in zip(clipped_run(True, precision), clipped_run(False, precision), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_default_optimizer_is_fused_where_it_can_be():
    adam = functools.partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), fused=False)
    runs = []
    for options in ({}, {"g_optimizer": adam, "d_optimizer": adam}):
        torch.manual_seed(0)
        module = GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), 4, **options)
        run = fit(module, points(20))
        runs.append(weights(module))
        assert [optimizer.defaults["fused"] for optimizer in run.optimizers] == [not options] * 2
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


def test_the_default_optimizer_takes_what_cannot_be_fused():
    complex_weight = MLP([4, 8, 2])
    complex_weight.phase = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    d_optimizer, g_optimizer = GANModule(complex_weight, MLP([2, 8, 1]), 4).configure_optimizers()[0]
    assert d_optimizer.defaults["fused"] is True
    assert g_optimizer.defaults["fused"] is None
    with torch.device("meta"):  # a device without fused kernels
        module = GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), 4)
    assert [optimizer.defaults["fused"] for optimizer in module.configure_optimizers()[0]] == [None, None]


# ---------- gradients of the penalties


class Silent(AdversarialLoss):
    """Says nothing, so that a player's gradient is that of its penalties."""

    def discriminator(self, real_logits, fake_logits):
        return 0 * (real_logits + fake_logits)

    def generator(self, fake_logits, real_logits=None):
        return 0 * fake_logits


class Gradients(Callback):
    """Keeps the gradients with which each player stepped, as the optimizer got them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen.append(torch.cat([g.detach().flatten().double() for g in gradients]))


class Table(torch.nn.Module):
    """A generator without arithmetic: its samples are the same in every precision."""

    def __init__(self):
        super().__init__()
        self.samples = torch.nn.Parameter(torch.randn(64, 16))

    def forward(self, latents):
        return self.samples


def penalty_gradient(penalty, precision, sizes=(16, 64, 64, 64, 1), activation=torch.nn.SiLU):
    """The discriminator's gradient in one step of training on nothing but a penalty."""
    torch.manual_seed(0)
    discriminator = MLP(sizes, activation)
    module = GANModule(Table(), discriminator, 8, Silent(), g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    module.plan = ("d",)
    gradients = Gradients()
    data = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    fit(module, [data], callbacks=[penalty, gradients], **run_in(precision))
    (gradient,) = gradients.seen
    return gradient


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


PENALTIES = {
    "R1": lambda: R1Penalty(2.0),
    "R2": lambda: R2Penalty(2.0),
    "GradientPenalty": lambda: GradientPenalty(1.0),
    "DRAGANPenalty": lambda: DRAGANPenalty(1.0),
    "ApproximateR1": lambda: ApproximateR1Penalty(100.0, 0.1),
    "ApproximateR2": lambda: ApproximateR2Penalty(100.0, 0.1),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_gradient_in_mixed_precision(penalty, monkeypatch):
    make = PENALTIES[penalty]
    exact = penalty_gradient(make(), "32-true")
    limits = {"float16": 1e-3, "bf16-mixed": 1e-2}
    errors = {precision: relative(penalty_gradient(make(), precision), exact) for precision in limits}
    assert all(errors[precision] <= limits[precision] for precision in limits), errors
    # and the measurement can see an error: with autocast left on, it is there
    monkeypatch.setattr(torch, "autocast", NoAutocastSwitch)
    worse = {precision: relative(penalty_gradient(make(), precision), exact) for precision in limits}
    print(f"{penalty}: {errors}, with autocast left on: {worse}")
    for precision in limits:
        assert worse[precision] > max(1.5 * errors[precision], 1e-4)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("precision", ["float16", "bf16-mixed"])
def test_penalty_gradient_of_a_deep_network_loses_nothing(penalty, precision):
    deep = {"sizes": [16, *[64] * 8, 1], "activation": torch.nn.ReLU}
    low, exact = (penalty_gradient(PENALTIES[penalty](), p, **deep) for p in (precision, "32-true"))
    print(penalty, precision, relative(low, exact))
    assert relative(low, exact) <= 1e-6


class Judged(Regularizer):
    """A user's penalty that judges the samples once more."""

    differentiates = ()

    def penalty(self, module, outputs):
        return (module.logits(outputs.fake) - outputs.fake_logits).square()


@pytest.mark.parametrize("precision", ["bf16-mixed", "float16"])
@pytest.mark.parametrize(
    "penalty", [ApproximateR2Penalty, lambda: ConsistencyPenalty("balanced", transform=torch.nn.Identity()), Judged]
)
def test_penalties_on_samples_that_a_generator_made_in_low_precision(penalty, precision):
    """The last layer of a generator is linear, and autocast has it in half precision."""
    module = small()
    fit(module, points(2), callbacks=[penalty()], **run_in(precision))
    assert weights(module).isfinite().all()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_resumed_run_in_double_precision_is_not_rounded():
    data, module = points(6), small()
    fit(module, data, precision="64-true")
    first, again = small(), small(seed=1)
    fit(first, data[:3], precision="64-true", enable_checkpointing=True).save_checkpoint("model.ckpt")
    fit(again, data[3:], ckpt_path="model.ckpt", precision="64-true", max_epochs=2)
    assert again.iteration == 6
    assert torch.equal(weights(module), weights(again))


def test_data_of_another_type_are_explained():
    with pytest.raises(ValueError, match=r"\(the input is torch.float64, the network torch.float32\)"):
        fit(small(), points(1, dtype=torch.float64))


class NoAutocastSwitch(torch.autocast):
    """An autocast that cannot be switched off."""

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if dtype is None:  # what GANModule asks for; Lightning's plugin gives a type
            enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        super().__init__(device_type, dtype, enabled, cache_enabled)


@pytest.mark.parametrize("precision", ["float16", "bf16-mixed"])
def test_the_loss_itself_runs_in_low_precision(precision):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    module = small()
    module.discriminator = torch.nn.Sequential(module.discriminator, Spy())
    fit(module, points(2), callbacks=[R1Penalty(0.1, every=2)], **run_in(precision))
    low = torch.float16 if precision == "float16" else torch.bfloat16
    # step 0 has a penalty for D: real and fake; then G's turn; step 1 has none
    assert seen == [torch.float32] * 2 + [low] * 4


# ---------- gradient scaler


def test_simultaneous_is_refused_under_a_scaler():
    expected = (
        r"^Simultaneous takes both gradients before either step, but precision='16-mixed' changes its gradient scale "
        r"at each step: use precision='bf16-mixed' or '32-true', or remove the rule\.$"
    )
    with pytest.raises(MisconfigurationException, match=expected):
        fit(small(), points(1), callbacks=[Simultaneous()], **scaled())
    fit(small(), points(1), callbacks=[Simultaneous()], precision="bf16-mixed")


class Loud(AdversarialLoss):
    """Finite for the discriminator, but not any more when it is scaled; the generator's is the non-saturating one."""

    def discriminator(self, real_logits, fake_logits):
        return 1e37 * (softplus(-real_logits.float()) + softplus(fake_logits.float()))

    def generator(self, fake_logits, real_logits=None):
        return softplus(-fake_logits.float())


def spy_on_latents(module):
    """A list that fills with the latents that the generator trains on."""
    seen = []
    spy_on_samples(module, lambda player, outputs: seen.extend([outputs.latents] * (player == "g")))
    return seen


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_overflow_in_the_discriminator_leaves_the_generator_right(clip_norm):
    module = small(loss=Loud(), g_optimizer=sgd(0.1), d_optimizer=sgd(0.1), clip_norm=clip_norm)
    reference = small()
    latents = spy_on_latents(module)
    options = scaled()
    run = fit(module, points(3), **options)
    assert len(latents) == 3
    for z in latents:  # G alone by hand, in the same autocast, without a scaler
        with torch.autocast("cpu", torch.float16):
            loss = softplus(-reference.discriminator(reference.generator(z)).float()).mean()
        gradients = torch.autograd.grad(loss, [*reference.generator.parameters()])
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = 1 if clip_norm is None else min(1, clip_norm / norm.item())
        with torch.no_grad():
            for p, g in zip(reference.generator.parameters(), gradients, strict=True):
                p -= 0.1 * factor * g
    assert torch.equal(weights(module.discriminator), weights(reference.discriminator))
    moved = (weights(module.generator) - weights(small().generator)).abs().max()
    error = (weights(module.generator) - weights(reference.generator)).abs().max()
    assert moved > 1e-3
    assert error <= 1e-4 * moved
    # each of D's three steps halved the scale, none of G's did; they count all the same
    assert options["plugins"][0].scaler.get_scale() == 2**7
    assert (run.global_step, module.iteration) == (3, 3)


def test_discriminator_moves_again_when_the_scale_has_come_down():
    """A start with a scale that is too much for float16: the first steps are lost, later ones are not."""
    module, moves = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1)), Moves()
    run = fit(module, points(8), callbacks=[moves], **scaled(2.0**40, backoff_factor=2.0**-8))
    assert run.global_step == module.iteration == 8
    for lengths in moves.lengths.values():
        assert lengths[0] == 0
        assert lengths[-1] > 0


class Moves(Callback):
    """Keeps the length of each player's move on each batch."""

    def __init__(self):
        self.lengths = {"discriminator": [], "generator": []}

    def on_train_batch_start(self, trainer, module, *_):
        self.before = {name: weights(getattr(module, name)).double() for name in self.lengths}

    def on_train_batch_end(self, trainer, module, *_):
        for name, before in self.before.items():
            self.lengths[name].append((weights(getattr(module, name)).double() - before).norm().item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "float16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clip_norm_acts_on_unscaled_gradients(precision, accumulate):
    lr, limit = 0.1, 0.01
    moves = Moves()
    module = small(clip_norm=limit, accumulate=accumulate, g_optimizer=sgd(lr), d_optimizer=sgd(lr))
    fit(module, points(3), callbacks=[moves, R1Penalty(0.5)], **run_in(precision))
    for lengths in moves.lengths.values():
        assert lengths == pytest.approx([lr * limit] * 3, rel=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "float16"])
def test_logged_gradient_norm_is_the_unscaled_one_before_clipping(precision):
    gradients = Gradients()
    module = small(clip_norm=1e-4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    run = fit(module, points(1), callbacks=[gradients], **run_in(precision))
    # Callbacks see the gradient before the module clips it
    expected = [g.norm().item() for g in gradients.seen]
    logged = [run.callback_metrics[f"{player}/grad_norm"].item() for player in "dg"]
    assert logged == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0.01


# ---------- non-finite


class Broken(AdversarialLoss):
    """The non-saturating loss until a player's loss is NaN."""

    def __init__(self, player):
        super().__init__()
        self.player = player

    def discriminator(self, real_logits, fake_logits):
        values = NonSaturating().discriminator(real_logits, fake_logits)
        return values * float("nan") if self.player == "d" else values

    def generator(self, fake_logits, real_logits=None):
        values = NonSaturating().generator(fake_logits)
        return values * float("nan") if self.player == "g" else values


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "float16"])
@pytest.mark.parametrize(("player", "network"), [("d", "discriminator"), ("g", "generator")])
def test_nan_loss_is_an_error_also_under_a_scaler(precision, player, network):
    module = small(loss=Broken(player))
    before = weights(getattr(module, network)).clone()
    with pytest.raises(FloatingPointError, match=rf"the {network}'s update at step 0: .*`{player}/adversarial`"):
        fit(module, points(2), **run_in(precision))
    assert torch.equal(before, weights(getattr(module, network)))


class Explode(Callback):
    """Makes one of the discriminator's gradients infinite, as an overflow in float16 does."""

    def on_after_backward(self, trainer, module):
        if module.discriminator.layers[0].weight.requires_grad and module.iteration == 1:
            module.discriminator.layers[0].weight.grad[0, 0] = float("inf")


def test_overflowing_gradient_is_an_error_without_a_scaler_and_none_with_one():
    with pytest.raises(FloatingPointError, match="discriminator's update at step 1: `d/grad_norm`"):
        fit(small(), points(3), callbacks=[Explode()])
    module, moves = small(), Moves()
    fit(module, points(3), callbacks=[Explode(), moves], **scaled())
    assert [length > 0 for length in moves.lengths["discriminator"]] == [True, False, True]
    assert [length > 0 for length in moves.lengths["generator"]] == [True, True, True]


# ---------- pure other precision


def test_double_precision_equals_a_module_of_doubles():
    def run(module, **kwargs):
        fit(module, points(4, dtype=torch.float64), callbacks=[R1Penalty(0.5), GradientPenalty(0.1)], **kwargs)
        return weights(module)

    inside, outside = run(small(), precision="64-true"), run(small().double())
    assert inside.dtype == torch.float64
    assert torch.equal(inside, outside)
    assert not torch.equal(inside, weights(small()).double())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_pure_low_precision_trains(precision):
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    gradients, exact = Gradients(), Gradients()
    module = small(g_optimizer=sgd(0.05), d_optimizer=sgd(0.05))  # in float16 Adam's eps is 0
    fit(module, points(4, 64), callbacks=[R1Penalty(0.5, every=2), gradients], precision=precision)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert weights(module).isfinite().all()
    assert not torch.equal(weights(module), weights(small().to(dtype)))
    fit(small(), points(1, 64), callbacks=[R1Penalty(0.5, every=2), exact])
    assert relative(gradients.seen[0], exact.seen[0]) <= (2e-2 if precision == "bf16-true" else 2e-3)


# ---------- compiled networks


@pytest.fixture
def dynamo():
    """A compiler that has seen nothing yet, and counts how often its graphs run."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    yield backend, runs
    torch._dynamo.reset()


def test_plain_steps_run_compiled_and_penalties_in_eager(dynamo):
    backend, runs = dynamo
    counts = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            counts.append(len(runs))
            runs.clear()

    module, plain = small(), small()
    module.discriminator.compile(backend=backend)
    fit(module, points(4), callbacks=[R1Penalty(0.5, every=2), Count()])
    fit(plain, points(4), callbacks=[R1Penalty(0.5, every=2)])
    # a plain step: D judges real and fake, G's fake is judged; with a penalty only the last is compiled
    assert counts == [1, 3, 1, 3]
    assert (weights(module) - weights(plain)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("penalty", "in_place"),
    [(R1Penalty(0.5, every=2), True), (GradientPenalty(0.5, every=2), True), (R1Penalty(0.5, every=2), False)],
    ids=["R1, module.compile", "GradientPenalty, module.compile", "R1, torch.compile"],
)
def test_second_order_penalty_on_a_network_compiled_by_aot_autograd(dynamo, penalty, in_place):
    """AOT autograd has no second derivatives: a penalty that ran compiled would raise."""
    module, plain = small(), small()
    if in_place:
        module.discriminator.compile(backend="aot_eager")
    else:
        module.discriminator = torch.compile(module.discriminator, backend="aot_eager")
    fit(module, points(4), callbacks=[penalty])
    fit(plain, points(4), callbacks=[penalty])
    assert (weights(module) - weights(plain)).abs().max() <= 1e-5
    assert (weights(plain) - weights(small())).abs().max() > 1e-4


@pytest.mark.parametrize("penalty", [ApproximateR1Penalty, ApproximateR2Penalty])
def test_finite_differences_run_compiled(dynamo, penalty):
    """They need no second derivatives: D judges real, fake, and the points twice; then G's fake."""
    backend, runs = dynamo
    module, plain = small(), small()
    module.discriminator.compile(backend=backend)
    fit(module, points(3), callbacks=[penalty(every=1)])
    assert len(runs) == 3 * 5
    torch._dynamo.reset()
    aot = small()
    aot.discriminator.compile(backend="aot_eager")
    for m in (aot, plain):
        fit(m, points(3), callbacks=[penalty(every=1)])
    assert (weights(aot) - weights(plain)).abs().max() <= 1e-5
    assert (weights(module) - weights(plain)).abs().max() <= 1e-5


def test_without_eager_the_compiled_penalty_would_fail(dynamo):
    discriminator = small().discriminator
    discriminator.compile(backend="aot_eager")
    x = points(1)[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)[0].square().sum().backward()


def test_both_networks_compiled_in_mixed_precision(dynamo):
    backend, runs = dynamo
    module, plain = small(), small()
    module.discriminator.compile(backend=backend)
    module.generator.compile(backend=backend)
    for m in (module, plain):
        fit(m, points(4), callbacks=[R1Penalty(0.5, every=2)], precision="bf16-mixed")
    assert len(runs) > 8
    assert (weights(module) - weights(plain)).abs().max() <= 1e-5


def ragged(n):
    """Batches of 8, and a smaller one at the end of each epoch of 4."""
    return [batch[: 5 if i % 4 == 3 else 8] for i, batch in enumerate(points(n))]


def train_compiled(backend, rule, batches):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = small(compile={"backend": backend} if backend else False)
    callbacks = [R1Penalty(0.5, every=4), GeneratorEMA(half_life=2), SampleLogger(every=4, n=9), *rule]
    run = trainer(callbacks=callbacks, max_steps=len(batches), max_epochs=-1, val_check_interval=4)
    run.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:4], batch_size=None))
    return module, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("rule", "most"),
    # D judges in its own step, in G's and in validation; G makes samples without a gradient, with one, in validation:
    # those of steps have graphs for two sizes
    [([], 10), ([Unrolling(2)], 10), ([Extragradient()], 10)],
    ids=["plain", "Unrolling", "Extragradient"],
)
def test_compiled_runs_equal_eager_ones_with_few_graphs(dynamo, rule, most):
    plain, none = train_compiled(False, rule, ragged(8))
    module, few = train_compiled("aot_eager", rule, ragged(8))
    _, same = train_compiled("aot_eager", rule, ragged(24))
    assert (none, few) == (0, same)
    assert 2 <= few <= most
    assert (weights(module) - weights(plain)).abs().max() <= 1e-5
    assert list(module.state_dict()) == list(plain.state_dict())
    assert module.generator_ema._compiled_call_impl is None
    again = small()
    again.load_state_dict(pickle.loads(pickle.dumps(module.state_dict())))


@pytest.mark.filterwarnings("ignore:.* and not compile")
@pytest.mark.parametrize(
    ("options", "batches", "graphs"),
    [
        ({}, points(8), 4),
        ({}, ragged(8), 8),
        ({"dynamic": True}, ragged(8), 4),
        ({"dynamic": None}, ragged(8), 4),
    ],
    ids=["one size", "two sizes", "dynamic", "as torch decides"],
)
def test_each_size_of_batches_has_its_graphs(dynamo, options, batches, graphs):
    """Of D in its own step and in G's, and of G without a gradient and with one."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    module, plain = small(compile={"backend": backend} | options), small()
    run = trainer(max_steps=24, max_epochs=-1)
    run.fit(module, DataLoader(batches, batch_size=None))
    assert len(compiled) == graphs
    trainer(max_steps=24, max_epochs=-1).fit(plain, DataLoader(batches, batch_size=None))
    assert torch.equal(weights(module), weights(plain))


class ReplayedMemory:
    """CUDA graphs on the CPU: all that networks have returned is gone when the next batch begins."""

    def __init__(self):
        self.returned, self.marks = [], 0

    def backend(self, graph, inputs, **kwargs):
        def run(*args):
            outputs = graph(*args)
            self.returned += [x.detach() for x in outputs]
            return outputs

        return run

    def mark(self):
        self.marks += 1
        for tensor in self.returned:
            tensor.fill_(math.nan)
        self.returned.clear()


@pytest.mark.filterwarnings("ignore:.*at step", "ignore:.* and not compile")
@pytest.mark.parametrize("rule", [FakePool, lambda: Alternating(share_fake=True), lambda: Unrolling(2)])
def test_nothing_is_kept_in_the_memory_of_cuda_graphs(dynamo, monkeypatch, rule):
    memory = ReplayedMemory()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", memory.mark)

    class Sums(GANModule):
        """Logs what the generator returns beside the sample, at steps that come later, too."""

        def generate(self, network, n, condition, latents):
            sample = network(latents)
            return sample, {"first": sample[0, 0]}

        def auxiliary_losses(self, player, outputs):
            return {"first": outputs.extras["first"]} if player == "g" else {}

    seen = []
    for options in (False, {"backend": memory.backend, "mode": "reduce-overhead"}):
        torch.manual_seed(0)
        module = Sums(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, compile=options)
        monitor = QualityMonitor(n_samples=64, every=3)
        callbacks = [GeneratorEMA(), SampleLogger(every=2), HealthMonitor(every=2), monitor, rule()]
        run = trainer(callbacks=callbacks, max_steps=12, max_epochs=-1, val_check_interval=4)
        run.fit(module, DataLoader(ragged(8), batch_size=None), DataLoader(points(4), batch_size=None))
        pairs = module.last_step.pairs
        samples = [module.sample(8, latents=torch.ones(8, 4) * i) for i in range(2)]
        seen.append((weights(module), monitor.history, run.logged_metrics, [*pairs[0][1:], *samples]))
    assert memory.marks > 12
    assert torch.equal(seen[0][0], seen[1][0])
    for one, other in zip(seen[0][3], seen[1][3], strict=True):
        assert torch.equal(one, other)
    assert seen[0][1] == seen[1][1]
    assert seen[0][2].keys() == seen[1][2].keys()
    for name, value in seen[0][2].items():
        assert torch.equal(value, seen[1][2][name]), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "cudagraphs"}, True),
        ({}, False),
    ],
)
def test_what_replays_cuda_graphs(options, expected):
    assert small(compile=options).replays_graphs is expected


def test_shards_have_no_cuda_graphs():
    run = trainer(strategy=ModelParallelStrategy(1, 1), max_steps=1)
    message = "^ModelParallelStrategy puts shards .* leave the mode that has them out of `compile`, or use strategy="
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(small(compile={"mode": "reduce-overhead"}), DataLoader(points(1), batch_size=None))


def test_networks_that_are_compiled_already_keep_their_backend(dynamo):
    backend, runs = dynamo
    module = small(compile={"backend": "aot_eager"})
    module.discriminator.compile(backend=backend)
    fit(module, points(2))
    assert len(runs) == 2 * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"backend": "no_such_backend"},
            r"`compile\['backend'\]` must be one of .*'inductor'.*, got 'no_such_backend'\.",
        ),
        ({"mod": "default"}, r"`compile` must hold arguments of `torch.compile` \(.*mode.*\), got 'mod'\."),
        ("aot_eager", r"`compile` must be True, False, or a dict of arguments of `torch.compile`, got 'aot_eager'\."),
        (1, r"`compile` must be True, False, or a dict"),
        (None, r"`compile` must be True, False, or a dict"),
    ],
)
def test_compile_takes_arguments_of_torch_compile(value, message):
    with pytest.raises(ValueError, match=message):
        small(compile=value)


# ---------- attention


class Attention(torch.nn.Module):
    """A discriminator whose fused attention has no second derivative."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Linear(1, 8), torch.nn.Linear(8, 1)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x[..., None])
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    "callback", [R1Penalty(0.1), GradientPenalty(0.1), Unrolling(2), ConsensusOptimization(0.1), ApproximateR1Penalty()]
)
def test_attention(callback):
    module = GANModule(MLP([4, 2]), Attention(), 4)
    fit(module, points(2), callbacks=[callback])
    assert weights(module).isfinite().all()


def test_fused_attention_has_no_second_derivative():
    """Why it is switched off then."""
    x = points(1)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(Attention()(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("rule", [Unrolling(2), ConsensusOptimization(0.1)])
def test_sync_batch_norm_is_refused_by_rules_with_second_derivatives(rule):
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.SyncBatchNorm(4), torch.nn.Linear(4, 1))
    expected = rf"^{type(rule).__name__} differentiates gradients, which SyncBatchNorm cannot"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(GANModule(MLP([4, 2]), network, 4), points(1), callbacks=[rule])


# ---------- penalties that compare what the networks said in half precision


@pytest.mark.parametrize("precision", ["float16", "bf16-mixed"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ConsistencyPenalty("balanced", transform=torch.nn.Identity()),
        lambda: ConsistencyPenalty("latent"),
        lambda: ConsistencyPenalty("latent", player="g"),
    ],
    ids=["balanced", "latent", "latent, g"],
)
def test_consistency_is_a_difference_in_full_precision(make, precision):
    values = []
    for kwargs in ({}, run_in(precision)):
        torch.manual_seed(0)
        discriminator = MLP([6, 64, 64, 1])
        discriminator.layers[-1].bias.data.fill_(10.0)
        module = GANModule(MLP([4, 32, 6]), discriminator, 4, g_optimizer=sgd(0.0), d_optimizer=sgd(0.0))
        penalty = make()
        data = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
        run = fit(module, [data], callbacks=[penalty], **kwargs)
        values.append(run.callback_metrics[f"{penalty.player}/{penalty.name}"].item())
    assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-9)


def test_logits_that_a_penalty_squares_do_not_overflow():
    torch.manual_seed(0)
    module = small(loss=Wasserstein())
    module.discriminator.layers[-1].bias.data.fill_(300.0)  # 300² is more than float16 has
    run = fit(module, points(1), callbacks=[LogitDrift(), LeCam(start=0)], **scaled(2.0))
    assert run.callback_metrics["d/logit_drift"].item() == pytest.approx(1e-3 * 300**2, rel=0.01)
