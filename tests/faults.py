"""Random faults while networks are trained on a cluster: what is lost, damaged, stale or trained twice.

    python tests/faults.py --times 60

After each fault the trainings are started again, and their weights compared with those of an undisturbed training in
this process. A training counts as repeated if workers have begun it more than once.
"""

import argparse
import contextlib
import os
import random
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # weights are equal at one thread
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = sys.path[0]

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from distributed import Client

import kdx
from kdx.data import shapes
from kdx.distil.backends import fit_all
from kdx.distil.cluster import connect
from kdx.pages import build
from kdx.paths import DataError
from tests.clusters import Local, client, jobs, until

SIZE, EPOCHS = 4, 6  # networks of each fault, and their epochs
OLD = "import kdx.distil.cluster\nkdx.distil.cluster.__version__ = '0.0'\n"
FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
JUMP = "import time\nnow, begin = time.time, time.monotonic()\n"
JUMP += "time.time = lambda: now() + 2 * 86400 * (time.monotonic() - begin > 8)\n"


class Fault:
    """A cluster, and the trainings that the next fault disturbs."""

    def __init__(self, folder, images):
        self.folder, self.images, self.count = folder, images, 0
        self.local = Local(folder / "cluster")
        self.local.wait_for(2)

    def begin(self):
        """New trainings, and an empty store of the client."""
        self.count += 1
        self.seeds = range(100 * self.count, 100 * self.count + SIZE)
        self.home = self.folder / f"client-{self.count}"
        self.home.mkdir()
        os.environ["KDX_HOME"] = str(self.home)
        self.jobs = jobs(self.images, self.seeds, EPOCHS)

    def client(self, before="", **environment):
        return client(self.local.address, self.home, self.images, self.seeds, EPOCHS, before, **environment)

    def at_random(self):
        """Wait until trainings have begun, and a random while longer."""
        until(lambda: any(self.local.begun(job.key) for job in self.jobs.values()))
        time.sleep(random.uniform(0, 1.5))

    def train(self):
        """All trainings, in this process."""
        return dict(fit_all(self.jobs, self.local.address))

    def in_background(self):
        thread = threading.Thread(target=self.train)
        thread.start()
        return thread

    def living(self):
        """Numbers of the workers that live."""
        return [i for i, process in enumerate(self.local.workers) if process.poll() is None]

    def settle(self):
        """Until the scheduler knows all workers that live, and no others."""
        until(lambda: self.seen() == len(self.living()))

    def seen(self):
        """How many workers the scheduler knows; None if that changes while its client connects."""
        with (
            contextlib.suppress(AssertionError),
            Client(self.local.address, timeout=30, set_as_default=False) as asking,
        ):
            return len(asking.nthreads())


def kill_client(fault):
    process = fault.client()
    fault.at_random()
    process.kill()
    process.wait()


def kill_worker(fault):
    training = fault.in_background()
    fault.at_random()
    i = random.choice(fault.living())
    fault.local.workers[i].kill()
    fault.local.workers[i].wait()
    training.join()
    fault.local.restart(i)


def kill_scheduler(fault):
    """It is started again at its address, and the workers, which end with it, on their stores."""
    training = fault.in_background()
    fault.at_random()
    fault.local.scheduler.kill()
    fault.local.scheduler.wait()
    at_work = fault.living()
    fault.local.start_scheduler()
    for i in at_work:
        fault.local.workers[i].wait(120)
        fault.local.restart(i)
    training.join()


def kill_kernel(fault):
    """The kernel of a page, which trains on the cluster."""
    torch.save(fault.images, fault.home / "images.pt")
    page = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    cells = (
        f'cluster: str = "{fault.local.address}"  # address',
        "import torch\nfrom kdx.distil.backends import fit_all\nfrom tests.clusters import jobs",
        f"images = torch.load({str(fault.home / 'images.pt')!r}, weights_only=False)",
        f"assert len(list(fit_all(jobs(images, {list(fault.seeds)}, {EPOCHS}), cluster))) == {SIZE}",
    )
    page.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    page.cells[0].metadata = {"tags": ["parameters"]}
    path = fault.home / "page.ipynb"
    nbformat.write(page, path)
    command = [sys.executable, "-c", "import sys; from pathlib import Path; from kdx.pages.build import execute\n"]
    command[-1] += "execute(Path(sys.argv[1]), Path(sys.argv[2]), {})"
    builder = subprocess.Popen([*command, str(path), str(fault.home / "out.ipynb")], stderr=subprocess.PIPE, text=True)
    fault.at_random()
    for child in psutil.Process(builder.pid).children(recursive=True):
        if "ipykernel_launcher" in child.cmdline():
            child.kill()
    _, said = builder.communicate(timeout=300)
    assert "its kernel died" in said or builder.returncode == 0, said  # or the page was finished before
    assert (fault.home / "out.ipynb").exists() == (builder.returncode == 0)
    build.execute(path, fault.home / "out.ipynb", {})


def fill_disk(fault):
    process = fault.client(FULL)
    said = process.communicate(timeout=300)[0]
    assert "File too large" in said, said


class Proxy:
    """Passes on what comes to a port of this machine, until it stops."""

    def __init__(self, port):
        self.to, self.server, self.going = port, socket.create_server(("127.0.0.1", 0)), True
        self.address = f"tcp://127.0.0.1:{self.server.getsockname()[1]}"
        self.open = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, far = self.server.accept()[0], socket.create_connection(("127.0.0.1", self.to))
                self.open += [near, far]
                threading.Thread(target=self.pass_on, args=(near, far), daemon=True).start()

    def pass_on(self, near, far):
        with selectors.DefaultSelector() as ready, contextlib.suppress(OSError, ValueError):
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while self.going:
                for key, _ in ready.select(0.1):
                    key.data.sendall(key.fileobj.recv(65536))

    def stop(self):
        self.going = False
        for one in [self.server, *self.open]:
            one.close()


def cut_network(fault):
    """Between the scheduler and a third worker, which reaches it through a proxy."""
    proxy = Proxy(fault.local.port)
    third = fault.local.add(address=proxy.address)
    fault.local.wait_for(3)
    training = fault.in_background()
    fault.at_random()
    proxy.stop()
    training.join()
    third.kill()
    third.wait()


def two_clients(fault):
    first, second = fault.client(), fault.client()
    for process in (first, second):
        said = process.communicate(timeout=300)[0]
        assert said.strip().endswith(str(SIZE)), said


def other_version(fault):
    path = fault.folder / "old.py"
    path.write_text(OLD)
    old = fault.local.add("--preload", str(path))
    fault.local.wait_for(3)
    said = fault.client().communicate(timeout=300)[0]
    assert "was refused: it has kdx 0.0" in said, said
    old.wait(60)


def other_data(fault):
    """The cluster holds other images under the name of those of the client."""
    cluster = connect(fault.local.address)
    ours = replace(fault.images, images=fault.images.images.flip(3), masks=None)
    wrong = replace(ours, images=ours.images.clone())
    assert wrong.fingerprint == ours.fingerprint
    wrong.images[0] ^= 255
    fault.jobs = jobs(ours, fault.seeds, EPOCHS)
    now = cluster._now(name := cluster.name(ours))
    cluster.sent[name] = cluster.client.scatter({now: wrong}, broadcast=True)[now]
    with pytest.raises(DataError, match="arrived with SHA-256"):
        fault.train()
    cluster.sent.clear()
    cluster.lost[name] += 1


def jump_clock(fault):
    """By two days, in the client, beside what a killed process has left."""
    process = fault.client(JUMP)
    said = process.communicate(timeout=300)[0]
    assert said.strip().endswith(str(SIZE)), said


FAULTS = {
    "client killed": kill_client, "worker killed": kill_worker, "scheduler killed": kill_scheduler,
    "kernel of a page killed": kill_kernel, "disk full": fill_disk, "network cut": cut_network,
    "two clients, one store": two_clients, "worker of another version": other_version,
    "other data": other_data, "clock jumps": jump_clock,
}  # fmt: skip


def judge(fault, kind):
    """What a fault has done, after the trainings were started again."""
    runs = {run.key: run for run in fault.train().values()}
    keys = [job.key for job in fault.jobs.values()]
    stored = {path.name for path in (fault.home / "runs").glob("[0-9a-f]*")}
    os.environ["KDX_HOME"] = str(fault.folder / "undisturbed")
    corrupt = 0
    for _, run in fit_all(fault.jobs):
        ours, theirs = run.model.state_dict(), runs[run.key].model.state_dict()
        corrupt += not all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    os.environ["KDX_HOME"] = str(fault.home)
    repeated = sum(max(fault.local.begun(key) - 1, 0) for key in keys)
    lost, stale = len(set(keys) - stored), len(stored - set(keys))
    return {"fault": kind, "times": 1, "lost": lost, "corrupt": corrupt, "stale": stale, "repeated": repeated}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=len(FAULTS), help="faults, the kinds in turn")
    parser.add_argument("--kind", choices=FAULTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    random.seed(given.seed)
    kinds = given.kind or list(FAULTS)
    shapes.COUNTS = {"train": 200, "test": 200}
    images = kdx.load_dataset("shapes", "train", limit=80, size=16)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDX_NETWORKS"] = folder
        fault, rows = Fault(Path(folder), images), []
        try:
            for i in range(given.times):
                kind, start = kinds[i % len(kinds)], time.monotonic()
                fault.begin()
                FAULTS[kind](fault)
                fault.settle()
                rows.append(judge(fault, kind))
                print(f"{i + 1}: {kind}, {time.monotonic() - start:.0f} s, {rows[-1]}", flush=True)
        finally:
            fault.local.stop()
    table = pd.DataFrame(rows).groupby("fault", sort=False).agg("sum")
    table["most repeated"] = pd.DataFrame(rows).groupby("fault", sort=False)["repeated"].max()
    print(table.to_string())
    sys.exit(bool(table[["lost", "corrupt", "stale"]].to_numpy().any() or (table["most repeated"] > 1).any()))


if __name__ == "__main__":
    main()
