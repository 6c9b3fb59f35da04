import copy
import math

import pytest
import torch
import torchvision
from torch import nn

import kdx
from kdx import distance
from kdx.explain.unicam import _halves
from tests.networks import Small


def network(arch="resnet18", seed=0):
    torch.manual_seed(seed)
    return getattr(torchvision.models, arch)(num_classes=10).eval()


def batch(n, size=64, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(classes, 8, generator=generator)
    return torch.randn(n, 3, size, size, generator=generator), table[torch.arange(n) % classes]


def definition(features, given, labels):
    """Semi-partial correlation and its gradient by the features, in float64 by autograd."""
    features = features.double().requires_grad_()

    def centred(x):
        x = x.flatten(1).double()
        squared = (x[:, None] - x).square().sum(2)
        d = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
        n = len(d)
        p = d - d.sum(1)[:, None] / (n - 2) - d.sum(0) / (n - 2) + d.sum() / ((n - 1) * (n - 2))
        return p * (1 - torch.eye(n, dtype=p.dtype))

    p, q, g = centred(features), centred(given), centred(labels)
    u = p - (p * q).sum() / (q * q).sum() * q
    r = (u * g).sum() / ((u * u).sum() * (g * g).sum()).sqrt()
    (gradient,) = torch.autograd.grad(r, features)
    return float(r.detach()), gradient, features.detach()


def activations(model, images):
    return kdx.activations(model, images, kdx.stages(model, images))


def explain(student, base, images, labels, **settings):
    """A plain batch, whose images explain each other."""
    return kdx.unicam(kdx.Reference(student, base, images), labels, **settings)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


@pytest.mark.parametrize(
    ("arch", "n", "size"),
    [("resnet18", 5, 64), ("resnet18", 32, 32), ("resnet18", 64, 16), ("resnet50", 6, 32)],
)
def test_plain_batch_equals_autograd_of_the_definition(arch, n, size):
    student, base = network(arch, 0), network(arch, 1)
    images, labels = batch(n, size)
    cam = explain(student, base, images, labels)
    hires = explain(student, base, images, labels, method="hires")
    found = activations(student, images), activations(base, images)
    for stage in cam.distilled:
        for direction, (x, y) in {"distilled": found, "residual": found[::-1]}.items():
            r, gradient, a = definition(x[stage], y[stage], labels)
            assert cam.semipartial[direction][stage] == pytest.approx(r, abs=1e-9)
            expected = torch.einsum("nk,nkhw->nhw", gradient.mean((2, 3)), a).relu()
            assert correlation(getattr(cam, direction)[stage], expected) >= 0.9999
            assert getattr(cam, direction)[stage].max() == pytest.approx(float(expected.max()), rel=1e-4)
            whole = (gradient * a).sum(1)
            assert abs(float(whole.sum())) < 1e-9 * float(whole.abs().sum())
            assert correlation(getattr(hires, direction)[stage], whole.relu()) >= 0.9999


def test_correlations_are_those_of_the_distance_engine():
    student, base = Small(seed=0), Small(6, seed=1)
    images, labels = batch(20, 16)
    found = explain(student, base, images, labels)
    x, y = (activations(m, images)["L2"].flatten(1) for m in (student, base))
    for name, of in {
        "semipartial": distance.semipartial_distance_correlation,
        "partial": distance.partial_distance_correlation,
    }.items():
        assert getattr(found, name)["distilled"]["L2"] == pytest.approx(float(of(x, labels, y)), abs=1e-9)
        assert getattr(found, name)["residual"]["L2"] == pytest.approx(float(of(y, labels, x)), abs=1e-9)


def test_a_query_is_explained_together_with_the_reference_alone():
    student, base = Small(seed=0), Small(seed=1)
    images, labels = batch(25, 16)
    reference = kdx.Reference(student, base, images[:24])
    found = kdx.unicam(reference, labels[:24], images[24:], labels[24:])
    together = explain(student, base, images, labels)  # the reference and the query as one batch
    for stage, maps in found.distilled.items():
        torch.testing.assert_close(maps[0], together.distilled[stage][24], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.residual[stage][0], together.residual[stage][24], rtol=1e-4, atol=1e-9)


def test_an_image_may_have_several_labels():
    """In the reference, row 5 is row 4 again under another label; each is explained with the others as in a batch."""
    student, base = Small(seed=0), Small(seed=1)
    images, labels = batch(24, 16)
    images[5] = images[4]
    reference = kdx.Reference(student, base, images)
    plain = explain(student, base, images, labels)
    found = kdx.unicam(reference, labels, images[4:6], labels[4:6])
    other = kdx.unicam(reference, labels, images[4:5], labels[6:7])  # a label that it does not have there: one more row
    joined = explain(student, base, torch.cat([images, images[4:5]]), torch.cat([labels, labels[6:7]]))
    for stage, maps in found.distilled.items():
        torch.testing.assert_close(maps, plain.distilled[stage][4:6], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(other.distilled[stage][0], joined.distilled[stage][24], rtol=1e-4, atol=1e-9)


def test_no_images_are_refused():
    images, labels = batch(24, 16)
    with pytest.raises(ValueError, match="images: expected a tensor"):
        kdx.unicam(kdx.Reference(Small(), Small(seed=1), images), labels, images[:0], labels[:0])


def test_a_member_is_not_counted_twice():
    student, base = Small(seed=0), Small(seed=1)
    images, labels = batch(24, 16)
    reference = kdx.Reference(student, base, images)
    plain = explain(student, base, images, labels)
    found = kdx.unicam(reference, labels, images[3:6], labels[3:6])
    for stage, maps in found.distilled.items():
        torch.testing.assert_close(maps, plain.distilled[stage][3:6], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(
            found.stability["distilled"][stage],
            plain.stability["distilled"][stage][3:6],
            rtol=1e-3,
            atol=1e-3,
            equal_nan=True,
        )


@pytest.mark.parametrize("method", ["cam", "hires"])
def test_batch_mates_do_not_matter_with_a_reference(method):
    student, base = network("resnet18", 0), network("resnet18", 1)
    images, labels = batch(256 + 9, 32)
    reference, known = kdx.Reference(student, base, images[9:]), labels[9:]
    whole = kdx.unicam(reference, known, images[:9], labels[:9], method=method)
    alone = kdx.unicam(reference, known, images[4:5], labels[4:5], method=method)
    rows = [4, 100, 7]
    mixed = kdx.unicam(reference, known, images[rows], labels[rows], method=method, batch_size=2)
    for direction in ("distilled", "residual"):
        for stage, maps in getattr(whole, direction).items():
            for other in (alone, mixed):
                gap = (getattr(other, direction)[stage][0] - maps[4]).abs().max()
                assert 0 < float(maps.max()) < 1
                assert float(gap) <= 1e-4 * float(maps.max())  # far below 1e-6 of the map itself


def test_stability_is_the_agreement_of_maps_from_two_halves():
    student, base = Small(seed=0), Small(seed=1)
    images, labels = batch(29, 16)
    reference, known = kdx.Reference(student, base, images[:24]), labels[:24]
    stability = kdx.unicam(reference, known, images[24:], labels[24:]).stability
    maps = []
    for rows in _halves(distance.distances(known)):
        assert labels[rows].unique(dim=0, return_counts=True)[1].tolist() == [3, 3, 3, 3]
        part = kdx.Reference(student, base, images[rows])
        maps.append(kdx.unicam(part, labels[rows], images[24:], labels[24:]).residual["L3"])
    torch.testing.assert_close(stability["residual"]["L3"], kdx.agreement(*maps), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert stability["residual"]["L3"].isfinite().any()


def test_stability_is_nan_when_halves_are_too_small():
    images, labels = batch(8, 16)
    found = explain(Small(seed=0), Small(seed=1), images, labels)
    assert found.stability["distilled"]["L1"].isnan().all()


def test_networks_may_differ_in_architecture_and_input():
    student, base = network("resnet18"), network("mobilenet_v2")
    small, labels = batch(12, 64)
    large = nn.functional.interpolate(small, size=96)
    found = explain(student, base, (small, large), labels)
    assert found.distilled["L1"].shape == (12, 16, 16)
    assert found.residual["L1"].shape[1] == 24
    reference = kdx.Reference(student, base, (small, large))
    again = kdx.unicam(reference, labels, (small[:2], large[:2]), labels[:2])
    torch.testing.assert_close(again.residual["L4"], found.residual["L4"][:2], rtol=1e-3, atol=1e-8)


def test_equal_networks_hold_nothing_unique():
    student = Small()
    images, labels = batch(12, 16)
    found = explain(student, copy.deepcopy(student), images, labels)
    for direction in ("distilled", "residual"):
        assert all(maps.count_nonzero() == 0 for maps in getattr(found, direction).values())
        assert set(found.semipartial[direction].values()) == {0.0}


def test_features_without_variance_give_zero_maps():
    student, base = Small(), Small(seed=1)
    nn.init.zeros_(student.b.weight)
    nn.init.ones_(student.b.bias)
    images, labels = batch(12, 16)
    found = explain(student, base, images, labels)
    assert found.distilled["L2"].count_nonzero() == 0
    assert found.semipartial["distilled"]["L2"] == found.partial["distilled"]["L2"] == 0.0
    assert found.residual["L2"].isfinite().all()
    assert found.residual["L2"].any()


def test_coincident_images_give_finite_maps():
    images, labels = batch(12, 16)
    images[3] = images[7]
    found = explain(Small(), Small(seed=1), images, labels)
    assert all(maps.isfinite().all() for maps in found.distilled.values())


def test_networks_are_left_as_they_were():
    student, base = Small(), Small(seed=1)
    student.train()
    student.b.eval()
    images, labels = batch(8, 16)
    explain(student, base, images, labels)
    with pytest.raises(ValueError, match="NaN"):
        explain(student, base, images * math.nan, labels)
    assert student.training
    assert not student.b.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (student, base) for m in net.modules())
    assert all(p.grad is None for p in student.parameters())


def test_bad_input_is_named():
    student, base = Small(), Small(seed=1)
    images, labels = batch(8, 16)
    refused = {
        r"labels: expected embeddings \(8, m\)": (student, base, images, torch.arange(8)),
        "one row per image": (student, base, images, labels[:5]),
        "all equally far apart or coincide": (student, base, images, labels[:1].expand(8, -1)),
        "finite embeddings": (student, base, images, labels * math.nan),
        r"L1 of the student: .*NaN or infinity in 1 of 8 rows, the first of them row 2": (
            student,
            base,
            torch.where(torch.arange(8)[:, None, None, None] == 2, math.nan, images),
            labels,
        ),
    }
    for says, arguments in refused.items():
        with pytest.raises(ValueError, match=says):
            explain(*arguments)
    with pytest.raises(ValueError, match="choose from: cam, hires"):
        explain(student, base, images, labels, method="grad")
    reference = kdx.Reference(Small(), base, images)
    with pytest.raises(ValueError, match="expected images together with image_labels, or neither"):
        kdx.unicam(reference, labels, images)
    with pytest.raises(ValueError, match="features"):
        kdx.unicam(reference, labels, batch(2, 24)[0], labels[:2])
    with pytest.raises(ValueError, match="image_labels: expected 8 features as in labels, got 3"):
        kdx.unicam(reference, labels, images, labels[:, :3])
