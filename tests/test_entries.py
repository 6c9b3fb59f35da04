"""Explainers of the leaderboard that are nowhere else."""

import pytest
import torch
from captum.attr import IntegratedGradients, Occlusion
from torch import nn

import kdx
from kdx.explain.explainers import fused
from kdx.planted import benchmark, entries
from tests.planted import SCENE, make_networks, make_plantings


@pytest.fixture(scope="module")
def pair():
    one = make_plantings(make_networks())[2]
    x = one.images.card.normalize(one.images.images)
    known = one.reference.card.normalize(one.reference.images)
    reference = benchmark.ReferenceSet(known, one.reference.labels, SCENE.embeddings)
    teacher = kdx.build("resnet10", 27, "small", 0.125, seed=7).eval()
    return one.networks["student"].model, one.networks["base"].model, x, one.images.labels, reference, teacher


class Window(nn.Module):
    """Logits (weight times the sum of a window, 0)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight)))

    def forward(self, x):
        total = self.weight * x[:, :, :8, :8].sum((1, 2, 3))
        return torch.stack([total, 0 * total], 1)


def test_rise_finds_the_window_that_one_network_uses():
    x, y = torch.ones(2, 3, 32, 32), torch.tensor([0, 0])
    maps = entries.rise(Window(1.0), Window(0.0), x, y).distilled["image"]
    inside, outside = maps[:, 1:7, 1:7].mean(), maps[:, 16:, 16:].mean()
    assert inside > 5 * outside
    swapped = entries.rise(Window(0.0), Window(1.0), x, y)
    torch.testing.assert_close(swapped.residual["image"], maps)
    assert entries.rise(Window(1.0), Window(1.0), x, y).distilled["image"].eq(0).all()


def test_patching_a_whole_stage_is_the_fall_of_the_unexplained_answer(pair, monkeypatch):
    monkeypatch.setattr(entries, "WINDOWS", 1)
    student, base, x, y, reference, _ = pair
    maps = entries.patching(student, base, x, y, reference)
    known = kdx.Reference(student, base, reference.images)
    features = kdx.explain.unexplained.unexplained_features(known, x)["distilled"]["L4"]
    answer = known.regressions["distilled"]["answer"]
    z, given = known.answers_of(x, x)
    after = kdx.explain.patching.patched(known, 0, "L4", x, -features)
    before, left = (answer.left_over(of, given).square().sum(1) / 2 for of in (z, after))
    torch.testing.assert_close(maps.distilled["L4"][:, 0, 0], (before - left).relu(), rtol=1e-3, atol=1e-5)


def test_captums_methods_are_those_of_captum(pair):
    student, base, x, y, *_ = pair
    known = entries.entries()
    side = x.shape[-1] // 4
    window = {"sliding_window_shapes": (3, side, side), "strides": (3, side // 2, side // 2)}
    for name, method, settings in (
        ("occlusion difference (captum)", Occlusion, window),
        ("integrated gradients difference (captum)", IntegratedGradients, {"n_steps": entries.STEPS}),
    ):
        maps = known[name](student, base, x[:3], y[:3])
        one, two = (method(net).attribute(x[:3], target=y[:3], **settings).sum(1) for net in (student, base))
        expected = (one - two).float().detach()
        torch.testing.assert_close(maps.distilled["image"] - maps.residual["image"], expected, rtol=1e-4, atol=1e-5)


def test_entries_with_a_teacher_are_those_of_the_package(pair):
    student, base, x, y, reference, teacher = pair
    found = entries.handed_over(student, base, x, y, reference, teacher)
    known = kdx.Reference(student, base, reference.images, teacher=teacher)
    torch.testing.assert_close(found.distilled["L3"], kdx.transferred(known, x).distilled["L3"])
    whole = entries.handed_over_fused(student, base, x, y, reference, teacher)
    torch.testing.assert_close(whole.distilled["L1"], fused(lambda *_: found)(student, base, x, y).distilled["L1"])


def test_every_entry_has_a_signature_that_the_benchmark_takes():
    known = entries.entries()
    given = {name: benchmark.wanted(explain) for name, explain in known.items()}
    assert [name for name, of in given.items() if "truth" in of] == ["oracle"]
    assert {"UniCAM, batch", "unexplained, fused", "edges", "constant", "patching"} <= set(known)


def test_an_entry_is_found_by_its_name_or_in_a_module(tmp_path, monkeypatch):
    assert entries.find("oracle") is entries.oracle
    (tmp_path / "own_maps.py").write_text("def explain(student, base, images, labels): pass\nvalue = 3\n")
    monkeypatch.chdir(tmp_path)
    assert entries.find("own_maps:explain").__name__ == "explain"
    for call, message in (
        ("own_maps", "expected module:function or one of unexplained; "),
        ("own_maps:value", "expected a function 'value' in own_maps, got int"),
        ("no_such_module:explain", "the module cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            entries.find(call)
