"""Each technique between networks of different families: ``python tests/benchmarks/families.py``.

The shipped teacher of CIFAR-10, a ResNet, teaches a MobileNet by the recipe of the shipped networks, but on 10,000 of
its training images and for 10 epochs. Prints the accuracy on the test images and its difference from that of the same
network trained on labels, with a 95 % interval over images; *second base* is trained on labels from another seed.
``--write`` stores the table for the book. Networks that are trained are kept, so that a run that was stopped goes on.
"""

import argparse
import time
from dataclasses import replace

import pandas as pd

import kdx
from kdx.distil.run_store import find_run, shipped_table
from kdx.distil.shipped import STUDIES, TAUGHT
from kdx.distil.techniques import settings_of
from kdx.inference import two_factor
from kdx.pages import results

TEACHER, STUDENT, IMAGES, EPOCHS = "resnet18@0.25", "mobilenet_v1@0.125", 10_000, 10
STUDY = next(study for study in STUDIES if study.dataset == "cifar10")
OPTIONS = {"standardised response": ("response", {"standardise": True})}


def train(name, images, watched, teacher, seed=0):
    technique, options = OPTIONS.get(name, (name, {}))
    known = {k: v for k, v in STUDY.settings.items() if k in settings_of(technique)}
    return kdx.fit(
        STUDENT,
        images,
        watched,
        technique=technique,
        teacher=None if technique == "label" else teacher,
        recipe=replace(STUDY.recipe, epochs=EPOCHS),
        seed=seed,
        **known,
        **options,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    chosen, start = parser.parse_args(), time.perf_counter()
    images, test = (kdx.load_dataset("cifar10", split) for split in ("train", "test"))
    rows, _ = next(iter(kdx.folds(images.labels, STUDY.folds, 0)))  # those the teacher was trained on
    few = images[rows].limit(IMAGES)
    networks = shipped_table().query("dataset == 'cifar10' and fold == 1 and role == 'teacher'")
    teacher = find_run(networks["sha256"].item()[:32])

    right, table = {}, []
    for name in ("label", "second base", *TAUGHT, *OPTIONS):
        technique, seed = ("label", 1) if name == "second base" else (name, 0)
        run = train(technique, few, test.limit(1000), teacher, seed)
        right[name] = (kdx.answers(run, test).predictions == test.labels).double()
        gained = two_factor(100 * (right[name] - right["label"])[None].numpy())
        low, high = gained.interval()
        row = {"technique": name, "accuracy": right[name].mean().item()}
        table.append(row | {"gained": gained.mean, "low": low, "high": high})
        print(table[-1], flush=True)
    found = pd.DataFrame(table)
    print(found.to_string(float_format="{:.3f}".format))
    if chosen.write:
        command = "python tests/benchmarks/families.py --write"
        results.store("families", found.round(4), command, time.perf_counter() - start, networks=networks)


if __name__ == "__main__":
    main()
