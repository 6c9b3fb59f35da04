import pytest
import torch
from PIL import Image

from kdx.data.own_images import LARGEST, as_dataset, common_size, label, read_labels, read_pictures, read_slices
from kdx.paths import DataError


@pytest.fixture
def folder(tmp_path):
    """Six images of ants and three of bees, one shade each, with two files that are none."""
    shade = 10
    for name, count in {"bees": 3, "ants": 6}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 16), (shade, 0, 0)).save(tmp_path / "in" / name / f"{i}.png")
            shade += 10
    (tmp_path / "in" / "ants" / "broken.png").write_bytes(b"no image")
    (tmp_path / "in" / "bees" / "empty.jpg").touch()
    return tmp_path / "in"


def test_class_folders_give_labels_and_bad_files_are_listed(folder):
    pictures = read_pictures(folder, 8)
    assert pictures.images.shape == (9, 3, 8, 8)
    assert pictures.classes == ("ants", "bees")
    assert pictures.labels.bincount().tolist() == [6, 3]
    assert pictures.refused == {"ants/broken.png": "not an image", "bees/empty.jpg": "empty file"}
    shades = {file: int(image[0, 0, 0]) for file, image in zip(pictures.files, pictures.images, strict=True)}
    assert shades["bees/0.png"] == 10
    assert shades["ants/5.png"] == 90


def test_a_limit_takes_as_many_of_each_class_and_replaces_what_is_broken(folder):
    assert read_pictures(folder, 8, limit=4).labels.bincount().tolist() == [2, 2]
    assert read_pictures(folder, 8, limit=8).there == 10
    assert not read_pictures(folder, 8, limit=8).testing
    assert read_pictures(folder, 8, limit=8).labels.bincount().tolist() == [5, 3]
    draws = [read_pictures(folder, 8, limit=4, seed=seed).files for seed in range(4)]
    assert draws[0] == read_pictures(folder, 8, limit=4).files
    assert len({tuple(sorted(draw)) for draw in draws}) > 1
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        read_pictures(folder, 8, limit=0)


def test_flat_folders_have_no_labels(folder):
    flat = read_pictures(folder / "ants", 8)
    assert flat.labels is None
    assert flat.classes == ()
    assert len(flat.images) == 6
    assert flat.refused == {"broken.png": "not an image"}


def test_only_the_test_part_of_a_split_folder_is_read(folder, tmp_path):
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "test")
    for name in ("ants", "bees"):
        (tmp_path / "both" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (20, 16)).save(tmp_path / "both" / "train" / name / "t.png")
    pictures = read_pictures(tmp_path / "both", 8)
    assert all(file.startswith("test/") for file in pictures.files)
    assert pictures.testing


def test_folders_without_images_are_an_error(tmp_path, folder):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"no image that can be read in .*nothing"):
        read_pictures(tmp_path / "nothing", 8)
    (tmp_path / "nothing" / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"no image that can be read in .*nothing \(notes.txt: not an image\)"):
        read_pictures(tmp_path / "nothing", 8)
    with pytest.raises(DataError, match="found no folder"):
        read_pictures(tmp_path / "nowhere", 8)


def test_labels_are_those_of_folders_or_of_the_student(folder):
    pictures, flat = read_pictures(folder, 8), read_pictures(folder / "ants", 8)
    p = torch.eye(2)[pictures.labels]
    known = label(pictures, p)
    assert known.names == ("ants", "bees")
    assert known.outputs.tolist() == [0, 1]
    assert label(pictures, p, ["bees", "ants"]).outputs.tolist() == [1, 0]
    unknown = label(pictures, torch.rand(9, 10))
    assert unknown.outputs is None
    assert "not known" in unknown.origin
    answers = torch.eye(4)[torch.tensor([3, 3, 1, 1, 3, 1])]
    predicted = label(flat, answers)
    assert (predicted.given, predicted.names) == (False, ("output 1", "output 3"))
    assert predicted.labels.tolist() == [1, 1, 0, 0, 1, 0]
    assert predicted.outputs.tolist() == [1, 3]
    assert label(flat, answers, "abcd").names == ("b", "d")
    assert as_dataset(pictures, known.labels, known.names).classes == ("ants", "bees")
    for message, arguments in {
        "expected a name for each of 2 outputs, got 3": (pictures, p, ["x", "y", "z"]),
        "labels: no name for the folders ants among bees, wasps": (pictures, p, ["bees", "wasps"]),
        "the student predicts output 0 for all 6 images": (flat, torch.eye(2)[torch.zeros(6, dtype=torch.long)]),
        "labels: expected names as text, got \\[0, 1\\]; put them in quotes": (pictures, p, [0, 1]),
        "of at least two classes, got only 'test'": (read_pictures_of_one_class(folder), p),
    }.items():
        with pytest.raises(ValueError, match=message):
            label(*arguments)


def read_pictures_of_one_class(folder):
    one = folder.parent / "one" / "test"
    one.mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(one / "a.png")
    return read_pictures(one.parent, 8)


def test_slices_and_labels_are_read(tmp_path):
    table = tmp_path / "slices.csv"
    table.write_text("file,light,camera\nred/1.png,day,\n2.png,night,7\n")
    found = read_slices(table, ["red/1.png", "blue/2.png", "red/3.png"])
    assert found["light"].tolist()[:2] == ["day", "night"]
    assert found["camera"].isna().tolist() == [True, False, True]
    for text, message in (
        ("name,light\na,b\n", "expected a column file and others in .*, got name, light"),
        ("file\na\n", "expected a column file and others"),
        ("file,light\na,1\n./a,2\n", "a is listed twice"),
        ("file,light\nz,1\n", "lists none of the images, such as red/1.png"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_slices(table, ["red/1.png"])
    table.write_text("file,light\n,x\n,y\nred\\\\1.png,day\n")
    assert read_slices(table, ["red/1.png"])["light"].tolist() == ["day"]
    table.write_text("\ufefffile,light\nred/1.png,None\nred/2.png,NA\n")
    assert read_slices(table, ["red/1.png", "red/2.png"])["light"].tolist() == ["None", "NA"]
    table.write_text("\ufeffcat\ndog\n")
    assert read_labels(table) == ["cat", "dog"]
    table.write_text("file,light\n1.png,day\n")
    with pytest.raises(ValueError, match=r"1.png in .* is the name of several images"):
        read_slices(table, ["red/1.png", "blue/1.png"])
    files = [f"{i}.png" for i in range(60)]
    table.write_text("file,light\n" + "".join(f"{file},{i}\n" for i, file in enumerate(files)))
    with pytest.raises(ValueError, match="light has 60 values, but groups of images are expected, at most 50"):
        read_slices(table, files)
    with pytest.raises(ValueError, match="expected a CSV file with a column file"):
        read_slices(tmp_path / "nowhere.csv", ["a"])
    names = tmp_path / "names.txt"
    names.write_text("cat\n dog \n\n")
    assert read_labels(names) == ["cat", "dog"]
    names.write_text("\n")
    with pytest.raises(ValueError, match="is empty; expected a name in each line"):
        read_labels(names)
    with pytest.raises(ValueError, match="expected a text file"):
        read_labels(tmp_path)


def test_images_of_one_size_say_it(tmp_path):
    for i, size in enumerate([(20, 16), (20, 16)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert common_size(tmp_path) == 16
    Image.new("RGB", (LARGEST + 1, LARGEST + 1)).save(tmp_path / "large.png")
    assert common_size(tmp_path) is None
    for path in tmp_path.glob("?.png"):
        path.unlink()
    assert common_size(tmp_path) is None  # of a camera, not of a network's input
