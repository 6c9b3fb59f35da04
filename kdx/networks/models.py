"""Networks: a registry, and checkpoints.

``MODELS`` maps a name to a function of (classes, stem, width), and its default width factor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import efficientnet, mobilenetv2, resnet

STEMS = ("imagenet", "small")


class ResNet(resnet.ResNet):
    """torchvision's ResNet with its channels multiplied by ``width`` and a choice of stem.

    The ``small`` stem, for images of about 32 pixels, is a 3x3 convolution of stride 1
    without pooling, so the stages see 1, 1/2, 1/4 and 1/8 of the image's resolution.
    """

    architecture: dict[str, Any]  # the arguments of `build`

    def __init__(self, block: Any, layers: Sequence[int], classes: int, stem: str, width: float) -> None:
        self._width = width
        super().__init__(block, list(layers), num_classes=classes)
        stem_channels = round(64 * width)
        if stem == "small":
            self.conv1 = nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.fc = nn.Linear(round(512 * width) * block.expansion, classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **settings: Any) -> nn.Sequential:
        if planes == 64:  # the first stage follows the stem
            self.inplanes = round(64 * self._width)
        return super()._make_layer(block, round(planes * self._width), *args, **settings)


class MobileNetV2(mobilenetv2.MobileNetV2):
    """torchvision's MobileNetV2 with a width factor and a choice of stem, without dropout.

    The ``small`` stem takes away the first two strides, so the stages see 1, 1/2, 1/4 and 1/8 of
    the image's resolution.
    """

    architecture: dict[str, Any]  # the arguments of `build`

    def __init__(self, classes: int, stem: str, width: float) -> None:
        super().__init__(num_classes=classes, width_mult=width, dropout=0.0)
        if stem == "small":
            for convolution in (self.features[0][0], self.features[2].conv[1][0]):
                convolution.stride = (1, 1)


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017), which torchvision lacks, with a width factor and a choice of stem.

    The ``small`` stem takes away the first two strides, as in :class:`MobileNetV2`.
    """

    architecture: dict[str, Any]  # the arguments of `build`

    def __init__(self, classes: int, stem: str, width: float) -> None:
        super().__init__()
        blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        channels = [max(1, round(width * k)) for k in (32, *(k for k, _ in blocks))]
        strides = [2, *(stride for _, stride in blocks)]
        if stem == "small":
            strides[0] = strides[2] = 1
        layers = [_convolution(3, channels[0], 3, strides[0])]
        for before, after, stride in zip(channels, channels[1:], strides[1:], strict=False):
            depthwise = _convolution(before, before, 3, stride, before)
            layers.append(nn.Sequential(*depthwise, *_convolution(before, after, 1)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def _convolution(before: int, after: int, side: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    convolution = nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class EfficientNetB0(efficientnet.EfficientNet):
    """torchvision's EfficientNet-B0 with a width factor and a choice of stem, without dropout and stochastic depth.

    The ``small`` stem takes away the first two strides, as in :class:`MobileNetV2`.
    """

    architecture: dict[str, Any]  # the arguments of `build`

    def __init__(self, classes: int, stem: str, width: float) -> None:
        blocks = [  # expansion, kernel, stride, channels before and after, layers
            (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
            (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
        ]  # fmt: skip
        configurations = [efficientnet.MBConvConfig(*block, width_mult=width) for block in blocks]
        super().__init__(configurations, dropout=0.0, stochastic_depth_prob=0.0, num_classes=classes)
        if stem == "small":
            for convolution in (self.features[0][0], self.features[2][0].block[1][0]):
                convolution.stride = (1, 1)


Network = ResNet | MobileNetV2 | MobileNetV1 | EfficientNetB0

MODELS: dict[str, tuple[Callable[..., Network], float]] = {
    "resnet10": (partial(ResNet, resnet.BasicBlock, (1, 1, 1, 1)), 0.25),
    "resnet18": (partial(ResNet, resnet.BasicBlock, (2, 2, 2, 2)), 1.0),
    "resnet34": (partial(ResNet, resnet.BasicBlock, (3, 4, 6, 3)), 1.0),
    "resnet50": (partial(ResNet, resnet.Bottleneck, (3, 4, 6, 3)), 1.0),
    "resnet101": (partial(ResNet, resnet.Bottleneck, (3, 4, 23, 3)), 1.0),
    "mobilenet_v2": (MobileNetV2, 1.0),
    "mobilenet_v1": (MobileNetV1, 1.0),
    "efficientnet_b0": (EfficientNetB0, 1.0),
}


def build(
    name: str, classes: int, stem: str = "imagenet", width: float | None = None, seed: int | None = None
) -> Network:
    """Build a registered network with fresh weights.

    Args:
        name: From ``MODELS``; ``"resnet10@0.125"`` carries its width with it.
        stem: ``"imagenet"`` (torchvision's, for ~224 px images) or ``"small"`` (for ~32 px images).
        width: Factor on torchvision's channel counts, where the name carries none; None: the registry's.
        seed: Of the weights, which leaves torch's global CPU generator alone; None: from that generator.

    Returns:
        The network; ``.architecture`` holds the arguments that rebuild it.
    """
    architecture = architecture_of(name, classes, stem, width)
    make, _ = MODELS[architecture["name"]]
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        model = make(classes=classes, stem=stem, width=architecture["width"])
    model.architecture = architecture
    return model


def architecture_of(name: str, classes: int, stem: str = "imagenet", width: float | None = None) -> dict[str, Any]:
    """The checked arguments of :func:`build`: name, classes, stem and width.

    Raises:
        ValueError: An unknown name or stem, or classes or a width that the network cannot have.
    """
    name, width = parse_name(name, width)
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose from: {', '.join(STEMS)}")
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if not 1 / 128 < width < math.inf:  # 64 channels times width, rounded, are one or more
        raise ValueError(f"width: expected at least 1/64, got {width}")
    if name in ("resnet50", "resnet101") and (64 * width) % 1:
        raise ValueError(f"width: expected a multiple of 1/64 for {name}, got {width}")
    return {"name": name, "classes": classes, "stem": stem, "width": width}


def parse_name(name: str, width: float | None = None) -> tuple[str, float]:
    """Name in ``MODELS`` and width of ``"resnet10@0.125"``, or of ``"resnet10"`` with ``width`` or its default."""
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a model, such as resnet10@0.125, got {name!r}")
    known, at, own_width = name.partition("@")
    if known not in MODELS:
        raise ValueError(f"unknown model {known!r}; choose from: {', '.join(MODELS)}")
    try:
        return known, float(own_width) if at else MODELS[known][1] if width is None else width
    except ValueError as error:
        raise ValueError(f"expected a model such as resnet10@0.125, got {name!r}") from error


def save_checkpoint(path: Path, model: Any, header: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write weights as safetensors with a JSON header: the architecture and what ``header`` adds
    (class names, normalisation, metrics).

    Args:
        path: The file.
        model: From :func:`build`.
        header: JSON literals.
        dtype: Of the stored weights that are not integers; None: their own.

    Raises:
        ValueError: A network that kdx could not rebuild, or weights that ``dtype`` cannot hold.
    """
    if not hasattr(model, "architecture"):
        raise ValueError(f"expected a network from kdx.build, got {type(model).__name__}, which kdx could not rebuild")
    text = json.dumps({"architecture": model.architecture, **header})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if dtype is not None:
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
        if lost := [name for name, weight in weights.items() if not weight.isfinite().all()]:
            raise ValueError(f"weights too large for {dtype}: {', '.join(lost)}")
    save_file(weights, path, metadata={"kdx": text})


def load_checkpoint(path: Path | str, make: Callable[..., Any] = build) -> tuple[Any, dict[str, Any]]:
    """The network (float32, on the CPU, in evaluation mode) and header that :func:`save_checkpoint` wrote.

    ``make`` builds the network of an architecture.
    """
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = make(**header["architecture"], seed=0)
    model.load_state_dict(weights)
    return model.eval(), header


def read_header(path: Path | str) -> dict[str, Any]:
    """The header that :func:`save_checkpoint` wrote, without the weights."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("kdx", "null"))
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors checkpoint of kdx ({error})") from error
    if header is None:
        raise ValueError(f"{path}: a safetensors file without kdx's header; was it written by save_checkpoint?")
    return header
