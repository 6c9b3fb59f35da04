import pytest

from kdx import Recipe, distill_chain, fit
from kdx.networks import models
from tests.networks import Small

QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)


pytestmark = pytest.mark.usefixtures("shared_home")


def train(tiny_shapes, **settings):
    settings = {"recipe": QUICK, "width": 0.125, "device": "cpu"} | settings
    return fit("resnet10", tiny_shapes["train"], tiny_shapes["test"], **settings)


def chain(tiny_shapes, links, **settings):
    return distill_chain(
        links, tiny_shapes["train"], tiny_shapes["test"], **{"recipe": QUICK, "device": "cpu"} | settings
    )


@pytest.mark.parametrize("name", ["response", "overhaul", "attention"])
def test_chain_across_families(tiny_shapes, name):
    links = ["resnet10@0.5", "mobilenet_v2@0.25", "resnet10@0.125"]
    runs = chain(tiny_shapes, links, technique=name, seed=2)
    assert [run.manifest["spec"]["model"]["name"] for run in runs] == ["resnet10", "mobilenet_v2", "resnet10"]
    assert [run.manifest["spec"]["teacher"] for run in runs] == [None, runs[0].key, runs[1].key]
    assert [run.manifest["spec"]["technique"]["name"] for run in runs] == ["label", name, name]
    assert {run.manifest["spec"]["seed"] for run in runs} == {2}
    assert [run.key for run in chain(tiny_shapes, [runs[0], *links[1:]], technique=name, seed=2)] == [
        r.key for r in runs
    ]


def test_chain_of_two_is_fit(tiny_shapes):
    teacher, student = chain(tiny_shapes, ["resnet10@0.25", "resnet10"], width=0.125, alpha=0.5)
    assert teacher.key == train(tiny_shapes, width=0.25).key
    assert student.key == train(tiny_shapes, technique="response", teacher=teacher, alpha=0.5).key


def test_chain_warns_of_an_assistant_larger_than_its_teacher(tiny_shapes):
    with pytest.warns(
        UserWarning, match=r"resnet18@0.125 \([\d,]+ param\w+\) is larger than its teacher resnet10@0.125"
    ):
        assert len(chain(tiny_shapes, ["resnet10@0.125", "resnet18@0.125"])) == 2


def test_chain_names_what_is_wrong_before_it_trains(tiny_shapes, home, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(home))

    class Three(Small):
        def __init__(self, classes, stem, width):
            super().__init__(classes)

    monkeypatch.setitem(models.MODELS, "three", (Three, 1.0))
    for message, links, settings in (
        ("expected at least a teacher and a student, got \\['resnet10'\\]", ["resnet10"], {}),
        ("expected at least a teacher and a student, got 'resnet10'", "resnet10", {}),
        ("expected names of models", ["resnet10", 3], {}),
        ("unknown model 'resnet1'", ["resnet10", "resnet1"], {}),
        ("a technique that learns from a teacher, got 'label'", ["resnet10", "resnet10"], {"technique": "label"}),
        ("unknown settings of 'response': beta", ["resnet10", "resnet10"], {"beta": 1}),
        ("attention: expected the same stages in student and teacher, got L1, L2, L3 and L1, L2, L3, L4",
         ["resnet10", "three"], {"technique": "attention"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            chain(tiny_shapes, links, **settings)
    assert not (home / "runs").exists()
    few = {split: data.only(data.classes[:4]) for split, data in tiny_shapes.items()}
    other = fit("resnet10", few["train"], few["test"], recipe=QUICK, width=0.125, device="cpu")
    with pytest.raises(ValueError, match="expected a teacher of the classes"):
        chain(tiny_shapes, [other, "resnet10@0.125"])
