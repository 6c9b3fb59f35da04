import hashlib
import io
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from kdx.data import cifar10
from kdx.data.dataset import load_dataset
from kdx.data.registry import DATASETS


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(cifar10, "ROWS", 3)
    rng = np.random.default_rng(0)
    names = [name for batch in cifar10.BATCHES.values() for name in batch]
    return {f"{name}.bin": rng.integers(0, 10, 3 * cifar10.RECORD, dtype=np.uint8).tobytes() for name in names}


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar_archive_is_unpacked_to_its_batches(small_batches, tmp_path, monkeypatch):
    archive = tar_of(small_batches)
    digest = hashlib.sha256(archive).hexdigest()
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", digest)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "cifar-10-binary.tar.gz").write_bytes(archive)  # as if it had been downloaded before
    cifar10._fetch_archive("http://127.0.0.1:9/never-asked", tmp_path / "cifar10", tmp_path / "downloads")
    images, labels, masks = cifar10.read(tmp_path / "cifar10", "train")
    assert images.shape == (15, 3, 32, 32)
    assert masks is None
    first = small_batches["data_batch_1.bin"]
    assert labels[0] == first[0]
    assert images[0, 0, 0, 1] == first[2]  # row 0, column 1 of red
    assert images[0, 2, 31, 31] == first[cifar10.RECORD - 1]


@pytest.mark.real_data
def test_cifar10_is_the_published_data(cifar10):
    train, test = load_dataset("cifar10", "train"), load_dataset("cifar10", "test")
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.labels.bincount().tolist() == [1000] * 10
    published = {"data_batch_1": "cee916563c9f80d84e3cc88e17fdc094", "test_batch": "8e2eb146ae340b09e24670f29cabc632"}
    for name, digest in published.items():  # first half of the SHA-256 of the original host's files
        assert hashlib.sha256((cifar10 / f"{name}.bin").read_bytes()).hexdigest().startswith(digest)
    pixels = train.images.double().div(255)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(train.card.mean, abs=1e-4)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(train.card.std, abs=1e-4)


@pytest.mark.real_data
def test_cifar10_truncated_on_disk_is_refused_and_fetched_anew(cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(tmp_path))
    copy = tmp_path / "raw" / "cifar10"
    shutil.copytree(cifar10, copy)
    with (copy / "data_batch_3.bin").open("r+b") as file:
        file.truncate(1_000_000)
    calls = []
    fetch_again = lambda folder, downloads: (calls.append(1), shutil.copytree(cifar10, folder, dirs_exist_ok=True))  # noqa: E731
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], sources={"copy": fetch_again}))
    assert len(load_dataset("cifar10", "train")) == 50_000
    assert calls == [1]
