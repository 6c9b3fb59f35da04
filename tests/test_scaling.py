import pandas as pd
import pytest

from kdx.distil.studies import OTHER_FAMILY, TAUGHT
from kdx.pages.scaling import Machines, list_trainings, makespan, measure_overhead, predict
from tests.checkout import ROOT


def test_makespan_by_hand():
    assert makespan([3, 1, 2, 2], 1) == 8
    assert makespan([3, 1, 2, 2], 2) == 4  # 3 + 1 and 2 + 2
    assert makespan([3, 1, 2, 2], 100) == 3


def table(*rows):
    columns = ["generation", "flops", "received", "sent", "images", "fold"]
    return pd.DataFrame(rows, columns=columns)


def test_time_by_hand():
    trainings = table((1, 100, 10, 0, 40, 1), (1, 100, 10, 0, 40, 1), (2, 50, 10, 10, 40, 1))
    machines = Machines(flops=10.0, overhead=0.5, bandwidth=1e9)
    one, two = (predict(trainings, workers, machines) for workers in (1, 2))
    assert one["seconds"] == pytest.approx(2 * 10.5 + 5.5)
    assert two["seconds"] == pytest.approx(10.5 + 5.5)
    assert two["speed-up"] == pytest.approx(25 / 16)
    assert two["efficiency"] == pytest.approx(25 / 32)
    slow = predict(trainings, 2, Machines(flops=10.0, overhead=0.5, bandwidth=1.0))
    # 40 bytes of images and 20 of weights, and 20 of weights; the client has more to do than the workers
    assert slow["seconds"] == pytest.approx((1 + 40 + 20) + (0.5 + 20))
    assert slow["client"] == 1


def test_trainings_of_a_profile_are_counted_once():
    trainings = list_trainings(ROOT, "smoke")
    assert trainings.empty or set(trainings["page"]) <= {"09_yardsticks"}  # the others draw their images
    paper = list_trainings(ROOT, "shipped")
    of = paper[paper["page"] == "01_gradcam"]
    assert not (paper["page"] == "02_unicam").any()  # the same networks
    first = of[of["fold"] == 1]
    roles = 1 + 1 + 3 + 5  # teacher, base, techniques, controls
    assert len(first) == roles
    assert first["generation"].max() == 2
    base, response = (first[first["technique"] == name].iloc[-1] for name in ("label", "response"))
    assert response["received"] == base["received"]
    assert response["sent"] > base["sent"] == 0
    assert response["flops"] > base["flops"]
    assert {"03_capacity_gap"} < set(paper["page"])
    others = paper[paper["model"] == OTHER_FAMILY]
    assert set(others["fold"]) == {1}
    twice = {"label": 2, "response": 3}  # two bases; also of a random teacher, and standardised
    assert others["technique"].value_counts().to_dict() == dict.fromkeys(TAUGHT, 1) | twice


def test_overhead_is_a_time():
    assert 0 < measure_overhead(20) < 60
