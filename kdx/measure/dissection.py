r"""Network dissection (Bau et al. 2017): which concepts do single units detect?

A unit is a channel of a stage. It exceeds its threshold :math:`T_k` at a small share q of all places, over all images,
and it detects the concept c whose masks coincide best with these places,

.. math:: \mathrm{IoU}_{kc} = \frac{\sum_x |M_k(x) \cap L_c(x)|}{\sum_x |M_k(x) \cup L_c(x)|}, \qquad
          M_k(x) = A_k(x) > T_k,

if the IoU reaches a threshold. :math:`A_k(x)` are its activations for image x, resized to the masks; the sums are over
the images that are annotated in the concept's category.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from kdx.data.broden import Probe
from kdx.measure.overlaps import Maps, Segments, Tally, exceeding, segment, thresholds_of

UNIONS = ("dataset", "lite")
BATCH = 256  # images among which masks are exchanged
STEP = 16  # images whose pixels are counted at the same time
AT_ONCE = 2**22  # IoU of resampled images in memory
Settings = float | Sequence[float]
Counts = tuple[sparse.csr_array, sparse.csr_array]  # of each image: intersections and areas, see Tally.images


@dataclass(frozen=True)
class Dissection:
    """The units of a network, with the concepts that they detect.

    Attributes:
        units: A row for each stage, quantile and unit: threshold; area (the share of all pixels of the probe at which
            it is above its threshold, after resizing); concept and category with the largest IoU (missing where no IoU
            is above 0); iou; detector (whether it reaches the first of ``iou_thresholds``); null (95 % quantile of the
            largest IoU where masks are exchanged among images); p (the share of exchanges, with the actual masks as one
            of them, whose largest IoU over all concepts is at least as large). A unit that is nowhere above its
            threshold, since it is constant or has its largest value at too many places, has no concept, and NaN for iou
            and p.
        concepts: A row for each concept: concept, category, annotated (images that are, in its category), images (that
            show it), and coverage, its share of the pixels of the annotated images. A concept that no image shows
            cannot be detected.
        iou_thresholds: From which IoU on a unit is a detector.
        probe: Name of the probe.
        union: How areas were counted.
        chance: (stage, quantile) -> places of the best concepts and their IoU with exchanged masks, (permutations, k).
    """

    units: pd.DataFrame
    concepts: pd.DataFrame = field(repr=False)
    iou_thresholds: tuple[float, ...]
    probe: str
    union: str
    chance: Mapping[tuple[str, float], tuple[NDArray, NDArray]] = field(repr=False)
    _counts: Mapping[tuple[str, float], Counts] = field(repr=False)
    _shown: sparse.csr_array = field(repr=False)  # (n, concepts): pixels of each concept

    @property
    def images(self) -> int:
        """Number of images of the probe."""
        return self._shown.shape[0]

    def totals(self, iou: Settings | None = None, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
        """Detectors in each category, and their distinct concepts.

        Intervals are over images: the probe's images are drawn anew with replacement, at the same thresholds of the
        units. Resampling favours concepts that fit by chance, so numbers rise in it; their 95 % range is therefore
        moved by as much as their median differs from the number found. Numbers and intervals are about probes of this
        size: the fewer images, the more units fit a concept by chance, so detectors rise, and distinct concepts more.

        Args:
            iou: IoU from which a unit is a detector, or several; None takes ``iou_thresholds``.
            resamples: Sets of images that are drawn.
            seed: Draws them.

        Returns:
            A row for each stage, quantile, threshold (of IoU) and category, or ``"all"``: units (of the stage), dead
            (units nowhere above their threshold), total (detectors), unique (distinct concepts among them), share
            (total / units), each of the three with _low and _high; by_chance (mean total with masks exchanged among
            images; NaN without permutations).

        Raises:
            ValueError: A threshold outside (0, 1], or fewer than 2 resamples.
        """
        chosen = self.iou_thresholds if iou is None else several("iou", iou, closed=True)
        if resamples < 2:
            raise ValueError(f"resamples: expected at least 2, got {resamples}")
        rows: list[dict] = []
        for at, found in self.units.groupby(["stage", "quantile"], sort=False):
            dead = int(found["iou"].isna().sum())
            concept, of = self.resampled(at, resamples, seed)
            best, replicates = (concept[:1], of[:1]), (concept[1:], of[1:])
            for threshold in chosen:
                numbers = [self._numbers(each, threshold) for each in (best, replicates, self.chance[at])]
                head = {"stage": at[0], "quantile": at[1], "threshold": threshold}
                rows += _rows(head, ["all", *self.concepts["category"].cat.categories], len(found), dead, *numbers)
        return pd.DataFrame(rows)

    def best(self, at: tuple[str, float], weights: NDArray) -> tuple[NDArray, NDArray]:
        """The best concepts of the units if images had weights.

        Args:
            at: Stage and quantile.
            weights: (b, images) of the probe, such as 0 for an image that is left out.

        Returns:
            Places in ``concepts`` and IoU, (b, units) both.
        """
        kinds = self.concepts["category"].cat.codes.values
        inside, areas = ((counts.T @ weights.T).T for counts in self._counts[at])
        inside = inside.reshape(len(weights), len(kinds), -1)
        areas = areas.reshape(len(weights), -1, inside.shape[2])
        return _best(inside, areas[:, kinds], (self._shown.T @ weights.T).T)

    def resampled(self, at: tuple[str, float], resamples: int, seed: int = 0) -> tuple[NDArray, NDArray]:
        """:meth:`best` of the probe, and of ``resamples`` sets of its images that are drawn with replacement.

        A seed draws the same sets for all probes of the same size.

        Returns:
            (1 + resamples, units) both; the first row is of the probe as it is.
        """
        n, units = self.images, self.chance[at][0].shape[1]
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
        weights = np.concatenate([np.ones((1, n)), drawn])
        parts = np.array_split(weights, math.ceil(len(weights) * units * len(self.concepts) / AT_ONCE))
        concept, iou = zip(*(self.best(at, part) for part in parts if len(part)), strict=True)
        return np.concatenate(concept), np.concatenate(iou)

    def _numbers(self, best: tuple[NDArray, NDArray], threshold: float) -> NDArray:
        """Detectors and distinct concepts, of all categories and of each: (2, categories + 1, b)."""
        kinds = self.concepts["category"].cat.codes.values
        detected = detections(best, threshold, len(kinds))
        of = np.stack([kinds >= 0, *(kinds == i for i in range(kinds.max() + 1))]).astype(int)
        return np.stack([of @ detected.T, of @ (detected > 0).T])


def detections(best: tuple[NDArray, NDArray], threshold: float, concepts: int) -> NDArray[np.int64]:
    """How many units detect each concept, (b, concepts), from the best concepts and their IoU, (b, units) both."""
    concept, iou = best
    counts = np.zeros((len(concept), concepts), dtype=int)
    row, unit = (iou >= threshold).nonzero()
    np.add.at(counts, (row, concept[row, unit]), 1)
    return counts


def _rows(
    head: dict, categories: list[str], units: int, dead: int, found: NDArray, drawn: NDArray, chance: NDArray
) -> Iterator[dict]:
    """The rows of :meth:`Dissection.totals` for one threshold, from (2, categories, b) each."""
    low, middle, high = np.quantile(drawn, (0.025, 0.5, 0.975), axis=2)
    low, high = ((end - middle + found[:, :, 0]).clip(0, units) for end in (low, high))
    by_chance = chance[0].mean(1) if chance.shape[2] else np.full(len(categories), np.nan)
    for i, category in enumerate(categories):
        row = head | {"category": category, "units": units, "dead": dead}
        for j, name in enumerate(("total", "unique")):
            row |= {name: int(found[j, i, 0]), f"{name}_low": low[j, i], f"{name}_high": high[j, i]}
        row |= {f"share{end}": row[f"total{end}"] / units for end in ("", "_low", "_high")}
        yield row | {"by_chance": by_chance[i]}


def dissect(
    model: nn.Module,
    probe: Probe,
    stage: str | Sequence[str] | None = None,
    quantile: Settings = 0.005,
    iou: Settings = 0.05,
    union: str = "dataset",
    *,
    normalize: Callable[[Tensor], Tensor],
    layers: Mapping[str, str] | None = None,
    permutations: int = 19,
    rotation_seed: int | None = None,
    seed: int = 0,
    memory: int = 2**30,
) -> Dissection:
    """Find the concept that each unit of a network detects.

    The network runs once over the probe if the activations of the stages fit into ``memory``, otherwise twice. Beyond
    the larger of ``memory`` and a batch of 256 images, what is held is the share of the largest quantile of all
    activations, 20 bytes (32 for one stage and quantile at a time) for each pair of a unit and a concept, or a
    category, that meet in an image, and 8 bytes for each unit, concept or category, and set of masks, of which there
    are 1 + ``permutations``.

    Args:
        model: Any CNN or plain vision transformer.
        probe: Images with masks, see :func:`kdx.load_probe`.
        stage: Names of stages; None takes all of ``layers``.
        quantile: q, in (0, 1): the share of a unit's activations, of all images and places at the stage's own
            resolution, that are above its threshold. At most so many are; fewer if values are equal. Several are
            dissected at once. Resizing to the masks flattens peaks, so the share of all pixels, ``area``, is mostly
            smaller, by far at coarse stages. With n images, of which m are annotated in a concept's category and r the
            concept's coverage in these, a unit's IoU is at most area * n / (m * r): all of its area may lie in the m
            images.
        iou: IoU, in (0, 1], from which a unit is a detector; or several, for :meth:`Dissection.totals`.
        union: ``"dataset"`` counts a unit's area in all images that are annotated in the concept's category;
            ``"lite"``, as the code of NetDissect-Lite, only in those where it touches a concept of the category, which
            makes IoUs larger.
        normalize: Turns uint8 images (n, 3, h, w) into what the network expects, such as ``card.normalize``.
        layers: Stage -> module name; None takes :func:`kdx.stages`.
        permutations: How often masks are exchanged among images, for null and p; 0 leaves both NaN. They are
            exchanged within random batches of 256, among images that are annotated in the same categories. 19 is the
            smallest number with which p can be 0.05.
        rotation_seed: Rotates the units of each stage by a random orthogonal matrix, as a control: what is still
            detected then belongs to the space of the features rather than to single units. None leaves them.
        seed: Draws the order of the images and the exchanges.
        memory: Bytes of activations that may be held.

    Returns:
        The units, and with :meth:`Dissection.totals` their numbers.

    Raises:
        ValueError: A setting is out of range; a category has masks in fewer than two images, or no pixel with one of
            its concepts; the probe has too few activations for the quantile; activations that are not finite; masks
            that are no integers (n, layers, h, w) of one size, have unknown numbers, or show a category in images that
            are not annotated in it.

    Examples:
        >>> import kdx
        >>> network = kdx.build("resnet10", 27, "small", 0.125, seed=0)
        >>> probe = kdx.load_probe("planted", limit=60)
        >>> found = kdx.dissect(network, probe, "L1", quantile=0.02, normalize=kdx.DATASETS["planted"].normalize)
        >>> found.units.columns[2:9].tolist(), len(found.units)
        (['unit', 'threshold', 'area', 'concept', 'category', 'iou', 'detector'], 8)
        >>> found.totals(resamples=20)["category"].tolist()
        ['all', 'gratings', 'shapes', 'dots', 'colour']
    """
    quantiles, thresholds = several("quantile", quantile), several("iou", iou, closed=True)
    if union not in UNIONS:
        raise ValueError(f"unknown union {union!r}; choose from: {', '.join(UNIONS)}")
    if permutations < 0:
        raise ValueError(f"permutations: expected 0 (no p) or more, got {permutations}")
    _check_probe(probe)
    network = Maps(model, probe, stage, normalize, layers, rotation_seed)
    order = torch.randperm(len(probe), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    held: dict[int, dict[str, Tensor]] | None = {} if network.bytes_each * len(probe) <= memory else None
    limits = thresholds_of(network, order, quantiles, held)
    tallies = {
        (name, q): Tally(probe, shape[0], permutations, union == "lite")
        for name, shape in network.shapes.items()
        for q in quantiles
    }
    shown = sparse.csr_array((len(probe), len(probe.concepts)), dtype=np.float32)
    generator = np.random.default_rng(seed)
    height, width = _masks(probe, order[0][:1]).shape[2:]
    for i, rows in enumerate(order):
        maps = network.of(rows) if held is None else held.pop(i)
        segments = segment(_masks(probe, rows), probe.annotated[rows], len(probe.concepts), (height, width))
        _check_annotated(probe, segments, rows)
        orders = _exchanges(probe.annotated[rows], permutations, generator)
        for name, of in maps.items():
            for some in torch.arange(len(rows)).split(STEP):
                hits = exceeding(of[some], limits[name, max(quantiles)], (height, width))
                for q in sorted(quantiles, reverse=True):
                    hits = hits if q == max(quantiles) else hits.beyond(limits[name, q])
                    tallies[name, q].add(hits, segments, orders[:, some], rows[some])
        shown += _shown(segments, rows, probe)
    return _result(probe, limits, tallies, shown, thresholds, union)


def several(name: str, values: Settings, closed: bool = False) -> tuple[float, ...]:
    """Different settings in (0, 1), or in (0, 1]."""
    found = tuple(np.atleast_1d(np.asarray(values, dtype=float)).tolist())
    if not found or not all(0 < v < 1 or (closed and v == 1) for v in found) or len(set(found)) < len(found):
        raise ValueError(f"{name}: expected different values in (0, 1{']' if closed else ')'}, got {values}")
    return found


def _check_probe(probe: Probe) -> None:
    if few := [f"{int(n)} in {c}" for c, n in zip(probe.categories, probe.annotated.sum(0), strict=True) if n < 2]:
        raise ValueError(
            f"probe {probe.name}: expected masks of each category in at least 2 images, got {', '.join(few)}; "
            "take more images, or leave categories out with probe.only([...])"
        )


def _masks(probe: Probe, rows: Tensor) -> Tensor:
    """Masks of the images at ``rows`` (n,): integers (n, layers, h, w)."""
    masks = probe.read_masks(rows)
    wrong = masks.is_floating_point() or masks.is_complex() or masks.dtype == torch.bool
    if wrong or masks.ndim != 4 or len(masks) != len(rows):
        raise ValueError(
            f"masks: expected integers (n, layers, h, w) of {len(rows)} images, 0 for no concept and i + 1 for concept "
            f"i, got {masks.dtype} {tuple(masks.shape)}; correct read_masks of probe {probe.name}"
        )
    return masks


def _check_annotated(probe: Probe, segments: Segments, rows: Tensor) -> None:
    kinds = probe.category_of[segments.concepts - 1]
    wrong = (segments.concepts > 0) & (segments.annotated.gather(1, kinds) == 0)
    if wrong.any():
        names = [probe.categories[i] for i in kinds[wrong].unique().tolist()]
        images = rows[wrong.any(1)].sort().values.tolist()
        raise ValueError(
            f"masks: expected pixels of a category only in images that are annotated in it, got {', '.join(names)} in "
            f"images {images[:10]}{' and more' if len(images) > 10 else ''} of probe {probe.name}, which are not; "
            "correct the masks or annotated"
        )


def _exchanges(annotated: Tensor, permutations: int, generator: np.random.Generator) -> Tensor:
    """int64 (1 + permutations, n): each image itself, then images with masks in the same categories."""
    kind = annotated.unique(dim=0, return_inverse=True)[1]
    orders = torch.arange(len(kind)).repeat(1 + permutations, 1)
    drawn = torch.from_numpy(generator.random((permutations, len(kind))))
    orders[1:, kind.argsort(stable=True)] = (kind + drawn).argsort(1)
    return orders


def _shown(segments: Segments, rows: Tensor, probe: Probe) -> sparse.csr_array:
    """Pixels of each concept in the images of a batch: sparse (n, concepts)."""
    image, place = (segments.concepts > 0).nonzero(as_tuple=True)
    index = (rows[image].numpy(), (segments.concepts[image, place] - 1).numpy())
    return sparse.csr_array((segments.areas[image, place].numpy(), index), shape=(len(probe), len(probe.concepts)))


def _best(inside: NDArray, areas: NDArray, shown: NDArray) -> tuple[NDArray, NDArray]:
    """The best concept and its IoU, (b, k) both, from pixels of unit and concept (b, c, k), of the unit in the
    concept's category (b, c, k), and of the concept (b, c)."""
    union = areas + shown[:, :, None] - inside
    found = np.divide(inside, union, out=np.zeros(inside.shape), where=union > 0)
    return found.argmax(1), found.max(1)


def _result(
    probe: Probe,
    limits: Mapping[tuple[str, float], Tensor],
    tallies: Mapping[tuple[str, float], Tally],
    shown: sparse.csr_array,
    thresholds: tuple[float, ...],
    union: str,
) -> Dissection:
    pixels = math.prod(probe.read_masks(torch.tensor([0])).shape[2:])
    concepts = _concepts(probe, shown, pixels)
    kinds = probe.category_of.numpy()
    names = np.array([*concepts[["concept", "category"]].values.tolist(), [None, None]], dtype=object)
    tables, chance = [], {}
    for (stage, q), tally in tallies.items():
        both, areas, coverage = tally.intersections[:, 1:].numpy(), tally.areas.numpy(), shown.sum(0)[None]
        pairs = [_best(both[[i]], areas[[i]][:, kinds], coverage) for i in range(len(both))]
        best, found = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        chance[stage, q] = best[1:], found[1:]
        silent, exchanges = tally.sizes.numpy() == 0, len(found) - 1
        unknown = silent | (exchanges == 0)
        place = np.where(found[0] > 0, best[0], -1)
        null = np.quantile(found[1:], 0.95, axis=0) if exchanges else np.nan
        p = (1 + (found[1:] >= found[0]).sum(0)) / (exchanges + 1)
        tables.append(
            pd.DataFrame(
                {
                    "stage": stage,
                    "quantile": q,
                    "unit": np.arange(tally.units),
                    "threshold": limits[stage, q].numpy(),
                    "area": tally.sizes.numpy() / (len(probe) * pixels),
                    "concept": names[place, 0],
                    "category": names[place, 1],
                    "iou": np.where(silent, np.nan, found[0]),
                    "detector": found[0] >= thresholds[0],
                    "null": np.where(silent, np.nan, null),
                    "p": np.where(unknown, np.nan, p),
                }
            )
        )
    counts = {at: tally.images() for at, tally in tallies.items()}
    return Dissection(
        pd.concat(tables, ignore_index=True), concepts, thresholds, probe.name, union, chance, counts, shown
    )


def _concepts(probe: Probe, shown: sparse.csr_array, pixels: int) -> pd.DataFrame:
    """The table ``Dissection.concepts``, from the pixels of each concept in each image, sparse (n, concepts), and those
    of an image."""
    kinds = probe.category_of.numpy()
    areas, images = shown.sum(0), (shown > 0).sum(0)
    if empty := [name for i, name in enumerate(probe.categories) if not areas[kinds == i].any()]:
        raise ValueError(
            f"probe {probe.name}: expected pixels with a concept in each category, got none in {', '.join(empty)}; "
            "leave it out with probe.only([...])"
        )
    annotated = probe.annotated.sum(0).numpy()[kinds]
    return pd.DataFrame(
        {
            "concept": probe.concepts,
            "category": pd.Categorical.from_codes(kinds, list(probe.categories)),
            "annotated": annotated,
            "images": images,
            "coverage": areas / (annotated * pixels),
        }
    )
