"""Cross-validation: the networks of every fold, with their controls.

Networks are planned first, so that those that do not depend on each other can be trained in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kdx.data.dataset import Dataset, folds
from kdx.distil.backends import fit_all
from kdx.distil.chains import check_chain
from kdx.distil.fit import Job
from kdx.distil.run_store import Run
from kdx.distil.techniques import TECHNIQUES, needs_teacher, settings_of
from kdx.distil.training import Recipe
from kdx.networks import models


@dataclass(frozen=True)
class Plan:
    """A network of one fold to be trained, and its teacher."""

    model: str  # with its width, so equal networks have equal plans
    fold: int
    seed: int
    epochs: int
    technique: str = "label"
    teacher: Plan | None = None
    batch_seed: int | None = None  # the seed
    settings: tuple[tuple[str, Any], ...] = ()  # of the technique, beside those of all networks

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
    first: int | None = None,
    watched: int = 0,
    controls: int = 0,
    temperatures: Sequence[float] = (),
    only_stored: Sequence[str] = (),
    seed: int = 0,
    recipe: Recipe | None = None,
    workers: int | str = 1,
    **training: Any,
) -> dict[tuple[str, int], Run]:
    """Train, or find in the run store, the networks of stratified cross-validation.

    Args:
        train: Training images.
        teacher: Name of a model as for :func:`kdx.fit`.
        student: Name of a model, also of the base.
        techniques: Names as for :func:`kdx.fit`; one student is trained with each. ``"smoothing"`` is without the
            teacher, and not the first technique of the controls.
        settings: Parameters of any technique; each gets those that it has.
        k: Number of folds. The networks of a fold are trained on all the others, from seeds of their own.
        first: Carry out only so many of the folds, from the first on; None: all.
        watched: Held-out images on which the network is evaluated after each epoch; 0 takes all.
        controls: Number of folds, from the first on, that also get

            - a *second base*: trained as the base, from another seed. Its difference from the base is what the seed
              alone explains.
            - a *reordered base*: trained as the base from the same initial weights, with the batches of the second
              base. Its difference from the base is what the order of the images alone explains.
            - a *second student*: of the same teacher by the first technique, from the seed of the second base.
            - a student of a *random teacher*: trained with the first technique, by the teacher as it was before its
              training, which knows nothing.
            - a *self-distilled* student: trained with the first technique, by the base; only if the teacher is another
              network.
        temperatures: Adds to the first fold a *smoothed teacher*, trained with smoothed labels, and a student of it by
            response at each of these temperatures: roles such as ``"response from smoothed teacher, T 2"``.
        only_stored: Roles that are left out, and the students of these networks with them, where they are not stored.
        seed: First of the seeds of folds and networks.
        recipe: Of all networks.
        workers: Networks trained in parallel, each in a process of its own with its share of the cores. 0 means one
            per core on a CPU, and one on another device, where several small networks may share the device. Models
            and techniques registered outside of kdx need 1. The number of threads changes weights by rounding. Or a
            Dask cluster: the address of its scheduler, such as ``"tcp://10.0.0.1:8786"``, or its scheduler file. If
            ``KDX_CLUSTER`` names one, all go there.
        **training: stem, width and device of :func:`kdx.fit`.

    Returns:
        (role, fold from 1) -> run, by fold. Roles are teacher (if its architecture is not the student's; otherwise
        the base is the teacher), base, the techniques, and the controls by their names above.
    """
    used = _used(first, k)
    plans = plan_fit(teacher, student, techniques, used, controls, seed, recipe, temperatures, **training)
    if unknown := set(only_stored) - {role for role, _ in plans}:
        raise ValueError(f"only_stored: expected roles of these networks, got {', '.join(sorted(unknown))}")
    spared = {plan for (role, _), plan in plans.items() if role in only_stored}
    runs = carry_out(
        plans.values(), train, settings or {}, k, watched, seed, recipe, workers, only_stored=spared, **training
    )
    return {name: runs[plan] for name, plan in plans.items() if plan in runs}


def plan_fit(
    teacher: str,
    student: str,
    techniques: Sequence[str],
    k: int,
    controls: int,
    seed: int,
    recipe: Recipe | None = None,
    temperatures: Sequence[float] = (),
    **training: Any,
) -> dict[tuple[str, int], Plan]:
    """The networks of :func:`cross_fit`, whose arguments these are: (role, fold from 1) -> plan."""
    _check_controls(controls, k)
    named = all(isinstance(name, str) for name in techniques)
    learning = [name for name in techniques if needs_teacher(name)] if named else []
    if not learning or len(set(techniques)) < len(techniques) or "label" in techniques:
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
            plans[name, fold] = Plan(student, fold, one, recipe.epochs, name, guide if name in learning else None)
        if fold <= controls:
            base, first = plans["base", fold], plans[learning[0], fold]
            plans["second base", fold] = replace(base, seed=two)
            plans["reordered base", fold] = replace(base, batch_seed=two)
            plans["second student", fold] = replace(first, seed=two)
            plans["random teacher", fold] = replace(first, teacher=replace(guide, epochs=0))
            if teacher != student:
                plans["self-distilled", fold] = replace(first, teacher=base)
        if fold == 1 and temperatures:
            smoothed = plans["smoothed teacher", fold] = replace(guide, technique="smoothing")
            for t in temperatures:
                pupil = Plan(student, fold, one, recipe.epochs, "response", smoothed, settings=(("temperature", t),))
                plans[f"response from smoothed teacher, T {t:g}", fold] = pupil
    return plans


def cross_chains(
    train: Dataset,
    chains: Mapping[str, Sequence[str]],
    *,
    technique: str = "response",
    settings: Mapping[str, Any] | None = None,
    k: int = 3,
    first: int | None = None,
    watched: int = 0,
    controls: int = 0,
    seed: int = 0,
    recipe: Recipe | None = None,
    budget: int | None = None,
    workers: int | str = 1,
    **training: Any,
) -> dict[tuple[str, int], list[Run]]:
    """Chains of teachers and assistants that end in the same student, in every fold of cross-validation.

    What :func:`kdx.distill_chain` does for one chain, with folds, seeds and base as in :func:`cross_fit`.

    Args:
        train: Training images.
        chains: Name -> names of models from the teacher to the student, as for :func:`kdx.distill_chain`.
        technique: Of every link.
        settings: Parameters of the technique.
        k: Number of folds, as for :func:`cross_fit`; likewise watched, seed, recipe, workers and training.
        first: Carry out only so many of the folds, from the first on; None: all.
        watched: Held-out images on which the network is evaluated after each epoch; 0 takes all.
        controls: Number of folds, from the first on, that also get a second base.
        seed: First of the seeds of folds and networks.
        recipe: Of all networks.
        budget: Epochs of the students and of the base; None takes the recipe's, as for all others.
        workers: Networks trained in parallel.
        **training: stem, width and device of :func:`kdx.fit`.

    Returns:
        (name, fold from 1) -> runs in the order of the chain, by fold; ("base", fold) and ("second base", fold) are
        chains of one.
    """
    for chain in chains.values() if isinstance(chains, Mapping) else ():
        architecture = {key: value for key, value in training.items() if key in ("stem", "width")}
        check_chain(chain, train, technique, **architecture, **settings or {})
    plans = plan_chains(chains, technique, _used(first, k), controls, seed, recipe, budget, **training)
    wanted = [plan for links in plans.values() for plan in links]
    runs = carry_out(wanted, train, settings or {}, k, watched, seed, recipe, workers, **training)
    return {name: [runs[plan] for plan in links] for name, links in plans.items()}


def plan_chains(
    chains: Mapping[str, Sequence[str]],
    technique: str,
    k: int,
    controls: int,
    seed: int,
    recipe: Recipe | None = None,
    budget: int | None = None,
    **training: Any,
) -> dict[tuple[str, int], list[Plan]]:
    """The networks of the first ``k`` folds of :func:`cross_chains`: (name, fold from 1) -> plans in order."""
    _check_controls(controls, k)
    recipe = recipe or Recipe()
    budget = recipe.epochs if budget is None else budget
    if not isinstance(chains, Mapping) or not chains or {"base", "second base"} & set(chains):
        raise ValueError(f"chains: expected name -> models, named otherwise than the bases, got {chains!r}")
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
    return plans


def _full_name(model: str, training: Mapping[str, Any]) -> str:
    name, width = models.parse_name(model, training.get("width"))
    return f"{name}@{width!r}"


def _used(first: int | None, k: int) -> int:
    """How many of k folds are carried out."""
    used = k if first is None else first
    if not 1 <= used <= k:
        raise ValueError(f"first: expected 1 to {k} folds, got {first}")
    return used


def _check_controls(controls: int, k: int) -> None:
    if not 0 <= controls <= k:
        raise ValueError(f"controls: expected 0 to {k} folds, got {controls}")


def _seeds(seed: int, fold: int) -> tuple[int, int]:
    """The seeds of a fold's networks and of its second base."""
    return seed + 2 * (fold - 1), seed + 2 * (fold - 1) + 1


def carry_out(
    plans: Iterable[Plan],
    train: Dataset,
    settings: Mapping[str, Any],
    k: int,
    watched: int,
    seed: int,
    recipe: Recipe | None,
    workers: int | str,
    finished: Callable[[Plan, Run], Run] = lambda plan, run: run,
    only_stored: Collection[Plan] = (),
    **training: Any,
) -> dict[Plan, Run]:
    """Train the networks of plans that are not stored, teachers before their students.

    Args:
        plans: The networks; their teachers are added.
        train: Training images; the other arguments are those of :func:`cross_fit`.
        finished: Called with every network as soon as it is there; students learn from the run that it returns.
        only_stored: Those that are left out, and their students with them, where they are not stored.
    """
    recipe = recipe or Recipe()
    wanted = list(dict.fromkeys(ancestor for plan in plans for ancestor in plan.line))
    names = {plan.technique for plan in wanted}
    own = {name: {s: v for s, v in settings.items() if s in settings_of(name)} for name in names}
    if unknown := sorted(set(settings).difference(*map(settings_of, TECHNIQUES), *own.values())):
        raise ValueError(f"settings: no technique has {', '.join(unknown)}")
    parts = []
    for rows, others in folds(train.labels, k, seed):
        parts.append((train[rows], train[others].limit(min(watched or len(others), len(others)), seed)))
    classes, stem = len(train.classes), training.get("stem", "small")
    runs: dict[Plan, Run] = {}
    # the largest first, or the others would wait for them at the end
    wanted = sorted(wanted, key=lambda plan: -sum(_size(link.model, classes, stem) for link in plan.line[:2]))
    for generation in range(1, 1 + max(len(plan.line) for plan in wanted)):
        jobs = {}
        for plan in (plan for plan in wanted if len(plan.line) == generation):
            if plan.teacher and plan.teacher not in runs:
                continue
            part, held_out = parts[plan.fold - 1]
            teacher = runs[plan.teacher] if plan.teacher else None
            epochs = replace(recipe, epochs=plan.epochs)
            job = Job(
                plan.model, part, held_out, plan.technique, teacher, epochs, plan.seed, plan.batch_seed,
                settings=own[plan.technique] | dict(plan.settings), **training,
            )  # fmt: skip
            if not any(link in only_stored for link in plan.line) or job.find():
                jobs[plan] = job
        for plan, run in fit_all(jobs, workers):
            runs[plan] = finished(plan, run)
    return runs


@lru_cache
def _size(model: str, classes: int, stem: str) -> int:
    return sum(weight.numel() for weight in models.build(model, classes, stem, seed=0).parameters())
