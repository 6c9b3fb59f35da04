import itertools
import os
from dataclasses import replace

import joblib
import pytest
import torch

import kdx
from kdx import Recipe, cross_fit
from kdx.distil import fit
from kdx.distil.backends import announce, check_cluster, fit_all
from kdx.distil.checkpoints import Kept
from kdx.distil.fit import Job
from kdx.progress import TERMINAL
from tests.test_cross_validation import PAIR


@pytest.fixture
def small(shapes16):
    return shapes16["train"]


def test_networks_trained_at_once_are_those_trained_one_by_one(small, home, monkeypatch):
    """In processes of their own, which write to the same store; a second call trains nothing."""
    at_once = cross_fit(small, workers=2, **PAIR)
    elsewhere = os.environ.get(TERMINAL)
    assert {path.name for path in home.glob("runs/*")} == {run.key for run in at_once.values()}
    stamps = {run.path: run.path.stat().st_mtime_ns for run in at_once.values()}
    assert {run.path: run.path.stat().st_mtime_ns for run in cross_fit(small, workers=2, **PAIR).values()} == stamps
    monkeypatch.setenv("KDX_HOME", str(home) + "-other")
    one_by_one = cross_fit(small, workers=1, **PAIR)
    assert {name: run.key for name, run in one_by_one.items()} == {name: run.key for name, run in at_once.items()}
    for name, run in one_by_one.items():
        moved = run.model.fc.weight - run.untrained.fc.weight
        assert (run.model.fc.weight - at_once[name].model.fc.weight).norm() < 0.05 * moved.norm()
    monkeypatch.setenv("KDX_HOME", str(home) + "-third")  # the processes live on, and write there now
    with joblib.parallel_config(backend="threading"):  # threads would share one random generator
        third = cross_fit(small, workers=2, **PAIR)
    for name, run in third.items():
        assert run.path.parent.parent.name.endswith("-third")
        assert torch.equal(run.model.fc.weight, at_once[name].model.fc.weight)
    assert os.environ.get(TERMINAL) == elsewhere
    with pytest.raises(FloatingPointError, match=r"resnet10@0.125 \(\w+, seed \d\) is nan .*lower the learning rate"):
        cross_fit(small, workers=2, **PAIR | {"recipe": Recipe(epochs=1, batch_size=16, lr=1e9)})
    with pytest.raises(ValueError, match="workers: expected 0"):
        cross_fit(small, workers=-1, **PAIR)


def test_long_trainings_are_announced_with_their_time(monkeypatch, capsys, one_thread, small):
    job = Job("resnet10@0.125", small, small, recipe=Recipe(epochs=1, batch_size=16), device="cpu")
    assert 0 < job.seconds_of_steps()[1] < 60
    announce([job])
    assert not capsys.readouterr().out  # a few steps
    monkeypatch.setattr(Job, "seconds_of_steps", lambda self: (0.0, 0.05))
    long = replace(job, recipe=Recipe(epochs=300, batch_size=16))
    announce([long, replace(long, seed=1)])  # of five batches an epoch
    assert capsys.readouterr().out == "Training 2 networks: about 2 min here. What is finished is kept.\n"


def test_what_is_left_of_a_training_counts_passes_of_the_teacher_and_epochs_that_are_done(
    monkeypatch, home, one_thread, small
):
    clock = itertools.count()
    monkeypatch.setattr(fit.time, "perf_counter", lambda: next(clock))  # whatever is timed takes one second
    guide = kdx.fit("resnet10@0.125", small, small, recipe=Recipe(epochs=0, batch_size=16), device="cpu")
    recipe = Recipe(epochs=2, batch_size=16)
    plain = Job("resnet10@0.0625", small, small, "response", guide, recipe, device="cpu")
    fitted = replace(plain, technique="self-supervised", settings={"self_supervised_epochs": 3})
    assert plain.seconds_of_steps() == fitted.seconds_of_steps() == (1, 2)
    assert plain.seconds_left((1, 2)) == 5 * (2 * 2)
    for done, left in ((0, 3 + 2 * 2), (1, 2 + 2 * 2), (3, 2 * 2), (4, 2)):
        if done:
            Kept(fitted.key, torch.device("cpu")).save({"epochs": done})
        assert fitted.seconds_left((1, 2)) == 5 * left
    Kept(fitted.key, torch.device("cpu")).path.write_bytes(b"damaged")
    assert fitted.seconds_left((1, 2)) == 5 * 7


def test_the_announced_time_is_of_each_technique_and_of_what_is_left(monkeypatch, home, capsys, one_thread, small):
    guide = kdx.fit("resnet10@0.125", small, small, recipe=Recipe(epochs=0, batch_size=16), device="cpu")
    recipe = Recipe(epochs=60, batch_size=16)
    plain = Job("resnet10@0.0625", small, small, "response", guide, recipe, device="cpu")
    fitted = replace(plain, technique="self-supervised", settings={"self_supervised_epochs": 60})
    begun = replace(plain, seed=1)
    Kept(begun.key, torch.device("cpu")).save({"epochs": 36})
    monkeypatch.setattr(Job, "seconds_of_steps", lambda self: (1.0, 2.0 if self.technique == "response" else 6.0))
    announce([plain, fitted, begun])  # five batches an epoch: 600 + (300 + 1800) + 240 seconds
    assert capsys.readouterr().out.startswith("Training 3 networks: about 49 min here.")


def test_a_cluster_is_named_by_its_address_or_file(tmp_path, monkeypatch, small):
    assert check_cluster("") == ""
    assert check_cluster("tls://10.0.0.1:8786") == "tls://10.0.0.1:8786"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scheduler.json").write_text("{}")
    assert check_cluster("scheduler.json") == str(tmp_path / "scheduler.json")
    monkeypatch.setenv("KDX_CLUSTER", "10.0.0.1")
    job = Job("resnet10@0.125", small, small, recipe=Recipe(epochs=0, batch_size=16), device="cpu")
    with pytest.raises(ValueError, match=r"cluster: expected an address such as tcp://.*, got 10.0.0.1"):
        list(fit_all({"one": job}))
    monkeypatch.delenv("KDX_CLUSTER")
    ((name, run),) = fit_all({"one": job})
    assert (name, run.key) == ("one", job.key)
