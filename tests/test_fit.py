import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

import kdx.distil.fit
from kdx import Recipe, evaluate, fit
from kdx.distil.fit import Job
from kdx.distil.rebuilding_techniques import Factor
from kdx.distil.techniques import TECHNIQUES, Technique, technique
from kdx.distil.training import triangle
from kdx.networks import models

QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)


pytestmark = pytest.mark.usefixtures("shared_home")


def train(tiny_shapes, **settings):
    settings = {"recipe": QUICK, "width": 0.125, "device": "cpu"} | settings
    return fit("resnet10", tiny_shapes["train"], tiny_shapes["test"], **settings)


def test_fit_learns_and_evaluate_measures_it(tiny_shapes):
    run = train(tiny_shapes, recipe=Recipe(epochs=15, batch_size=16, lr=0.1))
    curve = run.history.set_index(["split", "epoch"])
    assert curve.loc[("train", 15), "loss"] < 0.7 * curve.loc[("train", 1), "loss"]
    assert list(curve.loc["validation"].index) == list(range(1, 16))
    with pytest.raises(ValueError, match="labels: expected 0 to 9, the outputs of the network, got 1 to 10"):
        evaluate(run.model, replace(tiny_shapes["test"], labels=1 + tiny_shapes["test"].labels), "cpu")
    held_out = evaluate(run.model, tiny_shapes["test"], "cpu")
    assert held_out.accuracy == pytest.approx(curve.loc[("validation", 15), "accuracy"])
    assert held_out.loss == pytest.approx(curve.loc[("validation", 15), "loss"], rel=1e-3)
    with torch.no_grad():
        logits = run.model(tiny_shapes["test"].card.normalize(tiny_shapes["test"].images))
    assert (logits.argmax(1) == tiny_shapes["test"].labels).double().mean() == pytest.approx(
        held_out.accuracy, abs=0.03
    )


@pytest.mark.parametrize("model", ["resnet10", "mobilenet_v2"])
def test_fit_is_deterministic_and_leaves_the_global_generator(tiny_shapes, home, monkeypatch, model):
    def train(data):
        return fit(model, data["train"], data["test"], recipe=QUICK, width=0.125, device="cpu")

    monkeypatch.setenv("KDX_HOME", str(home))
    state = torch.random.get_rng_state()
    first = train(tiny_shapes)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setenv("KDX_HOME", str(home) + "-other")
    torch.manual_seed(99)
    second = train(tiny_shapes)
    assert first.key == second.key
    assert first.path != second.path
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_fit_of_no_epochs_stores_the_initial_weights(tiny_shapes, monkeypatch):
    run = train(tiny_shapes, recipe=Recipe(epochs=0, batch_size=16))
    trained = train(tiny_shapes)
    fresh = models.build("resnet10", 10, "small", 0.125, seed=0).state_dict()
    for network in (run.model, run.untrained, trained.untrained):
        assert not network.training
        assert all(torch.equal(value, fresh[name]) for name, value in network.state_dict().items())
    assert not torch.equal(trained.model.conv1.weight, fresh["conv1.weight"])
    assert list(run.history) == list(trained.history)
    assert not len(run.history)
    assert run.key != trained.key
    assert train(tiny_shapes, technique="response", teacher=run).key  # it can teach, if nothing sensible
    idle = Recipe(epochs=0, batch_size=16)
    job = Job("resnet10", *[tiny_shapes["test"]] * 2, "factor", run, idle, width=0.125)
    assert job.steps == 0  # nothing is fitted to the teacher either
    with monkeypatch.context() as patch:
        patch.setattr(Factor, "fitting", lambda *_: pytest.fail("it was fitted"))
        job.run()


def test_fit_refuses_a_teacher_of_other_classes(tiny_shapes):
    teacher = train(tiny_shapes)
    assert teacher.classes == tiny_shapes["train"].classes
    fewer = {split: data[data.labels < 5] for split, data in tiny_shapes.items()}
    card = replace(tiny_shapes["train"].card, classes=teacher.classes[::-1])
    turned = {split: replace(data, card=card) for split, data in fewer.items()}
    with pytest.raises(ValueError, match=r"expected a teacher of the classes .*, got one of"):
        train(turned, technique="response", teacher=teacher)


def test_fit_never_trains_the_same_twice(tiny_shapes, monkeypatch):
    first = train(tiny_shapes)
    monkeypatch.setattr(Job, "run", lambda job: pytest.fail("trained again"))
    again = train(tiny_shapes)
    assert again.key == first.key
    assert again.manifest == first.manifest


def test_fit_key_covers_what_matters(tiny_shapes):
    teacher = train(tiny_shapes)
    variants = [
        teacher,
        train(tiny_shapes, seed=1),
        train(tiny_shapes, recipe=Recipe(epochs=1, batch_size=16, lr=0.06)),
        train(tiny_shapes, width=0.25),
        train(tiny_shapes, technique="response", teacher=teacher),
        train(tiny_shapes, technique="response", teacher=teacher, alpha=0.7),
        fit("resnet10", tiny_shapes["test"], tiny_shapes["test"], recipe=QUICK, width=0.125, device="cpu"),
    ]
    assert len({run.key for run in variants}) == len(variants)
    by_another = train(tiny_shapes, technique="response", teacher=variants[1])
    assert by_another.key != variants[4].key


def test_student_with_alpha_1_learns_its_teachers_answers_and_not_the_labels(tiny_shapes):
    images = tiny_shapes["train"]
    shifted = replace(images, labels=(images.labels + 1) % 10)  # the teacher is taught the wrong names
    settings = {"recipe": Recipe(epochs=20, batch_size=16, lr=0.1), "width": 0.25, "device": "cpu"}
    teacher = fit("resnet10", shifted, shifted, **settings)
    student = fit("resnet10", images, images, technique="response", teacher=teacher, alpha=1.0, seed=5, **settings)
    answers = evaluate(student.model, images, "cpu").predictions
    assert (answers == shifted.labels).double().mean() > 0.4 + (answers == images.labels).double().mean()


def test_fit_names_the_choices(tiny_shapes):
    teacher = train(tiny_shapes)
    cases = {
        "unknown technique 'hint'; choose from: label, smoothing, response, dkd": {"technique": "hint"},
        "unknown settings of 'response': beta; choose from: alpha, temperature, standardise": {
            "technique": "response", "teacher": teacher, "beta": 1,
        },
        "unknown settings of 'label': alpha; choose from: none": {"alpha": 1},
        "'response' expects a teacher run, got None": {"technique": "response"},
        "'label' expects no teacher": {"teacher": teacher},
        "unknown device 'gpu'": {"device": "gpu"},
        "at least one batch of 500 training images, got 80": {"recipe": Recipe(batch_size=500)},
        "images of 8 pixels or more": {"recipe": Recipe(batch_size=16, sizes=(0.1,))},
        "expected names from torchvision.transforms.v2, got 'Flip'": {
            "recipe": Recipe(batch_size=16, augmentation={"Flip": {}})
        },
    }  # fmt: skip
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            train(tiny_shapes, **settings)
    with pytest.raises(ValueError, match="unknown model 'vgg'"):
        fit("vgg", tiny_shapes["train"], tiny_shapes["test"], recipe=QUICK)
    for wrong in ({"epochs": -1}, {"epochs": 1.5}, {"lr": math.inf}, {"momentum": 0}, {"sizes": ()}):
        with pytest.raises(ValueError, match="recipe: expected"):
            Recipe(**wrong)


def test_fit_that_diverges_is_an_error_and_stores_nothing(tiny_shapes, home, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(home))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(tiny_shapes, recipe=Recipe(epochs=3, batch_size=16, lr=1e12))
    assert not (home / "runs").exists()


def test_techniques_can_be_added(tiny_shapes):
    @technique("agree")
    @dataclass(frozen=True)
    class Agree(Technique):
        weight: float = 1.0

        def guidance(self, student, teacher, adapter):
            return self.weight * F.mse_loss(student.logits, teacher.logits)

    class Other(Agree):
        def guidance(self, student, teacher, adapter):
            return 2 * self.weight * F.mse_loss(student.logits, teacher.logits)

    teacher = train(tiny_shapes)
    try:
        run = train(tiny_shapes, technique="agree", teacher=teacher, weight=0.5)
        assert run.manifest["spec"]["technique"] == {"name": "agree", "weight": 0.5}
        assert train(tiny_shapes, technique="agree", teacher=teacher, weight=0.5).key == run.key
        technique("agree")(Other)  # the same name, another loss
        assert train(tiny_shapes, technique="agree", teacher=teacher, weight=0.5).key != run.key
    finally:
        del TECHNIQUES["agree"]


def test_find_never_trains(tiny_shapes, home, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(home))
    job = Job("resnet10", tiny_shapes["train"], tiny_shapes["test"], recipe=QUICK, width=0.125, device="cpu")
    assert job.find() is None
    assert not (home / "runs").exists()
    assert job.run().key == job.key == job.find().key
    monkeypatch.setattr(Job, "_train", lambda *a: pytest.fail("another process has trained it meanwhile"))
    assert job.run().key == job.key


def test_the_order_of_joined_techniques_makes_no_difference(tiny_shapes):
    teacher = train(tiny_shapes)
    one, other = (train(tiny_shapes, technique=name, teacher=teacher) for name in ("attention+alp", "alp+attention"))
    assert one.key == other.key
    assert one.manifest["spec"]["technique"]["name"] == "attention+alp"


def test_fit_and_evaluate_leave_a_network_as_they_found_it(tiny_shapes):
    teacher = train(tiny_shapes)
    network = teacher.model.train()
    before = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in network.state_dict().items()}
    evaluate(network, tiny_shapes["test"], "cpu")
    train(tiny_shapes, technique="response", teacher=teacher, seed=7)
    assert {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in network.state_dict().items()} == before
    assert network.training


def weights(run):
    return torch.cat([value.flatten() for value in run.model.state_dict().values() if value.is_floating_point()])


def test_momentum_moves_weights(tiny_shapes):
    runs = [train(tiny_shapes, recipe=replace(QUICK, momentum=momentum)) for momentum in (0.1, 0.9)]
    assert not torch.equal(*map(weights, runs))


def test_training_of_one_step_moves_weights(tiny_shapes):
    one = {"train": tiny_shapes["train"].limit(16), "test": tiny_shapes["test"]}
    run = train(one, recipe=Recipe(epochs=1, batch_size=16, lr=0.1))
    fresh = torch.cat([value.flatten() for value in run.untrained.state_dict().values() if value.is_floating_point()])
    assert (weights(run) - fresh).abs().max() > 1e-3


def test_triangle_rises_to_one_and_falls():
    assert [triangle(step, 5) for step in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert [triangle(step, 10) for step in range(3)] == pytest.approx([0.5, 1, 8 / 9])
    assert triangle(0, 1) == 1


def test_batch_seed_changes_the_order_of_the_batches_alone(tiny_shapes):
    run, reordered = train(tiny_shapes), train(tiny_shapes, batch_seed=5)
    assert torch.equal(run.untrained.conv1.weight, reordered.untrained.conv1.weight)
    assert not torch.equal(weights(run), weights(reordered))
    assert run.key == train(tiny_shapes, batch_seed=0).key


def test_key_covers_names_of_classes_and_the_precision(tiny_shapes, monkeypatch):
    def key():
        return Job("resnet10", tiny_shapes["train"], tiny_shapes["test"], recipe=QUICK, device="cpu").key

    card = replace(tiny_shapes["train"].card, classes=tuple(f"new {c}" for c in tiny_shapes["train"].classes))
    renamed = {split: replace(data, card=card) for split, data in tiny_shapes.items()}
    assert train(renamed).classes == card.classes
    before = key()
    other = torch.float16
    monkeypatch.setattr(kdx.distil.fit, "autocast_dtype", lambda device: other)
    assert key() != before


def test_teacher_sees_full_size_images(tiny_shapes):
    teacher, sizes = train(tiny_shapes), []
    hook = teacher.model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    train(tiny_shapes, technique="response", teacher=teacher, recipe=replace(QUICK, sizes=(0.5, 1.0)))
    hook.remove()
    assert set(sizes) == {tiny_shapes["train"].images.shape[-1]}
