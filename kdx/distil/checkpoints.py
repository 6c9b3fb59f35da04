"""What a training keeps after each epoch, so that one that was killed goes on from there, to the same weights."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdx.paths import data_home, one_line

OLD = 30 * 24 * 3600  # seconds after which what no training went on from is deleted


class Kept:
    """The file of a training under way, beside the finished runs.

    Args:
        key: Of the run.
    """

    def __init__(self, key: str) -> None:
        self.path = data_home() / "runs" / f".{key}.partial"

    def load(self) -> dict[str, Any]:
        """What the last epoch ended with; {} where there is none yet.

        Raises:
            ValueError: The file is damaged.
        """
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return {}
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"what was kept of a training, {self.path}, is damaged ({one_line(error)}); delete that file to begin "
                "anew"
            ) from error

    def save(self, state: Mapping[str, Any]) -> None:
        """Put the state of the latest epoch in the place of that of the epoch before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}")
        try:
            torch.save(dict(state), scratch)
            os.replace(scratch, self.path)
        finally:
            scratch.unlink(missing_ok=True)

    def drop(self) -> None:
        """Delete the file, since its training is over, and those of other trainings that are old."""
        self.path.unlink(missing_ok=True)
        for other in self.path.parent.glob(".*.partial"):
            if time.time() - other.stat().st_mtime > OLD:
                other.unlink(missing_ok=True)


def state_of(parts: Mapping[str, Any], generator: torch.Generator, epochs: int) -> dict[str, Any]:
    """All that the rest of a training depends on.

    Args:
        parts: Name -> modules, optimizers, schedules.
        generator: Of the order of images. That of torch enters as well.
        epochs: How many are done.
    """
    return {name: part.state_dict() for name, part in parts.items()} | {
        "loose": {name: _loose(part) for name, part in parts.items() if isinstance(part, nn.Module)},
        "order": generator.get_state(),
        "random": torch.get_rng_state(),
        "epochs": epochs,
    }


def put_back(state: Mapping[str, Any], parts: Mapping[str, Any], generator: torch.Generator) -> int:
    """Bring all that :func:`state_of` took back to where it was; how many epochs are done."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
        if isinstance(part, nn.Module):
            for module, tensors in zip(part.modules(), state["loose"][name], strict=True):
                vars(module).update(tensors)
    generator.set_state(state["order"])
    torch.set_rng_state(state["random"])
    return int(state["epochs"])


def _loose(part: nn.Module) -> list[dict[str, Tensor]]:
    """Of each module in it, the tensors that are neither parameters nor buffers."""
    return [{name: value for name, value in vars(m).items() if isinstance(value, Tensor)} for m in part.modules()]
