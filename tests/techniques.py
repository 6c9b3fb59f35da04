"""What tests of techniques share."""

import torch

from kdx import Recipe, fit
from kdx.distil.technique import Seen
from kdx.distil.techniques import TECHNIQUES

QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)


def seen(logits=None, labels=None, **features):
    logits = torch.zeros(2, 3) if logits is None else logits
    rows = torch.arange(len(logits))  # of a training set of this batch alone
    return Seen(logits, features, rows, rows % logits.shape[1] if labels is None else labels)


def guidance(name, student, teacher, adapter=None, **settings):
    return TECHNIQUES[name](**settings).guidance(student, teacher, adapter)


def train(data, model="resnet10", width=0.125, **settings):
    settings = {"recipe": QUICK, "device": "cpu", "stem": "small"} | settings
    return fit(model, data["train"], data["test"], width=width, **settings)
