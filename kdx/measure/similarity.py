"""How a network sees classes that are alike (Han et al. 2023, section 4.1; Müller et al. 2019).

Classes are alike if they are of one category. ``categories`` int64 (classes,) has the number of each class's category,
and -1 for a class of none; :func:`categories_of` makes it from one of ``HIERARCHIES``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from kdx.data import shapes
from kdx.data.batches import class_indices
from kdx.inference import jackknife
from kdx.intervals import Interval
from kdx.networks.capture import capture, check_input, forward
from kdx.networks.stages import evaluating, unwrapped

CHUNK = 256  # images in one forward pass
HIERARCHIES: dict[str, Mapping[str, tuple[str, ...]]] = {
    "cifar10": {
        "vehicles": ("airplane", "automobile", "ship", "truck"),
        "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    },
    "cifar10 pairs": {"pets": ("cat", "dog"), "cars": ("automobile", "truck")},
    "shapes": shapes.FAMILIES,
    "cifar100": {
        "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
        "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
        "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
        "food containers": ("bottle", "bowl", "can", "cup", "plate"),
        "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
        "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
        "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
        "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
        "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
        "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
        "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
        "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
        "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
        "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
        "people": ("baby", "boy", "girl", "man", "woman"),
        "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
        "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
        "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
        "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
        "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
    },
}


def categories_of(classes: Sequence[str], hierarchy: Mapping[str, Sequence[str]]) -> Tensor:
    """The place of each class's category in a hierarchy, int64 (classes,); -1 for a class of no category.

    Raises:
        ValueError: The hierarchy names an unknown class, or one class twice.

    Examples:
        >>> categories_of(["cat", "dog", "ship"], {"pets": ["cat", "dog"]}).tolist()
        [0, 0, -1]
    """
    members = [name for names in hierarchy.values() for name in names]
    if not set(members) <= set(classes) or len(set(members)) < len(members):
        wrong = sorted({name for name in members if name not in classes or members.count(name) > 1})
        raise ValueError(f"hierarchy: expected classes of {', '.join(classes)}, each once, got {', '.join(wrong)}")
    place = {name: i for i, names in enumerate(hierarchy.values()) for name in names}
    return torch.tensor([place.get(name, -1) for name in classes])


def class_entropies(
    logits: Tensor, labels: Tensor, categories: Tensor, temperatures: Sequence[float] = (1.0, 4.0)
) -> pd.DataFrame:
    r"""How evenly answers are spread over the classes, over those like the true class, and over wrong ones.

    Every entropy :math:`-\sum_i p_i \ln p_i` is divided by the logarithm of its number of classes, so it is in [0, 1].
    Han et al. (2023) do not say which of those within a category their *Category* is; it cannot be ``within`` at T = 1,
    which is below the entire one where answers are certain.

    Args:
        logits: (n, classes).
        labels: (n,) class indices.
        categories: int (classes,), the category of each class; -1 for none.
        temperatures: T > 0 of ``within``.

    Returns:
        A row for each image, in their order, so that networks can be compared image by image: ``entire`` (softmax over
        all classes), ``within T=1`` and so on (softmax at T over the classes of the true class's category), ``wrong``
        (the same at T = 1 without the true class), ``logit`` (the positive logits in the category, divided by their
        sum). NaN where there are fewer than two classes to spread over, or no logit is positive.

    Raises:
        ValueError: Arguments that do not fit each other, logits that are not finite, or a temperature of 0 or less.
    """
    labels = _check(logits, labels, categories)
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures: expected values above 0, got {temperatures}")
    logits, categories = logits.double(), categories.to(labels.device)
    of_true = categories[labels]
    alike = (categories == of_true[:, None]) & (of_true >= 0)[:, None]
    wrong = alike & (torch.arange(logits.shape[1], device=labels.device) != labels[:, None])
    everything = torch.ones_like(alike)
    positive = logits.clamp(min=0) * alike
    found = {"entire": _entropy(_softmax(logits, everything), everything)}
    found |= {f"within T={t:g}": _entropy(_softmax(logits / t, alike), alike) for t in temperatures}
    found["wrong"] = _entropy(_softmax(logits, wrong), wrong)
    found["logit"] = _entropy(positive / positive.sum(1, keepdim=True), alike)
    return pd.DataFrame({name: values.cpu().numpy() for name, values in found.items()})


def _softmax(logits: Tensor, among: Tensor) -> Tensor:
    """Softmax of each row among some classes, (n, classes) both; NaN where there are none."""
    return logits.masked_fill(~among, -math.inf).softmax(1)


def _entropy(p: Tensor, among: Tensor) -> Tensor:
    """Entropy of each row, divided by the logarithm of the number of classes; NaN for fewer than two."""
    count = among.sum(1).double()
    return torch.where(count > 1, -torch.special.xlogy(p, p).sum(1) / count.log(), math.nan)


def wrong_rank_correlation(logits_student: Tensor, logits_teacher: Tensor, labels: Tensor) -> Tensor:
    """Spearman's correlation of two networks' logits over the wrong classes: float64 (n,) in [-1, 1].

    Args:
        logits_student: (n, classes), of three classes or more.
        logits_teacher: (n, classes).
        labels: (n,) class indices, of the class that is left out of each row.

    Returns:
        A correlation for each image; NaN where all logits of a row are equal.

    Raises:
        ValueError: Arguments that do not fit each other, logits that are not finite, or fewer than three classes.

    Examples:
        >>> student, teacher = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[0.0, 1.0, 5.0, 7.0]])
        >>> wrong_rank_correlation(student, teacher, torch.tensor([0])).round(decimals=6).tolist()
        [1.0]
    """
    labels = _check(logits_student, labels)
    if logits_student.shape != logits_teacher.shape or logits_student.shape[1] < 3:
        raise ValueError(
            f"expected logits (n, classes) of the same images and of three classes or more, got "
            f"{tuple(logits_student.shape)} and {tuple(logits_teacher.shape)}"
        )
    _check(logits_teacher, labels)
    wrong = torch.arange(logits_student.shape[1], device=labels.device) != labels[:, None]
    ranks = [stats.rankdata(z[wrong].view(len(z), -1).cpu().numpy(), axis=1) for z in (logits_student, logits_teacher)]
    one, two = (torch.from_numpy(rank - rank.mean(1, keepdims=True)) for rank in ranks)
    return (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))


def penultimate(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the last linear layer of a network takes in, and its weights: the templates of the classes.

    Args:
        model: Any network that ends in a linear layer.
        images: (n, c, h, w), normalised as the network expects, on its device.

    Returns:
        Features (n, d), and templates (classes, d).

    Raises:
        ValueError: The network has no linear layer, or its last one does not see one row for each image.
    """
    model = unwrapped(model)
    check_input(model, images)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__}: expected a network that ends in a Linear layer, found none")
    name, head = linear[-1]
    found = []
    for chunk in images.split(CHUNK):
        with torch.no_grad(), evaluating(model), capture(model, {"head": name}, inputs={"head"}) as captured:
            forward(model, chunk)
        if (features := captured["head"]).shape[:-1] != (len(chunk),):
            raise ValueError(f"{name}: expected features (n, d) of {len(chunk)} images, got {tuple(features.shape)}")
        found.append(features)
    return torch.cat(found), head.weight.detach()


class Plane(NamedTuple):
    """Features on the plane through the templates of three classes.

    Attributes:
        points: (m, 2), of the images of these classes. The first template is the origin, the second lies on the first
            axis, and the third on the side of the positive second one.
        labels: int64 (m,), 0 to 2 for the three classes.
        templates: (3, 2).
    """

    points: Tensor
    labels: Tensor
    templates: Tensor


def class_plane(features: Tensor, labels: Tensor, templates: Tensor, classes: Sequence[int]) -> Plane:
    """Project features orthogonally on the plane through the templates of three classes (Müller et al. 2019).

    Args:
        features: (n, d), see :func:`penultimate`.
        labels: (n,) class indices.
        templates: (classes, d).
        classes: Three different class indices; usually two that are alike and one that is not.

    Raises:
        ValueError: Not three classes of the templates, labels of other classes, templates on one line, or arguments
            that do not fit.
    """
    labels = class_indices(labels)
    if len(set(classes)) != 3 or not all(0 <= c < len(templates) for c in classes):
        raise ValueError(f"classes: expected three different ones of {len(templates)}, got {list(classes)}")
    if not ((labels >= 0) & (labels < len(templates))).all():
        raise ValueError(
            f"labels: expected 0 to {len(templates) - 1}, the classes of the templates, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    if features.ndim != 2 or features.shape != (len(labels), templates.shape[1]):
        raise ValueError(
            f"features: expected ({len(labels)}, {templates.shape[1]}), a row for each label and a column for each of "
            f"the templates, got {tuple(features.shape)}"
        )
    chosen = templates[list(classes)].double()
    edges = (chosen[1:] - chosen[0]).T
    basis, lengths = torch.linalg.qr(edges)
    if not lengths.diagonal().abs().min() > 1e-9 * lengths.abs().max():
        raise ValueError(f"templates: expected those of {list(classes)} to span a plane, got three on a line")
    basis = basis * lengths.diagonal().sign()
    place = torch.full((len(templates),), -1, device=labels.device)
    place[list(classes)] = torch.arange(3, device=labels.device)
    rows = place[labels] >= 0
    points = (features[rows].double() - chosen[0]) @ basis
    return Plane(points, place[labels[rows]], (chosen - chosen[0]) @ basis)


def alike_parts(
    features: Tensor, labels: Tensor, categories: Tensor, blocks: int = 10, seed: int = 0
) -> NDArray[np.float64]:
    """The ratio of :func:`alike_ratio` in parts, so that networks can be compared over folds and images.

    Args:
        features: (n, d), see :func:`penultimate`.
        labels: (n,) class indices.
        categories: int (classes,); -1 leaves a class out.
        blocks: Parts of the images, each with about as many of every class.
        seed: Draws them; equal for equal labels.

    Returns:
        float64 (blocks,), by the jackknife; NaN as for :func:`alike_ratio`, if a block is left out or none.

    Raises:
        ValueError: Fewer than 2 blocks; features and labels that differ in number; a class with fewer images than
            blocks, or than 4 for 2 blocks; or no two classes alike or unalike.
    """
    if blocks < 2:
        raise ValueError(f"blocks: expected at least 2, got {blocks}")
    members, same, other = _alike(features, labels, categories, least=4 if blocks == 2 else blocks)
    generator = torch.Generator().manual_seed(seed)
    parts = [rows[torch.randperm(len(rows), generator=generator)].tensor_split(blocks) for rows in members]
    of = torch.stack([torch.stack([_sums(features[rows]) for rows in part]) for part in parts], 1)
    whole = of.sum(0, keepdim=True)
    return jackknife(_ratio(whole, same, other)[0], _ratio(whole - of, same, other))


def alike_ratio(features: Tensor, labels: Tensor, categories: Tensor, resamples: int = 500, seed: int = 0) -> Interval:
    r"""Mean distance between classes of one category, divided by that between classes of different categories.

    The distance of two classes is that of their mean features; what the error of these means adds to its square,
    :math:`\operatorname{tr} \Sigma / n` of each class, is taken off. Below 1, classes that are alike lie closer
    together.

    Args:
        features: (n, d), see :func:`penultimate`.
        labels: (n,) class indices.
        categories: int (classes,), the category of each class; -1 leaves a class out.
        resamples: Sets of images, drawn anew within each class, for the 95 % interval over images: the basic one.
        seed: Draws them.

    Returns:
        The ratio with its interval, and the number of images. NaN where no two classes of different categories are
        further apart than the error of their means; the interval also where that is so in a set of images drawn.

    Raises:
        ValueError: Features and labels that differ in number; a class with fewer than two images; or no two classes
            alike or unalike.
    """
    members, same, other = _alike(features, labels, categories)
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples) for rows in members]
    times = [np.concatenate([np.ones((1, len(rows))), of]) for rows, of in zip(members, drawn, strict=True)]
    sums = [_sums(features[rows], torch.from_numpy(of)) for rows, of in zip(members, times, strict=True)]
    (value, *_), ratios = _ratio(torch.stack(sums, 1)[:1], same, other), _ratio(torch.stack(sums, 1)[1:], same, other)
    as_drawn = _ratio(torch.stack(sums, 1)[:1], same, other, corrected=False)[0]  # the truth of those drawn from them
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(float(value), float(value + as_drawn - high), float(value + as_drawn - low), sum(map(len, members)))


def _alike(features: Tensor, labels: Tensor, categories: Tensor, least: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of each class with a category, and which pairs of these classes are alike, and unalike."""
    labels = class_indices(labels)
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(
            f"features: expected ({len(labels)}, d), a row for each label, got {tuple(features.shape)}; give both "
            "of the same images"
        )
    kept = (categories >= 0).nonzero()[:, 0].tolist()
    members = [(labels == c).nonzero()[:, 0] for c in kept]
    if few := [c for c, rows in zip(kept, members, strict=True) if len(rows) < least]:
        number = "two" if least == 2 else least
        raise ValueError(
            f"features: expected {number} images or more of each class with a category, got fewer of {few}"
        )
    kinds = categories[kept]
    same, other = (torch.triu(pairs, 1) for pairs in (kinds == kinds[:, None], kinds != kinds[:, None]))
    if not same.any() or not other.any():
        raise ValueError(f"categories: expected two alike classes and one that is not, got {kinds.tolist()}")
    return members, same, other


def _sums(features: Tensor, times: Tensor | None = None) -> Tensor:
    """Number, squared length and sum of features (n, d), float64 (2 + d,); counted ``times`` (b, n): (b, 2 + d)."""
    x = features.double().cpu()
    columns = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x.square().sum(1, keepdim=True), x], 1)
    return columns.sum(0) if times is None else times @ columns


def _ratio(sums: Tensor, same: Tensor, other: Tensor, corrected: bool = True) -> NDArray[np.float64]:
    """Mean distance of pairs that are alike over that of others, (b,), from ``_sums`` (b, classes, 2 + d)."""
    n, squares, centres = sums[..., 0], sums[..., 1], sums[..., 2:] / sums[..., :1]
    distances = torch.cdist(centres, centres)
    if corrected:
        error = (squares / n - centres.square().sum(-1)).clamp(min=0) / (n - 1)  # of the mean: its summed variance
        distances = (distances.square() - error[..., None] - error[..., None, :]).clamp(min=0).sqrt()
    alike, unalike = distances[:, same].mean(1), distances[:, other].mean(1)
    return torch.where(unalike > 0, alike / unalike, math.nan).numpy()


def _check(logits: Tensor, labels: Tensor, categories: Tensor | None = None) -> Tensor:
    labels = class_indices(labels)
    if logits.ndim != 2 or len(logits) != len(labels) or not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise ValueError(
            f"expected logits (n, classes) and n labels from 0 to the number of classes, got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)} from {min(labels.tolist(), default=0)} to {max(labels.tolist(), default=0)}"
        )
    if wrong := (~logits.isfinite()).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"logits: expected finite values, got NaN or infinity in {len(wrong)} of {len(logits)} rows, the first "
            f"being {wrong[0]}; check the network"
        )
    if categories is not None and categories.shape != logits.shape[1:]:
        raise ValueError(f"categories: expected ({logits.shape[1]},), got {tuple(categories.shape)}")
    return labels
