"""Distillation techniques: what a teacher adds to the loss of its student.

``TECHNIQUES`` maps a name to a class. Every loss is the mean cross-entropy with the labels, times ``label_weight``,
plus the technique's ``guidance``. Techniques combine: ``"response+attention"``. The key of a run covers the class of
its technique and whatever that names, so an edit retrains only the students of that technique.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.networks.stages import Tap, outputs, pre_activations

TECHNIQUES: dict[str, type[Technique]] = {}


@dataclass(frozen=True)
class Seen:
    """The output of a network for a batch: logits (n, classes), and stage -> features (n, k, h, w)."""

    logits: Tensor
    features: Mapping[str, Tensor]


@dataclass(frozen=True)
class Technique:
    """A way to train. Its fields are its settings, whose names differ between techniques."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    @property
    def label_weight(self) -> float:
        """Factor on the cross-entropy with the labels."""
        return 1.0

    @property
    def label_smoothing(self) -> float:
        """Weight of all classes alike in the labels, as torch's."""
        return 0.0

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        """Where in a network the features of each stage are taken; {} if logits are enough."""
        return {}

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module | None:
        """Layers for these features that are trained with the student and then dropped; None if there are none."""
        return None

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        """The teacher's share of the loss of a batch, a scalar."""
        raise NotImplementedError


def technique(name: str) -> Any:
    """Class decorator that enters a technique into ``TECHNIQUES``."""

    def enter(cls: type[Technique]) -> type[Technique]:
        TECHNIQUES[name] = cls
        cls.name = name
        return cls

    return enter


def settings_of(name: str) -> list[str]:
    """The settings of a technique, or of several joined by +."""
    return [field.name for part in _classes(name) for field in fields(part)]


def needs_teacher(name: str) -> bool:
    """Whether a technique, or several joined by +, learns from a teacher."""
    return any(part.needs_teacher for part in _classes(name))


def _classes(name: str) -> list[type[Technique]]:
    """The classes of techniques joined by +, in the order of the registry."""
    names = name.split("+")
    if unknown := [part for part in names if part not in TECHNIQUES]:
        raise ValueError(
            f"unknown technique {unknown[0]!r}; choose from: {', '.join(TECHNIQUES)}, or several joined by +"
        )
    alone = [part for part in names if not TECHNIQUES[part].needs_teacher]
    if len(set(names)) < len(names) or (alone and len(names) > 1):
        raise ValueError(
            f"technique {name!r}: expected different techniques joined by +, and "
            f"{repr(alone[0]) if alone else 'one without a teacher'} only by itself"
        )
    return [cls for known, cls in TECHNIQUES.items() if known in names]


def find_techniques(name: str, settings: Mapping[str, Any]) -> list[Technique]:
    """The techniques of a name such as ``"response"`` or ``"response+attention"``, with their settings.

    Args:
        name: Techniques joined by +; their order makes no difference.
        settings: Parameters of any of them.

    Raises:
        ValueError: An unknown technique or setting, or a technique named twice.
    """
    choices = settings_of(name)
    if strange := sorted(set(settings) - set(choices)):
        raise ValueError(
            f"unknown settings of {name!r}: {', '.join(strange)}; choose from: {', '.join(choices) or 'none'}"
        )
    return [
        part(**{field.name: settings[field.name] for field in fields(part) if field.name in settings})
        for part in _classes(name)
    ]


@technique("label")
@dataclass(frozen=True)
class Label(Technique):
    """Cross-entropy with the labels: how teachers and bases are trained."""

    needs_teacher = False


@technique("smoothing")
@dataclass(frozen=True)
class Smoothing(Technique):
    r"""Label smoothing (Szegedy et al. 2016), without a teacher.

    .. math:: (1-\alpha)\,\mathrm{CE}(z, y) + \alpha\,\mathrm{CE}(z, u)

    with u uniform over all classes, the true one among them.

    Attributes:
        label_smoothing: :math:`\alpha`, in [0, 1).
    """

    needs_teacher = False
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"smoothing: expected 0 <= label_smoothing < 1, got {self.label_smoothing}")


@technique("response")
@dataclass(frozen=True)
class Response(Technique):
    r"""Response-based distillation (Hinton et al. 2015).

    .. math:: (1-\alpha)\,\mathrm{CE}(z_s, y)
              + \alpha T^2\, \mathrm{KL}(\mathrm{softmax}(z_t/T) \,\|\, \mathrm{softmax}(z_s/T))

    Attributes:
        alpha: Weight of the teacher, in [0, 1].
        temperature: T > 0.
    """

    alpha: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise ValueError(
                f"response: expected 0 <= alpha <= 1 and temperature > 0, got {self.alpha} and {self.temperature}"
            )

    @property
    def label_weight(self) -> float:
        return 1 - self.alpha

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        t = self.temperature
        divergence = F.kl_div(
            F.log_softmax(student.logits / t, 1),
            F.log_softmax(teacher.logits / t, 1),
            reduction="batchmean",
            log_target=True,
        )
        return self.alpha * t**2 * divergence


@technique("attention")
@dataclass(frozen=True)
class Attention(Technique):
    r"""Attention transfer (Zagoruyko & Komodakis 2017), as its authors' code computes it.

    .. math:: \mathrm{CE} + w \sum_l \operatorname{mean}\big((q_l^s - q_l^t)^2\big), \qquad
              q_l = \frac{a_l}{\lVert a_l \rVert_2}, \quad
              a_l = \tfrac{1}{k}\sum_{c=1}^{k} (A_l^c)^2 \text{ over locations}

    with :math:`A_l` the features of stage l and the mean over images and locations. Where the
    stages of the two networks differ in size, the larger one is averaged down to the other.

    Attributes:
        attention_weight: w >= 0.
    """

    attention_weight: float = 1000.0

    def __post_init__(self) -> None:
        _check_weight(self.attention_weight, "attention_weight")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return outputs(model, images)

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        losses = []
        for stage, features in student.features.items():
            maps = [attention_map(x) for x in _same_grid(features, teacher.features[stage])]
            losses.append((maps[0] - maps[1]).pow(2).mean())
        return self.attention_weight * torch.stack(losses).sum()


@technique("overhaul")
@dataclass(frozen=True)
class Overhaul(Technique):
    r"""A comprehensive overhaul of feature distillation (Heo et al. 2019).

    .. math:: \mathrm{CE} + \frac{w}{n} \sum_{l=1}^{L} \frac{1}{2^{L-l}}
              \sum d_p\big(r_l(F_l^s),\, \max(F_l^t, m_l)\big), \qquad
              d_p(s, t) = \begin{cases} 0 & s \le t \le 0 \\ (s-t)^2 & \text{else} \end{cases}

    with F the features before the last ReLU of stage l, n the images of a batch, r a trained 1x1
    convolution and batch norm, and m the margin of each channel (:func:`margin`). Stages that
    differ in size are averaged down to the smaller one.

    Attributes:
        overhaul_weight: w >= 0.
    """

    overhaul_weight: float = 1e-3

    def __post_init__(self) -> None:
        _check_weight(self.overhaul_weight, "overhaul_weight")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return pre_activations(model, images)

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        return nn.ModuleDict(
            {
                stage: _Regressor(features.shape[1], teacher.features[stage].shape[1], stage, teacher_taps[stage].norm)
                for stage, features in student.features.items()
            }
        )

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        last = len(student.features) - 1
        losses = []
        for i, (stage, features) in enumerate(student.features.items()):
            regressor = adapter[stage]
            assert isinstance(regressor, _Regressor)
            s, t = _same_grid(regressor(features), torch.maximum(teacher.features[stage], regressor.margin))
            losses.append(partial_l2(s, t) / 2 ** (last - i))
        return self.overhaul_weight * torch.stack(losses).sum() / len(student.logits)


@technique("alp")
@dataclass(frozen=True)
class AttentionLayerProjection(Technique):
    r"""Attention-weighted layer projection (Passban et al. 2021), for stages of a CNN.

    Every stage of the student is matched to a mix of *all* stages of the teacher. With
    :math:`t_i` the spatial means of the teacher's stage i (:math:`k_i` channels) and
    :math:`P_l^i s_l` a trained linear map of the student's to as many,

    .. math:: \mathrm{CE} + w \sum_l \frac{1}{\sum_i k_i} \sum_i
              \lVert P_l^i s_l - \varepsilon_{li} t_i \rVert^2, \qquad
              \varepsilon_l = \operatorname{softmax}_i \frac{\langle P_l^i s_l, t_i\rangle}{\sqrt{k_i}},

    averaged over images. The mix lives in the direct sum of the teacher's stages, since they
    differ in width; in the language models of the paper they do not.

    Attributes:
        alp_weight: w >= 0.
    """

    alp_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.alp_weight, "alp_weight")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return outputs(model, images)

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        width = sum(features.shape[1] for features in teacher.features.values())
        return nn.ModuleDict({stage: nn.Linear(f.shape[1], width) for stage, f in student.features.items()})

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        means = [features.mean((2, 3)) for features in teacher.features.values()]
        widths = [mean.shape[1] for mean in means]
        losses = []
        for stage, features in student.features.items():
            parts = adapter[stage](features.mean((2, 3))).split(widths, 1)
            scores = [(p * t).sum(1) / math.sqrt(k) for p, t, k in zip(parts, means, widths, strict=True)]
            shares = torch.stack(scores, 1).softmax(1)
            mix = torch.cat([shares[:, i, None] * mean for i, mean in enumerate(means)], 1)
            losses.append(F.mse_loss(torch.cat(parts, 1), mix))
        return self.alp_weight * torch.stack(losses).sum()


class _Regressor(nn.Module):
    """Maps the student's features to the teacher's channels, and holds the teacher's margins (k, 1, 1)."""

    margin: Tensor

    def __init__(self, channels: int, teacher_channels: int, stage: str, norm: nn.Module | None) -> None:
        super().__init__()
        if not isinstance(norm, nn.BatchNorm2d) or norm.weight is None:
            raise ValueError(f"overhaul: expected a BatchNorm2d before the end of {stage} in the teacher, got none")
        convolution = nn.Conv2d(channels, teacher_channels, 1, bias=False)
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))
        self.register_buffer("margin", margin(norm.weight, norm.bias)[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def attention_map(features: Tensor) -> Tensor:
    """Mean squared activation over channels, of unit length over locations: (n, k, h, w) -> (n, h * w)."""
    return F.normalize(features.pow(2).mean(1).flatten(1))


def margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""Expected value of the negative responses of each channel, from the weight and bias (k,) of its batch norm.

    .. math:: m = \mathrm{E}[x \mid x < 0] = \beta - s\,\frac{\varphi(\beta/s)}{\Phi(-\beta/s)}, \qquad
              x \sim \mathcal N(\beta, s^2),\; s = |\gamma|

    Where less than 0.1 % of a channel is negative, -3 s (Heo et al. 2019, and its authors' code).
    A channel of weight 0 is constant: its margin is min(bias, 0).
    """
    s, b = weight.detach().double().abs(), bias.detach().double()
    negative = torch.special.ndtr(-b / s)
    density = torch.exp(-((b / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = torch.where(negative > 0.001, b - s * density / negative, -3 * s)
    return torch.where(s > 0, expected, b.clamp(max=0)).to(weight.dtype)


def partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences, except for elements where student <= teacher <= 0."""
    spared = (student <= teacher) & (teacher <= 0)
    return F.mse_loss(torch.where(spared, teacher, student), teacher, reduction="sum")


def _same_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Features of two networks (n, k, h, w), both averaged down to the smaller height and width."""
    if a.shape[2:] == b.shape[2:]:
        return a, b
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)


def _check_weight(value: float, name: str) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite weight of at least 0, got {value}")
