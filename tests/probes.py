"""Probes and networks with given activations, and a literal network dissection, that tests share."""

import math
from fractions import Fraction

import torch
from torch import nn

from kdx.data.broden import Probe

CATEGORIES = {"object": ("cat", "dog", "tree"), "part": ("head", "tail"), "colour": ("red",)}


class Given(nn.Module):
    """A network whose stages L1, L2, ... have given activations (n, k, h, w): an image names its row by its value."""

    def __init__(self, *tables):
        super().__init__()
        self.stages = nn.ModuleList(map(Row, tables))
        self.layers = {f"L{i + 1}": f"stages.{i}" for i in range(len(tables))}

    def forward(self, x):
        return torch.cat([stage(x).flatten(1) for stage in self.stages], 1)


class Row(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.as_tensor(table, dtype=torch.float32))

    def forward(self, x):
        return self.table[x[:, 0, 0, 0].long()]


def as_given(images):
    return images.float()


def make_probe(masks, categories, annotated=None, images=None):
    """A probe in memory.

    Args:
        masks: (n, layers, h, w), as those of a probe.
        categories: Category -> its concepts, numbered in order.
    """
    n, masks = len(masks), torch.as_tensor(masks)
    annotated = torch.ones(n, len(categories), dtype=torch.bool) if annotated is None else torch.as_tensor(annotated)
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2) if images is None else images
    category_of = torch.tensor([i for i, names in enumerate(categories.values()) for _ in names])
    names = tuple(name for of in categories.values() for name in of)
    return Probe("own", names, tuple(categories), category_of, annotated, images.__getitem__, masks.__getitem__)


def draw_probe(n=8, size=(8, 12), seed=0):
    """Masks of two layers of objects, one of parts and one of a colour that fills whole images."""
    g = torch.Generator().manual_seed(seed)
    objects = torch.randint(0, 4, (n, 2, 2, 3), generator=g).repeat_interleave(size[0] // 2, 2)
    objects = objects.repeat_interleave(size[1] // 3, 3)
    parts = torch.randint(3, 6, (n, 1, *size), generator=g)
    parts[parts == 3] = 0
    red = (6 * torch.randint(0, 2, (n, 1, 1, 1), generator=g)).expand(n, 1, *size)
    annotated = torch.rand(n, 3, generator=g) < 0.7
    annotated[:3] = True
    masks = torch.cat([objects * annotated[:, :1, None, None], parts * annotated[:, 1:2, None, None],
                       red * annotated[:, 2:, None, None]], 1)  # fmt: skip
    return make_probe(masks.short(), CATEGORIES, annotated)


def dissect_literally(table, probe, q, union="dataset", counts=None):
    """Thresholds (k,) and IoU (k, concepts) by loops over units, images and pixels, in float64 and sets.

    Args:
        table: (n, k, h, w) activations.
        counts: How often each image counts in the sums; None: once.
    """
    table = torch.as_tensor(table, dtype=torch.float64)
    n, units = table.shape[:2]
    masks = probe.read_masks(torch.arange(n))
    counts = [1] * n if counts is None else counts
    thresholds, found = [], []
    for k in range(units):
        pooled = sorted(table[:, k].flatten().tolist(), reverse=True)
        t = pooled[math.floor(q * len(pooled) + 1e-9)]
        thresholds.append(t)
        lit = [_lit(table[x, k].tolist(), masks.shape[2:], t) for x in range(n)]
        row = []
        for c, category in enumerate(probe.category_of.tolist()):
            both = either = 0
            for x in range(n):
                if not probe.annotated[x, category]:
                    continue
                concept = _carriers(masks[x], {c + 1})
                others = {i + 1 for i, kind in enumerate(probe.category_of.tolist()) if kind == category}
                unit = lit[x] if union == "dataset" or lit[x] & _carriers(masks[x], others) else set()
                both += counts[x] * len(lit[x] & concept)
                either += counts[x] * len(unit | concept)
            row.append(both / either if either else 0.0)
        found.append(row)
    return thresholds, found


def _carriers(layers, numbers):
    """Pixels of masks (layers, h, w) that carry one of the numbers in any layer."""
    return {
        (i, j)
        for layer in layers.tolist()
        for i, line in enumerate(layer)
        for j, value in enumerate(line)
        if value in numbers
    }


def _lit(a, shape, threshold):
    """Pixels above a threshold of a map, a list of rows, that is resized bilinearly with half-pixel centres."""
    lit = set()
    for i in range(shape[0]):
        y0, y1, fy = _between(i, shape[0], len(a))
        for j in range(shape[1]):
            x0, x1, fx = _between(j, shape[1], len(a[0]))
            upper = a[y0][x0] + (a[y0][x1] - a[y0][x0]) * fx
            lower = a[y1][x0] + (a[y1][x1] - a[y1][x0]) * fx
            if upper + (lower - upper) * fy > threshold:
                lit.add((i, j))
    return lit


def _between(pixel, fine, coarse):
    at = max(Fraction(2 * pixel + 1, 2) * Fraction(coarse, fine) - Fraction(1, 2), Fraction(0))
    low = min(math.floor(at), coarse - 1)
    return low, min(low + 1, coarse - 1), float(at - low)
