"""Choosing a teacher: the cost of networks, the fidelity of students, and rankings of teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdx.data.batches import balanced_batches
from kdx.data.dataset import Dataset, folds
from kdx.data.label_embeddings import label_embeddings
from kdx.distil.answers import answers
from kdx.distil.cross_validation import cross_chains
from kdx.distil.fit import Evaluation
from kdx.distil.run_store import Run
from kdx.distil.training import Recipe
from kdx.inference import tukey, two_factor
from kdx.intervals import mean_interval
from kdx.measure.scores import rs
from kdx.networks import models
from kdx.networks.stages import evaluating

Images = Dataset | Callable[[int], Dataset]  # for all folds, or by fold
MEASURES = ("accuracy", "teacher's accuracy", "agreement", "KL", "cost")  # and RS of every stage
SMALLER_IS_BETTER = ("KL", "cost")


class Complexity(NamedTuple):
    """Trained parameters, and FLOPs for one image (two per multiplication with addition)."""

    parameters: int
    flops: int


def complexity(model: nn.Module, size: Sequence[int]) -> Complexity:
    """Parameters and FLOPs of a network for images of ``size`` (c, h, w), as torch counts convolutions and products."""
    weight = next(model.parameters())
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        model(weight.new_zeros(1, *size))
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


class Fidelity(NamedTuple):
    """How closely a student follows its teacher's answers, right or wrong (Stanton et al. 2021).

    Attributes:
        agreement: Share of images with the same first class.
        kl: Mean Kullback-Leibler divergence of the student's probabilities from the teacher's,
            KL(teacher || student), in nats.
    """

    agreement: float
    kl: float


def fidelity(student: Tensor, teacher: Tensor) -> Fidelity:
    """Fidelity from the logits (n, classes) of both networks for the same images."""
    return Fidelity(*(of.mean().item() for of in _fidelity_of_images(student, teacher)))


def _fidelity_of_images(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Agreement and divergence of each image, float64 (n,)."""
    if student.ndim != 2 or student.shape != teacher.shape or not len(student):
        raise ValueError(
            f"expected logits (n, classes) of the same images, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    s, t = student.double().log_softmax(1), teacher.double().log_softmax(1)
    return (student.argmax(1) == teacher.argmax(1)).double(), (t.exp() * (t - s)).sum(1)


def evaluate_chains(
    chains: Mapping[tuple[str, int], Sequence[Run]], images: Images, device: str = "auto"
) -> dict[tuple[str, int], Evaluation]:
    """Evaluate the student of every chain and its teacher, each once.

    Args:
        chains: (name, fold) -> runs from the teacher to the student, from :func:`kdx.cross_chains`.
        images: Images that the networks were not trained on, for all folds, or a function of the fold.
        device: As for :func:`kdx.evaluate`.

    Returns:
        (key of the run, fold) -> evaluation.
    """
    wanted = dict.fromkeys((run.key, fold) for (_, fold), runs in chains.items() for run in runs[-2:])
    known = {run.key: run for runs in chains.values() for run in runs}
    return {(key, fold): answers(known[key], _of_fold(images, fold), device) for key, fold in wanted}


def measure_students(
    chains: Mapping[tuple[str, int], Sequence[Run]],
    answers: Mapping[tuple[str, int], Evaluation],
    images: Images,
    embeddings: Tensor,
    **scoring: Any,
) -> pd.DataFrame:
    """Measures of the last network of every chain, and the cost of training it.

    Args:
        chains: (name, fold) -> runs from the teacher to the student, from :func:`kdx.cross_chains`.
        answers: From :func:`evaluate_chains`, for the same images.
        images: As for :func:`evaluate_chains`.
        embeddings: (classes, m), as for :func:`kdx.rs`.
        **scoring: Settings of :func:`kdx.rs`.

    Returns:
        network, fold, measure, value, parts (the values, of images or of batches, whose mean this is; None if folds
        have images of their own). The measures are RS L1, ..., accuracy (fraction), for chains with a teacher its own
        accuracy, agreement and KL, and cost: GFLOP per training image in all epochs of all links, with three forward
        passes per step and one of the teacher, at full size.
    """
    rows = []
    for (name, fold), runs in chains.items():
        data = _of_fold(images, fold)
        x = data.card.normalize(data.images)
        scores = rs(runs[-1].model, x, data.labels, embeddings, **scoring)
        parts = {f"RS {stage}": of for stage, of in zip(scores["stage"], scores["parts"], strict=True)}
        student, *teacher = (answers[run.key, fold] for run in reversed(runs[-2:]))
        parts["accuracy"] = _hits(student, data)
        for guide in teacher:
            parts["teacher's accuracy"] = _hits(guide, data)
            parts["agreement"], parts["KL"] = (of.numpy() for of in _fidelity_of_images(student.logits, guide.logits))
        shared = isinstance(images, Dataset)
        found = [(measure, of.mean(), of if shared else None) for measure, of in parts.items()]
        found.append(("cost", _training_flops(runs) / 1e9, None))
        rows += [{"network": name, "fold": fold, "measure": m, "value": v, "parts": of} for m, v, of in found]
    return pd.DataFrame(rows)


def _hits(answers: Evaluation, data: Dataset) -> np.ndarray:
    """Which images are classified correctly: float64 (n,)."""
    return (answers.predictions == data.labels).double().numpy()


def _of_fold(images: Images, fold: int) -> Dataset:
    return images if isinstance(images, Dataset) else images(fold)


def _training_flops(runs: Sequence[Run]) -> int:
    """FLOPs per training image, in all epochs of a chain."""
    total, above = 0, 0
    for run in runs:
        spec = run.manifest["spec"]
        own = complexity(run.model, spec["input"]["size"]).flops
        total += spec["recipe"]["epochs"] * (3 * own + above)
        above = own
    return total


def gains(measures: pd.DataFrame) -> pd.DataFrame:
    """:func:`measure_students` with accuracy and RS as differences from the base of the fold."""
    base = measures[measures["network"] == "base"].set_index(["measure", "fold"])
    compared = [name for name in base.index.unique("measure") if name == "accuracy" or name.startswith("RS ")]
    rows = measures[measures["network"] != "base"].to_dict("records")
    for row in rows:
        if row["measure"] in compared:
            beside = base.loc[(row["measure"], row["fold"])]
            row["value"] -= beside["value"]
            if row.get("parts") is not None:
                row["parts"] = row["parts"] - beside["parts"]
    return pd.DataFrame(rows)


def _by_fold(values: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """The values of one measure as fold x network."""
    if (counts := values.groupby("network")["fold"].nunique()).nunique() > 1:
        raise ValueError(f"expected every network in every fold, got {counts.to_dict()} folds")
    return values.pivot(index="fold", columns="network", values=column)


def rank(values: pd.DataFrame, by: str = "accuracy") -> pd.DataFrame:
    """Rank networks by measures of several folds; networks that cannot be told apart are tied.

    Args:
        values: network, fold, measure, value, such as from :func:`gains`; every network in every fold. With values of
            shared images or batches in ``parts``, the ranks hold for other images too.
        by: The measure by which the networks are sorted.

    Returns:
        network, measure, value (mean over folds), low, high (95 % interval over folds and, with ``parts``, images, by
        :func:`kdx.inference.two_factor`), folds, best and worst: the ranks that a network may have by this measure. It
        is ranked behind (ahead of) the networks from which it differs for the worse (better). The differences are
        within folds and images, and their intervals hold jointly (:func:`kdx.inference.tukey`): with 95 % confidence
        *all* true ranks by a measure lie between best and worst, if the networks vary alike over folds. 1 to n means
        tied with all. A measure that does not vary, such as cost, is ranked as it is. NaN where a value of the network
        is NaN.

    Raises:
        ValueError: An unknown measure, fewer than two folds, or a network that some fold lacks.
    """
    if by not in set(values["measure"]):
        raise ValueError(f"by: expected one of {', '.join(values['measure'].unique())}, got {by!r}")
    rows = []
    for measure, group in values.groupby("measure", sort=False):
        table = _by_fold(group)
        x = table.T.to_numpy(dtype=float)  # (networks, folds)
        if "parts" in group and group["parts"].notna().all():
            parts = _by_fold(group, "parts")
            x = np.stack([np.stack(list(parts[name])) for name in table])  # (networks, folds, images)
        estimates = {name: two_factor(of) for name, of in zip(table, x, strict=True)}
        known = [name for name, estimate in estimates.items() if not np.isnan(estimate.mean)]
        margin = tukey(x[[name in known for name in table]]) if len(known) > 1 else np.nan
        sign = -1 if measure in SMALLER_IS_BETTER else 1
        for name, own in estimates.items():
            ahead = [sign * (estimates[other].mean - own.mean) for other in known]
            best, worst = 1 + sum(d > margin for d in ahead), len(known) - sum(d < -margin for d in ahead)
            ranks = (best, worst) if name in known else (np.nan, np.nan)
            rows.append([name, measure, own.mean, *own.interval(), len(table), *ranks])
    found = pd.DataFrame(rows, columns=["network", "measure", "value", "low", "high", "folds", "best", "worst"])
    order = found[found["measure"] == by].sort_values("value", ascending=by in SMALLER_IS_BETTER)["network"]
    place = {name: i for i, name in enumerate(order)}
    return found.sort_values("network", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def rank_agreement(short: pd.DataFrame, full: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How well one ranking of networks predicts another, measure by measure.

    Args:
        short: network, fold, measure, value, such as from :func:`gains`; three networks or more.
        full: Likewise, of the same networks and folds. Measures that only one of the two has are left out.
        seed: Of the permutations.

    Returns:
        Index measure; spearman (rank correlation over networks of their means over folds), p (permutation of
        networks, one-sided; all permutations of up to 7 networks, else 9999), value, low, high (mean over folds of
        the correlation within a fold, its 95 % t interval cut at -1 and 1), between_folds (mean correlation of the
        full rankings of two folds). NaN where a value is NaN, or all networks are equal. p assumes that networks are
        exchangeable, although some may share a teacher.

    Raises:
        ValueError: Other networks or folds in one of the two, or fewer than three networks.
    """
    rows = {}
    for measure in [m for m in short["measure"].unique() if m in set(full["measure"])]:
        one, two = (_by_fold(values[values["measure"] == measure]) for values in (short, full))
        if set(one) != set(two) or len(one.columns) < 3 or not one.index.equals(two.index):
            raise ValueError(
                f"{measure}: expected the same folds and three or more networks in both, got folds {list(one.index)} "
                f"of {', '.join(one)} and {list(two.index)} of {', '.join(two)}"
            )
        x, y = _standard_ranks(one), _standard_ranks(two[one.columns])
        x_mean, y_mean = (_standard_ranks(v.mean(skipna=False).to_frame().T)[0] for v in (one, two[one.columns]))
        within = mean_interval((x * y).sum(1))
        between = (y @ y.T)[np.triu_indices(len(y), 1)].mean()
        spearman, p = float(x_mean @ y_mean), np.nan
        if not np.isnan(spearman):
            p = stats.permutation_test(
                (x_mean,),
                lambda x, axis, y=y_mean: x @ y,
                permutation_type="pairings",
                alternative="greater",
                vectorized=True,
                random_state=seed,
            ).pvalue
        rows[measure] = [spearman, p, within.mean, max(within.low, -1), min(within.high, 1), between]
    columns = ["spearman", "p", "value", "low", "high", "between_folds"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _standard_ranks(values: pd.DataFrame) -> np.ndarray:
    """Ranks within rows, centred and of length 1, so products are Spearman's correlations; NaN where undefined."""
    ranks = stats.rankdata(values.to_numpy(dtype=float), axis=1, nan_policy="propagate")
    ranks = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return ranks / np.where(length > 0, length, np.nan)


def name_chain(chain: Sequence[str]) -> str:
    """A chain without its student, for tables: ``"resnet101 via resnet50"``."""
    return " via ".join(chain[:-1])


class Ranking(NamedTuple):
    """A ranking of teachers.

    Attributes:
        table: As from :func:`rank`.
        values: Its data, as from :func:`gains`.
    """

    table: pd.DataFrame
    values: pd.DataFrame


def rank_teachers(
    student: str,
    candidates: Sequence[str | Sequence[str]],
    data: Dataset,
    *,
    embeddings: Tensor | None = None,
    budget: int = 1,
    by: str = "accuracy",
    k: int = 3,
    first: int | None = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    batches: int = 16,
    batch_size: int = 128,
    **training: Any,
) -> Ranking:
    """Which teacher should this student have? Compares a short distillation by each candidate.

    The student learns from each candidate for ``budget`` epochs, in every fold; so does the base from labels alone.
    They are measured on the held-out images of the fold, so a test set remains untouched. Teachers and assistants are
    trained by the whole recipe, or found in the run store.

    Args:
        student: Name of a model as for :func:`kdx.fit`.
        candidates: Each the name of a model, or several from the teacher to the last assistant.
        data: Training images.
        embeddings: Of the classes, for RS; None takes :func:`kdx.label_embeddings` of their names.
        budget: Epochs of student and base, at most the recipe's.
        by: The measure that sorts the table: accuracy, RS L1, ..., agreement, KL or cost.
        k: Number of folds.
        first: Carry out only so many of the folds, from the first on; None: all.
        seed: First of the seeds of folds and networks.
        recipe: Of teachers and assistants.
        batches: Class-balanced batches for RS, among each fold's held-out images.
        batch_size: Images per batch.
        **training: technique, settings, workers, watched, stem, width and device of :func:`kdx.cross_chains`.

    Returns:
        A ranking of networks named after their teachers, such as ``"resnet101 via resnet50"``. Accuracy and RS are
        gains over the base; cost is that of the whole chain, see :func:`measure_students`.

    Raises:
        ValueError: Before anything is trained, for candidates, a budget, a measure or embeddings that do not fit, and
            for too few held-out images.
    """
    recipe = recipe or Recipe()
    if not isinstance(budget, int) or not 1 <= budget <= recipe.epochs:
        raise ValueError(f"budget: expected 1 to {recipe.epochs} epochs, as many as the recipe's, got {budget!r}")
    chains = _chains_of(student, candidates)
    table = label_embeddings(data.classes) if embeddings is None else embeddings
    held_out = [data[rows] for _, rows in folds(data.labels, k, seed)]
    scoring: dict[str, Any] = {"permutations": 0, "seed": seed, "batches": batches, "batch_size": batch_size}
    for part in held_out:  # errors of scoring come before the training
        balanced_batches(part.labels, batches, batch_size)
    x, labels = held_out[0].card.normalize(held_out[0].images), held_out[0].labels
    stem, width = training.get("stem", "small"), training.get("width")
    untrained = models.build(student, len(data.classes), stem, width, seed).eval()
    tried = rs(untrained, x, labels, table, **scoring | {"batches": 2})
    if by not in (choices := [*MEASURES, *("RS " + tried["stage"])]):
        raise ValueError(f"by: expected one of {', '.join(choices)}, got {by!r}")
    runs = cross_chains(data, chains, k=k, first=first, seed=seed, recipe=recipe, budget=budget, **training)
    answers = evaluate_chains(runs, lambda fold: held_out[fold - 1], training.get("device", "auto"))
    values = gains(measure_students(runs, answers, lambda fold: held_out[fold - 1], table, **scoring))
    return Ranking(rank(values, by), values)


def _chains_of(student: str, candidates: Sequence[str | Sequence[str]]) -> dict[str, list[str]]:
    """Name -> chain from each candidate to the student."""
    if isinstance(candidates, str) or len(candidates) < 2:
        raise ValueError(f"candidates: expected at least two teachers to compare, got {candidates!r}")
    lines = [each if isinstance(each, list | tuple) else [each] for each in candidates]
    if not all(isinstance(name, str) for line in lines for name in line):
        raise ValueError(f"candidates: expected names of models, got {candidates!r}")
    chains = {name_chain([*line, student]): [*line, student] for line in lines}
    if len(chains) < len(lines):
        raise ValueError(f"candidates: expected different ones, got {', '.join(map(str, candidates))}")
    return chains
