"""Cues that nothing was tuned on: their patterns are drawn from a seed.

The cues of :mod:`kdx.data.cues` were drawn by hand, and explainers of this package were chosen on some of them. Those
of this module are random lines, blots and waves, so that nobody can have an explainer that suits them in particular.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np

SEED = 20_261_128  # of all patterns; never used for a choice
MOST = 5  # values of a family


@cache
def _patterns(kind: str) -> np.ndarray:
    """Random numbers of each value of a family: (values, parts, numbers)."""
    rng = np.random.default_rng([SEED, *kind.encode()])
    if kind == "strokes":  # four of nine points, joined in their order
        grid = np.stack(np.meshgrid([-0.65, 0, 0.65], [-0.65, 0, 0.65]), -1).reshape(9, 2)
        return np.stack([grid[rng.permutation(9)[:4]] for _ in range(MOST)])
    if kind == "blots":  # place and sign
        return np.stack([np.c_[rng.uniform(-0.7, 0.7, (4, 2)), rng.permutation([-1, -1, 1, 1])] for _ in range(MOST)])
    angle = np.pi * (np.arange(MOST)[:, None] / MOST + rng.uniform(0, 1, (1, 2)))
    return np.stack([np.cos(angle), np.sin(angle), rng.uniform(2.5, 5.5, (MOST, 2))], -1)  # two waves


def strokes(u, v, value, values, rng):
    """Lines between random points, dark or bright."""
    ink = []
    for points in _patterns("strokes"):
        distance = np.min([segment(u, v, *a, *b) for a, b in pairwise(points)], axis=0)
        ink.append(np.clip((0.22 - distance) / 0.2 + 0.5, 0, 1))
    return rng.choice([-1.0, 1.0], (len(value), 1, 1)) * np.stack(ink)[value]


def blots(u, v, value, values, rng):
    """Dark and bright blots at random places."""
    ink = [
        sum(sign * np.exp(-((u - x) ** 2 + (v - y) ** 2) / 0.12) for x, y, sign in parts)
        for parts in _patterns("blots")
    ]
    return np.tanh(2 * np.stack(ink))[value]


def waves(u, v, value, values, rng):
    """Two waves of random directions and lengths, each at a place that differs between images."""
    shifts = rng.uniform(0, 2 * np.pi, (2, len(value), 1, 1))
    found = np.zeros((len(value), *u.shape))
    for shift, (x, y, pitch) in zip(shifts, _patterns("waves")[value].transpose(1, 2, 0)[..., None, None], strict=True):
        found += np.cos(pitch * (u * x + v * y) + shift) / 2
    return found


def segment(u, v, x0, y0, x1, y1):
    """Distance of the points (u, v) from a line."""
    along = np.clip(((u - x0) * (x1 - x0) + (v - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
    return np.hypot(u - x0 - along * (x1 - x0), v - y0 - along * (y1 - y0))
