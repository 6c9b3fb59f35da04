import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdx.own import find_builder, load_own


def network(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return network().state_dict()


def same(model, weights):
    return all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_weights_come_from_every_safe_file(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    for name, content in {
        "plain.pt": weights,
        "nested.pth": {"epoch": 3, "model": {"state_dict": wrapped}},
        "parallel.pt": wrapped,
    }.items():
        torch.save(content, tmp_path / name)
    for path in tmp_path.iterdir():
        model = load_own(network, path)
        assert same(model, weights), path
        assert not model.training


class Dangerous:
    def __reduce__(self):
        return exec, ("import kdx; kdx.harmed = True",)


def test_what_would_execute_code_is_refused(tmp_path):
    import kdx

    for name, save in {"a.pt": torch.save, "b.pkl": lambda x, path: path.write_bytes(pickle.dumps(x))}.items():
        save({"weights": Dangerous()}, tmp_path / name)
        with pytest.raises(ValueError, match=r"execute code of the file; save the weights alone, with\s+safetensors"):
            load_own(network, tmp_path / name)
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="save the weights alone"):
        load_own(network, tmp_path / "whole.pt")
    assert not hasattr(kdx, "harmed")


def test_files_that_do_not_fit_are_named(tmp_path, weights):
    def check(message, content, build=network):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            load_own(build, tmp_path / "x.pt")

    lacking = {key: value for key, value in weights.items() if key != "0.weight"}
    check(r"missing 0.weight; unexpected fc.weight", lacking | {"fc.weight": torch.zeros(1)})
    check(r"missing 0.weight, 0.bias, 1.weight and 4 more; unexpected a", {"a": torch.zeros(1)})
    check(r"more than the weights of this Sequential; unexpected fc", weights | {"fc": torch.zeros(1)})
    check(r"0.weight: \(4, 3, 3, 3\) where the network has \(5, 3, 3, 3\), and 5 more", weights, lambda: network(5))
    check(r"NaN or infinite: 1.running_var;", weights | {"1.running_var": torch.full((4,), torch.inf)})
    check("expected a state dict of tensors, got list", [1, 2])
    check("expected a state dict of tensors, got dict", {"epoch": 3})
    check("expected a torch.nn.Module from .*, got int", weights, lambda: 3)
    with pytest.raises(ValueError, match=r"no file .*nothing.pt; expected a checkpoint"):
        load_own(network, tmp_path / "nothing.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(ValueError, match=f"{name}: "):
            load_own(network, tmp_path / name)


def test_builders_are_found_in_the_working_directory(tmp_path, monkeypatch, weights):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\nnumber = 3\n\n"
        "def small():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_file(weights, "w.safetensors")
    assert same(load_own("my_networks:small", "w.safetensors"), weights)
    assert find_builder("torchvision.models:resnet18")().fc.out_features == 1000
    for where, message in {
        "my_networks": "expected module:function, such as mymodels:resnet, got 'my_networks'",
        "my_network:small": "no module my_network for",
        "my_networks:large": "my_networks has no large",
        "my_networks:number": "expected a function that returns a network, got int",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_builder(where)
