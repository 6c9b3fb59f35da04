from dataclasses import replace

import numpy as np
import pytest
import torch

import kdx
from kdx.data.sst import load_sentences
from kdx.explain.tokens import TokenReference, sum_pieces, token_scores
from kdx.explain.unexplained import contributions
from tests.texts import TINY, tiny


@pytest.fixture(scope="module")
def sentences():
    return load_sentences("generated", "dev", limit=40).words


def test_pieces_are_summed_by_word():
    values, words = np.array([9.0, 1.0, 2.0, 4.0, 9.0]), np.array([-1, 0, 0, 2, -1])
    assert sum_pieces(values, words, 3)[[0, 2]].tolist() == [3.0, 4.0]
    assert np.isnan(sum_pieces(values, words, 3)[1])


def test_padding_enters_no_regression(sentences):
    reference = TokenReference(tiny(0), tiny(1), sentences)
    (part,) = reference.parts(reference.inputs, 1)
    tokens = int((reference.encoded[0].ids != 0).sum())
    assert part["distilled"]["L1"].n == tokens < reference.encoded[0].ids.numel()
    assert part["distilled"]["answer"].n == len(sentences)


def test_a_network_leaves_nothing_of_itself_unexplained(sentences):
    of = kdx.unexplained_share(TokenReference(tiny(0), tiny(0), sentences), folds=4, directions=["distilled"])
    assert (of["value"].abs() < 1e-4).all()
    other = kdx.unexplained_share(TokenReference(tiny(0), tiny(1), sentences), folds=4, directions=["distilled"])
    assert (other["value"] > 0.01).all()


def test_blocks_of_a_teacher_are_those_at_the_same_depth(sentences):
    deep = tiny(2, architecture=replace(TINY, layers=4))
    reference = TokenReference(tiny(0), tiny(1), sentences, teacher=deep)
    assert [str(name).rpartition(".")[2] for name in reference.layers[2].values()] == ["1", "3"]
    found = kdx.transferred_share(reference, folds=4)
    assert set(found["stage"]) == {"L1", "L2", "answer"}
    uneven = tiny(2, architecture=replace(TINY, layers=3))
    assert TokenReference(tiny(0), tiny(1), sentences, teacher=uneven).layers[2] == {}


def test_other_pieces_are_refused_of_a_base_but_not_of_a_teacher(sentences):
    other = tiny(1, architecture=replace(TINY, vocabulary=80))
    with pytest.raises(ValueError, match="cut words into the same pieces"):
        TokenReference(tiny(0), other, sentences)
    reference = TokenReference(tiny(0), tiny(1), sentences, teacher=other)
    assert set(kdx.transferred_share(reference, folds=4)["stage"]) == {"answer"}


def test_words_have_the_sums_of_their_pieces(sentences):
    reference = TokenReference(tiny(0), tiny(1), sentences, teacher=tiny(2))
    some = load_sentences("generated", "test", limit=4).words
    found = token_scores(reference, some)
    pieces = tiny(0).encode(some)
    signed = contributions(reference, (pieces.images, pieces.images))["distilled"]["L1"]
    marks = torch.where(pieces.words < 0, signed[:, 0], 0).sum(1)
    for row, values in enumerate(found["unexplained"]["L1"]):
        assert values.sum() == pytest.approx(float(signed[row].sum() - marks[row]), abs=1e-5)
    assert set(found) == {"unexplained", "handed over"}
    assert max(np.abs(v).max() for v in found["handed over"]["L2"]) < 1e-7  # the first mark alone is read
    assert max(np.abs(v).max() for v in found["handed over"]["L1"]) > 1e-6
