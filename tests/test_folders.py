"""Folders of images: which files are found, and what is refused by name or place."""

import numpy as np
import pytest
from PIL import Image

from kdx.data.folders import Layout
from kdx.data.prepared import prepare_folder
from kdx.paths import DataError
from tests.photographs import fill, picture, ready


def test_prepare_joins_validation_and_training_images_where_there_are_test_images(tmp_path):
    for part, each in {"train": 9, "val": 3, "test": 2}.items():
        fill(tmp_path / "photos" / part, each=each, start=100 * each)
    assert ready(tmp_path / "photos").card["counts"] == {"train": 24, "test": 4}


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "photos", ("train", "bus"))
    assert ready(tmp_path / "photos").card["classes"] == ["bus", "train"]


def test_names_of_classes_stay_text(tmp_path):
    root = fill(tmp_path / "photos", ("0", "01", "1", "True", "NA", "null"))
    prepared = ready(root)
    assert prepared.card["classes"] == ["0", "01", "1", "NA", "True", "null"]
    assert sorted(prepared.read("train")[1].bincount().tolist()) == [5, 5, 5, 6, 6, 6]


@pytest.mark.parametrize("parts", [("Train", "Test"), ("training", "testing"), ("TRAIN", "valid")])
def test_parts_are_known_by_other_spellings(tmp_path, parts):
    for part, each in zip(parts, (9, 2), strict=True):
        fill(tmp_path / "photos" / part, each=each, start=10 * each)
    assert ready(tmp_path / "photos").card["counts"] == {"train": 18, "test": 4}


def test_wrong_folders_are_clear_errors_and_leave_nothing(tmp_path):
    def check(message, make):
        root = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        make(root)
        with pytest.raises(DataError, match=message):
            prepare_folder("photos", next(root.glob("photos"), root), Layout(), 32, tmp_path / "prepared")

    check(r"expected images as <class>/<image>, found nothing in", lambda root: None)
    check(
        r"expected images as <class>/<image>, found 1.png, 2.png in",
        lambda root: [picture(i).save(root / f"{i}.png") for i in (1, 2)],
    )
    check(r"expected images of at least two classes, got one in", lambda root: fill(root, ("one",)))
    check(r"at least 8 readable images of each class, got 3 of few in", one_class_of_three_images)
    check(
        r"found both \(test, train; extra\) in", lambda root: [fill(root / part) for part in ("train", "test", "extra")]
    )
    check(r"photos/train is a link out of the folder", train_is_a_link)
    check(r"no readable image in .* \(2 refused, such as a/x.jpg: not an image; b/x.jpg", unreadable)
    check(r"train and test, got none of three \(test\) in", split_without_a_class)
    check(r"a channel of the training images .* is constant", grey_world)
    with pytest.raises(DataError, match="found no folder"):
        prepare_folder("photos", tmp_path / "nowhere", Layout(), 32, tmp_path / "prepared")
    with pytest.raises(ValueError, match="size: expected 16 to 1024 pixels, got 4000"):
        prepare_folder("photos", tmp_path, Layout(), 4000, tmp_path / "prepared")
    assert [path.name for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock"] == []


def unreadable(root):
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "x.jpg").write_text("x")


def train_is_a_link(root):
    fill(root / "elsewhere")
    fill(root / "photos" / "test", each=2)
    (root / "photos" / "train").symlink_to(root / "elsewhere", target_is_directory=True)


def one_class_of_three_images(root):
    fill(root)
    fill(root, ("few",), 3, start=5000)


def split_without_a_class(root):
    fill(root / "train", ("one", "two", "three"))
    fill(root / "test", ("one", "two"), each=2, start=300)


def grey_world(root):
    for c, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for i in range(8):
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[:, :, 0] = 10 * i + c
            Image.fromarray(pixels).save(root / name / f"{i}.png")
