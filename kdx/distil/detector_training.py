"""The training of a detector: everything here decides its weights, as in :mod:`kdx.distil.training`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kdx.data.detection import Detection
from kdx.distil.checkpoints import put_back, state_of
from kdx.distil.detector_techniques import SeenPyramid
from kdx.distil.technique import Technique
from kdx.distil.training import Recipe, triangle
from kdx.networks.devices import training_kernels
from kdx.networks.fpn_detectors import Detector, learn, levels_of
from kdx.networks.stages import evaluating

MOST_GRADIENT = 10.0  # norm to which gradients of a step are cut


def train_detector(
    student: Detector,
    teacher: Detector | None,
    train: Detection,
    part: Technique,
    recipe: Recipe,
    seed: int,
    stepped: Callable[[], object],
    state: Mapping[str, Any] | None = None,
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Train a student in place, epoch by epoch, on the device that it is on.

    Images are mirrored at random. Gradients are cut to a norm of ``MOST_GRADIENT``.

    Args:
        student: The detector.
        teacher: For techniques that need one.
        train: Training images, on the CPU.
        part: The technique.
        recipe: Its sizes and augmentation play no part.
        seed: Of the order of images, the mirroring, the adapters and whatever the technique draws.
        stepped: Called after every step.
        state: What the last epoch of an interrupted training gave; its epochs are not repeated.

    Yields:
        Mean loss of each epoch, and the state, from which the training can go on exactly.
    """
    device = next(student.parameters()).device
    steps = len(train) // recipe.batch_size
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = _adapter(part, student, teacher, train, device)
        weights = [*student.parameters(), *adapter.parameters()]
        optimizer = torch.optim.SGD(
            weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        total = steps * recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: triangle(step, max(total, 1)))
        parts = {"student": student, "adapter": adapter, "optimizer": optimizer, "schedule": schedule}
        done = put_back(state, parts, generator) if state else 0
        for epoch in range(done, recipe.epochs):
            order = torch.randperm(len(train), generator=generator)[: steps * recipe.batch_size]
            losses = []
            with training_kernels(student):
                for rows in order.split(recipe.batch_size):
                    loss = _loss(part, student.train(), teacher, adapter, *_batch(train[rows], device), rows)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, MOST_GRADIENT)
                    optimizer.step()
                    schedule.step()
                    losses.append(loss.detach())
                    stepped()
            yield torch.stack(losses).mean().item(), state_of(parts, generator, epoch + 1)


def _batch(chosen: Detection, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (n, 3, h, w) in 0..1 and their targets, half of them mirrored."""
    images, width = chosen.images.float() / 255, chosen.size[1]
    mirrored = torch.rand(len(chosen)) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    targets = []
    for flip, boxes, labels in zip(mirrored.tolist(), chosen.boxes, chosen.labels, strict=True):
        if flip:
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    return images.to(device), targets


def _loss(
    part: Technique, student: Detector, teacher: Detector | None, adapter: nn.Module, images: Tensor,
    targets: list[dict[str, Tensor]], rows: Tensor,
) -> Tensor:  # fmt: skip
    loss, ours = learn(student, images, targets)
    if teacher is None:
        return loss
    with torch.no_grad(), evaluating(teacher):
        theirs = levels_of(teacher, images)
    boxes = [target["boxes"] for target in targets]
    seen = [_seen(levels, images, rows, boxes) for levels in (ours, theirs)]
    return loss + part.guidance(seen[0], seen[1], adapter)


def _seen(levels: dict[str, Tensor], images: Tensor, rows: Tensor, boxes: Sequence[Tensor]) -> SeenPyramid:
    nothing = images.new_zeros(len(images), 0)
    return SeenPyramid(nothing, levels, rows, rows[:0], boxes=boxes, size=(images.shape[2], images.shape[3]))


def _adapter(
    part: Technique, student: Detector, teacher: Detector | None, train: Detection, device: torch.device
) -> nn.Module:
    if teacher is None:
        return nn.Identity()
    images = train.images[:2].to(device) / 255
    with ExitStack() as stack, torch.no_grad():
        seen = []
        for detector in (student, teacher):
            stack.enter_context(evaluating(detector))
            seen.append(_seen(levels_of(detector, images), images, torch.arange(2), train.boxes[:2]))
    return (part.adapter(seen[0], seen[1], {}) or nn.Identity()).to(device)
