"""Types shared by the package: players, trees of tensors, and the samples and logits of one player's step.

A sample, a condition, features and logits are tensors or trees (dicts, lists, named tuples) of tensors. A tensor is the
tree with one leaf, and most GANs have no other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from lightning_gan_stability._checks import describe, is_number

if TYPE_CHECKING:
    from lightning_gan_stability.losses import AdversarialLoss

Player: TypeAlias = Literal["d", "g"]
PLAYERS: tuple[Player, Player] = ("d", "g")
NETWORKS: dict[Player, str] = {"d": "discriminator", "g": "generator"}

# trees, whose leaves are tensors with the batch first
Sample: TypeAlias = Any
Condition: TypeAlias = Any
Features: TypeAlias = Any
Logits: TypeAlias = Any  # a tensor, or one tensor for each discriminator in a dict or a list
Extras: TypeAlias = dict[str, Any]
Terms: TypeAlias = dict[str, Tensor]


# ---------- trees


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to the leaves of one tree, or to the leaves of several trees of the same structure.

    Example:
        >>> tree_map(torch.add, {"a": torch.ones(1)}, {"a": torch.ones(1)})
        {'a': tensor([2.])}
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    return None if tree is None else optree.tree_map(function, tree, *others)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in the order of sorted keys (of an ``OrderedDict`` in its own); None has no leaves.

    Example:
        >>> tree_leaves({"b": torch.ones(1), "a": None})
        [tensor([1.])]
    """
    return [tree] if isinstance(tree, Tensor) else optree.tree_leaves(tree)


def same_structure(tree: Any, other: Any) -> bool:
    """Whether two trees have the same keys, in any order, and lengths.

    Example:
        >>> same_structure([torch.ones(1)], [torch.ones(2)]), same_structure([torch.ones(1)], torch.ones(1))
        (True, False)
    """
    if isinstance(tree, Tensor) or isinstance(other, Tensor):
        return isinstance(tree, Tensor) and isinstance(other, Tensor)
    try:
        both = optree.tree_map(lambda _, part: optree.tree_is_leaf(part), tree, other)
    except ValueError:
        return False
    return all(tree_leaves(both))


def shapes(tree: Any, start: int = 1) -> Any:
    """The shape of each leaf from a dimension on, as a tree of tuples for comparisons and messages.

    Example:
        >>> shapes({"audio": torch.zeros(4, 1, 80)})
        {'audio': (1, 80)}
    """
    return tree_map(lambda leaf: tuple(leaf.shape[start:]) if isinstance(leaf, Tensor) else leaf, tree)


def batch_size(tree: Any) -> int:
    """The first dimension that all leaves share.

    Raises:
        ValueError: if there are no leaves, leaves that are no tensors, or leaves of different lengths.

    Example:
        >>> batch_size({"a": torch.zeros(4, 1), "b": torch.zeros(4)})
        4
    """
    if isinstance(tree, Tensor) and tree.dim():
        return len(tree)
    leaves = tree_leaves(tree)
    sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else -1 for leaf in leaves}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(
            "All leaves must be tensors with one batch size as their first dimension, got "
            f"{', '.join(map(describe, leaves)) or 'none'}."
        )
    return sizes.pop()


def take_rows(tree: Any, start: int, stop: int) -> Any:
    """Some rows of a batch.

    Example:
        >>> take_rows({"a": torch.arange(4)}, 1, 3)
        {'a': tensor([1, 2])}
    """
    return tree_map(lambda leaf: leaf[start:stop], tree)


def detach(tree: Any) -> Any:
    """The tree without graphs; leaves that are no tensors stay as they are.

    Example:
        >>> detach([torch.ones(1, requires_grad=True)])
        [tensor([1.])]
    """
    if isinstance(tree, Tensor):
        return _detached_leaf(tree)
    return {} if isinstance(tree, dict) and not tree else tree_map(_detached_leaf, tree)  # most extras are empty


def _detached_leaf(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def clone(tree: Any) -> Any:
    """The tree in memory of its own; leaves that are no tensors stay as they are.

    Example:
        >>> clone({"loss": torch.ones(1), "n": 3})
        {'loss': tensor([1.]), 'n': 3}
    """
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def differentiable(tree: Any) -> Any:
    """The leaves detached, as leaves of a new graph that require grad.

    Example:
        >>> differentiable(torch.ones(1)).requires_grad
        True
    """
    return tree_map(lambda leaf: leaf.detach().requires_grad_(), tree)


# ---------- logits of several discriminators


def entries(logits: Logits) -> dict[str, Tensor]:
    """The logits of each discriminator by its name; a single one has the name "".

    Example:
        >>> entries([torch.zeros(2), torch.ones(2)])
        {'0': tensor([0., 0.]), '1': tensor([1., 1.])}
    """
    if isinstance(logits, Tensor):
        return {"": logits}
    named = logits.items() if isinstance(logits, Mapping) else enumerate(logits)
    return {str(name): entry for name, entry in named}


class Pair(NamedTuple):
    """The real and the fake logits of one discriminator."""

    name: str
    real: Tensor
    fake: Tensor


# ---------- samples and logits of a player's step


@dataclass(slots=True)
class GANOutputs:
    """Samples and logits of one (micro-)batch in one player's step.

    Attributes:
        real: real samples (n, ...).
        fake: generated samples (n, ...).
        real_logits: (n,), or (n, patches), for each discriminator; (n / m,) for packs of m samples; None if the player
            does not need them.
        fake_logits: like ``real_logits``, for generated samples.
        latents: (n, latent_dim), or None for a generator without latents.
        condition: the condition of both networks, or None.
        extras: the values that :meth:`GANModule.generate` returned beside the sample.
        real_features: the features that :meth:`GANModule.discriminate` returned beside the logits of real samples.
        fake_features: the same for generated samples.
        fake_condition: the condition of the generated samples, if it is another one, as with a pool.
        real_activations: the outputs of watched layers of the discriminator for real samples, by their names.
        fake_activations: the same for generated samples.
        real_augmented: the real samples as the discriminator saw them, after augmentations.
        fake_augmented: the same for generated samples.

    Example:
        >>> outputs = GANOutputs(torch.ones(2, 1), torch.zeros(2, 1), fake_logits=torch.zeros(2))
        >>> outputs.replace(real_logits=torch.ones(2)).pairs()
        [Pair(name='', real=tensor([1., 1.]), fake=tensor([0., 0.]))]
    """

    real: Sample
    fake: Sample
    real_logits: Logits | None = None
    fake_logits: Logits | None = None
    latents: Tensor | None = None
    condition: Condition = None
    extras: Extras = field(default_factory=dict)
    real_features: Features = None
    fake_features: Features = None
    fake_condition: Condition = None
    real_activations: dict[str, Any] = field(default_factory=dict)
    fake_activations: dict[str, Any] = field(default_factory=dict)
    real_augmented: Sample = None
    fake_augmented: Sample = None

    def __post_init__(self) -> None:
        """Use one condition for both kinds of samples, unless there are two."""
        if self.fake_condition is None:
            self.fake_condition = self.condition

    def replace(self, **changes: Any) -> GANOutputs:
        """A copy with other values of some attributes."""
        return dataclasses.replace(self, **changes)

    def pairs(self) -> list[Pair]:
        """The logits of each discriminator.

        Raises:
            ValueError: if there are no real or no fake logits, or if they are of different discriminators.
        """
        if self.real_logits is None or self.fake_logits is None:
            side = "real" if self.real_logits is None else "fake"
            raise ValueError(
                f"These outputs have no {side} logits: in the generator's step they exist only for losses and "
                "regularizers with `needs_real`; `module.judge(outputs)` adds them."
            )
        real, fake = entries(self.real_logits), entries(self.fake_logits)
        if real.keys() != fake.keys():
            raise ValueError(
                f"`discriminate` returned logits {[*real]} for real samples and {[*fake]} for generated ones: it must "
                "return the same ones on every call."
            )
        return [Pair(name, real[name], fake[name]) for name in real]


def at_path(outputs: GANOutputs, path: str, asker: str) -> Any:
    """The tensor, or tree of tensors, at a dotted path of attributes, keys and numbers.

    Args:
        outputs: where to look.
        path: ``"fake"``, ``"real"``, ``"condition"``, ``"extras.<key>"``, and further keys behind dots.
        asker: name of the caller, for the message.

    Raises:
        ValueError: if there is nothing at the path, or something that is not a tensor.

    Example:
        >>> at_path(GANOutputs(None, None, extras={"cycle": {"a": torch.ones(1)}}), "extras.cycle.a", "An example")
        tensor([1.])
    """
    found: Any = outputs
    for key in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, Sequence) and key.isdigit():
            found = found[int(key)] if int(key) < len(found) else None
        else:
            found = getattr(found, key, None)
        if found is None:
            raise ValueError(
                f"{asker} compares `{path}`, but there is no {key!r}: a path starts with 'fake', 'real', "
                "'condition' or 'extras.<key>'."
            )
    leaves = tree_leaves(found)
    other = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if other is not None or not leaves:
        raise ValueError(
            f"{asker} compares `{path}`, where there is {describe(found if other is None else other)}: a path must end "
            "in a tensor, or in a dict, list or other tree of tensors."
        )
    return found


def detached(outputs: GANOutputs) -> GANOutputs:
    """The outputs without graphs.

    Example:
        >>> detached(GANOutputs(torch.ones(1, requires_grad=True), torch.ones(1))).real.requires_grad
        False
    """
    return GANOutputs(**{name: detach(getattr(outputs, name)) for name in _FIELDS})


# activations and augmented samples are only for penalties, which are computed before outputs are stored
_FIELDS = tuple(f.name for f in dataclasses.fields(GANOutputs) if not f.name.endswith(("_activations", "_augmented")))


@dataclass(slots=True)
class StepRecord:
    """What happened on one batch, for callbacks and loggers; a GANModule's ``last_step``.

    Attributes:
        iteration: the module's iteration before the step.
        visible: loggers or the progress bar use this step's values.
        finished: the step is over; False during it, and after an error in it.
        moved: the players whose optimizers have stepped.
        pairs: the real and fake logits of the discriminator's step, for each discriminator; empty if there was none.
        terms: the terms of each player's loss: ``"adversarial"``, auxiliary losses, and penalties with their weight.
        gradient_norms: the L2 norm of each player's gradient before clipping.
        values: the last value of each logged quantity by its key; for a lazy penalty that of an earlier step.

    Example:
        >>> from lightning_gan_stability import MLP, GANModule
        >>> GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).last_step.moved
        set()
    """

    iteration: int = 0
    visible: bool = False
    finished: bool = True
    moved: set[Player] = field(default_factory=set)
    pairs: list[Pair] = field(default_factory=list)
    terms: dict[Player, Terms] = field(default_factory=lambda: {"d": {}, "g": {}})
    gradient_norms: dict[Player, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, player: Player, outputs: GANOutputs, terms: Terms) -> None:
        """Store the logits of a player's step, without graphs, and the terms of its loss."""
        self.terms[player] = self.terms[player] | terms
        for name, value in terms.items():
            self.values[f"{player}/{name}"] = value
        if player == "d" and outputs.fake_logits is not None:
            self.pairs = outputs.pairs()

    def add_logits(self, loss: AdversarialLoss) -> None:
        """Store the means of logits and the discriminator's accuracy."""
        rows = {}
        for name, real, fake in self.pairs:
            rows[name] = {"real_logit": real.mean(), "fake_logit": fake.mean(), "accuracy": loss.accuracy(real, fake)}
        if len(rows) > 1:
            for name, row in rows.items():
                self.values |= {f"d/{key}/{name}": value for key, value in row.items()}
        for key in ("real_logit", "fake_logit", "accuracy"):
            column = [row[key] for row in rows.values()]
            self.values[f"d/{key}"] = column[0] if len(column) == 1 else torch.stack(column).mean()


def concatenate(parts: Sequence[GANOutputs], shares: Sequence[float]) -> GANOutputs:
    """The outputs of a full batch from those of its micro-batches, without graphs.

    Args:
        parts: outputs of the micro-batches, in order.
        shares: the share of the batch's samples in each of them.

    Raises:
        ValueError: if extras or features are neither scalars, which are averaged, nor have one row for each sample.

    Example:
        >>> part = GANOutputs(torch.zeros(2, 1), torch.ones(2, 1), extras={"loss": torch.tensor(3.0)})
        >>> whole = concatenate([part, part], [0.5, 0.5])
        >>> whole.real.shape, whole.extras
        (torch.Size([4, 1]), {'loss': tensor(3.)})
    """
    if len(parts) == 1:
        return detached(parts[0])
    columns = {name: [detach(getattr(part, name)) for part in parts] for name in _FIELDS}
    sizes = [batch_size(real) for real in columns["real"]]
    others = {name: columns.pop(name) for name in ("extras", "real_features", "fake_features")}
    whole = {name: tree_map(lambda *leaves: torch.cat(leaves), *column) for name, column in columns.items()}
    whole |= {
        name: tree_map(lambda *leaves: _whole_extra(leaves, sizes, shares), *column) for name, column in others.items()
    }
    return GANOutputs(**whole)


def _whole_extra(leaves: Sequence[Any], sizes: Sequence[int], shares: Sequence[float]) -> Any:
    if all(is_number(leaf) or (isinstance(leaf, Tensor) and leaf.dim() == 0) for leaf in leaves):
        return sum(share * leaf for leaf, share in zip(leaves, shares, strict=True))
    if all(isinstance(leaf, Tensor) and len(leaf) == size for leaf, size in zip(leaves, sizes, strict=True)):
        return torch.cat(list(leaves))
    raise ValueError(
        "With `accumulate`, what `generate` and `discriminate` return beside samples and logits must be scalars or "
        f"have one row for each sample, got {describe(leaves[0])} in a micro-batch of {sizes[0]}."
    )


class Unpacked(NamedTuple):
    """A batch, or some of its rows, after :meth:`GANModule.unpack`."""

    real: Sample
    condition: Condition


def micro_batches(batch: Unpacked, parts: int, pack: int = 1) -> Iterator[tuple[Unpacked, int, int]]:
    """Split a batch into parts of nearly equal size, each with its first row and the row after its last.

    Samples of a pack stay together; samples at the end that do not fill a pack are left out.

    Args:
        batch: the batch to split.
        parts: largest number of parts; the largest part has ⌈n / parts⌉ samples.
        pack: number of samples in a pack.

    Example:
        >>> [(start, stop) for _, start, stop in micro_batches(Unpacked(torch.zeros(7), None), parts=3, pack=2)]
        [(0, 2), (2, 4), (4, 6)]
    """
    packs = batch_size(batch.real) // pack
    parts = math.ceil(packs / math.ceil(packs / parts))  # as few as there can be of that size
    for part in range(parts):
        start, stop = (pack * math.ceil(packs * i / parts) for i in (part, part + 1))
        yield Unpacked(*(take_rows(tree, start, stop) for tree in batch)), start, stop
