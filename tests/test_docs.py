"""The API reference and the examples in docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kdx

ROOT = Path(__file__).parent.parent
API = (ROOT / "book" / "api.md").read_text()
MAIN = ("fit", "fss", "grad_cam", "label_embeddings", "load_dataset", "load_own", "perturb", "rs", "stages", "unicam")
MODULES = [module.name for module in pkgutil.walk_packages(kdx.__path__, "kdx.") if not module.ispkg]


def test_every_public_name_is_in_the_reference():
    documented = set(re.findall(r"^\.\. (?:autofunction|autoclass|py:data):: (\w+)$", API, re.MULTILINE))
    assert documented == {name for name in kdx.__all__ if not name.startswith("__")}


def test_every_public_function_and_class_has_a_docstring():
    for name in kdx.__all__:
        if callable(found := getattr(kdx, name)):
            assert len(found.__doc__) > 60, name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_main_calls_have_examples():
    assert [name for name in MAIN if ">>> " not in getattr(kdx, name).__doc__] == []


@pytest.mark.real_data
def test_code_of_the_readme_runs_as_it_stands(cifar10, monkeypatch):
    """With the shipped networks; nothing is trained."""
    monkeypatch.setattr("kdx.distil.fit.Job.run", lambda job: pytest.fail(f"{job.model} is not shipped"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks[:2]:
        exec(block, names)
    assert names["maps"].distilled["L4"].shape == (4, 4, 4)
    assert names["student"].manifest["spec"]["teacher"] == names["teacher"].key
