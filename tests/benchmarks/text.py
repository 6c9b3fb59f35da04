"""The text networks of page 10, trained, shipped and measured: ``python tests/benchmarks/text.py``.

Trains what is missing (``kdx.distil.text_set``), ships what is small enough, and stores what words say of every
network, of baselines that ask none, and of untrained networks (``data/results/text.csv``). Trainings are kept in the
run store, so the command may be stopped and started again. ``--stored`` measures only what is trained already.
"""

import argparse
import json
import os
import resource
import time

import numpy as np
import pandas as pd

from kdx.data.sst import join, load_sentences
from kdx.distil import shipped_texts, text_set
from kdx.measure import words
from kdx.pages import results

SENTENCES = 600  # of the development and test splits
BLOCKS = 40


def is_small(job):
    return not job.architecture.checkpoint


def measure_baselines(sentences, train):
    table = [
        words.word_agreement(values, sentences, blocks=BLOCKS).assign(network=name, seed=0, gap=np.nan)
        for name, values in words.baselines(sentences, train).items()
    ]
    return pd.concat(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stored", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    os.nice(15)
    start = time.perf_counter()
    train, dev, test = (load_sentences("sst", split) for split in ("train", "dev", "test"))
    chosen = join(dev, test).limit(SENTENCES)
    tables = [measure_baselines(chosen, train)]
    for (role, seed), job in text_set.jobs(train, dev, device="cpu").items():
        if (run := job.find() if arguments.stored else job.fit()) is None:
            continue
        named = {(role, seed): run.network}
        if role == text_set.SCRATCH:
            named["untrained", seed] = job.untrained
        begun = time.process_time()
        small = is_small(job)  # words of large ones would take many minutes
        tables.append(words.score_networks(named, chosen, explained=small, blocks=BLOCKS, device="cpu"))
        rows = tables[-1].set_index(["network", "score"])["value"]
        if small:
            whole = words.answers_of(run.network, test)
            shipped_texts.ship(run, role, whole["accuracy"].mean(), whole["accuracy of polarity"].mean())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{role} {seed}: accuracy {rows[role, 'accuracy']:.3f}, AUROC {rows.get((role, 'AUROC'), np.nan):.3f}, gap "
            f"{tables[-1]['gap'].max():.4f}; {time.process_time() - begun:.0f} s of a processor, {memory:.1f} GB",
            flush=True,
        )
    table = pd.concat(tables, ignore_index=True)
    parts = [json.dumps([round(float(x), 5) for x in of]) if np.isfinite(of).all() else "" for of in table["parts"]]
    numbers = {name: table[name].round(5) for name in ("value", "low", "high", "gap")}
    columns = ["network", "seed", "score", "value", "low", "high", "sentences", "words", "gap", "parts"]
    table = table.assign(parts=parts, **numbers)[columns]
    results.store("text", table, "python tests/benchmarks/text.py", time.perf_counter() - start)
