"""What a training keeps after each epoch, so that one that was killed goes on from there, to the same weights."""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import default_restore_location

from kdx.paths import data_home, one_line

OLD = 30 * 24 * 3600  # seconds after which what no training went on from is deleted


class KeptWarning(UserWarning):
    """What an epoch ended with could not be written."""


class Kept:
    """The file of a training under way, beside the finished runs.

    Args:
        key: Of the run.
        device: On which it is trained. On one of another kind it begins anew.
    """

    def __init__(self, key: str, device: torch.device) -> None:
        self.path = data_home() / "runs" / f".{key}.{device.type}.partial"
        self._device, self._before, self._start = device, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """That the training took until now, without the times between its attempts."""
        return self._before + time.perf_counter() - self._start

    @property
    def epochs(self) -> int:
        """How many are done; 0 where the file cannot be read, of which :meth:`load` tells."""
        with suppress(Exception):
            return int(torch.load(self.path, map_location="meta", weights_only=True)["epochs"])
        return 0

    def load(self) -> dict[str, Any]:
        """What the last epoch ended with; {} where there is none yet.

        Raises:
            ValueError: The file is damaged.
        """
        try:
            state: dict[str, Any] = torch.load(self.path, map_location=self._place, weights_only=True)
            self._before = state.pop("seconds")
        except FileNotFoundError:
            return {}
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(
                f"what was kept of a training, {self.path}, is damaged ({one_line(error)}); delete that file to begin "
                "anew"
            ) from error
        with suppress(OSError):
            os.utime(self.path)  # it is in use
        return state

    def _place(self, storage: Any, location: str) -> Any:
        """What was on any GPU comes to that of this training; random states stay on the CPU."""
        return storage if location == "cpu" else default_restore_location(storage, str(self._device))

    def save(self, state: Mapping[str, Any]) -> None:
        """Put the state of the latest epoch in the place of that of the epoch before.

        Where it cannot be written, as on a full disk, a warning says so, and that of the epoch before stays.
        """
        scratch = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                torch.save({**state, "seconds": self.seconds}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)
        except (OSError, RuntimeError) as error:
            warnings.warn(
                f"{self.path}: not written ({one_line(error)}). The training goes on, but would lose its epochs if it "
                "were killed; free some space, or point KDX_HOME at another disk",
                KeptWarning,
                stacklevel=2,
            )
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)

    def drop(self) -> None:
        """Delete the file, since its training is over, and those of other trainings that are old."""
        self.path.unlink(missing_ok=True)
        for other in self.path.parent.glob(".*.partial"):
            with suppress(FileNotFoundError):  # its own training has just finished
                if time.time() - other.stat().st_mtime > OLD:
                    other.unlink()


def state_of(parts: Mapping[str, Any], generator: torch.Generator, epochs: int) -> dict[str, Any]:
    """All that the rest of a training depends on.

    Args:
        parts: Name -> modules, optimizers, schedules.
        generator: Of the order of images. That of torch for the CPU enters as well.
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
