"""What a step of each technique costs: ``python tests/benchmarks/techniques.py``.

Trains ``resnet10@0.125`` for a few steps of the shipped recipe with each technique, by the shipped teacher of CIFAR-10.
Prints seconds a step, the same relative to training on labels, those of a step of fitting to the teacher, and how much
memory the process needed at most. Every technique has a process of its own; the first two steps are not counted.
Nothing is stored. ``--steps 5`` is quicker and less exact.
"""

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import time
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import torch

import kdx
from kdx.distil.shipped import STUDIES
from kdx.distil.techniques import TECHNIQUES, find_techniques, settings_of
from kdx.distil.training import train_epochs

SETTINGS = {"attention_weight": 100.0, "contrastive_negatives": 1024, "self_supervised_epochs": 1, "factor_epochs": 1}


class EnoughError(Exception):
    """The steps that were asked for are done."""


def measure(name, steps, threads):
    torch.set_num_threads(threads)
    recipe = next(study.recipe for study in STUDIES if study.dataset == "cifar10")
    whole = kdx.load_dataset("cifar10", "train")  # of contrastive, the cost depends on how many there are
    parts = find_techniques(name, {k: v for k, v in SETTINGS.items() if k in settings_of(name)})
    teacher = kdx.load_network("cifar10", "teacher") if parts[0].needs_teacher else None
    student = kdx.build("resnet10@0.125", 10, "small", seed=0).to(memory_format=torch.channels_last)
    recipe, times = replace(recipe, epochs=1, augmentation=whole.card.augmentation), []
    fitting = sum(part.fitting_epochs for part in parts) * (len(whole) // recipe.batch_size)
    if fitting:  # fewer images, so that both stages are reached
        whole, fitting = whole.limit((steps + 2) * recipe.batch_size), steps + 2

    def stepped():
        times.append(time.perf_counter())
        if len(times) == fitting + steps + 2:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        list(train_epochs(student, teacher, whole, parts, recipe, 0, torch.device("cpu"), stepped))
    spent = [b - a for a, b in pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    of_fitting = statistics.median(spent[1 : fitting - 1]) if fitting else float("nan")
    return {"seconds": statistics.median(spent[fitting + 1 :]), "fitting": of_fitting, "MiB": peak}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(TECHNIQUES))
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    rows = {}
    context = multiprocessing.get_context("spawn")
    for name in dict.fromkeys(["label", *chosen.names]):
        with context.Pool(1) as pool:
            rows[name] = pool.apply(measure, (name, chosen.steps, torch.get_num_threads()))
    table = pd.DataFrame(rows).T
    table.insert(1, "relative", table["seconds"] / table.loc["label", "seconds"])
    print(table.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
