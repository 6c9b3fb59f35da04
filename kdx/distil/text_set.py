"""The text networks of a page: teachers, and students by several techniques and from several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdx.data.sst import NAME, Sentences
from kdx.distil.fit_text import TextJob, TextRecipe
from kdx.distil.techniques import needs_teacher
from kdx.networks.text_networks import PACKAGED, Architecture

SCRATCH, TEACHER, PRETRAINED = "scratch", "teacher", "pretrained teacher"
SMALL = Architecture(layers=4, width=64)  # the teacher that has no other words than those of the training sentences
TUNED = Architecture(PACKAGED, layers=6)
STUDENT = Architecture(layers=3, width=40)
RECIPE = TextRecipe(epochs=5, batch_size=64, lr=2e-3)
TECHNIQUES = ("smoothing", "response")
SEEDS = 3
TEACHERS = {  # name -> what it is built from, and how it is trained
    TEACHER: (SMALL, TextRecipe(epochs=4, batch_size=32, lr=1e-3)),
    PRETRAINED: (TUNED, TextRecipe(epochs=1, batch_size=32, lr=1e-4, weight_decay=0.01)),
}


def jobs(
    train: Sentences,
    validation: Sentences,
    *,
    student: Architecture = STUDENT,
    recipe: TextRecipe = RECIPE,
    teachers: Mapping[str, tuple[Architecture, TextRecipe]] = TEACHERS,
    techniques: Sequence[str] = TECHNIQUES,
    seeds: int = SEEDS,
    device: str = "auto",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[tuple[str, int], TextJob]:
    """The trainings of teachers and students, none of them done yet.

    Args:
        train: Training sentences.
        validation: Only watched.
        student: What all students are built from.
        recipe: Of the students.
        teachers: Name -> what it is built from, and its recipe.
        techniques: Names from ``TECHNIQUES``, beside ``scratch``, the student without a teacher.
        seeds: How many students there are of each technique. Those of one seed begin with the same weights.
        device: As for :func:`kdx.fit`.
        settings: Of techniques, by name.

    Returns:
        (role, seed) -> training: each teacher with seed 0, ``scratch``, and each technique by its name; with several
        teachers, followed by the name of the teacher for all but the first.

    Raises:
        ValueError: Fewer than one seed, no teacher for a technique that needs one.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected one or more, got {seeds}")
    found = {
        (name, 0): TextJob(of, train, validation, recipe=how, device=device) for name, (of, how) in teachers.items()
    }
    for seed in range(1, seeds + 1):
        for name in (SCRATCH, *techniques):
            technique = "label" if name == SCRATCH else name
            rest = (recipe, seed, device, (settings or {}).get(name, {}))
            for i, teacher in enumerate(teachers if needs_teacher(technique) else [None]):
                role = f"{name}, {teacher}" if i else name
                taught_by = None if teacher is None else found[teacher, 0]
                found[role, seed] = TextJob(student, train, validation, technique, taught_by, *rest)
    return found


def of_table() -> list[Any]:
    """What the stored scores are of: corpus, limit, student, recipe, teachers, techniques, seeds and settings."""
    return [NAME, 0, STUDENT, RECIPE, TEACHERS, list(TECHNIQUES), SEEDS, {}]
