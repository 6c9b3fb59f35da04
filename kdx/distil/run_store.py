"""The run store: trained networks under a key made of specification, data and code.

A run is a folder ``runs/<key>/`` with ``manifest.json``, ``model.safetensors`` and ``history.csv``. It is written
beside its place and moved there in one step, so every run that is found is complete. Nothing is overwritten.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
import torchvision

from kdx.networks.models import Network, build, load_checkpoint, save_checkpoint
from kdx.paths import data_home, sha256_of, written_whole

FORMAT = 1  # of the folder; part of every key


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        key: Name of its folder in the run store.
        path: The folder.
        manifest: Specification, versions, device, precision, duration in seconds, checksums of the files.
        history: Tidy table of epoch, split (train, validation), loss, accuracy (fraction).
    """

    key: str
    path: Path
    manifest: dict[str, Any] = field(repr=False)
    history: pd.DataFrame = field(repr=False)

    @property
    def untrained(self) -> Network:
        """The network as it was before training: its initial weights, in evaluation mode."""
        spec = self.manifest["spec"]
        return build(**spec["model"], seed=spec["seed"]).eval()

    @property
    def model(self) -> Network:
        """The trained network, on the CPU and in evaluation mode."""
        return self._checkpoint[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self._checkpoint[1]["classes"])

    @cached_property
    def _checkpoint(self) -> tuple[Network, dict[str, Any]]:
        return load_checkpoint(self.path / "model.safetensors")


def run_key(spec: Mapping[str, Any], code: str) -> str:
    """32 hex digits of a specification (JSON literals; 1 and 1.0 are the same) and of the code behind it."""
    text = json.dumps([FORMAT, _plain(spec), code], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def code_digest(*code: Any) -> str:
    """SHA-256 (hex) of functions and classes, and of whatever of kdx they name, directly or through others.

    Comments, docstrings, annotations, layout and the messages of errors play no part, nor do registries.

    Args:
        *code: Functions, classes, or partial calls of them.
    """
    sources: dict[str, str] = {}
    queue = list(code)
    while queue:
        one = queue.pop()
        if isinstance(one, partial):
            sources[repr(one)] = ""
            queue.append(one.func)
        elif (name := f"{one.__module__}.{one.__qualname__}") not in sources:
            tree = _Essence().visit(ast.parse(textwrap.dedent(inspect.getsource(one))))
            sources[name] = ast.unparse(tree)
            for named, value in _named(tree, sys.modules[one.__module__]):
                if callable(value):
                    queue.append(value)
                else:
                    sources[named] = repr(value)
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


class _Essence(ast.NodeTransformer):
    """Drops docstrings, annotations and the messages of errors."""

    def visit(self, node: ast.AST) -> Any:
        node = super().visit(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node


def _named(tree: ast.AST, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions, classes and constants of kdx that a piece of a module's code names."""
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        owner: Any = module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = getattr(module, node.value.id, None), node.attr
        elif isinstance(node, ast.Name) and node.id not in local:
            name = node.id
        else:
            continue
        if not isinstance(owner, ModuleType) or (value := vars(owner).get(name)) is None:
            continue
        if inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value)):
            if (value.__module__ or "").partition(".")[0] in ("kdx", module.__name__.partition(".")[0]):
                yield name, inspect.unwrap(value)
        elif owner.__name__.startswith("kdx.") and isinstance(value, str | int | float | tuple):
            yield f"{owner.__name__}.{name}", value


def find_run(key: str) -> Run | None:
    """The finished run of this key, or None. A damaged one raises ValueError."""
    path = data_home() / "runs" / key
    if not path.exists():
        return None
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if (got := sha256_of(path / name)) != expected:
                raise ValueError(f"{name}: expected SHA-256 {expected[:12]}…, got {got[:12]}…")
        return Run(key, path, manifest, pd.read_csv(path / "history.csv"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the stored run {path} is damaged ({error}); delete that folder to train it again") from error


def manifests() -> dict[str, dict[str, Any]]:
    """Key -> manifest of every finished run, newest first. A damaged one raises ValueError."""
    found = {}
    paths = (data_home() / "runs").glob("[0-9a-f]*/manifest.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found[path.parent.name] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"the stored run {path.parent} is damaged ({error}); delete that folder") from error
    return found


def store_run(
    key: str, spec: Mapping[str, Any], model: Network, history: pd.DataFrame, header: Mapping[str, Any], **facts: Any
) -> Run:
    """Write a finished run under its key, all or nothing.

    Args:
        key: From :func:`run_key`.
        spec: What the key was made of, for the manifest.
        model: The trained network.
        history: Loss and accuracy per epoch and split.
        header: Goes into the checkpoint (class names, normalisation, metrics).
        **facts: Go into the manifest (device, precision, duration).

    Returns:
        The run, read back. If another process has finished the same run first, that one.
    """
    with written_whole(data_home() / "runs" / key) as scratch:
        save_checkpoint(scratch / "model.safetensors", model, header)
        history.to_csv(scratch / "history.csv", index=False)
        files = {name: sha256_of(scratch / name) for name in ("model.safetensors", "history.csv")}
        manifest = {"spec": spec, "versions": versions(), **facts, "files": files}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    run = find_run(key)
    assert run is not None
    return run


def versions() -> dict[str, str]:
    """Versions of Python, torch and torchvision, and the platform."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }
