"""Augmentation of training images: it decides weights, so the key of a run covers it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from kdx.paths import one_line


def augment(images: Tensor, augmentation: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """Transform each image at random, with the global CPU generator of torch, whatever the device.

    ``RandomHorizontalFlip`` and a ``RandomCrop`` back to the size of the images are computed for the whole batch at
    once, other transforms image by image.

    Args:
        images: (n, c, h, w).
        augmentation: Arguments of each transform by its name in ``torchvision.transforms.v2``, in order, such as
            ``{"RandomHorizontalFlip": {}, "RandomCrop": {"padding": 4}}``; ``{}``: none. The default of an argument
            ``size`` is the size of the images.

    Returns:
        The transformed images, of the same type and size.

    Raises:
        ValueError: A name or an argument is unknown.
    """
    transform = compose(augmentation, (images.shape[-2], images.shape[-1]))
    for part in transform.transforms if transform else ():
        if isinstance(part, v2.RandomHorizontalFlip):
            images = _flip(images, part.p)
        elif (
            isinstance(part, v2.RandomCrop) and tuple(part.size) == images.shape[2:] and part.padding and not part.fill
        ):
            images = _crop(images, part.padding, part.padding_mode)
        else:
            images = torch.stack([part(image) for image in images])
    return images


def _flip(images: Tensor, p: float) -> Tensor:
    chosen = (torch.rand(len(images)) < p).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _crop(images: Tensor, padding: Sequence[int], padding_mode: str) -> Tensor:
    n, _, h, w = images.shape
    left, right, top, bottom = padding
    down = torch.randint(top + bottom + 1, (n,)).to(images.device)
    across = torch.randint(left + right + 1, (n,)).to(images.device)
    padded = v2.functional.pad(images, [left, top, right, bottom], padding_mode=padding_mode)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (n, c, places down, places across, h, w)
    return windows[torch.arange(n, device=images.device), :, down, across]


def compose(augmentation: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> v2.Transform | None:
    """The transform that an augmentation describes.

    Args:
        augmentation: As for :func:`augment`.
        size: (height, width) of the images.

    Returns:
        The transform; None: no change.

    Raises:
        ValueError: A name or an argument is unknown.
    """
    parts = []
    for name, arguments in augmentation.items():
        kind = getattr(v2, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, v2.Transform)):
            raise ValueError(f"augmentation: expected names from torchvision.transforms.v2, got {name!r}")
        own_size = {"size": size} if "size" in inspect.signature(kind).parameters else {}
        try:
            parts.append(kind(**own_size | dict(arguments)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"augmentation: {name} does not take {arguments!r}: {one_line(error)}") from error
    return v2.Compose(parts) if parts else None
