"""What a way to train says of itself, and what it sees of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kdx.networks.stages import Tap


@dataclass(frozen=True)
class Seen:
    """A batch as a network saw it.

    Attributes:
        logits: float32 (n, classes).
        features: Stage -> float32 (n, k, h, w).
        rows: int64 (n,): which of the training images these are.
        all_labels: int64, the labels of all training images.
        views: The same of the further views that the technique asked for with :meth:`Technique.views`, if it did.
    """

    logits: Tensor
    features: Mapping[str, Tensor]
    rows: Tensor
    all_labels: Tensor
    views: Seen | None = None

    @property
    def labels(self) -> Tensor:
        """int64 (n,)"""
        return self.all_labels[self.rows]


@dataclass(frozen=True)
class Technique:
    """A way to train. Its fields are its settings, whose names differ between techniques.

    A setting that is None or False is no part of the key of a run, so that an option, off by default, can be added.
    What a technique learns beside the student, such as heads and banks, it keeps in its ``adapter``. What it draws, it
    draws from torch's global generator of the CPU, which the training seeds.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    @property
    def label_weight(self) -> float:
        """Factor on the cross-entropy with the labels."""
        return 1.0

    @property
    def label_smoothing(self) -> float:
        """Weight of all classes alike in the labels, as torch's."""
        return 0.0

    @property
    def fitting_epochs(self) -> int:
        """Passes over the training images before the student's training, in which :meth:`fitting` is minimised."""
        return 0

    @property
    def fitting_lr(self) -> float:
        """Learning rate of these passes, which is divided by ten after each third of them."""
        return 0.1

    def views(self, images: Tensor) -> Tensor:
        """Further views that both networks are to see, image after image in the order of the batch, as often as it
        takes: (n, c, h, w) -> (a multiple of n, c, h, w); by default none."""
        return images[:0]

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        """Where in a network the features of each stage are taken; {} if logits are enough."""
        return {}

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module | None:
        """Layers for these features that are trained with the student and then dropped; None if there are none."""
        return None

    def fitting(self, teacher: Seen, adapter: nn.Module) -> Tensor:
        """The loss of a batch before the student's training: of layers of the adapter that depend on the teacher alone.

        ``guidance`` then uses them without gradients, so that they stay as they are.
        """
        raise NotImplementedError

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        """The teacher's share of the loss of a batch, a scalar."""
        raise NotImplementedError


def check_weight(value: float, name: str) -> None:
    """Raise ValueError unless a weight is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite weight of at least 0, got {value}")


def check_whole(value: int, name: str, least: int) -> None:
    """Raise ValueError unless a number is whole and large enough."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_temperature(value: float, name: str) -> None:
    """Raise ValueError unless a temperature is finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite temperature above 0, got {value}")
