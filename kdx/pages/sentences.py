"""What a comparison of a student with its base found, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from kdx.explain.interventions import RANDOM
from kdx.intervals import Interval
from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER, Ledger, Paired, detectable, images_needed

LEVEL = 0.05
NAMED = 5  # classes, slices or pairs that a sentence names


@dataclass(frozen=True)
class Evidence:
    """The tables that a statement is made from. None stands for what could not be measured.

    Attributes:
        images: Number of images.
        ledger: Answers and labels; None where labels are unknown.
        changed: Whether another answer was given than the base's, role -> bool (n,); for images without labels.
        classes, slices, confusions: :meth:`kdx.Ledger.by_class`, ``by_slice``, ``confusions``.
        calibration: :func:`kdx.calibration`, with the base first.
        robustness: The second table of :func:`kdx.robustness`.
        unexplained: Role -> share of its answers that the base cannot express.
        handed_over: Role -> share of that which the teacher explains.
        replaced: :func:`kdx.replacement`, role -> table.
        areas: The second table of :func:`kdx.deletion`.
        caveats: What limits all this, in sentences.
    """

    images: int
    ledger: Ledger | None = None
    changed: Mapping[str, Interval] = field(default_factory=dict)
    classes: pd.DataFrame | None = None
    slices: pd.DataFrame | None = None
    confusions: pd.DataFrame | None = None
    calibration: pd.DataFrame | None = None
    robustness: pd.DataFrame | None = None
    unexplained: Mapping[str, Interval] = field(default_factory=dict)
    handed_over: Mapping[str, Interval] = field(default_factory=dict)
    replaced: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    areas: pd.DataFrame | None = None
    caveats: Sequence[str] = ()

    @property
    def second(self) -> bool:
        """Whether there is a second base."""
        return SECOND in (self.ledger.answers if self.ledger else self.changed)


def sentences(evidence: Evidence) -> list[str]:
    """What was found, in about ten sentences."""
    makers = (_compared, _accuracy, _flips, _classes, _confusions, _errors, _trust, _beyond, _matters, _unsaid)
    return [sentence for maker in makers if (sentence := maker(evidence))]


def _compared(evidence: Evidence) -> str:
    n, ledger = evidence.images, evidence.ledger
    if ledger is None:
        share = evidence.changed[STUDENT]
        return (
            f"Student and base were compared on {n:,} images without labels, so nothing is said about right and wrong; "
            f"the student gives another answer than its base to {share:.1%} of them."
        )
    of = ledger.accuracy().set_index("network")
    roles = [role for role in (STUDENT, BASE, SECOND, TEACHER) if role in of.index]
    told = ", ".join(f"the {role} {_share(of.loc[role])}" for role in roles)
    return f"On {n:,} images of {len(ledger.names)} classes, these shares of the answers are right: {told}."


def _accuracy(evidence: Evidence) -> str | None:
    if (ledger := evidence.ledger) is None:
        return None
    found = ledger.against(BASE)
    if found.p > LEVEL:
        return (
            f"Whether the student is more or less accurate than its base cannot be told from these images: the "
            f"difference is {_points(found)} (p {_p(found.p)}). About {100 * detectable(found):.1f} points or more "
            f"would have been found{_needed(found)}."
        )
    word = "more" if found.difference > 0 else "less"
    text = f"The student is {word} accurate than its base, by {_points(found)} (p {_p(found.p)})"
    if not evidence.second:
        return f"{text}; without a second base, it cannot be told whether another seed would have done the same."
    other = ledger.against(SECOND)
    if other.p <= LEVEL and other.difference * found.difference > 0:
        return (
            f"{text}, and than a second base, by {_points(other)} (p {_p(other.p)}): more than another seed explains."
        )
    return f"{text}, but not clearly than a second base ({_points(other)}, p {_p(other.p)}): this may be the seed."


def _flips(evidence: Evidence) -> str | None:
    if (ledger := evidence.ledger) is None:
        return None
    rates = ledger.rates().set_index(["network", "quantity"])
    lost, gained = rates.loc[(STUDENT, "lost")], rates.loc[(STUDENT, "gained")]
    found, right = ledger.against(BASE), int(ledger.right(BASE).sum())
    text = (
        f"The student preserves {right - found.lost:,} of {right:,} right answers of its base, loses {found.lost:,} "
        f"({_share(lost)} of all images) and gains {found.gained:,} ({_share(gained)})"
    )
    if not evidence.second:
        return f"{text}."
    told = []
    for quantity, word in (("lost", "loses"), ("gained", "gains")):
        row = rates.loc[(SECOND, quantity)]
        more = "more than the student" if row["difference"] < 0 else "fewer than the student"
        unlike = f"{more}, p {_p(row['p'])}" if row["p"] <= LEVEL else "no clear difference from the student"
        told.append(f"{word} {row['images']:,.0f} ({unlike})")
    return f"{text}; a second base in its place {' and '.join(told)}."


def _classes(evidence: Evidence) -> str | None:
    told = []
    for what, table in (("class", evidence.classes), ("slice", evidence.slices)):
        if table is None or table.empty:
            continue
        better, worse = changed_groups(table, 1)["group"], changed_groups(table, -1)["group"]
        if len(better):
            told.append(f"better on {_names(better)}")
        if len(worse):
            told.append(f"worse on {_names(worse)}")
        if not len(better) and not len(worse):
            told.append(f"not clearly different on any {what} of {len(table)}")
    if not told:
        return None
    against = "its base and a second base" if evidence.second else "its base; whether by the seed cannot be told"
    what = "By class" if evidence.slices is None else "By class and slice"
    return f"{what}, the student is {'; '.join(told)} (against {against})."


def _confusions(evidence: Evidence) -> str | None:
    if (table := evidence.confusions) is None:
        return None
    told = []
    for word, sign in (("more", 1), ("less", -1)):
        rows = changed_groups(table, sign)
        pairs = [f"{true} for {answer}" for true, answer in zip(rows["class"], rows["answer"], strict=True)]
        if pairs:
            told.append(f"takes {word} often {_names(pairs)}")
    if not told:
        return "No confusion of one class with another became clearly more or less frequent."
    return f"The student {' and '.join(told)}{'' if evidence.second else ' than its base'}."


def _errors(evidence: Evidence) -> str | None:
    ledger = evidence.ledger
    if ledger is None or TEACHER not in ledger.answers:
        return None
    rates = ledger.rates().set_index(["network", "quantity"])
    inherited, own = (rates.loc[(STUDENT, quantity)] for quantity in ("inherited", "own errors"))
    if not inherited["images"] + own["images"]:
        return "The student makes no error on these images."
    text = (
        f"Of its {inherited['images'] + own['images']:,.0f} errors, {inherited['images']:,.0f} are the teacher's as "
        f"well ({_share(inherited)} of all images)"
    )
    if not evidence.second:
        return f"{text}; a second base would tell how many of these any network shares with it."
    row = rates.loc[(SECOND, "inherited")]
    more = "more" if row["difference"] > 0 else "fewer"
    unlike = f"the student shares {more} (p {_p(row['p'])})" if row["p"] <= LEVEL else "no clear difference"
    return f"{text}; a second base, which had no teacher, shares {row['images']:,.0f}: {unlike}."


def _trust(evidence: Evidence) -> str | None:
    told = []
    if evidence.calibration is not None:
        row = evidence.calibration.set_index(["network", "score"]).loc[(STUDENT, "NLL")]
        low, high = row["difference low"], row["difference high"]
        word = "better" if high < 0 else "worse" if low > 0 else "neither clearly better nor worse"
        told.append(f"its probabilities fit the labels {word} (NLL {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}])")
    if evidence.robustness is not None:
        row = overall(evidence.robustness, BASE)
        low, high = row["low"], row["high"]
        word = "more" if low > 0 else "fewer" if high < 0 else "neither clearly more nor fewer"
        change = f"{100 * row['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        told.append(f"it gets {word} corrupted images right ({change})")
    return f"Compared with its base, {'; '.join(told)}." if told else None


def _beyond(evidence: Evidence) -> str | None:
    if STUDENT not in evidence.unexplained:
        return None
    found, other = evidence.unexplained[STUDENT], evidence.unexplained.get(SECOND)
    text = f"{found:.0%} of the variance of the student's answers cannot be expressed by its base"
    if math.isnan(found.mean):
        return "How much of the student's answers its base cannot express could not be measured."
    if other is None:
        text += "; how much of this is the seed cannot be told without a second base"
    elif found.low > other.high:
        text += f", more than of a second base's ({other:.0%})"
    elif found.high < other.low:
        text += f", less than of a second base's ({other:.0%})"
    else:
        text += f", as of a second base's ({other:.0%}): no more than the seed"
    handed, floor = evidence.handed_over.get(STUDENT), evidence.handed_over.get(SECOND)
    if handed is None:
        return f"{text}."
    text += f". The teacher explains {handed:.0%} of it"
    if floor is None:
        return f"{text}; any other network trained on these images would explain some as well."
    more = ": more than any network does that had no teacher" if handed.low > floor.high else ": no clear difference"
    return f"{text}, and of the second base's {floor:.0%}{more}."


def _matters(evidence: Evidence) -> str | None:
    told = []
    if STUDENT in evidence.replaced:
        table = evidence.replaced[STUDENT]
        last = table["stage"].iloc[-1]
        of = table[table["stage"] == last].set_index(["replaced", "quantity"])
        turned, swapped = (of.loc[(kind, "disagreements turned")] for kind in ("unexplained", "exchanged"))
        if turned["n"]:
            told.append(
                f"with the features of {last} that its base cannot express taken away, {_share(turned, 0)} of the "
                f"{turned['n']} answers that differ become the base's, against {_share(swapped, 0)} where those of "
                "another image are taken away"
            )
    if evidence.areas is not None:
        rows = evidence.areas.set_index("map")
        told += [
            f"pixels that the map of {name} ranks highest carry {'more' if row['low'] > 0 else 'not clearly more'} of "
            f"the unexplained answer than random ones ({row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}])"
            for name, row in rows.iterrows()
            if name != RANDOM
        ][:1]
    if not told:
        return None
    text = "; ".join(told)
    return f"{text[0].upper()}{text[1:]}."


def _unsaid(evidence: Evidence) -> str:
    told = []
    if not evidence.second:
        told.append("what is the seed's doing, for want of a second base (train the base again from another seed)")
    if evidence.ledger is None:
        told.append("right and wrong, for want of labels")
    elif evidence.ledger.against(BASE).p > LEVEL:
        found = evidence.ledger.against(BASE)
        told.append(f"a change of accuracy below {100 * detectable(found):.1f} points")
    if not evidence.unexplained:
        told.append("anything about features")
    elif not evidence.handed_over:
        told.append("what the teacher handed over, for want of the teacher's answers")
    if not told:
        return "These images were enough to decide all of the above."
    return f"Not to be told from what was given: {'; '.join(told)}."


def changed_groups(table: pd.DataFrame, sign: int) -> pd.DataFrame:
    """Rows with a change in one direction that holds over all rows, and beyond the seed where that is known."""
    p = table["beyond seed"] if "beyond seed" in table else table["p adjusted"]
    return table[(p <= LEVEL) & (sign * table["difference"] > 0)]


def overall(table: pd.DataFrame, role: str) -> pd.Series:
    return table[(table["network"] == role) & (table["corruption"] == "")].iloc[0]


def _needed(found: Paired) -> str:
    if math.isinf(number := images_needed(found)):
        return ""
    return f", and one as small as that observed takes about {number:,.0f} images"


def _share(row: Mapping[str, Any], digits: int = 1) -> str:
    return "unknown" if math.isnan(row["value"]) else (
        f"{row['value']:.{digits}%} [{row['low']:.{digits}%}, {row['high']:.{digits}%}]"
    )  # fmt: skip


def _points(found: Paired) -> str:
    return f"{100 * found.difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _names(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
