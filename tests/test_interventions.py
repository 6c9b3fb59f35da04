"""Features are replaced, and pixels deleted."""

import numpy as np
import pytest
import torch

import kdx
from kdx.explain.reference import ANSWER
from tests.networks import Colours, Small

pytestmark = pytest.mark.usefixtures("one_thread")


def blots(n, channels=3, seed=0):
    """Images with a bright blot of each colour somewhere; how bright is what networks of colours answer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, channels, 16, 16)
    places = torch.randint(0, 12, (n, channels, 2), generator=generator)
    for i in range(n):
        for c in range(channels):
            a, b = places[i, c].tolist()
            x[i, c, a : a + 4, b : b + 4] = 4 * torch.rand((), generator=generator)
    return x, places


def pair(teacher=False):
    """A student of two colours, whose base knows one of them, and another."""
    x, _ = blots(200)
    settings = {"teacher": Colours((0, 1))} if teacher else {}
    return kdx.Reference(Colours((0, 1)), Colours((0, 2)), x, **settings)


def test_what_the_base_cannot_express_makes_the_disagreements():
    """The stage is followed by a linear head: without E, the student's answers are predictions from the base's."""
    reference, (x, _) = pair(), blots(150, seed=1)
    table = kdx.replacement(reference, x).set_index(["replaced", "quantity"])
    unexplained, exchanged = (table.loc[kind] for kind in ("unexplained", "exchanged"))
    assert unexplained.loc["disagreements turned", "n"] + unexplained.loc["agreements kept", "n"] == 150
    student, base = (network(x).detach() for network in reference.networks)
    assert unexplained.loc["disagreements turned", "n"] == (student.argmax(1) != base.argmax(1)).sum()
    left = reference.regressions["distilled"]["L1"].left_over(
        *(network.features(x).detach() for network in reference.networks)
    )
    after = student - left.mean((2, 3)) @ reference.networks[0].head.weight.detach().T
    agree = student.argmax(1) == base.argmax(1)
    turned = (after.argmax(1) == base.argmax(1)) & ~agree
    assert unexplained.loc["disagreements turned", "value"] == pytest.approx(float(turned.sum() / (~agree).sum()))
    assert exchanged.loc["agreements kept", "value"] != unexplained.loc["agreements kept", "value"]


def test_a_teacher_that_is_the_students_twin_handed_all_of_it_over():
    reference, (x, _) = pair(teacher=True), blots(100, seed=1)
    table = kdx.replacement(reference, x).set_index(["replaced", "quantity"])["value"]
    assert set(table.index.get_level_values(0)) == {"unexplained", "exchanged", "handed over"}
    assert table["handed over", "disagreements turned"] == pytest.approx(
        table["unexplained", "disagreements turned"], abs=0.05
    )


def test_a_student_that_is_its_base_loses_nothing():
    student, base = Small(seed=0), Small(seed=0)
    x = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    table = kdx.replacement(kdx.Reference(student, base, x[:40]), x[40:])
    kept = table[(table["quantity"] == "agreements kept") & (table["replaced"] == "unexplained")]
    assert kept["value"].min() > 0.9
    none = table[table["quantity"] == "disagreements turned"]
    assert (none["n"] == 0).all()
    assert none["value"].isna().all()
    with pytest.raises(ValueError, match="expected 2 or more, to exchange features, got 1"):
        kdx.replacement(kdx.Reference(student, base, x[:40]), x[:1])


def test_the_blots_that_make_the_difference_are_found_by_deleting_them():
    reference, (x, places) = pair(), blots(60, seed=1)
    truth, wrong = (torch.zeros(60, 16, 16) for _ in range(2))
    for i in range(60):
        for of, c in ((truth, 1), (wrong, 0)):
            a, b = places[i, c].tolist()
            of[i, a : a + 4, b : b + 4] = 1
    curves, areas = kdx.deletion(reference, x, {"truth": truth, "wrong": wrong}, fractions=(16 / 256, 0.4))
    left = curves.set_index(["map", "fraction"])["value"]
    assert left["truth", 16 / 256] < 0.35
    assert left["wrong", 16 / 256] > 0.6
    found = areas.set_index("map")
    assert found.loc["truth", "low"] > 0
    assert found.loc["truth", "low"] > found.loc["wrong", "high"]
    mean = np.mean([left["random", f] - left["truth", f] for f in (16 / 256, 0.4)])
    assert found.loc["truth", "value"] == pytest.approx(mean)
    residual, _ = kdx.deletion(reference, x, {"truth": truth}, direction="residual")
    assert residual.set_index(["map", "fraction"])["value"]["truth", 0.05] > 0.6  # the base does not see this colour


def test_nothing_is_left_of_an_answer_at_the_regression_by_definition():
    reference, (x, _) = pair(), blots(40, seed=1)
    answers = reference.answers_of(x, x)
    r = reference.regressions["distilled"][ANSWER].left_over(*answers)
    flat = torch.zeros(40, 2, 2)
    curves, _ = kdx.deletion(reference, x, {"flat": flat}, fractions=(1e-9,))  # not a pixel
    assert curves["value"].tolist() == pytest.approx([1, 1])
    assert float(r.square().sum()) > 0


def test_networks_are_left_as_they_were_and_bad_input_is_refused():
    reference, (x, _) = pair(), blots(10, seed=1)
    maps = torch.rand(10, 4, 4)
    kdx.deletion(reference, x, {"a": maps})
    kdx.replacement(reference, x)
    assert not any(m._forward_hooks for network in reference.networks for m in network.modules())
    reference.check_weights()
    for settings, message in (
        ({"maps": {"a": maps[1:]}}, r"expected .10, h, w., one per image, got .9, 4, 4. of 'a'"),
        ({"maps": {"random": maps}}, "is the name of the control"),
        ({"maps": {"a": maps}, "fractions": (0.2, 0.1)}, "expected ascending shares"),
        ({"maps": {"a": maps}, "fractions": (0.5, 1.0)}, "expected ascending shares"),
    ):
        with pytest.raises(ValueError, match=message):
            kdx.deletion(reference, x, **settings)
    with pytest.raises(ValueError, match="expected 3 or more, got 2"):
        kdx.deletion(reference, x[:2], {"a": maps[:2]})
