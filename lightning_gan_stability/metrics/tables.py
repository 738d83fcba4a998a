"""Distances of a synthetic table to a real one: columns, pairs of columns, and use for training models.

A table is a mapping from the names of columns to arrays of one length; a ``pandas.DataFrame`` is one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_gan_stability._checks import describe
from lightning_gan_stability.tables import is_numeric, missing

Table: TypeAlias = Mapping[str, Any]
Columns: TypeAlias = dict[str, NDArray[Any]]


class Efficacy(NamedTuple):
    """Scores on real held-out rows of models trained on synthetic and on real rows, and their ratio."""

    synthetic: float
    real: float
    ratio: float


def marginal_distances(real: Table, fake: Table, discrete: Sequence[str] = ()) -> dict[str, float]:
    """The distance of each column's distributions: Kolmogorov–Smirnov's sup |F − G|, or ½ Σ |p − q| for discrete ones.

    Args:
        real: real rows.
        fake: synthetic rows, with the same columns.
        discrete: names of the discrete columns; columns that are not numeric are always discrete.

    Returns:
        A number in [0, 1] for each column; 0: the same distribution.

    Raises:
        ValueError: if a table is empty, if columns differ, or if values are missing.

    Example:
        >>> marginal_distances({"x": [0.0, 1.0], "s": ["a", "b"]}, {"x": [0.0, 1.0], "s": ["a", "a"]})
        {'x': 0.0, 's': 0.5}
    """
    from scipy.stats import ks_2samp  # slow to import

    x, y, names = _checked(discrete, real=real, fake=fake)
    found = {}
    for name in x:
        if name in names:
            p, q = _shares(x[name], y[name])
            found[name] = float(np.abs(p - q).sum() / 2)
        else:
            found[name] = float(ks_2samp(x[name], y[name]).statistic)
    return found


def correlation_difference(real: Table, fake: Table, discrete: Sequence[str] = ()) -> float:
    """The mean over pairs of columns of the absolute difference of their association.

    The association of two continuous columns is Pearson's r, of two discrete ones Cramér's V, and of a discrete and a
    continuous one the correlation ratio η; it is 0 if a column is constant.

    Args:
        real: real rows.
        fake: synthetic rows, with the same columns, at least two.
        discrete: names of the discrete columns; columns that are not numeric are always discrete.

    Returns:
        A number in [0, 2]; 0: the same associations.

    Raises:
        ValueError: if a table is empty, if columns differ or there is only one, or if values are missing.

    Example:
        >>> correlation_difference({"x": [0.0, 1.0], "y": [0.0, 1.0]}, {"x": [0.0, 1.0], "y": [1.0, 0.0]})
        2.0
    """
    x, y, names = _checked(discrete, real=real, fake=fake)
    if len(x) < 2:
        raise ValueError("`real` must have at least two columns for their associations.")
    differences = [abs(_association(x, a, b, names) - _association(y, a, b, names)) for a, b in combinations(x, 2)]
    return float(np.mean(differences))


def efficacy(
    train: Table, test: Table, synthetic: Table, target: str, discrete: Sequence[str] = (), seed: int = 0
) -> Efficacy:
    """How well models trained on synthetic rows predict real held-out rows, compared with models trained on real rows.

    The score is the accuracy for a discrete target and R² for a continuous one, averaged over a linear model, a
    decision tree and a random forest of scikit-learn. "Modeling Tabular data using Conditional GAN",
    https://arxiv.org/abs/1907.00503, section 5.

    Args:
        train: real rows.
        test: real rows that neither the models nor the generator were trained on.
        synthetic: rows to train on instead of ``train``.
        target: the column to predict.
        discrete: names of the discrete columns; columns that are not numeric are always discrete.
        seed: seed of the models.

    Returns:
        Both scores and their ratio, synthetic over real; 1: as good. NaN if the score of real rows is not positive,
        such as an R² for a target that the other columns do not predict; use the other distances then.

    Raises:
        ValueError: if a table is empty, if columns differ, if values are missing, or if there is no such target.

    Example:
        >>> rows = {"x": [0.0, 1.0] * 10, "s": ["a", "b"] * 10}
        >>> efficacy(rows, rows, {"x": [0.0, 1.0] * 10, "s": ["a", "a"] * 10}, "s")
        Efficacy(synthetic=0.5, real=1.0, ratio=0.5)
    """
    _, _, names = _checked(discrete, train=train, test=test)
    _, c, names = _checked([*names], train=train, synthetic=synthetic)
    a, b, _ = _checked([*names], train=train, test=test)  # discrete in one is discrete in all
    if target not in a:
        raise ValueError(f"`target` must be one of the columns {', '.join(map(repr, a))}, got {target!r}.")
    if len(a) < 2:
        raise ValueError("`train` must have a column besides the target.")
    made, real = (_score(learned, b, target, names, seed) for learned in (c, a))
    return Efficacy(made, real, made / real if real > 0 else math.nan)


# ---------- what they are made of


def _checked(discrete: Collection[str], **tables: Table) -> tuple[Columns, Columns, set[str]]:
    """Two tables as arrays, and the names of the discrete columns."""
    for name, table in tables.items():
        if not hasattr(table, "keys"):
            raise ValueError(f"`{name}` must be a mapping or a data frame of columns, got {describe(table)}.")
    (first, one), (second, other) = (
        (name, {str(c): np.asarray(table[c]) for c in table}) for name, table in tables.items()
    )
    if {*one} != {*other}:
        raise ValueError(
            f"`{first}` and `{second}` must have the same columns; of only one of them are "
            f"{', '.join(map(repr, sorted({*one} ^ {*other})))}."
        )
    if unknown := {*discrete} - {*one}:
        raise ValueError(f"`discrete` names columns that are not there: {', '.join(map(repr, sorted(unknown)))}.")
    for label, table in ((first, one), (second, other)):
        lengths = {column.shape for column in table.values()}
        if len(lengths) != 1 or len(next(iter(lengths))) != 1 or next(iter(lengths)) == (0,):
            raise ValueError(f"`{label}` must have columns of one length, with at least a row.")
        for name, column in table.items():
            infinite = np.isinf(column) if column.dtype.kind == "f" else False
            if n := int((missing(column) | infinite).sum()):
                raise ValueError(f"`{label}` has {n} missing values in the column {name!r}: drop or fill them.")
    names = {name for name in one if name in discrete or not all(is_numeric(t[name]) for t in (one, other))}
    one = {name: _texts(one[name]) if name in names else one[name].astype(float) for name in one}
    other = {name: _texts(other[name]) if name in names else other[name].astype(float) for name in one}
    return one, other, names


def _texts(column: NDArray[Any]) -> NDArray[Any]:
    """Categories as strings; 1.0 is the 1 of a table of integers."""
    texts = column.astype(str)
    return np.array([text.removesuffix(".0") for text in texts]) if column.dtype.kind == "f" else texts


def _is_constant(column: NDArray[Any]) -> bool:
    return bool((column == column[0]).all())  # its standard deviation may be a rounding error


def _shares(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    values = np.unique(np.concatenate([x, y]))
    p, q = ((column[:, None] == values).mean(0) for column in (x, y))
    return p, q


def _association(table: Columns, a: str, b: str, discrete: set[str]) -> float:
    x, y = table[a], table[b]
    if a in discrete and b in discrete:
        return _cramers_v(x, y)
    if a not in discrete and b not in discrete:
        if _is_constant(x) or _is_constant(y):
            return 0.0
        return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))
    return _correlation_ratio(x, y) if a in discrete else _correlation_ratio(y, x)


def _cramers_v(x: NDArray[Any], y: NDArray[Any]) -> float:
    from scipy.stats.contingency import association, crosstab  # slow to import

    counts = crosstab(x, y).count
    return float(association(counts, method="cramer")) if min(counts.shape) > 1 else 0.0


def _correlation_ratio(groups: NDArray[Any], values: NDArray[Any]) -> float:
    if _is_constant(values):
        return 0.0
    parts = [values[groups == group] for group in np.unique(groups)]
    between = sum(len(part) * (part.mean() - values.mean()) ** 2 for part in parts) / len(values)
    return float(np.sqrt(between / values.var()))


def _score(learned: Columns, test: Columns, target: str, discrete: set[str], seed: int) -> float:
    """The mean score of three models."""
    from sklearn.compose import make_column_transformer
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    inputs = [name for name in learned if name != target]
    kinds = [[i for i, name in enumerate(inputs) if (name in discrete) == wanted] for wanted in (True, False)]
    x, x_test = (np.array([table[name].astype(object) for name in inputs]).T for table in (learned, test))
    models: list[Any]
    if target not in discrete:
        models = [
            Ridge(),
            DecisionTreeRegressor(max_depth=5, random_state=seed),
            RandomForestRegressor(random_state=seed),
        ]
    elif len(np.unique(learned[target])) == 1:  # nothing to learn
        models = [DummyClassifier()]
    else:
        models = [
            LogisticRegression(max_iter=2000),
            DecisionTreeClassifier(max_depth=5, random_state=seed),
            RandomForestClassifier(random_state=seed),
        ]
    columns = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), kinds[0]), (StandardScaler(), kinds[1]))
    x, x_test = columns.fit_transform(x), columns.transform(x_test)
    scores = [model.fit(x, learned[target]).score(x_test, test[target]) for model in models]
    return float(np.mean(scores))
