import threading

import pytest
import torch

import kdx
from kdx.distil import answers as module
from kdx.paths import alone


@pytest.fixture
def run(shapes16):
    recipe = kdx.Recipe(epochs=0, batch_size=20)
    return kdx.fit("resnet10@0.125", shapes16["train"], shapes16["test"], recipe=recipe, device="cpu")


def test_answers_are_computed_once_for_a_network_and_its_images(run, shapes16, monkeypatch):
    calls, real = [], module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *a: calls.append(a) or real(*a))
    test = shapes16["test"]
    first, again = (kdx.answers(run, test, "cpu") for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first.logits, again.logits)
    direct = kdx.evaluate(run.model, test, "cpu")
    assert (again.accuracy, again.loss) == (direct.accuracy, pytest.approx(direct.loss))
    kdx.answers(run, test.limit(40), "cpu")
    assert len(calls) == 2


def test_of_two_that_ask_at_once_one_waits_for_the_other(run, shapes16, home, monkeypatch):
    test = shapes16["test"]
    first = kdx.answers(run, test, "cpu")
    (path,) = (home / "answers").iterdir()
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(module, "evaluate", lambda *a: pytest.fail("computed twice"))
    found = []
    with alone(path.stem):
        other = threading.Thread(target=lambda: found.append(kdx.answers(run, test, "cpu")))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        path.write_bytes(content)  # as the process that holds the lock does
    other.join(30)
    assert torch.equal(found[0].logits, first.logits)


def test_damaged_answers_are_named(run, shapes16, home):
    kdx.answers(run, shapes16["test"], "cpu")
    (path,) = (home / "answers").iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"the stored answers {path} are damaged .* delete that file"):
        kdx.answers(run, shapes16["test"], "cpu")
