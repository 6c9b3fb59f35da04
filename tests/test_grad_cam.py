import math
from collections import namedtuple

import pytest
import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

import kdx
from kdx import agreement, grad_cam
from kdx.networks.models import build
from tests.networks import Small, at_once, state

NETWORKS = {
    "resnet10": lambda: build("resnet10", 10, "small"),
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "resnet50": lambda: build("resnet50", 10, width=0.25),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(weights=None),
    "densenet121": lambda: torchvision.models.densenet121(weights=None),  # an in-place ReLU follows L4
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None),
}


def disturbed(model):
    """Running statistics unlike those of a fresh network, so that evaluation mode matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_equals_captum_at_every_stage(name):
    model, x, target = disturbed(NETWORKS[name]()), torch.rand(3, 3, 64, 64), torch.tensor([3, 0, 7])
    maps = grad_cam(model, x, target)
    layers = kdx.stages(model, x)
    assert list(maps) == list(layers) == ["L1", "L2", "L3", "L4"]
    for stage, module in layers.items():
        expected = LayerGradCam(model, model.get_submodule(module)).attribute(x, target, relu_attributions=True)[:, 0]
        assert expected.max() > 0
        assert (maps[stage] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_grad_cam_equals_pytorch_grad_cam():
    model, x, target = disturbed(build("resnet10", 10, "small")), torch.rand(2, 3, 32, 32), torch.tensor([3, 5])
    ours = grad_cam(model, x, target)["L1"]  # at the image's own resolution: nothing is resized
    with GradCAM(model, [model.layer1[-1]]) as cam:
        theirs = torch.from_numpy(cam(x, [ClassifierOutputTarget(int(t)) for t in target]))
    low, high = ours.amin((1, 2), keepdim=True), ours.amax((1, 2), keepdim=True)
    torch.testing.assert_close((ours - low) / (high - low), theirs, atol=1e-5, rtol=0)


class Ramp(nn.Module):
    """Two channels, x and 2 - x; logit 0 is 3 sum(x) - sum(2 - x), logit 1 its negative."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x):
        a = self.features(torch.cat([x, 2 - x], 1))
        score = 3 * a[:, 0].sum((1, 2)) - a[:, 1].sum((1, 2))
        return torch.stack([score, -score], 1)


def test_grad_cam_by_hand():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    maps = grad_cam(Ramp(), x, 0, layers={"only": "features"})
    # weights 3 and -1: 3 x - (2 - x) = 4 x - 2, without its negative part
    assert torch.equal(maps["only"], torch.tensor([[[0.0, 2.0], [6.0, 10.0]]]))
    assert torch.equal(grad_cam(Ramp(), x, 1, {"only": "features"})["only"], torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]))


@pytest.fixture
def network():
    return disturbed(build("resnet10", 10, "small", width=0.125))


def test_grad_cam_of_a_batch_is_that_of_each_image(network):
    x = torch.rand(5, 3, 32, 32)
    together = grad_cam(network, x, torch.arange(5))
    for i in range(5):
        alone = grad_cam(network, x[i : i + 1], i)
        for stage in together:
            torch.testing.assert_close(together[stage][i], alone[stage][0], rtol=1e-4, atol=1e-7)


def test_grad_cam_without_target_explains_the_prediction(network):
    x = torch.rand(6, 3, 32, 32)
    predicted = network(x).argmax(1)
    chosen, given = grad_cam(network, x), grad_cam(network, x, predicted)
    assert all(torch.equal(chosen[stage], given[stage]) for stage in chosen)


def test_grad_cam_in_float64_agrees_with_float32(network):
    x = torch.rand(3, 3, 32, 32)
    single, double = grad_cam(network, x, 1), grad_cam(network.double(), x.double(), 1)
    for stage, low in single.items():
        assert (low - double[stage]).abs().max() <= 1e-4 * double[stage].max()


def test_grad_cam_with_frozen_parameters_and_inference_callers(network):
    x = torch.rand(2, 3, 32, 32)
    expected = grad_cam(network, x, 3)
    network.requires_grad_(False)
    frozen = grad_cam(network, x, 3)
    with torch.no_grad():
        silent = grad_cam(network, x, 3)
    with torch.inference_mode():
        inferred = grad_cam(network, torch.rand(2, 3, 32, 32).copy_(x), 3)  # an inference tensor
        born = disturbed(build("resnet10", 10, "small", width=0.125))  # inference parameters
        born.load_state_dict(network.state_dict())
    for stage in expected:
        for other in (frozen, silent, inferred, grad_cam(born, x, 3)):
            torch.testing.assert_close(other[stage], expected[stage], rtol=0, atol=0)
    assert not any(p.requires_grad for p in network.parameters())


def test_grad_cam_leaves_the_network_as_it_was(network):
    network.train()
    network.layer2.eval()
    network.fc.weight.grad = torch.ones_like(network.fc.weight)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    grad_cam(network, torch.rand(2, 3, 32, 32), 3)
    assert network.training
    assert not network.layer2.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(network.fc.weight.grad, torch.ones_like(network.fc.weight))
    assert all(p.grad is None for n, p in network.named_parameters() if n != "fc.weight")
    assert not any(m._forward_hooks for m in network.modules())


def test_grad_cam_of_a_network_that_threads_share(one_thread):
    network, x, layers = Small().train(), torch.rand(2, 3, 16, 16), {"L1": "a", "L2": "c"}
    expected, before = grad_cam(network, x, 1, layers), state(network)
    for _, maps in at_once(lambda i: grad_cam(network, x, 1, layers)):
        assert all(torch.equal(maps[stage], expected[stage]) for stage in layers)
    assert state(network) == before


Output = namedtuple("Output", "logits aux")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: (z, z.sum()),
        lambda z: {"loss": z.sum(), "logits": z},
        lambda z: {"out": z, "aux": -z},
        lambda z: Output(z, None),
        lambda z: type("Object", (), {"logits": z})(),
    ],
)
def test_grad_cam_finds_the_logits_in_any_output(network, wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network

        def forward(self, x):
            return wrap(self.body(x))

    x = torch.rand(2, 3, 32, 32)
    plain, wrapped = grad_cam(network, x, 3), grad_cam(Wrapped().eval(), x, 3)
    assert all(torch.equal(plain[stage], wrapped[stage]) for stage in plain)


def test_grad_cam_refuses_bad_input(network):
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"expected float images \(n, c, h, w\), got torch.uint8 \(2, 3, 32, 32\)"):
        grad_cam(network, (255 * x).to(torch.uint8), 0)
    with pytest.raises(ValueError, match=r"got torch.float32 \(3, 32, 32\)"):
        grad_cam(network, x[0], 0)
    for target in (10, -1, torch.tensor([0, 10])):
        with pytest.raises(ValueError, match="expected classes 0 to 9"):
            grad_cam(network, x, target)
    for target in (torch.zeros(3, dtype=torch.long), 0.5, torch.ones(2, 10, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected a class index or integer indices"):
            grad_cam(network, x, target)
    with pytest.raises(ValueError, match=r"no modules \['nope'\]"):
        grad_cam(network, x, 0, {"L1": "nope"})
    with pytest.raises(ValueError, match=r"expected one output of shape \(n, classes\).*got \[\(2, 2, 32, 32\)\]"):
        grad_cam(nn.Conv2d(3, 2, 1), x, 0, {"L1": ""})
    with pytest.raises(ValueError, match=r"L1 \(fc\): expected feature maps .*, got \(2, 10\)"):
        grad_cam(network, x, 0, {"L1": "fc"})
    with pytest.raises(RuntimeError, match="Double"):  # torch's own error
        grad_cam(network, x.double(), 0)
    assert not any(m._forward_hooks for m in network.modules())


def test_grad_cam_refuses_to_guess_between_features_and_logits(network):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network

        def forward(self, x):
            z = self.body(x)
            return z[:, :4], z

    with pytest.raises(ValueError, match=r"got \[\(2, 4\), \(2, 10\)\]: wrap it in a module"):
        grad_cam(Both().eval(), torch.rand(2, 3, 32, 32), 3)


def test_grad_cam_under_autocast_returns_float32(network):
    x = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        maps = grad_cam(network, x, 3)
    for stage, exact in grad_cam(network, x, 3).items():
        assert maps[stage].dtype == torch.float32
        assert agreement(maps[stage], exact).min() > 0.95


def test_grad_cam_of_a_module_without_influence_is_an_error(network):
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.side = network, nn.Conv2d(3, 2, 1)

        def forward(self, x):
            self.side(x)
            return self.body(x)

    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"L2 \(side\): the logits do not depend"):
        grad_cam(Side().eval(), x, 0, {"L1": "body.layer1", "L2": "side"})
    with pytest.raises(ValueError, match=r"the logits do not depend on any of"):
        grad_cam(Side().eval(), x, 0, {"L1": "side"})


def test_agreement_by_hand():
    a = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    assert agreement(a, 5 * a + 2).item() == pytest.approx(1)
    assert agreement(a, -a).item() == pytest.approx(-1)
    assert agreement(a, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).item() == pytest.approx(0)
    assert math.isnan(agreement(a, torch.ones(1, 2, 2)).item())
    with pytest.raises(ValueError, match="of one shape"):
        agreement(a, torch.ones(1, 2, 3))
