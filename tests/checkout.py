"""The sources of the book, for tests that build pages elsewhere."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks")


def copy_sources(folder):
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("executed", "_build"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder
