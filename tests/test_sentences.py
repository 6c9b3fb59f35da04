"""Sentences hold against the tables they are made from."""

import numpy as np
import pandas as pd
import torch

import kdx
from kdx.intervals import Interval
from kdx.pages.sentences import Evidence, sentences
from kdx.pages.statement import metrics


def ledger(gain=0.0, loss=0.0, second=True, teacher=False, n=1000, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 5
    wrong = (labels + 1) % 5
    right = generator.random(n) < 0.8
    student = np.where(right, generator.random(n) >= loss, generator.random(n) < gain)
    answers = {"student": student, "base": right}
    if second:
        flips = generator.random(n)
        answers["second base"] = np.where(right, flips > 0.05, flips < 0.2)
    if teacher:
        answers["teacher"] = student | (generator.random(n) < 0.5)
    given = {role: torch.tensor(np.where(of, labels, wrong)) for role, of in answers.items()}
    return kdx.Ledger(torch.tensor(labels), given, [f"class {i}" for i in range(5)])


def evidence(found, **more):
    tables = {"classes": found.by_class(), "confusions": found.confusions()}
    return Evidence(len(found.labels), found, **tables | more)


def test_a_gain_is_claimed_against_both_bases_and_not_without_the_second():
    told = " ".join(sentences(evidence(ledger(gain=0.9))))
    assert "is more accurate than its base, by +19" in told
    assert "more than another seed explains" in told
    assert "better on class" in told
    alone = " ".join(sentences(evidence(ledger(gain=0.9, second=False))))
    assert "cannot be told whether another seed would have done the same" in alone
    assert "for want of a second base" in alone
    lost = " ".join(sentences(evidence(ledger(loss=0.3))))
    assert "is less accurate than its base" in lost


def test_of_nothing_nothing_is_claimed():
    found = ledger(gain=0.04, loss=0.01)
    told = " ".join(sentences(evidence(found)))
    assert found.against("base").p > 0.05
    assert "cannot be told from these images" in told
    assert "not clearly different on any class of 5" in told
    assert "No confusion" in told
    assert "a change of accuracy below" in told


def test_half_the_images_contradict_nothing():
    for seed in range(20):
        whole = ledger(gain=0.3, loss=0.05, seed=seed)
        half = kdx.Ledger(whole.labels[::2], {r: a[::2] for r, a in whole.answers.items()}, whole.names)
        one, other = metrics(evidence(whole)), metrics(evidence(half))
        for name in ("accuracy", "negative_flips", "accuracy_gain"):
            assert other[name].high - other[name].low > one[name].high - one[name].low
        words = [{"more", "less"} & set(sentences(evidence(of))[1].split()[:5]) for of in (whole, half)]
        assert len(words[0] | words[1]) <= 1


def test_what_the_teacher_and_features_tell():
    shares = {"student": Interval(0.3, 0.25, 0.35, 9), "second base": Interval(0.2, 0.15, 0.22, 9)}
    handed = {"student": Interval(0.5, 0.45, 0.55, 9), "second base": Interval(0.2, 0.1, 0.3, 9)}
    told = sentences(evidence(ledger(teacher=True), unexplained=shares, handed_over=handed))
    of_features = next(line for line in told if "variance" in line)
    assert "30% [25%, 35%]" in of_features
    assert "more than of a second base's (20% [15%, 22%])" in of_features
    assert "more than any network does that had no teacher" in of_features
    same = sentences(evidence(ledger(), unexplained={role: Interval(0.3, 0.2, 0.4, 9) for role in shares}))
    assert any("no more than the seed" in line for line in same)
    unknown = sentences(evidence(ledger(), unexplained={"student": Interval(np.nan, np.nan, np.nan, 9)}))
    assert any("could not be measured" in line for line in unknown)
    assert not any("nan" in line for line in unknown)
    table = pd.DataFrame(
        [("L4", k, q, v, 0.1, 0.9, n) for k, v in (("unexplained", 0.7), ("exchanged", 0.2))
         for q, n in (("disagreements turned", 12), ("agreements kept", 50))],
        columns=["stage", "replaced", "quantity", "value", "low", "high", "n"],
    )  # fmt: skip
    told = sentences(evidence(ledger(), replaced={"student": table}))
    assert any("70% [10%, 90%] of the 12 answers that differ become the base's" in line for line in told)


def test_without_labels_nothing_is_said_about_right_and_wrong():
    found = Evidence(40, changed={"student": Interval(0.1, 0.05, 0.2, 40)}, caveats=["Labels are not known."])
    told = sentences(found)
    assert "images without labels" in told[0]
    assert not any("accura" in line for line in told)
