"""Update rules on small networks in float64 against the algorithm written with dense matrices and real optimizers."""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import softplus
from toys import fit, points, sgd, small, spy_on_samples, weights

from lightning_gan_stability import (
    MLP,
    AdversarialLoss,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    Extragradient,
    FDivergence,
    GANModule,
    Hinge,
    Minimax,
    NonSaturating,
    R1Penalty,
    R2Penalty,
    Regularizer,
    Unrolling,
    Wasserstein,
    WeightClipping,
)
from lightning_gan_stability.update_rules.competitive import conjugate_gradients

STEPS = 4


class Fixed(GANModule):
    """A GAN whose latents are the data's: the same in every draw of a step."""

    def unpack(self, batch):
        self.latents = batch[:, 2:]
        return batch[:, :2], None

    def draw_latents(self, n):
        return self.latents


def gan(optimizer, loss=None, **kwargs):
    torch.manual_seed(0)
    networks = MLP([3, 5, 2], nn.Tanh), MLP([2, 5, 1], nn.Tanh)
    options = {"g_optimizer": optimizer, "d_optimizer": optimizer} | kwargs
    return Fixed(*networks, latent_dim=3, loss=loss, **options).double()


def batches(n=STEPS):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(8, 5, generator=source, dtype=torch.float64) for _ in range(n)]


def squared_norm(discriminator, x):
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().sum(1).mean()


def losses(generator, discriminator, batch, loss, r1=0.0, r2=0.0):
    real, fake = batch[:, :2], generator(batch[:, 2:])
    l_r, l_f = discriminator(real).squeeze(1), discriminator(fake).squeeze(1)
    l_d = loss.discriminator(l_r, l_f).mean()
    l_d = l_d + r1 / 2 * squared_norm(discriminator, real) + r2 / 2 * squared_norm(discriminator, fake)
    return l_d, loss.generator(l_f, l_r).mean()


def close(module, generator, discriminator):
    torch.testing.assert_close(weights(module.generator), weights(generator), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights(module.discriminator), weights(discriminator), rtol=1e-10, atol=1e-12)


# ---------- Extragradient


EXTRA = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.2),
    "SGD, weight decay": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9)),
    "Adam, weight decay": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), weight_decay=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.4),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.4),
}


@pytest.mark.parametrize("clip_norm", [None, 0.03])
@pytest.mark.parametrize("name", EXTRA)
def test_extragradient_with_any_optimizer(name, clip_norm):
    module = gan(EXTRA[name], clip_norm=clip_norm)
    generator, discriminator = deepcopy(module.generator), deepcopy(module.discriminator)
    fit(module, batches(), callbacks=[Extragradient(), R1Penalty(0.5)])
    parameters = [list(discriminator.parameters()), list(generator.parameters())]
    optimizers = [EXTRA[name](p) for p in parameters]
    for batch in batches():
        kept = [[p.detach().clone() for p in player] for player in parameters]
        _set_gradients(generator, discriminator, batch, parameters, clip_norm)
        _step(optimizers)
        half = [[p.detach().clone() for p in player] for player in parameters]
        _set_gradients(generator, discriminator, batch, parameters, clip_norm)
        _step(optimizers)
        with torch.no_grad():  # the step that was made at w½, made from w
            for player, before, between in zip(parameters, kept, half, strict=True):
                for p, w, w_half in zip(player, before, between, strict=True):
                    p.copy_(w + (p - w_half))
    close(module, generator, discriminator)


def _set_gradients(generator, discriminator, batch, parameters, clip_norm):
    for player, loss in zip(parameters, losses(generator, discriminator, batch, NonSaturating(), r1=0.5), strict=True):
        for p, g in zip(player, torch.autograd.grad(loss, player, retain_graph=True, allow_unused=True), strict=True):
            p.grad = g
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(player, clip_norm)


def _step(optimizers):
    for optimizer in optimizers:
        optimizer.step()


def test_extragradient_steps_schedules_once_and_counts_one_step():
    schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)  # noqa: E731
    module = gan(EXTRA["Adam"], g_scheduler=schedule, d_scheduler=schedule)
    run = fit(module, batches(), callbacks=[Extragradient()])
    assert run.global_step == module.iteration == STEPS
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [0.05 / 2**STEPS] * 2


def test_extragradient_takes_both_gradients_from_the_same_latents():
    module, latents = small(), []
    spy_on_samples(module, lambda player, outputs: latents.append((player, outputs.latents[0, 0].item())))
    fit(module, points(2), callbacks=[Extragradient()])
    for i in (0, 4):
        assert latents[i : i + 2] == latents[i + 2 : i + 4]
    assert len(set(latents)) == 4  # of two players in two steps


def test_extragradient_projects_both_half_steps():
    limit = 0.1
    module = gan(EXTRA["SGD"], Wasserstein())
    fit(module, batches(), callbacks=[Extragradient(), WeightClipping(limit)])
    assert weights(module.discriminator).abs().max() == pytest.approx(limit)


def test_extragradient_projects_after_the_step_from_where_it_was():
    """With steps of SGD, w½ = clip(w + u(w)) and w ← clip(w + u(w½)), all by hand."""
    module, limit = gan(EXTRA["SGD"], Minimax()), 0.2
    generator, discriminator = deepcopy(module.generator), deepcopy(module.discriminator)
    fit(module, batches(), callbacks=[Extragradient(), WeightClipping(limit)])
    players = [list(discriminator.parameters()), list(generator.parameters())]
    for batch in batches():
        kept = [[p.detach().clone() for p in player] for player in players]
        for _ in range(2):
            found = losses(generator, discriminator, batch, Minimax())
            slopes = [
                torch.autograd.grad(loss, player, retain_graph=True)
                for loss, player in zip(found, players, strict=True)
            ]
            with torch.no_grad():
                for player, start, slope, bound in zip(players, kept, slopes, (limit, 1e9), strict=True):
                    for p, w, g in zip(player, start, slope, strict=True):
                        p.copy_((w - 0.2 * g).clamp(-bound, bound))
    close(module, generator, discriminator)


class Breaks(AdversarialLoss):
    """Not finite from a given call of the generator's loss on."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def discriminator(self, real, fake):
        return fake - real

    def generator(self, fake, real=None):
        self.call -= 1
        return -fake if self.call > 0 else fake * float("nan")


def test_extragradient_that_is_stopped_stands_where_it_stood():
    """The second look is not finite, when both players are half a step ahead."""
    module = gan(sgd(0.1), loss=Breaks(2 * 2))
    watch = Watch()
    with pytest.raises(FloatingPointError, match="Not finite in the generator's update at step 1"):
        fit(module, batches(), callbacks=[Extragradient(), watch])
    assert torch.equal(weights(module.generator), watch.weights["generator"].cpu())
    assert not module.noise.in_step


class Watch(Callback):
    """Weights before the last batch."""

    def on_train_batch_start(self, trainer, module, *_):
        self.weights = {name: weights(getattr(module, name)) for name in ("generator", "discriminator")}


class Turns(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.plan = ("d", "g") if batch_idx == 0 else ("d",)


@pytest.mark.parametrize("rule", [Extragradient, ConsensusOptimization, CompetitiveGradientDescent])
def test_a_plan_that_changes_in_the_run_is_refused(rule):
    module = gan(sgd(0.1), Minimax())
    with pytest.raises(MisconfigurationException, match=r"steps both players on every batch, but the plan is \('d',\)"):
        fit(module, batches(2), callbacks=[rule(), Turns()])
    assert module.iteration == 1


@pytest.mark.parametrize("rule", [None, Extragradient, ConsensusOptimization, CompetitiveGradientDescent])
def test_a_frozen_network_is_refused(rule):
    module = gan(sgd(0.1), Minimax())
    module.discriminator.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"All parameters of the discriminator are frozen, but it stan"):
        fit(module, batches(1), callbacks=[rule()] if rule else [])


@pytest.mark.parametrize("rule", [ConsensusOptimization, CompetitiveGradientDescent, Unrolling])
def test_sparse_gradients_are_refused_where_they_are_differentiated(rule):
    module = gan(sgd(0.1), Minimax())
    module.discriminator.table = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(MisconfigurationException, match=r"which an embedding with sparse=True cannot: use"):
        fit(module, batches(1), callbacks=[rule()])


# ---------- Consensus optimization


@pytest.mark.parametrize("loss", [Minimax(), NonSaturating(), Hinge(), Wasserstein()])
@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop"])
@pytest.mark.parametrize(("r1", "r2"), [(0.0, 0.0), (0.6, 0.4)])
def test_consensus_against_the_dense_jacobian(loss, optimizer, r1, r2):
    gamma = 0.7
    module = gan(EXTRA[optimizer], deepcopy(loss))
    generator, discriminator = deepcopy(module.generator), deepcopy(module.discriminator)
    penalties = [R1Penalty(r1), R2Penalty(r2)] if r1 else []
    fit(module, batches(), callbacks=[ConsensusOptimization(gamma), *penalties])
    parameters = [*discriminator.parameters(), *generator.parameters()]
    n = len(list(discriminator.parameters()))
    optimizers = [EXTRA[optimizer](parameters[:n]), EXTRA[optimizer](parameters[n:])]
    for batch in batches():
        l_d, l_g = losses(generator, discriminator, batch, loss, r1, r2)
        v = torch.cat([_flat(l_d, parameters[:n]), _flat(l_g, parameters[n:])])
        jacobian = torch.stack([_flat(x, parameters) for x in v]).detach()
        w = v.detach() + gamma * jacobian.T @ v.detach()
        for p, g in zip(parameters, w.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        _step(optimizers)
    close(module, generator, discriminator)


def _flat(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, parameters, strict=True)]
    )


class Aside(Regularizer):
    """Brings in a parameter of the discriminator that the discriminator's own loss does not have."""

    player = "g"

    def penalty(self, module, outputs):
        return (module.discriminator.aside * outputs.fake).sum(1).square()


def test_consensus_weighs_parameters_that_the_pull_alone_reaches():
    moves = []
    for gamma in (0.0, 1e-3, 2e-3):
        module = gan(sgd(0.1))
        module.discriminator.aside = nn.Parameter(torch.ones(2, dtype=torch.float64))
        fit(module, batches(1), callbacks=[ConsensusOptimization(gamma), Aside()])
        moves.append((module.discriminator.aside - 1).detach())
    assert not moves[0].any()
    assert moves[1].all()
    torch.testing.assert_close(moves[2], 2 * moves[1])


def test_consensus_without_gamma_is_simultaneous():
    from lightning_gan_stability import Simultaneous

    found = []
    for rule in (ConsensusOptimization(0.0), Simultaneous()):
        module = gan(EXTRA["SGD"])
        fit(module, batches(), callbacks=[rule])
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


# ---------- Competitive gradient descent


@pytest.mark.parametrize(
    "loss",
    [Minimax(), Wasserstein(), FDivergence("pearson"), FDivergence("jensen_shannon")],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("r1", [0.0, 0.6])
def test_competitive_against_the_dense_solution(loss, adaptive, r1):
    rate = {"d": 0.3, "g": 0.7}
    module = gan(sgd(0.0), deepcopy(loss), d_optimizer=sgd(rate["d"]), g_optimizer=sgd(rate["g"]))
    generator, discriminator = deepcopy(module.generator), deepcopy(module.discriminator)
    penalties = [R1Penalty(r1)] if r1 else []
    rule = CompetitiveGradientDescent(adaptive, beta=0.9, eps=0.5, tolerance=1e-14)
    fit(module, batches(), callbacks=[rule, *penalties])
    theta, psi = list(generator.parameters()), list(discriminator.parameters())
    squares = {"d": 0.0, "g": 0.0}
    for t, batch in enumerate(batches(), start=1):
        l_d, l_g = losses(generator, discriminator, batch, loss, r1)
        g_g, g_d = _flat(l_g, theta).detach(), _flat(l_d, psi).detach()
        mixed = torch.stack([_flat(x, psi) for x in _flat(l_g, theta)]).detach()  # D_θψ of L_G
        eta = {}
        for player, g in (("g", g_g), ("d", g_d)):
            squares[player] = 0.9 * squares[player] + 0.1 * g**2
            scale = (squares[player] / (1 - 0.9**t)).sqrt() + 0.5 if adaptive else torch.ones_like(g)
            eta[player] = torch.diag(rate[player] / scale)
        # Δθ = −η_g (∇_θ L_G + D_θψ Δψ), Δψ = −η_d (∇_ψ L_D − D_ψθ Δθ), solved as one system
        n, m = len(g_g), len(g_d)
        system = torch.eye(n + m, dtype=torch.float64)
        system[:n, n:] = eta["g"] @ mixed
        system[n:, :n] = -eta["d"] @ mixed.T
        move = torch.linalg.solve(system, -torch.cat([eta["g"] @ g_g, eta["d"] @ g_d]))
        with torch.no_grad():
            for p, s in zip([*theta, *psi], move.split([p.numel() for p in [*theta, *psi]]), strict=True):
                p.add_(s.view_as(p))
    close(module, generator, discriminator)


def test_memory_of_a_module_of_the_same_age_is_forgotten():
    rule, found = CompetitiveGradientDescent(adaptive=True), []
    fit(gan(sgd(0.1), Minimax()), batches(), callbacks=[rule])
    for callback in (rule, CompetitiveGradientDescent(adaptive=True)):
        module = gan(sgd(0.1), Minimax())
        module.iteration = STEPS
        fit(module, batches(), callbacks=[callback])
        found.append(weights(module))
    assert torch.equal(*found)


def test_a_player_without_a_rate_rests():
    module = gan(sgd(0.0), Minimax(), d_optimizer=sgd(0.3))
    before = weights(module.generator)
    fit(module, batches(), callbacks=[CompetitiveGradientDescent()])
    assert torch.equal(before, weights(module.generator))
    assert weights(module.discriminator).isfinite().all()


@pytest.mark.parametrize("loss", [Minimax(), Wasserstein(), *(FDivergence(k) for k in ("kl", "neyman", "gan"))])
def test_zero_sum_losses_sum_to_a_constant_of_the_real_logits(loss):
    assert loss.zero_sum
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64, requires_grad=True)
    total = loss.discriminator(real, fake) + loss.generator(fake, real)
    assert torch.autograd.grad(total.sum(), fake)[0].abs().max() < 1e-12
    assert not NonSaturating().zero_sum
    assert not FDivergence("kl", saturating=False).zero_sum


def test_conjugate_gradients_solve_a_dense_system():
    torch.manual_seed(0)
    a = torch.randn(7, 7, dtype=torch.float64)
    a, b = a @ a.T + torch.eye(7), torch.randn(7, dtype=torch.float64)
    products = []
    x = conjugate_gradients(lambda v: products.append(1) or a @ v, b, 1e-12, 50)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    assert len(products) <= 9
    assert torch.equal(conjugate_gradients(lambda v: a @ v, 0 * b, 1e-12, 50), 0 * b)


def test_conjugate_gradients_need_one_product_for_a_scalar():
    products = []
    x = conjugate_gradients(lambda v: products.append(1) or 3 * v, torch.tensor([6.0]), 1e-10, 50)
    assert (x.item(), len(products)) == (2.0, 1)


# ---------- what is refused


RULES = [Extragradient, ConsensusOptimization, CompetitiveGradientDescent]


def zero_sum():
    return small(loss=Minimax(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_scaler_is_refused(rule):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=rf"^{rule.__name__} takes both gradients before either step"):
        fit(zero_sum(), points(1), callbacks=[rule()], plugins=[plugin])
    fit(zero_sum(), points(2), callbacks=[rule()], precision="bf16-mixed")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plan", [("d",), ("d", "d", "g")])
def test_a_plan_that_does_not_move_both_once_is_refused(rule, plan):
    module = zero_sum()
    module.plan = plan
    with pytest.raises(
        MisconfigurationException, match=rf"^{rule.__name__} steps both players on every batch, but the"
    ):
        fit(module, points(1), callbacks=[rule()])
    module.plan = ("g", "d")
    fit(module, points(1), callbacks=[rule()])


@pytest.mark.parametrize("rule", [ConsensusOptimization, CompetitiveGradientDescent])
def test_micro_batches_are_refused(rule):
    module = zero_sum()
    module.accumulate = 2
    with pytest.raises(
        MisconfigurationException, match=rf"^{rule.__name__} differentiates gradients of the whole batch"
    ):
        fit(module, points(1), callbacks=[rule()])


def test_extragradient_takes_micro_batches():
    found = []
    for accumulate in (1, 3):
        module = small(d_optimizer=sgd(0.1), g_optimizer=sgd(0.1), accumulate=accumulate).double()
        fit(module, points(3, dtype=torch.float64), callbacks=[Extragradient()])
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "loss", [NonSaturating(), Hinge(), FDivergence("kl", saturating=False)], ids=lambda x: type(x).__name__
)
def test_competitive_refuses_other_games_by_name(loss):
    module = small(loss=loss, d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    expected = rf"solves zero-sum games, and {type(loss).__name__} is not one: use Minimax, Wasserstein or"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(module, points(1), callbacks=[CompetitiveGradientDescent()])


def test_competitive_takes_a_loss_of_your_own_that_says_so():
    class Linear(AdversarialLoss):
        zero_sum = True

        def discriminator(self, real_logits, fake_logits):
            return fake_logits - real_logits

        def generator(self, fake_logits, real_logits=None):
            return -fake_logits

    module = small(loss=Linear(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    fit(module, points(2), callbacks=[CompetitiveGradientDescent()])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.SGD([{"params": [q], "maximize": i > 0} for i, q in enumerate(p)], lr=0.1),
    ],
    ids=["Adam", "momentum", "weight decay", "maximize", "maximize in a later group"],
)
def test_competitive_refuses_other_optimizers(optimizer):
    module = small(loss=Minimax(), d_optimizer=sgd(0.1), g_optimizer=optimizer)
    sentence = "takes its step sizes from plain SGD without momentum, weight decay and maximize, but found"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(module, points(1), callbacks=[CompetitiveGradientDescent()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConsensusOptimization(-1.0), "`gamma` must be a finite number that is not negative, got -1.0."),
        (lambda: CompetitiveGradientDescent("yes"), "`adaptive` must be True or False, got 'yes'."),
        (lambda: CompetitiveGradientDescent(beta=1.0), r"`beta` must be in \[0, 1\), got 1.0."),
        (lambda: CompetitiveGradientDescent(eps=0.0), "`eps` must be a positive finite number, got 0.0."),
        (lambda: CompetitiveGradientDescent(tolerance=-1), "`tolerance` must be a finite number that is not neg"),
        (lambda: CompetitiveGradientDescent(max_iterations=0), "`max_iterations` must be a positive integer, got 0."),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_softplus_of_the_reference_is_the_loss():
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(NonSaturating().generator(x), softplus(-x))
