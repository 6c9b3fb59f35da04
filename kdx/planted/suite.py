"""The planted networks that come with the checkout: those of the page on plantings, and those of the benchmark.

They stand in ``data/networks/planted``. A fold is a repetition, with its own images and networks, and with
cues in turned roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kdx.data.cues import Scene
from kdx.data.dataset import Dataset, load_dataset
from kdx.distil.shipped import open_network
from kdx.distil.studies import Place, Ship
from kdx.distil.training import Recipe
from kdx.planted.doses import Dosed, plant_doses
from kdx.planted.plantings import MODEL, PLANTINGS, ROLES, SHIPPED, Grown, fit_ignorant, images_of, plant

IGNORANT = ("ignorant", 1)
TRAINED_ON = 4000  # images


@dataclass(frozen=True)
class Case:
    """Networks of one kind of images.

    Attributes:
        seeds: One for each repetition; a seed decides which cue plays which part.
        plantings: Names in ``PLANTINGS``.
        scene: Description of the images.
        doses: Weights of the teacher in the loss of further students of *distilled*, in the first repetition.
        epochs: Of every network.
        second_base: Whether a base from other initial weights is shipped too, in the first repetition.
    """

    seeds: tuple[int, ...]
    plantings: tuple[str, ...] = ("both",)
    scene: Scene = field(default_factory=Scene)
    doses: tuple[float, ...] = ()
    epochs: int = 8
    second_base: bool = False


CASES = {
    "standard": Case((SHIPPED, 700, 602), tuple(PLANTINGS), doses=(0.25, 0.5, 1.0), second_base=True),
    "sizes": Case((318,), scene=Scene(cue_size=(7, 10, 14))),
    "overlapping": Case((324,), scene=Scene(overlap=0.6)),
    "other cues": Case((600, 601, 602), scene=Scene(("colours", "letters", "checks")), epochs=10),
    "held-out cues": Case((738, 739, 740), scene=Scene(("strokes", "blots", "waves")), epochs=10),
}


def _names(case: str, fold: int) -> dict[tuple[str, str], str]:
    """(planting, role) -> role by which the network is shipped. A network that plantings share has its first name."""
    of = CASES[case]
    found: dict[tuple[str, str], str] = {}
    first: dict[object, str] = {}
    for planting in of.plantings:
        plan = PLANTINGS[planting]
        networks = (("student", plan.teacher), (0, plan.base), (1, plan.teacher), (1, plan.base))
        for role, network in zip(ROLES, networks, strict=True):
            name = first.setdefault(network, f"{planting if case == 'standard' else case}, {role}")
            if role != "second base" or _has_second_base(case, fold):
                found[planting, role] = name
    return found


def roles(case: str, fold: int) -> list[str]:
    """The roles of the networks of one repetition, see :func:`kdx.load_network`."""
    return [*dict.fromkeys(_names(case, fold).values()), *(f"dose {dose:g}" for dose in _doses(case, fold))]


def _doses(case: str, fold: int) -> tuple[float, ...]:
    return CASES[case].doses if fold == 1 else ()


def _has_second_base(case: str, fold: int) -> bool:
    return CASES[case].second_base and fold == 1


def grow(case: str, fold: int, workers: int | str = 1, device: str = "auto") -> list[Grown]:
    """Carry out the plantings of a case, or find their networks; see :func:`kdx.planted.plantings.plant`."""
    of = CASES[case]
    return plant(
        of.scene, 1, plantings={name: PLANTINGS[name] for name in of.plantings}, seed=of.seeds[fold - 1],
        images=TRAINED_ON, recipe=_recipe(of), workers=workers, device=device, second_base=_has_second_base(case, fold),
    )  # fmt: skip


def _recipe(case: Case) -> Recipe:
    return Recipe(epochs=case.epochs, batch_size=64)


def load(case: str, fold: int, tested: int = 100, reference: int = 192) -> list[Grown]:
    """The plantings of a case with their shipped networks.

    Args:
        case: A name in ``CASES``.
        fold: From 1.
        tested: Images on which maps are scored, as :func:`kdx.planted.plantings.plant` draws them.
        reference: Images in the reference set.
    """
    of = CASES[case]
    seed = of.seeds[fold - 1]
    sets = [images_of(of.scene, n, 3 * seed + i) for i, n in ((1, tested), (2, reference))]
    names = _names(case, fold)
    runs = {name: open_network("planted", name, fold) for name in dict.fromkeys(names.values())}
    return [
        Grown(planting, seed, of.scene, {r: runs[names[planting, r]] for p, r in names if p == planting}, *sets)
        for planting in of.plantings
    ]


def load_doses(case: str, fold: int) -> list[Dosed]:
    """The students of each dose, with base and teacher of the planting *distilled*."""
    of, names = CASES[case], _names(case, fold)
    seed = of.seeds[fold - 1]
    cue = PLANTINGS["distilled"].turned(seed, len(of.scene.cues)).distilled[0]
    if not _doses(case, fold):
        return []
    both = {role: open_network("planted", names["distilled", role], fold) for role in ("base", "teacher")}
    students = {dose: open_network("planted", f"dose {dose:g}", fold) for dose in _doses(case, fold)}
    return [Dosed(dose, seed, cue, {"student": run} | both) for dose, run in students.items()]


class Study:
    """All of them: a :class:`kdx.distil.studies.Study`."""

    dataset = "planted"

    @property
    def places(self) -> list[Place]:
        found = [IGNORANT]
        for name, case in CASES.items():
            found += [(role, fold) for fold in range(1, len(case.seeds) + 1) for role in roles(name, fold)]
        return found

    def images(self, split: str) -> Dataset:
        return load_dataset(self.dataset, split)

    def train(self, wanted: Sequence[Place], ship: Ship, workers: int | str, device: str) -> None:
        """Repetition by repetition."""
        if IGNORANT in wanted:
            recipe = _recipe(CASES["standard"])
            ship(fit_ignorant(Scene(), TRAINED_ON, SHIPPED, MODEL, recipe, device), *IGNORANT)
        for name, case in CASES.items():
            for fold, seed in enumerate(case.seeds, 1):
                names = _names(name, fold)
                if set(wanted) & {(role, fold) for role in names.values()}:
                    for one in grow(name, fold, workers, device):
                        for role, run in one.networks.items():
                            if (place := (names[one.planting, role], fold)) in wanted:
                                ship(run, *place)
                doses = _doses(name, fold)
                if set(wanted) & {(f"dose {dose:g}", fold) for dose in doses}:
                    recipe = _recipe(case)
                    for dosed in plant_doses(
                        case.scene, [seed], doses, images=TRAINED_ON, recipe=recipe, workers=workers, device=device
                    ):
                        if (place := (f"dose {dosed.dose:g}", fold)) in wanted:
                            ship(dosed.networks["student"], *place)
