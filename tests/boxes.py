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


def voc_object(name, *corners, difficult=0):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


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


def write_cells(folder, n=24):
    """Red discs and a violet one on a light ground, as photographs of blood cells, in the layout of VOC."""
    rng = np.random.default_rng(0)
    places = [(x, y) for x in range(16, 240, 56) for y in range(16, 176, 56)]
    images = {}
    pictures = {}
    for i in range(n):
        picture = np.full((192, 256, 3), (235, 225, 215), np.uint8)
        objects = []
        for j in rng.permutation(len(places))[:5]:
            x, y = (int(place + rng.integers(0, 8)) for place in places[j])
            kind, side, colour = ("WBC", 44, (110, 70, 160)) if not objects else ("RBC", 32, (215, 130, 120))
            down, across = np.mgrid[:192, :256]
            inside = (across - x - side / 2) ** 2 + (down - y - side / 2) ** 2 < side**2 / 4
            picture[inside] = colour
            objects.append(voc_object(kind, x, y, x + side, min(y + side, 192)))
        images[f"cell{i:02}"], pictures[f"cell{i:02}"] = (256, 192, objects), picture
    write_voc(folder, images)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / "JPEGImages" / f"{name}.jpg")


def write_picture(path, width, height):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(path)
