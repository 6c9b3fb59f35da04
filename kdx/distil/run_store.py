"""Trained networks: the run store, and those that come with the checkout.

In the run store, a run is found by a key made of specification, data and code. It is a folder ``runs/<key>/`` with
``manifest.json``, ``model.safetensors`` and ``history.csv``, written beside its place and moved there in one step, so
every run that is found is complete. Nothing is overwritten.

A shipped network is one file in ``data/networks``, with weights in float16. It is found by the digest of its
specification alone, so that an edit of the code does not orphan it (:mod:`kdx.distil.shipped` makes these files).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
import torchvision

from kdx.networks.fpn_detectors import rebuild
from kdx.networks.models import Network, load_checkpoint, read_header, save_checkpoint
from kdx.paths import data_home, networks_home, sha256_of, written_whole

FORMAT = 1  # of the folder; part of every key
FILES = ("model.safetensors", "history.csv", "manifest.json")
COLUMNS = [
    "dataset", "role", "fold", "seed", "model", "technique", "epochs", "accuracy", "file", "sha256", "digest", "data",
    "version", "commit", "device", "precision", "seconds",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        key: Name of its folder in the run store; of a shipped network, the start of its file's SHA-256.
        path: The folder, or the file of a shipped network.
        manifest: Specification and its digest, versions, device, precision, duration in seconds.
        history: Tidy table of epoch, split (train, validation), loss, accuracy (fraction).
    """

    key: str
    path: Path
    manifest: dict[str, Any] = field(repr=False)
    history: pd.DataFrame = field(repr=False)

    @property
    def untrained(self) -> Any:
        """The network as it was before training: its initial weights, in evaluation mode."""
        spec = self.manifest["spec"]
        return rebuild(**spec["model"], seed=spec["seed"]).eval()

    @property
    def model(self) -> Network:
        """The trained network, on the CPU and in evaluation mode."""
        return self._checkpoint[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self._checkpoint[1]["classes"])

    @property
    def file(self) -> Path:
        """The safetensors file of the weights."""
        return self.path / "model.safetensors" if self.path.is_dir() else self.path

    @property
    def digest(self) -> str:
        """Of the specification alone, see :attr:`kdx.distil.fit.Job.digest`."""
        return self.manifest["digest"]

    @cached_property
    def _checkpoint(self) -> tuple[Network, dict[str, Any]]:
        return load_checkpoint(self.file, rebuild)


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
            sources[name], named = _essence(one)
            queue += [value for _, value in named if callable(value)]
            sources |= {constant: repr(value) for constant, value in named if not callable(value)}
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


@cache
def _essence(one: Any) -> tuple[str, list[tuple[str, Any]]]:
    """The code of a function or class without what changes no result, and what of kdx it names."""
    tree = _Essence().visit(ast.parse(textwrap.dedent(inspect.getsource(one))))
    return ast.unparse(tree), list(_named(tree, sys.modules[one.__module__]))


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
    """The finished run or shipped network of this key, or None. A damaged one raises ValueError."""
    path = data_home() / "runs" / key
    if not path.exists():
        return _open_shipped("sha256", lambda sha256: sha256.startswith(key))
    try:
        return _open(key, path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the stored run {path} is damaged ({error}); delete that folder to train it again") from error


def _open(key: str, path: Path) -> Run:
    manifest = json.loads((path / "manifest.json").read_text())
    for name, expected in manifest["files"].items():
        if (got := sha256_of(path / name)) != expected:
            raise ValueError(f"{name}: expected SHA-256 {expected[:12]}…, got {got[:12]}…")
    return Run(key, path, manifest, pd.read_csv(path / "history.csv"))


def find_shipped(digest: str) -> Run | None:
    """The shipped network of this digest of a specification, or None. A damaged one raises ValueError."""
    return _open_shipped("digest", lambda own: own == digest)


def shipped_table() -> pd.DataFrame:
    """``data/networks/networks.csv``, one row per shipped network; empty where kdx was installed without a checkout."""
    path = networks_home() / "networks.csv"
    return _read_table(path, path.stat().st_mtime_ns) if path.is_file() else pd.DataFrame(columns=COLUMNS)


@lru_cache(maxsize=1)
def _read_table(path: Path, changed: int) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"digest": str, "sha256": str})


def _open_shipped(column: str, wanted: Callable[[str], bool]) -> Run | None:
    table = shipped_table()
    rows = table[[wanted(value) for value in table[column]]]
    if not len(rows):
        return None
    row = rows.iloc[0]
    path = networks_home() / row["file"]
    if not path.is_file():
        return None
    if (got := sha256_of(path)) != row["sha256"]:
        raise ValueError(
            f"the shipped network {path} is damaged (expected SHA-256 {row['sha256'][:12]}…, got {got[:12]}…); delete "
            "it, and take it from the repository again or run `kdx networks train --missing`"
        )
    header = read_header(path)
    return Run(row["sha256"][:32], path, header["run"], pd.DataFrame(header["history"]))


def manifests() -> dict[str, dict[str, Any]]:
    """Key -> manifest of every finished run, newest first, then of every shipped network. A damaged one raises
    ValueError."""
    found = {}
    paths = (data_home() / "runs").glob("[0-9a-f]*/manifest.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found[path.parent.name] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"the stored run {path.parent} is damaged ({error}); delete that folder") from error
    for file, sha256 in shipped_table()[["file", "sha256"]].itertuples(index=False):
        if (path := networks_home() / file).is_file():
            found[sha256[:32]] = read_header(path)["run"]
    return found


def store_run(
    key: str, spec: Mapping[str, Any], model: Any, history: pd.DataFrame, header: Mapping[str, Any], **facts: Any
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


def receive(key: str, files: Mapping[str, bytes]) -> Run:
    """Store a run that was trained on another machine, all or nothing.

    Args:
        key: Of the run.
        files: Name -> content of all files of its folder.

    Returns:
        The run, read back.

    Raises:
        ValueError: A file is missing, or is not the one that the manifest names.
    """
    with written_whole(data_home() / "runs" / key) as scratch:
        try:
            for name in FILES:
                (scratch / name).write_bytes(files[name])
            run = _open(key, scratch)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the run {key} arrived damaged ({error}); start again") from error
    return replace(run, path=data_home() / "runs" / key)


def versions() -> dict[str, str]:
    """Versions of Python, torch and torchvision, and the platform."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }
