"""Where trainings are carried out: in this process, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import torch

from kdx.distil.detector_fit import AnyJob
from kdx.distil.fit import Job
from kdx.distil.run_store import Run
from kdx.networks.devices import pick_device, reuse_memory
from kdx.paths import data_home
from kdx.progress import TERMINAL, progress

CLUSTER = "KDX_CLUSTER"  # environment variable: address of a Dask scheduler, or its scheduler file
LONG = 500  # steps, from which on the time of a training is estimated


def fit_all(jobs: Mapping[Any, AnyJob], workers: int | str = 1) -> Iterator[tuple[Any, Run]]:
    """Carry out trainings that do not depend on each other, or find their runs.

    Every command and page that trains more than one network does so here.

    Args:
        jobs: Name -> training.
        workers: As for :func:`kdx.cross_fit`.

    Yields:
        Name and run, as soon as it is there.
    """
    cluster = check_cluster(workers if isinstance(workers, str) else os.environ.get(CLUSTER, ""))
    if isinstance(workers, int) and workers < 0:
        raise ValueError(f"workers: expected 0 (one per core, or one on a GPU) or more, got {workers}")
    missing = {}
    for name, job in jobs.items():
        if run := job.find():
            yield name, run
        elif not job.steps:  # no training is worth a process
            yield name, job.run()
        else:
            missing[name] = job
    if cluster and missing:
        from kdx.distil.cluster import connect  # the extra `cluster`

        yield from connect(cluster).fit_all(missing)
    elif missing:
        assert isinstance(workers, int)
        yield from _fit_here(missing, workers)


def watching(bar: Any) -> AbstractContextManager[None]:
    """Inside the block, a progress bar of other work also tells of the cluster of ``KDX_CLUSTER``, if there is one."""
    if bar.disable or not bar.total or not (cluster := check_cluster(os.environ.get(CLUSTER, ""))):
        return nullcontext()
    from kdx.distil.cluster import connect

    return connect(cluster).watched(bar)


def check_cluster(cluster: str) -> str:
    """A cluster as it was given, the path of its scheduler file made absolute; empty for none.

    Raises:
        ValueError: It is neither the address of a scheduler nor an existing file.
    """
    if not cluster or "://" in cluster:
        return cluster
    if not (path := Path(cluster).expanduser().absolute()).is_file():
        raise ValueError(f"cluster: expected an address such as tcp://10.0.0.1:8786 or a scheduler file, got {cluster}")
    return str(path)


def _fit_here(missing: Mapping[Any, AnyJob], workers: int) -> Iterator[tuple[Any, Run]]:
    if not workers:
        on_cpu = {pick_device(job.device).type for job in missing.values()} == {"cpu"}
        workers = joblib.cpu_count() if on_cpu else 1
    workers = min(workers, len(missing))
    announce([job for job in missing.values() if isinstance(job, Job)])
    if workers < 2:
        for name, job in missing.items():
            yield name, job.run()
        return
    threads = max(1, joblib.cpu_count() // workers)
    # never threads of this process: they would share torch's global generator
    pool = joblib.Parallel(workers, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch=workers)
    tasks = (joblib.delayed(_run_elsewhere)(str(data_home()), threads, *item) for item in missing.items())
    with progress(total=len(missing), desc="networks", unit="network") as bar:
        for name, key in pool(tasks):
            if (run := missing[name].find()) is None:
                raise RuntimeError(
                    f"the code of kdx was edited during the training: the worker stored {name} under the key {key}, "
                    f"expected {missing[name].key}; start again"
                )
            bar.update()
            yield name, run


def announce(jobs: Sequence[Job]) -> None:
    """Say how many networks will be trained here and how long it will take, if that is a minute or more."""
    if sum(job.steps for job in jobs) < LONG:
        return
    seconds, of_steps = 0.0, dict[str, tuple[float, float]]()
    for job in jobs:
        guide = job.teacher and job.teacher.manifest["spec"]["model"]
        kind = str([job.architecture, guide, job.spec["technique"]["name"], job.recipe])
        if kind not in of_steps:
            of_steps[kind] = job.seconds_of_steps()
        seconds += job.seconds_left(of_steps[kind])
    if seconds >= 60:
        networks = "one network" if len(jobs) == 1 else f"{len(jobs)} networks"
        print(f"Training {networks}: about {seconds / 60:.0f} min here. What is finished is kept.", flush=True)


def _run_elsewhere(home: str, threads: int, name: Any, job: AnyJob) -> tuple[Any, str]:
    os.environ.update({"KDX_HOME": home, TERMINAL: os.devnull})  # a process may outlive the study it was started for
    torch.set_num_threads(threads)
    reuse_memory()
    # pickled with the job, the key would hide that the worker has read newer code
    fresh = replace(job)
    if fresh.find() is None:
        fresh.run()
    return name, fresh.key
