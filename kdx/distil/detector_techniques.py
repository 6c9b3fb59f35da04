"""Techniques for detectors: what a teacher's feature pyramid adds to the loss of its student.

``DETECTOR_TECHNIQUES`` maps a name to a class. Features are the levels of the pyramids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.distil.logit_techniques import Label
from kdx.distil.rebuilding_techniques import Prior
from kdx.distil.technique import Seen, Technique, check_temperature, check_weight


@dataclass(frozen=True)
class SeenPyramid(Seen):
    """A batch as a detector saw it; ``logits`` and ``all_labels`` are empty.

    Attributes:
        boxes: Of each image, float32 (m, 4): left, top, right, bottom in pixels.
        size: Height and width of the images in pixels.
    """

    boxes: Sequence[Tensor] = ()
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class FocalGlobal(Technique):
    r"""Focal and global knowledge distillation, FGD (Yang et al. 2022).

    At each level, with C channels on H x W places, T the temperature, and for each of the networks

    .. math:: A^S = HW \operatorname{softmax}\big(\operatorname{mean}_c |F| / T\big), \qquad
              A^C = C \operatorname{softmax}\big(\operatorname{mean}_{hw} |F| / T\big),

    the student's loss is that of detection plus, per image and summed over levels,

    .. math:: \sum (\alpha M + \beta N)\, A^S_t A^C_t (F_t - F_s)^2
              + \gamma \big(\lVert A^S_t - A^S_s \rVert_1 + \lVert A^C_t - A^C_s \rVert_1\big)
              + \lambda \lVert R_t(F_t) - R_s(F_s) \rVert_2^2 .

    M is 1 / area of a box, in places of the level, inside of it (of several boxes, of the smallest) and else 0; N is
    1 / number of the places outside of all boxes there, and else 0. R adds to F what a block of global context (Cao et
    al. 2019), trained with the student, makes of it. A student of other channels than its teacher gets a 1x1
    convolution. The sums grow with C and HW, so weights do not carry over between networks and sizes; the defaults are
    the authors' for RetinaNet.

    Attributes:
        foreground_weight: :math:`\alpha`.
        background_weight: :math:`\beta`.
        attention_weight: :math:`\gamma`.
        relation_weight: :math:`\lambda`.
        focal_temperature: T.
    """

    name = "fgd"
    foreground_weight: float = 1e-3
    background_weight: float = 5e-4
    attention_weight: float = 5e-4
    relation_weight: float = 5e-6
    focal_temperature: float = 0.5

    def __post_init__(self) -> None:
        for name in ("foreground_weight", "background_weight", "attention_weight", "relation_weight"):
            check_weight(getattr(self, name), name)
        check_temperature(self.focal_temperature, "focal_temperature")

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, object]) -> nn.Module:
        levels = {}
        for level, features in student.features.items():
            ours, theirs = features.shape[1], teacher.features[level].shape[1]
            align = nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1)
            parts = {"align": align, "student": _Context(theirs), "teacher": _Context(theirs)}
            levels[level] = nn.ModuleDict(parts)
        return nn.ModuleDict(levels)

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(student, SeenPyramid)
        assert isinstance(adapter, nn.ModuleDict)
        loss = student.logits.new_zeros(())
        for level, theirs in teacher.features.items():
            parts = adapter[level]
            assert isinstance(parts, nn.ModuleDict)
            ours = parts["align"](student.features[level])
            if ours.shape != theirs.shape:
                raise ValueError(f"fgd: {level}: expected levels of one size, got {ours.shape} and {theirs.shape}")
            inside, outside = masks(student.boxes, student.size, (theirs.shape[2], theirs.shape[3]))
            weight = self.foreground_weight * inside + self.background_weight * outside
            (places_s, channels_s), (places_t, channels_t) = (
                attention(features, self.focal_temperature) for features in (ours, theirs)
            )
            focal = (weight[:, None] * places_t * channels_t * (theirs - ours).square()).sum()
            likeness = (places_t - places_s).abs().sum() + (channels_t - channels_s).abs().sum()
            relation = (parts["teacher"](theirs) - parts["student"](ours)).square().sum()
            total = focal + self.attention_weight * likeness + self.relation_weight * relation
            loss = loss + total / len(theirs)
        return loss


def attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Attention to places (n, 1, h, w) and to channels (n, k, 1, 1), each of mean 1, of features (n, k, h, w)."""
    n, k, h, w = features.shape
    size = features.abs()
    places = h * w * F.softmax(size.mean(1).flatten(1) / temperature, 1)
    channels = k * F.softmax(size.mean((2, 3)) / temperature, 1)
    return places.view(n, 1, h, w), channels.view(n, k, 1, 1)


def masks(boxes: Sequence[Tensor], size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights of the places of a level inside and outside of boxes.

    Args:
        boxes: Of each image (m, 4): left, top, right, bottom in pixels.
        size: Height and width of the images in pixels.
        grid: Height and width of the level. A place belongs to a box if they overlap.

    Returns:
        float32 (n, h, w): 1 / area of the smallest box there, in places; and 1 / number of the places outside.
    """
    inside = []
    for of_image in boxes:
        scale = of_image.new_tensor([grid[1] / size[1], grid[0] / size[0]] * 2)
        left, top, right, bottom = (of_image * scale).T
        spans = []
        for first, last, count in ((top, bottom, grid[0]), (left, right, grid[1])):
            place = torch.arange(count, device=of_image.device)
            spans.append((place >= first.floor()[:, None]) & (place < last.ceil()[:, None]))  # (m, count)
        covered = (spans[0][:, :, None] & spans[1][:, None]).float()
        share = covered / covered.sum((1, 2), keepdim=True).clamp(min=1)
        inside.append(share.amax(0) if len(share) else of_image.new_zeros(grid))
    weights = torch.stack(inside)
    free = (weights == 0).float()
    return weights, free / free.sum((1, 2), keepdim=True).clamp(min=1)


class _Context(nn.Module):
    """Features plus a block of global context: at first zero, since its last layer is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key = nn.Conv2d(channels, 1, 1)
        inner = max(1, channels // 2)
        self.change = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        share = F.softmax(self.key(features).flatten(2), 2)  # (n, 1, places)
        context = (features.flatten(2) @ share.mT)[..., None]  # (n, k, 1, 1)
        return features + self.change(context)


DETECTOR_TECHNIQUES: dict[str, type[Technique]] = {known.name: known for known in (Label, FocalGlobal, Prior)}
