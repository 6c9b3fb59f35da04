"""PlantVillage: names of the classes and masks of the leaves."""

from __future__ import annotations

import re
from pathlib import Path

CLASSES = (
    "Apple: Apple scab",
    "Apple: Black rot",
    "Apple: Cedar apple rust",
    "Apple: healthy",
    "Blueberry: healthy",
    "Cherry: Powdery mildew",
    "Cherry: healthy",
    "Corn: Cercospora leaf spot Gray leaf spot",
    "Corn: Common rust",
    "Corn: Northern Leaf Blight",
    "Corn: healthy",
    "Grape: Black rot",
    "Grape: Esca (Black Measles)",
    "Grape: Leaf blight (Isariopsis Leaf Spot)",
    "Grape: healthy",
    "Orange: Haunglongbing (Citrus greening)",
    "Peach: Bacterial spot",
    "Peach: healthy",
    "Pepper, bell: Bacterial spot",
    "Pepper, bell: healthy",
    "Potato: Early blight",
    "Potato: Late blight",
    "Potato: healthy",
    "Raspberry: healthy",
    "Soybean: healthy",
    "Squash: Powdery mildew",
    "Strawberry: Leaf scorch",
    "Strawberry: healthy",
    "Tomato: Bacterial spot",
    "Tomato: Early blight",
    "Tomato: Late blight",
    "Tomato: Leaf Mold",
    "Tomato: Septoria leaf spot",
    "Tomato: Spider mites Two-spotted spider mite",
    "Tomato: Target Spot",
    "Tomato: Tomato Yellow Leaf Curl Virus",
    "Tomato: Tomato mosaic virus",
    "Tomato: healthy",
)


def class_name(folder: str) -> str | None:
    """The class of a folder, or None if the folder is not a class.

    Example:
        >>> class_name("Cherry_(including_sour)___Powdery_mildew")
        'Cherry: Powdery mildew'
    """
    crop, found, disease = folder.replace("_", " ").partition("   ")
    name = f"{re.sub(r'[(].*[)]', '', crop).strip()}: {disease.strip()}"
    return name if found and name in CLASSES else None


def mask_of(image: Path) -> Path:
    """The picture of the leaf without background, in the folder ``segmented`` of the original, beside ``color``."""
    folder = image.parents[2] / "segmented" / image.parent.name
    return folder / f"{image.stem}_final_masked.jpg"
