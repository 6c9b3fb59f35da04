"""`kdx explain`, and the notebook behind it, on networks that kdx did not make."""

import json

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from kdx.cli import app
from kdx.data.own_images import read_pictures
from kdx.networks.own_networks import find_builder, load_own, network_input
from kdx.pages import build, report
from tests.checkout import asked_for

MOBILENET = "torchvision.models:mobilenet_v2(num_classes=3)"
CONVNEXT = "timm:create_model('convnext_atto', num_classes=3)"
TRANSFORMER = "timm:create_model('vit_tiny_patch16_224', num_classes=3)"
OWN = '''
from torch import nn

class Network(nn.Module):
    """A convolutional network that returns a dict."""

    def __init__(self, channels=8):
        super().__init__()
        self.one = nn.Conv2d(3, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.three = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        x = self.three(self.two(self.one(x).relu()).relu()).relu()
        return {"features": x, "logits": 20 * self.head(x.mean((2, 3)))}
'''


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten textured images in each of three folders, and two files that are none."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(("moss", "sand", "water")):
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
    (tmp_path / "own_networks_of_a_test.py").write_text(OWN)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


QUICK = ["-p", "batches=2", "-p", "permutations=19", "-p", "shown=2"]


def check(folder, browser, stages, skipped=("sand/notes.txt", "water/broken.jpg")):
    """What every report holds; its text."""
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "report.ipynb", "report.json", "scores.csv", "images.csv", "maps.safetensors"} <= names
    assert sum(name.endswith(".png") for name in names) == 4
    page = (folder / "report.html").read_text()
    browser.get("about:blank")
    asked_for(browser)
    browser.get(address := (folder / "report.html").as_uri())
    assert [url for url in asked_for(browser) if not url.startswith("data:")] == [address]
    pictures = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert pictures[0][0].startswith("Images beside Grad-CAM maps")
    assert all(width for _, width in pictures)
    scores = pd.read_csv(folder / "scores.csv")
    assert list(scores["stage"].unique()) == stages
    facts = json.loads((folder / "report.json").read_text())
    assert set(facts["skipped"]) <= set(skipped)
    assert skipped == () or facts["skipped"]
    maps = load_file(folder / "maps.safetensors")
    assert {name.rpartition(".")[2] for name in maps} == set(stages)
    assert all(m.isfinite().all() and m.ndim == 3 for m in maps.values())
    return page


@pytest.mark.book
def test_explain_torchvision_networks_with_a_control(here, images, checkpoint, browser):
    student, base, base2 = (checkpoint(MOBILENET, seed, name) for seed, name in enumerate(("s", "b", "b2")))
    given = ["--student", student, "--base", base, "--base2", base2, "--build", MOBILENET, "--data", images]
    result = invoke(*given, "--size", 64, "--limit", 24, "--out", "report", *QUICK)
    assert result.exit_code == 0, result.output
    page = check(here / "report", browser, ["L1", "L2", "L3", "L4"])
    assert "24 images" in page
    assert "broken.jpg" in page
    assert "than a second base (disjoint" in page
    table = pd.read_csv(here / "report" / "images.csv")
    assert len(table) == 24
    assert set(table["label"]) == {"moss", "sand", "water"}
    again = invoke(*given, "--out", "report")
    assert again.exit_code == 2
    assert "report is there already; give another folder" in again.output


@pytest.mark.book
def test_explain_a_transformer_beside_a_convolutional_network_of_timm(here, images, checkpoint, browser):
    given = ["--student", checkpoint(TRANSFORMER, 0, "s"), "--base", checkpoint(CONVNEXT, 1, "b"), "--data", images]
    given += ["--build", TRANSFORMER, "--build-base", CONVNEXT, "--limit", 24, "--out", "deep/report", *QUICK]
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    page = check(here / "deep" / "report", browser, ["L1", "L2", "L3", "L4"])
    assert "blocks.11" in page
    assert "No second base was given" in page
    maps = load_file(here / "deep" / "report" / "maps.safetensors")
    assert maps["distilled.L2"].shape == (24, 14, 14)


@pytest.mark.book
def test_explain_a_network_of_ones_own_on_a_flat_folder(here, images, checkpoint, browser):
    build = "own_networks_of_a_test:Network"
    flat = here / "flat"
    flat.mkdir()
    for path in images.glob("*/*.png"):
        (flat / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    pictures = read_pictures(images, 32)
    for seed, name in enumerate(("s", "b")):
        model = load_own(build, checkpoint(build, seed, name))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(40):
            logits = model(network_input(model, pictures.images))["logits"]
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, pictures.labels).backward()
            optimizer.step()
        torch.save(model.state_dict(), here / f"{name}.pt")
    given = ["--student", "s.pt", "--base", "b.pt", "--data", "flat", "--build", build, "--size", 32]
    given += ["--out", "report", "-p", "classes=[moss, sand, water]"]
    result = invoke(*given, *QUICK)
    assert result.exit_code == 0, result.output
    page = check(here / "report", browser, ["L1", "L2", "L3"], skipped=())
    assert "about the classes that the student <em>predicts</em>, right or wrong" in page
    assert "accuracy" not in page.partition("Settings")[0].partition("Their answers")[2].partition("Where they")[0]


@pytest.mark.book
def test_explain_says_in_one_line_what_is_wrong(here, images, tmp_path):
    torch.save({"weights": nn.Linear(2, 2)}, "pickled.pt")
    given = ["--student", "pickled.pt", "--base", "pickled.pt", "--build", MOBILENET, "--data", images]
    result = invoke(*given, "--out", "report")
    assert result.exit_code == 2
    assert "pickled.pt: holds more than tensors" in result.output
    assert "Traceback" not in result.output
    assert not (here / "report").exists()
    assert not list(here.glob(".partial-*"))
    assert invoke(*given, "-p", "sizes=3").exit_code == 2
    assert invoke(*given, "--out", "pickled.pt").exit_code == 2


def test_debug_shows_where_an_error_came_from(here, monkeypatch):
    def fail(*_):
        raise build.BookError("what went wrong")

    monkeypatch.setattr(build, "execute", fail)
    given = ["--student", "a", "--base", "b", "--data", "c"]
    assert isinstance(invoke(*given, "--debug").exception, build.BookError)
    result = invoke(*given)
    assert result.exit_code == 2
    assert "error: what went wrong" in result.output


def test_a_report_is_refused_before_work_where_it_cannot_go(here):
    (here / "full").mkdir()
    (here / "full" / "x").touch()
    with pytest.raises(report.InputError, match="full is there already"):
        report.explain({}, here / "full")
