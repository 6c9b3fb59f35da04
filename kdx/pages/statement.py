"""The statement of a report: its numbers with intervals, and its sentences, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import pandas as pd

from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER
from kdx.pages.gates import METRICS
from kdx.pages.own_detectors import new_at_deepest
from kdx.pages.sentences import Evidence, overall, sentences

SCHEMA = "kdx-statement/1"


class Metric(NamedTuple):
    """A number of a statement with its 95 % interval and the number of images."""

    value: float
    low: float
    high: float
    n: int


def metrics(evidence: Evidence) -> dict[str, Metric]:
    """Those of ``METRICS`` that could be measured."""
    found: dict[str, Sequence[float]] = {}
    n = dict.fromkeys(METRICS, evidence.images)
    if ledger := evidence.ledger:
        accuracy = ledger.accuracy().set_index("network")[["value", "low", "high"]]
        rates = ledger.rates().set_index(["network", "quantity"])[["value", "low", "high"]]
        for role, prefix in ((STUDENT, ""), (BASE, "base_"), (SECOND, "second_base_"), (TEACHER, "teacher_")):
            if role in accuracy.index:
                found[f"{prefix}accuracy"] = accuracy.loc[role].tolist()
        found["accuracy_gain"] = ledger.against(BASE)[:3]
        if evidence.second:
            found["accuracy_gain_over_second_base"] = ledger.against(SECOND)[:3]
        names = {"gained": "gained", "lost": "negative_flips", "changed": "answers_changed"}
        for role, prefix in ((STUDENT, ""), (SECOND, "second_base_")):
            for quantity, name in names.items():
                if (role, quantity) in rates.index:
                    found[prefix + name] = rates.loc[(role, quantity)].tolist()
        for quantity, name in (("inherited", "inherited_errors"), ("own errors", "own_errors")):
            if (STUDENT, quantity) in rates.index:
                found[name] = rates.loc[(STUDENT, quantity)].tolist()
    for role, prefix in ((STUDENT, ""), (SECOND, "second_base_")):
        if role in evidence.changed:
            found.setdefault(f"{prefix}answers_changed", evidence.changed[role][:3])
        for name, of in (("unexplained", evidence.unexplained), ("handed_over", evidence.handed_over)):
            if role in of:
                found[prefix + name] = of[role][:3]
    if evidence.calibration is not None:
        table = evidence.calibration.set_index(["network", "score"])
        found["ece"] = table.loc[(STUDENT, "ECE"), ["value", "low", "high"]].tolist()
        for score in ("ECE", "NLL"):
            change = table.loc[(BASE, score), ["difference", "difference low", "difference high"]]
            found[f"{score.lower()}_change"] = change.tolist()
    if evidence.robustness is not None:
        row = overall(evidence.robustness, BASE)
        found["robustness_change"], n["robustness_change"] = row[["difference", "low", "high"]].tolist(), row["n"]
    if evidence.detectors is not None:
        for role, prefix in ((STUDENT, ""), (SECOND, "second_base_")):
            if share := new_at_deepest(evidence.detectors, role):
                found[f"{prefix}new_detectors"], n[f"{prefix}new_detectors"] = share[:3], share.n
    known = [name for name in METRICS if name in found and not math.isnan(found[name][0])]
    measured = {}
    for name in known:
        value, low, high = map(float, found[name])
        measured[name] = Metric(value, low, high, int(n[name]))
    return measured


def statement(evidence: Evidence, **facts: Any) -> dict[str, Any]:
    """The statement as JSON, as ``kdx/pages/statement.schema.json`` describes it.

    Args:
        evidence: What was measured.
        **facts: Of the run: command, version, networks, data, and probe if there is one.
    """
    return {
        "schema": SCHEMA,
        **facts,
        "images": evidence.images,
        "sentences": sentences(evidence),
        "caveats": list(evidence.caveats),
        "metrics": {name: metric._asdict() for name, metric in metrics(evidence).items()},
        "groups": {
            name: _records(table)
            for name in ("classes", "slices", "confusions", "concepts")
            if (table := getattr(evidence, name)) is not None
        },
    }


def schema() -> dict[str, Any]:
    """The JSON schema of a statement."""
    return json.loads((files("kdx.pages") / "statement.schema.json").read_text())


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain values; NaN is null."""
    return json.loads(table.to_json(orient="records", double_precision=6))
