"""DiffROAR of students on CIFAR-10 and MNIST, and of plantings: ``python tests/benchmarks/diffroar.py``.

Trains new networks on masked images, and stores the tables of the page on yardsticks. Each seed is a repetition with an
explained network and new networks of its own: on CIFAR-10 those of one fold that come with the checkout, on MNIST those
that are trained here. The self-distilled student is compared with a base of another seed (*scratch*), not with its own
teacher. Every training is kept in the run store, so the command may be stopped and started again.

Without options: scratch and self-distilled, 72 new networks. With ``--all``: also the other networks of CIFAR-10, the
controls (random attribution, edges, an untrained network), the accuracy of masks alone, and the plantings. With
``--tiny``: the smallest setting that runs, stored under another name.
"""

import argparse
import time
from dataclasses import dataclass

import pandas as pd
import torch

import kdx
from kdx.distil.fit import evaluate
from kdx.explain.input_gradients import edges
from kdx.measure.diffroar import attributions, retrained
from kdx.pages import results
from kdx.planted import plantings, suite
from kdx.planted.plantings import cue_hits, images_of

ROLES = {"scratch": "second base", "self-distilled": "self-distilled"}
OTHERS = ("teacher", "base", "response", "overhaul", "attention")
CONTROLS = ("untrained", "random attribution", "edges")
LEAKY = ("scratch", "self-distilled", "untrained", "random attribution", "edges")  # whose masks alone are classified


@dataclass(frozen=True)
class Design:
    """How large the study is."""

    seeds: int = 3
    fractions: tuple[float, ...] = kdx.measure.diffroar.FRACTIONS
    images: int = 12_000  # CIFAR-10; MNIST has five sixths of it
    tested: int = 5_000
    epochs: tuple[int, int] = (3, 2)  # CIFAR-10, MNIST
    planted: int = 4_000
    planted_epochs: int = 8
    planted_fractions: tuple[float, ...] = (0.1, 0.3)


TINY = Design(2, (0.5,), 600, 200, (1, 1), 300, 1, (0.1,))


def gradient(network):
    return lambda x, y: kdx.saliency(network, x, y)


def grey_gradient(network):
    """For images whose channels are equal: a pixel is removed from all of them."""
    return lambda x, y: kdx.saliency(network, x, y).sum(1)


def controls(untrained, seed, gradient=gradient):
    generator = torch.Generator().manual_seed(seed)

    def noise(x, y):
        return torch.rand(len(x), *gradient(untrained)(x[:1], y[:1]).shape[1:], generator=generator)

    return {
        "untrained": gradient(untrained),
        "random attribution": noise,
        "edges": lambda x, y: edges(x),
    }


def cifar10(design, everything):
    """Seed, name of a network or control, and attribution, with the images of all."""
    train, test = (kdx.load_dataset("cifar10", split) for split in ("train", "test"))
    train, test = train.limit(design.images), test.limit(design.tested)
    for seed in range(design.seeds):
        roles = ROLES | ({name: name for name in OTHERS} if everything else {})
        found = {name: gradient(kdx.load_network("cifar10", role, seed + 1)) for name, role in roles.items()}
        if everything:
            base = kdx.load_network("cifar10", "base", seed + 1)
            found |= controls(kdx.build(**base.architecture, seed=seed).eval(), seed)
        yield train, test, seed, found


def mnist(design, everything):
    train, test = (kdx.load_dataset("mnist", split) for split in ("train", "test"))
    train, test = train.limit(design.images * 5 // 6), test.limit(design.tested)
    common = dict(recipe=recipe(design.epochs[1]), stem="small", device="cpu")
    for seed in range(design.seeds):
        taught = kdx.fit("resnet10@0.125", train, test, seed=2 * seed, **common)
        scratch = kdx.fit("resnet10@0.125", train, test, seed=2 * seed + 1, **common)
        student = kdx.fit(
            "resnet10@0.125", train, test, seed=2 * seed, technique="response", teacher=taught, alpha=0.1,
            temperature=4.0, **common,
        )  # fmt: skip
        found = {"scratch": grey_gradient(scratch.model), "self-distilled": grey_gradient(student.model)}
        yield train, test, seed, found | (controls(scratch.untrained, seed, grey_gradient) if everything else {})


def recipe(epochs):
    return kdx.Recipe(epochs=epochs, batch_size=64, lr=0.15)


def measured(sets, epochs, design, everything, workers):
    for train, test, seed, found in sets:
        for name, explain in found.items():
            table = kdx.diffroar(
                train, test, explain, fractions=design.fractions, mask_alone=everything and name in LEAKY,
                model="resnet10@0.125", recipe=recipe(epochs), stem="small", seed=seed, workers=workers, device="cpu",
            )  # fmt: skip
            yield table.assign(data=train.card.name, network=name, seed=seed)
            print(train.card.name, seed, name, table["value"].round(1).tolist(), flush=True)


def planted(design, workers):
    """New networks are trained on the true classes; how well they know each cue is read from their answers."""
    scene = plantings.Scene()
    train, test = (images_of(scene, n, plantings.FRESH + i) for i, n in enumerate((design.planted, 1000)))
    page = ("distilled", "residual", "ignorant")
    names = [role for role, fold in suite.Study().places if fold == 1 and role.startswith(page)]
    entries = {name: gradient(kdx.load_network("planted", name)) for name in names}
    entries |= controls(kdx.build("resnet10@0.125", len(scene.classes), "small", seed=2 * plantings.SHIPPED).eval(), 0)
    rows = []
    for name, explain in entries.items():
        maps = attributions(train, explain), attributions(test, explain)
        for fraction, end, run, seen in retrained(
            train, test, maps, fractions=design.planted_fractions, workers=workers, device="cpu",
            recipe=kdx.Recipe(epochs=design.planted_epochs, batch_size=64),
        ):  # fmt: skip
            hits = cue_hits(evaluate(run.model, seen, "cpu").logits, seen.labels, scene).double().mean(0)
            rows += [(name, fraction, end, cue, hit) for cue, hit in zip(scene.cues, hits.tolist(), strict=True)]
        print("planted", name, flush=True)
    table = pd.DataFrame(rows, columns=["network", "fraction", "end", "cue", "accuracy"])
    table = table.pivot(index=["network", "fraction", "cue"], columns="end", values="accuracy").reset_index()
    return table.assign(value=100 * (table["lowest"] - table["highest"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    design, workers = TINY if given.tiny else Design(), given.workers
    command = "python tests/benchmarks/diffroar.py" + " --all" * given.all + " --tiny" * given.tiny
    suffix, start = "_tiny" if given.tiny else "", time.perf_counter()
    sets = {"cifar10": cifar10(design, given.all), "mnist": mnist(design, given.all)}
    tables = []
    for epochs, of in zip(design.epochs, sets.values(), strict=True):
        tables += measured(of, epochs, design, given.all, workers)
    table = pd.concat(tables, ignore_index=True).round(4)
    results.store(f"diffroar{suffix}", table, command, time.perf_counter() - start)
    print(table.groupby(["data", "network"])["value"].agg(["mean", "std"]).round(2))
    if given.all:
        start = time.perf_counter()
        table = planted(design, workers).round(4)
        results.store(f"diffroar_planted{suffix}", table, command, time.perf_counter() - start)
        print(table.pivot_table(index="network", columns="cue", values="value").round(1))
