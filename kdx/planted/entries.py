"""The explainers of the leaderboard, each as a function that :func:`kdx.benchmark` takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.data.batches import class_indices
from kdx.explain.explainers import Maps, explainers, fused, fused_explainers
from kdx.explain.patching import patched
from kdx.explain.reference import ANSWER, DIRECTIONS, Reference, logits_to
from kdx.explain.transferred import transferred
from kdx.explain.unexplained import unexplained, unexplained_features

Entry = Callable[..., Maps]
MASKS, CELLS, KEPT = 64, 7, 0.5  # of RISE
WINDOWS = 4  # a side of a map, for patching
STEPS = 16  # of integrated gradients
BLANK = (torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0))  # for explainers without a reference set
FUSED = ("UniCAM, fused", "Grad-CAM difference, fused", "HiResCAM difference, window, fused")


def oracle(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor, truth: dict[str, Tensor]) -> Maps:
    """The masks of the planted cues: what no explainer can beat."""
    return Maps({"mask": truth["distilled"]}, {"mask": truth["residual"]})


def constant(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor) -> Maps:
    """1 everywhere: chance."""
    return Maps(*({"constant": torch.ones_like(images[:, 0])} for _ in DIRECTIONS))


def handed_over(
    student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor, reference: Any, teacher: nn.Module
) -> Maps:
    """``kdx.transferred``, which sees the teacher; residual maps are those of ``kdx.unexplained``."""
    known = Reference(student, base, reference.images, teacher=teacher)
    return Maps(transferred(known, images).distilled, unexplained(known, (images, images)).residual)


def handed_over_fused(
    student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor, reference: Any, teacher: nn.Module
) -> Maps:
    """The same with all stages made one map."""
    return fused(partial(handed_over, reference=reference, teacher=teacher))(student, base, images, labels)


def rise(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor) -> Maps:
    """RISE (Petsiuk et al. 2018) of the difference of the two networks' logits of the class: the mean of random masks,
    weighted by how much larger than on average the difference is behind them."""
    generator = torch.Generator().manual_seed(0)
    height, width = images.shape[2:]
    seen = []
    masks = torch.stack([_soft_mask(height, width, generator) for _ in range(MASKS)])
    with torch.no_grad():
        for mask in masks:
            hidden = images * mask
            gap = logits_to(student, hidden) - logits_to(base, hidden)
            seen.append(gap.gather(1, class_indices(labels)[:, None])[:, 0])
    weights = torch.stack(seen)
    total = torch.einsum("mn,mhw->nhw", weights - weights.mean(0), masks) / (MASKS * KEPT)
    return Maps({"image": total.relu()}, {"image": (-total).relu()})


def _soft_mask(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A coarse random grid, enlarged smoothly and shifted by a part of a cell: (h, w)."""
    coarse = (torch.rand(1, 1, CELLS + 1, CELLS + 1, generator=generator) < KEPT).float()
    cell = [-(-side // CELLS) for side in (height, width)]
    large = F.interpolate(coarse, [(CELLS + 1) * side for side in cell], mode="bilinear")[0, 0]
    top, left = (int(torch.randint(side, (1,), generator=generator)) for side in cell)
    return large[top : top + height, left : left + width]


def patching(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor, reference: Any) -> Maps:
    """Activation patching, measured and not to first order: by how much the unexplained answer falls when the features
    in a window become those that the other network can express."""
    with torch.no_grad():
        return _patched(Reference(student, base, reference.images), images)


def _patched(known: Reference, images: Tensor) -> Maps:
    answers, left = known.answers_of(images, images), unexplained_features(known, images)
    found: dict[str, dict[str, Tensor]] = {direction: {} for direction in DIRECTIONS}
    for direction, (explained, given) in DIRECTIONS.items():
        r = known.regressions[direction][ANSWER].left_over(answers[explained], answers[given])
        for stage, features in left[direction].items():
            side = min(WINDOWS, *features.shape[2:])
            maps = torch.zeros(len(images), side, side)
            for cell in range(side**2):
                window = F.one_hot(torch.tensor(cell), side**2).view(1, 1, side, side).to(features)
                mask = F.interpolate(window, features.shape[2:], mode="nearest-exact")
                after = patched(known, explained, stage, images, -features * mask) - answers[explained]
                maps[:, cell // side, cell % side] = (r.square() - (r + after).square()).sum(1) / 2
            found[direction][stage] = maps.relu()
    return Maps(**found)


def _of_captum(attribute: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Entry:
    def explain(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor) -> Maps:
        of_student, of_base = (attribute(net, images, class_indices(labels)) for net in (student, base))
        maps = (of_student - of_base).sum(1).detach()
        return Maps({"image": maps.relu()}, {"image": (-maps).relu()})

    return explain


def _captums() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise ValueError("captum is not installed; `pip install kdx[test]` brings it") from error
    return captum.attr


def _occlusion(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    side = images.shape[-1] // 4
    window = (images.shape[1], side, side)
    return _captums().Occlusion(network).attribute(images, window, (window[0], side // 2, side // 2), target=labels)


def _integrated(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return (
        _captums()
        .IntegratedGradients(network)
        .attribute(images, target=labels, n_steps=STEPS, internal_batch_size=len(images))
    )


def _known(name: str) -> Entry:
    """An explainer of :mod:`kdx.explain.explainers`, or of those with all stages fused."""

    def explain(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor, reference: Any = BLANK) -> Maps:
        every = fused_explainers if name in FUSED else explainers
        return every(*reference)[name](student, base, images, labels)

    def without(student: nn.Module, base: nn.Module, images: Tensor, labels: Tensor) -> Maps:
        return explain(student, base, images, labels)

    return explain if name.startswith(("unexplained", "UniCAM", "feature energy")) else without


def entries() -> dict[str, Entry]:
    """Name -> explainer: those of :mod:`kdx.explain.explainers`, some with all stages fused, and their rivals."""
    found = {name: _known(name) for name in (*explainers(*BLANK), *FUSED)}
    return found | {
        "oracle": oracle,
        "constant": constant,
        "transferred": handed_over,
        "transferred, fused": handed_over_fused,
        "RISE of the logit difference": rise,
        "patching": patching,
        "occlusion difference (captum)": _of_captum(_occlusion),
        "integrated gradients difference (captum)": _of_captum(_integrated),
    }


def find(call: str) -> Entry:
    """The explainer of a name in :func:`entries`, or of ``module:function``, with modules of the current folder."""
    known = entries()
    if call in known:
        return known[call]
    import importlib
    import os
    import sys

    name, _, function = call.partition(":")
    if not function:
        raise ValueError(f"expected module:function or one of {'; '.join(known)}; got {call!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(name), function, None)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(f"{call}: the module cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{call}: expected a function {function!r} in {name}, got {type(found).__name__}")
    return found
