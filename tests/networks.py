"""Networks that tests share, and threads that share networks."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from kdx import Recipe


class Small(nn.Module):
    """Three stages of ``width`` channels in a fraction of a second."""

    def __init__(self, width=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.c = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return x.mean((2, 3))


def fit_to_teacher(objective, batches, recipe=None, stepped=lambda: None):
    """All that adapters learn before the training of the student."""
    for i, fitter in objective.fitters(recipe or Recipe()).items():
        for epoch in range(objective.parts[i].fitting_epochs):
            objective.fit_to_teacher(i, epoch, fitter, batches, stepped)


def state(network):
    """All of a network that a call could leave changed, comparable."""
    modules = {
        name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), *vars(module))
        for name, module in network.named_modules()
    }
    tensors = {
        name: (id(tensor), str(tensor.device), tensor.requires_grad, tensor.stride(), tensor.tolist())
        for named in (network.named_parameters(), network.named_buffers())
        for name, tensor in named
    }
    return modules, tensors


def at_once(work, threads=8, calls=20):
    """(i, work(i)) of every call, by threads i that begin together and change places often."""
    start, interval = threading.Barrier(threads), sys.getswitchinterval()

    def run(i):
        start.wait()
        return [(i, work(i)) for _ in range(calls)]

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return [pair for task in [pool.submit(run, i) for i in range(threads)] for pair in task.result()]
    finally:
        sys.setswitchinterval(interval)


class Colours(nn.Module):
    """Answers with the mean amounts of some colour channels; its one stage holds them, mixed."""

    def __init__(self, channels, mix=None):
        super().__init__()
        mix = torch.eye(len(channels)) if mix is None else mix
        self.features = nn.Conv2d(3, len(mix), 1, bias=False)
        self.features.weight.data = (mix @ torch.eye(3)[list(channels)])[:, :, None, None]
        self.head = nn.Linear(len(mix), 3, bias=False)
        back = torch.zeros(3, len(channels))
        back[list(channels), range(len(channels))] = 1.0
        self.head.weight.data = back @ torch.linalg.pinv(mix)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


LAYERS = {"L1": "features"}


def blots(n, seed, strength=None):
    """Images with a red, a green and a blue pixel at random places, of one or random strength up to 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 3, 6, 6)
    places = torch.stack([torch.randperm(36, generator=generator)[:3] for _ in range(n)])
    for i in range(3):
        x.flatten(2)[torch.arange(n), i, places[:, i]] = strength or 2 * torch.rand(n, generator=generator)
    return x, places
