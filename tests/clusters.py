"""A Dask cluster of processes on this machine, each worker with a store of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import torch
from distributed import Client

from kdx import Recipe
from kdx.distil.fit import Job
from tests.checkout import ROOT
from tests.forks import python

CLIENT = """
import sys
import torch
from kdx.distil.backends import fit_all
from tests.clusters import jobs
images = torch.load(sys.argv[2], weights_only=False)
print(len(list(fit_all(jobs(images, map(int, sys.argv[4:]), int(sys.argv[3])), sys.argv[1]))))
"""


class Local:
    """A scheduler at a port of its own, and workers that can be killed.

    Args:
        folder: Of everything that is written.
        workers: How many there are at first.
    """

    def __init__(self, folder, workers=2):
        self.folder, self.workers = folder, []
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.start_scheduler()
        for _ in range(workers):
            self.add()

    def start_scheduler(self):
        command = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard", "--no-show", "--no-jupyter"]
        self.scheduler = self._start("scheduler", "distributed.cli.dask_scheduler", command)

    def add(self, *command, address="", **environment):
        """Start a worker, whose store is ``worker-<i>``; return its process."""
        self.workers.append(None)
        return self.restart(len(self.workers) - 1, *command, address=address, **environment)

    def restart(self, i, *command, address="", **environment):
        """Start a worker on its store of before."""
        name = f"worker-{i}"
        home = self.folder / name
        given = [address or self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", *command]
        given += ["--local-directory", str(home / "dask"), "--death-timeout", "60"]
        for module in ("kdx.distil.cluster", "tests.counted"):
            given += ["--preload", module]
        env = {"KDX_HOME": str(home), "KDX_NETWORKS": str(home), "OMP_NUM_THREADS": "1"} | environment
        self.workers[i] = self._start(name, "distributed.cli.dask_worker", given, env)
        return self.workers[i]

    def _start(self, name, module, command, environment=None):
        log = (self.folder / f"{name}.log").open("a")
        env = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        return subprocess.Popen([*python(module), *command], env=env, cwd=self.folder, stdout=log, stderr=log)

    def wait_for(self, workers):
        """Until so many workers are there."""
        with Client(self.address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)

    def trained(self, key):
        """The workers in whose stores a run is."""
        return [i for i in range(len(self.workers)) if (self.folder / f"worker-{i}" / "runs" / key).is_dir()]

    def begun(self, key):
        """How often workers have begun a training."""
        files = (self.folder / f"worker-{i}" / "begun" for i in range(len(self.workers)))
        return sum(file.read_text().split().count(key) for file in files if file.is_file())

    def stop(self):
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(folder, workers=2):
    local = Local(folder, workers)
    try:
        if workers:
            local.wait_for(workers)
        yield local
    finally:
        local.stop()


def until(condition, seconds=300):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def jobs(images, seeds, epochs=1):
    """Small trainings, by their seeds."""
    recipe = Recipe(epochs=epochs, batch_size=16, lr=0.05)
    return {s: Job("resnet10@0.125", images, images, recipe=recipe, seed=s, device="cpu") for s in seeds}


def client(address, folder, images, seeds, epochs, before="", **environment):
    """The trainings of ``jobs`` in a process of its own, which runs the code ``before`` first."""
    torch.save(images, folder / "images.pt")
    command = [sys.executable, "-c", before + CLIENT, address, str(folder / "images.pt"), str(epochs), *map(str, seeds)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
