"""Calibration: the surprise of its definition, exact windows, a limit that follows the alarm budget."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import Channel
from opcua_detector.calibration import (
    FOLDS,
    GRID,
    KNEE_SHARE,
    MAX_TRIMMED,
    MIN_HELD_OUT,
    Calibration,
    calibrate,
    held_out_residuals,
    unlike_the_rest,
)
from opcua_detector.errors import RecordError
from opcua_detector.kernels.score import SCORE, SURPRISE_CAP, surprise
from tests import oracle_score
from tests.plants import DeviationParams, DeviationPlugin, noise_record

KINDS = ["trans", "bound", "conf", "forecast"]
PERIOD_S = 0.01


def healthy(n=4000, n_channels=4, seed=0):
    """Residuals as methods give them: rare ones, heavy-tailed ones, many ties."""
    rng = np.random.default_rng(seed)
    out = rng.lognormal(0, 1, (n, n_channels))
    out[:, 0] = rng.random(n) < 0.01
    out[:, 2:3] = np.round(out[:, 2:3], 1)
    return out


def calibrated(held_out, *, windows=(20,), n_states=1, per_day=100.0, gap=None, groups=None, state=None):
    n, n_channels = held_out.shape
    channels = [Channel(f"t{c}", f"t{c}", KINDS[c % len(KINDS)]) for c in range(n_channels)]
    names = groups or [f"m/{c.kind}" for c in channels]
    state = np.arange(n) * n_states // n if state is None else state
    gap = np.zeros(n, np.uint8) if gap is None else gap
    return calibrate(channels, names, held_out, gap, state, range(n_states), windows, PERIOD_S, per_day)


def one_channel(x):
    """Surprise of the rows of one channel, as a function of a residual."""
    c = calibrated(np.asarray(x, float)[:, None])
    row = (c.grid[0, 0], c.level[0, 0], int(c.used[0, 0]), float(c.tail[0, 0, 0]), float(c.tail[0, 0, 1]))
    return c, lambda value: surprise(float(value), *row)


# -- surprise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [
    np.round(np.random.default_rng(1).lognormal(0, 0.5, 1500), 1),  # ties
    np.repeat(np.arange(300.0), 5),
    np.zeros(1200),
    (np.random.default_rng(2).random(2000) < 0.004).astype(float),
], ids=["rounded", "each five times", "all zero", "rare ones"])
def test_the_table_gives_the_definition_at_and_between_all_held_out_values(x):
    c, of = one_channel(x)
    values = np.unique(x)
    assert len(values) <= GRID
    for value in [*values, *(values[:-1] + np.diff(values) / 2), values[0] - 1.0]:
        if value <= c.tail[0, 0, 0]:
            assert of(value) == pytest.approx(min(-math.log(oracle_score.p_value(value, x)), SURPRISE_CAP), abs=1e-12)


def test_more_values_than_the_table_holds_round_the_surprise_up_by_one_entry_at_most():
    x = np.random.default_rng(3).lognormal(0, 1, 5000)
    c, of = one_channel(x)
    used = int(c.used[0, 0])
    grid = c.grid[0, 0, :used]
    for value in np.random.default_rng(4).choice(x, 50):
        if value <= c.tail[0, 0, 0]:
            exact = -math.log(oracle_score.p_value(value, x))
            above = grid[np.searchsorted(grid, value)]
            assert exact - 1e-12 <= of(value) <= -math.log(oracle_score.p_value(above, x)) + 1e-12


def test_a_healthy_residual_is_surprising_as_often_as_its_p_value_says():
    rng = np.random.default_rng(5)
    _, of = one_channel(rng.lognormal(0, 1, 20_000))
    fresh = np.array([of(x) for x in rng.lognormal(0, 1, 4000)])
    for p in (0.5, 0.1, 0.02):
        assert np.mean(fresh >= -math.log(p)) == pytest.approx(p, rel=0.25)


def test_beyond_the_knee_surprise_grows_by_the_logarithm_of_the_residual_up_to_its_cap():
    x = np.random.default_rng(6).lognormal(0, 1, 5000)
    c, of = one_channel(x)
    knee, slope = c.tail[0, 0]
    assert knee == pytest.approx(np.quantile(x, KNEE_SHARE))
    start = -math.log(1 - KNEE_SHARE)
    for factor in (1.5, 2.0, 3.0):
        assert of(knee * factor) == pytest.approx(min(start + math.log(factor) / slope, SURPRISE_CAP))
    assert of(1e300) == of(math.inf) == SURPRISE_CAP


@settings(deadline=None, derandomize=True, max_examples=40)
@given(hnp.arrays(float, 1200, elements=st.floats(0, 1e6)), st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_surprise_never_falls_while_the_residual_rises(x, values):
    c, of = one_channel(x)
    knee = float(c.tail[0, 0, 0])
    # At the knee itself the two halves may differ by one entry of the table.
    for low, high in pairwise(sorted(values)):
        if low > knee or high <= knee:
            assert of(low) <= of(high)
        assert 0.0 <= of(low) <= SURPRISE_CAP


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20, unique=True), st.floats(0, 200), st.floats(0.1, 3),
       st.one_of(st.just(math.inf), st.floats(1, 150)))
def test_the_surprise_kernel_is_its_twin(entries, x, slope, knee):
    grid = np.sort(entries)
    level = np.linspace(0.1, 9, len(grid) + 1)
    ours = surprise(x, grid, level, len(grid), knee, slope)
    assert ours == pytest.approx(oracle_score.surprise(x, grid, level, len(grid), knee, slope), abs=1e-14)


# -- windows and score ------------------------------------------------------------------------------------------

TABLES = {n_states: calibrated(healthy(), windows=(5, 3), n_states=n_states) for n_states in (1, 2)}
N_ROWS = 30
residuals = hnp.arrays(float, (N_ROWS, 4), elements=st.one_of(st.floats(0, 50), st.sampled_from([np.nan, 0.0, 1.0])))
flags = hnp.arrays(np.uint8, N_ROWS, elements=st.sampled_from([0, 0, 0, 0, 1]))
states = hnp.arrays(np.int64, N_ROWS, elements=st.sampled_from([-1, 0, 0, 1]))


def stepped(calibration, residual, gap, state):
    """Window statistics and outputs of a record, one row at a time."""
    scorer = calibration.scorer()
    stats, outs = [], []
    for t in range(len(residual)):
        if gap[t]:
            scorer.reset()
        scorer.step(residual[t], int(state[t]))
        stats.append(scorer.stat.copy())
        outs.append(scorer.out.copy())
    return np.array(stats), np.array(outs)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(residuals, flags, states, st.sampled_from([1, 2]))
def test_stream_batch_and_oracle_agree_over_gaps_masks_states_and_windows(residual, gap, state, n_states):
    calibration = TABLES[n_states]
    state = np.minimum(state, n_states - 1)
    stats, outs = calibration.score_rows(residual, gap, state)
    streamed_stats, streamed_outs = stepped(calibration, residual, gap, state)
    assert_array_equal(streamed_stats, stats)
    assert_array_equal(streamed_outs, outs)
    expected_stats, expected_outs = oracle_score.score_rows(residual, gap, state, calibration)
    assert_allclose(stats, expected_stats, rtol=0, atol=1e-12)
    assert_allclose(outs[:, [0, 3, 4, 5]], expected_outs[:, [0, 3, 4, 5]], rtol=0, atol=1e-12)


def test_the_leading_group_and_window_are_those_that_the_score_comes_from():
    calibration = TABLES[1]
    residual = healthy(300, seed=9)
    stats, outs = calibration.score_rows(residual, np.zeros(300, np.uint8), np.zeros(300, np.int64))
    known = ~np.isnan(outs[:, SCORE])
    assert known.sum() > 290
    for t in np.flatnonzero(known):
        g, w = int(outs[t, 1]), int(outs[t, 2])
        ratio = stats[t] / calibration.limit[0]
        assert outs[t, SCORE] == ratio[g, w] == np.nanmax(ratio)


def test_a_group_speaks_once_half_of_its_window_is_known():
    calibration = calibrated(healthy(), windows=(10,))
    outs = stepped(calibration, healthy(12), np.zeros(12, np.uint8), np.zeros(12, np.int64))[1]
    assert_array_equal(np.isnan(outs[:, SCORE]), np.arange(12) < 4)


def test_a_state_that_was_not_learnt_gives_no_score():
    calibration = TABLES[2]
    outs = stepped(calibration, healthy(30), np.zeros(30, np.uint8), np.repeat([0, -1, 1], 10))[1]
    assert np.isnan(outs[10:20, SCORE]).all()
    assert np.isfinite(outs[[9, 29], SCORE]).all()


def test_rounding_of_the_window_sums_stays_below_1e_10_over_100_000_rows():
    rng = np.random.default_rng(7)
    n, window = 100_000, 50
    residual = rng.random((n, 4))
    residual[rng.random((n, 4)) < 1e-3] = 1e5  # large values leave their rounding behind in a running sum
    residual[-200:] = rng.random((200, 4))
    calibration = calibrated(healthy(), windows=(window,))
    scorer = calibration.scorer()
    scorer.rows(residual, np.zeros(n, np.uint8), np.zeros(n, np.int64))
    last = residual[-window:]
    naive = np.zeros(4)
    for new, old in zip(residual, np.vstack([np.zeros((window, 4)), residual]), strict=False):
        naive += new - old
    exact = [math.fsum(last[:, c]) for c in range(4)]
    assert np.abs(naive - exact).max() > 1e-10  # so the promise is one
    assert_allclose(scorer.sums[:, 0, 1, 0], exact, rtol=0, atol=1e-10)
    c = calibration
    for j in range(4):
        exact_surprise = math.fsum(
            surprise(x, c.grid[0, j], c.level[0, j], int(c.used[0, j]), *c.tail[0, j]) for x in last[:, j])
        assert scorer.sums[j, 0, 0, 0] == pytest.approx(exact_surprise, rel=0, abs=1e-10)


def test_after_a_reset_nothing_of_the_rows_before_is_left():
    calibration = calibrated(healthy(), windows=(7, 20))
    fresh, used = calibration.scorer(), calibration.scorer()
    for row in healthy(33, seed=1) * 100:
        used.step(row, 0)
    used.reset()
    for row in healthy(40, seed=2):
        fresh.step(row, 0)
        used.step(row, 0)
        assert_array_equal(fresh.out, used.out)
        assert_array_equal(fresh.stat, used.stat)


def test_window_means_are_those_of_the_known_residuals_and_nan_where_there_are_none():
    calibration = calibrated(healthy(), windows=(3, 5))
    scorer = calibration.scorer()
    rows = np.array([[9, 9, np.nan, 9], [1, 2, np.nan, np.nan], [3, np.nan, np.nan, 4], [5, 6, np.nan, 8.0]])
    for row in rows:
        scorer.step(row, 0)
    into = np.zeros(4)
    scorer.window_means(into)
    assert_allclose(into, [3, 4, np.nan, 6])


def test_the_channel_that_is_furthest_off_carries_the_largest_share():
    calibration = calibrated(healthy(), groups=["m/x"] * 4)
    scorer = calibration.scorer()
    for row in healthy(20, seed=3):
        scorer.step(row * [1, 50, 1, 1e4], 0)
    share = scorer.channel_shares(0)
    assert int(np.argmax(share)) == 3 and share.min() >= 0
    assert_array_equal(scorer.channel_shares(-1), np.zeros(4))


# -- calibrating ------------------------------------------------------------------------------------------------


def limits(budget, x):
    return calibrated(x, windows=(10, 30), per_day=budget).limit


def test_the_limit_never_falls_when_fewer_false_alarms_are_wanted():
    x = healthy(20_000)
    by_budget = [limits(budget, x) for budget in (0.01, 0.1, 1, 10, 100, 1000, 10_000)]
    for rarer, more_often in pairwise(by_budget):
        assert (rarer >= more_often).all()
    assert (by_budget[0] > by_budget[-1]).any()


@pytest.mark.parametrize("per_day", [1.0, 1000.0])
def test_fresh_healthy_residuals_stay_within_the_alarm_budget(per_day):
    calibration = calibrated(healthy(30_000, seed=1), windows=(20,), per_day=per_day)
    n = 60_000
    fresh = healthy(n, seed=2)
    score = calibration.score_rows(fresh, np.zeros(n, np.uint8), np.zeros(n, np.int64))[1][:, SCORE]
    alarms = int(((score[1:] >= 1) & (score[:-1] < 1)).sum())
    budget = per_day * n * PERIOD_S / 86400
    assert alarms <= 3 * budget + 3


def test_residuals_far_off_are_over_the_limit():
    calibration = calibrated(healthy(10_000), windows=(20,), per_day=1.0)
    score = stepped(calibration, healthy(40) * 1e3 + 1e3, np.zeros(40, np.uint8), np.zeros(40, np.int64))[1][-1, SCORE]
    assert score > 1


def test_each_state_is_calibrated_by_its_own_rows():
    x = healthy(8000, n_channels=2)
    state = np.arange(8000) // 4000
    x[state == 1] *= 10
    c = calibrated(x, n_states=2, state=state)
    assert_allclose(c.tail[1, 1, 0] / c.tail[0, 1, 0], 10, rtol=0.3)
    row = np.array([0.0, 5.0])
    means = []
    for s in (0, 1):
        scorer = c.scorer()
        for _ in range(20):
            scorer.step(row, s)
        means.append(scorer.stat[1, 0])
    assert means[0] > 2 * means[1]


@pytest.mark.parametrize("n_states", [1, 2])
def test_a_record_too_short_is_an_error_that_names_channel_and_state(n_states):
    x = healthy(MIN_HELD_OUT * n_states + 200)
    x[-MIN_HELD_OUT:, 1] = np.nan
    with pytest.raises(RecordError) as caught:
        calibrated(x, n_states=n_states)
    text = str(caught.value)
    assert "channel bound of t1" in text and "too short" in text and "next step: " in text
    assert f"{MIN_HELD_OUT} needed" in text
    assert ("in state" in text) == (n_states == 2)


def test_a_record_that_cannot_support_the_wish_says_so():
    notes = calibrated(healthy(1500), windows=(300,), per_day=0.01).notes
    assert notes and all("0.01 false alarms a day" in note for note in notes)


def test_windows_longer_than_the_record_still_give_a_finite_limit():
    c = calibrated(healthy(1500), windows=(20, 5000))
    assert np.isfinite(c.limit).all() and (c.limit > 0).all()


# -- stretches unlike the rest ----------------------------------------------------------------------------------


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
    assert unlike_the_rest(stat, 20) == []


def test_what_fills_more_than_its_share_of_the_record_is_no_exception():
    n = 10_000
    assert unlike_the_rest(means_with_stretch(n, 0, int(n * MAX_TRIMMED * 1.5), 8.0), 50) == []


# -- held out ---------------------------------------------------------------------------------------------------


def test_held_out_residuals_come_from_models_that_never_saw_their_rows():
    record = noise_record(1003, ["a", "b"])
    plugin = DeviationPlugin()
    params = DeviationParams(memory=4)
    full = plugin.open(plugin.fit(record, params), record.tags).residuals(record)
    plugin.fitted_on.clear()
    out = held_out_residuals(plugin, record, params, full)
    assert len(plugin.fitted_on) == FOLDS
    stamps = [set(seen.source_ns.tolist()) for seen in plugin.fitted_on]
    for one in record.source_ns.tolist():
        assert sum(one in seen for seen in stamps) == FOLDS - 1
    assert_array_equal(np.isnan(out[:, 0]), np.arange(1003) < 4)  # folds are warmed up by the rows before them
    assert (out[4:] != full[4:]).any()
    assert all(int(seen.gap.sum()) <= 2 for seen in plugin.fitted_on)  # the hole is a gap to the fit


def test_a_plugin_that_does_not_learn_keeps_its_residuals():
    record = noise_record(500, ["a"])
    plugin = DeviationPlugin()
    plugin.learns = False
    full = np.ones((500, 1))
    assert held_out_residuals(plugin, record, DeviationParams(), full) is full
    assert plugin.fitted_on == []


def test_a_calibration_is_not_changed_by_scoring():
    c = calibrated(healthy())
    before = {name: getattr(c, name).copy() for name in ("grid", "level", "tail", "limit", "usual", "scale")}
    c.score_rows(healthy(500, seed=4), np.zeros(500, np.uint8), np.zeros(500, np.int64))
    for name, array in before.items():
        assert_array_equal(getattr(c, name), array)
    assert isinstance(replace(c, notes=("x",)), Calibration)
