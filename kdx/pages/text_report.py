"""``kdx explain --text``: what a student classifier of sentences gained and lost against its base, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdx.data.sst import Sentences
from kdx.distil.fit_text import answer
from kdx.measure.ledger import BASE, STUDENT, Ledger
from kdx.measure.words import word_scores
from kdx.networks.own_networks import same_weights
from kdx.networks.text_networks import TextNetwork, open_text
from kdx.pages import html_pages, text_plots
from kdx.pages import sentences as told
from kdx.paths import check_new, written_whole

SHOWN = 5  # sentences that were gained, and that were lost, with coloured words


def explain_text(paths: Mapping[str, Path | str], data: Path, out: Path, command: str = "") -> Path:
    """Compare a student with its base on labelled sentences, and write ``report.html`` and ``answers.csv``.

    Args:
        paths: Role -> network, as for :func:`kdx.networks.text_networks.open_text`: ``student``, ``base`` and, if
            there are any, ``second base`` and ``teacher``.
        data: CSV file with columns ``text`` and ``label``, the name of a class or its index.
        out: A folder that does not exist yet or is empty.
        command: What is said to have made the report.

    Returns:
        The report.

    Raises:
        ValueError: Networks of different classes, or a table that does not fit them; nothing is then written.
    """
    check_new(out)
    networks, names = {}, None
    for role, path in paths.items():
        networks[role], classes = open_text(path)
        if names is not None and classes != names:
            raise ValueError(
                f"{role}: expected the classes {', '.join(names)} of the student, got {', '.join(classes)}"
            )
        names = classes
        if twin := [other for other in networks if other != role and same_weights(networks[role], networks[other])]:
            raise ValueError(
                f"{role} and {twin[0]} are the same network ({path}), expected two that differ; give another"
            )
    assert names is not None
    texts, labels = read_texts(data, names)
    words = tuple(tuple(text.split()) for text in texts)
    sentences = Sentences(words, labels, tuple((0,) * len(w) for w in words), names)
    answers = {role: answer(network, sentences).argmax(1) for role, network in networks.items()}
    ledger = Ledger(labels, answers, names)
    with written_whole(out.absolute(), new=True) as scratch:
        table = pd.DataFrame({"text": texts, "label": [names[i] for i in labels.tolist()]})
        for role, given in answers.items():
            table[role] = [names[i] for i in given.tolist()]
        table.to_csv(scratch / "answers.csv", index=False)
        (scratch / "report.html").write_text(_page(ledger, sentences, networks, command))
    return out / "report.html"


def read_texts(path: Path, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """Texts and labels of a CSV file.

    Raises:
        ValueError: No columns ``text`` and ``label``, an empty text, or a label that is no class.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path}: expected a CSV file ({error})") from error
    if missing := [name for name in ("text", "label") if name not in table]:
        raise ValueError(f"{path}: expected columns text and label, got no {' and no '.join(missing)}")
    names, labels = {name: i for i, name in enumerate(classes)}, set(table["label"])
    indices = {str(i): i for i in range(len(classes))}
    known = indices | names if labels <= set(names) or not labels <= set(indices) else indices
    unclear = not labels <= set(names) and known is not indices and labels & set(names) & set(indices)
    if unclear and labels <= {*names, *indices}:
        raise ValueError(f"{path}: expected labels that are all names ({', '.join(classes)}) or all indices, got both")
    for number, (text, label) in enumerate(table[["text", "label"]].itertuples(index=False), 2):
        if not text.strip() or label not in known:
            choices = ", ".join(classes)
            raise ValueError(
                f"{path}, line {number}: expected a text and one of {choices}, got {text!r:.40}, {label!r}"
            )
    if not len(table):
        raise ValueError(f"{path}: expected at least one text, got none")
    return list(table["text"]), torch.tensor([known[label] for label in table["label"]])


def _page(ledger: Ledger, sentences: Sentences, networks: Mapping[str, TextNetwork], command: str) -> str:
    tables = {"Right answers": ledger.accuracy(), "Gained and lost": ledger.rates(), "By class": ledger.by_class()}
    title = "What the student gained and lost"
    parts = [f"<h1>{title}</h1>", html_pages.listed(_told(ledger))]
    for heading, table in tables.items():
        parts += [f"<h2>{heading}</h2>", html_pages.table(table.rename(columns={"images": "sentences"}))]
    student, base = ledger.right(STUDENT), ledger.right(BASE)
    for change, rows in (("Gained", student & ~base), ("Lost", base & ~student)):
        parts.append(f"<h2>{change}: words that speak for the right class</h2>")
        parts.append(_words(rows.nonzero()[0][:SHOWN], sentences, networks))
    return html_pages.page(title, f"<main>{''.join(parts)}</main>", command)


def _told(ledger: Ledger) -> list[str]:
    """What was found: the sentences of reports on images, in which names of classes stay as they are."""
    marks = [f"\0{i}\0" for i in range(len(ledger.names))]
    marked = replace(ledger, names=marks)
    evidence = told.Evidence(len(ledger.labels), ledger=marked, classes=marked.by_class())
    found = "\n".join(told.sentences(evidence)).replace("images", "sentences").replace("image", "sentence")
    for mark, name in zip(marks, ledger.names, strict=True):
        found = found.replace(mark, name.replace("\n", " "))
    return found.split("\n")


def _words(rows: np.ndarray, sentences: Sentences, networks: Mapping[str, TextNetwork]) -> str:
    """A figure of coloured words as HTML, or that there is nothing to draw."""
    if not len(rows):
        return "<p>None.</p>"
    some = sentences[torch.from_numpy(rows)]
    values = {role: word_scores(network, some.words, some.labels).values for role, network in networks.items()}
    drawn = [
        text_plots.Coloured(some.classes[label], some.words[i], {role: v[i] for role, v in values.items()})
        for i, label in enumerate(some.labels.tolist())
    ]
    figure = text_plots.coloured_words(drawn, "share in the logit of the right class")
    alt = "Sentences whose words are coloured by how much they add to the logit of the right class"
    return html_pages.picture(figure, alt)
