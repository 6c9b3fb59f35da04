"""Explainers of distillation with one signature, so that they can be compared.

An explainer takes two networks, images (n, c, h, w), normalised as both expect, and their class indices (n,). It
returns an object with two attributes, ``distilled`` and ``residual``: stage -> raw maps (n, h, w) >= 0 of any
resolution. Any function of that kind can be compared with those of :func:`explainers`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdx.data.batches import class_indices
from kdx.explain.grad_cam import grad_cam
from kdx.explain.input_gradients import edges, logit_gradients
from kdx.explain.reference import DIRECTIONS, Reference, centre_logits, logits_to, weights_mark
from kdx.explain.regression import resample
from kdx.explain.unexplained import WINDOW, contributions, fuse, smooth, unexplained, unexplained_features
from kdx.explain.unicam import unicam
from kdx.networks.capture import gradients
from kdx.networks.stages import stages

StageMaps = dict[str, Tensor]
AT_ONCE = 50  # images
STEPS = 16  # of integrated gradients


@dataclass(frozen=True)
class Maps:
    """Maps of an explainer, by stage."""

    distilled: StageMaps
    residual: StageMaps


Explainer = Callable[[nn.Module, nn.Module, Tensor, Tensor], Any]


def explainers(images: Tensor, labels: Tensor, embeddings: Tensor, seed: int = 0) -> dict[str, Explainer]:
    """All explainers of this package, and baselines.

    Args:
        images: (r, c, h, w), normalised: the reference set of explainers that need one.
        labels: (r,) class indices of the reference set.
        embeddings: (classes, m) label embeddings, for UniCAM.
        seed: Of the random maps.

    Returns:
        Name -> explainer.
    """
    known = _WithReference(images, labels, embeddings)
    plain, squared = _Kept(known.unexplained()), _Kept(_squared_difference)
    occluded, integrated = _Kept(_occluded_answers), _Kept(_mean_gradients)
    generator = torch.Generator().manual_seed(seed)
    return {
        "unexplained": plain,
        "unexplained, fused": fused(plain),
        "unexplained, squared": _to_the_square(plain),
        "unexplained, no window": known.unexplained(window=0),
        "unexplained, answer alone": known.answer_alone,
        "UniCAM": known.unicam("cam"),
        "UniCAM, batch": _batch_unicam("cam", embeddings),
        "UniCAM hires": known.unicam("hires"),
        "UniCAM hires, batch": _batch_unicam("hires", embeddings),
        "feature energy": known.energy,
        "feature energy, by class": known.energy_by_class,
        "Grad-CAM": _grad_cams("cam", difference=False),
        "Grad-CAM difference": _grad_cams("cam", difference=True),
        "HiResCAM difference": _grad_cams("hires", difference=True),
        "HiResCAM difference, window": _signed_difference,
        "input x gradients": _input_gradients,
        "integrated gradients of the logit difference": _integrated_gradients(integrated),
        "answer difference, squared": squared,
        "answer difference, squared, fused": fused(squared),
        "occlusion of the logit difference": _occlusion(occluded, _logit_difference),
        "occlusion of the KL divergence": _occlusion(occluded, _kl_divergence),
        "edges": _fixed(edges),
        "random": _fixed(lambda x: torch.rand(x[:, 0].shape, generator=generator).to(x.device)),
    }


def fused_explainers(images: Tensor, labels: Tensor, embeddings: Tensor, seed: int = 0) -> dict[str, Explainer]:
    """Those of :func:`explainers` that have a map for every stage, with all stages fused."""
    whole = explainers(images, labels, embeddings, seed)
    names = ["unexplained", "unexplained, answer alone", "UniCAM", "UniCAM hires", "feature energy"]
    names += ["feature energy, by class", "Grad-CAM difference", "HiResCAM difference", "HiResCAM difference, window"]
    return {f"{name}, fused": fused(whole[name]) for name in [*names, "answer difference, squared"]}


class _Kept:
    """A function of networks, images and labels, which keeps what it found for the latest images and labels: explainers
    that share a part, or a network, do not compute it twice."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.latest: list[Any] = []
        self.found: dict[tuple[nn.Module, ...], tuple[Any, Any]] = {}

    def __call__(self, *networks_and_data: Any) -> Any:
        *networks, x, y = networks_and_data
        latest = [_content(data) for data in (x, y)]
        if latest != self.latest:
            self.latest, self.found = latest, {}
        marks = [weights_mark(network) for network in networks]
        before, found = self.found.get((*networks,), (None, None))
        if before != marks:
            found = self.function(*networks, x, y)
            self.found[*networks,] = marks, found
        return copy.deepcopy(found)  # the caller may change it


def _content(data: Tensor) -> tuple[Any, ...]:
    values = data.detach().cpu().contiguous().flatten().view(torch.uint8)
    return data.device, data.dtype, data.shape, hashlib.sha256(values.numpy().tobytes()).digest()


class _WithReference:
    """Explainers that share a reference set, whose features are kept for the latest pair of networks."""

    def __init__(self, images: Tensor, labels: Tensor, embeddings: Tensor) -> None:
        self.images, self.labels, self.embeddings = images, class_indices(labels), embeddings
        self.latest: Reference | None = None

    def reference(self, student: nn.Module, base: nn.Module) -> Reference:
        if self.latest is None or self.latest.networks != (student, base):
            self.latest = None  # features are large
            self.latest = Reference(student, base, self.images)
        return self.latest

    def unexplained(self, **settings: Any) -> Explainer:
        def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            maps = unexplained(self.reference(student, base), x, **settings)
            return Maps(maps.distilled, maps.residual)

        return explain

    def answer_alone(self, student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        """`unexplained` with all features instead of the unexplained ones."""
        parts = [contributions(self.reference(student, base), (a, a), whole=True) for a, _ in _batches(x, y)]
        return _joined([Maps(**{d: _smoothed(of) for d, of in part.items()}) for part in parts])

    def unicam(self, method: str) -> Explainer:
        def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            known, of = self.embeddings[self.labels], self.embeddings[class_indices(y)]
            maps = unicam(self.reference(student, base), known, x, of, method=method)
            return Maps(maps.distilled, maps.residual)

        return explain

    def energy(self, student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        """Squares of the unexplained features, summed over channels."""
        parts = [unexplained_features(self.reference(student, base), a) for a, _ in _batches(x, y)]
        return _joined(
            [Maps(**{d: {s: e.square().sum(1) for s, e in of.items()} for d, of in p.items()}) for p in parts]
        )

    def energy_by_class(self, student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        """Squared product of the unexplained features with the gradient of the class."""
        reference = self.reference(student, base)
        parts = []
        for a, b in _batches(x, y):
            found = {}
            for direction, left in unexplained_features(reference, a).items():
                explained = DIRECTIONS[direction][0]
                slopes = gradients(reference.networks[explained], a, _logit_of(b), reference.layers[explained])
                found[direction] = {s: (slopes[s][1] * e).sum(1).square() for s, e in left.items()}
            parts.append(Maps(**found))
        return _joined(parts)


def _batch_unicam(method: str, embeddings: Tensor) -> Explainer:
    """The paper's way: the images of a batch explain each other."""

    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        parts = _batches(x, y)
        return _joined([unicam(Reference(student, base, a), embeddings[b], method=method) for a, b in parts])

    return explain


def _grad_cams(method: str, difference: bool) -> Explainer:
    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        return _joined([part(student, base, a, b) for a, b in _batches(x, y)])

    def part(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        of_student, of_base = (grad_cam(network, x, y, method=method) for network in (student, base))
        if not difference:
            return Maps(of_student, of_base)
        return Maps(
            {s: (maps - _on_grid(of_base[s], maps)).relu() for s, maps in of_student.items()},
            {s: (maps - _on_grid(of_student[s], maps)).relu() for s, maps in of_base.items()},
        )

    return explain


def _signed_difference(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
    """Signed HiResCAM of one network minus the other's, averaged over the window of `unexplained`."""
    parts = []
    for a, b in _batches(x, y):
        slopes = [gradients(network, a, _logit_of(b)) for network in (student, base)]
        signed = [{s: (activation * g).sum(1) for s, (activation, g) in of.items()} for of in slopes]
        both = [{s: maps - _on_grid(two[s], maps) for s, maps in one.items()} for one, two in (signed, signed[::-1])]
        parts.append(Maps(*map(_smoothed, both)))
    return _joined(parts)


def _smoothed(maps: StageMaps) -> StageMaps:
    return {s: smooth(m, WINDOW).relu() for s, m in maps.items()}


def _input_gradients(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
    """The input times the difference of the two networks' gradients, split by sign."""
    of_student, of_base = (logit_gradients(network, x, y) for network in (student, base))
    product = (x * (of_student - of_base)).sum(1)
    names = stages(student, x[:1])
    return Maps(dict.fromkeys(names, product.relu()), dict.fromkeys(names, (-product).relu()))


def fused(explain: Explainer) -> Explainer:
    """The maps of another explainer, those of all stages made one."""

    def explain_fused(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        maps = explain(student, base, x, y)
        return Maps(*(dict.fromkeys(of, fuse(of)) for of in (maps.distilled, maps.residual)))

    return explain_fused


def _to_the_square(explain: Explainer) -> Explainer:
    def explain_squared(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        maps = explain(student, base, x, y)
        return Maps(**{d: {s: m.square() for s, m in getattr(maps, d).items()} for d in DIRECTIONS})

    return explain_squared


def _mean_gradients(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the logit of the class, mean over steps from a grey image to the image: (n, c, h, w)."""
    return torch.stack([logit_gradients(network, x * (step + 0.5) / STEPS, y) for step in range(STEPS)]).mean(0)


def _integrated_gradients(mean_gradients: Callable[..., Tensor]) -> Explainer:
    """Integrated gradients (Sundararajan et al. 2017) of the difference of the two networks' logits of the class, from
    a grey image, summed over channels and averaged over the window of `unexplained`."""

    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        of_student, of_base = (mean_gradients(network, x, y) for network in (student, base))
        names, maps = stages(student, x[:1]), (x * (of_student - of_base)).sum(1)
        both = [_smoothed({"input": m})["input"] for m in (maps, -maps)]
        return Maps(*(dict.fromkeys(names, m) for m in both))

    return explain


def _squared_difference(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
    """Gradient times activation of half the squared difference of the centred logits, averaged over the window of
    `unexplained`: what is left of it without regressions."""
    parts = []
    for a, _ in _batches(x, y):
        one, two = (centre_logits(logits_to(network, a)) for network in (student, base))
        found = []
        for network, beyond in ((student, one - two), (base, two - one)):
            slopes = gradients(network, a, _along(beyond))
            found.append({s: (activation * g).sum(1) for s, (activation, g) in slopes.items()})
        parts.append(Maps(*map(_smoothed, found)))
    return _joined(parts)


def _along(direction: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: (centre_logits(logits) * direction).sum()


def _logit_difference(explained: Tensor, given: Tensor, labels: Tensor) -> Tensor:
    return (explained - given).gather(-1, labels.expand(explained.shape[:-1])[..., None])[..., 0]


def _kl_divergence(explained: Tensor, given: Tensor, labels: Tensor) -> Tensor:
    p, q = explained.log_softmax(-1), given.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _occlusion(answers: Callable[..., Tensor], value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Explainer:
    """Occlusion (Zeiler & Fergus 2014): how much a value of both networks' answers falls when a window of the image is
    covered by grey. Pixels get the mean over the windows that cover them.

    Args:
        answers: :func:`_occluded_answers`.
        value: Function of the logits of the explained network, those of the other, (windows, n, classes), and labels.
    """

    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        labels, names = class_indices(y), stages(student, x[:1])
        windows, logits = _windows(x), [answers(network, x, y) for network in (student, base)]
        found = []
        for explained, given in DIRECTIONS.values():
            values = value(logits[explained], logits[given], labels)  # the first is not covered
            falls = values[0] - values[1:]
            found.append((torch.einsum("wn,whv->nhv", falls, windows) / windows.sum(0)).relu())
        return Maps(*(dict.fromkeys(names, maps) for maps in found))

    return explain


def _occluded_answers(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Logits (1 + windows, n, classes) for the images, and for the images with each window covered."""
    return torch.stack([logits_to(network, images) for images in (x, *(x * (1 - window) for window in _windows(x)))])


def _windows(x: Tensor) -> Tensor:
    """1 in windows of a quarter of the image's side, an eighth apart: (windows, h, w)."""
    height, width = (torch.stack(list(_spans(n))) for n in x.shape[2:])
    return (height[:, None, :, None] & width[None, :, None, :]).flatten(0, 1).to(x)


def _spans(n: int) -> Iterator[Tensor]:
    side, step = max(1, n // 4), max(1, n // 8)
    for start in sorted({*range(0, n - side + 1, step), n - side}):  # the last one reaches the end
        yield (torch.arange(n) >= start) & (torch.arange(n) < start + side)


def _fixed(draw: Callable[[Tensor], Tensor]) -> Explainer:
    """An explainer that does not use the networks."""

    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        names, maps = stages(student, x[:1]), draw(x)
        return Maps(dict.fromkeys(names, maps), dict.fromkeys(names, maps))

    return explain


def _logit_of(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.gather(1, class_indices(labels)[:, None]).sum()


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    count = max(1, len(x) // AT_ONCE)
    return list(zip(x.tensor_split(count), class_indices(y).tensor_split(count), strict=True))


def _joined(parts: list[Any]) -> Maps:
    return Maps(
        **{d: {s: torch.cat([getattr(p, d)[s] for p in parts]) for s in getattr(parts[0], d)} for d in DIRECTIONS}
    )


def _on_grid(maps: Tensor, like: Tensor) -> Tensor:
    return resample(maps[:, None], like[:, None])[:, 0]
