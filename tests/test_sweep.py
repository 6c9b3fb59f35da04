import nbformat
import pandas as pd
import pytest

from kdx.pages import build, sweep
from tests.test_build import write_notebook

CELLS = (
    "seed: int = 0  # a number\ntechnique: str = 'none'  # a name\nparts: list = []  # names",
    "from IPython.display import HTML\nfrom myst_nb import glue",
    "glue('twice', 2 * seed, display=False)\nglue('said', HTML(f'<b>{technique}</b> &amp; more'), display=False)",
    "assert technique != 'bad' or seed",
)


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "notebooks" / "one.ipynb", *CELLS)


def test_grids_are_read_as_the_notebook_declares_them(notebook):
    found = sweep.parse_grid(notebook, ["seed=0:3", "technique=response,dist", "parts=[a, b],[c]"])
    assert found == {"seed": [0, 1, 2], "technique": ["response", "dist"], "parts": [["a", "b"], ["c"]]}
    nested = sweep.parse_grid(notebook, ["parts=[[1, 2], {a: [3]}],['b],c']", "seed=0:2,7,1", "technique=don't,won't"])
    assert nested == {"parts": [[[1, 2], {"a": [3]}], ["b],c"]], "seed": [0, 1, 7], "technique": ["don't", "won't"]}
    with pytest.raises(ValueError, match="expected at most 10,000 values, got 99,999,999,999"):
        sweep.parse_grid(notebook, ["seed=0:99999999999"])
    for items, message in {
        ("seed=1:1",): "-p seed=1:1: expected values such as 0:10 or one,two",
        ("technique=",): "-p technique=: expected values",
        ("seed=[2",): r"-p seed=\[2: expected values such as 0:10 or one,two, got \[2",
        ("technique=a,,b",): "-p technique=a,,b: expected values such as 0:10 or one,two, got a,,b",
        ("seed=[2]",): r"-p seed=\[2\]: expected int",
        ("speed=1",): "unknown parameters speed",
        ("seed=1", "seed=2"): "-p seed: expected once",
        ("seed=0:1001", "technique=a,b,c,d,e,f,g,h,i,j"): "1 to 10,000 cells, from -p name=values, got 10,010",
        (): "1 to 10,000 cells, from -p name=values, got 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            sweep.parse_grid(notebook, items)


def test_cells_of_a_grid_have_names_of_their_own(notebook, tmp_path):
    pages = sweep.plan_sweep(notebook, {"seed": [0, 1], "parts": [["a/b"], ["a b"]]}, tmp_path, {"technique": "dist"})
    assert len({page.executed for page in pages}) == 4
    assert pages[0].executed.parent == tmp_path / "cells"
    assert pages[3].parameters == {"technique": "dist", "seed": 1, "parts": ["a b"]}
    (other,) = sweep.plan_sweep(notebook, {"parts": [["a b"]], "seed": [1]}, tmp_path)
    assert other.executed == pages[3].executed


@pytest.mark.book
def test_a_sweep_is_resumed_and_its_numbers_are_one_table(notebook, tmp_path):
    def run(*items):
        grid = sweep.parse_grid(notebook, items)
        pages = sweep.plan_sweep(notebook, grid, tmp_path / "out")
        return [done for _, done in sweep.sweep(pages, list(grid), tmp_path / "out")]

    with pytest.raises(build.BookError, match="AssertionError"):
        run("seed=0", "technique=dist,bad")
    table = pd.read_csv(tmp_path / "out" / "table.csv")  # of what was finished
    assert table.to_dict("list") == {
        "seed": [0, 0],
        "technique": ["dist", "dist"],
        "name": ["twice", "said"],
        "value": ["0", "dist & more"],
    }
    assert run("seed=0:2", "technique=dist") == ["unchanged", "executed"]
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index(["name", "seed"])["value"]
    assert table["twice"].tolist() == ["0", "2"]


def test_pictures_are_no_numbers(tmp_path):
    record = {"metadata": {"scrapbook": {"name": "drawn"}}}
    cell = nbformat.v4.new_code_cell("")
    cell.outputs = [nbformat.v4.new_output("display_data", {f"{build.GLUE_PREFIX}image/png": "x"}, **record)]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    assert sweep.read_glued(tmp_path / "one.ipynb") == {}
