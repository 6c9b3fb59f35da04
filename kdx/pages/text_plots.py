"""Figures of text networks: sentences with coloured words, and scores of words with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from kdx.pages.plots import INK, bare, colours

SPEAKS = "PuOr_r"  # orange speaks for the class, violet against it; the bars under words tell them apart in grey
LINE, LETTERS = 94, 28  # characters of a line of words, and of the names before it
SIZE = 7.5  # of the letters, in points
UNSEEN = "#e8e8e8"


class Coloured(NamedTuple):
    """A sentence and what several networks say of its words.

    Attributes:
        title: A line above it.
        words: Of the sentence.
        values: Network -> (words,); NaN for a word that it does not see.
    """

    title: str
    words: Sequence[str]
    values: Mapping[str, NDArray[np.float64]]


def coloured_words(sentences: Sequence[Coloured], label: str) -> Figure:
    """Sentences, once for each network, with the value of every word as its colour and as a bar under it. All of them
    share one scale.

    Args:
        sentences: At least one.
        label: What the values are, for the legend.

    Raises:
        ValueError: No sentences, or values that do not fit the words.
    """
    if not sentences:
        raise ValueError("sentences: expected at least one, got none")
    for one in sentences:
        if wrong := [name for name, values in one.values.items() if len(values) != len(one.words)]:
            raise ValueError(f"values: expected {len(one.words)} of {wrong[0]}, one a word, got another number")
    most = max((float(np.nanmax(np.abs(v))) for one in sentences for v in one.values.values() if len(v)), default=0.0)
    norm = TwoSlopeNorm(0, -(most or 1.0), most or 1.0)
    colour = ScalarMappable(norm, SPEAKS)
    rows = [(one, name, wrap(one.words)) for one in sentences for name in one.values]
    height = sum(len(lines) for _, _, lines in rows) * 1.7 + 0.6 * len(rows) + 1.9 * len(sentences)
    width = LINE + LETTERS + 2
    inch = SIZE / 72 * 0.602  # the width of a letter of DejaVu Sans Mono
    figure, axes = plt.subplots(figsize=(1.04 * width * inch, (height + 6) * inch * 1.75))
    axes.set(xlim=(0, width), ylim=(height, 0))
    letters: dict[str, Any] = {"family": "monospace", "fontsize": SIZE, "va": "center", "parse_math": False}
    y, last = 0.0, None
    for one, name, lines in rows:
        if one is not last:
            axes.text(0, y + 0.8, one.title, va="center", fontsize=SIZE + 1, fontweight="bold", parse_math=False)
            y, last = y + 1.9, one
        axes.text(0, y + 0.6, name, va="center", fontsize=SIZE, color=INK, parse_math=False)
        for line in lines:
            for place, word in line:
                x, value = LETTERS + place, float(one.values[name][word])
                text = one.words[word]
                face = colour.to_rgba(np.array(value)) if np.isfinite(value) else UNSEEN
                axes.add_patch(Rectangle((x - 0.3, y), len(text) + 0.6, 1.1, facecolor=face, linewidth=0))
                dark = np.dot(face[:3], (0.3, 0.6, 0.1)) < 0.5 if np.isfinite(value) else False
                axes.text(x, y + 0.6, text, color="white" if dark else INK, **letters)
                if np.isfinite(value):
                    length = abs(value) / (most or 1.0) * len(text)
                    style: dict[str, Any] = (
                        {"facecolor": INK} if value > 0 else {"facecolor": "white", "edgecolor": INK}
                    )
                    axes.add_patch(Rectangle((x, y + 1.2), length, 0.22, linewidth=0.5, **style))
            y += 1.7
        y += 0.6
    bare(axes)
    bar = figure.colorbar(colour, ax=axes, orientation="horizontal", aspect=50, shrink=0.5, pad=0.01)
    bar.set_label(f"{label}; full bar under a word: for, hollow bar: against", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def wrap(words: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Lines of words: (place of its first letter, number of the word) of each."""
    lines: list[list[tuple[int, int]]] = [[]]
    place = 0
    for number, word in enumerate(words):
        if place and place + len(word) > LINE:
            lines.append([])
            place = 0
        lines[-1].append((place, number))
        place += len(word) + 2
    return lines


def word_scores(table: pd.DataFrame, networks: Sequence[str], marks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Scores of several networks as points with intervals, one panel for each score.

    Args:
        table: network, score, value, low, high.
        networks: In this order, from above.
        marks: Score -> name -> value, drawn as vertical lines.
    """
    scores = list(table["score"].unique())
    figure, grid = plt.subplots(
        1, len(scores), figsize=(2.5 * len(scores) + 1.8, 0.27 * len(networks) + 1.3), sharey=True, squeeze=False
    )
    palette = colours(networks)
    for axes, score in zip(grid[0], scores, strict=True):
        rows = table[table["score"] == score].set_index("network").reindex(networks)
        for y, name in enumerate(networks):
            value, low, high = rows.loc[name, ["value", "low", "high"]].astype(float)
            spread = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar([value], [y], xerr=spread, fmt="o", ms=4, capsize=2, color=palette[name])
        for i, (name, value) in enumerate(marks.get(score, {}).items()):
            axes.axvline(value, color=INK, lw=0.9, ls=("--", ":", "-.")[i % 3], zorder=0, label=name)
        left, right = axes.get_xlim()
        axes.set(
            title=score,
            xlim=(max(left, -0.02), min(right, 1.02)),
            yticks=range(len(networks)),
            yticklabels=networks,
            ylim=(len(networks) - 0.5, -0.5),
        )
        axes.grid(axis="x", alpha=0.3)
    handles, labels = next(
        (a.get_legend_handles_labels() for a in grid[0] if a.get_legend_handles_labels()[0]), ([], [])
    )
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    sns.despine(figure)
    return figure
