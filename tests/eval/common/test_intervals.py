"""Bootstrap and jackknife: intervals that cover, and that pairing narrows."""

import numpy as np
import pytest

from eval.common.intervals import difference, interval, jackknife, left_out, ratio_draws, resamples


def test_resamples_are_those_of_ids():
    weights = resamples(50, 400)
    assert weights.shape == (400, 50)
    assert (weights.sum(1) == 50).all()
    assert np.array_equal(weights, resamples(50, 400))
    assert (weights > 0).mean() == pytest.approx(1 - (1 - 1 / 50) ** 50, abs=0.01)
    values, asked = np.random.default_rng(0).random((2, 50))
    ids = [np.repeat(np.arange(50), row.astype(int)) for row in weights]
    expected = [values[drawn].sum() / asked[drawn].sum() for drawn in ids]
    np.testing.assert_allclose(ratio_draws(values, asked, weights), expected)


def test_interval_of_a_mean_covers():
    rng, intervals = np.random.default_rng(1), []
    weights = resamples(80, 300)
    for _ in range(400):
        sample = rng.exponential(size=80)
        intervals.append(interval(sample.mean(), ratio_draws(sample, np.ones(80), weights)))
    assert 0.9 < np.mean([low <= 1 <= high for low, high in intervals]) < 0.98


def test_jackknife_of_a_mean_is_its_standard_error():
    sample = np.random.default_rng(0).standard_normal(40)
    weights = left_out(40)
    assert np.array_equal(weights.sum(0), np.full(40, 39))
    low, high = jackknife(sample.mean(), ratio_draws(sample, np.ones(40), weights))
    assert (high - low) / 3.92 == pytest.approx(sample.std(ddof=1) / 40**0.5)
    assert (low + high) / 2 == pytest.approx(sample.mean())


def test_groups_are_as_large_as_each_other():
    weights = left_out(1003)
    assert len(weights) == 40
    assert set((weights == 0).sum(1)) == {25, 26}
    assert ((weights == 0).sum(0) == 1).all()
    with pytest.raises(ValueError, match="three images"):
        left_out(2)


def test_equal_runs_do_not_differ():
    sample = np.random.default_rng(0).random(40)
    draws = ratio_draws(sample, np.ones(40), resamples(40))
    found = difference(sample.mean(), draws, sample.mean(), draws)
    assert found == {"difference": 0, "difference_interval": (0, 0), "within_noise": True}


def test_pairing_narrows():
    """A gain of 0.1 on captions that differ by 1: found with paired ids, lost without."""
    rng = np.random.default_rng(0)
    captions = rng.standard_normal(200)
    ours, base = (captions + gain + 0.1 * rng.standard_normal(200) for gain in (0.1, 0))
    one, weights = np.ones(200), resamples(200)
    draws, base_draws = (ratio_draws(sample, one, weights) for sample in (ours, base))
    unpaired = ratio_draws(base, one, resamples(200, seed=1))
    paired = difference(ours.mean(), draws, base.mean(), base_draws)
    alone = difference(ours.mean(), draws, base.mean(), unpaired)
    widths = [float(np.diff(found["difference_interval"])[0]) for found in (paired, alone)]
    assert widths[0] < 0.3 * widths[1]
    assert (paired["within_noise"], alone["within_noise"]) == (False, True)
    assert paired["difference"] == pytest.approx(0.1, abs=0.03)
