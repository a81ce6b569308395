"""Guards: a tag that lost resolution or changed scale is masked and told, a faulty one is not; pauses."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from opcua_detector.api import GOOD, UNCERTAIN_SUB_NORMAL, Record, Tag, TagKind
from opcua_detector.engine import AlertSettings, frames_of
from opcua_detector.errors import ModelTagsError
from opcua_detector.guards import Guards, Pauses, decimals, learn_guards, resolution, settling_rows, significant
from opcua_detector.kernels.guards import common_step
from sim_server.processes import make
from tests.plants import PERIOD_NS, deviation_monitor, noise_record

ROWS = 20_000
FAULTS = {
    "healthy": lambda x, rng: x,
    "bias": lambda x, rng: x + 3 * x.std(0),
    "large bias": lambda x, rng: x + 30 * x.std(0),
    "gain 2": lambda x, rng: 2 * x,
    "gain .5": lambda x, rng: 0.5 * x,
    "noise": lambda x, rng: x + x.std(0) * rng.standard_normal(x.shape),
    "loud noise": lambda x, rng: x + 10 * x.std(0) * rng.standard_normal(x.shape),
    "drift": lambda x, rng: x + np.linspace(0, 10, len(x))[:, None] * x.std(0),
    "stuck": lambda x, rng: np.where(np.arange(len(x))[:, None] < 2000, x, x[2000]),
    "stuck at 0": lambda x, rng: np.where(np.arange(len(x))[:, None] < 2000, x, 0.0),
    "on and off": lambda x, rng: np.where(rng.random(x.shape) < 0.5, 0.0, 100.0),
    "lag": lambda x, rng: np.vstack([x[:50], x[:-50]]),
}


@cache
def plant(name, noise=0.0):
    """(healthy record, fresh healthy rows) of a simulated plant."""
    if name == "linear":
        rng = np.random.default_rng(1)
        x = np.zeros((2 * ROWS, 10))
        mix = np.linalg.qr(rng.standard_normal((10, 10)))[0] * 0.9
        for t in range(1, len(x)):
            x[t] = mix @ x[t - 1] + rng.standard_normal(10)
        x = 50 + 5 * x
        return Record.from_rows(x[:ROWS], [f"t{i}" for i in range(10)], 10**9), x[ROWS:]
    process = make(name, seed=1, noise=noise)
    process.simulate(1000)
    healthy = Record.from_rows(process.simulate(ROWS), [t.name for t in process.model.measured],
                               process.model.period_ns)
    return healthy, process.simulate(ROWS)


PLANTS = [("lorenz", 0.0), ("lorenz", 0.01), ("throttle", 0.0), ("throttle", 0.01), ("linear", 0.0)]


def learnt(record, error=1e-3):
    return learn_guards(record, error * record.values.std(axis=0))


def judged(facts, record, values):
    """(share of rows on which each tag is masked, reasons at the end)."""
    guards = Guards(facts, [tag.name for tag in record.tags])
    live = Record.from_rows(values, record.tags, record.period_ns)
    told = {}
    for frame in frames_of(live):
        guards.step(frame.values, frame.valid, frame.gap)
        told |= guards.reasons
    return (guards.rows(live).valid == 0).mean(axis=0), told


# -- resolution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "noise"), PLANTS)
def test_a_tag_learnt_with_9_decimals_is_masked_when_it_comes_with_2_and_told_so(name, noise):
    healthy, fresh = plant(name, noise)
    record = replace(healthy, values=np.round(healthy.values, 9))
    share, told = judged(learnt(record, 1e-4), record, np.round(fresh, 2))
    assert (share > 0.99).all()
    for tag in record.tags:
        assert told[tag.name] == f"{tag.name} now comes with 2 decimals, learnt with 9: masked; fit again"


@pytest.mark.parametrize(("name", "noise"), PLANTS)
@pytest.mark.parametrize("digits", [None, 9, 4])
def test_as_learnt_nothing_is_masked(name, noise, digits):
    healthy, fresh = plant(name, noise)
    if digits is not None:
        healthy, fresh = replace(healthy, values=np.round(healthy.values, digits)), np.round(fresh, digits)
    assert judged(learnt(healthy), healthy, fresh) == (pytest.approx(np.zeros(len(healthy.tags))), {})


def test_a_rounding_that_is_small_beside_the_usual_error_is_let_through():
    healthy, fresh = plant("linear")
    facts = learnt(healthy, error=0.1)
    assert judged(facts, healthy, np.round(fresh, 1))[1] == {}
    assert len(judged(facts, healthy, np.round(fresh, 0))[1]) == 10


def test_steps_that_are_not_decimal_are_told_as_steps():
    healthy, fresh = plant("linear")
    told = judged(learnt(healthy), healthy, np.round(fresh / 0.377) * 0.377)[1]
    assert told["t3"].startswith("t3 now comes with 3 decimals, learnt ")
    third = judged(learnt(healthy), healthy, np.round(fresh * 3) / 3)[1]
    assert third["t3"].startswith("t3 now comes in steps of 0.333, learnt ")


def test_single_precision_is_seen_as_what_it_is():
    healthy, fresh = plant("linear")
    single = replace(healthy, values=healthy.values.astype(np.float32).astype(np.float64))
    assert judged(learnt(single), single, fresh.astype(np.float32).astype(np.float64))[1] == {}
    rounded = np.round(fresh, 1).astype(np.float32).astype(np.float64)
    assert (judged(learnt(single), single, rounded)[0] > 0.95).all()


def test_the_mask_ends_soon_after_the_tag_is_as_learnt_again_and_begins_with_a_gap():
    healthy, fresh = plant("lorenz")
    values = fresh[:3000].copy()
    values[1000:2000, 0] = np.round(values[1000:2000, 0], 2)
    guards = Guards(learnt(healthy), ["x1", "x3"])
    record = guards.rows(Record.from_rows(values, healthy.tags, healthy.period_ns))
    masked = np.flatnonzero(record.valid[:, 0] == 0)
    assert 1010 <= masked[0] <= 1060 and 2000 <= masked[-1] <= 2020 and len(masked) == masked[-1] - masked[0] + 1
    assert record.valid[:, 1].all() and np.flatnonzero(record.gap).tolist() == [0, masked[0]]


@pytest.mark.parametrize("error", [1e-9, 1e-7, 1e-5])
def test_however_sharp_the_forecast_lost_decimals_are_seen_after_many_fine_rows(error):
    healthy, fresh = plant("lorenz")
    record = replace(healthy, values=np.round(healthy.values, 9))
    values = np.round(fresh, 9)
    values[6000:] = np.round(values[6000:], 2)
    guards = Guards(learnt(record, error), ["x1", "x3"])
    masked = guards.rows(Record.from_rows(values, record.tags, record.period_ns)).valid == 0
    assert not masked[:6000].any() and masked[6060:].all()


def test_a_tag_that_had_coarse_stretches_when_it_was_healthy_may_have_them_again():
    healthy, fresh = plant("linear")
    values = healthy.values.copy()
    for start in range(0, ROWS, 1000):
        values[start:start + 50] = np.round(values[start:start + 50], 1)
    record = replace(healthy, values=values)
    live = fresh.copy()
    live[500:560] = np.round(live[500:560], 1)
    assert judged(learnt(record), record, live)[1] == {}
    assert len(judged(learnt(record), record, np.round(fresh, 1))[1]) == 10


@pytest.mark.parametrize(("x", "step"), [
    ([1.0, 1.25, 3.5], 0.25), ([100.0, 103.0, 112.0], 3.0), ([0.1, 0.7, 0.4], 0.3), ([1e-9, 20.0, 31.7], 1e-9)])
def test_the_resolution_of_a_record_is_the_step_of_its_grid(x, step):
    assert resolution(np.array(x * 50)) == pytest.approx(step)
    assert resolution(np.random.default_rng(0).standard_normal(1000)) < 1e-14


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.sampled_from([0.01, 0.0244, 1.0, 7.3]))
@settings(derandomize=True)
def test_two_distances_on_a_grid_have_its_step_in_common(a, b, step):
    want = step * np.gcd(a, b)
    got, true_to = common_step(a * step, 1e-12 * step, b * step, 1e-12 * step, 0.5 * step)
    assert got == pytest.approx(want, rel=1e-6) and abs(got - want) <= true_to + 1e-15 * want


def test_values_of_few_significant_digits_may_come_in_steps_that_grow_with_them():
    rng = np.random.default_rng(0)

    def rows(n, top):
        x = np.abs(np.cumsum(rng.standard_normal(n))) % top + 0.01
        return np.array([float(f"{v:.3g}") for v in x])[:, None]

    small, large = rows(8000, 5.0), rows(2000, 900.0)
    record = Record.from_rows(small, [Tag("a")], 10**9)
    facts = learnt(record)
    assert significant(small[:, 0]) == 3 and resolution(small[:, 0]) <= 0.001
    assert judged(facts, record, large)[1] == {}
    assert judged(facts, record, np.round(small[2000:4000] * 2) / 2)[1] != {}


def test_decimals():
    assert [decimals(step) for step in (1.0, 0.1, 0.02, 1e-9, 0.0244, 1 / 3)] == [0, 1, 2, 9, 4, None]


# -- scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "noise"), PLANTS)
@pytest.mark.parametrize(("factor", "words"), [
    (10.0, "10 times as large"), (1000.0, "1000 times as large"), (0.1, "10 times as small"),
    (0.001, "1000 times as small")])
def test_a_change_of_scale_is_masked_told_and_over_when_it_is_undone(name, noise, factor, words):
    healthy, fresh = plant(name, noise)
    values = np.vstack([fresh[:10_000] * factor, fresh[10_000:]])
    guards = Guards(learnt(healthy), [tag.name for tag in healthy.tags])
    record = guards.rows(Record.from_rows(values, healthy.tags, healthy.period_ns))
    masked = record.valid == 0
    assert masked[9000:10_000].all() and not masked[14_000:].any()
    _, told = judged(learnt(healthy), healthy, values)
    assert set(told) == {tag.name for tag in healthy.tags}
    assert all(words in text and text.endswith("masked; fit again") for text in told.values())


def test_a_temperature_in_another_unit_is_told_by_its_units_and_not_without_one():
    rng = np.random.default_rng(0)
    x = np.zeros(ROWS)
    for t in range(1, ROWS):
        x[t] = 0.9 * x[t - 1] + rng.standard_normal()
    record = Record.from_rows((80 + x)[:, None], [Tag("T", unit="°C")], 10**9)
    facts = learnt(record)
    for live, words in ((record.values * 1.8 + 32, "in °F, learnt in °C"), (record.values + 273.15, "in K, learnt in")):
        share, told = judged(facts, record, live)
        assert words in told["T"] and share[0] > 0.9
    assert judged(facts, record, record.values + 40)[1] == {}
    unknown = Record.from_rows(record.values, [Tag("T")], 10**9)
    assert judged(learnt(unknown), unknown, record.values + 273.15)[1] == {}


# -- what is no change of the tag -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "noise"), PLANTS)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("digits", [None, 3])
def test_faults_are_not_swallowed(name, noise, kind, digits):
    healthy, fresh = plant(name, noise)
    live = FAULTS[kind](fresh, np.random.default_rng(5))
    if digits is not None:
        healthy, live = replace(healthy, values=np.round(healthy.values, digits)), np.round(live, digits)
    share, told = judged(learnt(healthy), healthy, live)
    assert told == {} and share.max() == 0.0


# -- streaming --------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_stream_and_batch_agree_over_gaps_and_masks(seed):
    healthy, fresh = plant("lorenz")
    rng = np.random.default_rng(seed)
    values, n = fresh[:6000].copy(), 6000
    values[1000:2000, rng.integers(2)] *= 100
    values[3000:4000] = np.round(values[3000:4000], int(rng.integers(0, 3)))
    valid = (rng.random((n, 2)) > 0.02).astype(np.uint8)
    gap = (rng.random(n) < 0.001).astype(np.uint8)
    record = Record.from_rows(values, healthy.tags, healthy.period_ns, valid=valid, gap=gap)
    guards = Guards(learnt(healthy), ["x1", "x3"])
    batch = guards.rows(record)
    for k, frame in enumerate(frames_of(record)):
        onset = guards.step(frame.values, frame.valid, frame.gap)
        assert_array_equal(guards.valid, batch.valid[k])
        assert (onset or frame.gap) == bool(batch.gap[k])
    assert guards.masked_rows > 0


def test_watching_takes_no_memory_and_without_facts_nothing_is_watched():
    healthy, fresh = plant("linear")
    rounded = np.round(fresh, 1)
    guards = Guards(learnt(healthy), [tag.name for tag in healthy.tags])
    valid = np.ones(10, np.uint8)
    for row in rounded[:100]:
        guards.step(row, valid, False)
    tracemalloc.start()
    try:
        guards.step(rounded[0], valid, False)
        before = tracemalloc.get_traced_memory()[0]
        for row in rounded[:5000]:
            guards.step(row, valid, False)
        assert tracemalloc.get_traced_memory()[1] - before < 4096
    finally:
        tracemalloc.stop()
    free = Guards({}, ["a", "b"])
    assert free.step(np.array([1.0, 2.0]), np.array([1, 0], np.uint8), False) is False
    assert free.valid.tolist() == [1, 0] and free.reasons == {}


# -- pauses -----------------------------------------------------------------------------------------------------

SWITCHES = [Tag("a"), Tag("mode", kind=TagKind.STATE), Tag("off", kind=TagKind.STATE), Tag("works", kind=TagKind.STATE)]


def run(monitor, record):
    """(alert, raised, status, quality, score) of each row."""
    rows = []
    for frame in frames_of(record):
        v = monitor.step(frame)
        rows.append((v.alert, v.raised, v.status, v.quality, v.score))
    return rows


def switched(n, seed=0, **columns):
    """Noise on a, with these columns for mode, off and works."""
    record = noise_record(n, SWITCHES, seed)
    for i, tag in enumerate(SWITCHES[1:], start=1):
        record.values[:, i] = columns.get(tag.name, 0.0)
    return record


def monitor_with(state_tag="", **settings):
    healthy = switched(6000, 1, mode=np.arange(6000) // 500 % 2)
    kept = ["a", "mode"] if state_tag else ["a"]
    return deviation_monitor(healthy.select(kept), group_tags=SWITCHES, state_tag=state_tag,
                             alert=AlertSettings(off_delay_ns=0, **settings))


@pytest.mark.parametrize(("key", "tag", "words"), [
    ("inhibit", "off", "inhibited by off"), ("maintenance", "works", "maintenance: works")])
def test_no_alert_while_a_tag_keeps_it_back_and_a_standing_one_ends(key, tag, words):
    monitor = monitor_with(**{key: (tag,) if key == "inhibit" else tag})
    live = switched(600, **{tag: np.repeat([0.0, 1.0, 0.0], 200)})
    live.values[100:500, 0] = 50.0
    rows = run(monitor, live)
    assert rows[199][0] and not any(row[0] for row in rows[200:400]) and rows[450][0]
    assert {row[3] for row in rows[200:400]} == {words} and min(row[4] for row in rows[250:400]) > 1
    assert {row[2] for row in rows[200:400]} == {GOOD}


def test_an_inhibit_tag_that_is_bad_does_not_inhibit_and_says_so():
    monitor = monitor_with(inhibit=("off",), maintenance="works")
    live = switched(400, off=1.0)
    live.values[:, 0] = 50.0
    live.valid[200:, 2] = 0
    rows = run(monitor, live)
    assert not any(row[0] for row in rows[:200]) and all(row[0] for row in rows[200:])
    assert {row[3] for row in rows[200:]} == {"off is Bad: it does not inhibit"}


def test_settling_after_a_change_of_state_keeps_the_alert_back_and_what_was_seen_then_does_not_count():
    monitor = monitor_with("mode", settling_ns=60 * PERIOD_NS)
    live = switched(600, mode=np.repeat([0.0, 1.0], 300))
    live.values[300:355, 0] = 50.0
    rows = run(monitor, live)
    assert not any(row[0] for row in rows)
    assert {row[2:4] for row in rows[300:360]} == {(UNCERTAIN_SUB_NORMAL, "settling after a change of mode")}
    assert rows[354][4] > 1 and rows[361][4] < 1 and rows[360][3] == "Good"
    without = run(monitor_with("mode"), live)
    assert any(row[0] for row in without)
    live.values[300:500, 0] = 50.0
    late = run(monitor_with("mode", settling_ns=60 * PERIOD_NS), live)
    assert next(k for k, row in enumerate(late) if row[1]) in range(360, 375)


def test_a_state_that_was_not_learnt_ends_a_standing_alert_and_an_unknown_one_does_not():
    live = switched(600, mode=np.repeat([0.0, 7.0, 1.0], 200))
    live.values[100:250, 0] = 50.0
    rows = run(monitor_with("mode"), live)
    assert rows[199][0] and not any(row[0] for row in rows[200:])
    assert {row[3] for row in rows[200:400]} == {"operating state not learnt"}
    live.valid[200:400, 1] = 0
    assert all(row[0] for row in run(monitor_with("mode"), live)[200:400])


def test_settling_rows_are_those_of_the_stream():
    values = np.repeat([1.0, 2.0, 2.0, 3.0], 10)
    valid = np.ones(40, np.uint8)
    valid[8:14] = 0
    ns = np.arange(40) * 1000
    assert np.flatnonzero(settling_rows(values, valid, ns, 5000)).tolist() == [14, 15, 16, 17, 18, 30, 31, 32, 33, 34]


def test_a_switch_that_is_no_tag_is_refused():
    with pytest.raises(ModelTagsError, match="nowhere"):
        Pauses(["a"], inhibit=["nowhere"])
