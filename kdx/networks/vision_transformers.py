"""Transformers: their blocks as stages, and their tokens as feature maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdx.networks.threads import hooked

PREFIXES = (0, 1, 2, 4, 5)  # tokens before those of the image: class, distillation, registers


class Layer(str):
    """A module's name together with the function that turns its output into feature maps (n, k, h, w)."""

    reshape: Callable[[Tensor], Tensor]

    def __new__(cls, name: str, reshape: Callable[[Tensor], Tensor]) -> Layer:
        layer = super().__new__(cls, name)
        layer.reshape = reshape
        return layer


def to_grid(stage: str, name: str, output: Tensor, images: Tensor) -> Tensor:
    """A stage's output for images (n, c, h, w) as feature maps (n, k, h, w).

    Tokens (n, t, k) of square images are laid out as a square, after the prefix tokens (the fewest that
    leave a square number) are dropped. The function of a :class:`Layer` takes precedence.

    Raises:
        ValueError: An output of another shape, or tokens that are no square.
    """
    if len(output) != len(images):
        raise ValueError(
            f"{stage} ({name}): expected a row for each of {len(images)} images, got {tuple(output.shape)}; name other "
            "modules"
        )
    if reshape := getattr(name, "reshape", None):
        maps = reshape(output)
        if not isinstance(maps, Tensor) or maps.ndim != 4 or len(maps) != len(output):
            found = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"{stage} ({name}): expected reshape to give (n, k, h, w), got {found}")
        return maps
    if output.ndim == 3 and images.shape[2] == images.shape[3]:
        side = math.isqrt(output.shape[1])
        prefix = output.shape[1] - side**2
        if side > 1 and prefix in PREFIXES:
            return output[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if output.ndim != 4:
        raise ValueError(
            f"{stage} ({name}): expected feature maps (n, k, h, w), or tokens (n, t, k) that fill a square of a "
            f"square image, got {tuple(output.shape)}; say how they lie: kdx.stages(model, modules=[...], reshape=...)"
        )
    return output


def first_tensor(output: Any) -> Any:
    """The tensor that a block returns, by itself or first in a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def token_stages(model: nn.Module, images: Tensor) -> list[str]:
    """The last block of each quarter of a transformer: of the longest row of sibling modules that give
    tokens (n, t, k) of one shape. [] if there are fewer than four."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tokens = first_tensor(output)
            if isinstance(tokens, Tensor) and tokens.ndim == 3:
                shapes[name] = tuple(tokens.shape)

        return hook

    containers = {name for name, module in model.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)}
    hooks = [
        (name, module.register_forward_hook, keep(name))
        for name, module in model.named_modules()
        if name.rpartition(".")[0] in containers
    ]
    with hooked(hooks), torch.no_grad():
        model(images)
    rows: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        rows.setdefault((name.rpartition(".")[0], shape), []).append(name)
    longest = max(rows.values(), key=len, default=[])
    return [longest[(i + 1) * len(longest) // 4 - 1] for i in range(4)] if len(longest) >= 4 else []
