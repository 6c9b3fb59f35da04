r"""DiffROAR (Shah et al. 2021): do the pixels that an attribution ranks high carry the class?

A new network is trained on images that lack the elements ranked highest, another on images that lack those ranked
lowest. If the attribution is right, the first has lost more,

.. math:: \mathrm{DiffROAR}(p) = \mathrm{acc}(\text{lowest share } p \text{ removed}) -
          \mathrm{acc}(\text{highest share } p \text{ removed}).

Training and test images are masked alike, with maps of their true classes, so the mask itself may tell the class. How
much it tells is the accuracy of a network that is trained on masks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.distil.backends import fit_all
from kdx.distil.fit import Job
from kdx.distil.run_store import Run
from kdx.distil.training import Recipe

FRACTIONS = (0.1, 0.5, 0.9)
ENDS = ("highest", "lowest")
MASK = "mask alone"
AT_ONCE = 500  # images that are ranked at the same time

Attribution = Callable[[Tensor, Tensor], Tensor]


def diffroar(
    train: Dataset,
    test: Dataset,
    explain: Attribution,
    *,
    fractions: Sequence[float] = FRACTIONS,
    mask_alone: bool = False,
    **training: Any,
) -> pd.DataFrame:
    """DiffROAR of an attribution, with one new network for each fraction and end of the ranking.

    Args:
        train: Images on which new networks are trained.
        test: Images on which they are tested.
        explain: Called with images (n, c, h, w), normalised, and their class indices (n,); gives maps of the elements
            (n, c, h, w) or of the pixels (n, h, w), any finite numbers. For the paper's:
            ``lambda x, y: kdx.saliency(network, x, y)``.
        fractions: Shares of the elements that are removed, in (0, 1).
        mask_alone: Whether a further network is trained on the masks of the highest elements instead of the images.
        **training: model, recipe, seed, stem, width, device, workers: as for :func:`retrained`.

    Returns:
        fraction; highest, lowest (accuracy of the new network, as a fraction, where this end was removed); mask alone,
        if asked for; value, in points: 100 (lowest - highest). An attribution that says nothing has an expected value
        of 0.

    Raises:
        ValueError: A fraction out of range, or maps that do not fit the images.
    """
    for fraction in fractions:
        _count(fraction, train.images[0].numel())
    if (recipe := training.get("recipe")) and not recipe.epochs:
        raise ValueError("recipe: expected an epoch or more, got none; untrained networks tell nothing")
    ends = (*ENDS, MASK) if mask_alone else ENDS
    maps = attributions(train, explain), attributions(test, explain)
    rows: dict[float, dict[str, float]] = {fraction: {} for fraction in fractions}
    for fraction, end, run, _ in retrained(train, test, maps, fractions=fractions, ends=ends, **training):
        held_out = run.history[run.history["split"] == "validation"]
        rows[fraction][end] = float(held_out["accuracy"].iloc[-1])
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(ends)).rename_axis("fraction").reset_index()
    return table.assign(value=100 * (table["lowest"] - table["highest"]))


def attributions(dataset: Dataset, explain: Attribution) -> Tensor:
    """The maps of all images of a dataset, as ``explain`` of :func:`diffroar` gives them."""
    parts = zip(dataset.images.split(AT_ONCE), dataset.labels.split(AT_ONCE), strict=True)
    maps = torch.cat([explain(dataset.card.normalize(x), y).detach().cpu() for x, y in parts])
    n, c, h, w = dataset.images.shape
    if maps.shape not in ((n, c, h, w), (n, h, w)) or not maps.isfinite().all():
        raise ValueError(
            f"explain: expected finite maps {(n, c, h, w)} or {(n, h, w)}, got {tuple(maps.shape)}"
            f"{'' if maps.isfinite().all() else ' with values that are not finite'}"
        )
    return maps


def retrained(
    train: Dataset,
    test: Dataset,
    maps: tuple[Tensor, Tensor],
    *,
    fractions: Sequence[float] = FRACTIONS,
    ends: Sequence[str] = ENDS,
    model: str = "resnet10@0.125",
    recipe: Recipe | None = None,
    seed: int = 0,
    workers: int | str = 1,
    **training: Any,
) -> Iterator[tuple[float, str, Run, Dataset]]:
    """New networks on images that lack a part, trained or found in the run store, so an interrupted study continues.

    Args:
        train: Images to train on.
        test: Images to test on.
        maps: Of the training and of the test images, from :func:`attributions`.
        fractions: As for :func:`diffroar`.
        ends: Some of ``ENDS`` and ``MASK``.
        model: Of the new networks.
        recipe: Of their training; None takes the defaults of :class:`kdx.Recipe`.
        seed: Of weights and batches, and of the order of equal values.
        workers: As for :func:`kdx.cross_fit`.
        **training: stem, width and device of :func:`kdx.fit`.

    Yields:
        Fraction, end, the run, and the test images as it saw them.
    """
    fill = round(float(train.images.double().mean()))
    for fraction in fractions:
        tested, jobs = {}, {}
        for end in ends:
            pair = []
            for dataset, of in zip((train, test), maps, strict=True):
                gone = removed(of, fraction, end != "lowest", seed)
                gone = gone[:, None].expand_as(dataset.images) if gone.ndim == 3 else gone
                left = torch.where(gone, fill, dataset.images) if end in ENDS else 255 * gone
                pair.append(replace(dataset, images=left.to(torch.uint8)))
            jobs[end] = Job(model, pair[0], pair[1], recipe=recipe or Recipe(), seed=seed, **training)
            tested[end] = pair[1]
        for end, run in fit_all(jobs, workers):
            yield fraction, end, run, tested[end]


def removed(maps: Tensor, fraction: float, highest: bool, seed: int = 0) -> Tensor:
    """The elements of each map that are removed, all of its axes ranked together; equal values in a random order.

    Args:
        maps: (n, ...).
        fraction: The share of the elements, in (0, 1), rounded to whole elements.
        highest: Whether the highest are removed; else the lowest.
        seed: Of the order of equal values.

    Returns:
        bool (n, ...).
    """
    elements = maps[0].numel()
    count = _count(fraction, elements)
    generator, found = torch.Generator().manual_seed(seed), []
    whole = maps.flatten(1)
    for part in (whole.byte() if whole.dtype == torch.bool else whole).split(AT_ONCE):
        draw = torch.rand(part.shape, generator=generator)
        limit = part.kthvalue(elements - count + 1 if highest else count, dim=1, keepdim=True).values
        gone, tied = part > limit if highest else part < limit, part == limit
        left = count - gone.sum(1, keepdim=True)
        many = (tied.sum(1, keepdim=True) > left)[:, 0]
        first = draw[many].where(tied[many], 2).argsort(dim=1, stable=True)
        tied[many] = torch.zeros_like(tied[many]).scatter(1, first, torch.arange(elements) < left[many])
        found.append(gone | tied)
    return torch.cat(found).view(maps.shape)


def _count(fraction: float, elements: int) -> int:
    """How many of the elements are removed."""
    if not 0 < fraction < 1 or not 0 < (count := round(fraction * elements)) < elements:
        raise ValueError(
            f"fractions: expected shares above 0 and below 1 that remove some of {elements} elements, got {fraction}"
        )
    return count
