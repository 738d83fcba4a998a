"""Averages of weights over the steps of a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gan_stability._checks import check_bool, check_integer, check_number, check_share
from lightning_gan_stability._compat import is_spectral_norm, lerp_, register_like
from lightning_gan_stability.callback import GANCallback, as_gan, callbacks_of, refuse_after_weight_averaging
from lightning_gan_stability.layers import clone, copy_network, follow_spectrum
from lightning_gan_stability.outputs import PLAYERS
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class GeneratorEMA(GANCallback):
    """Keeps an exponential moving average of the generator's weights, which gives better samples than the last weights.

    θ̄ ← β θ̄ + (1 − β) θ after every batch on which the generator stepped. Buffers, such as BatchNorm's statistics, are
    copied, and spectral norm's vectors are recomputed for the averaged weights. "The Unusual Effectiveness of Averaging
    in GAN Training", https://arxiv.org/abs/1806.04498. β = ½^(1/h) with the half-life h in steps of the generator.
    ``ramp_up`` is StyleGAN's: h ← min(h, ramp_up · n) after n steps, so that early in training the average covers
    recent steps only. The average is stored as the module's ``generator_ema``. ``sample()`` uses it in eval mode, in
    validation, and after ``load_from_checkpoint``, even without this callback. It starts as a copy of the generator,
    and does so again in a later run with a new callback. Costs the memory of a second generator and no forward pass. In
    pure bfloat16 or float16 it costs that of a third one, in float32, because rounding would lose updates of size 1 −
    β.

    Args:
        half_life: h, not negative: the number of steps after which a weight's share in the average has halved. 0: a
            copy. A number, or a :class:`~lightning_gan_stability.Schedule` over steps of the generator, such as
            R3GAN's, which rises from 0.
        decay: β in [0, 1), a number or a schedule, instead of ``half_life``; 0.999 if neither is given.
        ramp_up: limits h to ``ramp_up`` · n, as above; 0.05 in StyleGAN2-ADA. None: no limit.
        restart: start from a copy of the generator in a run that does not resume this callback's state. False: continue
            from the average that the module has, such as published weights.

    Attributes:
        updates: number of updates of the average.

    Raises:
        ValueError: if an argument has a bad value, or both ``half_life`` and ``decay`` are given.
        MisconfigurationException: if there are two GeneratorEMA callbacks, or if Lightning's ``WeightAveraging`` comes
            before this one.

    Example:
        >>> round(GeneratorEMA(half_life=100).decay_at(1000) ** 100, 9)
        0.5
    """

    updates: int
    precise: dict[str, Tensor]
    _found = False  # the module had an average before the run

    def __init__(
        self,
        half_life: Scheduled | None = None,
        decay: Scheduled | None = None,
        ramp_up: float | None = None,
        restart: bool = True,
    ) -> None:
        super().__init__()
        if half_life is not None and decay is not None:
            raise ValueError(f"Give `half_life` or `decay`, not both, got {half_life!r} and {decay!r}.")
        decay = 0.999 if half_life is None and decay is None else decay
        self.half_life = None if half_life is None else check_scheduled("half_life", half_life)
        self.decay = None if decay is None else check_scheduled("decay", decay, check_share, open_end=True)
        self.ramp_up = None if ramp_up is None else check_number("ramp_up", ramp_up, positive=True)
        self.restart = check_bool("restart", restart)
        self.add_state("updates", 0)
        self.add_state("precise", {})  # the average in float32, for parameters of lower precision

    def decay_at(self, n: int) -> float:
        """β at the update after n earlier ones."""
        if self.decay is not None:
            decay = value_at(self.decay, n)
            if self.ramp_up is None:
                return decay
            half_life = math.log(0.5) / math.log(decay) if decay else 0.0
        else:
            assert self.half_life is not None
            half_life = value_at(self.half_life, n)
        half_life = half_life if self.ramp_up is None else min(half_life, self.ramp_up * n)
        return float(0.5 ** (1 / half_life)) if half_life else 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the average before the checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        module = as_gan(pl_module)
        if len(callbacks_of(trainer, GeneratorEMA)) > 1:
            raise MisconfigurationException(
                "A module keeps a single average of its generator: remove all but one GeneratorEMA."
            )
        if stage == "fit":
            refuse_after_weight_averaging(self, trainer)
            self._found = module.generator_ema is not None
            make_room(module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Treat an average from the checkpoint as one that the module had."""
        self._found |= any(key.startswith("generator_ema.") for key in checkpoint.get("state_dict", {}))

    def reset(self, module: GANProtocol) -> None:
        """Start from a copy of the generator."""
        super().reset(module)
        assert module.generator_ema is not None
        if self._found and not self.restart:
            return
        if self._found:
            rank_zero_warn(
                "The module already has an average of its generator, but GeneratorEMA starts again from a copy of the "
                "generator: set GeneratorEMA(restart=False) to continue from the average."
            )
        state = module.generator.state_dict()
        module.generator_ema.load_state_dict({k: clone(v) if isinstance(v, Tensor) else v for k, v in state.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the generator has stepped."""
        module = as_gan(pl_module)
        if "g" in module.moved:
            assert module.generator_ema is not None
            self._move(module.generator_ema, module.generator, self.decay_at(self.updates))
            self.updates += 1

    @torch.no_grad()
    def _move(self, average: nn.Module, generator: nn.Module, decay: float) -> None:
        means: dict[str, Tensor] = dict(average.named_parameters())
        weights = dict(generator.named_parameters())
        low = {name: p for name, p in means.items() if p.dtype in (torch.float16, torch.bfloat16)}
        for name in low:
            start = self.precise.get(name, means[name]).to(means[name].device, torch.float32)
            self.precise[name] = means[name] = start
        moving = [name for name, mean in means.items() if mean.is_floating_point() or mean.is_complex()]
        lerp_([means[name] for name in moving], [weights[name].to(means[name].dtype) for name in moving], 1 - decay)
        for name, p in low.items():
            p.copy_(means[name])
        for mine, theirs in zip(average.modules(), generator.modules(), strict=True):
            if is_spectral_norm(mine):  # the average has its own singular vectors
                continue
            own = dict(mine.named_buffers(recurse=False))
            for name, now in theirs.named_buffers(recurse=False):
                if name in own and own[name].shape == now.shape:
                    own[name].copy_(now)
                else:  # created or resized by `forward`
                    register_like(mine, name, clone(now), theirs)
        follow_spectrum(average)


def make_room(module: GANProtocol) -> None:
    """Create the module's average as a copy of the generator if it has none, and mark it as active."""
    module.average_rests = False
    if module.generator_ema is None:
        module.generator_ema = copy_network(module.generator)


class Lookahead(GANCallback):
    """Pulls both players back towards slow weights every k steps, which damps rotation.

    Every k batches on which the generator steps, s ← s + α (w − s) and w ← s, for the parameters of both players. The
    optimizers' moments are kept. "Taming GANs with Lookahead-Minmax", https://arxiv.org/abs/2006.14567. Averaging the
    two ends of an arc moves inward: on min max xy with simultaneous steps η = 0.1, a cycle with k = 5 and α = ½ shrinks
    the distance by 0.981. Checkpoints and pictures at multiples of k steps show the slow weights s. Put GeneratorEMA
    after Lookahead in the list of callbacks to average them. Costs one copy of the parameters and no forward pass.

    Args:
        k: number of the generator's steps from one pull to the next: 5 in the paper.
        alpha: α in (0, 1], the step of the slow weights towards the fast ones.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> Lookahead(k=5, alpha=0.5).k
        5
    """

    steps: int
    slow: list[Tensor]

    def __init__(self, k: int = 5, alpha: Scheduled = 0.5) -> None:
        super().__init__()
        self.k = check_integer("k", k)
        self.alpha = check_scheduled("alpha", alpha, check_share, open_start=True)
        self.add_state("steps", 0)
        self.add_state("slow", [])  # s, of both players

    @property
    def state_key(self) -> str:
        """The class and k, so that a run can have a slow and a super-slow instance."""
        return f"{type(self).__qualname__}(k={self.k})"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the slow weights from the networks, unless the run resumes with slow weights."""
        super().on_train_start(trainer, pl_module)
        self.slow = self.slow or [clone(p) for p in _weights(trainer)]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pull every k steps of the generator, and apply the weights' constraints afterwards."""
        module = as_gan(pl_module)
        if "g" not in module.moved:
            return
        self.steps += 1
        if self.steps % self.k == 0:
            weights = _weights(trainer)
            lerp_(self.slow, weights, value_at(self.alpha, module.last_step.iteration))
            _copy(self.slow, weights)
            for player in PLAYERS:
                module.constrain(player)
            _copy(weights, self.slow)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy one by one, because there is no fused copy of sharded tensors."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _weights(trainer: Trainer) -> list[Tensor]:
    found = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    return [p for p in found if p.is_floating_point() or p.is_complex()]
