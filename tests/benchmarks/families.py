"""Each technique between networks of different families: ``python tests/benchmarks/families.py``.

The shipped teacher of CIFAR-10, a ResNet, teaches a MobileNet by the recipe of the shipped networks, but on 10,000 of
its training images and for 10 epochs. Prints the accuracy on the test images and its difference from that of the same
network trained on labels, with a 95 % interval over images; *second base* is trained on labels with another seed.
*Below* and *above* are one-sided p: that the network is not below both, or not above both. ``--write`` stores the table
for the book. Networks that are trained are kept, so that a run that was stopped goes on.
"""

import argparse
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
    chosen = parser.parse_args()
    images, test = (kdx.load_dataset("cifar10", split) for split in ("train", "test"))
    rows, _ = next(iter(kdx.folds(images.labels, STUDY.folds, 0)))  # those the teacher was trained on
    few = images[rows].limit(IMAGES)
    networks = shipped_table().query("dataset == 'cifar10' and fold == 1 and role == 'teacher'")
    teacher = find_run(networks["sha256"].item()[:32])

    runs, right, table = {}, {}, []
    for name in ("label", "second base", *TAUGHT, *OPTIONS):
        technique, seed = ("label", 1) if name == "second base" else (name, 0)
        runs[name] = train(technique, few, test.limit(1000), teacher, seed)
        right[name] = (kdx.answers(runs[name], test).predictions == test.labels).double()
        beside = [two_factor(100 * (right[name] - right[rival])[None].numpy()) for rival in list(right)[:2]]
        low, high = beside[0].interval()
        row = {"technique": name, "accuracy": right[name].mean().item()}
        row |= {"gained": beside[0].mean, "low": low, "high": high}
        row |= {"below": max(e.p_below() for e in beside), "above": max(e.p_above() for e in beside)}
        table.append(row | {"student": STUDENT, "teacher": TEACHER, "images": IMAGES, "epochs": EPOCHS})
    found = pd.DataFrame(table)
    print(found.to_string(float_format="{:.3f}".format))
    if chosen.write:
        seconds = sum(run.manifest["seconds"] for run in runs.values())
        results.store("families", found.round(4), "python tests/benchmarks/families.py --write", seconds, networks)


if __name__ == "__main__":
    main()
