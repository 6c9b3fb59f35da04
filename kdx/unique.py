"""UniCAM: maps of what a student has and its base lacks, and the reverse.

One closed form serves both ways to use it: every image is explained with the members of a set of
images, be it a fixed :class:`Reference` or the batch that it came in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kdx import distance
from kdx.saliency import METHODS, activations, agreement
from kdx.tokens import to_grid
from kdx.tracing import stages

NETWORKS = ("student", "base")
DIRECTIONS = {"distilled": (0, 1), "residual": (1, 0)}  # which of NETWORKS is explained, given which


@dataclass(frozen=True)
class UniCAM:
    """Maps of what one network holds and the other lacks, per stage.

    Attributes
    ----------
    distilled, residual : stage -> raw float32 map (n, h, w) >= 0 of the student's features that
        the base lacks, at the student's resolution; and the reverse, at the base's.
    semipartial, partial : direction -> stage -> bias-corrected squared distance correlation with
        the labels of the explained network's features, given the other network's, over the
        reference set (or the batch); in [-1, 1].
    stability : direction -> stage -> (n,) correlation over pixels, in [-1, 1], of the maps from
        two disjoint halves of the reference set. NaN where a half holds fewer than 5 images or
        a map is constant.
    """

    distilled: dict[str, Tensor]
    residual: dict[str, Tensor]
    semipartial: dict[str, dict[str, float]]
    partial: dict[str, dict[str, float]]
    stability: dict[str, dict[str, Tensor]]


class Reference:
    """A fixed set of images against which others are explained, its features computed once.

    What a map shows depends on the images it is compared with; a large, class-balanced set (256
    or more, ``dataset.limit(256)``) makes it reproducible. The features of all stages of both
    networks stay in memory: 4 bytes each, for two ResNet-50 at 224 x 224 some 12 MB an image.

    Parameters
    ----------
    student, base : any CNNs; they run in evaluation mode and are left as they were found.
    images : (n, c, h, w) with n >= 5, normalised as the networks expect; a pair of tensors where
        student and base expect different inputs.
    labels : (n, m) label embeddings, one row an image (see :mod:`kdx.labels`).
    layers_student, layers_base : stage -> module name; None: :func:`kdx.stages`.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(12) % 3
    >>> reference = kdx.Reference(student, base, images, torch.eye(3)[labels])
    >>> maps = kdx.unicam(student, base, images[:1], torch.eye(3)[labels[:1]], reference=reference)
    >>> tuple(maps.distilled["L3"].shape), len(reference)
    ((1, 8, 8), 12)
    """

    def __init__(
        self,
        student: nn.Module,
        base: nn.Module,
        images: Tensor | tuple[Tensor, Tensor],
        labels: Tensor,
        *,
        layers_student: Mapping[str, str] | None = None,
        layers_base: Mapping[str, str] | None = None,
    ) -> None:
        self.networks = (student, base)
        pair = both_inputs(images)
        self.layers = tuple(
            stages(network, x) if layers is None else dict(layers)
            for network, x, layers in zip(self.networks, pair, (layers_student, layers_base), strict=True)
        )
        if set(self.layers[0]) != set(self.layers[1]):
            raise ValueError(
                f"expected the same stages in both networks, got {', '.join(self.layers[0])} of the student and "
                f"{', '.join(self.layers[1])} of the base; name them with layers_student and layers_base"
            )
        n = len(pair[0])
        if n < 5:
            raise ValueError(f"UniCAM needs at least 5 images to compare, got {n}")
        self.labels = _check_labels(labels, n).to(pair[0].device)
        self.inputs = pair
        features = self.features(*pair)
        d_labels = distance.distances(self.labels)
        if not distance.u_center(d_labels).any():
            raise ValueError(
                f"labels: the {n} embeddings are all equally far apart or coincide, so nothing can be relevant to "
                "them; use images of at least two classes, several of each"
            )
        self.stages = {name: _Stage.of(name, features[name], d_labels) for name in self.layers[0]}

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def members(self) -> dict[bytes, int]:
        return {digest: row for row, digest in enumerate(_digests(self.inputs[0]))}

    def features(self, *images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Stage -> activations (n, k, h, w) of student and base, from one forward pass of each."""
        captures = []
        for network, x, layers in zip(self.networks, images, self.layers, strict=True):
            found = activations(network, x, layers)
            captures.append({stage: to_grid(stage, layers[stage], output, x) for stage, output in found.items()})
        return {stage: (captures[0][stage].float(), captures[1][stage].float()) for stage in self.layers[0]}


@dataclass(frozen=True)
class _Stage:
    """One stage of both networks over the reference set."""

    name: str
    features: tuple[Tensor, Tensor]  # of student and base, (r, k, h, w)
    rows: list[distance.Rows]  # the same, flattened
    distances: Tensor  # (3, r, r): student, base, labels
    sets: list[_Moments]  # all rows, one half, the other half

    @classmethod
    def of(cls, name: str, features: tuple[Tensor, Tensor], d_labels: Tensor) -> _Stage:
        rows = []
        for network, x in zip(NETWORKS, features, strict=True):
            with _naming(f"{name} of the {network}"):
                rows.append(distance.Rows(x.flatten(1)))
        d = torch.stack([rows[0].all(), rows[1].all(), d_labels])
        everything = torch.arange(len(d_labels), device=d.device)
        return cls(name, features, rows, d, [_Moments.of(d, m) for m in (everything, *_halves(d_labels))])

    @cached_property
    def pooled(self) -> list[Tensor]:
        return [_pool(x) for x in self.features]

    def distances_to(self, features: tuple[Tensor, Tensor]) -> list[Tensor]:
        found = []
        for network, rows, x in zip(NETWORKS, self.rows, features, strict=True):
            with _naming(f"{self.name} of the {network}"):
                found.append(rows.to(x.flatten(1)))
        return found

    def correlation(self, statistic: str, direction: str) -> float:
        explained, given = DIRECTIONS[direction]
        order = torch.tensor([explained, 2, given])
        gram = self.sets[0].gram()[order][:, order]
        return float(distance.statistic_of(gram, statistic))

    def maps(
        self, features: tuple[Tensor, Tensor], d: Tensor, own: Tensor, method: str
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Direction -> maps (q, h, w) and their stability (q,), of queries with ``features`` and
        distances ``d`` (3, q, r) to the reference, of which they are the members ``own`` (q, r)."""
        weights = [subset.weights(d[:, :, subset.members], own[:, subset.members]) for subset in self.sets]
        enough = min(len(half.members) for half in self.sets[1:]) >= 5
        found = {}
        for direction, (explained, _) in DIRECTIONS.items():
            x, y = features[explained], self.features[explained]
            if method == "cam":
                pooled_y = self.pooled[explained]
                pooled_x = pooled_y if x is y else _pool(x)
            else:
                pooled_x, pooled_y = x.flatten(1), y.flatten(1)
            drawn = []
            for subset, of_subset in zip(self.sets, weights, strict=True):
                w = of_subset[direction].to(pooled_x.dtype)
                drawn.append(w.sum(1, keepdim=True) * pooled_x - w @ pooled_y[subset.members])  # L X
            if method == "cam":
                maps = torch.einsum("sqk,qkhw->sqhw", torch.stack(drawn).float(), x).relu()
            else:
                maps = torch.stack([(gradient.view_as(x) * x).sum(1) for gradient in drawn]).relu()
            stability = agreement(maps[1], maps[2]) if enough else torch.full_like(d[0, :, 0], math.nan)
            found[direction] = (maps[0], stability)
        return found


@dataclass(frozen=True)
class _Moments:
    """Sums over the distances of student, base and labels within a set of rows."""

    members: Tensor  # (r,)
    rows: Tensor  # (3, r)
    products: Tensor  # (3, 3)

    @classmethod
    def of(cls, d: Tensor, members: Tensor) -> _Moments:
        d = d[:, members][:, :, members]
        return cls(members, d.sum(2), torch.einsum("aij,bij->ab", d, d))

    def gram(self) -> Tensor:
        return distance.centred_products(
            self.products, self.rows @ self.rows.T, self.rows.sum(1), len(self.members), "unbiased"
        )

    def weights(self, d: Tensor, own: Tensor) -> dict[str, Tensor]:
        r"""How a map weighs the difference from each member: M of the closed form.

        The query joins the set (or is a member already); with its distances, r and its gradient
        follow from sums over the set in O(r) a query.

        Parameters
        ----------
        d : (3, q, r) distances from q queries to the members.
        own : (q, r) True where the query is that member.

        Returns
        -------
        direction -> (q, r) :math:`M_{qj} = 2\, (\partial r / \partial D_{qj}) / D_{qj}`, 0 where
        the features coincide.
        """
        joins = (~own.any(1)).double()  # (q,)
        n = len(self.members) + joins[:, None]  # (q, 1)
        sums = d.sum(2)  # (3, q), the query's own row
        rows = self.rows[:, None] + joins[:, None] * d  # (3, q, r)
        totals = self.rows.sum(1)[:, None] + 2 * joins * sums  # (3, q)
        products = self.products + 2 * joins[:, None, None] * torch.einsum("aqr,bqr->qab", d, d)
        row_products = torch.einsum("aqr,bqr->qab", rows, rows)
        row_products += joins[:, None, None] * torch.einsum("aq,bq->qab", sums, sums)
        gram = distance.centred_products(products, row_products, totals.T, n[:, :, None], "unbiased")

        centred = d - (sums[:, :, None] + rows) / (n - 2) + totals[:, :, None] / ((n - 1) * (n - 2))
        found = {}
        for direction, (explained, given) in DIRECTIONS.items():
            xx, zz, gg = (gram[:, i, i] for i in (explained, given, 2))
            xz, xg, zg = gram[:, explained, given], gram[:, explained, 2], gram[:, given, 2]
            per_z = torch.where(zz > 0, 1 / zz, 0.0)
            unique = distance.left_over(xx, xx - xz**2 * per_z)
            scale = torch.where((unique > 0) & (gg > 0), 1 / (unique * gg).sqrt(), 0.0)
            ratio = torch.where(unique > 0, (xg - xz * zg * per_z) / unique, 0.0)
            u = centred[explained] - (xz * per_z)[:, None] * centred[given]
            g = centred[2] - (zg * per_z)[:, None] * centred[given]
            gradient = scale[:, None] / (n * (n - 3)) * (g - ratio[:, None] * u)
            found[direction] = torch.where((d[explained] > 0) & ~own, 2 * gradient / d[explained], 0.0)
        return found


def unicam(
    student: nn.Module,
    base: nn.Module,
    images: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    reference: Reference | None = None,
    method: str = "cam",
    layers_student: Mapping[str, str] | None = None,
    layers_base: Mapping[str, str] | None = None,
    batch_size: int = 64,
) -> UniCAM:
    r"""UniCAM (Adhane et al. 2025): where a student's features relate to the labels in a way that
    the base's do not (*distilled*), and the reverse (*residual*).

    With :math:`U` the student's U-centred distance matrix projected orthogonally to the base's,
    the objective is the semi-partial correlation :math:`r = \cos(U, P_{labels})`, as in the
    authors' code (their text has the class score in its place). At each stage, with activations
    :math:`A` (n, k, h, w),

    .. math:: \beta_{ik} = \frac{1}{hw} \sum_{h,w} \frac{\partial r}{\partial A_{ikhw}}, \qquad
              \mathrm{map}_i = \mathrm{ReLU}\Big(\sum_k \beta_{ik} A_{ik}\Big).

    :math:`\partial r / \partial A` has a closed form, :math:`L A` with an n x n matrix L
    (:func:`kdx.distance.laplacian`), so one forward pass per network serves all stages and both
    directions, and no backward pass is needed.

    Parameters
    ----------
    student, base : any CNNs; their features and inputs may differ in size.
    images : (n, c, h, w), normalised as the networks expect; or a pair, student's and base's.
    labels : (n, m) label embeddings of the images.
    reference : explain each image on its own, together with this set; if it is a member, with
        the other members. None: the paper's way, all images of the batch together (n >= 5), where
        a map depends on its batch-mates.
    method : ``"cam"``: channel weights, as in the paper. ``"hires"``: gradient times activation
        element by element, then summed over channels (after HiResCAM, Draelos & Carin 2020).
    batch_size : images explained at a time with a reference, whose features are held at once.

    Raises
    ------
    ValueError : fewer than 5 images, labels that do not vary, stages that differ, NaN features.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(12) % 3
    >>> maps = kdx.unicam(student, base, images, torch.eye(3)[labels])
    >>> tuple(maps.distilled["L3"].shape), tuple(maps.residual["L4"].shape), bool((maps.residual["L4"] >= 0).all())
    ((12, 8, 8), (12, 4, 4), True)
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from: {', '.join(METHODS)}")
    pair = both_inputs(images)
    if reference is None:
        reference = Reference(student, base, pair, labels, layers_student=layers_student, layers_base=layers_base)
        own = torch.eye(len(reference), dtype=torch.bool, device=reference.labels.device)
        parts = [{s: stage.maps(stage.features, stage.distances, own, method) for s, stage in reference.stages.items()}]
    else:
        if (student, base) != reference.networks or layers_student or layers_base:
            raise ValueError("the reference was made with other networks, or has layers of its own; make one for these")
        labels, width = _check_labels(labels, len(pair[0])).to(reference.labels.device), reference.labels.shape[1]
        if labels.shape[1] != width:
            raise ValueError(f"labels: expected {width} features as in the reference, got {labels.shape[1]}")
        rows = torch.tensor([reference.members.get(digest, -1) for digest in _digests(pair[0])], device=labels.device)
        members = (rows >= 0).nonzero()[:, 0]
        if (wrong := members[(labels[members] != reference.labels[rows[members]]).any(1)]).numel():
            raise ValueError(f"images {wrong.tolist()} are members of the reference, where they have other labels")
        own = rows[:, None] == torch.arange(len(reference), device=labels.device)
        parts = []
        for x_student, x_base, y, members in zip(*(t.split(batch_size) for t in (*pair, labels, own)), strict=True):
            found = reference.features(x_student, x_base)
            d_labels = distance.cross_distances(y, reference.labels)
            parts.append(
                {
                    s: stage.maps(found[s], torch.stack([*stage.distances_to(found[s]), d_labels]), members, method)
                    for s, stage in reference.stages.items()
                }
            )

    def collect(direction: str, what: int) -> dict[str, Tensor]:
        return {s: torch.cat([part[s][direction][what] for part in parts]) for s in reference.stages}

    correlations = {
        name: {d: {s: stage.correlation(name, d) for s, stage in reference.stages.items()} for d in DIRECTIONS}
        for name in ("semipartial", "partial")
    }
    return UniCAM(
        distilled=collect("distilled", 0),
        residual=collect("residual", 0),
        **correlations,
        stability={direction: collect(direction, 1) for direction in DIRECTIONS},
    )


def _halves(d_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of the rows, each with half of every class (of coincident labels)."""
    by_class = (d_labels == 0).to(torch.uint8).argmax(1).argsort(stable=True)
    return by_class[::2].sort().values, by_class[1::2].sort().values


def _pool(x: Tensor) -> Tensor:
    """Means over space: (n, k, h, w) -> float64 (n, k)."""
    return x.mean((2, 3)).double()


def both_inputs(images: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What student and base are given: images, or a pair of as many."""
    pair = (images, images) if isinstance(images, Tensor) else tuple(images)
    if len(pair) != 2 or len(pair[0]) != len(pair[1]) or not len(pair[0]):
        raise ValueError(f"expected images, or a pair of as many, got {[tuple(x.shape) for x in pair]}")
    return pair


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy()).digest() for image in images.detach().float().cpu().contiguous()]


def _check_labels(labels: Tensor, n: int) -> Tensor:
    if labels.ndim != 2 or len(labels) != n:
        raise ValueError(
            f"labels: expected embeddings ({n}, m), one row an image, got {tuple(labels.shape)}; "
            "kdx.label_embeddings(classes)[labels] makes them"
        )
    if not labels.isfinite().all():
        raise ValueError("labels: expected finite embeddings, got NaN or infinity")
    return labels.double()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
