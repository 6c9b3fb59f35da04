"""How accurate a network becomes in about ten minutes of two CPU cores: ``python tests/benchmarks/training.py [NAME]``.

Trains ``resnet10@0.25`` on all training images of CIFAR-10 by each recipe, one after the other, and prints seconds,
images per second and core, and accuracy on all test images. Nothing is stored.
"""

import os
import sys
import tempfile
import time

import torch

import kdx

RECIPES = {
    "batches of 64": kdx.Recipe(epochs=14, batch_size=64, lr=0.1),
    "batches of 128": kdx.Recipe(epochs=15),
    "progressive sizes": kdx.Recipe(epochs=28, sizes=kdx.Recipe.PROGRESSIVE),
}


def measure(name):
    train, test = (kdx.load_dataset("cifar10", split) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as home:
        os.environ["KDX_HOME"] = home
        start = time.perf_counter()
        recipe = RECIPES[name]
        # evaluated on few images while it is trained
        run = kdx.fit("resnet10@0.25", train, test.limit(200), recipe=recipe, seed=7, device="cpu")
        seconds = time.perf_counter() - start
        accuracy = kdx.evaluate(run.model, test).accuracy
    speed = recipe.epochs * len(train) / seconds / torch.get_num_threads()
    print(f"{name:20} {recipe.epochs:3} epochs {seconds:6.0f} s {speed:6.0f} images/s/core {accuracy:.2%}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        measure(name)
