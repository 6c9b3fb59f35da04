"""A fixed set of images with which others are explained."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdx import distance
from kdx.explain.regression import RIDGES, FitWarning, Moments, Regression
from kdx.networks.capture import activations, logits_of
from kdx.networks.stages import evaluating, stages
from kdx.networks.threads import locked
from kdx.networks.vision_transformers import to_grid

NETWORKS = ("student", "base")
DIRECTIONS = {"distilled": (0, 1), "residual": (1, 0)}  # which of NETWORKS is explained, given which
ANSWER = "answer"  # the logits, beside the stages
AT_ONCE = 2**20  # input values whose features are held at a time: 6 images of 224 x 224


class Reference:
    """A fixed set of images with which others are explained, and its features in two networks.

    A map depends on the images that it is compared with; a large, class-balanced set (256 or more,
    ``dataset.limit(256)``) makes it reproducible. What an explanation needs is computed when it is first asked for, and
    kept. Regressions, for :func:`kdx.unexplained`, need sums over the images, whatever their number: about 16 bytes per
    pair of channels while they are fitted. :func:`kdx.unicam` needs the features of all images: 4 bytes each, about
    12 MB per image for two ResNet-50 at 224 x 224. The weights of the networks must not change; if they did, the next
    explanation is refused.

    Args:
        student: Any CNN or plain vision transformer. It runs in evaluation mode and is left as it was found.
        base: Likewise.
        images: (n, c, h, w) with n >= 5, normalised as the networks expect; a pair of tensors where student and base
            expect different inputs.
        layers_student: Stage -> module name; None takes :func:`kdx.stages`.
        layers_base: Likewise.

    Attributes:
        networks: Student and base.
        layers: Of student and base, stage -> module name.
        inputs: Images of student and base.

    Raises:
        ValueError: Fewer than 5 images, or stages that differ between the networks or are not called.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(student, base, images)
        >>> maps = kdx.unexplained(reference, images[:1])
        >>> tuple(maps.distilled["L3"].shape), len(reference)
        ((1, 8, 8), 12)
    """

    def __init__(
        self,
        student: nn.Module,
        base: nn.Module,
        images: Tensor | tuple[Tensor, Tensor],
        *,
        layers_student: Mapping[str, str] | None = None,
        layers_base: Mapping[str, str] | None = None,
    ) -> None:
        self.networks = (student, base)
        self.inputs = both_inputs(images)
        self.layers = tuple(
            stages(network, x) if layers is None else dict(layers)
            for network, x, layers in zip(self.networks, self.inputs, (layers_student, layers_base), strict=True)
        )
        check_stages(*self.layers)
        if (n := len(self.inputs[0])) < 5:
            raise ValueError(f"images: a reference needs at least 5 to compare, got {n}")
        self.features_of(*(x[:1] for x in self.inputs))  # what cannot be had is said now
        self._weights = self._read_weights()

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def stages(self) -> list[str]:
        return list(self.layers[0])

    def features_of(self, *images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Stage -> activations (n, k, h, w) of student and base, from one forward pass of each."""
        captures = []
        for network, x, layers in zip(self.networks, images, self.layers, strict=True):
            found = activations(network, x, layers)
            captures.append({stage: to_grid(stage, layers[stage], output, x) for stage, output in found.items()})
        return {stage: (captures[0][stage].float(), captures[1][stage].float()) for stage in self.stages}

    def answers_of(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Centred logits (n, classes) of student and base."""
        return tuple(centre_logits(logits_to(network, x)) for network, x in zip(self.networks, images, strict=True))

    def check_weights(self) -> None:
        """Raise ValueError if the weights of a network changed since the reference was made.

        Seen are steps of an optimiser, ``load_state_dict``, other modules, tensors or devices, and changes through
        ``.data`` or numpy that touch one of 64 values read from each tensor. A change of a few other values that
        bypasses autograd is not seen.
        """
        for name, then, now in zip(NETWORKS, self._weights, self._read_weights(), strict=True):
            if then != now:
                raise ValueError(
                    f"reference: the weights of the {name} changed, or were moved, after the reference was made; make "
                    "a new kdx.Reference"
                )

    def _read_weights(self) -> list[tuple[Any, ...]]:
        with locked(*self.networks):
            return [weights_mark(network) for network in self.networks]

    def moments(self, images: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, dict[str, Moments]]:
        """Direction -> stage, or ``ANSWER`` -> moments of one network's features and the other's over some of the
        images of student and base, a few at a time."""
        found: dict[str, dict[str, Moments]] = {direction: {} for direction in DIRECTIONS}
        at_once = max(1, AT_ONCE // max(x[0].numel() for x in images))
        for part in rows.split(at_once):
            x = tuple(both[part] for both in images)
            features: dict[str, tuple[Tensor, ...]] = {**self.features_of(*x), ANSWER: self.answers_of(*x)}
            for direction, (explained, given) in DIRECTIONS.items():
                for stage, both in features.items():
                    new = Moments.of(both[explained], both[given])
                    known = found[direction].get(stage)
                    found[direction][stage] = new if known is None else known + new
        return found

    def parts(self, images: tuple[Tensor, Tensor], count: int, seed: int = 0) -> list[dict[str, dict[str, Moments]]]:
        """:meth:`moments` of random parts of the images."""
        order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(seed))
        return [self.moments(images, rows.to(images[0].device)) for rows in order.tensor_split(count)]

    @cached_property
    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Stage -> activations of student and base, (n, k, h, w) each, contiguous."""
        found = self.features_of(*self.inputs)
        return {stage: (both[0].contiguous(), both[1].contiguous()) for stage, both in found.items()}

    @cached_property
    def pooled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Stage -> means over space of the features of student and base, float64 (n, k) each."""
        return {stage: (pool(both[0]), pool(both[1])) for stage, both in self.features.items()}

    @cached_property
    def rows(self) -> dict[str, list[distance.Rows]]:
        """Stage -> flattened features of student and base, from which distances are computed."""
        found: dict[str, list[distance.Rows]] = {}
        for stage, both in self.features.items():
            for network, features in zip(NETWORKS, both, strict=True):
                with naming(f"{stage} of the {network}"):
                    found.setdefault(stage, []).append(distance.Rows(features.flatten(1)))
        return found

    @cached_property
    def distances(self) -> dict[str, Tensor]:
        """Stage -> distances (2, n, n) among the images, of student and base."""
        return {stage: torch.stack([rows.all() for rows in both]) for stage, both in self.rows.items()}

    @cached_property
    def members(self) -> dict[bytes, list[int]]:
        """Digest of an image -> its rows: several, if the image is there more than once."""
        found: dict[bytes, list[int]] = {}
        for row, digest in enumerate(digests(self.inputs[0])):
            found.setdefault(digest, []).append(row)
        return found

    @cached_property
    def regressions(self) -> dict[str, dict[str, Regression]]:
        """Direction -> stage, or ``ANSWER`` -> regression of one network on the other."""
        halves = self.parts(self.inputs, 2)
        found = {
            direction: {stage: Regression.fit([half[direction][stage] for half in halves]) for stage in of}
            for direction, of in halves[0].items()
        }
        warn_if_few(len(self), max(len(of[ANSWER].intercept) for of in found.values()), 6)
        if limited := [f"{stage} ({d})" for d, of in found.items() for stage, fit in of.items() if fit.limited]:
            warnings.warn(
                f"the best ridge strength lies beyond {RIDGES[0]:g} to {RIDGES[-1]:g} of the regressors' variance for "
                f"{', '.join(limited)}, so too much counts as unexplained there; use more reference images",
                FitWarning,
                stacklevel=5,
            )
        return found


def both_inputs(images: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Images for student and base, from images for both or from a pair of equal length."""
    pair = (images, images) if isinstance(images, Tensor) else tuple(images)
    if len(pair) != 2 or len(pair[0]) != len(pair[1]) or not len(pair[0]):
        raise ValueError(f"images: expected a tensor, or a pair of equal length, got {[tuple(x.shape) for x in pair]}")
    return pair


def warn_if_few(n: int, classes: int, stacklevel: int) -> None:
    """Warn if regressions on n images cannot hold for the answers to others."""
    if n < 2 * classes:
        warnings.warn(
            f"{n} reference images for {classes} classes are too few for regressions that hold for other images, "
            "so too much counts as unexplained; use at least two per class",
            FitWarning,
            stacklevel=stacklevel,
        )


def check_stages(student: Mapping[str, str], base: Mapping[str, str]) -> None:
    """Raise ValueError unless both networks have the same stages."""
    if set(student) != set(base):
        raise ValueError(
            f"expected the same stages in both networks, got {', '.join(student)} of the student and "
            f"{', '.join(base)} of the base; name them with layers_student and layers_base"
        )


def pool(features: Tensor) -> Tensor:
    """Means over space: (n, k, h, w) -> float64 (n, k)."""
    return features.mean((2, 3)).double()


def centre_logits(logits: Tensor) -> Tensor:
    """Logits (n, classes) minus their mean over the classes, which softmax does not see."""
    if logits.shape[1] == 1:  # one output stands for two classes
        return logits
    return logits - logits.mean(1, keepdim=True)


@torch.no_grad()
def logits_to(network: nn.Module, images: Tensor) -> Tensor:
    """Logits float32 (n, classes), a few images at a time."""
    with evaluating(network):
        return torch.cat([logits_of(network(x)).float() for x in images.split(64)])


@torch.no_grad()
def weights_mark(network: nn.Module) -> tuple[Any, ...]:
    """Where the parameters and buffers of a network are, how often they were changed in place, and a few values."""
    tensors = [*network.parameters(), *network.buffers()]
    where = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    values = [t.reshape(-1)[:: t.numel() // 64 + 1].cpu() for t in tensors]
    return where, torch.cat(values).numpy().tobytes() if values else b""


def digests(images: Tensor) -> list[bytes]:
    """SHA-256 of each image (n, c, h, w)."""
    return [hashlib.sha256(image.numpy()).digest() for image in images.detach().float().cpu().contiguous()]


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A ValueError inside the block says what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
