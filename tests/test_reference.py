import pytest
import torch
from torch import nn

import kdx
from tests.networks import Small


@pytest.fixture
def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_features_and_answers_are_those_of_the_networks(images):
    student, base = Small(seed=0).train(), Small(6, seed=1)
    reference = kdx.Reference(student, base, images)
    assert (len(reference), reference.stages) == (8, ["L1", "L2", "L3"])
    expected = kdx.activations(base, images, kdx.stages(base, images))
    assert torch.equal(reference.features["L2"][1], expected["L2"])
    logits = student(images).detach()
    torch.testing.assert_close(reference.answers_of(images, images)[0], logits - logits.mean(1, keepdim=True))
    assert student.training


def test_regressions_and_distances_are_computed_once(images):
    reference = kdx.Reference(Small(seed=0), Small(seed=1), images)
    assert reference.regressions is reference.regressions
    assert reference.distances["L1"].shape == (2, 8, 8)
    assert reference.distances is reference.distances


def test_bad_input_is_named(images):
    student, base = Small(), Small(seed=1)
    for message, given in {
        "images: a reference needs at least 5 to compare, got 4": images[:4],
        "images: expected a tensor, or a pair of equal length": (images, images[:5]),
    }.items():
        with pytest.raises(ValueError, match=message):
            kdx.Reference(student, base, given)
    with pytest.raises(ValueError, match="expected the same stages in both networks, got L1, L2, L3 of the student"):
        kdx.Reference(student, base, images, layers_base={"L1": "a"})
    student.d = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="never called"):
        kdx.Reference(student, base, images, layers_student={"L1": "d"}, layers_base={"L1": "a"})
    assert not any(m._forward_hooks for net in (student, base) for m in net.modules())
