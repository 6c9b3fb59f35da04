"""The parts of the project are in step with each other."""

import ast
import graphlib
import sys
import tomllib
from itertools import chain
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import kdx
from kdx.data.batches import balanced_batches
from kdx.pages import build

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_yml_installs_the_package_with_all_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    python = next(line.partition("=")[2] for line in conda if line.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    pip = next(line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    assert pip == ["--constraint constraints.txt", f"--editable .[{','.join(PROJECT['optional-dependencies'])}]"]
    assert environment["name"] == PROJECT["name"]


def test_constraints_pin_every_requirement_within_its_range():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for line in [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower()], prereleases=True), line


def test_pre_commit_runs_the_pinned_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for repo, name in (("ruff-pre-commit", "ruff"), ("nbstripout", "nbstripout")):
        (version,) = (hook["rev"].removeprefix("v") for hook in hooks if hook["repo"].endswith(repo))
        assert f"{name}=={version}" in pins


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kdx.__version__


def test_every_public_name_exists():
    assert all(hasattr(kdx, name) for name in kdx.__all__)


# --- the plan of the code (book/architecture.md) ------------------------------------------------

ROOMS = {  # folders, from the ground up; a room imports from those of lower rank, and within itself without circles
    "": 0, "data": 1, "networks": 2, "distil": 3, "explain": 3, "measure": 4, "pages": 5, "planted": 6, "explorer": 6,
}  # fmt: skip
SOURCES = sorted(ROOT.glob("kdx/**/*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}


def imports(path):
    """Names of the modules of kdx that a file imports, also inside of functions, and the names of other packages."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        ours |= names & set(MODULES)
        others |= {name.partition(".")[0] for name in names} - {"kdx"}
    return ours, others


def room(module):
    return module.split(".")[1] if module.count(".") == 2 else ""


def test_imports_point_down_and_make_no_circle():
    above = ("kdx.cli", "kdx.cli_pages", "kdx.cli_stores", "kdx.__init__")
    graph = {module: imports(path)[0] for module, path in MODULES.items() if module not in above}
    for module, imported in graph.items():
        for other in imported:
            lower = ROOMS[room(other)] < ROOMS[room(module)]
            assert lower or room(other) == room(module), f"{module} imports {other}"
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    ours, others = imports(ROOT / "kdx" / "distance.py")
    assert not ours
    assert others - set(sys.stdlib_module_names) == {"torch"}


def test_no_file_or_function_is_long():
    for path in [*SOURCES, *ROOT.glob("tests/**/*.py")]:
        source = path.read_text()
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and path in SOURCES:
                start = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno
                assert node.end_lineno - start <= 50, f"{path}: {node.name}"


def test_no_public_name_hides_a_module():
    assert not {f"kdx.{name}" for name in kdx.__all__} & {module.removesuffix(".__init__") for module in MODULES}


def test_every_module_has_its_tests():
    without = {"version"}
    names = {path.stem for path in SOURCES} - {"__init__"} - without
    assert [name for name in sorted(names) if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_calls_are_visible(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]  # after the parameters
    assert [cell.source for cell in code if cell.source.count("\n") >= 30] == []
    visible = [cell for cell in code if not {"hide-input", "remove-cell"} & set(cell.metadata.get("tags", []))]
    assert len(visible) >= 1
    functions = [n for cell in code for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno > 3] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean_and_parameterized(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    tagged = [i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [0]
    assert "check_parameters(" in code[1].source
    lines = [line for line in code[0].source.splitlines() if not line.startswith("#")]
    assert all("  # " in line and ": " in line.partition("=")[0] for line in lines)  # annotated and explained


@pytest.mark.parametrize("profile", build.PROFILES)
def test_pages_set_only_parameters_that_exist(profile):
    pages = build.load_pages(ROOT, profile)
    for page in pages:
        build.check_names(page.notebook, page.parameters)
    toc = (ROOT / "_toc.yml").read_text()
    assert all(f"book/executed/{page.name}" in toc for page in pages)
    app = ROOT / "notebooks" / "explorer.ipynb"  # needs a kernel; its page is explorer_views.ipynb
    assert {page.notebook for page in pages} == set(NOTEBOOKS) - {app}


PUBLISHED = [  # images of each class of PlantVillage, in the order of its card
    630, 621, 275, 1645, 1502, 1052, 854, 513, 1192, 985, 1162, 1180, 1383, 1076, 423, 5507, 2297, 360, 997, 1478,
    1000, 1000, 152, 371, 5090, 1835, 1109, 456, 2127, 1000, 1909, 952, 1771, 1676, 1404, 5357, 373, 1591,
]  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "size_of_sample"), [("smoke", 150), ("quick", 150), ("quick", None), ("paper", None)]
)
def test_pages_of_photographs_have_images_enough(profile, size_of_sample):
    """With the whole of the data, and with 150 images of each of 7 plants and 500 of each animal."""
    for page in build.load_pages(ROOT, profile):
        parameters = {name: ast.literal_eval(found["default"]) for name, found in
                      papermill.inspect_notebook(str(page.notebook)).items()} | page.parameters  # fmt: skip
        if page.parameters.get("dataset") not in ("petimages", "plantvillage"):
            continue
        card = kdx.DATASETS[parameters["dataset"]]
        counts = PUBLISHED if card.name == "plantvillage" else [12_490] * 2
        if size_of_sample:
            counts = [size_of_sample] * 38 if card.name == "plantvillage" else [500] * 2
        labels = torch.cat([torch.full((round(0.3 * n),), c) for c, n in enumerate(counts)])
        test = kdx.Dataset(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, card)
        test = test.only(parameters["classes"]) if parameters["classes"] else test
        test = test.limit(min(parameters["test_limit"] or len(test), len(test)))
        if "reference" in parameters:
            assert parameters["explained"] >= 2 * len(test.classes)
            *_, test = test.split(parameters["reference"], parameters["explained"])
        assert balanced_batches(test.labels, parameters["batches"], parameters["scored"])
