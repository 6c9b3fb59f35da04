import copy

import pytest
import torch
from torch import nn

import kdx
from kdx.explain import reference as module
from kdx.explain.regression import FitWarning, Moments, Regression
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


def test_regressions_hold_no_features_and_are_those_of_all_at_once(images, monkeypatch):
    reference = kdx.Reference(Small(seed=0), Small(6, seed=1), images)
    held = []
    monkeypatch.setattr(module, "AT_ONCE", 2 * images[0].numel())
    monkeypatch.setattr(kdx.Reference, "outputs_of", counted(kdx.Reference.outputs_of, held))
    found = reference.regressions["residual"]["L2"]
    assert "features" not in vars(reference)
    assert set(held) == {2}  # images at a time
    student, base = reference.features["L2"]
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tensor_split(2)
    expected = Regression.fit([Moments.of(base[half], student[half]) for half in rows])
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-3, atol=1e-5)


def dataset():
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return kdx.Dataset(pixels, torch.arange(12) % 10, kdx.DATASETS["shapes"])


def counted(method, counts):
    def count(self, *images, **settings):
        counts.append(len(images[0]))
        return method(self, *images, **settings)

    return count


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_are_kept_once_also_after_evaluate(layout):
    student, base = (Small(10, seed=i).to(memory_format=layout) for i in range(2))
    data = dataset()
    kdx.evaluate(student, data, "cpu")
    assert student.a.weight.is_contiguous(memory_format=layout)
    reference = kdx.Reference(student, base, data.card.normalize(data.images))
    for stage, both in reference.features.items():
        for features, rows in zip(both, reference.rows[stage], strict=True):
            assert features.data_ptr() == rows.x.data_ptr()


def step(network):
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(torch.ones(1, 3, 16, 16)).sum().backward()
    optimizer.step()


def swap(network):
    network.b.weight.data = network.b.weight.data.clone() + 1e-4


def replace(network):
    network.c = nn.Conv2d(4, 4, 3, stride=2, padding=1)


CHANGES = {
    "a step of an optimiser": step,
    "load_state_dict": lambda network: network.load_state_dict(Small(seed=5).state_dict()),
    "load_state_dict, assign": lambda network: network.load_state_dict(Small(seed=5).state_dict(), assign=True),
    "another .data": swap,
    "in place through .data": lambda network: network.b.weight.data.mul_(1.001),
    "through numpy": lambda network: network.b.weight.detach().numpy().__imul__(1.001),
    "another module": replace,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_refused(images, change):
    student, base = Small(seed=0), Small(seed=1)
    reference = kdx.Reference(student, base, images[:6])
    labels = torch.eye(2)[torch.arange(6) % 2]
    uses = (
        lambda: kdx.unexplained(reference, images[6:]),
        lambda: kdx.unicam(reference, labels),
        lambda: kdx.unexplained_share(reference, folds=3),
        lambda: kdx.patch_agreement(reference, images[:3], patches=1),
    )
    for use in uses:
        use()
    CHANGES[change](base)
    for use in uses:
        with pytest.raises(ValueError, match="reference: the weights of the base changed, or were moved"):
            use()


def test_networks_that_were_only_used_are_not_refused(images):
    student, base = Small(10, seed=0).train(), Small(seed=1)
    reference = kdx.Reference(student, base, images)
    data = dataset()
    kdx.evaluate(student, data, "cpu")
    kdx.grad_cam(student.eval(), images)
    copy.deepcopy(student).load_state_dict(student.state_dict())
    with torch.no_grad():
        student(images)
    reference.check_weights()


def test_a_strength_at_the_end_of_the_grid_is_a_warning(images, monkeypatch):
    monkeypatch.setattr("kdx.explain.regression.RIDGES", (1e3, 1e4))
    reference = kdx.Reference(Small(seed=0), Small(seed=1), images)
    with pytest.warns(FitWarning, match=r"the best ridge strength lies beyond .* for answer \(distilled\)"):
        assert reference.regressions


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
