"""The short ranking of teachers that the page on the capacity gap shows: ``python tests/benchmarks/ranking.py``.

Distils for one epoch from every candidate in three of five folds; about 15 minutes on one core.
"""

import sys
import time

import kdx
from kdx.distil.studies import ASSISTANT, LADDER
from kdx.pages import results

if __name__ == "__main__":
    start = time.perf_counter()
    student, *larger = LADDER
    candidates = [*LADDER, *([name, ASSISTANT] for name in larger if name != ASSISTANT)]
    ranking = kdx.rank_teachers(
        student, candidates, kdx.load_dataset("cifar10", "train"), k=5, first=3, budget=1, batches=8, watched=2000,
        technique="response", stem="small", workers=int(sys.argv[1]) if len(sys.argv) > 1 else 0,
    )  # fmt: skip
    print(ranking.table.to_string())
    results.store("ranking_cifar10", ranking.values, "python tests/benchmarks/ranking.py", time.perf_counter() - start)
