import math

import numpy as np
import pytest
from scipy import stats

from kdx.inference import Estimate, bootstrap_parts, holm, known_images, ratio_values, tukey, two_factor


def test_two_factor_by_hand():
    # fold means 1, 3; image means 0, 4; nothing left over: 0 -1 +1 ... = -1 3 / 1 5
    found = two_factor([[-1.0, 3.0], [1.0, 5.0]])
    assert found.mean == 2
    fold = math.sqrt((1 / 2 + 1) * 2)  # the variance of 1, 3 is 2; two folds: as many images held out as trained on
    image = math.sqrt(8 / 2)  # the variance of 0, 4 is 8
    assert found.parts == ((pytest.approx(fold), 1), (pytest.approx(image), 1))
    half = stats.t.ppf(0.975, 1) * math.hypot(fold, image)
    assert found.interval() == pytest.approx((2 - half, 2 + half))
    assert two_factor([[-1.0, 3.0], [1.0, 5.0]], ratio=0).parts[0][0] == pytest.approx(1)  # 2 / 2 folds


def test_images_without_a_value_are_left_out_unless_too_few_remain():
    gap = math.nan
    assert known_images([[1, 2, gap], [3, 4, 5]]).tolist() == [[1, 2], [3, 4]]
    assert math.isnan(two_factor(known_images([[1, gap, gap], [3, 4, 5]])).mean)
    assert math.isnan(two_factor(known_images(np.full((2, 3), gap))).mean)


def test_two_factor_components_match_a_simulation():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        x = 2 * rng.normal(size=(4, 1)) + 3 * rng.normal(size=12) + rng.normal(size=(4, 12))
        found.append([error**2 for error, _ in two_factor(x).parts])
    fold, image = np.mean(found, axis=0)
    assert fold == pytest.approx((1 / 4 + 1 / 3) * (4 + 1 / 12), rel=0.05)
    assert image == pytest.approx(9 / 12, rel=0.05)


def test_images_that_differ_less_than_by_chance_have_no_component():
    opposite = np.array([[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]])
    assert two_factor(opposite).parts[1][0] == 0


def test_one_factor_is_students_t():
    values = [1.0, 2.0, 4.0]
    assert two_factor(values, ratio=0).interval() == pytest.approx(
        stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    )
    assert two_factor([values]).interval() == pytest.approx(
        stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    )
    greater = stats.ttest_1samp(values, 1.5, alternative="greater").pvalue
    assert two_factor(values, ratio=0).p_above(1.5) == pytest.approx(greater)
    assert two_factor(values, ratio=0).p_below(1.5) == pytest.approx(1 - greater)
    for wrong in ([1.0], [[1.0], [2.0]], np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match="values: expected"):
            two_factor(wrong)


def test_p_is_the_level_whose_limit_is_the_bound():
    estimate = Estimate(1.0, ((0.4, 2), (0.1, 50)))
    assert 1 - estimate.half(estimate.p_above()) == pytest.approx(0)
    assert 1 + estimate.half(estimate.p_below(1.7)) == pytest.approx(1.7)
    assert estimate.p_above() + estimate.p_below() == 1
    assert Estimate(1e6, ((1e-3, 99),)).p_above() == pytest.approx(0, abs=1e-14)


def test_equal_fold_means_do_not_make_images_certain():
    """Counts of three folds that happen to be equal, although each varies over sets of images of its own."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(-1, 2, size=(3, 100))
    for count in (0, 2):
        found = two_factor([bootstrap_parts(count, of) for of in drawn])
        assert found.mean == pytest.approx(count)
        assert not found.certain
        of_images = drawn.mean(0).std(ddof=1)  # the bootstrap's error of the mean over these folds
        assert found.half(0.025) == pytest.approx(stats.t.ppf(0.975, 99) * of_images)
        assert found.p_above(count + of_images) == pytest.approx(1 - stats.t.sf(1, 99))


def test_values_that_do_not_vary_prove_nothing():
    assert two_factor(np.full((3, 5), 0.1)).certain
    assert math.isnan(two_factor(np.full((3, 5), 0.1)).p_above())
    assert two_factor(np.zeros((3, 5))).certain
    missing = two_factor([[1.0, 2.0], [math.nan, 1.0]])
    assert math.isnan(missing.mean)
    assert math.isnan(missing.p_above())
    assert np.isnan(missing.interval()).all()


def test_the_detectable_effect_is_detected_with_about_80_percent_power():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(500, 5, 1)) + rng.normal(size=(500, 1, 30)) + rng.normal(size=(500, 5, 30))
    typical = np.median([two_factor(x, ratio=0).detectable() for x in noise])
    found = [two_factor(x + typical, ratio=0).p_above() <= 0.025 for x in noise]
    assert 0.7 < np.mean(found) < 0.9


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert holm([math.nan, 0.01]).tolist() == pytest.approx([math.nan, 0.02], nan_ok=True)
    assert len(holm([])) == 0


def test_tukey_equals_scipy_for_one_way_blocks_and_t_for_two():
    a, b = [1.0, 2.0, 4.0], [1.5, 3.5, 4.0]
    pair = two_factor(np.subtract(a, b))
    assert tukey([a, b]) == pytest.approx(pair.half(0.025), rel=1e-4)
    three = np.random.default_rng(0).normal(size=(3, 4))
    within = three - three.mean(1, keepdims=True) - three.mean(0) + three.mean()
    by_hand = stats.studentized_range.ppf(0.95, 3, 6) * math.sqrt((within**2).sum() / 6 / 4)
    assert tukey(three, ratio=0) == pytest.approx(by_hand)
    assert tukey(three + 100 * np.arange(4), ratio=0) == pytest.approx(by_hand)  # what moves all networks
    pair = np.random.default_rng(1).normal(size=(2, 3, 9))
    assert tukey(pair) == pytest.approx(two_factor(pair[0] - pair[1]).half(0.025), rel=1e-4)
    hits = np.zeros((2, 2, 20))
    hits[0, 0, :4] = hits[0, 1, 4:8] = 1  # the means of folds are equal, and say nothing of images
    assert tukey(hits) == pytest.approx(two_factor(hits[0] - hits[1]).half(0.025), rel=1e-4)
    assert tukey(hits) > 0.05
    for values in (hits, three):
        assert math.isnan(tukey(np.where(values == values.flat[0], math.nan, values)))
    with pytest.raises(ValueError, match="expected \\(networks, folds\\)"):
        tukey([[1.0], [2.0]])


def test_ratio_values_have_the_ratio_of_means_as_their_mean_and_its_delta_method_error():
    rng = np.random.default_rng(0)
    below = 2 + 0.1 * rng.normal(size=(2, 400))
    above = 0.5 * below + 0.1 * rng.normal(size=(2, 400))
    found = ratio_values(above, below)
    assert found.mean(1) == pytest.approx(above.mean(1) / below.mean(1))
    drawn = rng.integers(0, 400, (2000, 400))
    bootstrap = (above[0][drawn].mean(1) / below[0][drawn].mean(1)).std()
    assert stats.sem(found[0]) == pytest.approx(bootstrap, rel=0.1)
    assert np.isnan(ratio_values([[1.0, 1.0]], [[-1.0, 0.5]])).all()


def test_bootstrap_parts_of_a_mean_have_its_standard_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    sets = rng.multinomial(200, np.full(200, 1 / 200), 400)
    parts = bootstrap_parts(x.mean(), sets @ x / 200)
    assert parts.mean() == pytest.approx(x.mean())
    of_images, of_sets = (two_factor(values[None]).half(0.025) for values in (x, parts))
    assert of_sets == pytest.approx(of_images, rel=0.1)
