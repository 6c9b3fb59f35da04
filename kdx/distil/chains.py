"""Chains of teacher assistants."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kdx.data.dataset import Dataset
from kdx.distil.fit import fit
from kdx.distil.run_store import Run
from kdx.distil.techniques import find_techniques
from kdx.distil.training import Recipe, find_taps
from kdx.networks import models


def distill_chain(
    chain: Sequence[str | Run],
    train: Dataset,
    validation: Dataset,
    *,
    technique: str = "response",
    stem: str = "small",
    width: float | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str = "auto",
    **settings: Any,
) -> list[Run]:
    """Distil through teacher assistants (Mirzadeh et al. 2020): each network is taught by the one before.

    Args:
        chain: Models as for :func:`kdx.fit`, from the teacher, which learns from labels alone, to the student:
            ``["resnet101", "resnet50", "resnet18"]``. Families may differ. The first may be a finished run.
        train: Training images.
        validation: Images on which every network is evaluated after each epoch.
        technique: Of every link.
        stem: Of every network, as for :func:`kdx.fit`.
        width: Of every network whose name does not carry its own.
        recipe: Of every network.
        seed: Of every network.
        device: As for :func:`kdx.fit`.
        **settings: Parameters of the technique.

    Returns:
        One run per network, in the order of the chain. Each is in the run store, so chains that begin alike share
        their first networks.

    Raises:
        ValueError: Before anything is trained: fewer than two networks, an unknown name or setting, other classes,
            or different stages in the two networks of a link. An assistant or student with more parameters than its
            teacher is a warning.
    """
    recipe = recipe or Recipe()
    check_chain(chain, train, technique, stem=stem, width=width, **settings)
    first, *others = chain
    common: dict[str, Any] = {"recipe": recipe, "seed": seed, "stem": stem, "width": width, "device": device}
    runs = [fit(first, train, validation, **common) if isinstance(first, str) else first]
    for model in others:
        assert isinstance(model, str)
        runs.append(fit(model, train, validation, technique=technique, teacher=runs[-1], **common, **settings))
    return runs


def check_chain(
    chain: Sequence[str | Run],
    train: Dataset,
    technique: str,
    *,
    stem: str = "small",
    width: float | None = None,
    **settings: Any,
) -> None:
    """The errors and warnings of :func:`distill_chain`, without training."""
    if isinstance(chain, str) or len(chain) < 2:
        raise ValueError(f"chain: expected at least a teacher and a student, got {chain!r}")
    first, *others = chain
    if not isinstance(first, str | Run) or not all(isinstance(model, str) for model in others):
        raise ValueError(f"chain: expected names of models, with at most the first a run, got {chain!r}")
    parts = find_techniques(technique, settings)
    if not all(part.needs_teacher for part in parts):
        raise ValueError(f"chain: expected a technique that learns from a teacher, got {technique!r}")
    if isinstance(first, Run) and first.classes != train.classes:
        raise ValueError(
            f"expected a teacher of the classes {', '.join(train.classes)}, got one of {', '.join(first.classes)}"
        )
    networks = [
        models.build(link, len(train.classes), stem, width, seed=0) if isinstance(link, str) else link.model.cpu()
        for link in chain
    ]
    image = train.card.normalize(train.images[:1])
    for teacher, student in pairwise(networks):
        find_taps(parts, [student, teacher], image)
        ours, theirs = (sum(weight.numel() for weight in network.parameters()) for network in (student, teacher))
        if ours > theirs:
            names = [f"{n.architecture['name']}@{n.architecture['width']:g}" for n in (student, teacher)]
            warnings.warn(
                f"{names[0]} ({ours:,} parameters) is larger than its teacher {names[1]} ({theirs:,})", stacklevel=3
            )
