from types import SimpleNamespace

import pytest

from kdx.distil.run_store import shipped_table
from kdx.paths import networks_home
from kdx.planted import suite


@pytest.fixture
def rows(monkeypatch):
    """The shipped planted networks by role and fold."""
    monkeypatch.delenv("KDX_NETWORKS")
    table = shipped_table()
    return table[table["dataset"] == "planted"].set_index(["role", "fold"])


def test_the_shipped_networks_are_of_one_model_and_small(rows):
    assert set(rows["model"]) == {"resnet10@0.125"}
    files = list((networks_home() / "planted").rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 8_000_000


@pytest.mark.parametrize("case", ["standard", "held-out cues"])
def test_they_are_found_by_what_would_be_trained(rows, case):
    """The first repetition of two cases; the page's own networks are among them."""
    places = [(role, 1) for role in suite.roles(case, 1)]
    seen = []

    def ship(run, role, fold):
        assert run.key == rows.loc[(role, fold), "sha256"][:32]  # found by its specification, not trained
        seen.append((role, fold))

    suite.Study().train(places, ship, 1, "cpu")
    assert set(seen) == set(places)


def test_cues_change_roles_from_one_repetition_to_the_next(rows):
    for name, case in suite.CASES.items():
        found = [suite.load(name, fold, tested=3, reference=3) for fold in range(1, len(case.seeds) + 1)]
        assert [one.planting for one in found[0]] == list(case.plantings)
        planted = {one.plan.distilled for of in found for one in of if one.planting == "both"}
        assert len(planted) == len(case.seeds)
        assert [of[0].seed for of in found] == list(case.seeds)


def test_plantings_of_one_repetition_share_networks(rows):
    by_name = {one.planting: one.networks for one in suite.load("standard", 1, tested=3, reference=3)}
    assert by_name["distilled"]["student"] is by_name["both"]["student"]
    assert by_name["nothing"]["teacher"] is by_name["nothing"]["second base"]
    assert len({run.key for of in by_name.values() for run in of.values()}) == 7
    later = {one.planting: one.networks for one in suite.load("standard", 2, tested=3, reference=3)}
    assert set(later["nothing"]) == {"student", "base", "teacher"}  # the second base of the first repetition alone
    assert len({run.key for of in later.values() for run in of.values()}) == 6
    doses = suite.load_doses("standard", 1)
    assert [one.dose for one in doses] == list(suite.CASES["standard"].doses)
    assert {one.networks["teacher"].key for one in doses} == {by_name["distilled"]["teacher"].key}
    assert {one.cue for one in doses} == {1}  # seed 99 turns nothing


def test_a_missing_network_alone_is_shipped(home, networks_home, monkeypatch):
    run = SimpleNamespace(key="k")
    monkeypatch.setattr(suite, "fit_ignorant", lambda *arguments: run)
    monkeypatch.setattr(suite, "plant", None)  # not asked
    shipped = []
    suite.Study().train([suite.IGNORANT], lambda *place: shipped.append(place), 1, "cpu")
    assert shipped == [(run, "ignorant", 1)]
