import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from kdx.explain import regression
from kdx.explain.regression import RIDGES, Beyond, Moments, Regression, errors_beyond, share, share_left
from kdx.inference import two_factor

OLD_GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def fit(of, given, parts=2):
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(0))
    return Regression.fit([Moments.of(of[rows], given[rows]) for rows in order.tensor_split(parts)])


def of_factors(n, channels, of, factors, noise, share=0.25, seed=0):
    """Regressors: factors mixed into channels, with noise. Explained: the factors mixed, and a share of its own."""
    mixing, drawing = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    mixes = [torch.randn(factors, k, generator=mixing) / factors**0.5 for k in (channels, of)]
    f, own_x, own_y = (torch.randn(n, k, generator=drawing) for k in (factors, channels, of))
    return (1 - share) ** 0.5 * f @ mixes[1] + share**0.5 * own_y, f @ mixes[0] + noise * own_x


def test_regression_is_ridge_with_an_intercept_and_the_strength_that_predicts_best():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, 5, 3, 3, generator=generator) + 2
    of = torch.einsum("nkhw,kj->njhw", given, torch.randn(5, 4, generator=generator)) - 1
    of += 0.1 * torch.randn(of.shape, generator=generator)
    found = fit(of, given)
    x, y = (t.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for t in (given, of))
    oracle = Ridge(alpha=1e-5 * len(x)).fit(x, y)
    torch.testing.assert_close(found.weights.double(), torch.from_numpy(oracle.coef_.T), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.intercept.double(), torch.from_numpy(oracle.intercept_), rtol=1e-2, atol=1e-2)
    assert found.spread == pytest.approx(y.var(0).sum())
    assert not found.limited


def test_errors_of_all_strengths_are_those_of_ridge_regressions():
    y, x = (t.double() + 1 for t in of_factors(30, 6, 3, 2, 0.5))
    errors, alone, fitted = regression.held_out_errors([Moments.of(y[i::3], x[i::3]) for i in range(3)])[1]
    rows = np.arange(30) % 3 == 1
    for ridge, error, known in zip(RIDGES, errors, fitted, strict=True):
        strength = ridge * x[~rows].numpy().var(0).mean()
        oracle = Ridge(alpha=strength * (~rows).sum()).fit(x[~rows].numpy(), y[~rows].numpy())
        for which, found in ((rows, error), (~rows, 2 * known)):  # twice as many are fitted on
            assert float(found) == pytest.approx(((oracle.predict(x[which].numpy()) - y[which].numpy()) ** 2).sum())
    assert float(alone) == pytest.approx(float((y[rows] - y[~rows].mean(0)).square().sum()))


def test_moments_of_batches_add_up():
    of, given = torch.randn(10, 3, 4, 4), torch.randn(10, 5, 2, 2)
    whole, added = Moments.of(of, given), Moments.of(of[:7], given[:7]) + Moments.of(of[7:], given[7:])
    assert (whole.n, added.n) == (160, 160)
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("rows", "channels", "of", "factors", "before", "most"),
    [(256, 512, 64, 20, 0.37, 0.31), (200, 100, 100, 10, 0.33, 0.31)],
)
def test_strengths_suffice_for_few_rows(monkeypatch, rows, channels, of, factors, before, most):
    """A known share of 0.25 is the explained features' own; the old grid, which ended at 0.1, said far more."""
    y, x = of_factors(rows + 3000, channels, of, factors, 0.5)
    others = y[rows:] - y[rows:].mean(0)

    def left():
        found = fit(y[:rows], x[:rows])
        return float(found.left_over(y[rows:], x[rows:]).square().sum() / others.square().sum()), found.limited

    share, limited = left()
    assert 0.25 < share < most
    assert not limited
    monkeypatch.setattr(regression, "RIDGES", OLD_GRID)
    share, limited = left()
    assert share > before
    assert limited


def test_the_share_left_is_read_on_other_folds_and_its_interval_holds_for_other_images():
    """In 95 % of draws the interval holds the share that fits of this size leave over on average."""
    folds, truth = 5, []
    for seed in range(1000, 1040):
        y, x = of_factors(80 + 2000, 10, 5, 3, 0.5, seed=seed)
        left = fit(y[:80], x[:80]).left_over(y[80:], x[80:])
        truth.append(float(left.square().sum() / (y[80:] - y[80:].mean(0)).square().sum()))
    hits = 0
    for seed in range(200):
        y, x = of_factors(100, 10, 5, 3, 0.5, seed=seed)
        share = share_left([Moments.of(y[i::folds], x[i::folds]) for i in range(folds)])
        assert share.n == folds
        hits += share.low <= np.mean(truth) <= share.high
    assert hits / 200 > 0.95 - 4 * (0.95 * 0.05 / 200) ** 0.5


def test_the_share_left_is_one_without_a_relation_and_nan_without_variance():
    generator = torch.Generator().manual_seed(0)
    y, x = torch.randn(600, 4, generator=generator), torch.randn(600, 300, generator=generator)
    share = share_left([Moments.of(y[i::5], x[i::5]) for i in range(5)])
    assert share.mean == pytest.approx(1, abs=0.01)
    assert np.isnan(share_left([Moments.of(torch.ones(10, 2), x[:10]) for _ in range(3)])).sum() == 3


def test_features_that_do_not_vary_explain_nothing():
    of = torch.randn(10, 2, 2, 2)
    found = fit(of, torch.ones(10, 3, 2, 2))
    torch.testing.assert_close(found.left_over(of, torch.ones(10, 3, 2, 2)), of - of.mean((0, 2, 3), keepdim=True))


def mixed(n, shares, k=10, seed=0, others=10):
    """y, x of a base and of another, whose parts of y's variance are known: of the base, of the other beyond it, own.
    The other has much in common with the base."""
    generator = torch.Generator().manual_seed(seed)
    base, beyond, own = (torch.randn(n, k, generator=generator) for _ in range(3))
    y = sum(share**0.5 * part for share, part in zip(shares, (base, beyond, own), strict=True))
    other = torch.cat(
        [beyond[:, :others] + base[:, :others], torch.randn(n, max(0, others - k), generator=generator)], 1
    )
    return y, base, other


def parts_of(y, base, other, folds=10):
    x = torch.cat([base, other], 1)
    spread, left, last = errors_beyond([Moments.of(y[i::folds], x[i::folds]) for i in range(folds)], base.shape[1])
    return [share(of, spread)[0] for of in (spread - left, left - last, last)]


def test_regressors_that_vary_in_one_fold_alone_explain_nothing():
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.full((5, 40, 3), 1e-3), torch.randn(5, 40, 2, generator=generator)
        x[2] = torch.randn(40, 3, generator=generator)
        assert share_left([Moments.of(*fold) for fold in zip(y, x, strict=True)]).mean == pytest.approx(1, abs=0.1)


def test_a_mix_gives_the_mix_back():
    found = parts_of(*mixed(400, (0.5, 0.5, 0.0)))
    assert [part.mean for part in found] == pytest.approx([0.5, 0.5, 0], abs=0.05)
    assert found[2].mean < 1e-5
    found = parts_of(*mixed(400, (1.0, 0.0, 0.0)))
    assert [part.mean for part in found] == pytest.approx([1, 0, 0], abs=1e-5)


@pytest.mark.parametrize("shares", [(0.5, 0.1, 0.4), (0.4, 0.3, 0.3), (0.3, 0.0, 0.7), (0.8, 0.15, 0.05)])
@pytest.mark.parametrize("others", [10, 40])
def test_parts_are_not_biased_with_300_images(shares, others):
    draws = [[part.mean for part in parts_of(*mixed(300, shares, seed=seed, others=others))] for seed in range(60)]
    error = np.std(draws, axis=0) / 60**0.5
    assert (np.abs(np.mean(draws, axis=0) - shares) < 0.01 + 2 * error).all()


def test_an_other_that_is_the_base_adds_nothing():
    y, base, _ = mixed(300, (0.5, 0.2, 0.3))
    for other in (base, base @ torch.randn(10, 10, generator=torch.Generator().manual_seed(1))):
        assert parts_of(y, base, other)[1].mean == pytest.approx(0, abs=0.01)


def test_intervals_of_the_parts_hold():
    """The true part handed over is in the 95 % interval."""
    truth, hits = 0.3, 0
    for seed in range(200):
        part = parts_of(*mixed(200, (0.4, truth, 0.3), seed=seed), folds=5)[1]
        hits += part.low <= truth <= part.high
    assert hits / 200 > 0.95 - 4 * (0.95 * 0.05 / 200) ** 0.5


def test_values_of_the_folds_have_the_interval_of_their_share():
    """By hand: four folds, of which 0.1, 0.2, 0.3 and 0.4 are explained. Networks are compared by their values."""
    interval, values = share(torch.tensor([1.0, 2, 3, 4]), torch.full((4,), 10.0))
    half = 3.182446 * np.std([0.1, 0.2, 0.3, 0.4], ddof=1) * np.sqrt(1 / 4 + 1 / 3)  # t of 3 degrees of freedom
    assert interval == pytest.approx((0.25, 0.25 - half, 0.25 + half, 4))
    assert two_factor(values[None]).interval() == pytest.approx(interval[1:3])


def test_what_is_predicted_beyond_the_base_is_the_others_part():
    """On images that were not fitted on, the prediction is the other's own factors in y."""
    y, base, other = mixed(2000, (0.5, 0.3, 0.2))
    x = torch.cat([base, other], 1)
    beyond = Beyond.fit([Moments.of(y[i:1500:2], x[i:1500:2]) for i in range(2)], 10)
    expected = 0.3**0.5 * (other - base)[1500:]
    assert (beyond(base[1500:], other[1500:]) - expected).square().mean() < 0.02 * expected.square().mean()


@pytest.mark.parametrize(
    ("n", "k", "low", "high"), [(300, 10, -0.01, 0.01), (300, 20, -0.035, -0.01), (300, 40, -0.07, -0.04)]
)
def test_few_images_for_each_regressor_hide_some_of_what_was_handed_over(n, k, low, high):
    """The errors that book/method states, where the truth is 2/3."""
    off = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        base, knowledge, own = (torch.randn(n, k, generator=g) for _ in range(3))
        turn, other = (torch.linalg.qr(torch.randn(k, k, generator=g))[0] for _ in range(2))
        student, teacher = base @ turn + 2 * knowledge + own, base @ other + knowledge
        both = torch.cat([base, teacher], 1)
        spread, left, last = errors_beyond([Moments.of(student[i::10], both[i::10]) for i in range(10)], k)
        off.append(float((left - last).sum() / spread.sum()) - 2 / 3)
    assert low < sum(off) / 4 < high
