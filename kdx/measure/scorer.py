"""How similar and how relevant features are: FSS, RS and unique RS, with their inference.

Each score is the mean over class-balanced batches of a squared distance correlation, with a 95 % t interval over the
batches and a permutation p-value. A table has one row per stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kdx import distance, permutation
from kdx.data.batches import balanced_batches, class_indices
from kdx.explain.grad_cam import grad_cam
from kdx.explain.reference import DIRECTIONS, Reference, check_stages
from kdx.explain.road import perturb
from kdx.explain.unicam import unicam
from kdx.intervals import mean_interval
from kdx.networks.capture import activations
from kdx.networks.stages import stages

LINEAR = "linear"
FEATURES = ("raw", "grad_cam", "unicam")
Layers = Mapping[str, str]  # stage -> module name


class DegenerateWarning(UserWarning):
    """A score is NaN because the features of some batch do not vary."""


class Scorer:
    """Scores of several networks over the same images.

    Every network runs once per kind of features; its distance matrices are kept, so the networks must not change
    between calls.

    Args:
        networks: Name -> network; a name is anything hashable, such as ``"base"`` or ``("base", 1)``.
        images: (n, c, h, w), normalised as the networks expect, on their device.
        labels: (n,) class indices, which balance the batches.
        layers: Name -> stage -> module name; :func:`kdx.stages` for networks that are not listed.
        batches: Class-balanced batches, at least 2.
        batch_size: Images per batch, at least 5. The smallest class limits both.
        permutations: For p, within each batch; 0 for no p.
        estimator: ``"unbiased"`` (what the authors' code runs), ``"biased"``, or ``"paper"``: the biased statistic,
            in FSS of rows scaled to unit length, as the authors' code computes it.
        keep: Fraction of the pixels that a perturbed image keeps.
        seed: Draws the batches, the permutations and the imputation noise.

    Raises:
        ValueError: Images and labels that do not fit each other, or too few images for the batches.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> two = {"student": student, "base": base}
        >>> scorer = kdx.Scorer(two, images, torch.arange(24) % 3, batches=2, batch_size=12, permutations=19)
        >>> scorer.rs("student", torch.eye(3)).shape, scorer.fss("student", "base").shape
        ((4, 12), (4, 12))
    """

    def __init__(
        self,
        networks: Mapping[Any, nn.Module],
        images: Tensor,
        labels: Tensor,
        *,
        layers: Mapping[Any, Layers] | None = None,
        batches: int = 16,
        batch_size: int = 128,
        permutations: int = 999,
        estimator: str = "unbiased",
        keep: float = 0.5,
        seed: int = 0,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"expected one label per image, got {len(images)} images and {len(labels)} labels")
        if estimator not in distance.ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; choose from: {', '.join(distance.ESTIMATORS)}")
        if permutations < 0:
            raise ValueError(f"permutations: expected 0 (no p) or more, got {permutations}")
        self.networks, self.images, self.labels = networks, images, class_indices(labels)
        self.batches = balanced_batches(labels, batches, batch_size, seed)
        self.permutations, self.estimator, self.keep, self.seed = permutations, estimator, keep, seed
        self._layers: dict[Any, Layers] = dict(layers or {})
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def layers(self, network: Hashable) -> Layers:
        """Stage -> module name of a network."""
        if network not in self.networks:
            raise ValueError(f"unknown network {network!r}; choose from: {', '.join(map(str, self.networks))}")
        if network not in self._layers:
            self._layers[network] = stages(self.networks[network], self.images)
        return self._layers[network]

    def rs(
        self,
        network: Hashable,
        embeddings: Tensor,
        features: str = "raw",
        other: Hashable | None = None,
        permutations: int | None = None,
    ) -> pd.DataFrame:
        r"""Relevance score (Adhane et al. 2025, eq. 9): how a stage's features relate to the labels.

        .. math:: \mathrm{RS} = \frac{1}{k} \sum_{b=1}^{k} R^{*2}(\hat x_b, g_b)

        With two classes it does not depend on the embeddings, since distance correlation does not see their scale.

        Args:
            network: Name of the network.
            embeddings: (classes, m), see :func:`kdx.label_embeddings`.
            features: ``"raw"`` for the images as they are. ``"grad_cam"`` for each image with the ``keep`` most
                salient fraction of its pixels by the stage's Grad-CAM map of the predicted class, the others imputed
                (:func:`kdx.perturb`). ``"unicam"`` for the same by the UniCAM map of the features that ``network``
                holds and ``other`` lacks: (student, base) for distilled features, (base, student) for residual ones.
            other: Name of the other network, with ``"unicam"`` only.
            permutations: Of the labels within each batch; None takes the scorer's, and 0 with ``"unicam"``: those
                maps are made with the labels, so every permutation makes the maps, imputes and runs the network anew.

        Returns:
            stage, value, low, high, p, floor (the smallest p to expect), n (images per batch), batches, estimator,
            features, permutations, and parts: the scores (batches,) whose mean is the value, of the same batches for
            all networks. NaN, with a :class:`DegenerateWarning`, where the features of a batch do not vary.

        Raises:
            ValueError: Unknown names, or embeddings that do not fit the labels.
        """
        count = self._count(permutations, features)
        if (features == "unicam") != (other is not None):
            raise ValueError(f"features {features!r} expects other={'a network' if features == 'unicam' else None}")
        table = self._check_embeddings(embeddings)
        estimator = "biased" if self.estimator == "paper" else self.estimator
        found = _Found(list(self.layers(network)))
        for b, rows in enumerate(self.batches):
            g = table[self.labels[rows]].to(self.images.device)
            p_g = distance.center(g, estimator)
            if features == "unicam":
                p_x = self._distilled(network, other, rows, g, estimator)
            else:
                p_x = self._centred(network, b, features, estimator)
            drawn = None
            if count:
                orders = permutation.random_permutations(len(rows), count, self.seed + b)
                if features == "unicam":
                    anew = [(self._distilled(network, other, rows, g[o], estimator), g[o]) for o in orders]
                    drawn = torch.stack([_cosines(p, distance.center(of, estimator)) for p, of in anew], 1)
                else:
                    drawn = permutation.permuted_cosines(p_x, p_g, orders)
            found.add(_cosines(p_x, p_g), drawn, permutation.tied_share(distance.distances(g)))
        return found.table(len(self.batches[0]), estimator, features, count)

    def fss(
        self, student: Hashable, base: Hashable, features: str = "raw", embeddings: Tensor | None = None
    ) -> pd.DataFrame:
        r"""Feature similarity score (Adhane et al. 2025, eq. 8): how similarly two networks represent a batch.

        .. math:: \mathrm{FSS} = \frac{1}{k} \sum_{b=1}^{k} R^{*2}(\hat x_{s,b}, \hat x_{b,b})

        Args:
            student: Name of a network.
            base: Name of another.
            features: As for :meth:`rs`. With ``"unicam"``, the student's distilled features are compared with the
                base's residual ones. Both maps come from the pairing that a permutation would break, so no p is given.
            embeddings: (classes, m), with ``"unicam"`` only.

        Returns:
            As for :meth:`rs`; the images of the base are permuted within each batch.
        """
        self._count(None, features)
        if (features == "unicam") != (embeddings is not None):
            got = "none" if embeddings is None else "some"
            raise ValueError(f"embeddings: expected with features 'unicam' only, got {got} with {features!r}")
        table = None if embeddings is None else self._check_embeddings(embeddings)
        return self._similarity(student, base, features, table, self.estimator)

    def cka(self, student: Hashable, base: Hashable) -> pd.DataFrame:
        r"""Linear centred kernel alignment (Kornblith et al. 2019), by the unbiased estimator (Nguyen et al. 2021).

        As :meth:`fss`, with the inner products :math:`X X^\top` of a batch in place of its distances.
        """
        return self._similarity(student, base, "raw", None, LINEAR)

    def _similarity(
        self, student: Hashable, base: Hashable, features: str, table: Tensor | None, estimator: str
    ) -> pd.DataFrame:
        count = self._count(None, features)
        check_stages(self.layers(student), self.layers(base))
        found = _Found(list(self.layers(student)))
        for b, rows in enumerate(self.batches):
            if table is None:
                p_s = self._centred(student, b, features, estimator)
                p_b = self._centred(base, b, features, estimator, found.names)
            else:
                maps = unicam(self._reference(student, base, rows), table[self.labels[rows]].to(self.images.device))
                p_s = self._perturbed(student, rows, maps.distilled, estimator)
                p_b = self._perturbed(base, rows, maps.residual, estimator, found.names)
            drawn = None
            if count:
                orders = permutation.random_permutations(len(rows), count, self.seed + b)
                pairs = zip(p_s, p_b, strict=True)
                drawn = torch.cat([permutation.permuted_cosines(one[None], two, orders) for one, two in pairs])
            found.add(_cosines(p_s, p_b), drawn, 0.0)
        return found.table(len(self.batches[0]), estimator, features, count)

    def unique_rs(self, student: Hashable, base: Hashable, embeddings: Tensor) -> pd.DataFrame:
        """Relevance of the features that only one of two networks holds: the semi-partial and partial correlations of
        raw features with the labels, which use the labels only once.

        p is for the hypothesis that the labels are unrelated to the features of either network. It does not test
        whether anything is unique: of two networks that hold the same and add noise of their own, each relates to the
        labels given the other. Compare with a second base.

        Args:
            student: Name of a network. *Distilled* scores are of its features given the base's.
            base: Name of another. *Residual* scores are of its features given the student's.
            embeddings: (classes, m), see :func:`kdx.label_embeddings`. Their centred matrix (for partial, its part
                orthogonal to the given network's) is permuted.

        Returns:
            As for :meth:`rs`, with the columns direction and statistic. Always by the unbiased estimator.
        """
        table = self._check_embeddings(embeddings)
        check_stages(self.layers(student), self.layers(base))
        names = list(self.layers(student))
        found = {(d, statistic): _Found(names) for d in DIRECTIONS for statistic in ("semipartial", "partial")}
        for b, rows in enumerate(self.batches):
            g = table[self.labels[rows]].to(self.images.device)
            p_g, tied = distance.center(g), permutation.tied_share(distance.distances(g))
            both = [self._centred(network, b, "raw", "unbiased", names) for network in (student, base)]
            orders = None
            if self.permutations:
                orders = permutation.random_permutations(len(rows), self.permutations, self.seed + b)
            for direction, (explained, given) in DIRECTIONS.items():
                unique = torch.stack(
                    [distance.project(p, q) for p, q in zip(both[explained], both[given], strict=True)]
                )
                partial = torch.stack([distance.project(p_g, q) for q in both[given]])
                whole = None if orders is None else permutation.permuted_cosines(unique, p_g, orders)
                found[direction, "semipartial"].add(_cosines(unique, p_g), whole, tied)
                parts = None
                if orders is not None:
                    pairs = zip(unique, partial, strict=True)
                    parts = torch.cat([permutation.permuted_cosines(u[None], t, orders) for u, t in pairs])
                found[direction, "partial"].add(_cosines(unique, partial), parts, 0.0)
        tables = [
            of.table(len(self.batches[0]), "unbiased", "raw", self.permutations).assign(direction=d, statistic=s)
            for (d, s), of in found.items()
        ]
        return pd.concat(tables, ignore_index=True)

    def _count(self, permutations: int | None, features: str) -> int:
        if features not in FEATURES:
            raise ValueError(f"unknown features {features!r}; choose from: {', '.join(FEATURES)}")
        if permutations is None:
            return 0 if features == "unicam" else self.permutations
        if permutations < 0:
            raise ValueError(f"permutations: expected 0 (no p) or more, got {permutations}")
        return permutations

    def _check_embeddings(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 2 or not embeddings.isfinite().all():
            raise ValueError(f"embeddings: expected finite (classes, m), got {tuple(embeddings.shape)}")
        least, most = int(self.labels.min()), int(self.labels.max())
        if least < 0 or most >= len(embeddings):
            raise ValueError(
                f"labels: expected classes 0 to {len(embeddings) - 1}, one per row of embeddings, got {least} to {most}"
            )
        used = embeddings[self.labels.unique().to(embeddings.device)]
        if not distance.distances(used).any():
            raise ValueError("embeddings: those of all classes coincide, so nothing can be relevant to them")
        return embeddings.to(self.labels.device)

    def _reference(self, student: Hashable, base: Hashable, rows: Tensor) -> Reference:
        pair, layers = (self.networks[student], self.networks[base]), (self.layers(student), self.layers(base))
        return Reference(*pair, self.images[rows], layers_student=layers[0], layers_base=layers[1])

    def _distilled(self, network: Hashable, other: Any, rows: Tensor, g: Tensor, estimator: str) -> Tensor:
        """Centred distances of images perturbed by the maps of the features that ``other`` lacks."""
        maps = unicam(self._reference(network, other, rows), g).distilled
        return self._perturbed(network, rows, maps, estimator)

    def _centred(
        self, network: Hashable, b: int, features: str, estimator: str, names: Iterable[str] | None = None
    ) -> Tensor:
        """Centred distances (stages, n, n) of batch b, in the order of ``names``; distances are computed once."""
        layers = self.layers(network)
        key = (network, b, features, estimator == "paper")
        if key not in self._kept:
            maps = None
            if features == "grad_cam":
                maps = grad_cam(self.networks[network], self.images[self.batches[b]], layers=layers)
            self._kept[key] = self._distances(network, self.batches[b], maps, estimator)
        order = list(layers)
        return _centre(self._kept[key][[order.index(name) for name in names or order]], estimator)

    def _perturbed(
        self,
        network: Hashable,
        rows: Tensor,
        maps: Mapping[str, Tensor],
        estimator: str,
        names: Iterable[str] | None = None,
    ) -> Tensor:
        """Centred distances (stages, n, n) among images perturbed by ``maps``."""
        return _centre(self._distances(network, rows, maps, estimator, names), estimator)

    def _distances(
        self,
        network: Hashable,
        rows: Tensor,
        maps: Mapping[str, Tensor] | None,
        estimator: str,
        names: Iterable[str] | None = None,
    ) -> Tensor:
        """Distances (stages, n, n) among a network's features.

        With ``maps``, a stage's features are those of the images perturbed by the stage's map.
        """
        x, layers = self.images[rows], self.layers(network)
        passes: Iterable[tuple[Layers, Callable[[], Tensor]]] = [(layers, lambda: x)]
        if maps is not None:
            passes = [({s: layers[s]}, lambda s=s: perturb(x, maps[s], self.keep, seed=self.seed)) for s in layers]  # type: ignore[misc]
        found, as_sample = {}, "unbiased" if estimator == LINEAR else estimator
        for wanted, inputs in passes:
            for stage, activation in activations(self.networks[network], inputs(), wanted).items():
                try:
                    found[stage] = distance.distances(distance.sample(activation, as_sample))
                except ValueError as error:
                    raise ValueError(f"{stage}: {error}") from error
        return torch.stack([found[stage] for stage in names or layers])


class _Found:
    """Values of the batches, and the values that permutations gave instead."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.values: list[Tensor] = []  # (stages,) per batch
        self.drawn: list[Tensor] = []  # (stages, B) per batch
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
                p = permutation.permutation_p(mean.mean, drawn[i])
            row = {"stage": stage, "value": mean.mean, "low": mean.low, "high": mean.high, "p": p}
            rows.append(row | {"parts": values[:, i].numpy()})
        floor = permutation.p_floor(self.share, permutations) if self.drawn else np.nan
        facts: dict[str, Any] = {"floor": floor, "n": n, "batches": len(values)}
        facts |= {"estimator": estimator, "features": features, "permutations": permutations}
        return pd.DataFrame(rows).assign(**facts)


def _centre(distances: Tensor, estimator: str) -> Tensor:
    """Centred matrices (stages, n, n); zeros where features do not vary. ``LINEAR``: of inner products without their
    diagonal, of which squared distances are -2 times the part that centring leaves."""
    if estimator == LINEAR:
        return torch.stack([distance.u_center(-d.square() / 2) for d in distances])
    centre = distance.u_center if estimator == "unbiased" else distance.double_center
    return torch.stack([centre(d) for d in distances])


def _cosines(p: Tensor, q: Tensor) -> Tensor:
    """Cosines of (s, n, n) with (n, n) or (s, n, n): (s,); NaN where a matrix is 0."""
    p, q = p.flatten(1), q.flatten(-2)
    scale = p.norm(dim=-1) * q.norm(dim=-1)
    return torch.where(scale > 0, (p * q).sum(-1) / scale, torch.nan)
