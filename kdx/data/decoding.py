"""Decoding one image file: checks, conversion to RGB, the middle square."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2

from kdx.data.folders import PLAIN, UNKNOWN, Item, Layout, RefusedError, stat_of
from kdx.paths import one_line

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # decoders of other formats may start other programs
LEAST_SIDE = 8  # pixels of an original
MOST_PIXELS = 50_000_000  # of an original; several are decoded at the same time
BACKGROUND = 10  # of 255: in a segmented picture, darker pixels are background with JPEG noise


def decode(path: Path | IO[bytes]) -> tuple[Image.Image, str]:
    """Decode an image file.

    Args:
        path: The path of the file, or the file opened for reading bytes.

    Returns:
        The upright RGB picture, and a note on the conversion; empty if there was none.

    Raises:
        RefusedError: The file is not an image that can be read completely, with 8 bits per channel, and of at least
            ``LEAST_SIDE`` pixels per side and at most ``MOST_PIXELS`` pixels.
        OSError: The file cannot be opened.
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
    except Exception as error:  # a decoder may raise any error on a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the machine, not of the file
        raise RefusedError(f"unreadable: {one_line(error)}") from error


def prepare_image(
    item: Item, layout: Layout = PLAIN, *, size: int
) -> tuple[np.ndarray, np.ndarray, str] | RefusedError:
    """Decode a file and its mask, and cut out their middle squares.

    Args:
        item: The file.
        layout: Where the file of its mask is.
        size: Pixels per side of the result.

    Returns:
        The image, uint8 (3, size, size), the mask, uint8 (1, size, size), and a note on conversions; or the reason why
        the file is refused. A mask is 1 on the object, 0 elsewhere, and ``UNKNOWN`` throughout if there is none.
    """
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
            note = (f"{note}; " if note else "") + f"mask refused: {reason}"
    return resize_square(picture, size), mask, note


def resize_square(
    picture: Image.Image, size: int, interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR
) -> np.ndarray:
    """The middle square of a picture, resized to ``size`` pixels per side: uint8 (channels, size, size)."""
    square = v2.CenterCrop(min(picture.size))
    transform = v2.Compose([square, v2.Resize((size, size), interpolation), v2.PILToTensor()])
    return transform(picture).numpy()
