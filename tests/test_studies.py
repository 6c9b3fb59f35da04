import ast
import json
from dataclasses import asdict, replace
from pathlib import Path

import papermill

import kdx
from kdx.cli_stores import all_studies
from kdx.data.dataset import folds
from kdx.distil import shipped, studies
from kdx.distil.cross_validation import plan_chains, plan_fit
from kdx.distil.run_store import find_run, shipped_table
from kdx.distil.techniques import find_techniques, settings_of
from kdx.pages import build
from kdx.paths import networks_home

ROOT = Path(__file__).parent.parent


def test_every_declared_network_is_shipped_and_no_other(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    table, home = shipped_table(), networks_home()
    rows = table[["dataset", "role", "fold"]].itertuples(index=False, name=None)
    assert sorted(rows) == sorted((study.dataset, *place) for study in all_studies() for place in study.places)
    files = {path.relative_to(home).as_posix() for path in home.rglob("*.safetensors")}
    assert {name for name in files if not name.startswith("text/")} == set(table["file"])


def test_shipped_files_are_those_of_the_current_recipes(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    table = shipped_table()
    for study in studies.STUDIES:
        plans = study.plans(study.recipe)
        rows = table[table["dataset"] == study.dataset].set_index(["role", "fold"])
        for place, row in rows.iterrows():
            assert (plans[place].model, plans[place].epochs) == (row["model"], row["epochs"])
        for sha256, seed, digest in rows[["sha256", "seed", "digest"]].itertuples(index=False):
            run = find_run(sha256[:32])  # checks the file
            recipe = run.manifest["spec"]["recipe"]
            recipe["augmentation"] = study.recipe.augmentation and recipe["augmentation"]
            assert recipe == json.loads(json.dumps(asdict(study.recipe)))
            assert (run.manifest["spec"]["seed"], run.digest) == (seed, digest)


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
    of_datasets = {study.dataset: study for study in studies.STUDIES}
    asked = 0
    for page in build.load_pages(ROOT, "shipped"):
        defaults = papermill.inspect_notebook(str(page.notebook))
        p = {name: ast.literal_eval(found["default"]) for name, found in defaults.items()} | page.parameters
        if not {"epochs", "folds"} <= set(p) or p["dataset"] not in of_datasets:
            continue
        study = of_datasets[p["dataset"]]
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
            of_pages = p["techniques"] or studies.TAUGHT, p.get("used") or p["folds"], p["controls"]
            wanted = plan_fit(p["teacher"], p["student"], *of_pages, 0, recipe, p.get("temperatures", ()))
            rows = table[table["dataset"] == study.dataset]
            stored = set(rows[["role", "fold"]].itertuples(index=False, name=None))
            assert p.get("only_stored") or set(wanted) <= stored
            unused = ("reordered base", "second student") if p.get("only_stored") else ()
            wanted = {plan for (role, _), plan in wanted.items() if role not in unused}
            if page.name == "08_techniques":
                alone = plan_fit(p["teacher"], p["student"], ["response"], of_pages[1], 0, 0, recipe)
                wanted |= standardised(alone.values())
                apart = plan_fit(p["teacher"], p["other_student"], of_pages[0], 1, 1, 0, recipe)
                apart = {apart[role, 1] for role in ("base", "second base", "random teacher", *of_pages[0])}
                wanted |= apart | standardised({plan for plan in apart if plan.teacher and plan.teacher.epochs})
        assert wanted <= set(study.plans(study.recipe).values())
        for name in {plan.technique for plan in wanted}:
            assert with_settings(name, p["settings"]) == with_settings(name, study.settings)
        asked += 1
    assert asked == 12
