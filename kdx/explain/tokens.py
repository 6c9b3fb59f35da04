"""What a student holds and its base lacks, in sentences: tokens take the place of places in an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.explain.reference import Reference
from kdx.explain.transferred import handed_over
from kdx.explain.unexplained import contributions
from kdx.networks.text_networks import TextNetwork

AT_A_TIME = 64  # sentences
Words = list[NDArray[np.float64]]


class TokenReference(Reference):
    """A fixed set of sentences with which others are explained; see :class:`kdx.Reference`, whose functions take it:
    ``unexplained_share``, ``transferred_share``, ``transferred_strength``, ``replacement``.

    Regressions are over the tokens of all sentences; padding does not enter. UniCAM compares whole feature maps place
    by place, and the places of two sentences have nothing in common, so it is not offered.

    Args:
        student: Its words are cut into pieces as the base's.
        base: With as many blocks as the student.
        sentences: The words of each, five sentences or more.
        teacher: For what was handed over. Its blocks are compared if it cuts words into the same pieces: those at the
            same share of its depth; else its answers only.

    Raises:
        ValueError: Student and base that cut words into different pieces.
    """

    def __init__(
        self,
        student: TextNetwork,
        base: TextNetwork,
        sentences: Sequence[Sequence[str]],
        *,
        teacher: TextNetwork | None = None,
    ) -> None:
        networks = [student, base] if teacher is None else [student, base, teacher]
        self.encoded = [network.encode(sentences) for network in networks]
        alike = [torch.equal(of.ids, self.encoded[0].ids) for of in self.encoded]
        if not alike[1]:
            raise ValueError("expected a student and a base that cut words into the same pieces")
        self.padding = student.padding
        blocks, of_teacher = len(student.layers), {}
        if teacher is not None and alike[2]:
            depth = len(teacher.layers)
            if depth % blocks == 0:
                of_teacher = {f"L{i + 1}": teacher.layers[f"L{(i + 1) * depth // blocks}"] for i in range(blocks)}
        super().__init__(
            student, base, tuple(of.images for of in self.encoded), teacher=teacher, layers_student=student.layers,
            layers_base=base.layers, layers_teacher=of_teacher,
        )  # fmt: skip

    def counted(self, features: tuple[Tensor, ...], images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The features of tokens, (tokens, k) each, without padding; answers as they are."""
        if features[0].ndim < 4:
            return features
        kept = images[0][:, 0, 0] != self.padding
        return tuple(of[:, :, 0].mT[kept] for of in features)


def token_scores(reference: TokenReference, sentences: Sequence[Sequence[str]]) -> dict[str, dict[str, Words]]:
    """Signed contributions of each word to the unexplained answer of the student and, with a teacher, to the answer
    that was handed over, see :func:`kdx.unexplained` and :func:`kdx.transferred`.

    A word has the sum of its pieces. In the last block of a network that answers from its first mark, words do not
    enter the answer, so all of them have 0.

    Args:
        reference: Of other sentences.
        sentences: The words of each.

    Returns:
        ``unexplained``, and ``handed over`` -> stage -> of each sentence (words,); NaN for a word without pieces.
    """
    pieces = [network.encode(sentences) for network in reference.networks]
    found: dict[str, dict[str, list[Tensor]]] = {}
    for rows in torch.arange(len(sentences)).split(AT_A_TIME):
        x = tuple(of.images[rows] for of in pieces)
        kinds: dict[str, Mapping[str, Tensor]] = {"unexplained": contributions(reference, x[:2])["distilled"]}
        if len(x) > 2:
            kinds["handed over"] = handed_over(reference, x)
        for kind, stages in kinds.items():
            for stage, of in stages.items():
                found.setdefault(kind, {}).setdefault(stage, []).append(of[:, 0])
    of_word, lengths = pieces[0].words.numpy(), [len(words) for words in sentences]
    return {
        kind: {
            stage: [sum_pieces(*one) for one in zip(torch.cat(parts).double().numpy(), of_word, lengths, strict=True)]
            for stage, parts in stages.items()
        }
        for kind, stages in found.items()
    }


def sum_pieces(values: NDArray[np.float64], words: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Sums of the values of pieces (t,) over each of ``count`` words; NaN for a word without pieces.

    Args:
        values: Of the pieces.
        words: The place of each piece's word; -1 for marks and padding.
        count: Number of words of the sentence.
    """
    of = words >= 0
    sums, known = (np.bincount(words[of], w, minlength=count) for w in (values[of], np.ones(of.sum())))
    return np.where(known > 0, sums, np.nan)
