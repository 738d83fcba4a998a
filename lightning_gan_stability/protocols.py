"""What a regularizer, an update rule or any other callback may ask of a GANModule: public, documented and stable.

The package's own callbacks are written from these names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_gan_stability.losses import AdversarialLoss
from lightning_gan_stability.noise import Noise, Randomness
from lightning_gan_stability.outputs import (
    Condition,
    Extras,
    Features,
    GANOutputs,
    Logits,
    Player,
    Sample,
    StepRecord,
    Terms,
    Unpacked,
)

if TYPE_CHECKING:
    from lightning_gan_stability.callback import Regularizer
    from lightning_gan_stability.engine import Objective
    from lightning_gan_stability.rejection import Rejection
    from lightning_gan_stability.sharding import Sharding

T = TypeVar("T")


class GANProtocol(Protocol):
    """A GANModule, as callbacks see it; its methods are described there."""

    # ---------- what it is made of
    generator: nn.Module
    discriminator: nn.Module
    generator_ema: nn.Module | None
    average_rests: bool
    loss: AdversarialLoss
    augment: nn.Module
    latent_dim: int | None
    clip_norm: float | dict[Player, float] | None
    accumulate: int
    has_static_shapes: bool
    replays_graphs: bool
    noise: Noise
    sharding: Sharding

    # ---------- where it stands
    iteration: int
    steps: dict[Player, int]
    last_step: StepRecord
    adversarial: bool

    @property
    def plan(self) -> tuple[Player, ...]: ...

    @plan.setter
    def plan(self, plan: Sequence[Player]) -> None: ...

    @property
    def turn(self) -> Player | None: ...

    @property
    def moved(self) -> frozenset[Player]: ...

    @property
    def current_generator(self) -> nn.Module: ...

    @property
    def packing(self) -> int: ...

    @property
    def reruns_graphs(self) -> bool: ...

    # ---------- what users override
    def unpack(self, batch: Any) -> tuple[Sample, Condition]: ...

    def generate(
        self, network: nn.Module, n: int, condition: Condition, latents: Tensor | None
    ) -> Sample | tuple[Sample, Extras]: ...

    def discriminate(
        self, network: nn.Module, sample: Sample, condition: Condition
    ) -> Logits | tuple[Logits, Features]: ...

    def draw_condition(self, n: int, condition: Condition) -> Condition: ...

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> Terms: ...

    def adversarial_weight(self, player: Player, outputs: GANOutputs) -> float | Tensor: ...

    # ---------- samples and logits
    def unpacked(self, batch: Any) -> Unpacked: ...

    def sample(
        self,
        n: int | None = None,
        condition: Condition = None,
        latents: Tensor | None = None,
        truncation: float = 1.0,
        reject: Rejection | None = None,
    ) -> Sample: ...

    def logits(self, sample: Sample, condition: Condition = None) -> Logits: ...

    def compute_samples(
        self, player: Player, batch: Any, regularizers: Sequence[Regularizer] | None = None
    ) -> GANOutputs: ...

    def compute_outputs(
        self, player: Player, batch: Any, regularizers: Sequence[Regularizer] | None = None
    ) -> GANOutputs: ...

    def augment_samples(self, sample: Sample, condition: Condition) -> tuple[Sample, Condition]: ...

    def judge(
        self, outputs: GANOutputs, real: bool = True, fake: bool = True, same_augmentation: bool = False
    ) -> GANOutputs: ...

    def watch_layers(self, layers: Sequence[str]) -> Callable[[], None]: ...

    def resample(self, outputs: GANOutputs, latents: Tensor | None) -> GANOutputs: ...

    # ---------- gradients and steps
    def compute_gradients(self, player: Player, batch: Any, objective: Objective | None = None) -> GANOutputs: ...

    def apply_gradients(self, player: Player) -> None: ...

    def separate_steps(self, player: Player, batch: Any) -> None: ...

    def due(self, player: Player) -> list[Regularizer]: ...

    def term_name(self, regularizer: Regularizer) -> str: ...

    def gradients_of(self, term: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]: ...

    def adversarial_loss(self, player: Player, outputs: GANOutputs) -> tuple[Tensor, Terms]: ...

    def player_loss(
        self, player: Player, outputs: GANOutputs, adversarial: Tensor | None = None
    ) -> tuple[Tensor, Terms]: ...

    def joint_losses(self, batch: Any) -> tuple[dict[Player, Tensor], dict[Player, Tensor]]: ...

    def set_gradients(self, player: Player, gradients: Sequence[Tensor | None]) -> None: ...

    def step(self, player: Player, schedule: bool = True) -> None: ...

    def constrain(self, player: Player, parameters: Sequence[Tensor] | None = None) -> Sequence[Tensor]: ...

    def optimizer(self, player: Player) -> LightningOptimizer: ...

    def trainable_parameters(self, player: Player) -> list[nn.Parameter]: ...

    # ---------- contexts
    def full_precision(self, eager: bool = True) -> AbstractContextManager[None]: ...

    def frozen_buffers(self) -> AbstractContextManager[None]: ...

    def loss_at_rest(self) -> AbstractContextManager[None]: ...

    def replay_randomness(self, start: Randomness | None = None) -> AbstractContextManager[None]: ...

    def substitute(self, parameters: Sequence[Tensor], frozen: nn.Module | None = None) -> Callable[..., Any]: ...

    # ---------- of every LightningModule
    trainer: Trainer
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def device_mesh(self) -> DeviceMesh | None: ...

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None: ...

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None: ...

    def optimizers(self) -> Any: ...

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None: ...

    def modules(self) -> Any: ...

    def parameters(self) -> Any: ...

    def named_parameters(self) -> Any: ...

    def get_submodule(self, target: str) -> nn.Module: ...
