"""The detectors that come with the checkout: a teacher, and students of one start, with second seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdx.data.detection import Detection, load_detection
from kdx.distil.backends import fit_all
from kdx.distil.detector_fit import DetectorJob
from kdx.distil.studies import Place, Ship
from kdx.distil.training import Recipe

TEACHER = "teacher"
STUDENTS: dict[str, tuple[str, int, Mapping[str, Any]]] = {  # role -> technique, seed, settings
    "base": ("label", 0, {}),
    "fgd": ("fgd", 0, {}),
    "prior": ("prior", 0, {"prior_width": 32, "prior_blocks": 1}),
    "second base": ("label", 1, {}),
    "second fgd": ("fgd", 1, {}),
    "second prior": ("prior", 1, {"prior_width": 32, "prior_blocks": 1}),
}


@dataclass(frozen=True)
class DetectorStudy:
    """A :class:`kdx.distil.studies.Study` of detectors.

    All students start with the neck and head of the teacher, also those that do not learn from it.

    Attributes:
        dataset: A name in ``DETECTION_DATASETS``.
        models: Backbones of teacher and student.
        recipes: Likewise.
    """

    dataset: str = "bccd"
    models: tuple[str, str] = ("resnet10@0.5", "resnet10@0.25")
    recipes: tuple[Recipe, Recipe] = (Recipe(60, 8, 0.02), Recipe(12, 8, 0.02))

    @property
    def places(self) -> list[Place]:
        return [(role, 1) for role in (TEACHER, *STUDENTS)]

    def images(self, split: str) -> Detection:
        return load_detection(self.dataset, split)

    def train(self, wanted: Sequence[Place], ship: Ship, workers: int | str, device: str) -> None:
        """The teacher first; it is shipped with its students."""
        images = self.images("train")
        alone = DetectorJob(self.models[0], images, "label", None, None, self.recipes[0], device=device)
        ((_, teacher),) = fit_all({TEACHER: alone}, workers)
        teacher = ship(teacher, TEACHER, 1)
        students = {
            role: DetectorJob(
                self.models[1], images, technique, None if technique == "label" else teacher, teacher, self.recipes[1],
                seed, device=device, settings=settings,
            )
            for role, (technique, seed, settings) in STUDENTS.items()
            if (role, 1) in wanted
        }  # fmt: skip
        for role, run in fit_all(students, workers):
            ship(run, role, 1)
