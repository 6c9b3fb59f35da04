import html
import json
import re
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kdx
from kdx.cli import app
from kdx.data.detection import find_detection, read_own_detection
from kdx.distil.average_precision import average_precision
from kdx.networks.models import load_checkpoint, save_checkpoint
from kdx.networks.own_networks import load_own
from kdx.pages import statement
from kdx.pages.detection_report import explain_detection
from kdx.paths import CHECKOUT
from tests.boxes import voc_object, write_cells, write_voc

SHIPPED = CHECKOUT / "data" / "networks" / "bccd" / "fold1"
GIVEN = {name: str(SHIPPED / f"{file}.safetensors") for name, file in
         {"student": "fgd", "base": "base", "base2": "second_base", "teacher": "teacher"}.items()}  # fmt: skip
SCORE = 0.6


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    write_cells(folder := tmp_path_factory.mktemp("cells"))
    return folder


@pytest.fixture(scope="module")
def report(cells, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    assert explain_detection(GIVEN | {"score": SCORE}, cells, out, "kdx explain --detection") == []
    return out


def command(*options, given=GIVEN, **folders):
    words = [word for name in ("student", "base") for word in (f"--{name}", given[name])]
    words += [word for name, path in folders.items() for word in (f"--{name}", str(path))]
    return CliRunner().invoke(app, ["explain", *words, *map(str, options)])


@pytest.mark.usefixtures("closed_figures")
def test_report_counts_objects_and_says_so(report, cells):
    assert {path.name for path in report.iterdir()} == {"report.html", "statement.json", "objects.csv"}
    page, said = (report / "report.html").read_text(), json.loads((report / "statement.json").read_text())
    jsonschema.validate(said, statement.schema())
    table = pd.read_csv(report / "objects.csv")
    assert len(table) == said["detection"]["objects"] == 24 * 5
    lost, gained = ((table["base"] > table["student"]).sum(), (table["student"] > table["base"]).sum())
    assert f"{lost} found objects of the base lost and {gained} gained" in said["sentences"][0]
    assert lost + gained > 0
    assert table["base"].any()
    assert (table["change"] == "gained").sum() == gained
    assert said["metrics"]["objects_gained"]["value"] == pytest.approx(gained / len(table), abs=1e-6)
    images, files = read_own_detection(cells, (192, 256))
    assert sorted(set(table["file"])) == files
    found = kdx.detect(load_own("", GIVEN["student"]), images.images)
    labels = tuple(torch.tensor([1, 2])[of] for of in images.labels)  # RBC, WBC, where Platelets come first
    truth = kdx.data.detection.replace(images, labels=labels, card=kdx.data.detection.DETECTION_DATASETS["bccd"])
    assert said["metrics"]["ap50"]["value"] == pytest.approx(average_precision(truth, found).value)
    text = re.sub(r"\s+", " ", page)
    assert "Likeness to the teacher" in text
    assert all(html.escape(line) in text for line in said["sentences"] + said["caveats"])
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.book
def test_report_fits_a_narrow_screen_and_asks_for_nothing(report, browser):
    from tests.checkout import asked_for

    browser.get("about:blank")
    asked_for(browser)
    browser.get(address := (report / "report.html").as_uri())
    assert [url for url in asked_for(browser) if not url.startswith("data:")] == [address]
    pictures = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert pictures
    assert all(alt and width for alt, width in pictures)
    browser.set_window_size(500, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 500
    browser.set_window_size(1200, 900)


def test_gates_fail_a_release_with_the_statement_alone(cells, tmp_path):
    done = command(
        "--json-only", "--out", tmp_path / "out", "--fail-on", "ap50_gain < 50%", "--fail-on", "objects_lost > 99%",
        "--limit", 20, detection=cells,
    )  # fmt: skip
    assert done.exit_code == 3
    assert "failed: ap50_gain < 50%: ap50_gain is" in done.output
    assert "objects_lost" not in done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["statement.json"]
    said = json.loads((tmp_path / "out" / "statement.json").read_text())
    assert said["gates"]["objects_lost > 99%"] is None
    assert said["images"] == 20
    assert "for want of a second base" in said["sentences"][-1]
    assert "--detection" in said["command"] or said["command"].startswith("kdx")


@pytest.fixture
def bad(tmp_path):
    """Name -> checkpoint that is no use, and folders likewise."""
    weights = load_file(GIVEN["student"])
    header = {"classes": ("Platelets", "RBC", "WBC"), "mean": [0.0] * 3, "std": [1.0] * 3}
    detector = load_checkpoint(GIVEN["student"], kdx.networks.fpn_detectors.rebuild)[0]
    with torch.no_grad():
        next(detector.parameters()).view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / "nan.safetensors", detector, header)
    save_checkpoint(tmp_path / "classifier.safetensors", kdx.build("resnet10", 3, "small", 0.125), header)
    few = kdx.build_detector("fcos", "resnet10@0.0625", 2, (192, 256), seed=0)
    save_checkpoint(tmp_path / "two.safetensors", few, header | {"classes": ("Platelets", "RBC")})
    save_file(weights, tmp_path / "bare.safetensors")
    (tmp_path / "nothing").mkdir()
    dogs = {f"{i:02}": (64, 64, [voc_object("dog", 1, 1, 20, 20)]) for i in range(20)}
    write_voc(tmp_path / "dogs", dogs)
    write_voc(tmp_path / "empty", {"a": (64, 64, [])})
    return tmp_path


@pytest.mark.parametrize(
    ("base", "folder", "message"),
    [
        ("", "nothing", "expected annotations of VOC"),
        ("", "empty", "no box can be used"),
        ("", "dogs", "objects of the classes of the student (Platelets, RBC, WBC), got also dog"),
        ("student", "dogs", "base and student are the same network"),
        ("nan", "dogs", "weights that are NaN or infinite"),
        ("classifier", "dogs", "base: expected a detector of torchvision with a feature pyramid"),
        ("two", "dogs", "agree in classes, mean, std, size, got the classes"),
        ("bare", "dogs", "not a checkpoint of kdx; say what builds its network"),
    ],
)
def test_bad_input_is_one_clear_line(bad, base, folder, message):
    path = {"": GIVEN["base"], "student": GIVEN["student"]}.get(base, str(bad / f"{base}.safetensors"))
    done = command("--out", bad / "out", given=GIVEN | {"base": path}, detection=bad / folder)
    assert done.exit_code == 2
    errors = [line for line in done.output.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.output
    assert not (bad / "out").exists()


def test_options_and_kinds_that_do_not_fit(cells, bad):
    told = lambda *options, **folders: command("--out", bad / "out", *options, **folders).output  # noqa: E731
    assert "expected one of --data with images, --text with sentences, --detection" in told()
    assert "expected one of" in told(detection=cells, data=cells)
    assert "labels, size, limit and score, got --normalisation" in told("--normalisation", "half", detection=cells)
    assert "got --score" in told("--score", 0.4, data=cells)
    assert "student: expected a classifier, got a detector; give its images with --detection" in told(data=cells)
    assert "score: expected a number between 0 and 1" in told("--score", 0, detection=cells)
    assert "unknown metric 'ap75'" in told("--fail-on", "ap75 < 1%", detection=cells)


@pytest.mark.real_data
@pytest.mark.usefixtures("closed_figures")
def test_blood_cells(tmp_path):
    if (folder := find_detection("bccd")) is None:
        pytest.skip("bccd is not on this machine")
    explain_detection(GIVEN, Path(folder), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "statement.json").read_text())
    assert (said["images"], said["detection"]["objects"]) == (72, 945)
    table = pd.read_csv(CHECKOUT / "data" / "networks" / "networks.csv").query("dataset == 'bccd'").set_index("role")
    for role, name in (("fgd", "ap50"), ("base", "base_ap50"), ("teacher", "teacher_ap50")):
        assert said["metrics"][name]["value"] == pytest.approx(table.loc[role, "accuracy"], abs=2e-3)
    assert "2 annotations or images were refused" in said["caveats"][0]
