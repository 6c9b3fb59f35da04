"""How accurate a network becomes in about ten minutes of two CPU cores: ``python tests/benchmarks/training.py``.

Trains ``resnet10@0.25`` on all training images of CIFAR-10 by each recipe, one after the other, and prints seconds,
images per second and core, and accuracy on all test images. Nothing is stored. ``--epochs 2`` compares speeds alone.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace

import torch

import kdx

RECIPES = {
    "batches of 64": kdx.Recipe(epochs=14, batch_size=64, lr=0.1),
    "batches of 128": kdx.Recipe(epochs=15),
    "progressive sizes": kdx.Recipe(epochs=28, sizes=kdx.Recipe.PROGRESSIVE),
}


def measure(name, epochs):
    train, test = (kdx.load_dataset("cifar10", split) for split in ("train", "test"))
    recipe = replace(RECIPES[name], epochs=epochs or RECIPES[name].epochs)
    with tempfile.TemporaryDirectory() as home:
        os.environ["KDX_HOME"] = home
        start = time.perf_counter()
        # evaluated on few images while it is trained
        run = kdx.fit("resnet10@0.25", train, test.limit(200), recipe=recipe, seed=7, device="cpu")
        seconds = time.perf_counter() - start
        accuracy = kdx.evaluate(run.model, test).accuracy
    speed = recipe.epochs * len(train) / seconds / torch.get_num_threads()
    print(f"{name:20} {recipe.epochs:3} epochs {seconds:6.0f} s {speed:6.0f} images/s/core {accuracy:.2%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=0)
    chosen = parser.parse_args()
    for name in chosen.names:
        measure(name, chosen.epochs)
