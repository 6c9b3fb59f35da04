"""`kdx explain`, and the notebook behind it, on networks that kdx did not make."""

import json

import jsonschema
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from kdx.cli import app
from kdx.networks.own_networks import find_builder
from kdx.pages import build, own_pair, report, statement
from tests.checkout import asked_for

MOBILENET = "torchvision.models:mobilenet_v3_small(num_classes=3)"
CONVNEXT = "timm:create_model('convnext_atto', num_classes=3)"
TRANSFORMER = "timm:create_model('vit_tiny_patch16_224', num_classes=3)"
CLASSES = ("<b>*moss*", "sand", "water")
MODULE = "own_networks_of_a_test"
OWN = '''
from torch import nn

class Perceptron(nn.Sequential):
    """Takes grey images of 48 x 48 pixels, and has no places."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(48 * 48, 8), nn.ReLU(), nn.Linear(8, 3))
'''


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten textured images in each of three folders, and two files that are none."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for j in range(10):
            pixels = torch.rand(48, 48, 3, generator=generator) * 120
            pixels[..., i] += 100
            Image.fromarray(pixels.byte().numpy()).save(folder / name / f"{j}.png")
    (folder / "sand" / "notes.txt").write_text("no image")
    (folder / "water" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    def save(build, seed, name):
        torch.manual_seed(seed)
        save_file(find_builder(build)().state_dict(), path := tmp_path / f"{name}.safetensors")
        return str(path)

    return save


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{MODULE}.py").write_text(OWN)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


QUICK = ["-p", "permutations=19", "-p", "shown=2", "-p", "sample=4"]


FILES = {"report.html", "report.ipynb", "report.json", "statement.json", "images.csv"}
OF_FEATURES = {"scores.csv", "shares.csv", "deletion.csv", "maps.safetensors", "report_maps.png", "report_grad_cam.png"}


OF_PROBES = {"detectors.csv", "concepts.csv"}


def check(folder, browser, stages, skipped=("sand/notes.txt", "water/broken.jpg"), probe=False):
    """What every report holds; its text."""
    expected = FILES | (OF_FEATURES if stages else set()) | (OF_PROBES if probe else set())
    assert {path.name for path in folder.iterdir()} == expected
    page = (folder / "report.html").read_text()
    browser.get("about:blank")
    asked_for(browser)
    browser.get(address := (folder / "report.html").as_uri())
    assert [url for url in asked_for(browser) if not url.startswith("data:")] == [address]
    pictures = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert all(width and alt and "No description" not in alt for alt, width in pictures)
    headings = browser.execute_script("return [...document.querySelectorAll('h1, h2')].map(h => h.innerText)")
    assert headings[1].startswith("What was found")
    links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert all(browser.execute_script("return document.getElementById(arguments[0]) !== null", name) for name in links)
    browser.set_window_size(400, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    browser.set_window_size(1200, 900)
    facts = json.loads((folder / "report.json").read_text())
    assert set(facts["skipped"]) <= set(skipped)
    assert skipped == () or facts["skipped"]
    said = json.loads((folder / "statement.json").read_text())
    jsonschema.validate(said, statement.schema())
    text = browser.execute_script("return document.body.innerText").replace("\xa0", " ")
    assert all(line in text for line in said["sentences"] + said["caveats"])
    if stages:
        assert list(pd.read_csv(folder / "scores.csv")["stage"].unique()) == stages
        maps = load_file(folder / "maps.safetensors")
        assert all(m.isfinite().all() and m.ndim == 3 for name, m in maps.items() if name != "rows")
    return page, said


@pytest.mark.book
def test_explain_torchvision_networks_with_a_control(here, images, checkpoint, browser):
    student, base, base2 = (checkpoint(MOBILENET, seed, name) for seed, name in enumerate(("s", "b", "b2")))
    given = ["--student", student, "--base", base, "--base2", base2, "--build", MOBILENET, "--data", images]
    given += ["--teacher", checkpoint(CONVNEXT, 5, "t"), "--build-teacher", CONVNEXT, "--size", 64]
    given += ["--probe", "shapes", "-p", "probed=24", "-p", "quantile=0.05"]
    gates = ["--fail-on", "accuracy < 99%", "--fail-on", "handed_over > 99.99%"]
    result = invoke(*given, "--limit", 24, "--out", "report", *gates, *QUICK)
    assert result.exit_code == 3, result.output
    assert "failed: accuracy < 99%: accuracy is" in result.output
    page, said = check(here / "report", browser, ["L1", "L2", "L3", "L4"], probe=True)
    assert "24 images of 32" in page
    assert (said["probe"]["name"], said["probe"]["images"]) == ("shapes", 24)
    assert {"new_detectors", "second_base_new_detectors"} <= set(said["metrics"])
    assert set(pd.read_csv(here / "report" / "detectors.csv")["network"]) == {"student", "base", "second base"}
    assert set(said["gates"]) == {"accuracy < 99%", "handed_over > 99.99%"}
    assert "accuracy &lt; 99%: failed" in page
    assert "broken.jpg" in page
    assert "kdx" in said["command"]
    assert any("the second base" in line for line in said["sentences"])
    assert any("hardly better than chance" in caveat.lower() for caveat in said["caveats"])
    assert any("normalisation" in caveat for caveat in said["caveats"])
    assert "handed_over" in said["metrics"]
    table = pd.read_csv(here / "report" / "images.csv")
    assert len(table) == 24
    assert set(table["label"]) == set(CLASSES)
    assert "<b>*moss*" not in page  # a name is no markup
    assert "&lt;b&gt;*moss*" in page
    again = invoke(*given, "--out", "report")
    assert again.exit_code == 2
    assert "report is there already; expected a new folder" in again.output


@pytest.mark.book
def test_explain_a_transformer_beside_a_convolutional_network_of_timm(here, images, checkpoint, browser):
    given = ["--student", checkpoint(TRANSFORMER, 0, "s"), "--base", checkpoint(CONVNEXT, 1, "b"), "--data", images]
    given += ["--build", TRANSFORMER, "--build-base", CONVNEXT, "--limit", 24, "--size", 224, "--out", "deep/report"]
    result = invoke(*given, *QUICK, "-p", "method=unicam")
    assert result.exit_code == 0, result.output
    page, said = check(here / "deep" / "report", browser, ["L1", "L2", "L3", "L4"])
    assert "blocks.11" in page
    assert "for want of a second base" in said["sentences"][-1]
    maps = load_file(here / "deep" / "report" / "maps.safetensors")
    assert maps["distilled"].shape == (4, 14, 14)


@pytest.mark.book
def test_explain_networks_without_places_on_a_flat_folder_of_grey_images(here, images, checkpoint, browser):
    """Multilayer perceptrons: no maps, and no labels, but what changed."""
    build = f"{MODULE}:Perceptron"
    (here / "flat").mkdir()
    for path in images.glob("*/*.png"):
        (here / "flat" / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    given = ["--student", checkpoint(build, 0, "s"), "--base", checkpoint(build, 1, "b"), "--build", build]
    result = invoke(*given, "--data", "flat", "--out", "report", *QUICK)
    assert result.exit_code == 0, result.output
    _, said = check(here / "report", browser, [], skipped=())
    assert any("has no stages with places" in caveat for caveat in said["caveats"])
    assert any("48 x 48 pixels, the size of the images" in caveat for caveat in said["caveats"])
    assert set(said["metrics"]) == {"answers_changed"}
    labelled = invoke(*given, "--data", images, "--json-only", "--out", "json")
    assert labelled.exit_code == 0, labelled.output
    assert [path.name for path in (here / "json").iterdir()] == ["statement.json"]
    assert "negative_flips" in json.loads((here / "json" / "statement.json").read_text())["metrics"]


def test_explain_says_in_one_line_what_is_wrong_before_a_kernel_starts(here, images, checkpoint, monkeypatch):
    monkeypatch.setattr(build, "execute", lambda *_: pytest.fail("a kernel was started"))
    torch.save({"weights": nn.Linear(2, 2)}, "pickled.pt")
    student, base = checkpoint(MOBILENET, 0, "s"), checkpoint(MOBILENET, 1, "b")
    given = {"--student": student, "--base": base, "--build": MOBILENET, "--data": images, "--out": "report"}
    for changed, message in (
        ({"--student": "nowhere.pt"}, "student: no file or folder nowhere.pt"),
        ({"--data": "nowhere"}, "data: no file or folder nowhere"),
        ({"--base": "pickled.pt"}, "pickled.pt: holds more than tensors"),
        ({"--base": student}, "base and student are the same network"),
        ({"--base2": base}, "second base and base are the same network"),
        ({"--build": CONVNEXT}, "not the weights of this ConvNeXt"),
        ({"--fail-on": "flips > 2%"}, "unknown metric 'flips'"),
        ({"--normalisation": "cifar"}, "normalisation: expected imagenet, cifar10, half, none"),
        ({"--labels": "pickled.pt"}, "labels: expected a text file"),
        ({"--probe": "nowhere"}, "unknown probe 'nowhere'; choose from: planted, shapes"),
        ({"--probe": images}, "expected a folder in Broden's layout, found no index.csv"),
        ({"-p": "sizes=3"}, "unknown parameters sizes"),
        ({"-p": "out=x"}, "the folder is given with --out"),
        ({"--out": "pickled.pt"}, "pickled.pt is there already"),
    ):
        result = invoke(*(part for pair in (given | changed).items() for part in pair))
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "Traceback" not in result.output
    assert not (here / "report").exists()
    assert not list(here.glob(".partial-*"))


@pytest.mark.book
def test_what_only_the_images_show_leaves_nothing_behind(here, images, checkpoint):
    given = ["--student", checkpoint(MOBILENET, 0, "s"), "--base", checkpoint(MOBILENET, 1, "b"), "--build", MOBILENET]
    (here / "few" / "sand").mkdir(parents=True)
    (here / "few" / "sand" / "0.png").write_bytes((images / "sand" / "0.png").read_bytes())
    result = invoke(*given, "--data", "few", "--out", "report")
    assert result.exit_code == 2
    assert "data: expected 20 images or more, got 1" in result.output
    assert {path.name for path in here.iterdir()} == {
        "few",
        "s.safetensors",
        "b.safetensors",
        "own_networks_of_a_test.py",
    }


def test_debug_shows_where_an_error_came_from(here, monkeypatch):
    def fail(*_):
        raise build.BookError("what went wrong")

    monkeypatch.setattr(build, "execute", fail)
    monkeypatch.setattr(own_pair, "check_given", lambda given: None)
    for name in "abc":
        (here / name).touch()
    given = ["--student", "a", "--base", "b", "--data", "c"]
    assert isinstance(invoke(*given, "--debug").exception, build.BookError)
    result = invoke(*given)
    assert result.exit_code == 2
    assert "error: what went wrong" in result.output


def test_a_report_is_refused_before_work_where_it_cannot_go(here):
    (here / "full").mkdir()
    (here / "full" / "x").touch()
    with pytest.raises(ValueError, match="full is there already"):
        report.explain({}, here / "full")
