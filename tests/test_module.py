"""What users override in GANModule, what it refuses, and what it does for validation, prediction and checkpoints."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toys import Shift, fit, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdversarialLoss,
    BoundaryEquilibrium,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    Hinge,
    LeastSquares,
    NonSaturating,
    Packed,
    R1Penalty,
    Regularizer,
    Simultaneous,
    UpdateRule,
)
from lightning_gan_stability.sharding import check_strategy

# ---------- arguments

SAME = MLP([4, 4])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_dim": 0}, "`latent_dim` must be a positive integer, got 0."),
        ({"latent_dim": 2.5}, "`latent_dim` must be a positive integer, got 2.5."),
        ({"latent_dim": True}, "`latent_dim` must be a positive integer, got True."),
        ({"accumulate": 0}, "`accumulate` must be a positive integer, got 0."),
        ({"clip_norm": 0}, "`clip_norm` must be a positive finite number, got 0."),
        ({"clip_norm": float("inf")}, "`clip_norm` must be a positive finite number, got inf."),
        ({"clip_norm": -1.0}, "`clip_norm` must be a positive finite number, got -1.0."),
        ({"noise_seed": 1.5}, "`noise_seed` must be of type int, got 1.5."),
        ({"noise_seed": True}, "`noise_seed` must be of type int, got True."),
        ({"g_optimizer": "Adam"}, "`g_optimizer` must be a function that makes one from parameters, got 'Adam'."),
        ({"d_scheduler": "x"}, "`d_scheduler` must be a function that makes one from an optimizer, got 'x'."),
        ({"loss": "hinge"}, "`loss` must be of type AdversarialLoss, got 'hinge'."),
        ({"generator": None}, "`generator` must be of type Module, got None."),
        ({"discriminator": lambda x: x}, "`discriminator` must be of type Module, got <function"),
        ({"generator": SAME, "discriminator": SAME}, "must be two modules, got the same one twice."),
        ({"g_optimizer": torch.optim.SGD(SAME.parameters(), 0.1)}, "makes one from parameters, got a SGD."),
    ],
)
def test_bad_arguments(kwargs, message):
    good = {"generator": MLP([4, 2]), "discriminator": MLP([2, 1]), "latent_dim": 4}
    with pytest.raises(ValueError, match=re.escape(message)):
        GANModule(**good | kwargs)


def test_defaults():
    gan = small()
    assert isinstance(gan.loss, NonSaturating)
    assert gan.plan == ("d", "g")
    assert isinstance(gan.augment, nn.Identity)
    for optimizer in gan.configure_optimizers()[0]:
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.defaults["lr"] == 2e-4
        assert optimizer.defaults["betas"] == (0.5, 0.999)


# ---------- samples and logits


def test_sample_maps_latents_through_the_generator():
    gan = small()
    z = torch.randn(5, 4)
    assert torch.equal(gan.sample(5, latents=z), gan.generator(z))
    assert torch.equal(gan(z), gan.generator(z))
    assert gan.sample(3).shape == (3, 2)


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (5,), (5, 4, 1)])
def test_latents_of_the_wrong_size(shape):
    with pytest.raises(ValueError, match=r"`latents` must have shape \(5, 4\), got "):
        small().sample(5, latents=torch.zeros(shape))


@pytest.mark.parametrize("n", [0, -1, 2.0])
def test_number_of_samples_is_checked(n):
    with pytest.raises(ValueError, match="`n` must be a positive integer"):
        small().sample(n)


def test_eval_mode_samples_from_the_average():
    gan = small()
    gan.generator_ema = MLP([4, 16, 2])
    z = torch.randn(5, 4)
    assert torch.equal(gan.sample(5, latents=z), gan.generator(z))
    gan.eval()
    assert torch.equal(gan.sample(5, latents=z), gan.generator_ema(z))


@pytest.mark.parametrize(
    ("output", "shape"), [((6,), (6,)), ((6, 1), (6,)), ((6, 1, 1, 1), (6,)), ((6, 3), (6, 3)), ((6, 1, 2, 2), (6, 4))]
)
def test_logits_are_one_or_more_per_sample(output, shape):
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.zeros(output)

    assert GANModule(MLP([4, 2]), Fixed(), 4).logits(torch.zeros(6, 2)).shape == shape


@pytest.mark.parametrize("output", [(), (1,), (3, 2)])
def test_other_logits_are_refused(output):
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.zeros(output)

    with pytest.raises(ValueError, match=r"expected shape \(6,\) or \(6, patches\), got \("):
        GANModule(MLP([4, 2]), Fixed(), 4).logits(torch.zeros(6, 2))


def test_augmentation_acts_on_real_and_fake_and_the_penalty_looks_before_it():
    class Triple(nn.Module):
        def forward(self, x):
            return 3 * x

    gan = GANModule(MLP([4, 2]), nn.Linear(2, 1, bias=False), 4, d_optimizer=sgd(0.0), g_optimizer=sgd(0.0))
    gan.augment = Triple()
    x = torch.randn(3, 2)
    torch.testing.assert_close(gan.logits(x), 3 * gan.discriminator(x).squeeze(1))
    run = fit(gan, points(1), callbacks=[R1Penalty(2.0)])
    torch.testing.assert_close(run.callback_metrics["d/r1"], 9 * gan.discriminator.weight.detach().square().sum())


def test_augmentation_acts_in_training_alone():
    """Held-out losses are those of samples as they are."""
    gan = small(loss=Hinge())
    gan.augment = Shift()
    plain, run = small(loss=Hinge()), {}
    for name, module in (("plain", plain), ("augmented", gan)):
        run[name] = trainer()
        run[name].validate(module, DataLoader(points(2), batch_size=None), verbose=False)
    assert run["augmented"].callback_metrics == run["plain"].callback_metrics
    x = torch.randn(3, 2)
    assert torch.equal(gan.eval().logits(x), plain.logits(x))
    assert torch.equal(gan.train().logits(x), plain.logits(x + 0.1))


def test_patch_logits_train():
    gan = GANModule(MLP([4, 2]), MLP([2, 8, 5]), 4)
    run = fit(gan, points(2), callbacks=[R1Penalty(0.1)])
    assert run.callback_metrics["d/adversarial"].isfinite()


def test_a_subclass_overrides_discriminate():
    class Scaled(GANModule):
        def discriminate(self, network, sample, condition):
            return 2 * super().discriminate(network, sample, condition)

    gan = Scaled(MLP([4, 2]), MLP([2, 1]), 4)
    run = fit(gan, points(1))
    assert run.callback_metrics["d/real_logit"].isfinite()


# ---------- labels


class Conditional(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.net = nn.Linear(inputs + 3, outputs)
        self.seen = []

    def forward(self, x, labels=None):
        self.seen.append(labels)
        code = torch.zeros(len(x), 3) if labels is None else nn.functional.one_hot(labels, 3).to(x.dtype)
        return self.net(torch.cat([x, code], 1))


class Needy(Conditional):
    def forward(self, x, labels):
        return super().forward(x, labels)


class Keyword(nn.Module):
    """A second parameter that is not for labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x, features=False):
        assert features is False
        return self.net(x)


LABELLED = [(torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))]


def test_labels_reach_the_networks_that_take_them():
    gan = GANModule(Conditional(4, 2), Keyword(), 4)
    fit(gan, LABELLED)
    assert all(torch.equal(labels, LABELLED[0][1]) for labels in gan.generator.seen)
    gan = GANModule(MLP([4, 2]), Needy(2, 1), 4)
    fit(gan, [{"image": LABELLED[0][0], "label": LABELLED[0][1]}])
    assert all(torch.equal(labels, LABELLED[0][1]) for labels in gan.discriminator.seen)


def test_micro_batches_take_their_labels_along():
    gan = GANModule(Conditional(4, 2), Needy(2, 1), 4, accumulate=4)
    fit(gan, LABELLED)
    assert [len(labels) for labels in gan.generator.seen] == [2, 2, 2] * 2


@dataclass
class Example:
    """A batch whose samples nobody can see from outside."""

    pictures: torch.Tensor
    names: list


class Examples(GANModule):
    def unpack(self, batch):
        return batch.pictures, None


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_of_a_batch_of_any_class_are_parts_of_it(accumulate):
    """`unpack` is asked once, and what it returns is divided."""
    moved, sizes = [], []
    for parts in (1, accumulate):
        torch.manual_seed(0)
        gan = Examples(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, None, sgd(0.1), sgd(0.1), accumulate=parts).double()
        gan.generator.register_forward_pre_hook(lambda _, args, parts=parts: sizes.append((parts, len(args[0]))))
        data = [Example(batch, ["a"] * len(batch)) for batch in points(3, 6, dtype=torch.float64)]
        fit(gan, data, callbacks=[R1Penalty(0.5)])
        moved.append(weights(gan))
    assert {size for parts, size in sizes if parts > 1} == {6 // accumulate}
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-14)


class Embeds(nn.Module):
    """A generator whose first part is frozen and in half precision, with a complex weight besides."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4).half().requires_grad_(False)
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.network = MLP([4, 16, 2])

    def forward(self, latents):
        return self.network(latents + self.table.weight[0].float()) * self.phase.real


class Judges(nn.Module):
    """A discriminator of the same kind."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(2, 2).half().requires_grad_(False)
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.network = MLP([2, 16, 1])

    def forward(self, samples):
        return self.network(samples * self.phase.real + self.features.weight[0].float())


@pytest.mark.parametrize("callbacks", [list, lambda: [R1Penalty(0.1), GradientPenalty(0.1), GeneratorEMA(decay=0.5)]])
def test_networks_with_parts_of_other_types(callbacks):
    torch.manual_seed(0)
    gan = GANModule(Embeds(), Judges(), 4)
    before = {name: p.detach().clone() for name, p in gan.named_parameters()}
    fit(gan, points(3), callbacks=callbacks())
    assert gan.sample(2).dtype is torch.float32
    for name, p in gan.named_parameters():
        if name in before:
            assert p.dtype is before[name].dtype
            assert torch.equal(p, before[name]) != p.requires_grad


def test_labels_that_are_needed_and_missing():
    with pytest.raises(ValueError, match=r"The generator failed on .*: .* takes a condition .*, but none was given"):
        GANModule(Needy(4, 2), MLP([2, 1]), 4).sample(2)
    gan = GANModule(Conditional(4, 2), MLP([2, 1]), 4)
    assert gan.sample(2).shape == (2, 2)
    with pytest.raises(ValueError, match=r"`condition` must have 2 entries, one for each sample, got 3\."):
        gan.sample(2, condition=torch.tensor([0, 1, 2]))


# ---------- batches and shapes


def test_batch_forms():
    gan, x, y = small(), torch.zeros(2, 2), torch.tensor([0, 1])
    for batch, labels in [(x, None), ((x,), None), ([x], None), ((x, y), y), ([x, y], y), ({"image": x}, None)]:
        assert gan.unpack(batch)[0] is x
        assert gan.unpack(batch)[1] is labels
    assert gan.unpack({"image": x, "label": y})[1] is y


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "A batch must be a tensor, .* got a str"),
        ({"img": torch.zeros(2, 2)}, r"got a dict with keys \['img'\]: override `GANModule.unpack`"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), "got a tuple of a torch.float32 tensor"),
        ((torch.zeros(2, 2), "cat"), "got a tuple of a torch.float32 tensor of shape .*, a str"),
        (torch.zeros(2, 2, dtype=torch.uint8), "must be floating point .* got a torch.uint8 tensor"),
        (torch.zeros(0, 2), "at least one, got a torch.float32 tensor of shape"),
        (None, "got a NoneType"),
        ((), "got a tuple of nothing"),
    ],
)
def test_unknown_batches(batch, message):
    with pytest.raises(ValueError, match=message):
        small().unpacked(batch)


def test_networks_that_do_not_fit_are_explained_before_the_first_step():
    cases = [
        (
            GANModule(MLP([4, 3]), MLP([2, 1]), 4),
            r"The generator made samples of shape \(3,\), but the data have shape \(2,\)",
        ),
        (
            GANModule(MLP([5, 2]), MLP([2, 1]), 4),
            r"The generator failed on an input of shape \(8, 4\): .*\(8x4 and 5x2\)",
        ),
        (
            GANModule(MLP([4, 2]), MLP([3, 1]), 4),
            r"The discriminator failed on an input of shape \(8, 2\): .*\(8x2 and 3x1\)",
        ),
        (
            GANModule(nn.LSTM(4, 2), MLP([3, 1]), 4),
            r"The generator failed on .*: `generate` must return a dict of extras beside the sample, got a tuple",
        ),
        (
            GANModule(MLP([4, 2]), nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), 4),
            r"The discriminator must return one logit or more per sample",
        ),
    ]
    for gan, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(gan, points(3))
        assert gan.iteration == 0


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")  # so says Lightning, and goes on
def test_an_empty_loader_is_an_error():
    for loader in (DataLoader([], batch_size=None), DataLoader(points(3), batch_size=5, drop_last=True)):
        with pytest.raises(Exception, match="The training loader has no batches"):
            trainer(max_steps=5).fit(small(), loader)
    with pytest.raises(Exception, match="The training loader has no batches"):
        trainer(max_steps=5).fit(small(), DataLoader(Empty(), batch_size=None))


def test_a_run_that_is_done_is_no_empty_loader(tmp_path):
    run = fit(small(), points(3), max_steps=3, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    path = run.checkpoint_callback.best_model_path
    fit(
        small(),
        points(3),
        max_steps=3,
        callbacks=[ModelCheckpoint(tmp_path)],
        enable_checkpointing=True,
        ckpt_path=path,
    )
    fit(small(), points(3), limit_train_batches=0)


# ---------- refusals


def test_strategies_that_cannot_do_this_are_refused():
    for kind in (FSDPStrategy, DeepSpeedStrategy):
        run = trainer()
        run.strategy.__class__ = type(kind.__name__, (kind, type(run.strategy)), {})
        with pytest.raises(Exception, match=f"{kind.__name__} cannot train two optimizers .* use strategy='ddp'"):
            check_strategy(run)


def test_a_checkpoint_interval_that_lightning_would_ignore_is_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=1))
    with pytest.raises(Exception, match=r"train_time_interval.* saves nothing under manual optimization"):
        fit(small(), points(1), callbacks=[saver], enable_checkpointing=True)


def test_lightnings_own_clipping_and_accumulation_are_refused():
    for kwargs in ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}):
        with pytest.raises(Exception, match="manual optimization"):
            fit(small(), points(1), **kwargs)


# ---------- validation, prediction


def test_validation_logs_held_out_losses():
    gan = small(loss=Hinge())
    run = trainer()
    run.validate(gan, DataLoader(points(2), batch_size=None), verbose=False)
    assert set(run.callback_metrics) == {"val/d/adversarial", "val/g/adversarial", "val/d/accuracy"}
    first = dict(run.callback_metrics)
    run.validate(gan, DataLoader(points(2), batch_size=None), verbose=False)
    assert first == dict(run.callback_metrics)  # the same noise each time
    real = torch.cat(points(2))
    expected = (1 - gan.logits(real)).relu().mean()
    fakes = (1 + gan.logits(torch.cat([gan.sample(8, latents=z) for z in held_out_latents(gan)]))).relu().mean()
    torch.testing.assert_close(first["val/d/adversarial"], (expected + fakes).detach())


def held_out_latents(gan):
    latents = []
    for batch_idx in range(2):
        with gan.noise.of("validation", 0, batch_idx):
            latents.append(gan.noise.randn(8, 4))
    return latents


def test_validation_inside_training_changes_nothing():
    a, b = small(), small()
    fit(a, points(4))
    run = trainer(val_check_interval=2)
    run.fit(b, DataLoader(points(4), batch_size=None), DataLoader(points(2, seed=5), batch_size=None))
    assert torch.equal(weights(a), weights(b))
    assert "val/d/adversarial" in run.callback_metrics


def test_predict_returns_samples():
    gan = GANModule(Needy(4, 2), MLP([2, 1]), 4)
    samples = trainer().predict(gan, DataLoader(LABELLED * 2, batch_size=None))
    assert [s.shape for s in samples] == [(6, 2), (6, 2)]
    assert not torch.equal(samples[0], samples[1])
    again = trainer().predict(gan, DataLoader(LABELLED * 2, batch_size=None))
    assert all(torch.equal(a, b) for a, b in zip(samples, again, strict=True))


# ---------- extensions


def test_a_regularizer_of_three_lines():
    class Drift(Regularizer):
        def penalty(self, module, outputs):
            return outputs.real_logits.square()

    gan = small(d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    run = fit(gan, points(1), callbacks=[Drift(weight=2.0)])
    assert run.callback_metrics["d/drift"] >= 0

    class ByGradient(Regularizer):
        weight = 0.5

        def penalty(self, module, outputs):
            (g,) = torch.autograd.grad(outputs.real_logits.sum(), outputs.real, create_graph=True)
            return g.square().sum(1)

    a = fit(small(), points(1), callbacks=[ByGradient()])
    b = fit(small(), points(1), callbacks=[R1Penalty(1.0)])
    torch.testing.assert_close(a.callback_metrics["d/by_gradient"], b.callback_metrics["d/r1"])


def test_a_penalty_of_the_generator_differentiates_by_the_latents():
    class PathLength(Regularizer):
        player = "g"

        def penalty(self, module, outputs):
            (g,) = torch.autograd.grad(outputs.fake.sum(), outputs.latents, create_graph=True)
            return g.square().sum(1)

    gan = GANModule(nn.Linear(4, 2, bias=False), MLP([2, 1]), 4, g_optimizer=sgd(0.0))
    run = fit(gan, points(1), callbacks=[PathLength()])
    expected = gan.generator.weight.detach().sum(0).square().sum()
    torch.testing.assert_close(run.callback_metrics["g/path_length"], expected)


def test_a_rule_from_the_two_primitives():
    class GeneratorFirst(UpdateRule):
        def __call__(self, module, batch):
            for player in ("g", "d"):
                module.compute_gradients(player, batch)
                module.apply_gradients(player)

    a, b = small(), small()
    b.plan = ("g", "d")
    fit(a, points(3), callbacks=[GeneratorFirst()])
    fit(b, points(3))
    assert torch.equal(weights(a), weights(b))


def test_a_callback_turns_the_plan():
    class EverySecond(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.plan = ("d", "g") if batch_idx % 2 else ("d",)

    gan = small()
    before = weights(gan.generator)
    fit(gan, points(1), callbacks=[EverySecond()])
    assert torch.equal(before, weights(gan.generator))
    fit(gan, points(2), callbacks=[EverySecond()])
    assert not torch.equal(before, weights(gan.generator))


def test_an_auto_encoder_is_judged_by_its_error():
    gan = GANModule(MLP([4, 2]), MLP([2, 8, 2]), 4, loss=BoundaryEquilibrium())
    x = torch.randn(5, 2)
    expected = (gan.discriminator(x) - x).abs().mean(1)
    torch.testing.assert_close(gan.logits(x), expected)
    run = fit(gan, points(4))
    assert gan.loss.k > 0
    assert run.callback_metrics["d/real_logit"] > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_began_moves_its_control_once_per_discriminator_step(accumulate):
    """Frozen networks, so that both errors stay what they are and k follows its closed form."""

    class Shift(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = nn.Parameter(torch.tensor(by))

        def forward(self, x):
            return x + self.by

    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, z):
            return torch.ones(len(z), 2) * self.scale

    gan = GANModule(
        Ones(),
        Shift(0.8),
        4,
        loss=BoundaryEquilibrium(gamma=0.5, lambda_k=0.01),
        d_optimizer=sgd(0.0),
        g_optimizer=sgd(0.0),
        accumulate=accumulate,
    )
    gan.plan = ("d", "g", "d")
    fit(gan, points(5, batch_size=7))
    # both errors are 0.8, γ·0.8 − 0.8 < 0: k stays at its floor; with γ = 1 it would stand still
    assert gan.loss.k == 0
    gan.loss.k.fill_(0.5)
    fit(gan, points(5, batch_size=7))
    assert gan.loss.k.item() == pytest.approx(0.5 + 10 * 0.01 * (0.5 * 0.8 - 0.8), abs=1e-6)
    assert gan.loss.convergence.item() == pytest.approx(0.8 + abs(0.5 * 0.8 - 0.8), abs=1e-6)


# ---------- hyperparameters


def test_hyperparameters_hold_plain_values_alone():
    class Mine(GANModule):
        def __init__(self, width, extra=None, **kwargs):
            super().__init__(MLP([4, width, 2]), MLP([2, width, 1]), latent_dim=4, **kwargs)
            self.save_hyperparameters()

    gan = Mine(width=8, extra=nn.Linear(1, 1), loss=LeastSquares(), clip_norm=1.0)
    assert gan.hparams["width"] == 8
    assert gan.hparams["clip_norm"] == 1.0
    assert not {"extra", "loss", "generator", "discriminator"} & set(gan.hparams)
    assert dict(gan.hparams_initial) == dict(gan.hparams)


def test_arguments_that_a_subclass_passes_on_come_back(tmp_path):
    class Mine(GANModule):
        def __init__(self, width=8, **more):
            super().__init__(MLP([4, width, 2]), MLP([2, width, 1]), latent_dim=4, **more)

    class Deeper(Mine):
        def __init__(self, clip_norm=2.0, **more):
            super().__init__(clip_norm=clip_norm, **more)

    for gan in (Mine(width=6, noise_seed=3), Deeper(width=6, noise_seed=3)):
        run = fit(gan, points(2), callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
        loaded = type(gan).load_from_checkpoint(run.checkpoint_callback.best_model_path, weights_only=True)
        assert loaded.noise_seed == 3
        assert loaded.clip_norm == gan.clip_norm
        assert torch.equal(weights(loaded), weights(gan))


def test_a_subclass_that_builds_its_networks_loads_without_arguments(tmp_path):
    class Own(GANModule):
        def __init__(self, width: int = 8) -> None:
            super().__init__(MLP([4, width, 2]), MLP([2, width, 1]), latent_dim=4, loss=Hinge())

    run = fit(Own(width=6), points(2), callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    loaded = Own.load_from_checkpoint(run.checkpoint_callback.best_model_path, weights_only=True)
    assert isinstance(loaded.loss, Hinge)
    assert torch.equal(weights(loaded), weights(run.lightning_module))
    assert loaded.iteration == 2


def test_a_loss_of_your_own_comes_back_if_it_keeps_its_arguments(tmp_path):
    class Kept(AdversarialLoss):
        def __init__(self, margin=1.0):
            super().__init__()
            self.margin = margin

        def discriminator(self, real_logits, fake_logits):
            return fake_logits - self.margin * real_logits

        def generator(self, fake_logits, real_logits=None):
            return -fake_logits

    class Forgotten(Kept):
        def __init__(self, slope=1.0):
            super().__init__(slope)

    networks = {"generator": MLP([4, 2]), "discriminator": MLP([2, 1])}
    for loss in (Kept(3.0), Forgotten(3.0)):
        gan = GANModule(**networks, latent_dim=4, loss=loss)
        run = fit(gan, points(1), callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
        path = run.checkpoint_callback.best_model_path
        if type(loss) is Kept:
            assert GANModule.load_from_checkpoint(path, **networks).loss.margin == 3.0
        else:
            with pytest.raises(ValueError, match=r"made with .*Forgotten, which cannot .* pass an instance"):
                GANModule.load_from_checkpoint(path, **networks)
            assert GANModule.load_from_checkpoint(path, **networks, loss=loss).loss is loss


def test_a_foreign_checkpoint_is_refused(tmp_path):
    run = fit(small(), points(1), callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    path = run.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["_extra_state"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="This is no state of a GANModule"):
        GANModule.load_from_checkpoint(tmp_path / "foreign.ckpt", generator=MLP([4, 2]), discriminator=MLP([2, 1]))


# ---------- what a subclass may get wrong


class Optimizers(GANModule):
    """Returns what a function makes of the two optimizers that there would be."""

    change: Callable[..., Any] = staticmethod(lambda d, g: [d, g])

    def configure_optimizers(self):
        (d, g), _ = super().configure_optimizers()
        return self.change(d, g)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, g: d, "must return two optimizers, the discriminator's first, got 1."),
        (lambda d, g: [g, d], "The discriminator's optimizer has the other network's parameters"),
        (lambda d, g: [d, d], "The generator's optimizer has the other network's parameters"),
        (
            lambda d, g: [d, torch.optim.LBFGS(g.param_groups[0]["params"])],
            "The generator's optimizer is LBFGS, which takes the loss anew within a step",
        ),
    ],
)
def test_optimizers_that_cannot_be_right_are_refused(change, message):
    gan = Optimizers(MLP([4, 2]), MLP([2, 1]), latent_dim=4)
    gan.change = change
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        fit(gan, points(1))


def test_optimizers_may_have_more_than_a_network():
    """A scale of both networks, or a third optimizer, is a subclass's own business."""
    gan = Optimizers(MLP([4, 2]), MLP([2, 1]), latent_dim=4)
    more = nn.Parameter(torch.ones(1))
    gan.change = lambda d, g: [d, torch.optim.SGD([*g.param_groups[0]["params"], more], 0.1), torch.optim.SGD([more])]
    fit(gan, points(1))
    assert gan.iteration == 1


@pytest.mark.parametrize(("method", "player"), [("generate", "generator"), ("discriminate", "discriminator")])
def test_a_loss_without_a_gradient_says_where_to_look(method, player, monkeypatch):
    monkeypatch.setattr(GANModule, method, torch.no_grad()(getattr(GANModule, method)))
    gan = small()
    with pytest.raises(ValueError, match=f"The loss of the {player} does not depend on its parameters: something in"):
        fit(gan, points(1))
    assert gan.iteration == 0


@pytest.mark.parametrize(
    ("last", "loss", "said"),
    [(nn.Sigmoid, None, True), (nn.Tanh, None, False), (nn.Sigmoid, BoundaryEquilibrium(), False)],
)
def test_a_sigmoid_before_the_loss_is_said(last, loss, said):
    discriminator = nn.Sequential(MLP([2, 2 if loss else 1]), last())
    gan = GANModule(MLP([4, 2]), discriminator, latent_dim=4, loss=loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(gan, points(1))
    assert any("ends in a Sigmoid, but losses take logits" in str(w.message) for w in caught) == said


# ---------- one fit after another


def test_a_module_in_eval_mode_is_refused():
    gan = small().eval()
    with pytest.raises(
        MisconfigurationException, match="is in eval mode, in which BatchNorm, dropout and spectral norm"
    ):
        fit(gan, points(1))
    fit(gan.train(), points(1))


def test_a_second_fit_logs_nothing_of_the_first():
    gan = small()
    assert "d/r1" in fit(gan, points(2), callbacks=[R1Penalty()]).callback_metrics
    assert "d/r1" not in fit(gan, points(2)).callback_metrics


class Breaks(Regularizer):
    """Breaks in a micro-batch."""

    differentiates = ("real",)

    def penalty(self, module, outputs):
        raise RuntimeError("broken")


def test_an_error_inside_of_a_step_leaves_nothing_behind():
    gan, twin = (small(accumulate=2) for _ in range(2))
    with pytest.raises(RuntimeError, match="broken"):
        fit(gan, points(2), callbacks=[Breaks()])
    assert torch.equal(gan.noise.randn(4, 2), twin.noise.randn(4, 2))
    assert not gan.compute_outputs("d", points(1)[0], ()).real.requires_grad


def test_a_frozen_player_that_is_to_move_is_refused():
    gan = small()
    gan.generator.requires_grad_(False)
    with pytest.raises(
        MisconfigurationException, match=r"All parameters of the generator are frozen, but it stands in"
    ):
        fit(gan, points(1))
    gan.plan = ("d",)
    fit(gan, points(1))


def test_reconstructions_of_packs_are_refused():
    gan = GANModule(MLP([4, 2]), Packed(MLP([4, 4]), 2), 4, loss=BoundaryEquilibrium())
    with pytest.raises(
        MisconfigurationException, match="BoundaryEquilibrium judges each sample by its reconstruction,"
    ):
        fit(gan, points(1))


# ---------- what a subclass may get wrong


# every hook of Lightning, but the one that says that it needs `super()`, and those that are the step itself
HOOKS = [
    name
    for base in (ModelHooks, DataHooks, CheckpointHooks)
    for name, hook in vars(base).items()
    if name.startswith(("on_", "setup", "teardown", "configure_", "prepare_")) and callable(hook)
    if name not in ("configure_sharded_model", "on_before_batch_transfer", "on_after_batch_transfer")
]


def silent(name):
    """A subclass that overrides a hook as in any LightningModule: without `super()`."""
    return type("Silent", (GANModule,), {name: lambda self, *args, **kwargs: called.append(name)})


called = []


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_without_super_loses_nothing(name, tmp_path):
    runs = []
    for kind in (GANModule, silent(name), type("Deeper", (silent(name),), {})):
        torch.manual_seed(0)
        module = kind(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, clip_norm=1e-2, g_optimizer=sgd(0.5), d_optimizer=sgd(0.5))
        saves = ModelCheckpoint(tmp_path / kind.__name__, every_n_train_steps=3, save_top_k=-1)
        fit(module, points(3), callbacks=[saves], enable_checkpointing=True, max_epochs=2)
        checkpoint = next((tmp_path / kind.__name__).glob("*step=3.ckpt"))
        other = kind(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, clip_norm=1e-2, g_optimizer=sgd(0.5), d_optimizer=sgd(0.5))
        fit(other, points(3), ckpt_path=checkpoint, max_epochs=2)
        runs.append((weights(module), weights(other), other.iteration))
    for run in runs:
        assert run[2] == 6
        assert all(torch.equal(run[i], runs[0][0]) for i in (0, 1))


def test_silent_hooks_are_called():
    """What the test above overrides is really overridden."""
    called.clear()
    for name in ("on_fit_start", "on_train_start", "setup", "on_before_optimizer_step"):
        fit(silent(name)(MLP([4, 2]), MLP([2, 1]), 4), points(1))
    assert {*called} == {"on_fit_start", "on_train_start", "setup", "on_before_optimizer_step"}


def test_a_hook_of_the_module_sees_clipped_gradients():
    norms = []

    class Own(GANModule):
        def on_before_optimizer_step(self, optimizer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(nn.utils.get_total_norm(gradients).item())

    fit(Own(MLP([4, 2]), MLP([2, 1]), 4, clip_norm=1e-3), points(2))
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)


def test_configure_callbacks_needs_super():
    class Own(GANModule):
        def configure_callbacks(self):
            return []

    with pytest.raises(MisconfigurationException, match="`configure_callbacks` of Own leaves out what GANModule retu"):
        fit(Own(MLP([4, 2]), MLP([2, 1]), 4), points(1))

    class Adds(GANModule):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), Timer()]

    assert any(isinstance(c, Timer) for c in fit(Adds(MLP([4, 2]), MLP([2, 1]), 4), points(1)).callbacks)


def test_one_trainer_fits_several_modules():
    """Each has its own guard, and a module that is no GAN is left alone."""
    run = trainer(max_steps=2, max_epochs=-1)
    for module in (small(), small(clip_norm=1e-3)):
        run.fit_loop.epoch_loop.manual_optimization.optim_step_progress.reset()
        run.fit(module, DataLoader(points(2), batch_size=None))
        assert module.iteration == 2
    other = trainer(max_steps=2)
    other.callbacks.append(next(c for c in run.callbacks if type(c).__name__ == "Guard"))
    other.fit(BoringModel())
    assert other.global_step == 2


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (torch.zeros(2, 2), "a torch.float32 tensor of shape (2, 2)"),
        ([torch.zeros(2, 2)], "a list of 1"),
        ((None, None), "a tuple of 2"),
    ],
)
def test_an_unpack_that_returns_something_else_is_refused(found, got):
    class Wrong(GANModule):
        def unpack(self, batch):
            return found

    message = f"`unpack` must return samples and a condition (or None) of a batch, got {got}."
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(Wrong(MLP([4, 2]), MLP([2, 1]), 4), points(1))


def test_an_unpack_may_return_a_list():
    """As the batch of a TensorDataset is one."""

    class Own(GANModule):
        def unpack(self, batch):
            return [batch, None]

    plain = small()
    module = Own(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)
    module.load_state_dict(plain.state_dict())
    for gan in (plain, module):
        fit(gan, points(2))
    assert torch.equal(weights(plain), weights(module))


def test_conditions_are_tensors():
    with pytest.raises(ValueError, match=r"`condition` must be a tensor, or a tree of tensors, .* got a int\."):
        small().sample(2, condition=[0, 1])


def test_shared_parameters_need_one_gradient_at_a_time():
    generator, discriminator = MLP([4, 2, 2]), MLP([2, 2, 1])
    discriminator.layers[0].weight = generator.layers[-1].weight
    fit(GANModule(generator, discriminator, 4), points(1))
    with pytest.raises(
        MisconfigurationException, match="The networks share parameters, and Simultaneous holds the gradients of both"
    ):
        fit(GANModule(generator, discriminator, 4), points(1), callbacks=[Simultaneous()])


def test_arguments_that_checkpoints_do_not_keep_are_named(tmp_path):
    class Mine(GANModule):
        def __init__(self, path, width=8):
            super().__init__(MLP([4, width, 2]), MLP([2, width, 1]), latent_dim=4)

    with pytest.warns(UserWarning, match="lists and dicts, and not path: give what is left out"):
        module = Mine(tmp_path)
    assert dict(module.hparams) == {"width": 8}
