"""The registry of datasets: a card for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from kdx.data import cifar10, cues, folders, mnist, plantvillage, shapes
from kdx.data.download import archive_source
from kdx.data.folders import Layout


@dataclass(frozen=True)
class Card:
    """What is known of a dataset.

    For images in folders, classes, counts, mean and std are those of the prepared files; before preparation, the card
    lists the classes of the original.

    Attributes:
        name: The name in the registry; for a folder its own name.
        title: The name for readers.
        description: What the images show, and how they were made.
        classes: Names of the classes, in the order of the labels.
        size: (channels, height, width) of every image.
        counts: Images per split.
        mean: Mean of each channel of the training pixels, on the scale 0..1.
        std: Standard deviation of each channel of the training pixels, on the scale 0..1.
        licence: The licence of the images.
        citation: The publication to cite.
        homepage: The address of the original.
        augmentation: Transforms of training images, in order: arguments by the name of the transform, see
            :func:`kdx.data.dataset.augment`.
        read: ``read(folder, split, seed)`` returns (images, labels, masks or None).
        layout: Where the images of each class are; instead of ``read``.
        source: The folder of a dataset that is not in the registry.
        checksums: SHA-256 of pixels and labels per split (:func:`kdx.data.sources.fingerprint`); None for generated
            data, which are recomputed instead of stored, and for images in folders.
        sources: Functions ``get(folder, downloads)`` by name, tried in order. Each fills ``folder``, and keeps the
            received part of an interrupted download in ``downloads``; empty for generated data.
        download_bytes: Size of the download.
        preparation: How the files became images, as rows of the table for readers.
    """

    name: str
    title: str
    description: str
    classes: tuple[str, ...]
    size: tuple[int, int, int]
    counts: dict[str, int] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    licence: str = "not known"
    citation: str = "not known"
    homepage: str = ""
    augmentation: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"RandomHorizontalFlip": {}})
    read: Callable[[Path, str, int], tuple[Tensor, Tensor, Tensor | None]] | None = field(default=None, repr=False)
    layout: Layout | None = field(default=None, repr=False)
    source: Path | None = None
    checksums: dict[str, str] | None = field(default=None, repr=False)
    sources: dict[str, Callable[[Path, Path], None]] = field(default_factory=dict, repr=False)
    download_bytes: int = 0
    preparation: dict[str, str] = field(default_factory=dict, repr=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images to zero mean and unit variance per channel.

        Args:
            images: uint8 (n, c, h, w).

        Returns:
            float32 (n, c, h, w).

        Raises:
            TypeError: The images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8 images, got {images.dtype}")
        return v2.functional.normalize(v2.functional.to_dtype(images, scale=True), list(self.mean), list(self.std))

    def _repr_markdown_(self) -> str:
        c, h, w = self.size
        rows = {
            "classes": f"{len(self.classes)}: {', '.join(self.classes)}",
            "images": ", ".join(f"{n:,} {split}" for split, n in self.counts.items()) or "not prepared here",
            "size": f"{h} × {w}, {c} channels, 8 bit",
        }
        if self.mean:
            rows["channel mean"] = ", ".join(f"{m:.4f}" for m in self.mean)
            rows["channel standard deviation"] = ", ".join(f"{s:.4f}" for s in self.std)
        transforms = ", ".join(
            f"{name}({', '.join(f'{k}={v}' for k, v in a.items())})" for name, a in self.augmentation.items()
        )
        rows |= {
            "augmentation": transforms or "none",
            "sources, in order": ", ".join(["data/raw", *self.sources]) if self.sources else "generated",
            "licence": self.licence,
            "citation": self.citation,
        }
        if self.source:
            rows["sources, in order"] = "a folder"
        if self.homepage:
            rows["homepage"] = self.homepage
        for split, digest in (self.checksums or {}).items():
            rows[f"SHA-256 of {split} pixels and labels"] = f"`{digest[:16]}…`"
        rows |= self.preparation
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        return f"**{self.title}** (`{self.name}`). {self.description}\n\n| | |\n|---|---|\n{table}\n"


def find_card(name: str) -> Card:
    """The card of a dataset.

    Args:
        name: A name from ``DATASETS``, or the path of a folder with a subfolder of images for each class.

    Raises:
        ValueError: There is no dataset of this name and no such folder.
    """
    if name in DATASETS:
        return DATASETS[name]
    if (folder := Path(name).expanduser()).is_dir():
        return Card(
            name=folders.printable(folder.resolve().name),
            title=folders.printable(folder.resolve().name),
            description="Images in folders, one per class.",
            classes=(),
            size=(3, 96, 96),
            layout=Layout(),
            source=folder.resolve(),
        )
    raise ValueError(
        f"unknown dataset {name!r}; choose from: {', '.join(DATASETS)}; or give the path of a folder with a "
        f"subfolder of images for each class (there is none at {folder.absolute()})"
    )


DATASETS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="cifar10",
            title="CIFAR-10",
            description="Colour photographs of ten kinds of animals and vehicles, whole and lossless.",
            classes=cifar10.CLASSES,
            size=(3, 32, 32),
            counts={"train": 50_000, "test": 10_000},
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            licence="none stated by the authors; free for research with citation",
            citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
            homepage="https://www.cs.toronto.edu/~kriz/cifar10.html",
            augmentation={"RandomHorizontalFlip": {}, "RandomCrop": {"padding": 4, "padding_mode": "reflect"}},
            read=cifar10.read,
            checksums={
                "train": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
                "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
            },
            sources=cifar10.SOURCES,
            download_bytes=185_000_000,
        ),
        Card(
            name="mnist",
            title="MNIST",
            description="Handwritten digits, whole. The grey value stands in all three channels.",
            classes=mnist.CLASSES,
            size=(3, 28, 28),
            counts={"train": 60_000, "test": 10_000},
            mean=(0.1307,) * 3,
            std=(0.3081,) * 3,
            licence="none stated by the authors; free for research with citation",
            citation="LeCun, Bottou, Bengio & Haffner 1998, Gradient-based learning applied to document recognition",
            augmentation={},
            read=mnist.read,
            checksums={
                "train": "fc595827bd14bcf9561d474c431a5c4a5c07e6f411e239f69394e3e64010b7f1",
                "test": "16d1955310645826963ccb3460916d62e60dbc4bf949ce1a4bf89e2e08e79c06",
            },
            sources=mnist.SOURCES,
            download_bytes=11_500_000,
        ),
        Card(
            name="shapes",
            title="Shapes",
            description=(
                "Generated: three discs, three boxes and three tailed discs that differ in one part, "
                "and empty images, over dark, blurred or noisy backgrounds. Each image carries a mask "
                "of the object and of the part that distinguishes its class from its siblings."
            ),
            classes=shapes.CLASSES,
            size=(3, shapes.SIZE, shapes.SIZE),
            counts=shapes.COUNTS,
            mean=(0.2762, 0.2764, 0.2763),
            std=(0.2127, 0.2126, 0.2123),
            licence="MIT, as kdx",
            citation="after Tjoa & Guan 2020 and Han et al. 2023, appendices B.6 and D",
            homepage="",
            read=shapes.read,
        ),
        Card(
            name="planted",
            title="Planted cues",
            description=(
                "Generated: three independent cues at random places over noise, blur or 1/f texture; a class is one "
                "combination of their values. Bit i of an image's mask is set where cue i lies."
            ),
            classes=cues.Scene().classes,
            size=(3, cues.Scene().size, cues.Scene().size),
            counts=cues.COUNTS,
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            licence="MIT, as kdx",
            citation="kdx",
            augmentation={},
            read=cues.read,
        ),
        Card(
            name="petimages",
            title="PetImages (ASIRRA)",
            description=(
                "Some 25,000 photographs of cats and dogs that shelters had put up for adoption; the paper's ASIRRA. "
                "The original holds empty and damaged files, which are refused when it is prepared."
            ),
            classes=("cat", "dog"),
            size=(3, 96, 96),
            augmentation={"RandomHorizontalFlip": {}, "RandomResizedCrop": {"scale": [0.5, 1.0]}},
            licence="Microsoft Research; research and education",
            citation="Elson, Douceur, Howell & Saul 2007, Asirra",
            homepage="https://www.microsoft.com/en-us/download/details.aspx?id=54765",
            layout=Layout(("PetImages", "."), {"Cat": "cat", "Dog": "dog"}.get),
            sources={
                "Microsoft's download centre": archive_source(
                    "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
                    "kagglecatsanddogs_5340.zip",
                    "b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
                )
            },
            download_bytes=824_887_076,
        ),
        Card(
            name="plantvillage",
            title="PlantVillage",
            description=(
                "Some 54,300 photographs of single leaves on a plain ground, healthy or with one of 26 diseases. Where "
                "the folder `segmented` of the original repository is there, its pictures provide masks of the leaves; "
                "the download below has none. The split is by photograph, and several may show one leaf."
            ),
            classes=plantvillage.CLASSES,
            size=(3, 96, 96),
            augmentation={
                "RandomHorizontalFlip": {},
                "RandomVerticalFlip": {},
                "RandomResizedCrop": {"scale": [0.7, 1.0]},
            },
            licence="CC BY-SA 3.0",
            citation="Hughes & Salathé 2015, arXiv:1511.08060",
            homepage="https://github.com/spMohanty/PlantVillage-Dataset",
            layout=Layout(
                ("color", "raw/color", "Plant_leave_diseases_dataset_without_augmentation", "."),
                plantvillage.class_name,
                plantvillage.mask_of,
            ),
            sources={
                "Mendeley Data": archive_source(
                    "https://data.mendeley.com/public-files/datasets/tywbtsjrjv/files/"
                    "d5652a28-c1d8-4b76-97f3-72fb80f94efc/file_downloaded",
                    "ac3432453984d02a86197987e775a5429d0d59e7cc7c35bcf5a8f50349b90ff0",
                    "plantvillage.zip",
                )
            },
            download_bytes=868_032_562,
        ),
    )
}
