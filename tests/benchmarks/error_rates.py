"""How often the statistics of the book are wrong: error rates by simulation, beside the rates they promise.

    python tests/benchmarks/error_rates.py [draws, 2000 by default]

Networks are simulated by normal variables with the components that were measured on CIFAR-10, in points of accuracy:
an error of 0.19 that all folds share, since they are scored on the same images, and a deviation of 0.24 between folds.
Folds have training images in common, which adds an error that all of them share, by the ratio of Nadeau and Bengio,
unless they are *independent*. In *residual* draws half of the variance between folds is of single images in single
folds. A rate below the promised one means that a rule is cautious. *Former* is the rate of the rule that was replaced:
Student's t over folds, verdicts with Bonferroni's correction, uncorrected pairs of networks, and the permutation test
of the partial correlation.
"""

import sys
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from kdx.inference import two_factor
from kdx.intervals import mean_interval
from kdx.measure.teachers import rank
from kdx.pages.claims import NONE_LARGER, REFUTED, SUPPORTED, UNDECIDED, beyond_controls, effects, judge
from kdx.permutation import conditional_dependence, dependence

FOLD, IMAGE, BATCHES, MARGIN = 0.24, 0.19, 16, 1.0  # points


def networks(rng, k, n=1, kind=""):
    """Scores of n networks without any effect, (n, k, batches)."""
    between = FOLD * np.sqrt(0.5 if kind == "residual" else 1)
    common = 0 if kind == "independent" else rng.normal(size=(n, 1, 1)) / np.sqrt(k - 1)
    x = between * (common + rng.normal(size=(n, k, 1)))
    x = x + IMAGE * np.sqrt(BATCHES) * rng.normal(size=(n, k if kind == "own images" else 1, BATCHES))
    if kind == "residual":
        x = x + FOLD * np.sqrt(0.5 * BATCHES) * rng.normal(size=(n, k, BATCHES))
    return x


# --- one draw of each: is the rule wrong? and the former one? ------------------------------


def interval(rng, k, kind):
    """A 95 % interval that does not hold the truth."""
    (x,) = networks(rng, k, kind=kind)
    low, high = two_factor(x).interval()
    former = mean_interval(x.mean(1))
    return not low <= 0 <= high, lambda: not former.low <= 0 <= former.high


def verdict(rng, k, truth, wrong):
    """A verdict among those that are ``wrong``, for effects with the means ``truth``, in points."""
    x = networks(rng, k, len(truth)) + np.reshape(truth, (-1, 1, 1))

    def former():
        if all(mean_interval(of).low > 0 for of in x.mean(2)):
            return SUPPORTED in wrong
        refuted = any(mean_interval(of, 1 - 0.05 / len(x)).high < 0 for of in x.mean(2))
        return (REFUTED if refuted else UNDECIDED) in wrong

    return judge(effects(dict(enumerate(x)), MARGIN)) in wrong, former


def ranks(rng, k, kind):
    """Seven equal networks that are not all tied."""
    x = networks(rng, k, 7, kind)
    rows = [[n, f, "accuracy", x[n, f].mean(), x[n, f]] for n in range(7) for f in range(k)]
    table = pd.DataFrame(rows, columns=["network", "fold", "measure", "value", "parts"])

    def former():
        ends = [mean_interval(a - b) for a, b in combinations(x.mean(2), 2)]
        return any(end.low > 0 or end.high < 0 for end in ends)

    found = rank(table.drop(columns="parts") if kind == "own images" else table)
    return found["best"].max() > 1, former


def controls(rng, k):
    """A student that seems to exceed one of four equal controls at one of four stages."""
    rows = [
        {"network": n, "stage": s, "fold": f, "parts": part}
        for s in range(4)
        for n, of in enumerate(networks(rng, k, 5))
        for f, part in enumerate(of)
    ]
    return (beyond_controls(pd.DataFrame(rows), [0], [1, 2, 3, 4])["p"] <= 0.05).any(), lambda: np.nan


def given(rng, kind, n=64):
    """p <= 0.05 where x and y are independent given z."""
    x, y, z = (torch.from_numpy(part) for part in third(rng, kind, n))
    settings = {"permutations": 99, "seed": int(rng.integers(2**31))}
    found = conditional_dependence(x, y, z, **settings).p <= 0.05
    return found, lambda: dependence(x, y, z, statistic="partial", **settings).p <= 0.05


def third(rng, kind, n):
    """x and y, which depend on z alone, and z."""
    d = {"two dimensions": 2, "many dimensions": 20}.get(kind, 1)
    x, y, z = rng.normal(size=(3, n, d))
    if kind == "square":
        return z**2 + 0.5 * x, z**2 + 0.5 * y, z
    if kind == "spread":
        return z * x, z * y, z
    if kind == "classes":
        z = np.eye(8)[np.arange(n) % 8]
    return z + x, z + y, z


# --- all of them ------------------------------------------------------------------------------

VERDICTS = (  # what is true, the promised rate, the means, the verdicts that are wrong then
    ("one effect of 0", 0.05, [0.0], {SUPPORTED, REFUTED}),
    ("12 effects of 0", 0.05, [0.0] * 12, {SUPPORTED, REFUTED}),
    ("one of 12 negative", 0.05, [-0.3] + [3.0] * 11, {SUPPORTED, NONE_LARGER}),
    ("one of 12 zero", 0.05, [0.0] + [3.0] * 11, {SUPPORTED, REFUTED, NONE_LARGER}),
    ("one of 12 is δ", 0.05, [MARGIN] + [0.1] * 11, {REFUTED, NONE_LARGER}),
    ("one is δ", 0.05, [MARGIN], {REFUTED, NONE_LARGER}),
    ("one is 0, one is δ", 0.075, [0.0, MARGIN], {SUPPORTED, REFUTED, NONE_LARGER}),
)
GIVEN = ("linear", "square", "spread", "two dimensions", "classes", "many dimensions")


def jobs():
    """What is simulated -> promised rate (NaN: none), function and arguments."""
    found = {}
    for k in (3, 5):
        for kind in ("", "independent", "residual"):
            found[f"95 % interval misses: {k} folds {kind}"] = (0.05, interval, k, kind)
        for what, promised, truth, wrong in VERDICTS:
            found[f"wrong verdict: {k} folds, {what}"] = (promised, verdict, k, truth, wrong)
        for kind in ("own images", "", "residual"):
            found[f"7 equal networks not tied: {k} folds {kind}"] = (0.05, ranks, k, kind)
        found[f"a control seems exceeded: {k} folds"] = (0.05, controls, k)
    for kind in GIVEN:
        found[f"dependent given z: {kind}"] = (np.nan if kind == "many dimensions" else 0.05, given, kind)
    return found


def rate(name, draws, former=False, seed=0):
    """The promised rate, the simulated one and, if asked for, that of the former rule."""
    promised, function, *arguments = jobs()[name]
    rng = np.random.default_rng(seed)
    wrong = []
    for _ in range(draws):
        now, before = function(rng, *arguments)
        wrong.append([now, before() if former else np.nan])
    return promised, *np.mean(wrong, axis=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(f"{'':50}  promised  {draws:5} draws  former")
    for name in jobs():
        print(f"{name:50}  {{:8.1%}}  {{:11.1%}}  {{:6.1%}}".format(*rate(name, draws, former=True)), flush=True)
