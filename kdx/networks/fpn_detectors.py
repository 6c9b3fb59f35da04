"""Detectors: torchvision's FCOS or RetinaNet, with a feature pyramid on a network of the registry.

Their batch norms are trained, as networks from scratch need; images enter as they are stored, scaled to 0..1, and are
normalised inside, as torchvision's detectors do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead

from kdx.networks.devices import autocast
from kdx.networks.models import Network, architecture_of, build
from kdx.networks.stages import stages
from kdx.networks.threads import hooked

KINDS = ("fcos", "retinanet")
LEVELS = ("P3", "P4", "P5")  # of the pyramid, at 1/8, 1/16 and 1/32 of the image; one of 1/64 follows
TOWER = 2  # convolutions of each branch of FCOS's head
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Detector = nn.Module  # FCOS or RetinaNet of torchvision


def build_detector(
    kind: str,
    backbone: str,
    classes: int,
    size: Sequence[int] = (192, 256),
    channels: int = 32,
    width: float | None = None,
    seed: int | None = None,
) -> Detector:
    """Build a detector with fresh weights.

    Args:
        kind: ``"fcos"`` (Tian et al. 2019) or ``"retinanet"`` (Lin et al. 2017).
        backbone: A network from ``MODELS``, such as ``"resnet10@0.25"``; its last three stages enter the pyramid.
        classes: Number of classes. Labels count from 0, and none stands for background.
        size: Height and width of the images in pixels.
        channels: Of the pyramid and the head; a multiple of 32, since the head of FCOS normalises 32 groups.
        width: Factor on the backbone's channels, as for :func:`kdx.build`.
        seed: Of the weights, which leaves torch's global CPU generator alone; None: from that generator.

    Returns:
        The detector. In evaluation mode it takes a list of float images (3, h, w) in 0..1, and returns a dict of boxes
        (m, 4; left, top, right, bottom in pixels), labels and scores for each. ``.architecture`` holds the arguments
        that rebuild it.

    Raises:
        ValueError: An unknown kind or network, or sizes that it cannot have.

    Examples:
        >>> import kdx, torch
        >>> detector = kdx.build_detector("fcos", "resnet10@0.125", classes=3, size=(64, 96), seed=0).eval()
        >>> sorted(detector([torch.rand(3, 64, 96)])[0])
        ['boxes', 'labels', 'scores']
    """
    architecture = architecture_of_detector(kind, backbone, classes, size, channels, width)
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        network = build(architecture["backbone"], 2, "imagenet", architecture["width"])
        pyramid = _with_pyramid(network, channels, (size[0], size[1]))
        detector: Any = _fcos(pyramid, classes, size) if kind == "fcos" else _retinanet(pyramid, classes, size)
    detector.architecture = architecture
    return detector


def architecture_of_detector(
    kind: str, backbone: str, classes: int, size: Sequence[int], channels: int = 32, width: float | None = None
) -> dict[str, Any]:
    """The checked arguments of :func:`build_detector`, whose errors it raises."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of detector {kind!r}; choose from: {', '.join(KINDS)}")
    if classes < 1 or channels < 32 or channels % 32:
        raise ValueError(f"expected classes >= 1 and channels that are a multiple of 32, got {classes} and {channels}")
    height, across = size
    if min(size) < 64 or max(size) < 96 or height % 32 or across % 32:  # the smallest level has two places or more
        raise ValueError(f"size: expected multiples of 32 pixels, 64 x 96 or more, got {tuple(size)}")
    of = architecture_of(backbone, 2, "imagenet", width)
    return {
        "kind": kind, "backbone": of["name"], "classes": classes, "size": list(size), "channels": channels,
        "width": of["width"],
    }  # fmt: skip


def rebuild(*, seed: int | None = None, **architecture: Any) -> Network | Detector:
    """A classifier or detector, by the ``architecture`` that it carries."""
    make: Any = build_detector if "kind" in architecture else build
    return make(**architecture, seed=seed)


def _with_pyramid(network: Network, channels: int, size: tuple[int, int]) -> BackboneWithFPN:
    """The last three stages of a network under a pyramid."""
    image = torch.zeros(1, 3, *size)
    found = [name.split(".") for name in list(stages(network, image).values())[-len(LEVELS) :]]
    body, parts = network, [name[0] for name in found]
    if len(set(parts)) == 1:  # all in one sequence, as in MobileNets
        body, parts = getattr(network, parts[0]), [name[1] for name in found]
    wanted = dict(zip(parts, LEVELS, strict=True))
    widths, x = [], image
    with torch.no_grad():
        network.eval()
        for name, module in body.named_children():
            x = module(x)
            if name in wanted:
                widths.append(x.shape[1])
            if len(widths) == len(LEVELS):
                break
        network.train()
    return BackboneWithFPN(body, wanted, widths, channels)


def _fcos(pyramid: BackboneWithFPN, classes: int, size: Sequence[int]) -> FCOS:
    channels = pyramid.out_channels
    head = FCOSHead(channels, 1, classes, TOWER)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)  # the strides
    return FCOS(pyramid, classes, **_input(size), anchor_generator=anchors, head=head, score_thresh=0.05)


def _retinanet(pyramid: BackboneWithFPN, classes: int, size: Sequence[int]) -> RetinaNet:
    sizes = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in (16, 32, 64, 128))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
    return RetinaNet(pyramid, classes, **_input(size), anchor_generator=anchors)


def _input(size: Sequence[int]) -> dict[str, Any]:
    """Images are normalised, and keep their size."""
    mean, deviation = map(list, IMAGENET)
    return {
        "min_size": min(size), "max_size": max(size), "image_mean": mean, "image_std": deviation, "_skip_resize": True
    }  # fmt: skip


@contextmanager
def watch_levels(detector: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the levels P3 to P5 of a detector's pyramid in the latest forward pass of this thread in the block.

    Yields:
        dict: Level -> (n, channels, h, w), in the graph of the pass.

    Raises:
        ValueError: A detector without a pyramid in ``backbone``.
    """
    levels: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        levels.clear()
        levels.update(_named(args[0], output))

    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, BackboneWithFPN):
        raise ValueError(f"expected a detector of torchvision with a feature pyramid, got {type(detector).__name__}")
    with hooked([("backbone", backbone.register_forward_hook, keep)]):
        yield levels


def levels_of(detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """The levels P3 to P5 of a detector for images (n, 3, h, w) in 0..1, float32, in the mode that it is in."""
    model: Any = detector
    batch = model.transform(list(images))[0].tensors
    with autocast(images.device):
        levels = model.backbone(batch)
    return {name: level.float() for name, level in _named(batch, levels).items()}


def learn(detector: Detector, images: Tensor, targets: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, as the detector itself computes it in training mode, and its levels P3 to P5.

    Only pyramid and head are computed in the device's quick precision, see :func:`kdx.networks.devices.autocast`: boxes
    need more digits.

    Args:
        images: (n, 3, h, w) in 0..1.
        targets: Boxes and labels of each.

    Returns:
        The loss, a scalar, and level -> float32 (n, channels, h, w).
    """
    model: Any = detector
    batch, targets = model.transform(list(images), targets)
    with autocast(images.device):
        levels = model.backbone(batch.tensors)
        outputs = model.head(list(levels.values()))
    anchors = model.anchor_generator(batch, list(levels.values()))
    counts = [level.shape[2] * level.shape[3] for level in levels.values()]
    further = (counts,) if isinstance(detector, FCOS) else ()
    losses = model.compute_loss(targets, {name: out.float() for name, out in outputs.items()}, anchors, *further)
    named = {name: level.float() for name, level in _named(batch.tensors, levels).items()}
    return torch.stack(list(losses.values())).sum(), named


def _named(images: Tensor, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The levels at 1/8, 1/16 and 1/32 of the images, whatever the detector calls them."""
    found = {f"P{math.log2(images.shape[2] / level.shape[2]):.0f}": level for level in levels.values()}
    return {name: found[name] for name in LEVELS if name in found}


def inherit(student: Detector, teacher: Detector) -> None:
    """Start a student with its teacher's neck and head, as far as their shapes agree."""
    ours = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if name.startswith(("backbone.fpn.", "head.")) and name in ours and ours[name].shape == tensor.shape:
            ours[name] = tensor
    student.load_state_dict(ours)
