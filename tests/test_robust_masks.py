"""Masks with a reason: near-constant tags at the fit, tags that stand still and values that are missing or Bad live."""

from __future__ import annotations

import tracemalloc
from functools import cache

import numpy as np
import pytest
from asyncua.ua import status_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import opcua_detector
from opcua_detector import guards
from opcua_detector.api import GOOD, UNCERTAIN_SUB_NORMAL, Frame, Tag, TagKind
from opcua_detector.engine import frames_of
from opcua_detector.errors import RecordError
from opcua_detector.fitting import fit_monitor
from tests import fault_plants as plants
from tests.plants import DeviationParams, DeviationPlugin, noise_record

N = 8000
EU = (0.0, 50.0)


def with_quiet(n, seed, quiet, tag="y"):
    """Rows of the loop with one more tag, named y, float64[n] or one value."""
    return np.column_stack([plants.LINEAR.healthy(n, seed), np.broadcast_to(quiet, n)]), (*plants.LOOP, named(tag))


def named(tag):
    return tag if isinstance(tag, Tag) else Tag(tag)


def moved_three_times(n):
    return np.repeat([20.0, 21.0, 20.5, 20.0], n // 4)


def streamed(monitor, record):
    """(alert, status, quality, score) of each row."""
    return [(v.alert, v.status, v.quality, v.score) for frame in frames_of(record) for v in [monitor.step(frame)]]


# -- near-constant in the healthy record ------------------------------------------------------------------------


@cache
def fitted_with(name):
    quiet, tag = {"moved": (moved_three_times(N), Tag("y")), "constant": (24.0, Tag("y", eu_range=EU)),
                  "zero": (0.0, Tag("y", eu_range=EU)), "no range": (24.0, Tag("y"))}[name]
    return opcua_detector.fit(*with_quiet(N, 1, quiet, tag), 1.0)


def test_a_tag_that_moved_three_times_is_left_out_with_reason_and_next_step_and_nothing_else_changes():
    model = fitted_with("moved")
    assert model.report.excluded == {"y": (
        "moved 3 times in 2.2 h of healthy record: not learnt; record a time in which it moves, or leave it out; told "
        "only when it leaves 17.9 to 23.1")}
    assert dict(model.normality.excluded) == model.report.excluded
    assert all("y" not in m.columns for m in model.normality.methods if m.plugin != "checks")
    live, _ = with_quiet(3000, 5, moved_three_times(3000))
    live[1000:1400, 3] += 2 * plants.usual(plants.LINEAR)[1][3]
    score = model.score(live)
    assert_array_equal(score, plants.fitted(plants.LINEAR).score(live[:, :-1]))
    assert score[1050:1400].min() > 1.0


@pytest.mark.parametrize(("name", "usual", "near", "far"), [
    ("moved", 20.0, 22.5, 31.0), ("constant", 24.0, 25.5, 35.0), ("zero", 0.0, -1.5, 12.0)])
def test_a_tag_that_hardly_moved_is_told_by_itself_when_it_leaves_its_values_by_far_and_only_then(
    name, usual, near, far,
):
    model = fitted_with(name)
    live, _ = with_quiet(1200, 6, np.repeat([usual, near, usual, far], 300))
    monitor = model.monitor()
    seen = streamed(monitor, model.record(live))
    alarm = [row[0] for row in seen]
    assert not any(alarm[:900]) and all(alarm[905:])
    said = monitor.explain(monitor.snapshot())
    assert said.shares[0] == ("y", 1.0) and {cause.tag for cause in said.causes} == {"y"}
    assert said.sentence.startswith(f"y is {far:g}") and "all that was seen in healthy operation" in said.sentence
    assert_array_equal(model.score(live), [row[3] for row in seen])


def test_a_constant_whose_unit_has_no_range_is_left_out_for_good():
    model = fitted_with("no range")
    assert model.report.excluded == {"y": "constant at 24"}
    assert "y" not in {tag.name for tag in model.normality.tags}
    constant = fitted_with("constant")
    assert constant.report.excluded["y"] == (
        "constant at 24: nothing to learn; record a time in which it moves, or leave it out; told only when it leaves "
        "21.5 to 26.5")
    assert "y" in {tag.name for tag in constant.normality.tags}


def test_without_the_checks_a_near_constant_tag_is_left_out_for_good():
    record = noise_record(4000, ["a", Tag("y", eu_range=EU), Tag("z", eu_range=EU)])
    record.values[:, 1], record.values[:, 2] = moved_three_times(4000), 24.0
    model, report = fit_monitor("plain", record, [("deviation", DeviationPlugin(), DeviationParams())])
    assert [tag.name for tag in model.tags] == ["a"] and set(report.excluded) == {"y", "z"}
    assert "told only" not in report.excluded["y"] and "moved 3 times in 40 s" in report.excluded["y"]


def test_a_setpoint_that_moved_three_times_stays_an_input():
    rows, tags = with_quiet(N, 1, moved_three_times(N), Tag("y", kind=TagKind.SETPOINT))
    model = opcua_detector.fit(rows, tags, 1.0)
    assert model.report.excluded == {} and "y" in model.normality.methods[0].columns


def test_changes_over_a_gap_or_a_hole_are_counted_as_what_they_are():
    """Seven moves, five of which lie in gaps of the record: two were seen."""
    rows, tags = with_quiet(N, 1, np.repeat(np.arange(8.0) % 3, N // 8))
    edges = np.arange(1, 6) * (N // 8)
    keep = np.setdiff1d(np.arange(N), (edges[:, None] + np.arange(-3, 3)).ravel())
    valid = np.ones(rows.shape, bool)
    valid[6 * (N // 8) - 60:6 * (N // 8), -1] = False  # a masked stretch is no gap: the move over it was seen
    model = opcua_detector.fit(rows[keep], tags, 1.0, times=keep.astype(float), valid=valid[keep])
    assert model.report.excluded["y"].startswith("moved 2 times")


def test_a_record_of_near_constant_tags_alone_is_refused_with_the_reasons():
    with pytest.raises(RecordError, match="no tag is left to judge") as caught:
        opcua_detector.fit(moved_three_times(4000)[:, None], ["y"], 1.0)
    assert "moved 3 times" in str(caught.value) and caught.value.next_step


# -- standing still ---------------------------------------------------------------------------------------------

FLOW, OUTLET = 1, 7
STUCK_AT, HOUR = 1500, 3600


@cache
def stuck_hour(other):
    """Rows in which the flow stands still from STUCK_AT on; where `other`, the outlet lies 4 spreads off at the end."""
    rows = plants.LINEAR.healthy(STUCK_AT + HOUR + 600, 77)
    rows[STUCK_AT:, FLOW] = rows[STUCK_AT, FLOW]
    if other:
        rows[STUCK_AT + HOUR:, OUTLET] += 4 * plants.usual(plants.LINEAR)[1][OUTLET]
    return rows


def test_a_tag_that_stands_still_alarms_and_is_masked_with_its_reason_without_a_hole_in_the_score():
    model = plants.fitted(plants.LINEAR)
    monitor = model.monitor()
    seen = streamed(monitor, model.record(stuck_hour(False)))
    alarm, score = np.array([row[0] for row in seen]), np.array([row[3] for row in seen])
    first = int(alarm.argmax())
    assert not alarm[:STUCK_AT].any() and first <= STUCK_AT + 25 and alarm[first:].all()
    assert np.isfinite(score[20:]).all() and score[first:].min() >= 1.0
    about, lasted = seen[-1][2].split(" for ")
    assert about == f"flow masked: stands still at {stuck_hour(False)[-1, FLOW]:.6g}"
    assert lasted in {f"{k} min, longest learnt no two rows" for k in range(63, 71)}
    masked = [k for k, row in enumerate(seen) if "flow masked" in row[2]]
    assert masked == list(range(masked[0], len(seen))) and first < masked[0] <= STUCK_AT + 40
    assert {row[1] for row in seen[masked[0]:]} == {UNCERTAIN_SUB_NORMAL} and seen[masked[0] - 1][1] == GOOD
    assert len({row[2] for row in seen[masked[0]:]}) < 60  # its duration is not written anew at every row
    said = monitor.explain(monitor.snapshot())
    assert said.shares == (("flow", 1.0),) and {cause.tag for cause in said.causes} == {"flow"}
    assert "for 70 min; it never stood still so long" in said.sentence
    assert_array_equal(model.score(stuck_hour(False)), score)


def test_an_hour_of_standing_still_hides_no_fault_of_another_tag():
    model = plants.fitted(plants.LINEAR)
    monitor = model.monitor()
    rows = stuck_hour(True)
    before = STUCK_AT + HOUR
    told = []
    for k, frame in enumerate(frames_of(model.record(rows))):
        monitor.step(frame)
        if k in (before - 1, before + 60, len(rows) - 1):
            told.append(monitor.explain(monitor.snapshot()))
    quiet, soon, late = told
    assert [tag for tag, _ in quiet.shares] == ["flow"]
    for said in (soon, late):
        assert {tag for tag, share in said.shares if share > 0.2} == {"flow", "outlet temperature"}
        assert {"flow", "outlet temperature"} <= {cause.tag for cause in said.causes}


def test_the_other_tags_are_judged_as_if_the_one_that_stands_still_were_not_valid():
    """From a while after the mask on, residuals are those of rows in which the tag is Bad."""
    model = plants.fitted(plants.LINEAR)
    rows = stuck_hour(True)
    valid = np.ones(rows.shape, bool)
    valid[STUCK_AT + 28:, FLOW] = False
    columns = [model.normality.plan.prepare(model.record(rows, valid=mask)) for mask in (valid, None)]
    regression = model._methods[0]
    guarded = model.normality.plan.prepare(model._guards.rows(model.record(rows)))
    assert_array_equal(regression.residuals(guarded), regression.residuals(columns[0]))
    assert not np.array_equal(regression.residuals(guarded), regression.residuals(columns[1]), equal_nan=True)


def test_the_mask_ends_with_the_first_other_value_and_so_does_the_alert():
    model = plants.fitted(plants.LINEAR)
    rows = plants.LINEAR.healthy(2400, 78)
    rows[600:1200, FLOW] = rows[600, FLOW]
    seen = streamed(model.monitor(), model.record(rows))
    masked = np.array(["flow masked" in row[2] for row in seen])
    assert masked[1199] and not masked[1200:].any() and seen[1199][0] and not any(row[0] for row in seen[1300:])
    assert_array_equal(model.score(rows), [row[3] for row in seen])


def test_all_tags_standing_still_at_once_go_on_alarming():
    model = plants.fitted(plants.LINEAR)
    rows = plants.LINEAR.healthy(1500, 79)
    rows[500:] = rows[500]
    seen = streamed(model.monitor(), model.record(rows))
    assert all(row[0] for row in seen[540:]) and min(row[3] for row in seen[540:]) >= 1.0
    assert seen[-1][2].count("stands still") == 10


@pytest.mark.parametrize("plant", [plants.LORENZ, plants.THROTTLE], ids=lambda plant: plant.name)
@pytest.mark.parametrize("k", [0, 1])
def test_standing_still_on_a_nonlinear_plant(plant, k):
    model = plants.fitted(plant)
    rows = plant.healthy(6000, 5)
    rows[2000:, k] = rows[2000, k]
    monitor = model.monitor()
    seen = streamed(monitor, model.record(rows))
    assert not any(row[0] for row in seen[:2000]) and all(row[0] for row in seen[2030:])
    assert np.isfinite([row[3] for row in seen[50:]]).all()
    assert monitor.explain(monitor.snapshot()).shares[0][0] == plant.tags[k].name
    assert_array_equal(model.score(rows), [row[3] for row in seen])


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.integers(0, 2**32 - 1))
def test_stream_and_batch_agree_over_runs_holes_gaps_and_a_tag_of_another_scale(seed):
    model = plants.fitted(plants.LINEAR)
    rng = np.random.default_rng(seed)
    rows = plants.LINEAR.healthy(2500, seed % 1000)
    n, std = len(rows), plants.usual(plants.LINEAR)[1]
    for start in rng.integers(50, n - 300, 4):
        k = int(rng.integers(10))
        rows[start:start + int(rng.integers(10, 300)), k] = rows[start, k]
    rows[1500:, 9] = np.round(rows[1500:, 9] / std[9]) * std[9]  # a step as large as its spread: masked, all start anew
    valid = rng.random(rows.shape) > 0.01
    valid[900:960, int(rng.integers(10))] = False
    rows[~valid & (rng.random(rows.shape) < 0.5)] = np.nan
    steps = np.where(rng.random(n) < 0.002, 9, 1)
    times = np.cumsum(steps) * 10**9
    seen = streamed(model.monitor(), model.record(rows, times, valid))
    assert_array_equal(model.score(rows, times, valid), [row[3] for row in seen])
    assert any("stands still" in row[2] for row in seen) and any("fit again" in row[2] for row in seen)


def test_a_monitor_that_takes_over_while_a_tag_stands_still_alarms_on():
    model = plants.fitted(plants.LINEAR)
    record = model.record(stuck_hour(False))
    old, new, seen = model.monitor(), model.monitor(), []
    for frame in frames_of(record.rows(0, 3400)):
        if frame.seq < 3000:
            old.step(frame)
        if frame.seq == 3000:
            new.take_over(old)
        if frame.seq >= 2700:
            verdict = new.step(frame)
            seen.append((verdict.alert, verdict.quality))
    assert all(alert and "stands still" in quality for alert, quality in seen[300:])


def test_nothing_grows_while_a_tag_stands_still():
    model = plants.fitted(plants.LINEAR)
    monitor, record = model.monitor(), model.record(stuck_hour(True))
    frame = Frame.empty(len(record.tags))

    def run(rows):
        for k in rows:
            frame.values[:], frame.valid[:] = record.values[k], record.valid[k]
            frame.source_ns, frame.seq = int(record.source_ns[k]), k
            monitor.step(frame)

    run(range(2600))
    tracemalloc.start()
    try:
        run(range(2600, 2700))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        run(range(2700, 4700))
        assert tracemalloc.get_traced_memory()[1] - before < 4096
    finally:
        tracemalloc.stop()
    assert "stands still" in monitor.verdict.quality


def test_a_model_fitted_before_tags_were_masked_for_standing_still_is_still_good():
    facts = {key: value for key, value in plants.fitted(plants.LINEAR).normality.facts["guards"].items()
             if key != "still"}
    old = guards.Guards(facts, [tag.name for tag in plants.LOOP])
    for row in stuck_hour(False)[STUCK_AT:STUCK_AT + 500]:
        assert old.step(row, np.ones(10, np.uint8), False) is False
    assert old.reasons == {} and old.valid.all()


# -- missing and Bad --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "value", "words"), [
    (0x808C0000, 3.0, "masked: flow (BadSensorFailure)"),
    (0x80320000, np.nan, "masked: flow (missing, no sample yet: BadWaitingForInitialData)"),
    (0x80310000, np.nan, "masked: flow (missing, no sample in time: BadNoCommunication)"),
    (0x40900402, 3.0, "masked: flow (UncertainLastUsableValue)"),  # with info bits
    (0x80FE0000, 3.0, "masked: flow (StatusCode 0x80FE0000)"), (GOOD, np.nan, "masked: flow (missing)"),
    (GOOD, 3.0, "masked: flow")])
def test_a_value_that_is_not_used_is_named_with_its_status_code_or_as_missing(status, value, words):
    model = plants.fitted(plants.LINEAR)
    monitor = model.monitor()
    seen = []
    for frame in frames_of(model.record(plants.LINEAR.healthy(200, 3))):
        if frame.seq >= 100:
            frame.valid[FLOW], frame.status[FLOW], frame.values[FLOW] = 0, status, value
        verdict = monitor.step(frame)
        seen.append((verdict.status, verdict.quality))
    assert set(seen[20:100]) == {(GOOD, "Good")} and set(seen[100:]) == {(UNCERTAIN_SUB_NORMAL, words)}


def test_every_tag_that_is_missing_is_named_also_where_nothing_can_be_judged():
    model = plants.fitted(plants.LORENZ)
    monitor = model.monitor()
    for frame in frames_of(model.record(plants.LORENZ.healthy(4000, 3))):
        if frame.seq >= 500:
            frame.valid[:], frame.values[:] = 0, np.nan
            frame.status[:] = 0x808C0000, 0x80310000
        verdict = monitor.step(frame)
    words = "masked: x1 (BadSensorFailure), x3 (missing, no sample in time: BadNoCommunication)"
    assert np.isnan(verdict.score) and verdict.quality.endswith(words) and "no verdict" in verdict.quality


def test_the_names_of_status_codes_are_the_standard_ones():
    for code, name in guards._CODES.items():
        assert status_codes.get_name_and_doc(code)[0] == name
