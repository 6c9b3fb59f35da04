"""How similar and how relevant features are: FSS, RS and unique RS, with their inference.

Each score is the mean over class-balanced batches of a squared distance correlation, with a 95 %
t interval over the batches and a permutation p-value. A table has one row per stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kdx import distance
from kdx.intervals import mean_interval
from kdx.perturb import perturb
from kdx.saliency import activations, grad_cam
from kdx.tracing import stages
from kdx.unique import DIRECTIONS, unicam

FEATURES = ("raw", "grad_cam", "unicam")


class DegenerateWarning(UserWarning):
    """A score is NaN because the features of some batch do not vary."""


def rs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    *,
    features: str = "raw",
    other: nn.Module | None = None,
    batches: int = 16,
    batch_size: int = 128,
    estimator: str = "unbiased",
    permutations: int | None = None,
    keep: float = 0.5,
    layers: Mapping[str, str] | None = None,
    layers_other: Mapping[str, str] | None = None,
    seed: int = 0,
    kept: dict[Any, Any] | None = None,
) -> pd.DataFrame:
    r"""Relevance score (Adhane et al. 2025, eq. 9): how a stage's features relate to the labels.

    .. math:: \mathrm{RS} = \frac{1}{k} \sum_{b=1}^{k} R^{*2}(\hat x_b, g_b)

    With two classes it does not depend on the embeddings, since distance correlation does not
    see their scale.

    Parameters
    ----------
    images : (n, c, h, w), normalised as the network expects, on its device.
    labels : (n,) class indices; they balance the batches.
    embeddings : (classes, m), see :func:`kdx.label_embeddings`.
    features : ``"raw"``: of the images as they are. ``"grad_cam"``: of each image with the
        ``keep`` most salient fraction of its pixels by the stage's Grad-CAM map of the predicted
        class, the others imputed (:func:`kdx.perturb`). ``"unicam"``: the same by the UniCAM map of
        what ``model`` holds and ``other`` lacks: give (student, base) for distilled features,
        (base, student) for residual ones.
    batches, batch_size : as many as the smallest class allows; batch_size >= 5.
    estimator : ``"unbiased"`` (what the authors' code runs), ``"biased"``, or ``"paper"``: the
        biased statistic, as the paper's text defines it.
    permutations : of the labels within each batch, for p. UniCAM maps are made with the labels;
        there every permutation makes the maps, imputes and runs the network anew, and p by
        default is not computed: None stands for 999, with ``"unicam"`` for 0.
    kept : a dict of the caller, in which distance matrices are kept and found again. Calls of
        ``rs``, ``fss`` and ``unique_rs`` that share it run each network once for the same images,
        features and settings; the networks must not change between them.

    Returns
    -------
    DataFrame : stage, value, low, high, p, floor (the smallest p to expect), n (images a batch),
        batches, estimator, features, permutations. NaN, with a :class:`DegenerateWarning`, where
        the features of a batch do not vary.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(24) % 3
    >>> kdx.rs(student, images, labels, torch.eye(3), batches=2, batch_size=12, permutations=19).shape
    (4, 11)
    """
    estimator = _check_estimator(estimator, paper="biased")
    if (features == "unicam") != (other is not None):
        raise ValueError(f"features {features!r} expects other={'a network' if features == 'unicam' else None}")
    count = _count(permutations, features)
    table = _check_embeddings(embeddings, images, labels)
    layers = stages(model, images) if layers is None else layers
    found = _Found(list(layers))

    def perturbed(x: Tensor, g: Tensor) -> Tensor:
        assert other is not None
        maps = unicam(model, other, x, g, layers_student=layers, layers_base=layers_other).distilled
        return _centred(model, x, layers, maps, keep, estimator, seed)

    alone = _Alone(images, labels, batches, batch_size, features, keep, estimator, seed, kept)
    for b, rows in enumerate(balanced_batches(labels, batches, batch_size, seed)):
        x, g = images[rows], table[labels[rows]].to(images.device)
        p_g = distance.center(g, estimator)

        p_x = perturbed(x, g) if features == "unicam" else alone.centred(model, layers, b, rows)
        drawn = None
        if count:
            orders = distance.random_permutations(len(rows), count, seed + b)
            if features == "unicam":
                drawn = torch.stack([_cosines(perturbed(x, g[o]), distance.center(g[o], estimator)) for o in orders], 1)
            else:
                drawn = distance.permuted_cosines(p_x, p_g, orders)
        found.add(_cosines(p_x, p_g), drawn, distance.tied_share(distance.distances(g)))
    return found.table(batch_size, estimator, features, count)


def fss(
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    features: str = "raw",
    embeddings: Tensor | None = None,
    batches: int = 16,
    batch_size: int = 128,
    estimator: str = "unbiased",
    permutations: int | None = None,
    keep: float = 0.5,
    layers_student: Mapping[str, str] | None = None,
    layers_base: Mapping[str, str] | None = None,
    seed: int = 0,
    kept: dict[Any, Any] | None = None,
) -> pd.DataFrame:
    r"""Feature similarity score (Adhane et al. 2025, eq. 8): how alike two networks see a batch.

    .. math:: \mathrm{FSS} = \frac{1}{k} \sum_{b=1}^{k} R^{*2}(\hat x_{s,b}, \hat x_{b,b})

    Parameters and result are those of :func:`rs`, except

    Parameters
    ----------
    features : with ``"unicam"``, which needs ``embeddings``, the student's distilled features are
        compared with the base's residual ones. Both maps come from the pairing that a permutation
        would break, so no p is given.
    estimator : ``"paper"``: the biased statistic of rows scaled to unit length, as the authors'
        code computes it.
    permutations : of the images of the base within each batch.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(24) % 3
    >>> table = kdx.fss(student, base, images, labels, batches=2, batch_size=12, permutations=0)
    >>> table["stage"].tolist(), bool((table["value"] > 0).all())
    (['L1', 'L2', 'L3', 'L4'], True)
    """
    _check_estimator(estimator)
    count = _count(permutations, features)
    if features == "unicam" and count:
        raise ValueError("features 'unicam' have no valid permutation test in fss; leave permutations out")
    if (features == "unicam") != (embeddings is not None):
        raise ValueError(f"features {features!r}: expected embeddings only with 'unicam', got {embeddings is not None}")
    table = None if embeddings is None else _check_embeddings(embeddings, images, labels)
    layers_student = stages(student, images) if layers_student is None else layers_student
    layers_base = stages(base, images) if layers_base is None else layers_base
    _check_stages(layers_student, layers_base)
    layers_base = {s: layers_base[s] for s in layers_student}
    alone = _Alone(images, labels, batches, batch_size, features, keep, estimator, seed, kept)
    found = _Found(list(layers_student))
    for b, rows in enumerate(balanced_batches(labels, batches, batch_size, seed)):
        if table is None:
            p_s, p_b = alone.centred(student, layers_student, b, rows), alone.centred(base, layers_base, b, rows)
        else:
            x, g = images[rows], table[labels[rows]].to(images.device)
            maps = unicam(student, base, x, g, layers_student=layers_student, layers_base=layers_base)
            p_s = _centred(student, x, layers_student, maps.distilled, keep, estimator, seed)
            p_b = _centred(base, x, layers_base, maps.residual, keep, estimator, seed)
        drawn = None
        if count:
            orders = distance.random_permutations(len(rows), count, seed + b)
            pairs = zip(p_s, p_b, strict=True)
            drawn = torch.cat([distance.permuted_cosines(one[None], two, orders) for one, two in pairs])
        found.add(_cosines(p_s, p_b), drawn, 0.0)
    return found.table(batch_size, estimator, features, count)


def unique_rs(
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    *,
    batches: int = 16,
    batch_size: int = 128,
    permutations: int = 999,
    layers_student: Mapping[str, str] | None = None,
    layers_base: Mapping[str, str] | None = None,
    seed: int = 0,
    kept: dict[Any, Any] | None = None,
) -> pd.DataFrame:
    """Relevance of what only one of two networks holds, without the circle of using the labels
    twice: the semi-partial and partial correlations with the labels, of raw features.

    p is for the hypothesis that the labels have nothing to do with what either network holds. It
    does not test whether anything is unique: of two networks that hold the same and add noise of
    their own, each relates to the labels given the other. Compare with a second base.

    *Distilled*: of the student's features given the base's; *residual*: of the base's given the
    student's. Parameters are those of :func:`rs`; the labels' centred matrix (its part orthogonal to
    the given network's, for partial) is permuted.

    Returns
    -------
    DataFrame : as of :func:`rs`, with the columns direction and statistic.

    Examples
    --------
    >>> import kdx, torch
    >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
    >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(24) % 3
    >>> table = kdx.unique_rs(student, base, images, labels, torch.eye(3), batches=2, batch_size=12, permutations=0)
    >>> table["direction"].unique().tolist(), table["statistic"].unique().tolist()
    (['distilled', 'residual'], ['semipartial', 'partial'])
    """
    count = _count(permutations, "raw")
    table = _check_embeddings(embeddings, images, labels)
    layers = (
        stages(student, images) if layers_student is None else layers_student,
        stages(base, images) if layers_base is None else layers_base,
    )
    _check_stages(*layers)
    names = list(layers[0])
    kinds = [(direction, statistic) for direction in DIRECTIONS for statistic in ("semipartial", "partial")]
    found = {kind: _Found(names) for kind in kinds}
    alone = _Alone(images, labels, batches, batch_size, "raw", 1.0, "unbiased", seed, kept)
    for b, rows in enumerate(balanced_batches(labels, batches, batch_size, seed)):
        g = table[labels[rows]].to(images.device)
        p_g = distance.center(g)
        centred = [
            alone.centred(network, {s: layer[s] for s in names}, b, rows)
            for network, layer in zip((student, base), layers, strict=True)
        ]
        orders = distance.random_permutations(len(rows), count, seed + b) if count else None
        tied = distance.tied_share(distance.distances(g))
        for direction, (explained, given) in DIRECTIONS.items():
            pairs = list(zip(centred[explained], centred[given], strict=True))
            unique = torch.stack([distance.project(p, q) for p, q in pairs])
            labels_of = {"semipartial": [p_g] * len(names), "partial": [distance.project(p_g, q) for _, q in pairs]}
            for statistic, targets in labels_of.items():
                values = _cosines(unique, torch.stack(targets))
                drawn = None
                if orders is not None and statistic == "semipartial":
                    drawn = distance.permuted_cosines(unique, p_g, orders)
                elif orders is not None:
                    drawn = torch.cat(
                        [distance.permuted_cosines(u[None], t, orders) for u, t in zip(unique, targets, strict=True)]
                    )
                found[direction, statistic].add(values, drawn, tied if statistic == "semipartial" else 0.0)
    tables = [
        found[kind].table(batch_size, "unbiased", "raw", count).assign(direction=kind[0], statistic=kind[1])
        for kind in kinds
    ]
    return pd.concat(tables, ignore_index=True)


def balanced_batches(labels: Tensor, batches: int, batch_size: int, seed: int = 0) -> list[Tensor]:
    """Rows of disjoint random batches with the same number of images of each class, to one.

    Raises ValueError if the smallest class is too small for that.
    """
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise ValueError(f"labels: expected class indices (n,), got {labels.dtype} {tuple(labels.shape)}")
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2:
        raise ValueError(f"labels: expected images of at least two classes, got {len(labels)} of one class")
    if batches < 2 or batch_size < 5:
        raise ValueError(f"expected at least 2 batches of at least 5 images, got {batches} of {batch_size}")
    if batches * batch_size > int(counts.min()) * len(counts):
        raise ValueError(
            f"{batches} balanced batches of {batch_size} need more images than {int(counts.min())} of the smallest of "
            f"{len(counts)} classes; lower batches or batch_size"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    members = shuffled[:, None] == shuffled.unique()
    rank = (members.cumsum(0) * members).sum(1)  # of an image within its class, in this order
    by_turns = (rank * len(counts) + members.int().argmax(1)).argsort()  # one image of each class after the other
    balanced = order[by_turns][: batches * batch_size]
    return [rows.to(labels.device) for rows in balanced.split(batch_size)]


def scorable(labels: Tensor, batches: int, most: int = 128) -> tuple[Tensor, int]:
    """Rows of the largest set of classes that fill balanced batches best, and how large these can be.

    Raises
    ------
    ValueError : not even for batches of 8 images.
    """
    classes, counts = labels.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    usable = counts[order] * torch.arange(1, len(order) + 1)
    best = int(usable[1:].argmax()) + 1 if len(order) > 1 else 0
    size = min(most, int(usable[best]) // batches)
    if best < 1 or size < 8:
        raise ValueError(
            f"too few images for {batches} class-balanced batches of 8 or more, by class: "
            f"{', '.join(map(str, counts.tolist()))}; give more images, or lower batches"
        )
    return torch.isin(labels, classes[order[: best + 1]]).nonzero()[:, 0], size


# --- the pieces ------------------------------------------------------------------------------


class _Found:
    """Values of the batches, and what permutations gave in their place."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.values: list[Tensor] = []  # (stages,) a batch
        self.drawn: list[Tensor] = []  # (stages, B) a batch
        self.share = 1.0  # of permutations, drawn in every batch on its own, that change nothing

    def add(self, values: Tensor, drawn: Tensor | None, share: float) -> None:
        self.values.append(values.cpu())
        if drawn is not None:
            self.drawn.append(drawn.cpu())
        self.share *= share

    def table(self, n: int, estimator: str, features: str, permutations: int) -> pd.DataFrame:
        values = torch.stack(self.values)  # (batches, stages)
        drawn = torch.stack(self.drawn).mean(0) if self.drawn else None
        rows = []
        for i, stage in enumerate(self.names):
            if values[:, i].isnan().any():
                warnings.warn(
                    f"{stage}: the score is NaN, because in a batch features do not vary or labels are all equally "
                    "far apart; use larger batches",
                    DegenerateWarning,
                    3,
                )
            mean = mean_interval(values[:, i].numpy())
            p = np.nan
            if drawn is not None and not np.isnan(mean.mean) and not drawn[i].isnan().any():
                p = distance.permutation_p(mean.mean, drawn[i])
            rows.append({"stage": stage, "value": mean.mean, "low": mean.low, "high": mean.high, "p": p})
        floor = distance.p_floor(self.share, permutations) if self.drawn else np.nan
        facts: dict[str, Any] = {"floor": floor, "n": n, "batches": len(values)}
        facts |= {"estimator": estimator, "features": features, "permutations": permutations}
        return pd.DataFrame(rows).assign(**facts)


@dataclass(frozen=True)
class _Alone:
    """Distance matrices of features that one network gives by itself, and where they are kept."""

    images: Tensor
    labels: Tensor
    batches: int
    batch_size: int
    features: str
    keep: float
    estimator: str
    seed: int
    kept: dict[Any, Any] | None

    def centred(self, model: nn.Module, layers: Mapping[str, str], b: int, rows: Tensor) -> Tensor:
        """Those of batch b, whose images are ``rows``: (stages, n, n)."""
        share = 1.0 if self.features == "raw" else self.keep
        setting = (self.batches, self.batch_size, self.features, share, self.estimator, self.seed)
        key = (model, self.images, self.labels, tuple(layers.items()), setting, b)
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        x = self.images[rows]
        maps = grad_cam(model, x, layers=layers) if self.features == "grad_cam" else None
        found = _centred(model, x, layers, maps, self.keep, self.estimator, self.seed)
        if self.kept is not None:
            self.kept[key] = found
        return found


def _centred(
    model: nn.Module,
    images: Tensor,
    layers: Mapping[str, str],
    maps: Mapping[str, Tensor] | None,
    keep: float,
    estimator: str,
    seed: int,
) -> Tensor:
    """Centred distance matrices (stages, n, n) of a network's features; zeros where they do not vary.

    With ``maps``, a stage's features are those of the images perturbed by the stage's map.
    """
    passes: Iterable[tuple[Mapping[str, str], Callable[[], Tensor]]] = [(layers, lambda: images)]
    if maps is not None:
        passes = [({s: layers[s]}, lambda s=s: perturb(images, maps[s], keep, seed=seed)) for s in layers]  # type: ignore[misc]
    found = {}
    for wanted, inputs in passes:
        for stage, activation in activations(model, inputs(), wanted).items():
            try:
                found[stage] = distance.center(activation, estimator)
            except ValueError as error:
                raise ValueError(f"{stage}: {error}") from error
    return torch.stack([found[stage] for stage in layers])


def _cosines(p: Tensor, q: Tensor) -> Tensor:
    """Cosines of (s, n, n) with (n, n) or (s, n, n): (s,); NaN where a matrix is 0."""
    p, q = p.flatten(1), q.flatten(-2)
    scale = p.norm(dim=-1) * q.norm(dim=-1)
    return torch.where(scale > 0, (p * q).sum(-1) / scale, torch.nan)


def _count(permutations: int | None, features: str) -> int:
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}; choose from: {', '.join(FEATURES)}")
    if permutations is None:
        return 0 if features == "unicam" else 999
    if permutations < 0:
        raise ValueError(f"permutations: expected 0 (no p) or more, got {permutations}")
    return permutations


def _check_estimator(estimator: str, paper: str = "paper") -> str:
    if estimator not in distance.ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose from: {', '.join(distance.ESTIMATORS)}")
    return paper if estimator == "paper" else estimator


def _check_stages(student: Mapping[str, str], base: Mapping[str, str]) -> None:
    if set(student) != set(base):
        raise ValueError(
            f"expected the same stages in both networks, got {', '.join(student)} of the student and "
            f"{', '.join(base)} of the base; name them with layers_student and layers_base"
        )


def _check_embeddings(embeddings: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    if len(images) != len(labels):
        raise ValueError(f"expected one label an image, got {len(images)} images and {len(labels)} labels")
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"labels: expected class indices (n,), got {labels.dtype} {tuple(labels.shape)}")
    if embeddings.ndim != 2 or not embeddings.isfinite().all():
        raise ValueError(f"embeddings: expected finite (classes, m), got {tuple(embeddings.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(embeddings)):
        raise ValueError(
            f"labels: expected classes 0 to {len(embeddings) - 1}, one per row of embeddings, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    used = embeddings[labels.unique().to(embeddings.device)]
    if len(used) > 1 and not distance.distances(used).any():
        raise ValueError("embeddings: those of all classes coincide, so nothing can be relevant to them")
    return embeddings.to(labels.device)
