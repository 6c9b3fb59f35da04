"""Explainers of distillation, all called alike, so that they can be compared.

An explainer is called with two networks, images (n, c, h, w), normalised as both expect, and their class
indices (n,). What it returns has two attributes, ``distilled`` and ``residual``: stage -> raw maps (n, h, w)
>= 0 of any resolution. Any function of that kind can be entered beside those of :func:`explainers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.saliency import grad_cam, gradients, logits_of
from kdx.tracing import evaluating, stages
from kdx.unexplained import WINDOW, contributions, resample, smooth, unexplained, unexplained_features
from kdx.unique import DIRECTIONS, Reference, unicam

StageMaps = dict[str, Tensor]
AT_ONCE = 50  # images


@dataclass(frozen=True)
class Maps:
    """What an explainer returns."""

    distilled: StageMaps
    residual: StageMaps


Explainer = Callable[[nn.Module, nn.Module, Tensor, Tensor], Any]


def explainers(images: Tensor, labels: Tensor, embeddings: Tensor, seed: int = 0) -> dict[str, Explainer]:
    """All explainers of this package, and baselines.

    Parameters
    ----------
    images, labels : a reference set for those that need one: (r, c, h, w) normalised, and class indices (r,).
    embeddings : (classes, m) label embeddings, for UniCAM.
    seed : of the random maps.
    """
    known: list[tuple[nn.Module, nn.Module, Reference]] = []

    def reference(student: nn.Module, base: nn.Module) -> Reference:
        if not known or known[0][:2] != (student, base):  # the latest pair alone is kept: features are large
            known[:] = [(student, base, Reference(student, base, images, embeddings[labels]))]
        return known[0][2]

    def uni(method: str, batch: bool) -> Explainer:
        def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            if batch:  # the paper's way: the images of a batch explain each other
                parts = [unicam(student, base, a, embeddings[b], method=method) for a, b in _batches(x, y)]
            else:
                parts = [unicam(student, base, x, embeddings[y], reference=reference(student, base), method=method)]
            return _joined(parts)

        return explain

    def missing(power: int = 1, **settings: Any) -> Explainer:
        def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            maps = unexplained(student, base, x, reference=reference(student, base), **settings)
            return Maps(**{d: {s: m**power for s, m in getattr(maps, d).items()} for d in DIRECTIONS})

        return explain

    def answer_alone(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        """`unexplained` with all features in the place of those that are unexplained."""
        parts = [contributions(reference(student, base), (a, a), whole=True) for a, _ in _batches(x, y)]
        return _joined([Maps(**{d: _smoothed(of) for d, of in part.items()}) for part in parts])

    def energy(by_class: bool) -> Explainer:
        def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            return _joined([part(student, base, a, b) for a, b in _batches(x, y)])

        def part(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
            of = reference(student, base)
            found = {}
            for direction, left in unexplained_features(of, x).items():
                if by_class:
                    role = DIRECTIONS[direction][0]
                    slopes = gradients((student, base)[role], x, _logit_of(y), of.layers[role])
                    found[direction] = {s: (slopes[s][1] * e).sum(1).square() for s, e in left.items()}
                else:
                    found[direction] = {s: e.square().sum(1) for s, e in left.items()}
            return Maps(**found)

        return explain

    generator = torch.Generator().manual_seed(seed)
    return {
        "unexplained": missing(),
        "unexplained, squared": missing(power=2),
        "unexplained, no window": missing(window=0),
        "unexplained, answer alone": answer_alone,
        "UniCAM": uni("cam", batch=False),
        "UniCAM, batch": uni("cam", batch=True),
        "UniCAM hires": uni("hires", batch=False),
        "UniCAM hires, batch": uni("hires", batch=True),
        "feature energy": energy(by_class=False),
        "feature energy, by class": energy(by_class=True),
        "Grad-CAM": _grad_cams("cam", difference=False),
        "Grad-CAM difference": _grad_cams("cam", difference=True),
        "HiResCAM difference": _grad_cams("hires", difference=True),
        "HiResCAM difference, window": _signed_difference,
        "input x gradients": _input_gradients,
        "edges": _fixed(_edges),
        "random": _fixed(lambda x: torch.rand(x[:, 0].shape, generator=generator).to(x.device)),
    }


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
    """HiResCAM of one network minus the other's, both with their signs, averaged over the window of `unexplained`."""
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
    """The input times the difference of the two networks' gradients, by sign: what it adds to either answer."""
    slopes = []
    for network in (student, base):
        inputs = x.detach().clone().requires_grad_()
        with torch.enable_grad(), evaluating(network):
            slopes.append(torch.autograd.grad(_logit_of(y)(logits_of(network(inputs))), inputs)[0])
    product = (x * (slopes[0] - slopes[1])).sum(1)
    names = stages(student, x[:1])
    return Maps(dict.fromkeys(names, product.relu()), dict.fromkeys(names, (-product).relu()))


def _fixed(draw: Callable[[Tensor], Tensor]) -> Explainer:
    """An explainer that asks no network."""

    def explain(student: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> Maps:
        names, maps = stages(student, x[:1]), draw(x)
        return Maps(dict.fromkeys(names, maps), dict.fromkeys(names, maps))

    return explain


def _edges(x: Tensor) -> Tensor:
    """Sobel's gradient magnitude of the grey image."""
    grey = x.mean(1, keepdim=True)
    kernel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([kernel, kernel.T])[:, None])
    return slopes.square().sum(1).sqrt()


def _logit_of(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.gather(1, labels[:, None]).sum()


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    count = max(1, len(x) // AT_ONCE)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def _joined(parts: list[Any]) -> Maps:
    return Maps(
        **{d: {s: torch.cat([getattr(p, d)[s] for p in parts]) for s in getattr(parts[0], d)} for d in DIRECTIONS}
    )


def _on_grid(maps: Tensor, like: Tensor) -> Tensor:
    return resample(maps[:, None], like[:, None])[:, 0]
