"""Techniques that compare the features of teacher and student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.distil.technique import Seen, Technique, check_weight
from kdx.networks.stages import Tap, last_output, outputs, pre_activations


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
        attention_stages: Names of the stages, such as ``("L3", "L4")``; None takes all.
    """

    name = "attention"
    attention_weight: float = 1000.0
    attention_stages: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_weight(self.attention_weight, "attention_weight")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        found = outputs(model, images)
        chosen = list(found) if self.attention_stages is None else list(self.attention_stages)
        if not chosen or set(chosen) - set(found):
            raise ValueError(f"attention_stages: expected some of {', '.join(found)}, got {self.attention_stages!r}")
        return {stage: tap for stage, tap in found.items() if stage in chosen}

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        losses = []
        for stage, features in student.features.items():
            maps = [attention_map(x) for x in same_grid(features, teacher.features[stage])]
            losses.append((maps[0] - maps[1]).pow(2).mean())
        return self.attention_weight * torch.stack(losses).sum()


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

    name = "overhaul"
    overhaul_weight: float = 1e-3

    def __post_init__(self) -> None:
        check_weight(self.overhaul_weight, "overhaul_weight")

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
            s, t = same_grid(regressor(features), torch.maximum(teacher.features[stage], regressor.margin))
            losses.append(partial_l2(s, t) / 2 ** (last - i))
        return self.overhaul_weight * torch.stack(losses).sum() / len(student.logits)


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

    name = "alp"
    alp_weight: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.alp_weight, "alp_weight")

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


@dataclass(frozen=True)
class InterChannel(Technique):
    r"""Inter-channel correlation, ICKD-C (Liu et al. 2021), as its authors' code for CIFAR computes it.

    .. math:: \mathrm{CE} + \frac{w}{nk} \sum_{i=1}^{n} \lVert G_i^s - G_i^t \rVert_2^2, \qquad
              G_i = \frac{F_i F_i^\top}{\text{lengths of its rows}}

    with the last stage's features :math:`F_i` of image i as a matrix, one row a channel; the student's are first
    brought to the teacher's k channels by a trained 1x1 convolution and batch norm. The two networks may differ in
    the size of this stage and in the number of stages.

    Attributes:
        inter_channel_weight: w >= 0.
    """

    name = "inter-channel"
    inter_channel_weight: float = 2.5

    def __post_init__(self) -> None:
        check_weight(self.inter_channel_weight, "inter_channel_weight")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return last_output(model, images)

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        return regression(student.features["last"].shape[1], teacher.features["last"].shape[1])

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert adapter is not None
        s, t = channel_correlations(adapter(student.features["last"])), channel_correlations(teacher.features["last"])
        return self.inter_channel_weight * (s - t).pow(2).sum(2).mean()


class _Regressor(nn.Module):
    """Maps the student's features to the teacher's channels, and holds the teacher's margins (k, 1, 1)."""

    margin: Tensor

    def __init__(self, channels: int, teacher_channels: int, stage: str, norm: nn.Module | None) -> None:
        super().__init__()
        if not isinstance(norm, nn.BatchNorm2d) or norm.weight is None:
            raise ValueError(f"overhaul: expected a BatchNorm2d before the end of {stage} in the teacher, got none")
        self.layers = regression(channels, teacher_channels)
        self.register_buffer("margin", margin(norm.weight, norm.bias)[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def regression(channels: int, teacher_channels: int) -> nn.Sequential:
    """A 1x1 convolution and batch norm, from the student's channels to the teacher's."""
    return nn.Sequential(nn.Conv2d(channels, teacher_channels, 1, bias=False), nn.BatchNorm2d(teacher_channels))


def channel_correlations(features: Tensor) -> Tensor:
    """Products of channels, summed over locations, each row of unit length or 0: (n, k, h, w) -> (n, k, k)."""
    flat = features.flatten(2)
    return F.normalize(flat @ flat.mT, dim=2)


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


def same_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Features of two networks (n, k, h, w), both averaged down to the smaller height and width."""
    if a.shape[2:] == b.shape[2:]:
        return a, b
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
