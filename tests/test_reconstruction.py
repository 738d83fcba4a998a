"""Distances of samples and targets that lie anywhere in what a player sees."""

import pytest
import torch
from torch import nn
from toys import fit, points, small, trainer

from lightning_gan_stability import MLP, GANModule, GANOutputs, Reconstruction

REAL, FAKE = torch.zeros(4, 2), torch.full((4, 2), 3.0)


def of(outputs=None, **kwargs):
    return Reconstruction(**kwargs).penalty(None, outputs or GANOutputs(REAL, FAKE))


def test_distances():
    assert of() == 3
    assert of(distance="l2") == 9
    assert of(distance=lambda sample, target: (sample - target).abs().amax(1)) == 3
    assert of(distance=nn.HuberLoss(delta=1.0)) == 2.5


def test_trees_are_summed():
    tree = lambda a, b: {"a": torch.full((4, 2), a), "b": torch.full((4, 1), b)}  # noqa: E731
    assert of(GANOutputs(tree(0.0, 0.0), tree(1.0, 5.0))) == 6


@pytest.mark.parametrize(
    ("sample", "target", "value"),
    [
        ("fake.a", "real.1", 3),
        ("fake.a", "condition", 2),
        ("extras.cycle", "real.1", 6),
        ("extras.pair.0", "real.1", 7),
    ],
)
def test_paths(sample, target, value):
    extras = {"cycle": FAKE + 3, "pair": [FAKE + 4]}
    outputs = GANOutputs([None, REAL], {"a": FAKE}, condition=REAL + 1, extras=extras)
    assert of(outputs, sample=sample, target=target) == value


def test_the_target_carries_no_gradient():
    real, fake = (torch.ones(4, 2, requires_grad=True) for _ in range(2))
    of(GANOutputs(real, 2 * fake)).backward()
    assert real.grad is None
    assert torch.equal(fake.grad, torch.full((4, 2), 0.25))


@pytest.mark.parametrize(
    ("options", "outputs", "sentence"),
    [
        ({}, GANOutputs(REAL, FAKE[:, :1]), r"compares `fake` of shape \(4, 1\) with `real` of shape \(4, 2\)"),
        ({}, GANOutputs({"a": REAL}, FAKE), "compares `fake` of shape"),
        ({"target": "extras.y"}, None, "compares `extras.y`, but there is no 'y': a path starts with"),
        ({"sample": "made"}, None, "compares `made`, but there is no 'made'"),
        ({"target": "condition"}, None, "there is no 'condition'"),
        *(
            (
                {"sample": path},
                GANOutputs(REAL, FAKE, extras={"a": FAKE, "n": 3.0, "t": ()}),
                rf"^Reconstruction.*{end}",
            )
            for path, end in {
                "extras.keys": "`extras.keys`, but there is no 'keys': a path starts with",
                "extras.a.mean": "`extras.a.mean`, where there is a builtin_function_or_method: a path must end in a",
                "fake.shape": "`fake.shape`, where there is a Size of a int, a int: a path must end in a tensor",
                "replace": "`replace`, where there is a method: a path must end in a tensor, or in a dict",
                "extras": "`extras`, where there is a float: a path must end in a tensor, or in a dict",
                "extras.n": "`extras.n`, where there is a float: a path must end in a tensor, or in a dict",
                "extras.t": "`extras.t`, where there is a tuple of nothing: a path must end in a tensor",
                "": "``, but there is no '': a path starts with",
            }.items()
        ),
        (
            {"distance": lambda x: x, "name": "mel"},
            None,
            r"Reconstruction 'mel' failed on `fake` of shape \(4, 2\) and `real` of shape \(4, 2\): .*takes 1 pos",
        ),
        (
            {"distance": nn.CosineSimilarity(), "target": "condition"},
            GANOutputs(REAL, FAKE, condition=torch.zeros(4, 3)),
            r"failed on `fake` of shape \(4, 2\) and `condition` of shape \(4, 3\): The size of tensor",
        ),
        ({"distance": lambda x, y: {}["a"]}, None, r"`real` of shape \(4, 2\): KeyError: 'a'"),
        ({"distance": lambda x, y: 1.0, "name": "mel"}, None, "distance of Reconstruction 'mel' must return a tensor"),
    ],
)
def test_what_cannot_be_compared(options, outputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        of(outputs, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": -1}, "`weight` must"),
        ({"distance": "l3"}, "`distance` must be 'l1', 'l2', or a module or function of sample and target, got 'l3'"),
        ({"target": 3}, "`target` must"),
        (
            {"distance": nn.L1Loss},
            "`distance` must be 'l1', 'l2', or a module or function of sample and target, got <cl",
        ),
        ({"name": None}, "`name` must"),
        *(
            ({"name": name}, "`name` must be a key that the log has for nothing else")
            for name in ("", "/a", "grad_norm", "grad_norm/r1", "adversarial", "adversarial/p", "accuracy")
        ),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Reconstruction(**options)


class Perceptual(nn.Module):
    """A distance with weights and dropout, as LPIPS has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, sample, target):
        return self.dropout((sample - target).square() * self.weight).mean(1, keepdim=True)


def test_several_of_them_in_a_run():
    distance = Perceptual()
    module = small()
    terms = [Reconstruction(2.0), Reconstruction(1.0, "l2", name="mse"), Reconstruction(1.0, distance, name="lpips")]
    data = torch.utils.data.DataLoader(points(3), batch_size=None)
    run = trainer(callbacks=terms, log_every_n_steps=1, max_steps=3)
    run.fit(module, data, data)
    values = module.last_step.values
    torch.testing.assert_close(values["g/mse"], values["g/lpips"])  # without dropout, as in eval mode
    assert values["g/reconstruction"] > 0
    assert {"val/g/reconstruction", "val/g/mse", "val/g/lpips"} <= {*run.callback_metrics}
    assert distance.weight.grad is None
    assert not any("lpips" in key or "distance" in key for key in module.state_dict())


class Auto(GANModule):
    """An autoencoder, whose samples are made from the data."""

    def unpack(self, batch):
        return batch, batch


def test_an_autoencoder_learns():
    torch.manual_seed(0)
    module = Auto(MLP([2, 32, 2]), MLP([2, 8, 1]), None, g_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    module.adversarial = False
    module.plan = ("g",)
    fit(module, points(150, 64), callbacks=[Reconstruction()], log_every_n_steps=1)
    assert module.last_step.values["g/reconstruction"] < 0.2  # 0.8 at first
    assert "adversarial" not in module.last_step.terms["g"]


def test_extras_reach_a_distance_in_full_precision():
    types = []

    def distance(sample, target):
        types.append(sample.dtype)
        return (sample - target).abs()

    class Twice(GANModule):
        def generate(self, network, n, condition, latents):
            sample = network(latents)
            return sample, {"again": sample}

    module = Twice(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)
    callbacks = [Reconstruction(distance=distance, sample="extras.again")]
    fit(module, points(1), callbacks=callbacks, precision="bf16-mixed")
    assert types == [torch.float32]


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda weight: Reconstruction(weight, sample="real", target="fake", name="swapped"), "swapped"),
        (lambda weight: Reconstruction(weight, lambda x, y: (x - y).abs().detach()), "reconstruction"),
    ],
)
def test_a_term_without_gradient(make, name, weight):
    with pytest.raises(
        ValueError,
        match=f"Reconstruction '{name}' has no gradient: let `sample` name something that the generator computes",
    ):
        fit(small(), points(1), callbacks=[make(weight)])


def test_validation_needs_no_gradient():
    data = torch.utils.data.DataLoader(points(2), batch_size=None)
    term = Reconstruction(sample="real", target="fake")
    found = trainer(callbacks=[term]).validate(small(), data, verbose=False)
    assert found[0]["val/g/reconstruction"] > 0
