"""PacGAN's packing: the discriminator judges several samples together."""

from torch import Tensor, nn


class Packed(nn.Module):
    """A discriminator that sees m samples at once, all real or all generated, and gives them one logit.

    l(x₁, ..., x_m) = D([x₁, ..., x_m]), joined along the first axis of a sample (features or channels), in the order of
    the batch. A pack of samples of one mode gives a collapsed generator away. "PacGAN: The power of two samples in
    generative adversarial networks", https://arxiv.org/abs/1712.04086. Everything else stays as it is: a pack counts as
    one sample in losses and gradient penalties (norms are over all its values, interpolates have one α for it), and the
    samples of a batch or micro-batch that fill no pack are left out of the step. Costs what the discriminator costs on
    n / m samples with m times the inputs.

    Args:
        discriminator: takes m times the features or channels of a sample; without labels.
        m: samples in a pack.

    Raises:
        ValueError: if ``m`` is not a positive integer, ``discriminator`` no module, or if a batch has less than m
            samples.

    Example:
        >>> import torch
        >>> packed = Packed(nn.Linear(2 * 3, 1), m=2)
        >>> packed(torch.zeros(8, 3)).shape, packed(torch.zeros(9, 3)).shape
        (torch.Size([4, 1]), torch.Size([4, 1]))
    """

    def __init__(self, discriminator: nn.Module, m: int = 2) -> None:
        super().__init__()
        if not isinstance(discriminator, nn.Module):
            raise ValueError(f"`discriminator` must be a module, got {discriminator!r}.")
        if not isinstance(m, int) or isinstance(m, bool) or m < 1:
            raise ValueError(f"`m` must be a positive integer, got {m!r}.")
        self.discriminator = discriminator
        self.packing = m  # the name under which GANModule looks for it

    def forward(self, samples: Tensor) -> Tensor:
        """Return one logit for each m samples, without the rest."""
        m, n = self.packing, len(samples) // self.packing
        if n == 0:
            raise ValueError(f"a pack has {m} samples, but there are {len(samples)}.")
        logits: Tensor = self.discriminator(samples[: n * m].reshape(n, -1, *samples.shape[2:]))
        return logits
