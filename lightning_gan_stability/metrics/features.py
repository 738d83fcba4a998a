"""Building blocks of metrics: exact distances of all pairs in bounded memory, and spectra; plain torch."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_gan_stability._checks import describe

CHUNK = 2**22  # values in the largest intermediate: 32 MB of float64
NARROW = 32  # up to this width, differences are as quick as a matrix product
SPARE = 8  # neighbours looked at besides the k nearest
LARGEST = 1e150  # of a feature, since squares are summed
BLOCK = 256  # columns of symmetric and triangular products done at once


def checked(k: int = 0, least: int = 2, **features: Tensor) -> list[Tensor]:
    """Check features, and return them.

    Args:
        k: each needs more than k samples.
        least: and at least this many: two, or 0 for a batch of features that arrive later.
        features: (n, d) each.

    Raises:
        ValueError: if they are not floating point (n, d), have different widths, too few samples, or values that are
            not finite or whose squares are not.

    Example:
        >>> checked(fake=torch.zeros(1, 2))
        Traceback (most recent call last):
        ValueError: `fake` must have at least two samples, got 1.
    """
    for name, tensor in features.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`{name}` must be floating-point features of shape (n, d), got {describe(tensor)}.")
        if not tensor.is_floating_point() or tensor.dim() != 2 or not tensor.shape[1]:
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"`{name}` must be floating-point features of shape (n, d), got {what}.")
        if len(tensor) < least:
            raise ValueError(f"`{name}` must have at least two samples, got {len(tensor)}.")
        if len(tensor) <= k and least:
            raise ValueError(f"`{name}` must have more than k = {k} samples, got {len(tensor)}.")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"`{name}` has features that are not finite (NaN or infinite).")
        if tensor.dtype == torch.float64 and bool((tensor.abs() > LARGEST).any()):
            raise ValueError(f"`{name}` has features above {LARGEST:.0e}, whose squares are not finite: scale them.")
    widths = {name: tensor.shape[1] for name, tensor in features.items()}
    if len(set(widths.values())) > 1:
        text = " and ".join(f"`{name}` has {width}" for name, width in widths.items())
        raise ValueError(f"Features must have the same width, but {text}.")
    return [tensor.detach() for tensor in features.values()]


def rows_at_once(width: int) -> int:
    """The number of rows of a given width in a chunk."""
    return max(1, CHUNK // max(1, width))


class Pairs:
    """Euclidean distances between the rows of a and of b, chunk by chunk of a.

    Wide features are compared by a matrix product, whose rounding error is known. Pairs that it leaves in doubt are
    compared by their differences in float64, so that the same pair has the same distance everywhere.

    Args:
        a: (n, d).
        b: (m, d).
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.narrow = a.shape[1] <= NARROW
        self.a, self.b = (a.double(), b.double()) if self.narrow else (a, b)
        # products that autocast or TF32 round are not those whose rounding is known
        rounded = torch.is_autocast_enabled(a.device.type) or torch.get_float32_matmul_precision() != "highest"
        # nor are those whose squares leave the range of float32
        rounded |= not self.narrow and not 1e-15 < max(x.norm(math.inf).item() for x in (a, b)) < 1e15
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) or rounded else torch.float32
        center = b.mean(0, dtype=torch.float64).to(dtype)  # products of centred features lose least
        self.low_a, self.low_b = (x.to(dtype) - center for x in (a, b))
        self.norm_a, self.norm_b = (x.square().sum(1) for x in (self.low_a, self.low_b))
        # rounding of a product of d terms, relative to the sum of both squared norms
        self.rounding = (4 + math.sqrt(a.shape[1])) * torch.finfo(self.low_a.dtype).eps

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row of each chunk, and (rows, m): distances, or squared ones up to rounding if wide."""
        size = rows_at_once(len(self.b))
        for start in range(0, len(self.a), size):
            stop = start + size
            if self.narrow:
                mode = "donot_use_mm_for_euclid_dist"
                yield start, torch.cdist(self.a[start:stop], self.b, compute_mode=mode)
            else:
                products = torch.addmm(self.norm_b, self.low_a[start:stop], self.low_b.T, alpha=-2)
                yield start, products.add_(self.norm_a[start:stop, None])

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The distance of each pair of a row of a and a row of b."""
        size = rows_at_once(16 * self.a.shape[1])  # small parts stay in the processor's cache
        parts = zip(rows.split(size), columns.split(size), strict=True)  # type: ignore[no-untyped-call]
        if not len(rows):
            return self.a.new_empty(0, dtype=torch.float64)
        return torch.cat([(self.a[i].double() - self.b[j].double()).square().sum(1).sqrt() for i, j in parts])

    def within(self, start: int, low: Tensor, radii: Tensor, strict: bool = False) -> Tensor:
        """Which pairs of a chunk are at most (or less than) a radius apart, as a boolean tensor like ``low``.

        Args:
            start: the first row of the chunk.
            low: the result of :meth:`chunks`.
            radii: one per column (m,), or per row (rows, 1).
            strict: compare with less than, instead of at most.
        """
        if self.narrow:
            return low < radii if strict else low <= radii
        a, b, square = self.norm_a[start : start + len(low)], self.norm_b, radii.square()
        # a bound for each column or for each row alone, in the chunk's own type, takes two looks at the chunk
        slack = self.rounding * (b + a.max() if radii.dim() == 1 else a[:, None] + b.max())
        slack = slack + 2 * torch.finfo(low.dtype).eps * square
        inside = low < (square - slack).to(low.dtype)
        rows, columns = (low <= (square + slack).to(low.dtype)).logical_xor_(inside).nonzero(as_tuple=True)
        gap = low[rows, columns] - square.expand_as(low)[rows, columns]
        inside[rows, columns] = gap < 0
        doubtful = gap.abs() <= self.rounding * (a[rows] + b[columns])
        rows, columns = rows[doubtful], columns[doubtful]
        distance, radius = self.exact(rows + start, columns), radii.expand_as(low)[rows, columns]
        inside[rows, columns] = distance < radius if strict else distance <= radius
        return inside

    def radii(self, k: int) -> Tensor:
        """The distance (n,) of each row of a to its k-th nearest in b = a, not counting itself."""
        return torch.cat([self._radii(start, low, k) for start, low in self.chunks()])

    def nearest(self, k: int = 1, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances and rows, (n, k) each, of the k nearest in b to each row of a, nearest first; ties are arbitrary.

        Args:
            k: number of neighbours.
            own: (n,), for each row of a the row of b that is not counted; None: count all.
        """
        parts = [self._nearest(start, low, k, own) for start, low in self.chunks()]
        distances, rows = (torch.cat(part) for part in zip(*parts, strict=True))
        return distances, rows

    def _nearest(self, start: int, low: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(start, start + len(low), device=low.device)
        if own is not None:
            low[rows - start, own[rows]] = math.inf
        if self.narrow:
            near = low.topk(k, dim=1, largest=False)
            return near.values, near.indices
        count = min(k + SPARE, low.shape[1])
        near = low.topk(count, dim=1, largest=False)
        exact = self.exact(rows.repeat_interleave(count), near.indices.flatten()).reshape(-1, count)
        exact[near.values.isinf()] = math.inf
        distances, order = exact.topk(k, dim=1, largest=False)
        found = near.indices.gather(1, order)
        # rows whose other distances, as far as the product knows them, may be as small
        doubt = self.rounding * (self.norm_a[rows] + self.norm_b.max())
        doubtful = (near.values[:, -1] - doubt <= distances[:, -1].square()) & (distances[:, -1] > 0)
        left = doubtful.nonzero().flatten()
        if count == low.shape[1] or not len(left):
            return distances, found
        others = None if own is None else own[rows[left]]
        if low.dtype == torch.float32:  # products in float64 leave less in doubt
            distances[left], found[left] = Pairs(self.a[rows[left]].double(), self.b).nearest(k, others)
            return distances, found
        for part in left.split(rows_at_once(self.b.numel())):  # type: ignore[no-untyped-call]
            all_of_them = (self.a[rows[part], None].double() - self.b.double()).square().sum(2).sqrt()
            if own is not None:
                all_of_them[torch.arange(len(part), device=low.device), own[rows[part]]] = math.inf
            distances[part], found[part] = all_of_them.topk(k, dim=1, largest=False)
        return distances, found

    def _radii(self, start: int, low: Tensor, k: int) -> Tensor:
        if self.narrow:
            return low.kthvalue(k + 1, dim=1).values
        count = min(k + 1 + SPARE, low.shape[1])
        near = low.topk(count, dim=1, largest=False)
        rows = torch.arange(start, start + len(low), device=low.device)
        radii = self.exact(rows, near.indices[:, k])
        # rows where the product does not say which is the k-th neighbour: the next ones are as near, as far as it knows
        doubt = 2 * self.rounding * (self.norm_a[start : start + len(low)] + self.norm_b.max())
        apart = near.values.diff(dim=1)[:, k - 1 : k + 1] > doubt[:, None]
        unsure = apart.logical_not().any(1).nonzero().flatten()
        distances = self.exact(rows[unsure].repeat_interleave(count), near.indices[unsure].flatten())
        radii[unsure] = distances.reshape(-1, count).kthvalue(k + 1, dim=1).values
        # and where these are not all that may be it: duplicates, above all
        doubtful = (near.values[:, -1] <= near.values[:, k] + doubt) & (radii > 0)
        left = doubtful.nonzero().flatten() + start
        if count == low.shape[1] or not len(left):
            return radii
        if low.dtype == torch.float32:  # products in float64 leave less in doubt
            radii[left - start] = Pairs(self.a[left].double(), self.b).radii(k)
            return radii
        for part in left.split(rows_at_once(self.b.numel())):  # type: ignore[no-untyped-call]
            whole = (self.a[part, None].double() - self.b.double()).square().sum(2).sqrt()
            radii[part - start] = whole.kthvalue(k + 1, dim=1).values
        return radii


def distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of x, and the number of copies of each, in float64.

    Example:
        >>> distinct(torch.tensor([[1.0], [0.0], [1.0]]))[1]
        tensor([1., 2.], dtype=torch.float64)
    """
    rows, counts = torch.unique(x, dim=0, return_counts=True)
    return (x, counts.double().fill_(1)) if len(rows) == len(x) else (rows, counts.double())


def radii(points: Tensor, k: int) -> Tensor:
    """The distance of each of distinct points to the k-th nearest other one; 0 if there are fewer points."""
    return Pairs(points, points).radii(k) if len(points) > k else points.new_zeros(len(points), dtype=torch.float64)


def duplicates_of(x: Tensor, threshold: float) -> Tensor | None:
    """The pairs (2, p) of duplicates; None if there are too many to keep."""
    found, pairs = [], Pairs(x, x)
    radii = torch.full((len(x),), float(threshold), dtype=torch.float64, device=x.device)
    for start, low in pairs.chunks():
        rows, columns = pairs.within(start, low, radii).nonzero(as_tuple=True)
        later = columns > rows + start
        found.append(torch.stack([rows[later] + start, columns[later]]))
        if sum(part.shape[1] for part in found) > CHUNK // 32:
            return None
    return torch.cat(found, 1).cpu()


def first_duplicate(x: Tensor, order: Tensor, threshold: float) -> int:
    """The number of samples of an order until one comes twice, if many are alike."""
    seen = 16
    while True:
        duplicates = duplicates_of(x[order[:seen]], threshold)
        if duplicates is not None and duplicates.numel():
            return int(duplicates.amax(0).min()) + 1
        seen *= 2


def centred(features: Tensor) -> Tensor:
    """X with XᵀX the unbiased covariance, in float64."""
    features = features.double()
    return (features - features.mean(0)) / math.sqrt(len(features) - 1)


def gram(x: Tensor) -> Tensor:
    """XᵀX, of which only one half is computed."""
    product = x.new_empty(x.shape[1], x.shape[1])
    for i in range(0, len(product), BLOCK):
        rows = x[:, i : i + BLOCK].T @ x[:, i:]
        product[i : i + BLOCK, i:], product[i:, i : i + BLOCK] = rows, rows.T
    return product


def sandwich(lower: Tensor, symmetric: Tensor) -> Tensor:
    """The lower triangle of LᵀCL; blocks of zeros of L are skipped: a third of the cost of the two products."""
    starts = range(0, len(lower), BLOCK)
    right = torch.cat([symmetric[:, i:] @ lower[i:, i : i + BLOCK] for i in starts], dim=1)
    product = torch.zeros_like(lower)
    for i in starts:
        stop = i + BLOCK
        product[i:stop, :stop] = lower[i:, i:stop].T @ right[i:, :stop]
    return product


def factor(x: Tensor) -> Tensor:
    """R with RᵀR = XᵀX, with as few rows as possible."""
    return x if len(x) <= x.shape[1] else torch.linalg.qr(x, mode="r").R


def root(covariance: Tensor) -> Tensor:
    """R with RᵀR a covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    rows: Tensor = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return rows


def frechet(
    total: Tensor, covariances: tuple[Tensor, Tensor] | None, factors: Callable[[], tuple[Tensor, Tensor]]
) -> float:
    """total − 2 tr (C₁C₂)^½: eigenvalues of LᵀC₂L with C₁ = LLᵀ if that is exact enough, else singular values.

    The root of an eigenvalue has half of its digits; singular values of R₁R₂ᵀ, which are these roots, have all.
    """
    if covariances is not None:
        lower, info = torch.linalg.cholesky_ex(covariances[0])
        if not info:
            values = torch.linalg.eigvalsh(sandwich(lower, covariances[1])).clamp(min=0)
            distance = float(total - 2 * values.sqrt().sum())
            # what rounding of the eigenvalues may have done to the sum of their roots
            rounding = 16 * torch.finfo(values.dtype).eps * values[-1]
            error = torch.minimum(rounding / (2 * values.sqrt()), rounding.sqrt()).sum()
            if 2 * float(error) < 1e-7 * distance:
                return distance
    first, second = factors()
    return max(0.0, float(total - 2 * torch.linalg.svdvals(first @ second.T).sum()))


def mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD² of the cubic kernel."""
    n, m = len(x), len(y)
    within = _kernel_sum(x, x, True) / (n * (n - 1)) + _kernel_sum(y, y, True) / (m * (m - 1))
    return within - 2 * _kernel_sum(x, y) / (n * m)


def mmd_bias(x: Tensor, y: Tensor) -> float:
    """The expected increase of MMD² if pairs of a sample with itself are included."""
    bias = 0.0
    for z in (x, y):
        n, others = len(z), _kernel_sum(z, z, True)
        bias += ((_kernel_sum(z, z) - others) / n - others / (n * (n - 1))) / n
    return bias


def _kernel_sum(x: Tensor, y: Tensor, skip_diagonal: bool = False) -> float:
    total, size = 0.0, rows_at_once(len(y))
    for start in range(0, len(x), size):
        kernel = (x[start : start + size] @ y.T / x.shape[1] + 1) ** 3
        total += (kernel.sum() - (kernel.diagonal(start).sum() if skip_diagonal else 0)).item()
    return total
