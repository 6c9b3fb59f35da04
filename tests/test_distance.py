import math

import pytest
import torch

from kdx import distance
from kdx.distance import (
    distance_correlation,
    distances,
    partial_distance_correlation,
    semipartial_distance_correlation,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(kind, n):
    """Three related samples (n, ...)."""
    x = normal(n, 7)
    y = x[:, :3] + normal(n, 3, seed=1)
    z = y[:, :2] + normal(n, 2, seed=2)
    if kind == "far from the origin":
        x = 1e-3 * x + 1e4
    if kind == "tied":
        x, y = (x > 0).double(), torch.eye(4, dtype=torch.float64)[torch.arange(n) % 4]
    if kind == "tied embeddings":
        x = normal(10, 384)[torch.arange(n) % 10]
    if kind == "nearly tied":
        x[n // 2 :] = x[: n - n // 2] + 1e-9 * normal(n - n // 2, 7, seed=3)
    if kind == "constant":
        x = torch.full((n, 5), 0.1, dtype=torch.float64)
    if kind == "many features":
        x = normal(n, 200_000 // n)
    return x, y, z


KINDS = ["random", "far from the origin", "tied", "tied embeddings", "nearly tied", "constant", "many features"]


@pytest.mark.parametrize("n", [4, 5, 33, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_family_equals_dcor(dcor, kind, n):
    x, y, z = sample(kind, n)
    a, b, c = x.numpy(), y.numpy(), z.numpy()
    assert float(distance_correlation(x, y)) == pytest.approx(dcor.u_distance_correlation_sqr(a, b), abs=1e-9)
    biased = distance_correlation(x, y, estimator="biased")
    assert float(biased) == pytest.approx(dcor.distance_correlation_sqr(a, b), abs=1e-9)
    partial = partial_distance_correlation(x, y, z)
    assert float(partial) == pytest.approx(dcor.partial_distance_correlation(a, b, c), abs=1e-9)


def test_distance_correlation_by_hand():
    # D_x = |i - j|, and y swaps the middle two: U-centred inner products over 1..4
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])
    p = distance.u_center(distances(x))
    rows = torch.tensor([6.0, 4, 4, 6], dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            expected = 0 if i == j else abs(i - j) - (rows[i] + rows[j]) / 2 + 20 / 6
            assert float(p[i, j]) == pytest.approx(float(expected), abs=1e-12)
    assert float(distance_correlation(x, x)) == pytest.approx(1)
    q = distance.u_center(distances(y))
    assert float(distance_correlation(x, y)) == pytest.approx(float((p * q).sum() / (p.norm() * q.norm())))


def test_u_centered_rows_sum_to_zero():
    p = distance.u_center(distances(normal(9, 3)))
    torch.testing.assert_close(p.sum(1), torch.zeros(9, dtype=torch.float64), atol=1e-12, rtol=0)


def test_semipartial_is_the_cosine_with_the_unprojected_matrix():
    x, y, z = (distance.u_center(distances(s)) for s in sample("random", 30))
    u = x - (x * z).sum() / (z * z).sum() * z
    expected = (u * y).sum() / (u.norm() * y.norm())
    assert float(semipartial_distance_correlation(*sample("random", 30))) == pytest.approx(float(expected))


def test_paper_estimator_is_biased_on_rows_of_unit_length(dcor):
    x, y, _ = sample("random", 20)
    a, b = (s / s.norm(dim=1, keepdim=True) for s in (x, y))
    ours = distance_correlation(x, y, estimator="paper")
    assert float(ours) == pytest.approx(dcor.distance_correlation_sqr(a.numpy(), b.numpy()), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_equal_differences(kind):
    x = sample(kind, 300)[0]
    exact = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(x), exact, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(distance.cross_distances(x[:7], x), exact[:7], rtol=1e-10, atol=1e-11)


def test_coincident_rows_are_exactly_zero_apart():
    x = (normal(5, 3000) * 100 + 7).float()[torch.arange(40) % 5]
    assert ((distances(x) == 0) == (torch.arange(40)[:, None] % 5 == torch.arange(40) % 5)).all()


def test_blocks_agree_with_the_whole(monkeypatch):
    x, y, z = sample("tied embeddings", 100)
    whole = distance.inner_products(x, y, z)
    monkeypatch.setattr(distance, "ROWS", 16)
    monkeypatch.setattr(distance, "ELEMENTS", 256)
    torch.testing.assert_close(distance.inner_products(x, y, z), whole, rtol=1e-11, atol=1e-13)
    p, q, r = (distance.center(s) for s in (x, y, z))
    by_matrix = torch.stack([torch.stack([(a * b).sum() for a in (p, q, r)]) for b in (p, q, r)]) / (100 * 97)
    torch.testing.assert_close(whole, by_matrix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_dtype_is_summed_in_float64(dtype):
    x, y = (10 * normal(50, 6)).to(dtype), normal(50, 2)
    assert distance_correlation(x, y).dtype == torch.float64
    assert float(distance_correlation(x, y)) == float(distance_correlation(x.double(), y))


@pytest.mark.parametrize(
    "statistic",
    [
        distance_correlation,
        lambda x, y: distance_correlation(x, y, "biased"),
        lambda x, y: distance_correlation(x, y, "paper"),
        lambda x, y: partial_distance_correlation(x, y, normal(9, 2, seed=9)),
        lambda x, y: semipartial_distance_correlation(x, y, normal(9, 2, seed=9)),
    ],
)
def test_gradients(statistic):
    x, y = normal(9, 4).requires_grad_(), normal(9, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(statistic, (x, y))
    without = statistic(x.detach(), y.detach())
    torch.testing.assert_close(statistic(x, y).detach(), without)


def test_gradient_of_coincident_rows_is_finite():
    x = normal(4, 3)[[0, 0, 1, 2, 3, 3]].requires_grad_()
    y = normal(6, 2, seed=1)
    distance_correlation(x, y).backward()
    z = x.detach().requires_grad_()
    squared = (z[:, None] - z).square().sum(2)
    d = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)  # no gradient at 0
    distance.cosine(distance.u_center(d), distance.center(y)).backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_without_variance_the_correlation_is_zero():
    x, y, z = normal(12, 3), normal(12, 2, seed=1), torch.ones(12, 4)
    equal = torch.eye(12)  # all distances equal: U-centred to 0
    for flat in (z, equal):
        assert float(distance_correlation(x, flat)) == 0
        assert float(semipartial_distance_correlation(flat, y, x)) == 0
        given = partial_distance_correlation(x, y, flat)
        assert float(given) == pytest.approx(float(distance_correlation(x, y)))
    assert float(partial_distance_correlation(x, y, x)) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.ones(3, 2), torch.ones(3, 2)), "at least 4 samples, got 3"),
        ((torch.ones(5, 2), torch.ones(6, 2)), "one length"),
        ((torch.ones(5, 2), torch.ones(5, 2), "v"), "unknown estimator 'v'; choose from: unbiased, biased, paper"),
        ((torch.tensor(1.0), torch.ones(5, 2)), r"expected a real tensor \(n, ...\)"),
        ((torch.tensor([1.0, 2, math.nan, 4, 5]), torch.ones(5, 2)), "NaN.* in 1 of 5 rows, the first of them row 2"),
    ],
)
def test_bad_samples_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        distance_correlation(*arguments)
