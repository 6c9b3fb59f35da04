"""The statement of a report: its numbers with intervals, as JSON, and gates on them."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import pandas as pd

from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER
from kdx.pages.sentences import Evidence, overall, sentences

SCHEMA = "kdx-statement/1"
METRICS = {  # name -> what it is, over the images
    "accuracy": "share of right answers of the student",
    "base_accuracy": "share of right answers of the base",
    "second_base_accuracy": "share of right answers of the second base",
    "teacher_accuracy": "share of right answers of the teacher",
    "accuracy_gain": "accuracy of the student minus that of its base",
    "accuracy_gain_over_second_base": "accuracy of the student minus that of the second base",
    "gained": "share of images that the base gets wrong and the student right",
    "negative_flips": "share of images that the base gets right and the student wrong",
    "answers_changed": "share of images to which the student gives another answer than its base",
    "inherited_errors": "share of images to which student and teacher give the same wrong answer",
    "own_errors": "share of images that the student gets wrong in another way than the teacher",
    "second_base_gained": "gained, with the second base in the student's place",
    "second_base_negative_flips": "negative_flips, with the second base in the student's place",
    "second_base_answers_changed": "answers_changed, with the second base in the student's place",
    "ece": "expected calibration error of the student",
    "ece_change": "expected calibration error of the student minus that of its base",
    "nll_change": "negative log-likelihood of the student minus that of its base, in nats",
    "robustness_change": "accuracy on corrupted images, student minus base",
    "unexplained": "share of the variance of the student's answers that its base cannot express",
    "second_base_unexplained": "the same of the second base's answers",
    "handed_over": "share of that unexplained part which the teacher's answers explain",
    "second_base_handed_over": "the same of the second base's answers",
}
GATE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*(-?[\d.]+)\s*(%?)\s*")
COMPARED = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Metric(NamedTuple):
    """A number of a statement with its 95 % interval and the number of images."""

    value: float
    low: float
    high: float
    n: int


def metrics(evidence: Evidence) -> dict[str, Metric]:
    """Those of ``METRICS`` that could be measured."""
    found: dict[str, Sequence[float]] = {}
    n = evidence.images
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
        change = ["difference", "difference low", "difference high"]
        for score in ("ECE", "NLL"):
            found[f"{score.lower()}_change"] = table.loc[(STUDENT, score), change].tolist()
    if evidence.robustness is not None:
        found["robustness_change"] = overall(evidence.robustness, BASE)[["difference", "low", "high"]].tolist()
    return {
        name: Metric(*map(float, found[name]), n)
        for name in METRICS
        if name in found and not math.isnan(found[name][0])
    }


def statement(evidence: Evidence, **facts: Any) -> dict[str, Any]:
    """The statement as JSON, as ``kdx/pages/statement.schema.json`` describes it.

    Args:
        evidence: What was measured.
        **facts: Of the run: command, version, networks, data.
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
            for name in ("classes", "slices", "confusions")
            if (table := getattr(evidence, name)) is not None
        },
    }


def schema() -> dict[str, Any]:
    """The JSON schema of a statement."""
    return json.loads((files("kdx.pages") / "statement.schema.json").read_text())


class Gate(NamedTuple):
    """A condition under which a release fails: a metric, ``<``, ``<=``, ``>`` or ``>=``, and a number."""

    text: str
    metric: str
    compare: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """From text such as ``negative_flips > 2%`` or ``accuracy < 0.9``.

        Raises:
            ValueError: Another form, or an unknown metric.
        """
        match = GATE.fullmatch(text)
        try:
            name, compare, number, percent = match.groups() if match else ("", "", "", "")
            bound = float(number) / (100 if percent else 1)
        except ValueError as error:
            raise ValueError(f"expected a condition such as 'negative_flips > 2%', got {text!r}") from error
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r} in {text!r}; choose from: {', '.join(METRICS)}")
        return cls(text.strip(), name, compare, bound)

    def failure(self, measured: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Why the release fails, or None. The end of the interval counts that makes failing likelier, so too few images
        fail as well.

        Args:
            measured: The metrics of a statement.
        """
        if self.metric not in measured:
            return f"{self.text}: {self.metric} could not be measured; see the caveats of the statement"
        found = measured[self.metric]
        end = found["high" if self.compare.startswith(">") else "low"]
        if not COMPARED[self.compare](end, self.bound):
            return None
        sure = "" if COMPARED[self.compare](found["value"], self.bound) else "; the interval does not rule it out"
        return f"{self.text}: {self.metric} is {found['value']:.2%} [{found['low']:.2%}, {found['high']:.2%}]{sure}"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain values; NaN is null."""
    return json.loads(table.to_json(orient="records", double_precision=6))
