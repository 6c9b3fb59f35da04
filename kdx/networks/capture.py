"""Features at the stages of a network, and gradients with respect to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdx.networks.stages import evaluating, stages, unwrapped
from kdx.networks.threads import hooked, locked
from kdx.networks.vision_transformers import first_tensor, to_grid

CHUNK = {"cpu": 2**20, "gpu": 2**24}  # input values in one forward pass: 6 or 111 images of 224 x 224


class OverwrittenError(RuntimeError):
    """A layer that follows changed a captured output in place."""


def activations(
    model: nn.Module, images: Tensor, layers: Mapping[str, str], logits: str | None = None
) -> dict[str, Tensor]:
    """Outputs of named modules, from a forward pass in evaluation mode without gradients.

    Images are processed in chunks that suit the caches of the device. Threads may share a network: they take turns.

    Args:
        images: (n, c, h, w), normalised as the network expects.
        layers: Stage -> module name, as :func:`kdx.stages` returns.
        logits: A name under which the logits of the network, float32 (n, classes), are returned as well.

    Returns:
        stage -> output of its module (the first, of several): (n, k, h, w) for a convolutional stage, tokens (n, t, k)
        for one of a transformer.
    """
    model = unwrapped(model)
    check_input(model, images)
    at_once = CHUNK["cpu" if images.device.type == "cpu" else "gpu"]
    chunks = images.split(max(1, at_once // math.prod(images.shape[1:])))
    found: dict[str, Tensor] = {}
    copy = False
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        for i, chunk in enumerate(chunks):
            try:
                captured = _forward(model, chunk, layers, copy, logits)
            except OverwrittenError:
                copy = True
                captured = _forward(model, chunk, layers, copy, logits)
            if len(chunks) == 1:
                return captured
            for stage, output in captured.items():
                if i == 0:
                    found[stage] = output.new_empty(len(images), *output.shape[1:])
                found[stage][i * len(chunks[0]) :][: len(output)] = output
    return found


def forward(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """What a network makes of images (n, c, h, w), which it is given in channels-last memory format: convolutions on
    the CPU then take a third less time. A network that cannot take them so, since it reshapes features with ``view``,
    gets them contiguous."""
    with suppress(RuntimeError):  # what else may be wrong is raised below
        return model(images.contiguous(memory_format=torch.channels_last))
    return model(images.contiguous())


def _forward(
    model: nn.Module, images: Tensor, layers: Mapping[str, str], copy: bool, logits: str | None
) -> dict[str, Tensor]:
    with capture(model, layers, copy=copy) as captured:
        answer = forward(model, images)
    _check_called(model, layers, captured)
    for stage, output in captured.items():
        if output.ndim == 0 or len(output) != len(images):
            raise ValueError(
                f"{stage} ({layers[stage]}): expected a row for each of {len(images)} images, got {tuple(output.shape)}"
            )
    found = {stage: captured[stage].contiguous() for stage in layers}
    return found if logits is None else found | {logits: logits_of(answer).float()}


def _check_called(model: nn.Module, layers: Mapping[str, str], captured: Collection[str]) -> None:
    if missing := set(layers) - set(captured):
        raise ValueError(f"the forward pass of {type(model).__name__} never called {sorted(missing)}")


@contextmanager
def capture(
    model: nn.Module,
    layers: Mapping[str, str],
    gradients: bool = False,
    copy: bool = True,
    inputs: Collection[str] = (),
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named modules during the forward passes of this thread inside the block.

    Hooks are removed when the block ends, also by an exception. Until then, other threads wait before they change the
    network, see :class:`kdx.networks.threads.locked`.

    Args:
        layers: Stage -> module name, as :func:`kdx.stages` returns.
        gradients: Make outputs that need no gradient roots of the graph, so that a network without trainable parameters
            can be differentiated from the shallowest stage on.
        copy: The network goes on with a copy of each output, so in-place layers that follow leave what was captured as
            it was. False saves time and memory, and raises an :class:`OverwrittenError` at the end of the block if
            there was such a layer.
        inputs: Stages of which the first input of the module is collected, and not its output. If it works in place, it
            does not inside the block.

    Yields:
        dict: Stage -> output of its module, (n, k, h, w) for a convolutional stage, in the latest forward pass, and
            there in the module's latest call.
    """
    captured: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def keep(stage: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = first_tensor(output)
            if not isinstance(tensor, Tensor):
                kind = "input" if stage in inputs else "output"
                raise TypeError(f"{stage} ({layers[stage]}): expected a tensor {kind}, got {type(output).__name__}")
            if gradients and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            captured[stage] = tensor
            if copy or tensor.is_inference():
                versions.pop(stage, None)
                return (tensor.clone(), *output[1:]) if isinstance(output, tuple) else tensor.clone()
            versions[stage] = tensor._version
            return None

        def before(module: nn.Module, args: Any) -> Any:
            passed_on = hook(module, args, args[0] if args else None)
            return None if passed_on is None else (passed_on, *args[1:])

        return before if stage in inputs else hook

    with locked(model), ExitStack() as stack:
        modules = dict(model.named_modules())
        if missing := [name for name in layers.values() if name not in modules]:
            raise ValueError(f"no modules {missing} in {type(model).__name__}; see kdx.stages(model)")
        hooks: list[Any] = []
        for stage, name in layers.items():
            module = modules[name]
            if stage in inputs and getattr(module, "inplace", False):
                stack.callback(setattr, module, "inplace", True)
                module.inplace = False
            register = module.register_forward_pre_hook if stage in inputs else module.register_forward_hook
            hooks.append((name, register, keep(stage)))
        stack.enter_context(hooked(hooks))
        yield captured
        if changed := [stage for stage, version in versions.items() if captured[stage]._version != version]:
            raise OverwrittenError(f"layers that work in place have changed the outputs of {', '.join(changed)}")


def gradients(
    model: nn.Module,
    images: Tensor,
    objective: Callable[[Tensor], Tensor],
    layers: Mapping[str, str] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activations of every stage, and the gradient of a scalar function of the logits with respect to them.

    The network runs in evaluation mode and is left as it was found, as by :func:`grad_cam`. Threads may share it.

    Args:
        objective: Logits (n, classes) -> scalar.

    Returns:
        stage -> activations and gradients, float32 (n, k, h, w) both.
    """
    model = unwrapped(model)
    check_input(model, images)
    with torch.inference_mode(False), torch.enable_grad():
        images = _plain(images)
        layers = stages(model, images) if layers is None else layers
        with evaluating(model), capture(model, layers, gradients=True) as captured:
            frozen = {
                name: _plain(tensor)
                for tensors in (model.named_parameters(), model.named_buffers())
                for name, tensor in tensors
            }
            logits = logits_of(forward(lambda x: functional_call(model, frozen, (x,)), images))
        _check_called(model, layers, captured)
        value = objective(logits)
        if not layers or not value.requires_grad:
            raise ValueError(f"the logits do not depend on any of {layers}; choose modules on the way to them")
        found = torch.autograd.grad(value, list(captured.values()), allow_unused=True)
    by_stage = {}
    for (stage, activation), gradient in zip(captured.items(), found, strict=True):
        if gradient is None:
            raise ValueError(f"{stage} ({layers[stage]}): the logits do not depend on this module")
        activation, gradient = (to_grid(stage, layers[stage], values, images) for values in (activation, gradient))
        by_stage[stage] = (activation.detach().float().contiguous(), gradient.float().contiguous())
    return {stage: by_stage[stage] for stage in layers}


def logits_of(output: Any) -> Tensor:
    """The (n, classes) logits in what a network returned: ``logits`` or ``out`` where it has one
    of that name, else its only matrix."""
    named = output if isinstance(output, Mapping) else {k: getattr(output, k, None) for k in ("logits", "out")}
    for name in ("logits", "out"):
        if isinstance(value := named.get(name), Tensor) and value.ndim == 2:
            return value
    values = list(output.values()) if isinstance(output, Mapping) else output
    values = values if isinstance(values, (tuple, list)) else [values]
    matrices = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
    if len(matrices) == 1:
        return matrices[0]
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
    raise ValueError(
        f"expected one output of shape (n, classes), or one called logits, from the network; got {shapes[:3]}: "
        "wrap it in a module that returns the logits alone"
    )


def check_input(model: nn.Module, images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"expected float images (n, c, h, w), got {images.dtype} {tuple(images.shape)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"expected a plain module, got {type(model).__name__}; pass the network inside it")


def _plain(tensor: Tensor) -> Tensor:
    """Detached; an inference tensor is copied, since autograd may not save it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
