"""Interquartile means and bootstrap intervals: numbers by hand, scipy's, and what is refused."""

import numpy as np
import pytest

from jaxwm.evaluate.stats import bootstrap, iqm
from jaxwm.types import JaxwmError


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        # 8 values: floor(8 / 4) = 2 go at each end, (3 + 4 + 5 + 6) / 4 = 4.5 stays.
        ([8, 1, 2, 7, 3, 6, 4, 5], 4.5),
        # 5 values: floor(5 / 4) = 1 goes at each end, (10 + 20 + 60) / 3 = 30 stays.
        ([1000, 10, 20, 60, -1000], 30.0),
        # 7 values: still 1 at each end, (1 + 1 + 2 + 3 + 3) / 5 = 2.
        ([0, 1, 1, 2, 3, 3, 99], 2.0),
        # Fewer than 4: nothing goes, (1 + 2 + 9) / 3 = 4.
        ([9, 1, 2], 4.0),
        ([7.5], 7.5),
    ],
)
def test_iqm_by_hand(values, mean):
    assert iqm(values) == pytest.approx(mean, abs=1e-12)


def test_iqm_is_the_trimmed_mean_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for count in range(1, 40):
        values = generator.normal(size=count)
        assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-12)


def test_outliers_do_not_move_the_iqm():
    values = np.arange(12.0)
    wild = np.where(values > 8, 1e9, values)
    assert iqm(wild) == iqm(values)
    assert iqm(values + 3) == pytest.approx(iqm(values) + 3)
    assert iqm(-2 * values) == pytest.approx(-2 * iqm(values))


def test_bootstrap_by_hand():
    # Draws of three from (0, 0, 3): the number of threes among them is binomial with p = 1/3, so
    # the mean is 0, 1, 2 or 3 with probability 8/27, 12/27, 6/27 and 1/27; the cumulated ones are
    # 0.296, 0.741, 0.963 and 1. Of 95 %: quantile 0.025 is 0 and 0.975 is 3. Of 90 %: quantile
    # 0.05 is 0 and 0.95 is 2. Of 30 %: quantiles 0.35 and 0.65 are both 1.
    values = [0.0, 0.0, 3.0]
    assert bootstrap(values) == (0.0, 3.0)
    assert bootstrap(values, confidence=0.9) == (0.0, 2.0)
    assert bootstrap(values, confidence=0.3) == (1.0, 1.0)
    # The lowest is 3 only if all three draws are: 1/27 = 0.037, above 0.025 and below 0.05.
    assert bootstrap(values, np.min) == (0.0, 3.0)
    assert bootstrap(values, np.min, confidence=0.9) == (0.0, 0.0)


def test_bootstrap_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(3.0, 2.0, 20)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    # Two draws of 20,000 resamples: ends agree to some hundredths of a standard error (0.4).
    np.testing.assert_allclose(bootstrap(values, resamples=20_000), theirs, atol=0.05)


def test_a_bootstrap_can_be_repeated():
    values = np.random.default_rng(3).normal(size=6)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=np.random.default_rng(1))
    assert bootstrap(values, iqm, resamples=500) != bootstrap(values, iqm, resamples=500, seed=1)


def test_an_interval_lies_within_the_values_and_grows_with_confidence():
    values = np.random.default_rng(4).normal(size=7)
    low, high = bootstrap(values, resamples=2_000)
    lower, higher = bootstrap(values, resamples=2_000, confidence=0.99)
    assert values.min() <= lower <= low <= values.mean() <= high <= higher <= values.max()
    np.testing.assert_allclose(bootstrap([5.0] * 4), (5.0, 5.0))


@pytest.mark.parametrize("statistic", [iqm, bootstrap])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "There are no scores"),
        ([1.0, np.nan, np.inf], "2 of the 3 scores are NaN or infinite"),
        (np.zeros((2, 3)), r"one row of numbers; these have the shape \(2, 3\)"),
        (np.zeros(()), r"the shape \(\)"),
    ],
)
def test_what_are_no_scores_is_told(statistic, values, words):
    with pytest.raises(JaxwmError, match=words):
        statistic(values)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([1.0], {}, "at least two of them"),
        ([1.0, 2.0], {"confidence": 1.0}, "between 0 and 1; it cannot be 1.0"),
        ([1.0, 2.0], {"resamples": 0}, "at least one draw, not 0"),
    ],
)
def test_what_has_no_interval_is_told(values, options, words):
    with pytest.raises(JaxwmError, match=words):
        bootstrap(values, **options)
