"""Figures of yardsticks of interpretability: radars, maps beside their truth, gradients of the loss, unmasking."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.explain.input_gradients import clipped
from kdx.pages.plots import INK, MAPS, bare, colours, show_image


def radars(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Scores of several networks as polygons, one panel for each region.

    Args:
        tables: Title -> scores in [0, 1], one row for each network and a column for each score.
    """
    figure, grid = plt.subplots(
        1, len(tables), figsize=(4.6 * len(tables), 4.3), subplot_kw={"projection": "polar"}, squeeze=False
    )
    names = list(next(iter(tables.values())).index)
    palette = colours(names)
    for axes, (title, table) in zip(grid[0], tables.items(), strict=True):
        angles = np.linspace(0, 2 * np.pi, len(table.columns), endpoint=False)
        for name in names:
            values = table.loc[name].to_numpy(dtype=float)
            axes.plot(np.append(angles, angles[0]), np.append(values, values[0]), color=palette[name], label=name)
        axes.set_xticks(angles, [textwrap.fill(c, 11) for c in table.columns], fontsize=8)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75], ["", "0.5", ""], fontsize=7)
        axes.set_title(title, pad=16)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    return figure


def truth_and_maps(dataset: Dataset, maps: Mapping[str, Tensor]) -> Figure:
    """Images, their masks, and the maps of several networks, each map on a scale of its own.

    Args:
        dataset: The n images with masks.
        maps: Network -> raw maps (n, h, w) >= 0.
    """
    if dataset.masks is None or not len(dataset):
        raise ValueError("dataset: expected at least one image, with masks")
    figure, grid = _grid(len(dataset), ["image", "truth", *maps])
    for i, (row, mask) in enumerate(zip(grid, dataset.masks, strict=True)):
        show_image(row[0], dataset.images[i])
        row[1].imshow(mask, vmin=0, vmax=2, cmap="cividis", interpolation="nearest")
        for axes, of in zip(row[2:], maps.values(), strict=True):
            axes.imshow(of[i], cmap=MAPS, vmin=0, interpolation="nearest")
        row[0].set_ylabel(_name(dataset, i), rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    return figure


def loss_gradients(dataset: Dataset, gradients: Mapping[str, Tensor]) -> Figure:
    """Images beside gradients of the loss with their sign, clipped to three standard deviations of each image.

    Args:
        dataset: The n images.
        gradients: Network -> gradients (n, c, h, w). Those of grey images, whose channels are equal, are summed.
    """
    figure, grid = _grid(len(dataset), ["image", *gradients])
    grey = bool((dataset.images == dataset.images[:, :1]).all())
    drawn = {name: clipped(of.sum(1, keepdim=True) if grey else of) for name, of in gradients.items()}
    for i, row in enumerate(grid):
        show_image(row[0], dataset.images[i])
        for axes, of in zip(row[1:], drawn.values(), strict=True):
            axes.imshow(of[i].permute(1, 2, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        row[0].set_ylabel(_name(dataset, i), rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    return figure


def unmasking(table: pd.DataFrame, ends: Mapping[str, str]) -> Figure:
    """Accuracy of new networks over the share of elements that images lack, a panel for each data set and network.

    Lines are means over seeds; bars go from the least to the largest.

    Args:
        table: data, network, fraction, and a column of accuracies for each of ``ends``, one row for each seed.
        ends: Column -> line style.
    """
    names, sets = list(table["network"].unique()), list(table["data"].unique())
    size = 1.65 * len(names) + 1.6, 1.9 * len(sets) + 0.3
    figure, grid = plt.subplots(len(sets), len(names), figsize=size, squeeze=False, sharex=True, sharey="row")
    for axes, (data, name) in zip(grid.flat, itertools.product(sets, names), strict=True):
        rows = table[(table["data"] == data) & (table["network"] == name)]
        for column, style in ends.items():
            of = rows.groupby("fraction")[column]
            axes.plot(of.mean().index, of.mean(), style, marker="o", ms=3, lw=1.2, color=INK)
            axes.vlines(of.min().index, of.min(), of.max(), color=INK, lw=0.8)
        axes.set(xlim=(0, 1), title=name if axes in grid[0] else "")
        axes.grid(axis="y", alpha=0.4)
    for data, axes in zip(sets, grid[:, 0], strict=True):
        axes.set_ylabel(f"{data}\naccuracy")
    figure.supxlabel("share of the elements removed", size="medium")
    handles = [plt.Line2D([], [], color=INK, ls=style, label=f"{column} removed") for column, style in ends.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    sns.despine(figure)
    return figure


def correlations(table: pd.DataFrame, groups: Sequence[str]) -> Figure:
    """Rank correlations with the truth as points with intervals, one row for each yardstick.

    Args:
        table: yardstick, group, value, low, high.
        groups: Values of ``group``, a colour each.
    """
    names = list(table["yardstick"].unique())
    figure, axes = plt.subplots(figsize=(7.6, 0.27 * len(names) + 1.1))
    palette = dict(zip(groups, sns.color_palette("deep", len(groups)), strict=True))
    for i, group in enumerate(groups):
        rows = table[table["group"] == group].set_index("yardstick").reindex(names)
        y = np.arange(len(names)) + 0.24 * (i - (len(groups) - 1) / 2)
        spread = [(rows["value"] - rows["low"]).clip(lower=0), (rows["high"] - rows["value"]).clip(lower=0)]
        axes.errorbar(rows["value"], y, xerr=spread, fmt="o", ms=4, capsize=2, color=palette[group], label=group)
    axes.axvline(0, color="#999999", lw=0.8, zorder=0)
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(-1.05, 1.05), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("rank correlation with what the networks are known to use")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def agreements(table: pd.DataFrame) -> Figure:
    """Rank correlations between yardsticks, a square table of values in [-1, 1], as a coloured grid."""
    side = 0.42 * len(table) + 1.9
    figure, axes = plt.subplots(figsize=(side + 1.0, side))
    sns.heatmap(
        table, ax=axes, cmap="RdBu_r", vmin=-1, vmax=1, annot=True, fmt=".1f", annot_kws={"fontsize": 7}, linewidths=1,
        cbar=False,
    )  # fmt: skip
    axes.set_xticks(axes.get_xticks(), table.columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(axes.get_yticks(), table.index, rotation=0, fontsize=8)
    axes.set(xlabel="", ylabel="")
    axes.tick_params(length=0)
    return figure


def _grid(rows: int, titles: Sequence[str]) -> tuple[Figure, np.ndarray]:
    size = (1.2 * len(titles) + 1.0, 1.2 * rows + 0.4)
    figure, grid = plt.subplots(rows, len(titles), figsize=size, squeeze=False)
    palette = colours(titles)
    for axes in grid.flat:
        bare(axes)
    for axes, title in zip(grid[0], titles, strict=True):
        colour = INK if title in ("image", "truth") else palette[title]
        axes.set_title(textwrap.fill(title, 13), fontsize=9, color=colour)
    return figure, grid


def _name(dataset: Dataset, row: int) -> str:
    return textwrap.fill(dataset.classes[int(dataset.labels[row])], 14)
