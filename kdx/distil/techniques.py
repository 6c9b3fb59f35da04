"""Distillation techniques: what a teacher adds to the loss of its student.

``TECHNIQUES`` maps a name to a class. Every loss is the mean cross-entropy with the labels, times ``label_weight``,
plus the technique's ``guidance``. Techniques combine: ``"response+attention"``. Those that compare answers are in
:mod:`kdx.distil.logit_techniques`, those that compare features in :mod:`kdx.distil.feature_techniques`, those that
rebuild the teacher's features in :mod:`kdx.distil.rebuilding_techniques`, and those that compare images with each other
in :mod:`kdx.distil.contrastive_techniques`. The key of a run covers the class of its technique and whatever that
names, so an edit retrains only the students of that technique.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kdx.distil.contrastive_techniques import Contrastive, SelfSupervised
from kdx.distil.feature_techniques import Attention, AttentionLayerProjection, InterChannel, Overhaul
from kdx.distil.logit_techniques import Correlation, Decoupled, Label, Response, Smoothing
from kdx.distil.rebuilding_techniques import Factor, Prior
from kdx.distil.technique import Technique

ORDER: tuple[type[Technique], ...] = (  # also of joined names, which are part of keys
    Label, Smoothing, Response, Decoupled, Correlation, Attention, Overhaul, AttentionLayerProjection, InterChannel,
    Factor, Prior, Contrastive, SelfSupervised,
)  # fmt: skip
TECHNIQUES = {known.name: known for known in ORDER}


def technique(name: str) -> Any:
    """Class decorator that enters a technique of one's own into ``TECHNIQUES``."""

    def enter(cls: type[Technique]) -> type[Technique]:
        TECHNIQUES[name] = cls
        cls.name = name
        return cls

    return enter


def settings_of(name: str) -> list[str]:
    """The settings of a technique, or of several joined by +."""
    return [field.name for part in _classes(name) for field in fields(part)]


def needs_teacher(name: str) -> bool:
    """Whether a technique, or several joined by +, learns from a teacher."""
    return any(part.needs_teacher for part in _classes(name))


def _classes(name: str) -> list[type[Technique]]:
    """The classes of techniques joined by +, in the order of the registry."""
    names = name.split("+")
    if unknown := [part for part in names if part not in TECHNIQUES]:
        raise ValueError(
            f"unknown technique {unknown[0]!r}; choose from: {', '.join(TECHNIQUES)}, or several joined by +"
        )
    alone = [part for part in names if not TECHNIQUES[part].needs_teacher]
    if len(set(names)) < len(names) or (alone and len(names) > 1):
        raise ValueError(
            f"technique {name!r}: expected different techniques joined by +, and "
            f"{repr(alone[0]) if alone else 'one without a teacher'} only by itself"
        )
    return [cls for known, cls in TECHNIQUES.items() if known in names]


def find_techniques(name: str, settings: Mapping[str, Any]) -> list[Technique]:
    """The techniques of a name such as ``"response"`` or ``"response+attention"``, with their settings.

    Args:
        name: Techniques joined by +; their order makes no difference.
        settings: Parameters of any of them.

    Raises:
        ValueError: An unknown technique or setting, or a technique named twice.
    """
    choices = settings_of(name)
    if strange := sorted(set(settings) - set(choices)):
        raise ValueError(
            f"unknown settings of {name!r}: {', '.join(strange)}; choose from: {', '.join(choices) or 'none'}"
        )
    return [
        part(**{field.name: settings[field.name] for field in fields(part) if field.name in settings})
        for part in _classes(name)
    ]
