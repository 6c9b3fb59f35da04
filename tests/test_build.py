import base64
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import nbformat
import pandas as pd
import pytest

from kdx.pages import build
from tests.checkout import ROOT, copy_sources


def write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook.cells[0].metadata = {"tags": ["parameters"]}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.mark.book
def test_execute_failed_notebook_is_not_taken_for_a_page(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "x: int = 1  # a number", "1 / (x - 1)")
    with pytest.raises(build.BookError, match=r"n.ipynb: ZeroDivisionError: division by zero"):
        build.execute(path, tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()
    assert (tmp_path / "out.failed.ipynb").exists()
    build.execute(path, tmp_path / "{x}" / "out.ipynb", {"x": 2})  # not the parameter
    assert (tmp_path / "{x}" / "out.ipynb").exists()
    build.execute(path, tmp_path / "out.ipynb", {"x": 2})
    assert not (tmp_path / "out.failed.ipynb").exists()


@pytest.mark.book
def test_pages_are_executed_side_by_side_and_those_that_wait_last(tmp_path):
    def page(name, *cells, **facts):
        source = write_notebook(tmp_path / f"{name}.ipynb", "x: int = 1  # a number", *cells)
        return build.Page(name, source, {}, tmp_path / "executed" / source.name, **facts)

    meet = (  # two pages that end only if both run
        "import os, pathlib, time",
        "me, other = map(pathlib.Path, {}); me.touch()",
        "for _ in range(1200):\n    time.sleep(0.0 if other.exists() else 0.05)\nassert other.exists()",
        "print(os.environ['LOKY_MAX_CPU_COUNT'])",
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    last = page("last", f"assert all(map(__import__('os').path.exists, {[a, b]}))", waits=True)
    one, two = (page(name, *[cell.format(pair) for cell in meet]) for name, pair in (("one", [a, b]), ("two", [b, a])))
    done = [(p.name, what) for p, what, _ in build.execute_pages([last, one, two], workers=2)]
    assert done[-1] == ("last", "executed")
    assert sorted(done) == [("last", "executed"), ("one", "executed"), ("two", "executed")]
    assert nbformat.read(one.executed, as_version=4).cells[-1].outputs[0].text.strip().isdigit()
    assert [what for _, what, _ in build.execute_pages([one, last], workers=1)] == ["unchanged", "unchanged"]
    with pytest.raises(build.BookError, match=r"bad.ipynb: ZeroDivisionError"):
        list(build.execute_pages([one, page("bad", "1 / 0")], workers=2))
    with pytest.raises(ValueError, match="expected 1 page at a time or more, got -1"):
        list(build.execute_pages([one], workers=-1))


def test_publish_saves_the_one_picture_of_a_cell(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("figure", metadata={"kdx": {"publish": "figure.png"}})
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(b"picture").decode()})]
    notebook.cells = [cell]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    build.publish_pictures(tmp_path / "n.ipynb")
    assert (tmp_path / "n_figure.png").read_bytes() == b"picture"
    cell.outputs = []
    nbformat.write(notebook, tmp_path / "n.ipynb")
    with pytest.raises(build.BookError, match=r"expected one picture to publish as figure.png, got 0"):
        build.publish_pictures(tmp_path / "n.ipynb")


def test_page_key_covers_cells_metadata_parameters_package_and_tables(tmp_path, monkeypatch):
    page = build.load_pages(ROOT, "smoke")[1]
    key = build.page_key(page)
    assert build.page_key(page) == key
    assert build.page_key(replace(page, parameters={**page.parameters, "seed": 1})) != key
    changed = nbformat.read(page.notebook, as_version=4)
    changed.cells[0].source += " More."
    nbformat.write(changed, tmp_path / "text.ipynb")
    assert build.page_key(replace(page, notebook=tmp_path / "text.ipynb")) != key
    changed = nbformat.read(page.notebook, as_version=4)
    changed.cells[-1].metadata["tags"] = []
    nbformat.write(changed, tmp_path / "tags.ipynb")
    assert build.page_key(replace(page, notebook=tmp_path / "tags.ipynb")) != key
    package = shutil.copytree(ROOT / "kdx", tmp_path / "kdx")
    tables = shutil.copytree(ROOT / "data" / "paper", tmp_path / "data" / "paper")
    for name in ("results", "leaderboard"):
        shutil.copytree(ROOT / "data" / name, tmp_path / "data" / name)
    monkeypatch.setattr(build, "PACKAGE", package)
    assert build.page_key(page) == key
    table = (tables / "table1.csv").read_text()
    (tables / "table1.csv").write_text(table.replace("0.0794", "0.0795"))
    assert build.page_key(page) != key
    (tables / "table1.csv").write_text(table)
    for file in (tmp_path / "data" / "leaderboard" / "mine.json", tmp_path / "networks" / "text" / "networks.csv"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        assert build.page_key(page) != key
        file.unlink()
    assert build.page_key(page) == key
    (package / "measure" / "scores.py").write_text((package / "measure" / "scores.py").read_text() + "\nLEVEL = 0.9\n")
    assert build.page_key(page) != key


def test_html_key_covers_prose_executed_pages_and_settings_but_not_what_is_built(tmp_path):
    root = copy_sources(tmp_path)
    keys = {build.html_key(root)}
    (root / "book" / "_build").mkdir()
    (root / "book" / "_build" / "build.log").write_text("built")
    assert {build.html_key(root)} == keys
    for name in ("book/index.md", "book/executed/01_gradcam.ipynb", "_config.yml"):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("changed")
        assert build.html_key(root) not in keys
        keys.add(build.html_key(root))


@pytest.mark.real_data
@pytest.mark.book
def test_appendix_page_on_real_leaves(photographs, tmp_path, monkeypatch):
    """The page of the same notebook, from real photographs with masks; it has a title of its own."""
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDX_DATA", str(photographs["plantvillage"].parent))
    (tmp_path / "root").mkdir()
    root = copy_sources(tmp_path / "root")
    (page,) = [page for page in build.load_pages(root, "smoke") if page.name == "plantvillage_unicam"]
    assert build.execute_page(page) == "executed"
    cells = nbformat.read(page.executed, as_version=4).cells
    assert cells[0].source.startswith("# Plant leaves: features that only one of two networks has\n")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    quotes = {o.metadata["scrapbook"]["name"]: o.data for o in outputs if "scrapbook" in o.metadata}
    assert "beyond its area" in quotes["claim_8_effects"]["application/papermill.record/text/html"]
    text = " ".join(o.data.get("text/markdown", "") + o.data.get("text/html", "") for o in outputs if "data" in o)
    assert "Share of the mass on the object" in text
    assert build.execute_page(page) == "unchanged"


def test_parse_parameter_follows_the_declared_type():
    path = ROOT / "notebooks" / "01_gradcam.ipynb"
    for item, value in {"lr=1e-3": 1e-3, "epochs=2": 2, "dataset=no": "no", "progressive=false": False}.items():
        assert build.parse_parameter(path, item) == (item.partition("=")[0], value)
    for item, kind in {
        "seed=abc": "int",
        "seed=1.5": "int",
        "progressive=maybe": "bool",
        "techniques=dist": "list",
    }.items():
        with pytest.raises(ValueError, match=f"-p {item}: expected {kind}, got"):
            build.parse_parameter(path, item)


@pytest.mark.book
def test_execute_passes_the_data_home_on(tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "n" / "n.ipynb", "x: int = 1  # a number", "import os; os.environ['KDX_HOME']")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_HOME", "relative")
    build.execute(path, tmp_path / "out.ipynb", {})
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs
    assert output.data["text/plain"] == repr(str(tmp_path / "relative"))
    assert os.environ["KDX_HOME"] == "relative"
    assert "KDX_DATA" not in os.environ


@pytest.mark.book
def test_page_is_kept_aside_when_its_data_are_gone_and_made_anew_when_they_change(tmp_path, monkeypatch):
    (tmp_path / "root" / "book" / "executed").mkdir(parents=True)
    notebook = write_notebook(tmp_path / "n" / "n.ipynb", 'dataset: str = "petimages"  # a name', "1 + 1")
    executed = tmp_path / "root" / "book" / "executed" / "pets.ipynb"
    page = build.Page("pets", notebook, {"dataset": "petimages", "size": 32}, executed, "Pets")
    del page.parameters["size"]
    for kind in ("Cat", "Dog"):
        (tmp_path / "place" / "petimages" / "PetImages" / kind).mkdir(parents=True)
        (tmp_path / "place" / "petimages" / "PetImages" / kind / "1.jpg").write_bytes(b"x")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert build.execute_page(page) == "executed"
    assert build.execute_page(page) == "unchanged"
    (tmp_path / "place" / "petimages" / "PetImages" / "Cat" / "2.jpg").write_bytes(b"x")
    key = build.page_key(page)
    assert executed.with_suffix(".key").read_text() != key
    monkeypatch.delenv("KDX_DATA")
    assert build.execute_page(page) == "not built, petimages is not here"
    assert "Not built here" in executed.read_text()
    assert "Not built here" not in executed.with_suffix(".last.ipynb").read_text()


def test_a_page_without_its_data_tells_others_what_a_stored_run_found(tmp_path, monkeypatch):
    book = tmp_path / "root" / "book"
    (book / "executed").mkdir(parents=True)
    (book / "claims.md").write_text("{glue:any}`pets.ipynb::claim_1_verdict` {glue:any}`pets.ipynb::claim_1_effects`")
    code = "from IPython.display import HTML\nfrom myst_nb import glue\n"
    code += "glue('claim_1_verdict', HTML('<b>yes</b>'), display=False)"
    notebook = write_notebook(tmp_path / "n" / "n.ipynb", 'dataset: str = "petimages"  # a name', code)
    page = build.Page("pets", notebook, {}, book / "executed" / "pets.ipynb")
    with pytest.raises(ValueError, match="pets: expected an executed page, got none"):
        build.quotes([page])
    assert build.execute_page(page) == "executed"
    table = build.quotes([page])
    assert table.to_numpy().tolist() == [["pets", "claim_1_verdict", "<b>yes</b>"]]
    more = pd.DataFrame(
        [["pets", "claim_1_effects", "all"], ["dogs", "claim_1_effects", "none"]], columns=table.columns
    )
    monkeypatch.setattr(build.results, "load", lambda name: (pd.concat([table, more]), {"date": "2026-01-02"}))
    page = replace(page, parameters={"dataset": "petimages"})
    assert build.has_photographs(page)
    assert build.execute_page(page) == "not built, petimages is not here"
    with pytest.raises(ValueError, match="expected an executed page"):
        build.quotes([page])  # what is stored is not stored anew
    outputs = nbformat.read(page.executed, as_version=4).cells[-1].outputs
    found = {o.metadata["scrapbook"]["name"]: o.data[f"{build.GLUE_PREFIX}text/html"] for o in outputs}
    assert found == {"claim_1_verdict": "<b>yes</b>", "claim_1_effects": "all (stored run of 2026-01-02)"}


@pytest.mark.book
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


@pytest.mark.browser
def test_the_book_is_printed_with_its_pictures(tmp_path, monkeypatch, chromedriver):
    """The one page that Sphinx writes lies a folder too deep for its addresses."""
    monkeypatch.setattr(build, "_jupyter_book", lambda root, builder, profile: asked.append((builder, profile)))
    asked, folder = [], tmp_path / "book" / "_build" / "singlehtml"
    (folder / "book").mkdir(parents=True)
    (folder / "picture.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><text y="20">inside</text></svg>')
    (folder / "book" / "index.html").write_text('<html lang="en"><p>first</p><img src="picture.svg" alt="picture">')
    pdf = build.build_pdf(tmp_path, "smoke")
    content = pdf.read_bytes()
    assert asked == [("singlehtml", "smoke")]
    assert content.startswith(b"%PDF")
    (folder / "picture.svg").unlink()
    assert len(build.build_pdf(tmp_path).read_bytes()) != len(content)  # the picture was in it
    monkeypatch.setattr(build, "CHROMIUM", ("no-such-browser",))
    with pytest.raises(build.BookError, match="printed by Chromium; none of no-such-browser is installed"):
        build.build_pdf(tmp_path)
