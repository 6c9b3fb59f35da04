"""Trainings on a Dask cluster, whose workers need neither the store of the client nor its data.

A task is named by the key of its run, so two clients that need the same training share it, and one that comes back
after it was killed finds it going on. Images are named by card and fingerprint and sent once, a teacher is sent as its
checkpoint. A worker gives back the files of the run, and the client stores them under the same key, all or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from distributed import Client, Future, as_completed, get_worker

from kdx.data.dataset import Dataset
from kdx.data.detection import Detection
from kdx.distil.detector_fit import AnyJob
from kdx.distil.run_store import Run, receive
from kdx.networks.devices import pick_device, reuse_memory
from kdx.paths import DataError
from kdx.progress import TERMINAL, progress
from kdx.version import __version__

PATIENCE = 60  # seconds to wait for a scheduler, also for one that is started again
ATTEMPTS = 5  # at one training whose images or worker are lost


class RefusedError(RuntimeError):
    """A worker that must not train: its address, and why."""


@dataclass(frozen=True)
class Sent:
    """Takes the place of images or a run that a training needs, which travel beside it."""

    index: int


@dataclass(frozen=True)
class Checkpoint:
    """A run as it travels: without a path."""

    key: str
    manifest: dict[str, Any]
    history: pd.DataFrame
    weights: bytes


@lru_cache(maxsize=1)
def _connected(address: str, process: int) -> Cluster:
    return Cluster(address)


def connect(address: str) -> Cluster:
    """The cluster of an address or scheduler file; one connection per process.

    Raises:
        ValueError: There is no scheduler.
    """
    if (found := _connected(address, os.getpid())).client.status in ("closing", "closed"):
        _connected.cache_clear()
        found = _connected(address, os.getpid())
    return found


class Cluster:
    """A client of a Dask scheduler, and what it has sent to the workers.

    Args:
        address: Of the scheduler, or the path of its scheduler file.

    Raises:
        ValueError: There is no scheduler.
    """

    def __init__(self, address: str) -> None:
        where = {"address": address} if "://" in address else {"scheduler_file": address}
        try:
            self.client = Client(**where, timeout=PATIENCE, set_as_default=False)
        except (OSError, AssertionError, KeyError, TypeError, ValueError) as error:  # of a file or address that is none
            raise ValueError(
                f"no Dask scheduler answers at {address}, got {type(error).__name__}: {error}; "
                "start one with `dask scheduler`, and give its address or scheduler file"
            ) from error
        self.sent: dict[str, Future] = {}
        self.refused: set[str] = set()
        self.lost = Counter[str]()  # name -> how often, which becomes part of it: to Dask, what was lost stays lost

    def fit_all(self, jobs: Mapping[Any, AnyJob]) -> Iterator[tuple[Any, Run]]:
        """Train on the workers; the arguments and what is yielded are those of
        :func:`kdx.distil.backends.fit_all`.

        Raises:
            ValueError: All workers were refused.
            RuntimeError: The scheduler is gone, or a training keeps losing its workers.
        """
        waiting = list(jobs)[::-1]
        tried = dict.fromkeys(jobs, 0)
        going: dict[Future, Any] = {}
        done, used = as_completed(loop=self.client.loop), set[str]()
        self._check_connection()
        if not self._workers():
            print("waiting for the first worker of the cluster", flush=True)
        self.client.wait_for_workers(1)
        label = f"networks on {len(self._workers())} workers, {self.client.dashboard_link}"
        with progress(total=len(jobs), desc=label, unit="network") as bar, ThreadPoolExecutor(1) as beside:
            try:
                while waiting or going:
                    # each worker has the next training at hand; the others stay here, where no death can touch them
                    room = 2 * max(1, len(self._workers())) if waiting else 0
                    while waiting and len(going) < room:
                        name = waiting.pop()
                        future = self._submit(jobs[name], used)
                        going[future] = name
                        done.add(future)
                    future = next(done)
                    name = going[future]
                    tried[name] += 1
                    if (files := self._files(future, name, tried[name])) is None:
                        done.add(self._again(future, going, jobs[name], used))
                        continue
                    try:
                        run = receive(jobs[name].key, files)
                    except OSError:  # a full disk, say: what is under way stays on the cluster for the next attempt
                        going.clear()
                        raise
                    del going[future]
                    # at once: if its worker died, it would be trained again; but two names may wait for one training
                    if future.key not in {other.key for other in going}:
                        beside.submit(self._forget, [future])
                    bar.update()
                    yield name, run
            finally:
                self._forget([*going])
                self.sent = {key: of for key, of in self.sent.items() if key in used}

    @contextlib.contextmanager
    def watched(self, bar: Any) -> Iterator[None]:
        """Say behind a progress bar, every second, how many workers train networks, whoever sent these."""
        over = threading.Event()

        def show() -> None:
            while not over.wait(1):
                try:
                    tasks = self.client.processing().values()
                except OSError:
                    bar.set_postfix_str("the cluster does not answer")
                    continue
                at_work = sum(any(str(key).startswith("kdx-") for key in keys) for keys in tasks)
                bar.set_postfix_str(f"{at_work} of {len(tasks)} workers train networks")

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _workers(self) -> set[str]:
        """Addresses of the workers that were not refused."""
        return set(self.client.nthreads()) - self.refused

    def _now(self, name: str) -> str:
        return f"{name}-{self.lost[name]}" if self.lost[name] else name

    def _submit(self, job: AnyJob, used: set[str]) -> Future:
        order, parts = self._pack(job, used)
        expected = facts() | {"key": job.key, "precision": job.precision}
        on_gpu = pick_device(job.device).type != "cpu"
        future = self.client.submit(
            train, expected, order, *parts, key=self._now(f"kdx-{job.key}"), resources={"GPU": 1} if on_gpu else None
        )
        self.client.publish_dataset(future, name=future.key, override=True)  # kept if this client is killed
        return future

    def _files(self, future: Future, name: Any, tried: int) -> dict[str, bytes] | None:
        """The files of a finished training; None if it is to be begun again."""
        if future.cancelled():
            self._check_connection()
            if tried >= ATTEMPTS:
                raise RuntimeError(f"{name}: its images or worker were lost {tried} times; what is finished is kept")
            return None
        try:
            return future.result()
        except RefusedError as error:
            self._refuse(*error.args)
            return None

    def _refuse(self, address: str, reason: str) -> None:
        if address in self.refused:
            return
        said = f"the worker {address} was refused: {reason}"
        print(said, flush=True)
        self.refused.add(address)
        self.client.retire_workers([address], close_workers=True)
        if not self._workers():
            raise ValueError(f"no worker is left; {said}")

    def _again(self, future: Future, going: dict[Future, Any], job: AnyJob, used: set[str]) -> Future:
        """Begin a training again that was refused by its worker, or whose images or scheduler were lost."""
        if future.status == "error":
            future.retry()
            return future
        name = going.pop(future)
        self.lost.update([f"kdx-{job.key}", *self.sent])
        self.sent.clear()
        self.client.wait_for_workers(1)
        future = self._submit(job, used)
        going[future] = name
        return future

    def _check_connection(self) -> None:
        """Wait for a scheduler that is started again at the same address; raise RuntimeError if there is none."""
        while self.client.status == "connecting":
            time.sleep(0.1)
        if self.client.status != "running":
            raise RuntimeError("the scheduler is gone; start it, and this again: what is finished is kept")

    def _forget(self, futures: list[Future]) -> None:
        if futures and self.client.status == "running":
            with contextlib.suppress(OSError):  # the scheduler has just gone
                self.client.unpublish_dataset([future.key for future in futures])
                self.client.cancel(futures)

    def _pack(self, job: AnyJob, used: set[str]) -> tuple[bytes, list[Future]]:
        """A training as bytes, and the images and runs that it needs."""
        given, parts = {}, []
        for field in fields(job):
            value = getattr(job, field.name)
            if isinstance(value, Dataset | Detection | Run):
                parts.append(self._send(value, used))
                value = Sent(len(parts) - 1)
            given[field.name] = value
        return pickle.dumps((type(job), given)), parts

    def name(self, value: Dataset | Detection | Run) -> str:
        """The name under which images or a run are first sent."""
        if isinstance(value, Run):
            return f"run-{value.key}"
        card = hashlib.sha256(pickle.dumps(value.card)).hexdigest()
        return f"{value.card.name}-{value.fingerprint}-{card[:8]}"

    def _send(self, value: Dataset | Detection | Run, used: set[str]) -> Future:
        used.add(name := self.name(value))
        if name not in self.sent or self.sent[name].status != "finished":
            what: Any = value
            if isinstance(value, Run):
                what = Checkpoint(value.key, value.manifest, value.history, value.file.read_bytes())
            elif isinstance(value, Dataset):
                what = replace(value, masks=None)
            now = self._now(name)
            self.sent[name] = self.client.scatter({now: what}, broadcast=True)[now]
        return self.sent[name]


def facts() -> dict[str, str]:
    """What client and worker must have in common."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"kdx": __version__, "torch": torch.__version__.partition("+")[0], "python": python}


def dask_setup(worker: object) -> None:
    """Called by ``dask worker --preload kdx.distil.cluster`` before its threads start, whose memory it sets as well."""
    reuse_memory()


def train(expected: Mapping[str, str], order: bytes, *parts: Any) -> dict[str, bytes]:
    """On a worker: carry out a training, or find it in the worker's own store.

    Args:
        expected: :func:`facts` of the client, the key of the run, and the precision.
        order: The training, from the client.
        *parts: Images and runs, in place of :class:`Sent`.

    Returns:
        Name -> content of the files of the run.

    Raises:
        RefusedError: The worker has other versions or another code, computes in another precision, or has threads.
        DataError: The images are not those of the client.
    """
    worker = get_worker()
    if worker.state.nthreads > 1:
        raise RefusedError(worker.address, "threads share torch's random generator; start it with --nthreads 1")
    check_facts(expected, facts(), worker.address)
    os.environ[TERMINAL] = os.devnull
    kind, given = pickle.loads(order)
    with TemporaryDirectory() as folder:
        for name, value in given.items():
            if isinstance(value, Sent):
                given[name] = _unpack(parts[value.index], Path(folder))
        job = kind(**given)
        check_facts(expected, facts() | {"precision": job.precision}, worker.address)
        if job.key != expected["key"]:
            raise RefusedError(worker.address, "its code that trains networks is not that of the client")
        run = job.run()
    return {path.name: path.read_bytes() for path in run.path.iterdir()}


def check_facts(expected: Mapping[str, str], found: Mapping[str, str], address: str) -> None:
    """Raise RefusedError where a worker has other facts than are expected of it."""
    if wrong := [name for name, value in found.items() if value != expected[name]]:
        listed = "; ".join(f"{name} {found[name]}, expected {expected[name]}" for name in wrong)
        raise RefusedError(address, f"it has {listed}")


def _unpack(part: Any, folder: Path) -> Any:
    if isinstance(part, Checkpoint):
        path = folder / f"{part.key}.safetensors"
        path.write_bytes(part.weights)
        run = Run(part.key, path, part.manifest, part.history)
        _ = run.model  # read while the file is there
        return run
    fresh = replace(part)  # without the fingerprint that came with it
    if (named := vars(part).get("fingerprint")) not in (None, fresh.fingerprint):
        raise DataError(f"the images of {part.card.name} arrived with SHA-256 {fresh.fingerprint}, expected {named}")
    return fresh
