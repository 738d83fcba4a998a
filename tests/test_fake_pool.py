"""The pool of CycleGAN, against its rule written down, and as a part of a run."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from toys import Shift, fit, points, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    ConsistencyPenalty,
    Extragradient,
    FakePool,
    GANModule,
    GANOutputs,
    Packed,
    R2Penalty,
    Unrolling,
)
from lightning_gan_stability.noise import generator


def draws(i, pool=0, seed=0):
    """The coin and the place of the i-th sample that a pool was asked for."""
    return torch.rand(2, generator=generator(seed, "pool", pool, i), dtype=torch.float64).tolist()


class Reference:
    """The rule, image by image."""

    def __init__(self, size, probability, number=0):
        self.size, self.probability, self.number = size, probability, number
        self.images, self.asked = [], 0

    def query(self, images):
        shown = []
        for image in images:
            coin, place = draws(self.asked, self.number)
            self.asked += 1
            if len(self.images) < self.size:
                self.images.append(image)
                shown.append(image)
            elif coin < self.probability:
                slot = int(place * self.size)
                shown.append(self.images[slot])
                self.images[slot] = image
            else:
                shown.append(image)
        return torch.stack(shown)


def ask(pool, module, *samples, **kwargs):
    return [pool.change_samples(module, "d", GANOutputs(None, sample, **kwargs)).fake for sample in samples]


@pytest.mark.parametrize("probability", [0.5, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("size", [1, 5, 50])
def test_the_rule(size, probability):
    pool, reference = FakePool(size, probability), Reference(size, probability)
    batches = points(20)
    for shown, batch in zip(ask(pool, small(), *batches), batches, strict=True):
        assert torch.equal(shown, reference.query(batch))
    assert pool.seen == 160


def test_the_first_fifty_are_shown_as_they_come():
    batches = points(10, 5)
    for shown, batch in zip(ask(FakePool(), small(), *batches), batches, strict=True):
        assert torch.equal(shown, batch)


def test_about_half_are_old():
    old = 0
    for shown, batch in zip(*(lambda b: (ask(FakePool(20), small(), *b), b))(points(200)), strict=True):
        old += (shown != batch).any(1).sum().item()
    assert old / (1600 - 20) == pytest.approx(0.5, abs=4 * 0.5 / 1580**0.5)


def test_leaves_and_conditions_stay_together():
    pool, module = FakePool(4, 0.8), small()
    for batch in points(10):
        labels = (1000 * batch[:, 0]).round().int()
        tree = {"x": batch, "y": batch[:, :1].clone()}
        outputs = GANOutputs(None, tree, condition=labels, latents=torch.zeros(8, 4))
        found = pool.change_samples(module, "d", outputs)
        assert torch.equal(found.fake["x"][:, :1], found.fake["y"])
        assert torch.equal((1000 * found.fake["x"][:, 0]).round().int(), found.fake_condition)
        assert torch.equal(found.condition, labels)
    assert not torch.equal(found.fake_condition, labels)


def test_independent_leaves():
    pool, module = FakePool(4, 0.8, independent=True), small()
    references = [Reference(4, 0.8, number) for number in (0, 1)]
    for batch in points(10):
        outputs = GANOutputs(None, [batch, -batch], condition=torch.arange(8))
        found = pool.change_samples(module, "d", outputs)
        for reference, shown, new in zip(references, found.fake, (batch, -batch), strict=True):
            assert torch.equal(shown, reference.query(new))
        assert torch.equal(found.fake_condition, torch.arange(8))


def test_the_generator_sees_its_own_samples():
    outputs = GANOutputs(None, torch.zeros(8, 2))
    assert FakePool().change_samples(small(), "g", outputs) is outputs


def test_a_run_with_a_pool():
    """What the discriminator is shown in a run is the pool's; the generator's turn is its own."""
    module, pool = small(), FakePool(10, 0.9)
    reference, seen = Reference(10, 0.9), []
    judge = module.judge

    def spy(outputs, *args, **kwargs):
        seen.append(outputs)
        return judge(outputs, *args, **kwargs)

    made = []
    generate = module.generate
    module.generate = lambda *a: made.append(generate(*a)) or made[-1]
    module.judge = spy
    fit(module, points(6), callbacks=[pool, R2Penalty(0.1)])
    for i in range(6):
        assert torch.equal(seen[2 * i].fake, reference.query(made[2 * i].detach()))
        assert seen[2 * i].fake.requires_grad  # R2 differentiates by what the discriminator sees
        assert seen[2 * i + 1].fake is made[2 * i + 1]


def test_micro_batches_make_the_same_of_a_pool():
    found = []
    for accumulate in (1, 2):
        module = small(accumulate=accumulate).double()
        fit(module, points(6, dtype=torch.float64), callbacks=[FakePool(10, 0.9)])
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_validation_asks_no_pool():
    module, pool = small(), FakePool()
    data = torch.utils.data.DataLoader(points(2), batch_size=None)
    trainer(callbacks=[pool], max_steps=2).fit(module, data, data)
    assert pool.seen == 16


@pytest.mark.parametrize("rule", [Extragradient(), Unrolling(1)])
def test_rules_that_look_at_one_batch_together(rule):
    with pytest.raises(
        MisconfigurationException, match=f"but {type(rule).__name__} needs the generator's current ones: remove"
    ):
        fit(small(), points(1), callbacks=[FakePool(), rule])


def test_packs_and_near_latents_are_refused():
    module = GANModule(MLP([4, 2]), Packed(MLP([4, 1]), 2), 4)
    with pytest.raises(MisconfigurationException, match="FakePool replaces samples one by one"):
        fit(module, points(1), callbacks=[FakePool()])
    with pytest.raises(ValueError, match=r"ConsistencyPenalty\(kind='latent'\) compares.*FakePool shows"):
        fit(small(), points(1), callbacks=[FakePool(), ConsistencyPenalty("latent")])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"size": 0}, "`size` must"), ({"probability": 1.1}, "`probability` must"), ({"independent": 1}, "`independent`")],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FakePool(**options)


@pytest.mark.parametrize(("first", "then"), [(10, 30), (30, 10), (4, 30), (30, 50), (30, 30), (50, 4)])
def test_a_run_goes_on_with_another_size(first, then, tmp_path):
    """A larger pool is filled further, a smaller one keeps its first samples; then the rule goes on."""
    module, pool = small(), FakePool(first, 0.9)
    run = fit(module, points(3), callbacks=[pool])
    run.save_checkpoint(tmp_path / "a.ckpt")
    module, wider = small(), FakePool(then, 0.9)
    reference = Reference(then, 0.9)
    reference.images, reference.asked = [*pool.pools[0][0][:then]], pool.seen
    judge, seen, made = module.judge, [], []
    module.judge = lambda outputs, **kwargs: seen.append(outputs.fake) or judge(outputs, **kwargs)
    generate = module.generate
    module.generate = lambda *a: made.append(generate(*a)) or made[-1]
    fit(module, points(3), callbacks=[wider], max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert len(seen) == 12
    for shown, new in zip(seen[::2], made[::2], strict=True):
        assert torch.equal(shown, reference.query(new))
    assert torch.equal(wider.pools[0][0], torch.stack(reference.images))
    assert len(reference.images) == then
    assert wider.seen == 72


@pytest.mark.parametrize("sizes", [(8, 5), (5, 8)])
def test_samples_of_other_shapes(sizes):
    module, pool = small(), FakePool(9)
    long, short = (torch.zeros(4, 1, size) for size in sizes)
    ask(pool, module, long)
    with pytest.raises(
        ValueError, match=rf"equal shapes: the pool has \(1, {sizes[0]}\), and this batch has \(1, {sizes[1]}"
    ):
        ask(pool, module, short)
    with pytest.raises(ValueError, match=r"samples with their conditions .* this batch has \(\), \(1, "):
        ask(pool, module, long, condition=torch.zeros(4))


class Source(GANModule):
    """A generator without latents."""

    def unpack(self, batch):
        return batch, batch

    def discriminate(self, network, sample, condition):
        return network(sample)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["real", "balanced"])
@pytest.mark.parametrize("latent_dim", [4, None])
def test_a_penalty_that_compares_sees_the_samples_of_the_pool(latent_dim, kind, precision):
    class Looks(ConsistencyPenalty):
        def penalty(self, gan, outputs):
            found.append(outputs)
            return super().penalty(gan, outputs)

    class Pool(FakePool):
        def change_samples(self, gan, player, outputs):
            outputs = super().change_samples(gan, player, outputs)
            if player == "d":
                shown.append(outputs)
            return outputs

    torch.manual_seed(0)
    module = (GANModule if latent_dim else Source)(MLP([latent_dim or 2, 16, 2]), MLP([2, 16, 1]), latent_dim)
    found, shown = [], []
    fit(module, points(3), callbacks=[Pool(9), Looks(kind, transform=Shift())], precision=precision)
    assert len(found) == len(shown) == 3
    for seen, given in zip(found, shown, strict=True):
        assert seen.fake_logits.dtype == seen.fake.dtype == torch.float32
        assert torch.equal(seen.fake, given.fake.float())
        if latent_dim is None:
            assert torch.equal(seen.fake_condition, given.fake_condition)
