"""A fixed set of images with which others are explained."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdx import distance
from kdx.explain.regression import RIDGES, Beyond, FitWarning, Moments, Regression, resample
from kdx.networks.capture import activations, forward, logits_of
from kdx.networks.stages import evaluating, stages
from kdx.networks.threads import locked
from kdx.networks.vision_transformers import to_grid

NETWORKS = ("student", "base")
DIRECTIONS = {"distilled": (0, 1), "residual": (1, 0)}  # which of NETWORKS is explained, given which
HANDED_OVER = {"student": (0, 1, 2), "teacher": (2, 1, 0)}  # of student, base and teacher; the last beyond the second
ANSWER = "answer"  # the logits, beside the stages
Network = nn.Module | Callable[[Tensor], Any]
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
        images: (n, c, h, w) with n >= 5, normalised as the networks expect; a tuple of tensors, one for each network,
            where they expect different inputs.
        teacher: For :func:`kdx.transferred`. Any network, with any classes; or a function that returns logits, or
            log-probabilities, for images, such as a call of a service. Of a function, and of a network without stages
            of the student's names, only the answers are used.
        layers_student: Stage -> module name; None takes :func:`kdx.stages`.
        layers_base: Likewise.
        layers_teacher: Likewise; empty takes the answers only.

    Attributes:
        networks: Student, base and, if given, teacher.
        layers: Of each, stage -> module name.
        inputs: Images of each.

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
        images: Tensor | tuple[Tensor, ...],
        *,
        teacher: Network | None = None,
        layers_student: Mapping[str, str] | None = None,
        layers_base: Mapping[str, str] | None = None,
        layers_teacher: Mapping[str, str] | None = None,
    ) -> None:
        networks: list[Any] = [student, base]  # modules, but for a teacher that is a function
        given = [layers_student, layers_base]
        if teacher is not None:
            if teacher in (student, base):
                raise ValueError("teacher: expected a third network, got the student or the base")
            networks.append(teacher)
            given.append(layers_teacher if isinstance(teacher, nn.Module) else {})
        self.networks = tuple(networks)
        self.inputs = inputs_of(images, len(networks))
        self.layers = tuple(
            stages(network, x) if layers is None else dict(layers)
            for network, x, layers in zip(networks, self.inputs, given, strict=True)
        )
        check_stages(*self.layers[:2])
        if (n := len(self.inputs[0])) < 5:
            raise ValueError(f"images: a reference needs at least 5 to compare, got {n}")
        few = tuple(x[:2] for x in self.inputs)  # what cannot be had is said now
        self.features_of(*few)
        self.answers_of(*few)
        self._weights = self._read_weights()

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def stages(self) -> list[str]:
        return list(self.layers[0])

    @property
    def shared_stages(self) -> list[str]:
        """Those that the teacher has as well."""
        return [stage for stage in self.layers[0] if stage in self.layers[-1]]

    def features_of(self, *images: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Stage -> activations (n, k, h, w) of student and base, from one forward pass of each; with images for the
        teacher, of all three, at the stages that it shares."""
        return {stage: of for stage, of in self.outputs_of(*images).items() if stage != ANSWER}

    def outputs_of(self, *images: Tensor, known: dict[Any, dict[str, Tensor]] | None = None) -> dict[str, Any]:
        """:meth:`features_of` and, as ``ANSWER``, :meth:`answers_of`, from one forward pass of each network. Networks
        whose outputs for these tensors are ``known`` do not run; those of the others are added to it."""
        captures: list[dict[str, Tensor]] = []
        known = {} if known is None else known
        for network, x, layers in zip(self.networks, images, self.layers, strict=False):
            key = (id(network), id(x), *layers.items())
            if key not in known:
                known[key] = _outputs(network, x, layers)
            captures.append(known[key])
        shared = self.stages if len(images) == 2 else self.shared_stages
        device = captures[0][ANSWER].device
        answers = tuple(centre_logits(of[ANSWER].to(device)) for of in captures)
        return {stage: tuple(of[stage] for of in captures) for stage in shared} | {ANSWER: answers}

    def answers_of(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Centred logits (n, classes) of student, base and, with images for it, the teacher."""
        found = [logits_to(network, x) for network, x in zip(self.networks, images, strict=False)]
        return tuple(centre_logits(z.to(found[0].device)) for z in found)

    def check_weights(self) -> None:
        """Raise ValueError if the weights of a network changed since the reference was made.

        Seen are steps of an optimiser, ``load_state_dict``, other modules, tensors or devices, and changes through
        ``.data`` or numpy that touch one of 64 values read from each tensor. A change of a few other values that
        bypasses autograd is not seen.
        """
        names = (*NETWORKS, "teacher")
        for name, then, now in zip(names, self._weights, self._read_weights(), strict=False):
            if then != now:
                raise ValueError(
                    f"reference: the weights of the {name} changed, or were moved, after the reference was made; make "
                    "a new kdx.Reference"
                )

    def _read_weights(self) -> list[tuple[Any, ...]]:
        modules = [network for network in self.networks if isinstance(network, nn.Module)]
        with locked(*modules):
            return [weights_mark(network) for network in modules]

    def add_moments(
        self, found: dict[str, dict[str, Moments]], images: tuple[Tensor, ...], known: dict[Any, Any]
    ) -> None:
        """Add moments of one network's features and those of others over some images to ``found``, name -> stage, or
        ``ANSWER`` -> moments. Of two networks, names are those of ``DIRECTIONS``, of three those of ``HANDED_OVER``.
        Features are compared on the student's grid if there is a teacher. ``known`` is that of :meth:`outputs_of`."""
        questions: dict[str, tuple[int, ...]] = {**(DIRECTIONS if len(images) == 2 else HANDED_OVER)}
        for stage, of in self.outputs_of(*images, known=known).items():
            if len(images) > 2:
                of = tuple(resample(f, of[0]) for f in of)
            for name, new in Moments.among(self.counted(of, images), questions).items():
                before = found.setdefault(name, {}).get(stage)
                found[name][stage] = new if before is None else before + new

    def counted(self, features: tuple[Tensor, ...], images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The part of features or answers that enters regressions: all places of all images."""
        return features

    def parts(self, images: tuple[Tensor, ...], count: int, seed: int = 0) -> list[dict[str, dict[str, Moments]]]:
        """Moments of random parts of the images, see :meth:`add_moments`."""
        return parts_of([self], [images], count, seed)[0]

    @cached_property
    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Stage -> activations of student and base, (n, k, h, w) each, contiguous."""
        found = self.features_of(*self.inputs[:2])
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
        halves = self.parts(self.inputs[:2], 2)
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

    @cached_property
    def features_beyond(self) -> dict[str, Beyond]:
        """Stage that the teacher shares -> what its features predict of the student's beyond the base's."""
        halves = self.parts(self.inputs, 2)
        of_teacher = {stage: len(moments.y) for stage, moments in halves[0]["teacher"].items()}
        return {
            stage: Beyond.fit([h["student"][stage] for h in halves], len(halves[0]["student"][stage].x) - channels)
            for stage, channels in of_teacher.items()
            if stage != ANSWER
        }

    @cached_property
    def beyond(self) -> Beyond:
        """What the teacher's answers predict of the student's beyond the base's."""
        of, base, teacher = self.answers_of(*self.inputs)
        warn_if_few_answered(len(self), base.shape[1] + teacher.shape[1], 6)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).to(of.device)
        given = torch.cat([base, teacher], 1)
        return Beyond.fit([Moments.of(of[half], given[half]) for half in order.tensor_split(2)], base.shape[1])


def parts_of(
    references: Sequence[Reference], images: Sequence[tuple[Tensor, ...]], count: int, seed: int = 0
) -> list[list[dict[str, dict[str, Moments]]]]:
    """:meth:`Reference.parts` of several references, with as many images each. A network that several of them have
    runs once on the same images, a few at a time."""
    found: list[list[dict[str, dict[str, Moments]]]] = [[{} for _ in range(count)] for _ in references]
    order = torch.randperm(len(images[0][0]), generator=torch.Generator().manual_seed(seed))
    at_once = max(1, AT_ONCE // max(x[0].numel() for of in images for x in of))
    for number, rows in enumerate(order.tensor_split(count)):
        for some in rows.split(at_once):
            x = {id(tensor): tensor[some.to(tensor.device)] for of in images for tensor in of}
            known: dict[Any, dict[str, Tensor]] = {}
            for reference, of, parts in zip(references, images, found, strict=True):
                reference.add_moments(parts[number], tuple(x[id(tensor)] for tensor in of), known)
    return found


def _outputs(network: Any, images: Tensor, layers: Mapping[str, str]) -> dict[str, Tensor]:
    """Stage -> activations (n, k, h, w), and ``ANSWER`` -> logits (n, classes)."""
    if not layers:
        return {ANSWER: logits_to(network, images)}
    found = activations(network, images, layers, logits=ANSWER)
    grids = {stage: to_grid(stage, name, found[stage], images).float() for stage, name in layers.items()}
    return grids | {ANSWER: found[ANSWER]}


def inputs_of(images: Tensor | tuple[Tensor, ...], networks: int = 2) -> tuple[Tensor, ...]:
    """Images for student, base and perhaps teacher, from images for all or from a tuple of equal length."""
    found = (images,) * networks if isinstance(images, Tensor) else tuple(images)
    if len(found) != networks or len({len(x) for x in found}) > 1 or not len(found[0]):
        what = "a pair" if networks == 2 else f"{networks} of them"
        raise ValueError(f"images: expected a tensor, or {what} of equal length, got {[tuple(x.shape) for x in found]}")
    return found


def warn_if_few(n: int, classes: int, stacklevel: int) -> None:
    """Warn if regressions on n images cannot hold for the answers to others."""
    if n < 2 * classes:
        warnings.warn(
            f"{n} reference images for {classes} classes are too few for regressions that hold for other images, "
            "so too much counts as unexplained; use at least two per class",
            FitWarning,
            stacklevel=stacklevel,
        )


def warn_if_few_answered(n: int, regressors: int, stacklevel: int, each: int = 2) -> None:
    """Warn if n images are fewer than ``each`` for every answer of base and teacher, on which answers are regressed."""
    if n < each * regressors:
        warnings.warn(
            f"{n} images to fit on for {regressors} regressors, the answers of base and teacher, are too few for "
            f"regressions that hold for other images, so too little counts as handed over; use {each * regressors} or "
            "more to fit on",
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
def logits_to(network: Network, images: Tensor) -> Tensor:
    """Logits float32 (n, classes), a few images at a time."""
    if isinstance(network, nn.Module):
        with evaluating(network):
            return torch.cat([logits_of(forward(network, x)).float() for x in images.split(64)])
    parts = [torch.as_tensor(network(x)) for x in images.split(64)]
    shapes = {tuple(z.shape[1:]) for z in parts}
    if sum(map(len, parts)) != len(images) or len(shapes) > 1 or parts[0].ndim != 2:
        raise ValueError(
            f"teacher: expected a function that returns (n, classes) for n images, got {tuple(parts[0].shape)} for "
            f"{min(64, len(images))}"
        )
    if not all(z.isfinite().all() for z in parts):
        raise ValueError("teacher: expected finite logits or log-probabilities, got NaN or infinity")
    return torch.cat(parts).float()


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
