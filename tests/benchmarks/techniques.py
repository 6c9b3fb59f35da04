"""What a step of each technique costs: ``python tests/benchmarks/techniques.py``; ``--write`` stores it for the book.

Trains ``resnet10@0.125`` for a few steps of the shipped recipe with each technique, by the shipped teacher of CIFAR-10.
Prints seconds a step; the same relative to training on labels, which is measured before and after in the same process,
since machines change their speed; seconds of a step of fitting to the teacher; and how much more memory the process
holds at most than while it trains on labels (on Linux). *Self-distilled* has a teacher of its own size. The first two
steps are not counted. ``--steps 5`` is quicker and less exact.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch

import kdx
from kdx.distil.studies import STUDIES, TAUGHT
from kdx.distil.techniques import find_techniques, settings_of
from kdx.distil.training import train_epochs
from kdx.pages import results

STANDARDISED, SELF = "standardised response", "self-distilled"
QUICKER = {"self_supervised_epochs": 1, "factor_epochs": 1}  # a step of fitting costs the same in every epoch
STUDY = next(study for study in STUDIES if study.dataset == "cifar10")


class EnoughError(Exception):
    """The steps that were asked for are done."""


def train(name, images, steps):
    """Seconds of each step of fitting to the teacher, and of each of training."""
    settings = {**STUDY.settings, **QUICKER, "standardise": name == STANDARDISED}
    role = "resnet10@0.125" if name == SELF else "teacher"
    name = "response" if name in (STANDARDISED, SELF) else name
    parts = find_techniques(name, {k: v for k, v in settings.items() if k in settings_of(name)})
    teacher = kdx.load_network("cifar10", role) if parts[0].needs_teacher else None
    student = kdx.build("resnet10@0.125", 10, "small", seed=0).to(memory_format=torch.channels_last)
    recipe, times = replace(STUDY.recipe, epochs=1, augmentation=images.card.augmentation), []
    fitting = sum(part.fitting_epochs for part in parts) * (len(images) // recipe.batch_size)
    if fitting:  # fewer images, so that both stages are reached
        images, fitting = images.limit((steps + 2) * recipe.batch_size), steps + 2

    def stepped():
        times.append(time.perf_counter())
        if len(times) == fitting + steps + 2:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        list(train_epochs(student, teacher, images, parts, recipe, 0, torch.device("cpu"), stepped))
    spent = [b - a for a, b in pairwise(times)]
    return spent[1 : fitting - 1] if fitting else [], spent[fitting + 1 :]


def peak(run):
    """What ``run`` returns, and the most MiB that this process held meanwhile; NaN where Linux does not tell."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")
    found = run()
    lines = Path("/proc/self/status").read_text().splitlines() if forget.exists() else ["VmHWM: nan"]
    return found, float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measure(name, steps, threads):
    torch.set_num_threads(threads)
    images = kdx.load_dataset("cifar10", "train")  # of contrastive, the cost depends on how many there are
    train("label", images, 2)  # warms up
    (_, before), of_labels = peak(lambda: train("label", images, steps))
    (fitting, spent), of_technique = peak(lambda: train(name, images, steps))
    _, after = train("label", images, steps)
    seconds = statistics.median(spent)
    return {
        "seconds": seconds,
        "relative": seconds / statistics.median(before + after),
        "fitting": statistics.median(fitting) if fitting else float("nan"),
        "MiB": of_technique - of_labels,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    rows, start = {}, time.perf_counter()
    context = multiprocessing.get_context("spawn")
    for name in ("label", *TAUGHT, STANDARDISED, SELF):
        with context.Pool(1) as pool:
            rows[name] = pool.apply(measure, (name, chosen.steps, torch.get_num_threads()))
    table = pd.DataFrame(rows).T.rename_axis("technique")
    print(table.to_string(float_format="{:.3f}".format))
    if chosen.write:
        command = f"python tests/benchmarks/techniques.py --steps {chosen.steps} --write"
        results.store("techniques", table.reset_index().round(4), command, time.perf_counter() - start)


if __name__ == "__main__":
    main()
