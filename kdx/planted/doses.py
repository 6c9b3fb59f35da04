"""Students that took a part of what their teacher knows, where it is known how large a part.

The labels of a student tell what its base knows, and its teacher knows one cue more. The weight of the teacher in the
loss is the dose. How much of the cue a student took is then measured by its behaviour: the cue is repainted in every
image, and the change of the student's answer is compared with that of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kdx.data.cues import Scene
from kdx.distil.backends import fit_all
from kdx.distil.fit import Job, evaluate
from kdx.distil.run_store import Run
from kdx.distil.training import Recipe
from kdx.explain.reference import centre_logits
from kdx.planted.plantings import FRESH, MODEL, PLANTINGS, images_of, tell

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)
STUDENTS = 10**5  # seeds of students start here, so that one without a teacher is not its base


class Dosed(NamedTuple):
    """A student that was distilled by a dose.

    Attributes:
        dose: Weight of the teacher in the loss, in [0, 1].
        seed: Of images and networks; it decides which cue plays which part.
        cue: The cue that teacher and not base knows, a place in ``Scene.cues``.
        networks: student, base and teacher.
    """

    dose: float
    seed: int
    cue: int
    networks: dict[str, Run]


def plant_doses(
    scene: Scene,
    seeds: Sequence[int],
    doses: Sequence[float] = DOSES,
    *,
    images: int = 4000,
    recipe: Recipe | None = None,
    temperature: float = 4.0,
    workers: int | str = 1,
    device: str = "auto",
) -> list[Dosed]:
    """Train a base, a teacher and a student for every dose, or find them in the run store.

    Args:
        scene: Description of the images.
        seeds: One set of networks for each.
        doses: Weights of the teacher in the loss, in [0, 1].
        images: Images to train on.
        recipe: Of all networks; None trains for 8 epochs at full size.
        temperature: Of the distillation.
        workers: As for :func:`kdx.cross_fit`.
        device: As for :func:`kdx.fit`.
    """
    recipe = recipe or Recipe(epochs=8, batch_size=64)
    plans = {seed: PLANTINGS["distilled"].turned(seed, len(scene.cues)) for seed in seeds}
    sets = {seed: (images_of(scene, images, 3 * seed), images_of(scene, 300, 3 * seed + 1)) for seed in seeds}
    told, first = {}, {}
    for seed, plan in plans.items():
        train, test = sets[seed]
        told[seed] = tell(train, scene, plan.base, seed)
        for i, (role, data) in enumerate((("base", told[seed]), ("teacher", tell(train, scene, plan.teacher, seed)))):
            first[seed, role] = Job(MODEL, data, test, recipe=recipe, seed=2 * seed + i, device=device)
    found = dict(fit_all(first, workers))
    second = {
        (seed, dose): Job(
            MODEL, told[seed], sets[seed][1], "response", found[seed, "teacher"], recipe, STUDENTS + seed,
            settings={"alpha": dose, "temperature": temperature}, device=device,
        )
        for seed in seeds
        for dose in doses
    }  # fmt: skip
    students = dict(fit_all(second, workers))
    return [
        Dosed(
            dose,
            seed,
            plans[seed].distilled[0],
            {"student": students[seed, dose], "base": found[seed, "base"], "teacher": found[seed, "teacher"]},
        )
        for seed in seeds
        for dose in doses
    ]


def taken(one: Dosed, scene: Scene, images: int = 1000) -> float:
    r"""How much of the cue the student took, by its behaviour: the slope of the change of its answer on that of the
    teacher's, when the cue is repainted,

    .. math:: \sum \langle \Delta z_s, \Delta z_t \rangle \,/\, \sum \lVert \Delta z_t \rVert^2,

    with centred logits, over images that no network has seen.

    Returns:
        0 for a student that does not see the cue, 1 for one that sees it as its teacher does.
    """
    of_both = {}
    for by in range(scene.values):
        turn = [by if cue == one.cue else 0 for cue in range(len(scene.cues))]
        repainted = images_of(scene, images, FRESH + one.seed, turn)
        of_both[by] = [
            centre_logits(evaluate(one.networks[role].model, repainted, "cpu").logits).double()
            for role in ("student", "teacher")
        ]
    together, alone = 0.0, 0.0
    for by in range(1, scene.values):
        student, teacher = (after - before for after, before in zip(of_both[by], of_both[0], strict=True))
        together += float((student * teacher).sum())
        alone += float(teacher.square().sum())
    return together / alone
