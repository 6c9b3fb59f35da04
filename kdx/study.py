"""The networks that the pages share: base and students of every fold, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdx.data import Dataset, folds
from kdx.distill import Recipe, fit
from kdx.runs import Run
from kdx.techniques import TECHNIQUES, settings_of


def cross_fit(
    train: Dataset,
    *,
    teacher: str,
    student: str,
    techniques: Sequence[str] = ("response",),
    settings: Mapping[str, Any] | None = None,
    k: int = 3,
    watched: int = 0,
    controls: int = 0,
    seed: int = 0,
    recipe: Recipe | None = None,
    **training: Any,
) -> dict[tuple[str, int], Run]:
    """Train, or find in the run store, the networks of stratified cross-validation.

    Parameters
    ----------
    techniques : names as for :func:`kdx.fit`; a student is trained with each.
    settings : of any technique; each gets those that it has.
    k : folds; the networks of a fold are trained on all the others, from seeds of their own.
    watched : held-out images on which each epoch is measured; 0: all.
    controls : folds, from the first on, that also get

        - a *second base*: trained as the base, from another seed. How it differs from the base is
          what the seed alone explains.
        - a student of a *random teacher*: trained with the first technique, by the teacher as it was
          before its training, which knows nothing.
    training : stem, width, device of :func:`kdx.fit`.

    Returns
    -------
    dict : (role, fold from 1) -> run, by fold, with the roles teacher (where its architecture is
        not the student's; else the base is the teacher), base, the techniques, second base and
        random teacher.
    """
    if not 0 <= controls <= k:
        raise ValueError(f"controls: expected 0 to {k} folds, got {controls}")
    named = all(isinstance(name, str) for name in techniques)
    if not techniques or not named or len(set(techniques)) < len(techniques) or "label" in techniques:
        raise ValueError(f"techniques: expected different ways to learn from a teacher, got {list(techniques)}")
    recipe, settings = recipe or Recipe(), settings or {}
    own = {name: {s: v for s, v in settings.items() if s in settings_of(name)} for name in techniques}
    if unknown := sorted(set(settings).difference(*map(settings_of, TECHNIQUES), *own.values())):
        raise ValueError(f"settings: no technique has {', '.join(unknown)}")
    first, runs = techniques[0], {}
    for fold, (rows, held_out) in enumerate(folds(train.labels, k, seed), 1):
        one = seed + 2 * (fold - 1)
        two = one + 1
        images = train[rows]
        watch = train[held_out].limit(min(watched or len(held_out), len(held_out)), seed)
        common: dict[str, Any] = {"recipe": recipe, **training}
        guide = fit(teacher, images, watch, seed=one, **common)
        if teacher != student:
            runs["teacher", fold] = guide
        runs["base", fold] = fit(student, images, watch, seed=one, **common)
        for name in techniques:
            runs[name, fold] = fit(
                student, images, watch, technique=name, teacher=guide, seed=one, **own[name], **common
            )
        if fold <= controls:
            runs["second base", fold] = fit(student, images, watch, seed=two, **common)
            unlearned = common | {"recipe": replace(recipe, epochs=0)}
            ignorant = fit(teacher, images, watch, seed=one, **unlearned)
            runs["random teacher", fold] = fit(
                student, images, watch, technique=first, teacher=ignorant, seed=one, **own[first], **common
            )
    return runs
