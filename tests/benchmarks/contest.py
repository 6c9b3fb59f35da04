"""The contest of explainers that page 5 shows: ``python tests/benchmarks/contest.py``.

Trains the networks of all cases that are not in the run store, checks that training planted the cues, scores every
explainer on every sound planting, and stores the scores. About three hours on 2 cores; ``--device cuda --workers 8``
uses a GPU.
"""

import argparse
import time
from dataclasses import dataclass, field

import joblib
import pandas as pd
import torch

import kdx
from kdx.data.cues import Scene
from kdx.planted import contest
from kdx.planted.plantings import HARDER, PLANTINGS, checks, plant

BOTH = {"both": PLANTINGS["both"]}
COMMAND = "python tests/benchmarks/contest.py"


@dataclass(frozen=True)
class Case:
    scene: Scene = field(default_factory=Scene)
    plantings: dict = field(default_factory=lambda: PLANTINGS)
    first: int = 100
    seeds: int = 6
    epochs: int = 8
    base_model: str | None = None


CASES = {
    "standard": Case(first=99, seeds=9),
    "other cues": Case(Scene(("colours", "letters", "checks")), first=198, seeds=9, epochs=10),
    "other architecture": Case(plantings=BOTH, first=300, base_model="resnet18@0.125"),
    "partly known": Case(plantings={"partly known": HARDER["partly known"]}, first=306),
    "same answer": Case(plantings={"same answer": HARDER["same answer"]}, first=312),
    "unequal": Case(Scene(cue_size=(7, 10, 14)), BOTH, first=318),
    "overlapping": Case(Scene(overlap=0.6), BOTH, first=324),
    "correlated": Case(Scene(correlation=0.5), BOTH, first=330),
}


def grow(case, seed, device, workers=1, seeds=1):
    return plant(
        case.scene, seeds, plantings=case.plantings, seed=seed, tested=100, reference=192, base_model=case.base_model,
        recipe=kdx.Recipe(epochs=case.epochs, batch_size=64), device=device, workers=workers,
    )  # fmt: skip


def train(name, seed, device):
    torch.set_num_threads(1)
    return checks(grow(CASES[name], seed, device)).assign(case=name)


def score(name, seed, device):
    torch.set_num_threads(1)
    grown = grow(CASES[name], seed, device)
    failed = checks(grown)
    failed = set(failed[~failed["took"]]["planting"])
    sound = [one for one in grown if one.planting not in failed]
    return contest.compare(sound, device=device).assign(case=name) if sound else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="train and check alone")
    chosen = parser.parse_args()
    start = time.perf_counter()
    places = [(name, case.first + i) for name, case in CASES.items() for i in range(case.seeds)]
    pool = joblib.Parallel(chosen.workers, return_as="generator_unordered")
    if chosen.train:
        tables = pool(joblib.delayed(train)(*place, chosen.device) for place in places)
        took = pd.concat(tables).groupby(["case", "network", "told"])["took"].agg(["sum", "size"])
        print(took.to_string(), f"{time.perf_counter() - start:.0f} s")
        raise SystemExit
