"""Planted knowledge: students of which it is known what they learned from their teacher, and what not.

Images of several cues (:mod:`kdx.planted`) and labels that tell some of them: a network that is
trained with such labels knows these cues and no others. A student that sees nothing but its
teacher's logits knows what the teacher knows. So what it holds beside its base is known, and where in
each image it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kdx import planted
from kdx.cards import DATASETS
from kdx.data import Dataset
from kdx.distill import Recipe, evaluate, fit
from kdx.intervals import share_interval
from kdx.planted import Scene
from kdx.runs import Run
from kdx.study import fit_all

FRESH = 10**6  # seeds of images that nothing else uses


@dataclass(frozen=True)
class Planting:
    """Which cues the base's labels tell, and which the teacher's do; by their place in ``Scene.cues``."""

    base: tuple[int, ...]
    teacher: tuple[int, ...]

    @property
    def distilled(self) -> tuple[int, ...]:
        """The cues that the student has and its base lacks."""
        return tuple(cue for cue in self.teacher if cue not in self.base)

    @property
    def residual(self) -> tuple[int, ...]:
        """The cues that the base has and the student lacks."""
        return tuple(cue for cue in self.base if cue not in self.teacher)


PLANTINGS = {
    "distilled": Planting(base=(0,), teacher=(0, 1)),
    "residual": Planting(base=(0, 2), teacher=(0,)),
    "both": Planting(base=(0, 2), teacher=(0, 1)),
    "nothing": Planting(base=(0,), teacher=(0,)),
}


def images_of(scene: Scene, n: int, seed: int) -> Dataset:
    """``n`` images of a scene in memory, with the card of the registered dataset but for classes and size."""
    images, labels, masks = planted.draw(scene, n, seed)
    card = replace(DATASETS["planted"], classes=scene.classes, size=(3, scene.size, scene.size), counts={})
    return Dataset(images, labels, card, masks)


def tell(dataset: Dataset, scene: Scene, known: Sequence[int], seed: int) -> Dataset:
    """The same images with labels that tell the values of the cues ``known`` and are noise in all others."""
    values = scene.values_of(dataset.labels)
    noise = torch.randint(scene.values, values.shape, generator=torch.Generator().manual_seed(seed))
    hidden = [cue for cue in range(len(scene.cues)) if cue not in known]
    values[:, hidden] = noise[:, hidden]
    return replace(dataset, labels=scene.labels_of(values))


def shuffled(dataset: Dataset, seed: int = 0) -> Dataset:
    """The same images with their labels in a random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return replace(dataset, labels=dataset.labels[order])


def cue_hits(logits: Tensor, labels: Tensor, scene: Scene) -> Tensor:
    """bool (n, cues): is the likeliest value of each cue right? Its probability is the sum over the classes
    that have it."""
    table = logits.softmax(1).view(len(logits), *[scene.values] * len(scene.cues))
    axes = range(1, table.ndim)
    likeliest = [table.sum([axis for axis in axes if axis != own]).argmax(1) for own in axes]
    return torch.stack(likeliest, 1) == scene.values_of(labels)


@dataclass(frozen=True)
class Grown:
    """A planting that was carried out, with one seed.

    Attributes
    ----------
    networks : student, base, teacher, second base (as the base, from another seed).
    images : what maps are scored on; no network has seen them.
    reference : others, for explainers that need some.
    """

    planting: str
    seed: int
    scene: Scene
    networks: dict[str, Run]
    images: Dataset
    reference: Dataset

    @property
    def plan(self) -> Planting:
        return PLANTINGS[self.planting]


def plant(
    scene: Scene,
    seeds: int = 3,
    *,
    images: int = 4000,
    tested: int = 300,
    reference: int = 256,
    seed: int = 0,
    model: str = "resnet10@0.125",
    recipe: Recipe | None = None,
    temperature: float = 4.0,
    workers: int = 1,
    device: str = "auto",
) -> list[Grown]:
    """Carry out all ``PLANTINGS``, or find their networks in the run store.

    Every network is trained on the same images; labels tell what it is to know. Students are distilled from
    logits alone (response with alpha = 1), so what they know they were told by their teacher. Networks that
    several plantings need are shared: seven are trained a seed.

    Parameters
    ----------
    seeds : repetitions, each with images and networks of its own.
    seed : the first of them.
    images, tested, reference : images to train on, to score maps on, and for reference sets.
    workers : as for :func:`kdx.cross_fit`.
    """
    if len(scene.cues) < 3:
        raise ValueError(f"cues: plantings need three, got {', '.join(scene.cues)}")
    recipe = recipe or Recipe(epochs=8, sizes=(1.0,))
    grown: list[Grown] = []
    sets: dict[int, tuple[Dataset, Dataset, Dataset]] = {}
    first: dict[Any, partial[Run]] = {}
    for i in range(seed, seed + seeds):
        train = images_of(scene, images, 3 * i)
        sets[i] = (train, images_of(scene, tested, 3 * i + 1), images_of(scene, reference, 3 * i + 2))
        common: dict[str, Any] = {"recipe": recipe, "device": device}
        for plan in PLANTINGS.values():
            for known, which in ((plan.base, 0), (plan.base, 1), (plan.teacher, 1)):
                told = tell(train, scene, known, i)
                first[i, known, which] = partial(fit, model, told, sets[i][1], seed=2 * i + which, **common)
    taught = fit_all(first, workers)
    second = {}
    for i, (train, test, _) in sets.items():
        mute = tell(train, scene, (), i)  # what a student's labels say does not enter its loss
        common = {"recipe": recipe, "device": device, "technique": "response", "alpha": 1.0, "temperature": temperature}
        for plan in PLANTINGS.values():
            teacher = taught[i, plan.teacher, 1]
            second[i, plan.teacher] = partial(fit, model, mute, test, seed=2 * i, teacher=teacher, **common)
    students = fit_all(second, workers)
    for i, (_, test, others) in sets.items():
        for name, plan in PLANTINGS.items():
            networks = {
                "student": students[i, plan.teacher],
                "base": taught[i, plan.base, 0],
                "teacher": taught[i, plan.teacher, 1],
                "second base": taught[i, plan.base, 1],
            }
            grown.append(Grown(name, i, scene, networks, test, others))
    return grown


def checks(grown: Sequence[Grown], enough: float = 0.95, images: int = 1000) -> pd.DataFrame:
    """Did each planting take? A cue that was told must be known, one that was not must be guessed.

    Returns
    -------
    DataFrame : planting, seed, network, cue, told, value (accuracy, the share of images), low, high (Wilson's
        interval), took: at least ``enough`` if told; else within 5 points of chance. On ``images`` new ones.
    """
    rows = []
    found: dict[tuple[str, int], Tensor] = {}
    for one in grown:
        for role, run in one.networks.items():
            known = one.plan.base if "base" in role else one.plan.teacher
            if (key := (run.key, one.seed)) not in found:
                fresh = images_of(one.scene, images, FRESH + one.seed)
                found[key] = cue_hits(evaluate(run.model, fresh, device="cpu").logits, fresh.labels, one.scene)
            for i, cue in enumerate(one.scene.cues):
                hits = found[key][:, i].numpy()
                share = share_interval(hits)
                took = share.mean >= enough if i in known else abs(share.mean - 1 / one.scene.values) <= 0.05
                row = (one.planting, one.seed, role, cue, i in known, share.mean, share.low, share.high, took)
                rows.append(row)
    columns = ["planting", "seed", "network", "cue", "told", "value", "low", "high", "took"]
    return pd.DataFrame(rows, columns=columns)
