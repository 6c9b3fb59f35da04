"""The contest of explainers that page 5 shows: ``python tests/benchmarks/contest.py``.

Trains the networks of all cases that are not in the run store, checks that training planted the cues, scores every
explainer on every sound planting, and stores the scores. About two hours on 2 cores; ``--device cuda --workers 12``
uses a GPU. With ``--fused``: those that have maps of stages, all fused. With ``--teachers``: the maps of
``kdx.transferred``, which see the teacher, on seeds and cues that had no part in choosing them (about an hour).
"""

import argparse
import sys
import time
import warnings
from dataclasses import dataclass, field

import joblib
import pandas as pd
import torch

import kdx
from kdx.data.cues import Scene
from kdx.explain.explainers import explainers, fused_explainers
from kdx.explain.regression import FitWarning
from kdx.pages import results
from kdx.planted import contest
from kdx.planted.plantings import HARDER, PLANTINGS, checks, plant

BOTH = {"both": PLANTINGS["both"]}
SCORES = ["ratio", "AUPRC", "AUROC", "pointing game", contest.DETECTED, "magnitude", "magnitude, second base"]


@dataclass(frozen=True)
class Case:
    scene: Scene = field(default_factory=Scene)
    plantings: dict = field(default_factory=lambda: PLANTINGS)
    first: int = 100
    seeds: int = 6
    epochs: int = 8
    base_model: str | None = None


CASES = {
    "standard": Case(first=102),
    "other cues": Case(Scene(("colours", "letters", "checks")), first=198, seeds=9, epochs=10),
    "other architecture": Case(plantings=BOTH, first=300, base_model="resnet18@0.125"),
    "partly known": Case(plantings={"partly known": HARDER["partly known"]}, first=306),
    "same answer": Case(plantings={"same answer": HARDER["same answer"]}, first=312),
    "unequal": Case(Scene(cue_size=(7, 10, 14)), BOTH, first=318),
    "overlapping": Case(Scene(overlap=0.6), BOTH, first=324),
    "correlated": Case(Scene(correlation=0.5), BOTH, first=330),
}


FUSED = [("other cues", 198 + i) for i in range(3)]
FUSED += [(name, case.first) for name, case in CASES.items() if name not in ("standard", "other cues")]
TEACHERS = [("standard", 600 + i) for i in range(3)] + [("other cues", 600 + i) for i in range(6)]


def grow(case, seed, device, workers=1, seeds=1):
    return plant(
        case.scene, seeds, plantings=case.plantings, seed=seed, tested=100, reference=192, base_model=case.base_model,
        recipe=kdx.Recipe(epochs=case.epochs, batch_size=64), device=device, workers=workers,
    )  # fmt: skip


def train(name, seed, device):
    torch.set_num_threads(1)
    return checks(grow(CASES[name], seed, device)).assign(case=name)


def score(name, seed, device, entries=None):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FitWarning)  # of untrained networks
    grown = grow(CASES[name], seed, device)
    checked = checks(grown)
    failed = set(checked[~checked["took"]]["planting"])
    print(name, seed, *[f"not scored: {planting}" for planting in failed], flush=True)
    sound = [one for one in grown if one.planting not in failed]
    table = contest.compare(sound, entries or contest.with_teachers(sound), device)
    return table.assign(case=name)


def wide(table, keys):
    """One column for each score."""
    chosen = table[table["score"].isin(SCORES)]
    return chosen.pivot_table(index=keys, columns="score", values="value", sort=False)[SCORES].reset_index()


def short(table):
    """Four digits of every number."""
    numbers = table.select_dtypes(float)
    return table.assign(**{name: [float(f"{v:.4g}") for v in of] for name, of in numbers.items()})


def over_stages(tables):
    """One row for each explainer of a planting, from the tables of several seeds."""
    scored = pd.concat(sorted(tables, key=lambda t: (list(CASES).index(t["case"].iloc[0]), t["seed"].iloc[0])))
    cases = scored.groupby("case", sort=False)
    over = pd.concat([contest.over_stages(of.drop(columns="case")).assign(case=name) for name, of in cases])
    return scored, short(wide(over, ["case", "planting", "seed", "direction", "explainer"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="all with their stages fused, over fewer seeds")
    parser.add_argument("--teachers", action="store_true", help="maps that see the teacher, over seeds of their own")
    chosen = parser.parse_args()
    command = " ".join(["python tests/benchmarks/contest.py", *sys.argv[1:]])
    start = time.perf_counter()
    pool = joblib.Parallel(chosen.workers, return_as="generator_unordered")

    def all_of(job, places, *arguments):
        return list(pool(joblib.delayed(job)(*place, chosen.device, *arguments) for place in places))

    if chosen.teachers:
        print(pd.concat(all_of(train, TEACHERS))["took"].agg(["sum", "size"]).to_string(), flush=True)
        results.store(
            "planted_teachers", over_stages(all_of(score, TEACHERS, None))[1], command, time.perf_counter() - start
        )
        raise SystemExit
    if chosen.fused:
        tables = all_of(score, FUSED, fused_explainers)
        results.store("planted_fused", over_stages(tables)[1], command, time.perf_counter() - start)
        raise SystemExit
    places = [(name, case.first + i) for name, case in CASES.items() for i in range(case.seeds)]
    took = pd.concat(all_of(train, places))
    print(took.groupby(["case", "network", "told"])["took"].agg(["sum", "size"]).to_string(), flush=True)
    print(f"training: {time.perf_counter() - start:.0f} s", flush=True)
    scored, table = over_stages([table for table in all_of(score, places, explainers) if len(table)])
    seconds = time.perf_counter() - start
    results.store("planted_contest", table, command, seconds)
    fine = scored[(scored["case"] == "standard") & scored["score"].isin(["ratio", "AUPRC"])]
    means = fine.groupby(["planting", "direction", "explainer", "stage", "score"], sort=False)["value"].mean()
    results.store("planted_stages", short(means.reset_index()), command, seconds)
