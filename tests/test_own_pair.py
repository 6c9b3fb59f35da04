"""Networks and images of a report, checked against each other."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import kdx
from kdx.networks.models import save_checkpoint
from kdx.pages.own_pair import check_given, facts, networks_given, per_image, read_networks, read_pair
from tests.networks import state

NAMES = ("blue", "green", "red")
COLOURS = ((2, 0), (1, 1), (0, 2))  # channel that is bright, in the order of the folders, and the output


class Colour(nn.Module):
    """Answers with the mean of each channel, in the order of ``NAMES``; some answers are moved by noise."""

    def __init__(self, noise=0.0, seed=0, order=(2, 1, 0), classes=3):
        super().__init__()
        self.features = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(3)[list(order)][:, :, None, None])
            self.features.bias.zero_()
            self.head.weight.copy_(4 * torch.eye(3, 3)[[min(i, 2) for i in range(classes)]])
            self.head.weight.add_(noise * torch.randn(classes, 3, generator=generator))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, (bright, _) in zip(NAMES, COLOURS, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = torch.rand(12, 12, 3, generator=generator) * 150
            pixels[..., bright] += 80
            Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def read(tmp_path, monkeypatch):
    def make(roles, **settings):
        paths = {}
        for role, network in roles.items():
            save_file(network.state_dict(), tmp_path / f"{role}.safetensors")
            paths[role] = tmp_path / f"{role}.safetensors"
        builds = {role: lambda network=network: network for role, network in roles.items()}
        return read_networks(paths, builds, "cpu")

    return make


def pair_of(read, folder, **settings):
    return read_pair(read({"student": Colour(), "base": Colour(1.5, seed=3)}), folder, **settings)


def test_a_pair_is_read_and_says_what_was_assumed(read, folder):
    pair = pair_of(read, folder)
    assert (pair.size, pair.size_from, len(pair)) == (12, "of the images", 30)
    assert pair.ledger.right("student").mean() > 0.9
    assert any("ImageNet was assumed for the student and the base" in c for c in pair.caveats)
    assert any("12 x 12 pixels, the size of the images" in c for c in pair.caveats)
    known, others = pair.halves
    assert sorted([*known.tolist(), *others.tolist()]) == list(range(30))
    assert pair.truth.labels[known].bincount().tolist() == pair.truth.labels[others].bincount().tolist() == [5, 5, 5]
    assert pair.answer("base")(pair.pictures.images[:4]).tolist() == pair.answers["base"][:4].tolist()
    given = pair_of(read, folder, normalisation="none", size=12)
    assert not [c for c in given.caveats if "assumed" in c or "12 x 12" in c]
    single = read_pair(pair.own, folder, normalisation="none", limit=21)
    single.truth.labels[:] = torch.arange(21)  # one image of each class
    assert [len(half) for half in single.halves] == [11, 10] or [len(half) for half in single.halves] == [10, 11]
    table = per_image(pair)
    assert table["gained"].sum() == pair.ledger.against("base").gained
    assert facts(pair, "x")["data"]["sha256"] == facts(given, "y")["data"]["sha256"]


def test_a_teacher_of_another_size_is_named(read, folder):
    networks = read({"student": Colour(), "base": Colour(1.5, seed=3), "teacher": Colour(0.5, seed=4)})
    for size, named in ((24, True), (12, False)):
        other = replace(networks, headers=networks.headers | {"teacher": {"size": size}})
        caveats = " ".join(read_pair(other, folder).caveats)
        assert ("was trained on 24 x 24 pixels, and is shown 12 x 12" in caveats) == named


def test_images_that_tell_most_come_first(read, folder):
    pair = pair_of(read, folder)
    gained = torch.from_numpy(pair.ledger.quantities("student")["gained"])
    rows = pair.halves[1]
    size = torch.arange(len(rows), dtype=torch.float)
    chosen = pair.telling(size, rows, 6)
    assert len(set(chosen.tolist())) == 6
    assert set(chosen.tolist()) <= set(rows.tolist())
    if gained[rows].any():
        assert gained[chosen[0]]
    assert int(rows[-1]) in chosen.tolist()  # the largest of all
    assert pair.caption(0).splitlines()[0] in NAMES


def test_signs_of_a_wrong_input_are_named(read, folder):
    wrong = Colour(order=(0, 0, 0))
    found = read_pair(read({"student": wrong, "base": Colour(2.5, seed=1)}), folder)
    assert any("Hardly better than chance" in c and "student" in c for c in found.caveats)
    taught = read({"student": wrong, "base": Colour(0.5, seed=1), "teacher": Colour(0.01, seed=5)})
    assert any("is 12 pixels the size that it was trained with?" in c for c in read_pair(taught, folder).caveats)
    other = read({"student": Colour(), "base": Colour(0.5, seed=1), "teacher": Colour(classes=5)})
    found = read_pair(other, folder)
    assert any("The teacher has other classes" in c for c in found.caveats)
    assert set(found.answers) == {"student", "base"}


class Bright(Colour):
    """Right only where images were normalised to -1 or more."""

    def forward(self, x):
        z = super().forward(x)
        return z if float(x.min()) >= -1.01 else 0 * z + torch.eye(3)[0]


def test_another_normalisation_is_proposed_where_it_is_better(read, folder):
    found = read_pair(read({"student": Bright(), "base": Colour(0.5, seed=1)}), folder)
    told = [c for c in found.caveats if "With the normalisation" in c]
    assert any("'half', the student gets" in c for c in told)
    assert not any("the base gets" in c for c in told)


def test_what_does_not_fit_is_refused(read, folder, tmp_path):
    with pytest.raises(ValueError, match="second base and base are the same network"):
        read({"student": Colour(), "base": Colour(1, seed=1), "second base": Colour(1, seed=1)})
    with pytest.raises(ValueError, match="base: expected a checkpoint, got none"):
        read({"student": Colour()})
    with pytest.raises(ValueError, match=r"no file nowhere.pt .base."):
        read_networks({"student": tmp_path / "student.safetensors", "base": "nowhere.pt"}, {})
    with pytest.raises(ValueError, match="the student and the base number the classes differently"):
        read_pair(read({"student": Colour(), "base": Colour(0.1, order=(0, 2, 1))}), folder)
    with pytest.raises(ValueError, match="outputs for classes"):
        read_pair(read({"student": Colour(), "base": Colour(classes=4)}), folder)
    with pytest.raises(ValueError, match="expected 20 images or more, got 6"):
        pair_of(read, folder, limit=6)
    with pytest.raises(ValueError, match="normalisation: expected imagenet"):
        pair_of(read, folder, normalisation="cifar")


def test_a_flat_folder_says_nothing_about_right_and_wrong(read, folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in folder.glob("*/*.png"):
        (tmp_path / "flat" / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    pair = pair_of(read, tmp_path / "flat")
    assert pair.ledger is None
    assert any("Labels are not known" in c for c in pair.caveats)
    assert torch.equal(pair.targets, pair.answers["student"])
    assert "label" not in per_image(pair)


def test_networks_are_left_as_they_were(read, folder):
    networks = read({"student": Colour(), "base": Colour(1.0, seed=1)})
    before = {role: state(network) for role, network in networks.networks.items()}
    read_pair(networks, folder)
    assert {role: state(network) for role, network in networks.networks.items()} == before


def test_roles_have_parameters():
    given = {"student": "s", "base": "b", "base2": "", "teacher": "t", "build": "f", "build_teacher": "g"}
    paths, builds = networks_given(given)
    assert paths == {"student": "s", "base": "b", "teacher": "t"}
    assert builds == {"student": "f", "base": "f", "teacher": "g"}


def test_a_checkpoint_of_kdx_needs_no_builder(tmp_path):
    teacher, other = tmp_path / "teacher.safetensors", tmp_path / "other.safetensors"
    network = kdx.build("resnet10", 3, "small", 0.125, seed=0)
    save_checkpoint(teacher, network, {"classes": list(NAMES), "mean": [0.5] * 3, "std": [0.5] * 3})
    save_file(network.state_dict(), other)
    given = {"student": str(other), "base": str(other), "teacher": str(teacher), "build": "f"}
    assert networks_given(given)[1] == {"student": "f", "base": "f", "teacher": ""}


def test_a_perceptron_takes_the_normalisation_of_one_channel(folder, tmp_path):
    given = {"build": "torch.nn:Linear(in_features=144, out_features=3)", "data": str(folder)}
    for role in ("student", "base"):
        given[role] = str(tmp_path / f"{role}.safetensors")
        save_file(nn.Linear(144, 3).state_dict(), given[role])
    check_given(given | {"normalisation": "0.5/0.25"})
    with pytest.raises(ValueError, match="normalisation: expected 1 means and 1 standard deviations"):
        check_given(given | {"normalisation": "0.5,0.5,0.5/0.25,0.25,0.25"})
