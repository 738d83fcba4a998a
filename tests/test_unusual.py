"""Networks, settings and code of one's own as they are seldom: they work, or a sentence says why not."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader
from toys import fit, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveUpdateRatio,
    AdversarialStart,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    Extragradient,
    FeatureMatching,
    GANCallback,
    GANModule,
    GeneratorEMA,
    Lookahead,
    R1Penalty,
    Reconstruction,
    Regularizer,
    Simultaneous,
    SpectralNorm,
    Unrolling,
    UpdateRule,
    Wasserstein,
    WeightClipping,
)

# ---------- types


class Behind(nn.Module):
    """A network behind a frozen part in another precision, which it does not feed."""

    def __init__(self, network, dtype):
        super().__init__()
        self.frozen = nn.Linear(4, 4).to(dtype).requires_grad_(False)
        self.network = network
        self.seen = []

    def forward(self, x):
        self.seen.append(x.dtype)
        return self.network(x)


def behind(dtype=torch.float16):
    torch.manual_seed(0)
    return GANModule(Behind(MLP([4, 16, 2]), dtype), Behind(MLP([2, 16, 1]), dtype), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_latents_have_the_type_of_what_trains_in_both_turns(dtype):
    module = behind(dtype)
    fit(module, points(2), callbacks=[R1Penalty(0.1)])
    assert set(module.generator.seen) == set(module.discriminator.seen) == {torch.float32}


def test_a_generator_that_does_not_train_at_all():
    module = behind()
    module.generator.requires_grad_(False)
    assert module.eval().sample(3).shape == (3, 2)
    module.train().plan = ("d",)
    fit(module, points(1))
    assert set(module.generator.seen) == {torch.float32}


def test_penalties_are_in_full_precision_beside_a_frozen_part_in_half():
    class Types(Regularizer):
        player = "g"
        differentiates = ()

        def penalty(self, module, outputs):
            self.seen = outputs.fake.dtype, outputs.fake_logits.dtype
            return outputs.fake.mean()

    types = Types()
    fit(behind(), points(1), callbacks=[types], precision="bf16-mixed")
    assert types.seen == (torch.float32, torch.float32)


class Counted(MLP):
    """Keeps a state that is no tensor."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class Quantized(MLP):
    """Has weights of bytes, which do not train."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.table = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("kind", [Counted, Quantized])
@pytest.mark.parametrize("callback", [lambda: GeneratorEMA(decay=0.5), lambda: Lookahead(k=1)])
def test_averages_of_networks_with_other_things(kind, callback):
    module = GANModule(kind([4, 16, 2]), MLP([2, 16, 1]), 4)
    run = fit(module, points(2), callbacks=[callback()])
    run.save_checkpoint("other.ckpt")
    again = GANModule(kind([4, 16, 2]), MLP([2, 16, 1]), 4)
    callbacks = [callback(), *([] if "generator_ema" in str([*module.state_dict()]) else [GeneratorEMA(decay=0.5)])]
    fit(again, points(2), callbacks=callbacks, ckpt_path="other.ckpt", max_epochs=2)
    assert again.iteration == 4


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.spectrum = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x):
        return (self.first(x) * self.spectrum).abs().sum(1, keepdim=True)


@pytest.mark.parametrize(
    "callback",
    [Unrolling(1), ConsensusOptimization(0.1), CompetitiveGradientDescent(), WeightClipping(0.1)],
    ids=lambda c: type(c).__name__,
)
def test_complex_weights_are_refused_by_name(callback):
    module = GANModule(MLP([4, 2]), Complex(), 4, Wasserstein(), sgd(0.1), sgd(0.1))
    with pytest.raises(MisconfigurationException, match=rf"^{type(callback).__name__} .*spectrum` is complex: remove"):
        fit(module, points(1), callbacks=[callback])


@pytest.mark.parametrize("callback", [None, Simultaneous(), Extragradient(), R1Penalty(0.1), GeneratorEMA()])
def test_complex_weights_train(callback):
    module = GANModule(MLP([4, 2]), Complex(), 4)
    before = module.discriminator.spectrum.detach().clone()
    fit(module, points(2), callbacks=[callback] if callback else [])
    assert not torch.equal(module.discriminator.spectrum, before)


# ---------- spectral norm


def test_a_factor_is_loaded_into_networks_with_spectral_norm_of_their_own():
    make = lambda: nn.Sequential(  # noqa: E731
        parametrizations.spectral_norm(nn.Linear(2, 8)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 1))
    )
    torch.manual_seed(0)
    module = GANModule(MLP([4, 16, 2]), make(), 4)
    fit(module, points(3), callbacks=[SpectralNorm(factor=3.0)]).save_checkpoint("norm.ckpt")
    networks = {"generator": MLP([4, 16, 2]), "discriminator": make()}
    loaded = GANModule.load_from_checkpoint("norm.ckpt", weights_only=True, **networks).eval()
    x = torch.randn(5, 2)
    assert torch.equal(loaded.logits(x), module.eval().logits(x))
    assert torch.linalg.matrix_norm(loaded.discriminator[0].weight, 2).item() == pytest.approx(3, rel=0.2)


def test_old_spectral_norm_of_one_weight_does_not_speak_for_others():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 2))
            self.skip_weight = nn.Parameter(5 * torch.ones(1, 2))

        def forward(self, x):
            return (x @ self.weight.t()).sum(1, keepdim=True) + x @ self.skip_weight.t()

    module = GANModule(MLP([4, 2]), nn.utils.spectral_norm(Two()), 4)
    fit(module, points(1), callbacks=[SpectralNorm(n_power_iterations=1)])
    assert torch.linalg.matrix_norm(module.eval().discriminator.skip_weight, 2).item() == pytest.approx(1, rel=1e-3)


# ---------- players that rest or freeze


class Freeze(Callback):
    def __init__(self, network):
        self.network = network

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            module.get_submodule(self.network).requires_grad_(False)


@pytest.mark.parametrize("network", ["discriminator", "generator"])
@pytest.mark.parametrize(
    "callbacks",
    [
        [R1Penalty(1.0)],
        [Unrolling(2)],
        [ConsensusOptimization(0.1)],
        [CompetitiveGradientDescent()],
        [AdaptiveUpdateRatio("gradient_norm"), R1Penalty(1.0)],
        [Extragradient()],
    ],
    ids=lambda callbacks: type(callbacks[0]).__name__,
)
def test_a_network_that_freezes_in_the_middle_is_named(callbacks, network):
    module = small(loss=Wasserstein(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    with pytest.raises(ValueError, match=f"All parameters of the {network} are frozen"):
        fit(module, points(4), callbacks=[*callbacks, Freeze(network)])


@pytest.mark.parametrize("rule", [Unrolling(1), ConsensusOptimization(0.1), CompetitiveGradientDescent()])
def test_rules_that_look_at_the_adversarial_loss_need_it(rule):
    module = small(loss=Wasserstein(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    module.adversarial = False
    sentence = f"^{type(rule).__name__} looks at the adversarial loss on every batch, and `module.adversarial`"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(module, points(1), callbacks=[rule, Reconstruction()])


def test_regularizers_of_the_game_rest_with_it():
    module = small()
    module.adversarial = False
    fit(module, points(1), callbacks=[Reconstruction(), FeatureMatching(layers=["layers.0"])])
    assert {*module.last_step.terms["g"]} == {"reconstruction"}


@pytest.mark.parametrize(
    "callback",
    [AdversarialStart(1), AdaptiveUpdateRatio(generator_rests="adversarial")],
    ids=lambda c: type(c).__name__,
)
def test_a_generator_with_nothing_else_to_learn(callback):
    with pytest.raises(
        MisconfigurationException, match=f"^{type(callback).__name__} pauses the generator's adversarial loss"
    ):
        fit(small(), points(1), callbacks=[callback])


def test_eval_mode_in_the_middle_is_refused():
    class Evaluate(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.eval()

    with pytest.raises(MisconfigurationException, match="module is in eval mode in the middle of training"):
        fit(small(), points(2), callbacks=[Evaluate()])


# ---------- code of one's own


class Half(GANCallback):
    def weigh_terms(self, module, player, outputs, terms):
        return {"adversarial": 0.5}


class HalfGAN(GANModule):
    def adversarial_weight(self, player, outputs):
        return 0.5


RULES = [
    Simultaneous,
    Extragradient,
    lambda: Unrolling(2),
    lambda: ConsensusOptimization(0.1),
    lambda: CompetitiveGradientDescent(tolerance=1e-14),
]


@pytest.mark.parametrize("rule", RULES)
def test_factors_of_callbacks_are_those_of_the_module(rule):
    found = []
    for kind, callbacks in ((HalfGAN, []), (GANModule, [Half()])):
        torch.manual_seed(0)
        networks = MLP([4, 16, 2]), MLP([2, 16, 1])
        module = kind(*networks, 4, Wasserstein(), sgd(0.05), sgd(0.05)).double()
        fit(module, points(3, dtype=torch.float64), callbacks=[rule(), *callbacks])
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


def weighing(factors):
    class Weighs(GANCallback):
        def weigh_terms(self, module, player, outputs, terms):
            return factors

    return [Weighs()]


def penalizing(value, **attributes):
    kind = type("Own", (Regularizer,), {"penalty": lambda *_: value, "differentiates": (), **attributes})
    return [kind()]


@pytest.mark.parametrize(
    ("callbacks", "error", "sentence"),
    [
        (weighing({"adversarail": 0.0}), ValueError, "has a factor for 'adversarail', but the terms are adversarial"),
        (weighing([1.0]), ValueError, "`weigh_terms` of Weighs must return a dict of factors, got"),
        (weighing({"adversarial": None}), ValueError, "must give a number or a scalar tensor for 'adversarial', got"),
        (weighing({"adversarial": torch.ones(2)}), ValueError, "must give a number or a scalar tensor"),
        (penalizing(1.0), ValueError, "`penalty` of Own must return a tensor, got a float"),
        (penalizing(None), ValueError, "`penalty` of Own must return a tensor, got"),
        (
            penalizing(None, player="discriminator"),
            MisconfigurationException,
            "`player` of Own must be 'd' or 'g', got",
        ),
    ],
)
def test_wrong_returns_of_callbacks(callbacks, error, sentence):
    with pytest.raises(error, match=sentence):
        fit(small(), points(1), callbacks=callbacks)


@pytest.mark.parametrize("factors", [None, {}, {"adversarial": torch.tensor([2.0])}, {"adversarial": 2}])
def test_right_returns_of_callbacks(factors):
    fit(small(), points(1), callbacks=weighing(factors))


def own(name, value):
    torch.manual_seed(0)
    return type("Own", (GANModule,), {name: lambda *_: value})(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("adversarial_weight", None, "`adversarial_weight` must give a number or a scalar tensor"),
        ("adversarial_weight", torch.ones(3), "`adversarial_weight` must give a number or a scalar tensor"),
        ("auxiliary_losses", {"x": torch.ones((), dtype=torch.complex64)}, "must return a dict of scalar tensors"),
        ("auxiliary_losses", {"grad_norm": torch.ones(())}, "'grad_norm', which the log has for something else"),
        ("unpack", None, "`unpack` must return samples and a condition"),
        ("unpack", (None, torch.ones(1)), "`unpack` must return samples and a condition"),
    ],
)
def test_wrong_returns_of_modules(name, value, sentence):
    module = own(name, value)
    with pytest.raises(ValueError, match=sentence):
        fit(module, points(1))
    if name == "unpack":
        with pytest.raises(ValueError, match=sentence):
            trainer().validate(module, DataLoader(points(1), batch_size=None), verbose=False)


def test_features_without_rows_in_micro_batches():
    class Features(GANModule):
        def discriminate(self, network, sample, condition):
            return network(sample), {"scale": sample.abs().mean(), "rows": sample}

    torch.manual_seed(0)
    module = Features(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, accumulate=2)
    fit(module, points(1))
    outputs = module.compute_outputs("d", points(1)[0])
    assert outputs.real_features["scale"].dim() == 0


def test_an_unknown_player_in_a_rule():
    class Own(UpdateRule):
        def __call__(self, module, batch):
            module.compute_gradients("generator", batch)

    with pytest.raises(ValueError, match="A player is 'd' or 'g', got 'generator'"):
        fit(small(), points(1), callbacks=[Own()])


@pytest.mark.parametrize("name", ["iteration", "weight", "every", "name"])
def test_names_that_states_cannot_have(name):
    with pytest.raises(ValueError, match=f"`{name}` is an attribute of every callback of its kind"):
        Reconstruction().add_state(name, 0)
    if name != "iteration":
        GANCallback().add_state(name, 0)


@pytest.mark.parametrize("default", [np.float64(1.0), np.zeros(2), {"a": np.int64(3)}, object(), [print]])
def test_states_that_no_checkpoint_can_hold(default):
    if isinstance(default, float):
        default = np.float32(1.0)  # np.float64 is a float
    with pytest.raises(ValueError, match="default of `seen` must be a number, a string, a tensor, None, or lists"):
        GANCallback().add_state("seen", default)


@pytest.mark.parametrize("plan", [5, [["d"]], "dx", []])
def test_wrong_plans(plan):
    with pytest.raises(ValueError, match="`plan` must be a sequence of 'd' and 'g'"):
        small().plan = plan


def test_sources_and_latents_that_cannot_be():
    with pytest.raises(ValueError, match="one batch size as their first dimension"):
        small()(torch.tensor(1.0))
    module = GANModule(MLP([2, 2]), MLP([2, 1]), None)
    with pytest.raises(ValueError, match="There are no latents to draw"):
        module.draw_latents(3)


def test_an_error_of_a_lookup_has_its_name():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer({}["image"])

    with pytest.raises(ValueError, match=r"discriminator failed on an input of shape .*: KeyError: 'image'"):
        fit(GANModule(MLP([4, 2]), Keyed(), 4), points(1))


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_networks_without_parameters(network):
    networks = {"generator": MLP([4, 2]), "discriminator": MLP([2, 1])} | {network: nn.Identity()}
    with pytest.raises(MisconfigurationException, match=f"The {network} has no parameters, and nothing to train"):
        fit(GANModule(**networks, latent_dim=4), points(1))


# ---------- the run around


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}])
def test_trainers_that_log_nothing(options):
    module = small()
    if "barebones" in options:
        options |= {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None} | {
            "enable_model_summary": None,
            "log_every_n_steps": None,
        }
    fit(module, points(2), **options)
    assert module.iteration == 2


class Skips(GANModule):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


def test_a_step_may_skip_a_batch():
    torch.manual_seed(0)
    module = Skips(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)
    fit(module, points(4), callbacks=[R1Penalty(0.1)])
    assert module.iteration == 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("accumulate", {"accumulate": 2}),
        ("d_scheduler", {"d_scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o)}),
    ],
)
def test_a_step_of_ones_own_loses_no_setting_in_silence(name, options):
    class Own(GANModule):
        def training_step(self, batch, batch_idx):
            return None

    module = Own(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, **options)
    with pytest.raises(MisconfigurationException, match=f"so that {name} would do nothing"):
        fit(module, points(1))


def test_a_scheduler_that_is_none():
    with pytest.raises(MisconfigurationException, match="`g_scheduler` must make a scheduler, got"):
        fit(small(g_scheduler=lambda o: None), points(1))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_lightning_s_average_saves_the_clock():
    module = small()
    run = fit(module, points(3), callbacks=[EMAWeightAveraging(decay=0.9)])
    run.save_checkpoint("average.ckpt")
    networks = {"generator": MLP([4, 16, 2]), "discriminator": MLP([2, 16, 1])}
    loaded = GANModule.load_from_checkpoint("average.ckpt", **networks)
    assert (loaded.iteration, loaded.steps) == (3, {"d": 3, "g": 3})


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_an_average_of_a_checkpoint_goes_on():
    class Own(GeneratorEMA):
        """Another class, whose state is in no checkpoint."""

    module = small()
    fit(module, points(3), callbacks=[GeneratorEMA(decay=0.9)]).save_checkpoint("ema.ckpt")
    average = torch.cat([p.flatten() for p in module.generator_ema.parameters()])

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen = torch.cat([p.detach().flatten().clone() for p in module.generator_ema.parameters()])
            trainer.should_stop = True

    look = Look()
    fit(small(seed=1), points(3), callbacks=[Own(decay=0.9, restart=False), look], ckpt_path="ema.ckpt", max_epochs=2)
    assert torch.equal(look.seen, average)


def test_a_rescued_batch_at_the_end_of_an_epoch_still_ends_it():
    class Rescue(GANCallback):
        """Spoils the last batch of the second epoch, and puts the weight back."""

        rescues = True

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.weight = module.generator.layers[0].weight.detach().clone()
            if trainer.is_last_batch and trainer.current_epoch == 1:
                module.generator.layers[0].weight.data.fill_(float("nan"))

        def rescue(self, trainer, module):
            module.generator.layers[0].weight.data.copy_(self.weight)
            return True

    halve = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    module = small(g_scheduler=halve, g_optimizer=sgd(1e-3), d_optimizer=sgd(0.01), scheduler_interval="epoch")
    run = fit(module, points(3), callbacks=[Rescue()], max_epochs=3)
    assert module.iteration == 8
    assert run.optimizers[1].param_groups[0]["lr"] == 1e-3 / 8
