"""The networks and images of a report: read, checked against each other, and answered once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kdx.data.batches import in_turns, rank_in_class
from kdx.data.dataset import Dataset
from kdx.data.folders import list_files
from kdx.data.own_images import (
    Labels,
    Pictures,
    as_dataset,
    common_size,
    label,
    read_labels,
    read_pictures,
    read_slices,
)
from kdx.intervals import share_interval
from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER, Ledger, paired
from kdx.networks import own_networks as own
from kdx.networks.devices import pick_device
from kdx.networks.own_networks import Normalisation
from kdx.paths import sha256_of
from kdx.version import __version__

FEWEST = 20  # images of a report
TRIED = 500  # images on which other normalisations are tried
SURE = 0.001  # p from which another normalisation is called better


GIVEN = {  # role -> the parameters that name its checkpoint and what builds it
    STUDENT: ("student", "build"),
    BASE: ("base", "build_base"),
    SECOND: ("base2", "build_base"),
    "second student": ("student2", "build"),
    TEACHER: ("teacher", "build_teacher"),
}


def networks_given(parameters: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Role -> checkpoint, and role -> what builds the network, from parameters of the page on own models.

    What builds the student builds all that have no builder of their own and are no checkpoints of kdx.
    """
    paths = {role: parameters[name] for role, (name, _) in GIVEN.items() if parameters.get(name)}
    common = {role: "" if own.header_of(path) else parameters.get("build", "") for role, path in paths.items()}
    return paths, {role: parameters.get(GIVEN[role][1]) or build for role, build in common.items()}


def check_given(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for networks and lists that cannot be used, without running anything.

    Args:
        parameters: Of the page on own models.
    """
    networks = read_networks(*networks_given(parameters))
    if boxed := [role for role, header in networks.headers.items() if "kind" in header.get("architecture", {})]:
        raise ValueError(f"{boxed[0]}: expected a classifier, got a detector; give its images with --detection")
    if labels := parameters.get("labels"):
        read_labels(labels)
    if slices := parameters.get("slices"):
        read_slices(slices, [item.file for item in list_files(Path(parameters["data"]).expanduser())[0]])
    if normalisation := parameters.get("normalisation"):
        size, _ = _size(networks.headers[STUDENT], parameters["data"], int(parameters.get("size", 0)))
        for network in networks.networks.values():
            own.named_normalisation(normalisation, own.channels_of(network, size**2))


def _size(header: Mapping[str, Any], data: str | Path, given: int) -> tuple[int, str]:
    """Pixels a side of the input, and where the number comes from."""
    if given:
        return given, "given"
    if "size" in header:
        return header["size"], "of the checkpoint"
    if shared := common_size(data):
        return shared, "of the images"
    return 224, "by default"


@dataclass(frozen=True)
class OwnNetworks:
    """Networks by role, and what their checkpoints say.

    Attributes:
        networks: Role -> network.
        headers: Role -> header of its checkpoint, {} for one that kdx did not write.
        paths: Role -> file.
    """

    networks: Mapping[str, nn.Module]
    headers: Mapping[str, Mapping[str, Any]]
    paths: Mapping[str, Path]

    @property
    def shown(self) -> list[str]:
        """All but the teacher: those that stand in the student's place, and the base."""
        return [role for role in self.networks if role != TEACHER]


def read_networks(paths: Mapping[str, str | Path], builds: Mapping[str, str], device: str = "auto") -> OwnNetworks:
    """Load the networks of a report.

    Args:
        paths: Role -> checkpoint, as for :func:`kdx.load_own`; ``student`` and ``base``, perhaps ``second base``,
            ``second student`` and ``teacher``.
        builds: Role -> what builds the network.
        device: Where they run.

    Raises:
        ValueError: As for :func:`kdx.load_own`; checkpoints of kdx that take other images than the student, and two
            networks with the same weights.
    """
    if missing := [role for role in (STUDENT, BASE) if role not in paths]:
        raise ValueError(f"{' and '.join(missing)}: expected a checkpoint, got none")
    if absent := [f"no file {path} ({role})" for role, path in paths.items() if not Path(path).is_file()]:
        raise ValueError(f"{'; '.join(absent)}; expected a checkpoint")
    networks = {role: own.load_own(builds.get(role, ""), path).to(pick_device(device)) for role, path in paths.items()}
    headers = {role: own.header_of(path) for role, path in paths.items()}
    own.check_headers({role: header for role, header in headers.items() if role != TEACHER})
    for one, other in combinations(networks, 2):
        if own.same_weights(networks[one], networks[other]):
            raise ValueError(
                f"{other} and {one} are the same network ({paths[other]}), expected two that differ; give another file"
            )
    return OwnNetworks(networks, headers, {role: Path(path) for role, path in paths.items()})


@dataclass(frozen=True)
class OwnPair:
    """Networks with images, on which they have answered.

    Attributes:
        own: The networks.
        folder: Of the images.
        pictures: The images.
        normalisations: Role -> means and standard deviations.
        size: Pixels a side, and ``size_from`` where it comes from, in words.
        logits: Role -> float32 (n, classes).
        truth: Labels of the images.
        names: Name of each output.
        pace: Seconds that a network took for an image.
        caveats: What is doubtful, in sentences.
    """

    own: OwnNetworks
    folder: Path
    pictures: Pictures
    normalisations: Mapping[str, Normalisation]
    size: int
    size_from: str
    logits: Mapping[str, Tensor]
    truth: Labels
    names: Sequence[str]
    pace: float = 0.0
    caveats: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pictures.images)

    def inputs(self, role: str, images: Tensor | None = None) -> Tensor:
        """Images as input of a network; None takes those of the report."""
        images = self.pictures.images if images is None else images
        return own.network_input(self.own.networks[role], images, self.normalisations[role])

    def answer(self, role: str) -> Callable[[Tensor], Tensor]:
        """The function from images, uint8 (n, 3, h, w), to the classes that a network predicts."""
        return lambda images: own.answers(self.own.networks[role], self.inputs(role, images), role).argmax(1)

    @cached_property
    def answers(self) -> dict[str, Tensor]:
        """Role -> predicted class (n,), of networks with the student's classes."""
        classes = self.logits[STUDENT].shape[1]
        return {role: z.argmax(1) for role, z in self.logits.items() if z.shape[1] == classes}

    @property
    def labelled(self) -> bool:
        """Whether it is known which answers are right."""
        return self.truth.given and self.truth.outputs is not None

    @property
    def targets(self) -> Tensor:
        """The output (n,) of each image's label, or the student's answer where that is not known."""
        return self.answers[STUDENT] if self.truth.outputs is None else self.truth.outputs[self.truth.labels]

    @cached_property
    def ledger(self) -> Ledger | None:
        """The ledger of answers; None without labels."""
        if not self.labelled:
            return None
        return Ledger(self.targets, self.answers, self.names)

    @property
    def dataset(self) -> Dataset:
        """Images and labels, for figures."""
        return as_dataset(self.pictures, self.truth.labels, self.truth.names)

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Rows of a reference set, and of the images that are explained with it; of each class about as many."""
        labels = self.truth.labels
        order, odd = in_turns(labels), (rank_in_class(labels) + labels) % 2 == 1
        return order[odd[order]], order[~odd[order]]

    def caption(self, row: int) -> str:
        """Label and answers of an image, in lines."""
        lines = [self.truth.names[self.truth.labels[row]]] if self.truth.given else []
        lines += [f"{role}: {self.names[int(self.answers[role][row])]}" for role in (STUDENT, BASE)]
        return "\n".join(line if len(line) <= 22 else line[:21] + "…" for line in lines)

    def telling(self, unexplained: Tensor, rows: Tensor, count: int) -> Tensor:
        """Rows with the largest unexplained answers: a third of them gained, a third lost, and the largest of all.

        Args:
            unexplained: (len(rows),) the size of the unexplained answers.
            rows: The images among which to choose.
            count: How many.
        """
        order = rows[unexplained.cpu().argsort(descending=True, stable=True)]
        chosen: list[int] = []
        if self.ledger is not None:
            for quantity in ("gained", "lost"):
                of = torch.from_numpy(self.ledger.quantities(STUDENT)[quantity])
                chosen += order[of[order]][: -(-count // 3)].tolist()
        chosen += [row for row in order.tolist() if row not in chosen]
        return torch.tensor(chosen[:count])


def read_pair(
    networks: OwnNetworks,
    data: str | Path,
    *,
    size: int = 0,
    normalisation: Normalisation | str = "",
    classes: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> OwnPair:
    """Read images for networks, let these answer, and check that all of them answer the same question.

    Args:
        networks: From :func:`read_networks`.
        data: A folder of images, as for :func:`kdx.data.own_images.read_pictures`.
        size: Pixels a side of the input; 0 takes that of a checkpoint of kdx, else that of the images if they share
            one, else 224.
        normalisation: As for :func:`kdx.networks.own_networks.named_normalisation`, or means and deviations; nothing
            takes that of the checkpoint, else ImageNet's.
        classes: Names of the outputs in order; none takes the checkpoint's, else those of the folders.
        limit: Largest number of images.
        seed: Draws the images.

    Raises:
        ValueError: Networks that do not take these images, answer with NaN, or number the classes differently; fewer
            than ``FEWEST`` images; and as for :func:`kdx.data.own_images.label`.
    """
    header = networks.headers[STUDENT]
    size, size_from = _size(header, data, size)
    pictures = read_pictures(data, size, limit, seed)
    if len(pictures.images) < FEWEST:
        raise ValueError(
            f"data: expected {FEWEST} images or more, got {len(pictures.images)} that can be read in {data}"
        )
    caveats: list[str] = []
    normalisations, assumed = _normalisations(networks, normalisation, size)
    logits, start = {}, time.perf_counter()
    for role, network in networks.networks.items():
        x = own.network_input(network, pictures.images, normalisations[role])
        logits[role] = own.answers(network, x, role)
    pace = (time.perf_counter() - start) / len(logits) / len(pictures.images)
    own.check_answers({role: z for role, z in logits.items() if role != TEACHER})
    truth = label(pictures, logits[STUDENT], classes or header.get("classes", ()))
    names = list(classes or header.get("classes", ()))
    if not names:
        names = [f"output {i}" for i in range(logits[STUDENT].shape[1])]
        for place, name in zip([] if truth.outputs is None else truth.outputs.tolist(), truth.names, strict=False):
            names[place] = name
    pair = OwnPair(networks, Path(data), pictures, normalisations, size, size_from, logits, truth, names, pace, caveats)
    _check_order(pair)
    if logits.get(TEACHER, logits[STUDENT]).shape[1] != logits[STUDENT].shape[1]:
        caveats.append("The teacher has other classes, so its answers are not in the ledger.")
    if (wider := networks.headers.get(TEACHER, {}).get("size", size)) != size:
        caveats.append(f"The teacher was trained on {wider} x {wider} pixels, and is shown {size} x {size}.")
    if not truth.given:
        caveats.append(
            "Labels are not known: nothing is said about right and wrong, and maps are of predicted classes."
        )
    elif not pair.labelled:
        caveats.append("The outputs of the labels are not known (--labels), so nothing is said about right and wrong.")
    if assumed:
        caveats.append(
            f"The normalisation of ImageNet was assumed for the {' and the '.join(assumed)} (--normalisation)."
        )
    if size_from in ("of the images", "by default"):
        caveats.append(f"The networks were given {size} x {size} pixels, the size {size_from} (--size).")
    if pair.labelled:
        caveats += _doubts(pair, assumed)
    return pair


def _normalisations(
    networks: OwnNetworks, given: Normalisation | str, size: int
) -> tuple[dict[str, Normalisation], list[str]]:
    """Of each role, and the roles for which it is assumed."""
    found, assumed = {}, []
    for role, network in networks.networks.items():
        header = networks.headers[role]
        channels = own.channels_of(network, size * size)
        if isinstance(given, str) and given:
            found[role] = own.named_normalisation(given, channels)
        elif given:
            found[role] = given
        elif "mean" in header:
            found[role] = (header["mean"], header["std"])
        else:
            found[role] = own.NORMALISATIONS["imagenet"][channels]
            assumed.append(role)
    return found, assumed


def _check_order(pair: OwnPair) -> None:
    """Refuse networks and folders that number the classes differently."""
    others = {f"the {role}": answers for role, answers in pair.answers.items() if role != STUDENT}
    if pair.labelled:
        others["the folders"] = pair.targets
    checked = [own.check_class_order(pair.answers[STUDENT], of, ("the student", who)) for who, of in others.items()]
    if not all(checked):
        pair.caveats.append("There are too few images per class to check that all networks number the classes alike.")


def _doubts(pair: OwnPair, assumed: Sequence[str]) -> list[str]:
    """Signs of a wrong size, normalisation or order of classes."""
    assert pair.ledger is not None
    found = []
    right = {role: pair.ledger.right(role) for role in pair.answers}
    chance = 1 / pair.logits[STUDENT].shape[1]
    if weak := [role for role, of in right.items() if share_interval(of).low <= chance]:
        found.append(
            f"Hardly better than chance ({chance:.1%}): the {' and the '.join(weak)}; check size, normalisation and "
            "the order of the classes."
        )
    if TEACHER in right and right[STUDENT].mean() < right[TEACHER].mean() / 2:
        found.append(
            f"The student is right on {right[STUDENT].mean():.1%} of the images and its teacher on "
            f"{right[TEACHER].mean():.1%}: is {pair.size} pixels the size that it was trained with?"
        )
    few = slice(None, None, max(1, len(pair) // TRIED))  # of all classes
    for role in assumed:
        if role not in right:
            continue
        channels = own.channels_of(pair.own.networks[role], pair.size**2)
        for name, normalisation in own.NORMALISATIONS.items():
            if normalisation[channels] == pair.normalisations[role]:
                continue
            other = replace(pair, normalisations={**pair.normalisations, role: normalisation[channels]})
            answers = other.answer(role)(pair.pictures.images[few])
            better = paired(right[role][few], (answers == pair.targets[few]).numpy())
            if better.difference > 0 and better.p < SURE:
                found.append(
                    f"With the normalisation {name!r}, the {role} gets {100 * better.difference:.1f} points more of "
                    f"{better.n} images right: is it the one that it was trained with (--normalisation {name})?"
                )
    return found


def facts(pair: OwnPair, command: str) -> dict[str, Any]:
    """What a statement says about its origin."""
    data = {"sha256": pair.dataset.fingerprint, "size": pair.size, "normalisation": pair.normalisations[STUDENT]}
    return {
        "command": command,
        "version": __version__,
        "networks": {role: {"file": path.name, "sha256": sha256_of(path)} for role, path in pair.own.paths.items()},
        "data": {"folder": pair.folder.name, **data, "labels": pair.truth.origin},
    }


def per_image(pair: OwnPair) -> pd.DataFrame:
    """file, label and, of each network, answer and probability; and what changed against the base."""
    columns: dict[str, Any] = {"file": pair.pictures.files}
    if pair.truth.given:
        columns["label"] = [pair.truth.names[i] for i in pair.truth.labels]
    for role, answers in pair.answers.items():
        columns[f"{role}: answer"] = [pair.names[i] for i in answers.tolist()]
        columns[f"{role}: probability"] = pair.logits[role].softmax(1).amax(1).tolist()
    if pair.ledger:
        columns |= pair.ledger.quantities(STUDENT)
    return pd.DataFrame(columns)
