import io
import json
import runpy
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdx import Recipe, cross_fit, explorer, pairs
from kdx import view as view_room
from kdx.explorer import Explorer
from kdx.pairs import stored_pairs
from kdx.runs import manifests
from kdx.view import OWN, Settings, View


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run store with a student by two techniques, a second base, and a student of a random teacher."""
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDX_HOME", str(home))
        train = pairs.load_dataset("shapes", "train", limit=80, size=32)
        cross_fit(
            train,
            teacher="resnet10",
            student="resnet10",
            techniques=["response", "attention"],
            k=2,
            controls=1,
            recipe=Recipe(epochs=1, batch_size=20, sizes=(1.0,)),
            stem="small",
            width=0.125,
            device="cpu",
        )
    return home


@pytest.fixture(autouse=True)
def at_home(store, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(store))


@pytest.fixture(scope="module")
def view(store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDX_HOME", str(store))
        return View(stored_pairs("shapes", "response")[0], limit=200)


def test_pairs_are_students_with_the_base_of_their_fold():
    found = stored_pairs()
    assert [pair.technique for pair in found] in (["response", "attention"], ["attention", "response"])
    for pair in found:
        assert pair.networks == "resnet10@0.125 from its base, 1 epochs"
        specs = {role: run.manifest["spec"] for role, run in pair.runs.items()}
        assert list(specs) == ["student", "base", "second base"]
        assert specs["student"]["technique"]["name"] == pair.technique
        assert specs["base"]["seed"] == specs["student"]["seed"] != specs["second base"]["seed"]
        assert specs["base"]["train"] == specs["student"]["train"] == specs["second base"]["train"]
    with pytest.raises(ValueError, match=r"no student with its base of cifar10 and any technique .* 01_gradcam"):
        stored_pairs("cifar10")


def test_damaged_manifests_are_named(store):
    path = store / "runs" / ("f" * 32)
    path.mkdir()
    (path / "manifest.json").write_text("{")
    try:
        with pytest.raises(ValueError, match=f"the stored run {path} is damaged"):
            manifests()
    finally:
        (path / "manifest.json").unlink()
        path.rmdir()


def test_a_pair_becomes_files_for_the_page_on_own_models(tmp_path):
    pair = stored_pairs("shapes", "attention")[0]
    files = pair.as_files(tmp_path, 20)
    assert files["size"] == 32
    written = sorted(tmp_path.glob("*/*.png"))
    assert len(written) == 20
    images = pair.images(20)
    label = images.classes.index(written[0].parent.name)
    row = int(written[0].stem)
    assert int(images.labels[row]) == label
    with Image.open(written[0]) as picture:
        assert torch.equal(torch.tensor(list(picture.tobytes())), images.images[row].permute(1, 2, 0).flatten())


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
    own = view_room.unicam(
        view.networks["student"], view.networks["base"], x, view.embeddings[label][None], reference=view.reference(64)
    )
    assert torch.equal(scene.maps["distilled"]["L3"], own.distilled["L3"][0])
    assert torch.equal(scene.maps["residual"]["L2"], own.residual["L2"][0])
    cam = view_room.grad_cam(view.networks["base"], x, int(label), view.layers["base"])
    assert torch.equal(scene.maps["Grad-CAM, base"]["L4"], cam["L4"][0])
    assert set(scene.maps) == {*view_room.GRAD_CAM, *view_room.UNIQUE}
    assert abs(float(scene.probabilities["student"].sum()) - 1) < 1e-5
    assert set(scene.stability) == set(view_room.UNIQUE)
    other = view.scene(5, 64, "unexplained")
    nets = view.networks["student"], view.networks["base"]
    expected = view_room.unexplained(*nets, x, reference=view.reference(64))
    assert torch.equal(other.maps["residual"]["L3"], expected.residual["L3"][0])
    assert torch.equal(other.maps["Grad-CAM, base"]["L4"], cam["L4"][0])
    assert other.stability == {}


def test_images_are_picked_by_what_the_networks_make_of_them(view):
    right = {role: answer == view.images.labels for role, answer in view.answers.items()}
    groups = [row for name in view_room.PICKS if name != "all images" for row in view.choose(name)]
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
        assert list(table.index) == [*view.stages, *["answer"] * name.startswith("unexplained")]
        assert (table["low"] <= table["value"]).all()
        assert (table["value"] <= table["high"]).all()


def test_a_pair_without_second_base_has_no_control(view):
    pair = view.pair
    alone = pairs.Pair(pair.dataset, pair.technique, pair.networks, dict(list(pair.keys.items())[:2]), pair.spec)
    other = View(alone, limit=200)
    assert "control" not in other.scene(0, 32).maps
    assert len(other.draw(Settings(image=0, reference=32))) > 1000
    assert "unique, control" not in other.scores


# --- the widgets --------------------------------------------------------------------------------------


@pytest.fixture
def app():
    return Explorer("shapes", limit=100)


def test_widgets_drive_the_view(app):
    seen = {bytes(app.picture.value)}

    def changed():
        picture = bytes(app.picture.value)
        new = picture not in seen
        seen.add(picture)
        return new

    app.stage.value = "L2"
    assert changed()
    app.keep.value = 0.2
    assert changed()
    app.thumbnails[3][1].click()
    assert changed()
    assert app.settings().image == app.chosen[3]
    app.next.click()
    assert app.image == app.chosen[explorer.THUMBNAILS]
    app.previous.click()
    assert app.image == app.chosen[0]
    app.random.click()
    assert app.image in app.chosen
    before = app.technique.value
    app.technique.value = next(name for name in app.technique.options if name != before)
    assert app.stage.value == "L2"
    assert app.view.pair.technique != before
    assert "RS of the student" in app.table.value
    app.of_class.value = app.view.images.classes[1]
    assert {int(app.view.images.labels[i]) for i in app.chosen} == {1}


def test_export_writes_the_picture_and_its_settings(app, store):
    app.stage.value = "L3"
    app.export.click()
    (picture,) = (store / "exports").glob("*.png")
    (facts,) = (store / "exports").glob("*.json")
    assert picture.read_bytes() == bytes(app.picture.value)
    settings = json.loads(facts.read_text())
    assert settings["stage"] == "L3"
    assert settings["runs"] == dict(app.view.pair.keys)
    assert settings["image"] == app.image
    assert picture.name in app.link.value


def upload(content):
    return {
        "name": "x",
        "type": "image/png",
        "size": len(content),
        "content": content,
        "last_modified": datetime.now(UTC),
    }


def test_a_pair_without_images_of_the_choice_shows_all_of_its_own(app, monkeypatch):
    choose = View.choose
    other = next(name for name in app.technique.options if name != app.technique.value)
    app.pick.value = "both wrong"
    rare = lambda view, pick, name=None: [] if pick == "both wrong" else choose(view, pick, name)  # noqa: E731
    monkeypatch.setattr(View, "choose", rare)
    app.technique.value = other
    assert app.pick.value == "all images"
    assert len(app.chosen) == 100
    assert app.drawn[0] is app.view.pair
    assert app.drawn[0].technique == other


def test_export_tells_of_the_picture_that_is_shown(app, store):
    app.technique.unobserve_all()  # as if opening the other pair had failed
    before = app.technique.value
    app.technique.value = next(name for name in app.technique.options if name != before)
    for path in (store / "exports").glob("*"):
        path.unlink()
    app.export.click()
    (facts,) = (store / "exports").glob("*.json")
    assert json.loads(facts.read_text())["technique"] == before


def test_an_uploaded_image_is_explained_and_a_bad_one_refused(app):
    content = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(content, "PNG")
    for _ in range(2):  # the same file may come again
        app.thumbnails[1][1].click()
        app.uploader.value = (upload(content.getvalue()),)
        assert app.image == OWN
    assert "explained for the class that the student predicts" in app.status.value
    assert app.view.scene(OWN, 64).label.startswith("uploaded, taken for")
    picture = bytes(app.picture.value)
    app.uploader.value = (upload(b"text"),)
    assert "this file cannot be used: not an image" in app.status.value
    assert bytes(app.picture.value) == picture


def test_a_choice_without_images_is_said_and_keeps_the_view(app, monkeypatch):
    picture, chosen = bytes(app.picture.value), app.chosen
    monkeypatch.setattr(type(app.view), "choose", lambda *_: [])
    app.pick.value = "both wrong"
    assert "there is no image of all classes with both wrong" in app.status.value
    assert bytes(app.picture.value) == picture
    assert app.chosen == chosen


def test_without_pairs_the_explorer_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no student with its base .* `kdx run 01_gradcam` trains some"):
        Explorer()
    shown = []
    monkeypatch.setattr(explorer, "display", shown.append)
    explorer.explore()
    assert "The explorer has nothing to show:</b> no student" in shown[0].value


def test_a_few_images_are_enough():
    assert Explorer("shapes", limit=40).reference.options == (32,)
    assert View(stored_pairs("shapes")[0], limit=24).references == [12]


def test_the_benchmark_prints_how_long_every_knob_takes(capsys):
    path = Path(__file__).parent / "benchmarks" / "explorer.py"
    found = runpy.run_path(str(path))["main"]("shapes", repeats=1)
    assert list(found) == ["stage", "overlay", "kept", "reference", "new image"]
    assert capsys.readouterr().out.count(" ms\n") == 5
