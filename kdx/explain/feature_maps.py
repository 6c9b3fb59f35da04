"""Feature maps as pictures: how large the features of a stage are at each place."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdx.networks.capture import activations
from kdx.networks.stages import stages
from kdx.networks.vision_transformers import to_grid


def feature_map(model: nn.Module, images: Tensor, layers: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    r"""The mean magnitude of the features at each place, :math:`\frac{1}{k} \sum_c |A^c_{ij}|`.

    Args:
        model: Any CNN or plain vision transformer. It runs in evaluation mode and is left as it was found.
        images: (n, c, h, w), normalised as the network expects.
        layers: Stage -> module name; None takes :func:`kdx.stages`.

    Returns:
        Stage -> float32 (n, h, w) >= 0, at the stage's own resolution.

    Examples:
        >>> import kdx, torch
        >>> maps = kdx.feature_map(kdx.build("resnet10", 3, "small", 0.125), torch.rand(2, 3, 32, 32))
        >>> tuple(maps["L4"].shape)
        (2, 4, 4)
    """
    layers = stages(model, images[:1]) if layers is None else layers
    found = activations(model, images, layers)
    return {stage: magnitude(to_grid(stage, layers[stage], found[stage], images)) for stage in layers}


def magnitude(features: Tensor) -> Tensor:
    """The mean of absolute values over channels: (n, k, h, w) -> float32 (n, h, w)."""
    return features.float().abs().mean(1)


def channel_grid(features: Tensor) -> Tensor:
    """All channels side by side, row by row in a square grid, as one picture.

    Args:
        features: (n, k, h, w).

    Returns:
        (n, rows h, columns w) with as many columns as the root of k, rounded up; places without a channel are 0.
    """
    n, k, h, w = features.shape
    columns = math.isqrt(k - 1) + 1
    rows = -(-k // columns)
    grid = torch.cat([features, features.new_zeros(n, rows * columns - k, h, w)], 1)
    return grid.view(n, rows, columns, h, w).transpose(2, 3).reshape(n, rows * h, columns * w)
