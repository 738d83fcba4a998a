"""Averages of weights over the steps of a run."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_gan_stability.callbacks.base import Remembering, check_number, check_positive_int
from lightning_gan_stability.callbacks.normalize import WeightClipping
from lightning_gan_stability.doors import assign, copied
from lightning_gan_stability.layers import follow_spectrum

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule


@final
class GeneratorEMA(Remembering):
    """Keeps an exponential moving average of the generator's weights, which draws better samples than the last ones.

    θ̄ ← β θ̄ + (1 − β) θ after every batch on which the generator stepped; buffers (BatchNorm's statistics) are copied,
    and spectral norm's vectors follow the averaged weights. "The Unusual Effectiveness of Averaging in GAN Training",
    https://arxiv.org/abs/1806.04498. β = ½^(1/h) with the half-life h in such steps; ``ramp_up`` is StyleGAN's, h ←
    min(h, ramp_up · n) after n steps, so that the average of a young generator is young too. The average is the
    module's ``generator_ema``: ``sample()`` draws from it in eval mode, in validation, and after
    ``load_from_checkpoint``, also without this callback. It starts as a copy, in a later run with a new callback again,
    and costs the memory of a second generator (of a third in pure bfloat16 or float16, whose rounding would swallow
    steps of 1 − β), and no forward pass.

    Args:
        half_life: h, not negative: the steps after which a weight's share in the average is one half. 0: a copy.
        decay: β in [0, 1) instead of ``half_life``; 0.999 if neither is given.
        ramp_up: 0.05 in StyleGAN2-ADA; None: none.

    Raises:
        ValueError: if an argument has a bad value, or both ``half_life`` and ``decay`` are given.
        MisconfigurationException: if there are two of them.

    Example:
        >>> round(GeneratorEMA(half_life=100).decay_at(1000) ** 100, 9)
        0.5
    """

    def __init__(
        self, half_life: float | None = None, decay: float | None = None, ramp_up: float | None = None
    ) -> None:
        super().__init__()
        if half_life is not None and decay is not None:
            raise ValueError(f"Give `half_life` or `decay`, not both, got {half_life!r} and {decay!r}.")
        decay = 0.999 if half_life is None and decay is None else decay
        if decay is not None:
            check_number("decay", decay)
            if decay >= 1:
                raise ValueError(f"`decay` must be in [0, 1), got {decay!r}.")
            half_life = math.log(0.5) / math.log(decay) if decay else 0.0
        assert half_life is not None
        check_number("half_life", half_life)
        if ramp_up is not None:
            check_number("ramp_up", ramp_up, positive=True)
        self.half_life = half_life
        self.decay = decay
        self.ramp_up = ramp_up
        self._updates = 0
        self._precise: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Updates done, the module's iteration at the last batch, and the average in float32 if the module has less."""
        return super().state_dict() | {"updates": self._updates, "precise": self._precise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; the average itself is in the module's state."""
        super().load_state_dict(state_dict)
        self._updates = state_dict["updates"]
        self._precise = dict(state_dict["precise"])

    def decay_at(self, n: int) -> float:
        """β at the update after n others."""
        if self.decay is not None and self.ramp_up is None:
            return self.decay
        half_life = self.half_life if self.ramp_up is None else min(self.half_life, self.ramp_up * n)
        return float(0.5 ** (1 / half_life)) if half_life else 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make room for the average, before the checkpoint is read."""
        super().setup(trainer, pl_module, stage)
        module: GANModule = pl_module  # type: ignore[assignment]
        if sum(isinstance(callback, GeneratorEMA) for callback in module._callbacks()) > 1:
            raise MisconfigurationException("A module has room for one GeneratorEMA: remove all but one.")
        if stage == "fit":
            module._average_rests = False
            if module.generator_ema is None:
                module.generator_ema = deepcopy(module.generator).requires_grad_(False)

    def _forget(self, module: GANModule) -> None:
        """Start from a copy of the generator."""
        assert module.generator_ema is not None
        module.generator_ema.load_state_dict({k: copied(v) for k, v in module.generator.state_dict().items()})
        self._updates, self._precise = 0, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average if the generator has moved."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if "g" in module.moved:
            assert module.generator_ema is not None
            self._move(module.generator_ema, module.generator, self.decay_at(self._updates))
            self._updates += 1
        self._iteration = module.iteration

    @torch.no_grad()
    def _move(self, average: nn.Module, generator: nn.Module, decay: float) -> None:
        means: dict[str, Tensor] = dict(average.named_parameters())
        weights = dict(generator.named_parameters())
        low = {name: p for name, p in means.items() if p.dtype in (torch.float16, torch.bfloat16)}
        for name in low:
            start = self._precise.get(name, means[name]).to(means[name].device, torch.float32)
            self._precise[name] = means[name] = start
        torch._foreach_lerp_(list(means.values()), [weights[name].to(means[name].dtype) for name in means], 1 - decay)
        for name, p in low.items():
            p.copy_(means[name])
        for mine, theirs in zip(average.modules(), generator.modules(), strict=True):
            if not isinstance(mine, parametrizations._SpectralNorm):  # an average has singular vectors of its own
                for name, now in theirs.named_buffers(recurse=False):
                    buffer = mine._buffers.get(name)
                    if buffer is not None and buffer.shape == now.shape:
                        buffer.copy_(now)
                    else:  # made or resized by `forward`
                        mine.register_buffer(name, copied(now), name not in theirs._non_persistent_buffers_set)
        follow_spectrum(average)


@final
class Lookahead(Remembering):
    """Lets both players run k steps ahead and then pulls them back, part of the way, to where they started.

    Every k batches on which the generator steps, s ← s + α (w − s) and w ← s, for the parameters of both players; the
    optimizers' moments stay. "Taming GANs with Lookahead-Minmax", https://arxiv.org/abs/2006.14567. Of a rotation it
    keeps the chord: on min max xy with simultaneous steps η = 0.1, k = 5 and α = ½ shrink the distance by 0.981 in a
    cycle. Checkpoints and pictures of a multiple of k steps show the slow weights s; put GeneratorEMA behind Lookahead
    in the list of callbacks to average them. Costs one copy of the parameters and no pass.

    Args:
        k: batches on which the generator steps, from one pull to the next: 5 in the paper.
        alpha: α in (0, 1], how far the slow weights follow.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> Lookahead(k=5, alpha=0.5).k
        5
    """

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        super().__init__()
        check_positive_int("k", k)
        check_number("alpha", alpha, positive=True)
        if alpha > 1:
            raise ValueError(f"`alpha` must be in (0, 1], got {alpha!r}.")
        self.k = k
        self.alpha = alpha
        self._steps = 0
        self._slow: list[Tensor] = []

    @property
    def state_key(self) -> str:
        """Tells a slow and a super-slow instance apart."""
        return self._generate_state_key(k=self.k)

    def state_dict(self) -> dict[str, Any]:
        """Steps done, the module's iteration at the last batch, and the slow weights."""
        return super().state_dict() | {"steps": self._steps, "slow": self._slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._steps = state_dict["steps"]
        self._slow = list(state_dict["slow"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the slow weights from the networks, unless this is the module whose slow weights they are."""
        super().on_train_start(trainer, pl_module)
        weights = _weights(trainer)
        if not self._slow:
            self._slow = [copied(p) for p in weights]
        self._slow = [slow.to(p.device) for slow, p in zip(self._slow, weights, strict=True)]

    def _forget(self, module: GANModule) -> None:
        self._steps, self._slow = 0, []

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pull every k batches on which the generator stepped; weights that are clipped stay so."""
        module: GANModule = pl_module  # type: ignore[assignment]
        self._iteration = module.iteration
        if "g" not in module.moved:
            return
        self._steps += 1
        if self._steps % self.k == 0:
            weights = _weights(trainer)
            torch._foreach_lerp_(self._slow, weights, self.alpha)
            assign(weights, self._slow)
            clippings = [callback for callback in module._callbacks() if isinstance(callback, WeightClipping)]
            for clipping in clippings:
                clipping.clip(module)
            if clippings:
                assign(self._slow, weights)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
