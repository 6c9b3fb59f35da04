import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import nn

import kdx
from kdx.explain.input_gradients import clipped, edges, logit_gradients
from tests.networks import state


@pytest.fixture
def network():
    return kdx.build("resnet10", 5, "small", 0.125, seed=3).eval()


def test_saliency_is_captums(network):
    x, y = torch.randn(7, 3, 16, 16), torch.tensor([0, 4, 1, 1, 3, 2, 0])
    expected = Saliency(network).attribute(x.clone().requires_grad_(), target=y, abs=True)
    torch.testing.assert_close(kdx.saliency(network, x, y), expected)
    expected = Saliency(network).attribute(x.clone().requires_grad_(), target=y, abs=False)
    torch.testing.assert_close(logit_gradients(network, x, y), expected)


def test_loss_gradient_is_that_of_each_image_alone(network, monkeypatch):
    monkeypatch.setattr("kdx.explain.input_gradients.AT_ONCE", 2)
    x, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 1])
    found = kdx.loss_gradients(network, x, y)
    for i in range(3):
        alone = x[i : i + 1].clone().requires_grad_()
        F.cross_entropy(network(alone), y[i : i + 1]).backward()
        torch.testing.assert_close(found[i], alone.grad[0])


def test_loss_gradient_of_a_linear_network_by_hand():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    linear[1].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)  # both classes have a probability of one half
    assert kdx.loss_gradients(linear, x, torch.tensor([0])).flatten().tolist() == [-0.5, 1.0]
    assert kdx.saliency(linear, x, torch.tensor([1])).flatten().tolist() == [0.0, 2.0]


def test_network_is_left_as_it_was_found(network):
    network.train()
    before = state(network)
    with torch.inference_mode():
        found = kdx.saliency(network, torch.rand(2, 3, 16, 16), torch.tensor([1, 2], dtype=torch.uint8))
    assert (found >= 0).all()
    assert found.any()
    after = state(network)
    assert network.training
    assert all(weight.grad is None for weight in network.parameters())
    assert str(after) == str(before)


def test_edges_of_a_step():
    image = torch.zeros(1, 3, 5, 6)
    image[:, :, :, 3:] = 2.0
    found = edges(image)
    assert found[0, :, 2:4].tolist() == [[1.0, 1.0]] * 5  # half of the step on either side
    assert found[0, :, [0, 1, 4, 5]].abs().max() == 0


def test_pictures_of_gradients_by_hand():
    values = torch.tensor([-1.0, 1.0] * 50 + [0.0] * 44).view(1, 1, 12, 12)
    deviation = (100 / 144) ** 0.5
    drawn = clipped(values)
    assert drawn.flatten()[:2].tolist() == pytest.approx([0.5 - 1 / deviation / 6, 0.5 + 1 / deviation / 6])
    values[0, 0, 0, 0] = 1e6
    assert clipped(values).max() == 1.0
    assert (clipped(torch.full((2, 3, 4, 4), 7.0)) == 0.5).all()


@pytest.mark.parametrize(("labels", "what"), [([0], "for each of 2 images"), ([0, 5], "expected classes 0 to 4")])
def test_labels_that_are_none_are_refused(network, labels, what):
    with pytest.raises(ValueError, match=what):
        kdx.loss_gradients(network, torch.rand(2, 3, 16, 16), torch.tensor(labels))
