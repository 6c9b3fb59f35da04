"""Networks of your own: built by your functions, with weights from your files, and checked."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.transforms import v2

from kdx.data.dataset import check_normalisation
from kdx.networks.capture import forward, logits_of
from kdx.networks.fpn_detectors import rebuild
from kdx.networks.models import load_checkpoint
from kdx.networks.stages import evaluating, unwrapped
from kdx.paths import one_line

NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights
CHANCE = 0.001  # p up to which classes are taken for permuted
SHOWN = 3  # keys named in a message
Normalisation = Sequence[Sequence[float]]  # means and standard deviations of the channels, on the scale 0..1
NORMALISATIONS: dict[str, dict[int, Normalisation]] = {  # by the number of channels
    "imagenet": {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))},
    "cifar10": {3: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), 1: ((0.4809,), (0.2392,))},
    "half": {3: ((0.5,) * 3, (0.5,) * 3), 1: ((0.5,), (0.5,))},
    "none": {3: ((0.0,) * 3, (1.0,) * 3), 1: ((0.0,), (1.0,))},
}


def find_builder(where: str) -> Callable[[], Any]:
    """The function that ``"module:function"`` names, perhaps with arguments, as in
    ``"timm:create_model('vit_tiny_patch16_224')"``.

    Arguments are literals. Modules of the working directory are found as well.

    Raises:
        ValueError: Another form, no such module or function, arguments that are no literals.
    """
    module, colon, rest = where.partition(":")
    try:
        call = ast.parse(rest.strip(), mode="eval").body
        function, arguments, named = (
            (call.func, call.args, call.keywords) if isinstance(call, ast.Call) else (call, [], [])
        )
        positional = [ast.literal_eval(argument) for argument in arguments]
        by_name = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in named}
        name = ast.unparse(function)
        if not (colon and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])):
            raise ValueError("no names")
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            "expected module:function, such as mymodels:resnet or torchvision.models:resnet18(num_classes=10), got "
            f"{where!r}"
        ) from error
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        here_too = "; run this in the folder that holds it" if f"{module}.".startswith(f"{error.name}.") else ""
        raise ValueError(f"no module {error.name} for {where!r}{here_too}") from error
    except Exception as error:  # of code that is not ours
        raise ValueError(
            f"{where!r}: {module} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    for part in name.split("."):
        if (found := getattr(found, part, None)) is None:
            raise ValueError(f"{where!r}: {module} has no {name}")
    if not callable(found):
        raise ValueError(f"{where!r}: expected a function, got {type(found).__name__}")
    return partial(found, *positional, **by_name)


def load_own(build: str | Callable[[], nn.Module], weights: Path | str) -> nn.Module:
    """A network of your own, in evaluation mode on the CPU, in float32 whatever precision it was stored in.

    Args:
        build: A function that returns the network, or ``"module:function"`` as for :func:`find_builder`; ``""`` for a
            checkpoint of kdx, which knows its architecture.
        weights: A file of safetensors, or of ``torch.save(model.state_dict(), path)``. A state dict within a checkpoint
            (under state_dict or model, say) is found, and prefixes that all keys share, such as DataParallel's, are
            taken off.

    Raises:
        ValueError: No such file, one that only executing its code could open, keys or shapes that are not the
            network's, weights that are not finite, or a function that does not return a network.

    Examples:
        >>> import kdx, torch, tempfile
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), path)
        >>> kdx.load_own("torch.nn:Conv2d(3, 4, 1)", path)
        Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
    """
    if not build:
        if not Path(weights).is_file():
            raise ValueError(f"no file {weights}; expected a checkpoint")
        if not header_of(weights):
            raise ValueError(f"{weights}: not a checkpoint of kdx; say what builds its network, as module:function")
        trained = load_checkpoint(weights, rebuild)[0]
        _check_finite(Path(weights), trained.state_dict())
        return trained
    try:
        model = (find_builder(build) if isinstance(build, str) else build)()
    except ValueError:
        raise
    except Exception as error:  # of code that is not ours
        raise ValueError(f"build {build!r}: {one_line(error)} ({type(error).__name__})") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"build: expected a torch.nn.Module from {build!r}, got {type(model).__name__}")
    model = unwrapped(model).float()
    path = Path(weights)
    state = _read(path)
    wanted = model.state_dict()
    while not set(state) & set(wanted) and len(prefixes := {key.partition(".")[0] for key in state}) == 1:
        (prefix,) = prefixes  # of a wrapper, such as DataParallel's
        if any("." not in key for key in state):
            break
        state = {key.removeprefix(f"{prefix}."): tensor for key, tensor in state.items()}
    counts = {key: tensor for key, tensor in wanted.items() if key.endswith("num_batches_tracked")}
    state = counts | state  # files of old versions of torch have none, and evaluation does not use them
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
    model.load_state_dict(state)
    _check_finite(path, model.state_dict())
    return model.eval()


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    if bad := [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ValueError(f"{path}: weights that are NaN or infinite: {_first(bad)}; take an earlier checkpoint")


def header_of(weights: Path | str) -> dict[str, Any]:
    """The header of a checkpoint of kdx: architecture, classes, mean, std and, of trained networks, size.

    {} for any other file.
    """
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("kdx", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors ({error})") from error
    run = header.get("run", {})  # of a shipped network; those of the run store have a manifest
    if header and (manifest := path.with_name("manifest.json")).is_file():
        run = json.loads(manifest.read_text())
    if run:
        header["size"] = run["spec"]["input"]["size"][1]
    return header


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same weights."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_headers(
    headers: Mapping[str, Mapping[str, Any]], facts: Sequence[str] = ("classes", "mean", "std", "size")
) -> None:
    """Refuse checkpoints of kdx, by role or file, that differ in a fact that several of them state."""
    for fact in facts:
        said = {role: header[fact] for role, header in headers.items() if fact in header}
        if len({str(value) for value in said.values()}) > 1:
            raise ValueError(
                f"expected checkpoints that agree in {', '.join(facts)}, got the {fact} {said}; give others"
            )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no file {path}; expected a checkpoint")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected safetensors ({error})") from error
    with path.open("rb") as file:
        if not (zipfile.is_zipfile(path) or file.read(1) == b"\x80"):  # an archive, or a pickle
            raise ValueError(f"{path}: expected a checkpoint of torch or safetensors, found neither")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors, and would have to execute code of the file; save the weights alone, "
            "with safetensors.torch.save_file(model.state_dict(), path) or torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file may fail in any way
        raise ValueError(f"{path}: expected a checkpoint of torch or safetensors ({one_line(error)})") from error
    while isinstance(content, Mapping) and (
        inner := [content[k] for k in NESTED if isinstance(content.get(k), Mapping)]
    ):
        content = inner[0]
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not content:
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    return dict(content)


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return (", ".join(keys[:SHOWN]) or "none") + more


# --- do they fit? ------------------------------------------------------------------------------------


def channels_of(model: nn.Module, pixels: int) -> int:
    """Channels of the images that a network takes: 1 if its first layer takes one channel, or as many values as an
    image has ``pixels``; else 3."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Conv2d):
        return 1 if first.in_channels == 1 else 3
    return 1 if first is not None and first.in_features == pixels else 3


def named_normalisation(name: str, channels: int) -> Normalisation:
    """One of ``NORMALISATIONS``, or means and standard deviations as ``"0.49,0.48,0.45/0.25,0.24,0.26"``.

    Raises:
        ValueError: Another name, or numbers that do not fit the channels.
    """
    if name in NORMALISATIONS:
        return NORMALISATIONS[name][channels]
    try:
        numbers = [[float(number) for number in part.split(",")] for part in name.split("/")]
    except ValueError as error:
        raise ValueError(
            f"normalisation: expected {', '.join(NORMALISATIONS)}, or means/deviations such as "
            f"0.49,0.48,0.45/0.25,0.24,0.26, got {name!r}"
        ) from error
    return check_normalisation(numbers, channels)


def network_input(model: nn.Module, images: Tensor, normalisation: Normalisation = ()) -> Tensor:
    """Images as input of a network: normalised, on the device of its weights, grey if it takes one channel.

    Args:
        model: The network.
        images: uint8 (n, 3, h, w).
        normalisation: Means and standard deviations of the channels on the scale 0..1; () takes those of ImageNet.
    """
    weight = next(model.parameters(), None)
    if channels_of(model, images.shape[2] * images.shape[3]) == 1:
        images = v2.functional.rgb_to_grayscale(images)
    channels = images.shape[1]
    mean, std = check_normalisation(normalisation or NORMALISATIONS["imagenet"][channels], channels)
    scaled = v2.functional.normalize(v2.functional.to_dtype(images, scale=True), list(mean), list(std))
    return scaled if weight is None else scaled.to(weight.device)


def answers(model: nn.Module, images: Tensor, name: str, batch_size: int = 64) -> Tensor:
    """Logits float32 (n, classes) of a network.

    Raises:
        ValueError: The network does not take these images, gives no logits, or gives NaN.
    """
    found = []
    try:
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            for batch in images.split(batch_size):
                found.append(logits_of(forward(model, batch)).float())
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the {name} does not take images of {' x '.join(map(str, images.shape[1:]))}: {one_line(error)}; all "
            "networks are shown the same images, so give a size that all of them take (size)"
        ) from error
    logits = torch.cat(found).cpu()
    if logits.shape[1] < 2:
        raise ValueError(f"the {name} has one output; expected logits of two classes or more: wrap it to give (-z, z)")
    if not logits.isfinite().all():
        raise ValueError(f"the {name} answers with NaN or infinity; check its weights and the normalisation")
    return logits


def check_answers(logits: Mapping[str, Tensor]) -> None:
    """Refuse networks, by role, with different numbers of classes."""
    numbers = {role: z.shape[1] for role, z in logits.items()}
    if len(set(numbers.values())) > 1:
        raise ValueError(f"student and base must answer the same question, got outputs for classes: {numbers}")


def check_class_order(one: Tensor, other: Tensor, who: tuple[str, str]) -> bool:
    """Refuse two sets of class indices (n,) for the same classes that are numbered differently.

    That is the case if the permutation that matches most images has cycles, more than half of whose classes correspond
    by majority in both directions, and if more of the images of these classes follow it than have the same class in
    both, by more than chance: weak networks confuse classes, but do not permute them.

    Returns:
        whether there are enough images, 2 or more for at least half of the classes of ``one``.

    Raises:
        ValueError: Such classes.
    """
    there, back = _majorities(one, other), _majorities(other, one)
    moved: dict[int, int] = {}
    for cycle in _cycles(one, other):
        sure = {c: d for c, d in cycle.items() if there.get(c) == d and back.get(d) == c}
        if 2 * len(sure) > len(cycle):
            moved |= sure
    permuted = int(sum(((one == c) & (other == d)).sum() for c, d in moved.items()))
    same = int(sum(((one == c) & (other == c)).sum() for c in moved))
    if moved and stats.binomtest(permuted, same + permuted, alternative="greater").pvalue <= CHANCE:
        pairs = ", ".join(f"{c} there is {d} here" for c, d in list(moved.items())[:SHOWN])
        raise ValueError(
            f"{who[0]} and {who[1]} number the classes differently ({pairs}); bring them into one order, by permuting "
            "the rows of the last layer, or by naming the outputs in order (labels)"
        )
    counts = one.unique(return_counts=True)[1]
    return bool((counts >= 2).double().mean() >= 0.5)


def _cycles(one: Tensor, other: Tensor) -> list[dict[int, int]]:
    """The cycles of two or more classes in the permutation of ``one`` that matches ``other`` on most images, every link
    of which some images follow."""
    classes = 1 + int(torch.cat([one, other]).max())
    images = np.zeros((classes, classes))
    np.add.at(images, (one.numpy(), other.numpy()), 1)
    permutation = linear_sum_assignment(images + 0.5 * np.eye(classes), maximize=True)[1]
    found, seen = [], set()
    for start in range(classes):
        cycle, c = {}, start
        while c not in seen:
            seen.add(c)
            cycle[c] = int(permutation[c])
            c = cycle[c]
        if len(cycle) > 1 and all(images[a, b] for a, b in cycle.items()):
            found.append(cycle)
    return found


def _majorities(one: Tensor, other: Tensor) -> dict[int, int]:
    """Class of ``one`` with 2 or more images -> class that ``other`` gives to more than half of them."""
    found = {}
    for c in one.unique().tolist():
        values, counts = other[one == c].unique(return_counts=True)
        if counts.sum() >= 2 and 2 * int(counts.max()) > int(counts.sum()):
            found[c] = int(values[counts.argmax()])
    return found
