import json

import pytest

from kdx.data.annotations import find_annotated, read_annotations
from kdx.paths import DataError
from tests.boxes import voc_object, write_picture, write_voc

GOOD = voc_object("cell", 2, 3, 12, 13)


def coco(folder, boxes, part="train", file="instances_train.json", **changes):
    """One image of 40 x 30 pixels; ``boxes`` are those of annotations, or whole annotations."""
    write_picture(folder / part / "a.jpg", 40, 30)
    entries = [box if isinstance(box, dict) else {"bbox": box} for box in boxes]
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 1} | entry for i, entry in enumerate(entries)],
        "categories": [{"id": 1, "name": "cell"}],
    } | changes
    path = folder / "annotations" / file if file.startswith("instances") else folder / part / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_voc_gives_boxes_classes_and_splits(tmp_path):
    images = {"a": (40, 30, [GOOD, voc_object("plate", 0, 0, 40, 30)]), "b": (40, 30, []), "c": (40, 30, [GOOD])}
    write_voc(tmp_path, images, {"train": ["a"], "val": ["b"], "trainval": ["a", "b"], "test": ["c"]})
    found, refused = read_annotations(tmp_path)
    assert refused == {}
    assert [(one.file, one.split, one.size) for one in found] == [
        ("JPEGImages/a.jpg", "train", (40, 30)), ("JPEGImages/b.jpg", "train", (40, 30)),
        ("JPEGImages/c.jpg", "test", (40, 30)),
    ]  # fmt: skip
    assert found[0].objects == (("cell", (2.0, 3.0, 12.0, 13.0)), ("plate", (0.0, 0.0, 40.0, 30.0)))
    assert found[1].objects == ()


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    write_voc(
        tmp_path, {name: (40, 30, [GOOD]) for name in "ab"}, {"train": ["a"], "val": ["b"], "trainval": ["a", "b"]}
    )
    assert [one.split for one in read_annotations(tmp_path)[0]] == ["train", "test"]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_a_list_of_validation_has_any_of_its_names(tmp_path, name):
    write_voc(tmp_path, {name: (40, 30, [GOOD]) for name in "ab"}, {"train": ["a"], name: ["b"]})
    assert [one.split for one in read_annotations(tmp_path)[0]] == ["train", "test"]


def test_a_list_of_bad_bytes_names_nothing_and_the_others_stay(tmp_path):
    write_voc(tmp_path, {name: (40, 30, [GOOD]) for name in "ab"}, {"test": ["b"]})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xff\xfe\0\na\n")
    assert [one.split for one in read_annotations(tmp_path)[0]] == ["train", "test"]


HOSTILE = {
    "right of the image": (("cell", 2, 3, 41, 13), "not inside of 40 x 30"),
    "left of the image": (("cell", -1, 3, 12, 13), "not inside"),
    "below the image": (("cell", 2, 3, 12, 31), "not inside"),
    "empty": (("cell", 5, 5, 5, 9), "without area"),
    "swapped": (("cell", 12, 3, 2, 13), "swapped corners"),
    "upside down": (("cell", 2, 13, 12, 3), "swapped corners"),
    "no number": (("cell", "x", 3, 12, 13), "expected a finite number, got 'x'"),
    "NaN": (("cell", "nan", 3, 12, 13), "expected a finite number"),
    "infinite": (("cell", 2, 3, "inf", 13), "expected a finite number"),
    "400 digits": (("cell", 2, 3, "1" + 400 * "0", 13), "expected a finite number"),
    "unknown class": (("dog", 2, 3, 12, 13), "unknown class 'dog'; expected one of cell"),
    "no class": (("", 2, 3, 12, 13), "unknown class ''"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_object_is_refused_and_the_others_stay(tmp_path, name):
    arguments, reason = HOSTILE[name]
    write_voc(tmp_path, {"a": (40, 30, [GOOD, voc_object(*arguments), GOOD])})
    (found,), refused = read_annotations(tmp_path, ["cell"])
    assert len(found.objects) == 2
    (place, why), = refused.items()  # fmt: skip
    assert place == "Annotations/a.xml, object 2"
    assert reason in why


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda text: text[:-5], "not XML"), (lambda text: "<!DOCTYPE x>" + text, "declares a document type"),
     (lambda text: text.replace("<width>40", "<width>0"), "expected a size in whole pixels"),
     (lambda text: text.replace("<height>30</height>", ""), "expected a finite number, got None"),
     (lambda text: '<?xml version="1.0" encoding="klingon"?>' + text, "unknown encoding"),
     (lambda text: '<?xml version="1.0" encoding="utf-7"?>' + text, "multi-byte encodings are not supported"),
     (lambda text: text.replace("cell", "\0"), "is not UTF-8")],
)  # fmt: skip
def test_a_hostile_file_is_refused_and_the_others_stay(tmp_path, change, reason):
    write_voc(tmp_path, {name: (40, 30, [GOOD]) for name in "ab"})
    path = tmp_path / "Annotations" / "a.xml"
    path.write_text(change(path.read_text()))
    (found,), refused = read_annotations(tmp_path)
    assert found.file == "JPEGImages/b.jpg"
    assert reason in refused["Annotations/a.xml"]


def test_names_that_no_file_can_have(tmp_path):
    write_voc(tmp_path, {name: (40, 30, [GOOD]) for name in "ab"})
    path = tmp_path / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("a.jpg", 300 * "a" + ".jpg"))
    (tmp_path / "Annotations" / "c.xml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "Annotations" / "d.xml").mkdir()
    (found,), refused = read_annotations(tmp_path)
    assert found.file == "JPEGImages/b.jpg"
    assert "File name too long" in refused["Annotations/a.xml"]
    assert all("expected a file" in refused[f"Annotations/{name}.xml"] for name in "cd")


def test_a_file_counts_once(tmp_path):
    write_voc(tmp_path, {name: (40, 30, [GOOD]) for name in "ab"}, {"train": ["a"], "test": ["b"]})
    path = tmp_path / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("b.jpg", "a.jpg"))
    (found,), refused = read_annotations(tmp_path)
    assert found.split == "train"
    assert refused == {"JPEGImages/a.jpg, again": "an earlier entry is of the same file; that one is kept"}


def test_an_annotation_cannot_lead_out_of_the_folder(tmp_path):
    write_picture(tmp_path / "secret.jpg", 40, 30)
    write_voc(tmp_path / "set", {"a": (40, 30, [GOOD])})
    (tmp_path / "set" / "JPEGImages" / "a.jpg").unlink()
    path = tmp_path / "set" / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("a.jpg", "../../secret.jpg"))
    found, refused = read_annotations(tmp_path / "set")
    assert found == []
    assert "no image ../../secret.jpg" in refused["Annotations/a.xml"]


def test_a_listed_image_without_annotation_is_named(tmp_path):
    write_voc(tmp_path, {"a": (40, 30, [GOOD])}, {"test": ["a", "b"]})
    (found,), refused = read_annotations(tmp_path)
    assert found.split == "test"
    assert refused == {"ImageSets/Main, b": "in a list, without a file in Annotations"}


def test_coco_gives_the_same_as_voc(tmp_path):
    coco(tmp_path, [[2, 3, 10, 10]])
    coco(tmp_path, [[0, 0, 40, 30]], "val2017", "instances_val2017.json")
    found, refused = read_annotations(tmp_path)
    assert refused == {}
    assert [(one.file, one.split) for one in found] == [("train/a.jpg", "train"), ("val2017/a.jpg", "test")]
    assert found[0].objects == (("cell", (2.0, 3.0, 12.0, 13.0)),)


def test_crowds_of_coco_and_difficult_objects_of_voc_are_set_apart(tmp_path):
    hard = voc_object("plate", 0, 0, 40, 30, difficult=1)
    write_voc(tmp_path / "voc", {"a": (40, 30, [GOOD, hard])})
    coco(tmp_path / "coco", [[2, 3, 10, 10], {"bbox": [0, 0, 40, 30], "iscrowd": 1}])
    whole = (0.0, 0.0, 40.0, 30.0)
    for layout, apart in (("voc", ((("plate", whole),), ())), ("coco", ((), (("cell", whole),)))):
        (found,), refused = read_annotations(tmp_path / layout)
        assert refused == {}
        assert found.objects == (("cell", (2.0, 3.0, 12.0, 13.0)),)
        assert (found.difficult, found.crowds) == apart


@pytest.mark.parametrize(
    ("value", "apart"),
    [(None, 0), ("", 0), (0, 0), (0.0, 0), (False, 0), (1, 1), (1.0, 1), (True, 1), ("1", 1), ("Unspecified", 0)],
)
def test_marks_of_objects_are_read_as_tools_write_them(tmp_path, value, apart):
    coco(tmp_path / "coco", [{"bbox": [0, 0, 40, 30], "iscrowd": value}])
    text = "" if value is None else f"\n{value} "
    write_voc(tmp_path / "voc", {"a": (40, 30, [GOOD.replace("<difficult>0<", f"<difficult>{text}<")])})
    for layout in ("coco", "voc"):
        (found,), refused = read_annotations(tmp_path / layout)
        assert refused == {}
        assert (len(found.objects), len(found.crowds) + len(found.difficult)) == (1 - apart, apart)


def test_coco_beside_the_images_and_one_folder_deeper(tmp_path):
    coco(tmp_path / "archive", [[2, 3, 10, 10]], "valid", "_annotations.coco.json")
    coco(tmp_path / "archive", [[2, 3, 10, 10]], "train", "_annotations.coco.json")
    assert find_annotated(tmp_path) == tmp_path / "archive"
    assert [one.split for one in read_annotations(tmp_path)[0]] == ["train", "test"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [([35, 3, 10, 10], "not inside"), ([2, 3, 0, 10], "without area"), ([2, 3, -1, 10], "swapped corners"),
     ([2, 3, 10], "expected a bbox of left, top, width, height"), ([2, 3, None, 10], "expected a finite number"),
     ({"bbox": [2, 3, 10, 10], "category_id": 9}, "unknown class"),
     ({"bbox": [2, 3, 10, 10], "image_id": 8}, "of an image that is not there"),
     ({"bbox": [35, 3, 10, 10], "iscrowd": 1}, "not inside"),
     ({"bbox": [2, 3, 10, 10], "iscrowd": "no"}, "expected iscrowd to be 0 or 1, got 'no'")],
)  # fmt: skip
def test_one_hostile_annotation_of_coco_is_refused(tmp_path, entry, reason):
    coco(tmp_path, [[2, 3, 10, 10], entry])
    (found,), refused = read_annotations(tmp_path)
    assert len(found.objects) == 1
    assert reason in refused["annotations/instances_train.json, annotation 1"]


NUMBER = int("1" + 400 * "0")


@pytest.mark.parametrize(
    ("part", "entry", "reason"),
    [("annotations", {"id": [1], "image_id": [7]}, "expected an id that is a whole number or text, got [7]"),
     ("annotations", {"id": 5, "image_id": NUMBER}, "expected an id"),
     ("annotations", {"id": 5, "image_id": 7, "category_id": {"id": 1}, "bbox": [2, 3, 4, 5]}, "expected an id"),
     ("annotations", {"id": 5, "image_id": 7, "category_id": 1, "bbox": [2, 3, NUMBER, 5]}, "a finite number"),
     ("annotations", {"id": 5, "image_id": 7, "category_id": 1, "bbox": [2, 3, "LONG", 5]}, "a finite number"),
     ("images", {"id": [7], "width": 40, "height": 30, "file_name": "a.jpg"}, "expected an id"),
     ("images", {"id": True, "width": 40, "height": 30, "file_name": "a.jpg"}, "expected an id"),
     ("images", {"id": 8, "width": NUMBER, "height": 30, "file_name": "a.jpg"}, "a finite number"),
     ("images", {"id": 7, "width": 40, "height": 30, "file_name": "a.jpg"}, "expected an id of its own, got 7"),
     ("images", {"id": 8, "width": 40, "height": 30, "file_name": 300 * "a"}, "File name too long"),
     ("images", {"id": 8, "width": 40, "height": 30, "file_name": "a\0.jpg"}, "null"),
     ("images", {"id": 8, "width": 40, "height": 30, "file_name": "\ud800.jpg"}, "surrogates not allowed"),
     ("images", {"id": 8, "width": 40, "height": 30, "file_name": "a.jpg"}, "of the same file"),
     ("categories", {"id": {}, "name": "cell"}, "expected an id"), ("categories", {"id": 2}, "expected a name"),
     ("categories", {"id": 1, "name": "plate"}, "expected an id of its own")],
    ids=str,
)  # fmt: skip
def test_one_hostile_entry_of_coco_is_refused_and_the_others_stay(tmp_path, part, entry, reason):
    coco(tmp_path, [[2, 3, 10, 10]])
    path = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content[part].append(entry)
    path.write_text(json.dumps(content).replace('"LONG"', 5000 * "9"))  # more digits than Python turns into a number
    (found,), refused = read_annotations(tmp_path)
    assert found.objects == (("cell", (2.0, 3.0, 12.0, 13.0)),)
    (why,) = refused.values()
    assert reason in why


def test_bad_bytes_in_a_name_spoil_that_entry_alone(tmp_path):
    coco(tmp_path, [[2, 3, 10, 10]])
    path = tmp_path / "annotations" / "instances_train.json"
    more = b'"images": [{"id": 9, "file_name": "caf\xe9.jpg", "width": 40, "height": 30}, '
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b'"images": [', more))
    (found,), refused = read_annotations(tmp_path)
    assert found.file == "train/a.jpg"
    assert "no image" in refused["annotations/instances_train.json, image 9"]


def test_other_folders_and_files_are_refused_as_a_whole(tmp_path):
    with pytest.raises(DataError, match="found neither"):
        read_annotations(tmp_path)
    coco(tmp_path, [[2, 3, 10, 10]], categories={"id": 1})
    with pytest.raises(DataError, match="found no categories"):
        read_annotations(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_annotations(tmp_path)
