"""The commands on data and networks."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdx.cli import app
from kdx.distil import shipped, shipped_texts
from tests.checkout import ROOT


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.chdir(ROOT)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


def test_datasets_are_listed_and_made(cli):
    listed = cli("data", "list").output
    assert "50,000 train + 10,000 test" in listed
    assert "Broden 1: a probe, images with concept masks, not on this machine" in listed
    assert cli("data", "get", "shapes").output == "shapes: generated when loaded\n"


def test_networks_are_listed(cli, monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    listed = cli("networks", "list").output
    assert "cifar10: base, resnet10@0.1875: " in listed
    assert "text: response, pretrained teacher, 3 blocks: " in listed
    assert f"of images, {len(shipped_texts.table())} of sentences" in listed


def test_networks_of_sentences_are_verified_too(cli, monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    monkeypatch.setattr(shipped, "verify", lambda studies: iter(()))
    done = cli("networks", "verify")
    assert done.exit_code == 0, done.output
    assert "text/scratch-1.safetensors: " in done.output
    assert "not measured, the treebank is not on this machine" in done.output
    assert f"0 networks are as the tables say; {len(shipped_texts.table())} were not measured" in done.output


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
        (["data", "prepare", "shapes"], "shapes needs no preparation"),
        (["data", "get", "broden"], "no checksum of it is published: download http://netdissect.csail.mit.edu"),
        (["data", "prepare", "broden"], "broden is not on this machine: download"),
        (["data", "prepare", "broden", "--from", "tests"], "found no index.csv in it or one below"),
        (["data", "prepare", "petimages"], "petimages is not on this machine at 96 px: get it with `kdx data get"),
        (["data", "prepare", "data/paper"], "expected images as <class>/<image>, found han_table1.csv, "),
    ],
)
def test_errors_are_one_message_and_exit_code_1(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
