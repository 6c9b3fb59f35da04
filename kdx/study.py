"""The networks that the pages share: base and student of every fold, and their controls."""

from __future__ import annotations

from typing import Any

from kdx.data import Dataset, folds
from kdx.distill import fit
from kdx.runs import Run


def cross_fit(
    train: Dataset,
    *,
    teacher: str,
    student: str,
    k: int = 3,
    watched: int = 0,
    controls: int = 0,
    seed: int = 0,
    technique: str = "response",
    settings: dict[str, Any] | None = None,
    **training: Any,
) -> dict[tuple[str, int], Run]:
    """Train, or find in the run store, the networks of stratified cross-validation.

    Parameters
    ----------
    k : folds; the networks of a fold are trained on all the others.
    watched : held-out images on which each epoch is measured; 0: all.
    controls : folds, from the first on, that also get a second base: trained as the base, from
        ``seed + 1``. How it differs from the base is what the seed alone explains.
    technique, settings : of the student; see :func:`kdx.fit`.
    training : recipe, stem, width, device of :func:`kdx.fit`.

    Returns
    -------
    dict : (role, fold from 1) -> run, with the roles teacher (where its architecture is not the
        student's; else the base is the teacher), base, student, second base.
    """
    if not 0 <= controls <= k:
        raise ValueError(f"controls: expected 0 to {k} folds, got {controls}")
    runs = {}
    for fold, (rows, held_out) in enumerate(folds(train.labels, k, seed), 1):
        images = train[rows]
        watch = train[held_out].limit(min(watched or len(held_out), len(held_out)), seed)
        guide = fit(teacher, images, watch, seed=seed, **training)
        if teacher != student:
            runs["teacher", fold] = guide
        runs["base", fold] = fit(student, images, watch, seed=seed, **training)
        runs["student", fold] = fit(
            student, images, watch, technique=technique, teacher=guide, seed=seed, **(settings or {}), **training
        )
        if fold <= controls:
            runs["second base", fold] = fit(student, images, watch, seed=seed + 1, **training)
    return runs
