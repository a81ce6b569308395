"""Calibration: the surprise of its definition, exact windows, a score that stream, batch and oracle agree on."""

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
    MIN_HELD_OUT,
    MIN_SLOPE,
    Calibration,
    calibrate,
    held_out_residuals,
    view_values,
)
from opcua_detector.detectors.regression import RegressionParams, RegressionPlugin
from opcua_detector.errors import RecordError
from opcua_detector.kernels.score import (
    BOUND,
    CONF,
    ENERGY_CAP,
    LEAD,
    LEAST,
    NAMED_FROM,
    PLAIN,
    SCORE,
    SHARPNESS,
    SLOW,
    SQUARE,
    SURPRISE,
    SURPRISE_CAP,
    TRANS,
    soft,
    surprise,
)
from opcua_detector.views import Part
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


def part(label, kinds_of_tags, *, predicts=False, nonlinear=None):
    """A method with these channels, given as (kind, tag)."""
    channels = tuple(Channel(tag, tag, kind) for kind, tag in kinds_of_tags)
    return Part(label, channels, tuple(tag for _, tag in kinds_of_tags), predicts, nonlinear)


def calibrated(held_out, *, windows=(20,), n_states=1, per_day=100.0, gap=None, parts=None, state=None):
    """Calibrate; by default each channel is of another tag and of a method that is none of our predictors."""
    n, n_channels = held_out.shape
    parts = parts or [part("m", [(KINDS[c % len(KINDS)], f"t{c}") for c in range(n_channels)])]
    state = np.arange(n) * n_states // n if state is None else state
    gap = np.zeros(n, np.uint8) if gap is None else gap
    return calibrate(parts, held_out, gap, state, range(n_states), windows, PERIOD_S, per_day)


def one_channel(x):
    """Surprise of the rows of one channel, as a function of a residual."""
    c = calibrated(np.asarray(x, float)[:, None])
    table = np.concatenate([c.grid[0, 0], c.level[0, 0]])
    used, (knee, slope) = int(c.used[0, 0]), c.tail[0, 0].tolist()
    return c, lambda value: surprise(float(value), table, 0, used, GRID, knee, slope)


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
    ahead = 3  # entries of the table before it
    table = np.concatenate([np.full(ahead, np.nan), grid, level])
    ours = surprise(x, table, ahead, len(grid), len(grid), knee, slope)
    assert ours == pytest.approx(oracle_score.surprise(x, grid, level, len(grid), knee, slope), abs=1e-14)


# -- score: stream, batch, oracle --------------------------------------------------------------------------------

OURS = [("forecast", "a"), ("forecast", "b"), ("relation", "a"), ("relation", "b"), ("range", "a")]
PATHS = [("trans", "a"), ("bound", "a"), ("conf", "b"), ("affine", "b")]
OTHER = [("forecast", "b")]
SHAPES = {  # methods, learnt states, windows
    "linear": ([part("regression", OURS, predicts=True, nonlinear=False), part("onnx", OTHER)], 1, (3, 7, 20)),
    "nonlinear": ([part("regression", OURS, predicts=True, nonlinear=True), part("transition", PATHS, predicts=True),
                   part("onnx", OTHER)], 2, (3, 7, 20)),
    "one window": ([part("regression", OURS, predicts=True, nonlinear=True)], 2, (5,)),
    "strangers only": ([part("paper", PATHS[:3], predicts=True), part("onnx", OTHER)], 2, (4, 9)),
}


def made(shape):
    """A calibration of one of the shapes, its limits low enough that all roles come to lead."""
    parts, n_states, windows = SHAPES[shape]
    n = sum(len(one.channels) for one in parts)
    c = calibrated(healthy(3000, n, seed=len(shape)), windows=windows, n_states=n_states, parts=parts)
    rng = np.random.default_rng(1)
    fixed = np.array([view.role == "fixed" for view in c.views])
    return replace(c, limit=np.where(fixed, 1.0, rng.uniform(0.2, 6.0, c.limit.shape)))


TABLES = {shape: made(shape) for shape in SHAPES}
N_ROWS = 30
MOST_CHANNELS = 10
residuals = hnp.arrays(float, (N_ROWS, MOST_CHANNELS), elements=st.one_of(
    st.floats(0, 50), st.sampled_from([np.nan, np.nan, 0.0, 1.0, 1e7])))
flags = hnp.arrays(np.uint8, N_ROWS, elements=st.sampled_from([0, 0, 0, 0, 1]))
states = hnp.arrays(np.int64, N_ROWS, elements=st.sampled_from([-1, 0, 0, 1]))


def stepped(calibration, residual, gap=None, state=None):
    """Outputs of a record, one row at a time."""
    n = len(residual)
    gap = np.zeros(n, np.uint8) if gap is None else gap
    state = np.zeros(n, np.int64) if state is None else state
    scorer = calibration.scorer()
    outs = []
    for t in range(n):
        if gap[t]:
            scorer.reset()
        scorer.step(residual[t], int(state[t]))
        outs.append(scorer.out.copy())
    return np.array(outs)


def test_the_shapes_have_every_role_and_every_transform():
    assert {view.role for c in TABLES.values() for view in c.views} == {"leading", "beside", "fixed", "lamp"}
    assert {int(how) for c in TABLES.values() for how in c.transform} == {SURPRISE, SQUARE, PLAIN}


@settings(deadline=None, derandomize=True, max_examples=50)
@given(residuals, flags, states, st.sampled_from(list(SHAPES)))
def test_stream_batch_and_oracle_agree_over_gaps_masks_states_windows_and_roles(residual, gap, state, shape):
    c = TABLES[shape]
    residual = np.ascontiguousarray(residual[:, :len(c.channels)])
    state = np.minimum(state, len(c.states) - 1)
    outs, terms, values = c.scorer().rows(residual, gap, state, details=True)
    assert_array_equal(stepped(c, residual, gap, state), outs)
    assert_array_equal(c.score_rows(residual, gap, state), outs)
    expected, expected_terms, expected_values = oracle_score.score_rows(residual, gap, state, c)
    assert_allclose(terms, expected_terms, rtol=1e-12, atol=1e-12)
    assert_allclose(values, expected_values, rtol=1e-10, atol=1e-10)
    assert_allclose(outs[:, [SCORE, SLOW]], expected[:, [SCORE, SLOW]], rtol=1e-10, atol=1e-10)
    told = [TRANS, BOUND, CONF]  # running means of plain residuals: a 1e7 that has left leaves its rounding behind
    assert_allclose(outs[:, told], expected[:, told], rtol=1e-10, atol=1e-8)
    for t in np.flatnonzero(outs[:, LEAD] != expected[:, LEAD]):  # two views may tie to rounding
        ours, theirs = (oracle_score.counted(c.views[int(v)], oracle_score.ratio(
            c.views[int(v)], values[t, int(v)], c.limit[state[t], int(v)])) for v in (outs[t, LEAD], expected[t, LEAD]))
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_fit_gets_the_values_of_the_views_from_their_terms(shape):
    c = TABLES[shape]
    n = len(c.channels)
    residual = healthy(400, n, seed=9) * np.random.default_rng(2).choice([0.1, 1.0, 30.0], (400, 1))
    residual[50:80, 0] = residual[200:290] = np.nan
    gap = (np.arange(400) % 90 == 0).astype(np.uint8)
    state = np.arange(400) // 7 % (len(c.states) + 1) - 1
    _, terms, values = c.scorer().rows(residual, gap, state, details=True)
    assert np.isnan(values).any() and np.isfinite(values).any(axis=0).all()
    assert_allclose(view_values(c, terms, state), values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_energies_are_those_of_the_oracle_whatever_the_order_of_the_array(shape):
    c = TABLES[shape]
    residual = healthy(60, len(c.channels), seed=11) * np.geomspace(1, 1e4, 60)[:, None]
    residual[::7, 0] = np.nan
    state = np.arange(60) % (len(c.states) + 1) - 1
    expected = [[oracle_score.energy(residual[t, j], state[t], j, c) for j in range(len(c.channels))]
                for t in range(60)]
    for order in "CF":
        assert_allclose(c.scorer().energies(np.array(residual, order=order), state), expected, rtol=1e-13)
    assert np.nanmax(expected) <= ENERGY_CAP


def test_views_that_lead_and_those_beside_them_count_alike_from_the_limit_on_and_only_leading_ones_below_it():
    c = TABLES["linear"]
    n = 2000
    rng = np.random.default_rng(3)
    residual = healthy(n, len(c.channels), seed=3) * rng.choice([0.3, 1.0, 3.0], (n // 100, 1)).repeat(100, axis=0)
    outs, _, values = c.scorer().rows(residual, np.zeros(n, np.uint8), np.zeros(n, np.int64), details=True)
    by_role = {"leading": [], "beside": [], "fixed": []}
    for t in range(n):
        shares = {v: value if view.role == "fixed" else soft(value) / soft(c.limit[0, v])
                  for v, (view, value) in enumerate(zip(c.views, values[t], strict=True)) if view.role != "lamp"}
        lead = int(outs[t, LEAD])
        role = c.views[lead].role
        alarming = [x for x in shares.values() if x >= 1.0]
        if alarming:
            assert outs[t, SCORE] == pytest.approx(max(alarming))
        elif role in ("leading", "fixed"):
            assert outs[t, SCORE] == pytest.approx(shares[lead])
        else:
            assert outs[t, SCORE] == pytest.approx(shares[lead] ** SHARPNESS)
        assert outs[t, SCORE] >= max(x for v, x in shares.items() if c.views[v].role == "leading") - 1e-12
        by_role[role].append(outs[t, SCORE] >= 1)
    assert all(by_role.values())  # each came to lead


def test_the_lamp_is_shown_and_never_alarms():
    c = TABLES["linear"]
    lamp = next(v for v, view in enumerate(c.views) if view.role == "lamp")
    low = c.limit.copy()
    low[0, lamp] = -20.0  # far below its healthy median: it stands all the time
    high = np.where(np.arange(len(c.views)) == lamp, low, 1e6)
    high[0, [v for v, view in enumerate(c.views) if view.role == "fixed"]] = 1.0
    residual = healthy(500, len(c.channels), seed=5)
    residual[:, 4] = 0.0  # the fixed one
    outs = stepped(replace(c, limit=high), residual)[3:]  # its window, which began at its healthy mean
    assert (outs[:, SLOW] > 1).all()
    assert (outs[:, SCORE] < 1e-3).all() and not (outs[:, LEAD] == lamp).any()


# -- windows ------------------------------------------------------------------------------------------------------


def test_a_score_stands_from_the_first_residual_on_and_not_before():
    c = calibrated(healthy(), windows=(10, 30))
    rows = healthy(40, seed=2)
    rows[:12] = np.nan  # warming up
    outs = stepped(c, rows)
    assert_array_equal(np.isnan(outs[:, SCORE]), np.arange(40) < 12)
    assert_array_equal(outs[:12, LEAD], -1.0)


def test_one_method_that_is_still_warming_up_stands_at_its_healthy_level_beside_one_that_speaks():
    c = TABLES["linear"]
    rows = healthy(40, len(c.channels), seed=2)
    late = len(c.channels) - 1  # the channel of the other method
    rows[:25, late] = np.nan
    _, terms, _ = c.scorer().rows(rows, np.zeros(40, np.uint8), np.zeros(40, np.int64), details=True)
    of_late = np.array([members == (late,) for view in c.views for members, _ in view.terms])
    assert of_late.sum() >= 2
    assert_allclose(terms[:25][:, of_late], c.usual[0, late], rtol=1e-12)
    assert np.isfinite(stepped(c, rows)[:, SCORE]).all()


def test_a_healthy_interval_after_a_gap_is_not_judged_worse_for_being_short():
    c = calibrated(healthy(20_000), windows=(20, 200), per_day=10.0)
    rows = healthy(20_000, seed=6)
    gap = (np.arange(20_000) % 25 == 0).astype(np.uint8)
    assert not (c.score_rows(rows, gap, np.zeros(20_000, np.int64))[:, SCORE] >= 1).any()


def test_a_view_whose_window_is_masked_by_more_than_half_says_nothing():
    c = calibrated(healthy(n_channels=1), windows=(10,))
    rows = healthy(40, 1, seed=2) + 0.0
    rows[10:30] = np.nan
    silent = np.isnan(stepped(c, rows)[:, SCORE])
    assert_array_equal(silent, (np.arange(40) >= 15) & (np.arange(40) < 34))


def test_one_masked_channel_does_not_silence_the_tags_beside_it():
    c = TABLES["linear"]
    rows = healthy(200, len(c.channels), seed=2)
    rows[20:, [1, 3, 5]] = np.nan  # all of tag b
    assert np.isfinite(stepped(c, rows)[:, SCORE]).all()
    rows[100:, [0, 2]] = 1e4
    assert stepped(c, rows)[-1, SCORE] > 1


def test_a_state_that_was_not_learnt_gives_no_score():
    c = TABLES["nonlinear"]
    rows = healthy(30, len(c.channels))
    outs = stepped(c, rows, state=np.repeat([0, -1, 1], 10))
    assert np.isnan(outs[10:20, SCORE]).all()
    assert np.isfinite(outs[[9, 29], SCORE]).all()


def test_rounding_of_the_window_sums_stays_below_1e_10_over_100_000_rows():
    rng = np.random.default_rng(7)
    n, window = 100_000, 100
    residual = rng.random((n, 4))
    residual[rng.random((n, 4)) < 1e-3] = 1e5  # large values leave their rounding behind in a running sum
    residual[-300:] = rng.random((300, 4))
    calibration = calibrated(healthy(), windows=(window,))
    scorer = calibration.scorer()
    _, terms, _ = scorer.rows(residual, np.zeros(n, np.uint8), np.zeros(n, np.int64), details=True)
    last = residual[-window:]
    naive = np.zeros(4)
    for new, old in zip(residual, np.vstack([np.zeros((window, 4)), residual]), strict=False):
        naive += new - old
    exact = [math.fsum(last[:, c]) for c in range(4)]
    assert np.abs(naive - exact).max() > 1e-10  # so the promise is one
    told = calibration.scorer()
    told.rows(residual[:-1], np.zeros(n - 1, np.uint8), np.zeros(n - 1, np.int64))
    told.step(residual[-1], 0)
    assert_allclose(told.means * window, exact, rtol=0, atol=1e-10)
    c = calibration
    for j in range(4):
        exact_energy = math.fsum(oracle_score.energy(x, 0, j, c) for x in last[:, j])
        assert terms[-1, j] * window == pytest.approx(exact_energy, rel=0, abs=1e-10)


def test_after_a_reset_nothing_of_the_rows_before_is_left():
    c = TABLES["nonlinear"]
    fresh, used = c.scorer(), c.scorer()
    n = len(c.channels)
    for row in healthy(33, n, seed=1) * 100:
        used.step(row, 1)
    used.reset()
    assert np.isnan(used.out[SCORE])
    for row in healthy(40, n, seed=2):
        fresh.step(row, 0)
        used.step(row, 0)
        assert_array_equal(fresh.out, used.out)
        assert_array_equal(fresh.means, used.means)
        assert_array_equal(fresh.shares, used.shares)


def test_window_means_are_those_of_the_known_residuals_and_nan_where_there_are_none():
    calibration = calibrated(healthy(), windows=(3,))
    scorer = calibration.scorer()
    rows = np.array([[9, 9, np.nan, 9], [1, 2, np.nan, np.nan], [3, np.nan, np.nan, 4], [5, 6, np.nan, 8.0]])
    for row in rows:
        scorer.step(row, 0)
    assert_allclose(scorer.means, [3, 4, np.nan, 6])


def test_residuals_are_told_over_100_rows_however_long_the_windows_are():
    calibration = calibrated(healthy(), windows=(3, 500))
    scorer = calibration.scorer()
    rows = healthy(300, seed=4)
    for row in rows:
        scorer.step(row, 0)
    assert_allclose(scorer.means, rows[-100:].mean(axis=0), rtol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(residuals, flags, states, st.sampled_from(list(SHAPES)), st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_what_is_told_of_a_row_is_that_of_the_oracle(residual, gap, state, shape, owner):
    c = TABLES[shape]
    n, n_tags = len(c.channels), 5  # the last tag has no channel
    residual = np.ascontiguousarray(residual[:, :n]) * np.geomspace(0.1, 10.0, N_ROWS)[:, None]
    state, tag = np.minimum(state, len(c.states) - 1), np.array(owner[:n], np.int64)
    scorer = c.scorer(tag, n_tags)
    for t in range(N_ROWS):
        if gap[t]:
            scorer.reset()
        scorer.step(residual[t], int(state[t]))
        lead = int(scorer.out[LEAD]) if scorer.out[SCORE] >= NAMED_FROM else -1
        means, weights = oracle_score.told(residual, gap, state, t, c, lead, tag, n_tags)
        assert_allclose(scorer.means, means, rtol=1e-9, atol=1e-9)
        if weights.sum() > 1e-6:  # less is above the healthy level by rounding alone, and names at random
            assert_allclose(scorer.shares, weights / weights.sum(), rtol=1e-7, atol=1e-8)
        elif lead < 0 or state[t] < 0:
            assert_array_equal(scorer.shares, 0.0)


def test_nothing_is_told_before_the_first_row_and_after_it_is_forgotten():
    c = TABLES["linear"]
    scorer = c.scorer()
    for row in [None, *healthy(20, len(c.channels), seed=3) * 1e3]:
        if row is not None:
            scorer.step(row, 0)
    assert np.isfinite(scorer.means).all() and scorer.shares.sum() == pytest.approx(1.0)
    scorer.forget_told()
    for one in (scorer, c.scorer()):
        one.forget_told()
        assert np.isnan(one.means).all() and not one.shares.any()


def test_tags_are_named_from_half_of_the_limit_on():
    c = TABLES["nonlinear"]
    scorer = c.scorer()
    seen = set()
    for row in healthy(3000, len(c.channels), seed=3) * np.random.default_rng(1).choice([0.3, 1.0, 3.0], (3000, 1)):
        scorer.step(row, 0)
        named = scorer.out[SCORE] >= NAMED_FROM
        seen.add(bool(named))
        # A view can lead on the surprise of one row alone, with all its means at their healthy level or below.
        assert scorer.shares.sum() == pytest.approx(1.0) or not scorer.shares.any()
        assert named or not scorer.shares.any()
    assert seen == {False, True}


def test_the_channel_that_is_furthest_off_carries_the_largest_share():
    parts = [part("onnx", [("forecast", "a")] * 4)]  # one view over four channels
    calibration = calibrated(healthy(), parts=parts)
    scorer = calibration.scorer()
    for row in healthy(20, seed=3):
        scorer.step(row * [1, 50, 1, 1e4], 0)
    assert int(np.argmax(scorer.shares)) == 3 and scorer.shares.min() >= 0
    assert scorer.shares.sum() == pytest.approx(1.0)
    scorer.step(row, -1)
    assert_array_equal(scorer.shares, np.zeros(4))


def test_only_the_channels_of_the_leading_view_carry_a_share():
    c = TABLES["linear"]
    scorer = c.scorer()
    rows = healthy(20, len(c.channels), seed=3)
    rows[:, 5] *= 1e4
    for row in rows:
        scorer.step(row, 0)
    view = c.views[int(scorer.out[LEAD])]
    members = {j for group in view.groups for j in group}
    assert members == {5} and set(np.flatnonzero(scorer.shares)) == members


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
    score = calibration.score_rows(fresh, np.zeros(n, np.uint8), np.zeros(n, np.int64))[:, SCORE]
    alarms = int(((score[1:] >= 1) & (score[:-1] < 1)).sum())
    budget = per_day * n * PERIOD_S / 86400
    assert alarms <= 3 * budget + 3


def test_residuals_far_off_are_over_the_limit():
    calibration = calibrated(healthy(10_000), windows=(20,), per_day=1.0)
    assert stepped(calibration, healthy(40) * 1e3 + 1e3)[-1, SCORE] > 1


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_view_has_healthy_median_0_and_spread_1_in_every_state(shape):
    parts, n_states, windows = SHAPES[shape]
    x = np.random.default_rng(5).lognormal(0, 1, (8000, sum(len(one.channels) for one in parts)))
    c = calibrated(x, windows=windows, n_states=n_states, parts=parts)
    state = np.arange(8000) * n_states // 8000
    _, _, values = c.scorer().rows(x, np.zeros(8000, np.uint8), state, details=True)
    for v, view in enumerate(c.views):
        if view.role == "fixed":
            continue
        for s in range(n_states):
            middle, top = np.quantile(values[state == s, v], [0.5, 0.84])
            assert middle == pytest.approx(0, abs=1e-9)
            assert top == pytest.approx(1, abs=1e-9)


def test_a_residual_that_never_moves_has_a_finite_view_that_stays_low_and_alarms_when_it_moves():
    x = np.zeros((3000, 1))
    c = calibrated(x, windows=(20,))
    assert np.isfinite(c.weight).all() and np.isfinite(c.offset).all() and np.isfinite(c.limit).all()
    assert (stepped(c, x[:100])[:, SCORE] < 1).all()
    assert stepped(c, np.ones((100, 1)))[-1, SCORE] > 1


def test_squares_are_in_units_of_the_held_out_root_mean_square():
    parts = [part("regression", OURS[:4], predicts=True, nonlinear=False)]
    x = np.abs(np.random.default_rng(2).standard_normal((5000, 4))) * [1.0, 3.0, 0.01, 50.0]
    c = calibrated(x, windows=(3, 10), parts=parts)
    assert_array_equal(c.transform, [SQUARE] * 4)
    assert_allclose(c.scale[0], np.sqrt((x * x).mean(axis=0)), rtol=1e-12)
    assert_allclose(c.usual[0], 1.0, rtol=1e-2)  # the cap takes nothing here
    assert c.used.shape == (1, 0)  # and no distribution is kept


def test_each_state_is_calibrated_by_its_own_rows():
    x = healthy(8000, n_channels=2)
    state = np.arange(8000) // 4000
    x[state == 1] *= 10
    c = calibrated(x, n_states=2, state=state)
    assert_allclose(c.tail[1, 1, 0] / c.tail[0, 1, 0], 10, rtol=0.3)
    rows = np.tile([0.0, 5.0], (20, 1))
    means = [c.scorer().rows(rows, np.zeros(20, np.uint8), np.full(20, s), details=True)[1][-1, 1] for s in (0, 1)]
    assert means[0] > 2 * means[1]


@pytest.mark.parametrize("n_states", [1, 2])
def test_a_record_too_short_is_an_error_that_names_channel_and_state(n_states):
    x = healthy(MIN_HELD_OUT * n_states + 200)
    x[-MIN_HELD_OUT - 60:, 1] = np.nan
    with pytest.raises(RecordError) as caught:
        calibrated(x, n_states=n_states)
    text = str(caught.value)
    assert "channel bound of t1" in text and "too short" in text and "next step: " in text
    assert f"{MIN_HELD_OUT} needed" in text
    assert ("in state" in text) == (n_states == 2)


def test_a_record_that_cannot_support_the_wish_says_so():
    notes = calibrated(healthy(1500), windows=(300,), per_day=0.01).notes
    assert notes and all("0.01 false alarms a day" in note for note in notes)


def test_a_record_that_can_support_the_wish_says_nothing():
    assert calibrated(healthy(20_000), windows=(20,), per_day=5000.0).notes == ()


def test_a_record_that_holds_too_few_of_the_asked_alarms_says_how_much_it_takes():
    notes = calibrated(healthy(20_000), windows=(20,), per_day=1000.0).notes
    assert len(notes) == 1 and "too short to show that 1000 false alarms a day" in notes[0]
    assert f"{20_000 * PERIOD_S / 3600 * 10 / (20_000 * PERIOD_S / 86_400 * 1000):.3g} h of record" in notes[0]


@pytest.mark.parametrize("tail", ["short", "long"])
@pytest.mark.parametrize("n_states", [1, 2])
def test_the_limit_keeps_the_budget_on_fresh_rows_whatever_the_tail(tail, n_states):
    def rows(n, seed):
        rng = np.random.default_rng(seed)
        return rng.random((n, 4)) if tail == "short" else rng.lognormal(0, 1, (n, 4))

    n, hours = 60_000, 60_000 * PERIOD_S / 3600
    per_day = 40 * 24 / hours  # forty in the record
    c = calibrated(rows(n, 1), windows=(20,), n_states=n_states, per_day=per_day)
    score = c.score_rows(rows(10 * n, 2), np.zeros(10 * n, np.uint8), np.zeros(10 * n, np.int64))[:, SCORE]
    above = np.flatnonzero(score >= 1.0)
    found = 1 + np.count_nonzero(np.diff(above) * PERIOD_S > 0.5)
    assert 200 <= found <= 800


def test_windows_longer_than_a_quarter_of_the_record_are_left_out():
    c = calibrated(healthy(1500), windows=(20, 5000))
    assert c.windows.tolist() == [20]
    assert np.isfinite(c.limit).all() and (c.limit > 0).all()
    assert calibrated(healthy(1500), windows=(5000,)).windows.tolist() == [375]


def test_a_thin_tail_does_not_shout():
    x = 1.0 + 1e-6 * np.random.default_rng(1).random(5000)
    c, of = one_channel(x)
    assert c.tail[0, 0, 1] == MIN_SLOPE
    assert of(1.1) == pytest.approx(-math.log(1 - KNEE_SHARE) + math.log(1.1) / MIN_SLOPE, rel=1e-4)


def test_terms_take_the_logarithm_above_a_floor():
    assert LEAST == oracle_score.FLOOR and SURPRISE_CAP == oracle_score.SURPRISE_CAP
    assert ENERGY_CAP == oracle_score.ENERGY_CAP


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


def test_a_plugin_may_leave_out_in_the_folds_what_no_residual_hangs_on():
    record = noise_record(600, ["a", "b"])
    plugin = RegressionPlugin()
    params = RegressionParams(lags=2)
    whole = plugin.fit(record, params)
    method = plugin.open(whole, record.tags)
    full = method.residuals(record)
    short = held_out_residuals(plugin, record, params, full, method.channels, whole)
    folds = plugin.fit_fold(record, params, whole)
    assert np.isnan(folds.arrays["rms"]).all() and folds.arrays["rms"].shape == method.model.arrays["rms"].shape
    assert_array_equal(held_out_residuals(plugin, record, params, full, method.channels), short)
    assert_array_equal(plugin.open(folds, record.tags).residuals(record), full)


def test_a_plugin_that_does_not_learn_keeps_its_residuals():
    record = noise_record(500, ["a"])
    plugin = DeviationPlugin()
    plugin.learns = False
    full = np.ones((500, 1))
    assert held_out_residuals(plugin, record, DeviationParams(), full) is full
    assert plugin.fitted_on == []


def test_a_calibration_is_not_changed_by_scoring():
    c = calibrated(healthy())
    names = ("grid", "level", "tail", "limit", "usual", "scale", "weight", "offset")
    before = {name: getattr(c, name).copy() for name in names}
    c.score_rows(healthy(500, seed=4), np.zeros(500, np.uint8), np.zeros(500, np.int64))
    for name, array in before.items():
        assert_array_equal(getattr(c, name), array)
    assert isinstance(replace(c, notes=("x",)), Calibration)
