"""Planted knowledge: students whose knowledge is known, and where in each image it lies.

Images show several cues (:mod:`kdx.data.cues`), and labels reveal some of them: a network trained with such labels
knows these cues and no others. A student that sees nothing but its teacher's logits knows what the teacher knows. So
the difference between student and base is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kdx.data.cues import Scene, draw
from kdx.data.dataset import Dataset
from kdx.data.registry import DATASETS
from kdx.distil.cross_validation import fit_all
from kdx.distil.fit import Job, evaluate
from kdx.distil.run_store import Run
from kdx.distil.training import Recipe
from kdx.intervals import share_interval

FRESH = 10**6  # seeds of images that nothing else uses


@dataclass(frozen=True)
class Planting:
    """The cues that the base's labels reveal, and those that the teacher's do, by their place in ``Scene.cues``."""

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
    """``n`` images of a scene, with the card of the registered dataset except for classes and size."""
    images, labels, masks = draw(scene, n, seed)
    card = replace(DATASETS["planted"], classes=scene.classes, size=(3, scene.size, scene.size), counts={})
    return Dataset(images, labels, card, masks)


def tell(dataset: Dataset, scene: Scene, known: Sequence[int], seed: int) -> Dataset:
    """The same images with labels that reveal the values of the cues ``known`` and are noise in all others."""
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
    """Whether the likeliest value of each cue is right: bool (n, cues).

    The probability of a value is the sum over the classes that have it.
    """
    table = logits.softmax(1).view(len(logits), *[scene.values] * len(scene.cues))
    axes = range(1, table.ndim)
    likeliest = [table.sum([axis for axis in axes if axis != own]).argmax(1) for own in axes]
    return torch.stack(likeliest, 1) == scene.values_of(labels)


@dataclass(frozen=True)
class Grown:
    """A planting that was carried out with one seed.

    Attributes:
        planting: Its name in ``PLANTINGS``.
        seed: Of images and networks.
        scene: Description of the images.
        networks: student, base, teacher and second base (as the base, from another seed).
        images: Images on which maps are scored; no network has seen them.
        reference: Other images, for explainers that need some.
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

    Every network is trained on the same images; labels reveal what it is to know. Students are distilled from logits
    alone (response with alpha = 1), so all their knowledge comes from their teacher. Networks that several plantings
    need are shared: seven are trained per seed.

    Args:
        scene: Description of the images, with three cues or more.
        seeds: Repetitions, each with images and networks of its own.
        images: Images to train on.
        tested: Images on which maps are scored.
        reference: Images in the reference set.
        seed: First of the seeds.
        model: Name of a model, of all networks.
        recipe: Of all networks; None trains for 8 epochs at full size.
        temperature: Of the distillation.
        workers: As for :func:`kdx.cross_fit`.
        device: As for :func:`kdx.fit`.

    Returns:
        One object per planting and seed.
    """
    if len(scene.cues) < 3:
        raise ValueError(f"cues: plantings need three, got {', '.join(scene.cues)}")
    recipe = recipe or Recipe(epochs=8, sizes=(1.0,))
    grown: list[Grown] = []
    sets: dict[int, tuple[Dataset, Dataset, Dataset]] = {}
    first: dict[Any, Job] = {}
    for i in range(seed, seed + seeds):
        train = images_of(scene, images, 3 * i)
        sets[i] = (train, images_of(scene, tested, 3 * i + 1), images_of(scene, reference, 3 * i + 2))
        common: dict[str, Any] = {"recipe": recipe, "device": device}
        for plan in PLANTINGS.values():
            for known, which in ((plan.base, 0), (plan.base, 1), (plan.teacher, 1)):
                told = tell(train, scene, known, i)
                first[i, known, which] = Job(model, told, sets[i][1], seed=2 * i + which, **common)
    taught = dict(fit_all(first, workers))
    second = {}
    for i, (train, test, _) in sets.items():
        mute = tell(train, scene, (), i)  # a student's labels do not enter its loss
        settings = {"alpha": 1.0, "temperature": temperature}
        common = {"recipe": recipe, "device": device, "technique": "response", "settings": settings}
        for plan in PLANTINGS.values():
            teacher = taught[i, plan.teacher, 1]
            second[i, plan.teacher] = Job(model, mute, test, seed=2 * i, teacher=teacher, **common)
    students = dict(fit_all(second, workers))
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
    """Did training plant the cues? A cue that was revealed must be known, any other must be guessed.

    Args:
        grown: From :func:`plant`.
        enough: Accuracy from which a revealed cue counts as known.
        images: New images on which the networks are evaluated.

    Returns:
        planting, seed, network, cue, told (whether it was revealed), value (accuracy, a share of the images), low,
        high (Wilson's 95 % interval), took: value is at least ``enough`` if told, else within 5 points of chance.
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
