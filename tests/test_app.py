import io
import json
import runpy
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from kdx.explorer import app as app_module
from kdx.explorer.app import Explorer
from kdx.explorer.view import OWN, View

pytestmark = pytest.mark.usefixtures("trained_home")


@pytest.fixture(scope="module")
def views():
    return {}


@pytest.fixture
def app(views, monkeypatch):
    """An explorer whose views of a pair are computed once for all tests."""

    def shared(pair, *settings):
        return views.setdefault((*pair.keys.items(), *settings), View(pair, *settings))

    monkeypatch.setattr(app_module, "View", shared)
    app = Explorer("shapes", limit=100)
    for view in views.values():
        view.own = None
    return app


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
    assert app.image == app.chosen[app_module.THUMBNAILS]
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


def test_export_writes_the_picture_and_its_settings(app, trained_home):
    app.stage.value = "L3"
    app.export.click()
    (picture,) = (trained_home / "exports").glob("*.png")
    (facts,) = (trained_home / "exports").glob("*.json")
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
    assert app.drawn[0].keys == app.view.pair.keys
    assert app.drawn[0].technique == other


def test_export_tells_of_the_picture_that_is_shown(app, trained_home):
    app.technique.unobserve_all()  # as if opening the other pair had failed
    before = app.technique.value
    app.technique.value = next(name for name in app.technique.options if name != before)
    for path in (trained_home / "exports").glob("*"):
        path.unlink()
    app.export.click()
    (facts,) = (trained_home / "exports").glob("*.json")
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
    monkeypatch.setattr(app_module, "display", shown.append)
    app_module.explore()
    assert "The explorer has nothing to show:</b> no student" in shown[0].value


def test_the_benchmark_prints_how_long_every_knob_takes(app, capsys):
    path = Path(__file__).parent / "benchmarks" / "explorer.py"
    found = runpy.run_path(str(path))["main"]("shapes", repeats=1, limit=100)
    assert list(found) == ["stage", "overlay", "kept", "reference", "new image"]
    assert capsys.readouterr().out.count(" ms\n") == 5


def test_a_small_set_of_images_limits_the_reference(app):
    assert Explorer("shapes", limit=40).reference.options == (32,)
