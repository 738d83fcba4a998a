"""Runs a module's networks, and checks their inputs and outputs."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gan_stability._checks import describe
from lightning_gan_stability._compat import is_compiled, mark_dynamic
from lightning_gan_stability.layers import condition_parameter, parameter_dtype
from lightning_gan_stability.noise import Randomness
from lightning_gan_stability.outputs import (
    Condition,
    Extras,
    Features,
    Logits,
    Sample,
    batch_size,
    clone,
    shapes,
    tree_leaves,
    tree_map,
)

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol


def call_network(network: nn.Module, inputs: Any, condition: Condition) -> Any:
    """Run a network on inputs, and on a condition if its ``forward`` takes one.

    Raises:
        ValueError: if it needs a condition and there is none.

    Example:
        >>> call_network(nn.Identity(), torch.ones(1), condition=torch.tensor([3]))
        tensor([1.])
    """
    takes, needs = condition_parameter(network)
    if needs and condition is None:
        raise ValueError(f"{type(network).__name__} takes a condition (labels), but none was given.")
    return network(inputs, condition) if takes and condition is not None else network(inputs)


def logits_and_features(found: dict[str, Any] | list[Any]) -> Any:
    """Combine the results of several discriminators: their logits, or logits and features if they return both.

    Example:
        >>> logits_and_features({"a": (torch.zeros(1), [torch.ones(1)])})
        ({'a': tensor([0.])}, {'a': [tensor([1.])]})
    """
    if isinstance(found, list):
        return ([pair[0] for pair in found], [pair[1] for pair in found]) if all(map(_is_pair, found)) else found
    if not all(map(_is_pair, found.values())):
        return found
    return {name: pair[0] for name, pair in found.items()}, {name: pair[1] for name, pair in found.items()}


def check_samples(name: str, sample: Sample) -> int:
    """Check samples, all of whose leaves must be real floating-point tensors, and return their number.

    Raises:
        ValueError: if they are not, if there are none, or if the leaves disagree on their number.

    Example:
        >>> check_samples("Real samples", {"image": torch.zeros(4, 3), "audio": torch.zeros(4, 8)})
        4
    """
    if isinstance(sample, tuple) and not hasattr(sample, "_fields"):
        raise ValueError(f"{name} must be a tensor, or a dict, list or named tuple of tensors, got {describe(sample)}.")
    leaves = tree_leaves(sample)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{name} must be a tensor, or a tree of tensors, got {describe(leaf)}.")
        if not leaf.is_floating_point() or leaf.dim() == 0 or len(leaf) == 0:
            raise ValueError(
                f"{name} must be floating point (images in [-1, 1]), and at least one, got {describe(leaf)}. What is "
                "not belongs into the condition."
            )
    return len(leaves[0]) if len(leaves) == 1 else batch_size(sample)


def check_condition(condition: Condition, n: int) -> None:
    """Refuse a condition whose leaves are not tensors with one row per sample.

    Example:
        >>> check_condition([torch.zeros(3)], 2)
        Traceback (most recent call last):
        ValueError: `condition` must have 2 entries, one for each sample, got 3.
    """
    if condition is None:
        return
    for leaf in tree_leaves(condition):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            raise ValueError(
                f"`condition` must be a tensor, or a tree of tensors, with the batch first, got {describe(leaf)}."
            )
        if len(leaf) != n:
            raise ValueError(f"`condition` must have {n} entries, one for each sample, got {len(leaf)}.")


class NetworkRunner:
    """Calls a module's `generate` and `discriminate`, and explains errors of networks before the first step.

    Args:
        module: the GAN.
    """

    def __init__(self, module: GANProtocol) -> None:
        self.module = module
        self._entries: Any = ()  # the names of the discriminators whose logits there were; None: one tensor
        self._watched: Counter[str] = Counter()  # layers of the discriminator, and how many callbacks watch each
        self._hooks: dict[str, RemovableHandle] = {}  # of these layers
        self._seen: dict[str, list[Any]] = {}  # what they returned in the last pass

    def generate(self, n: int, condition: Condition, latents: Tensor | None) -> tuple[Sample, Extras]:
        """Samples of the current generator, and its extras."""
        module = self.module
        network = module.current_generator
        if is_compiled(network):
            self._prepare(latents)
        try:
            found = module.generate(network, n, condition, latents)
            sample, extras = found if _is_pair(found) else (found, {})
            if not isinstance(extras, dict):
                raise ValueError(f"`generate` must return a dict of extras beside the sample, got {describe(extras)}.")
            made = check_samples("The generator's samples", sample)
        except Exception as error:
            self._explain("generator", condition if latents is None else latents, error)
            raise
        if made != n:
            raise ValueError(f"The generator made {made} samples where {n} were asked for.")
        return self._kept(sample), self._kept(extras)

    def discriminate(
        self, sample: Sample, condition: Condition, randomness: Randomness | None = None
    ) -> tuple[Logits, Features, dict[str, Any], Sample]:
        """Logits (n,) or (n, patches) of each discriminator, features, outputs of watched layers, and its inputs.

        Args:
            sample: (n, ...); it is augmented in training.
            condition: the discriminator's condition.
            randomness: random state for the augmentation; None: the present one.
        """
        module = self.module
        augmented = sample
        if module.training:
            with nullcontext() if randomness is None else module.replay_randomness(randomness):
                augmented, condition = module.augment_samples(sample, condition)
        self._seen = {}
        network = module.discriminator
        if is_compiled(network):
            self._prepare(augmented)
        try:
            found = module.discriminate(network, augmented, condition)
            logits, features = found if _is_pair(found) else (found, None)
            if not isinstance(logits, Tensor) and not _are_entries(logits):
                raise ValueError(
                    "`discriminate` must return a tensor of logits, a dict or list of them, or (logits, features), got "
                    f"{describe(logits)}."
                )
        except Exception as error:
            self._explain("discriminator", augmented, error)
            raise
        if module.loss.judges_reconstructions:
            logits = self._reconstruction_errors(logits, augmented)
        activations = self._activations() if self._hooks else {}
        logits = self._checked_logits(logits, batch_size(augmented) // module.packing)
        return self._kept(logits), self._kept(features), self._kept(activations), augmented

    def _prepare(self, inputs: Any) -> None:
        """Announce a run of a compiled network; outside of training steps all sizes share a graph."""
        in_step = self.module.noise.in_step
        if not (in_step and self.module.has_static_shapes):
            tree_map(mark_dynamic, inputs)
        if not in_step and self.module.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def _kept(self, tree: Any) -> Any:
        """What outlives the next run of a network; of a training step, its record alone does."""
        return clone(tree) if self.module.replays_graphs and not self.module.noise.in_step else tree

    def _checked_logits(self, logits: Logits, n: int) -> Logits:
        """The logits of n samples or packs, of the same discriminators as before."""
        if isinstance(logits, Tensor):
            self._check_entries(None)
            return self._rows(logits, n)
        if isinstance(logits, Mapping):
            self._check_entries([*map(str, logits)])
            return {name: self._rows(entry, n) for name, entry in logits.items()}
        self._check_entries([*map(str, range(len(logits)))])
        return [self._rows(entry, n) for entry in logits]

    def watch(self, layers: Sequence[str]) -> Callable[[], None]:
        """Record outputs of the discriminator's layers; see :meth:`GANModule.watch_layers`."""
        discriminator = self.module.discriminator
        found = {name: layer for name, layer in discriminator.named_modules() if name}
        running = [name for name, layer in found.items() if _runs(layer)]
        names: list[str] = []
        for pattern in layers:
            if pattern in found and pattern not in running:
                raise MisconfigurationException(
                    f"The layer {pattern!r} of the discriminator is a {type(found[pattern]).__name__}, which holds "
                    f"layers and returns nothing: name those in it, such as {pattern + '.*'!r}."
                )
            matching = [name for name in running if fnmatch.fnmatchcase(name, pattern)]
            if not matching:
                raise MisconfigurationException(
                    f"The discriminator has no layer {pattern!r}; it has {', '.join(running)}."
                )
            names += [name for name in matching if name not in names]
        for name in names:
            if not self._watched[name]:
                self._hooks[name] = found[name].register_forward_hook(self._note(name))
        self._watched.update(names)

        def remove() -> None:
            self._watched.subtract(names)
            for name in names:
                if not self._watched[name]:
                    self._hooks.pop(name).remove()

        return remove

    def _note(self, name: str) -> Callable[..., None]:
        def note(layer: nn.Module, inputs: Any, output: Any) -> None:
            self._seen.setdefault(name, []).append(output)

        return note

    def _activations(self) -> dict[str, Any]:
        seen, self._seen = self._seen, {}
        found: dict[str, Any] = {}
        for name in self._hooks:
            outputs = seen.get(name)
            if not outputs:
                raise ValueError(f"The layer {name!r} of the discriminator is watched, but it did not run.")
            found[name] = outputs[0] if len(outputs) == 1 else outputs
        return found

    def _reconstruction_errors(self, output: Any, sample: Sample) -> Tensor:
        """The mean absolute error of each sample, if the discriminator reconstructs samples."""
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            raise ValueError(
                f"{type(self.module.loss).__name__} judges the reconstructions of one tensor by one discriminator, got "
                f"{describe(output)} of {describe(sample)}."
            )
        if output.shape != sample.shape:
            return output
        return (output - sample).abs().reshape(len(sample), -1).mean(1, keepdim=True)

    def _check_entries(self, names: list[str] | None) -> None:
        """Refuse logits of other discriminators than before."""
        if self._entries == ():
            self._entries = names
        elif names != self._entries and (names is None or self._entries is None or {*names} != {*self._entries}):
            now, before = (
                "one tensor of logits" if found is None else f"the logits of discriminators {', '.join(found)}"
                for found in (names, self._entries)
            )
            raise ValueError(
                f"`discriminate` returned {now}, and before {before}: it must return the same ones each time."
            )

    def _rows(self, logits: Tensor, n: int) -> Tensor:
        """The logits of n samples or packs, one or several in a row."""
        if logits.dim() == 0 or len(logits) != n:
            pack = self.module.packing
            per = "sample" if pack == 1 else f"pack of {pack} samples"
            raise ValueError(
                f"The discriminator must return one logit or more per {per}: expected shape ({n},) or "
                f"({n}, patches), got {tuple(logits.shape)}."
            )
        if logits.dim() == 1:
            return logits
        return logits.reshape(n) if logits.numel() == n else logits.reshape(n, -1)

    def _explain(self, name: str, inputs: Any, error: Exception) -> None:
        """Raise an error that describes the inputs on which a network failed, unless it has worked before."""
        ours = isinstance(error, torch.OutOfMemoryError | MisconfigurationException | FloatingPointError)
        if ours or self.module.iteration:
            return
        tensor = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
        shape = "nothing" if tensor is None else f"an input of shape {shapes(inputs, 0)}"
        hint = ""
        if tensor is not None:
            dtype = parameter_dtype(getattr(self.module, name), tensor.dtype)
            differs = tensor.is_floating_point() and dtype != tensor.dtype
            hint = f" (the input is {tensor.dtype}, the network {dtype})" if differs else ""
        named = isinstance(error, LookupError) or not str(error)  # a missing key says nothing by itself
        cause = f"{type(error).__name__}: {error}".rstrip(": ") if named else str(error)
        if name == "generator" and isinstance(length := self.module.latent_dim, int):
            own = getattr(self.module.generator, "latent_dim", length)
            if own != length:
                raise ValueError(
                    f"`latent_dim` of the module is {length}, and that of the generator {own}: give both the same."
                ) from error
            cause += f" (`latent_dim` of the module is {length})"
        raise ValueError(f"The {name} failed on {shape}{hint}: {cause}") from error


def _is_pair(found: Any) -> bool:
    """Whether what `generate` or `discriminate` returned is a plain tuple of two; named tuples are trees."""
    return type(found) is tuple and len(found) == 2


def _runs(layer: nn.Module) -> bool:
    """Whether a layer has a forward pass: a ``ModuleList`` or ``ModuleDict`` has none."""
    return getattr(layer.forward, "__func__", layer.forward) is not nn.Module.forward


def _are_entries(logits: Any) -> bool:
    """Whether logits are those of several discriminators."""
    parts = logits.values() if isinstance(logits, Mapping) else logits if isinstance(logits, list) else ()
    return len(parts) > 0 and all(isinstance(part, Tensor) for part in parts)
