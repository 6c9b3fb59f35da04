"""One progress bar: shown on a terminal, silent in a rendered page or a log file."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

TERMINAL = "KDX_TERMINAL"  # `kdx run` and `kdx book` pass their terminal on to the kernel


def terminal() -> str | None:
    """Path of the terminal that a person watches, or None."""
    if path := os.environ.get(TERMINAL):
        return path
    try:
        return os.ttyname(sys.stderr.fileno())
    except (OSError, ValueError):  # no terminal, or a replaced stderr
        return None


def progress(iterable: Any = None, **settings: Any) -> tqdm:
    """:class:`tqdm.tqdm` on :func:`terminal`, disabled where there is none."""
    try:
        file = open(terminal() or "", "w")  # noqa: SIM115
    except OSError:
        return tqdm(iterable, disable=True, **settings)
    return tqdm(iterable, file=file, leave=False, dynamic_ncols=True, **settings)
