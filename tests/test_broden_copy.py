import hashlib
import logging
import shutil

import pytest

import kdx
from kdx.data import broden_copy as module
from kdx.paths import DataError
from tests.test_broden import folder  # noqa: F401


def test_a_folder_is_linked_and_then_found_by_its_name(folder, home):  # noqa: F811
    assert module.find_broden() is None
    with pytest.raises(DataError, match="is not on this machine: download http://netdissect"):
        module.prepare_broden()
    told = module.prepare_broden(folder.parent)  # the tables are one folder below
    assert told.startswith("broden: 3 images, 6 concepts in color, object, part, scene; all files")
    assert (home / "raw" / "broden").is_symlink()
    assert (folder / "index.csv").is_file()  # where it was
    assert module.find_broden() == home / "raw" / "broden"
    assert len(kdx.load_probe("broden")) == 3
    assert module.prepare_broden() == told


def test_an_archive_is_unpacked_whatever_its_top_folder(folder, home, tmp_path, caplog):  # noqa: F811
    archive = shutil.make_archive(str(tmp_path / "broden1_224"), "zip", folder.parent, folder.name)
    with caplog.at_level(logging.WARNING, "kdx"):
        placed = module.adopt_broden(tmp_path / "broden1_224.zip")
    with open(archive, "rb") as file:
        assert hashlib.file_digest(file, "md5").hexdigest() in caplog.text  # not that of the original
    assert not placed.is_symlink()
    assert len(kdx.load_probe("broden")) == 3
    with pytest.raises(DataError, match="broden is there already"):
        module.adopt_broden(folder)


def test_a_folder_without_tables_does_not_hide_one_with_them(folder, home, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "place" / "broden" / "dtd").mkdir(parents=True)
    monkeypatch.setenv("KDX_DATA", f"{tmp_path / 'place'}")
    with pytest.raises(DataError, match=r"found no index\.csv"):
        kdx.load_probe("broden")
    folder.rename(tmp_path / "broden")
    monkeypatch.setenv("KDX_DATA", f"{tmp_path / 'place'}:{tmp_path}")
    assert len(kdx.load_probe("broden")) == 3
    assert module.find_broden() == tmp_path / "broden"


def test_a_copy_that_is_not_whole_is_refused_and_leaves_nothing(folder, home, tmp_path):  # noqa: F811
    image = folder / "images" / "a" / "two.jpg"
    kept = image.read_bytes()
    image.unlink()
    assert module.missing_files(folder) == ["a/two.jpg"]
    with pytest.raises(DataError, match=r"expected every file of index\.csv, found no a/two\.jpg"):
        module.adopt_broden(folder)
    image.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot identify image file"):
        module.adopt_broden(folder)
    image.write_bytes(kept)
    (folder / "c_part.csv").unlink()
    with pytest.raises(DataError, match=r"found no c_part\.csv"):
        module.adopt_broden(folder)
    with pytest.raises(DataError, match=r"found no index\.csv in it or one below"):
        module.adopt_broden(folder / "images")
    with pytest.raises(DataError, match="found nothing at"):
        module.adopt_broden(tmp_path / "nowhere.zip")
    assert not (home / "raw" / "broden").exists()
    assert not list((home / "raw").glob(".partial-*"))
