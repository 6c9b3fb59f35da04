"""The stages of any CNN, from one traced forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdx.networks.threads import hooked, locked
from kdx.networks.vision_transformers import Layer, token_stages


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of DataParallel or DistributedDataParallel; any other network is returned as it is."""
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return model.module if parallel else model  # type: ignore[return-value]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; at its end every module gets its own mode back.

    Other threads wait until then, see :class:`kdx.networks.threads.locked`.

    Raises:
        ValueError: A module refuses a mode, or modules were added or removed inside the block.
    """
    with locked(model):
        modes = {module: getattr(module, "training", False) for module in model.modules()}
        try:
            _set_modes(model, dict.fromkeys(modes, False))
            yield
        finally:
            _set_modes(model, modes)
        if changed := modes.keys() ^ set(model.modules()):
            kinds = sorted({type(module).__name__ for module in changed})
            raise ValueError(
                f"{type(model).__name__} adds or removes modules in its forward pass ({', '.join(kinds)}), which are "
                "then not in evaluation mode; make them in __init__, or call the network once before"
            )


def _set_modes(model: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Set ``training`` of all modules; then raise ValueError if any refused."""
    refused = {}
    for module, mode in modes.items():
        try:
            if getattr(module, "training", False) is not mode:  # frozen by torch.jit, it has none, and evaluates
                module.training = mode
                if module.training is not mode:
                    refused[module] = "it keeps its own"
        except Exception as error:  # of a property, or of compiled code
            refused[module] = str(error).partition("\n")[0]
    if refused:
        names = [
            f"{name or 'the network'} ({type(module).__name__}: {refused[module]})"
            for name, module in model.named_modules()
            if module in refused
        ]
        raise ValueError(
            f"{type(model).__name__}: expected modules whose mode (training or evaluation) can be set and put back; "
            f"refused by {', '.join(names)}"
        )


@dataclass(eq=False)
class _Call:
    """One call of a module during the traced forward pass: its tensors and the calls inside."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    children: list[_Call]

    @property
    def before(self) -> tuple[int, int] | None:
        return _resolution(self.input)

    @property
    def after(self) -> tuple[int, int] | None:
        return _resolution(self.output)


def _resolution(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.shape[2], tensor.shape[3])


def _feature_map(*values: Any) -> Tensor | None:
    """The first (n, c, h, w) tensor among a module's arguments, or its output."""
    return next((v for v in values if isinstance(v, Tensor) and v.ndim == 4), None)


def stages(
    model: nn.Module,
    images: Tensor | None = None,
    modules: Sequence[str] | None = None,
    reshape: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, str]:
    """Names of the modules whose outputs are the stages of a network: L1 (shallow) to L4 (deep).

    A stage ends with the last module before each spatial down-sampling, and with the last before pooling; the deepest
    four are kept. They are found in one traced forward pass. Pointwise layers (1x1 convolutions, norms) that open a
    down-sampling block belong to that block. Operations outside of modules (such as a sum of two branches) have no
    name: check the result for such networks, and name the stages yourself if necessary. A vision transformer has no
    change of resolution; its stages are the last blocks of the quarters of its depth. Threads may share a network.

    Args:
        model: Any CNN or plain vision transformer.
        images: (n, c, h, w), valid input of the network; only the first is used. None takes zeros of 224 x 224 with
            the channels of the first convolution.
        modules: Names as in ``model.named_modules()``, instead of the search.
        reshape: Function from a stage's output to feature maps (n, k, h, w), for outputs that are neither feature maps
            nor tokens (n, t, k) of a square. The returned names carry it with them.

    Returns:
        Stage -> module name.

    Raises:
        ValueError: An unknown module name, or a network without stages.

    Examples:
        >>> import kdx, torch
        >>> kdx.stages(kdx.build("resnet18", 10), torch.rand(1, 3, 64, 64))
        {'L1': 'layer1.1', 'L2': 'layer2.1', 'L3': 'layer3.1', 'L4': 'layer4.1'}
    """
    model = unwrapped(model)
    if reshape is not None:
        return {stage: Layer(name, reshape) for stage, name in stages(model, images, modules).items()}
    if modules is not None:
        known = dict(model.named_modules())
        if unknown := [name for name in modules if name not in known]:
            raise ValueError(f"unknown modules {unknown}; choose from: {', '.join(name for name in known if name)}")
        return {f"L{i}": name for i, name in enumerate(modules, 1)}
    if images is None:
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        if not convolutions:
            raise ValueError(f"{type(model).__name__} has no Conv2d; name its stages with modules=[...]")
        weight = convolutions[0].weight
        images = weight.new_zeros(1, convolutions[0].in_channels, 224, 224)
    root, counts = _trace(model, images[:1])
    units = _units(root)
    found: list[tuple[str, tuple[int, int]]] = []
    for unit, following in zip(units, [*units[1:], None][: len(units)], strict=True):
        if following is not None and unit.after == following.after:
            continue
        group = [u for u in units if u.after == unit.after and counts[u.name] == 1]
        if unit.after is None or unit.after == (1, 1) or not any(_has_weights(u) for u in group):
            continue
        found.append((_innermost(group[-1]), unit.after))
    shrinking = all(a >= b for (_, s), (_, t) in pairwise(found) for a, b in zip(s, t, strict=True))
    if len(found) < 2 or not shrinking:  # of a transformer, its patches at most
        with evaluating(model):
            if names := token_stages(model, images[:1]):
                return {f"L{i}": name for i, name in enumerate(names, 1)}
    if not found or not shrinking:  # (n, h, w, c) grows in its last dimension
        raise ValueError(
            f"{type(model).__name__}: found no sequence of shrinking feature maps (n, c, h, w); "
            "name its stages with modules=[...]"
        )
    return {f"L{i}": name for i, (name, _) in enumerate(found[-4:], 1)}


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)


class Tap(NamedTuple):
    """Where features are taken: at a module's output or input, and the batch norm before it."""

    module: str
    input: bool = False
    norm: nn.Module | None = None


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tap]:
    """The outputs of the stages of a CNN, in the form of :func:`pre_activations`."""
    return {stage: Tap(name) for stage, name in stages(model, images).items()}


def last_output(model: nn.Module, images: Tensor) -> dict[str, Tap]:
    """The output of the last stage alone, called ``last`` whatever the number of stages."""
    return {"last": list(outputs(model, images).values())[-1]}


def pre_activations(model: nn.Module, images: Tensor) -> dict[str, Tap]:
    """The stages of a CNN before their last activation function, if they end in one.

    The field ``norm`` is the batch norm whose output the features are. If they are a sum of branches, it is the batch
    norm at the end of the longest branch; None if there is none. An activation that is computed outside of modules
    cannot be found: its stage is taken after it.

    Args:
        model: Any CNN.
        images: (n, c, h, w), valid input of the network; only the first is used.

    Returns:
        Stage -> where its features are taken.

    Raises:
        ValueError: A network without stages.
    """
    root, _ = _trace(model, images[:1])
    leaves = list(_leaves(root))
    calls = {call.name: call for call in _calls(root)}
    taps = {}
    for stage, name in stages(model, images).items():
        call = calls[name]
        inside = [call] if not call.children else list(_leaves(call))
        last = inside[-1]
        activated = isinstance(last.module, ACTIVATIONS) and last.output is call.output
        tap, features = (Tap(last.name, True), last.input) if activated else (Tap(name), call.output)
        before = leaves[: leaves.index(last) + 1]
        norms = [c for c in before if isinstance(c.module, nn.BatchNorm2d)]
        direct = [c for c in norms if c.output is features]
        ends = direct or [c for c in norms if c in inside and c.module.num_features == features.shape[1]]
        longest = max(ends, key=lambda c: len(_chain(c, inside)), default=None)
        taps[stage] = tap._replace(norm=longest and longest.module)
    return taps


def _calls(call: _Call) -> Any:
    yield call
    for child in call.children:
        yield from _calls(child)


def _chain(end: _Call, calls: Sequence[_Call]) -> list[_Call]:
    """The calls that lead to ``end``, each taking the output of the one before."""
    chain = [end]
    while source := next((c for c in calls if c.output is chain[-1].input and c not in chain), None):
        chain.append(source)
    return chain


def _trace(model: nn.Module, image: Tensor) -> tuple[_Call, dict[str, int]]:
    """The tree of module calls of one forward pass, and how often each module was called.

    Only shapes matter, so the pass is one of a copy on the meta device, which holds no values and costs no arithmetic.
    A network that needs values, or cannot be copied, is run on the image itself.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        try:
            with locked(model):
                twin = _without_values(model)
            with _NormsUnseen():
                return _trace_calls(twin, image.to("meta"), modules)
        except Exception:
            try:
                with evaluating(model):
                    return _trace_calls(model, image, modules)
            except RuntimeError as error:
                raise ValueError(
                    f"stages: {type(model).__name__} does not take an input of {tuple(image.shape)}, {image.dtype}, "
                    f"on {image.device}; pass images as it expects them ({str(error).splitlines()[0]})"
                ) from error


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a network whose tensors are on the meta device; with its hooks, and in evaluation mode."""
    modules = list(model.modules())
    tensors = [value for m in modules for held in (m._parameters, m._buffers, vars(m)) for value in held.values()]
    known: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in tensors if isinstance(tensor, Tensor)}
    known |= {id(module): object.__new__(type(module)) for module in modules}
    for module in modules:  # as copy.deepcopy does, at half its time
        twin = vars(known[id(module)])
        for name, value in vars(module).items():
            if isinstance(value, str | int | float | None):
                twin[name] = value
            else:
                twin[name] = value.copy() if "_hooks" in name else copy.deepcopy(value, known)
        twin["training"] = False
    return known[id(model)]


class _NormsUnseen(TorchFunctionMode):
    """Batch norms return their input: torch is slow to trace them, and they change no shape."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.batch_norm:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def _trace_calls(model: nn.Module, image: Tensor, modules: Mapping[str, nn.Module]) -> tuple[_Call, dict[str, int]]:
    """Trace a forward pass of ``model``; calls name the module of that name in ``modules``."""
    root = _Call("", modules[""], None, None, [])
    stack, counts = [root], dict.fromkeys(modules, 0)

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = _Call(name, modules[name], _feature_map(*args, *kwargs.values()), None, [])
            counts[name] += 1
            stack[-1].children.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop().output = _feature_map(output)

    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append((name, partial(module.register_forward_pre_hook, with_kwargs=True), enter(name)))
        hooks.append((name, module.register_forward_hook, leave))
    with hooked(hooks):
        model(image)
    return root, counts


def _units(call: _Call) -> list[_Call]:
    """The chain of blocks on every path, opened until each contains one down-sampling step at most."""
    units = []
    for child in call.children:
        units += [child] if _is_unit(child) else _units(child)
    return [unit for unit in units if unit.before is not None and unit.after is not None]


def _is_unit(call: _Call) -> bool:
    if not call.children:
        return True
    if call.before is None or call.after is None:
        return False
    if call.before == call.after:
        return True
    # Resolutions on the way down; smaller ones are side branches such as squeeze-and-excitation.
    inner = list(_leaves(call))
    low = call.after
    sizes = {c.after for c in inner if c.after is not None and c.after[0] >= low[0] and c.after[1] >= low[1]}
    if len(sizes | {call.before, call.after}) > 2:
        return False
    steps = [c for c in inner if c.before == call.before and c.after == call.after]
    if len({id(c.input) for c in steps}) != 1:
        return True  # parallel branches step down: only the block's own input is common to all
    opening = inner[: next(i for i, c in enumerate(inner) if c is steps[0])]
    return not any(isinstance(c.module, nn.Conv2d) and max(c.module.kernel_size) > 1 for c in opening)


def _leaves(call: _Call) -> Any:
    for child in call.children:
        if child.children:
            yield from _leaves(child)
        else:
            yield child


def _has_weights(call: _Call) -> bool:
    return next(call.module.parameters(), None) is not None


def _innermost(call: _Call) -> str:
    """Descend plain containers to their last block: ``layer1`` -> ``layer1.1``."""
    while type(call.module) is nn.Sequential and call.children:
        call = call.children[-1]
    return call.name
