"""Choosing a teacher: what networks cost, how far a student follows its teacher, and rankings of teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdx.data import Dataset, folds
from kdx.distill import Evaluation, Recipe, evaluate
from kdx.intervals import mean_interval
from kdx.labels import label_embeddings
from kdx.runs import Run
from kdx.scores import balanced_batches, rs
from kdx.study import cross_chains
from kdx.tracing import evaluating

SMALLER_IS_BETTER = ("KL", "cost")


class Complexity(NamedTuple):
    """Trained parameters, and FLOPs of one image (two a multiplication with addition)."""

    parameters: int
    flops: int


def complexity(model: nn.Module, size: Sequence[int]) -> Complexity:
    """What a network costs, for images of ``size`` (c, h, w), as torch counts its convolutions and products."""
    weight = next(model.parameters())
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        model(weight.new_zeros(1, *size))
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


class Fidelity(NamedTuple):
    """How far a student gives its teacher's answers, not only right ones (Stanton et al. 2021).

    ``agreement``: share of images with the same first class. ``kl``: mean Kullback-Leibler divergence of
    the student's probabilities from the teacher's, KL(teacher || student), in nats.
    """

    agreement: float
    kl: float


def fidelity(student: Tensor, teacher: Tensor) -> Fidelity:
    """Fidelity from the logits (n, classes) of both networks for the same images."""
    if student.ndim != 2 or student.shape != teacher.shape or not len(student):
        raise ValueError(
            f"expected logits (n, classes) of the same images, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    agreement = (student.argmax(1) == teacher.argmax(1)).double().mean().item()
    s, t = student.double().log_softmax(1), teacher.double().log_softmax(1)
    return Fidelity(agreement, (t.exp() * (t - s)).sum(1).mean().item())


def measure_students(
    chains: Mapping[tuple[str, int], Sequence[Run]],
    images: Callable[[int], Dataset],
    embeddings: Tensor,
    device: str = "auto",
    **scoring: Any,
) -> pd.DataFrame:
    """What the last network of every chain is worth, and what it took to get there.

    Parameters
    ----------
    chains : (name, fold) -> runs from the teacher to the student, from :func:`kdx.cross_chains`.
    images : fold -> images that its networks were not trained on.
    embeddings, scoring : of :func:`kdx.rs`.

    Returns
    -------
    DataFrame : network, fold, measure, value; the measures are accuracy (fraction), RS L1, ..., agreement
        and KL with the network's own teacher (of chains with one), and cost: GFLOP a training
        image in all epochs of all links, three forward passes a step and one of the teacher, at full size.
    """
    rows = []
    answers: dict[tuple[str, int], Evaluation] = {}
    normalised: dict[int, Tensor] = {}
    for (name, fold), runs in chains.items():
        data = images(fold)
        for run in runs[-2:]:
            if (run.key, fold) not in answers:
                answers[run.key, fold] = evaluate(run.model, data, device)
        student = runs[-1]
        values = {"accuracy": answers[student.key, fold].accuracy}
        if fold not in normalised:
            normalised = {fold: data.card.normalize(data.images)}
        scores = rs(student.model.cpu(), normalised[fold], data.labels, embeddings, **scoring)
        values |= {f"RS {stage}": value for stage, value in zip(scores["stage"], scores["value"], strict=True)}
        if len(runs) > 1:
            pair = (answers[run.key, fold].logits for run in (student, runs[-2]))
            values["agreement"], values["KL"] = fidelity(*pair)
        values["cost"] = _training_flops(runs) / 1e9
        rows += [{"network": name, "fold": fold, "measure": m, "value": v} for m, v in values.items()]
    return pd.DataFrame(rows)


def _training_flops(runs: Sequence[Run]) -> int:
    """FLOPs a training image, in all epochs of a chain."""
    total, above = 0, 0
    for run in runs:
        spec = run.manifest["spec"]
        own = complexity(run.model, spec["input"]["size"]).flops
        total += spec["recipe"]["epochs"] * (3 * own + above)
        above = own
    return total


def gains(measures: pd.DataFrame) -> pd.DataFrame:
    """:func:`measure_students` with accuracy and RS as differences from the base of the fold."""
    values = measures.set_index(["measure", "fold", "network"])["value"]
    base = values.xs("base", level="network")
    above = values.drop("base", level="network")
    compared = [name for name in base.index.unique("measure") if name == "accuracy" or name.startswith("RS ")]
    for name in compared:
        above.loc[[name]] -= base[name].reindex(above.loc[[name]].index.get_level_values("fold")).to_numpy()
    return above.reset_index()


def rank(values: pd.DataFrame, by: str = "accuracy") -> pd.DataFrame:
    """Rank networks by measures of several folds; what cannot be told apart is tied.

    Parameters
    ----------
    values : network, fold, measure, value, such as from :func:`gains`; every network in every fold.
    by : the measure by which the networks are sorted.

    Returns
    -------
    DataFrame : network, measure, value (mean over folds), low, high (95 % t interval over folds), folds,
        best, worst: the ranks that a network may have by this measure. It is certainly behind those, and
        certainly ahead of those, from which it differs with a 95 % interval over folds that leaves out
        zero (of differences within folds, not corrected for their number). 1 to n: tied with all.
    """
    if by not in set(values["measure"]):
        raise ValueError(f"by: expected one of {', '.join(values['measure'].unique())}, got {by!r}")
    rows = []
    for measure, group in values.groupby("measure", sort=False):
        table = group.pivot(index="fold", columns="network", values="value")
        sign = -1 if measure in SMALLER_IS_BETTER else 1
        for name in table:
            ahead = [mean_interval(sign * (table[other] - table[name])) for other in table if other != name]
            mean = mean_interval(table[name])
            best = 1 + sum(difference.low > 0 for difference in ahead)
            worst = len(table.columns) - sum(difference.high < 0 for difference in ahead)
            rows.append([name, measure, mean.mean, mean.low, mean.high, mean.n, best, worst])
    found = pd.DataFrame(rows, columns=["network", "measure", "value", "low", "high", "folds", "best", "worst"])
    order = found[found["measure"] == by].sort_values("value", ascending=by in SMALLER_IS_BETTER)["network"]
    place = {name: i for i, name in enumerate(order)}
    return found.sort_values("network", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def rank_agreement(short: pd.DataFrame, full: pd.DataFrame) -> pd.DataFrame:
    """How well one ranking of networks tells another, measure by measure.

    Parameters
    ----------
    short, full : network, fold, measure, value, such as from :func:`gains`; the same networks and folds,
        three networks or more. Measures that only one of them has are left out.

    Returns
    -------
    DataFrame : index measure; spearman (rank correlation over networks of their means over folds), p
        (permutation of networks, one-sided; exact up to 7 networks), value, low, high (mean over folds of
        the correlation within a fold, with its 95 % t interval), ceiling (mean correlation of the full
        rankings of two folds: no other ranking can be expected to tell a fold's better). NaN where all
        networks are equal.
    """
    rows = {}
    for measure in [m for m in short["measure"].unique() if m in set(full["measure"])]:
        one, two = (
            values[values["measure"] == measure].pivot(index="fold", columns="network", values="value")
            for values in (short, full)
        )
        if set(one) != set(two) or len(one.columns) < 3 or not one.index.equals(two.index):
            raise ValueError(
                f"{measure}: expected the same three or more networks and folds in both, got {one} and {two}"
            )
        x, y = one.mean(), two[one.columns].mean()
        tested = stats.permutation_test(
            (x,),
            lambda x, y=y: stats.spearmanr(x, y).statistic,
            permutation_type="pairings",
            alternative="greater",
            n_resamples=9999,
            random_state=0,
        )
        within = mean_interval(one.corrwith(two, axis=1, method="spearman"))
        between = two.T.corr("spearman").to_numpy()
        ceiling = between[np.triu_indices(len(two), 1)].mean()
        rows[measure] = [tested.statistic, tested.pvalue, within.mean, within.low, within.high, ceiling]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["spearman", "p", "value", "low", "high", "ceiling"])


def name_chain(chain: Sequence[str]) -> str:
    """``"resnet101 via resnet50"``: a chain without its student, for tables."""
    return " via ".join(chain[:-1])


class Ranking(NamedTuple):
    """``table``: as of :func:`rank`. ``values``: what it rests on, as of :func:`gains`."""

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
    technique: str = "response",
    settings: Mapping[str, Any] | None = None,
    k: int = 3,
    seed: int = 0,
    recipe: Recipe | None = None,
    workers: int = 1,
    stem: str = "small",
    width: float | None = None,
    device: str = "auto",
    watched: int = 0,
    batches: int = 16,
    batch_size: int = 128,
    **scoring: Any,
) -> Ranking:
    """Which teacher should this student have? A short distillation by each candidate, compared.

    The student learns from each candidate for ``budget`` epochs, in every fold; so does the base from
    labels alone. What they are worth is measured on the images held out of the fold, so a test set
    remains untouched. Teachers and assistants are trained by the whole recipe, or found in the run store.

    Parameters
    ----------
    student : a model as for :func:`kdx.fit`.
    candidates : a model, or several from the teacher to the last assistant, each.
    embeddings : of the classes, for RS; None: :func:`kdx.label_embeddings` of their names.
    by : the measure that sorts the table: accuracy, RS L1, ..., agreement, KL or cost.
    technique, settings, k, seed, recipe, workers, stem, width, device, watched : as for :func:`kdx.cross_chains`.
    batches, batch_size, scoring : of :func:`kdx.rs`, in each fold's held-out images; permutations are 0 here.

    Returns
    -------
    Ranking : of networks named after their teachers, such as ``"resnet101 via resnet50"``. Accuracy and RS are
        gains over the base; cost is that of the whole chain, see :func:`measure_students`.
    """
    if isinstance(candidates, str) or len(candidates) < 2:
        raise ValueError(f"candidates: expected at least two teachers to compare, got {candidates!r}")
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 epoch, got {budget}")
    lines = [[each] if isinstance(each, str) else list(each) for each in candidates]
    chains = {name_chain([*line, student]): [*line, student] for line in lines}
    if len(chains) < len(lines):
        raise ValueError(f"candidates: expected different ones, got {', '.join(map(str, candidates))}")
    table = label_embeddings(data.classes) if embeddings is None else embeddings
    held_out = [data[rows] for _, rows in folds(data.labels, k, seed)]
    scoring = {"permutations": 0, "seed": seed, "batches": batches, "batch_size": batch_size} | scoring
    for part in held_out:
        balanced_batches(part.labels, batches, batch_size)  # are there enough? Before the training
    runs = cross_chains(
        data, chains, technique=technique, settings=settings, k=k, seed=seed, recipe=recipe, budget=budget,
        workers=workers, watched=watched, stem=stem, width=width, device=device,
    )  # fmt: skip
    values = gains(measure_students(runs, lambda fold: held_out[fold - 1], table, device, **scoring))
    return Ranking(rank(values, by), values)
