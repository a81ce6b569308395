"""The method `checks`: silent within what was healthy, 1.0 one allowance beyond it, and it says what is off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.api import Record, Tag, TagKind
from opcua_detector.detectors.checks import ChecksParams, ChecksPlugin
from opcua_detector.errors import ConfigError, ModelTagsError, RecordError
from opcua_detector.testing import check_plugin, damaged, stream
from sim_server.processes import make
from tests.plants import PERIOD_NS, lorenz_rows, noise_record, record_of

PLUGIN, PARAMS = ChecksPlugin(), ChecksParams()


def opened(record: Record, params: ChecksParams = PARAMS):
    return PLUGIN.open(PLUGIN.fit(record, params), record.tags)


def channel(method, column, kind):
    return next(k for k, c in enumerate(method.channels) if (c.column, c.kind) == (column, kind))


def slow_record(n=4000, seed=0):
    """A tag with steps of 0.1 that stands for some rows now and then, and one that moves with every row."""
    rng = np.random.default_rng(seed)
    walk = np.round(20 + np.cumsum(0.02 * rng.standard_normal(n)) * 0.3, 1)
    return record_of(np.column_stack([walk, rng.standard_normal(n)]), ["slow", "fast"])


def naive(record, model):
    """Range, rate and stuck residual of each row and judged column, written down as the docstring says them."""
    a = model.arrays
    out = {}
    for name in model.columns:
        for kind in ("range", "rate", "stuck"):
            out[name, kind] = np.full(len(record), np.nan)
    for i, name in enumerate(model.columns):
        of_range, of_rate, of_stuck = (out[name, kind] for kind in ("range", "rate", "stuck"))
        c = [tag.name for tag in record.tags].index(name)
        past: list[tuple[int, float]] = []
        run = 0
        for t in range(len(record)):
            if record.gap[t]:
                past, run = [], 0
            x = record.values[t, c]
            if not record.valid[t, c] or not np.isfinite(x):
                continue
            outside = max(a["low"][i] - x, x - a["high"][i], 0.0)
            of_range[t] = outside / a["range_allowance"][i]
            if past:
                step = abs(x - past[-1][1]) / (t - past[-1][0])
                of_rate[t] = max(step - a["step"][i], 0.0) / a["rate_allowance"][i]
            run = run + 1 if past and past[-1][1] == x else 0
            of_stuck[t] = max(run - a["longest"][i], 0.0) / a["stuck_allowance"][i]
            past.append((t, x))
    return out


# -- promises ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [noise_record(2000, ["a", "b"]), lorenz_rows(2000, 5), slow_record()],
                         ids=["noise", "lorenz", "slow"])
def test_it_keeps_every_promise_of_a_plugin(record):
    check_plugin(PLUGIN, record, PARAMS)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_stream_and_batch_are_the_rule_written_down(seed):
    healthy = slow_record()
    method = opened(healthy)
    assert [(c.column, c.kind) for c in method.channels] == [
        ("slow", "rate"), ("fast", "rate"), ("fast", "range"), ("slow", "stuck"), ("fast", "stuck")]
    rng = np.random.default_rng(seed)
    live = slow_record(800, seed=seed)
    live.values[rng.random(800) < 0.02, 1] *= 20
    live.values[300:400 + int(rng.integers(200)), 0] = 20.0
    live = damaged(live, 5, seed)
    got = method.residuals(live)
    assert_array_equal(got, stream(method, live))
    want = naive(live, method.model)
    for k, c in enumerate(method.channels):
        assert_allclose(got[:, k], want[c.column, c.kind], rtol=1e-12, atol=1e-12)
    assert np.nanmax(got) > 0


def test_healthy_rows_of_the_fit_itself_have_no_residual():
    for record in (slow_record(), lorenz_rows(3000, 5)):
        assert np.nanmax(opened(record).residuals(record)) == 0.0


# -- limits -----------------------------------------------------------------------------------------------------


def test_range_is_1_a_quarter_of_the_span_outside_and_rate_1_half_a_step_above():
    even = record_of(np.tile([0.0, 1.0, 2.0, 1.0], 1000)[:, None], ["a"])
    method = opened(even)
    assert (method.model.arrays["range_allowance"][0], method.model.arrays["rate_allowance"][0]) == (2.0, 2.0)
    fine = record_of(np.sin(np.arange(200_000) / 30)[:, None] * 50 + 50, ["a"])
    method = opened(fine)
    live = record_of(np.array([[50.0], [150.0], [np.nan], [100.0]]), ["a"])
    got = method.residuals(live)
    assert got[1, channel(method, "a", "range")] == pytest.approx(2.0, rel=0.03)
    step = method.model.arrays["step"][0]
    assert got[1, channel(method, "a", "rate")] == pytest.approx((100 - step) / (0.5 * step), rel=0.01)
    assert got[3, channel(method, "a", "rate")] == pytest.approx((25 - step) / (0.5 * step), rel=0.01)  # in two rows


def test_a_tag_that_moves_by_one_step_of_its_resolution_may_go_two_beyond():
    values = np.where(np.random.default_rng(0).random(4000) < 0.02, 20.1, 20.0)[:, None]
    method = opened(record_of(values, ["a"]))
    live = record_of(np.array([[19.9], [20.0], [20.2], [20.0], [21.0]]), ["a"])
    got = method.residuals(live)
    assert np.nanmax(got[:4]) <= 0.5 + 1e-9 and got[4, channel(method, "a", "range")] > 1


def test_a_record_that_keeps_finding_new_extremes_gets_wider_allowances():
    rng = np.random.default_rng(0)
    even = rng.uniform(-1, 1, (5000, 1))
    drifting = even + np.linspace(0, 10, 5000)[:, None]
    narrow, wide = (opened(record_of(x, ["a"])).model.arrays["range_allowance"][0] for x in (even, drifting))
    assert narrow == pytest.approx(0.5, rel=0.05) and wide > 3.5


def test_a_stuck_value_is_told_after_a_while_and_a_hole_does_not_count():
    healthy = noise_record(3000, ["a", "b"])
    method = opened(healthy)
    live = noise_record(200, ["a", "b"], seed=3)
    live.values[100:, 0] = live.values[100, 0]
    stuck = channel(method, "a", "stuck")
    plain = method.residuals(live)[:, stuck]
    assert plain[100 + 19] < 1.0 <= plain[100 + 20] and plain[:100].max() == 0.0
    valid = live.valid.copy()
    valid[110:130, 0] = 0
    holed = method.residuals(replace(live, valid=valid))[:, stuck]
    assert np.isnan(holed[110:130]).all()
    assert_array_equal(holed[130:], plain[110:180])


def test_a_slow_tag_that_has_not_shown_its_range_has_no_range_check():
    t = np.arange(4000.0)
    record = record_of(np.column_stack([np.sin(t / 400), np.sin(t / 20)]), ["slow", "fast"])
    assert {c.column for c in opened(record).channels if c.kind == "range"} == {"fast"}
    more = record_of(np.sin(np.arange(80_000.0) / 400)[:, None], ["slow"])
    assert any(c.kind == "range" for c in opened(more).channels)


def test_a_tag_that_seldom_changes_has_no_stuck_check():
    n = 4000
    setpoint = np.repeat(np.random.default_rng(0).uniform(0, 1, 8), n // 8)
    record = record_of(np.column_stack([setpoint, np.random.default_rng(1).standard_normal(n)]), ["level", "a"])
    kinds = [(c.column, c.kind) for c in opened(record).channels]
    assert ("level", "rate") in kinds and ("level", "stuck") not in kinds and ("a", "stuck") in kinds


def test_only_judged_columns_are_checked_and_a_constant_is_no_trouble():
    n = 3000
    values = np.column_stack([np.random.default_rng(0).standard_normal(n), np.arange(n) % 7, np.full(n, 4.0)])
    record = record_of(values, [Tag("a"), Tag("mode", kind=TagKind.STATE), Tag("still")])
    method = opened(record)
    assert {c.column for c in method.channels} == {"a", "still"}
    got = method.residuals(record_of(values, record.tags))
    assert np.isfinite(got[1:]).all() and got[5, channel(method, "still", "rate")] == 0.0
    assert got[1, channel(method, "a", "range")] == 0.0


@pytest.mark.parametrize(("process", "hours"), [("lorenz", 2.0), ("throttle", 4.0)])
def test_hours_of_fresh_healthy_rows_stay_below_half_the_limit(process, hours):
    plant = make(process, seed=3)
    period = plant.model.period_ns
    tags = [tag.name for tag in plant.model.measured]
    plant.simulate(1000)
    method = opened(Record.from_rows(plant.simulate(20_000), tags, period))
    for seed in (11, 12):
        other = make(process, seed=seed)
        other.simulate(1000)
        fresh = Record.from_rows(other.simulate(int(hours / 2 * 3600e9 / period)), tags, period)
        assert np.nanmax(method.residuals(fresh)) < 0.5


# -- explanations -----------------------------------------------------------------------------------------------


def explained(method, live, window=100):
    return method.explain(live.values, live.valid, live.source_ns, min(window, len(live)))


def test_each_kind_is_told_with_observed_and_normal():
    healthy = noise_record(3000, ["a", "b"])
    method = opened(healthy)
    low, high = (method.model.arrays[key][1] for key in ("low", "high"))
    live = noise_record(100, ["a", "b"], seed=2)
    live.values[60:, 1] += 30
    (cause, *_), plain = explained(method, live), explained(method, live.rows(0, 50))
    assert (cause.tag, cause.kind, cause.normal_low, cause.normal_high) == ("b", "range", low, high)
    assert cause.observed > 25 and cause.source_ns >= 60 * PERIOD_NS and plain == []
    stands = noise_record(100, ["a", "b"], seed=2)
    stands.values[40:, 0] = 0.25
    (cause,) = explained(method, stands)
    assert (cause.tag, cause.kind, cause.observed) == ("a", "stuck", 0.25)
    assert cause.step_s == pytest.approx(0.59) and cause.share == 1.0
    long = replace(stands, values=stands.values.copy())
    long.values[:, 0] = 0.25
    assert [c.kind for c in explained(method, long)] == ["stuck"]
    jumps = record_of(np.sin(np.arange(3000) / 50)[:, None], ["a"])
    method = opened(jumps)
    live = record_of(np.sin(np.arange(100) / 50)[:, None], ["a"])
    live.values[50:, 0] -= 1.0
    (cause, *_) = explained(method, live)
    assert (cause.kind, cause.normal_high) == ("rate", method.model.arrays["step"][0])
    assert cause.observed == pytest.approx(-1.0, abs=0.05) and cause.normal_low == -cause.normal_high


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("range_share", 0.0), ("rate_share", float("nan")), ("stuck_rows", 0)])
def test_a_wrong_parameter_is_named(key, value):
    with pytest.raises(ConfigError) as error:
        ChecksParams(**{key: value})
    assert error.value.key == key


def test_a_missing_column_and_a_record_without_judged_tags_are_refused():
    record = noise_record(1000, ["a", "b"])
    with pytest.raises(ModelTagsError, match="b"):
        PLUGIN.open(PLUGIN.fit(record, PARAMS), [Tag("a")])
    with pytest.raises(RecordError, match="no tag is judged"):
        PLUGIN.fit(record_of(record.values, [Tag("x", kind=TagKind.STATE), Tag("y", kind=TagKind.STATE)]), PARAMS)
    with pytest.raises(RecordError, match="tag b"):
        PLUGIN.fit(replace(record, valid=record.valid * np.array([1, 0], np.uint8)), PARAMS)
