"""Rows of a table with mixed columns, drawn for a conditional GAN."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from lightning_gan_stability._checks import check_integer, check_share, require
from lightning_gan_stability.data.base import Source, StreamedDataModule
from lightning_gan_stability.data.streams import Rows
from lightning_gan_stability.datasets import TABLES, table
from lightning_gan_stability.noise import generator
from lightning_gan_stability.tables import Span, TableEncoder, is_numeric, table_columns

_MANY_ROWS = 1000  # beyond which a category for most rows is likely a name or a number of the row


class Table(StreamedDataModule):
    """Encoded rows of a table with conditions, drawn by CTGAN's training-by-sampling.

    A sample takes one of the discrete columns with equal probability, one of its categories with probability ∝
    log(count + 1), and a random training row of that category. The condition is the category as one-hot among the
    categories of all discrete columns. Rare categories are therefore drawn more often than they occur in the table.

    Modeling Tabular data using Conditional GAN, https://arxiv.org/abs/1907.00503; see
    :class:`lightning_gan_stability.tables.TableEncoder` for the encoding.

    A batch is `(rows, condition)`: float32 of shape `(batch_size, encoder.width)` and `(batch_size,
    encoder.condition_width)`. Without discrete columns, rows are drawn with equal probability, and the condition has
    width 0. Validation and prediction take each held-out row once, in order, with the category of one of its columns.
    Rows are drawn with replacement, so a batch may be larger than the table.

    Args:
        data: "iris", "wine", "breast_cancer" or "diabetes" of scikit-learn; or the path of a CSV file; or the table, as
            a mapping of names to columns or a DataFrame of pandas.
        discrete: Names of the discrete columns; None: the columns that are not numeric, and the known ones of
            scikit-learn's tables.
        components: Largest number of components in the mixture of Gaussians of a continuous column.
        batch_size: Rows per batch and process.
        epoch_length: Number of batches in an epoch; None: training rows // (batch_size * processes), at least 1.
        holdout: Share of the rows for validation and prediction, in [0, 1); 0: predict the training rows.
        seed: Seed of the split, of the mixtures and of the draws.

    Attributes:
        encoder: The :class:`lightning_gan_stability.tables.TableEncoder`, fitted to the training rows.
        columns: Its description of the columns, which can build it again.
        train_table: Columns of the training rows by name.
        test_table: Columns of the held-out rows by name.
        holdout: Number of held-out rows.

    Raises:
        ValueError: If an argument is out of its range; if there is no such table or file; if the table cannot be
            encoded, see :meth:`lightning_gan_stability.tables.TableEncoder.fit`.
        ModuleNotFoundError: If a CSV file is to be read and pandas is not installed.

    Example:
        >>> iris = Table("iris", batch_size=50)
        >>> rows, condition = next(iter(iris.train_dataloader()))
        >>> rows.shape == (50, iris.encoder.width), condition.shape
        (True, torch.Size([50, 3]))
    """

    def __init__(
        self,
        data: str | Mapping[str, Any] | Any,
        discrete: Sequence[str] | None = None,
        components: int = 10,
        batch_size: int = 500,
        epoch_length: int | None = None,
        holdout: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, 0, seed)
        share = check_share("holdout", holdout, open_end=True)
        self.epoch_length = epoch_length if epoch_length is None else check_integer("epoch_length", epoch_length)
        data, guess = read(data)
        columns = table_columns(data)
        order = torch.randperm(n := len(next(iter(columns.values()))), generator=generator(seed, "holdout")).numpy()
        test, train = np.sort(order[: int(share * n)]), np.sort(order[int(share * n) :])
        self.train_table = {name: column[train] for name, column in columns.items()}
        self.encoder = TableEncoder.fit(self.train_table, guess if discrete is None else discrete, components, seed)
        self.columns = self.encoder.columns
        for column in self.columns:
            if len(train) > _MANY_ROWS and len(column.get("categories", ())) > len(train) / 2:
                rank_zero_warn(
                    f"Column {column['name']!r} has {len(column['categories'])} categories in {len(train)} training "
                    "rows, each of which becomes an output of the generator: leave the column out, or merge categories."
                )
        held_out = {name: column[test] for name, column in columns.items()}
        known = self.encoder.known(held_out)
        if unknown := int((~known).sum()):
            rank_zero_warn(
                f"{unknown} of {len(known)} held-out rows have categories that no training row has, and are left out: "
                "take another `seed`, or merge rare categories."
            )
        self.test_table = {name: column[known] for name, column in held_out.items()}
        self.holdout = int(known.sum())
        self._rows: Tensor | None = None  # of the training part, encoded once

    def sources(self, rank: int, world: int) -> tuple[Source, Source]:
        if self._rows is None:
            self._rows = self.encoder.encode(self.train_table, generator(self.seed, "components", "train"))
        rows = self._rows
        length = self.epoch_length or max(1, len(rows) // (self.batch_size * world))
        train = ConditionalRows(rows, self.encoder, self.batch_size, length, (self.seed, "train", rank))
        if self.holdout:
            rows = self.encoder.encode(self.test_table, generator(self.seed, "components", "holdout"))
        shown = TensorDataset(rows, own_conditions(rows, self.encoder, generator(self.seed, "conditions")))
        return train, Rows(shown, torch.arange(len(rows)), self.batch_size, rank, world, self.seed)


def read(data: Any) -> tuple[Any, list[str]]:
    """Return a table by its name, its path or itself, and the names of its discrete columns.

    Raises:
        ValueError: If there is no such table, or the file cannot be read.
        ModuleNotFoundError: If pandas is needed and not installed.
    """
    if isinstance(data, str) and data in TABLES:
        return table(data)
    if isinstance(data, str | Path):
        if not Path(data).is_file():
            names = ", ".join(map(repr, TABLES))
            raise ValueError(f"`data` must be one of {names}, the path of a CSV file, or a table; no file: {data}")
        pandas = require("pandas", "tables")
        path = data
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pandas.errors.ParserWarning)
                names = pandas.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
                data = pandas.read_csv(path, index_col=False)  # else the first fields of long rows become an index
        except pandas.errors.ParserWarning:
            raise ValueError(f"This CSV file has rows with more fields than its header has names: {path}") from None
        except (ValueError, OSError) as error:  # its message may show values
            raise ValueError(f"pandas cannot read this CSV file: {path} ({type(error).__name__})") from None
        if twice := sorted({name for name in names if name and names.count(name) > 1}):  # pandas renames them
            raise ValueError(f"The names of columns must be different, got these twice: {twice}.")
    table_columns(data)  # a missing value makes integers floats, and must not pass as something else
    return data, [name for name in data if not is_numeric(data[name])]


class ConditionalRows:
    """Batches of training-by-sampling from encoded rows.

    Args:
        rows: Encoded rows (n, width).
        encoder: Knows where the discrete columns are in them.
        batch_size: Rows per batch.
        length: Batches in an epoch.
        key: Tells random streams apart.
    """

    def __init__(
        self, rows: Tensor, encoder: TableEncoder, batch_size: int, length: int, key: tuple[int, str, int]
    ) -> None:
        self.rows, self.batch_size, self.length, self.key = rows, batch_size, length, key
        self.spans, self.condition_width = encoder.condition_spans, encoder.condition_width
        codes = categories(rows, encoder)
        counts = torch.zeros(len(codes), max((span.end - span.start for span in self.spans), default=0))
        for count, code in zip(counts, codes, strict=True):
            count += code.bincount(minlength=len(count))
        self.frequencies = (counts + 1).log()
        self.counts = counts.long()
        # The rows of one category stand together; its first one is after those of the categories before it.
        self.orders = codes.argsort(dim=1, stable=True)
        self.starts = self.counts.cumsum(1) - self.counts

    def __len__(self) -> int:
        return self.length

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        source, n = generator(*self.key, position), self.batch_size
        if not self.spans:
            return self.rows[torch.randint(len(self.rows), (n,), generator=source)], torch.zeros(n, 0)
        column = torch.randint(len(self.spans), (n,), generator=source)
        category = torch.multinomial(self.frequencies[column], 1, generator=source)[:, 0]
        count = self.counts[column, category]
        place = (torch.rand(n, generator=source, dtype=torch.float64) * count).long().clamp(max=count - 1)
        rows = self.orders[column, self.starts[column, category] + place]
        return self.rows[rows], conditions(column, category, self.spans, self.condition_width)


def categories(rows: Tensor, encoder: TableEncoder) -> Tensor:
    """Return the number of the category of each discrete column in encoded rows: (columns, n)."""
    codes = [rows[:, span.start : span.end].argmax(1) for span in encoder.spans if span.discrete]
    return torch.stack(codes) if codes else torch.zeros(0, len(rows), dtype=torch.int64)


def conditions(column: Tensor, category: Tensor, spans: Sequence[Span], width: int) -> Tensor:
    """Return one-hot conditions (n, width) for the numbers of columns (n,) and of their categories (n,)."""
    starts = torch.tensor([span.start for span in spans])
    return one_hot(starts[column] + category, width).float()


def own_conditions(rows: Tensor, encoder: TableEncoder, source: torch.Generator) -> Tensor:
    """Return for each encoded row the category of one of its discrete columns, drawn with equal probability."""
    codes = categories(rows, encoder)
    if not len(codes):
        return torch.zeros(len(rows), 0)
    column = torch.randint(len(codes), (len(rows),), generator=source)
    category = codes[column, torch.arange(len(rows))]
    return conditions(column, category, encoder.condition_spans, encoder.condition_width)
