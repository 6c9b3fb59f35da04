import os
import subprocess
import sys
import time

import pytest

from kdx.paths import (
    CHECKOUT,
    OLD,
    DataError,
    check_space,
    data_home,
    one_line,
    places,
    sha256_of,
    sweep,
    written_whole,
)


def test_data_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "elsewhere"))
    assert data_home() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_HOME", "relative")
    assert data_home() == tmp_path / "relative"


def test_places_are_raw_and_then_those_of_kdx_data(monkeypatch, tmp_path, home):
    monkeypatch.setenv("KDX_DATA", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
    assert places() == [home / "raw", tmp_path / "one", tmp_path / "two"]


def test_written_whole_appears_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "folder"
    with written_whole(path) as scratch:
        (scratch / "file").write_text("one")
        assert not path.exists()
    assert (path / "file").read_text() == "one"
    assert path.stat().st_mode == path.parent.stat().st_mode  # not private as the usual scratch folders
    other = tmp_path / "other"

    def fail():
        with written_whole(other) as scratch:
            (scratch / "file").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    with written_whole(path) as scratch:  # another process has written it meanwhile
        (scratch / "file").write_text("two")
    with (
        pytest.raises(ValueError, match=r"folder is there already; expected a new folder"),
        written_whole(path, new=True) as scratch,
    ):
        (scratch / "file").write_text("two")
    assert (path / "file").read_text() == "one"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "new"]


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_check_space_says_what_is_missing(tmp_path):
    check_space("pets", 1, tmp_path)
    with pytest.raises(DataError, match=r"pets: needs .* MB free in .*; free some space or point KDX_HOME"):
        check_space("pets", 10**18, tmp_path)


def test_messages_are_cut_to_one_line():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 500))) == 200


def test_what_killed_processes_left_is_swept_after_a_day(tmp_path):
    killed = "import os, sys; from pathlib import Path; from kdx.paths import written_whole\n"
    killed += "with written_whole(Path(sys.argv[1])) as scratch: (scratch / 'file').write_text('half'); os._exit(9)"
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "one")], cwd=CHECKOUT)
    (left,) = (path for path in tmp_path.glob(".partial-*") if path.is_dir())
    assert sweep(tmp_path) == []  # it is young
    with written_whole(tmp_path / "two") as ours:
        for folder in (left, ours):
            os.utime(folder, (0, time.time() - 2 * OLD))
        assert sweep(tmp_path) == [left]  # the other's owner lives
        assert ours.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
