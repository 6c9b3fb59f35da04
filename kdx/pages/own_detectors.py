"""Units of a student that detect what no unit of its base detects, for a report with a probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from kdx.data.broden import Probe, load_probe
from kdx.intervals import Interval
from kdx.measure.detectors import ALL, BEYOND, detector_scores
from kdx.measure.dissection import Dissection, dissect
from kdx.measure.ledger import BASE, STUDENT
from kdx.pages.own_features import Layers
from kdx.pages.own_pair import OwnPair
from kdx.paths import one_line

FEWEST = 20  # images of a probe
EXCHANGES = 4  # of masks among images, for what is due to chance


def read_probe(name: str, limit: int, seed: int = 0, size: int | None = None) -> Probe:
    """The probe of a report, with its first image and mask read.

    Args:
        name: As for :func:`kdx.load_probe`.
        limit: Largest number of images.
        seed: Draws them.
        size: Pixels a side of the images; None leaves them as they are.

    Raises:
        ValueError: No such probe, fewer than ``FEWEST`` images, or files that cannot be read.
    """
    if limit < FEWEST:
        raise ValueError(f"probed: expected {FEWEST} images or more, got {limit}")
    probe = load_probe(name, seed=seed, size=size)
    if len(probe) < FEWEST:
        raise ValueError(f"probe: expected {FEWEST} images or more, got {len(probe)} in {name}")
    if len(probe) > limit:
        drawn = torch.randperm(len(probe), generator=torch.Generator().manual_seed(seed))[:limit]
        probe = probe[drawn.sort().values]
    try:
        probe.read_images(torch.tensor([0]))
        probe.read_masks(torch.tensor([0]))
    except OSError as error:
        raise ValueError(f"probe {name}: expected images and masks that can be read; {one_line(error)}") from error
    return probe


def dissect_roles(
    pair: OwnPair, layers: Layers, probe: Probe, quantile: float, iou: float, seed: int
) -> dict[str, Dissection]:
    """Role -> dissection, of all networks but the teacher.

    Args:
        pair: The networks, with the normalisation of their input.
        layers: Their stages.
        probe: Images of the size that the networks take.
        quantile: As for :func:`kdx.dissect`; likewise iou and seed.
    """
    probe = probe.in_memory()
    return {
        role: dissect(
            pair.own.networks[role],
            probe,
            quantile=quantile,
            iou=iou,
            normalize=lambda images, role=role: pair.inputs(role, images),  # type: ignore[misc]
            layers=layers[role],
            permutations=EXCHANGES,
            seed=seed,
        )
        for role in pair.own.shown
    }


def new_detectors(found: Mapping[str, Dissection], seed: int) -> pd.DataFrame:
    """How many units detect a concept, and how many one that no unit of the base detects.

    Returns:
        network, stage, count (*total*, or *beyond*: units whose concept no unit of the base detects at this stage),
        value (share of the stage's units), low, high (95 %, over images of the probe), units, by chance (the share of
        *total* that is expected where masks are exchanged among images), n (images of the probe).
    """
    tables = []
    for role, of in found.items():
        table = detector_scores(of, seed=seed, base=found[BASE])
        table = table[(table["category"] == ALL) & table["count"].isin(["total", BEYOND])]
        totals = of.totals(resamples=2)
        by_chance = totals[totals["category"] == ALL].set_index("stage")
        expected = (by_chance["by_chance"] / by_chance["units"]).reindex(table["stage"]).to_numpy()
        expected = pd.Series(expected, table.index).where(table["count"] == "total")
        tables.append(table.assign(network=role, n=of.images, **{"by chance": expected}))
    whole = pd.concat(tables, ignore_index=True)
    whole = whole[(whole["network"] != BASE) | (whole["count"] == "total")]
    whole = whole.assign(low=whole["low"].clip(0, 1), high=whole["high"].clip(0, 1))
    columns = ["network", "stage", "count", "value", "low", "high", "units", "by chance", "n"]
    return whole[columns].reset_index(drop=True)


def new_at_deepest(table: pd.DataFrame, role: str) -> Interval | None:
    """*Beyond* of :func:`new_detectors` at the deepest stage; None without this network."""
    of = table[(table["network"] == role) & (table["count"] == BEYOND)]
    return None if of.empty else Interval(*of[["value", "low", "high", "n"]].iloc[-1])


def new_concepts(found: Mapping[str, Dissection]) -> pd.DataFrame:
    """The concepts that units of the student detect and no unit of the base at the same stage.

    Returns:
        stage, concept, category, images (that show it), unit (of the student, with the largest IoU), iou, and of each
        network but the base how many units detect it; the concept with most units first.
    """
    units = {role: of.units[of.units["detector"]] for role, of in found.items()}
    shown = found[BASE].concepts.set_index(["concept", "category"])["images"]
    known = set(units[BASE][["stage", "concept", "category"]].itertuples(index=False, name=None))
    rows = []
    for key, of in units[STUDENT].groupby(["stage", "concept", "category"], sort=False):
        if key in known:
            continue
        best = of.loc[of["iou"].idxmax()]
        row = dict(zip(("stage", "concept", "category"), key, strict=True))
        row |= {"images": int(shown[key[1:]]), "unit": int(best["unit"]), "iou": float(best["iou"])}
        for role, others in units.items():
            if role != BASE:
                row[role] = int((others[["stage", "concept", "category"]] == key).all(axis=1).sum())
        rows.append(row)
    columns = ["stage", "concept", "category", "images", "unit", "iou", *(role for role in units if role != BASE)]
    return pd.DataFrame(rows, columns=columns).sort_values(STUDENT, ascending=False, kind="stable", ignore_index=True)


def facts(found: Mapping[str, Dissection]) -> dict[str, Any]:
    """What a statement says about the probe."""
    of = found[BASE]
    return {
        "name": of.probe,
        "images": of.images,
        "concepts": len(of.concepts),
        "quantile": float(of.units["quantile"].iloc[0]),
        "iou": of.iou_thresholds[0],
    }
