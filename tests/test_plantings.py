from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdx
from kdx.data.cues import Scene
from kdx.planted import plantings
from kdx.planted.plantings import HARDER, PLANTINGS, Grown, checks, cue_hits, images_of, plant, shuffled, tell

SMALL = Scene(size=24, cue_size=8)


def test_planted_is_a_registered_dataset():
    data = kdx.load_dataset("planted", "test", limit=54)
    assert (len(data), len(data.classes), data.masks.max()) == (54, 27, 4)
    assert data.card.normalize(data.images).mean().abs() < 0.1


def test_what_maps_must_show_follows_from_what_is_told():
    assert {name: (plan.distilled, plan.residual) for name, plan in PLANTINGS.items()} == {
        "distilled": ((1,), ()),
        "residual": ((), (2,)),
        "both": ((1,), (2,)),
        "nothing": ((), ()),
    }


def test_roles_rotate_with_the_seed():
    both = PLANTINGS["both"]
    assert [both.turned(i, 3).distilled for i in range(4)] == [(1,), (2,), (0,), (1,)]
    assert [both.turned(i, 3).residual for i in range(3)] == [(2,), (0,), (1,)]
    one = Grown("both", 4, SMALL, {}, None, None)
    assert (one.plan.base, one.plan.teacher) == ((1, 0), (1, 2))


def test_harder_plantings():
    partly, same = (HARDER[name].turned(0, 3) for name in ("partly known", "same answer"))
    assert (partly.distilled, partly.residual, same.distilled, same.residual) == ((1,), (2,), (1,), (2,))
    assert same.told(base=True) == {0: 0, 2: 2}
    assert same.told(base=False) == {0: 0, 2: 1}  # the dropped cue's place reveals the new one
    data = images_of(SMALL, 2700, 0)
    before = SMALL.values_of(data.labels)
    moved = SMALL.values_of(tell(data, SMALL, same.told(base=False), 5).labels)
    assert torch.equal(moved[:, 2], before[:, 1])
    some = SMALL.values_of(tell(data, SMALL, partly.told(base=True), 5, partly.partly).labels)
    first = before[:, 1] == 0
    assert some[first, 1].eq(0).all()
    assert abs((some[~first, 1] == before[~first, 1]).double().mean() - 0.5) < 0.04
    with pytest.raises(ValueError, match="values: a cue can be partly known if it has three or more, got 2"):
        plant(Scene(values=2, size=24, cue_size=8), 1, plantings=HARDER)


def test_labels_tell_known_cues_and_nothing_of_the_others():
    data = images_of(SMALL, 2700, 0)
    told = tell(data, SMALL, (0, 2), 5)
    before, after = SMALL.values_of(data.labels), SMALL.values_of(told.labels)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    share = (before[:, 1] == after[:, 1]).double().mean()
    assert abs(share - 1 / 3) < 0.04
    assert torch.equal(told.images, data.images)
    assert torch.equal(tell(data, SMALL, (0, 2), 5).labels, told.labels)
    assert torch.equal(tell(data, SMALL, (0, 1, 2), 5).labels, data.labels)


def test_shuffled_labels_are_the_same_ones_elsewhere():
    data = images_of(SMALL, 270, 0)
    other = shuffled(data, 1)
    assert torch.equal(other.labels.sort().values, data.labels.sort().values)
    assert (other.labels == data.labels).double().mean() < 0.15


def test_a_cue_is_right_by_the_sum_over_its_classes():
    scene = Scene(("gratings", "shapes"), values=2, size=16, cue_size=5)
    probabilities = torch.tensor([[0.30, 0.30, 0.35, 0.05]])  # the likeliest class is (1, 0), grating 0 is likelier
    hits = cue_hits(probabilities.log(), torch.tensor([0]), scene)
    assert hits.tolist() == [[True, True]]


class Knows(nn.Module):
    """Tells some cues of images whose first pixel is the class."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, x):
        labels = (x[:, 0, 0, 0] * 0.2 * 255 + 127.5).round().long()
        values = SMALL.values_of(labels)
        score = torch.zeros(len(x), 27)
        for cue in self.known:
            score += 9.0 * (SMALL.values_of(torch.arange(27))[:, cue] == values[:, cue, None])
        return score


def coded(*arguments):
    data = images_of(*arguments)
    data.images[:, 0, 0, 0] = data.labels.byte()
    return data


def grown(**known):
    data = coded(SMALL, 54, 0)
    nets = {role: SimpleNamespace(key=f"{role}{cues}", model=Knows(cues)) for role, cues in known.items()}
    return Grown("distilled", 0, SMALL, nets, data, data)


def test_checks_tell_plantings_that_took_from_those_that_did_not(monkeypatch):
    monkeypatch.setattr(plantings, "images_of", coded)
    table = checks([grown(student=(0, 1), base=(0,))])
    assert table["took"].all()
    assert table[table["told"]]["value"].eq(1).all()
    wrong = checks([grown(student=(0,), base=(0, 1))])  # the student lacks the cue, and the base has it
    missed = wrong[~wrong["took"]]
    assert missed[["network", "cue"]].to_numpy().tolist() == [["student", "shapes"], ["base", "shapes"]]


def test_plantings_share_their_networks_and_are_found_again(home):
    setting = dict(images=54, tested=27, reference=27, seed=4, recipe=kdx.Recipe(0, batch_size=27), device="cpu")
    found = plant(SMALL, 1, **setting)
    assert [one.planting for one in found] == list(PLANTINGS)
    keys = {run.key for one in found for run in one.networks.values()}
    assert len(keys) == 7 == len(list((home / "runs").iterdir()))
    by_name = {one.planting: one.networks for one in found}
    assert by_name["distilled"]["base"] is by_name["nothing"]["base"]
    assert by_name["distilled"]["student"] is by_name["both"]["student"]
    assert by_name["nothing"]["teacher"] is by_name["nothing"]["second base"]
    assert found[0].images.fingerprint != found[0].reference.fingerprint
    again = plant(SMALL, 1, **setting)
    assert {run.key for one in again for run in one.networks.values()} == keys
    assert len(list((home / "runs").iterdir())) == 7


def test_plantings_need_three_cues():
    with pytest.raises(ValueError, match="cues: plantings need three, got gratings, shapes"):
        plant(Scene(("gratings", "shapes")))


def test_a_second_base_is_left_out_on_request(home):
    setting = dict(images=54, tested=27, reference=27, recipe=kdx.Recipe(0, batch_size=27), device="cpu")
    (one,) = plant(SMALL, 1, plantings={"both": PLANTINGS["both"]}, second_base=False, **setting)
    assert list(one.networks) == ["student", "base", "teacher"]
    assert len(list((home / "runs").iterdir())) == 3
