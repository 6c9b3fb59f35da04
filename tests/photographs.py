"""Folders of random pictures that tests share."""

import numpy as np
from PIL import Image

from kdx.data.folders import Layout
from kdx.data.prepared import prepare_folder


def picture(seed, size=(40, 32), mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def fill(root, classes=("one", "two"), each=8, start=0, **settings):
    """Write ``each`` pictures into a folder for each class; return ``root``."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            picture(1000 * c + i + start, **settings).save(root / name / f"{i}.png")
    return root


def pets(root, each=8):
    """A folder laid out as the dataset petimages."""
    return fill(root / "PetImages", ("Cat", "Dog"), each)


def ready(root, size=32):
    """``root``, prepared beside itself."""
    return prepare_folder("photos", root, Layout(), size, root.parent / "prepared")


def reasons(prepared):
    """File -> why it was refused."""
    bad = prepared.files[prepared.files["split"] == ""]
    return dict(zip(bad["file"], bad["note"], strict=True))
