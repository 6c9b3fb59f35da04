"""Which words speak for the answer of a text network, and whether these are the words that people found polar.

A word's score is its share in a logit by integrated gradients (Sundararajan et al. 2017). Han et al. (2023, 5.4)
compare it with the polarity of the words in a treebank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from kdx.data.sst import Sentences
from kdx.distil.fit_text import answer
from kdx.explain.tokens import sum_pieces
from kdx.inference import jackknife, two_factor
from kdx.networks.devices import pick_device, placed
from kdx.networks.stages import evaluating
from kdx.networks.text_networks import TextNetwork

POOLED = ("sign agreement", "AUROC", "AUPRC")  # the first is the paper's "accuracy"
SCORES = (*POOLED, "AUROC in a sentence")
AT_ONCE = 1024  # sentences times steps in one pass
SMALL = 0.1  # of the mean change of the logit, below which a gap is not divided by the change itself
Values = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class WordScores:
    """How much each word of each sentence adds to a logit.

    Attributes:
        values: Of each sentence, (words,); NaN for a word that the network does not see.
        targets: int64 (n,), the class of the logit.
        logits: float32 (n, classes).
        gap: (n,), by how much the scores of a sentence, with those of its marks, miss the change of the logit, relative
            to this change, or to a tenth of the mean change if that is more.
        steps: (n,), the points at which gradients were taken.
    """

    values: tuple[NDArray[np.float64], ...] = field(repr=False)
    targets: Tensor = field(repr=False)
    logits: Tensor = field(repr=False)
    gap: NDArray[np.float64] = field(repr=False)
    steps: NDArray[np.int64] = field(repr=False)

    def right(self, labels: Tensor) -> NDArray[np.bool_]:
        """Whether the answers are the labels: bool (n,)."""
        return (self.logits.argmax(1) == labels).numpy()


def word_scores(
    network: TextNetwork,
    words: Sequence[Sequence[str]],
    targets: Tensor | None = None,
    *,
    steps: int = 16,
    most: int = 256,
    tolerance: float = 0.01,
    at_once: int = AT_ONCE,
    device: str = "auto",
) -> WordScores:
    r"""Integrated gradients of a logit with respect to the embeddings of the words.

    The path leads from padding in place of every word, the marks at both ends kept, to the sentence. What it gives a
    word is summed over the dimensions of the embedding and over the pieces of the word. By completeness, all of it
    sums to :math:`f(x) - f(x')`; where the quadrature misses this by more than ``tolerance``, it is repeated with
    twice the points.

    Args:
        network: From :class:`kdx.distil.fit_text.TextJob`, or from :func:`kdx.networks.text_networks.open_text`.
        words: Of each sentence.
        targets: int64 (n,), the class whose logit is explained; None: the class that the network predicts.
        steps: Points of the Gauss-Legendre quadrature, at first.
        most: At most.
        tolerance: Of :attr:`WordScores.gap`.
        at_once: Sentences times points in one pass through the network.
        device: As for :func:`kdx.fit`.

    Raises:
        ModuleNotFoundError: captum is not installed.
        ValueError: No sentences, or targets that do not fit them.
    """
    explain = _explainer(network)
    pieces, chosen = network.encode(words), pick_device(device)
    n = len(pieces.ids)
    if targets is not None and targets.shape != (n,):
        raise ValueError(f"targets: expected a class for each of {n} sentences, got {tuple(targets.shape)}")
    lengths = network.lengths(pieces.ids)
    per_piece = torch.zeros(pieces.ids.shape, dtype=torch.float64)
    logits, change = torch.empty(n, network.config.num_labels), np.empty(n)
    gap, taken, open_rows = np.empty(n), np.zeros(n, dtype=np.int64), torch.arange(n)
    with torch.inference_mode(False), placed(network, chosen), evaluating(network):
        while len(open_rows):
            ordered = open_rows[lengths[open_rows].argsort(stable=True)]
            for rows in ordered.split(max(1, at_once // steps)):
                ids = pieces.ids[rows, : int(lengths[rows].max())].to(chosen)
                start = torch.where(pieces.words[rows, : ids.shape[1]].to(chosen) < 0, ids, network.padding)
                mask = (ids != network.padding).long()
                with torch.no_grad():
                    ends = [network.classifier(input_ids=x, attention_mask=mask).logits.double() for x in (ids, start)]
                of = ends[0].argmax(1) if targets is None else targets[rows].to(chosen)
                found = explain(ids, start, of, mask, steps).cpu()
                per_piece[rows, : ids.shape[1]] = found
                logits[rows] = ends[0].float().cpu()
                at = rows.numpy()
                change[at] = (ends[0] - ends[1]).gather(1, of[:, None])[:, 0].cpu()
                gap[at], taken[at] = found.sum(1) - change[at], steps
            unit = np.maximum(np.abs(change), SMALL * np.abs(change).mean())
            relative = np.divide(np.abs(gap), unit, out=np.zeros(n), where=unit > 0)
            steps *= 2
            open_rows = open_rows[relative[open_rows.numpy()] > tolerance] if steps <= most else open_rows[:0]
    values = tuple(sum_pieces(*of) for of in zip(per_piece.numpy(), pieces.words.numpy(), map(len, words), strict=True))
    return WordScores(values, logits.argmax(1) if targets is None else targets, logits, relative, taken)


def _explainer(network: TextNetwork) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Attributions float64 (n, t) for ids, the ids of the start, classes, the attention mask, and the points."""
    try:
        from captum.attr import LayerIntegratedGradients
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("captum is not installed; install the extra: pip install 'kdx[text]'") from error

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return network.classifier(input_ids=ids, attention_mask=mask).logits

    layer = LayerIntegratedGradients(logits, network.classifier.get_input_embeddings())

    def explain(ids: Tensor, start: Tensor, of: Tensor, mask: Tensor, steps: int) -> Tensor:
        found = layer.attribute(ids, start, target=of, additional_forward_args=(mask,), n_steps=steps)
        return found.detach().double().sum(-1)

    return explain


def word_agreement(
    values: Values, sentences: Sentences, rows: NDArray[np.bool_] | None = None, blocks: int = 40, seed: int = 0
) -> pd.DataFrame:
    r"""How well scores of words towards the sentence's class agree with the polarity of the words.

    A word that people called positive or negative is a target where its polarity is the sentence's; neutral words are
    left out. Over all words of all sentences together: *sign agreement*, the share of words whose score is positive
    exactly where they are targets (the paper calls it accuracy), *AUROC*, and *AUPRC* (average precision, which is the
    share of targets for scores that tell nothing). *AUROC in a sentence* is the mean over sentences that have both.

    Args:
        values: Of each sentence, (words,); NaN is left out.
        sentences: To which they belong.
        rows: bool (n,), the sentences that count, such as those that are classified rightly; None: all.
        blocks: Parts of about equal size into which all sentences are divided, for the jackknife.
        seed: Draws them; equal for all networks, so that these can be compared block by block.

    Returns:
        score, value, low, high (95 %, over sentences), parts (blocks,), sentences and words that count. NaN where
        targets or others are missing.

    Raises:
        ValueError: Values that do not fit the sentences, or blocks that are fewer than 2 or more than sentences.
    """
    n = len(sentences)
    if [len(v) for v in values] != [len(w) for w in sentences.words]:
        raise ValueError(f"values: expected a score for every word of {n} sentences, got {len(values)} rows")
    if not 2 <= blocks <= n:
        raise ValueError(f"blocks: expected 2 to {n} (the sentences), got {blocks}")
    counted = np.ones(n, dtype=bool) if rows is None else np.asarray(rows)
    of, polarity = (np.concatenate([np.asarray(x, dtype=float) for x in xs]) for xs in (values, sentences.polarities))
    lengths = [len(w) for w in sentences.words]
    sentence, signs = np.repeat(np.arange(n), lengths), np.repeat(sentences.signs.numpy(), lengths)
    kept = (polarity != 0) & ~np.isnan(of) & counted[sentence]
    scores, targets, sentence = of[kept], (polarity == signs)[kept], sentence[kept]
    block = blocks_of(n, blocks, seed)
    single = within(scores, targets, sentence, n)
    whole = _pooled(scores, targets, single)
    without = [
        _pooled(scores[keep], targets[keep], single[block != b])
        for b in range(blocks)
        for keep in [block[sentence] != b]
    ]
    parts = jackknife(whole, without)
    half = stats.t.ppf(0.975, blocks - 1) * stats.sem(parts)
    table = pd.DataFrame({"score": SCORES, "value": whole, "low": whole - half, "high": whole + half})
    return table.assign(parts=list(parts.T), sentences=len(np.unique(sentence)), words=len(scores))


def _pooled(
    scores: NDArray[np.float64], targets: NDArray[np.bool_], single: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The values of ``SCORES``."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    inside = np.nan if np.isnan(single).all() else np.nanmean(single)
    if targets.all() or not targets.any():  # also where there are none
        return np.array([np.mean((scores > 0) == targets) if len(targets) else np.nan, np.nan, np.nan, inside])
    areas = roc_auc_score(targets, scores), average_precision_score(targets, scores)
    return np.array([np.mean((scores > 0) == targets), *areas, inside])


def within(
    scores: NDArray[np.float64], targets: NDArray[np.bool_], sentence: NDArray[np.int64], n: int
) -> NDArray[np.float64]:
    """AUROC inside each of ``n`` sentences, (n,); NaN where targets or others are missing."""
    from sklearn.metrics import roc_auc_score

    found = np.full(n, np.nan)
    starts = np.searchsorted(sentence, np.arange(n + 1))
    for i, (a, b) in enumerate(pairwise(starts)):
        if 0 < targets[a:b].sum() < b - a:
            found[i] = roc_auc_score(targets[a:b], scores[a:b])
    return found


def baselines(sentences: Sentences, train: Sentences, seed: int = 0) -> dict[str, Values]:
    """Scores of words that ask no network, as for :func:`word_agreement`.

    Args:
        sentences: To be scored.
        train: From which lexica are learnt.
        seed: Of random scores.

    Returns:
        ``always positive``; ``random``; ``lexicon of sentences`` (log-odds of a word in positive sentences, one added
        to both counts) and ``lexicon of words`` (mean polarity that people gave the word), both towards the sentence's
        polarity, 0 for an unknown word.
    """
    rng = np.random.default_rng(seed)
    counts: Mapping[int, Counter[str]] = {1: Counter(), -1: Counter()}
    given: dict[str, list[int]] = {}
    for words, polarities, sign in zip(train.words, train.polarities, train.signs.tolist(), strict=True):
        counts[sign].update({word.lower() for word in words})
        for word, polarity in zip(words, polarities, strict=True):
            given.setdefault(word.lower(), []).append(polarity)
    log_odds = {w: np.log((counts[1][w] + 1) / (counts[-1][w] + 1)) for w in given}
    lexica = {"lexicon of sentences": log_odds, "lexicon of words": {w: np.mean(p) for w, p in given.items()}}
    found: dict[str, Values] = {
        "always positive": [np.ones(len(words)) for words in sentences.words],
        "random": [rng.standard_normal(len(words)) for words in sentences.words],
    }
    for name, lexicon in lexica.items():
        found[name] = [
            sign * np.array([float(lexicon.get(word.lower(), 0.0)) for word in words])
            for words, sign in zip(sentences.words, sentences.signs.tolist(), strict=True)
        ]
    return found


def score_networks(
    networks: Mapping[tuple[str, int], TextNetwork],
    sentences: Sentences,
    *,
    explained: bool = True,
    blocks: int = 40,
    seed: int = 0,
    device: str = "auto",
    **settings: Any,
) -> pd.DataFrame:
    """Answers and :func:`word_agreement` of several networks on the same sentences, each over those that it classifies
    rightly.

    Args:
        networks: (role, seed) -> network. Their words are explained towards the right class.
        sentences: To be answered.
        explained: Whether words are scored; else the table holds answers alone.
        blocks: As for :func:`word_agreement`.
        seed: Likewise.
        device: As for :func:`kdx.fit`.
        **settings: Of :func:`word_scores`.

    Returns:
        network, seed, and the columns of :func:`word_agreement`; its scores and, over all sentences, ``accuracy`` and
        ``accuracy of polarity`` (the more probable half of the classes). Rows also have gap (the largest of
        :class:`WordScores`).
    """
    rows = []
    for (role, number), network in networks.items():
        hits = answers_of(network, sentences, device)
        right = hits["accuracy"]
        answered = [_share(name, of, blocks, seed) for name, of in hits.items()]
        parts = [pd.DataFrame(answered)]
        if explained and right.any():
            some = sentences[torch.from_numpy(right.nonzero()[0])]
            found = word_scores(network, some.words, some.labels, device=device, **settings)
            values = [np.full(len(words), np.nan) for words in sentences.words]
            for at, of in zip(right.nonzero()[0], found.values, strict=True):
                values[at] = of
            parts.append(word_agreement(values, sentences, right, blocks, seed).assign(gap=found.gap.max()))
        rows += [part.assign(network=role, seed=number) for part in parts]
    columns = ["network", "seed", "score", "value", "low", "high", "parts", "sentences", "words", "gap"]
    return pd.concat(rows, ignore_index=True).reindex(columns=columns)


def answers_of(network: TextNetwork, sentences: Sentences, device: str = "auto") -> dict[str, NDArray[np.bool_]]:
    """Which sentences a network classifies rightly, bool (n,): ``accuracy``, and ``accuracy of polarity``, by the more
    probable half of its classes."""
    logits = answer(network, sentences, device)
    half = logits.softmax(1)[:, logits.shape[1] // 2 :].sum(1) > 0.5
    right = logits.argmax(1) == sentences.labels
    return {"accuracy": right.numpy(), "accuracy of polarity": ((sentences.signs > 0) == half).numpy()}


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`score_networks`, or of :func:`word_agreement` with columns network and seed, over the seeds of
    each network.

    Returns:
        network, score, value, low, high, seeds, and parts (seeds, blocks), for :func:`kdx.inference.two_factor`. The
        95 % interval is over seeds and sentences; of a single network it is over sentences.
    """
    rows = []
    for (network, score), group in table.groupby(["network", "score"], sort=False):
        parts = np.stack(list(group["parts"]))
        value, low, high = group[["value", "low", "high"]].iloc[0]
        if len(group) > 1:
            estimate = two_factor(parts, 0)
            value, (low, high) = estimate.mean, estimate.interval()
        rows.append((network, score, value, low, high, len(group), parts))
    return pd.DataFrame(rows, columns=["network", "score", "value", "low", "high", "seeds", "parts"])


def _share(name: str, hits: NDArray[np.bool_], blocks: int, seed: int) -> dict[str, Any]:
    """A share of sentences as a row of :func:`word_agreement`, with the same blocks."""
    block = blocks_of(len(hits), blocks, seed)
    parts = jackknife(hits.mean(), [hits[block != b].mean() for b in range(blocks)])
    half = stats.t.ppf(0.975, blocks - 1) * stats.sem(parts)
    ends = {"low": hits.mean() - half, "high": hits.mean() + half}
    return {"score": name, "value": hits.mean(), **ends, "parts": parts, "sentences": len(hits), "words": 0}


def blocks_of(n: int, blocks: int, seed: int) -> NDArray[np.int64]:
    """The block of each of n sentences, drawn at random: (n,)."""
    found = np.empty(n, dtype=np.int64)
    for i, members in enumerate(np.array_split(np.random.default_rng(seed).permutation(n), blocks)):
        found[members] = i
    return found
