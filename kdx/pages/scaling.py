"""What more workers bring: a model of the time of many trainings, from their FLOPs, bytes and order."""

from __future__ import annotations

import ast
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import papermill

from kdx.data.registry import DATASETS
from kdx.distil.cross_validation import Plan, plan_chains, plan_fit
from kdx.distil.studies import TAUGHT
from kdx.distil.training import Recipe
from kdx.measure.teachers import complexity, name_chain
from kdx.networks import models
from kdx.pages.build import load_pages

PASSES = 3  # a training step in forward passes: one forward, and a backward of two


@dataclass(frozen=True)
class Machines:
    """Of a cluster.

    Attributes:
        flops: Of one worker, for each second.
        overhead: Seconds of the client and the scheduler for each training.
        bandwidth: Bytes per second that the client sends or receives.
    """

    flops: float
    overhead: float
    bandwidth: float


def list_trainings(root: Path, profile: str) -> pd.DataFrame:
    """The different trainings of the pages on CIFAR-10 that compare techniques or chains in a profile.

    Args:
        root: The checkout.
        profile: As for :func:`kdx.pages.build.load_pages`.

    Returns:
        page (the first that needs it), model, technique, fold, generation (1 without a teacher), flops, received and
        sent (bytes of weights, of the network and of its teacher), images (bytes of its fold's images).
    """
    card, known, rows = DATASETS["cifar10"], set(), []
    for page in load_pages(root, profile):
        found = papermill.inspect_notebook(str(page.notebook))
        given = {name: ast.literal_eval(one["default"]) for name, one in found.items()} | page.parameters
        if given.get("dataset") != card.name or not {"folds", "epochs", "batch_size"} <= set(given):
            continue
        images = (given.get("limit") or card.counts["train"]) * (given["folds"] - 1) // given["folds"]
        for plan in _plans(given):
            recipe = [given[name] for name in ("folds", "limit", "seed", "batch_size", "lr", "progressive", "settings")]
            if (key := (plan, str(recipe))) not in known:
                known.add(key)
                rows.append({"page": page.name, **_costs(plan, images, card.size)})
    return pd.DataFrame(rows)


def _plans(given: dict[str, Any]) -> list[Plan]:
    recipe, training = Recipe(epochs=given["epochs"]), {"width": given.get("width"), "stem": given["stem"]}
    first = given.get("used") or given["folds"]
    controls = min(given.get("controls", 0), first)
    if "techniques" in given and "teacher" in given:
        names = given["techniques"] or TAUGHT
        plans = plan_fit(
            given["teacher"], given["student"], names, first, controls, given["seed"], recipe, **training
        )  # fmt: skip
        wanted = list(plans.values())
        if "other_student" in given:  # the page on techniques
            if other := given["other_student"]:
                apart = plan_fit(given["teacher"], other, names, 1, 1, given["seed"], recipe, **training)
                wanted += [apart[role, 1] for role in ("base", "second base", "random teacher", *names)]
            taught = [plan for plan in wanted if plan.technique == "response" and plan.teacher in plans.values()]
            wanted += [replace(plan, settings=(("standardise", True),)) for plan in taught]
    elif "teachers" in given:
        student, assistant = given["student"], given["assistant"]
        lines = [[name, student] for name in given["teachers"]]
        lines += [[name, assistant, student] for name in given["teachers"] if _flops(name) > _flops(assistant)]
        named = {name_chain(line): line for line in lines}
        chains = plan_chains(named, given["technique"], first, controls, given["seed"], recipe)
        wanted = [plan for links in chains.values() for plan in links]
    else:
        return []
    return list(dict.fromkeys(ancestor for plan in wanted for ancestor in plan.line if ancestor.epochs))


@lru_cache
def _complexity(model: str) -> Any:
    card = DATASETS["cifar10"]
    return complexity(models.build(model, len(card.classes), "small", seed=0), card.size)


def _flops(model: str) -> int:
    return _complexity(model).flops


def _costs(plan: Plan, images: int, size: Sequence[int]) -> dict[str, Any]:
    own, teacher = _complexity(plan.model), plan.teacher and _complexity(plan.teacher.model)
    each = PASSES * own.flops + (teacher.flops if teacher else 0)
    return {
        "model": plan.model, "technique": plan.technique, "fold": plan.fold, "generation": len(plan.line),
        "flops": plan.epochs * images * each, "received": 4 * own.parameters,
        "sent": 4 * teacher.parameters if teacher else 0, "images": images * size[0] * size[1] * size[2],
    }  # fmt: skip


def measure_overhead(tasks: int) -> float:
    """Seconds that Dask needs for a task that does nothing, with scheduler and worker in this process."""
    from distributed import Client, LocalCluster  # the extra `cluster`

    settings = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**settings) as cluster, Client(cluster, set_as_default=False) as client:
        client.submit(abs, -1).result()  # all is set up
        start = time.perf_counter()
        client.gather(client.map(abs, range(tasks)))
        return (time.perf_counter() - start) / tasks


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Seconds until tasks are done, each given to the worker that is free first, the longest first."""
    free = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


def predict(trainings: pd.DataFrame, workers: int, machines: Machines) -> dict[str, float]:
    """The time of trainings on a number of workers.

    Students wait for the networks of the generation before. The client serves one worker at a time: a generation takes
    as long as its trainings, or as the client, whichever is longer. It sends the images of a fold once; the workers
    pass them on to each other.

    Args:
        trainings: From :func:`list_trainings`.
        workers: How many there are.
        machines: Their speed.

    Returns:
        workers, seconds, speed-up over one worker without a client, efficiency (speed-up for each worker), and client
        (its share of the time).
    """
    total, client = 0.0, 0.0
    for generation, some in trainings.groupby("generation"):
        trained = makespan(list(some["flops"] / machines.flops + machines.overhead), workers)
        data = some.drop_duplicates(["fold", "images"])["images"].sum() if generation == 1 else 0
        moved = (some["received"].sum() + some["sent"].sum() + data) / machines.bandwidth
        served = len(some) * machines.overhead + moved
        total, client = total + max(trained, served), client + served
    alone = trainings["flops"].sum() / machines.flops
    speedup = alone / total
    return {
        "workers": workers, "seconds": total, "speed-up": speedup, "efficiency": speedup / workers,
        "client": client / total,
    }  # fmt: skip
