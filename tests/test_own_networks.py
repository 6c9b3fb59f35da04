import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdx import build, save_checkpoint
from kdx.distil.run_store import shipped_table
from kdx.networks.own_networks import (
    NORMALISATIONS,
    answers,
    channels_of,
    check_answers,
    check_class_order,
    check_headers,
    find_builder,
    header_of,
    load_own,
    named_normalisation,
    network_input,
)
from kdx.paths import CHECKOUT, networks_home


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
    save_file(wrapped, tmp_path / "parallel.safetensors")
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
    check(r"missing 0.weight, 0.bias, 1.weight and 3 more; unexpected a", {"a": torch.zeros(1)})
    check(r"more than the weights of this Sequential; unexpected fc", weights | {"fc": torch.zeros(1)})
    check(r"0.weight: \(4, 3, 3, 3\) where the network has \(5, 3, 3, 3\), and 5 more", weights, lambda: network(5))
    check(r"NaN or infinite: 1.running_var;", weights | {"1.running_var": torch.full((4,), torch.inf)})
    check("NaN or infinite: 0.weight", {k: v * 1e38 * 1e38 if k == "0.weight" else v for k, v in weights.items()})
    check("expected a state dict of tensors, got list", [1, 2])
    check("expected a state dict of tensors, got dict", {"epoch": 3})
    check("expected a torch.nn.Module from .*, got int", weights, lambda: 3)
    with pytest.raises(ValueError, match=r"no file .*nothing.pt; expected a checkpoint"):
        load_own(network, tmp_path / "nothing.pt")
    for name, content in {"text.pt": b"hello", "page.pt": b"<html>404</html>", "text.safetensors": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: expected (a checkpoint of torch or )?safetensors"):
            load_own(network, tmp_path / name)
    (tmp_path / "cut.pt").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match=r"cut.pt: expected a checkpoint of torch or safetensors, found"):
        load_own(network, tmp_path / "cut.pt")


def test_builders_are_found_in_the_working_directory(tmp_path, monkeypatch, weights):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\nnumber = 3\n\n"
        "def small():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n\n"
        "def broken():\n    return {}['layer']\n"
    )
    (tmp_path / "unfinished.py").write_text("def small(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_file(weights, "w.safetensors")
    assert same(load_own("my_networks:small", "w.safetensors"), weights)
    assert find_builder("torchvision.models:resnet18")().fc.out_features == 1000
    assert find_builder("torchvision.models:resnet18(num_classes=7)")().fc.out_features == 7
    with pytest.raises(ValueError, match=r"build 'my_networks:small\(1\)': small\(\) takes 0 positional"):
        load_own("my_networks:small(1)", "w.safetensors")
    with pytest.raises(ValueError, match=r"build 'my_networks:broken': 'layer' \(KeyError\)"):
        load_own("my_networks:broken", "w.safetensors")
    with pytest.raises(ValueError, match=r"'unfinished:small': unfinished cannot be imported: SyntaxError: "):
        find_builder("unfinished:small")
    for where, message in {
        "my_networks": r"expected module:function, such as mymodels:resnet or .*, got 'my_networks'",
        "my_networks:small(": "expected module:function",
        "my_networks:small(number)": "expected module:function",
        "__import__('os').system:x": "expected module:function",
        "my_network:small": "no module my_network for",
        "my_networks:large": "my_networks has no large",
        "my_networks:number": "expected a function, got int",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_builder(where)


def test_checkpoints_of_kdx_need_no_builder(tmp_path, weights):
    model = build("resnet10", 3, "small", 0.125, seed=0)
    save_checkpoint(tmp_path / "a.safetensors", model, {"classes": ["x", "y", "z"]})
    assert same(load_own("", tmp_path / "a.safetensors"), model.state_dict())
    assert header_of(tmp_path / "a.safetensors")["classes"] == ["x", "y", "z"]
    save_file(weights, tmp_path / "b.safetensors")
    assert header_of(tmp_path / "b.safetensors") == {}
    with pytest.raises(ValueError, match="not a checkpoint of kdx; say what builds its network"):
        load_own("", tmp_path / "b.safetensors")
    with torch.no_grad():
        model.bn1.running_var[0] = torch.inf
    save_checkpoint(tmp_path / "c.safetensors", model, {})
    with pytest.raises(ValueError, match=r"NaN or infinite: bn1.running_var"):
        load_own("", tmp_path / "c.safetensors")


def test_checkpoints_of_kdx_that_differ_are_refused():
    header = {"classes": ["cat", "dog"], "mean": [0.5] * 3, "std": [0.2] * 3, "size": 32}
    check_headers({"student": header, "base": header, "second base": {}})
    for change in ({"classes": ["dog", "cat"]}, {"mean": [0.1] * 3}, {"size": 64}):
        with pytest.raises(ValueError, match=f"agree in classes, mean, std, size, got the {next(iter(change))} "):
            check_headers({"student": header, "base": header | change})


def test_half_precision_and_data_parallel_become_plain_float32(tmp_path, weights):
    save_file({key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()},
              tmp_path / "half.safetensors")  # fmt: skip
    large = weights | {"1.running_var": torch.full((4,), 1e5)}  # more than half precision holds
    save_file(large, tmp_path / "large.safetensors")
    assert same(load_own(lambda: network().half(), tmp_path / "large.safetensors"), large)
    model = load_own(lambda: nn.DataParallel(network().half()), tmp_path / "half.safetensors")
    assert isinstance(model, nn.Sequential)
    assert next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(model.state_dict()["0.weight"], weights["0.weight"], rtol=1e-3, atol=1e-3)


def test_images_are_normalised_and_grey_where_a_network_is():
    images = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    colour, grey = network(), nn.Sequential(nn.Conv2d(1, 4, 3))
    x = network_input(colour, images, ((0.2, 0.2, 0.1), (1.0, 1.0, 0.5)))
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([0.0, 0.0, 0.2]))
    assert network_input(grey, images, ((0.2,), (1.0,))).abs().max() < 0.005  # rounded to 8 bits
    assert network_input(grey, images).shape == (2, 1, 8, 8)
    torch.testing.assert_close(network_input(colour, images)[0, 0, 0, 0], torch.tensor((0.2 - 0.485) / 0.229))
    with pytest.raises(ValueError, match="normalisation: expected 1 means and 1 standard deviations"):
        network_input(grey, images, ((0.2, 0.2, 0.2), (1.0, 1.0, 1.0)))


def test_answers_are_probabilities_or_an_error_that_names_the_network():
    class Head(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.linear, self.scale = nn.Linear(12, 3), scale

        def forward(self, x):
            return {"logits": self.linear(x.flatten(1)) * self.scale}

    z = answers(Head(1.0), torch.rand(5, 3, 2, 2), "student", batch_size=2)
    assert z.shape == (5, 3)
    assert z.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"the base does not take images of 3 x 4 x 4: .* give a size that all of them take"
    ):
        answers(Head(1.0), torch.rand(5, 3, 4, 4), "base")
    with pytest.raises(ValueError, match="the student answers with NaN or infinity"):
        answers(Head(torch.inf), torch.rand(5, 3, 2, 2), "student")
    with pytest.raises(ValueError, match="the base has one output; expected logits of two classes or more"):
        answers(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.rand(5, 3, 2, 2), "base")
    with pytest.raises(ValueError, match=r"the same question, got outputs for classes: {'student': 3, 'base': 4}"):
        check_answers({"student": z, "base": torch.rand(5, 4)})


def test_another_class_order_is_refused_and_confusion_is_not():
    torch.manual_seed(0)
    one = torch.arange(200) % 5
    order = torch.tensor([0, 2, 1, 3, 4])
    noisy = torch.where(torch.rand(200) < 0.3, torch.randint(0, 5, (200,)), order[one])
    with pytest.raises(
        ValueError, match=r"the student and the base number .* \(1 there is 2 here, 2 there is 1 here\)"
    ):
        check_class_order(one, noisy, ("the student", "the base"))
    check_class_order(one, one, ("", ""))
    check_class_order(one, torch.where(one == 3, 4, one), ("", ""))  # all dogs taken for cats
    check_class_order(torch.full((200,), 1), torch.full((200,), 2), ("", ""))  # each knows one answer only
    check_class_order(one, torch.randint(0, 5, (200,)), ("", ""))
    four = torch.arange(200) % 4
    merged = torch.tensor([0, 0, 2, 2])[four], torch.tensor([1, 1, 3, 3])[four]  # each knows one of two
    assert check_class_order(*merged, ("", ""))
    many = torch.arange(256) % 100
    with pytest.raises(ValueError, match="the student and the base number the classes differently"):
        check_class_order(many, 99 - many, ("the student", "the base"))
    confused = (torch.arange(300) % 10 + 1) % 10  # 9 is taken for 0 or for 5: no majority closes the cycle
    confused[9::20] = 5
    with pytest.raises(ValueError, match=r"0 there is 1 here, 1 there is 2 here, 2 there is 3 here\)"):
        check_class_order(torch.arange(300) % 10, confused, ("", ""))
    for _ in range(50):  # two classes at chance: a majority in both directions is likely
        check_class_order(*torch.randint(0, 2, (2, 100)), ("", ""))
    two = torch.arange(40) % 2
    with pytest.raises(ValueError, match="0 there is 1 here, 1 there is 0 here"):
        check_class_order(two, torch.where(torch.arange(40) < 32, 1 - two, two), ("", ""))
    assert not check_class_order(torch.arange(50), 49 - torch.arange(50), ("", ""))  # one image a class tells nothing


def test_prefixes_of_wrappers_are_taken_off_and_old_files_have_no_counts(tmp_path, weights):
    old = {f"module.model.{key}": value for key, value in weights.items() if "num_batches" not in key}
    save_file(old, tmp_path / "old.safetensors")
    found = load_own(network, tmp_path / "old.safetensors").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights if "num_batches" not in key)
    save_file(
        {f"a.{key}" if key[0] == "0" else f"b.{key}": value for key, value in weights.items()},
        tmp_path / "two.safetensors",
    )
    with pytest.raises(ValueError, match=r"not the weights of this Sequential; missing 0\.weight"):
        load_own(network, tmp_path / "two.safetensors")


def test_the_header_of_a_shipped_network_tells_its_input_size(monkeypatch):
    monkeypatch.setenv("KDX_NETWORKS", str(CHECKOUT / "data" / "networks"))
    rows = shipped_table().drop_duplicates("dataset").set_index("dataset")
    for dataset, size in {"cifar10": 32, "petimages": 96, "plantvillage": 96, "planted": 32}.items():
        assert header_of(networks_home() / rows.loc[dataset, "file"])["size"] == size


def test_grey_and_flat_networks_get_what_they_take():
    assert channels_of(nn.Sequential(nn.Conv2d(1, 4, 3)), 784) == 1
    assert channels_of(nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), 784) == 1
    assert channels_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 784, 4)), 784) == 3
    assert channels_of(build("resnet10", 3, "small", 0.125), 1024) == 3
    assert named_normalisation("half", 1) == NORMALISATIONS["half"][1]
    assert named_normalisation("0.1,0.2,0.3/1,1,1", 3) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="expected 3 means"):
        named_normalisation("0.1/1", 3)
