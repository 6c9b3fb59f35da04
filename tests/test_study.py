from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdx import Recipe, cross_fit
from kdx.runs import find_run

QUICK = {"recipe": Recipe(epochs=1, batch_size=16, lr=0.05), "stem": "small", "width": 0.125, "device": "cpu"}
PAIR = {"teacher": "resnet10", "student": "resnet10", "k": 2, **QUICK}


@pytest.fixture(scope="module")
def small(tiny_shapes):
    data = tiny_shapes["train"]
    return replace(data, images=F.avg_pool2d(data.images.float(), 2).byte(), masks=None)


def facts(run):
    spec = run.manifest["spec"]
    return spec["technique"]["name"], spec["seed"], spec["teacher"], spec["recipe"]["epochs"], spec["train"]


def test_cross_fit_roles(small):
    runs = cross_fit(small, techniques=["attention", "response"], controls=1, seed=3, settings={"alpha": 0.9}, **PAIR)
    assert list(runs) == [
        *((role, 1) for role in ("base", "attention", "response", "second base", "random teacher")),
        *((role, 2) for role in ("base", "attention", "response")),
    ]
    for fold, seed in ((1, 3), (2, 5)):
        base = runs["base", fold]
        data = facts(base)[-1]
        assert facts(base) == ("label", seed, None, 1, data)
        assert facts(runs["attention", fold]) == ("attention", seed, base.key, 1, data)
        assert runs["response", fold].manifest["spec"]["technique"]["alpha"] == 0.9
    assert facts(runs["base", 1])[-1] != facts(runs["base", 2])[-1]
    assert facts(runs["second base", 1])[:4] == ("label", 4, None, 1)
    name, seed, teacher, epochs, _ = facts(runs["random teacher", 1])
    assert (name, seed, epochs) == ("attention", 3, 1)
    ignorant = find_run(teacher)  # the base as it was before training, which has no role of its own
    assert teacher not in {run.key for run in runs.values()}
    assert torch.equal(ignorant.model.fc.weight, runs["base", 1].untrained.fc.weight)


def test_cross_fit_has_a_teacher_where_its_architecture_differs(small):
    runs = cross_fit(small, **PAIR | {"teacher": "resnet18"})
    assert {role for role, _ in runs} == {"teacher", "base", "response"}
    assert runs["response", 1].manifest["spec"]["teacher"] == runs["teacher", 1].key


def test_cross_fit_names_what_is_wrong(small):
    cases = {
        "controls: expected 0 to 2 folds, got 3": {"controls": 3},
        "expected different ways to learn from a teacher, got \\[\\]": {"techniques": []},
        "got \\['label'\\]": {"techniques": ["label"]},
        "settings: no technique has beta": {"settings": {"attention_weight": 1.0, "beta": 1.0}},
        "unknown technique 'hint'": {"techniques": ["hint"]},
        "got \\[1\\]": {"techniques": [1]},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            cross_fit(small, **PAIR, **wrong)
