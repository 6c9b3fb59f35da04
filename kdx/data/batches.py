"""Class-balanced batches, and the order of rows that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def class_indices(labels: Tensor) -> Tensor:
    """Class indices (n,) of any integer type as int64; as uint8, torch would take them for a mask.

    Raises:
        ValueError: Not a row of integers.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected class indices (n,), got {labels.dtype} {tuple(labels.shape)}")
    return labels.long()


def rank_in_class(labels: Tensor) -> Tensor:
    """The position of each image among those of its class, from 1, in the order of ``labels`` (n,): int64 (n,)."""
    members = labels[:, None] == labels.unique()
    return (members.cumsum(0) * members).sum(1)


def in_turns(labels: Tensor) -> Tensor:
    """Rows in turns: one image of each class, then the next of each, until no class has any left: int64 (n,)."""
    classes, place = labels.unique(return_inverse=True)
    return (rank_in_class(labels) * len(classes) + place).argsort()


def balanced_batches(labels: Tensor, batches: int, batch_size: int, seed: int = 0) -> list[Tensor]:
    """Rows of disjoint random batches in which the numbers of images per class differ by at most one.

    Args:
        labels: (n,) class indices.
        batches: Number of batches, at least 2.
        batch_size: Images per batch, at least 5.
        seed: Draws the images.

    Returns:
        ``batches`` tensors of rows, int64 (batch_size,), on the device of ``labels``.

    Raises:
        ValueError: The labels are not class indices or have one class only, or the smallest class is too small.
    """
    labels = class_indices(labels)
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2:
        raise ValueError(f"labels: expected images of at least two classes, got {len(labels)} of one class")
    if batches < 2 or batch_size < 5:
        raise ValueError(
            f"batches, batch_size: expected at least 2 batches of at least 5 images, got {batches} of {batch_size}"
        )
    if batches * batch_size > int(counts.min()) * len(counts):
        raise ValueError(
            f"{batches} balanced batches of {batch_size} need more images than {int(counts.min())} of the smallest of "
            f"{len(counts)} classes; lower batches or batch_size"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    balanced = order[in_turns(labels.cpu()[order])][: batches * batch_size]
    return [rows.to(labels.device) for rows in balanced.split(batch_size)]


def scorable(labels: Tensor, batches: int, most: int = 128) -> tuple[Tensor, int]:
    """The classes that make the largest balanced batches, and the size of these.

    Args:
        labels: int64 (n,), class indices.
        batches: Number of batches.
        most: Largest batch size.

    Returns:
        The rows of all images of these classes, int64 (m,), and the largest batch size up to ``most``.

    Raises:
        ValueError: There are too few images even for batches of 8.
    """
    classes, counts = labels.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    usable = counts[order] * torch.arange(1, len(order) + 1)
    best = int(usable[1:].argmax()) + 1 if len(order) > 1 else 0
    size = min(most, int(usable[best]) // batches)
    if best < 1 or size < 8:
        raise ValueError(
            f"labels: too few images for {batches} class-balanced batches of 8 or more, by class: "
            f"{', '.join(map(str, counts.tolist()))}; give more images, or lower batches"
        )
    return torch.isin(labels, classes[order[: best + 1]]).nonzero()[:, 0], size
