import json
import math

import numpy as np
import pytest
import torch
import yaml

from lightning_gan_stability.datasets import table
from lightning_gan_stability.tables import Span, TableEncoder, is_numeric, table_columns

AGE = {"name": "age", "means": [20.0, 60.0], "stds": [5.0, 10.0]}
SEX = {"name": "sex", "categories": ["f", "m"]}


def two_modes(n=2000):
    """Half of the values around -5, half around 50, and a category for each."""
    source = np.random.default_rng(0)
    kind = source.integers(2, size=n)
    return {
        "x": np.where(kind == 0, source.normal(-5, 1, n), source.normal(50, 4, n)),
        "kind": np.array(["a", "b"])[kind],
    }


# ---------- the description


def test_spans_and_widths():
    encoder = TableEncoder([SEX, AGE, {"name": "day", "categories": [1, 2, 3]}])
    assert encoder.spans == [
        Span("sex", 0, 2, "onehot", True),
        Span("age", 2, 3, "scalar", False),
        Span("age", 3, 5, "onehot", False),
        Span("day", 5, 8, "onehot", True),
    ]
    assert encoder.condition_spans == [Span("sex", 0, 2, "onehot", True), Span("day", 2, 5, "onehot", True)]
    assert (encoder.width, encoder.condition_width) == (8, 5)


@pytest.mark.parametrize("name", ["iris", "wine", "diabetes"])
def test_description_survives_yaml_and_json(name):
    columns, discrete = table(name)
    encoder = TableEncoder.fit(columns, discrete)
    rows = encoder.encode(columns)
    for text in (yaml.safe_load(yaml.safe_dump(encoder.columns)), json.loads(json.dumps(encoder.columns))):
        again = TableEncoder(text)
        assert again.columns == encoder.columns
        assert torch.equal(again.encode(columns), rows)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], r"`columns` must describe at least one column\."),
        ([{"means": [0.0]}], r"Each of `columns` must be a mapping with a `name`\."),
        (["age"], r"Each of `columns` must be a mapping with a `name`\."),
        ([AGE, AGE], r"must have different names, got these twice: \['age'\]\."),
        ([{"name": "age"}], r"Column 'age' must have `categories`, or `means` and `stds` .*, got \[\]\."),
        ([AGE | {"categories": [1, 2]}], r"Column 'age' must have .*, got \['categories', 'means', 'stds'\]\."),
        ([{"name": "age", "means": [1.0]}], r"Column 'age' must have .*, got \['means'\]\."),
        ([AGE | {"stds": [1.0]}], r"Column 'age' must have as many `stds` as `means`, got 1, 2\."),
        ([AGE | {"weights": [1.0]}], r"Column 'age' must have as many `weights` as `means`, got 1, 2\."),
        ([AGE | {"stds": [1.0, 0.0]}], r"`stds` of column 'age' must be a list of positive finite numbers"),
        ([AGE | {"means": [1.0, math.nan]}], r"`means` of column 'age' must be a list of finite numbers"),
        ([AGE | {"means": 3.0}], r"`means` of column 'age' must be a list of finite numbers"),
        ([{"name": "age", "means": [], "stds": []}], r"`means` of column 'age' must be a list of finite numbers"),
        ([AGE | {"weights": [1.0, -1.0]}], r"`weights` of column 'age' must be a list of positive finite numbers"),
        ([AGE | {"integer": 1}], r"`integer` of column 'age' must be True or False\."),
        ([{"name": "sex", "categories": ["f"]}], r"`categories` of column 'sex' must be at least two different"),
        ([{"name": "sex", "categories": ["f", "f"]}], r"`categories` of column 'sex' must be at least two different"),
        ([{"name": "sex", "categories": [math.nan, 1.0]}], r"`categories` of column 'sex' must be at least two"),
        ([{"name": "sex", "categories": "fm"}], r"`categories` of column 'sex' must be at least two different"),
        ([{"name": "sex", "categories": [["f"], "m"]}], r"`categories` of column 'sex' must be at least two different"),
    ],
)
def test_wrong_description(columns, message):
    with pytest.raises(ValueError, match=message):
        TableEncoder(columns)


# ---------- fit


def test_components_are_those_of_scikit_learn():
    from sklearn.mixture import BayesianGaussianMixture

    x = two_modes()["x"]
    model = BayesianGaussianMixture(
        n_components=10,
        weight_concentration_prior_type="dirichlet_process",
        weight_concentration_prior=0.001,
        random_state=0,
        max_iter=500,
    ).fit(x[:, None])
    kept = model.weights_ > 0.005
    [column] = TableEncoder.fit({"x": x}).columns
    order, ours = np.argsort(model.means_[kept, 0]), np.argsort(column["means"])
    assert len(order) == len(ours)
    np.testing.assert_allclose(np.array(column["means"])[ours], model.means_[kept, 0][order], rtol=0.02)
    stds = np.sqrt(model.covariances_[kept, 0, 0])[order]
    np.testing.assert_allclose(np.array(column["stds"])[ours], stds, rtol=0.02)
    weights = model.weights_[kept][order] / model.weights_[kept].sum()
    np.testing.assert_allclose(np.array(column["weights"])[ours], weights, atol=0.01)
    assert sum(column["weights"]) == pytest.approx(1)


def test_components_describe_the_modes():
    # the prior variance, that of all values, counts as much as one row
    [column] = TableEncoder.fit({"x": two_modes(20000)["x"]}).columns
    means, stds, weights = (np.array(column[key]) for key in ("means", "stds", "weights"))
    for inside, mean, std in ((means < 20, -5, 1), (means > 20, 50, 4)):
        share = weights[inside] / weights[inside].sum()
        assert weights[inside].sum() == pytest.approx(0.5, abs=0.02)
        center = (share * means[inside]).sum()
        assert center == pytest.approx(mean, abs=0.1)
        assert (share * (stds[inside] ** 2 + (means[inside] - center) ** 2)).sum() ** 0.5 == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
def test_components_do_not_depend_on_the_unit(scale):
    x = two_modes()["x"]
    [plain], [scaled] = TableEncoder.fit({"x": x}).columns, TableEncoder.fit({"x": x * scale + 3 * scale}).columns
    assert np.array(scaled["means"]) / scale - 3 == pytest.approx(np.array(plain["means"]), abs=1e-4)
    assert np.array(scaled["stds"]) / scale == pytest.approx(np.array(plain["stds"]), rel=1e-4)


def test_fit_is_a_function_of_its_arguments_alone():
    columns = two_modes(300)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = TableEncoder.fit(columns, ["kind"]).columns
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(2)
    assert TableEncoder.fit(columns, ["kind"]).columns == first


def test_at_most_the_components_that_were_asked_for():
    x = two_modes()["x"]
    assert len(TableEncoder.fit({"x": x}, components=1).columns[0]["means"]) == 1
    assert TableEncoder.fit({"x": x}, components=1).width == 2
    assert TableEncoder.fit({"x": [1.0, 2.0]}).width >= 2  # fewer rows than components


def test_categories_are_plain_and_sorted():
    columns = {
        "word": np.array(["b", "a", "b"]),
        "flag": np.array([True, False, True]),
        "code": np.array([3, 1, 3], dtype=np.int16),
        "mixed": ["x", 2, "x"],
    }
    found = {c["name"]: c["categories"] for c in TableEncoder.fit(columns, list(columns)).columns}
    assert found == {"word": ["a", "b"], "flag": [False, True], "code": [1, 3], "mixed": [2, "x"]}
    assert {type(c) for c in found["word"] + found["flag"] + found["code"]} == {str, bool, int}


SECRET = "Mallory"


@pytest.mark.parametrize(
    ("columns", "discrete", "message"),
    [
        ({"x": [1.0, math.nan, 2.0]}, [], r"Column 'x' has 1 missing values of 3"),
        ({"x": [1, None, 2]}, [], r"Column 'x' has 1 missing values of 3"),
        ({"x": [1, 2, 3], "k": [SECRET, None, None]}, ["k"], r"Column 'k' has 2 missing values of 3"),
        ({"x": [1, 2, 3], "k": [SECRET, math.nan, "b"]}, ["k"], r"Column 'k' has 1 missing values of 3"),
        ({"x": [1.0, math.inf, 2.0]}, [], r"Column 'x' has 1 infinite values of 3\."),
        ({"x": [2.0, 2.0, 2.0]}, [], r"Column 'x' has the same value in every row: leave it out\."),
        ({"x": [1, 2], "k": [SECRET, SECRET]}, ["k"], r"Column 'k' has the same category in every row: leave it out"),
        ({"x": [1, 2], "k": [SECRET, "b"]}, [], r"Column 'k' does not have numbers: name it in `discrete`"),
        ({"x": [True, False]}, [], r"Column 'x' does not have numbers: name it in `discrete`"),
        ({"x": np.array(["2020-01-01", "2020-01-02"], dtype="M8[D]")}, [], r"Column 'x' has times \(datetime64\[D\]\)"),
        ({"x": np.array(["2020-01-01", "2020-01-02"], dtype="M8[ns]")}, ["x"], r"Column 'x' has times \(datetime64"),
        ({"x": np.array([1, 2], dtype="m8[ns]")}, ["x"], r"Column 'x' has times \(timedelta64\[ns\]\): turn them into"),
        ({"x": [2**60, 2**60 + 1]}, [], r"Column 'x' has numbers that float64 cannot tell apart"),
        ({"x": [10**400, 1]}, [], r"Column 'x' has values too large or too close for float64"),
        ({"x": torch.rand(4).bfloat16()}, [], r"Column 'x' cannot be an array of NumPy \(Tensor of torch.bfloat16\)"),
        ({"x": np.array(["2020-01-01", "NaT"], dtype="M8[D]")}, [], r"Column 'x' has 1 missing values of 2"),
        (
            {"x": np.array(["2020-01-01", "2020-01-02"], dtype="M8[D]")},
            ["x"],
            r"Column 'x' has times \(datetime64\[D\]\)",
        ),
        ({"x": [1, 2], "y": [1, 2, 3]}, [], r"The columns must have the same length, got 'x': 2, 'y': 3\."),
        ({"x": [1, 2]}, ["y"], r"`discrete` has names that the table does not: \['y'\]\."),
        ({"x": [1, 2]}, "x", r"`discrete` must be a list of names, not a string\."),
        ({"x": [1.0]}, [], r"The table must have at least 2 rows, got 1\."),
        ({"x": []}, [], r"The table must have at least 2 rows, got 0\."),
        ({}, [], r"The table has no columns\."),
        ([1, 2], [], r"A table must map names to columns, got list\."),
        ({1: [1, 2]}, [], r"The names of columns must be strings, got int\."),
        ({"x": [[1, 2], [3, 4]]}, [], r"Column 'x' must have one dimension, got 2\."),
        ({"x": [["a"], ["b", "c"]]}, [], r"Column 'x' must have one dimension, got nested values\."),
        ({"x": [1e308, -1e308]}, [], r"Column 'x' has values too large or too close for float64"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_tables_that_cannot_be_fitted(columns, discrete, message):
    with pytest.raises(ValueError, match=message) as caught:
        TableEncoder.fit(columns, discrete)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("options", [{"components": 0}, {"seed": -1}])
def test_fit_refuses_bad_numbers(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        TableEncoder.fit({"x": [1.0, 2.0]}, **options)


# ---------- pandas


def test_data_frame_is_a_table():
    pandas = pytest.importorskip("pandas")
    columns = two_modes(200)
    frame = pandas.DataFrame(columns)
    frame["sort"] = pandas.Categorical(columns["kind"])
    frame["count"] = pandas.array(range(200), dtype="Int64")
    encoder = TableEncoder.fit(frame, ["kind", "sort"])
    plain = columns | {"sort": columns["kind"], "count": np.arange(200)}
    assert encoder.columns == TableEncoder.fit(plain, ["kind", "sort"]).columns
    assert torch.equal(encoder.encode(frame), encoder.encode(plain))
    frame.loc[3, "count"] = pandas.NA
    with pytest.raises(ValueError, match=r"Column 'count' has 1 missing values of 200"):
        encoder.encode(frame)
    twice = pandas.DataFrame(np.zeros((2, 2)), columns=["x", "x"])
    with pytest.raises(ValueError, match=r"The names of columns must be different, got these twice: \['x'\]\."):
        TableEncoder.fit(twice)


def test_what_is_numeric():
    pandas = pytest.importorskip("pandas")
    assert is_numeric(np.array([1, 2]))
    assert is_numeric([1, None, 2.5])
    assert is_numeric(pandas.Series([1.0, 2.0]))
    others = [["a"], [True, False], np.array([True]), pandas.Series([1, 2], dtype="category"), pandas.Series(["a"])]
    assert not any(map(is_numeric, others))


# ---------- encode and decode


def test_encode_by_hand():
    rows = TableEncoder([AGE, SEX]).encode({"age": [20, 10, 60, 70, 200], "sex": ["f", "m", "m", "f", "f"]})
    assert (rows.dtype, rows.shape) == (torch.float32, (5, 5))
    expected = [[0, 1, 0, 1, 0], [-0.5, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0.25, 0, 1, 1, 0], [0.99, 0, 1, 1, 0]]
    torch.testing.assert_close(rows, torch.tensor(expected))


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "diabetes"])
def test_decode_is_the_inverse(name):
    columns, discrete = table(name)
    encoder = TableEncoder.fit(columns, discrete, components=4)
    for source in (None, torch.Generator().manual_seed(0)):
        rows = encoder.encode(columns, source)
        decoded = encoder.decode(rows)
        assert list(decoded) == list(columns)
        for span in encoder.spans:
            if span.kind == "scalar":
                inside = (rows[:, span.start].abs() < 0.989).numpy()  # within 4 standard deviations
                assert inside.mean() > 0.97
                error = decoded[span.name][inside] - columns[span.name][inside]
                assert np.abs(error).max() <= 1e-5 * columns[span.name].std()
        for key in discrete:
            assert (decoded[key] == columns[key]).all()
            assert decoded[key].dtype == columns[key].dtype


def test_integers_come_back_as_integers():
    columns = {"n": np.arange(100) % 17, "x": np.linspace(0, 1, 100)}
    encoder = TableEncoder.fit(columns)
    assert [column["integer"] for column in encoder.columns] == [True, False]
    decoded = encoder.decode(torch.randn(50, encoder.width))
    assert decoded["n"].dtype == np.int64
    assert decoded["x"].dtype == np.float64
    exact = encoder.decode(encoder.encode(columns))["n"]
    assert np.abs(exact - columns["n"]).max() <= 1  # clipped beyond 3.96 standard deviations of a component


def test_components_are_drawn_by_their_probability():
    n = 20000
    encoder = TableEncoder([{"name": "x", "means": [-1.0, 1.0], "stds": [1.0, 1.0], "weights": [0.25, 0.75]}])
    rows = encoder.encode({"x": np.full(n, 0.3)}, torch.Generator().manual_seed(0))
    densities = 0.25 * math.exp(-(1.3**2) / 2), 0.75 * math.exp(-(0.7**2) / 2)
    share = densities[0] / sum(densities)
    assert abs(rows[:, 1].mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)
    first = rows[:, 1] == 1
    torch.testing.assert_close(rows[first, 0], torch.full((int(first.sum()),), 1.3 / 4))
    torch.testing.assert_close(rows[~first, 0], torch.full((int((~first).sum()),), -0.7 / 4))


def test_probable_components_are_those_of_scikit_learn():
    from sklearn.mixture import GaussianMixture

    x = two_modes()["x"]
    model = GaussianMixture(3, random_state=0).fit(x[:, None])
    description = {"means": model.means_[:, 0].tolist(), "stds": np.sqrt(model.covariances_[:, 0, 0]).tolist()}
    encoder = TableEncoder([{"name": "x", "weights": model.weights_.tolist(), **description}])
    assert (encoder.encode({"x": x})[:, 1:].argmax(1).numpy() == model.predict(x[:, None])).all()


def test_draws_depend_on_the_generator_alone():
    columns, discrete = table("wine")
    encoder = TableEncoder.fit(columns, discrete)
    before = torch.get_rng_state()
    first, again, other = (encoder.encode(columns, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_decode_takes_soft_values():
    encoder = TableEncoder([AGE | {"integer": True}, SEX])
    decoded = encoder.decode(torch.tensor([[7.0, 0.1, 0.3, -5.0, -4.0]], requires_grad=True))
    assert decoded["age"].tolist() == [100]  # clipped to 60 + 4 * 10
    assert decoded["sex"].tolist() == ["m"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 4), r"`rows` must be of shape \(n, 5\), got \(3, 4\)\."),
        (torch.zeros(5), r"`rows` must be of shape \(n, 5\), got \(5,\)\."),
        (torch.tensor([[0.0, 0, 0, 0, 0], [math.nan, 0, 0, 0, 0]]), r"`rows` must be finite, but 1 of 2 rows are not"),
    ],
)
def test_decode_refuses(rows, message):
    with pytest.raises(ValueError, match=message):
        TableEncoder([AGE, SEX]).decode(rows)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"age": [1, 2]}, r"The table lacks these columns: \['sex'\]\."),
        ({"age": [1, 2], "sex": ["f", SECRET]}, r"Column 'sex' has categories .* does not know, in 1 of 2 rows\."),
        ({"age": [1, math.inf], "sex": ["f", "m"]}, r"Column 'age' has 1 infinite values of 2\."),
        ({"age": [1, math.nan], "sex": ["f", "m"]}, r"Column 'age' has 1 missing values of 2"),
        ({"age": [SECRET, "1"], "sex": ["f", "m"]}, r"Column 'age' does not have numbers"),
    ],
)
def test_encode_refuses(columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        TableEncoder([AGE, SEX]).encode(columns)
    assert SECRET not in str(caught.value)


def test_further_columns_are_ignored():
    encoder = TableEncoder([AGE])
    assert encoder.encode({"age": [20], "other": ["x"]}).tolist() == [[0, 1, 0]]
    assert encoder.encode({"age": []}).shape == (0, 3)


def test_known_rows():
    encoder = TableEncoder([AGE, SEX])
    assert encoder.known({"age": [1, 2, 3], "sex": ["f", "x", "m"]}).tolist() == [True, False, True]


# ---------- condition


def test_condition():
    encoder = TableEncoder([SEX, AGE, {"name": "day of week", "categories": [1, 2, 3]}])
    condition = encoder.condition(2, {"day of week": 3})
    assert condition.dtype == torch.float32
    assert condition.tolist() == [[0, 0, 0, 0, 1]] * 2
    assert encoder.condition(1, {"sex": "m"}).tolist() == [[0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("n", "choice", "message"),
    [
        (0, {"sex": "f"}, r"`n` must be a positive integer, got 0\."),
        (1, {}, r"`choice` must have exactly one column, got 0\."),
        (1, {"sex": "f", "age": 3}, r"`choice` must have exactly one column, got 2\."),
        (1, {"age": 3}, r"`choice` must be of one of the discrete columns \['sex'\], got 'age'\."),
        (1, {"sex": SECRET}, r"`choice` must be one of the 2 categories of column 'sex'\."),
    ],
)
def test_bad_condition(n, choice, message):
    with pytest.raises(ValueError, match=message) as caught:
        TableEncoder([SEX, AGE]).condition(n, choice)
    assert SECRET not in str(caught.value)


def test_conditions_are_drawn_by_weight():
    """Columns equally often, and a column's categories by their shares among the rows."""
    table = {"sex": ["f"] * 30 + ["m"] * 70, "kind": [1, 2, 3, 3] * 25}
    encoder = TableEncoder.fit(table, discrete=["sex", "kind"])
    assert [column["weights"] for column in encoder.columns] == [[0.3, 0.7], [0.25, 0.25, 0.5]]
    uniform = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = encoder.draw_conditions(uniform)
    assert torch.equal(drawn.sum(1), torch.ones(20_000))
    expected = torch.tensor([0.15, 0.35, 0.125, 0.125, 0.25])
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.015)  # four standard errors
    assert TableEncoder([{"name": "x", "means": [0.0], "stds": [1.0]}]).draw_conditions(uniform).shape == (20_000, 0)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], "ab", [1.0, None]])
def test_wrong_weights_of_categories(weights):
    with pytest.raises(ValueError, match="`weights` of column 'sex' must be a list of shares, one for each category"):
        TableEncoder([{"name": "sex", "categories": ["f", "m"], "weights": weights}])


def test_a_choice_is_a_dict():
    with pytest.raises(ValueError, match="`choice` must be a dict of a column and its category, got a str"):
        TableEncoder([SEX]).condition(2, "sex")


def test_integers_and_floats_in_one_list_are_numbers():
    columns = table_columns({"x": [1, 2.5, 3]})
    assert columns["x"].dtype == np.float64
    assert columns["x"].tolist() == [1.0, 2.5, 3.0]
