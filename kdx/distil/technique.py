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
    """A batch as a network saw it: logits (n, classes), stage -> features (n, k, h, w), and int64 labels (n,)."""

    logits: Tensor
    features: Mapping[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Technique:
    """A way to train. Its fields are its settings, whose names differ between techniques.

    A setting that is None or False is no part of the key of a run, so that an option, off by default, can be added.
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

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        """Where in a network the features of each stage are taken; {} if logits are enough."""
        return {}

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module | None:
        """Layers for these features that are trained with the student and then dropped; None if there are none."""
        return None

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        """The teacher's share of the loss of a batch, a scalar."""
        raise NotImplementedError


def check_weight(value: float, name: str) -> None:
    """Raise ValueError unless a weight is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite weight of at least 0, got {value}")


def check_temperature(value: float, name: str) -> None:
    """Raise ValueError unless a temperature is finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite temperature above 0, got {value}")
