"""The networks that come with the checkout: training them, loading and verifying them.

Which there are is in :mod:`kdx.distil.studies`. They stand in ``data/networks``, one file each with weights in float16,
listed in ``networks.csv``. Whatever asks for the same training (:func:`kdx.fit`, the notebooks) is given the shipped
network.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from kdx.data.dataset import Dataset, available
from kdx.data.detection import DETECTION_DATASETS, Detection, find_detection
from kdx.distil.average_precision import average_precision
from kdx.distil.detector_fit import detect
from kdx.distil.fit import evaluate
from kdx.distil.run_store import COLUMNS, Run, find_run, find_shipped, shipped_table
from kdx.distil.studies import Study
from kdx.networks.fpn_detectors import rebuild
from kdx.networks.models import Network, load_checkpoint, save_checkpoint
from kdx.paths import CHECKOUT, networks_home, sha256_of
from kdx.version import __version__

log = logging.getLogger(__name__)
TOLERANCE = 0.001  # of an accuracy, between machines: one of the 1,000 planted test images, ten of CIFAR-10's


def load_network(dataset: str, role: str, fold: int = 1) -> Network:
    """A shipped network, on the CPU and in evaluation mode.

    Args:
        dataset: Such as ``"cifar10"``.
        role: Such as ``"base"``, ``"teacher"`` or ``"response"``; ``kdx networks list`` shows all.
        fold: From 1.

    Raises:
        ValueError: There is no such network, or its file is damaged.

    Examples:
        >>> import kdx
        >>> student = kdx.load_network("cifar10", "response", fold=2)
        >>> kdx.stages(student)["L4"]
        'layer4.0'
    """
    return open_network(dataset, role, fold).model


def load_pair(dataset: str, role: str = "response", fold: int = 1) -> tuple[Network, Network]:
    """A shipped student and the base of its fold and architecture, as :func:`load_network` gives them.

    Raises:
        ValueError: There is no such student, or not exactly one base.
    """
    student, table = load_network(dataset, role, fold), shipped_table()
    table = table[(table["dataset"] == dataset) & (table["fold"] == fold)]
    table = table[table["model"] == table.loc[table["role"] == role, "model"].item()]
    control = table["role"].str.contains("second|reordered")
    bases = table.loc[(table["technique"] == "label") & (table["role"] != role) & ~control, "role"]
    if len(bases) != 1:
        raise ValueError(
            f"expected one base of {role!r} of {dataset}, fold {fold}, got {', '.join(map(repr, bases)) or 'none'}; "
            "choose it with kdx.load_network"
        )
    return student, load_network(dataset, bases.item(), fold)


def open_network(dataset: str, role: str, fold: int) -> Run:
    """A shipped network with its history, as :func:`load_network` finds it."""
    table = shipped_table()
    for column, value in (("dataset", dataset), ("role", role), ("fold", fold)):
        if value not in (choices := table[column].unique().tolist()):
            raise ValueError(f"no shipped network of {column} {value!r}; choose from: {', '.join(map(repr, choices))}")
        table = table[table[column] == value]
    row = table.iloc[0]
    if (run := find_run(row["sha256"][:32])) is None:
        raise ValueError(f"{networks_home() / row['file']} is missing; `kdx networks train --missing` trains it again")
    return run


def train(
    studies: Sequence[Study],
    datasets: Sequence[str] = (),
    only: Sequence[str] = (),
    folds: Sequence[int] = (),
    workers: int | str = 0,
    device: str = "auto",
) -> None:
    """Train the shipped networks that are missing, and write each into place when it is finished.

    Trainings are kept in the run store as well, so nothing is lost when the command is stopped. A student learns from
    its teacher as it is shipped.

    Args:
        studies: ``STUDIES``, and those of other modules.
        datasets: Names; empty takes all.
        only: Roles; empty takes all.
        folds: From 1; empty takes all.
        workers: As for :func:`kdx.cross_fit`.
        device: As for :func:`kdx.fit`.

    Raises:
        ValueError: A dataset, role or fold of which no network is shipped.
    """
    _check("datasets", datasets, [study.dataset for study in studies])
    chosen = [study for study in studies if not datasets or study.dataset in datasets]
    places = [place for study in chosen for place in study.places]
    _check("roles", only, [role for role, _ in places])
    _check("folds", folds, [fold for _, fold in places])
    for study in chosen:
        wanted = [(role, f) for role, f in study.places if (not only or role in only) and (not folds or f in folds)]
        if wanted and not _is_here(study.dataset):
            log.warning("%s is not on this machine; its networks are passed over", study.dataset)
        elif wanted:
            study.train(wanted, partial(ship, study.dataset, study.images("test")), workers, device)


def _is_here(dataset: str) -> bool:
    if dataset in DETECTION_DATASETS:
        return find_detection(dataset) is not None
    return available(dataset) is not None


def _measured(model: Any, tested: Dataset | Detection) -> float:
    """The accuracy of a classifier, or the AP50 of a detector."""
    if isinstance(tested, Detection):
        return average_precision(tested, detect(model, tested.images)).value
    return evaluate(model, tested).accuracy


def _name_of(architecture: Mapping[str, Any]) -> str:
    name = " on ".join(architecture[part] for part in ("kind", "backbone", "name") if part in architecture)
    return f"{name}@{architecture['width']!r}"


def _check(what: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    choices = list(dict.fromkeys(known))
    if unknown := [one for one in given if one not in choices]:
        raise ValueError(f"unknown {what} {unknown}; choose from: {', '.join(map(repr, choices))}")


def ship(dataset: str, tested: Dataset | Detection, run: Run, role: str, fold: int) -> Run:
    """Write a network into ``data/networks`` and its row into the table, unless it is there.

    Args:
        dataset: Name of the folder.
        tested: Images on which the file is evaluated.
        run: The network.
        role: What it is used for, see :func:`load_network`.
        fold: From 1.

    Returns:
        The shipped network.
    """
    home = networks_home()
    name = role.replace(" > ", "-").replace(", ", "-").replace(" ", "_")
    path = home / dataset / f"fold{fold}" / f"{name}.safetensors"
    if there := find_shipped(run.digest):
        return there
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = run.manifest["spec"]
    facts = {name: run.manifest[name] for name in ("spec", "digest", "dataset", "versions", "device", "precision")}
    header = {
        "classes": run.classes,
        "mean": spec["input"]["mean"],
        "std": spec["input"]["std"],
        "history": run.history.round(4).to_dict("list"),
        "run": facts | {"seconds": run.manifest["seconds"]},
    }
    scratch = path.with_suffix(f".{os.getpid()}.partial")
    save_checkpoint(scratch, run.model, header, torch.float16)
    accuracy = _measured(load_checkpoint(scratch, rebuild)[0], tested)
    row = {
        "dataset": dataset,
        "role": role,
        "fold": fold,
        "seed": spec["seed"],
        "model": _name_of(spec["model"]),
        "technique": spec["technique"]["name"],
        "epochs": spec["recipe"]["epochs"],
        "accuracy": round(accuracy, 4),
        "file": path.relative_to(home).as_posix(),
        "sha256": sha256_of(scratch),
        "digest": run.digest,
        "data": spec["train"][:16],
        "version": __version__,
        "commit": commit(),
        "device": run.manifest["device"],
        "precision": run.manifest["precision"],
        "seconds": run.manifest["seconds"],
    }
    with FileLock(home / ".lock"):
        table = shipped_table()
        table = pd.concat([table[table["file"] != row["file"]], pd.DataFrame([row])])
        order = ["dataset", "fold", "model", "role"]
        partial = home / "networks.csv.partial"
        table.sort_values(order)[COLUMNS].to_csv(partial, index=False)
        os.replace(scratch, path)
        os.replace(partial, home / "networks.csv")
    shipped = find_run(row["sha256"][:32])
    assert shipped is not None
    return shipped


def commit() -> str:
    """The commit of the checkout, with + where files were changed; empty where git does not tell."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def verify(studies: Sequence[Study]) -> Iterator[dict[str, Any]]:
    """Evaluate every shipped network on the test images of its dataset.

    Args:
        studies: As for :func:`train`.

    Yields:
        A row of ``networks.csv`` with ``measured``, the test accuracy (NaN where it could not be measured),
        ``skipped``, why not, and ``problem``: empty if the file is whole and the accuracy is that of the table to
        ``TOLERANCE``.
    """
    table = shipped_table()
    there = [study for study in studies if (table["dataset"] == study.dataset).any() and _is_here(study.dataset)]
    images = {study.dataset: study.images("test") for study in there}
    for row in table.to_dict("records"):
        measured, problem, skipped = float("nan"), "", ""
        try:
            run = find_run(row["sha256"][:32])
            if run is None:
                problem = "the file is missing"
            elif row["dataset"] not in images:
                skipped = f"{row['dataset']} is not on this machine"
            else:
                measured = _measured(run.model, images[row["dataset"]])
                if not round(abs(measured - row["accuracy"]), 4) <= TOLERANCE:
                    problem = f"expected an accuracy of {row['accuracy']:.4f}, got {measured:.4f}"
        except ValueError as error:
            problem = str(error)
        except ModuleNotFoundError as error:  # that of average precision, which says how to install it
            skipped = str(error)
        yield row | {"measured": measured, "problem": problem, "skipped": skipped}
