"""Shares of the generator's gradient by loss term, and the use of its codebooks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_gan_stability.callback import Regularizer
from lightning_gan_stability.outputs import GANOutputs, Terms, batch_size, tree_leaves
from lightning_gan_stability.protocols import GANProtocol

#: The kind of a term: adversarial (feature matching included), a reconstruction that is present on every step or only
#: on some, or something else.
Kind: TypeAlias = Literal["adversarial", "reconstruction", "lazy reconstruction", "other"]

SILENT, DOMINANT = 0.01, 0.9  # shares of the gradient
MUTE = 1e-4  # a share that no healthy term has, however steep the others are
JUMP = 2.0  # of a reconstruction, above what it was before the adversarial terms began
SUDDEN = 0.05  # a share that is no ramp's first step
LIKELY, MOSTLY = 0.95, 0.75  # accuracies
RISEN = 1.2  # of a reconstruction, above its lowest
USED, LEFT = 0.1, 0.25  # of a codebook, and of its best
YOUTH, YOUNG = 5, 500  # windows and steps in which a codebook comes into use
SINGLE = 1.01  # codes in effect used, if nearly all are the same
BOOKS = 64  # that a quantizer may have
CELLS = 4096  # codes that are counted where their number is not known; four times as many once they do not suffice
CODES = re.compile(r".*(code|token).*|(.*\.)?(index|indices)(\.\d+)?", re.IGNORECASE)  # names of extras that are codes
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SIZES = (
    "num_embeddings",
    "codebook_size",
    "num_codes",
    "n_codes",
    "n_embed",
    "n_e",
    "codes",
)  # what quantizers call it


# ---------- decisions, from the windows so far, the last one at the end


def silent_adversarial(windows: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """The adversarial terms have less than a hundredth of the generator's gradient, and their share does not grow.

    In addition the discriminator is nearly always right, or mostly right if the share is below a ten-thousandth. A
    small share alone is no failure: a distance of spectrograms has steep gradients with respect to samples, and the
    adversarial terms of HiFi-GAN have some thousandths beside it.
    """
    now, share = windows[-1], windows[-1]["adversarial_share"]
    before = [w["adversarial_share"] for w in windows[-4:-1] if math.isfinite(w["adversarial_share"])]
    rises = bool(before) and share > 1.1 * sum(before) / len(before)
    needed = LIKELY if share >= MUTE else MOSTLY
    if 0 < share < SILENT and now["accuracy"] > needed and not rises:
        return {"adversarial_share": share, "accuracy": now["accuracy"]}
    return None


def dominant_adversarial(windows: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """The adversarial terms have more than nine tenths of the generator's gradient, and the reconstruction gets worse.

    The reconstruction is a fifth above its lowest. A large share alone is no failure.
    """
    now = windows[-1]
    lowest = min((w["reconstruction"] for w in windows if math.isfinite(w["reconstruction"])), default=math.nan)
    if (
        now["adversarial_share"] > DOMINANT
        and now["reconstruction_share"] > 0
        and now["reconstruction"] > RISEN * lowest
    ):
        return {
            "adversarial_share": now["adversarial_share"],
            "reconstruction": now["reconstruction"],
            "lowest": lowest,
        }
    return None


def head_start(windows: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """When the adversarial terms start for the generator, the discriminator is right on more than 95 %.

    Or the reconstruction more than doubles, in this window or the next. In both cases the adversarial terms have more
    than a twentieth of the gradient at once, without a ramp.
    """
    known = [w for w in windows if not math.isnan(w["adversarial_share"])]
    begun = next((i for i in (1, 2) if len(known) > i and known[-i - 1]["adversarial_share"] == 0), None)
    if begun is None or known[-1] is not windows[-1] or not known[-begun]["adversarial_share"] > SUDDEN:
        return None
    now, before, share = windows[-1], known[:-begun], windows[-1]["adversarial_share"]
    if now["reconstruction"] > JUMP * before[-1]["reconstruction"]:
        return {
            "adversarial_share": share,
            "reconstruction": now["reconstruction"],
            "before": before[-1]["reconstruction"],
        }
    if begun == 2:
        return None
    seen = now["accuracy_before"], before[-1]["accuracy"]  # within this window; where it begins with one, in the last
    accuracy = next((value for value in seen if not math.isnan(value)), math.nan)
    return {"accuracy": accuracy, "adversarial_share": share} if accuracy > LIKELY else None


def codebook_collapse(windows: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """After its first steps, less than a tenth of a codebook is effectively used, or less than a quarter of its best.

    Or a single code is used, whatever the size. In addition its use does not grow: it is less than a twentieth above
    the mean of the last ten windows. The effective number of codes is exp(−Σ p log p), with p the shares of codes in a
    window. Of several books the one with the lowest use counts.
    """
    now, found = windows[-1], list[dict[str, float]]()
    for name in (name for name in now if name.startswith("perplexity/")):
        course, size = [w[name] for w in windows if name in w], now[f"codes/{name.split('/')[1]}"]
        used, best, before = course[-1], max(course), course[-11:-1]
        rises = bool(before) and used > 1.05 * sum(before) / len(before)
        old = now.get("step", math.inf) >= YOUNG
        idle = len(course) > YOUTH and (used < SINGLE or (old and used < USED * size))
        if (idle or used < LEFT * best) and not rises:
            book = name.split("/")[2:]
            found.append({"perplexity": used, "codes": size, "best": best} | ({"book": float(book[0])} if book else {}))
    return min(found, key=lambda evidence: evidence["perplexity"] / evidence["codes"], default=None)


# ---------- shares of the gradient


def squared_norms(
    module: GANProtocol, outputs: GANOutputs, terms: Terms, names: Sequence[str]
) -> dict[str, tuple[Tensor, Kind]]:
    """Squared norms of the gradients of weighted terms of the generator's loss with respect to its samples, and kinds.

    They are (n ‖∇_x L_i‖)², with n the number of samples and the norm over all leaves of x. Their sum over
    micro-batches and processes is that of the full batch, up to a factor that all terms share. A lazy term counts with
    its mean over steps. A term that does not depend on the samples, such as a codebook's, has 0.
    """
    samples = [leaf for leaf in tree_leaves(outputs.fake) if leaf.requires_grad]
    due = {module.term_name(regularizer): regularizer for regularizer in module.due("g")}
    n, found = batch_size(outputs.fake), dict[str, tuple[Tensor, Kind]]()
    # layers whose activations are computed again in the backward pass
    with module.frozen_buffers(), module.replay_randomness():
        for name in names:
            gradients = [g for g in module.gradients_of(terms[name], samples) if g is not None] if samples else []
            factor = n / due[name].every if name in due else n
            squares = [(factor * g.to(torch.promote_types(g.dtype, torch.float32))).square().sum() for g in gradients]
            total = torch.stack(squares).sum() if squares else torch.zeros((), device=module.device)
            found[name] = total.float(), _kind(name, due.get(name), depends=bool(gradients))
    return found


def _kind(name: str, regularizer: Regularizer | None, depends: bool) -> Kind:
    if name == "adversarial" or (regularizer is not None and regularizer.needs_real):
        return "adversarial"
    if not depends or (regularizer is not None and not regularizer.validated):
        return "other"
    return "lazy reconstruction" if regularizer is not None and regularizer.every > 1 else "reconstruction"


def shares(squares: Tensor, kinds: Mapping[str, Kind]) -> dict[str, float]:
    """The share of each term, by its name, and of each kind in the sum of norms.

    Args:
        squares: squared norms, in the order of ``kinds``.
        kinds: of the terms by their names.

    Example:
        >>> shares(torch.tensor([9.0, 1.0]), {"mel": "reconstruction", "adversarial": "adversarial"})
        {'share/mel': 0.75, 'share/adversarial': 0.25, 'adversarial_share': 0.25, 'reconstruction_share': 0.75}
    """
    norms = squares.double().sqrt()
    parts = dict(zip(kinds, (norms / norms.sum()).tolist(), strict=True))
    of_game = [part for name, part in parts.items() if kinds[name] == "adversarial"]
    of_others = [part for name, part in parts.items() if kinds[name].endswith("reconstruction")]
    by_name = {f"share/{name}": part for name, part in parts.items()}
    return by_name | {"adversarial_share": float(sum(of_game)), "reconstruction_share": float(sum(of_others))}


# ---------- the use of codebooks


def codes_of(extras: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The codes in a generator's extras: integer tensors whose names indicate codes.

    Example:
        >>> [name for name, _ in codes_of({"codes": torch.zeros(2, 3).long(), "length": torch.zeros(2).long()})]
        ['codes']
    """
    for key, value in extras.items():
        name = f"{prefix}{key}"
        parts = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(parts, Mapping):
            yield from codes_of({str(part): x for part, x in parts.items()}, f"{name}.")
        elif isinstance(value, Tensor) and value.dtype in INTEGERS and CODES.fullmatch(name):
            yield name, value


def by_book(codes: Tensor, dims: int) -> Tensor:
    """Arrange codes as (books, codes of each): the books are the second dimension, or the last if that is smaller.

    Args:
        codes: (n, ...), one for each position; or with one more dimension for the books of a residual quantizer.
        dims: number of dimensions of the samples, (n, channels, places...).

    Example:
        >>> by_book(torch.zeros(2, 4, 25).long(), 3).shape, by_book(torch.zeros(2, 8, 8).long(), 4).shape
        (torch.Size([4, 50]), torch.Size([1, 128]))
    """
    if codes.dim() < 2 or codes.dim() != dims or min(codes.shape[1], codes.shape[-1]) > BOOKS:
        return codes.reshape(1, -1)
    return codes.movedim(1 if codes.shape[1] <= codes.shape[-1] else -1, 0).flatten(1)


def count(counts: Tensor, rows: Tensor) -> None:
    """Add codes (books, n) to counts (books, cells + 1); the last cell is for larger ones, negative ones are none."""
    index = rows.long().clamp(0, counts.shape[1] - 1)
    counts.scatter_add_(1, index, (rows >= 0).to(counts.dtype))


def perplexities(counts: Tensor) -> list[float]:
    """The effective number of codes used in each book.

    Example:
        >>> perplexities(torch.tensor([[5, 5, 0], [0, 7, 0]]))
        [2.0, 1.0]
    """
    parts = counts.double() / counts.sum(1, keepdim=True)
    found: list[float] = torch.special.entr(parts).sum(1).exp().tolist()
    return found


def worst_books(window: Mapping[str, float]) -> dict[str, float]:
    """The lowest perplexity of each codebook's books, for the log.

    Example:
        >>> worst_books({"perplexity/codes/0": 9.0, "perplexity/codes/1": 4.0, "perplexity": 4.0})
        {'g/perplexity/codes': 4.0}
    """
    found: dict[str, float] = {}
    for name, value in window.items():
        if name.startswith("perplexity/"):
            key = f"g/perplexity/{name.split('/')[1]}"
            found[key] = min(value, found.get(key, value))
    return found


def known_size(network: nn.Module) -> int | None:
    """The number of codes of a network's quantizer, if its layers have exactly one such number; otherwise None.

    Example:
        >>> known_size(nn.Sequential(nn.Linear(2, 8), nn.Embedding(256, 8)))
        256
    """
    values = {vars(layer).get(name) for layer in network.modules() for name in SIZES}
    found = {value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 1}
    return found.pop() if len(found) == 1 else None
