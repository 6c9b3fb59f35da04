"""Planted knowledge: students whose knowledge is known, and where in each image it lies.

Images show several cues (:mod:`kdx.data.cues`), and labels reveal some of them: a network trained with such labels
knows these cues and no others. A student that sees nothing but its teacher's logits knows what the teacher knows. So
the difference between student and base is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from kdx.data.cues import Scene, draw
from kdx.data.dataset import Dataset
from kdx.data.registry import DATASETS
from kdx.distil.backends import fit_all
from kdx.distil.fit import Job, evaluate, fit
from kdx.distil.run_store import Run
from kdx.distil.training import Recipe
from kdx.intervals import share_interval

FRESH = 10**6  # seeds of images that nothing else uses
SHIPPED = 99  # seed of the plantings that come with the checkout
MODEL = "resnet10@0.125"
ROLES = ("student", "base", "teacher", "second base")


@dataclass(frozen=True)
class Planting:
    """What the labels of base and teacher reveal, by places in ``Scene.cues``.

    Attributes:
        base: The cues whose values the base's labels reveal.
        teacher: The cues whose values the teacher's labels reveal.
        partly: Cues of which the base's labels reveal only whether they have the first value.
        same_answer: The teacher's labels reveal its new cue by what the base's labels reveal the dropped one with, so
            that student and base give the same kind of answer for another reason.
    """

    base: tuple[int, ...]
    teacher: tuple[int, ...]
    partly: tuple[int, ...] = ()
    same_answer: bool = False

    @property
    def distilled(self) -> tuple[int, ...]:
        """The cues that the student has and its base lacks."""
        return tuple(cue for cue in self.teacher if cue not in self.base)

    @property
    def residual(self) -> tuple[int, ...]:
        """The cues that the base has and the student lacks."""
        return tuple(cue for cue in self.base if cue not in self.teacher)

    def told(self, base: bool) -> dict[int, int]:
        """Which value in a label reveals which cue, by their places, in the labels of the base or the teacher."""
        if base or not self.same_answer:
            return {cue: cue for cue in (self.base if base else self.teacher)}
        moved = dict(zip(self.distilled, self.residual, strict=True))
        return {moved.get(cue, cue): cue for cue in self.teacher}

    def turned(self, by: int, cues: int) -> Planting:
        """The same planting with every cue replaced by the one ``by`` places further, of ``cues``."""
        base, teacher, partly = (
            tuple((cue + by) % cues for cue in of) for of in (self.base, self.teacher, self.partly)
        )
        return Planting(base, teacher, partly, self.same_answer)


PLANTINGS = {
    "distilled": Planting(base=(0,), teacher=(0, 1)),
    "residual": Planting(base=(0, 2), teacher=(0,)),
    "both": Planting(base=(0, 2), teacher=(0, 1)),
    "nothing": Planting(base=(0,), teacher=(0,)),
}
HARDER = {
    "partly known": Planting(base=(0, 2), teacher=(0, 1), partly=(1,)),
    "same answer": Planting(base=(0, 2), teacher=(0, 1), same_answer=True),
}


def images_of(scene: Scene, n: int, seed: int, turn: Sequence[int] = ()) -> Dataset:
    """``n`` images of a scene as :func:`kdx.data.cues.draw` draws them, with the card of the registered dataset except
    for classes and size."""
    images, labels, masks = draw(scene, n, seed, turn)
    card = replace(DATASETS["planted"], classes=scene.classes, size=(3, scene.size, scene.size), counts={})
    return Dataset(images, labels, card, masks)


def tell(
    dataset: Dataset, scene: Scene, known: Mapping[int, int] | Sequence[int], seed: int, partly: Sequence[int] = ()
) -> Dataset:
    """The same images with labels that reveal some cues and are noise otherwise.

    Args:
        dataset: Images of the scene.
        scene: Their description.
        known: The cues whose values the labels reveal; or place in the label -> cue.
        seed: Of the noise.
        partly: Cues of which the labels reveal only whether they have the first value.
    """
    places = known if isinstance(known, Mapping) else {cue: cue for cue in known}
    values = scene.values_of(dataset.labels)
    generator = torch.Generator().manual_seed(seed)
    told = torch.randint(scene.values, values.shape, generator=generator)
    for place, cue in places.items():
        told[:, place] = values[:, cue]
    for cue in partly:
        other = torch.randint(1, scene.values, values[:, cue].shape, generator=generator)
        told[:, cue] = torch.where(values[:, cue] == 0, 0, other)
    return replace(dataset, labels=scene.labels_of(told))


def shuffled(dataset: Dataset, seed: int = 0) -> Dataset:
    """The same images with their labels in a random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return replace(dataset, labels=dataset.labels[order])


def cue_hits(logits: Tensor, labels: Tensor, scene: Scene, places: Mapping[int, int] | None = None) -> Tensor:
    """Whether the likeliest value of each cue is right: bool (n, cues).

    The probability of a value is the sum over the classes that have it.

    Args:
        logits: (n, classes).
        labels: (n,) the true classes.
        scene: Description of the images.
        places: Place in the label -> cue that is read there; others are read in their own places.
    """
    table = logits.softmax(1).view(len(logits), *[scene.values] * len(scene.cues))
    axes = range(1, table.ndim)
    likeliest = torch.stack([table.sum([axis for axis in axes if axis != own]).argmax(1) for own in axes], 1)
    order = list(range(len(scene.cues)))
    for place, cue in (places or {}).items():
        order[cue] = place
    return likeliest[:, order] == scene.values_of(labels)


@dataclass(frozen=True)
class Grown:
    """A planting that was carried out with one seed.

    Attributes:
        planting: Its name in ``PLANTINGS`` or ``HARDER``.
        seed: Of images and networks. It also decides the roles: each next seed gives every role to the next cue.
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
        """What was planted, with the roles of this seed."""
        return (PLANTINGS | HARDER)[self.planting].turned(self.seed, len(self.scene.cues))


def plant(
    scene: Scene,
    seeds: int = 3,
    *,
    plantings: Mapping[str, Planting] | None = None,
    images: int = 4000,
    tested: int = 300,
    reference: int = 256,
    seed: int = 0,
    model: str = MODEL,
    base_model: str | None = None,
    recipe: Recipe | None = None,
    temperature: float = 4.0,
    workers: int | str = 1,
    device: str = "auto",
    second_base: bool = True,
) -> list[Grown]:
    """Carry out plantings, or find their networks in the run store.

    Every network is trained on the same images; labels reveal what it is to know. Students are distilled from logits
    alone (response with alpha = 1), so all their knowledge comes from their teacher. Networks that several plantings
    need are shared: seven are trained per seed for ``PLANTINGS``. Roles rotate (:class:`Grown`): over as many seeds as
    there are cues, every cue plays every role.

    Args:
        scene: Description of the images, with three cues or more.
        seeds: Repetitions, each with images and networks of its own.
        plantings: Some of ``PLANTINGS`` and ``HARDER``; None takes the former.
        images: Images to train on.
        tested: Images on which maps are scored.
        reference: Images in the reference set.
        seed: First of the seeds.
        model: Name of a model, of teachers and students.
        base_model: Name of a model, of the bases; None takes that of the students.
        recipe: Of all networks; None trains for 8 epochs at full size.
        temperature: Of the distillation.
        workers: As for :func:`kdx.cross_fit`.
        device: As for :func:`kdx.fit`.
        second_base: Whether to train it too.

    Returns:
        One object per planting and seed.
    """
    if len(scene.cues) < 3:
        raise ValueError(f"cues: plantings need three, got {', '.join(scene.cues)}")
    plantings = PLANTINGS if plantings is None else plantings
    if any(plan.partly for plan in plantings.values()) and scene.values < 3:
        raise ValueError(f"values: a cue can be partly known if it has three or more, got {scene.values}")
    base_model = base_model or model
    common: dict[str, Any] = {"recipe": recipe or Recipe(epochs=8, batch_size=64), "device": device}
    grown: list[Grown] = []
    sets: dict[int, tuple[Dataset, Dataset, Dataset]] = {}
    first: dict[Any, Job] = {}
    plans = {
        (name, i): plan.turned(i, len(scene.cues))
        for i in range(seed, seed + seeds)
        for name, plan in plantings.items()
    }
    for (_, i), plan in plans.items():
        if i not in sets:
            train, test, others = (images_of(scene, n, 3 * i + j) for j, n in enumerate((images, tested, reference)))
            sets[i] = (train, test, others)
        train, test, _ = sets[i]
        base, other, teacher = _labelled(plan, i, model, base_model)
        for network in (base, teacher, other) if second_base else (base, teacher):
            told = tell(train, scene, dict(network.places), i, network.partly)
            first[network] = Job(network.model, told, test, seed=2 * i + network.which, **common)
    taught = dict(fit_all(first, workers))
    second = {}
    settings = {"alpha": 1.0, "temperature": temperature}
    for (_, i), plan in plans.items():
        train, test, _ = sets[i]
        teacher = _labelled(plan, i, model, base_model)[2]
        mute = tell(train, scene, (), i)  # a student's labels do not enter its loss
        second[teacher] = Job(
            model, mute, test, "response", taught[teacher], seed=2 * i, settings=settings, **common
        )  # fmt: skip
    students = dict(fit_all(second, workers))
    for (name, i), plan in plans.items():
        base, other, teacher = _labelled(plan, i, model, base_model)
        runs = dict(zip(ROLES, (students[teacher], taught[base], taught[teacher], taught.get(other)), strict=True))
        if not second_base:
            del runs["second base"]
        grown.append(Grown(name, i, scene, runs, *sets[i][1:]))
    return grown


def fit_ignorant(scene: Scene, images: int, seed: int, model: str, recipe: Recipe, device: str = "auto") -> Run:
    """A network whose labels reveal nothing, on the training images that :func:`plant` draws for a seed."""
    train = images_of(scene, images, 3 * seed)
    return fit(model, tell(train, scene, (), seed), train.limit(100), recipe=recipe, seed=2 * seed, device=device)


class _Labelled(NamedTuple):
    """A network that is trained on labels: what they reveal, and from which of a seed's two initial weights."""

    seed: int
    model: str
    which: int
    places: tuple[tuple[int, int], ...]
    partly: tuple[int, ...] = ()


def _labelled(plan: Planting, seed: int, model: str, base_model: str) -> tuple[_Labelled, _Labelled, _Labelled]:
    """Base, second base and teacher."""
    of_base, of_teacher = (tuple(sorted(plan.told(base).items())) for base in (True, False))
    base, second = (_Labelled(seed, base_model, which, of_base, plan.partly) for which in (0, 1))
    return base, second, _Labelled(seed, model, 1, of_teacher)


def checks(grown: Sequence[Grown], enough: float = 0.95, images: int = 1000) -> pd.DataFrame:
    """Did training plant the cues? A cue that was revealed must be known, any other must be guessed.

    Args:
        grown: From :func:`plant`.
        enough: Accuracy from which a revealed cue counts as known.
        images: New images on which the networks are evaluated; their cues are independent.

    Returns:
        planting, seed, network, cue, told (whether it was revealed), value (accuracy, a share of the images), low,
        high (Wilson's 95 % interval), took: value is at least ``enough`` if told, else within 5 points of chance (twice
        that of a guess for a cue that is partly known).
    """
    rows = []
    found: dict[tuple[str, int], Tensor] = {}
    for one in grown:
        for role, run in one.networks.items():
            in_base = "base" in role
            places = one.plan.told(in_base)
            if (key := (run.key, one.seed)) not in found:
                fresh = images_of(replace(one.scene, correlation=0.0), images, FRESH + one.seed)
                logits = evaluate(run.model, fresh, device="cpu").logits
                found[key] = cue_hits(logits, fresh.labels, one.scene, places)
            for i, cue in enumerate(one.scene.cues):
                share = share_interval(found[key][:, i].numpy())
                told = i in places.values()
                guessed = (2 if in_base and i in one.plan.partly else 1) / one.scene.values
                took = share.mean >= enough if told else abs(share.mean - guessed) <= 0.05
                rows.append((one.planting, one.seed, role, cue, told, share.mean, share.low, share.high, took))
    columns = ["planting", "seed", "network", "cue", "told", "value", "low", "high", "took"]
    return pd.DataFrame(rows, columns=columns)
