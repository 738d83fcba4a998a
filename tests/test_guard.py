"""What happens around a run: what is refused, and when; what stands whatever a subclass overrides."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError
from toys import fit, points, public_callbacks, sgd, small, trainer, weights

import lightning_gan_stability
from lightning_gan_stability import (
    MLP,
    Digits,
    GANModule,
    GeneratorEMA,
    Grid,
    R1Penalty,
    Ring,
    SpectralNorm,
    UpdateRatio,
    Wasserstein,
    WeightClipping,
)

# ---------- a training step of one's own


class OwnStep(GANModule):
    """Trains by hand, as a tutorial does, and never calls the package's step."""

    def training_step(self, batch, batch_idx):
        d, g = self.optimizers()
        for optimizer, sign in ((d, 1), (g, -1)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            fake = self.generator(torch.randn(len(batch), 4))
            self.manual_backward(sign * (self.discriminator(fake) - self.discriminator(batch)).mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def own_step(**kwargs):
    torch.manual_seed(0)
    return OwnStep(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, **kwargs)


# what is no GANCallback changes networks and logs, whatever the step is; TableMonitor refuses other modules before
ACTING = sorted(public_callbacks() - {"SpectralNorm", "Alternating", "TableMonitor"})


@pytest.mark.parametrize("name", ACTING)
def test_a_step_that_is_not_the_package_s_is_refused_with_its_callbacks(name):
    arguments = {"AdaptiveAdversarialWeight": ["layers.2"], "AdversarialStart": [1], "LossBalancer": [{"mse": 1.0}]}
    arguments |= {"AugmentationSchedule": [0.1], "OptimizerSchedule": [{"lr": 0.1}]}
    arguments["PairedMonitor"] = [{"error": MeanSquaredError()}]
    keywords = {"held_out": points(3, seed=1)} if name == "MemorizationMonitor" else {}
    callback = getattr(lightning_gan_stability, name)(*arguments.get(name, []), **keywords)
    others = [lightning_gan_stability.QualityMonitor(n_samples=50)] if name == "CollapseDetector" else []
    others += [lightning_gan_stability.Reconstruction()] if name == "AdversarialStart" else []
    module, run = (
        own_step(
            loss=lightning_gan_stability.Minimax() if "Augment" in name else Wasserstein(),
            d_optimizer=sgd(0.1),
            g_optimizer=sgd(0.1),
        ),
        trainer(callbacks=[callback, *others], max_epochs=1),
    )
    with pytest.raises(
        MisconfigurationException, match=r"`training_step` of OwnStep never calls `super\(\).training_st"
    ):
        run.fit(module, DataLoader(points(3), batch_size=None))
    assert run.global_step <= 2  # both optimizers of one batch, each of which Lightning counts


def test_a_step_of_ones_own_without_callbacks_is_fine():
    module = own_step()
    before = weights(module)
    fit(module, points(3), callbacks=[SpectralNorm()])
    assert not torch.equal(weights(module), before)


def test_a_step_may_do_more_than_the_package_s():
    class More(GANModule):
        def training_step(self, batch, batch_idx):
            super().training_step(2 * batch, batch_idx)

    runs = []
    for kind, factor in ((More, 1), (GANModule, 2)):
        torch.manual_seed(0)
        module = kind(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)
        fit(module, [factor * batch for batch in points(3)], callbacks=[R1Penalty()])
        runs.append(weights(module))
    assert torch.equal(*runs)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_takes_batches_by_itself_is_refused():
    class Iterates(GANModule):
        def training_step(self, dataloader_iter):
            raise AssertionError

    with pytest.raises(MisconfigurationException, match=r"`training_step\(dataloader_iter\)` takes batches by itself"):
        fit(Iterates(MLP([4, 2]), MLP([2, 1]), 4), points(2))


# ---------- what compiles, freezes, fails


@pytest.mark.parametrize("callbacks", [list, lambda: [R1Penalty(1.0)]])
def test_compiling_the_module_as_a_whole_is_refused(callbacks):
    module = torch.compile(small(), backend="eager")
    with pytest.raises(MisconfigurationException, match=r"use GANModule\(compile=True\), which compiles the networks"):
        fit(module, points(2), callbacks=callbacks())


@pytest.mark.parametrize(("network", "player"), [("discriminator", "d"), ("generator", "g")])
def test_a_network_that_is_frozen_in_the_middle_of_a_run_is_named(network, player):
    class Freeze(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                module.get_submodule(network).requires_grad_(False)

    module = small()
    with pytest.raises(
        ValueError, match=f"All parameters of the {network} are frozen .* but it stands in `module.plan`"
    ):
        fit(module, points(4), callbacks=[Freeze()])
    assert module.iteration == 2

    class FreezeAndRest(Freeze):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            super().on_train_batch_start(trainer, module, batch, batch_idx)
            if batch_idx == 2:
                module.plan = ("g",) if player == "d" else ("d",)

    module = small()
    fit(module, points(4), callbacks=[FreezeAndRest()])
    assert module.iteration == 4


ERRORS = [AssertionError("three channels"), AssertionError(), KeyError("mel"), RuntimeError("shapes"), TypeError("how")]


class Fails(nn.Module):
    def __init__(self, error, inputs, outputs):
        super().__init__()
        self.layer, self.error = nn.Linear(inputs, outputs), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_whatever_a_network_raises_on_its_first_batch_is_explained(error, network):
    module = small()
    setattr(module, network, Fails(error, *((4, 2) if network == "generator" else (2, 1))))
    with pytest.raises(ValueError, match=rf"The {network} failed on an input of shape \(8, \d\): ") as raised:
        fit(module, points(2))
    assert str(error) in str(raised.value)
    assert raised.value.__cause__ is error


# ---------- other callbacks

CONFIGURES = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")


@CONFIGURES
@pytest.mark.parametrize("ours", [lambda: SpectralNorm(), lambda: GeneratorEMA()], ids=["SpectralNorm", "GeneratorEMA"])
def test_averages_of_lightning_come_after_what_changes_the_networks(ours):
    name = type(ours()).__name__
    with pytest.raises(MisconfigurationException, match=f"put {name} before EMAWeightAveraging in the list"):
        fit(small(), points(2), callbacks=[EMAWeightAveraging(decay=0.9), ours()])
    averages = EMAWeightAveraging(decay=0.9)
    module = small()
    fit(module, points(4), callbacks=[ours(), averages])
    assert module.iteration == 4


@CONFIGURES
@pytest.mark.parametrize("ours", [lambda: UpdateRatio(2), lambda: R1Penalty(), lambda: WeightClipping(0.1)])
def test_averages_of_lightning_go_with_the_others_in_any_order(ours):
    for callbacks in ([EMAWeightAveraging(decay=0.9), ours()], [ours(), EMAWeightAveraging(decay=0.9)]):
        fit(small(), points(2), callbacks=callbacks)


DATA = {
    "Ring": lambda size: Ring(batch_size=size, epoch_length=40),
    "Grid": lambda size: Grid(batch_size=size, epoch_length=40),
    "Digits": lambda size: Digits(batch_size=size),
}


@pytest.mark.parametrize("kind", DATA)
def test_batches_have_the_size_that_is_found(kind):
    sizes = []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sizes.append(len(batch[0] if isinstance(batch, list | tuple) else batch))

    data = DATA[kind](64)
    inner = MLP([4, 64], output_shape=[1, 8, 8]), nn.Sequential(nn.Flatten(), MLP([64, 8, 1]))
    module = GANModule(*inner, 4) if kind == "Digits" else small()
    tried = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (
        tried.append(len(batch[0] if isinstance(batch, list | tuple) else batch)),
        step(batch, batch_idx),
    )[1]
    finder = BatchSizeFinder(max_trials=3, steps_per_trial=2)
    run = trainer(max_epochs=-1, max_steps=5, callbacks=[finder, Sizes()], limit_val_batches=0)
    run.fit(module, datamodule=data)
    assert data.batch_size == 8
    assert sizes == [8] * 5
    assert tried == [64] * 2 + [4] * 2 + [8] * 7  # Lightning's first trial runs what was there before
