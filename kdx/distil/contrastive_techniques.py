"""Techniques that compare images with each other: with other images, or with rotated views of themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.distil.logit_techniques import divergence
from kdx.distil.technique import Seen, Technique, check_temperature, check_weight, check_whole
from kdx.networks.stages import Tap, last_output


@dataclass(frozen=True)
class Contrastive(Technique):
    r"""Contrastive representation distillation, CRD (Tian et al. 2020), as its authors' code computes it.

    With f and g the student's and the teacher's features of an image, averaged over space and mapped to unit vectors
    by a trained linear layer each, and a memory :math:`\bar f, \bar g` of these vectors for every training image,

    .. math:: \mathrm{CE} + w \operatorname{mean}_i \big(\ell(f_i, \bar g) + \ell(g_i, \bar f)\big), \qquad
              \ell(f_i, \bar g) = -\log \sigma(u_{ii}) - \sum_{j \in J_i} \log \sigma(-u_{ij}), \qquad
              u_{ij} = \frac{\langle f_i, \bar g_j \rangle}{\tau} - \log c - \log N

    where :math:`J_i` are N images drawn among those of other classes, and c the mean of
    :math:`\exp(\langle f, \bar g \rangle / \tau)` in the first batch. The number of training images, by which the
    authors divide twice, cancels. After each batch its vectors enter the memory, mixed with those that were there.

    Attributes:
        contrastive_weight: w >= 0.
        contrastive_negatives: N; they cost time more than memory.
        contrastive_width: Length of the vectors.
        contrastive_temperature: :math:`\tau` > 0.
        contrastive_momentum: Share of a vector in the memory that stays, in [0, 1).
    """

    name = "contrastive"
    contrastive_weight: float = 0.8
    contrastive_negatives: int = 16384
    contrastive_width: int = 128
    contrastive_temperature: float = 0.07
    contrastive_momentum: float = 0.5

    def __post_init__(self) -> None:
        check_weight(self.contrastive_weight, "contrastive_weight")
        check_temperature(self.contrastive_temperature, "contrastive_temperature")
        check_whole(self.contrastive_negatives, "contrastive_negatives", 1)
        check_whole(self.contrastive_width, "contrastive_width", 1)
        if not 0 <= self.contrastive_momentum < 1:
            raise ValueError(f"contrastive_momentum: expected 0 to less than 1, got {self.contrastive_momentum}")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return last_output(model, images)

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        widths = [seen.features["last"].shape[1] for seen in (student, teacher)]
        return _Memory(widths, self.contrastive_width, student.all_labels)

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(adapter, _Memory)
        vectors = [
            F.normalize(layer(pooled(seen))) for layer, seen in zip(adapter.layers, (student, teacher), strict=True)
        ]
        others = adapter.of_other_classes(student.labels, self.contrastive_negatives)
        rows = torch.cat([student.rows[:, None], others], 1)
        scores = [
            (own @ bank.T).gather(1, rows) / self.contrastive_temperature
            for own, bank in zip(vectors, adapter.banks.flip(0), strict=True)
        ]
        adapter.remember(student.rows, torch.stack(vectors), self.contrastive_momentum)
        return self.contrastive_weight * adapter.discrimination(torch.stack(scores))


class _Memory(nn.Module):
    """Vectors of all training images by the student and the teacher, and the layers that make them."""

    banks: Tensor
    log_mean: Tensor
    order: Tensor
    counts: Tensor

    def __init__(self, widths: list[int], width: int, labels: Tensor) -> None:
        super().__init__()
        if len(labels.unique()) < 2:
            raise ValueError("contrastive: expected training images of two classes or more, got one")
        self.layers = nn.ModuleList([nn.Linear(own, width) for own in widths])
        spread = math.sqrt(3 / width)
        self.register_buffer("banks", 2 * spread * torch.rand(2, len(labels), width) - spread)
        self.register_buffer("log_mean", torch.full((2, 1, 1), math.nan))
        self.register_buffer("order", labels.argsort(stable=True))
        self.register_buffer("counts", labels.bincount())

    def of_other_classes(self, labels: Tensor, n: int) -> Tensor:
        """Rows of images of other classes than each of ``labels`` (m,), drawn with replacement: (m, n)."""
        own, before = self.counts[labels, None], (self.counts.cumsum(0) - self.counts)[labels, None]
        drawn = torch.rand(len(labels), n).to(labels.device)
        place = (drawn * (len(self.order) - own)).long()
        return self.order[place + own * (place >= before)]

    @torch.no_grad()
    def remember(self, rows: Tensor, vectors: Tensor, momentum: float) -> None:
        """Mix vectors (2, m, width) into the banks, which are copied: the gradient needs them as they were."""
        mixed = F.normalize(momentum * self.banks[:, rows] + (1 - momentum) * vectors, dim=2)
        self.banks = self.banks.index_copy(1, rows, mixed)

    def discrimination(self, scores: Tensor) -> Tensor:
        """Noise-contrastive loss of scores (2, m, 1 + n), first those of an image with itself; summed over the 2."""
        if self.log_mean.isnan().any():
            self.log_mean = (scores.flatten(1).logsumexp(1) - math.log(scores[0].numel())).detach()[:, None, None]
        u = scores - self.log_mean - math.log(scores.shape[2] - 1)
        return (F.softplus(-u[..., 0]) + F.softplus(u[..., 1:]).sum(2)).mean(1).sum()


@dataclass(frozen=True)
class SelfSupervised(Technique):
    r"""Self-supervised distillation, SSKD (Xu et al. 2020), as its authors' code computes it.

    Both networks also see every image rotated by 90, 180 and 270 degrees. A head, linear-ReLU-linear on features
    averaged over space, gives a vector of each; :math:`c_{ai}` is the cosine of those of the rotated image a and the
    image i, as it stands. The teacher's head is fitted first, to tell by :math:`\mathrm{softmax}_i\, c_{ai}` of which
    image a rotated one was made. Then

    .. math:: \mathrm{CE} + \alpha T^2\, \mathrm{KL}(p_t \,\|\, p_s)
              + \beta T^2\, \mathrm{KL}(\tilde p_t \,\|\, \tilde p_s)
              + \gamma S^2\, \mathrm{KL}\big(\mathrm{softmax}(c_t/S) \,\|\, \mathrm{softmax}(c_s/S)\big)

    with :math:`p = \mathrm{softmax}(z/T)` of the images, and :math:`\tilde p` of the rotated ones. In the last term,
    rotated images that the teacher takes for another one's are ranked by how many come before the right one, and
    the worst are left out.

    Attributes:
        self_supervised_answers: :math:`\alpha` >= 0; 0 where ``response`` is joined.
        self_supervised_rotated: :math:`\beta` >= 0.
        self_supervised_weight: :math:`\gamma` >= 0.
        self_supervised_temperature: T > 0.
        self_supervised_sharpness: S > 0.
        self_supervised_kept: Share of the teacher's mistakes that are kept, in [0, 1].
        self_supervised_epochs: Of the teacher's head.
    """

    name = "self-supervised"
    self_supervised_answers: float = 0.9
    self_supervised_rotated: float = 2.7
    self_supervised_weight: float = 10.0
    self_supervised_temperature: float = 4.0
    self_supervised_sharpness: float = 0.5
    self_supervised_kept: float = 0.75
    self_supervised_epochs: int = 30

    def __post_init__(self) -> None:
        for name in ("answers", "rotated", "weight"):
            check_weight(getattr(self, f"self_supervised_{name}"), f"self_supervised_{name}")
        for name in ("temperature", "sharpness"):
            check_temperature(getattr(self, f"self_supervised_{name}"), f"self_supervised_{name}")
        check_whole(self.self_supervised_epochs, "self_supervised_epochs", 0)
        if not 0 <= self.self_supervised_kept <= 1:
            raise ValueError(f"self_supervised_kept: expected 0 to 1, got {self.self_supervised_kept}")

    @property
    def fitting_epochs(self) -> int:
        return self.self_supervised_epochs

    def views(self, images: Tensor) -> Tensor:
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"self-supervised: expected square images, got {tuple(images.shape[2:])}")
        return torch.cat([images.rot90(turns, (2, 3)) for turns in (1, 2, 3)])

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return last_output(model, images)

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        return nn.ModuleDict({"student": _head(pooled(student)), "teacher": _head(pooled(teacher))})

    def fitting(self, teacher: Seen, adapter: nn.Module) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        return F.cross_entropy(cosines(teacher, adapter["teacher"]), originals(teacher))

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        assert student.views is not None
        assert teacher.views is not None
        with torch.no_grad():
            theirs = cosines(teacher, adapter["teacher"])
        kept = least_mistaken(theirs, originals(teacher), self.self_supervised_kept)
        ours = cosines(student, adapter["student"])
        return (
            self.self_supervised_answers * _imitation(student.logits, teacher.logits, self.self_supervised_temperature)
            + self.self_supervised_rotated
            * _imitation(student.views.logits, teacher.views.logits, self.self_supervised_temperature)
            + self.self_supervised_weight * _imitation(ours[kept], theirs[kept], self.self_supervised_sharpness)
        )


def _head(features: Tensor) -> nn.Sequential:
    width = features.shape[1]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _imitation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The second term of ``response``; 0 of no rows."""
    if not len(student):
        return student.sum()
    return temperature**2 * divergence(*((z / temperature).log_softmax(1) for z in (student, teacher)))


def pooled(seen: Seen) -> Tensor:
    """Features of the last stage, averaged over space: (n, k)."""
    return seen.features["last"].mean((2, 3))


def cosines(seen: Seen, head: nn.Module) -> Tensor:
    """Cosines of the vectors that a head gives of m views and n images: (m, n)."""
    assert seen.views is not None
    return F.normalize(head(pooled(seen.views))) @ F.normalize(head(pooled(seen))).T


def originals(seen: Seen) -> Tensor:
    """The place in the batch of the image that each view was made of: (m,)."""
    assert seen.views is not None
    n = len(seen.rows)
    return torch.arange(len(seen.views.rows), device=seen.rows.device) % n


def least_mistaken(scores: Tensor, truth: Tensor, share: float) -> Tensor:
    """Rows of scores (m, n) in which the truth (m,) is largest, and of the others a share, nearest to it first."""
    before = (scores > scores.gather(1, truth[:, None])).sum(1)
    right = int((before == 0).sum())
    return before.argsort(stable=True)[: right + int(share * (len(before) - right))]
