"""The leaderboard that comes with the checkout: ``python tests/benchmarks/leaderboard.py``.

Scores every explainer of ``kdx.planted.entries`` as ``kdx benchmark NAME`` does, and writes ``data/leaderboard``. The
repetitions are prepared once for all, and the scores of each are kept, so the command may be stopped and started again.
``--only NAME`` (may be repeated) scores some. About an hour on 2 cores, most of it for RISE.
"""

import argparse
import functools
import time
import warnings

import pandas as pd
import torch

from kdx.explain.regression import FitWarning
from kdx.pages import results
from kdx.paths import data_home
from kdx.planted import benchmark, entries, leaderboard, suite
from kdx.planted.behaviour import answers_to_cues
from kdx.planted.plantings import FRESH

COMMAND = "python tests/benchmarks/leaderboard.py"
SLOW = ("captum", "patching", "RISE")


def kept(name, case, fold):
    digest = leaderboard.networks_digest(case, fold)
    return data_home() / "prepared" / "leaderboard" / f"{leaderboard.slug(name)} {case} {fold} {digest}.csv"


def score(known, places):
    for place in places:
        whole = functools.cache(lambda place=place: benchmark.Repetition(*place, 100, 192))
        for name, explain in known.items():
            if not (path := kept(name, *place)).is_file():
                table = benchmark.measured(whole(), explain)
                path.parent.mkdir(parents=True, exist_ok=True)
                table.to_csv(path, index=False)
                print(*place, name, f"{table['seconds'].iloc[0]:.1f} s", flush=True)


def behaviours(places):
    """How much the answers of student and base change when a cue is repainted, by the part that the cue plays."""
    rows = []
    for case, fold in places:
        for one in suite.load(case, fold, tested=200):
            pair = {role: one.networks[role].model for role in ("student", "base")}
            plan, scene = one.plan, one.scene
            for network, change in answers_to_cues(pair, scene, 200, FRESH + one.seed).items():
                for cue in range(len(scene.cues)):
                    parts = {"distilled": plan.distilled, "residual": plan.residual, "known to both": plan.base}
                    part = next((name for name, cues in parts.items() if cue in cues), "known to neither")
                    rows.append((case, one.planting, one.seed, part, network, round(float(change[:, cue].mean()), 4)))
    return pd.DataFrame(rows, columns=["case", "planting", "seed", "part of the cue", "network", "change"])


def write(known, places):
    for name, explain in known.items():
        found = [pd.read_csv(kept(name, *place)) for place in places]
        table = benchmark.summary(found, name, benchmark.wanted(explain))
        path = leaderboard.home() / f"{leaderboard.slug(name)}.json"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        leaderboard.write(leaderboard.result(table, name), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FitWarning)  # of untrained networks
    start, known = time.perf_counter(), entries.entries()
    names = chosen.only or sorted(known, key=lambda name: any(word in name for word in SLOW))
    wanted = {name: known[name] for name in names}
    places = [(case, fold) for case, of in suite.CASES.items() for fold in range(1, len(of.seeds) + 1)]
    score(wanted, places)
    write(wanted, places)
    results.store("planted_behaviour", behaviours(places), COMMAND, time.perf_counter() - start)
    print(leaderboard.overall(leaderboard.load()).to_string(), f"{time.perf_counter() - start:.0f} s", sep="\n")
