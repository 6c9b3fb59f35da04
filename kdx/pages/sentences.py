"""What a comparison of a student with its base found, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from kdx.explain.interventions import RANDOM
from kdx.inference import holm
from kdx.intervals import Interval, share_interval
from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER, Ledger, Paired, images_needed
from kdx.pages.own_detectors import new_at_deepest

LEVEL = 0.05
DIFFERENCE = ["difference", "difference low", "difference high"]
NAMED = 5  # classes, slices or pairs that a sentence names


@dataclass(frozen=True)
class Evidence:
    """The tables that a statement is made from. None stands for what could not be measured.

    Attributes:
        images: Number of images.
        ledger: Answers and labels; None where labels are unknown.
        changed: Whether another answer was given than the base's, role -> bool (n,); for images without labels.
        classes, slices, confusions: :meth:`kdx.Ledger.by_class`, ``by_slice``, ``confusions``.
        calibration: :func:`kdx.calibration`, with the student first.
        robustness: The second table of :func:`kdx.robustness`.
        unexplained: Role -> share of its answers that the base cannot express.
        handed_over: Role -> share of that which the teacher explains.
        replaced: :func:`kdx.replacement`, role -> table.
        areas: The second table of :func:`kdx.deletion`.
        detectors, concepts: ``new_detectors`` and ``new_concepts`` of :mod:`kdx.pages.own_detectors`.
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
    detectors: pd.DataFrame | None = None
    concepts: pd.DataFrame | None = None

    @property
    def second(self) -> bool:
        """Whether there is a second base."""
        return SECOND in (self.ledger.answers if self.ledger else self.changed)


def sentences(evidence: Evidence) -> list[str]:
    """What was found, in about ten sentences, the first of which sums up."""
    makers = (
        _short, _compared, _accuracy, _flips, _classes, _confusions, _errors, _trust, _beyond, _matters, _units, _unsaid
    )  # fmt: skip
    return [sentence for maker in makers if (sentence := maker(evidence))]


def _short(evidence: Evidence) -> str | None:
    if (ledger := evidence.ledger) is None:
        return None
    found, (sign, _) = ledger.against(BASE), _accuracy_sign(evidence)
    word = {1: "more accurate", -1: "less accurate", 0: "no clear change of accuracy"}[sign]
    told = [word, f"{found.lost:,} right answers of the base lost and {found.gained:,} gained"]
    if evidence.second:
        other = ledger.against(BASE, of=SECOND)
        told.append(f"where another seed lost {other.lost:,} and gained {other.gained:,}")
    if evidence.classes is not None:
        worse = changed_groups(evidence, evidence.classes, -1)["group"]
        told.append(f"clearly worse on {names_of(worse)}" if len(worse) else "no class clearly worse")
    return f"In short: {', '.join(told[:3])}; {'; '.join(told[3:]) or 'see below'}."


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


def _accuracy_sign(evidence: Evidence) -> tuple[int, str]:
    """1 or -1 where the student is clearly more or less accurate than its base and, if there is one, the second base;
    else 0; and the sentence."""
    assert evidence.ledger is not None
    found = evidence.ledger.against(BASE)
    other = evidence.ledger.against(SECOND) if evidence.second else None
    sign, word = _sign(found)
    sign_other, word_other = (0, "") if other is None else _sign(other)
    if not sign:
        text = (
            "Whether the student is more or less accurate than its base cannot be told from these images: between "
            f"{100 * found.low:+.1f} and {100 * found.high:+.1f} points are possible ({100 * found.difference:+.1f} "
            f"observed, p {_p(found.p)}){_needed(found)}"
        )
        against = (
            f"; it is {word_other} accurate than the second base, by {_points(other)}" if other and sign_other else ""
        )
        return 0, f"{text}{against}."
    text = f"The student is {word} accurate than its base, by {_points(found)} (p {_p(found.p)})"
    if other is None:
        return sign, f"{text}; without a second base, it cannot be told whether another seed would have done the same."
    told = f"{_points(other)} (p {_p(other.p)})"
    if sign_other == sign:
        return sign, f"{text}, and than the second base, by {told}: more than the one other seed that was given shows."
    if sign_other:
        return 0, f"{text}, but {word_other} accurate than the second base, by {told}: seeds alone differ that much."
    return 0, f"{text}, but not clearly {word} than the second base (p {_p(other.p)}): this may be the seed."


def _accuracy(evidence: Evidence) -> str | None:
    return None if evidence.ledger is None else _accuracy_sign(evidence)[1]


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
    return f"{text}; {in_place_of_the_student(rates)}." if evidence.second else f"{text}."


def in_place_of_the_student(rates: pd.DataFrame) -> str:
    """What the second base loses and gains; ``rates`` are :meth:`Ledger.rates` by network and quantity."""
    told = []
    for quantity, word in (("lost", "loses"), ("gained", "gains")):
        row = rates.loc[(SECOND, quantity)]
        more = "more than the student" if row["difference"] < 0 else "fewer than the student"
        unlike = f"{more}, p {_p(row['p'])}" if row["p"] <= LEVEL else "no clear difference from the student"
        told.append(f"{word} {row['images']:,.0f} ({unlike})")
    return f"the second base in its place {' and '.join(told)}"


def _classes(evidence: Evidence) -> str | None:
    told = []
    for what, table in (("class", evidence.classes), ("slice", evidence.slices)):
        if table is None or table.empty:
            continue
        better, worse = (changed_groups(evidence, table, sign)["group"] for sign in (1, -1))
        if len(better):
            told.append(f"better on {names_of(better)}")
        if len(worse):
            told.append(f"worse on {names_of(worse)}")
        if not len(better) and not len(worse):
            told.append(f"not clearly different on any {what} of {len(table)}")
    if not told:
        return None
    against = "its base and the second base" if evidence.second else "its base; whether by the seed cannot be told"
    what = "By class" if evidence.slices is None else "By class and slice"
    return f"{what}, the student is {'; '.join(told)} (against {against})."


def _confusions(evidence: Evidence) -> str | None:
    if (table := evidence.confusions) is None:
        return None
    told = []
    for word, sign in (("more", 1), ("less", -1)):
        rows = changed_groups(evidence, table, sign)
        pairs = [f"images of {true} {answer}" for true, answer in zip(rows["class"], rows["answer"], strict=True)]
        if pairs:
            told.append(f"{word} often it calls {names_of(pairs)}")
    if not told:
        return "No confusion of one class with another became clearly more or less frequent."
    text = "; ".join(told)
    than = "its base and the second base" if evidence.second else "its base"
    return f"{text[0].upper()}{text[1:]} than {than}."


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
    return f"{text}; the second base, which had no teacher, shares {row['images']:,.0f}: {unlike}."


def _trust(evidence: Evidence) -> str | None:
    told = []
    if evidence.calibration is not None:
        rows = evidence.calibration.set_index(["network", "score"])
        ends = [tuple(rows.loc[(role, "NLL"), DIFFERENCE]) for role in (BASE, *[SECOND] * evidence.second)]
        sign, doubt = _clear([(low, high) for _, low, high in ends])
        word = {-1: "better", 1: "worse", 0: "neither clearly better nor worse"}[sign]
        value, low, high = ends[0]
        told.append(f"its probabilities fit the labels {word} ({value:+.3f} nats [{low:+.3f}, {high:+.3f}]{doubt})")
    if evidence.robustness is not None:
        wholes = [overall(evidence.robustness, role) for role in (BASE, *[SECOND] * evidence.second)]
        sign, doubt = _clear([(row["low"], row["high"]) for row in wholes])
        word = {1: "more", -1: "fewer", 0: "neither clearly more nor fewer"}[sign]
        row = wholes[0]
        change = f"{100 * row['difference']:+.1f} points [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]{doubt}"
        told.append(f"it gets {word} corrupted images right ({change}){_corruptions(evidence)}")
    return f"Compared with its base, {'; '.join(told)}." if told else None


def _corruptions(evidence: Evidence) -> str:
    """Single corruptions under which a change holds, over all of them."""
    assert evidence.robustness is not None
    table = evidence.robustness[evidence.robustness["corruption"] != ""]
    keys = ["corruption", "strength"]
    base = table[table["network"] == BASE].set_index(keys)
    p, signs = base["p"], np.sign(base["difference"])
    if evidence.second:
        other = table[table["network"] == SECOND].set_index(keys).loc[base.index]
        p = np.maximum(p, other["p"]).where(signs == np.sign(other["difference"]), 1.0)
    held = base.index[holm(p.to_numpy()) <= LEVEL]
    told = [f"{'more' if signs[key] > 0 else 'fewer'} under {key[0]} of strength {key[1]}" for key in held]
    return f", clearly {names_of(told)}" if told else ""


def _beyond(evidence: Evidence) -> str | None:
    if STUDENT not in evidence.unexplained:
        return None
    found, other = evidence.unexplained[STUDENT], evidence.unexplained.get(SECOND)
    if math.isnan(found.mean):
        return "How much of the student's answers its base cannot express could not be measured."
    text = f"{_part(found)} of how the student's answers vary over images cannot be expressed by its base"
    if other is None or math.isnan(other.mean):
        text += "; how much of this is the seed cannot be told without a second base"
    else:
        text += f", {_than(found, other)} the second base's ({_part(other)})"
    handed, floor = evidence.handed_over.get(STUDENT), evidence.handed_over.get(SECOND)
    if handed is None or math.isnan(handed.mean):
        return f"{text}."
    text += f". The teacher explains {_part(handed)} of it"
    if floor is None or math.isnan(floor.mean):
        return f"{text}; any other network trained on these images would explain some as well."
    return f"{text}, {_than(handed, floor)} of the second base's ({_part(floor)}), which had no teacher."


def _matters(evidence: Evidence) -> str | None:
    told = []
    last = {role: table[table["stage"] == table["stage"].iloc[-1]] for role, table in evidence.replaced.items()}
    of = {role: table.set_index(["replaced", "quantity"]) for role, table in last.items()}
    if STUDENT in of and (turned := of[STUDENT].loc[("unexplained", "disagreements turned")])["n"]:
        kept = of[STUDENT].loc[("unexplained", "agreements kept")]
        swapped = of[STUDENT].loc[("exchanged", "disagreements turned")]
        told.append(
            f"without those features of {last[STUDENT]['stage'].iloc[0]} that its base cannot express, "
            f"{_share(turned, 0)} of the {turned['n']} answers that differ become the base's and {_share(kept, 0)} of "
            f"the others stay; without those of another image, {_share(swapped, 0)} become the base's"
        )
        if SECOND in of:
            row = of[SECOND].loc[("unexplained", "disagreements turned")]
            told[-1] += f" (the second base in its place: {_share(row, 0)}; so this tells what two networks differ in)"
    if evidence.areas is not None:
        row = evidence.areas[evidence.areas["map"] != RANDOM].iloc[0]
        word = "more" if row["low"] > 0 else "not clearly more"
        told.append(
            f"the pixels that the first map ranks highest carry {word} of the difference than random ones "
            f"({row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}])"
        )
    if not told:
        return None
    text = "; ".join(told)
    return f"{text[0].upper()}{text[1:]}."


def _units(evidence: Evidence) -> str | None:
    if evidence.detectors is None or (found := new_at_deepest(evidence.detectors, STUDENT)) is None:
        return None
    text = (
        f"{_part(found)} of the student's units at {evidence.detectors['stage'].iloc[-1]} detect a concept of the "
        "probe that no unit of its base detects there"
    )
    if (other := new_at_deepest(evidence.detectors, SECOND)) is None:
        return f"{text}; how much of this is the seed cannot be told without a second base."
    return f"{text}, {_than(found, other)} the second base's ({_part(other)})."


def _unsaid(evidence: Evidence) -> str | None:
    told = []
    if evidence.second:
        told.append("how much further seeds would differ, of which one was given")
    else:
        told.append("what is the seed's doing, for want of a second base (train the base again from another seed)")
    if evidence.ledger is None:
        told.append("right and wrong, for want of labels")
    elif (found := evidence.ledger.against(BASE)).p > LEVEL:
        told.append(f"whether accuracy changed{_needed(found)}")
    if not evidence.unexplained:
        told.append("anything about features")
    elif not evidence.handed_over:
        told.append("what the teacher handed over, for want of the teacher's answers")
    return f"Not to be told from what was given: {'; '.join(told)}."


def changed_groups(evidence: Evidence, table: pd.DataFrame, sign: int) -> pd.DataFrame:
    """Rows of classes, slices or confusions with a change in one direction that holds over all rows, against the second
    base as well if there is one.

    A network that guesses has favourite answers, which say nothing: there are no gains of a student, and no losses of a
    base, that is not clearly better than chance.
    """
    assert evidence.ledger is not None
    knows = [
        role
        for role in (STUDENT, BASE)
        if share_interval(evidence.ledger.right(role), method="exact").low > 1 / len(evidence.ledger.names)
    ]
    meant = (STUDENT, BASE) if "answer" in table else (STUDENT,) if sign > 0 else (BASE,)
    if not set(meant) & set(knows):
        return table.iloc[:0]
    p = table["against both"] if "against both" in table else table["p adjusted"]
    return table[(p <= LEVEL) & (sign * table["difference"] > 0)]


def overall(table: pd.DataFrame, role: str) -> pd.Series:
    return table[(table["network"] == role) & (table["corruption"] == "")].iloc[0]


def _sign(found: Paired) -> tuple[int, str]:
    """1, -1 or, where nothing is clear, 0, and the word for it."""
    if found.p > LEVEL:
        return 0, ""
    return (1, "more") if found.difference > 0 else (-1, "less")


def _clear(ends: Sequence[tuple[float, float]]) -> tuple[int, str]:
    """The sign that all intervals have, against the base and, if given, the second base, or 0; and what is doubtful."""
    signs = [1 if low > 0 else -1 if high < 0 else 0 for low, high in ends]
    if len(signs) == 1:
        return signs[0], "; this may be the seed" if signs[0] else ""
    both = signs[0] if signs[0] == signs[1] else 0
    return both, "; not so against the second base" if signs[0] and not both else ""


def _than(found: Interval, other: Interval) -> str:
    return "more than" if found.low > other.high else "less than" if found.high < other.low else "not clearly unlike"


def _part(found: Interval) -> str:
    mean, low, high = (min(max(value, 0.0), 1.0) for value in found[:3])
    return f"{mean:.0%} [{low:.0%}, {high:.0%}]"


def _needed(found: Paired) -> str:
    if math.isinf(number := images_needed(found)):
        return ""
    return f"; to show a difference as large as that observed takes about {number:,.0f} images"


def _share(row: Mapping[str, Any], digits: int = 1) -> str:
    if math.isnan(row["value"]):
        return "an unknown share"
    return f"{row['value']:.{digits}%} [{row['low']:.{digits}%}, {row['high']:.{digits}%}]"


def _points(found: Paired) -> str:
    """The size of a difference, without its sign."""
    ends = sorted((found.low, found.high), key=abs) if found.difference < 0 else (found.low, found.high)
    value, low, high = (abs(found.difference), *(abs(end) for end in ends))
    return f"{100 * value:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def names_of(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
