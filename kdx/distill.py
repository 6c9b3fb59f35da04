"""Training: on labels alone, or with the help of a teacher.

:func:`fit` trains one network with one of the ``TECHNIQUES``, or several joined, and keeps the
result in the run store, so that the same training is never done twice.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdistill.losses.mid_level import ATLoss

from kdx import data, models, techniques, tracing
from kdx.data import Card, Dataset
from kdx.progress import progress
from kdx.runs import Run, code_digest, find_run, run_key, store_run
from kdx.saliency import OverwrittenError, capture
from kdx.techniques import Seen, Technique, find_techniques
from kdx.tracing import Tap, evaluating


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum under a one-cycle learning rate.

    Attributes
    ----------
    epochs : passes over the training images; 0 stores the network as it was initialised.
    sizes : image sizes as fractions of the full one, each for an equal share of the steps
        (progressive resizing); ``(1.0,)`` trains at full size throughout.
    augmentation : of training images, see :func:`kdx.data.augment`; None: that of the dataset's card.
    """

    epochs: int = 4
    batch_size: int = 64
    lr: float = 0.3  # the peak of the cycle
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augmentation: Mapping[str, Mapping[str, Any]] | None = None
    sizes: tuple[float, ...] = (0.5, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) for n in (self.epochs, self.batch_size))
        if not whole or self.epochs < 0 or self.batch_size < 2:
            raise ValueError(f"recipe: expected whole numbers epochs >= 0 and batch_size >= 2, got {self}")
        if not 0 < self.lr < math.inf or not 0 < self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(f"recipe: expected 0 < lr, 0 < momentum < 1 and weight_decay >= 0, got {self}")
        if not self.sizes or not all(0 < size <= 1 for size in self.sizes):
            raise ValueError(f"recipe: expected sizes in (0, 1], got {self.sizes}")


def fit(
    model: str,
    train: Dataset,
    validation: Dataset,
    *,
    technique: str = "label",
    teacher: Run | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    stem: str = "small",
    width: float | None = None,
    device: str = "auto",
    stored: bool = False,
    **settings: Any,
) -> Run:
    """Train a registered network, or load the run if this very training was done before.

    The weights of the last epoch are kept; ``validation`` is only watched.

    Parameters
    ----------
    model, stem, width : as for :func:`kdx.build`; ``width`` is that of a model that does not carry its own.
    technique, settings : a name from ``TECHNIQUES``, or several as in ``"response+attention"``,
        and their parameters.
    teacher : the run to learn from, for every technique but ``"label"``. It may be of another
        width, depth or family.
    seed : of the initial weights, the order of the batches and the augmentation.
    device : ``"auto"`` (CUDA, else MPS, else CPU) or a torch device. Not part of the key.
    stored : True: look it up and never train; KeyError where this training was not done before.

    Returns
    -------
    Run : with ``.model``, and ``.history`` of loss and accuracy per epoch and split.

    Examples
    --------
    >>> import kdx
    >>> images = kdx.load_dataset("shapes", "train", limit=40, size=32)
    >>> setting = dict(recipe=kdx.Recipe(epochs=1, batch_size=20), stem="small", width=0.125, device="cpu")
    >>> teacher = kdx.fit("resnet10", images, images, **setting)
    >>> student = kdx.fit("resnet10", images, images, technique="response", teacher=teacher, **setting)
    >>> student.history["split"].unique().tolist()
    ['train', 'validation']
    """
    recipe = recipe or Recipe()
    parts = find_techniques(technique, settings)
    needs_teacher = any(part.needs_teacher for part in parts)
    if needs_teacher != (teacher is not None):
        wants = "a teacher run" if needs_teacher else "no teacher"
        raise ValueError(f"technique {technique!r} expects {wants}, got {teacher!r}")
    if len(train) < recipe.batch_size:
        raise ValueError(f"expected at least one batch of {recipe.batch_size} training images, got {len(train)}")
    if not len(validation):
        raise ValueError("expected at least one validation image, got none")
    if min(train.card.size[1:]) * min(recipe.sizes) < 8:
        raise ValueError(f"recipe: expected images of 8 pixels or more for {train.card.name}, got {recipe}")
    if recipe.augmentation is None:
        recipe = replace(recipe, augmentation=train.card.augmentation)
    data.compose(recipe.augmentation or {}, train.card.size[1:])  # a clear error before the work begins
    torch_device = pick_device(device)
    classes = len(train.classes)
    if teacher and teacher.classes != train.classes:
        raise ValueError(
            f"expected a teacher of the classes {', '.join(train.classes)}, got one of {', '.join(teacher.classes)}"
        )
    student = models.build(model, classes, stem, width, seed)
    spec = {
        "model": student.architecture,
        "technique": {"name": technique, **{k: v for part in parts for k, v in asdict(part).items()}},
        "teacher": teacher.key if teacher else None,
        "recipe": asdict(recipe),
        "seed": seed,
        "train": train.fingerprint,
        "validation": validation.fingerprint,
        "input": {"size": train.card.size, "mean": train.card.mean, "std": train.card.std},
    }
    code = CODE + code_digest(*map(type, parts)) + TECHNIQUE_CODE * needs_teacher
    key = run_key(spec, code + repr(models.MODELS[student.architecture["name"]]))
    if run := find_run(key):
        return run
    if stored:
        raise KeyError(f"no stored run of {model} ({technique}) under the key {key}")
    start = time.perf_counter()
    precision = autocast_dtype(torch_device)
    history = _train(student, train, validation, parts, teacher, recipe, seed, torch_device)
    header = {
        "classes": train.classes,
        "mean": train.card.mean,
        "std": train.card.std,
        "metrics": history[history["epoch"] == recipe.epochs].to_dict("records"),
    }
    return store_run(
        key,
        spec,
        student,
        history,
        header,
        dataset=train.card.name,
        device=device_name(torch_device),
        precision=str(precision).removeprefix("torch."),
        seconds=round(time.perf_counter() - start, 1),
    )


def _train(
    student: models.Network,
    train: Dataset,
    validation: Dataset,
    parts: list[Technique],
    teacher: Run | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> pd.DataFrame:
    student.to(device).to(memory_format=torch.channels_last)
    helper = teacher.model.to(device).to(memory_format=torch.channels_last) if teacher else None
    card, labels, images = train.card, train.labels.to(device), train.images.to(device)
    objective = _Objective(parts, student, helper, card.normalize(images[:2]), seed)
    generator = torch.Generator().manual_seed(seed)
    steps = len(train) // recipe.batch_size
    optimizer = torch.optim.SGD(
        [*student.parameters(), *objective.adapters.parameters()],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=device.type != "mps",
    )
    total = steps * recipe.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(total, 1))
    architecture = f"{student.architecture['name']}@{student.architecture['width']:g}"
    role = f"{architecture} ({'+'.join(part.name for part in parts)}, seed {seed})"
    records = []
    with progress(total=total, desc=role, unit="batch") as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the augmentation
        for epoch in range(1, recipe.epochs + 1):
            student.train()
            seen = torch.zeros(2, device=device)  # summed loss, correct
            order = torch.randperm(len(train), generator=generator)[: steps * recipe.batch_size]
            with objective.watching():
                for step, rows in enumerate(order.to(device).split(recipe.batch_size), (epoch - 1) * steps):
                    x = data.augment(images[rows], recipe.augmentation or {})
                    x = _resize(card.normalize(x), recipe.sizes[step * len(recipe.sizes) // total])
                    y = labels[rows]
                    logits, loss = objective(x, y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    seen += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
                    bar.update()
            train_loss, train_accuracy = (seen / (steps * recipe.batch_size)).tolist()
            if not train_loss < float("inf"):  # also NaN
                raise FloatingPointError(
                    f"the training loss of {role} is {train_loss} in epoch {epoch}; "
                    f"lower the learning rate (now {recipe.lr})"
                )
            held_out = evaluate(student, validation, device=device)
            records += [
                {"epoch": epoch, "split": "train", "loss": train_loss, "accuracy": train_accuracy},
                {"epoch": epoch, "split": "validation", "loss": held_out.loss, "accuracy": held_out.accuracy},
            ]
    student.to("cpu").to(memory_format=torch.contiguous_format).eval()
    return pd.DataFrame(records, columns=["epoch", "split", "loss", "accuracy"])


class _Objective:
    """The loss of a student: techniques joined, and the features that they need of both networks."""

    def __init__(
        self, parts: list[Technique], student: nn.Module, teacher: nn.Module | None, images: Tensor, seed: int
    ) -> None:
        self.parts = parts
        self.networks = [network for network in (student, teacher) if network is not None]
        self.label_weight = math.prod(part.label_weight for part in parts)
        self.taps = find_taps(parts, self.networks, images)
        self.captured: list[list[dict[str, Tensor]]] = []
        self.copy = False  # unless layers that work in place follow a tap
        self.adapters = nn.ModuleList()
        if teacher is None:
            return
        try:
            with self.watching():
                self._answers(images)
        except OverwrittenError:
            self.copy = True
        with self.watching(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            logits = self._answers(images)
            for i, part in enumerate(parts):
                adapter = part.adapter(*self._seen(i, logits), self.taps[i][1])
                self.adapters.append(adapter or nn.Identity())
        self.adapters.to(images.device)

    @torch.no_grad()
    def _answers(self, images: Tensor) -> list[Tensor]:
        answers = []
        for network in self.networks:
            with evaluating(network):
                answers.append(network(images))
        return answers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Features are collected inside the block."""
        with ExitStack() as stack:
            self.captured = [
                [
                    stack.enter_context(
                        capture(
                            network,
                            {stage: tap.module for stage, tap in taps.items()},
                            copy=self.copy,
                            inputs={stage for stage, tap in taps.items() if tap.input},
                        )
                    )
                    for network, taps in zip(self.networks, both, strict=True)
                ]
                for both in self.taps
            ]
            yield

    def _seen(self, i: int, logits: list[Tensor]) -> tuple[Seen, Seen]:
        """What student and teacher made of the latest batch, as the technique i sees it, in float32."""
        student, teacher = (
            Seen(z, {stage: features[stage].float() for stage in taps})
            for z, features, taps in zip(logits, self.captured[i], self.taps[i], strict=True)
        )
        return student, teacher

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits of a batch, and its loss."""
        student, *teacher = self.networks
        with autocast(x.device):
            logits = [student(x).float()]
            with torch.no_grad():  # what inference mode gives could not enter the loss without a copy
                logits += [network(x).float() for network in teacher]
        loss = F.cross_entropy(logits[0], labels) * self.label_weight
        if teacher:
            for i, (part, adapter) in enumerate(zip(self.parts, self.adapters, strict=True)):
                loss = loss + part.guidance(*self._seen(i, logits), adapter)
        return logits[0], loss


def find_taps(parts: Sequence[Technique], networks: Sequence[nn.Module], images: Tensor) -> list[list[dict[str, Tap]]]:
    """Of each technique, where it looks at each of student and teacher: at the same stages."""
    found = [[part.taps(network, images) for network in networks] for part in parts]
    for part, taps in zip(parts, found, strict=True):
        if len({tuple(tap) for tap in taps}) > 1:
            stages = " and ".join(", ".join(tap) for tap in taps)
            raise ValueError(f"{part.name}: expected the same stages in student and teacher, got {stages}")
    return found


def _resize(images: Tensor, scale: float) -> Tensor:
    if scale < 1:
        size = [round(side * scale) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy (fraction), and the logits (n, classes) they come from."""

    loss: float
    accuracy: float
    logits: Tensor

    @property
    def predictions(self) -> Tensor:
        return self.logits.argmax(1)


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    device: str | torch.device = "auto",
    batch_size: int = 100,
    scale: float = 1.0,
) -> Evaluation:
    """Run a network over a dataset in evaluation mode; the network stays on ``device``.

    ``scale`` shrinks the images to that fraction of their size, as in ``Recipe.sizes``.
    """
    device = pick_device(device)
    model.to(device).to(memory_format=torch.channels_last)
    logits = []
    with torch.inference_mode(), evaluating(model), autocast(device):
        for images in dataset.images.split(batch_size):
            x = dataset.card.normalize(images.to(device))
            logits.append(model(_resize(x, scale)).float().cpu())
    z = torch.cat(logits).clone()
    loss = F.cross_entropy(z, dataset.labels).item()
    accuracy = (z.argmax(1) == dataset.labels).double().mean().item()
    return Evaluation(loss, accuracy, z)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:1, mps, ...") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def autocast(device: torch.device) -> Any:
    """Autocast to bfloat16 where this host is faster with it."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@lru_cache
def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if a training step of a convolution is faster in it here, else float32.

    CPUs differ by a factor of ten either way, so it is measured, once per process (~0.1 s).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        for dtype in (torch.float32, torch.bfloat16):
            convolution = nn.Conv2d(32, 32, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
            x = torch.rand(32, 32, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
            seconds[dtype] = min(_step_seconds(convolution, x) for _ in range(5))
    return min(seconds, key=seconds.__getitem__)


def _step_seconds(layer: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x).sum().backward()
    return time.perf_counter() - start


# What decides a run beside its spec, read when this module is: a later edit of a file must not
# get the credit for what the old code in memory trains.
CODE = code_digest(models, sys.modules[__name__], data.augment, data.compose, Card.normalize)
TECHNIQUE_CODE = code_digest(techniques, tracing, capture, ATLoss)  # of whatever learns from a teacher
