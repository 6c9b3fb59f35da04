"""What a cluster costs: ``python -m tests.benchmarks.cluster``; ``--write`` stores it for the book.

Measures a training here and on one worker, 1,000 tasks that do nothing, and tasks that sleep for a known time on 1, 2
and 4 workers, against the model of :mod:`kdx.pages.scaling`. All workers are processes of this machine. Of trainings,
the fastest counts, since whatever else the machine does only adds time.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pandas as pd

import kdx
from kdx.data import shapes
from kdx.distil.backends import fit_all
from kdx.distil.cluster import connect
from kdx.distil.run_store import FILES, find_run, run_key
from kdx.networks.devices import reuse_memory
from kdx.pages import results
from kdx.pages.scaling import makespan
from kdx.paths import data_home, sha256_of, written_whole
from tests.clusters import cluster, jobs

ROUNDS, EPOCHS = 15, 4
TRIVIAL, NAPS, NAP = 1000, 24, 1.0


@dataclass(frozen=True)
class Nap:
    """A training that only takes time."""

    seconds: float
    number: int
    device: str = "cpu"
    precision: str = "none"
    steps: int = 1

    @property
    def key(self):
        return run_key({"seconds": self.seconds, "number": self.number}, "nap")

    def find(self):
        return find_run(self.key)

    def run(self):
        time.sleep(self.seconds)
        with written_whole(data_home() / "runs" / self.key) as scratch:
            (scratch / FILES[0]).write_bytes(b"")
            (scratch / FILES[1]).write_text("epoch\n")
            files = {name: sha256_of(scratch / name) for name in FILES[:2]}
            (scratch / FILES[2]).write_text(json.dumps({"files": files}))
        return find_run(self.key)


def timed(wanted, workers):
    start = time.perf_counter()
    count = len(list(fit_all(wanted, workers)))
    assert count == len(wanted)
    return time.perf_counter() - start


def fresh_home(folder, name):
    os.environ["KDX_HOME"] = str(folder / name)


def measure(folder):
    """Rows of what, workers, tasks, seconds, expected."""
    os.environ["KDX_NETWORKS"] = str(folder)
    reuse_memory()  # as commands and pages do
    shapes.COUNTS = {"train": 2000, "test": 200}
    images = kdx.load_dataset("shapes", "train", limit=2000, size=32)
    with cluster(folder / "one", workers=1) as local:
        fresh_home(folder, "warm")
        timed(jobs(images, [99], 1), local.address)
        timed(jobs(images, [98], 1), 1)
        here, there = [], []
        for i in range(ROUNDS):  # in turn, since the machine's speed drifts
            fresh_home(folder, f"here-{i}")
            here.append(timed(jobs(images, [i], EPOCHS), 1))
            fresh_home(folder, f"there-{i}")
            there.append(timed(jobs(images, [i], EPOCHS), local.address))
        yield "training here", 1, 1, min(here), None
        yield "training on a worker", 1, 1, min(there), min(here)
    overhead = 0.0
    for workers in (1, 2, 4):
        with cluster(folder / str(workers), workers) as local:
            fresh_home(folder, f"naps-{workers}")
            connect(local.address)
            timed({i: Nap(0.0, -i) for i in range(1, 2 * workers + 1)}, local.address)
            if workers == 1:
                spent = timed({i: Nap(0.0, i) for i in range(TRIVIAL)}, local.address)
                overhead = spent / TRIVIAL
                yield "tasks that do nothing", 1, TRIVIAL, spent, None
            naps = {i: Nap(NAP, i) for i in range(NAPS)}
            yield "sleeps", workers, NAPS, timed(naps, local.address), makespan([NAP + overhead] * NAPS, workers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    given, start = parser.parse_args(), time.perf_counter()
    from tests.benchmarks.cluster import measure  # so that workers find Nap by this name

    with tempfile.TemporaryDirectory() as folder:
        table = pd.DataFrame(measure(Path(folder)), columns=["what", "workers", "tasks", "seconds", "expected"])
    table["of the model"] = table["expected"] / table["seconds"]
    print(table.round(3).to_string(index=False))
    if given.write:
        results.store(
            "cluster", table.round(4), "python tests/benchmarks/cluster.py --write", time.perf_counter() - start
        )
