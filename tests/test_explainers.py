import math

import pytest
import torch
from torch import nn

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


class Brightness(nn.Module):
    """Logits (sum of a window of the image, 0), after one stage."""

    def __init__(self, weight):
        super().__init__()
        self.layer1 = nn.Conv2d(3, 1, 1, bias=False)
        self.layer1.weight.data[:] = weight

    def forward(self, x):
        total = self.layer1(x)[:, :, :8, :8].sum((2, 3))
        return torch.cat([total, 0 * total], 1)


def test_occlusion_measures_the_fall_when_a_window_is_covered():
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, :8, :8] = 1.0
    named = explainers(x.repeat(6, 1, 1, 1), torch.zeros(6, dtype=torch.long), torch.eye(2))
    student, base = Brightness(1.0).eval(), Brightness(0.0).eval()
    maps = named["occlusion of the logit difference"](student, base, x, torch.zeros(1, dtype=torch.long))
    (distilled,), (residual,) = maps.distilled.values(), maps.residual.values()
    assert distilled[0, 0, 0] == pytest.approx(192)  # the one window that covers the corner covers all 64 pixels
    assert distilled[0, 16:, 16:].eq(0).all()
    assert residual.eq(0).all()
    divergence = named["occlusion of the KL divergence"](student, base, x, torch.zeros(1, dtype=torch.long))
    (found,) = divergence.distilled.values()
    assert found[0, 0, 0] == pytest.approx(math.log(2), rel=1e-3)  # of certainty from a coin
    gradients = named["integrated gradients of the logit difference"](
        student, base, x, torch.zeros(1, dtype=torch.long)
    )
    (integrated,) = gradients.distilled.values()
    assert integrated[0, 2:5, 2:5] == pytest.approx(torch.full((3, 3), 3.0))  # 3 channels of 1
    squared = named["answer difference, squared"](student, base, x, torch.zeros(1, dtype=torch.long))
    (energy,) = squared.distilled.values()
    assert energy[0, 2, 2] == pytest.approx(3 * 96)  # activation times the centred difference


@pytest.mark.parametrize("side", [5, 7, 30, 100])
def test_occlusion_covers_every_pixel_of_images_of_any_size(side):
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    named = explainers(torch.rand(6, 3, side, side), torch.zeros(6, dtype=torch.long), torch.eye(2))
    maps = named["occlusion of the logit difference"](Brightness(1.0), Brightness(0.0), x, torch.tensor([0, 1]))
    (distilled,) = maps.distilled.values()
    assert distilled.shape == (2, side, side)
    assert distilled.isfinite().all()


def test_occlusion_keeps_no_answers_of_other_weights_or_images():
    x = torch.ones(1, 3, 16, 16)
    y = torch.zeros(1, dtype=torch.long)
    explain = explainers(x.repeat(6, 1, 1, 1), y.repeat(6), torch.eye(2))["occlusion of the logit difference"]
    student, base = Brightness(1.0), Brightness(0.0)
    before = next(iter(explain(student, base, x, y).distilled.values()))
    assert before.max() > 0
    with torch.no_grad():
        student.layer1.weight.mul_(2)
    twice = next(iter(explain(student, base, x, y).distilled.values()))
    assert torch.allclose(twice, 2 * before)
    x.mul_(3)
    assert torch.allclose(next(iter(explain(student, base, x, y).distilled.values())), 6 * before)


def test_what_explainers_share_is_computed_once():
    x, y = torch.ones(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    named = explainers(x.repeat(6, 1, 1, 1), y.repeat(6), torch.eye(2))
    one, other, base = Brightness(1.0), Brightness(2.0), Brightness(0.0)
    calls = []
    for network in (one, other, base):
        network.register_forward_hook(lambda module, *_: calls.append(module))
    for name in ("occlusion of the logit difference", "integrated gradients of the logit difference"):
        calls.clear()
        named[name](one, base, x, y)
        once = calls.count(base)
        assert calls.count(one) >= once > 1  # stages are also looked for in the student
        named[name](other, base, x, y)
        assert calls.count(base) == once
        assert calls.count(other) >= once
        named[name](one, base, x, torch.ones_like(y))
        assert calls.count(base) == 2 * once
    named["answer difference, squared"](one, base, x, y)
    calls.clear()
    named["answer difference, squared, fused"](one, base, x, y)
    assert base not in calls


@pytest.mark.parametrize("name", ["unexplained", "answer difference, squared", "occlusion of the KL divergence"])
def test_what_is_kept_is_that_of_the_images_and_not_changed_by_callers(name):
    networks = [kdx.build("resnet10", 3, "small", 0.125, seed=i) for i in range(2)]
    x = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    fresh = lambda: explainers(x, y, torch.eye(3))[name]  # noqa: E731
    shown = x[:2].clone()
    explain, expected = fresh(), fresh()(*networks, shown, y[:2]).distilled["L3"]
    explain(*networks, shown, y[:2]).distilled["L3"].zero_()
    assert torch.equal(explain(*networks, shown, y[:2]).distilled["L3"], expected)
    shown.numpy()[:] *= 0.5  # which no version tells
    changed = explain(*networks, shown, y[:2]).distilled["L3"]
    assert torch.equal(changed, fresh()(*networks, shown, y[:2]).distilled["L3"])
    assert not torch.allclose(changed, expected)
