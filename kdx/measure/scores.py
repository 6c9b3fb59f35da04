"""The scores of :class:`kdx.Scorer` for a single call."""

from __future__ import annotations

from typing import Any

import pandas as pd
from torch import Tensor, nn

from kdx.measure.scorer import Layers, Scorer


def rs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    *,
    features: str = "raw",
    other: nn.Module | None = None,
    layers: Layers | None = None,
    layers_other: Layers | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Relevance score of one network: :meth:`Scorer.rs` for a single call.

    Args:
        model: The network.
        images: As for :class:`Scorer`.
        labels: As for :class:`Scorer`.
        embeddings: As for :meth:`Scorer.rs`; likewise features and ``other``, which is a network here.
        features: See embeddings.
        other: See embeddings.
        layers: Stage -> module name of the model; None takes :func:`kdx.stages`.
        layers_other: Likewise, of ``other``.
        **settings: batches, batch_size, permutations, estimator, keep and seed of :class:`Scorer`. Given explicitly,
            permutations hold for ``"unicam"`` too.

    Returns:
        As for :meth:`Scorer.rs`.

    Examples:
        >>> import kdx, torch
        >>> model = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(24) % 3
        >>> kdx.rs(model, images, labels, torch.eye(3), batches=2, batch_size=12, permutations=19).shape
        (4, 12)
    """
    networks = {"model": model} if other is None else {"model": model, "other": other}
    scorer = Scorer(networks, images, labels, layers=_given(model=layers, other=layers_other), **settings)
    return scorer.rs(
        "model", embeddings, features, None if other is None else "other", settings.get("permutations")
    )  # fmt: skip


def fss(
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    features: str = "raw",
    embeddings: Tensor | None = None,
    layers_student: Layers | None = None,
    layers_base: Layers | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Feature similarity score of two networks: :meth:`Scorer.fss` for a single call.

    Args:
        student: A network.
        base: Another.
        images: As for :class:`Scorer`.
        labels: As for :class:`Scorer`.
        features: As for :meth:`Scorer.fss`; likewise embeddings.
        embeddings: See features.
        layers_student: Stage -> module name; None takes :func:`kdx.stages`.
        layers_base: Likewise.
        **settings: batches, batch_size, permutations, estimator, keep and seed of :class:`Scorer`.

    Returns:
        As for :meth:`Scorer.fss`.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> table = kdx.fss(student, base, images, torch.arange(24) % 3, batches=2, batch_size=12, permutations=0)
        >>> table["stage"].tolist(), bool((table["value"] > 0).all())
        (['L1', 'L2', 'L3', 'L4'], True)
    """
    if features == "unicam" and settings.get("permutations"):
        raise ValueError("features 'unicam' have no valid permutation test in fss; leave permutations out")
    layers = _given(student=layers_student, base=layers_base)
    scorer = Scorer({"student": student, "base": base}, images, labels, layers=layers, **settings)
    return scorer.fss("student", "base", features, embeddings)


def unique_rs(
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    *,
    layers_student: Layers | None = None,
    layers_base: Layers | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Relevance of the features that only one of two networks holds: :meth:`Scorer.unique_rs` for a single call.

    Args:
        student: A network.
        base: Another.
        images: As for :class:`Scorer`.
        labels: As for :class:`Scorer`.
        embeddings: As for :meth:`Scorer.unique_rs`.
        layers_student: Stage -> module name; None takes :func:`kdx.stages`.
        layers_base: Likewise.
        **settings: batches, batch_size, permutations and seed of :class:`Scorer`.

    Returns:
        As for :meth:`Scorer.unique_rs`.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(24) % 3
        >>> table = kdx.unique_rs(student, base, images, labels, torch.eye(3), batches=2, batch_size=12, permutations=0)
        >>> table["direction"].unique().tolist(), table["statistic"].unique().tolist()
        (['distilled', 'residual'], ['semipartial', 'partial'])
    """
    layers = _given(student=layers_student, base=layers_base)
    scorer = Scorer({"student": student, "base": base}, images, labels, layers=layers, **settings)
    return scorer.unique_rs("student", "base", embeddings)


def _given(**layers: Layers | None) -> dict[str, Layers]:
    return {name: of for name, of in layers.items() if of is not None}
