"""Networks that kdx did not train: built by a function of yours, with weights from a file of yours."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights
SHOWN = 3  # keys named in a message


def find_builder(where: str) -> Callable[[], nn.Module]:
    """The function of ``"module:function"``; modules of the working directory are found as well."""
    module, colon, name = where.partition(":")
    if not (module and colon and name):
        raise ValueError(f"build: expected module:function, such as mymodels:resnet, got {where!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"build: no module {error.name} for {where!r}; run this in the folder that holds it"
        ) from error
    for part in name.split("."):
        if (found := getattr(found, part, None)) is None:
            raise ValueError(f"build: {module} has no {name}")
    if not callable(found):
        raise ValueError(f"build: expected a function that returns a network, got {type(found).__name__} {where}")
    return found


def load_own(build: str | Callable[[], nn.Module], weights: Path | str) -> nn.Module:
    """A network of your own, in evaluation mode on the CPU.

    Parameters
    ----------
    build : what returns the network, or ``"module:function"``.
    weights : a file of safetensors, or of ``torch.save(model.state_dict(), path)``. A state dict within a
        checkpoint (under state_dict or model, say) and the prefix of DataParallel are found.

    Raises
    ------
    ValueError : no such file, one that only executing its code could open, keys or shapes that are not the
        network's, weights that are not finite, or a function that does not return a network.
    """
    model = (find_builder(build) if isinstance(build, str) else build)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"build: expected a torch.nn.Module from {build}, got {type(model).__name__}")
    path = Path(weights)
    state = _read(path)
    wanted = model.state_dict()
    if missing := [key for key in wanted if key not in state]:
        unexpected = [key for key in state if key not in wanted]
        raise ValueError(
            f"{path}: not the weights of this {type(model).__name__}; missing {_first(missing)}; unexpected "
            f"{_first(unexpected)}"
        )
    if unexpected := [key for key in state if key not in wanted]:
        raise ValueError(
            f"{path}: more than the weights of this {type(model).__name__}; unexpected {_first(unexpected)}"
        )
    if wrong := [key for key in wanted if wanted[key].shape != state[key].shape]:
        found = f"{wrong[0]}: {tuple(state[wrong[0]].shape)} where the network has {tuple(wanted[wrong[0]].shape)}"
        raise ValueError(f"{path}: weights of other shapes: {found}, and {len(wrong) - 1} more")
    if bad := [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ValueError(f"{path}: weights that are NaN or infinite: {_first(bad)}; take an earlier checkpoint")
    model.load_state_dict(state)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no file {path}; expected a checkpoint")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected safetensors ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors, and would have to execute code of the file; save the weights alone, "
            "with safetensors.torch.save_file(model.state_dict(), path) or torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected a checkpoint of torch or safetensors ({error})") from error
    while isinstance(content, Mapping) and (
        inner := [content[k] for k in NESTED if isinstance(content.get(k), Mapping)]
    ):
        content = inner[0]
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not content:
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return (", ".join(keys[:SHOWN]) or "none") + more
