"""Who taught this student? Candidate teachers, ranked by what they explain of a student's answers beyond its base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import Tensor, nn

from kdx.data.own_images import common_size, read_pictures
from kdx.explain.reference import Network, centre_logits, logits_to
from kdx.explain.regression import FitWarning, Moments, errors_beyond, share, slope_beyond
from kdx.intervals import Interval
from kdx.networks import own_networks

FOLDS = 10
ALIKE = 1 - 1e-6  # correlation of answers from which on they are the same
PER_ANSWER = 10  # images per answer of all networks that a p needs
SPREAD = 0.05  # standard deviation of the leads of networks of one kind that did not teach, see `who_taught`


def who_taught(
    student: Network | Tensor,
    base: Network | Tensor,
    candidates: Mapping[str, Network | Tensor],
    images: Tensor | None = None,
    *,
    bases: Sequence[Network | Tensor] = (),
    alike: Collection[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Candidate teachers of a student, ranked by what they explain of its answers beyond its base.

    A student imitates the answers of its teacher, with all their peculiarities. Of what X leaves unexplained of the
    answers of S, let C explain the share :math:`\tau(S \leftarrow C \mid X)`, as in :func:`kdx.transferred_share`. For
    each candidate C, the table gives

    - *share*, :math:`\tau(S \leftarrow C \mid B)`, beyond the base. The teacher has the largest, but a good network
      explains much of any other good network.
    - *lead*, :math:`\sqrt{\tau(S \leftarrow C \mid B, \text{others})} - \sqrt{\tau(B \leftarrow C \mid S,
      \text{others})}`, two partial correlations, of which the second counts if it is positive: how much more closely
      the candidate is linked with the student than with the base, when all other candidates are known. Of what they
      have in common, nothing is left, so the teacher stands out.
    - *p*, of the hypothesis that the teacher is *none of these*: the probability that the first lead of the candidates
      of one kind exceeds the second by as much by chance. Leads of networks that did not teach are taken as normal,
      with a deviation of 0.05 between networks of one kind, more than the networks of the book show (its page *What
      was handed over* has the error rates), and that of these images.

    A student is more closely linked with networks of its teacher's kind than with others, whether they taught it or
    not. A p therefore compares candidates of one kind: of similar architecture, training and quality. With a single one
    of its kind, a candidate cannot be told from a network like it.

    Args:
        student: A network, a function that returns logits or log-probabilities for images, or such answers to the
            images, (n, classes), a tensor or an array. Networks may have different classes.
        base: Likewise: the student's architecture, trained without a teacher. Another architecture makes every
            candidate look like a teacher.
        candidates: Name -> likewise.
        images: (n, c, h, w), normalised as all networks expect; none are needed if all answers are given.
        bases: Further bases from other seeds, which take away more of what any network knows.
        alike: Names of candidates of one kind. None: networks are alike if their weights have the same names and
            shapes, and answers and functions are not known to be.
        seed: Draws the folds of the images.

    Returns:
        candidate, share, low, high (95 %, over images, for these networks), lead, p; by share, the largest first. p is
        NaN for a candidate that is alone of its kind. lead and p are NaN with fewer than ten images per answer of all
        networks.

    Raises:
        ValueError: Answers to different images, fewer than 30 images, or a network that gives the answers of another.

    Warns:
        FitWarning: Fewer than ten images per answer of all networks.

    Examples:
        >>> import kdx, torch
        >>> z = torch.randn(6, 400, 10, generator=torch.Generator().manual_seed(0))
        >>> student = z[0] + z[1] + 0.5 * z[5]
        >>> kdx.who_taught(student, z[0], {"a": z[1], "b": z[2], "c": z[3]})["candidate"][0]
        'a'
    """
    if not candidates or not isinstance(candidates, Mapping):
        raise ValueError(f"candidates: expected name -> network, got {type(candidates).__name__} {candidates!r}"[:200])
    given = {"student": student, "base": base} | {f"base {i}": b for i, b in enumerate(bases, 2)}
    if taken := sorted(given.keys() & candidates.keys()):
        raise ValueError(f"candidates: expected other names than {', '.join(taken)}")
    answers = {name: _answers(name, network, images) for name, network in {**given, **candidates}.items()}
    _check(answers)
    n, width = len(answers["student"]), sum(z.shape[1] for z in answers.values())
    if n < PER_ANSWER * width:
        warnings.warn(
            f"{n} images are too few for a p with {width} answers of {len(answers)} networks; use {PER_ANSWER * width} "
            "or more",
            FitWarning,
            stacklevel=2,
        )
    joint = _Joint(answers, seed)
    known = [name for name in answers if name != "student" and name not in candidates]
    shares = {name: joint.share("student", name, known)[0] for name in candidates}
    leads = p = dict.fromkeys(candidates, math.nan)
    if n >= PER_ANSWER * width:
        leads, p = _stand_out(joint, known, _kinds(candidates, alike))
    table = pd.DataFrame(
        [(name, *shares[name][:3], leads[name], p[name]) for name in candidates],
        columns=["candidate", "share", "low", "high", "lead", "p"],
    )
    return table.sort_values("share", ascending=False, ignore_index=True)


def _answers(name: str, network: Network | Tensor, images: Tensor | None) -> Tensor:
    """Centred logits, float64 (n, classes)."""
    if not callable(network):
        logits = torch.as_tensor(network)
    elif images is None:
        raise ValueError(f"images: expected some for {name}, which is a network; got None")
    else:
        logits = logits_to(network, images)
    if logits.ndim != 2 or not logits.isfinite().all():
        raise ValueError(f"{name}: expected finite answers (n, classes), got {tuple(logits.shape)}")
    return centre_logits(logits.detach().double())


def _check(answers: Mapping[str, Tensor]) -> None:
    if len({len(z) for z in answers.values()}) > 1:
        counts = ", ".join(f"{len(z)} ({name})" for name, z in answers.items())
        raise ValueError(f"expected answers to the same images, got {counts}")
    if (n := len(answers["student"])) < 3 * FOLDS:
        raise ValueError(f"images: expected {3 * FOLDS} or more, got {n}")
    directions: dict[str, Tensor] = {}
    for name, z in answers.items():
        if not z.var(0).sum() > 0:
            raise ValueError(
                f"{name} gives the same answer to every image, expected answers that differ; check its weights and the "
                "normalisation of the images"
            )
        directions[name] = (z - z.mean(0)) / (z - z.mean(0)).norm()
        for other in list(directions)[:-1]:
            if z.shape == answers[other].shape and (directions[name] * directions[other]).sum() > ALIKE:
                raise ValueError(f"{name} gives the answers of {other}; leave one of them out")


class _Joint:
    """Moments of the answers of all networks in each fold, from which every regression among them is made."""

    def __init__(self, answers: Mapping[str, Tensor], seed: int) -> None:
        self.columns: dict[str, Tensor] = {}
        start = 0
        for name, z in answers.items():
            self.columns[name] = torch.arange(start, start + z.shape[1], device=z.device)
            start += z.shape[1]
        both = torch.cat(list(answers.values()), 1)
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed)).to(both.device)
        self.folds = [Moments.among([both[rows]], {"": (0, 0)})[""] for rows in order.tensor_split(FOLDS)]

    def share(self, of: str, candidate: str, known: Sequence[str]) -> tuple[Interval, NDArray[np.float64]]:
        """Of what the known networks leave unexplained of a network's answers, what the candidate explains."""
        folds, k = self._regression(of, candidate, known)
        _, left, last = errors_beyond(folds, k)
        return share(left - last, left)

    def link(self, of: str, candidate: str, known: Sequence[str], positive: bool) -> NDArray[np.float64]:
        """The square root of that share, a partial correlation: (folds,) values whose mean it is, to first order. If it
        has to be ``positive`` and the answers are related inversely, 0."""
        same = len(self.columns[of]) == len(self.columns[candidate])
        if positive and same and slope_beyond(*self._regression(of, candidate, known))[0].mean < 0:
            return np.zeros(FOLDS)
        interval, parts = self.share(of, candidate, known)
        correlation = math.sqrt(max(interval.mean, 0.0))
        return correlation + (parts - interval.mean) / (2 * max(correlation, 0.05))

    def _regression(self, of: str, candidate: str, known: Sequence[str]) -> tuple[list[Moments], int]:
        """Moments in each fold, and the number of regressors that are known."""
        y = self.columns[of]
        x = torch.cat([*(self.columns[name] for name in known), self.columns[candidate]])
        folds = [Moments(f.n, f.x[x], f.x[y], f.xx[x][:, x], f.xx[x][:, y], f.xx[y, y].sum()) for f in self.folds]
        return folds, len(x) - len(self.columns[candidate])


def _kinds(candidates: Mapping[str, Network | Tensor], alike: Collection[str] | None) -> dict[str, Any]:
    """Name -> something that is equal for candidates of one kind."""
    if alike is not None:
        if isinstance(alike, str) or not set(alike) <= set(candidates):
            raise ValueError(f"alike: expected some of the candidates {', '.join(candidates)}, got {alike!r}")
        return {name: "alike" if name in alike else (name,) for name in candidates}
    return {
        name: tuple((key, tuple(w.shape)) for key, w in network.state_dict().items())
        if isinstance(network, nn.Module)
        else (name,)
        for name, network in candidates.items()
    }


def _stand_out(
    joint: _Joint, known: Sequence[str], kinds: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Lead and p of each candidate."""
    everyone = ["student", *known, *kinds]

    def links(of: str) -> NDArray[np.float64]:
        rest = {c: [o for o in everyone if o not in (of, c)] for c in kinds}
        return np.stack([joint.link(of, c, rest[c], positive=of != "student") for c in kinds])

    leads = links("student") - np.mean([links(name) for name in known], axis=0)  # (candidates, folds)
    means, names = leads.mean(1), list(kinds)
    p = dict.fromkeys(names, math.nan)
    for i, name in enumerate(names):
        if peers := [j for j, other in enumerate(names) if j != i and kinds[other] == kinds[name]]:
            ahead = leads[i] - leads[max(peers, key=lambda j: means[j])]
            of_images = ahead.var(ddof=1) / FOLDS
            p[name] = _p_of_lead(float(ahead.mean()) / math.sqrt(SPREAD**2 + of_images), len(peers) + 1)
    return dict(zip(names, means.tolist(), strict=True)), p


def _p_of_lead(lead: float, n: int) -> float:
    """Probability that the largest of n standard normal variables exceeds the second by as much."""
    if lead <= 0:
        return 1.0
    return float(n * integrate.quad(lambda x: stats.norm.pdf(x) * stats.norm.cdf(x - lead) ** (n - 1), -9, 9)[0])


def read_answers(checkpoint: Path, build: str, folder: Path, size: int = 0, limit: int | None = None) -> Tensor:
    """Answers (n, classes) of a checkpoint to the images of a folder, in its own input size and normalisation.

    Args:
        checkpoint: As for :func:`kdx.load_own`.
        build: Likewise.
        folder: As for :func:`kdx.data.own_images.read_pictures`.
        size: Pixels per side of the input; 0 takes the checkpoint's, else that of the images if they
            share one, else 224.
        limit: Largest number of images.
    """
    header = own_networks.header_of(checkpoint)
    network = own_networks.load_own(build, checkpoint)
    size = size or header.get("size") or common_size(folder) or 224
    pictures = read_pictures(folder, size, limit)
    normalisation = [header[fact] for fact in ("mean", "std") if fact in header]
    x = own_networks.network_input(network, pictures.images, normalisation)
    return own_networks.answers(network, x, f"network of {checkpoint}")


def verdict(table: pd.DataFrame, level: float = 0.05) -> str:
    """A sentence on a table of :func:`who_taught`."""
    most, best = table.iloc[0], table.loc[table["p"].idxmin()] if table["p"].notna().any() else None
    leader = (
        f"{most['candidate']} explains most, {most['share']:.0%} of what the base leaves unexplained of its answers"
    )
    if best is None:
        return f"{leader}. Whether it is the teacher was not tested: that needs candidates alike, and images enough."
    p = f"p {best['p']:.2g} that the teacher is none of these"
    if best["p"] > level:
        return f"None of the candidates stands out from those like it ({p}); {leader}."
    return f"Taught by {best['candidate']}, which explains {best['share']:.0%} ({p})."
