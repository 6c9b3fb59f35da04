"""Numbers of detectors as scores that can be averaged and compared over folds *and* images.

A number of detectors belongs to a whole probe, not to an image. Its parts come from sets of images that are drawn with
replacement (:func:`kdx.inference.bootstrap_parts`), at the thresholds that the units have on the whole probe. If a
count is the same in every set, its standard error is 0; this happens with few concepts. Intervals of few images (20 to
50) are too narrow, most of all near the largest IoU that the quantile allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import joblib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from kdx.data.broden import Probe
from kdx.inference import bootstrap_parts, jackknife
from kdx.measure.dissection import Dissection, Settings, detections, dissect, several

ALL, BEYOND = "all", "beyond"
Name = TypeVar("Name")


def dissect_all(
    models: Mapping[Name, nn.Module], probe: Probe, workers: int = 0, **settings: Any
) -> dict[Name, Dissection]:
    """Dissect several networks on one probe.

    Args:
        models: Name -> network. Networks that several names share are taken in turns.
        probe: Images with masks, best :meth:`~kdx.data.broden.Probe.in_memory`.
        workers: Networks that are dissected at the same time, each by one thread; 0: one per core. Each of them holds
            ``memory``, a setting of :func:`kdx.dissect`, besides what the probe takes.
        **settings: Of :func:`kdx.dissect`.

    Returns:
        Name -> dissection.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 (one per core) or more, got {workers}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pool = joblib.Parallel(workers or joblib.cpu_count(), "threading")
        found = pool(joblib.delayed(dissect)(model, probe, **settings) for model in models.values())
    finally:
        torch.set_num_threads(threads)
    return dict(zip(models, found, strict=True))


def detector_scores(
    found: Dissection,
    iou: Settings | None = None,
    *,
    resamples: int = 100,
    seed: int = 0,
    base: Dissection | None = None,
) -> pd.DataFrame:
    """Detectors of a network, as a score table for :func:`kdx.intervals.over_folds`.

    Args:
        found: From :func:`kdx.dissect`.
        iou: IoU in (0, 1] from which a unit is a detector, or several; None takes those of ``found``.
        resamples: Sets of images that are drawn, at least 2; no more than there are images, since intervals take the
            number of sets for that of the images.
        seed: Draws them; the same sets for all networks on a probe, so that these can be compared set by set.
        base: Of another network on the same probe. Adds the count *beyond*: units whose concept no unit of this network
            detects, at the same stage.

    Returns:
        stage, quantile, threshold (of IoU), category (``"all"`` or one of the probe), count (*total*: detectors;
        *unique*: distinct concepts; *beyond*), value (share of the stage's units), low, high (95 %, over images), parts
        (sets,), units, p and floor (NaN).

    Raises:
        ValueError: An IoU outside (0, 1]; fewer than 2 resamples; networks that were dissected on different probes; a
            base that was not dissected at all stages and quantiles of the network.
    """
    thresholds = found.iou_thresholds if iou is None else several("iou", iou, closed=True)
    if resamples < 2:
        raise ValueError(f"resamples: expected at least 2, got {resamples}")
    resamples = min(resamples, found.images)
    if base is not None and not base.concepts.equals(found.concepts):
        raise ValueError(
            f"base: expected a dissection on the same images, {found.images} of {found.probe}, got {base.images} of "
            f"{base.probe}"
        )
    if base is not None and (missing := [at for at in found.chance if at not in base.chance]):
        raise ValueError(
            f"base: expected a dissection at the stages and quantiles of the network, got none at "
            f"{', '.join(f'{stage}, {quantile:g}' for stage, quantile in missing)}; dissect both with equal settings"
        )
    kinds = found.concepts["category"].cat.codes.to_numpy()
    of = {ALL: kinds >= 0} | {name: kinds == i for i, name in enumerate(found.concepts["category"].cat.categories)}
    rows = []
    for at, units in found.units.groupby(["stage", "quantile"], sort=False):
        best = found.resampled(at, resamples, seed)
        others = None if base is None else base.resampled(at, resamples, seed)
        for threshold in thresholds:
            counts = detections(best, threshold, len(kinds))
            numbers = {"total": counts, "unique": counts > 0}
            if others is not None:
                numbers[BEYOND] = counts * (detections(others, threshold, len(kinds)) == 0)
            for (category, among), (count, each) in ((a, b) for a in of.items() for b in numbers.items()):
                shares = each[:, among].sum(1) / len(units)
                parts = bootstrap_parts(shares[0], shares[1:])
                rows.append([*at, threshold, category, count, parts, len(units), shares[0]])
    columns = ["stage", "quantile", "threshold", "category", "count", "parts", "units", "value"]
    table = pd.DataFrame(rows, columns=columns)
    parts = np.stack(list(table["parts"]))
    half = stats.t.ppf(0.975, resamples - 1) * stats.sem(parts, axis=1)
    return table.assign(low=table["value"] - half, high=table["value"] + half, p=np.nan, floor=np.nan)


def at_equal_accuracy(
    detectors: Mapping[str, pd.DataFrame], accuracy: Mapping[str, pd.Series], network: str, reference: Sequence[str]
) -> NDArray[np.float64]:
    """Detectors of a network beyond those of networks without its teacher that are as accurate.

    A straight line is fitted to detectors over accuracy of the reference networks, all folds together. What is returned
    is how far above this line the network lies, on average over its folds. The parts of the folds are the jackknife's,
    so they hold the uncertainty of the line as well. Beyond the accuracies of the reference, the line is extrapolated.
    Errors in the accuracies make it too flat; where detectors rise with accuracy, this favours the more accurate.

    Args:
        detectors: Network -> share of its units, fold x part, as :func:`kdx.intervals.by_fold` gives.
        accuracy: Network -> accuracy in each fold.
        network: Of which something is claimed.
        reference: Networks that did not have its teacher.

    Returns:
        (folds, parts), for :func:`kdx.inference.two_factor`; of the folds that all these networks have.

    Raises:
        ValueError: Fewer than two such folds, or reference networks that are all equally accurate.
    """
    names = [network, *reference]
    folds = sorted(set.intersection(*(set(detectors[name].index) & set(accuracy[name].index) for name in names)))
    if len(folds) < 2:
        raise ValueError(f"expected two folds or more of {', '.join(names)}, got {len(folds)}")
    y, x = (np.stack([of[name].loc[folds].to_numpy(float) for name in names]) for of in (detectors, accuracy))

    def above(kept: NDArray) -> NDArray:
        """(parts,)."""
        known, level = x[1:, kept].ravel(), y[1:, kept].reshape(-1, y.shape[2])
        away = known - known.mean()
        if not (away @ away) > 1e-12:
            raise ValueError(f"accuracy: expected reference networks that differ, got {known.tolist()}")
        slope = away @ level / (away @ away)
        return (y[0, kept] - level.mean(0) - np.outer(x[0, kept] - known.mean(), slope)).mean(0)

    every = np.arange(len(folds))
    return jackknife(above(every), np.stack([above(np.delete(every, i)) for i in every]))
