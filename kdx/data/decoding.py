"""One image file: decoded, checked, cut to a square."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2

from kdx.data.folders import PLAIN, UNKNOWN, Item, Layout, RefusedError, stat_of
from kdx.paths import one_line

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # others may run programs of their own
LEAST_SIDE = 8  # pixels of an original
MOST_PIXELS = 50_000_000  # of an original; several are held decoded at a time
BACKGROUND = 10  # of 255: darker is no leaf in a segmented picture, but for JPEG noise


def decode(path: Path | IO[bytes]) -> tuple[Image.Image, str]:
    """A file as an upright RGB picture, and what had to be done for it (empty: nothing).

    Raises:
        RefusedError: Not an image that can be read whole, with 8 bits a channel, and of a sensible size.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if min(picture.size) < LEAST_SIDE:
                raise RefusedError(f"smaller than {LEAST_SIDE} pixels: {picture.width} x {picture.height}")
            if math.prod(picture.size) > MOST_PIXELS:
                raise RefusedError(f"more than {MOST_PIXELS:,} pixels: {picture.width} x {picture.height}")
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise RefusedError(f"more than 8 bits a channel (mode {picture.mode})")
            picture.load()
            note = "" if picture.mode == "RGB" else f"converted from {picture.mode}"
            upright = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
                note = f"{note or 'transparent'}, laid on white"
            return upright.convert("RGB"), note
    except (RefusedError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise RefusedError("not an image") from error
    except Image.DecompressionBombError as error:
        raise RefusedError(f"far more than {MOST_PIXELS:,} pixels") from error
    except Exception as error:  # a decoder may fail in any way on what it did not expect
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's fault, not the file's
        raise RefusedError(f"unreadable: {one_line(error)}") from error


def prepare_image(
    item: Item, layout: Layout = PLAIN, *, size: int
) -> tuple[np.ndarray, np.ndarray, str] | RefusedError:
    """The image (3, size, size) and mask (1, size, size) in its middle, and a note."""
    try:
        picture, note = decode(item.path)
    except RefusedError as reason:
        return reason
    mask = np.full((1, size, size), UNKNOWN, np.uint8)
    if layout.mask_of and stat_of(path := layout.mask_of(item.path)):
        try:
            if path.resolve() != path or not path.is_file():
                raise RefusedError("not a regular file of its own")
            segmented, _ = decode(path)
            if segmented.size != picture.size:
                raise RefusedError(
                    f"{segmented.width} x {segmented.height} pixels, the image {picture.width} x {picture.height}"
                )
            object_ = Image.fromarray((np.asarray(segmented).max(2) > BACKGROUND).astype(np.uint8))
            mask = resize_square(object_, size, v2.InterpolationMode.NEAREST)
        except RefusedError as reason:
            note = f"{note}; " * bool(note) + f"mask refused: {reason}"
    return resize_square(picture, size), mask, note


def resize_square(
    picture: Image.Image, size: int, interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR
) -> np.ndarray:
    """The middle square, resized to ``size`` pixels a side, as (channels, size, size)."""
    square = v2.CenterCrop(min(picture.size))
    transform = v2.Compose([square, v2.Resize((size, size), interpolation), v2.PILToTensor()])
    return transform(picture).numpy()
