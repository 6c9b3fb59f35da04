import pytest
import torch
from safetensors.torch import save_file

import kdx
from kdx.networks.fpn_detectors import build_detector
from kdx.pages.detector_pair import common_levels, outputs_of, read_detectors
from tests.boxes import voc_object, write_voc

BUILD = "kdx:build_detector('fcos', 'resnet10@0.0625', {}, (64, 96))"


@pytest.fixture
def folder(tmp_path):
    boxes = lambda i: [voc_object("red" if i % 2 else "green", 8, 8, 40, 40)]  # noqa: E731
    write_voc(tmp_path / "set", {f"{i:02}": (96, 64, boxes(i)) for i in range(20)})
    return tmp_path / "set"


@pytest.fixture
def given(tmp_path):
    def make(classes=2):
        for seed, name in enumerate(("student", "base")):
            detector = build_detector("fcos", "resnet10@0.0625", classes, (64, 96), seed=seed)
            save_file(detector.state_dict(), tmp_path / f"{name}.safetensors")
        return {n: str(tmp_path / f"{n}.safetensors") for n in ("student", "base")} | {"build": BUILD.format(classes)}

    return make


def test_state_dicts_take_the_classes_of_the_folder_and_say_so(given, folder):
    pair = read_detectors(given(), folder)
    assert pair.images.classes == ("green", "red")
    assert pair.images.size == (64, 96)  # that of the images
    assert any("alphabetical order" in caveat for caveat in pair.caveats)
    assert pair.files[0] == "JPEGImages/00.jpg"
    assert len(pair.per_object()) == 20
    assert pair.precision["value"].between(0, 1).all()
    assert pair.precision.loc[pair.precision["network"] == "student", "difference"].isna().all()
    assert common_levels(pair) == ["P3", "P4", "P5"]


def test_labels_number_the_outputs_and_may_hold_background(given, folder, tmp_path):
    (tmp_path / "names.txt").write_text("__background__\nred\ngreen\n")
    pair = read_detectors(given(3) | {"labels": str(tmp_path / "names.txt")}, folder)
    assert [of.tolist() for of in pair.images.labels[:2]] == [[2], [1]]
    assert not any("difficult" in caveat for caveat in pair.caveats)
    write_voc(folder, {"00": (96, 64, [voc_object("green", 8, 8, 40, 40), voc_object("red", 0, 0, 9, 9, difficult=1)])})
    pair = read_detectors(given(3) | {"labels": str(tmp_path / "names.txt")}, folder)
    assert pair.images.ignored[0]["labels"].tolist() == [1]
    assert any(caveat.startswith("1 object is marked as a crowd or as difficult") for caveat in pair.caveats)
    with pytest.raises(ValueError, match=r"names of the 3 outputs of the student in order \(--labels.* got 2"):
        read_detectors(given(3), folder)
    (tmp_path / "names.txt").write_text("red\nblue\nviolet\n")
    with pytest.raises(ValueError, match=r"classes of the student \(red, blue, violet\), got also green"):
        read_detectors(given(3) | {"labels": str(tmp_path / "names.txt")}, folder)


def test_sizes_scores_and_limits(given, folder):
    pair = read_detectors(given() | {"size": 128}, folder)
    assert pair.images.size == (128, 128)
    with pytest.raises(ValueError, match="score: expected a number between 0 and 1, got 2"):
        read_detectors(given(), folder, score=2.0)
    with pytest.raises(ValueError, match="20 images or more, got 12"):
        read_detectors(given(), folder, limit=12)


def test_outputs_of_detectors_and_of_nothing_else():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    assert outputs_of(build_detector("retinanet", "resnet10@0.0625", 5, (64, 96)), "student") == 5
    for network in (
        kdx.build("resnet10", 3, "small", 0.125),
        ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
    ):
        with pytest.raises(ValueError, match="base: expected a detector of torchvision with a feature pyramid"):
            outputs_of(network, "base")


def test_images_of_a_folder_that_are_for_tests_come_alone(given, folder):
    (folder / "ImageSets" / "Main" / "train.txt").write_text("00\n")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("\n".join(f"{i:02}" for i in range(1, 20)))
    with pytest.raises(ValueError, match="20 images or more, got 19"):
        read_detectors(given(), folder)


def test_a_detector_that_answers_nan_is_named(given, folder, monkeypatch):
    from kdx.pages import detector_pair

    bad = [{"boxes": torch.full((1, 4), float("nan")), "labels": torch.zeros(1), "scores": torch.ones(1)}] * 20
    monkeypatch.setattr(detector_pair, "detect", lambda network, images: bad)
    with pytest.raises(ValueError, match="the student finds boxes or scores that are NaN"):
        read_detectors(given(), folder)
