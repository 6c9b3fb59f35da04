"""Answers of trained networks to a dataset, computed once and kept, so that all pages share them."""

from __future__ import annotations

import hashlib
import json
import os
import uuid

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdx.data.dataset import Dataset
from kdx.distil.fit import Evaluation, evaluate
from kdx.distil.run_store import Run
from kdx.paths import alone, data_home


def answers(run: Run, dataset: Dataset, device: str | torch.device = "auto") -> Evaluation:
    """What :func:`kdx.evaluate` gives for a network of the run store or a shipped one, kept in ``data/answers``.

    Args:
        run: A trained network.
        dataset: Images and labels.
        device: As for :func:`kdx.evaluate`, where the answers are not there yet.

    Returns:
        Loss, accuracy and logits.
    """
    card = dataset.card
    text = json.dumps([run.key, dataset.fingerprint, card.mean, card.std])
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = data_home() / "answers" / f"{key}.safetensors"
    with alone(key):
        try:
            return Evaluation.of(load_file(path)["logits"], dataset.labels)
        except FileNotFoundError:
            pass
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the stored answers {path} are damaged ({error}); delete that file") from error
        found = evaluate(run.model, dataset, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
        save_file({"logits": found.logits}, scratch)
        os.replace(scratch, path)
        return found
