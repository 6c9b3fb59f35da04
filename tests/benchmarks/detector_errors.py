"""Standard errors of numbers of detectors, beside the truth: ``python tests/benchmarks/detector_errors.py``.

The truth is the standard deviation over 20 sets of 200 generated images that have none in common, at the thresholds of
all 4,000. Beside it, the root mean square of what the bootstrap says on each of them alone (100 samples, as
``kdx.measure.detectors``), and the block jackknife (10 blocks). Networks are the shipped ones of CIFAR-10; *-* is a
difference, on the same images. The last lines are geometric means of the ratios to the truth, of the rows without a 0.
"""

import numpy as np
import pandas as pd
import torch

import kdx
from kdx.inference import bootstrap_parts, jackknife
from kdx.measure.dissection import detections

IMAGES, SETS, SAMPLES, BLOCKS = 4000, 20, 100, 10
NETWORKS = ("teacher", "base", "second base")


def numbers(found, at, iou, weights):
    """Detectors and distinct concepts, (b, 2)."""
    counts = detections(found.best(at, weights), iou, len(found.concepts))
    return np.stack([counts.sum(1), (counts > 0).sum(1)], 1)


def of_set(images, rng):
    """Weights of all images of a set, of its bootstrap samples, and of it without each block."""
    m = len(images)
    drawn = rng.multinomial(m, np.full(m, 1 / m), SAMPLES)
    without = np.ones((BLOCKS, m))
    for row, out in zip(without, np.array_split(rng.permutation(m), BLOCKS), strict=True):
        row[out] = 0
    weights = np.zeros((1 + SAMPLES + BLOCKS, IMAGES))
    weights[:, images] = np.concatenate([np.ones((1, m)), drawn, without])
    return weights


def errors(x):
    """True and estimated standard errors, of numbers in (sets, 1 + SAMPLES + BLOCKS, 2)."""
    parts = [(bootstrap_parts(of[0], of[1 : 1 + SAMPLES]), jackknife(of[0], of[1 + SAMPLES :])) for of in x]
    estimated = (np.sqrt(np.mean([p.var(0, ddof=1) / len(p) for p in of], 0)) for of in zip(*parts, strict=True))
    return np.stack([x[:, 0].std(0, ddof=1), *estimated], 1)


def main():
    torch.set_num_threads(1)
    probe = kdx.load_probe("shapes", split="train", limit=IMAGES, size=32).in_memory()
    settings = {"normalize": kdx.DATASETS["cifar10"].normalize, "permutations": 0}
    found = {name: kdx.dissect(kdx.load_network("cifar10", name), probe, **settings) for name in NETWORKS}
    rng = np.random.default_rng(0)
    weights = [of_set(images, rng) for images in np.array_split(rng.permutation(IMAGES), SETS)]
    rows = []
    for at in found["base"].chance:
        for iou in (0.03, 0.05, 0.1):
            x = {name: np.stack([numbers(of, at, iou, w) for w in weights]) for name, of in found.items()}
            x |= {f"{name} - base": x[name] - x["base"] for name in NETWORKS if name != "base"}
            for name, of in x.items():
                means, errs = of[:, 0].mean(0), errors(of.astype(float))
                for count, mean, each in zip(("total", "unique"), means, errs, strict=True):
                    rows.append([at[0], iou, name, count, mean, *each])
    columns = ["stage", "iou", "network", "count", "mean", "truth", "bootstrap", "jackknife"]
    table = pd.DataFrame(rows, columns=columns)
    print(table.to_string(index=False, float_format="{:.2f}".format))
    few = (table[["truth", "bootstrap", "jackknife"]] == 0).sum()
    print("rows in which it is 0:", few.to_dict())
    known = table[(table[["truth", "bootstrap", "jackknife"]] > 0).all(axis=1)]
    ratios = known[["bootstrap", "jackknife"]].div(known["truth"], axis=0)
    print(np.exp(np.log(ratios).groupby(known["count"]).mean()).round(2))


if __name__ == "__main__":
    main()
