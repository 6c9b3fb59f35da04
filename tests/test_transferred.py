import numpy as np
import pandas as pd
import pytest
import torch

import kdx
from kdx.explain.regression import FitWarning
from kdx.explain.transferred import PARTS, answered_strength
from tests.networks import LAYERS, Colours, Small, blots

ALL = {f"layers_{name}": LAYERS for name in ("student", "base", "teacher")}


def reference_of(student, base, teacher, n=300, **layers):
    x, _ = blots(n, 1)
    return kdx.Reference(Colours(student), Colours(base), x, teacher=Colours(teacher), **ALL | layers)


def shares(reference, **settings):
    table = kdx.transferred_share(reference, **settings).set_index(["of", "stage", "part"])
    return table["value"]


@pytest.mark.parametrize(
    ("student", "base", "teacher", "parts"),
    [
        ((0, 1), (0,), (1,), (1 / 2, 1 / 2, 0)),
        ((0, 1), (0,), (0, 1), (1 / 2, 1 / 2, 0)),
        ((0, 1, 2), (0,), (0, 1), (1 / 3, 1 / 3, 1 / 3)),
        ((0, 1), (0,), (2,), (1 / 2, 0, 1 / 2)),
        ((0, 1), (0, 1), (0, 1, 2), (1, 0, 0)),
    ],
)
def test_parts_of_a_student_whose_colours_come_from_base_and_teacher(student, base, teacher, parts):
    """Answers are the amounts of colours, which are independent and vary alike."""
    reference = reference_of(student, base, teacher)
    found = shares(reference)
    assert found["student", "answer"][list(PARTS["student"][:3])].tolist() == pytest.approx(list(parts), abs=0.07)
    assert found["student", "L1"]["handed over"] == pytest.approx(parts[1], abs=0.07)
    assert found["student", "answer"][:3].sum() == pytest.approx(1, abs=1e-9)
    new, both = set(teacher) - set(base), set(teacher) & set(student) - set(base)
    if new:
        assert found["teacher", "answer"]["taken, of unexplained"] == pytest.approx(len(both) / len(new), abs=0.05)


def test_several_references_give_their_own_tables_and_share_passes():
    x, _ = blots(120, 1)
    base, teacher, *students = (Colours(of) for of in ((0,), (0, 1), (0, 1, 2), (1,)))
    settings = {"teacher": teacher, **ALL}
    several = {name: kdx.Reference(one, base, x, **settings) for name, one in zip("ab", students, strict=True)}
    calls = []
    for network in (base, teacher, students[0]):
        network.register_forward_hook(lambda module, *_: calls.append(module))
    together = kdx.transferred_share(several, folds=3)
    assert [calls.count(network) for network in (base, teacher, students[0])] == [3, 3, 3]
    assert together.columns[0] == "network"
    for name, reference in several.items():
        alone = kdx.transferred_share(reference, folds=3)
        of_it = together[together["network"] == name].drop(columns="network").reset_index(drop=True)
        pd.testing.assert_frame_equal(of_it, alone, check_exact=True)


def test_several_references_over_other_images_share_nothing():
    x, y = (blots(60, seed)[0] for seed in (1, 2))
    base, teacher = Colours((0,)), Colours((0, 1))
    two = {n: kdx.Reference(Colours((0, 1)), base, of, teacher=teacher, **ALL) for n, of in {"x": x, "y": y}.items()}
    together = kdx.transferred_share(two, folds=3)
    alone = kdx.transferred_share(two["y"], folds=3)
    assert together.loc[together["network"] == "y", "value"].tolist() == alone["value"].tolist()
    short = kdx.Reference(Colours((0, 1)), base, x[:50], teacher=teacher, **ALL)
    with pytest.raises(ValueError, match=r"expected one or more with as many images each, got images \[50, 60\]"):
        kdx.transferred_share(two | {"short": short}, folds=3)
    with pytest.raises(ValueError, match="expected one or more"):
        kdx.transferred_share({})


def test_a_teacher_that_was_shown_other_images_handed_nothing_over():
    """Of the answers. Features also tell where in the image they are, and that it still knows."""
    networks = [kdx.build("resnet10", 10, "small", 0.125, seed=i) for i in range(3)]
    x = torch.rand(300, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for shift in range(1, 6):
        reference = kdx.Reference(*networks[:2], (x, x, x.roll(shift, 0)), teacher=networks[2], layers_teacher={})
        found.append(shares(reference)["student", "answer", "handed over"])
    assert sum(found) / 5 == pytest.approx(0, abs=0.01)
    assert shares(kdx.Reference(*networks[:2], x, teacher=networks[2]))["student", "answer", "handed over"] > 0.015


@pytest.mark.parametrize("strength", [0.0, 0.38, 1.0])
def test_strength_is_how_far_the_student_follows(strength):
    student = Colours((0, 1))
    student.head.weight.data[:, 1] *= strength
    x, _ = blots(400, 1)
    found = kdx.transferred_strength(kdx.Reference(student, Colours((0,)), x, teacher=Colours((0, 1)), **ALL))
    assert found.mean == pytest.approx(strength, abs=0.02)
    assert found.low < strength < found.high
    table = kdx.transferred_share(kdx.Reference(student, Colours((0,)), x, teacher=Colours((0, 1)), **ALL))
    taken = table.set_index(["of", "stage", "part"])["value"]["teacher", "answer", "taken, of unexplained"]
    assert taken == pytest.approx(float(strength > 0), abs=0.01)  # it follows exactly, however far


def test_maps_lie_where_the_student_sees_what_its_teacher_and_not_its_base_sees():
    reference = reference_of((0, 1, 2), (0,), (0, 1))
    x, places = blots(20, 2, strength=2.0)
    maps = kdx.transferred(reference, x, window=0)
    found = maps.distilled["L1"].flatten(1)
    assert torch.equal(found.argmax(1), places[:, 1])
    assert found.gather(1, places[:, [1]]).sum() / found.sum() > 0.9
    unexplained = kdx.unexplained(reference, x, window=0).distilled["L1"].flatten(1)
    assert unexplained.gather(1, places[:, [2]]).sum() / unexplained.sum() > 0.3  # the student's own
    assert maps.fused.shape == (20, 6, 6)


@pytest.mark.parametrize("teacher", ["a function", "a network without the stages", "layers_teacher={}"])
def test_of_some_teachers_only_the_answers_are_used(teacher):
    network, layers = Colours((0, 1)), {"layers_student": LAYERS, "layers_base": LAYERS}
    if teacher == "a function":
        given = lambda x: network(x).log_softmax(1).detach()  # noqa: E731
    elif teacher == "layers_teacher={}":
        given, layers = network, layers | {"layers_teacher": {}}
    else:
        given, layers = network, layers | {"layers_teacher": {"B1": "features"}}
    x, _ = blots(300, 1)
    reference = kdx.Reference(Colours((0, 1)), Colours((0,)), x, teacher=given, **layers)
    table = kdx.transferred_share(reference)
    assert set(table["stage"]) == {"answer"}
    assert table.set_index(["of", "part"])["value"]["student", "handed over"] == pytest.approx(0.5, abs=0.07)
    shown, places = blots(10, 2, strength=2.0)
    assert torch.equal(kdx.transferred(reference, shown, window=0).distilled["L1"].flatten(1).argmax(1), places[:, 1])


def test_teachers_of_another_family_and_input(one_thread):
    student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    base = kdx.build("resnet10", 3, "small", 0.125, seed=1)
    teacher = kdx.build("mobilenet_v2", 5, "small", 0.25, seed=2)
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    three = (x, x, x[:, :, :24, :24])
    reference = kdx.Reference(student, base, three, teacher=teacher)
    table = kdx.transferred_share(reference, folds=4)
    assert table["value"].notna().all()
    maps = kdx.transferred(reference, tuple(x[:3] for x in three))
    assert all(m.shape[0] == 3 and m.isfinite().all() for m in maps.distilled.values())
    pair = kdx.unexplained_share(reference, folds=4)  # is the same with and without a teacher
    pd.testing.assert_frame_equal(pair, kdx.unexplained_share(kdx.Reference(student, base, x), folds=4))


def test_networks_are_left_as_they_were_and_changes_are_seen():
    networks = [Small(seed=i).train() for i in range(3)]
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = kdx.Reference(*networks[:2], x, teacher=networks[2])
    kdx.transferred(reference, x[:2])
    with torch.inference_mode():
        kdx.transferred(reference, x[:2].clone())
    assert all(network.training for network in networks)
    assert not any(m._forward_hooks for network in networks for m in network.modules())
    networks[2].a.weight.data.mul_(1.01)
    for use in (lambda: kdx.transferred(reference, x[:2]), lambda: kdx.transferred_share(reference, folds=3)):
        with pytest.raises(ValueError, match="the weights of the teacher changed"):
            use()


def test_bad_input_is_named():
    student, base = Small(seed=0), Small(seed=1)
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for same in (student, base):
        with pytest.raises(ValueError, match="teacher: expected a third network, got the"):
            kdx.Reference(student, base, x, teacher=same)
    without = kdx.Reference(student, base, x)
    for use in (lambda: kdx.transferred(without, x), lambda: kdx.transferred_share(without)):
        with pytest.raises(ValueError, match="reference: expected one with a teacher"):
            use()
    reference = kdx.Reference(student, base, x, teacher=Small(seed=2))
    with pytest.raises(ValueError, match="window: expected a share"):
        kdx.transferred(reference, x, window=2)
    with pytest.raises(ValueError, match="images: expected a tensor, or 3 of them of equal length"):
        kdx.transferred(reference, (x, x))
    with pytest.raises(ValueError, match="folds: expected 3 to 12"):
        kdx.transferred_share(reference, folds=2)
    with pytest.raises(ValueError, match="teacher: expected the 4 classes of the student, got 3"):
        kdx.transferred_strength(kdx.Reference(student, base, x, teacher=Small(3)))
    many = [kdx.build("resnet10", 20, "small", 0.125, seed=i) for i in range(3)]
    few = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.warns(FitWarning, match="27 images to fit on for 40 regressors.* use 600 or more"):
        kdx.transferred_share(kdx.Reference(*many[:2], few, teacher=many[2]))


def test_strength_of_one_output_is_that_of_two():
    generator = torch.Generator().manual_seed(0)
    base, beyond = torch.randn(2, 1000, 1, generator=generator)
    x = torch.cat([base, beyond], 1)[:, :, None, None]

    class Sums(torch.nn.Module):
        def __init__(self, of_base, of_other):
            super().__init__()
            self.features = torch.nn.Conv2d(2, 1, 1, bias=False)
            self.features.weight.data = torch.tensor([of_base, of_other]).view(1, 2, 1, 1)

        def forward(self, x):
            return self.features(x).mean((2, 3))

    reference = kdx.Reference(Sums(1.0, 0.5), Sums(1.0, 0.0), x, teacher=Sums(1.0, 1.0), **ALL)
    assert kdx.transferred_strength(reference).mean == pytest.approx(0.5, abs=0.01)


def test_strength_of_answers_is_that_of_their_networks():
    reference = reference_of((0, 1), (0,), (0, 1), n=60)
    logits = reference.answers_of(*reference.inputs)
    assert answered_strength(*logits).mean == pytest.approx(kdx.transferred_strength(reference).mean, abs=1e-9)
    with pytest.raises(ValueError, match="expected answers to the student's 60 images, got 59; ask it again"):
        answered_strength(logits[0], logits[1][:59], logits[2])


def test_a_teacher_with_the_answers_of_the_base_has_no_strength():
    x, _ = blots(100, 1)
    reference = kdx.Reference(Colours((0, 1)), Colours((0,)), x, teacher=Colours((0,)), **ALL)
    assert all(np.isnan(kdx.transferred_strength(reference)[:3]))


def test_few_images_are_a_warning():
    networks = [kdx.build("resnet10", 20, "small", 0.125, seed=i) for i in range(3)]
    x = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = kdx.Reference(*networks[:2], x, teacher=networks[2])
    with pytest.warns(FitWarning, match="27 images to fit on for 60 regressors"):
        kdx.transferred_strength(reference)
    with pytest.warns(
        FitWarning, match="30 images to fit on for 40 regressors, the answers of base and teacher"
    ) as caught:
        kdx.transferred(reference, x[:1])
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: torch.full((len(x), 3), torch.nan), "teacher: expected finite logits"),
        (lambda x: torch.ones(1, 3), "expected a function that returns .n, classes. for n images, got .1, 3. for 2"),
        (lambda x: torch.ones(len(x)), "expected a function that returns .n, classes. for n images, got .2,. for 2"),
    ],
)
def test_functions_that_do_not_answer_are_refused_at_once(answer, message):
    x = torch.randn(12, 3, 16, 16)
    with pytest.raises(ValueError, match=message):
        kdx.Reference(Small(seed=0), Small(seed=1), x, teacher=answer)


def test_a_service_may_return_arrays():
    network = Small(seed=2)
    x = torch.randn(140, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    of_array, of_network = (
        kdx.Reference(Small(seed=0), Small(seed=1), x, teacher=teacher, layers_teacher={})
        for teacher in (lambda x: network(x).detach().numpy(), network)
    )
    expected = kdx.transferred_share(of_network)  # whose images are in another memory format
    pd.testing.assert_frame_equal(kdx.transferred_share(of_array), expected, rtol=1e-3, atol=1e-5)
