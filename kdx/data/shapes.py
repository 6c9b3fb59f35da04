"""Generated images with a ground truth for saliency maps.

After the synthesized set of Tjoa & Guan (2020) as Han et al. (2023, appendices B.6 and D) use it: ten classes in a
hierarchy, three kinds of random background, and a mask of two regions, the object and the part that distinguishes its
class from its siblings. All shapes are drawn from signed distances (pixels, negative inside), in blocks of images.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZE = 64  # pixels per side
COUNTS = {"train": 6_400, "test": 1_600}
FAMILIES = {
    "circular": ("disc-dot", "disc-ring", "disc-bar"),
    "rectangular": ("box-dot", "box-ring", "box-bar"),
    "tailed": ("tails-1", "tails-2", "tails-4"),
    "none": ("none",),
}
CLASSES = tuple(name for family in FAMILIES.values() for name in family)
BACKGROUNDS = ("dark", "blurred", "noisy")
BLOCK = 400  # images drawn at the same time


def read(folder: Path | None, split: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a split; the two that were drawn last are kept in memory.

    Args:
        folder: Not used.
        split: ``"train"`` or ``"test"``.
        seed: Draws the images; the splits of a seed differ.

    Returns:
        Images, uint8 (n, 3, SIZE, SIZE), labels, int64 (n,), and masks, uint8 (n, SIZE, SIZE): 0 background, 1 object,
        2 the distinguishing part.
    """
    images, labels, masks = _drawn(split, COUNTS[split], seed)
    return images.clone(), labels.clone(), masks.clone()


@functools.lru_cache(maxsize=2)
def _drawn(split: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng([seed, list(COUNTS).index(split)])
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    blocks = [_draw(labels[i : i + BLOCK], rng) for i in range(0, len(labels), BLOCK)]
    images, masks = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(masks)


def _disc(x, y, radius):
    return np.hypot(x, y) - radius


def _box(x, y, half_width, half_height):
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _turn(x, y, angle):
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _cover(distance):
    """Share of a pixel inside a shape, 0..1, by the signed distance of its centre."""
    return np.clip(0.5 - distance, 0, 1)


def _draw(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n = len(labels)
    name = np.array(CLASSES)[labels]
    is_box, is_tailed, is_none = (np.char.startswith(name, word) for word in ("box", "tails", "none"))

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    # The object and everything that extends beyond it stay inside the image.
    radius = uniform(12, 17) * np.where(is_tailed, 0.62, 1.0).astype(np.float32)[:, None, None]
    reach = radius * np.where(is_tailed, 2.4, 1.4).astype(np.float32)[:, None, None]
    x0, y0 = (reach + uniform(0, 1) * (SIZE - 1 - 2 * reach) for _ in range(2))
    pixel = np.arange(SIZE, dtype=np.float32)
    x, y = _turn(pixel[None, None, :] - x0, pixel[None, :, None] - y0, uniform(-np.pi, np.pi))

    body = _disc(x, y, radius)
    height = radius * uniform(0.7, 0.9)
    body[is_box] = _box(x[is_box], y[is_box], radius[is_box], height[is_box])

    # The distinguishing part: a mark beside the centre of the body, or tails around it.
    part = np.full_like(body, np.inf)
    u, v = x - radius * uniform(-0.25, 0.25), y - radius * uniform(-0.25, 0.25)
    marks = {
        "dot": lambda u, v, r: _disc(u, v, 0.30 * r),
        "ring": lambda u, v, r: np.abs(_disc(u, v, 0.34 * r)) - 0.11 * r,
        "bar": lambda u, v, r: _box(u, v, 0.52 * r, 0.15 * r),
    }
    for kind, distance in marks.items():
        of = np.char.endswith(name, kind)
        part[of] = distance(u[of], v[of], radius[of])
    for tails in (1, 2, 4):
        of = name == f"tails-{tails}"
        for i in range(tails):
            p, q = _turn(x[of], y[of], 2 * np.pi * i / tails + uniform(-0.2, 0.2)[of])
            tail = _box(p - 1.6 * radius[of], q, 0.7 * radius[of], 0.16 * radius[of])
            part[of] = np.minimum(part[of], np.maximum(tail, -body[of]))
    body[is_none] = np.inf

    masks = (body < 0).astype(np.uint8)
    masks[part < 0] = 2
    return _paint(body, part, is_tailed, rng), masks


def _paint(body: np.ndarray, part: np.ndarray, same: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A background, a brighter body, and a part of the colour of the body where ``same``, else a darker one."""
    n = len(body)
    canvas = _background(n, rng)
    body_colour = rng.uniform(0.45, 0.95, (n, 3)).astype(np.float32)
    mark_colour = rng.uniform(0.0, 0.25, (n, 3)).astype(np.float32)
    change = np.empty_like(canvas)
    for distance, colour in ((body, body_colour), (part, np.where(same[:, None], body_colour, mark_colour))):
        np.subtract(colour[:, :, None, None], canvas, out=change)
        change *= _cover(distance)[:, None]
        canvas += change
    rng.standard_normal(out=change, dtype=np.float32)
    change *= 0.02
    canvas += change
    np.clip(canvas, 0, 1, out=canvas)
    canvas *= 255
    return np.rint(canvas, out=canvas).astype(np.uint8)


def _background(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3, SIZE, SIZE), each image of one of BACKGROUNDS."""
    kind = rng.integers(0, len(BACKGROUNDS), n)
    canvas = np.empty((n, 3, SIZE, SIZE), dtype=np.float32)
    canvas[kind == 0] = rng.uniform(0.0, 0.15, (n, 3, 1, 1))[kind == 0]
    coarse = rng.random((n, 3, GRID, GRID), dtype=np.float32)[kind == 1]
    canvas[kind == 1] = _product(_product(_SMOOTH, coarse), _SMOOTH.T)
    canvas[kind == 2] = rng.random((int((kind == 2).sum()), 3, SIZE, SIZE), dtype=np.float32)
    return canvas * np.array([1.0, 0.6, 0.6], dtype=np.float32)[kind][:, None, None, None]


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product, float32, of which every sum is taken in the same order and rounded once a term.

    Linear algebra libraries sum in an order that depends on the processor. Pixels would differ by one level here and
    there, and shipped networks would not be found for their images.
    """
    total = np.zeros(1, dtype=np.float32)
    for k in range(a.shape[-1]):
        total = (total + a[..., :, k, None] * b[..., None, k, :].astype(np.float64)).astype(np.float32)
    return total


# Gaussian interpolation of a coarse grid of colours: each row holds weights that sum to 1.
GRID = 9
_SMOOTH = np.exp(-0.5 * (np.linspace(0, GRID - 1, SIZE)[:, None] - np.arange(GRID)) ** 2 / 0.6**2)
_SMOOTH = (_SMOOTH / _SMOOTH.sum(1, keepdims=True)).astype(np.float32)
