import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import kdx
from kdx.data import broden, cues, shapes
from kdx.paths import DataError

LABELS = """number,name,category,frequency,coverage,syns
1,red-c,color(3),3,1.5,
2,blue-c,color(2),2,0.5,
3,cat,object(2),2,0.6,
4,window,part(2);object(3),3,0.5,
5,tail,part(1),1,0.1,
300,street,scene(1),1,1.0,
"""
TABLES = {
    "color": "1,1,red-c,3,1.5\n2,2,blue-c,2,0.5\n",
    "object": "1,3,cat,2,0.6\n2,4,window,3,0.1\n",  # in more images than as a part, and smaller
    "part": "1,4,window,2,0.4\n2,5,tail,1,0.1\n",
    "scene": "1,300,street,1,1.0\n",
}
INDEX = """image,split,ih,iw,sh,sw,color,object,part,material,scene,texture
a/one.jpg,train,8,8,4,6,a/one_color.png,a/one_object.png,a/one_part_1.png;a/one_part_2.png,,,
a/two.jpg,val,8,8,4,6,a/two_color.png,,,,300,
a/three.jpg,val,8,8,4,6,a/three_color.png,a/three_object.png,,,,
"""


def write_mask(path, values):
    labels = np.asarray(values)
    pixels = np.stack([labels % 256, labels // 256, np.zeros_like(labels)], 2).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """A folder in Broden's layout: three images of 8 x 8, masks of 4 x 6."""
    home = tmp_path / "probe"
    (home / "images" / "a").mkdir(parents=True)
    (home / "label.csv").write_text(LABELS)
    (home / "category.csv").write_text(
        "name,first,last,count,frequency\ncolor,1,2,2,3\nobject,3,4,2,3\npart,4,5,2,3\nscene,300,300,1,1\n"
    )
    for name, rows in TABLES.items():
        (home / f"c_{name}.csv").write_text(f"code,number,name,frequency,coverage\n{rows}")
    (home / "index.csv").write_text(INDEX)
    for i, name in enumerate(("one", "two", "three")):
        Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(home / "images" / "a" / f"{name}.jpg")
        write_mask(home / "images" / "a" / f"{name}_color.png", np.full((4, 6), 1 + i % 2))
    write_mask(home / "images" / "a" / "one_object.png", [[3] * 6, [4] * 6, [0] * 6, [0] * 6])
    write_mask(home / "images" / "a" / "one_part_1.png", [[5] * 6, [0] * 6, [0] * 6, [0] * 6])
    write_mask(home / "images" / "a" / "one_part_2.png", [[0] * 6, [4] * 6, [0] * 6, [0] * 6])
    write_mask(home / "images" / "a" / "three_object.png", np.full((4, 6), 3))
    return home


def carried(probe, row):
    """Concept -> pixels of a mask that carry it, as rows of 0 and 1."""
    mask = probe.read_masks(torch.tensor([row]))[0]
    return {
        name: (mask == i).any(0).int().tolist() for i, name in enumerate(probe.concepts, 1) if (mask == i).any().item()
    }


ONES, ZEROS = [1] * 6, [0] * 6


def test_load_probe_reads_brodens_layout(folder):
    probe = kdx.load_probe(folder)
    assert (len(probe), probe.name) == (3, "probe")
    assert probe.categories == ("color", "object", "part", "scene")
    assert probe.concepts == ("red-c", "blue-c", "cat", "window", "tail", "street")
    assert probe.category_of.tolist() == [0, 0, 1, 2, 2, 3]
    assert probe.annotated.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert carried(probe, 0) == {
        "red-c": [ONES] * 4,
        "cat": [ONES, ZEROS, ZEROS, ZEROS],
        "window": [ZEROS, ONES, ZEROS, ZEROS],  # of the part; the one of the object is left out
        "tail": [ONES, ZEROS, ZEROS, ZEROS],
    }
    assert carried(probe, 1) == {"blue-c": [ONES] * 4, "street": [ONES] * 4}  # 300 = 44 + 256, for all pixels
    assert carried(probe, 2) == {"red-c": [ONES] * 4, "cat": [ONES] * 4}
    images = probe.read_images(torch.tensor([2, 0]))
    assert images.dtype == torch.uint8
    assert images.flatten(1).float().mean(1).tolist() == [80, 0]


def test_labels_above_255_are_red_plus_256_green(folder):
    write_mask(folder / "images" / "a" / "two_color.png", np.full((4, 6), 300))
    with open(folder / "c_color.csv", "a") as table:
        table.write("3,300,street,1,9.0\n")
    probe = kdx.load_probe(folder)
    assert probe.category_of[probe.concepts.index("street")] == 0  # its coverage is now larger there
    assert carried(probe, 1) == {"street": [ONES] * 4}


def test_window_of_an_object_alone_is_left_out(folder):
    write_mask(folder / "images" / "a" / "three_object.png", np.full((4, 6), 4))
    assert carried(kdx.load_probe(folder), 2) == {"red-c": [ONES] * 4}


def test_split_limit_size_and_least(folder):
    assert len(kdx.load_probe(folder, "val")) == 2
    assert carried(kdx.load_probe(folder, "val"), 1) == carried(kdx.load_probe(folder), 2)
    small = kdx.load_probe(folder, limit=2, size=5)
    assert len(small) == 2
    assert small.read_images(torch.arange(2)).shape == (2, 3, 5, 5)
    assert small.read_masks(torch.arange(2)).shape[2:] == (4, 6)
    frequent = kdx.load_probe(folder, least=2)
    assert frequent.concepts == ("red-c", "blue-c", "cat", "window")
    assert "tail" not in carried(frequent, 0)
    for wrong in (1, 4):
        with pytest.raises(ValueError, match=f"limit: expected 2 to 3 images, got {wrong}"):
            kdx.load_probe(folder, limit=wrong)
    with pytest.raises(ValueError, match=r"unknown split 'test' of .*; choose from: train, val"):
        kdx.load_probe(folder, "test")


def test_a_probe_in_memory_and_its_parts_are_the_same(folder):
    probe = kdx.load_probe(folder)
    held = probe.in_memory()
    for i in range(3):
        assert carried(held, i) == carried(probe, i)
    rows = torch.tensor([2, 0])
    assert torch.equal(held[rows].read_images(torch.arange(2)), probe.read_images(rows))
    parts = held[rows].only(["part", "color"])
    assert parts.categories == ("part", "color")
    assert parts.annotated.int().tolist() == [[0, 1], [1, 1]]
    assert parts.concepts == ("red-c", "blue-c", "window", "tail")
    assert [parts.categories[i] for i in parts.category_of] == ["color", "color", "part", "part"]
    whole = carried(probe, 0)
    assert carried(parts, 1) == {name: whole[name] for name in ("red-c", "window", "tail")}
    for wrong in ([], ["colour"], ["part", "part"]):
        with pytest.raises(ValueError, match="categories: expected some of color, object, part, scene, got"):
            probe.only(wrong)


def test_a_probe_in_a_place_of_raw_data_is_found_by_its_name(folder, monkeypatch):
    monkeypatch.setenv("KDX_DATA", str(folder.parent))
    assert len(kdx.load_probe("probe")) == 3
    with pytest.raises(ValueError, match="unknown probe 'broden'; choose from: planted, shapes; or give the path"):
        kdx.load_probe("broden")


def test_bad_masks_are_named(folder):
    path = folder / "images" / "a" / "one_color.png"
    for wrong in (6, 299, 301, 999):  # between the labels of the tables, and beyond them
        write_mask(path, np.full((4, 6), wrong))
        with pytest.raises(ValueError, match=re.escape(f"{path}: expected labels of label.csv, got [{wrong}]")):
            kdx.load_probe(folder).read_masks(torch.tensor([1, 0]))
    write_mask(path, np.ones((6, 4), dtype=int))
    with pytest.raises(ValueError, match=r"one_color.png: expected a mask of \(4, 6\) pixels, got \(6, 4\)"):
        kdx.load_probe(folder).read_masks(torch.tensor([0]))


def test_bad_folders_are_named(folder):
    index = folder / "index.csv"
    index.write_text(INDEX.replace("val,8,8,4,6", "val,8,8,6,6", 1))
    with pytest.raises(ValueError, match=re.escape("expected masks of one size (sh, sw), got [[4, 6], [6, 6]]")):
        kdx.load_probe(folder)
    index.write_text(INDEX.replace("scene", "place"))
    with pytest.raises(DataError, match=r"index.csv: expected a column for each category, found none for \['scene'\]"):
        kdx.load_probe(folder)
    index.write_text(INDEX.replace("image,split", "picture,part"))
    with pytest.raises(DataError, match=r"index.csv: expected the columns image, split, sh, sw, found no image, split"):
        kdx.load_probe(folder)
    index.write_text(INDEX)
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(folder / "images" / "a" / "two.jpg")
    with pytest.raises(ValueError, match=r"expected images of one size, got .*; give a size"):
        kdx.load_probe(folder).read_images(torch.arange(3))
    (folder / "label.csv").write_text(LABELS.replace("5,tail", "6,tail"))
    with pytest.raises(DataError, match=r"expected every label of the categories in label.csv, found none of \[5\]"):
        kdx.load_probe(folder)
    (folder / "c_part.csv").unlink()
    with pytest.raises(DataError, match=r"expected a folder in Broden's layout, found no c_part\.csv"):
        kdx.load_probe(folder)


def test_parts_of_a_probe_fit_each_other():
    probe = kdx.load_probe("planted", limit=30)
    concepts = len(probe.concepts)
    for places in (probe.category_of[1:], probe.category_of + 1, probe.category_of - 1):
        with pytest.raises(
            ValueError, match=f"category_of: expected the place of a category, 0 to 3, for each of {concepts}"
        ):
            replace(probe, category_of=places)
    for annotated in (probe.annotated[:, :3], probe.annotated[:, 0], probe.annotated.float()):
        got = f"{annotated.dtype} {tuple(annotated.shape)}"
        with pytest.raises(
            ValueError, match=re.escape(f"annotated: expected bool (n, 4), a column for each category, got {got}")
        ):
            replace(probe, annotated=annotated)


# --- generated probes ----------------------------------------------------------------------------


def test_cue_probe_has_the_values_of_the_cues():
    scene = cues.Scene(cues=("colours", "shapes"), overlap=0.5)
    images, labels, masks = cues.draw(scene, 12, 0)
    probe = broden.cue_probe(images, labels, masks, scene)
    assert probe.concepts[:6] == ("first hue", "second hue", "third hue", "ring", "plus", "triangle")
    assert probe.category_of[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert probe.annotated.all()
    found = probe.read_masks(torch.arange(12))
    for i in range(12):
        hue, shape = scene.classes[labels[i]].split(", ")
        assert torch.equal(found[i, 0] == probe.concepts.index(hue) + 1, masks[i] & 1 > 0)
        assert torch.equal(found[i, 1] == probe.concepts.index(shape) + 1, masks[i] & 2 > 0)
        assert len(found[i, :2].unique()) == 3


def test_shape_probe_has_families_and_parts(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 40, "test": 40})
    data = kdx.load_dataset("shapes", "test", limit=20)
    probe = kdx.load_probe("shapes", limit=20)
    assert probe.categories == ("family", "part", "colour")
    assert probe.concepts[:7] == ("circular", "rectangular", "tailed", "dot", "ring", "bar", "tail")
    masks = probe.read_masks(torch.arange(20))
    for i, label in enumerate(data.labels.tolist()):
        name = data.classes[label]
        if name == "none":
            assert not masks[i, :2].any()
            continue
        family = next(family for family, names in shapes.FAMILIES.items() if name in names)
        part = "tail" if "tails" in name else name.partition("-")[2]
        assert torch.equal(masks[i, 0] == probe.concepts.index(family) + 1, data.masks[i] > 0)
        assert torch.equal(masks[i, 1] == probe.concepts.index(part) + 1, data.masks[i] == 2)


def test_every_pixel_has_the_nearest_colour():
    colours = [(255, 0, 0), (250, 240, 10), (128, 120, 130), (0, 20, 0), (200, 40, 210)]
    images = torch.tensor(colours, dtype=torch.uint8).T.reshape(1, 3, 1, 5)
    found = broden._nearest_colour(images)[0, 0]
    assert [list(broden.COLOURS)[i - 1] for i in found] == ["red", "yellow", "grey", "black", "magenta"]
