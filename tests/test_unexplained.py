import copy

import pandas as pd
import pytest
import torch
from torch import nn

import kdx
from kdx import Reference
from kdx.explain.regression import FitWarning
from kdx.explain.unexplained import contributions, fuse, smooth, unexplained_features
from tests.networks import LAYERS, Colours, blots


def reference_of(student, base, n=60):
    x, _ = blots(n, 1)
    return Reference(student, base, x, layers_student=LAYERS, layers_base=LAYERS)


def test_maps_lie_where_the_student_sees_what_its_base_does_not():
    student, base = Colours((0, 1)), Colours((0, 2))
    x, places = blots(20, 2, strength=2.0)
    maps = kdx.unexplained(reference_of(student, base), x, window=0)
    for direction, colour in (("distilled", 1), ("residual", 2)):
        found = getattr(maps, direction)["L1"].flatten(1)
        assert torch.equal(found.argmax(1), places[:, colour])
        on = found.gather(1, places[:, [colour]]).sum() / found.sum()
        assert on > 0.9


def test_nothing_is_unexplained_of_the_same_features_in_another_basis():
    mix = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    student, base = Colours((0, 1), mix), Colours((0, 1))
    x, _ = blots(20, 2)
    reference = reference_of(student, base)
    maps = kdx.unexplained(reference, x)
    assert max(float(m.max()) for of in (maps.distilled, maps.residual) for m in of.values()) < 1e-6
    share = kdx.unexplained_share(reference, x, folds=4)
    assert share["value"].max() < 1e-6


def test_share_is_one_where_the_base_knows_nothing_of_it():
    student, base = Colours((0,)), Colours((1,))
    x, _ = blots(400, 2)
    share = kdx.unexplained_share(reference_of(student, base), x)
    found = share.set_index(["direction", "stage"])["value"]
    assert found["distilled", "answer"] == pytest.approx(1, abs=0.05)
    assert found["distilled", "L1"] == pytest.approx(1, abs=0.05)
    assert share.columns.tolist() == ["direction", "stage", "value", "low", "high", "n", "folds"]
    answers = share[share["stage"] == "answer"]
    assert ((answers["low"] < 1) & (answers["high"] > 1)).all()


def test_share_of_the_reference_itself_is_read_on_images_that_were_not_fitted():
    """The answers share nothing, and 20 images are too few to learn that from the images that are read."""
    student, base = Colours((0,)), Colours((1,))
    reference = reference_of(student, base, 20)
    share = kdx.unexplained_share(reference, folds=5).set_index(["direction", "stage"])
    pd.testing.assert_frame_equal(
        share, kdx.unexplained_share(reference, reference.inputs, folds=5).set_index(["direction", "stage"])
    )
    assert share["value"]["distilled", "answer"] > 0.95
    with pytest.raises(ValueError, match="folds: expected 3 to 20, the number of images, got 21"):
        kdx.unexplained_share(reference, folds=21)


def test_contributions_of_the_last_stage_add_up_to_what_they_make_of_the_answer():
    """Behind it the network is linear: their sum is r . W mean(E) / V."""
    student, base = Colours((0, 1)), Colours((0, 2))
    x, _ = blots(8, 2)
    reference = reference_of(student, base)
    left = unexplained_features(reference, x)["distilled"]["L1"]
    centre = lambda z: z - z.mean(1, keepdim=True)  # noqa: E731
    z = [centre(network(reference.inputs[0]).detach()) for network in (student, base)]
    answer = reference.regressions["distilled"]["answer"]
    r = answer.left_over(centre(student(x)).detach(), centre(base(x)).detach())
    spread = (z[0] - z[0].mean(0)).square().sum(1).mean()
    expected = (r * centre(left.mean((2, 3)) @ student.head.weight.detach().T)).sum(1) / spread
    found = contributions(reference, (x, x))["distilled"]["L1"].sum((1, 2))
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-5)


def test_networks_of_other_sizes_grids_and_families(one_thread):
    student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    base = kdx.build("mobilenet_v2", 3, "small", 0.25, seed=1)
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = Reference(student, base, (images, images[:, :, :24, :24]))
    maps = kdx.unexplained(reference, (images, images[:, :, :24, :24]))
    for direction, side in (("distilled", 32), ("residual", 24)):
        found = getattr(maps, direction)
        assert found["L1"].shape[0] == 12
        assert found["L1"].shape[1] <= side
        assert all(m.isfinite().all() and (m >= 0).all() for m in found.values())


def test_images_are_explained_alike_alone_and_in_batches_and_networks_are_left_as_they_were(one_thread):
    student = kdx.build("resnet10", 3, "small", 0.125, seed=0).train()
    base = kdx.build("resnet10", 3, "small", 0.125, seed=1)
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = Reference(student, base, images)
    before = copy.deepcopy(student.state_dict())
    together = kdx.unexplained(reference, images)
    alone = kdx.unexplained(reference, images, batch_size=1)
    for direction in ("distilled", "residual"):
        for stage, maps in getattr(together, direction).items():
            torch.testing.assert_close(maps, getattr(alone, direction)[stage], rtol=1e-4, atol=1e-6)
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert not any(m._forward_hooks for m in student.modules())
    assert all(p.grad is None for p in student.parameters())


def test_what_cannot_be_explained_is_refused():
    student, base = Colours((0, 1)), Colours((0, 2))
    reference, (x, _) = reference_of(student, base), blots(4, 0)
    with pytest.raises(ValueError, match="window: expected a share"):
        kdx.unexplained(reference, x, window=2)


def test_inside_inference_mode_and_with_one_output():
    student, base = Colours((0, 1)), Colours((0, 2))
    x, _ = blots(4, 2)
    expected = kdx.unexplained(reference_of(student, base), x)
    with torch.inference_mode():
        found = kdx.unexplained(reference_of(student, base), x.clone())
    assert torch.equal(found.distilled["L1"], expected.distilled["L1"])
    for network in (student, base):
        network.head = nn.Linear(2, 1)
    single = kdx.unexplained(reference_of(student, base), x)
    assert single.distilled["L1"].isfinite().all()
    nn.init.zeros_(base.head.weight)
    with pytest.raises(ValueError, match="the base gives the same answer to every image of the reference"):
        kdx.unexplained(reference_of(student, base), x)


def test_too_few_reference_images_for_the_classes_are_a_warning():
    student, base = (kdx.build("resnet10", 20, "small", 0.125, seed=i) for i in range(2))
    x = torch.rand(12, 3, 16, 16)
    reference = Reference(student, base, x)
    with pytest.warns(FitWarning, match="12 reference images for 20 classes are too few") as caught:
        kdx.unexplained(reference, x)
    assert {w.filename for w in caught} == {__file__}
    with pytest.warns(FitWarning, match="9 reference images for 20 classes are too few") as caught:
        kdx.unexplained_share(reference, folds=4)
    assert {w.filename for w in caught} == {__file__}


def test_a_window_averages_contributions():
    maps = torch.zeros(1, 6, 6)
    maps[0, 2, 2], maps[0, 2, 3] = 9.0, -9.0
    assert smooth(maps, 0.5)[0, 2].tolist() == [0, 1, 0, 0, -1, 0]
    assert torch.equal(smooth(maps, 0), maps)


def test_fused_maps_keep_what_all_stages_agree_on():
    fine, coarse = torch.zeros(2, 4, 4), torch.zeros(2, 2, 2)
    fine[0, 0, 0], fine[0, 3, 3], coarse[0, 0, 0] = 4.0, 4.0, 2.0
    fused = fuse({"L1": fine, "L2": coarse})
    assert fused.shape == (2, 4, 4)
    assert fused[0].argmax() == 0
    assert fused[0, 0, 0] > 10 * fused[0, 3, 3] > 0  # there, the coarse map is at its floor
    assert fused[0].mean() == pytest.approx((fine[0].mean() + coarse[0].mean()) / 2)
    assert fused[1].eq(0).all()  # empty at every stage
    alone = fuse({"L1": fine, "L4": torch.zeros(2, 2, 2)})  # a stage that is empty forbids nothing
    assert alone[0] / alone[0].mean() == pytest.approx(fine[0] / fine[0].mean(), abs=0.01)
    assert torch.equal(fuse({"L1": fine[:1], "L2": coarse[:1]}), fused[:1])  # batch mates do not matter
