"""Broden itself: where the original is, under which licence, and how a copy of it becomes a probe.

The archive is not downloaded by kdx: its authors publish no checksum of it, so it could not be verified. You download
it, and ``kdx data prepare broden --from PATH`` checks it. What is checked was tried on folders in the same layout; the
original itself was not at hand when this was written, so its numbers below are those that are published.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from kdx.data.broden import Probe, load_probe
from kdx.data.sources import place_copy
from kdx.paths import DataError, one_line, places

log = logging.getLogger(__name__)
READ = 16  # images and masks that are read when a copy is checked, evenly spaced


@dataclass(frozen=True)
class ProbeCard:
    """What is known of a probe set.

    Attributes:
        name: The name for :func:`kdx.load_probe`.
        title: The name for readers.
        description: What it holds.
        licence: Of the images and masks.
        citation: The publication to cite.
        homepage: The address of the original's code.
        archives: Addresses of the archives. They differ in the side of the images.
        md5: Name of an archive -> its MD5 as others recorded it; a clue, not a proof.
    """

    name: str
    title: str
    description: str
    licence: str
    citation: str
    homepage: str
    archives: tuple[str, ...]
    md5: dict[str, str]

    @property
    def how_to_get(self) -> str:
        """What to do if it is not on this machine."""
        return (
            f"download {' or '.join(self.archives)}, then `kdx data prepare {self.name} --from PATH`, with the archive "
            "or the folder that it unpacks to"
        )


BRODEN = ProbeCard(
    name="broden",
    title="Broden 1",
    description=(
        "The broadly and densely labelled data set: some 63,000 images with masks of colours, objects, parts, "
        "materials, scenes and textures, compiled from ADE20K, Pascal-Context, Pascal-Part, OpenSurfaces and the "
        "Describable Textures Dataset; 1,197 concepts."
    ),
    licence=(
        "none of its own is stated; images and masks are under the terms of the five sources, most of them for "
        "research alone, so they may not be passed on or shown"
    ),
    citation="Bau, Zhou, Khosla, Oliva & Torralba 2017, Network Dissection",
    homepage="https://github.com/CSAILVision/NetDissect",
    archives=tuple(f"http://netdissect.csail.mit.edu/data/broden1_{side}.zip" for side in (224, 227, 384)),
    md5={"broden1_224.zip": "be13c292eaef3300da03f8d0e48eab1c"},
)


def adopt_broden(origin: Path) -> Path:
    """Use a copy of the original, or any probe in its layout, under the name ``broden``.

    Args:
        origin: A folder, which is linked to, or an archive, which is unpacked. The tables may be one folder below.

    Returns:
        The folder or link in ``raw/``.

    Raises:
        DataError: There is nothing at ``origin``, it is not in Broden's layout or not whole, or ``raw/`` holds a probe
            of this name already.
    """
    known = BRODEN.md5.get(origin.name)
    if known and origin.is_file():
        with origin.open("rb") as file:
            if (got := hashlib.file_digest(file, "md5").hexdigest()) != known:
                log.warning("%s: others recorded the MD5 %s, got %s; its files are checked", origin.name, known, got)
    return place_copy(BRODEN.name, origin, _checked_root)


def prepare_broden(origin: Path | None = None) -> str:
    """Check the probe on this machine, or an own copy that is then used; return what was found, in a line.

    Raises:
        DataError: As for :func:`adopt_broden`, or there is no copy.
    """
    folder = adopt_broden(origin) if origin else find_broden()
    if folder is None:
        raise DataError(f"{BRODEN.name} is not on this machine: {BRODEN.how_to_get}")
    probe = check_copy(folder)
    return (
        f"{BRODEN.name}: {len(probe):,} images, {len(probe.concepts):,} concepts in {', '.join(probe.categories)}; all "
        f"files of its index are in {folder}"
    )


def find_broden() -> Path | None:
    """The folder of the probe on this machine, from the first of ``places()`` that has its tables."""
    return next((place / BRODEN.name for place in places() if (place / BRODEN.name / "index.csv").is_file()), None)


def check_copy(folder: Path) -> Probe:
    """The probe of a folder in Broden's layout, after a look at every file's name and at some of the files.

    Raises:
        DataError: Tables that contradict each other, files of the index that are missing, or files that cannot be read.
    """
    try:
        probe = load_probe(folder)
        missing = missing_files(folder)
        if missing:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise DataError(f"{folder}: expected every file of index.csv, found no {', '.join(missing[:3])}{more}")
        rows = torch.linspace(0, len(probe) - 1, min(READ, len(probe))).long()
        for row in rows.split(1):
            probe.read_images(row)
            probe.read_masks(row)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {one_line(error)}") from error
    return probe


def missing_files(folder: Path) -> list[str]:
    """Images and masks that the index names and ``images/`` lacks, sorted."""
    index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False)
    kinds = pd.read_csv(folder / "category.csv", dtype=str, keep_default_na=False)["name"]
    named = set(index["image"])
    for kind in kinds:
        named.update(part for field in index[kind] for part in field.split(";") if part and not part.isdecimal())
    root = folder / "images"
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return sorted(named - there)


def _checked_root(place: Path) -> Path:
    """The folder with the tables, in ``place`` or one below."""
    roots = [folder for folder in (place, *sorted(place.iterdir())) if (folder / "index.csv").is_file()]
    if not roots:
        raise DataError(f"{place.name}: expected a folder in Broden's layout, found no index.csv in it or one below")
    check_copy(roots[0])
    return roots[0]
