"""Maps of several networks side by side, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kdx.pages.plots import MAPS, bare, colours, show_image

OUTLINES: dict[str, dict[str, Any]] = {  # kind of a box -> how it is drawn
    "": {"color": "white", "linewidth": 0.6},
    "gained": {"color": "#ffb000", "linewidth": 1.3},
    "lost": {"color": "#00e5ff", "linewidth": 1.3, "linestyle": (0, (2, 1))},
}


class Row(NamedTuple):
    """One row of :func:`side_by_side`.

    Attributes:
        caption: At its left.
        image: uint8 (3, h, w).
        maps: Network -> map (h, w) >= 0, or gradients in colour (3, h, w) with sign.
        boxes: (m, 4), drawn over the image; left, top, right, bottom.
        kinds: Of each box, from ``OUTLINES``; none for plain ones.
    """

    caption: str
    image: Tensor
    maps: dict[str, Tensor]
    boxes: Tensor = torch.zeros(0, 4)
    kinds: Sequence[str] = ()


def side_by_side(rows: Sequence[Row]) -> Figure:
    """An image and maps of several networks in each row, all maps of a row on one scale, which ends at the 99th
    percentile of all their values."""
    if not rows:
        raise ValueError("expected at least one row to draw, got none")
    names = list(rows[0].maps)
    height, width = rows[0].image.shape[1:]
    wide = 1.15 * width / height
    size = (wide * (len(names) + 1) + 1.2, 1.15 * len(rows) + 0.4)
    figure, grid = plt.subplots(len(rows), len(names) + 1, figsize=size, squeeze=False, layout="constrained")
    palette = colours(names)
    for axes, name in zip(grid[0], ["image", *names], strict=True):
        axes.set_title(name, fontsize=9, color=palette.get(name, "#222222"))
    for line, row in zip(grid, rows, strict=True):
        show_image(line[0], row.image)
        _outline(line[0], row.boxes, row.kinds or [""] * len(row.boxes))
        line[0].set_ylabel(row.caption, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
        values = torch.cat([of.abs().flatten() for of in row.maps.values()])
        top = float(values.double().quantile(0.99)) or 1.0
        for axes, of in zip(line[1:], row.maps.values(), strict=True):
            if of.ndim == 3:
                axes.imshow((of / (2 * top) + 0.5).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            else:
                axes.imshow(of, cmap=MAPS, vmin=0, vmax=top, interpolation="nearest")
        for axes in line:
            bare(axes)
    return figure


def _outline(axes: Axes, boxes: Tensor, kinds: Sequence[str]) -> None:
    for (left, top, right, bottom), kind in zip(boxes.tolist(), kinds, strict=True):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **OUTLINES[kind]))
