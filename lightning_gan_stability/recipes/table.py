"""TableSynthesis: generates tables of continuous and discrete columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_integer, check_number, describe
from lightning_gan_stability.layers import Packed, evaluation
from lightning_gan_stability.losses import AdversarialLoss, Wasserstein
from lightning_gan_stability.outputs import Condition, Extras, GANOutputs, Player, Sample, Terms
from lightning_gan_stability.recipes.base import Recipe
from lightning_gan_stability.tables import TableEncoder, is_description

NetworkMaker: TypeAlias = Callable[[int, int], nn.Module]


class TableSynthesis(Recipe):
    """CTGAN: generates rows of a table, conditioned on the category of one discrete column.

    L_D = E D(x̂, c) − E D(x, c), of packs of rows; L_G = −E D(x̂, c) + E H(c, p), where H is the cross entropy of the
    category in the condition and of the generator's logits p for its column. The generator's scalars go through tanh,
    and its categories through a Gumbel-softmax at a temperature of 0.2. Use it with ``GradientPenalty(10.0)`` and
    ``Alternating(real_batches="split")``, since the paper draws new conditions for the generator's step.

    "Modeling Tabular Data using Conditional GAN", https://arxiv.org/abs/1907.00503. As in the authors' code, the
    penalty also differentiates by the condition, and real rows are compared with generated ones of other conditions.
    Samples are rows and their conditions, (n, width + condition_width); :meth:`synthesize` returns a table.

    A batch is (rows, conditions) of :class:`~lightning_gan_stability.Table`.

    Args:
        generator: a module that maps latents and condition (n, latent_dim + condition_width) to (n, width); or a
            function that makes one from these two widths, since they depend on the data.
        discriminator: a module that maps ``pac`` rows with their conditions (n, pac · (width + condition_width)) to
            (n, 1); or a function that makes one from these two widths.
        columns: the description of the table, ``Table(...).columns``; None under LightningCLI: that of the data.
            Checkpoints store it. Loggers do not get it, because it contains values of the table.
        latent_dim: length of the standard normal latent vector of a row.
        pac: number of rows that the discriminator judges together (PacGAN, https://arxiv.org/abs/1712.04086).
        temperature: temperature of the Gumbel-softmax.
        loss: None: :class:`~lightning_gan_stability.Wasserstein`.
        d_weight: factor of the discriminator's loss.
        g_weight: factor of the generator's adversarial loss.
        condition_weight: factor of the cross entropy.
        losses: names of losses that the generator returns besides rows, with their weights; None: none.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Attributes:
        encoder: the :class:`~lightning_gan_stability.tables.TableEncoder` of the columns.

    Raises:
        ValueError: if an argument has a bad value, or if a batch has another form.
        MisconfigurationException: if the data module of a run has different ``columns``.

    Example:
        >>> columns = [{"name": "age", "means": [40.0], "stds": [9.0]}, {"name": "smokes", "categories": ["no", "yes"]}]
        >>> table = TableSynthesis(nn.Linear, nn.Linear, columns, latent_dim=4, pac=2)
        >>> sorted(table.synthesize(5))
        ['age', 'smokes']
    """

    def __init__(
        self,
        generator: nn.Module | NetworkMaker,
        discriminator: nn.Module | NetworkMaker,
        columns: Sequence[Mapping[str, Any]] | None = None,
        latent_dim: int = 128,
        pac: int = 10,
        temperature: float = 0.2,
        loss: AdversarialLoss | None = None,
        d_weight: float = 1.0,
        g_weight: float = 1.0,
        condition_weight: float = 1.0,
        losses: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if columns is None:
            raise ValueError(
                "`columns` must describe the table: `Table(...).columns`, which LightningCLI takes from the data if "
                "they have `columns`."
            )
        encoder = TableEncoder(columns)
        condition_width = encoder.condition_width
        generator = _made(
            "generator", generator, check_integer("latent_dim", latent_dim) + condition_width, encoder.width
        )
        packed = check_integer("pac", pac) * (encoder.width + condition_width)
        judge = Packed(_made("discriminator", discriminator, packed, 1), pac)
        super().__init__(
            generator, judge, loss or Wasserstein(), d_weight, g_weight, losses, latent_dim=latent_dim, **kwargs
        )
        self.encoder = encoder
        self.temperature = check_number("temperature", temperature, positive=True)
        self.condition_weight = check_number("condition_weight", condition_weight)

    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Store plain arguments as :class:`~lightning_gan_stability.GANModule` does, and the columns as a list."""
        current = inspect.currentframe()
        super().save_hyperparameters(*args, ignore=ignore, frame=frame or (current and current.f_back), logger=logger)
        if is_description(columns := self.hparams.get("columns")):
            self.hparams["columns"] = [dict(column) for column in columns]  # LightningCLI gives what hides its values

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters for loggers: all but the columns, which contain values of the table."""
        return AttributeDict({name: value for name, value in super().hparams_initial.items() if name != "columns"})

    def configure_callbacks(self) -> list[Callback]:
        """Refuse data of another table, even if its rows have the same width."""
        columns = getattr(getattr(self.trainer, "datamodule", None), "columns", None)
        if is_description(columns) and TableEncoder(columns).columns != self.encoder.columns:
            raise MisconfigurationException(
                "TableSynthesis and the data module have different `columns`: make the module with those of this data, "
                "or the data of the table, with the `holdout` and `seed`, that the module is for."
            )
        return super().configure_callbacks()

    def get_extra_state(self) -> dict[str, Any]:
        """The extra state of a checkpoint, with the columns."""
        return super().get_extra_state() | {"columns": self.encoder.columns}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as :class:`~lightning_gan_stability.GANModule` does.

        Raises:
            ValueError: if ``strict``, and the state belongs to another table.
        """
        columns = (state_dict.get("_extra_state") or {}).get("columns", self.encoder.columns)
        if strict and columns != self.encoder.columns:
            raise ValueError(
                "This state is of a module with other `columns`: make the module with those of its table, as "
                "`load_from_checkpoint` does, or load its weights all the same with strict=False."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """Rows with their conditions, and the conditions of generated rows: those of the previous rows."""
        encoder = self.encoder
        widths = (encoder.width, encoder.condition_width)
        parts = [*batch] if isinstance(batch, list | tuple) else [batch]
        if [part.shape[1:] if isinstance(part, Tensor) else None for part in parts] != [(width,) for width in widths]:
            raise ValueError(
                f"A batch of TableSynthesis must be encoded rows (n, {widths[0]}) and conditions (n, {widths[1]}), got "
                f"{', '.join(map(describe, parts))}: `Table` makes such batches, and its `columns` are those of the "
                "module."
            )
        rows, condition = parts
        return torch.cat([rows, condition], 1), condition.roll(1, 0)

    def generate(
        self, network: nn.Module, n: int, condition: Condition, latents: Tensor | None
    ) -> tuple[Sample, Extras]:
        """Rows, and the logits that they are computed from."""
        assert latents is not None
        out = network(torch.cat([latents, condition], 1))
        logits, extras = out if isinstance(out, tuple) else (out, {})
        if not isinstance(logits, Tensor) or logits.shape != (n, self.encoder.width):
            raise ValueError(
                f"The generator of TableSynthesis must return rows ({n}, {self.encoder.width}), the width of encoded "
                f"rows, got {describe(logits)}."
            )
        return torch.cat([self.activate(logits), condition], 1), {"logits": logits, **extras}

    def activate(self, logits: Tensor) -> Tensor:
        """Encoded rows (n, width) from the generator's outputs: tanh of scalars, Gumbel-softmax of categories."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a shorter type rounds 1 - ε to 1
        uniform = self.noise.rand(*logits.shape, dtype=logits.dtype).clamp_min(torch.finfo(logits.dtype).tiny)
        noisy = (logits - (-uniform.log()).log()) / self.temperature
        spans = self.encoder.spans
        parts = [(logits if s.kind == "scalar" else noisy)[:, s.start : s.end] for s in spans]
        made = [x.tanh() if s.kind == "scalar" else x.softmax(1) for x, s in zip(parts, spans, strict=True)]
        return torch.cat(made, 1)

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> Terms:
        """The cross entropy of the categories in the conditions."""
        terms = super().auxiliary_losses(player, outputs)
        if player == "d" or not self.encoder.condition_width:
            return terms
        logits, condition, total = outputs.extras["logits"], outputs.condition, outputs.condition.new_zeros(())
        discrete = [span for span in self.encoder.spans if span.discrete]
        for span, part in zip(discrete, self.encoder.condition_spans, strict=True):
            wanted = condition[:, part.start : part.end]
            losses = nn.functional.cross_entropy(logits[:, span.start : span.end], wanted.argmax(1), reduction="none")
            total = total + (wanted.sum(1) * losses).sum()
        return terms | {"condition": self.condition_weight * total / len(condition)}

    @torch.no_grad()
    def synthesize(self, n: int, condition: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Generate a table, with the average of the generator if there is one, in eval mode.

        Args:
            n: number of rows.
            condition: ``{column: category}`` to ask for in all rows; None: draw for each row a discrete column, and one
                of its categories by its frequency in the data.

        Returns:
            A NumPy array (n,) for each column, in the units of the data; ``pandas.DataFrame(table)`` makes a data
            frame.

        Raises:
            ValueError: if there is no such column or category.
        """
        if condition is None:
            given = self.encoder.draw_conditions(self.noise.rand(n, 2, dtype=torch.float64).cpu())
        else:
            given = self.encoder.condition(n, condition)
        with evaluation(self):
            rows = self.sample(n, given)
        return self.encoder.decode(rows[:, : self.encoder.width].float().cpu())


def _made(name: str, network: Any, inputs: int, outputs: int) -> nn.Module:
    """The network, or the one that the given function makes."""
    made = network if isinstance(network, nn.Module) or not callable(network) else network(inputs, outputs)
    check(isinstance(made, nn.Module), name, "a module, or what makes one from two widths", made)
    return made  # type: ignore[no-any-return]
