"""Features of real and generated samples, of discriminators that return them and of those that do not."""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import softplus
from toys import fit, points, sgd, small, trainer, weights

from lightning_gan_stability import MLP, FeatureMatching, GANModule, GANOutputs, Simultaneous, Unrolling


def penalty(features, logits=None, **kwargs):
    """Of given real and fake features."""
    logits = torch.zeros(4) if logits is None else logits
    real, fake = features
    outputs = GANOutputs(None, None, fake_logits=logits, real_features=real, fake_features=fake)
    return FeatureMatching(**kwargs).penalty(None, outputs)


ONES, TWOS, FOURS = torch.ones(4, 3), torch.full((4, 3), 2.0), torch.full((4, 2, 5), 4.0)


def test_the_sum_of_mean_absolute_differences():
    real, fake = [ONES, torch.zeros(4, 2, 5)], [TWOS, FOURS]
    assert penalty((real, fake)) == 1 + 4
    assert penalty((real, fake), layer_weights=[3.0, 0.5]) == 3 + 2
    assert penalty((real, fake), layer_weights=[1, 0]) == 1
    keyed = {"a": ONES, "b": 0 * FOURS}, {"a": TWOS, "b": FOURS}
    assert penalty(keyed) == 5
    assert penalty(keyed, layer_weights={"b": 0.25}) == 1 + 1
    assert penalty((ONES, TWOS)) == 1


@pytest.mark.parametrize("kind", [dict, list])
def test_several_discriminators(kind):
    logits = {"x": torch.zeros(4), "y": torch.zeros(4, 2)}
    real, fake = {"x": [ONES], "y": [ONES, ONES]}, {"x": [TWOS], "y": [TWOS, TWOS]}
    names = {"x": 2.0, "y": 0.5}
    if kind is list:
        logits, real, fake = ([*tree.values()] for tree in (logits, real, fake))
        names = {"0": 2.0, "1": 0.5}
    assert penalty((real, fake), logits) == 3
    assert penalty((real, fake), logits, discriminator_weights=[2.0, 0.5]) == 2 + 1
    assert penalty((real, fake), logits, discriminator_weights=names) == 2 + 1
    assert penalty((real, fake), logits, discriminator_weights={next(iter(names)): 0.0}) == 2


def test_real_features_carry_no_gradient():
    real, fake = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    penalty(([real], [fake])).backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, torch.sign(fake - real).detach() / 12)


@pytest.mark.parametrize(
    ("features", "options", "sentence"),
    [
        (
            (None, None),
            {},
            "compares features, but `discriminate` returns none: return \\(logits, features\\), or name",
        ),
        (([ONES], [TWOS, TWOS]), {}, "other features for real samples than for generated ones"),
        (([ONES], [torch.ones(4, 2)]), {}, r"of shape \(4, 3\), with that of generated ones, of shape \(4, 2\)"),
        (([ONES], [TWOS]), {"layer_weights": [1, 2]}, "`layer_weights` has 2 numbers, but there are 1: 0"),
        (([ONES], [TWOS]), {"layer_weights": {"q": 1}}, "`layer_weights` has a weight for 'q', but there are 0"),
        (([ONES], [TWOS]), {"discriminator_weights": [1, 2]}, "`discriminator_weights` has 2 numbers"),
        ((["a"], ["b"]), {}, "features must be tensors, got"),
        (([], []), {}, "compares features, but `discriminate` returns an empty set of them"),
    ],
)
def test_bad_features(features, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        penalty(features, **options)


def test_features_of_other_discriminators_than_the_logits():
    logits = {"x": torch.zeros(4), "y": torch.zeros(4)}
    with pytest.raises(ValueError, match="logits of discriminators x, y, and features of x: `discriminate` must"):
        penalty(({"x": [ONES]}, {"x": [ONES]}), logits)
    flat = [ONES, ONES, ONES, ONES]
    with pytest.raises(
        ValueError, match=r"of discriminators x, y, and features are a list of .*, 4 in all: `discrimin"
    ):
        penalty((flat, flat), logits)


@pytest.mark.parametrize("logits", [{"x": torch.zeros(2), "y": torch.zeros(2)}, [torch.zeros(2), torch.zeros(2)]])
@pytest.mark.parametrize("features", [torch.ones(2, 3), (torch.ones(2, 3),), 5])
def test_several_discriminators_with_features_of_none_of_them(logits, features):
    """Of two samples, too, one tensor is not one feature for each of two discriminators."""
    with pytest.raises(
        ValueError, match=r"of discriminators ., ., and features are a .*must return a dict or list with"
    ):
        penalty((features, features), logits)


@pytest.mark.parametrize("weights_of", [[1.0, 2.0], {"0": 2.0}])
def test_weights_of_discriminators_with_other_names_than_the_layers(weights_of):
    class Renamed(GANModule):
        def discriminate(self, network, sample, condition):
            return {i: part(sample) for i, part in enumerate(network.values())}

    make = lambda: Renamed(MLP([4, 2]), nn.ModuleDict({"a": MLP([2, 8, 1]), "b": MLP([2, 8, 1])}), 4)  # noqa: E731
    fit(make(), points(1), callbacks=[FeatureMatching(layers=["*.layers.0"])])
    matching = FeatureMatching(layers=["*.layers.0"], discriminator_weights=weights_of)
    with pytest.raises(ValueError, match=r"discriminators 0, 1, but layer 'a\.layers\.0' is in none of them: return"):
        fit(make(), points(1), callbacks=[matching])


class Listed(GANModule):
    """Two discriminators that return features."""

    def discriminate(self, network, sample, condition):
        found = [part(sample) for part in network]
        return found, [[logits] for logits in found]


class Numbered(Listed):
    """The same with numbers as keys."""

    def discriminate(self, network, sample, condition):
        return tuple(dict(enumerate(part)) for part in super().discriminate(network, sample, condition))


@pytest.mark.parametrize("layers", [None, ["*.layers.0"]])
def test_discriminators_by_number(layers):
    values = []
    for kind in (Listed, Numbered):
        torch.manual_seed(0)
        module = kind(MLP([4, 2]), nn.ModuleList([MLP([2, 8, 1]), MLP([2, 8, 1])]), 4)
        matching = FeatureMatching(layers=layers, discriminator_weights={"0": 2.0, "1": 0.5})
        fit(module, points(1), callbacks=[matching])
        values.append({name: float(value) for name, value in module.last_step.values.items()})
    assert values[0] == values[1]
    features = ({0: [ONES]}, {0: [ONES]})
    with pytest.raises(ValueError, match="logits of discriminators 0, 1, and features of 0: `discriminate` must"):
        penalty(features, {0: torch.zeros(4), 1: torch.zeros(4)})


def test_features_that_change():
    matching = FeatureMatching()
    outputs = GANOutputs(None, None, fake_logits=torch.zeros(4), real_features=[ONES], fake_features=[TWOS])
    matching.penalty(None, outputs)
    with pytest.raises(ValueError, match="or than on an earlier batch: it must return the same features on every call"):
        matching.penalty(None, outputs.replace(real_features=[ONES, ONES], fake_features=[TWOS, TWOS]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": -1}, "`weight` must"),
        ({"layers": []}, "`layers` must be a list of names"),
        ({"layers": "convs"}, "`layers` must be a list of names"),
        ({"layer_weights": [1, -1]}, r"`layer_weights\[1\]` must"),
        ({"discriminator_weights": {"a": "x"}}, r"`discriminator_weights\['a'\]` must"),
        ({"layer_weights": 2.0}, "`layer_weights` must be a list of numbers, or a dict of them"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FeatureMatching(**options)


# ---------- named layers


class Returns(GANModule):
    """Returns the hidden layers as features."""

    def discriminate(self, network, sample, condition):
        features, x = [], sample
        for layer in network.layers:
            x = layer(x)
            features.append(x)
        return x, features


def gan(kind=GANModule, **kwargs):
    torch.manual_seed(0)
    return kind(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1), **kwargs).double()


def test_named_layers_are_those_that_a_discriminator_returns():
    """Three ways to the same: returned features, named layers, and by hand."""
    batches = points(3, dtype=torch.float64)
    returned, named = gan(Returns), gan()
    latents = []
    draw = named.draw_latents
    named.draw_latents = lambda n: latents.append(draw(n)) or latents[-1]
    d, g = deepcopy(named.discriminator), deepcopy(named.generator)
    fit(returned, batches, callbacks=[FeatureMatching(2.0)])
    fit(named, batches, callbacks=[FeatureMatching(2.0, layers=["layers.*"])])
    assert torch.equal(weights(returned), weights(named))

    def features(x):
        found = []
        for layer in d.layers:
            x = layer(x)
            found.append(x)
        return found

    for i, real in enumerate(batches):
        loss = (softplus(-d(real)) + softplus(d(g(latents[2 * i]).detach()))).mean()
        gradients = torch.autograd.grad(loss, [*d.parameters()])
        with torch.no_grad():
            for p, gradient in zip(d.parameters(), gradients, strict=True):
                p -= 0.1 * gradient
        fake = g(latents[2 * i + 1])
        pairs = zip(features(real), features(fake), strict=True)
        loss = softplus(-d(fake)).mean() + 2 * sum((a.detach() - b).abs().mean() for a, b in pairs)
        gradients = torch.autograd.grad(loss, [*g.parameters()])
        with torch.no_grad():
            for p, gradient in zip(g.parameters(), gradients, strict=True):
                p -= 0.1 * gradient
    expected = torch.cat([p.detach().flatten() for p in (*g.parameters(), *d.parameters())])
    torch.testing.assert_close(weights(named), expected, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
@pytest.mark.parametrize("rule", [None, Unrolling(1), Simultaneous()])
def test_named_layers_under_other_rules_and_compiled(rule, compile):
    torch._dynamo.reset()
    module = small(compile=compile)
    fit(module, points(2), callbacks=[FeatureMatching(layers=["layers.0"]), *([rule] if rule else [])])
    assert module.last_step.values["g/feature_matching"] > 0
    assert module.iteration == 2


def test_layers_of_a_module_dict_belong_to_its_discriminators():
    torch.manual_seed(0)
    discriminators = nn.ModuleDict({"a": MLP([2, 8, 1]), "b": MLP([2, 8, 1])})
    module = GANModule(MLP([4, 16, 2]), discriminators, 4)
    matching = FeatureMatching(layers=["*.layers.0"], discriminator_weights={"a": 0.0})
    fit(module, points(1), callbacks=[matching])
    only = GANModule(MLP([4, 16, 2]), deepcopy(discriminators), 4)
    assert module.last_step.values["g/feature_matching"] > 0
    with pytest.raises(ValueError, match="`discriminator_weights` has a weight for 'c', but there are a, b"):
        fit(
            only,
            points(1),
            callbacks=[FeatureMatching(layers=["*.layers.0"], discriminator_weights={"c": 0.0})],
        )


def test_a_layer_that_runs_several_times():
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    module = GANModule(MLP([4, 2]), nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(2, 1)), 4)
    fit(module, points(2), callbacks=[FeatureMatching(layers=["0"], layer_weights=[1.0, 2.0])])
    assert module.last_step.values["g/feature_matching"] > 0


def test_layers_that_are_not_there_or_do_not_run():
    with pytest.raises(MisconfigurationException, match=r"has no layer 'convs\.\*'; it has layers, layers\.0"):
        fit(small(), points(1), callbacks=[FeatureMatching(layers=["convs.*"])])
    module = small()
    module.discriminator.idle = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="layer 'idle' of the discriminator is watched, but it did not run"):
        fit(module, points(1), callbacks=[FeatureMatching(layers=["idle"])])


class Held(nn.Module):
    """Layers in containers that do not run themselves."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Linear(2, 4), nn.Linear(4, 1)])
        self.heads = nn.ModuleDict({"a": nn.Identity()})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(()))])

    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
        return self.heads["a"](x * self.scales[0])


def test_patterns_leave_out_what_only_holds_layers():
    found = []
    for layers in (["*"], ["c*", "heads.a"], ["convs.0", "convs.1", "heads.a"]):
        torch.manual_seed(0)
        module = GANModule(MLP([4, 2]), Held(), 4)
        fit(module, points(1), callbacks=[FeatureMatching(layers=layers, layer_weights=[1.0, 2.0, 3.0])])
        found.append(float(module.last_step.values["g/feature_matching"]))
    assert found[0] == found[1] == found[2] > 0
    module = GANModule(MLP([4, 2]), Held(), 4)
    for name, kind in (("convs", "ModuleList"), ("heads", "ModuleDict"), ("scales", "ParameterList")):
        with pytest.raises(MisconfigurationException, match=rf"layer '{name}' of the .* a {kind}, which holds layers"):
            fit(module, points(1), callbacks=[FeatureMatching(layers=[name])])
    with pytest.raises(
        MisconfigurationException, match=r"has no layer 'scal\*'; it has convs\.0, convs\.1, heads\.a\."
    ):
        fit(module, points(1), callbacks=[FeatureMatching(layers=["scal*"])])


def test_nobody_watches_after_a_run():
    module = small()
    for _ in range(2):
        fit(module, points(1), callbacks=[FeatureMatching(layers=["layers.0"])])
        assert not module.discriminator.layers[0]._forward_hooks
    assert module.judge(GANOutputs(torch.zeros(1, 2), torch.zeros(1, 2))).fake_activations == {}


def test_nobody_watches_after_an_error():
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop")

    first, second, matching = small(), small(seed=1), FeatureMatching(layers=["layers.0"])
    with pytest.raises(RuntimeError, match="stop"):
        fit(first, points(1), callbacks=[matching, Fails()])
    assert not first.discriminator.layers[0]._forward_hooks
    fit(second, points(1), callbacks=[matching])
    assert second.last_step.values["g/feature_matching"] > 0


def test_two_watch_the_same_layer():
    module = small()
    matching = [FeatureMatching(layers=["layers.0"]), FeatureMatching(layers=["layers.*"])]
    fit(module, points(1), callbacks=matching)
    values = module.last_step.values
    assert 0 < values["g/feature_matching"] < values["g/feature_matching_2"]


# ---------- augmentation, validation


class Jitter(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_real_and_generated_samples_are_augmented_by_the_same_draws():
    """If the generator is exact, sample by sample, there is nothing to match, whatever is drawn."""

    class Exact(GANModule):
        def unpack(self, batch):
            return batch, batch

        def generate(self, network, n, condition, latents):
            return condition + 0 * network(condition)

    torch.manual_seed(0)
    module = Exact(MLP([2, 4, 2]), MLP([2, 16, 1]), None, augment=Jitter())
    fit(module, points(2), callbacks=[FeatureMatching(layers=["layers.*"])])
    assert module.last_step.values["g/feature_matching"] == 0
    pair = module.last_step.pairs[0]
    assert not torch.equal(pair.real, pair.fake)  # the discriminator's turn has draws of its own for each


def test_validation_logs_the_term():
    module = small()
    data = torch.utils.data.DataLoader(points(2), batch_size=None)
    run = trainer(callbacks=[FeatureMatching(3.0, layers=["layers.0"])], max_steps=2)
    run.fit(module, data, data)
    assert run.callback_metrics["val/g/feature_matching"] > 0
    found = run.validate(module, data, verbose=False)
    assert found[0]["val/g/feature_matching"] > 0
