"""The command line."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kdx.cli import app
from tests.checkout import ROOT


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.chdir(ROOT)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


def test_cli_helps(cli):
    for arguments in (["--help"], ["data", "--help"], ["run", "--help"], ["book", "--help"]):
        result = cli(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "99_nothing"], "choose from: 00_data, 01_gradcam"),
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
