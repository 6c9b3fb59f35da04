"""Techniques that rebuild the teacher's features: in fewer channels, or from the student's with help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.distance import u_center
from kdx.distil.feature_techniques import same_grid
from kdx.distil.technique import Seen, Technique, check_weight, check_whole
from kdx.networks.stages import Tap, last_output, outputs


@dataclass(frozen=True)
class Factor(Technique):
    r"""Factor transfer (Kim et al. 2018).

    A *paraphraser* P, an encoder of three 3x3 convolutions, is first fitted to the teacher's last stage
    :math:`F_t`: a decoder D of as many transposed ones is to give :math:`F_t` back, in the mean squared error. Then a
    *translator* R of the student's last stage, built as P, is trained with the student:

    .. math:: \mathrm{CE} + w \operatorname{mean} \left|
              \frac{P(F_t)}{\lVert P(F_t) \rVert_2} - \frac{R(F_s)}{\lVert R(F_s) \rVert_2} \right|

    with norms over all channels and locations of an image. If the factors differ in size, the larger ones are
    averaged down.

    Attributes:
        factor_weight: w >= 0.
        factor_rate: Channels of the factors as a fraction of the teacher's, in (0, 1].
        factor_epochs: Of the paraphraser.
    """

    name = "factor"
    factor_weight: float = 1000.0
    factor_rate: float = 0.5
    factor_epochs: int = 1

    def __post_init__(self) -> None:
        check_weight(self.factor_weight, "factor_weight")
        check_whole(self.factor_epochs, "factor_epochs", 0)
        if not 0 < self.factor_rate <= 1:
            raise ValueError(f"factor_rate: expected above 0, at most 1, got {self.factor_rate}")

    @property
    def fitting_epochs(self) -> int:
        return self.factor_epochs

    @property
    def fitting_lr(self) -> float:
        return 0.01

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return last_output(model, images)

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        ours, theirs = (seen.features["last"].shape[1] for seen in (student, teacher))
        width = max(1, int(self.factor_rate * theirs))
        return nn.ModuleDict(
            {
                "paraphraser": _convolutions(nn.Conv2d, theirs, theirs, width, width),
                "decoder": _convolutions(nn.ConvTranspose2d, width, width, theirs, theirs),
                "translator": _convolutions(nn.Conv2d, ours, ours, width, width),
            }
        )

    def fitting(self, teacher: Seen, adapter: nn.Module) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        features = teacher.features["last"]
        return F.mse_loss(adapter["decoder"](adapter["paraphraser"](features)), features)

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        with torch.no_grad():
            theirs = adapter["paraphraser"](teacher.features["last"])
        s, t = same_grid(adapter["translator"](student.features["last"]), theirs)
        return self.factor_weight * F.l1_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1)))


def _convolutions(kind: type[nn.Module], *channels: int) -> nn.Sequential:
    layers = []
    for before, after in pairwise(channels):
        layers += [kind(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Prior(Technique):
    r"""Dynamic prior knowledge, DPK (Qiu et al. 2023), with a small transformer.

    In each of the last two stages, features of both networks become tokens of one width by a trained 1x1 convolution
    each. A random share :math:`\pi` of the student's tokens is replaced by the teacher's; of these, a transformer B
    rebuilds the teacher's features at all locations. With

    .. math:: L = \sum_l \operatorname{mean}\big((B_l(H_l) - F_l^t)^2\big), \qquad
              H_l = \begin{cases} C_l^t F_l^t & \text{with probability } \pi_l \\ C_l^s F_l^s & \text{else} \end{cases},
              \qquad \pi_l = 1 - \mathrm{CKA}(F_l^s, F_l^t)

    the student minimises :math:`\mathrm{CE} + w L`, and B and C minimise L, whatever w; the loss that is reported is
    :math:`\mathrm{CE} + L`. The teacher helps less as the student becomes like it. The authors' code is not public;
    width, depth and the choice of stages are those of kdx, and so is w, chosen in short trainings on training images
    of CIFAR-10: with 1 the student hardly learns from L, and much larger weights keep it from its labels. The
    student's features are averaged, or repeated, to the teacher's grid.

    Attributes:
        prior_weight: w >= 0.
        prior_width: Of the tokens, a multiple of 4, the number of heads.
        prior_blocks: Of each transformer.
    """

    name = "prior"
    prior_weight: float = 10.0
    prior_width: int = 64
    prior_blocks: int = 2

    def __post_init__(self) -> None:
        check_weight(self.prior_weight, "prior_weight")
        check_whole(self.prior_blocks, "prior_blocks", 1)
        check_whole(self.prior_width, "prior_width", 4)
        if self.prior_width % 4:
            raise ValueError(f"prior_width: expected a multiple of 4, got {self.prior_width}")

    def taps(self, model: nn.Module, images: Tensor) -> dict[str, Tap]:
        return dict(zip(("last", "last but one"), reversed(outputs(model, images).values()), strict=False))

    def adapter(self, student: Seen, teacher: Seen, teacher_taps: Mapping[str, Tap]) -> nn.Module:
        return nn.ModuleDict(
            {
                stage: _Rebuilder(features, teacher.features[stage], self.prior_width, self.prior_blocks)
                for stage, features in student.features.items()
            }
        )

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert isinstance(adapter, nn.ModuleDict)
        losses = []
        for stage, features in student.features.items():
            target = teacher.features[stage]
            losses.append(F.mse_loss(adapter[stage](scale_gradient(features, self.prior_weight), target), target))
        return torch.stack(losses).sum()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values; the gradient that passes back through them is multiplied."""
    return x.detach() + factor * (x - x.detach())


class _Rebuilder(nn.Module):
    """The transformer of a stage, and what is known of the likeness of both networks there."""

    def __init__(self, student: Tensor, teacher: Tensor, width: int, blocks: int) -> None:
        super().__init__()
        channels, *grid = teacher.shape[1:]
        self.ours, self.theirs = (nn.Conv2d(k, width, 1) for k in (student.shape[1], channels))
        self.position = nn.Parameter(0.02 * torch.randn(width, *grid))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.last = nn.Linear(width, channels)
        self.products = torch.zeros(3, dtype=torch.float64)  # on the CPU, since not every device has float64

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's features (n, k, h, w), rebuilt."""
        student = F.adaptive_avg_pool2d(student, (teacher.shape[2], teacher.shape[3]))
        given = torch.rand(len(student), 1, *teacher.shape[2:]) < 1 - self.likeness(student.detach(), teacher)
        tokens = torch.where(given.to(student.device), self.theirs(teacher), self.ours(student)) + self.position
        return self.last(self.blocks(tokens.flatten(2).mT)).mT.unflatten(2, teacher.shape[2:])

    def likeness(self, student: Tensor, teacher: Tensor) -> float:
        r"""CKA (Nguyen et al. 2021), in [0, 1]; of inner products averaged over batches, recent ones counting more.

        .. math:: \frac{\operatorname{mean} \langle P_s, P_t \rangle}
                  {\sqrt{\operatorname{mean} \langle P_s, P_s \rangle \operatorname{mean} \langle P_t, P_t \rangle}}

        with P the U-centred products of the features (n, ...) of a batch. A batch of fewer than four images tells
        nothing; before the first other one, 0.
        """
        if len(student) > 3:
            p, q = (u_center(_products(features)) for features in (student, teacher))
            self.products = 0.9 * self.products + 0.1 * torch.stack([(p * q).sum(), p.square().sum(), q.square().sum()])
        both, ours, theirs = self.products.tolist()
        return max(0.0, min(1.0, both / (ours * theirs) ** 0.5)) if ours > 0 and theirs > 0 else 0.0


def _products(features: Tensor) -> Tensor:
    """Inner products of n images' features, float64 (n, n) on the CPU, with zeros on the diagonal."""
    flat = features.flatten(1)
    return (flat @ flat.T).cpu().double().fill_diagonal_(0.0)
