"""What both players see of a batch: samples made once for both, halves of a batch, separate steps of lazy penalties."""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import softplus
from toys import fit, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    Alternating,
    Extragradient,
    GANModule,
    PathLengthPenalty,
    R1Penalty,
    R2Penalty,
    Regularizer,
    Simultaneous,
    Unrolling,
    UpdateRatio,
)
from lightning_gan_stability.optim import lazy_correction


def count_calls(module, name="generator"):
    """How often a network runs."""
    calls = []
    module.get_submodule(name).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def double(seed=0, **kwargs):
    return small(seed, **{"d_optimizer": sgd(0.3), "g_optimizer": sgd(0.2)} | kwargs).double()


# ---------- shared samples


@pytest.mark.parametrize("plan", [("d", "g"), ("g", "d")])
def test_shared_samples_by_hand(plan):
    module = double()
    module.plan = plan
    d, g = deepcopy(module.discriminator), deepcopy(module.generator)
    latents = []
    draw = module.draw_latents
    module.draw_latents = lambda n: latents.append(draw(n)) or latents[-1]
    batches = points(3, dtype=torch.float64)
    fit(module, batches, callbacks=[Alternating(share_fake=True)])
    assert len(latents) == 3
    for real, z in zip(batches, latents, strict=True):
        fake = g(z)  # once, by the weights before the step
        for player in plan:
            if player == "d":
                loss = (softplus(-d(real)) + softplus(d(fake.detach()))).mean()
                gradients = torch.autograd.grad(loss, [*d.parameters()])
            else:
                gradients = torch.autograd.grad(softplus(-d(fake)).mean(), [*g.parameters()])
            with torch.no_grad():
                network, rate = (d, 0.3) if player == "d" else (g, 0.2)
                for p, gradient in zip(network.parameters(), gradients, strict=True):
                    p -= rate * gradient
    expected = torch.cat([p.detach().flatten() for p in (*g.parameters(), *d.parameters())])
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-13)


def test_the_generator_runs_once():
    for share, runs in ((True, 3), (False, 6)):
        module = small()
        calls = count_calls(module)
        fit(module, points(3), callbacks=[Alternating(share_fake=share)])
        assert len(calls) == runs


def test_a_discriminator_alone_makes_samples_without_a_graph():
    module = small()
    calls = count_calls(module)
    module.plan = ("d",)
    fit(module, points(2), callbacks=[Alternating(share_fake=True)])
    assert calls == [False, False]


def test_batch_norm_moves_once():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    module = GANModule(generator, MLP([2, 8, 1]), 4)
    fit(module, points(3), callbacks=[Alternating(share_fake=True)])
    assert generator[1].num_batches_tracked == 3


@pytest.mark.parametrize("d_penalty", [R1Penalty(0.5), R2Penalty(0.5), None])
@pytest.mark.parametrize("g_penalty", [PathLengthPenalty(every=1), None])
def test_penalties_get_what_they_differentiate_by(d_penalty, g_penalty):
    """The sample's own leaves are those of either player: as with passes of its own, whose latents are the same."""
    penalties = [penalty for penalty in (d_penalty, g_penalty) if penalty is not None]
    found = []
    for share in (True, False):
        module = double(d_optimizer=sgd(0.0), g_optimizer=sgd(0.2))  # with D at rest, both turns have one generator
        latents = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        module.draw_latents = lambda n, z=latents: z.clone()
        noise = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        module.noise.randn_like = lambda sample, y=noise: y
        fit(module, points(1, dtype=torch.float64), callbacks=[Alternating(share_fake=share), *deepcopy(penalties)])
        found.append((weights(module), module.last_step.values))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-14)
    for key, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][key], value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("callbacks", [[R1Penalty(0.5)], [R2Penalty(0.5)], [PathLengthPenalty(every=1)], []])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_shared_samples_in_half_precision(precision, callbacks):
    module = small()
    fit(module, points(3), callbacks=[Alternating(share_fake=True), *callbacks], precision=precision)
    assert weights(module).isfinite().all()
    assert module.iteration == 3


def test_a_smaller_ratio_shares_too():
    module = small()
    calls = count_calls(module)
    fit(module, points(4), callbacks=[Alternating(share_fake=True), UpdateRatio(2)])
    assert calls == [False, True, False, True]


def test_what_cannot_share():
    with pytest.raises(ValueError, match=r"`share_fake` makes samples for one batch, and real_batches='split' has two"):
        Alternating(share_fake=True, real_batches="split")
    with pytest.raises(ValueError, match=r"^`real_batches` must be one of"):
        Alternating(real_batches="other")
    with pytest.raises(ValueError, match=r"^`share_fake` must be"):
        Alternating(share_fake=1)
    with pytest.raises(MisconfigurationException, match=r"share_fake=True.* which accumulate=2 would split"):
        fit(small(accumulate=2), points(1), callbacks=[Alternating(share_fake=True)])
    module = small()
    module.discriminator.shared = module.generator.layers[0]
    with pytest.raises(MisconfigurationException, match=r"networks share parameters.* set share_fake=False"):
        fit(module, points(1), callbacks=[Alternating(share_fake=True)])
    module = small()
    module.plan = ("d", "d", "g")
    with pytest.raises(MisconfigurationException, match="Alternating steps every player once, but the plan is"):
        fit(module, points(1), callbacks=[Alternating(share_fake=True)])


# ---------- halves


def seen_by(module):
    """The real samples of each player's turn."""
    seen = {"d": [], "g": []}
    judge = module.compute_samples

    def spy(player, batch, regularizers=None):
        outputs = judge(player, batch, regularizers)
        seen[player].append(outputs.real)
        return outputs

    module.compute_samples = spy
    return seen


@pytest.mark.parametrize(("n", "first"), [(8, 4), (7, 4), (2, 1)])
def test_players_see_halves(n, first):
    module = small()
    seen = seen_by(module)
    (batch,) = points(1, n)
    fit(module, [batch], callbacks=[Alternating(real_batches="split")])
    assert torch.equal(seen["d"][0], batch[:first])
    assert torch.equal(seen["g"][0], batch[first:])


def test_halves_in_micro_batches():
    """A mean over a half does not depend on how it is taken apart."""
    found = []
    for accumulate in (1, 2):
        module = double(accumulate=accumulate)
        fit(module, points(2, dtype=torch.float64), callbacks=[Alternating(real_batches="split")])
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


def test_one_sample_has_no_halves():
    with pytest.raises(ValueError, match="takes a batch apart for the two players, and this one has too few"):
        fit(small(), points(1, 1), callbacks=[Alternating(real_batches="split")])


# ---------- separate steps


def test_a_separate_step_by_hand():
    """StyleGAN2's Dreg: γ/2 · k · R1 alone, by the same optimizer, after the main step, every k batches."""
    k, gamma = 2, 0.7
    adam = lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.1, 0.99))  # noqa: E731
    module = double(d_optimizer=adam)
    d, g = deepcopy(module.discriminator), deepcopy(module.generator)
    latents = []
    draw = module.draw_latents
    module.draw_latents = lambda n: latents.append(draw(n)) or latents[-1]
    batches = points(5, dtype=torch.float64)
    fit(module, batches, callbacks=[R1Penalty(gamma, every=k, separate=True)])
    assert len(latents) == 10  # the penalty on real samples makes no others
    d_optimizer, g_optimizer = adam(d.parameters()), torch.optim.SGD(g.parameters(), 0.2)
    for i, real in enumerate(batches):
        z, again = latents[2 * i : 2 * i + 2]
        d_optimizer.zero_grad()
        (softplus(-d(real)) + softplus(d(g(z).detach()))).mean().backward()
        d_optimizer.step()
        if i % k == 0:
            x = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
            d_optimizer.zero_grad()
            (k * gamma / 2 * slope.square().sum(1).mean()).backward()
            d_optimizer.step()
        g_optimizer.zero_grad()
        softplus(-d(g(again))).mean().backward()
        g_optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in (*g.parameters(), *d.parameters())])
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-13)


def test_a_separate_step_is_a_part_of_its_batch():
    module = small()
    run = fit(module, points(4), callbacks=[R1Penalty(1.0, every=2, separate=True)], log_every_n_steps=1)
    assert run.global_step == module.iteration == 4
    assert module.steps == {"d": 4, "g": 4}
    assert {"d/adversarial", "d/r1", "d/grad_norm", "d/grad_norm/r1"} <= {*module.last_step.values}
    assert module.last_step.pairs[0].real.shape == (8,)


def test_schedulers_count_separate_steps_as_none():
    halve = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    module = small(d_scheduler=halve, d_optimizer=sgd(1.0))
    run = fit(module, points(3), callbacks=[R1Penalty(0.01, separate=True)])
    assert run.optimizers[0].param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("accumulate", [1, 3])
def test_separate_steps_in_micro_batches(accumulate):
    module = double(accumulate=accumulate)
    other = double()
    callbacks = lambda: [R1Penalty(0.5, every=2, separate=True)]  # noqa: E731
    for gan in (module, other):
        fit(gan, points(3, 9, dtype=torch.float64), callbacks=callbacks())
    torch.testing.assert_close(weights(module), weights(other), rtol=0, atol=1e-14)


class Sizes(Regularizer):
    """Notes what it gets."""

    player = "g"
    differentiates = ()

    def __init__(self, shrink=1, **kwargs):
        super().__init__(1.0, **kwargs)
        self.shrink, self.seen = shrink, []

    def penalty(self, module, outputs):
        self.seen.append(outputs)
        return outputs.fake.square().mean()


def test_a_separate_step_on_a_part_of_the_batch():
    sizes = Sizes(shrink=3, separate=True)
    fit(small(), points(1), callbacks=[sizes])
    assert [len(outputs.fake) for outputs in sizes.seen] == [2]
    assert sizes.seen[0].fake_logits.shape == (2,)


@pytest.mark.parametrize("rule", [Simultaneous(), Extragradient(), Unrolling(2)], ids=lambda r: type(r).__name__)
def test_other_rules_have_no_room_for_separate_steps(rule):
    sentence = rf"R1Penalty\(separate=True\) takes a step of its own, which {type(rule).__name__} does not take"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(small(), points(1), callbacks=[rule, R1Penalty(separate=True)])


def test_separate_penalties_do_not_join_the_loss():
    module = small()
    penalties = [R1Penalty(separate=True), R2Penalty(), PathLengthPenalty(separate=True, every=1)]
    trainer(callbacks=penalties, max_steps=0).fit(module, torch.utils.data.DataLoader(points(1), batch_size=None))
    assert module.due("d") == [penalties[1]]
    assert module.due("g") == []


def test_the_correction_of_stylegan2():
    """The numbers of its training loop: k = 4, 16."""
    settings = lazy_correction(4, 0.002, (0.0, 0.99))
    assert settings["lr"] == pytest.approx(0.0016, abs=1e-12)
    assert settings["betas"] == (0.0, pytest.approx(0.9920, abs=5e-5))
    settings = lazy_correction(16, 0.002, (0.0, 0.99))
    assert settings["lr"] == pytest.approx(0.001882, abs=5e-7)
    assert settings["betas"][1] == pytest.approx(0.99059, abs=5e-6)
    for arguments in ((0, 0.1), (2, -1.0), (2, 0.1, (1.0, 0.9))):
        with pytest.raises(ValueError, match="must be"):
            lazy_correction(*arguments)


# ---------- path lengths by an inner latent


class Mapped(nn.Module):
    """A mapping z -> w and a synthesis w -> 3 W w."""

    def __init__(self):
        super().__init__()
        self.mapping = nn.Linear(4, 3, bias=False)
        self.synthesis = nn.Linear(3, 2, bias=False)


class MappedGAN(GANModule):
    def generate(self, network, n, condition, latents):
        w = network.mapping(latents)
        return network.synthesis(w), {"w": w}


def mapped():
    torch.manual_seed(0)
    return MappedGAN(Mapped(), MLP([2, 8, 1]), 4, g_optimizer=sgd(0.0), d_optimizer=sgd(0.0)).double()


@pytest.mark.parametrize("options", [{}, {"shrink": 2}, {"separate": True}, {"separate": True, "shrink": 2}])
def test_path_length_by_w(options):
    """The Jacobian of a linear synthesis is its weight: ‖Wᵀ y‖ with y of variance 1."""
    module = mapped()
    noise = []
    draw = module.noise.randn_like
    module.noise.randn_like = lambda sample: noise.append(draw(sample)) or noise[-1]
    penalty = PathLengthPenalty(1.0, every=1, latents="w", **options)
    fit(module, points(1, dtype=torch.float64), callbacks=[penalty])
    (y,) = noise
    assert len(y) == 8 // options.get("shrink", 1)
    lengths = (y @ module.generator.synthesis.weight).norm(dim=1)
    expected = lengths.square().mean().detach()
    torch.testing.assert_close(module.last_step.values["g/path_length"], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(penalty.means, 0.01 * lengths.mean().detach(), rtol=0, atol=1e-13)


def test_a_separate_path_length_asks_no_discriminator():
    module = mapped()
    calls = count_calls(module, "discriminator")
    fit(module, points(1, dtype=torch.float64), callbacks=[PathLengthPenalty(every=1, latents="w", separate=True)])
    assert len(calls) == 3


def test_path_length_by_something_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"differentiates with respect to `extras\['v'\]`, but `generate` returned a NoneType there"
    ):
        fit(mapped(), points(1, dtype=torch.float64), callbacks=[PathLengthPenalty(every=1, latents="v")])


def test_path_length_by_what_a_source_becomes():
    """Without latents there is still an inner one."""

    class Encoded(GANModule):
        def unpack(self, batch):
            return batch, batch

        def generate(self, network, n, condition, latents):
            w = condition @ network.weight.T
            return 2 * w, {"w": w}

    torch.manual_seed(0)
    module = Encoded(nn.Linear(2, 2, bias=False), MLP([2, 8, 1]), None).double()
    noise = []
    draw = module.noise.randn_like
    module.noise.randn_like = lambda sample: noise.append(draw(sample)) or noise[-1]
    fit(module, points(1, dtype=torch.float64), callbacks=[PathLengthPenalty(1.0, every=1, latents="w")])
    expected = (2 * noise[0]).norm(dim=1).square().mean()
    torch.testing.assert_close(module.last_step.values["g/path_length"], expected, rtol=0, atol=1e-13)
    with pytest.raises(MisconfigurationException, match="PathLengthPenalty measures how samples depend on latents"):
        fit(module, points(1, dtype=torch.float64), callbacks=[PathLengthPenalty()])
