"""What networks do when a cue is repainted: a ground truth that does not rest on how they were trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdx.data.cues import Scene
from kdx.distil.fit import evaluate
from kdx.planted.plantings import images_of

CLEAR = 0.2  # least difference of two changes of answers that are put in an order


def answers_to_cues(networks: dict[str, nn.Module], scene: Scene, n: int, seed: int) -> dict[str, Tensor]:
    """How much the answers of networks change when one cue is repainted and all else stays.

    Args:
        networks: Name -> network.
        scene: Description of the images.
        n: Number of images.
        seed: Draws them, as :func:`kdx.planted.plantings.images_of` does.

    Returns:
        Name -> (n, cues): the total variation between the probabilities of an image and of the repainted one, mean over
        the other values of the cue; in [0, 1].
    """
    before = _probabilities(networks, scene, n, seed, [0] * len(scene.cues))
    found = {name: torch.zeros(n, len(scene.cues), dtype=torch.float64) for name in networks}
    for cue in range(len(scene.cues)):
        for by in range(1, scene.values):
            turn = [by if other == cue else 0 for other in range(len(scene.cues))]
            for name, after in _probabilities(networks, scene, n, seed, turn).items():
                moved = (after - before[name]).abs().sum(1) / 2
                found[name][:, cue] += moved / (scene.values - 1)
    return found


def _probabilities(
    networks: dict[str, nn.Module], scene: Scene, n: int, seed: int, turn: list[int]
) -> dict[str, Tensor]:
    images = images_of(scene, n, seed, turn)
    return {name: evaluate(net, images, "cpu").logits.double().softmax(1) for name, net in networks.items()}


def order(sizes: Tensor, truth: Tensor, clear: float = 0.0) -> float:
    """The share of pairs within each row that two quantities put in the same order.

    Args:
        sizes: (n, m); equal sizes count one half.
        truth: (n, m).
        clear: Pairs whose truth differs by no more are left out.

    Returns:
        In [0, 1], 0.5 is chance; NaN where no pair is left.
    """
    rows, columns = torch.triu_indices(sizes.shape[1], sizes.shape[1], 1)
    expected, got = (of.double()[:, rows] - of.double()[:, columns] for of in (truth, sizes))
    kept = expected.abs() > clear
    agree = (expected.sign() * got.sign() + 1) / 2
    return float(agree[kept].mean())
