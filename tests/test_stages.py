import pytest
import torch
import torchvision
from torch import nn

from kdx.networks.capture import activations
from kdx.networks.models import MODELS, build
from kdx.networks.stages import evaluating, stages
from tests.networks import Small, at_once, state

STAGES = {
    "resnet18": ["layer1.1", "layer2.1", "layer3.1", "layer4.1"],
    "resnet50": ["layer1.2", "layer2.3", "layer3.5", "layer4.2"],
    "mobilenet_v2": ["features.3", "features.6", "features.13", "features.18"],
    "vgg16": ["features.8", "features.15", "features.22", "features.29"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"],
    "efficientnet_b0": ["features.2.1", "features.3.1", "features.5.2", "features.8"],
    "convnext_tiny": ["features.1.2", "features.3.2", "features.5.8", "features.7.2"],
    "inception_v3": ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "alexnet": ["features.1", "features.4", "features.11"],
}


OTHERS = {  # registered networks that are no ResNets
    "mobilenet_v1": ["features.3.5", "features.5.5", "features.11.5", "features.13.5"],
    "mobilenet_v2": STAGES["mobilenet_v2"],
    "efficientnet_b0": STAGES["efficientnet_b0"],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_torchvision_networks(name):
    settings = {"init_weights": False} if name == "inception_v3" else {}
    model = getattr(torchvision.models, name)(weights=None, **settings)
    assert stages(model) == {f"L{i}": module for i, module in enumerate(STAGES[name], 1)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_stages_of_registered_networks_are_the_last_blocks(name, stem):
    model = build(name, classes=3, stem=stem, width=0.125)
    images = torch.zeros(1, 3, 64, 64)
    last = OTHERS.get(name) or [f"layer{i}.{len(getattr(model, f'layer{i}')) - 1}" for i in range(1, 5)]
    assert list(stages(model, images).values()) == last
    sizes = [features.shape[-1] for features in activations(model, images, stages(model, images)).values()]
    assert sizes == ([64, 32, 16, 8] if stem == "small" else [16, 8, 4, 2])


class Plain(nn.Module):
    """Blocks that end in pooling, one ReLU and one pooling module shared by all."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.relu, self.pool, self.head = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(8, 2)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def test_stages_skip_modules_that_are_called_twice():
    assert stages(Plain(), torch.zeros(1, 1, 16, 16)) == {"L1": "conv1", "L2": "conv2"}


def test_stages_open_blocks_that_pool_at_their_end():
    def block(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    model = nn.Sequential(block(3, 4), block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert stages(model, torch.zeros(1, 3, 16, 16)) == {"L1": "0.1", "L2": "1.1"}


def test_stages_do_not_mistake_strips_for_feature_maps():
    """Coordinate attention concatenates two strips to (h + w, 1) inside a block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.mix = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
            self.strip = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.mix(self.reduce(x))
            strips = torch.cat([y.mean(3, keepdim=True), y.mean(2, keepdim=True).transpose(2, 3)], 2)
            return y * self.strip(strips).mean((2, 3), keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block(), Block(), nn.Flatten())
    assert stages(model, torch.zeros(1, 3, 32, 32)) == {"L1": "0", "L2": "1", "L3": "2"}


def test_stages_of_a_network_that_needs_values():
    """Where meta tensors cannot be followed, the image itself is."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

        def forward(self, x):
            x = self.conv1(x)
            return self.conv2(x).mean((2, 3)) if x.sum().item() < float("inf") else x

    assert stages(Gated(), torch.zeros(1, 3, 16, 16)) == {"L1": "conv1", "L2": "conv2"}


def test_stages_leave_no_hooks_and_the_mode_as_it_was():
    model = torchvision.models.resnet18(weights=None).train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stages(model, torch.rand(1, 3, 64, 64))
    assert model.training
    assert not model.layer1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # running statistics too


def test_stages_errors_say_what_to_do():
    model = torchvision.models.alexnet(weights=None)
    with pytest.raises(ValueError, match=r"does not take .* \(1, 3, 16, 16\), torch.float32, on cpu; pass images"):
        stages(model, torch.zeros(1, 3, 16, 16))
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"unknown modules \['nope'\]; choose from: features"):
        stages(model, modules=["features.0", "nope"])
    with pytest.raises(ValueError, match="no Conv2d; name its stages"):
        stages(nn.Linear(2, 2))
    swin = torchvision.models.swin_t(weights=None)  # (n, h, w, c) feature maps
    with pytest.raises(ValueError, match="name its stages with modules="):
        stages(swin)
    assert stages(model, modules=["features.4"]) == {"L1": "features.4"}


def test_stages_of_a_network_that_threads_share(one_thread):
    network, x = Small().train(), torch.rand(1, 3, 16, 16)
    expected, before = stages(network, x), state(network)
    assert all(found == expected for _, found in at_once(lambda i: stages(network, x)))
    assert state(network) == before


def test_stages_leave_forward_passes_of_other_threads_alone(one_thread):
    """They run on a copy, so a thread that serves predictions never meets tensors without values."""
    network, x = Small().eval(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        logits = network(x)

    def work(i):
        with torch.no_grad():
            return stages(network, x) if i % 2 else network(x)

    for i, found in at_once(work):
        assert i % 2 or torch.equal(found, logits)


def test_stages_of_a_network_that_keeps_what_it_saw():
    class Keeping(Small):
        def forward(self, x):
            self.seen = x + getattr(self, "seen", 0)
            return super().forward(x)

    network, x = Keeping(), torch.rand(1, 3, 16, 16)
    names = stages(network, x)
    assert not hasattr(network, "seen")
    network(x)
    assert stages(network, x) == names == stages(Small(), x)
    assert torch.equal(network.seen, x)


def test_evaluating_sets_each_mode_and_puts_it_back():
    network = Small().train()
    network.b.eval()
    with pytest.raises(RuntimeError, match="halt"), evaluating(network):  # noqa: PT012
        assert not any(module.training for module in network.modules())
        raise RuntimeError("halt")
    assert [network.training, network.a.training, network.b.training] == [True, True, False]


class Stuck(nn.Identity):
    """Always in training mode."""

    training = property(lambda self: True, lambda self, mode: None)


class Growing(Small):
    def forward(self, x):
        self.late = nn.Dropout()
        return super().forward(self.late(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_network_that_cannot_be_evaluated_and_put_back_says_so():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Stuck())
    with pytest.raises(ValueError, match=r"can be set and put back; refused by 1 \(Stuck: it keeps its own\)"):
        activations(network, torch.rand(1, 3, 8, 8), {"L1": "0"})
    assert network[0].training
    with pytest.raises(ValueError, match=r"Growing adds or removes modules in its forward pass \(Dropout\)"):
        activations(Growing(), torch.rand(1, 3, 8, 8), {"L1": "a"})
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1)).eval()))  # it has no mode at all
    found = activations(nn.Sequential(frozen, nn.Conv2d(4, 2, 1)), torch.rand(1, 3, 8, 8), {"L1": "1"})
    assert found["L1"].shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"^0: expected a module that takes hooks; build it without torch.jit"):
        stages(nn.Sequential(frozen, nn.Conv2d(4, 2, 1)), torch.rand(1, 3, 8, 8))
