import pytest
import torch

import kdx
from kdx.distil.detector_techniques import FocalGlobal
from kdx.distil.detector_training import _batch, train_detector
from kdx.distil.logit_techniques import Label
from kdx.distil.rebuilding_techniques import Prior
from kdx.networks.fpn_detectors import build_detector
from tests.boxes import squares

RECIPE = kdx.Recipe(epochs=3, batch_size=4, lr=0.02)


def detector(seed, width=0.0625):
    return build_detector("fcos", f"resnet10@{width}", 2, (64, 96), seed=seed)


def trained(part, state=None, epochs=3, stepped=lambda: None):
    """The student after some epochs, their losses, and the last state."""
    student = detector(1)
    teacher = detector(2, 0.125) if part.needs_teacher else None
    losses = []
    for loss, found in train_detector(student, teacher, squares(), part, RECIPE, 5, stepped, state):
        losses.append(loss)
        if len(losses) == epochs:
            return student, losses, found
    return student, losses, found


@pytest.mark.parametrize("part", [Label(), FocalGlobal(), Prior(prior_width=4, prior_blocks=1)], ids=lambda p: p.name)
def test_an_interrupted_training_goes_on_exactly(part, tmp_path):
    whole, losses, _ = trained(part)
    _, first, state = trained(part, epochs=1)
    torch.save(state, tmp_path / "state")
    again, rest, _ = trained(part, torch.load(tmp_path / "state", weights_only=True))
    assert first + rest == losses
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert losses[-1] < losses[0]


def test_detectors_are_trained_with_the_kernels_of_classifiers(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    used, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: (used.append(torch.backends.mkldnn.enabled), backward(loss))
    )
    trained(Label(), epochs=1)  # of a narrow network
    assert used == [False] * 2
    next(train_detector(detector(1, 0.125), None, squares(), Label(), RECIPE, 5, lambda: None))
    assert used == [False] * 2 + [True] * 2


def test_boxes_are_mirrored_with_their_images():
    torch.manual_seed(0)
    data = squares(40)
    images, targets = _batch(data, torch.device("cpu"))
    mirrored = 0
    for i, target in enumerate(targets[:-1]):  # the last is empty
        left, top, right, bottom = map(int, target["boxes"][0])
        assert images[i, i % 2, top:bottom, left:right].eq(1).all()
        mirrored += not torch.equal(target["boxes"], data.boxes[i])
    assert 8 < mirrored < 32
    assert targets[-1]["boxes"].shape == (0, 4)


def test_every_step_is_told_and_the_teacher_stays_as_it_was():
    steps = []
    trained(Label(), epochs=1, stepped=lambda: steps.append(1))
    assert len(steps) == 2
    teacher = detector(2, 0.125).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    next(train_detector(detector(1), teacher, squares(), FocalGlobal(), RECIPE, 5, lambda: None))
    assert teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
