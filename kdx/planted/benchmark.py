"""The benchmark: how well does an explainer of distillation find knowledge that was planted?

One call holds any function against the shipped planted networks. Nothing is trained and nothing is downloaded.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.explain.explainers import Maps
from kdx.explain.reference import DIRECTIONS
from kdx.intervals import mean_interval
from kdx.measure.localisation import auprc, auroc, mass_on, pointing_game
from kdx.networks.models import build
from kdx.networks.threads import locked
from kdx.planted import leaderboard, suite
from kdx.planted.behaviour import CLEAR, answers_to_cues, order
from kdx.planted.contest import UNTRAINED
from kdx.planted.doses import taken
from kdx.progress import progress

GIVEN = ("student", "base", "images", "labels", "reference", "teacher", "truth")
MEASURED = 300  # images on which it is measured what a student took
TINY = 1e-3  # least mass on a cue, so that a ratio is at most 1000
RATIO = "ratio"
LOGARITHMIC = (RATIO,)
SCORES = {
    "AUPRC": "do the highest values lie on the cue that was planted? (average precision of the pixels)",
    "pointing game": "does the highest value lie on it?",
    RATIO: "mass on it over that on any other cue, relative to untrained networks",
    "detected": "does the size of a map tell that something was planted? (area under the ROC curve)",
    "dose": "does the size of a map grow with what a student took? (share of pairs in the right order)",
    "cue removal": "do maps order the cues as repainting them changes the answers? (share of pairs)",
}
COLUMNS = ["case", "score", "better", "chance", "best", "value", "low", "high", "seeds", "rank", "of"]


class ReferenceSet(NamedTuple):
    """Other images of the same scene, for explainers that need some.

    Attributes:
        images: (r, c, h, w), normalised.
        labels: (r,) class indices.
        embeddings: (classes, m) label embeddings.
    """

    images: Tensor
    labels: Tensor
    embeddings: Tensor


def benchmark(
    explain: Callable[..., Any],
    name: str = "",
    *,
    cases: Sequence[str] = tuple(suite.CASES),
    tested: int = 100,
    reference: int = 192,
) -> pd.DataFrame:
    """Score an explainer of distillation on the shipped planted networks.

    The networks are those of ``kdx.planted.suite.CASES``: all plantings, other cues and held-out cues, on which nothing
    was tuned, in three repetitions each, in which the cues change roles; and one repetition each of cues of different
    sizes and of cues that overlap. Students of several doses are of one seed, that of the first repetition. A score is
    a mean over stages, plantings, directions and images.

    Args:
        explain: Takes student, base, images (n, c, h, w), normalised, and their labels (n,). Returns an object with
            ``distilled`` and ``residual``: stage -> maps (n, h, w) >= 0 of any resolution; the names of the stages are
            free. It is also given what its signature names: ``reference`` (a :class:`ReferenceSet`), ``teacher``
            (a network), or ``truth`` (direction -> masks (n, h, w); for upper bounds).
        name: How it is called in the ranks; "" takes the function's name.
        cases: Some of ``kdx.planted.suite.CASES``.
        tested: Images that are explained, for each planting.
        reference: Images in the reference set.

    Returns:
        case (``all``: over the repetitions of all cases), score (``SCORES``), better (always ``higher``), chance (of
        maps that are constant), best (of the masks themselves at the resolution of these maps), value, low, high (95 %
        t interval over the seeds of the repetitions; ratios on the logarithmic scale; NaN where ``seeds`` is 1: the
        score ``dose``, and the cases ``sizes`` and ``overlapping``), seeds, rank among the ``of`` explainers of the
        leaderboard and this one (missing for ``all`` if only some cases are asked for). ``attrs`` has ``name``, what is
        ``given`` to the explainer, the ``seconds`` that it took, and those of the ``whole`` call.

    Raises:
        ValueError: Unknown arguments in the signature, unknown cases, or maps that are not as they should be.

    Examples:
        >>> import kdx
        >>> from kdx.explain.explainers import Maps
        >>> def gradient(student, base, images, labels):
        ...     gap = kdx.saliency(student, images, labels) - kdx.saliency(base, images, labels)
        ...     gap = gap.sum(1)
        ...     return Maps({"input": gap.relu()}, {"input": (-gap).relu()})
        >>> table = kdx.benchmark(gradient, cases=["held-out cues"], tested=10)
        >>> sorted(set(table["score"]))
        ['AUPRC', 'cue removal', 'pointing game', 'ratio']
    """
    given = wanted(explain)
    unknown = [case for case in cases if case not in suite.CASES]
    if unknown or not cases:
        what = f"unknown {unknown[0]!r}" if unknown else "expected one or more, got none"
        raise ValueError(f"cases: {what}; choose from: {', '.join(suite.CASES)}")
    if tested < 1:
        raise ValueError(f"tested: expected 1 image or more, got {tested}")
    start = time.perf_counter()
    places = [(case, fold) for case in cases for fold in range(1, len(suite.CASES[case].seeds) + 1)]
    found = [
        measured(Repetition(case, fold, tested, reference), explain)
        for case, fold in progress(places, desc="benchmark", unit="repetition")
    ]
    name = name or getattr(explain, "__name__", type(explain).__name__)
    table = summary(found, name, given)
    if set(cases) < set(suite.CASES):
        table.loc[table["case"] == "all", ["rank", "of"]] = pd.NA  # others are ranked over all cases
    table.attrs["whole"] = round(time.perf_counter() - start, 1)
    return table


def measured(whole: Repetition, explain: Callable[..., Any]) -> pd.DataFrame:
    """Scores of one repetition: case, seed, score, chance, best, value, seconds (of the explainer)."""
    found, seconds = whole.explained(explain, wanted(explain))
    of = [whole.scores(maps) for maps in (whole.ideal(found, False), whole.ideal(found, True), found)]
    rows = [(whole.case, whole.seed, score, *(scores[score] for scores in of), seconds) for score in of[0]]
    return pd.DataFrame(rows, columns=["case", "seed", "score", "chance", "best", "value", "seconds"])


def summary(found: Sequence[pd.DataFrame], name: str, given: Sequence[str]) -> pd.DataFrame:
    """The table of :func:`benchmark`, from :func:`measured` of each repetition."""
    table = leaderboard.ranked(_over_seeds(pd.concat(found)), name)[COLUMNS]
    table.attrs |= {"name": name, "given": list(given)}
    table.attrs["seconds"] = round(sum(float(of["seconds"].iloc[0]) for of in found), 1)
    return table


def wanted(explain: Callable[..., Any]) -> list[str]:
    """The names in ``GIVEN`` that an explainer is called with; the first four come by position."""
    parameters = list(inspect.signature(explain).parameters.values())
    more = [p for p in parameters[4:] if p.name in GIVEN[4:]]
    unknown = [p for p in parameters[4:] if p not in more and p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    unknown += [p for p in parameters[4:] if p.kind == p.KEYWORD_ONLY and p not in more and p.default is p.empty]
    unknown += [p for p in parameters[:4] if p.kind > p.POSITIONAL_OR_KEYWORD or p.name in GIVEN[4:]]
    if len(parameters) < 4 or unknown:
        raise ValueError(
            f"explain: expected a function of {', '.join(GIVEN[:4])} and perhaps {', '.join(GIVEN[4:])}, got "
            f"({', '.join(p.name for p in parameters)})"
        )
    return [p.name for p in more]


class Repetition:
    """One repetition of a case: its networks and images, and scores of the maps of all its pairs of networks.

    A pair is a planting by its name, a dose by its number, or ``UNTRAINED``.

    Args:
        case: A name in ``kdx.planted.suite.CASES``.
        fold: From 1.
        tested: Images that are explained.
        reference: Images in the reference set.
    """

    def __init__(self, case: str, fold: int, tested: int, reference: int) -> None:
        self.case = case
        self.grown = {one.planting: one for one in suite.load(case, fold, tested, reference)}
        one = next(iter(self.grown.values()))
        self.seed, self.scene = one.seed, one.scene
        self.images, self.plain = one.images, one.images.card.normalize(one.images.images)
        self.others = ReferenceSet(
            one.reference.card.normalize(one.reference.images), one.reference.labels, one.scene.embeddings
        )
        assert one.images.masks is not None
        cues = range(len(self.scene.cues))
        self.masks = torch.stack([(one.images.masks >> cue & 1).float() for cue in cues], 1)  # (n, cues, h, w)
        doses = {one.dose: one for one in suite.load_doses(case, fold)}
        pairs: dict[Any, Any] = {**self.grown, **doses}
        self.networks: dict[Any, dict[str, nn.Module]] = {
            pair: {role: run.model for role, run in found.networks.items()} for pair, found in pairs.items()
        }
        self.networks[UNTRAINED] = self._untrained()
        self.truths = {pair: self._truth({}) for pair in self.networks}
        self.truths |= {name: self._truth(self._planted(name)) for name in self.grown}
        self.truths |= {dose: self._truth({"distilled": {one.cue: taken(one, self.scene, MEASURED)}})
                        for dose, one in doses.items()}  # fmt: skip
        self.doses = list(doses)

    def _untrained(self) -> dict[str, nn.Module]:
        one = next(iter(self.networks.values()))
        how = {role: one[role].architecture for role in ("student", "base", "teacher")}
        seeds = (UNTRAINED + 2 * self.seed, UNTRAINED + 2 * self.seed + 1, UNTRAINED - 1)
        return {role: build(**of, seed=i).eval() for (role, of), i in zip(how.items(), seeds, strict=True)}  # type: ignore[arg-type]

    def _planted(self, name: str) -> dict[str, dict[int, float]]:
        return {d: dict.fromkeys(getattr(self.grown[name].plan, d), 1.0) for d in DIRECTIONS}

    def _truth(self, cues: Mapping[str, Mapping[int, float]]) -> dict[str, Tensor]:
        """Direction -> (n, h, w): the masks of cues, times how much of each there is to show."""
        found = {d: torch.zeros_like(self.masks[:, 0]) for d in DIRECTIONS}
        for direction, of in cues.items():
            for cue, strength in of.items():
                found[direction] = found[direction].maximum(strength * self.masks[:, cue])
        return found

    def explained(self, explain: Callable[..., Any], given: Sequence[str]) -> tuple[dict[Any, Maps], float]:
        """Maps of every pair, and the seconds that they took."""
        start, found = time.perf_counter(), {}
        for pair, networks in self.networks.items():
            offered = {  # copies, or what an explainer leaves in them would change the next pair
                "reference": ReferenceSet(*(of.clone() for of in self.others)),
                "teacher": networks["teacher"],
                "truth": {direction: of.clone() for direction, of in self.truths[pair].items()},
            }
            more = {name: offered[name] for name in given}
            images, labels = self.plain.clone(), self.images.labels.clone()
            with locked(*networks.values()):
                maps = explain(networks["student"], networks["base"], images, labels, **more)
            found[pair] = checked(maps, len(self.plain))
        stages = {pair: [list(getattr(maps, d)) for d in DIRECTIONS] for pair, maps in found.items()}
        first = next(iter(stages))
        if differing := [pair for pair, of in stages.items() if of != stages[first]]:
            raise ValueError(
                f"explain: expected the same stages for all pairs of networks, got {stages[first]} for {first!r} and "
                f"{stages[differing[0]]} for {differing[0]!r}"
            )
        return found, time.perf_counter() - start

    def ideal(self, found: Mapping[Any, Maps], known: bool) -> dict[Any, Maps]:
        """The truth at the resolution of these maps; or, if nothing is known, constant maps."""
        return {
            pair: Maps(
                *(
                    {
                        s: F.adaptive_avg_pool2d(self.truths[pair][d][:, None], m.shape[1:])[:, 0]
                        if known
                        else torch.ones_like(m)
                        for s, m in getattr(maps, d).items()
                    }
                    for d in DIRECTIONS
                )
            )
            for pair, maps in found.items()
        }

    def scores(self, found: Mapping[Any, Maps]) -> dict[str, float]:
        """Each of ``SCORES`` that this repetition has, mean over what was planted."""
        values: dict[str, list[float]] = {score: [] for score in SCORES}
        for name in self.grown:
            for direction, cues in self._planted(name).items():
                for stage, maps in getattr(found[name], direction).items() if cues else ():
                    blank = getattr(found[UNTRAINED], direction)[stage]
                    values["AUPRC"].append(self._mean(auprc, maps, cues))
                    values["pointing game"].append(self._mean(pointing_game, maps, cues))
                    values[RATIO].append(math.log(self._ratio(maps, cues)) - math.log(self._ratio(blank, cues)))
                    sizes = self._density(maps)
                    values["cue removal"].append(order(sizes, self.beyond[name, direction], CLEAR))
        if {"distilled", "nothing"} <= set(self.grown):
            for stage, maps in found["distilled"].distilled.items():
                values["detected"].append(_told_apart(maps, found["nothing"].distilled[stage]))
        if self.doses:
            truth = torch.tensor([[float(self.truths[dose]["distilled"].max()) for dose in self.doses]])
            for stage in found[self.doses[0]].distilled:
                sizes = torch.stack([_sizes(found[dose].distilled[stage]) for dose in self.doses], 1)
                values["dose"].append(order(sizes, truth.expand_as(sizes)))
        told = {score: [one for one in of if not math.isnan(one)] for score, of in values.items()}  # no order: no score
        means = {score: float(np.mean(of)) for score, of in told.items() if of}
        return {score: math.exp(value) if score in LOGARITHMIC else value for score, value in means.items()}

    @cached_property
    def beyond(self) -> dict[tuple[str, str], Tensor]:
        """(planting, direction) -> (n, cues): how much more one network's answers depend on a cue than the other's."""
        found: dict[tuple[str, str], Tensor] = {}
        for name in self.grown:
            pair = {role: self.networks[name][role] for role in ("student", "base")}
            both = list(answers_to_cues(pair, self.scene, len(self.plain), 3 * self.seed + 1).values())
            found |= {(name, d): (both[own] - both[other]).relu() for d, (own, other) in DIRECTIONS.items()}
        return found

    def _mean(self, score: Callable[[Tensor, Tensor], Tensor], maps: Tensor, cues: Mapping[int, float]) -> float:
        return float(score(filled(maps), self.masks[:, list(cues)].amax(1) > 0).mean())

    def _ratio(self, maps: Tensor, cues: Mapping[int, float]) -> float:
        """Mean mass on the planted cue over that on the other cue with the most."""
        maps = filled(maps)
        on = [float(mass_on(maps, self.masks[:, cue].byte()).mean()) for cue in range(self.masks.shape[1])]
        others = max(mass for cue, mass in enumerate(on) if cue not in cues)
        return max(sum(on[cue] for cue in cues), TINY) / max(others, TINY)

    def _density(self, maps: Tensor) -> Tensor:
        """(n, cues): the mean of a map on each cue."""
        fine = F.interpolate(maps[:, None].double(), self.masks.shape[2:], mode="nearest-exact")
        return (fine * self.masks).sum((2, 3)) / self.masks.sum((2, 3))


def filled(maps: Tensor) -> Tensor:
    """Maps in which one that is 0 everywhere has become 1 everywhere: it says nothing of where."""
    return torch.where(maps.flatten(1).amax(1)[:, None, None] == 0, torch.ones_like(maps), maps)


def _sizes(maps: Tensor) -> Tensor:
    return maps.flatten(1).double().mean(1)


def _told_apart(some: Tensor, none: Tensor) -> float:
    """Area under the ROC curve by which the sizes of maps separate images."""
    sizes = torch.cat([_sizes(some), _sizes(none)])
    return float(auroc(sizes[None, None], torch.arange(len(sizes))[None, None] < len(some)))


def checked(maps: Any, n: int) -> Maps:
    """The maps of an explainer, if they are as they should be."""
    found = {}
    for direction in DIRECTIONS:
        of = getattr(maps, direction, None)
        if not isinstance(of, Mapping) or not of:
            raise ValueError(f"explain: expected {direction}, stage -> maps, got {type(maps).__name__} with {of!r:.80}")
        for stage, drawn in of.items():
            if not isinstance(drawn, Tensor) or drawn.ndim != 3 or len(drawn) != n:
                what = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                raise ValueError(f"explain: expected {n} maps (n, h, w) at {stage!r}, {direction}, got {what}")
            if not ((drawn >= 0) & drawn.isfinite()).all():
                raise ValueError(f"explain: expected finite maps without negative values at {stage!r}, {direction}")
        found[direction] = {stage: drawn.detach().float().cpu() for stage, drawn in of.items()}
    return Maps(**found)


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Means of chance, best and value over the repetitions of each case and of all."""
    found = []
    for (case, score), of in _groups(rows):
        logarithmic = score in LOGARITHMIC
        values = np.log(of["value"]) if logarithmic else of["value"]
        ends = [values.mean(), math.nan, math.nan]
        if len(values) > 1:
            ends = list(mean_interval(values.to_numpy())[:3])
        bounds = [np.log(of[name]).mean() if logarithmic else of[name].mean() for name in ("chance", "best")]
        numbers = [*bounds, *ends]
        found.append((case, score, "higher", *(np.exp(numbers) if logarithmic else numbers), len(values)))
    return pd.DataFrame(found, columns=COLUMNS[:9])


def _groups(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    for case, of in [("all", rows), *rows.groupby("case", sort=False)]:
        for score in SCORES:
            if len(part := of[of["score"] == score]):
                yield (str(case), score), part
