import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch

import kdx
from kdx.distil import detector_fit
from kdx.distil.detector_fit import detect
from kdx.networks.fpn_detectors import build_detector, inherit
from tests.boxes import squares

TINY = dict(recipe=kdx.Recipe(epochs=1, batch_size=4, lr=0.02), device="cpu")


@pytest.fixture
def teacher():
    return kdx.fit_detector("resnet10@0.125", squares(), seed=3, **TINY)


def test_a_training_is_done_once_and_its_run_is_whole(teacher, home):
    again = kdx.fit_detector("resnet10@0.125", squares(), seed=3, **TINY)
    assert again.key == teacher.key
    assert [path.name for path in (home / "runs").iterdir()] == [teacher.key]  # nothing half-written is left
    assert teacher.history.columns.tolist() == ["epoch", "split", "loss"]
    assert teacher.manifest["spec"]["model"]["kind"] == "fcos"
    assert teacher.classes == ("red", "green")
    assert not teacher.model.training
    torch.testing.assert_close(
        teacher.untrained.state_dict(), build_detector("fcos", "resnet10@0.125", 2, (64, 96), seed=3).state_dict()
    )


def test_the_vanilla_student_starts_as_the_distilled_ones(teacher):
    none = dict(recipe=kdx.Recipe(epochs=0, batch_size=4), device="cpu")
    fresh = kdx.fit_detector("resnet10@0.0625", squares(), **none).model
    vanilla = kdx.fit_detector("resnet10@0.0625", squares(), start=teacher, **none).model
    distilled = kdx.fit_detector("resnet10@0.0625", squares(), technique="fgd", teacher=teacher, **none).model
    expected = build_detector("fcos", "resnet10@0.0625", 2, (64, 96), seed=0)
    inherit(expected, teacher.model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, vanilla.state_dict()[name])
        assert torch.equal(tensor, distilled.state_dict()[name])
    name = "head.classification_head.conv.0.weight"
    assert not torch.equal(fresh.state_dict()[name], vanilla.state_dict()[name])


def test_everything_that_decides_the_weights_is_in_the_key(teacher):
    def key(**changes):
        settings = dict(technique="fgd", teacher=teacher, recipe=kdx.Recipe(epochs=0, batch_size=4), device="cpu")
        return kdx.fit_detector(**({"backbone": "resnet10@0.0625", "train": squares()} | settings | changes)).key

    keys = [
        key(), key(seed=1), key(backbone="resnet10@0.125"), key(relation_weight=0.0), key(train=squares(seed=1)),
        key(recipe=kdx.Recipe(epochs=0, batch_size=2)), key(kind="retinanet"), key(technique="prior"),
        key(technique="label", teacher=None, start=teacher), key(technique="label", teacher=None),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_killed_and_resumed_it_gives_the_same_weights(home):
    program = textwrap.dedent("""
        import os
        import kdx
        from kdx.distil import detector_fit
        from tests.boxes import squares
        saved = detector_fit.Kept.save
        def save(self, state):
            if state["epochs"] == 3:
                os.kill(os.getpid(), 9)
            saved(self, state)
        detector_fit.Kept.save = save
        recipe = kdx.Recipe(epochs=4, batch_size=4, lr=0.02)
        kdx.fit_detector("resnet10@0.0625", squares(), recipe=recipe, device="cpu")
    """)
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -9
    (partial,) = (home / "runs").glob(".*.cpu.partial")
    assert torch.load(partial)["epochs"] == 2
    setting = dict(recipe=kdx.Recipe(epochs=4, batch_size=4, lr=0.02), device="cpu")
    resumed = kdx.fit_detector("resnet10@0.0625", squares(), **setting)
    (home / "runs" / resumed.key).rename(home / "elsewhere")
    whole = kdx.fit_detector("resnet10@0.0625", squares(), **setting)
    assert whole.key == resumed.key
    assert whole.history["loss"].tolist() == pd.read_csv(home / "elsewhere" / "history.csv")["loss"].tolist()
    assert (home / "elsewhere" / "model.safetensors").read_bytes() == whole.file.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"technique": "fgd"}, "'fgd' expects a teacher run"),
     ({"technique": "response"}, "choose from: label, fgd, prior"),
     ({"alpha": 1}, "unknown settings of 'label': alpha; choose from: none"), ({"train": squares(3)}, "at least 4"),
     ({"backbone": "vgg"}, "unknown model 'vgg'")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kdx.fit_detector(**({"backbone": "resnet10@0.0625", "train": squares()} | TINY | change))


def test_other_teachers_are_refused(teacher, tiny_shapes):
    images = tiny_shapes["train"]
    classifier = kdx.fit("resnet10", images, images, width=0.125, recipe=kdx.Recipe(0, 20), device="cpu")
    data = squares()
    with pytest.raises(ValueError, match="expected a teacher of the classes"):
        kdx.fit_detector("resnet10@0.0625", data, technique="fgd", teacher=classifier, **TINY)
    with pytest.raises(ValueError, match="expects no teacher"):
        kdx.fit_detector("resnet10@0.0625", data, teacher=teacher, **TINY)


def test_a_loss_that_is_not_finite_stops_the_training(home, monkeypatch):
    epochs, kept = [], []
    saved, trained = detector_fit.Kept.save, detector_fit.train_detector
    monkeypatch.setattr(detector_fit.Kept, "save", lambda self, state: (saved(self, state), kept.append(self.path)))

    def diverges(*given):
        for loss, state in trained(*given):
            epochs.append(loss)
            yield (loss if len(epochs) < 2 else float("nan")), state

    monkeypatch.setattr(detector_fit, "train_detector", diverges)
    with pytest.raises(FloatingPointError, match="is nan in epoch 2; lower the learning rate"):
        kdx.fit_detector("resnet10@0.0625", squares(), recipe=kdx.Recipe(epochs=3, batch_size=4), device="cpu")
    assert kept
    assert not kept[-1].exists()


def test_detections_are_those_of_the_detector_in_any_batches():
    detector = build_detector("fcos", "resnet10@0.0625", 2, (64, 96), seed=0).train()
    images = squares(5).images
    found = detect(detector, images, batch_size=2)
    assert detector.training
    expected = detector.eval()(list(images / 255))
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, {name: value.detach() for name, value in other.items()}, rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="expected uint8 images"):
        detect(detector, images / 255)
