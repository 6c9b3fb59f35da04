"""Single files: what is converted, what is refused by content."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.photographs import fill, picture, ready, reasons


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "photos", each=10)


def bomb(path, side=40_000):
    """A PNG of a few bytes that says it is `side` pixels wide and high."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    )


def strip(path):
    """A narrow picture that would be millions of pixels wide if its shorter side were enlarged."""
    Image.new("RGB", (1_000_000, 8), "red").save(path)


def test_hostile_content_is_refused_file_by_file(root, tmp_path):
    one = root / "one"
    (one / "text.jpg").write_text("not a picture")
    (root / "stray.png").write_bytes((one / "0.png").read_bytes())
    strip(one / "strip.png")
    (Path(os.fsdecode(os.fsencode(root) + b"/cl\xff"))).mkdir()
    for i in range(8):
        picture(900 + i).save(Path(os.fsdecode(os.fsencode(root) + b"/cl\xff")) / f"{i}.png")
    (one / "empty.jpg").touch()
    (one / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 50)
    bomb(one / "bomb.png")
    bomb(one / "big.png", 10_500)
    whole = tmp_path / "whole.jpg"
    picture(5, (200, 200)).save(whole)
    (one / "cut.jpg").write_bytes(whole.read_bytes()[:-4000])
    (tmp_path / "secret.png").write_bytes((one / "0.png").read_bytes())
    (one / "link.png").symlink_to(tmp_path / "secret.png")
    (one / "loop").symlink_to(root, target_is_directory=True)
    (one / "dangling.png").symlink_to(one / "nowhere.png")
    (root / "outside").symlink_to(tmp_path, target_is_directory=True)
    picture(6, (1, 1)).save(one / "dot.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(one / "deep.png")
    (one / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")
    (one / "copy.png").write_bytes((one / "0.png").read_bytes())
    os.mkfifo(one / "pipe.jpg")
    (one / "ничего 🙈.jpg").write_text("")
    (Path(os.fsdecode(os.fsencode(one) + b"/bad\xff.jpg"))).write_text("")
    picture(77).save(one / "имя с пробелом 🐈.png")
    prepared = ready(root)
    assert prepared.card["classes"] == ["cl\\xff", "one", "two"]
    assert reasons(prepared) == {
        "stray.png": "not in the folder of a class",
        "one/Thumbs.db": "not an image",
        "one/bad\\xff.jpg": "empty file",
        "one/big.png": "more than 50,000,000 pixels: 10500 x 10500",
        "one/bomb.png": "far more than 50,000,000 pixels",
        "one/copy.png": "the same pixels as one/0.png",
        "one/cut.jpg": reasons(prepared)["one/cut.jpg"],
        "one/dangling.png": "no regular file",
        "one/deep.png": "more than 8 bits a channel (mode I;16)",
        "one/dot.png": "smaller than 8 pixels: 1 x 1",
        "one/empty.jpg": "empty file",
        "one/link.png": "a link out of the folder",
        "one/loop": "a link to a folder",
        "one/pipe.jpg": "no regular file",
        "one/postscript.jpg": "not an image",
        "one/text.jpg": "not an image",
        "one/ничего 🙈.jpg": "empty file",
        "outside/": "a link out of the folder",
    }
    assert "unreadable: image file is truncated" in reasons(prepared)["one/cut.jpg"]
    assert "one/имя с пробелом 🐈.png" in set(prepared.files.loc[prepared.files["split"] != "", "file"])
    assert sum(prepared.card["counts"].values()) == 30  # 8 of the new class, the strip, the photograph of a cat
    assert prepared.card["refused"] == 18


def test_other_colours_are_converted_and_noted(root):
    for mode, name in {
        "L": "grey.png",
        "P": "palette.png",
        "CMYK": "print.jpg",
        "RGBA": "alpha.png",
        "1": "ink.png",
    }.items():
        picture(50 + len(name), mode=mode).save(root / "two" / name)
    prepared = ready(root)
    noted = prepared.files[prepared.files["note"] != ""].set_index("file")["note"].to_dict()
    assert noted == {
        "two/alpha.png": "converted from RGBA, laid on white",
        "two/grey.png": "converted from L",
        "two/ink.png": "converted from 1",
        "two/palette.png": "converted from P",
        "two/print.jpg": "converted from CMYK",
    }
    assert reasons(prepared) == {}


def test_photographs_are_turned_upright(tmp_path):
    root = fill(tmp_path / "photos")
    plain = picture(99, (32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    plain.save(root / "one" / "turned.png", exif=exif)
    prepared = ready(root)
    split = prepared.files.set_index("file").loc["one/turned.png", "split"]
    images = prepared.read(split)[0]
    upright = torch.from_numpy(np.asarray(plain.transpose(Image.Transpose.ROTATE_270)).copy()).permute(2, 0, 1)
    assert any(torch.equal(image, upright) for image in images)
