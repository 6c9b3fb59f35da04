import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from kdx import activations, stages
from kdx.networks.models import build, load_checkpoint, parse_name, save_checkpoint


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b0"])
def test_build_is_torchvisions_network_at_full_width(name):
    ours, theirs = build(name, 1000), getattr(torchvision.models, name)(weights=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_build_small_stem_and_width():
    model = build("resnet18", 10, stem="small", width=0.5)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert [getattr(model, f"layer{i}")[-1].conv2.out_channels for i in range(1, 5)] == [32, 64, 128, 256]
    assert model.layer1(model.maxpool(model.conv1(torch.rand(1, 3, 32, 32)))).shape[2:] == (32, 32)
    assert sum(p.numel() for p in build("resnet10", 10, "small").parameters()) < 400_000


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenet_v1", (128, 256, 512, 1024)),
        ("mobilenet_v2", (24, 32, 96, 1280)),
        ("efficientnet_b0", (24, 40, 112, 1280)),
    ],
)
def test_stages_of_networks_other_than_resnets(name, channels, stem):
    model, x = build(name, 10, stem).eval(), torch.rand(1, 3, *([32, 32] if stem == "small" else [64, 64]))
    found = activations(model, x, stages(model, x))
    largest = 32 if stem == "small" else 16
    assert [tuple(maps.shape[1:]) for maps in found.values()] == [
        (k, largest >> i, largest >> i) for i, k in enumerate(channels)
    ]


def test_mobilenet_v1_is_as_large_as_published():
    """4.2 million weights and 569 million products at 224 px (Howard et al. 2017, tables 1 and 4)."""
    model, products = build("mobilenet_v1", 1000), []

    def count(layer, args, output):
        products.append(layer.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 4.2
    assert round(sum(products) / 1e6) == 569
    assert build("mobilenet_v1", 10, "small", 0.5).features[-1][3].out_channels == 512


def test_build_names_the_choices():
    with pytest.raises(ValueError, match="unknown model 'vgg'; choose from: resnet10, resnet18"):
        build("vgg", 10)
    with pytest.raises(ValueError, match="unknown stem 'tiny'; choose from: imagenet, small"):
        build("resnet18", 10, "tiny")
    with pytest.raises(ValueError, match="width"):
        build("resnet18", 10, width=0.001)


def test_checkpoint_round_trip(tmp_path):
    model = build("resnet10", 4, "small", width=0.125).eval()
    save_checkpoint(tmp_path / "m.safetensors", model, {"classes": ["a", "b", "c", "d"], "metrics": {"accuracy": 0.5}})
    state = torch.random.get_rng_state()
    loaded, header = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert header["architecture"] == {"name": "resnet10", "classes": 4, "stem": "small", "width": 0.125}
    assert header["classes"] == ["a", "b", "c", "d"]
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), loaded(x))
    assert not loaded.training


def test_checkpoint_of_another_kind_is_a_clear_error(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="expected a safetensors checkpoint of kdx"):
        load_checkpoint(tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="without kdx's header"):
        load_checkpoint(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"expected a network from kdx.build, got Linear"):
        save_checkpoint(tmp_path / "x.safetensors", nn.Linear(2, 2), {})


def test_build_takes_the_width_with_the_name():
    assert build("resnet10@0.125", 10, width=0.5).architecture == build("resnet10", 10, width=0.125).architecture
    assert parse_name("resnet18") == ("resnet18", 1.0)
    assert parse_name("resnet18", 0.5) == ("resnet18", 0.5)
    for name, message in {
        "resnet10@wide": "such as resnet10@0.125, got 'resnet10@wide'",
        "resnet10@": "such as resnet10@0.125, got 'resnet10@'",
        "resnet10@nan": "width: expected at least 1/64, got nan",
        "resnet10@0": "width: expected at least 1/64, got 0",
        3: "expected the name of a model, such as resnet10@0.125, got 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            build(name, 10)
