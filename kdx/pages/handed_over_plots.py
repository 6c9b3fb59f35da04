"""Figures of what was handed over: parts of a student, techniques beside each other, doses, and who taught whom."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from kdx.data.dataset import Dataset
from kdx.pages.plots import INK, MAPS, ROLES, bare, colours, show_image

PARTS = {"base": ROLES["base"], "handed over": ROLES["student"], "own": "#cfcfcf"}


def parts(table: pd.DataFrame) -> Figure:
    """Stacked bars of what a network shares with its base, has from the teacher beyond that, and has of its own.

    Args:
        table: network, stage, part (those of ``PARTS``), value, low, high. The interval of the part *handed over* is
            drawn at its end.
    """
    levels, names = list(table["stage"].unique()), list(table["network"].unique())
    figure, grid = plt.subplots(1, len(levels), figsize=(9.2, 0.3 * len(names) + 1.1), sharex=True, sharey=True)
    for axes, stage in zip(np.atleast_1d(grid), levels, strict=True):
        of = table[table["stage"] == stage].set_index(["part", "network"])
        left = np.zeros(len(names))
        for part, colour in PARTS.items():
            rows = of.loc[part].reindex(names)
            axes.barh(range(len(names)), rows["value"], left=left, color=colour, height=0.72)
            if part == "handed over":
                spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
                axes.errorbar(left + rows["value"], range(len(names)), xerr=spread, fmt="none", color=INK, lw=1)
            left = left + rows["value"].to_numpy()
        axes.set(title=stage, yticks=range(len(names)), yticklabels=names, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=part) for part, colour in PARTS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.supxlabel("share of the variance", fontsize="medium")
    sns.despine(figure, left=True)
    return figure


def maps(dataset: Dataset, columns: Mapping[str, Tensor], names: Sequence[str], answers: Sequence[str]) -> Figure:
    """Images beside raw maps. The first map has a scale of its own in each row; the others share one.

    Args:
        dataset: The n images.
        columns: Heading -> raw map (n, h, w).
        names: n classes.
        answers: n texts, what the networks say.
    """
    n = len(dataset)
    figure, grid = plt.subplots(n, 1 + len(columns), figsize=(1.9 * (1 + len(columns)), 2.0 * n + 0.3), squeeze=False)
    first, *others = columns.values()
    for i, row in enumerate(grid):
        show_image(row[0], dataset.images[i])
        row[0].set_ylabel(textwrap.fill(names[i], 14), fontsize=10)
        row[0].set_xlabel(textwrap.fill(answers[i], 34), fontsize=8)
        shared = float(torch.stack([m[i].amax() for m in others]).amax())
        for axes, of, top in zip(
            row[1:], columns.values(), [float(first[i].amax()), *[shared] * len(others)], strict=True
        ):
            axes.imshow(of[i], cmap=MAPS, vmin=0, vmax=top or 1.0, interpolation="nearest")
        for axes in row:
            bare(axes)
    for axes, title in zip(grid[0], ["image", *columns], strict=True):
        axes.set_title(title, fontsize=10)
    return figure


def who_taught(table: pd.DataFrame, students: Sequence[str]) -> Figure:
    """Shares of the unexplained answers of students (rows) that candidates (columns) explain; the teacher is framed.

    Args:
        table: student, candidate, value, taught (whether the candidate is the student's teacher). The columns of the
            figure are in the order of the table.
        students: Names in order; those without a row are left out.
    """
    values = table.pivot(index="student", columns="candidate", values="value")
    values = values.loc[[name for name in students if name in values.index], table["candidate"].unique()]
    taught = table.pivot(index="student", columns="candidate", values="taught").loc[values.index, values.columns]
    size = (0.72 * values.shape[1] + 3.2, 0.34 * len(values) + 1.6)
    figure, axes = plt.subplots(figsize=size)
    sns.heatmap(
        values, ax=axes, cmap="Blues", vmin=0, annot=True, fmt=".2f", annot_kws={"fontsize": 8}, linewidths=1,
        cbar=False,
    )  # fmt: skip
    for i, j in np.argwhere(taught.fillna(False).to_numpy(dtype=bool)):
        axes.add_patch(plt.Rectangle((j, i), 1, 1, fill=False, ec=ROLES["student"], lw=2.2, clip_on=False))
    axes.set(xlabel="candidate", ylabel="student")
    axes.set_xticks(axes.get_xticks(), values.columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    return figure


def by_technique(table: pd.DataFrame, kinds: Mapping[str, str], label: str) -> Figure:
    """Differences from a control as points with intervals: a panel for each stage, a row for each network.

    Args:
        table: network, stage, value, low, high, folds. Points of one fold are hollow.
        kinds: Network -> kind, which has a colour; also the order of the rows.
        label: Of the axis of differences.
    """
    levels, names = list(table["stage"].unique()), list(kinds)
    figure, grid = plt.subplots(1, len(levels), figsize=(9.2, 0.27 * len(names) + 1.3), sharex=True, sharey=True)
    palette = dict(zip(dict.fromkeys(kinds.values()), sns.color_palette("deep"), strict=False))
    for axes, stage in zip(np.atleast_1d(grid), levels, strict=True):
        for _, row in table[table["stage"] == stage].iterrows():
            y, colour = names.index(row["network"]), palette[kinds[row["network"]]]
            axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=1.4)
            axes.plot(row["value"], y, "o", ms=4.5, color=colour, mfc=colour if row["folds"] > 1 else "white")
        axes.axvline(0, color="#999999", lw=0.8, zorder=0)
        axes.set(title=stage, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", alpha=0.3)
    figure.supxlabel(label, size="medium")
    handles = [plt.Line2D([], [], color=colour, marker="o", ms=4.5, label=kind) for kind, colour in palette.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    sns.despine(figure)
    return figure


def doses(table: pd.DataFrame) -> Figure:
    """What students took by their behaviour, and what is estimated from their answers, with intervals.

    Args:
        table: dose, truth, value, low, high.
    """
    figure, axes = plt.subplots(figsize=(5.2, 4.4))
    ends = [min(0.0, table["low"].min()), max(1.0, table["high"].max())]
    axes.plot(ends, ends, color="#999999", lw=0.8, zorder=0)
    for dose, colour in colours(f"{dose:.0%}" for dose in sorted(table["dose"].unique())).items():
        rows = table[table["dose"].map("{:.0%}".format) == dose]
        if len(rows):
            spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            axes.errorbar(rows["truth"], rows["value"], yerr=spread, fmt="o", ms=4, capsize=2, color=colour, label=dose)
    axes.set(xlabel="taken, by behaviour", ylabel="taken, estimated from the answers")
    axes.legend(title="weight of the teacher", frameon=False)
    sns.despine(figure)
    return figure
