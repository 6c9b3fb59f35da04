"""Figures that several pages share: samples, grids of saliency maps, scores with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from kdx.data.dataset import Dataset

ROLES = {"teacher": "#555555", "base": "#2b6ca3", "student": "#d1603d"}
ROLES |= {"response": ROLES["student"], "overhaul": "#7a4fa3", "attention": "#3b8f5c", "alp": "#b8862b"}
ROLES |= {"second base": "#8a8fb5", "reordered base": "#6fa3c7", "second student": "#e6a183"}
ROLES |= {"random teacher": "#b99b8b", "self-distilled": "#9aa35c", "untrained": "#bbbbbb"}
ROLES |= {"smoothing": "#4fa3b5", "rotated base": "#d3dbe6"}
ROLES |= {"scratch": ROLES["second base"], "edges": "#222222"}
ROLES |= {"distilled": ROLES["student"], "residual": ROLES["base"], "control": ROLES["second base"]}
ROLES |= {"direct": ROLES["student"], "assisted": ROLES["overhaul"]}
ROLES |= {"distant teacher": ROLES["teacher"], "assistant": "#8f8f8f"}
MAPS = "magma"
INK = "#222222"


def use_style(vector: bool = False) -> None:
    """Set the style of all figures: PNG at twice the resolution, plain axes, one font size; with ``vector``, also as
    SVG."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    sns.set_theme("paper", "ticks", font_scale=1.05)
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": "medium", "text.color": INK})
    plt.rcParams["text.parse_math"] = False  # a class may be called $5
    set_matplotlib_formats("retina", *(["svg"] if vector else []))
    plt.switch_backend(plt.get_backend())
    plt.uninstall_repl_displayhook()  # it draws each figure once more, before it is drawn for the page


def colours(names: Iterable[str]) -> dict[str, Any]:
    """A colour for each name: of its role, or else from a palette."""
    names = list(names)
    others = [name for name in names if name not in ROLES]
    return ROLES | dict(zip(others, sns.color_palette("crest", len(others)), strict=True))


def show_image(axes: Axes, image: Tensor) -> AxesImage:
    """Draw a uint8 image (3, h, w) with square pixels."""
    return axes.imshow(image.permute(1, 2, 0), interpolation="nearest")


def bare(axes: Axes) -> None:
    """Remove ticks and frame."""
    axes.set(xticks=[], yticks=[])
    sns.despine(ax=axes, left=True, bottom=True)


def samples(dataset: Dataset, per_class: int = 3, seed: int = 0) -> Figure:
    """Random images of each class under its name, with masks below them where the dataset has masks.

    Args:
        dataset: Images and labels.
        per_class: Rows of images per class. There are ten columns at most; with few classes each has several.
        seed: Draws the images.
    """
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
        bare(axes)
        axes.set_visible(axes.has_data())
    return figure


def overlays(dataset: Dataset, maps: Mapping[str, Mapping[str, Tensor]], captions: Sequence[str]) -> Figure:
    """Raw maps drawn over the images, with the outline of the object where there is a mask.

    Args:
        dataset: The n images, one per row.
        maps: Kind -> stage -> raw map (n, h, w), enlarged bilinearly to the image. Kinds share a scale at each stage,
            which ends at the 99th percentile; the smaller a value, the more transparent.
        captions: n lines of text left of the images.
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
            bare(axes)
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


def accuracy_pairs(accuracy: pd.DataFrame) -> Figure:
    """Test accuracy of the networks of each fold, joined by one line per fold. Index: fold."""
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

    Args:
        dataset: The n images, one per row.
        maps: Kind -> stage -> raw map (n, h, w).
        captions: n lines of text left of the images.
        scales: Groups of kinds that share a colour scale and bar at each stage, which ends at the 99th percentile of
            all their values; None puts all in one group.
        title: Above the figure.
    """
    if not len(dataset):
        raise ValueError("expected at least one image to draw, got none")
    scales = [list(maps)] if scales is None else scales
    palette = colours(maps)
    levels = list(next(iter(maps.values())))
    n, columns = len(dataset), len(levels) * len(maps)
    width = 1.45 + 1.02 * (1 + columns)
    size = min(max(9.0, width), 13.0)  # points; a page shrinks a wide figure and its letters
    figure = plt.figure(figsize=(width, 1.02 * n + 1.3 + (0.3 if title else 0)))
    figure.suptitle(title or "", fontsize=size + 2)
    groups = [(stage, list(kinds)) for stage in levels for kinds in scales]
    widths = [1.0]
    for _, kinds in groups:
        widths += [0.12] + [1.0] * len(kinds)
    grid = figure.add_gridspec(n + 1, len(widths), width_ratios=widths, height_ratios=[1.0] * n + [0.1])
    for row, caption in enumerate(captions):
        axes = figure.add_subplot(grid[row, 0])
        show_image(axes, dataset.images[row])
        bare(axes)
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
                bare(axes)
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
    """Pictures side by side, one row per caption: title -> images (n, 3, h, w) in [0, 1], or masks (n, h, w)."""
    n = len(captions)
    figure, grid = plt.subplots(n, len(columns), figsize=(1.25 * len(columns) + 1.2, 1.25 * n + 0.3), squeeze=False)
    for j, (title, pictures) in enumerate(columns.items()):
        for i in range(n):
            picture = pictures[i].permute(1, 2, 0).clamp(0, 1) if pictures.ndim == 4 else pictures[i]
            grid[i, j].imshow(picture, cmap="gray", interpolation="nearest")
            bare(grid[i, j])
        grid[0, j].set_title(title, fontsize=9)
    for i, caption in enumerate(captions):
        grid[i, 0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    return figure


def score_intervals(table: pd.DataFrame, hue: str, ylabel: str) -> Figure:
    """One score per stage and ``hue`` as a point with its interval. Columns: stage, value, low, high."""
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
    """Lines over a size on a binary logarithmic axis, with a marker at every measured size."""
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


def overview(image: Tensor, maps: Mapping[str, Mapping[str, Tensor]], answers: Mapping[str, str]) -> Figure:
    """The project in one picture: who learns from whom, and Grad-CAM maps of base and student.

    Args:
        image: uint8 (3, h, w).
        maps: "base" and "student" -> stage -> raw map (h, w) of that image.
        answers: "base" and "student" -> the class that each of them predicts.
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
    bare(picture)
    for row, role in enumerate(("student", "base")):
        for column, stage in enumerate(levels):
            axes = figure.add_subplot(grid[row, column + 2])
            top = max(float(maps[name][stage].max()) for name in maps) or 1.0
            axes.imshow(maps[role][stage], cmap=MAPS, vmin=0, vmax=top, interpolation="nearest")
            bare(axes)
            if row == 0:
                axes.set_title(stage, fontsize=12)
            if column == 0:
                axes.set_ylabel(f"{role}:\n{answers[role]}", color=ROLES[role], fontsize=11, weight="bold")
    return figure
