import ast
import json
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch

import kdx
from kdx.data import shapes
from kdx.data.dataset import folds
from kdx.distil import shipped
from kdx.distil.cross_validation import plan_chains, plan_fit
from kdx.distil.run_store import find_run, manifests, shipped_table
from kdx.distil.techniques import find_techniques, settings_of
from kdx.networks.models import load_checkpoint
from kdx.pages import build

ROOT = Path(__file__).parent.parent

NOT_YET = {  # roles that are declared, and shipped when they are trained
    *(role for role, _ in shipped._of_another_family(kdx.Recipe())),
    "smoothing", "smoothed teacher", *(f"response from smoothed teacher, T {t:g}" for t in shipped.TEMPERATURES),
}  # fmt: skip
TINY = kdx.Recipe(epochs=1, batch_size=20, lr=0.1, sizes=(1.0,))


@pytest.fixture
def study(networks_home, monkeypatch):
    """Two folds of a few shapes: teacher, base, a student and all controls."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 200, "test": 200})
    return shipped.CrossValidated(
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


def test_verify_names_damage_and_other_accuracies(study, networks_home):
    shipped.train([study], only=["base"], device="cpu", workers=1)
    assert [row["problem"] for row in shipped.verify([study])] == ["", ""]
    table = shipped_table()
    table.assign(accuracy=[table["accuracy"][0], 0.9]).to_csv(networks_home / "networks.csv", index=False)
    assert ["expected an accuracy of 0.9000" in row["problem"] for row in shipped.verify([study])] == [False, True]
    path = networks_home / table["file"][0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert "is damaged" in next(iter(shipped.verify([study])))["problem"]


def test_load_network_names_the_choices(study):
    shipped.train([study], only=["base"], folds=[1], device="cpu", workers=1)
    for arguments, message in (
        (("cifar", "base"), "dataset 'cifar'; choose from: shapes"),
        (("shapes", "bass"), "role 'bass'; choose from: base"),
        (("shapes", "base", 2), "fold 2; choose from: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kdx.load_network(*arguments)
    for wrong, message in (
        ({"only": ["bass"]}, r"unknown roles \['bass'\]; choose from: teacher, base, response"),
        ({"folds": [3]}, r"unknown folds \[3\]; choose from: 1, 2"),
        ({"datasets": ["cifar"]}, r"unknown datasets \['cifar'\]; choose from: shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            shipped.train([study], **wrong)


def test_shipped_files_are_those_of_the_current_recipes(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    table = shipped_table()
    for study in shipped.STUDIES:
        plans = study.plans(study.recipe)
        rows = table[table["dataset"] == study.dataset].set_index(["role", "fold"])
        assert set(rows.index) <= set(study.places)
        missing = set(study.places) - set(rows.index)
        assert {place for place in missing if place[0] not in NOT_YET} == set()
        for place, row in rows.iterrows():
            assert (plans[place].model, plans[place].epochs) == (row["model"], row["epochs"])
        for sha256, digest in rows[["sha256", "digest"]].itertuples(index=False):
            run = find_run(sha256[:32])  # checks the file
            recipe = run.manifest["spec"]["recipe"]
            recipe["augmentation"] = study.recipe.augmentation and recipe["augmentation"]
            assert recipe == json.loads(json.dumps(asdict(study.recipe)))
            assert run.digest == digest


def test_generated_images_are_those_of_the_shipped_networks(monkeypatch):
    """Bit by bit, or none of the networks would be found."""
    monkeypatch.delenv("KDX_NETWORKS")
    images = kdx.load_dataset("shapes", "train")
    for fold, (train, validation) in enumerate(folds(images.labels, 4), 1):
        spec = shipped.open_network("shapes", "base", fold).manifest["spec"]
        assert (images[train].fingerprint, images[validation].fingerprint) == (spec["train"], spec["validation"])


def with_settings(technique, settings):
    """The technique with those of the settings that it has."""
    return find_techniques(technique, {name: settings[name] for name in settings_of(technique) if name in settings})


def standardised(plans):
    """As pages 3 and 8 ask for them beside the students by response."""
    return {replace(plan, settings=(("standardise", True),)) for plan in plans if plan.technique == "response"}


def test_pages_of_the_shipped_profile_ask_for_shipped_networks_alone(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    table = shipped_table()
    studies = {study.dataset: study for study in shipped.STUDIES}
    asked = 0
    for page in build.load_pages(ROOT, "shipped"):
        defaults = papermill.inspect_notebook(str(page.notebook))
        p = {name: ast.literal_eval(found["default"]) for name, found in defaults.items()} | page.parameters
        if not {"epochs", "folds"} <= set(p) or p["dataset"] not in studies:
            continue
        study = studies[p["dataset"]]
        sizes = kdx.Recipe.PROGRESSIVE if p["progressive"] else (1.0,)
        recipe = kdx.Recipe(
            epochs=p["epochs"], batch_size=p["batch_size"], lr=p["lr"], augmentation=p["augmentation"] or None,
            sizes=sizes,
        )  # fmt: skip
        assert recipe == study.recipe
        assert (p["stem"], p["seed"], p["limit"], p["size"]) == (study.stem, 0, 0, 0)
        assert (p["folds"], tuple(p["classes"])) == (study.folds, tuple(study.classes))
        if "teachers" in p:
            line = [[name, p["student"]] for name in p["teachers"]]
            line += [[name, p["assistant"], p["student"]] for name in p["teachers"][2:]]
            chains = plan_chains(
                {str(i): each for i, each in enumerate(line)}, p["technique"], p["used"], p["controls"], 0
            )
            wanted = {link for links in chains.values() for link in links}
            losses = plan_fit(p["teachers"][-1], p["student"], ["dist", "response"], p["used"], 0, 0, recipe)
            wanted |= set(losses.values()) | standardised(losses.values())
        else:
            of_pages = p["techniques"] or shipped.TAUGHT, p.get("used") or p["folds"], p["controls"]
            wanted = plan_fit(p["teacher"], p["student"], *of_pages, 0, recipe, p.get("temperatures", ()))
            rows = table[table["dataset"] == study.dataset]
            stored = set(rows[["role", "fold"]].itertuples(index=False, name=None))
            assert p.get("stored_smoothing") or p.get("only_stored") or set(wanted) <= stored
            unused = ("reordered base", "second student") if p.get("only_stored") else ()
            wanted = {plan for (role, _), plan in wanted.items() if role not in unused}
            if page.name == "08_techniques":
                alone = plan_fit(p["teacher"], p["student"], ["response"], of_pages[1], 0, 0, recipe)
                wanted |= standardised(alone.values())
        assert wanted <= set(study.plans(study.recipe).values())
        for name in {plan.technique for plan in wanted}:
            assert with_settings(name, p["settings"]) == with_settings(name, study.settings)
        asked += 1
    assert asked == 12
