import math

import pytest
import torch
import torch.nn.functional as F

from kdx.distil.detector_techniques import FocalGlobal, SeenPyramid, attention, masks
from kdx.distil.rebuilding_techniques import Prior

NONE = {"foreground_weight": 0.0, "background_weight": 0.0, "attention_weight": 0.0, "relation_weight": 0.0}
BOX = torch.tensor([[0.0, 0, 16, 16]])  # of 32 x 64 pixels: the first place of a level of 2 x 4


def seen(features, boxes=(BOX,), size=(32, 64)):
    n = len(next(iter(features.values())))
    rows = torch.arange(n)
    return SeenPyramid(torch.zeros(n, 0), features, rows, rows[:0], boxes=list(boxes), size=size)


def loss(student, teacher, boxes=(BOX,), **weights):
    part = FocalGlobal(**(NONE | weights))
    ours, theirs = seen({"P3": student}, boxes), seen({"P3": teacher}, boxes)
    return part.guidance(ours, theirs, part.adapter(ours, theirs, {})).item()


def test_masks_by_hand():
    boxes = torch.tensor([[0.0, 0, 32, 32], [0, 0, 16, 16], [40, 20, 41, 21]])
    inside, outside = masks([boxes, boxes[:0]], (32, 64), (2, 4))
    assert inside[0].tolist() == [[1, 0.25, 0, 0], [0.25, 0.25, 1, 0]]  # the smaller box wins; a tiny one has a place
    torch.testing.assert_close(outside[0], torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1.0]]) / 3)
    assert inside[1].sum() == 0
    assert outside[1].eq(1 / 8).all()


def test_boxes_everywhere_leave_nothing_outside():
    inside, outside = masks([torch.tensor([[0.0, 0, 64, 32]])], (32, 64), (2, 4))
    assert inside.eq(1 / 8).all()
    assert outside.sum() == 0


def test_attention_by_hand():
    features = torch.tensor([[[[2.0, -2.0]], [[0.0, 4.0]]]])  # two channels, two places
    places, channels = attention(features, 0.5)
    e = math.exp
    torch.testing.assert_close(places.flatten(), 2 * torch.tensor([e(2), e(6)]) / (e(2) + e(6)))  # means 1, 3
    torch.testing.assert_close(channels.flatten(), 2 * torch.tensor([0.5, 0.5]))  # means 2, 2


def test_foreground_and_background_by_hand():
    """The teacher is 0, so its attention is 1 throughout; the student is 1 in one channel and 2 in the other."""
    student = torch.tensor([1.0, 2.0])[None, :, None, None].expand(1, 2, 2, 4).contiguous()
    teacher = torch.zeros(1, 2, 2, 4)
    assert loss(student, teacher, foreground_weight=3.0) == pytest.approx(3 * (1 + 4))  # one place of weight 1
    assert loss(student, teacher, background_weight=3.0) == pytest.approx(3 * (1 + 4))  # seven of 1/7
    student[:, :, 0, 0] = 0
    assert loss(student, teacher, foreground_weight=3.0) == 0
    assert loss(student, teacher, background_weight=3.0) == pytest.approx(15)


def test_the_teachers_attention_weighs_differences():
    teacher = torch.zeros(1, 1, 2, 4)
    teacher[..., 0, 0] = 1.0
    student = teacher + 1
    places = 8 * F.softmax(teacher.flatten() / 0.5, 0)  # one channel has the attention 1
    expected = 2 * places[0] + 5 * places[1:].sum() / 7
    assert loss(student, teacher, foreground_weight=2.0, background_weight=5.0) == pytest.approx(expected.item())


def test_attention_and_relation_by_hand():
    teacher, student = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
    student[:, 0] = 0.5 * math.log(3)  # of the channels, 3/4 and 1/4 instead of 1/2 each; places stay alike
    assert loss(student, teacher, attention_weight=1.0) == pytest.approx(2 * (0.25 + 0.25), rel=1e-5)
    assert loss(student, teacher, relation_weight=1.0) == pytest.approx(8 * (0.5 * math.log(3)) ** 2, rel=1e-5)


def test_sums_are_over_levels_and_means_over_images():
    torch.manual_seed(0)
    one, two = torch.rand(2, 1, 2, 2, 4)
    single = [loss(s, t, [BOX], foreground_weight=1.0) for s, t in ((one, two), (two, one))]
    both = loss(torch.cat([one, two]), torch.cat([two, one]), [BOX, BOX], foreground_weight=1.0)
    assert both == pytest.approx(sum(single) / 2, rel=1e-5)
    part = FocalGlobal(**NONE | {"foreground_weight": 1.0})
    ours, theirs = seen({"P3": one, "P4": two}), seen({"P3": two, "P4": one})
    assert part.guidance(ours, theirs, part.adapter(ours, theirs, {})).item() == pytest.approx(sum(single), rel=1e-5)


def test_a_perfect_student_has_no_loss_and_other_channels_are_aligned():
    torch.manual_seed(0)
    features = torch.rand(1, 4, 2, 4)
    full = dict.fromkeys(NONE, 1.0)
    assert loss(features, features, **full) == 0
    narrow = seen({"P3": torch.rand(1, 3, 2, 4)})
    part = FocalGlobal()
    adapter = part.adapter(narrow, seen({"P3": features}), {})
    assert adapter["P3"]["align"].weight.shape == (4, 3, 1, 1)
    part.guidance(narrow, seen({"P3": features}), adapter).backward()
    assert adapter["P3"]["align"].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="P3: expected levels of one size"):
        part.guidance(seen({"P3": torch.rand(1, 3, 2, 2)}), seen({"P3": features}), adapter)


def test_prior_rebuilds_levels_as_it_does_stages():
    torch.manual_seed(0)
    ours, theirs = (seen({"P3": torch.rand(4, 3, 2, 4), "P5": torch.rand(4, 3, 1, 2)}, [BOX] * 4) for _ in range(2))
    part = Prior(prior_width=4, prior_blocks=1)
    adapter = part.adapter(ours, theirs, {})
    assert sorted(adapter) == ["P3", "P5"]
    assert part.guidance(ours, theirs, adapter).item() > 0


def test_useless_weights_are_refused():
    with pytest.raises(ValueError, match="foreground_weight: expected a finite weight"):
        FocalGlobal(foreground_weight=-1.0)
    with pytest.raises(ValueError, match="focal_temperature"):
        FocalGlobal(focal_temperature=0.0)
