"""Limits from the alarm budget: the tail of known distributions, a record too short, the rate that is realised."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.signal import lfilter
from scipy.stats import norm

from opcua_detector.api import Channel
from opcua_detector.calibration import DAY_S, UNSUPPORTED, calibrate
from opcua_detector.kernels.score import SCORE
from opcua_detector.limits import LEAST_LIMIT, MARGIN, MAX_TRIMMED, MIN_CLUSTERS, tail_limit, unlike_the_rest
from opcua_detector.views import Part

PERIOD_S = 0.01
N = 100_000


def smooth(x, window):
    """Trailing means over a window, in units of their own standard deviation."""
    sums = np.cumsum(np.concatenate([np.zeros(1), x]))
    return (sums[window:] - sums[:-window]) / math.sqrt(window)


def tail(x, window, rate, typical=0.0, normal=False):
    """`tail_limit` of a view whose one window is so long."""
    return tail_limit(x, typical or float(window), rate, normal=normal)


def samples(draw, seeds=range(8)):
    """A function of a generator for several seeds."""
    return [draw(np.random.default_rng(seed)) for seed in seeds]


# -- the tail -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e-4, 1e-5, 1e-6])
def test_an_exponential_tail_is_met(rate):
    found = np.array([tail(x, 1, rate)[0] for x in samples(lambda rng: rng.exponential(size=N))])
    exact = -math.log(rate)
    assert 0.93 * exact < np.median(found) < 1.1 * exact
    assert found.min() > 0.8 * exact and found.max() < 1.35 * exact


def test_a_wish_for_more_alarms_than_the_peaks_that_count_is_met_or_undercut():
    for x in samples(lambda rng: rng.exponential(size=N)):
        limit, _ = tail(x, 1, 1e-3)
        fresh = np.random.default_rng(99).exponential(size=N)
        assert 10 <= (fresh > limit).sum() <= 1.3e-3 * N


def test_the_unit_of_the_values_does_not_matter():
    x = np.random.default_rng(1).exponential(size=N)
    assert tail(7 * x, 1, 1e-6)[0] == pytest.approx(7 * tail(x, 1, 1e-6)[0])


@pytest.mark.parametrize("rate", [1e-3, 1e-4, 1e-6, 1e-8])
def test_a_normal_tail_is_met_inside_the_record_and_overestimated_beyond_it(rate):
    found = np.array([tail(x, 1, rate)[0] for x in samples(lambda rng: rng.standard_normal(N))])
    exact = float(norm.isf(rate))
    assert 0.97 * exact < np.median(found) < 1.3 * exact  # straight on a logarithmic scale, where the normal one bends
    assert found.min() > 0.85 * exact


def test_rows_that_overlap_count_as_one_event():
    window = 50
    x = smooth(np.random.default_rng(2).standard_normal(N), window)
    limit, clusters = tail(x, window, 1e-4)
    assert clusters < 0.1 * N / 10  # of 10 000 rows above the quantile
    over = np.flatnonzero(x > limit)
    events = 0 if len(over) == 0 else 1 + int((np.diff(over) > window).sum())
    assert events <= 3 * 1e-4 * len(x)


@pytest.mark.parametrize(("normal", "most"), [(True, 2.5), (False, 6.0)])
@pytest.mark.parametrize(("window", "n"), [(300, 3000), (300, 1500), (150, 2000)])
def test_a_record_of_few_independent_windows_says_so_and_its_limit_stands_above_all_that_was_seen(
        window, n, normal, most):
    for x in samples(lambda rng: smooth(rng.standard_normal(n + window - 1), window), range(20)):
        limit, clusters = tail(x, window, 1e-6, normal=normal)
        assert clusters < MIN_CLUSTERS
        assert limit >= MARGIN * x.max() and limit >= LEAST_LIMIT
        assert limit < most * max(x.max(), LEAST_LIMIT)  # and not out of all reason


@pytest.mark.parametrize("normal", [False, True])
def test_a_short_record_is_extrapolated_from_its_highest_value_by_the_tail_it_is_said_to_have(normal):
    # Of k independent values the highest is exceeded with 1 / (k + 1): a tail e^-x, or e^(-x^2 / 2), goes through it.
    k, typical, rate = 100, 20.0, 1e-6
    x = np.zeros(int(k * typical))
    x[7] = 3.0
    limit, clusters = tail(x, 50, rate, typical, normal)
    assert clusters == 1
    times = math.log(1 / (rate * typical) + 1) / math.log(k + 1)
    assert limit == pytest.approx(3.0 * (math.sqrt(times) if normal else times))


def test_the_limit_never_falls_while_fewer_false_alarms_are_wanted():
    for x, window in ((np.random.default_rng(3).exponential(size=N), 1),
                      (smooth(np.random.default_rng(4).standard_normal(2000), 300), 300)):
        found = [tail(x, window, rate)[0] for rate in np.geomspace(1e-2, 1e-9, 15)]
        assert all(often <= rare for often, rare in pairwise(found)) and found[-1] > found[0]


def test_where_the_budget_expects_none_in_the_record_the_limit_stands_above_it():
    x = np.random.default_rng(5).exponential(size=N)
    x[1000] = 60.0
    assert tail(x, 1, 0.5 / N)[0] >= 60.0 * MARGIN
    assert tail(x, 1, 100 / N)[0] < 60.0  # where it expects many, one of them does not set it


@pytest.mark.parametrize("x", [np.full(500, np.nan), np.zeros(0), np.zeros(500), np.full(500, -3.0)],
                         ids=["nothing known", "no row", "flat", "below the median"])
def test_a_record_without_a_tail_has_the_least_limit(x):
    limit, clusters = tail(x, 10, 1e-6)
    assert limit == LEAST_LIMIT and clusters == 0


def test_rows_without_a_verdict_are_left_out():
    x = np.random.default_rng(6).exponential(size=N)
    holed = np.full(2 * N, np.nan)
    holed[:N] = x
    assert tail(holed, 1, 1e-5) == tail(x, 1, 1e-5)


# -- the budget, realised -----------------------------------------------------------------------------------------


def predictors(tags, *, nonlinear):
    channels = tuple(Channel(tag, tag, kind) for kind in ("forecast", "relation") for tag in tags)
    return [Part("regression", channels, tuple(c.tag for c in channels), True, nonlinear)]


def errors(n, n_channels, memory, seed):
    """Absolute forecast errors: normal, each row remembering so much of the row before."""
    white = np.random.default_rng(seed).standard_normal((n, n_channels))
    return np.abs(lfilter([math.sqrt(1 - memory**2)], [1, -memory], white, axis=0))


def alarms_of(calibration, residual, off_delay=50):
    """Alarms as the engine counts them: one lasts until the score was below the limit for 50 rows."""
    n = len(residual)
    score = calibration.score_rows(residual, np.zeros(n, np.uint8), np.zeros(n, np.int64))[:, SCORE]
    over = np.flatnonzero(score >= 1)
    return 0 if len(over) == 0 else 1 + int((np.diff(over) > off_delay).sum())


@pytest.mark.parametrize("memory", [0.0, 0.9], ids=["independent rows", "rows that remember"])
@pytest.mark.parametrize("per_day", [1000.0, 2000.0])
def test_what_was_asked_for_is_realised_on_fresh_rows_where_the_record_supports_it(memory, per_day):
    parts, realised, asked = predictors("abc", nonlinear=False), 0, 0.0
    for seed in range(2):
        c = calibrate(parts, errors(N, 6, memory, seed), np.zeros(N, np.uint8), np.zeros(N, np.int64), [0], (),
                      PERIOD_S, per_day)
        assert c.notes == ()
        fresh = errors(500_000, 6, memory, 100 + seed)
        realised += alarms_of(c, fresh)
        asked += per_day * len(fresh) * PERIOD_S / DAY_S
    assert asked / 2 < realised < 2 * asked


@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_day_of_silence_is_kept_on_fresh_rows_or_refused(nonlinear):
    c = calibrate(predictors("abc", nonlinear=nonlinear), errors(N, 6, 0.5, 1), np.zeros(N, np.uint8),
                  np.zeros(N, np.int64), [0], (), PERIOD_S, 1.0)
    fresh = errors(1_000_000, 6, 0.5, 2)  # 2.8 hours: a tenth of an alarm is asked for
    assert alarms_of(c, fresh) <= 1 or c.notes


# -- what the record cannot support -------------------------------------------------------------------------------


def test_a_view_beside_the_leading_ones_that_the_record_cannot_support_never_alarms():
    n = 400
    x = errors(n, 16, 0.0, 3)
    c = calibrate(predictors("abcdefgh", nonlinear=False), x, np.zeros(n, np.uint8), np.zeros(n, np.int64), [0], (),
                  PERIOD_S, 1.0)
    off = [v for v, view in enumerate(c.views) if c.limit[0, v] == UNSUPPORTED]
    assert {c.views[v].role for v in off} == {"beside"} and len(off) == 8
    assert c.notes and "1 false alarms a day" in c.notes[0] and "too few peaks" in c.notes[0]
    wild = np.full((300, 16), 1e9)
    outs, _, values = c.scorer().rows(wild, np.zeros(300, np.uint8), np.zeros(300, np.int64), details=True)
    assert (values[-1, off] > 5).all() and not np.isin(outs[:, 1], off).any()
    assert outs[-1, SCORE] > 1  # the leading one, whose limit stands above all that was seen, alarms


def test_parts_of_a_record_that_do_not_agree_on_the_limit_are_told():
    """In the third fifth some rows err twice as much, as where its model is the worse one: all alarms lie there."""
    x = errors(N, 6, 0.0, 5)
    zeros = np.zeros(N, np.uint8), np.zeros(N, np.int64)
    assert calibrate(predictors("abc", nonlinear=False), x, *zeros, [0], (), PERIOD_S, 1000.0).notes == ()
    for at in range(41_000, 60_000, 1000):
        x[at:at + 12] *= 2.0
    (note,) = calibrate(predictors("abc", nonlinear=False), x, *zeros, [0], (), PERIOD_S, 1000.0).notes
    assert "do not agree on the limit: of 12 alarms" in note and "cannot be vouched for" in note


def test_a_leading_view_is_never_switched_off():
    for n in (300, 1000, 4000):
        c = calibrate(predictors("ab", nonlinear=False), errors(n, 4, 0.0, 4), np.zeros(n, np.uint8),
                      np.zeros(n, np.int64), [0], (), PERIOD_S, 0.1)
        lead = [v for v, view in enumerate(c.views) if view.role == "leading"]
        assert lead and (c.limit[0, lead] < 100).all() and (c.limit[0, lead] >= LEAST_LIMIT).all()


# -- stretches unlike the rest ------------------------------------------------------------------------------------


def means_with_stretch(n, start, stop, height, window=50):
    rng = np.random.default_rng(8)
    x = rng.exponential(size=n)
    x[start:stop] += height
    return np.convolve(x, np.ones(window) / window)[:n]


def test_a_stretch_of_5_percent_far_above_the_rest_is_named_and_nothing_else():
    n, start, stop = 20_000, 9000, 10_000
    runs = unlike_the_rest(means_with_stretch(n, start, stop, 8.0), 50)
    assert len(runs) == 1
    assert abs(int(runs[0][0]) - start) <= 50 and abs(int(runs[0][-1]) - stop) <= 50


def test_two_stretches_further_apart_than_a_window_are_two():
    stat = means_with_stretch(20_000, 9000, 9400, 8.0)
    stat[2000:2300] += 8.0
    assert [int(run[0]) // 1000 for run in unlike_the_rest(stat, 50)] == [2, 9]


@pytest.mark.parametrize("stat", [
    np.full(100, np.nan), np.zeros(500), np.full(500, 3.0), np.random.default_rng(0).random(5000),
], ids=["nothing known", "all zero", "all equal", "even"])
def test_an_even_record_has_no_stretch_unlike_the_rest(stat):
    assert_array_equal(unlike_the_rest(stat, 20), [])


def test_what_fills_more_than_its_share_of_the_record_is_no_exception():
    n = 10_000
    assert unlike_the_rest(means_with_stretch(n, 0, int(n * MAX_TRIMMED * 1.5), 8.0), 50) == []
