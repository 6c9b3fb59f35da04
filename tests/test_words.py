import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import kdx
from kdx.data.sst import Sentences, load_sentences
from kdx.distil.shipped_texts import table
from kdx.inference import two_factor
from kdx.measure import words
from kdx.networks.text_networks import load_text
from kdx.paths import networks_home
from tests.texts import bag, tiny

TEXT = (("a", "lovely", "film"), ("awful", ",", "not", "lovely"))


def labelled(polarities, labels, classes=("no", "yes")):
    text = tuple(tuple(f"w{i}" for i, _ in enumerate(row)) for row in polarities)
    return Sentences(text, torch.tensor(labels), tuple(map(tuple, polarities)), classes)


def test_scores_of_a_sum_are_its_terms():
    network = bag(TEXT)
    targets = torch.tensor([2, 0])
    found = words.word_scores(network, TEXT, targets)
    weights = network.classifier.embeddings.weight.detach().double()
    for sentence, values, target in zip(TEXT, found.values, targets.tolist(), strict=True):
        for word, value in zip(sentence, values, strict=True):
            ids = network.encode([[word]]).ids[0, 1:-1]
            assert value == pytest.approx(float((weights[ids, target] - weights[0, target]).sum()), abs=1e-5)
    assert found.gap.max() < 1e-5


def test_scores_sum_to_the_change_of_the_logit_whatever_is_computed_at_once():
    network, some = tiny(), load_sentences("generated", "test", limit=12)
    one = words.word_scores(network, some.words, device="cpu")
    assert one.gap.max() <= 0.01
    assert torch.equal(one.targets, one.logits.argmax(1))
    pieces = network.encode(some.words)
    start = torch.where(pieces.words < 0, pieces.ids, 0)
    mask = (pieces.ids != 0).long()
    with torch.no_grad():
        ends = [network.classifier(input_ids=x, attention_mask=mask).logits for x in (pieces.ids, start)]
    change = (ends[0] - ends[1]).gather(1, one.targets[:, None])[:, 0]
    marks = [c - v.sum() for c, v in zip(change.tolist(), one.values, strict=True)]
    assert max(map(abs, marks)) <= 0.02 * float(change.abs().max())  # the marks at both ends do not change themselves
    other = words.word_scores(network, some.words, at_once=16, device="cpu")
    assert max(np.abs(a - b).max() for a, b in zip(one.values, other.values, strict=True)) < 1e-4


def test_a_large_gap_is_halved_by_more_points():
    network, some = tiny(), load_sentences("generated", "test", limit=8)
    coarse = words.word_scores(network, some.words, steps=2, most=2, device="cpu")
    fine = words.word_scores(network, some.words, steps=2, tolerance=1e-3, device="cpu")
    assert set(coarse.steps) == {2}
    assert coarse.gap.max() > fine.gap.max()
    assert fine.steps.max() > 2
    assert fine.gap.max() <= 1e-3


def test_words_that_are_not_seen_have_no_score():
    found = words.word_scores(tiny(), [["film"] * 300, ["the", "\u200b\x00"]], device="cpu").values
    assert np.isnan(found[0]).sum() == 300 - 38  # 40 positions, two of them for marks
    assert np.isnan(found[1]).tolist() == [False, True]


def test_wrong_targets_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ValueError, match="a class for each of 2 sentences"):
        words.word_scores(bag(TEXT), TEXT, torch.tensor([1]))
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ModuleNotFoundError, match=r"kdx\[text\]"):
        words.word_scores(bag(TEXT), TEXT)


def test_agreement_by_hand():
    some = labelled([[1, 0, -1], [-1, -1, 1]], [1, 0])
    values = [np.array([0.5, -9.0, 0.2]), np.array([0.4, -0.1, 0.3])]
    found = kdx.word_agreement(values, some, blocks=2).set_index("score")
    scores, targets = [0.5, 0.2, 0.4, -0.1, 0.3], [1, 0, 1, 1, 0]
    assert found.loc["sign agreement", "value"] == pytest.approx(2 / 5)
    assert found.loc["AUROC", "value"] == pytest.approx(roc_auc_score(targets, scores))
    assert found.loc["AUPRC", "value"] == pytest.approx(average_precision_score(targets, scores))
    assert found.loc["AUROC in a sentence", "value"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["words"].eq(5).all()
    one = kdx.word_agreement(values, some, np.array([True, False]), blocks=2).set_index("score")
    assert one.loc["AUROC", "value"] == 1.0
    assert one["sentences"].eq(1).all()


def test_agreement_of_scores_that_tell_nothing_is_the_share_of_targets():
    some = load_sentences("generated", "test")
    found = kdx.word_agreement(words.baselines(some, some)["always positive"], some).set_index("score")["value"]
    polar = [(p, s) for row, s in zip(some.polarities, some.signs.tolist(), strict=True) for p in row if p]
    share = np.mean([p == s for p, s in polar])
    assert found[["sign agreement", "AUPRC"]].tolist() == pytest.approx([share, share])
    assert found[["AUROC", "AUROC in a sentence"]].tolist() == [0.5, 0.5]


def test_agreement_parts_hold_the_error():
    """The jackknife's interval is that of independent sentences with one word of each kind."""
    rng = np.random.default_rng(0)
    some = labelled([[1, -1]] * 400, [1] * 400)
    values = list(rng.normal([1.0, 0.0], 1.0, (400, 2)))
    found = kdx.word_agreement(values, some).set_index("score")
    hits = (np.array(values) > 0) == [True, False]
    expected = 1.96 * hits.mean(1).std() / 20
    row = found.loc["sign agreement"]
    assert row["high"] - row["value"] == pytest.approx(expected, rel=0.35)
    assert row["parts"].mean() == pytest.approx(row["value"])


def test_agreement_without_words_of_both_kinds_is_missing():
    found = kdx.word_agreement([np.ones(1)] * 2, labelled([[1], [1]], [1, 1]), blocks=2).set_index("score")["value"]
    assert found["sign agreement"] == 1
    assert found[["AUROC", "AUPRC", "AUROC in a sentence"]].isna().all()


def test_agreement_refuses_what_does_not_fit():
    some = labelled([[1], [-1]], [1, 0])
    with pytest.raises(ValueError, match="a score for every word of 2 sentences"):
        kdx.word_agreement([np.ones(2), np.ones(1)], some)
    with pytest.raises(ValueError, match="blocks: expected 2 to 2"):
        kdx.word_agreement([np.ones(1), np.ones(1)], some)


def test_lexica_by_hand():
    train = Sentences((("Good", "film"), ("bad", "film")), torch.tensor([1, 0]), ((1, 0), (-1, 0)), ("no", "yes"))
    some = replace(train, words=(("good", "new"), ("film", "bad")))
    found = words.baselines(some, train)
    assert [v.tolist() for v in found["lexicon of words"]] == [[1, 0], [0, 1]]  # towards each sentence's polarity
    assert found["lexicon of sentences"][0] == pytest.approx([np.log(2), 0])
    assert found["lexicon of sentences"][1] == pytest.approx([0, np.log(2)])
    assert np.abs(found["random"][0]).sum() > 0


def test_networks_are_scored_on_what_they_know():
    some = load_sentences("generated", "test", limit=40)
    network = tiny()
    found = words.score_networks({("a", 1): network, ("b", 2): network}, some, blocks=4, device="cpu")
    right = words.answers_of(network, some, "cpu")
    rows = found[found["network"] == "a"].set_index("score")
    assert rows.loc["accuracy", "value"] == pytest.approx(right["accuracy"].mean())
    assert rows.loc["accuracy of polarity", "value"] == pytest.approx(right["accuracy of polarity"].mean())
    assert len(found) == 12
    answers = words.score_networks({("a", 1): network}, some, explained=False, blocks=4, device="cpu")
    assert answers["score"].tolist() == ["accuracy", "accuracy of polarity"]
    known = words.word_scores(network, some.words, some.labels, device="cpu").values
    alone = kdx.word_agreement(known, some, right["accuracy"], blocks=4).set_index("score")["value"]
    assert rows.loc["AUROC", "value"] == pytest.approx(alone["AUROC"], nan_ok=True)


@pytest.mark.real_data
@pytest.mark.usefixtures("treebank")
def test_completeness_on_200_sentences_of_the_treebank():
    shipped = table()
    some = load_sentences("sst", "test", limit=200)
    network, _ = load_text(networks_home() / "text" / shipped.set_index(["role", "seed"]).loc[("response", 1), "file"])
    found = words.word_scores(network, some.words)
    assert found.gap.max() <= 0.01


def test_networks_of_several_seeds_are_averaged():
    rows = [("a", 1, "AUROC", 0.6, 0.5, 0.7, [0.5, 0.7]), ("a", 2, "AUROC", 0.8, 0.7, 0.9, [0.7, 0.9])]
    rows += [("b", 1, "AUROC", 0.4, 0.3, 0.5, [0.4, 0.4])]
    table = pd.DataFrame(rows, columns=["network", "seed", "score", "value", "low", "high", "parts"])
    found = words.over_seeds(table.assign(parts=table["parts"].map(np.array))).set_index("network")
    assert found.loc["a", "value"] == pytest.approx(0.7)
    assert (found.loc["a", "low"], found.loc["a", "high"]) == pytest.approx(
        two_factor([[0.5, 0.7], [0.7, 0.9]], 0).interval()
    )
    assert found.loc["b", ["value", "low", "high", "seeds"]].tolist() == [0.4, 0.3, 0.5, 1]
    assert found.loc["a", "parts"].shape == (2, 2)
