"""UniCAM: maps of the features that only one of two networks holds and that relate to the labels.

One closed form serves both ways to use it: every image is explained with the members of a set of images, either a
fixed :class:`kdx.Reference` or the batch that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx import distance
from kdx.explain.grad_cam import METHODS, agreement
from kdx.explain.reference import DIRECTIONS, NETWORKS, Reference, digests, inputs_of, naming, pool

Both = tuple[Tensor, ...]  # of student and base


@dataclass(frozen=True)
class UniCAM:
    """Maps of the features that one network holds and the other lacks, per stage.

    Attributes:
        distilled: Stage -> raw float32 map (n, h, w) >= 0 of the student's features that the base lacks, at the
            student's resolution.
        residual: Stage -> map of the base's features that the student lacks, at the base's resolution.
        semipartial: Direction -> stage -> bias-corrected squared semi-partial distance correlation with the labels of
            the explained network's features, given the other network's, over the reference set; in [-1, 1].
        partial: Likewise, the partial distance correlation.
        stability: Direction -> stage -> (n,) correlation over pixels, in [-1, 1], of the maps from two disjoint
            halves of the reference set. NaN where a half holds fewer than 5 images or a map is constant.
    """

    distilled: dict[str, Tensor]
    residual: dict[str, Tensor]
    semipartial: dict[str, dict[str, float]]
    partial: dict[str, dict[str, float]]
    stability: dict[str, dict[str, Tensor]]


def unicam(
    reference: Reference,
    labels: Tensor,
    images: Tensor | Both | None = None,
    image_labels: Tensor | None = None,
    *,
    method: str = "cam",
    batch_size: int = 64,
) -> UniCAM:
    r"""UniCAM (Adhane et al. 2025): where a student's features relate to the labels in a way that the base's do not
    (*distilled*), and the reverse (*residual*).

    With :math:`U` the student's U-centred distance matrix projected orthogonally to the base's, the objective is the
    semi-partial correlation :math:`r = \cos(U, P_{labels})`, as in the authors' code (their text has the class score
    in its place). At each stage, with activations :math:`A` (n, k, h, w),

    .. math:: \beta_{ik} = \frac{1}{hw} \sum_{h,w} \frac{\partial r}{\partial A_{ikhw}}, \qquad
              \mathrm{map}_i = \mathrm{ReLU}\Big(\sum_k \beta_{ik} A_{ik}\Big).

    :math:`\partial r / \partial A` has a closed form, :math:`L A` with an n x n matrix L
    (:func:`kdx.distance.laplacian`), so one forward pass per network serves all stages and both directions, and no
    backward pass is needed.

    Args:
        reference: The two networks, and the images with which others are explained.
        labels: (r, m) label embeddings of the reference's images, one row per image.
        images: (n, c, h, w), normalised as the networks expect, or a pair. Each is explained on its own, together
            with the reference; a member of the reference, with the same labels, with the other members. None explains
            the reference's own images with each other: the paper's way, where a map depends on the other images of its
            batch. An image may occur under several labels; images that coincide do not act on each other.
        image_labels: (n, m) label embeddings of ``images``.
        method: ``"cam"`` for channel weights, as in the paper; ``"hires"`` for gradient times activation element by
            element, then summed over channels (after HiResCAM, Draelos & Carin 2020).
        batch_size: Images explained at a time, whose features are held at once.

    Returns:
        Maps with their stability, and the correlations behind them.

    Raises:
        ValueError: Labels that do not vary or do not fit the images, NaN features, or networks whose weights changed
            since the reference was made.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.eye(3)[torch.arange(12) % 3]
        >>> batch = kdx.unicam(kdx.Reference(student, base, images), labels)
        >>> tuple(batch.distilled["L3"].shape), tuple(batch.residual["L4"].shape)
        ((12, 8, 8), (12, 4, 4))
        >>> one = kdx.unicam(kdx.Reference(student, base, images[1:]), labels[1:], images[:1], labels[:1])
        >>> bool((one.distilled["L3"] >= 0).all())
        True
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from: {', '.join(METHODS)}")
    if (images is None) != (image_labels is None):
        raise ValueError("expected images together with image_labels, or neither; got one of them")
    reference.check_weights()
    labels = _check_labels(labels, len(reference), "labels").to(reference.inputs[0].device)
    stages = _stages(reference, labels)
    if images is None or image_labels is None:
        own = torch.eye(len(reference), dtype=torch.bool, device=labels.device)
        parts = [{name: stage.maps(stage.features, stage.distances, own, method) for name, stage in stages.items()}]
    else:
        parts = _explain(reference, stages, labels, inputs_of(images), image_labels, method, batch_size)

    def collect(direction: str, what: int) -> dict[str, Tensor]:
        return {name: torch.cat([part[name][direction][what] for part in parts]) for name in stages}

    correlations = {
        name: {d: {s: stage.correlation(name, d) for s, stage in stages.items()} for d in DIRECTIONS}
        for name in ("semipartial", "partial")
    }
    return UniCAM(
        distilled=collect("distilled", 0),
        residual=collect("residual", 0),
        **correlations,
        stability={direction: collect(direction, 1) for direction in DIRECTIONS},
    )


def _stages(reference: Reference, labels: Tensor) -> dict[str, _Stage]:
    d_labels = distance.distances(labels)
    if not distance.u_center(d_labels).any():
        raise ValueError(
            f"labels: the {len(labels)} embeddings are all equally far apart or coincide, so nothing can be relevant "
            "to them; use images of at least two classes, several of each"
        )
    everything = torch.arange(len(labels), device=labels.device)
    members = (everything, *_halves(d_labels))
    found = {}
    for name, features in reference.features.items():
        d = torch.cat([reference.distances[name], d_labels[None]])
        moments = [_Moments.of(d, m) for m in members]
        found[name] = _Stage(name, features, reference.pooled[name], reference.rows[name], d, moments)
    return found


def _explain(
    reference: Reference,
    stages: Mapping[str, _Stage],
    labels: Tensor,
    pair: Both,
    image_labels: Tensor,
    method: str,
    batch_size: int,
) -> list[dict[str, dict[str, Both]]]:
    """Batch by batch: stage -> direction -> maps and stability."""
    image_labels = _check_labels(image_labels, len(pair[0]), "image_labels").to(labels.device)
    if image_labels.shape[1] != labels.shape[1]:
        raise ValueError(f"image_labels: expected {labels.shape[1]} features as in labels, got {image_labels.shape[1]}")
    copies = torch.zeros(len(pair[0]), len(reference), dtype=torch.bool, device=labels.device)
    for i, digest in enumerate(digests(pair[0])):
        copies[i, reference.members.get(digest, [])] = True
    parts = []
    for x_student, x_base, y, same in zip(*(t.split(batch_size) for t in (*pair, image_labels, copies)), strict=True):
        found = reference.features_of(x_student, x_base)
        d_labels = distance.cross_distances(y, labels)
        own = same & (d_labels == 0)
        maps = {}
        for name, stage in stages.items():
            d = torch.stack([*stage.distances_to(found[name]), d_labels])
            d[:2, same] = 0.0  # not the rounding of two forward passes
            maps[name] = stage.maps(found[name], d, own, method)
        parts.append(maps)
    return parts


@dataclass(frozen=True)
class _Stage:
    """One stage of both networks over the reference set."""

    name: str
    features: Both  # (r, k, h, w)
    pooled: Both  # their means over space, float64 (r, k)
    rows: list[distance.Rows]  # the same, flattened
    distances: Tensor  # (3, r, r): student, base, labels
    sets: list[_Moments]  # all rows, one half, the other half

    def distances_to(self, features: Both) -> list[Tensor]:
        found = []
        for network, rows, x in zip(NETWORKS, self.rows, features, strict=True):
            with naming(f"{self.name} of the {network}"):
                found.append(rows.to(x.flatten(1)))
        return found

    def correlation(self, statistic: str, direction: str) -> float:
        explained, given = DIRECTIONS[direction]
        order = torch.tensor([explained, 2, given])
        gram = self.sets[0].gram()[order][:, order]
        return float(distance.statistic_of(gram, statistic))

    def maps(self, features: Both, d: Tensor, own: Tensor, method: str) -> dict[str, Both]:
        """Direction -> maps (q, h, w) and their stability (q,).

        Args:
            features: Of q queries, (q, k, h, w).
            d: (3, q, r) distances of student, base and labels from the queries to the reference.
            own: (q, r) True where the query is that member of the reference.
            method: As for :func:`unicam`.
        """
        weights = [subset.weights(d[:, :, subset.members], own[:, subset.members]) for subset in self.sets]
        enough = min(len(half.members) for half in self.sets[1:]) >= 5
        found: dict[str, Both] = {}
        for direction, (explained, _) in DIRECTIONS.items():
            x, y = features[explained], self.features[explained]
            if method == "cam":
                pooled_y = self.pooled[explained]
                pooled_x = pooled_y if x is y else pool(x)
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
        r"""The weight of the difference from each member in a map: M of the closed form.

        The query joins the set (or is a member already). With its distances, r and its gradient follow from sums over
        the set in O(r) per query.

        Args:
            d: (3, q, r) distances from q queries to the members.
            own: (q, r) True where the query is that member.

        Returns:
            Direction -> (q, r) :math:`M_{qj} = 2\, (\partial r / \partial D_{qj}) / D_{qj}`, 0 where the features
            coincide.
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


def _halves(d_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of the rows, each with half of every class (of coincident labels)."""
    by_class = (d_labels == 0).to(torch.uint8).argmax(1).argsort(stable=True)
    return by_class[::2].sort().values, by_class[1::2].sort().values


def _check_labels(labels: Tensor, n: int, name: str) -> Tensor:
    if labels.ndim != 2 or len(labels) != n:
        raise ValueError(
            f"{name}: expected embeddings ({n}, m), one row per image, got {tuple(labels.shape)}; "
            "kdx.label_embeddings(classes)[labels] makes them"
        )
    if not labels.isfinite().all():
        raise ValueError(f"{name}: expected finite embeddings, got NaN or infinity")
    return labels.double()
