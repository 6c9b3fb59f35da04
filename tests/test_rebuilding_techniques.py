import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchdistill.losses.mid_level import FTLoss
from torchdistill.models.wrapper import Paraphraser4FactorTransfer, Translator4FactorTransfer

from kdx.distil.rebuilding_techniques import _Rebuilder
from kdx.distil.techniques import TECHNIQUES
from kdx.distil.training import _Objective
from kdx.networks import models
from tests.networks import Small, fit_to_teacher
from tests.techniques import seen

# --- factor -----------------------------------------------------------------------------------


def identities():
    return nn.ModuleDict({"paraphraser": nn.Identity(), "decoder": nn.Identity(), "translator": nn.Identity()})


def test_factor_by_hand():
    # unit vectors (3, 4) / 5 and (1, 0): differences 0.4 and 0.8
    student, teacher = torch.tensor([[[[6.0, 8.0]]]]), torch.tensor([[[[9.0, 0.0]]]])
    part = TECHNIQUES["factor"](factor_weight=10.0)
    found = part.guidance(seen(last=student), seen(last=teacher), identities())
    assert found.item() == pytest.approx(10 * (0.4 + 0.8) / 2, rel=1e-6)
    assert part.fitting(seen(last=teacher), identities()) == 0


def test_factor_is_torchdistills():
    student, teacher = torch.randn(4, 5, 3, 3), torch.randn(4, 8, 3, 3)
    part = TECHNIQUES["factor"]()
    adapter = part.adapter(seen(last=student), seen(last=teacher), {})
    expected = FTLoss()(
        {"translator": {"output": adapter["translator"](student)}},
        {"paraphraser": {"output": adapter["paraphraser"](teacher)}},
    )
    found = part.guidance(seen(last=student), seen(last=teacher), adapter)
    torch.testing.assert_close(found, 1000 * expected)
    for ours, theirs in (  # the layers, too
        (
            nn.Sequential(adapter["paraphraser"], adapter["decoder"]),
            Paraphraser4FactorTransfer(0.5, 8, uses_bn=False),
        ),
        (adapter["translator"], Translator4FactorTransfer(5, 4, uses_bn=False)),
    ):
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
        x = teacher if ours is not adapter["translator"] else student
        assert torch.equal(ours(x), theirs(x))


def test_factor_of_larger_features_is_that_of_their_averages():
    student, teacher = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 4, 4)
    part = TECHNIQUES["factor"]()
    found = part.guidance(seen(last=student), seen(last=teacher), identities())
    expected = part.guidance(seen(last=student), seen(last=F.avg_pool2d(teacher, 2)), identities())
    torch.testing.assert_close(found, expected)


def test_paraphraser_is_fitted_first_and_then_stays():
    student, teacher = models.build("resnet10", 4, "small", 0.125, 0), models.build("resnet10", 4, "small", 0.25, 1)
    images, rows = torch.randn(16, 3, 16, 16), torch.arange(16)
    part = TECHNIQUES["factor"](factor_epochs=3)
    objective = _Objective([part], student, teacher.eval(), images[:2], rows % 4, seed=0)
    (adapter,) = objective.adapters
    before, steps, losses = copy.deepcopy(adapter.state_dict()), [], []

    def batches():  # called while features are collected
        with torch.no_grad():
            seen_now = objective._seen(0, 1, teacher(images), images, [16, 0], rows)
            losses.append(part.fitting(seen_now, adapter).item())
        return iter([(images, rows)] * 30)

    fit_to_teacher(objective, batches, stepped=lambda: steps.append(1))
    assert len(steps) == 90
    assert losses[2] < losses[1] < losses[0]
    fitted = copy.deepcopy(adapter.state_dict())
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], fitted[name])}
    assert moved == {"paraphraser", "decoder"}
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1, weight_decay=0.1)
    optimizer.zero_grad()
    with objective.watching():
        objective(images, rows)[1].backward()
    optimizer.step()
    moved = {name.partition(".")[0] for name in before if not torch.equal(adapter.state_dict()[name], fitted[name])}
    assert moved == {"translator"}


def test_a_fitting_that_diverges_is_an_error():
    student, teacher = models.build("resnet10", 4, "small", 0.125, 0), models.build("resnet10", 4, "small", 0.125, 1)
    images, rows = 1e30 * torch.randn(4, 3, 16, 16), torch.arange(4)
    objective = _Objective([TECHNIQUES["factor"]()], student, teacher.eval(), images[:2] * 0, rows, seed=0)
    with pytest.raises(FloatingPointError, match=r"factor: the loss is (nan|inf) when it is fitted to the teacher"):
        fit_to_teacher(objective, lambda: iter([(images, rows)] * 3))


# --- prior ------------------------------------------------------------------------------------


def hsic(k, m):
    """The unbiased estimator as Song et al. (2012) write it, of matrices with zero diagonals."""
    n, one = len(k), torch.ones(len(k), dtype=k.dtype)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (torch.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))


def grams(x):
    gram = x.double().flatten(1) @ x.double().flatten(1).T
    return gram - gram.diag().diag()


def test_likeness_is_minibatch_cka():
    student, teacher = torch.randn(3, 6, 4, 2, 2), torch.randn(3, 6, 5, 2, 2)
    teacher[:, :, :4] += student
    rebuilder = _Rebuilder(student[0], teacher[0], 4, 1)
    found = [rebuilder.likeness(s, t) for s, t in zip(student, teacher, strict=True)]
    weights = torch.tensor([0.81, 0.9, 1.0])
    sums = [
        sum(w * hsic(grams(a), grams(b)) for w, a, b in zip(weights, first, second, strict=True))
        for first, second in ((student, teacher), (student, student), (teacher, teacher))
    ]
    assert found[-1] == pytest.approx((sums[0] / (sums[1] * sums[2]).sqrt()).item(), rel=1e-5)
    assert 0 < found[-1] < 1


def test_likeness_of_the_same_of_constant_and_of_few_images():
    x, few = torch.randn(8, 4, 2, 2), torch.randn(3, 4, 2, 2)
    assert _Rebuilder(x, x, 4, 1).likeness(x, 3 * x) == pytest.approx(1)
    assert _Rebuilder(x, x, 4, 1).likeness(x, torch.ones_like(x)) == 0
    rebuilder = _Rebuilder(x, x, 4, 1)
    assert rebuilder.likeness(few, few) == 0
    rebuilder.likeness(x, x)
    assert rebuilder.likeness(few, -few) == pytest.approx(1)  # of the batch before


@pytest.mark.parametrize(("likeness", "depends"), [(0.0, "teacher"), (1.0, "student")])
def test_prior_is_the_teachers_share_of_the_tokens(monkeypatch, likeness, depends):
    monkeypatch.setattr(_Rebuilder, "likeness", lambda self, student, teacher: likeness)
    pair = {"student": torch.randn(4, 3, 2, 2), "teacher": torch.randn(4, 5, 4, 4)}
    rebuilder = _Rebuilder(pair["student"], pair["teacher"], 8, 2)
    one = rebuilder(**pair)
    assert one.shape == pair["teacher"].shape
    for role, value in pair.items():
        changed = torch.equal(rebuilder(**pair | {role: value + 1}), one)
        assert changed == (role != depends)


def test_prior_draws_other_places_for_each_image(monkeypatch):
    monkeypatch.setattr(_Rebuilder, "likeness", lambda self, student, teacher: 0.5)
    student, teacher = torch.randn(1, 3, 4, 4).expand(2, -1, -1, -1), torch.randn(1, 5, 4, 4).expand(2, -1, -1, -1)
    one, other = _Rebuilder(student, teacher, 8, 2)(student, teacher)
    assert (one - other).abs().max() > 0.01


def test_prior_by_hand():
    student, teacher = torch.randn(2, 3, 2, 2), torch.full((2, 1, 2, 2), 5.0)
    stages = {"last": student, "last but one": student}
    part = TECHNIQUES["prior"](prior_weight=3.0)  # of the gradient alone
    both = seen(**stages), seen(**dict.fromkeys(stages, teacher))
    adapter = part.adapter(*both, {})
    for rebuilder, answer in zip(adapter.values(), (3.0, 6.0), strict=True):
        rebuilder.last.weight.data.zero_()
        rebuilder.last.bias.data.fill_(answer)
    assert part.guidance(*both, adapter).item() == pytest.approx((5 - 3) ** 2 + (5 - 6) ** 2)


def test_the_weight_of_prior_acts_on_the_student_and_not_on_what_rebuilds(monkeypatch):
    monkeypatch.setattr(_Rebuilder, "likeness", lambda self, student, teacher: 0.5)
    student, teacher = drawn("prior", 2, 2, 0), drawn("prior", 4, 2, 1)
    features = [value.requires_grad_() for value in student.values()]
    adapter = TECHNIQUES["prior"]().adapter(seen(**student), seen(**teacher), {}).double()

    def gradients(weight):
        torch.manual_seed(0)
        loss = TECHNIQUES["prior"](prior_weight=weight).guidance(seen(**student), seen(**teacher), adapter)
        found = torch.autograd.grad(loss, [*features, *adapter.parameters()])
        return found[: len(features)], found[len(features) :]

    (ours, rebuilding), (heavier, same) = gradients(1.0), gradients(30.0)
    for one, other in zip(ours, heavier, strict=True):
        assert one.any()
        torch.testing.assert_close(other, 30 * one)
    assert all(map(torch.equal, rebuilding, same))
    assert all(not gradient.any() for gradient in gradients(0.0)[0])


def test_prior_takes_the_last_two_stages_whatever_their_number():
    part, x = TECHNIQUES["prior"](), torch.rand(2, 3, 32, 32)
    for network, expected in ((Small(), ["c", "b"]), (models.build("resnet10", 10, "small"), ["layer4.0", "layer3.0"])):
        assert [tap.module for tap in part.taps(network, x).values()] == expected


# --- both of them -----------------------------------------------------------------------------

STAGES = {"factor": ("last",), "prior": ("last", "last but one")}


def drawn(name, width, size, seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    return {stage: torch.randn(n, width, size, size, generator=generator, dtype=torch.float64)
            for stage in STAGES[name]}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_gradients_reach_the_student_and_are_right(name, monkeypatch):
    monkeypatch.setattr(_Rebuilder, "likeness", lambda self, student, teacher: 0.5)
    part = TECHNIQUES[name](**({"prior_weight": 1, "prior_width": 4, "prior_blocks": 1} if name == "prior" else {}))
    student, teacher = drawn(name, 2, 2, 0), drawn(name, 4, 2, 1)
    adapter = part.adapter(seen(**student), seen(**teacher), {}).double()
    generator = torch.Generator().manual_seed(3)
    for weight in adapter.parameters():  # no symmetry, and something to compare
        weight.data.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 2)

    def loss(*features, dtype=torch.float64):
        torch.manual_seed(5)
        fresh = copy.deepcopy(adapter).to(dtype)
        target = {stage: value.to(dtype) for stage, value in teacher.items()}
        return part.guidance(seen(**dict(zip(student, features, strict=True))), seen(**target), fresh)

    features = [value.requires_grad_() for value in student.values()]
    assert torch.autograd.gradcheck(loss, features)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss(*features), features))
    single = loss(*(value.float() for value in features), dtype=torch.float32)
    assert single.item() == pytest.approx(loss(*features).item(), rel=1e-4)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (2.0, 2.0), (65504.0, 65504.0)])
def test_constant_features_have_a_finite_loss(name, n, ours, theirs):
    part = TECHNIQUES[name]()
    student = {stage: torch.full((n, 4, 2, 2), ours, requires_grad=True) for stage in STAGES[name]}
    teacher = {stage: torch.full((n, 6, 4, 4), theirs) for stage in STAGES[name]}
    both = [seen(torch.zeros(n, 3), **features) for features in (student, teacher)]
    adapter = part.adapter(*both, {})
    loss = part.guidance(*both, adapter)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(student.values())))
    if part.fitting_epochs:
        assert part.fitting(both[1], adapter).isfinite()


def test_settings_are_checked():
    for name, settings in (
        ("factor", {"factor_rate": 0.0}),
        ("factor", {"factor_epochs": -1}),
        ("factor", {"factor_epochs": 1.5}),
        ("factor", {"factor_weight": math.nan}),
        ("prior", {"prior_width": 6}),
        ("prior", {"prior_blocks": 0}),
        ("prior", {"prior_blocks": 1.5}),
        ("prior", {"prior_weight": -1.0}),
    ):
        with pytest.raises(ValueError, match=f"{name}.*: expected"):
            TECHNIQUES[name](**settings)
