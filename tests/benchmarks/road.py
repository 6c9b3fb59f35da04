"""Time of ROAD's imputation: 64 images of 224 x 224 and 512 of 32 x 32, half of the pixels kept.

pytorch_grad_cam's NoisyLinearImputer solves the same system directly (scipy's sparse LU in float64), image by image.
It runs on 8 images, and its time is scaled to the batch. Errors are measured against its solution. Prints medians of
one run:  python tests/benchmarks/road.py
"""

import time
from statistics import median

import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer

from kdx.explain.road import impute, keep_mask

ROUNDS, SAMPLE = 5, 8


def blobs(n):
    """Maps like Grad-CAM's at L4, (n, 7, 7): one or two smooth bumps."""
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    centres = 6 * torch.rand(2, n, 2, 1, 1)
    bumps = torch.exp(-((y - centres[:, :, 0]) ** 2 + (x - centres[:, :, 1]) ** 2) / 4)
    return bumps[0] + bumps[1] * (torch.rand(n, 1, 1) < 0.5)


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rows():
    """One dict per workload: work, peer, ours_s, peer_s (seconds per batch), ratio, error (images of range 0 to 1)."""
    torch.manual_seed(0)
    found, peer = [], NoisyLinearImputer(noise=0)
    for n, size in ((64, 224), (512, 32)):
        images = torch.rand(n, 3, size, size)
        for kind, maps in (("random masks", torch.rand(n, size, size)), ("Grad-CAM-shaped masks", blobs(n))):
            kept = keep_mask(maps, (size, size))
            ours = impute(images, kept)  # warm up
            times, peer_times, error = [], [], 0.0
            for i in range(SAMPLE):  # alternating, so that a busy moment affects both
                start = time.perf_counter()
                theirs = peer(images[i], kept[i].float())
                peer_times.append(time.perf_counter() - start)
                error = max(error, (ours[i] - theirs).abs().max().item())
                if i < ROUNDS:
                    times.append(seconds(lambda images=images, kept=kept: impute(images, kept)))
            ours_s, peer_s = median(times), n * sum(peer_times) / SAMPLE
            found.append(
                {
                    "work": f"ROAD imputation, {n} images of 3 x {size} x {size}, {kind}",
                    "peer": f"pytorch_grad_cam, {SAMPLE} images scaled to {n}",
                    "ours_s": ours_s,
                    "peer_s": peer_s,
                    "ratio": peer_s / ours_s,
                    "error": error,
                }
            )
    return found


if __name__ == "__main__":
    for row in rows():
        print(f"{row['work']}: {row['ours_s']:.3f} s, largest error {row['error']:.1e}")
        print(f"    {row['peer']}: {row['peer_s']:.1f} s, {row['ratio']:.1f} x")
