"""TableSynthesis: tables that it makes, conditions that reach its networks, checkpoints, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import chisquare
from torch import nn
from toys import trainer, weights

from lightning_gan_stability import Alternating, GeneratorEMA, GradientPenalty, Table, TableSynthesis

AGE = {"name": "age", "means": [20.0, 60.0], "stds": [5.0, 10.0], "integer": True}
HEIGHT = {"name": "height", "means": [1.5], "stds": [0.25]}
SMOKES = {"name": "smokes", "categories": ["no", "yes"], "weights": [0.8, 0.2]}
CITY = {"name": "city", "categories": [1, 2, 3], "weights": [0.5, 0.3, 0.2]}
COLUMNS = [AGE, SMOKES, HEIGHT, CITY]
WIDTH, CONDITION = 3 + 2 + 2 + 3, 2 + 3
LATENT = 4


class Copy(nn.Module):
    """A generator that copies the condition into the logits of the categories, at 1 - ε of them."""

    def __init__(self, inputs=LATENT + CONDITION, outputs=WIDTH, strength=1e3):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))
        self.seen = []

    def forward(self, x):
        condition = x[:, LATENT:]
        self.seen.append(condition.detach().clone())
        none = torch.zeros(len(x), 3)
        smokes, city = (self.strength * part for part in condition.split([2, 3], 1))
        return torch.cat([none, smokes, none[:, :2], city], 1)


class Constant(nn.Module):
    """A generator of the same logits for every row."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def synthesis(generator=nn.Linear, discriminator=nn.Linear, columns=COLUMNS, pac=2, **kwargs):
    torch.manual_seed(0)
    return TableSynthesis(generator, discriminator, columns, latent_dim=LATENT, pac=pac, **kwargs)


def batch(n=6, module=None):
    encoder = (module or synthesis()).encoder
    draw = np.random.default_rng(0)
    table = {
        "age": draw.integers(10, 80, n),
        "smokes": draw.choice(["no", "yes"], n),
        "height": draw.normal(1.5, 0.2, n),
        "city": draw.choice([1, 2, 3], n),
    }
    return encoder.encode(table), encoder.draw_conditions(torch.from_numpy(draw.random((n, 2))))


# ---------- tables


def test_rows_are_decoded():
    """Scalars go through tanh and then 4 σ a + μ of the component with the larger value; large logits win."""
    height = 1.5 + 4 * 0.25 * math.tanh(-0.3)
    for component, city, smokes in ((0, 0, 1), (1, 2, 0)):
        pick = lambda n, i: [1e3 * (k == i) for k in range(n)]  # noqa: E731
        logits = [0.4, *pick(2, component), *pick(2, smokes), -0.3, 0.0, *pick(3, city)]
        table = synthesis(Constant(logits)).synthesize(3)
        assert [*table] == ["age", "smokes", "height", "city"]
        age = round([20 + 4 * 5 * math.tanh(0.4), 60 + 4 * 10 * math.tanh(0.4)][component])
        assert table["age"].tolist() == [age] * 3
        assert table["age"].dtype == np.int64
        assert table["smokes"].tolist() == [["no", "yes"][smokes]] * 3
        assert table["city"].tolist() == [[1, 2, 3][city]] * 3
        np.testing.assert_allclose(table["height"], height, rtol=1e-6)


def test_categories_are_drawn_by_their_logits():
    """The largest of logits with Gumbel noise is a draw from their softmax."""
    shares = np.array([0.6, 0.3, 0.1])
    logits = [0.0, *np.log([0.7, 0.3]), 0.0, 0.0, 0.0, 0.0, *np.log(shares)]
    table = synthesis(Constant(logits)).synthesize(4000)
    counts = np.bincount(table["city"], minlength=4)[1:]
    assert chisquare(counts, 4000 * shares).pvalue > 1e-3
    young = (table["age"] == 20).mean()
    assert chisquare([4000 * young, 4000 * (1 - young)], [2800, 1200]).pvalue > 1e-3
    assert abs((table["smokes"] == "yes").mean() - 0.5) < 0.04


def test_encoded_rows_are_soft_at_a_higher_temperature():
    logits = torch.zeros(200, WIDTH)
    hard, soft = (synthesis(temperature=t).activate(logits) for t in (0.01, 10.0))
    city = slice(WIDTH - 3, WIDTH)
    torch.testing.assert_close(hard[:, city].sum(1), torch.ones(200))
    assert (hard[:, city].amax(1) > 0.9).float().mean() > 0.95
    assert soft[:, city].amax() < 0.8
    module = synthesis()
    with module.noise.of("a"):
        made = module.activate(logits + 0.5)
    with module.noise.of("a"):
        gumbel = -(-module.noise.rand(200, WIDTH).log()).log()
    expected = ((logits + 0.5 + gumbel) / 0.2)[:, city].softmax(1)
    torch.testing.assert_close(made[:, city], expected)
    torch.testing.assert_close(made[:, 0], torch.full((200,), math.tanh(0.5)))


@pytest.mark.parametrize("choice", [{"smokes": "yes"}, {"smokes": "no"}, {"city": 3}])
def test_the_condition_reaches_the_generator(choice):
    module = synthesis(Copy)
    table = module.synthesize(50, choice)
    [(name, category)] = choice.items()
    assert (table[name] == category).all()
    other = "city" if name == "smokes" else "smokes"
    assert len(set(table[other].tolist())) > 1  # nothing is asked of it
    [seen] = module.generator.seen
    assert torch.equal(seen, module.encoder.condition(50, choice))


def test_conditions_are_drawn_by_frequency():
    module = synthesis(Copy)
    table = module.synthesize(4000)
    [seen] = module.generator.seen
    assert torch.equal(seen.sum(1), torch.ones(4000))
    asked = seen[:, :2].sum(1).bool()
    assert chisquare(torch.stack([asked.sum(), (~asked).sum()])).pvalue > 1e-3
    for part, weights_ in ((seen[asked, :2], [0.8, 0.2]), (seen[~asked, 2:], [0.5, 0.3, 0.2])):
        assert chisquare(part.sum(0), len(part) * np.array(weights_)).pvalue > 1e-3
    assert (table["smokes"][asked.numpy()] == "yes").mean() == pytest.approx(0.2, abs=0.03)
    assert table["city"][~asked.numpy()].tolist() == (seen[~asked, 2:].argmax(1) + 1).tolist()


def test_each_table_is_another_one():
    module = synthesis()
    first, second = (module.synthesize(20)["height"].tolist() for _ in range(2))
    assert first != second
    assert synthesis().synthesize(20)["height"].tolist() == first


class Resting(nn.Linear):
    """Tells whether it was called in training mode, or with a graph."""

    def forward(self, x):
        self.modes = [*getattr(self, "modes", []), (self.training, torch.is_grad_enabled())]
        return super().forward(x)


def test_tables_are_made_in_eval_mode_by_the_average():
    module = synthesis(Resting).train()
    module.synthesize(3)
    assert module.generator.modes == [(False, False)]
    assert module.training
    assert module.generator.training
    run = trainer(callbacks=[GeneratorEMA(decay=0.5)])
    run.fit(module, torch.utils.data.DataLoader([batch()] * 2, batch_size=None))
    with torch.no_grad():
        module.generator_ema.weight.zero_()
        module.generator_ema.bias.zero_()
    assert module.synthesize(5)["height"].tolist() == [1.5] * 5


def test_a_table_without_categories():
    module = synthesis(columns=[HEIGHT, AGE])
    assert module.encoder.condition_width == 0
    assert [*module.synthesize(3)] == ["height", "age"]
    rows = module.encoder.encode({"age": [20, 60], "height": [1.5, 1.6]})
    outputs = module.compute_samples("d", (rows, torch.zeros(2, 0)), ())
    assert module.auxiliary_losses("g", outputs) == {}
    with pytest.raises(ValueError, match=r"`choice` must be of one of the discrete columns \[\], got 'age'"):
        module.synthesize(3, {"age": 20})


# ---------- a step


def test_real_rows_keep_their_conditions_and_generated_ones_have_others():
    module = synthesis(Copy)
    rows, conditions = batch()
    outputs = module.compute_samples("d", (rows, conditions), ())
    assert torch.equal(outputs.real, torch.cat([rows, conditions], 1))
    [seen] = module.generator.seen
    assert torch.equal(seen, torch.cat([conditions[-1:], conditions[:-1]]))
    assert torch.equal(outputs.fake[:, WIDTH:], seen)
    assert not torch.equal(seen, conditions)


def test_the_cross_entropy_of_what_was_asked_for():
    """log k of equal logits, in the column that the condition picks; log(1 + (k − 1) e^−s) of a copied condition."""
    module = synthesis(Constant([0.0] * WIDTH), condition_weight=3.0)
    rows, _ = batch()
    conditions = torch.cat([module.encoder.condition(4, {"smokes": "yes"}), module.encoder.condition(2, {"city": 2})])
    value = module.auxiliary_losses("g", module.compute_samples("d", (rows, conditions), ()))["condition"]
    assert value.item() == pytest.approx(3 * (4 * math.log(2) + 2 * math.log(3)) / 6)
    assert module.auxiliary_losses("d", module.compute_samples("d", (rows, conditions), ())) == {}
    module = synthesis(Copy(strength=2.0))
    value = module.auxiliary_losses("g", module.compute_samples("d", (rows, conditions), ()))["condition"]
    expected = (4 * math.log(1 + math.exp(-2)) + 2 * math.log(1 + 2 * math.exp(-2))) / 6
    assert value.item() == pytest.approx(expected, rel=1e-6)


class Sum(nn.Module):
    """A discriminator of packs that keeps what it saw."""

    def __init__(self, inputs=0, outputs=1):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, packs):
        self.seen.append(packs.detach().clone())
        return self.scale * packs.sum(1, keepdim=True)


@pytest.mark.parametrize("n", [6, 7])
def test_rows_are_judged_in_packs_and_the_rest_is_left_out(n):
    module = synthesis(discriminator=Sum, pac=3)
    rows, conditions = batch(n)
    outputs = module.compute_outputs("d", (rows, conditions), ())
    real = torch.cat([rows, conditions], 1)[:6]
    [(_, logits_real, logits_fake)] = outputs.pairs()
    torch.testing.assert_close(logits_real, real.reshape(2, -1).sum(1))
    torch.testing.assert_close(logits_fake, outputs.fake[:6].reshape(2, -1).sum(1))
    assert all(seen.shape[1] == 3 * (WIDTH + CONDITION) for seen in module.discriminator.discriminator.seen)
    assert module.packing == 3


# ---------- making networks, checkpoints


def test_makers_get_the_widths():
    asked = []

    def make(inputs, outputs):
        asked.append((inputs, outputs))
        return nn.Linear(inputs, outputs)

    synthesis(make, make, pac=5)
    assert asked == [(LATENT + CONDITION, WIDTH), (5 * (WIDTH + CONDITION), 1)]


def test_networks_may_be_given():
    generator, discriminator = nn.Linear(LATENT + CONDITION, WIDTH), nn.Linear(2 * (WIDTH + CONDITION), 1)
    module = synthesis(generator, discriminator)
    assert module.generator is generator
    assert module.discriminator.discriminator is discriminator
    assert len(module.synthesize(3)["age"]) == 3


def test_extras_beside_the_rows():
    class WithLoss(nn.Linear):
        def forward(self, x):
            return super().forward(x), {"size": x.square().mean()}

    module = synthesis(WithLoss, losses={"size": 0.5}, condition_weight=0.0)
    outputs = module.compute_samples("d", batch(), ())
    terms = module.auxiliary_losses("g", outputs)
    assert terms == {"size": 0.5 * outputs.extras["size"], "condition": 0}
    assert outputs.extras["logits"].shape == (6, WIDTH)


def people(n=80):
    draw = np.random.default_rng(0)
    return {
        "age": draw.integers(10, 80, n),
        "smokes": draw.choice(["no", "yes"], n),
        "height": draw.normal(1.5, 0.2, n),
    }


def test_a_checkpoint_is_loaded_with_makers_or_networks(tmp_path):
    data = Table(people(), components=2, batch_size=8)
    module = synthesis(columns=data.columns, temperature=0.7, condition_weight=2.0)
    start = weights(module).clone()
    callbacks = [GradientPenalty(10.0), Alternating(real_batches="split"), GeneratorEMA(decay=0.5)]
    run = trainer(callbacks=callbacks, max_epochs=2)
    run.fit(module, data)
    assert not torch.equal(weights(module)[: len(start)], start)
    run.save_checkpoint(tmp_path / "table.ckpt")
    made = TableSynthesis.load_from_checkpoint(tmp_path / "table.ckpt", generator=nn.Linear, discriminator=nn.Linear)
    width, condition = made.encoder.width, made.encoder.condition_width
    networks = nn.Linear(LATENT + condition, width), nn.Linear(2 * (width + condition), 1)
    given = TableSynthesis.load_from_checkpoint(
        tmp_path / "table.ckpt", generator=networks[0], discriminator=networks[1]
    )
    for again in (made, given):
        assert torch.equal(weights(again), weights(module))
        assert again.encoder.columns == data.columns
        assert (again.packing, again.latent_dim, again.temperature, again.condition_weight) == (2, LATENT, 0.7, 2.0)
        with module.noise.of("test"):
            expected = module.synthesize(10, {"smokes": "yes"})
        with again.noise.of("test"):
            table = again.synthesize(10, {"smokes": "yes"})
        assert {name: column.tolist() for name, column in table.items()} == {
            name: column.tolist() for name, column in expected.items()
        }


def test_a_resumed_run_is_the_whole_one(tmp_path):
    runs = []
    for stops in ([3], [1, 3]):
        for epochs in stops:
            data = Table(people(), components=2, batch_size=8)
            module = synthesis(columns=data.columns)
            run = trainer(callbacks=[GradientPenalty(10.0), Alternating(real_batches="split")], max_epochs=epochs)
            run.fit(module, data, ckpt_path=tmp_path / "half.ckpt" if epochs != stops[0] else None)
            run.save_checkpoint(tmp_path / "half.ckpt")
        runs.append(weights(module))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], weights(synthesis(columns=data.columns)))


# ---------- what it refuses


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"columns": []}, "`columns` must describe at least one column"),
        ({"columns": [{"name": "x"}]}, "Column 'x' must have `categories`, or `means` and `stds`"),
        ({"pac": 0}, "`pac` must be a positive integer, got 0"),
        ({"temperature": 0}, "`temperature` must be a positive finite number, got 0"),
        ({"condition_weight": -1.0}, "`condition_weight` must be a finite number that is not negative"),
        ({"d_weight": "x"}, "`d_weight` must be a finite number"),
        ({"generator": 3}, "`generator` must be a module, or what makes one from two widths, got 3"),
        ({"generator": lambda *_: None}, "`generator` must be a module, or what makes one from two widths, got None"),
        ({"discriminator": "MLP"}, "`discriminator` must be a module, or what makes one from two widths, got 'MLP'"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        synthesis(**options)


def test_the_length_of_latents_is_checked():
    with pytest.raises(ValueError, match="`latent_dim` must be a positive integer, got 0"):
        TableSynthesis(nn.Linear, nn.Linear, COLUMNS, latent_dim=0)


SHAPE = r"a torch.float32 tensor of shape \(6, %d\)"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda rows, condition: (rows[:, 1:], condition), f"{SHAPE % 9}, {SHAPE % 5}:"),
        (lambda rows, condition: (rows, condition[:, 1:]), f"{SHAPE % 10}, {SHAPE % 4}:"),
        (lambda rows, condition: rows, f"{SHAPE % 10}:"),
        (lambda rows, condition: {"rows": rows}, r"a dict with keys \['rows'\]:"),
        (lambda rows, condition: (rows, condition, rows), f"{SHAPE % 10}, {SHAPE % 5}, {SHAPE % 10}:"),
        (lambda rows, condition: (rows, "no"), f"{SHAPE % 10}, a str:"),
    ],
)
def test_batches_of_another_form(change, got):
    with pytest.raises(ValueError, match=r"must be encoded rows \(n, 10\) and conditions \(n, 5\), got " + got):
        synthesis().compute_samples("d", change(*batch()), ())


def test_fewer_rows_than_a_pack():
    module = synthesis(pac=10)
    loader = torch.utils.data.DataLoader([batch(9)], batch_size=None)
    with pytest.raises(ValueError, match="judges 10 samples together, but the batch has 9: use a larger batch size"):
        trainer().fit(module, loader)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"smokes": "secret"}, "`choice` must be one of the 2 categories of column 'smokes'"),
        ({"price": 3}, r"`choice` must be of one of the discrete columns \['smokes', 'city'\], got 'price'"),
        ({"age": 20}, r"`choice` must be of one of the discrete columns \['smokes', 'city'\], got 'age'"),
        ({}, "`choice` must have exactly one column, got 0"),
        ({"smokes": "yes", "city": 1}, "`choice` must have exactly one column, got 2"),
    ],
)
def test_conditions_that_there_are_not(choice, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        synthesis().synthesize(3, choice)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("n", [0, 2.5])
@pytest.mark.parametrize("choice", [None, {"smokes": "yes"}])
def test_numbers_of_rows_that_there_are_not(n, choice):
    with pytest.raises(ValueError, match=f"`n` must be a positive integer, got {n}"):
        synthesis().synthesize(n, choice)


# ---------- other tables


def other():
    """A table whose rows have the widths of `people`, and other units and categories."""
    table = people()
    return {
        "age": 3 * table["age"],
        "smokes": [answer.upper() for answer in table["smokes"]],
        "height": table["height"],
    }


def test_data_of_another_table_are_refused():
    one, two = (Table(table, components=1, batch_size=8) for table in (people(), other()))
    assert one.encoder.width == two.encoder.width
    module = synthesis(columns=one.columns)
    for entry in ("fit", "validate", "predict"):
        with pytest.raises(MisconfigurationException, match="and the data module have different `columns`: make the"):
            getattr(trainer(), entry)(module, datamodule=two)
    one.columns = ["age", "smokes"]  # something else of a user's own data
    trainer(limit_train_batches=1).fit(module, one)


def test_a_state_of_another_table_is_refused(tmp_path):
    one, two = (Table(table, components=1, batch_size=8).columns for table in (people(), other()))
    state = synthesis(columns=one).state_dict()
    with pytest.raises(ValueError, match="This state is of a module with other `columns`: make the module with those"):
        synthesis(columns=two).load_state_dict(state)
    module = synthesis(columns=two)
    module.load_state_dict(state, strict=False)
    assert torch.equal(weights(module), weights(synthesis(columns=one)))
    data = Table(people(), components=1, batch_size=8)
    run = trainer(limit_train_batches=1)
    run.fit(synthesis(columns=one), data)
    run.save_checkpoint(tmp_path / "one.ckpt")
    networks = {"generator": nn.Linear, "discriminator": nn.Linear}
    with pytest.raises(ValueError, match="This state is of a module with other `columns`"):
        TableSynthesis.load_from_checkpoint(tmp_path / "one.ckpt", columns=two, **networks)
    assert TableSynthesis.load_from_checkpoint(tmp_path / "one.ckpt", **networks).encoder.columns == one


def test_columns_are_described():
    with pytest.raises(ValueError, match="`columns` must describe the table: "):
        TableSynthesis(nn.Linear, nn.Linear)


def test_loggers_get_no_columns():
    module = synthesis(temperature=0.7)
    assert module.hparams["columns"] == COLUMNS
    assert module.hparams_initial["temperature"] == 0.7
    assert "columns" not in module.hparams_initial


@pytest.mark.parametrize("more", [-1, 5])
def test_generators_of_another_width_are_refused(more):
    module = synthesis(lambda inputs, outputs: nn.Linear(inputs, outputs + more))
    with pytest.raises(ValueError, match=rf"must return rows \(6, 10\), .*, got a .* shape \(6, {WIDTH + more}\)"):
        module.compute_samples("d", batch(), ())
