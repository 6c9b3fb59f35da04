"""Images with boxes that tests share, in memory and as a folder in the layout of VOC."""

import numpy as np
import torch
from PIL import Image

from kdx.data.detection import Detection, DetectionCard


def squares(n=8, size=(64, 96), seed=0):
    """Images of noise with one bright square each, red or green; the last image is empty."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (n, 3, *size), generator=generator, dtype=torch.uint8)
    boxes, labels = [], []
    for i in range(n - 1):
        left, top = (int(torch.randint(0, side - 32, (), generator=generator)) for side in (size[1], size[0]))
        images[i, i % 2, top : top + 24, left : left + 24] = 255
        boxes.append(torch.tensor([[left, top, left + 24.0, top + 24.0]]))
        labels.append(torch.tensor([i % 2]))
    boxes.append(torch.zeros(0, 4))
    labels.append(torch.zeros(0, dtype=torch.int64))
    return Detection(images, tuple(boxes), tuple(labels), DetectionCard("squares", "Squares", ("red", "green")))


def voc_object(name, *corners):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def write_voc(folder, images, sets=None):
    """A folder of images (stem -> width, height, objects as text)."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, (width, height, objects) in images.items():
        write_picture(folder / "JPEGImages" / f"{stem}.jpg", width, height)
        text = (
            f"<annotation><filename>{stem}.jpg</filename><size><width>{width}</width><height>{height}</height></size>"
        )
        (folder / "Annotations" / f"{stem}.xml").write_text(text + "".join(objects) + "</annotation>")
    for name, stems in (sets or {}).items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")


def write_picture(path, width, height):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(path)
