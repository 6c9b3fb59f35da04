import copy
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdx
from kdx import Recipe, fit
from kdx.distil import checkpoints
from kdx.distil import fit as fit_module
from kdx.distil.feature_techniques import InterChannel
from kdx.distil.fit import Job
from kdx.distil.technique import Technique
from kdx.distil.techniques import TECHNIQUES, find_techniques, technique
from kdx.distil.training import _Objective, train_epochs
from kdx.networks import models
from kdx.progress import progress
from tests.networks import Small, fit_to_teacher

ROOT = Path(__file__).parent.parent
QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)
pytestmark = pytest.mark.usefixtures("shared_home")


def train(data, model="resnet10", width=0.125, **settings):
    settings = {"recipe": QUICK, "device": "cpu", "stem": "small"} | settings
    return fit(model, data["train"], data["test"], width=width, **settings)


def untouched(model):
    """No hooks, and in-place layers as torchvision builds them."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize("name", ["response", "attention", "overhaul", "alp", "overhaul+attention"])
def test_training_leaves_no_hooks_and_no_switched_layers(shapes16, name):
    guide, student = train(shapes16), models.build("resnet10", 10, "small", 0.125, seed=1)
    parameters = set(student.state_dict())
    part, steps = find_techniques(name, {}), []
    list(
        train_epochs(
            student, guide.model, shapes16["train"], part, QUICK, 0, torch.device("cpu"), lambda: steps.append(1)
        )
    )
    assert len(steps) == 5
    assert untouched(student)
    assert untouched(guide.model)
    assert set(student.state_dict()) == parameters  # adapters are no part of it
    assert student.bn1.num_batches_tracked == 5  # 80 images in batches of 16: looking first counts for nothing


def test_narrow_networks_are_trained_without_the_kernels_that_damage_memory(shapes16, monkeypatch):
    """Also while their steps are timed."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    used, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: (used.append(torch.backends.mkldnn.enabled), backward(loss))
    )
    job = Job("resnet10@0.0625", shapes16["train"], shapes16["test"], stem="small", recipe=QUICK, device="cpu")
    job.seconds_of_steps()
    assert used == [False] * 2
    train(shapes16, width=0.0625, seed=5)
    assert used == [False] * 7
    train(shapes16, width=0.125, seed=5)
    assert used == [False] * 7 + [True] * 5


@pytest.mark.parametrize("name", ["attention", "overhaul", "alp"])
def test_guidance_moves_the_students_features(name):
    student, teacher = models.build("resnet10", 10, "small", 0.125, 0), models.build("resnet10", 10, "small", 0.25, 1)
    teacher.eval()
    x, part = torch.rand(16, 3, 32, 32), find_techniques(name, {})
    labels = torch.arange(16) % 10
    rows = torch.arange(16)
    objective = _Objective(part, student, teacher, x, labels, seed=0)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)  # the adapters stay as they are
    losses = []
    with objective.watching():
        for _ in range(20):
            with torch.no_grad():
                answers = teacher(x)
            both = (objective._seen(0, which, logits, x, [16, 0], rows) for which, logits in
                    enumerate((student(x), answers)))  # fmt: skip
            loss = part[0].guidance(*both, objective.adapters[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


class Drawing(nn.Module):
    """An adapter with a weight to fit."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1))


class FitsAndDraws(Technique):
    name = "fits and draws"
    fitting_epochs = 1

    def adapter(self, student, teacher, taps):
        return Drawing()

    def fitting(self, teacher, adapter):
        return adapter.weight.sum() * torch.rand(())

    def guidance(self, student, teacher, adapter):
        return 0 * student.logits.sum() * torch.rand(3).sum()


def test_what_a_technique_fits_and_draws_leaves_the_batches_as_they_are(shapes16):
    def shown(parts, teacher):
        student, images = models.build("resnet10", 10, "small", 0.125, seed=0), []
        student.conv1.register_forward_pre_hook(lambda _, x: images.append(x[0].clone()) if student.training else None)
        recipe = Recipe(epochs=2, batch_size=16, lr=0.1, augmentation={"RandomHorizontalFlip": {}})
        list(train_epochs(student, teacher, shapes16["train"], parts, recipe, 0, torch.device("cpu"), lambda: None))
        return torch.stack(images)

    teacher = models.build("resnet10", 10, "small", 0.125, seed=1).eval()
    assert torch.equal(shown([FitsAndDraws()], teacher), shown(find_techniques("label", {}), None))


def test_joined_techniques_add_up(shapes16):
    student, teacher = models.build("resnet10", 10, "small", 0.125, 0), models.build("resnet10", 10, "small", 0.25, 1)
    student.eval(), teacher.eval()
    x, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 10

    def loss(name, **settings):
        objective = _Objective(find_techniques(name, settings), student, teacher, x, labels, seed=0)
        with objective.watching():
            return objective(x, torch.arange(8))[1]

    label = F.cross_entropy(student(x), labels)
    response, attention = loss("response", alpha=0.25), loss("attention")
    joined = loss("response+attention", alpha=0.25)
    torch.testing.assert_close(joined, response + attention - label, rtol=1e-3, atol=0)  # also in bfloat16
    torch.testing.assert_close(joined, loss("attention+response", alpha=0.25))


def test_techniques_that_compare_stages_refuse_networks_with_others():
    with pytest.raises(ValueError, match="attention: expected the same stages in student and teacher, got L1, L2, L3"):
        _Objective(
            find_techniques("attention", {}),
            Small(),
            models.build("resnet10", 10, "small", 0.125),
            torch.rand(2, 3, 32, 32),
            torch.arange(2),
            seed=0,
        )


@pytest.mark.parametrize("name", ["attention", "overhaul"])
def test_hooks_are_gone_after_a_failure(shapes16, name):
    @technique("fails")
    class Fails(TECHNIQUES[name]):
        def guidance(self, student, teacher, adapter):
            raise RuntimeError("on purpose")

    guide = train(shapes16)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            train(shapes16, technique="fails", teacher=guide)
    finally:
        del TECHNIQUES["fails"]
    assert untouched(guide.model)


# --- what techniques see and what they learn ----------------------------------------------------


def train_small(teacher, *parts):
    """Train a small student by these techniques, in four batches; the training images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = kdx.Dataset(images, torch.arange(16) % 4, kdx.DATASETS["shapes"])
    recipe = Recipe(epochs=1, batch_size=4, lr=0.05)
    list(train_epochs(Small(), teacher, data, parts, recipe, 0, torch.device("cpu"), lambda: None))
    return data


def test_adapters_learn_with_the_student():
    adapters = []

    class Kept(InterChannel):
        def adapter(self, *seen):
            own = super().adapter(*seen)
            adapters.extend([own, copy.deepcopy(own)])
            return own

    train_small(Small(8, seed=1).eval(), Kept())
    now, before = (adapter.parameters() for adapter in adapters)
    assert not any(torch.equal(a, b) for a, b in zip(now, before, strict=True))


class Colour(nn.Module):
    """Answers with the mean colour of an image, which tells it from all others."""

    def forward(self, x):
        return x.mean((2, 3))


@dataclass(frozen=True)
class Notes(Technique):
    """Notes what it sees; of each image also as many views, which show the same."""

    noted: list
    views_of_each: int = 0
    name = "notes"
    fitting_epochs = 1

    def views(self, images):
        return images.repeat(self.views_of_each, 1, 1, 1)

    def adapter(self, *_):
        return nn.Linear(1, 1)

    def fitting(self, teacher, adapter):
        self.noted.append(teacher)
        return adapter.weight.sum()

    def guidance(self, student, teacher, adapter):
        assert torch.equal(student.rows, teacher.rows)
        self.noted.append(teacher)
        return student.logits.sum() * 0


def test_rows_are_those_of_the_images_in_the_order_of_the_batch():
    parts = [Notes([], n) for n in (0, 1, 3)]
    data = train_small(Colour(), *parts)
    colours = data.card.normalize(data.images).mean((2, 3))
    for part in parts:
        for stage in (part.noted[:4], part.noted[4:]):
            assert sorted(torch.cat([seen.rows for seen in stage]).tolist()) == list(range(16))
        for seen in part.noted:
            torch.testing.assert_close(seen.logits, colours[seen.rows])
            assert seen.labels.tolist() == (seen.rows % 4).tolist()
            assert (seen.views is None) == (part.views_of_each == 0)
            if seen.views:
                assert torch.equal(seen.views.rows, seen.rows.repeat(part.views_of_each))
                torch.testing.assert_close(seen.views.logits, colours[seen.views.rows])


# --- the fitting to the teacher -----------------------------------------------------------------


def test_fitting_is_sgd_whose_learning_rate_is_divided_by_ten_after_each_third():
    class Slope(Technique):
        name, fitting_epochs, fitting_lr = "slope", 6, 0.5

        def adapter(self, *_):
            return nn.Linear(1, 1, bias=False)

        def fitting(self, teacher, adapter):
            return adapter.weight.sum()

    images, rows = torch.rand(2, 3, 8, 8), torch.arange(2)
    objective = _Objective([Slope()], Small(), Small().eval(), images, rows, seed=0)
    weight, velocity = objective.adapters[0].weight.item(), 0.0
    recipe = Recipe(momentum=0.5, weight_decay=0.1)
    fit_to_teacher(objective, lambda: iter([(images, rows)] * 2), recipe)
    for lr in (0.5, 0.05, 0.005):
        for _ in range(4):
            velocity = 0.5 * velocity + 1 + 0.1 * weight
            weight -= lr * velocity
    assert objective.adapters[0].weight.item() == pytest.approx(weight, rel=1e-5)


def test_a_joined_technique_is_fitted_as_alone():
    images, rows = torch.rand(4, 3, 16, 16), torch.arange(4)
    fitted = []
    for name in ("factor", "response+factor"):
        objective = _Objective(find_techniques(name, {}), Small(), Small(seed=1).eval(), images, rows, seed=0)
        before = copy.deepcopy(objective.adapters[-1])
        fit_to_teacher(objective, lambda: iter([(images, rows)] * 2))
        fitted.append(objective.adapters[-1]["paraphraser"])
        assert not torch.equal(fitted[-1][0].weight, before["paraphraser"][0].weight)
        with objective.watching():
            assert objective(images, rows)[1].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(*(part.parameters() for part in fitted), strict=True))


# --- a training that is killed ------------------------------------------------------------------


RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05, augmentation={"RandomHorizontalFlip": {}})
FITTING = {"factor": "factor_epochs", "self-supervised": "self_supervised_epochs"}


def taught(home, technique, recipe=RECIPE):
    """A student, and its teacher, of noise; whatever is fitted before is fitted for two epochs."""
    os.environ["KDX_HOME"] = str(home)
    images = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = kdx.Dataset(images, torch.arange(48) % 10, kdx.DATASETS["shapes"])
    training = dict(width=0.125, device="cpu")
    teacher = fit("resnet10", data, data, seed=1, recipe=QUICK, **training)
    settings = {FITTING[part]: 2 for part in technique.split("+") if part in FITTING}
    settings |= {"contrastive_negatives": 8} if "contrastive" in technique else {}
    return fit("resnet10", data, data, technique=technique, teacher=teacher, recipe=recipe, **training, **settings)


KILL = """
import os, signal, sys
import torch
from kdx.distil import checkpoints
from tests.test_training import taught
torch.set_num_threads(1)
technique, *homes = sys.argv[1:]
save = checkpoints.Kept.save
for epochs, home in enumerate(homes, 1):
    if not os.fork():
        def dies(self, state):
            save(self, state)
            if state["epochs"] == epochs:
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.Kept.save = dies
        taught(home, technique)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(
    ("technique", "epochs"),
    [("factor", 4), ("self-supervised", 4), ("prior+contrastive", 2)],
)
def test_a_killed_training_goes_on_after_its_last_epoch_to_the_same_weights(
    tmp_path, monkeypatch, one_thread, technique, epochs
):
    """In the fitting to the teacher, at its end, and in the training itself."""
    monkeypatch.setenv("KDX_HOME", str(tmp_path))  # which ``taught`` changes
    expected = taught(tmp_path / "undisturbed", technique)
    homes = [tmp_path / str(done) for done in range(1, epochs)]
    command = [sys.executable, "-c", KILL, technique, *map(str, homes)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(homes)
    begun = []
    monkeypatch.setattr(fit_module, "progress", lambda **given: begun.append(given["initial"]) or progress(**given))
    for done, home in enumerate(homes, 1):
        partial = home / "runs" / f".{expected.key}.cpu.partial"
        assert torch.load(partial)["epochs"] == done
        run = taught(home, technique)
        assert begun[-1] == 3 * done  # batches that are not repeated
        assert not partial.exists()
        assert run.key == expected.key
        assert run.history.equals(expected.history)
        pairs = zip(run.model.state_dict().values(), expected.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stage", ["fitting", "training"])
def test_a_training_that_diverges_later_keeps_nothing(home, monkeypatch, stage):
    calls, kept = [], []
    saved = checkpoints.Kept.save
    monkeypatch.setattr(checkpoints.Kept, "save", lambda self, state: (saved(self, state), kept.append(self.path)))

    def diverges(function, first):
        def method(*given):
            calls.append(None)
            return function(*given) * (1 if len(calls) < first else float("nan"))

        return method

    name, first = ("fitting", 5) if stage == "fitting" else ("guidance", 6)  # of three batches an epoch
    monkeypatch.setattr(TECHNIQUES["factor"], name, diverges(getattr(TECHNIQUES["factor"], name), first))
    with pytest.raises(FloatingPointError, match=r"fitted to the teacher|in epoch 2; lower the learning rate"):
        taught(home, "factor")
    assert kept
    assert not kept[-1].exists()
    assert len(list((home / "runs").iterdir())) == 1  # the teacher
