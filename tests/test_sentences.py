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
    told = sentences(evidence(ledger(gain=0.9)))
    assert told[0].startswith("In short: more accurate, 0 right answers of the base lost and 198 gained")
    assert "is more accurate than its base, by 19.8 points [1" in told[2]
    assert "more than the one other seed that was given shows" in told[2]
    assert any("better on class" in line for line in told)
    alone = sentences(evidence(ledger(gain=0.9, second=False)))
    assert "cannot be told whether another seed would have done the same" in alone[2]
    assert "for want of a second base" in alone[-1]
    lost = sentences(evidence(ledger(loss=0.3)))
    assert "is less accurate than its base, by 2" in lost[2]
    assert "-" not in lost[2].partition("by ")[2].partition("points")[0]


def test_a_second_base_that_is_better_takes_the_claim_back():
    found = ledger(gain=0.5)
    right = found.labels.clone()
    answers = dict(found.answers) | {"second base": right}
    told = sentences(evidence(kdx.Ledger(found.labels, answers, found.names)))
    assert told[0].startswith("In short: no clear change of accuracy")
    assert "but less accurate than the second base, by" in told[2]
    same = kdx.Ledger(found.labels, dict(answers) | {"student": found.answers["base"]}, found.names)
    assert "it is less accurate than the second base, by" in sentences(evidence(same))[2]


def test_of_nothing_nothing_is_claimed():
    found = ledger(gain=0.04, loss=0.01)
    told = " ".join(sentences(evidence(found)))
    assert found.against("base").p > 0.05
    assert "cannot be told from these images" in told
    assert "not clearly different on any class of 5" in told
    assert "No confusion" in told
    assert "whether accuracy changed; to show a difference as large as that observed takes about" in told


def test_half_the_images_contradict_nothing():
    for seed in range(20):
        whole = ledger(gain=0.3, loss=0.05, seed=seed)
        half = kdx.Ledger(whole.labels[::2], {r: a[::2] for r, a in whole.answers.items()}, whole.names)
        both = [Evidence(len(of.labels), of) for of in (whole, half)]
        one, other = map(metrics, both)
        for name in ("accuracy", "negative_flips", "accuracy_gain"):
            assert other[name].high - other[name].low > one[name].high - one[name].low
        words = [{"more", "less"} & set(sentences(of)[2].split()[:5]) for of in both]
        assert len(words[0] | words[1]) <= 1


def test_what_the_teacher_and_features_tell():
    shares = {"student": Interval(0.3, 0.25, 0.35, 9), "second base": Interval(0.2, 0.15, 0.22, 9)}
    handed = {"student": Interval(0.5, 0.45, 0.55, 9), "second base": Interval(0.2, 0.1, 0.3, 9)}
    told = sentences(evidence(ledger(teacher=True), unexplained=shares, handed_over=handed))
    of_features = next(line for line in told if "vary over images" in line)
    assert "30% [25%, 35%]" in of_features
    assert "more than the second base's (20% [15%, 22%])" in of_features
    assert "more than of the second base's (20% [10%, 30%]), which had no teacher" in of_features
    same = sentences(evidence(ledger(), unexplained={role: Interval(0.3, 0.2, 0.4, 9) for role in shares}))
    assert any("not clearly unlike the second base's" in line for line in same)
    unknown = sentences(evidence(ledger(), unexplained={"student": Interval(np.nan, np.nan, np.nan, 9)}))
    assert any("could not be measured" in line for line in unknown)
    none = Interval(np.nan, np.nan, np.nan, 9)
    unknown += sentences(evidence(ledger(), unexplained=shares, handed_over=dict.fromkeys(shares, none)))
    unknown += sentences(evidence(ledger(), unexplained=shares, handed_over=handed | {"second base": none}))
    assert not any("nan" in line for line in unknown)
    wide = {role: Interval(0.9, 0.2, 1.6, 9) for role in shares}
    assert any("90% [20%, 100%]" in line for line in sentences(evidence(ledger(), unexplained=wide)))
    table = pd.DataFrame(
        [("L4", k, q, v, 0.1, 0.9, n) for k, v in (("unexplained", 0.7), ("exchanged", 0.2))
         for q, n in (("disagreements turned", 12), ("agreements kept", 50))],
        columns=["stage", "replaced", "quantity", "value", "low", "high", "n"],
    )  # fmt: skip
    told = sentences(evidence(ledger(), replaced={"student": table}))
    assert any("70% [10%, 90%] of the 12 answers that differ become the base's" in line for line in told)


def detectors(**of):
    """``new_detectors`` of one earlier stage and the deepest, where networks have these shares of new detectors."""
    rows = [
        (role.replace("_", " "), stage, "beyond", share, share - 0.05, share + 0.05, 300)
        for role, found in of.items()
        for stage, share in (("L3", 0.9), ("L4", found))
    ]
    return pd.DataFrame(rows, columns=["network", "stage", "count", "value", "low", "high", "n"])


def test_new_detectors_are_told_with_their_floor():
    table = detectors(student=0.3, second_base=0.1)
    told = sentences(evidence(ledger(), detectors=table))
    line = next(line for line in told if "units at L4" in line)
    assert line.startswith("30% [25%, 35%] of the student's units at L4 detect a concept of the probe that no unit")
    assert line.endswith("more than the second base's (10% [5%, 15%]).")
    same = " ".join(sentences(evidence(ledger(), detectors=detectors(student=0.3, second_base=0.28))))
    assert "not clearly unlike the second base's" in same
    alone = " ".join(sentences(evidence(ledger(second=False), detectors=detectors(student=0.3))))
    assert "how much of this is the seed cannot be told without a second base" in alone
    assert "units at" not in " ".join(sentences(evidence(ledger())))
    found = metrics(evidence(ledger(), detectors=table))
    assert (found["new_detectors"].value, found["new_detectors"].n) == (0.3, 300)
    assert found["second_base_new_detectors"].value == 0.1


def test_without_labels_nothing_is_said_about_right_and_wrong():
    found = Evidence(40, changed={"student": Interval(0.1, 0.05, 0.2, 40)}, caveats=["Labels are not known."])
    told = sentences(found)
    assert "images without labels" in told[0]
    assert not any("accura" in line for line in told)


def changes(**shifts):
    """Differences of robustness from base and second base: 15 rows each, all 0 but those given, and their means."""
    rows = []
    for role in ("base", "second base"):
        for corruption in ("noise", "blur", "JPEG", "contrast", "rotation"):
            for strength in (1, 2, 3):
                shift = shifts.get(f"{corruption}{strength}", 0.0)
                rows.append(
                    (role, corruption, strength, shift, shift - 0.03, shift + 0.03, 1e-4 if shift else 0.9, 200)
                )
        rows.append((role, "", 0, *shifts.get(role.replace(" ", "_"), (0.0, -0.01, 0.01)), 0.5, 200))
    columns = ["network", "corruption", "strength", "difference", "low", "high", "p", "n"]
    return pd.DataFrame(rows, columns=columns)


def test_robustness_is_claimed_against_both_and_one_corruption_is_not_hidden_by_the_mean():
    told = " ".join(sentences(evidence(ledger(), robustness=changes(noise1=-0.08))))
    assert "neither clearly more nor fewer corrupted images right (+0.0 points [-1.0, +1.0])" in told
    assert "clearly fewer under noise of strength 1" in told
    alone = changes(base=(0.03, 0.01, 0.05), second_base=(-0.04, -0.06, -0.02))
    told = " ".join(sentences(evidence(ledger(), robustness=alone)))
    assert "neither clearly more nor fewer" in told
    assert "not so against the second base" in told
    found = metrics(evidence(ledger(), robustness=alone))["robustness_change"]
    assert (found.value, found.n) == (0.03, 200)


def test_calibration_is_claimed_against_both():
    labels = torch.arange(300) % 2
    unsure = torch.where(torch.eye(2)[labels] > 0, 0.6, 0.4)
    sure = torch.where(torch.eye(2)[labels] > 0, 0.9, 0.1)
    for second, word in ((unsure, "fit the labels better"), (sure, "neither clearly better nor worse")):
        table = kdx.calibration({"student": sure, "base": unsure, "second base": second}, labels)
        assert any(word in line for line in sentences(evidence(ledger(), calibration=table)))


def test_sentences_on_features_show_the_second_base():
    table = pd.DataFrame(
        [("L4", k, q, 0.7, 0.1, 0.9, 12) for k in ("unexplained", "exchanged")
         for q in ("disagreements turned", "agreements kept")],
        columns=["stage", "replaced", "quantity", "value", "low", "high", "n"],
    )  # fmt: skip
    told = " ".join(sentences(evidence(ledger(), replaced={"student": table, "second base": table})))
    assert "the second base in its place: 70% [10%, 90%]; so this tells what two networks differ in" in told


def test_favourite_answers_of_guessers_are_no_gains():
    labels = torch.arange(900) % 3
    answers = {role: torch.full((900,), i) for i, role in enumerate(("base", "student"))}
    answers["second base"] = answers["base"]
    found = kdx.Ledger(labels, answers, ("a", "b", "c"))
    assert (found.by_class()["against both"] <= 0.05).sum() == 2
    told = " ".join(sentences(evidence(found)))
    assert "not clearly different on any class of 3" in told
    assert "No confusion" in told
    knowing = kdx.Ledger(labels, answers | {"student": labels}, ("a", "b", "c"))
    assert "better on b, c" in " ".join(sentences(evidence(knowing)))
