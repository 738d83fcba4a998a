"""Image-to-image translation: PairedTranslation and UnpairedTranslation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gan_stability._checks import check_bool, check_choice, describe
from lightning_gan_stability.losses import AdversarialLoss, LeastSquares
from lightning_gan_stability.networks import logits_and_features
from lightning_gan_stability.outputs import Condition, Extras, Features, Logits, Player, Sample
from lightning_gan_stability.recipes.base import Recipe, lone_target, source_and_target

DOMAINS = ("a", "b")


class PairedTranslation(Recipe):
    """pix2pix: the generator maps a source image to its target, and the discriminator sees both.

    L_D = ½ (E sp(−D(s, x)) + E sp(D(s, x̂))), L_G = E sp(−D(s, x̂)), x̂ = G(s), sp(t) = log(1 + eᵗ).
    Use it with ``Reconstruction(100.0)`` and ``Alternating(share_fake=True)``.

    "Image-to-Image Translation with Conditional Adversarial Networks", https://arxiv.org/abs/1611.07004.

    A batch is (source, target) or ``{"source": ..., "target": ...}``, images of the same height and width.

    Args:
        generator: maps source images (n, c, h, w) to images like the targets.
        discriminator: maps sources and images, concatenated along the channels in this order, to logits (n, ...).
        loss: None: :class:`~lightning_gan_stability.NonSaturating`.
        d_weight: factor of the discriminator's loss; the paper's ½.
        g_weight: factor of the generator's adversarial loss.
        losses: names of losses that the generator returns besides images, with their weights; None: none.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, or if a batch has another form.

    Example:
        >>> model = PairedTranslation(nn.Conv2d(1, 3, 1), nn.Conv2d(4, 1, 4, 2))
        >>> real, source = model.unpack((torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)))
        >>> model.logits(real, source).shape
        torch.Size([2, 9])
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: AdversarialLoss | None = None,
        d_weight: float = 0.5,
        g_weight: float = 1.0,
        losses: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, discriminator, loss, d_weight, g_weight, losses, **kwargs)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """The target as samples, and the source as their condition."""
        source, target = source_and_target(batch, "PairedTranslation")
        for name, image in (("source", source), ("target", target)):
            if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[2:] != source.shape[2:]:
                raise ValueError(
                    f"PairedTranslation needs sources and targets (n, c, h, w) of one height and width, got a {name} "
                    f"{describe(image)} beside a source {describe(source)}."
                )
        return target, source

    def discriminate(
        self, network: nn.Module, sample: Sample, condition: Condition
    ) -> Logits | tuple[Logits, Features]:
        """Judge pairs of source and image."""
        return super().discriminate(network, torch.cat([condition, sample], 1), None)


class UnpairedTranslation(Recipe):
    """CycleGAN: two generators between the domains a and b, each of which translates the other's images back.

    x̂_b = G_b(x_a), x̂_a = G_a(x_b); L_D = Σ_i ½ (E (D_i(x_i) − 1)² + E D_i(x̂_i)²), L_G = Σ_i E (D_i(x̂_i) − 1)².
    The generators step first. Images that were translated there and back are ``extras.cycle``; images that were
    translated to their own domain are ``extras.identity``. Use it with
    ``Reconstruction(10.0, sample="extras.cycle", name="cycle")``,
    ``Reconstruction(5.0, sample="extras.identity", name="identity")``, ``FakePool(50, independent=True)`` and
    ``Alternating(share_fake=True)``.

    "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks",
    https://arxiv.org/abs/1703.10593.

    A batch is ``{"a": images, "b": images}`` or a tuple of both, for instance from Lightning's ``CombinedLoader``, with
    the same batch size for both. Instead of images there may be tuples (images, labels), whose labels are ignored.

    Args:
        generator: a ``ModuleDict``: ``"a"`` maps images of b to a, ``"b"`` images of a to b.
        discriminator: a ``ModuleDict`` of ``"a"`` and ``"b"``, which map images of their domain to logits (n, ...).
        identity: compute ``extras.identity``, which requires equal numbers of channels in both domains.
        loss: None: :class:`~lightning_gan_stability.LeastSquares`.
        d_weight: factor of the discriminators' losses; 1, since ``LeastSquares`` already has the factor ½.
        g_weight: factor of the generators' adversarial losses; 2, since they have no ½ in the paper.
        losses: names of further losses among the extras, with their weights; None: none.
        plan: order of the players' steps; the authors' code steps the generators first.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, or if a batch has another form.

    Example:
        >>> networks = [nn.ModuleDict({d: nn.Conv2d(1, 1, 3, padding=p) for d in "ab"}) for p in (1, 0)]
        >>> model = UnpairedTranslation(*networks)
        >>> model.translate(torch.zeros(2, 1, 8, 8), "b").shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        generator: nn.ModuleDict,
        discriminator: nn.ModuleDict,
        identity: bool = True,
        loss: AdversarialLoss | None = None,
        d_weight: float = 1.0,
        g_weight: float = 2.0,
        losses: Mapping[str, float] | None = None,
        plan: Sequence[Player] = ("g", "d"),
        **kwargs: Any,
    ) -> None:
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(network, nn.ModuleDict) or {*network} != {*DOMAINS}:
                raise ValueError(f"`{name}` must be a ModuleDict of 'a' and 'b', got {describe(network)}.")
        loss = loss or LeastSquares()
        super().__init__(generator, discriminator, loss, d_weight, g_weight, losses, plan=plan, **kwargs)
        self.identity = check_bool("identity", identity)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """Images of both domains."""
        if isinstance(batch, list | tuple) and len(batch) == 2:
            batch = dict(zip(DOMAINS, batch, strict=True))
        if not isinstance(batch, Mapping) or {*batch} != {*DOMAINS}:
            raise ValueError(
                "A batch of UnpairedTranslation must be {'a': images, 'b': images} or a tuple of both, got "
                f"{describe(batch)}: `CombinedLoader({{'a': loader, 'b': loader}})` makes such batches."
            )
        real = {d: x[0] if isinstance(x, list | tuple) and x else x for d, x in ((d, batch[d]) for d in DOMAINS)}
        sizes = [len(x) if isinstance(x, Tensor) and x.dim() == 4 else None for x in real.values()]
        if None in sizes or sizes[0] != sizes[1]:
            raise ValueError(
                "UnpairedTranslation needs images (n, c, h, w) of both domains, as many of each, got "
                f"{describe(real['a'])} and {describe(real['b'])}: use one batch size, and drop_last=True in both "
                "loaders."
            )
        return real, real

    def generate(
        self, network: nn.Module, n: int, condition: Condition, latents: Tensor | None
    ) -> tuple[Sample, Extras]:
        """Translate images of both domains, and translate them back."""
        assert isinstance(network, nn.ModuleDict)
        fake = {"a": network["a"](condition["b"]), "b": network["b"](condition["a"])}
        extras: Extras = {"cycle": {"a": network["a"](fake["b"]), "b": network["b"](fake["a"])}}
        if self.identity:
            extras["identity"] = {domain: network[domain](condition[domain]) for domain in DOMAINS}
        return fake, extras

    def discriminate(
        self, network: nn.Module, sample: Sample, condition: Condition
    ) -> Logits | tuple[Logits, Features]:
        """Judge the images of each domain by its discriminator."""
        assert isinstance(network, nn.ModuleDict)
        return logits_and_features({domain: network[domain](sample[domain]) for domain in DOMAINS})

    def augment_samples(self, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Images as the discriminators see them in training; no condition is passed to them."""
        return super().augment_samples(sample, None)[0], condition

    def forward(self, inputs: Any, condition: Condition = None) -> Sample:
        """Translate images of both domains, ``{"a": images, "b": images}``; see :meth:`translate` for one."""
        if isinstance(inputs, Tensor):
            raise ValueError("UnpairedTranslation has two directions: use `translate(images, to='a')` or `to='b'`.")
        return super().forward(inputs, condition)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Sample:
        """Translations of the images of both domains."""
        if lone_target(batch) is not None:
            raise ValueError(
                "UnpairedTranslation has two directions, and a batch of images of one domain does not say which: give "
                "`trainer.predict` batches {'a': images, 'b': images}, or use `translate(images, to='a')` or `to='b'`."
            )
        return super().predict_step(batch, batch_idx, dataloader_idx)

    def translate(self, images: Tensor, to: str) -> Tensor:
        """Translate images of one domain to the other, in eval mode with the average of the generators if there is one.

        Args:
            images: (n, c, h, w).
            to: the domain to translate to, ``"a"`` or ``"b"``.
        """
        network: Any = self.current_generator
        return network[check_choice("to", to, DOMAINS)](images.to(self.device))  # type: ignore[no-any-return]
