"""TableEncoder: encodes tables of mixed columns as rows of numbers for a generator, and decodes them."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from lightning_gan_stability._checks import check_integer, is_number

_CLIP = 0.99  # of a normalised value, in units of four standard deviations
_LEAST_WEIGHT = 0.005  # of a component that is kept
_LEAST_PROBABILITY = 1e-6  # of a component given a value, before normalisation
_EXACT = 2**53  # integers below it are exact in float64


class Span(NamedTuple):
    """A part of an encoded row, or of a condition.

    Args:
        name: Name of the column.
        start: First position.
        end: Position after the last.
        kind: "scalar" for a normalised value in [-1, 1], "onehot" for a component or a category.
        discrete: Whether it is the category of a discrete column.
    """

    name: str
    start: int
    end: int
    kind: Literal["scalar", "onehot"]
    discrete: bool


class Column(dict[str, Any]):
    """The description of a column, printed as its name and sizes without values of the table.

    Example:
        >>> Column({"name": "sex", "categories": ["f", "m"]})
        Column(name='sex', 2 categories)
    """

    __slots__ = ()  # jsonargparse copies a `__dict__` in the place of the items

    def __repr__(self) -> str:
        sizes = (f"{len(self[key])} {key}" for key in ("categories", "means") if key in self)
        return f"{type(self).__name__}({', '.join(['name=' + repr(self['name']), *sizes])})"


class TableEncoder:
    """Encode rows of a table by mode-specific normalisation, and decode them.

    x of a continuous column becomes [a, onehot(k)] with a = (x − μ_k) / (4 σ_k) clipped to ±0.99 and k a component of a
    mixture of Gaussians, drawn by its probability given x. The inverse is 4 σ_k a + μ_k. A category becomes one-hot.

    Modeling Tabular data using Conditional GAN, https://arxiv.org/abs/1907.00503, with the constants of its code: 10
    components with a Dirichlet process prior of 0.001, of which those with a weight above 0.005 are kept, and 1e-6 is
    added to the probabilities.

    The description is plain data, for use in YAML or in a checkpoint. A continuous column is `{"name": ..., "means":
    [...], "stds": [...]}`, optionally with `"weights"` of the components (default: equal) and `"integer": True` for
    values that are rounded when decoded. A discrete column is `{"name": ..., "categories": [...]}`, optionally with
    `"weights"`, the shares of the categories (default: equal).

    Args:
        columns: Description of each column.

    Attributes:
        columns: The description, with all keys.
        spans: Parts of an encoded row, in order.
        width: Width of an encoded row: 1 + components of each continuous column, and categories of each discrete one.
        condition_spans: Categories of each discrete column in a condition.
        condition_width: Width of a condition: categories of all discrete columns.

    Raises:
        ValueError: If the description is wrong.

    Example:
        >>> encoder = TableEncoder([
        ...     {"name": "age", "means": [20.0, 60.0], "stds": [5.0, 10.0], "integer": True},
        ...     {"name": "sex", "categories": ["f", "m"]},
        ... ])
        >>> rows = encoder.encode({"age": [30, 50], "sex": ["m", "f"]})
        >>> rows.tolist()
        [[0.5, 1.0, 0.0, 0.0, 1.0], [-0.25, 0.0, 1.0, 1.0, 0.0]]
        >>> encoder.decode(rows)
        {'age': array([30, 50]), 'sex': array(['m', 'f'], dtype='<U1')}
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]]) -> None:
        self.columns = [_described(column) for column in columns]
        if not self.columns:
            raise ValueError("`columns` must describe at least one column.")
        names = [column["name"] for column in self.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`columns` must have different names, got these twice: {twice}.")
        self.spans: list[Span] = []
        self.condition_spans: list[Span] = []
        self.width = self.condition_width = 0
        for column in self.columns:
            if "categories" in column:
                n = len(column["categories"])
                start = self.condition_width
                self.condition_spans.append(Span(column["name"], start, start + n, "onehot", True))
                self.condition_width += n
                self._append(column["name"], n, "onehot", True)
            else:
                self._append(column["name"], 1, "scalar", False)
                self._append(column["name"], len(column["means"]), "onehot", False)

    def _append(self, name: str, n: int, kind: Literal["scalar", "onehot"], discrete: bool) -> None:
        self.spans.append(Span(name, self.width, self.width + n, kind, discrete))
        self.width += n

    @classmethod
    def fit(
        cls, table: Mapping[str, Any], discrete: Sequence[str] = (), components: int = 10, seed: int = 0
    ) -> "TableEncoder":
        """Return an encoder fitted to the values of a table.

        Columns are standardised before their mixtures are fitted, so that scikit-learn's constant in the variances
        (1e-6) does not affect columns of small values.

        Args:
            table: Columns of equal length by name: a mapping, or a DataFrame of pandas.
            discrete: Names of the discrete columns; the others must be numbers.
            components: Maximum number of components of a continuous column.
            seed: Seed of the start of each mixture.

        Raises:
            ValueError: If the table has fewer than 2 rows; if columns have different lengths, missing or infinite
                values, are constant, or are not numbers without being in `discrete`; if `discrete` has an unknown
                name.

        Example:
            >>> table = {"x": [0.0, 0.1] * 50 + [9.0, 9.1] * 50, "kind": ["a", "b"] * 100}
            >>> encoder = TableEncoder.fit(table, discrete=["kind"], components=2)
            >>> encoder.width, encoder.condition(1, {"kind": "b"}).tolist()
            (5, [[0.0, 1.0]])
        """
        check_integer("components", components)
        check_integer("seed", seed, least=0)
        arrays = table_columns(table)
        if isinstance(discrete, str):
            raise ValueError("`discrete` must be a list of names, not a string.")
        if unknown := [name for name in discrete if name not in arrays]:
            raise ValueError(f"`discrete` has names that the table does not: {unknown}.")
        if (n := _rows(arrays)) < 2:
            raise ValueError(f"The table must have at least 2 rows, got {n}.")
        return cls(
            [
                _categories(name, array) if name in discrete else _mixture(name, array, components, seed)
                for name, array in arrays.items()
            ]
        )

    def encode(self, table: Mapping[str, Any], source: torch.Generator | None = None) -> Tensor:
        """Return rows (n, `width`), float32.

        Args:
            table: Columns of equal length by name: a mapping, or a DataFrame of pandas. Further columns are ignored.
            source: Draws the components of continuous values, as in training; None: the most probable ones.

        Raises:
            ValueError: If columns are missing or have different lengths; if values are missing, infinite, or categories
                that are not in the description.
        """
        arrays = table_columns(table)
        if lacking := [column["name"] for column in self.columns if column["name"] not in arrays]:
            raise ValueError(f"The table lacks these columns: {lacking}.")
        parts = []
        for column in self.columns:
            if "categories" in column:
                codes = _codes(column, arrays[column["name"]])
                if unseen := int((codes < 0).sum()):
                    raise ValueError(
                        f"Column {column['name']!r} has categories that the encoder does not know, in {unseen} of "
                        f"{len(codes)} rows."
                    )
                parts.append(_onehot(codes, len(column["categories"])))
            else:
                parts.append(_normalised(column, _numbers(column["name"], arrays[column["name"]]), source))
        return torch.cat(parts, dim=1).float()

    def decode(self, rows: Tensor) -> dict[str, np.ndarray]:
        """Return the columns of encoded or generated rows.

        Args:
            rows: Tensor (n, `width`) of finite values. Components and categories are those with the largest value;
                normalised values are clipped to [-1, 1].

        Raises:
            ValueError: If it has another shape, or values that are not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"`rows` must be of shape (n, {self.width}), got {tuple(rows.shape)}.")
        rows = rows.detach().cpu().double()
        if bad := int((~rows.isfinite()).any(1).sum()):
            raise ValueError(f"`rows` must be finite, but {bad} of {len(rows)} rows are not.")
        spans = iter(self.spans)
        return {column["name"]: _decoded(column, rows, spans) for column in self.columns}

    def known(self, table: Mapping[str, Any]) -> np.ndarray:
        """Return for each row of a table whether all its categories are in the description: bool (n,).

        Raises:
            ValueError: As :meth:`encode`, apart from the categories.
        """
        arrays = table_columns(table)
        result = np.ones(_rows(arrays), dtype=bool)
        for column in self.columns:
            if "categories" in column:
                result &= _codes(column, arrays[column["name"]]).numpy() >= 0
        return result

    def condition(self, n: int, choice: Mapping[str, Any]) -> Tensor:
        """Return n equal conditions (n, `condition_width`) for one category of one discrete column.

        Args:
            n: Number of conditions.
            choice: `{column: category}`.

        Raises:
            ValueError: If `choice` has not exactly one entry, or an unknown column or category.
        """
        check_integer("n", n)
        if not isinstance(choice, Mapping):
            raise ValueError(f"`choice` must be a dict of a column and its category, got a {type(choice).__name__}.")
        if len(choice) != 1:
            raise ValueError(f"`choice` must have exactly one column, got {len(choice)}.")
        [(name, category)] = choice.items()
        spans = {span.name: span for span in self.condition_spans}
        if name not in spans:
            raise ValueError(f"`choice` must be of one of the discrete columns {list(spans)}, got {name!r}.")
        categories = next(column["categories"] for column in self.columns if column["name"] == name)
        if category not in categories:
            raise ValueError(f"`choice` must be one of the {len(categories)} categories of column {name!r}.")
        condition = torch.zeros(n, self.condition_width)
        condition[:, spans[name].start + categories.index(category)] = 1
        return condition

    def draw_conditions(self, uniform: Tensor) -> Tensor:
        """Return conditions (n, `condition_width`): each for a random discrete column, and a category by its weight.

        Args:
            uniform: Values (n, 2) in [0, 1), which select column and category.

        Example:
            >>> encoder = TableEncoder([{"name": "sex", "categories": ["f", "m"], "weights": [0.7, 0.3]}])
            >>> encoder.draw_conditions(torch.tensor([[0.0, 0.69], [0.0, 0.71]])).tolist()
            [[1.0, 0.0], [0.0, 1.0]]
        """
        conditions = torch.zeros(len(uniform), self.condition_width)
        if not self.condition_spans:
            return conditions
        weights = {column["name"]: column["weights"] for column in self.columns if "categories" in column}
        chosen = (uniform[:, 0] * len(self.condition_spans)).long()
        for i, span in enumerate(self.condition_spans):
            rows = (chosen == i).nonzero()[:, 0]
            ends = torch.tensor(weights[span.name], dtype=torch.float64).cumsum(0)
            category = torch.searchsorted(ends / ends[-1], uniform[rows, 1].double(), right=True)
            conditions[rows, span.start + category.clamp(max=len(ends) - 1)] = 1
        return conditions


def is_description(columns: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether an object has the form of a description of columns for :class:`TableEncoder`.

    Example:
        >>> is_description([{"name": "sex", "categories": ["f", "m"]}]), is_description(["sex"])
        (True, False)
    """
    listed = isinstance(columns, list | tuple) and len(columns) > 0
    return listed and all(isinstance(column, Mapping) and "name" in column for column in columns)  # type: ignore[attr-defined]


def table_columns(table: Any) -> dict[str, np.ndarray]:
    """Return the columns of a table as arrays (n,), after a check.

    Args:
        table: Columns by name: a mapping, or a DataFrame of pandas.

    Raises:
        ValueError: If it is no table or has no columns; if columns have different lengths or missing values.
    """
    if not (isinstance(table, Mapping) or hasattr(table, "columns")):
        raise ValueError(f"A table must map names to columns, got {type(table).__name__}.")
    names = list(table)
    if not names:
        raise ValueError("The table has no columns.")
    if kinds := sorted({type(name).__name__ for name in names if not isinstance(name, str)}):
        raise ValueError(f"The names of columns must be strings, got {', '.join(kinds)}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The names of columns must be different, got these twice: {twice}.")
    arrays = {name: _array(name, table[name]) for name in names}
    if len(set(map(len, arrays.values()))) > 1:
        lengths = ", ".join(f"{name!r}: {len(array)}" for name, array in arrays.items())
        raise ValueError(f"The columns must have the same length, got {lengths}.")
    for name, array in arrays.items():
        if n := int(missing(array).sum()):
            raise ValueError(
                f"Column {name!r} has {n} missing values of {len(array)}: fill them in, leave out these rows, or make "
                "them a category of their own."
            )
        if array.dtype.kind in "mM":
            raise ValueError(
                f"Column {name!r} has times ({array.dtype}): turn them into numbers, such as days since the first one, "
                "or into strings, such as the name of the month."
            )
        if array.dtype == object and is_numeric(array) and any(isinstance(v, float | np.floating) for v in array):
            arrays[name] = _floats(name, array)
    return arrays


def is_numeric(column: Any) -> bool:
    """Whether a column of a table has numbers, and neither strings, nor bools, nor a categorical type of pandas.

    Example:
        >>> is_numeric([1, 2.5]), is_numeric(["1", "2"]), is_numeric([True, False])
        (True, False, False)
    """
    if getattr(getattr(column, "dtype", None), "name", None) == "category":
        return False
    array = _array("", column)
    if array.dtype != object:
        return array.dtype.kind in "iuf"
    present = array[~missing(array)]
    return all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in present)


def missing(array: np.ndarray) -> np.ndarray:
    """Return which values of a column are missing: None, NaN, and NaT and NA of pandas.

    Example:
        >>> missing(np.array([1.0, np.nan])).tolist(), missing(np.array(["a", None], dtype=object)).tolist()
        ([False, True], [False, True])
    """
    if array.dtype != object:
        unequal: np.ndarray = array != array  # NaN, and NaT of times
        return unequal
    # pandas.NA has no truth value
    return np.array([v is None or type(v).__name__ == "NAType" or bool(v != v) for v in array], dtype=bool)


def _rows(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))


def _array(name: str, column: Any) -> np.ndarray:
    if isinstance(column, list | tuple) and len(set(map(type, column))) > 1:
        array = np.empty(len(column), dtype=object)  # NumPy would turn None and numbers among strings into strings
        array[:] = column
    else:
        try:
            array = np.asarray(column)
        except ValueError as error:  # lists of several lengths
            raise ValueError(f"Column {name!r} must have one dimension, got nested values.") from error
        except TypeError as error:  # a tensor of bfloat16, for instance
            raise ValueError(
                f"Column {name!r} cannot be an array of NumPy ({type(column).__name__} of "
                f"{getattr(column, 'dtype', 'mixed values')}): convert it, for instance to float32."
            ) from error
    if array.ndim != 1:
        raise ValueError(f"Column {name!r} must have one dimension, got {array.ndim}.")
    return array


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    if not is_numeric(array):
        raise ValueError(f"Column {name!r} does not have numbers: name it in `discrete`, or leave it out.")
    numbers = _floats(name, array)
    if n := int(np.isinf(numbers).sum()):
        raise ValueError(f"Column {name!r} has {n} infinite values of {len(numbers)}.")
    return numbers


def _floats(name: str, array: np.ndarray) -> np.ndarray:
    try:
        return array.astype(np.float64)
    except OverflowError:
        raise ValueError(f"Column {name!r} has values too large or too close for float64: rescale it.") from None


def _plain(array: np.ndarray) -> list[Any]:
    """Return the values as those of Python."""
    return [value.item() if isinstance(value, np.generic) else value for value in array.tolist()]


def _categories(name: str, array: np.ndarray) -> dict[str, Any]:
    values = _plain(array)
    if kinds := sorted({type(v).__name__ for v in values if not isinstance(v, str | int | float)}):
        raise ValueError(f"The categories of column {name!r} must be strings or numbers, got {', '.join(kinds)}.")
    counts = Counter(values)
    categories = sorted(counts, key=lambda value: (isinstance(value, str), value))
    if len(categories) < 2:
        raise ValueError(f"Column {name!r} has the same category in every row: leave it out.")
    return {"name": name, "categories": categories, "weights": [counts[c] / len(values) for c in categories]}


def _mixture(name: str, array: np.ndarray, components: int, seed: int) -> dict[str, Any]:
    """Describe a continuous column by a mixture of Gaussians, as CTGAN does."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import BayesianGaussianMixture
    from threadpoolctl import threadpool_limits

    x = _numbers(name, array)
    if np.all(x == x[0]):
        if np.any(array != array[0]):
            raise ValueError(
                f"Column {name!r} has numbers that float64 cannot tell apart: subtract the smallest one, name the "
                "column in `discrete`, or leave it out."
            )
        raise ValueError(f"Column {name!r} has the same value in every row: leave it out.")
    center, scale = x.mean(), x.std()
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"Column {name!r} has values too large or too close for float64: rescale it.")
    model = BayesianGaussianMixture(
        n_components=min(components, len(x)),
        weight_concentration_prior_type="dirichlet_process",
        weight_concentration_prior=0.001,
        random_state=seed % 2**32,
    )
    # With one thread, sums have one order, so that every process finds the same mixture.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a mixture that still moves a little is good enough
        model.fit(((x - center) / scale)[:, None])
    kept = model.weights_ > _LEAST_WEIGHT
    weights = model.weights_[kept] / model.weights_[kept].sum()
    return {
        "name": name,
        "means": (model.means_[kept, 0] * scale + center).tolist(),
        "stds": (np.sqrt(model.covariances_[kept, 0, 0]) * scale).tolist(),
        "weights": weights.tolist(),
        "integer": bool(np.all(x == np.round(x)) and np.abs(x).max() < _EXACT),
    }


def _described(column: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of one column with all its keys, after a check."""
    if not isinstance(column, Mapping) or not isinstance(column.get("name"), str):
        raise ValueError("Each of `columns` must be a mapping with a `name`.")
    name, keys = column["name"], set(column) - {"name"}
    if {"categories"} <= keys <= {"categories", "weights"}:
        categories = column["categories"]
        plain = isinstance(categories, list | tuple) and all(
            isinstance(c, str | int | float) and c == c for c in categories
        )
        if not plain or len(set(categories)) != len(categories) or len(categories) < 2:
            raise ValueError(f"`categories` of column {name!r} must be at least two different strings or numbers.")
        weights = column.get("weights", [1 / len(categories)] * len(categories))
        shares = isinstance(weights, list | tuple) and len(weights) == len(categories) and all(map(is_number, weights))
        if not shares or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"`weights` of column {name!r} must be a list of shares, one for each category.")
        return {"name": name, "categories": list(categories), "weights": [float(weight) for weight in weights]}
    if not {"means", "stds"} <= keys <= {"means", "stds", "weights", "integer"}:
        raise ValueError(
            f"Column {name!r} must have `categories`, or `means` and `stds` with or without `weights` and `integer`, "
            f"got {sorted(map(str, keys))}."
        )
    means = column["means"]
    numbers = {key: column[key] for key in ("means", "stds", "weights") if column.get(key) is not None}
    for key, values in numbers.items():
        kind = "finite numbers" if key == "means" else "positive finite numbers"
        right = isinstance(values, list | tuple) and len(values) > 0 and all(map(is_number, values))
        if not right or (key != "means" and min(values) <= 0):
            raise ValueError(f"`{key}` of column {name!r} must be a list of {kind}, one for each component.")
        if len(values) != len(means):
            raise ValueError(f"Column {name!r} must have as many `{key}` as `means`, got {len(values)}, {len(means)}.")
    numbers.setdefault("weights", [1 / len(means)] * len(means))
    integer = column.get("integer", False)
    if not isinstance(integer, bool):
        raise ValueError(f"`integer` of column {name!r} must be True or False.")
    return {"name": name} | {key: [float(v) for v in values] for key, values in numbers.items()} | {"integer": integer}


def _codes(column: Mapping[str, Any], array: np.ndarray) -> Tensor:
    """Return the numbers of the categories of a column, -1 for unknown ones."""
    number = {category: code for code, category in enumerate(column["categories"])}
    try:
        return torch.tensor([number.get(value, -1) for value in _plain(array)], dtype=torch.int64)
    except TypeError as error:  # a list, for instance, is no key
        raise ValueError(f"The categories of column {column['name']!r} must be strings or numbers.") from error


def _onehot(codes: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(codes, n).double()


def _normalised(column: Mapping[str, Any], numbers: np.ndarray, source: torch.Generator | None) -> Tensor:
    """Return normalised value and component of each number: (n, 1 + components)."""
    x = torch.from_numpy(numbers)[:, None]
    means, stds, weights = (torch.tensor(column[key], dtype=torch.float64) for key in ("means", "stds", "weights"))
    scores = weights.log() - stds.log() - ((x - means) / stds).square() / 2
    if source is None:
        component = scores.argmax(1)
    else:
        probabilities = scores.softmax(1) + _LEAST_PROBABILITY
        component = torch.multinomial(probabilities, 1, generator=source)[:, 0]
    value = (x[:, 0] - means[component]) / (4 * stds[component])
    return torch.cat([value.clamp(-_CLIP, _CLIP)[:, None], _onehot(component, len(means))], dim=1)


def _decoded(column: Mapping[str, Any], rows: Tensor, spans: Any) -> np.ndarray:
    """Return the values of one column; takes the spans that belong to it."""
    span = next(spans)
    if "categories" in column:
        categories = column["categories"]
        values = np.array(categories, dtype=None if len(set(map(type, categories))) == 1 else object)
        chosen: np.ndarray = values[rows[:, span.start : span.end].argmax(1).numpy()]
        return chosen
    value, span = rows[:, span.start].clamp(-1, 1), next(spans)
    means, stds = (torch.tensor(column[key], dtype=torch.float64) for key in ("means", "stds"))
    component = rows[:, span.start : span.end].argmax(1)
    numbers: np.ndarray = (4 * stds[component] * value + means[component]).numpy()
    return np.round(numbers).astype(np.int64) if column["integer"] else numbers
