"""Training a detector once: on boxes alone, or with the help of a teacher; the sibling of :mod:`kdx.distil.fit`.

:func:`fit_detector` keeps its result in the same run store. A training that was interrupted goes on where its last
epoch ended, and gives the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kdx.data.detection import Detection
from kdx.distil.checkpoints import Kept
from kdx.distil.detector_techniques import DETECTOR_TECHNIQUES
from kdx.distil.detector_training import train_detector
from kdx.distil.fit import Job
from kdx.distil.run_store import Run, code_digest, find_run, find_shipped, run_key, store_run
from kdx.distil.technique import Technique
from kdx.distil.training import Recipe
from kdx.networks.devices import autocast_dtype, device_name, pick_device
from kdx.networks.fpn_detectors import Detector, architecture_of_detector, build_detector, inherit
from kdx.networks.stages import evaluating
from kdx.paths import alone
from kdx.progress import progress

RECIPE = 1  # raise it when shipped detectors are to be trained anew
CODE = code_digest(train_detector, build_detector, inherit)  # read now, as in kdx.distil.fit


def fit_detector(
    backbone: str,
    train: Detection,
    *,
    technique: str = "label",
    teacher: Run | None = None,
    start: Run | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    kind: str = "fcos",
    channels: int = 32,
    device: str = "auto",
    **settings: Any,
) -> Run:
    """Train a detector, or load the run if this very training was done before.

    Args:
        backbone: Name of a network, as for :func:`kdx.build_detector`.
        train: Training images. The weights of the last epoch are kept.
        technique: ``"label"``, ``"fgd"`` or ``"prior"``.
        teacher: The run to learn from, for every technique but ``"label"``. Its pyramid has levels of the same size.
        start: A run whose neck and head the detector starts with, as far as their shapes agree; None takes those of
            the teacher. Give it to a student without a teacher, so that it starts as the distilled ones do.
        recipe: How to train; None takes 20 epochs of batches of 8 at a peak of 0.02. Its sizes and augmentation play
            no part: images are mirrored.
        seed: Of the initial weights and the order of images.
        kind: As for :func:`kdx.build_detector`.
        channels: Likewise.
        device: As for :func:`kdx.fit`.
        **settings: Parameters of the technique.

    Returns:
        The run, with ``.model`` and ``.history``: loss per epoch.

    Raises:
        ValueError: Arguments that do not fit each other.
        FloatingPointError: The training loss is not finite.
    """
    job = DetectorJob(
        backbone, train, technique, teacher, start or teacher, recipe or Recipe(20, 8, 0.02), seed, kind, channels,
        device, settings,
    )  # fmt: skip
    return job.find() or job.run()


@dataclass(frozen=True, eq=False)
class DetectorJob:
    """One training, checked but not yet done. The arguments are those of :func:`fit_detector`.

    Raises:
        ValueError: Arguments that do not fit each other.
    """

    backbone: str
    train: Detection
    technique: str
    teacher: Run | None
    start: Run | None
    recipe: Recipe
    seed: int = 0
    kind: str = "fcos"
    channels: int = 32
    device: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part.needs_teacher != (self.teacher is not None):
            wants = "a teacher run" if self.part.needs_teacher else "no teacher (a start at most)"
            raise ValueError(f"technique {self.technique!r} expects {wants}, got {self.teacher!r}")
        if len(self.train) < self.recipe.batch_size:
            raise ValueError(f"expected at least {self.recipe.batch_size} training images, got {len(self.train)}")
        for role, run in (("teacher", self.teacher), ("start", self.start)):
            if run and run.classes != self.train.classes:
                raise ValueError(f"expected a {role} of the classes {self.train.classes}, got one of {run.classes}")
            if run and "kind" not in run.manifest["spec"]["model"]:
                raise ValueError(f"expected a detector as {role}, got a classifier")

    @cached_property
    def part(self) -> Technique:
        if self.technique not in DETECTOR_TECHNIQUES:
            raise ValueError(
                f"unknown technique for detectors {self.technique!r}; choose from: {', '.join(DETECTOR_TECHNIQUES)}"
            )
        make = DETECTOR_TECHNIQUES[self.technique]
        choices = [field.name for field in fields(make)]
        if strange := sorted(set(self.settings) - set(choices)):
            raise ValueError(
                f"unknown settings of {self.technique!r}: {', '.join(strange)}; choose from: "
                f"{', '.join(choices) or 'none'}"
            )
        return make(**self.settings)

    @cached_property
    def architecture(self) -> dict[str, Any]:
        return architecture_of_detector(
            self.kind, self.backbone, len(self.train.classes), self.train.size, self.channels
        )

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What defines the training beside the code, as JSON literals."""
        return {
            "model": self.architecture,
            "technique": {"name": self.technique, **asdict(self.part)},
            "teacher": self.teacher.key if self.teacher else None,
            "start": self.start.key if self.start else None,
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "classes": self.train.classes,
            "train": self.train.fingerprint,
            "input": {"size": [3, *self.train.size], "mean": [0.0] * 3, "std": [1.0] * 3},
        }

    @cached_property
    def key(self) -> str:
        """The key of the run, as of :attr:`kdx.distil.fit.Job.key`."""
        facts = {"precision": self.precision, "torch": torch.__version__.partition("+")[0]}
        return run_key(self.spec | facts, CODE + code_digest(*map(type, [self.part])))

    @property
    def precision(self) -> str:
        return str(autocast_dtype(pick_device(self.device))).removeprefix("torch.")

    @cached_property
    def digest(self) -> str:
        """Of the specification alone, by which shipped detectors are found."""
        others = {"teacher": self.teacher and self.teacher.digest, "start": self.start and self.start.digest}
        return run_key(self.spec | others, f"detector {RECIPE}")

    @property
    def steps(self) -> int:
        """Batches of the whole training."""
        return self.recipe.epochs * (len(self.train) // self.recipe.batch_size)

    def find(self) -> Run | None:
        """The detector, if this training was done before or it is shipped."""
        return find_run(self.key) or find_shipped(self.digest)

    def run(self) -> Run:
        """Train, and store the run; if another process is at it, wait for its run."""
        with alone(self.key):
            return find_run(self.key) or self._train_and_store()

    def _train_and_store(self) -> Run:
        device = pick_device(self.device)
        student = build_detector(**self.architecture, seed=self.seed)
        if self.start:
            inherit(student, self.start.model)
        kept = Kept(self.key, device)
        try:
            history = self._train(student.to(device), kept)
        except FloatingPointError:
            kept.drop()
            raise
        header = {"classes": self.train.classes, "mean": [0.0] * 3, "std": [1.0] * 3}
        run = store_run(
            self.key,
            self.spec,
            student.cpu().eval(),
            history,
            header,
            digest=self.digest,
            dataset=self.train.card.name,
            device=device_name(device),
            precision=self.precision,
            seconds=round(kept.seconds, 1),
        )
        kept.drop()
        return run

    def _train(self, student: Detector, kept: Kept) -> pd.DataFrame:
        """Train ``student`` in place, from where it was left off; return the history."""
        earlier = kept.load()
        losses = earlier.pop("losses", [])
        device = next(student.parameters()).device
        helper = self.teacher.model.to(device) if self.teacher else None
        steps = len(self.train) // self.recipe.batch_size
        role = f"{self.kind} on {self.backbone} ({self.technique}, seed {self.seed})"
        with progress(total=steps * self.recipe.epochs, initial=steps * len(losses), desc=role, unit="batch") as bar:
            for loss, state in train_detector(
                student, helper, self.train, self.part, self.recipe, self.seed, bar.update, earlier
            ):
                losses.append(loss)
                if not loss < float("inf"):  # also NaN
                    raise FloatingPointError(
                        f"the training loss of {role} is {loss} in epoch {len(losses)}; lower the learning rate (now "
                        f"{self.recipe.lr})"
                    )
                if len(losses) < self.recipe.epochs:
                    kept.save(state | {"losses": losses})
        epochs = range(1, len(losses) + 1)
        return pd.DataFrame({"epoch": epochs, "split": "train", "loss": losses}, columns=["epoch", "split", "loss"])


AnyJob = Job | DetectorJob


def detect(detector: nn.Module, images: Tensor, batch_size: int = 16) -> list[dict[str, Tensor]]:
    """What a detector finds.

    Args:
        detector: Of torchvision. It runs in evaluation mode and is left as it was found.
        images: uint8 (n, 3, h, w).
        batch_size: Images per forward pass.

    Returns:
        Of each image: boxes float32 (m, 4; left, top, right, bottom in pixels), labels int64 (m,) and scores (m,) in
        0..1, falling.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 images, got {images.dtype}")
    device = next(detector.parameters()).device
    found: list[dict[str, Tensor]] = []
    with torch.inference_mode(False), torch.no_grad(), evaluating(detector):
        for chunk in images.split(batch_size):
            found += [
                {name: value.cpu() for name, value in of_image.items()}
                for of_image in detector(list(chunk.to(device) / 255))
            ]
    return found
