"""A neural audio codec of synthesized speech: DAC's step with narrow networks.

    python -m examples.recipes.codec

Writes ``codec.png``, spectrograms of a held-out sentence and of what the codec makes of it with and without
discriminators, and the sound of each as ``codec_*.wav``.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from examples.recipes.shared import options
from examples.recipes.vocoder import ResidualStack, compare


class ResidualCodebooks(nn.Module):
    """Each codebook quantizes what the ones before left over; looked up by angle, as in DAC."""

    def __init__(self, width: int, books: int, codes: int, dim: int) -> None:
        super().__init__()
        self.books = nn.ParameterList(torch.randn(codes, dim) for _ in range(books))
        self.inside = nn.ModuleList(nn.Conv1d(width, dim, 1) for _ in range(books))
        self.outside = nn.ModuleList(nn.Conv1d(dim, width, 1) for _ in range(books))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rest, total, indices = x, torch.zeros_like(x), []
        commitment, codebook = x.new_zeros(()), x.new_zeros(())
        for book, inside, outside in zip(self.books, self.inside, self.outside, strict=True):
            z = inside(rest)
            angles = torch.einsum(
                "ndt,kd->ntk", nn.functional.normalize(z, dim=1), nn.functional.normalize(book, dim=1)
            )
            indices.append(angles.argmax(-1))
            code = book[indices[-1]].transpose(1, 2)
            commitment = commitment + (z - code.detach()).square().mean()
            codebook = codebook + (code - z.detach()).square().mean()
            part = outside(z + (code - z).detach())
            rest, total = rest - part, total + part
        return total, {"commitment": commitment, "codebook": codebook, "codes": torch.stack(indices, 1)}


class CodecAutoencoder(nn.Module):
    """Waveforms (n, 1, t) to codes (n, books, t / Π strides) and back."""

    def __init__(
        self, width: int = 16, strides: Sequence[int] = (4, 4, 4), books: int = 4, codes: int = 128, dim: int = 8
    ) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(len(strides))]
        down: list[nn.Module] = []
        for (inside, outside), stride in zip(pairwise([1, *sizes]), strides, strict=True):
            narrower = nn.Conv1d(inside, outside, 2 * stride, stride, stride // 2)
            down += [weight_norm(narrower), ResidualStack(outside), nn.LeakyReLU(0.1)]
        up: list[nn.Module] = []
        for (outside, inside), stride in reversed([*zip(pairwise([width // 2, *sizes]), strides, strict=True)]):
            wider = nn.ConvTranspose1d(inside, outside, 2 * stride, stride, stride // 2)
            up += [ResidualStack(inside), nn.LeakyReLU(0.1), weight_norm(wider)]
        up += [nn.LeakyReLU(0.1), weight_norm(nn.Conv1d(width // 2, 1, 7, padding=3)), nn.Tanh()]
        self.encoder = nn.Sequential(*down)
        self.codebooks = ResidualCodebooks(sizes[-1], books, codes, dim)
        self.decoder = nn.Sequential(*up)

    def forward(self, waveform: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        code, extras = self.codebooks(self.encoder(waveform))
        return self.decoder(code), extras


def main() -> None:
    compare("codec", {"mel distance alone": ["FeatureMatching"], "with discriminators": []}, options(__doc__, 1500))


if __name__ == "__main__":
    main()
