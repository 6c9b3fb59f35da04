"""The Stanford Sentiment Treebank: sentences of film reviews, with a polarity for every word.

Its files hold one tree a line, with a label from 0 (very negative) to 4 (very positive) on every phrase. As Han et al.
(2023) do, neutral sentences are left out, so four classes remain. A generated treebank in the same form serves tests.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import requests
import torch
from torch import Tensor

from kdx.data.batches import class_indices, rank_in_class
from kdx.data.download import download, unpack
from kdx.data.sources import place_copy
from kdx.paths import DataError, data_home, one_line, places, sha256_of, written_whole

log = logging.getLogger(__name__)

NAME = "sst"
TITLE = "Stanford Sentiment Treebank"
LICENCE = "none is stated; the sentences are from reviews on Rotten Tomatoes (Pang & Lee 2005)"
CITATION = "Socher et al. 2013, Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank"
HOMEPAGE = "https://nlp.stanford.edu/sentiment"
CLASSES = ("very negative", "negative", "positive", "very positive")
SHA256 = {  # of the files, which hold 8,544, 1,101 and 2,210 trees
    "train": "e2f3f41b0b1e6d4dddc0effe3bfc2d27ed8928079aa9a03d652311614fc5feb7",
    "dev": "0e9336aed6e4730e19f58d00a77b3f0297efdb755f7b5e598c98a05e3f97ea40",
    "test": "6e54806dee95cf80cd918e7dfb3f6770f6df24bf826f289a4d1f709e1c8f6761",
}
HOW_TO_GET = (
    f"get it with `kdx data get {NAME}` (1 MB), prepare a folder or an archive that you have with `kdx data prepare "
    f"{NAME} --from PATH`, or name the folder above it in KDX_DATA"
)
NEUTRAL = 2  # of the labels of phrases
LEAF = re.compile(r"\(([0-4]) ([^() ]+)\)")
ESCAPES = {"-LRB-": "(", "-RRB-": ")", r"\/": "/", r"\*": "*"}


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences in memory.

    Attributes:
        words: Of each sentence.
        labels: int64 (n,), class indices.
        polarities: -1 (negative), 0 (neutral) or 1 (positive) of each word of each sentence.
        classes: Names of the classes, from the most negative to the most positive.

    Raises:
        ValueError: Another number of labels or of rows of polarities than of sentences, or of polarities than of words.
    """

    words: tuple[tuple[str, ...], ...] = field(repr=False)
    labels: Tensor = field(repr=False)
    polarities: tuple[tuple[int, ...], ...] = field(repr=False)
    classes: tuple[str, ...] = CLASSES

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", class_indices(self.labels))
        if not (n := len(self.words)) == len(self.labels) == len(self.polarities):
            got = f"{len(self.labels)} labels and {len(self.polarities)} rows of polarities"
            raise ValueError(f"expected a label and a row of polarities for each of {n} sentences, got {got}")
        for row, (words, polarities) in enumerate(zip(self.words, self.polarities, strict=True)):
            if len(words) != len(polarities):
                got = f"{len(polarities)} in row {row}, of {len(words)} words"
                raise ValueError(f"polarities: expected one for each word of a sentence, got {got}")

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: Tensor) -> Sentences:
        """The subset at the index tensor ``rows`` (m,)."""
        at = rows.tolist()
        words, polarities = (tuple(of[i] for i in at) for of in (self.words, self.polarities))
        return replace(self, words=words, labels=self.labels[rows], polarities=polarities)

    @property
    def signs(self) -> Tensor:
        """Polarity of each sentence, -1 or 1: int64 (n,). The upper half of the classes is positive."""
        return 2 * (2 * self.labels >= len(self.classes)).long() - 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of words and labels."""
        lines = [f"{y} {' '.join(w)}" for y, w in zip(self.labels.tolist(), self.words, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def limit(self, n: int, seed: int = 0) -> Sentences:
        """A random subset with the class proportions of the whole; 0, or as many as there are, for all.

        Raises:
            ValueError: There are fewer sentences than ``n``.
        """
        if not 0 <= n <= len(self):
            raise ValueError(f"limit: expected 0 (all) to {len(self)} sentences, got {n}")
        if n in (0, len(self)):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        labels = self.labels[order]
        share = (rank_in_class(labels) - 0.5) / labels.bincount()[labels]
        return self[order[share.argsort(stable=True)][:n].sort().values]


def load_sentences(corpus: str = NAME, split: str = "test", limit: int = 0, seed: int = 0) -> Sentences:
    """Load a split, without its neutral sentences.

    Args:
        corpus: ``"sst"``, or ``"generated"``.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        limit: Number of sentences to keep, with the class proportions of the whole; 0: all.
        seed: Draws the subset, and generated sentences.

    Raises:
        ValueError: An unknown corpus or split, or fewer sentences than ``limit``.
        DataError: The treebank is not on this machine.

    Examples:
        >>> import kdx
        >>> some = kdx.load_sentences("generated", "test", limit=8)
        >>> len(some), some.classes[0]
        (8, 'very negative')
    """
    if split not in SHA256:
        raise ValueError(f"split: expected one of {', '.join(SHA256)}, got {split!r}")
    if corpus == "generated":
        lines = generated(split, seed)
    elif corpus == NAME:
        if (folder := find_sst()) is None:
            raise DataError(f"{TITLE} is not on this machine: {HOW_TO_GET}")
        lines = (folder / f"{split}.txt").read_text(encoding="utf8").strip("\n").split("\n")
    else:
        raise ValueError(f"unknown corpus {corpus!r}; choose from: {NAME}, generated")
    return read_trees(lines).limit(limit, seed)


def join(*parts: Sentences) -> Sentences:
    """All sentences of several sets of the same classes, in order."""
    words, polarities = (tuple(one for part in parts for one in getattr(part, of)) for of in ("words", "polarities"))
    return replace(parts[0], words=words, polarities=polarities, labels=torch.cat([part.labels for part in parts]))


def read_trees(lines: Sequence[str]) -> Sentences:
    """Sentences from trees, one a line, such as ``(3 (2 a) (3 (3 lovely) (2 film)))``. Neutral ones are left out.

    Raises:
        ValueError: A line that is no such tree.
    """
    words, labels, polarities = [], [], []
    for number, line in enumerate(lines, 1):
        leaves = LEAF.findall(line)
        opened = len(re.findall(r"\([0-4] ", line))
        # a tree is binary: one node less than twice its words
        if not leaves or opened != 2 * len(leaves) - 1 or line.count("(") != opened or line.count(")") != opened:
            raise ValueError(
                f"line {number}: expected a binary tree with a label 0 to 4 on every phrase, got {line[:60]!r}"
            )
        if (label := int(line.strip()[1])) == NEUTRAL:
            continue
        words.append(tuple(unescape(word) for _, word in leaves))
        labels.append(label - (label > NEUTRAL))
        polarities.append(tuple(int(np.sign(int(of) - NEUTRAL)) for of, _ in leaves))
    return Sentences(tuple(words), torch.tensor(labels, dtype=torch.int64), tuple(polarities))


def unescape(word: str) -> str:
    """A word as it is written, from its form in a tree: ``-LRB-`` is ``(``."""
    for escaped, plain in ESCAPES.items():
        word = word.replace(escaped, plain)
    return word


def escape(word: str) -> str:
    """The inverse of :func:`unescape`."""
    for escaped, plain in ESCAPES.items():
        word = word.replace(plain, escaped)
    return word


POLAR = {
    4: ("superb", "wonderful", "moving", "brilliant"), 3: ("good", "pleasant", "funny", "warm"),
    1: ("bland", "slow", "weak", "silly"), 0: ("awful", "dreadful", "worthless", "unbearable"),
}  # fmt: skip
PLAIN = ("the", "film", "is", "a", "story", "of", "two", "people", "and", "its", "director", "scenes", ",", "with")
COUNTS = {"train": 800, "dev": 100, "test": 200}


def generated(split: str, seed: int = 0) -> list[str]:
    """Trees of generated sentences: among neutral words, two or three of the label's class, and in half of the
    sentences a mild one of the other polarity."""
    rng = np.random.default_rng([seed, list(COUNTS).index(split)])
    lines = []
    for label in rng.permutation(np.repeat(list(POLAR), COUNTS[split] // 4)).tolist():
        leaves = [(NEUTRAL, str(word)) for word in rng.choice(PLAIN, rng.integers(4, 10))]
        mild = 1 if label > NEUTRAL else 3
        for of in [label] * rng.integers(2, 4) + [mild] * rng.integers(2):
            leaves.insert(rng.integers(len(leaves) + 1), (of, str(rng.choice(POLAR[of]))))
        tree = "({} {})".format(*leaves[-1])
        for leaf in reversed(leaves[:-1]):
            tree = "({} ({} {}) {})".format(label, *leaf, tree)
        lines.append(tree)
    return lines


def find_sst() -> Path | None:
    """The folder with the treebank's three files, verified, from the first of ``places()`` that has it; or None."""
    for folder in (place / NAME for place in places()):
        if folder.is_dir():
            try:
                return check(folder)
            except DataError as error:
                log.warning("%s: passed over %s: %s", NAME, folder, error)
    return None


def check(folder: Path) -> Path:
    """The folder of the three files, which is this one or one inside.

    Raises:
        DataError: A file is missing, or is not the original.
    """
    inside = next(iter(sorted(folder.rglob("train.txt"))), folder / "train.txt").parent
    for split, expected in SHA256.items():
        path = inside / f"{split}.txt"
        if not path.is_file():
            raise DataError(f"expected train.txt, dev.txt and test.txt, found no {split}.txt in {folder}")
        if (got := sha256_of(path)) != expected:
            raise DataError(f"{path}: expected SHA-256 {expected[:12]}…, got {got[:12]}…")
    return inside


def adopt_sst(origin: Path) -> Path:
    """Use an own folder (through a link) or archive (unpacked) as the treebank.

    Raises:
        DataError: There is nothing at ``origin``, it is not the treebank, or ``raw/`` holds it already.
    """
    return place_copy(NAME, origin, check)


def _fetch_original(folder: Path) -> None:
    """The archive of the authors. No checksum of it is published; its files are verified."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = requests.get(f"{HOMEPAGE}/trainDevTestTrees_PTB.zip", timeout=(20, 60))
        answer.raise_for_status()
        archive = Path(scratch) / "trees.zip"
        archive.write_bytes(answer.content)
        unpack(archive, Path(scratch) / "trees")
        for path in check(Path(scratch) / "trees").glob("*.txt"):
            (folder / path.name).write_bytes(path.read_bytes())


MIRROR = "https://raw.githubusercontent.com/munikarmanish/RNTN/12bb731ba9fbdcdf2368b8515a241773f2b97547/trees"
JOINED = "3287e6df56acb2ccba2bc3ebb7a696c0daee8d2fa00988348bbf37796bc3739d"  # training trees followed by dev.txt


def _fetch_mirror(folder: Path) -> None:
    """A copy whose training file holds the development trees as well."""
    for split in ("dev", "test"):
        download(f"{MIRROR}/{split}.txt", folder / f"{split}.txt", SHA256[split])
    joined = download(f"{MIRROR}/train.txt", folder / "joined.txt", JOINED)
    dev = (folder / "dev.txt").stat().st_size
    (folder / "train.txt").write_bytes(joined.read_bytes()[:-dev])


SOURCES: dict[str, Callable[[Path], None]] = {"Stanford": _fetch_original, "a mirror on GitHub": _fetch_mirror}


def fetch_sst() -> Path:
    """The folder of the treebank, downloaded and verified if it is not on this machine.

    Raises:
        DataError: No source has it.
    """
    if folder := find_sst():
        return folder
    folder, failures = data_home() / "raw" / NAME, []
    for source, get in SOURCES.items():
        try:
            with written_whole(folder) as scratch:
                get(scratch)
                check(scratch)
            return folder
        except (OSError, DataError) as error:  # also those of requests
            failures.append(f"{source}: {one_line(error)}")
    reasons = "\n  ".join(failures)
    raise DataError(
        f"{NAME}: no source could be reached or trusted.\n  {reasons}\nCheck the connection, or {HOW_TO_GET}"
    )
