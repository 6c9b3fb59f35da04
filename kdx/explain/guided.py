"""Guided backpropagation, and Guided Grad-CAM.

captum has both, by hooks on modules of the class ``nn.ReLU``. A ReLU that a network calls as a function, and ReLU6,
escape these hooks, so that the gradient is silently not guided there. Here the functions themselves are replaced during
a forward pass, which reaches each of them; where captum sees all of a network's ReLUs, the maps are equal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdx.explain.grad_cam import grad_cam
from kdx.explain.input_gradients import logit_gradients
from kdx.networks.capture import check_input, forward, logits_of
from kdx.networks.stages import evaluating, stages, unwrapped

IN_PLACE = {  # F.relu_, F.threshold_, F.selu_, F.celu_ and F.rrelu_ are those of torch
    torch.relu_, Tensor.relu_, torch.threshold_, F.hardtanh_, torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_,
    torch.clamp_min_, Tensor.clamp_min_,
}  # fmt: skip
ARGUMENTS: dict[Any, tuple[str, ...]] = {  # of functions that are a ReLU for some or all settings
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.relu6), ("input", "inplace")),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), ("input", "min_val", "max_val", "inplace")),  # nn.ReLU6 is one
    **dict.fromkeys((F.threshold, torch.threshold, torch.threshold_), ("input", "threshold", "value", "inplace")),
    **dict.fromkeys((torch.clamp, Tensor.clamp, torch.clip, Tensor.clip), ("input", "min", "max")),
    **dict.fromkeys((torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_), ("input", "min", "max")),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min, torch.clamp_min_, Tensor.clamp_min_), ("input", "min")),
}
OTHERS = {
    F.gelu: "GELU", F.silu: "SiLU", F.hardswish: "Hardswish", F.mish: "Mish", F.softplus: "Softplus",
    **dict.fromkeys((F.elu, F.elu_), "ELU"), **dict.fromkeys((F.selu, torch.selu, torch.selu_), "SELU"),
    **dict.fromkeys((F.celu, torch.celu, torch.celu_), "CELU"), **dict.fromkeys((F.prelu, Tensor.prelu), "PReLU"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "LeakyReLU"),
    **dict.fromkeys((F.rrelu, torch.rrelu, torch.rrelu_), "RReLU"),
}  # fmt: skip


def guided_grad_cam(
    model: nn.Module, images: Tensor, target: int | Tensor | None = None, layer: str | None = None
) -> Tensor:
    """Guided Grad-CAM (Selvaraju et al. 2017): guided backpropagation times Grad-CAM, enlarged bilinearly.

    It fails tests with random weights (Adebayo et al. 2018): see :func:`kdx.sanity`.

    Args:
        model: A classifier whose activation functions are ReLU and ReLU6: modules or functions, in place or not, called
            once or often, or written as a threshold at 0 or a clamp from 0 upwards. It runs in evaluation mode and is
            left as it was found.
        images: (n, c, h, w), normalised as the network expects.
        target: Class index for all images, or (n,) one per image; None takes the predicted class.
        layer: Name of the module for Grad-CAM; None takes the deepest of :func:`kdx.stages`.

    Returns:
        float32 (n, c, h, w), with sign.

    Raises:
        ValueError: Another activation function (GELU, SiLU, ...), for which guided backpropagation is not defined, or
            none at all.

    Examples:
        >>> import kdx, torch
        >>> images = torch.rand(2, 3, 32, 32)
        >>> tuple(kdx.guided_grad_cam(kdx.build("resnet10", 3, "small", 0.125), images, target=1).shape)
        (2, 3, 32, 32)
    """
    model = unwrapped(model)
    targets = _targets(model, images, target)
    layer = list(stages(model, images[:1]).values())[-1] if layer is None else layer
    maps = grad_cam(model, images, targets, {"map": layer})["map"]
    size = (images.shape[2], images.shape[3])
    enlarged = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    return guided_backpropagation(model, images, targets) * enlarged


def guided_backpropagation(model: nn.Module, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    r"""Guided backpropagation (Springenberg et al. 2015): the gradient of a logit with respect to the pixels. Each
    ReLU passes back only what is positive, and only where its input was:

    .. math:: g \mapsto \max(g, 0) \cdot [x > 0], \qquad \text{and of ReLU6 } \max(g, 0) \cdot [0 < x < 6]

    Arguments, errors and result are those of :func:`guided_grad_cam`.
    """
    model = unwrapped(model)
    targets = _targets(model, images, target)
    with _Guidance(type(model).__name__) as guidance:
        found = logit_gradients(model, images, targets)
    if not guidance.calls:
        raise ValueError(f"{type(model).__name__}: found no ReLU, so that there is nothing to guide")
    return found


def guided_maps(model: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Guided Grad-CAM at every stage, as maps of the images' size: stage -> sizes summed over colours, (n, h, w).

    Arguments and errors are those of :func:`guided_grad_cam`.
    """
    guided = guided_backpropagation(model, images, target).abs().sum(1)
    size = (images.shape[2], images.shape[3])
    return {
        stage: guided * F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        for stage, maps in grad_cam(model, images, target).items()
    }


def _targets(model: nn.Module, images: Tensor, target: int | Tensor | None) -> Tensor:
    check_input(model, images)
    if target is None:
        with torch.no_grad(), evaluating(model):
            return logits_of(forward(model, images)).argmax(1)
    return torch.as_tensor(target, device=images.device).expand(len(images))


class _Guidance(TorchFunctionMode):
    """Inside the block, ReLU and ReLU6 of this thread have guided gradients, and other activation functions raise."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if name := OTHERS.get(func):
            raise self._refusal(name)
        given = dict(zip(ARGUMENTS.get(func, ()), args, strict=False)) | (kwargs or {})
        if func not in ARGUMENTS or (most := self._most(func, given)) is None:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        x = given["input"]
        out = _GuidedReLU.apply(x, most)
        return x.copy_(out) if func in IN_PLACE or given.get("inplace") else out

    def _most(self, func: Any, given: dict[str, Any]) -> float | None:
        """Where a ReLU ends, infinity for a plain one; None of a function that is none and keeps its gradient."""
        if func is F.relu6:
            return 6.0
        if "threshold" in given:
            if given["threshold"] != 0 or given["value"] != 0:
                raise self._refusal("Threshold")
            return math.inf
        if func in (F.hardtanh, F.hardtanh_):
            low, most = given.get("min_val", -1.0), given.get("max_val", 1.0)
        elif "inplace" in ARGUMENTS[func]:
            return math.inf
        else:
            low, most = given.get("min"), given.get("max")
            if not given["input"].is_floating_point() or low is None or (most is None and low != 0):
                return None  # indices, and bounds for the sake of stability
        if isinstance(low, Tensor) or low != 0:
            raise self._refusal("Hardtanh")
        return math.inf if most is None else float(most)

    def _refusal(self, name: str) -> ValueError:
        return ValueError(
            f"guided backpropagation is defined for ReLU and ReLU6; {self.network} computes {name}. Take kdx.grad_cam "
            "or kdx.saliency for it"
        )


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < most))
        return x.clamp(0, most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (passes,) = ctx.saved_tensors
        return gradient.clamp(min=0) * passes, None
