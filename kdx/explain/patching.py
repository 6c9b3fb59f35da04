"""What maps of unexplained features promise, and what happens when these features are replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from kdx.explain.reference import ANSWER, DIRECTIONS, Reference, centre_logits, inputs_of
from kdx.explain.unexplained import WINDOW, contributions, sides, unexplained_features
from kdx.networks.capture import forward, logits_of
from kdx.networks.stages import evaluating, unwrapped
from kdx.networks.threads import hooked
from kdx.networks.vision_transformers import first_tensor, to_grid


def patch_agreement(
    reference: Reference,
    images: Tensor | tuple[Tensor, Tensor],
    *,
    patches: int = 8,
    window: float = WINDOW,
    batch_size: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Do the maps of :func:`kdx.unexplained` keep their promise? Features are replaced, and the answer is measured.

    A window of a map, before negative values are cut off, promises how much the unexplained answer
    :math:`\tfrac12 \lVert r \rVert^2` falls if the features A there become those that the other network can express,
    :math:`\hat A`. Here they do become so (activation patching), and the network is run on from there. Its answer r
    is measured against the same prediction from the other network. The whole stage is patched as well: far from the
    first order in which maps are computed, so its total has to be measured.

    Args:
        reference: As for :func:`kdx.unexplained`.
        images: (n, c, h, w), n >= 3, or a pair; other images than the reference's.
        patches: Windows per image and stage, at random places; one forward pass each.
        window: Side of a window as a share of the map's side, in [0, 1].
        batch_size: Images in one forward pass.
        seed: Draws the places.

    Returns:
        direction, stage, quantity, value, low, high (95 % jackknife interval over the images), n (images). Quantities:
        ``agreement``, Pearson's correlation over images and windows of promised and measured falls; ``promised`` and
        ``measured``, the fall when the whole stage is patched, as a share of the unexplained answer. Measured, 1: it
        vanishes; negative: it grows. Promised, 2 where it vanishes and the network is linear behind the stage, because
        the first order leaves out the square. NaN where features have no part in the answer, or nothing is unexplained.

    Raises:
        ValueError: Fewer than 3 images, fewer than one patch, or a stage that gives no tensor.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> table = kdx.patch_agreement(kdx.Reference(student, base, images[:12]), images[12:], patches=2)
        >>> table.shape, table["quantity"].unique().tolist()
        ((24, 7), ['agreement', 'promised', 'measured'])
    """
    pair = inputs_of(images)
    if (n := len(pair[0])) < 3 or patches < 1:
        raise ValueError(f"images, patches: expected at least 3 images and 1 patch, got {n} and {patches}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[str, str], list[_Falls]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for x in zip(*(part.split(batch_size) for part in pair), strict=True):
            for key, falls in _measure(reference, x, patches, window, generator).items():
                found.setdefault(key, []).append(falls)
    rows = []
    for key, parts in found.items():
        local, whole = (np.concatenate([getattr(p, name).cpu() for p in parts]) for name in ("local", "whole"))
        sums = np.concatenate([local, local**2, local[..., :1] * local[..., 1:], np.ones_like(local[..., :1])], 2)
        rows.append((*key, "agreement", *np.clip(jackknife(sums.sum(1), _pearson), -1, 1), n))
        for i, name in enumerate(("promised", "measured")):
            rows.append((*key, name, *jackknife(whole[:, [i, 2]], lambda s: s[..., 0] / s[..., 1]), n))
    return pd.DataFrame(rows, columns=["direction", "stage", "quantity", "value", "low", "high", "n"])


@dataclass(frozen=True)
class _Falls:
    """Falls of the unexplained answer, half the squared r, of n images.

    Attributes:
        local: (n, patches, 2), promised and measured.
        whole: (n, 3), promised and measured for the whole stage, and the unexplained answer itself.
    """

    local: Tensor
    whole: Tensor


def _measure(
    reference: Reference, x: tuple[Tensor, ...], patches: int, window: float, generator: torch.Generator
) -> dict[tuple[str, str], _Falls]:
    promised, left = contributions(reference, x), unexplained_features(reference, x)
    answers = reference.answers_of(*x)
    found = {}
    for direction, (explained, given) in DIRECTIONS.items():
        answer = reference.regressions[direction][ANSWER]
        z = answers[explained]
        r = answer.left_over(z, answers[given])
        for stage, maps in promised[direction].items():
            maps, change = maps * answer.spread, -left[direction][stage]
            local = []
            for _ in range(patches):
                mask = _windows(maps, window, generator)
                fall = _fall(reference, explained, stage, x[explained], change * mask[:, None], z, r)
                local.append(torch.stack([(maps * mask).sum((1, 2)), fall], 1))
            fall = _fall(reference, explained, stage, x[explained], change, z, r)
            whole = torch.stack([maps.sum((1, 2)), fall, r.square().sum(1) / 2], 1)
            found[direction, stage] = _Falls(torch.stack(local, 1).double(), whole.double())
    return found


def _fall(reference: Reference, which: int, stage: str, x: Tensor, change: Tensor, z: Tensor, r: Tensor) -> Tensor:
    """How much smaller half the squared r (n, classes) is when a stage's features change; z is the answer as it was."""
    after = r + patched(reference, which, stage, x, change) - z
    return (r.square() - after.square()).sum(1) / 2


def patched(reference: Reference, which: int, stage: str, x: Tensor, change: Tensor) -> Tensor:
    """Centred logits (n, classes) of a network when ``change`` (n, k, h, w) is added to a stage's features."""
    network = unwrapped(reference.networks[which])
    name = reference.layers[which][stage]

    def hook(module: Any, args: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        with torch.enable_grad():  # the transpose of to_grid brings the change to where the features come from
            source = tensor.detach().requires_grad_()
            grid = to_grid(stage, name, source, x)
            added = torch.autograd.grad(grid, source, change.to(grid.dtype))[0]
        return (tensor + added, *output[1:]) if isinstance(output, tuple) else tensor + added

    with evaluating(network), hooked([(name, network.get_submodule(name).register_forward_hook, hook)]):
        return centre_logits(logits_of(forward(network, x)).float())


def _windows(maps: Tensor, window: float, generator: torch.Generator) -> Tensor:
    """1 in a window of each map (n, h, w) around a random place, as in :func:`kdx.explain.unexplained.smooth`."""
    masks = []
    for size, side in zip(maps.shape[1:], sides(maps, window), strict=True):
        centre = torch.randint(size, (len(maps), 1), generator=generator)
        masks.append(((torch.arange(size) - centre).abs() <= side // 2).to(maps))
    return masks[0][:, :, None] * masks[1][:, None]


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlations from the sums over pairs: x, y, x², y², xy and their number, in the last dimension."""
    x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
    varying = np.maximum(n * xx - x**2, 0) * np.maximum(n * yy - y**2, 0)
    return (n * xy - x * y) / np.sqrt(varying)


def jackknife(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float, float]:
    """A statistic of the column sums of ``sums`` (n, m), one row per image, with its 95 % t interval."""
    n, total = len(sums), sums.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, without = float(statistic(total)), statistic(total - sums)
    half = stats.t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return value, value - half, value + half
