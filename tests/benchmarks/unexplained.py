"""Regressions, shares and maps of unexplained features: accuracy, coverage, memory, time, and patching.

python -m tests.benchmarks.unexplained ridge     shares of 0.25 by regressions on few rows
python -m tests.benchmarks.unexplained coverage  of the interval of unexplained_share
python -m tests.benchmarks.unexplained memory    peak of a fit, ResNet-18 at 96 px, by number of images
python -m tests.benchmarks.unexplained time      of kdx.unexplained, in forward passes of the pair
python -m tests.benchmarks.unexplained patches   agreement of maps and patches, shipped networks, CIFAR-10
"""

import resource
import statistics
import subprocess
import sys
import time
import timeit

import numpy as np
import torch
import torchvision

import kdx
from kdx.explain import regression
from kdx.explain.regression import Moments, share_left
from tests.test_regression import OLD_GRID, fit, of_factors


def ridge():
    grids = {"to 0.1": OLD_GRID, "to 1e4": regression.RIDGES}
    for rows, channels, of, factors in ((256, 512, 64, 20), (200, 100, 100, 10)):
        y, x = of_factors(rows + 3000, channels, of, factors, 0.5)
        for name, grid in grids.items():
            regression.RIDGES = grid
            found = fit(y[:rows], x[:rows])
            left = found.left_over(y[rows:], x[rows:]).square().sum() / (y[rows:] - y[rows:].mean(0)).square().sum()
            print(f"{rows} rows, {channels} regressors, grid {name}: {left:.3f}; warns: {found.limited}")
        many = fit(*of_factors(20000, channels, of, factors, 0.5, seed=1))
        left = many.left_over(y[rows:], x[rows:]).square().sum() / (y[rows:] - y[rows:].mean(0)).square().sum()
        print(f"20,000 rows: {left:.3f}; no rows could do better than 0.25")


def coverage(draws=1000):
    """Of what fits of this size leave over on average, by 95 % intervals with and without the fit's part."""
    for n, channels, folds in ((100, 10, 5), (100, 10, 10), (400, 10, 10), (100, 40, 10)):
        size, truth = n - n // folds, []
        for seed in range(10_000, 10_200):
            y, x = of_factors(size + 2000, channels, 5, 3, 0.5, seed=seed)
            left = fit(y[:size], x[:size]).left_over(y[size:], x[size:])
            truth.append(float(left.square().sum() / (y[size:] - y[size:].mean(0)).square().sum()))
        hits = np.zeros(2)
        for seed in range(draws):
            y, x = of_factors(n, channels, 5, 3, 0.5, seed=seed)
            share = share_left([Moments.of(y[i::folds], x[i::folds]) for i in range(folds)])
            half = share.high - share.mean
            plain = half * (1 + folds / (folds - 1)) ** -0.5
            hits += [abs(share.mean - np.mean(truth)) <= h for h in (half, plain)]
        with_fit, without = hits / draws
        print(f"n {n}, {channels} regressors, {folds} folds: {with_fit:.3f}, over folds alone {without:.3f}")


def memory():
    for n in (200, 400, 800):
        subprocess.run([sys.executable, "-m", "tests.benchmarks.unexplained", "peak", str(n)], check=True)


def peak(n):
    networks = [torchvision.models.resnet18(weights=None, num_classes=10).eval() for _ in range(2)]
    images = torch.randn(int(n), 3, 96, 96)
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    _ = kdx.unexplained(kdx.Reference(*networks, images[:20]), images[:1])
    before, start = used(), time.perf_counter()
    _ = kdx.Reference(*networks, images).regressions
    print(f"{n} images: {used() - before:.0f} MB more, {time.perf_counter() - start:.1f} s")


def median_ms(work, rounds=9):
    return 1000 * statistics.median(timeit.repeat(work, number=1, repeat=rounds))


def unexplained_time():
    pair = [kdx.load_network("cifar10", role) for role in ("response", "base")]
    wide = [torchvision.models.resnet18(weights=None, num_classes=10).eval() for _ in range(2)]
    for networks, size, n in ((pair, 32, 64), (pair, 32, 1), (wide, 112, 16)):
        images = torch.randn(64 + n, 3, size, size)
        reference, x = kdx.Reference(*networks, images[n:]), images[:n]
        layers = kdx.stages(networks[0], x[:1])
        kdx.unexplained(reference, x)
        maps = median_ms(lambda r=reference, x=x: kdx.unexplained(r, x))
        forwards = median_ms(lambda n=networks, x=x, s=layers: [kdx.activations(network, x, s) for network in n])
        check = median_ms(reference.check_weights)
        print(
            f"{n} images of {size} px: {maps:.0f} ms, {maps / forwards:.2f} forwards; check of weights {check:.1f} ms"
        )


def patches(n=48):
    test = kdx.load_dataset("cifar10", "test", limit=256 + n)
    x = test.card.normalize(test.images)
    for role in ("response", "second base"):
        pair = [kdx.load_network("cifar10", name) for name in (role, "base")]
        print(f"{role}, given the base and the reverse")
        table = kdx.patch_agreement(kdx.Reference(*pair, x[:256]), x[256:])
        table["cell"] = [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in table.itertuples()]
        print(table.pivot(index=["direction", "stage"], columns="quantity", values="cell").to_string())


JOBS = {
    "ridge": ridge,
    "coverage": coverage,
    "memory": memory,
    "peak": peak,
    "time": unexplained_time,
    "patches": patches,
}

if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
