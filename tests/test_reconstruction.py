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
        ({"target": "extras.y"}, None, "compares `extras.y`, but there is no 'y': a path leads from what the player"),
        ({"sample": "made"}, None, "compares `made`, but there is no 'made'"),
        ({"target": "condition"}, None, "there is no 'condition'"),
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
        ({"name": None}, "`name` must"),
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
