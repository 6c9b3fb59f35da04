"""Does it matter? Features, or pixels, are taken away from a student, and its answers are measured again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdx.explain.patching import jackknife, patched
from kdx.explain.reference import ANSWER, Reference, inputs_of
from kdx.explain.regression import resample
from kdx.explain.road import perturb
from kdx.intervals import share_interval
from kdx.networks.devices import autocast

FRACTIONS = (0.05, 0.1, 0.2, 0.4)
RANDOM = "random"
CELLS = 8  # a side of a random map


def replacement(
    reference: Reference, images: Tensor | tuple[Tensor, ...], *, batch_size: int = 64, seed: int = 0
) -> pd.DataFrame:
    r"""What becomes of a student's answers when the features of a stage are replaced by what its base can express.

    With E the features that the base cannot express, as in :func:`kdx.unexplained`, the stage is given :math:`A - E`
    (*unexplained* features are gone) and the student is run on from there. Where it had answered otherwise than its
    base, does it now give the base's answer? And where both agreed, do they still? As a control, :math:`A - E'` with
    the E of another image (*exchanged*): as much is taken away, but not what belongs to the image. With a teacher that
    has the stage, also :math:`A - H` (*handed over*), where H is the part of E that the teacher's features predict
    beyond the base's.

    This tells what makes these two networks differ. Two students of one recipe differ as well, so compare a second
    base in the student's place.

    Args:
        reference: As for :func:`kdx.unexplained`, perhaps with a teacher.
        images: (n, c, h, w), or a tuple, one for each network; other images than the reference's.
        batch_size: Images in one forward pass.
        seed: Draws whose features are exchanged.

    Returns:
        stage, replaced, quantity, value, low, high (exact 95 % interval), n. Quantities: ``disagreements turned``, the
        share of the n images with different answers on which the student now gives the base's; ``agreements kept``,
        the share of the n images with the same answer on which it still does. NaN where there are no such images.

    Raises:
        ValueError: Fewer than two images, or networks whose weights changed.

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> table = kdx.replacement(kdx.Reference(student, base, images[:12]), images[12:])
        >>> table["replaced"].unique().tolist(), len(table)
        (['unexplained', 'exchanged'], 16)
    """
    reference.check_weights()
    x = inputs_of(images, len(reference.networks))
    if (n := len(x[0])) < 2:
        raise ValueError(f"images: expected 2 or more, to exchange features, got {n}")
    before: list[Tensor] = []  # whether the answer is the base's
    after: dict[tuple[str, str], list[Tensor]] = {}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(False), torch.no_grad():
        for rows in order.tensor_split(-(-n // batch_size)):
            part = tuple(of[rows] for of in x)
            outputs = reference.outputs_of(*part)
            of_student, of_base = (z.argmax(1) for z in outputs.pop(ANSWER)[:2])
            before.append(of_student == of_base)
            if missing := set(reference.stages) - set(outputs):  # those that the teacher does not have
                two = reference.features_of(*part[:2])
                outputs |= {stage: two[stage] for stage in missing}
            for key, change in _changes(reference, outputs).items():
                answer = patched(reference, 0, key[0], part[0], change).argmax(1)
                after.setdefault(key, []).append(answer == of_base)
    agree = torch.cat(before).cpu().numpy()
    table = []
    for (stage, replaced), parts in after.items():
        turned = torch.cat(parts).cpu().numpy()
        for quantity, members in (("disagreements turned", ~agree), ("agreements kept", agree)):
            table.append((stage, replaced, quantity, *share_interval(turned[members], method="exact")))
    return pd.DataFrame(table, columns=["stage", "replaced", "quantity", "value", "low", "high", "n"])


def _changes(reference: Reference, features: Mapping[str, tuple[Tensor, ...]]) -> dict[tuple[str, str], Tensor]:
    """(stage, what is replaced) -> what is added to the student's features (n, k, h, w), from those of student, base
    and, at stages that it shares, the teacher."""
    fitted = reference.regressions["distilled"]
    found = {}
    for stage in reference.stages:
        of, base, *teacher = features[stage]
        left = fitted[stage].left_over(of, base)
        found[stage, "unexplained"] = -left
        found[stage, "exchanged"] = -left.roll(1, 0)
        if teacher:
            beyond = reference.features_beyond[stage]
            found[stage, "handed over"] = -beyond(resample(base, of), resample(teacher[0], of))
    return found


def deletion(
    reference: Reference,
    images: Tensor | tuple[Tensor, Tensor],
    maps: Mapping[str, Tensor],
    *,
    fractions: tuple[float, ...] = FRACTIONS,
    direction: str = "distilled",
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Do maps show the pixels that make the unexplained answer? The most salient are deleted, and it is measured.

    Pixels are imputed from the others (ROAD, :func:`kdx.perturb`), for both networks. With r the answer that the base
    cannot express, as in :func:`kdx.unexplained`, and r' the same of the damaged image, what is left is

    .. math:: \sum \langle r', r \rangle \,/\, \sum \lVert r \rVert^2,

    1 for undamaged images and 0 when nothing of it remains. The better a map, the faster it falls. Maps of any
    explainer can be compared, on any images, without planted truth; beside them stand random maps of 8 x 8 cells.

    Args:
        reference: As for :func:`kdx.unexplained`.
        images: (n, c, h, w), n >= 3, or a pair; other images than the reference's.
        maps: Name -> maps (n, h', w'), of any resolution.
        fractions: Of the pixels that are deleted, ascending, within (0, 1).
        direction: ``"distilled"`` for the student's answer beyond the base's, ``"residual"`` for the reverse.
        batch_size: Images in one forward pass.
        seed: Of random maps, ties and the noise on deleted pixels.

    Returns:
        Two tables. Curves: map, fraction, value, low, high, n. Areas: map, value, low, high, n: the mean over fractions
        of what random maps leave minus what these maps leave; above 0, the maps find it. 95 % jackknife intervals over
        the images.

    Raises:
        ValueError: Fewer than 3 images, maps that do not fit them, or fractions that are not ascending in (0, 1).

    Examples:
        >>> import kdx, torch
        >>> student = kdx.build("resnet10", 3, "small", 0.125, seed=0)
        >>> base = kdx.build("resnet10", 3, "small", 0.25, seed=1)
        >>> images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reference = kdx.Reference(student, base, images[:12])
        >>> maps = kdx.unexplained(reference, images[12:]).fused["distilled"]
        >>> curves, areas = kdx.deletion(reference, images[12:], {"unexplained": maps})
        >>> len(curves), areas["map"].tolist()
        (8, ['unexplained'])
    """
    reference.check_weights()
    x = inputs_of(images)
    if (n := len(x[0])) < 3:
        raise ValueError(f"images: expected 3 or more, got {n}")
    if list(fractions) != sorted(set(fractions)) or not fractions or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ValueError(f"fractions: expected ascending shares of the pixels within (0, 1), got {fractions}")
    if RANDOM in maps:
        raise ValueError(f"maps: {RANDOM!r} is the name of the control; give the maps another name")
    for name, of in maps.items():
        if of.ndim != 3 or len(of) != n:
            raise ValueError(f"maps: expected ({n}, h, w), one per image, got {tuple(of.shape)} of {name!r}")
    drawn = torch.rand(n, CELLS, CELLS, generator=torch.Generator().manual_seed(seed)).to(x[0].device)
    whose = {id(of): of for of in x}  # one tensor where both networks take the same
    with torch.inference_mode(False), torch.no_grad():
        whole = _left_over(reference, x, direction, batch_size)
        left = {}
        for name, of in {**maps, RANDOM: drawn}.items():
            for fraction in fractions:
                perturbed = {
                    key: perturb(images, -of.to(images.device), 1 - fraction, seed=seed)
                    for key, images in whose.items()
                }
                damaged = tuple(perturbed[id(images)] for images in x)
                left[name, fraction] = (_left_over(reference, damaged, direction, batch_size) * whole).sum(1)
    energy = whole.square().sum(1).double().cpu().numpy()
    products = {key: of.double().cpu().numpy() for key, of in left.items()}
    curves, areas = [], []
    for name, fraction in products:
        curves.append((name, fraction, *_ratio(products[name, fraction], energy), n))
    for name in maps:
        saved = sum(products[RANDOM, fraction] - products[name, fraction] for fraction in fractions) / len(fractions)
        areas.append((name, *_ratio(saved, energy), n))
    columns = ["value", "low", "high", "n"]
    return pd.DataFrame(curves, columns=["map", "fraction", *columns]), pd.DataFrame(areas, columns=["map", *columns])


def _left_over(reference: Reference, x: tuple[Tensor, ...], direction: str, batch_size: int) -> Tensor:
    """The answer (n, classes) of one network that the other cannot express, in the device's quick precision."""
    which = {"distilled": (0, 1), "residual": (1, 0)}[direction]
    answer = reference.regressions[direction][ANSWER]
    parts = []
    for part in zip(*(of.split(batch_size) for of in x), strict=True):
        with autocast(part[0].device):
            answers = reference.answers_of(*part)
        parts.append(answer.left_over(*(answers[i] for i in which)))
    return torch.cat(parts)


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    return jackknife(np.stack([above, below], 1), lambda sums: sums[..., 0] / sums[..., 1])
