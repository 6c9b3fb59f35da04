"""Do verdicts of page 1 depend on choices of its scores? ``python tests/benchmarks/sweep.py`` stores it for page 13.

Executes page 1 with the shipped networks over a grid, in ``data/notebooks``; what is finished is not executed again.
"""

import time

import pandas as pd

from kdx.pages import build, results, sweep
from kdx.paths import CHECKOUT, data_home

GRID = ["keep=0.25,0.5,0.75", "encoder=shipped,one-hot"]

if __name__ == "__main__":
    start, out = time.perf_counter(), data_home() / "notebooks" / "sweep"
    (page,) = (page for page in build.load_pages(CHECKOUT, "shipped") if page.name == "01_gradcam")
    grid = sweep.parse_grid(page.notebook, GRID)
    for cell, done in sweep.sweep(sweep.plan_sweep(page.notebook, grid, out, page.parameters), list(grid), out):
        print(f"{cell.name}: {done}", flush=True)
    table = pd.read_csv(out / "table.csv")
    command = " ".join(["kdx sweep 01_gradcam", *(f"-p {of}" for of in GRID), "--out data/notebooks/sweep"])
    results.store("sweep", table[table["name"].str.startswith("claim_")], command, time.perf_counter() - start)
