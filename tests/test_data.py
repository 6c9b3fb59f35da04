import errno
import hashlib
import io
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import kdx
from kdx.data.dataset import cifar10, shapes
from kdx.data.registry import DATASETS
from kdx.data.dataset import augment, folds, load_dataset
from kdx.paths import DataError, data_home, places
from kdx.data.sources import fingerprint

# --- a small dataset whose files are bytes: n images of 1 x 2 x 2 pixels, then n labels ---------

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
    assert "fetching it anew" in caplog.text
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


# --- CIFAR-10's own readers, on 3 images a file ---------------------------------------------


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(cifar, "ROWS", 3)
    rng = np.random.default_rng(0)
    names = [name for batch in cifar.BATCHES.values() for name in batch]
    return {f"{name}.bin": rng.integers(0, 10, 3 * cifar.RECORD, dtype=np.uint8).tobytes() for name in names}


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
    monkeypatch.setattr(cifar, "ARCHIVE_SHA256", digest)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "cifar-10-binary.tar.gz").write_bytes(archive)  # as if it had been downloaded before
    cifar._fetch_archive("http://127.0.0.1:9/never-asked", tmp_path / "cifar10", tmp_path / "downloads")
    images, labels, masks = cifar.read(tmp_path / "cifar10", "train")
    assert images.shape == (15, 3, 32, 32)
    assert masks is None
    first = small_batches["data_batch_1.bin"]
    assert labels[0] == first[0]
    assert images[0, 0, 0, 1] == first[2]  # row 0, column 1 of red
    assert images[0, 2, 31, 31] == first[cifar.RECORD - 1]


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


def test_augment_transforms_each_image_by_itself_and_keeps_type_and_size():
    images = torch.arange(8 * 3 * 4 * 5, dtype=torch.int32).view(8, 3, 4, 5).to(torch.uint8)
    out = augment(images, {"RandomHorizontalFlip": {}})
    kept = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert kept.any()
    assert mirrored.any()
    cropped = augment(images, {"RandomCrop": {"padding": 2, "padding_mode": "edge"}})  # to the images' own size
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    assert augment(images, {}) is images


def test_augment_is_drawn_by_the_global_seed():
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(augment(images, {"RandomHorizontalFlip": {}, "RandomResizedCrop": {"scale": [0.5, 1.0]}}))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"RandomFlip": {}}, "expected names from torchvision.transforms.v2, got 'RandomFlip'"),
        ({"functional": {}}, "expected names from torchvision.transforms.v2, got 'functional'"),
        ({"RandomCrop": {"pad": 4}}, r"RandomCrop does not take \{'pad': 4\}: .*unexpected keyword argument 'pad'"),
        ({"RandomHorizontalFlip": {"p": 2}}, "RandomHorizontalFlip does not take"),
    ],
)
def test_augment_names_what_it_does_not_know(augmentation, message):
    with pytest.raises(ValueError, match=message):
        augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), augmentation)


def test_data_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "elsewhere"))
    assert data_home() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_HOME", "relative")
    assert data_home() == tmp_path / "relative"


def test_places_are_raw_and_then_those_of_kdx_data(monkeypatch, tmp_path, home):
    monkeypatch.setenv("KDX_DATA", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
    assert places() == [home / "raw", tmp_path / "one", tmp_path / "two"]


def test_fetch_finds_verified_data_in_further_places(register, tmp_path, monkeypatch, home):
    for place in ("damaged", "good"):
        (tmp_path / place / "bytes").mkdir(parents=True)
    truncated(tmp_path / "damaged" / "bytes")
    good(tmp_path / "good" / "bytes")
    monkeypatch.setenv("KDX_DATA", f"{tmp_path / 'damaged'}{os.pathsep}{tmp_path / 'good'}")
    register(never=unreachable)
    assert kdx.fetch("bytes") == tmp_path / "good" / "bytes"
    assert len(load_dataset("bytes")) == 4


def test_load_dataset_at_another_size_and_normalisation():
    whole = load_dataset("shapes", limit=20)
    small = load_dataset("shapes", limit=20, size=32, normalisation=[[0.5] * 3, [0.25] * 3])
    assert small.images.shape == (20, 3, 32, 32)
    assert small.masks.shape == (20, 32, 32)
    assert set(small.masks.unique().tolist()) <= {0, 1, 2}
    assert small.card.size == (3, 32, 32)
    averaged = whole.images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (small.images - averaged).abs().mean() < 12  # of 255: the same pictures, smaller
    assert float(small.card.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, 0, 0, 0]) == 2.0
    for wrong in ([[0.5], [0.2]], [[0.5] * 3, [0.0] * 3], [0.5, 0.2], [[0.5] * 3]):
        with pytest.raises(ValueError, match="normalisation: expected 3 means and 3 standard deviations > 0"):
            load_dataset("shapes", limit=20, normalisation=wrong)
    with pytest.raises(ValueError, match="size: expected 16 to 1024 pixels, got 8"):
        load_dataset("shapes", limit=20, size=8)
