"""The training of a network: everything here decides its weights.

The key of a run covers this file and whatever of kdx it calls, so an edit trains every network anew. Checks, messages,
progress and storage are in :mod:`kdx.distil.fit`, where an edit trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.data.augmentation import augment
from kdx.data.dataset import Dataset
from kdx.distil.checkpoints import put_back, state_of
from kdx.distil.technique import Seen, Technique
from kdx.networks.capture import OverwrittenError, capture
from kdx.networks.devices import autocast, training_kernels
from kdx.networks.stages import Tap, evaluating
from kdx.networks.vision_transformers import to_grid

WARM_UP = 0.2


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum; the learning rate rises and falls linearly.

    Attributes:
        epochs: Passes over the training images; 0 stores the network as it was initialised.
        batch_size: Images per step.
        lr: Peak of the learning rate, which is reached after a share ``WARM_UP`` of the steps.
        momentum: Of SGD, in (0, 1).
        weight_decay: L2 penalty on all weights.
        augmentation: Of training images, see :func:`kdx.data.dataset.augment`; None takes the dataset's own.
        sizes: Image sizes as fractions of the full one, each for an equal share of the steps;
            ``Recipe.PROGRESSIVE`` is quicker and a little less accurate. A teacher always sees full-size images.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augmentation: Mapping[str, Mapping[str, Any]] | None = None
    sizes: tuple[float, ...] = (1.0,)
    PROGRESSIVE: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) for n in (self.epochs, self.batch_size))
        if not whole or self.epochs < 0 or self.batch_size < 2:
            raise ValueError(f"recipe: expected whole numbers epochs >= 0 and batch_size >= 2, got {self}")
        if not 0 < self.lr < math.inf or not 0 < self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(f"recipe: expected 0 < lr, 0 < momentum < 1 and weight_decay >= 0, got {self}")
        if not self.sizes or not all(0 < size <= 1 for size in self.sizes):
            raise ValueError(f"recipe: expected sizes in (0, 1], got {self.sizes}")


def train_epochs(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    parts: Sequence[Technique],
    recipe: Recipe,
    seed: int,
    device: torch.device,
    stepped: Callable[[], object],
    state: Mapping[str, Any] | None = None,
) -> Iterator[tuple[tuple[float, float] | None, dict[str, Any]]]:
    """Train a student in place, epoch by epoch.

    Args:
        student: Network on ``device``.
        teacher: Network on ``device``, for techniques that need one.
        train: Training images, on the CPU.
        parts: The techniques.
        recipe: With its augmentation set.
        seed: Of the order of images, the augmentation, the adapters and whatever techniques draw.
        device: Where to compute.
        stepped: Called after every step, also of fitting.
        state: What the last epoch of a training that was interrupted gave; its epochs are not repeated.

    Yields:
        Mean loss and accuracy (fraction) over the training images of each epoch, as they were augmented, or None after
        an epoch of fitting; and the state, from which the training can go on exactly. It is valid until the next.
    """
    training = _Training(student, teacher, train, parts, recipe, seed, device, stepped)
    fitting = (
        [(i, epoch) for i in training.fitters for epoch in range(parts[i].fitting_epochs)] if recipe.epochs else []
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the augmentation
        done = training.put_back(state) if state else 0
        for epoch in range(done, len(fitting) + recipe.epochs):
            seen = None
            if epoch < len(fitting):
                training.fit_to_teacher(*fitting[epoch])
            else:
                if epoch == len(fitting):  # so that all techniques have the same batches
                    training.generator.manual_seed(seed)
                    torch.manual_seed(seed)
                seen = training.learn(epoch - len(fitting))
            yield seen, training.state(epoch + 1)


class _Training:
    """What changes in a training, and the steps that change it; the arguments are those of :func:`train_epochs`."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, train: Dataset, parts: Sequence[Technique], recipe: Recipe,
        seed: int, device: torch.device, stepped: Callable[[], object],
    ) -> None:  # fmt: skip
        self.student, self.card, self.recipe, self.stepped = student, train.card, recipe, stepped
        self.labels, self.images = train.labels.to(device), train.images.to(device)
        self.objective = _Objective(parts, student, teacher, train.card.normalize(self.images[:2]), self.labels, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = len(train) // recipe.batch_size
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *self.objective.adapters.parameters()],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=True,
            weight_decay=recipe.weight_decay,
            fused=device.type != "mps",
        )
        total = max(self.steps * recipe.epochs, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: triangle(step, total))
        self.fitters = self.objective.fitters(recipe)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images of an epoch, and their rows."""
        size, augmentation = self.recipe.batch_size, self.recipe.augmentation or {}
        order = torch.randperm(len(self.images), generator=self.generator)[: self.steps * size]
        for rows in order.to(self.images.device).split(size):
            yield self.card.normalize(augment(self.images[rows], augmentation)), rows

    def fit_to_teacher(self, i: int, epoch: int) -> None:
        """An epoch in which the adapter of technique i learns from the teacher alone."""
        self.objective.fit_to_teacher(i, epoch, self.fitters[i], self.batches, self.stepped)

    def learn(self, epoch: int) -> tuple[float, float]:
        """An epoch of the student: its mean loss and accuracy."""
        self.student.train()
        sizes, total = self.recipe.sizes, self.steps * self.recipe.epochs
        seen = torch.zeros(2, device=self.labels.device)  # summed loss, correct
        with self.objective.watching(), training_kernels(self.student):
            for step, (x, rows) in enumerate(self.batches(), epoch * self.steps):
                y, scale = self.labels[rows], sizes[step * len(sizes) // total]
                logits, loss = self.objective(x, rows, scale)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                seen += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
                self.stepped()
        loss_sum, correct = (seen / (self.steps * self.recipe.batch_size)).tolist()
        return loss_sum, correct

    def state(self, epochs: int) -> dict[str, Any]:
        """All that the rest of the training depends on, after so many epochs."""
        return state_of(self._parts, self.generator, epochs) | {"draws": self.objective.draws}

    def put_back(self, state: Mapping[str, Any]) -> int:
        """Go back to a state; how many epochs are done."""
        self.objective.draws = state["draws"]
        return put_back(state, self._parts, self.generator)

    @property
    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"student": self.student, "adapters": self.objective.adapters}
        parts |= {"optimizer": self.optimizer, "schedule": self.schedule}
        return parts | {f"fitter {i}": fitter for i, fitter in self.fitters.items()}


def triangle(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a fraction of its peak: never 0, in one step 1."""
    peak = max(1, round(WARM_UP * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def resize(images: Tensor, scale: float) -> Tensor:
    """Images (n, c, h, w) at a fraction of their size, in channels-last memory format."""
    if scale < 1:
        size = [round(side * scale) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return images.contiguous(memory_format=torch.channels_last)


class _Objective:
    """The loss of a student: joined techniques, and the views and features that they need from both networks.

    ``images`` are a few of the training images, ``labels`` those of all.
    """

    def __init__(
        self, parts: Sequence[Technique], student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor,
        seed: int,
    ) -> None:  # fmt: skip
        self.parts, self.labels = parts, labels
        self.networks = [network for network in (student, teacher) if network is not None]
        self.label_weight = math.prod(part.label_weight for part in parts)
        self.label_smoothing = max(part.label_smoothing for part in parts)
        self.taps = find_taps(parts, self.networks, images)
        self.captured: list[list[dict[str, Tensor]]] = []
        self.copy = False  # unless layers that work in place follow a tap
        self.adapters = nn.ModuleList()
        self.draws = torch.get_rng_state()  # of the techniques, apart from those of the augmentation
        if teacher is None:
            return
        x, sizes = self._views(images)
        try:
            with self.watching():
                self._answers(x)
        except OverwrittenError:
            self.copy = True
        with self.watching(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            logits, rows = self._answers(x), torch.arange(len(images), device=images.device)
            for i, part in enumerate(parts):
                seen = [self._seen(i, which, logits[which], x, sizes, rows) for which in (0, 1)]
                self.adapters.append(part.adapter(seen[0], seen[1], self.taps[i][1]) or nn.Identity())
            self.draws = torch.get_rng_state()
        self.adapters.to(images.device)

    def _views(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """A batch followed by the further views of each technique, and how many there are of each."""
        views = [part.views(x) for part in self.parts]
        return torch.cat([x, *views]) if any(map(len, views)) else x, [len(x), *map(len, views)]

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

    def _seen(self, i: int, which: int, logits: Tensor, x: Tensor, sizes: list[int], rows: Tensor) -> Seen:
        """What the student (0) or the teacher (1) sees of the latest batch, in float32, for technique i."""
        grids = {
            stage: to_grid(stage, tap.module, self.captured[i][which][stage], x).float()
            for stage, tap in self.taps[i][which].items()
        }
        (first, *others), n = logits.split(sizes), sizes[0]
        views = None
        if m := sizes[1 + i]:
            mine = {stage: grid.split(sizes)[1 + i] for stage, grid in grids.items()}
            views = Seen(others[i], mine, rows.repeat(m // n), self.labels)
        return Seen(first, {stage: grid[:n] for stage, grid in grids.items()}, rows, self.labels, views)

    def fitters(self, recipe: Recipe) -> dict[int, torch.optim.SGD]:
        """The optimizer of each technique whose adapter learns from the teacher alone before."""
        return {
            i: torch.optim.SGD(
                self.adapters[i].parameters(), part.fitting_lr, recipe.momentum, weight_decay=recipe.weight_decay
            )
            for i, part in enumerate(self.parts)
            if part.fitting_epochs
        }

    def fit_to_teacher(
        self, i: int, epoch: int, fitter: torch.optim.SGD, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        stepped: Callable[[], object],
    ) -> None:  # fmt: skip
        """Fit the adapter of technique i to the teacher for one epoch; ``batches`` gives those, with their rows."""
        part = self.parts[i]
        fitter.param_groups[0]["lr"] = part.fitting_lr * 0.1 ** (3 * epoch // part.fitting_epochs)
        with self.watching():
            for images, rows in batches():
                x, sizes = self._views(images)
                with torch.no_grad(), autocast(x.device):
                    logits = self.networks[1](resize(x, 1.0)).float()
                loss = part.fitting(self._seen(i, 1, logits, x, sizes, rows), self.adapters[i])
                fitter.zero_grad()
                loss.backward()
                fitter.step()
                stepped()
        if not loss.isfinite():
            raise FloatingPointError(f"{part.name}: the loss is {loss} when it is fitted to the teacher")

    def __call__(self, images: Tensor, rows: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The student's logits for a batch that it sees at a fraction ``scale`` of its size, and its loss."""
        student, *teacher = self.networks
        x, sizes = self._views(images)
        with autocast(x.device):
            logits = [student(resize(x, scale)).float()]
            with torch.no_grad():  # what inference mode gives could not enter the loss without a copy
                logits += [network(resize(x, 1.0)).float() for network in teacher]
        answers = logits[0][: len(images)]
        loss = F.cross_entropy(answers, self.labels[rows], label_smoothing=self.label_smoothing) * self.label_weight
        if not teacher:
            return answers, loss
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.draws)
            for i, (part, adapter) in enumerate(zip(self.parts, self.adapters, strict=True)):
                seen = [self._seen(i, which, logits[which], x, sizes, rows) for which in (0, 1)]
                loss = loss + part.guidance(seen[0], seen[1], adapter)
            self.draws = torch.get_rng_state()
        return answers, loss


def find_taps(parts: Sequence[Technique], networks: Sequence[nn.Module], images: Tensor) -> list[list[dict[str, Tap]]]:
    """Where each technique takes the features of each network, at the same stages in student and teacher.

    Raises:
        ValueError: Student and teacher have different stages.
    """
    found = [[part.taps(network, images) for network in networks] for part in parts]
    for part, taps in zip(parts, found, strict=True):
        if len({tuple(tap) for tap in taps}) > 1:
            stages = " and ".join(", ".join(tap) for tap in taps)
            raise ValueError(f"{part.name}: expected the same stages in student and teacher, got {stages}")
    return found
