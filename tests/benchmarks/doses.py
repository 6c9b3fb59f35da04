"""How much of a cue students took, by behaviour and as estimated: ``python tests/benchmarks/doses.py``.

Trains the networks that are not in the run store (about ten minutes on 2 cores) and stores the table of page 6. The
error of the estimate, ``kdx.explain.transferred.MISFIT``, is that of the first three seeds; the others test it.
"""

import time

import pandas as pd

import kdx
from kdx.data.cues import Scene
from kdx.pages import results
from kdx.planted.doses import plant_doses, taken
from kdx.planted.plantings import FRESH, images_of

SEEDS = range(500, 509)
CALIBRATED = 3

if __name__ == "__main__":
    start, scene, rows = time.perf_counter(), Scene(), []
    for one in plant_doses(scene, SEEDS, workers=2, device="cpu"):
        images = images_of(scene, 1000, 2 * FRESH + one.seed)
        student, base, teacher = (one.networks[role].model for role in ("student", "base", "teacher"))
        x = images.card.normalize(images.images)
        reference = kdx.Reference(student, base, x, teacher=teacher, layers_teacher={})
        strength = kdx.transferred_strength(reference)
        rows.append((one.dose, one.seed, one.seed < SEEDS[CALIBRATED], taken(one, scene), *strength[:3]))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows, columns=["dose", "seed", "calibration", "truth", "value", "low", "high"])
    results.store("planted_doses", table.round(4), "python tests/benchmarks/doses.py", time.perf_counter() - start)
    off = (table["value"] - table["truth"]).groupby(table["calibration"]).std(ddof=0)
    print(
        off, ((table["low"] <= table["truth"]) & (table["truth"] <= table["high"])).groupby(table["calibration"]).mean()
    )
