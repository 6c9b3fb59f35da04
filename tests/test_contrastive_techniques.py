import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchdistill.losses.mid_level import AuxSSKDLoss, CRDLoss, SSKDLoss

from kdx.distil.contrastive_techniques import SelfSupervised, cosines, least_mistaken, originals
from kdx.distil.technique import Seen
from kdx.distil.techniques import TECHNIQUES, find_techniques
from kdx.distil.training import _Objective
from kdx.networks import models
from tests.networks import Small, fit_to_teacher


def batch(features, labels, rows=None, logits=None, views=None):
    rows = torch.arange(len(features)) if rows is None else rows
    logits = torch.zeros(len(features), 3, dtype=features.dtype) if logits is None else logits
    return Seen(logits, {"last": features}, rows, labels, views)


def spread(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- contrastive ------------------------------------------------------------------------------


def test_contrastive_by_hand():
    """As the paper has it, with h = exp(f·m / T) / Z and noise N / M, for two images of two classes."""
    labels = torch.tensor([0, 1])
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    both = [batch(features[:, :, None, None], labels) for features in (student, teacher)]
    part = TECHNIQUES["contrastive"](
        contrastive_weight=2.0, contrastive_negatives=1, contrastive_width=2, contrastive_temperature=0.5
    )
    adapter = part.adapter(*both, {})
    adapter.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    adapter.banks = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]])
    expected = 0.0
    for own, bank in (([[0.6, 0.8], [1.0, 0.0]], 1), ([[0.0, 1.0], [1.0, 0.0]], 0)):
        m = adapter.banks[bank].tolist()
        e = [
            [math.exp(sum(a * b for a, b in zip(own[i], m[j], strict=True)) / 0.5) for j in (i, 1 - i)] for i in (0, 1)
        ]
        z = 2 * sum(map(sum, e)) / 4
        for positive, negative in e:
            expected -= math.log(positive / z / (positive / z + 0.5)) + math.log(0.5 / (negative / z + 0.5))
    assert part.guidance(*both, adapter).item() == pytest.approx(2 * expected / 2, rel=1e-5)
    # remembered: the mean of (1, 0) and (0.6, 0.8), of unit length
    length = math.hypot(0.8, 0.4)
    assert adapter.banks[0, 0].tolist() == pytest.approx([0.8 / length, 0.4 / length], rel=1e-6)


def test_contrastive_is_torchdistills_over_several_batches(monkeypatch):
    labels, negatives = torch.arange(16) % 4, 6
    part = TECHNIQUES["contrastive"](contrastive_negatives=negatives, contrastive_width=8)
    pairs = [
        (spread(4, 5, 2, 2, seed=s), spread(4, 7, 3, 3, seed=s + 9), torch.arange(16).view(4, 4)[s]) for s in (0, 1, 0)
    ]
    adapter = part.adapter(*(batch(x, labels, pairs[0][2]) for x in pairs[0][:2]), {})
    peer = CRDLoss("norm", "empty", "norm", 8, 16, negatives, 16)
    peer.memory_v1.copy_(adapter.banks[0])
    peer.memory_v2.copy_(adapter.banks[1])
    for student, teacher, rows in pairs:
        others = adapter.of_other_classes(labels[rows], negatives)
        monkeypatch.setattr(adapter, "of_other_classes", lambda *_, others=others: others)
        outputs = [
            {"norm": {"output": F.normalize(layer(x.mean((2, 3))))}}
            for layer, x in zip(adapter.layers, (student, teacher), strict=True)
        ]
        drawn = torch.cat([rows[:, None], others], 1)
        outputs[0]["empty"] = {"input": {"pos_idx": rows, "contrast_idx": drawn}}
        expected = 0.8 * peer(*outputs).item()  # with 1e-7 in its denominators
        found = part.guidance(batch(student, labels, rows), batch(teacher, labels, rows), adapter).item()
        assert found == pytest.approx(expected, rel=1e-5)
        monkeypatch.undo()
    torch.testing.assert_close(adapter.banks, torch.stack([peer.memory_v1, peer.memory_v2]))


def test_negatives_are_any_images_of_other_classes():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    adapter = TECHNIQUES["contrastive"]().adapter(*[batch(torch.rand(2, 3, 1, 1), labels)] * 2, {})
    drawn = adapter.of_other_classes(torch.tensor([0, 1, 2]), 2000)
    for label, rows in enumerate(drawn):
        found, counts = rows.unique(return_counts=True)
        assert found.tolist() == [row for row, other in enumerate(labels.tolist()) if other != label]
        assert counts.min() > 0.8 * 2000 / len(found)
    with pytest.raises(ValueError, match="contrastive: expected training images of two classes or more"):
        TECHNIQUES["contrastive"]().adapter(*[batch(torch.rand(2, 3, 1, 1), torch.ones(5, dtype=int))] * 2, {})


def test_an_image_is_told_from_others_by_what_the_teacher_remembers():
    """The loss falls when the student agrees with the teacher, and rises when it agrees about another image."""
    labels, features = torch.arange(4), 3 * torch.eye(4)[:, :, None, None]
    part = TECHNIQUES["contrastive"](contrastive_negatives=3, contrastive_width=4)
    adapter = part.adapter(*[batch(features, labels)] * 2, {})
    adapter.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    adapter.banks = torch.eye(4).repeat(2, 1, 1)
    adapter.log_mean.fill_(5.0)
    same, other = (
        part.guidance(batch(student, labels), batch(features, labels), copy.deepcopy(adapter))
        for student in (features, features.roll(1, 0))
    )
    assert same < other - 5


# --- self-supervised --------------------------------------------------------------------------


def rotated(n, k, classes, seed, dtype=torch.float32):
    """What a network saw of n images and their three rotations."""
    labels, rows = torch.arange(n) % classes, torch.arange(n)
    views = batch(spread(3 * n, k, 2, 2, seed=seed, dtype=dtype), labels, rows.repeat(3),
                  3 * spread(3 * n, classes, seed=seed + 1, dtype=dtype))  # fmt: skip
    features = views.features["last"].view(3, n, k, 2, 2).mean(0) + 0.3 * spread(n, k, 2, 2, seed=seed + 2, dtype=dtype)
    return batch(features, labels, rows, 3 * spread(n, classes, seed=seed + 3, dtype=dtype), views)


def interleaved(images, views):
    """Each image followed by its rotations, as torchdistill has them."""
    return torch.stack([images, *views.view(3, *images.shape)], 1).flatten(0, 1)


def outputs(seen, head):
    vectors = [head(one.features["last"].mean((2, 3))) for one in (seen, seen.views)]
    return {
        "fc": {"output": interleaved(seen.logits, seen.views.logits)},
        "ss_module": {"output": interleaved(*vectors)},
    }


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_self_supervised_is_torchdistills(kept):
    """Between, ties in rank are broken by the order of images, which is another there."""
    student, teacher = rotated(5, 4, 4, 0), rotated(5, 6, 4, 10)
    part = TECHNIQUES["self-supervised"](self_supervised_kept=kept)
    adapter = part.adapter(student, teacher, {})
    peer = SSKDLoss(
        "fc", "fc", "ss_module", "ss_module", kl_temp=4.0, ss_temp=0.5, tf_temp=4.0, ss_ratio=kept, tf_ratio=1.0,
        loss_weights=[1.0, 0.9, 10.0, 2.7],
    )  # fmt: skip
    both = (outputs(student, adapter["student"]), outputs(teacher, adapter["teacher"]))
    expected = peer(*both, student.labels) - F.cross_entropy(student.logits, student.labels)
    torch.testing.assert_close(part.guidance(student, teacher, adapter), expected)
    fitted = AuxSSKDLoss()({}, outputs(teacher, adapter["teacher"]))
    torch.testing.assert_close(part.fitting(teacher, adapter), fitted)


def test_cosines_by_hand():
    views = batch(torch.tensor([3.0, 0, 0, 2, 1, 1, 4, 3, -1, 0, 0, -1]).view(6, 2, 1, 1), torch.arange(2))
    found = cosines(batch(torch.eye(2)[:, :, None, None] * 5, torch.arange(2), views=views), nn.Identity())
    half = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[1, 0], [0, 1], [half, half], [0.8, 0.6], [-1, 0], [0, -1]]))
    assert originals(batch(torch.rand(2, 1, 1, 1), torch.arange(2), views=views)).tolist() == [0, 1, 0, 1, 0, 1]


def test_least_mistaken_by_hand():
    scores = torch.tensor([[9.0, 1, 2], [1, 2, 3], [5, 4, 3], [1, 9, 5], [3, 3, 1]])
    truth = torch.tensor([0, 0, 2, 2, 0])  # 0, 2, 2, 1 and 0 come before it
    assert least_mistaken(scores, truth, 0.0).tolist() == [0, 4]
    assert least_mistaken(scores, truth, 0.4).tolist() == [0, 4, 3]
    assert least_mistaken(scores, truth, 0.75).tolist() == [0, 4, 3, 1]
    assert least_mistaken(scores, truth, 1.0).tolist() == [0, 4, 3, 1, 2]


def test_views_are_the_rotations_and_others_do_not_see_them():
    part = TECHNIQUES["self-supervised"]()
    x = torch.arange(8.0).view(2, 1, 2, 2)
    assert part.views(x)[[0, 2, 4]].flatten(1).tolist() == [[1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    with pytest.raises(ValueError, match=r"self-supervised: expected square images, got \(2, 3\)"):
        part.views(torch.zeros(1, 3, 2, 3))
    student, teacher = (models.build("resnet10", 10, "small", 0.125, seed).eval() for seed in (0, 1))
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)

    def loss(name):
        objective = _Objective(find_techniques(name, {}), student, teacher, images[:2], labels, seed=0)
        with objective.watching():
            logits, value = objective(images, labels)
        assert logits.shape == (8, 10)
        return value

    plain = F.cross_entropy(student(images), labels)
    attention, alone, joined = map(loss, ("attention", "self-supervised", "attention+self-supervised"))
    torch.testing.assert_close(joined, attention + alone - plain, rtol=1e-3, atol=0)  # also in bfloat16


def test_the_teachers_head_is_fitted_to_tell_images_apart():
    losses = []

    class Noted(SelfSupervised):
        def fitting(self, teacher, adapter):
            losses.append(super().fitting(teacher, adapter))
            return losses[-1]

    images, rows = 10 * spread(4, 3, 1, 1, seed=0).expand(-1, -1, 8, 8), torch.arange(4)  # of one colour each
    part = Noted(self_supervised_epochs=3)
    objective = _Objective([part], Small(), Small(8, seed=1).eval(), images, rows, seed=0)
    (adapter,) = objective.adapters
    before = copy.deepcopy(adapter.state_dict())
    fit_to_teacher(objective, lambda: iter([(images, rows)] * 10))
    assert losses[-1] < 0.9 * losses[0]
    moved = {name.partition(".")[0] for name, now in adapter.state_dict().items() if not torch.equal(now, before[name])}
    assert moved == {"teacher"}


# --- both of them -----------------------------------------------------------------------------

SETTINGS = {"contrastive": {"contrastive_negatives": 5, "contrastive_width": 4}, "self-supervised": {}}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_reach_the_student_and_are_right(name):
    part = TECHNIQUES[name](**SETTINGS[name])
    student, teacher = rotated(4, 3, 3, 20, torch.float64), rotated(4, 5, 3, 30, torch.float64)
    torch.manual_seed(0)
    adapter = part.adapter(student, teacher, {}).double()
    if name == "contrastive":
        adapter.log_mean.fill_(2.0)  # after the first batch, which sets it

    def loss(features, of_views, dtype=torch.float64):
        torch.manual_seed(5)
        views = batch(of_views, student.all_labels, student.views.rows, student.views.logits.to(dtype))
        ours = batch(features, student.all_labels, logits=student.logits.to(dtype), views=views)
        theirs = {"last": teacher.features["last"].to(dtype)}
        turned = {"last": teacher.views.features["last"].to(dtype)}
        guide = Seen(teacher.logits.to(dtype), theirs, teacher.rows, teacher.all_labels,
                     Seen(teacher.views.logits.to(dtype), turned, teacher.views.rows, teacher.all_labels))  # fmt: skip
        return part.guidance(ours, guide, copy.deepcopy(adapter).to(dtype))

    features = [one.features["last"].requires_grad_() for one in (student, student.views)]
    assert torch.autograd.gradcheck(loss, features)
    gradients = torch.autograd.grad(loss(*features), features, allow_unused=True)
    assert gradients[0].abs().max() > 1e-4
    assert (gradients[1] is not None) == (name == "self-supervised")
    single = loss(*(value.float() for value in features), dtype=torch.float32)
    assert single.item() == pytest.approx(loss(*features).item(), rel=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (2.0, 2.0), (65504.0, 65504.0)])
def test_constant_features_of_one_class_have_a_finite_loss(name, n, ours, theirs):
    part, labels = TECHNIQUES[name](**SETTINGS[name]), torch.tensor([1, 1, 1, 0])  # of the batch: 1 alone

    def constant(value, k):
        views = batch(torch.full((3 * n, k, 2, 2), value), labels, torch.arange(n).repeat(3))
        return batch(torch.full((n, k, 2, 2), value).requires_grad_(), labels, torch.arange(n), views=views)

    student, teacher = constant(ours, 4), constant(theirs, 5)
    adapter = part.adapter(student, teacher, {})
    loss = part.guidance(student, teacher, adapter)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, student.features["last"])
    assert gradient.isfinite().all()
    if part.fitting_epochs:
        assert part.fitting(teacher, adapter).isfinite()


def test_settings_are_checked():
    for name, settings in (
        ("contrastive", {"contrastive_negatives": 0}),
        ("contrastive", {"contrastive_momentum": 1.0}),
        ("contrastive", {"contrastive_temperature": 0.0}),
        ("self-supervised", {"self_supervised_kept": 1.5}),
        ("self-supervised", {"self_supervised_epochs": -1}),
        ("self-supervised", {"self_supervised_epochs": 0.5}),
        ("contrastive", {"contrastive_negatives": 1.5}),
        ("self-supervised", {"self_supervised_rotated": math.inf}),
        ("self-supervised", {"self_supervised_sharpness": -1.0}),
    ):
        with pytest.raises(ValueError, match=f"{name.replace('-', '.')}.*: expected"):
            TECHNIQUES[name](**settings)
