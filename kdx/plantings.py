"""Planted knowledge: students of which it is known what they learned from their teacher, and what not.

Images of several cues (:mod:`kdx.planted`) and labels that tell some of them: a network that is
trained with such labels knows these cues and no others. A student that sees nothing but its
teacher's logits knows what the teacher knows. So what it holds beside its base is known, and where in
each image it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    card = replace(DATASETS["planted"], classes=scene.classes, size=tuple(images.shape[1:]), counts={})
    return Dataset(images, labels, card, masks)


def tell(dataset: Dataset, scene: Scene, known: Sequence[int], seed: int) -> Dataset:
    """The same images with labels that tell the values of the cues ``known`` and are noise in all others."""
    values = scene.values_of(dataset.labels)
    noise = torch.randint(scene.values, values.shape, generator=torch.Generator().manual_seed(seed))
    hidden = [cue for cue in range(len(scene.cues)) if cue not in known]
    values[:, hidden] = noise[:, hidden]
    return replace(dataset, labels=scene.labels_of(values))


def cue_accuracy(logits: Tensor, labels: Tensor, scene: Scene) -> dict[str, Any]:
    """Cue -> the share of images in which its value is right in the likeliest class, with Wilson's interval.

    The probability of a value is the sum over the classes that have it.
    """
    right = {}
    values = scene.values_of(labels)
    table = logits.softmax(1).view(len(logits), *[scene.values] * len(scene.cues))
    for i, cue in enumerate(scene.cues):
        others = [axis for axis in range(1, table.ndim) if axis != i + 1]
        right[cue] = share_interval((table.sum(others).argmax(1) == values[:, i]).numpy())
    return right
