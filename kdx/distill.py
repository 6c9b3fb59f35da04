"""Training: on labels alone, or with the help of a teacher.

``TECHNIQUES`` maps a name to a loss; :func:`fit` trains one network with one of them and keeps
the result in the run store, so that the same training is never done twice.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx import data, models
from kdx.data import Card, Dataset
from kdx.progress import progress
from kdx.runs import Run, code_digest, find_run, run_key, store_run
from kdx.tracing import evaluating

TECHNIQUES: dict[str, Any] = {}


def technique(name: str) -> Any:
    """Class decorator: enter a distillation technique into ``TECHNIQUES``."""

    def enter(cls: Any) -> Any:
        TECHNIQUES[name] = cls
        cls.name = name
        return cls

    return enter


@technique("label")
@dataclass(frozen=True)
class Label:
    """Cross-entropy with the labels: how teachers and bases are trained."""

    needs_teacher = False

    def loss(self, logits_student: Tensor, logits_teacher: Tensor | None, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_student, labels)


@technique("response")
@dataclass(frozen=True)
class Response:
    r"""Response-based distillation (Hinton et al. 2015).

    .. math:: (1-\alpha)\,\mathrm{CE}(z_s, y)
              + \alpha T^2\, \mathrm{KL}(\mathrm{softmax}(z_t/T) \,\|\, \mathrm{softmax}(z_s/T))

    Parameters
    ----------
    alpha : weight of the teacher, in [0, 1].
    temperature : T > 0.
    """

    alpha: float = 0.5
    temperature: float = 4.0
    needs_teacher = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise ValueError(
                f"response: expected 0 <= alpha <= 1 and temperature > 0, got {self.alpha} and {self.temperature}"
            )

    def loss(self, logits_student: Tensor, logits_teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert logits_teacher is not None
        t = self.temperature
        soft = F.kl_div(
            F.log_softmax(logits_student / t, 1),
            F.log_softmax(logits_teacher / t, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.alpha) * F.cross_entropy(logits_student, labels) + self.alpha * t**2 * soft


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum under a one-cycle learning rate.

    Attributes
    ----------
    sizes : image sizes as fractions of the full one, each for an equal share of the steps
        (progressive resizing); ``(1.0,)`` trains at full size throughout.
    shift : augmentation by random shifts of up to this many pixels, beside mirroring.
    """

    epochs: int = 4
    batch_size: int = 64
    lr: float = 0.3  # the peak of the cycle
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 0
    sizes: tuple[float, ...] = (0.5, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) for n in (self.epochs, self.batch_size, self.shift))
        if not whole or self.epochs < 1 or self.batch_size < 2 or self.shift < 0:
            raise ValueError(f"recipe: expected whole numbers epochs >= 1, batch_size >= 2 and shift >= 0, got {self}")
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
    **settings: Any,
) -> Run:
    """Train a registered network, or load the run if this very training was done before.

    The weights of the last epoch are kept; ``validation`` is only watched.

    Parameters
    ----------
    model, stem, width : as for :func:`kdx.build`.
    technique, settings : a name from ``TECHNIQUES`` and its parameters.
    teacher : the run to learn from, for every technique but ``"label"``.
    seed : of the initial weights, the order of the batches and the augmentation.
    device : ``"auto"`` (CUDA, else MPS, else CPU) or a torch device. Not part of the key.

    Returns
    -------
    Run : with ``.model``, and ``.history`` of loss and accuracy per epoch and split.
    """
    recipe = recipe or Recipe()
    loss = _technique(technique, settings)
    if loss.needs_teacher != (teacher is not None):
        wants = "a teacher run" if loss.needs_teacher else "no teacher"
        raise ValueError(f"technique {technique!r} expects {wants}, got {teacher!r}")
    if len(train) < recipe.batch_size:
        raise ValueError(f"expected at least one batch of {recipe.batch_size} training images, got {len(train)}")
    if not len(validation):
        raise ValueError("expected at least one validation image, got none")
    side = min(train.card.size[1:])
    if recipe.shift >= side or side * min(recipe.sizes) < 8:
        raise ValueError(
            f"recipe: expected shift < {side} and images of 8 pixels or more for {train.card.name}, got {recipe}"
        )
    torch_device = pick_device(device)
    classes = len(train.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = models.build(model, classes, stem, width)
    spec = {
        "model": student.architecture,
        "technique": {"name": technique, **asdict(loss)},
        "teacher": teacher.key if teacher else None,
        "recipe": asdict(recipe),
        "seed": seed,
        "train": train.fingerprint,
        "validation": validation.fingerprint,
        "normalisation": [train.card.mean, train.card.std],
    }
    key = run_key(spec, CODE + code_digest(type(loss)) + repr(models.MODELS[model]))
    if run := find_run(key):
        return run
    start = time.perf_counter()
    precision = autocast_dtype(torch_device)
    history = _train(student, train, validation, loss, teacher, recipe, seed, torch_device)
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


def _technique(name: str, settings: dict[str, Any]) -> Any:
    if name not in TECHNIQUES:
        raise ValueError(f"unknown technique {name!r}; choose from: {', '.join(TECHNIQUES)}")
    known = TECHNIQUES[name].__dataclass_fields__
    if unknown := set(settings) - set(known):
        choices = ", ".join(known) or "none"
        raise ValueError(f"unknown settings of {name!r}: {', '.join(sorted(unknown))}; choose from: {choices}")
    return TECHNIQUES[name](**settings)


def _train(
    student: models.ResNet,
    train: Dataset,
    validation: Dataset,
    loss: Any,
    teacher: Run | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> pd.DataFrame:
    student.to(device).to(memory_format=torch.channels_last)
    helper = teacher.model.to(device).to(memory_format=torch.channels_last) if teacher else None
    card, labels = train.card, train.labels.to(device)
    images = train.images.to(device)
    generator = torch.Generator().manual_seed(seed)
    steps = len(train) // recipe.batch_size
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=device.type != "mps",
    )
    total = steps * recipe.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=total)
    role = f"{student.architecture['name']} ({loss.name})"
    records = []
    with progress(total=total, desc=role, unit="batch") as bar:
        for epoch in range(1, recipe.epochs + 1):
            student.train()
            seen = torch.zeros(2, device=device)  # summed loss, correct
            order = torch.randperm(len(train), generator=generator)[: steps * recipe.batch_size]
            for step, rows in enumerate(order.to(device).split(recipe.batch_size), (epoch - 1) * steps):
                x = data.augment(images[rows], generator, recipe.shift)
                x = _resize(card.normalize(x), recipe.sizes[step * len(recipe.sizes) // total])
                y = labels[rows]
                with autocast(device):
                    logits_teacher = None
                    if helper is not None:
                        with torch.no_grad():
                            logits_teacher = helper(x).float()
                    logits = student(x).float()
                batch_loss = loss.loss(logits, logits_teacher, y)
                optimizer.zero_grad()
                batch_loss.backward()
                optimizer.step()
                schedule.step()
                seen += torch.stack([batch_loss.detach() * len(y), (logits.argmax(1) == y).sum()])
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
    return pd.DataFrame(records)


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
    model: nn.Module, dataset: Dataset, device: str | torch.device = "auto", batch_size: int = 100
) -> Evaluation:
    """Run a network over a dataset in evaluation mode; the network stays on ``device``."""
    device = pick_device(device)
    model.to(device).to(memory_format=torch.channels_last)
    logits = []
    with torch.inference_mode(), evaluating(model), autocast(device):
        for images in dataset.images.split(batch_size):
            x = dataset.card.normalize(images.to(device))
            logits.append(model(_resize(x, 1.0)).float().cpu())
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
    with torch.random.fork_rng(devices=[]):
        for dtype in (torch.float32, torch.bfloat16):
            convolution = nn.Conv2d(32, 32, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
            x = torch.rand(32, 32, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
            seconds[dtype] = min(_step_seconds(convolution, x) for _ in range(5))
    return min(seconds, key=seconds.__getitem__)


def _step_seconds(layer: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad():
        layer(x).sum().backward()
    return time.perf_counter() - start


# What decides a run beside its spec, read when this module is: a later edit of a file must not
# get the credit for what the old code in memory trains.
CODE = code_digest(models, sys.modules[__name__], data.augment, Card.normalize)
