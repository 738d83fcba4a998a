"""What networks get and give back, and the sentence that says what is wrong with it; without a Trainer."""

import re
from typing import NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from toys import small

from lightning_gan_stability import MLP, BoundaryEquilibrium, GANModule, GANOutputs, NonSaturating, Packed
from lightning_gan_stability.networks import NetworkRunner, call_network, check_condition, check_samples


class Scene(NamedTuple):
    image: torch.Tensor
    sound: torch.Tensor


class Keyed(dict):
    """A dict of a type of its own."""


class Sum(nn.Module):
    """Adds a condition if it takes one."""

    def forward(self, x, condition=None):
        return x if condition is None else x + condition


class Module:
    """As much of a GANModule as a runner asks for."""

    def __init__(self, made=None, judged=None, training=True, loss=None, packing=1):
        self.current_generator = self.generator = MLP([4, 2])
        self.discriminator = MLP([2, 1])
        self.training, self.packing, self.iteration, self.latent_dim = training, packing, 0, 4
        self.replays_graphs = self.has_static_shapes = False
        self.loss = NonSaturating() if loss is None else loss
        self.augment_samples = lambda x, condition: (x, condition)
        self.made, self.judged = made, judged
        self.networks = NetworkRunner(self)

    def generate(self, network, n, condition, latents):
        assert network is self.current_generator
        return self.made(n, condition, latents) if callable(self.made) else self.made

    def discriminate(self, network, sample, condition):
        assert network is self.discriminator
        return self.judged(sample, condition) if callable(self.judged) else self.judged


def generate(made, n=3, condition=None, latents=None):
    return Module(made).networks.generate(n, condition, latents)


def judge(judged, sample=None, condition=None, **kwargs):
    """Logits and features."""
    sample = torch.zeros(6, 2) if sample is None else sample
    return Module(judged=judged, **kwargs).networks.discriminate(sample, condition)[:2]


def sentence(text):
    return pytest.raises(ValueError, match=re.escape(text))


# ---------- inputs


def test_networks_get_the_condition_that_they_take():
    x, condition = torch.ones(2), torch.tensor(3.0)
    assert torch.equal(call_network(Sum(), x, condition), x + 3)
    assert torch.equal(call_network(Sum(), x, None), x)
    assert torch.equal(call_network(nn.Identity(), x, condition), x)
    bilinear = nn.Bilinear(2, 2, 1)
    assert torch.equal(call_network(bilinear, x, x), bilinear(x, x))
    with sentence("takes a condition (labels), but none was given."):
        call_network(bilinear, x, None)


@pytest.mark.parametrize(
    ("sample", "n"),
    [
        (torch.zeros(4, 3), 4),
        (torch.zeros(1, dtype=torch.bfloat16), 1),
        ({"b": torch.zeros(4), "a": [torch.zeros(4, 2), None]}, 4),
        (Scene(torch.zeros(4, 2), torch.zeros(4)), 4),
    ],
)
def test_samples_are_counted(sample, n):
    assert check_samples("Real samples", sample) == n


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            torch.zeros(4, 3, dtype=torch.uint8),
            "X must be floating point (images in [-1, 1]), and at least one, got a torch.uint8 tensor of shape (4, 3). "
            "What is not belongs into the condition.",
        ),
        (torch.zeros(4, dtype=torch.complex64), "X must be floating point (images in [-1, 1])"),
        (torch.zeros(0, 3), "and at least one, got a torch.float32 tensor of shape (0, 3)"),
        (torch.zeros(()), "and at least one, got a torch.float32 tensor of shape ()"),
        ({"a": torch.zeros(4), "b": torch.zeros(4).long()}, "got a torch.int64 tensor of shape (4,)"),
        (
            (torch.zeros(4), torch.zeros(4)),
            "X must be a tensor, or a dict, list or named tuple of tensors, got a tuple of a torch.float32 tensor of "
            "shape (4,), a torch.float32 tensor of shape (4,).",
        ),
        ({"a": torch.zeros(4), "b": "text"}, "X must be a tensor, or a tree of tensors, got a str."),
        ([1.0], "X must be a tensor, or a tree of tensors, got a float."),
        (Keyed(a=torch.zeros(4)), "X must be a tensor, or a tree of tensors, got a Keyed with keys ['a']."),
        ([torch.zeros(4), torch.zeros(3)], "All leaves must be tensors with one batch size as their first dimension"),
        ({}, "All leaves must be tensors with one batch size as their first dimension, got none."),
        (None, "All leaves must be tensors with one batch size as their first dimension, got none."),
    ],
)
def test_samples_that_are_none(sample, message):
    with sentence(message):
        check_samples("X", sample)


@pytest.mark.parametrize("condition", [None, torch.zeros(4).long(), {"a": torch.zeros(4, 2), "b": None}, [], {}])
def test_conditions(condition):
    check_condition(condition, 4)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(3), "`condition` must have 4 entries, one for each sample, got 3."),
        ({"a": torch.zeros(4), "b": torch.zeros(5)}, "`condition` must have 4 entries, one for each sample, got 5."),
        (torch.tensor(1), "with the batch first, got a torch.int64 tensor of shape ()."),
        ("four", "`condition` must be a tensor, or a tree of tensors, with the batch first, got a str."),
        ([[1, 2]], "with the batch first, got a int."),
    ],
)
def test_conditions_that_do_not_fit(condition, message):
    with sentence(message):
        check_condition(condition, 4)


# ---------- the generator


def test_samples_and_extras():
    x, extras = torch.zeros(3, 2), {"loss": torch.tensor(1.0)}
    for made, expected in ((x, {}), ((x, {}), {}), ((x, extras), extras)):
        sample, found = generate(made)
        assert sample is x
        assert found == expected
    scene = Scene(torch.zeros(3, 1), torch.zeros(3))  # two tensors, and no pair
    assert generate(scene) == (scene, {})
    tree = {"a": [torch.zeros(3)]}
    assert generate((tree, extras)) == (tree, extras)


def test_the_generator_gets_what_there_is():
    seen = []

    def made(*args):
        seen.append(args)
        return torch.zeros(3, 2)

    z, condition = torch.zeros(3, 4), torch.zeros(3)
    generate(made, 3, condition, z)
    assert seen == [(3, condition, z)]


def test_the_current_generator_is_asked():
    module = Module(torch.zeros(3, 2))
    module.current_generator = nn.Identity()  # which the stub looks for
    module.networks.generate(3, None, None)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            (torch.zeros(3), [torch.zeros(3)]),
            "`generate` must return a dict of extras beside the sample, got a list of a torch.float32 tensor",
        ),
        (
            (torch.zeros(3), torch.zeros(3)),
            "a dict of extras beside the sample, got a torch.float32 tensor of shape (3,).",
        ),
        (
            (torch.zeros(3), torch.zeros(3), {}),
            "The generator's samples must be a tensor, or a dict, list or",
        ),
        (torch.zeros(3).long(), "The generator's samples must be floating point (images in [-1, 1])"),
        (None, "All leaves must be tensors"),
    ],
)
def test_what_a_generator_must_not_return(made, message):
    with sentence("The generator failed on an input of shape (3, 4): ") as caught:
        generate(made, latents=torch.zeros(3, 4))
    assert message in str(caught.value)


@pytest.mark.parametrize("made", [torch.zeros(4, 2), {"a": torch.zeros(4)}])
def test_as_many_samples_as_were_asked_for(made):
    with sentence("The generator made 4 samples where 3 were asked for."):
        generate(made)


def fail(error):
    def made(*args):
        raise error

    return made


@pytest.mark.parametrize(
    ("condition", "latents", "message"),
    [
        (None, None, "The generator failed on nothing: oh"),
        (None, torch.zeros(3, 4), "The generator failed on an input of shape (3, 4): oh"),
        (torch.zeros(3).long(), torch.zeros(3, 4), "The generator failed on an input of shape (3, 4): oh"),
        (torch.zeros(3, 5), None, "The generator failed on an input of shape (3, 5): oh"),
        ({"a": torch.zeros(3, 5)}, None, "The generator failed on an input of shape {'a': (3, 5)}: oh"),
        (
            None,
            torch.zeros(3, 4, dtype=torch.float64),
            "The generator failed on an input of shape (3, 4) (the input is torch.float64, the network torch.float32)",
        ),
    ],
)
def test_a_generator_that_fails_is_explained(condition, latents, message):
    with sentence(message) as caught:
        generate(fail(RuntimeError("oh")), condition=condition, latents=latents)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_indices_are_no_wrong_type():
    with sentence("The generator failed on an input of shape (3,): oh"):
        generate(fail(RuntimeError("oh")), condition=torch.zeros(3).long())


def test_an_error_without_words_is_explained_by_its_name():
    with sentence("The generator failed on nothing: StopIteration"):
        generate(fail(StopIteration()))


ERRORS = [torch.OutOfMemoryError("full"), MisconfigurationException("remove it"), FloatingPointError("nan")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_that_explain_themselves(error):
    with pytest.raises(type(error)) as caught:
        generate(fail(error))
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        judge(fail(error))
    assert caught.value is error


@pytest.mark.parametrize("ask", ["generate", "discriminate"])
def test_a_network_that_has_worked_is_not_explained(ask):
    error = RuntimeError("oh")
    module = Module(fail(error), fail(error))
    module.iteration = 1
    with pytest.raises(RuntimeError) as caught:
        module.networks.generate(3, None, None) if ask == "generate" else module.networks.discriminate(None, None)
    assert caught.value is error


def test_a_sentence_has_a_subject_after_the_first_step():
    gan = GANModule(nn.Bilinear(4, 3, 2), MLP([2, 1]), 4)
    gan.iteration = 1
    with sentence("Bilinear takes a condition"):
        gan.sample(3)


def test_a_module_without_latents_and_condition():
    gan = GANModule(MLP([4, 2]), MLP([2, 1]))
    with sentence("failed on nothing: The generator takes no latents, and there is no condition to make samples from."):
        gan.networks.generate(3, None, None)


def test_layers_and_inputs_that_do_not_fit():
    gan = GANModule(MLP([5, 2]), MLP([2, 1]), 4)
    with sentence("The generator failed on an input of shape (3, 4): mat1 and mat2 shapes cannot be multiplied"):
        gan.sample(3)
    with sentence("The discriminator failed on an input of shape (3, 7): mat1 and mat2 shapes cannot be multiplied"):
        gan.logits(torch.zeros(3, 7))
    with sentence("(the input is torch.float64, the network torch.float32): mat1 and mat2 must have the same dtype"):
        gan.logits(torch.zeros(3, 2, dtype=torch.float64))


# ---------- the discriminator


@pytest.mark.parametrize(
    ("output", "shape"),
    [((6,), (6,)), ((6, 1), (6,)), ((6, 3), (6, 3)), ((6, 1, 2, 2), (6, 4)), ((6, 1, 1, 1), (6,)), ((6, 2, 3), (6, 6))],
)
def test_rows_of_logits(output, shape):
    values = torch.arange(float(torch.Size(output).numel())).reshape(output)
    logits, features = judge(values)
    assert logits.shape == shape
    assert torch.equal(logits.flatten(), values.flatten())
    assert features is None


def test_logits_and_features():
    features = {"layer": torch.zeros(6, 3)}
    logits, found = judge((torch.zeros(6, 1), features))
    assert logits.shape == (6,)
    assert found is features
    logits, found = judge(({"a": torch.zeros(6, 1), "b": torch.ones(6, 2)}, [features]))
    assert {name: entry.shape for name, entry in logits.items()} == {"a": (6,), "b": (6, 2)}
    assert found == [features]


@pytest.mark.parametrize("logits", [[torch.zeros(6, 1), torch.ones(6)], {"b": torch.zeros(6, 1), "a": torch.ones(6)}])
def test_logits_of_several_discriminators(logits):
    found, *_ = judge(logits)
    assert type(found) is type(logits)
    names = list(logits) if isinstance(logits, dict) else range(2)
    assert list(found if isinstance(found, dict) else range(2)) == list(names)
    for name in names:
        assert torch.equal(found[name], logits[name].flatten())


@pytest.mark.parametrize(
    ("judged", "got"),
    [
        (None, "a NoneType."),
        ((torch.zeros(6),) * 3, "a tuple of a torch.float32 tensor of shape (6,), "),
        ([], "a list of nothing."),
        ({}, "a dict with keys []."),
        ([torch.zeros(6), None], "a list of a torch.float32 tensor of shape (6,), a NoneType."),
        ({"a": [torch.zeros(6)]}, "a dict with keys ['a']."),
        (0.5, "a float."),
    ],
)
def test_what_a_discriminator_must_not_return(judged, got):
    with sentence(
        "The discriminator failed on an input of shape (6, 2): `discriminate` must return a tensor of logits, a dict "
        f"or list of them, or (logits, features), got {got}"
    ):
        judge(judged)


def test_logits_in_a_dict_of_a_type_of_its_own():
    logits, *_ = judge(Keyed(a=torch.zeros(6, 1)))
    assert logits["a"].shape == (6,)


@pytest.mark.parametrize(
    ("judged", "got"),
    [
        (torch.zeros(()), "()"),
        (torch.zeros(5), "(5,)"),
        (torch.zeros(1, 6), "(1, 6)"),
        ({"a": torch.zeros(6), "b": torch.zeros(12, 1)}, "(12, 1)"),
    ],
)
def test_one_logit_or_more_per_sample(judged, got):
    with sentence(
        "The discriminator must return one logit or more per sample: expected shape (6,) or (6, patches), got " + got
    ):
        judge(judged)


def test_one_logit_or_more_per_pack():
    assert judge(torch.zeros(2, 1), packing=3)[0].shape == (2,)
    assert judge(torch.zeros(2, 1), torch.zeros(8, 2), packing=3)[0].shape == (2,)
    with sentence(
        "The discriminator must return one logit or more per pack of 3 samples: expected shape (2,) or (2, patches), "
        "got (6,)."
    ):
        judge(torch.zeros(6), packing=3)
    gan = GANModule(MLP([4, 2]), Packed(MLP([6, 1]), 3), 4)
    assert gan.networks.discriminate(torch.zeros(6, 2), None)[0].shape == (2,)


def test_the_discriminators_are_the_same_ones_each_time():
    answers = iter([{"a": torch.zeros(6), "b": torch.ones(6)}, {"b": torch.zeros(6), "a": torch.ones(6)}])
    module = Module(judged=lambda *args: next(answers))
    for _ in range(2):  # whatever their order
        module.networks.discriminate(torch.zeros(6, 2), None)
    for other, now in (({"a": torch.zeros(6)}, "a"), ([torch.zeros(6)] * 3, "0, 1, 2")):
        module.judged = other
        with sentence(
            f"`discriminate` returned the logits of discriminators {now}, and before the logits of discriminators "
            "a, b: it must return the same ones each time."
        ):
            module.networks.discriminate(torch.zeros(6, 2), None)


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.zeros(6), [torch.zeros(6), torch.zeros(6)]), ({"a": torch.zeros(6), "b": torch.zeros(6)}, torch.zeros(6))],
)
def test_one_discriminator_stays_one(first, second):
    module = Module(judged=first)
    module.networks.discriminate(torch.zeros(6, 2), None)
    module.judged = second
    with sentence("it must return the same ones each time."):
        module.networks.discriminate(torch.zeros(6, 2), None)


@pytest.mark.parametrize("training", [True, False])
def test_samples_are_augmented_in_training_alone(training):
    module = Module(judged=lambda sample, condition: sample.sum(1), training=training)
    module.augment_samples = lambda x, condition: (x + 1, condition)
    logits, *_ = module.networks.discriminate(torch.zeros(6, 2), None)
    assert torch.equal(logits, torch.full((6,), 2.0 * training))


def test_reconstructions_are_judged_by_their_mean_absolute_error():
    x = torch.randn(6, 2, 3)
    logits, *_ = judge(x + torch.arange(6.0)[:, None, None], x, loss=BoundaryEquilibrium())
    torch.testing.assert_close(logits, torch.arange(6.0))
    assert judge(torch.zeros(6, 1), x, loss=BoundaryEquilibrium())[0].shape == (6,)  # errors already


def test_reconstructions_after_augmentation():
    module = Module(judged=lambda sample, condition: 0 * sample, loss=BoundaryEquilibrium())
    module.augment_samples = lambda x, condition: (x + 1, condition)
    assert torch.equal(module.networks.discriminate(torch.zeros(6, 2), None)[0], torch.ones(6))


@pytest.mark.parametrize(
    ("judged", "sample"),
    [([torch.zeros(6, 2)], torch.zeros(6, 2)), (torch.zeros(6, 2), {"a": torch.zeros(6, 2)})],
)
def test_reconstructions_are_of_one_tensor(judged, sample):
    with sentence("BoundaryEquilibrium judges the reconstructions of one tensor by one discriminator, got a "):
        judge(judged, sample, loss=BoundaryEquilibrium())


# ---------- with a module


def test_a_module_asks_its_own_networks():
    gan = small()
    z, x = torch.randn(5, 4), torch.randn(5, 2)
    assert torch.equal(gan.networks.generate(5, None, z)[0], gan.generator(z))
    assert torch.equal(gan.networks.discriminate(x, None)[0], gan.discriminator(x).squeeze(1))


def test_compiled_networks_have_one_graph_for_all_sizes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    gan = small()
    for network in (gan.generator, gan.discriminator):
        network.compile(backend=backend)
    for n in (5, 7, 9):
        sample, _ = gan.networks.generate(n, None, torch.randn(n, 4))
        gan.networks.discriminate(sample.detach(), None)
    assert len(graphs) == 2


# ---------- several discriminators


class Maps(nn.Module):
    def forward(self, x):
        return x[:, :1], [x]


@pytest.mark.parametrize("kind", [nn.ModuleDict, nn.ModuleList])
def test_discriminators_that_return_features_are_asked_for_them(kind):
    parts = [Maps(), Maps()] if kind is nn.ModuleList else {"a": Maps(), "b": Maps()}
    x = torch.randn(3, 2)
    outputs = GANModule(MLP([4, 2]), kind(parts), 4).judge(GANOutputs(x, -x))
    names = ["0", "1"] if kind is nn.ModuleList else ["a", "b"]
    for name, real, fake in outputs.pairs():
        assert name in names
        assert torch.equal(real, x[:, 0])
        assert torch.equal(fake, -x[:, 0])
    features = outputs.real_features
    features = features if isinstance(features, list) else [features[name] for name in names]
    assert [torch.equal(maps[0], x) for maps in features] == [True, True]
