"""Inference for distance correlations: permutation p-values, also given a third sample, and jackknife intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.distance import (
    ELEMENTS,
    STATISTICS,
    centred_products,
    cosine,
    distances,
    double_center,
    inner_products,
    project,
    sample,
    statistic_of,
    u_center,
)


@dataclass(frozen=True)
class Dependence:
    """A statistic with its inference.

    Attributes:
        value: The statistic.
        low, high: 95 % jackknife interval over the n samples, within [-1, 1].
        p: One-sided permutation p-value, (b + 1) / (B + 1).
        floor: The smallest p that B permutations and the ties among y's rows allow.
    """

    value: float
    low: float
    high: float
    p: float
    floor: float
    n: int
    permutations: int


def dependence(
    x: Tensor,
    y: Tensor,
    z: Tensor | None = None,
    *,
    statistic: str = "distance",
    estimator: str = "unbiased",
    permutations: int = 999,
    seed: int = 0,
) -> Dependence:
    """A statistic with a permutation p-value and a 95 % jackknife interval.

    The rows and columns of y's centred matrix (of its part orthogonal to z, for ``"partial"``)
    are permuted together. The interval is approximate: for n below a hundred it may hold the truth
    in nearer to 90 % of cases than 95 %. Memory is O(n²); n >= 5.

    p is for the hypothesis that y is independent of x *and z together*. It does not test whether x and y are
    independent given z: where z drives both of them, a partial or semi-partial correlation is small only if the
    relations are linear in distances, and p is far too small (for x = z + noise and y = z + noise, p <= 0.05 in about
    half of all samples). For that hypothesis see :func:`conditional_dependence`.

    Args:
        x: (n, ...), as for :mod:`kdx.distance`.
        y: Likewise.
        z: Likewise, with ``"partial"`` and ``"semipartial"``.
        statistic: ``"distance"`` of x and y; ``"partial"`` or ``"semipartial"`` given z.
        estimator: ``"unbiased"``, or another of :func:`kdx.distance.distance_correlation` with ``"distance"``.
        permutations: B, at least 1.
        seed: Draws them.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; choose from: {', '.join(STATISTICS)}")
    if (z is None) != (STATISTICS[statistic] == 2):
        came = 2 if z is None else 3
        raise ValueError(f"statistic {statistic!r} relates {STATISTICS[statistic]} samples, got {came} (argument z)")
    if statistic != "distance" and estimator != "unbiased":
        raise ValueError(f"the {statistic} statistic is defined for the unbiased estimator, got {estimator!r}")
    with torch.no_grad():
        samples = [sample(s, estimator) for s in (x, y, z) if s is not None]
        n = len(samples[0])
        if n < 5:
            raise ValueError(f"a jackknife interval needs at least 5 samples, got {n}")
        value = statistic_of(
            inner_products(*samples, estimator="unbiased" if estimator == "unbiased" else "biased"), statistic
        )
        d = torch.stack([distances(s) for s in samples])
        low, high = _jackknife(d, statistic, estimator)
        centring = u_center if estimator == "unbiased" else double_center
        p_x, p_y, *given = (centring(m) for m in d)
        for p_z in given:
            p_x = project(p_x, p_z)
            p_y = project(p_y, p_z) if statistic == "partial" else p_y
        drawn = permuted_cosines(p_x[None], p_y, random_permutations(n, permutations, seed))[0]
    return Dependence(
        float(value),
        max(low, -1.0),
        min(high, 1.0),
        permutation_p(float(cosine(p_x, p_y)), drawn),
        p_floor(0.0 if statistic == "partial" else tied_share(d[1]), permutations),
        n,
        permutations,
    )


def conditional_dependence(
    x: Tensor, y: Tensor, z: Tensor, *, size: int = 4, permutations: int = 999, seed: int = 0
) -> Dependence:
    r"""A test of whether x and y are dependent *given z*: a local permutation test (Kim et al. 2022) of residuals.

    Kernel ridge regression takes out of x and y what z predicts of their means; its kernel is that of the distances
    of z, and its strength has the least leave-one-out error. The statistic is the distance correlation of the two
    residuals. y's residuals are permuted only within strata of neighbours in z, so spread and shape may depend on z.

    Coincident rows of z are a stratum. If every stratum is, as with class labels for z, the test is exact: x and y are
    compared within classes. Otherwise it is approximate, and needs a z of few dimensions, or one that varies along
    few: neighbours must be alike. In simulations with n = 64 and z of one or two dimensions, linear or not, with equal
    or unequal spread, p <= 0.05 in 2 to 7 % of independent samples (``tests/benchmarks/error_rates.py``). **For z of
    many dimensions, such as the features of a network, no test can hold in general** (Shah & Peters 2020), and this
    one rejects too often where z predicts x and y better than the regression can learn from n rows. Compare with a
    control there.

    Args:
        x: (n, ...), as for :mod:`kdx.distance`; n >= 5.
        y: Likewise.
        z: Likewise.
        size: Largest stratum of rows that do not coincide, at least 2. Smaller is safer and less powerful.
        permutations: B, at least 1.
        seed: Draws them.

    Returns:
        The distance correlation of the residuals, with p. The jackknife interval treats the residuals as observed.

    Raises:
        ValueError: Samples of different lengths, fewer than 5 rows, or a stratum size below 2.
    """
    if size < 2:
        raise ValueError(f"size: expected at least 2 rows to permute, got {size}")
    samples = [sample(s, "unbiased") for s in (x, y, z)]
    n = len(samples[0])
    if n < 5 or {len(s) for s in samples} != {n}:
        raise ValueError(
            f"x, y, z: expected one length of at least 5 rows, got {', '.join(str(len(s)) for s in samples)}"
        )
    with torch.no_grad():
        d = torch.stack([distances(s) for s in samples])
        residuals = torch.stack([_residual_distances(each, d[2]) for each in d[:2]])
        p_x, p_y = (u_center(each) for each in residuals)
        value = float(cosine(p_x, p_y))
        groups = strata(d[2], size)
        drawn = permuted_cosines(p_x[None], p_y, _within(groups, n, permutations, seed))[0]
        low, high = _jackknife(residuals, "distance", "unbiased")
    share = math.exp(-sum(math.lgamma(len(rows) + 1) for rows in groups))
    floor = p_floor(share, permutations)
    return Dependence(value, max(low, -1.0), min(high, 1.0), permutation_p(value, drawn), floor, n, permutations)


def strata(d: Tensor, size: int) -> list[Tensor]:
    """Rows with distances ``d`` (n, n) in groups of neighbours: coincident rows together, and the others in groups of
    at most ``size``, by halving along the line between the two ends of a group."""
    twins = (d == 0).to(torch.uint8).argmax(1)
    kinds, place, counts = twins.unique(return_inverse=True, return_counts=True)
    groups = [(place == i).nonzero()[:, 0] for i in range(len(kinds)) if counts[i] > 1]
    waiting = [(counts[place] == 1).nonzero()[:, 0]]
    while waiting:
        rows = waiting.pop()
        if len(rows) <= size:
            groups.append(rows)
            continue
        own = d[rows][:, rows]
        first = own.sum(1).argmax()
        order = rows[(own[first] - own[own[first].argmax()]).argsort(stable=True)]
        waiting += order.tensor_split(2)
    return [rows for rows in groups if len(rows)]


def _within(groups: list[Tensor], n: int, count: int, seed: int) -> Tensor:
    """``count`` random permutations within groups: int64 (count, n)."""
    group = torch.empty(n, dtype=torch.long)
    for i, rows in enumerate(groups):
        group[rows.cpu()] = i
    if count < 1:
        raise ValueError(f"permutations: expected at least 1, got {count}")
    drawn = torch.rand(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orders = torch.empty(count, n, dtype=torch.long)
    orders[:, group.argsort(stable=True)] = (group + drawn).argsort(1)
    return orders


def _residual_distances(d: Tensor, given: Tensor) -> Tensor:
    """Distances (n, n) between the residuals of a sample, from its distances and those of what predicts it."""
    n = len(d)
    kernel, products = (double_center(each) / -2 for each in (given, d.square()))  # positive semi-definite, both
    values, vectors = torch.linalg.eigh(kernel)
    values, products = values.clamp(min=0), vectors.T @ products @ vectors
    found = []
    for strength in values.mean() * torch.logspace(-4, 3, 22, dtype=d.dtype, device=d.device):
        predicted = values / (values + strength).clamp(min=torch.finfo(d.dtype).tiny)
        keep = vectors * (1 - predicted)
        leverage = vectors.square() @ predicted + 1 / n
        found.append((float((((keep @ products) * keep).sum(1) / (1 - leverage).square()).sum()), keep))
    keep = min(found, key=lambda pair: pair[0])[1]
    rest = keep @ products @ keep.T
    own = rest.diagonal()
    return (own[:, None] + own - 2 * rest).clamp(min=0).sqrt().fill_diagonal_(0.0)


def random_permutations(n: int, count: int, seed: int) -> Tensor:
    """``count`` random permutations of n: int64 (count, n), the same on every device."""
    if count < 1:
        raise ValueError(f"permutations: expected at least 1, got {count}")
    return torch.rand(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).argsort(1)


def permuted_cosines(p: Tensor, q: Tensor, permutations: Tensor) -> Tensor:
    """Cosines of centred matrices ``p`` (s, n, n) with ``q`` (n, n) whose rows and columns are
    permuted together by each of ``permutations`` (B, n): (s, B)."""
    n = len(q)
    first = p.flatten(1) / p.flatten(1).norm(dim=1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    second = q / q.norm().clamp(min=torch.finfo(q.dtype).tiny)
    drawn = []
    for order in permutations.to(q.device).split(max(1, 8 * ELEMENTS // n**2)):
        rows = second[order]  # (b, n, n)
        both = rows.gather(2, order[:, None, :].expand(-1, n, -1))
        drawn.append(first @ both.flatten(1).T)
    return torch.cat(drawn, dim=1)


def permutation_p(observed: float, drawn: Tensor) -> float:
    """(b + 1) / (B + 1), with b the drawn values (B,) not below the observed one."""
    return (int((drawn >= observed - 1e-12).sum()) + 1) / (len(drawn) + 1)


def p_floor(share: float, permutations: int) -> float:
    """The smallest p to expect where a ``share`` of all permutations changes nothing; B random ones
    cannot give less than 1 / (B + 1)."""
    return max(1 / (permutations + 1), share)


def tied_share(d: Tensor) -> float:
    """The share of permutations that move rows only among coincident ones and so change nothing,
    from distances (n, n): :math:`\\prod_c n_c! \\,/\\, n!` over the groups of coincident rows.

    Those that swap whole groups may change nothing either, so with very few rows the share is larger, by up to c! for
    c groups.
    """
    first = (d == 0).to(torch.uint8).argmax(1)
    sizes = first.unique(return_counts=True)[1].double()
    return float((torch.lgamma(sizes + 1).sum() - math.lgamma(len(d) + 1)).exp())


def _jackknife(d: Tensor, statistic: str, estimator: str) -> tuple[float, float]:
    """95 % interval of a statistic of distances (m, n, n), from all n leave-one-out values.

    The sums without sample i follow from the sums with it, so all of them cost O(m² n²).
    """
    n = d.shape[1]
    rows = d.sum(2)  # (m, n)
    shared = torch.einsum("aij,bij->iab", d, d)  # (n, m, m)
    crossed = torch.einsum("aij,bj->iab", d, rows)
    own = torch.einsum("ai,bi->iab", rows, rows)
    products = shared.sum(0) - 2 * shared
    row_products = own.sum(0) - own - crossed - crossed.transpose(1, 2) + shared
    totals = (rows.sum(1)[:, None] - 2 * rows).T  # (n, m)
    values = statistic_of(centred_products(products, row_products, totals, n - 1, estimator), statistic)
    gram = centred_products(shared.sum(0), own.sum(0), rows.sum(1), n, estimator)
    half = 1.959964 * float(((n - 1) / n * (values - values.mean()).square().sum()).sqrt())
    value = float(statistic_of(gram, statistic))
    return value - half, value + half
