import errno
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import kdx
from kdx.data.dataset import available, load_dataset, prepare
from kdx.data.registry import DATASETS
from kdx.data.sources import adopt, fingerprint
from kdx.paths import DataError
from tests.photographs import fill, pets

PIXELS = bytes(range(16)) + bytes([0, 0, 1, 1])


def read_bytes(folder, split, seed):
    raw = np.fromfile(folder / f"{split}.bin", dtype=np.uint8)
    if raw.size != 20:
        raise ValueError(f"expected 20 bytes, got {raw.size}")
    return torch.from_numpy(raw[:16].reshape(4, 1, 2, 2).copy()), torch.from_numpy(raw[16:].astype(np.int64)), None


def good(folder, downloads=None):
    for split in ("train", "test"):
        (folder / f"{split}.bin").write_bytes(PIXELS)


def truncated(folder, downloads=None):
    good(folder)
    (folder / "test.bin").write_bytes(PIXELS[:-3])


def unreachable(folder, downloads=None):
    raise ConnectionError("no route to host")


@pytest.fixture
def register(monkeypatch):
    def add(**sources):
        checksum = fingerprint(
            torch.tensor(list(PIXELS[:16]), dtype=torch.uint8).view(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
        )
        card = replace(
            DATASETS["cifar10"],
            name="bytes",
            classes=("a", "b"),
            counts={"train": 4, "test": 4},
            read=read_bytes,
            checksums={"train": checksum, "test": checksum},
            sources=sources,
            download_bytes=100,
        )
        monkeypatch.setitem(DATASETS, "bytes", card)

    return add


def test_fetch_tries_sources_in_order_and_says_why_each_failed(register, home, caplog):
    register(first=unreachable, second=truncated, third=good)
    folder = kdx.fetch("bytes")
    assert folder == home / "raw" / "bytes"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "bytes: first: no route to host",
        "bytes: second: test split unreadable: expected 20 bytes, got 17",
    ]
    assert [path.name for path in folder.parent.glob("[!.]*")] == ["bytes"]
    assert not list(folder.parent.glob(".partial-*"))


def test_fetch_does_nothing_if_verified_data_lie_there(register, home):
    (home / "raw" / "bytes").mkdir(parents=True)
    good(home / "raw" / "bytes")
    register(never=unreachable)
    assert kdx.fetch("bytes") == home / "raw" / "bytes"


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: bytes([raw[0] ^ 1]) + raw[1:]])
def test_fetch_refuses_damaged_data_and_fetches_anew(register, damage, caplog):
    register(source=good)
    path = kdx.fetch("bytes") / "train.bin"
    path.write_bytes(damage(PIXELS))
    kdx.fetch("bytes")
    assert path.read_bytes() == PIXELS
    assert "fetching it again" in caplog.text
    (aside,) = path.parent.parent.glob("bytes.refused-*")  # what lay there is kept
    assert (aside / "bytes" / "train.bin").read_bytes() == damage(PIXELS)


def test_fetch_keeps_nothing_when_interrupted(register, home):
    def interrupted(folder, downloads):
        good(folder)
        raise KeyboardInterrupt

    register(source=interrupted)
    with pytest.raises(KeyboardInterrupt):
        kdx.fetch("bytes")
    assert [path.name for path in (home / "raw").iterdir()] == [".bytes.lock"]


def test_fetch_without_any_source_lists_all_failures(register, home):
    register(first=unreachable, second=truncated)
    with pytest.raises(DataError, match=r"(?s)first: no route.*second: test split.*put the original files into"):
        load_dataset("bytes")
    assert [path.name for path in (home / "raw").iterdir()] == [".bytes.lock"]


def test_fetch_on_a_full_disk_is_one_clear_error(register, home, monkeypatch):
    def no_space(folder, downloads):
        raise OSError(errno.ENOSPC, "No space left on device")

    register(first=no_space, second=good)
    with pytest.raises(DataError, match="is full"):
        kdx.fetch("bytes")
    assert [path.name for path in (home / "raw").iterdir()] == [".bytes.lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(DataError, match="free some space"):
        kdx.fetch("bytes")


def test_fetch_by_many_at_once_gives_each_the_data(register):
    register(source=good)
    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(lambda _: len(load_dataset("bytes")), range(32)))
    assert lengths == [4] * 32


def test_fetch_finds_verified_data_in_further_places(register, tmp_path, monkeypatch, home):
    for place in ("damaged", "good"):
        (tmp_path / place / "bytes").mkdir(parents=True)
    truncated(tmp_path / "damaged" / "bytes")
    good(tmp_path / "good" / "bytes")
    monkeypatch.setenv("KDX_DATA", f"{tmp_path / 'damaged'}{os.pathsep}{tmp_path / 'good'}")
    register(never=unreachable)
    assert kdx.fetch("bytes") == tmp_path / "good" / "bytes"
    assert len(load_dataset("bytes")) == 4


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "photos", each=10)


def test_a_place_without_the_data_is_passed_over(tmp_path, home, monkeypatch, caplog):
    (home / "raw" / "petimages").mkdir(parents=True)
    pets(tmp_path / "place" / "petimages")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert load_dataset("petimages", size=32).classes == ("cat", "dog")
    assert "petimages: passed over: expected images as PetImages/<class>/<image>" in caplog.text


def test_a_registered_dataset_is_found_in_kdx_data_or_says_how_to_get_it(tmp_path, home, monkeypatch):
    assert available("petimages") is None
    with pytest.raises(
        DataError, match=r"petimages is not on this machine at 96 px: get it with `kdx data get petimages`"
    ):
        load_dataset("petimages")
    pets(tmp_path / "place" / "petimages")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert available("petimages")
    assert load_dataset("petimages", size=32).classes == ("cat", "dog")
    monkeypatch.delenv("KDX_DATA")  # the files are gone, what was prepared is not
    assert len(load_dataset("petimages", "train", size=32)) == 11
    assert available("petimages") is None
    assert available("petimages", 32)
    pets(tmp_path / "other" / "petimages", each=9)
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "other"))
    assert len(load_dataset("petimages", "train", size=32)) == 12
    monkeypatch.delenv("KDX_DATA")
    with pytest.raises(DataError, match="several prepared sets"):
        load_dataset("petimages", size=32)


def test_adopt_links_a_folder_and_unpacks_an_archive(tmp_path, home):
    folder = tmp_path / "mine"
    pets(folder)
    assert adopt("petimages", folder) == home / "raw" / "petimages"
    assert (home / "raw" / "petimages").is_symlink()
    assert sum(prepare("petimages", 32).card["counts"].values()) == 16
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in pets(tmp_path / "more", 9).rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "more"))
    adopt("petimages", tmp_path / "pets.zip")
    assert not (home / "raw" / "petimages").is_symlink()
    assert sum(prepare("petimages", 32).card["counts"].values()) == 18
    with pytest.raises(DataError, match="is there already; leave out --from to use it"):
        adopt("petimages", folder)
    assert len(list(folder.rglob("*.png"))) == 16  # the user's own files are untouched


def test_adopt_refuses_what_is_not_the_dataset(tmp_path, root, home):
    for origin, message in {
        root: "expected images as PetImages/<class>/<image> or <class>/<image>, found one/, two/ in",
        tmp_path / "nowhere": "expected a folder or an archive, found nothing at",
    }.items():
        with pytest.raises(DataError, match=message):
            adopt("petimages", origin)
    with pytest.raises(ValueError, match="only registered datasets of images in folders"):
        adopt("shapes", root)
    with pytest.raises(ValueError, match="shapes needs no preparation"):
        prepare("shapes")
    assert not (home / "raw" / "petimages").exists()


def test_fingerprint_tells_labels_above_255_apart():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert len({fingerprint(images, torch.tensor([0, 1, last])) for last in (0, 2, 256, 257)}) == 4
