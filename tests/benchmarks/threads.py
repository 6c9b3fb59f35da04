"""Threads that share networks: 16 of them, 200 calls each of `stages`, `activations`, `grad_cam` and `unexplained`.

Networks begin in training mode, so that one that is put back too early gives other features. Half of the threads use
the pair in reverse order. One more thread runs plain forward passes of the user meanwhile, on a network in evaluation
mode. Prints wrong answers of every function, the exceptions among them, and whether the networks were left as they
were; then milliseconds per call in a single thread:  python tests/benchmarks/threads.py [THREADS] [CALLS]
"""

import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads share the cores; before torch is imported

import torch
import torchvision

import kdx

THREADS, CALLS = 16, 200


def pair():
    """Student, base, their images, and one reference set for either order."""
    student, base = (kdx.build("resnet10", 5, "small", width, seed=i) for i, width in enumerate((0.125, 0.25)))
    for network in (student, base):
        network(torch.rand(16, 3, 16, 16))  # running statistics unlike those of a batch
        network.layer2.eval()  # modes that differ
    x = torch.rand(4, 3, 16, 16)
    with torch.random.fork_rng():
        many = torch.rand(24, 3, 16, 16)
    references = [kdx.Reference(*networks, many) for networks in ((student, base), (base, student))]
    for reference in references:
        reference.regressions  # noqa: B018  fitted once, here
    return student, base, x, references


def works(student, base, x, references):
    """Name -> function of the number of a thread, each giving a dict."""
    networks = (student, base)
    layers = [kdx.stages(network, x) for network in networks]

    def unexplained(i):
        maps = kdx.unexplained(references[i % 2], x)
        return {
            (direction, s): m for direction in ("distilled", "residual") for s, m in getattr(maps, direction).items()
        }

    return {
        "stages": lambda i: kdx.stages(networks[i % 2], x),
        "activations": lambda i: kdx.activations(networks[i % 2], x, layers[i % 2]),
        "grad_cam": lambda i: kdx.grad_cam(networks[i % 2], x, 1),
        "unexplained": unexplained,
    }


def state(network):
    """All that a call could leave changed."""
    return {
        name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), *vars(module).keys())
        for name, module in network.named_modules()
    } | {
        name: (
            id(tensor),
            tensor.device.type,
            tensor.requires_grad,
            tensor.is_leaf and tensor.grad,
            *tensor.flatten().tolist(),
        )
        for tensors in (network.named_parameters(), network.named_buffers())
        for name, tensor in tensors
    }


def unchanged(network, before):
    try:
        return state(network) == before
    except NotImplementedError:  # a tensor without values
        return False


def same(one, other):
    return list(one) == list(other) and all(
        torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        for name, value in one.items()
    )


def shared(names, threads=THREADS, calls=CALLS):
    """Wrong answers, exceptions among them by type, whether the networks are unchanged, wrong forward passes of the
    user, and seconds; ``names`` are called in turn."""
    torch.manual_seed(0)
    student, base, x, references = pair()
    if user := (names == ["a forward pass of the user"]):
        student.eval()
        names = ["stages", "activations", "grad_cam"]
    todo = works(student, base, x, references)
    expected = {(name, i): todo[name](i) for name in names for i in range(2)}
    with torch.no_grad():
        logits = student(x) if user else None
    before = [state(network) for network in (student, base)]
    wrong, errors, plain = Counter(), Counter(), Counter()
    done, start = threading.Event(), threading.Barrier(threads + user)

    def run(thread):
        start.wait()
        for call in range(calls):
            name = names[call % len(names)]
            try:
                wrong[name] += not same(todo[name](thread % 2), expected[name, thread % 2])
            except Exception as error:  # whatever comes is counted
                wrong[name] += 1
                errors[type(error).__name__] += 1

    def forward():
        start.wait()
        while not done.is_set():
            plain["calls"] += 1
            try:
                with torch.no_grad():
                    plain["wrong"] += not torch.equal(student(x), logits)
            except Exception:
                plain["wrong"] += 1

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads + 1) as pool:
        other = pool.submit(forward) if user else None
        for task in [pool.submit(run, i) for i in range(threads)]:
            task.result()
        done.set()
        if other:
            other.result()
    left = all(unchanged(n, b) for n, b in zip((student, base), before, strict=True))
    return wrong, errors, left, plain, time.perf_counter() - begin


def single(rounds=60):
    """Median milliseconds of a call in one thread."""
    torch.manual_seed(0)
    for name, model, x in (
        (
            "resnet10@0.125, 8 x 32 px",
            kdx.build("resnet10", 10, "small", 0.125, seed=0).eval(),
            torch.rand(8, 3, 32, 32),
        ),
        ("resnet50, 4 x 224 px", torchvision.models.resnet50().eval(), torch.rand(4, 3, 224, 224)),
    ):
        layers = kdx.stages(model, x)
        calls = {
            "stages": lambda model=model, x=x: kdx.stages(model, x),
            "activations": lambda model=model, x=x, layers=layers: kdx.activations(model, x, layers),
            "grad_cam, stages given": lambda model=model, x=x, layers=layers: kdx.grad_cam(model, x, 1, layers),
            "grad_cam": lambda model=model, x=x: kdx.grad_cam(model, x, 1),
        }
        times = {call: [] for call in calls}
        for _ in range(rounds if len(x) == 8 else rounds // 6):
            for call, work in calls.items():
                begin = time.perf_counter()
                work()
                times[call].append(time.perf_counter() - begin)
        print(f"{name}: " + ", ".join(f"{call} {1000 * median(t):.2f} ms" for call, t in times.items()))


def main(threads=THREADS, calls=CALLS):
    functions = ["stages", "activations", "grad_cam", "unexplained"]
    for names in (*([name] for name in functions), functions, ["a forward pass of the user"]):
        wrong, errors, left, plain, seconds = shared(names, threads, calls)
        found = f"{wrong.total()} of {threads * calls} wrong"
        if plain:
            found += f", {plain['wrong']} of {plain['calls']} forward passes wrong"
        print(
            f"{' + '.join(names)}: {found}, networks {'unchanged' if left else 'CHANGED'}, {seconds:.0f} s",
            dict(errors) or "",
            flush=True,
        )
    single()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
