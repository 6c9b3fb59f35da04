"""What do Grad-CAM maps at four stages cost? ResNet-50, 16 images of 224 x 224.

The floor is one forward and one backward pass of the frozen network, differentiated down to L1
and no further. Prints medians and ratios of one run:  python tests/benchmarks/grad_cam.py
"""

import time
from statistics import median

import torch
import torchvision
from captum.attr import LayerGradCam

import kdx

ROUNDS = 7
x, target = torch.rand(16, 3, 224, 224), torch.arange(16)
model = torchvision.models.resnet50(weights=None).eval().requires_grad_(False)


def floor():
    with torch.no_grad():
        a = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    a.requires_grad_()
    logits = model.fc(model.avgpool(model.layer4(model.layer3(model.layer2(a)))).flatten(1))
    torch.autograd.grad(logits.gather(1, target[:, None]).sum(), a)


def captum():
    for name in kdx.stages(model, x).values():
        LayerGradCam(model, model.get_submodule(name)).attribute(x, target, relu_attributions=True)


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    jobs = {"floor": floor, "kdx": lambda: kdx.grad_cam(model, x, target)}
    for work in jobs.values():
        work()  # warm up
    times = {name: [] for name in jobs}
    for _ in range(ROUNDS):  # in turn, so that a busy moment hits all alike
        for name, work in jobs.items():
            times[name].append(seconds(work))
    kdx_to_floor = median(a / b for a, b in zip(times["kdx"], times["floor"], strict=True))
    peer = seconds(captum)
    print(f"one forward and backward down to L1: {median(times['floor']):.3f} s")
    print(f"kdx.grad_cam, four stages: {median(times['kdx']):.3f} s, {kdx_to_floor:.3f} x")
    print(f"captum, four stages: {peer:.3f} s, {peer / median(times['kdx']):.1f} x kdx")
