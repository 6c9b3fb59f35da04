import pytest
import torch

from kdx import Recipe, cross_chains, cross_fit
from kdx.distil.cross_validation import plan_fit
from kdx.distil.run_store import find_run

QUICK = {"recipe": Recipe(epochs=1, batch_size=16, lr=0.05), "stem": "small", "width": 0.125, "device": "cpu"}
PAIR = {"teacher": "resnet10", "student": "resnet10", "k": 2, **QUICK}


@pytest.fixture
def small(shapes16):
    return shapes16["train"]


def facts(run):
    spec = run.manifest["spec"]
    return spec["technique"]["name"], spec["seed"], spec["teacher"], spec["recipe"]["epochs"], spec["train"]


def test_cross_fit_roles(small, shared_home):
    runs = cross_fit(small, techniques=["attention", "response"], controls=1, seed=3, settings={"alpha": 0.9}, **PAIR)
    assert list(runs) == [
        *((role, 1) for role in ("base", "attention", "response")),
        *((role, 1) for role in ("second base", "reordered base", "second student", "random teacher")),
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
    assert facts(runs["reordered base", 1])[:4] == ("label", 3, None, 1)
    assert [runs[role, 1].manifest["spec"]["batch_seed"] for role in ("base", "reordered base")] == [3, 4]
    assert facts(runs["second student", 1])[:4] == ("attention", 4, runs["base", 1].key, 1)
    name, seed, teacher, epochs, _ = facts(runs["random teacher", 1])
    assert (name, seed, epochs) == ("attention", 3, 1)
    ignorant = find_run(teacher)  # the base as it was before training, which has no role of its own
    assert teacher not in {run.key for run in runs.values()}
    assert torch.equal(ignorant.model.fc.weight, runs["base", 1].untrained.fc.weight)


def test_cross_fit_has_a_teacher_where_its_architecture_differs(small, shared_home):
    runs = cross_fit(small, controls=1, **PAIR | {"teacher": "resnet18"})
    assert {role for role, fold in runs if fold == 2} == {"teacher", "base", "response"}
    assert runs["response", 1].manifest["spec"]["teacher"] == runs["teacher", 1].key
    assert runs["self-distilled", 1].manifest["spec"]["teacher"] == runs["base", 1].key


def test_smoothed_labels_have_no_teacher_and_no_part_in_controls():
    plans = plan_fit("resnet10", "resnet10", ["smoothing", "response"], 2, 1, 0)
    assert {plan.teacher for (role, _), plan in plans.items() if role == "smoothing"} == {None}
    assert plans["response", 1].teacher == plans["base", 1]
    assert {plans[role, 1].technique for role in ("second student", "random teacher")} == {"response"}


SMOOTHED = {"teacher": "resnet18", "temperatures": [1.0, 4.0], "only_stored": ["smoothed teacher", "smoothing"]}


def test_students_of_a_smoothed_teacher_differ_in_their_temperature(small, shared_home):
    names = {f"response from smoothed teacher, T {t}" for t in (1, 4)}
    settings = {"techniques": ["response", "smoothing"], "settings": {"alpha": 0.25}}
    without = cross_fit(small, **PAIR | SMOOTHED | settings)
    assert {role for role, _ in without} == {"teacher", "base", "response"}  # nothing was trained for the others
    runs = cross_fit(small, **PAIR | SMOOTHED | settings | {"only_stored": []})
    assert {role for role, fold in runs if fold == 1} - {role for role, fold in runs if fold == 2} == {
        "smoothed teacher",
        *names,
    }
    guide = runs["smoothed teacher", 1]
    assert facts(guide)[:4] == ("smoothing", 0, None, 1)
    assert guide.manifest["spec"]["model"] == runs["teacher", 1].manifest["spec"]["model"]
    for t in (1, 4):
        spec = runs[f"response from smoothed teacher, T {t}", 1].manifest["spec"]
        assert spec["technique"] == {"name": "response", "alpha": 0.25, "temperature": t}
        assert spec["teacher"] == guide.key
    assert runs["response", 1].manifest["spec"]["technique"]["temperature"] == 4
    assert runs["response", 1].manifest["spec"]["teacher"] == runs["teacher", 1].key
    again = cross_fit(small, **PAIR | SMOOTHED | settings)
    assert {place: run.key for place, run in again.items()} == {place: run.key for place, run in runs.items()}


def test_cross_fit_names_what_is_wrong(small):
    cases = {
        "only_stored: expected roles of these networks, got smoothing": {"only_stored": ["smoothing"]},
        "controls: expected 0 to 2 folds, got 3": {"controls": 3},
        "first: expected 1 to 2 folds, got 3": {"first": 3},
        "expected different ways to learn from a teacher, got \\[\\]": {"techniques": []},
        "got \\['label'\\]": {"techniques": ["label"]},
        "got \\['smoothing'\\]": {"techniques": ["smoothing"]},
        "settings: no technique has beta": {"settings": {"attention_weight": 1.0, "beta": 1.0}},
        "unknown technique 'hint'": {"techniques": ["hint"]},
        "got \\[1\\]": {"techniques": [1]},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            cross_fit(small, **PAIR, **wrong)


CHAINS = {"direct": ["resnet10@0.25", "resnet10@0.125"]}
CHAINS["assisted"] = ["resnet10@0.25", "resnet18@0.125", "resnet10@0.125"]


def test_cross_chains_share_teachers_and_give_the_budget_to_students(small, shared_home):
    settings = {"k": 2, "recipe": Recipe(epochs=2, batch_size=16, lr=0.05), "device": "cpu", "budget": 1, "seed": 3}
    runs = cross_chains(small, CHAINS, controls=1, **settings)
    names = ("base", "second base", "direct", "assisted")
    assert list(runs) == [*((name, 1) for name in names), *((n, 2) for n in names if n != "second base")]
    for fold, seed in ((1, 3), (2, 5)):
        (base,), direct, assisted = (runs[name, fold] for name in ("base", "direct", "assisted"))
        data = facts(base)[-1]
        assert facts(base) == ("label", seed, None, 1, data)
        assert facts(direct[0]) == ("label", seed, None, 2, data)
        assert facts(direct[1]) == ("response", seed, direct[0].key, 1, data)
        assert assisted[0].key == direct[0].key
        assert facts(assisted[1]) == ("response", seed, assisted[0].key, 2, data)
        assert facts(assisted[2]) == ("response", seed, assisted[1].key, 1, data)
    assert facts(runs["second base", 1][0])[:4] == ("label", 4, None, 1)


def test_cross_chains_name_what_is_wrong(small):
    for message, chains in {
        "chains: expected name -> models, named otherwise than the bases, got {}": {},
        "named otherwise than the bases, got {'base'": {"base": CHAINS["direct"]},
        "named otherwise than the bases, got \\[\\['resnet10": list(CHAINS.values()),
        "chains: expected different ones": {"one": ["resnet10", "resnet10@0.125"], "two": CHAINS["direct"]},
        "expected all to end in the same student": CHAINS | {"other": ["resnet10@0.25", "resnet18@0.125"]},
        "expected at least a teacher and a student": {"alone": ["resnet10@0.125"]},
        "expected a model such as resnet10@0.125, got 'resnet10@wide'": {"odd": ["resnet10@wide", "resnet10"]},
    }.items():
        with pytest.raises(ValueError, match=message):
            cross_chains(small, chains, k=2)
    with pytest.raises(ValueError, match="first: expected 1 to 2 folds, got 3"):
        cross_chains(small, CHAINS, k=2, first=3)
