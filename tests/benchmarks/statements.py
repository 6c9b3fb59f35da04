"""Do reports on planted knowledge claim what was planted, and no more? ``python tests/benchmarks/statements.py``.

For each cue of each planting, networks are read as classifiers of the values of that cue, and compared as by
``kdx explain``. What the student should gain and lose is known. Trains networks that are not in the run store.
"""

import sys
import warnings

import pandas as pd
import torch
from torch import nn

import kdx
from kdx.data.cues import Scene
from kdx.explain.regression import FitWarning
from kdx.intervals import Interval
from kdx.pages.sentences import LEVEL, Evidence, changed_groups, sentences
from kdx.planted.plantings import FRESH, images_of, plant

SEEDS = (99, 100, 101, *range(600, 607))
IMAGES = 600


class Reader(nn.Module):
    """Answers with the probabilities of the values of one cue."""

    def __init__(self, network, scene, cue):
        super().__init__()
        self.network, self.shape = network, [scene.values] * len(scene.cues)
        self.others = [axis + 1 for axis in range(len(scene.cues)) if axis != cue]

    def forward(self, x):
        logits = self.network(x)
        return logits.view(len(x), *self.shape).logsumexp(self.others)


def evidence(one, cue):
    images = images_of(one.scene, IMAGES, 3 * FRESH + one.seed)
    labels = one.scene.values_of(images.labels)[:, cue]
    networks = {role: Reader(run.model, one.scene, cue).eval() for role, run in one.networks.items()}
    x = images.card.normalize(images.images)
    with torch.inference_mode():
        logits = {role: network(x) for role, network in networks.items()}
    answers = {role: z.argmax(1) for role, z in logits.items()}
    ledger = kdx.Ledger(labels, answers, [f"value {value}" for value in range(one.scene.values)])
    replaced, unexplained = {}, {}
    for role in ("student", "second base"):
        reference = kdx.Reference(networks[role], networks["base"], x[::2])
        replaced[role] = kdx.replacement(reference, x[1::2])
        shares = kdx.unexplained_share(reference, x).set_index(["direction", "stage"])
        row = shares.loc[("distilled", "answer")]
        unexplained[role] = Interval(row["value"], row["low"], row["high"], IMAGES)
    scores = kdx.calibration({role: logits[role].softmax(1) for role in ("student", "base", "second base")}, labels)
    tables = {"classes": ledger.by_class(), "confusions": ledger.confusions(), "calibration": scores}
    return Evidence(IMAGES, ledger, unexplained=unexplained, replaced=replaced, **tables)


def judged(found):
    """What the report claims."""
    classes, ledger = found.classes, found.ledger
    against = [ledger.against(role) for role in ("base", "second base")]
    signs = {(paired.difference > 0) - (paired.difference < 0) for paired in against if paired.p <= LEVEL}
    both = len(signs) == 1 and all(paired.p <= LEVEL for paired in against)
    student, second = found.unexplained["student"], found.unexplained["second base"]
    row = {"accuracy": {1: "gained", -1: "lost"}[signs.pop()] if both else "no claim"}
    row |= {"classes gained": len(changed_groups(found, classes, 1))}
    row["classes lost"] = len(changed_groups(found, classes, -1))

    row["beyond seed"] = "more" if student.low > second.high else "less" if student.high < second.low else "no more"
    for role, table in found.replaced.items():
        of = table[table["stage"] == "L4"].set_index(["replaced", "quantity"])["value"]
        for kind in ("unexplained", "exchanged"):
            row[f"turned, {role}, {kind}"] = of[kind, "disagreements turned"]
    return row


if __name__ == "__main__":
    warnings.simplefilter("ignore", FitWarning)
    torch.set_num_threads(1)
    rows = []
    seeds = [int(seed) for seed in sys.argv[1:]] or SEEDS
    for one in (one for seed in seeds for one in plant(Scene(), 1, seed=seed, workers=2, device="cpu")):
        for cue, name in enumerate(one.scene.cues):
            plan = one.plan
            role = "distilled" if cue in plan.distilled else "residual" if cue in plan.residual else "other"
            found = evidence(one, cue)
            rows.append({"planting": one.planting, "seed": one.seed, "cue": name, "role": role, **judged(found)})
            print(rows[-1], flush=True)
            if one.seed == seeds[0] and role != "other":
                print(*sentences(found), sep="\n")
    table = pd.DataFrame(rows)
    keys = ["planting", "role"]
    print(table.groupby([*keys, "accuracy", "beyond seed"]).size().to_string())
    print(table.groupby(keys)[["classes gained", "classes lost"]].agg(["mean", "max"]).to_string())
    print(table.groupby(keys)[[c for c in table if c.startswith("turned")]].mean().round(3).to_string())
