"""The engine: a stream is judged as a batch is, silence is never an anomaly, and a fault is seen, told and over."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from opcua_detector.absence import Absence
from opcua_detector.api import (
    BAD_DATA_UNAVAILABLE,
    BAD_WAITING_FOR_INITIAL_DATA,
    GOOD,
    SEVERITY_MASK,
    UNCERTAIN_SUB_NORMAL,
    Frame,
    Tag,
    TagKind,
)
from opcua_detector.engine import AlertSettings, Engine, frames_of
from opcua_detector.errors import ModelTagsError
from opcua_detector.nodes import EXPLANATION_CHARS
from sim_server.processes import Fault
from tests.plants import (
    PERIOD_NS,
    deviation_monitor,
    lorenz_monitor,
    lorenz_rows,
    noise_record,
    product_monitor,
    record_of,
    scores,
    sharp_monitor,
)

MODE = Tag("mode", kind=TagKind.STATE)
FAULT = Fault("beta", 1.25, 3000, 6000)


def verdicts(monitor, record, *fields):
    """The named fields of the verdict of each row."""
    engine = Engine([monitor])
    rows = []
    for frame in frames_of(record):
        verdict = engine.step(frame)[0]
        rows.append(tuple(getattr(verdict, name) for name in fields))
    return rows


def batch(model, methods, record):
    """Score and the paper's residuals of each row by the array calls: float64[n, 6]."""
    columns = model.plan.prepare(record.select([tag.name for tag in model.tags]))
    residual = np.concatenate([method.residuals(columns) for method in methods], axis=1)
    residual = Absence.of(model.calibration, methods).rows(columns, residual)
    return model.calibration.score_rows(residual, columns.gap, np.zeros(len(record), np.int64))


def holed(record, seed):
    """The record with gaps, stretches of masked values and single masked ones."""
    rng = np.random.default_rng(seed)
    gap, valid = record.gap.copy(), record.valid.copy()
    gap[rng.choice(len(record), 4, replace=False)] = 1
    valid[rng.random(valid.shape) < 0.01] = 0
    start = int(rng.integers(0, len(record) - 200))
    valid[start:start + 150, int(rng.integers(valid.shape[1]))] = 0
    values = np.where(valid != 0, record.values, np.nan)
    return replace(record, gap=gap, valid=valid, values=values)


# -- stream and batch -------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.integers(0, 2**32 - 1))
def test_stream_and_batch_agree_over_gaps_masks_and_several_intervals(seed):
    whole = holed(lorenz_rows(2500, 5), seed)
    record = whole.take(np.r_[0:900, 1000:1400, 1401:2500])  # several intervals
    assert record.gap.sum() >= 3
    monitor = lorenz_monitor(record.tags)
    seen = np.array(verdicts(monitor, record, "score", "r_trans", "r_bound", "r_conf"), float)
    expected = batch(monitor.model, monitor.methods, record)[:, [0, 3, 4, 5]]
    assert 1000 < np.isfinite(seen[:, 0]).sum() < len(record)
    assert_allclose(seen, expected, rtol=0, atol=1e-10)


def test_with_an_onnx_method_stream_and_batch_agree_to_its_precision():
    record = holed(lorenz_rows(2500, 5), 3)
    monitor = product_monitor(record.tags)
    seen = np.array(verdicts(monitor, record, "score", "r_trans", "r_bound", "r_conf"), float)
    expected = batch(monitor.model, monitor.methods, record)[:, [0, 3, 4, 5]]
    assert np.isfinite(seen[:, 0]).sum() > 1000
    assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)


def test_a_replay_gives_the_same_verdicts_as_the_first_run():
    record = holed(lorenz_rows(1500, 5), 1)
    first, second = lorenz_monitor(record.tags), lorenz_monitor(record.tags)
    fields = ("score", "status", "quality", "alert", "event_no", "source_ns", "seq", "model_id")
    assert repr(verdicts(first, record, *fields)) == repr(verdicts(second, record, *fields))


def test_the_order_of_tags_in_the_group_and_tags_beside_them_do_not_matter():
    record = lorenz_rows(1500, 5)
    beside = np.column_stack([np.full(1500, np.nan), record.values[:, 1], np.arange(1500.0), record.values[:, 0]])
    mixed = record_of(beside, ["dead", "x3", "clock", "x1"])
    plain, other = lorenz_monitor(record.tags), lorenz_monitor(mixed.tags)
    assert_array_equal(scores(plain, record), scores(other, mixed))
    assert other.verdict.status == GOOD and other.verdict.tags == ("x1", "x3")


def test_two_monitors_of_a_group_do_not_disturb_each_other():
    record = lorenz_rows(1000, 5)
    alone = scores(lorenz_monitor(record.tags), record)
    pair = Engine([lorenz_monitor(record.tags), deviation_monitor(noise_record(2000, ["x1", "x3"]))])
    both = [[v.score for v in pair.step(frame)] for frame in frames_of(record)]
    assert_array_equal(np.array(both)[:, 0], alone)


def test_a_monitor_refuses_frames_of_other_tags():
    with pytest.raises(ModelTagsError, match="x3 is not among"):
        lorenz_monitor([Tag("x1"), Tag("y")])


def test_counters_and_angles_are_judged_by_their_columns_and_told_by_their_tags():
    n = 3000
    rng = np.random.default_rng(1)
    tags = [Tag("phi", kind=TagKind.ANGLE), Tag("total", kind=TagKind.COUNTER), Tag("p")]
    values = np.column_stack([rng.uniform(0, 360, n), np.cumsum(rng.exponential(size=n)), rng.standard_normal(n)])
    monitor = deviation_monitor(record_of(values, tags))
    assert [c.name for c in monitor.plan.columns] == ["sin(phi)", "cos(phi)", "step of total", "p"]
    burst = np.column_stack([rng.uniform(0, 360, 200), np.cumsum(rng.exponential(50, size=200)), np.zeros(200)])
    scores(monitor, record_of(burst, tags))
    assert monitor.verdict.tags[int(np.argmax(monitor.verdict.contribution))] == "total"


# -- status -----------------------------------------------------------------------------------------------------


def test_the_first_rows_are_bad_and_warming_up_and_have_no_score():
    rows = verdicts(lorenz_monitor(lorenz_rows(300, 5).tags), lorenz_rows(300, 5), "score", "status", "quality")
    first = next(k for k, (score, _, _) in enumerate(rows) if score == score)
    method = lorenz_monitor(lorenz_rows(300, 5).tags).methods[0]
    assert first == np.flatnonzero(np.isfinite(method.residuals(lorenz_rows(300, 5))).any(axis=1))[0]
    assert method.memory - 1 <= first <= method.memory + method.lag
    assert {row[1:] for row in rows[:first]} == {(BAD_WAITING_FOR_INITIAL_DATA, "warming up")}
    assert {row[1:] for row in rows[first:]} == {(GOOD, "Good")}


def test_masked_tags_make_the_verdict_uncertain_and_are_named():
    record = noise_record(300, ["a", "b", "c"])
    valid = record.valid.copy()
    valid[100:110, 1] = 0
    valid[105:110, 2] = 0
    monitor = deviation_monitor(noise_record(2000, ["a", "b", "c"], seed=1))
    rows = verdicts(monitor, replace(record, valid=valid), "status", "quality")
    assert set(rows[100:105]) == {(UNCERTAIN_SUB_NORMAL, "masked: b")}
    assert set(rows[105:110]) == {(UNCERTAIN_SUB_NORMAL, "masked: b, c")}
    assert set(rows[50:100]) == set(rows[110:]) == {(GOOD, "Good")}


def test_a_masked_tag_that_the_monitor_does_not_use_makes_nothing_uncertain():
    healthy = noise_record(2000, ["a", "b"], seed=1)
    monitor = deviation_monitor(healthy, group_tags=[Tag("a"), Tag("other"), Tag("b")])
    record = noise_record(200, ["a", "other", "b"])
    valid = record.valid.copy()
    valid[:, 1] = 0
    assert verdicts(monitor, replace(record, valid=valid), "status")[-1] == (GOOD,)


def test_one_bad_tag_does_not_silence_the_others():
    healthy = noise_record(2000, ["a", "b", "c"], seed=1)
    record = noise_record(300, ["a", "b", "c"])
    values, valid = record.values.copy(), record.valid.copy()
    valid[:, 1], values[:, 1] = 0, np.nan
    values[150:, 0] += 30
    monitor = deviation_monitor(healthy)
    seen = scores(monitor, replace(record, values=values, valid=valid))
    assert seen[148] < 1 < seen[-1]
    assert monitor.verdict.contribution[0] > 0.9


def test_a_state_that_was_not_learnt_gives_no_score_and_says_so():
    healthy = noise_record(4000, ["a", MODE], seed=1)
    healthy.values[:, 1] = np.arange(4000) // 2000
    monitor = deviation_monitor(healthy, state_tag="mode")
    live = noise_record(400, ["a", MODE])
    live.values[:, 1] = np.repeat([0, 7, 1, 1], 100)
    live.valid[350:, 1] = 0  # an unknown state is none that was learnt
    rows = verdicts(monitor, live, "score", "status", "quality", "alert")
    unknown = rows[100:200] + rows[350:]
    assert np.isnan([row[0] for row in unknown]).all()
    assert {row[1:] for row in unknown} == {(BAD_DATA_UNAVAILABLE, "operating state not learnt", False)}
    assert {row[1:3] for row in rows[50:100] + rows[250:350]} == {(GOOD, "Good")}


def test_bad_good_and_uncertain_are_told_by_the_top_bits_of_the_status():
    assert [status & SEVERITY_MASK for status in (GOOD, UNCERTAIN_SUB_NORMAL, BAD_WAITING_FOR_INITIAL_DATA,
                                                  BAD_DATA_UNAVAILABLE)] == [0, 0x40000000, 0x80000000, 0x80000000]


# -- gaps -------------------------------------------------------------------------------------------------------


def test_a_gap_starts_again_without_an_alert_however_far_the_values_have_moved():
    record = lorenz_rows(1200, 5)
    cut = record.take(np.r_[0:600, 700:1200])
    monitor = lorenz_monitor(record.tags)
    rows = verdicts(monitor, cut, "score", "status", "raised", "alert")
    warming = [k for k, row in enumerate(rows) if row[1] == BAD_WAITING_FOR_INITIAL_DATA]
    assert warming[0] == 0 and 600 in warming and max(warming) < 600 + 150
    assert not any(row[2] or row[3] for row in rows)


def test_after_a_gap_nothing_is_left_of_the_rows_before():
    record = lorenz_rows(1500, 5)
    used, fresh = lorenz_monitor(record.tags), lorenz_monitor(record.tags)
    scores(used, record_of(record.values[:500] * 3, record.tags))
    assert_array_equal(scores(used, record.rows(500, 1500)), scores(fresh, record.rows(500, 1500)))


def test_a_standing_alert_stands_over_a_gap():
    healthy = noise_record(2000, ["a"], seed=1)
    monitor = deviation_monitor(healthy)
    far = record_of(np.full((100, 1), 50.0), ["a"])
    scores(monitor, far)
    assert monitor.verdict.alert and monitor.verdict.event_no == 1
    frame = next(frames_of(far))
    assert frame.gap
    after = monitor.step(frame)
    assert after.alert and np.isnan(after.score) and not after.raised and not after.cleared
    assert after.status == BAD_WAITING_FOR_INITIAL_DATA


# -- alerts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty():
    """(monitor, record, [(alert, raised, cleared, score)], explanations at each raise) of a run with a fault."""
    record = lorenz_rows(9000, 9, FAULT)
    monitor = sharp_monitor(record.tags)
    rows, told = [], []
    for frame in frames_of(record):
        v = monitor.step(frame)
        rows.append((v.alert, v.raised, v.cleared, v.score, v.contribution.sum(), v.severity, v.event_no))
        if v.raised:
            told.append((monitor.snapshot(), monitor.explain(monitor.snapshot())))
    return monitor, record, rows, told


# The sharp one alarms on its longest window too, which holds the fault for as long as it is.
@pytest.mark.parametrize(("monitor_of", "clears_within"), [(sharp_monitor, 1000 + 100), (product_monitor, 600)])
def test_a_fault_raises_an_alert_that_clears_after_its_end_and_none_before(monitor_of, clears_within):
    record = lorenz_rows(9000, 9, FAULT)
    monitor = monitor_of(record.tags)
    assert int(monitor.model.calibration.windows.max()) == 1000
    rows = verdicts(monitor, record, "alert", "raised", "cleared")
    raised = [k for k, row in enumerate(rows) if row[1]]
    cleared = [k for k, row in enumerate(rows) if row[2]]
    assert record.truth[FAULT.start_row] and not record.truth[FAULT.stop_row]
    assert raised and raised[0] > FAULT.start_row and raised[-1] < FAULT.stop_row + 120
    assert len(cleared) == len(raised) and cleared[-1] < FAULT.stop_row + clears_within
    assert not any(row[0] for row in rows[:FAULT.start_row] + rows[FAULT.stop_row + clears_within:])


def test_severity_and_event_number_go_with_the_alert(faulty):
    rows = faulty[2]
    events = 0
    for alert, raised, _, _, _, severity, event_no in rows:
        events += raised
        assert (severity, event_no) == (500 if alert else 0, events)


def test_contributions_sum_to_one_while_the_score_is_up_and_are_zero_while_it_is_low(faulty):
    rows = faulty[2]
    high = [row[4] for row in rows if row[3] >= 1.0]
    low = [row[4] for row in rows if not row[3] >= 0.5]
    assert len(high) > 100 and len(low) > 100
    assert_allclose(high, 1.0, rtol=0, atol=1e-12)
    assert set(low) == {0.0}


def test_an_alert_is_explained_in_one_sentence_with_ranked_causes(faulty):
    monitor, _, _, told = faulty
    for taken, explanation in told:
        assert 10 < len(explanation.sentence) <= EXPLANATION_CHARS
        assert explanation.sentence.startswith(("x1 ", "x3 ", "something is wrong with x"))
        assert explanation.causes and explanation.event_no == taken.event_no > 0
        assert explanation.source_ns == int(taken.source_ns[-1])
        top = monitor.model.tags[int(np.argmax(taken.contribution))].name
        assert explanation.causes[0].tag == top
        assert monitor.cause_text(explanation.causes[0]) == explanation.sentence
        assert 0 < sum(cause.share for cause in explanation.causes) <= len(monitor.methods) + 1e-9


def test_explaining_changes_nothing_and_a_snapshot_outlives_the_steps_after_it(faulty):
    monitor, _, _, told = faulty
    taken, explanation = told[0]
    assert repr(monitor.explain(taken)) == repr(explanation)  # many steps later; repr, since NaN != NaN
    assert_array_equal(np.diff(taken.source_ns), PERIOD_NS)
    record = lorenz_rows(9000, 9, FAULT)
    quiet, asked = lorenz_monitor(record.tags), lorenz_monitor(record.tags)
    record = record.rows(0, 600)
    for k, (frame, again) in enumerate(zip(frames_of(record), frames_of(record), strict=True)):
        quiet.step(frame)
        asked.step(again)
        if k % 50 == 0:
            asked.explain(asked.snapshot())
        assert_array_equal(quiet.verdict.score, asked.verdict.score)
        assert_array_equal(quiet.verdict.residual, asked.verdict.residual)


def test_explaining_before_anything_is_known_gives_a_sentence_too():
    record = lorenz_rows(300, 5)
    monitor = lorenz_monitor(record.tags)
    monitor.step(next(frames_of(record)))
    assert monitor.explain(monitor.snapshot()).sentence == "no single cause stands out"


def test_delays_count_on_the_clock_of_the_rows():
    healthy = noise_record(2000, ["a"], seed=1)
    alert = AlertSettings(on_delay_ns=30 * PERIOD_NS, off_delay_ns=50 * PERIOD_NS, severity=900)
    monitor = deviation_monitor(healthy, alert=alert)
    at_once = deviation_monitor(healthy, alert=AlertSettings(off_delay_ns=0))
    values = np.concatenate([np.zeros(100), np.full(200, 50.0), np.zeros(300)])[:, None]
    late, soon = ([row[0] for row in verdicts(m, record_of(values, ["a"]), "alert")] for m in (monitor, at_once))
    assert late.index(True) - soon.index(True) == 30
    assert (599 - late[::-1].index(True)) - (599 - soon[::-1].index(True)) == 50


def test_a_restarted_monitor_forgets_a_standing_alert_and_goes_on_numbering():
    monitor = deviation_monitor(noise_record(2000, ["a"], seed=1))
    far = record_of(np.full((100, 1), 50.0), ["a"])
    monitor.continue_events(41)
    scores(monitor, far)
    assert monitor.verdict.alert and monitor.verdict.event_no == 42
    monitor.restart()
    assert monitor.step(next(frames_of(far))).alert is False
    scores(monitor, far)
    assert monitor.verdict.event_no == 43


# -- the loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor_of", [sharp_monitor, product_monitor])
def test_nothing_grows_over_10_000_steps_with_masks_gaps_and_alerts(monitor_of):
    record = lorenz_rows(5000, 9, Fault("beta", 1.25, 1000, 3000))
    monitor = monitor_of(record.tags)
    engine = Engine([monitor])
    frame = Frame.empty(2)

    def run(rows):
        for t in rows:
            frame.values[:] = record.values[t]
            frame.valid[:] = t % 97 != 0
            frame.gap, frame.seq = t % 2000 == 0, t
            frame.source_ns += PERIOD_NS
            engine.step(frame)

    run(range(5000))
    tracemalloc.start()
    try:
        run(range(50))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        run(range(5000))
        run(range(5000))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert monitor.verdict.event_no >= 3
    assert peak < 4096


def test_frames_of_a_record_are_its_rows():
    record = holed(lorenz_rows(400, 5), 2)
    for k, frame in enumerate(frames_of(record)):
        assert_array_equal(frame.values, record.values[k])
        assert_array_equal(frame.valid, record.valid[k])
        assert (frame.source_ns, frame.gap, frame.seq) == (record.source_ns[k], bool(record.gap[k]), k)
