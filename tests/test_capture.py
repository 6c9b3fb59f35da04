from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdx import activations, capture, evaluate
from kdx.networks import capture as capture_module
from kdx.networks.capture import OverwrittenError, forward, gradients
from kdx.networks.models import build
from tests.networks import Small, at_once, state


def disturbed(model):
    """Running statistics unlike those of a fresh network, so that evaluation mode matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def network():
    return disturbed(build("resnet10", 10, "small", width=0.125))


def test_capture_removes_its_hooks_after_an_exception(network):
    with pytest.raises(RuntimeError, match="halt"), capture(network, {"L1": "layer1"}) as captured:  # noqa: PT012
        network(torch.rand(1, 3, 32, 32))
        raise RuntimeError("halt")
    assert captured["L1"].shape == (1, 8, 32, 32)
    assert not any(m._forward_hooks for m in network.modules())


def test_capture_keeps_what_in_place_layers_overwrite():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True))
    nn.init.constant_(model[0].bias, -1.0)
    x = torch.rand(1, 1, 8, 8)
    with capture(model, {"L1": "0"}) as captured:
        out = model(x)
    assert captured["L1"].min() < 0
    assert torch.equal(captured["L1"].relu(), out)


def test_activations_do_not_depend_on_the_chunks(network, monkeypatch):
    x = torch.rand(7, 3, 32, 32)
    whole = activations(network, x, {"L1": "layer1", "L2": "layer2"})
    monkeypatch.setitem(capture_module.CHUNK, "cpu", 3 * 3 * 32 * 32)
    parts = activations(network, x, {"L1": "layer1", "L2": "layer2"})
    assert list(parts) == ["L1", "L2"]
    for stage in whole:
        torch.testing.assert_close(parts[stage], whole[stage], atol=1e-5, rtol=1e-5)
    one_image = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"L1 \(1\): expected a row for each of 3 images, got \(3072,\)"):
        activations(one_image, x, {"L1": "1"})


class Viewing(Small):
    """Flattens features of several places with ``view``, for which they must be contiguous."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu())
        return self.head(x.view(x.size(0), -1))


def test_networks_that_flatten_by_view_are_given_contiguous_images(tiny_shapes):
    network, x = Viewing().eval(), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        network(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(forward(network, x), network(x))
    layers = {"first": "a", "last": "c"}
    found = activations(network, x.contiguous(memory_format=torch.channels_last), layers)
    torch.testing.assert_close(network.head(found["last"].flatten(1)), network(x))
    assert all(features.is_contiguous() for features in found.values())
    slopes = gradients(network, x, lambda z: z[:, 0].sum(), layers)["last"][1]
    torch.testing.assert_close(slopes.flatten(1), network.head.weight[:1].detach().expand(4, -1))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        forward(network, x[:, :2])
    few = tiny_shapes["test"].labels < 3
    small = replace(
        tiny_shapes["test"],
        images=tiny_shapes["test"].images[few, :, ::4, ::4],
        labels=tiny_shapes["test"].labels[few],
        masks=None,
    )
    assert evaluate(network, small, "cpu").logits.shape == (int(few.sum()), 3)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.idle = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x.mean((2, 3))


def test_activations_are_those_before_in_place_layers():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(1, 2, 1)).train()
    nn.init.constant_(model[0].bias, -1.0)
    x = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        found = activations(model, x, {"L1": "0", "L2": "3"})
    assert torch.equal(found["L1"], model[0](x))
    assert torch.equal(found["L2"], model[3](model[0](x).relu()))
    assert not found["L1"].is_inference()
    assert not found["L1"].requires_grad
    assert all(module.training for module in model.modules())
    with pytest.raises(OverwrittenError, match=r"outputs of L1$"), capture(model, {"L1": "0", "L2": "3"}, copy=False):
        model(x)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"never called \['L1'\]"):
        activations(Idle(), x, {"L1": "idle"})
    with pytest.raises(ValueError, match=r"never called \['L1'\]"):
        capture_module.gradients(Idle(), x, lambda logits: logits.sum(), {"L1": "idle"})


def test_activations_of_a_network_that_threads_share(one_thread):
    """In training mode, which a thread that leaves early would bring back for the others."""
    network, x, layers = (
        disturbed(build("resnet10", 3, "small", 0.125)).train(),
        torch.rand(2, 3, 16, 16),
        {"L1": "layer2"},
    )
    expected, before = activations(network, x, layers)["L1"], state(network)
    assert all(torch.equal(found["L1"], expected) for _, found in at_once(lambda i: activations(network, x, layers)))
    assert state(network) == before


def test_capture_leaves_forward_passes_of_other_threads_alone():
    model, x = Small(), torch.rand(1, 3, 8, 8)
    with ThreadPoolExecutor(1) as pool, capture(model, {"L1": "a"}, gradients=True) as captured:
        model.requires_grad_(False)(x)
        mine = captured["L1"]
        other = pool.submit(model, 2 * x).result()
    assert captured["L1"] is mine
    assert not other.requires_grad  # this thread's hook makes roots of the graph
