"""Students in the run store and among the shipped networks, each with its base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from kdx.data.dataset import Dataset, load_dataset
from kdx.distil.run_store import Run, find_run, manifests

TWIN = ("model", "recipe", "train", "validation", "input")  # what a base shares with its student


@dataclass(frozen=True, eq=False)
class Pair:
    """A student, the base trained in the same way without a teacher, and a second base if there is one.

    Attributes:
        dataset: Name of the dataset.
        technique: How the student was distilled, with the start of its key where several students would otherwise
            have the same description.
        networks: Student, its teacher, the teacher's teacher, ... and the epochs of the student, in words.
        keys: student, base and, perhaps, second base -> key of the run.
        spec: Specification of the student's run.
    """

    dataset: str
    technique: str
    networks: str
    keys: Mapping[str, str] = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False)

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Student, base and, perhaps, second base -> finished run."""
        found = {role: find_run(key) for role, key in self.keys.items()}
        return {role: run for role, run in found.items() if run is not None}

    def images(self, limit: int | None = None, seed: int = 0) -> Dataset:
        """Test images in the size and normalisation of the networks."""
        given = self.spec["input"]
        size, normalisation = given["size"][1], (given["mean"], given["std"])
        whole = load_dataset(self.dataset, "test", seed=seed, size=size, normalisation=normalisation)
        classes = self.runs["student"].classes
        whole = whole if whole.classes == classes else whole.only(classes)
        return whole.limit(None if limit is None else min(limit, len(whole)), seed)

    def as_files(self, folder: Path, limit: int, seed: int = 0) -> dict[str, Any]:
        """Write test images as ``folder/<class>/<number>.png``.

        Returns:
            The pair as parameters of the notebook ``04_own_models``.
        """
        images = self.images(limit, seed)
        for i, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            path = folder / images.classes[label] / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        files = {role: str(run.file) for role, run in self.runs.items()}
        above = None if self.spec["teacher"] == self.keys["base"] else find_run(self.spec["teacher"])
        return {
            "student": files["student"],
            "base": files["base"],
            "base2": files.get("second base", ""),
            "teacher": "" if above is None else str(above.file),
            "data": str(folder),
        }


def stored_pairs(dataset: str | None = None, technique: str | None = None) -> list[Pair]:
    """The students that have a base in the run store or among the shipped networks, one fold of each kind.

    Those whose teacher has their seed come first, then those of their teacher's family, then those with a second base,
    then the newest; shipped ones after those of the run store. Students of a random teacher are left out.

    Args:
        dataset: Only of this dataset.
        technique: Only of this technique.

    Raises:
        ValueError: There is no such student.
    """
    stored = {key: manifest for key, manifest in manifests().items() if "batch_seed" in manifest["spec"]}  # classifiers
    bases: dict[Any, dict[int, str]] = {}  # twin -> seed -> key
    for key, manifest in stored.items():
        spec = manifest["spec"]
        if spec["technique"]["name"] == "label" and spec["batch_seed"] == spec["seed"]:  # no reordered base
            bases.setdefault(_twin(manifest), {})[manifest["spec"]["seed"]] = key
    found: dict[Any, Pair] = {}
    for key, manifest in sorted(stored.items(), key=lambda item: item[1]["spec"]["seed"]):
        spec = manifest["spec"]
        alike = bases.get(_twin(manifest), {})
        teacher = stored.get(spec["teacher"] or "")
        if teacher is None or spec["seed"] not in alike or not teacher["spec"]["recipe"]["epochs"]:
            continue
        if dataset not in (None, manifest["dataset"]) or technique not in (None, spec["technique"]["name"]):
            continue
        keys = {"student": key, "base": alike[spec["seed"]]}
        if others := [other for seed, other in sorted(alike.items()) if seed != spec["seed"]]:
            keys["second base"] = others[0]
        line = [key]
        while (above := stored[line[-1]]["spec"]["teacher"]) in stored:
            line.append(above)
        names = ["its base" if k == keys["base"] else _name(stored[k]["spec"]) for k in line]
        networks = f"{' from '.join(names)}, {spec['recipe']['epochs']} epochs"
        pair = Pair(manifest["dataset"], spec["technique"]["name"], networks, keys, spec)
        kind = (pair.dataset, networks, str(spec["technique"]), str(spec["recipe"]), str(spec["input"]))
        found.setdefault(kind, pair)
    if not found:
        of = f" of {dataset or 'any data'} and {technique or 'any technique'}"
        raise ValueError(f"no student with its base{of} in the run store; `kdx run 01_gradcam` trains some")
    named = Counter((pair.dataset, pair.networks, pair.technique) for pair in found.values())
    for kind, pair in found.items():
        if named[pair.dataset, pair.networks, pair.technique] > 1:  # other settings, or other data
            found[kind] = replace(pair, technique=f"{pair.technique} ({pair.keys['student'][:6]})")
    order = list(stored)

    def place(pair: Pair) -> tuple[bool, bool, bool, int]:
        teacher = stored[pair.spec["teacher"]]["spec"]
        of_another_seed = teacher["seed"] != pair.spec["seed"]  # a second student
        of_another_family = _family(teacher) != _family(pair.spec)
        return of_another_seed, of_another_family, len(pair.keys) < 3, order.index(pair.keys["student"])

    return sorted(found.values(), key=place)


def _twin(manifest: Mapping[str, Any]) -> str:
    return str([manifest["spec"][part] for part in TWIN])


def _family(spec: Mapping[str, Any]) -> str:
    """``"resnet"`` of resnet18."""
    return str(spec["model"]["name"]).rstrip("0123456789")


def _name(spec: Mapping[str, Any]) -> str:
    smoothed = "smoothed " if spec["technique"]["name"] == "smoothing" else ""
    return f"{smoothed}{spec['model']['name']}@{spec['model']['width']:g}"
