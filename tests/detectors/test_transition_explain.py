"""What an explanation of the method `transition` promises: the right tag, situation, figures and time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.detectors.transition import TransitionParams, TransitionPlugin

PERIOD_NS = 20_000_000
START_NS = 1_700_000_000_000_000_000
TAGS = (Tag("theta", unit="rad"), Tag("u", unit="V"))
STEP, WINDOW = 5, 20
PLUGIN = TransitionPlugin()


def plant(n, first=0):
    """theta goes up and down between 0 and 10; u is -8 to 12 V while it falls and 22 to 42 V while it rises."""
    k = np.arange(first, first + n)
    rising = k % 200 < 100
    theta = np.where(rising, k % 100, 100 - k % 100) / 10.0
    return np.column_stack([theta, np.where(rising, 32.0, 2.0) + 10.0 * np.sin(0.0537 * k)])


def record_of(values, valid=None, tags=TAGS):
    return Record.from_rows(values, tags, PERIOD_NS, start_ns=START_NS, valid=valid)


def explained(record, method, window=WINDOW):
    return method.explain(record.values, record.valid, record.source_ns, window)


@pytest.fixture(scope="module", params=[False, True], ids=["default", "faithful"])
def fitted(request):
    healthy = record_of(plant(20_000))
    model = PLUGIN.fit(healthy, TransitionParams(step=STEP, levels=8, faithful=request.param))
    return healthy, PLUGIN.open(model, TAGS)


def column(name):
    return [tag.name for tag in TAGS].index(name)


def instants_like(cause, healthy):
    """Healthy instants at which `other` made the transition that the cause tells, found the plain way."""
    x = healthy.values[:, column(cause.other)]
    t = np.arange(STEP - 1, len(x) - STEP)
    made = (x[t] > cause.from_range[0]) & (x[t] <= cause.from_range[1])
    made &= (x[t + STEP] > cause.to_range[0]) & (x[t + STEP] <= cause.to_range[1])
    return t[made]


def row_of(cause, record):
    return int(np.flatnonzero(record.source_ns == cause.source_ns)[0])


def test_a_voltage_that_does_not_fit_a_falling_angle_is_told_with_both_ranges(fitted):
    healthy, method = fitted
    live = plant(160)
    live[135:, 1] = 31.0  # theta falls from row 100 on
    record = record_of(live)
    causes = explained(record, method)
    cause = next(one for one in causes if one.kind == "bound" and one.other == "theta")
    assert (cause.tag, cause.observed, cause.seen) == ("u", 31.0, True)
    assert cause.from_range[0] >= cause.to_range[0] and cause.from_range[1] >= cause.to_range[1]
    t = instants_like(cause, healthy)
    assert len(t) > 50
    assert cause.normal_low == pytest.approx(healthy.values[t, 1].min(), abs=1e-9)
    assert cause.normal_high == pytest.approx(healthy.values[t, 1].max(), abs=1e-9)
    assert -8.1 < cause.normal_low < cause.normal_high < 12.1
    assert record.values[row_of(cause, record), 1] == 31.0
    assert cause.step_s == pytest.approx(STEP * 0.02)
    assert causes[0].tag == "u"


def test_a_value_of_its_own_past_is_told_with_the_time_at_which_it_stood(fitted):
    healthy, method = fitted
    live = plant(160)
    live[140, 0] = 12.5  # one spike, outside of everything seen
    record = record_of(live)
    causes = explained(record, method)
    cause = next(one for one in causes if (one.tag, one.kind, one.other) == ("theta", "bound", "theta"))
    assert cause.observed == 12.5 and row_of(cause, record) == 140
    t = instants_like(cause, healthy)
    ranges = [(healthy.values[t - lag, 0].min(), healthy.values[t - lag, 0].max()) for lag in range(STEP)]
    assert any(np.allclose((cause.normal_low, cause.normal_high), one, atol=1e-9) for one in ranges)
    assert cause.normal_high < 12.5


@pytest.mark.parametrize("lag", range(1, STEP))
def test_each_value_of_the_past_is_held_against_the_range_of_its_own_delay(fitted, lag):
    healthy, method = fitted
    live = plant(160)
    live[140, 0] = 12.5
    record = record_of(live).rows(0, 140 + lag + STEP + 1)  # the newest row judges t = 140 + lag
    bound = [one for one in explained(record, method, 1) if one.kind == "bound"]
    assert [(one.tag, one.other, one.observed) for one in bound] == [("theta", "theta", 12.5)]
    t = instants_like(bound[0], healthy)
    past = healthy.values[t - lag, 0]
    assert (bound[0].normal_low, bound[0].normal_high) == pytest.approx((past.min(), past.max()), abs=1e-9)
    assert row_of(bound[0], record) == 140


def test_a_transition_never_seen_says_where_it_went_and_where_it_may_go(fitted):
    healthy, method = fitted
    live = plant(160)
    live[150:, 0] = 1.0  # theta stood near 5 and falls by .1 a row
    record = record_of(live)
    cause = next(one for one in explained(record, method) if one.kind == "trans")
    assert (cause.tag, cause.other, cause.seen, cause.observed) == ("theta", "theta", False, 1.0)
    assert len(instants_like(cause, healthy)) == 0
    start = live[row_of(cause, record) - STEP, 0]
    assert cause.from_range[0] < start <= cause.from_range[1]
    assert cause.to_range[0] < 1.0 <= cause.to_range[1]
    x = healthy.values[:, 0]
    t = np.arange(STEP - 1, len(x) - STEP)
    reached = x[t + STEP][(x[t] > cause.from_range[0]) & (x[t] <= cause.from_range[1])]
    assert cause.normal_low <= reached.min() and cause.normal_high >= reached.max()
    edges = method.model.arrays["edges"][0]
    assert any(math.isclose(cause.normal_low, edge) for edge in [*edges, x.min()])
    assert not cause.normal_low <= 1.0 <= cause.normal_high


def test_an_outermost_level_is_open_and_what_is_normal_there_ends_where_healthy_values_did(fitted):
    healthy, method = fitted
    live = plant(160)
    live[150:, 0] = 40.0
    cause = next(one for one in explained(record_of(live), method) if one.kind == "trans")
    assert cause.to_range[1] == math.inf and math.isfinite(cause.to_range[0])
    assert np.isfinite([cause.normal_low, cause.normal_high]).all()
    assert healthy.values[:, 0].min() <= cause.normal_low < cause.normal_high <= healthy.values[:, 0].max()


def test_a_shape_never_seen_inside_all_bounds_is_told_as_conf():
    t = np.arange(20_000)
    amplitude = 1.5 + np.sin(0.00173 * t)
    healthy_rows = np.column_stack([amplitude * np.sin(0.1 * t), amplitude * np.cos(0.1 * t)])
    tags = (Tag("x"), Tag("y"))
    healthy = record_of(healthy_rows, tags=tags)
    method = PLUGIN.open(PLUGIN.fit(healthy, TransitionParams(step=6, levels=2, affine=False)), tags)
    live = healthy_rows[4000:4200].copy()
    live[150:, 0] += np.where(np.arange(50) % 2, 0.15, -0.15)
    causes = explained(record_of(live, tags=tags), method)
    assert (causes[0].tag, causes[0].kind, causes[0].other) == ("x", "conf", "x")
    assert math.isnan(causes[0].normal_low) and math.isfinite(causes[0].observed)
    assert causes[0].observed == live[row_of(causes[0], record_of(live, tags=tags)), 0]
    assert sum(cause.share for cause in causes if cause.kind == "conf" and cause.tag == "x") > 0.5


def test_shares_are_ranked_positive_and_at_most_one_in_all(fitted):
    _, method = fitted
    rng = np.random.default_rng(0)
    live = plant(200)
    live[150:] += rng.standard_normal((50, 2)) * [2.0, 8.0]
    causes = explained(record_of(live), method)
    shares = [cause.share for cause in causes]
    assert len(shares) >= 3 and shares == sorted(shares, reverse=True)
    assert min(shares) > 0.0 and 0.9 < sum(shares) <= 1.0 + 1e-9
    assert len({(cause.tag, cause.kind, cause.other) for cause in causes}) == len(causes)


def test_healthy_rows_and_too_few_rows_have_no_cause(fitted):
    healthy, method = fitted
    assert explained(healthy.rows(5000, 5200), method, 100) == []
    short = record_of(plant(2 * STEP - 1) + 50.0)
    assert explained(short, method) == []
    assert explained(healthy.rows(0, 0), method) == []


def test_the_normal_range_of_a_transition_never_seen_does_not_hold_the_value_that_was_not_normal():
    k = np.arange(8000)
    x = (k // 50 * 7919 % 3) * 1.0 + 0.3 * np.sin(0.2 * k)  # stands near 0, 1 or 2, and jumps between any two
    x[(k // 50 * 7919 % 3) == 1] += 8.0  # the middle one is far up: from 0 it goes to 2 or to 9
    healthy = record_of(x[:, None], tags=(Tag("x"),))
    method = PLUGIN.open(PLUGIN.fit(healthy, TransitionParams(step=3, levels=12)), healthy.tags)
    table = method.model.arrays["table"][0].reshape(12, 12)
    broken = [(q, p) for q in range(12) for p in range(1, 11)
              if table[q, p] < 0 <= max(table[q, :p]) and max(table[q, p + 1 :]) >= 0]
    assert broken  # there are levels between those that are reached
    edges = method.model.arrays["edges"][0]
    for before, after in broken:
        live = np.repeat([[edges[before] if before < 11 else edges[10] + 0.1]], 9, axis=0)
        live[6:] = edges[after]
        cause = next(one for one in explained(record_of(live, tags=healthy.tags), method, 1) if not one.seen)
        assert cause.normal_low < cause.normal_high
        assert not cause.normal_low < edges[after] <= cause.normal_high


def test_the_largest_numbers_there_are_still_give_shares(fitted):
    _, method = fitted
    live = plant(160)
    live[145, 1] = 1.7e308
    live[150, 0] = -1.7e308
    causes = explained(record_of(live), method)
    assert causes and np.isfinite([cause.share for cause in causes]).all()


def test_only_the_last_window_counts(fitted):
    _, method = fitted
    live = plant(200)
    live[120:125, 1] = 300.0
    record = record_of(live)
    assert explained(record, method, 40) == []
    assert explained(record, method, 90) != []


def test_a_masked_tag_is_never_a_cause(fitted):
    _, method = fitted
    live = plant(160)
    live[135:, 1] = 31.0
    valid = np.ones(live.shape, np.uint8)
    valid[130:, 1] = 0
    assert explained(record_of(live, valid), method) == []
    live[150:, 0] = 1.0
    causes = explained(record_of(live, valid), method)
    assert causes and {cause.tag for cause in causes} | {cause.other for cause in causes} == {"theta"}


def test_columns_in_another_order_give_the_same_causes(fitted):
    _, method = fitted
    live = plant(160)
    live[135:, 1] = 31.0
    record = record_of(live)
    moved = record_of(live[:, ::-1].copy(), tags=TAGS[::-1])
    again = PLUGIN.open(method.model, TAGS[::-1])
    assert [repr(one) for one in explained(moved, again)] == [repr(one) for one in explained(record, method)]


def test_a_setpoint_that_does_not_fit_is_named_although_it_is_not_judged():
    tags = (TAGS[0], dataclasses.replace(TAGS[1], kind=TagKind.SETPOINT))
    method = PLUGIN.open(PLUGIN.fit(record_of(plant(20_000), tags=tags), TransitionParams(step=STEP)), tags)
    live = plant(160)
    live[135:, 1] = 31.0
    causes = explained(record_of(live, tags=tags), method)
    assert causes[0].tag == "u" and {cause.other for cause in causes} == {"theta"}


@pytest.mark.parametrize("unit", [1.0, 250.0])
def test_a_value_off_its_prediction_inside_all_bounds_is_told_as_affine_with_the_predicted_range(unit):
    rng = np.random.default_rng(0)
    k = np.arange(12_000)
    x = np.sin(0.03 * k) + 0.5 * np.sin(0.071 * k)
    y = unit * (2.0 * x + 0.01 * rng.standard_normal(k.size)) + 40.0
    tags = (Tag("x"), Tag("y"))
    healthy = record_of(np.column_stack([x, y]), tags=tags)
    method = PLUGIN.open(PLUGIN.fit(healthy, TransitionParams(step=STEP, levels=8)), tags)
    live = healthy.values[3000:3200].copy()
    assert [one for one in explained(record_of(live, tags=tags), method, 100) if one.kind == "affine"] == []
    live[194, 1] -= 0.3 * unit
    record = record_of(live, tags=tags)  # the newest row judges row 194
    causes = explained(record, method, 1)
    cause = next(one for one in causes if one.kind == "affine" and one.tag == "y")
    assert cause == next(one for one in causes if one.tag == "y")
    assert (cause.other, cause.seen, row_of(cause, record)) == ("y", True, 194)
    assert cause.observed == live[194, 1] < cause.normal_low
    assert cause.normal_low < 40.0 + unit * 2.0 * x[3194] < cause.normal_high
    assert cause.normal_high - cause.normal_low < 0.15 * unit
    assert cause.from_range[0] < live[194, 1] <= cause.from_range[1]
