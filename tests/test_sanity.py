import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import kdx
from kdx.explain.explainers import explainers
from kdx.planted.sanity import cascade, indifferent, rank_correlation, sanity, similarity
from tests.planted import SCENE, constant, make_networks, make_plantings


@pytest.fixture(scope="module")
def networks():
    return make_networks()


@pytest.fixture(scope="module")
def grown(networks):
    return make_plantings(networks)


def test_the_cascade_goes_from_the_logits_to_the_whole_network(networks):
    model = networks["student"].model
    before = copy.deepcopy(model.state_dict())
    changed = {}
    for name, network in cascade(model, kdx.stages(model, torch.zeros(1, 3, 24, 24))):
        weights = {key for key in before if key.endswith("weight") and before[key].ndim > 1}
        changed[name] = {key for key in weights if not torch.equal(before[key], network.state_dict()[key])}
    assert list(changed) == ["logits", "L4", "L3", "L2", "L1"]
    assert all(key.startswith("fc") for key in changed["logits"])
    assert any(key.startswith("layer4") for key in changed["L4"])
    assert not any(key.startswith("layer3") for key in changed["L4"])
    assert changed["logits"] < changed["L4"] < changed["L3"] < changed["L2"] < changed["L1"] == weights
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_module_that_cannot_be_made_random_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="1: Scale has no reset_parameters"):
        list(cascade(nn.Sequential(nn.Conv2d(3, 2, 1), Scale()), {"L1": "0"}))


def test_similarities_of_maps():
    a, b = torch.rand(2, 5, 6, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(expected)
    assert similarity(a, 3 * a, (24, 24)).tolist() == pytest.approx([1] * 5)
    assert similarity(a, b, (24, 24)).max() < 0.9
    a[2] = 0.5
    assert rank_correlation(a, b).isnan().tolist() == similarity(a, b, (24, 24)).isnan().tolist() == [0, 0, 1, 0, 0]


def test_explainers_that_ask_no_network_are_named(grown):
    one = grown[0]
    x = one.images.card.normalize(one.images.images)
    pair = one.networks["student"].model, one.networks["base"].model
    named = explainers(x, one.images.labels, SCENE.embeddings)
    chosen = {name: named[name] for name in ("edges", "Grad-CAM", "random")} | {"constant": constant}
    table = sanity(chosen, *pair, x, one.images.labels, ignorant=one.networks["second base"].model)
    assert list(table["randomised"].unique()) == ["logits", "L4", "L3", "L2", "L1", "random labels"]
    same = table[table["explainer"] == "edges"]
    assert same["value"].tolist() == pytest.approx([1] * len(same))
    assert table[(table["explainer"] == "random") & (table["measure"] == "rank correlation")]["value"].abs().max() < 0.1
    assert indifferent(table) == ["edges", "constant"]
