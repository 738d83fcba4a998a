"""Spectral norm on any network, remembered and removable; weight clipping after every step."""

from itertools import pairwise

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from toys import fit, points, sgd, small, tensors, trainer, weights

from lightning_gan_stability import (
    MLP,
    DCGANDiscriminator,
    Extragradient,
    GANModule,
    GeneratorEMA,
    Lookahead,
    R1Penalty,
    ResNetDiscriminator,
    SpectralNorm,
    Wasserstein,
    WeightClipping,
)
from lightning_gan_stability.layers import normalize_spectrum

# ---------- SpectralNorm


def matrices(network):
    """What the layers multiply with, as matrices, in eval mode."""
    network.eval()
    found = []
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            found.append(layer.weight.detach().transpose(0, 1).flatten(1))
        elif isinstance(getattr(layer, "weight", None), torch.Tensor):
            found.append(layer.weight.detach().flatten(1))
    return found


def largest(network):
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in matrices(network)])


def applied(module, *callbacks, n=0):
    """The module after the callbacks' setup, and n batches."""
    if n:
        fit(module, points(n), callbacks=list(callbacks))
        return module
    run = trainer(callbacks=list(callbacks))
    module.trainer = run
    for callback in callbacks:
        callback.setup(run, module, "fit")
    return module


def images(discriminator):
    return GANModule(nn.Linear(4, 4), discriminator, 4)


@pytest.mark.parametrize("factor", [1.0, 0.5, 7.0])
def test_singular_values_are_the_factor(factor):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, stride=2),
        nn.Conv1d(5, 7, 2),
        nn.Conv3d(2, 3, 2),
        nn.Embedding(10, 4),
        nn.Linear(6, 9, bias=False),
        nn.Bilinear(3, 4, 5),
    )
    applied(images(network), SpectralNorm(factor=factor, n_power_iterations=3))
    for _ in range(50):  # in train mode every look is a step of power iteration
        _ = [layer.weight for layer in network if hasattr(layer, "weight")]
    torch.testing.assert_close(largest(network), torch.full((7,), factor), rtol=1e-4, atol=1e-4)
    for layer in network:
        if hasattr(layer, "weight"):
            assert "weight" in layer.parametrizations


def test_power_iteration_converges_as_the_ratio_of_the_largest_singular_values():
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    normalize_spectrum(layer, "weight")
    spectral = layer.parametrizations.weight[0]
    spectral._u.copy_(torch.full((3,), 3**-0.5))
    spectral._v.copy_(torch.full((3,), 3**-0.5))
    estimates = [(3 / layer.weight[0, 0]).item() for _ in range(6)]
    assert estimates[-1] == pytest.approx(3, abs=1e-2)
    errors = [3 - estimate for estimate in estimates]
    assert all(b < a for a, b in pairwise(errors))


def test_each_forward_pass_in_train_mode_is_n_power_iterations():
    torch.manual_seed(0)
    one, three = nn.Linear(6, 6), nn.Linear(6, 6)
    three.load_state_dict(one.state_dict())
    normalize_spectrum(one, "weight")
    normalize_spectrum(three, "weight", n_power_iterations=3)
    three.parametrizations.weight[0].load_state_dict(one.parametrizations.weight[0].state_dict())
    for layer in (one, three):
        layer(torch.ones(1, 6))
    for _ in range(2):
        one(torch.ones(1, 6))
    torch.testing.assert_close(one.parametrizations.weight[0]._u, three.parametrizations.weight[0]._u)


def test_networks_of_the_package():
    module = applied(images(DCGANDiscriminator(1, 8, 4, num_classes=3)), SpectralNorm())
    for _ in range(40):
        _ = [layer.weight for layer in module.discriminator.train().modules() if hasattr(layer, "weight")]
    torch.testing.assert_close(largest(module.discriminator), torch.ones(3), rtol=1e-3, atol=1e-3)


def test_a_layer_that_starts_at_zero_is_refused():
    """As in R3GAN's residual blocks: 0 / 0."""
    expected = r"Conv2d layer `discriminator.layers.1.layers.4`, which has weights that are all zero"
    with pytest.raises(MisconfigurationException, match=expected):
        applied(images(ResNetDiscriminator(1, 8, 4)), SpectralNorm())


def test_attention_and_layers_of_your_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.mixing_weight = nn.Parameter(torch.randn(4, 4))
            self.position = nn.Parameter(torch.randn(3, 4))
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            x = x[:, None] + self.position
            x, _ = self.attention(x, x, x)
            return self.head((x @ self.mixing_weight).mean(1))

    module = GANModule(MLP([4, 8, 4]), Own(), 4)
    names = {"in_proj_weight", "out_proj", "mixing_weight", "head"}
    fit(module, [torch.randn(8, 4)] * 2, callbacks=[SpectralNorm()])
    keys = {key for key in module.discriminator.state_dict() if key.endswith("._u")}
    assert len(keys) == 4
    assert all(any(name in key for key in keys) for name in names)
    assert "position" in module.discriminator.state_dict()


def test_normalized_layers_keep_their_norm():
    torch.manual_seed(0)
    network = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(2, 4), n_power_iterations=2),
        nn.utils.spectral_norm(nn.Linear(4, 4)),  # the older one
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 1),
        nn.LayerNorm(1),
        nn.PReLU(),
    )
    before = [parametrize.is_parametrized(layer) for layer in network]
    module = GANModule(MLP([4, 2]), network, 4)
    fit(module, points(2), callbacks=[SpectralNorm()])
    assert before == [True, False, True, False, False, False]
    assert len(network[0].parametrizations.weight) == 1
    assert network[0].parametrizations.weight[0].n_power_iterations == 2
    assert not parametrize.is_parametrized(network[1])
    assert len(network[2].parametrizations.weight) == 2  # on top of weight normalization
    assert len(network[3].parametrizations.weight) == 1
    assert not parametrize.is_parametrized(network[4])


def test_a_second_fit_normalizes_once():
    module = applied(small(), SpectralNorm(factor=2.0), n=2)
    keys = list(module.state_dict())
    fit(module, points(2), callbacks=[SpectralNorm(factor=2.0)])
    assert list(module.state_dict()) == keys


def test_the_same_weights_are_trained():
    """The parameters keep their identity, so that it does not matter when optimizers are made."""
    module = small()
    before = {id(p) for p in module.discriminator.parameters()}
    applied(module, SpectralNorm())
    assert {id(p) for p in module.discriminator.parameters()} == before


def test_parts_of_networks_by_name():
    module = applied(small(), SpectralNorm(["generator.layers.0", "discriminator"]))
    normalized = [name for name, layer in module.named_modules() if parametrize.is_parametrized(layer)]
    assert normalized == ["generator.layers.0", "discriminator.layers.0", "discriminator.layers.2"]


def test_global_random_state_stays():
    torch.manual_seed(0)
    module = small()
    before = torch.get_rng_state()
    applied(module, SpectralNorm())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("factor", "iterations"), [(1.0, 1), (0.7, 1), (1.0, 4), (3.0, 2)])
def test_a_checkpoint_needs_no_callback(factor, iterations):
    module = small()
    callbacks = [SpectralNorm(["generator", "discriminator"], factor, iterations), R1Penalty(0.1)]
    run = fit(module, points(3), callbacks=callbacks, enable_checkpointing=True)
    run.save_checkpoint("model.ckpt")
    networks = {"generator": MLP([4, 16, 2]), "discriminator": MLP([2, 16, 1])}
    loaded = GANModule.load_from_checkpoint("model.ckpt", weights_only=True, **networks)
    assert list(loaded.state_dict()) == list(module.state_dict())
    z = torch.randn(3, 4)
    for mode in (False, True):  # in train mode the number of iterations shows
        module.train(mode), loaded.train(mode)
        assert torch.equal(module.sample(3, latents=z), loaded.sample(3, latents=z))
        assert torch.equal(module.logits(points(1)[0]), loaded.logits(points(1)[0]))


def test_a_checkpoint_with_a_normalized_average_needs_no_callback():
    module = small()
    callbacks = [SpectralNorm(["generator", "discriminator"], 2.0), GeneratorEMA(decay=0.5)]
    fit(module, points(3), callbacks=callbacks, enable_checkpointing=True).save_checkpoint("model.ckpt")
    networks = {"generator": MLP([4, 16, 2]), "discriminator": MLP([2, 16, 1])}
    loaded = GANModule.load_from_checkpoint("model.ckpt", weights_only=True, **networks).eval()
    z = torch.randn(3, 4)
    assert torch.equal(loaded.sample(3, latents=z), module.eval().sample(3, latents=z))
    other = small(seed=1)
    other.load_state_dict(module.state_dict())  # as Lightning does after processes that it spawned
    assert torch.equal(other.eval().sample(3, latents=z), module.sample(3, latents=z))


def test_the_average_is_as_normal_as_the_generator():
    torch.manual_seed(0)
    adam = lambda p: torch.optim.Adam(p, lr=5e-3)  # noqa: E731
    module = GANModule(MLP([8, 32, 32, 2]), MLP([2, 16, 1]), 8, g_optimizer=adam, d_optimizer=adam)
    fit(module, points(200, 16), callbacks=[SpectralNorm(["generator"], 2.0), GeneratorEMA(decay=0.98)])
    torch.testing.assert_close(largest(module.generator_ema), torch.full((3,), 2.0), rtol=0.03, atol=0)


def test_another_factor_in_a_second_fit_holds():
    module = applied(small(), SpectralNorm(), n=3)
    fit(module, points(50), callbacks=[SpectralNorm(factor=3.0, n_power_iterations=2)])
    torch.testing.assert_close(largest(module.discriminator), torch.full((2,), 3.0), rtol=1e-3, atol=0)
    fit(module.train(), points(50), callbacks=[SpectralNorm()])
    torch.testing.assert_close(largest(module.discriminator), torch.full((2,), 1.0), rtol=1e-3, atol=0)


def saved(callbacks):
    run = fit(small(), points(3), callbacks=callbacks, enable_checkpointing=True)
    run.save_checkpoint("model.ckpt")
    return "model.ckpt"


def test_resuming_a_run_that_was_not_normalized_is_an_error():
    sentence = (
        "The module has spectral norm on `discriminator.layers.0`, but the checkpoint was trained without it: remove"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(small(), points(6), callbacks=[SpectralNorm()], ckpt_path=saved([]), max_epochs=2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (2.0, 1.0)])
def test_a_factor_that_is_given_holds_in_a_resumed_run(before, after):
    module, path = small(), saved([SpectralNorm(factor=before)])
    fit(module, points(3), callbacks=[SpectralNorm(factor=after, n_power_iterations=9)], ckpt_path=path, max_epochs=9)
    torch.testing.assert_close(largest(module.discriminator), torch.full((2,), after), rtol=1e-2, atol=0)


def test_older_spectral_norm():
    module = small()
    nn.utils.spectral_norm(module.discriminator.layers[0])
    applied(module, SpectralNorm())  # leaves it alone
    with pytest.raises(MisconfigurationException, match=r"has torch.nn.utils.spectral_norm: use torch"):
        applied(module, SpectralNorm(factor=2.0))
    module.logits(points(1)[0])
    logits = module.eval().logits(points(1)[0])
    SpectralNorm.remove(module)
    assert torch.equal(module.logits(points(1)[0]), logits)
    assert sorted(module.state_dict()) == sorted(small().state_dict())


def test_older_spectral_norm_beside_layers_without_one():
    """All are normalized, each in its own way."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 8), n_power_iterations=9), nn.ReLU(), nn.Linear(8, 1))
    module = GANModule(MLP([4, 2]), network, 4)
    fit(module, points(20), callbacks=[SpectralNorm()])
    for layer in (network[0], network[2]):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside others"])
def test_older_weight_norm_is_refused_by_the_layer_s_name(others):
    layers = [nn.utils.weight_norm(nn.Linear(2, 8)), nn.ReLU(), nn.Linear(8, 1)]
    network = nn.Sequential(*[nn.utils.spectral_norm(nn.Linear(2, 2))] * others, *layers)
    module = GANModule(MLP([4, 2]), network, 4)
    name = f"Linear layer `discriminator.{others}`, which has torch.nn.utils.weight_norm: use torch.nn.utils.param"
    with pytest.raises(MisconfigurationException, match=rf"SpectralNorm cannot normalize the {name}"):
        fit(module, points(1), callbacks=[SpectralNorm()])
    assert module.iteration == 0


def test_factor_keeps_its_digits_in_a_cast_checkpoint():
    module = small().double()
    fit(module, points(1, dtype=torch.float64), callbacks=[SpectralNorm(factor=1 / 3)])
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors(module.state_dict()).items()}
    assert module.bfloat16().discriminator.layers[0].parametrizations.weight[1].factor == 1 / 3
    assert sum(key.endswith("_extra_state") for key in state) == 2


def test_remove_bakes_it_in():
    module = applied(small(), SpectralNorm(["generator", "discriminator"], factor=2.0), n=3)
    module.eval()
    x, z = points(1)[0], torch.randn(3, 4)
    logits, samples = module.logits(x), module.sample(3, latents=z)
    SpectralNorm.remove(module.train())
    assert module.training
    module.eval()
    torch.testing.assert_close(module.logits(x), logits, rtol=0, atol=0)
    torch.testing.assert_close(module.sample(3, latents=z), samples, rtol=0, atol=0)
    assert sorted(module.state_dict()) == sorted(small().state_dict())
    exported = torch.export.export(module.generator, (z,)).module()
    torch.testing.assert_close(exported(z), samples)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_only_training_normalizes(stage):
    module = small()
    SpectralNorm().setup(trainer(), module, stage)
    assert not any(parametrize.is_parametrized(layer) for layer in module.modules())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"networks": []}, r"`networks` must be the name of a network or several, got \[\]."),
        ({"networks": ""}, "`networks` must be the name of a network or several, got ''."),
        ({"networks": None}, "`networks` must be the name of a network or several, got None."),
        ({"networks": True}, "`networks` must be the name of a network or several, got True."),
        (
            {"networks": ["generator", 3]},
            r"`networks` must be the name of a network or several, got \['generator', 3\].",
        ),
        ({"factor": 0.0}, "`factor` must be a positive finite number, got 0.0."),
        ({"factor": -1}, "`factor` must be a positive finite number, got -1."),
        ({"n_power_iterations": 0}, "`n_power_iterations` must be a positive integer, got 0."),
    ],
)
def test_bad_arguments_of_spectral_norm(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpectralNorm(**kwargs)


@pytest.mark.parametrize("name", ["critic", "discriminator.layers.9", "generator_ema", "discriminator.layers.0.weight"])
def test_a_network_that_is_not_there(name):
    expected = rf"^SpectralNorm: the module has no `{name}`, but it has generator, discriminator\.$"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(small(), points(1), callbacks=[SpectralNorm(name)])


def test_nothing_to_normalize():
    module = GANModule(MLP([4, 2]), nn.Sequential(nn.PReLU(), nn.LayerNorm(2)), 4)
    with pytest.raises(MisconfigurationException, match="`discriminator` has no weight of two or more dimensions"):
        fit(module, points(1), callbacks=[SpectralNorm()])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.GRUCell(2, 2), "GRUCell layer `discriminator.1`, which is recurrent"),
        (nn.LSTM(2, 2), "LSTM layer `discriminator.1`, which is recurrent and names its weights differently"),
        (nn.LazyLinear(3), "LazyLinear layer `discriminator.1`, which has no weights before its first forward pass"),
        (nn.Embedding(3, 2, max_norm=1.0), "Embedding layer `discriminator.1`, which changes its weights in place"),
        (nn.Embedding(3, 2, sparse=True), "Embedding layer `discriminator.1`, which changes its weights in place"),
        (
            nn.EmbeddingBag(3, 2, max_norm=1.0),
            "EmbeddingBag layer `discriminator.1`, which changes its weights in place",
        ),
    ],
)
def test_layers_that_cannot_be_normalized(layer, reason):
    module = GANModule(MLP([4, 2]), nn.Sequential(nn.Linear(2, 2), layer), 4)
    with pytest.raises(MisconfigurationException, match=rf"^SpectralNorm cannot normalize the {reason}"):
        applied(module, SpectralNorm())


# ---------- WeightClipping


class Largest(Callback):
    """The largest weight of the discriminator whenever the generator takes its gradient, and at the end of a batch."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if optimizer is trainer.optimizers[1]:
            self.seen.append(weights(module.discriminator).abs().max().item())

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append(weights(module.discriminator).abs().max().item())


@pytest.mark.parametrize("limit", [0.01, 0.05])
def test_weights_are_clipped_after_every_step(limit):
    largest = Largest()
    module = small(loss=Wasserstein(), d_optimizer=sgd(1.0), g_optimizer=sgd(1.0))
    module.plan = ("d", "d", "g")
    fit(module, points(4), callbacks=[largest, WeightClipping(limit)])
    assert len(largest.seen) == 8
    assert all(value == pytest.approx(limit, rel=1e-6) for value in largest.seen)
    assert weights(module.generator).abs().max() > limit


def test_lookahead_stays_in_the_box():
    module = small(loss=Wasserstein(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    for callbacks in ([WeightClipping(0.05), Lookahead(k=2)], [Lookahead(k=2), WeightClipping(0.05)]):
        fit(module, points(2), callbacks=callbacks)
        assert weights(module.discriminator).abs().max() <= 0.05


def test_frozen_weights_are_not_clipped():
    module = small(loss=Wasserstein(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    first, last = module.discriminator.layers[0], module.discriminator.layers[2]
    before = weights(first.requires_grad_(False))
    fit(module, points(2), callbacks=[WeightClipping(0.01)])
    assert torch.equal(weights(first), before)
    assert weights(last).abs().max() <= 0.01


def test_biases_and_normalization_layers_are_clipped_too():
    module = GANModule(MLP([4, 2]), nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)), 4)
    fit(module, points(1), callbacks=[WeightClipping(0.02)])
    assert all(p.abs().max() <= 0.02 for p in module.discriminator.parameters())


def test_the_generator_can_be_clipped():
    module = small(g_optimizer=sgd(1.0))
    fit(module, points(2), callbacks=[WeightClipping(0.03, network="generator")])
    assert weights(module.generator).abs().max() <= 0.03
    assert weights(module.discriminator).abs().max() > 0.03


def test_nothing_is_left_behind_after_a_fit():
    module = small(d_optimizer=sgd(1.0))
    clipping = WeightClipping(0.01)
    for _ in range(2):
        run = fit(module, points(2), callbacks=[clipping])
        assert not run.optimizers[0]._optimizer_step_post_hooks
    assert weights(module.discriminator).abs().max() <= 0.01
    fit(module, points(2))
    assert weights(module.discriminator).abs().max() > 0.01


def test_nothing_is_left_behind_after_an_error():
    class Break(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.optimizer = trainer.optimizers[0]
            raise RuntimeError("broken")

    broken = Break()
    with pytest.raises(RuntimeError, match="broken"):
        fit(small(), points(2), callbacks=[WeightClipping(0.01), broken])
    assert not broken.optimizer._optimizer_step_post_hooks


def test_extragradient_clips_too():
    module = small(loss=Wasserstein(), d_optimizer=sgd(1.0))
    fit(module, points(3), callbacks=[WeightClipping(0.02), Extragradient()])
    assert weights(module.discriminator).abs().max() <= 0.02


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"limit": 0}, "`limit` must be a positive finite number, got 0."),
        ({"limit": float("nan")}, "`limit` must be a positive finite number, got nan."),
        ({"network": "critic"}, "`network` must be one of 'discriminator', 'generator', got 'critic'."),
    ],
)
def test_bad_arguments_of_clipping(kwargs, message):
    with pytest.raises(ValueError, match=message):
        WeightClipping(**kwargs)


def test_layers_that_are_unfrozen_later_are_clipped():
    module = small()
    module.discriminator.layers[0].requires_grad_(False)
    first = module.discriminator.layers[0].weight

    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                module.discriminator.layers[0].requires_grad_(True)

    assert first.abs().max() > 0.01
    fit(module, points(4), callbacks=[WeightClipping(0.01), Unfreeze()])
    assert first.abs().max() <= 0.01
