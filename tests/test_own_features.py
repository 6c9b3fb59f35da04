"""What a report measures inside networks."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import kdx
from kdx.explain.reference import ANSWER
from kdx.pages import own_features as module
from kdx.pages.own_pair import read_networks, read_pair
from tests.networks import Small

pytestmark = pytest.mark.usefixtures("one_thread")


class Flat(nn.Sequential):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(nn.Flatten(), nn.Linear(3 * 256, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(64):
        (folder / f"class {i % 4}").mkdir(exist_ok=True)
        pixels = torch.rand(16, 16, 3, generator=generator) * 200 + 10 * (i % 4)
        Image.fromarray(pixels.byte().numpy()).save(folder / f"class {i % 4}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    return make(tmp_path_factory.mktemp("networks"), folder, {"student": Small(seed=0), "base": Small(seed=1),
        "second base": Small(seed=2), "teacher": Small(6, seed=3)})  # fmt: skip


def make(place, folder, roles):
    for role, network in roles.items():
        save_file(network.state_dict(), place / f"{role}.safetensors")
    paths = {role: place / f"{role}.safetensors" for role in roles}
    networks = read_networks(paths, {role: lambda n=network: n for role, network in roles.items()}, "cpu")
    return read_pair(networks, folder, normalisation="half")


@pytest.fixture(scope="module")
def layers(pair):
    found, reason = module.find_stages(pair, {role: ([], "") for role in pair.own.networks})
    assert reason == ""
    assert set(found) == set(pair.own.networks)
    return found


def test_the_teacher_has_other_classes_and_is_in_the_features_alone(pair):
    assert "teacher" in pair.logits
    assert "teacher" not in pair.answers


def test_maps_are_those_of_the_functions_behind(pair, layers):
    known, others = pair.halves
    references = module.make_references(pair, layers, known)
    assert list(references) == ["student", "second base"]
    rows = others[:5]
    maps = module.make_maps(pair, references, known, rows, "unexplained", "one-hot")
    assert list(maps) == ["distilled", "residual", "control", "handed over"]
    x = [pair.inputs(role)[rows] for role in ("student", "base")]
    expected = kdx.unexplained(references["student"], tuple(x)).fused
    torch.testing.assert_close(maps["distilled"], expected["distilled"])
    assert all(m.shape == maps["distilled"].shape for m in maps.values())
    paper = module.make_maps(pair, references, known, rows, "unicam", "one-hot")
    assert list(paper) == ["distilled", "residual", "control"]
    named = module.maps_to_delete_by(pair, maps, layers, rows, "unexplained")
    assert list(named) == ["unexplained", "handed over", "Grad-CAM of the student"]
    cams = module.grad_cams(pair, layers, rows)
    assert list(cams) == ["student", "base"]
    assert [list(of) for of in cams.values()] == [["L3"], ["L3"]]


def test_unexplained_answers_need_no_forward_pass(pair, layers):
    reference = module.make_references(pair, layers, pair.halves[0])["student"]
    found = module.unexplained_answers(reference, pair, pair.halves[1])
    answers = reference.answers_of(*(pair.inputs(role)[pair.halves[1]] for role in ("student", "base")))
    torch.testing.assert_close(found, reference.regressions["distilled"][ANSWER].left_over(*answers))


def test_shares_and_scores_are_of_all_images(pair, layers):
    references = module.make_references(pair, layers, pair.halves[0])
    shares = module.shares(pair, references)
    assert (shares["n"] == 64).all()
    assert set(shares["network"]) == {"student", "second base"}
    assert set(shares["quantity"]) == {"unexplained", "handed over"}
    of = module.share_of_answers(shares, "unexplained")
    assert set(of) == {"student", "second base"}
    assert of["student"].low <= of["student"].mean <= of["student"].high
    assert module.share_of_answers(None, "unexplained") == {}
    scores = module.score(pair, layers, "one-hot", 9, 0)
    assert set(scores["score"]) == {"FSS", "CKA", "RS", "unique, distilled", "unique, residual"}
    assert (scores["n"] * scores["batches"] == 64).all()
    assert module.seconds(pair, layers, 10) > module.seconds(pair, {}, 10) > 0


def test_networks_without_places_have_none(folder, tmp_path):
    flat = make(tmp_path, folder, {"student": Flat(0), "base": Flat(1)})
    found, reason = module.find_stages(flat, {"student": ([], ""), "base": ([], "")})
    assert found == {}
    assert "the student has no stages with places" in reason
    with pytest.raises(ValueError, match="nowhere"):
        module.find_stages(flat, {"student": (["nowhere"], ""), "base": ([], "")})


def test_too_few_images_for_scores_are_a_caveat(folder, tmp_path, layers):
    few = make(tmp_path, folder, {"student": Small(seed=0), "base": Small(seed=1)})
    few.truth.labels[:] = torch.tensor([0] * 63 + [1])
    assert module.score(few, {role: layers[role] for role in ("student", "base")}, "one-hot", 9, 0) is None
    assert "No scores: labels: too few images" in few.caveats[-1]


@pytest.mark.parametrize(("side", "expected"), [(32, 64), (224, 27), (2000, 8)])
def test_few_large_images_are_explained_at_a_time(side, expected):
    images = torch.empty(1, 3, 1, 1, dtype=torch.uint8).expand(1, 3, side, side)
    assert module.at_a_time(SimpleNamespace(pictures=SimpleNamespace(images=images))) == expected
