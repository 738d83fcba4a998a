"""Distances of tables: by hand and against SciPy and NumPy, what can be learned from them, and what they refuse."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency, f_oneway, ks_2samp

from lightning_gan_stability.metrics import correlation_difference, efficacy, marginal_distances


def rows(n=200, seed=0, shift=0.0):
    """Two continuous and two discrete columns that depend on each other."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=n) + shift
    kind = np.where(x + 0.5 * draw.normal(size=n) > 0, "high", "low")
    return {
        "x": x,
        "y": 2 * x + draw.normal(size=n),
        "kind": kind,
        "grade": draw.integers(0, 3, n) + (kind == "high"),
    }


def pairs(a, b, real, fake, discrete=()):
    discrete = [name for name in discrete if name in (a, b)]
    return correlation_difference({a: real[a], b: real[b]}, {a: fake[a], b: fake[b]}, discrete)


def constant(values):
    return np.full(len(values), values[0])


# ---------- marginals


def test_marginals_by_hand():
    real = {"x": [0, 1, 2, 3], "s": ["a", "a", "b", "c"]}
    fake = {"s": ["a", "d"], "x": [1.5, 7.0]}
    # half of the real numbers are at most 1, and none of the others; the halves of b and c, and of d, are apart
    assert marginal_distances(real, fake) == {"x": 0.5, "s": 0.5}
    assert marginal_distances(real, fake, ["x"]) == {"x": 1.0, "s": 0.5}
    assert marginal_distances(real, real) == {"x": 0, "s": 0}


def test_marginals_are_those_of_scipy():
    real, fake = rows(), rows(150, 1, 0.3)
    found = marginal_distances(real, fake, ["grade"])
    assert found["x"] == ks_2samp(real["x"], fake["x"]).statistic > 0.1
    assert found["y"] == ks_2samp(real["y"], fake["y"]).statistic > 0.1
    for name in ("kind", "grade"):
        p, q = (pd.Series(table[name]).value_counts(normalize=True) for table in (real, fake))
        assert found[name] == pytest.approx(p.sub(q, fill_value=0).abs().sum() / 2)
        assert found[name] > 0.01


def test_discrete_numbers_are_the_same_in_every_type():
    """A CSV file with a missing value somewhere has floats where another has integers."""
    whole = {"code": np.array([0, 1, 1]), "x": [0.0, 1.0, 2.0]}
    for kind in (np.float64, np.float32, np.int8):
        other = whole | {"code": whole["code"].astype(kind)}
        assert marginal_distances(whole, other, ["code"]) == {"code": 0, "x": 0}
    assert efficacy(whole, whole | {"code": whole["code"] * 1.0}, whole, "code", ["code"]).real == 1


# ---------- associations


def test_two_continuous_columns_have_pearsons_correlation():
    real, fake = rows(), rows(100, 1)
    r, s = (np.corrcoef(table["x"], table["y"])[0, 1] for table in (real, fake))
    assert pairs("x", "y", real, fake) == pytest.approx(abs(r - s), rel=1e-9)
    assert pairs("x", "y", real, fake | {"y": -fake["y"]}) == pytest.approx(r + s, rel=1e-9)


def test_two_discrete_columns_have_cramers_v():
    real, fake = rows(), rows(100, 1)
    values = []
    for table in (real, fake):
        counts = pd.crosstab(table["kind"], table["grade"]).to_numpy()
        chi2 = chi2_contingency(counts, correction=False).statistic
        values.append(math.sqrt(chi2 / counts.sum() / (min(counts.shape) - 1)))
    assert pairs("kind", "grade", real, fake, ["grade"]) == pytest.approx(abs(values[0] - values[1]), rel=1e-9)
    independent = {"kind": ["a", "a", "b", "b"], "grade": ["u", "v", "u", "v"]}
    assert pairs("kind", "grade", independent, {"kind": [*"aabb"], "grade": [*"uuvv"]}) == pytest.approx(1)


def test_a_discrete_and_a_continuous_column_have_the_correlation_ratio():
    """η² = SS_between / SS_total, so F = (η² / (k − 1)) / ((1 − η²) / (n − k)) in the one-way analysis of variance."""
    real = rows()
    groups = [real["x"][real["grade"] == grade] for grade in np.unique(real["grade"])]
    statistic, k, n = f_oneway(*groups).statistic, len(groups), len(real["x"])
    eta = math.sqrt(statistic * (k - 1) / (statistic * (k - 1) + n - k))
    flat = {"x": np.ones(5), "grade": np.arange(5) % 2}  # nothing to explain
    for names in (("x", "grade"), ("grade", "x")):
        assert pairs(*names, real, flat, ["grade"]) == pytest.approx(eta, rel=1e-9)
    explained = {"x": [0.0, 0.0, 1.0, 1.0], "s": [*"aabb"]}
    mixed = {"x": [0.0, 1.0, 0.0, 1.0], "s": [*"aabb"]}
    assert correlation_difference(explained, mixed) == 1


@pytest.mark.parametrize(("a", "b"), [("x", "y"), ("kind", "grade"), ("x", "kind"), ("kind", "x")])
@pytest.mark.parametrize("still", [0, 1])
def test_a_constant_column_is_associated_with_nothing(a, b, still):
    real = rows()
    name = (a, b)[still]
    fake = real | {name: constant(real[name])}
    only = pairs(a, b, real, fake, ["grade"])
    both = pairs(a, b, real, {a: constant(real[a]), b: constant(real[b])}, ["grade"])
    assert only == both > 0.2
    assert pairs(a, b, fake, fake, ["grade"]) == 0


def test_a_constant_column_of_many_rows():
    """The standard deviation of equal numbers need not be 0 in floating point."""
    real = {"x": np.full(1000, 0.1), "y": np.arange(1000.0), "s": np.arange(1000) % 2}
    flat = {"x": np.zeros(1000), "y": np.arange(1000.0), "s": np.arange(1000) % 2}
    assert correlation_difference(real, flat, ["s"]) == 0


def test_it_is_the_mean_over_pairs():
    real, fake = rows(), rows(100, 1, 0.5)
    names = ["x", "y", "kind", "grade"]
    each = [pairs(a, b, real, fake, ["grade"]) for a, b in combinations(names, 2)]
    assert len(set(each)) == 6
    assert correlation_difference(real, fake, ["grade"]) == pytest.approx(np.mean(each))
    assert correlation_difference(real, {name: real[name] for name in reversed(names)}, ["grade"]) == 0


# ---------- what can be learned


@pytest.mark.parametrize("target", ["kind", "grade", "y"])
def test_real_rows_are_worth_as_much_as_real_rows(target):
    train, test = rows(), rows(100, 1)
    found = efficacy(train, test, train, target, ["grade"])
    assert found.ratio == 1
    assert found.synthetic == found.real
    assert 0.3 < found.real < 1
    assert efficacy(train, test, train, target, ["grade"]) == found
    assert efficacy(train, test, train, target, ["grade"], seed=1) != found


def separate(n, seed):
    draw = np.random.default_rng(seed)
    kind = np.where(draw.random(n) < 0.75, "often", "seldom")
    return {"x": (kind == "often") + 0.01 * draw.normal(size=n), "z": draw.normal(size=n), "kind": kind}


def test_of_a_shuffled_target_only_the_larger_share_is_learned():
    train, test = separate(400, 0), separate(400, 1)
    synthetic = train | {"kind": np.random.default_rng(2).permutation(train["kind"])}
    found = efficacy(train, test, synthetic, "kind")
    assert found.real == 1
    assert found.synthetic == pytest.approx((test["kind"] == "often").mean(), abs=0.12)
    assert found.ratio == found.synthetic


def test_of_one_class_its_share_is_learned():
    train, test = separate(100, 0), separate(100, 1)
    for kind in ("often", "seldom"):
        found = efficacy(train, test, train | {"kind": np.full(100, kind)}, "kind")
        assert found.synthetic == (test["kind"] == kind).mean()


def test_without_a_score_of_real_rows_there_is_no_ratio():
    train, test = separate(50, 0), separate(50, 1)
    found = efficacy(train | {"kind": np.full(50, "never")}, test, train, "kind")
    assert found.real == 0
    assert math.isnan(found.ratio)


def test_categories_that_were_not_seen_say_nothing():
    learned = {"s": [*"aabb"] * 5, "t": [*"uuvv"] * 5}
    test = {"s": [*"abcc"], "t": [*"uvuv"]}
    assert efficacy(learned, test, learned, "t").real == 0.75  # half of the two unknown ones, by chance


def test_numbers_that_are_learned_better_have_a_larger_score():
    train, test = rows(), rows(100, 1)
    draw = np.random.default_rng(2)
    scores = [
        efficacy(train, test, train | {"y": train["y"] + noise * draw.normal(size=200)}, "y").synthetic
        for noise in (0.0, 2.0, 20.0)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.6 > 0.0 > scores[-1]
    exact = {"x": np.arange(100.0), "y": 3 * np.arange(100.0)}
    assert efficacy(exact, exact, exact, "y").real > 0.99
    # all models predict the mean of a target that does not vary: R² = −(mean − c)² / variance
    flat = exact | {"y": np.full(100, 200.0)}
    expected = -((exact["y"].mean() - 200) ** 2) / exact["y"].var()
    assert efficacy(exact, exact, flat, "y").synthetic == pytest.approx(expected)


def test_a_column_that_is_discrete_in_one_table_is_so_in_all():
    train = {"x": [0.0, 1.0] * 10, "s": ["a", "b"] * 10}
    words = train | {"x": ["0", "1"] * 10}
    assert efficacy(train, train, words, "s") == efficacy(words, train, train, "s") == (1, 1, 1)


# ---------- tables


def test_data_frames_are_tables():
    real, fake, test = rows(), rows(150, 1, 0.3), rows(50, 2)
    frames = [pd.DataFrame(table).astype({"kind": "category"}) for table in (real, fake, test)]
    assert marginal_distances(*frames[:2], ["grade"]) == marginal_distances(real, fake, ["grade"])
    assert correlation_difference(frames[0], fake, ["grade"]) == correlation_difference(real, fake, ["grade"])
    found = efficacy(frames[0], frames[2], frames[1], "kind", ["grade"])
    assert found == efficacy(real, test, fake, "kind", ["grade"])


SECRET = "Rumpelstilzchen"
TABLE = {"x": [0.5, 4711.25], "name": [SECRET, "b"]}


@pytest.mark.parametrize(
    ("real", "fake", "options", "sentence"),
    [
        (TABLE, {"x": [4711.25]}, {}, "`real` and `fake` must have the same columns.*only one of them are 'name'"),
        (TABLE, TABLE | {"z": [SECRET, SECRET]}, {}, "must have the same columns; of only one of them are 'z'"),
        (TABLE, TABLE, {"discrete": ["z", "name"]}, "`discrete` names columns that are not there: 'z'"),
        (TABLE, {"x": [4711.25], "name": [SECRET, "b"]}, {}, "`fake` must have columns of one length"),
        (TABLE, {"x": [], "name": []}, {}, "`fake` must have columns of one length, with at least a row"),
        ({}, {}, {}, "`real` must have columns of one length, with at least a row"),
        (TABLE | {"x": [[4711.25], [1.0]]}, TABLE, {}, "`real` must have columns of one length"),
        (TABLE | {"x": [4711.25, math.nan]}, TABLE, {}, "`real` has 1 missing values in the column 'x'"),
        (TABLE, TABLE | {"x": [4711.25, math.inf]}, {}, "`fake` has 1 missing values in the column 'x'"),
        (TABLE, TABLE | {"name": [SECRET, None]}, {}, "`fake` has 1 missing values in the column 'name'"),
        (TABLE, TABLE | {"name": pd.array([SECRET, pd.NA])}, {}, "`fake` has 1 missing values in the column 'name'"),
        (TABLE, pd.DataFrame(TABLE | {"name": [None, None]}), {}, "`fake` has 2 missing values in the column 'name'"),
    ],
)
def test_what_cannot_be_compared(real, fake, options, sentence):
    for function in (marginal_distances, correlation_difference):
        with pytest.raises(ValueError, match=sentence) as error:
            function(real, fake, **options)
        assert SECRET not in str(error.value)
        assert "4711" not in str(error.value)


def test_one_column_has_no_associations():
    assert marginal_distances({"x": [1]}, {"x": [1]}) == {"x": 0}
    with pytest.raises(ValueError, match="`real` must have at least two columns"):
        correlation_difference({"x": [1]}, {"x": [1]})


@pytest.mark.parametrize(
    ("tables", "target", "sentence"),
    [
        ((TABLE, TABLE, TABLE), "z", "`target` must be one of the columns 'x', 'name', got 'z'"),
        (({"x": [4711.25]},) * 3, "x", "`train` must have a column besides the target"),
        ((TABLE, {"x": [4711.25]}, TABLE), "x", "`train` and `test` must have the same columns"),
        ((TABLE, TABLE, {"x": [4711.25]}), "x", "`train` and `synthetic` must have the same columns"),
        (
            (TABLE, TABLE, TABLE | {"name": [SECRET, None]}),
            "x",
            "`synthetic` has 1 missing values in the column 'name'",
        ),
        ((TABLE, TABLE | {"x": [math.nan, 1.0]}, TABLE), "x", "`test` has 1 missing values in the column 'x'"),
    ],
)
def test_what_cannot_be_learned(tables, target, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        efficacy(*tables, target)
    assert SECRET not in str(error.value)
    assert "4711" not in str(error.value)


def test_the_ratio_of_negative_scores_is_none():
    """Bad models of real rows, and worse ones of synthetic rows, would have a large positive ratio."""
    draw = np.random.default_rng(0)
    train, test, fake = ({name: draw.normal(size=50) for name in "xy"} for _ in range(3))
    fake["y"] = 10 * fake["y"] + 30
    found = efficacy(train, test, fake, "y")
    assert found.synthetic < found.real < 0
    assert math.isnan(found.ratio)


def test_integers_and_floats_in_one_column_are_continuous():
    real = {"x": np.array([1, 2.5, 3, 4.5], dtype=object)}
    assert marginal_distances(real, {"x": np.array([1, 2.5, 3, 4.5]) + 1e-9}) == {"x": pytest.approx(0.25)}


@pytest.mark.parametrize("table", [np.zeros((4, 2)), [[0.0, 1.0]], None])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ValueError, match="`fake` must be a mapping or a data frame of columns, got a"):
        marginal_distances({"x": [0.0, 1.0]}, table)
