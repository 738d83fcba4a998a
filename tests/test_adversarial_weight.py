"""Weights of terms from their gradients: closed forms, and what the balancer's authors test."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from toys import fit, points, sgd, small, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    AdversarialStart,
    GANModule,
    LossBalancer,
    Reconstruction,
    Simultaneous,
    Unrolling,
    Wasserstein,
)


class Linear(GANModule):
    """G(z) = W z and l(x) = c·x: all gradients are known."""

    def auxiliary_losses(self, player, outputs):
        return {"codebook": 3 * self.generator.unused.sum()} if player == "g" else {}


def linear(**kwargs):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 2))
    generator.unused = nn.Parameter(torch.ones(1))
    options = {"g_optimizer": sgd(0.1), "d_optimizer": sgd(0.0)} | kwargs
    module = Linear(generator, nn.Linear(2, 1, bias=False), 3, Wasserstein(), **options).double()
    z = torch.randn(8, 3, dtype=torch.float64)
    module.draw_latents = lambda n: z
    return module, z


def batch():
    return points(1, dtype=torch.float64)


def factors_of(callback, module, *callbacks, **kwargs):
    """The factors of a run's one batch."""
    found = []
    weigh = callback.weigh_terms
    callback.weigh_terms = lambda *arguments: found.append(weigh(*arguments)) or found[-1]
    fit(module, batch(), callbacks=[callback, *callbacks], **kwargs)
    return {name: float(value) for factors in found for name, value in factors.items()}


# ---------- the adaptive weight


@pytest.mark.parametrize("weight", [1.0, 0.8])
@pytest.mark.parametrize("limit", [1e4, 0.5])
def test_the_ratio_of_gradient_norms(weight, limit):
    module, z = linear()
    (x,) = batch()
    start = module.generator[0].weight.detach().clone()
    c = module.discriminator.weight.detach()[0]
    fake = (z @ start.T + module.generator[0].bias).detach()
    # d/dW of mean |Wz - x| over all values, and of -mean c·Wz
    of_reconstruction = torch.sign(fake - x).T @ z / fake.numel()
    of_adversarial = -torch.outer(c, z.mean(0))
    ratio = of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)
    expected = weight * min(float(ratio), limit)
    found = factors_of(AdaptiveAdversarialWeight("0", weight, limit), module, Reconstruction())
    assert found == {"adversarial": pytest.approx(expected, rel=1e-12)}
    torch.testing.assert_close(
        module.generator[0].weight.detach(),
        start - 0.1 * (of_reconstruction + expected * of_adversarial),
        rtol=0,
        atol=1e-14,
    )
    assert module.generator.unused.item() == pytest.approx(1 - 0.1 * 3)  # the codebook's weight stays 1


class Two(GANModule):
    def auxiliary_losses(self, player, outputs):
        return {"square": outputs.fake.square().mean()} if player == "g" else {}


def two(**kwargs):
    torch.manual_seed(0)
    return Two(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1), **kwargs).double()


def test_terms_that_it_is_weighed_against():
    both, one, other = (
        factors_of(AdaptiveAdversarialWeight("layers.2", terms=terms), two(), Reconstruction())["adversarial"]
        for terms in (None, ["reconstruction"], ["square"])
    )
    assert len({both, one, other}) == 3
    with pytest.raises(ValueError, match="compares with the term 'mel', but the generator's loss has square, reconst"):
        fit(two(), batch(), callbacks=[AdaptiveAdversarialWeight("layers.2", terms=["mel"]), Reconstruction()])


def of_batches(callback, module, *callbacks, n=4):
    """The adversarial term's factor on each batch, and the factors by the terms' gradients, taken apart."""
    found = []
    weigh = callback.weigh_terms

    def spy(gan, player, outputs, terms):
        factors = weigh(gan, player, outputs, terms)
        if player == "g":
            found.append(float(factors["adversarial"]))
        return factors

    callback.weigh_terms = spy
    fit(module, points(n, dtype=torch.float64), callbacks=[callback, *callbacks])
    return found


def still():
    """A generator and a discriminator that do not move, so that batches differ by their data alone."""
    module = two()
    module.make_optimizer = {"d": sgd(0.0), "g": sgd(0.0)}
    return module


def test_a_lazy_term_counts_with_its_interval():
    every, eager = (
        of_batches(AdaptiveAdversarialWeight("layers.2"), still(), Reconstruction(**options))
        for options in ({"every": 3}, {"weight": 3.0})
    )
    assert every[0] == pytest.approx(eager[0], rel=1e-12)
    assert every[3] == pytest.approx(eager[3], rel=1e-12)
    alone = of_batches(AdaptiveAdversarialWeight("layers.2", terms=["square"]), still(), Reconstruction())
    assert every[1:3] == pytest.approx(alone[1:3], rel=1e-12)


@pytest.mark.parametrize("terms", [None, ["reconstruction"]])
def test_batches_on_which_no_other_term_is_due(terms):
    module = small(g_optimizer=sgd(0.0), d_optimizer=sgd(0.0)).double() if terms is None else still()
    lazy = of_batches(AdaptiveAdversarialWeight("layers.2", terms=terms), module, Reconstruction(every=2))
    assert lazy[1] == lazy[3] == 0
    assert min(lazy[0], lazy[2]) > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
@pytest.mark.parametrize("rule", [None, Simultaneous(), Unrolling(1)])
@pytest.mark.parametrize("make", [lambda: AdaptiveAdversarialWeight("layers.2"), lambda: _balancer()])
def test_compiled_as_eager_and_under_other_rules(make, rule):
    found = []
    for compile in (False, {"backend": "aot_eager"}):
        torch._dynamo.reset()
        module = small(compile=compile, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
        fit(module, points(2), callbacks=[make(), Reconstruction(), *([rule] if rule else [])])
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def _balancer(**kwargs):
    return LossBalancer({"adversarial": 1.0, "reconstruction": 2.0}, **kwargs)


@pytest.mark.parametrize("callback", [AdaptiveAdversarialWeight("layers.2"), _balancer()])
def test_half_precision(callback):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
        before = weights(module)
        fit(module, points(2), callbacks=[callback, Reconstruction()], precision=precision)
        found.append(weights(module) - before)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def test_a_weight_normed_layer():
    module = small()
    module.generator.layers[2] = weight_norm(module.generator.layers[2])
    fit(module, points(1), callbacks=[AdaptiveAdversarialWeight("layers.2"), Reconstruction()])
    assert module.iteration == 1


@pytest.mark.parametrize(
    ("callback", "error", "sentence"),
    [
        (
            AdaptiveAdversarialWeight("out"),
            MisconfigurationException,
            "the generator has no layer 'out'; it has layers",
        ),
        (
            AdaptiveAdversarialWeight("layers.1"),
            MisconfigurationException,
            "layer 'layers.1' has no trainable weight",
        ),
        (AdaptiveAdversarialWeight("layers.2"), ValueError, "with the generator's other terms, but there are none"),
    ],
)
def test_layers_and_terms_that_are_not_there(callback, error, sentence):
    with pytest.raises(error, match=sentence):
        fit(small(), points(1), callbacks=[callback])


def test_terms_that_do_not_depend_on_the_layer():
    module, _ = linear()
    with pytest.raises(ValueError, match="generator's other terms do not depend on its layer '0'"):
        fit(module, batch(), callbacks=[AdaptiveAdversarialWeight("0")])


@pytest.mark.parametrize("callback", [AdaptiveAdversarialWeight("layers.2"), _balancer()])
def test_micro_batches_are_refused(callback):
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} weighs terms .*accumulate=2"):
        fit(small(accumulate=2), points(1), callbacks=[callback, Reconstruction()])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AdaptiveAdversarialWeight(3), "`layer` must"),
        (lambda: AdaptiveAdversarialWeight("a", weight=-1), "`weight` must"),
        (lambda: AdaptiveAdversarialWeight("a", max=-1), "`max` must"),
        (lambda: AdaptiveAdversarialWeight("a", terms="l1"), "`terms` must"),
        (lambda: LossBalancer({}), "`weights` must be a dict of numbers by the names of terms"),
        (lambda: LossBalancer([1.0]), "`weights` must be a dict of numbers by the names of terms"),
        (lambda: LossBalancer({"a": 0.0}), "`weights` must be a dict with at least one positive number"),
        (lambda: LossBalancer({"a": -1.0}), r"`weights\['a'\]` must"),
        (lambda: LossBalancer({"a": 1.0}, total_norm=0), "`total_norm` must"),
        (lambda: LossBalancer({"a": 1.0}, decay=1.0), "`decay` must"),
    ],
)
def test_bad_arguments(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# ---------- the balancer


class Point(nn.Module):
    """The sample is a parameter."""

    def __init__(self):
        super().__init__()
        self.y = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, latents):
        return self.y.expand(len(latents), 1)


class SelfTest(GANModule):
    """The authors' own test: |y - 1| and 100 |y + 1| at y = 0."""

    def auxiliary_losses(self, player, outputs):
        if player == "d":
            return {}
        return {"one": (outputs.fake - 1).abs().mean(), "two": 100 * (outputs.fake + 1).abs().mean()}


def self_test(callbacks, **kwargs):
    module = SelfTest(Point(), MLP([1, 1]).double(), 1, g_optimizer=sgd(1.0), d_optimizer=sgd(0.0), **kwargs)
    module.adversarial = False
    module.plan = ("g",)
    fit(module, [torch.zeros(1, 1, dtype=torch.float64)], callbacks=callbacks)
    return -module.generator.y.item()  # the gradient, by a step of rate 1


def test_the_self_test_of_the_authors():
    assert self_test([]) == pytest.approx(99)
    assert self_test([LossBalancer({"one": 1.0, "two": 1.0})]) == pytest.approx(0, abs=1e-9)
    assert self_test([LossBalancer({"one": 1.0, "two": 3.0})]) == pytest.approx(0.5)
    assert self_test([LossBalancer({"two": 0.3}, total_norm=7.0)]) == pytest.approx(7.0 - 1.0)  # `one` stays -1


def test_factors_over_several_batches():
    """The bias-corrected running means of the norms, written down."""
    module = two()
    balancer = LossBalancer({"reconstruction": 1.0, "square": 3.0}, total_norm=2.0, decay=0.9)
    norms, factors = [], []
    weigh = balancer.weigh_terms

    def spy(gan, player, outputs, terms):
        if player == "g":
            names = ("reconstruction", "square")
            slopes = {name: torch.autograd.grad(terms[name], outputs.fake, retain_graph=True)[0] for name in names}
            norms.append({name: slope.norm(dim=1).mean() for name, slope in slopes.items()})
        found = weigh(gan, player, outputs, terms)
        if player == "g":
            factors.append(found)
        return found

    balancer.weigh_terms = spy
    fit(module, points(4, dtype=torch.float64), callbacks=[balancer, Reconstruction(5.0)])
    for i, found in enumerate(factors):
        for name, share in (("reconstruction", 0.25), ("square", 0.75)):
            powers = [0.9 ** (i - j) for j in range(i + 1)]
            mean = sum(p * norms[j][name] for j, p in enumerate(powers)) / sum(powers)
            torch.testing.assert_close(found[name], 2.0 * share / (mean + 1e-12), rtol=1e-12, atol=0)
        assert "adversarial" not in found


def test_the_weights_of_terms_cancel():
    runs = []
    for weight in (1.0, 50.0):
        module = two()
        fit(module, points(3, dtype=torch.float64), callbacks=[_balancer(), Reconstruction(weight)])
        runs.append(weights(module))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-10)


class Weighed(Two):
    """Terms with weights of the module's own."""

    factors = (1.0, 1.0)

    def auxiliary_losses(self, player, outputs):
        found = super().auxiliary_losses(player, outputs)
        return {name: self.factors[0] * term for name, term in found.items()}

    def adversarial_weight(self, player, outputs):
        return self.factors[1] if player == "g" else 1.0


@pytest.mark.parametrize(
    ("factors", "options", "cancels"),
    [
        ((1.0, 1.0), {"weight": 50.0}, True),
        ((1.0, 1.0), {"every": 7}, True),  # due on the first batch
        ((1.0, 1.0), {"weight": 3.0, "every": 5}, True),
        ((9.0, 1.0), {}, True),
        ((1.0, 9.0), {}, False),
    ],
)
def test_what_the_balancer_cancels(factors, options, cancels):
    runs = []
    for own, kwargs in (((1.0, 1.0), {}), (factors, options)):
        torch.manual_seed(0)
        module = Weighed(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1)).double()
        module.factors = own
        balancer = LossBalancer({"adversarial": 1.0, "reconstruction": 2.0, "square": 1.0})
        fit(module, batch(), callbacks=[balancer, Reconstruction(**kwargs)])
        runs.append(weights(module))
    assert torch.allclose(*runs, rtol=0, atol=1e-10) == cancels


def test_adversarial_weight_and_ramp_multiply_the_factor_of_the_balancer():
    runs = []
    for factor, ramp in ((0.25, []), (1.0, [AdversarialStart(0, ramp=4)])):
        torch.manual_seed(0)
        module = Weighed(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1)).double()
        module.factors = (1.0, factor)
        fit(module, batch(), callbacks=[_balancer(), Reconstruction(), *ramp])
        runs.append(weights(module))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


def test_terms_that_the_balancer_cannot_weigh():
    module, _ = linear()
    with pytest.raises(ValueError, match="term 'codebook' by its gradient at the samples, but it does not dep"):
        fit(module, batch(), callbacks=[LossBalancer({"codebook": 1.0})])
    module, _ = linear()
    with pytest.raises(
        ValueError, match="has a weight for 'mel', but the terms of the generator's loss are adversarial, codebook"
    ):
        fit(module, batch(), callbacks=[LossBalancer({"mel": 1.0})])
