"""The statement follows its schema."""

import json

import jsonschema
import pandas as pd
import pytest

from kdx.intervals import Interval
from kdx.pages.gates import METRICS
from kdx.pages.sentences import Evidence
from kdx.pages.statement import metrics, schema, statement
from tests.test_sentences import detectors, evidence, ledger

FACTS = {
    "command": "kdx explain",
    "version": "0",
    "networks": {role: {"file": "x", "sha256": "0" * 64} for role in ("student", "base")},
    "data": {"folder": "x", "sha256": "0" * 64, "size": 32, "normalisation": [[0], [1]], "labels": "the folders"},
}


def test_the_statement_follows_its_schema_and_holds_no_nan():
    found = statement(evidence(ledger(teacher=True)), **FACTS)
    text = json.dumps(found, allow_nan=False)
    jsonschema.validate(json.loads(text), schema())
    assert set(found["metrics"]) <= set(METRICS)
    assert all(m["low"] <= m["value"] <= m["high"] for m in found["metrics"].values())
    assert found["metrics"]["negative_flips"]["value"] == 0
    for part in ("networks", "command"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in found.items() if k != part}, schema())


def test_a_probe_and_its_concepts_follow_the_schema():
    concepts = pd.DataFrame({"stage": ["L4"], "concept": ["cat"], "category": ["object"], "student": [2]})
    found = statement(evidence(ledger(), detectors=detectors(student=0.3), concepts=concepts), **FACTS)
    probe = {"name": "shapes", "images": 300, "concepts": 9, "quantile": 0.005, "iou": 0.05}
    jsonschema.validate(found | {"probe": probe}, schema())
    assert found["groups"]["concepts"][0]["student"] == 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"probe": {"name": "shapes"}}, schema())


def test_metrics_that_are_not_known_are_left_out():
    found = evidence(ledger(second=False))
    assert not any(name.startswith(("second", "teacher")) for name in metrics(found))
    assert metrics(found)["accuracy"].n == 1000


def test_without_labels_the_statement_holds_what_changed():
    found = Evidence(40, changed={"student": Interval(0.1, 0.05, 0.2, 40)}, caveats=["Labels are not known."])
    assert set(metrics(found)) == {"answers_changed"}
    jsonschema.validate(statement(found, **FACTS), schema())
