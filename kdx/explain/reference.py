"""A fixed set of images with which others are explained."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from kdx import distance
from kdx.explain.regression import Regression
from kdx.networks.capture import activations, logits_of
from kdx.networks.stages import evaluating, stages
from kdx.networks.tokens import to_grid

NETWORKS = ("student", "base")
DIRECTIONS = {"distilled": (0, 1), "residual": (1, 0)}  # which of NETWORKS is explained, given which
ANSWER = "answer"  # the logits, beside the stages


class Reference:
    """A fixed set of images with which others are explained, and its features in two networks.

    A map depends on the images that it is compared with; a large, class-balanced set (256 or more,
    ``dataset.limit(256)``) makes it reproducible. The features of all stages of both networks are computed once and
    stay in memory: 4 bytes each, about 12 MB per image for two ResNet-50 at 224 x 224. So do regressions and
    distances once they were asked for; the networks must not change afterwards.

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
        features: Stage -> activations of student and base, (n, k, h, w) each.

    Raises:
        ValueError: Fewer than 5 images, or stages that differ between the networks.

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
        self.features = self.features_of(*self.inputs)

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
        return tuple(_answers(network, x) for network, x in zip(self.networks, images, strict=True))

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
    def members(self) -> dict[bytes, int]:
        """Digest of an image -> its row."""
        return {digest: row for row, digest in enumerate(digests(self.inputs[0]))}

    @cached_property
    def regressions(self) -> dict[str, dict[str, Regression]]:
        """Direction -> stage, or ``ANSWER`` -> regression of one network on the other."""
        answers = self.answers_of(*self.inputs)
        if len(self) < 2 * max(z.shape[1] for z in answers):
            warnings.warn(
                f"{len(self)} reference images for {answers[0].shape[1]} classes are too few for regressions that hold "
                "for other images, so too much counts as unexplained; use at least two per class",
                stacklevel=4,
            )
        of = {**self.features, ANSWER: answers}
        return {
            direction: {stage: Regression.fit(both[explained], both[given]) for stage, both in of.items()}
            for direction, (explained, given) in DIRECTIONS.items()
        }


def both_inputs(images: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Images for student and base, from images for both or from a pair of equal length."""
    pair = (images, images) if isinstance(images, Tensor) else tuple(images)
    if len(pair) != 2 or len(pair[0]) != len(pair[1]) or not len(pair[0]):
        raise ValueError(f"images: expected a tensor, or a pair of equal length, got {[tuple(x.shape) for x in pair]}")
    return pair


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
def _answers(network: nn.Module, images: Tensor) -> Tensor:
    with evaluating(network):
        return torch.cat([centre_logits(logits_of(network(x)).float()) for x in images.split(64)])


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
