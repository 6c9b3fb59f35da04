"""What shipped detectors see, and how well they find: ``python tests/benchmarks/side_by_side.py``.

Stores the tables of page 11, for machines without the photographs of blood cells. Needs these photographs and
pycocotools; two minutes on one core.
"""

import time

import pandas as pd

import kdx
from kdx.distil.run_store import shipped_table
from kdx.measure.likeness import compare_detectors, precision_table, shares_table
from kdx.pages import results

DATASET, COMMAND = "bccd", "python tests/benchmarks/side_by_side.py"

if __name__ == "__main__":
    start = time.perf_counter()
    images = kdx.load_detection(DATASET, "test")
    shipped = shipped_table().query("dataset == @DATASET")
    detectors = {role: kdx.load_network(DATASET, role) for role in shipped["role"]}
    base, teacher = detectors["base"], detectors["teacher"]
    students = {role: detector for role, detector in detectors.items() if role != "teacher"}
    values = pd.concat([precision_table(detectors, images), compare_detectors(students, teacher, images)])
    others = {role: detector for role, detector in students.items() if role != "base"}
    shares = shares_table(others, base, teacher, images)
    results.store("side_by_side", values.round({"value": 4}), COMMAND, time.perf_counter() - start, shipped)
    results.store("side_by_side_shares", shares.round(5), COMMAND, time.perf_counter() - start, shipped)
