"""Training a classifier of sentences once: on labels alone, or with the answers of a teacher.

:func:`kdx.fit` trains on images: it augments, resizes and normalises them, and steps by SGD, all of which is part of
the keys of its runs. Transformers need AdamW and batches of rows of different length, so :class:`TextJob` has a loop of
its own; techniques, precision, run store and shipped networks are the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.data.sst import Sentences
from kdx.distil.fit import Evaluation
from kdx.distil.run_store import Run, code_digest, find_run, run_key, versions
from kdx.distil.shipped_texts import find_shipped
from kdx.distil.technique import Seen, Technique
from kdx.distil.techniques import find_techniques
from kdx.networks.devices import autocast, autocast_dtype, device_name, pick_device, placed
from kdx.networks.stages import evaluating
from kdx.networks.text_networks import (
    PACKAGED,
    Architecture,
    Pieces,
    TextNetwork,
    checkpoint_digest,
    load_text,
    ready,
    save_text,
)
from kdx.paths import alone, data_home, sha256_of, written_whole
from kdx.progress import progress

WIDE = 256  # width from which bfloat16 pays
SORTED = 16  # batches whose sentences are sorted by length, so that little is padded


@dataclass(frozen=True)
class TextRecipe:
    """How a text network is trained: AdamW; the learning rate rises and falls linearly.

    Attributes:
        epochs: Passes over the training sentences.
        batch_size: Sentences per step.
        lr: Peak of the learning rate, after a tenth of the steps.
        weight_decay: Of all weights.
    """

    epochs: int = 8
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 2 or not 0 < self.lr < math.inf or not self.weight_decay >= 0:
            raise ValueError(f"recipe: expected epochs >= 0, batch_size >= 2, lr > 0, weight_decay >= 0, got {self}")


def train_sentences(
    network: TextNetwork, pieces: Pieces, labels: Tensor, taught: Tensor | None, parts: Sequence[Technique],
    recipe: TextRecipe, seed: int, stepped: Callable[[], object],
) -> Iterator[tuple[float, float]]:  # fmt: skip
    """Train a network in place, epoch by epoch.

    Args:
        network: On the device where it is trained.
        pieces: Of the training sentences, on that device; likewise labels and ``taught``.
        labels: int64 (n,).
        taught: The teacher's logits for all of them (n, classes), for techniques that need a teacher.
        parts: The techniques.
        recipe: How to train.
        seed: Of the order of sentences and of dropout.
        stepped: Called after every step.

    Yields:
        Mean loss and accuracy (fraction) over the training sentences of each epoch.
    """
    lengths, size, device = (pieces.words >= 0).sum(1).cpu(), recipe.batch_size, labels.device
    steps = len(labels) // size
    fused = device.type != "mps"
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: slope(s, max(recipe.epochs * steps, 1)))
    smoothing, weight = max(p.label_smoothing for p in parts), math.prod(p.label_weight for p in parts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(recipe.epochs):
            network.train()
            order = torch.randperm(len(labels))[: steps * size].split(size * SORTED)
            batches = [rows for some in order for rows in some[lengths[some].argsort(stable=True)].split(size)]
            seen = torch.zeros(2)
            for at in torch.randperm(steps).tolist():
                rows = batches[at].to(device)
                ids = pieces.ids[rows, : int(network.lengths(pieces.ids[rows]).max())]
                with precision(network, device):
                    logits = network(ids).float()
                loss = weight * F.cross_entropy(logits, labels[rows], label_smoothing=smoothing)
                if taught is not None:
                    both = [Seen(z, {}, rows, labels) for z in (logits, taught[rows])]
                    loss = loss + torch.stack([part.guidance(both[0], both[1], None) for part in parts]).sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                seen += torch.tensor([float(loss.detach()), float((logits.argmax(1) == labels[rows]).float().mean())])
                stepped()
            loss_mean, accuracy = (seen / steps).tolist()
            yield loss_mean, accuracy


def slope(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a fraction of its peak: never 0."""
    rising = max(1, steps // 10)
    return min((step + 1) / rising, (steps - step) / (steps - rising + 1))


def precision(network: TextNetwork, device: torch.device) -> Any:
    """Autocast as for images; none for narrow networks, which bfloat16 makes slower."""
    return autocast(device) if network.config.hidden_size >= WIDE else nullcontext()


CODE = code_digest(train_sentences, Architecture)


class TextRun(Run):
    """A finished training of a text network."""

    @cached_property
    def _checkpoint(self) -> Any:
        return load_text(self.file)

    @property
    def network(self) -> TextNetwork:
        """The trained network, on the CPU and in evaluation mode."""
        return self._checkpoint[0]


@dataclass(frozen=True, eq=False)
class TextJob:
    """One training, checked but not yet done.

    Args:
        architecture: What to build.
        train: Training sentences.
        validation: Sentences on which the network is evaluated after each epoch; only watched.
        technique: A name from ``TECHNIQUES`` that looks at answers, or several joined by +.
        teacher: The training whose network teaches; it is done when it is needed. Its tokenizer and architecture may be
            others.
        recipe: How to train.
        seed: Of the initial weights, the order of sentences and dropout.
        device: As for :func:`kdx.fit`.
        settings: Parameters of the techniques.

    Raises:
        ValueError: Arguments that do not fit each other.
    """

    architecture: Architecture
    train: Sentences
    validation: Sentences
    technique: str = "label"
    teacher: TextJob | None = None
    recipe: TextRecipe = field(default_factory=TextRecipe)
    seed: int = 0
    device: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(type(part).taps is not Technique.taps for part in self.parts):
            raise ValueError(f"technique {self.technique!r} compares features of images; sentences take answers alone")
        if (wants := any(part.needs_teacher for part in self.parts)) != (self.teacher is not None):
            expected = "a teacher" if wants else "no teacher"
            raise ValueError(
                f"technique {self.technique!r} expects {expected}, got {self.teacher and self.teacher.architecture}"
            )
        if len(self.train) < self.recipe.batch_size:
            raise ValueError(f"expected a batch of {self.recipe.batch_size} sentences or more, got {len(self.train)}")

    @cached_property
    def parts(self) -> list[Technique]:
        return find_techniques(self.technique, self.settings)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What defines the training beside the code, as JSON literals."""
        settings = {k: v for part in self.parts for k, v in asdict(part).items() if v is not None and v is not False}
        checkpoint = self.architecture.checkpoint
        files = {} if checkpoint in ("", PACKAGED) else {"files": checkpoint_digest(checkpoint)}
        return {
            "model": self.architecture.spec | files,
            "technique": {"name": "+".join(part.name for part in self.parts), **settings},
            "teacher": self.teacher and self.teacher.digest,
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "train": self.train.fingerprint,
        }

    @cached_property
    def digest(self) -> str:
        """Of the specification alone, by which shipped networks are found."""
        return run_key(self.spec, "text 1")

    @cached_property
    def key(self) -> str:
        precision = str(autocast_dtype(pick_device(self.device)))
        code = CODE + code_digest(*map(type, self.parts))
        return "text-" + run_key(self.spec | {"precision": precision, "torch": torch.__version__}, code)

    def find(self) -> TextRun | None:
        """The network, if it was trained before or is shipped."""
        found = find_run(self.key) or find_shipped(self.digest)
        return None if found is None else TextRun(found.key, found.path, found.manifest, found.history)

    @property
    def untrained(self) -> TextNetwork:
        """The network as it is before training, in evaluation mode."""
        return ready(self.architecture.build(self.train.words, len(self.train.classes), self.seed)).eval()

    def fit(self) -> TextRun:
        """The network: found, or trained now and stored.

        Raises:
            FloatingPointError: The training loss is not finite.
        """
        return self.find() or self.run()

    def run(self) -> TextRun:
        """Train, and store the run; if another process is at it, wait for its run."""
        with alone(self.key):
            if find_run(self.key) is None:
                self._train_and_store()
        found = self.find()
        assert found is not None
        return found

    def _train_and_store(self) -> None:
        device, start = pick_device(self.device), time.perf_counter()
        network = self.untrained.to(device)
        pieces = Pieces(*(of.to(device) for of in network.encode(self.train.words)))
        taught = answer(self.teacher.fit().network, self.train, device).to(device) if self.teacher else None
        name = f"{self.architecture.checkpoint or 'from scratch'}, {self.technique}, seed {self.seed}"
        rows = []
        with progress(total=self.recipe.epochs * (len(self.train) // self.recipe.batch_size), desc=name) as bar:
            trained = train_sentences(
                network, pieces, self.train.labels.to(device), taught, self.parts, self.recipe, self.seed, bar.update
            )
            for epoch, (loss, accuracy) in enumerate(trained, 1):
                if not loss < math.inf:
                    raise FloatingPointError(f"the training loss of {name} is {loss} in epoch {epoch}")
                held_out = evaluate_text(network, self.validation, device)
                rows += [(epoch, "train", loss, accuracy), (epoch, "validation", held_out.loss, held_out.accuracy)]
        history = pd.DataFrame(rows, columns=["epoch", "split", "loss", "accuracy"])
        facts: dict[str, Any] = {
            "spec": self.spec,
            "digest": self.digest,
            "versions": versions(),
            "device": device_name(device),
        }
        facts["seconds"] = round(time.perf_counter() - start, 1)
        with written_whole(data_home() / "runs" / self.key) as scratch:
            write(scratch, network.cpu(), self.train.classes, facts, history)


def write(
    folder: Path, network: TextNetwork, classes: Sequence[str], facts: dict[str, Any], history: pd.DataFrame
) -> None:
    """The files of a run, see :mod:`kdx.distil.run_store`."""
    header = {"classes": classes, "run": facts, "history": history.round(4).to_dict("list")}
    save_text(folder / "model.safetensors", network, header)
    history.to_csv(folder / "history.csv", index=False)
    files = {name: sha256_of(folder / name) for name in ("model.safetensors", "history.csv")}
    (folder / "manifest.json").write_text(json.dumps(facts | {"files": files}, indent=2) + "\n")


@torch.no_grad()
def answer(network: TextNetwork, sentences: Sentences, device: str | torch.device = "auto") -> Tensor:
    """Logits of a network for sentences, float32 (n, classes) on the CPU; a few of like length at a time."""
    device = pick_device(device)
    pieces = network.encode(sentences.words)
    lengths = network.lengths(pieces.ids)
    logits = torch.empty(len(sentences), network.config.num_labels)
    with placed(network, device), evaluating(network), precision(network, device):
        for rows in lengths.argsort(stable=True).split(64):
            logits[rows] = network(pieces.ids[rows, : int(lengths[rows].max())].to(device)).float().cpu()
    return logits


def evaluate_text(network: TextNetwork, sentences: Sentences, device: str | torch.device = "auto") -> Evaluation:
    """Loss, accuracy and logits of a network for sentences."""
    return Evaluation.of(answer(network, sentences, device), sentences.labels)
