"""Where units of a network exceed their thresholds, and what the masks of a probe hold there.

The parts of :func:`kdx.dissect`. Few pixels of a unit's map exceed its threshold, and interpolation never exceeds the
values that it lies between. So only cells with a corner above the threshold are interpolated, and what is found is kept
as a list of pixels, whose product with the masks is a count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse, stats
from torch import Tensor, nn

from kdx.data.broden import Probe
from kdx.networks.capture import activations
from kdx.networks.stages import stages
from kdx.networks.vision_transformers import to_grid

AT_ONCE = 2**20  # interpolated values, or counts, in memory


class Maps:
    """Feature maps of a network for the images of a probe. The arguments are those of :func:`kdx.dissect`.

    Attributes:
        shapes: Stage -> (k, h, w).
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        stage: str | Sequence[str] | None,
        normalize: Callable[[Tensor], Tensor],
        layers: Mapping[str, str] | None,
        rotation_seed: int | None,
    ) -> None:
        self.model, self.probe, self.normalize = model, probe, normalize
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        layers = layers or stages(model, self._images(torch.tensor([0])))
        wanted = [stage] if isinstance(stage, str) else list(layers) if stage is None else list(stage)
        if not wanted or (unknown := [name for name in wanted if name not in layers]):
            raise ValueError(f"stage: expected some of {', '.join(layers)}, got {', '.join(unknown) if wanted else []}")
        self.layers = {name: layers[name] for name in wanted}
        self.rotations: dict[str, Tensor] = {}
        self.shapes = {name: tuple(maps.shape[1:]) for name, maps in self.of(torch.tensor([0])).items()}
        if rotation_seed is not None:
            for name, (k, *_) in self.shapes.items():
                rotation = stats.ortho_group.rvs(k, random_state=rotation_seed) if k > 1 else np.ones((1, 1))
                self.rotations[name] = torch.from_numpy(rotation).float()

    @property
    def bytes_each(self) -> int:
        """Bytes of the maps of one image."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())

    def of(self, rows: Tensor) -> dict[str, Tensor]:
        """Stage -> float32 (n, k, h, w) of the images at ``rows`` (n,), rotated if asked for."""
        images = self._images(rows)
        found = {}
        for name, output in activations(self.model, images, self.layers).items():
            maps = to_grid(name, self.layers[name], output, images).float().cpu()
            if name in self.rotations:
                maps = torch.einsum("jk,nkhw->njhw", self.rotations[name], maps)
            found[name] = maps.contiguous()
        return found

    def _images(self, rows: Tensor) -> Tensor:
        return self.normalize(self.probe.read_images(rows).to(self.device))


class Largest:
    """The ``keep`` largest values of each unit, from any number of batches."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.values = np.empty((0, 0), dtype=np.float32)

    def add(self, maps: Tensor) -> None:
        """Take in feature maps, float32 (n, k, h, w)."""
        values = maps.movedim(1, 0).flatten(1).numpy()
        if self.values.size:
            values = np.concatenate([self.values, values], 1)
        if values.shape[1] > self.keep:
            values = np.partition(values, -self.keep, axis=1)[:, -self.keep :]
        self.values = values

    def thresholds(self, above: Sequence[int]) -> Tensor:
        """float32 (len(above), k): the values that at most so many others of a unit exceed. NaN and infinity are among
        the largest values if they occur at all."""
        ordered = np.sort(self.values, axis=1)
        return torch.from_numpy(np.stack([ordered[:, -1 - count] for count in above]))


def thresholds_of(
    network: Maps, order: Sequence[Tensor], quantiles: Sequence[float], held: dict[int, dict[str, Tensor]] | None
) -> dict[tuple[str, float], Tensor]:
    """(Stage, quantile) -> thresholds (k,): the largest values that at most the share q of all values exceed.

    Args:
        held: Receives the maps of every batch, unless it is None.
    """
    above = {}
    for name, (_, h, w) in network.shapes.items():
        values = h * w * len(network.probe)
        above[name] = [math.floor(q * values + 1e-9) for q in quantiles]
        if min(above[name]) < 1:
            raise ValueError(
                f"quantile {min(quantiles)} at {name}: expected at least {math.ceil(1 / min(quantiles))} activations "
                f"of a unit, got {values} ({len(network.probe)} images of {h} x {w} places); take more images, a "
                "larger quantile or an earlier stage"
            )
    largest = {name: Largest(max(counts) + 1) for name, counts in above.items()}
    for i, rows in enumerate(order):
        maps = network.of(rows)
        for name, of in maps.items():
            largest[name].add(of)
        if held is not None:
            held[i] = maps
    if wrong := [name for name in largest if not np.isfinite(largest[name].values).all()]:
        raise ValueError(f"{', '.join(wrong)}: expected finite activations, got NaN or infinity; check the network")
    return {
        (name, q): limit
        for name, counts in above.items()
        for q, limit in zip(quantiles, largest[name].thresholds(counts), strict=True)
    }


class Hits(NamedTuple):
    """Pixels at which units exceed their thresholds: index tensors of image, unit and pixel, and the values there."""

    image: Tensor
    unit: Tensor
    pixel: Tensor
    value: Tensor

    def beyond(self, thresholds: Tensor) -> Hits:
        """Those above higher thresholds (k,)."""
        keep = self.value > thresholds[self.unit]
        return Hits(*(part[keep] for part in self))


def exceeding(maps: Tensor, thresholds: Tensor, shape: tuple[int, int]) -> Hits:
    """The pixels at which feature maps, resized bilinearly with half-pixel centres, strictly exceed a threshold.

    Args:
        maps: float32 (n, k, h, w).
        thresholds: (k,).
        shape: Height and width to resize to.

    Returns:
        The pixels, as places in the flattened image.
    """
    (top, down), (left, across) = (_cells(fine, coarse) for fine, coarse in zip(shape, maps.shape[2:], strict=True))
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    high = padded > thresholds[:, None, None]
    high = high[..., 1:, :] | high[..., :-1, :]
    image, unit, y, x = (high[..., 1:] | high[..., :-1]).nonzero(as_tuple=True)
    rows, columns = padded.shape[2:]
    corner = ((image * maps.shape[1] + unit) * rows + y) * columns + x
    found = []
    for part in torch.arange(len(corner)).split(max(1, AT_ONCE // down.shape[1])):
        a, b, c, d = (padded.flatten()[corner[part] + step][:, None] for step in (0, 1, columns, columns + 1))
        ends = torch.stack([torch.addcmul(u, v - u, down[y[part]]) for u, v in ((a, c), (b, d))])
        limit = thresholds[unit[part], None]
        at, row = (ends.amax(0) > limit).nonzero(as_tuple=True)
        start, end = ends[:, at, row, None]
        values = torch.addcmul(start, end - start, across[x[part][at]])
        line, column = (values > limit[at]).nonzero(as_tuple=True)
        row, at = row[line], part[at[line]]
        pixel = (top[y[at]] + row) * shape[1] + left[x[at]] + column
        found.append(Hits(image[at], unit[at], pixel, values[line, column]))
    return Hits(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _cells(fine: int, coarse: int) -> tuple[Tensor, Tensor]:
    """How the pixels of a fine axis lie between the ``coarse`` centres, with one more at either end.

    Returns:
        int64 (coarse + 1,), the first pixel in each cell, and float32 (coarse + 1, m), the way of its pixels from its
        lower centre to its upper one, 0..1; NaN beyond the last of its pixels.
    """
    pixel = torch.arange(fine)
    position = (2 * pixel + 1) * coarse - fine  # in 2 * fine-ths of a cell, from the lowest centre
    cell = position.div(2 * fine, rounding_mode="floor") + 1
    counts = cell.bincount(minlength=coarse + 1)
    first = counts.cumsum(0) - counts
    way = torch.full((coarse + 1, int(counts.max())), torch.nan)
    way[cell, pixel - first[cell]] = position.remainder(2 * fine).float() / (2 * fine)
    return first, way


@dataclass(frozen=True)
class Segments:
    """Masks of a batch: in each image, segments of pixels that carry the same concepts.

    Attributes:
        of_pixel: int64 (n, pixels), the segment of each pixel.
        members: float32 (n, m, segments), 1 where a segment carries a concept of the image.
        concepts: int64 (n, m), the concepts of each image, from 1; 0 fills up.
        areas: float32 (n, m), the pixels of each concept.
        annotated: float32 (n, categories).
    """

    of_pixel: Tensor
    members: Tensor
    concepts: Tensor
    areas: Tensor
    annotated: Tensor


def segment(masks: Tensor, annotated: Tensor, concepts: int, shape: Sequence[int]) -> Segments:
    """The segments of masks, integers (n, layers, h, w) of 0 to ``concepts``, of which ``shape`` gives h and w.

    Raises:
        ValueError: Masks of another size, or with other numbers.
    """
    if masks.ndim != 4 or tuple(masks.shape[2:]) != tuple(shape):
        raise ValueError(
            f"masks: expected (n, layers, {shape[0]}, {shape[1]}) as those of the first image, got "
            f"{tuple(masks.shape)}; masks of a probe have one size"
        )
    if masks.numel() and not 0 <= int(masks.min()) <= int(masks.max()) <= concepts:
        raise ValueError(
            f"masks: expected 0 (no concept) to {concepts} (the last concept), got {int(masks.min())} to "
            f"{int(masks.max())}; correct the masks or add concepts to the probe"
        )
    found = [_segment(mask.flatten(1).long(), concepts) for mask in masks]
    most = max(len(kinds) for _, kinds in found)
    carried = torch.zeros(len(found), most, concepts + 1)
    for one, (_, kinds) in zip(carried, found, strict=True):
        one.scatter_(1, F.pad(kinds, (0, 0, 0, most - len(kinds))), 1.0)
    carried[:, :, 0] = 0
    present = carried.amax(1)
    widest = max(1, int(present.sum(1).max()))
    order = present.argsort(dim=1, descending=True, stable=True)[:, :widest]
    members = carried.gather(2, order[:, None].expand(-1, most, -1)).mT.contiguous()
    of_pixel = torch.stack([pixels for pixels, _ in found])
    sizes = torch.zeros(len(found), most).scatter_add_(1, of_pixel, torch.ones(of_pixel.shape))
    areas = (members @ sizes[:, :, None])[:, :, 0]
    return Segments(of_pixel, members, torch.where(present.gather(1, order) > 0, order, 0), areas, annotated.float())


def _segment(layers: Tensor, concepts: int) -> tuple[Tensor, Tensor]:
    """Of layers (l, pixels): the segment of each pixel (pixels,), and the numbers in each segment (segments, l)."""
    of_pixel, kinds = torch.zeros(layers.shape[1], dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)
    for layer in layers:
        of_pixel = of_pixel * (concepts + 1) + layer
        there = torch.zeros(len(kinds) * (concepts + 1), dtype=torch.long).scatter_(0, of_pixel, 1)
        of_pixel = (there.cumsum(0) - 1).gather(0, of_pixel)
        found = there.nonzero()
        kinds = torch.cat([kinds[found[:, 0] // (concepts + 1)], found % (concepts + 1)], 1)
    return of_pixel, kinds


class Tally:
    """Sums of intersections and areas for units of one stage at one quantile.

    Attributes:
        intersections: float64 (1 + permutations, concepts + 1, k), pixels of unit and concept. The first are those of
            the images' own masks; row 0 of the second axis has no meaning.
        areas: float64 (1 + permutations, categories, k), pixels of the unit that enter the union.
        sizes: int64 (k,), pixels of the unit in all images.
    """

    def __init__(self, probe: Probe, units: int, permutations: int, lite: bool) -> None:
        self.probe, self.units, self.lite = probe, units, lite
        self.intersections = torch.zeros(1 + permutations, len(probe.concepts) + 1, units, dtype=torch.float64)
        self.areas = torch.zeros(1 + permutations, len(probe.categories), units, dtype=torch.float64)
        self.sizes = torch.zeros(units, dtype=torch.long)
        self._found: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])

    def add(self, hits: Hits, segments: Segments, orders: Tensor, rows: Tensor) -> None:
        """Count hits against the images' own masks, and against those of other images.

        Args:
            hits: Of m images.
            segments: Of the n images of a batch.
            orders: int64 (1 + permutations, m): of each image, the one in the batch whose masks it meets.
            rows: int64 (m,), the images' places in the probe.
        """
        m, (widest, count) = len(rows), segments.members.shape[1:]
        at_once = AT_ONCE // max(m * count * max(self.units, widest), len(hits.image), 1)
        size = (hits.image * self.units + hits.unit).bincount(minlength=m * self.units).view(m, 1, self.units)
        self.sizes += size.sum((0, 1))
        for part in torch.arange(len(orders)).split(max(1, at_once)):
            order = orders[part]  # (p, m)
            concepts = segments.concepts[order]  # (p, m, c)
            both = self._product(hits, segments, order)
            entering = segments.annotated[order][..., None]
            if self.lite:
                kinds = torch.cat([torch.tensor([-1]), self.probe.category_of])[concepts]
                of_category = torch.arange(len(self.probe.categories))[:, None] == kinds[..., None, :]
                entering = (of_category.float() @ both > 0).float()
            areas = size * entering
            places = part[:, None, None] * self.intersections.shape[1] + concepts
            flat = self.intersections.view(-1, self.units)
            flat.index_add_(0, places.flatten(), both.view(-1, self.units).double())
            self.areas[part] += areas.double().sum(1)
            if part[0] == 0:
                self._keep(both[0], concepts[0], areas[0], rows)

    def _product(self, hits: Hits, segments: Segments, order: Tensor) -> Tensor:
        """Pixels that a concept of an image's partner in ``order`` (p, m) shares with a unit: float32 (p, m, c, k)."""
        (p, m), count = order.shape, segments.members.shape[2]
        found = segments.of_pixel[order[:, hits.image], hits.pixel]  # (p, hits)
        places = (torch.arange(p)[:, None] * m + hits.image) * count + found
        pixels = torch.zeros(p * m * count * self.units)
        pixels.scatter_add_(0, (places * self.units + hits.unit).flatten(), torch.ones(found.numel()))
        return segments.members[order] @ pixels.view(p, m, count, self.units)

    def _keep(self, both: Tensor, concepts: Tensor, areas: Tensor, rows: Tensor) -> None:
        both = both * (concepts > 0)[:, :, None]
        for found, values in zip(self._found, (both, areas), strict=True):
            image, place, unit = values.nonzero(as_tuple=True)
            which = place if values is areas else concepts[image, place] - 1
            found.append([values[image, place, unit], rows[image].int(), (which * self.units + unit).int()])

    def images(self) -> tuple[sparse.csr_array, sparse.csr_array]:
        """Intersections and areas of each image: sparse (n, concepts * k) and (n, categories * k), float32."""
        widths = len(self.probe.concepts) * self.units, len(self.probe.categories) * self.units
        matrices = []
        for found, width in zip(self._found, widths, strict=True):
            values, rows, columns = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
            matrices.append(sparse.csr_array((values, (rows, columns)), shape=(len(self.probe), width)))
        return matrices[0], matrices[1]
