"""The command line."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdx.cli import app
from tests.checkout import ROOT


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.chdir(ROOT)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


def test_cli_helps_and_lists(cli):
    for arguments in (["--help"], ["data", "--help"], ["run", "--help"], ["book", "--help"]):
        result = cli(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert "50,000 train + 10,000 test" in cli("data", "list").output
    assert "Broden 1: a probe, images with concept masks, not on this machine" in cli("data", "list").output
    assert cli("data", "get", "shapes").output == "shapes: generated when loaded\n"


def test_cli_prepares_a_folder_and_names_what_it_refuses(cli, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    for i in range(25):
        (tmp_path / "photos" / "one" / f"bad\n{i:02}.jpg").touch()
    output = cli("data", "prepare", str(tmp_path / "photos"), "--size", "16").output
    assert "16 good images of 2 classes (11 train, 5 test; test share 0.3, seed 0), 16 x 16 px" in output
    assert "refused: 25\n  one/bad\\n00.jpg: empty file\n" in output
    assert "and 5 more, all in" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "get", "svhn"], "unknown dataset 'svhn'; choose from: cifar10, mnist, shapes"),
        (["run", "99_nothing"], "choose from: 00_data, 01_gradcam"),
        (["data", "prepare", "shapes"], "shapes needs no preparation"),
        (["data", "get", "broden"], "no checksum of it is published: download http://netdissect.csail.mit.edu"),
        (["data", "prepare", "broden"], "broden is not on this machine: download"),
        (["data", "prepare", "broden", "--from", "tests"], "found no index.csv in it or one below"),
        (["data", "prepare", "petimages"], "petimages is not on this machine at 96 px: get it with `kdx data get"),
        (["data", "prepare", "data/paper"], "expected images as <class>/<image>, found han_table1.csv, "),
        (["run", "01_gradcam", "-p", "epoch=2"], "unknown parameters epoch; choose from: dataset, classes"),
        (["run", "01_gradcam", "-p", "epochs"], "-p epochs: expected name=value"),
        (["run", "01_gradcam", "-p", "lr=fast"], "-p lr=fast: expected float, got 'fast'"),
        (["run", "01_gradcam", "-p", "epochs=[2"], "-p epochs=[2: expected int"),
        (["run", "01_gradcam", "-o", "tests"], "expected a file to write, got the folder tests"),
        (
            ["run", "01_gradcam", "--profile", "fast"],
            "unknown profile 'fast'; choose from: smoke, shipped, quick, paper",
        ),
        (["book", "--profile", "fast"], "unknown profile 'fast'; choose from: smoke, shipped, quick, paper"),
        (["book", "--root", "/"], "run this inside a checkout of kdx"),
    ],
)
def test_cli_errors_are_one_message_and_exit_code_1(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_import_and_help_do_not_load_torch():
    """So that they answer at once."""
    code = (
        "import sys, kdx; from typer.testing import CliRunner; from kdx.cli import app\n"
        "for command in ([], ['data'], ['data', 'prepare'], ['run'], ['book'], ['explain']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'papermill'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
