import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torchdistill.losses.mid_level import ATLoss, ChSimLoss
from torchvision import models as torchvision_models

from kdx import capture, stages
from kdx.distil.feature_techniques import channel_correlations, margin, partial_l2
from kdx.distil.techniques import TECHNIQUES
from kdx.networks import models
from kdx.networks.stages import Tap, pre_activations
from tests.networks import Small
from tests.techniques import guidance, seen

# --- attention --------------------------------------------------------------------------------


def test_attention_by_hand():
    # one channel over two locations: squares 9, 16 and 16, 9, so attention (9, 16) / 18.36 and reversed
    student, teacher = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[4.0, 3.0]]]])
    expected = (7 / math.hypot(9, 16)) ** 2  # of each of the two locations
    found = guidance("attention", seen(L1=student), seen(L1=teacher), attention_weight=2.0)
    assert found.item() == pytest.approx(2 * expected, rel=1e-6)


def test_attention_is_torchdistills():
    student = {"L1": torch.randn(3, 4, 8, 8), "L2": torch.randn(3, 6, 4, 4)}
    teacher = {"L1": torch.randn(3, 7, 8, 8), "L2": torch.randn(3, 2, 4, 4)}
    pairs = {s: {role: {"io": "output", "path": s} for role in ("student", "teacher")} for s in student}
    outputs = [{s: {"output": f} for s, f in features.items()} for features in (student, teacher)]
    expected = 1000 * ATLoss(pairs, mode="code")(*outputs)
    torch.testing.assert_close(guidance("attention", seen(**student), seen(**teacher)), expected)


def test_attention_of_other_sizes_is_that_of_averages():
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 8, 8)
    expected = guidance("attention", seen(L1=student), seen(L1=F.avg_pool2d(teacher, 2)))
    torch.testing.assert_close(guidance("attention", seen(L1=student), seen(L1=teacher)), expected)
    assert expected > 0


def test_attention_of_the_last_two_stages():
    network, x = models.build("resnet10", 10, "small", 0.125), torch.rand(1, 3, 32, 32)
    assert list(TECHNIQUES["attention"]().taps(network, x)) == ["L1", "L2", "L3", "L4"]
    assert list(TECHNIQUES["attention"](attention_stages=("L4", "L3")).taps(network, x)) == ["L3", "L4"]
    for wrong in (("L3", "L5"), (), "L4"):
        with pytest.raises(ValueError, match="attention_stages: expected some of L1, L2, L3, L4, got"):
            TECHNIQUES["attention"](attention_stages=wrong).taps(network, x)


# --- overhaul ---------------------------------------------------------------------------------


def test_margin_is_the_mean_of_negative_responses():
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, -3.0, 2.5])
    expected = [
        stats.truncnorm.mean(-math.inf, -b / abs(w), loc=b, scale=abs(w))
        for w, b in zip(weight.tolist(), bias.tolist(), strict=True)
    ]
    assert margin(weight, bias).tolist() == pytest.approx(expected, rel=1e-5)
    assert margin(weight, bias)[0].item() == pytest.approx(-math.sqrt(2 / math.pi))
    sample = 1.0 + 2.0 * torch.randn(200_000)
    assert margin(weight, bias)[1].item() == pytest.approx(sample[sample < 0].mean().item(), abs=0.02)


def test_margin_of_hardly_ever_negative_and_of_constant_channels():
    found = margin(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([4.0, -1.5, 2.0]))
    assert found.tolist() == [-1.5, -1.5, 0.0]


def test_partial_l2_by_hand():
    student = torch.tensor([-2.0, -1.0, -1.0, 3.0, 0.0])
    teacher = torch.tensor([-1.0, -2.0, 1.0, 1.0, 0.0])
    # spared, above a negative target, below a positive one, above it, equal
    assert partial_l2(student, teacher).item() == 0 + 1 + 4 + 4 + 0


def test_overhaul_by_hand():
    norm = nn.BatchNorm2d(1)
    taps = {stage: Tap(stage, True, norm) for stage in ("L1", "L2")}
    student = seen(torch.zeros(2, 3), L1=torch.ones(2, 1, 1, 1), L2=torch.ones(2, 1, 1, 1))
    teacher = seen(L1=torch.full((2, 1, 1, 1), 3.0), L2=torch.full((2, 1, 1, 1), -9.0))
    part = TECHNIQUES["overhaul"](overhaul_weight=10.0)
    adapter = part.adapter(student, teacher, taps)
    for regressor in adapter.eval().values():
        regressor.layers[0].weight.data.fill_(2.0)
    student = seen(torch.zeros(2, 3), L1=torch.full((2, 1, 1, 1), 0.5), L2=torch.full((2, 1, 1, 1), 0.5))
    # The regressor makes 1 of 0.5, but for the 1e-5 in batch norm. L1: (1 - 3)² for two images,
    # halved; L2: the margin -0.798 stands for -9, (1 + 0.798)² twice.
    expected = 10 * (2 * 4 / 2 + 2 * (1 + math.sqrt(2 / math.pi)) ** 2) / 2
    assert part.guidance(student, teacher, adapter).item() == pytest.approx(expected, rel=1e-4)


def test_overhaul_needs_a_batch_norm_in_the_teacher():
    student = seen(L1=torch.ones(2, 1, 1, 1))
    with pytest.raises(ValueError, match="overhaul: expected a BatchNorm2d before the end of L1"):
        TECHNIQUES["overhaul"]().adapter(student, student, {"L1": Tap("a", True)})


EXPECTED_TAPS = {
    "resnet18": [(f"layer{i}.1.relu", True, f"layer{i}.1.bn2") for i in range(1, 5)],
    "resnet50": [(f"layer{i}.{j}.relu", True, f"layer{i}.{j}.bn3") for i, j in ((1, 2), (2, 3), (3, 5), (4, 2))],
    "vgg11_bn": [(f"features.{i}", True, f"features.{i - 1}") for i in (6, 13, 20, 27)],
    "mobilenet_v2": [(f"features.{i}", False, f"features.{i}.conv.3") for i in (3, 6, 13)]
    + [("features.18.2", True, "features.18.1")],
}


@pytest.mark.parametrize("name", EXPECTED_TAPS)
def test_pre_activations(name):
    model = getattr(torchvision_models, name)(weights=None).eval()
    images = torch.rand(1, 3, 64, 64)
    names = {id(module): name for name, module in model.named_modules()}
    taps = pre_activations(model, images)
    assert [(tap.module, tap.input, names[id(tap.norm)]) for tap in taps.values()] == EXPECTED_TAPS[name]
    inputs = {stage for stage, tap in taps.items() if tap.input}
    with torch.no_grad(), capture(model, stages(model, images)) as after:
        plain = model(images)
    with torch.no_grad(), capture(model, {s: tap.module for s, tap in taps.items()}, inputs=inputs) as before:
        assert torch.equal(model(images), plain)
    for stage in inputs:
        assert before[stage].min() < 0  # not overwritten by the ReLU that follows
        activation = F.relu6 if name == "mobilenet_v2" else F.relu
        torch.testing.assert_close(activation(before[stage]), after[stage])


def test_pre_activation_norm_of_a_block_with_a_shortcut_is_the_main_branch():
    model = models.build("resnet10", 10, "small")
    names = {id(module): name for name, module in model.named_modules()}
    taps = pre_activations(model, torch.rand(1, 3, 32, 32))
    assert [names[id(tap.norm)] for tap in taps.values()] == [f"layer{i}.0.bn2" for i in range(1, 5)]


# --- alp --------------------------------------------------------------------------------------


def test_alp_by_hand():
    student = seen(L1=torch.tensor([[[[1.0]]]]))
    teacher = seen(L1=torch.tensor([[[[2.0]]]]), L2=torch.tensor([[[[0.0]], [[4.0]]]]))
    part = TECHNIQUES["alp"](alp_weight=3.0)
    adapter = part.adapter(student, teacher, {})
    with torch.no_grad():
        adapter["L1"].weight.copy_(torch.tensor([[1.0], [0.0], [0.5]]))
        adapter["L1"].bias.zero_()
    # projections (1) and (0, 0.5); scores 1 · 2 / 1 and 0.5 · 4 / √2
    first = 1 / (1 + math.exp(math.sqrt(2) - 2))
    second = 1 - first
    expected = 3 * ((1 - 2 * first) ** 2 + 0 + (0.5 - 4 * second) ** 2) / 3
    assert part.guidance(student, teacher, adapter).item() == pytest.approx(expected, rel=1e-6)


def test_alp_of_one_stage_is_a_plain_projection():
    student, teacher = seen(L1=torch.rand(4, 3, 2, 2)), seen(L1=torch.rand(4, 5, 2, 2))
    part = TECHNIQUES["alp"]()
    adapter = part.adapter(student, teacher, {})
    expected = F.mse_loss(adapter["L1"](student.features["L1"].mean((2, 3))), teacher.features["L1"].mean((2, 3)))
    torch.testing.assert_close(part.guidance(student, teacher, adapter), expected)


# --- inter-channel ----------------------------------------------------------------------------


def test_channel_correlations_by_hand():
    features = torch.tensor([[[[3.0, 4.0]], [[0.0, 1.0]], [[0.0, 0.0]]]])  # three channels of two locations
    # products 25, 4, 0 | 4, 1, 0 | 0, 0, 0
    a, b = math.hypot(25, 4), math.hypot(4, 1)
    expected = torch.tensor([[[25 / a, 4 / a, 0], [4 / b, 1 / b, 0], [0, 0, 0]]])
    torch.testing.assert_close(channel_correlations(features), expected)


def test_inter_channel_by_hand():
    # the teacher's channels are alike, the student's orthogonal: rows (1, 1) / √2 and (1, 0), (0, 1)
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    row = (1 - math.sqrt(0.5)) ** 2 + 0.5
    found = guidance("inter-channel", seen(last=student), seen(last=teacher), nn.Identity(), inter_channel_weight=3.0)
    assert found.item() == pytest.approx(3 * row, rel=1e-6)


def test_inter_channel_is_torchdistills_but_for_the_size_of_the_batch():
    """torchdistill divides by the batch twice, as the authors do for ImageNet and not for CIFAR."""
    student, teacher = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 5, 5)
    pair = {role: {"io": "output", "path": "last"} for role in ("student", "teacher")}
    outputs = [{"last": {"output": features}} for features in (student, teacher)]
    expected = 2.5 * 4 * ChSimLoss({"pair": pair})(*outputs)
    torch.testing.assert_close(
        guidance("inter-channel", seen(last=student), seen(last=teacher), nn.Identity()), expected
    )


def test_inter_channel_takes_other_widths_sizes_and_numbers_of_stages():
    part, x = TECHNIQUES["inter-channel"](), torch.rand(2, 3, 32, 32)
    student, teacher = Small(), models.build("resnet10", 10, "small", 0.125)
    assert [tap.module for network in (student, teacher) for tap in part.taps(network, x).values()] == ["c", "layer4.0"]
    s, t = seen(last=torch.randn(2, 4, 8, 8)), seen(last=torch.randn(2, 7, 4, 4))
    adapter = part.adapter(s, t, {})
    convolution, norm = adapter
    assert convolution.weight.shape == (7, 4, 1, 1)
    assert convolution.bias is None
    assert isinstance(norm, nn.BatchNorm2d)
    part.guidance(s, t, adapter).backward()
    assert convolution.weight.grad.abs().max() > 0


# --- all of them ------------------------------------------------------------------------------

FEATURES = {"attention": ("L3", "L4"), "overhaul": ("L3", "L4"), "alp": ("L3", "L4"), "inter-channel": ("last",)}


def drawn(names, width, size, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, width, size, size, generator=generator, dtype=torch.float64).to(dtype)
            for name in names}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_reach_the_student_and_not_the_teacher(name):
    part, stages = TECHNIQUES[name](), FEATURES[name]
    student, teacher = drawn(stages, 4, 2, 0), drawn(stages, 5, 4, 1)
    norms = {stage: Tap(stage, True, nn.BatchNorm2d(5).double()) for stage in stages}
    torch.manual_seed(0)
    adapter = part.adapter(seen(**student), seen(**teacher), norms)
    adapter = adapter and adapter.double()

    def loss(*features):
        return part.guidance(seen(**dict(zip(stages, features, strict=True))), seen(**teacher), adapter)

    features = [value.requires_grad_() for value in student.values()]
    assert torch.autograd.gradcheck(loss, features)
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss(*features), features))
    double = loss(*features).item()
    single = part.guidance(
        seen(**{k: v.float() for k, v in student.items()}),
        seen(**{k: v.float() for k, v in teacher.items()}),
        adapter and adapter.float(),
    )
    assert single.item() == pytest.approx(double, rel=1e-4)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (2.0, 2.0), (65504.0, 65504.0)])
def test_constant_features_have_a_finite_loss(name, n, ours, theirs):
    part = TECHNIQUES[name]()
    student = {stage: torch.full((n, 4, 2, 2), ours, requires_grad=True) for stage in FEATURES[name]}
    teacher = {stage: torch.full((n, 5, 4, 4), theirs) for stage in FEATURES[name]}
    norms = {stage: Tap(stage, True, nn.BatchNorm2d(5)) for stage in FEATURES[name]}
    adapter = part.adapter(seen(**student), seen(**teacher), norms)
    loss = part.guidance(seen(torch.zeros(n, 3), **student), seen(torch.zeros(n, 3), **teacher), adapter)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(student.values())))
