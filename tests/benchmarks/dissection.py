"""Time of dissecting four stages of a ResNet-18: ``python tests/benchmarks/dissection.py [images] [subset]``.

Against bare forward passes and dense upsampling of the same stages to the masks, and against two ways to count with
loops over images and units, without their forward passes: that of NetDissect-Lite's code, which leaves out the maps
that exceed their threshold nowhere, resizes each other map by itself and looks its pixels up in the masks; and that of
the algorithm as it is written down, which intersects every map with every concept of the image. The loops run over
``subset`` of the images, and their time is scaled up to all of them. Images are of 112 px, as are the masks: a layer of
colours, one of objects that cover a tenth, and a texture of the whole image.

With 1,000 images and a subset of 200, some four minutes on one core.
"""

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import kdx
from kdx.data.broden import Probe
from kdx.measure.overlaps import Maps

SIZE, QUANTILE = 112, 0.005
COLOURS, OBJECTS, TEXTURES = 11, 100, 47
TURNS = 3  # the two sides alternate, and medians count


def normalize(images):
    return kdx.DATASETS["planted"].normalize(images)


def make_probe(n):
    """Smooth random images, with masks that have contours as real ones do."""
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(n, 3, 14, 14, generator=g), SIZE, mode="bicubic")
    images = (255 * (smooth + 0.1 * torch.randn(n, 3, SIZE, SIZE, generator=g)).clamp(0, 1)).byte()
    fields = F.interpolate(torch.randn(n, 2, 10, 10, generator=g), SIZE, mode="bilinear")
    colours = ((fields[:, 0] * 2 + 5.5).clamp(0, COLOURS - 1)).short() + 1
    kinds = torch.randint(1, OBJECTS + 1, (n, 1, 1), generator=g) + (fields[:, 0] > 0)
    objects = torch.where(fields[:, 1] > 0.8, COLOURS + kinds.clamp(max=OBJECTS), 0).short()
    textures = torch.randint(1, TEXTURES + 1, (n, 1, 1), generator=g) + COLOURS + OBJECTS
    masks = torch.stack([colours, objects, textures.expand(-1, SIZE, SIZE).short()], 1)
    counts = {"colour": COLOURS, "object": OBJECTS, "texture": TEXTURES}
    names = tuple(f"{name} {i}" for name, count in counts.items() for i in range(count))
    category_of = torch.arange(3).repeat_interleave(torch.tensor(list(counts.values())))
    annotated = torch.ones(n, 3, dtype=torch.bool)
    return Probe("benchmark", names, tuple(counts), category_of, annotated, images.__getitem__, masks.__getitem__)


def rows_of(probe):
    """Rows of as many images as one forward pass of kdx takes."""
    return torch.arange(len(probe)).split(max(1, 2**20 // (3 * SIZE**2)))


def floor(probe, maps):
    """Seconds of bare forward passes, and of upsampling the four stages to the masks."""
    kept = []
    hooks = [
        maps.model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
        for name in maps.layers.values()
    ]
    forward = upsampling = 0.0
    with torch.no_grad():
        for rows in rows_of(probe):
            start = time.perf_counter()
            maps.model(normalize(probe.read_images(rows)))
            forward += time.perf_counter() - start
            start = time.perf_counter()
            for output in kept:
                for one in output:  # an image at a time stays in the cache
                    F.interpolate(one[None], (SIZE, SIZE), mode="bilinear")
            upsampling += time.perf_counter() - start
            kept.clear()
    for hook in hooks:
        hook.remove()
    return forward, upsampling


def dissect(probe, maps):
    start = time.perf_counter()
    found = kdx.dissect(
        maps.model, probe, quantile=QUANTILE, union="lite", normalize=normalize, layers=maps.layers, permutations=0
    )
    return time.perf_counter() - start, found


def loops(probe, maps, limits, literally):
    """Seconds of counting by loops over images and units, and the largest IoU of each unit by stage."""
    labels, categories = len(probe.concepts) + 1, len(probe.categories)
    label_category = np.zeros((labels, categories), dtype=int)
    label_category[np.arange(1, labels), probe.category_of] = 1
    count, spent, tallies = every_concept if literally else by_pixels, 0.0, {}
    for rows in rows_of(probe):
        features, masks = maps.of(rows), probe.read_masks(rows).numpy()
        start = time.perf_counter()
        for stage, of in features.items():
            if stage not in tallies:
                tallies[stage] = [
                    np.zeros(labels, int),
                    *(np.zeros((of.shape[1], m), int) for m in (categories, labels)),
                ]
            shown, areas, both = tallies[stage]
            for image, pixels in zip(of.numpy(), masks, strict=True):
                shown += np.bincount(pixels.ravel(), minlength=labels)
                for unit, (feature, limit) in enumerate(zip(image, limits[stage], strict=True)):
                    if literally or feature.max() > limit:
                        large = np.asarray(Image.fromarray(feature).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
                        met, size = count(large > limit, pixels, labels)
                        met[0] = 0
                        both[unit] += met
                        areas[unit] += size * (met @ label_category > 0)
        spent += time.perf_counter() - start
    iou = {}
    for stage, (shown, areas, both) in tallies.items():
        each = both[:, 1:] / np.maximum(areas[:, probe.category_of] + shown[1:] - both[:, 1:], 1)
        iou[stage] = each.max(1)
    return spent, iou


def by_pixels(lit, pixels, labels):
    at = np.argwhere(lit)
    return np.bincount(pixels[:, at[:, 0], at[:, 1]].ravel(), minlength=labels), len(at)


def every_concept(lit, pixels, labels):
    met = np.zeros(labels, int)
    for label in np.unique(pixels):
        met[label] = (lit & (pixels == label).any(0)).sum()
    return met, lit.sum()


def main(images, subset):
    torch.manual_seed(0)
    model, probe = torchvision.models.resnet18(weights=None).eval(), make_probe(images)
    maps = Maps(model, probe, None, normalize, None, None)
    floor(probe[torch.arange(min(54, images))], maps)  # warms up
    times = [(*floor(probe, maps), dissect(probe, maps)[0]) for _ in range(TURNS)]
    forward, upsampling, ours = np.median(times, axis=0)
    ratio = np.median([each[2] / (each[0] + each[1]) for each in times])
    print(f"{images} images of {SIZE} px, four stages ({', '.join(f'{k} x {h}' for k, h, _ in maps.shapes.values())})")
    print(f"forward passes {forward:.2f} s, upsampling {upsampling:.2f} s, kdx.dissect in all {ours:.2f} s")
    print(f"kdx.dissect / (forward + upsampling): {ratio:.2f} (goal: at most 1.15)")
    found = dissect(probe, maps)[1].units
    limits = {stage: rows["threshold"].values for stage, rows in found.groupby("stage")}
    for way, literally in (("NetDissect-Lite's way", False), ("every map with every concept", True)):
        spent, iou = loops(probe[torch.arange(subset)], maps, limits, literally)
        spent *= images / subset
        print(f"loops, {way}: {spent:.1f} s beyond the forward passes ({subset} images, scaled up)")
        print(f"  loops / kdx: {spent / (ours - forward):.1f} without forward passes (goal: at least 30), "
              f"{(spent + forward) / ours:.1f} with them")  # fmt: skip
        if subset == images:
            differences = [np.abs(iou[stage] - rows["iou"]).max() for stage, rows in found.groupby("stage")]
            print(f"  largest difference of IoU: {max(differences):.1e}")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*(arguments + [1000, 200][len(arguments) :]))
