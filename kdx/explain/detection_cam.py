"""Grad-CAM of what a detector finds, at the levels of its feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdx.explain.grad_cam import check_method, to_map
from kdx.networks.fpn_detectors import watch_levels
from kdx.networks.stages import evaluating


def detection_cam(
    detector: nn.Module, images: Tensor, boxes: Sequence[int] | None = None, method: str = "cam"
) -> dict[str, Tensor]:
    r"""Grad-CAM of detections: as :func:`kdx.grad_cam`, with the scores of kept detections in place of a logit.

    Which detections are kept has no gradient; their scores have one. A score depends on the level that found it, and on
    no other that the head sees, so a map at P3 or P4 shows what was found there. Coarser levels, such as that at 1/64
    of the image, are pooled or convolved from P5, so the map at P5 shows what was found at them as well.

    Args:
        detector: Of torchvision, with a feature pyramid. It runs in evaluation mode and is left as it was found.
        images: uint8 (n, 3, h, w).
        boxes: Of each image, the place of one detection in the detector's output, whose score is explained; None
            explains the sum of the scores of all.
        method: ``"cam"`` or ``"hires"``, see :func:`kdx.grad_cam`.

    Returns:
        ``"P3"``, ``"P4"``, ``"P5"`` -> float32 map (n, h, w) >= 0; 0 throughout where nothing was found.

    Raises:
        ValueError: An unknown method, or a detection that an image does not have.
    """
    check_method(method)
    return {level: to_map(*found, method) for level, found in score_gradients(detector, images, boxes).items()}


def score_gradients(
    detector: nn.Module, images: Tensor, boxes: Sequence[int] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of each level and the gradient of the scores with respect to them: level -> two (n, k, h, w)."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 images, got {images.dtype}")
    weight = next(detector.parameters())
    with torch.inference_mode(False), torch.enable_grad(), evaluating(detector):
        x = (images.to(weight.device) / 255).to(weight.dtype).requires_grad_()
        with watch_levels(detector) as levels:
            found = detector(list(x))
        scores = [one["scores"] for one in found]
        if boxes is not None:
            if len(boxes) != len(scores) or any(not 0 <= i < len(s) for i, s in zip(boxes, scores, strict=True)):
                raise ValueError(f"boxes: expected one of {[len(s) for s in scores]} detections each, got {boxes}")
            scores = [s[i : i + 1] for i, s in zip(boxes, scores, strict=True)]
        value = torch.cat(scores).sum()
        features = list(levels.values())
        gradients = (
            torch.autograd.grad(value, features, allow_unused=True) if value.requires_grad else [None] * len(features)
        )
    return {
        level: (feature.detach(), torch.zeros_like(feature) if gradient is None else gradient)
        for level, feature, gradient in zip(levels, features, gradients, strict=True)
    }
