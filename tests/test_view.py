import io

import pytest
import torch
from PIL import Image

import kdx
from kdx.distil.stored_pairs import Pair, stored_pairs
from kdx.explorer.view import GRAD_CAM, PICKS, UNIQUE, Settings, View

pytestmark = pytest.mark.usefixtures("trained_home")


@pytest.fixture(scope="module")
def view(trained_store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDX_HOME", str(trained_store))
        return View(stored_pairs("shapes", "response")[0], limit=200)


def test_every_knob_changes_the_picture_and_going_back_restores_it(view):
    first = Settings(image=3, stage="L3", opacity=0.6, keep=0.5, reference=32)
    picture = view.draw(first)
    with Image.open(io.BytesIO(picture)) as opened:
        assert opened.size == (860, 470)
    others = [{"image": 4}, {"stage": "L2"}, {"opacity": 0.2}, {"keep": 0.2}, {"reference": 64}]
    others.append({"method": "UniCAM"})
    drawn = [view.draw(Settings(**{**vars(first), **change})) for change in others]
    assert len({picture, *drawn}) == 7
    assert view.draw(first) == picture


def test_maps_of_a_scene_are_those_of_unicam_and_grad_cam(view):
    scene = view.scene(5, 64, "UniCAM")
    x, label = view.x[5:6], view.images.labels[5]
    known = view.images.split(64, seed=0)[0].labels
    own = kdx.unicam(view.reference(64), view.embeddings[known], x, view.embeddings[label][None])
    assert torch.equal(scene.maps["distilled"]["L3"], own.distilled["L3"][0])
    assert torch.equal(scene.maps["residual"]["L2"], own.residual["L2"][0])
    cam = kdx.grad_cam(view.networks["base"], x, int(label), view.layers["base"])
    assert torch.equal(scene.maps["Grad-CAM, base"]["L4"], cam["L4"][0])
    assert set(scene.maps) == {*GRAD_CAM, *UNIQUE}
    assert abs(float(scene.probabilities["student"].sum()) - 1) < 1e-5
    assert set(scene.stability) == set(UNIQUE)
    other = view.scene(5, 64, "unexplained")
    expected = kdx.unexplained(view.reference(64), x)
    assert torch.equal(other.maps["residual"]["L3"], expected.residual["L3"][0])
    assert torch.equal(other.maps["Grad-CAM, base"]["L4"], cam["L4"][0])
    assert other.stability == {}


def test_images_are_picked_by_what_the_networks_make_of_them(view):
    right = {role: answer == view.images.labels for role, answer in view.answers.items()}
    groups = [row for name in PICKS if name != "all images" for row in view.choose(name)]
    assert sorted(groups) == view.choose("all images") == list(range(200))
    for row in view.choose("student right, base wrong"):
        assert right["student"][row]
        assert not right["base"][row]
    name = view.images.classes[3]
    assert view.choose("all images", name) == (view.images.labels == 3).nonzero()[:, 0].tolist()


def test_scores_have_intervals_for_every_stage(view):
    expected = ["FSS of student and base", "RS of the student", "RS of the base"]
    for kinds in (("distilled", "residual"), ("control",)):
        expected += [f"{score}, {kind}" for score in ("unique", "unexplained") for kind in kinds]
    assert list(view.scores) == expected
    for name, table in view.scores.items():
        assert list(table.index) == [*view.stages, *(["answer"] if name.startswith("unexplained") else [])]
        assert (table["low"] <= table["value"]).all()
        assert (table["value"] <= table["high"]).all()


def test_a_pair_without_second_base_has_no_control(view):
    pair = view.pair
    alone = Pair(pair.dataset, pair.technique, pair.networks, dict(list(pair.keys.items())[:2]), pair.spec)
    other = View(alone, limit=200)
    assert "control" not in other.scene(0, 32).maps
    assert len(other.draw(Settings(image=0, reference=32))) > 1000
    assert "unique, control" not in other.scores


def test_a_few_images_are_enough():
    assert View(stored_pairs("shapes")[0], limit=24).references == [12]
