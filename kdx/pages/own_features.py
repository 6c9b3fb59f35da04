"""What a report measures inside the networks: regressions, maps, interventions and scores, by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

import kdx
from kdx.data.batches import scorable
from kdx.explain.reference import ANSWER, Reference, centre_logits
from kdx.explain.unexplained import fuse
from kdx.intervals import Interval
from kdx.measure.corruptions import CORRUPTIONS, STRENGTHS
from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER
from kdx.networks import own_networks as own
from kdx.pages.own_pair import OwnPair

Layers = Mapping[str, Mapping[str, str]]  # role -> stage -> module name
METHODS = ("unexplained", "unicam")
GRAD_CAM = "Grad-CAM of the student"
BATCHES = (4, 2)  # at least; two where there are too few images for four
FOLDS = 5  # of cross-fitting: twice as fast as with ten, and nearly as sharp


def find_stages(pair: OwnPair, given: Mapping[str, tuple[Sequence[str], str]]) -> tuple[dict[str, dict[str, str]], str]:
    """Stages of the networks, and what cannot be done without.

    Args:
        pair: The networks and images.
        given: Role -> names of modules (none: found) and ``module:function`` to feature maps (``""``: none).

    Returns:
        Role -> stage -> module; without the teacher where it has none, and {} where student or base have none, with
        the reason in a sentence, else ``""``.

    Raises:
        ValueError: Modules that were named but are not there, or numbers of stages that differ.
    """
    found: dict[str, dict[str, str]] = {}
    for role, network in pair.own.networks.items():
        named, shaped = given[role]
        grid: Any = own.find_builder(shaped) if shaped else None
        try:
            found[role] = kdx.stages(network, pair.inputs(role, pair.pictures.images[:1]), named or None, grid)
        except ValueError as error:
            if named or shaped:
                raise
            if role != TEACHER:
                return {}, f"No maps and no features: the {role} has no stages with places ({error})."
    levels = list(found[STUDENT])
    for role, layers in found.items():
        if role != TEACHER and list(layers) != levels:
            raise ValueError(
                f"expected as many stages in all networks, got {found[STUDENT]} of the student and {layers} of the "
                f"{role}; name them with -p stages_student and -p stages_base"
            )
    return found, ""


def of_reference(pair: OwnPair, role: str) -> tuple[str, ...]:
    """The networks behind a reference: one in the student's place, the base and, if there is one, the teacher."""
    return (role, BASE, TEACHER) if TEACHER in pair.own.networks else (role, BASE)


def inputs_of(pair: OwnPair, roles: Sequence[str], rows: Tensor | slice) -> tuple[Tensor, ...]:
    """Images as input of each network; one tensor for all that take the same."""
    found: dict[str, Tensor] = {}
    for role in roles:
        channels = own.channels_of(pair.own.networks[role], pair.size**2)
        key = str((channels, pair.normalisations[role]))
        found[role] = found[key] = found[key] if key in found else pair.inputs(role, pair.pictures.images[rows])
    return tuple(found[role] for role in roles)


def make_references(pair: OwnPair, layers: Layers, rows: Tensor) -> dict[str, Reference]:
    """Role -> reference with that network in the student's place: the student, and the second base if there is one."""
    networks = pair.own.networks
    return {
        role: Reference(
            networks[role],
            networks[BASE],
            inputs_of(pair, of_reference(pair, role), rows),
            teacher=networks.get(TEACHER),
            layers_student=layers[role],
            layers_base=layers[BASE],
            layers_teacher=layers.get(TEACHER, {}),
        )
        for role in (STUDENT, SECOND)
        if role in networks
    }


def unexplained_answers(reference: Reference, pair: OwnPair, rows: Tensor) -> Tensor:
    """The part (n, classes) of the student's answers that its base cannot express."""
    of, base = (centre_logits(pair.logits[role][rows]) for role in (STUDENT, BASE))
    answer = reference.regressions["distilled"][ANSWER]
    return answer.left_over(of.to(answer.weights), base.to(answer.weights)).cpu()


def at_a_time(pair: OwnPair) -> int:
    """Images that are explained at a time: 64, or fewer large ones, such as 27 of 224 x 224, which take 2.5 GB in a
    ResNet-50."""
    return max(8, min(64, 2**22 // pair.pictures.images[0].numel()))


def make_maps(
    pair: OwnPair, references: Mapping[str, Reference], known: Tensor, rows: Tensor, method: str, encoder: str
) -> dict[str, Tensor]:
    """Kind -> maps (n, h, w) of all stages fused: distilled, residual, with a second base control, with a teacher
    handed over.

    Args:
        pair: Networks and images.
        references: From :func:`make_references`.
        known: Their rows.
        rows: The images to explain.
        method: One of ``METHODS``.
        encoder: Of class names, for UniCAM.
    """
    embeddings = kdx.label_embeddings(pair.truth.names, encoder)[pair.truth.labels]
    found: dict[str, Tensor] = {}
    for role, reference in references.items():
        x: Any = inputs_of(pair, (role, BASE), rows)
        if method == "unicam":
            g = embeddings.to(x[0].device)
            of: Any = kdx.unicam(reference, g[known], x, g[rows], batch_size=at_a_time(pair))
        else:
            of = kdx.unexplained(reference, x, batch_size=at_a_time(pair))
        if role == STUDENT:
            found |= {"distilled": fuse(of.distilled).cpu(), "residual": fuse(of.residual).cpu()}
        else:
            found["control"] = fuse(of.distilled).cpu()
    if TEACHER in pair.own.networks and method != "unicam":
        x = inputs_of(pair, of_reference(pair, STUDENT), rows)
        found["handed over"] = kdx.transferred(references[STUDENT], x, batch_size=at_a_time(pair)).fused.cpu()
    return found


def grad_cams(pair: OwnPair, layers: Layers, rows: Tensor) -> dict[str, dict[str, Tensor]]:
    """Role -> the student's deepest stage -> Grad-CAM maps (n, h, w), for the targets of the images."""
    found = {}
    deepest = list(layers[STUDENT])[-1]
    for role in [role for role in (STUDENT, BASE, TEACHER) if deepest in layers.get(role, {}) and role in pair.answers]:
        x = inputs_of(pair, [role], rows)[0]
        maps = kdx.grad_cam(pair.own.networks[role], x, pair.targets[rows], {deepest: layers[role][deepest]})
        found[role] = {deepest: maps[deepest].cpu()}
    return found


def maps_to_delete_by(
    pair: OwnPair, maps: Mapping[str, Tensor], layers: Layers, rows: Tensor, method: str
) -> dict[str, Tensor]:
    """Maps whose most salient pixels are deleted: the distilled and handed-over ones, and Grad-CAM of the student."""
    (cam,) = grad_cams(pair, {STUDENT: layers[STUDENT]}, rows)[STUDENT].values()
    named = {method: maps["distilled"], "handed over": maps.get("handed over"), GRAD_CAM: cam}
    return {name: m for name, m in named.items() if m is not None}


def score(pair: OwnPair, layers: Layers, encoder: str, permutations: int, seed: int) -> pd.DataFrame | None:
    """FSS, CKA, RS and unique relevance, over as many class-balanced batches as there are images for; None, with a
    caveat, where there are too few.

    Returns:
        The columns of :class:`kdx.Scorer`'s tables, with score and network.
    """
    y = pair.truth.labels
    for least in BATCHES:
        try:
            rows, size = scorable(y, least)
            break
        except ValueError as error:
            why = error
    else:
        pair.caveats.append(f"No scores: {why}.")
        return None
    kinds, counts = y[rows].unique(return_counts=True)
    batches = int(counts.min()) * len(kinds) // size
    if len(kinds) < len(pair.truth.names):
        pair.caveats.append(
            f"Scores are over {len(kinds)} of {len(pair.truth.names)} classes; there are too few images of the others."
        )
    roles = [role for role in pair.own.shown if role in layers]
    scorer = kdx.Scorer(
        {role: pair.own.networks[role] for role in roles},
        inputs_of(pair, [STUDENT], rows)[0],
        y[rows],
        layers={role: layers[role] for role in roles},
        batches=batches,
        batch_size=size,
        permutations=permutations,
        seed=seed,
    )
    embeddings = kdx.label_embeddings(pair.truth.names, encoder)
    tables = []
    for role in [role for role in roles if role != BASE]:
        tables += [scorer.fss(role, BASE).assign(score="FSS", network=role)]
        tables += [scorer.cka(role, BASE).assign(score="CKA", network=role)]
    tables += [scorer.rs(role, embeddings).assign(score="RS", network=role) for role in roles]
    for role in [role for role in roles if role != BASE]:
        unique = scorer.unique_rs(role, BASE, embeddings)
        unique = unique[unique["statistic"] == "semipartial"]
        tables.append(unique.assign(score="unique, " + unique["direction"], network=role))
    return pd.concat(tables, ignore_index=True)


def shares(pair: OwnPair, references: Mapping[str, Reference]) -> pd.DataFrame:
    """What the base cannot express of a network's answers and features, and what the teacher explains of it.

    Returns:
        network (the student, and others in its place), quantity (``unexplained`` or ``handed over``), stage, value,
        low, high.
    """
    rows = []
    for role, reference in references.items():
        x: Any = inputs_of(pair, of_reference(pair, role), slice(None))
        table = kdx.unexplained_share(reference, x[:2], folds=FOLDS, directions=["distilled"])
        rows.append(table.assign(network=role, quantity="unexplained"))
        if TEACHER in pair.own.networks:
            of = kdx.transferred_share(reference, x, folds=FOLDS, of=[STUDENT])
            of = of[of["part"] == "handed over, of unexplained"]
            rows.append(of.assign(network=role, quantity="handed over"))
    columns = ["network", "quantity", "stage", "value", "low", "high", "n"]
    return pd.concat(rows, ignore_index=True)[columns]


def share_of_answers(table: pd.DataFrame | None, quantity: str) -> dict[str, Interval]:
    """Role -> one quantity of :func:`shares`, of the answers."""
    if table is None:
        return {}
    of = table[(table["stage"] == ANSWER) & (table["quantity"] == quantity)]
    return {row.network: Interval(row.value, row.low, row.high, row.n) for row in of.itertuples()}


def seconds(pair: OwnPair, layers: Layers, sample: int) -> float:
    """About how long a report takes, from the time that the networks took to answer."""
    n, others = len(pair), len(pair.own.networks) - 1
    passes = float(len(CORRUPTIONS) * len(STRENGTHS) * sample * len(pair.own.shown))
    if layers:
        references = 1 + (SECOND in pair.own.networks)
        stages = len(layers[STUDENT])
        passes += references * (3 * n + 6 * sample)  # regressions, and maps, whose gradients take two passes more
        passes += references * 3 * stages * sample  # replaced features
        passes += 3 * 4 * 2 * sample + n * others  # deletion, scores
    return passes * pair.pace
