import math
from dataclasses import fields

import pytest
import torch

from kdx.distil.techniques import TECHNIQUES, find_techniques
from tests.techniques import train

pytestmark = pytest.mark.usefixtures("shared_home")
TEACHING = [name for name, known in TECHNIQUES.items() if known.needs_teacher]


DEEPER, OTHER, SMALLER = (  # teacher, student
    (("resnet18", 0.25), ("resnet10", 0.125)),
    (("mobilenet_v2", 0.25), ("resnet10", 0.125)),
    (("resnet10", 0.125), ("mobilenet_v2", 0.25)),
)


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [(name, *DEEPER) for name in (*TEACHING, "response+attention")]
    + [(name, *pair) for name in ("overhaul", "alp", "dkd+attention+inter-channel") for pair in (OTHER, SMALLER)],
)
def test_student_of_another_width_depth_or_family(shapes16, name, teacher, student):
    guide = train(shapes16, *teacher)
    before = {k: v.clone() for k, v in guide.model.state_dict().items()}
    run = train(shapes16, *student, technique=name, teacher=guide)
    assert math.isfinite(run.history["loss"].iloc[-1])
    assert all(torch.equal(v, before[k]) for k, v in guide.model.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.model.parameters())
    alone = train(shapes16, *student)  # the teacher made a difference
    assert not torch.equal(next(run.model.parameters()), next(alone.model.parameters()))


def test_options_make_other_students_under_other_keys(shapes16):
    guide = train(shapes16, "resnet18", 0.25)
    for name, option in (("response", {"standardise": True}), ("attention", {"attention_stages": ("L3", "L4")})):
        plain, other = (train(shapes16, technique=name, teacher=guide, **settings) for settings in ({}, option))
        assert plain.key != other.key
        assert plain.digest != other.digest
        assert not torch.equal(next(plain.model.parameters()), next(other.model.parameters()))
        added = other.manifest["spec"]["technique"].keys() - plain.manifest["spec"]["technique"].keys()
        assert added == set(option)  # what is off leaves no trace: shipped networks are still found


def test_order_of_joined_techniques_is_that_of_the_registry():
    assert [part.name for part in find_techniques("overhaul+inter-channel+attention+dist+response", {})] == [
        "response", "dist", "attention", "overhaul", "inter-channel",
    ]  # fmt: skip


def test_find_techniques_names_the_choices():
    cases = {
        f"unknown technique 'hint'; choose from: {', '.join(TECHNIQUES)}, or several joined": ("response+hint", {}),
        "different techniques joined by": ("response+response", {}),
        "'label' only by itself": ("label+response", {}),
        "'smoothing' only by itself": ("response+smoothing", {}),
        "unknown settings of 'response\\+dkd': beta; choose from: alpha, temperature, standardise, dkd_alpha": (
            "response+dkd",
            {"beta": 1},
        ),
        "unknown settings of 'label': alpha; choose from: none": ("label", {"alpha": 1}),
        "attention_weight: expected a finite weight": ("attention", {"attention_weight": -1.0}),
    }
    for message, (name, settings) in cases.items():
        with pytest.raises(ValueError, match=message):
            find_techniques(name, settings)


def test_names_of_settings_differ_between_techniques():
    settings = [field.name for known in TECHNIQUES.values() for field in fields(known)]
    assert len(set(settings)) == len(settings)
