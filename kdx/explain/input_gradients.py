"""Gradients with respect to the pixels of an image: of the logit of a class, and of the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.data.batches import class_indices
from kdx.networks.capture import check_input, forward, logits_of
from kdx.networks.stages import evaluating

AT_ONCE = 100  # images


def saliency(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    r"""Saliency (Simonyan et al. 2014): :math:`|\partial z_y / \partial x|`, the size of the gradient of the logit of a
    class.

    Args:
        model: Any classifier. It runs in evaluation mode and is left as it was found.
        images: (n, c, h, w), normalised as the network expects.
        target: (n,) class indices; the true classes, for scores against a truth.

    Returns:
        float32 (n, c, h, w) >= 0. Its sum over channels is a map (n, h, w).

    Raises:
        ValueError: Images or targets of another shape, or targets that are no classes.

    Examples:
        >>> import kdx, torch
        >>> network, images = kdx.build("resnet10", 3, "small", 0.125), torch.rand(2, 3, 32, 32)
        >>> maps = kdx.saliency(network, images, torch.tensor([0, 2]))
        >>> tuple(maps.sum(1).shape)
        (2, 32, 32)
    """
    return logit_gradients(model, images, target).abs()


def logit_gradients(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """The gradient of the logit of each image's class, with its sign; as for :func:`saliency`."""
    return _gradients(model, images, target, lambda logits, labels: logits.gather(1, labels[:, None]).sum())


def loss_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    r"""The gradient of the loss, :math:`\partial\, \mathrm{CE}(f(x), y) / \partial x` (Tsipras et al. 2019).

    Args:
        model: As for :func:`saliency`.
        images: (n, c, h, w), normalised as the network expects.
        labels: (n,) class indices, the true classes.

    Returns:
        float32 (n, c, h, w), with its sign. Each image has the gradient of its own cross-entropy.

    Raises:
        ValueError: As for :func:`saliency`.
    """
    return _gradients(model, images, labels, lambda z, y: F.cross_entropy(z, y, reduction="sum"))


def edges(images: Tensor) -> Tensor:
    """Sobel's gradient magnitude of the grey image, which asks no network: (n, c, h, w) -> (n, h, w) >= 0."""
    grey = images.mean(1, keepdim=True)
    kernel = images.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([kernel, kernel.T])[:, None])
    return slopes.square().sum(1).sqrt()


def clipped(gradients: Tensor, deviations: float = 3.0) -> Tensor:
    """Gradients as pictures: clipped to ``deviations`` standard deviations of each image around its mean, and scaled.

    Args:
        gradients: (n, c, h, w), with their sign.
        deviations: Half of the range that is drawn.

    Returns:
        (n, c, h, w) in [0, 1]; 0.5, grey, is the mean, and throughout where all values are equal.
    """
    flat = gradients.flatten(1)
    mean, deviation = flat.mean(1), flat.std(1, correction=0).clamp(min=torch.finfo(flat.dtype).tiny)
    standard = (gradients - mean[:, None, None, None]) / deviation[:, None, None, None]
    return standard.clamp(-deviations, deviations) / (2 * deviations) + 0.5


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    check_input(model, images)
    labels = class_indices(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"expected a class index for each of {len(images)} images, got {tuple(labels.shape)}")
    found = []
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        for x, y in zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
            x, y = x.detach().clone().requires_grad_(), y.to(x.device).clone()  # copies of inference tensors are none
            logits = logits_of(forward(model, x))
            if (y < 0).any() or (y >= logits.shape[1]).any():
                raise ValueError(f"expected classes 0 to {logits.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
            found.append(torch.autograd.grad(objective(logits, y), x)[0].float())
    return torch.cat(found)
