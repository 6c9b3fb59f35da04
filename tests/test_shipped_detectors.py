import sys

import pytest
import torch
from typer.testing import CliRunner

import kdx
from kdx.cli import app
from kdx.distil import shipped
from kdx.distil.average_precision import average_precision
from kdx.distil.detector_fit import detect
from kdx.distil.run_store import shipped_table
from kdx.distil.shipped_detectors import STUDENTS, DetectorStudy
from tests.boxes import voc_object, write_voc

TINY = kdx.Recipe(epochs=1, batch_size=2, lr=0.01)


@pytest.fixture
def study(tmp_path, monkeypatch):
    cells = [voc_object("RBC", 8, 8, 60, 60), voc_object("WBC", 64, 48, 128, 90)]
    images = {name: (128, 96, cells) for name in "abcd"}
    write_voc(tmp_path / "places" / "bccd", images, {"train": ["a", "b"], "test": ["c", "d"]})
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "places"))
    return DetectorStudy(models=("resnet10@0.09375", "resnet10@0.0625"), recipes=(TINY, TINY))


def test_detectors_are_shipped_found_by_role_and_verified(study, networks_home, home, monkeypatch):
    shipped.train([study], only=["base", "fgd"], device="cpu")
    table = shipped_table().set_index("role")
    assert sorted(table.index) == ["base", "fgd", "teacher"]  # the teacher comes with its students
    assert table.loc["fgd", "model"] == "fcos on resnet10@0.0625"
    student = kdx.load_network("bccd", "fgd")
    assert all(torch.equal(weight.half().float(), weight) for weight in student.parameters())
    images = study.images("test")
    measured = average_precision(images, detect(student, images.images)).value
    assert measured == pytest.approx(table.loc["fgd", "accuracy"], abs=1e-4)
    assert [row["problem"] for row in shipped.verify([study])] == [""] * 3
    shipped.train([study], only=["base", "fgd"], device="cpu")  # nothing is trained again
    assert len(shipped_table()) == 3
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    skipped = list(shipped.verify([study]))
    assert ["pip install kdx[detection]" in row["skipped"] for row in skipped] == [True] * 3
    assert [row["problem"] for row in skipped] == [""] * 3
    said = CliRunner().invoke(app, ["networks", "verify"])
    assert "not measured, average precision needs pycocotools: install it with" in said.output
    assert "0 networks are as the tables say; 3 were not measured" in said.output
    assert said.exit_code == 0
    assert not (home / "raw").exists()  # nothing is fetched for networks that are not there


def test_roles_are_those_of_the_page_and_missing_data_are_passed_over(monkeypatch, caplog):
    study = DetectorStudy()
    assert [role for role, _ in study.places] == ["teacher", *STUDENTS]
    shipped.train([study], device="cpu")
    assert "bccd is not on this machine" in caplog.text
    assert len(shipped_table()) == 0
