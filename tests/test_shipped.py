import pandas as pd
import pytest
import torch

import kdx
from kdx.data import shapes
from kdx.distil import shipped
from kdx.distil.cross_validation import plan_fit
from kdx.distil.run_store import find_run, manifests, shipped_table
from kdx.distil.studies import CrossValidated
from kdx.networks.models import load_checkpoint

TINY = kdx.Recipe(epochs=1, batch_size=20, lr=0.1, sizes=(1.0,))


@pytest.fixture
def study(networks_home, monkeypatch):
    """Two folds of a few shapes: teacher, base, a student and all controls."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 200, "test": 200})
    return CrossValidated(
        "shapes",
        TINY,
        lambda recipe: plan_fit("resnet10@0.1875", "resnet10@0.125", ("response",), 2, 1, 0, recipe),
        folds=2,
        data={"limit": 80, "size": 16},
    )


def test_train_ships_networks_that_are_found_by_role_and_by_recipe(study, networks_home, home):
    shipped.train([study], only=["teacher", "base", "response"], folds=[1], device="cpu", workers=1)
    table = shipped_table()
    assert sorted(table["role"]) == ["base", "response", "teacher"]
    assert {path.name for path in (networks_home / "shapes" / "fold1").iterdir()} == {
        f"{role}.safetensors" for role in ("base", "response", "teacher")
    }
    weights, header = load_checkpoint(networks_home / "shapes" / "fold1" / "response.safetensors")
    assert all(torch.equal(w.half().float(), w) for w in weights.parameters())
    assert header["history"]["split"] == ["train", "validation"]
    student, base = kdx.load_pair("shapes", "response")
    assert student.architecture == base.architecture == weights.architecture
    row = table.set_index("role").loc["response"]
    assert kdx.evaluate(student, study.images("test"), "cpu").accuracy == pytest.approx(row["accuracy"], abs=1e-4)
    # the student learned from the teacher as it is shipped
    run = find_run(row["sha256"][:32])
    assert run.manifest["spec"]["teacher"] == table.set_index("role").loc["teacher", "sha256"][:32]

    trained = set(path.name for path in (home / "runs").iterdir())
    images = study.images("train")
    runs = kdx.cross_fit(
        images, teacher="resnet10@0.1875", student="resnet10@0.125", k=2, recipe=TINY, device="cpu", watched=20
    )
    assert runs["response", 1].key in manifests()
    assert len(set(path.name for path in (home / "runs").iterdir()) - trained) == 3  # fold 2 alone


def test_train_brings_back_what_is_missing_and_no_more(study, networks_home, home, monkeypatch):
    wanted = dict(only=["teacher", "base"], folds=[1], device="cpu", workers=1)
    shipped.train([study], **wanted)
    before = shipped_table()
    path = networks_home / "shapes" / "fold1" / "base.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match="is missing; `kdx networks train --missing`"):
        kdx.load_network("shapes", "base")
    shipped.train([study], **wanted)
    pd.testing.assert_frame_equal(shipped_table().drop(columns="sha256"), before.drop(columns="sha256"))
    assert kdx.load_network("shapes", "base")


def test_verify_names_damage_and_other_accuracies(study, networks_home, monkeypatch):
    shipped.train([study], only=["base"], device="cpu", workers=1)
    assert [row["problem"] for row in shipped.verify([study])] == ["", ""]
    table = shipped_table()
    table.assign(accuracy=[table["accuracy"][0], 0.9]).to_csv(networks_home / "networks.csv", index=False)
    assert ["expected an accuracy of 0.9000" in row["problem"] for row in shipped.verify([study])] == [False, True]
    table.assign(accuracy=[0.121, 0.1212]).to_csv(networks_home / "networks.csv", index=False)
    with monkeypatch.context() as patch:  # 0.121 - 0.12 exceeds 0.001 in floating point
        patch.setattr(shipped, "_measured", lambda model, tested: 0.12)
        assert [bool(row["problem"]) for row in shipped.verify([study])] == [False, True]
    path = networks_home / table["file"][0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert "is damaged" in next(iter(shipped.verify([study])))["problem"]


def test_load_pair_gives_the_base_of_the_same_architecture(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    for role, base in (
        ("attention", "base"),
        ("attention, resnet10@0.125", "resnet10@0.125"),
        ("second base, mobilenet_v1@0.125", "base, mobilenet_v1@0.125"),
        ("reordered base", "base"),
    ):
        student, found = kdx.load_pair("cifar10", role, 1)
        expected = kdx.load_network("cifar10", base, 1)
        assert found.architecture == student.architecture
        assert all(map(torch.equal, found.parameters(), expected.parameters())), role
    with pytest.raises(ValueError, match="expected one base of 'teacher' of cifar10, fold 1, got none; choose it with"):
        kdx.load_pair("cifar10", "teacher")
    with pytest.raises(ValueError, match="role 'student'; choose from"):
        kdx.load_pair("cifar10", "student")


def test_load_network_names_the_choices(study):
    shipped.train([study], only=["base"], folds=[1], device="cpu", workers=1)
    for arguments, message in (
        (("cifar", "base"), "dataset 'cifar'; choose from: 'shapes'"),
        (("shapes", "bass"), "role 'bass'; choose from: 'base'"),
        (("shapes", "base", 2), "fold 2; choose from: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kdx.load_network(*arguments)
    for wrong, message in (
        ({"only": ["bass"]}, r"unknown roles \['bass'\]; choose from: 'teacher', 'base', 'response'"),
        ({"folds": [3]}, r"unknown folds \[3\]; choose from: 1, 2"),
        ({"datasets": ["cifar"]}, r"unknown datasets \['cifar'\]; choose from: 'shapes'"),
    ):
        with pytest.raises(ValueError, match=message):
            shipped.train([study], **wrong)
