import json
import math

import jsonschema
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from kdx.cli import app
from kdx.pages import results
from kdx.planted import leaderboard, suite


def entry(name, **values):
    rows = [("all", score, "higher", 0.5, 1.0, value, math.nan, math.nan, 1) for score, value in values.items()]
    columns = ["case", "score", "better", "chance", "best", "value", "low", "high", "seeds"]
    table = pd.DataFrame(rows, columns=columns).assign(rank=1, of=1)
    table.attrs |= {"name": name, "given": ["reference"], "seconds": 1.5, "whole": 2.0}
    return leaderboard.result(table, f"module:{name}")


@pytest.fixture
def folder(tmp_path):
    for name, a, b in (("first", 0.9, 0.8), ("second", 0.90001, 0.7), ("third", 0.6, 0.9)):
        leaderboard.write(entry(name, a=a, b=b), tmp_path / f"{name}.json")
    return tmp_path


def test_a_result_follows_its_schema_and_holds_no_nan():
    found = entry("mine", a=0.7)
    jsonschema.validate(json.loads(json.dumps(found, allow_nan=False)), leaderboard.schema())
    assert found["scores"][0]["low"] is None
    for part in found:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in found.items() if k != part}, leaderboard.schema())


def test_ranks_are_by_score_and_differences_of_machines_are_ties(folder):
    table = leaderboard.load(folder).set_index(["name", "score"])
    assert table["rank"].to_dict() == {
        ("first", "a"): 1, ("second", "a"): 1, ("third", "a"): 3,
        ("first", "b"): 2, ("second", "b"): 3, ("third", "b"): 1,
    }  # fmt: skip
    board = leaderboard.overall(leaderboard.load(folder))
    assert board["name"].tolist() == ["first", "second", "third"]
    assert board["place"].tolist() == [1, 2, 2]
    assert board["mean rank"].tolist() == [1.5, 2, 2]
    assert board.loc[0, ["call", "given", "seconds"]].tolist() == ["module:first", "reference", 1.5]


def test_files_that_are_no_results_and_names_that_are_taken_are_refused(folder):
    with pytest.raises(ValueError, match=r"third\.json is there already"):
        leaderboard.write(entry("third", a=0.1), folder / "third.json")
    leaderboard.write(entry("first", a=0.1), folder / "zz.json")
    with pytest.raises(ValueError, match=r"zz\.json: expected a name of its own, got 'first', which first\.json has"):
        leaderboard.load(folder)
    (folder / "zz.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"zz\.json: expected a result of `kdx benchmark`, got KeyError"):
        leaderboard.load(folder)


def test_an_entry_is_ranked_among_those_of_the_same_networks(folder, monkeypatch):
    monkeypatch.setattr(leaderboard, "home", lambda: folder)
    other = entry("other", a=0.99) | {"networks": "0" * 16}
    leaderboard.write(other, folder / "other.json")
    rows = [("all", "a", "higher", 0.5, 1.0, 0.7, math.nan, math.nan, 1)]
    new = pd.DataFrame(rows, columns=["case", "score", "better", "chance", "best", "value", "low", "high", "seeds"])
    assert leaderboard.ranked(new, "mine")[["rank", "of"]].to_numpy().tolist() == [[3, 4]]
    assert leaderboard.ranked(new, "first")[["rank", "of"]].to_numpy().tolist() == [[2, 3]]  # its old row is replaced
    with pytest.raises(ValueError, match="expected results on the same networks, got others of other; run these again"):
        leaderboard.overall(leaderboard.load(folder))


def test_a_file_for_the_board_holds_all_cases_and_images(tmp_path, monkeypatch):
    for more in (["--case", "sizes"], ["--tested", "6"]):
        done = CliRunner().invoke(app, ["benchmark", "constant", *more, "--out", str(tmp_path / "mine.json")])
        assert done.exit_code == 2
        assert "--out: expected a result over all cases and 100 images; leave out --case and --tested" in done.output
    monkeypatch.delenv("KDX_NETWORKS")
    done = CliRunner().invoke(app, ["benchmark", "constant", "--case", "sizes", "--tested", "6"])
    assert done.output.count("one seed") == 2 * 2 * 4  # two ends, of four scores, of the case and of all
    done = CliRunner().invoke(app, ["benchmark", "constant", "--out", str(tmp_path / "no" / "mine.json")])
    assert "expected a file in a folder that exists" in done.output


def test_how_far_a_value_is_from_chance_to_the_best():
    table = pd.DataFrame({"score": ["a", "ratio"], "value": [0.75, 10.0], "chance": [0.5, 1.0], "best": [1.0, 100.0]})
    assert leaderboard.attained(table).tolist() == pytest.approx([0.5, 0.5])


def test_an_entry_of_ten_lines_goes_from_the_command_line_to_the_board(tmp_path, monkeypatch):
    """As CONTRIBUTING says."""
    monkeypatch.delenv("KDX_NETWORKS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import kdx\n"
        "from kdx.explain.explainers import Maps\n\n\n"
        "def explain(student, base, images, labels):\n"
        "    gap = kdx.saliency(student, images, labels) - kdx.saliency(base, images, labels)\n"
        "    gap = gap.sum(1)\n"
        '    return Maps({"input": gap.relu()}, {"input": (-gap).relu()})\n'
    )
    monkeypatch.setattr(suite, "CASES", {"held-out cues": suite.CASES["held-out cues"]})
    command = ["benchmark", "mine:explain", "--name", "my maps"]
    done = CliRunner().invoke(app, [*command, "--out", "board.json"])
    assert done.exit_code == 0, done.output
    assert "s in the explainer" in done.output
    found = json.loads((tmp_path / "board.json").read_text())
    jsonschema.validate(found, leaderboard.schema())
    assert (found["name"], found["call"], found["networks"]) == (
        "my maps",
        "mine:explain",
        leaderboard.networks_digest(),
    )
    (tmp_path / "board").mkdir()
    (tmp_path / "board.json").rename(tmp_path / "board" / "mine.json")
    assert leaderboard.overall(leaderboard.load(tmp_path / "board"))["name"].tolist() == ["my maps"]
    again = CliRunner().invoke(app, [*command, "--out", "board/mine.json"])
    assert again.exit_code == 2
    assert "is there already" in again.output


# --- the board that comes with the checkout ------------------------------------------------------


@pytest.fixture(scope="module")
def board():
    return leaderboard.load()


def test_stored_results_follow_the_schema_and_are_of_the_shipped_networks(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    paths = sorted(leaderboard.home().glob("*.json"))
    assert len(paths) >= 17
    for path in paths:
        found = json.loads(path.read_text())
        jsonschema.validate(found, leaderboard.schema())
        assert found["networks"] == leaderboard.networks_digest(), path.name
        assert path.stem == leaderboard.slug(found["name"])


def test_the_oracle_is_first_and_constant_maps_are_at_chance(board):
    assert board[board["name"] == "oracle"]["rank"].eq(1).all()
    assert leaderboard.overall(board).iloc[0]["name"] == "oracle"
    of = board[board["name"] == "constant"]
    assert of["value"].to_numpy() == pytest.approx(of["chance"].to_numpy(), rel=1e-6)


def test_the_order_is_that_of_the_stored_contest(board):
    there = results.load("planted_contest")[0].groupby("explainer")["AUPRC"].mean()
    of = board[(board["case"] == "all") & (board["score"] == "AUPRC")].set_index("name")["value"]
    names = there.index.intersection(of.index)
    assert len(names) >= 12
    assert stats.spearmanr(there[names], of[names]).statistic > 0.9
