import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from scipy import sparse
from scipy.sparse.linalg import spsolve

from kdx.explain import road
from kdx.explain.road import impute, keep_mask, perturb


@pytest.fixture(autouse=True)
def one_thread():
    """Small arrays gain nothing from more threads, which spin for minutes where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def direct(image, kept):
    """The removed pixels of (c, h, w) by a sparse LU in float64, from the definition: pixel by pixel weights
    1/6 and 1/12 of the neighbours inside the image, over their sum."""
    c, h, w = image.shape
    number = np.arange(h * w).reshape(h, w)
    rows, columns, weights = [], [], []
    for dy, dx in ((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)):
        here = number[max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)].ravel()
        there = number[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)].ravel()
        rows.append(here)
        columns.append(there)
        weights.append(np.full(here.size, 1 / 6 if dy * dx == 0 else 1 / 12))
    W = sparse.csr_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), (h * w, h * w))
    mean = sparse.diags(1 / np.maximum(W.sum(1).A1, 1e-9)) @ W
    x, k = image.double().numpy().reshape(c, -1).copy(), kept.numpy().ravel()
    if not k.all():
        A = sparse.eye((~k).sum()) - mean[~k][:, ~k]
        x[:, ~k] = spsolve(A.tocsc(), mean[~k][:, k] @ x[:, k].T).reshape(-1, c).T
    return torch.from_numpy(x.reshape(c, h, w))


def texture(c, h, w, seed=0):
    """Noise, a ramp, and other channels of stripes: range 0 to 1, both ends in a corner."""
    y, x = torch.linspace(0, 1, h)[:, None], torch.linspace(1, 0, w)
    channels = [torch.rand(h, w, generator=torch.Generator().manual_seed(seed)), y * x]
    image = torch.stack((channels + [0.5 + 0.5 * torch.sin(20 * y + 9 * x)] * c)[:c])
    image[:, 0, 0], image[:, -1, -1] = 1, 0
    return image


def masks(h, w):
    """Kept pixels that are random, smooth blobs, and hard on iterative solvers."""
    generator = torch.Generator().manual_seed(h * w)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    border = (y == 0) | (y == h - 1) | (x == 0) | (x == w - 1)
    radius, angle = torch.hypot(y - h / 2, x - w / 2), torch.atan2(y - h / 2, x - w / 2) / (2 * torch.pi)
    found = {
        "one corner": (y == 0) & (x == 0),
        "two far corners": (y + x == 0) | (y + x == h + w - 2),
        "four corners": ((y == 0) | (y == h - 1)) & ((x == 0) | (x == w - 1)),
        "centre": (y == h // 2) & (x == w // 2),
        "centre and corner": ((y == h // 2) & (x == w // 2)) | (y + x == 0),
        "border": border,
        "all but one": (y != h // 2) | (x != w // 2),
        "all": border | True,
        "half": y < (h + 1) // 2,
        "checkerboard": (y + x) % 2 == 0,
        "checkerboard with a hole": ((y + x) % 2 == 0) & ((y < h // 3) | (x <= w // 3)),
        "comb": ((x % 4 == 0) & (y > 1)) | (y + x == 0),
        "lattice of 3": (x % 3 == 0) & (y % 3 == 0),
        "lattice of 16": (x % 16 == 0) & (y % 16 == 0),
        "wall with a gap": ((x == w // 2) & ((y < h // 2 - 1) | (y > h // 2 + 1))) | (y + x == 0),
        "spiral": ((radius / 6 - angle) % 1 < 0.2) | (y + x == 0),
    }
    for keep in (0.01, 0.1, 0.5, 0.9):
        for name, size in (("random", (h, w)), ("blobs", (7, 7))):
            saliency = torch.rand(1, *size, generator=generator)
            found[f"{name} {keep}"] = keep_mask(saliency, (h, w), keep)[0] | (y + x == 0)
    return {name: kept for name, kept in found.items() if kept.any()}


@pytest.mark.parametrize("size", [(32, 32), (31, 33), (7, 5), (64, 150), (2, 2), (1, 1), (1, 40), (300, 1), (2, 37)])
def test_imputation_equals_a_direct_solve(size):
    image, found = texture(3, *size), masks(*size)
    imputed = impute(image.expand(len(found), -1, -1, -1), torch.stack(list(found.values())))
    for got, (name, kept) in zip(imputed, found.items(), strict=True):
        assert (got - direct(image, kept)).abs().max() < 1e-3, name
        assert torch.equal(got[:, kept], image[:, kept])


@pytest.mark.parametrize("name", ["random 0.5", "blobs 0.5", "blobs 0.1", "two far corners", "half"])
def test_imputation_of_224_x_224_equals_a_direct_solve(name):
    image, kept = texture(3, 224, 224), masks(224, 224)[name]
    assert (impute(image[None], kept[None])[0] - direct(image, kept)).abs().max() < 1e-3


def test_long_images_are_imputed_in_double_precision():
    kept = torch.zeros(1, 1, 1500, dtype=torch.bool)
    kept[0, 0, [0, -1]] = True
    image = torch.rand(1, 1, 1, 1500, generator=torch.Generator().manual_seed(0))
    ramp = torch.lerp(image[..., :1], image[..., -1:], torch.linspace(0, 1, 1500))
    torch.testing.assert_close(impute(image, kept), ramp, atol=1e-3, rtol=0)


def test_imputation_equals_pytorch_grad_cam():
    # it renormalises at borders as we do: 1 minus the weights outside the image stands on its diagonal
    image = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(1))
    for name in ("random 0.5", "blobs 0.5", "checkerboard", "four corners"):
        kept = masks(30, 41)[name]
        theirs = NoisyLinearImputer(noise=0)(image, kept.float())
        torch.testing.assert_close(impute(image[None], kept[None])[0], theirs, atol=1e-3, rtol=0)


def test_imputation_by_hand():
    image = torch.tensor([[1.0, 2, 3], [4, 100, 6], [7, 8, 15]]).view(1, 1, 3, 3)
    kept = torch.ones(1, 3, 3, dtype=torch.bool)
    kept[0, 1, 1] = False
    assert impute(image, kept)[0, 0, 1, 1].item() == pytest.approx((2 + 4 + 6 + 8) / 6 + (1 + 3 + 7 + 15) / 12, abs=0.1)
    kept = torch.ones(1, 3, 3, dtype=torch.bool)
    kept[0, 0, 1] = False  # an edge: three direct neighbours, two diagonal ones
    expected = ((1 + 3 + 100) / 6 + (4 + 6) / 12) / (3 / 6 + 2 / 12)
    assert impute(image, kept)[0, 0, 0, 1].item() == pytest.approx(expected, abs=0.1)
    kept = torch.ones(1, 3, 3, dtype=torch.bool)
    kept[0, 2, 2] = False  # a corner
    expected = ((6 + 8) / 6 + 100 / 12) / (2 / 6 + 1 / 12)
    assert impute(image, kept)[0, 0, 2, 2].item() == pytest.approx(expected, abs=0.1)


def test_constants_and_symmetric_ramps_are_reproduced():
    kept = keep_mask(torch.rand(1, 20, 20), (20, 20), 0.2)
    for value in (0.3, -255.0):
        constant = torch.full((1, 3, 20, 20), value)
        torch.testing.assert_close(impute(constant, kept), constant)
    ramp = torch.linspace(-5, 5, 21).expand(1, 1, 9, 21)  # no weight points beyond the border along it
    kept = torch.zeros(1, 9, 21, dtype=torch.bool)
    kept[..., [0, -1]] = True
    torch.testing.assert_close(impute(ramp, kept), ramp, atol=0.01, rtol=0)


@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (1e-6, 0), (1e6, -3e5), (1, 100)])
def test_tolerance_scales_with_the_range_of_the_image(scale, shift):
    image, kept = texture(3, 32, 32) * scale + shift, masks(32, 32)["blobs 0.5"]
    assert (impute(image[None], kept[None])[0] - direct(image, kept)).abs().max() < 1e-3 * scale


def test_imputation_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(road, "CYCLES", 1)
    kept = torch.stack([masks(32, 32)[name] for name in ("all", "blobs 0.1")])
    with pytest.raises(RuntimeError, match="did not converge in 1 cycles for 1 of 2 images"):
        impute(texture(3, 32, 32).expand(2, -1, -1, -1), kept)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(5, 3, 32, 32, generator=generator), torch.rand(5, 4, 4, generator=generator)


def test_the_mask_keeps_the_most_salient_pixels(batch):
    maps = batch[1]
    for keep in (0, 0.001, 0.3, 0.5, 1):
        kept = keep_mask(maps, (33, 31), keep)
        assert kept.flatten(1).sum(1).tolist() == [round(keep * 33 * 31)] * 5
        resized = F.interpolate(maps[:, None], (33, 31), mode="bilinear", align_corners=False)[:, 0]
        if 0 < keep < 1:
            for salient, mask in zip(resized, kept, strict=True):
                assert salient[mask].min() >= salient[~mask].max()
    by_hand = keep_mask(torch.tensor([[[3.0, 1.0], [2.0, 0.0]]]), (2, 2))
    assert torch.equal(by_hand, torch.tensor([[[True, False], [True, False]]]))


def test_ties_are_broken_at_random_by_seed():
    empty = torch.zeros(2, 8, 8)
    kept = keep_mask(empty, (40, 40), 0.5, seed=1)
    assert kept.flatten(1).sum(1).tolist() == [800, 800]
    for half in (kept[0, :20], kept[0, 20:], kept[0, :, :20], kept[0, :, 20:]):
        assert 300 < half.sum() < 500
    assert torch.equal(kept, keep_mask(empty, (40, 40), 0.5, seed=1))
    assert not torch.equal(kept, keep_mask(empty, (40, 40), 0.5, seed=2))
    some = torch.zeros(1, 4, 4)
    some[0, 1, 2] = 1
    assert keep_mask(some, (4, 4), 0.25)[0, 1, 2]


def test_road_keeps_imputes_and_adds_noise(batch):
    images, maps = batch
    images = images * torch.tensor([1, 2, 10, 100, 1]).view(-1, 1, 1, 1)
    kept = keep_mask(maps, (32, 32), 0.3)
    quiet, noisy = perturb(images, maps, 0.3, noise=0), perturb(images, maps, 0.3, noise=0.05)
    torch.testing.assert_close(quiet, impute(images, kept), rtol=0, atol=0)
    for i in range(5):
        assert torch.equal(noisy[i][:, kept[i]], images[i][:, kept[i]])
        noise = (noisy - quiet)[i][:, ~kept[i]]
        assert noise.std().item() == pytest.approx(0.05 * (images[i].max() - images[i].min()).item(), rel=0.1)
    assert torch.equal(perturb(images, maps, keep=1), images)


def test_mask_mode_is_the_product_with_the_mask(batch):
    images, maps = batch
    kept = keep_mask(maps, (32, 32), 0.4, seed=3)
    assert torch.equal(perturb(images, maps, 0.4, mode="mask", seed=3), images * kept[:, None])
    assert perturb(images, maps, 0, mode="mask").abs().max() == 0


def test_results_depend_on_the_seed_and_leave_the_global_generator_alone(batch):
    images, maps = batch
    before, copies = torch.get_rng_state(), [t.clone() for t in batch]
    first, again, other = (perturb(images, maps, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, copy) for t, copy in zip(batch, copies, strict=True))
    assert first.data_ptr() != images.data_ptr()
    with torch.inference_mode():
        assert torch.equal(perturb(images.clone(), maps.clone(), seed=4), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perturb(images, maps, seed=4), first)
    assert not perturb(images.clone().requires_grad_(), maps).requires_grad


@pytest.mark.parametrize("mode", ["road", "mask"])
def test_an_image_is_perturbed_alike_in_any_batch(batch, mode):
    images, maps = batch
    maps = maps.clone()
    maps[2] = 0
    maps[3] = torch.eye(4)  # holes of other sizes than its neighbours', so that it takes another number of cycles
    together = perturb(images, maps, mode=mode)
    for order in ([0], [2, 1], [3, 0, 4], [4, 3, 2, 1, 0]):
        torch.testing.assert_close(perturb(images[order], maps[order], mode=mode), together[order], atol=1e-5, rtol=0)
    assert perturb(images[:0], maps[:0], mode=mode).shape == (0, 3, 32, 32)


def test_batches_of_several_chunks(batch):
    images, maps = batch[0].repeat(24, 4, 1, 1), batch[1].repeat(24, 1, 1)
    assert images.numel() > 2**20
    got = perturb(images, maps)
    torch.testing.assert_close(got[-5:], perturb(images[:5], maps[:5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(batch, dtype):
    images, maps = batch[0].to(dtype), batch[1]
    got, single = perturb(images, maps), perturb(images.float(), maps)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), single, atol=1e-3 + 2 * torch.finfo(dtype).eps, rtol=0)
    kept = keep_mask(maps, (32, 32))
    assert torch.equal(got.movedim(1, -1)[kept], images.movedim(1, -1)[kept])
    assert keep_mask(maps.to(dtype), (32, 32)).sum() == kept.sum()


def test_channels_last_and_strided_images(batch):
    images, maps = batch
    expected = perturb(images, maps)
    assert torch.equal(perturb(images.contiguous(memory_format=torch.channels_last), maps), expected)
    assert torch.equal(perturb(images.flip(3).flip(3)[::2], maps[::2]), expected[::2])


def test_bad_input_is_refused(batch):
    images, maps = batch
    bad = maps.clone()
    bad[1, 0, 0] = float("nan")
    for call, message in (
        (lambda: perturb(images[0], maps), r"expected float images \(n, c, h, w\), got torch.float32 \(3, 32, 32\)"),
        (lambda: perturb((255 * images).byte(), maps), "got torch.uint8"),
        (lambda: perturb(images / 0, maps), "expected finite images"),
        (lambda: perturb(images, bad), "expected finite maps"),
        (lambda: perturb(images, maps / 0), "expected finite maps"),
        (lambda: perturb(images, maps[:, None]), r"expected maps \(5, h, w\), one per image, got \(5, 1, 4, 4\)"),
        (lambda: perturb(images, maps[:3]), r"one per image, got \(3, 4, 4\)"),
        (lambda: keep_mask(maps.long(), (32, 32)), "expected float maps"),
        (lambda: perturb(images, maps, keep=1.5), r"expected a fraction of pixels in \[0, 1\], got 1.5"),
        (lambda: perturb(images, maps, keep=-0.1), "expected a fraction"),
        (lambda: perturb(images, maps, keep=float("nan")), "expected a fraction"),
        (lambda: perturb(images, maps, mode="blur"), "expected one of road, mask, got 'blur'"),
        (lambda: perturb(images, maps, noise=-1), "expected a standard deviation >= 0, got -1"),
        (lambda: perturb(images, maps, keep=0), r"images \[0, 1, 2, 3, 4\]: no pixel is kept"),
        (lambda: impute(images, maps > 2), r"kept: expected bool \(5, 32, 32\), got torch.bool \(5, 4, 4\)"),
        (lambda: impute(images, images[:, 0]), "kept: expected bool .* got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
