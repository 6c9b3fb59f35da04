"""One notebook, and the command line."""

import base64
import os
import subprocess
import sys

import nbformat
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdx.pages import build
from kdx.cli import app
from tests.checkout import ROOT, copy_sources


def write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook.cells[0].metadata = {"tags": ["parameters"]}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def test_execute_failed_notebook_is_not_taken_for_a_page(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "x: int = 1  # a number", "1 / (x - 1)")
    with pytest.raises(book.BookError, match=r"n.ipynb: ZeroDivisionError: division by zero"):
        book.execute(path, tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()
    assert (tmp_path / "out.failed.ipynb").exists()
    book.execute(path, tmp_path / "out.ipynb", {"x": 2})
    assert (tmp_path / "out.ipynb").exists()
    assert not (tmp_path / "out.failed.ipynb").exists()


def test_publish_saves_the_one_picture_of_a_cell(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("figure", metadata={"kdx": {"publish": "figure.png"}})
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(b"picture").decode()})]
    notebook.cells = [cell]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    book.publish_pictures(tmp_path / "n.ipynb")
    assert (tmp_path / "n_figure.png").read_bytes() == b"picture"
    cell.outputs = []
    nbformat.write(notebook, tmp_path / "n.ipynb")
    with pytest.raises(book.BookError, match=r"expected one picture to publish as figure.png, got 0"):
        book.publish_pictures(tmp_path / "n.ipynb")


@pytest.mark.real_data
@pytest.mark.book
def test_appendix_page_on_real_leaves(photographs, tmp_path, monkeypatch):
    """The page of the same notebook, from real photographs with masks; it has a title of its own."""
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDX_DATA", str(photographs["plantvillage"].parent))
    (tmp_path / "root").mkdir()
    root = copy_sources(tmp_path / "root")
    (page,) = [page for page in book.load_pages(root, "smoke") if page.name == "plantvillage_unicam"]
    assert book.execute_page(page) == "executed"
    cells = nbformat.read(page.executed, as_version=4).cells
    assert cells[0].source.startswith("# Plant leaves: what only one of two networks holds\n")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    quotes = {o.metadata["scrapbook"]["name"]: o.data for o in outputs if "scrapbook" in o.metadata}
    assert "beyond its area" in quotes["claim_8_effects"]["application/papermill.record/text/html"]
    text = " ".join(o.data.get("text/markdown", "") + o.data.get("text/html", "") for o in outputs if "data" in o)
    assert "Share of the mass on the object" in text
    assert book.execute_page(page) == "unchanged"


def test_parse_parameter_follows_the_declared_type():
    path = ROOT / "notebooks" / "01_gradcam.ipynb"
    for item, value in {"lr=1e-3": 1e-3, "epochs=2": 2, "dataset=no": "no", "progressive=false": False}.items():
        assert book.parse_parameter(path, item) == (item.partition("=")[0], value)


def test_execute_passes_the_data_home_on(tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "n" / "n.ipynb", "x: int = 1  # a number", "import os; os.environ['KDX_HOME']")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_HOME", "relative")
    book.execute(path, tmp_path / "out.ipynb", {})
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs
    assert output.data["text/plain"] == repr(str(tmp_path / "relative"))
    assert os.environ["KDX_HOME"] == "relative"
    assert "KDX_DATA" not in os.environ


def test_page_is_kept_aside_when_its_data_are_gone_and_made_anew_when_they_change(tmp_path, monkeypatch):
    (tmp_path / "root" / "book" / "executed").mkdir(parents=True)
    notebook = write_notebook(tmp_path / "n" / "n.ipynb", 'dataset: str = "petimages"  # a name', "1 + 1")
    executed = tmp_path / "root" / "book" / "executed" / "pets.ipynb"
    page = book.Page("pets", notebook, {"dataset": "petimages", "size": 32}, executed, "Pets")
    del page.parameters["size"]
    for kind in ("Cat", "Dog"):
        (tmp_path / "place" / "petimages" / "PetImages" / kind).mkdir(parents=True)
        (tmp_path / "place" / "petimages" / "PetImages" / kind / "1.jpg").write_bytes(b"x")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert book.execute_page(page) == "executed"
    assert book.execute_page(page) == "unchanged"
    (tmp_path / "place" / "petimages" / "PetImages" / "Cat" / "2.jpg").write_bytes(b"x")
    key = book.page_key(page)
    assert executed.with_suffix(".key").read_text() != key
    monkeypatch.delenv("KDX_DATA")
    assert book.execute_page(page) == "not built, petimages is not here"
    assert "Not built here" in executed.read_text()
    assert "Not built here" not in executed.with_suffix(".last.ipynb").read_text()


def test_plain_papermill_refuses_unknown_parameters(tmp_path):
    """Without kdx's own check in front: the notebook defends itself."""
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / "01_gradcam.ipynb"),
        str(tmp_path / "o.ipynb"),
    ]
    done = subprocess.run([*papermill, "-p", "epoch", "2"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown parameters: epoch; choose from: dataset, classes" in done.stdout + done.stderr


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
        (["data", "get", "mnist"], "unknown dataset 'mnist'; choose from: cifar10, shapes"),
        (["run", "99_nothing"], "choose from: 00_data, 01_gradcam"),
        (["data", "prepare", "shapes"], "shapes needs no preparation"),
        (["data", "prepare", "petimages"], "petimages is not on this machine at 96 px: get it with `kdx data get"),
        (["data", "prepare", "data/paper"], "expected images as <class>/<image>, found table1.csv, table2.csv in"),
        (["run", "01_gradcam", "-p", "epoch=2"], "unknown parameters epoch; choose from: dataset, classes"),
        (["run", "01_gradcam", "-p", "epochs"], "-p epochs: expected name=value"),
        (["run", "01_gradcam", "-p", "lr=fast"], "-p lr=fast: expected float, got 'fast'"),
        (["run", "01_gradcam", "-p", "epochs=[2"], "-p epochs=[2: expected int"),
        (["run", "01_gradcam", "-o", "tests"], "expected a file to write, got the folder tests"),
        (["run", "01_gradcam", "--profile", "fast"], "unknown profile 'fast'; choose from: smoke, quick, paper"),
        (["book", "--profile", "fast"], "unknown profile 'fast'; choose from: smoke, quick, paper"),
        (["book", "--root", "/"], "run this inside a checkout of kdx"),
    ],
)
def test_cli_errors_are_one_message_and_exit_code_1(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
