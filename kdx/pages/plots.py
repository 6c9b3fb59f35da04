"""Figures: samples, learning curves, grids of saliency maps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from kdx.data.dataset import Dataset

ROLES = {"teacher": "#555555", "base": "#2b6ca3", "student": "#d1603d"}
ROLES |= {"response": ROLES["student"], "overhaul": "#7a4fa3", "attention": "#3b8f5c", "alp": "#b8862b"}
ROLES |= {"second base": "#8a8fb5", "random teacher": "#b99b8b", "untrained": "#bbbbbb"}
ROLES |= {"distilled": ROLES["student"], "residual": ROLES["base"], "control": ROLES["second base"]}
ROLES |= {"direct": ROLES["student"], "assisted": ROLES["overhaul"]}
ROLES |= {"distant teacher": ROLES["teacher"], "assistant": "#8f8f8f"}
MAPS = "magma"
CUES = ("#1b9e77", "#e6ab02", "#4c8ed9", "#d95f9f", "#a6761d", "#66a61e", "#7570b3", "#666666")
INK = "#222222"


def use_style() -> None:
    """The book's look: 2x PNG, quiet axes, one font size for all figures."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    sns.set_theme("paper", "ticks", font_scale=1.05)
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": "medium", "text.color": INK})
    plt.rcParams["text.parse_math"] = False  # a class may be called $5
    set_matplotlib_formats("retina")


def colours(names: Iterable[str]) -> dict[str, Any]:
    """A colour for each name: that of its role, else one of a palette."""
    names = list(names)
    others = [name for name in names if name not in ROLES]
    return ROLES | dict(zip(others, sns.color_palette("crest", len(others)), strict=True))


def show_image(axes: Axes, image: Tensor) -> AxesImage:
    """Draw a uint8 image (3, h, w), every pixel a square."""
    return axes.imshow(image.permute(1, 2, 0), interpolation="nearest")


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    sns.despine(ax=axes, left=True, bottom=True)


def samples(dataset: Dataset, per_class: int = 3, seed: int = 0) -> Figure:
    """Random images of each class under its name, ten columns at most and ``per_class`` rows; below each
    image, its mask where the dataset has masks. Few classes get several columns each."""
    classes = len(dataset.classes)
    step = 2 if dataset.masked.any() else 1
    wide = max(1, 10 // classes)  # columns of a class
    across = min(10 // wide, classes)  # classes side by side
    names = [textwrap.fill(name, 12 * wide) for name in dataset.classes]
    above = 0.25 + 0.15 * max(name.count("\n") for name in names)  # inches
    blocks = -(-classes // across)
    size = (across * wide, blocks * (per_class * step + above))
    figure, grid = plt.subplots(blocks * per_class * step, across * wide, figsize=size, squeeze=False)
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(names):
        rows = (dataset.labels == label).nonzero()[:, 0]
        if len(with_mask := rows[dataset.masked[rows]]):
            rows = with_mask
        chosen = rows[torch.randperm(len(rows), generator=generator)[: per_class * wide]]
        top, left = label // across * per_class * step, label % across * wide
        for i, row in enumerate(chosen):
            y, x = top + i // wide * step, left + i % wide
            show_image(grid[y, x], dataset.images[row])
            if dataset.masks is not None and dataset.masked[row]:
                grid[y + 1, x].imshow(dataset.masks[row], vmin=0, vmax=2, cmap="cividis", interpolation="nearest")
        grid[top, left].set_title(name, fontsize=9)
    for axes in grid.flat:
        _bare(axes)
        axes.set_visible(axes.has_data())
    return figure


def overlays(dataset: Dataset, maps: Mapping[str, Mapping[str, Tensor]], captions: Sequence[str]) -> Figure:
    """Raw maps drawn over the images, with the outline of the object where there is a mask.

    Parameters
    ----------
    dataset : the n images, one row each.
    maps : kind -> stage -> raw map (n, h, w), spread bilinearly over the whole image. Kinds share a
        scale at each stage, which ends at the 99th percentile; the smaller a value, the clearer.
    captions : n lines of text left of the images.
    """
    levels = list(next(iter(maps.values())))
    tops = {s: float(torch.cat([maps[k][s].flatten() for k in maps]).double().quantile(0.99)) or 1.0 for s in levels}
    panels = {
        (kind, stage): F.interpolate(of[stage][:, None] / tops[stage], dataset.images.shape[2:], mode="bilinear")[:, 0]
        for kind, of in maps.items()
        for stage in levels
    }
    palette = colours(maps)
    shape = (len(dataset), 1 + len(panels))
    figure, grid = plt.subplots(*shape, figsize=(1.45 + 1.05 * shape[1], 1.05 * shape[0] + 0.5), squeeze=False)
    for i in range(shape[0]):
        for axes in grid[i]:
            show_image(axes, dataset.images[i])
            _bare(axes)
        grid[i, 0].set_ylabel(captions[i], rotation=0, ha="right", va="center", fontsize=11, labelpad=6)
        for axes, ((kind, stage), spread) in zip(grid[i, 1:], panels.items(), strict=True):
            strength = spread[i].clamp(0, 1)
            axes.imshow(strength, cmap="autumn_r", vmin=0, vmax=1, alpha=0.8 * strength.numpy())
            if dataset.masked[i]:
                assert dataset.masks is not None
                axes.contour(dataset.masks[i] > 0, levels=[0.5], colors="white", linewidths=0.8)
            if i == 0:
                axes.set_title(f"{stage}\n{kind}", fontsize=11, color=palette[kind])
    return figure


def learning_curves(history: pd.DataFrame) -> Figure:
    """Accuracy per epoch: mean over folds as a line, smallest to largest fold as a band.

    ``history`` is tidy: network, fold, epoch, split (train, validation), accuracy.
    """
    figure, grid = plt.subplots(1, 2, figsize=(7.5, 3), sharey=True)
    for axes, split in zip(grid, ("train", "validation"), strict=True):
        sns.lineplot(
            history[history["split"] == split],
            x="epoch",
            y="accuracy",
            hue="network",
            palette=colours(history["network"].unique()),
            errorbar=("pi", 100),
            marker="o",
            ax=axes,
            legend=split == "validation",
        )
        axes.set(title=f"{split} images", xlabel="epoch", ylabel="accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.grid(axis="y", alpha=0.4)
    grid[1].legend(title=None, frameon=False, loc="lower right")
    sns.despine(figure)
    return figure


def accuracy_pairs(accuracy: pd.DataFrame) -> Figure:
    """Test accuracy of each fold's networks, joined by a line per fold. Index: fold."""
    figure, axes = plt.subplots(figsize=(1.6 + len(accuracy.columns), 3))
    palette = colours(accuracy.columns)
    for _, row in accuracy.iterrows():
        axes.plot(range(len(row)), row, color="#bbbbbb", zorder=1)
    for i, network in enumerate(accuracy.columns):
        axes.scatter([i] * len(accuracy), accuracy[network], color=palette[network], zorder=2, s=36)
    axes.set(xticks=range(len(accuracy.columns)), xticklabels=accuracy.columns, ylabel="test accuracy")
    axes.set_xlim(-0.4, len(accuracy.columns) - 0.6)
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.grid(axis="y", alpha=0.4)
    sns.despine(figure)
    return figure


def map_grid(
    dataset: Dataset,
    maps: Mapping[str, Mapping[str, Tensor]],
    captions: Sequence[str],
    scales: Sequence[Sequence[str]] | None = None,
    title: str | None = None,
) -> Figure:
    """Images beside raw maps of several kinds (networks, directions), stage by stage.

    Parameters
    ----------
    dataset : the n images, one row each.
    maps : kind -> stage -> raw map (n, h, w).
    captions : n lines of text left of the images.
    scales : groups of kinds that share a colour scale and bar at each stage, which ends at the
        99th percentile of all their values; None: all of them.
    """
    if not len(dataset):
        raise ValueError("expected at least one image to draw, got none")
    scales = [list(maps)] if scales is None else scales
    palette = colours(maps)
    levels = list(next(iter(maps.values())))
    n, columns = len(dataset), len(levels) * len(maps)
    width = 1.45 + 1.02 * (1 + columns)
    size = min(max(9.0, width), 13.0)  # points; a page shrinks a wide figure and its letters
    figure = plt.figure(figsize=(width, 1.02 * n + 1.3 + 0.3 * bool(title)))
    figure.suptitle(title or "", fontsize=size + 2)
    groups = [(stage, list(kinds)) for stage in levels for kinds in scales]
    widths = [1.0]
    for _, kinds in groups:
        widths += [0.12] + [1.0] * len(kinds)
    grid = figure.add_gridspec(n + 1, len(widths), width_ratios=widths, height_ratios=[1.0] * n + [0.1])
    for row, caption in enumerate(captions):
        axes = figure.add_subplot(grid[row, 0])
        show_image(axes, dataset.images[row])
        _bare(axes)
        fits = min(size, 58 / len(caption.splitlines()))
        axes.set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=fits, labelpad=6)
    first = 2
    for stage, kinds in groups:
        drawn_values = torch.cat([maps[kind][stage].flatten() for kind in kinds])
        top = float(drawn_values.double().quantile(0.99)) or 1.0
        for j, kind in enumerate(kinds):
            for row in range(n):
                axes = figure.add_subplot(grid[row, first + j])
                drawn = axes.imshow(maps[kind][stage][row], cmap=MAPS, vmin=0, vmax=top, interpolation="nearest")
                _bare(axes)
                if row == 0:
                    above = stage if j == 0 else ""
                    axes.set_title(f"{above}\n{kind}", fontsize=size, color=palette[kind])
        bar = figure.colorbar(
            drawn, cax=figure.add_subplot(grid[n, first : first + len(kinds)]), orientation="horizontal", extend="max"
        )
        bar.ax.tick_params(labelsize=size - 1)
        bar.outline.set_visible(False)
        bar.ax.ticklabel_format(axis="x", scilimits=(-2, 3))
        bar.ax.xaxis.get_offset_text().set_fontsize(size - 1)
        bar.locator = plt.MaxNLocator(3)
        bar.update_ticks()
        first += len(kinds) + 1
    return figure


def picture_grid(columns: Mapping[str, Tensor], captions: Sequence[str]) -> Figure:
    """Pictures side by side: title -> images (n, 3, h, w) in [0, 1] or masks (n, h, w); a row each."""
    n = len(captions)
    figure, grid = plt.subplots(n, len(columns), figsize=(1.25 * len(columns) + 1.2, 1.25 * n + 0.3), squeeze=False)
    for j, (title, pictures) in enumerate(columns.items()):
        for i in range(n):
            picture = pictures[i].permute(1, 2, 0).clamp(0, 1) if pictures.ndim == 4 else pictures[i]
            grid[i, j].imshow(picture, cmap="gray", interpolation="nearest")
            _bare(grid[i, j])
        grid[0, j].set_title(title, fontsize=9)
    for i, caption in enumerate(captions):
        grid[i, 0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    return figure


def matrices(panels: Mapping[str, Tensor], borders: Sequence[float] = ()) -> Figure:
    """Centred distance matrices (n, n) side by side, each on a symmetric scale of its own, with
    white lines at the ``borders`` between classes."""
    figure, grid = plt.subplots(1, len(panels), figsize=(2.35 * len(panels), 2.75), squeeze=False)
    for axes, (title, matrix) in zip(grid[0], panels.items(), strict=True):
        top = float(matrix.abs().double().quantile(0.99)) or 1.0
        drawn = axes.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        for border in borders:
            axes.axhline(border, color="white", lw=0.6)
            axes.axvline(border, color="white", lw=0.6)
        _bare(axes)
        axes.set_title(title, fontsize=9)
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03, extend="both")
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        bar.ax.ticklabel_format(axis="x", scilimits=(-2, 3))
        bar.locator = plt.MaxNLocator(3)
        bar.update_ticks()
    return figure


def score_intervals(table: pd.DataFrame, hue: str, ylabel: str) -> Figure:
    """A score per stage and ``hue`` as a point with its interval. Columns: stage, value, low, high."""
    figure, axes = plt.subplots(figsize=(6.2, 3))
    levels, names = list(table["stage"].unique()), list(table[hue].unique())
    palette = colours(names)
    step = min(0.14, 0.75 / len(names))
    for i, name in enumerate(names):
        rows = table[table[hue] == name].set_index("stage").loc[levels]
        x = [j + step * (i - (len(names) - 1) / 2) for j in range(len(levels))]
        axes.errorbar(
            x,
            rows["value"],
            yerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
            fmt="o",
            ms=5,
            capsize=2.5,
            color=palette[name],
            label=name,
        )
    axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    axes.set(xticks=range(len(levels)), xticklabels=levels, ylabel=ylabel)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def growth(table: pd.DataFrame, x: str, y: str, hue: str, style: str | None, labels: tuple[str, str]) -> Figure:
    """Lines over a size on a binary logarithmic axis, with a marker at every size that was run."""
    figure, axes = plt.subplots(figsize=(6.2, 3))
    names = list(table[hue].unique())
    palette = sns.color_palette("crest", len(names))
    sns.lineplot(
        table, x=x, y=y, hue=hue, hue_order=names, style=style, palette=palette, markers=True, errorbar=None, ax=axes
    )
    sizes = sorted(table[x].unique())
    axes.set_xscale("log", base=2)
    axes.set(xticks=sizes, xticklabels=sizes, xlabel=labels[0], ylabel=labels[1])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    sns.despine(figure)
    return figure


def capacity_sweep(table: pd.DataFrame, floor: pd.DataFrame, xlabel: str) -> Figure:
    """Measures of a fixed student over its teacher's size: a panel a measure, a line a way of teaching.

    Parameters
    ----------
    table : measure, way, size, value, low, high.
    floor : index measure; name and value of what the student has without a teacher, a dashed line.
    """
    measures = list(table["measure"].unique())
    figure, grid = plt.subplots(1, len(measures), figsize=(2.25 * len(measures), 2.9), squeeze=False)
    palette = colours(table["way"].unique())
    sizes = sorted(table["size"].unique())
    for axes, measure in zip(grid[0], measures, strict=True):
        for j, (way, rows) in enumerate(table[table["measure"] == measure].groupby("way", sort=False)):
            rows = rows.sort_values("size")
            axes.errorbar(
                rows["size"] * 1.04**j,  # beside each other where both are drawn
                rows["value"],
                yerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
                fmt="o-",
                ms=4,
                lw=1.2,
                capsize=2.5,
                color=palette[way],
                label=way,
            )
        name = floor.loc[measure, "name"]
        axes.axhline(floor.loc[measure, "value"], color=colours([name])[name], lw=1.2, ls="--", label=name)
        axes.set_xscale("log", base=2)
        axes.set(title=measure, xticks=sizes, xticklabels=[f"{size:.1f}" for size in sizes])
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.4)
        if measure == "accuracy":
            axes.yaxis.set_major_formatter("{x:.1%}")
    figure.supxlabel(xlabel, fontsize="medium")
    handles = {label: h for axes in grid[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, frameon=False, loc="outside upper center", ncols=len(handles))
    sns.despine(figure)
    return figure


def stage_bars(table: pd.DataFrame, value: str, hue: str, ylabel: str) -> Figure:
    """A bar per stage and hue: mean of the rows, with a 95 % bootstrap interval."""
    figure, axes = plt.subplots(figsize=(5.2, 3))
    names = list(table[hue].unique())
    sns.barplot(
        table,
        x="stage",
        y=value,
        hue=hue,
        hue_order=names,
        palette=colours(names),
        errorbar=("ci", 95),
        seed=0,
        ax=axes,
    )
    axes.set(xlabel=None, ylabel=ylabel)
    axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)
    sns.despine(figure)
    return figure


def overview(image: Tensor, maps: Mapping[str, Mapping[str, Tensor]], answers: Mapping[str, str]) -> Figure:
    """The project in one picture: who learns from whom, and where base and student then look.

    Parameters
    ----------
    image : uint8 (3, h, w).
    maps : "base" and "student" -> stage -> raw map (h, w) of that image.
    answers : "base" and "student" -> the class that each of them gave.
    """
    figure = plt.figure(figsize=(11, 2.95), layout="none")
    scheme = figure.add_axes((0.0, 0.0, 0.33, 1.0))
    scheme.set(xlim=(0, 10), ylim=(0, 10))
    scheme.axis("off")
    scheme.text(1.0, 5.0, "images\nand labels", ha="center", va="center", fontsize=11)
    for role, x, y in (("teacher", 4.6, 8.0), ("student", 8.4, 5.6), ("base", 8.4, 1.9)):
        corner = (x - 1.3, y - 0.7)
        scheme.add_patch(
            FancyBboxPatch(corner, 2.6, 1.4, boxstyle="round,pad=0.1", facecolor=ROLES[role], edgecolor="none")
        )
        scheme.text(x, y, role, color="white", ha="center", va="center", fontsize=13, weight="bold")
    for start, end, role in (
        ((1.6, 6.1), (3.2, 7.5), "teacher"),
        ((5.5, 7.1), (7.0, 6.2), "teacher"),
        ((2.3, 5.2), (6.9, 5.5), "student"),
        ((2.0, 4.1), (6.9, 2.2), "base"),
    ):
        scheme.add_patch(
            FancyArrowPatch(
                start, end, shrinkA=0, shrinkB=0, arrowstyle="-|>", mutation_scale=16, color=ROLES[role], lw=1.8
            )
        )
    scheme.text(7.0, 7.3, "soft answers", fontsize=11, color=ROLES["teacher"])

    levels = list(maps["base"])
    grid = figure.add_gridspec(
        2, 2 + len(levels), left=0.345, right=0.995, top=0.89, bottom=0.02, wspace=0.06, hspace=0.06,
        width_ratios=[2.0, 0.3] + [1.0] * len(levels),
    )  # fmt: skip
    picture = figure.add_subplot(grid[:, 0])
    show_image(picture, image)
    picture.set_title("one test image", fontsize=12)
    _bare(picture)
    for row, role in enumerate(("student", "base")):
        for column, stage in enumerate(levels):
            axes = figure.add_subplot(grid[row, column + 2])
            top = max(float(maps[name][stage].max()) for name in maps) or 1.0
            axes.imshow(maps[role][stage], cmap=MAPS, vmin=0, vmax=top, interpolation="nearest")
            _bare(axes)
            if row == 0:
                axes.set_title(stage, fontsize=12)
            if column == 0:
                axes.set_ylabel(f"{role}:\n{answers[role]}", color=ROLES[role], fontsize=11, weight="bold")
    return figure


def cues(dataset: Dataset, names: Sequence[str], per_row: int = 8) -> Figure:
    """Images of :mod:`kdx.data.cues` with the outline of every cue in a colour of its own."""
    assert dataset.masks is not None
    rows = -(-len(dataset) // per_row)
    figure, grid = plt.subplots(rows, per_row, figsize=(1.35 * per_row, 1.35 * rows + 0.35), squeeze=False)
    for axes in grid.flat:
        _bare(axes)
    for axes, image, mask in zip(grid.flat, dataset.images, dataset.masks, strict=False):
        show_image(axes, image)
        _outline(axes, mask, range(len(names)))
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in zip(names, CUES, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def cue_maps(dataset: Dataset, maps: Mapping[str, Tensor], wanted: Sequence[int]) -> Figure:
    """Images of :mod:`kdx.data.cues` beside raw maps (n, h, w) of several explainers, each map on a scale of its
    own, with the outlines of the cues ``wanted``, which the maps should show; those of the others are thin."""
    assert dataset.masks is not None
    across = min(8, 1 + len(maps))
    names = ["image", *maps]
    bands = -(-len(names) // across)
    n = len(dataset)
    figure, grid = plt.subplots(bands * n, across, figsize=(1.35 * across, 1.35 * bands * n + 0.5 * bands))
    for axes in grid.flat:
        _bare(axes)
    others = [cue for cue in range(len(CUES)) if cue not in wanted]
    for j, name in enumerate(names):
        for i in range(n):
            axes = grid[j // across * n + i, j % across]
            if name == "image":
                show_image(axes, dataset.images[i])
            else:
                side = dataset.images.shape[-1] - 0.5
                whole = (-0.5, side, side, -0.5)
                axes.imshow(maps[name][i], cmap=MAPS, vmin=0, interpolation="nearest", extent=whole)
            _outline(axes, dataset.masks[i], wanted)
            _outline(axes, dataset.masks[i], others, width=0.5)
            if i == 0:
                axes.set_title(textwrap.fill(name, 16), fontsize=9)
    return figure


def _outline(axes: Axes, mask: Tensor, wanted: Iterable[int], width: float = 1.6) -> None:
    for cue in wanted:
        if (inside := (mask >> cue) & 1).any():
            rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            corner = (int(columns[0]) - 0.5, int(rows[0]) - 0.5)
            sides = (int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1)
            axes.add_patch(Rectangle(corner, *sides, fill=False, ec=CUES[cue], lw=width))


def contest(table: pd.DataFrame, xlabel: str, logarithmic: bool = False, line: float | None = None) -> Figure:
    """One score of many explainers: a row each, a column a stage, a colour a direction (or ``kind``).

    Columns: explainer, stage, direction, value, low, high. ``line`` marks what to compare with.
    """
    levels, names = list(table["stage"].unique()), list(table["explainer"].unique())
    figure, grid = plt.subplots(1, len(levels), figsize=(9.2, 0.26 * len(names) + 1), sharex=True, sharey=True)
    palette = colours(table["direction"].unique())
    for axes, stage in zip(np.atleast_1d(grid), levels, strict=True):
        for i, (direction, rows) in enumerate(table[table["stage"] == stage].groupby("direction", sort=False)):
            rows = rows.set_index("explainer").reindex(names)
            y = [j + 0.22 * (i - 0.5 * (table["direction"].nunique() - 1)) for j in range(len(names))]
            spread = [(rows["value"] - rows["low"]).fillna(0), (rows["high"] - rows["value"]).fillna(0)]
            axes.errorbar(rows["value"], y, xerr=spread, fmt="o", ms=4, capsize=2, color=palette[direction])
        if line is not None:
            axes.axvline(line, color="#999999", lw=0.8, zorder=0)
        axes.set(title=stage, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", alpha=0.3)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(max(0.02, table["value"].min() / 1.5), min(150, table["value"].max() * 1.5))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
    handles = [plt.Line2D([], [], color=palette[d], marker="o", label=d) for d in table["direction"].unique()]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.supxlabel(xlabel, fontsize="medium")
    sns.despine(figure)
    return figure


def cascades(table: pd.DataFrame) -> Figure:
    """Similarity of maps over how much of a network is random, a panel an explainer: the table of
    :func:`kdx.planted.sanity.sanity`, with a line a measure and the mean over stages; bars: from the least to the most
    similar stage."""
    names = list(table["explainer"].unique())
    depths = list(table["randomised"].unique())
    across = 4
    figure, grid = plt.subplots(
        -(-len(names) // across), across, figsize=(9.2, 1.75 * -(-len(names) // across) + 0.4), sharex=True, sharey=True
    )
    palette = dict(zip(table["measure"].unique(), (ROLES["student"], ROLES["base"]), strict=True))
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        for measure, rows in table[table["explainer"] == name].groupby("measure", sort=False):
            by_depth = rows.groupby("randomised", sort=False)["value"].agg(["mean", "min", "max"]).loc[depths]
            spread = [by_depth["mean"] - by_depth["min"], by_depth["max"] - by_depth["mean"]]
            axes.errorbar(
                range(len(depths)), by_depth["mean"], yerr=spread, fmt="o-", ms=3, lw=1, color=palette[measure]
            )
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(depths)), depths, rotation=60, ha="right", rotation_mode="anchor")
        axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in palette.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    figure.supylabel("similarity with the right map", fontsize="medium")
    sns.despine(figure)
    return figure
