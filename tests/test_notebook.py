import warnings

import pandas as pd
import pytest

from kdx.explain.regression import FitWarning
from kdx.intervals import mean_interval
from kdx.pages.notebook import (
    chapters,
    check_parameters,
    environment,
    gather_warnings,
    interval_cell,
    naming_rates,
    paper_table,
    published,
    rank_cell,
    score_cell,
)
from kdx.progress import TERMINAL


def namespace(**values):
    return {"__annotations__": {"seed": int, "lr": float, "flag": bool}, "seed": 0, "lr": 0.1, "flag": True, **values}


def test_check_parameters_returns_what_was_declared():
    assert check_parameters(namespace(print=print, pd=pd, _i1="", In=[], Out={})) == {
        "seed": 0, "lr": 0.1, "flag": True,
    }  # fmt: skip
    assert check_parameters(namespace(lr=1))["lr"] == 1  # a whole number is a float


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sede": 1}, "unknown parameters: sede; choose from: seed, lr, flag"),
        ({"seed": "1"}, "parameter seed: expected int, got '1'"),
        ({"seed": 1.5}, "parameter seed: expected int, got 1.5"),
        ({"seed": True}, "parameter seed: expected int, got True"),
        ({"flag": 1}, "parameter flag: expected bool, got 1"),
    ],
)
def test_check_parameters_names_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_parameters(namespace(**wrong))


def test_check_parameters_knows_the_least_value():
    assert check_parameters(namespace(), seed=0)
    with pytest.raises(ValueError, match="parameter seed: expected at least 1, got 0"):
        check_parameters(namespace(), seed=1)


def test_environment_shows_parameters_versions_and_fingerprints(tiny_shapes):
    table = environment({"seed": 0}, "cpu", train=tiny_shapes["train"]).data["value"]
    assert table["parameter", "seed"] == "0"
    assert table["data (SHA-256)", "train, 80 images"] == tiny_shapes["train"].fingerprint[:16]
    assert table["device", "name"].startswith("cpu")


def test_mean_interval_by_hand():
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.302653 / 3**0.5)  # t quantile 0.975 with 2 degrees of freedom
    assert interval.n == 3
    *unknown, n = mean_interval([1.0, 2.0, float("nan")])  # never a mean of the others
    assert pd.isna(unknown).all()
    assert n == 3
    for values in ([1.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="at least 2 values"):
            mean_interval(values)


def test_paper_table_has_the_published_values():
    table = paper_table("table1", "cifar10")
    assert table.loc[("overhaul", "L4"), "layer_student"] == 0.0794
    assert published(table, "overhaul", "layer_student")["L4"] == "\npaper: 0.0794"
    assert paper_table("table2").loc["L4", "layer_R18_R50_R101"] == 0.0082
    assert len(paper_table("table1", "petimages")) == len(table) == 12
    assert published(paper_table("table1", "shapes"), "overhaul", "layer_student") == ""
    assert published(table, "alp", "layer_student") == published(table, "overhaul", "") == ""
    with pytest.raises(ValueError, match="tables come with a checkout"):
        paper_table("table9", "cifar10")


def test_cells_of_tables():
    row = {"value": 0.25, "low": 0.125, "high": 0.5, "p": 0.01, "floor": 0.01}
    assert score_cell(row) == "0.250\n[0.125, 0.500]\np ≤ 0.010"
    assert score_cell(row | {"p": 0.02}) == "0.250\n[0.125, 0.500]\np = 0.020"
    assert score_cell(row | {"p": float("nan")}) == "0.250\n[0.125, 0.500]"
    assert score_cell({"value": 1.0, "low": -1.0, "high": 3.0}, "+.1f") == "+1.0\n[-1.0, +3.0]"
    assert [rank_cell({"best": 1.0, "worst": worst}) for worst in (1, 3)] == ["1", "1 to 3"]
    assert rank_cell({"best": float("nan"), "worst": float("nan")}) == "unknown"
    assert interval_cell(pd.Series([0.5])) == "+0.50"
    assert interval_cell(pd.Series([1.0, 2.0, 3.0])) == "+2.00 [-0.48, +4.48]"


def test_naming_rates_count_right_names_and_false_alarms():
    rows = [
        ("a", True, True, 0.01, True),
        ("a", True, True, 0.5, True),
        ("b", True, False, 0.01, False),
        ("b", True, True, float("nan"), False),
        ("c", False, False, 0.01, False),
        ("c", False, False, 0.9, False),
    ]
    columns = ["student", "teacher", "named by share", "p", "accused the teacher"]
    table = pd.DataFrame(rows, columns=columns).assign(dataset="d", group="g", fold=1)
    found = naming_rates(table)
    assert found["students"] == 3
    starts = {name: found[name].split(" ")[0] for name in ("named", "found", "wrongly accused", "false alarms")}
    assert starts == {"named": "75%", "found": "33%", "wrongly accused": "33%", "false alarms": "50%"}
    without = naming_rates(table[~table["teacher"]])
    assert (without["named"], without["found"]) == ("", "")
    assert naming_rates(table[table["p"].isna()])["found"] == "no p"


def test_chapters_are_told_on_the_terminal_alone(tmp_path, monkeypatch, capsys):
    screen = tmp_path / "terminal"
    screen.touch()
    monkeypatch.setenv(TERMINAL, str(screen))
    tell = chapters(61.7)
    tell("chapter 1 of 2")
    assert screen.read_text() == "0 s of about 62 s: chapter 1 of 2\n"
    monkeypatch.setenv(TERMINAL, str(tmp_path / "nowhere" / "terminal"))
    tell("chapter 2 of 2")
    assert capsys.readouterr().out == ""


def test_warnings_of_the_package_are_gathered_once_and_others_are_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = []
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        found = gather_warnings()
        for _ in range(2):
            warnings.warn("too few", FitWarning, stacklevel=1)
        warnings.warn("other", UserWarning, stacklevel=1)
    assert found == ["too few"]
    assert shown == ["other"]
