"""Sanity checks for saliency maps (Adebayo et al. 2018): does a map change when its network does?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from kdx.explain.explainers import Explainer
from kdx.explain.grad_cam import agreement
from kdx.intervals import mean_of_known
from kdx.networks.stages import stages, unwrapped
from kdx.progress import progress

LOGITS, LABELS = "logits", "random labels"


def cascade(model: nn.Module, layers: Mapping[str, str], seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a network with random weights from the logits down to one stage after the other.

    Modules count in the order in which the network registers them.

    Args:
        model: The network, which stays as it is.
        layers: Stage -> module name, shallow to deep, as :func:`kdx.stages` returns.
        seed: Of the random weights.

    Yields:
        Name and network. ``logits``: the modules after the deepest stage are initialised anew; then the deepest stage
        with them, and so on. With the shallowest stage, everything is random.

    Raises:
        ValueError: A module with parameters that cannot be initialised (it has no ``reset_parameters``).
    """
    model = unwrapped(model)
    names = [name for name, _ in model.named_modules()]
    ends = [max(i for i, name in enumerate(names) if (name + ".").startswith(layer + ".")) for layer in layers.values()]
    starts = [0, *(end + 1 for end in ends)]
    network = copy.deepcopy(model)
    modules = list(network.modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        done = len(modules)
        for name, start in zip([LOGITS, *reversed(list(layers))], reversed(starts), strict=True):
            for place in range(start, done):
                if next(modules[place].parameters(recurse=False), None) is None:
                    continue
                reset = getattr(modules[place], "reset_parameters", None)
                if not callable(reset):
                    raise ValueError(f"{names[place]}: {type(modules[place]).__name__} has no reset_parameters")
                reset()
            done = start
            yield name, copy.deepcopy(network).eval()


def sanity(
    entries: Mapping[str, Explainer],
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    labels: Tensor,
    ignorant: nn.Module | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Similarity of the distilled maps of a student and of a randomised one.

    Args:
        entries: Name -> explainer, see :mod:`kdx.explain.explainers`.
        student: A network.
        base: The network that it is compared with.
        images: (n, c, h, w), normalised.
        labels: (n,) class indices.
        ignorant: The student's architecture, trained on random labels; compared as ``random labels``.
        seed: Of the random weights.

    Returns:
        explainer, randomised (as from :func:`cascade`, and ``random labels``), stage, measure (``rank correlation``,
        Spearman's over the pixels, and ``SSIM`` of maps scaled by their maximum on the images' pixels), value, low,
        high (95 % t interval over images), images: those where neither map is constant. 1 means that the map does not
        change.
    """
    layers = stages(student, images[:1])
    changed = list(cascade(student, layers, seed))
    if ignorant is not None:
        changed.append((LABELS, ignorant))
    right = {name: explain(student, base, images, labels).distilled for name, explain in entries.items()}
    rows = []
    for what, network in progress(changed, desc="sanity checks", unit="network"):
        for name, explain in entries.items():
            wrong = explain(network, base, images, labels).distilled
            for stage in layers:
                measures = {
                    "rank correlation": rank_correlation(right[name][stage], wrong[stage]),
                    "SSIM": similarity(right[name][stage], wrong[stage], images.shape[2:]),
                }
                for measure, values in measures.items():
                    rows.append((name, what, stage, measure, *mean_of_known(values.numpy())))
    columns = ["explainer", "randomised", "stage", "measure", "value", "low", "high", "images"]
    return pd.DataFrame(rows, columns=columns)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation over the pixels of two maps (n, h, w) of each image: (n,); NaN where a map is constant."""
    ranks = [torch.from_numpy(rankdata(m.flatten(1).numpy(), axis=1)) for m in (first, second)]
    return agreement(*(r.view(len(r), 1, -1) for r in ranks))


def similarity(first: Tensor, second: Tensor, size: tuple[int, ...]) -> Tensor:
    """SSIM (Wang et al. 2004) of two maps (n, h, w) of each image, scaled by their maximum and enlarged to ``size``:
    (n,); NaN where a map is constant."""
    from skimage.metrics import structural_similarity  # slow to import

    pictures = []
    for maps in (first, second):
        scaled = maps / maps.amax((1, 2), keepdim=True)
        pictures.append(F.interpolate(scaled[:, None], tuple(size), mode="nearest-exact")[:, 0].double().numpy())
    known = np.array([np.ptp(a) > 0 and np.ptp(b) > 0 for a, b in zip(*pictures, strict=True)])
    values = np.full(len(first), np.nan)
    if known.any():
        a, b = (p[known] for p in pictures)
        per_pixel = structural_similarity(a, b, channel_axis=0, data_range=1.0, full=True)[1]
        values[known] = per_pixel.mean((1, 2))
    return torch.from_numpy(values)


def indifferent(table: pd.DataFrame, limit: float = 0.5) -> list[str]:
    """Explainers whose maps do not depend on the weights: with all weights random, the 95 % interval of the rank
    correlation with the original maps lies above ``limit``, on the mean over stages, or maps are always constant."""
    last = table[(table["measure"] == "rank correlation") & (table["randomised"] == table["stage"].iloc[0])]
    lows = last.groupby("explainer", sort=False)["low"].mean()
    return lows[(lows > limit) | lows.isna()].index.tolist()
