r"""Distance correlation of whole samples: exact, blockwise, with inference.

Everything here is *squared* and, unless asked otherwise, bias-corrected (Székely & Rizzo 2014),
so it may be negative. A sample is a tensor of n rows, (n,) or (n, ...), on any device and in any
dtype; what comes after the first dimension is flattened, and all sums are taken in float64.

With :math:`D_{ij} = \lVert x_i - x_j \rVert` and its U-centred form, for n > 2,

.. math:: P_{ij} = D_{ij} - \frac{D_{i\cdot} + D_{\cdot j}}{n-2} + \frac{D_{\cdot\cdot}}{(n-1)(n-2)}
          \quad (i \ne j), \qquad P_{ii} = 0, \qquad
          \langle P, Q \rangle = \frac{1}{n(n-3)} \sum_{i \ne j} P_{ij} Q_{ij},

every statistic is a cosine between such matrices, and follows from their inner products alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ESTIMATORS = ("unbiased", "biased", "paper")
STATISTICS = {"distance": 2, "partial": 3, "semipartial": 3}  # and how many samples they relate
ROWS, ELEMENTS = 256, 2**18  # of a block
ROUND_OFF = 1e-12  # a squared norm below this fraction of what it was cut from counts as 0


# --- distances -----------------------------------------------------------------------------


def distances(x: Tensor) -> Tensor:
    """Euclidean distances between all rows: (n, ...) -> float64 (n, n).

    They come from the Gram matrix of the centred rows, in blocks of features, so memory is
    O(n² + n·block); coincident rows are exactly 0 apart. Differentiable: a pair of coincident
    rows passes no gradient.
    """
    return _Distances.apply(_sample(x))


def cross_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances from each row of ``x`` (n, d) to each of ``y`` (m, d): float64 (n, m)."""
    x, rows = _sample(x), Rows(_sample(y))
    return torch.cat([rows.to(part) for part in x.split(ROWS)])


def laplacian(gradient: Tensor, d: Tensor) -> Tensor:
    r"""The matrix that turns a gradient by distances into one by the rows they come from.

    For r a function of :math:`D`, and :math:`W = \partial r / \partial D`,

    .. math:: \frac{\partial r}{\partial X} = L X, \qquad L = \mathrm{diag}(M 1) - M, \qquad
              M_{ij} = \frac{W_{ij} + W_{ji}}{D_{ij}} \text{ where } D_{ij} > 0 \text{, else } 0.

    Parameters: W and D, both (n, n). Returns L, (n, n).
    """
    m = torch.where(d > 0, (gradient + gradient.T) / d, 0.0)
    return torch.diag(m.sum(1)) - m


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        d = Rows(x).all()
        ctx.save_for_backward(x, d)
        return d

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, d = ctx.saved_tensors
        lx = laplacian(gradient, d)
        return torch.cat([(lx @ part.double()).to(x.dtype) for part in x.split(ELEMENTS // ROWS, dim=1)], dim=1)


class Rows:
    """Rows (n, d) from which distances are computed repeatedly.

    They are centred on their mean, which keeps the Gram matrix from losing the small distances
    among large norms.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.width = max(1, ELEMENTS // max(len(x), ROWS // 16))  # features of a block
        self.squares = x.new_zeros(len(x), dtype=torch.float64)
        self.gram = x.new_zeros(len(x), len(x), dtype=torch.float64) if len(x) <= ROWS else None
        means = []
        for block in x.split(self.width, dim=1):
            centred = block.to(torch.float64, copy=True)
            means.append(centred.mean(0))
            centred -= means[-1]
            if self.gram is None:
                self.squares += torch.linalg.vecdot(centred, centred)
            else:
                self.gram.addmm_(centred, centred.T)
        if self.gram is not None:
            self.squares = self.gram.diagonal()
        self.mean = torch.cat(means)
        self.whole = centred if len(means) == 1 else None
        _finite(x, self.squares)

    def parts(self, rows: slice) -> Iterator[Tensor]:
        """Blocks of the centred features of some rows."""
        return iter([self.whole[rows]]) if self.whole is not None else self.centred(self.x[rows])

    def centred(self, x: Tensor) -> Iterator[Tensor]:
        for part, mean in zip(x.split(self.width, dim=1), self.mean.split(self.width), strict=True):
            yield part.double() - mean

    def all(self) -> Tensor:
        """Distances (n, n) among these rows."""
        n = len(self.x)
        d = self.x.new_empty(n, n, dtype=torch.float64)
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            block = self.between(a, b)
            d[a:b, :b] = block
            d[:a, a:b] = block[:, :a].T
        return d

    def between(self, a: int, b: int) -> Tensor:
        """Distances (b - a, b) from rows a to b, to rows 0 to b."""
        squared = self.squares[a:b, None] + self.squares[:b]
        if self.gram is not None:
            squared -= 2 * self.gram[a:b, :b]
        else:
            for left, right in zip(self.parts(slice(a, b)), self.parts(slice(b)), strict=True):
                squared.addmm_(left, right.T, alpha=-2)
        squared.diagonal(a).fill_(math.inf)
        self._mend(squared, self.x[a:b], self.squares[a:b], diagonal=a)
        squared.diagonal(a).zero_()
        return squared.clamp_(min=0).sqrt_()

    def to(self, x: Tensor) -> Tensor:
        """Distances (k, n) from the rows ``x`` (k, d)."""
        if x.shape[1] != self.x.shape[1]:
            raise ValueError(f"expected rows of {self.x.shape[1]} features, got {x.shape[1]}")
        squares = x.new_zeros(len(x), dtype=torch.float64)
        product = x.new_zeros(len(x), len(self.x), dtype=torch.float64)
        for left, right in zip(self.centred(x), self.parts(slice(None)), strict=True):
            squares += torch.linalg.vecdot(left, left)
            product.addmm_(left, right.T)
        _finite(x, squares)
        squared = squares[:, None] + self.squares - 2 * product
        self._mend(squared, x, squares)
        return squared.clamp_(min=0).sqrt_()

    def _mend(self, squared: Tensor, x: Tensor, squares: Tensor, diagonal: int | None = None) -> None:
        """Recompute the entries that the cancellation of norms left with too few digits."""
        right = self.squares[: squared.shape[1]]
        if squared.amin() > 1e-10 * (squares.amax() + right.amax()):
            return
        near = squared <= 1e-10 * (squares[:, None] + right)
        if diagonal is not None:
            near.diagonal(diagonal).fill_(True)
        _exact(squared, near, x, self.x[: len(right)])


def _exact(squared: Tensor, near: Tensor, x: Tensor, y: Tensor) -> None:
    """Recompute the squared distances at ``near`` from the differences themselves.

    Rows equal to a common row of ``y`` are recognised first, because there are many of them when
    rows are labels.
    """
    first = near.to(torch.uint8).argmax(1)  # (k,): the first near row of y, for those that have one
    same = near.any(1) & (x == y[first]).all(1)
    twin = torch.where(same, first, -1)
    candidates = twin[same].unique()
    owner = torch.full((len(y),), -2, device=x.device)
    for row in candidates.tolist():
        members = near[same & (twin == row)][0].nonzero()[:, 0]
        owner[members[(y[members] == y[row]).all(1)]] = row
    equal = near & (twin[:, None] == owner)
    squared[equal] = 0.0
    for part in (near & ~equal).nonzero().split(max(1, 4 * ELEMENTS // x.shape[1])):
        i, j = part.T
        squared[i, j] = (x[i].double() - y[j].double()).square().sum(1)


def _lower_blocks(*samples: Tensor) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Rows a to b of the samples' distance matrices, columns 0 to b."""
    n = len(samples[0])
    rows = [Rows(x) for x in samples]
    for a in range(0, n, ROWS):
        b = min(a + ROWS, n)
        yield a, b, [r.between(a, b) for r in rows]


def _sample(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim == 0 or x.is_complex():
        raise ValueError(f"expected a real tensor (n, ...), got {getattr(x, 'shape', x)!r}")
    if x.device.type == "mps":  # which has no float64
        x = x.cpu()
    x = x.flatten(1) if x.ndim > 1 else x[:, None]
    if not x.shape[1]:
        raise ValueError(f"expected at least one feature, got {tuple(x.shape)}")
    return x


def _finite(x: Tensor, squares: Tensor) -> None:
    if squares.isfinite().all():
        return
    bad = (~x.isfinite().all(1)).nonzero()[:, 0].tolist()
    found = f"NaN or infinity in {len(bad)} of {len(x)} rows, the first of them row {bad[0]}" if bad else "an overflow"
    raise ValueError(f"expected finite features, got {found}")


# --- centring and inner products -------------------------------------------------------------


def u_center(d: Tensor) -> Tensor:
    """U-centring of distances (n, n), n > 2; all rows and columns of the result sum to 0."""
    n = _square(d, 3)
    rows = d.sum(1)
    p = d - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return _kept(p.masked_fill(torch.eye(n, dtype=torch.bool, device=d.device), 0.0), d)


def double_center(d: Tensor) -> Tensor:
    """Double centring of distances (n, n): minus row and column means, plus the grand mean."""
    _square(d, 2)
    rows = d.mean(1)
    return _kept(d - rows[:, None] - rows + rows.mean(), d)


def _square(d: Tensor, least: int) -> int:
    if d.ndim != 2 or d.shape[0] != d.shape[1] or len(d) < least:
        raise ValueError(f"expected distances (n, n) with n >= {least}, got {tuple(d.shape)}")
    return len(d)


def _kept(part: Tensor, whole: Tensor) -> Tensor:
    """A matrix cut from ``whole``, or zeros where only round-off is left of it."""
    return part * (part.square().sum() > ROUND_OFF * whole.square().sum())


def center(x: Tensor, estimator: str = "unbiased") -> Tensor:
    """The centred distance matrix (n, n) of a sample, whose cosines are the correlations."""
    x = sample(x, estimator)
    return u_center(distances(x)) if estimator == "unbiased" else double_center(distances(x))


def cosine(p: Tensor, q: Tensor) -> Tensor:
    """Cosine of two centred matrices; 0 where one of them is 0."""
    return _ratio((p * q).sum(), p.square().sum(), q.square().sum())


def project(p: Tensor, q: Tensor) -> Tensor:
    r"""The part of a centred matrix that is orthogonal to another:
    :math:`P - \frac{\langle P, Q \rangle}{\langle Q, Q \rangle} Q`; 0 where only round-off remains.
    """
    norm = q.square().sum()
    along = torch.where(norm > 0, (p * q).sum() / torch.where(norm > 0, norm, 1.0), 0.0)
    return _kept(p - along * q, p)


def sample(x: Tensor, estimator: str) -> Tensor:
    """Rows as the estimator takes them: (n, d), of unit length for ``"paper"``."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose from: {', '.join(ESTIMATORS)}")
    x = _sample(x)
    least = 4 if estimator == "unbiased" else 2
    if len(x) < least:
        raise ValueError(f"the {estimator} estimator needs at least {least} samples, got {len(x)}")
    return F.normalize(x.double()) if estimator == "paper" else x


def inner_products(*samples: Tensor, estimator: str = "unbiased") -> Tensor:
    """Inner products (m, m) of the centred distance matrices of m samples of n rows, in float64.

    Without gradients they are summed block by block, in O(n·block) memory, and no n x n matrix
    is ever held: n = 20,000 takes less than a gigabyte.
    """
    samples = tuple(sample(x, estimator) for x in samples)
    n = len(samples[0])
    if len({(len(x), x.device) for x in samples}) > 1:
        raise ValueError(
            f"expected samples of one length on one device, got {[(len(x), str(x.device)) for x in samples]}"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in samples):
        centred = torch.stack([center(x, "unbiased" if estimator == "unbiased" else "biased") for x in samples])
        return torch.einsum("aij,bij->ab", centred, centred) / (n * (n - 3) if estimator == "unbiased" else n**2)
    m = len(samples)
    products = samples[0].new_zeros(m, m, dtype=torch.float64)
    rows = samples[0].new_zeros(m, n, dtype=torch.float64)
    for a, b, blocks in _lower_blocks(*(x.detach() for x in samples)):
        for i, block in enumerate(blocks):  # (b - a, b); left of column a, every pair stands for two
            rows[i, a:b] += block.sum(1)
            rows[i, :a] += block[:, :a].sum(0)
            for j, other in enumerate(blocks[: i + 1]):
                products[i, j] += 2 * block.flatten().dot(other.flatten())
                products[i, j] -= block[:, a:].flatten().dot(other[:, a:].flatten())
    products = products.tril() + products.tril(-1).T
    return centred_products(products, rows @ rows.T, rows.sum(1), n, estimator)


def centred_products(products: Tensor, rows: Tensor, totals: Tensor, n: int | Tensor, estimator: str) -> Tensor:
    """Inner products of centred matrices from sums over plain distances.

    (..., m, m) sums of products of entries and of row sums, (..., m) totals -> (..., m, m).
    """
    outer = totals[..., :, None] * totals[..., None, :]
    if estimator == "unbiased":
        centred = products - 2 / (n - 2) * rows + outer / ((n - 1) * (n - 2))
    else:
        centred = products - 2 / n * rows + outer / n**2
    varies = centred.diagonal(dim1=-2, dim2=-1) > ROUND_OFF * products.diagonal(dim1=-2, dim2=-1)
    centred = centred * varies[..., :, None] * varies[..., None, :]
    return centred / (n * (n - 3) if estimator == "unbiased" else n**2)


# --- statistics ----------------------------------------------------------------------------


def distance_correlation(x: Tensor, y: Tensor, estimator: str = "unbiased") -> Tensor:
    r"""Squared distance correlation of two samples of n rows.

    .. math:: R^{*2}(x, y) = \frac{\langle P_x, P_y \rangle}
                                  {\sqrt{\langle P_x, P_x \rangle \langle P_y, P_y \rangle}}

    Args:
        x, y: (n, ...); the numbers of features may differ.
        estimator: ``"unbiased"``: bias-corrected, in [-1, 1], n >= 4. ``"biased"``: the V-statistic with double
            centring, in [0, 1]; it grows as n shrinks and as features are added. ``"paper"``: biased, of rows scaled to
            unit length, as the code of Adhane et al. (2025) compares student and base.

    Returns:
        float64 scalar, differentiable; 0 where a sample does not vary.

    Examples:
        >>> import torch
        >>> from kdx.distance import distance_correlation
        >>> x = torch.arange(20.0)[:, None]
        >>> round(float(distance_correlation(x, -3 * x)), 6)
        1.0
    """
    return statistic_of(inner_products(x, y, estimator=estimator), "distance")


def partial_distance_correlation(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    r"""Bias-corrected squared partial distance correlation of x and y given z (n >= 4).

    The cosine of :math:`P_x` and :math:`P_y`, both projected orthogonally to :math:`P_z`
    (Székely & Rizzo 2014, eq. 2.10). 0 does not imply conditional independence.
    """
    return statistic_of(inner_products(x, y, z), "partial")


def semipartial_distance_correlation(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The cosine of :math:`P_x`, projected orthogonally to :math:`P_z`, and :math:`P_y` itself.

    z is taken out of x alone. This is what the code of Adhane et al. (2025) computes under the
    name of partial distance correlation: x student, y labels, z base.
    """
    return statistic_of(inner_products(x, y, z), "semipartial")


def statistic_of(gram: Tensor, statistic: str) -> Tensor:
    """From the inner products (..., m, m) of x, y and, where the statistic has it, z."""
    xx, yy, xy = gram[..., 0, 0], gram[..., 1, 1], gram[..., 0, 1]
    if statistic == "distance":
        return _ratio(xy, xx, yy)
    zz, xz, yz = gram[..., 2, 2], gram[..., 0, 2], gram[..., 1, 2]
    per_z = torch.where(zz > 0, 1 / zz.clamp(min=torch.finfo(zz.dtype).tiny), 0.0)
    product = xy - xz * yz * per_z
    return _ratio(
        product, left_over(xx, xx - xz**2 * per_z), left_over(yy, yy - yz**2 * per_z) if statistic == "partial" else yy
    )


def left_over(whole: Tensor, part: Tensor) -> Tensor:
    """A squared norm, or 0 where it is but the round-off of what it was cut from."""
    return torch.where(part > ROUND_OFF * whole, part, 0.0)


def _ratio(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    scale = first.clamp(min=0).sqrt() * second.clamp(min=0).sqrt()
    zero = scale <= 0
    return torch.where(zero, 0.0, product / torch.where(zero, 1.0, scale))
