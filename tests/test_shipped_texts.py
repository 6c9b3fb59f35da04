import math

import pytest
import torch

from kdx.data.sst import load_sentences
from kdx.distil import shipped_texts, text_set
from kdx.distil.fit_text import TextJob, TextRecipe, answer, evaluate_text
from kdx.distil.shipped_texts import find_shipped, ship
from kdx.networks.text_networks import load_text
from kdx.paths import networks_home, sha256_of
from tests.texts import TINY


@pytest.fixture
def job():
    data = [load_sentences("generated", split, limit=40) for split in ("train", "test")]
    return TextJob(TINY, *data, recipe=TextRecipe(1, 20, 0.01), device="cpu")


def test_a_shipped_network_is_found_without_its_run(job, networks_home, home, monkeypatch):
    path = ship(job.fit(), "response, pretrained teacher", 0.5, 0.75)
    assert path == networks_home / "text" / "response_pretrained_teacher-0.safetensors"
    (row,) = shipped_texts.table().to_dict("records")
    assert (row["role"], row["accuracy"], row["two"], row["layers"]) == ("response, pretrained teacher", 0.5, 0.75, 2)
    monkeypatch.setenv("KDX_HOME", str(home / "other"))
    found = job.find()
    assert found.path == path
    assert torch.equal(answer(found.network, job.validation, "cpu"), answer(load_text(path)[0], job.validation, "cpu"))
    assert len(found.history) == 2
    assert found.digest == job.digest
    assert ship(found, "response, pretrained teacher", 0.5, 0.75) == path  # not written twice


def test_damage_is_named(job, networks_home):
    path = ship(job.fit(), "scratch", 0.5, 0.5)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="is damaged"):
        find_shipped(job.digest)
    path.unlink()
    assert find_shipped(job.digest) is None
    assert find_shipped("unknown") is None


def test_verify_names_what_is_not_as_the_table_says(job, networks_home):
    run = job.fit()
    accuracy = lambda network: evaluate_text(network, job.validation, "cpu").accuracy  # noqa: E731
    path = ship(run, "scratch", accuracy(run.network), 0.5)
    (row,) = shipped_texts.verify(accuracy)
    assert (row["file"], row["problem"]) == ("text/scratch-0.safetensors", "")
    assert row["measured"] == pytest.approx(row["accuracy"], abs=1e-4)
    (row,) = shipped_texts.verify(lambda network: 0.99)
    assert row["problem"] == f"expected an accuracy of {row['accuracy']:.4f}, got 0.9900"
    (row,) = shipped_texts.verify(None)
    assert math.isnan(row["measured"])
    assert row["problem"] == ""
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert "is damaged" in next(shipped_texts.verify(None))["problem"]
    path.unlink()
    assert next(shipped_texts.verify(accuracy))["problem"] == "the file is missing"


def test_shipped_files_are_those_of_the_table(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    table, folder = shipped_texts.table(), networks_home() / "text"
    assert {path.name for path in folder.glob("*.safetensors")} == set(table["file"])
    assert [sha256_of(folder / name) for name in table["file"]] == list(table["sha256"])
    sizes = [(folder / name).stat().st_size for name in table["file"]]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 6_000_000
    teacher = table.set_index("role").loc[text_set.TEACHER]
    assert teacher["two"] >= 0.77


@pytest.mark.real_data
@pytest.mark.usefixtures("treebank")
def test_shipped_networks_are_those_that_the_page_asks_for():
    data = [load_sentences("sst", split) for split in ("train", "dev")]
    jobs = text_set.jobs(*data, device="cpu")
    of_page = {job.digest for job in jobs.values()}
    assert set(shipped_texts.table()["digest"]) <= of_page
