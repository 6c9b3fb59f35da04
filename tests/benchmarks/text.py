"""Text networks of page 10, trained and shipped or measured: ``python tests/benchmarks/text.py FAMILY``.

``small``: all from random weights, narrow enough to come with the checkout. ``pretrained``: teacher and students start
from an encoder that comes as a package; their numbers are stored, their weights are too many. Trainings are kept in
the run store, so the command may be stopped and started again.
"""

import argparse
import os

from kdx.data.sst import load_sentences
from kdx.distil import shipped_texts, text_set
from kdx.distil.fit_text import TextRecipe, evaluate_text
from kdx.measure.words import accuracy_of_signs
from kdx.networks.text_networks import PACKAGED, Architecture

FAMILIES = {
    "small": dict(
        teacher=Architecture(layers=6, width=64), student=Architecture(layers=3, width=40),
        recipe=TextRecipe(epochs=8, batch_size=32, lr=1e-3),
    ),
    "pretrained": dict(
        teacher=Architecture(PACKAGED, layers=6), student=Architecture(PACKAGED, layers=3),
        recipe=TextRecipe(epochs=2, batch_size=32, lr=1e-4, weight_decay=0.01),
    ),
}  # fmt: skip
