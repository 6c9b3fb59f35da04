"""All explainers on photographs, without planted truth: ``python tests/benchmarks/deletion.py``.

The pixels that a map ranks highest are deleted, and what is left of the unexplained answer is measured
(:func:`kdx.deletion`), for shipped students of CIFAR-10 and of cats and dogs. Stores the table of page 5. About ten
minutes on one core.
"""

import time
import warnings

import pandas as pd
import torch

import kdx
from kdx.distil.stored_pairs import stored_pairs
from kdx.explain.explainers import explainers, fused_explainers
from kdx.explain.regression import FitWarning
from kdx.pages import results

PAIRS = {"cifar10": range(1, 3), "petimages": range(1, 2)}  # folds
TECHNIQUES = ("response", "overhaul", "attention")
IMAGES = 500  # four fifths of them for the reference


def entries(images, labels, embeddings):
    """Explainers with one map an image: those of stages fused, others as they are."""
    whole, fused = (make(images, labels, embeddings) for make in (explainers, fused_explainers))
    alone = ["occlusion of the logit difference", "occlusion of the KL divergence", "input x gradients"]
    alone += ["integrated gradients of the logit difference", "edges"]
    return {"unexplained, fused": whole["unexplained, fused"]} | fused | {name: whole[name] for name in alone}


def areas(dataset, technique, fold):
    pair = next(p for p in stored_pairs(dataset, technique) if len(p.keys) == 3)
    student, base = kdx.load_pair(dataset, technique, fold)
    images = pair.images(IMAGES, seed=fold)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(fold))
    x, labels = images.card.normalize(images.images[order]), images.labels[order]
    x, shown = x.tensor_split([4 * len(x) // 5])
    y, shown_labels = labels.tensor_split([len(x)])
    table = kdx.label_embeddings(images.classes, "one-hot")
    reference = kdx.Reference(student, base, x)
    found = {name: explain(student, base, shown, shown_labels) for name, explain in entries(x, y, table).items()}
    for direction in ("distilled", "residual"):
        maps = {name: next(iter(getattr(of, direction).values())) for name, of in found.items()}
        _, area = kdx.deletion(reference, shown, maps, direction=direction)
        yield area.assign(dataset=dataset, technique=technique, fold=fold, direction=direction)


if __name__ == "__main__":
    start = time.perf_counter()
    warnings.simplefilter("ignore", FitWarning)
    rows = []
    for dataset, folds in PAIRS.items():
        for fold in folds:
            for technique in TECHNIQUES:
                rows += areas(dataset, technique, fold)
                print(dataset, technique, fold, f"{time.perf_counter() - start:.0f} s", flush=True)
    table = pd.concat(rows, ignore_index=True).rename(columns={"map": "explainer"})
    columns = ["dataset", "technique", "fold", "direction", "explainer", "value", "low", "high", "n"]
    results.store("deletion", table[columns].round(4), "python tests/benchmarks/deletion.py",
                  time.perf_counter() - start)  # fmt: skip
    print(table.groupby(["direction", "explainer"])["value"].agg(["mean", "std"]).sort_values("mean").round(3))
