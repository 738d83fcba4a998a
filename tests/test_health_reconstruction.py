"""HealthMonitor beside a reconstruction: shares and codebooks against closed forms, runs built to fail, and others."""

import csv
import logging
import math
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import fit, ignoring, points, sgd, small, tensors, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    AdversarialStart,
    Alternating,
    CompetitiveGradientDescent,
    Extragradient,
    FakePool,
    FeatureMatching,
    GANCallback,
    GANModule,
    HealthMonitor,
    LossBalancer,
    Minimax,
    ModeSeeking,
    PathLengthPenalty,
    R1Penalty,
    Reconstruction,
    Simultaneous,
    Tokenizer,
    Unrolling,
    UpdateRatio,
    Wasserstein,
)
from lightning_gan_stability.monitors import shares
from lightning_gan_stability.monitors.giveaway import strongest_giveaway

NEW = {"silent_adversarial", "dominant_adversarial", "head_start", "codebook_collapse", "giveaway"}


def said(monitor):
    return [entry["verdict"] for entry in monitor.verdicts]


def shares_of(window):
    return {name.removeprefix("share/"): value for name, value in window.items() if name.startswith("share/")}


def adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr, (0.5, 0.9))


# ---------- shares against closed forms


class Linear(GANModule):
    """G(z) = W z and l(x) = c·x: all gradients are known."""

    weight = 1.0

    def auxiliary_losses(self, player, outputs):
        square = 0.3 * outputs.fake.square().sum()
        return {"codebook": 3 * self.generator.unused.sum(), "square": square} if player == "g" else {}

    def adversarial_weight(self, player, outputs):
        return self.weight


def linear(**kwargs):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 2))
    generator.unused = nn.Parameter(torch.ones(1))
    module = Linear(generator, nn.Linear(2, 1, bias=False), 3, Wasserstein(), plan=("g", "d"), **kwargs).double()
    z = torch.randn(8, 3, dtype=torch.float64)
    module.draw_latents = lambda n: z[:n]
    return module, z


class Double(GANCallback):
    """Weighs a term by 2."""

    def weigh_terms(self, module, player, outputs, terms):
        return {"square": 2.0} if player == "g" else {}


@pytest.mark.parametrize("every", [1, 4])  # of a term that counts as in the mean over steps
@pytest.mark.parametrize("n", [8, 5])
def test_shares_are_those_of_the_gradients_by_the_samples(every, n):
    module, z = linear()
    module.weight = 0.7
    (x,) = points(1, batch_size=n, dtype=torch.float64)
    c = module.discriminator.weight.detach()[0]
    fake = module.generator(z[:n]).detach()
    norms = {
        "adversarial": 0.7 * c.norm() / math.sqrt(n),  # of −0.7 mean c·x
        "codebook": torch.zeros(()),
        "square": 2 * 2 * 0.3 * fake.norm(),
        "l1": torch.tensor(10.0 / math.sqrt(2 * n)),  # each of 2n values has ±10 / 2n
        "l2": 2 * 5.0 * (fake - x).norm() / (2 * n),
    }
    monitor = HealthMonitor(every=1)
    terms = [Reconstruction(10.0, name="l1", every=every), Reconstruction(5.0, "l2", name="l2")]
    fit(module, [x], callbacks=[*terms, Double(), monitor])
    total = sum(map(float, norms.values()))
    expected = {name: pytest.approx(float(norm) / total, rel=1e-6) for name, norm in norms.items()}
    assert shares_of(monitor.windows[0]) == expected
    assert monitor.windows[0]["adversarial_share"] == expected["adversarial"]
    parts = [float(norms[name]) / total for name in ("square", "l1", "l2")]
    assert monitor.windows[0]["reconstruction_share"] == pytest.approx(sum(parts), rel=1e-6)
    value = 0.3 * fake.square().sum() + 5 * (fake - x).square().mean()
    value += 0 if every > 1 else 10 * (fake - x).abs().mean()  # which is not there on every step
    assert monitor.windows[0]["reconstruction"] == pytest.approx(float(value), rel=1e-6)


def test_a_start_and_a_balancer_are_in_the_shares():
    module, _ = linear(g_optimizer=sgd(1e-6), d_optimizer=sgd(1e-6))
    batches, monitor = points(1, dtype=torch.float64) * 6, HealthMonitor(every=1)
    with ignoring():
        fit(module, batches, callbacks=[Reconstruction(), AdversarialStart(2, ramp=4), monitor])
    found = [window["adversarial_share"] / (1 - window["adversarial_share"]) for window in monitor.windows]
    assert found[:2] == [0, 0]
    assert [value / found[5] for value in found[2:]] == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-3)
    monitor = HealthMonitor(every=1)
    balancer = LossBalancer({"adversarial": 3.0, "reconstruction": 1.0, "square": 4.0})
    fit(linear()[0], points(1, dtype=torch.float64), callbacks=[Reconstruction(), balancer, monitor])
    # a balancer weighs means over samples of norms: equal norms of samples make these the shares, which l1's are
    found = shares_of(monitor.windows[0])
    assert found["adversarial"] / found["reconstruction"] == pytest.approx(3, rel=1e-6)


class Tree(GANModule):
    """Samples of two parts and two discriminators."""

    def unpack(self, batch):
        return {"a": batch, "b": batch[:, :1]}, None

    def generate(self, network, n, condition, latents):
        made = network(latents)
        return {"a": made[:, :2], "b": made[:, 2:]}

    def discriminate(self, network, sample, condition):
        both = torch.cat([sample["a"], sample["b"]], 1)
        return {name: part(both) for name, part in network.items()}

    def auxiliary_losses(self, player, outputs):
        return {"bound": outputs.fake["b"].square().mean()} if player == "g" else {}


def tree(**kwargs):
    torch.manual_seed(0)
    networks = nn.ModuleDict({"one": MLP([3, 8, 1]), "two": MLP([3, 4, 1])})
    return Tree(MLP([4, 8, 3]), networks, 4, plan=("g", "d"), **kwargs).double()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_shares_of_trees_with_several_discriminators_are_those_by_autograd(accumulate):
    module = tree(accumulate=accumulate)
    generator, discriminators = deepcopy(module.generator), deepcopy(module.discriminator)
    (x,) = points(1, dtype=torch.float64)
    z = torch.randn(8, 4, dtype=torch.float64)
    module.draw_latents = lambda n: z[module.noise._rows[0] : module.noise._rows[1]] if accumulate > 1 else z
    monitor = HealthMonitor(every=1)
    fit(module, [x], callbacks=[Reconstruction(2.0), monitor])
    made = generator(z).detach()
    fake = [made[:, :2].requires_grad_(), made[:, 2:].requires_grad_()]
    logits = [part(torch.cat(fake, 1)) for part in discriminators.values()]
    terms = {
        "adversarial": sum(nn.functional.softplus(-entry).mean() for entry in logits),
        "bound": fake[1].square().mean(),
        "reconstruction": 2 * ((fake[0] - x).abs().mean() + (fake[1] - x[:, :1]).abs().mean()),
    }
    norms = {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, fake, retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))
    expected = {name: pytest.approx(norm / sum(norms.values()), rel=1e-6) for name, norm in norms.items()}
    assert shares_of(monitor.windows[0]) == expected


def test_feature_matching_is_of_the_game_and_mode_seeking_is_no_reconstruction():
    monitor = HealthMonitor(every=1)
    terms = [Reconstruction(), FeatureMatching(layers=["layers.0"]), ModeSeeking()]
    fit(small(), points(1), callbacks=[*terms, monitor])
    found, window = shares_of(monitor.windows[0]), monitor.windows[0]
    assert all(share > 0 for share in found.values())
    assert window["adversarial_share"] == pytest.approx(found["adversarial"] + found["feature_matching"])
    assert window["reconstruction_share"] == pytest.approx(found["reconstruction"])


def test_without_another_term_that_pulls_at_samples_there_are_no_shares():
    class Apart(GANModule):
        def auxiliary_losses(self, player, outputs):
            return {"decay": self.generator.layers[0].weight.square().sum()} if player == "g" else {}

    for module in small(), Apart(MLP([4, 16, 2]), MLP([2, 16, 1]), 4):
        monitor = HealthMonitor(every=1)
        fit(module, points(2), callbacks=[monitor])
        assert all(math.isnan(window["adversarial_share"]) for window in monitor.windows)


def test_a_generator_that_rests_is_measured_when_it_moves():
    monitor = HealthMonitor(every=4)
    fit(small(), points(12), callbacks=[Reconstruction(every=2), UpdateRatio(3), monitor])
    found = [shares_of(window) for window in monitor.windows]
    both = ["adversarial", "reconstruction"]
    assert [sorted(parts) for parts in found] == [both, [], both]  # in between the lazy term was not due


@pytest.mark.parametrize(("more", "there"), [([], False), ([LossBalancer({"adversarial": 1.0})], True)])
def test_compiled_networks_have_no_shares_unless_their_graphs_are_kept(more, there, caplog):
    monitor, module = HealthMonitor(every=2), small(compile={"backend": "aot_eager"})
    with ignoring(), caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(module, points(4), callbacks=[Reconstruction(), *deepcopy(more), monitor])
    assert caplog.text.count("HealthMonitor leaves out the shares of terms in the generator's gradient") == 1 - there
    assert [not math.isnan(window["adversarial_share"]) for window in monitor.windows] == [there] * 2


def test_graphs_that_run_once_are_left_alone():
    """Of the older kind of checkpoints gradients can be taken by parameters alone, and all at once."""

    def distance(sample, target):
        return checkpoint(torch.square, sample - target, use_reentrant=True).mean()

    monitor, plain, watched = HealthMonitor(every=2), small(), small()
    fit(plain, points(4), callbacks=[Reconstruction(1.0, distance)])
    with pytest.warns(UserWarning, match="HealthMonitor leaves out the shares of terms, whose gradients it cannot"):
        fit(watched, points(4), callbacks=[Reconstruction(1.0, distance), monitor])
    assert torch.equal(weights(plain), weights(watched))
    assert all(math.isnan(window["adversarial_share"]) for window in monitor.windows)


# ---------- what it leaves alone


class Book(nn.Module):
    """A codebook that follows its codes, with statistics and noise of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.1)), nn.Linear(3, 2)
        self.book, self.steps = nn.Parameter(torch.randn(8, 3), requires_grad=False), 0

    def forward(self, x):
        z = self.encoder(x)
        codes = torch.cdist(z, self.book).argmin(1)
        code = self.book[codes]
        if self.training:
            self.steps += 1
            self.book.data[codes] = 0.9 * self.book.data[codes] + 0.1 * z.detach()
        out = self.decoder(z + (code - z).detach() + 0.01 * torch.randn_like(z))
        return out, {"codebook": (z - code).square().mean(), "codes": codes}


def tokenizer(**kwargs):
    torch.manual_seed(0)
    return Tokenizer(Book(), MLP([2, 16, 1]), **kwargs)


class Checkpointed(nn.Module):
    """Forgets its activations, and computes them again in the backward pass, with statistics and noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


def checkpointed():
    torch.manual_seed(0)
    return GANModule(MLP([4, 16, 2]), Checkpointed(), 4)


def zero_sum():
    return small(loss=Minimax(), g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))


KINDS = {
    "adaptive weight, shared samples": (
        tokenizer,
        lambda: [AdaptiveAdversarialWeight("decoder"), AdversarialStart(5, ramp=9), Alternating(share_fake=True)],
    ),
    "balancer": (tokenizer, lambda: [LossBalancer({"adversarial": 1.0, "reconstruction": 2.0}, decay=0.8)]),
    "accumulate": (lambda: tokenizer(accumulate=3), lambda: [FakePool(20, 0.7), R1Penalty(0.1)]),
    "running means": (small, lambda: [PathLengthPenalty(every=2), ModeSeeking(), FeatureMatching(layers=["layers.0"])]),
    "extragradient": (tokenizer, lambda: [Extragradient()]),
    "simultaneous": (tokenizer, lambda: [Simultaneous()]),
    "unrolling": (small, lambda: [Unrolling(3)]),
    "unrolling, checkpoint": (small, lambda: [Unrolling(2, checkpoint=True)]),
    "competitive": (zero_sum, lambda: [CompetitiveGradientDescent()]),
    "activation checkpoints": (checkpointed, list),
    "compiled": (lambda: small(compile={"backend": "aot_eager"}), list),
    "trees": (tree, list),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_with_and_without(kind):
    make, callbacks = KINDS[kind]
    runs = []
    for more in [], [HealthMonitor(every=4)]:
        module, own = make(), [Reconstruction(), *callbacks()]
        batches = points(20, dtype=torch.float64 if kind == "trees" else torch.float32)
        torch.manual_seed(1)
        with ignoring():
            fit(module, batches, callbacks=[*own, *more])
        states = [callback.state_dict() for callback in own]
        steps = getattr(module.generator, "steps", 0)
        runs.append((tensors(module.state_dict()), torch.rand(2), str(states), steps))
    for key, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][key]), key
    assert torch.equal(runs[0][1], runs[1][1])
    if kind != "extragradient":
        assert runs[0][2] == runs[1][2]
    if kind != "compiled":
        assert any(window["adversarial_share"] > 0 for window in more[0].windows)


def test_resumed_equals_uninterrupted(tmp_path):
    """At a step in the middle of a window, with measured gradients and counted codes."""
    runs = []
    for stop in (None, 7):
        options = {"enable_checkpointing": True, "max_epochs": -1}
        for steps in (7, 15) if stop else (15,):
            monitor = HealthMonitor(every=5)
            save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
            path = str(tmp_path / "step=7.ckpt") if stop and steps == 15 else None
            with ignoring():
                run = trainer(callbacks=[Reconstruction(), monitor, save], max_steps=steps, **options)
                run.fit(tokenizer(), DataLoader(points(7), batch_size=None), ckpt_path=path)
        runs.append(monitor.state_dict())
    assert all(window["perplexity"] > 0 and window["adversarial_share"] > 0 for window in runs[0]["windows"])
    assert str(runs[0]) == str(runs[1])


# ---------- decisions


HEALTHY = {
    "accuracy": 0.8, "accuracy_before": math.nan, "adversarial_share": 0.2, "reconstruction_share": 0.8,
    "reconstruction": 1.0, "perplexity/codes/0": 50.0, "perplexity/codes/1": 30.0, "codes/codes": 128.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("decide", "change"),
    [
        (shares.silent_adversarial, {"adversarial_share": 0.009, "accuracy": 0.96}),
        (shares.dominant_adversarial, {"adversarial_share": 0.91, "reconstruction": 1.21}),
        (shares.codebook_collapse, {"perplexity/codes/1": 12.0}),
        (shares.codebook_collapse, {"perplexity/codes/0": 12.4}),
    ],
)
def test_decisions(decide, change):
    assert decide([HEALTHY] * 6) is None
    assert decide([*[HEALTHY] * 6, HEALTHY | change]) is not None
    for key in change:  # each sign alone is none
        if len(change) > 1:
            assert decide([*[HEALTHY] * 6, HEALTHY | {key: change[key]}]) is None


@pytest.mark.parametrize(
    ("decide", "windows"),
    [
        (
            shares.silent_adversarial,
            [{"adversarial_share": 0.001 * k, "accuracy": 0.99} for k in range(1, 10)],
        ),  # a ramp
        (shares.silent_adversarial, [{"adversarial_share": 0.0, "accuracy": 0.99}] * 5),  # is off
        (shares.silent_adversarial, [{"adversarial_share": 0.001, "accuracy": 0.9}] * 5),  # G heeds D
        (shares.silent_adversarial, [{"adversarial_share": 0.001, "accuracy": math.nan}] * 5),  # D does not train
        (shares.dominant_adversarial, [{"adversarial_share": 0.99}] * 5),  # a large share alone
        (shares.dominant_adversarial, [{"adversarial_share": 1.0, "reconstruction_share": 0.0}] * 5),
        (shares.codebook_collapse, [{"perplexity/codes/0": 2.0 + 0.1 * k} for k in range(20)]),  # comes into use
        (shares.codebook_collapse, [{"perplexity/codes/0": 2.0}] * 5),  # is young
    ],
)
def test_what_is_none(decide, windows):
    course = [HEALTHY | window for window in windows]
    assert all(decide(course[:n]) is None for n in range(2, len(course) + 1))


def test_the_worst_book_is_said():
    window = HEALTHY | {"perplexity/codes/0": 5.0, "perplexity/codes/1": 2.0}
    assert shares.codebook_collapse([window] * 6) == {"perplexity": 2.0, "codes": 128.0, "best": 2.0, "book": 1.0}


@pytest.mark.parametrize(
    ("before", "now", "accuracy"),
    [
        ({"adversarial_share": 0.0, "accuracy": 0.99}, {}, 0.99),
        ({"adversarial_share": 0.0, "accuracy": 0.5}, {"accuracy_before": 0.97}, 0.97),
        ({"adversarial_share": 0.0, "accuracy": 0.99}, {"accuracy_before": 0.9}, None),
        ({"adversarial_share": 0.0, "accuracy": math.nan}, {}, None),  # D did not train
        ({"adversarial_share": 0.2, "accuracy": 0.99}, {}, None),  # it has counted before
        ({"adversarial_share": 0.0, "accuracy": 0.99}, {"adversarial_share": 0.0}, None),
        ({"adversarial_share": 0.0, "accuracy": 0.99}, {"adversarial_share": 0.01}, None),  # a ramp
    ],
)
def test_a_head_start(before, now, accuracy):
    found = shares.head_start([HEALTHY | before, HEALTHY | now])
    assert found == (None if accuracy is None else {"accuracy": accuracy, "adversarial_share": 0.2})
    assert shares.head_start([HEALTHY | now]) is None


# ---------- codebooks


def test_perplexity_by_hand():
    codes = [torch.tensor([0, 1, 1, 2]), torch.tensor([1, 1, 3, 0])]
    counts = torch.tensor([2, 4, 1, 1]) / 8
    monitor = HealthMonitor(every=2)
    given = iter(codes)

    class Coded(GANModule):
        def generate(self, network, n, condition, latents):
            return network(latents), {"codes": next(given), "length": torch.full((n,), 7)}

    module = Coded(MLP([4, 8, 2]), MLP([2, 8, 1]), 4)
    callback = FakeOnce()
    fit(module, points(2, batch_size=4), callbacks=[callback, Alternating(share_fake=True), monitor])
    window = monitor.windows[0]
    assert window["perplexity/codes"] == pytest.approx(math.exp(-float((counts * counts.log()).sum())))
    assert window["codes/codes"] == 4
    assert not any("length" in key for key in window)


class FakeOnce(GANCallback):
    """Lets a generator without codes answer monitors, which ask again after the step."""

    def on_train_batch_end(self, trainer, module, *_):
        module.generate = lambda network, n, condition, latents: network(latents)

    def on_train_batch_start(self, trainer, module, *_):
        vars(module).pop("generate", None)


@pytest.mark.parametrize(
    ("shape", "dims", "books"),
    [
        ((6, 8, 8), 4, 1),
        ((6, 4, 8, 8), 4, 4),
        ((6, 8, 8, 4), 4, 4),
        ((6, 64), 4, 1),  # tokens in a row
        ((384,), 4, 1),
        ((6, 9, 25), 3, 9),
        ((6, 25, 9), 3, 9),
        ((6, 25), 3, 1),
        ((6,), 2, 1),
        ((6, 8), 2, 8),
        ((6, 100), 2, 1),  # nobody has so many books
    ],
)
def test_books(shape, dims, books):
    codes = torch.zeros(shape).long()
    axis = [axis for axis, size in enumerate(shape) if axis and size == books]
    if books > 1:
        codes += torch.arange(books).reshape([books if i == axis[0] else 1 for i in range(len(shape))])
    rows = shares.by_book(codes, dims)
    assert rows.shape == (books, codes.numel() // books)
    assert (rows == torch.arange(books)[:, None]).all()


def test_counts():
    counts = torch.zeros(2, 5, dtype=torch.long)
    shares.count(counts, torch.tensor([[0, 3, 3, -1], [4, 9, 1, 1]], dtype=torch.int32))
    assert counts.tolist() == [[1, 0, 0, 2, 0], [0, 2, 0, 0, 2]]


def test_names_and_types_of_codes():
    extras = {
        "codes": torch.zeros(2).long(), "mask_indices": torch.zeros(2).bool(), "code_vectors": torch.zeros(2),
        "labels": torch.zeros(2).long(), "scales": {"token_ids": [torch.zeros(2).int(), torch.zeros(4).int()]},
    }  # fmt: skip
    assert [name for name, _ in shares.codes_of(extras)] == ["codes", "scales.token_ids.0", "scales.token_ids.1"]


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Embedding(512, 4)), 512),
        (lambda: nn.Sequential(nn.Embedding(10, 4), nn.Embedding(512, 4)), None),  # one of them is of labels
        (lambda: nn.Linear(2, 2), None),
    ],
)
def test_known_sizes(network, size):
    assert shares.known_size(network()) == size


class Quantizer(nn.Module):
    """Gives codes that are asked for."""

    def __init__(self, of_step, known=None):
        super().__init__()
        self.layer, self.of_step, self.step = nn.Linear(8, 8), of_step, 0
        if known:
            self.codebook_size = known

    def forward(self, x):
        codes = self.of_step(self.step)
        self.step += self.training
        return self.layer(x), {"codes": codes, "codebook": self.layer.weight.square().sum()}


def quantized(of_step, batches, known=None, every=4):
    monitor = HealthMonitor(every=every)
    torch.manual_seed(0)
    module = Tokenizer(Quantizer(of_step, known), MLP([8, 8, 1]), d_optimizer=sgd(1e-9), g_optimizer=sgd(1e-3))
    rule = Alternating(share_fake=True)
    with ignoring():
        fit(module, [torch.randn(8, 1, 8) for _ in range(batches)], callbacks=[Reconstruction(), rule, monitor])
    return monitor


def test_codes_beyond_what_there_is_room_for():
    monitor = quantized(lambda step: torch.arange(3 * shares.CELLS), 12)
    assert ["codes/codes" in window for window in monitor.windows] == [False, True, True]
    assert monitor.windows[1]["codes/codes"] == 3 * shares.CELLS
    assert monitor.windows[1]["perplexity/codes"] == pytest.approx(3 * shares.CELLS)


@pytest.mark.parametrize(
    ("of_step", "known", "verdicts"),
    [
        (lambda step: torch.randint(256, (8, 100)), None, []),
        (lambda step: torch.randint(256 if step < 8 else 12, (8, 100)), None, ["codebook_collapse"]),
        (lambda step: torch.randint(20, (8, 100)), 256, []),  # did not come into use, and is young
        (lambda step: torch.full((8, 100), 0), None, ["codebook_collapse"]),  # whatever the size is
        (lambda step: torch.randint(20, (8, 100)), None, []),  # nobody knows that there are more
        (lambda step: torch.randint(2 + 6 * step, (8, 100)), 256, []),  # comes into use
        (lambda step: torch.randint(20, (8, 1)), 256, []),  # too few to tell
        # of four books one
        (lambda step: torch.randint(256, (8, 4, 100)) * (torch.arange(4) != 2)[:, None], None, ["codebook_collapse"]),
    ],
)
def test_codebook_collapse(of_step, known, verdicts):
    monitor = quantized(of_step, 40, known)
    assert said(monitor) == verdicts
    if verdicts and "perplexity/codes/2" in monitor.windows[0]:
        assert monitor.verdicts[0]["evidence"]["book"] == 2
        assert monitor.verdicts[0]["evidence"]["perplexity"] == 1


def test_a_codebook_comes_into_use_in_500_steps():
    window = {"perplexity/codes": 20.0, "codes/codes": 256.0}
    assert shares.codebook_collapse([window | {"step": 400.0}] * 6) is None
    assert shares.codebook_collapse([window | {"step": 500.0}] * 6) == {"perplexity": 20, "codes": 256, "best": 20}
    assert shares.codebook_collapse([window | {"step": 500.0}] * 5) is None


def test_a_reconstruction_that_jumps_as_the_adversarial_terms_begin():
    before = HEALTHY | {"adversarial_share": 0.0, "accuracy": 0.7, "reconstruction": 1.0, "accuracy_before": 0.7}
    begun = before | {"adversarial_share": 0.5}
    assert shares.head_start([before, begun | {"reconstruction": 1.9}]) is None
    assert shares.head_start([before, begun | {"reconstruction": 2.1}])["before"] == 1.0
    assert shares.head_start([before, begun, begun | {"reconstruction": 3.0}])["reconstruction"] == 3.0
    assert shares.head_start([before, begun, begun, begun | {"reconstruction": 3.0}]) is None


def test_an_adversarial_term_that_nobody_hears():
    window = HEALTHY | {"accuracy": 0.9, "adversarial_share": 1e-5}
    assert shares.silent_adversarial([window] * 4) == {"adversarial_share": 1e-5, "accuracy": 0.9}
    assert shares.silent_adversarial([window | {"adversarial_share": 1e-3}] * 4) is None
    assert shares.silent_adversarial([window | {"accuracy": 0.6}] * 4) is None


def test_samples_without_dimensions_are_watched():
    class Numbers(GANModule):
        def generate(self, network, n, condition, latents):
            return network(latents)[:, 0]

        def discriminate(self, network, sample, condition):
            return network(sample[:, None])

    monitor = HealthMonitor(every=3)
    module = Numbers(MLP([4, 16, 1]), MLP([1, 16, 1]), latent_dim=4)
    fit(module, [torch.randn(8) for _ in range(6)], callbacks=[monitor])
    assert len(monitor.windows) == 2


def test_an_unpack_that_draws_moves_nothing():
    class Noisy(GANModule):
        def unpack(self, batch):
            return batch + 0.01 * torch.randn_like(batch), None

    states = []
    for callbacks in ([], [HealthMonitor(every=3)]):
        torch.manual_seed(0)
        module = Noisy(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4)
        data = DataLoader(torch.randn(64, 2, generator=torch.Generator().manual_seed(3)), 8, shuffle=True)
        torch.manual_seed(1)
        trainer(max_epochs=3, callbacks=callbacks).fit(module, data)
        states.append(weights(module))
    assert torch.equal(*states)


# ---------- runs built to fail, and such as do not


class Blur(nn.Module):
    """A generator that cannot reconstruct: so that the discriminator is right."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.scale = scale

    def forward(self, x):
        return self.scale * x.detach() * 0.1 + self.shift


def reconstructing(g=1e-3, d=1e-2, g_weight=1.0, **kwargs):
    torch.manual_seed(0)
    return Tokenizer(
        Blur(), MLP([2, 32, 1]), losses={}, g_weight=g_weight, g_optimizer=adam(g), d_optimizer=adam(d), **kwargs
    )


def clusters(n):
    return [3 * x.sign() + 0.1 * x for x in points(n, batch_size=32)]


@pytest.mark.parametrize(
    ("module", "callbacks", "verdicts"),
    [
        (lambda: reconstructing(g_weight=1e-4), [], ["silent_adversarial"]),
        (lambda: reconstructing(), [], []),
        (lambda: reconstructing(), [lambda: AdversarialStart(150, discriminator_first=100)], ["head_start"]),
        (lambda: reconstructing(), [lambda: AdversarialStart(155, discriminator_first=100)], ["head_start"]),
        (lambda: reconstructing(), [lambda: AdversarialStart(150, discriminator_first=100, ramp=100)], []),
        (lambda: reconstructing(), [lambda: AdversarialStart(150)], []),
        (lambda: reconstructing(), [lambda: AdversarialStart(10**6)], []),  # D never trains
    ],
)
def test_verdicts(module, callbacks, verdicts):
    monitor = HealthMonitor(every=20)
    with ignoring():
        fit(module(), clusters(300), callbacks=[Reconstruction(), *(make() for make in callbacks), monitor])
    assert [name for name in said(monitor) if name in NEW] == verdicts
    if verdicts == ["head_start"]:
        assert monitor.verdicts[0]["step"] == 160
        assert monitor.verdicts[0]["evidence"]["accuracy"] > 0.95


def test_dominant_adversarial():
    """A critic without bounds drives samples away from targets that they had nearly come to."""
    torch.manual_seed(0)
    rates = {"g_optimizer": adam(1e-2), "d_optimizer": adam(1e-2)}
    module = Tokenizer(nn.Linear(2, 2), MLP([2, 32, 1]), Wasserstein(), g_weight=20.0, losses={}, **rates)
    monitor = HealthMonitor(every=20)
    with ignoring():
        fit(module, clusters(400), callbacks=[Reconstruction(), AdversarialStart(150), monitor])
    assert [name for name in said(monitor) if name in NEW] == ["dominant_adversarial"]


def test_shares_and_perplexities_are_logged(tmp_path):
    monitor = HealthMonitor(every=5)
    with ignoring():
        run = fit(
            tokenizer(), points(10), callbacks=[Reconstruction(), monitor], logger=CSVLogger(tmp_path),
            log_every_n_steps=50,
        )  # fmt: skip
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("adversarial", "reconstruction", "codebook"):
        found = [(row["step"], float(row[f"g/share/{name}"])) for row in rows if row.get(f"g/share/{name}")]
        assert found == [(str(n), monitor.windows[i][f"share/{name}"]) for i, n in enumerate((5, 10))]
    assert run.callback_metrics["g/share/codebook"] == 0  # the book has no gradient, and z none of the samples'
    assert run.callback_metrics["g/perplexity/codes"] == pytest.approx(monitor.windows[-1]["perplexity/codes"])


# ---------- what gives samples away


def images(n, change, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [change(torch.randn(32, 1, size, size, generator=generator).tanh()) for _ in range(n)]


def border(x):
    x[..., 0] = 0.0
    return x


def grid(x):
    return (x * 8).round() / 8


def telling(change, like, **kwargs):
    """A generator that has learned everything but the give-away, and a discriminator that is told."""

    class Perfect(nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))

        def forward(self, latents):
            return like(latents).tanh() + 0 * self.nothing

    class Sees(nn.Module):
        """Knows a border of zeros, or a grid."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            off = (x - change(x.clone())).abs().flatten(1).mean(1)
            return self.scale * torch.where(off > 1e-4, -1.0, 1.0) + 0 * x.flatten(1).sum(1)

    return Perfect(), Sees(), kwargs


@pytest.mark.parametrize(
    ("change", "words"),
    [(border, "the same in all real samples"), (grid, "Real values lie on a grid of 17 levels")],
)
def test_giveaways(change, words):
    generator, discriminator, _ = telling(change, lambda z: z.unflatten(1, (1, 12, 12)))
    module = GANModule(generator, discriminator, 144, g_optimizer=sgd(1e-9), d_optimizer=sgd(1e-3))
    monitor, drawn = HealthMonitor(every=100, held_out=False), []
    for more in [], [monitor]:
        torch.manual_seed(0)
        with ignoring():
            run = trainer(callbacks=more, max_steps=800, max_epochs=-1)
            run.fit(deepcopy(module), DataLoader(images(8, change), batch_size=None))
        drawn.append(torch.rand(2))
    assert torch.equal(*drawn)
    (entry,) = [entry for entry in monitor.verdicts if entry["verdict"] == "giveaway"]
    assert entry["step"] == 500
    assert words in entry["advice"]
    assert entry["evidence"]["auc"] == 1
    assert run.callback_metrics["health/giveaway"] == 1


def test_a_discriminator_that_is_right_without_a_giveaway():
    """It sees a relation of two values, which no single number of a sample shows."""

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * torch.where(x[:, 0] * x[:, 1] > 0, 1.0, -1.0) + 0 * x.sum(1)

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))

        def forward(self, latents):
            return torch.stack([latents[:, 0], -latents[:, 0].sign() * latents[:, 1].abs()], 1) + 0 * self.nothing

    batches = [torch.stack([x[:, 0], x[:, 0].sign() * x[:, 1].abs()], 1) for x in points(8, batch_size=32)]
    module = GANModule(Wrong(), Sees(), 2, g_optimizer=sgd(1e-9), d_optimizer=sgd(1e-3))
    monitor = HealthMonitor(every=100, held_out=False)
    with ignoring():
        run = trainer(callbacks=[monitor], max_steps=700, max_epochs=-1)
        run.fit(module, DataLoader(batches, batch_size=None))
    assert monitor.windows[-1]["accuracy"] == 1
    assert monitor.finding == {}  # it has looked, and found nothing
    assert "giveaway" not in said(monitor)


class Look(Callback):
    def on_train_end(self, trainer, module):
        self.found = strongest_giveaway(trainer, module)


class Parts(GANModule):
    """Samples of two parts, of which one gives itself away."""

    def unpack(self, batch):
        return {"a": batch, "b": batch.round()}, None

    def generate(self, network, n, condition, latents):
        made = network(latents)
        return {"a": made, "b": made}

    def discriminate(self, network, sample, condition):
        return network(sample["a"] + sample["b"])


def one_hot(x):
    """A table whose last column is 0 or 1."""
    return torch.cat([x[:, :2], (x[:, 2:] > 0).float()], 1)


class Once(IterableDataset):
    """A stream that nobody can copy."""

    def __init__(self):
        self.batches = (x for x in points(8, batch_size=32))

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("kind", "shape", "loader", "expected"),
    [
        (GANModule, (3,), lambda x: DataLoader(TensorDataset(one_hot(x)), 20), True),
        (GANModule, (1, 64), lambda x: DataLoader(TensorDataset((4 * x).round() / 4), 20), True),
        (GANModule, (2,), lambda x: DataLoader(TensorDataset(x[:60]), 20), False),  # too few to tell
        (GANModule, (2,), lambda x: DataLoader(Once(), batch_size=None), False),  # cannot be read twice
        (Parts, (2,), lambda x: DataLoader(list(x.split(20)), batch_size=None), True),
    ],
)
def test_kinds_of_samples(kind, shape, loader, expected):
    real = torch.randn(200, *shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    torch.manual_seed(0)
    size = math.prod(shape)
    look = Look()
    module = kind(MLP([4, 16, size], output_shape=[*shape]), MLP([size, 8, 1]), 4)
    with ignoring():
        trainer(callbacks=[look], max_steps=2, max_epochs=-1).fit(module, loader(real))
    assert (look.found is not None) == expected
