import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from kdx.data.sst import load_sentences
from kdx.distil.fit_text import Architecture, TextJob, TextRecipe, answer, evaluate_text, slope, train_sentences
from kdx.distil.run_store import manifests
from kdx.distil.technique import Seen
from kdx.distil.techniques import find_techniques
from kdx.networks.text_networks import PACKAGED
from tests.texts import TINY, tiny

QUICK = TextRecipe(epochs=2, batch_size=20, lr=0.01)


@pytest.fixture(scope="module")
def data():
    return [load_sentences("generated", split, limit=n) for split, n in (("train", 80), ("test", 40))]


def job(data, **settings):
    return TextJob(TINY, *data, **{"recipe": QUICK, "device": "cpu"} | settings)


def test_a_run_is_found_again_and_is_no_run_of_images(data, home):
    first = job(data).fit()
    assert job(data).find().key == first.key
    assert first.history["split"].tolist() == ["train", "validation"] * 2
    assert first.classes == data[0].classes
    assert first.file.parent == home / "runs" / first.key
    assert manifests() == {}
    again = evaluate_text(first.network, data[1], "cpu")
    assert again.accuracy == pytest.approx(first.history["accuracy"].iloc[-1])
    assert first.history["loss"].iloc[2] < first.history["loss"].iloc[0]


def test_trainings_differ_by_what_defines_them(data):
    jobs = [job(data), job(data, seed=1), job(data, technique="smoothing"), job(data, recipe=TextRecipe(3, 20, 0.01))]
    jobs += [TextJob(Architecture(layers=1), *data, recipe=QUICK, device="cpu")]
    jobs += [job(data, technique="response", teacher=of) for of in jobs[:2]]
    assert len({of.digest for of in jobs}) == len({of.key for of in jobs}) == len(jobs)
    assert job(data).digest == jobs[0].digest


def test_other_weights_under_the_path_of_an_encoder_are_another_training(data, tmp_path):
    of = lambda name: TextJob(Architecture(name), *data, recipe=QUICK, device="cpu")  # noqa: E731
    (tmp_path / "config.json").write_text("{}")
    before = of(str(tmp_path))
    assert before.spec["model"]["files"] == of(str(tmp_path)).spec["model"]["files"]
    key, digest = before.key, before.digest
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert of(str(tmp_path)).key != key
    assert of(str(tmp_path)).digest != digest
    assert set(of(PACKAGED).spec["model"]) == {"checkpoint", "layers"}  # its package is one file of one version


def test_a_student_is_trained_by_its_teacher(data):
    teacher = job(data)
    student = job(data, technique="response", teacher=teacher, seed=1, settings={"alpha": 1.0, "temperature": 2.0})
    run = student.fit()  # trains the teacher, too
    wanted = answer(teacher.find().network, data[0], "cpu")
    loss = {}
    for name, network in (("before", student.untrained), ("after", run.network)):
        seen = [Seen(z, {}, torch.arange(80), data[0].labels) for z in (answer(network, data[0], "cpu"), wanted)]
        loss[name] = float(student.parts[0].guidance(seen[0], seen[1], None))
    assert loss["after"] < loss["before"]


def test_loss_by_hand(data):
    """One step over all sentences: the loss is that of the untrained network."""
    train = data[0]
    network, taught = tiny().train(), torch.randn(len(train), 4)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        logits = network(network.encode(train.words).ids)
    parts = find_techniques("response", {"alpha": 0.25, "temperature": 2.0})
    pieces = network.encode(train.words)
    recipe = TextRecipe(1, len(train), 1e-3)
    ((loss, accuracy),) = train_sentences(network, pieces, train.labels, taught, parts, recipe, 0, lambda: None)
    p, q = (taught / 2).softmax(1), (logits / 2).log_softmax(1)
    divergence = (p * (p.log() - q)).sum(1).mean()
    assert loss == pytest.approx(float(0.75 * F.cross_entropy(logits, train.labels) + 0.25 * 4 * divergence), rel=1e-4)
    assert accuracy == pytest.approx(float((logits.argmax(1) == train.labels).double().mean()))


def test_answers_do_not_depend_on_neighbours(data):
    network = tiny()
    whole = answer(network, data[1], "cpu")
    rows = torch.tensor([7, 3])
    assert torch.allclose(answer(network, data[1][rows], "cpu"), whole[rows], atol=1e-5)


def test_slope_rises_and_falls():
    rates = [slope(step, 20) for step in range(20)]
    assert rates[1] == max(rates) == 1
    assert min(rates) > 0
    assert slope(0, 1) == 1


def test_what_does_not_fit_is_refused(data):
    for settings, message in (
        ({"technique": "attention"}, "compares features of images"),
        ({"technique": "response"}, "expects a teacher, got None"),
        ({"teacher": job(data)}, "expects no teacher"),
        ({"recipe": TextRecipe(1, 81)}, "a batch of 81 sentences or more, got 80"),
    ):
        with pytest.raises(ValueError, match=message):
            job(data, **settings)
    for wrong in ({"epochs": -1}, {"batch_size": 1}, {"lr": math.inf}):
        with pytest.raises(ValueError, match="recipe: expected"):
            TextRecipe(**wrong)


def test_a_loss_that_is_not_finite_is_named(data):
    with pytest.raises(FloatingPointError, match="the training loss of from scratch, label, seed 0 is nan in epoch 1"):
        job(data, recipe=TextRecipe(1, 20, 1e30)).fit()


def test_no_epochs_give_the_untrained_network(data):
    run = job(data, recipe=TextRecipe(0, 20)).fit()
    assert isinstance(run.history, pd.DataFrame)
    assert not len(run.history)
    both = zip(run.network.parameters(), job(data).untrained.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
