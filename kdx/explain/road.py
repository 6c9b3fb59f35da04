"""Removal of the pixels that a saliency map ranks lowest: ROAD imputation, or plain masking."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("road", "mask")
TOLERANCE = 2e-4  # of the image's range: estimated error at which imputation stops
CYCLES = 50  # the hardest known masks take 10
LONGEST = 1024  # side of an image up to which float32 is enough: rounding errors grow with its square
STEPS = [1 / (0.55 + 0.45 * math.cos(math.pi * (j + 0.5) / 4)) for j in range(4)]  # Chebyshev on [0.1, 1]


@torch.no_grad()
def perturb(
    images: Tensor, maps: Tensor, keep: float = 0.5, mode: str = "road", noise: float = 0.01, seed: int = 0
) -> Tensor:
    r"""Keep the most salient pixels of each image and remove the others.

    ``"road"`` (Rong et al. 2022) imputes the removed pixels from the kept ones with :func:`impute`
    and adds Gaussian noise to them, so that the shape of the mask cannot be read off the image.
    ``"mask"`` is the Hadamard product of image and mask: removed pixels become 0, the mean colour
    of normalised images.

    The result for an image depends on that image, its map and the seed alone, not on the rest of the batch: one
    random field per seed serves all images of a size.

    Args:
        images: (n, c, h, w) float, on any scale.
        maps: (n, h', w') raw saliency >= 0, at any resolution; resized to (h, w) as by :func:`keep_mask`.
        keep: Fraction of the pixels of each image to keep, 0 to 1.
        mode: ``"road"`` or ``"mask"``.
        noise: Standard deviation of the noise on imputed pixels, in units of the image's range (its maximum - minimum
            over all channels); 0 for none. Without effect on ``"mask"``.
        seed: Of the noise and of ties between pixels; the global generators are left alone.

    Returns:
        (n, c, h, w), of the images' dtype and on their device. Kept pixels are unchanged.

    Raises:
        ValueError: Wrong shapes, values that are not finite, or ``"road"`` where no pixel is kept.

    Examples:
        >>> import kdx, torch
        >>> images = torch.rand(2, 3, 32, 32)
        >>> left = kdx.perturb(images, torch.rand(2, 8, 8), keep=0.25)  # a map may be coarser than its image
        >>> round(float((left == images).all(1).double().mean()), 2)
        0.25
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise: expected a standard deviation >= 0, got {noise}; use 0 for none")
    low, high = _range(images)
    if maps.ndim != 3 or len(maps) != len(images):
        raise ValueError(f"expected maps ({len(images)}, h, w), one per image, got {tuple(maps.shape)}")
    kept = keep_mask(maps.to(images.device), (images.shape[2], images.shape[3]), keep, seed)
    if mode == "mask":
        return images * kept[:, None]
    imputed = impute(images, kept)
    if noise == 0:
        return imputed
    field = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)).to(images.device)
    return imputed.add_((field * ~kept[:, None]).mul_(noise * (high - low)))


@torch.no_grad()
def keep_mask(maps: Tensor, size: tuple[int, int], keep: float = 0.5, seed: int = 0) -> Tensor:
    """The most salient pixels of each map.

    Maps are resized bilinearly (``align_corners=False``). Exactly ``round(keep * h * w)`` pixels
    are kept; where pixels of equal saliency compete for the last places, a random order of all
    pixels decides, one per seed and size.

    Args:
        maps: (n, h', w') float.
        size: (h, w) of the mask.
        keep: Fraction of pixels, 0 to 1.
        seed: Of the order that breaks ties.

    Returns:
        bool (n, h, w), True where kept.

    Raises:
        ValueError: Wrong shapes, values that are not finite, or a fraction outside [0, 1].
    """
    if maps.ndim != 3 or not maps.is_floating_point():
        raise ValueError(f"expected float maps (n, h, w), got {maps.dtype} {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("expected finite maps, got NaN or Inf; check the gradients they come from")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: expected a fraction of pixels in [0, 1], got {keep}")
    h, w = size
    places = round(keep * h * w)
    if places in (0, h * w):
        return torch.full((len(maps), h, w), places > 0, device=maps.device)
    maps = maps if maps.dtype == torch.float64 else maps.float()
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed)).to(maps.device)
    saliency = F.interpolate(maps[:, None], (h, w), mode="bilinear", align_corners=False).flatten(1)[:, order]
    last = saliency.kthvalue(h * w - places + 1, dim=1, keepdim=True).values
    above, tied = saliency > last, saliency == last
    kept = torch.empty_like(above)
    kept[:, order] = above | (tied & (tied.cumsum(1) <= places - above.sum(1, keepdim=True)))
    return kept.view(-1, h, w)


@torch.no_grad()
def impute(images: Tensor, kept: Tensor) -> Tensor:
    r"""Noiseless linear imputation (Rong et al. 2022): each removed pixel is the mean of its neighbours.

    .. math:: x_i = \frac{\sum_j w_{ij} x_j}{\sum_j w_{ij}}, \qquad
              w_{ij} = \tfrac16 \text{ (direct neighbour)}, \tfrac1{12} \text{ (diagonal neighbour)},

    for all removed pixels i at once, over the neighbours j inside the image; kept pixels are
    boundary values. Solved to 1e-3 of the image's range or better by conjugate gradients,
    preconditioned with one multigrid cycle, in float32 (float64 for float64 images and for those
    with a side of more than 1024 pixels). An image's result does not depend on the rest of the batch.

    Args:
        images: (n, c, h, w) float.
        kept: bool (n, h, w), True where the image is kept; at least one pixel of each image.

    Returns:
        (n, c, h, w), of the images' dtype and on their device. Kept pixels are unchanged.

    Raises:
        ValueError: Wrong shapes, values that are not finite, or an image without a kept pixel.
        RuntimeError: The estimated error does not fall below 2e-4 of the image's range.
    """
    low, high = _range(images)
    n, c, h, w = images.shape
    if kept.dtype != torch.bool or kept.shape != (n, h, w):
        raise ValueError(f"kept: expected bool {(n, h, w)}, got {kept.dtype} {tuple(kept.shape)}")
    kept = kept.to(images.device)
    if n and not (some := kept.flatten(1).any(1)).all():
        empty = (~some).nonzero().flatten().tolist()
        raise ValueError(f"images {empty}: no pixel is kept, so there is nothing to impute from; keep more")
    scale = torch.where(high > low, high - low, 1)
    values = 2**20 if images.device.type == "cpu" else 2**24  # per array of a chunk: caches, memory
    size = max(1, values // (c * h * w))
    solver = cache(lambda n: _Solver(n, c, h, w, low))  # the last chunk may be smaller
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    for out, *chunk in zip(*(tensor.split(size) for tensor in (result, images, kept, low, scale)), strict=True):
        out.copy_(solver(len(out))(*chunk))
    return result


def _range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each image, (n, 1, 1, 1), in the precision of the computation."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"expected float images (n, c, h, w), got {images.dtype} {tuple(images.shape)}")
    flat = images.flatten(1)
    dtype = torch.float64 if images.dtype == torch.float64 or max(images.shape[2:]) > LONGEST else torch.float32
    low, high = (extreme.view(-1, 1, 1, 1).to(dtype) for extreme in (flat.amin(1), flat.amax(1)))
    if not (low.isfinite() & high.isfinite()).all():
        raise ValueError("expected finite images, got NaN or Inf")
    return low, high


# The linear system. With B the 3 x 3 binomial filter [1 2 1] x [1 2 1], zero outside the image, the
# neighbours' mean is (B - 4) x / (B - 4) 1, so removed pixels fulfil A x = 0 with A = B 1 - B, which is
# symmetric positive definite, and A / B 1 has its eigenvalues in (0, 1]: blurring is a smoother.
# Arrays are (h, w, columns), one column per channel of each image; a padded one has a rim of zeros.
# They are allocated once and written in place: fresh pages cost more than the arithmetic.


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 1, 1, 1))


def _blur(x: Tensor, step: int = 1, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """B x of a padded x, at every pixel or at every second."""
    rows = torch.add(x[:-2:step], x[2::step], out=rows).add_(x[1:-1:step], alpha=2)
    return torch.add(rows[:, :-2:step], rows[:, 2::step], out=out).add_(rows[:, 1:-1:step], alpha=2)


class _Grid:
    """One level of the multigrid, and through ``coarser`` all below: every second pixel of it."""

    def __init__(self, n: int, c: int, h: int, w: int, like: Tensor):
        self.shape = h, w, n, c
        self.inside = _pad(like.new_ones(h, w, 1))
        self.total = _blur(self.inside)  # B 1
        self.free, self.inverse, self.blurred = (like.new_empty(h, w, n * c) for _ in range(3))
        self.rows = like.new_empty(h, w + 2, n * c)
        self.padded = like.new_zeros(h + 2, w + 2, n * c)
        self.u = self.padded[1:-1, 1:-1]
        self.coarser = _Grid(n, c, (h + 1) // 2, (w + 1) // 2, like) if max(h, w) > 1 else None
        self.active = False
        self.weight = self.total / (2 if min(h, w) == 1 else 4)  # of residuals on their way to the coarser grid
        if h % 2 == 0:
            self.weight[-1] *= 2
        if w % 2 == 0:
            self.weight[:, -1] *= 2

    def set(self, unknown: Tensor) -> None:
        """Set the unknown pixels (h, w, n); a coarse pixel is unknown if all nine around it are."""
        free = unknown.to(self.u.dtype)
        self.free.view(self.shape).copy_(free[..., None])
        torch.div(self.free, self.total, out=self.inverse)
        self.active = bool(unknown.any())
        if self.coarser and self.active:
            self.coarser.set(_blur(_pad(free), 2) == _blur(self.inside, 2))

    def blur(self, padded: Tensor) -> Tensor:
        return _blur(padded, rows=self.rows, out=self.blurred)

    def jacobi(self, b: Tensor) -> Tensor:
        """What u would be if it solved A u = (B 1) b, given its neighbours."""
        return torch.addcmul(b, self.inverse, self.blur(self.padded), out=self.blurred)

    def cycle(self, b: Tensor) -> Tensor:
        """One symmetric V-cycle: u with A u about (B 1) b, zero at kept pixels."""
        u = torch.mul(b, STEPS[0], out=self.u)
        for step in STEPS[1:]:
            u.lerp_(self.jacobi(b), step)
        if self.coarser and self.coarser.active:
            residual = self.jacobi(b).sub_(u).mul_(self.weight)
            self.coarser.cycle(_blur(_pad(residual), 2).mul_(self.coarser.inverse))
            u.addcmul_(self.free, self.refine(self.coarser.padded))
        for step in reversed(STEPS):
            u.lerp_(self.jacobi(b), step)
        return u

    def refine(self, coarse: Tensor) -> Tensor:
        """Bilinear interpolation of a padded array of the coarser grid, constant beyond its last pixels."""
        h, w = self.shape[:2]
        rows, out = self.rows[:, : coarse.shape[1]], self.blurred
        rows[::2] = coarse[1:-1]
        torch.lerp(coarse[1 : h // 2 + 1], coarse[2 : h // 2 + 2], 0.5, out=rows[1::2])
        if h % 2 == 0:
            rows[-1] = coarse[-2]
        out[:, ::2] = rows[:, 1:-1]
        torch.lerp(rows[:, 1 : w // 2 + 1], rows[:, 2 : w // 2 + 2], 0.5, out=out[:, 1::2])
        if w % 2 == 0:
            out[:, -1] = rows[:, -2]
        return out


class _Solver:
    """Buffers and grids to impute n images (c, h, w)."""

    def __init__(self, n: int, c: int, h: int, w: int, like: Tensor):
        self.grid = _Grid(n, c, h, w, like)
        self.given, self.x, self.residual, self.product = (like.new_empty(h, w, n * c) for _ in range(4))
        self.padded = like.new_zeros(h + 2, w + 2, n * c)

    def __call__(self, images: Tensor, kept: Tensor, low: Tensor, scale: Tensor) -> Tensor:
        """Images (n, c, h, w), low <= images <= low + scale, imputed; a view of a buffer."""
        n, c, h, w = images.shape
        grid, given, x, residual, product = self.grid, self.given, self.x, self.residual, self.product
        p, change = self.padded[1:-1, 1:-1], grid.blurred
        low, scale = (value.view(n, 1).expand(n, c).flatten() for value in (low, scale))
        grid.set(~kept.permute(1, 2, 0))
        known = torch.sub(1, grid.free, out=product)
        given.view(h, w, n, c).copy_(images.permute(2, 3, 0, 1))
        given.mul_(known)

        torch.sub(given, low, out=x).div_(scale).mul_(known)
        mean = x.sum((0, 1)) / known.sum((0, 1))
        x.sub_(mean).mul_(known)  # removed pixels start at the mean of the kept
        p.copy_(x)
        torch.addcmul(grid.blur(self.padded), grid.total, p, value=-1, out=residual).mul_(grid.free)
        p.zero_()
        power, before = torch.ones_like(low), torch.full_like(low[::c], torch.finfo(low.dtype).tiny)
        running = torch.ones_like(before, dtype=torch.bool)
        for _ in range(CYCLES):
            z = grid.cycle(torch.mul(grid.inverse, residual, out=product))
            largest = torch.abs(z, out=product).amax(0).amax(0).view(n, c).amax(1)
            new = torch.mul(residual, z, out=product).sum((0, 1))
            p.mul_(torch.where(power > 0, new / power, 0)).add_(z)
            torch.addcmul(grid.blur(self.padded), grid.total, p, value=-1, out=change).mul_(grid.free)  # -A p
            curvature = torch.mul(p, change, out=product).sum((0, 1))
            length = torch.where(running.repeat_interleave(c) & (curvature < 0), new / curvature, 0)
            x.addcmul_(length, p, value=-1)
            residual.addcmul_(length, change, value=-1)
            # z is about the error it corrects; where z shrinks slowly it sees only part of it, about 1 - rate.
            rate = largest / before
            running = running & ~(largest / (1 - rate).clamp_min(0.01) <= TOLERANCE)
            power, before = new, largest.clamp_min(torch.finfo(low.dtype).tiny)
            if not running.any():
                x.add_(mean).mul_(scale).add_(low).mul_(grid.free).add_(given)
                return x.view(h, w, n, c).permute(2, 3, 0, 1)
        raise RuntimeError(f"imputation did not converge in {CYCLES} cycles for {int(running.sum())} of {n} images")
