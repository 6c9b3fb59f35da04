"""Answers to corrupted images: noise, blur, JPEG artefacts, low contrast and rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kdx.inference import two_factor
from kdx.intervals import share_interval
from kdx.measure.ledger import STUDENT, paired

STRENGTHS = (1, 2, 3)
SEED = 0  # of the noise


def _noise(images: Tensor, strength: int) -> Tensor:
    """White noise with standard deviations of 0.05, 0.1 and 0.2 of the range."""
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
    return (images + 255 * 0.025 * 2**strength * drawn).round().clamp(0, 255).to(torch.uint8)


def _blur(images: Tensor, strength: int) -> Tensor:
    """Gaussian blur with standard deviations of 1/64, 1/32 and 1/16 of the image's side."""
    sigma = images.shape[-1] / 2 ** (7 - strength)
    return F.gaussian_blur(images, [2 * int(3 * sigma) + 1] * 2, [sigma] * 2)


def _jpeg(images: Tensor, strength: int) -> Tensor:
    """JPEG of quality 40, 20 and 10."""
    return torch.stack([F.jpeg(image, 80 // 2**strength) for image in images])


def _contrast(images: Tensor, strength: int) -> Tensor:
    """Contrast reduced to 1/2, 1/4 and 1/8."""
    return F.adjust_contrast(images, 2.0**-strength)


def _rotation(images: Tensor, strength: int) -> Tensor:
    """Rotation by 10, 20 and 30 degrees; what comes into view is grey."""
    return F.rotate(images, 10.0 * strength, InterpolationMode.BILINEAR, fill=[127.0] * images.shape[1])


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "JPEG": _jpeg,
    "contrast": _contrast,
    "rotation": _rotation,
}


def corrupt(images: Tensor, corruption: str, strength: int) -> Tensor:
    """Corrupted images, always in the same way.

    Args:
        images: uint8 (n, c, h, w).
        corruption: One of ``CORRUPTIONS``.
        strength: 1, 2 or 3.

    Raises:
        ValueError: Another corruption, strength, or kind of images.
    """
    if corruption not in CORRUPTIONS or strength not in STRENGTHS:
        raise ValueError(
            f"expected one of {', '.join(CORRUPTIONS)} and a strength of 1, 2 or 3, got {corruption!r} and {strength}"
        )
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: expected uint8 (n, c, h, w), got {images.dtype} {tuple(images.shape)}")
    return CORRUPTIONS[corruption](images, strength)


def robustness(
    networks: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, labels: Tensor
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy on corrupted images, and its differences from the student's.

    Args:
        networks: Role -> function from images, uint8 (n, c, h, w), to the classes that a network predicts, (n,);
            ``student`` and ``base`` among them.
        images: uint8 (n, c, h, w).
        labels: (n,) class indices.

    Returns:
        Two tables. The first: network, corruption, strength, value, low, high (exact 95 % interval), n. The second:
        network, corruption, strength, difference, low, high, p, n: right answers of the student minus those of this
        network, paired by image. Its rows without a corruption are over all of them; their interval is a t interval of
        the means of images; where these are all equal, the exact one of their share.

    Examples:
        >>> images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
        >>> bright = lambda x: (x.float().mean((1, 2, 3)) > 127).long()
        >>> table, differences = robustness({"student": bright, "base": bright}, images, bright(images))
        >>> len(table), len(differences), float(differences["difference"].abs().max())
        (30, 16, 0.0)
    """
    right: dict[tuple[str, str, int], Tensor] = {}
    for corruption in CORRUPTIONS:
        for strength in STRENGTHS:
            changed = corrupt(images, corruption, strength)
            for role, answer in networks.items():
                right[role, corruption, strength] = answer(changed).cpu() == labels
    values = [(*key, *share_interval(of, method="exact")) for key, of in right.items()]
    table = pd.DataFrame(values, columns=["network", "corruption", "strength", "value", "low", "high", "n"])
    rows: list[tuple[object, ...]] = []
    for role in networks:
        if role == STUDENT:
            continue
        gains = []
        for (other, corruption, strength), of in right.items():
            if other == role:
                student = right[STUDENT, corruption, strength]
                found = paired(of.numpy(), student.numpy())
                rows.append((role, corruption, strength, *found[:3], found.p, found.n))
                gains.append(student.double() - of.double())
        whole = two_factor(torch.stack(gains).mean(0)[None])
        if whole.certain:  # all images alike
            n, mean = len(labels), whole.mean
            others = 1 - 0.025 ** (1 / n)  # the largest share of other images, which may have any difference
            p = min(2 * (1 + abs(mean)) ** -n, 1.0)  # from which level on the interval leaves out 0
            rows.append((role, "", 0, mean, mean - others * (1 + mean), mean + others * (1 - mean), p, n))
        else:
            p = 2 * min(whole.p_above(), whole.p_below())
            rows.append((role, "", 0, whole.mean, *whole.interval(), p, len(labels)))
    columns = ["network", "corruption", "strength", "difference", "low", "high", "p", "n"]
    return table, pd.DataFrame(rows, columns=columns)
