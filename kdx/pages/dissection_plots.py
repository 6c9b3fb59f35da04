"""Figures of network dissection: numbers of detectors, sweeps, units with their images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from kdx.measure.similarity import Plane
from kdx.pages.plots import INK, MAPS, bare, colours, show_image

OUTLINE = "#35e0d0"
ABOVE = "#ffd23f"  # where a unit is above its threshold


def detectors(table: pd.DataFrame, panels: Sequence[str], chance: Mapping[tuple[str, str], float]) -> Figure:
    """Detectors of each network as bars, one panel for each number.

    Args:
        table: network, panel, value (share of the units), low, high.
        panels: Values of ``panel``, in order.
        chance: (network, panel) -> the share that is expected by chance, drawn as a mark.
    """
    names = list(table["network"].unique())
    palette = colours(names)
    size = (1.5 + 1.75 * len(panels), 0.29 * len(names) + 1.0)
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        rows = table[table["panel"] == panel].set_index("network").reindex(names)
        spread = [(rows["value"] - rows["low"]).clip(lower=0), (rows["high"] - rows["value"]).clip(lower=0)]
        axes.barh(range(len(names)), rows["value"], color=[palette[name] for name in names], height=0.72)
        axes.errorbar(rows["value"], range(len(names)), xerr=spread, fmt="none", color=INK, lw=1)
        for i, name in enumerate(names):
            if not np.isnan(share := chance.get((name, panel), np.nan)):
                axes.plot([share] * 2, [i - 0.36, i + 0.36], color=INK, lw=1.6)
        axes.set(
            title=panel,
            yticks=range(len(names)),
            yticklabels=[textwrap.fill(name, 22) for name in names],
            ylim=(len(names) - 0.5, -0.5),
        )
        axes.set_xlim(0, 1.05 * max(rows["high"].max(), 0.04))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(plt.MaxNLocator(3, steps=[1, 2, 5, 10]))
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("share of the units of the stage", fontsize="medium")
    sns.despine(figure, left=True)
    return figure


def sweeps(tables: Mapping[str, pd.DataFrame], marks: Mapping[str, float]) -> Figure:
    """Detectors over settings, one panel for each, with intervals.

    Args:
        tables: Name of the setting -> network, x (its value), value (share of the units), low, high.
        marks: Name of the setting -> the value that the other figures have.
    """
    figure, grid = plt.subplots(1, len(tables), figsize=(8.8, 3.1), sharey=True, squeeze=False)
    for axes, (title, table) in zip(grid[0], tables.items(), strict=True):
        names = list(table["network"].unique())
        palette, settings = colours(names), sorted(table["x"].unique())
        axes.axvline(settings.index(marks[title]), color="#dddddd", lw=7, zorder=0)
        for i, name in enumerate(names):
            rows = table[table["network"] == name].sort_values("x")
            x = np.array([settings.index(v) for v in rows["x"]]) + 0.07 * (i - (len(names) - 1) / 2)
            spread = [(rows["value"] - rows["low"]).clip(lower=0), (rows["high"] - rows["value"]).clip(lower=0)]
            axes.errorbar(x, rows["value"], yerr=spread, marker="o", ms=4, lw=1, capsize=2, color=palette[name],
                          label=name)  # fmt: skip
        axes.set(xticks=range(len(settings)), xticklabels=[f"{v:g}" for v in settings], xlabel=title)
        axes.grid(axis="y", alpha=0.4)
    grid[0, 0].set(ylabel="detectors, share of the units", ylim=(0, None))
    grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    grid[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def against_accuracy(table: pd.DataFrame, reference: Sequence[str]) -> Figure:
    """Detectors over accuracy, a point for each network and fold, with the line of the reference networks.

    Args:
        table: network, accuracy, value (share of the units).
        reference: Networks through which the line is drawn; it is dashed beyond their accuracies.
    """
    figure, axes = plt.subplots(figsize=(6.6, 3.6))
    palette = colours(table["network"].unique())
    for name, rows in table.groupby("network", sort=False):
        kind = "o" if name in reference else "^"
        axes.scatter(rows["accuracy"], rows["value"], color=palette[str(name)], marker=kind, s=26, label=name)
    known = table[table["network"].isin(reference)]
    slope, start = np.polyfit(known["accuracy"], known["value"], 1)
    ends = (known["accuracy"].min(), known["accuracy"].max())
    whole = (table["accuracy"].min(), table["accuracy"].max())
    for x, style in ((whole, "--"), (ends, "-")):
        axes.plot(x, [start + slope * at for at in x], style, color=INK, lw=1.2, zorder=0)
    axes.set(xlabel="accuracy on test images", ylabel="detectors, share of the units")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def planes(found: Mapping[str, Plane], classes: Sequence[str]) -> Figure:
    """Features on the planes through three class templates (crosses), a panel and a scale for each network.

    Args:
        found: Text above the panel -> :func:`kdx.measure.similarity.class_plane`.
        classes: Names of the three.
    """
    figure, grid = plt.subplots(1, len(found), figsize=(2.3 * len(found), 2.7), squeeze=False)
    shades = sns.color_palette("deep", 3)
    for axes, (title, plane) in zip(grid[0], found.items(), strict=True):
        for i, name in enumerate(classes):
            points = plane.points[plane.labels == i].cpu()
            axes.scatter(*points.T, color=shades[i], s=5, alpha=0.5, lw=0)
            cross = {"marker": "X", "s": 60, "edgecolor": INK, "lw": 0.8, "label": name}
            axes.scatter(*plane.templates[i, :, None].cpu(), color=shades[i], **cross)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(title, fontsize=8)
        bare(axes)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def concept_maps(images: Tensor, masks: Tensor, maps: Mapping[str, Tensor], captions: Mapping[str, str]) -> Figure:
    """One unit of each network over the same images, with the outline of the concept.

    Args:
        images: uint8 (n, 3, h, w).
        masks: bool (n, H, W), where the concept is.
        maps: Network -> raw activations of its unit (n, i, j); each network has a scale of its own.
        captions: Network -> text below its column.
    """
    n, palette = len(images), colours(maps)
    figure, grid = plt.subplots(n, 1 + len(maps), figsize=(1.16 * (1 + len(maps)), 1.16 * n + 0.8), squeeze=False)
    whole = (-0.5, masks.shape[2] - 0.5, masks.shape[1] - 0.5, -0.5)
    for i, row in enumerate(grid):
        row[0].imshow(images[i].permute(1, 2, 0), interpolation="nearest", extent=whole)
        for axes, of in zip(row[1:], maps.values(), strict=True):
            top = float(of.max()) or 1.0
            axes.imshow(of[i], cmap=MAPS, vmin=0, vmax=top, interpolation="nearest", extent=whole)
        for axes in row:
            _outline(axes, masks[i], OUTLINE)
            bare(axes)
    grid[0, 0].set_title("image", fontsize=8)
    for axes, below, name in zip(grid[0, 1:], grid[-1, 1:], maps, strict=True):
        axes.set_title(textwrap.fill(name, 12), fontsize=8, color=palette[name])
        below.set_xlabel(captions[name], fontsize=7.5)
    return figure


def gallery(rows: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> Figure:
    """Units with the images that excite them most.

    Args:
        rows: For each unit a text, images uint8 (m, 3, h, w), where the unit is above its threshold, bool (m, H, W),
            and where the concept is, bool (m, H, W).
    """
    across = len(rows[0][1])
    figure, grid = plt.subplots(len(rows), across, figsize=(1.05 * across + 1.7, 1.05 * len(rows)), squeeze=False)
    for line, (text, images, above, masks) in zip(grid, rows, strict=True):
        for axes, image, high, mask in zip(line, images, above, masks, strict=True):
            show_image(axes, image)
            _outline(axes, mask, OUTLINE, image.shape[1:])
            _outline(axes, high, ABOVE, image.shape[1:], "dashed")
            bare(axes)
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    handles = [
        plt.Line2D([], [], color=OUTLINE, label="concept"),
        plt.Line2D([], [], color=ABOVE, ls="dashed", label="unit above its threshold"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _outline(axes: Axes, mask: Tensor, colour: str, size: Sequence[int] | None = None, style: str = "solid") -> None:
    """The edge of a mask (H, W), bool, over an image of ``size``; none where the mask is empty or full."""
    if mask.any() and not mask.all():
        height, width = size or mask.shape
        x = (np.arange(mask.shape[1]) + 0.5) * width / mask.shape[1] - 0.5
        y = (np.arange(mask.shape[0]) + 0.5) * height / mask.shape[0] - 0.5
        axes.contour(x, y, mask.numpy().astype(float), levels=[0.5], colors=colour, linewidths=1.4, linestyles=style)
