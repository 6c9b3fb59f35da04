"""Grad-CAM at every stage of a network, and the agreement of maps.

Maps are raw: non-negative, unscaled, at the resolution of the stage they come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdx.networks.capture import gradients

METHODS = ("cam", "hires")


def grad_cam(
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    layers: Mapping[str, str] | None = None,
    method: str = "cam",
) -> dict[str, Tensor]:
    r"""Grad-CAM (Selvaraju et al. 2017) at every stage, from one forward and one backward pass.

    With :math:`A^k` channel k of a stage and :math:`y^c` the logit of the target class,

    .. math:: \alpha_k = \frac{1}{hw} \sum_{i,j} \frac{\partial y^c}{\partial A^k_{ij}}, \qquad
              \mathrm{map} = \mathrm{ReLU}\Big(\sum_k \alpha_k A^k\Big).

    The network runs in evaluation mode and is left as it was found: parameters, their
    ``requires_grad`` and gradients, modes and hooks. Works under ``no_grad`` and
    ``inference_mode``, and with networks that return a tuple, a mapping or an output object. Threads may share a
    network: they take turns.

    Args:
        model: Any CNN or plain vision transformer.
        images: (n, c, h, w), normalised as the network expects.
        target: Class index for all images, or (n,) one per image; None takes the predicted class.
        layers: Stage -> module name; None takes :func:`kdx.stages`.
        method: ``"cam"``, or ``"hires"`` for gradient times activation element by element, then summed over channels
            (HiResCAM, Draelos & Carin 2020).

    Returns:
        Stage -> float32 map (n, h, w) >= 0, at the stage's own resolution.

    Raises:
        ValueError: An unknown method, targets that are no classes, or a stage on which the logits do not depend.

    Examples:
        >>> import kdx, torch
        >>> maps = kdx.grad_cam(kdx.build("resnet10", 3, "small", 0.125), torch.rand(2, 3, 32, 32), target=1)
        >>> {stage: tuple(m.shape) for stage, m in maps.items()}
        {'L1': (2, 32, 32), 'L2': (2, 16, 16), 'L3': (2, 8, 8), 'L4': (2, 4, 4)}
    """
    check_method(method)
    found = gradients(model, images, lambda logits: logits.gather(1, _targets(target, logits)[:, None]).sum(), layers)
    with torch.autocast(images.device.type, enabled=False):
        return {stage: to_map(activation, gradient, method) for stage, (activation, gradient) in found.items()}


def check_method(method: str) -> None:
    """Raise ValueError unless a method is known."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from: {', '.join(METHODS)}")


def to_map(features: Tensor, gradient: Tensor, method: str = "cam") -> Tensor:
    """The map (n, h, w) of features (n, k, h, w) and the gradient with respect to them, by one of ``METHODS``."""
    if method == "cam":
        gradient = gradient.mean(dim=(2, 3), keepdim=True).expand_as(gradient)
    return torch.einsum("nkhw,nkhw->nhw", gradient, features).relu()


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation over the pixels of two maps of each image.

    Args:
        first: (n, h, w).
        second: Likewise.

    Returns:
        (n,) in [-1, 1]; NaN where a map is constant, for example empty.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"expected two (n, h, w) of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = ((m - m.mean(1, keepdim=True)) for m in (first.double().flatten(1), second.double().flatten(1)))
    scale = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(scale > 0, (a * b).sum(1) / scale, math.nan)


def _targets(target: int | Tensor | None, logits: Tensor) -> Tensor:
    n, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    targets = torch.as_tensor(target, device=logits.device)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape not in ((), (n,)):
        raise ValueError(
            f"target: expected a class index or integer indices ({n},), got {targets.dtype} {tuple(targets.shape)}"
        )
    if (targets < 0).any() or (targets >= classes).any():
        raise ValueError(f"target: expected classes 0 to {classes - 1}, got {targets.min()} to {targets.max()}")
    return targets.long().expand(n)
