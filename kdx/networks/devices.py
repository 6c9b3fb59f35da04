"""Which device computes, and in which precision."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kdx.networks.threads import locked


def pick_device(name: str | torch.device = "auto") -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:1, mps, ...") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def autocast(device: torch.device) -> Any:
    """Autocast to :func:`autocast_dtype`."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor has instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def reuse_memory() -> None:
    """Let this process keep the memory that it frees, for whatever it computes next.

    By default glibc returns each large tensor to the system, which then has to clear its pages again: up to half the
    time of a forward pass. It is meant for processes of our own: others may want the memory back. Elsewhere than with
    glibc nothing happens.
    """
    if sys.platform != "linux" or not hasattr(allocator := ctypes.CDLL(None), "mallopt"):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max = -1, -2, -3, -8
    for option, value in (
        (m_mmap_threshold, 2**28),  # larger tensors are few, and would leave gaps
        (m_trim_threshold, 2**31 - 1),
        (m_top_pad, 2**26),
        (m_arena_max, 1),
    ):
        allocator.mallopt(option, value)


@contextmanager
def training_kernels(model: nn.Module) -> Iterator[None]:
    """Inside the block, ``model`` is trained on a CPU without what oneDNN does badly, seen with its version 3.13.

    - On processors with AVX2 but without AVX-512, in float32 and channels-last memory format, the gradient of the
      weights of a strided 1x1 convolution of fewer than eight channels damages the heap. Networks that have one do
      without oneDNN.
    - In bfloat16, the gradients of depthwise convolutions that are strided, dilated, larger than 3x3 or of several
      channels for each of the input take up to fifty times as long as in float32. These convolutions are computed in
      float32. Do not copy or pickle the network inside the block.
    """
    narrow = any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride != (1, 1) and part.in_channels < 8
        for part in model.modules()
    )
    onednn: Any = torch.backends.mkldnn
    with ExitStack() as stack:
        if narrow and torch.backends.cpu.get_cpu_capability() == "AVX2":
            stack.callback(setattr, onednn, "enabled", onednn.enabled)
            onednn.enabled = False
        for part in filter(_slow_in_bfloat16, model.modules()):
            stack.callback(vars(part).pop, "forward", None)
            part.forward = types.MethodType(_in_float32, part)
        yield


def _slow_in_bfloat16(part: nn.Module) -> bool:
    """Whether it is such a depthwise convolution, of torch's own kind, with weights in float32 on the CPU."""
    if not isinstance(part, nn.Conv2d) or not part.groups == part.in_channels > 1:
        return False
    kind, weight = type(part), part._parameters.get("weight")
    own = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    simple = part.stride == part.dilation == (1, 1) and max(part.kernel_size) <= 3 and part.out_channels == part.groups
    plain = weight is not None and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return own and plain and not simple and "forward" not in vars(part)


def _in_float32(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu") or input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return nn.Conv2d.forward(convolution, input)
    with torch.autocast("cpu", enabled=False):
        return nn.Conv2d.forward(convolution, input.float()).to(torch.get_autocast_dtype("cpu"))


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block a network is on ``device``; afterwards its tensors are those of before, in their memory format.

    Inside, nothing may change their values: a change would be lost. Other threads wait until the end, see
    :class:`kdx.networks.threads.locked`.
    """
    with locked(model):
        parameters = [(parameter, parameter.data) for parameter in model.parameters()]
        buffers = [(module, dict(module._buffers)) for module in model.modules()]
        try:
            model.to(device)
            yield
        finally:
            for parameter, data in parameters:
                parameter.data = data
            for module, found in buffers:
                module._buffers.update(found)
