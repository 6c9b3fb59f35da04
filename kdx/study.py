"""The networks that the pages share: of every fold, and their controls.

They are planned first, so that those which do not wait for each other can be trained at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import joblib
import torch

from kdx import models
from kdx.chains import check_chain
from kdx.data import Dataset, folds
from kdx.distill import Recipe, fit, pick_device
from kdx.home import data_home
from kdx.progress import TERMINAL, progress
from kdx.runs import Run
from kdx.techniques import TECHNIQUES, settings_of


@dataclass(frozen=True)
class Plan:
    """A network of one fold that is to be trained, with whoever teaches it."""

    model: str  # with its width, so that equal networks have equal plans
    fold: int
    seed: int
    epochs: int
    technique: str = "label"
    teacher: Plan | None = None

    @property
    def line(self) -> list[Plan]:
        """The network, its teacher, the teacher's teacher, ..."""
        return [self, *(self.teacher.line if self.teacher else [])]


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
    workers: int = 1,
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
    workers : networks trained at once on a CPU, each by one thread of a process of its own; 0: one a
        core. More pay off for small networks, and need memory. Models and techniques that were entered
        in the registries outside of kdx need 1. On another device, one at a time. The number of threads
        moves weights by rounding.
    training : stem, width, device of :func:`kdx.fit`.

    Returns
    -------
    dict : (role, fold from 1) -> run, by fold, with the roles teacher (where its architecture is
        not the student's; else the base is the teacher), base, the techniques, second base and
        random teacher.
    """
    _check_controls(controls, k)
    named = all(isinstance(name, str) for name in techniques)
    if not techniques or not named or len(set(techniques)) < len(techniques) or "label" in techniques:
        raise ValueError(f"techniques: expected different ways to learn from a teacher, got {list(techniques)}")
    recipe = recipe or Recipe()
    teacher, student = (_full_name(name, training) for name in (teacher, student))
    plans = {}
    for fold in range(1, k + 1):
        one, two = _seeds(seed, fold)
        guide = Plan(teacher, fold, one, recipe.epochs)
        if teacher != student:
            plans["teacher", fold] = guide
        plans["base", fold] = Plan(student, fold, one, recipe.epochs)
        for name in techniques:
            plans[name, fold] = Plan(student, fold, one, recipe.epochs, name, guide)
        if fold <= controls:
            plans["second base", fold] = Plan(student, fold, two, recipe.epochs)
            ignorant = replace(guide, epochs=0)
            plans["random teacher", fold] = Plan(student, fold, one, recipe.epochs, techniques[0], ignorant)
    runs = _carry_out(plans.values(), train, settings or {}, k, watched, seed, recipe, workers, training)
    return {name: runs[plan] for name, plan in plans.items()}


def cross_chains(
    train: Dataset,
    chains: Mapping[str, Sequence[str]],
    *,
    technique: str = "response",
    settings: Mapping[str, Any] | None = None,
    k: int = 3,
    watched: int = 0,
    controls: int = 0,
    seed: int = 0,
    recipe: Recipe | None = None,
    budget: int | None = None,
    workers: int = 1,
    **training: Any,
) -> dict[tuple[str, int], list[Run]]:
    """Chains of teachers and assistants that end in the same student, in every fold of cross-validation.

    What :func:`kdx.distill_chain` does for one chain, with folds, seeds and base as in :func:`cross_fit`.

    Parameters
    ----------
    chains : name -> names of models from the teacher to the student, as for :func:`kdx.distill_chain`.
    controls : folds, from the first on, that also get a second base.
    budget : epochs of the students and of the base; None: the recipe's, as for all others.
    technique, settings : of every link, as for :func:`kdx.fit`.
    k, watched, seed, recipe, workers, training : as for :func:`cross_fit`.

    Returns
    -------
    dict : (name, fold from 1) -> runs in the order of the chain, by fold; ("base", fold) and
        ("second base", fold) are chains of one.
    """
    _check_controls(controls, k)
    recipe = recipe or Recipe()
    budget = recipe.epochs if budget is None else budget
    if not isinstance(chains, Mapping) or not chains or {"base", "second base"} & set(chains):
        raise ValueError(f"chains: expected name -> models, named otherwise than the bases, got {chains!r}")
    architecture = {key: value for key, value in training.items() if key in ("stem", "width")}
    for chain in chains.values():
        check_chain(chain, train, technique, **architecture, **settings or {})
    lines = {name: [_full_name(model, training) for model in chain] for name, chain in chains.items()}
    if len(set(map(tuple, lines.values()))) < len(lines):
        raise ValueError(f"chains: expected different ones, got {lines}")
    if len(students := {line[-1] for line in lines.values()}) > 1:
        raise ValueError(f"chains: expected all to end in the same student, got {', '.join(sorted(students))}")
    (student,) = students
    plans: dict[tuple[str, int], list[Plan]] = {}
    for fold in range(1, k + 1):
        one, two = _seeds(seed, fold)
        plans["base", fold] = [Plan(student, fold, one, budget)]
        if fold <= controls:
            plans["second base", fold] = [Plan(student, fold, two, budget)]
        for name, (first, *others) in lines.items():
            links = [Plan(first, fold, one, recipe.epochs)]
            for i, model in enumerate(others, 1):
                epochs = budget if i == len(others) else recipe.epochs
                links.append(Plan(model, fold, one, epochs, technique, links[-1]))
            plans[name, fold] = links
    wanted = [plan for links in plans.values() for plan in links]
    runs = _carry_out(wanted, train, settings or {}, k, watched, seed, recipe, workers, training)
    return {name: [runs[plan] for plan in links] for name, links in plans.items()}


def _full_name(model: str, training: Mapping[str, Any]) -> str:
    name, width = models.parse_name(model, training.get("width"))
    return f"{name}@{width!r}"


def _check_controls(controls: int, k: int) -> None:
    if not 0 <= controls <= k:
        raise ValueError(f"controls: expected 0 to {k} folds, got {controls}")


def _seeds(seed: int, fold: int) -> tuple[int, int]:
    """Of a fold's networks, and of its second base."""
    return seed + 2 * (fold - 1), seed + 2 * (fold - 1) + 1


def _carry_out(
    plans: Iterable[Plan],
    train: Dataset,
    settings: Mapping[str, Any],
    k: int,
    watched: int,
    seed: int,
    recipe: Recipe,
    workers: int,
    training: Mapping[str, Any],
) -> dict[Plan, Run]:
    """Train what the run store lacks, teachers before their students."""
    wanted = list(dict.fromkeys(ancestor for plan in plans for ancestor in plan.line))
    names = {plan.technique for plan in wanted}
    own = {name: {s: v for s, v in settings.items() if s in settings_of(name)} for name in names}
    if unknown := sorted(set(settings).difference(*map(settings_of, TECHNIQUES), *own.values())):
        raise ValueError(f"settings: no technique has {', '.join(unknown)}")
    parts = []
    for rows, others in folds(train.labels, k, seed):
        parts.append((train[rows], train[others].limit(min(watched or len(others), len(others)), seed)))
    size = partial(_size, classes=len(train.classes), stem=training.get("stem", "small"))
    runs: dict[Plan, Run] = {}
    # the largest first, or the others would wait for them at the end
    wanted = sorted(wanted, key=lambda plan: -sum(size(link.model) for link in plan.line[:2]))
    for generation in range(1, 1 + max(len(plan.line) for plan in wanted)):
        jobs = {}
        for plan in (plan for plan in wanted if len(plan.line) == generation):
            part, held_out = parts[plan.fold - 1]
            jobs[plan] = partial(
                fit,
                plan.model,
                part,
                held_out,
                technique=plan.technique,
                teacher=runs[plan.teacher] if plan.teacher else None,
                recipe=replace(recipe, epochs=plan.epochs),
                seed=plan.seed,
                **own[plan.technique],
                **training,
            )
        runs |= fit_all(jobs, workers)
    return runs


@lru_cache
def _size(model: str, classes: int, stem: str) -> int:
    return sum(weight.numel() for weight in models.build(model, classes, stem, seed=0).parameters())


def fit_all(jobs: Mapping[Any, partial[Run]], workers: int) -> dict[Any, Run]:
    """Carry out calls of :func:`kdx.fit` that do not wait for each other, where the run store lacks their runs.

    ``workers`` as for :func:`cross_fit`.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 (one a core) or more, got {workers}")
    runs, missing = {}, {}
    for name, job in jobs.items():
        try:
            runs[name] = job(stored=True)
        except KeyError:
            missing[name] = job
    devices = {pick_device(job.keywords.get("device", "auto")).type for job in missing.values()}
    workers = min(workers or joblib.cpu_count(), len(missing))
    if devices != {"cpu"} or workers < 2:
        return runs | {name: job() for name, job in missing.items()}
    threads = max(1, joblib.cpu_count() // workers)
    # never threads of this process: they would share torch's global generator
    pool = joblib.Parallel(workers, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch=workers)
    tasks = (joblib.delayed(_fit_elsewhere)(str(data_home()), threads, *item) for item in missing.items())
    with progress(total=len(missing), desc="networks", unit="network") as bar:
        for name in pool(tasks):
            # KeyError if the code was edited meanwhile: the process has trained by the new one
            runs[name] = missing[name](stored=True)
            bar.update()
    return runs


def _fit_elsewhere(home: str, threads: int, name: Any, job: partial[Run]) -> Any:
    os.environ.update({"KDX_HOME": home, TERMINAL: os.devnull})  # a process may outlive the study it was started for
    torch.set_num_threads(threads)
    job()
    return name
