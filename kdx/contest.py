"""Explainers of distillation against each other, where it is known what was distilled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.explainers import Explainer, Maps, explainers
from kdx.intervals import mean_interval
from kdx.localisation import localisation
from kdx.plantings import Grown
from kdx.progress import progress
from kdx.saliency import activations
from kdx.tracing import stages
from kdx.unique import DIRECTIONS, NETWORKS

CLAIMED = "claimed"
BETTER = {"ratio": 1, "AUPRC": 1, CLAIMED: -1}  # is more better?


def compare(
    grown: Sequence[Grown], entries: Callable[[Tensor, Tensor, Tensor], Mapping[str, Explainer]] = explainers
) -> pd.DataFrame:
    """Score explainers on plantings.

    Parameters
    ----------
    entries : called with a reference set, as :func:`kdx.explainers.explainers`; gives name -> explainer.

    Returns
    -------
    DataFrame : planting, seed, explainer, direction, stage, score, value, images (those with a value).

        Where something was planted, the scores of :func:`kdx.localisation.localisation`, means over the
        images, and ``ratio``: mean mass on the cue that was planted over that on the other cue with the most.
        Always ``magnitude``, the maps' mean, and ``magnitude, second base``: with the second base in the
        student's place, so what a seed alone gives.
    """
    rows: list[tuple[Any, ...]] = []
    floors: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in progress(grown, desc="plantings", unit="planting"):
        networks = {role: run.model for role, run in one.networks.items()}
        x, y = one.images.card.normalize(one.images.images), one.images.labels
        known = one.reference.card.normalize(one.reference.images), one.reference.labels
        named = entries(*known, one.scene.embeddings)
        same = tuple(one.networks[role].key for role in ("base", "second base"))
        if same not in floors:
            pair = networks["second base"], networks["base"]
            floors[same] = {name: _magnitudes(explain(*pair, x, y)) for name, explain in named.items()}
        for name, explain in named.items():
            maps = explain(networks["student"], networks["base"], x, y)
            sizes = {"magnitude": _magnitudes(maps), "magnitude, second base": floors[same][name]}
            for direction in DIRECTIONS:
                target = getattr(one.plan, direction)
                for stage, drawn in getattr(maps, direction).items():
                    where = (one.planting, one.seed, name, direction, stage)
                    rows += [(*where, kind, size[direction, stage], len(x)) for kind, size in sizes.items()]
                    if target:
                        rows += [(*where, *score) for score in _scores(drawn, one, target)]
    columns = ["planting", "seed", "explainer", "direction", "stage", "score", "value", "images"]
    return pd.DataFrame(rows, columns=columns)


def oracles(grown: Sequence[Grown]) -> Callable[[Tensor, Tensor, Tensor], dict[str, Explainer]]:
    """Entries for :func:`compare` that know the truth: the masks of what was planted, at the resolution of each
    stage; the best that a map of that stage can be."""

    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        networks = {
            name: activations(net, x[:1], stages(net, x[:1]))
            for name, net in zip(NETWORKS, (student, base), strict=True)
        }
        found: dict[str, dict[str, Tensor]] = {}
        for direction, (explained, _) in DIRECTIONS.items():
            truth = x.new_zeros(len(x), *x.shape[2:])
            for one in grown:
                if (one.networks["student"].model, one.networks["base"].model) == (student, base):
                    assert one.images.masks is not None
                    for cue in getattr(one.plan, direction):
                        truth = truth.maximum((one.images.masks >> cue & 1).float())
            grids = {s: (output.shape[2], output.shape[3]) for s, output in networks[NETWORKS[explained]].items()}
            found[direction] = {s: F.adaptive_avg_pool2d(truth[:, None], grid)[:, 0] for s, grid in grids.items()}
        return Maps(**found)

    return lambda images, labels, embeddings: {"the mask itself": explain}


def _magnitudes(maps: Any) -> dict[tuple[str, str], float]:
    """(direction, stage) -> mean of the maps."""
    return {(d, s): float(drawn.double().mean()) for d in DIRECTIONS for s, drawn in getattr(maps, d).items()}


def _scores(maps: Tensor, one: Grown, target: Sequence[int]) -> list[tuple[str, float, int]]:
    """Score, its mean over the images that have a value, and their number."""
    cues = range(len(one.scene.cues))
    bits = [sum(1 << cue for cue in cues if (cue in target) == wanted) for wanted in (True, False)]
    assert one.images.masks is not None
    scores = localisation(maps, one.images.masks, *bits)
    means = {score: (float(values.nanmean()), int((~values.isnan()).sum())) for score, values in scores.items()}
    mass, count = means["mass on target"]
    most = max(value for score, (value, _) in means.items() if score.startswith("mass on cue"))
    means["ratio"] = (mass / most if most > 0 else math.inf, count)
    return [(score, *mean) for score, mean in means.items()]


def over_stages(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`compare` with means over the stages in the place of stages (``all``): geometric ones of
    ratios and magnitudes, whose scale differs between stages."""
    geometric = table["score"].str.contains("ratio|magnitude")
    with np.errstate(divide="ignore"):
        logs = table.assign(value=np.where(geometric, np.log(table["value"].where(geometric, 1)), table["value"]))
    keys = ["planting", "seed", "explainer", "direction", "score"]
    means = logs.groupby(keys, sort=False).agg({"value": "mean", "images": "min"}).reset_index()
    geometric = means["score"].str.contains("ratio|magnitude")
    means["value"] = np.where(geometric, np.exp(means["value"].where(geometric, 0)), means["value"])
    return means.assign(stage="all")[list(table.columns)]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`compare`, averaged over seeds.

    Returns
    -------
    DataFrame : planting, explainer, direction, stage, score, value, low, high (95 % t interval over seeds; of
        ratios and claims on the logarithmic scale, with the geometric mean; NaN for one seed), seeds. Where
        nothing was planted, there are two scores more: ``claimed``, the magnitude of the distilled maps beside
        that of the same explainer where something was (1: it does not tell them apart), and ``claimed, second
        base``, the same with a second base in the student's place.
    """
    table = pd.concat([table, _claims(table)], ignore_index=True)
    rows = []
    keys = ["planting", "explainer", "direction", "stage", "score"]
    for names, group in table.groupby(keys, sort=False):
        values = group["value"].to_numpy()
        logarithmic = names[-1] == "ratio" or names[-1].startswith(CLAIMED)
        if logarithmic:
            with np.errstate(divide="ignore"):
                values = np.log(values)
        ends = [values.mean(), math.nan, math.nan]
        if len(values) > 1 and np.isfinite(values).all():
            mean = mean_interval(values)
            ends = [mean.mean, mean.low, mean.high]
        rows.append((*names, *(np.exp(ends) if logarithmic else ends), len(values)))
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "seeds"])


def _claims(table: pd.DataFrame) -> pd.DataFrame:
    keys = ["seed", "explainer", "stage"]
    maps = table[table["direction"] == "distilled"]
    true = maps[(maps["planting"] == "distilled") & (maps["score"] == "magnitude")].set_index(keys)["value"]
    found = []
    for kind in ("magnitude", "magnitude, second base"):
        false = maps[(maps["planting"] == "nothing") & (maps["score"] == kind)]
        share = false["value"].to_numpy() / true.reindex(pd.MultiIndex.from_frame(false[keys])).to_numpy()
        found.append(false.assign(score=kind.replace("magnitude", CLAIMED), value=share))
    return pd.concat(found)


def duel(table: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """Where one explainer is certainly better than another: their intervals of :func:`over_seeds` do not overlap.

    Returns
    -------
    DataFrame : planting, direction, stage, score (those of ``BETTER``), the values of both, and verdict: better,
        worse or open.
    """
    rows = []
    keys = ["planting", "direction", "stage", "score"]
    chosen = table[table["score"].isin(list(BETTER))]
    sides = [chosen[chosen["explainer"] == name].set_index(keys) for name in (one, other)]
    for place, first in sides[0].iterrows():
        second = sides[1].loc[place]
        sign = BETTER[place[-1]]
        low, high = (first["low"], first["high"]) if sign > 0 else (-first["high"], -first["low"])
        other_low, other_high = (second["low"], second["high"]) if sign > 0 else (-second["high"], -second["low"])
        verdict = "better" if low > other_high else "worse" if high < other_low else "open"
        rows.append((*place, first["value"], second["value"], verdict))
    return pd.DataFrame(rows, columns=[*keys, one, other, "verdict"])
