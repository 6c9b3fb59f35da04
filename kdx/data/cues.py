"""Generated images with several independent cues, each with its mask.

Every image shows one cue of each family, at random places over a structured background. Labels that reveal only some
of the families decide what a network knows (:mod:`kdx.planted.plantings`), and the masks show where that knowledge must
appear in a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdx.data.held_out import blots, segment, strokes, waves

COUNTS = {"train": 8_000, "test": 1_000}
BACKGROUNDS = ("noise", "blur", "1/f")
PLACES = ("first", "second", "third", "fourth", "fifth")
BLOCK = 500  # images drawn at the same time
MOST = 0.35  # share of an image that cues may cover; with more, separate places are rarely found


def _grating(u, v, value, values, rng):
    angle, phase = np.pi * value / values, rng.uniform(0, 2 * np.pi, (len(value), 1, 1))
    return np.cos(3.5 * (u * np.cos(angle)[:, None, None] + v * np.sin(angle)[:, None, None]) + phase)


def _shape(u, v, value, values, rng):
    radius, larger = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    triangle = np.maximum(0.87 * np.abs(u) + 0.5 * (v + 0.1), -(v + 0.1)) + 0.25
    outlines = np.stack(
        [
            np.abs(radius - 0.7),
            np.where(larger < 0.85, np.minimum(np.abs(u), np.abs(v)), 1),
            np.abs(triangle - 0.7),
            np.abs(larger - 0.65),
            np.where(larger < 0.75, np.minimum(np.abs(u - v), np.abs(u + v)) / 1.41, 1),
        ]
    )
    return _sign(rng, len(value)) * _ink(outlines[value], 0.18)


def _dots(u, v, value, values, rng):
    corner = 0.55
    places = [(0, 0), (-corner, -corner), (corner, corner), (-corner, corner), (corner, -corner)]
    faces = [[0], [1, 2], [0, 1, 2], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    away = [np.hypot(u - x, v - y) for x, y in places]
    distance = np.stack([np.min([away[i] for i in face], axis=0) for face in faces])
    return _sign(rng, len(value)) * _ink(distance[value], 0.27)


def _colour(u, v, value, values, rng):
    return np.broadcast_to(_ink(np.hypot(u, v), 0.8), (len(value), *u.shape))


def _letter(u, v, value, values, rng):
    strokes = {
        "L": [(-0.5, -0.7, -0.5, 0.7), (-0.5, 0.7, 0.5, 0.7)],
        "T": [(-0.6, -0.7, 0.6, -0.7), (0, -0.7, 0, 0.7)],
        "H": [(-0.5, -0.7, -0.5, 0.7), (0.5, -0.7, 0.5, 0.7), (-0.5, 0, 0.5, 0)],
        "V": [(-0.6, -0.7, 0, 0.7), (0, 0.7, 0.6, -0.7)],
        "Z": [(-0.5, -0.7, 0.5, -0.7), (0.5, -0.7, -0.5, 0.7), (-0.5, 0.7, 0.5, 0.7)],
    }
    distance = np.stack([np.min([segment(u, v, *line) for line in lines], axis=0) for lines in strokes.values()])
    return _sign(rng, len(value)) * _ink(distance[value], 0.24)


def _checks(u, v, value, values, rng):
    pitch = (2.0 + 1.4 * np.arange(values))[value][:, None, None]
    shift = rng.uniform(0, 2 * np.pi, (2, len(value), 1, 1))
    return np.tanh(4 * np.sin(pitch * u + shift[0]) * np.sin(pitch * v + shift[1]))


def _ink(distance, reach):
    """Ink 0..1 within ``reach`` of a line, with soft edges, a tenth of the cue wide."""
    return np.clip((reach - distance) / 0.2 + 0.5, 0, 1)


def _sign(rng, n):
    return rng.choice([-1.0, 1.0], (n, 1, 1))


@dataclass(frozen=True)
class Family:
    """A kind of cue.

    Attributes:
        names: Names of its values.
        draw: ``draw(u, v, value, values, rng)`` returns the ink (n, side, side) in [-1, 1] of the values (n,) of
            ``values`` at the coordinates ``u`` and ``v``, (side, side) in [-1, 1].
    """

    names: tuple[str, ...]
    draw: Callable[..., np.ndarray]


FAMILIES = {
    "gratings": Family(tuple(f"{way} grating" for way in ("upright", "tilted", "slanted", "flat", "steep")), _grating),
    "shapes": Family(("ring", "plus", "triangle", "square", "cross"), _shape),
    "dots": Family(("one dot", "two dots", "three dots", "four dots", "five dots"), _dots),
    "colours": Family(tuple(f"{place} hue" for place in PLACES), _colour),
    "letters": Family(("L", "T", "H", "V", "Z"), _letter),
    "checks": Family(tuple(f"{width} checks" for width in ("coarse", "wide", "medium", "narrow", "fine")), _checks),
    "strokes": Family(tuple(f"{place} strokes" for place in PLACES), strokes),
    "blots": Family(tuple(f"{place} blots" for place in PLACES), blots),
    "waves": Family(tuple(f"{place} waves" for place in PLACES), waves),
}


@dataclass(frozen=True)
class Scene:
    """How the images are drawn.

    Attributes:
        cues: Names in ``FAMILIES``, 1 to 8; an image shows one cue of each.
        values: Number of values of each family, 2 to 5.
        cue_size: Pixels per side of the square of a cue, which is its mask; at least 5. One for all, or one for each.
        contrast: Contrast of a cue, in (0, 1].
        overlap: Largest share of the side of a cue that another may cover, in [0, 1); later cues are on top.
        size: Pixels per side of an image.
        correlation: Share of the images in which all cues have the value of the first, in [0, 1).

    Raises:
        ValueError: A setting is out of range, or the cues cover too much of an image.
    """

    cues: tuple[str, ...] = ("gratings", "shapes", "dots")
    values: int = 3
    cue_size: int | tuple[int, ...] = 10
    contrast: float = 0.9
    overlap: float = 0.0
    size: int = 32
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if unknown := [cue for cue in self.cues if cue not in FAMILIES]:
            raise ValueError(f"unknown cues {', '.join(unknown)}; choose from: {', '.join(FAMILIES)}")
        if not 1 <= len(self.cues) <= 8 or len(set(self.cues)) < len(self.cues):
            raise ValueError(f"cues: expected 1 to 8 different ones, got {self.cues}")
        if not 2 <= self.values <= 5:
            raise ValueError(f"values: expected 2 to 5 per cue, got {self.values}")
        if not 0 < self.contrast <= 1 or not 0 <= self.overlap < 1:
            raise ValueError(
                f"contrast, overlap: expected 0 < contrast <= 1 and 0 <= overlap < 1, got {self.contrast} and "
                f"{self.overlap}"
            )
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation: expected 0 <= correlation < 1, got {self.correlation}")
        share = sum(side**2 for side in self.sides) / self.size**2
        if min(self.sides) < 5 or len(self.sides) != len(self.cues) or share > MOST:
            raise ValueError(
                f"cue_size: expected 5 or more, one or {len(self.cues)} of them, and {len(self.cues)} cues that cover "
                f"at most {MOST:.0%} of an image of {self.size} pixels per side, got {self.cue_size} ({share:.0%})"
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Pixels per side of each cue."""
        return (self.cue_size,) * len(self.cues) if isinstance(self.cue_size, int) else self.cue_size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes: all combinations of values; the last cue varies fastest."""
        return tuple(map(", ".join, product(*(FAMILIES[cue].names[: self.values] for cue in self.cues))))

    def values_of(self, labels: Tensor) -> Tensor:
        """The value of each cue, int64 (n, cues), for the class indices ``labels`` (n,)."""
        places = self.values ** torch.arange(len(self.cues) - 1, -1, -1)
        return labels[:, None] // places % self.values

    def labels_of(self, values: Tensor) -> Tensor:
        """Class indices, int64 (n,), for the values of the cues (n, cues); the reverse of :meth:`values_of`."""
        return (values * self.values ** torch.arange(len(self.cues) - 1, -1, -1)).sum(1)

    @property
    def embeddings(self) -> Tensor:
        """Label embeddings float32 (classes, cues x values): the one-hot values of all cues side by side."""
        values = self.values_of(torch.arange(len(self.classes)))
        return torch.nn.functional.one_hot(values, self.values).flatten(1).float()

    def bits(self, cues: tuple[str, ...]) -> int:
        """The bits of these cues in a mask: ``masks & bits`` is not 0 where one of them is."""
        return sum(1 << self.cues.index(cue) for cue in cues)


def draw(scene: Scene, n: int, seed: int, turn: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images with equal shares of all classes, except for the correlation of the scene.

    Args:
        scene: How the images are drawn.
        n: Number of images.
        seed: Draws classes, places and backgrounds.
        turn: For each cue, by how many the value is moved on. The images are otherwise the same.

    Returns:
        Images, uint8 (n, 3, size, size), labels, int64 (n,) over ``scene.classes``, and masks, uint8 (n, size, size),
        in which bit i is set where cue i is.
    """
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.permutation(np.arange(n) % len(scene.classes)))
    values = scene.values_of(labels)
    alike = torch.from_numpy(rng.random(n) < scene.correlation)
    values = torch.where(alike[:, None], values[:, :1], values)
    labels = scene.labels_of((values + torch.tensor(turn or 0)) % scene.values)
    blocks = [_draw(scene, part.numpy(), rng) for part in scene.values_of(labels).split(BLOCK)]
    images, masks = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return torch.from_numpy(images), labels, torch.from_numpy(masks)


def read(folder: Path | None, split: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a split of the registered dataset, with the default :class:`Scene`.

    Args:
        folder: Not used.
        split: ``"train"`` or ``"test"``.
        seed: Draws the images; the splits of a seed differ.

    Returns:
        Images, labels and masks, as :func:`draw` returns.
    """
    return draw(Scene(), COUNTS[split], 2 * seed + list(COUNTS).index(split))


def _draw(scene: Scene, values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n, side = len(values), scene.size
    canvas = _background(n, side, rng)
    masks = np.zeros((n, side, side), dtype=np.uint8)
    image = np.arange(n)[:, None, None]
    for i, (name, cue, (top, left)) in enumerate(zip(scene.cues, scene.sides, _places(scene, n, rng), strict=True)):
        at = (np.arange(cue) + 0.5) / cue * 2 - 1
        v, u = np.meshgrid(at, at, indexing="ij")
        ink = FAMILIES[name].draw(u, v, values[:, i], scene.values, rng)[:, None]
        hue = values[:, i] / scene.values if name == "colours" else rng.random(n)
        tint = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] + np.arange(3) / 3))
        colour = 1.4 * tint - 0.7 if name == "colours" else 0.4 + 0.6 * tint
        rows, columns = top[:, None, None] + np.arange(cue)[:, None], left[:, None, None] + np.arange(cue)
        patch = 0.5 + 0.5 * scene.contrast * ink * colour[:, :, None, None]
        behind = canvas[image, :, rows, columns].transpose(0, 3, 1, 2)
        canvas[image, :, rows, columns] = (0.2 * behind + 0.8 * patch).transpose(0, 2, 3, 1)
        masks[image, rows, columns] |= np.uint8(1 << i)
    canvas += 0.02 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.rint(255 * np.clip(canvas, 0, 1)).astype(np.uint8), masks


def _places(scene: Scene, n: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Top and left (n,) of every cue, drawn again until no cue covers too much of another."""
    sides = np.array(scene.sides)[:, None]
    allowed = (scene.overlap * np.minimum(sides, sides.T)).astype(int)[:, :, None]
    found = np.zeros((2, len(scene.cues), n), dtype=int)
    wrong = np.arange(n)
    while len(wrong):
        low = found[:, :, wrong] = rng.integers(0, scene.size - sides + 1, (2, len(scene.cues), len(wrong)))
        high = low + sides
        shared = np.minimum(high[:, :, None], high[:, None]) - np.maximum(low[:, :, None], low[:, None])
        covered = (shared > allowed).all(0)  # (cues, cues, images)
        covered[np.arange(len(sides)), np.arange(len(sides))] = False
        wrong = wrong[covered.any((0, 1))]
    return list(zip(*found, strict=True))


def _background(n: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (n, 3, side, side) around 0.5, each image of one of BACKGROUNDS: 1/f^a in amplitude."""
    steepness = np.array([0.0, 2.0, 1.0])[rng.integers(0, len(BACKGROUNDS), n)]
    across, down = np.fft.rfftfreq(side), np.fft.fftfreq(side)
    frequency = np.maximum(np.hypot(across[None, :], down[:, None]), 1 / side)
    spectrum = np.fft.rfft2(rng.standard_normal((n, 3, side, side), dtype=np.float32))
    canvas = np.fft.irfft2(spectrum * frequency ** -steepness[:, None, None, None], s=(side, side))
    canvas -= canvas.mean((2, 3), keepdims=True)
    canvas /= canvas.std((1, 2, 3), keepdims=True)
    return (0.5 + 0.15 * canvas).astype(np.float32)
