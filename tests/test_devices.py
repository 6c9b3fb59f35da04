import ctypes
import subprocess
import sys

import pytest
import torch

from kdx import build
from kdx.networks.devices import autocast, autocast_dtype, pick_device, placed, training_kernels
from tests.networks import at_once


def layout(model):
    return {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in model.state_dict().items()}


def test_placed_puts_every_tensor_back():
    model = build("resnet10", 3, "small", 0.125, seed=0)
    before, weight = layout(model), model.layer1[0].conv1.weight
    with placed(model, torch.device("cpu")):
        model.to(memory_format=torch.channels_last)
        assert layout(model) != before
        assert model.layer1[0].conv1.weight is weight
    assert layout(model) == before
    with pytest.raises(RuntimeError, match="on purpose"), placed(model, torch.device("cpu")):
        raise RuntimeError("on purpose")
    assert layout(model) == before


def test_narrow_strided_convolutions_do_without_onednn_where_it_damages_the_heap(monkeypatch):
    flags = torch.backends.mkldnn
    for processor, width, enabled in (("AVX2", 0.0625, False), ("AVX2", 0.125, True), ("AVX512", 0.0625, True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=processor: name)
        with training_kernels(build("resnet10", 3, "small", width, seed=0)):
            assert flags.enabled is enabled
        assert flags.enabled
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(RuntimeError, match="on purpose"), training_kernels(build("resnet10", 3, "small", 0.0625)):
        raise RuntimeError("on purpose")
    assert flags.enabled


def test_slow_depthwise_convolutions_are_trained_in_float32():
    """The result has the type of autocast, as without."""
    torch.manual_seed(0)
    slow = {
        "strided": dict(stride=2, padding=1), "large": dict(kernel_size=5, padding=2),
        "dilated": dict(dilation=2, padding=2), "several of each": dict(out_channels=16),
    }  # fmt: skip
    quick = {"simple": dict(padding=1), "dense": dict(stride=2, groups=1), "in groups": dict(stride=2, groups=4)}
    x = torch.randn(4, 8, 9, 9).bfloat16()
    for name, settings in (slow | quick).items():
        layer = torch.nn.Conv2d(8, **{"out_channels": 8, "kernel_size": 3, "groups": 8} | settings)
        exact = layer(x.float()).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(x)
            with training_kernels(layer):
                y, of_float32 = layer(input=x), layer(x.float())
            assert torch.equal(layer(x), rounded)
        assert not torch.equal(rounded, exact)
        assert torch.equal(y, exact if name in slow else rounded), name
        assert y.dtype == of_float32.dtype == torch.bfloat16
        with training_kernels(layer):
            assert torch.equal(layer(x.float()).bfloat16(), exact)  # there is no autocast
    layer = torch.nn.Conv2d(8, 8, 3, 2, groups=8)
    with pytest.raises(RuntimeError, match="on purpose"), training_kernels(layer):
        raise RuntimeError("on purpose")
    assert "forward" not in vars(layer)


def test_training_kernels_leave_other_convolutions_alone():
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Halved(torch.nn.Conv2d):
        def _conv_forward(self, *given):
            return super()._conv_forward(*given) / 2

    replaced = torch.nn.Conv2d(4, 4, 3, 2, groups=4)
    replaced.forward = lambda x: x
    others = [
        Doubled(4, 4, 3, 2, groups=4), Halved(4, 4, 3, 2, groups=4), replaced, torch.nn.Conv2d(1, 1, 3, 2),
        torch.nn.Conv2d(4, 4, 3, 2, groups=4).double(), torch.nn.Conv2d(4, 4, 3, 2, groups=4, device="meta"),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(4, 4, 3, 2, groups=4)),
    ]  # fmt: skip
    for layer in others:
        before = vars(layer).get("forward")
        with training_kernels(layer):
            assert vars(layer).get("forward") is before
        assert vars(layer).get("forward") is before
    wide = torch.nn.Conv2d(4, 4, 3, 2, groups=4)
    with torch.autocast("cpu", torch.bfloat16), training_kernels(wide):
        wide.double()
        assert wide(torch.ones(1, 4, 8, 8).double()).dtype == torch.float64


def test_placed_in_threads_puts_every_tensor_back(one_thread):
    model = build("resnet10", 3, "small", 0.125, seed=0)
    before = layout(model)

    def work(i):
        with placed(model, torch.device("cpu")):
            model.to(memory_format=torch.channels_last)
            return layout(model) != before

    assert all(found for _, found in at_once(work))
    assert layout(model) == before


def test_pick_device_names_what_it_does_not_know():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="unknown device 'gpu'; choose auto, cpu, cuda"):
        pick_device("gpu")


@pytest.mark.parametrize("fast", [True, False])
def test_the_processor_decides_the_precision(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu = torch.device("cpu")
    assert autocast_dtype(cpu) == (torch.bfloat16 if fast else torch.float32)
    assert autocast_dtype(torch.device("mps")) == torch.float32
    layer = torch.nn.Linear(3, 2)
    with autocast(cpu):
        assert layer(torch.ones(1, 3)).dtype == autocast_dtype(cpu)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's allocator alone has this option")
def test_reuse_memory_keeps_what_freed_tensors_held():
    script = """
import ctypes, torch
from kdx.networks.devices import reuse_memory
{}
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
torch.ones(2**23)  # 32 MB
print(mallinfo2().fordblks)
"""
    free = [
        int(subprocess.run([sys.executable, "-c", script.format(call)], capture_output=True, check=True).stdout)
        for call in ("", "reuse_memory()")
    ]
    assert free[0] < 2**25 < free[1]
