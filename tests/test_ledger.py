"""Gained and lost answers, with exact tests."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import kdx
from kdx.measure.ledger import FEWEST, images_needed, joint_p, paired

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
ANSWERS = {
    "student": torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]),
    "base": torch.tensor([0, 1, 1, 0, 1, 1, 0, 0]),
    "teacher": torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]),
}


def test_counts_by_hand():
    ledger = kdx.Ledger(LABELS, ANSWERS, ("ant", "bee"))
    assert ledger.accuracy().set_index("network")["right"].to_dict() == {"student": 6, "base": 4, "teacher": 7}
    rates = ledger.rates().set_index("quantity")
    assert rates["images"].to_dict() == {"gained": 3, "lost": 1, "changed": 4, "inherited": 1, "own errors": 1}
    assert rates.loc["gained", "value"] == 3 / 8
    crossed = ledger.crossed().set_index(["teacher", "base", "student"])["images"]
    assert crossed["right", "wrong", "right"] == 3
    assert crossed["wrong", "right", "wrong"] == 1
    assert crossed.sum() == len(LABELS)
    assert len(crossed) == 8
    against = ledger.against("base")
    assert (against.difference, against.gained, against.lost, against.n) == (0.25, 3, 1, 8)


def test_the_interval_leaves_out_zero_exactly_where_mcnemar_rejects():
    generator = np.random.default_rng(0)
    sides = set()
    for _ in range(200):
        change = generator.uniform(0.05, 0.6)
        before = generator.random(60) < 0.5
        after = np.where(generator.random(60) < change, generator.random(60) < generator.uniform(0.2, 0.8), before)
        if not (found := paired(before, after)).gained + found.lost:
            continue
        assert found.p == pytest.approx(stats.binomtest(found.gained, found.gained + found.lost).pvalue)
        assert (found.p <= 0.05) == (found.low > 0 or found.high < 0)
        assert found.low <= found.difference <= found.high
        sides.add(found.p <= 0.05)
    assert sides == {True, False}


def test_without_a_change_nothing_is_certain():
    same = paired([True, False] * 10, [True, False] * 10)
    assert (same.difference, same.p) == (0, 1)
    assert same.low == -same.high == pytest.approx(-stats.binomtest(0, 20).proportion_ci(method="exact").high)
    assert images_needed(same) == np.inf
    with pytest.raises(ValueError, match=r"expected two rows .n,. of the same images, got .2,. and .3,."):
        paired([True] * 2, [True] * 3)
    with pytest.raises(ValueError, match="expected two rows"):
        paired([], [])


@pytest.mark.parametrize(("lost", "gained"), [(0.1, 0.2), (0.0, 0.2), (0.02, 0.03), (0.3, 0.3), (0.01, 0.4)])
def test_coverage_of_the_paired_difference(lost, gained):
    """At least 95 %, in simulations with a known difference, whose number of changes is random."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        draw = generator.random(150)
        found = paired(draw < 0.5 + lost, (draw < 0.5) | (draw > 1 - gained))
        inside += found.low <= gained - lost <= found.high
    assert inside / 400 >= 0.95 - 4 * np.sqrt(0.05 * 0.95 / 400) / 2


def groups_of(seed, gain=0.0, n=2000, second=True):
    """A ledger of 10 classes; the student gains in class 3 alone."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    right = {role: generator.random(n) < 0.7 for role in ("student", "base", "second base")}
    right["student"] |= (labels == 3) & (generator.random(n) < gain)
    answers = {role: torch.tensor(np.where(of, labels, (labels + 1) % 10)) for role, of in right.items()}
    if not second:
        del answers["second base"]
    return kdx.Ledger(torch.tensor(labels), answers, [f"class {i}" for i in range(10)])


def test_a_class_that_was_gained_is_found_and_no_other():
    table = groups_of(0, gain=0.9).by_class().set_index("group")
    assert table.index[table["against both"] <= 0.05].tolist() == ["class 3"]
    assert table.loc["class 3", "difference"] > 0
    assert "against both" not in groups_of(0, second=False).by_class()
    false = [(groups_of(seed).by_class()["against both"] <= 0.05).any() for seed in range(40)]
    assert np.mean(false) <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 40)


def test_slices_are_groups_by_value_and_empty_cells_belong_to_none():
    ledger = kdx.Ledger(LABELS, ANSWERS, ("ant", "bee"))
    slices = pd.DataFrame({"light": ["day", "day", "night", "night", None, None, None, "day"], "camera": ["a"] * 8})
    table = ledger.by_slice(slices).set_index("group")
    assert table["n"].to_dict() == {"light = day": 3, "light = night": 2, "camera = a": 8}
    assert table.loc["light = day", ["gained", "lost"]].tolist() == [1, 0]
    assert ledger.by_group({"none": np.zeros(8, bool)}).empty


def test_confusions_that_changed():
    labels = torch.tensor([0] * 30 + [1] * 10)
    base = torch.tensor([1] * 20 + [0] * 10 + [1] * 10)
    student = torch.tensor([1] * 4 + [0] * 26 + [1] * 10)
    table = kdx.Ledger(labels, {"student": student, "base": base}, ("cat", "dog")).confusions()
    assert table[["class", "answer", "base", "student"]].to_numpy().tolist() == [["cat", "dog", 20, 4]]
    assert table.loc[0, "p adjusted"] < 0.001
    few = student.clone()
    few[: 30 - FEWEST] = base[: 30 - FEWEST]
    assert kdx.Ledger(labels, {"student": base, "base": base}, ("cat", "dog")).confusions().empty
    outside = kdx.Ledger(labels, {"student": student + 5 * (student == 1), "base": base}, ("cat", "dog"))
    assert "output 6" in set(outside.confusions()["answer"])


def test_two_comparisons_must_agree():
    up, down = paired([False] * 20, [True] * 12 + [False] * 8), paired([True] * 20, [False] * 12 + [True] * 8)
    assert joint_p(up, up) == up.p
    assert joint_p(up, down) == 1


def test_as_many_images_as_are_needed_find_the_difference():
    """Of pairs that gain 12 % and lose 8 %, so many images find the difference in about 80 % of draws."""
    generator = np.random.default_rng(2)
    draw = lambda n: generator.random(n)  # noqa: E731
    n = round(images_needed(paired(np.arange(100) < 8, (np.arange(100) >= 8) & (np.arange(100) < 20))))
    found = 0
    for _ in range(200):
        d = draw(n)
        found += paired(d < 0.08, (d >= 0.08) & (d < 0.2)).p <= 0.05
    assert 0.68 <= found / 200 <= 0.92


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected those of a student and a base, got no base"):
        kdx.Ledger(LABELS, {"student": LABELS}, ("a", "b"))
    with pytest.raises(ValueError, match="expected 8 of the base, one per label, got 7"):
        kdx.Ledger(LABELS, ANSWERS | {"base": LABELS[1:]}, ("a", "b"))
    with pytest.raises(ValueError, match=r"labels: expected 0 to 0, one per name, got \[1\]"):
        kdx.Ledger(LABELS, ANSWERS, ("a",))
    with pytest.raises(ValueError, match="expected class indices"):
        kdx.Ledger(LABELS.float(), ANSWERS, ("a", "b"))
