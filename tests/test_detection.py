import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kdx
from kdx.cli import app
from kdx.data import detection
from kdx.data.detection import DETECTION_DATASETS, adopt_detection, content_digest, fetch_detection, find_detection
from kdx.paths import DataError
from tests.boxes import squares, voc_object, write_voc

CELLS = {
    "a": (128, 96, [voc_object("RBC", 0, 0, 64, 48), voc_object("WBC", 64, 48, 128, 96)]),
    "b": (96, 128, [voc_object("Platelets", 0, 0, 96, 128)]),
    "c": (128, 96, []),
    "d": (128, 96, [voc_object("RBC", 8, 8, 16, 16)]),
}
SETS = {"train": ["a", "c"], "val": ["b"], "test": ["d"]}


@pytest.fixture
def cells(tmp_path, monkeypatch):
    write_voc(tmp_path / "places" / "bccd", CELLS, SETS)
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "places"))
    return tmp_path / "places" / "bccd"


def test_images_are_fitted_with_their_boxes(cells):
    data = kdx.load_detection("bccd", "train", size=(192, 256))
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert data.images.shape == (3, 3, 192, 256)
    assert data.boxes[0].tolist() == [[0, 0, 128, 96], [128, 96, 256, 192]]
    assert data.labels[0].tolist() == [1, 2]
    assert data.boxes[1].tolist() == [[0, 0, 144, 192]]  # 96 x 128 pixels, enlarged by a half
    assert (data.images[1, :, :, :144] > 150).all()
    assert (data.images[1, :, :, 144:] == 0).all()
    assert data.boxes[2].shape == (0, 4)  # an image without objects is kept


def test_difficult_objects_are_ignored_in_test_images_alone(tmp_path):
    images = {name: (32, 32, [voc_object("cell", 0, 0, 8, 8)]) for name in "abc"}
    images["b"][2].append(voc_object("plate", 8, 8, 16, 32, difficult=1))
    images["c"][2].append(voc_object("plate", 8, 8, 16, 32, difficult=1))
    write_voc(tmp_path, images, {"train": ["c"], "test": ["a", "b"]})
    train, test = (kdx.load_detection(str(tmp_path), split, size=(64, 64)) for split in ("train", "test"))
    assert train.classes == test.classes == ("cell", "plate")
    assert train.boxes[0].tolist() == [[0, 0, 16, 16], [16, 16, 32, 64]]
    assert train.ignored == ()
    assert [of.tolist() for of in test.labels] == [[0], [0]]
    assert [len(one["labels"]) for one in test.ignored] == [0, 1]
    (one,) = test[torch.tensor([1])].ignored
    assert one["boxes"].tolist() == [[16, 16, 32, 64]]
    assert one["labels"].tolist() == [1]
    assert one["crowds"].tolist() == [False]
    write_voc(tmp_path / "b", {"b": (32, 32, images["b"][2][1:])}, {"test": ["b"]})
    with pytest.raises(DataError, match="no box in the test images can be used; difficult objects and crowds: 1"):
        kdx.load_detection(str(tmp_path / "b"), "test")


def test_what_cannot_be_used_is_named(cells):
    shutil.copy(cells / "JPEGImages" / "b.jpg", cells / "JPEGImages" / "a.jpg")
    (cells / "JPEGImages" / "c.jpg").write_bytes(b"nothing")
    data = kdx.load_detection("bccd", "train")
    assert len(data) == 1
    assert "where its annotation says (128, 96)" in data.refused["JPEGImages/a.jpg"]
    assert "not an image" in data.refused["JPEGImages/c.jpg"]


def test_a_folder_of_ones_own_finds_its_classes_and_splits_by_name(tmp_path):
    images = {f"{i:03}": (64, 64, [voc_object("b" if i % 2 else "a", 1, 1, 20, 20)]) for i in range(30)}
    write_voc(tmp_path, images)
    parts = [kdx.load_detection(str(tmp_path), split, size=(64, 64)) for split in ("train", "test")]
    assert parts[0].classes == ("a", "b")
    assert sum(map(len, parts)) == 30
    assert 4 <= len(parts[1]) <= 14
    assert kdx.load_detection(str(tmp_path), "train", (64, 64), classes=["b"]).classes == ("b",)


def test_a_narrow_strip_is_fitted_too(tmp_path):
    write_voc(tmp_path, {"a": (3000, 8, [voc_object("b", 0, 0, 3000, 8)])}, {"test": ["a"]})
    data = kdx.load_detection(str(tmp_path), "test", size=(64, 96))
    assert (data.images[0, :, 0] > 150).all()
    assert not data.images[0, :, 1:].any()


def test_fingerprint_depends_on_boxes_labels_and_pixels():
    data = squares(3)
    other = [squares(3) for _ in range(3)]
    other[0].boxes[0][0, 0] += 1
    other[1].labels[0][0] = 1
    other[2].images[0, 0, 0, 0] += 1
    assert len({data.fingerprint, *(one.fingerprint for one in other)}) == 4
    assert squares(3).fingerprint == data.fingerprint
    assert data[torch.tensor([1])].fingerprint != data[torch.tensor([0])].fingerprint


def test_unknown_names_and_missing_data_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'cells'; choose from: bccd"):
        kdx.load_detection("cells", "train")
    with pytest.raises(DataError, match="kdx data get bccd"):
        kdx.load_detection("bccd", "train")
    with pytest.raises(ValueError, match="expected train or test, got 'val'"):
        kdx.load_detection("bccd", "val")
    write_voc(tmp_path / "none", {"a": (64, 64, [])})
    with pytest.raises(DataError, match="no box"):
        kdx.load_detection(str(tmp_path / "none"), "train", (64, 64))


def test_a_folder_or_archive_is_adopted(tmp_path, home):
    write_voc(tmp_path / "mine" / "BCCD", CELLS, SETS)
    archive = shutil.make_archive(str(tmp_path / "cells"), "zip", tmp_path / "mine")
    assert adopt_detection("bccd", tmp_path / "mine").resolve() == (tmp_path / "mine" / "BCCD").resolve()
    assert len(kdx.load_detection("bccd", "test")) == 1
    adopt_detection("bccd", Path(archive))
    assert find_detection("bccd") == home / "raw" / "bccd"
    assert len(kdx.load_detection("bccd", "test")) == 1


def test_commands_list_prepare_and_refuse(cells, tmp_path, home):
    call = lambda *words: CliRunner().invoke(app, ["data", *words])  # noqa: E731
    assert f"BCCD: boxes of 3 classes, in {cells}; MIT" in call("list").output
    assert f"bccd: ready in {cells}" in call("get", "bccd").output
    bad = voc_object("RBC", 9, 9, 9, 20)
    write_voc(tmp_path / "mine", {"a": (64, 64, [bad, voc_object("RBC", 1, 1, 20, 20)])}, {"train": ["a"]})
    write_voc(tmp_path / "mine", {"b": (64, 64, [voc_object("WBC", 1, 1, 20, 20)])}, {"test": ["b"]})
    done = call("prepare", "bccd", "--from", str(tmp_path / "mine"))
    assert "bccd: 1 train images, 1 test images with 2 boxes of 3 classes" in done.output
    assert "refused: Annotations/a.xml, object 1: a box without area" in done.output
    assert "--size: expected none for bccd" in call("prepare", "bccd", "--size", "32").output


def test_a_download_is_checked_by_its_files(tmp_path, home, monkeypatch):
    write_voc(tmp_path / "mine" / "BCCD", CELLS, SETS)
    archive = Path(shutil.make_archive(str(tmp_path / "cells"), "zip", tmp_path / "mine"))
    monkeypatch.setattr(detection, "download", lambda url, path: Path(shutil.copy(archive, path)))
    with pytest.raises(DataError, match="expected files of SHA-256"):
        fetch_detection("bccd")
    assert find_detection("bccd") is None
    card = DETECTION_DATASETS["bccd"]
    right = detection.replace(card, content=content_digest(tmp_path / "mine" / "BCCD"))
    monkeypatch.setitem(DETECTION_DATASETS, "bccd", right)
    assert fetch_detection("bccd") == home / "raw" / "bccd"
    assert fetch_detection("bccd") == home / "raw" / "bccd"  # not downloaded again
    assert len(kdx.load_detection("bccd", "train")) == 3


@pytest.mark.real_data
def test_blood_cells():
    if find_detection("bccd") is None:
        pytest.skip("bccd is not on this machine")
    parts = {split: kdx.load_detection("bccd", split) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [292, 72]
    assert sum(len(boxes) for part in parts.values() for boxes in part.boxes) == 4155 + 372 + 361 - 2
    assert sorted(parts["train"].refused) == [
        "Annotations/BloodImage_00338.xml, object 13", "Annotations/BloodImage_00343.xml, object 4",
    ]  # fmt: skip
