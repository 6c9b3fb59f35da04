"""Figures: samples, learning curves, grids of saliency maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from kdx.data import Dataset

ROLES = {"teacher": "#555555", "base": "#2b6ca3", "student": "#d1603d"}
MAPS = "magma"
INK = "#222222"


def use_style() -> None:
    """The book's look: 2x PNG, quiet axes, one font size for all figures."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    sns.set_theme("paper", "ticks", font_scale=1.05)
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": "medium", "text.color": INK})
    set_matplotlib_formats("retina")


def show_image(axes: Axes, image: Tensor) -> AxesImage:
    """Draw a uint8 image (3, h, w), every pixel a square."""
    return axes.imshow(image.permute(1, 2, 0), interpolation="nearest")


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    sns.despine(ax=axes, left=True, bottom=True)


def samples(dataset: Dataset, per_class: int = 3, seed: int = 0) -> Figure:
    """A column of random images per class; below each, its mask where the dataset has one."""
    masks = dataset.masks is not None
    step = 2 if masks else 1
    classes = len(dataset.classes)
    generator = torch.Generator().manual_seed(seed)
    figure, grid = plt.subplots(per_class * step, classes, figsize=(classes, per_class * step + 0.25), squeeze=False)
    for column, name in enumerate(dataset.classes):
        rows = (dataset.labels == column).nonzero()[:, 0]
        chosen = rows[torch.randperm(len(rows), generator=generator)[:per_class]]
        for i, row in enumerate(chosen):
            show_image(grid[i * step, column], dataset.images[row])
            if dataset.masks is not None:
                grid[i * step + 1, column].imshow(
                    dataset.masks[row], vmin=0, vmax=2, cmap="cividis", interpolation="nearest"
                )
        grid[0, column].set_title(name, fontsize=9)
    for axes in grid.flat:
        _bare(axes)
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
            palette=ROLES,
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
    figure, axes = plt.subplots(figsize=(3.6, 3))
    for _, row in accuracy.iterrows():
        axes.plot(range(len(row)), row, color="#bbbbbb", zorder=1)
    for i, network in enumerate(accuracy.columns):
        axes.scatter([i] * len(accuracy), accuracy[network], color=ROLES[network], zorder=2, s=36)
    axes.set(xticks=range(len(accuracy.columns)), xticklabels=accuracy.columns, ylabel="test accuracy")
    axes.set_xlim(-0.4, len(accuracy.columns) - 0.6)
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.grid(axis="y", alpha=0.4)
    sns.despine(figure)
    return figure


def map_grid(dataset: Dataset, maps: Mapping[str, Mapping[str, Tensor]], captions: Sequence[str]) -> Figure:
    """Images beside the raw maps of several networks, stage by stage.

    Parameters
    ----------
    dataset : the n images, one row each.
    maps : network -> stage -> raw map (n, h, w). A stage has one colour scale, shared by all
        networks and images, and one colour bar.
    captions : n lines of text left of the images.
    """
    networks, levels = list(maps), list(next(iter(maps.values())))
    n, columns = len(dataset), len(levels) * len(networks)
    figure = plt.figure(figsize=(1.45 + 1.02 * (1 + columns), 1.02 * n + 1.15))
    widths = [1.0] + ([0.12] + [1.0] * len(networks)) * len(levels)
    grid = figure.add_gridspec(n + 1, len(widths), width_ratios=widths, height_ratios=[1.0] * n + [0.1])
    for row, caption in enumerate(captions):
        axes = figure.add_subplot(grid[row, 0])
        show_image(axes, dataset.images[row])
        _bare(axes)
        axes.set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    for i, stage in enumerate(levels):
        top = max(float(maps[network][stage].max()) for network in networks)
        first = 2 + i * (len(networks) + 1)
        for j, network in enumerate(networks):
            for row in range(n):
                axes = figure.add_subplot(grid[row, first + j])
                drawn = axes.imshow(maps[network][stage][row], cmap=MAPS, vmin=0, vmax=top, interpolation="nearest")
                _bare(axes)
                if row == 0:
                    axes.set_title(f"{stage} {network}", fontsize=9, color=ROLES[network])
        bar = figure.colorbar(
            drawn, cax=figure.add_subplot(grid[n, first : first + len(networks)]), orientation="horizontal"
        )
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        bar.locator = plt.MaxNLocator(3)
        bar.update_ticks()
    return figure


def stage_bars(table: pd.DataFrame, value: str, hue: str, ylabel: str) -> Figure:
    """A bar per stage and hue: mean of the rows, with a 95 % bootstrap interval."""
    figure, axes = plt.subplots(figsize=(5.2, 3))
    sns.barplot(table, x="stage", y=value, hue=hue, ax=axes, errorbar=("ci", 95), seed=0, palette=_palette(table[hue]))
    axes.set(xlabel=None, ylabel=ylabel)
    axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)
    sns.despine(figure)
    return figure


def _palette(names: pd.Series) -> list[str]:
    other = iter(sns.color_palette("crest", 4).as_hex())
    return [ROLES.get(name) or next(other) for name in dict.fromkeys(names)]


def overview(image: Tensor, base: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Figure:
    """The project in one picture: who learns from whom, and where base and student then look.

    Parameters
    ----------
    image : uint8 (3, h, w).
    base, student : stage -> raw map (h, w) of that image.
    """
    levels = list(base)
    figure = plt.figure(figsize=(10.5, 4.3), layout="none")
    scheme = figure.add_axes((0.0, 0.0, 0.36, 1.0))
    scheme.set(xlim=(0, 10), ylim=(0, 10))
    scheme.axis("off")
    for role, x, y, text in (
        ("teacher", 3.9, 7.7, "Teacher"),
        ("student", 7.9, 7.7, "Student"),
        ("base", 7.9, 3.3, "Base"),
    ):
        box = FancyBboxPatch(
            (x - 1.35, y - 0.65), 2.7, 1.3, boxstyle="round,pad=0.1", facecolor=ROLES[role], edgecolor="none"
        )
        scheme.add_patch(box)
        scheme.text(x, y, text, color="white", ha="center", va="center", fontsize=12, weight="bold")
    scheme.text(0.9, 5.5, "images\nand labels", ha="center", va="center", fontsize=10)
    arrows = {
        ((1.0, 6.3), (2.3, 7.5)): ROLES["teacher"],
        ((1.9, 5.5), (7.3, 6.8)): ROLES["student"],
        ((1.0, 4.7), (6.3, 3.4)): ROLES["base"],
        ((5.5, 7.7), (6.3, 7.7)): ROLES["teacher"],
    }
    for (start, end), colour in arrows.items():
        scheme.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, lw=1.6))
    scheme.text(5.9, 9.0, "soft answers", ha="center", fontsize=10, color=ROLES["teacher"])
    scheme.text(7.9, 1.95, "same architecture,\nno teacher", ha="center", va="center", fontsize=9, color=ROLES["base"])

    grid = figure.add_gridspec(
        2, len(levels) + 2, left=0.385, right=0.985, top=0.86, bottom=0.07, wspace=0.08, hspace=0.08,
        width_ratios=[1.0, 0.05] + [1.0] * len(levels),
    )  # fmt: skip
    picture = figure.add_subplot(grid[:, 0])
    show_image(picture, image)
    picture.set_title("one image", fontsize=11)
    _bare(picture)
    for row, (role, maps) in enumerate((("student", student), ("base", base))):
        for column, stage in enumerate(levels):
            axes = figure.add_subplot(grid[row, column + 2])
            top = max(float(base[stage].max()), float(student[stage].max())) or 1.0
            axes.imshow(maps[stage], cmap=MAPS, vmin=0, vmax=top, interpolation="nearest")
            _bare(axes)
            if row == 0:
                axes.set_title(stage, fontsize=11)
            if column == 0:
                axes.set_ylabel(role, color=ROLES[role], fontsize=12, weight="bold")
    return figure
