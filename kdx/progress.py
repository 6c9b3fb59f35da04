"""A progress bar, shown on a terminal and hidden in a rendered page or a log file."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

TERMINAL = "KDX_TERMINAL"  # environment variable by which `kdx run` and `kdx book` pass their terminal to the kernel


def terminal() -> str | None:
    """The path of the terminal of the user, or None if there is none."""
    if path := os.environ.get(TERMINAL):
        return path
    try:
        return os.ttyname(sys.stderr.fileno())
    except (OSError, ValueError):  # no terminal, or a replaced stderr
        return None


def progress(iterable: Any = None, **settings: Any) -> tqdm:
    """A progress bar on the terminal of the user, disabled if there is none.

    Args:
        iterable: What to iterate over; None: the caller updates the bar.
        **settings: Passed to :class:`tqdm.tqdm`.
    """
    try:
        file = open(terminal() or "", "w")  # noqa: SIM115
    except OSError:
        return tqdm(iterable, disable=True, **settings)
    return tqdm(iterable, file=file, leave=False, dynamic_ncols=True, **settings)
