"""The frame of the project is in step with itself."""

import tomllib
from itertools import chain
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import kdx
from kdx import book

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


@pytest.mark.parametrize("profile", book.PROFILES)
def test_pages_set_only_parameters_that_exist(profile):
    pages = book.load_pages(ROOT, profile)
    for page in pages:
        book.check_names(page.notebook, page.parameters)
    toc = (ROOT / "_toc.yml").read_text()
    assert all(f"book/executed/{page.name}" in toc for page in pages)
    assert {page.notebook for page in pages} == set(NOTEBOOKS)
