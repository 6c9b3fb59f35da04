"""Which networks of whole pages come with the checkout: their roles, folds and recipes.

:mod:`kdx.distil.shipped` trains, loads and verifies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kdx.data.dataset import Dataset, load_dataset
from kdx.distil.cross_validation import Plan, carry_out, plan_chains, plan_fit
from kdx.distil.run_store import Run
from kdx.distil.training import Recipe

WATCHED = 2000  # held-out images on which each epoch is measured

Place = tuple[str, int]  # role, fold from 1
Plans = dict[Place, Plan]
Ship = Callable[[Run, str, int], Run]  # writes a network with its role and fold, and gives the shipped one


class Study(Protocol):
    """Networks of one dataset that come with the checkout."""

    @property
    def dataset(self) -> str:
        """A name in ``DATASETS``, and of the folder."""

    @property
    def places(self) -> list[Place]:
        """Role and fold of every network."""

    def images(self, split: str) -> Any:
        """The training or test images, of classification or detection."""

    def train(self, wanted: Sequence[Place], ship: Ship, workers: int | str, device: str) -> None:
        """Train those of ``wanted`` that are missing, and ship each when it is finished."""


@dataclass(frozen=True)
class CrossValidated:
    """A :class:`Study` whose networks are trained by one recipe on the folds of a dataset.

    Attributes:
        dataset: A name in ``DATASETS``.
        recipe: Of all networks.
        plans: All networks, with their roles.
        folds: Number of folds of the cross-validation.
        settings: Of the techniques.
        data: Keyword arguments of :func:`kdx.load_dataset`.
        classes: Those whose images are kept; empty keeps all.
        stem: Of all networks.
    """

    dataset: str
    recipe: Recipe
    plans: Callable[[Recipe], Plans]
    folds: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    stem: str = "small"

    @property
    def places(self) -> list[Place]:
        return list(self._roles().values())

    def images(self, split: str) -> Dataset:
        images = load_dataset(self.dataset, split, **self.data)
        return images.only(self.classes) if self.classes else images

    def train(self, wanted: Sequence[Place], ship: Ship, workers: int | str, device: str) -> None:
        """Fold by fold, teachers before their students. A teacher of a wanted network is shipped with it."""
        roles, images = self._roles(), self.images("train")
        for fold in sorted({fold for _, fold in wanted}):
            carry_out(
                [plan for plan, place in roles.items() if place in wanted and place[1] == fold],
                images, self.settings, self.folds, WATCHED, 0, self.recipe, workers,
                lambda plan, run: ship(run, *roles[plan]) if plan in roles else run,
                stem=self.stem, device=device,
            )  # fmt: skip

    def _roles(self) -> dict[Plan, Place]:
        """Of one network with two roles, the last."""
        return {plan: place for place, plan in self.plans(self.recipe).items()}


LADDER = ("resnet10@0.125", "resnet10@0.1875", "resnet18@0.1875", "resnet18@0.25")
ASSISTANT = "resnet10@0.1875"
TEMPERATURES = (1.0, 2.0, 4.0)  # of the students of a teacher with smoothed labels


def _students(recipe: Recipe) -> Plans:
    """The networks of the pages on Grad-CAM, UniCAM and dissection."""
    techniques = ("response", "overhaul", "attention", "smoothing")
    return plan_fit("resnet18@0.25", "resnet10@0.1875", techniques, 5, 5, 0, recipe, TEMPERATURES)


def _ladder(recipe: Recipe) -> Plans:
    """The networks of the page on the capacity gap, of three folds; a role is the models from teacher to student."""
    student, *larger = LADDER
    lines = [[name, student] for name in LADDER]
    lines += [[name, ASSISTANT, student] for name in larger if name != ASSISTANT]
    chains = plan_chains({" > ".join(line): line for line in lines}, "response", 3, 3, 0, recipe)
    found = {}
    for (name, fold), links in chains.items():
        for link in links:
            role = " > ".join(plan.model for plan in reversed(link.line))
            found[f"{role}, second base" if name == "second base" else role, fold] = link
    return found


FEATURES = ("attention", "overhaul", "inter-channel", "alp", "factor", "prior", "contrastive")
JOINED = ("attention", "factor", "contrastive")  # those that the paper trains with the response as well
TAUGHT = ("response", "dkd", "dist", *FEATURES, "self-supervised", *(f"response+{name}" for name in JOINED))
OTHER_FAMILY = "mobilenet_v1@0.125"  # than the teacher's


def _taught(student: str, recipe: Recipe, k: int, controls: Sequence[str]) -> Plans:
    """Students of the page on techniques, of k folds."""
    plans = plan_fit("resnet18@0.25", student, TAUGHT, k, k, 0, recipe)
    for fold in range(1, k + 1):
        plans["standardised response", fold] = replace(plans["response", fold], settings=(("standardise", True),))
    kept = ("base", *TAUGHT, "standardised response", *controls)
    return {(f"{role}, {student}", fold): plan for (role, fold), plan in plans.items() if role in kept}


def _photographs(recipe: Recipe) -> Plans:
    """The networks of the pages on photographs, of three folds; controls of the first."""
    techniques = ("response", "overhaul", "attention")
    return plan_fit("resnet10@0.1875", "resnet10@0.125", techniques, 3, 1, 0, recipe)


def _generated(recipe: Recipe) -> Plans:
    """The networks of the page on yardsticks, of four folds of generated images; controls of the first."""
    return plan_fit("resnet10@0.09375", "resnet10@0.0625", ("response", "smoothing"), 4, 1, 0, recipe)


PHOTOGRAPHS = Recipe(epochs=100, batch_size=32, lr=0.1)
LEAVES = (
    "Apple: Apple scab",
    "Apple: Black rot",
    "Apple: Cedar apple rust",
    "Apple: healthy",
    "Raspberry: healthy",
    "Strawberry: Leaf scorch",
    "Strawberry: healthy",
)
STUDIES: tuple[Study, ...] = (
    CrossValidated(
        "cifar10",
        Recipe(),
        # a network of several pages has the role of the last
        lambda recipe: (
            _taught("resnet10@0.125", recipe, 3, ("second base", "random teacher", "self-distilled"))
            | _taught(OTHER_FAMILY, recipe, 1, ("second base", "random teacher"))
            | _ladder(recipe)
            | _students(recipe)
        ),
        folds=5,
        settings={"attention_weight": 100.0, "contrastive_negatives": 1024},
    ),
    CrossValidated(
        "petimages", PHOTOGRAPHS, _photographs, folds=3, settings={"attention_weight": 100.0}, stem="imagenet"
    ),
    CrossValidated(
        "plantvillage",
        PHOTOGRAPHS,
        _photographs,
        folds=3,
        settings={"attention_weight": 100.0},
        classes=LEAVES,
        stem="imagenet",
    ),
    CrossValidated("shapes", Recipe(epochs=10, batch_size=64, lr=0.1), _generated, folds=4, stem="imagenet"),
)
