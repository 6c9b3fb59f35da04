import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from torchdistill.losses.mid_level import DISTLoss, KDLoss, LogitStdKDLoss

from kdx.distil.logit_techniques import correlation, decoupled, standardised
from kdx.distil.techniques import TECHNIQUES, find_techniques
from kdx.distil.training import _Objective
from kdx.networks import models
from tests.techniques import guidance, seen, train

pytestmark = pytest.mark.usefixtures("shared_home")
FORMS = [("response", {}), ("response", {"standardise": True}), ("dkd", {}), ("dist", {})]


def outputs(*logits):
    """The arguments of a loss of torchdistill."""
    return [{"z": {"output": z}} for z in logits]


def wild(n, classes, seed, dtype=torch.float32):
    return 5 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- smoothing --------------------------------------------------------------------------------


def test_smoothing_is_torchs_label_smoothing(shapes16):
    network = models.build("resnet10", 10, "small", 0.125, seed=0)
    images, labels = shapes16["train"].card.normalize(shapes16["train"].images[:8]), torch.arange(8)
    for alpha in (0.0, 0.3):
        parts = find_techniques("smoothing", {"label_smoothing": alpha})
        logits, loss = _Objective(parts, network, None, images, labels, 0)(images, torch.arange(8))
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
    for bad, message in (
        ({"alpha": 1.5}, "response: expected 0 <= alpha <= 1, got 1.5"),
        ({"temperature": 0}, "temperature: expected a finite temperature above 0, got 0"),
        ({"temperature": math.inf}, "temperature: expected a finite temperature above 0, got inf"),
        ({"standardise": "no"}, "response: expected standardise to be True or False, got 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
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


# --- response, standardised -------------------------------------------------------------------


def test_standardised_by_hand():
    expected = [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    found = standardised(torch.tensor([[1.0, 3.0, 5.0], [7.0, 7.0, 7.0]]))
    torch.testing.assert_close(found, torch.tensor(expected))
    with pytest.raises(ValueError, match="expected 3 classes or more if logits are standardised, got 2"):
        standardised(torch.rand(4, 2))


def test_standardised_response_is_torchdistills_with_its_authors_weights():
    student, teacher, labels = wild(7, 5, 0), wild(7, 5, 1), torch.arange(7) % 5
    peer = LogitStdKDLoss("z", "output", "z", "output", temperature=2.0, alpha=0.1, beta=9.0)
    expected = peer(*outputs(student, teacher), labels)
    torch.testing.assert_close(response(student, teacher, labels, standardise=True), expected)


def test_standardised_response_asks_for_the_teachers_logits_up_to_scale_and_shift():
    teacher = wild(6, 4, 2)
    scaled = 0.3 * teacher + torch.randn(6, 1)
    assert guidance("response", seen(scaled), seen(teacher), standardise=True).item() == pytest.approx(0, abs=1e-5)
    assert guidance("response", seen(scaled), seen(teacher)) > 0.1
    assert TECHNIQUES["response"](standardise=True) == TECHNIQUES["response"](0.9, 2.0, True)
    assert TECHNIQUES["response"]() == TECHNIQUES["response"](0.5, 4.0)


# --- dkd --------------------------------------------------------------------------------------


def test_dkd_by_hand():
    # probabilities at T = 2: teacher 1/2, 1/3, 1/6 and student 1/4, 1/4, 1/2 of the label and the others
    teacher, student = 2 * torch.tensor([[3.0, 2.0, 1.0]]).log(), 2 * torch.tensor([[1.0, 1.0, 2.0]]).log()
    target = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    others = 2 / 3 * math.log((2 / 3) / (1 / 3)) + 1 / 3 * math.log((1 / 3) / (2 / 3))
    labels = torch.tensor([0])
    found = guidance(
        "dkd", seen(student, labels), seen(teacher, labels), dkd_alpha=3.0, dkd_beta=5.0, dkd_temperature=2.0
    )
    assert found.item() == pytest.approx(4 * (3 * target + 5 * others), rel=1e-5)


def test_decoupled_parts_make_up_the_response():
    """KL = KL(target) + (1 - teacher's probability of the label) KL(others), Zhao et al. 2022, eq. 6."""
    student, teacher, labels = wild(1, 6, 3), wild(1, 6, 4), torch.tensor([2])
    (b_s, o_s), (b_t, o_t) = (decoupled(z, labels) for z in (student, teacher))
    whole = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
    target, others = (F.kl_div(s, t, reduction="sum", log_target=True) for s, t in ((b_s, b_t), (o_s, o_t)))
    torch.testing.assert_close(whole, target + (1 - teacher.softmax(1)[0, 2]) * others)
    share = student.softmax(1)[0, 2].item()
    assert b_s[0].exp().tolist() == pytest.approx([share, 1 - share])


def test_dkd_asks_for_the_order_of_wrong_classes_also_of_a_sure_teacher():
    teacher, labels = torch.tensor([[30.0, 2.0, 1.0, 0.0]]), torch.tensor([0])
    student = torch.tensor([[30.0, 0.0, 1.0, 2.0]])
    assert guidance("response", seen(student), seen(teacher), temperature=1.0) < 1e-6
    assert guidance("dkd", seen(student, labels), seen(teacher, labels), dkd_temperature=1.0) > 1


# --- dist -------------------------------------------------------------------------------------


def test_correlation_is_pearsons():
    a, b = wild(5, 7, 5), wild(5, 7, 6)
    assert correlation(a, b).tolist() == pytest.approx([pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)], abs=1e-6)
    torch.testing.assert_close(correlation(a, 3 * a + 2), torch.ones(5))
    assert correlation(a, torch.ones(5, 7)).tolist() == [0] * 5


def test_dist_by_hand():
    # two images of two classes: within an image the correlation is 1 and -1, within both classes it is 1
    student, teacher = torch.tensor([[4.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = guidance("dist", seen(student), seen(teacher), dist_beta=3.0, dist_gamma=7.0, dist_temperature=2.0)
    assert found.item() == pytest.approx(4 * (3 * 1 + 7 * 0), rel=1e-5)
    found = guidance("dist", seen(student), seen(teacher.flip(0)), dist_beta=3.0, dist_gamma=7.0, dist_temperature=1.0)
    assert found.item() == pytest.approx(3 * 1 + 7 * 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_torchdistills(temperature):
    student, teacher = wild(7, 5, 7), wild(7, 5, 8)
    expected = DISTLoss("z", "output", "z", "output", beta=2.0, gamma=3.0, tau=temperature)(*outputs(student, teacher))
    found = guidance("dist", seen(student), seen(teacher), dist_beta=2.0, dist_gamma=3.0, dist_temperature=temperature)
    torch.testing.assert_close(found, expected)


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), FORMS)
def test_gradients_reach_the_student_and_are_right(name, settings):
    teacher, labels = wild(4, 5, 9, torch.float64), torch.arange(4)

    def loss(z):
        return guidance(name, seen(z, labels), seen(teacher, labels), **settings)

    student = wild(4, 5, 10, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.grad(loss(student), student)[0].abs().max() > 1e-4
    single = guidance(name, seen(student.float(), labels), seen(teacher.float(), labels), **settings)
    assert single.item() == pytest.approx(loss(student).item(), rel=1e-5)
    assert loss(teacher).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("name", "settings"), FORMS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.full((3, 4), 2.0), wild(3, 4, 11)),  # constant logits
        (wild(3, 4, 11), torch.zeros(3, 4)),
        (torch.zeros(3, 4), torch.zeros(3, 4)),
        (wild(1, 4, 11), wild(1, 4, 12)),  # one image
        (wild(1, 4, 11).repeat(3, 1), wild(1, 4, 12).repeat(3, 1)),  # the same image thrice
        (65504 * F.one_hot(torch.arange(3), 4).float(), -65504 * F.one_hot(torch.arange(3), 4).float()),  # of float16
    ],
)
def test_degenerate_logits_have_a_finite_loss(name, settings, student, teacher):
    student = student.clone().requires_grad_()
    loss = guidance(name, seen(student), seen(teacher), **settings)
    assert loss.isfinite()
    assert loss >= -1e-6
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("name", ["response", "dkd", "dist"])
def test_two_classes(name):
    assert guidance(name, seen(wild(5, 2, 13)), seen(wild(5, 2, 14))).isfinite()


def test_dkd_of_two_classes_is_the_response():
    student, teacher = wild(5, 2, 13), wild(5, 2, 14)
    torch.testing.assert_close(
        guidance("dkd", seen(student), seen(teacher)), guidance("response", seen(student), seen(teacher), alpha=1.0)
    )


def test_settings_have_ranges():
    for name, setting in (("dkd", "dkd_alpha"), ("dkd", "dkd_beta"), ("dist", "dist_beta"), ("dist", "dist_gamma")):
        with pytest.raises(ValueError, match=f"{setting}: expected a finite weight of at least 0"):
            TECHNIQUES[name](**{setting: -1.0})
    for name in ("dkd", "dist"):
        with pytest.raises(ValueError, match=f"{name}_temperature: expected a finite temperature above 0, got 0"):
            TECHNIQUES[name](**{f"{name}_temperature": 0})
