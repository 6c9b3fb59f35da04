"""Conditions on the numbers of a statement under which a release fails. Imports nothing that is slow."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

ROLES = {"": "student", "base_": "base", "second_base_": "second base", "teacher_": "teacher"}
OF_CLASSIFIERS = {  # name -> what it is, over the images
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
    "new_detectors": "share of the student's units at the deepest stage whose concept no unit of its base detects",
    "second_base_new_detectors": "new_detectors, with the second base in the student's place",
}
OF_DETECTORS = {
    **{f"{role}ap50": f"AP50 of the {name}" for role, name in ROLES.items()},
    **{f"{role}ap": f"AP of the {name}" for role, name in ROLES.items()},
    "ap50_gain": "AP50 of the student minus that of its base",
    "ap50_gain_over_second_base": "AP50 of the student minus that of the second base",
    "ap_gain": "AP of the student minus that of its base",
    "ap_gain_over_second_base": "AP of the student minus that of the second base",
    "objects_gained": "share of objects that the student finds and its base misses",
    "objects_lost": "share of objects that the base finds and the student misses",
    "second_base_objects_gained": "objects_gained, with the second base in the student's place",
    "second_base_objects_lost": "objects_lost, with the second base in the student's place",
    "false_alarms_change": "false alarms an image, student minus base",
}
METRICS = OF_CLASSIFIERS | OF_DETECTORS
NO_SHARES = {"nll_change", "false_alarms_change"}
GATE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*(-?[\d.]+)\s*(%?)\s*")
COMPARED = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Gate(NamedTuple):
    """A condition under which a release fails: a metric, ``<``, ``<=``, ``>`` or ``>=``, and a number."""

    text: str
    metric: str
    compare: str
    bound: float

    @classmethod
    def parse(cls, text: str, metrics: Collection[str] = METRICS) -> Gate:
        """From text such as ``negative_flips > 2%`` or ``accuracy < 0.9``, of one of ``metrics``.

        Raises:
            ValueError: Another form, an unknown metric, a share beyond 100 %, or a bound that no value can cross.
        """
        match = GATE.fullmatch(text)
        try:
            name, compare, number, percent = match.groups() if match else ("", "", "", "")
            bound = float(number) / (100 if percent else 1)
        except ValueError as error:
            raise ValueError(f"expected a condition such as 'negative_flips > 2%', got {text!r}") from error
        if name not in metrics:
            raise ValueError(f"unknown metric {name!r} in {text!r}; choose from: {', '.join(metrics)}")
        least = -1.0 if re.search("_(gain|change)(_|$)", name) else 0.0
        ends = {COMPARED[compare](end, bound) for end in (least, 1.0)}
        if abs(bound) <= 1 and len(ends) == 1 and name not in NO_SHARES:
            raise ValueError(
                f"{text!r} {'always fails' if ends.pop() else 'can never fail'}: {name} is between {least:g} and 1"
            )
        if abs(bound) > 1 and name not in NO_SHARES:
            raise ValueError(f"{name} is a share, at most 1 or 100%; did you mean {number}% in {text!r}?")
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
        form = ".3f" if self.metric in NO_SHARES else ".2%"
        sure = "" if COMPARED[self.compare](found["value"], self.bound) else "; the interval does not rule it out"
        value, low, high = (format(found[name], form) for name in ("value", "low", "high"))
        return f"{self.text}: {self.metric} is {value} [{low}, {high}]{sure}"
