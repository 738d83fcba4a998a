"""Where values stop being finite: in the data, in weights, in a layer's forward pass, in a term, or in a gradient.

The engine asks after it has found a loss or a gradient that is not finite; before that nothing here costs anything. A
turn is taken once more, on its batch and with its noise, while hooks watch all layers, and leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_gan_stability._compat import NoExchange
from lightning_gan_stability.callback import GANCallback, Regularizer
from lightning_gan_stability.distributed import is_distributed
from lightning_gan_stability.noise import Randomness
from lightning_gan_stability.outputs import GANOutputs, Player, Terms, batch_size, tree_leaves, tree_map

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol

NAMED = 5  # of rows and names the message has so many, and the number of the others


class NotFinite(FloatingPointError):
    """A loss or a gradient of a player that is not finite; others' ``FloatingPointError`` is none of these."""


class Finding(NamedTuple):
    """What a second look has found, and what to do about it; None: the advice that is always right."""

    text: str
    advice: str | None = None
    of_term: bool = False  # all that the networks made is finite


class _Place(NamedTuple):
    """A finding about a layer, and the rows of a micro-batch in which it is not finite."""

    before: str
    rows: list[int]
    kind: str = ""
    after: str = ""
    advice: str | None = None

    def among(self, others: Iterable[_Place], total: int) -> Finding:
        """What is to be said, with the rows of the same place in other micro-batches."""
        mine = self.before, self.kind, self.after, self.advice
        same = [other for other in others if (other.before, other.kind, other.after, other.advice) == mine]
        rows = sorted({row for place in (self, *same) for row in place.rows})
        return Finding(f"{self.before}{_in_rows(rows, total, self.kind)}{self.after}.", self.advice)


@dataclass(slots=True)
class Turn:
    """What a player's gradient was taken of.

    Attributes:
        player: whose turn it was.
        batch: what it was taken on.
        start: where randomness stood.
        moves: how many steps optimizers had taken before.
        adversarial: whether the generator's loss had its adversarial term.
        own: the gradient was of an update rule's own objective, which is not taken again.
        penalty: the one whose separate step it was.
    """

    player: Player
    batch: Any
    start: Randomness
    moves: int
    adversarial: bool
    own: bool = False
    penalty: Regularizer | None = None


@dataclass(slots=True)
class Replay:
    """How a turn is taken again.

    Attributes:
        player: whose turn.
        parts: gives the micro-batches, under their noise.
        see: what the player sees of a micro-batch.
        weigh: the terms of its loss, times their factors and with graphs, by name; and their values without.
        penalties: the regularizers among the terms.
        parameters: by which gradients are taken, by name.
    """

    player: Player
    parts: Callable[[], Iterable[Any]]
    see: Callable[[Any], GANOutputs]
    weigh: Callable[[GANOutputs], tuple[Terms, Terms]]
    penalties: dict[str, Regularizer]
    parameters: dict[str, nn.Parameter]


# ---------- values


def is_finite(tree: Any) -> bool:
    """Whether all floating point values of a tree are finite; what cannot be looked at counts as finite.

    Example:
        >>> is_finite({"a": torch.ones(2), "b": None}), is_finite([torch.tensor(float("nan"))])
        (True, False)
    """
    return all(_is_finite(leaf) for leaf in tree_leaves(tree))


def _is_finite(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return True
    values = leaf.detach()
    try:
        return bool((values.to_local() if isinstance(values, DTensor) else values).isfinite().all())
    except RuntimeError:  # values under `vmap` cannot be asked
        return True


def _may_enter(tree: Any) -> bool:
    """Whether what enters a layer is finite, but for masks of 0 and -∞, as attention has them."""

    return all(_is_finite(leaf) or _is_mask(leaf) for leaf in tree_leaves(tree))


def _is_mask(leaf: Tensor) -> bool:
    return not leaf.is_complex() and bool(((leaf == 0) | leaf.isneginf()).all())


def broken_rows(tree: Any, n: int) -> list[int]:
    """The rows of a batch of n in which values are not finite, as far as leaves have n rows.

    Example:
        >>> broken_rows(torch.tensor([[0.0], [float("inf")], [1.0]]), 3)
        [1]
    """
    found: set[int] = set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n and not _is_finite(leaf):
            found |= {*(~leaf.detach().isfinite()).reshape(n, -1).any(1).nonzero().flatten().tolist()}
    return sorted(found)


def listed(names: Sequence[object]) -> str:
    """Names as a sentence has them: some of them, and the number of the others.

    Example:
        >>> listed([3]), listed([3, 7]), listed(range(8))
        ('3', '3 and 7', '0, 1, 2, 3, 4 and 3 more')
    """
    shown = [str(name) for name in names[:NAMED]]
    rest = len(names) - len(shown)
    last = f"{rest} more" if rest else shown.pop()
    return f"{', '.join(shown)} and {last}" if shown else last


def _in_rows(rows: Sequence[int], n: int, kind: str = "") -> str:
    """Where in a batch, behind a comma; nothing if nobody knows."""
    kind = f"{kind} " if kind else ""
    if not rows:
        return ""
    if len(rows) == n:
        return f", in all {n} {kind}samples"
    return f", in {kind}sample{'s' * (len(rows) > 1)} {listed(rows)} of {n}"


# ---------- the data and the weights


def in_data(real: Any, condition: Any) -> Finding | None:
    """Real samples or conditions that are not finite.

    Example:
        >>> in_data({"audio": torch.tensor([0.0, float("nan")])}, None).text
        'The data are not finite: `real.audio`, in sample 1 of 2.'
    """
    found = []
    for name, tree in (("real", real), ("condition", condition)):
        if tree is None or is_finite(tree):
            continue
        for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
            if not (_is_finite(leaf) or _is_mask(leaf)):
                rows = _in_rows(broken_rows(leaf, len(leaf)), len(leaf))
                found.append(f"`{'.'.join(map(str, (name, *path)))}`{rows}")
    if not found:
        return None
    text = f"The data are not finite: {'; '.join(found[:NAMED])}."
    return Finding(text, "Repair these samples, or leave them out.")


def broken_weights(module: GANProtocol) -> list[str]:
    """The names of parameters that are not finite, but for those of the average."""
    parameters = module.named_parameters()
    return [name for name, p in parameters if not name.startswith("generator_ema.") and not _is_finite(p)]


def in_weights(module: GANProtocol) -> Finding | None:
    """Weights that were not finite before the step."""
    names = [f"`{name}`" for name in broken_weights(module)]
    if not names:
        return None
    return Finding(
        f"Weights are not finite already: {listed(names)}. They were loaded so, or a step along finite gradients was "
        "too large."
    )


def finite_so_far() -> Finding:
    """What is known before a turn is taken again, or where it cannot be.

    Example:
        >>> finite_so_far().text
        'The data and the weights are finite.'
    """
    others = " on this process: see the error of another one, too" if is_distributed() else ""
    return Finding(f"The data and the weights are finite{others}.")


def after_delay(module: GANProtocol) -> Finding:
    """What can be said after steps have been taken."""
    names = [f"`{name}`" for name in broken_weights(module)]
    weights = f", and weights are not finite by now: {listed(names)}" if names else ""
    return Finding(
        f"Steps have been taken since, because on {module.device.type} values are looked at when they are logged"
        f"{weights}. Go on from the last checkpoint with Trainer(log_every_n_steps=1), and the error will name the "
        "layer and the samples."
    )


# ---------- layers


@dataclass(slots=True, eq=False)
class Call:
    """One run of a layer.

    Attributes:
        layer: its name.
        kind: its class.
        parent: the run of the layer that it is a part of.
        number: how many runs of the layer there were before.
        mark: how many suspects there were when it began.
        may_enter: what has entered is finite.
        rows: of the batch, in which what it returns, or passes back, is not finite.
        dtype: of what is not finite.
        broken: the tensors that are not finite, of those that it returned.
        given: whether the gradients that come to what it returned are finite; None: none has come.
        broken_at: when the first gradient in it, or of what has entered, was not finite.
        masked: a later layer on the way back has made finite gradients of all that came to it.
        entered: how many tensors with a graph have entered.
    """

    layer: str
    kind: str
    parent: Call | None
    number: int
    mark: int
    may_enter: bool
    rows: list[int] = field(default_factory=list)
    dtype: torch.dtype | None = None
    broken: list[Tensor] = field(default_factory=list)
    given: bool | None = None
    broken_at: int | None = None
    masked: bool = False
    entered: int = 0

    def __str__(self) -> str:
        return f"`{self.layer}` ({self.kind})"

    def within(self) -> Iterator[Call]:
        """The runs that it is a part of."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


class LayerWatch:
    """Watches all layers of a module for values that are not finite, while it is entered.

    Args:
        module: whose layers.
        gradients: watch gradients too.

    Attributes:
        suspects: runs of layers that have returned what is not finite from what is, first ones first; without those
            of which nothing is left, as where a softmax takes -∞.

    Example:
        >>> class Log(nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> network = nn.Sequential(nn.Identity(), nn.Sequential(Log()), nn.Linear(1, 1))
        >>> watch = LayerWatch(network)
        >>> with watch.of(2):
        ...     _ = network(torch.tensor([[1.0], [-1.0]]))
        >>> str(watch.suspects[0]), watch.suspects[0].rows
        ('`1.0` (Log)', [1])
    """

    def __init__(self, module: nn.Module, gradients: bool = False) -> None:
        # wrappers of torch.compile are none of the user's layers
        self.layers = {name.replace("._orig_mod", ""): m for name, m in module.named_modules() if name}
        self.gradients = gradients

    @contextmanager
    def of(self, n: int) -> Iterator[None]:
        """Watch runs on a batch of n."""
        self.n, self.time, self.forward = n, 0, True
        self.suspects: list[Call] = []
        self.calls: list[Call] = []
        self.runs: Counter[str] = Counter()
        self.judged: Counter[str] = Counter()
        self._open: list[Call] = []
        handles: list[RemovableHandle] = []
        try:
            for name, layer in self.layers.items():
                handles.append(layer.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
                handles.append(layer.register_forward_hook(partial(self._after, name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.forward:
            return None  # of an activation checkpoint, which runs again on the way back
        parent = self._open[-1] if self._open else None
        entered = _may_enter((args, kwargs))
        call = Call(name, type(layer).__name__, parent, self.runs[name], len(self.suspects), entered)
        self.runs[name] += 1
        self.calls.append(call)
        self._open.append(call)
        if not self.gradients or not torch.is_grad_enabled():
            return None
        # tensors of the layer's own: others may pass gradients back to the same one
        return tree_map(partial(self._own, call), (args, kwargs))

    def _own(self, call: Call, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        call.entered += 1
        own = leaf.view_as(leaf)
        own.register_hook(partial(self._passed_back, call))  # type: ignore[no-untyped-call]
        return own

    def _after(self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.forward:
            return None
        call = self._open.pop()
        if is_finite(output):
            del self.suspects[call.mark :]
        elif call.may_enter and len(self.suspects) == call.mark:
            call.rows = broken_rows(output, self.n)
            output = tree_map(_with_graph, output)
            call.broken = [leaf for leaf in tree_leaves(output) if not _is_finite(leaf)]
            call.dtype = call.broken[0].dtype
            self.suspects.append(call)
        if self.gradients:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(partial(self._came, call))  # type: ignore[no-untyped-call]
        return output

    # ---------- gradients

    def _came(self, call: Call, gradient: Tensor) -> None:
        """Note a gradient that has come to what a layer returned."""
        self.time += 1
        finite = _is_finite(gradient)
        call.given = finite if call.given is None else call.given and finite
        if not finite:
            self._break(call.within())

    def _passed_back(self, call: Call, gradient: Tensor) -> None:
        """Note a gradient that a layer passes back."""
        self.time += 1
        if _is_finite(gradient):
            if call.given is False and call.entered == 1:
                for other in self.calls:
                    other.masked = other.masked or other.broken_at is not None
            return
        if not call.rows:
            call.rows = broken_rows(gradient, self.n)
        self._break([call, *call.within()])

    def _break(self, calls: Iterable[Call]) -> None:
        for call in calls:
            if call.broken_at is None or call.masked:
                call.broken_at, call.masked = self.time, False

    def forget(self) -> None:
        """Begin with other gradients."""
        for call in self.calls:
            call.given, call.broken_at, call.masked, call.rows = None, None, False, []

    def origin(self) -> Call | None:
        """The innermost run of a layer to which finite gradients came, and in which the first one is not finite."""
        found = [call for call in self.calls if call.given and call.broken_at is not None]
        return min(found, key=lambda call: (call.masked, call.broken_at, -len([*call.within()])), default=None)

    def origin_of(self, name: str) -> Call | None:
        """The run of a layer whose own parameter has a gradient that is not finite, from finite ones."""
        calls = [call for call in self.calls if call.layer == name.rpartition(".")[0] and call.given is not None]
        return calls[0] if calls and all(call.given for call in calls) else None

    # ---------- sides

    def side(self, call: Call, outputs: GANOutputs) -> str:
        """Which samples a layer has seen: the discriminator's see real ones first, and generated ones as often."""
        if _is_of(call, "generator"):
            return "generated"
        runs = self.judged[call.layer]
        if call.number >= runs or not _is_of(call, "discriminator"):
            return ""  # in a penalty, or elsewhere in the loss
        if outputs.real_logits is None or outputs.fake_logits is None:
            return "real" if outputs.fake_logits is None else "generated"
        return "" if runs % 2 else "real" if call.number < runs // 2 else "generated"


def _with_graph(leaf: Any) -> Any:
    """A tensor that is not finite, with a graph that tells what is made of it; others as they are."""
    if _is_finite(leaf) or leaf.requires_grad or not torch.is_grad_enabled():
        return leaf
    return leaf.detach().requires_grad_().clone()  # which may be changed in place


def _is_read(call: Call, terms: Iterable[Tensor], ends: set[Any]) -> bool:
    """Whether what a layer returned has come into a term by a way without ends, as far as graphs tell."""
    if not all(leaf.requires_grad for leaf in call.broken):
        return True
    sources = {leaf.grad_fn for leaf in call.broken}
    waiting, seen = [term.grad_fn for term in terms], set[Any]()
    while waiting:
        node = waiting.pop()
        if node in sources:
            return True
        if node is not None and node not in seen and node not in ends:
            seen.add(node)
            waiting += [other for other, _ in node.next_functions]
    return False


def _is_of(call: Call, network: str) -> bool:
    return call.layer.partition(".")[0] == network


# ---------- a turn


def in_turn(module: GANProtocol, turn: Replay) -> Finding:
    """Where a turn's values, or else its gradients, are not finite, when it is taken again.

    Args:
        module: whose turn.
        turn: how it is taken again.
    """
    total = sum(batch_size(part.real) for part in turn.parts())
    for gradients in (False, True):
        first, largest = 0, 0.0
        places: list[_Place] = []
        for part in turn.parts():
            watch = LayerWatch(module, gradients)  # type: ignore[arg-type]
            n = batch_size(part.real)
            with watch.of(n):
                outputs = turn.see(part)
                watch.judged = Counter(watch.runs)
                terms, values = turn.weigh(outputs)
                watch.forward = False
                found = _in_values(turn, watch, outputs, terms, values)
                if found is None and gradients:
                    found, size = _in_gradients(turn, watch, terms)
                    largest = max(largest, size)
            if isinstance(found, _Place):  # other micro-batches may break there, too
                rows = [first + row for row in found.rows]
                places.append(_Place(found.before, rows, found.kind, found.after, found.advice))
            elif found is not None and not places:
                return found
            first += n
        if places:
            return places[0].among(places, total)
    if is_distributed():
        return Finding("On this process's part of the batch all is finite: see the error of another process.")
    if largest > 1e18:  # whose square float32 does not have
        return Finding(f"Each gradient is finite, and too large for a norm: up to {largest:.0e}.")
    return Finding(
        f"Taken again, on the same {total} samples and with the same noise, all values and gradients are finite: "
        "operations that are not deterministic, or compiled ones, gave others."
    )


def _in_values(
    turn: Replay, watch: LayerWatch, outputs: GANOutputs, terms: Terms, values: Terms
) -> Finding | _Place | None:
    """A layer, or else a term, whose values are not finite."""
    broken = next((name for name, term in terms.items() if not _is_finite(term)), None)
    if broken is None:
        return None  # whatever a layer returned, nobody has used it
    suspects = watch.suspects
    if turn.player == "d" and is_finite(outputs.fake):  # a loss that the generator returns beside is not this player's
        suspects = [call for call in suspects if not _is_of(call, "generator")]
    broken_terms = [term for term in terms.values() if not _is_finite(term)]
    # samples that were made with a graph come to the discriminator without it
    detached = "generator" if turn.player == "d" else ""
    # all that enters a suspect is finite: what another one returned does not come into a term by way of it
    ends = {leaf.grad_fn for call in suspects for leaf in call.broken}
    suspects = [call for call in suspects if _is_of(call, detached) or _is_read(call, broken_terms, ends)]
    if suspects:
        call = suspects[0]
        half = call.dtype == torch.float16
        advice = "Use precision='bf16-mixed' or '32-true'." if half else None
        limit = " (float16 ends at 65504)" if half else ""
        before, side = f"First in the forward pass of {call}, whose inputs are finite", watch.side(call, outputs)
        return _Place(before, call.rows, side, limit, advice)
    key = f"`{turn.player}/{broken}`"
    if broken in values and _is_finite(values[broken]):
        return Finding(
            f"All layers return finite values, and {key} is finite: the factor that it is weighed by is not.",
            "Look at `adversarial_weight`, and at the callbacks that weigh terms.",
        )
    penalty = turn.penalties.get(broken)
    if penalty is not None and penalty.second_order:
        if not watch.gradients:
            return None  # the second look watches the gradient that it takes
        origin = watch.origin()
        if origin is not None:
            before = f"First in the gradient that {key} takes, in the backward pass of {origin}"
            return _Place(before, origin.rows, advice=_ROOT)
    if not is_finite((outputs.fake, outputs.real_logits, outputs.fake_logits)):
        return None  # what has come from the data
    layers = "All layers that come into it" if watch.suspects else "All layers"
    return Finding(f"{layers} return finite values: {key} itself is not finite.", _LOGARITHM, of_term=True)


def _in_gradients(turn: Replay, watch: LayerWatch, terms: Terms) -> tuple[Finding | _Place | None, float]:
    """The term whose gradient is not finite, and the layer that it begins in; and the largest value of gradients."""
    largest = 0.0
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        watch.forget()
        with torch.autocast(term.device.type, enabled=False):
            found = torch.autograd.grad(term, [*turn.parameters.values()], retain_graph=True, allow_unused=True)
        gradients = {key: g for key, g in zip(turn.parameters, found, strict=True) if g is not None}
        broken = [key for key, g in gradients.items() if not _is_finite(g)]
        if not broken:
            largest = max([largest, *(float(g.detach().abs().max()) for g in gradients.values() if g.numel())])
            continue
        return _broken_gradient(turn, watch, name, broken), largest
    return None, largest


def _broken_gradient(turn: Replay, watch: LayerWatch, name: str, broken: list[str]) -> Finding | _Place:
    key = f"`{turn.player}/{name}`"
    penalty = turn.penalties.get(name)
    if penalty is not None and penalty.second_order:
        # second derivatives come to a layer by other ways than through what it returned
        return Finding(f"All values are finite, and the gradient of {key} is not.", _ROOT)
    origin = watch.origin()
    if origin is not None:
        before = f"All values are finite, and the gradient of {key} is not: first in the backward pass of {origin}"
        return _Place(before, origin.rows, advice=_ROOT)
    owners = ((parameter, watch.origin_of(parameter)) for parameter in broken)
    parameter, owner = next(((p, call) for p, call in owners if call is not None), (None, None))
    if parameter is not None:
        text = f"All values are finite, and the gradient of {key} by `{parameter}` is not: first in {owner}."
        return Finding(text, _ROOT)
    text = f"All values are finite, and the gradient of {key} is not: first where the term is computed, in no layer."
    return Finding(text, _ROOT)


_ROOT = "Look there for a root or norm at 0, or a division by 0, and add a small ε: under the root, below the fraction."
_LOGARITHM = "Look there for a logarithm of 0, a root of a negative number, a division by 0, or a large `exp`."


# ---------- without a trace


@contextmanager
def untouched(module: GANProtocol, callbacks: Sequence[GANCallback]) -> Iterator[None]:
    """A look at a module that leaves what layers and callbacks keep as it is, but for tensors of layers.

    Attributes are put back; lists, dicts and sets, and the declared state of callbacks, are copies meanwhile.

    Args:
        module: whose layers.
        callbacks: of the run.
    """
    owners: list[Any] = [*module.modules(), *callbacks]
    before = [dict(vars(owner)) for owner in owners]
    for owner, attributes in zip(owners, before, strict=True):
        own = {name: value for name, value in attributes.items() if not name.startswith("_")}  # not torch's
        vars(owner).update({name: copy(value) for name, value in own.items() if isinstance(value, list | dict | set)})
    for callback in callbacks:
        # monitors, which are not rolled back, have no part in a turn; and much to copy
        for name, value in callback.state_dict().items() if callback.rolled_back else ():
            if name in vars(callback):
                setattr(callback, name, deepcopy(value))
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            now = vars(owner)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)


@contextmanager
def isolated(module: GANProtocol, callbacks: Sequence[GANCallback], turn: Turn) -> Iterator[None]:
    """A turn taken again, from where randomness stood, without a trace and without a word to other processes."""
    noise, adversarial = module.noise, module.adversarial
    with (
        torch.enable_grad(),
        untouched(module, callbacks),
        module.frozen_buffers(),
        module.loss_at_rest(),
        noise.replay(),  # puts back what the next one leaves
        noise.of_step(),
        noise.replay(turn.start),
        NoExchange() if is_distributed() else nullcontext(),  # type: ignore[no-untyped-call]
    ):
        module.adversarial = turn.adversarial
        try:
            yield
        finally:
            module.adversarial = adversarial
