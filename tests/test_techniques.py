import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torchdistill.losses.mid_level import ATLoss, KDLoss
from torchvision import models as torchvision_models

from kdx import Recipe, capture, fit, stages
from kdx.distil.techniques import TECHNIQUES, Seen, find_techniques, margin, partial_l2
from kdx.distil.training import _Objective
from kdx.networks import models
from kdx.networks.stages import Tap, pre_activations

QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)


pytestmark = pytest.mark.usefixtures("shared_home")


def seen(logits=None, **features):
    return Seen(torch.zeros(2, 3) if logits is None else logits, features)


def guidance(name, student, teacher, adapter=None, **settings):
    return TECHNIQUES[name](**settings).guidance(student, teacher, adapter)


# --- response ---------------------------------------------------------------------------------


def response(student, teacher, labels, **settings):
    part = TECHNIQUES["response"](**settings)
    return part.label_weight * F.cross_entropy(student, labels) + part.guidance(seen(student), seen(teacher), None)


def test_response_by_hand():
    student, teacher, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([0])
    # at T = 2 the teacher says 1/4, 3/4 and the student 1/2, 1/2
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    expected = 0.7 * math.log(2) + 0.3 * 4 * divergence
    assert response(student, teacher, labels, alpha=0.3, temperature=2).item() == pytest.approx(expected, rel=1e-6)


def test_response_limits():
    student, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 4
    torch.testing.assert_close(response(student, teacher, labels, alpha=0.0), F.cross_entropy(student, labels))
    assert response(teacher, teacher, labels, alpha=1.0).abs() < 1e-6
    # per image, whatever the batch
    torch.testing.assert_close(
        response(student.repeat(3, 1), teacher.repeat(3, 1), labels.repeat(3)), response(student, teacher, labels)
    )
    for bad in ({"alpha": 1.5}, {"temperature": 0}):
        with pytest.raises(ValueError, match="expected 0 <= alpha <= 1 and temperature > 0"):
            TECHNIQUES["response"](**bad)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_response_to_a_certain_teacher_at_temperature_1_is_cross_entropy(alpha):
    student, labels = torch.randn(6, 4), torch.arange(6) % 4
    certain = 1e4 * F.one_hot(labels, 4).float()  # of entropy 0
    torch.testing.assert_close(
        response(student, certain, labels, alpha=alpha, temperature=1.0), F.cross_entropy(student, labels)
    )


def test_response_is_torchdistills():
    student, teacher, labels = torch.randn(7, 5), torch.randn(7, 5), torch.arange(7) % 5
    peer = KDLoss("z", "output", "z", "output", temperature=3.0, alpha=0.4)
    expected = peer({"z": {"output": student}}, {"z": {"output": teacher}}, labels)
    torch.testing.assert_close(response(student, teacher, labels, alpha=0.6, temperature=3.0), expected)


# --- smoothing --------------------------------------------------------------------------------


def test_smoothing_is_torchs_label_smoothing(shapes16):
    network = models.build("resnet10", 10, "small", 0.125, seed=0)
    images, labels = shapes16["train"].card.normalize(shapes16["train"].images[:8]), torch.arange(8)
    for alpha in (0.0, 0.3):
        parts = find_techniques("smoothing", {"label_smoothing": alpha})
        logits, loss = _Objective(parts, network, None, images, 0)(images, labels)
        uniform = -logits.log_softmax(1).mean(1)
        expected = (1 - alpha) * F.cross_entropy(logits, labels) + alpha * uniform.mean()
        torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"smoothing: expected 0 <= label_smoothing < 1, got 1\.0"):
        TECHNIQUES["smoothing"](label_smoothing=1.0)


def test_smoothing_needs_no_teacher_and_teaches(shapes16):
    plain, smooth = train(shapes16), train(shapes16, technique="smoothing")
    strong = train(shapes16, technique="smoothing", label_smoothing=0.5)
    assert len({run.key for run in (plain, smooth, strong)}) == 3
    assert not torch.equal(next(plain.model.parameters()), next(smooth.model.parameters()))
    assert train(shapes16, technique="response", teacher=smooth).manifest["spec"]["teacher"] == smooth.key
    with pytest.raises(ValueError, match="technique 'smoothing' expects no teacher"):
        train(shapes16, technique="smoothing", teacher=plain)


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


# --- all of them, in training -----------------------------------------------------------------


def train(data, model="resnet10", width=0.125, **settings):
    settings = {"recipe": QUICK, "device": "cpu", "stem": "small"} | settings
    return fit(model, data["train"], data["test"], width=width, **settings)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("resnet18", 0.25), ("resnet10", 0.125)),
        (("mobilenet_v2", 0.25), ("resnet10", 0.125)),
        (("resnet10", 0.125), ("mobilenet_v2", 0.25)),
    ],
)
@pytest.mark.parametrize("name", ["response", "attention", "overhaul", "alp", "response+attention"])
def test_student_of_another_width_depth_or_family(shapes16, name, teacher, student):
    guide = train(shapes16, *teacher)
    before = {k: v.clone() for k, v in guide.model.state_dict().items()}
    run = train(shapes16, *student, technique=name, teacher=guide)
    assert math.isfinite(run.history["loss"].iloc[-1])
    assert all(torch.equal(v, before[k]) for k, v in guide.model.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.model.parameters())
    alone = train(shapes16, *student)  # the teacher made a difference
    assert not torch.equal(next(run.model.parameters()), next(alone.model.parameters()))


def test_find_techniques_names_the_choices():
    cases = {
        "unknown technique 'hint'; choose from: label, smoothing, response, attention, overhaul, alp": (
            "response+hint",
            {},
        ),
        "different techniques joined by": ("response+response", {}),
        "'label' only by itself": ("label+response", {}),
        "'smoothing' only by itself": ("response+smoothing", {}),
        "unknown settings of 'response\\+attention': beta; choose from: alpha, temperature, attention_weight": (
            "response+attention",
            {"beta": 1},
        ),
        "unknown settings of 'label': alpha; choose from: none": ("label", {"alpha": 1}),
        "attention_weight: expected a finite weight": ("attention", {"attention_weight": -1.0}),
    }
    for message, (name, settings) in cases.items():
        with pytest.raises(ValueError, match=message):
            find_techniques(name, settings)


def test_names_of_settings_differ_between_techniques():
    settings = [field.name for known in TECHNIQUES.values() for field in fields(known)]
    assert len(set(settings)) == len(settings)
