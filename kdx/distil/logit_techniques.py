"""Techniques that look at answers: labels, and the logits of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.distil.technique import Seen, Technique, check_temperature, check_weight


@dataclass(frozen=True)
class Label(Technique):
    """Cross-entropy with the labels: how teachers and bases are trained."""

    name = "label"
    needs_teacher = False


@dataclass(frozen=True)
class Smoothing(Technique):
    r"""Label smoothing (Szegedy et al. 2016), without a teacher.

    .. math:: (1-\alpha)\,\mathrm{CE}(z, y) + \alpha\,\mathrm{CE}(z, u)

    with u uniform over all classes, the true one among them.

    Attributes:
        label_smoothing: :math:`\alpha`, in [0, 1).
    """

    name = "smoothing"
    needs_teacher = False
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"smoothing: expected 0 <= label_smoothing < 1, got {self.label_smoothing}")


@dataclass(frozen=True)
class Response(Technique):
    r"""Response-based distillation (Hinton et al. 2015).

    .. math:: (1-\alpha)\,\mathrm{CE}(z_s, y)
              + \alpha T^2\, \mathrm{KL}(\mathrm{softmax}(z_t/T) \,\|\, \mathrm{softmax}(z_s/T))

    Standardised (Sun et al. 2024), the second term has the logits of every image with mean 0 and standard deviation
    1, so that T is a multiple of their spread, and is ten times as large:

    .. math:: (1-\alpha)\,\mathrm{CE}(z_s, y) + 10\,\alpha T^2\,
              \mathrm{KL}(\mathrm{softmax}(\hat z_t/T) \,\|\, \mathrm{softmax}(\hat z_s/T)), \qquad
              \hat z = \frac{z - \bar z}{\sigma(z) + 10^{-7}}

    With its defaults, the weights are the authors': 0.1 on the labels, 9 on the teacher.

    Attributes:
        alpha: Weight of the teacher, in [0, 1]; None takes 0.5, or 0.9 if standardised.
        temperature: T > 0; None takes 4, or 2 if standardised.
        standardise: True asks for the teacher's logits up to scale and shift. It takes three classes or more, since two
            standardised logits say only which is larger.
    """

    name = "response"
    alpha: float | None = None
    temperature: float | None = None
    standardise: bool = False

    def __post_init__(self) -> None:
        alpha, temperature = (0.9, 2.0) if self.standardise else (0.5, 4.0)
        alpha = alpha if self.alpha is None else self.alpha
        temperature = temperature if self.temperature is None else self.temperature
        if not isinstance(self.standardise, bool):
            raise ValueError(f"response: expected standardise to be True or False, got {self.standardise!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"response: expected 0 <= alpha <= 1, got {alpha}")
        check_temperature(temperature, "temperature")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "temperature", temperature)

    @property
    def label_weight(self) -> float:
        assert self.alpha is not None
        return 1 - self.alpha

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        assert self.alpha is not None
        assert self.temperature is not None
        logits, weight = [student.logits, teacher.logits], self.alpha
        if self.standardise:
            logits, weight = [standardised(z) for z in logits], 10 * self.alpha
        student_log, teacher_log = (F.log_softmax(z / self.temperature, 1) for z in logits)
        return weight * self.temperature**2 * divergence(student_log, teacher_log)


@dataclass(frozen=True)
class Decoupled(Technique):
    r"""Decoupled knowledge distillation (Zhao et al. 2022).

    The divergence of ``response`` is that of the true class y against all others together, plus that of the others
    among themselves times the teacher's probability of them, which is small where the teacher is sure. Here both
    parts have weights of their own:

    .. math:: \mathrm{CE}(z_s, y) + T^2 \big(\alpha\, \mathrm{KL}(b_t \,\|\, b_s)
              + \beta\, \mathrm{KL}(\hat p_t \,\|\, \hat p_s)\big)

    with :math:`b = (p_y, 1 - p_y)`, :math:`p = \mathrm{softmax}(z/T)`, and :math:`\hat p` the softmax of :math:`z/T`
    without y. The authors raise the second term over the first 20 of 240 epochs; here it is constant.

    Attributes:
        dkd_alpha: Weight of the true class, >= 0.
        dkd_beta: Weight of the others, >= 0. With two classes there is but one, and nothing to learn from it.
        dkd_temperature: T > 0.
    """

    name = "dkd"
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    dkd_temperature: float = 4.0

    def __post_init__(self) -> None:
        check_weight(self.dkd_alpha, "dkd_alpha")
        check_weight(self.dkd_beta, "dkd_beta")
        check_temperature(self.dkd_temperature, "dkd_temperature")

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        pairs = [decoupled(seen.logits / self.dkd_temperature, seen.labels) for seen in (student, teacher)]
        target, others = (divergence(s, t) for s, t in zip(*pairs, strict=True))
        return self.dkd_temperature**2 * (self.dkd_alpha * target + self.dkd_beta * others)


@dataclass(frozen=True)
class Correlation(Technique):
    r"""Distillation from a stronger teacher, DIST (Huang et al. 2022).

    The student need not give the teacher's probabilities, only probabilities that rise and fall with them: between the
    classes of an image, and within a class between images.

    .. math:: \mathrm{CE}(z_s, y) + T^2 \Big(\beta \big(1 - \operatorname{mean}_i \rho(p^s_{i\cdot}, p^t_{i\cdot})\big)
              + \gamma \big(1 - \operatorname{mean}_c \rho(p^s_{\cdot c}, p^t_{\cdot c})\big)\Big)

    with :math:`p = \mathrm{softmax}(z/T)` of images i and classes c, and :math:`\rho` Pearson's correlation, 0 with a
    constant. The defaults are the authors' for CIFAR; for ImageNet they take T = 1 with the same weights.

    Attributes:
        dist_beta: Weight of the correlation between classes, >= 0. With two classes it is 1 or -1, and teaches nothing.
        dist_gamma: Weight of the correlation within classes, >= 0; it takes two images or more.
        dist_temperature: T > 0.
    """

    name = "dist"
    dist_beta: float = 2.0
    dist_gamma: float = 2.0
    dist_temperature: float = 4.0

    def __post_init__(self) -> None:
        check_weight(self.dist_beta, "dist_beta")
        check_weight(self.dist_gamma, "dist_gamma")
        check_temperature(self.dist_temperature, "dist_temperature")

    def guidance(self, student: Seen, teacher: Seen, adapter: nn.Module | None) -> Tensor:
        p_s, p_t = (F.softmax(seen.logits / self.dist_temperature, 1) for seen in (student, teacher))
        between, within = 1 - correlation(p_s, p_t).mean(), 1 - correlation(p_s.T, p_t.T).mean()
        return self.dist_temperature**2 * (self.dist_beta * between + self.dist_gamma * within)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of the divergence of the student's log-probabilities (n, k) from the teacher's, in nats."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardised(logits: Tensor) -> Tensor:
    """Logits (n, classes) with mean 0 and standard deviation 1 in each image; constant ones become 0."""
    if logits.shape[1] < 3:
        raise ValueError(f"response: expected 3 classes or more if logits are standardised, got {logits.shape[1]}")
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the label against all others (n, 2), and of the others by themselves (n, classes - 1)."""
    wrong = F.one_hot(labels, logits.shape[1]) == 0
    others = logits[wrong].view(len(logits), -1)
    return torch.stack([logits[~wrong], others.logsumexp(1)], 1).log_softmax(1), others.log_softmax(1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two (n, m), in [-1, 1]; 0 for constant rows: (n,)."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))
