import pytest
import torch
from PIL import Image

import kdx
from kdx.distil.run_store import manifests
from kdx.distil.stored_pairs import stored_pairs

pytestmark = pytest.mark.usefixtures("trained_home")


def test_pairs_are_students_with_the_base_of_their_fold():
    found = stored_pairs()
    assert [pair.technique for pair in found[:2]] in (["response", "attention"], ["attention", "response"])
    assert [pair.networks for pair in found[2:]] == ["resnet10@0.125 from resnet10@0.125, 1 epochs"]  # second student
    for pair in found[:2]:
        assert pair.networks == "resnet10@0.125 from its base, 1 epochs"
        specs = {role: run.manifest["spec"] for role, run in pair.runs.items()}
        assert list(specs) == ["student", "base", "second base"]
        assert specs["student"]["technique"]["name"] == pair.technique
        assert specs["base"]["seed"] == specs["student"]["seed"] != specs["second base"]["seed"]
        assert specs["base"]["train"] == specs["student"]["train"] == specs["second base"]["train"]
    with pytest.raises(ValueError, match=r"no student with its base of cifar10 and any technique .* 01_gradcam"):
        stored_pairs("cifar10")


def test_students_of_a_smoothed_teacher_have_a_name_of_their_own(tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "own"))
    recipe = kdx.Recipe(epochs=1, batch_size=20, sizes=(0.5,))
    kdx.cross_fit(
        tiny_shapes["train"], teacher="resnet10@0.25", student="resnet10@0.125", k=2, temperatures=[4.0],
        recipe=recipe, device="cpu",
    )  # fmt: skip
    networks = {pair.networks for pair in stored_pairs("shapes", "response")}
    assert networks == {f"resnet10@0.125 from {smoothed}resnet10@0.25, 1 epochs" for smoothed in ("", "smoothed ")}


def test_students_of_another_family_come_last(tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "own"))
    recipe = kdx.Recipe(epochs=1, batch_size=20)
    for student in ("resnet10@0.125", "mobilenet_v1@0.125"):  # the newest would be the first
        kdx.cross_fit(
            tiny_shapes["train"], teacher="resnet18@0.125", student=student, k=2, first=1, recipe=recipe, device="cpu"
        )
    of = [pair.networks.split(" from ")[0] for pair in stored_pairs("shapes")]
    assert of == ["resnet10@0.125", "mobilenet_v1@0.125"]


def test_damaged_manifests_are_named(trained_home):
    path = trained_home / "runs" / ("f" * 32)
    path.mkdir()
    (path / "manifest.json").write_text("{")
    try:
        with pytest.raises(ValueError, match=f"the stored run {path} is damaged"):
            manifests()
    finally:
        (path / "manifest.json").unlink()
        path.rmdir()


def test_a_pair_becomes_files_for_the_page_on_own_models(tmp_path):
    pair = stored_pairs("shapes", "attention")[0]
    files = pair.as_files(tmp_path, 20)
    assert files["teacher"] == ""  # is the base
    written = sorted(tmp_path.glob("*/*.png"))
    assert len(written) == 20
    images = pair.images(20)
    label = images.classes.index(written[0].parent.name)
    row = int(written[0].stem)
    assert int(images.labels[row]) == label
    with Image.open(written[0]) as picture:
        assert torch.equal(torch.tensor(list(picture.tobytes())), images.images[row].permute(1, 2, 0).flatten())
