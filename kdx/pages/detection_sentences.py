"""What a comparison of a student detector with its base found, in plain sentences and as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER, Ledger
from kdx.pages.report_tables import interval, p_of
from kdx.pages.sentences import LEVEL, in_place_of_the_student, names_of
from kdx.pages.statement import Metric

GAP = ("difference", "difference low", "difference high")
PREFIXES = {STUDENT: "", BASE: "base_", SECOND: "second_base_", TEACHER: "teacher_"}


@dataclass(frozen=True)
class DetectionEvidence:
    """The tables that a statement on detectors is made from.

    Attributes:
        images: Number of images.
        score: The least that counts where objects are counted.
        ledger: Of objects, :func:`kdx.measure.objects.object_ledger`.
        precision, alarms: Of :class:`kdx.pages.detector_pair.DetectorPair`.
        likeness: network, level, measure, difference, low, high (the student minus this network); None without a
            teacher.
        handed_over: :func:`kdx.measure.likeness.shares_table`; None without a teacher.
        caveats: What limits all this, in sentences.
    """

    images: int
    score: float
    ledger: Ledger
    precision: pd.DataFrame
    alarms: pd.DataFrame
    likeness: pd.DataFrame | None = None
    handed_over: pd.DataFrame | None = None
    caveats: Sequence[str] = ()

    @property
    def second(self) -> bool:
        """Whether there is a second base."""
        return SECOND in self.ledger.answers

    def against(self, measure: str, role: str = BASE) -> Mapping[str, Any]:
        """The row of an average precision."""
        rows = self.precision[(self.precision["measure"] == measure) & (self.precision["network"] == role)]
        return rows.iloc[0]


def sentences(evidence: DetectionEvidence) -> list[str]:
    """What was found, the first sentence sums up."""
    makers = (_short, _compared, _precision, _objects, _classes, _alarms, _likeness, _handed_over, _unsaid)
    return [sentence for maker in makers if (sentence := maker(evidence))]


def _short(evidence: DetectionEvidence) -> str:
    changes = {1: "a higher {}", -1: "a lower {}", 0: "no clear change of {}"}
    words = [changes[_sign(evidence, measure)[0]].format(measure) for measure in ("AP50", "AP")]
    told = [f"{' and '.join(words)}; {_moved(evidence, STUDENT)}"]
    if evidence.second:
        told[0] += f", where another seed {_moved(evidence, SECOND, 'lost {} and gained {}')}"
    worse = _changed(evidence, -1)
    told.append(f"clearly worse on {names_of(worse)}" if worse else "no class clearly worse")
    return f"In short: {'; '.join(told)}."


def _moved(
    evidence: DetectionEvidence, role: str, form: str = "{} found objects of the base lost and {} gained"
) -> str:
    found = evidence.ledger.against(BASE, of=role)
    return form.format(f"{found.lost:,}", f"{found.gained:,}")


def _compared(evidence: DetectionEvidence) -> str:
    ledger = evidence.ledger
    told = [
        f"{measure}: " + ", ".join(f"the {row['network']} {interval(row, form='.3f')}" for _, row in rows.iterrows())
        for measure, rows in evidence.precision.groupby("measure", sort=False)
    ]
    return (
        f"On {evidence.images:,} images with {len(ledger.labels):,} objects of {len(ledger.names)} classes, "
        f"{'; '.join(told)}."
    )


def _sign(evidence: DetectionEvidence, measure: str) -> tuple[int, str]:
    """1 or -1 where an average precision clearly rose or fell against base and, if there is one, second base; else 0;
    and words."""
    row = evidence.against(measure)
    sign, gap = _side(row), interval(row, GAP, "+.3f")
    if not sign:
        return 0, f"{measure}: higher or lower than its base's cannot be told from these images ({gap})"
    text = f"{measure}: {'higher' if sign > 0 else 'lower'} than its base's, by {gap}"
    if not evidence.second:
        return sign, f"{text}; without a second base, it cannot be told whether another seed would have done the same"
    other = evidence.against(measure, SECOND)
    against = interval(other, GAP, "+.3f")
    if _side(other) == sign:
        return sign, f"{text}, and than the second base's, by {against}: more than the one other seed shows"
    return 0, f"{text}, but not clearly so than the second base's ({against}): this may be the seed"


def _precision(evidence: DetectionEvidence) -> str:
    return f"The student's {'; its '.join(_sign(evidence, measure)[1] for measure in ('AP50', 'AP'))}."


def _objects(evidence: DetectionEvidence) -> str:
    ledger = evidence.ledger
    of, rates = ledger.accuracy().set_index("network"), ledger.rates().set_index(["network", "quantity"])
    found, right = ledger.against(BASE), int(of.loc[BASE, "right"])
    text = (
        f"At scores of {evidence.score:g} or more, the student finds {interval(of.loc[STUDENT])} of the objects and "
        f"its base {interval(of.loc[BASE])}: of {right:,} that the base finds it loses {found.lost:,} "
        f"({interval(rates.loc[(STUDENT, 'lost')])} of all), and it gains {found.gained:,} "
        f"({interval(rates.loc[(STUDENT, 'gained')])}; {_test(found.p)})"
    )
    return f"{text}; {in_place_of_the_student(rates)}." if evidence.second else f"{text}."


def _test(p: float) -> str:
    return f"{p_of(p)}, McNemar's test"


def _changed(evidence: DetectionEvidence, sign: int) -> list[str]:
    """Classes of which clearly more or fewer objects are found than by the base, and by the second base."""
    table = evidence.ledger.by_class()
    p = table["against both"] if evidence.second else table["p adjusted"]
    return table.loc[(p <= LEVEL) & (sign * table["difference"] > 0), "group"].tolist()


def _classes(evidence: DetectionEvidence) -> str:
    told = [
        f"{word} of {names_of(n)}" for sign, word in ((1, "more"), (-1, "fewer")) if (n := _changed(evidence, sign))
    ]
    than = "its base and the second base" if evidence.second else "its base; whether by the seed cannot be told"
    if not told:
        return f"Of no class does the student find clearly more or fewer objects (against {than})."
    return f"By class, the student finds {' and '.join(told)} (against {than})."


def _alarms(evidence: DetectionEvidence) -> str:
    rows = evidence.alarms.set_index("network")
    side = _side(rows.loc[BASE])
    word = {1: "clearly more", -1: "clearly fewer", 0: "neither clearly more nor fewer"}[side]
    text = (
        f"It raises {interval(rows.loc[STUDENT], form='.2f')} false alarms an image, {word} than its base "
        f"({interval(rows.loc[BASE], GAP, '+.2f')})"
    )
    if not (evidence.second and side):
        return f"{text}."
    same = "and" if _side(rows.loc[SECOND]) == side else "but not"
    return f"{text}, {same} than the second base ({interval(rows.loc[SECOND], GAP, '+.2f')})."


def _likeness(evidence: DetectionEvidence) -> str | None:
    if (table := evidence.likeness) is None:
        return None
    told = []
    for measure, rows in table.groupby("measure", sort=False):
        rivals = [rows[rows["network"] == role].set_index("level") for role in (BASE, *[SECOND] * evidence.second)]
        more, less = (
            [level for level in rivals[0].index if all(_side(of.loc[level]) == sign for of in rivals)]
            for sign in (1, -1)
        )
        word = [f"more at {names_of(more)}"] * bool(more) + [f"less at {names_of(less)}"] * bool(less)
        told.append(f"{measure}: {' and '.join(word) or 'no clear difference at any level'}")
    than = "its base and the second base are" if evidence.second else "its base is"
    return f"Is the student more like its teacher than {than}? {'; '.join(told)}."


def _handed_over(evidence: DetectionEvidence) -> str | None:
    if (table := evidence.handed_over) is None:
        return None
    shares = {
        role: ", ".join(f"{interval(row, form='.0%')} at {row['level']}" for row in of.to_dict("records"))
        for role, of in table.groupby("network")
    }
    text = f"Of the student's features, the teacher expresses and the base does not: {shares[STUDENT]}"
    if not evidence.second:
        return f"{text}; without a second base it is not known how much any other network would share with it."
    return f"{text}; of the second base's, which had no teacher: {shares[SECOND]}."


def _unsaid(evidence: DetectionEvidence) -> str:
    told = []
    if evidence.second:
        told.append("how much further seeds would differ, of which one was given")
    else:
        told.append("what is the seed's doing, for want of a second base (train the base again from another seed)")
    if TEACHER not in evidence.ledger.answers:
        told.append("what the teacher handed over, for want of the teacher")
    return f"Not to be told from what was given: {'; '.join(told)}."


def _side(row: Mapping[str, Any]) -> int:
    """1 or -1 where an interval of a difference leaves out 0, else 0."""
    low, high = row["difference low"], row["difference high"]
    return 1 if low > 0 else -1 if high < 0 else 0


def metrics(evidence: DetectionEvidence) -> dict[str, Metric]:
    """The metrics of detectors, among those of :data:`kdx.pages.gates.METRICS`."""
    found: dict[str, Metric] = {}

    def add(name: str, row: Mapping[str, Any], keys: Sequence[str] = ("value", "low", "high"), n: int = 0) -> None:
        value, low, high = (float(row[key]) for key in keys)
        found[name] = Metric(value, low, high, n or evidence.images)

    for measure in ("AP50", "AP"):
        name = measure.lower()
        for role in evidence.ledger.answers:
            add(f"{PREFIXES[role]}{name}", evidence.against(measure, role))
        add(f"{name}_gain", evidence.against(measure), GAP)
        if evidence.second:
            add(f"{name}_gain_over_second_base", evidence.against(measure, SECOND), GAP)
    rates = evidence.ledger.rates().set_index(["network", "quantity"])
    for role in (STUDENT, *[SECOND] * evidence.second):
        for quantity in ("gained", "lost"):
            row = rates.loc[(role, quantity)]
            add(f"{PREFIXES[role]}objects_{quantity}", row, n=len(evidence.ledger.labels))
    add("false_alarms_change", evidence.alarms.set_index("network").loc[BASE], GAP)
    return found
