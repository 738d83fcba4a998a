"""The generator's average and Lookahead against their closed forms and recursions."""

import math
from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader
from toys import fit, ignoring, points, sgd, small, tensors, trainer, weights

from lightning_gan_stability import (
    MLP,
    GANModule,
    GeneratorEMA,
    Lookahead,
    Simultaneous,
    SpectralNorm,
    UpdateRatio,
)


class Record(Callback):
    """Both generators after every batch."""

    def __init__(self):
        self.now, self.average = [], []

    def on_train_start(self, trainer, module):
        self.start = weights(module.generator)

    def on_train_batch_end(self, trainer, module, *_):
        self.now.append(weights(module.generator))
        if module.generator_ema is not None:
            self.average.append(weights(module.generator_ema))


def moving(**kwargs):
    return small(g_optimizer=sgd(0.5), d_optimizer=sgd(0.5), **kwargs).double()


def train(module, callbacks, n=6):
    record = Record()
    fit(module, points(n, dtype=torch.float64), callbacks=[*callbacks, record])
    return record


# ---------- GeneratorEMA


@pytest.mark.parametrize(
    ("ema", "beta"),
    [
        (lambda: GeneratorEMA(decay=0.7), lambda n: 0.7),
        (lambda: GeneratorEMA(), lambda n: 0.999),
        (lambda: GeneratorEMA(half_life=3), lambda n: 0.5 ** (1 / 3)),
        (lambda: GeneratorEMA(half_life=0), lambda n: 0.0),
        (lambda: GeneratorEMA(decay=0.0), lambda n: 0.0),
        (lambda: GeneratorEMA(half_life=1.5, ramp_up=0.5), lambda n: 0.5 ** (1 / min(1.5, 0.5 * n)) if n else 0.0),
        (lambda: GeneratorEMA(decay=0.5, ramp_up=0.25), lambda n: 0.5 ** (1 / min(1.0, 0.25 * n)) if n else 0.0),
    ],
)
def test_average_follows_its_recursion(ema, beta):
    record = train(moving(), [ema()])
    mean = record.start
    for n, (now, average) in enumerate(zip(record.now, record.average, strict=True)):
        mean = beta(n) * mean + (1 - beta(n)) * now
        torch.testing.assert_close(average, mean, rtol=1e-12, atol=1e-14)


class Still(Callback):
    """Holds the generator at given weights from the first batch on."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            for p in module.generator.parameters():
                p.fill_(self.value)


@pytest.mark.parametrize("n", [1, 4, 8])
def test_closed_form_for_constant_weights(n):
    module = moving()
    with torch.no_grad():
        for p in module.generator.parameters():
            p.zero_()
    record = train(module, [Still(1.0), GeneratorEMA(half_life=4)], n)
    assert record.average[-1].max().item() == pytest.approx(1 - 0.5 ** (n / 4), rel=1e-12)
    assert record.average[-1].min().item() == pytest.approx(1 - 0.5 ** (n / 4), rel=1e-12)


def test_steps_are_those_of_the_generator():
    """With a ratio of 3 to 1 the generator moves on every third batch, and so does its average."""
    record = train(moving(), [UpdateRatio(d_steps=3), GeneratorEMA(decay=0.5)], 9)
    moves = [not torch.equal(a, b) for a, b in zip([record.start, *record.average], record.average, strict=False)]
    assert moves == [False, False, True] * 3
    mean = record.start
    for now in record.now[2::3]:
        mean = 0.5 * mean + 0.5 * now
    torch.testing.assert_close(record.average[-1], mean, rtol=1e-12, atol=1e-14)


def batch_norm():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return GANModule(generator, MLP([2, 8, 1]), 4, g_optimizer=sgd(0.5), d_optimizer=sgd(0.5))


def test_buffers_are_copied():
    module = batch_norm()
    fit(module, points(5), callbacks=[GeneratorEMA(decay=0.9), SpectralNorm("generator")])
    average, now = dict(module.generator_ema.named_buffers()), dict(module.generator.named_buffers())
    assert average.keys() == now.keys()
    assert {name.split(".")[-1] for name in now} >= {"running_mean", "num_batches_tracked", "_u", "_v"}
    vectors = [name for name in now if name.endswith(("_u", "_v"))]
    assert all(torch.equal(average[name], now[name]) != (name in vectors) for name in now)
    assert not torch.equal(weights(module.generator_ema), weights(module.generator))


@pytest.mark.parametrize("order", [1, -1])
def test_spectral_norm_and_average_in_any_order(order):
    module = batch_norm()
    fit(module, points(3), callbacks=[GeneratorEMA(decay=0.9), SpectralNorm("generator")][::order])
    module.eval()
    z = torch.randn(5, 4)
    assert torch.equal(module.sample(5, latents=z), module.generator_ema(z))
    assert "generator_ema.0.parametrizations.weight._u".replace("._u", ".0._u") in module.state_dict()


def test_only_the_generator_is_averaged_and_the_average_does_not_train():
    module = moving()
    run = fit(module, points(3, dtype=torch.float64), callbacks=[GeneratorEMA()])
    averaged = {id(p) for p in module.generator_ema.parameters()}
    assert not any(id(p) in averaged for o in run.optimizers for g in o.param_groups for p in g["params"])
    assert not any(p.requires_grad for p in module.generator_ema.parameters())
    assert [n for n, _ in module.named_children() if n.endswith("_ema")] == ["generator_ema"]


def test_training_is_the_same_with_and_without():
    found = []
    for callbacks in ([], [GeneratorEMA(half_life=2)]):
        module = batch_norm()
        fit(module, points(5), callbacks=callbacks)
        found.append(weights(module.generator))
    assert torch.equal(*found)


def test_validation_and_samples_in_eval_mode_use_the_average():
    seen = []

    class Spy(Callback):
        def on_validation_batch_end(self, trainer, module, *_):
            z = torch.ones(3, 4)
            seen.append(torch.equal(module.sample(3, latents=z), module.generator_ema(z.to(module.device))))

    module = small(g_optimizer=sgd(0.5))
    run = trainer(callbacks=[GeneratorEMA(), Spy()])
    run.fit(module, DataLoader(points(3), batch_size=None), DataLoader(points(2), batch_size=None))
    assert len(seen) >= 2
    assert all(seen)
    z = torch.ones(3, 4)
    assert torch.equal(module.train().sample(3, latents=z), module.generator(z))


def test_a_checkpoint_needs_no_callback():
    module = small(g_optimizer=sgd(0.5))
    run = fit(module, points(4), callbacks=[GeneratorEMA(half_life=2)], enable_checkpointing=True)
    run.save_checkpoint("model.ckpt")
    networks = {"generator": MLP([4, 16, 2]), "discriminator": MLP([2, 16, 1])}
    loaded = GANModule.load_from_checkpoint("model.ckpt", weights_only=True, **networks).eval()
    z = torch.ones(3, 4)
    assert torch.equal(loaded.sample(3, latents=z), module.eval().sample(3, latents=z))
    assert not torch.equal(weights(loaded.generator), weights(loaded.generator_ema))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_can_go_on_with_an_average_that_it_did_not_have():
    module = small(g_optimizer=sgd(0.5))
    run = fit(module, points(4), enable_checkpointing=True)
    run.save_checkpoint("model.ckpt")
    other, record = small(seed=3, g_optimizer=sgd(0.5)), Record()
    fit(other, points(4), ckpt_path="model.ckpt", callbacks=[GeneratorEMA(decay=0.5), record], max_epochs=2)
    torch.testing.assert_close(record.average[0], 0.5 * record.start + 0.5 * record.now[0])
    assert torch.equal(record.start.cpu(), weights(module.generator))


def test_a_second_fit_goes_on_and_another_module_starts_anew():
    whole, parts = moving(), moving()
    batches = points(6, dtype=torch.float64)
    fit(whole, batches, callbacks=[GeneratorEMA(half_life=2, ramp_up=0.3)])
    ema = GeneratorEMA(half_life=2, ramp_up=0.3)
    fit(parts, batches[:3], callbacks=[ema])
    fit(parts, batches[3:], callbacks=[ema])
    assert torch.equal(weights(whole.generator_ema), weights(parts.generator_ema))
    again = moving()
    fit(again, batches, callbacks=[ema])
    assert torch.equal(weights(whole.generator_ema), weights(again.generator_ema))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_low_precision_does_not_round_the_average_away(precision):
    """bfloat16 has steps of 1/128 near 1: an average that moves by a thousandth of 1 would never move."""
    module = small(g_optimizer=sgd(0.0), d_optimizer=sgd(0.0))
    with torch.no_grad():
        for p in module.generator.parameters():
            p.fill_(1.0)
    # the batch end of Still comes first: from then on the generator is 2, and the average comes closer by 1/1000
    fit(module, points(200, 2), callbacks=[Still(2.0), GeneratorEMA(decay=0.999)], precision=precision)
    expected = 2 - 0.999**200
    assert weights(module.generator_ema).float().mean().item() == pytest.approx(expected, abs=5e-3)
    assert weights(module.generator_ema).dtype == weights(module.generator).dtype


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"half_life": 10, "decay": 0.9}, "Give `half_life` or `decay`, not both, got 10 and 0.9."),
        ({"half_life": -1}, "`half_life` must be a finite number that is not negative, got -1."),
        ({"half_life": math.inf}, "`half_life` must be a finite number that is not negative, got inf."),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0."),
        ({"decay": -0.1}, r"`decay` must be in \[0, 1\), got -0.1."),
        ({"ramp_up": 0.0}, "`ramp_up` must be a positive finite number, got 0.0."),
    ],
)
def test_bad_arguments_of_the_average(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GeneratorEMA(**kwargs)


def test_two_averages_are_refused():
    with pytest.raises((MisconfigurationException, RuntimeError), match="GeneratorEMA"):
        fit(small(), points(1), callbacks=[GeneratorEMA(), GeneratorEMA(decay=0.5)])


# ---------- Lookahead


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (2, 0.5), (3, 1.0)])
@pytest.mark.parametrize("rule", [None, Simultaneous])
def test_lookahead_pulls_both_players_together(k, alpha, rule):
    module, reference = moving(), moving()
    batches = points(6, dtype=torch.float64)
    rules = [rule()] if rule else []
    slow = weights(reference)
    for i in range(0, 6, k):
        fit(reference, batches[i : i + k], callbacks=rules)
        slow = slow + alpha * (weights(reference) - slow)
        nn.utils.vector_to_parameters(slow.clone(), reference.parameters())
    fit(module, batches, callbacks=[Lookahead(k, alpha), *rules])
    torch.testing.assert_close(weights(module), slow, rtol=1e-12, atol=1e-14)


def test_lookahead_counts_steps_of_the_generator():
    pulled = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            self.before = deepcopy(tensors(module.state_dict()))

    class Rest(Callback):
        """Before Lookahead in the list: what the optimizers left."""

        def on_train_batch_end(self, trainer, module, *_):
            self.left = weights(module)

    class After(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            pulled.append(not torch.equal(rest.left, weights(module)))

    rest = Rest()
    callbacks = [UpdateRatio(d_steps=2), Watch(), rest, Lookahead(k=2, alpha=0.5), After()]
    fit(moving(), points(8, dtype=torch.float64), callbacks=callbacks)
    assert pulled == [False, False, False, True] * 2


def test_lookahead_leaves_moments_alone():
    make = lambda p: torch.optim.Adam(p, lr=0.1)  # noqa: E731
    module = small(g_optimizer=make, d_optimizer=make)
    run = fit(module, points(4), callbacks=[Lookahead(k=2)])
    assert all(state["step"] == 4 for o in run.optimizers for state in o.state.values())


def test_lookahead_goes_on_in_a_second_fit_and_starts_anew_with_another_module():
    whole, parts, again = moving(), moving(), moving()
    batches = points(6, dtype=torch.float64)
    fit(whole, batches, callbacks=[Lookahead(k=4)])
    lookahead = Lookahead(k=4)
    fit(parts, batches[:3], callbacks=[lookahead])
    fit(parts, batches[3:], callbacks=[lookahead])
    assert torch.equal(weights(whole), weights(parts))
    fit(again, batches, callbacks=[lookahead])
    assert torch.equal(weights(whole), weights(again))


class Crash(Callback):
    def on_train_batch_start(self, trainer, module, *_):
        raise RuntimeError("crash")


@pytest.mark.parametrize("make", [lambda: Lookahead(k=2), lambda: GeneratorEMA(decay=0.5), lambda: UpdateRatio(3)])
def test_memory_of_a_module_of_the_same_age_is_forgotten(make):
    """In a notebook the first fit crashes, the module is made again, and the same callbacks go on."""
    callback, other = make(), make()
    with pytest.raises(RuntimeError, match="crash"):
        fit(moving(), points(4, dtype=torch.float64), callbacks=[callback, Crash()])
    trained, fresh = moving(seed=1), moving(seed=1)
    for n in (4, 2):
        fit(trained, points(n, dtype=torch.float64), callbacks=[callback])
        fit(fresh, points(n, dtype=torch.float64), callbacks=[other])
    assert torch.equal(weights(trained), weights(fresh))
    fit(moving(seed=2), points(6, dtype=torch.float64), callbacks=[callback])  # as old as `trained`
    again, twin = moving(seed=3), moving(seed=3)
    again.iteration = twin.iteration = 6
    fit(again, points(4, dtype=torch.float64), callbacks=[callback])
    fit(twin, points(4, dtype=torch.float64), callbacks=[make()])
    assert torch.equal(weights(again), weights(twin))


def test_steps_in_between_without_the_callback_are_not_averaged():
    module, ema = moving(), GeneratorEMA(decay=0.9)
    fit(module, points(3, dtype=torch.float64), callbacks=[ema])
    module.generator_ema, average = None, module.generator_ema
    fit(module, points(3, dtype=torch.float64))
    module.generator_ema, start = average, weights(module.generator)
    with pytest.warns(UserWarning, match="GeneratorEMA starts again from a copy of the generator: set GeneratorEMA"):
        record = train(module, [ema], n=1)
    torch.testing.assert_close(record.average[0].cpu(), 0.9 * start + 0.1 * record.now[0].cpu())


def test_slow_and_super_slow():
    module = moving()
    fit(module, points(6, dtype=torch.float64), callbacks=[Lookahead(k=2), Lookahead(k=6, alpha=0.2)])
    assert weights(module).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "`k` must be a positive integer, got 0."),
        ({"alpha": 0.0}, r"`alpha` must be in \(0, 1\], got 0.0."),
        ({"alpha": 1.5}, r"`alpha` must be in \(0, 1\], got 1.5."),
    ],
)
def test_bad_arguments_of_lookahead(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(**kwargs)


class Cached(nn.Module):
    """Makes a buffer in its first forward pass, and another that grows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("shift", None, persistent=False)
        self.register_buffer("queue", torch.zeros(0))

    def forward(self, latents):
        if self.shift is None:
            self.shift = torch.ones(2)
        self.queue = torch.cat([self.queue, torch.ones(1)])
        return self.layer(latents) + self.shift


def test_buffers_that_the_forward_pass_makes_are_taken_over():
    module = GANModule(Cached(), MLP([2, 8, 1]), 4)
    fit(module, points(3), callbacks=[GeneratorEMA(decay=0.9)])
    assert torch.equal(module.generator_ema.queue, module.generator.queue)
    assert module.eval().sample(3).shape == (3, 2)


# ---------- networks that keep more than parameters


class Caches(nn.Module):
    """Keeps an activation of its last forward pass, as feature matching by hand does."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.hidden = nn.Linear(4, 8), nn.Linear(8, 2), None

    def forward(self, latents):
        self.hidden = self.first(latents).relu()
        return self.last(self.hidden)


def normalized(norm):
    return nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), norm(nn.Linear(8, 2)))


GENERATORS = {
    "weight_norm": lambda: normalized(nn.utils.weight_norm),
    "spectral_norm": lambda: normalized(nn.utils.spectral_norm),
    "parametrized weight_norm": lambda: normalized(nn.utils.parametrizations.weight_norm),
    "an activation": Caches,
}


def generator(name, seed=0):
    """A network that has run, with what that leaves in it."""
    torch.manual_seed(seed)
    with ignoring():  # torch warns of its older normalizations
        network = GENERATORS[name]()
    network(torch.randn(3, 4))
    return network


@pytest.mark.parametrize("name", GENERATORS)
def test_networks_that_keep_tensors_are_averaged(name):
    module = GANModule(generator(name), MLP([2, 16, 1]), 4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    record = Record()
    fit(module, points(5), callbacks=[GeneratorEMA(decay=0.7), record])
    mean = record.start
    for now, average in zip(record.now, record.average, strict=True):
        mean = 0.7 * mean + 0.3 * now
        torch.testing.assert_close(average, mean, rtol=1e-5, atol=1e-7)
    assert (record.average[-1] - record.now[-1]).abs().max() > 1e-3
    assert not any(p.requires_grad for p in module.generator_ema.parameters())
    # what it draws are samples of a network with its weights
    twin = GANModule(generator(name, seed=1), MLP([2, 16, 1]), 4)
    twin.generator.load_state_dict(module.generator_ema.state_dict())
    latents = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.eval().sample(latents=latents), twin.eval().sample(latents=latents))


@pytest.mark.parametrize("name", GENERATORS)
def test_networks_that_keep_tensors_are_loaded_with_their_average(name, tmp_path):
    module = GANModule(generator(name), MLP([2, 16, 1]), 4, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    fit(module, points(5), callbacks=[GeneratorEMA(decay=0.7)]).save_checkpoint(tmp_path / "gan.ckpt")
    arguments = {"generator": generator(name, seed=1), "discriminator": MLP([2, 16, 1])}
    loaded = GANModule.load_from_checkpoint(tmp_path / "gan.ckpt", weights_only=True, **arguments)
    for mode in (True, False):
        latents = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        module.train(mode), loaded.train(mode)
        assert torch.equal(module.sample(latents=latents), loaded.sample(latents=latents))


# ---------- an average that is there already


def published(value=7.0):
    module = moving()
    module.generator_ema = deepcopy(module.generator).requires_grad_(False)
    with torch.no_grad():
        for p in module.generator_ema.parameters():
            p.fill_(value)
    return module


def test_an_average_that_is_there_is_gone_on_with_on_wish():
    module = published()
    record = train(module, [GeneratorEMA(decay=0.5, restart=False)], 3)
    mean = torch.full_like(record.start, 7.0)
    for now, average in zip(record.now, record.average, strict=True):
        mean = 0.5 * mean + 0.5 * now
        torch.testing.assert_close(average, mean, rtol=1e-12, atol=1e-14)


def test_an_average_that_is_there_is_not_overwritten_in_silence():
    module = published()
    with pytest.warns(UserWarning, match=r"already has an average of its generator, .* GeneratorEMA\(restart=False\)"):
        record = train(module, [GeneratorEMA(decay=0.5)], 1)
    torch.testing.assert_close(record.average[0], (record.start + record.now[0]) / 2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("restart", [True, False])
def test_an_average_of_its_own_goes_on_in_a_resumed_run(restart, tmp_path):
    """Whatever `restart` says, without a word: the checkpoint has it."""
    data = DataLoader(points(3, dtype=torch.float64), batch_size=None)
    first, second = moving(), moving()
    run = trainer(callbacks=[GeneratorEMA(decay=0.9, restart=restart)], max_steps=3, max_epochs=-1)
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "half.ckpt")
    ema, record = GeneratorEMA(decay=0.9, restart=restart), Record()
    run = trainer(callbacks=[ema, record], max_steps=6, max_epochs=-1)
    run.fit(second, data, ckpt_path=tmp_path / "half.ckpt")
    assert ema.updates == 6
    mean = weights(first.generator_ema)
    for now, average in zip(record.now, record.average, strict=True):
        mean = 0.9 * mean + 0.1 * now
        torch.testing.assert_close(average, mean, rtol=1e-12, atol=1e-14)
