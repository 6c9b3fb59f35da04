"""The run store: trained models under a key made of spec, data and code.

A run is a folder ``runs/<key>/`` of ``manifest.json``, ``model.safetensors`` and
``history.csv``. It is written beside its place and moved there in one step, so what is found
under a key is finished. Nothing is overwritten.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import platform
import shutil
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision

from kdx.home import data_home
from kdx.models import Network, build, load_checkpoint, save_checkpoint

FORMAT = 1  # of the folder; part of every key


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes
    ----------
    manifest : spec, versions, device, precision, duration in seconds, checksums of the files.
    history : tidy table of epoch, split (train, validation), loss, accuracy (fraction).
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
        """The trained network in evaluation mode; on the CPU when it is first asked for."""
        return self._checkpoint[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the network tells apart, in the order of its logits."""
        return tuple(self._checkpoint[1]["classes"])

    @cached_property
    def _checkpoint(self) -> tuple[Network, dict[str, Any]]:
        return load_checkpoint(self.path / "model.safetensors")


def run_key(spec: Mapping[str, Any], code: str) -> str:
    """32 hex digits of a spec (JSON literals; 1 and 1.0 are the same) and of the code behind it."""
    text = json.dumps([FORMAT, _plain(spec), code], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def code_digest(*code: Any) -> str:
    """SHA-256 (hex) of the source of modules, classes or functions.

    Comments, docstrings and layout play no part.
    """
    return hashlib.sha256("\n".join(_essence(part) for part in code).encode()).hexdigest()


def _essence(code: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def find_run(key: str) -> Run | None:
    """The finished run of this key, or None. A damaged one raises ValueError."""
    path = data_home() / "runs" / key
    if not path.exists():
        return None
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if (got := _sha256(path / name)) != expected:
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

    Parameters
    ----------
    header : goes into the checkpoint (class names, normalisation, metrics).
    facts : go into the manifest (device, precision, duration).
    """
    runs = data_home() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / key
    scratch = runs / f".partial-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        save_checkpoint(scratch / "model.safetensors", model, header)
        history.to_csv(scratch / "history.csv", index=False)
        files = {name: _sha256(scratch / name) for name in ("model.safetensors", "history.csv")}
        manifest = {"spec": spec, "versions": versions(), **facts, "files": files}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            os.replace(scratch, path)
        except OSError:
            if not path.exists():  # else another process finished the same run first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    run = find_run(key)
    assert run is not None
    return run


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
