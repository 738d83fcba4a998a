"""TableMonitor: measures the quality of synthetic rows in validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_gan_stability._checks import check_type
from lightning_gan_stability.callback import Cadence, GANCallback
from lightning_gan_stability.metrics.tables import correlation_difference, efficacy, marginal_distances
from lightning_gan_stability.monitors.paired import validates_nothing, warn_without_validation, will_validate
from lightning_gan_stability.outcome import Outcome, courses_of
from lightning_gan_stability.recipes.table import TableSynthesis


class TableMonitor(GANCallback):
    """Measures a synthetic table after every validation: marginals, correlations, and its use for training models.

    The monitor generates as many rows as there are real training rows. Values go to the loggers and to
    ``trainer.callback_metrics``:

    * ``quality/marginals``: the mean over columns of the Kolmogorov–Smirnov statistic, or the total variation of a
      discrete column; in [0, 1], 0 is best.
    * ``quality/correlations``: the mean absolute difference of the associations of two columns; in [0, 2], 0 is best.
    * ``quality/efficacy``: the score on held-out rows of classifiers (or regressors) trained on synthetic rows, divided
      by the score of those trained on real rows; 1 is as good. NaN if those trained on real rows predict nothing, as
      with an R² of at most 0 for a continuous target.

    ``ModelCheckpoint(monitor="quality/efficacy", mode="max")`` keeps the best checkpoint. Use
    ``monitor="quality/marginals", mode="min"`` if the efficacy is NaN, or without a target.

    Args:
        target: the column to predict; None: no efficacy.
        train: real rows; None: ``train_table`` of the data module, such as that of
            :class:`~lightning_gan_stability.Table`.
        test: held-out rows; None: ``test_table`` of the data module.
        name: prefix of the log's keys.

    Raises:
        MisconfigurationException: if the run does not train a
            :class:`~lightning_gan_stability.TableSynthesis`, or if there are no tables to compare with.

    Example:
        >>> TableMonitor("target").target
        'target'
    """

    rolled_back = False

    history: list[dict[str, float]]

    def __init__(
        self,
        target: str | None = None,
        train: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        name: str = "quality",
    ) -> None:
        super().__init__()
        self.target = None if target is None else check_type("target", target, str)
        self.train, self.test = train, test
        self.name = check_type("name", name, str)
        self.add_state("history", [])  # measurements in a fit, with their ``step``

    @property
    def state_key(self) -> str:
        """A key that tells callbacks with different names apart."""
        return f"{type(self).__qualname__}({self.name})"

    def outcome(self, trainer: Trainer) -> Outcome:
        """The course of each value."""
        return Outcome(
            courses_of(self.name, self.history, {"marginals": True, "correlations": True, "efficacy": False})
        )

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """A key for each value, new in every validation."""
        names = ("marginals", "correlations", *(["efficacy"] if self.target is not None else []))
        return {f"{self.name}/{name}": "validation" for name in names if will_validate(trainer)}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without tables, and say so when nothing will be measured."""
        super().on_fit_start(trainer, pl_module)
        self._tables(trainer, pl_module)
        if not trainer.enable_validation:
            warn_without_validation(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when the validation loader is empty."""
        super().on_train_start(trainer, pl_module)
        if validates_nothing(trainer):
            warn_without_validation(self)

    def _tables(self, trainer: Trainer, module: LightningModule) -> tuple[Any, Any]:
        if not isinstance(module, TableSynthesis):
            raise MisconfigurationException(
                f"TableMonitor measures tables, but the run trains {type(module).__name__}: remove TableMonitor."
            )
        data = getattr(trainer, "datamodule", None)
        train = getattr(data, "train_table", None) if self.train is None else self.train
        test = getattr(data, "test_table", None) if self.test is None else self.test
        if train is None or (self.target is not None and test is None):
            raise MisconfigurationException(
                "TableMonitor compares with real rows: give it `train` and `test`, or fit with a data module that has "
                "`train_table` and `test_table`, such as Table."
            )
        if self.target is not None and test is not None and not len(test[next(iter(test))]):
            raise MisconfigurationException(
                "TableMonitor predicts the target of held-out rows, and there are none: set `holdout` of the data, "
                "give TableMonitor `test`, or remove `target`."
            )
        if self.target is not None and self.target not in train:
            raise MisconfigurationException(
                f"TableMonitor: there is no column {self.target!r}; the table has {', '.join(map(str, train))}."
            )
        return train, test

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a table, measure it, and log what was measured; keep it in a fit."""
        if trainer.sanity_checking:
            return
        train, test = self._tables(trainer, pl_module)
        module: Any = pl_module
        discrete = [column["name"] for column in module.encoder.columns if "categories" in column]
        with module.noise.of("table"):
            fake = module.synthesize(len(train[next(iter(train))]))
        marginals = marginal_distances(train, fake, discrete)
        values = {"marginals": sum(marginals.values()) / len(marginals)}
        if len(marginals) > 1:
            values["correlations"] = correlation_difference(train, fake, discrete)
        if self.target is not None:
            values["efficacy"] = efficacy(train, test, fake, self.target, discrete).ratio
        for name, value in values.items():
            module.log(f"{self.name}/{name}", value, prog_bar=True, rank_zero_only=False, sync_dist=True)
        if trainer.state.fn == "fit":
            self.history.append({"step": trainer.global_step} | values)

    on_test_epoch_end = on_validation_epoch_end
