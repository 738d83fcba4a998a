"""Conditional generators: do samples belong to their conditions? Measured, tested exactly, and said."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from scipy.stats import binom
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import ignoring, trainer

from lightning_gan_stability import MLP, CollapseDetector, GANModule, QualityMonitor
from lightning_gan_stability.metrics import checkpoint_fluctuation, class_report, condition_dependence
from lightning_gan_stability.metrics.decisions import (
    level,
    samples_to_decide,
    samples_to_decide_on_conditions,
    too_little_class_variation,
    too_little_consistency,
    too_little_coverage,
    too_little_dependence,
)
from lightning_gan_stability.monitors.conditions import Told, described, parts_of
from lightning_gan_stability.noise import generator

N = 400


def translated(source):
    """The truth: a rotation, bent a little."""
    return torch.stack([source[:, 1] + 0.3 * source[:, 0] ** 2, -source[:, 0]], 1)


class Translator(nn.Module):
    """Knows the truth, and takes the source of the row that is so many rows away."""

    def __init__(self, shift=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shift = shift

    def forward(self, source):
        return translated(source.roll(self.shift, 0)) + self.weight


class Classes(nn.Module):
    """Ten Gaussians in a row; whose labels are moved, or of which one does not vary."""

    def __init__(self, moved=0, still=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.moved, self.still = moved, still

    def forward(self, latents, labels):
        spread = torch.where(labels == self.still, 0.01, 1.0)[:, None] if self.still is not None else 1.0
        places = torch.stack([8.0 * ((labels + self.moved) % 10), torch.zeros(len(labels))], 1)
        return places + spread * latents + self.weight


class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, samples, condition=None):
        return self.layer(samples)


def gan(network, latent_dim=None):
    frozen = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    return GANModule(network, Blind(), latent_dim, g_optimizer=frozen)


def pairs(n=N):
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(n, 2, generator=draw)
    return DataLoader(TensorDataset(translated(source), source), 20, shuffle=True)


def labelled(n=1000):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    x = torch.stack([8.0 * labels, torch.zeros(n)], 1) + torch.randn(n, 2, generator=draw)
    return DataLoader(TensorDataset(x, labels), 50, shuffle=True)


def run(module, data, steps=8, **kwargs):
    monitor = QualityMonitor(nn.Identity(), **{"n_samples": 2500, "every": 2} | kwargs)
    detector = CollapseDetector()
    fit = trainer(callbacks=[monitor, detector], max_steps=steps, max_epochs=-1, limit_val_batches=0)
    fit.fit(module, data)
    return monitor, detector


# ---------- what is said


def test_a_translator_of_its_own_source_is_well():
    monitor, detector = run(gan(Translator()), pairs())
    assert monitor.values["dependence"] == pytest.approx(1.0, abs=1e-6)
    assert detector.events == []


@pytest.mark.filterwarnings("ignore:ignored condition")
def test_a_translator_of_another_rows_source_is_not_well():
    """FID and recall see nothing of it."""
    monitor, detector = run(gan(Translator(shift=1)), pairs())
    assert monitor.values["fid"] < 0.01
    assert monitor.values["recall"] == 1.0
    assert abs(monitor.values["dependence"]) < 0.1
    assert [(event["step"], event["verdict"]) for event in detector.events] == [(8, "ignored condition")]
    assert detector.events[0]["evidence"]["p"] < 1e-3


def test_classes_that_are_well():
    monitor, detector = run(gan(Classes(), 2), labelled())
    assert monitor.values["class_consistency"] > 0.95
    assert monitor.values["class_diversity"] > 0.8
    assert detector.events == []


@pytest.mark.parametrize(
    ("network", "verdict"), [(Classes(moved=1), "ignored condition"), (Classes(still=4), "class collapse")]
)
@pytest.mark.filterwarnings("ignore:(ignored condition|class collapse)")
def test_classes_that_are_not_well(network, verdict):
    monitor, detector = run(gan(network, 2), labelled())
    assert monitor.values["coverage"] > 0.8
    assert [event["verdict"] for event in detector.events] == [verdict]
    low = "class_consistency" if verdict == "ignored condition" else "class_diversity"
    assert monitor.values[low] < 0.1


def test_samples_that_nothing_depends_on_say_nothing():
    draw = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(N, 2, generator=draw), torch.randn(N, 2, generator=draw)), 20)
    monitor, detector = run(gan(Translator(shift=1)), data)
    assert "dependence" not in monitor.values
    assert detector.events == []


@pytest.mark.parametrize("spread", [0.3, 0.5, 1.5])
def test_modes_that_are_narrow_or_wide_are_held(spread):
    """Eight modes that nobody knows, all of them held; a fifth of their spread is enough."""

    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, latents, labels):
            angles = labels * torch.pi / 4
            centres = torch.stack([angles.cos(), angles.sin()], 1)
            return centres + 0.05 * spread * latents + self.weight

    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(1600) % 8
    x = torch.stack([(labels * torch.pi / 4).cos(), (labels * torch.pi / 4).sin()], 1)
    data = DataLoader(TensorDataset(x + 0.05 * torch.randn(1600, 2, generator=draw), labels), 50, shuffle=True)
    for n in (300, 1600):
        _, detector = run(gan(Modes(), 2), data, steps=12, n_samples=n)
        assert detector.events == []


# ---------- the values


def test_values_are_those_of_the_functions():
    module, data = gan(Classes(still=4), 2), labelled(300)
    monitor, _ = run(module, data, n_samples=300, n_real="all")
    x, labels = data.dataset.tensors
    order = torch.randperm(300, generator=generator("real"))
    with torch.no_grad():
        fake = module.generator(torch.randn(300, 2, generator=generator("quality")), labels[order])
    found = condition_dependence(labels[order], fake, x[order], permutations=1)
    assert monitor.values["dependence"] == pytest.approx(found.ratio, rel=1e-9)
    report = class_report(x, labels, fake, labels[order]).values()
    lowest = min(part.consistency / part.real_consistency for part in report)
    assert monitor.values["class_consistency"] == pytest.approx(lowest, rel=1e-9)
    assert monitor.values["class_diversity"] == pytest.approx(min(part.diversity for part in report), rel=1e-5)


def test_metrics_of_conditions_without_any_are_refused():
    with pytest.raises(MisconfigurationException, match=r"metrics=\['dependence', ...\]\) must have conditions"):
        run(gan(nn.Linear(2, 2), 2), DataLoader(torch.randn(100, 2), 20), metrics=["fid", "dependence"])
    with pytest.raises(MisconfigurationException, match="integer labels"):
        run(gan(Translator()), pairs(), metrics=["class_diversity"])


def test_a_condition_of_the_samples_kind_is_seen_by_the_extractor():
    """Pictures whose sources differ by what the extractor does not see."""

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    draw = torch.Generator().manual_seed(0)
    source = torch.randn(200, 1, 4, 4, generator=draw)
    data = DataLoader(TensorDataset(source + 1, source), 20)

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x + self.weight

    module = gan(Add())
    module.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    monitor = QualityMonitor(Mean(), n_samples=100, every=5)
    trainer(callbacks=[monitor], max_steps=2, max_epochs=-1, limit_val_batches=0).fit(module, data)
    assert monitor.values["dependence"] == pytest.approx(1.0, abs=1e-6)


# ---------- what comes and goes


def test_fluctuation_is_that_of_the_same_latents():
    class Jumps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.register_buffer("step", torch.zeros(1))

        def forward(self, latents):
            if self.training:
                self.step += 1
            return latents + 0.1 * (self.step**2 % 7) + self.weight

    module = gan(Jumps(), 2)
    monitor = QualityMonitor(nn.Identity(), ["fid", "fluctuation"], n_samples=100, every=2)
    seen = []
    original = monitor._track

    def track(fake):
        seen.append(fake.features[:32].clone())
        original(fake)

    monitor._track = track
    loader = DataLoader(torch.randn(100, 2), 20)
    trainer(callbacks=[monitor], max_steps=14, max_epochs=-1, limit_val_batches=0).fit(module, loader)
    assert "fluctuation" not in monitor.history[1]
    for i in range(2, 8):
        expected = checkpoint_fluctuation(torch.stack(seen[max(0, i - 4) : i + 1])).fluctuation
        assert monitor.history[i]["fluctuation"] == pytest.approx(expected, rel=1e-6)
        assert expected > 1e-4


# ---------- exact tests


def test_dependence_by_hand():
    torch.manual_seed(0)
    source = torch.randn(250, 2)
    fake = torch.where((torch.arange(250) < 125)[:, None], source, source.roll(7, 0))
    low = sum(
        condition_dependence(source[rows], fake[rows], permutations=1).dependence
        < 0.5 * condition_dependence(source[rows], source[rows], permutations=1).dependence
        for rows in (slice(start, start + 25) for start in range(0, 250, 25))
    )
    assert 0 < low < 10
    expected = sum(binom.pmf(k, 10, 0.5) for k in range(low, 11))
    assert too_little_dependence(source, fake, source) == pytest.approx(expected)


def test_false_alarms_of_dependence():
    """Samples of the same distribution, weakly dependent: the level holds."""
    torch.manual_seed(0)
    p = []
    for _ in range(200):
        source = torch.randn(300, 1)
        real, fake = (0.7 * source + torch.randn(300, 1) for _ in range(2))
        p.append(too_little_dependence(source, fake, real))
    assert sum(x < 0.05 for x in p) <= binom.ppf(0.999, 200, 0.05)


def test_consistency_by_hand():
    real, labels = torch.arange(40.0)[:, None] + 1000 * (torch.arange(40) % 2)[:, None], torch.arange(40) % 2
    told = torch.cat([torch.zeros(20), torch.ones(20)]).long()
    fake = torch.cat([torch.zeros(8, 1), torch.full((12, 1), 1000.0), torch.full((20, 1), 1000.0)])
    # of class 0 eight of 20 look like it, of class 1 all; real ones always do
    expected = min(1.0, 2 * min(binom.cdf(8, 20, 0.5), binom.cdf(20, 20, 0.5)))
    assert too_little_consistency(real, labels, fake, told) == pytest.approx(expected)


def test_class_variation_needs_fifty_samples():
    torch.manual_seed(0)
    real, labels = torch.randn(200, 2), torch.arange(200) % 2
    still = real * labels[:, None]
    assert too_little_class_variation(real, labels, still, labels) < 1e-6
    assert too_little_class_variation(real, labels, still[:80], labels[:80]) == 1.0
    assert too_little_class_variation(real, labels, 0.3 * real, labels) > 0.5


def test_what_cannot_be_decided_is_said_with_the_number_it_takes():
    """The least numbers from which the tests can speak, by the tests themselves."""
    with pytest.warns(UserWarning, match=r"cannot decide on an 'ignored condition' at false_alarms=0\.01: .* 100 "):
        run(gan(Translator(shift=1)), pairs(100))
    first = level(0.01, 1)
    needed = samples_to_decide_on_conditions(first, 1)
    source = torch.randn(needed, 2)
    assert too_little_dependence(source, source.roll(1, 0), source) <= first
    assert 0.5 ** ((needed - 25) // 25) > first
    few = samples_to_decide(0.1, first)
    assert 3 * too_little_coverage(torch.zeros(few, dtype=torch.bool), 0.1) <= first
    assert 3 * too_little_coverage(torch.zeros(few - 1, dtype=torch.bool), 0.1) > first


class Unaware(nn.Module):
    """Draws from all classes, and is told none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, latents):
        place = (torch.special.ndtr(latents[:, :1]) * 10).floor()
        return torch.cat([8.0 * place, torch.zeros_like(place)], 1) + torch.randn_like(latents) + self.weight


@pytest.mark.parametrize("network", [Unaware, lambda: MLP([2, 2])], ids=["its own", "of the package"])
def test_labels_that_the_generator_is_not_told_are_nobodys(network):
    """Real samples depend on their labels, and samples cannot: an unconditional generator of labelled data is well."""
    monitor, detector = QualityMonitor(nn.Identity(), n_samples=N, every=1), CollapseDetector()
    gan = GANModule(network(), MLP([2, 1]), latent_dim=2)
    labels = torch.arange(N) % 10
    places = torch.stack([8.0 * labels, torch.zeros(N)], 1)
    data = TensorDataset(places + torch.randn(N, 2, generator=generator(0)), labels)
    with ignoring():
        trainer(callbacks=[monitor, detector], max_steps=6).fit(gan, DataLoader(data, batch_size=50))
    assert not {"dependence", "class_consistency", "class_diversity"} & {*monitor.values}
    assert not {"ignored condition", "class collapse"} & {event["verdict"] for event in detector.events}
    told = GANModule(MLP([2, 2], num_classes=10), MLP([2, 1]), latent_dim=2)
    with ignoring():
        trainer(callbacks=[monitor], max_steps=1).fit(told, DataLoader(data, batch_size=50))
    assert "dependence" in monitor.values


class HalfDeaf(nn.Module):
    """Goes where it is told in one direction, and in the other where another row is told."""

    def __init__(self, shift):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.zeros(1)), shift

    def forward(self, condition):
        return torch.stack([condition["across"], condition["up"].roll(self.shift, 0)], 1) + self.weight


@pytest.mark.parametrize("shift", [0, 1])
def test_of_several_conditions_one_that_is_ignored_is_found(shift):
    """Its dependence is 0 beside that of real samples, 1; that of both together is not."""
    rows = torch.randn(N, 2, generator=generator(3))
    condition = {"across": rows[:, 0], "up": rows[:, 1]}
    made = HalfDeaf(shift)(condition).detach()
    together = condition_dependence(rows, made, rows).ratio
    alone = condition_dependence(rows[:, 1:], made, rows).ratio
    told = Told(described(condition), rows, parts_of(condition))
    assert told.measure(made)["dependence"] == pytest.approx(min(alone, told_alone(rows, made)), abs=1e-6)
    if shift:
        assert together > 0.4
        assert told.measure(made)["dependence"] < 0.05
        assert told.p_values(made)["dependence"] < 1e-3
    else:
        assert told.measure(made)["dependence"] == pytest.approx(1, abs=1e-6)
        assert told.p_values(made)["dependence"] == 1


def told_alone(rows, made):
    return condition_dependence(rows[:, :1], made, rows).ratio


def test_classes_can_be_looked_at():
    monitor, _ = run(gan(Classes(), 2), labelled(300), n_samples=300)
    assert [*monitor.classes] == [*range(10)]
    assert monitor.classes[3].n_fake == 30


def test_conditions_of_several_sizes_or_with_gaps_are_not_compared():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, latents, condition):
            return self.layer(torch.cat([latents, condition.nan_to_num().mean(1, keepdim=True)], 1))

    draw = torch.Generator().manual_seed(0)
    sizes = [(torch.randn(20, 2, generator=draw), torch.randn(20, 1 + i, generator=draw)) for i in range(10)]
    gaps = [(x, torch.where(c[:, :1] > 1, float("nan"), c[:, :1])) for x, c in sizes]
    for batches in (sizes, gaps):
        monitor = QualityMonitor(nn.Identity(), n_samples=100, every=2)
        run = trainer(callbacks=[monitor], max_steps=4, max_epochs=-1, limit_val_batches=0)
        run.fit(gan(Any(), 2), DataLoader(batches, batch_size=None))
        assert "dependence" not in monitor.values
        assert monitor.values["fid"] > 0


def test_samples_in_a_tree_need_an_extractor():
    class Tree(GANModule):
        def unpack(self, batch):
            return {"x": batch}, None

    with pytest.raises(MisconfigurationException, match="give QualityMonitor an `extractor`"):
        trainer(callbacks=[QualityMonitor()]).fit(Tree(nn.Linear(2, 2), Blind(), 2), DataLoader(torch.randn(40, 2), 8))


def test_rare_classes_are_left_out():
    draw = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(300) % 3, torch.arange(3, 9).repeat_interleave(2)])
    x = torch.stack([8.0 * labels, torch.zeros(312)], 1) + torch.randn(312, 2, generator=draw)
    monitor, detector = run(gan(Classes(), 2), DataLoader(TensorDataset(x, labels), 26, shuffle=True), n_samples=312)
    assert monitor.values["class_consistency"] > 0.9
    assert monitor.values["class_diversity"] > 0.7
    assert detector.events == []


@pytest.mark.filterwarnings("ignore:ignored condition")
def test_early_stopping_waits_for_the_first_value_and_refuses_what_never_comes():
    for key, match in (("fluctuation", None), ("class_diversity", "class_diversity")):
        stop = EarlyStopping(f"quality/{key}", patience=9)
        monitor = QualityMonitor(nn.Identity(), n_samples=100, every=2)
        fit = trainer(callbacks=[monitor, stop], max_steps=8, max_epochs=-1, limit_val_batches=0)
        if match is None:
            fit.fit(gan(Translator()), pairs(100))
            assert fit.global_step == 8
        else:
            with pytest.raises(MisconfigurationException, match=match):
                fit.fit(gan(Translator()), pairs(100))
