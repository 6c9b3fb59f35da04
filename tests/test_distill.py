import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
import torch.nn.functional as F

from kdx import data, distill, models, runs
from kdx.chains import distill_chain
from kdx.distill import Recipe, evaluate, fit
from kdx.techniques import TECHNIQUES, Technique, technique
from tests.networks import Small

ROOT = Path(__file__).parent.parent
QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)


def train(tiny_shapes, **settings):
    settings = {"recipe": QUICK, "width": 0.125, "device": "cpu"} | settings
    return fit("resnet10", tiny_shapes["train"], tiny_shapes["test"], **settings)


def test_fit_learns_and_evaluate_measures_it(tiny_shapes):
    run = train(tiny_shapes, recipe=Recipe(epochs=15, batch_size=16, lr=0.1), width=0.25)
    curve = run.history.set_index(["split", "epoch"])
    assert curve.loc[("train", 15), "loss"] < 0.7 * curve.loc[("train", 1), "loss"]
    assert list(curve.loc["validation"].index) == list(range(1, 16))
    held_out = evaluate(run.model, tiny_shapes["test"], "cpu")
    assert held_out.accuracy == pytest.approx(curve.loc[("validation", 15), "accuracy"])
    assert held_out.loss == pytest.approx(curve.loc[("validation", 15), "loss"], rel=1e-3)
    with torch.no_grad():
        logits = run.model(tiny_shapes["test"].card.normalize(tiny_shapes["test"].images))
    assert (logits.argmax(1) == tiny_shapes["test"].labels).double().mean() == pytest.approx(
        held_out.accuracy, abs=0.03
    )


def test_evaluate_may_come_first(tiny_shapes):
    """The precision is measured on first use, here inside of inference mode."""
    distill.autocast_dtype.cache_clear()
    network = models.build("resnet10", 10, "small", 0.125, seed=0)
    with torch.inference_mode():
        assert 0 <= evaluate(network, tiny_shapes["test"], "cpu").accuracy <= 1


@pytest.mark.parametrize("model", ["resnet10", "mobilenet_v2"])
def test_fit_is_deterministic_and_leaves_the_global_generator(tiny_shapes, home, monkeypatch, model):
    def train(data):
        return fit(model, data["train"], data["test"], recipe=QUICK, width=0.125, device="cpu")

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


def test_fit_of_no_epochs_stores_the_initial_weights(tiny_shapes):
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
    monkeypatch.setattr(distill, "_train", lambda *a: pytest.fail("trained again"))
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
        "unknown technique 'hint'; choose from: label, response, attention": {"technique": "hint"},
        "unknown settings of 'response': beta; choose from: alpha, temperature": {
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
        fit("vgg", tiny_shapes["train"], tiny_shapes["test"])
    for wrong in ({"epochs": -1}, {"epochs": 1.5}, {"lr": math.inf}, {"momentum": 0}, {"sizes": ()}):
        with pytest.raises(ValueError, match="recipe: expected"):
            Recipe(**wrong)


def test_fit_that_diverges_is_an_error_and_stores_nothing(tiny_shapes, home):
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


def test_key_of_a_student_covers_the_code_of_the_techniques(tiny_shapes, monkeypatch):
    base = train(tiny_shapes)
    student = train(tiny_shapes, technique="response", teacher=base)
    monkeypatch.setattr(distill, "TECHNIQUE_CODE", "another")
    assert train(tiny_shapes).key == base.key
    assert train(tiny_shapes, technique="response", teacher=base).key != student.key


def test_fit_key_covers_the_code_that_trains():
    parts = [models, distill, data.augment, data.compose, data.Card.normalize]
    assert runs.code_digest(*parts) == distill.CODE
    without = {runs.code_digest(*parts[:i], *parts[i + 1 :]) for i in range(len(parts))}
    assert len(without | {distill.CODE}) == len(parts) + 1  # each of them counts


# --- the store --------------------------------------------------------------------------------


def test_run_files_are_checked_when_loaded(tiny_shapes):
    run = train(tiny_shapes)
    weights = run.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged \(model.safetensors: expected SHA-256.*delete that folder"):
        train(tiny_shapes)
    (run.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        train(tiny_shapes)


def test_run_manifest_tells_how_it_was_made(tiny_shapes):
    run = train(tiny_shapes)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["spec"]["recipe"]["epochs"] == 1
    assert manifest["spec"]["train"] == tiny_shapes["train"].fingerprint
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["device"].startswith("cpu")
    assert manifest["precision"] in ("float32", "bfloat16")
    assert manifest["seconds"] > 0


def test_run_that_fails_to_write_leaves_nothing(tiny_shapes, home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        train(tiny_shapes)
    assert list((home / "runs").iterdir()) == []


def test_run_key_ignores_comments_but_not_code(tmp_path):
    import importlib.util

    def module(source):
        path = tmp_path / f"m{abs(hash(source))}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    plain = module("def f(x):\n    return x + 1\n")
    commented = module('"""Doc."""\n\n\ndef f(x):  # adds one\n    """Doc."""\n    return (x + 1)\n')
    changed = module("def f(x):\n    return x + 2\n")
    keys = [runs.run_key({"a": 1}, runs.code_digest(code)) for code in (plain, commented, changed)]
    assert keys[0] == keys[1] != keys[2]
    assert runs.run_key({"a": 2}, runs.code_digest(plain)) != keys[0]
    assert runs.run_key({"a": 1.0}, runs.code_digest(plain)) == keys[0]
    assert runs.run_key({"a": 1.5}, runs.code_digest(plain)) != keys[0]
    digests = [runs.code_digest(code.f) for code in (plain, commented, changed)]
    assert digests[0] == digests[1] != digests[2]


def test_killed_kdx_run_resumes_from_the_last_finished_network(home, tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook.cells = [
        nbformat.v4.new_code_cell("epochs: int = 2  # of every network", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import kdx\n"
            "images = kdx.load_dataset('shapes', 'train', limit=160, size=32)\n"
            "kdx.cross_fit(images, teacher='resnet10', student='resnet10', "
            "techniques=['response'], k=2, controls=1, width=0.125, "
            "recipe=kdx.Recipe(epochs=epochs, batch_size=32))"
        ),
    ]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    command = [sys.executable, "-m", "kdx.cli", "run", str(tmp_path / "n.ipynb"), "-o", str(tmp_path / "out.ipynb")]
    environment = os.environ | {"KDX_HOME": str(home)}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    store = home / "runs"
    deadline = time.monotonic() + 240
    while not list(store.glob("[!.]*/manifest.json")):
        assert job.poll() is None, job.stdout.read().decode()
        assert time.monotonic() < deadline, "no network was finished in time"
        time.sleep(0.02)
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        process.kill()
    job.wait()
    assert not (tmp_path / "out.ipynb").exists()
    before = {path.name: (path / "manifest.json").stat().st_mtime_ns for path in store.glob("[!.]*")}
    assert 1 <= len(before) < 7
    for key in before:  # whatever lies under a key is whole
        assert runs.find_run(key).model
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    after = {path.name: (path / "manifest.json").stat().st_mtime_ns for path in store.glob("[!.]*")}
    assert len(after) == 7  # two bases, a student each, and the controls: a base, a teacher and its student
    assert before.items() <= after.items()  # what was finished was not trained again
    assert (tmp_path / "out.ipynb").exists()


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


def test_fit_stored_never_trains(tiny_shapes, home):
    with pytest.raises(KeyError, match=r"no stored run of resnet10 \(label\)"):
        train(tiny_shapes, stored=True)
    assert not (home / "runs").exists()
    assert train(tiny_shapes).key == train(tiny_shapes, stored=True).key
