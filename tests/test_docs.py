"""The API reference and the examples in docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kdx

API = (Path(__file__).parent.parent / "book" / "api.md").read_text()
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
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_main_calls_have_examples():
    assert [name for name in MAIN if ">>> " not in getattr(kdx, name).__doc__] == []
