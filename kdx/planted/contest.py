"""Scores of explainers of distillation on plantings, where the distilled knowledge is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from kdx.explain.explainers import Explainer, Maps, explainers, fused
from kdx.explain.reference import DIRECTIONS, NETWORKS, Reference
from kdx.explain.transferred import transferred
from kdx.explain.unexplained import unexplained
from kdx.inference import holm
from kdx.intervals import mean_interval
from kdx.measure.localisation import auroc, localisation
from kdx.networks.capture import activations
from kdx.networks.devices import pick_device, placed
from kdx.networks.models import build
from kdx.networks.stages import stages
from kdx.networks.threads import locked
from kdx.planted.plantings import Grown
from kdx.progress import progress

UNTRAINED = 10**6  # from here on, seeds of networks that no planting has
CLAIMED, DETECTED = "claimed", "detected"
DECISIVE = ("ratio", "AUPRC", DETECTED)  # larger is better


def compare(
    grown: Sequence[Grown],
    entries: Callable[[Tensor, Tensor, Tensor], Mapping[str, Explainer]] = explainers,
    device: str = "cpu",
) -> pd.DataFrame:
    """Score explainers on plantings.

    Args:
        grown: From :func:`kdx.planted.plantings.plant`.
        entries: Called with a reference set, as :func:`kdx.explain.explainers.explainers`; gives name -> explainer.
        device: Where explainers compute, as for :func:`kdx.fit`.

    Returns:
        planting, seed, explainer, direction, stage, score, value. Where something was planted, the scores of
        :func:`kdx.measure.localisation.localisation`, means over the images, and ``ratio``: mean mass on the planted
        cue over that on the other cue with the most, relative to the same of two untrained networks, so 1 is chance
        although cues differ in size, colour and contrast. Always ``magnitude``, the mean of the maps, and ``magnitude,
        second base``: with the second base in the student's place, the effect of the seed alone. Where nothing was
        planted, ``detected``: the area under the ROC curve by which the means of distilled maps separate the images
        of the planting *distilled* from the same images here; 0.5 is chance. It does not depend on scale, so
        explainers of different units can be compared by it.
    """
    rows: list[tuple[Any, ...]] = []
    sizes: dict[tuple[Any, ...], Tensor] = {}
    floors: dict[tuple[str, ...], dict[str, Any]] = {}
    blank: dict[tuple[Any, ...], dict[str, Any]] = {}
    place = pick_device(device)
    for one in progress(grown, desc="plantings", unit="planting"):
        networks = {role: run.model for role, run in one.networks.items()}
        with locked(*networks.values()), ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(placed(network, place))
            x, y = one.images.card.normalize(one.images.images).to(place), one.images.labels.to(place)
            known = one.reference.card.normalize(one.reference.images).to(place), one.reference.labels.to(place)
            named = entries(*known, one.scene.embeddings.to(place))
            same = tuple(one.networks[role].key for role in ("base", "second base"))
            if same not in floors:
                pair = networks["second base"], networks["base"]
                floors[same] = {name: _magnitudes(explain(*pair, x, y)) for name, explain in named.items()}
            architectures: list[dict[str, Any]] = [networks[role].architecture for role in NETWORKS]
            kind = (one.seed, one.scene, *map(str, architectures))
            if kind not in blank:
                seeds = (UNTRAINED + 2 * one.seed + i for i in range(2))
                student, base = (
                    build(**how, seed=i).eval().to(place) for how, i in zip(architectures, seeds, strict=True)
                )
                blank[kind] = {name: explain(student, base, x, y) for name, explain in named.items()}
            found = {name: explain(networks["student"], networks["base"], x, y) for name, explain in named.items()}
        for name, maps in found.items():
            own, floor = _magnitudes(maps), floors[same][name]
            for direction in DIRECTIONS:
                target = getattr(one.plan, direction)
                for stage, drawn in getattr(maps, direction).items():
                    where = (one.planting, one.seed, name, direction, stage)
                    sizes[where] = own[direction, stage]
                    for score, size in (("magnitude", own), ("magnitude, second base", floor)):
                        rows.append((*where, score, float(size[direction, stage].mean())))
                    if target:
                        chance = _scores(getattr(blank[kind][name], direction)[stage].cpu(), one, target)["ratio"]
                        scores = _scores(drawn.cpu(), one, target)
                        scores["ratio"] = scores["ratio"] / chance if chance > 0 else math.nan
                        rows += [(*where, *score) for score in scores.items()]
    for where, size in sizes.items():
        planting, seed, name, direction, stage = where
        other = sizes.get(("distilled", seed, name, direction, stage))
        if planting == "nothing" and direction == "distilled" and other is not None:
            truth = torch.cat([torch.ones_like(other), torch.zeros_like(size)])[None, None] > 0
            told_apart = auroc(torch.cat([other, size])[None, None], truth)
            rows.append((*where, DETECTED, float(told_apart)))
    columns = ["planting", "seed", "explainer", "direction", "stage", "score", "value"]
    return pd.DataFrame(rows, columns=columns)


def oracles(grown: Sequence[Grown]) -> Callable[[Tensor, Tensor, Tensor], dict[str, Explainer]]:
    """Entries for :func:`compare` that know the truth: the masks of the planted cues, at the resolution of each stage.

    They hold for the images of the plantings, in their order.
    """

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
                    if len(x) != len(one.images):
                        raise ValueError(f"expected all {len(one.images)} images of the planting, got {len(x)}")
                    for cue in getattr(one.plan, direction):
                        truth = truth.maximum((one.images.masks >> cue & 1).float())
            grids = {s: (output.shape[2], output.shape[3]) for s, output in networks[NETWORKS[explained]].items()}
            found[direction] = {s: F.adaptive_avg_pool2d(truth[:, None], grid)[:, 0] for s, grid in grids.items()}
        return Maps(**found)

    return lambda images, labels, embeddings: {"the mask itself": explain}


def with_teachers(grown: Sequence[Grown]) -> Callable[[Tensor, Tensor, Tensor], dict[str, Explainer]]:
    """Entries for :func:`compare` that also see the teacher: *transferred*, with and without all stages fused, beside
    *unexplained* and the strongest of its rivals. Residual maps are those of *unexplained*.

    The second base is read with a teacher of its planting, and untrained networks with an untrained one.
    """

    def teacher_of(student: nn.Module, base: nn.Module) -> nn.Module:
        roles = [{role: run.model for role, run in one.networks.items()} for one in grown]
        own = [of["teacher"] for of in roles if (of["student"], of["base"]) == (student, base)]
        others = [of["teacher"] for of in roles if (of["second base"], of["base"]) == (student, base)]
        if found := [teacher for teacher in own + others if teacher is not student]:
            return found[0]
        architecture: dict[str, Any] = student.architecture  # type: ignore[assignment]
        return build(**architecture, seed=UNTRAINED - 1).eval().to(next(student.parameters()).device)

    def entries(images: Tensor, labels: Tensor, embeddings: Tensor) -> dict[str, Explainer]:
        def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            reference = Reference(student, base, images, teacher=teacher_of(student, base))
            residual = unexplained(reference, (x, x)).residual
            return Maps(transferred(reference, x).distilled, residual)

        known = explainers(images, labels, embeddings)
        names = ("unexplained", "unexplained, fused", "answer difference, squared, fused")
        return {"transferred": explain, "transferred, fused": fused(explain)} | {name: known[name] for name in names}

    return entries


def _magnitudes(maps: Any) -> dict[tuple[str, str], Tensor]:
    """(direction, stage) -> mean of each map, (n,)."""
    return {
        (d, s): drawn.flatten(1).double().mean(1).cpu() for d in DIRECTIONS for s, drawn in getattr(maps, d).items()
    }


def _scores(maps: Tensor, one: Grown, target: Sequence[int]) -> dict[str, float]:
    """Score and its mean over the images."""
    cues = range(len(one.scene.cues))
    bits = [sum(1 << cue for cue in cues if (cue in target) == wanted) for wanted in (True, False)]
    assert one.images.masks is not None
    scores = localisation(maps, one.images.masks, *bits)
    means = {score: float(values.mean()) for score, values in scores.items()}
    most = max(value for score, value in means.items() if score.startswith("mass on cue"))
    means["ratio"] = means["mass on target"] / most if most > 0 else math.inf
    return means


def over_stages(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`compare` with means over the stages (stage ``all``).

    Means of ratios and magnitudes, whose scale differs between stages, are geometric.
    """
    geometric = table["score"].str.contains("ratio|magnitude")
    with np.errstate(divide="ignore"):
        logs = table.assign(value=np.where(geometric, np.log(table["value"].where(geometric, 1)), table["value"]))
    keys = ["planting", "seed", "explainer", "direction", "score"]
    means = logs.groupby(keys, sort=False)["value"].agg(lambda values: values.mean(skipna=False)).reset_index()
    geometric = means["score"].str.contains("ratio|magnitude")
    means["value"] = np.where(geometric, np.exp(means["value"].where(geometric, 0)), means["value"])
    return means.assign(stage="all")[list(table.columns)]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`compare`, averaged over seeds.

    Returns:
        planting, explainer, direction, stage, score, value, low, high (95 % t interval over seeds; for ratios and
        claims on the logarithmic scale, with the geometric mean; NaN for one seed), seeds. Where nothing was planted
        there are two more scores: ``claimed``, the magnitude of the distilled maps relative to that of the same
        explainer where something was planted (1: it does not separate the two), and ``claimed, second base``, the
        same with a second base in the student's place.
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
        false = false.assign(score=kind.replace("magnitude", CLAIMED), value=share)
        found.append(false[~np.isnan(share)])  # seeds of which both plantings took
    return pd.concat(found)


def is_best(found: pd.DataFrame, overall: pd.DataFrame) -> bool:
    """Whether a candidate may be recommended for maps by its ratio and AUPRC.

    Args:
        found: :func:`duels` in single cases; the candidate must be worse in none.
        overall: :func:`duels` over all cases together; it must be better in all.
    """
    worse, better = (of.loc[of["score"] != DETECTED, "verdict"] for of in (found, overall))
    return bool((better == "better").all() and not (worse == "worse").any())


def duels(table: pd.DataFrame, candidate: str, rivals: Sequence[str]) -> pd.DataFrame:
    """An explainer compared with others, paired by seed.

    Args:
        table: case, planting, seed, direction, explainer, and a column for each of ``DECISIVE``: means over the stages,
            as ``data/results/planted_contest.csv`` holds them. Plantings of a seed are averaged.
        candidate: An explainer.
        rivals: The others.

    Returns:
        case, direction, score, rival; value, low, high (by how much the candidate's score is larger, mean and 95 % t
        interval over seeds; for ratios, by what factor; NaN for one seed), p (two-sided, Holm's over the rivals),
        verdict (better or worse where p is at most 0.05, else open), seeds.

    Raises:
        ValueError: An unknown explainer.
    """
    names = table["explainer"].unique()
    if unknown := [name for name in (candidate, *rivals) if name not in names]:
        raise ValueError(f"unknown explainer {unknown[0]!r}; choose from: {', '.join(names)}")
    keys = ["case", "direction", "score"]
    long = table.melt(["case", "planting", "seed", "direction", "explainer"], list(DECISIVE), "score").dropna()
    long.loc[long["score"] == "ratio", "value"] = np.log(long["value"])
    scores = long.pivot_table(index=[*keys, "seed"], columns="explainer", values="value", sort=False)
    rows = []
    for where, of in scores.groupby(level=keys, sort=False):
        found = []
        for rival in rivals:
            ahead = (of[candidate] - of[rival]).dropna().to_numpy()
            mean, low, high, p = ahead.mean(), math.nan, math.nan, math.nan
            if len(ahead) > 1:
                mean, low, high, _ = mean_interval(ahead)
                p = float(stats.ttest_1samp(ahead, 0).pvalue)
            values = np.exp([mean, low, high]) if where[-1] == "ratio" else [mean, low, high]
            found.append([*where, rival, *values, p, "open", len(ahead)])
        for row, p in zip(found, holm([row[-3] for row in found]), strict=True):
            row[-3] = p
            if p <= 0.05:
                row[-2] = "better" if row[4] > (where[-1] == "ratio") else "worse"
        rows += found
    return pd.DataFrame(rows, columns=[*keys, "rival", "value", "low", "high", "p", "verdict", "seeds"])
