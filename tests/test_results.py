import pandas as pd
import pytest

from kdx.distil.run_store import shipped_table
from kdx.pages import results


def test_stored_results_come_back_with_their_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    (tmp_path / "data").mkdir()
    table = pd.DataFrame({"network": ["base", "student"], "value": [0.25, 1 / 3]})
    results.store("ranking", table, "python rank.py", 90.2)
    again, facts = results.load("ranking")
    pd.testing.assert_frame_equal(again, table)
    assert (facts["command"], facts["seconds"]) == ("python rank.py", 90)
    assert {"date", "commit", "kdx", "torch", "python"} <= set(facts)
    assert "from `python rank.py` at commit" in results.origin("ranking")
    with pytest.raises(ValueError, match=r"no stored results 'rank' .* choose from: ranking"):
        results.load("rank")


def test_results_of_networks_that_were_trained_anew_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    (tmp_path / "data").mkdir()
    table = pd.DataFrame({"file": ["a.safetensors", "b.safetensors"], "sha256": ["1", "2"]})
    monkeypatch.setattr(results, "shipped_table", lambda: table)
    results.store("ranking", pd.DataFrame({"value": [1.0]}), "python rank.py", 1, table)
    assert results.load("ranking")[1]["networks"] == {"a.safetensors": "1", "b.safetensors": "2"}
    monkeypatch.setattr(results, "shipped_table", lambda: table.iloc[:1])  # one is not shipped any more
    results.load("ranking")
    monkeypatch.setattr(results, "shipped_table", lambda: table.assign(sha256=["1", "3"]))
    with pytest.raises(ValueError, match=r"other networks .*: b\.safetensors; run `python rank\.py` again"):
        results.load("ranking")


def test_results_that_come_with_the_checkout_are_of_its_networks(monkeypatch):
    monkeypatch.delenv("KDX_NETWORKS")
    stored = sorted(path.stem for path in (results.CHECKOUT / "data" / "results").glob("*.csv"))
    facts = {name: results.load(name)[1] for name in stored}
    detectors = set(shipped_table().query("dataset == 'bccd'")["file"])
    assert set(facts["side_by_side"]["networks"]) == detectors == set(facts["side_by_side_shares"]["networks"])
