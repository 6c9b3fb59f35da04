import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import GuidedBackprop, GuidedGradCam
from torch import nn

import kdx
from kdx.explain.guided import guided_backpropagation

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NETWORKS = {  # with the layer of Grad-CAM
    "ResNet of basic blocks": (lambda: kdx.build("resnet10@0.125", 4, seed=0), "layer4.0"),
    "ResNet of bottlenecks": (lambda: kdx.build("resnet50@0.0625", 4, seed=0), "layer3.5"),
    "MobileNetV1": (lambda: kdx.build("mobilenet_v1@0.125", 4, seed=0), "features.11"),
    "VGG": (lambda: torchvision.models.vgg11_bn(num_classes=4, init_weights=False), "features.25"),
    "SqueezeNet": (lambda: torchvision.models.squeezenet1_1(num_classes=4), "features.7"),
    "ShuffleNet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4), "stage3"),
}


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_captum_where_that_sees_every_relu(name):
    make, layer = NETWORKS[name]
    network = make().eval()
    target = torch.tensor([1, 3])
    own = kdx.guided_grad_cam(network, IMAGES, target, layer)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum's hooks need the values of before
    images = IMAGES.clone(memory_format=torch.channels_last)  # as kdx gives them: rounding decides on the sign of a few
    expected = GuidedGradCam(network, network.get_submodule(layer)).attribute(
        images.requires_grad_(), target, interpolate_mode="bilinear"
    )
    assert own.abs().max() > 0
    torch.testing.assert_close(own, expected.detach(), rtol=1e-3, atol=1e-5 * float(own.abs().max()))


class Small(nn.Module):
    """A convolution, an activation function, and a mean over places."""

    def __init__(self, activation, second=None):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.activation, self.second = activation, second or activation

    def forward(self, x):
        return self.second(self.last(self.activation(self.first(x)))).mean((2, 3))


def ignored(x):
    x.relu_()
    return x


@pytest.mark.parametrize(
    "relu",
    [F.relu, torch.relu, torch.relu_, ignored, nn.ReLU(True), lambda x: F.relu(x, True), lambda x: x.relu(),
     lambda x: F.relu(input=x, inplace=True), lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0),
     torch.nn.Threshold(0, 0),
     lambda x: torch.threshold_(x, 0, 0), lambda x: x.clamp_min(0), lambda x: torch.clamp_min_(x, 0.0),
     lambda x: x.clip_(0), lambda x: x.clamp(max=1e9).relu(), lambda x: x.relu().clamp_min(-1)],
)  # fmt: skip
def test_functions_and_layers_in_place_are_guided_as_modules_are(relu):
    network = Small(relu, nn.Identity()).eval()
    plain = Small(nn.ReLU(), nn.Identity()).eval()
    plain.load_state_dict(network.state_dict())
    target = torch.tensor([0, 1])
    expected = GuidedBackprop(plain).attribute(IMAGES.clone().requires_grad_(), target)
    torch.testing.assert_close(guided_backpropagation(network, IMAGES, target), expected.detach())


@pytest.mark.parametrize(
    "relu6",
    [nn.ReLU6(), nn.ReLU6(True), F.relu6, nn.Hardtanh(0.0, 6.0),
     lambda x: F.hardtanh_(x, 0, 6), lambda x: x.clamp(0, 6), lambda x: torch.clip(x, min=0, max=6.0)],
)  # fmt: skip
def test_relu6_passes_back_between_0_and_6_alone(relu6):
    class Line(nn.Module):
        def forward(self, x):
            z = relu6(x.clone()).flatten(1)
            return torch.stack([(z * z.new_tensor([1.0, 1.0, 1.0, -1.0])).sum(1), z.sum(1)], 1)

    x = torch.tensor([[[[-1.0, 3.0, 7.0, 2.0]]]])
    assert guided_backpropagation(Line(), x, 0).flatten().tolist() == [0, 1, 0, 0]  # below, between, above, negative


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.GELU(), "GELU"), (nn.SiLU(), "SiLU"), (F.silu, "SiLU"), (nn.Hardswish(), "Hardswish"),
     (nn.LeakyReLU(), "LeakyReLU"), (nn.Hardtanh(), "Hardtanh"), (nn.PReLU(), "PReLU"), (nn.ELU(), "ELU"),
     (nn.ELU(inplace=True), "ELU"), (F.elu_, "ELU"), (torch.selu, "SELU"), (torch.selu_, "SELU"), (nn.SELU(), "SELU"),
     (torch.celu, "CELU"), (torch.celu_, "CELU"), (nn.CELU(), "CELU"), (F.leaky_relu_, "LeakyReLU"),
     (torch.rrelu, "RReLU"), (lambda x: x.prelu(torch.ones(1)), "PReLU"), (nn.Threshold(0.1, 0), "Threshold"),
     (F.hardtanh_, "Hardtanh"), (lambda x: x.clamp(-1, 1), "Hardtanh"),
     (lambda x: x.clamp(torch.zeros(())), "Hardtanh")],
)  # fmt: skip
def test_other_activation_functions_are_refused_by_name(activation, name):
    with pytest.raises(ValueError, match=f"Small computes {name}"):
        guided_backpropagation(Small(activation), IMAGES, 0)


def test_a_network_without_relu_is_refused():
    with pytest.raises(ValueError, match="found no ReLU"):
        guided_backpropagation(Small(nn.Identity()), IMAGES, 0)


def test_the_predicted_class_is_explained_and_the_network_left_as_it_was():
    network = kdx.build("resnet10@0.125", 4, seed=0).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = kdx.guided_grad_cam(network, IMAGES)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    predicted = network.eval()(IMAGES).argmax(1)
    torch.testing.assert_close(found, kdx.guided_grad_cam(network, IMAGES, predicted))


def test_float32_agrees_with_float64():
    network = kdx.build("resnet10@0.125", 4, seed=0).eval()
    single = guided_backpropagation(network, IMAGES, 1)
    double = guided_backpropagation(network.double(), IMAGES.double(), 1)
    torch.testing.assert_close(single, double.float(), rtol=1e-3, atol=1e-5 * float(single.abs().max()))
