"""A ledger of answers: what a student gained and lost against its base, and which errors it shares with its teacher.

Two networks of equal accuracy may be right on different images. Users meet the images that the new network lost
(*negative flips*, Yan et al. 2021), so gains and losses are counted apart, image by image, and compared with a second
base: two trainings that differ in their seed alone also gain and lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from kdx.data.batches import class_indices
from kdx.inference import holm
from kdx.intervals import exact_interval, share_interval

STUDENT, BASE, TEACHER, SECOND = "student", "base", "teacher", "second base"
FEWEST = 6  # images that changed: with fewer, McNemar's exact test cannot fall below 0.05


class Paired(NamedTuple):
    """Two networks on the same images.

    Attributes:
        difference: Share of the images that the second has and the first lacks, minus the reverse; in [-1, 1].
        low, high: Its 95 % interval.
        gained, lost: Numbers of images.
        n: Number of all images.
        p: McNemar's exact test, two-sided; 1 where nothing changed.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    n: int
    p: float

    def __format__(self, spec: str) -> str:
        return f"{self.difference:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def paired(before: ArrayLike, after: ArrayLike) -> Paired:
    r"""How much more often something holds after than before, on the same images.

    With m images on which the two differ, the number gained is binomial, Bin(m, :math:`\pi`), and m is Bin(n,
    :math:`\mu`). The test is McNemar's exact one, of :math:`\pi = \tfrac12`. The interval is that of
    :math:`\mu (2\pi - 1)` over Clopper and Pearson's 95 % intervals for both, so that it leaves out 0 exactly where
    p <= 0.05; it is a little wide.

    Args:
        before: bool (n,).
        after: bool (n,), of the same images.

    Raises:
        ValueError: No images, or not as many of both.

    Examples:
        >>> found = paired([True] * 5 + [False] * 15, [True] * 4 + [False] * 6 + [True] * 10)
        >>> found.gained, found.lost, f"{found:.2f}", round(found.p, 3)
        (10, 1, '0.45 [0.05, 0.77]', 0.012)
    """
    one, two = (np.asarray(values, dtype=bool) for values in (before, after))
    if one.ndim != 1 or one.shape != two.shape or not len(one):
        raise ValueError(f"expected two rows (n,) of the same images, got {one.shape} and {two.shape}")
    n, gained, lost = len(one), int((two & ~one).sum()), int((one & ~two).sum())
    if not (m := gained + lost):
        most = exact_interval(0, n)[1]  # that might change among other images
        return Paired(0.0, -most, most, 0, 0, n, 1.0)
    test = stats.binomtest(gained, m)
    ends, changed = exact_interval(gained, m), exact_interval(m, n)
    corners = [mu * (2 * pi - 1) for mu in changed for pi in ends]
    return Paired((gained - lost) / n, min(corners), max(corners), gained, lost, n, float(test.pvalue))


@dataclass(frozen=True)
class Ledger:
    """Answers of several networks to the same labelled images.

    Args:
        labels: int (n,), class indices.
        answers: Role -> int (n,), the class that each network predicts; ``student`` and ``base``, and, where there are
            any, ``teacher`` (of the same classes), ``second base`` and others.
        names: Names of the classes.

    Raises:
        ValueError: No student or base, answers that do not fit the labels, or labels without a name.

    Examples:
        >>> import torch
        >>> labels = torch.arange(8) % 2
        >>> ledger = Ledger(labels, {"student": labels, "base": 0 * labels}, ("cat", "dog"))
        >>> ledger.against("base").gained, ledger.rates().query("quantity == 'lost'")["images"].item()
        (4, 0)
    """

    labels: Tensor
    answers: Mapping[str, Tensor]
    names: Sequence[str]

    def __post_init__(self) -> None:
        labels = class_indices(self.labels)
        if missing := [role for role in (STUDENT, BASE) if role not in self.answers]:
            raise ValueError(f"answers: expected those of a student and a base, got no {' and no '.join(missing)}")
        for role, given in self.answers.items():
            if len(class_indices(given)) != len(labels):
                raise ValueError(f"answers: expected {len(labels)} of the {role}, one per label, got {len(given)}")
        if unnamed := sorted(set(labels.tolist()) - set(range(len(self.names)))):
            raise ValueError(f"labels: expected 0 to {len(self.names) - 1}, one per name, got {unnamed}")

    def right(self, role: str) -> NDArray[np.bool_]:
        """Whether a network is right: bool (n,)."""
        return (self.answers[role] == self.labels).numpy()

    def accuracy(self) -> pd.DataFrame:
        """network, value, low, high (exact 95 % interval), right, n."""
        of = {role: self.right(role) for role in self.answers}
        rows = [(role, *share_interval(x, method="exact")[:3], int(x.sum()), len(x)) for role, x in of.items()]
        return pd.DataFrame(rows, columns=["network", "value", "low", "high", "right", "n"])

    def crossed(self) -> pd.DataFrame:
        """The cross table: one row for each combination of right and wrong answers of teacher (if any), base and
        student, with images and share."""
        roles = [role for role in (TEACHER, BASE, STUDENT) if role in self.answers]
        table = pd.DataFrame({role: np.where(self.right(role), "right", "wrong") for role in roles})
        counts = table.value_counts(sort=False).rename("images")
        every = pd.MultiIndex.from_product([("right", "wrong")] * len(roles), names=roles)
        counts = counts.reindex(every, fill_value=0)
        return counts.to_frame().assign(share=counts / len(table)).reset_index()

    def quantities(self, role: str) -> dict[str, NDArray[np.bool_]]:
        """What is counted of a network in the student's place, each bool (n,).

        ``gained``: the base is wrong and it is right; ``lost``: the reverse; ``changed``: its answer is not the base's.
        With a teacher, ``inherited``: it gives the teacher's wrong answer; ``own errors``: it is wrong in another way
        than the teacher, or where the teacher is right.
        """
        base, right = self.right(BASE), self.right(role)
        found = {"gained": ~base & right, "lost": base & ~right}
        found["changed"] = (self.answers[role] != self.answers[BASE]).numpy()
        if TEACHER in self.answers:
            as_teacher = (self.answers[role] == self.answers[TEACHER]).numpy()
            found |= {"inherited": ~right & as_teacher, "own errors": ~right & ~as_teacher}
        return found

    def rates(self) -> pd.DataFrame:
        """:meth:`quantities` of every network but base and teacher: network, quantity, images, n, value, low, high, and
        difference, difference low, difference high, p (of the student minus this network, paired by image; NaN of the
        student itself)."""
        rows = []
        of_student = self.quantities(STUDENT)
        for role in [role for role in self.answers if role not in (BASE, TEACHER)]:
            for quantity, values in self.quantities(role).items():
                found = paired(values, of_student[quantity])
                row = [role, quantity, int(values.sum()), len(values), *share_interval(values, method="exact")[:3]]
                rows.append([*row, *((np.nan,) * 4 if role == STUDENT else (*found[:3], found.p))])
        columns = ["network", "quantity", "images", "n", "value", "low", "high"]
        return pd.DataFrame(rows, columns=[*columns, "difference", "difference low", "difference high", "p"])

    def against(self, role: str, of: str = STUDENT) -> Paired:
        """Right answers of a network, compared with those of another on the same images."""
        return paired(self.right(role), self.right(of))

    def by_group(self, groups: Mapping[str, NDArray[np.bool_]]) -> pd.DataFrame:
        """Right answers in groups of images, before and after.

        Args:
            groups: Name -> bool (n,), the images of a group.

        Returns:
            group, n, base, student (shares of right answers), gained, lost, difference, low, high, p (McNemar, against
            the base), p adjusted (Holm, over the groups) and, with a second base, the share of its right answers, and
            against both: Holm's p for the larger p of base and second base, in one direction, 1 where they point in
            different directions. Groups without images are left out.
        """
        rows = []
        for name, members in groups.items():
            if not (n := int(members.sum())):
                continue
            of = {role: self.right(role)[members] for role in self.answers}
            found = paired(of[BASE], of[STUDENT])
            row = {"group": name, "n": n, BASE: of[BASE].mean(), STUDENT: of[STUDENT].mean()}
            row |= dict(zip(Paired._fields, found, strict=True))
            if SECOND in of:
                other = paired(of[SECOND], of[STUDENT])
                row |= {SECOND: of[SECOND].mean(), "both": joint_p(found, other)}
            rows.append(row)
        columns = ["group", "n", BASE, STUDENT, "gained", "lost", "difference", "low", "high", "p"]
        with_second = [SECOND, "both"] if SECOND in self.answers else []
        table = pd.DataFrame(rows, columns=[*columns, *with_second])
        table.insert(len(columns), "p adjusted", holm(table["p"].to_numpy()))
        if with_second:
            table["against both"] = holm(table.pop("both").to_numpy())
        return table

    def by_class(self) -> pd.DataFrame:
        """:meth:`by_group`, of the classes."""
        labels = self.labels.numpy()
        return self.by_group({name: labels == i for i, name in enumerate(self.names)})

    def by_slice(self, slices: pd.DataFrame) -> pd.DataFrame:
        """:meth:`by_group`, of the values of each column of a table of n rows, one per image; empty cells belong to no
        group. p is adjusted over all groups."""
        groups = {
            f"{column} = {value}": (slices[column] == value).to_numpy()
            for column in slices
            for value in sorted(slices[column].dropna().unique(), key=str)
        }
        return self.by_group(groups)

    def confusions(self) -> pd.DataFrame:
        """Pairs of a class and a wrong answer to its images that became more or less frequent.

        Only pairs on which base and student differ for at least ``FEWEST`` images are tested; given their number, this
        choice does not bias the test.

        Returns:
            class, answer, n (images of the class), base, student (images with this answer), difference, low, high,
            p, p adjusted (Holm) and, with a second base, against both, as for :meth:`by_group`; by p.
        """
        rows = []
        labels = self.labels.numpy()
        answers = {role: given.numpy() for role, given in self.answers.items()}
        wrong = {(a, b) for role in (BASE, STUDENT) for a, b in zip(labels, answers[role], strict=True) if a != b}
        for true, answer in sorted(wrong):
            members = labels == true
            of = {role: given[members] == answer for role, given in answers.items()}
            found = paired(of[BASE], of[STUDENT])
            if found.gained + found.lost < FEWEST:
                continue
            row = [self._name(true), self._name(answer), len(of[BASE]), of[BASE].sum(), of[STUDENT].sum(), *found[:3]]
            both = joint_p(found, paired(of[SECOND], of[STUDENT])) if SECOND in of else np.nan
            rows.append([*row, found.p, both])
        columns = ["class", "answer", "n", BASE, STUDENT, "difference", "low", "high", "p", "both"]
        table = pd.DataFrame(rows, columns=columns)
        table["p adjusted"] = holm(table["p"].to_numpy())
        both = table.pop("both")
        if SECOND in self.answers:
            table["against both"] = holm(both.to_numpy())
        return table.sort_values("p", kind="stable", ignore_index=True)

    def _name(self, index: int) -> str:
        return self.names[index] if index < len(self.names) else f"output {index}"


def joint_p(one: Paired, other: Paired) -> float:
    """p of the hypothesis that one of two comparisons shows no change in the direction of both: the larger of the two
    p-values (an intersection-union test), 1 where they point in different directions."""
    return max(one.p, other.p) if one.difference * other.difference > 0 else 1.0


def images_needed(found: Paired, power: float = 0.8) -> float:
    """About how many images would show the observed difference at the two-sided level of 0.05, were it the true one;
    infinity where there is none."""
    if not found.difference:
        return np.inf
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(power)
    return float(np.ceil(quantiles**2 * (found.gained + found.lost) / found.n / found.difference**2))
