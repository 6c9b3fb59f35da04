import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

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


def test_answers_to_a_part_serve_the_whole_and_the_other_way_round(run, shapes16, monkeypatch):
    asked, real = [], module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda model, part, device: asked.append(len(part)) or real(model, part))
    test = shapes16["test"]
    part, (*_, rest) = test.limit(40), test.split(20, seed=1)
    for some in (part, test, rest, test[torch.arange(len(test)).flip(0)]):
        found = kdx.answers(run, some, "cpu")
        direct = kdx.evaluate(run.model, some, "cpu")
        torch.testing.assert_close(found.logits, direct.logits)
        assert found.accuracy == direct.accuracy
    assert asked == [40, len(test) - 40]
    brighter = replace(test, card=replace(test.card, mean=tuple(m / 2 for m in test.card.mean)))
    assert not torch.allclose(kdx.answers(run, brighter, "cpu").logits, kdx.answers(run, test, "cpu").logits)


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


@pytest.mark.parametrize("damage", ["bytes", "lengths", "shape", "type"])
def test_damaged_answers_are_named(run, shapes16, home, damage):
    kdx.answers(run, shapes16["test"], "cpu")
    (path,) = (home / "answers").iterdir()
    images, logits = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(3, 10)
    stored = {
        "bytes": b"damaged",
        "lengths": save({"images": images, "logits": logits[:2]}),
        "shape": save({"images": images, "logits": logits[:, 0].clone()}),
        "type": save({"images": images.int(), "logits": logits}),
    }
    path.write_bytes(stored[damage])
    with pytest.raises(ValueError, match=f"the stored answers {path} are damaged .* delete that file"):
        kdx.answers(run, shapes16["test"], "cpu")


def test_answers_to_images_of_any_layout_shape_or_number(run, shapes16):
    test = shapes16["test"]
    first = kdx.answers(run, test, "cpu").logits
    other = replace(test, images=test.images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(kdx.answers(run, other, "cpu").logits, first)
    wide = replace(test, images=test.images.view(len(test), 3, 8, 32))  # the same bytes
    torch.testing.assert_close(kdx.answers(run, wide, "cpu").logits, kdx.evaluate(run.model, wide, "cpu").logits)
    twice = test[torch.tensor([0, 1, 0])]
    assert torch.equal(kdx.answers(run, twice, "cpu").logits, first[[0, 1, 0]])
