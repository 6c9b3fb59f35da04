from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import kdx
from kdx.distil import cluster as module
from kdx.distil.backends import fit_all, watching
from kdx.distil.cluster import RefusedError, check_facts, connect, facts
from kdx.distil.run_store import receive
from kdx.paths import DataError
from tests.clusters import client, cluster, jobs, until

QUICK = {"recipe": kdx.Recipe(epochs=1, batch_size=16, lr=0.05), "width": 0.125, "device": "cpu"}
PAIR = {"teacher": "resnet18", "student": "resnet10", "k": 2, "first": 1, "controls": 1, **QUICK}
PAIR_OF_ALL = {"techniques": ["response", "overhaul", "attention"], **PAIR}
OLD = "import kdx.distil.cluster\nkdx.distil.cluster.__version__ = '0.0'\n"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cluster of two workers."""
    with cluster(tmp_path_factory.mktemp("cluster")) as local:
        yield local


@pytest.fixture
def small(shapes16):
    return shapes16["train"]


def test_networks_of_a_cluster_are_those_trained_here(two, small, home, monkeypatch, one_thread):
    there = kdx.cross_fit(small, workers=two.address, **PAIR_OF_ALL)
    assert {run.path.parent for run in there.values()} == {home / "runs"}
    assert all(two.trained(run.key) for (role, _), run in there.items())
    assert not connect(two.address).client.list_datasets()
    stamps = {run.path: run.path.stat().st_mtime_ns for run in there.values()}
    monkeypatch.setenv("KDX_CLUSTER", two.address)
    assert {r.path: r.path.stat().st_mtime_ns for r in kdx.cross_fit(small, **PAIR_OF_ALL).values()} == stamps
    monkeypatch.delenv("KDX_CLUSTER")
    monkeypatch.setenv("KDX_HOME", str(home) + "-other")
    here = kdx.cross_fit(small, **PAIR_OF_ALL)
    assert {name: run.key for name, run in here.items()} == {name: run.key for name, run in there.items()}
    for name, run in here.items():
        ours, theirs = run.model.state_dict(), there[name].model.state_dict()
        assert all(torch.equal(weight, theirs[layer]) for layer, weight in ours.items()), name
        assert run.history.equals(there[name].history)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        kdx.cross_fit(small, workers=two.address, **PAIR | {"recipe": kdx.Recipe(epochs=1, batch_size=16, lr=1e9)})


def test_a_worker_of_another_version_is_refused_and_the_others_train(two, small, tmp_path, capsys):
    (tmp_path / "old.py").write_text(OLD)
    old = two.add("--preload", str(tmp_path / "old.py"))
    two.wait_for(3)
    found = dict(fit_all(jobs(small, range(10, 18)), two.address))
    assert len(found) == 8
    said = capsys.readouterr().out
    assert f"was refused: it has kdx 0.0, expected {kdx.__version__}" in said
    assert old.wait(30) is not None
    with cluster(tmp_path / "other", workers=0) as local:
        local.add("--preload", str(tmp_path / "old.py"))
        local.wait_for(1)
        with pytest.raises(ValueError, match=r"no worker is left; the worker tcp://.* was refused: it has kdx 0.0"):
            list(fit_all(jobs(small, [20]), local.address))


def test_facts_and_images_of_a_worker_are_checked(small):
    check_facts(facts(), facts(), "here")
    with pytest.raises(RefusedError) as caught:
        check_facts(facts() | {"torch": "1.0"}, facts(), "tcp://10.0.0.1:1")
    assert caught.value.args[0] == "tcp://10.0.0.1:1"
    assert caught.value.args[1] == f"it has torch {facts()['torch']}, expected 1.0"
    assert len(small.fingerprint) == 64
    small.images[0] += 1
    try:
        with pytest.raises(DataError, match=r"the images of shapes arrived with SHA-256"):
            module._unpack(small, None)
    finally:
        small.images[0] -= 1


def test_a_run_that_arrives_damaged_is_not_stored(small, home, monkeypatch):
    (job,) = jobs(small, [1]).values()
    files = {path.name: path.read_bytes() for path in job.run().path.iterdir()}
    monkeypatch.setenv("KDX_HOME", str(home) + "-other")
    for wrong in ({"history.csv": b"epoch\n"}, {"manifest.json": b"{}"}):
        with pytest.raises(ValueError, match="arrived damaged"):
            receive(job.key, files | wrong)
        assert job.find() is None
    assert receive(job.key, files).key == job.key


def test_trainings_on_a_gpu_go_where_one_is(two, small, monkeypatch):
    monkeypatch.setattr(module, "pick_device", lambda device: torch.device("cuda"))
    two.add("--resources", "GPU=1")
    gpu = len(two.workers) - 1
    two.wait_for(3)
    for run in dict(fit_all(jobs(small, [30, 31]), two.address)).values():
        assert two.trained(run.key) == [gpu]


def test_two_clients_share_trainings_and_a_third_watches(two, small, tmp_path, home, monkeypatch):
    monkeypatch.setenv("KDX_CLUSTER", two.address)
    other = client(two.address, tmp_path, small, range(40, 44), 40)
    wanted, said = jobs(small, range(40, 44), 40), []
    until(lambda: any(two.begun(job.key) for job in wanted.values()))
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(lambda: dict(fit_all(wanted, two.address)))
        with watching(SimpleNamespace(disable=False, total=2, set_postfix_str=said.append)):
            until(lambda: any(line.startswith(("1 of", "2 of")) for line in said))
        found = ours.result()
    assert said[-1].endswith("workers train networks")
    with watching(SimpleNamespace(disable=True)):  # no terminal
        pass
    assert other.communicate(timeout=60)[0].strip() == "4"
    assert all(len(two.trained(run.key)) == 1 for run in found.values())


def test_a_killed_client_comes_back_to_its_trainings(two, small, tmp_path):
    first = client(two.address, tmp_path, small, range(50, 54), 4)
    wanted = jobs(small, range(50, 54), 4)
    until(lambda: any(two.begun(job.key) for job in wanted.values()))
    first.kill()
    first.wait()
    found = dict(fit_all(wanted, two.address))
    assert {name: run.key for name, run in found.items()} == {name: job.key for name, job in wanted.items()}
    assert sum(two.begun(job.key) for job in wanted.values()) <= len(wanted) + 1


def test_a_killed_worker_costs_one_training_at_most(two, small):
    wanted = jobs(small, range(60, 66), 4)
    found = {}
    for name, run in fit_all(wanted, two.address):
        if not found:
            two.workers[two.trained(run.key)[0]].kill()  # which has handed over what it finished
        found[name] = run
    assert {name: run.key for name, run in found.items()} == {name: job.key for name, job in wanted.items()}
    assert sum(two.begun(job.key) for job in wanted.values()) <= len(wanted) + 1


def test_images_are_sent_again_when_all_workers_died(small, tmp_path):
    with cluster(tmp_path / "one", workers=1) as local:
        wanted = jobs(small, range(2), 4)
        for i, _ in enumerate(fit_all(wanted, local.address)):
            if i == 0:
                local.workers[0].kill()
                local.add()
        assert all(job.find() for job in wanted.values())


def test_two_names_of_one_training_share_it(two, small):
    (job,) = jobs(small, [70]).values()
    (other,) = jobs(small, [71]).values()
    found = dict(fit_all({"a": job, "b": job, "c": other}, two.address))
    assert found["a"].key == found["b"].key == job.key
    assert two.begun(job.key) == two.begun(other.key) == 1
