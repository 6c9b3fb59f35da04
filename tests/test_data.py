import errno
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import kdx
from kdx import cifar, data, shapes
from kdx.data import DATASETS, DataError, augment, fingerprint, folds, load_dataset

# --- a small dataset whose files are bytes: n images of 1 x 2 x 2 pixels, then n labels ---------

PIXELS = bytes(range(16)) + bytes([0, 0, 1, 1])


def read_bytes(folder, split, seed):
    raw = np.fromfile(folder / f"{split}.bin", dtype=np.uint8)
    if raw.size != 20:
        raise ValueError(f"expected 20 bytes, got {raw.size}")
    return torch.from_numpy(raw[:16].reshape(4, 1, 2, 2).copy()), torch.from_numpy(raw[16:].astype(np.int64)), None


def good(folder):
    for split in ("train", "test"):
        (folder / f"{split}.bin").write_bytes(PIXELS)


def truncated(folder):
    good(folder)
    (folder / "test.bin").write_bytes(PIXELS[:-3])


def unreachable(folder):
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
    assert "fetching it anew" in caplog.text
    (aside,) = path.parent.parent.glob("bytes.refused-*")  # what lay there is kept
    assert (aside / "train.bin").read_bytes() == damage(PIXELS)


def test_fetch_keeps_nothing_when_interrupted(register, home):
    def interrupted(folder):
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
    def no_space(folder):
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


# --- CIFAR-10's own readers, on 3 images a file ---------------------------------------------


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(cifar, "ROWS", 3)
    rng = np.random.default_rng(0)
    names = [name for batch in cifar.BATCHES.values() for name in batch]
    return {f"{name}.bin": rng.integers(0, 10, 3 * cifar.RECORD, dtype=np.uint8).tobytes() for name in names}


@pytest.fixture
def serve():
    """serve(body, promised length) -> the address of a local server with that one file."""
    servers = []

    def start(body, length):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"

    yield start
    for server in servers:
        server.shutdown()


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar_archive_is_downloaded_checked_and_unpacked(small_batches, serve, tmp_path, monkeypatch):
    archive = tar_of(small_batches)
    monkeypatch.setattr(cifar, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    (tmp_path / "cifar10").mkdir()
    cifar._fetch_archive(serve(archive, len(archive)), tmp_path / "cifar10")
    images, labels, masks = cifar.read(tmp_path / "cifar10", "train")
    assert images.shape == (15, 3, 32, 32)
    assert masks is None
    first = small_batches["data_batch_1.bin"]
    assert labels[0] == first[0]
    assert images[0, 0, 0, 1] == first[2]  # row 0, column 1 of red
    assert images[0, 2, 31, 31] == first[cifar.RECORD - 1]


def test_cifar_archive_cut_short_is_an_error(small_batches, serve, tmp_path):
    archive = tar_of(small_batches)
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(Exception, match=r"IncompleteRead|does not match the known hash"):
        cifar._fetch_archive(serve(archive[:500], len(archive)), tmp_path / "cifar10")
    assert not list((tmp_path / "cifar10").iterdir())


def test_cifar_archive_of_other_content_is_an_error(serve, tmp_path):
    with pytest.raises(ValueError, match="does not match the known hash"):
        cifar._fetch_archive(serve(b"sorry", 5), tmp_path / "cifar10")


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
    monkeypatch.setenv("KDX_DATA", str(tmp_path))
    copy = tmp_path / "raw" / "cifar10"
    shutil.copytree(cifar10, copy)
    with (copy / "data_batch_3.bin").open("r+b") as file:
        file.truncate(1_000_000)
    calls = []
    fetch_again = lambda folder: (calls.append(1), shutil.copytree(cifar10, folder, dirs_exist_ok=True))  # noqa: E731
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], sources={"copy": fetch_again}))
    assert len(load_dataset("cifar10", "train")) == 50_000
    assert calls == [1]


# --- loading ---------------------------------------------------------------------------------


def test_load_dataset_names_the_choices():
    with pytest.raises(ValueError, match="unknown dataset 'mnist'; choose from: cifar10, shapes"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="unknown split 'val' of shapes; choose from: train, test"):
        load_dataset("shapes", "val")


def test_limit_keeps_the_class_balance_and_is_drawn_by_the_seed():
    whole = load_dataset("shapes", "test")
    assert (len(whole), whole.labels.bincount().tolist()) == (1600, [160] * 10)
    part, again, other = whole.limit(200, 0), whole.limit(200, 0), whole.limit(200, 1)
    assert part.labels.bincount().tolist() == [20] * 10
    assert part.fingerprint == again.fingerprint != other.fingerprint
    assert part.masks.shape == (200, 64, 64)
    assert whole.limit(None) is whole
    assert whole.limit(1599).labels.bincount().sum() == 1599
    uneven = whole[torch.cat([(whole.labels == c).nonzero()[: 10 + 10 * c, 0] for c in range(10)])]
    assert uneven.limit(55).labels.bincount().tolist() == list(range(1, 11))
    with pytest.raises(TypeError, match=r"expected an index tensor \(m,\), got 3"):
        whole[3]
    for n in (9, 1601):
        with pytest.raises(ValueError, match="expected 10"):
            whole.limit(n)


def test_normalize_gives_zero_mean_unit_variance():
    train = load_dataset("shapes", "train")
    x = train.card.normalize(train.images[:3000])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)
    with pytest.raises(TypeError, match=r"expected uint8 images, got torch.float32"):
        train.card.normalize(x)


# --- shapes ----------------------------------------------------------------------------------


def test_shapes_are_the_same_for_the_same_seed():
    first, again = shapes.read(None, "test", 3), shapes.read(None, "test", 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], shapes.read(None, "test", 4)[0])
    train = shapes.read(None, "train", 3)[0]
    assert train.shape == (6400, 3, 64, 64)
    assert not torch.equal(first[0], train[:1600])


def test_shapes_masks_show_object_and_part():
    images, labels, masks = shapes.read(None, "test", 0)
    empty = labels == shapes.CLASSES.index("none")
    assert not masks[empty].any()
    for region in (1, 2):  # every object is there in full, and has its part
        assert ((masks[~empty] == region).flatten(1).sum(1) >= 20).all()
    assert not masks[:, [0, -1], :].any()  # nothing is cut off by the border
    assert not masks[:, :, [0, -1]].any()
    body, around = (masks == 1)[:, None], (masks == 0)[:, None]
    brightness = images.double()
    inside = (brightness * body).sum((1, 2, 3)) / body.sum((1, 2, 3))
    outside = (brightness * around).sum((1, 2, 3)) / around.sum((1, 2, 3))
    assert (inside > outside)[~empty].double().mean() > 0.95  # objects are brighter than backgrounds


def test_shapes_tails_are_counted_by_their_class():
    from scipy.ndimage import label

    _, labels, masks = shapes.read(None, "test", 0)
    for tails in (1, 2, 4):
        of = labels == shapes.CLASSES.index(f"tails-{tails}")
        pieces = [label(mask == 2, np.ones((3, 3)))[1] for mask in masks[of].numpy()]
        assert np.mean(np.array(pieces) == tails) > 0.97


# --- folds and augmentation ---------------------------------------------------------------------


def test_folds_partition_and_stratify():
    labels = torch.arange(60) % 3
    parts = folds(labels, 4, seed=1)
    held_out = torch.cat([rows for _, rows in parts])
    assert sorted(held_out.tolist()) == list(range(60))
    for train, rows in parts:
        assert not set(train.tolist()) & set(rows.tolist())
        assert labels[rows].bincount().tolist() == [5, 5, 5]
    for k in (1, 21):
        with pytest.raises(ValueError, match=f"expected 2 to 20 .* got {k}"):
            folds(labels, k)


def test_augment_without_shift_only_mirrors():
    images = torch.arange(8 * 3 * 4 * 5, dtype=torch.int32).view(8, 3, 4, 5).to(torch.uint8)
    out = augment(images, torch.Generator().manual_seed(0), shift=0)
    kept = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert kept.any()
    assert mirrored.any()


def test_augment_shifts_are_crops_of_the_reflected_image():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    out = augment(images, torch.Generator().manual_seed(0), shift=2)
    padded = torch.nn.functional.pad(images.float(), (2,) * 4, mode="reflect").to(torch.uint8)
    seen = set()
    for image, frame in zip(out, padded, strict=True):
        crops = {(dy, dx): frame[:, dy : dy + 8, dx : dx + 8] for dy in range(5) for dx in range(5)}
        views = {(*k, flip): crop.flip(-1) if flip else crop for k, crop in crops.items() for flip in (False, True)}
        found = [k for k, view in views.items() if torch.equal(image, view)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 25  # of 50


def test_data_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "elsewhere"))
    assert data.data_home() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_DATA", "relative")
    assert data.data_home() == tmp_path / "relative"
