"""Training a network once: on labels alone, or with the help of a teacher.

:func:`fit` trains one network with one of the ``TECHNIQUES``, or several joined, and keeps the result in the run
store, so the same training is never done twice.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.data.augmentation import compose
from kdx.data.dataset import Card, Dataset
from kdx.distil.checkpoints import Kept
from kdx.distil.run_store import Run, code_digest, find_run, find_shipped, run_key, store_run
from kdx.distil.technique import Technique
from kdx.distil.techniques import TECHNIQUES, find_techniques
from kdx.distil.training import Recipe, resize, train_epochs
from kdx.networks import models
from kdx.networks.capture import forward
from kdx.networks.devices import autocast, autocast_dtype, device_name, pick_device, placed, training_kernels
from kdx.networks.stages import evaluating
from kdx.paths import alone
from kdx.progress import progress

RECIPE = 1  # raise it when shipped networks are to be trained anew, since an edit of the code does not orphan them

# The code that moves weights, read now: an edit made later must not be credited with what this process trains.
CODE = code_digest(train_epochs, Card.normalize, models.build)
for known in (*TECHNIQUES.values(), *(make for make, _ in models.MODELS.values())):
    code_digest(known)


def fit(
    model: str,
    train: Dataset,
    validation: Dataset,
    *,
    technique: str = "label",
    teacher: Run | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    batch_seed: int | None = None,
    stem: str = "small",
    width: float | None = None,
    device: str = "auto",
    **settings: Any,
) -> Run:
    """Train a registered network, or load the run if this very training was done before.

    The weights of the last epoch are kept; ``validation`` is only watched. A training that was killed goes on after
    its last epoch.

    Args:
        model: Name of a network, as for :func:`kdx.build`.
        train: Training images.
        validation: Images on which the network is evaluated after each epoch.
        technique: A name from ``TECHNIQUES``, or several as in ``"response+attention"``, in any order.
        teacher: The run to learn from, for every technique but ``"label"`` and ``"smoothing"``. It may be of another
            width, depth or family.
        recipe: How to train; None takes the defaults of :class:`kdx.Recipe`.
        seed: Of the initial weights.
        batch_seed: Of the order of the batches and the augmentation; None takes ``seed``.
        stem: As for :func:`kdx.build`.
        width: As for :func:`kdx.build`, for a model whose name does not carry its width.
        device: ``"auto"`` (CUDA, else MPS, else CPU) or a torch device. Only its precision is part of the run's key.
        **settings: Parameters of the techniques.

    Returns:
        The run, with ``.model`` and ``.history``: loss and accuracy per epoch and split.

    Raises:
        ValueError: Arguments that do not fit each other.
        FloatingPointError: The training loss is not finite.

    Examples:
        >>> import kdx
        >>> images = kdx.load_dataset("shapes", "train", limit=40, size=32)
        >>> setting = dict(recipe=kdx.Recipe(epochs=1, batch_size=20), stem="small", width=0.125, device="cpu")
        >>> teacher = kdx.fit("resnet10", images, images, **setting)
        >>> student = kdx.fit("resnet10", images, images, technique="response", teacher=teacher, **setting)
        >>> student.history["split"].unique().tolist()
        ['train', 'validation']
    """
    job = Job(
        model, train, validation, technique, teacher, recipe or Recipe(), seed, batch_seed, stem, width, device,
        settings,
    )  # fmt: skip
    return job.find() or job.run()


@dataclass(frozen=True, eq=False)
class Job:
    """One training, checked but not yet done. The arguments are those of :func:`fit`.

    Raises:
        ValueError: Arguments that do not fit each other.
    """

    model: str
    train: Dataset
    validation: Dataset
    technique: str = "label"
    teacher: Run | None = None
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    batch_seed: int | None = None
    stem: str = "small"
    width: float | None = None
    device: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        train, recipe, teacher = self.train, self.recipe, self.teacher
        needs_teacher = any(part.needs_teacher for part in self.parts)
        if needs_teacher != (teacher is not None):
            wants = "a teacher run" if needs_teacher else "no teacher"
            raise ValueError(f"technique {self.technique!r} expects {wants}, got {teacher!r}")
        if len(train) < recipe.batch_size:
            raise ValueError(f"expected at least one batch of {recipe.batch_size} training images, got {len(train)}")
        if not len(self.validation):
            raise ValueError("expected at least one validation image, got none")
        if min(train.card.size[1:]) * min(recipe.sizes) < 8:
            raise ValueError(f"recipe: expected images of 8 pixels or more for {train.card.name}, got {recipe}")
        if self.batch_seed is None:
            object.__setattr__(self, "batch_seed", self.seed)
        if recipe.augmentation is None:
            object.__setattr__(self, "recipe", replace(recipe, augmentation=train.card.augmentation))
        compose(self.recipe.augmentation or {}, train.card.size[1:])
        pick_device(self.device)
        if teacher and teacher.classes != train.classes:
            raise ValueError(
                f"expected a teacher of the classes {', '.join(train.classes)}, got one of {', '.join(teacher.classes)}"
            )

    @cached_property
    def parts(self) -> list[Technique]:
        return find_techniques(self.technique, self.settings)

    @cached_property
    def architecture(self) -> dict[str, Any]:
        return models.architecture_of(self.model, len(self.train.classes), self.stem, self.width)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What defines the training beside the code, as JSON literals."""
        card = self.train.card
        return {
            "model": self.architecture,
            "technique": {
                "name": "+".join(part.name for part in self.parts),
                **{
                    name: value
                    for part in self.parts
                    for name, value in asdict(part).items()
                    if value is not None and value is not False  # an option that is off leaves no trace
                },
            },
            "teacher": self.teacher.key if self.teacher else None,
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "batch_seed": self.batch_seed,
            "classes": self.train.classes,
            "train": self.train.fingerprint,
            "validation": self.validation.fingerprint,
            "input": {"size": card.size, "mean": card.mean, "std": card.std},
        }

    @cached_property
    def key(self) -> str:
        """The key of the run: of the spec, the code that moves the weights, the precision, and torch's version."""
        make, _ = models.MODELS[self.architecture["name"]]
        code = CODE + code_digest(make) + code_digest(*map(type, self.parts))
        return run_key(self.spec | {"precision": self.precision, "torch": torch.__version__.partition("+")[0]}, code)

    @property
    def precision(self) -> str:
        """``"float32"`` or ``"bfloat16"``, see :func:`kdx.networks.devices.autocast_dtype`."""
        return str(autocast_dtype(pick_device(self.device))).removeprefix("torch.")

    @cached_property
    def digest(self) -> str:
        """Of the specification alone, by which shipped networks are found; what is only watched plays no part."""
        spec = {name: value for name, value in self.spec.items() if name != "validation"}
        return run_key(spec | {"teacher": self.teacher and self.teacher.digest}, f"recipe {RECIPE}")

    def find(self) -> Run | None:
        """The network, if this training was done before or its network is shipped."""
        return find_run(self.key) or find_shipped(self.digest)

    @property
    def fitting_epochs(self) -> int:
        """Epochs of what its techniques fit to the teacher before the training."""
        return sum(part.fitting_epochs for part in self.parts) if self.recipe.epochs else 0

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // self.recipe.batch_size

    @property
    def steps(self) -> int:
        """Of the whole training, with those of fitting."""
        return (self.fitting_epochs + self.recipe.epochs) * self.batches

    def seconds_left(self, of_steps: tuple[float, float]) -> float:
        """Seconds that the training will take, roughly, without the epochs that were done before it was interrupted.

        Args:
            of_steps: From :meth:`seconds_of_steps`.
        """
        done = Kept(self.key, pick_device(self.device)).epochs
        fitting = max(self.fitting_epochs - done, 0)
        training = self.recipe.epochs - max(done - self.fitting_epochs, 0)
        return self.batches * (fitting * of_steps[0] + training * of_steps[1])

    def seconds_of_steps(self) -> tuple[float, float]:
        """Seconds of a step of fitting, in which only the teacher runs, and of a step of training, timed here."""
        device, recipe = pick_device(self.device), self.recipe
        student = models.build(**self.architecture, seed=0).to(device).train()
        teacher = copy.deepcopy(self.teacher.model).to(device).eval() if self.teacher else nn.Identity()
        x = torch.zeros(recipe.batch_size, *self.train.card.size, device=device)
        x = resize(torch.cat([x, *(part.views(x) for part in self.parts)]), 1.0)

        @torch.no_grad()
        def guide() -> None:
            teacher(x)

        def learn(scale: float) -> None:
            student(resize(x, scale)).float().sum().backward()

        def spent(step: Callable[[], object]) -> float:
            for _ in range(2):  # the first warms up
                start = time.perf_counter()
                with autocast(device), training_kernels(student):
                    step()
                    float(x.sum())  # waits for the device
            return time.perf_counter() - start

        guided = spent(guide)
        learned = {scale: spent(partial(learn, scale)) for scale in set(recipe.sizes)}
        return guided, guided + sum(learned[scale] for scale in recipe.sizes) / len(recipe.sizes)

    def run(self) -> Run:
        """Train, and store the run; if another process is at it, wait for its run."""
        with alone(self.key):
            return find_run(self.key) or self._train_and_store()

    def _train_and_store(self) -> Run:
        device = pick_device(self.device)
        card = self.train.card
        student = models.build(**self.architecture, seed=self.seed)
        kept = Kept(self.key, device)
        try:
            history = self._train(student, device, kept)
        except FloatingPointError:
            kept.drop()
            raise
        header = {
            "classes": self.train.classes,
            "mean": card.mean,
            "std": card.std,
            "metrics": history[history["epoch"] == self.recipe.epochs].to_dict("records"),
        }
        run = store_run(
            self.key,
            self.spec,
            student,
            history,
            header,
            digest=self.digest,
            dataset=card.name,
            device=device_name(device),
            precision=self.precision,
            seconds=round(kept.seconds, 1),
        )
        kept.drop()
        return run

    def _train(self, student: models.Network, device: torch.device, kept: Kept) -> pd.DataFrame:
        """Train ``student`` in place, from where it was left off; return the history."""
        earlier = kept.load()
        records = earlier.pop("records", [])
        network = f"{self.architecture['name']}@{self.architecture['width']:g}"
        role = f"{network} ({self.spec['technique']['name']}, seed {self.seed})"
        helper = self.teacher.model if self.teacher else nn.Identity()
        student.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        done = earlier.get("epochs", 0) * self.batches
        with progress(total=self.steps, initial=done, desc=role, unit="batch") as bar, placed(helper, device):
            helper.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for seen, state in train_epochs(
                student, helper if self.teacher else None, self.train, self.parts, self.recipe, self.spec["batch_seed"],
                device, bar.update, earlier,
            ):  # fmt: skip
                if seen:
                    epoch = 1 + len(records) // 2
                    if not seen[0] < float("inf"):  # also NaN
                        raise FloatingPointError(
                            f"the training loss of {role} is {seen[0]} in epoch {epoch}; lower the learning rate "
                            f"(now {self.recipe.lr})"
                        )
                    held_out = evaluate(student, self.validation, device)
                    records += [
                        {"epoch": epoch, "split": "train", "loss": seen[0], "accuracy": seen[1]},
                        {"epoch": epoch, "split": "validation", "loss": held_out.loss, "accuracy": held_out.accuracy},
                    ]
                if len(records) < 2 * self.recipe.epochs:
                    kept.save(state | {"records": records})
        student.to("cpu").to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        return pd.DataFrame(records, columns=["epoch", "split", "loss", "accuracy"])


@dataclass(frozen=True)
class Evaluation:
    """A network's answers to a dataset.

    Attributes:
        loss: Mean cross-entropy in nats.
        accuracy: As a fraction.
        logits: float32 (n, classes).
    """

    loss: float
    accuracy: float
    logits: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Evaluation:
        """Loss and accuracy of logits (n, classes) against labels (n,)."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise ValueError(
                f"labels: expected 0 to {logits.shape[1] - 1}, the outputs of the network, got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return cls(F.cross_entropy(logits, labels).item(), accuracy, logits)

    @property
    def predictions(self) -> Tensor:
        """int64 (n,): the class with the largest logit."""
        return self.logits.argmax(1)


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    device: str | torch.device = "auto",
    batch_size: int = 100,
    scale: float = 1.0,
) -> Evaluation:
    """Run a network over a dataset in evaluation mode.

    Args:
        model: It is left on the device, and in the mode, in which it was found.
        dataset: Images and labels.
        device: Where to compute, as for :func:`kdx.fit`.
        batch_size: Images per forward pass.
        scale: Fraction of their size to which images are shrunk, as in :class:`Recipe`.

    Returns:
        Loss, accuracy and logits.

    Raises:
        ValueError: Labels for which the network has no output.
    """
    device = pick_device(device)
    logits = []
    with placed(model, device), torch.inference_mode(), evaluating(model), autocast(device):
        for images in dataset.images.split(batch_size):
            x = dataset.card.normalize(images.to(device))
            logits.append(forward(model, resize(x, scale)).float().cpu())
    return Evaluation.of(torch.cat(logits).clone(), dataset.labels)
