import pytest
import torch

import kdx
from kdx.explain.explainers import explainers
from tests.planted import SCENE, make_networks, make_plantings


@pytest.fixture(scope="module")
def grown():
    return make_plantings(make_networks())


def test_every_explainer_gives_maps_of_both_directions(grown):
    one = grown[2]
    x = one.images.card.normalize(one.images.images)
    known = one.reference.card.normalize(one.reference.images), one.reference.labels
    pair = one.networks["student"].model, one.networks["base"].model
    found = {}
    for name, explain in explainers(known[0], known[1].to(torch.uint8), SCENE.embeddings).items():
        maps = found[name] = explain(*pair, x, one.images.labels.to(torch.uint8))
        for direction in ("distilled", "residual"):
            drawn = getattr(maps, direction)
            assert list(drawn) == ["L1", "L2", "L3", "L4"], name
            assert all(len(m) == 12 and m.ndim == 3 and m.isfinite().all() and (m >= 0).all() for m in drawn.values())
    looks = [kdx.grad_cam(net, x, one.images.labels)["L3"] for net in pair]
    torch.testing.assert_close(found["Grad-CAM"].residual["L3"], looks[1])
    torch.testing.assert_close(found["Grad-CAM difference"].distilled["L3"], (looks[0] - looks[1]).relu())
    expected = kdx.unexplained(kdx.Reference(*pair, known[0]), x)
    torch.testing.assert_close(found["unexplained"].distilled["L2"], expected.distilled["L2"])
    torch.testing.assert_close(found["unexplained, squared"].residual["L4"], found["unexplained"].residual["L4"] ** 2)
