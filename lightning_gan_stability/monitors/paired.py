"""PairedMonitor: measures generated samples against their targets, and the use of codebooks, in validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_gan_stability._checks import check, check_type, describe
from lightning_gan_stability.callback import Cadence, GANCallback, as_gan
from lightning_gan_stability.outcome import Outcome, courses_of
from lightning_gan_stability.outputs import at_path

Inputs = Mapping[str, Sequence[str]]


class PairedMonitor(GANCallback):
    """Measures generated samples against their targets in every validation, with any metric of torchmetrics.

    For vocoders, codecs, tokenizers, super-resolution and translation, where each sample has a target, as opposed to
    :class:`~lightning_gan_stability.QualityMonitor`. Samples come from the average of the generator if there is one,
    and from the same noise each time. Values go to the loggers and to ``trainer.callback_metrics`` as
    ``quality/<metric>``, so that ``ModelCheckpoint(monitor="quality/psnr", mode="max")`` and ``EarlyStopping`` work. A
    metric is updated with (sample, target) of each validation batch, or with the values that ``inputs`` names:

    * ``PeakSignalNoiseRatio(data_range=(-1.0, 1.0))`` and ``StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))``
      of ``torchmetrics.image``; ``LearnedPerceptualImagePatchSimilarity``, which downloads its weights.
    * ``ScaleInvariantSignalDistortionRatio()`` of ``torchmetrics.audio``, and
      :class:`~lightning_gan_stability.metrics.LogMelDistance`.
    * :class:`~lightning_gan_stability.metrics.CodebookUsage` and
      :class:`~lightning_gan_stability.metrics.CodebookPerplexity`, with ``inputs={"perplexity": ["extras.codes"]}``.

    If there are several validation loaders, the first one is measured.

    Args:
        metrics: the metrics by the names under which they are logged.
        inputs: for the name of a metric, the paths of the values to update it with: ``"fake"``, ``"real"``,
            ``"condition"``, ``"extras.<key>"``, with further keys behind dots, such as ``["extras.cycle.a",
            "real.a"]``. None, or a metric that is not named: ``["fake", "real"]``.
        name: prefix of the log's keys.

    Raises:
        ValueError: if an argument has a bad value; in validation, if there is nothing at a path, or if a metric does
            not accept the values there.

    Example:
        >>> from torchmetrics.image import PeakSignalNoiseRatio
        >>> monitor = PairedMonitor({"psnr": PeakSignalNoiseRatio(data_range=(-1.0, 1.0))})
        >>> monitor.inputs
        {'psnr': ['fake', 'real']}
    """

    rolled_back = False

    history: list[dict[str, float]]

    def __init__(self, metrics: dict[str, Metric], inputs: Inputs | None = None, name: str = "quality") -> None:
        super().__init__()
        known = isinstance(metrics, Mapping) and bool(metrics) and all(isinstance(m, Metric) for m in metrics.values())
        self.metrics = dict(check(known, "metrics", "a dict of names and metrics of torchmetrics", metrics))
        known = not {*(inputs or {})} - {*self.metrics}
        check(known, "inputs", f"paths by the names of metrics, which are {', '.join(self.metrics)}", inputs)
        lists = all(_are_paths(paths) for paths in (inputs or {}).values())
        check(lists, "inputs", "lists of paths by the names of metrics", inputs)
        self.inputs = {metric: [*(inputs or {}).get(metric, ("fake", "real"))] for metric in self.metrics}
        self.name = check_type("name", name, str)
        self.add_state("history", [])  # measurements in a fit, with their ``step``

    @property
    def state_key(self) -> str:
        """Tells callbacks of different metrics apart."""
        return f"{type(self).__qualname__}({self.name}: {', '.join(self.metrics)})"

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """A key for each metric, updated in every validation."""
        return {f"{self.name}/{name}": "validation" for name in self.metrics if will_validate(trainer)}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing will be measured."""
        super().on_fit_start(trainer, pl_module)
        if not trainer.enable_validation:
            warn_without_validation(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the validation loader is empty."""
        super().on_train_start(trainer, pl_module)
        if validates_nothing(trainer):
            warn_without_validation(self)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        for metric in self.metrics.values():
            metric.to(pl_module.device)
            metric.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate samples for a batch, and update the metrics."""
        module: Any = as_gan(pl_module)
        if dataloader_idx:
            return
        with torch.no_grad(), module.noise.of("paired", dataloader_idx, batch_idx):
            seen = module.compute_samples("d", module.taken_apart(batch), ())
            for name, metric in self.metrics.items():
                given = [_float(at_path(seen, path, f"PairedMonitor's {name!r}")) for path in self.inputs[name]]
                try:
                    metric.update(*given)
                except (ValueError, RuntimeError, TypeError, AssertionError) as error:
                    got = ", ".join(f"`{p}` {describe(x)}" for p, x in zip(self.inputs[name], given, strict=True))
                    raise ValueError(
                        f"PairedMonitor: {type(metric).__name__} under the name {name!r} does not take {got}: {error}"
                    ) from error

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics; in a fit, add them to the history."""
        if trainer.sanity_checking:
            return
        values = {name: metric.compute().float() for name, metric in self.metrics.items()}
        named = {f"{self.name}/{name}": value for name, value in values.items()}
        pl_module.log_dict(named, prog_bar=True, sync_dist=True)
        if trainer.state.fn == "fit":
            self.history.append({"step": trainer.global_step} | {name: x.item() for name, x in values.items()})

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def outcome(self, trainer: Trainer) -> Outcome:
        """The history of each metric."""
        higher = {name: metric.higher_is_better for name, metric in self.metrics.items()}
        lower = {name: None if better is None else not better for name, better in higher.items()}
        return Outcome(courses_of(self.name, self.history, lower))


def validates_nothing(trainer: Trainer) -> bool:
    """Whether there are validation loaders, but none has batches."""
    return trainer.enable_validation and trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)


def will_validate(trainer: Trainer) -> bool:
    """Whether there will be validation, as far as known; an empty loader counts until the first batch."""
    return bool(trainer.enable_validation) and not validates_nothing(trainer)


def warn_without_validation(monitor: GANCallback) -> None:
    """Warn that a monitor will measure nothing."""
    name = type(monitor).__name__
    rank_zero_warn(
        f"{name} measures in validation, and this run has none: give it a validation loader that is not empty (data "
        f"modules of the package have one with `holdout` > 0), or remove {name}."
    )


def _are_paths(paths: Any) -> bool:
    return isinstance(paths, list | tuple) and len(paths) > 0 and all(isinstance(path, str) for path in paths)


def _float(value: Any) -> Any:
    """Convert tensors to full precision, in which metrics compute."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
