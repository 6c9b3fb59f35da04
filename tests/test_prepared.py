"""The cache into which a folder of images is decoded."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdx.data import prepared as module
from kdx.data.dataset import load_dataset, prepare
from kdx.data.folders import Layout
from kdx.data.prepared import prepare_folder
from kdx.paths import DataError
from tests.photographs import fill, picture, ready, reasons


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "photos", each=10)


def test_prepare_keeps_the_middle_of_each_image(tmp_path):
    root = fill(tmp_path / "photos", size=(64, 32))
    prepared = ready(root)
    images, labels, masks = prepared.read("train")
    files = prepared.rows("train")["file"]
    assert masks is None
    assert images.shape == (len(files), 3, 32, 32)
    assert not files.is_monotonic_increasing  # the first images are not all of one class
    for image, label, file in zip(images, labels, files, strict=True):
        original = torch.from_numpy(np.array(Image.open(root / file))).permute(2, 0, 1)
        assert torch.equal(image, original[:, :, 16:48])  # the shorter side has the size already
        assert prepared.card["classes"][label] == Path(file).parent.name


def test_prepare_splits_each_class_by_a_fixed_seed_and_records_it(root, tmp_path):
    first, again = ready(root), prepare_folder("photos", root, Layout(), 32, tmp_path / "elsewhere")
    assert first.files.equals(again.files)
    assert first.card["counts"] == {"train": 14, "test": 6}
    assert first.card["split"] == "test share 0.3, seed 0"
    assert sorted(first.read("test")[1].tolist()) == [0, 0, 0, 1, 1, 1]
    pixels = first.read("train")[0].double() / 255
    assert first.card["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert first.card["std"] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-4)


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_prepare_takes_the_splits_that_folders_name(tmp_path, held_out):
    fill(tmp_path / "photos" / "train", each=9)
    fill(tmp_path / "photos" / held_out, each=2, start=500)
    prepared = ready(tmp_path / "photos")
    assert prepared.card["counts"] == {"train": 18, "test": 4}
    assert prepared.card["split"] == "as the folders say"
    assert set(prepared.files.loc[prepared.files["split"] == "test", "file"].str.split("/").str[0]) == {held_out}


def test_prepare_by_many_at_once_decodes_once(root, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: ready(root), range(4)))
    assert len({one.folder for one in sets}) == 1
    assert len([path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]) == 1


def test_prepared_images_are_found_again_where_the_folder_has_moved(root, tmp_path):
    first = ready(root)
    moved = root.rename(tmp_path / "moved")
    assert prepare_folder("photos", moved, Layout(), 32, tmp_path / "prepared").folder == first.folder


def test_prepare_is_done_once_and_again_when_a_file_changes(root):
    first = ready(root)
    stamp = (first.folder / "images.bin").stat().st_mtime_ns
    assert ready(root).folder == first.folder
    assert (first.folder / "images.bin").stat().st_mtime_ns == stamp
    assert ready(root, size=16).folder != first.folder
    picture(77).save(root / "one" / "new.png")
    assert ready(root).folder != first.folder
    assert sum(ready(root).card["counts"].values()) == 21


def test_a_full_disk_or_an_interruption_leaves_nothing_half_made(root, tmp_path, monkeypatch):
    def fail(error):
        def statistics(*args):
            raise error

        monkeypatch.setattr(module, "_statistics", statistics)

    fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DataError, match=r"photos: the disk of .* is full; nothing was kept"):
        ready(root)
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ready(root)
    assert [path.name for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock"] == []
    monkeypatch.undo()
    assert sum(ready(root).card["counts"].values()) == 20


def test_damaged_prepared_images_are_refused(root):
    prepared = ready(root)
    with (prepared.folder / "images.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"are damaged; delete that folder"):
        ready(root).read("train")
    (prepared.folder / "card.json").write_text("{")
    with pytest.raises(DataError, match=r"are damaged \(.*delete that folder"):
        ready(root)


@pytest.mark.real_data
def test_real_photographs_are_prepared_and_the_bad_ones_named(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(tmp_path))
    pets = prepare("petimages")
    assert sum(pets.card["counts"].values()) == 1000
    assert {file.rpartition("PetImages/")[2]: note for file, note in reasons(pets).items()} == {
        "Cat/666.jpg": "empty file",
        "Dog/11702.jpg": "empty file",
    }
    leaves = load_dataset("plantvillage", "train"), load_dataset("plantvillage", "test")
    assert sum(map(len, leaves)) == 1050
    assert sum(int(part.masked.sum()) for part in leaves) == 280
    masks = leaves[1].masks[leaves[1].masked]
    assert 0.2 < (masks == 1).double().mean() < 0.8
    inside = torch.stack([leaves[1].images[leaves[1].masked][:, c][masks == 1].double().mean() for c in (0, 1, 2)])
    assert inside.argmax() == 1  # leaves are green
