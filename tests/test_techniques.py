import math
from dataclasses import fields

import pytest
import torch
from torchvision.models import VisionTransformer

from kdx.distil.techniques import TECHNIQUES, find_techniques
from kdx.distil.training import _Objective
from kdx.networks import models
from tests.techniques import train

pytestmark = pytest.mark.usefixtures("shared_home")
TEACHING = [name for name, known in TECHNIQUES.items() if known.needs_teacher]


DEEPER, OTHER, SMALLER = (  # teacher, student
    (("resnet18", 0.25), ("resnet10", 0.125)),
    (("mobilenet_v2", 0.25), ("resnet10", 0.125)),
    (("resnet10", 0.125), ("mobilenet_v2", 0.25)),
)


QUICK = {
    "contrastive": {"contrastive_negatives": 64},
    "self-supervised": {"self_supervised_epochs": 1},
    "prior": {"prior_width": 16},
}


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [(name, *DEEPER) for name in (*TEACHING, "response+attention")]
    + [(name, *pair) for name in ("overhaul", "alp", "dkd+attention+inter-channel") for pair in (OTHER, SMALLER)],
)
def test_student_of_another_width_depth_or_family(shapes16, name, teacher, student):
    guide = train(shapes16, *teacher)
    before = {k: v.clone() for k, v in guide.model.state_dict().items()}
    run = train(shapes16, *student, technique=name, teacher=guide, **QUICK.get(name, {}))
    assert math.isfinite(run.history["loss"].iloc[-1])
    assert all(torch.equal(v, before[k]) for k, v in guide.model.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.model.parameters())
    alone = train(shapes16, *student)  # the teacher made a difference
    assert not torch.equal(next(run.model.parameters()), next(alone.model.parameters()))


def transformer(seed):
    torch.manual_seed(seed)
    return VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=4)


FAMILIES = {  # teacher and student
    "a ResNet and a MobileNet": lambda: (
        models.build("resnet18", 4, "small", 0.125, 1), models.build("mobilenet_v1", 4, "small", 0.125, 2),
    ),
    "an EfficientNet and a ResNet": lambda: (
        models.build("efficientnet_b0", 4, "small", 0.125, 1), models.build("resnet10", 4, "small", 0.125, 2),
    ),
    "a ResNet and a transformer": lambda: (models.build("resnet10", 4, "small", 0.125, 1), transformer(2)),
    "a transformer and a MobileNet": lambda: (transformer(1), models.build("mobilenet_v2", 4, "small", 0.125, 2)),
}  # fmt: skip


@pytest.mark.parametrize("families", FAMILIES)
@pytest.mark.parametrize("name", TEACHING)
def test_a_step_between_families(name, families):
    teacher, student = FAMILIES[families]()
    parts = find_techniques(name, QUICK.get(name, {}))
    images, rows = torch.randn(6, 3, 32, 32), torch.arange(6)
    if name == "overhaul" and families.startswith("a transformer"):  # as a teacher, it has no batch norm
        with pytest.raises(ValueError, match="overhaul: expected a BatchNorm2d"):
            _Objective(parts, student, teacher.eval(), images[:2], rows % 4, seed=0)
        return
    objective = _Objective(parts, student.train(), teacher.eval(), images[:2], rows % 4, seed=0)
    with objective.watching():
        for size in (0.5, 1.0) if "transformer" not in families else (1.0,):
            loss = objective(images, rows, size)[1]
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in student.parameters() if weight.grad is not None)
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_the_same_training_gives_the_same_weights(shapes16, home, monkeypatch, name):
    guide = train(shapes16, "resnet18", 0.25)
    run = train(shapes16, technique=name, teacher=guide, **QUICK[name])
    monkeypatch.setenv("KDX_HOME", str(home))
    torch.manual_seed(99)
    again = train(shapes16, technique=name, teacher=guide, **QUICK[name])
    assert again.key == run.key
    assert again.path != run.path
    pairs = zip(run.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


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
