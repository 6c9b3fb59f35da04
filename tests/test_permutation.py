import math

import pytest
import torch
from scipy import stats

from kdx import distance, permutation
from kdx.distance import (
    distance_correlation,
    distances,
    partial_distance_correlation,
    semipartial_distance_correlation,
)
from kdx.permutation import conditional_dependence, dependence, strata


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


@pytest.mark.parametrize("statistic", ["distance", "partial", "semipartial"])
def test_jackknife_equals_leaving_out_one_by_one(statistic):
    samples = sample("random", 15)[: distance.STATISTICS[statistic]]
    of = {
        "distance": distance_correlation,
        "partial": partial_distance_correlation,
        "semipartial": semipartial_distance_correlation,
    }[statistic]
    without = torch.stack([of(*(s[torch.arange(15) != i] for s in samples)) for i in range(15)])
    half = 1.959964 * (14 / 15 * (without - without.mean()).square().sum()).sqrt()
    found = dependence(*samples, statistic=statistic, permutations=19)
    value = of(*samples)
    assert (found.value, found.low, found.high) == pytest.approx(
        (float(value), float(value - half), float(value + half))
    )


def test_p_counts_permutations_that_reach_the_observed_value():
    x, y, _ = sample("random", 12)
    orders = permutation.random_permutations(12, 99, seed=3)
    reached = sum(float(distance_correlation(x, y[o])) >= float(distance_correlation(x, y)) - 1e-12 for o in orders)
    assert dependence(x, y, permutations=99, seed=3).p == (reached + 1) / 100


def test_partial_test_permutes_the_projected_matrix():
    x, y, z = sample("random", 12)
    p, q, r = (distance.u_center(distances(s)) for s in (x, y, z))
    p, q = distance.project(p, r), distance.project(q, r)
    orders = permutation.random_permutations(12, 99, seed=3)
    reached = sum(float((p * q[o][:, o]).sum()) >= float((p * q).sum()) - 1e-12 for o in orders)
    assert dependence(x, y, z, statistic="partial", permutations=99, seed=3).p == (reached + 1) / 100


def test_ties_raise_the_floor_of_p():
    y = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1, 1])]
    found = dependence(y, y, permutations=9999)
    assert found.floor == pytest.approx(1 / math.comb(6, 3))
    assert found.p == pytest.approx(2 / math.comb(6, 3), rel=0.1)  # exchanging the classes is a tie, too
    assert dependence(normal(6, 2), y, permutations=9).floor == 0.1
    assert dependence(normal(6, 2), y, normal(6, 3), statistic="partial", permutations=9999).floor == 1e-4


def test_p_is_uniform_when_samples_are_independent():
    p = [
        dependence(normal(32, 5, seed=2 * i), normal(32, 3, seed=2 * i + 1), permutations=999, seed=i).p
        for i in range(200)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    # and small when they are not
    assert dependence(*sample("random", 32)[:2]).p == 0.001


def test_permutations_are_seeded_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    assert permutation.random_permutations(8, 5, 1).equal(permutation.random_permutations(8, 5, 1))
    assert not permutation.random_permutations(8, 5, 1).equal(permutation.random_permutations(8, 5, 2))
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"statistic": "pearson"}, "choose from: distance, partial, semipartial"),
        ({"statistic": "partial"}, "relates 3 samples"),
        ({"z": torch.rand(9, 2)}, "relates 2 samples"),
        ({"z": torch.rand(9, 2), "statistic": "partial", "estimator": "biased"}, "unbiased estimator"),
        ({"permutations": 0}, "at least 1"),
    ],
)
def test_bad_tests_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        dependence(normal(9, 2), normal(9, 2), **settings)


# --- given a third sample -----------------------------------------------------------------


def test_strata_keep_twins_together_and_halve_the_others_along_the_line():
    z = torch.tensor([0.0, 5.0, 7.0, 5.0, 6.0, 0.5, 5.0])
    found = {tuple(sorted(z[rows].tolist())) for rows in strata(distances(z), 2)}
    assert found == {(5.0, 5.0, 5.0), (0.0, 0.5), (6.0, 7.0)}
    rows = strata(distances(normal(101, 3)), 4)
    assert torch.cat(rows).sort().values.equal(torch.arange(101))
    assert {len(r) for r in rows} <= {3, 4}


def test_residual_distances_are_those_of_ridge_residuals():
    x, z = normal(20, 6), normal(20, 1, seed=1)
    found = permutation._residual_distances(distances(x), distances(z))
    centring = torch.eye(20, dtype=torch.float64) - 1 / 20
    values, vectors = torch.linalg.eigh(-centring @ distances(z) @ centring / 2)
    values, x = values.clamp(min=0), x - x.mean(0)
    errors = {}
    for strength in values.mean() * torch.logspace(-4, 3, 22, dtype=torch.float64):
        hat = (vectors * (values / (values + strength))) @ vectors.T
        rest = x - hat @ x
        errors[float((rest / (1 - hat.diagonal() - 1 / 20)[:, None]).square().sum())] = rest
    assert torch.allclose(found, distances(errors[min(errors)]), atol=1e-8)


def test_what_z_explains_is_no_dependence_given_z_and_what_it_does_not_is():
    z = normal(128, 1)
    noise = [0.5 * normal(128, 1, seed=i) for i in (1, 2)]
    x, y = (z.square() + e for e in noise)
    assert dependence(x, y, z, statistic="partial", permutations=199).p == 0.005  # the test that does not hold
    assert conditional_dependence(x, y, z, permutations=199).p > 0.05
    shared = conditional_dependence(x, x + noise[1], z, permutations=199)
    assert shared.p == 0.005
    assert shared.low < shared.value < shared.high


def test_given_classes_the_test_permutes_within_them():
    labels = torch.arange(40) % 4
    z = torch.eye(4, dtype=torch.float64)[labels]
    orders = permutation._within(strata(distances(z), 4), 40, 50, seed=0)
    assert (labels[orders] == labels).all()
    assert orders.sort(1).values.equal(torch.arange(40).expand(50, 40))
    assert orders.unique(dim=0).shape == (50, 40)
    two = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    assert conditional_dependence(normal(6, 2), normal(6, 2), two, permutations=999).floor == pytest.approx(1 / 36)


def test_bad_conditional_tests_are_named():
    with pytest.raises(ValueError, match="size: expected at least 2"):
        conditional_dependence(normal(9, 2), normal(9, 2), normal(9, 2), size=1)
    with pytest.raises(ValueError, match="at least 5 rows, got 4, 4, 4"):
        conditional_dependence(normal(4, 2), normal(4, 2), normal(4, 2))
    with pytest.raises(ValueError, match="one length"):
        conditional_dependence(normal(9, 2), normal(8, 2), normal(9, 2))
