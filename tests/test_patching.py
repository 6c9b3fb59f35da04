import numpy as np
import pytest
import torch
from torch import nn

import kdx
from kdx.explain.patching import _pearson, jackknife, patched
from kdx.explain.reference import centre_logits
from kdx.intervals import mean_interval
from tests.networks import Small
from tests.test_unexplained import Colours, blots, reference_of


def test_linear_networks_keep_what_the_maps_promise_up_to_the_square():
    """Behind its only stage the network is linear: patching all of it, r becomes r - W mean(E)."""
    student, base = Colours((0, 1)), Colours((0, 2))
    reference, (x, _) = reference_of(student, base), blots(30, 2)
    table = kdx.patch_agreement(reference, x, patches=1)
    found = table.set_index(["direction", "stage", "quantity"])["value"].unstack()
    z, answer = (
        [centre_logits(net(x).detach()) for net in (student, base)],
        reference.regressions["distilled"]["answer"],
    )
    r = answer.left_over(*z)
    e = reference.regressions["distilled"]["L1"].left_over(student.features(x).detach(), base.features(x).detach())
    removed = centre_logits(e.mean((2, 3)) @ student.head.weight.detach().T)
    energy = r.square().sum() / 2
    assert found["promised"]["distilled", "L1"] == pytest.approx(float((r * removed).sum() / energy), rel=1e-3)
    measured = 1 - float((r - removed).square().sum() / r.square().sum())
    assert found["measured"]["distilled", "L1"] == pytest.approx(measured, rel=1e-3)


def test_agreement_is_the_correlation_of_what_small_patches_promise_and_do():
    pairs = np.random.default_rng(0).normal(size=(40, 2)).cumsum(1)
    sums = np.column_stack([pairs, pairs**2, pairs.prod(1), np.ones(40)])
    value, low, high = jackknife(sums, _pearson)
    assert value == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    assert high - value == pytest.approx(value - low)
    mean = jackknife(np.column_stack([pairs[:, 0], np.ones(40)]), lambda s: s[..., 0] / s[..., 1])
    assert mean == pytest.approx(mean_interval(pairs[:, 0])[:3])  # of a mean, the jackknife is the t interval
    student, base = (kdx.build("resnet10", 4, "small", 0.125, seed=i) for i in range(2))
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    table = kdx.patch_agreement(kdx.Reference(student, base, x[:12]), x[12:], patches=3)
    found = table[table["quantity"] == "agreement"].pivot(index="direction", columns="stage", values="value")
    assert found[["L2", "L3", "L4"]].min(axis=None) > 0.8


def test_intervals_are_over_images_and_the_networks_are_left_as_they_were():
    student, base = Small(seed=0).train(), Small(6, seed=1)
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = kdx.Reference(student, base, x[:10])
    table = kdx.patch_agreement(reference, x[10:], patches=3)
    assert (table["n"] == 6).all()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    again = kdx.patch_agreement(reference, x[10:], patches=3, batch_size=6)
    assert table.equals(again)
    assert student.training
    assert not any(m._forward_hooks for net in (student, base) for m in net.modules())
    reference.check_weights()


def test_the_patched_features_are_those_that_the_other_network_can_express():
    """A stage's features are replaced by others, and what follows sees these."""
    student, base = Small(seed=0).eval(), Small(seed=1)
    x = torch.randn(6, 3, 16, 16)
    reference = kdx.Reference(student, base, x)
    features = reference.features["L2"][0]
    found = patched(reference, 0, "L2", x, torch.ones_like(features) - features)
    ones = student.c(torch.ones_like(features).relu()).relu().mean((2, 3))
    torch.testing.assert_close(found, centre_logits(ones).detach(), rtol=1e-4, atol=1e-6)


class Tokens(nn.Module):
    """A class token before a square of tokens, which the answer is the mean of."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.patches = nn.Conv2d(3, 5, 4, stride=4)
        self.block = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1))
        return self.head(tokens[:, 1:].mean(1))


def test_tokens_arepatched_where_they_lie():
    student, base = Tokens(0), Tokens(1)
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    layers = {"L1": "block"}
    reference = kdx.Reference(student, base, x, layers_student=layers, layers_base=layers)
    change = torch.zeros(12, 5, 2, 2)
    change[:, :, 1, 0] = 4.0
    expected = centre_logits(student(x) + student.head.weight.sum(1)).detach()
    torch.testing.assert_close(patched(reference, 0, "L1", x, change), expected)


def test_bad_input_is_named():
    student, base = Colours((0, 1)), Colours((0, 2))
    reference, (x, _) = reference_of(student, base), blots(4, 0)
    for images, patches in ((x[:2], 1), (x, 0)):
        with pytest.raises(ValueError, match="images, patches: expected at least 3 images and 1 patch, got"):
            kdx.patch_agreement(reference, images, patches=patches)
